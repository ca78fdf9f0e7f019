"""Step 1: look at the data before training on it.

    python inspectData.py
    python inspectData.py --export my_images      (then correct labels by moving files)

Counts the classes, tests whether class and position in the file are independent and whether dev
has the same class fractions as train, and shows outliers and near-duplicates within train, within
dev and across both.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from common import cli, plots
from common.cli import UserError
from common.data import (
    CLASS_NAMES,
    SPLITS,
    Dataset,
    describe,
    near_duplicates,
    open_data,
    to_float,
    write_image_folder,
)
from common.model import choose_device

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import chi2_contingency
from torch import Tensor

# The report's limits for outliers, for pixels in [0, 1].
MIN_MEAN, MAX_MEAN, MIN_STD = 0.1, 0.9, 0.1
MAX_BLOCKS = 20  # consecutive parts of the file, compared by the test
MIN_EXPECTED = 5  # images of a class per block: the chi-squared test's rule of thumb
BLOCK = 250  # images per point of the curve of class fractions
MAX_SHOWN = 32  # images in a figure
MAX_LISTED = 10  # label conflicts in the terminal

# What the report says of its training set.
REPORT = {
    "images": "5626",
    "size": "32x32x3",
    "car": "4951 (88.0%)",
    "truck": "450 (8.0%)",
    "cat": "225 (4.0%)",
    "class and position independent, p": "by eye",
    "outliers": "none that matter",
    "pairs of near-duplicates": "not searched",
}


def pixel_statistics(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each image's pixels in [0, 1], [N] each."""
    blocks = dataset.images.split(1024)  # all images as floats would take four times the memory
    found = [torch.std_mean(to_float(each), dim=(1, 2, 3), correction=0) for each in blocks]
    std, mean = (torch.cat(parts) for parts in zip(*found, strict=True))
    return mean, std


def find_outliers(dataset: Dataset) -> Tensor:
    """Return the indices of images that are very dark, very bright, or nearly of one color."""
    mean, std = pixel_statistics(dataset)
    outlying = (mean < MIN_MEAN) | (mean > MAX_MEAN) | (std < MIN_STD)
    return torch.nonzero(outlying).flatten()


def independence_p_value(labels: np.ndarray) -> float | None:
    """Return the p-value of "class and position in the file are independent" (chi-squared).

    The file is cut into as many blocks as leave MIN_EXPECTED images of the rarest class in
    each, MAX_BLOCKS at most. None if that class is too small for two blocks.
    """
    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    blocks = min(MAX_BLOCKS, int(counts.min()) // MIN_EXPECTED)
    if blocks < 2:
        return None
    return float(chi2_contingency(count_in_blocks(labels, blocks)).pvalue)


def count_in_blocks(labels: np.ndarray, blocks: int) -> np.ndarray:
    """Return the class counts in this number of consecutive blocks of nearly equal size."""
    parts = np.array_split(labels, blocks)
    return np.array([np.bincount(part, minlength=len(CLASS_NAMES)) for part in parts])


class Pair(NamedTuple):
    """Two near-duplicates: the split, index and label of each, and their correlation."""

    splits: tuple[str, str]
    indices: tuple[int, int]
    labels: tuple[str, str]
    correlation: float

    def is_conflict(self) -> bool:
        """Return whether the labels differ: then one of them is probably wrong."""
        return self.labels[0] != self.labels[1]

    def captions(self) -> list[str]:
        """Return, for each image, where it is and how it is labeled."""
        parts = zip(self.splits, self.indices, self.labels, strict=True)
        return [f"{split} {index}\n{label}" for split, index, label in parts]

    def metadata(self) -> dict[str, Any]:
        """Return the pair for the JSON file: indices by split, or as first and second."""
        names = self.splits if len(set(self.splits)) == 2 else ("first", "second")
        indices = dict(zip(names, self.indices, strict=True))
        return indices | {"labels": self.labels, "correlation": self.correlation}


def find_pairs(dataset: Dataset, other: Dataset | None = None) -> list[Pair]:
    """Return the near-duplicates within a split, or across two."""
    found = near_duplicates(dataset.images, None if other is None else other.images)
    other = other or dataset
    splits = (dataset.split, other.split)
    return [
        Pair(splits, (i, j), (CLASS_NAMES[dataset.labels[i]], CLASS_NAMES[other.labels[j]]), value)
        for i, j, value in found
    ]


def inspect(dataset: Dataset, pairs: list[Pair]) -> dict[str, Any]:
    """Return the numbers of one split, and its own near-duplicates."""
    counts = dict(zip(CLASS_NAMES, dataset.class_counts, strict=True))
    return {
        "images": len(dataset),
        "shape": list(dataset.images.shape[1:]),
        "class_counts": counts,
        "class_fractions": {name: count / len(dataset) for name, count in counts.items()},
        "independence_p_value": independence_p_value(dataset.labels.numpy()),
        "outliers": find_outliers(dataset).tolist(),
        "near_duplicates": [pair.metadata() for pair in pairs],
    }


def inspect_all(datasets: dict[str, Dataset]) -> tuple[dict[str, Any], list[Pair]]:
    """Return the numbers for the JSON file, and all near-duplicates, those across splits first."""
    within = {split: find_pairs(dataset) for split, dataset in datasets.items()}
    splits = {split: inspect(dataset, within[split]) for split, dataset in datasets.items()}
    numbers, across = {"splits": splits}, []
    if len(datasets) == len(SPLITS):
        tested = chi2_contingency([dataset.class_counts for dataset in datasets.values()])
        enough = tested.expected_freq.min() >= MIN_EXPECTED
        numbers["class_fractions_p_value"] = float(tested.pvalue) if enough else None
        across = find_pairs(datasets["dev"], datasets["train"])
    numbers["near_duplicates"] = [pair.metadata() for pair in across]
    return numbers, sum(within.values(), start=across)


# ---- figures --------------------------------------------------------------------------------


def draw_label_counts(datasets: list[Dataset]) -> Figure:
    """Figure 1: the class fractions, as the report's pie of train and as a bar for each split."""
    figure = Figure(figsize=(9.5, 3.4), layout="constrained")
    pie, bars = figure.subplots(1, 2, width_ratios=(1, 2.6))
    pie.pie(
        datasets[0].class_counts,
        labels=CLASS_NAMES,
        colors=plots.CLASS_COLORS,
        startangle=90,
        wedgeprops={"edgecolor": "white"},
    )
    pie.set_title(datasets[0].split)
    for row, dataset in enumerate(datasets):
        draw_bar(bars, row, dataset)
    bars.set_yticks(range(len(datasets)), [f"{each.split}\n{len(each):,}" for each in datasets])
    bars.set(xlim=(0, 1), ylim=(len(datasets) - 0.4, -0.6), title="images of each class")
    bars.xaxis.set_major_formatter(PercentFormatter(1))
    bars.spines[["top", "right", "left"]].set_visible(False)
    return figure


def draw_bar(ax: Axes, row: int, dataset: Dataset) -> None:
    """Draw a stacked bar; text that does not fit into a segment is above or below it."""
    left = 0.0
    for label, count in enumerate(dataset.class_counts):
        fraction = count / len(dataset)
        ax.barh(row, fraction, 0.4, left, color=plots.CLASS_COLORS[label], edgecolor="white")
        text = f"{CLASS_NAMES[label]} {count:,} ({fraction:.1%})"
        if fraction > 0.3:
            style = {"ha": "center", "va": "center", "color": "white", "weight": "bold"}
            ax.text(left + fraction / 2, row, text, **style)
        else:
            height = row - 0.3 if label == 1 else row + 0.3
            ax.text(max(left + fraction, 0.25), height, text, ha="right", va="center")
        left += fraction


def draw_label_order(datasets: list[Dataset]) -> Figure:
    """Figure 2: the class of each image along the file, and the class fractions below."""
    figure, axes = plots.new_figure(2, len(datasets), width=6 * len(datasets), height=5.5)
    for column, dataset in enumerate(datasets):
        draw_positions(axes[column], dataset)
        draw_fractions(axes[len(datasets) + column], dataset)
    return figure


def draw_positions(ax: Axes, dataset: Dataset) -> Axes:
    """Draw a line per image in the row of its class, paler where there are many."""
    labels = dataset.labels.numpy()
    for label, count in enumerate(dataset.class_counts):
        style = {"colors": plots.CLASS_COLORS[label], "alpha": np.clip(300 / count, 0.1, 1)}
        places = np.flatnonzero(labels == label)
        ax.eventplot(places, lineoffsets=label, linelengths=0.7, linewidths=0.4, **style)
    ax.set_yticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    ax.set(xlim=(0, len(labels)), ylim=(len(CLASS_NAMES) - 0.5, -0.5))
    p_value = format_p_value(independence_p_value(labels))
    ax.set_title(f"{dataset.split}: class along the file (independence: p = {p_value})")
    return ax


def draw_fractions(ax: Axes, dataset: Dataset) -> Axes:
    """Draw the class fractions of consecutive blocks, and dashed those of the whole file."""
    labels = dataset.labels.numpy()
    counts = count_in_blocks(labels, max(1, round(len(labels) / BLOCK)))
    fractions = counts / counts.sum(axis=1, keepdims=True)
    edges = np.append(0, counts.sum(axis=1).cumsum())
    for label in range(len(CLASS_NAMES)):
        color = plots.CLASS_COLORS[label]
        ax.stairs(fractions[:, label], edges, baseline=None, color=color, lw=1.8)
        ax.axhline((labels == label).mean(), color=color, ls="--", lw=0.8)
    ax.set_yscale("log")
    ax.set_yticks(ticks := [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], [f"{tick:.0%}" for tick in ticks])
    ax.minorticks_off()
    ax.set(xlim=(0, len(labels)), ylim=(0.008, 1.2), xlabel="index in the file")
    ax.set_ylabel(f"fraction in about {BLOCK} images")
    ax.grid(alpha=0.3)
    return ax


def draw_pixel_statistics(datasets: list[Dataset]) -> Figure:
    """Draw each image's mean and standard deviation, small classes on top."""
    figure, axes = plots.new_figure(1, len(datasets), width=6 * len(datasets), height=4)
    for ax, dataset in zip(axes, datasets, strict=True):
        mean, std = pixel_statistics(dataset)
        for label, name in enumerate(CLASS_NAMES):
            own = dataset.labels == label
            marker, color = plots.MARKERS[label], plots.CLASS_COLORS[label]
            is_small = own.sum() < len(dataset) / 2
            alpha, order = (0.9, 2 + label / 10) if is_small else (0.3, 1)
            style = {"marker": marker, "color": color, "alpha": alpha, "lw": 0, "zorder": order}
            ax.scatter(mean[own], std[own], s=14, label=name, **style)
        for limit in (MIN_MEAN, MAX_MEAN):
            ax.axvline(limit, color="0.4", ls="--", lw=0.8)
        ax.axhline(MIN_STD, color="0.4", ls="--", lw=0.8)
        ax.set(xlim=(0, 1), ylim=(0, 0.5), xlabel="mean of the pixels", ylabel="standard deviation")
        ax.set_title(f"{dataset.split}: outliers lie beyond the dashed lines")
        ax.legend(loc="upper left")
    return figure


def draw_outliers(dataset: Dataset) -> Figure | None:
    """Show outliers, the darkest and the brightest first; None if there are none."""
    outliers = find_outliers(dataset)
    if len(outliers) == 0:
        return None
    mean, std = pixel_statistics(dataset)
    shown = outliers[(mean[outliers] - 0.5).abs().argsort(descending=True)][:MAX_SHOWN]
    captions = [
        f"{i}, {CLASS_NAMES[dataset.labels[i]]}\nmean {mean[i]:.2f}, std {std[i]:.2f}"
        for i in shown.tolist()
    ]
    title = f"{dataset.split}: {len(shown)} of {len(outliers)} outliers"
    return plots.image_grid(title, dataset.images[shown], captions)


def draw_pairs(pairs: list[Pair], datasets: dict[str, Dataset]) -> Figure | None:
    """Show near-duplicates side by side, those with different labels first; None for none."""
    if not pairs:
        return None
    images, captions = [], []
    for pair in sorted(pairs, key=lambda pair: not pair.is_conflict())[: MAX_SHOWN // 2]:
        parts = zip(pair.splits, pair.indices, strict=True)
        images += [datasets[split].images[index] for split, index in parts]
        captions += pair.captions()
        captions[-1] += f", {pair.correlation:.3f}"
    title = f"{len(images) // 2} of {len(pairs)} pairs of near-duplicates, different labels first"
    return plots.image_grid(title, torch.stack(images), captions)


def save_figures(datasets: dict[str, Dataset], pairs: list[Pair], results: cli.Results) -> None:
    """Write all figures."""
    shown = list(datasets.values())
    results.save_figure("1-label-counts", draw_label_counts(shown))
    results.save_figure("2-label-order", draw_label_order(shown))
    results.save_figure("pixel-statistics", draw_pixel_statistics(shown))
    for dataset in shown:
        results.save_figure(f"outliers-{dataset.split}", draw_outliers(dataset))
    results.save_figure("near-duplicates", draw_pairs(pairs, datasets))


# ---- printed output -------------------------------------------------------------------------


def print_splits(splits: dict[str, dict[str, Any]]) -> None:
    """Print a row per number and a column per split, next to the report's training set."""

    def column(found: dict[str, Any]) -> dict[str, str]:
        fractions, counts = found["class_fractions"], found["class_counts"]
        return {
            "images": str(found["images"]),
            "size": "{1}x{2}x{0}".format(*found["shape"]),
            **{name: f"{count} ({fractions[name]:.1%})" for name, count in counts.items()},
            "class and position independent, p": format_p_value(found["independence_p_value"]),
            "outliers": str(len(found["outliers"])),
            "pairs of near-duplicates": str(len(found["near_duplicates"])),
        }

    columns = [column(found) for found in splits.values()]
    rows = [[key, REPORT.get(key, ""), *(each[key] for each in columns)] for key in columns[0]]
    cli.print_table(["", "report, train", *splits], rows)
    cli.say()


def format_p_value(p_value: float | None) -> str:
    """Format a p-value; small ones in scientific notation."""
    if p_value is None:
        return "too few"
    return f"{p_value:.2f}" if p_value >= 0.01 else f"{p_value:.0e}"


def print_verdicts(numbers: dict[str, Any]) -> None:
    """Say in words what the tests found."""
    for split, found in numbers["splits"].items():
        dependence = f"the classes of {split} are in blocks or drift along the file"
        cli.say(verdict(found["independence_p_value"], dependence))
    if "class_fractions_p_value" in numbers:
        difference = "the class fractions of dev differ from those of train"
        cli.say(verdict(numbers["class_fractions_p_value"], difference))


def verdict(p_value: float | None, alternative: str) -> str:
    """Say what a p-value means for the alternative hypothesis."""
    if p_value is None:
        return f"Too few images to test whether {alternative}."
    text = f"There is no sign that {alternative}"
    if p_value < 0.05:
        text = f"{alternative[0].upper()}{alternative[1:]}"
    return f"{text} (p = {format_p_value(p_value)})."


def print_pairs(pairs: list[Pair]) -> None:
    """Print how many dev images are in train too, and which labels contradict each other."""
    known = len({pair.indices[0] for pair in pairs if pair.splits == ("dev", "train")})
    if known:
        cli.say(f"Dev images with a near-duplicate in train: {known}. They may inflate the scores.")
    conflicts = [pair for pair in pairs if pair.is_conflict()]
    if conflicts:
        text = "Near-duplicates with different labels, one of them likely wrong"
        cli.say(f"{text}: {len(conflicts)}.")
    for pair in conflicts[:MAX_LISTED]:
        first, second = (caption.replace("\n", " ") for caption in pair.captions())
        cli.say(f"  {first} - {second} (correlation {pair.correlation:.3f})")
    if len(conflicts) > MAX_LISTED:
        cli.say("  ... (all are in inspectData.json)")


# ---- export ---------------------------------------------------------------------------------


def export(folder: Path, datasets: list[Dataset]) -> None:
    """Write image folders; `folder` appears only once it is complete."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        for dataset in datasets:
            write_image_folder(part, dataset)
        part.rename(folder)
    except OSError as error:
        raise UserError(f"--export {folder}: can't be written: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main() -> None:
    """Inspect the splits that the data set has."""
    parser = cli.make_parser(__doc__)
    text = "write the set as FOLDER/<split>/<class>/*.png"
    parser.add_argument("--export", type=Path, metavar="FOLDER", help=text)
    arguments = parser.parse_args()
    choose_device(arguments.device)  # not used here, but a wrong name is still reported
    if arguments.export and arguments.export.exists():
        raise UserError(f"--export {arguments.export}: exists already; name a new folder")
    if arguments.export and arguments.quick:
        raise UserError("--export: writes the whole set; omit --quick")
    data = open_data(arguments.data)
    datasets = {s: data.load(s, arguments.quick) for s in SPLITS if data.has(s)}
    results = cli.Results(arguments, describe(*datasets.values()))

    numbers, pairs = inspect_all(datasets)
    results.save_json("inspectData", numbers)
    save_figures(datasets, pairs, results)
    if arguments.export:
        export(arguments.export, list(datasets.values()))

    print_splits(numbers["splits"])
    print_verdicts(numbers)
    print_pairs(pairs)
    for split in SPLITS:
        if split not in datasets:
            cli.say(f"{data.path} has no {split} split.")
    if arguments.export:
        folder = arguments.export
        cli.say(f"\nexported to {folder}; correct labels by moving files, then use --data {folder}")
    results.print_written()


if __name__ == "__main__":
    cli.run(main)
