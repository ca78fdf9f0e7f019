"""Measure an epoch of our loop against the plain loop that most tutorials, and the report, write.

    python benchmarks/epoch.py

The plain loop takes batches of 4 from a DataLoader over a list of pictures. Both train the same
net with Adam on as many pictures, on all cores. Each variant lives in a process of its own, and
they take turns, so that a busy moment of the machine hits all alike.
"""

import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import joblib
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import console, machine
from common.dataset import Dataset, as_input, open_source
from common.network import CourseNet
from common.trainer import fit
from training import NAIVE

ROUNDS = 5
EPOCHS = 6  # of ours a turn, so that its turns last about as long as the plain loop's


class ReluThenPoolNet(CourseNet):
    """The course's net as the course writes it: ReLU on all values, then pooling.

    It stands here in full so that the order that makes ours faster does not help its peer.
    """

    def forward(self, pictures: Tensor) -> Tensor:
        """Return logits, as CourseNet does."""
        x = self.pixel_range(pictures)
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.flatten(start_dim=1)
        x = self.dropout(F.relu(self.fc1(x)))
        x = self.dropout(F.relu(self.fc2(x)))
        return self.fc3(x)


def plain_epoch(train: Dataset) -> float:
    """Return the seconds of an epoch of the plain loop, batch size 4."""
    items = list(zip(as_input(train.pictures), train.labels.tolist(), strict=True))
    start = time.perf_counter()
    net = ReluThenPoolNet().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    running_loss = 0.0
    for pictures, labels in DataLoader(items, batch_size=4, shuffle=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(pictures), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    return time.perf_counter() - start


def our_epoch(train: Dataset) -> float:
    """Return the seconds of an epoch of our loop, batch size 128, as a mean over a few."""
    start = time.perf_counter()
    fit(replace(NAIVE, epochs=EPOCHS), train, seed=0, device=torch.device("cpu"))
    return (time.perf_counter() - start) / EPOCHS


def our_epoch_with_kept_memory(train: Dataset) -> float:
    """The same as the scripts run it: the C library keeps freed memory."""
    machine.prepare_torch(joblib.cpu_count())
    return our_epoch(train)


VARIANTS = {
    "plain loop, batch 4": plain_epoch,
    "ours, memory given back": our_epoch,
    "ours": our_epoch_with_kept_memory,
}


def main() -> None:
    """Print the medians of all variants and their ratios."""
    parser = console.make_parser(__doc__)
    arguments = parser.parse_args()
    train = open_source(arguments.data, arguments.data_seed).load("train", arguments.quick)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    processes = {name: ProcessPoolExecutor(1, get_context("spawn")) for name in VARIANTS}
    for number in range(ROUNDS + 1):
        for name, measure in VARIANTS.items():
            took = processes[name].submit(measure, train).result()
            if number > 0:  # the first round warms up
                seconds[name].append(took)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    slowest = medians["plain loop, batch 4"]
    rows = []
    for name, median in medians.items():
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f} s"
        rows.append([name, f"{median:.2f} s", spread, f"{slowest / median:.1f}"])
    cores, version = joblib.cpu_count(), torch.__version__
    print(f"an epoch of {len(train)} pictures, {cores} cores, torch {version}, {ROUNDS} rounds")
    console.print_table(["", "median", "range", "times as fast"], rows)


if __name__ == "__main__":
    console.run(main)
