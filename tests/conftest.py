"""Small data sets, and a way to run a script, for all tests."""

import contextlib
import functools
import os
import pickle
import signal
from pathlib import Path

from common import cli
from common.data import Dataset

import pytest
import torch

# The course's own images, if a developer has them beside the repository.
COURSE_DATA = Path(__file__).resolve().parents[2] / "shared" / "course-data"
needs_course_data = pytest.mark.skipif(
    not COURSE_DATA.is_dir(), reason="the course's images are not on this machine"
)


def make_images(labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Draw uint8 images that are easy to tell apart: noise, and one bright third per class."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (len(labels), 3, 32, 32), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[label, 10 * label : 10 * label + 10] += 120
    return images.to(torch.uint8)


def make_dataset(split: str = "train", counts: tuple[int, ...] = (40, 12, 8)) -> Dataset:
    """Return a small imbalanced data set in random order."""
    generator = torch.Generator().manual_seed(len(split))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return Dataset("tiny", split, make_images(labels, seed=len(split)), labels)


def items_of(dataset: Dataset) -> list[tuple[torch.Tensor, int]]:
    """Return what the course pickles: a list of (tensor in [-1, 1], int)."""
    images = dataset.images.float() / 127.5 - 1
    return [(x.clone(), int(y)) for x, y in zip(images, dataset.labels, strict=True)]


def write_course_pickle(path: Path, dataset: Dataset) -> None:
    """Write a data set as the course does."""
    path.write_bytes(pickle.dumps(items_of(dataset), protocol=4))


def running_in(group: int) -> list[str]:
    """Return the processes of a group that have not ended, by Linux' table of processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, of_group = path.read_text().rsplit(")", 1)[1].split()[:3]
            found += [path.parent.name] if int(of_group) == group and state != "Z" else []
    return found


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small would only wait for a second thread."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    """Run jobs here, where tests can watch them; starting other processes takes seconds."""
    monkeypatch.setattr("common.train.cpu_count", lambda: 1)


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """Compute where digits can be compared; only tests/test_gpu.py uses a GPU."""
    if request.module.__name__ != "test_gpu":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        no_mps = functools.cache(lambda: False)  # a cache as in torch, which looks inside it
        monkeypatch.setattr("torch.backends.mps.is_available", no_mps)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the scripts that a test starts


@pytest.fixture
def train() -> Dataset:
    return make_dataset("train")


@pytest.fixture
def dev() -> Dataset:
    return make_dataset("dev")


@pytest.fixture
def course_folder(tmp_path: Path, train: Dataset, dev: Dataset) -> Path:
    """Return a folder with train.pickle and dev.pickle."""
    folder = tmp_path / "course"
    folder.mkdir()
    write_course_pickle(folder / "train.pickle", train)
    write_course_pickle(folder / "dev.pickle", dev)
    return folder


@pytest.fixture
def make_pipe():
    """Return os.mkfifo; a test that waits for somebody to write into its pipe fails."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("only POSIX has named pipes")
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waits for a pipe"))
    signal.alarm(20)
    yield os.mkfifo
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run_script(monkeypatch, capsys, tmp_path):
    """Return a function that runs a script's main as the terminal would.

    It returns the exit status, what was printed, and what was printed to stderr.
    """
    monkeypatch.chdir(tmp_path)

    def run(script, *options: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [script.__name__ + ".py", *map(str, options)])
        status = 0
        try:
            cli.run(script.main)
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run
