import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_dataset
from torch import nn

import lr_analysis
from lr_analysis import GUESS_LOSS, first_diverged, judge, range_test, smooth, suggest_rate
from training import NAIVE

RECIPE = replace(NAIVE, batch_size=16, sampler="weighted")
CPU = torch.device("cpu")


def test_smoothing_by_hand():
    a = lr_analysis.SMOOTHING
    losses = [3.0, 1.0, 2.0]
    expected = [
        3.0,
        (a * 3 + 1) / (a + 1),
        (a * a * 3 + a * 1 + 2) / (a * a + a + 1),
    ]
    assert smooth(losses) == pytest.approx(expected)
    assert smooth([0.7] * 50) == pytest.approx([0.7] * 50)


def test_first_diverged_finds_nan_and_leaps_and_nothing_else():
    assert first_diverged([1.1, 1.0, float("nan"), 1.0]) == 2
    assert first_diverged([1.1, float("inf"), 1.0]) == 1
    assert first_diverged([1.1, 1.0, 500.0, 1.0]) == 2
    assert first_diverged([1.1, 5.0, 1.0]) is None


def test_verdicts_in_words():
    steps = np.linspace(0, 1, 100)
    curves = {
        5.0: [1.1, 1e6, *[1.1] * 98],
        0.5: [GUESS_LOSS] * 100,
        0.05: GUESS_LOSS - 0.9 * steps,
        0.02: GUESS_LOSS - 0.85 * steps,
        0.001: GUESS_LOSS - 0.2 * steps,
    }
    verdicts = judge(curves)
    assert verdicts[5.0] == "too high: leaps off at step 2"
    assert verdicts[0.5].startswith("too high")
    assert verdicts[0.05] == "the best of these"
    assert verdicts[0.02].startswith("works: 94%")
    assert verdicts[0.001].startswith("too low: it crawls, 22%")


def test_no_rate_is_called_best_where_none_learns():
    verdicts = judge({0.5: [GUESS_LOSS] * 20, 0.1: [float("nan")] * 20})
    assert verdicts[0.5].startswith("no better than a guess")
    leaps_then_learns = judge({0.5: [1.1, 1e6, *[0.1] * 200], 0.1: np.linspace(1.1, 0.5, 202)})
    assert leaps_then_learns[0.5].startswith("too high: leaps off")
    assert leaps_then_learns[0.1] == "the best of these"
    assert verdicts[0.1].startswith("too high")
    assert "best" not in judge({0.1: [float("nan")] * 20})[0.1]


def batches():
    torch.manual_seed(0)
    return lr_analysis.draw_batches(RECIPE, make_dataset(), CPU)


def test_range_test_measures_before_each_step_and_leaves_no_trace():
    torch.manual_seed(0)
    net = lr_analysis.build_network()
    before = {name: weight.clone() for name, weight in net.state_dict().items()}
    # With rates that move nothing, all losses are those of the net as it was given.
    torch.manual_seed(1)
    still = range_test(net, RECIPE, batches(), [1e-12] * 5)
    torch.manual_seed(1)
    losses = range_test(net, RECIPE, batches(), [1e-12, 0.02, 1e-12, 1e-12, 1e-12])
    assert losses[:2] == pytest.approx(still[:2], rel=1e-5)  # the high rate acts after loss 1
    assert abs(losses[2] - still[2]) > 0.05
    for name, weight in net.state_dict().items():
        assert torch.equal(weight, before[name])


class ScriptedNet(nn.Module):
    """Gives the loss that a script says, whatever the pictures are."""

    def __init__(self, losses):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.script = torch.tensor(losses)
        self.step = 0

    def forward(self, pictures):
        # Logits (-z, 0) give the right class 0 a cross-entropy of log(1 + exp(z)).
        z = torch.log(torch.expm1(self.script[self.step]))
        self.step += 1
        right = -z + 0 * self.weight
        return torch.stack([right, 0 * right], dim=-1).expand(len(pictures), 1, 2).squeeze(1)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([1.0] * 30, 30),
        ([1.0, 1.0, float("nan"), 1.0, 1.0], 3),
        ([1.0] * 10 + [60.0] + [1.0] * 10, 11),
    ],
)
def test_range_test_stops_at_nan_and_at_five_times_the_best_loss(losses, expected):
    pictures, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4).long()
    endless = iter(lambda: (pictures, labels), None)
    rates = np.geomspace(1e-6, 1, len(losses))
    found = range_test(ScriptedNet(losses), RECIPE, endless, rates)
    assert len(found) == expected
    assert found == pytest.approx(losses[:expected], rel=1e-3, nan_ok=True)


def test_suggestion_is_where_the_loss_falls_most_steeply():
    rates = np.geomspace(1e-6, 1, 200)
    losses = 1.1 - 0.8 / (1 + np.exp(-8 * (np.log10(rates) + 3)))  # falls around 1e-3
    assert suggest_rate(rates, losses) == pytest.approx(1e-3, rel=0.8)
    losses[150:] = 9 - 2 * np.log(np.arange(1, 51))  # leaps, and falls back more steeply
    assert suggest_rate(rates, losses) == pytest.approx(1e-3, rel=0.8)
    losses[150:] = np.nan
    assert suggest_rate(rates, losses) == pytest.approx(1e-3, rel=0.8)


def test_tested_rates_are_even_in_log_with_both_ends():
    rates = np.geomspace(*lr_analysis.RANGE_TEST_RATES, lr_analysis.RANGE_TEST_STEPS)
    assert (rates[0], rates[-1]) == pytest.approx(lr_analysis.RANGE_TEST_RATES)
    assert np.ptp(np.diff(np.log(rates))) < 1e-9


def test_figure_has_a_line_a_rate_and_a_cross_for_a_diverged_one():
    _, (ax,) = lr_analysis.figures.new_figure()
    curves = {0.5: [1.1, float("nan"), 1.0], 0.1: [1.1, 1.0, 0.9]}
    lr_analysis.draw_losses(ax, curves)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0.5", "0.1"]
    crosses = [line for line in ax.lines if line.get_marker() == "X"]
    assert [line.get_xdata() for line in crosses] == [[2]]


def test_script_writes_a_verdict_for_each_rate(run_script, course_folder, tmp_path):
    options = ("--data", course_folder, "--out", "out", "--quick")
    status, printed, _ = run_script(lr_analysis, *options, "--rates", "1e30", "0.001")
    assert status == 0
    assert "too high" in printed
    numbers = json.loads((tmp_path / "out/lr_analysis.json").read_text())
    assert list(numbers["rates"]) == ["1e+30", "0.001"]
    assert None in numbers["rates"]["1e+30"]["smoothed_losses"]
    assert numbers["range_test"]["suggestion"] > 0
    for rate in ("0", "-1", "nan", "inf", "fast"):
        status, _, error = run_script(lr_analysis, *options, "--rates", rate)
        assert status == 2
        assert f"'{rate}' is not a number above 0" in error
