"""Step 3i: search the settings of a recipe instead of guessing them.

    python tuning.py
    python tuning.py --trials 60 --epochs 30
    python training.py --settings results/<data>/tuning.json

The report's author found tuning by hand "very long and exhausting". Here each trial is judged by
pictures of the training set that its nets have not learnt from; dev is not looked at. The best of
many trials owes some of its score to luck. So it is judged once more, on other parts of the set,
beside the settings that the search set out from.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from common import console, figures, machine
from common.dataset import Dataset, describe, open_source
from common.label_fixes import read_fixes, with_fixes
from common.results import Results
from common.trainer import Recipe, judge_by_folds
from evaluation import evaluate_predictions
from training import TUNED, with_epochs

TRIALS = 20
EPOCHS = 16  # fewer than the recipe has: what is good early is mostly good later
CHECKS = 3  # times that the best is judged once more
ROWS_SHOWN = 5
# In steps where the last digits would not matter, or where close to 0 is not the same as 0.
SPACE: dict[str, BaseDistribution] = {
    "learning_rate": FloatDistribution(1e-3, 3e-2, log=True),
    "batch_size": CategoricalDistribution((64, 128, 256)),
    "weight_decay": FloatDistribution(0.0, 0.5, step=0.05),
    "balance": FloatDistribution(0.0, 1.0),
    "adjust_logits": FloatDistribution(0.5, 1.5),
    "colour_change": FloatDistribution(0.0, 0.5, step=0.05),
    "cutout": IntDistribution(0, 16, step=2),
    "mixup": FloatDistribution(0.0, 0.5, step=0.1),
}


def g_mean_by_folds(recipe: Recipe, train: Dataset, seed: int, device: torch.device) -> float:
    """Return the G-mean over the training set, each picture judged by a net that did not see it."""
    predicted = judge_by_folds(recipe, train, seed, device).argmax(dim=1)
    return evaluate_predictions(train.labels, predicted)["g_mean"]


def search(
    recipe: Recipe,
    trials: int,
    score: Callable[[Recipe], float],
    seed: int,
    after_trial: Callable[[optuna.Study], None] = lambda study: None,
) -> optuna.Study:
    """Try settings, the recipe's own first, then those that look promising after what was seen.

    By the tree-structured Parzen estimator (Bergstra et al., "Algorithms for hyper-parameter
    optimization", 2011), as optuna has it.

    Args:
        score: what a recipe is worth; the more, the better.
        after_trial: called with the study so far.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    study.enqueue_trial({name: getattr(recipe, name) for name in SPACE})
    for _ in tqdm(range(trials), desc="trials", disable=None):
        trial = study.ask(SPACE)
        study.tell(trial, score(replace(recipe, **trial.params)))
        after_trial(study)
    return study


def check(
    recipes: dict[str, Recipe], train: Dataset, seed: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Judge recipes with other folds, and other first weights, than those of the search.

    Returns:
        for each, `g_mean`, the mean, `spread` and `runs`.
    """
    jobs = [(name, seed + 1 + number) for name in recipes for number in range(CHECKS)]
    scores: dict[str, list[float]] = {name: [] for name in recipes}
    for name, other_seed in tqdm(jobs, desc="checks", disable=None):
        scores[name].append(g_mean_by_folds(recipes[name], train, other_seed, device))
    return {name: mean_and_spread(runs) for name, runs in scores.items()}


def mean_and_spread(runs: list[float]) -> dict[str, Any]:
    """Return what the JSON file says of several G-means, or of differences between them."""
    return {"g_mean": np.mean(runs).item(), "spread": np.std(runs, ddof=1).item(), "runs": runs}


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that have a score, in their order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def numbers_of(study: optuna.Study, recipe: Recipe) -> dict[str, Any]:
    """Return what the JSON file says of a search."""
    trials = [
        {"number": trial.number, "g_mean": trial.value, "settings": trial.params}
        for trial in finished(study)
    ]
    best = max(trials, key=lambda trial: trial["g_mean"])
    return {"recipe": asdict(recipe), "trials": trials, "best": best}


def draw_search(numbers: dict[str, Any]) -> Figure:
    """Return a figure of all trials: one after the other, and over each setting."""
    figure, axes = figures.new_figure(3, 3, width=12, height=9)
    plot_history(axes[0], [trial["g_mean"] for trial in numbers["trials"]])
    for ax, name in zip(axes[1:], SPACE, strict=True):
        plot_setting(ax, numbers, name)
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    figure.suptitle(f"{len(numbers['trials'])} trials, judged on folds of the training set")
    return figure


def plot_history(ax: Axes, scores: list[float]) -> Axes:
    """Draw the score of each trial, and the best so far."""
    places = np.arange(1, len(scores) + 1)
    ax.plot(places, scores, "o", color=figures.PALETTE[0], ms=4, label="a trial")
    best = np.maximum.accumulate(scores)
    ax.step(places, best, where="post", color=figures.PALETTE[3], label="best so far")
    ax.set_xlabel("trial")
    ax.set_ylabel("G-mean")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def plot_setting(ax: Axes, numbers: dict[str, Any], name: str) -> Axes:
    """Draw the score of each trial over the value of one setting."""
    trials, (first, *_) = numbers["trials"], numbers["trials"]
    marked = {
        "a trial": (trials, "o", figures.PALETTE[0], 4),
        "where it set out": ([first], "s", figures.PALETTE[6], 7),
        "the best": ([numbers["best"]], "D", figures.PALETTE[3], 8),
    }
    for label, (shown, marker, colour, size) in marked.items():
        values = [trial["settings"][name] for trial in shown]
        scores = [trial["g_mean"] for trial in shown]
        face = colour if size < 5 else "none"
        ax.plot(values, scores, marker, color=colour, ms=size, mfc=face, label=label)
    if getattr(SPACE[name], "log", False):
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))  # more would run into each other
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    ax.set_xlabel(name.replace("_", " "))
    ax.set_ylabel("G-mean")
    ax.grid(alpha=0.3)
    return ax


def print_trials(numbers: dict[str, Any]) -> None:
    """Print the best trials and the one that the search set out from."""
    first = numbers["trials"][0]
    ranked = sorted(numbers["trials"], key=lambda trial: -trial["g_mean"])
    shown = ranked[:ROWS_SHOWN] + ([first] if first not in ranked[:ROWS_SHOWN] else [])
    rows = [
        ["set out from" if trial is first else f"trial {trial['number'] + 1}"]
        + [f"{trial['g_mean']:.3f}", *(f"{trial['settings'][name]:.3g}" for name in SPACE)]
        for trial in shown
    ]
    console.print_table(["", "G-mean", *(name.replace("_", " ") for name in SPACE)], rows)


def print_check(checked: dict[str, dict[str, Any]]) -> None:
    """Print the second judgement, and what it says of the search."""
    titles = {"first": "set out from", "best": "the best"}
    rows = [
        [titles[name], f"{each['g_mean']:.3f} ±{each['spread']:.3f}"]
        for name, each in checked.items()
    ]
    print(f"\nJudged once more, on other folds, {CHECKS} times:")
    console.print_table(["settings", "G-mean"], rows)
    if len(checked) == 1:
        print("No trial was better than the settings that the search set out from.")
        return
    first, best = (each["runs"] for each in checked.values())
    gain = mean_and_spread(np.subtract(best, first).tolist())
    print(f"The search gains {gain['g_mean']:+.3f} ±{gain['spread']:.3f}.")


def main() -> None:
    """Search the settings of the recipe tuned."""
    parser = console.make_parser(__doc__)
    parser.add_argument(
        "--trials", type=console.positive_whole_number, help=f"how many to try, not {TRIALS}"
    )
    parser.add_argument(
        "--epochs", type=console.positive_whole_number, help=f"of each trial, not {EPOCHS}"
    )
    parser.add_argument(
        "--label-fixes",
        type=Path,
        metavar="FILE",
        help="learn from, and judge by, the labels that this file of label_errors.py has accepted",
    )
    arguments = parser.parse_args()
    device = machine.choose_device(arguments.device)
    train = open_source(arguments.data, arguments.data_seed).load("train", arguments.quick)
    if arguments.label_fixes:
        train = with_fixes(train, read_fixes(arguments.label_fixes, train))
    results = Results(arguments, describe(train))
    recipe = with_epochs(replace(TUNED, epochs=EPOCHS), arguments.epochs, arguments.quick)
    trials = arguments.trials or (3 if arguments.quick else TRIALS)

    def save(study: optuna.Study) -> None:  # after each trial: a search that is stopped is not lost
        results.save_json("tuning", numbers_of(study, recipe))

    def score(tried: Recipe) -> float:
        return g_mean_by_folds(tried, train, arguments.seed, device)

    try:
        study = search(recipe, trials, score, arguments.seed, save)
    except KeyboardInterrupt:
        if results.written:
            print(f"\nthe trials so far are in {results.written[0]}", file=sys.stderr)
        raise
    numbers = numbers_of(study, recipe)
    print_trials(numbers)
    results.save_figure("tuning", draw_search(numbers))
    compared = {"first": recipe}
    if numbers["best"]["number"] > 0:
        compared["best"] = replace(recipe, **numbers["best"]["settings"])
    numbers["check"] = check(compared, train, arguments.seed, device)
    print_check(numbers["check"])
    results.save_json("tuning", numbers)
    results.print_written()


if __name__ == "__main__":
    console.run(main)
