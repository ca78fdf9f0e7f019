"""What every script shows and takes at the terminal: its options, its errors, its tables."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parent.parent
LARGEST_NUMBER = 4_000_000_000  # numpy takes seeds of 32 bits


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
    """Shows the default of each option that has one; keeps the description's line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def make_parser(
    description: str | None, several_seeds: bool = False, benchmark: bool = False
) -> argparse.ArgumentParser:
    """Return a parser with the options that all scripts share; a script adds its own.

    A benchmark prints, writes no files, and measures the CPU: it has no --device and no --out.
    """
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
            "--seed", type=_seed_list, default="0", metavar="N[,N...]", help=seed_help
        )
    else:
        parser.add_argument(
            "--seed", type=natural_number, default=0, help="seed of all that is random"
        )
    if not benchmark:
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
    """Read an option's value as a whole number from 0 to LARGEST_NUMBER."""
    if not re.fullmatch(r"\d{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    if int(text) > LARGEST_NUMBER:
        raise argparse.ArgumentTypeError(f"{text} is more than {LARGEST_NUMBER}")
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
    return list(dict.fromkeys(natural_number(part) for part in text.split(",")))


def run(main: Callable[[], None]) -> None:
    """Call a script's main(); end with one line and a status where a traceback would not help."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; files that were already written are whole", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of texts under their headers: the first column to the left, others right."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    for row in [headers, ["-" * width for width in widths], *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
