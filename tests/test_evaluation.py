import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COURSE_DATA, random_confusion
from hypothesis import given, settings
from hypothesis import strategies as st
from imblearn.metrics import geometric_mean_score
from scipy.stats import binom
from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_score, recall_score

import evaluation
import training
from common.dataset import open_source
from common.network import build_network, save_checkpoint
from evaluation import bootstrap_intervals, evaluate_predictions, scores_of


def as_predictions(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and predictions that have this confusion matrix."""
    true, predicted = np.indices(confusion.shape)
    counts = confusion.ravel()
    return np.repeat(true.ravel(), counts), np.repeat(predicted.ravel(), counts)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_scores_equal_those_of_imbalanced_learn_and_scikit_learn(seed):
    confusion = random_confusion(np.random.default_rng(seed))
    labels, predicted = as_predictions(confusion)
    ours = scores_of(confusion)
    assert ours["g_mean"] == pytest.approx(geometric_mean_score(labels, predicted))
    assert ours["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert ours["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert ours["recall"] == pytest.approx(recall_score(labels, predicted, average=None))
    precision = precision_score(labels, predicted, average=None, zero_division=0)
    assert ours["precision"] == pytest.approx(precision)
    assert 0 <= ours["g_mean"] <= ours["balanced_accuracy"] + 1e-12 <= 1 + 1e-12


def test_always_car_has_88_percent_accuracy_and_g_mean_0():
    labels = torch.tensor([0] * 88 + [1] * 8 + [2] * 4)
    scores = evaluate_predictions(labels, torch.zeros(100, dtype=torch.int64))
    assert scores["accuracy"] == pytest.approx(0.88)
    assert scores["balanced_accuracy"] == pytest.approx(1 / 3)
    assert scores["g_mean"] == 0
    assert scores["recall"] == {"car": 1.0, "truck": 0.0, "cat": 0.0}
    assert scores["precision"] == pytest.approx({"car": 0.88, "truck": 0.0, "cat": 0.0})


def test_scores_by_hand():
    confusion = np.array([[8, 1, 1], [2, 4, 2], [1, 0, 1]])
    scores = scores_of(confusion)
    assert scores["accuracy"] == pytest.approx(13 / 20)
    assert scores["recall"] == pytest.approx([0.8, 0.5, 0.5])
    assert scores["g_mean"] == pytest.approx((0.8 * 0.5 * 0.5) ** (1 / 3))
    assert scores["precision"] == pytest.approx([8 / 11, 4 / 5, 1 / 4])


def test_many_confusion_matrices_at_once_score_as_one_by_one():
    generator = np.random.default_rng(0)
    many = np.stack([random_confusion(generator) for _ in range(5)])
    together = scores_of(many)
    for number, confusion in enumerate(many):
        for name, alone in scores_of(confusion).items():
            assert together[name][number] == pytest.approx(alone)


def test_bootstrap_interval_of_a_recall_is_that_of_the_binomial_distribution():
    confusion = np.array([[900, 60, 40], [10, 60, 10], [5, 4, 25]])
    intervals = bootstrap_intervals(confusion, seed=0)
    for label, row in enumerate(confusion):
        total, share = row.sum(), row[label] / row.sum()
        expected = binom.ppf((0.025, 0.975), total, share) / total
        assert intervals["recall"][label] == pytest.approx(expected, abs=1.01 / total)


def test_bootstrap_intervals_hold_the_score_and_follow_the_seed():
    confusion = np.array([[90, 6, 4], [3, 14, 3], [2, 1, 7]])
    scores, intervals = scores_of(confusion), bootstrap_intervals(confusion, seed=1)
    for name, score in scores.items():
        low, high = intervals[name][..., 0], intervals[name][..., 1]
        assert (low <= score).all()
        assert (score <= high).all()
    assert intervals["g_mean"].tolist() == bootstrap_intervals(confusion, 1)["g_mean"].tolist()
    assert intervals["g_mean"].tolist() != bootstrap_intervals(confusion, 2)["g_mean"].tolist()


def test_confusion_figure_shows_each_count():
    confusion = np.array([[90, 6, 4], [3, 14, 3], [2, 1, 7]])
    ax = evaluation.draw_confusion(evaluation.figures.new_figure()[1][0], confusion)
    shown = [int(text.get_text().split("\n")[0]) for text in ax.texts]
    assert shown == confusion.ravel().tolist()


def test_most_confident_mistakes_come_first(dev):
    logits = torch.nn.functional.one_hot(dev.labels, 3).float() * 5
    sure, unsure = 4, 9
    logits[sure] = torch.tensor([0.0, 0.0, 0.0]).index_fill(0, (dev.labels[sure] + 1) % 3, 9.0)
    logits[unsure] = torch.tensor([0.0, 0.0, 0.0]).index_fill(0, (dev.labels[unsure] + 1) % 3, 0.5)
    figure = evaluation.draw_mistakes(dev, logits)
    captions = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert len(captions) == 2
    assert "100% sure" in captions[0]
    assert "45% sure" in captions[1]


def test_script_writes_the_promised_numbers(run_script, course_folder, tmp_path):
    status, printed, _ = run_script(evaluation, "--data", course_folder, "--out", tmp_path / "out")
    assert status == 0
    assert "G-mean" in printed
    assert "Only 8 pictures of class cat" in printed
    numbers = json.loads((tmp_path / "out/evaluation.json").read_text())
    for name in ("accuracy", "balanced_accuracy", "g_mean"):
        low, high = numbers["interval"][name]
        assert low <= numbers[name] <= high
    assert set(numbers["recall"]) == set(numbers["interval"]["recall"]) == {"car", "truck", "cat"}
    assert numbers["data"]["parts"]["dev"]["class_counts"] == {"car": 40, "truck": 12, "cat": 8}
    assert (tmp_path / "out/confusion.png").stat().st_size > 1000
    assert (tmp_path / "out/mistakes.png").stat().st_size > 1000


def test_script_asks_for_dev_alone_and_reads_a_bare_checkpoint(run_script, course_folder, tmp_path):
    (course_folder / "train.pickle").unlink()
    torch.save({"model_state_dict": build_network().state_dict()}, tmp_path / "bare.ckpt")
    options = ("--data", course_folder, "--checkpoint", "bare.ckpt", "--out", "out")
    for pixel_range in ("0,1", "-1,1"):
        assert run_script(evaluation, *options, "--pixel-range", pixel_range)[0] == 0
    status, _, error = run_script(evaluation, *options, "--pixel-range", "0,255")
    assert status == 2
    assert "'0,255' is neither 0,1 nor -1,1" in error


def test_the_shipped_pre_trained_net_says_car_to_everything(dev):
    net, about = evaluation.load_checkpoint(evaluation.PRE_TRAINED)
    scores = evaluation.evaluate(net, dev)
    assert scores["recall"] == {"car": 1.0, "truck": 0.0, "cat": 0.0}
    assert about["recipe"]["name"] == "pre_trained"
    assert about["trained_on"]["source"] == "sketches"


@pytest.mark.parametrize(("name", "least"), [("tuned", 0.85), ("best", 0.9), ("robust", 0.76)])
def test_the_shipped_nets_are_small_carry_their_recipe_and_are_good(name, least):
    path = evaluation.PRE_TRAINED.parent / f"{name}.ckpt"
    net, about = evaluation.load_checkpoint(path)
    assert path.stat().st_size < 4e6
    recipe = training.RECIPES[name]
    assert about["recipe"] == asdict(recipe)
    assert type(net).__name__ == recipe.network
    if COURSE_DATA.is_dir():
        dev = open_source(str(COURSE_DATA)).load("dev")
        assert evaluation.evaluate(net, dev)["g_mean"] > least


def test_their_numbers_stand_beside_the_pre_trained_net_on_dev_only(
    run_script, course_folder, monkeypatch
):
    options = ("--data", course_folder, "--out", course_folder.parent / "out")
    monkeypatch.setattr(evaluation, "MISTAKES_SHOWN", 1)
    assert "report" in run_script(evaluation, *options)[1]
    named = run_script(evaluation, *options, "--checkpoint", evaluation.PRE_TRAINED)[1]
    assert "report" in named
    assert "without width" in named
    assert "report" not in run_script(evaluation, *options, "--part", "train")[1]


@pytest.mark.parametrize("shape", [(8, 3, 5, 5), (16, 1, 5, 5)])
def test_checkpoint_of_another_net_ends_with_one_line(run_script, course_folder, shape):
    net = build_network()
    save_checkpoint(Path("other.ckpt"), net, {})
    content = torch.load("other.ckpt", weights_only=True)
    content["model_state_dict"]["conv1.weight"] = torch.zeros(shape)
    torch.save(content, "other.ckpt")
    status, _, error = run_script(evaluation, "--data", course_folder, "--checkpoint", "other.ckpt")
    assert status == 2
    assert error.count("\n") == 1
    assert "conv1.weight" in error
