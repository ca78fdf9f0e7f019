"""Step 3: train the net, from the naive loop to the report's last mix of remedies.

    python training.py --recipe final
    python training.py --recipe all --seed 0,1,2
    python training.py --settings results/<data>/tuning.json
    python training.py --show-mismatch

A recipe is all the settings of a run. Each of the report's is an earlier one with little changed,
as the report went along. tuned, best, robust and robust-course go beyond it; pre_trained makes
the net that the course handed out.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix
from torch import nn
from tqdm import tqdm

from common import console, figures, machine
from common.console import UserError
from common.dataset import CLASS_NAMES, Dataset, describe, open_source
from common.label_fixes import read_fixes, with_fixes
from common.network import (
    fast_precision,
    load_checkpoint,
    load_training,
    predict_logits,
    save_checkpoint,
    with_pixel_range,
)
from common.results import Results
from common.trainer import Recipe, Trainer
from evaluation import SCORE_TITLES, add_checkpoint_options, evaluate, scores_of

NAIVE = Recipe("naive")
WEIGHT_DECAY = replace(NAIVE, name="weight-decay", weight_decay=1e-4)
STRICT_SAMPLER = replace(NAIVE, name="strict-sampler", sampler="strict")
TRANSFORMS = replace(STRICT_SAMPLER, name="transforms", plain_share=1 / 3)
STEP_LR = replace(TRANSFORMS, name="step-lr", decay_share=1 / 3)
WEIGHTED_SAMPLER = replace(STEP_LR, name="weighted-sampler", sampler="weighted")
# Rate and share were chosen on three folds of the course's training set: G-mean 0.706 on pictures
# left out, 0.695 with the settings of weighted-sampler.
FINAL = replace(
    WEIGHTED_SAMPLER, name="final", weight_decay=1e-4, learning_rate=2e-3, plain_share=1 / 6
)

REPORT_RECIPES = {
    recipe.name: recipe
    for recipe in (
        NAIVE,
        WEIGHT_DECAY,
        STRICT_SAMPLER,
        TRANSFORMS,
        STEP_LR,
        WEIGHTED_SAMPLER,
        FINAL,
    )
}
# The net that the course handed out: it has seen so little that it says "car" to everything.
PRE_TRAINED = replace(NAIVE, name="pre_trained", epochs=1, learning_rate=1e-4)
# Beyond the report. Settings were chosen on three folds of the course's training set; README.md
# shows what each ingredient gives (benchmarks/ablation.py). Batches of 256 are the fastest.
# Cats and trucks are learnt less well than cars: logits are adjusted by more than the draws need.
TUNED = replace(
    NAIVE,
    name="tuned",
    epochs=32,
    batch_size=256,
    optimizer="muon",
    learning_rate=0.01,
    weight_decay=0.1,
    schedule="one-cycle",
    sampler="weighted",
    balance=0.5,
    adjust_logits=1.2,
    plain_share=0.0,
    colour_change=0.3,
    average_flips=True,
    average_shifts=3,
)
# Judges of labels have to be fair to all classes beforehand.
JUDGE = replace(TUNED, name="judge", adjust_logits=1.0)
# A bigger net learns wrong labels by heart: hence judges of the labels. And it has room for shapes
# that 200 cats are too few to learn from: hence sketches, of which there are as many as one likes.
BEST = replace(
    TUNED,
    name="best",
    network="BestPair",
    epochs=30,
    batch_size=128,
    weight_decay=0.6,
    colour_change=0.4,
    cutout=14,
    mixup=0.2,
    sketch_epochs=6,
    judge=JUDGE,
)
# Pictures under attack are hard enough to learn: what makes them harder still is left out, and the
# small classes are favoured less. Chosen on a fold of the training set, by the G-mean with and
# without PGD.
ROBUST = replace(
    TUNED,
    name="robust",
    network="BestNet",
    epochs=28,
    batch_size=128,
    adjust_logits=1.0,
    colour_change=0.2,
    attack_epsilon=8 / 255,
    trades_beta=4.0,
    judge=JUDGE,
    average_weights=0.995,
    average_shifts=0,
)
# So small a net learns less by Muon when it is attacked: on a fold of the training set a G-mean of
# 0.77 without and 0.40 with PGD, by Adam 0.82 and 0.46.
ROBUST_COURSE = replace(
    TUNED,
    name="robust-course",
    epochs=60,
    optimizer="adam",
    learning_rate=3e-3,
    weight_decay=0.0,
    adjust_logits=0.85,
    colour_change=0.2,
    attack_epsilon=8 / 255,
    trades_beta=4.0,
    judge=JUDGE,
    average_weights=0.99,
    average_shifts=0,
)
OTHERS = (PRE_TRAINED, TUNED, BEST, ROBUST, ROBUST_COURSE)
RECIPES = REPORT_RECIPES | {recipe.name: recipe for recipe in OTHERS}

REPORT_SCORES: dict[str, dict[str, float]] = {
    "naive": {"accuracy": 0.904, "balanced_accuracy": 0.55, "g_mean": 0.47},
    "transforms": {"g_mean": 0.51},
    "final": {"accuracy": 0.824, "balanced_accuracy": 0.826, "g_mean": 0.826},
}


@dataclass
class Run:
    """What came out of training one recipe with one seed."""

    recipe: Recipe
    seed: int
    net: nn.Module
    seconds: float
    scores: dict[str, Any]
    history: list[dict[str, Any]]  # loss, seconds, scores and recalls of each epoch

    @property
    def curves(self) -> dict[str, list[Any]]:
        """The history turned round: loss, scores and recalls, a list by epoch each."""
        names = self.history[0].keys() - {"seconds"}
        return {name: [epoch[name] for epoch in self.history] for name in sorted(names)}


def train_and_evaluate(
    trainer: Trainer,
    dev: Dataset,
    history: list[dict[str, Any]] | None = None,
    after_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
) -> Run:
    """Train to the recipe's last epoch, and watch the dev set meanwhile.

    Args:
        trainer: a new one, or one that goes on from a saved state.
        history: loss, seconds and scores of each epoch that it has behind it.
        after_epoch: called with the history so far.
    """
    recipe, history = trainer.recipe, list(history or [])
    with tqdm(total=recipe.epochs, initial=trainer.epoch, desc=recipe.name, disable=None) as bar:
        while trainer.epoch < recipe.epochs:
            start = time.perf_counter()
            loss = float(np.mean(trainer.run_epoch()))
            scores = _look_at(trainer.net, dev)
            seconds = time.perf_counter() - start
            history.append({"loss": loss, "seconds": seconds} | scores)
            after_epoch(history)
            bar.update()
    seconds = sum(epoch["seconds"] for epoch in history)
    scores = evaluate(trainer.net, dev, trainer.seed)
    return Run(recipe, trainer.seed, trainer.net.cpu(), seconds, scores, history)


def _look_at(net: nn.Module, dev: Dataset) -> dict[str, Any]:
    """Return the scores on dev for a curve: fast, so of one view and in training's precision."""
    with fast_precision(next(net.parameters()).device):
        predicted = predict_logits(net, dev.pictures, one_view=True).argmax(dim=1)
    scores = scores_of(confusion_matrix(dev.labels, predicted, labels=range(len(CLASS_NAMES))))
    return {name: score.tolist() for name, score in scores.items()}


def about_run(trainer: Trainer, train: Dataset) -> dict[str, Any]:
    """Return what a checkpoint says of its training: all that its numbers follow from.

    The number of threads is part of it: others add in another order, which changes last digits,
    and after some epochs whole scores. So each run has all the cores, one after the other, and
    is the same alone and among many.
    """
    return {
        "recipe": asdict(trainer.recipe),
        "seed": trainer.seed,
        "threads": torch.get_num_threads(),
        "device": trainer.labels.device.type,
        "trained_on": {"source": train.source, **train.facts()},
    }


def train_with_checkpoints(
    trainer: Trainer, name: str, results: Results, train: Dataset, dev: Dataset, resume: bool
) -> Run:
    """Train, and save the net after each epoch, so that a run that is killed can be resumed.

    Writes `<name>.unfinished.ckpt`, a checkpoint like any other, and at the end `<name>.ckpt`.
    """
    about = about_run(trainer, train)
    unfinished = f"{name}.unfinished.ckpt"

    def save(file: str, history: list[dict[str, Any]], state: dict[str, Any]) -> None:
        training = {"history": history, "epoch": trainer.epoch} | state
        write = partial(save_checkpoint, net=trainer.net, about=about, training=training)
        results.save(file, write)

    history = go_on(trainer, about, results.folder, name) if resume else []
    run = train_and_evaluate(
        trainer, dev, history, lambda history: save(unfinished, history, trainer.state())
    )
    save(f"{name}.ckpt", run.history, {})
    results.remove(unfinished)
    return run


def go_on(trainer: Trainer, about: dict[str, Any], folder: Path, name: str) -> list[dict[str, Any]]:
    """Bring the trainer to where an earlier run got; return the history of its epochs.

    Raises:
        UserError: the unfinished run is one of other settings.
    """
    unfinished, finished = folder / f"{name}.unfinished.ckpt", folder / f"{name}.ckpt"
    for path in filter(Path.exists, (unfinished, finished)):
        net, earlier, training = load_training(path)
        other = [key for key in about if earlier.get(key) != about[key]]
        if not other and training:
            trainer.go_on_from(net.state_dict(), training)
            print(f"{name}: goes on after epoch {trainer.epoch} of {trainer.recipe.epochs}")
            return training["history"]
        if path == unfinished:
            raise UserError(
                f"{path}: is of another run, with another {' and '.join(other)}; "
                "repeat its command, or leave --resume out to start anew"
            )
    return []


def train_all(
    recipes: list[Recipe],
    seeds: list[int],
    results: Results,
    train: Dataset,
    dev: Dataset,
    device: torch.device,
    resume: bool = False,
) -> Iterator[Run]:
    """Train each recipe with each seed; yield each run, its checkpoint saved.

    The first seed's checkpoint is `<recipe>.ckpt`, others have their seed in their names.
    """
    machine.prepare_torch(joblib.cpu_count())
    for recipe in recipes:
        for seed in seeds:
            name = recipe.name if seed == seeds[0] else f"{recipe.name}-seed{seed}"
            trainer = Trainer(recipe, train, seed, device)
            yield train_with_checkpoints(trainer, name, results, train, dev, resume)


def combine(items: list[Any], function: Callable[[list[float]], float]) -> Any:
    """Combine equally nested dicts and lists of numbers, number by number."""
    if isinstance(items[0], dict):
        return {key: combine([item[key] for item in items], function) for key in items[0]}
    if isinstance(items[0], list):
        return [combine(list(parts), function) for parts in zip(*items, strict=True)]
    return float(function(items))


def summarise(runs: list[Run]) -> dict[str, Any]:
    """Return what the JSON file says of a recipe: means over the seeds, their spread, each run.

    `spread` is the standard deviation over the seeds, 0 for one. `interval` says how far another
    dev set may be off, as the mean of the runs' intervals.
    """
    scores = [run.scores for run in runs]
    return {
        **combine(scores, np.mean),
        "spread": combine(
            [{name: each[name] for name in (*SCORE_TITLES, "recall")} for each in scores],
            lambda values: np.std(values, ddof=1) if len(values) > 1 else 0.0,
        ),
        "recipe": asdict(runs[0].recipe),
        "report": REPORT_SCORES.get(runs[0].recipe.name, {}),
        "runs": [
            {"seed": run.seed, "seconds": run.seconds} | run.scores | {"curves": run.curves}
            for run in runs
        ],
    }


def print_summaries(summaries: dict[str, dict[str, Any]]) -> None:
    """Print the table "report / ours", one row a recipe."""
    rows = []
    for name, summary in summaries.items():
        row = [name]
        for score in SCORE_TITLES:
            theirs = summary["report"].get(score)
            row.append("-" if theirs is None else f"{theirs:.3f}")
            row.append(_mean_and_spread(summary, score))
        row += [f"{summary['recall'][label]:.2f}" for label in CLASS_NAMES]
        rows.append([*row, f"{np.mean([run['seconds'] for run in summary['runs']]):.0f} s"])
    titles = [text for title in SCORE_TITLES.values() for text in ("report", title)]
    console.print_table(["recipe", *titles, *CLASS_NAMES, "a run"], rows)


def _mean_and_spread(summary: dict[str, Any], score: str) -> str:
    spread = f" ±{summary['spread'][score]:.3f}" if len(summary["runs"]) > 1 else ""
    return f"{summary[score]:.3f}{spread}"


def draw_curves(summary: dict[str, Any]) -> Figure:
    """Return a figure of one recipe by epoch: loss, scores on dev, recall of each class."""
    figure, (loss_ax, score_ax, recall_ax) = figures.new_figure(1, 3, width=12, height=4)
    curves = {
        name: np.array([run["curves"][name] for run in summary["runs"]])
        for name in ("loss", "accuracy", "g_mean", "recall")
    }
    plot_runs(loss_ax, curves["loss"], "training loss", figures.PALETTE[6], "-")
    loss_ax.set_ylabel("cross-entropy, mean of the epoch")
    recipe = summary["recipe"]
    if 0 < recipe["plain_share"] < 1:
        start = recipe["plain_share"] * recipe["epochs"] + 0.5
        loss_ax.axvline(start, color="0.5", ls=":", label="flips and shifts start")
        loss_ax.legend()
    plot_runs(score_ax, curves["accuracy"], "accuracy", figures.PALETTE[3], "-")
    plot_runs(score_ax, curves["g_mean"], "G-mean", figures.PALETTE[4], "--")
    for label, name in enumerate(CLASS_NAMES):
        style = ("-", "--", ":")[label]
        plot_runs(
            recall_ax, curves["recall"][:, :, label], name, figures.CLASS_COLOURS[label], style
        )
    for ax in (score_ax, recall_ax):
        ax.set_ylim(0, 1.02)
    averages_views = recipe["average_flips"] or recipe["average_shifts"]
    one_view = ", one view a picture" if averages_views else ""  # see _look_at
    score_ax.set_ylabel(f"score on dev{one_view}")
    recall_ax.set_ylabel(f"recall on dev{one_view}")
    count = len(summary["runs"])
    seeds = f", mean and range of {count} seeds" if count > 1 else ""
    figure.suptitle(f"Recipe {summary['recipe']['name']}{seeds}")
    return figure


def plot_runs(ax: Axes, values: np.ndarray, label: str, color: str, style: str) -> Axes:
    """Draw curves by epoch, [runs, epochs]: their mean as a line, their range as a band."""
    epochs = np.arange(1, values.shape[1] + 1)
    ax.plot(epochs, values.mean(axis=0), style, color=color, label=label)
    ax.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, lw=0)
    ax.set_xlabel("epoch")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def draw_comparison(summaries: dict[str, dict[str, Any]]) -> Figure:
    """Return a figure of all recipes: our scores with their spread, and the report's."""
    figure, axes = figures.new_figure(1, 3, width=12, height=0.45 * len(summaries) + 1.8)
    places = np.arange(len(summaries))
    for ax, (score, title) in zip(axes, SCORE_TITLES.items(), strict=True):
        for place, summary in zip(places, summaries.values(), strict=True):
            ours = [run[score] for run in summary["runs"]]
            ax.plot([0, np.mean(ours)], [place, place], color="0.8", zorder=0)
            ax.plot(ours, [place] * len(ours), "o", color=figures.PALETTE[0], alpha=0.7)
            ax.plot(
                summary["report"].get(score, np.nan),
                place,
                "D",
                color=figures.PALETTE[3],
                mfc="none",
            )
        ax.set_title(title)
        ax.set_xlim(0, 1)
        ax.set_yticks(places, summaries if ax is axes[0] else [])
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.3)
    axes[0].plot([], [], "o", color=figures.PALETTE[0], label="ours, each seed")
    axes[0].plot([], [], "D", color=figures.PALETTE[3], mfc="none", label="the report's")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    return figure


def show_mismatch(net: nn.Module, dev: Dataset, seed: int) -> dict[str, Any]:
    """Evaluate a net in its own pixel range and in the other one: the bug of step 3g.

    Returns:
        the scores under `right_range` and `wrong_range`.
    """
    own = (net.pixel_range.low, net.pixel_range.high)
    other = (0.0, 1.0) if own == (-1.0, 1.0) else (-1.0, 1.0)
    scores = {
        "right_range": evaluate(net, dev, seed),
        "wrong_range": evaluate(with_pixel_range(net, other), dev, seed),
    }
    rows = [
        [f"pixels in [{low:g}, {high:g}]", which.replace("_", " ")]
        + [f"{scores[which][score]:.3f}" for score in SCORE_TITLES]
        for which, (low, high) in zip(scores, (own, other), strict=True)
    ]
    console.print_table(["the same net, fed", "", *SCORE_TITLES.values()], rows)
    return scores


def with_epochs(recipe: Recipe, epochs: int | None, quick: bool) -> Recipe:
    """Return the recipe with as many epochs as asked for; without that, its own, or 2 if quick."""
    judge = with_epochs(recipe.judge, None, quick) if recipe.judge else None
    return replace(recipe, epochs=epochs or (2 if quick else recipe.epochs), judge=judge)


def load_or_train(
    arguments: argparse.Namespace,
    results: Results,
    train: Dataset | None,
    dev: Dataset,
    seed: int,
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the net that `--checkpoint` names; without it `final`, trained if it has to be.

    Returns:
        the net, on the device that `--device` names, and what its checkpoint says of it.
    """
    device = machine.choose_device(arguments.device)
    path = arguments.checkpoint or results.folder / f"{FINAL.name}.ckpt"
    if not arguments.checkpoint:
        if arguments.pixel_range:
            raise UserError("--pixel-range speaks of a checkpoint; name one by --checkpoint")
        if train is None:
            raise UserError("no training set here to train a net on; name one by --checkpoint")
        if not path.exists():
            print(f"{path}: no net of this data yet; training recipe {FINAL.name}")
            recipe = with_epochs(FINAL, None, arguments.quick)
            list(train_all([recipe], [seed], results, train, dev, device))
        elif not is_trained_on(path, train):
            other = f"{path}: is a net of other pictures or labels"
            raise UserError(f"{other}; name it by --checkpoint, or train {FINAL.name} anew")
    net, about = load_checkpoint(path, arguments.pixel_range)
    print(f"the net: {path}, {in_words(about)}\n")
    return net.to(device), {"file": path.name, **about}


def is_trained_on(path: Path, train: Dataset) -> bool:
    """Tell whether a checkpoint is of a net trained on this very set."""
    trained_on = load_checkpoint(path)[1].get("trained_on", {})
    return trained_on.get("fingerprint") == train.fingerprint


def in_words(about: dict[str, Any]) -> str:
    """Say what a checkpoint tells of its training."""
    if not {"recipe", "seed", "trained_on"} <= set(about):
        return "which says nothing of its training"
    recipe, source = about["recipe"], about["trained_on"]["source"]
    return f"recipe {recipe['name']}, {recipe['epochs']} epochs, seed {about['seed']}, on {source}"


def read_settings(path: Path, recipe: Recipe) -> Recipe:
    """Return a recipe with the best settings that a search of tuning.py has found.

    Raises:
        UserError: no such file, or no results of a search.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["best"]["settings"]
        types = {name: type(getattr(recipe, name)) for name in settings}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: holds no settings that tuning.py has found") from error
    for name, value in settings.items():
        if types[name] not in (int, float) or not isinstance(value, types[name]):
            raise UserError(f"{path}: {name} is {value!r}, which it can't be")
    return replace(recipe, name="found", **settings)


def mend_labels(train: Dataset, path: Path) -> Dataset:
    """Return the training set with the labels that a file of label_errors.py has accepted."""
    mended = with_fixes(train, read_fixes(path, train))
    for name, count in zip(CLASS_NAMES, mended.class_counts, strict=True):
        if count == 0:
            raise UserError(f"{path}: leaves no {name} to learn from")
    return mended


def train_recipes(
    recipes: list[Recipe],
    seeds: list[int],
    results: Results,
    train: Dataset,
    dev: Dataset,
    device: torch.device,
    resume: bool,
) -> None:
    """Train recipes and write, draw and print all that came out."""
    try:
        runs = list(train_all(recipes, seeds, results, train, dev, device, resume))
    except KeyboardInterrupt:
        print("\nthe same command with --resume goes on where this one stops", file=sys.stderr)
        raise
    summaries = {}
    for recipe in recipes:
        summaries[recipe.name] = summarise([run for run in runs if run.recipe == recipe])
        results.save_figure(f"training-{recipe.name}", draw_curves(summaries[recipe.name]))
    if len(recipes) > 1:
        results.save_figure("training-recipes", draw_comparison(summaries))
    results.save_json("training", {"recipes": summaries})
    print_summaries(summaries)


def choose_recipes(arguments: argparse.Namespace) -> list[Recipe]:
    """Return the recipes that the options ask for."""
    if arguments.settings:
        return [read_settings(arguments.settings, TUNED)]
    if arguments.recipe == "all":
        return [*REPORT_RECIPES.values(), TUNED]
    return [RECIPES[arguments.recipe or FINAL.name]]


def main() -> None:
    """Train recipes and compare them with the report's."""
    parser = console.make_parser(__doc__, several_seeds=True)
    parser.add_argument(
        "--recipe",
        choices=[*RECIPES, "all"],
        help="what to train; all: the report's and tuned; without it, final",
    )
    parser.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="train the recipe `found`: tuned, with the settings that tuning.py has found",
    )
    parser.add_argument(
        "--epochs",
        type=console.positive_whole_number,
        help="how many, in place of the recipe's own; its judges and sketches keep theirs",
    )
    parser.add_argument(
        "--label-fixes",
        type=Path,
        metavar="FILE",
        help="train with the labels that this file of label_errors.py has accepted",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with runs that were stopped; give the same options as before",
    )
    parser.add_argument(
        "--show-mismatch",
        action="store_true",
        help="evaluate one net in the right and in the wrong pixel range, instead of training",
    )
    add_checkpoint_options(parser, "the net of final (for --show-mismatch only)")
    arguments = parser.parse_args()
    training_options = ("recipe", "settings", "epochs", "label_fixes", "resume")
    if arguments.show_mismatch and any(getattr(arguments, name) for name in training_options):
        parser.error("--show-mismatch trains nothing; leave --recipe and its like out")
    if arguments.recipe and arguments.settings:
        parser.error("--settings is a recipe of its own; leave --recipe out")
    if (arguments.checkpoint or arguments.pixel_range) and not arguments.show_mismatch:
        parser.error("--checkpoint and --pixel-range go with --show-mismatch")
    chosen = choose_recipes(arguments)
    device = machine.choose_device(arguments.device)
    source = open_source(arguments.data, arguments.data_seed)
    dev = source.load("dev", arguments.quick)
    train = None if arguments.checkpoint else source.load("train", arguments.quick)
    if arguments.label_fixes:
        train = mend_labels(train, arguments.label_fixes)
    results = Results(arguments, describe(train, dev))
    if arguments.show_mismatch:
        net, about = load_or_train(arguments, results, train, dev, arguments.seed[0])
        scores = show_mismatch(net, dev, arguments.seed[0])
        results.save_json("mismatch", {"checkpoint": about, **scores})
    else:
        recipes = [with_epochs(each, arguments.epochs, arguments.quick) for each in chosen]
        train_recipes(recipes, arguments.seed, results, train, dev, device, arguments.resume)
    results.print_written()


if __name__ == "__main__":
    console.run(main)
