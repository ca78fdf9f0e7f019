"""Scores, intervals and comparisons, against other libraries, by hand, and by simulation."""

import csv
import io

from common import metrics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from imblearn.metrics import geometric_mean_score
from scipy import stats
from sklearn import metrics as sklearn_metrics

CONFUSION = np.array([[90, 6, 4], [3, 14, 3], [2, 1, 7]])
DEV_COUNTS = (743, 67, 34)


def as_predictions(confusion):
    """Return labels and predictions that have this confusion matrix."""
    true, predicted = np.indices(confusion.shape)
    return np.repeat(true.ravel(), confusion.ravel()), np.repeat(
        predicted.ravel(), confusion.ravel()
    )


def draw_predictions(labels, recalls, generator):
    """Classify each image correctly with the probability of its class; else the next class."""
    correct = generator.random(len(labels)) < np.array(recalls)[labels]
    return np.where(correct, labels, (labels + 1) % 3)


# ---- scores ---------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(cells=st.lists(st.integers(0, 30), min_size=9, max_size=9))
def test_scores_equal_those_of_imbalanced_learn_and_scikit_learn(cells):
    confusion = np.array(cells).reshape(3, 3) + np.diag([1, 0, 0]) + np.eye(3, k=-1, dtype=int)
    confusion[0, 2] += 1  # each class has images; some are never classified correctly
    labels, predicted = as_predictions(confusion)
    assert (metrics.confusion_matrix(torch.tensor(labels), predicted) == confusion).all()
    ours = metrics.scores(confusion)
    assert ours["g_mean"] == pytest.approx(geometric_mean_score(labels, predicted))
    assert ours["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(labels, predicted))
    balanced = sklearn_metrics.balanced_accuracy_score(labels, predicted)
    assert ours["balanced_accuracy"] == pytest.approx(balanced)
    for score in ("recall", "precision"):
        reference = getattr(sklearn_metrics, f"{score}_score")
        theirs = reference(labels, predicted, average=None, zero_division=0)
        assert ours[score] == pytest.approx(theirs)
    assert 0 <= ours["g_mean"] <= ours["balanced_accuracy"] + 1e-12


def test_always_car_has_88_percent_accuracy_and_g_mean_0():
    found = metrics.evaluate(torch.tensor([0] * 88 + [1] * 8 + [2] * 4), torch.zeros(100).long())
    assert found["accuracy"] == pytest.approx(0.88)
    assert found["balanced_accuracy"] == pytest.approx(1 / 3)
    assert found["g_mean"] == 0
    assert found["recall"] == {"car": 1, "truck": 0, "cat": 0}
    assert found["precision"] == {"car": 0.88, "truck": 0, "cat": 0}
    assert found["confusion"] == [[88, 0, 0], [8, 0, 0], [4, 0, 0]]


def test_a_class_of_one_image_scores_0_or_1():
    found = metrics.scores(np.eye(3, dtype=int))
    assert found["recall"].tolist() == found["precision"].tolist() == [1, 1, 1]
    assert metrics.scores(np.roll(np.eye(3, dtype=int), 1, axis=1))["g_mean"] == 0


def test_spread_over_runs_by_hand():
    runs = [{"g_mean": g_mean, "recall": {"car": 0.1}} for g_mean in (0.5, 0.7)]
    spread = {"g_mean": pytest.approx(0.02**0.5), "recall": {"car": 0}}
    assert metrics.spread_over_runs(runs) == spread
    assert metrics.spread_over_runs(runs[:1]) == {"g_mean": 0, "recall": {"car": 0}}


def test_nothing_is_claimed_of_a_class_without_images():
    found = metrics.evaluate([0, 0, 0, 1], [0, 0, 1, 1])
    assert np.isnan(found["recall"]["cat"])
    assert np.isnan(found["g_mean"])
    assert found["interval"]["recall"]["cat"] == [0, 1]
    assert found["interval"]["g_mean"][0] == 0
    perfect = metrics.intervals(np.diag([9, 5, 0]))
    assert perfect["g_mean"].tolist() == [0, 1]
    assert perfect["balanced_accuracy"][1] == 1
    assert metrics.intervals(np.diag([9, 5], k=1))["balanced_accuracy"][0] == 0
    assert found["recall"]["car"] == pytest.approx(2 / 3)
    assert found["accuracy"] == 0.75


def test_predictions_survive_the_csv_file():
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 5.0]])
    rows = list(csv.DictReader(io.StringIO(metrics.format_predictions([1, 2], logits))))
    assert [row["label"] for row in rows] == ["truck", "cat"]
    assert [row["predicted"] for row in rows] == ["car", "cat"]
    for number, row in enumerate(rows):
        assert int(row["index"]) == number
        expected = logits[number].softmax(dim=0).tolist()
        assert [float(row[name]) for name in ("car", "truck", "cat")] == pytest.approx(
            expected, abs=1e-6
        )


# ---- intervals ------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 34), (1, 34), (17, 34), (33, 34), (34, 34), (700, 743)])
def test_wilson_interval_is_that_of_wilsons_formula(k, n):
    z = stats.norm.ppf(0.975)
    center, half = k + z**2 / 2, z * (k * (n - k) / n + z**2 / 4) ** 0.5
    expected = ((center - half) / (n + z**2), (center + half) / (n + z**2))
    assert metrics.wilson_interval(k, n) == pytest.approx(expected, abs=1e-12)


def test_jeffreys_interval_by_hand():
    # Beta(1/2, 3/2) has the distribution function (2/pi) (asin(sqrt x) + sqrt(x (1 - x))).
    low, high = metrics.jeffreys_interval(0, 1)
    assert low == 0
    assert 2 / np.pi * (np.arcsin(high**0.5) + (high * (1 - high)) ** 0.5) == pytest.approx(0.975)
    assert metrics.jeffreys_interval(1, 1) == pytest.approx((1 - high, 1))
    # 3 of 7: the density x^2.5 (1 - x)^3.5 summed up over a fine grid.
    x = np.linspace(0, 1, 200_001)
    mass = np.cumsum(x**2.5 * (1 - x) ** 3.5)
    expected = [x[np.searchsorted(mass, tail * mass[-1])] for tail in (0.025, 0.975)]
    assert metrics.jeffreys_interval(3, 7) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("confusion", "score", "ends"),
    [
        (np.diag(DEV_COUNTS), "g_mean", (None, 1)),
        (np.diag(DEV_COUNTS), "balanced_accuracy", (None, 1)),
        (np.array([[743, 0, 0], [67, 0, 0], [34, 0, 0]]), "g_mean", (0, None)),
        (np.roll(np.diag(DEV_COUNTS), 1, axis=1), "balanced_accuracy", (0, None)),
    ],
)
def test_intervals_at_the_edge_end_there_and_have_a_width(confusion, score, ends):
    low, high = metrics.intervals(confusion)[score]
    assert high - low > 0.01
    assert ends[0] is None or low == ends[0]
    assert ends[1] is None or high == ends[1]


@pytest.mark.parametrize("confusion", [CONFUSION, np.diag(DEV_COUNTS) - 5 * np.eye(3, dtype=int)])
def test_intervals_are_quantiles_of_the_recalls_posterior(confusion):
    confusion = confusion + np.eye(3, k=1, dtype=int)
    correct, wrong = np.diag(confusion), confusion.sum(axis=1) - np.diag(confusion)
    recalls = stats.beta.rvs(correct + 0.5, wrong + 0.5, size=(100_000, 3), random_state=1)
    found = metrics.intervals(confusion)
    for score, draws in (("balanced_accuracy", np.mean), ("g_mean", stats.gmean)):
        expected = np.quantile(draws(recalls, axis=1), [0.025, 0.975])
        assert found[score] == pytest.approx(expected, abs=0.004), score


@settings(max_examples=30, deadline=None)
@given(cells=st.lists(st.integers(0, 30), min_size=9, max_size=9))
def test_each_interval_holds_its_score(cells):
    confusion = np.array(cells).reshape(3, 3) + np.eye(3, k=-1, dtype=int)
    confusion[0, 2] += 1
    found, intervals = metrics.scores(confusion), metrics.intervals(confusion)
    for name, score in found.items():
        low, high = intervals[name][..., 0], intervals[name][..., 1]
        assert (low <= score).all()
        assert (score <= high).all()


def test_intervals_are_the_same_each_time_and_hardly_depend_on_the_draws(monkeypatch):
    once, again = (metrics.intervals(CONFUSION)["g_mean"] for _ in range(2))
    monkeypatch.setattr(metrics, "DRAWS", metrics.DRAWS + 1)
    other = metrics.intervals(CONFUSION)["g_mean"]
    assert once.tolist() == again.tolist() != other.tolist()
    assert once == pytest.approx(other, abs=0.01)


SETTINGS = [
    (0.95, 0.97, 0.97),  # where the percentile bootstrap covers 87%
    (0.98, 0.03, 0.02),  # and here 44%
    (0.90, 0.75, 0.70),
    (1.00, 0.00, 0.50),  # degenerate: recalls of 0 and 1
    (0.999, 0.99, 0.99),
]


@pytest.mark.parametrize("recalls", SETTINGS)
def test_intervals_cover_the_truth(recalls):
    recalls, counts, repeats = np.array(recalls), np.array(DEV_COUNTS), 250
    truth = {
        "accuracy": recalls @ counts / counts.sum(),
        "balanced_accuracy": recalls.mean(),
        "g_mean": recalls.prod() ** (1 / 3),
    }
    generator, covered = np.random.default_rng(1), dict.fromkeys(truth, 0)
    for _ in range(repeats):
        correct = generator.binomial(counts, recalls)
        confusion = np.diag(correct) + np.roll(np.diag(counts - correct), 1, axis=1)
        intervals = metrics.intervals(confusion)
        for score, value in truth.items():
            low, high = intervals[score]
            covered[score] += low - 1e-12 <= value <= high + 1e-12
    assert min(covered.values()) / repeats >= 0.93


# ---- comparisons ----------------------------------------------------------------------------


@pytest.fixture
def case():
    """Labels, and the predictions of two models that err on many of the same images."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], (400, 120, 80))
    baseline = draw_predictions(labels, (0.9, 0.7, 0.6), generator)
    redrawn = draw_predictions(labels, (0.9, 0.8, 0.8), generator)
    predicted = np.where(generator.random(len(labels)) < 0.5, redrawn, baseline)
    return labels, predicted, baseline


@pytest.mark.parametrize("score", ["accuracy", "balanced_accuracy", "g_mean"])
def test_comparison_is_that_of_resampled_images(case, score):
    labels, predicted, baseline = case
    reference = {
        "accuracy": sklearn_metrics.accuracy_score,
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score,
        "g_mean": geometric_mean_score,
    }[score]
    found = metrics.compare(labels, predicted, baseline, score)
    difference = reference(labels, predicted) - reference(labels, baseline)
    assert found["difference"] == pytest.approx(difference)
    assert found["runs"] == 1

    generator, drawn = np.random.default_rng(1), []
    members = [np.flatnonzero(labels == label) for label in range(3)]
    for _ in range(4000):
        index = np.concatenate([generator.choice(own, len(own)) for own in members])
        matrices = [
            metrics.confusion_matrix(labels[index], x[index]) for x in (predicted, baseline)
        ]
        ours, theirs = (metrics.scores(matrix)[score] for matrix in matrices)
        drawn.append(ours - theirs)
    expected = np.quantile(drawn, (0.025, 0.975))
    assert found["interval"] == pytest.approx(expected, abs=0.1 * np.ptp(expected))


def test_intervals_of_several_comparisons_are_wider_and_hold_at_once(case):
    labels, predicted, baseline = case
    single = metrics.compare(labels, predicted, baseline)["interval"]
    found = metrics.compare(labels, predicted, baseline, comparisons=10)["interval"]
    generator, drawn = np.random.default_rng(1), [1, 1]
    for label in range(3):
        own = labels == label
        both = 2 * (baseline == labels)[own] + (predicted == labels)[own]
        outcomes = np.bincount(both, minlength=4) + 0.5
        fractions = generator.dirichlet(outcomes, 100_000)
        drawn = [drawn[0] * fractions[:, [1, 3]].sum(1), drawn[1] * fractions[:, 2:].sum(1)]
    differences = np.cbrt(drawn[0]) - np.cbrt(drawn[1])
    for interval, tail in ((single, 0.025), (found, 0.0025)):
        expected = np.quantile(differences, [tail, 1 - tail])
        assert interval == pytest.approx(expected, abs=0.03 * np.ptp(expected))
    assert np.ptp(found) > 1.3 * np.ptp(single)


def test_pairing_tells_more_than_two_intervals(case):
    labels, predicted, baseline = case
    one, other = (metrics.evaluate(labels, x)["interval"]["g_mean"] for x in (predicted, baseline))
    assert one[0] < other[1]  # they overlap
    assert metrics.compare(labels, predicted, baseline)["interval"][0] > 0


def test_two_equal_models_have_a_symmetric_interval_of_some_width():
    labels = np.repeat([0, 1, 2], [200, 40, 20])
    low, high = metrics.compare(labels, labels, labels)["interval"]
    assert 0.005 < high < 0.05
    assert low == pytest.approx(-high, rel=0.1)


@pytest.mark.parametrize("runs", [2, 3])
def test_the_spread_over_runs_is_that_of_a_t_test(runs):
    labels = np.repeat([0, 1, 2], 20_000)  # so many that the images themselves matter little
    generator = np.random.default_rng(0)
    baseline = [
        draw_predictions(labels, [recall] * 3, generator) for recall in (0.8, 0.82, 0.81)[:runs]
    ]
    predicted = [
        draw_predictions(labels, [recall] * 3, generator) for recall in (0.84, 0.92, 0.86)[:runs]
    ]
    found = metrics.compare(labels, predicted, baseline, "accuracy")
    differences = (predicted == labels).mean(axis=1) - (baseline == labels).mean(axis=1)
    expected = stats.ttest_1samp(differences, 0).confidence_interval()
    assert found["runs"] == runs
    assert found["difference"] == pytest.approx(differences.mean())
    assert found["interval"] == pytest.approx([expected.low, expected.high], rel=0.2, abs=0.01)


@pytest.mark.parametrize("runs", [1, 3])
def test_equal_predictions_show_no_difference(case, runs):
    labels, predicted, _ = case
    found = metrics.compare(labels, [predicted] * runs, [predicted] * runs)
    assert found["difference"] == 0
    low, high = found["interval"]
    assert low < 0 < high < 0.05
    assert "no difference seen" in metrics.describe_comparison(found)


@pytest.mark.parametrize("score", ["accuracy", "balanced_accuracy", "g_mean"])
def test_one_image_is_no_difference(score):
    labels = np.repeat([0, 1, 2], DEV_COUNTS)
    predicted = labels.copy()
    predicted[-1] = 0
    low, high = metrics.compare(labels, labels, predicted, score)["interval"]
    assert low < 0 < high


def test_runs_that_do_not_pair_are_refused(case):
    labels, predicted, baseline = case
    with pytest.raises(ValueError, match="cannot pair"):
        metrics.compare(labels, [predicted] * 2, [baseline] * 3)


def test_a_comparison_in_words():
    def describe(difference, low, high, runs=3):
        return metrics.describe_comparison(
            {"difference": difference, "interval": [low, high], "runs": runs}
        )

    assert describe(0.047, 0.02, 0.088) == "better by 0.047 [0.020, 0.088]"
    assert describe(-0.047, -0.088, -0.02) == "worse by 0.047 [0.020, 0.088]"
    assert describe(0.003, -0.02, 0.027) == "no difference seen (+0.003 [-0.020, 0.027])"
    assert describe(0.03, 0.0, 0.06).startswith("no difference seen")
    assert describe(-0.03, -0.06, 0.0).startswith("no difference seen")
    assert "one seed" in describe(0.047, 0.02, 0.088, runs=1)


@pytest.mark.parametrize(
    ("runs", "text"), [([], "0.500"), ([{}], "0.500"), ([{}, {}], "0.500 ± 0.020")]
)
def test_a_mean_is_given_with_its_spread_if_there_are_several_runs(runs, text):
    summary = {"g_mean": 0.5, "spread": {"g_mean": 0.02}, "runs": runs}
    assert metrics.format_mean(summary, "g_mean") == text


@pytest.mark.parametrize(
    ("recalls", "better", "runs"),
    [
        ((1.0, 0.0, 0.0), (0.92, 0.73, 0.71), 1),
        ((0.98, 0.3, 0.0), (0.92, 0.73, 0.71), 1),
        ((0.98, 0.3, 0.0), (0.92, 0.73, 0.71), 3),
        ((0.98, 0.3, 0.0), (0.95, 0.5, 0.03), 1),  # of 34 cats, often none is correct here either
    ],
)
def test_comparisons_with_a_model_that_never_recognizes_a_class_cover_the_truth(
    recalls, better, runs
):
    generator, repeats = np.random.default_rng(3), 60
    labels, covered = np.repeat([0, 1, 2], DEV_COUNTS), 0
    for _ in range(repeats):
        predicted, baseline = (
            [draw_predictions(labels, each, generator) for _ in range(runs)]
            for each in (better, recalls)
        )
        low, high = metrics.compare(labels, predicted, baseline)["interval"]
        covered += low <= np.cbrt(np.prod(better)) <= high  # the baseline's own G-mean is 0
    assert covered / repeats >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("often", [0.1, 0.03, 0.005])
def test_comparisons_cover_the_truth(often):
    """`often`: how often either model alone is wrong; both err together on another 5%."""
    generator, repeats = np.random.default_rng(2), 400
    labels, covered = np.repeat([0, 1, 2], DEV_COUNTS), 0
    for _ in range(repeats):
        outcome = generator.random(len(labels))
        wrong = [(outcome < often) | (outcome > 0.95), (often < outcome) & (outcome < 2 * often)]
        wrong[1] |= outcome > 0.95
        one, other = (np.where(errors, (labels + 1) % 3, labels) for errors in wrong)
        low, high = metrics.compare(labels, one, other)["interval"]
        covered += low <= 0 <= high
    assert covered / repeats >= 0.93


# ---- calibration ----------------------------------------------------------------------------


def test_expected_calibration_error_by_hand():
    # Bin (0.5, 0.6]: two images, confidence 0.55, one correct: gap 0.05.
    # Bin (0.8, 0.9]: three images, confidence 0.9, 0.84 and 0.84 (mean 0.86), one correct.
    probabilities = [
        [0.55, 0.45, 0.0],
        [0.45, 0.55, 0.0],
        [0.9, 0.1, 0.0],
        [0.84, 0.16, 0.0],
        [0.0, 0.16, 0.84],
    ]
    labels = [0, 0, 0, 1, 1]
    expected = (2 * 0.05 + 3 * (0.86 - 1 / 3)) / 5
    assert metrics.expected_calibration_error(probabilities, labels) == pytest.approx(expected)
    table = metrics.reliability(torch.tensor(probabilities, dtype=torch.float64), labels)
    assert table["count"].tolist() == [0, 0, 0, 0, 0, 2, 0, 0, 3, 0]
    assert table["accuracy"][[5, 8]] == pytest.approx([1 / 2, 1 / 3])
    assert np.isnan(table["accuracy"][0])
    assert metrics.expected_calibration_error(np.eye(3), [0, 1, 2]) == 0
    assert metrics.expected_calibration_error(np.eye(3), [1, 2, 0]) == 1
