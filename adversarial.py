"""Step 5: noise that a person hardly sees, and that makes the net wrong.

    python adversarial.py
    python adversarial.py --epsilons 0.01 0.02 0.05 --checkpoint models/pre_trained.ckpt

Epsilon is in pixel units everywhere: 0.05 lets each pixel change by 5% of full brightness. It
can't mean anything else here, as normalising is part of the net.
"""

import argparse
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from common import console, figures, machine
from common.batches import least_sampled
from common.dataset import CLASS_NAMES, Dataset, as_input, describe, open_source
from common.network import predict_logits
from common.results import Results
from evaluation import SCORE_TITLES, add_checkpoint_options, evaluate_predictions
from training import load_or_train

REPORT_EPSILONS = (0.05, 0.1)
# The report does not say for which of its epsilons its FGSM numbers stand, and left out the
# pictures that the net had wrong already; its one noise had no bound at all.
REPORT_SCORES: dict[str, dict[str, Any]] = {
    "FGSM": {"epsilon": "0.05, 0.1", "accuracy": 0.105, "balanced_accuracy": 0.128},
    "one noise": {"epsilon": "unbounded", "accuracy": 0.638, "balanced_accuracy": 0.475},
}
ATTACK_TITLES = {
    "random_noise": "random noise",
    "fgsm": "FGSM",
    "one_noise": "one noise",
    "one_noise_to_next_label": "one noise, to label + 1",
}
ATTACK_BATCH = 500
NOISE_STEPS = 200  # of the one noise for all; twice as many change little
NOISE_BATCH = 128
FIRST_NOISE_STEP = 0.1  # of epsilon; later steps shrink to 0
SHOWN = 5  # pictures a row in the figures


def loss_gradient(net: nn.Module, pictures: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the cross-entropy by the pixels, [B, 3, 32, 32].

    The loss is summed over the batch, so that a picture's gradient does not depend on others.
    """
    pictures = pictures.detach().requires_grad_()
    loss = F.cross_entropy(net(pictures), labels, reduction="sum")
    return torch.autograd.grad(loss, pictures)[0]


def fgsm(net: nn.Module, pictures: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """Fast gradient sign method (Goodfellow et al., 2015): one step of full size, up the loss.

    Norm: each pixel moves by at most epsilon (L-infinity).

    Args:
        net: in evaluation mode.
        pictures: float32 [B, 3, 32, 32] in [0, 1].
        labels: int64 [B].
        epsilon: in pixel units, 0 to 1.

    Returns:
        the attacked pictures, float32 [B, 3, 32, 32] in [0, 1].
    """
    gradient = loss_gradient(net, pictures, labels)
    return (pictures + epsilon * gradient.sign()).clamp(0, 1)


def add_noise(pictures: Tensor, noise: Tensor) -> Tensor:
    """Add one noise, [3, 32, 32], to pictures in [0, 1] and keep them there."""
    return (pictures + noise).clamp(0, 1)


def random_noise(epsilon: float) -> Tensor:
    """Return noise that knows nothing of the net, [3, 32, 32]: plus or minus epsilon by chance.

    It is as strong as an attack of this epsilon may be, so it shows what strength alone does.
    """
    return epsilon * (2.0 * torch.randint(0, 2, (3, 32, 32)) - 1)


def fit_one_noise(
    net: nn.Module,
    train: Dataset,
    epsilon: float,
    seed: int,
    to_next_label: bool = False,
    steps: int = NOISE_STEPS,
) -> Tensor:
    """Fit one noise for all pictures: a universal perturbation (Moosavi-Dezfooli et al., 2017).

    It starts at random within the epsilon ball; each step goes up the loss of the right labels,
    then back into the ball. Classes are drawn in equal parts, so that it can't win by fooling
    cars alone.

    Args:
        net: in evaluation mode.
        train: fitted on these; an attack that is tested on the pictures it was fitted on
            looks stronger than it is.
        epsilon: in pixel units; no pixel of the noise is larger (L-infinity).
        seed: of the start and of the order of the pictures.
        to_next_label: go down the loss of the wrong label (label + 1) instead, as the report
            did. That asks one noise to push cars to trucks, trucks to cats and cats to cars.
        steps: how many; their size shrinks to 0.

    Returns:
        noise, float32 [3, 32, 32].
    """
    torch.manual_seed(seed)
    device = next(net.parameters()).device
    noise = torch.empty(3, 32, 32).uniform_(-epsilon, epsilon).to(device)
    direction, shift = (-1, 1) if to_next_label else (1, 0)
    epochs = least_sampled(train.labels)
    batches = chain.from_iterable(epoch.split(NOISE_BATCH) for epoch in epochs)
    bar = tqdm(range(steps), desc=f"one noise, epsilon {epsilon:g}", disable=None)
    for step, index in zip(bar, batches, strict=False):
        pictures = as_input(train.pictures[index]).to(device)
        labels = ((train.labels[index] + shift) % len(CLASS_NAMES)).to(device)
        gradient = loss_gradient(net, add_noise(pictures, noise), labels).sum(dim=0)
        step_size = direction * FIRST_NOISE_STEP * epsilon * (1 - step / steps)
        noise = (noise + step_size * gradient.sign()).clamp(-epsilon, epsilon)
    return noise.cpu()


def fgsm_all(net: nn.Module, dataset: Dataset, epsilon: float) -> Tensor:
    """Attack a whole set by FGSM; return the pictures, float32 [N, 3, 32, 32] in [0, 1]."""
    device = next(net.parameters()).device
    attacked = [
        fgsm(net, as_input(pictures).to(device), labels.to(device), epsilon).cpu()
        for pictures, labels in zip(
            dataset.pictures.split(ATTACK_BATCH), dataset.labels.split(ATTACK_BATCH), strict=True
        )
    ]
    return torch.cat(attacked)


def rates_of(labels: Tensor, before: Tensor, after: Tensor, seed: int) -> dict[str, Any]:
    """Return what an attack did, given the classes predicted before and after it, [N] each.

    Returns:
        the scores over all pictures, and `success_rate`: of the pictures that the net had
        right, the share that it has wrong now (None if it had none right).
    """
    right = before == labels
    fooled = (after != labels)[right]
    success_rate = fooled.float().mean().item() if right.any() else None
    return {**evaluate_predictions(labels, after, seed), "success_rate": success_rate}


def choose_examples(labels: Tensor, before: Tensor, after: Tensor) -> list[int]:
    """Return the indices of a few fooled pictures, the classes in turn, as in the report."""
    fooled = torch.nonzero((before == labels) & (after != labels)).flatten().tolist()
    of_class = [[i for i in fooled if labels[i] == label] for label in range(len(CLASS_NAMES))]
    in_turn = chain.from_iterable(zip_longest(*of_class))
    return [i for i in in_turn if i is not None][:SHOWN]


@dataclass
class Attacked:
    """A data set under one attack."""

    epsilon: float
    pictures: Tensor
    predicted: Tensor


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
            axes[number * 3 * SHOWN].set_title(f"none fooled at {attacked.epsilon:g}", fontsize=8)
        for column, index in enumerate(examples):
            first = number * 3 * SHOWN + column
            _draw_example(axes[first::SHOWN][:3], dataset, attacked, index)
        axes[number * 3 * SHOWN + 2 * SHOWN].set_ylabel(f"epsilon {attacked.epsilon:g}")
    return figure


def _draw_example(axes: list[Axes], dataset: Dataset, attacked: Attacked, index: int) -> None:
    """Draw one picture in three axes: clean, the noise (magnified to full contrast), attacked."""
    clean, result = as_input(dataset.pictures[index]), attacked.pictures[index]
    noise = (result - clean) / (2 * attacked.epsilon) + 0.5
    true, predicted = CLASS_NAMES[dataset.labels[index]], CLASS_NAMES[attacked.predicted[index]]
    figures.show_picture(axes[0], clean, true)
    figures.show_picture(axes[1], noise.clamp(0, 1), "noise, magnified")
    figures.show_picture(axes[2], result, f"{true} -> {predicted}")
    for ax in axes:
        ax.axis("on")


def parse_epsilon(text: str) -> float:
    """Read an epsilon: above 0, and at most 1, which is full brightness."""
    epsilon = console.positive_number(text)
    if epsilon > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is above 1, which is full brightness")
    return epsilon


def run_attacks(
    net: nn.Module,
    train: Dataset | None,
    dev: Dataset,
    epsilons: list[float],
    seed: int,
    steps: int = NOISE_STEPS,
) -> dict[str, list[Attacked]]:
    """Attack the dev set in all ways at all epsilons; return the results by attack."""
    attacks: dict[str, list[Attacked]] = {}

    def add(name: str, epsilon: float, pictures: Tensor) -> None:
        predicted = predict_logits(net, pictures).argmax(dim=1)
        attacks.setdefault(name, []).append(Attacked(epsilon, pictures, predicted))

    clean = as_input(dev.pictures)
    for epsilon in epsilons:
        torch.manual_seed(seed)
        add("random_noise", epsilon, add_noise(clean, random_noise(epsilon)))
        add("fgsm", epsilon, fgsm_all(net, dev, epsilon))
        if train is None:
            continue
        for name, to_next_label in (("one_noise", False), ("one_noise_to_next_label", True)):
            noise = fit_one_noise(net, train, epsilon, seed, to_next_label, steps)
            add(name, epsilon, add_noise(clean, noise))
    return attacks


def print_rates(clean: dict[str, Any], rates: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Print one row an attack and epsilon, after the clean pictures, and what the report had."""
    rows = [["clean pictures", "", *[f"{clean[score]:.3f}" for score in SCORE_TITLES], ""]]
    for attack, by_epsilon in rates.items():
        for epsilon, scores in by_epsilon.items():
            row = [
                ATTACK_TITLES[attack],
                epsilon,
                *[f"{scores[score]:.3f}" for score in SCORE_TITLES],
            ]
            success = scores["success_rate"]
            rows.append([*row, "-" if success is None else f"{success:.1%}"])
    for attack, scores in REPORT_SCORES.items():
        numbers = [f"{scores[score]:.3f}" if score in scores else "-" for score in SCORE_TITLES]
        rows.append([f"report: {attack}", scores["epsilon"], *numbers, "-"])
    console.print_table(["attack", "epsilon", *SCORE_TITLES.values(), "fooled"], rows)
    print(
        "fooled: of the pictures that the net had right. The other columns are over all pictures;"
    )
    print("the report's FGSM numbers leave out those that its net had wrong already.")


def main() -> None:
    """Attack a net on the dev set."""
    parser = console.make_parser(__doc__)
    add_checkpoint_options(parser, "results/<data>/final.ckpt, trained first if need be")
    parser.add_argument(
        "--epsilons",
        type=parse_epsilon,
        nargs="+",
        default=list(REPORT_EPSILONS),
        help="largest change of a pixel, as a share of full brightness",
    )
    arguments = parser.parse_args()
    source = open_source(arguments.data, arguments.data_seed)
    dev = source.load("dev", arguments.quick)
    train = source.load("train", arguments.quick) if source.has("train") else None
    results = Results(arguments, describe(train, dev))
    net, about = load_or_train(arguments, results, train, dev, arguments.seed)
    if train is None:
        print("no training set here to fit the one noise for all on: that attack is left out")

    machine.keep_freed_memory()
    before = predict_logits(net, dev.pictures).argmax(dim=1)
    epsilons, steps = sorted(set(arguments.epsilons)), 20 if arguments.quick else NOISE_STEPS
    attacks = run_attacks(net, train, dev, epsilons, arguments.seed, steps)
    clean = evaluate_predictions(dev.labels, before, arguments.seed)
    rates = {
        name: {
            f"{each.epsilon:g}": rates_of(dev.labels, before, each.predicted, arguments.seed)
            for each in attacked
        }
        for name, attacked in attacks.items()
    }
    print_rates(clean, rates)
    titles = {
        "fgsm": ("4-fgsm", "FGSM: each picture has its own noise"),
        "one_noise": ("5-one-noise", "One noise for all pictures"),
    }
    for name, (file, title) in titles.items():
        if name in attacks:
            results.save_figure(file, draw_attacks(title, dev, before, attacks[name]))
    results.save_json("adversarial", {"checkpoint": about, "clean": clean, "attacks": rates})
    results.print_written()


if __name__ == "__main__":
    console.run(main)
