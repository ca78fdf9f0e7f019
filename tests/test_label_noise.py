from common import metrics

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

COUNTS = (4000, 400, 200)
CENTERS = 1.6 * np.eye(3, 6)  # a class's images overlap with those of others


def plant_noise(fractions, counts=COUNTS, seed=0):
    """Return given and true labels: in each given class, a fraction is truly of another class."""
    generator = np.random.default_rng(seed)
    given = np.repeat(np.arange(3), counts)
    true = given.copy()
    for label, fraction in enumerate(fractions):
        members = np.flatnonzero(given == label)
        wrong = generator.choice(members, round(fraction * len(members)), replace=False)
        true[wrong] = (label + generator.integers(1, 3, len(wrong))) % 3
    return given, true


def out_of_fold_logits(given, true, class_weight="balanced", seed=0):
    """Return logits of models trained on the given labels, of images that show the true ones."""
    images = CENTERS[true] + np.random.default_rng(seed + 100).normal(size=(len(true), 6)) * 0.6
    model = LogisticRegression(class_weight=class_weight)
    order = np.random.default_rng(seed).permutation(len(true))
    logits = np.empty((len(true), 3))
    logits[order] = cross_val_predict(
        model, images[order], given[order], cv=4, method="decision_function"
    )
    return logits


def trusted_labels(logits, labels):
    return metrics.trusted_labels(metrics.label_posterior(logits, labels), labels)


def test_posterior_is_bayes_rule_by_hand(monkeypatch):
    true = np.array([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]])
    transition = np.array([[0.9, 0.05, 0.05], [0.2, 0.8, 0.0], [0.1, 0.2, 0.7]])
    monkeypatch.setattr(metrics, "fit_label_noise", lambda logits, labels: (true, transition))
    posterior = metrics.label_posterior(np.zeros((2, 3)), [2, 0])
    # Given cat: 0.8 * 0.05 = 0.04, 0.1 * 0 = 0, 0.1 * 0.7 = 0.07; their sum is 0.11.
    assert posterior[0] == pytest.approx([4 / 11, 0, 7 / 11])
    # Given car: 0.8 * 0.9 = 0.72, 0.1 * 0.2 = 0.02, 0.1 * 0.1 = 0.01; their sum is 0.75.
    assert posterior[1] == pytest.approx([72 / 75, 2 / 75, 1 / 75])


def test_labels_that_are_wrong_with_more_than_35_percent_are_not_trusted():
    posterior = np.array([[0.66, 0.34, 0], [0.64, 0.36, 0], [0.1, 0.9, 0], [0.3, 0, 0.7]])
    assert metrics.trusted_labels(posterior, [0, 0, 0, 2]).tolist() == [True, False, False, True]
    assert metrics.trusted_labels(posterior, [0, 0, 0, 1])[3]  # else no truck would be left


def test_temperature_prior_and_transition_matrix_are_recovered():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 3)) * 3
    probabilities = softmax(1.5 * logits + [0, -1, -2], axis=1)
    transition = np.array([[0.97, 0.01, 0.02], [0.1, 0.85, 0.05], [0.2, 0.1, 0.7]])
    true = (generator.random((20_000, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)
    given = (generator.random((20_000, 1)) > transition[true].cumsum(axis=1)).sum(axis=1)
    fitted, found = metrics.fit_label_noise(logits, given)
    assert found == pytest.approx(transition, abs=0.02)
    assert np.abs(fitted - probabilities).mean() < 0.01


def test_fit_is_the_best_that_another_optimizer_finds():
    generator = np.random.default_rng(1)
    logits = 2 * generator.normal(size=(40, 3))  # so few that the prior matters
    given = (logits + generator.normal(size=(40, 3))).argmax(axis=1)
    given[:6] = (given[:6] + 1) % 3

    def objective(true, transition):
        likelihood = np.log((true @ transition)[np.arange(40), given]).sum()
        return likelihood + np.log(np.diagonal(transition)).sum()  # the three extra images

    def loss(parameters):
        true = softmax(np.exp(parameters[0]) * logits + parameters[1:4], axis=1)
        return -objective(true, softmax(parameters[4:].reshape(3, 3), axis=1))

    start = np.concatenate([[0], np.zeros(3), 2 * np.eye(3).ravel()])
    best = minimize(loss, start, method="Powell", bounds=[(-3, 3)] + [(-12, 12)] * 12)
    assert objective(*metrics.fit_label_noise(logits, given)) >= -best.fun - 0.01


@pytest.mark.parametrize("class_weight", ["balanced", None])
@pytest.mark.parametrize(
    "fractions", [(0, 0, 0), (0.01, 0.05, 0.25), (0.03, 0.1, 0.45)], ids=["none", "some", "much"]
)
def test_the_planted_fraction_is_estimated_through_trained_models(fractions, class_weight):
    given, true = plant_noise(fractions)
    logits = out_of_fold_logits(given, true, class_weight)
    posterior = metrics.label_posterior(logits, given)
    doubt = 1 - posterior[np.arange(len(given)), given]
    estimated = [doubt[given == label].mean() for label in range(3)]
    assert estimated == pytest.approx(fractions, abs=0.08)
    if fractions[2]:
        found = (doubt > 0.5) & (given == 2)
        wrong = (given != true) & (given == 2)
        assert (found & wrong).sum() > 0.75 * wrong.sum()
        assert (found & wrong).sum() > 0.85 * found.sum()


def test_models_that_learned_nothing_find_no_wrong_label():
    given, true = plant_noise((0.01, 0.05, 0.25))
    logits = np.random.default_rng(0).normal(size=(len(given), 3))
    assert trusted_labels(logits, given).all()
    assert trusted_labels(np.zeros((len(given), 3)), given).all()


def test_wrong_labels_are_not_trusted_and_no_class_is_emptied():
    given, true = plant_noise((0.01, 0.05, 0.25))
    trusted = trusted_labels(out_of_fold_logits(given, true), given)
    cats = given == 2
    assert trusted[cats & (true == 2)].mean() > 0.95
    assert trusted[cats & (true != 2)].mean() < 0.25
    # A class whose every label is wrong is kept: nothing else could be learned about it.
    labels = np.array([0, 0, 1, 1, 2])
    kept = metrics.keep_classes(np.array([True, False, False, False, False]), labels)
    assert kept.tolist() == [True, False, True, True, True]
