"""Step 3: train the model, from the naive loop to the report's final mix of remedies, and beyond.

    python training.py --recipe final
    python training.py --recipe all --seed 0,1,2
    python training.py --recipe tuned,best --labels results/<data>/label_corrections.csv
    python training.py --settings results/<data>/tuning.json

A recipe holds all settings of a run, with reasons in common/recipes.py. The training loop is
`train` in common/train.py.
"""

import argparse
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from common import cli, metrics, plots
from common.cli import Results, UserError
from common.data import CLASS_NAMES, Dataset, describe, open_data
from common.metrics import SCORE_TITLES
from common.model import Classifier, choose_device, load_checkpoint, predict_logits, save_checkpoint
from common.recipes import FINAL, RECIPES, REPORT_RECIPES, REPORT_SCORES, TUNED, Recipe, with_epochs
from common.train import (
    IGNORE_INDEX,
    Run,
    describe_run,
    filter_labels,
    in_worker,
    parallel_map,
    same_layout,
    train,
)

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

# Which earlier recipe each one is compared with.
BASELINES = {
    "weight-decay": "naive",
    "strict-sampler": "naive",
    "transforms": "strict-sampler",
    "step-lr": "transforms",
    "weighted-sampler": "step-lr",
    "final": "naive",
    "tuned": "final",
    "best": "tuned",
}
# What a file for --settings may change, and between which bounds.
SETTING_BOUNDS = {
    "learning_rate": (1e-6, 1.0),
    "batch_size": (1, 4096),
    "weight_decay": (0.0, 10.0),
    "sampling_exponent": (0.0, 1.0),
    "logit_adjustment": (0.0, 3.0),
    "color_jitter": (0.0, 1.0),
    "cutout": (0, 32),
}


@dataclass
class Trained:
    """The outcome of one run."""

    recipe: Recipe
    seed: int
    checkpoint: Path
    logits: Tensor  # of dev, [N, C]
    history: list[dict[str, Any]]  # loss, seconds, scores and recalls of each epoch

    @property
    def predicted(self) -> np.ndarray:
        """The predicted classes of dev, int [N]."""
        return self.logits.argmax(dim=1).numpy()


# ---- training -------------------------------------------------------------------------------


def train_recipes(
    recipes: list[Recipe],
    arguments: argparse.Namespace,
    results: Results,
    dataset: Dataset,
    dev: Dataset,
) -> list[Trained]:
    """Train each recipe with each seed, as many runs at once as the cores allow."""
    jobs, device = [], choose_device(arguments.device)
    for recipe in recipes:
        for number, seed in enumerate(arguments.seed):
            name = f"{recipe.name}-seed{seed}" if number else recipe.name
            path = results.folder / f"{name}.ckpt"
            metadata = describe_run(recipe, dataset, seed, device) | {"dev": dev.fingerprint}
            earlier = find_earlier(path, metadata, recipe, dataset, dev) if arguments.resume else {}
            kept = dataset
            if "labels" in earlier:
                kept = replace(dataset, labels=earlier["labels"])
            elif "logits" not in earlier:
                kept = filter_labels(recipe, dataset, seed, device)
            jobs.append((recipe, kept, dev, seed, device, path, metadata, earlier))
    trained = list(parallel_map(train_run, jobs, device, "runs"))
    results.written += [run.checkpoint.name for run in trained]
    return trained


def train_run(
    recipe: Recipe,
    dataset: Dataset,
    dev: Dataset,
    seed: int,
    device: torch.device,
    path: Path,
    metadata: dict[str, Any],
    earlier: dict[str, Any],
) -> Trained:
    """Train one model, evaluate it after each epoch, and save it, so that it can be resumed.

    Args:
        path: of the checkpoint; while the run lasts, it ends in `.unfinished.ckpt`.
        earlier: what `find_earlier` returned.
    """
    history = list(earlier.get("history", []))
    if "logits" in earlier:  # it was finished already
        return Trained(recipe, seed, path, earlier["logits"], history)
    unfinished = path.with_suffix(".unfinished.ckpt")
    bar = tqdm(
        total=recipe.epochs,
        initial=len(history),
        desc=f"{recipe.name}, seed {seed}",
        disable=in_worker() or None,  # bars of several processes would overwrite each other
        leave=False,
    )
    start = time.perf_counter()

    def save(path: Path, model: Classifier, state: dict[str, Any]) -> None:
        write = partial(save_checkpoint, model=model, metadata=metadata, training=state)
        cli.write_atomic(path, write)

    def after_epoch(run: Run, losses: list[float]) -> None:
        nonlocal start
        predicted = predict_logits(run.result, dev.images, tta=False).argmax(dim=1)
        scores = metrics.scores(metrics.confusion_matrix(dev.labels, predicted))
        seconds, start = time.perf_counter() - start, time.perf_counter()
        scores = {name: score.tolist() for name, score in scores.items()}
        history.append({"loss": float(np.mean(losses)), "seconds": seconds} | scores)
        state = {"history": history, "labels": dataset.labels, "run": run.state_dict()}
        save(unfinished, run.result, state)
        bar.update()

    model = train(recipe, dataset, seed, device, after_epoch, earlier.get("run")).cpu()
    bar.close()
    logits = predict_logits(model, dev.images)
    save(path, model, {"history": history, "logits": logits})
    unfinished.unlink(missing_ok=True)
    return Trained(recipe, seed, path, logits, history)


def find_earlier(
    path: Path, metadata: dict[str, Any], recipe: Recipe, dataset: Dataset, dev: Dataset
) -> dict[str, Any]:
    """Return the training state of an earlier run with the same metadata, {} if there is none.

    Raises:
        UserError: there is an unfinished one with other metadata, or a damaged one.
    """
    for file in (path.with_suffix(".unfinished.ckpt"), path):
        if file.exists():
            found = load_checkpoint(file)
            other = [key for key, value in metadata.items() if found.metadata.get(key) != value]
            if other and file == path:
                return {}  # it is overwritten, as without --resume
            if other:
                words = {"trained_on": "training set", "dev": "dev set"}
                described = " and ".join(words.get(key, key) for key in other)
                raise UserError(
                    f"{file}: comes from a run with another {described}; repeat that "
                    "run's command, or omit --resume to overwrite the file"
                )
            try:
                whole = is_whole(found.training, recipe, dataset, dev)
            except Exception:  # a damaged state can fail in any way
                whole = False
            if not whole:
                raise UserError(f"{file}: its training state is damaged; delete it to start anew")
            return found.training
    return {}


def is_whole(state: dict[str, Any], recipe: Recipe, dataset: Dataset, dev: Dataset) -> bool:
    """Return whether a training state is as `train_run` saves it; a damaged one may also raise."""
    epochs, perfect = len(state["history"]), metrics.scores(np.eye(len(CLASS_NAMES)))
    epoch = {"loss": 0.0, "seconds": 0.0} | {name: each.tolist() for name, each in perfect.items()}
    example: dict[str, Any] = {"history": [epoch] * epochs}
    if "logits" in state:
        example["logits"] = torch.zeros(len(dev), len(CLASS_NAMES))
        if epochs != recipe.epochs or not same_layout(state, example):
            return False
        return bool(state["logits"].isfinite().all())
    if state["run"]["epoch"] != epochs or epochs > recipe.epochs:
        return False
    run = Run(recipe, len(dataset), torch.device("cpu"))
    run.load_state_dict(state["run"])  # raises an error if it is not of this run
    example |= {"labels": dataset.labels, "run": state["run"]}
    known = {IGNORE_INDEX, *range(len(CLASS_NAMES))}
    return same_layout(state, example) and set(state["labels"].tolist()) <= known


# ---- summaries ------------------------------------------------------------------------------


def summarize(runs: list[Trained], dev: Dataset, baseline: list[Trained]) -> dict[str, Any]:
    """Return a recipe's entry in the JSON file.

    The scores are means over the seeds, and `spread` is their standard deviation. `interval` is
    the first seed's: the uncertainty from the choice of images.

    Args:
        baseline: the runs of the recipe to compare with, if it was trained too.
    """
    scores = [metrics.evaluate(dev.labels, run.predicted) for run in runs]
    names = (*SCORE_TITLES, "recall", "precision")
    combined = [{name: each[name] for name in names} for each in scores]
    return {
        **metrics.mean_over_runs(combined),
        "spread": metrics.spread_over_runs(combined),
        "interval": scores[0]["interval"],
        "recipe": asdict(runs[0].recipe),
        "report": REPORT_SCORES.get(runs[0].recipe.name, {}),
        "comparison": compare(runs, baseline, dev) if baseline else None,
        "runs": [run_entry(*each) for each in zip(runs, scores, strict=True)],
    }


def compare(runs: list[Trained], baseline: list[Trained], dev: Dataset) -> dict[str, Any]:
    """Return the paired differences between two recipes on dev, over images and seeds."""
    predicted, other = (np.stack([run.predicted for run in each]) for each in (runs, baseline))
    found = {score: metrics.compare(dev.labels, predicted, other, score) for score in SCORE_TITLES}
    return {"with": baseline[0].recipe.name, **found}


def run_entry(run: Trained, scores: dict[str, Any]) -> dict[str, Any]:
    """Return a run's entry in the JSON file: its scores, and its curves by epoch."""
    names = ("loss", *SCORE_TITLES, "recall")
    curves = {name: [epoch[name] for epoch in run.history] for name in names}
    seconds = sum(epoch["seconds"] for epoch in run.history)
    return {"seed": run.seed, "seconds": seconds, **scores, "curves": curves}


def print_summaries(summaries: dict[str, dict[str, Any]]) -> None:
    """Print the report's scores and ours, a row for each recipe, and the comparisons."""
    rows = []
    for name, summary in summaries.items():
        row = [name]
        for score in SCORE_TITLES:
            theirs = summary["report"].get(score)
            row += ["" if theirs is None else f"{theirs:.3f}", metrics.format_mean(summary, score)]
        row += [f"{summary['recall'][label]:.2f}" for label in CLASS_NAMES]
        rows.append([*row, f"{np.mean([run['seconds'] for run in summary['runs']]):.0f} s"])
    titles = [text for title in SCORE_TITLES.values() for text in ("report", title)]
    recalls = [f"{name} recall" for name in CLASS_NAMES]
    cli.print_table(["recipe", *titles, *recalls, "a run"], rows)
    for name, summary in summaries.items():
        if summary["comparison"]:
            found = summary["comparison"]
            cli.say(f"{name} against {found['with']}, G-mean: {found['g_mean']['text']}")


# ---- figures --------------------------------------------------------------------------------


def draw_curves(summary: dict[str, Any]) -> Figure:
    """Return a figure of one recipe by epoch: loss, scores on dev, recall of each class."""
    figure, axes = plots.new_figure(1, 3, width=12, height=3.8)
    recipe, runs = summary["recipe"], summary["runs"]
    epochs = range(1, recipe["epochs"] + 1)
    curves = {name: np.array([run["curves"][name] for run in runs]) for name in runs[0]["curves"]}
    plots.plot_runs(axes[0], epochs, curves["loss"], "training loss", plots.PALETTE[6])
    if 0 < (recipe["augment_from"] or 0) < recipe["epochs"]:
        axes[0].axvline(recipe["augment_from"] + 0.5, color="0.5", ls=":", label="augmentation on")
    plots.plot_runs(axes[1], epochs, curves["accuracy"], "accuracy", plots.PALETTE[3])
    plots.plot_runs(axes[1], epochs, curves["g_mean"], "G-mean", plots.PALETTE[4], "--")
    for label, name in enumerate(CLASS_NAMES):
        recall, color = curves["recall"][:, :, label], plots.CLASS_COLORS[label]
        style = plots.LINE_STYLES[label % len(plots.LINE_STYLES)]
        plots.plot_runs(axes[2], epochs, recall, name, color, style)
    tta = recipe["tta_flip"] or recipe["tta_shift"]
    where = "dev,\nwithout test-time augmentation" if tta else "dev"
    loss = "TRADES loss" if recipe["epsilon"] else "cross-entropy"
    texts = (f"{loss}, mean of the epoch", f"score on {where}", f"recall on {where}")
    for ax, text in zip(axes, texts, strict=True):
        ax.set(xlabel="epoch", ylabel=text)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=3, frameon=False)
    for ax in axes[1:]:
        ax.set_ylim(-0.02, 1.02)
    seeds = f", mean and range of {len(runs)} seeds" if len(runs) > 1 else ""
    figure.suptitle(f"Recipe {recipe['name']}{seeds}")
    return figure


def draw_comparison(summaries: dict[str, dict[str, Any]], dev: Dataset) -> Figure:
    """Return a figure of all recipes: scores with 95% intervals, each seed, and the report's."""
    height = 0.45 * len(summaries) + 2
    figure, axes = plots.new_figure(1, len(SCORE_TITLES), width=12, height=height)
    always_car = metrics.scores(metrics.confusion_matrix(dev.labels, torch.zeros_like(dev.labels)))
    ours, theirs = plots.PALETTE[0], plots.PALETTE[3]
    for ax, (score, title) in zip(axes, SCORE_TITLES.items(), strict=True):
        for place, summary in enumerate(summaries.values()):
            ax.plot(summary["interval"][score], [place, place], color=ours, lw=2, alpha=0.4)
            scores = [run[score] for run in summary["runs"]]
            ax.plot(scores, [place] * len(scores), "o", color=ours, ms=5)
            reported = summary["report"].get(score, np.nan)
            ax.plot(reported, place, "D", color=theirs, mfc="none", ms=8)
        ax.axvline(always_car[score], color="0.5", ls=":")
        names = list(summaries) if ax is axes[0] else [""] * len(summaries)
        ax.set(title=title, xlim=(-0.02, 1.02), yticks=range(len(summaries)), yticklabels=names)
        ax.invert_yaxis()
        ax.grid(axis="x", alpha=0.3)
    axes[0].plot([], [], "o-", color=ours, label="ours: each seed; 95% interval of the first")
    axes[0].plot([], [], "D", color=theirs, mfc="none", label="the report's")
    axes[0].plot([], [], ":", color="0.5", label=f'a model that always predicts "{CLASS_NAMES[0]}"')
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


# ---- options --------------------------------------------------------------------------------


def choose_recipes(arguments: argparse.Namespace) -> list[Recipe]:
    """Return the recipes that the options ask for."""
    if arguments.settings:
        recipes = [read_settings(arguments.settings)]
    else:
        names = []
        for name in (arguments.recipe or FINAL.name).split(","):
            names += [*REPORT_RECIPES, TUNED.name] if name == "all" else [name]
        for name in names:
            if name not in RECIPES:
                raise UserError(f"--recipe {name}: not one of {', '.join(RECIPES)}, all")
        recipes = [RECIPES[name] for name in dict.fromkeys(names)]
    return [with_epochs(recipe, arguments.epochs, arguments.quick) for recipe in recipes]


def read_settings(path: Path) -> Recipe:
    """Return recipe `tuned` with the best settings that tuning.py has found.

    Raises:
        UserError: no such file, or not the results of a search.
    """
    try:
        settings = dict(cli.read_json(path)["best"]["settings"])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path}: has no settings found by tuning.py") from error
    for name, value in settings.items():
        if name not in SETTING_BOUNDS:
            raise UserError(f"{path}: {cli.safe_repr(name)} is not a setting that can be changed")
        low, high = SETTING_BOUNDS[name]
        kinds = (int,) if isinstance(low, int) else (int, float)
        if type(value) not in kinds or not low <= value <= high:
            kind = "whole number" if kinds == (int,) else "number"
            raise UserError(
                f"{path}: {name} is {cli.safe_repr(value)}, not a {kind} from {low:g} to {high:g}"
            )
    return replace(TUNED, name="found", **settings)


def parse_arguments() -> argparse.Namespace:
    """Parse the options, and refuse those that don't go together."""
    parser = cli.make_parser(__doc__, several_seeds=True)
    parser.add_argument(
        "--recipe",
        metavar="NAME[,NAME...]",
        help=f"{', '.join(RECIPES)}; or all (the report's and tuned); default: final",
    )
    parser.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="train the recipe `found`: tuned with the settings that tuning.py has found",
    )
    parser.add_argument(
        "--epochs", type=cli.epoch_count, help="number of epochs, instead of the recipe's"
    )
    cli.add_labels_option(parser)
    parser.add_argument(
        "--resume", action="store_true", help="resume stopped runs of the same command"
    )
    arguments = parser.parse_args()
    if arguments.recipe and arguments.settings:
        parser.error("--recipe and --settings exclude each other")
    return arguments


def main() -> None:
    """Train recipes and compare them with the report's."""
    arguments = parse_arguments()
    choose_device(arguments.device)  # so that a wrong name is reported before any work
    recipes = choose_recipes(arguments)
    data = open_data(arguments.data)
    dev = data.load("dev", arguments.quick)
    dataset = data.load("train", arguments.quick, arguments.labels)
    results = Results(arguments, describe(dataset, dev))
    try:
        trained = train_recipes(recipes, arguments, results, dataset, dev)
    except KeyboardInterrupt:
        cli.say_stopped("run the same command with --resume to continue")
        raise
    runs = {recipe.name: [r for r in trained if r.recipe == recipe] for recipe in recipes}
    summaries = {}
    for name, own in runs.items():
        summaries[name] = summarize(own, dev, runs.get(BASELINES.get(name, ""), []))
        results.save_figure(f"training-{name}", draw_curves(summaries[name]))
        for run in own:
            text = metrics.format_predictions(dev.labels, run.logits)
            results.save_text(f"predictions-{run.checkpoint.stem}.csv", text)
    if len(recipes) > 1:
        results.save_figure("training-recipes", draw_comparison(summaries, dev))
    results.save_json("training", {"recipes": summaries})
    print_summaries(summaries)
    results.print_written()


if __name__ == "__main__":
    cli.run(main)
