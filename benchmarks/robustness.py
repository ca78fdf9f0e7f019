"""How much does a net withstand? Strong attacks by others, the worst of them for each picture.

    python benchmarks/robustness.py --data FOLDER --checkpoints models/robust.ckpt models/best.ckpt

AutoAttack (Croce and Hein, 2020) is the field's yardstick, but its targeted DLR loss needs four
classes. These are its other parts, as torchattacks has them: APGD with cross-entropy and with the
DLR loss, FAB against each other class, and Square, which needs no gradient. As in AutoAttack,
each part attacks only what those before it have left right, so that the last row is the worst
case. Our own PGD stands first.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchattacks
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from adversarial import parse_epsilon, rates_of
from common import console, machine
from common.attacks import in_batches, pgd
from common.dataset import CLASS_NAMES, PARTS, Dataset, as_input, open_source
from common.network import load_checkpoint, predict_logits

EPSILON = 8 / 255
MODELS = console.PROJECT / "models"

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def attacks_with(epsilon: float, seed: int, queries: int, quick: bool) -> dict[str, Attack]:
    """Return the attacks in the order in which they are tried, the quick ones first."""
    steps, queries = (2, 10) if quick else (100, queries)
    settings = {"eps": epsilon, "seed": seed}
    libraries = {
        "APGD, cross-entropy": (torchattacks.APGD, {"steps": steps, "loss": "ce"}),
        "APGD, DLR": (torchattacks.APGD, {"steps": steps, "loss": "dlr"}),
        "FAB, each other class": (
            torchattacks.FAB,
            {"steps": steps, "multi_targeted": True, "n_classes": len(CLASS_NAMES)},
        ),
        "Square": (torchattacks.Square, {"n_queries": queries}),
    }
    attacks: dict[str, Attack] = {"PGD, ours, 40 steps": partial(pgd, epsilon=epsilon)}
    for name, (kind, more) in libraries.items():
        attacks[name] = partial(_by_library, kind, settings | more)
    return attacks


def _by_library(
    kind: type, settings: dict[str, float], net: nn.Module, pictures: Tensor, labels: Tensor
) -> Tensor:
    return kind(net, **settings)(pictures, labels)


def attack_in_turn(
    net: nn.Module, dataset: Dataset, attacks: dict[str, Attack], epsilon: float
) -> dict[str, Tensor]:
    """Return what the net says, [N], of the clean pictures and after each attack in turn."""
    clean = as_input(dataset.pictures)
    predicted = predict_logits(net, clean).argmax(dim=1)
    after = {"none": predicted}
    for name, attack in tqdm(attacks.items(), desc="attacks", disable=None):
        left = torch.nonzero(predicted == dataset.labels).flatten()
        if len(left):
            attacked = in_batches(attack, net, clean[left], dataset.labels[left])
            farthest = (attacked - clean[left]).abs().max().item()
            assert farthest <= epsilon + 1e-6, f"{name} moved a pixel by {farthest}"
            predicted = predicted.clone()
            predicted[left] = predict_logits(net, attacked).argmax(dim=1)
        after[name] = predicted
    return after


def main() -> None:
    """Print the table."""
    parser = console.make_parser(__doc__, benchmark=True)
    parser.add_argument(
        "--checkpoints", type=Path, nargs="+", default=[MODELS / "robust.ckpt"], metavar="FILE"
    )
    parser.add_argument("--epsilon", type=parse_epsilon, default=EPSILON)
    parser.add_argument(
        "--queries",
        type=console.positive_whole_number,
        default=5000,
        help="of Square, for each picture; AutoAttack's 5000 take most of the time",
    )
    parser.add_argument("--part", choices=PARTS, default="dev")
    arguments = parser.parse_args()
    dataset = open_source(arguments.data, arguments.data_seed).load(arguments.part, arguments.quick)
    machine.keep_freed_memory()
    attacks = attacks_with(arguments.epsilon, arguments.seed, arguments.queries, arguments.quick)
    rows = []
    for path in arguments.checkpoints:
        net, _ = load_checkpoint(path)
        after = attack_in_turn(net, dataset, attacks, arguments.epsilon)
        for name, predicted in after.items():
            rates = rates_of(dataset.labels, after["none"], predicted, arguments.seed)
            low, high = rates["interval"]["g_mean"]
            rows.append(
                [
                    path.name,
                    name if name == "none" else f"+ {name}",
                    f"{rates['accuracy']:.1%}",
                    f"{rates['balanced_accuracy']:.1%}",
                    f"{rates['g_mean']:.3f} [{low:.3f}, {high:.3f}]",
                    *(f"{recall:.2f}" for recall in rates["recall"].values()),
                    "-" if rates["success_rate"] is None else f"{rates['success_rate']:.1%}",
                ]
            )
    print(f"{len(dataset)} pictures of {dataset.source}, epsilon {arguments.epsilon:.4f}")
    titles = ["net", "attacks so far", "accuracy", "average", "G-mean", *CLASS_NAMES, "fooled"]
    console.print_table(titles, rows)


if __name__ == "__main__":
    console.run(main)
