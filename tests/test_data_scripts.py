"""The scripts that prepare data sets: synthetic images, and the cut of CIFAR-10."""

import json
import subprocess
import sys
import threading
import time

from common import cli, data
from common.cli import UserError
from common.data import open_data
from data import cifar10, synthetic

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def small_counts(monkeypatch):
    """Drawing the report's 6,626 images would take a quarter of a minute."""
    monkeypatch.setitem(synthetic.CLASS_COUNTS, "train", (30, 20, 8))
    monkeypatch.setitem(synthetic.CLASS_COUNTS, "dev", (9, 4, 3))


@pytest.fixture
def data_folder(monkeypatch, tmp_path):
    """Let everything that is prepared go to a folder of the test."""
    monkeypatch.setattr(data, "DATA_FOLDER", tmp_path)
    return tmp_path


# ---- labels ---------------------------------------------------------------------------------


def test_the_counts_and_the_wrong_labels_are_the_reports(monkeypatch):
    monkeypatch.undo()
    for split, counts in {"train": (4951, 450, 225), "dev": (880, 80, 40)}.items():
        given, true = synthetic.draw_labels(split, seed=3)
        assert tuple(np.bincount(given)) == counts
        wrong = [int((true != given)[given == label].sum()) for label in range(3)]
        assert wrong == ([50, 22, 56] if split == "train" else [0, 0, 0])


def test_labels_are_in_random_order_and_the_seed_decides():
    given, true = synthetic.draw_labels("train", seed=3)
    again, other = (synthetic.draw_labels("train", seed)[0] for seed in (3, 4))
    assert np.array_equal(given, again) and not np.array_equal(given, other)
    assert (np.diff(given) != 0).sum() > 10
    assert set(true) == {0, 1, 2}


# ---- synthetic images -----------------------------------------------------------------------


def test_an_image_depends_on_its_label_its_index_and_the_seed_alone():
    images = synthetic.draw_images(np.array([0, 1, 2, 0]), seed=5)
    assert images.shape == (4, 3, 32, 32) and images.dtype == np.uint8
    again = synthetic.draw_images(np.array([0, 2, 2]), seed=5)
    assert np.array_equal(images[[0, 2]], again[[0, 2]])
    assert not np.array_equal(images[1], again[1])
    assert not np.array_equal(images[0], images[3])
    assert not np.array_equal(images[0], synthetic.draw_images(np.array([0]), seed=6)[0])


def test_synthetic_is_prepared_once_with_its_true_labels(data_folder, monkeypatch, capsys):
    drawn = open_data("synthetic").load("train")
    assert "Drawing synthetic images" in capsys.readouterr().out
    monkeypatch.setattr(synthetic, "draw_images", lambda *_: pytest.fail("drawn again"))
    folder = open_data("synthetic")
    assert (folder.name, folder.path) == ("synthetic", data_folder / "synthetic")
    loaded, dev = folder.load("train"), folder.load("dev")
    assert loaded.fingerprint == drawn.fingerprint
    assert loaded.class_counts == [30, 20, 8] and dev.class_counts == [9, 4, 3]
    assert loaded.metadata()["wrong_labels"] == 3  # 5% of 20 and 25% of 8
    assert dev.metadata()["wrong_labels"] == 0
    assert not {tuple(x) for x in loaded.images[:, 0, 0].tolist()} & {
        tuple(x) for x in dev.images[:, 0, 0].tolist()
    }


def test_two_scripts_that_start_at_once_prepare_once(data_folder, monkeypatch):
    begun, prepared = threading.Event(), []

    def prepare(folder):
        begun.set()
        prepared.append(folder)
        time.sleep(0.3)
        folder.mkdir()
        for split in ("train", "dev"):
            (folder / f"{split}.pickle").touch()

    monkeypatch.setattr(synthetic, "prepare", prepare)
    first = threading.Thread(target=open_data, args=["synthetic"])
    first.start()
    begun.wait()
    assert open_data("synthetic").has("train")
    first.join()
    assert len(prepared) == 1


def test_images_are_written_without_loss(tmp_path, train):
    images, labels = train.images.numpy(), train.labels.numpy()
    synthetic.write_course_form(tmp_path, {"train": (images, labels, labels)})
    loaded = open_data(str(tmp_path)).load("train")
    assert torch.equal(loaded.images, train.images) and torch.equal(loaded.labels, train.labels)


def test_a_killed_preparation_is_made_anew(data_folder, monkeypatch):
    whole = open_data("synthetic").load("train").fingerprint
    write_atomic = cli.write_atomic

    def killed(path, write):
        if path.name == "dev.pickle":
            raise KeyboardInterrupt
        write_atomic(path, write)

    folder = data_folder / "synthetic"
    monkeypatch.setattr(cli, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        synthetic.prepare(folder, seed=1)
    assert not (folder / "dev.pickle").exists()  # that of seed 0 does not fit the new true labels
    monkeypatch.setattr(cli, "write_atomic", write_atomic)
    assert open_data("synthetic").load("train").fingerprint == whole
    assert sorted(path.name for path in folder.iterdir()) == [
        "dev.pickle",
        "train.pickle",
        "true_labels.json",
    ]


@pytest.mark.parametrize("script", ["cifar10", "synthetic"])
def test_script_runs_from_any_folder(script, tmp_path):
    command = [sys.executable, cli.PROJECT / "data" / f"{script}.py", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python data/{script}.py --seed 3 --out my_folder" in done.stdout


def test_script_takes_a_seed_and_a_folder(run_script, tmp_path):
    status, out, err = run_script(synthetic, "--seed", 3, "--out", tmp_path / "mine")
    assert (status, err) == (0, "") and "mine" in out
    loaded = open_data(str(tmp_path / "mine")).load("train")
    given, true = synthetic.draw_labels("train", 3)
    assert loaded.labels.tolist() == given.tolist()
    assert loaded.true_labels.tolist() == true.tolist()
    assert np.array_equal(loaded.images.numpy(), synthetic.draw_images(true, 6))


def test_script_answers_a_wrong_option_in_one_line(run_script):
    status, _, err = run_script(synthetic, "--seed", "x")
    assert status == 2 and err.count("\n") == 1 and "--seed: 'x'" in err


def test_script_answers_an_unwritable_folder_in_one_line(run_script, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run_script(synthetic, "--out", tmp_path / "file" / "inside")
    assert status == 2 and err.count("\n") == 1 and "file" in err


# ---- CIFAR-10 -------------------------------------------------------------------------------


class FakeCifar10:
    """Stands in for torchvision's: an image's first pixels are its label and its index."""

    def __init__(self, root, train, download):
        labels = np.arange(2000) % 10
        self.data = np.zeros((2000, 32, 32, 3), dtype=np.uint8)
        self.data[:, 0, 0, 0] = labels
        self.data[:, 0, 1, 1], self.data[:, 0, 2, 2] = np.divmod(np.arange(2000), 256)
        self.data[:, 0, 3, 0] = train
        self.targets = labels.tolist()


def test_cifar10_is_cut_to_the_classes_and_counts(data_folder, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", FakeCifar10)
    monkeypatch.setattr(cifar10, "is_downloaded", lambda: True)
    folder = open_data("cifar10")
    assert folder.name == "cifar10"
    for split, counts in synthetic.CLASS_COUNTS.items():
        loaded = folder.load(split)
        assert tuple(loaded.class_counts) == counts
        original_labels = torch.tensor([1, 9, 3])[loaded.true_labels]
        assert torch.equal(loaded.images[:, 0, 0, 0].long(), original_labels)
        index = 256 * loaded.images[:, 1, 0, 1].long() + loaded.images[:, 2, 0, 2]
        assert torch.equal(index % 10, original_labels)  # channels are in their place
        assert len(index.unique()) == len(loaded)
        assert (loaded.images[:, 0, 0, 3] == (split == "train")).all()
    text = json.loads((data_folder / "cifar10/true_labels.json").read_text())
    assert sorted(text) == ["dev", "train"]


def test_cifar10_out_of_reach_is_said_in_one_line(data_folder, monkeypatch):
    monkeypatch.setattr(cifar10, "is_downloaded", lambda: False)
    monkeypatch.setattr(cifar10, "is_reachable", lambda: False)
    with pytest.raises(UserError, match="cifar10: not in .* yet, and https.* can't be reached"):
        open_data("cifar10")


def test_a_download_that_fails_is_said_in_our_own_words(data_folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("File not found or corrupted. Call a library's author.")

    monkeypatch.setattr(cifar10, "is_downloaded", lambda: False)
    monkeypatch.setattr(cifar10, "is_reachable", lambda: True)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    with pytest.raises(UserError, match="cifar10: the download failed; run it again") as error:
        open_data("cifar10")
    assert "author" not in str(error.value)


def test_server_is_waited_for_no_longer_than_said(monkeypatch):
    asked = threading.Event()

    def hang(request, timeout):
        asked.wait(5)
        raise OSError

    monkeypatch.setattr(cifar10, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr("urllib.request.urlopen", hang)
    start = time.monotonic()
    assert cifar10.is_reachable() is False
    asked.set()
    assert time.monotonic() - start < 4


def test_a_mistyped_proxy_is_no_server(monkeypatch):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setenv("https_proxy", "http:/proxy:8080")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert cifar10.is_reachable() is False
    assert not failed


def test_the_address_is_torchvisions():
    from torchvision.datasets import CIFAR10

    assert CIFAR10.url == cifar10.URL
