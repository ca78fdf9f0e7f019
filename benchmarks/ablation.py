"""What does each ingredient of a recipe contribute? Leave out one at a time, on folds of train.

    python benchmarks/ablation.py --recipe tuned --labels results/<data>/label_corrections.csv
    python benchmarks/ablation.py --recipe best --set epochs=20 --set cutout=8 --runs 10
    python benchmarks/ablation.py --recipe weighted-sampler --set sampling_exponent=0.5

Each variant is trained ten times, on two thirds of the training set each, and scored by its
G-mean on the remaining third; dev is not used. Near-duplicates are always on the same side.
With --labels, images whose label is flagged are trained on but not scored. All variants share the
same folds and seeds, so their differences are paired. An ingredient that contributes less than
twice its standard error has not earned its place.
"""

import ast
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli, metrics
from common.cli import UserError
from common.data import Dataset, open_data, read_corrections
from common.model import choose_device
from common.recipes import RECIPES, Recipe, with_epochs
from common.train import filter_labels, make_folds, parallel_map, train_and_predict

import numpy as np
import torch
from torch import Tensor

FOLDS = 3
WITHOUT = {
    "tuned": {
        "Muon (Adam instead)": {"optimizer": "adam", "learning_rate": 3e-3},
        "random flips and crops": {"augment_from": None},
        "warmup and cosine decay": {"schedule": "constant"},
        "square-root sampling": {"sampler": "shuffle"},
        "logit adjustment": {"logit_adjustment": 0.0},
        "color jitter": {"color_jitter": 0.0},
        "flipped views at test time": {"tta_flip": False},
        "shifted views at test time": {"tta_shift": 0},
    },
    "best": {
        "label filter": {"label_filter": None},
        "cutout": {"cutout": 0},
        "color jitter": {"color_jitter": 0.0},
        "mixup": {"mixup": 0.0},
        "weight decay": {"weight_decay": 0.0},
        "SmallVGG (CourseNet instead)": {"network": "CourseNet"},
    },
    "robust": {
        "label filter": {"label_filter": None},
        "EMA of the weights": {"ema_decay": 0.0},
        "color jitter": {"color_jitter": 0.0},
        "weight decay": {"weight_decay": 0.0},
        "square-root sampling": {"sampler": "shuffle"},
    },
}

two_or_more = partial(cli.natural_number, low=2)  # one run has no standard error


def choose_folds(dataset: Dataset, flagged: Tensor, runs: int, seed: int) -> list[tuple]:
    """Return (images to train on, images to score on) for each run, int64 each."""
    rounds = range(seed, seed - (-runs // FOLDS))
    folds = [fold for each in rounds for fold in make_folds(dataset, FOLDS, each)]
    return [(inside, outside[~torch.isin(outside, flagged)]) for inside, outside in folds[:runs]]


def parse_setting(text: str) -> tuple[str, object]:
    """Parse `name=value`, a setting of the recipe."""
    name, _, value = text.partition("=")
    if name not in {field.name for field in fields(Recipe)}:
        raise UserError(f"--set {text}: {name!r} is not a setting of a recipe")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def variants_of(recipe: Recipe, settings: list[str]) -> dict[str, Recipe]:
    """Return the recipe whole, and without each ingredient, or with each --set."""
    if settings:
        changes = {text: dict([parse_setting(text)]) for text in settings}
    else:
        without = WITHOUT.get(recipe.name, {})
        changes = {f"without {name}": change for name, change in without.items()}
    recipe = replace(recipe, threads=1)  # many runs in parallel finish sooner with one thread each
    return {"all": recipe} | {name: replace(recipe, **each) for name, each in changes.items()}


def filter_of(recipe: Recipe) -> tuple[Recipe | None, bool]:
    """Return all settings that the labels after the label filter depend on."""
    return recipe.label_filter, recipe.correct_labels


def filter_parts(recipe: Recipe, parts: list[Dataset], device: torch.device) -> list[Dataset]:
    """Return the training sets of the runs after the recipe's label filter, if it has one."""
    if recipe.label_filter is None:
        return parts
    jobs = [(recipe, part, seed, device) for seed, part in enumerate(parts)]
    return list(parallel_map(filter_labels, jobs, device, "label filters"))


def main() -> None:
    """Print the table of contributions."""
    parser = cli.make_parser(__doc__, writes_files=False)
    parser.add_argument("--recipe", choices=RECIPES, default="tuned", help="whose ingredients")
    parser.add_argument("--runs", type=two_or_more, default=10, help="runs of each variant")
    parser.add_argument(
        "--epochs", type=cli.epoch_count, help="number of epochs, instead of the recipe's"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another variant to try"
    )
    cli.add_labels_option(parser, "label corrections; flagged images are not scored")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    dataset = open_data(arguments.data).load("train", arguments.quick)
    corrections = read_corrections(arguments.labels, dataset) if arguments.labels else []
    flagged = torch.tensor([correction.index for correction in corrections], dtype=torch.int64)
    variants = variants_of(
        with_epochs(RECIPES[arguments.recipe], arguments.epochs, arguments.quick), arguments.set
    )
    folds = choose_folds(dataset, flagged, arguments.runs, arguments.seed)
    parts = [dataset.subset(inside) for inside, _ in folds]
    by_filter = {filter_of(variant): variant for variant in variants.values()}
    filtered = {key: filter_parts(each, parts, device) for key, each in by_filter.items()}
    jobs, targets = [], []
    for variant in variants.values():
        runs = zip(filtered[filter_of(variant)], folds, strict=True)
        for seed, (part, (_, outside)) in enumerate(runs):
            jobs.append((variant, part, dataset.images[outside], seed, device))
            targets.append(dataset.labels[outside])
    outcomes = parallel_map(train_and_predict, jobs, device, "runs")
    scores = [
        metrics.evaluate(labels, logits.argmax(dim=1))["g_mean"]
        for labels, logits in zip(targets, outcomes, strict=True)
    ]
    print_scores(dataset.name, variants, np.reshape(scores, (len(variants), -1)))


def print_scores(data: str, variants: dict[str, Recipe], scores: np.ndarray) -> None:
    """Print G-means [variants, runs], and how much each variant loses against the whole recipe."""
    rows = []
    for name, row in zip(variants, scores, strict=True):
        gain = scores[0] - row
        error = gain.std(ddof=1) / len(gain) ** 0.5
        contribution = "" if name == "all" else f"{gain.mean():+.3f} ± {error:.3f}"
        rows.append([name, f"{row.mean():.3f} ± {row.std(ddof=1):.3f}", contribution])
    recipe = variants["all"]
    counts = f"epochs: {recipe.epochs}; runs of each variant: {scores.shape[1]}"
    cli.say(f"recipe {recipe.name} on {data}; {counts}")
    cli.print_table(["", "G-mean, mean ± sd", "contribution ± standard error"], rows)


if __name__ == "__main__":
    cli.run(main)
