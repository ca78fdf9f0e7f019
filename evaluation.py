"""Step 2: how good is a net? Accuracy alone can hide that it knows one class only.

    python evaluation.py --checkpoint models/pre_trained.ckpt

With 88% cars, a net that always says "car" has 88% accuracy. The mean of the recalls by class
(balanced accuracy) gives it 33%, and their geometric mean (G-mean) gives it 0, because two of
the three recalls are 0.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn

from common import console, figures, machine
from common.dataset import CLASS_NAMES, PARTS, Dataset, describe, open_source
from common.network import load_checkpoint, predict_logits
from common.results import Results

PRE_TRAINED = console.PROJECT / "models" / "pre_trained.ckpt"
REPORT_PRE_TRAINED = {"accuracy": 0.88, "balanced_accuracy": 0.34, "g_mean": 0.0}
SCORE_TITLES = {"accuracy": "accuracy", "balanced_accuracy": "average accuracy", "g_mean": "G-mean"}
RESAMPLES = 2000  # of the bootstrap: enough for two digits of a 95% interval
SMALL_CLASS = 100  # below this, one picture moves the class's recall by more than 1%
MISTAKES_SHOWN = 24


def scores_of(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return all scores of confusion matrices, [..., C, C], true class by predicted class.

    Recall is the share of a class's pictures that are found; precision the share of a class's
    predictions that are right (0 where there is none). Balanced accuracy is the mean of the
    recalls; G-mean is their geometric mean (Kubat and Matwin, 1997): 0 as soon as one is 0.

    Returns:
        accuracy, balanced_accuracy and g_mean, [...] each; recall and precision, [..., C].
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    predicted = confusion.sum(axis=-2)
    recall = right / confusion.sum(axis=-1)
    return {
        "accuracy": right.sum(axis=-1) / confusion.sum(axis=(-2, -1)),
        "balanced_accuracy": recall.mean(axis=-1),
        "g_mean": recall.prod(axis=-1) ** (1 / recall.shape[-1]),
        "recall": recall,
        "precision": right / np.maximum(predicted, 1),
    }


def bootstrap_intervals(confusion: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Return a 95% interval of each score: how far another set with as many of each class is off.

    Percentile bootstrap (Efron, 1979): draw as many pictures of each class again, with
    replacement. As scores depend on the confusion matrix alone, each of its rows is drawn from
    a multinomial distribution, which is the same and faster. A recall of exactly 0 or 1 gets an
    interval without width: the bootstrap can't draw what it has never seen.

    Returns:
        the scores of `scores_of`, each with a last axis (low, high) added.
    """
    generator = np.random.default_rng(seed)
    rows = [generator.multinomial(row.sum(), row / row.sum(), RESAMPLES) for row in confusion]
    scores = scores_of(np.stack(rows, axis=1))
    return {name: np.percentile(drawn, (2.5, 97.5), axis=0).T for name, drawn in scores.items()}


def evaluate_predictions(labels: Tensor, predicted: Tensor, seed: int = 0) -> dict[str, Any]:
    """Return the scores of predicted classes, with intervals, in the form of the JSON files."""
    confusion = confusion_matrix(labels, predicted, labels=range(len(CLASS_NAMES)))
    scores, intervals = scores_of(confusion), bootstrap_intervals(confusion, seed)
    return {
        **_named(scores),
        "interval": _named(intervals),
        "confusion": confusion.tolist(),
    }


def _named(scores: dict[str, np.ndarray]) -> dict[str, Any]:
    """Put scores into the form of JSON: one number, or one a class under the class's name."""
    named = {name: scores[name].tolist() for name in SCORE_TITLES}
    for name in ("recall", "precision"):
        named[name] = dict(zip(CLASS_NAMES, scores[name].tolist(), strict=True))
    return named


def evaluate(net: nn.Module, dataset: Dataset, seed: int = 0) -> dict[str, Any]:
    """Return the scores of a net on a data set, with intervals, in the form of the JSON files."""
    predicted = predict_logits(net, dataset.pictures).argmax(dim=1)
    return evaluate_predictions(dataset.labels, predicted, seed)


def draw_confusion(ax: Axes, confusion: np.ndarray) -> Axes:
    """Draw a confusion matrix, [C, C]: counts, coloured by the share of the true class."""
    shares = confusion / confusion.sum(axis=1, keepdims=True)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), share in np.ndenumerate(shares):
        text = f"{confusion[row, column]}\n{share:.0%}"
        ax.text(column, row, text, ha="center", va="center", color="w" if share > 0.5 else "k")
    ax.set_xticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    ax.set_yticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    return ax


def draw_mistakes(dataset: Dataset, logits: Tensor) -> Figure:
    """Return a sheet of the pictures the net has wrong, the surest first."""
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    wrong = torch.nonzero(predicted != dataset.labels).flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:MISTAKES_SHOWN]
    captions = [
        f"{CLASS_NAMES[dataset.labels[i]]} -> {CLASS_NAMES[predicted[i]]}\n{confidence[i]:.0%} sure"
        for i in worst
    ]
    title = f"The {len(worst)} surest of {len(wrong)} mistakes (label -> prediction)"
    return figures.contact_sheet(title, dataset.pictures[worst], captions)


def print_scores(scores: dict[str, Any], report: dict[str, float] | None = None) -> None:
    """Print the scores with their intervals, beside the report's where there are any."""
    interval = scores["interval"]
    lines = [(title, name, scores[name], interval[name]) for name, title in SCORE_TITLES.items()]
    for score in ("recall", "precision"):
        for label in CLASS_NAMES:
            lines.append((f"{score} of {label}", "", scores[score][label], interval[score][label]))
    rows = []
    for title, name, value, (low, high) in lines:
        theirs = f"{report[name]:.3f}" if report and name else ""
        rows.append([title, theirs, f"{value:.3f}", f"{low:.3f} to {high:.3f}"])
    console.print_table(["", "report" if report else "", "ours", "95% interval"], rows)
    if any(low == high for *_, (low, high) in lines):
        print("An interval without width does not mean certainty: a recall of 0 or 1 leaves the")
        print(
            "bootstrap nothing else to draw. Of n pictures, 0 right may still be a recall of 3/n."
        )


def _print_small_classes(dataset: Dataset) -> None:
    for name, count in zip(CLASS_NAMES, dataset.class_counts, strict=True):
        if count < SMALL_CLASS:
            print(f"Only {count} pictures of class {name}: each is {1 / count:.1%} of its recall.")


def parse_pixel_range(text: str) -> tuple[float, float]:
    """Read `--pixel-range`; only two ranges occur, and others would be typing mistakes."""
    ranges = {"0,1": (0.0, 1.0), "-1,1": (-1.0, 1.0)}
    if text not in ranges:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 0,1 nor -1,1")
    return ranges[text]


def add_checkpoint_options(parser: argparse.ArgumentParser, without: str) -> None:
    """Add the options that name a net; `without` says what is taken where none is named."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help=f"the net, a checkpoint of ours or a bare one of the course; without it, {without}",
    )
    parser.add_argument(
        "--pixel-range",
        type=parse_pixel_range,
        metavar="LOW,HIGH",
        help="pixel range of a bare checkpoint, -1,1 or 0,1; without it, the course's -1,1",
    )


def main() -> None:
    """Evaluate one checkpoint on one part of a data set."""
    parser = console.make_parser(__doc__)
    add_checkpoint_options(parser, "models/pre_trained.ckpt")
    parser.add_argument("--part", choices=PARTS, default="dev", help="the part to evaluate on")
    arguments = parser.parse_args()
    device = machine.choose_device(arguments.device)
    path = arguments.checkpoint or PRE_TRAINED
    net, about = load_checkpoint(path, arguments.pixel_range)
    source = open_source(arguments.data, arguments.data_seed)
    dataset = source.load(arguments.part, arguments.quick)
    results = Results(arguments, describe(dataset))

    logits = predict_logits(net.to(device), dataset.pictures)
    scores = evaluate_predictions(dataset.labels, logits.argmax(dim=1), arguments.seed)
    print(f"{path.name} on {source.name}, {arguments.part}: {len(dataset)} pictures\n")
    as_in_the_report = path.resolve() == PRE_TRAINED and arguments.part == "dev"
    print_scores(scores, REPORT_PRE_TRAINED if as_in_the_report else None)
    _print_small_classes(dataset)

    figure, (ax,) = figures.new_figure(width=5, height=4.6)
    draw_confusion(ax, np.array(scores["confusion"]))
    ax.set_title(f"{path.name}: G-mean {scores['g_mean']:.3f}, accuracy {scores['accuracy']:.3f}")
    results.save_figure("confusion", figure)
    results.save_figure("mistakes", draw_mistakes(dataset, logits))
    results.save_json("evaluation", {"checkpoint": {"file": path.name, **about}, **scores})
    results.print_written()


if __name__ == "__main__":
    console.run(main)
