"""The data set: three classes of 32x32 pictures, badly imbalanced, some labels wrong.

Wherever the pictures come from, a `Dataset` holds them as uint8; `as_input` is the one place
where they become what a net sees: float32 in [0, 1].
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from common import cifar10, sketches
from common.console import LARGEST_NUMBER, PROJECT, UserError
from common.course_files import read_pickle
from common.picture_folder import read_folder
from common.results import write_whole

CLASS_NAMES = ("car", "truck", "cat")
PARTS = ("train", "dev")

# The report's counts, for the sources that we cut or draw to its measure.
CLASS_COUNTS = {"train": (4951, 450, 225), "dev": (880, 80, 40)}
# Share of wrong labels among those of each class. The report found many among the cats; where
# we have to choose, one cat in four is none. Dev labels stay right: they are what we measure on.
WRONG_SHARES = {"train": (0.01, 0.05, 0.25), "dev": (0.0, 0.0, 0.0)}

FIRST_PRACTICE_SEED = 10 * LARGEST_NUMBER  # beyond the seeds that any --data-seed leads to

DATA_FOLDER = PROJECT / "data"
CIFAR10_LABELS = (1, 9, 3)  # automobile, truck, cat in CIFAR-10's own numbering


@dataclass(frozen=True)
class Dataset:
    """One part of a data set, whole in memory.

    Attributes:
        source: where it came from, such as `sketches` or the name of a folder.
        part: `train` or `dev`.
        pictures: uint8 [N, 3, 32, 32].
        labels: int64 [N], an index in CLASS_NAMES each, as given: some may be wrong.
        true_labels: int64 [N] where the right labels are known, else None.
    """

    source: str
    part: str
    pictures: Tensor
    labels: Tensor
    true_labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def class_counts(self) -> list[int]:
        """Number of pictures labelled with each class."""
        return torch.bincount(self.labels, minlength=len(CLASS_NAMES)).tolist()

    @cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits that change with any pixel or label."""
        digest = hashlib.sha256(self.pictures.contiguous().numpy().tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:12]

    def take(self, index: Tensor) -> "Dataset":
        """Return the part of the set with these indices, int64 [M]."""
        true_labels = None if self.true_labels is None else self.true_labels[index]
        return replace(
            self,
            pictures=self.pictures[index],
            labels=self.labels[index],
            true_labels=true_labels,
        )

    def first(self, count: int) -> "Dataset":
        """Return the first `count` pictures of each class, for dry runs."""
        of_class = [
            torch.nonzero(self.labels == label)[:count] for label in range(len(CLASS_NAMES))
        ]
        return self.take(torch.cat(of_class).flatten().sort().values)

    def facts(self) -> dict[str, Any]:
        """Return what files that rest on this set say about it."""
        counts = dict(zip(CLASS_NAMES, self.class_counts, strict=True))
        wrong = None if self.true_labels is None else int((self.labels != self.true_labels).sum())
        return {"fingerprint": self.fingerprint, "class_counts": counts, "wrong_labels": wrong}


def as_input(pictures: Tensor) -> Tensor:
    """Turn uint8 pictures of any shape into what a net sees: float32 in [0, 1]."""
    return pictures.float().div_(255)


@dataclass(frozen=True)
class Source:
    """Where pictures come from.

    Attributes:
        name: for files and figures.
        read: returns the pictures, the labels, and the true labels or None of a part.
        has: tells whether a part is there.
    """

    name: str
    read: Callable[[str], tuple[Tensor, Tensor, Tensor | None]]
    has: Callable[[str], bool] = lambda part: True

    def load(self, part: str, quick: bool = False) -> Dataset:
        """Load and check `train` or `dev`; `quick` keeps 60 pictures of each class at most.

        Raises:
            UserError: the files are missing, broken or not of the right form.
        """
        dataset = Dataset(self.name, part, *self.read(part))
        _check(dataset)
        return dataset.first(60) if quick else dataset


def describe(*parts: Dataset | None) -> dict[str, Any]:
    """Return what every result file says about its data: of the parts that were loaded."""
    loaded = [part for part in parts if part is not None]
    return {"source": loaded[0].source, "parts": {each.part: each.facts() for each in loaded}}


def _check(dataset: Dataset) -> None:
    where = f"{dataset.source}, {dataset.part}"
    for name, count in zip(CLASS_NAMES, dataset.class_counts, strict=True):
        if count == 0:
            raise UserError(f"{where}: class {name} has no pictures; each class needs at least one")


def open_source(data: str, seed: int = 0) -> Source:
    """Return the source that `--data` names.

    Args:
        data: `auto`, `cifar10`, `sketches`, or a folder's path.
        seed: of sketches, of the cut of CIFAR-10, and of their wrong labels.

    Raises:
        UserError: the name is unknown, or the folder holds neither pickles nor pictures.
    """
    if data == "auto":
        return _first_there_is(seed)
    if data == "cifar10":
        return Source("cifar10", partial(_read_cifar10, seed))
    if data == "sketches":
        return Source("sketches", partial(_read_sketches, seed))
    return _open_folder(Path(data))


def _first_there_is(seed: int) -> Source:
    if any(_has_pickle(DATA_FOLDER, part) for part in PARTS):
        return _open_folder(DATA_FOLDER)
    if cifar10.is_here(DATA_FOLDER) or cifar10.answers():
        return open_source("cifar10", seed)
    print("no pickles in data/ and no way to CIFAR-10: taking sketches, which the project draws")
    return open_source("sketches", seed)


def _open_folder(folder: Path) -> Source:
    if folder.is_file():
        raise UserError(f"--data {folder}: is a file; name the folder it stands in")
    if not folder.is_dir():
        raise UserError(f"--data {folder}: no such folder, and not auto, cifar10 or sketches")
    name = folder.resolve().name
    if name in ("cifar10", "sketches"):
        name = f"folder-{name}"  # drawn pictures must not be taken for others, nor others for them
    if any(_has_pickle(folder, part) for part in PARTS):
        is_there = partial(_has_pickle, folder)
        return Source(name, partial(_read_course_pickle, folder), is_there)
    if any((folder / part).is_dir() for part in PARTS):
        return Source(name, partial(_read_pictures, folder), lambda part: (folder / part).is_dir())
    raise UserError(
        f"--data {folder}: holds neither train.pickle or dev.pickle nor train/<class>/*.png"
    )


def _read_pictures(folder: Path, part: str) -> tuple[Tensor, Tensor, None]:
    return *read_folder(folder / part, CLASS_NAMES), None


def _has_pickle(folder: Path, part: str) -> bool:
    return (folder / f"{part}.pickle").exists()


def _read_course_pickle(folder: Path, part: str) -> tuple[Tensor, Tensor, None]:
    """Turn the course's pixels in [-1, 1] into uint8, once and for all."""
    path = folder / f"{part}.pickle"
    pictures, labels = read_pickle(path)
    if not torch.isfinite(pictures).all():
        index = int(torch.nonzero(~torch.isfinite(pictures).all(dim=(1, 2, 3)))[0])
        raise UserError(f"{path}: picture {index} has pixels that are NaN or infinite")
    low, high = pictures.min().item(), pictures.max().item()
    if low < -1.001 or high > 1.001:
        raise UserError(f"{path}: pixels from {low:.3g} to {high:.3g}, they must lie in [-1, 1]")
    if low >= 0:
        print(
            f"warning: {path}: no pixel is below 0. Are these pictures in [0, 1]? "
            "The course's lie in [-1, 1], and are read so.",
            file=sys.stderr,
        )
    return ((pictures + 1) * 127.5).round().to(torch.uint8), labels, None


def mislabel(part: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the labels of an imbalanced set in which some are wrong.

    Returns:
        given and true labels, int64 [N] each, in random order. Given labels have exactly
        CLASS_COUNTS; of those of a class, the share WRONG_SHARES is wrong.
    """
    generator = np.random.default_rng((seed, PARTS.index(part)))
    given = np.repeat(np.arange(len(CLASS_NAMES)), CLASS_COUNTS[part])
    true = given.copy()
    for label, share in enumerate(WRONG_SHARES[part]):
        members = np.flatnonzero(given == label)
        wrong = generator.choice(members, size=round(share * len(members)), replace=False)
        true[wrong] = (label + generator.integers(1, len(CLASS_NAMES), len(wrong))) % len(
            CLASS_NAMES
        )
    order = generator.permutation(len(given))
    return given[order], true[order]


def _read_sketches(seed: int, part: str) -> tuple[Tensor, Tensor, Tensor]:
    given, true = mislabel(part, seed)
    return _drawn_or_cached(part, seed, true), torch.from_numpy(given), torch.from_numpy(true)


def _drawn_or_cached(part: str, seed: int, labels: np.ndarray) -> Tensor:
    """Draw the sketches, or take them from data/, where the last run left them."""
    libraries = f"{np.__version__} {PIL.__version__}".encode()  # others may draw otherwise
    key = Path(sketches.__file__).read_bytes() + labels.tobytes() + libraries
    path = DATA_FOLDER / f"sketches-{part}-{seed}-{hashlib.sha256(key).hexdigest()[:8]}.npy"
    try:
        return torch.from_numpy(np.load(path))
    except (OSError, ValueError, EOFError):
        pass  # not drawn yet, or not readable
    pictures = sketches.draw_sketches(labels, seed * len(PARTS) + PARTS.index(part))
    try:
        DATA_FOLDER.mkdir(exist_ok=True)
        write_whole(path, lambda temporary: np.save(temporary, pictures))
    except OSError:
        pass  # a cache that can't be written costs seconds, not the run
    return torch.from_numpy(pictures)


def draw_practice(count: int, seed: int) -> Dataset:
    """Return so many sketches to learn from, all labels right: none is in the source `sketches`."""
    labels = np.arange(count) % len(CLASS_NAMES)
    pictures = torch.from_numpy(sketches.draw_sketches(labels, FIRST_PRACTICE_SEED + seed))
    return Dataset("sketches", "train", pictures, torch.from_numpy(labels))


def _read_cifar10(seed: int, part: str) -> tuple[Tensor, Tensor, Tensor]:
    pictures, classes = cifar10.read(DATA_FOLDER, train=part == "train")
    given, true = mislabel(part, seed)
    generator = np.random.default_rng((seed, len(PARTS) + PARTS.index(part)))
    index = np.empty(len(true), dtype=np.int64)
    for label, cifar10_label in enumerate(CIFAR10_LABELS):
        places, candidates = true == label, np.flatnonzero(classes == cifar10_label)
        index[places] = generator.choice(candidates, size=places.sum(), replace=False)
    chosen = torch.from_numpy(pictures[index]).permute(0, 3, 1, 2).contiguous()
    return chosen, torch.from_numpy(given), torch.from_numpy(true)
