"""Mutated files of each kind that is read: they load or are refused in one short line, and do no
harm.

This file is also the script that tries them, in a process of its own: there, starting a program,
a connection, an import, or a write anywhere else is an error, and memory and time are bounded.
`make fuzz` tries 10,000 files of each kind.
"""

import argparse
import codecs
import contextlib
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import PROJECT, UserError

import pytest

CASES = int(os.environ.get("FUZZ_CASES", 200))
MEGABYTE = 2**20
SECONDS = 10  # of computing, for one file
FAILURES = 5  # of one kind, after which it is enough
LONGEST_LINE = 500

FORBIDDEN = (
    *("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty."),
    *("os.startfile", "socket.", "urllib.", "ctypes.", "exec", "compile", "code.__new__"),
)
WRITES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "shutil.")
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
IMPORTED_LATE = ("encodings", "PIL")  # codecs and decoders, which depend on what is in a file

OPCODES = [bytes([code]) for code in b"(.0N]})tabcdeghjqrRsuoQX\x81\x85\x86\x88\x93\x94\x95"]
OPCODES += [b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\x7f" * 9, b"]" * 2000, b"h\0h\1R" * 300]
OPCODES += [b"cbuiltins\nbytearray\n", b"ctorch\nSize\n", b"ccollections\nOrderedDict\n"]
OPCODES += [b"cos\nsystem\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"\x85R", b")R", b"}b"]
VALUES = [b"null", b"true", b"[", b"{}", b"[]", b"NaN", b"-Infinity", b"1e999", b"-1", b"0.5"]
VALUES += [b"9" * 400, b"9" * 5000, b'"\\u001b[2J"', b"\x1b[2J", b"\xff\xfe", b'"', b"x" * 200_000]
CELLS = [*VALUES, b";", b"\t", b",", b"\n", b"\r", b"\0", b"cat", b"sep=;\n", b"yes"]
FIELDS = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x20", b"GIF89a", b"%!PS"]


@dataclass
class Kind:
    """A kind of file: whole ones, and what is done with one."""

    path: Path
    seeds: list[bytes]
    tokens: list[bytes]  # to be put into them
    use: Callable[[], Any]
    pack: Callable[[bytes], bytes] = bytes  # from what is mutated to the file
    memory: int = 200 * MEGABYTE


# ---- the kinds of files ---------------------------------------------------------------------


def small_dataset() -> Any:
    from conftest import make_dataset

    return make_dataset("train", (3, 2, 2))


def course_pickles(folder: Path) -> Kind:
    from common.data import DataFolder

    import numpy as np

    dataset = small_dataset()
    images = [image.clone() for image in dataset.images.float() / 127.5 - 1]
    labels = dataset.labels.tolist()
    variants = [list(zip(images, each, strict=True)) for each in (labels, map(np.int64, labels))]
    seeds = [pickle.dumps(items, protocol) for items in variants for protocol in range(6)]
    data = DataFolder("fuzz", folder)
    return Kind(folder / "train.pickle", seeds, OPCODES, lambda: data.load("train"))


def checkpoint_files(path: Path) -> list[bytes]:
    """Return our own and a bare checkpoint, both in torch's zip form and in its old one."""
    from common.model import build_model, save_checkpoint

    import torch

    model = build_model()
    metadata = {"recipe": {"name": "final", "epochs": 3}, "seed": 0, "trained_on": {"name": "x"}}
    training = {"history": [{"loss": 1.0, "recall": [0.5, 1.0]}], "labels": torch.arange(9)}
    save_checkpoint(path, model, metadata, training)
    files = []
    for content in (torch.load(path, weights_only=True), model.state_dict()):
        for zipped in (True, False):
            stream = io.BytesIO()
            torch.save(content, stream, _use_new_zipfile_serialization=zipped)
            files.append(stream.getvalue())
    return files


def use_checkpoint(file: Any, name: str = "") -> None:
    from common.model import describe_checkpoint, load_checkpoint

    metadata = load_checkpoint(file, name=name).metadata
    assert len(describe_checkpoint(metadata)) < LONGEST_LINE
    json.dumps(metadata)


def checkpoints(folder: Path) -> Kind:
    path = folder / "it.ckpt"
    return Kind(path, checkpoint_files(path), OPCODES, lambda: use_checkpoint(path))


def checkpoint_pickles(folder: Path) -> Kind:
    """Return checkpoints whose pickle alone is mutated: the zip file around it is whole."""
    path = folder / "it.ckpt"
    file = checkpoint_files(path)[0]
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (place,) = (name for name in members if name.endswith("data.pkl"))

    def pack(content: bytes) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as target:
            for name, member in members.items():
                target.writestr(name, content if name == place else member)
        return stream.getvalue()

    return Kind(path, [members[place]], OPCODES, lambda: use_checkpoint(path), pack)


def hand_ins(folder: Path) -> Kind:
    import evaluation

    path = folder / "work.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("work/AUTHOR.txt", "author: x\n")
        archive.writestr("work/report/model.ckpt", checkpoint_files(folder / "it.ckpt")[0])

    def use() -> None:
        for source in evaluation.find_sources([path]):
            use_checkpoint(evaluation.read_source(source), source.name)

    return Kind(path, [path.read_bytes()], FIELDS, use)


def image_folders(folder: Path) -> Kind:
    from common.data import DataFolder, read_image, write_image_folder

    import numpy as np
    from PIL import Image

    write_image_folder(folder, small_dataset())
    data, path = DataFolder("fuzz", folder), folder / "train/cat/x.png"
    pixels = np.arange(32 * 32 * 4, dtype=np.uint8).reshape(32, 32, 4)
    color, gray = Image.fromarray(pixels[..., :3]), Image.fromarray(pixels[..., 0] * np.uint16(256))
    drawn = [(color, name) for name in ("PNG", "JPEG", "GIF", "BMP", "WEBP")]
    drawn += [(gray, "PNG"), (Image.fromarray(pixels), "PNG"), (color.convert("P"), "PNG")]
    seeds = []
    for image, name in drawn:
        stream = io.BytesIO()
        image.save(stream, name)
        seeds.append(stream.getvalue())

    def use() -> None:
        with contextlib.suppress(UserError):
            assert read_image(path, resize=True).shape == (3, 32, 32)
        assert len(data.load("train")) == 8

    # A header may claim 50 million pixels, which take 200 MB in each of a few forms.
    return Kind(path, seeds, FIELDS, use, memory=1000 * MEGABYTE)


def label_corrections(folder: Path) -> Kind:
    from common.data import Correction, apply_corrections, format_corrections, read_corrections
    from label_errors import read_decisions

    dataset, path = small_dataset(), folder / "label_corrections.csv"
    labels = dataset.labels.tolist()
    rows = [Correction(i, labels[i], (labels[i] + 1) % 3, i / 8, i < 2) for i in range(5)]
    text = format_corrections(dataset, rows)
    seeds = [text.encode(), text.encode("utf-16"), text.replace(",", ";").encode()]
    quoted = [",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines()]
    seeds.append("\n".join(quoted).encode())

    def use() -> None:
        read_decisions(path, dataset)  # it moves a file for other data out of the way
        if path.exists():
            apply_corrections(dataset, read_corrections(path, dataset))

    return Kind(path, seeds, CELLS, use)


def settings(folder: Path) -> Kind:
    import training

    path = folder / "tuning.json"
    found = {"learning_rate": 0.01, "batch_size": 64, "weight_decay": 0.05, "cutout": 4}
    seeds = [json.dumps({"trials": [], "best": {"settings": found, "g_mean": 0.5}}).encode()]
    return Kind(path, seeds, VALUES, lambda: training.read_settings(path))


def true_labels(folder: Path) -> Kind:
    from common.data import DataFolder

    from conftest import write_course_pickle

    dataset, data = small_dataset(), DataFolder("fuzz", folder)
    write_course_pickle(folder / "train.pickle", dataset)
    seeds = [json.dumps({"train": dataset.labels.tolist(), "dev": [0, 1]}).encode()]
    return Kind(folder / "true_labels.json", seeds, VALUES, lambda: data.load("train"))


def steps_of_a_report(folder: Path) -> Kind:
    import report

    from conftest import write_course_pickle

    for split in ("train", "dev"):
        write_course_pickle(folder / f"{split}.pickle", small_dataset())
    arguments = dict.fromkeys(("full", "labels", "hand_in", "checkpoint", "pixel_range"))
    arguments |= {"data": str(folder), "seed": [0], "device": "cpu", "quick": False, "author": ""}
    made = report.Report(argparse.Namespace(**arguments), folder)
    made.steps = made.steps[:2]
    origin = {"options": ["--data", "x"], "data": {"name": "x"}, "code": "0123", "inputs": "4567"}
    made.origin_of = lambda step: origin
    made.run_step = lambda step, origin, resume: 1.0
    path = Path(made.paths[made.steps[0].name]) / "step.json"
    path.parent.mkdir(parents=True)
    made.result_of(made.steps[0]).write_text("{}")
    seeds = [json.dumps(origin | {"seconds": seconds}).encode() for seconds in (12.5, None)]

    def use() -> None:
        made.seconds.clear()
        made.run()

    return Kind(path, seeds, VALUES, use)


KINDS = (
    course_pickles,
    checkpoints,
    checkpoint_pickles,
    hand_ins,
    image_folders,
    label_corrections,
    settings,
    true_labels,
    steps_of_a_report,
)


# ---- trying them ----------------------------------------------------------------------------


def mutate(content: bytes, tokens: list[bytes], generator: random.Random) -> bytes:
    """Change, cut, repeat, insert or replace something, often at the start, where headers are."""
    changed = bytearray(content)
    for _ in range(generator.choice((1, 1, 2, 4))):
        start = generator.randrange(max(1, min(len(changed), generator.choice((800, 2**30)))))
        end = start + generator.choice((1, 1, 1, 4, 40))
        match generator.randrange(6):
            case 0:
                changed[start:end] = generator.randbytes(end - start)
            case 1:
                del changed[start:end]
            case 2:
                changed[start:start] = changed[start:end] * generator.choice((1, 1, 100))
            case 3:
                changed[start:start] = generator.choice(tokens)
            case 4:  # a number, a word, or a cell
                if found := re.compile(rb"[\w.+-]+").search(changed, start):
                    changed[found.start() : found.end()] = generator.choice(tokens)
            case 5:
                del changed[start : generator.choice((end, end, len(changed)))]
    return bytes(changed)


class Watch:
    """An audit hook that stops, and keeps, whatever a file must not bring about."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.active, self.events = str(folder), False, []

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.active and self.is_harm(event, arguments):
            self.events.append(f"{event} {str(arguments)[:200]}")
            raise PermissionError(event)

    def is_harm(self, event: str, arguments: tuple) -> bool:
        if event == "import":
            return not arguments[0].startswith(IMPORTED_LATE)
        if event == "open":
            path, mode, flags = arguments
            writes = set(mode or "") & set("wax+") or (flags or 0) & WRITE_FLAGS
            return bool(writes) and not self.is_inside(path)
        if event.startswith(WRITES):
            return not self.is_inside(arguments[0])
        return event.startswith(FORBIDDEN)

    def is_inside(self, path: Any) -> bool:
        return isinstance(path, int) or os.fsdecode(path).startswith(self.folder)


class TooSlow(BaseException):
    """One file took more than SECONDS; no `except Exception` hides it."""


def try_one(kind: Kind, watch: Watch) -> tuple[bool, str]:
    """Use the file that is there; return whether it was refused, and what was wrong with that."""
    printed, refused, wrong = io.StringIO(), False, ""
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            watch.active = True
            kind.use()
    except UserError as error:
        refused = True
        printed.write(str(error))
    except (Exception, TooSlow) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        wrong = f"{type(error).__name__} in {at.filename}:{at.lineno}: {str(error)[:200]!r}"
    finally:
        watch.active = False
    for line in printed.getvalue().split("\n"):
        if len(line) > LONGEST_LINE or not line.isprintable():
            wrong = wrong or f"prints {line[:LONGEST_LINE]!r}"
    if watch.events:
        wrong = f"causes {watch.events}"
        watch.events.clear()
    return refused, wrong


def try_kind(make: Callable[[Path], Kind], folder: Path, watch: Watch) -> dict[str, Any]:
    """Try CASES mutated files of a kind; return how many were refused, and what went wrong."""
    import resource
    import signal

    for width in (16, 32):  # JSON may be in any of these, whose modules Python loads when needed
        for order in ("", "-le", "-be"):
            codecs.lookup(f"utf-{width}{order}")

    def most_memory() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    folder.mkdir()
    kind, generator = make(folder), random.Random(make.__name__)
    failures, refusals = [], 0
    for content in kind.seeds:  # whole ones load; what Python imports late, it imports now
        kind.path.write_bytes(kind.pack(content))
        kind.use()
    before = most_memory()
    for number in range(CASES):
        content = kind.pack(mutate(generator.choice(kind.seeds), kind.tokens, generator))
        kind.path.write_bytes(content)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        refused, wrong = try_one(kind, watch)
        signal.setitimer(signal.ITIMER_PROF, 0)
        refusals += refused
        if most_memory() - before > kind.memory:
            wrong, before = wrong or "takes too much memory", most_memory()
        if wrong:
            (folder / f"failed-{number}").write_bytes(content)
            failures.append(f"file {number}: {wrong}")
            if len(failures) == FAILURES:
                break
    return {"failures": failures, "refused": refusals}


def try_all(folder: Path) -> None:
    """Try all kinds, and print what came out."""
    import resource
    import signal

    import torch

    def stop(*_: Any) -> None:
        raise TooSlow

    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, stop)
    # More than this and the machine that runs the tests is in danger.
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 3000 * MEGABYTE,) * 2)
    watch = Watch(folder)
    sys.addaudithook(watch)
    tried = {make.__name__: try_kind(make, folder / make.__name__, watch) for make in KINDS}
    print(json.dumps(tried))


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    done = subprocess.run(
        [sys.executable, __file__, folder],
        env=os.environ | {"PYTHONPATH": str(PROJECT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux' limits")
@pytest.mark.parametrize("kind", [make.__name__ for make in KINDS])
def test_mutated_files_load_or_are_refused_in_one_line_and_do_nothing(tried, kind):
    assert tried[kind]["failures"] == []
    # A step of a report whose state is of no use runs again; other files are refused.
    assert (tried[kind]["refused"] > CASES / 20) == (kind != "steps_of_a_report")


if __name__ == "__main__":
    try_all(Path(sys.argv[1]))
