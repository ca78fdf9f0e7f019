"""Step 4: what the learning rate does to the loss, and which rate to take.

    python lr_analysis.py
    python lr_analysis.py --rates 0.01 0.001 0.0001

First the report's experiment: one net for each of five rates, loss against steps. Then the
learning-rate range test (Smith, "Cyclical learning rates", 2017): one short run in which the
rate rises at each step, and the loss shows from where to where rates are of use.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from common import console, figures, machine
from common.dataset import CLASS_NAMES, Dataset, as_input, describe, open_source
from common.network import build_network
from common.results import Results
from common.trainer import Recipe, fit, make_optimizer, make_sampler, train_step
from training import NAIVE, with_epochs

REPORT_RATES = (0.5, 0.05, 0.005, 0.0005, 0.00005)
# Classes in equal parts, as in the report's later steps, and nothing else that would blur what
# the rate does: no transforms, no decay.
RECIPE = replace(NAIVE, name="learning-rates", sampler="weighted", epochs=8)
GUESS_LOSS = math.log(len(CLASS_NAMES))  # of a net that gives each class the same chance
SMOOTHING = 0.9  # weight of the past: a curve is a mean over about 10 steps
LEARNS_NOTHING = 0.95  # times a guess's loss: an end above that is no progress
WORKS = 0.8  # of the best rate's way: what comes so far is as good a choice
DIVERGED = 5  # times the reference loss: beyond that a run is given up for lost

RANGE_TEST_RATES = (1e-6, 1.0)
RANGE_TEST_STEPS = 200


def smooth(losses: Sequence[float]) -> np.ndarray:
    """Return the exponential moving average of losses, [N], corrected for its empty start.

    The correction is the one of Adam (Kingma and Ba, 2015, section 3).
    """
    smoothed, average = [], 0.0
    for step, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**step))
    return np.array(smoothed)


def losses_at_rate(
    rate: float, recipe: Recipe, train: Dataset, seed: int, device: torch.device
) -> list[float]:
    """Train a new net at one rate; return the loss of each step."""
    losses: list[float] = []
    fit(
        replace(recipe, learning_rate=rate),
        train,
        seed,
        device,
        after_epoch=lambda net, epoch_losses: losses.extend(epoch_losses),
    )
    return losses


def first_diverged(losses: Sequence[float]) -> int | None:
    """Return the first step at which a run is lost: loss NaN, infinite, or far above a guess's."""
    with np.errstate(invalid="ignore"):
        lost = ~(smooth(losses) <= DIVERGED * GUESS_LOSS)  # NaN is not <= anything
    return int(lost.argmax()) if lost.any() else None


def judge(curves: dict[float, Sequence[float]]) -> dict[float, str]:
    """Return a verdict in words for each rate, given each rate's losses.

    The yardstick is the rate that ends lowest, of those that did not diverge. Of the way from a
    guess to its loss, others have come some part; with too little of it, a rate is too high or
    too low.
    """
    diverged = {rate: first_diverged(losses) for rate, losses in curves.items()}
    ends = {rate: smooth(losses)[-1] for rate, losses in curves.items() if diverged[rate] is None}
    verdicts = {
        rate: f"too high: leaps off at step {step + 1}"
        for rate, step in diverged.items()
        if step is not None
    }
    if ends:
        best = min(ends, key=ends.__getitem__)
        verdicts |= {rate: _compare_with_best(rate, best, ends) for rate in ends}
    return verdicts


def _compare_with_best(rate: float, best: float, ends: dict[float, float]) -> str:
    if ends[best] > LEARNS_NOTHING * GUESS_LOSS:
        return "no better than a guess, and none here is"
    if rate == best:
        return "the best of these"
    way = max(0.0, (GUESS_LOSS - ends[rate]) / (GUESS_LOSS - ends[best]))
    if way > WORKS:
        return f"works: {way:.0%} of the best one's way"
    side = "high" if rate > best else "low: it crawls"
    return f"too {side}, {way:.0%} of the best one's way"


def range_test(
    net: nn.Module, recipe: Recipe, batches: Iterable[tuple[Tensor, Tensor]], rates: Sequence[float]
) -> list[float]:
    """Take one step at each rate; return the loss before each step.

    Ends early, with fewer losses than rates, once the smoothed loss is DIVERGED times its
    lowest value, or NaN. The net itself is left as it was: a copy is trained.
    """
    net = copy.deepcopy(net).train()
    optimizer = make_optimizer(net, recipe)
    losses: list[float] = []
    for rate, (pictures, labels) in zip(rates, batches, strict=False):
        optimizer.param_groups[0]["lr"] = rate
        losses.append(train_step(net, optimizer, pictures, labels))
        smoothed = smooth(losses)
        if not smoothed[-1] <= DIVERGED * smoothed.min():
            break
    return losses


def suggest_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the rate at which the smoothed loss falls most steeply over log(rate).

    Up to its lowest point only: where it leaps and falls back, it learns nothing. The rates are
    even in log; each fall is measured over a tenth of the steps, as that of one is mostly noise.
    """
    smoothed = smooth(losses)
    before = smoothed[: int(np.nanargmin(smoothed)) + 1]
    span = len(before) // 10
    falls = before[: len(before) - span] - before[span:]
    return float(rates[int(falls.argmax()) + span // 2])


def draw_batches(
    recipe: Recipe, train: Dataset, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield batches (float pictures, labels) without end, drawn as the recipe says."""
    pictures, labels = train.pictures.to(device), train.labels.to(device)
    epochs = make_sampler(recipe, train.labels)
    for index in chain.from_iterable(epoch.split(recipe.batch_size) for epoch in epochs):
        yield as_input(pictures[index.to(device)]), labels[index.to(device)]


def draw_losses(ax: Axes, curves: dict[float, Sequence[float]]) -> Axes:
    """Draw figure 3: smoothed loss against steps, one line a rate; a cross where it diverged."""
    lowest = min(np.nanmin(smooth(losses)) for losses in curves.values())
    top = 1.2 * DIVERGED * GUESS_LOSS  # what leaps higher leaves the picture, at its cross
    for number, (rate, losses) in enumerate(curves.items()):
        color = figures.PALETTE[number % len(figures.PALETTE)]
        style = ("-", "--", "-.", ":")[number % 4]
        ax.plot(
            np.arange(1, len(losses) + 1), smooth(losses), style, color=color, label=f"{rate:g}"
        )
        lost = first_diverged(losses)
        if lost is not None:
            height = top / 1.15 ** (number + 1)  # each at its own, so that none hides another
            ax.plot(lost + 1, height, "X", color=color, markersize=11, mec="k")
    ax.axhline(GUESS_LOSS, color="0.6", lw=0.8)
    ax.annotate(
        "a guess",
        (1, GUESS_LOSS),
        (0.99, 3),
        color="0.4",
        fontsize=8,
        ha="right",
        xycoords=("axes fraction", "data"),
        textcoords=("axes fraction", "offset points"),
    )
    ax.set(
        yscale="log",
        xlabel="step",
        ylabel="cross-entropy, smoothed (log axis)",
    )
    ticks = (0.1, 0.2, 0.5, 1, 2, 5)
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(0.8 * min(lowest, GUESS_LOSS), top)
    ax.set_title("Loss by learning rate (cross: diverged, off the picture)")
    ax.grid(alpha=0.3)
    ax.legend(title="learning rate")
    return ax


def draw_range_test(
    ax: Axes, rates: Sequence[float], losses: Sequence[float], suggestion: float
) -> Axes:
    """Draw the range test: loss against rate, both as measured and smoothed."""
    rates = rates[: len(losses)]
    ax.plot(rates, losses, ".", color="0.75", label="each step")
    ax.plot(rates, smooth(losses), color=figures.PALETTE[0], label="smoothed")
    ax.axvline(suggestion, color=figures.PALETTE[3], ls="--", label=f"suggested: {suggestion:.2g}")
    highest = max(losses[0], np.nanmax(smooth(losses)))
    ax.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy", ylim=(0, 1.2 * highest))
    ax.set_title("Learning-rate range test")
    ax.grid(alpha=0.3)
    ax.legend()
    return ax


def analyse_rates(
    rates: list[float], recipe: Recipe, train: Dataset, seed: int, device: torch.device
) -> dict[float, list[float]]:
    """Train at each rate, side by side where cores allow; return the losses by rate."""
    jobs = [(rate, recipe, train, seed, device) for rate in rates]
    losses = machine.side_by_side(losses_at_rate, jobs, device, "learning rates")
    return dict(zip(rates, losses, strict=True))


def main() -> None:
    """Compare learning rates, and search for one by a range test."""
    parser = console.make_parser(__doc__)
    parser.add_argument(
        "--rates",
        type=console.positive_number,
        nargs="+",
        default=list(REPORT_RATES),
        help="the learning rates to compare",
    )
    parser.add_argument(
        "--epochs", type=console.positive_whole_number, help=f"a rate; without it, {RECIPE.epochs}"
    )
    arguments = parser.parse_args()
    device = machine.choose_device(arguments.device)
    train = open_source(arguments.data, arguments.data_seed).load("train", arguments.quick)
    results = Results(arguments, describe(train))
    recipe = with_epochs(RECIPE, arguments.epochs, arguments.quick)

    curves = analyse_rates(
        list(dict.fromkeys(arguments.rates)), recipe, train, arguments.seed, device
    )
    verdicts = judge(curves)
    console.print_table(
        ["learning rate", "loss at the end", "verdict"],
        [[f"{rate:g}", f"{smooth(curves[rate])[-1]:.3f}", verdicts[rate]] for rate in curves],
    )
    figure, (ax,) = figures.new_figure(width=8, height=5)
    draw_losses(ax, curves)
    results.save_figure("3-learning-rates", figure)

    torch.manual_seed(arguments.seed)
    tested_rates = np.geomspace(*RANGE_TEST_RATES, RANGE_TEST_STEPS)
    net = build_network().to(device)
    losses = range_test(net, recipe, draw_batches(recipe, train, device), tested_rates)
    suggestion = suggest_rate(tested_rates, losses)
    print(f"\nrange test: the loss falls fastest at learning rate {suggestion:.2g}")
    figure, (ax,) = figures.new_figure(width=8, height=5)
    draw_range_test(ax, tested_rates, losses, suggestion)
    results.save_figure("3-range-test", figure)
    by_rate = {
        f"{rate:g}": {
            "verdict": verdicts[rate],
            "diverged_at_step": first_diverged(curve),
            "smoothed_losses": smooth(curve).tolist(),
        }
        for rate, curve in curves.items()
    }
    test = {"rates": tested_rates[: len(losses)].tolist(), "losses": losses}
    results.save_json(
        "lr_analysis", {"rates": by_rate, "range_test": test | {"suggestion": suggestion}}
    )
    results.print_written()


if __name__ == "__main__":
    console.run(main)
