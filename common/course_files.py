"""Read the course's own files: one pickled list of (tensor float32 [3, 32, 32], int label) each.

A pickle is a program, and loading one runs it: a file from a stranger could delete your home
folder. The unpickler below knows just the three names that this format needs. Everything else
that a file may ask for (os.system, eval, ...) is refused before anything is called.
https://docs.python.org/3/library/pickle.html#restricting-globals
"""

import collections
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.console import UserError

LABELS = (0, 1, 2)


def _load_storage(content: bytes) -> Any:
    """Stand in for torch.storage._load_from_bytes, which would load any pickle within."""
    return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")


ALLOWED_NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _load_storage,
    ("collections", "OrderedDict"): collections.OrderedDict,  # the tensor's (empty) hooks
}


class _TensorUnpickler(pickle.Unpickler):
    """Builds lists, tuples, numbers and tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED_NAMES:
            raise UserError(
                f"asks for {module}.{name}, which no file of pictures needs; not loaded"
            )
        return ALLOWED_NAMES[module, name]


def read_pickle(path: Path) -> tuple[Tensor, Tensor]:
    """Read one of the course's pickles.

    Returns:
        pictures, float32 [N, 3, 32, 32] as they stand in the file, and labels, int64 [N].

    Raises:
        UserError: no such file, not a pickle, cut short, not of the course's form, or unsafe.
    """
    try:
        with path.open("rb") as file:
            items = _TensorUnpickler(file).load()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except Exception as error:  # a broken pickle can fail in any way: EOFError, ValueError, ...
        raise UserError(f"{path}: not a whole pickle of tensors ({error})") from error
    _check_items(path, items)
    pictures = torch.stack([picture for picture, _ in items])
    return pictures, torch.tensor([label for _, label in items], dtype=torch.int64)


def _check_items(path: Path, items: Any) -> None:
    if not isinstance(items, list) or not items:
        raise UserError(f"{path}: holds no list of (picture, label); the course's files do")
    for index, item in enumerate(items):
        if not (isinstance(item, tuple) and len(item) == 2):
            raise UserError(f"{path}: item {index} is not a pair (picture, label)")
        picture, label = item
        if not isinstance(picture, Tensor) or picture.dtype != torch.float32:
            raise UserError(f"{path}: picture {index} is not a float32 tensor")
        if picture.shape != (3, 32, 32):
            shape = list(picture.shape)
            raise UserError(f"{path}: picture {index} has shape {shape}, it must be [3, 32, 32]")
        if not isinstance(label, int) or label not in LABELS:
            raise UserError(f"{path}: label {index} is {label!r}; labels are 0 car, 1 truck, 2 cat")
