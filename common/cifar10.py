"""CIFAR-10 (Krizhevsky, 2009), downloaded by torchvision and checked by its checksums."""

import socket
import threading
import urllib.request
from http.client import HTTPException
from pathlib import Path

import numpy as np

from common.console import UserError

CONNECT_SECONDS = 4  # how long to wait for an answer before the net counts as out of reach

# torchvision is imported inside the functions: it takes seconds that runs on other data save.


def is_here(folder: Path) -> bool:
    """Tell whether an earlier download stands in `folder`."""
    names = ["batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))]
    return all((folder / "cifar-10-batches-py" / name).exists() for name in names)


def answers() -> bool:
    """Ask CIFAR-10's server for its headers; tell within seconds whether it answered.

    In a thread, because looking up a name can hang for longer than any time-out allows.
    """
    from torchvision.datasets import CIFAR10

    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(CIFAR10.url, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=CONNECT_SECONDS):
                answered.set()
        except (OSError, HTTPException):
            pass  # no net, no name, or something in between that is not the server

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS + 1)
    return answered.is_set()


def read(folder: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Read CIFAR-10's training or test split, downloading it (170 MB) to `folder` at first.

    Returns:
        pictures, uint8 [N, 32, 32, 3], and CIFAR-10's own labels 0..9, int64 [N].

    Raises:
        UserError: not there and not to be had.
    """
    from torchvision.datasets import CIFAR10

    if not is_here(folder) and not answers():
        raise UserError(f"--data cifar10: not in {folder.name}/ yet, and {CIFAR10.url} not reached")
    socket.setdefaulttimeout(60)  # a download that stalls ends, instead of hanging for ever
    try:
        cifar10 = CIFAR10(str(folder), train=train, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise UserError(f"--data cifar10: the download failed ({error}); run it again") from error
    finally:
        socket.setdefaulttimeout(None)
    return cifar10.data, np.array(cifar10.targets)
