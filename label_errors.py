"""Step 3c: which labels are wrong?

    python label_errors.py
    python training.py --recipe final --labels results/<data>/label_corrections.csv

Each training image is classified by models that were not trained on it. A label that is wrong with
a probability above 25% is flagged. Corrections that are probable enough are accepted; the others
are up to you: open label_review.html in a browser, look through the flagged images, and save your
decisions. They are kept in label_corrections.csv when this script runs again.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import cli, metrics, plots
from common.cli import Results
from common.data import (
    CLASS_NAMES,
    Correction,
    Dataset,
    describe,
    find_fingerprint,
    format_corrections,
    is_reviewed,
    near_duplicates,
    open_data,
    read_corrections,
    read_lines,
)
from common.model import choose_device
from common.recipes import LABEL_ERRORS, with_epochs
from common.train import cross_val_logits

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

FILE = "label_corrections.csv"
# A label is flagged for review if it is wrong with a higher probability than this.
FLAG_THRESHOLD = 0.25
# The suggested label is accepted if it is more probable than all others together.
ACCEPT_THRESHOLD = 0.5
SHEET_IMAGES = 120  # of one class, at most


def is_chance_level(logits: Tensor, labels: Tensor) -> bool:
    """Return whether the models may be no better than guessing a class."""
    interval = metrics.evaluate(labels, logits.argmax(dim=1))["interval"]["balanced_accuracy"]
    return interval[0] <= 1 / len(CLASS_NAMES)


def find_corrections(dataset: Dataset, posterior: np.ndarray) -> list[Correction]:
    """Return a correction for each flagged label, the most probably wrong first.

    Of near-duplicates with different labels, one label is probably wrong: the less probable one is
    always flagged. No class loses its last image to accepted corrections.
    """
    labels, images = dataset.labels.numpy(), np.arange(len(dataset))
    wrong_probability = 1 - posterior[images, labels]
    others = posterior.copy()
    others[images, labels] = 0
    suggested, confidence = others.argmax(axis=1), others.max(axis=1)
    accepted = ~metrics.keep_classes(confidence <= ACCEPT_THRESHOLD, labels)
    flagged = wrong_probability > FLAG_THRESHOLD
    for i, j, _ in near_duplicates(dataset.images):
        if labels[i] != labels[j]:
            flagged[i if wrong_probability[i] > wrong_probability[j] else j] = True
    columns = (images, labels, suggested, confidence, accepted)
    order = np.argsort(-wrong_probability, kind="stable")
    return [Correction(*(column[i].item() for column in columns)) for i in order if flagged[i]]


# ---- the user's decisions -------------------------------------------------------------------


def read_decisions(path: Path, dataset: Dataset) -> dict[int, Correction]:
    """Return the corrections that a person has reviewed or edited, by their index.

    A file made for other data is renamed; it gets its name back when this script runs on that data
    again.

    Raises:
        UserError: the file is broken.
    """
    if path.exists():
        found = find_fingerprint(read_lines(path, dataset)[0])
        if found and found != dataset.fingerprint:
            other = _set_aside(path, found)
            cli.rename(path, other)
            cli.say(f"{path} was made for other data: it has been renamed {other.name}")
    earlier = _set_aside(path, dataset.fingerprint)
    if earlier.exists() and not path.exists():
        cli.rename(earlier, path)
    if not path.exists():
        return {}
    corrections = read_corrections(path, dataset)
    if not is_reviewed(path, dataset, corrections):
        return {}
    return {correction.index: correction for correction in corrections}


def _set_aside(path: Path, fingerprint: str) -> Path:
    return path.with_name(f"{path.stem}-{fingerprint}.csv")


# ---- output ---------------------------------------------------------------------------------


def summarize(
    dataset: Dataset, corrections: Sequence[Correction], posterior: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Count the labels of each given class, and of all, that are flagged, accepted and wrong.

    Where the true labels are known, the flagged and the accepted ones are compared with them:
    recall is the fraction of the wrong labels that are among them, precision the fraction of them
    that are wrong.
    """
    labels = dataset.labels.numpy()
    wrong_probability = 1 - posterior[np.arange(len(labels)), labels]
    wrong = None if dataset.true_labels is None else labels != dataset.true_labels.numpy()
    chosen = {"flagged": np.zeros(len(labels), bool), "accepted": np.zeros(len(labels), bool)}
    for each in corrections:
        chosen["flagged"][each.index], chosen["accepted"][each.index] = True, each.accept
    summary = {}
    for label, name in enumerate((*CLASS_NAMES, "all")):
        own = (labels == label) | (name == "all")
        row = {"labels": own.sum(), "estimated_wrong": wrong_probability[own].sum()}
        if wrong is not None:
            row["wrong"] = (own & wrong).sum()
        for kind, mask in chosen.items():
            row[kind] = (own & mask).sum()
            if wrong is not None:
                row[f"{kind}_recall"] = _fraction(mask, own & wrong)
                row[f"{kind}_precision"] = _fraction(wrong, own & mask)
        summary[name] = {key: value.item() for key, value in row.items()}
    return summary


def _fraction(selected: np.ndarray, group: np.ndarray) -> np.ndarray:
    return selected[group].mean() if group.any() else np.array(np.nan)


def print_summary(summary: dict[str, dict[str, Any]]) -> None:
    """Print the summary as a table."""

    def to_text(key: str, value: float) -> str:
        if key.endswith(("recall", "precision")):
            return "-" if np.isnan(value) else f"{value:.0%}"
        return f"{value:.0f}"

    rows = [[name, *(to_text(*item) for item in row.items())] for name, row in summary.items()]
    titles = [key.removeprefix("flagged_").removeprefix("accepted_") for key in summary["all"]]
    cli.print_table(["given", *(title.replace("_", " ") for title in titles)], rows)


def draw_sheet(dataset: Dataset, corrections: Sequence[Correction], label: int) -> Figure:
    """Return the flagged images of a given class, each with the most probable other label."""
    flagged = [each for each in corrections if each.given == label]
    shown = flagged[:SHEET_IMAGES]
    captions = [
        f"{each.index}: {CLASS_NAMES[each.suggested]}{'' if each.accept else '?'}, "
        f"{each.confidence:.0%}"
        for each in shown
    ]
    first = f", the first {len(shown)} are shown" if len(shown) < len(flagged) else ""
    title = (
        f"{len(flagged)} of {dataset.class_counts[label]} images labeled {CLASS_NAMES[label]} are "
        f"flagged{first}. Above each image: its index, the most probable "
        "other label (? if it is not accepted), and its probability"
    )
    return plots.image_grid(title, dataset.images[[each.index for each in shown]], captions, 12)


def render_review(dataset: Dataset, corrections: Sequence[Correction]) -> str:
    """Return the page on which a person accepts or rejects, as one HTML file."""
    return cli.render(
        "label_review.html",
        name=dataset.name,
        file=FILE,
        class_names=CLASS_NAMES,
        class_counts=dataset.class_counts,
        corrections=corrections,
        accept_threshold=ACCEPT_THRESHOLD,
        pngs={each.index: _encode_png(dataset.images[each.index]) for each in corrections},
        csv=format_corrections(dataset, corrections),
    )


def _encode_png(image: Tensor) -> str:
    png = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(png, "PNG")
    return base64.b64encode(png.getvalue()).decode()


def save_corrections(
    results: Results, dataset: Dataset, corrections: Sequence[Correction], reviewed: bool
) -> None:
    """Write the table of corrections, the page to review them on, and a figure for each class."""
    results.save_text(FILE, format_corrections(dataset, corrections, reviewed))
    results.save_text("label_review.html", render_review(dataset, corrections))
    for label, name in enumerate(CLASS_NAMES):
        results.save_figure(f"label-errors-{name}", draw_sheet(dataset, corrections, label))


def main() -> None:
    """Find the labels that may be wrong."""
    arguments = cli.make_parser(__doc__).parse_args()
    device = choose_device(arguments.device)
    dataset = open_data(arguments.data).load("train", arguments.quick)
    results = Results(arguments, describe(dataset))
    earlier = results.folder / FILE
    # A broken file, and one that Excel has locked on Windows, are reported before the long work.
    read_decisions(earlier, dataset)
    if earlier.exists():
        earlier.open("ab").close()

    recipe = with_epochs(LABEL_ERRORS, None, arguments.quick)
    logits = cross_val_logits(recipe, dataset, arguments.seed, device)
    posterior = metrics.label_posterior(logits, dataset.labels)
    at_chance = is_chance_level(logits, dataset.labels)
    found = [] if at_chance else find_corrections(dataset, posterior)
    decided = read_decisions(earlier, dataset)
    corrections = list(({each.index: each for each in found} | decided).values())

    summary = summarize(dataset, corrections, posterior)
    save_corrections(results, dataset, corrections, reviewed=bool(decided))
    numbers = {
        "recipe": asdict(recipe),
        "chance_level": at_chance,
        "flagged": len(corrections),
        "accepted": sum(each.accept for each in corrections),
        "reviewed": len(decided),
        "classes": summary,
    }
    results.save_json("label_errors", numbers)
    print_summary(summary)
    if at_chance:
        cli.say("\nThe models are no better than chance: they can't tell which labels are wrong.")
    if decided:
        cli.say(
            f"\nThe {len(decided)} rows that were already in {earlier.name} are kept as they were. "
            "Delete the file to start over."
        )
    results.print_written()


if __name__ == "__main__":
    cli.run(main)
