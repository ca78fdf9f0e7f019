"""All steps of the report in order, and one page with every figure and number.

    python report.py
    python report.py --full --seed 0,1,2
    python report.py --labels my_corrections.csv
    python report.py --hand-in my_work --author "My Name" --checkpoint mine.ckpt

Each step is one of the scripts, run as you would run it yourself; its files are in
report/steps/<step>. A step is not run again if nothing that its results depend on has changed, so
a report that was stopped resumes where it stopped.
"""

import argparse
import base64
import contextlib
import csv
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli, metrics
from common.cli import PROJECT, UserError
from common.data import (
    CLASS_NAMES,
    PREPARED,
    SPLITS,
    Dataset,
    describe,
    is_reviewed,
    open_data,
    read_corrections,
)
from common.metrics import SCORE_TITLES
from common.model import choose_device, load_checkpoint

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout
from markupsafe import Markup
from PIL import Image

MAX_STEP_SECONDS = 1e7
SECONDS_FOR_CTRL_C = 2.0  # that a script is given to stop by itself
# What the results of each step depend on.
CODE = "common/*.py data/*.py models/*.ckpt label_review.html"
# What a step with another origin has left in its folder.
STALE = "*.ckpt *.db* predictions*.csv"
# What goes into the zip file to hand in, besides the report itself.
PACKED = (
    "*.py *.html README.md LICENSE Makefile pyproject.toml requirements*.txt "
    "constraints-oldest.txt common/*.py data/*.py data/README.md models/*.ckpt docs/*.md "
    "docs/*.png tests/*.py benchmarks/*.py"
)


# ---- the steps ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of the report."""

    name: str  # of its folder
    title: str
    weight: float  # typical seconds on two cores, to estimate the time left
    # {name} stands for the folder of another step, {labels} for the file of label corrections,
    # {checkpoint} for the model to hand in.
    command: str
    all_seeds: bool = False  # or only the first
    full: bool | None = None  # True: only with --full; False: only without; None: in every report

    @property
    def script(self) -> str:
        """The script's file name."""
        return self.command.split()[0]


TRAIN = "training.py --recipe"
ATTACK = "adversarial.py --checkpoint {recipes}/final.ckpt"
STEPS = (
    Step("data", "1. What is in the data", 17, "inspectData.py"),
    Step("pre-trained", "2. The pre-trained model", 9, "evaluation.py"),
    Step("label-errors", "3c. Which labels are wrong", 300, "label_errors.py"),
    Step("recipes", "3. The report's recipes, and tuned", 285, f"{TRAIN} all", all_seeds=True),
    Step(
        "corrected-labels",
        "3c. The final recipe with corrected labels",
        70,
        TRAIN + " final --labels {labels}",
        all_seeds=True,
    ),
    Step(
        "mismatch",
        "3g. Pixels in the wrong range",
        10,
        "evaluation.py --show-mismatch --checkpoint {recipes}/final.ckpt",
    ),
    Step("best", "3. The recipe best", 590, f"{TRAIN} best", all_seeds=True, full=True),
    Step("tuning", "3i. A search for settings", 750, "tuning.py", full=True),
    Step("model", "The model to hand in", 10, "evaluation.py --checkpoint {checkpoint}"),
    Step("learning-rates", "4. Learning rates", 80, "lr_analysis.py", all_seeds=True),
    Step("robust", "5. The recipe robust", 730, f"{TRAIN} robust", full=True),
    Step("attacks", "5. Attacks", 150, ATTACK, full=False),
    Step("attacks", "5. Attacks", 150, ATTACK + " --robust {robust}/robust.ckpt", full=True),
)


class Report:
    """The steps of one report, and the folder for their files.

    Raises:
        UserError: data, device, checkpoint or corrections can't be used (checked before any work).
    """

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.steps = [step for step in STEPS if step.full in (None, arguments.full)]
        self.seconds: dict[str, float] = {}
        self.versions = cli.versions()
        self.device = choose_device(arguments.device).type
        source = open_data(arguments.data)
        # If the network comes back halfway, `auto` must not switch to another data set.
        self.data_option = source.name if source.name in PREPARED else arguments.data
        self.train, self.dev = (source.load(split, arguments.quick) for split in SPLITS)
        self.data = describe(self.train, self.dev)
        if arguments.labels:
            read_corrections(arguments.labels, self.train)
        if arguments.checkpoint:
            load_checkpoint(arguments.checkpoint, arguments.pixel_range)

        steps = folder / "steps"
        top = "best/best.ckpt" if arguments.full else "recipes/tuned.ckpt"
        self.paths = {step.name: steps / step.name for step in self.steps} | {
            "checkpoint": arguments.checkpoint or steps / top,
            "labels": arguments.labels or steps / "label-errors/label_corrections.csv",
        }

    def run(self) -> None:
        """Run the steps that are not done yet, and print the progress."""
        for number, step in enumerate(self.steps):
            head = f"[{number + 1}/{len(self.steps)}] {step.title}"
            origin, state = self.origin_of(step), self.state_of(step)
            seconds = state.pop("seconds", None)  # None if it was not finished
            if state == origin and seconds is not None and self.result_of(step).is_file():
                cli.say(f"{head}: done before")
            else:
                cli.say(f"{head} ...{self.time_left(number)}")
                sys.stdout.flush()
                seconds = self.run_step(step, origin, resume=state == origin)
            self.seconds[step.name] = seconds

    def options_of(self, step: Step) -> list[str]:
        """Return the command-line options for a step's script."""
        arguments = self.arguments
        seeds = arguments.seed if step.all_seeds else arguments.seed[:1]
        options = [each.format_map(self.paths) for each in step.command.split()[1:]]
        options += ["--data", self.data_option, "--device", arguments.device]
        options += ["--seed", ",".join(map(str, seeds))]
        options += ["--out", str(self.paths[step.name])]
        if step.name == "model" and arguments.pixel_range:
            options += ["--pixel-range", "{:g},{:g}".format(*arguments.pixel_range)]
        return [*options, "--quick"] if arguments.quick else options

    def command_of(self, step: Step) -> str:
        """Return the command that runs a step, for the page."""
        return shlex.join([step.script, *self.options_of(step)])

    def origin_of(self, step: Step) -> dict[str, Any]:
        """Return everything that a step's results depend on."""
        named = [option for option in step.command.split() if "{" in option]
        inputs = [Path(option.format_map(self.paths)) for option in named]
        code = [file for pattern in CODE.split() for file in PROJECT.glob(pattern)]
        code.append(PROJECT / step.script)
        return {
            "options": self.options_of(step),
            "data": self.data,
            "device": self.device,
            "inputs": digest([path for path in inputs if path.is_file()]),
            "code": digest(code),
            "versions": self.versions,
        }

    def state_of(self, step: Step) -> dict[str, Any]:
        """Return the step.json of an earlier run; {} if it is missing or broken."""
        try:
            state = dict(cli.read_json(self.paths[step.name] / "step.json"))
        except (UserError, TypeError, ValueError):
            return {}
        seconds = state.get("seconds")
        possible = isinstance(seconds, float) and 0 <= seconds < MAX_STEP_SECONDS  # not NaN
        return state if possible or seconds is None else {}

    def result_of(self, step: Step) -> Path:
        """Return the path of a step's JSON file."""
        return self.paths[step.name] / f"{Path(step.script).stem}.json"

    def time_left(self, number: int) -> str:
        """Estimate how long the rest will take from the steps so far."""
        seeds = len(self.arguments.seed)
        weights = [step.weight * (seeds if step.all_seeds else 1) for step in self.steps]
        before, left = sum(weights[:number]), sum(weights[number:])
        left *= sum(self.seconds.values()) / before if before else 1
        return "" if self.arguments.quick else f" about {max(1, round(left / 60))} min left"

    def run_step(self, step: Step, origin: dict[str, Any], resume: bool) -> float:
        """Run a step's script; return how many seconds it took."""
        folder, start = self.paths[step.name], time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        options = origin["options"]
        if resume and "--recipe" in options:
            options = [*options, "--resume"]
        elif not resume:
            # These would be resumed later, or packed to hand in.
            for old in (file for kind in STALE.split() for file in folder.glob(kind)):
                old.unlink()
        cli.write_json(folder / "step.json", origin | {"seconds": None})
        with (folder / "printed.txt").open("wb") as printed:
            run_script(step.script, options, printed)
        seconds = round(time.perf_counter() - start, 1)
        cli.write_json(folder / "step.json", origin | {"seconds": seconds})
        return seconds

    def compare_steps(self) -> None:
        """Compare models of different steps on the same images; write comparisons.json."""
        found = {"corrected-labels": self.compare("corrected-labels/final", "recipes/final")}
        if self.arguments.full:
            found["best"] = self.compare("best/best", "recipes/tuned")
        found["near_duplicates"] = self.without_near_duplicates()
        found["data"] = {key: self.data[key] for key in ("name", "splits")}  # its path is private
        cli.write_json(self.folder / "steps/comparisons.json", found)

    def compare(self, run: str, baseline: str) -> dict[str, Any]:
        """Return the paired differences between two recipes of different steps."""
        labels = self.dev.labels
        predicted, others = self.predictions(run), self.predictions(baseline)
        return {score: metrics.compare(labels, predicted, others, score) for score in SCORE_TITLES}

    def predictions(self, run: str) -> np.ndarray:
        """Return the classes, [seeds, N], that a recipe of a step predicts for dev."""
        step, recipe = run.split("/")
        names = [recipe, *(f"{recipe}-seed{seed}" for seed in self.arguments.seed[1:])]
        files = [self.paths[step] / f"predictions-{name}.csv" for name in names]
        return np.stack([read_predictions(file, self.dev) for file in files])

    def without_near_duplicates(self) -> dict[str, Any]:
        """Return the scores of the model to hand in on dev without near-duplicates of train."""
        labels = self.dev.labels.numpy()
        predicted = read_predictions(self.paths["model"] / "predictions.csv", self.dev)
        path = self.paths["data"] / "inspectData.json"
        with explain_unreadable(path):
            pairs = cli.read_json(path)["near_duplicates"]
            others = np.delete(np.arange(len(labels)), [pair["dev"] for pair in pairs])
        whole = len(np.unique(labels[others])) == len(CLASS_NAMES)  # else there is no G-mean
        scores = metrics.evaluate(labels[others], predicted[others]) if whole else None
        return {"images": len(labels) - len(others), "others": scores}

    def write_page(self) -> Path:
        """Write the page; return its path."""
        path, files = self.folder / "index.html", Files(self.folder / "steps")
        about, machine = self.about(), describe_machine()
        try:
            page = cli.render("report.html", report=self, files=files, about=about, machine=machine)
        except Exception as error:  # of any kind, if somebody has edited a file
            if files.latest is None:
                raise
            raise unreadable(files.latest) from error
        cli.write_text(path, page)
        return path

    def about(self) -> dict[str, str]:
        """Return what the page and AUTHOR.txt say about the work and its author."""
        path, labels = self.paths["checkpoint"], self.paths["labels"]
        found = load_checkpoint(path, self.arguments.pixel_range)
        recipe = found.metadata.get("recipe")
        settings = dict(recipe) if isinstance(recipe, dict) else {}
        if isinstance(label_filter := settings.get("label_filter"), dict):
            settings["label_filter"] = label_filter.get("name")
        corrections = read_corrections(labels, self.train)
        accepted = sum(correction.accept for correction in corrections)
        reviewed = is_reviewed(labels, self.train, corrections)
        return {
            "author": cli.one_line(self.arguments.author) or "not named",
            "model": f"{path.name}, {found.describe()}",
            "settings": ", ".join(
                f"{key} {cli.safe_repr(value)}"
                for key, value in settings.items()
                if value is not None and value is not False
            ),
            "label corrections": f"{labels.name}, {accepted} of {len(corrections)} accepted"
            + ("" if reviewed else ", not reviewed by a person"),
            "command": shlex.join(["python", "report.py", *sys.argv[1:]]),
        }

    def files_to_pack(self) -> dict[Path, Path]:
        """Return the files to hand in, by their path in the zip file."""
        found = [file for pattern in PACKED.split() for file in PROJECT.glob(pattern)]
        files = {file.relative_to(PROJECT): file for file in found if file.is_file()}
        results = [self.folder / "steps/comparisons.json"]
        for step in self.steps:  # not those of a longer report that was made here before
            results += self.paths[step.name].iterdir()
        for file in results:
            # Without step.json files, `make report` runs all steps again.
            if file.suffix in (".json", ".csv") and file.name != "step.json":
                files["report" / file.relative_to(self.folder)] = file
        return files | {
            Path("report/index.html"): self.folder / "index.html",
            Path("report/model.ckpt"): self.paths["checkpoint"],
            Path("report/label_corrections.csv"): self.paths["labels"],
        }

    def pack(self, name: Path) -> Path:
        """Pack code, model, page and results into `<name>.zip`, enough to rerun everything."""
        about = "".join(f"{key}: {value}\n" for key, value in self.about().items())

        def write(part: Path) -> None:
            settings = {"compression": zipfile.ZIP_DEFLATED, "strict_timestamps": False}
            with zipfile.ZipFile(part, "w", **settings) as archive:
                archive.writestr(f"{name.name}/AUTHOR.txt", cli.clean(about))
                for packed, file in sorted(self.files_to_pack().items()):
                    archive.write(file, name.name / packed)

        path = name.with_name(f"{name.name}.zip")
        cli.remove_leftovers(path.parent)
        cli.write_atomic(path, write)
        return path


# ---- running and comparing the steps --------------------------------------------------------


def run_script(script: str, options: list[str], printed: Any) -> None:
    """Run a script with stdout in a file; progress and errors go to the terminal.

    If it fails, it has printed the reason: the report exits with the same status.
    """
    command = [sys.executable, str(PROJECT / script), *options]
    environment = os.environ | {cli.PARENT: str(os.getpid())}
    process = subprocess.Popen(command, stdout=printed, env=environment)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        # Ctrl-C reaches the script too; SIGTERM does not.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_FOR_CTRL_C)
        process.terminate()
        process.wait()
        raise
    if status < 0:
        raise UserError(f"{script}: was killed by signal {-status}")
    if status:
        sys.exit(status)


def describe_machine() -> str:
    """Describe the machine in a few words."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return f"{processor}, {os.cpu_count()} cores, {platform.system()}"


def digest(paths: list[Path]) -> str:
    """Return a fingerprint of the contents of files."""
    each = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)]
    return hashlib.sha256(" ".join(each).encode()).hexdigest()[:12]


def lock(folder: Path) -> AcquireReturnProxy:
    """Keep a second report out of the folder while the returned lock is held.

    The system frees the lock of a process that ends, for whatever reason.

    Raises:
        UserError: another report is being made there.
    """
    try:
        return FileLock(folder / "running.lock").acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{folder}: another report.py is writing to it") from error


@contextlib.contextmanager
def explain_unreadable(path: Path) -> Iterator[None]:
    """If a step's file can't be read, say how to make a new one.

    Raises:
        UserError: for example after a spreadsheet saved a table with semicolons.
    """
    try:
        yield
    except (UserError, OSError, ValueError, LookupError, TypeError, csv.Error) as error:
        raise unreadable(path) from error


def unreadable(path: Path) -> UserError:
    """Return the error for a step's file that can't be used."""
    return UserError(f"{path}: can't be read; delete {path.parent} to run this step again")


def read_predictions(path: Path, dataset: Dataset) -> np.ndarray:
    """Return the predicted classes [N] of a predictions file of a data set."""
    with explain_unreadable(path):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        if [row["label"] for row in rows] != [CLASS_NAMES[label] for label in dataset.labels]:
            raise ValueError("of other images")
        return np.array([CLASS_NAMES.index(row["predicted"]) for row in rows])


# ---- the page -------------------------------------------------------------------------------

SCREEN_DPI = 96  # CSS pixels per inch


class Files:
    """The files in `folder`, which holds one folder per step, and HTML for what is in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read = functools.cache(cli.read_json)
        self.latest: Path | None = None  # the file that was asked for last

    def value(self, file: str, path: str = "") -> Any:
        """Return the value at a path of keys in a JSON file, such as recipes/training.json."""
        self.latest = self.folder / file
        found = self.read(self.latest)
        for key in filter(None, path.split("/")):
            found = found[int(key) if isinstance(found, list) else key]
        return found

    def number(self, file: str, path: str, spec: str = ".3f") -> Markup:
        """Return a number from a JSON file as HTML that names its source; a dash for null.

        Of a list, it is the number of entries.
        """
        value, source = self.value(file, path), f"{file}: {path}"
        if value is None:
            return Markup("–")
        if isinstance(value, list):
            value, source = len(value), f"{source}, entries"
        text = format(value, spec).replace("-", "\N{MINUS SIGN}")
        return Markup('<data value="{}" title="{}">{}</data>').format(repr(value), source, text)

    def spread(self, file: str, path: str, score: str, spec: str = ".3f") -> Markup:
        """Return a mean over seeds as HTML, with its standard deviation if there are several."""
        mean = self.number(file, f"{path}/{score}", spec)
        if len(self.value(file, path).get("runs", [])) < 2:
            return mean
        return mean + Markup("&nbsp;±&nbsp;") + self.number(file, f"{path}/spread/{score}", spec)

    def interval(self, file: str, path: str, spec: str = ".2f") -> Markup:
        """Return the two numbers of an interval as HTML."""
        low, high = (self.number(file, f"{path}/{end}", spec) for end in "01")
        return Markup("[{},&nbsp;{}]").format(low, high)

    def comparison(self, file: str, path: str, other: str) -> Markup:
        """Say how a model compares with the other one, as far as the interval allows."""
        low, high = self.value(file, f"{path}/interval")
        words = "better than {}" if low > 0 else "worse than {}"
        if low <= 0 <= high:
            words = "not measurably different from {}"
        difference = self.number(file, f"{path}/difference", "+.3f")
        interval = self.interval(file, f"{path}/interval", "+.3f")
        return Markup(words + " ({} {})").format(other, difference, interval)

    def image(self, file: str) -> dict[str, Any] | None:
        """Return a figure's size in CSS pixels and its data URL; None if no step has drawn it."""
        path = self.latest = self.folder / file
        if not path.exists():
            return None
        with Image.open(path) as image:
            width, height = (round(size * SCREEN_DPI / cli.FIGURE_DPI) for size in image.size)
        drawing = path.with_suffix(".svg")
        path, kind = (drawing, "svg+xml") if drawing.exists() else (path, "png")
        content = base64.b64encode(path.read_bytes()).decode()
        return {"width": width, "height": height, "url": f"data:image/{kind};base64,{content}"}


# ---- options --------------------------------------------------------------------------------


def hand_in_name(text: str) -> Path:
    """Parse the name of the file to hand in, whose folder must exist."""
    path = Path(text.removesuffix(".zip"))
    if path.name in ("", "..") or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: no such folder, or no file name after it")
    if path.name != path.name.encode(errors="replace").decode():
        raise argparse.ArgumentTypeError(f"{text!r}: a zip file can't have such a name")
    return path


def parse_arguments() -> argparse.Namespace:
    """Parse the options, and refuse those that don't go together."""
    parser = cli.make_parser(__doc__, several_seeds=True)
    parser.add_argument(
        "--full",
        action="store_true",
        help="also train the recipes best and robust, and run tuning.py",
    )
    cli.add_labels_option(parser, "your reviewed label corrections, instead of the automatic ones")
    parser.add_argument(
        "--hand-in", type=hand_in_name, metavar="NAME", help="pack everything into NAME.zip"
    )
    parser.add_argument(
        "--author", default="", metavar="NAME", help="whose work it is, for the page"
    )
    cli.add_checkpoint_option(parser, "tuned, or best with --full; it is the model to hand in")
    arguments = parser.parse_args()
    if arguments.pixel_range and not arguments.checkpoint:
        parser.error("--pixel-range goes with --checkpoint")
    return arguments


def main() -> None:
    """Run all steps, write the page, and pack everything if asked to."""
    arguments = parse_arguments()
    folder = arguments.out or Path("report-quick" if arguments.quick else "report")
    report, start = Report(arguments, folder), time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        cli.remove_leftovers(folder)
        try:
            report.run()
        except KeyboardInterrupt:
            cli.say("\nrun the same command again to resume", error=True)
            raise
        report.compare_steps()
        page = report.write_page()
        cli.say(f"\nthe page: {page} ({time.perf_counter() - start:.0f} s)")
        if arguments.hand_in:
            packed = report.pack(arguments.hand_in)
            cli.say(f"{'DRY RUN, not ' if arguments.quick else ''}to hand in: {packed}")


if __name__ == "__main__":
    cli.run(main)
