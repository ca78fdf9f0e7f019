"""Read the course's pickles, lists of (float32 tensor [3, 32, 32], int label), safely.

A pickle is a program, and Python's unpickler imports and calls whatever it names. `_run_pickle`
implements only the few opcodes that a list of tensors needs, imports nothing, and allows only the
calls in `_TensorCalls`. Memory and time are bounded by a small multiple of the file's size.
"""

import copy
import io
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from common.cli import UserError, read_bytes, safe_repr, say

import numpy as np
import torch
from torch import Tensor

MAX_FILE_SIZE = 2**30  # bytes: 85,000 images
IMAGE_SHAPE = (3, 32, 32)
LABELS = (0, 1, 2)
FORM = "save a list of (float32 tensor [3, 32, 32] in [-1, 1], int) with pickle.dump"
LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
LITERALS |= {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
LITERALS |= {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CONSTANTS |= {"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}
TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}  # None: down to the mark
STORAGE_TYPES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "ByteStorage": "u1",
    "CharStorage": "i1",
    "ShortStorage": "<i2",
    "IntStorage": "<i4",
    "LongStorage": "<i8",
    "BoolStorage": "?",
}
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save's streams begin with
STORAGE_OPCODES = 200  # more than enough for the header of one storage


class _PickledTensor(NamedTuple):
    """What a pickle says about a tensor, unchecked."""

    storage: np.ndarray
    offset: int
    size: tuple
    stride: tuple


def read_course_pickle(path: Path) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 [N, 3, 32, 32], and the labels, int64 [N], of a course pickle."""
    content = read_bytes(path, MAX_FILE_SIZE)
    try:
        if content.startswith(b"PK"):
            raise UserError(f"was written by torch.save; {FORM}")
        # Each image has dozens of opcodes, and 12 kB of pixels. A file with more is hostile.
        max_opcodes = len(content) // 20 + 10_000
        items = _run_pickle(io.BytesIO(content), max_opcodes, _TensorCalls())
        return _to_tensors(items, len(content))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a broken file can fail anywhere: IndexError, ValueError, ...
        raise UserError(f"{path}: not a whole pickle of tensors; {FORM}") from error


def _run_pickle(stream: io.BytesIO, max_opcodes: int, call: Callable[[Any, Any], Any]) -> Any:
    """Run one pickle with a stack, marks into it, and a memo, as Python's unpickler does.

    Args:
        call: called with each function, in a valid file (module, name), and its arguments.

    Raises:
        UserError: it has opcodes that a list of images does not need, or too many.
        Exception: of any kind, if it is broken.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int | None = None) -> list[Any]:
        start = marks.pop() if count is None else len(stack) - count
        items = stack[start:]
        del stack[start:]
        return items

    for number, (opcode, value, _) in enumerate(pickletools.genops(stream)):
        if number > max_opcodes:
            raise UserError(f"has more opcodes than a list of images needs; {FORM}")
        name = opcode.name
        if name in LITERALS:
            stack.append(value)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[value])
        elif name in CONSTANTS:
            stack.append(copy.copy(CONSTANTS[name]))
        elif name in TUPLE_SIZES:
            stack.append(tuple(pop(TUPLE_SIZES[name])))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "GLOBAL":
            stack.append(tuple(value.split(" ")))  # (module, name), which is never imported
        elif name == "STACK_GLOBAL":
            stack.append(tuple(pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(call(*pop(2)))
        elif name == "LIST":
            stack.append(pop())
        elif name in ("APPEND", "APPENDS"):
            items = pop(1 if name == "APPEND" else None)
            _require(isinstance(stack[-1], list))
            stack[-1].extend(items)
        elif name == "DICT":
            stack.append(_to_dict(pop()))
        elif name in ("SETITEM", "SETITEMS"):
            items = pop(2 if name == "SETITEM" else None)
            _require(isinstance(stack[-1], dict))
            stack[-1].update(_to_dict(items))
        elif name == "BUILD":  # nothing but the state of a NumPy dtype, its byte order
            state = pop(1)[0]
            _require(isinstance(stack[-1], np.dtype) and state[1] in ("<", "|"))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME", "BINPERSID"):  # a persistent id is a storage's
            raise UserError(f"holds other things than images (opcode {name}); {FORM}")
    raise ValueError("a pickle without an end")


class _TensorCalls:
    """The only calls that a pickle of tensors needs.

    Results are cached: otherwise, repeating a call by reference could turn a few bytes of the file
    into any amount of memory or time.
    """

    def __init__(self) -> None:
        self.encoded: dict[str, bytes] = {}
        self.storages: dict[bytes, np.ndarray] = {}

    def __call__(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case ("torch._utils", "_rebuild_tensor_v2"), (
                np.ndarray() as storage,
                int(offset),
                tuple(size),
                tuple(stride),
                *_,
            ):
                return _PickledTensor(storage, offset, size, stride)
            case ("torch.storage", "_load_from_bytes"), (bytes(content),):
                if content not in self.storages:
                    self.storages[content] = _load_storage(content)
                return self.storages[content]
            case ("collections", "OrderedDict"), ():
                return {}  # the tensor's hooks: none
            case ("_codecs", "encode"), (str(text), "latin1"):  # bytes in protocols 0 to 2
                if text not in self.encoded:
                    self.encoded[text] = text.encode("latin-1")
                return self.encoded[text]
            case ("numpy", "dtype"), (str(name), *_) if re.fullmatch("[iu][1248]", name):
                return np.dtype(f"<{name}")
            case ("numpy._core.multiarray" | "numpy.core.multiarray", "scalar"), (
                np.dtype() as dtype,
                bytes(content),
            ):
                return int(np.frombuffer(content, dtype, count=1)[0])
            case (str(module), str()), _ if module.startswith("numpy"):
                raise UserError(f"holds NumPy arrays; {FORM}")
            case (str(module), str(name)), _:
                raise UserError(
                    f"asks for {safe_repr(f'{module}.{name}')}, which is refused; {FORM}"
                )
        raise ValueError("a call of something that is no global")


def _load_storage(content: bytes) -> np.ndarray:
    """Return the numbers of one storage as torch.save writes it: five pickles, then bytes."""

    def refuse(function: Any, arguments: Any) -> Any:
        raise ValueError("a storage's header calls nothing")

    stream = io.BytesIO(content)
    magic, _, system, header, keys = (
        _run_pickle(stream, STORAGE_OPCODES, call=refuse) for _ in range(5)
    )
    kind, type_, key, _, count, view = header
    _require(magic == TORCH_MAGIC and system["little_endian"] is True)
    _require(kind == "storage" and type_[0] == "torch" and view is None and keys == [key])
    if type_[1] not in STORAGE_TYPES:
        raise UserError(f"holds tensors of type {safe_repr(type_[1])}; {FORM}")
    _require(count == int.from_bytes(stream.read(8), "little"))
    return np.frombuffer(content, STORAGE_TYPES[type_[1]], count, stream.tell())


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("not what a pickle of tensors holds")


def _to_dict(items: list[Any]) -> dict[str, Any]:
    keys, values = items[::2], items[1::2]
    _require(all(isinstance(key, str) for key in keys))
    return dict(zip(keys, values, strict=True))


def _to_tensors(items: Any, file_size: int) -> tuple[Tensor, Tensor]:
    if items == TORCH_MAGIC:
        raise UserError(f"was written by torch.save; {FORM}")
    if not isinstance(items, list) or not items:
        raise UserError(f"holds no list of (image, label); {FORM}")
    pairs = []
    for index, item in enumerate(items):
        # An image may be repeated by reference, but all of them together may take no more
        # memory than the file.
        if index * np.prod(IMAGE_SHAPE) > file_size:
            raise UserError(f"lists more images than {file_size} bytes can hold; {FORM}")
        pairs.append(_to_pair(index, item))
    images = _to_uint8([image for image, _ in pairs])
    return images, torch.tensor([label for _, label in pairs], dtype=torch.int64)


def _to_pair(index: int, item: Any) -> tuple[np.ndarray, int]:
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise UserError(f"item {index} is not a pair (image, label); {FORM}")
    image, label = item
    if not isinstance(image, _PickledTensor):
        raise UserError(f"image {index} is {safe_repr(image)}; {FORM}")
    if image.storage.dtype != np.float32:
        raise UserError(f"image {index} is a tensor of {image.storage.dtype}; {FORM}")
    if image.size != IMAGE_SHAPE:
        raise UserError(f"image {index} has shape {str(list(image.size))[:40]}; {FORM}")
    if isinstance(label, _PickledTensor) and label.size in ((), (1,)):
        label = label.storage[label.offset].item() if label.offset >= 0 else None
    if not (type(label) is int and label in LABELS):
        raise UserError(f"label {index} is {safe_repr(label)}; labels are 0 car, 1 truck, 2 cat")
    return _view(image), label


def _view(tensor: _PickledTensor) -> np.ndarray:
    """Return an image as a view of its storage, which may hold many more images."""
    storage, offset, size, stride = tensor
    _require(len(stride) == len(size) and all(type(step) is int and step >= 0 for step in stride))
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    _require(offset >= 0 and last < len(storage))
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _to_uint8(images: list[np.ndarray]) -> Tensor:
    """Turn float images into uint8: from [-1, 1], or from [0, 1] if no pixel is below 0."""
    extremes = np.array([(image.min(), image.max()) for image in images])
    finite = np.isfinite(extremes).all(axis=1)
    if not finite.all():
        raise UserError(f"image {int(finite.argmin())} has pixels that are NaN or infinite")
    low, high = float(extremes.min()), float(extremes.max())
    if low < -1.001 or high > 1.001:
        raise UserError(f"has pixels from {low:.3g} to {high:.3g}; {FORM}")
    if low >= 0:
        say("note: no pixel is below 0, so the images are read as lying in [0, 1]", error=True)
    shift, factor = (0, 255) if low >= 0 else (1, 127.5)
    pixels = np.empty((len(images), *IMAGE_SHAPE), dtype=np.uint8)
    for place, image in zip(pixels, images, strict=True):
        place[:] = np.rint((image + np.float32(shift)) * np.float32(factor))
    return torch.from_numpy(pixels)
