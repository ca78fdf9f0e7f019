"""What does each ingredient of a recipe give? Leave out one at a time.

    python benchmarks/ablation.py --recipe tuned --label-fixes results/<data>/label_fixes.csv

Each variant is trained three times, on two thirds of the training set each, and judged on the
third left out: dev stays untouched. --repeats does all of it again, on other thirds. With
--label-fixes, pictures whose labels are doubted are left out of the judging, though not of the
training.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.model_selection import RepeatedStratifiedKFold

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import console, machine
from common.dataset import Dataset, open_source
from common.label_fixes import read_fixes
from common.trainer import Recipe, fit
from evaluation import evaluate
from training import BEST, TUNED, with_epochs

FOLDS = 3
ADAM = {"optimizer": "adam", "learning_rate": 3e-3, "weight_decay": 0.0}  # its best settings
WITHOUT = {
    "Muon (with Adam)": ADAM,
    "flips and shifts": {"plain_share": 1.0},
    "changed colours": {"colour_change": 0.0},
    "one cycle of the rate": {"schedule": "steps"},
    "draws by root of size, adjusted logits": {"balance": 1.0, "adjust_logits": 0.0},
    "weight decay": {"weight_decay": 0.0},
    "mirror images at the end": {"average_flips": False},
    "shifted views at the end": {"average_shifts": 0},
}
WITHOUT_WHAT_BEST_ADDS = {
    "a second net": {"network": "BestNet"},
    "sketches beforehand": {"sketch_epochs": 0},
    "squares cut out": {"cutout": 0},
    "mixup": {"mixup": 0.0},
    "stronger weight decay": {"weight_decay": TUNED.weight_decay},
    "judges of the labels": {"judge": None},
}


def variants_of(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipe whole, and without each of its ingredients.

    Of `best`, only what it adds to `tuned`: the rest stands in the table of that.
    """
    ingredients = WITHOUT if recipe.name == TUNED.name else WITHOUT_WHAT_BEST_ADDS
    return {"all": recipe} | {
        f"without {ingredient}": replace(recipe, **settings)
        for ingredient, settings in ingredients.items()
    }


def score(
    recipe: Recipe, train: Dataset, learnt: np.ndarray, judged: np.ndarray, seed: int
) -> float:
    """Train on the pictures learnt; return the G-mean on those judged."""
    net = fit(recipe, train.take(torch.from_numpy(learnt)), seed, torch.device("cpu"))
    left_out = train.take(torch.from_numpy(judged))
    return evaluate(net, left_out)["g_mean"]


def main() -> None:
    """Print the table: mean and spread over the folds, and what each ingredient gives."""
    parser = console.make_parser(__doc__, benchmark=True)
    parser.add_argument(
        "--recipe", choices=[TUNED.name, BEST.name], default=TUNED.name, help="whose ingredients"
    )
    parser.add_argument(
        "--epochs",
        type=console.positive_whole_number,
        help="how many, in place of the recipe's own",
    )
    parser.add_argument(
        "--repeats",
        type=console.positive_whole_number,
        default=1,
        help="how many divisions into three folds; without it, 1",
    )
    parser.add_argument(
        "--label-fixes",
        type=Path,
        metavar="FILE",
        help="of label_errors.py; pictures that it doubts do not judge",
    )
    arguments = parser.parse_args()
    train = open_source(arguments.data, arguments.data_seed).load("train", arguments.quick)
    fixes = read_fixes(arguments.label_fixes, train) if arguments.label_fixes else []
    doubted = [fix.index for fix in fixes]
    recipe = {each.name: each for each in (TUNED, BEST)}[arguments.recipe]
    variants = variants_of(with_epochs(recipe, arguments.epochs, arguments.quick))
    splitter = RepeatedStratifiedKFold(
        n_splits=FOLDS, n_repeats=arguments.repeats, random_state=arguments.seed
    )
    folds = list(splitter.split(train.pictures, train.labels))
    jobs = [
        (variant, train, learnt, np.setdiff1d(left_out, doubted), arguments.seed + number)
        for variant in variants.values()
        for number, (learnt, left_out) in enumerate(folds)
    ]
    scores = machine.side_by_side(score, jobs, torch.device("cpu"), "runs")
    table = np.array(list(scores)).reshape(len(variants), len(folds))
    gain = table[0] - table
    rows = [
        [
            name,
            f"{row.mean():.3f} ±{row.std(ddof=1):.3f}",
            f"{lost.mean():+.3f} ±{lost.std(ddof=1):.3f}",
        ]
        for name, row, lost in zip(variants, table, gain, strict=True)
    ]
    print(
        f"recipe {recipe.name}, {variants['all'].epochs} epochs, {train.source}, {len(folds)} folds"
    )
    console.print_table(["", "G-mean", "it gives"], rows)


if __name__ == "__main__":
    console.run(main)
