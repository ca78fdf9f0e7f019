import json
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COURSE_DATA, needs_course_data

import training
from common import console
from common.dataset import Dataset, open_source
from common.label_fixes import LabelFix, format_fixes
from common.network import load_checkpoint, load_training, predict_logits, with_pixel_range
from common.results import Results
from common.trainer import Recipe, Trainer
from training import FINAL, NAIVE, PRE_TRAINED, RECIPES, REPORT_RECIPES

CPU = torch.device("cpu")
QUICK = replace(NAIVE, name="quick", epochs=3, batch_size=16)


def run_once(recipe: Recipe, seed: int, train: Dataset, dev: Dataset) -> training.Run:
    return training.train_and_evaluate(Trainer(recipe, train, seed, CPU), dev)


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(training.joblib, "cpu_count", lambda: 1)  # as in runs outside train_all
    arguments = Namespace(quick=False, out=tmp_path / "out")
    return Results(arguments, {"source": "tiny", "parts": {}})


def test_recipes_are_frozen_and_each_is_an_earlier_one_with_little_changed():
    with pytest.raises(FrozenInstanceError):
        NAIVE.epochs = 1
    assert {recipe.name for recipe in RECIPES.values()} == set(RECIPES)
    recipes = [asdict(recipe) for recipe in (*REPORT_RECIPES.values(), PRE_TRAINED)]
    for number, recipe in enumerate(recipes[1:], start=1):
        changes = [
            {key for key in recipe if recipe[key] != earlier[key]} for earlier in recipes[:number]
        ]
        assert min(len(change - {"name"}) for change in changes) <= 3
        assert all(change for change in changes)


def test_a_run_is_the_same_alone_and_among_others(train, dev, results):
    recipes = [QUICK, replace(QUICK, name="strict", sampler="strict")]
    together = list(training.train_all(recipes, [0, 1], results, train, dev, CPU))
    for run in together:
        alone = run_once(run.recipe, run.seed, train, dev)
        assert alone.scores == run.scores
        for now, then in zip(alone.history, run.history, strict=True):
            assert now | {"seconds": 0} == then | {"seconds": 0}
    assert [(run.recipe.name, run.seed) for run in together] == [
        ("quick", 0),
        ("quick", 1),
        ("strict", 0),
        ("strict", 1),
    ]
    names = {path.name for path in results.folder.iterdir()}
    assert names == {"quick.ckpt", "quick-seed1.ckpt", "strict.ckpt", "strict-seed1.ckpt"}


def test_a_stopped_run_leaves_its_last_epoch_and_ends_the_same_when_resumed(
    train, dev, results, monkeypatch
):
    whole = run_once(QUICK, 0, train, dev)
    original, epochs = Trainer.run_epoch, []

    def stop_in_the_third_epoch(trainer):
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return original(trainer)

    monkeypatch.setattr(Trainer, "run_epoch", stop_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        list(training.train_all([QUICK], [0], results, train, dev, CPU))
    unfinished = results.folder / "quick.unfinished.ckpt"
    assert load_training(unfinished)[2]["epoch"] == 2
    with pytest.raises(console.UserError, match="of another run, with another recipe"):
        list(
            training.train_all(
                [replace(QUICK, epochs=9)], [0], results, train, dev, CPU, resume=True
            )
        )
    (resumed,) = training.train_all([QUICK], [0], results, train, dev, CPU, resume=True)
    assert len(epochs) == 4  # only the one that was missing
    assert resumed.scores == whole.scores
    assert resumed.curves["loss"] == whole.curves["loss"]
    assert not unfinished.exists()
    weights = load_checkpoint(results.folder / "quick.ckpt")[0].state_dict()
    for name, weight in whole.net.state_dict().items():
        assert torch.equal(weights[name], weight)
    (again,) = training.train_all([QUICK], [0], results, train, dev, CPU, resume=True)
    assert len(epochs) == 4  # none at all: it was finished
    assert again.scores == whole.scores


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_with_the_numbers_of_whole_ones(course_folder, tmp_path):
    command = [sys.executable, console.PROJECT / "training.py", "--data", course_folder]
    command += ["--recipe", "weighted-sampler", "--epochs", "150", "--seed", "0,1"]
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    stopped, moments = tmp_path / "stopped", np.random.default_rng(0)
    for _ in range(10):
        process = subprocess.Popen([*command, "--out", stopped, "--resume"])
        time.sleep(moments.uniform(2, 6))
        process.kill()
        process.wait()
        for path in stopped.glob("[!.]*.ckpt"):
            load_checkpoint(path)
    subprocess.run([*command, "--out", stopped, "--resume"], check=True, capture_output=True)
    for name in ("weighted-sampler", "weighted-sampler-seed1"):
        nets = [load_checkpoint(tmp_path / out / f"{name}.ckpt")[0] for out in ("whole", "stopped")]
        weights = [net.state_dict() for net in nets]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_label_fixes_are_trained_on_and_those_of_other_data_refused(
    run_script, course_folder, tmp_path, train
):
    index = int(torch.nonzero(train.labels == 2)[0])
    path = tmp_path / "fixes.csv"
    path.write_text(format_fixes(train, [LabelFix(index, 2, 0, 0.9)]))
    options = ("--data", course_folder, "--out", "out", "--epochs", 1, "--label-fixes", path)
    assert run_script(training, *options)[0] == 0
    about = load_checkpoint(tmp_path / "out/final.ckpt")[1]
    assert about["trained_on"]["class_counts"] == {"car": 41, "truck": 12, "cat": 7}
    path.write_text(path.read_text().replace(train.fingerprint, "0123456789ab"))
    status, _, error = run_script(training, *options)
    assert status == 2
    assert "fingerprint 0123456789ab; the data here is course, train" in error


def test_label_fixes_that_leave_a_class_empty_are_refused(tmp_path, train):
    cats = torch.nonzero(train.labels == 2).flatten().tolist()
    path = tmp_path / "fixes.csv"
    path.write_text(format_fixes(train, [LabelFix(index, 2, 0, 0.9) for index in cats]))
    with pytest.raises(console.UserError, match="leaves no cat to learn from"):
        training.mend_labels(train, path)


def test_a_net_of_other_labels_is_neither_taken_nor_overwritten(
    run_script, course_folder, tmp_path, train
):
    index = int(torch.nonzero(train.labels == 2)[0])
    fixes = tmp_path / "fixes.csv"
    fixes.write_text(format_fixes(train, [LabelFix(index, 2, 0, 0.9)]))
    options = ("--data", course_folder, "--out", "out")
    assert run_script(training, *options, "--epochs", 1, "--label-fixes", fixes)[0] == 0
    before = (tmp_path / "out/final.ckpt").read_bytes()
    status, _, error = run_script(training, *options, "--show-mismatch")
    assert status == 2
    assert "is a net of other pictures or labels" in error
    assert (tmp_path / "out/final.ckpt").read_bytes() == before


def test_summary_has_means_and_spread_over_seeds(train, dev):
    runs = [run_once(QUICK, seed, train, dev) for seed in (0, 1, 2)]
    summary = training.summarise(runs)
    scores = [run.scores["accuracy"] for run in runs]
    assert summary["accuracy"] == pytest.approx(np.mean(scores))
    assert summary["spread"]["accuracy"] == pytest.approx(np.std(scores, ddof=1))
    assert summary["recall"]["cat"] == pytest.approx(
        np.mean([run.scores["recall"]["cat"] for run in runs])
    )
    assert len(summary["runs"][0]["curves"]["recall"]) == QUICK.epochs


def test_script_trains_and_its_checkpoint_gives_the_json_files_numbers(
    run_script, course_folder, tmp_path, dev
):
    options = ("--data", course_folder, "--out", "out", "--epochs", 2)
    status, printed, _ = run_script(training, *options, "--recipe", "naive")
    assert status == 0
    assert "report" in printed
    numbers = json.loads((tmp_path / "out/training.json").read_text())["recipes"]["naive"]
    net, about = load_checkpoint(tmp_path / "out/naive.ckpt")
    assert training.evaluate(net, dev)["accuracy"] == numbers["accuracy"]
    assert numbers["recipe"]["epochs"] == about["recipe"]["epochs"] == 2
    assert numbers["report"]["accuracy"] == 0.904
    assert about["trained_on"]["source"] == "course"
    assert (tmp_path / "out/training-naive.png").exists()


@pytest.mark.slow
def test_script_trains_all_recipes_with_several_seeds(run_script, course_folder, tmp_path):
    options = ("--data", course_folder, "--out", "out", "--quick", "--seed", "0,1")
    assert run_script(training, *options, "--recipe", "all")[0] == 0
    numbers = json.loads((tmp_path / "out/training.json").read_text())["recipes"]
    assert list(numbers) == [*REPORT_RECIPES, "tuned"]
    assert (tmp_path / "out/training-recipes.png").exists()
    assert (tmp_path / "out/final-seed1.ckpt").exists()


def test_mismatch_shows_two_ranges_of_one_net(run_script, course_folder, tmp_path, dev):
    options = ("--data", course_folder, "--out", "out", "--quick")
    status, printed, _ = run_script(training, *options, "--show-mismatch")
    assert status == 0
    assert "training recipe final" in printed
    numbers = json.loads((tmp_path / "out/mismatch.json").read_text())
    net, about = load_checkpoint(tmp_path / "out/final.ckpt")
    other = with_pixel_range(net, (0.0, 1.0))
    for which, fed in (("right_range", net), ("wrong_range", other)):
        logits = predict_logits(fed, dev.pictures)
        scores = training.evaluate(fed, dev)
        assert numbers[which]["confusion"] == scores["confusion"], logits
    assert not torch.equal(predict_logits(net, dev.pictures), predict_logits(other, dev.pictures))
    assert numbers["checkpoint"] == json.loads(json.dumps({"file": "final.ckpt", **about}))
    assert "training recipe final" not in run_script(training, *options, "--show-mismatch")[1]


def test_options_that_do_not_go_together_end_with_one_line(run_script, course_folder):
    options = ("--data", course_folder, "--quick", "--out", "out")
    status, _, error = run_script(training, *options, "--checkpoint", "some.ckpt")
    assert status == 2
    assert "--checkpoint and --pixel-range go with --show-mismatch" in error
    status, _, error = run_script(training, *options, "--show-mismatch", "--recipe", "naive")
    assert status == 2
    assert "--show-mismatch trains nothing" in error
    status, _, error = run_script(training, *options, "--show-mismatch", "--pixel-range", "0,1")
    assert status == 2
    assert "name one by --checkpoint" in error


def test_a_net_that_a_user_trained_is_used_and_not_overwritten(run_script, course_folder):
    options = ("--data", course_folder, "--out", "out")
    assert run_script(training, *options, "--epochs", 1)[0] == 0
    assert "training recipe" not in run_script(training, *options, "--show-mismatch")[1]
    assert load_checkpoint(Path("out/final.ckpt"))[1]["recipe"]["epochs"] == 1


def test_comparison_figure_shows_ours_and_the_reports(train, dev):
    run = run_once(replace(NAIVE, epochs=1), 0, train, dev)
    figure = training.draw_comparison({"naive": training.summarise([run])})
    points = {line.get_marker(): line.get_xdata() for line in figure.axes[0].lines[:3]}
    assert points["D"].item() == 0.904
    assert points["o"].item() == run.scores["accuracy"]


@pytest.mark.slow
def test_the_reports_lesson_shows_on_sketches(results):
    train, dev = (open_source("sketches").load(part) for part in ("train", "dev"))
    runs = training.train_all([NAIVE, FINAL], [0], results, train, dev, CPU)
    naive, final = (run.scores for run in runs)
    assert naive["accuracy"] > 0.9
    assert min(naive["recall"], key=naive["recall"].get) == "cat"
    assert naive["g_mean"] < naive["accuracy"] - 0.1
    assert naive["g_mean"] + 0.1 < final["g_mean"] < 0.99


@needs_course_data
@pytest.mark.slow
def test_final_recognises_all_classes_of_the_courses_pictures_and_naive_does_not(results):
    train, dev = (open_source(str(COURSE_DATA)).load(part) for part in ("train", "dev"))
    runs = list(training.train_all([NAIVE, FINAL], [0, 1, 2], results, train, dev, CPU))
    g_mean = {
        name: training.summarise(part)["g_mean"]
        for name, part in (("naive", runs[:3]), ("final", runs[3:]))
    }
    assert g_mean["final"] > 0.65
    assert g_mean["naive"] < g_mean["final"] - 0.05
