"""Scores for imbalanced classes, their confidence intervals, and paired comparisons of models.

Labels, predictions and logits may be NumPy arrays, torch tensors or lists.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from common.data import CLASS_NAMES

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize
from scipy.special import softmax
from scipy.stats import beta, binomtest

SCORE_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "g_mean": "G-mean",
}
TAIL = 0.025  # on each side of a 95% interval
DRAWS = 10_000  # from a posterior: an interval's ends then vary in the third digit
PSEUDO_WEIGHT = 0.5  # of each joint outcome of two models: Jeffreys' prior of a multinomial
BINS = 10  # of confidence, for calibration


# ---- scores ---------------------------------------------------------------------------------


def confusion_matrix(labels: ArrayLike, predicted: ArrayLike) -> np.ndarray:
    """Return counts [C, C]: true class by predicted class."""
    classes = len(CLASS_NAMES)
    cells = np.asarray(labels) * classes + np.asarray(predicted)
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return all scores of a confusion matrix, [C, C].

    Recall is the fraction of a class's images that are classified correctly, NaN for a class
    without images. Precision is the fraction of a class's predictions that are correct, 0 for a
    class that is never predicted. Balanced accuracy is the mean of the recalls. G-mean is their
    geometric mean (Kubat and Matwin 1997; Sun, Kamel and Wang 2006): 0 if any of them is 0.

    Returns:
        accuracy, balanced_accuracy and g_mean; recall and precision, [C] each.
    """
    correct, counts = np.diagonal(confusion), confusion.sum(axis=1)
    recall = np.where(counts > 0, correct / np.maximum(counts, 1), np.nan)
    return combine_recalls(recall) | {
        "accuracy": correct.sum() / counts.sum(),  # also where a recall is NaN
        "recall": recall,
        "precision": correct / np.maximum(confusion.sum(axis=0), 1),
    }


def combine_recalls(recalls: np.ndarray) -> dict[str, np.ndarray]:
    """Return the scores that follow from the recalls, [..., C]: their two means, [...]."""
    g_mean = recalls.prod(axis=-1) ** (1 / recalls.shape[-1])
    return {"balanced_accuracy": recalls.mean(axis=-1), "g_mean": g_mean}


def evaluate(labels: ArrayLike, predicted: ArrayLike) -> dict[str, Any]:
    """Return the scores of predicted classes with 95% intervals, ready for a JSON file."""
    confusion = confusion_matrix(labels, predicted)
    return {
        **_by_name(scores(confusion)),
        "interval": _by_name(intervals(confusion)),
        "confusion": confusion.tolist(),
    }


def _by_name(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    named = {score: values[score].tolist() for score in SCORE_TITLES}
    for score in ("recall", "precision"):
        named[score] = dict(zip(CLASS_NAMES, values[score].tolist(), strict=True))
    return named


def mean_over_runs(runs: list[Any]) -> Any:
    """Return the mean over several runs of numbers, or of dicts of numbers."""
    return _over_runs(np.mean, runs)


def spread_over_runs(runs: list[Any]) -> Any:
    """Return the standard deviation over several runs, 0 for a single one."""
    return _over_runs(lambda values: np.std(values, ddof=1) if len(values) > 1 else 0.0, runs)


def format_mean(summary: Mapping[str, Any], score: str) -> str:
    """Return a mean as text, with its standard deviation if there were several runs."""
    text = f"{summary[score]:.3f}"
    several = len(summary.get("runs", [])) > 1
    return f"{text} ± {summary['spread'][score]:.3f}" if several else text


def _over_runs(function: Callable[[list[float]], float], runs: list[Any]) -> Any:
    if isinstance(runs[0], dict):
        return {key: _over_runs(function, [run[key] for run in runs]) for key in runs[0]}
    return None if runs[0] is None else float(function(runs))


def format_predictions(labels: ArrayLike, logits: ArrayLike) -> str:
    """Return a table (CSV) of each image's label, predicted class, and class probabilities."""
    logits = np.asarray(logits, dtype=float)
    columns = zip(labels, logits.argmax(axis=1), softmax(logits, axis=1), strict=True)
    lines = [",".join(("index", "label", "predicted", *CLASS_NAMES))]
    for index, (label, predicted, probabilities) in enumerate(columns):
        numbers = ",".join(f"{probability:.6f}" for probability in probabilities)
        lines.append(f"{index},{CLASS_NAMES[label]},{CLASS_NAMES[predicted]},{numbers}")
    return "\n".join(lines) + "\n"


# ---- intervals of one model's scores --------------------------------------------------------


def jeffreys_interval(successes: int, total: int) -> tuple[float, float]:
    """Return the 95% interval of a proportion from Beta(k + 1/2, n - k + 1/2).

    It ends at 0 if nothing succeeded and at 1 if everything did (Brown, Cai and DasGupta 2001).
    """
    low, high = beta.ppf([TAIL, 1 - TAIL], successes + 0.5, total - successes + 0.5)
    return 0.0 if successes == 0 else float(low), 1.0 if successes == total else float(high)


def wilson_interval(successes: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95% score interval of a proportion (1927)."""
    low, high = binomtest(successes, total).proportion_ci(method="wilson")
    return float(low), float(high)


def intervals(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return the 95% interval of each score of a confusion matrix [C, C].

    Recall and precision: Jeffreys; accuracy: Wilson; balanced accuracy and G-mean: draws from the
    recalls' posteriors (Brodersen et al. 2010). The interval for the precision of a class that is
    never predicted is [0, 1].

    Returns:
        the keys of `scores`, with a last axis (low, high).
    """
    correct, counts = np.diagonal(confusion), confusion.sum(axis=1)
    generator = np.random.default_rng(0)
    recalls = generator.beta(correct + 0.5, counts - correct + 0.5, (DRAWS, len(counts)))
    values, draws = scores(confusion), combine_recalls(recalls)
    found = {score: _interval_around(draws[score], values[score]) for score in draws}
    # An interval ends at 0 if nothing is correct, and at 1 if everything is. Both hold for a class
    # without images: its recall may be anything.
    if (correct == 0).any():
        found["g_mean"][0] = 0.0
    if (correct == 0).all():
        found["balanced_accuracy"][0] = 0.0
    if (correct == counts).all():
        found["balanced_accuracy"][1] = found["g_mean"][1] = 1.0
    columns = zip(correct, confusion.sum(axis=0), strict=True)
    return found | {
        "accuracy": np.array(wilson_interval(correct.sum(), counts.sum())),
        "recall": np.array([jeffreys_interval(*row) for row in zip(correct, counts, strict=True)]),
        "precision": np.array([jeffreys_interval(*column) for column in columns]),
    }


def _interval_around(draws: np.ndarray, value: float, tail: float = TAIL) -> np.ndarray:
    """Return the central part of the draws, widened to contain the value if necessary."""
    low, high = np.quantile(draws, [tail, 1 - tail])
    return np.array([np.fmin(low, value), np.fmax(high, value)])


# ---- is one model better than another? ------------------------------------------------------


def compare(
    labels: ArrayLike,
    predicted: ArrayLike,
    baseline: ArrayLike,
    score: str = "g_mean",
    comparisons: float = 1,
) -> dict[str, Any]:
    """Compare the predictions `predicted` [S, N] or [N] with `baseline`, on the same images.

    Bayesian bootstrap (Rubin 1981): in each draw, the images of a class get random weights, the
    same for both models, so that images that are hard for both cancel out. Half a pseudo-image
    for each joint outcome (neither, one, the other or both correct) accounts for outcomes that
    these few images lack: without it, the interval for two perfect models would be [0, 0]. With
    S runs (seeds), run i is compared to run i, and a t-distributed term adds the spread over the
    runs. Part of that spread comes from the choice of images, which then counts twice: with
    several runs, the interval is conservative (in simulations it covers 95 to 100%).

    Args:
        comparisons: number of comparisons whose 95% intervals are to hold at once (Bonferroni).

    Returns:
        `difference` of the mean scores (above 0 if `predicted` is better), its 95% `interval`, the
        number of `runs`, and the result in words, `text`.
    """
    labels = np.asarray(labels)
    correct = [np.atleast_2d(np.asarray(runs)) == labels for runs in (baseline, predicted)]
    if correct[0].shape != correct[1].shape:
        raise ValueError(f"cannot pair runs: {correct[0].shape} and {correct[1].shape}")
    runs, generator = len(correct[0]), np.random.default_rng(0)
    by_class = [np.concatenate(correct)[:, labels == label] for label in np.unique(labels)]
    fractions = np.array([group.shape[1] for group in by_class]) / len(labels)
    observed = np.stack([group.mean(axis=1) for group in by_class], axis=-1)
    drawn = np.stack([_draw_recalls(group, generator) for group in by_class], axis=-1)

    differences = _per_run_difference(observed, fractions, score)
    difference, noise = float(differences.mean()), 0.0
    if runs > 1:
        standard_error = differences.std(ddof=1) / np.sqrt(runs)
        noise = standard_error * generator.standard_t(runs - 1, DRAWS)
    ends = []
    for recalls in _with_zeros(drawn, observed):
        draws = _per_run_difference(recalls, fractions, score).mean(axis=-1)
        ends.append(_interval_around(draws + noise, difference, TAIL / comparisons))
    interval = [float(np.min(ends)), float(np.max(ends))]
    found = {"difference": difference, "interval": interval, "runs": runs}
    return found | {"text": describe_comparison(found)}


def _draw_recalls(correct: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draw the recalls [DRAWS, 2 S] of one class from `correct` [2 S, images of the class].

    Images with the same outcomes share one weight, gamma-distributed with their number as shape.
    """
    patterns, counts = np.unique(correct, axis=1, return_counts=True)
    pairs = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])  # baseline correct?, predicted correct?
    patterns = np.hstack([patterns, np.repeat(pairs, len(correct) // 2, axis=0)])
    counts = np.concatenate([counts, [PSEUDO_WEIGHT] * 4])
    weights = generator.standard_gamma(counts, (DRAWS, len(counts)))
    return (weights @ patterns.T) / weights.sum(axis=1, keepdims=True)


def _with_zeros(drawn: np.ndarray, observed: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the drawn recalls [DRAWS, 2 S, C], then with zeros in place of some.

    Where no image of a class is correct, the draws are still above 0, and the G-means far above.
    In truth, one of the models, or both, may never recognize that class.
    """
    yield drawn
    never = observed == 0
    if never.any():
        is_baseline = np.arange(len(never))[:, None] < len(never) // 2
        for zeros in (never, never & is_baseline, never & ~is_baseline):
            yield np.where(zeros, 0, drawn)


def _per_run_difference(recalls: np.ndarray, fractions: np.ndarray, score: str) -> np.ndarray:
    """Return predicted - baseline [..., S] from recalls [..., 2 S, C], the baseline's first."""
    values = recalls @ fractions if score == "accuracy" else combine_recalls(recalls)[score]
    baseline, predicted = np.split(values, 2, axis=-1)
    return predicted - baseline


def describe_comparison(comparison: Mapping[str, Any]) -> str:
    """Say in words which is better; an interval that contains 0 is no difference."""
    difference, (low, high) = comparison["difference"], comparison["interval"]
    if low > 0:
        text = f"better by {difference:.3f} [{low:.3f}, {high:.3f}]"
    elif high < 0:
        text = f"worse by {-difference:.3f} [{-high:.3f}, {-low:.3f}]"
    else:
        text = f"no difference seen ({difference:+z.3f} [{low:z.3f}, {high:z.3f}])"
    if comparison["runs"] == 1:
        text += "; one seed: the spread over seeds is not included"
    return text


# ---- calibration ----------------------------------------------------------------------------


def reliability(probabilities: ArrayLike, labels: ArrayLike) -> dict[str, np.ndarray]:
    """Group images by confidence, the highest probability, in BINS of equal width.

    Returns:
        `count`, mean `confidence` and `accuracy` of each bin [BINS], NaN where it is empty.
    """
    probabilities = np.asarray(probabilities, dtype=float)
    confidence = probabilities.max(axis=1)
    correct = probabilities.argmax(axis=1) == np.asarray(labels)
    index = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(index, minlength=BINS)
    nonempty = np.where(count > 0, count, np.nan)
    return {
        "count": count,
        "confidence": np.bincount(index, confidence, BINS) / nonempty,
        "accuracy": np.bincount(index, correct, BINS) / nonempty,
    }


def expected_calibration_error(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean gap between confidence and accuracy (ECE, Guo et al. 2017)."""
    table = reliability(probabilities, labels)
    gaps = np.abs(table["accuracy"] - table["confidence"]) * table["count"]
    return float(np.nansum(gaps) / table["count"].sum())


# ---- label noise ----------------------------------------------------------------------------

# The label filter does not trust labels that are wrong with a higher probability than this: about
# as many as the models estimate to be wrong.
FILTER_THRESHOLD = 0.35
CORRECTION_THRESHOLD = 0.6  # an untrusted label is replaced by one more probable than this


def label_posterior(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Return the label posterior, P(true label | image, given label), [N, C].

    Args:
        logits: [N, C], out of fold: each from a model that was not trained on the image.
        labels: as given, [N].
    """
    labels = np.asarray(labels)
    true, transition = fit_label_noise(logits, labels)
    joint = true * transition[:, labels].T
    return joint / joint.sum(axis=1, keepdims=True)


def fit_label_noise(logits: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return P(true label | image), [N, C], and the transition matrix P(given | true), [C, C].

    Models that learned from wrong labels predict the given label, not the true one. So it is the
    given label that is modeled here, by P(true | image) @ transition, the forward correction of
    Patrini et al. (2017). P(true | image) is softmax(logits / temperature + bias), where the bias
    restores the class prior, which models trained on balanced classes lack. Temperature, bias and
    transition matrix are those under which the given labels are most likely. One extra,
    correctly labeled image per class is the prior: without evidence, no label is wrong.
    """
    logits, labels = np.asarray(logits, dtype=float), np.asarray(labels)
    classes = logits.shape[1]
    given = np.eye(classes)[labels]

    def unpack(parameters: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        scale, bias, flips = np.split(parameters, [1, 1 + classes])
        true = softmax(np.exp(scale) * logits + bias, axis=1)
        return np.exp(scale[0]), true, softmax(flips.reshape(classes, classes), axis=1)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the negative log-likelihood and its gradient."""
        scale, true, transition = unpack(parameters)
        joint = true * (given @ transition.T)
        posterior = joint / joint.sum(axis=1, keepdims=True)
        counts = posterior.T @ given + np.eye(classes)  # expected, [true, given]
        to_logits = posterior - true
        to_flips = counts - counts.sum(axis=1, keepdims=True) * transition
        gradient = [[scale * (to_logits * logits).sum()], to_logits.sum(axis=0), to_flips.ravel()]
        value = np.log(joint.sum(axis=1)).sum() + np.log(np.diagonal(transition)).sum()
        return -value / len(labels), -np.concatenate(gradient) / len(labels)

    prior = np.log(np.maximum(given.sum(axis=0), 1))
    start = np.concatenate([[0], prior - prior.max(), 3 * np.eye(classes).ravel()])
    bounds = [(-3, 3)] + [(-12, 12)] * (len(start) - 1)
    _, true, transition = unpack(minimize(loss, start, jac=True, bounds=bounds).x)
    return true, transition


def trusted_labels(posterior: np.ndarray, labels: ArrayLike) -> np.ndarray:
    """Return which labels to trust, bool [N]: wrong with at most FILTER_THRESHOLD probability.

    A class that would have no images left is trusted as a whole.
    """
    labels = np.asarray(labels)
    own = posterior[np.arange(len(labels)), labels]
    return keep_classes(own >= 1 - FILTER_THRESHOLD, labels)


def keep_classes(kept: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return `kept`, bool [N], with every image of a class of which it keeps none."""
    return kept | (np.bincount(labels, weights=kept)[labels] == 0)
