"""How fast is the training, against the loops that most tutorials, and the report, write?

    python benchmarks/speed.py --data FOLDER
    python benchmarks/speed.py --data FOLDER --full

The report's loop takes batches of 4 from a DataLoader with a weighted random sampler. Each
contestant lives in a process of its own with all cores, and they take turns, so that a busy
moment of the machine hits all alike. --full trains the report's loop for its whole 100 epochs,
which takes minutes; without it, 100 times its mean epoch stands for them.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, WeightedRandomSampler
from torch.utils.data import Dataset as TorchDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["KINETO_LOG_LEVEL"] = "5"  # the profiler's own remarks

from common import console, machine
from common.dataset import CLASS_NAMES, Dataset, as_input, open_source
from common.network import CourseNet, fast_precision
from common.trainer import Recipe, Trainer, fit
from evaluation import evaluate
from training import NAIVE, TUNED

CPU = torch.device("cpu")
ROUNDS = 3
LOOP_EPOCHS = 15  # in which the report's loop reaches its best; later it only gets worse
REPORT_EPOCHS = 100
# The shortest that reaches the loop's best counts. Below 1, some cars are left out, and batches are
# so much smaller: steps are what it takes, more than pictures.
SPRINT_EPOCHS = (0.5, 0.625, 0.75, 0.875, 1, 2, 3, 4, 6, 8)
# To be quick, not good: what helps only in long runs is left out, dropout among it. Batch, rate and
# balance were chosen on folds of the training set.
SPRINT = replace(
    TUNED,
    name="sprint",
    batch_size=128,
    learning_rate=0.03,
    balance=0.7,
    adjust_logits=1.0,
    colour_change=0.0,
)
FLIPS_ONLY = replace(NAIVE, name="flips-only", plain_share=0.0, batch_size=TUNED.batch_size)


class ReluThenPoolNet(CourseNet):
    """The course's net as the course writes it: ReLU on all values, then pooling.

    It stands here in full so that the order that makes ours faster does not help its peer.
    """

    def logits(self, x: Tensor) -> Tensor:
        """Return logits, as CourseNet does."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.flatten(start_dim=1)
        x = self.dropout(F.relu(self.fc1(x)))
        x = self.dropout(F.relu(self.fc2(x)))
        return self.fc3(x)


class TransformedPictures(TorchDataset):
    """Pictures that torchvision flips and crops one by one, as its tutorials do."""

    def __init__(self, dataset: Dataset) -> None:
        to_picture = transforms.ToPILImage()
        self.pictures = [to_picture(picture) for picture in dataset.pictures]
        self.labels = dataset.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.pictures[index]), self.labels[index]


def plain_epoch(net: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader) -> float:
    """Train for an epoch as tutorials do; return its seconds."""
    start = time.perf_counter()
    running_loss = 0.0
    for pictures, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(pictures), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    return time.perf_counter() - start


def report_loop(train: Dataset, dev: Dataset, seed: int, epochs: int) -> dict[str, list[float]]:
    """Train as the report did; return the seconds and the G-mean on dev of each epoch."""
    torch.manual_seed(seed)
    items = list(zip(as_input(train.pictures), train.labels.tolist(), strict=True))
    weights = (1 / torch.bincount(train.labels))[train.labels]
    sampler = WeightedRandomSampler(weights.tolist(), len(items))
    loader = DataLoader(items, batch_size=4, sampler=sampler)
    net = ReluThenPoolNet().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=30, gamma=0.3)
    seconds, scores = [], []
    for _ in range(epochs):
        seconds.append(plain_epoch(net, optimizer, loader))
        scores.append(evaluate(net, dev)["g_mean"])
        scheduler.step()
    return {"seconds": seconds, "g_mean": scores}


def our_run(
    train: Dataset, dev: Dataset, seed: int, recipe: Recipe, dropout: float = 0.5
) -> dict[str, float]:
    """Train by a recipe of ours; return the seconds and the G-mean on dev at the end."""
    machine.prepare_torch(joblib.cpu_count())
    start = time.perf_counter()
    trainer = Trainer(recipe, train, seed, CPU)
    trainer.training_net.dropout.p = dropout
    while trainer.epoch < recipe.epochs:
        trainer.run_epoch()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "g_mean": evaluate(trainer.net, dev)["g_mean"]}


def sprint(train: Dataset, dev: Dataset, seed: int, epochs: float) -> dict[str, float]:
    """Train as briefly as that, without dropout; return what `our_run` does."""
    start = time.perf_counter()
    share = min(epochs, 1.0)
    recipe = replace(SPRINT, epochs=max(1, int(epochs)), batch_size=int(share * SPRINT.batch_size))
    part = with_fewer_cars(train, share, seed)
    preparing = time.perf_counter() - start
    run = our_run(part, dev, seed, recipe, dropout=0.0)
    return run | {"seconds": run["seconds"] + preparing}


def with_fewer_cars(train: Dataset, share: float, seed: int) -> Dataset:
    """Return this share of the set: all trucks and cats, and cars as there is room."""
    rare_first = (train.labels == CLASS_NAMES.index("car")).float()
    torch.manual_seed(seed)
    order = (rare_first + torch.rand(len(train))).argsort()
    return train.take(order[: round(share * len(train))])


def sprints(train: Dataset, dev: Dataset, seed: int) -> list[dict[str, float]]:
    """Train as briefly as SPRINT_EPOCHS say."""
    return [sprint(train, dev, seed, epochs) for epochs in SPRINT_EPOCHS]


def loader_epoch(train: Dataset) -> float:
    """Return the seconds of an epoch from a DataLoader with 2 workers and torchvision.

    The second epoch is measured, so that starting the workers does not count.
    """
    loader = DataLoader(
        TransformedPictures(train),
        batch_size=FLIPS_ONLY.batch_size,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
    )
    net = ReluThenPoolNet().train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    return [plain_epoch(net, optimizer, loader) for _ in range(2)][1]


def our_epoch(train: Dataset) -> float:
    """Return the seconds of an epoch of ours with flips and shifts, as the scripts run it."""
    machine.prepare_torch(joblib.cpu_count())
    return our_epoch_giving_memory_back(train)


def our_epoch_giving_memory_back(train: Dataset) -> float:
    """The same, where the C library gives freed memory back to the kernel, as it does unasked."""
    epochs = 6  # the mean over a few, so that our turn lasts about as long as the peer's
    start = time.perf_counter()
    fit(replace(FLIPS_ONLY, epochs=epochs), train, seed=0, device=CPU)
    return (time.perf_counter() - start) / epochs


def arithmetic(train: Dataset) -> dict[str, Any]:
    """Return how much an epoch computes, how fast the processor multiplies, where time goes."""
    machine.prepare_torch(joblib.cpu_count())
    trainer = Trainer(FLIPS_ONLY, train, 0, CPU)
    trainer.run_epoch()  # warms up
    with FlopCounterMode(display=False) as counter:
        trainer.run_epoch()
    start = time.perf_counter()
    trainer.run_epoch()
    seconds = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        trainer.run_epoch()
    times = {each.key: each.self_cpu_time_total for each in profiled.key_averages()}
    return {
        "flops": counter.get_total_flops(),
        "seconds": seconds,
        "peak": matmul_peak(),
        "shares": shares_of(times),
    }


KINDS_OF_WORK = {
    "convolutions and matrix products": ("convolution", "addmm", "mm"),
    "pooling, ReLU and dropout": ("pool", "relu", "threshold", "clamp_min", "dropout", "bernoulli"),
    "copies and changes of type": ("copy_", "_to_copy"),
    "drawing, flipping and shifting pictures": ("index", "rand", "gather"),
    "the optimizer": ("adam",),
}


def shares_of(times: dict[str, float]) -> dict[str, float]:
    """Return the share of each kind of work, given the time of each operation by name."""
    total, shares = sum(times.values()), {}
    for kind, words in KINDS_OF_WORK.items():
        names = [name for name in times if any(word in name.lower() for word in words)]
        shares[kind] = sum(times.pop(name) for name in names) / total
    return shares | {"all else, calling operations above all": sum(times.values()) / total}


def matmul_peak() -> float:
    """Return how many operations a second a large matrix product does, in training's precision."""
    a, b = torch.rand(2, 1024, 1024)
    seconds = []
    with fast_precision(CPU):
        for _ in range(30):
            start = time.perf_counter()
            torch.mm(a, b)
            seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(seconds)


def median_and_range(values: list[float]) -> list[str]:
    """Return two cells of the table."""
    median = statistics.median(values)
    return [f"{median:.2f} s", f"{min(values):.2f} to {max(values):.2f}"]


def rows_of(results: dict[str, list[Any]]) -> list[list[str]]:
    """Return the rows of the table: each contestant after its peer."""
    bests = [int(np.argmax(run["g_mean"])) for run in results["loop"]]
    best_score = np.mean([max(run["g_mean"]) for run in results["loop"]])
    to_best = [
        sum(run["seconds"][: best + 1]) for run, best in zip(results["loop"], bests, strict=True)
    ]
    epochs = [second for run in results["loop"] for second in run["seconds"]]
    whole = [np.mean(run["seconds"]) * REPORT_EPOCHS for run in results["loop"]]
    sprint_scores = np.mean(
        [[sprint["g_mean"] for sprint in round_] for round_ in results["sprints"]], axis=0
    )
    reached = np.flatnonzero(sprint_scores >= best_score)
    chosen = int(reached[0]) if len(reached) else len(SPRINT_EPOCHS) - 1
    sprint_times = [round_[chosen]["seconds"] for round_ in results["sprints"]]
    tuned = [run["seconds"] for run in results["tuned"]]
    tuned_score = np.mean([run["g_mean"] for run in results["tuned"]])
    is_whole = len(results["loop"][0]["g_mean"]) >= REPORT_EPOCHS
    extrapolated = "" if is_whole else ", extrapolated"
    batch = f"batch {FLIPS_ONLY.batch_size}"
    end = f"{np.mean([run['g_mean'][-1] for run in results['loop']]):.3f}" if is_whole else ""

    def row(name: str, values: list[float], peer: list[float] | None, score: str = "") -> list[str]:
        ratio = f"{statistics.median(peer) / statistics.median(values):.1f}" if peer else ""
        return [name, *median_and_range(values), score, ratio]

    return [
        row(
            f"report's loop to its best, epoch {statistics.median(bests) + 1:.0f}",
            to_best,
            None,
            f"{best_score:.3f}",
        ),
        row(
            f"ours without dropout, epochs: {SPRINT_EPOCHS[chosen]:g}",
            sprint_times,
            to_best,
            f"{sprint_scores[chosen]:.3f}",
        ),
        row(f"report's loop, {REPORT_EPOCHS} epochs{extrapolated}", whole, None, end),
        row("recipe tuned, whole", tuned, whole, f"{tuned_score:.3f}"),
        row("epoch of the report's loop, batch 4", epochs, None),
        row(f"epoch, DataLoader with 2 workers, {batch}", results["loader"], None),
        row(f"epoch of ours with flips and shifts, {batch}", results["epoch"], results["loader"]),
        row("the same, memory given back", results["memory"], results["loader"]),
    ]


def explain(numbers: dict[str, Any]) -> str:
    """Say in three sentences how near an epoch is to what the arithmetic allows."""
    rate = numbers["flops"] / numbers["seconds"]
    shares = sorted(numbers["shares"].items(), key=lambda item: -item[1])
    (first, share), *others = shares
    rest = ", ".join(f"{name} {part:.0%}" for name, part in others)
    return (
        f"An epoch of ours does {numbers['flops'] / 1e9:.0f} billion operations, "
        f"{rate / 1e9:.0f} billion a second. A large matrix product does "
        f"{numbers['peak'] / 1e9:.0f} billion a second here, so that the epoch runs at "
        f"{rate / numbers['peak']:.0%} of that. Of its time, {first} take {share:.0%}, {rest}."
    )


def main() -> None:
    """Let all contestants take turns; print one table and three sentences."""
    parser = console.make_parser(__doc__, benchmark=True)
    parser.add_argument(
        "--full", action="store_true", help="train the report's loop for all its 100 epochs"
    )
    arguments = parser.parse_args()
    source = open_source(arguments.data, arguments.data_seed)
    train, dev = (source.load(part, arguments.quick) for part in ("train", "dev"))
    loop_epochs = REPORT_EPOCHS if arguments.full else LOOP_EPOCHS
    contestants: dict[str, tuple[Callable[..., Any], ...]] = {
        "loop": (report_loop, train, dev, "seed", loop_epochs),
        "sprints": (sprints, train, dev, "seed"),
        "tuned": (our_run, train, dev, "seed", TUNED),
        "loader": (loader_epoch, train),
        "epoch": (our_epoch, train),
        "memory": (our_epoch_giving_memory_back, train),
    }
    processes = {name: ProcessPoolExecutor(1, get_context("spawn")) for name in contestants}
    results: dict[str, list[Any]] = {name: [] for name in contestants}
    for number in range(ROUNDS):
        for name, (function, *settings) in contestants.items():
            print(f"round {number + 1} of {ROUNDS}: {name}", file=sys.stderr)
            given = [arguments.seed + number if each == "seed" else each for each in settings]
            results[name].append(processes[name].submit(function, *given).result())
    cores, version = joblib.cpu_count(), torch.__version__
    print(
        f"{len(train)} pictures of {train.source}, {cores} cores, torch {version}, {ROUNDS} rounds"
    )
    console.print_table(["", "median", "range", "G-mean on dev", "times as fast"], rows_of(results))
    print("\n" + explain(processes["epoch"].submit(arithmetic, train).result()))


if __name__ == "__main__":
    console.run(main)
