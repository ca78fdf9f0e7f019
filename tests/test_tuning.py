import json
from dataclasses import replace

import numpy as np
import pytest

import training
import tuning
from common.console import UserError
from common.network import load_checkpoint
from training import TUNED, read_settings


def settings_of(study):
    return [trial.params for trial in tuning.finished(study)]


def best_near_a_third(recipe):
    return 1 - abs(recipe.balance - 1 / 3) - abs(np.log(recipe.learning_rate / 2e-3)) / 10


def test_search_sets_out_from_the_recipe_and_gets_close_to_what_is_best():
    study = tuning.search(TUNED, 60, best_near_a_third, seed=0)
    first, *others = settings_of(study)
    assert first == {name: getattr(TUNED, name) for name in tuning.SPACE}
    assert all(settings != first for settings in others)
    assert study.best_value > best_near_a_third(TUNED)
    assert abs(study.best_params["balance"] - 1 / 3) < 0.05
    assert 1.2e-3 < study.best_params["learning_rate"] < 3.3e-3


def test_search_follows_its_seed():
    runs = [settings_of(tuning.search(TUNED, 5, best_near_a_third, seed)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_search_reports_after_each_trial():
    seen = []

    def count(study):
        seen.append(len(tuning.numbers_of(study, TUNED)["trials"]))

    tuning.search(TUNED, 3, best_near_a_third, 0, count)
    assert seen == [1, 2, 3]


def test_check_judges_by_other_folds_than_the_search(train, monkeypatch):
    seeds = []
    monkeypatch.setattr(
        tuning, "g_mean_by_folds", lambda recipe, train, seed, device: seeds.append(seed) or 0.5
    )
    checked = tuning.check({"first": TUNED, "best": TUNED}, train, 7, "cpu")
    assert seeds == [8, 9, 10, 8, 9, 10]
    assert checked["best"] == {"g_mean": 0.5, "spread": 0.0, "runs": [0.5] * 3}


def test_gain_is_the_mean_of_the_differences(capsys):
    first, best = tuning.mean_and_spread([0.7, 0.8, 0.6]), tuning.mean_and_spread([0.8, 0.8, 0.8])
    assert (first["g_mean"], first["spread"]) == (pytest.approx(0.7), pytest.approx(0.1))
    tuning.print_check({"first": first, "best": best})
    assert "The search gains +0.100 ±0.100." in capsys.readouterr().out


def test_found_settings_are_searched_drawn_and_trained(run_script, course_folder, tmp_path):
    options = ("--data", course_folder, "--out", tmp_path, "--quick")
    status, printed, _ = run_script(tuning, *options, "--trials", 4)
    assert status == 0
    assert "Judged once more" in printed
    numbers = json.loads((tmp_path / "tuning.json").read_text())
    assert len(numbers["trials"]) == 4
    scores = [trial["g_mean"] for trial in numbers["trials"]]
    assert numbers["best"]["g_mean"] == max(scores)
    assert (tmp_path / "tuning.png").exists()
    status, printed, _ = run_script(training, *options, "--settings", tmp_path / "tuning.json")
    assert status == 0
    recipe = load_checkpoint(tmp_path / "found.ckpt")[1]["recipe"]
    assert (recipe["name"], recipe["epochs"]) == ("found", 2)
    assert {name: recipe[name] for name in tuning.SPACE} == numbers["best"]["settings"]
    assert recipe["average_shifts"] == TUNED.average_shifts


def test_figure_marks_first_and_best():
    study = tuning.search(TUNED, 6, best_near_a_third, seed=0)
    numbers = tuning.numbers_of(study, TUNED)
    history, *settings = tuning.draw_search(numbers).axes
    assert list(history.lines[0].get_ydata()) == [trial["g_mean"] for trial in numbers["trials"]]
    assert list(np.diff(history.lines[1].get_ydata()) >= 0) == [True] * 5
    for ax, name in zip(settings, tuning.SPACE, strict=True):
        every, first, best = ax.lines
        assert len(every.get_xdata()) == 6
        assert list(first.get_xdata()) == [getattr(TUNED, name)]
        assert list(best.get_xdata()) == [numbers["best"]["settings"][name]]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("not JSON", "holds no settings that tuning.py has found"),
        ('{"best": 3}', "holds no settings that tuning.py has found"),
        ('{"best": {"settings": [1]}}', "holds no settings that tuning.py has found"),
        ('{"best": {"settings": {"colour": 1}}}', "holds no settings that tuning.py has found"),
        ('{"best": {"settings": {"cutout": "8"}}}', "cutout is '8', which it can't be"),
        ('{"best": {"settings": {"network": "BestNet"}}}', "network is 'BestNet', which it can't"),
    ],
)
def test_strange_settings_are_refused(tmp_path, content, words):
    path = tmp_path / "tuning.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_settings(path, TUNED)


def test_settings_are_read_as_they_are(tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text('{"best": {"settings": {"cutout": 4, "balance": 0.25}}}')
    expected = replace(TUNED, name="found", cutout=4, balance=0.25)
    assert read_settings(path, TUNED) == expected


def test_settings_and_recipe_do_not_go_together(run_script, course_folder):
    options = ("--data", course_folder, "--recipe", "tuned", "--settings", "tuning.json")
    status, _, error = run_script(training, *options)
    assert status == 2
    assert "--settings is a recipe of its own; leave --recipe out" in error
