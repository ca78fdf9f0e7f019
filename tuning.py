"""Step 3i: search for better settings of the recipe `tuned` instead of guessing them.

    python tuning.py
    python tuning.py --trials 60 --epochs 30
    python training.py --settings results/<data>/tuning.json

The report's author found tuning by hand "very long and exhausting". Here each trial is scored by
out-of-fold predictions on two thirds of the training set; dev is not used. The best of many trials
owes part of its score to luck, so it is compared with the recipe's own settings on the remaining
third, which no trial has seen.

All trials are kept in a database. Repeat the same command to resume a search that was stopped.
Several machines with the same code that name the same database share one search:

    python tuning.py --storage postgresql+psycopg://user@server/name

To look at the trials in a browser, pip install optuna-dashboard:

    optuna-dashboard sqlite:///results/<data>/tuning.db
"""

import argparse
import functools
import os
import socket
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common import cli, metrics, plots
from common.cli import UserError
from common.data import CLASS_NAMES, Dataset, describe, open_data
from common.model import choose_device
from common.recipes import TUNED, Recipe, with_epochs
from common.train import FOLDS, cross_val_logits, make_folds, parallel_map, train_and_predict

import numpy as np
import optuna
import psutil
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from torch import Tensor
from tqdm import tqdm

COMMON = cli.PROJECT / "common"
CODE = ("data.py", "metrics.py", "model.py", "train.py")  # that a trial's score depends on
TRIALS = 20
# Fewer epochs, so that more settings can be tried; one thread, as folds are trained in parallel.
RECIPE = replace(TUNED, epochs=16, threads=1)
PARTS = 3  # of the training set: two to search on, one held out for the comparison
SEEDS = 3  # of the comparison
ROWS_SHOWN = 5
# With steps where finer values make no difference, or where exactly 0 must be possible.
SPACE = {
    "learning_rate": FloatDistribution(1e-3, 3e-2, log=True),
    "batch_size": CategoricalDistribution((64, 128, 256)),
    "weight_decay": FloatDistribution(0.0, 0.5, step=0.05),
    "sampling_exponent": FloatDistribution(0.0, 1.0),
    "logit_adjustment": FloatDistribution(0.5, 1.5),
    "color_jitter": FloatDistribution(0.0, 0.5, step=0.05),
    "cutout": IntDistribution(0, 16, step=2),
}


# ---- what the recipes are scored on ---------------------------------------------------------


def split(dataset: Dataset, seed: int) -> tuple[Dataset, Dataset]:
    """Return the images to search on, and those held out; near-duplicates stay together.

    Raises:
        UserError: a class has too few images for this split and the folds of the search.
    """
    groups, needed = dataset.duplicate_groups, PARTS * FOLDS
    for label, name in enumerate(CLASS_NAMES):
        count = len(groups[dataset.labels == label].unique())
        if count < needed:
            raise UserError(
                f"{dataset.name}: {name}: {count} different images; tuning needs {needed}"
            )
    searched, held_out = make_folds(dataset, PARTS, seed)[0]
    return dataset.subset(searched), dataset.subset(held_out)


def g_mean(labels: Tensor, logits: Tensor) -> float:
    """Return the G-mean of the predictions."""
    confusion = metrics.confusion_matrix(labels, logits.argmax(dim=1))
    return metrics.scores(confusion)["g_mean"].item()


def compare_on_held_out(
    default: Recipe,
    best: Recipe,
    searched: Dataset,
    held_out: Dataset,
    seed: int,
    device: torch.device,
) -> dict[str, Any] | None:
    """Train both recipes on the images searched on; compare them on those held out.

    Returns:
        of each recipe `g_mean`, the mean, and `runs`, that of each seed; the paired `comparison`.
        None if both are the same.
    """
    if best == default:
        return None
    seeds = range(seed, seed + SEEDS)
    jobs = [
        (recipe, searched, held_out.images, s, device) for recipe in (default, best) for s in seeds
    ]
    logits = list(parallel_map(train_and_predict, jobs, device, "comparison"))
    runs = [g_mean(held_out.labels, each) for each in logits]
    predicted = torch.stack(logits).argmax(dim=-1)
    comparison = metrics.compare(held_out.labels, predicted[SEEDS:], predicted[:SEEDS])
    own, found = ({"g_mean": np.mean(r).item(), "runs": r} for r in (runs[:SEEDS], runs[SEEDS:]))
    return {"default": own, "best": found, "comparison": comparison}


# ---- the search -----------------------------------------------------------------------------


def search(
    study: optuna.Study,
    recipe: Recipe,
    trials: int,
    score: Callable[[Recipe], float],
    seed: int,
    after_trial: Callable[[], None] = lambda: None,
) -> None:
    """Try settings until there are `trials` trials: the recipe's own, then promising ones.

    Optuna's tree-structured Parzen estimator proposes them (Bergstra et al., "Algorithms for
    hyper-parameter optimization", 2011).

    Args:
        score: of a recipe; the higher, the better.
    """
    done, own = complete_trials(study), settings_of(recipe)
    if own not in [trial.params for trial in done]:
        study.enqueue_trial(own)
    with tqdm(total=trials, initial=len(done), desc="trials", disable=None) as bar:
        while len(complete_trials(study)) < trials:
            study.sampler = make_sampler(study, seed)
            trial = study.ask(SPACE)
            trial.set_user_attr("worker", [socket.gethostname(), os.getpid()])
            try:
                value = score(replace(recipe, **trial.params))
            except BaseException:
                study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
                raise
            study.tell(trial, value, skip_if_finished=True)
            after_trial()
            bar.update()


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's own values of the settings that are searched."""
    return {name: getattr(recipe, name) for name in SPACE}


def make_sampler(study: optuna.Study, seed: int) -> optuna.samplers.BaseSampler:
    """Return a sampler with a new seed, so that a resumed search does not repeat draws."""
    sequence = np.random.SeedSequence([seed, len(study.get_trials(deepcopy=False))])
    return optuna.samplers.TPESampler(seed=int(sequence.generate_state(1)[0]))


def search_entry(study: optuna.Study, recipe: Recipe) -> dict[str, Any]:
    """Return a search's entry in the JSON file."""
    trials = [
        {
            "number": trial.number,
            "g_mean": trial.value,
            "settings": trial.params,
            "is_default": trial.params == settings_of(recipe),
        }
        for trial in complete_trials(study)
    ]
    best = max(trials, key=lambda trial: trial["g_mean"])
    return {"recipe": asdict(recipe), "study": study.study_name, "trials": trials, "best": best}


# ---- tables and figure ----------------------------------------------------------------------


def draw_search(numbers: dict[str, Any]) -> Figure:
    """Draw the scores of all trials: in their order, and over each setting."""
    figure, axes = plots.new_figure(2, 4, width=13, height=6.5)
    scores = [trial["g_mean"] for trial in numbers["trials"]]
    places = [trial["number"] + 1 for trial in numbers["trials"]]
    best = np.maximum.accumulate(scores)
    axes[0].step(places, best, where="post", color=plots.PALETTE[3], label="best so far")
    for ax, name in zip(axes, ["trial", *SPACE], strict=True):
        plot_trials(ax, numbers, name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def plot_trials(ax: Axes, numbers: dict[str, Any], name: str) -> Axes:
    """Draw the score of each trial over one setting, or over its number."""
    default = [trial for trial in numbers["trials"] if trial["is_default"]]
    marked = [
        ("trial", numbers["trials"], {"marker": "o", "ms": 4, "color": plots.PALETTE[0]}),
        ("recipe's own settings", default, {"marker": "s", "ms": 8, "color": plots.PALETTE[6]}),
        ("best", [numbers["best"]], {"marker": "D", "ms": 8, "color": plots.PALETTE[3]}),
    ]
    for label, trials, style in marked:
        values = [({"trial": each["number"] + 1} | each["settings"])[name] for each in trials]
        scores = [each["g_mean"] for each in trials]
        ax.plot(values, scores, ls="none", mfc="none", label=label, **style)
    if getattr(SPACE.get(name), "log", False):
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))  # more labels would overlap
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    ax.set(xlabel=name.replace("_", " "), ylabel="G-mean, out of fold")
    ax.grid(alpha=0.3)
    return ax


def print_trials(trials: list[dict[str, Any]]) -> None:
    """Print the best trials and the one of the recipe's own settings."""
    ranked = sorted(trials, key=lambda trial: -trial["g_mean"])
    shown = ranked[:ROWS_SHOWN] + [trial for trial in ranked[ROWS_SHOWN:] if trial["is_default"]]
    rows = [
        ["recipe's own" if trial["is_default"] else f"trial {trial['number'] + 1}"]
        + [f"{trial['g_mean']:.3f}", *(f"{trial['settings'][name]:.3g}" for name in SPACE)]
        for trial in shown
    ]
    cli.print_table(["", "G-mean", *(name.replace("_", " ") for name in SPACE)], rows)


def print_check(checked: dict[str, Any] | None) -> None:
    """Print the comparison on the images held out, or why there is none."""
    if checked is None:
        cli.say("\nNo trial was better than the recipe's own settings.")
        return
    own, best = checked["default"]["g_mean"], checked["best"]["g_mean"]
    cli.say(
        f"\nOn images that no trial has seen, {SEEDS} seeds: G-mean {best:.3f} with the best "
        f"settings, {own:.3f} with the recipe's own:\n{checked['comparison']['text']}"
    )


# ---- the database of trials -----------------------------------------------------------------


def hide_password(url: str) -> str:
    """Return a database URL without its password.

    Raises:
        UserError: it is not a URL.
    """
    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError) as error:
        example = "postgresql+psycopg://user@server/name"
        raise UserError(f"--storage: not the URL of a database, such as {example}") from error


@contextmanager
def storage_errors(shown: str, *others: type[Exception]) -> Iterator[None]:
    """Turn database errors, and others, into one line that names the database."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"--storage {shown}: its driver is not installed; for PostgreSQL, that is psycopg"
        ) from error
    except (SQLAlchemyError, optuna.exceptions.OptunaError, *others) as error:
        raise UserError(
            f"--storage {shown}: not reachable, not Optuna's, or its disk is full"
        ) from error


def open_study(url: str | None, folder: Path, name: str) -> optuna.Study:
    """Return the study of that name, or a new one; without a URL, from a file in the folder."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    options: dict[str, Any] = {}
    if url is None:  # a folder's name may contain characters special in URLs
        url, path = "sqlite:///tuning.db", folder / "tuning.db"
        connect = functools.partial(sqlite3.connect, path, timeout=60, check_same_thread=False)
        options = {"creator": connect}
    try:
        storage = optuna.storages.RDBStorage(url, options)
    except SQLAlchemyError:
        time.sleep(1)  # another worker may have been creating the tables
        storage = optuna.storages.RDBStorage(url, options)
    return optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True
    )


def study_name(recipe: Recipe, dataset: Dataset, seed: int) -> str:
    """Return a name that changes with the settings, the data and the code of a trial."""
    code = [(COMMON / name).read_text(encoding="utf-8") for name in CODE]
    rest = zlib.crc32(repr((recipe, SPACE, PARTS, FOLDS, code)).encode())
    return f"{recipe.name}-{dataset.fingerprint}-epochs{recipe.epochs}-seed{seed}-{rest:08x}"


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the completed trials in order."""
    return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])


def end_killed_trials(study: optuna.Study) -> None:
    """Mark trials of this machine as failed if their process was killed."""
    for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
        host, process = trial.user_attrs.get("worker", (None, None))
        if host == socket.gethostname() and not psutil.pid_exists(process):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


# ---- the script -----------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = cli.make_parser(__doc__)
    parser.add_argument(
        "--trials", type=cli.positive_int, help=f"number of trials (default: {TRIALS})"
    )
    parser.add_argument(
        "--epochs", type=cli.epoch_count, help=f"of each trial (default: {RECIPE.epochs})"
    )
    cli.add_labels_option(parser)
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="database of the trials (default: tuning.db in the results folder)",
    )
    return parser


def main() -> None:
    """Search the settings of the recipe `tuned`, and check what was found."""
    arguments = make_parser().parse_args()
    device, url, seed = choose_device(arguments.device), arguments.storage, arguments.seed
    arguments.storage = url and hide_password(url)  # as it appears in the results
    dataset = open_data(arguments.data).load("train", arguments.quick, arguments.labels)
    results = cli.Results(arguments, describe(dataset))
    searched, held_out = split(dataset, seed)
    recipe = with_epochs(RECIPE, arguments.epochs, arguments.quick)

    def score(tried: Recipe) -> float:
        return g_mean(searched.labels, cross_val_logits(tried, searched, seed, device))

    def save() -> None:  # after each trial, so that intermediate results can be used
        results.save_json("tuning", search_entry(study, recipe))

    trials = arguments.trials or (3 if arguments.quick else TRIALS)
    database = arguments.storage or str(results.folder / "tuning.db")
    name = study_name(recipe, dataset, seed)
    with storage_errors(database, Exception):  # a damaged one can fail in any way
        study = open_study(url, results.folder, name)
        end_killed_trials(study)
    with storage_errors(database):
        search(study, recipe, trials, score, seed, save)
        numbers = search_entry(study, recipe)
    best = replace(recipe, **numbers["best"]["settings"])
    numbers["check"] = compare_on_held_out(recipe, best, searched, held_out, seed, device)
    results.save_json("tuning", numbers)
    results.save_figure("tuning", draw_search(numbers))
    print_trials(numbers["trials"])
    print_check(numbers["check"])
    results.print_written()


if __name__ == "__main__":
    cli.run(main)
