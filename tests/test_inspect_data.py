import json

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_pictures
from scipy.stats import chi2

import inspectData
from common.dataset import Dataset, open_source
from inspectData import find_copies, find_outliers, shares_p_value, spread_p_value


def with_pictures(pictures, part="train"):
    return Dataset("x", part, pictures, torch.arange(len(pictures)) % 3)


def test_outliers_are_the_dark_the_bright_and_the_flat():
    pictures = make_pictures(torch.tensor([0, 1, 2, 0, 1]))
    pictures[1] = 10
    pictures[2] = 250
    pictures[3] = 128
    assert find_outliers(with_pictures(pictures)).tolist() == [1, 2, 3]


def test_spread_is_even_for_shuffled_and_uneven_for_sorted_labels():
    labels = np.repeat([0, 1, 2], [880, 80, 40])
    shuffled = np.random.default_rng(0).permutation(labels)
    assert spread_p_value(shuffled) > 0.05
    assert spread_p_value(labels) < 1e-10
    assert spread_p_value(np.array([0, 1, 2])) is None


def test_spread_p_value_is_uniform_for_shuffled_labels():
    generator = np.random.default_rng(1)
    labels = np.repeat([0, 1, 2], [300, 120, 100])
    p_values = [spread_p_value(generator.permutation(labels)) for _ in range(300)]
    assert 0.02 < np.mean(np.array(p_values) < 0.05) < 0.09


def test_shares_p_value_by_hand():
    train, dev = make_dataset("train", (60, 30, 10)), make_dataset("dev", (40, 40, 20))
    table = np.array([[60, 30, 10], [40, 40, 20]])
    expected = table.sum(axis=0) / 2  # both sets have 100 pictures
    statistic = ((table - expected) ** 2 / expected).sum()
    assert shares_p_value(train, dev) == pytest.approx(chi2.sf(statistic, df=2))


def test_copies_are_found_exact_brightened_mirrored_and_a_little_changed(train):
    source = train.pictures[:5].float()
    noise = torch.randn(source[3].shape, generator=torch.Generator().manual_seed(0))
    changed = [source[0], source[1] * 0.6 + 40, source[2].flip(2), source[3] + 5 * noise]
    others = make_pictures(torch.tensor([0, 1, 2]), seed=99).float()
    dev = with_pictures(torch.stack([*changed, *others]).clamp(0, 255).to(torch.uint8), "dev")
    copies = find_copies(dev, train)
    assert sorted((i, j) for i, j, _ in copies) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert copies[0][2] == pytest.approx(1, abs=1e-4)
    correlations = [correlation for *_, correlation in copies]
    assert correlations == sorted(correlations, reverse=True)


def test_correlation_equals_numpys(train):
    vectors = inspectData.standardise(train.pictures[:4])
    expected = np.corrcoef(train.pictures[:4].flatten(1).numpy())
    assert (vectors @ vectors.T).numpy() == pytest.approx(expected, abs=1e-5)


def test_pie_shows_readable_counts(train):
    _, (ax,) = inspectData.figures.new_figure()
    inspectData.draw_shares(ax, train)
    texts = [text.get_text() for text in ax.texts]
    assert "car\n40 (66.7%)" in texts
    assert "cat\n8 (13.3%)" in texts


def test_order_figure_has_each_picture_once(train):
    _, (ax,) = inspectData.figures.new_figure()
    inspectData.draw_order(ax, train)
    for label, lines in enumerate(ax.collections):
        expected = torch.nonzero(train.labels == label).flatten().tolist()
        assert sorted(lines.get_positions()) == expected


def test_script_writes_all_and_exports(run_script, course_folder, tmp_path, train):
    options = ("--data", course_folder, "--out", "out", "--export", "new/pictures")
    status, printed, _ = run_script(inspectData, *options)
    assert status == 0
    assert "32x32x3" in printed
    numbers = json.loads((tmp_path / "out/inspectData.json").read_text())
    assert numbers["parts"]["train"]["class_counts"] == {"car": 40, "truck": 12, "cat": 8}
    assert numbers["same_shares_p_value"] == pytest.approx(1)
    for name in ("1-label-counts", "2-label-order", "pixel-statistics"):
        assert (tmp_path / f"out/{name}.png").exists()
    assert "No picture of dev stands in train too" in printed
    exported = open_source(str(tmp_path / "new/pictures")).load("train")
    assert exported.fingerprint == train.fingerprint
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["pictures"]
    status, _, error = run_script(inspectData, *options)
    assert status == 2
    assert "exists already" in error
    status, _, error = run_script(inspectData, *options[:4], "--export", "other", "--quick")
    assert status == 2
    assert "leave --quick out" in error


def test_script_inspects_the_part_there_is(run_script, course_folder, tmp_path):
    (course_folder / "train.pickle").unlink()
    status, _, _ = run_script(inspectData, "--data", course_folder, "--out", "out")
    assert status == 0
    assert list(json.loads((tmp_path / "out/inspectData.json").read_text())["parts"]) == ["dev"]
