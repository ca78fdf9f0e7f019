"""Data sets from pickles and image folders, honest and hostile; near-duplicates; corrections."""

import io
import itertools
import json
import os
import pickle
import re
import struct
import sys
import tracemalloc
import zlib
from dataclasses import replace

from common import data
from common.cli import UserError
from common.data import (
    CLASS_NAMES,
    Correction,
    Dataset,
    apply_corrections,
    format_corrections,
    near_duplicates,
    open_data,
    read_corrections,
    read_image,
    to_float,
    write_image_folder,
)

import numpy as np
import pytest
import torch
from conftest import COURSE_DATA, items_of, make_dataset, needs_course_data, write_course_pickle
from PIL import Image

MEGABYTE = 2**20


def load(folder, split="train"):
    return open_data(str(folder)).load(split)


@pytest.fixture
def refusal(tmp_path):
    """Return a function that loads bytes as train.pickle and returns the one line they get."""

    def refuse(content):
        (tmp_path / "train.pickle").write_bytes(content)
        with pytest.raises(UserError) as error:
            load(tmp_path)
        message = str(error.value)
        assert "train" in message and len(message) < 400 and "\n" not in message
        assert "weights_only" not in message
        return message

    return refuse


# ---- Dataset --------------------------------------------------------------------------------


def test_float_images_lie_in_0_1():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert to_float(pixels).tolist() == pytest.approx([0, 0.2, 1])


def test_fingerprint_changes_with_one_pixel_or_one_label(train):
    images, labels = train.images.clone(), train.labels.clone()
    images[0, 0, 0, 0] ^= 1
    labels[0] = (labels[0] + 1) % 3
    changed = [replace(train, images=images), replace(train, labels=labels)]
    assert len({train.fingerprint, *(each.fingerprint for each in changed)}) == 3


def test_subset_and_first_keep_images_labels_and_true_labels_together(train):
    train = replace(train, true_labels=(train.labels + 1) % 3)
    few = train.first(5)
    assert few.class_counts == [5, 5, 5]
    expected = [i for y in range(3) for i in torch.where(train.labels == y)[0][:5].tolist()]
    index = torch.tensor(sorted(expected))
    for attribute in ("images", "labels", "true_labels"):
        assert torch.equal(getattr(few, attribute), getattr(train, attribute)[index])
    assert few.fingerprint == train.subset(index).fingerprint


def test_metadata_counts_classes_and_wrong_labels(train, dev):
    true_labels = train.labels.clone()
    true_labels[:3] = (true_labels[:3] + 1) % 3
    metadata = data.describe(replace(train, true_labels=true_labels), None, dev)
    assert metadata["name"] == "tiny"
    assert metadata["splits"]["train"]["class_counts"] == {"car": 40, "truck": 12, "cat": 8}
    assert metadata["splits"]["train"]["wrong_labels"] == 3
    assert metadata["splits"]["dev"]["wrong_labels"] is None


# ---- open_data ------------------------------------------------------------------------------


def test_only_the_split_asked_for_is_read(course_folder, dev):
    (course_folder / "train.pickle").write_bytes(b"broken")
    assert load(course_folder, "dev").fingerprint == dev.fingerprint


def test_quick_keeps_60_images_of_each_class(tmp_path):
    write_course_pickle(tmp_path / "train.pickle", make_dataset("train", (70, 65, 20)))
    assert open_data(str(tmp_path)).load("train", quick=True).class_counts == [60, 60, 20]


def test_missing_folders_and_splits_are_named(tmp_path, course_folder):
    with pytest.raises(UserError, match="nowhere: no such folder, and not auto, cifar10 or synth"):
        open_data(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"holds neither pickles \(train.pickle"):
        open_data(str(tmp_path))
    with pytest.raises(UserError, match="is a file; name the folder"):
        open_data(str(course_folder / "train.pickle"))
    (course_folder / "dev.pickle").unlink()
    folder = open_data(str(course_folder))
    assert folder.has("train") and not folder.has("dev")
    with pytest.raises(UserError, match=r"neither dev.pickle nor dev/<class>"):
        folder.load("dev")


def test_folder_named_like_a_prepared_set_is_not_taken_for_it(tmp_path, train):
    for name in ("synthetic", "cifar10"):
        (tmp_path / name).mkdir()
        write_course_pickle(tmp_path / name / "train.pickle", train)
        assert open_data(str(tmp_path / name)).name == f"folder-{name}"


def test_auto_takes_data_then_cifar10_then_synthetic_images(monkeypatch, tmp_path, train, capsys):
    from data import cifar10, synthetic

    reachable = False
    monkeypatch.setattr(data, "DATA_FOLDER", tmp_path)
    monkeypatch.setattr(cifar10, "is_downloaded", lambda: False)
    monkeypatch.setattr(cifar10, "is_reachable", lambda: reachable)
    for module in (cifar10, synthetic):
        monkeypatch.setattr(module, "prepare", lambda folder: None)
    assert open_data("auto").name == "synthetic"
    assert capsys.readouterr().out.count("using synthetic images") == 1
    reachable = True
    assert open_data("auto").name == "cifar10"
    write_image_folder(tmp_path, train)
    assert open_data("auto").load("train").fingerprint == train.fingerprint
    assert open_data("synthetic").name == "synthetic"


def test_a_class_without_images_is_named(tmp_path, train):
    write_course_pickle(tmp_path / "train.pickle", train.subset(train.labels != 2))
    with pytest.raises(UserError, match="train: class cat has no images"):
        load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *("[]", '{"train": [0]}', '{"train": {}}', '{"train": "x"}', '{"dev": [0]}'),
        *(json.dumps({"train": [label] + [0] * 59}) for label in (3, -1, True, 1.0, "0", None)),
    ],
)
def test_true_labels_that_do_not_fit_are_refused(course_folder, train, content):
    (course_folder / "true_labels.json").write_text(json.dumps({"train": train.labels.tolist()}))
    assert load(course_folder).true_labels.tolist() == train.labels.tolist()
    (course_folder / "true_labels.json").write_text(content)
    with pytest.raises(UserError, match="true_labels.json: train must be a list of 60 labels"):
        load(course_folder)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names that are not text")
def test_a_folder_whose_name_is_not_text_gets_one_that_checkpoints_can_hold(tmp_path, train):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    write_course_pickle(folder / "train.pickle", train)
    assert load(folder).name == "caf\N{REPLACEMENT CHARACTER}"


# ---- the course's pickles: honest ones ------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_all_protocols_come_back_pixel_by_pixel(tmp_path, train, protocol):
    (tmp_path / "train.pickle").write_bytes(pickle.dumps(items_of(train), protocol))
    loaded = load(tmp_path)
    assert torch.equal(loaded.images, train.images) and loaded.images.dtype == torch.uint8
    assert torch.equal(loaded.labels, train.labels)


VARIANTS = {
    "lists": lambda x, y: [x, y],
    "tensor labels": lambda x, y: (x, torch.tensor(y)),
    "tensors of one label": lambda x, y: (x, torch.tensor([y], dtype=torch.int32)),
    "numpy labels": lambda x, y: (x, np.int64(y)),
    "small numpy labels": lambda x, y: (x, np.uint8(y)),
    "gradients": lambda x, y: (x.clone().requires_grad_(), y),
}


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_harmless_variants_are_read(tmp_path, train, variant, protocol):
    items = [VARIANTS[variant](x, y) for x, y in items_of(train)]
    (tmp_path / "train.pickle").write_bytes(pickle.dumps(items, protocol))
    assert load(tmp_path).fingerprint == train.fingerprint


def test_views_of_one_large_storage_are_read(tmp_path, train):
    train = train.first(3)
    images = (train.images.float() / 127.5 - 1).permute(0, 2, 3, 1).contiguous()
    views = list(images.permute(0, 3, 1, 2))  # each with an offset, and strides out of order
    (tmp_path / "train.pickle").write_bytes(
        pickle.dumps(list(zip(views, train.labels.tolist(), strict=True)))
    )
    assert load(tmp_path).fingerprint == train.fingerprint


def test_images_in_0_1_are_read_as_such_and_that_is_said(tmp_path, train, capsys):
    items = [((x + 1) / 2, y) for x, y in items_of(train)]
    (tmp_path / "train.pickle").write_bytes(pickle.dumps(items))
    assert load(tmp_path).fingerprint == train.fingerprint
    assert "read as lying in [0, 1]" in capsys.readouterr().err


def test_an_image_may_be_repeated_by_reference_a_few_times(tmp_path, train):
    items = items_of(train)
    items += [item for item in items if item[1] == 2] * 2  # oversampled cats
    (tmp_path / "train.pickle").write_bytes(pickle.dumps(items))
    assert load(tmp_path).class_counts == [40, 12, 24]


@needs_course_data
def test_the_courses_own_files_have_the_reports_counts():
    assert load(COURSE_DATA, "train").class_counts == [4951, 450, 225]
    assert load(COURSE_DATA, "dev").class_counts == [743, 67, 34]


# ---- the course's pickles: broken and foreign ones ------------------------------------------


def torch_saved(items, zipped):
    stream = io.BytesIO()
    torch.save(items, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def one_item(image, label=0):
    return pickle.dumps([(image, label)])


def with_pixel(value):
    items = items_of(make_dataset())
    items[3][0][0, 0, 0] = value
    return pickle.dumps(items)


ZEROS = torch.zeros(3, 32, 32)
FOREIGN = {
    "truncated": (lambda: with_pixel(0.0)[:-1000], "not a whole pickle"),
    "empty": (lambda: b"", "not a whole pickle"),
    "text": (lambda: b"hello", "not a whole pickle"),
    "no list": (lambda: pickle.dumps({"a": 1}), "holds no list of"),
    "empty list": (lambda: pickle.dumps([]), "holds no list of"),
    "no pair": (lambda: pickle.dumps([1, 2]), "item 0 is not a pair"),
    "28x28": (lambda: one_item(torch.zeros(3, 28, 28)), r"shape \[3, 28, 28\]; save a list of"),
    "float64": (lambda: one_item(ZEROS.double()), "tensor of float64; save a list of"),
    "uint8": (lambda: one_item(ZEROS.byte()), "tensor of uint8; save a list of"),
    "bfloat16": (lambda: one_item(ZEROS.bfloat16()), "image 0 is a tensor of bfloat16"),
    "NumPy images": (
        lambda: one_item(ZEROS.numpy()),
        "holds NumPy values other than plain numbers; save a list of",
    ),
    "Pillow images": (lambda: one_item(Image.new("RGB", (32, 32))), "asks for 'PIL.Image"),
    "quantized": (
        lambda: one_item(torch.quantize_per_tensor(ZEROS, 0.1, 0, torch.qint8)),
        "holds tensors of type 'QInt8Storage'",
    ),
    "one tensor": (lambda: pickle.dumps(torch.zeros(2, 3, 32, 32)), "holds no list of"),
    "a set": (lambda: one_item({1, 2}), "holds other things than tensors"),
    "torch.save": (lambda: torch_saved([(ZEROS, 0)], True), "written by torch.save; save"),
    "old torch.save": (lambda: torch_saved([(ZEROS, 0)], False), "written by torch.save; save"),
    "text label": (lambda: one_item(ZEROS, "cat"), "label 0 is 'cat'; labels are 0 car"),
    "label 3": (lambda: one_item(ZEROS, 3), "label 0 is 3; labels are 0 car"),
    "label -1": (lambda: one_item(ZEROS, -1), "label 0 is -1; labels are"),
    "label True": (lambda: one_item(ZEROS, True), "label 0 is True; labels are"),
    "label 1.0": (lambda: one_item(ZEROS, torch.tensor(1.0)), "label 0 is 1.0; labels are"),
    "NaN": (lambda: with_pixel(float("nan")), "image 3 has pixels that are NaN"),
    "infinite": (lambda: with_pixel(float("-inf")), "image 3 has pixels that are NaN or infinite"),
    "0 to 255": (lambda: with_pixel(255.0), "has pixels from -1 to 255; save a list of"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_pickle_gets_a_line_that_says_what_it_is(refusal, name):
    content, message = FOREIGN[name]
    assert re.search(message, refusal(content()))


# ---- the course's pickles: hostile ones -----------------------------------------------------


def global_(module, name):
    """Return the opcodes that ask for a global."""
    return b"".join(b"\x8c" + bytes([len(x)]) + x.encode() for x in (module, name)) + b"\x93"


class Command:
    """Asks whoever unpickles it to run a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


class Storage:
    """Has the bytes of a storage loaded."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.content,)


def test_no_command_is_run(refusal, tmp_path):
    marker = tmp_path / "ran"
    assert re.search("asks for '.*system', which is refused", refusal(one_item(Command(marker))))
    refusal(one_item(Storage(pickle.dumps(Command(marker)))))
    refusal(one_item(Storage(torch_saved(Command(marker), False))))
    refusal(b"\x80\x04" + global_("builtins", "exit") + b")R.")
    assert not marker.exists()


def test_nothing_outside_can_be_changed(refusal):
    before = torch._utils._rebuild_tensor_v2.__defaults__
    state = b"N}\x8c\x0c__defaults__\x8c\x01x\x85s\x86b."
    refusal(b"\x80\x04" + global_("torch._utils", "_rebuild_tensor_v2") + state)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


def storage_stream(count):
    """Return the bytes of a storage of zeros, as a pickled tensor holds them."""
    storage = torch.zeros(count).__reduce_ex__(2)[1][0]
    return storage.__reduce__()[1][0]


def bytes_(content):
    return b"B" + struct.pack("<I", len(content)) + content


def tensor_of(size, stride, offset=b"K\0", count=4):
    """Return the opcodes of a float32 tensor of a few numbers, with any size and strides."""
    storage = (
        global_("torch.storage", "_load_from_bytes") + bytes_(storage_stream(count)) + b"\x85R"
    )
    whole = b"(" + storage + offset + size + stride + b"\x89}t"
    return global_("torch._utils", "_rebuild_tensor_v2") + whole + b"R"


def numbers(*values):
    return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"


NESTED_TUPLES = b")" + b"\x85" * 9000
LARGE_INT = b"\x8b" + struct.pack("<I", 4000) + b"\x7f" * 4000
LARGE_INTS = b"(" + LARGE_INT * 3 + b"t"
ENCODE = b"c_codecs\nencode\n"
CAR_SIZE, CAR_STRIDE = numbers(3, 32, 32), numbers(1024, 32, 1)
HOSTILE = {
    "memo index": b"]r" + struct.pack("<I", 2**27) + b".",
    "frame": b"\x95" + struct.pack("<Q", 2**60) + b"].",
    "claimed bytes": b"\x8e" + struct.pack("<Q", 2**50) + b"x.",
    "claimed text": b"X" + struct.pack("<I", 2**31) + b"x.",
    "claimed int": b"\x8b" + struct.pack("<I", 2**31 - 1) + b"\x01.",
    "claimed bytearray": b"\x96" + struct.pack("<Q", 2**50) + b"x.",
    "many empty lists": b"(" + b"]" * 50_000 + b"l.",
    "nested lists": b"]" * 9000 + b"a" * 8999 + b".",
    "list in itself": b"]\x94h\0a.",
    "encoded again and again": (
        ENCODE + b"q\0X" + struct.pack("<I", 50_000) + b"x" * 50_000
        + b"X\6\0\0\0latin1\x86q\1](" + b"h\0h\1R" * 3000 + b"e."
    ),
    "nested tuples as a key": b"}" + NESTED_TUPLES + b"Ns.",
    "nested tuples to encode": ENCODE + NESTED_TUPLES + b"X\6\0\0\0latin1\x86R.",
    "expanded": b"](" + tensor_of(numbers(*[6] * 12), numbers(*[0] * 12)) + b"K\0\x86e.",
    "expanded label": (
        b"](" + tensor_of(CAR_SIZE, CAR_STRIDE, count=3072)
        + tensor_of(numbers(*[6] * 12), numbers(*[0] * 12)) + b"\x86e."
    ),
    "beyond its storage": b"](" + tensor_of(CAR_SIZE, CAR_STRIDE, count=3071) + b"K\0\x86e.",
    "offset too far": (
        b"](" + tensor_of(CAR_SIZE, CAR_STRIDE, b"K\1", count=3072) + b"K\0\x86e."
    ),
    "negative offset": (
        b"](" + tensor_of(CAR_SIZE, CAR_STRIDE, b"J\xff\xff\xff\xff", 3072) + b"K\0\x86e."
    ),
    "negative stride": (
        b"](" + tensor_of(CAR_SIZE, numbers(1024, 32, -1), b"K\x1f", 3072) + b"K\0\x86e."
    ),
    "huge stride": b"](" + tensor_of(CAR_SIZE, LARGE_INTS, count=3072) + b"K\0\x86e.",
    "huge size": b"](" + tensor_of(LARGE_INTS, CAR_STRIDE) + b"K\0\x86e.",
    "huge label": b"](" + tensor_of(CAR_SIZE, CAR_STRIDE, count=3072) + LARGE_INT + b"\x86e.",
    "long text label": (
        b"](" + tensor_of(CAR_SIZE, CAR_STRIDE, count=3072)
        + b"X" + struct.pack("<I", 30_000) + b"\x1b" * 30_000 + b"\x86e."
    ),
    "list as label": b"](" + tensor_of(CAR_SIZE, CAR_STRIDE, count=3072) + b"]\x86e.",
    "image repeated by reference": (
        b"](" + tensor_of(CAR_SIZE, CAR_STRIDE, count=3072) + b"K\0\x86\x94" + b"h\0" * 9000 + b"e."
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_memory_stays_near_the_size_of_the_file(refusal, name):
    tracemalloc.start()
    try:
        refusal(b"\x80\x04" + HOSTILE[name])
        assert tracemalloc.get_traced_memory()[1] < 8 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_an_image_repeated_thousands_of_times_is_refused_before_it_is_copied(refusal):
    content = b"\x80\x04" + HOSTILE["image repeated by reference"]
    assert "lists more images than" in refusal(content)


def test_storages_within_storages_are_refused(refusal):
    content = storage_stream(1)
    for _ in range(50):
        inner = global_("torch.storage", "_load_from_bytes") + bytes_(content) + b"\x85R."
        content = b"\x80\x04" + inner
    refusal(content)


# ---- folders of image files -----------------------------------------------------------------


def save_image(folder, name, image, **options):
    path = folder / "train" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def test_folder_of_images_comes_back_pixel_by_pixel(tmp_path, train, capsys):
    write_image_folder(tmp_path, train)
    assert load(tmp_path).fingerprint == train.fingerprint
    assert capsys.readouterr() == ("", "")


def test_moving_a_file_changes_its_label_and_nothing_else(tmp_path, train):
    write_image_folder(tmp_path, train)
    index = int((train.labels == 2).nonzero()[0])
    name = f"{index:05d}.png"
    (tmp_path / "train/cat" / name).rename(tmp_path / "train/car" / name)
    loaded = load(tmp_path)
    assert torch.equal(loaded.images, train.images)
    assert loaded.labels[index] == 0
    assert (loaded.labels != train.labels).sum() == 1


def test_all_formats_are_read_with_suffixes_in_any_case(tmp_path):
    image = Image.new("RGB", (32, 32), (10, 200, 90))
    for number, suffix in enumerate(("png", "PNG", "jpg", "JPEG", "Bmp", "webp", "gif")):
        save_image(tmp_path, f"{CLASS_NAMES[number % 3]}/{number}.{suffix}", image)
    loaded = load(tmp_path)
    assert loaded.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    difference = loaded.images.int() - torch.tensor([10, 200, 90])[:, None, None]
    assert difference.abs().max() <= 4  # JPEG and WebP lose a little


def test_gif_gives_its_first_frame(tmp_path):
    red, blue = (Image.new("RGB", (32, 32), color) for color in ("red", "blue"))
    path = save_image(tmp_path, "car/0.gif", red, save_all=True, append_images=[blue])
    assert data.read_image(path)[:, 0, 0].tolist() == [255, 0, 0]


def test_what_is_not_read_is_counted_and_named(tmp_path, train, capsys):
    write_image_folder(tmp_path, train)
    for name in ("car/notes.txt", "car/old/a.png", "list.csv", "cat/b.tif", ".DS_Store"):
        (tmp_path / "train" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"x")
    hidden = tmp_path / "train/car/.ipynb_checkpoints"
    hidden.mkdir()
    (hidden / "a.png").write_bytes(b"x")
    (tmp_path / "train/car/._0.png").write_bytes(b"x")
    (tmp_path / "val").mkdir()
    assert load(tmp_path).fingerprint == train.fingerprint
    said = capsys.readouterr().err
    assert "4 files are not read" in said
    assert all(name in said for name in ("notes.txt", "a.png", "list.csv", "b.tif"))
    assert "DS_Store" not in said and "ipynb" not in said and "._0" not in said
    assert "val is not read; the splits are train and dev" in said
    assert "..." not in said
    for number in range(2):
        (tmp_path / "train/cat" / f"{number}.txt").write_bytes(b"x")
    load(tmp_path)
    said = capsys.readouterr().err  # five of the six names are enough
    assert "6 files are not read" in said
    assert said.count(".txt") + said.count(".png") + said.count(".tif") + said.count(".csv") == 5
    assert "..." in said


def test_an_image_of_too_many_pixels_is_refused_by_its_header(tmp_path):
    for side in (8000, 14000):  # Pillow refuses the second one by itself
        head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT")
        with pytest.raises(UserError, match=r"a\.png: .*the most is 50,000,000"):
            read_image(tmp_path / "a.png", resize=True)


def test_pickle_and_folder_of_one_split_are_not_mixed_in_silence(course_folder, train, capsys):
    write_image_folder(course_folder, train.subset(train.labels > 0))
    assert load(course_folder).fingerprint == train.fingerprint
    assert "train.pickle is read, train/ is not" in capsys.readouterr().err


def test_an_image_of_any_size_is_scaled_down_if_asked(tmp_path):
    image = Image.new("RGB", (128, 64), "red")
    image.paste("blue", (32, 0, 96, 64))  # the square in the middle
    path = save_image(tmp_path, "car/0.png", image)
    pixels = data.read_image(path, resize=True)
    assert pixels.shape == (3, 32, 32)
    difference = pixels[:, :, 2:-2].int() - torch.tensor([0, 0, 255])[:, None, None]
    assert difference.abs().max() <= 3
    with pytest.raises(UserError, match="is 128x64 pixels, it must be 32x32"):
        data.read_image(path)


def test_sixteen_bit_gray_is_scaled(tmp_path):
    gray = np.linspace(0, 65535, 1024).round().astype(np.uint16).reshape(32, 32)
    path = save_image(tmp_path, "car/0.png", Image.fromarray(gray))
    expected = np.rint(gray / 257)
    assert (data.read_image(path).numpy() == expected).all()


def test_transparency_is_composed_on_white(tmp_path):
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)
    pixels[:16, :, 3] = 255  # opaque black above, hidden black below
    pixels[16:24, :, 3] = 51
    expected = torch.full((32,), 255)
    expected[:16], expected[16:24] = 0, 204
    rgba = Image.fromarray(pixels)
    for image, options in (
        (rgba, {}),
        (rgba.convert("LA"), {}),
        (Image.fromarray(255 - pixels[..., 3]).point(lambda v: v and 255), {"transparency": 255}),
    ):
        got = data.read_image(save_image(tmp_path, "car/0.png", image, **options))[0, :, 0]
        assert torch.equal(got[[0, 31]].long(), expected[[0, 31]])
        if image.mode != "L":
            assert torch.equal(got.long(), expected)


def test_rotation_of_a_photograph_is_applied(tmp_path):
    image = Image.new("RGB", (32, 32))
    image.paste("white", (0, 0, 32, 16))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: to be shown rotated clockwise
    path = save_image(tmp_path, "car/0.png", image, exif=exif)
    seen = data.read_image(path)
    assert (seen[:, :, 16:] == 255).all() and (seen[:, :, :16] == 0).all()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n(x) run showpage\n%%EOF"


def test_content_of_another_format_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "x.png"
    path.write_bytes(EPS)
    with pytest.raises(UserError, match="not a readable PNG, JPEG, BMP, WEBP, GIF image"):
        data.read_image(path)


def broken_images():
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "PNG")
    png = stream.getvalue()
    yield b""
    yield b"no image"
    yield png[:60]
    yield png[:-20]


def test_broken_images_are_read_or_refused_in_one_line(tmp_path, capfd):
    path = tmp_path / "x.png"
    refused = 0
    for content in broken_images():
        path.write_bytes(content)
        try:
            assert data.read_image(path).shape == (3, 32, 32)
        except UserError as error:
            assert "x.png" in str(error) and len(str(error)) < 300
            refused += 1
    assert refused == 4
    assert capfd.readouterr().err == ""


def test_wrong_sizes_and_unknown_classes_are_named(tmp_path, train):
    write_image_folder(tmp_path, train)
    path = save_image(tmp_path, "car/99999.png", Image.new("RGB", (28, 28)))
    with pytest.raises(UserError, match="99999.png: is 28x28 pixels, it must be 32x32"):
        load(tmp_path)
    header = struct.pack(">II", 2**31 - 1, 2**31 - 1)  # a size that no memory could hold
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + header + b"\x08\2\0\0\0" + b"\0" * 8)
    with pytest.raises(UserError, match="99999.png: "):
        load(tmp_path)
    path.unlink()
    (tmp_path / "train/cat").rename(tmp_path / "train/dog")
    with pytest.raises(UserError, match="dog: unknown class; the classes are car, truck, cat"):
        load(tmp_path)


def test_folder_without_images_is_named(tmp_path):
    (tmp_path / "train/car").mkdir(parents=True)
    with pytest.raises(UserError, match="no image files in its class folders car, truck, cat"):
        load(tmp_path)


# ---- near-duplicates ------------------------------------------------------------------------


def images_with_copies(count=30, seed=0):
    """Return smooth random images; a third are altered copies of the first third."""
    generator = np.random.default_rng(seed)
    small = generator.uniform(60, 190, (count, 3, 8, 8)).repeat(4, axis=2).repeat(4, axis=3)
    images = small + generator.normal(0, 12, (count, 3, 32, 32))
    third = count // 3
    images[third : 2 * third] = 0.6 * images[:third] + generator.normal(0, 4, (third, 3, 32, 32))
    mirrored = range(third, 2 * third, 2)
    images[mirrored] = images[mirrored, :, :, ::-1] + 20
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8))


def reference_correlations(images, others):
    """Correlate all pairs by NumPy, as they are and mirrored."""
    a, b = images.flatten(1).double().numpy(), others.flatten(1).double().numpy()
    mirrored = others.flip(-1).flatten(1).double().numpy()
    n = len(a)
    return np.maximum(np.corrcoef(a, b)[:n, n:], np.corrcoef(a, mirrored)[:n, n:])


@pytest.mark.parametrize("block", [7, 2048])
def test_near_duplicates_are_those_that_numpy_finds(monkeypatch, block):
    monkeypatch.setattr(data, "BLOCK", block)
    images, others = images_with_copies(), images_with_copies(24)
    others[:5] = images[3:8]
    for second in (None, others):
        reference = reference_correlations(images, images if second is None else second)
        if second is None:
            reference = np.triu(reference, k=1)
        expected = {(i, j) for i, j in np.argwhere(reference >= 0.9).tolist()}
        found = near_duplicates(images, second)
        assert {(i, j) for i, j, _ in found} == expected and len(found) == len(expected) >= 5
        values = [value for _, _, value in found]
        assert values == sorted(values, reverse=True) and max(values) <= 1
        assert values == pytest.approx([reference[i, j] for i, j, _ in found], abs=1e-5)


def test_plain_images_are_near_duplicates_of_each_other_but_not_of_noise():
    noise = torch.randint(0, 256, (20, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    plain = torch.tensor([0, 90, 90, 255])[:, None, None, None].expand(4, 3, 32, 32)
    found = near_duplicates(torch.cat([noise, plain]).to(torch.uint8))
    assert {(i, j) for i, j, _ in found} == set(itertools.combinations(range(20, 24), 2))
    assert [correlation for _, _, correlation in found] == pytest.approx([1] * 6, abs=1e-5)


def test_neighbors_in_the_file_are_compared_too():
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    images[2] = images[1]
    assert [(i, j) for i, j, _ in near_duplicates(images.to(torch.uint8))] == [(1, 2)]


def test_duplicate_groups_are_chains_of_near_duplicates():
    images = images_with_copies()
    images[29] = images[0]
    groups = Dataset("x", "train", images, torch.zeros(len(images), dtype=int)).duplicate_groups
    expected = [{i} for i in range(len(images))]
    for i, j, _ in near_duplicates(images):
        union = expected[i] | expected[j]
        for member in union:
            expected[member] = union
    assert [set(torch.where(groups == group)[0].tolist()) for group in groups] == expected
    assert groups.dtype == torch.int64 and groups[0] == groups[10] == groups[29]


# ---- label corrections ----------------------------------------------------------------------


@pytest.fixture
def corrections(train):
    """Return a correction for each of the first eight images, every other one accepted."""
    labels = train.labels.tolist()
    return [Correction(i, labels[i], (labels[i] + 1) % 3, i / 8, i % 2 == 0) for i in range(8)]


def test_corrections_come_back_and_accepted_ones_are_applied(tmp_path, train, corrections, capsys):
    path = tmp_path / "labels.csv"
    path.write_text(format_corrections(train, corrections))
    assert read_corrections(path, train) == corrections
    corrected = apply_corrections(train, corrections)
    expected = train.labels.clone()
    expected[[0, 2, 4, 6]] = (expected[[0, 2, 4, 6]] + 1) % 3
    assert torch.equal(corrected.labels, expected)
    assert "4 of 8 are applied" in capsys.readouterr().out
    assert path.read_text().splitlines()[1] == "index,given,suggested,confidence,accept"


def test_corrections_that_empty_a_class_are_refused(train):
    cats = torch.where(train.labels == 2)[0].tolist()
    with pytest.raises(UserError, match="corrections: class cat has no images"):
        apply_corrections(train, [Correction(i, 2, 0, 1.0) for i in cats])


SPREADSHEETS = {
    "semicolons": lambda text: text.replace(",", ";"),
    "semicolons and decimal commas": lambda text: text.replace(",", ";").replace("0.", "0,"),
    "tabs": lambda text: text.replace(",", "\t"),
    "sep line": lambda text: "sep=,\n" + text,
    "quoted cells": lambda text: "\n".join(
        ",".join(f'"{cell}"' for cell in line.split(",")) for line in text.splitlines()
    ),
    "quoted first line": lambda text: '"' + text.replace("\n", '"\n', 1),
    "blank rows": lambda text: text.replace("\n", "\n\n,,,,\n") + ",,,,\n\n",
    "more columns": lambda text: text.replace("\n", ",,\n"),
    "TRUE": lambda text: text.replace("yes", "TRUE").replace("no\n", "FALSE\n"),
    "y and n": lambda text: text.replace("yes", " Y ").replace("no\n", "n\n"),
    "1 and 0": lambda text: text.replace("yes", "1").replace("no\n", "0\n"),
    "Windows": lambda text: "\ufeff" + text.replace("\n", "\r\n"),
    "capitals": lambda text: text.replace("car", "Car").replace("cat", "CAT").replace("acc", "Acc"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPREADSHEETS)
def test_corrections_come_back_from_any_spreadsheet(tmp_path, train, corrections, name):
    path = tmp_path / "labels.csv"
    text = SPREADSHEETS[name](format_corrections(train, corrections))
    path.write_bytes(text.encode("utf-8"))
    assert read_corrections(path, train) == corrections
    path.write_bytes(text.encode("utf-16"))
    assert read_corrections(path, train) == corrections


def change_row(column, value):
    """Return a function that puts a value into the row of image 3."""

    def change(text):
        lines = text.splitlines()
        cells = lines[5].split(",")
        cells[data.COLUMNS.index(column)] = value
        return "\n".join([*lines[:5], ",".join(cells), *lines[6:]])

    return change


BAD_CSV = {
    "empty": (lambda text: "", "first line must be that of label_errors.py"),
    "no first line": (
        lambda text: text.split("\n", 1)[1],
        "first line must be that of label_errors.py",
    ),
    "no header": (lambda text: text.split("\n")[0], "the columns must be index,given"),
    "other columns": (lambda text: text.replace("given", "label"), "the columns must be index"),
    "huge": (lambda text: text + "\n" * 2**21, "is larger than 1 MB, the most that is read"),
    "huge cell": (change_row("accept", "y" * 140_000), "has a cell that is too long"),
    "index": (change_row("index", "60"), "index '60'.* index is '60', not a number from 0 to 59"),
    "negative index": (change_row("index", "-1"), "index is '-1', not a number from 0"),
    "long index": (change_row("index", "9" * 5000), "index is '9+', not a number from 0"),
    "twice": (change_row("index", "0"), "index 0 is in two rows"),
    "class": (
        change_row("suggested", "dog"),
        "index '3': suggested is 'dog', not one of car, truck",
    ),
    "given class": (change_row("given", "dog"), "index '3': given is 'dog', not one of car, truck"),
    "confidence": (
        change_row("confidence", "1.5"),
        "confidence is '1.5', not a number from 0 to 1",
    ),
    "no number": (change_row("confidence", "nan"), "confidence is 'nan', not a number from 0 to 1"),
    "accept": (change_row("accept", "maybe"), "index '3': accept is 'maybe', not yes or no"),
    "no answer": (change_row("accept", ""), "index '3': accept is '', not yes or no"),
}


@pytest.mark.parametrize("name", BAD_CSV)
def test_bad_cell_is_named(tmp_path, train, corrections, name):
    change, message = BAD_CSV[name]
    path = tmp_path / "labels.csv"
    path.write_text(change(format_corrections(train, corrections)))
    with pytest.raises(UserError, match=message) as error:
        read_corrections(path, train)
    assert "labels.csv" in str(error.value) and len(str(error.value)) < 400


def test_a_pipe_is_no_image_and_no_table(make_pipe, tmp_path, train):
    make_pipe(tmp_path / "pipe")
    for read in (data.read_image, lambda path: read_corrections(path, train)):
        with pytest.raises(UserError, match="pipe: not a file on a disk$"):
            read(tmp_path / "pipe")


def test_rows_that_contradict_the_data_are_named(tmp_path, train, dev, corrections):
    path = tmp_path / "labels.csv"
    text = format_corrections(train, corrections)
    path.write_text(text + text.splitlines()[2] + "\n")
    with pytest.raises(UserError, match="index 0 is in two rows"):
        read_corrections(path, train)
    given = CLASS_NAMES[train.labels[3]]
    other = CLASS_NAMES[(train.labels[3] + 1) % 3]
    path.write_text(change_row("given", other)(text))
    with pytest.raises(UserError, match=f"given is '{other}', not {given} as in this data"):
        read_corrections(path, train)
    path.write_text(text)
    with pytest.raises(UserError, match=f"is for data with fingerprint '{train.fingerprint}'"):
        read_corrections(path, dev)
    with pytest.raises(UserError, match="nothing.csv: No such file"):
        read_corrections(tmp_path / "nothing.csv", train)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="first line"):
        read_corrections(path, train)
