"""Step 5: noise that a person hardly sees, and that makes the net wrong; and a net that resists.

    python adversarial.py
    python adversarial.py --epsilons 0.01 0.02 0.05 --checkpoint models/best.ckpt

Epsilon is in pixel units everywhere: 0.05 lets each pixel change by 5% of full brightness. It
can't mean anything else here, as normalising is part of the net. The attacks themselves are in
common/attacks.py.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm import tqdm

from common import console, figures, machine
from common.attacks import (
    NOISE_STEPS,
    add_noise,
    fgsm,
    fit_one_noise,
    in_batches,
    loss_gradient,
    pgd,
    random_noise,
)
from common.dataset import CLASS_NAMES, Dataset, as_input, describe, open_source
from common.network import load_checkpoint, predict_logits
from common.results import Results
from evaluation import SCORE_TITLES, add_checkpoint_options, evaluate_predictions
from training import ROBUST, in_words, is_trained_on, load_or_train

SHIPPED_ROBUST = console.PROJECT / "models" / "robust.ckpt"
EPSILONS = (0.02, 8 / 255, 0.05, 0.1)  # the last two are the report's
# The report does not say for which of its epsilons its FGSM numbers stand, and left out the
# pictures that the net had wrong already; its one noise had no bound at all.
REPORT_SCORES: dict[str, dict[str, Any]] = {
    "FGSM": {"epsilon": "0.05, 0.1", "accuracy": 0.105, "balanced_accuracy": 0.128},
    "one noise": {"epsilon": "unbounded", "accuracy": 0.638, "balanced_accuracy": 0.475},
}
ATTACK_TITLES = {
    "random_noise": "random noise",
    "fgsm": "FGSM",
    "pgd": "PGD",
    "one_noise": "one noise",
    "one_noise_to_next_label": "one noise, to label + 1",
}
OBJECTIVES = {"one_noise": False, "one_noise_to_next_label": True}
PGD_STEPS = 20
SHOWN = 5  # pictures a row in the figures
ROWS_SHOWN = 2  # epsilons in a figure of pictures: the largest
ROWS_PRINTED = 3  # and in the table; a robust net is attacked with these alone


@dataclass
class Attacked:
    """A data set under one attack: the pictures, and what the net says of them."""

    epsilon: float
    pictures: Tensor
    predicted: Tensor
    noise: Tensor | None = None  # where all pictures have the same


@dataclass
class Target:
    """A net, what it says of the clean pictures, and all attacks on it."""

    net: nn.Module
    about: dict[str, Any]
    before: Tensor
    attacks: dict[str, list[Attacked]]


def run_attacks(
    net: nn.Module,
    train: Dataset | None,
    dev: Dataset,
    epsilons: list[float],
    seed: int,
    quick: bool = False,
    objectives: dict[str, bool] = OBJECTIVES,
) -> dict[str, list[Attacked]]:
    """Attack the dev set in all ways; return the results by attack, one for each epsilon.

    Args:
        train: one noise for all pictures is fitted on these; None leaves these attacks out.
        epsilons: from small to large.
        objectives: ways to fit one noise; True is the report's, to the next label.
    """
    attacks: dict[str, list[Attacked]] = {}

    def add(name: str, epsilon: float, pictures: Tensor, noise: Tensor | None = None) -> None:
        predicted = predict_logits(net, pictures).argmax(dim=1)
        attacks.setdefault(name, []).append(Attacked(epsilon, pictures, predicted, noise))

    clean = weakened = as_input(dev.pictures)
    predicted = predict_logits(net, clean).argmax(dim=1)
    pgd_steps, noise_steps = (2, 20) if quick else (PGD_STEPS, NOISE_STEPS)
    for epsilon in tqdm(epsilons, desc="epsilons", disable=None):
        torch.manual_seed(seed)
        noises = {"random_noise": random_noise(epsilon)}
        for name, to_next_label in objectives.items() if train else ():
            noises[name] = fit_one_noise(net, train, epsilon, seed, to_next_label, noise_steps)
        for name, noise in noises.items():
            add(name, epsilon, add_noise(clean, noise), noise)
        add("fgsm", epsilon, in_batches(fgsm, net, clean, dev.labels, epsilon=epsilon))
        # What a smaller epsilon has fooled is fooled: only the rest is attacked again.
        left = predicted == dev.labels
        weakened = weakened.clone()
        weakened[left] = in_batches(
            pgd, net, clean[left], dev.labels[left], epsilon=epsilon, steps=pgd_steps
        )
        add("pgd", epsilon, weakened)
        predicted = attacks["pgd"][-1].predicted
    return {name: attacks[name] for name in ATTACK_TITLES if name in attacks}


def rates_of(labels: Tensor, before: Tensor, after: Tensor, seed: int) -> dict[str, Any]:
    """Return what an attack did, given the classes predicted before and after it, [N] each.

    Returns:
        the scores over all pictures with their intervals; `success_rate`: of the pictures that
        the net had right, the share that it has wrong now (None if it had none right), with
        Wilson's 95% interval; and the class that the net now names most, with its share.
    """
    right = before == labels
    fooled = int((after != labels)[right].sum())
    share, favourite = (torch.bincount(after) / len(after)).max(dim=0)
    rates = evaluate_predictions(labels, after, seed) | {
        "success_rate": None,
        "favourite": {"class": CLASS_NAMES[favourite], "share": share.item()},
    }
    if right.any():
        interval = binomtest(fooled, int(right.sum())).proportion_ci(method="wilson")
        rates["success_rate"] = fooled / int(right.sum())
        rates["interval"]["success_rate"] = [interval.low, interval.high]
    return rates


def numbers_of(target: Target, labels: Tensor, seed: int) -> dict[str, Any]:
    """Return what the JSON file says of a net: its scores clean, and under each attack."""
    return {
        "checkpoint": target.about,
        "clean": evaluate_predictions(labels, target.before, seed),
        "attacks": {
            name: {
                f"{each.epsilon:.3g}": rates_of(labels, target.before, each.predicted, seed)
                for each in attacked
            }
            for name, attacked in target.attacks.items()
        },
    }


def choose_examples(labels: Tensor, before: Tensor, after: Tensor) -> list[int]:
    """Return the indices of a few fooled pictures, the classes in turn, as in the report."""
    fooled = torch.nonzero((before == labels) & (after != labels)).flatten().tolist()
    of_class = [[i for i in fooled if labels[i] == label] for label in range(len(CLASS_NAMES))]
    in_turn = chain.from_iterable(zip_longest(*of_class))
    return [i for i in in_turn if i is not None][:SHOWN]


def draw_attacks(title: str, dataset: Dataset, before: Tensor, attacks: list[Attacked]) -> Figure:
    """Return figure 4 or 5: for each epsilon a few fooled pictures, clean, noise and result."""
    rows = 3 * len(attacks)
    figure, axes = figures.new_figure(rows, SHOWN, width=8, height=1.75 * rows + 0.6)
    figure.suptitle(title)
    for ax in axes:
        ax.axis("off")
    for number, attacked in enumerate(attacks):
        examples = choose_examples(dataset.labels, before, attacked.predicted)
        if not examples:
            axes[number * 3 * SHOWN].set_title(f"none fooled at {attacked.epsilon:.3g}", fontsize=8)
        for column, index in enumerate(examples):
            first = number * 3 * SHOWN + column
            _draw_example(axes[first::SHOWN][:3], dataset, attacked, index)
        axes[number * 3 * SHOWN + 2 * SHOWN].set_ylabel(f"epsilon {attacked.epsilon:.3g}")
    return figure


def _draw_example(axes: list[Axes], dataset: Dataset, attacked: Attacked, index: int) -> None:
    """Draw one picture in three axes: clean, the noise (magnified to full contrast), attacked."""
    clean, result = as_input(dataset.pictures[index]), attacked.pictures[index]
    true, predicted = CLASS_NAMES[dataset.labels[index]], CLASS_NAMES[attacked.predicted[index]]
    figures.show_picture(axes[0], clean, true)
    figures.show_picture(axes[1], magnify(result - clean, attacked.epsilon), "noise, magnified")
    figures.show_picture(axes[2], result, f"{true} -> {predicted}")
    for ax in axes:
        ax.axis("on")


def magnify(noise: Tensor, epsilon: float) -> Tensor:
    """Return noise as a picture: -epsilon is black, 0 grey, +epsilon full brightness."""
    return (noise / (2 * epsilon) + 0.5).clamp(0, 1)


def draw_noises(attacks: dict[str, list[Attacked]]) -> Figure:
    """Return a figure of the noises that are one for all pictures, magnified."""
    shown = {name: found for name, found in attacks.items() if found[0].noise is not None}
    columns = len(next(iter(shown.values())))
    figure, axes = figures.new_figure(
        len(shown), columns, width=1.7 * columns + 1, height=2 * len(shown) + 0.6
    )
    for row, (name, found) in enumerate(shown.items()):
        for column, attacked in enumerate(found):
            ax = axes[row * columns + column]
            caption = f"epsilon {attacked.epsilon:.3g}"
            figures.show_picture(ax, magnify(attacked.noise, attacked.epsilon), caption)
        axes[row * columns].set_ylabel(ATTACK_TITLES[name], fontsize=8)
    figure.suptitle("One noise for all pictures, magnified to full contrast")
    return figure


def draw_epsilons(numbers: dict[str, dict[str, Any]]) -> Figure:
    """Return a figure of each net, a row, and score, a column: what is left at each epsilon."""
    rows = len(numbers)
    figure, axes = figures.new_figure(rows, len(SCORE_TITLES), width=12, height=3.2 * rows + 0.8)
    panels = [(name, score) for name in numbers for score in SCORE_TITLES]
    for ax, (name, score) in zip(axes, panels, strict=True):
        plot_epsilons(ax, numbers[name], score)
        ax.set_title(f"{name} net: {SCORE_TITLES[score]}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def plot_epsilons(ax: Axes, numbers: dict[str, Any], score: str) -> Axes:
    """Draw a score of one net against epsilon, one curve an attack, with its 95% interval."""
    styles = zip(ATTACK_TITLES, figures.PALETTE, ("o-", "s-", "^-", "D--", "v:"), strict=False)
    for name, colour, style in styles:
        if name not in numbers["attacks"]:
            continue
        by_epsilon = {"0": numbers["clean"]} | numbers["attacks"][name]
        epsilons = [float(epsilon) for epsilon in by_epsilon]
        low, high = zip(*(each["interval"][score] for each in by_epsilon.values()), strict=True)
        values = [each[score] for each in by_epsilon.values()]
        ax.plot(epsilons, values, style, color=colour, label=ATTACK_TITLES[name], ms=4)
        ax.fill_between(epsilons, low, high, color=colour, alpha=0.12, lw=0)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("epsilon, share of full brightness")
    ax.grid(alpha=0.3)
    return ax


def gradient_map(net: nn.Module, picture: Tensor, label: int) -> Tensor:
    """Return how much each pixel matters for the loss, [32, 32], the most important 1.

    It is the size of the loss's gradient, summed over the colours: a saliency map (Simonyan et
    al., "Deep inside convolutional networks", 2014).
    """
    device = next(net.parameters()).device
    gradient, _ = loss_gradient(net, picture[None].to(device), torch.tensor([label], device=device))
    sizes = gradient[0].abs().sum(dim=0).cpu()
    return sizes / sizes.max().clamp_min(torch.finfo().tiny)


def draw_gradient_maps(dataset: Dataset, targets: dict[str, Target], number: int) -> Figure:
    """Return a figure of what each net looks at before and after FGSM, for figure 4's pictures.

    Args:
        number: of the epsilon.
    """
    first = next(iter(targets.values()))
    examples = choose_examples(
        dataset.labels, first.before, first.attacks["fgsm"][number].predicted
    )
    rows = 1 + 2 * len(targets)
    figure, axes = figures.new_figure(rows, SHOWN, width=8, height=1.75 * rows + 0.8)
    for ax in axes:
        ax.axis("off")
    for column, index in enumerate(examples):
        label = int(dataset.labels[index])
        clean = as_input(dataset.pictures[index])
        figures.show_picture(axes[column], clean, CLASS_NAMES[label]).axis("on")
        for row, (name, target) in enumerate(targets.items()):
            attacked = target.attacks["fgsm"][number]
            views = (
                ("clean", clean, target.before[index]),
                ("attacked", attacked.pictures[index], attacked.predicted[index]),
            )
            for offset, (when, picture, predicted) in enumerate(views):
                ax = axes[(1 + 2 * row + offset) * SHOWN + column]
                shown = gradient_map(target.net, picture, label)
                ax.imshow(shown.numpy(), cmap="magma", vmin=0, vmax=1)
                ax.set_title(f"{name}, {when}: {CLASS_NAMES[predicted]}", fontsize=8)
    epsilon = first.attacks["fgsm"][number].epsilon
    figure.suptitle(
        f"Where a change of the picture changes the loss most (bright), before and after FGSM\n"
        f"with epsilon {epsilon:.3g}, and what each net says"
    )
    return figure


def parse_epsilon(text: str) -> float:
    """Read an epsilon: above 0, and at most 1, which is full brightness."""
    epsilon = console.positive_number(text)
    if epsilon > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1, which is full brightness")
    return epsilon


def print_rates(numbers: dict[str, dict[str, Any]]) -> None:
    """Print one row a net, attack and epsilon, and what the report had."""
    rows = []
    for name, of_net in numbers.items():
        rows.append([name, "none", "", *_cells(of_net["clean"])])
        for attack, by_epsilon in of_net["attacks"].items():
            for epsilon in list(by_epsilon)[-ROWS_PRINTED:]:
                rows.append([name, ATTACK_TITLES[attack], epsilon, *_cells(by_epsilon[epsilon])])
    for attack, scores in REPORT_SCORES.items():
        percents = [f"{scores[score]:.1%}" for score in ("accuracy", "balanced_accuracy")]
        rows.append(["report", attack, scores["epsilon"], *percents, "", ""])
    titles = [*SCORE_TITLES.values(), "fooled"]
    console.print_table(["net", "attack", "epsilon", *titles], rows)
    print(
        "In brackets: 95% intervals. fooled: of the pictures that the net had right. The others"
        "\nare over all pictures; the report's FGSM numbers leave out those already wrong."
    )


def _cells(scores: dict[str, Any]) -> list[str]:
    """Return the cells of a table's row: scores, of the last two with their intervals."""
    success = scores.get("success_rate")
    low, high = scores["interval"]["g_mean"]
    cells = [f"{scores['accuracy']:.1%}", f"{scores['balanced_accuracy']:.1%}"]
    cells.append(f"{scores['g_mean']:.3f} [{low:.3f}, {high:.3f}]")
    if success is None:
        return [*cells, ""]
    low, high = scores["interval"]["success_rate"]
    return [*cells, f"{success:.1%} [{low:.0%}, {high:.0%}]"]


def print_lesson(numbers: dict[str, Any]) -> None:
    """Say what one noise for all pictures does to accuracy, and what it really does."""
    for epsilon, scores in numbers["attacks"].get("one_noise", {}).items():
        favourite = scores["favourite"]
        print(
            f"One noise of {epsilon}: the net says {favourite['class']} to "
            f"{favourite['share']:.0%} of all pictures; accuracy {scores['accuracy']:.1%}, "
            f"average accuracy {scores['balanced_accuracy']:.1%}, G-mean {scores['g_mean']:.3f}."
        )


def draw_all(
    results: Results, dev: Dataset, targets: dict[str, Target], numbers: dict[str, Any]
) -> None:
    """Draw the report's figures 4 and 5, of the plain net, and those that go beyond them."""
    plain = targets["plain"]
    largest = {name: found[-ROWS_SHOWN:] for name, found in plain.attacks.items()}
    titles = {
        "fgsm": ("4-fgsm", "FGSM: each picture has its own noise"),
        "one_noise": ("5-one-noise", "One noise for all pictures"),
    }
    for name, (file, title) in titles.items():
        if name in largest:
            results.save_figure(file, draw_attacks(title, dev, plain.before, largest[name]))
    results.save_figure("5-noises", draw_noises(plain.attacks))
    results.save_figure("5-epsilons", draw_epsilons(numbers))
    number = -min(ROWS_SHOWN, len(plain.attacks["fgsm"]))
    results.save_figure("5-gradients", draw_gradient_maps(dev, targets, number))


def save_pictures(results: Results, dev: Dataset, targets: dict[str, Target]) -> None:
    """Write what was attacked and what came out, float32 [N, 3, 32, 32] in [0, 1].

    One file a net, `attacked-<net>.npz`, with `clean`, `labels` and `<attack> <epsilon>`.
    """
    clean = {"clean": as_input(dev.pictures).numpy(), "labels": dev.labels.numpy()}
    for name, target in targets.items():
        attacked = {
            f"{attack} {each.epsilon:.3g}": each.pictures.numpy()
            for attack, found in target.attacks.items()
            for each in found
        }
        results.save(f"attacked-{name}.npz", partial(np.savez, **clean, **attacked))


def load_robust(
    path: Path | None, results: Results, train: Dataset | None, dev: Dataset
) -> tuple[nn.Module, dict[str, Any]] | None:
    """Return the net to compare with: the one named, or else one that fits the data, if any."""
    own = results.folder / f"{ROBUST.name}.ckpt"
    if path is None and own.exists() and (train is None or is_trained_on(own, train)):
        path = own
    if path is None and dev.source != "sketches":  # the one that ships has learnt photographs
        path = SHIPPED_ROBUST
    if path is None:
        print(
            f"no robust net of {dev.source} to compare with; training.py --recipe robust makes one"
        )
        return None
    net, about = load_checkpoint(path)
    print(f"beside it: {path}, {in_words(about)}")
    return net, {"file": path.name, **about}


def main() -> None:
    """Attack a net on the dev set, and a robust one beside it."""
    parser = console.make_parser(__doc__)
    add_checkpoint_options(parser, "results/<data>/final.ckpt, trained first if need be")
    parser.add_argument(
        "--robust",
        type=Path,
        metavar="FILE",
        help="the net to compare with; without it, results/<data>/robust.ckpt, or else, but for "
        "sketches, models/robust.ckpt",
    )
    parser.add_argument(
        "--epsilons",
        type=parse_epsilon,
        nargs="+",
        default=[round(epsilon, 4) for epsilon in EPSILONS],
        help="largest change of a pixel, as a share of full brightness",
    )
    parser.add_argument(
        "--save-pictures",
        action="store_true",
        help="write all attacked pictures too, as numpy arrays, 10 MB an attack and epsilon",
    )
    arguments = parser.parse_args()
    source = open_source(arguments.data, arguments.data_seed)
    dev = source.load("dev", arguments.quick)
    train = source.load("train", arguments.quick) if source.has("train") else None
    results = Results(arguments, describe(train, dev))
    net, about = load_or_train(arguments, results, train, dev, arguments.seed)
    device = machine.choose_device(arguments.device)
    nets = {"plain": (net, about)}
    robust = load_robust(arguments.robust, results, train, dev)
    if robust:
        nets["robust"] = robust
    if train is None:
        print("no training set here to fit the one noise for all on: that attack is left out")

    machine.keep_freed_memory()
    targets, numbers = {}, {}
    epsilons = sorted(set(arguments.epsilons))
    for name, (net, about) in nets.items():
        net = net.to(device)
        before = predict_logits(net, dev.pictures).argmax(dim=1)
        chosen, objectives = epsilons, OBJECTIVES
        if name == "robust":  # it is the slower to attack, and the smallest do little to it
            chosen, objectives = epsilons[-ROWS_PRINTED:], {"one_noise": False}
        attacks = run_attacks(net, train, dev, chosen, arguments.seed, arguments.quick, objectives)
        targets[name] = Target(net, about, before, attacks)
        numbers[name] = numbers_of(targets[name], dev.labels, arguments.seed)
    print_rates(numbers)
    print_lesson(numbers["plain"])
    draw_all(results, dev, targets, numbers)
    results.save_json("adversarial", {"nets": numbers})
    if arguments.save_pictures:
        save_pictures(results, dev, targets)
    results.print_written()


if __name__ == "__main__":
    console.run(main)
