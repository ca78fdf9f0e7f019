"""All steps of the report in order, and one page with every figure and number of theirs.

    python report.py
    python report.py --full --seed 0,1,2
    python report.py --hand-in my_name

Each step is one of the scripts, run as you would run it yourself, in a folder of its own. A step
whose options, data and code are what they were the last time is not run again, so that a report
that was stopped goes on where it was.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib

from adversarial import ATTACK_TITLES
from common import console, machine
from common.console import PROJECT, UserError
from common.dataset import DATA_FOLDER, PARTS, describe, open_source
from common.page import Files, render
from common.results import write_whole

TEMPLATE = PROJECT / "common" / "report.html"
HANDED_IN = (
    "*.py",
    "common/*.py",
    "common/*.html",
    "models/*.ckpt",
    "docs/*.png",
    "*.txt",
    "README.md",
)


@dataclass(frozen=True)
class Step:
    """One step of the report.

    Attributes:
        name: of its folder.
        title: what it does, for the page and the terminal.
        script: that does it.
        weight: about how many seconds it takes on two cores; only shares of them count, to say
            what is left.
        options: of the script; {name} stands for the folder of another step.
        needs: the steps whose files it reads.
        all_seeds: whether it takes all seeds or just the first.
        resumes: whether the script can go on after it was killed.
        full: whether it is left out but for --full.
    """

    name: str
    title: str
    script: str
    weight: float
    options: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    all_seeds: bool = False
    resumes: bool = False
    full: bool = False


FINAL = "{recipes}/final.ckpt"
STEPS = (
    Step("data", "1. What is in the data", "inspectData.py", 2),
    Step("pre-trained", "2. The pre-trained net", "evaluation.py", 1),
    Step("label-errors", "3c. Which labels are wrong", "label_errors.py", 90),
    Step(
        "recipes",
        "3. The report's recipes, and tuned",
        "training.py",
        80,
        ("--recipe", "all"),
        all_seeds=True,
        resumes=True,
    ),
    Step(
        "mended-labels",
        "3c. The final recipe with mended labels",
        "training.py",
        8,
        ("--recipe", "final", "--label-fixes", "{label-errors}/label_fixes.csv"),
        needs=("label-errors",),
        all_seeds=True,
        resumes=True,
    ),
    Step(
        "mismatch",
        "3g. Pixels in the wrong range",
        "training.py",
        1,
        ("--show-mismatch", "--checkpoint", FINAL),
        needs=("recipes",),
    ),
    Step(
        "best",
        "3. The recipe best",
        "training.py",
        110,
        ("--recipe", "best"),
        all_seeds=True,
        resumes=True,
        full=True,
    ),
    Step("tuning", "3i. Settings searched", "tuning.py", 220, full=True),
    Step(
        "robust",
        "5. The recipe robust",
        "training.py",
        230,
        ("--recipe", "robust"),
        resumes=True,
        full=True,
    ),
    Step("learning-rates", "4. Learning rates", "lr_analysis.py", 12),
    Step(
        "attacks",
        "5. Attacks",
        "adversarial.py",
        22,
        ("--checkpoint", FINAL),
        needs=("recipes",),
    ),
)


def steps_of(full: bool) -> list[Step]:
    """Return the steps of a report, in order."""
    if not full:
        return [step for step in STEPS if not step.full]
    *before, attacks = STEPS
    options = (*attacks.options, "--robust", "{robust}/robust.ckpt")
    return [*before, replace(attacks, options=options, needs=(*attacks.needs, "robust"))]


def sources_of(script: Path) -> set[Path]:
    """Return the project's files that a script consists of: itself, and all that it imports."""
    found, waiting = set(), [script]
    while waiting:
        path = waiting.pop()
        found.add(path)
        for node in ast.walk(ast.parse(path.read_bytes())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):  # the names may be modules themselves
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            files = {PROJECT / (str(name).replace(".", "/") + ".py") for name in names}
            waiting += [file for file in files - found if file.is_file()]
    return found


class Report:
    """The steps of one report, and the folder in which they leave their files.

    Args:
        folder: for the page, and a folder of each step in `steps/`.
        arguments: the parsed options.
    """

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments = folder, arguments
        source = open_source(arguments.data, arguments.data_seed)
        self.data = arguments.data
        if self.data == "auto":  # not to be looked for again by each step
            self.data = source.name if source.name in ("cifar10", "sketches") else str(DATA_FOLDER)
        self.facts = describe(*(source.load(part, arguments.quick) for part in PARTS))
        self.steps = steps_of(arguments.full)
        self.seconds: dict[str, float] = {}

    def path_of(self, step: Step | str) -> Path:
        """Return the folder of a step."""
        return self.folder / "steps" / (step if isinstance(step, str) else step.name)

    def key_of(self, step: Step) -> str:
        """Return a fingerprint of all that the results of a step follow from."""
        needed = [self.key_of(other) for other in self.steps if other.name in step.needs]
        read = sources_of(PROJECT / step.script) | set((PROJECT / "models").glob("*.ckpt"))
        code = [path.read_bytes() for path in sorted(read)]
        facts = [step.options, self._shared_options(step), self.facts, needed]
        facts += [hashlib.sha256(b"".join(code)).hexdigest(), self.versions(), os.cpu_count()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def versions(self) -> dict[str, str]:
        """Return the versions of what the numbers depend on."""
        names = ("torch", "torchvision", "numpy", "scikit-learn", "cleanlab", "matplotlib")
        return {"Python": platform.python_version()} | {name: version(name) for name in names}

    def _shared_options(self, step: Step) -> list[str]:
        seeds = self.arguments.seed if step.all_seeds else self.arguments.seed[:1]
        options = ["--data-seed", str(self.arguments.data_seed), "--device", self.arguments.device]
        options += ["--seed", ",".join(map(str, seeds))]
        return [*options, "--quick"] if self.arguments.quick else options

    def run(self) -> None:
        """Run the steps that are not done yet, and say how far it is."""
        for number, step in enumerate(self.steps):
            state = self._state(step)
            head = f"[{number + 1}/{len(self.steps)}] {step.title}"
            if state.get("finished") and not self.arguments.fresh:
                print(f"{head}: done before")
            else:
                print(f"{head} ...{self._left(number)}", flush=True)
                state = self._run_step(step, state)
                print(f"{' ' * len(f'[{number + 1}/{len(self.steps)}]')} {state['seconds']:.0f} s")
            self.seconds[step.name] = state["seconds"]

    def _left(self, number: int) -> str:
        """Say how long the rest will take, judged by how long the steps so far have taken."""
        expected = sum(step.weight for step in self.steps[:number])
        slowness = sum(self.seconds.values()) / expected if expected else 1.0
        left = slowness * sum(step.weight for step in self.steps[number:])
        return "" if self.arguments.quick else f" about {max(1, round(left / 60))} min left"

    def _state(self, step: Step) -> dict[str, Any]:
        """Return what an earlier run of the very same step has left, {} if there was none."""
        try:
            state = json.loads((self.path_of(step) / "step.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return state if state.get("key") == self.key_of(step) else {}

    def _run_step(self, step: Step, state: dict[str, Any]) -> dict[str, Any]:
        folder = self.path_of(step)
        goes_on = bool(state) and step.resumes and not self.arguments.fresh
        if not goes_on:
            shutil.rmtree(folder, ignore_errors=True)
            state = {"key": self.key_of(step), "seconds": 0.0, "finished": False}
        folder.mkdir(parents=True, exist_ok=True)
        start, before = time.perf_counter(), state["seconds"]
        try:
            self._save_state(folder, state)
            self._call(step, folder, goes_on)
            state["finished"] = True
        finally:
            state["seconds"] = before + time.perf_counter() - start
            self._save_state(folder, state)
        return state

    @staticmethod
    def _save_state(folder: Path, state: dict[str, Any]) -> None:
        write_whole(folder / "step.json", lambda path: path.write_text(json.dumps(state) + "\n"))

    def _call(self, step: Step, folder: Path, goes_on: bool) -> None:
        """Call the script as the terminal would; keep what it prints in a file."""
        folders = {other.name: self.path_of(other) for other in self.steps}
        options = [option.format_map(folders) for option in step.options]
        options += ["--data", self.data, "--out", str(folder), *self._shared_options(step)]
        kept = sys.argv
        sys.argv = [step.script, *options, *(["--resume"] if goes_on else [])]
        try:
            with (
                (folder / "printed.txt").open("w", encoding="utf-8") as printed,
                contextlib.redirect_stdout(printed),
            ):
                import_module(Path(step.script).stem).main()
        finally:
            sys.argv = kept

    def write_page(self) -> Path:
        """Write the page; return its path."""
        text = render(
            TEMPLATE,
            Files(self.folder / "steps"),
            data=self.facts,
            arguments=self.arguments,
            steps=self.steps,
            seconds=self.seconds,
            versions=self.versions(),
            machine=describe_machine(),
            titles=ATTACK_TITLES,
        )
        path = self.folder / "index.html"
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return path

    def net(self) -> Path:
        """Return the checkpoint of the net to hand in: of the best recipe, first seed."""
        name, recipe = ("best", "best") if self.arguments.full else ("recipes", "tuned")
        return self.path_of(name) / f"{recipe}.ckpt"

    def pack(self, name: Path) -> Path:
        """Pack scripts, net and page into `<name>.zip`, from which all can be run again."""
        path = name.with_name(f"{name.name}.zip")
        packed = [file for pattern in HANDED_IN for file in PROJECT.glob(pattern)]
        files = {file.relative_to(PROJECT): file for file in packed}
        files[Path("report/index.html")] = self.folder / "index.html"
        files[Path("report/net.ckpt")] = self.net()

        def write(temporary: Path) -> None:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                for inside, file in sorted(files.items()):
                    archive.write(file, Path(name.name) / inside)

        try:
            write_whole(path, write)
        except OSError as error:
            raise UserError(f"--hand-in {name}: can't be written: {error.strerror}") from error
        return path


def describe_machine() -> str:
    """Return what the numbers were measured on, in a few words."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    return f"{processor}, {joblib.cpu_count()} cores, {platform.system()}"


def hand_in_name(text: str) -> Path:
    """Read the name of a file to hand in, whose folder must be there."""
    path = Path(text.removesuffix(".zip"))
    if not path.name or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: no such folder, or no name in it")
    return path


def main() -> None:
    """Run all steps, write the page, and pack them if asked to."""
    parser = console.make_parser(__doc__, several_seeds=True)
    parser.add_argument(
        "--full",
        action="store_true",
        help="run tuning.py and train the recipes best and robust too",
    )
    parser.add_argument("--fresh", action="store_true", help="run all steps anew")
    parser.add_argument(
        "--hand-in", type=hand_in_name, metavar="NAME", help="pack it all into NAME.zip"
    )
    arguments = parser.parse_args()
    machine.choose_device(arguments.device)
    folder = arguments.out or Path("report-quick" if arguments.quick else "report")
    report = Report(folder, arguments)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: can't be written: {error.strerror}") from error
    start = time.perf_counter()
    try:
        report.run()
    except KeyboardInterrupt:
        print("\nthe same report.py command goes on where this one stops", file=sys.stderr)
        raise
    page = report.write_page()
    print(f"\nthe page: {page} ({time.perf_counter() - start:.0f} s)")
    if arguments.hand_in:
        print(f"to hand in: {report.pack(arguments.hand_in)}")


if __name__ == "__main__":
    console.run(main)
