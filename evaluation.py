"""Step 2: how good is a model? Accuracy alone can hide that it recognizes only one class.

    python evaluation.py
    python evaluation.py --checkpoint models/best.ckpt --split train
    python evaluation.py --checkpoint models hand_ins --rank-by g_mean
    python evaluation.py --checkpoint results/<data>/final.ckpt --show-mismatch
    python evaluation.py --checkpoint models/best.ckpt --image cat.jpg dog.png

With 88% cars, a model that always predicts "car" has 88% accuracy. The mean of its recalls, the
balanced accuracy (the report's "average accuracy"), is 33%, and their geometric mean, the G-mean,
is 0, because two of the three recalls are 0.

Several checkpoints are ranked on the same images. They can be files, folders, and the zip files
of hand-ins; nothing but the checkpoint is read from those.
"""

import argparse
import csv
import io
import itertools
import re
import textwrap
import zipfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cli, metrics, plots
from common.attacks import saliency
from common.cli import Results, UserError, one_line
from common.data import CLASS_NAMES, SPLITS, Dataset, describe, open_data, read_image, to_float
from common.metrics import SCORE_TITLES
from common.model import (
    ASSUMED_RANGE,
    COURSE_RANGE,
    MAX_FILE_SIZE,
    Checkpoint,
    Classifier,
    choose_device,
    describe_checkpoint,
    finite_logits,
    load_checkpoint,
    with_pixel_range,
)
from common.recipes import REPORT_SCORES

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

PRE_TRAINED = cli.PROJECT / "models" / "pre_trained.ckpt"
BEST = cli.PROJECT / "models" / "best.ckpt"
TITLES = SCORE_TITLES | {
    f"{kind}_{name}": f"{kind} of {name}"
    for kind in ("recall", "precision")
    for name in CLASS_NAMES
}
SMALL_CLASS = 100  # below this, one image moves the class's recall by more than 1%
ERRORS_SHOWN = 24
MODELS_SHOWN = 60  # in the figure of a ranking
IMAGES_SHOWN = 12  # in the figure of --image

# Limits for files that other people hand in.
MAX_ZIP_SIZE = 2**27  # bytes
MAX_PER_ZIP = 10  # checkpoints
SUFFIXES = (".ckpt", ".pt", ".pth")
MAX_NAME_LENGTH = 60  # in tables and figures
MAX_FILE_NAME = 40  # characters of a model's name in that of a file
UNREAD_SHOWN = 10  # names of files that are not read


# ---- one model ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where a checkpoint is: in a file, or in a member of a zip file."""

    name: str
    path: Path
    member: str = ""


@dataclass
class Evaluated:
    """A model's predictions for the images, and how good they are."""

    name: str
    metadata: dict[str, Any]
    logits: Tensor
    scores: dict[str, Any]  # as metrics.evaluate returns them
    pixel_range: tuple[float, float] | None = None  # None: it had to be assumed
    other_range: dict[str, Any] | None = None  # the scores with pixels in the other range
    rank: int = 1
    to_best: dict[str, Any] | None = None  # from metrics.compare

    @property
    def predicted(self) -> Tensor:
        """The predicted classes, int64 [N]."""
        return self.logits.argmax(dim=1)

    def table(self) -> dict[str, tuple[float, float, float]]:
        """Return each score, recall and precision as (value, low, high), in the order of TITLES."""
        scores, interval = self.scores, self.scores["interval"]
        rows = {key: (scores[key], *interval[key]) for key in SCORE_TITLES}
        for kind in ("recall", "precision"):
            rows |= {f"{kind}_{c}": (scores[kind][c], *interval[kind][c]) for c in CLASS_NAMES}
        return rows


def load(source: Source, arguments: argparse.Namespace, strict_range: bool = True) -> Checkpoint:
    """Read a checkpoint, with the model on the device; --pixel-range is for bare ones."""
    found = load_checkpoint(read_source(source), arguments.pixel_range, source.name, strict_range)
    found.model.to(choose_device(arguments.device))
    return found


def evaluate(
    name: str, loaded: Checkpoint, dataset: Dataset, arguments: argparse.Namespace
) -> Evaluated:
    """Return what one checkpoint predicts, and how good that is.

    If its pixel range had to be assumed, or with --show-mismatch, it is scored in the other, too.
    """
    logits = finite_logits(loaded.model, dataset.images, name)
    scores = metrics.evaluate(dataset.labels, logits.argmax(dim=1))
    found = Evaluated(name, loaded.metadata, logits, scores)
    if not loaded.assumed_range:
        found.pixel_range = loaded.model.pixel_range
    if arguments.show_mismatch or not found.pixel_range:
        found.other_range = evaluate_other_range(loaded.model, found, dataset)
    return found


def evaluate_other_range(model: Classifier, found: Evaluated, dataset: Dataset) -> dict[str, Any]:
    """Return the model's scores when its pixels are in the other range, compared with its own.

    Raises:
        UserError: its logits are not finite then.
    """
    low, high = other = (0.0, 1.0) if model.pixel_range == COURSE_RANGE else COURSE_RANGE
    name = f"{found.name}: with pixels in [{low:g}, {high:g}]"
    predicted = finite_logits(with_pixel_range(model, other), dataset.images, name).argmax(dim=1)
    compared = metrics.compare(dataset.labels, predicted, found.predicted)
    scores = metrics.evaluate(dataset.labels, predicted)
    return scores | {"pixel_range": other, "comparison": compared}


def evaluate_one(
    source: Source, loaded: Checkpoint, dataset: Dataset, arguments: argparse.Namespace
) -> None:
    """Evaluate one checkpoint: table, figures, predictions."""
    results = Results(arguments, describe(dataset))
    found = evaluate(source.name, loaded, dataset, arguments)
    scores, probabilities = found.scores, found.logits.softmax(dim=1)
    scores["ece"] = metrics.expected_calibration_error(probabilities, dataset.labels)
    numbers = {"checkpoint": {"file": source.name, **found.metadata}, "split": dataset.split}
    numbers |= scores | {"other_range": found.other_range}
    results.save_json("evaluation", numbers)
    results.save_text("predictions.csv", metrics.format_predictions(dataset.labels, found.logits))
    results.save_figure("confusion", draw_confusion(found))
    results.save_figure("errors", draw_errors(dataset, probabilities))
    results.save_figure("calibration", draw_calibration(dataset, probabilities, scores["ece"]))

    cli.say(f"{source.name}, {describe_checkpoint(found.metadata)}")
    cli.say(f"on {dataset.name}, {dataset.split}: {len(dataset)} images\n")
    as_in_the_report = source.path.resolve() == PRE_TRAINED and dataset.split == "dev"
    print_scores(found, REPORT_SCORES["pre_trained"] if as_in_the_report else {})
    print_remarks(found, dataset)
    results.print_written()


def print_scores(found: Evaluated, report: dict[str, float]) -> None:
    """Print the scores with their intervals, next to the report's if given."""
    rows = []
    for key, (value, *ends) in found.table().items():
        theirs = [f"{report[key]:.2f}" if key in report else ""] if report else []
        rows.append([TITLES[key], *theirs, f"{value:.3f}", _format_interval(ends)])
    columns = ["report", "ours"] if report else ["score"]
    cli.print_table(["", *columns, "95% interval"], rows)


def _format_interval(ends: Sequence[float], sign: str = "") -> str:
    return f"[{ends[0]:{sign}z.3f}, {ends[1]:{sign}z.3f}]"


def print_remarks(found: Evaluated, dataset: Dataset) -> None:
    """Print what a reader of the scores should know: calibration, small classes, pixel range."""
    confidence = found.logits.softmax(dim=1).amax(dim=1).mean()
    cli.say(
        f"\nMean confidence {confidence:.3f}, accuracy {found.scores['accuracy']:.3f}; "
        f"expected calibration error {found.scores['ece']:.3f}."
    )
    for name, count in zip(CLASS_NAMES, dataset.class_counts, strict=True):
        if count < SMALL_CLASS:
            points = f"{100 / count:.1f} percentage points"
            cli.say(f"Only {count} images of {name}: one changes the recall by {points}.")
    if found.other_range:
        cli.say(describe_pixel_range(found))


def describe_pixel_range(found: Evaluated) -> str:
    """Say what the other pixel range changes, and which one to use if its own was assumed."""
    own, other = found.scores, found.other_range
    if found.pixel_range:
        ranges = (other["pixel_range"], found.pixel_range)
        wrong, right = (f"[{low:g}, {high:g}]" for low, high in ranges)
        return (
            f"With pixels in {wrong} instead of {right}, the range it was trained on, {found.name} "
            f"has a G-mean of {other['g_mean']:.3f} instead of {own['g_mean']:.3f}: "
            f"{other['comparison']['text']}."
        )
    low, high = other["comparison"]["interval"]
    if low > 0:
        verdict = "is better: use --pixel-range 0,1"
    else:
        verdict = "is worse" if high < 0 else "makes no clear difference"
    return (
        f"{found.name} does not state its pixel range. Assumed: [-1, 1], as in the course, with "
        f"G-mean {own['g_mean']:.3f} and accuracy {own['accuracy']:.3f}. With [0, 1], they are "
        f"{other['g_mean']:.3f} and {other['accuracy']:.3f}, which {verdict}."
    )


def draw_confusion(found: Evaluated) -> Figure:
    """Return the confusion matrix: counts, colored by the fraction of the true class."""
    scores, confusion = found.scores, np.array(found.scores["confusion"])
    fractions = confusion / confusion.sum(axis=1, keepdims=True)
    figure, (ax,) = plots.new_figure(width=5, height=4.7)
    ax.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    for (row, column), fraction in np.ndenumerate(fractions):
        text = f"{confusion[row, column]}\n{fraction:.0%}"
        ax.text(column, row, text, ha="center", va="center", color="w" if fraction > 0.5 else "k")
    ax.set_xticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    ax.set_yticks(range(len(CLASS_NAMES)), CLASS_NAMES)
    ax.set(xlabel="predicted class", ylabel="true class")
    title = f"{found.name}\nG-mean {scores['g_mean']:.3f}, accuracy {scores['accuracy']:.3f}"
    ax.set_title(plots.literal(title), fontsize=10)
    return figure


def draw_errors(dataset: Dataset, probabilities: Tensor) -> Figure:
    """Return a grid of misclassified images, the most confident errors first."""
    confidence, predicted = probabilities.max(dim=1)
    wrong = torch.nonzero(predicted != dataset.labels).flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:ERRORS_SHOWN]
    captions = [
        f"{CLASS_NAMES[dataset.labels[i]]} -> {CLASS_NAMES[predicted[i]]}\n{confidence[i]:.0%}"
        for i in worst
    ]
    title = f"The {len(worst)} most confident of {len(wrong)} errors"
    title += " (label -> prediction, confidence)"
    return plots.image_grid(title, dataset.images[worst], captions)


def draw_calibration(dataset: Dataset, probabilities: Tensor, ece: float) -> Figure:
    """Return a reliability diagram: accuracy by confidence."""
    table = metrics.reliability(probabilities, dataset.labels)
    x, y, counts = (table[key][table["count"] > 0] for key in ("confidence", "accuracy", "count"))
    ends = [metrics.jeffreys_interval(round(a * n), n) for a, n in zip(y, counts, strict=True)]
    figure, (ax,) = plots.new_figure(width=5.2, height=5)
    ax.plot([0, 1], [0, 1], "--", color="0.5", label="perfectly calibrated")
    settings = {"fmt": "o", "color": plots.PALETTE[0], "capsize": 3}
    ax.errorbar(x, y, np.abs(np.transpose(ends) - y), label="this model, 95% interval", **settings)
    for *point, count in zip(x, y, counts, strict=True):
        ax.annotate(f"{count}", point, (-5, 5), textcoords="offset points", fontsize=8, ha="right")
    ax.set(xlim=(0.3, 1.02), ylim=(-0.05, 1.05))
    ax.set(xlabel="confidence (highest probability)", ylabel="fraction classified correctly")
    title = f"Expected calibration error {ece:.3f}\n(numbers: images in each bin)"
    ax.set_title(title, fontsize=10)
    ax.legend(loc="lower right", fontsize=9)
    ax.grid(alpha=0.3)
    return figure


# ---- several models -------------------------------------------------------------------------


def rank_all(sources: list[Source], dataset: Dataset, arguments: argparse.Namespace) -> None:
    """Rank checkpoints on the same images; those that can't be evaluated are listed below them."""
    results = Results(arguments, describe(dataset))
    models, failed = [], []
    for source in tqdm(sources, "evaluating", disable=None, leave=False):
        try:
            loaded = load(source, arguments, strict_range=False)
            models.append(evaluate(source.name, loaded, dataset, arguments))
        except UserError as error:
            reason = str(error).removeprefix(f"{source.name}: ").removeprefix(f"{source.path}: ")
            failed.append((source.name, one_line(reason)))
    if not models:
        name, reason = failed[0]
        raise UserError(f"--checkpoint: none of {len(sources)} can be evaluated; {name}: {reason}")
    models = rank(models, dataset, arguments.rank_by)
    save_ranking(results, models, failed, dataset, arguments.rank_by)

    cli.say(f"{len(models)} models on {dataset.name}, {dataset.split}: {len(dataset)} images\n")
    print_ranking(models, failed, arguments.rank_by)
    for text in [*describe_ties(models), "", *describe_metrics(models, dataset, arguments.rank_by)]:
        cli.say(textwrap.fill(text, 98, subsequent_indent="  ", break_on_hyphens=False))
    results.print_written()


def rank(models: list[Evaluated], dataset: Dataset, rank_by: str) -> list[Evaluated]:
    """Return the models from best to worst, each compared with the best; ties share a rank.

    The best of many models owes its rank to luck, too. So the intervals are wider, the more models
    there are (Bonferroni): the probability that the truly best model is called worse is at most 5%.
    Only one side of each interval matters here, which halves the correction.
    """
    models = sorted(models, key=lambda model: _rounded(model, rank_by), reverse=True)
    values, best = [_rounded(model, rank_by) for model in models], models[0].predicted
    different = {model.predicted.numpy().tobytes() for model in models}
    for model, value in zip(models, values, strict=True):
        model.rank = 1 + values.index(value)
        model.to_best = metrics.compare(
            dataset.labels, model.predicted, best, rank_by, max(1, (len(different) - 1) / 2)
        )
    return models


def _rounded(model: Evaluated, score: str) -> float:
    return round(model.scores[score], 12)  # rounding errors are no difference


def _is_tied(model: Evaluated) -> bool:
    low, high = model.to_best["interval"]
    return low <= 0 <= high


def save_ranking(
    results: Results,
    models: list[Evaluated],
    failed: list[tuple[str, str]],
    dataset: Dataset,
    rank_by: str,
) -> None:
    """Write ranking.json, ranking.csv for grading, the figure, and each model's predictions."""
    files = name_predictions(models)
    entries = [
        {
            "name": model.name,
            "predictions": file,
            "rank": model.rank,
            **model.scores,
            "to_best": model.to_best,
            "other_range": model.other_range,
            "checkpoint": model.metadata,
        }
        for model, file in zip(models, files, strict=True)
    ]
    numbers = {"rank_by": rank_by, "split": dataset.split}
    numbers |= {"models": entries, "not_evaluated": dict(failed)}
    results.save_json("ranking", numbers)
    results.save_text("ranking.csv", format_ranking(models, failed, rank_by))
    results.save_figure("ranking", draw_ranking(models[:MODELS_SHOWN], rank_by))
    for model, file in zip(models, files, strict=True):
        results.save_text(file, metrics.format_predictions(dataset.labels, model.logits))


def name_predictions(models: list[Evaluated]) -> list[str]:
    """Return a name for the file of each model's predictions; equal ones are numbered."""
    files: dict[str, str] = {}
    for model in models:
        name = re.sub(r"[^\w.-]+", "_", model.name.removesuffix(".ckpt"))[:MAX_FILE_NAME]
        free = next(each for each in cli.numbered(name) if each.casefold() not in files)
        files[free.casefold()] = f"ranking-predictions-{free}.csv"
    return list(files.values())


def format_ranking(models: list[Evaluated], failed: list[tuple[str, str]], rank_by: str) -> str:
    """Return the ranking as a table (CSV): all scores with their intervals.

    `to_best` is the difference from the best model in the score that is ranked by.
    """
    rows = []
    for model in models:
        row = {"name": _cell(model.name), "rank": model.rank}
        best = (model.to_best["difference"], *model.to_best["interval"])
        for key, (value, low, high) in (model.table() | {"to_best": best}).items():
            row[key] = f"{value:.4f}"
            row |= {f"{key}_low": f"{low:.4f}", f"{key}_high": f"{high:.4f}"}
        row |= {"ranked_by": rank_by, "tied_with_best": "yes" if _is_tied(model) else "no"}
        other = model.other_range
        row["g_mean_in_other_range"] = f"{other['g_mean']:.4f}" if other else ""
        rows.append(row)
    file = io.StringIO()
    writer = csv.DictWriter(file, [*rows[0], "not_evaluated"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    writer.writerows({"name": _cell(name), "not_evaluated": reason} for name, reason in failed)
    return file.getvalue()


def _cell(name: str) -> str:
    return f"'{name}" if name.startswith(("=", "+", "-", "@")) else name  # formulas in spreadsheets


def print_ranking(models: list[Evaluated], failed: list[tuple[str, str]], rank_by: str) -> None:
    """Print a line for each model; the CSV file and the figure have the other intervals."""
    recalls = {f"recall_{name}": name for name in CLASS_NAMES}
    others = {key: title for key, title in SCORE_TITLES.items() if key != rank_by} | recalls
    rows = []
    for model in models:
        table, best = model.table(), model.to_best
        value, *ends = table[rank_by]
        row = [_short(model.name), f"{model.rank}", f"{value:.3f} {_format_interval(ends)}"]
        row += [f"{best['difference']:+z.3f} {_format_interval(best['interval'], '+')}"]
        rows.append(row + [f"{table[key][0]:.3f}" for key in others])
    rows[0][3] = ""
    headers = ["model", "rank", SCORE_TITLES[rank_by], "difference from the best"]
    cli.print_table(headers + list(others.values()), rows)
    for name, reason in failed:
        cli.say(f"{_short(name).ljust(max(len(row[0]) for row in rows))}  not evaluated: {reason}")
    cli.say(
        "\nIn brackets: 95% intervals; those of the differences are corrected for the number of"
        "\nmodels (Bonferroni): with a probability of 95%, the truly best model is the first one or"
        "\ncannot be told apart from it. Last: recall of each class."
    )


def describe_ties(models: list[Evaluated]) -> list[str]:
    """Say which models may be as good as the best or predict the same; compare pixel ranges."""
    best, *others = models
    tied = ", ".join(_short(model.name) for model in others if _is_tied(model)) or "none"
    reason = "the interval of the paired difference contains 0"
    texts = [f"Cannot be told apart from {_short(best.name)} ({reason}): {tied}."]
    same = defaultdict(list)
    for model in models:
        same[model.predicted.numpy().tobytes()].append(_short(model.name))
    texts += [f"Same predictions: {', '.join(names)}." for names in same.values() if len(names) > 1]
    for model in models:
        other = model.other_range
        if other and (model.pixel_range or other["comparison"]["interval"][0] > 0):
            texts.append(describe_pixel_range(model))
    return texts


def describe_metrics(models: list[Evaluated], dataset: Dataset, rank_by: str) -> list[str]:
    """Say what each metric rewards, and how much the ranking depends on the metric."""
    counts = dataset.class_counts
    always = f'Always predicting "{CLASS_NAMES[int(np.argmax(counts))]}" scores'
    rewards = {
        "accuracy": f"the largest class. {always} {max(counts) / len(dataset):.3f}",
        "balanced_accuracy": "all classes alike, but one can be traded for another. "
        f"{always} {1 / len(CLASS_NAMES):.3f}",
        "g_mean": f"the weakest class: if it is never recognized, nothing else counts. {always} 0",
    }
    texts, chosen = ["Which metric for the competition?"], SCORE_TITLES[rank_by]
    for score, reward in rewards.items():
        values = [_rounded(model, score) for model in models]
        first = [m.name for m, v in zip(models, values, strict=True) if v == max(values)]
        text = f"- {SCORE_TITLES[score]} rewards {reward}. First here: {_enumerate(first, 3)}"
        if score != rank_by:
            by_rank = zip((_rounded(model, rank_by) for model in models), values, strict=True)
            pairs = [(b, w) for b, w in itertools.combinations(by_rank, 2) if b[0] > w[0]]
            reversed_ = sum(better[1] < worse[1] for better, worse in pairs)
            text += f"; pairs in the opposite order to {chosen}: {reversed_} of {len(pairs)}"
        texts.append(text + ".")
    texts.append(
        "Our answer: G-mean, since no class matters more than another and none may be given up. "
        "Ranks go by the score alone: models that can't be told apart from the best may be as good."
    )
    return texts


def draw_ranking(models: list[Evaluated], rank_by: str) -> Figure:
    """Return dots with 95% intervals: the three scores on the left, the recalls on the right."""
    figure, (left, right) = plots.new_figure(columns=2, width=10, height=1.6 + 0.45 * len(models))
    recalls = [f"recall_{name}" for name in CLASS_NAMES]
    tables, y = [model.table() for model in models], np.arange(len(models))
    panels = ((left, SCORE_TITLES, plots.PALETTE[3:]), (right, recalls, plots.CLASS_COLORS))
    for ax, keys, colors in panels:
        offsets = np.linspace(-0.2, 0.2, len(keys))
        for key, offset, color, marker in zip(keys, offsets, colors, plots.MARKERS, strict=False):
            x, low, high = np.array([table[key] for table in tables]).T
            style = {"fmt": marker, "color": color, "markersize": 5, "capsize": 2}
            ax.errorbar(x, y + offset, xerr=(x - low, high - x), label=TITLES[key], **style)
        for place in y[[_is_tied(model) for model in models]]:
            ax.axhspan(place - 0.5, place + 0.5, color="0.93", lw=0)
        ax.set(xlim=(-0.02, 1.02), ylim=(len(models) - 0.5, -0.5), xlabel="score, 95% interval")
        ax.set_yticks(y, [""] * len(models))
        ax.grid(axis="x", alpha=0.3)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, frameon=False)
    left.set_yticks(y, [plots.literal(f"{model.rank}. {_short(model.name)}") for model in models])
    title = f"Ranked by {SCORE_TITLES[rank_by]}; shaded: cannot be told apart from the best"
    figure.suptitle(title, fontsize=10)
    return figure


# ---- your own images ------------------------------------------------------------------------


def classify_files(arguments: argparse.Namespace) -> None:
    """Classify image files of any size; show the model's input and a saliency map."""
    source, *others = find_sources(arguments.checkpoint or [BEST])
    if others:
        raise UserError("--image: goes with one checkpoint only")
    loaded = load(source, arguments)
    if loaded.assumed_range:
        cli.say(ASSUMED_RANGE)
    names, images = read_images(arguments.image)
    probabilities = finite_logits(loaded.model, images, source.name).softmax(dim=1)
    predicted = probabilities.argmax(dim=1)
    shown = slice(IMAGES_SHOWN)
    maps = saliency(loaded.model, to_float(images[shown]), predicted[shown])

    fingerprint = Dataset("images", "files", images, predicted).fingerprint
    data = {"name": "images", "splits": {"files": {"fingerprint": fingerprint}}}
    results = Results(arguments, data)
    found = [
        {"file": name, "predicted": CLASS_NAMES[y], **dict(zip(CLASS_NAMES, p, strict=True))}
        for name, y, p in zip(names, predicted, probabilities.tolist(), strict=True)
    ]
    results.save_json("images", {"checkpoint": source.name, "images": found})
    results.save_figure("images", draw_images(found[shown], images[shown], maps))
    cli.say(f"{source.name} predicts:\n")
    rows = [
        [each["file"], each["predicted"], *(f"{each[name]:.3f}" for name in CLASS_NAMES)]
        for each in found
    ]
    cli.print_table(["file", "predicted", *CLASS_NAMES], rows)
    cli.say("\nIt knows no other classes: even a dog is classified as a car, a truck or a cat.")
    results.print_written()


def read_images(paths: Sequence[Path]) -> tuple[list[str], Tensor]:
    """Return the names and the images, uint8 [N, 3, 32, 32], of the files that can be read."""
    names, images = [], []
    for path in paths:
        try:
            images.append(read_image(path, resize=True))
            names.append(one_line(path.name))
        except UserError as error:
            cli.say(f"not classified: {one_line(error)}", error=True)
    if not images:
        raise UserError("--image: none of the files is an image that can be read")
    return names, torch.stack(images)


def draw_images(found: list[dict[str, Any]], images: Tensor, maps: Tensor) -> Figure:
    """Return a row for each file: the image at 32x32, the saliency map, the probabilities."""
    figure, axes = plots.new_figure(len(found), 3, width=7, height=2 * len(found) + 0.8)
    for row, (each, image, heat) in enumerate(zip(found, images, maps, strict=True)):
        left, middle, right = axes[3 * row : 3 * row + 3]
        plots.show_image(left, image, plots.literal(each["file"]))
        middle.imshow(heat.numpy(), cmap="magma")
        middle.set_axis_off()
        values = [each[name] for name in CLASS_NAMES]
        bars = right.barh(CLASS_NAMES, values, color=plots.CLASS_COLORS)
        right.bar_label(bars, [f"{value:.1%}" for value in values], padding=3, fontsize=8)
        right.set(xlim=(0, 1.25), xticks=[0, 0.5, 1])
        right.invert_yaxis()
    axes[0].set_title(f"what the model sees\n{axes[0].get_title()}", fontsize=8)
    axes[1].set_title("saliency map\n(each scaled to its maximum)", fontsize=8)
    axes[2].set_title("probability", fontsize=8)
    return figure


# ---- checkpoints: in files, folders and zip files -------------------------------------------


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """Return the checkpoints in files, folders and zip files; a path without any is kept as it is.

    A file in a folder is named by its path in that folder; files whose names would be the same are
    named by their full paths.
    """
    names: dict[Path, str] = {}
    for path in paths:
        inside = set(path.rglob("*")) if path.is_dir() else set()
        inside = {each for each in inside if not _is_hidden(each.relative_to(path))}
        files = sorted(file for file in inside if file.is_file())
        found = [file for file in files if file.suffix.lower() in (*SUFFIXES, ".zip")]
        default = {path: path.absolute().name}
        names |= {file: file.relative_to(path).as_posix() for file in found} or default
        nonempty = {folder for each in inside for folder in each.parents}
        _note_unread(path, sorted(inside - nonempty - set(found)))
    same_name = Counter(names.values())
    sources = []
    for file, name in names.items():
        name = name if same_name[name] == 1 else str(file)
        members = _checkpoints_in_zip(file) if file.suffix.lower() == ".zip" else [""]
        for member in members:
            full_name = name if len(members) == 1 else f"{name}: {member}"
            sources.append(Source(one_line(full_name), file, member))
    return sources


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _note_unread(folder: Path, unread: list[Path]) -> None:
    """Name the files in a folder that are not read, and its empty folders."""
    if unread:
        names = [one_line(each.relative_to(folder)) for each in unread]
        text = _enumerate(names, UNREAD_SHOWN)
        cli.say(f"note: skipped, neither a checkpoint nor a zip file: {text}", error=True)


def _enumerate(names: Sequence[str], shown: int) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _short(name: str) -> str:
    """Return a name that fits into a table: of a long one, the start and the end."""
    half = MAX_NAME_LENGTH // 2
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: half - 3]}...{name[-half:]}"


def _checkpoints_in_zip(path: Path) -> list[str]:
    """Return the checkpoint that report.py packed, else all; [""] for none or too many."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_ZIP_SIZE:
            return [""]
        with zipfile.ZipFile(path) as archive:
            names = dict.fromkeys(archive.namelist())
    except Exception:  # a broken or hostile file can fail in any way; read_source says so
        return [""]
    found = [n for n in names if n.lower().endswith(SUFFIXES) and n.rpartition("/")[2][0] != "."]
    found = [n for n in found if f"/{n}".endswith("/report/model.ckpt")] or found
    return found if 1 <= len(found) <= MAX_PER_ZIP else [""]


def read_source(source: Source) -> bytes:
    """Return the bytes of a checkpoint; nothing is written to disk.

    Raises:
        UserError: there is no checkpoint, or it is too large.
    """
    name, path = source.name, source.path
    if path.is_dir():
        raise UserError(f"{name}: a folder without {', '.join(SUFFIXES)} or .zip files")
    if not path.is_file():
        raise UserError(f"{name}: no such file")
    if path.suffix.lower() != ".zip":
        return cli.read_bytes(path, MAX_FILE_SIZE)
    if not source.member:
        if path.stat().st_size > MAX_ZIP_SIZE or not zipfile.is_zipfile(path):
            raise UserError(f"{name}: broken, too large, or not a zip file")
        raise UserError(f"{name}: holds no checkpoint, or more than {MAX_PER_ZIP}")
    try:
        content = _read_member(path, source.member)
    except Exception as error:  # cut short, encrypted, made to harm, ...
        raise UserError(f"{name}: not readable") from error
    if len(content) > MAX_FILE_SIZE:
        raise UserError(f"{name}: more than {MAX_FILE_SIZE // 2**20} MB, too large")
    return content


def _read_member(path: Path, member: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(member).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("a compression whose output can't be bounded while reading")
        with archive.open(member) as file:
            return file.read(MAX_FILE_SIZE + 1)


# ---- the script -----------------------------------------------------------------------------


def main() -> None:
    """Evaluate one checkpoint, rank several, or classify image files."""
    parser = cli.make_parser(__doc__)
    default = "models/pre_trained.ckpt; several, also in folders and zip files, are ranked"
    cli.add_checkpoint_option(parser, default, several=True)
    parser.add_argument("--split", choices=SPLITS, default="dev", help="the split to evaluate on")
    parser.add_argument(
        "--rank-by", choices=tuple(SCORE_TITLES), default="g_mean", help="the score to rank by"
    )
    parser.add_argument(
        "--show-mismatch",
        action="store_true",
        help="also evaluate each model of --checkpoint with pixels in the wrong range: the bug of "
        "step 3g",
    )
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="classify image files of any size instead; without --checkpoint, by models/best.ckpt",
    )
    arguments = parser.parse_args()
    if arguments.image and arguments.show_mismatch:
        parser.error("--image and --show-mismatch exclude each other")
    choose_device(arguments.device)  # so that a wrong name is reported before any work
    if arguments.image:
        classify_files(arguments)
        return
    sources = find_sources(arguments.checkpoint or [PRE_TRAINED])
    # A single one is loaded first, so that a wrong path is reported before any work.
    loaded = load(sources[0], arguments) if len(sources) == 1 else None
    dataset = open_data(arguments.data).load(arguments.split, arguments.quick)
    if loaded:
        evaluate_one(sources[0], loaded, dataset, arguments)
    else:
        rank_all(sources, dataset, arguments)


if __name__ == "__main__":
    cli.run(main)
