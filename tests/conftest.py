"""Small data sets and ways to run a script, for all tests."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from common import console
from common.dataset import Dataset

# The course's own pictures, where a developer has them beside the repository.
COURSE_DATA = Path(__file__).resolve().parents[2] / "shared" / "course-data"
needs_course_data = pytest.mark.skipif(
    not COURSE_DATA.is_dir(), reason="the course's pictures are not on this machine"
)


def make_pictures(labels: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Draw uint8 pictures that are easy to tell apart: noise, and one bright third a class."""
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 120, (len(labels), 3, 32, 32), generator=generator)
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        picture[label, 10 * label : 10 * label + 10] += 120
    return pictures.to(torch.uint8)


def make_dataset(part: str = "train", counts: tuple[int, ...] = (40, 12, 8)) -> Dataset:
    """Return a small imbalanced data set in random order."""
    generator = torch.Generator().manual_seed(len(part))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return Dataset("tiny", part, make_pictures(labels, seed=len(part)), labels)


def write_course_pickle(path: Path, dataset: Dataset) -> None:
    """Write a data set as the course does: a pickled list of (tensor in [-1, 1], int)."""
    pictures = dataset.pictures.float() / 127.5 - 1
    items = [(p.clone(), int(label)) for p, label in zip(pictures, dataset.labels, strict=True)]
    path.write_bytes(pickle.dumps(items, protocol=4))


@pytest.fixture(autouse=True)
def one_thread():
    """Let nets this small not wait for a second thread; scripts change the number."""
    torch.set_num_threads(1)


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
def run_script(monkeypatch, capsys, tmp_path):
    """Return a function that runs a script's main as the terminal would.

    It gives back (exit status, what was printed, what was printed as error).
    """
    monkeypatch.chdir(tmp_path)

    def run(script, *options: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", [script.__name__ + ".py", *map(str, options)])
        status = 0
        try:
            console.run(script.main)
        except SystemExit as stop:
            status = stop.code or 0
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def random_confusion(generator: np.random.Generator) -> np.ndarray:
    """Return a confusion matrix in which each class has pictures."""
    return generator.integers(0, 30, (3, 3)) + np.eye(3, dtype=int)
