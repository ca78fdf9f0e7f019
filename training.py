"""Step 3: train the net, from the naive loop to the report's last mix of remedies.

    python training.py --recipe final
    python training.py --recipe all --seed 0,1,2
    python training.py --show-mismatch

A recipe is all the settings of a run. Each one below is an earlier one with little changed, as
the report went along, so that REPORT_RECIPES reads as its story.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from tqdm import tqdm

from common import console, figures, machine
from common.console import UserError
from common.dataset import CLASS_NAMES, Dataset, as_input, describe, open_source
from common.network import (
    build_network,
    fast_precision,
    load_checkpoint,
    predict_logits,
    save_checkpoint,
    with_pixel_range,
)
from common.results import Results
from evaluation import SCORE_TITLES, add_checkpoint_options, evaluate, scores_of


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run. They go into its checkpoint.

    Attributes:
        name: what `--recipe` calls it.
        epochs: an epoch draws as many pictures as the set has.
        batch_size: pictures a step. The report's 4 makes an epoch 32 times as many steps.
        learning_rate: of Adam (Kingma and Ba, 2015).
        weight_decay: Adam adds this times the weights to the gradient (L2 penalty).
        sampler: how pictures are drawn: `shuffled`, `strict` or `weighted`.
        class_weights: how often each class is drawn, relative to others; of `weighted` only.
            Equal weights did best on folds of the training set.
        plain_share: share of the epochs before pictures are flipped and shifted; 1 for never.
        decay_share: the learning rate falls each time this share of the epochs is over; 1 for
            never.
        decay_factor: what it is multiplied with then.
    """

    name: str
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    sampler: str = "shuffled"
    class_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    plain_share: float = 1.0
    decay_share: float = 1.0
    decay_factor: float = 0.3


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
RECIPES = REPORT_RECIPES | {PRE_TRAINED.name: PRE_TRAINED}

REPORT_SCORES: dict[str, dict[str, float]] = {
    "naive": {"accuracy": 0.904, "balanced_accuracy": 0.55, "g_mean": 0.47},
    "transforms": {"g_mean": 0.51},
    "final": {"accuracy": 0.824, "balanced_accuracy": 0.826, "g_mean": 0.826},
}


# How pictures are drawn: each sampler yields, epoch after epoch, N indices into the set.


def shuffled(labels: Tensor) -> Iterator[Tensor]:
    """Draw each picture once an epoch, whatever its class: nearly all are cars."""
    while True:
        yield torch.randperm(len(labels))


def least_sampled(labels: Tensor) -> Iterator[Tensor]:
    """Draw always from the class that was drawn least so far; ties are broken evenly.

    That makes rounds in which each class comes once, in random order. A round that the end of
    an epoch cuts goes on in the next one, so that counts never differ by more than 1.
    """
    members = [torch.nonzero(labels == label).flatten() for label in range(len(CLASS_NAMES))]
    classes = torch.empty(0, dtype=torch.int64)
    while True:
        rounds = torch.rand(len(labels) // len(members) + 1, len(members)).argsort(dim=1)
        classes = torch.cat([classes, rounds.flatten()])
        drawn, classes = classes[: len(labels)], classes[len(labels) :]
        index = torch.empty_like(drawn)
        for label, own in enumerate(members):
            places = torch.nonzero(drawn == label).flatten()
            index[places] = own[torch.randint(len(own), (len(places),))]
        yield index


def weighted(labels: Tensor, class_weights: tuple[float, ...]) -> Iterator[Tensor]:
    """Draw each picture by chance, classes in the ratio of their weights.

    The same draws as torch's WeightedRandomSampler, without a Python list in between.
    """
    weight_of_picture = torch.tensor(class_weights, dtype=torch.float64) / torch.bincount(labels)
    while True:
        yield torch.multinomial(weight_of_picture[labels], len(labels), replacement=True)


def make_sampler(recipe: Recipe, labels: Tensor) -> Iterator[Tensor]:
    """Return the recipe's sampler for pictures with these labels."""
    if recipe.sampler == "strict":
        return least_sampled(labels)
    if recipe.sampler == "weighted":
        return weighted(labels, recipe.class_weights)
    return shuffled(labels)


def flip_and_shift(pictures: Tensor) -> Tensor:
    """Mirror half of the pictures and shift each by up to 4 pixels both ways, at random.

    What a shift uncovers is filled by reflection. All pictures of the batch are done at once:
    pixel (i, j) of a new picture is pixel (rows[i], columns[j]) of the old one.

    Args:
        pictures: [B, 3, 32, 32] of any type.
    """
    count, _, height, width = pictures.shape
    device = pictures.device
    down, right = torch.randint(-4, 5, (2, count, 1), device=device)
    rows = _reflect(torch.arange(height, device=device) + down, height)
    columns = _reflect(torch.arange(width, device=device) + right, width)
    mirrored = torch.rand(count, 1, device=device) < 0.5
    columns = torch.where(mirrored, width - 1 - columns, columns)
    picture = torch.arange(count, device=device)[:, None, None]
    return pictures[picture, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Fold indices that stick out of 0..size-1 back inside: -1 to 1, size to size - 2."""
    return size - 1 - (size - 1 - index.abs()).abs()


def train_step(
    net: nn.Module, optimizer: torch.optim.Optimizer, pictures: Tensor, labels: Tensor
) -> float:
    """Take one step on a batch (uint8 [B, 3, 32, 32], int64 [B]); return the loss before it."""
    with fast_precision(pictures.device):
        logits = net(as_input(pictures))
    loss = F.cross_entropy(logits.float(), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def make_optimizer(net: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer; fused, as one step for all weights is the fastest."""
    return torch.optim.Adam(
        net.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )


def fit(
    recipe: Recipe,
    train: Dataset,
    seed: int,
    device: torch.device,
    after_epoch: Callable[[nn.Module, list[float]], None] = lambda net, losses: None,
) -> nn.Module:
    """Train a new net.

    The whole set lies in the device's memory and a batch is an index into it: no Python runs
    for single pictures.

    Args:
        after_epoch: called with the net and the losses of the epoch's steps.

    Returns:
        the net of the last epoch, in evaluation mode. No epoch is chosen by its dev score:
        that would make the score too good to be true.
    """
    torch.manual_seed(seed)
    net = build_network().to(device).train()
    optimizer = make_optimizer(net, recipe)
    scheduler = StepLR(
        optimizer, max(1, round(recipe.decay_share * recipe.epochs)), recipe.decay_factor
    )
    sampler = make_sampler(recipe, train.labels)
    pictures, labels = train.pictures.to(device), train.labels.to(device)
    for epoch in range(recipe.epochs):
        losses = []
        for index in next(sampler).to(device).split(recipe.batch_size):
            batch = pictures.index_select(0, index)
            if epoch >= recipe.plain_share * recipe.epochs:
                batch = flip_and_shift(batch)
            losses.append(train_step(net, optimizer, batch, labels[index]))
        scheduler.step()
        after_epoch(net, losses)
    return net.eval()


@dataclass
class Run:
    """What came out of training one recipe with one seed."""

    recipe: Recipe
    seed: int
    threads: int  # other numbers of threads add in other orders, and give other last digits
    net: nn.Module
    seconds: float
    scores: dict[str, Any]
    curves: dict[str, list[Any]]  # loss, scores and recalls by epoch


def train_and_evaluate(
    recipe: Recipe,
    seed: int,
    train: Dataset,
    dev: Dataset,
    device: torch.device,
    show_progress: bool,
) -> Run:
    """Train one recipe with one seed, and watch the dev set meanwhile."""
    history = []
    bar = tqdm(total=recipe.epochs, desc=recipe.name, disable=None if show_progress else True)

    def after_epoch(net: nn.Module, losses: list[float]) -> None:
        predicted = predict_logits(net, dev.pictures).argmax(dim=1)
        scores = scores_of(confusion_matrix(dev.labels, predicted))
        history.append({"loss": np.mean(losses)} | scores)
        bar.update()

    start = time.perf_counter()
    with bar:
        net = fit(recipe, train, seed, device, after_epoch)
    seconds = time.perf_counter() - start
    curves = {name: [epoch[name].tolist() for epoch in history] for name in history[0]}
    scores = evaluate(net, dev, seed)
    return Run(recipe, seed, torch.get_num_threads(), net.cpu(), seconds, scores, curves)


def train_all(
    recipes: list[Recipe], seeds: list[int], train: Dataset, dev: Dataset, device: torch.device
) -> Iterator[Run]:
    """Train each recipe with each seed, side by side where cores allow; yield each run."""
    jobs = [(recipe, seed, train, dev, device) for recipe in recipes for seed in seeds]
    alone = len(jobs) == 1
    return machine.side_by_side(
        train_and_evaluate, [(*job, alone) for job in jobs], device, "training runs"
    )


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
            {"seed": run.seed, "threads": run.threads, "seconds": run.seconds}
            | run.scores
            | {"curves": run.curves}
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
    if recipe["plain_share"] < 1:
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
    score_ax.set_ylabel("score on dev")
    recall_ax.set_ylabel("recall on dev")
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


def save_run(results: Results, run: Run, first_seed: int, train: Dataset) -> None:
    """Write a run's checkpoint; the first seed's is `<recipe>.ckpt`."""
    about = {
        "recipe": asdict(run.recipe),
        "seed": run.seed,
        "threads": run.threads,
        "trained_on": {"source": train.source, **train.facts()},
    }
    name = run.recipe.name if run.seed == first_seed else f"{run.recipe.name}-seed{run.seed}"
    results.save(f"{name}.ckpt", partial(save_checkpoint, net=run.net, about=about))


def with_epochs(recipe: Recipe, epochs: int | None, quick: bool) -> Recipe:
    """Return the recipe with as many epochs as asked for; without that, its own, or 2 if quick."""
    return replace(recipe, epochs=epochs or (2 if quick else recipe.epochs))


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
        if not _is_trained_on(path, train):
            print(f"{path}: no net of this data yet; training recipe {FINAL.name}")
            recipe = with_epochs(FINAL, None, arguments.quick)
            for run in train_all([recipe], [seed], train, dev, device):
                save_run(results, run, seed, train)
    net, about = load_checkpoint(path, arguments.pixel_range)
    print(f"the net: {path}, {_in_words(about)}\n")
    return net.to(device), {"file": path.name, **about}


def _is_trained_on(path: Path, train: Dataset) -> bool:
    if not path.exists():
        return False
    trained_on = load_checkpoint(path)[1].get("trained_on", {})
    return trained_on.get("fingerprint") == train.fingerprint


def _in_words(about: dict[str, Any]) -> str:
    """Say what a checkpoint tells of its training."""
    if not {"recipe", "seed", "trained_on"} <= set(about):
        return "which says nothing of its training"
    recipe, source = about["recipe"], about["trained_on"]["source"]
    return f"recipe {recipe['name']}, {recipe['epochs']} epochs, seed {about['seed']}, on {source}"


def train_recipes(
    recipes: list[Recipe],
    seeds: list[int],
    results: Results,
    train: Dataset,
    dev: Dataset,
    device: torch.device,
) -> None:
    """Train recipes and write, draw and print all that came out; nets as soon as they are done."""
    runs = []
    for run in train_all(recipes, seeds, train, dev, device):
        save_run(results, run, seeds[0], train)
        runs.append(run)
    summaries = {}
    for recipe in recipes:
        summaries[recipe.name] = summarise([run for run in runs if run.recipe == recipe])
        results.save_figure(f"training-{recipe.name}", draw_curves(summaries[recipe.name]))
    if len(recipes) > 1:
        results.save_figure("training-recipes", draw_comparison(summaries))
    results.save_json("training", {"recipes": summaries})
    print_summaries(summaries)


def main() -> None:
    """Train recipes and compare them with the report's."""
    parser = console.make_parser(__doc__, several_seeds=True)
    parser.add_argument(
        "--recipe", choices=[*RECIPES, "all"], help="what to train; without it, final"
    )
    parser.add_argument(
        "--epochs", type=console.positive_whole_number, help="how many, not the recipe's own"
    )
    parser.add_argument(
        "--show-mismatch",
        action="store_true",
        help="evaluate one net in the right and in the wrong pixel range, instead of training",
    )
    add_checkpoint_options(parser, "the net of final (for --show-mismatch only)")
    arguments = parser.parse_args()
    if arguments.show_mismatch and (arguments.recipe or arguments.epochs):
        parser.error("--show-mismatch trains nothing; leave --recipe and --epochs out")
    if (arguments.checkpoint or arguments.pixel_range) and not arguments.show_mismatch:
        parser.error("--checkpoint and --pixel-range go with --show-mismatch")
    device = machine.choose_device(arguments.device)
    source = open_source(arguments.data, arguments.data_seed)
    dev = source.load("dev", arguments.quick)
    train = None if arguments.checkpoint else source.load("train", arguments.quick)
    results = Results(arguments, describe(train, dev))
    if arguments.show_mismatch:
        net, about = load_or_train(arguments, results, train, dev, arguments.seed[0])
        scores = show_mismatch(net, dev, arguments.seed[0])
        results.save_json("mismatch", {"checkpoint": about, **scores})
    else:
        name = arguments.recipe or FINAL.name
        chosen = list(REPORT_RECIPES.values()) if name == "all" else [RECIPES[name]]
        recipes = [with_epochs(each, arguments.epochs, arguments.quick) for each in chosen]
        train_recipes(recipes, arguments.seed, results, train, dev, device)
    results.print_written()


if __name__ == "__main__":
    console.run(main)
