"""How fast is our training, compared with the report's loop and that of most tutorials?

    python benchmarks/speed.py --data FOLDER

Contestants take turns in one process with one thread each, so that other load on the machine
affects all of them equally; the table shows medians over the rounds. Run it on an idle machine.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Else the profiler reports a missing GPU as an error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

from common import cli
from common.data import Dataset, open_data, to_float
from common.model import build_model
from common.recipes import NAIVE, TUNED, Recipe, with_epochs
from common.train import train

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler
from torch.utils.data import Dataset as TorchDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

CPU = torch.device("cpu")
# Where an epoch's time goes, by the profiler's names of operations.
OPERATIONS = {
    "convolutions": ("aten::convolution", "aten::convolution_backward"),
    "Muon": ("Optimizer.step#Muon.step",),
    "max pooling": ("aten::max_pool2d_with_indices", "aten::max_pool2d_with_indices_backward"),
}
ROUNDS = 3
REPORT_EPOCHS = 100
REPORT_BATCH = 4  # assumed, as in PyTorch's tutorial: the report does not say
REPORT_IMAGES = 800  # of an epoch of the report's loop, timed and scaled up


class Images(TorchDataset):
    """One image at a time, as most tutorials read them."""

    def __init__(self, dataset: Dataset, transform: Callable) -> None:
        self.images, self.labels = to_float(dataset.images), dataset.labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple:
        return self.transform(self.images[index]), self.labels[index]


def loader_epoch(dataset: Dataset, batch_size: int, transform: Callable) -> float:
    """Return the seconds of an epoch of the usual loop, with class-balanced sampling."""
    weights = (1 / torch.bincount(dataset.labels))[dataset.labels]
    sampler = WeightedRandomSampler(weights.tolist(), len(dataset))
    loader = DataLoader(Images(dataset, transform), batch_size, sampler=sampler)
    model = build_model().train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    start = time.perf_counter()
    for images, labels in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return time.perf_counter() - start


def our_epochs(recipe: Recipe, dataset: Dataset) -> float:
    """Return the seconds of our loop, all epochs of the recipe."""
    start = time.perf_counter()
    train(recipe, dataset, 0, CPU)
    return time.perf_counter() - start


def report_loop(dataset: Dataset) -> float:
    """Return the seconds that the report's epochs in batches of 4 would take."""
    part = dataset.subset(torch.arange(min(REPORT_IMAGES, len(dataset))))
    seconds = loader_epoch(part, REPORT_BATCH, nn.Identity())
    return seconds * len(dataset) / len(part) * REPORT_EPOCHS


def fraction_of_peak(seconds: float, recipe: Recipe, dataset: Dataset) -> float:
    """Return how fast an epoch computes, as a fraction of a large matrix product's speed."""
    model, size = build_model(recipe.network).train(), recipe.batch_size
    with FlopCounterMode(display=False) as counter:
        model(torch.rand(size, 3, 32, 32)).sum().backward()
    flops = counter.get_total_flops() * len(dataset) / size
    a = torch.rand(1024, 1024)
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    peak = 5 * 2 * 1024**3 / (time.perf_counter() - start)
    return flops / seconds / peak


def fractions_of_time(recipe: Recipe, dataset: Dataset) -> dict[str, float]:
    """Return the fractions of a run's time that some operations take."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train(recipe, dataset, 0, CPU)
    events = profiler.key_averages()
    total, times = events.self_cpu_time_total, {each.key: each.cpu_time_total for each in events}
    return {
        part: sum(times.get(name, 0) for name in names) / total
        for part, names in OPERATIONS.items()
    }


def main() -> None:
    """Time all contestants in turn and print the ratios."""
    arguments = cli.make_parser(__doc__, writes_files=False).parse_args()
    dataset = open_data(arguments.data).load("train", arguments.quick)
    torch.set_num_threads(1)
    crop = transforms.RandomCrop(32, padding=4, padding_mode="reflect")
    augmented = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
    tuned = replace(TUNED, threads=1)
    one_epoch = with_epochs(tuned, 1, False)
    plain = with_epochs(NAIVE, 1, False)
    contestants = {
        "report": lambda: report_loop(dataset),
        "tuned": lambda: our_epochs(with_epochs(tuned, None, arguments.quick), dataset),
        "loader": lambda: loader_epoch(dataset, TUNED.batch_size, augmented),
        "epoch": lambda: our_epochs(one_epoch, dataset),
        "plain": lambda: our_epochs(plain, dataset),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(1 if arguments.quick else ROUNDS):
        for name, contest in contestants.items():
            times[name].append(contest())
    median = {name: statistics.median(each) for name, each in times.items()}
    rows = [
        [f"the report's loop, {REPORT_EPOCHS} epochs (scaled up)", f"{median['report']:.1f}", ""],
        ["recipe tuned, whole", f"{median['tuned']:.1f}", ratio(times, "report", "tuned")],
        ["an epoch of a DataLoader with flips and crops", f"{median['loader']:.2f}", ""],
        ["an epoch of tuned", f"{median['epoch']:.2f}", ratio(times, "loader", "epoch")],
        ["an epoch of naive", f"{median['plain']:.2f}", ""],
    ]
    cli.say(f"{len(dataset)} images of {dataset.name}, torch {torch.__version__}")
    cli.print_table(["", "seconds", "times as fast"], rows)
    peak = fraction_of_peak(median["epoch"], TUNED, dataset)
    cli.say(f"An epoch of tuned computes at {peak:.0%} of the speed of a large matrix product.")
    fractions = fractions_of_time(one_epoch, dataset)
    parts = ", ".join(f"{part} {fraction:.0%}" for part, fraction in fractions.items())
    cli.say(f"Of its time: {parts}.")


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> str:
    """Return the median of the ratios, round by round."""
    return f"{statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True)):.1f}"


if __name__ == "__main__":
    cli.run(main)
