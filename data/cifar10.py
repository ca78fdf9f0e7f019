"""CIFAR-10 (Krizhevsky 2009), cut to the report's classes and imbalance, with some labels wrong.

    python data/cifar10.py
    python data/cifar10.py --seed 3 --out my_folder

torchvision downloads it once (170 MB) to data/ and checks its checksums. The seed decides which
images are used and which of them get wrong labels.
"""

import socket
import sys
import threading
import urllib.request
from http.client import HTTPException
from pathlib import Path

if not __package__:  # run as a script, not imported: `common` is one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli
from data.synthetic import (
    CLASS_COUNTS,
    LabeledImages,
    draw_labels,
    prepare_by_hand,
    write_course_form,
)

import numpy as np

# torchvision is imported only where it is used, because that takes seconds.

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"  # torchvision's
DOWNLOAD_FOLDER = cli.PROJECT / "data"
CONNECT_SECONDS = 4
STALL_SECONDS = 60
CIFAR10_LABELS = (1, 9, 3)  # automobile, truck and cat in CIFAR-10's own numbering


def is_downloaded() -> bool:
    """Return whether CIFAR-10 has been downloaded."""
    names = ["batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))]
    return all((DOWNLOAD_FOLDER / "cifar-10-batches-py" / name).is_file() for name in names)


def is_reachable() -> bool:
    """Return, within seconds, whether CIFAR-10's server answers.

    In a thread, because the timeout does not cover looking up the host's name.
    """
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(URL, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=CONNECT_SECONDS):
                answered.set()
        except (OSError, HTTPException, ValueError):
            pass  # no network, no such host, or an invalid proxy

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return answered.is_set()


def prepare(folder: Path, seed: int = 0) -> None:
    """Write the cut of CIFAR-10 to `folder` in the course's form, downloading it if needed.

    Raises:
        UserError: CIFAR-10 can't be downloaded.
    """
    if not is_downloaded() and not is_reachable():
        raise cli.UserError(
            f"--data cifar10: not in {DOWNLOAD_FOLDER} yet, and {URL} can't be reached; "
            "--data synthetic needs no network"
        )
    cli.say(f"Preparing CIFAR-10 in {folder} (only once).")
    write_course_form(folder, {split: _cut(split, seed) for split in CLASS_COUNTS})


def _cut(split: str, seed: int) -> LabeledImages:
    """Choose images for the labels from draw_labels."""
    images, classes = _download(train=split == "train")
    given, true = draw_labels(split, seed)
    splits = list(CLASS_COUNTS)
    generator = np.random.default_rng((seed, len(splits) + splits.index(split)))
    index = np.empty(len(true), dtype=np.int64)
    for label, cifar10_label in enumerate(CIFAR10_LABELS):
        places, candidates = true == label, np.flatnonzero(classes == cifar10_label)
        index[places] = generator.choice(candidates, size=places.sum(), replace=False)
    return np.ascontiguousarray(images[index].transpose(0, 3, 1, 2)), given, true


def _download(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 [N, 32, 32, 3], and CIFAR-10's own labels, int64 [N], of a split."""
    from torchvision.datasets import CIFAR10

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)  # a download that stalls must end
    try:
        cifar10 = CIFAR10(str(DOWNLOAD_FOLDER), train=train, download=True)
    except (OSError, RuntimeError, HTTPException, ValueError) as error:
        raise cli.UserError("--data cifar10: the download failed; run it again") from error
    finally:
        socket.setdefaulttimeout(before)
    return cifar10.data, np.array(cifar10.targets)


def main() -> None:
    """Write a data set with another seed, or to another folder."""
    prepare_by_hand(prepare, DOWNLOAD_FOLDER / "cifar10", __doc__)


if __name__ == "__main__":
    cli.run(main)
