"""How every script behaves: its options, its errors, its tables and the files it writes."""

import argparse
import ctypes
import json
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

PROJECT = Path(__file__).resolve().parent.parent


class UserError(Exception):
    """A mistake of the user's: shown as one line on stderr, with exit status 2."""


class _Parser(argparse.ArgumentParser):
    """argparse answers a mistake with its whole usage text; one line is easier to read."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # argparse takes a value such as -1,1 for an option unless it looks like a number.
        self._negative_number_matcher = re.compile(r"^-\.?\d")

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the options)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option and keeps the line breaks of the description."""


def make_parser(description: str | None, several_seeds: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts share; a script adds its own."""
    parser = _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--data",
        default="auto",
        metavar="NAME-OR-PATH",
        help="a folder with train.pickle and dev.pickle or with train/<class>/*.png; or cifar10; "
        "or sketches; auto takes the first there is of data/*.pickle, cifar10, sketches",
    )
    parser.add_argument(
        "--data-seed",
        type=natural_number,
        default=0,
        help="seed of the drawn sketches, of the cut from CIFAR-10, and of their wrong labels",
    )
    if several_seeds:
        seed_help = "seed of all that is random; several, as in 0,1,2, give several runs"
        parser.add_argument(
            "--seed", type=_seed_list, default=[0], metavar="N[,N...]", help=seed_help
        )
    else:
        parser.add_argument(
            "--seed", type=natural_number, default=0, help="seed of all that is random"
        )
    parser.add_argument(
        "--device", default="auto", help="auto takes the first there is of cuda, mps, cpu"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder for all that this run writes; without it, results/<data>",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a dry run on tiny settings; its numbers mean nothing"
    )
    return parser


def natural_number(text: str) -> int:
    """Read an option's value as a whole number of at least 0."""
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positive_whole_number(text: str) -> int:
    """Read an option's value as a whole number of at least 1."""
    if natural_number(text) == 0:
        raise argparse.ArgumentTypeError("0 is not a whole number of at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """Read an option's value as a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _seed_list(text: str) -> list[int]:
    return [natural_number(part) for part in text.split(",")]


def run(main: Callable[[], None]) -> None:
    """Call a script's main(); end with one line and a status where a traceback would not help."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; files that were already written are whole", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; `auto` prefers CUDA, then MPS, then the CPU."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind, there in available.items() if there), "cpu")
    if name != "cpu" and not available.get(name, False):
        usable = ", ".join(["cpu", *(kind for kind, there in available.items() if there)])
        raise UserError(f"--device {name}: not on this machine, which has {usable}")
    return torch.device(name)


def prepare_torch(threads: int) -> None:
    """Set up this process for fast training on so many threads."""
    _keep_freed_memory()
    torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """Ask the C library (glibc) to keep freed memory for reuse instead of giving it back.

    A training step frees and asks again for the same few megabytes. Without this, each step
    pays for fresh pages from the kernel, which costs more than the convolutions do
    (benchmarks/epoch.py measures it). Does nothing where the C library is another.
    """
    m_trim_threshold, m_mmap_threshold = -1, -3  # numbers from glibc's malloc.h
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 30)
        ctypes.CDLL(None).mallopt(m_trim_threshold, (1 << 31) - 1)


def side_by_side(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], device: torch.device, name: str
) -> list[Any]:
    """Call `function(*job)` for each job, in parallel processes where cores allow.

    Each process gets its share of the cores as threads. On a GPU the jobs go one by one.

    Returns:
        the results, in the order of the jobs.
    """
    workers = min(len(jobs), joblib.cpu_count()) if device.type == "cpu" else 1
    threads = joblib.cpu_count() // workers
    if workers == 1:
        calls = (_call_with_threads(threads, function, job) for job in jobs)
    else:
        calls = joblib.Parallel(workers, return_as="generator")(
            joblib.delayed(_call_with_threads)(threads, function, job) for job in jobs
        )
    # One job alone shows its own progress.
    disable = True if len(jobs) == 1 else None
    return list(tqdm(calls, total=len(jobs), desc=name, disable=disable))


def _call_with_threads(threads: int, function: Callable[..., Any], job: tuple[Any, ...]) -> Any:
    prepare_torch(threads)
    return function(*job)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of texts under their headers: the first column to the left, others right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in [headers, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: whole or not at all."""
    descriptor, name = tempfile.mkstemp(
        prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent
    )
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp lets only the owner read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Results:
    """The folder that a script writes to, and the facts that all its files carry.

    Args:
        arguments: the parsed options.
        data: what every file says about the data; its source names the folder in `results/`.

    Raises:
        UserError: the folder can't be written. Found out here, before any long work.
    """

    def __init__(self, arguments: argparse.Namespace, data: dict[str, Any]) -> None:
        quick = "-quick" if arguments.quick else ""  # a dry run must not overwrite real results
        self.folder = arguments.out or Path("results") / (data["source"] + quick)
        self.settings = {name: _plain(value) for name, value in vars(arguments).items()}
        self.data = data
        self.written: list[Path] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise UserError(f"--out {self.folder}: can't be written: {error.strerror}") from error

    def save(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Write the file `name` whole or not at all; return its path."""
        path = self.folder / name
        try:
            write_whole(path, write)
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror or error}") from error
        self.written.append(path)
        return path

    def save_json(self, step: str, numbers: dict[str, Any]) -> None:
        """Write `<step>.json`: the numbers, and all that is needed to get them again."""
        packages = ("torch", "torchvision", "numpy", "scikit-learn", "matplotlib")
        versions = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
        facts = {"step": step, "data": self.data, "settings": self.settings, "versions": versions}
        text = json.dumps(facts | numbers, indent=2, allow_nan=False) + "\n"
        self.save(f"{step}.json", lambda path: path.write_text(text, encoding="utf-8"))

    def save_figure(self, name: str, figure: Figure) -> None:
        """Write `<name>.png`, with a last line that says which data it shows."""
        quick = "QUICK DRY RUN, numbers mean nothing.  " if self.settings["quick"] else ""
        source = self.data["source"]
        drawn = " (drawn by the project, no photographs)" if source == "sketches" else ""
        parts = [f"{part} {facts['fingerprint']}" for part, facts in self.data["parts"].items()]
        line = f"{quick}Data: {source}{drawn}, {', '.join(parts)}"
        figure.supxlabel(line, x=0.01, ha="left", fontsize=7, color="0.4")
        self.save(f"{name}.png", lambda path: figure.savefig(path, dpi=150))

    def print_written(self) -> None:
        """Say where everything is."""
        names = textwrap.fill(", ".join(path.name for path in self.written), 98)
        print(f"\nwritten to {self.folder}:\n{textwrap.indent(names, '  ')}")


def _plain(value: Any) -> Any:
    """Return an option's value in a form that JSON holds."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
