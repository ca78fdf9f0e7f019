"""Step 4: what the learning rate does to the loss, and which rate to take.

    python lr_analysis.py
    python lr_analysis.py --rates 0.01 0.001 0.0001 --seed 0,1,2

First the report's experiment: the course's CNN is trained at each of five learning rates, with
class-balanced sampling, and the loss is plotted by step. Then the learning-rate range test
(Smith, "Cyclical learning rates for training neural networks", 2017): one short run in which
the rate rises with every step, and the loss shows which rates are useful.
"""

import argparse
import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from common import cli, plots
from common.data import CLASS_NAMES, Dataset, describe, open_data, to_float
from common.model import build_model, choose_device
from common.recipes import NAIVE, Recipe, with_epochs
from common.train import compute_loss, draw_balanced, make_optimizer, parallel_map, train

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter1d
from scipy.signal import lfilter
from torch import nn

REPORT_RATES = (0.5, 0.05, 0.005, 0.0005, 0.00005)
MODEL = "the course's CNN with class-balanced sampling"
# Without augmentation, weight decay or schedule, which would mask the effect of the rate.
RECIPE = replace(NAIVE, name="learning-rates", sampler="balanced", epochs=8)

CHANCE_LOSS = math.log(len(CLASS_NAMES))  # of a model that gives each class the same probability
LEARNED_FRACTION = 0.95  # of chance level: a run with a higher final loss has learned nothing
WORKING_FRACTION = 0.8  # of the best run's loss reduction: a rate that reaches it works
DIVERGENCE_FACTOR = 5  # times chance level, or in the range test times the lowest loss so far
EMA_DECAY = 0.9  # a smoothed loss is a mean over about 10 steps

RANGE_TEST_RATES = np.geomspace(1e-6, 1.0, 200)  # 33 steps for each power of ten
RANGE_TEST_SMOOTHING = 8  # steps, standard deviation of a Gaussian; an EMA would lag behind
EDGE = 10  # steps at either end that are never suggested: the slope there is too uncertain


# ---- losses at given rates ------------------------------------------------------------------


def step_losses(recipe: Recipe, dataset: Dataset, seed: int, device: torch.device) -> list[float]:
    """Train a new model; return the loss of each step."""
    losses: list[float] = []
    train(recipe, dataset, seed, device, lambda run, epoch_losses: losses.extend(epoch_losses))
    return losses


def smooth(losses: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the exponential moving average over the steps, the last axis of [..., steps].

    Its start is bias-corrected (Kingma and Ba 2015, section 3).
    """
    averaged = lfilter([1 - EMA_DECAY], [1, -EMA_DECAY], losses, axis=-1)
    return averaged / (1 - EMA_DECAY ** np.arange(1, averaged.shape[-1] + 1))


def divergence_step(losses: np.ndarray) -> int | None:
    """Return the first step, from 1, at which one of the runs [runs, steps] has diverged.

    None if none has, or if they have learned in the end all the same.
    """
    if final_loss(losses) < LEARNED_FRACTION * CHANCE_LOSS:
        return None
    diverged = ~(smooth(losses) <= DIVERGENCE_FACTOR * CHANCE_LOSS).all(axis=0)  # also NaN
    return int(diverged.argmax()) + 1 if diverged.any() else None


def final_loss(losses: np.ndarray) -> float:
    """Return the smoothed loss at the end, the mean over the runs [runs, steps]."""
    return float(smooth(losses)[:, -1].mean())


def best_rate(curves: Mapping[float, np.ndarray]) -> float | None:
    """Return the rate that ends at the lowest loss without diverging; None if none learns."""
    ends = {rate: final_loss(runs) for rate, runs in curves.items() if not divergence_step(runs)}
    learned = {rate: loss for rate, loss in ends.items() if loss < LEARNED_FRACTION * CHANCE_LOSS}
    return min(learned, key=learned.__getitem__, default=None)


def verdict(rate: float, curves: Mapping[float, np.ndarray]) -> str:
    """Say what a rate does, and what fraction of the best rate's loss reduction it reaches.

    Args:
        curves: losses [runs, steps] by rate; a reduction is measured from chance level.
    """
    best, step = best_rate(curves), divergence_step(curves[rate])
    if step:
        return f"too high: diverges at step {step}"
    if best is None:
        return "does not get clearly below chance level; no rate here does"
    if rate == best:
        return "the best of these"
    reduction, most = (CHANCE_LOSS - final_loss(curves[each]) for each in (rate, best))
    fraction = f"{max(0.0, reduction / most):.0%} of the best run's loss reduction"
    if reduction > WORKING_FRACTION * most:
        return f"works: {fraction}"
    return f"too high: {fraction}" if rate > best else f"too low: converges too slowly, {fraction}"


# ---- range test -----------------------------------------------------------------------------


def range_test(
    model: nn.Module, recipe: Recipe, dataset: Dataset, device: torch.device
) -> list[float]:
    """Take one step at each of RANGE_TEST_RATES; return the loss before each step.

    It ends early once the smoothed loss is DIVERGENCE_FACTOR times its lowest value, or NaN. The
    model itself is not changed: a copy is trained.
    """
    torch.set_num_threads(recipe.threads)  # the order of floating-point sums depends on it
    model = copy.deepcopy(model).train()
    optimizer = make_optimizer(model, recipe)
    log_prior = torch.zeros(len(CLASS_NAMES), device=device)  # no logit adjustment
    order = draw_balanced(dataset.labels, len(RANGE_TEST_RATES) * recipe.batch_size)
    losses: list[float] = []
    for rate, index in zip(RANGE_TEST_RATES, order.split(recipe.batch_size), strict=True):
        images, labels = to_float(dataset.images[index].to(device)), dataset.labels[index]
        loss = compute_loss(model, images, labels.to(device), recipe, log_prior)
        optimizer.param_groups[0]["lr"] = float(rate)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        smoothed = smooth(losses)
        if not smoothed[-1] <= DIVERGENCE_FACTOR * smoothed.min():
            break
    return losses


def smooth_without_lag(losses: Sequence[float], derivative: int = 0) -> np.ndarray:
    """Return the losses of a range test, or their slope per step, smoothed by a Gaussian.

    Losses are capped at twice the initial loss (NaN too): more would distort neighboring steps.
    """
    capped = np.fmin(losses, 2 * np.median(losses[:EDGE]))
    return gaussian_filter1d(capped, RANGE_TEST_SMOOTHING, order=derivative)


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> tuple[float | None, str]:
    """Return the rate at which the loss falls most steeply over log(rate), and the reason.

    Only steps before the lowest loss count: when the loss jumps up and falls back, nothing is
    learned. The rate is None if the losses suggest none.
    """
    if len(losses) < 3 * EDGE:
        return None, f"the loss diverges after {len(losses)} steps, too few to tell"
    smoothed = smooth_without_lag(losses)
    lowest = int(smoothed.argmin())
    if smoothed[lowest] > LEARNED_FRACTION * min(CHANCE_LOSS, smoothed[0]):
        return None, "at no rate does the model become clearly better than chance"
    steepest = int(smooth_without_lag(losses, derivative=1)[: lowest + 1].argmin())
    if not EDGE <= steepest < len(losses) - EDGE:
        return None, "the loss falls most steeply at the edge of the tested rates"
    return float(rates[steepest]), "a new model's loss falls most steeply there"


# ---- figures --------------------------------------------------------------------------------


def draw_losses(curves: Mapping[float, np.ndarray]) -> Figure:
    """Draw figure 3: smoothed loss against steps, a line for each rate."""
    figure, (ax,) = plots.new_figure(width=8.5, height=5)
    for number, (rate, losses) in enumerate(curves.items()):
        color = plots.PALETTE[number % len(plots.PALETTE)]
        style = plots.LINE_STYLES[number % len(plots.LINE_STYLES)]
        steps = np.arange(1, losses.shape[1] + 1)
        plots.plot_runs(ax, steps, smooth(losses), f"{rate:g}", color, style)
    mark_divergence(ax, curves)
    ax.axhline(CHANCE_LOSS, color="0.5", lw=0.8, ls=":", label="chance level")
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 2, 5)
    ax.set(yscale="log", xlabel="step", ylabel="cross-entropy, smoothed (log axis)")
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    lowest = min(float(np.nanmin(smooth(losses))) for losses in curves.values())
    ax.set_ylim(0.9 * min(lowest, CHANCE_LOSS), 1.5 * DIVERGENCE_FACTOR * CHANCE_LOSS)
    ax.set_title("Loss by learning rate")
    figure.legend(loc="outside right upper", title="learning rate")
    return figure


def mark_divergence(ax: Axes, curves: Mapping[float, np.ndarray]) -> Axes:
    """Mark where runs diverge by a cross and a text, one row per run at the top."""
    steps = [divergence_step(losses) for losses in curves.values()]
    marked = [mark for mark in zip(steps, curves, ax.lines, strict=True) if mark[0]]
    above = ax.get_xaxis_transform()  # steps to the right, fractions of the axes upward
    for row, (step, rate, line) in enumerate(marked):
        height = 0.95 - 0.06 * row
        ax.plot(step, height, "X", color=line.get_color(), mec="k", transform=above)
        ax.text(step, height, f"   {rate:g} diverges", transform=above, va="center", fontsize=8)
    return ax


def draw_range_test(
    rates: Sequence[float], losses: Sequence[float], suggestion: float | None, best: float | None
) -> Figure:
    """Draw the range test: loss against rate, raw and smoothed, and the suggested rates."""
    figure, (ax,) = plots.new_figure(width=8.5, height=5)
    smoothed = smooth_without_lag(losses)
    ax.plot(rates, losses, ".", color="0.75", label="each step")
    ax.plot(rates, smoothed, color=plots.PALETTE[0], label="smoothed")
    if suggestion:
        label = f"{suggestion:.2g}: falls most steeply\n(suggested)"
        ax.axvline(suggestion, color=plots.PALETTE[3], ls="--", label=label)
    if best:
        label = f"{best:g}: lowest loss at the end\nof a run (figure 3)"
        ax.axvline(best, color=plots.PALETTE[2], ls="-.", label=label)
    margin = 0.5 * (smoothed[0] - smoothed.min()) + 0.05  # higher losses are cut off
    ax.set_ylim(np.nanmin(losses) - 0.02, smoothed[0] + margin)
    ax.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy")
    ax.set_title("Learning-rate range test")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return figure


# ---- the script -----------------------------------------------------------------------------


def train_at_rates(
    rates: list[float], recipe: Recipe, dataset: Dataset, seeds: list[int], device: torch.device
) -> dict[float, np.ndarray]:
    """Train at each rate with each seed, in parallel; return losses [seeds, steps] by rate."""
    recipes = [replace(recipe, learning_rate=rate) for rate in rates]
    jobs = [(each, dataset, seed, device) for each in recipes for seed in seeds]
    losses = list(parallel_map(step_losses, jobs, device, "learning rates"))
    return dict(zip(rates, np.array(losses).reshape(len(rates), len(seeds), -1), strict=True))


def run_range_test(
    recipe: Recipe, dataset: Dataset, seed: int, device: torch.device, best: float | None
) -> dict[str, Any]:
    """Run the range test with a new model; return its entry in the JSON file."""
    torch.manual_seed(seed)
    losses = range_test(build_model(recipe.network).to(device), recipe, dataset, device)
    rates = RANGE_TEST_RATES[: len(losses)].tolist()
    suggestion, explanation = suggest_rate(rates, losses)
    if suggestion and best:
        explanation += (
            f"; after {recipe.epochs} epochs {best:g} has the lowest loss of the rates above"
            " (the test sees only the first steps of a run)"
        )
    return {"rates": rates, "losses": losses, "suggestion": suggestion, "explanation": explanation}


def summarize_rates(curves: Mapping[float, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Return each rate's verdict and losses, for the JSON file."""
    return {
        f"{rate:.15g}": {
            "verdict": verdict(rate, curves),
            "diverged_at_step": divergence_step(runs),
            "smoothed_losses": smooth(runs).mean(axis=0).tolist(),
        }
        for rate, runs in curves.items()
    }


def print_summary(by_rate: dict[str, dict[str, Any]], tested: dict[str, Any], epochs: int) -> None:
    """Print what each rate does, and what the range test suggests."""
    cli.say(f"{MODEL}, {epochs} epochs")
    rows = [
        [rate, f"{each['smoothed_losses'][-1]:.4g}", each["verdict"]]
        for rate, each in by_rate.items()
    ]
    cli.print_table(["learning rate", "loss at the end", "verdict"], rows)
    suggestion = tested["suggestion"]
    words = f"learning rate {suggestion:.2g} is suggested" if suggestion else "no suggestion"
    cli.say(f"\nrange test: {words}: {tested['explanation']}")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = cli.make_parser(__doc__, several_seeds=True)
    parser.add_argument(
        "--rates",
        type=cli.positive_float,
        nargs="+",
        default=list(REPORT_RATES),
        help="the learning rates to compare",
    )
    parser.add_argument(
        "--epochs", type=cli.epoch_count, help=f"at each rate (default: {RECIPE.epochs})"
    )
    return parser


def main() -> None:
    """Compare learning rates, and search for one by a range test."""
    arguments = make_parser().parse_args()
    device = choose_device(arguments.device)
    dataset = open_data(arguments.data).load("train", arguments.quick)
    results = cli.Results(arguments, describe(dataset))
    recipe = with_epochs(RECIPE, arguments.epochs, arguments.quick)

    rates = list(dict.fromkeys(arguments.rates))
    curves = train_at_rates(rates, recipe, dataset, arguments.seed, device)
    best = best_rate(curves)
    tested = run_range_test(recipe, dataset, arguments.seed[0], device, best)

    by_rate = summarize_rates(curves)
    numbers = {"model": MODEL, "recipe": asdict(recipe), "rates": by_rate, "range_test": tested}
    results.save_json("lr_analysis", numbers)
    results.save_figure("3-learning-rates", draw_losses(curves))
    figure = draw_range_test(tested["rates"], tested["losses"], tested["suggestion"], best)
    results.save_figure("3-range-test", figure)
    print_summary(by_rate, tested, recipe.epochs)
    results.print_written()


if __name__ == "__main__":
    cli.run(main)
