"""What a script writes: files that are whole or not there, and that say where they came from."""

import argparse
import json
import math
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from common.console import UserError

FIGURE_DPI = 150


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
        self.settings = vars(arguments)
        self.data = data
        self.written: list[Path] = []
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise UserError(f"--out {self.folder}: can't be written: {error.strerror}") from error
        if arguments.quick:
            print("QUICK DRY RUN on a few pictures: its numbers mean nothing\n")

    def save(self, name: str, write: Callable[[Path], Any]) -> Path:
        """Write the file `name` whole or not at all; return its path."""
        path = self.folder / name
        try:
            write_whole(path, write)
        except OSError as error:
            raise UserError(f"{path}: can't be written: {error.strerror or error}") from error
        if path not in self.written:
            self.written.append(path)
        return path

    def remove(self, name: str) -> None:
        """Remove a file that this run has no more use for."""
        path = self.folder / name
        path.unlink(missing_ok=True)
        if path in self.written:
            self.written.remove(path)

    def save_json(self, step: str, numbers: dict[str, Any]) -> None:
        """Write `<step>.json`: the numbers, and all that is needed to get them again."""
        packages = ("torch", "torchvision", "numpy", "scikit-learn", "matplotlib")
        versions = {"python": sys.version.split()[0]} | {name: version(name) for name in packages}
        facts = {"step": step, "data": self.data, "settings": self.settings, "versions": versions}
        text = json.dumps(_plain(facts | numbers), indent=2, allow_nan=False) + "\n"
        self.save_text(f"{step}.json", text)

    def save_text(self, name: str, text: str) -> None:
        """Write a file of text."""
        self.save(name, lambda path: path.write_text(text, encoding="utf-8"))

    def save_figure(self, name: str, figure: Figure) -> None:
        """Write `<name>.png`, with a last line that says which data it shows."""
        quick = "QUICK DRY RUN, numbers mean nothing.  " if self.settings["quick"] else ""
        source = self.data["source"]
        drawn = " (drawn by the project, no photographs)" if source == "sketches" else ""
        parts = [f"{part} {facts['fingerprint']}" for part, facts in self.data["parts"].items()]
        line = f"{quick}Data: {source}{drawn}, {', '.join(parts)}"
        figure.supxlabel(line, x=0.01, ha="left", fontsize=7, color="0.4")
        self.save(f"{name}.png", lambda path: figure.savefig(path, dpi=FIGURE_DPI))

    def print_written(self) -> None:
        """Say where everything is."""
        names = textwrap.fill(
            ", ".join(path.name for path in self.written), 98, break_on_hyphens=False
        )
        print(f"\nwritten to {self.folder}:\n{textwrap.indent(names, '  ')}")


def _plain(value: Any) -> Any:
    """Return a value in a form that JSON holds: a path as text, NaN and infinity as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
