"""Shared by all figures: colors, image grids, and curves over several runs."""

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib import rcdefaults, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

rcdefaults()  # figures look the same whatever a matplotlibrc file says
rcParams["svg.hashsalt"] = "any"  # or each SVG file would differ from the last

# Okabe and Ito's palette: color-blind readers can tell its colors apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
CLASS_COLORS = PALETTE  # by label
MARKERS = "os^Dv*XP"
LINE_STYLES = ("-", "--", "-.", ":")
CHARACTERS_PER_COLUMN = 13  # in an image grid's title


def new_figure(
    rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.8
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `width` x `height` inches and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def literal(name: str) -> str:
    """Escape a name for matplotlib, where $ would start a formula."""
    return name.replace("$", r"\$")


def show_image(ax: Axes, image: Tensor, caption: str = "") -> Axes:
    """Draw one image, uint8 or float in [0, 1], [3, 32, 32], with a caption above it."""
    ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_title(caption, fontsize=8)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def image_grid(title: str, images: Tensor, captions: Sequence[str], columns: int = 8) -> Figure:
    """Return a figure of images [N, 3, 32, 32], each under its caption; just a title if N = 0."""
    rows = max(1, -(-len(images) // columns))
    columns = min(columns, max(4, len(images)))
    figure, axes = new_figure(rows, columns, width=1.25 * columns, height=1.45 * rows + 0.7)
    figure.suptitle(textwrap.fill(title, CHARACTERS_PER_COLUMN * columns), fontsize=11)
    for ax in axes:
        ax.axis("off")
    for ax, image, caption in zip(axes, images, captions, strict=False):
        show_image(ax, image, caption).axis("on")
    return figure


def plot_runs(
    ax: Axes, x: Sequence[float], values: np.ndarray, label: str, color: str, style: str = "-"
) -> Axes:
    """Draw curves of several runs, [runs, len(x)]: their mean as a line, their range as a band."""
    ax.plot(x, values.mean(axis=0), style, color=color, label=label)
    ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, lw=0)
    ax.grid(alpha=0.3)
    return ax
