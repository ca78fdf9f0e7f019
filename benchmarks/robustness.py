"""How robust is a model? Strong attacks by other libraries, the worst of them for each image.

    python benchmarks/robustness.py --data FOLDER --checkpoint models/robust.ckpt models/best.ckpt

AutoAttack (Croce and Hein, 2020) is the standard benchmark, but its targeted DLR loss needs four
classes. These are its other parts, as torchattacks has them: APGD with cross-entropy and with the
DLR loss, FAB against each other class, and Square, which needs no gradient. As in AutoAttack, each
part attacks only the images that those before it have left correct, so that the last row is the
worst case. Our own PGD comes first.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli, metrics
from common.attacks import in_batches, pgd
from common.data import CLASS_NAMES, SPLITS, Dataset, open_data, to_float
from common.metrics import SCORE_TITLES
from common.model import Classifier, choose_device, load_checkpoint, predict_logits

import torch
import torchattacks
from torch import Tensor
from tqdm import tqdm

MODELS = cli.PROJECT / "models"

Attack = Callable[[Classifier, Tensor, Tensor], Tensor]


def make_attacks(epsilon: float, seed: int, queries: int, quick: bool) -> dict[str, Attack]:
    """Return the attacks in the order in which they are tried, the fast ones first."""
    steps, queries = (2, 10) if quick else (100, queries)
    fab = {"steps": steps, "multi_targeted": True, "n_classes": len(CLASS_NAMES)}

    def attack_by(kind: type, **settings: Any) -> Attack:
        return lambda model, *batch: kind(model, eps=epsilon, seed=seed, **settings)(*batch)

    return {
        "PGD, ours, 40 steps": partial(pgd, epsilon=epsilon),
        "APGD, cross-entropy": attack_by(torchattacks.APGD, steps=steps, loss="ce"),
        "APGD, DLR": attack_by(torchattacks.APGD, steps=steps, loss="dlr"),
        "FAB, each other class": attack_by(torchattacks.FAB, **fab),
        "Square": attack_by(torchattacks.Square, n_queries=queries),
    }


def attack_in_turn(
    model: Classifier, dataset: Dataset, attacks: dict[str, Attack], epsilon: float
) -> dict[str, Tensor]:
    """Return the classes, [N], predicted for clean images and after each attack in turn."""
    clean = to_float(dataset.images)
    predicted = predict_logits(model, clean).argmax(dim=1)
    after = {"none": predicted}
    for name, attack in tqdm(attacks.items(), desc="attacks", disable=None):
        left = torch.nonzero(predicted == dataset.labels).flatten()
        if len(left):
            attacked = in_batches(attack, model, clean[left], dataset.labels[left])
            largest = (attacked - clean[left]).abs().max().item()
            assert largest <= epsilon + 1e-6, f"{name} changed a pixel by {largest}"
            predicted = predicted.clone()
            predicted[left] = predict_logits(model, attacked).argmax(dim=1)
        after[name] = predicted
    return after


def row_of(dataset: Dataset, before: Tensor, after: Tensor) -> list[str]:
    """Return scores, recalls and attack success rate as the cells of a row."""
    scores = metrics.evaluate(dataset.labels, after)
    low, high = scores["interval"]["g_mean"]
    correct = before == dataset.labels
    success_rate = (after != dataset.labels)[correct].float().mean().item()
    return [
        f"{scores['accuracy']:.3f}",
        f"{scores['balanced_accuracy']:.3f}",
        f"{scores['g_mean']:.3f} [{low:.3f}, {high:.3f}]",
        *(f"{recall:.2f}" for recall in scores["recall"].values()),
        f"{success_rate:.3f}",
    ]


def main() -> None:
    """Print the table."""
    parser = cli.make_parser(__doc__, writes_files=False)
    cli.add_checkpoint_option(parser, "models/robust.ckpt", several=True)
    parser.add_argument("--epsilon", type=cli.epsilon, default=8 / 255, help=cli.EPSILON_HELP)
    parser.add_argument(
        "--queries",
        type=cli.positive_int,
        default=5000,
        help="of Square, for each image; AutoAttack's 5000 take most of the time",
    )
    parser.add_argument("--split", choices=SPLITS, default="dev", help="the split to attack")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    dataset = open_data(arguments.data).load(arguments.split, arguments.quick)
    attacks = make_attacks(arguments.epsilon, arguments.seed, arguments.queries, arguments.quick)
    rows = []
    for path in arguments.checkpoint or [MODELS / "robust.ckpt"]:
        model = load_checkpoint(path, arguments.pixel_range, strict_range=False).model
        torch.manual_seed(arguments.seed)  # for our PGD's random start
        after = attack_in_turn(model.to(device), dataset, attacks, arguments.epsilon)
        for name, predicted in after.items():
            attack = name if name == "none" else f"+ {name}"
            rows.append([path.name, attack, *row_of(dataset, after["none"], predicted)])
    cli.say(f"{len(dataset)} images of {dataset.name}, epsilon {arguments.epsilon:g}")
    recalls = [f"{name} recall" for name in CLASS_NAMES]
    columns = ["model", "attacks so far", *SCORE_TITLES.values(), *recalls, "attack success rate"]
    cli.print_table(columns, rows)


if __name__ == "__main__":
    cli.run(main)
