"""How fast and how strong is our PGD, compared with the libraries that most people use?

    python benchmarks/attacks.py --data FOLDER --checkpoint models/robust.ckpt

All take 40 steps of the same size from a random start, with the same epsilon, on the whole dev
set; ours leaves an image alone once it is misclassified. They take turns, so that other load on
the machine affects all of them equally.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli
from common.attacks import in_batches, pgd
from common.data import open_data, to_float
from common.model import Classifier, choose_device, load_checkpoint, predict_logits

import foolbox
import torch
import torchattacks
from torch import Tensor

ROUNDS = 3
STEPS = 40
MODELS = cli.PROJECT / "models"


def pgd_of_torchattacks(
    model: Classifier, images: Tensor, labels: Tensor, epsilon: float, alpha: float
) -> Tensor:
    """Attack by torchattacks.PGD."""
    return torchattacks.PGD(model, epsilon, alpha, STEPS)(images, labels)


def pgd_of_foolbox(
    model: Classifier, images: Tensor, labels: Tensor, epsilon: float, alpha: float
) -> Tensor:
    """Attack by foolbox's LinfPGD."""
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=STEPS)
    return attack(wrapped, images, labels, epsilons=epsilon)[1]


CONTESTANTS = {
    "torchattacks.PGD": pgd_of_torchattacks,
    "foolbox LinfPGD": pgd_of_foolbox,
    "ours": partial(pgd, steps=STEPS),
}


def compare(
    model: Classifier, images: Tensor, labels: Tensor, epsilon: float, seed: int
) -> dict[str, tuple[float, float]]:
    """Return each contestant's median time in seconds and mean robust accuracy."""
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    accuracies: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for each in range(seed, seed + ROUNDS):
        for name, attack in CONTESTANTS.items():
            torch.manual_seed(each)
            start = time.perf_counter()
            attacked = in_batches(
                attack, model, images, labels, epsilon=epsilon, alpha=epsilon / 10
            )
            times[name].append(time.perf_counter() - start)
            correct = predict_logits(model, attacked).argmax(dim=1) == labels
            accuracies[name].append(correct.float().mean().item())
    return {
        name: (statistics.median(times[name]), statistics.mean(accuracies[name]))
        for name in CONTESTANTS
    }


def main() -> None:
    """Print the table."""
    parser = cli.make_parser(__doc__, writes_files=False)
    cli.add_checkpoint_option(parser, "models/tuned.ckpt and models/robust.ckpt", several=True)
    parser.add_argument("--epsilon", type=cli.epsilon, default=8 / 255, help=cli.EPSILON_HELP)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    dev = open_data(arguments.data).load("dev", arguments.quick)
    epsilon, seed, rows = arguments.epsilon, arguments.seed, []
    for path in arguments.checkpoint or [MODELS / "tuned.ckpt", MODELS / "robust.ckpt"]:
        model = load_checkpoint(path, arguments.pixel_range, strict_range=False).model
        measured = compare(model.to(device), to_float(dev.images), dev.labels, epsilon, seed)
        for name, (seconds, accuracy) in measured.items():
            ratio = seconds / measured["ours"][0]
            rows.append([path.name, name, f"{seconds:.2f} s", f"{ratio:.1f}", f"{accuracy:.3f}"])
    cli.say(f"{len(dev)} images of {dev.name}, epsilon {epsilon:g}, {STEPS} steps")
    cli.print_table(["model", "attack", "median time", "times ours", "robust accuracy"], rows)


if __name__ == "__main__":
    cli.run(main)
