"""A page of text, tables and figures in one HTML file, from the files that the steps have written.

Each number on the page stands in a `data` element whose value is what the JSON file has, and
whose title says where: a reader, or a test, can check the one against the other.
"""

import base64
import json
import struct
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from common.results import FIGURE_DPI

FORMATS = {
    "percent": "{:.1%}",
    "whole percent": "{:.0%}",
    "score": "{:.3f}",
    "share": "{:.2f}",
    "count": "{:,.0f}",
    "short": "{:.2g}",
}


SCREEN_DPI = 96  # what browsers take an inch for
TEXT_WIDTH = 736  # of the page's column, in such pixels; wider figures stick out of it


class Files:
    """What the steps have written, each in a folder of its own.

    Args:
        folder: holds one folder a step.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: dict[str, Any] = {}

    def value(self, file: str, path: str = "") -> Any:
        """Return what stands in a JSON file, such as `recipes/training.json`, at a path of keys.

        Raises:
            KeyError: nothing stands there.
        """
        if file not in self.read:
            self.read[file] = json.loads((self.folder / file).read_text(encoding="utf-8"))
        found = self.read[file]
        for key in filter(None, path.split("/")):
            found = found[int(key) if isinstance(found, list) else key]
        return found

    def has(self, file: str) -> bool:
        """Tell whether a step has written this file."""
        return (self.folder / file).exists()

    def number(self, file: str, path: str, kind: str = "score") -> Markup:
        """Return a number of a JSON file as HTML, a dash where there is none."""
        value = self.value(file, path)
        if value is None:
            return Markup("–")
        text = FORMATS[kind].format(value).replace("-", "\N{MINUS SIGN}")
        return Markup('<data value="{}" title="{}: {}">{}</data>').format(
            repr(value), file, path, text
        )

    def count(self, file: str, path: str) -> Markup:
        """Return how many entries a list of a JSON file has, as HTML."""
        entries = len(self.value(file, path))
        return Markup('<data value="{}" title="{}: {}, entries">{:,}</data>').format(
            entries, file, path, entries
        )

    def spread(self, file: str, path: str, score: str, kind: str = "score") -> Markup:
        """Return a mean over seeds as HTML, with its spread where there are several."""
        mean = self.number(file, f"{path}/{score}", kind)
        if len(self.value(file, f"{path}/runs")) == 1:
            return mean
        return mean + Markup("&nbsp;±&nbsp;") + self.number(file, f"{path}/spread/{score}", kind)

    def interval(self, file: str, path: str, score: str, kind: str = "score") -> Markup:
        """Return a 95% interval as HTML."""
        low, high = (self.number(file, f"{path}/interval/{score}/{end}", kind) for end in "01")
        return low + Markup("&nbsp;to&nbsp;") + high

    def figure(self, file: str, caption: str, label: str = "") -> Markup:
        """Return a figure as HTML, its picture within; nothing where no step has drawn it."""
        path = self.folder / file
        if not path.exists():
            return Markup("")
        picture = path.read_bytes()
        width, height = (round(size * SCREEN_DPI / FIGURE_DPI) for size in _size_of(picture))
        return Markup(
            '<figure{}><div class="scroll"><img width="{}" height="{}" alt="{}" '
            'src="data:image/png;base64,{}"></div><figcaption>{}{}</figcaption></figure>'
        ).format(
            Markup(' class="wide"') if width > TEXT_WIDTH else "",
            width,
            height,
            caption,
            base64.b64encode(picture).decode(),
            Markup("<strong>{}.</strong> ").format(label) if label else "",
            caption,
        )


def _size_of(picture: bytes) -> tuple[int, int]:
    """Return width and height of a PNG in pixels: they stand at the start of each such file."""
    return struct.unpack(">II", picture[16:24])


def versus(first: dict[str, Any], second: dict[str, Any], score: str) -> str:
    """Say how the second score stands to the first: only what their intervals allow."""
    low, high = first["interval"][score]
    other_low, other_high = second["interval"][score]
    if other_low > high:
        return "clearly higher"
    if other_high < low:
        return "clearly lower"
    return "not clearly different"


def joined(words: str) -> str:
    """Return the words of `versus` in a form that goes on with what is compared."""
    return f"{words} {'from' if words.endswith('different') else 'than'}"


def render(template: Path, files: Files, **facts: Any) -> str:
    """Return the page that a Jinja2 template makes of files and further facts."""
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    helpers = {
        "n": files.number,
        "count": files.count,
        "value": files.value,
        "has": files.has,
        "spread": files.spread,
        "interval": files.interval,
        "figure": files.figure,
        "versus": versus,
    }
    environment.filters["joined"] = joined
    return environment.get_template(template.name).render(**helpers, **facts)
