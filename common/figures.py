"""What all figures share: the colours of the classes, and sheets of small pictures."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey by their lightness.
CLASS_COLOURS = ("#0072B2", "#E69F00", "#009E73")
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
CLASS_MARKERS = ("o", "s", "^")
LETTERS_PER_COLUMN = 13  # of a contact sheet's title


def new_figure(
    rows: int = 1, columns: int = 1, width: float = 6.4, height: float = 4.8
) -> tuple[Figure, list[Axes]]:
    """Return a figure of `width` x `height` inches and its axes, row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def show_picture(ax: Axes, picture: Tensor, caption: str = "") -> Axes:
    """Draw one picture, uint8 or float in [0, 1], [3, 32, 32], with a caption above it."""
    ax.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_title(caption, fontsize=8)
    ax.set_xticks([])
    ax.set_yticks([])
    return ax


def contact_sheet(
    title: str, pictures: Tensor, captions: Sequence[str], columns: int = 8
) -> Figure:
    """Return a figure of pictures [N, 3, 32, 32], each under its caption; of one line if N = 0."""
    rows = max(1, -(-len(pictures) // columns))
    columns = min(columns, max(4, len(pictures)))
    figure, axes = new_figure(rows, columns, width=1.25 * columns, height=1.45 * rows + 0.7)
    figure.suptitle(textwrap.fill(title, LETTERS_PER_COLUMN * columns), fontsize=11)
    for ax in axes:
        ax.axis("off")
    for ax, picture, caption in zip(axes, pictures, captions, strict=False):
        show_picture(ax, picture, caption).axis("on")
    return figure
