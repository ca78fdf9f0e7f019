"""Step 3c: which labels are wrong?

    python label_errors.py
    python training.py --recipe final --label-fixes results/<data>/label_fixes.csv

Nets judge pictures that they have not learnt from. A label that they doubt goes into a
table for a person to look through: contact sheets show each doubted picture, and `no` in the
table's last column keeps the label that it has.
"""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from cleanlab.rank import get_label_quality_scores
from matplotlib.figure import Figure
from torch import Tensor

from common import console, figures, machine
from common.dataset import CLASS_NAMES, PARTS, Dataset, describe, open_source
from common.label_fixes import LabelFix, format_fixes, with_fixes
from common.label_noise import (
    LEFT_OUT,
    fit_sharpness,
    keep_classes,
    leave_out_doubted,
    true_label_chances,
)
from common.results import Results
from common.trainer import Recipe, judge, judge_by_folds
from training import JUDGE, TUNED, with_epochs

# Judges need not be as good as nets can be, but fair to all classes beforehand. So short a training
# has no time for pictures that are altered much.
RECIPE = replace(
    TUNED,
    name="label-errors",
    network="BestNet",
    epochs=5,
    batch_size=128,
    adjust_logits=1.0,
    colour_change=0.2,
    cutout=8,
    mixup=0.2,
    judge=replace(JUDGE, epochs=28),
)
DEV_NETS = 2  # of each kind
# A label is worth a look when its chance to be right is below DOUBTFUL, and the suggestion is
# accepted unasked below WRONG. The chances trust a little too much: of the course's labels with
# chances from 0.5 to 0.6, more than half turned out wrong when looked at.
DOUBTFUL = 0.8
WRONG = 0.6
ROWS_SHOWN = 12  # of the ranked table at the terminal


def judge_all(
    recipe: Recipe, train: Dataset, judged: Dataset, seed: int, device: torch.device
) -> Tensor:
    """Return logits for a set, [N, C], by nets that have not learnt from the picture.

    Small nets judge the training set first; what they doubt is not learnt from by the better
    nets that come next. The mean of both kinds decides: their mistakes differ.

    Args:
        judged: the training set itself, or dev: that by a few nets of each kind.
    """
    small, better = recipe.judge, replace(recipe, judge=None)
    first_look = judge_by_folds(small, train, seed, device)
    trusted = leave_out_doubted(first_look, train.labels) != LEFT_OUT
    if judged is train:
        return (first_look + judge_by_folds(better, train, seed, device, trusted)) / 2
    learnt = train.take(torch.nonzero(trusted).flatten())
    jobs = [
        (kind, learnt, judged.pictures, seed + number, device)
        for number in range(DEV_NETS)
        for kind in (better, small)
    ]
    return torch.stack(list(machine.side_by_side(judge, jobs, device, "nets"))).mean(dim=0)


def find_fixes(dataset: Dataset, logits: Tensor) -> list[LabelFix]:
    """Return the labels in doubt, the most doubtful first.

    cleanlab (Northcutt et al., "Confident learning", 2021) ranks them, by the chances of each
    picture's true label. Accepted is what is below WRONG, unless nothing would be left of a class;
    what is merely in doubt is for a person to decide.
    """
    sharpness = fit_sharpness(logits, dataset.labels)
    chances = true_label_chances(logits, dataset.labels, sharpness)
    labels = dataset.labels.numpy()
    quality = get_label_quality_scores(labels, chances.numpy(), method="self_confidence")
    others = chances.scatter(1, dataset.labels[:, None], 0.0)
    kept = keep_classes(torch.from_numpy(quality >= WRONG), dataset.labels)
    return [
        LabelFix(
            index=int(index),
            given=int(labels[index]),
            suggested=int(others[index].argmax()),
            confidence=float(others[index].max()),
            accept=not kept[index],
        )
        for index in np.argsort(quality, kind="stable")
        if quality[index] < DOUBTFUL
    ]


def rate(dataset: Dataset, fixes: list[LabelFix]) -> dict[str, dict[str, float]]:
    """Compare the fixes that are accepted with the truth, for each given class and for all.

    Returns:
        number of wrong labels, of those accepted as wrong, and recall, precision, and the share
        of right suggestions among wrong labels found.
    """
    wrong = (dataset.labels != dataset.true_labels).numpy()
    right = (with_fixes(dataset, fixes).labels == dataset.true_labels).numpy()
    accepted = np.zeros_like(wrong)
    accepted[[fix.index for fix in fixes if fix.accept]] = True
    rated = {}
    for number, name in enumerate((*CLASS_NAMES, "all")):
        part = (dataset.labels.numpy() == number) | (name == "all")
        rated[name] = {
            "wrong": int(wrong[part].sum()),
            "accepted": int(accepted[part].sum()),
            "recall": _share(accepted, part & wrong),
            "precision": _share(wrong, part & accepted),
            "suggestion_right": _share(right, part & wrong & accepted),
        }
    return rated


def _share(flags: np.ndarray, part: np.ndarray) -> float:
    """Return the share of pictures of a part that have a flag; NaN if it has none."""
    return float(flags[part].mean()) if part.any() else float("nan")


def draw_sheet(dataset: Dataset, fixes: list[LabelFix], label: int) -> Figure:
    """Return the doubted pictures of one given class, each under its index and suggested label."""
    doubted = [fix for fix in fixes if fix.given == label]
    name = CLASS_NAMES[label]
    pictures = dataset.pictures[[fix.index for fix in doubted]]
    captions = [
        f"{fix.index}: {CLASS_NAMES[fix.suggested]}{mark}, {fix.confidence:.0%}"
        for fix, mark in ((fix, "" if fix.accept else "?") for fix in doubted)
    ]
    title = (
        f"{len(doubted)} of {dataset.class_counts[label]} labels {name} in {dataset.part} "
        "are doubted; above each picture what it should be (? where not accepted unasked), "
        "and how sure the nets are"
    )
    return figures.contact_sheet(title, pictures, captions, columns=12)


def print_fixes(dataset: Dataset, fixes: list[LabelFix]) -> None:
    """Print the head of the ranked table, and how many labels of each class are accepted."""
    rows = [
        [
            str(fix.index),
            CLASS_NAMES[fix.given],
            CLASS_NAMES[fix.suggested],
            f"{fix.confidence:.3f}",
        ]
        for fix in fixes[:ROWS_SHOWN]
    ]
    console.print_table(["picture", "given", "suggested", "confidence"], rows)
    if len(fixes) > ROWS_SHOWN:
        print(f"... and {len(fixes) - ROWS_SHOWN} more in the file")
    accepted = [fix.given for fix in fixes if fix.accept]
    counts = [
        f"{accepted.count(label)} of {count} labels {name}"
        for label, (name, count) in enumerate(zip(CLASS_NAMES, dataset.class_counts, strict=True))
    ]
    print(f"\naccepted as wrong: {', '.join(counts)}; {len(fixes) - len(accepted)} more in doubt")


def print_rates(rated: dict[str, dict[str, float]]) -> None:
    """Print what was found of the wrong labels, where they are known."""
    rows = [
        [name, *(f"{values[key]:.0f}" for key in ("wrong", "accepted"))]
        + [
            "-" if np.isnan(values[key]) else f"{values[key]:.0%}"
            for key in ("recall", "precision", "suggestion_right")
        ]
        for name, values in rated.items()
    ]
    print("\nThe true labels are known here; of what was found:")
    titles = ["given", "wrong", "accepted", "found", "precision", "suggestion right"]
    console.print_table(titles, rows)


def save_fixes(results: Results, dataset: Dataset, fixes: list[LabelFix], recipe: Recipe) -> None:
    """Write, draw and print the doubted labels."""
    suffix = "" if dataset.part == "train" else f"-{dataset.part}"
    results.save_text(f"label_fixes{suffix}.csv", format_fixes(dataset, fixes))
    for label, name in enumerate(CLASS_NAMES):
        results.save_figure(f"label-errors-{name}{suffix}", draw_sheet(dataset, fixes, label))
    numbers: dict[str, Any] = {
        "recipe": asdict(recipe),
        "doubted": len(fixes),
        "accepted": sum(fix.accept for fix in fixes),
        "fixes": [asdict(fix) for fix in fixes],
    }
    print_fixes(dataset, fixes)
    if dataset.true_labels is not None:
        numbers["rates"] = rate(dataset, fixes)
        print_rates(numbers["rates"])
    results.save_json(f"label_errors{suffix}", numbers)


def main() -> None:
    """Find the labels that are probably wrong."""
    parser = console.make_parser(__doc__)
    parser.add_argument(
        "--part", choices=PARTS, default="train", help="whose labels to judge, by nets of train"
    )
    parser.add_argument(
        "--epochs", type=console.positive_whole_number, help="how many, not the recipe's own"
    )
    arguments = parser.parse_args()
    device = machine.choose_device(arguments.device)
    source = open_source(arguments.data, arguments.data_seed)
    train = source.load("train", arguments.quick)
    judged = train if arguments.part == "train" else source.load("dev", arguments.quick)
    results = Results(arguments, describe(judged))
    recipe = with_epochs(RECIPE, arguments.epochs, arguments.quick)
    logits = judge_all(recipe, train, judged, arguments.seed, device)
    save_fixes(results, judged, find_fixes(judged, logits), recipe)
    results.print_written()


if __name__ == "__main__":
    console.run(main)
