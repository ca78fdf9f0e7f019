"""How long would the report's own loops take for the steps that report.py does in minutes?

    python benchmarks/report.py --data FOLDER

Each loop is written as the report had it: batches of 4 from a DataLoader, 100 epochs for each
recipe and for each learning rate, attacks picture by picture. A few epochs of each are measured,
and the rest is extrapolated.
"""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from speed import REPORT_EPOCHS, ReluThenPoolNet, TransformedPictures, plain_epoch
from torch import nn
from torch.utils.data import DataLoader, Sampler, WeightedRandomSampler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import console
from common.attacks import fgsm, loss_gradient
from common.batches import least_sampled
from common.dataset import Dataset, as_input, open_source
from lr_analysis import REPORT_RATES

EPOCHS_MEASURED = 2


class LeastSampled(Sampler):
    """Draws from the class drawn least so far, one picture at a time."""

    def __init__(self, labels: torch.Tensor) -> None:
        self.labels = labels

    def __iter__(self) -> Iterator[int]:
        return iter(next(least_sampled(self.labels)).tolist())

    def __len__(self) -> int:
        return len(self.labels)


def loaders_of(train: Dataset) -> dict[str, Callable[[], DataLoader]]:
    """Return how each of the report's recipes reads its pictures."""
    plain = list(zip(as_input(train.pictures), train.labels.tolist(), strict=True))
    weights = (1 / torch.bincount(train.labels))[train.labels].tolist()
    transformed = TransformedPictures(train)
    return {
        "3a naive": lambda: DataLoader(plain, 4, shuffle=True),
        "3b weight decay": lambda: DataLoader(plain, 4, shuffle=True),
        "3d strict sampler": lambda: DataLoader(plain, 4, sampler=LeastSampled(train.labels)),
        "3e transformed pictures": lambda: DataLoader(transformed, 4, shuffle=True),
        "3f learning rate in steps": lambda: DataLoader(transformed, 4, shuffle=True),
        "3h weighted sampler": lambda: DataLoader(
            transformed, 4, sampler=WeightedRandomSampler(weights, len(weights))
        ),
        "3i the final mix": lambda: DataLoader(
            transformed, 4, sampler=WeightedRandomSampler(weights, len(weights))
        ),
        **{
            f"4 learning rate {rate:g}": lambda: DataLoader(plain, 4, shuffle=True)
            for rate in REPORT_RATES
        },
    }


def seconds_of_training(loader: DataLoader) -> float:
    """Return the seconds that 100 epochs would take."""
    net = ReluThenPoolNet().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    seconds = [plain_epoch(net, optimizer, loader) for _ in range(EPOCHS_MEASURED)]
    return REPORT_EPOCHS * min(seconds)


def seconds_of_attacks(net: nn.Module, train: Dataset, dev: Dataset) -> float:
    """Return the seconds of FGSM on dev at two epsilons, and of one noise, picture by picture."""
    start = time.perf_counter()
    for picture, label in zip(as_input(dev.pictures), dev.labels, strict=True):
        for epsilon in (0.05, 0.1):
            fgsm(net, picture[None], label[None], epsilon)
    attacks = time.perf_counter() - start
    start = time.perf_counter()
    for picture, label in list(zip(as_input(train.pictures), train.labels, strict=True))[:500]:
        loss_gradient(net, picture[None], label[None])
    return attacks + (time.perf_counter() - start) * len(train) / 500


def main() -> None:
    """Print the table."""
    arguments = console.make_parser(__doc__, benchmark=True).parse_args()
    source = open_source(arguments.data, arguments.data_seed)
    train, dev = source.load("train", arguments.quick), source.load("dev", arguments.quick)
    torch.manual_seed(arguments.seed)
    loaders = loaders_of(train)
    seconds = {
        name: seconds_of_training(loader()) for name, loader in tqdm(loaders.items(), disable=None)
    }
    seconds["5 attacks"] = seconds_of_attacks(ReluThenPoolNet().eval(), train, dev)
    rows = [[name, f"{value / 60:.1f} min"] for name, value in seconds.items()]
    rows.append(["all", f"{sum(seconds.values()) / 60:.0f} min"])
    print(f"{train.source}: the report's loops, extrapolated from {EPOCHS_MEASURED} epochs of each")
    console.print_table(["step", f"{REPORT_EPOCHS} epochs"], rows)


if __name__ == "__main__":
    console.run(main)
