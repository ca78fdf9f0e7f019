import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cleanlab.rank import get_label_quality_scores
from conftest import make_dataset

import label_errors
from common import trainer
from common.console import UserError
from common.label_fixes import LabelFix, format_fixes, read_fixes, with_fixes
from common.label_noise import LEFT_OUT, fit_sharpness, leave_out_doubted, true_label_chances
from label_errors import find_fixes, rate

CPU = torch.device("cpu")


def noisy_set(counts=(4000, 400, 200), wrong=(0.01, 0.05, 0.25), seed=0):
    """Return given and true labels, and logits of a judge who mistakes one picture in fourteen."""
    generator = np.random.default_rng(seed)
    given = np.repeat(np.arange(3), counts)
    flipped = generator.random(len(given)) < np.array(wrong)[given]
    true = np.where(flipped, (given + generator.integers(1, 3, len(given))) % 3, given)
    # 1.5 times these are the log-likelihoods: 3 / 1.41 ** 2 = 1.5
    logits = 3 * np.eye(3)[true] + generator.normal(0, 1.41, (len(given), 3))
    return torch.from_numpy(given), torch.from_numpy(true), torch.from_numpy(logits)


def test_chances_are_bayes_rule_with_the_table_that_they_sum_up_to():
    given, _, logits = noisy_set()
    chances = true_label_chances(logits, given)
    assert torch.allclose(chances.sum(dim=1), torch.ones(len(given), dtype=torch.float64))
    table = torch.stack([chances[given == label].sum(dim=0) for label in range(3)])
    expected = (1.5 * logits).softmax(dim=1) * table[given]
    expected /= expected.sum(dim=1, keepdim=True)
    assert torch.allclose(chances, expected, atol=1e-3)  # a fixed point


def test_sharpness_is_recovered():
    given, _, logits = noisy_set()
    for modesty in (0.6, 1.0):  # logits divided by it must be multiplied by it again
        assert fit_sharpness(logits / modesty, given) == pytest.approx(1.5 * modesty, rel=0.2)


def test_wrong_labels_are_found_better_than_by_the_judges_own_probabilities():
    given, true, logits = noisy_set()
    wrong = given != true
    chances = true_label_chances(logits, given)
    doubted = chances.argmax(dim=1) != given
    naive = logits.argmax(dim=1) != given
    precision, naive_precision = (wrong[flags].double().mean() for flags in (doubted, naive))
    assert precision > 0.8 > 2 * naive_precision
    assert doubted[wrong].double().mean() > 0.6


def test_doubted_labels_are_left_out_but_a_class_wholly_doubted_is_kept():
    given, _, logits = noisy_set()
    learnt = leave_out_doubted(logits, given)
    doubted = true_label_chances(logits, given).argmax(dim=1) != given
    assert torch.equal(learnt == LEFT_OUT, doubted)
    assert torch.equal(learnt[~doubted], given[~doubted])
    logits[given == 2] = torch.tensor([8.0, 0.0, 0.0], dtype=torch.float64)
    assert (leave_out_doubted(logits, given)[given == 2] == 2).all()


def test_fixes_are_ranked_and_the_most_doubtful_accepted():
    given, _, logits = noisy_set()
    dataset = replace(make_dataset(), labels=given, pictures=torch.zeros(len(given), 3, 1, 1))
    fixes = find_fixes(dataset, logits)
    chances = true_label_chances(logits, given, fit_sharpness(logits, given)).numpy()
    quality = get_label_quality_scores(given.numpy(), chances, method="self_confidence")
    ranks = [quality[fix.index] for fix in fixes]
    assert ranks == sorted(ranks)
    assert {fix.index for fix in fixes} == set(np.flatnonzero(quality < 0.8))
    assert {True, False} == {fix.accept for fix in fixes}
    for fix in fixes:
        assert fix.given == given[fix.index] != fix.suggested
        assert fix.confidence == chances[fix.index, fix.suggested]
        assert fix.accept == (quality[fix.index] < 0.6)


def test_no_class_is_accepted_as_wholly_wrong():
    given, _, logits = noisy_set()
    logits[given == 2] = torch.tensor([8.0, 0.0, 0.0], dtype=torch.float64)
    dataset = replace(make_dataset(), labels=given, pictures=torch.zeros(len(given), 3, 1, 1))
    fixes = find_fixes(dataset, logits)
    of_cats = [fix for fix in fixes if fix.given == 2]
    assert len(of_cats) == (given == 2).sum()
    assert not any(fix.accept for fix in of_cats)


def test_rates_of_a_hand_worked_example():
    labels, true = torch.tensor([0, 0, 0, 0, 2, 2]), torch.tensor([0, 1, 2, 0, 2, 0])
    dataset = replace(make_dataset(), labels=labels, true_labels=true)
    fixes = [LabelFix(1, 0, 1, 0.9), LabelFix(3, 0, 1, 0.8), LabelFix(5, 2, 1, 0.7)]
    rated = rate(dataset, fixes)
    assert rated["car"] == {
        "wrong": 2, "accepted": 2, "recall": 0.5, "precision": 0.5, "suggestion_right": 1.0
    }  # fmt: skip
    assert rated["all"]["recall"] == pytest.approx(2 / 3)
    assert rated["all"]["suggestion_right"] == 0.5
    assert np.isnan(rated["truck"]["recall"])


def test_each_picture_is_judged_by_a_net_that_has_not_learnt_from_it(train, monkeypatch):
    seen = []

    def spy(recipe, learnt, judged, seed, device):
        known = {picture.numpy().tobytes() for picture in learnt.pictures}
        assert not any(picture.numpy().tobytes() in known for picture in judged)
        seen.append(len(judged))
        return judged[:, :, 0, 0].float()  # tells which picture it was

    monkeypatch.setattr(trainer, "judge", spy)
    monkeypatch.setattr(trainer.machine, "side_by_side", _one_by_one)
    logits = trainer.judge_by_folds(label_errors.RECIPE, train, 0, CPU)
    assert torch.equal(logits, train.pictures[:, :, 0, 0].float())
    assert sum(seen) == len(train)


def test_both_kinds_of_nets_decide_and_the_better_learn_nothing_that_the_small_doubt(
    train, monkeypatch
):
    first, second = torch.zeros(len(train), 3), torch.zeros(len(train), 3)
    first[torch.arange(len(train)), train.labels] = 9.0
    first[0] = first[0].roll(1)
    trusted_by = []

    def spy(recipe, dataset, seed, device, trusted=None):
        trusted_by.append(trusted)
        return first if recipe == label_errors.RECIPE.judge else second

    monkeypatch.setattr(label_errors, "judge_by_folds", spy)
    logits = label_errors.judge_all(label_errors.RECIPE, train, train, 0, CPU)
    assert torch.equal(logits, first / 2)
    small, better = trusted_by
    assert small is None
    assert better.tolist() == [False] + [True] * (len(train) - 1)


def _one_by_one(function, jobs, device, name):
    return (function(*job) for job in jobs)


FIXES = [LabelFix(3, 0, 2, 0.9876), LabelFix(1, 0, 1, 0.5, accept=False)]


@pytest.fixture
def few():
    return replace(make_dataset(), labels=torch.tensor([0, 0, 1, 0, 2]))


def test_fixes_survive_the_file_and_only_accepted_ones_count(few, tmp_path):
    path = tmp_path / "fixes.csv"
    path.write_text(format_fixes(few, FIXES))
    again = read_fixes(path, few)
    assert again == [replace(FIXES[0], confidence=0.988), FIXES[1]]
    fixed = with_fixes(few, again)
    assert fixed.labels.tolist() == [0, 0, 1, 2, 2]
    assert few.labels.tolist() == [0, 0, 1, 0, 2]
    assert fixed.fingerprint != few.fingerprint


def test_a_file_that_a_spreadsheet_saved_is_read(few, tmp_path):
    path = tmp_path / "fixes.csv"
    text = format_fixes(few, FIXES).replace("\n", "\r\n").replace("yes", "YES")
    path.write_bytes(("\ufeff" + text.replace("\r\n", ",,\r\n", 1)).encode())
    assert [fix.accept for fix in read_fixes(path, few)] == [True, False]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# labels", "labels?", "does not begin with the line that names its data"),
        ("3,car,cat", "3,car,dog", "line 3: '3,car,dog,0.988,yes' is no label fix"),
        ("3,car,cat", "99,car,cat", "line 3: '99,car,cat"),
        ("3,car,cat", "-1,cat,car", "picture -1 is not labelled cat"),
        ("3,car,cat", "2,car,cat", "line 3: picture 2 is not labelled car in this data"),
        ("yes", "maybe", "is no label fix"),
        ("confidence", "sureness", "line 2: the columns must be index,given,"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(few, tmp_path, old, new, message):
    path = tmp_path / "fixes.csv"
    text = format_fixes(few, FIXES)
    assert old in text
    new_text = (
        text.replace("# labels of", "about") if old == "# labels" else text.replace(old, new, 1)
    )
    path.write_text(new_text)
    with pytest.raises(UserError) as raised:
        read_fixes(path, few)
    assert message in str(raised.value)


def test_a_missing_or_binary_file_is_refused(few, tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_fixes(tmp_path / "none.csv", few)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="not a text file"):
        read_fixes(tmp_path / "binary.csv", few)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="does not begin"):
        read_fixes(tmp_path / "empty.csv", few)


@pytest.mark.parametrize("part", ["train", "dev"])
def test_script_writes_table_sheets_and_numbers(run_script, course_folder, tmp_path, part):
    options = ("--data", course_folder, "--out", "out", "--quick", "--part", part)
    status, printed, _ = run_script(label_errors, *options)
    assert status == 0
    suffix = "" if part == "train" else "-dev"
    dataset = make_dataset(part)
    path = tmp_path / f"out/label_fixes{suffix}.csv"
    fixes = read_fixes(path, dataset)
    numbers = json.loads((tmp_path / f"out/label_errors{suffix}.json").read_text())
    assert [fix["index"] for fix in numbers["fixes"]] == [fix.index for fix in fixes]
    assert len(list(csv.reader(path.open()))) == len(fixes) + 2
    assert "The true labels are known" not in printed
    for name in ("car", "truck", "cat"):
        assert (tmp_path / f"out/label-errors-{name}{suffix}.png").exists()
