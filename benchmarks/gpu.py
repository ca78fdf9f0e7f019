"""How long do whole recipes take on a GPU, and are the models as good as those trained on a CPU?

    python benchmarks/gpu.py --data FOLDER --seed 0,1,2

The first run of a recipe is listed apart: it pays for loading and choosing the GPU's kernels.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli, metrics
from common.data import Dataset, open_data
from common.model import choose_device, predict_logits
from common.recipes import BEST, ROBUST, TUNED, Recipe, with_epochs
from common.train import IGNORE_INDEX, filter_labels, train

import numpy as np
import torch
from tqdm import tqdm


def run(
    recipe: Recipe, dataset: Dataset, dev: Dataset, seed: int, device: torch.device
) -> tuple[float, float, float, float]:
    """Train once; return the seconds of filter, training and a training step, and the G-mean."""
    start = time.perf_counter()
    dataset = filter_labels(recipe, dataset, seed, device)
    filtered = time.perf_counter()
    model = train(recipe, dataset, seed, device)  # waits for the last epoch's losses
    trained = time.perf_counter()
    predicted = predict_logits(model, dev.images).argmax(dim=1)
    g_mean = metrics.evaluate(dev.labels, predicted)["g_mean"]
    steps = recipe.epochs * -(-int((dataset.labels != IGNORE_INDEX).sum()) // recipe.batch_size)
    return filtered - start, trained - filtered, (trained - filtered) / steps, g_mean


def main() -> None:
    """Print a row for each recipe."""
    parser = cli.make_parser(__doc__, several_seeds=True, writes_files=False)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    data = open_data(arguments.data)
    dataset, dev = (data.load(split, arguments.quick) for split in ("train", "dev"))
    rows = []
    for recipe in tqdm((TUNED, BEST, ROBUST), desc="recipes", disable=None):
        recipe = with_epochs(recipe, None, arguments.quick)
        runs = np.array([run(recipe, dataset, dev, seed, device) for seed in arguments.seed])
        filtering, training, _, g_means = runs.T
        _, later, step, _ = runs[1:].mean(axis=0) if len(runs) > 1 else runs[0]
        spread = f" ± {g_means.std(ddof=1):.3f}" if len(g_means) > 1 else ""
        rows.append(
            [
                recipe.name,
                f"{filtering.mean():.1f} s",
                f"{training[0]:.1f} s",
                f"{later:.1f} s",
                f"{1000 * step:.1f} ms",
                f"{g_means.mean():.3f}{spread}",
            ]
        )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    cli.say(f"{name}, torch {torch.__version__}, {dataset.name}, {len(arguments.seed)} seeds")
    columns = ["", "label filter", "first training", "later ones", "a step", "G-mean, mean ± sd"]
    cli.print_table(columns, rows)


if __name__ == "__main__":
    cli.run(main)
