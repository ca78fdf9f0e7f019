"""Safely read files that are pickles: the course's images, and torch.save's checkpoints.

A pickle is a program, and Python's unpickler imports and calls whatever it names. `_run_pickle`
implements only the few opcodes that tensors in lists and dicts need, imports nothing, and allows
only the calls in `_Calls`. Memory and time are bounded by a small multiple of the file's size.
"""

import copy
import io
import math
import pickletools
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.cli import UserError, read_bytes, safe_repr, say

import numpy as np
import torch
from torch import Tensor

MAX_FILE_SIZE = 2**30  # bytes of a course pickle: 85,000 images
IMAGE_SHAPE = (3, 32, 32)
LABELS = (0, 1, 2)
FORM = "save a list of (float32 tensor [3, 32, 32] in [-1, 1], int) with pickle.dump"


class RefusedError(Exception):
    """A pickle holds more than tensors in lists and dicts; the message says what."""


# ---- pickles --------------------------------------------------------------------------------

NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
TEXTS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
LITERALS = NUMBERS | TEXTS | BYTES
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
CONSTANTS |= {"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}
TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "TUPLE": None}  # None: down to the mark
MAX_KEY = 2**31  # larger numbers can be chosen to have equal hashes, which would make dicts slow
MAX_KEY_LENGTH = 2**16  # characters: long keys that are equal are slow to compare


def _run_pickle(
    stream: io.BytesIO,
    max_opcodes: int,
    call: Callable[[Any, Any], Any],
    load: Callable[[Any], Any],
) -> Any:
    """Run one pickle with a stack, marks into it, and a memo, like Python's unpickler.

    Args:
        call: called with the function (its module and name) and the arguments of each call.
        load: called with each persistent id, which torch.save uses for storages.

    Raises:
        RefusedError: it has opcodes that tensors do not need, or too many.
        Exception: of any kind, if it is broken.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop(count: int | None = None) -> list[Any]:
        start = marks.pop() if count is None else len(stack) - count
        _require(start >= 0)
        items = stack[start:]
        del stack[start:]
        return items

    for number, (opcode, value, _) in enumerate(pickletools.genops(stream)):
        if number > max_opcodes:
            raise RefusedError("has more opcodes than its tensors need")
        name = opcode.name
        if name in LITERALS:
            stack.append(value)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            _require(0 <= value < MAX_KEY)
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
            stack.append(tuple(value.split(" ", maxsplit=1)))
        elif name == "STACK_GLOBAL":
            stack.append(tuple(pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(call(*pop(2)))
        elif name == "BINPERSID":
            stack.append(load(*pop(1)))
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
        elif name == "BUILD":  # sets attributes; those of a state dict don't matter
            state = pop(1)[0]
            if not isinstance(stack[-1], dict):
                _require(isinstance(stack[-1], np.dtype) and state[1] in ("<", "|"))
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise RefusedError(f"holds other things than tensors (opcode {name})")
    raise ValueError("a pickle without an end")


def _to_dict(items: list[Any]) -> dict[Any, Any]:
    keys, values = items[::2], items[1::2]
    for key in keys:
        if type(key) is int:
            valid = abs(key) < MAX_KEY
        else:
            valid = isinstance(key, str) and len(key) < MAX_KEY_LENGTH
        if not valid:
            raise RefusedError("has dict keys that are neither short text nor small numbers")
    return dict(zip(keys, values, strict=True))


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError("not what a pickle of tensors holds")


class _Calls:
    """The only calls that a pickle of tensors needs.

    Where a result is larger than the call, it is cached: otherwise, repeating a call by reference
    could turn a few bytes of the file into any amount of memory or time.
    """

    def __init__(self) -> None:
        self.results: dict[int, tuple[Any, Any]] = {}

    def _once(self, function: Callable[[Any], Any], argument: Any) -> Any:
        # By id, because long arguments take long to compare. The argument is kept, so that no
        # other object gets its id.
        if id(argument) not in self.results:
            self.results[id(argument)] = argument, function(argument)
        return self.results[id(argument)][1]

    def __call__(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case ("torch._utils", "_rebuild_tensor_v2"), (Tensor() as storage, *place, _, _):
                return _view(storage, *place)
            case ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"), (
                content,
                *_,
            ):
                return content
            case ("torch.storage", "_load_from_bytes"), (bytes(content),):
                return self._once(_read_storage, content)
            case ("collections", "OrderedDict"), ():
                return {}
            case ((("collections", "Counter") | ("torch", "Size" | "device")), (content, *_)):
                return content
            case ("__builtin__" | "builtins", "set"), (list(content),):
                return content
            case ("_codecs", "encode"), (str(text), "latin1"):  # bytes in protocols 0 to 2
                return self._once(lambda text: text.encode("latin-1"), text)
            case ("numpy", "dtype"), (str(name), *_) if re.fullmatch("b1|[iuf][1248]", name):
                return np.dtype(f"<{name}")
            case ("numpy._core.multiarray" | "numpy.core.multiarray", "scalar"), (
                np.dtype() as dtype,
                bytes(content),
            ):
                return np.frombuffer(content, dtype, count=1)[0].item()
            case ("torch._utils" | "torch.serialization", str(name)), _ if name.startswith(
                ("_rebuild", "_get_layout")
            ):
                return function  # in place of a tensor that is sparse, quantized, ...
            case (str(module), str()), _ if module.startswith("numpy"):
                raise RefusedError("holds NumPy values other than plain numbers")
            case (str(module), str(name)), _:
                raise _refused_name(module, name)
        raise ValueError("a call of something that is no global")


def _refused_name(module: str, name: str) -> RefusedError:
    return RefusedError(f"asks for {safe_repr(f'{module}.{name}')}, which is refused")


def _read_storage(content: bytes) -> Tensor:
    storage = _read_old_format(content, HEADER_OPCODES, _refuse)
    _require(isinstance(storage, Tensor))
    return storage


# ---- torch.save -----------------------------------------------------------------------------

STORAGE_TYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # what the old format begins with
HEADER_OPCODES = 200  # more than enough for a header, or for one storage
MAX_MEMBERS = 10_000  # of a zip file; torch.save writes one for each tensor
MAX_DIMENSIONS = 16
MAX_OPCODES = 200_000  # of a checkpoint; ours have a few thousand


def read_torch_file(raw: bytes) -> Any:
    """Return the content of a file of torch.save: tensors, numbers and text in lists and dicts.

    A device, a type or a set is returned as what it was made from: text, names, a list.

    Raises:
        RefusedError: it holds something else.
        Exception: of any kind, if it is broken.
    """
    read = _read_zip if raw.startswith(b"PK") else _read_old_format
    return read(raw, MAX_OPCODES, _Calls())


def _read_zip(raw: bytes, max_opcodes: int, call: Callable[..., Any]) -> Any:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = archive.infolist()
        _require(len(members) <= MAX_MEMBERS)
        for member in members:  # torch.save does not compress
            _require(member.compress_type == zipfile.ZIP_STORED)
            _require(member.compress_size == member.file_size)
        _require(sum(member.file_size for member in members) <= len(raw))
        files = {member.filename: archive.read(member) for member in members}
    folder = next(name for name in files if name.endswith("/data.pkl")).removesuffix("data.pkl")
    _require(files.get(f"{folder}byteorder", b"little") == b"little")
    storages: dict[str, Tensor] = {}

    def load(storage: Any) -> Tensor:
        key, dtype, count = _parse(storage)
        if key not in storages:
            storages[key] = _to_storage(dtype, count, files[f"{folder}data/{key}"])
        return storages[key]

    return _run_pickle(io.BytesIO(files[f"{folder}data.pkl"]), max_opcodes, call, load)


def _read_old_format(raw: bytes, max_opcodes: int, call: Callable[..., Any]) -> Any:
    """Read a header of three pickles, the content, the keys of the storages, and the storages.

    Only the content names the types of the storages that come after it, so it is run twice.
    """
    stream = io.BytesIO(raw)
    magic, _, system = (_run_pickle(stream, HEADER_OPCODES, _refuse, _refuse) for _ in range(3))
    _require(magic == TORCH_MAGIC and system["little_endian"] is True)
    start, found, storages = stream.tell(), {}, {}

    def note(storage: Any) -> None:
        key, dtype, count = _parse(storage)
        found[key] = dtype, count

    _run_pickle(stream, max_opcodes, lambda *_: {}, note)
    for key in _run_pickle(stream, max_opcodes, _refuse, _refuse):
        _require(isinstance(key, str))
        dtype, count = found[key]
        _require(count == int.from_bytes(stream.read(8), "little"))
        storages[key] = _to_storage(dtype, count, stream.read(count * dtype.itemsize))
    stream.seek(start)
    return _run_pickle(stream, max_opcodes, call, lambda storage: storages[_parse(storage)[0]])


def _refuse(*_: Any) -> None:
    raise ValueError("a header calls nothing")


def _parse(storage: Any) -> tuple[str, torch.dtype, int]:
    """Return the key, the type and the size of a storage from its persistent id.

    No value is compared or printed before its type is known: tuples in tuples can be huge.
    """
    match storage:
        case ("storage", ("torch", str(name)), str(key), _, int(count), *view) if (
            name in STORAGE_TYPES
            and len(key) < MAX_KEY_LENGTH
            and count >= 0
            and view in ([], [None])
        ):
            return key, STORAGE_TYPES[name], count
        case ("module", (str(module), str(name)), *_):
            raise _refused_name(module, name)
        case ("storage", (str(), str(name)), *_) if name not in STORAGE_TYPES:
            raise RefusedError(f"holds tensors of type {safe_repr(name)}")
    raise ValueError("not the persistent id of a storage")


def _to_storage(dtype: torch.dtype, count: int, content: bytes) -> Tensor:
    """Return the numbers of a storage, [count]."""
    _require(len(content) == count * dtype.itemsize)
    if count == 0:  # torch.frombuffer takes no empty buffer
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype)


def _view(storage: Tensor, offset: int, size: tuple, stride: tuple) -> Tensor:
    """Return a tensor as a view of its storage, which may hold many more."""
    _require(len(stride) == len(size) <= MAX_DIMENSIONS)
    numbers = (offset, *size, *stride)
    _require(all(type(number) is int and 0 <= number < 2**62 for number in numbers))
    if 0 in size:  # no numbers at all
        return storage.as_strided(size, stride, offset)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    _require(last < len(storage) and math.prod(size) < 2**62)
    return storage.as_strided(size, stride, offset)


# ---- the course's images --------------------------------------------------------------------


def read_course_pickle(path: Path) -> tuple[Tensor, Tensor]:
    """Return the images, uint8 [N, 3, 32, 32], and the labels, int64 [N], of a course pickle."""
    content = read_bytes(path, MAX_FILE_SIZE)
    # Each image has dozens of opcodes, and 12 kB of pixels. A file with more is hostile.
    max_opcodes = len(content) // 20 + 10_000
    try:
        if content.startswith(b"PK"):
            raise RefusedError("was written by torch.save")
        items = _run_pickle(io.BytesIO(content), max_opcodes, _Calls(), _refuse)
        return _to_tensors(items, len(content))
    except RefusedError as error:
        raise UserError(f"{path}: {error}; {FORM}") from error
    except Exception as error:  # a broken file can fail anywhere: IndexError, ValueError, ...
        raise UserError(f"{path}: not a whole pickle of tensors; {FORM}") from error


def _to_tensors(items: Any, file_size: int) -> tuple[Tensor, Tensor]:
    if type(items) is int and items == TORCH_MAGIC:
        raise RefusedError("was written by torch.save")
    if not isinstance(items, list) or not items:
        raise RefusedError("holds no list of (image, label)")
    pairs = [_to_pair(index, item) for index, item in enumerate(items)]
    # An image may be repeated by reference, but all of them together may take no more than a few
    # times the memory of the file.
    if len(pairs) * math.prod(IMAGE_SHAPE) > file_size:
        raise RefusedError(f"lists more images than {file_size} bytes can hold")
    images = torch.stack([image for image, _ in pairs])
    return _to_uint8(images), torch.tensor([label for _, label in pairs])


def _to_pair(index: int, item: Any) -> tuple[Tensor, int]:
    if not (isinstance(item, tuple | list) and len(item) == 2):
        raise RefusedError(f"item {index} is not a pair (image, label)")
    image, label = item
    if not isinstance(image, Tensor):
        raise RefusedError(f"image {index} is {safe_repr(image)}")
    if image.dtype != torch.float32:
        raise RefusedError(
            f"image {index} is a tensor of {str(image.dtype).removeprefix('torch.')}"
        )
    if image.shape != IMAGE_SHAPE:
        raise RefusedError(f"image {index} has shape {str(list(image.shape))[:40]}")
    if isinstance(label, Tensor) and label.shape in ((), (1,)):
        label = label.item()
    if not (type(label) is int and label in LABELS):
        raise RefusedError(f"label {index} is {safe_repr(label)}; labels are 0 car, 1 truck, 2 cat")
    return image, label


def _to_uint8(images: Tensor) -> Tensor:
    """Turn float images into uint8: from [-1, 1], or from [0, 1] if no pixel is below 0."""
    finite = images.isfinite().flatten(1).all(dim=1).int()
    if not finite.all():
        raise RefusedError(f"image {finite.argmin()} has pixels that are NaN or infinite")
    low, high = images.min().item(), images.max().item()
    if low < -1.001 or high > 1.001:
        raise RefusedError(f"has pixels from {low:.3g} to {high:.3g}")
    if low >= 0:
        say("note: no pixel is below 0, so the images are read as lying in [0, 1]", error=True)
    shift, factor = (0, 255) if low >= 0 else (1, 127.5)
    return images.add_(shift).mul_(factor).round_().to(torch.uint8)
