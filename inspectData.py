"""Step 1: look into the data before training on it.

    python inspectData.py
    python inspectData.py --export my_pictures      (then mend labels by moving files)

Counts the classes, tests whether they are spread evenly along the file and whether dev has the
shares of train, and shows pictures that stick out or stand in both sets.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import chi2_contingency
from torch import Tensor

from common import console, figures, machine
from common.console import UserError
from common.dataset import CLASS_NAMES, PARTS, Dataset, as_input, describe, open_source
from common.picture_folder import write_folder
from common.results import Results

# The report's limits for outliers, for pixels in [0, 1].
LOWEST_MEAN, HIGHEST_MEAN, LOWEST_STD = 0.1, 0.9, 0.1
MOST_BLOCKS = 20  # the file is cut into so many blocks to see whether classes are spread evenly
SMALLEST_EXPECTED = 5  # pictures of a class in a block: the chi-squared test's rule of thumb
# Pictures with this correlation of their pixels are the same photograph, perhaps brightened or
# moved by a pixel. In the course's sets all pairs above it are such copies, judged by eye.
COPY_CORRELATION = 0.9
SHOWN = 32
CPU = torch.device("cpu")


def pixel_statistics(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each picture's pixels in [0, 1], [N] each."""
    pixels = as_input(dataset.pictures).flatten(start_dim=1)
    return pixels.mean(dim=1), pixels.std(dim=1, correction=0)


def find_outliers(dataset: Dataset) -> Tensor:
    """Return the indices of pictures that are very dark, very bright, or nearly of one colour."""
    mean, std = pixel_statistics(dataset)
    return torch.nonzero(
        (mean < LOWEST_MEAN) | (mean > HIGHEST_MEAN) | (std < LOWEST_STD)
    ).flatten()


def spread_p_value(labels: np.ndarray) -> float | None:
    """Return the p-value of "the classes are spread evenly along the file".

    Chi-squared test of independence between class and block of the file. As many blocks as
    leave SMALLEST_EXPECTED pictures of the rarest class in each, MOST_BLOCKS at most. Small
    values speak against an even spread. None if the rarest class is too small for two blocks.
    """
    counts = np.bincount(labels, minlength=len(CLASS_NAMES))
    blocks = min(MOST_BLOCKS, int(counts.min()) // SMALLEST_EXPECTED)
    if blocks < 2:
        return None
    parts = np.array_split(labels, blocks)
    table = np.array([np.bincount(part, minlength=len(CLASS_NAMES)) for part in parts])
    return float(chi2_contingency(table).pvalue)


def shares_p_value(train: Dataset, dev: Dataset) -> float:
    """Return the p-value of "dev has the class shares of train" (chi-squared test)."""
    return float(chi2_contingency([train.class_counts, dev.class_counts]).pvalue)


def standardise(pictures: Tensor) -> Tensor:
    """Return pictures as vectors of mean 0 and length 1, [N, 3072]: light and contrast are gone.

    Their scalar products are correlations. A picture of one colour has none, and gives zeros.
    """
    vectors = as_input(pictures).flatten(start_dim=1)
    vectors = vectors - vectors.mean(dim=1, keepdim=True)
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-6)


def find_copies(
    dev: Dataset, train: Dataset, device: torch.device = CPU
) -> list[tuple[int, int, float]]:
    """Return (index in dev, index in train, correlation) of pictures that stand in both sets.

    Of several copies in train, the closest; mirrored ones count too. The most alike come first.
    """
    pictures, theirs = dev.pictures.to(device), standardise(train.pictures.to(device))
    ours, mirrored = standardise(pictures), standardise(pictures.flip(dims=[3]))
    correlation, closest = torch.maximum(ours @ theirs.T, mirrored @ theirs.T).max(dim=1)
    in_dev = torch.nonzero(correlation >= COPY_CORRELATION).flatten().tolist()
    copies = [(i, int(closest[i]), min(1.0, correlation[i].item())) for i in in_dev]
    return sorted(copies, key=lambda copy: -copy[2])


def draw_shares(ax: Axes, dataset: Dataset) -> Axes:
    """Draw figure 1: the share of each class, with its count where it can be read."""
    counts = dataset.class_counts
    texts = [
        f"{name}\n{count:,} ({count / len(dataset):.1%})"
        for name, count in zip(CLASS_NAMES, counts, strict=True)
    ]
    ax.pie(
        counts,
        labels=texts,
        colors=figures.CLASS_COLOURS,
        startangle=360 * (0.5 - counts[0] / len(dataset) / 2),  # small classes to the right
        wedgeprops={"edgecolor": "w", "linewidth": 1.5},
    )
    ax.set_title(f"{dataset.part}: {len(dataset):,} pictures")
    return ax


def draw_order(ax: Axes, dataset: Dataset) -> Axes:
    """Draw figure 2: the class of each picture along the file, one thin line a picture."""
    labels = dataset.labels.numpy()
    for label, color in enumerate(figures.CLASS_COLOURS):
        places = np.flatnonzero(labels == label)
        ax.eventplot(places, lineoffsets=label, linelengths=0.7, linewidths=0.6, colors=color)
    ax.set_yticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    ax.set_xlabel("index in the file")
    ax.invert_yaxis()
    p_value = format_p_value(spread_p_value(labels))
    ax.set_title(f"{dataset.part}: class along the file (even spread: p = {p_value})")
    return ax


def draw_statistics(ax: Axes, dataset: Dataset) -> Axes:
    """Draw each picture's mean and standard deviation, with the limits for outliers."""
    mean, std = pixel_statistics(dataset)
    for label, name in enumerate(CLASS_NAMES):
        own = dataset.labels == label
        marker = figures.CLASS_MARKERS[label]
        color = figures.CLASS_COLOURS[label]
        ax.scatter(mean[own], std[own], s=9, marker=marker, color=color, alpha=0.5, label=name)
    for limit in (LOWEST_MEAN, HIGHEST_MEAN):
        ax.axvline(limit, color="0.4", ls="--", lw=0.8)
    ax.axhline(LOWEST_STD, color="0.4", ls="--", lw=0.8)
    ax.set(xlim=(0, 1), ylim=(0, 0.5), xlabel="mean of the pixels", ylabel="standard deviation")
    ax.set_title(f"{dataset.part}: outliers lie beyond the dashed lines")
    ax.legend(loc="upper left")
    return ax


def draw_outliers(dataset: Dataset, outliers: Tensor) -> Figure:
    """Return a sheet of outliers, the darkest and the brightest first."""
    mean, std = pixel_statistics(dataset)
    order = (mean[outliers] - 0.5).abs().argsort(descending=True)
    shown = outliers[order][:SHOWN]
    captions = [
        f"{i}, {CLASS_NAMES[dataset.labels[i]]}\nmean {mean[i]:.2f}, std {std[i]:.2f}"
        for i in shown.tolist()
    ]
    title = f"{dataset.part}: {len(shown)} of {len(outliers)} outliers by mean or deviation"
    return figures.contact_sheet(title, dataset.pictures[shown], captions)


def draw_copies(dev: Dataset, train: Dataset, copies: list[tuple[int, int, float]]) -> Figure:
    """Return a sheet of pairs: a picture of dev and its copy in train."""
    pictures, captions = [], []
    for in_dev, in_train, correlation in copies[: SHOWN // 2]:
        pictures += [dev.pictures[in_dev], train.pictures[in_train]]
        captions.append(f"dev {in_dev}\n{CLASS_NAMES[dev.labels[in_dev]]}")
        captions.append(
            f"train {in_train}\n{CLASS_NAMES[train.labels[in_train]]}, {correlation:.3f}"
        )
    title = (
        f"{min(len(copies), SHOWN // 2)} of {len(copies)} pictures of dev that stand in train too"
    )
    return figures.contact_sheet(title, torch.stack(pictures), captions)


def check_export(folder: Path, quick: bool) -> None:
    """Refuse, before any work is done, an export that can't be made or would be a part only."""
    if folder.exists():
        raise UserError(f"--export {folder}: exists already; name a new folder")
    if quick:
        raise UserError("--export writes the whole set; leave --quick out")


def export(folder: Path, datasets: list[Dataset]) -> None:
    """Write data sets as folders of pictures, whole or not at all.

    Raises:
        UserError: the folder can't be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as temporary:
            whole = Path(temporary) / folder.name
            for dataset in datasets:
                write_folder(whole / dataset.part, dataset.pictures, dataset.labels, CLASS_NAMES)
            whole.rename(folder)
    except OSError as error:
        raise UserError(f"--export {folder}: can't be written: {error.strerror}") from error
    print(f"\nexported to {folder}; mend labels by moving files, then use --data {folder}")


def inspect(dataset: Dataset) -> dict[str, Any]:
    """Return what there is to say about one part of the data."""
    mean, std = pixel_statistics(dataset)
    p_value = spread_p_value(dataset.labels.numpy())
    return {
        "pictures": len(dataset),
        "shape": list(dataset.pictures.shape[1:]),
        "class_counts": dict(zip(CLASS_NAMES, dataset.class_counts, strict=True)),
        "class_shares": {
            name: count / len(dataset)
            for name, count in zip(CLASS_NAMES, dataset.class_counts, strict=True)
        },
        "even_spread_p_value": p_value,
        "mean_of_means": mean.mean().item(),
        "mean_of_stds": std.mean().item(),
        "outliers": find_outliers(dataset).tolist(),
    }


def print_facts(facts: dict[str, dict[str, Any]]) -> None:
    """Print one row a fact and one column a part, beside the report's training set."""
    report_counts = {"car": "4951 (88.0%)", "truck": "450 (8.0%)", "cat": "225 (4.0%)"}
    rows = [
        ["pictures", "5626", *[str(each["pictures"]) for each in facts.values()]],
        ["shape", "32x32x3", *["{1}x{2}x{0}".format(*each["shape"]) for each in facts.values()]],
    ]
    for name, theirs in report_counts.items():
        counts = [(each["class_counts"][name], each["pictures"]) for each in facts.values()]
        rows.append([name, theirs, *[f"{count} ({count / all_:.1%})" for count, all_ in counts]])
    p_values = [each["even_spread_p_value"] for each in facts.values()]
    rows.append(["even spread, p", "by eye", *[format_p_value(p_value) for p_value in p_values]])
    outliers = [str(len(each["outliers"])) for each in facts.values()]
    rows.append(["outliers", "none that matter", *outliers])
    console.print_table(["", "report, train", *facts], rows)


def format_p_value(p_value: float | None) -> str:
    """Return a p-value as a reader wants it: not 0.00 where it is only small."""
    if p_value is None:
        return "too few"
    return f"{p_value:.2f}" if p_value >= 0.01 else f"{p_value:.0e}"


def verdict(p_value: float | None, even: str, uneven: str) -> str:
    """Say in words what a p-value means."""
    if p_value is None:
        return "Too few pictures to test that."
    return f"{even if p_value >= 0.05 else uneven} (p = {format_p_value(p_value)})."


def compare(train: Dataset, dev: Dataset, results: Results, device: torch.device) -> dict[str, Any]:
    """Compare train and dev: class shares, and pictures that stand in both."""
    p_value = shares_p_value(train, dev)
    same = "Dev has the class shares of train, as far as so few pictures can tell"
    print(verdict(p_value, same, "Dev has other class shares than train"))
    copies = find_copies(dev, train, device)
    if copies:
        print(f"{len(copies)} pictures of dev stand in train too, or nearly: they flatter a score.")
        results.save_figure("copies", draw_copies(dev, train, copies))
    else:
        print("No picture of dev stands in train too.")
    return {
        "same_shares_p_value": p_value,
        "copies": [{"dev": i, "train": j, "correlation": c} for i, j, c in copies],
    }


def main() -> None:
    """Inspect whatever parts of the data set there are."""
    parser = console.make_parser(__doc__)
    parser.add_argument(
        "--export", type=Path, metavar="FOLDER", help="write the set as FOLDER/<part>/<class>/*.png"
    )
    arguments = parser.parse_args()
    device = machine.choose_device(arguments.device)
    if arguments.export:
        check_export(arguments.export, arguments.quick)
    source = open_source(arguments.data, arguments.data_seed)
    datasets = [source.load(part, arguments.quick) for part in PARTS if source.has(part)]
    results = Results(arguments, describe(*datasets))

    facts = {dataset.part: inspect(dataset) for dataset in datasets}
    print_facts(facts)
    for dataset in datasets:
        p_value = facts[dataset.part]["even_spread_p_value"]
        even = f"\n{dataset.part}: no sign that classes stand in blocks or drift"
        print(verdict(p_value, even, f"\n{dataset.part}: the classes stand in blocks or drift"))
        outliers = torch.tensor(facts[dataset.part]["outliers"], dtype=torch.int64)
        if len(outliers):
            results.save_figure(f"outliers-{dataset.part}", draw_outliers(dataset, outliers))
    for name, draw in (
        ("1-label-counts", draw_shares),
        ("2-label-order", draw_order),
        ("pixel-statistics", draw_statistics),
    ):
        figure, axes = figures.new_figure(1, len(datasets), width=6 * len(datasets), height=4)
        for ax, dataset in zip(axes, datasets, strict=True):
            draw(ax, dataset)
        results.save_figure(name, figure)
    comparison = compare(*datasets, results, device) if len(datasets) == len(PARTS) else {}
    results.save_json("inspectData", {"parts": facts, **comparison})
    if arguments.export:
        export(arguments.export, datasets)
    results.print_written()


if __name__ == "__main__":
    console.run(main)
