import os
import pickle

import numpy as np
import pytest
import torch
from conftest import COURSE_DATA, make_dataset, needs_course_data, write_course_pickle

from common import cifar10, dataset, sketches
from common.console import LARGEST_NUMBER, UserError
from common.dataset import CLASS_COUNTS, Dataset, as_input, mislabel, open_source
from common.picture_folder import write_folder


def load(folder, part="train"):
    return open_source(str(folder)).load(part)


def test_pickles_come_back_pixel_by_pixel(course_folder, train, dev):
    for original in (train, dev):
        loaded = load(course_folder, original.part)
        assert torch.equal(loaded.pictures, original.pictures)
        assert torch.equal(loaded.labels, original.labels)
        assert loaded.pictures.dtype == torch.uint8
        assert loaded.fingerprint == original.fingerprint


def test_only_the_part_asked_for_is_read(course_folder):
    (course_folder / "train.pickle").write_bytes(b"broken")
    assert load(course_folder, "dev").part == "dev"


def test_input_of_a_net_lies_between_0_and_1():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert as_input(pixels).tolist() == pytest.approx([0, 0.2, 1])


class Evil:
    """Asks whoever unpickles it to run a command."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickle_that_calls_os_system_is_refused(course_folder, tmp_path):
    marker = tmp_path / "ran"
    (course_folder / "train.pickle").write_bytes(pickle.dumps([(Evil(marker), 0)]))
    with pytest.raises(UserError, match="asks for .*system"):
        load(course_folder)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_hidden_in_a_storage_is_refused(course_folder, tmp_path):
    marker = tmp_path / "ran"
    payload = pickle.dumps(Evil(marker))

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (payload,)

    (course_folder / "train.pickle").write_bytes(pickle.dumps([(Storage(), 0)]))
    with pytest.raises(UserError, match="not a whole pickle of tensors"):
        load(course_folder)
    assert not marker.exists()


def items_of(dataset):
    pictures = dataset.pictures.float() / 127.5 - 1
    return [(p.clone(), int(y)) for p, y in zip(pictures, dataset.labels, strict=True)]


def broken(change):
    """Return the bytes of a pickle in which `change` has spoilt the list of items."""
    items = items_of(make_dataset())
    return pickle.dumps(change(items) or items)


def set_pixel(items, value):
    items[3][0][0, 0, 0] = value


BAD_PICKLES = {
    "truncated": (lambda: broken(lambda items: None)[:-1000], "not a whole pickle"),
    "empty file": (lambda: b"", "not a whole pickle"),
    "text": (lambda: b"hello", "not a whole pickle"),
    "no list": (lambda: pickle.dumps({"a": 1}), "holds no list"),
    "empty list": (lambda: pickle.dumps([]), "holds no list"),
    "no pair": (lambda: pickle.dumps([1, 2]), "item 0 is not a pair"),
    "28x28": (
        lambda: pickle.dumps([(torch.zeros(3, 28, 28), 0)]),
        r"shape \[3, 28, 28\], it must be \[3, 32, 32\]",
    ),
    "float64": (
        lambda: pickle.dumps([(torch.zeros(3, 32, 32, dtype=torch.float64), 0)]),
        "picture 0 is not a float32 tensor",
    ),
    "text label": (lambda: pickle.dumps([(torch.zeros(3, 32, 32), "cat")]), "label 0 is 'cat'"),
    "label 3": (
        lambda: broken(lambda items: [*items, (items[0][0], 3)]),
        "label 60 is 3; labels are 0 car",
    ),
    "label -1": (
        lambda: broken(lambda items: [*items, (items[0][0], -1)]),
        "label 60 is -1; labels are",
    ),
    "NaN": (lambda: broken(lambda items: set_pixel(items, float("nan"))), "picture 3 .* NaN"),
    "0 to 255": (lambda: broken(lambda items: set_pixel(items, 255.0)), r"must lie in \[-1, 1\]"),
    "huge label": (
        lambda: broken(lambda items: [*items, (items[0][0], 2**70)]),
        "label 60 is 1180591620717411303424; labels are",
    ),
    "no cats": (
        lambda: broken(lambda items: [item for item in items if item[1] != 2]),
        "class cat has no pictures",
    ),
}


@pytest.mark.parametrize("name", BAD_PICKLES)
def test_bad_pickle_is_named(name, course_folder):
    content, message = BAD_PICKLES[name]
    (course_folder / "train.pickle").write_bytes(content())
    with pytest.raises(UserError, match=message) as error:
        load(course_folder)
    assert "train" in str(error.value)


def test_pictures_that_seem_to_lie_in_0_1_raise_a_warning(course_folder, capsys):
    items = [(p * 0.5 + 0.5, y) for p, y in items_of(make_dataset())]
    (course_folder / "train.pickle").write_bytes(pickle.dumps(items))
    load(course_folder)
    assert "no pixel is below 0" in capsys.readouterr().err


def test_folder_of_pictures_comes_back_pixel_by_pixel(tmp_path, train):
    write_folder(tmp_path / "train", train.pictures, train.labels, dataset.CLASS_NAMES)
    loaded = load(tmp_path)
    assert loaded.fingerprint == train.fingerprint


def test_moving_a_file_changes_its_label_and_nothing_else(tmp_path, train):
    write_folder(tmp_path / "train", train.pictures, train.labels, dataset.CLASS_NAMES)
    index = int((train.labels == 2).nonzero()[0])
    name = f"{index:05d}.png"
    (tmp_path / "train/cat" / name).rename(tmp_path / "train/car" / name)
    loaded = load(tmp_path)
    assert torch.equal(loaded.pictures, train.pictures)
    assert loaded.labels[index] == 0
    assert (loaded.labels != train.labels).sum() == 1


def test_folder_with_unknown_class_or_wrong_size_is_named(tmp_path, train):
    from PIL import Image

    write_folder(tmp_path / "train", train.pictures, train.labels, dataset.CLASS_NAMES)
    Image.new("RGB", (28, 28)).save(tmp_path / "train/car/99999.png")
    with pytest.raises(UserError, match="99999.png: is 28x28 pixels, it must be 32x32"):
        load(tmp_path)
    (tmp_path / "train/car/99999.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="99999.png: not a readable picture"):
        load(tmp_path)
    (tmp_path / "train/car/99999.png").unlink()
    (tmp_path / "train/cat").rename(tmp_path / "train/dog")
    with pytest.raises(UserError, match="train/dog: unknown class"):
        load(tmp_path)


def test_missing_folder_and_folder_without_data_are_named(tmp_path):
    with pytest.raises(UserError, match="no such folder, and not auto, cifar10 or sketches"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="holds neither train.pickle"):
        open_source(str(tmp_path))


def test_folder_named_sketches_is_not_taken_for_the_sketches(tmp_path, train):
    folder = tmp_path / "sketches"
    folder.mkdir()
    write_course_pickle(folder / "train.pickle", train)
    assert open_source(str(folder)).name == "folder-sketches"


def test_fingerprint_changes_with_one_pixel_or_one_label(train):
    pictures, labels = train.pictures.clone(), train.labels.clone()
    pictures[0, 0, 0, 0] ^= 1
    labels[0] = (labels[0] + 1) % 3
    changed = [Dataset("x", "train", pictures, train.labels)]
    changed.append(Dataset("x", "train", train.pictures, labels))
    assert len({train.fingerprint, *(each.fingerprint for each in changed)}) == 3


@pytest.mark.parametrize("part", dataset.PARTS)
def test_mislabel_has_the_counts_and_shares_it_promises(part):
    given, true = mislabel(part, seed=3)
    assert tuple(np.bincount(given)) == CLASS_COUNTS[part]
    for label, share in enumerate(dataset.WRONG_SHARES[part]):
        wrong = (true != given)[given == label]
        assert wrong.sum() == round(share * len(wrong))
    again, _ = mislabel(part, seed=3)
    other, _ = mislabel(part, seed=4)
    assert np.array_equal(given, again)
    assert not np.array_equal(given, other)


def test_sketches_are_the_same_for_a_seed_and_others_for_another():
    labels = np.array([0, 1, 2, 0, 1, 2])
    first, again = sketches.draw_sketches(labels, 5), sketches.draw_sketches(labels, 5)
    assert first.shape == (6, 3, 32, 32)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, sketches.draw_sketches(labels, 6))


def test_sketches_are_cached_with_their_true_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "DATA_FOLDER", tmp_path)
    monkeypatch.setitem(dataset.CLASS_COUNTS, "train", (30, 20, 8))
    drawn = open_source("sketches", seed=1).load("train")
    monkeypatch.setattr(sketches, "draw_sketches", lambda *_: pytest.fail("drawn again"))
    assert open_source("sketches", seed=1).load("train").fingerprint == drawn.fingerprint
    assert int((drawn.labels != drawn.true_labels).sum()) == 3  # 5% of 20 and 25% of 8
    assert drawn.facts()["wrong_labels"] == 3


class FakeCifar10:
    """Stands in for torchvision's CIFAR10: a picture's first pixels are its class and its index."""

    url = "https://example.invalid/cifar-10-python.tar.gz"

    def __init__(self, root, train, download):
        labels = np.arange(60000) % 10
        self.data = np.zeros((60000, 32, 32, 3), dtype=np.uint8)
        self.data[:, 0, 0, 0] = labels
        self.data[:, 0, 1:4, 0] = np.arange(60000)[:, None] // (1, 256, 65536) % 256
        self.targets = labels.tolist()


def test_cifar10_is_cut_to_the_reports_counts(monkeypatch, tmp_path):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar10)
    monkeypatch.setattr(cifar10, "is_here", lambda folder: True)
    source = open_source("cifar10", seed=2)
    loaded = source.load("train")
    assert tuple(loaded.class_counts) == CLASS_COUNTS["train"]
    cifar10_labels = torch.tensor(dataset.CIFAR10_LABELS)
    assert torch.equal(loaded.pictures[:, 0, 0, 0].long(), cifar10_labels[loaded.true_labels])
    assert len(loaded.pictures[:, 0].flatten(1).unique(dim=0)) == len(loaded)  # none comes twice
    assert source.load("train").fingerprint == loaded.fingerprint


def test_cifar10_out_of_reach_fails_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(dataset, "DATA_FOLDER", tmp_path)
    monkeypatch.setattr(cifar10, "answers", lambda: False)
    with pytest.raises(UserError, match="cifar10: not in .* not reached"):
        open_source("cifar10").load("train")


def test_practice_has_equally_many_of_each_class_and_none_of_the_source():
    practice = dataset.draw_practice(30, seed=0)
    assert practice.class_counts == [10, 10, 10]
    assert practice.pictures.dtype == torch.uint8 and practice.pictures.shape == (30, 3, 32, 32)
    assert not torch.equal(practice.pictures, dataset.draw_practice(30, seed=1).pictures)
    last_seed_of_the_source = LARGEST_NUMBER * len(dataset.PARTS) + len(dataset.PARTS) - 1
    assert last_seed_of_the_source < dataset.FIRST_PRACTICE_SEED


def test_auto_prefers_pickles_then_cifar10_then_sketches(monkeypatch, tmp_path, train, capsys):
    monkeypatch.setattr(dataset, "DATA_FOLDER", tmp_path)
    monkeypatch.setattr(cifar10, "answers", lambda: False)
    assert open_source("auto").name == "sketches"
    assert "taking sketches" in capsys.readouterr().out
    monkeypatch.setattr(cifar10, "answers", lambda: True)
    assert open_source("auto").name == "cifar10"
    write_course_pickle(tmp_path / "train.pickle", train)
    assert open_source("auto").load("train").fingerprint == train.fingerprint


@needs_course_data
def test_the_courses_own_files_have_the_reports_counts():
    assert load(COURSE_DATA, "train").class_counts == [4951, 450, 225]
    assert load(COURSE_DATA, "dev").class_counts == [743, 67, 34]
