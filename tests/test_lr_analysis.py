import json
from dataclasses import replace

import lr_analysis
from common.data import open_data
from common.model import build_model
from common.train import draw_balanced
from lr_analysis import CHANCE_LOSS, EDGE, divergence_step, range_test, smooth, suggest_rate

import numpy as np
import pytest
import torch
from conftest import make_dataset
from torch import nn

CPU = torch.device("cpu")
RECIPE = replace(lr_analysis.RECIPE, batch_size=16)
RATES = lr_analysis.RANGE_TEST_RATES


def test_smoothing_by_hand():
    a = lr_analysis.EMA_DECAY
    expected = [3.0, (a * 3 + 1) / (a + 1), (a * a * 3 + a * 1 + 2) / (a * a + a + 1)]
    assert smooth([3.0, 1.0, 2.0]) == pytest.approx(expected)
    assert smooth([0.7] * 50) == pytest.approx([0.7] * 50)
    two_runs = smooth(np.array([[3.0, 1.0, 2.0], [0.7, 0.7, 0.7]]))
    assert two_runs == pytest.approx(np.array([expected, [0.7] * 3]))


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([1.1, 1.0, float("nan"), 1.0], 3),
        ([1.1, float("inf"), 1.0, 1.0], 2),
        ([1.1, 1.0, 500.0, 1.0], 3),
        ([1.1, 5.0, 1.0, 1.0], None),
    ],
)
def test_divergence_is_nan_or_a_leap_of_any_run(losses, step):
    assert divergence_step(np.array([losses])) == step
    assert divergence_step(np.array([[1.1, 1.0, 0.9, 0.8], losses])) == step


def verdicts(curves):
    runs = {rate: np.array([losses]) for rate, losses in curves.items()}
    return {rate: lr_analysis.verdict(rate, runs) for rate in runs}


def test_divergence_is_a_loss_of_five_times_chance_level():
    for loss, step in ((5.4, None), (5.6, 1)):  # 5 ln 3 is 5.49
        assert divergence_step(np.full((1, 20), loss)) == step


def test_verdicts_in_words():
    fall = np.linspace(0, 1, 100)
    words = verdicts(
        {
            5.0: [1.1, 1e6, *[1.1] * 98],
            0.5: [CHANCE_LOSS] * 100,
            0.05: CHANCE_LOSS - 0.9 * fall,
            0.02: CHANCE_LOSS - 0.9 * 0.94 * fall,
            0.001: CHANCE_LOSS - 0.9 * 0.22 * fall,
        }
    )
    assert words == {
        5.0: "too high: diverges at step 2",
        0.5: "too high: 0% of the best run's loss reduction",
        0.05: "the best of these",
        0.02: "works: 94% of the best run's loss reduction",
        0.001: "too low: converges too slowly, 22% of the best run's loss reduction",
    }


def test_no_rate_is_best_where_none_learns_or_all_diverge():
    words = verdicts({0.5: [CHANCE_LOSS] * 20, 0.1: [float("nan")] * 20})
    assert words[0.5] == "does not get clearly below chance level; no rate here does"
    assert words[0.1] == "too high: diverges at step 1"


def test_a_rate_whose_loss_leaps_but_learns_in_the_end_has_not_diverged():
    words = verdicts({0.5: [1.1, 1e6, *[0.1] * 300], 0.1: np.linspace(CHANCE_LOSS, 0.6, 302)})
    assert words[0.5] == "the best of these"
    assert words[0.1] == "too low: converges too slowly, 48% of the best run's loss reduction"


def test_the_best_rate_has_learned_a_twentieth_of_chance_level():
    for fraction, best in ((0.96, None), (0.94, 0.1)):
        curves = {0.1: np.full((1, 50), fraction * CHANCE_LOSS)}
        assert lr_analysis.best_rate(curves) == best


def test_final_loss_is_that_of_the_last_step():
    losses = np.array([[1.0] * 200 + [0.0], [0.5] * 201])
    assert lr_analysis.final_loss(losses) == pytest.approx((0.9 + 0.5) / 2)


def test_the_default_rates_are_those_of_the_report():
    assert lr_analysis.REPORT_RATES == (0.5, 0.05, 0.005, 0.0005, 0.00005)


# ---- range test -----------------------------------------------------------------------------


def test_tested_rates_are_evenly_spaced_in_log_with_both_ends():
    assert (RATES[0], RATES[-1]) == pytest.approx((1e-6, 1.0))
    assert np.ptp(np.diff(np.log(RATES))) < 1e-9


def test_each_loss_is_measured_before_the_step_and_the_model_stays_as_it_is(monkeypatch):
    torch.manual_seed(0)
    model, dataset = build_model(), make_dataset()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}

    def losses_at(*rates):
        monkeypatch.setattr(lr_analysis, "RANGE_TEST_RATES", np.array(rates))
        torch.manual_seed(1)
        return range_test(model, RECIPE, dataset, CPU)

    still = losses_at(1e-12, 1e-12, 1e-12, 1e-12)
    losses = losses_at(1e-12, 0.02, 1e-12, 1e-12)
    assert losses[:2] == pytest.approx(still[:2], rel=1e-5)  # the high rate acts after loss 2
    assert abs(losses[2] - still[2]) > 0.05
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_range_test_equals_the_plainest_loop(monkeypatch):
    rates, dataset = [1e-4, 1e-3, 1e-3, 1e-2, 1e-2, 1e-3], make_dataset()
    monkeypatch.setattr(lr_analysis, "RANGE_TEST_RATES", np.array(rates))
    torch.manual_seed(0)
    model = build_model().train()
    torch.manual_seed(1)
    found = range_test(model, RECIPE, dataset, CPU)
    torch.manual_seed(1)
    order = draw_balanced(dataset.labels, 16 * len(rates)).view(-1, 16)
    optimizer, expected = torch.optim.Adam(model.parameters()), []
    for rate, index in zip(rates, order, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        loss = nn.CrossEntropyLoss()(model(dataset.images[index] / 255), dataset.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_leap_counts_as_twice_the_initial_loss():
    leap, capped = [0.5] * 60, [0.5] * 60
    leap[30], capped[30] = 99.0, 1.0
    smoothed = lr_analysis.smooth_without_lag(leap)
    assert smoothed == pytest.approx(lr_analysis.smooth_without_lag(capped))


class ScriptedModel(nn.Module):
    """Has the losses of a script, whatever the images are."""

    def __init__(self, losses):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.losses = iter(losses)

    def forward(self, images):
        # Logits (z, 0, 0) give class 0 a cross-entropy of log(1 + 2 exp(-z)).
        z = -torch.log(torch.expm1(torch.tensor(next(self.losses))) / 2)
        logits = torch.stack([z, torch.tensor(0.0), torch.tensor(0.0)])
        return (logits + 0 * self.weight).expand(len(images), 3)

    def __deepcopy__(self, memo):  # an iterator can't be copied
        return self


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0] * 30, 30),
        ([1.0, 1.0, float("nan"), 1.0, 1.0], 3),
        ([1.0] * 10 + [60.0] + [1.0] * 10, 11),
        ([0.5] * 10 + [30.0] + [0.5] * 10, 11),
    ],
)
def test_range_test_stops_at_nan_and_at_five_times_the_lowest_loss(losses, expected, monkeypatch):
    monkeypatch.setattr(lr_analysis, "RANGE_TEST_RATES", np.geomspace(1e-6, 1, len(losses)))
    found = range_test(ScriptedModel(losses), RECIPE, make_dataset(counts=(9, 0, 0)), CPU)
    assert found == pytest.approx(losses[:expected], rel=0.01, nan_ok=True)


STEEPEST = 100  # the step at which falling_losses() falls most steeply


def falling_losses(noise=0.0):
    generator = np.random.default_rng(0)
    fall = 0.4 / (1 + np.exp(-(np.arange(200) - STEEPEST) / 6))
    rise = 2 / (1 + np.exp(-(np.arange(200) - 170) / 3))
    return 1.1 - fall + rise + noise * generator.standard_normal(200)


def lr_finder(losses, smoothing):
    """Return the step that pytorch-lr-finder 0.2 suggests, written from its documentation.

    An exponential average that starts at the first loss (`smooth_f` is the weight of the new one,
    0 for none); 10 steps cut off at the start and 5 at the end; the smallest gradient.
    """
    history = [losses[0]]
    for loss in losses[1:]:
        history.append(smoothing * loss + (1 - smoothing) * history[-1] if smoothing else loss)
    return 10 + int(np.gradient(history[10:-5]).argmin())


def step_of(rate):
    return int(np.abs(np.log(RATES / rate)).argmin())


def test_suggestion_agrees_with_pytorch_lr_finder_but_for_the_lag():
    rate, words = suggest_rate(RATES, falling_losses())
    assert abs(step_of(rate) - lr_finder(falling_losses(), smoothing=0)) <= 1
    assert "falls most steeply" in words
    # With its average, the other finds a rate that is higher by the lag, and ours does not.
    assert lr_finder(falling_losses(), smoothing=0.05) > STEEPEST + 5
    assert abs(step_of(suggest_rate(RATES, falling_losses(noise=0.02))[0]) - STEEPEST) <= 5


@pytest.mark.parametrize("leap", [9 - 2 * np.log(np.arange(1, 51)), [np.nan] * 50, [np.inf] * 50])
def test_a_leap_after_the_fall_changes_nothing(leap):
    losses = falling_losses()
    losses[150:] = leap
    assert abs(step_of(suggest_rate(RATES, losses)[0]) - STEEPEST) <= 1


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        (falling_losses()[: 3 * EDGE - 1], "diverges after 29 steps, too few to tell"),
        (1.1 + 0.02 * np.random.default_rng(0).standard_normal(200), "better than chance"),
        (np.r_[3 - np.arange(50) * 0.038, [1.1] * 150], "better than chance"),
        (np.linspace(0.50, 0.49, 200), "better than chance"),
        (1.1 - 0.6 * (1 - np.exp(-np.arange(200) / 3)), "at the edge"),
        (1.1 - np.exp((np.arange(200) - 200) / 3), "at the edge"),
    ],
)
def test_no_suggestion_without_reason(losses, reason):
    rate, words = suggest_rate(RATES[: len(losses)], losses)
    assert rate is None
    assert reason in words


def test_thirty_steps_are_enough_for_a_suggestion():
    losses = 0.7 - 0.4 * np.tanh((np.arange(30) - 14.5) / 4)
    rates = np.geomspace(1e-4, 1e-1, 30)
    assert suggest_rate(rates, losses)[0] == pytest.approx(rates[14], rel=0.3)
    assert suggest_rate(rates[1:], losses[1:]) == (
        None,
        "the loss diverges after 29 steps, too few to tell",
    )


def test_no_suggestion_from_shuffled_labels():
    dataset = make_dataset(counts=(400, 200, 200))
    torch.manual_seed(0)
    model = build_model()
    shuffled = replace(dataset, labels=dataset.labels[torch.randperm(len(dataset))])
    found = [suggest_rate(RATES, range_test(model, RECIPE, d, CPU)) for d in (dataset, shuffled)]
    assert 1e-5 < found[0][0] < 0.1
    assert found[1][0] is None
    assert "better than chance" in found[1][1]


# ---- figures and script ---------------------------------------------------------------------


def test_figure_3_marks_each_diverged_rate_in_its_own_place():
    nan = float("nan")
    curves = {0.5: [[1.1, nan, 1.0]], 0.1: [[1.1, 1.0, 0.9], [1.1, 0.8, 0.7]], 5: [[1.1, 99, 1]]}
    figure = lr_analysis.draw_losses({rate: np.array(runs) for rate, runs in curves.items()})
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert words == ["0.5", "0.1", "5", "chance level"]
    ax = figure.axes[0]
    crosses = [line for line in ax.lines if line.get_marker() == "X"]
    assert [line.get_xdata()[0] for line in crosses] == [2, 2]
    assert crosses[0].get_ydata()[0] - crosses[1].get_ydata()[0] >= 0.05
    assert [text.get_text().strip() for text in ax.texts] == ["0.5 diverges", "5 diverges"]
    mean_of_seeds = smooth(np.array(curves[0.1])).mean(axis=0)
    assert ax.lines[1].get_ydata() == pytest.approx(mean_of_seeds)


def test_range_figure_shows_the_suggestion_beside_the_best_rate_and_does_not_start_at_0():
    figure = lr_analysis.draw_range_test(RATES, falling_losses(), 0.002, 0.005)
    (ax,) = figure.axes
    assert {line.get_xdata()[0] for line in ax.lines} >= {0.002, 0.005}
    assert ax.get_ylim()[0] > 0.5
    (without,) = lr_analysis.draw_range_test(RATES, falling_losses(), None, None).axes
    assert len(without.lines) == 2


def test_script_writes_a_verdict_for_each_rate(run_script, course_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lr_analysis, "RECIPE", RECIPE)
    options = ("--data", course_folder, "--out", "out", "--quick", "--seed", "0,1")
    status, printed, _ = run_script(lr_analysis, *options, "--rates", "1e30", "0.001")
    assert status == 0
    assert "too high: diverges at step 2" in printed
    numbers = json.loads((tmp_path / "out/lr_analysis.json").read_text())
    assert list(numbers["rates"]) == ["1e+30", "0.001"]
    assert numbers["model"] == "the course's CNN with class-balanced sampling"
    assert numbers["rates"]["1e+30"]["diverged_at_step"] == 2
    assert None in numbers["rates"]["1e+30"]["smoothed_losses"]
    assert len(numbers["rates"]["0.001"]["smoothed_losses"]) == 8  # two epochs of four steps
    tested = numbers["range_test"]
    assert tested["explanation"] in printed
    train = open_data(str(course_folder)).load("train")
    again = lr_analysis.run_range_test(RECIPE, train, 0, CPU, None)  # with the first seed
    assert again["losses"] == tested["losses"]
    assert numbers["range_test"].keys() >= {"rates", "losses", "suggestion"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "lr_analysis.json",
        "3-learning-rates.png",
        "3-learning-rates.svg",
        "3-range-test.png",
        "3-range-test.svg",
    }


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "fast"])
def test_a_rate_that_is_none_is_refused(run_script, rate):
    status, _, error = run_script(lr_analysis, "--rates", rate)
    assert status == 2
    assert f"'{rate}' is not a number above 0" in error
