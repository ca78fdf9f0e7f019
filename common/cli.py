"""The command line of every script: options, errors, tables, and result files."""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import psutil

PROJECT = Path(__file__).resolve().parent.parent
MAX_SEED = 2**32 - 1  # numpy takes no larger one
MAX_EPOCHS = 5_000  # a checkpoint holds the scores of each, and its size is limited
MAX_JSON_SIZE = 2**25  # bytes
MAX_FOLDER_NAME = 60  # characters; if each has four bytes, file systems allow 63
FIGURE_DPI = 150
EPSILON_HELP = "largest change of a pixel, as a fraction of full brightness"
PACKAGES = "torch torchvision numpy scikit-learn scipy matplotlib pillow optuna"
WINDOWS_LOCKED = (5, 32)  # error codes: access denied, sharing violation
OWNER = "data_folder.txt"  # in each results folder: the path of its data
PARENT = "STOP_WITH_PROCESS"  # environment variable: the id of the report.py that runs a script


class UserError(Exception):
    """A user's mistake: shown as one line on stderr, with exit status 2."""


# ---- printed output -------------------------------------------------------------------------


def clean(text: str) -> str:
    """Replace characters that could control the terminal, such as ESC in a file's name."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def safe_repr(value: object) -> str:
    """Describe a value from an untrusted file briefly, however large or odd it is."""
    if value is None or isinstance(value, bool | float):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if abs(value) < 10**9 else "a very large int"
    if isinstance(value, str):
        return repr(clean(value[:60]))
    return f"of type {type(value).__name__}"


def one_line(name: object) -> str:
    """Return a name from outside, such as that of a file, in one line."""
    return clean(" ".join(str(name).split()))


def say(text: str = "", error: bool = False) -> None:
    """Print cleaned text; an error or a note to stderr, or nowhere if that fails."""
    if not error:
        print(clean(text))
        return
    with contextlib.suppress(OSError):
        print(clean(text), file=sys.stderr)


def say_stopped(text: str) -> None:
    """Say something after Ctrl-C, except under report.py, which says it itself."""
    if PARENT not in os.environ:
        say(f"\n{text}", error=True)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under their headers: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in [headers, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        say("  ".join(cells).rstrip())


# ---- options --------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, where argparse prints its whole usage text."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # argparse mistakes -1,1 for an option unless it looks like a negative number.
        self._negative_number_matcher = re.compile(r"^-\.?\d")

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the options)")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option that has one; keeps the description's line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if not action.default:
            return action.help
        return super()._get_help_string(action)


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser without any options yet."""
    return _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)


def make_parser(
    description: str | None, several_seeds: bool = False, writes_files: bool = True
) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts share; a script adds its own."""
    parser = new_parser(description)
    parser.add_argument(
        "--data",
        default="auto",
        metavar="NAME-OR-PATH",
        help="a folder with train.pickle and dev.pickle, or with train/<class>/ and dev/<class>/ "
        "full of image files; or cifar10; or synthetic; auto takes the first available of "
        "a data set in data/, cifar10, synthetic",
    )
    parser.add_argument(
        "--seed",
        type=seed_list if several_seeds else natural_number,
        default="0",
        metavar="N[,N...]" if several_seeds else "N",
        help="random seed" + ("; several, as in 0,1,2, give several runs" if several_seeds else ""),
    )
    parser.add_argument(
        "--device", default="auto", help="cuda, mps or cpu; auto takes the first available"
    )
    if writes_files:
        parser.add_argument(
            "--out",
            type=Path,
            metavar="DIR",
            help="folder to write to (default: results/<data>, or report for report.py)",
        )
    parser.add_argument(
        "--quick", action="store_true", help="a dry run on few images; its numbers mean nothing"
    )
    return parser


def add_checkpoint_option(
    parser: argparse.ArgumentParser, default: str, several: bool = False
) -> None:
    """Add --checkpoint and --pixel-range; `default` describes the default."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        nargs="+" if several else None,
        help="a checkpoint written by training.py, or a bare one (weights only) "
        f"(default: {default})",
    )
    parser.add_argument(
        "--pixel-range",
        type=pixel_range,
        metavar="LOW,HIGH",
        help="the range that a bare checkpoint was trained on, -1,1 or 0,1 (default: -1,1)",
    )


def add_labels_option(
    parser: argparse.ArgumentParser,
    use: str = "label corrections of label_errors.py; those accepted are applied before training",
) -> None:
    """Add --labels, a file of label corrections; `use` says what they are used for."""
    parser.add_argument("--labels", type=Path, metavar="FILE", help=use)


def natural_number(text: str, low: int = 0, high: int = MAX_SEED) -> int:
    """Parse a whole number from `low` to `high`."""
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or not low <= int(text) <= high:
        message = f"{text[:20]!r} is not a whole number from {low} to {high}"
        raise argparse.ArgumentTypeError(message)
    return int(text)


positive_int = partial(natural_number, low=1)
epoch_count = partial(natural_number, low=1, high=MAX_EPOCHS)


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        several = "; separate several by spaces" if "," in text else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0{several}")
    return number


def epsilon(text: str) -> float:
    """Parse the epsilon of an attack: above 0, and at most 1, which is full brightness."""
    number = positive_float(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1, which is full brightness")
    return number


def seed_list(text: str) -> list[int]:
    """Parse one seed or several, separated by commas; each counts once."""
    return list(dict.fromkeys(natural_number(part) for part in text.split(",")))


def pixel_range(text: str) -> tuple[float, float]:
    """Parse a pixel range; only two are in use, any other is a typo."""
    ranges = {"0,1": (0.0, 1.0), "-1,1": (-1.0, 1.0)}
    if text not in ranges:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0,1 nor -1,1")
    return ranges[text]


def run(main: Callable[[], None]) -> None:
    """Call a script's main(); report expected errors in one line instead of a traceback."""
    try:
        _prepare_process()
        main()
        sys.stdout.flush()
    except UserError as error:
        say(f"error: {one_line(error)}", error=True)
        _exit(2)
    except KeyboardInterrupt:
        say_stopped("stopped; files that were already written are complete")
        _exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, is gone
        _exit(1)
    except OSError as error:
        say(f"error: {error.filename or 'output'}: {error.strerror or 'failed'}", error=True)
        _exit(2)


def _exit(status: int) -> NoReturn:
    """Exit without Python's complaint about output that stdout can't take."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status)


def _prepare_process() -> None:
    """Set up how this process is stopped and how it prints."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same cleanup as for Ctrl-C
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        if hasattr(getattr(sys, name), "reconfigure"):  # not so in IDLE and Jupyter
            getattr(sys, name).reconfigure(errors="replace")  # characters its encoding lacks
    parent = os.environ.get(PARENT, "")
    if parent.isdecimal() and os.name != "nt":  # on Windows, a process keeps its parent's id
        threading.Thread(target=_stop_with, args=[int(parent)], daemon=True).start()


def _stop_with(parent: int) -> None:
    """Stop this process once the one that started it is gone, even if it was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


# ---- input files ----------------------------------------------------------------------------


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the contents of a file of at most `limit` bytes.

    Raises:
        UserError: it can't be read, or is larger.
    """
    try:
        size = path.stat().st_size
        if not (path.is_file() or path.is_dir()):  # a device or a pipe may never end
            raise UserError(f"{path}: not a file on a disk")
        if size > limit:
            raise UserError(f"{path}: is larger than {limit // 2**20} MB, the most that is read")
        with path.open("rb") as file:
            content = file.read(size + 1)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or 'not readable'}") from error
    if len(content) > size:
        raise UserError(f"{path}: still being written; try again later")
    return content


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file.

    Raises:
        UserError: it can't be read, or is not JSON.
    """
    try:
        return json.loads(read_bytes(path, MAX_JSON_SIZE))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file, or cut short") from error


# ---- result files ---------------------------------------------------------------------------


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a temporary file, then rename it: `path` is complete or unchanged.

    Raises:
        UserError: it can't be written.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        write(part)
        rename(part, path)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror or 'failed'}") from error
    finally:
        with contextlib.suppress(OSError):  # such as: its name is too long
            part.unlink(missing_ok=True)


def rename(source: Path, path: Path) -> None:
    """Rename a file; on Windows, wait up to a second while a virus scanner has it open."""
    for pause in (0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 0):
        try:
            source.replace(path)
            return
        except PermissionError as error:
            if not pause or getattr(error, "winerror", None) not in WINDOWS_LOCKED:
                raise
            time.sleep(pause)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    settings = {"encoding": "utf-8", "errors": "surrogateescape"}  # a folder may have any name
    write_atomic(path, lambda part: part.write_text(text, **settings))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically: paths as text, NaN and infinity as null."""
    text = json.dumps(content, default=os.fspath)
    content = json.loads(text, parse_constant=lambda constant: None)
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def render(template: str, **values: Any) -> str:
    """Return an HTML page from a template of the project."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # two scripts need them

    environment = Environment(
        loader=FileSystemLoader(PROJECT),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that numbers may depend on."""
    return {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES.split()}


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of write_atomic whose processes were killed."""
    for part in folder.glob(".*.part*"):
        found = re.search(r"\.(\d{1,9})\.part", part.name)
        if found and part.is_file() and not psutil.pid_exists(int(found[1])):
            part.unlink(missing_ok=True)


class Results:
    """The folder that a script writes to, and the origin that all of its files state.

    Args:
        arguments: the parsed options.
        data: metadata of the data (`common.data.describe`). Its results go to results/NAME; if
            data in another folder has that name, to results/NAME-2, and so on.

    Raises:
        UserError: the folder can't be written to (checked before any long work).
    """

    def __init__(self, arguments: argparse.Namespace, data: dict[str, Any]) -> None:
        quick = "-quick" if arguments.quick else ""  # a dry run must not overwrite real results
        owner = _relative(data.get("path", ""))
        self.folder = arguments.out or _free_folder(data["name"][:MAX_FOLDER_NAME] + quick, owner)
        self.settings = vars(arguments)
        self.data = {key: value for key, value in data.items() if key != "path"}  # it is private
        self.written: list[str] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise UserError(f"--out {self.folder}: can't be written: {error.strerror}") from error
        remove_leftovers(self.folder)
        if not arguments.out:
            write_text(self.folder / OWNER, owner)
        if arguments.quick:
            say("QUICK DRY RUN on a few images: its numbers mean nothing\n")

    def save(self, name: str, write: Callable[[Path], Any]) -> None:
        """Write the file `name` atomically."""
        write_atomic(self.folder / name, write)
        self.written.append(name)

    def save_text(self, name: str, text: str) -> None:
        """Write a text file."""
        write_text(self.folder / name, text)
        self.written.append(name)

    def save_json(self, step: str, numbers: dict[str, Any]) -> None:
        """Write `<step>.json`: the numbers, and all that is needed to reproduce them."""
        origin = {"step": step, "data": self.data, "settings": self.settings}
        write_json(self.folder / f"{step}.json", origin | {"versions": versions()} | numbers)
        self.written.append(f"{step}.json")

    def save_figure(self, name: str, figure: Any) -> None:
        """Write a matplotlib figure as `<name>.png`, with a line below that names its data.

        A figure of lines and text only is written as `<name>.svg` too, which stays sharp on paper.
        Without a figure, that of an earlier run is removed.
        """
        (self.folder / f"{name}.svg").unlink(missing_ok=True)
        if figure is None:
            (self.folder / f"{name}.png").unlink(missing_ok=True)
            return
        quick = "QUICK DRY RUN, numbers mean nothing.  " if self.settings["quick"] else ""
        kind = " (drawn by the project, no photographs)" if self.data["name"] == "synthetic" else ""
        prints = [f"{split} {each['fingerprint']}" for split, each in self.data["splits"].items()]
        line = clean(f"{quick}Data: {self.data['name']}{kind}, {', '.join(prints)}")
        figure.supxlabel(line, x=0.01, ha="left", fontsize=7, color="0.4", parse_math=False)
        with warnings.catch_warnings(action="ignore"):  # of characters that the font lacks
            self.save(f"{name}.png", lambda path: figure.savefig(path, dpi=FIGURE_DPI))
            if not any(ax.images for ax in figure.axes):
                self.save(f"{name}.svg", lambda path: figure.savefig(path, metadata={"Date": None}))

    def print_written(self) -> None:
        """Print the names of all written files."""
        names = ", ".join(dict.fromkeys(self.written))
        lines = textwrap.fill(names, 98, break_on_hyphens=False)
        say(f"\nwritten to {self.folder}:\n{textwrap.indent(lines, '  ')}")


def numbered(name: str) -> Iterator[str]:
    """Yield a name, and then the same with -2, -3 and so on: candidates for one that is free."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def _free_folder(name: str, owner: str) -> Path:
    """Return results/<name>, or the first of results/<name>-2 and so on that is not another's."""
    folders = (Path("results") / each for each in numbered(name))
    return next(folder for folder in folders if _owner(folder) in (None, owner))


def _owner(folder: Path) -> str | None:
    path = folder / OWNER
    if not path.is_file():
        return None
    return _relative(path.read_text(encoding="utf-8", errors="surrogateescape"))


def _relative(path: str) -> str:
    """Return a path inside the current folder relative to it: both may be moved together."""
    if not path or not Path(path).is_relative_to(Path.cwd()):
        return path
    return str(Path(path).relative_to(Path.cwd()))
