"""Step 1: the tests of order and fractions, outliers, near-duplicates, figures and the export."""

import json
from dataclasses import replace

import inspectData
from common.data import CLASS_NAMES, Dataset, open_data
from inspectData import find_outliers, independence_p_value

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_images, write_course_pickle
from scipy.stats import chi2


@pytest.fixture
def doubled(tmp_path, train, dev):
    """Return a folder in which dev image 0 is in train, and train image 1 twice, relabeled."""
    images, labels = train.images.clone(), train.labels.clone()
    images[5], images[9] = dev.images[0], images[1].flip(-1)
    labels[5], labels[9] = dev.labels[0], (labels[1] + 1) % 3
    folder = tmp_path / "doubled"
    folder.mkdir()
    write_course_pickle(folder / "train.pickle", replace(train, images=images, labels=labels))
    write_course_pickle(folder / "dev.pickle", dev)
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """Save the seconds that figures take."""
    monkeypatch.setattr(inspectData, "save_figures", lambda *_: None)


def test_outliers_are_the_dark_the_bright_and_the_flat():
    images = make_images(torch.tensor([0, 1, 2, 0, 1]))
    images[1], images[2], images[3] = 10, 250, 128
    assert find_outliers(Dataset("x", "train", images, torch.zeros(5).long())).tolist() == [1, 2, 3]


def test_mean_and_deviation_are_numpys(train):
    mean, std = inspectData.pixel_statistics(train)
    pixels = train.images.numpy().reshape(60, -1) / 255
    assert mean.numpy() == pytest.approx(pixels.mean(axis=1), abs=1e-6)
    assert std.numpy() == pytest.approx(pixels.std(axis=1), abs=1e-6)


def test_independence_holds_for_shuffled_and_fails_for_sorted_labels():
    labels = np.repeat([0, 1, 2], [880, 80, 40])
    assert independence_p_value(np.random.default_rng(0).permutation(labels)) > 0.05
    assert independence_p_value(labels) < 1e-10
    assert independence_p_value(np.array([0, 1, 2])) is None


@pytest.mark.parametrize(
    ("p_value", "text"),
    [
        (None, "Too few images to test whether the classes drift."),
        (0.05, "There is no sign that the classes drift (p = 0.05)."),
        (0.0012, "The classes drift (p = 1e-03)."),
    ],
)
def test_a_p_value_in_words(p_value, text):
    assert inspectData.verdict(p_value, "the classes drift") == text


def test_p_value_is_uniform_for_shuffled_labels():
    generator = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [300, 120, 100])
    p_values = [independence_p_value(generator.permutation(labels)) for _ in range(300)]
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09


def test_class_fractions_are_compared_by_the_chi_squared_test():
    datasets = {"train": make_dataset("train", (60, 30, 10))}
    datasets["dev"] = make_dataset("dev", (40, 40, 20))
    table = np.array([[60, 30, 10], [40, 40, 20]])
    expected = table.sum(axis=0) / 2  # both splits have 100 images
    statistic = ((table - expected) ** 2 / expected).sum()
    numbers, _ = inspectData.inspect_all(datasets)
    assert numbers["class_fractions_p_value"] == pytest.approx(chi2.sf(statistic, df=2))
    datasets["dev"] = make_dataset("dev", (5, 3, 1))  # too few images for the test to hold
    assert inspectData.inspect_all(datasets)[0]["class_fractions_p_value"] is None


def test_bars_show_counts_and_percentages(train):
    figure = inspectData.draw_label_counts([train])
    pie, bars = figure.axes
    assert {text.get_text() for text in bars.texts} == {
        "car 40 (66.7%)",
        "truck 12 (20.0%)",
        "cat 8 (13.3%)",
    }
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([40 / 60, 12 / 60, 8 / 60])
    degrees = [wedge.theta2 - wedge.theta1 for wedge in pie.patches]
    assert degrees == pytest.approx([240, 72, 48], abs=1e-3)


def test_order_figure_has_each_image_once_and_the_fractions_of_each_block():
    dataset = make_dataset("train", (400, 80, 20))
    positions, fractions = inspectData.draw_label_order([dataset]).axes
    for label, lines in enumerate(positions.collections):
        expected = torch.nonzero(dataset.labels == label).flatten().tolist()
        assert sorted(lines.get_positions()) == expected
    for label, step in enumerate(fractions.patches):
        halves = (dataset.labels == label).reshape(2, 250).float().mean(dim=1)
        assert step.get_data().values == pytest.approx(halves.numpy())


def test_script_counts_the_classes_and_compares_train_and_dev(run_script, course_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/near-duplicates.png").touch()  # of an earlier run, on other data
    status, printed, _ = run_script(inspectData, "--data", course_folder, "--out", "out")
    assert status == 0
    assert "32x32x3" in printed and "4951 (88.0%)" in printed and "40 (66.7%)" in printed
    numbers = json.loads((tmp_path / "out/inspectData.json").read_text())
    assert numbers["splits"]["train"]["class_counts"] == {"car": 40, "truck": 12, "cat": 8}
    assert numbers["splits"]["dev"]["class_fractions"]["car"] == pytest.approx(2 / 3)
    assert numbers["class_fractions_p_value"] == pytest.approx(1)
    assert numbers["near_duplicates"] == []
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {
        "1-label-counts",
        "2-label-order",
        "pixel-statistics",
    }


def test_near_duplicates_and_their_labels_are_listed(run_script, doubled, tmp_path, train, dev):
    status, printed, _ = run_script(inspectData, "--data", doubled, "--out", "out")
    assert status == 0
    numbers = json.loads((tmp_path / "out/inspectData.json").read_text())
    (across,) = numbers["near_duplicates"]
    name = CLASS_NAMES[dev.labels[0]]
    assert across | {"correlation": 1} == {
        "dev": 0,
        "train": 5,
        "labels": [name, name],
        "correlation": 1,
    }
    (within,) = numbers["splits"]["train"]["near_duplicates"]
    assert (within["first"], within["second"]) == (1, 9)
    assert numbers["splits"]["dev"]["near_duplicates"] == []
    assert "near-duplicate in train: 1." in printed and "likely wrong: 1." in printed
    labels = [CLASS_NAMES[train.labels[1]], CLASS_NAMES[(train.labels[1] + 1) % 3]]
    assert f"train 1 {labels[0]} - train 9 {labels[1]}" in printed
    assert (tmp_path / "out/near-duplicates.png").exists()


def test_a_missing_split_is_said(run_script, course_folder, tmp_path):
    (course_folder / "train.pickle").unlink()
    status, printed, _ = run_script(inspectData, "--data", course_folder, "--out", "out")
    assert status == 0 and "course has no train split" in printed
    assert list(json.loads((tmp_path / "out/inspectData.json").read_text())["splits"]) == ["dev"]


@pytest.mark.usefixtures("no_figures")
def test_export_comes_back_pixel_by_pixel(run_script, course_folder, tmp_path, train):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/.images.part").mkdir()  # of a run that was killed
    options = ("--data", course_folder, "--out", "out", "--export", "new/images")
    status, printed, _ = run_script(inspectData, *options)
    assert status == 0 and "use --data new/images" in printed
    assert open_data(str(tmp_path / "new/images")).load("train").fingerprint == train.fingerprint
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["images"]
    status, _, error = run_script(inspectData, *options)
    assert status == 2 and "exists already" in error
    status, _, error = run_script(inspectData, *options[:4], "--export", "other", "--quick")
    assert status == 2 and "omit --quick" in error


@pytest.mark.usefixtures("no_figures")
def test_an_export_that_is_stopped_leaves_nothing(run_script, course_folder, tmp_path, monkeypatch):
    write = inspectData.write_image_folder

    def stop_in_dev(folder, dataset):
        if dataset.split == "dev":
            raise KeyboardInterrupt
        write(folder, dataset)

    monkeypatch.setattr(inspectData, "write_image_folder", stop_in_dev)
    options = ("--data", course_folder, "--out", "out", "--export", "new/images")
    status, _, _ = run_script(inspectData, *options)
    assert status == 130
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.usefixtures("no_figures")
def test_an_export_that_cannot_be_written_is_said_in_one_line(run_script, course_folder, tmp_path):
    (tmp_path / "file").write_text("")
    options = ("--data", course_folder, "--out", "out", "--export", "file/images")
    status, _, error = run_script(inspectData, *options)
    assert status == 2 and error.count("\n") == 1 and "file/images: can't be written" in error
