"""How fast and how strong is our PGD, against the libraries that most people use?

    python benchmarks/attacks.py --data FOLDER --checkpoints models/robust.ckpt

All take 40 steps of the same size from a random start, with the same epsilon, on the whole dev
set. They take turns, so that a busy moment of the machine hits all alike.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import foolbox
import torch
import torchattacks
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from adversarial import parse_epsilon
from common import console, machine
from common.attacks import in_batches, pgd
from common.dataset import as_input, open_source
from common.network import load_checkpoint, predict_logits

ROUNDS = 3
STEPS = 40
MODELS = console.PROJECT / "models"


def by_torchattacks(
    net: nn.Module, pictures: Tensor, labels: Tensor, epsilon: float, step_size: float
) -> Tensor:
    """Attack by torchattacks.PGD."""
    return torchattacks.PGD(net, epsilon, step_size, STEPS)(pictures, labels)


def by_foolbox(
    net: nn.Module, pictures: Tensor, labels: Tensor, epsilon: float, step_size: float
) -> Tensor:
    """Attack by foolbox's LinfPGD."""
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device=next(net.parameters()).device)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=STEPS)
    return attack(model, pictures, labels, epsilons=epsilon)[1]


CONTESTANTS = {
    "torchattacks.PGD": by_torchattacks,
    "foolbox LinfPGD": by_foolbox,
    "ours": partial(pgd, steps=STEPS),
}


def compare(
    net: nn.Module, pictures: Tensor, labels: Tensor, epsilon: float
) -> dict[str, tuple[float, float]]:
    """Return the median time in seconds, and the accuracy left, of each contestant."""
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    left: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(ROUNDS):
        for name, attack in CONTESTANTS.items():
            torch.manual_seed(number)
            start = time.perf_counter()
            attacked = in_batches(
                attack, net, pictures, labels, epsilon=epsilon, step_size=epsilon / 10
            )
            times[name].append(time.perf_counter() - start)
            right = predict_logits(net, attacked).argmax(dim=1) == labels
            left[name].append(right.float().mean().item())
    return {
        name: (statistics.median(times[name]), statistics.mean(left[name])) for name in CONTESTANTS
    }


def main() -> None:
    """Print the table."""
    parser = console.make_parser(__doc__, benchmark=True)
    parser.add_argument(
        "--checkpoints",
        type=Path,
        nargs="+",
        default=[MODELS / "tuned.ckpt", MODELS / "robust.ckpt"],
        metavar="FILE",
    )
    parser.add_argument("--epsilon", type=parse_epsilon, default=8 / 255)
    arguments = parser.parse_args()
    dev = open_source(arguments.data, arguments.data_seed).load("dev", arguments.quick)
    machine.keep_freed_memory()
    rows = []
    for path in arguments.checkpoints:
        net, _ = load_checkpoint(path)
        measured = compare(net, as_input(dev.pictures), dev.labels, arguments.epsilon)
        for name, (seconds, accuracy) in measured.items():
            ratio = seconds / measured["ours"][0]
            rows.append([path.name, name, f"{seconds:.2f} s", f"{ratio:.1f}", f"{accuracy:.1%}"])
    print(f"{len(dev)} pictures of {dev.source}, epsilon {arguments.epsilon:.4f}, {STEPS} steps")
    console.print_table(["net", "attack", "median", "times ours", "accuracy left"], rows)


if __name__ == "__main__":
    console.run(main)
