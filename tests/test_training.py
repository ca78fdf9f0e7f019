import csv
import json
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import training
from common import metrics
from common.cli import PROJECT, UserError
from common.data import Correction, format_corrections
from common.model import build_model, load_checkpoint, predict_logits, save_checkpoint
from common.recipes import NAIVE, RECIPES, REPORT_RECIPES, TUNED
from common.train import IGNORE_INDEX, train

import numpy as np
import pytest
import torch
from conftest import COURSE_DATA, make_dataset, needs_course_data, write_course_pickle
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    recall_score,
)

CPU = torch.device("cpu")
CLASSES = ["car", "truck", "cat"]


@pytest.fixture
def small_batches(monkeypatch):
    """Let two recipes learn something from 60 images in a few epochs."""
    for name in ("naive", "strict-sampler"):
        monkeypatch.setitem(RECIPES, name, replace(RECIPES[name], batch_size=16))


@pytest.fixture
def no_figures(monkeypatch):
    """Save the second that a figure takes."""
    monkeypatch.setattr(training.Results, "save_figure", lambda self, name, figure: None)


@pytest.fixture
def run_training(run_script, course_folder):
    """Return a function that runs training.py on the course's files, into the folder `out`."""

    def run(*options):
        return run_script(training, "--data", course_folder, "--out", "out", *options)

    return run


def numbers_of(step="training", folder="out"):
    return json.loads(Path(folder, f"{step}.json").read_text())


def read_predictions(name):
    with Path("out", f"predictions-{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scores_of(labels, predicted):
    """Return what scikit-learn says."""
    recall = recall_score(labels, predicted, average=None, zero_division=0)
    return {
        "accuracy": accuracy_score(labels, predicted),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "g_mean": np.prod(recall) ** (1 / 3),
        "recall": pytest.approx(dict(zip(CLASSES, recall, strict=True))),
        "confusion": confusion_matrix(labels, predicted).tolist(),
    }


def assert_scores(found, labels, predicted):
    for name, value in scores_of(labels, predicted).items():
        expected = pytest.approx(value) if isinstance(value, float) else value
        assert found[name] == expected, name


# ---- one recipe and several -----------------------------------------------------------------


def test_a_run_leaves_a_model_a_figure_predictions_and_their_scores(
    run_training, dev, small_batches
):
    status, printed, error = run_training("--recipe", "naive", "--epochs", 6, "--seed", 3)
    assert (status, error) == (0, "")
    assert {path.name for path in Path("out").iterdir()} == {
        "naive.ckpt",
        "predictions-naive.csv",
        "training-naive.png",
        "training-naive.svg",
        "training.json",
    }
    assert "predictions-naive.csv, training.json" in printed
    found = numbers_of()["recipes"]
    assert list(found) == ["naive"]
    found = found["naive"]
    (run,) = found["runs"]
    assert set(found) >= {"accuracy", "balanced_accuracy", "g_mean", "recall", "interval"}
    assert set(found["spread"]) == {*metrics.SCORE_TITLES, "recall", "precision"}
    assert set(found["spread"]["recall"].values()) == {found["spread"]["g_mean"]} == {0.0}
    assert found["report"] == {"accuracy": 0.904, "balanced_accuracy": 0.55, "g_mean": 0.47}
    assert found["comparison"] is None
    assert (run["seed"], run["accuracy"]) == (3, found["accuracy"])
    curves = run["curves"]
    assert {len(curve) for curve in curves.values()} == {6}
    assert curves["loss"][-1] < 0.9 * curves["loss"][0]
    assert [curves[score][-1] for score in metrics.SCORE_TITLES] == [
        run[score] for score in metrics.SCORE_TITLES
    ]
    assert curves["recall"][-1] == list(run["recall"].values())

    rows = read_predictions("naive")
    assert [int(row["index"]) for row in rows] == list(range(len(dev)))
    labels, predicted = ([row[column] for row in rows] for column in ("label", "predicted"))
    assert labels == [CLASSES[label] for label in dev.labels]
    predicted = [CLASSES.index(name) for name in predicted]
    assert len(set(predicted)) > 1
    assert_scores(run, dev.labels, predicted)
    expected = metrics.evaluate(dev.labels, predicted)
    assert found["interval"] == expected["interval"]

    checkpoint = load_checkpoint(Path("out/naive.ckpt"))
    metadata = checkpoint.metadata
    probabilities = predict_logits(checkpoint.model, dev.images).softmax(dim=1)
    for row, expected in zip(rows, probabilities.tolist(), strict=True):
        assert [float(row[name]) for name in CLASSES] == pytest.approx(expected, abs=2e-6)
    assert metadata["recipe"] == found["recipe"] == asdict(replace(RECIPES["naive"], epochs=6))
    assert (metadata["seed"], metadata["device"]) == (3, "cpu")
    assert metadata["trained_on"]["name"] == "course"
    assert metadata["trained_on"]["class_counts"] == {"car": 40, "truck": 12, "cat": 8}


def test_seeds_give_means_and_spread_and_recipes_are_compared_on_the_same_images(
    run_training, dev, small_batches
):
    options = ("--recipe", "strict-sampler,naive,naive", "--epochs", 6, "--seed", "0,1")
    status, printed, _ = run_training(*options)
    assert status == 0
    names = {path.stem for path in Path("out").iterdir()}
    assert names >= {"naive", "naive-seed1", "predictions-naive-seed1", "training-recipes"}
    found = numbers_of()["recipes"]
    assert list(found) == ["strict-sampler", "naive"]
    for summary in found.values():
        runs = summary["runs"]
        assert [run["seed"] for run in runs] == [0, 1]
        for score in metrics.SCORE_TITLES:
            scores = [run[score] for run in runs]
            assert summary[score] == pytest.approx(np.mean(scores))
            assert summary["spread"][score] == pytest.approx(np.std(scores, ddof=1))
        recalls = [run["recall"]["truck"] for run in runs]
        assert summary["recall"]["truck"] == pytest.approx(np.mean(recalls))
        assert summary["interval"] == runs[0]["interval"]
    predicted, baseline = (
        [
            [CLASSES.index(row["predicted"]) for row in read_predictions(name + suffix)]
            for suffix in ("", "-seed1")
        ]
        for name in ("strict-sampler", "naive")
    )
    comparison = found["strict-sampler"]["comparison"]
    assert comparison["with"] == "naive"
    for score in metrics.SCORE_TITLES:
        expected = metrics.compare(dev.labels, predicted, baseline, score)
        assert {key: comparison[score][key] for key in expected} == expected
        difference = found["strict-sampler"][score] - found["naive"][score]
        assert comparison[score]["difference"] == pytest.approx(difference)
    assert f"strict-sampler against naive, G-mean: {comparison['g_mean']['text']}" in printed
    assert "±" in printed


def test_a_run_is_the_same_alone_and_among_others(run_training, small_batches, no_figures):
    numbers = []
    for seeds in ("0,1", "1"):
        options = ("--recipe", "naive", "--epochs", 2, "--seed", seeds)
        assert run_training(*options)[0] == 0
        numbers.append(numbers_of()["recipes"]["naive"]["runs"][-1] | {"seconds": 0})
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ("magic", "--recipe magic: not one of naive, weight-decay, "),
        ("naive,", "--recipe : not one of"),
        ("all,magic", "--recipe magic: not one of"),
    ],
)
def test_an_unknown_recipe_is_answered_with_the_known_ones(run_training, recipes, message):
    status, _, error = run_training("--recipe", recipes)
    assert status == 2
    assert error.startswith(f"error: {message}")
    assert not Path("out").exists()


def test_recipes_that_no_option_names():
    def chosen(*options):
        defaults = {"settings": None, "recipe": None, "epochs": None, "quick": False}
        return training.choose_recipes(Namespace(**defaults | dict(options)))

    assert chosen() == [RECIPES["final"]]
    assert chosen(("recipe", "all")) == [*REPORT_RECIPES.values(), TUNED]
    assert chosen(("recipe", "all,best,naive")) == [
        *REPORT_RECIPES.values(),
        TUNED,
        RECIPES["best"],
    ]
    assert chosen(("recipe", "best"), ("epochs", 3)) == [replace(RECIPES["best"], epochs=3)]
    (quick,) = chosen(("recipe", "best"), ("quick", True))
    assert (quick.epochs, quick.label_filter.epochs) == (2, 2)


def test_each_baseline_is_a_recipe_that_differs_little():
    for name, baseline in training.BASELINES.items():
        ours, theirs = asdict(RECIPES[name]), asdict(RECIPES[baseline])
        assert any(ours[key] != theirs[key] for key in ours if key != "name")
    report = [asdict(recipe) for recipe in REPORT_RECIPES.values()]
    for number, recipe in enumerate(report[1:], start=1):
        changes = [sum(recipe[key] != other[key] for key in recipe) for other in report[:number]]
        assert 2 <= min(changes) <= 4  # the name, and one to three settings


@pytest.mark.slow
def test_all_recipes_run(run_training):
    assert run_training("--recipe", "all", "--quick", "--seed", "0,1")[0] == 0
    assert list(numbers_of()["recipes"]) == [*REPORT_RECIPES, "tuned"]
    assert Path("out/final-seed1.ckpt").exists()
    assert run_training("--recipe", "best,robust,pre_trained", "--quick")[0] == 0
    assert numbers_of()["recipes"]["robust"]["recipe"]["epochs"] == 2


def summary_of(runs, dev):
    return training.summarize(runs, dev, [])


def fake_run(recipe, seed, dev, wrong):
    """Return a run that has the first `wrong` images of dev wrong."""
    generator = np.random.default_rng(seed)
    predicted = dev.labels.clone()
    predicted[:wrong] = (predicted[:wrong] + 1) % 3
    logits = torch.nn.functional.one_hot(predicted, 3).float()
    names = ("loss", "seconds", *metrics.SCORE_TITLES)
    history = [
        {**{name: generator.random() for name in names}, "recall": generator.random(3).tolist()}
        for _ in range(recipe.epochs)
    ]
    return training.Trained(recipe, seed, Path(), logits, history)


def test_a_summary_has_the_mean_and_the_standard_deviation_over_seeds(dev):
    runs = [fake_run(NAIVE, seed, dev, wrong) for seed, wrong in ((0, 5), (1, 10))]
    summary = summary_of(runs, dev)
    assert summary["accuracy"] == pytest.approx(52.5 / 60)
    assert summary["spread"]["accuracy"] == pytest.approx(5 / 60 / 2**0.5)
    recalls = [run["recall"]["car"] for run in summary["runs"]]
    assert recalls[0] > recalls[1]
    assert summary["spread"]["recall"]["car"] == pytest.approx(np.std(recalls, ddof=1))
    assert summary["interval"] == metrics.evaluate(dev.labels, runs[0].predicted)["interval"]


# ---- figures --------------------------------------------------------------------------------


def test_curves_show_the_mean_over_seeds_and_where_augmentation_starts(dev):
    recipe = replace(NAIVE, epochs=4, augment_from=1)
    runs = [fake_run(recipe, seed, dev, wrong=5) for seed in (0, 1)]
    figure = training.draw_curves(summary_of(runs, dev))

    def mean_of(name, column=...):
        histories = np.array([[epoch[name] for epoch in run.history] for run in runs])
        return histories[:, :, column].mean(axis=0).ravel()

    lines = {line.get_label(): line for ax in figure.axes for line in ax.lines}
    for label, expected in {
        "training loss": mean_of("loss"),
        "accuracy": mean_of("accuracy"),
        "G-mean": mean_of("g_mean"),
        "car": mean_of("recall", 0),
        "cat": mean_of("recall", 2),
    }.items():
        assert lines[label].get_xdata() == pytest.approx([1, 2, 3, 4])
        assert lines[label].get_ydata() == pytest.approx(expected)
    assert lines["augmentation on"].get_xdata() == [1.5, 1.5]  # between epochs 1 and 2
    assert "2 seeds" in figure.get_suptitle()


def test_comparison_shows_each_seed_the_interval_and_the_reports_score(dev):
    recipe = replace(NAIVE, epochs=1)
    runs = [fake_run(recipe, seed, dev, wrong) for seed, wrong in ((0, 5), (1, 10))]
    summary = summary_of(runs, dev)
    ax = training.draw_comparison({"naive": summary}, dev).axes[0]
    interval, ours, theirs = ax.lines[:3]
    assert interval.get_xdata().tolist() == summary["interval"]["accuracy"]
    assert ours.get_xdata() == pytest.approx([55 / 60, 50 / 60])
    assert theirs.get_xdata().tolist() == [0.904]


# ---- going on -------------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch):
    """Interrupt the first run after its second epoch, and count the epochs of all runs."""
    epochs = []

    def train_until_interrupted(recipe, dataset, seed, device, after_epoch, state):
        def after(run, losses):
            after_epoch(run, losses)
            epochs.append(run.epoch)
            if len(epochs) == 2:
                raise KeyboardInterrupt

        return train(recipe, dataset, seed, device, after, state)

    monkeypatch.setattr(training, "train", train_until_interrupted)
    return epochs


def without_times(numbers):
    for recipe in numbers["recipes"].values():
        for run in recipe["runs"]:
            del run["seconds"]
    return numbers["recipes"]


def test_a_resumed_run_ends_with_the_numbers_of_one_that_was_never_stopped(
    run_training, run_script, course_folder, interrupted, no_figures
):
    options = ("--recipe", "transforms", "--epochs", 4, "--seed", "0,1")
    status, _, error = run_training(*options)
    assert status == 130
    assert "run the same command with --resume to continue" in error
    assert [path.name for path in Path("out").iterdir()] == ["transforms.unfinished.ckpt"]
    assert run_training(*options, "--resume")[0] == 0
    assert interrupted == [1, 2, 3, 4, 1, 2, 3, 4]
    assert not list(Path("out").glob("*unfinished*"))
    resumed = without_times(numbers_of())

    whole = ("--data", course_folder, "--out", "whole", *options)
    assert run_script(training, *whole)[0] == 0
    assert without_times(numbers_of(folder="whole")) == resumed
    for name in ("transforms", "transforms-seed1"):
        models = [
            load_checkpoint(Path(folder, f"{name}.ckpt")).model for folder in ("out", "whole")
        ]
        weights = [list(model.parameters()) for model in models]
        assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))

    del interrupted[:]
    assert run_training(*options, "--resume")[0] == 0  # all is done
    assert interrupted == []
    assert without_times(numbers_of()) == resumed


def test_resuming_with_other_settings_is_refused_and_changes_nothing(
    run_training, interrupted, no_figures
):
    assert run_training("--recipe", "naive", "--epochs", 3)[0] == 130
    unfinished = Path("out/naive.unfinished.ckpt")
    before = unfinished.read_bytes()
    status, _, error = run_training("--recipe", "naive", "--epochs", 4, "--resume")
    assert status == 2
    assert error.startswith(f"error: {unfinished}: comes from a run with another recipe; ")
    assert error.count("\n") == 1
    assert unfinished.read_bytes() == before
    torch.save({"model_state_dict": build_model().state_dict()}, unfinished)
    status, _, error = run_training("--recipe", "naive", "--epochs", 3, "--resume")
    assert status == 2
    assert (
        "from a run with another recipe and seed and device and training set and dev set" in error
    )


def test_a_finished_run_with_other_settings_does_not_keep_stopped_ones_from_resuming(
    run_training, interrupted, no_figures
):
    assert run_training("--recipe", "strict-sampler", "--epochs", 1)[0] == 0
    both = ("--recipe", "naive,strict-sampler", "--epochs", 3)
    assert run_training(*both)[0] == 130  # in the first epoch of naive
    assert run_training(*both, "--resume")[0] == 0
    assert interrupted == [1, 1, 2, 3, 1, 2, 3]


def assert_damaged(run, path, damages):
    """Put each damaged training state into the checkpoint, and try to resume."""
    found = load_checkpoint(path)
    for damage in damages:
        save_checkpoint(path, found.model, found.metadata, damage(found.training))
        before = path.read_bytes()
        status, _, error = run("--resume")
        assert status == 2
        assert error == f"error: {path}: its training state is damaged; delete it to start anew\n"
        assert path.read_bytes() == before


def with_values(**values):
    return lambda state: state | values


WRONG_HISTORIES = [
    lambda state: {},
    lambda state: state | {"history": state["history"] * 2},
    lambda state: state | {"history": [{**epoch, "loss": "x"} for epoch in state["history"]]},
    lambda state: state | {"history": [{**epoch, "recall": [1.0]} for epoch in state["history"]]},
    with_values(history=[]),
    with_values(history=3),
    with_values(history=[{}, {}]),
]


def test_a_damaged_state_of_a_finished_run_is_refused(run_training, no_figures, dev):
    options = ("--recipe", "naive", "--epochs", 2)
    assert run_training(*options)[0] == 0
    logits = torch.zeros(len(dev), 3)
    wrong = [logits[1:], logits[:, 1:], logits * torch.nan, logits.long(), logits.tolist(), 3]
    damages = [*WRONG_HISTORIES, *(with_values(logits=each) for each in wrong)]
    assert_damaged(lambda *more: run_training(*options, *more), Path("out/naive.ckpt"), damages)


def test_a_damaged_state_of_a_stopped_run_is_refused(run_training, interrupted, no_figures, train):
    options = ("--recipe", "naive", "--epochs", 3)
    assert run_training(*options)[0] == 130
    wrong = [train.labels + 1, train.labels - 9, train.labels[1:], train.labels.float(), 3]
    damages = [*WRONG_HISTORIES, *(with_values(labels=each) for each in wrong)]
    damages += [with_values(run={"epoch": 2, "model": {}}), with_values(run={"epoch": 2})]
    damages += [lambda state: state | {"run": state["run"] | {"epoch": 1}}]
    path = Path("out/naive.unfinished.ckpt")
    assert_damaged(lambda *more: run_training(*options, *more), path, damages)


def test_stopped_runs_are_not_resumed_with_other_dev_images(
    run_training, run_script, course_folder, interrupted, no_figures, tmp_path
):
    assert run_training("--recipe", "naive", "--epochs", 3)[0] == 130
    other = tmp_path / "other" / course_folder.name
    shutil.copytree(course_folder, other)
    write_course_pickle(other / "dev.pickle", make_dataset("dev", (4, 3, 3)))
    options = ("--data", other, "--out", "out", "--recipe", "naive", "--epochs", 3, "--resume")
    status, _, error = run_script(training, *options)
    assert status == 2
    assert "from a run with another dev set; " in error


def test_labels_are_filtered_once_and_a_resumed_run_keeps_them(
    run_training, monkeypatch, interrupted, no_figures
):
    filtered, seen = [], []
    stopping_train = training.train

    def drop_a_third(recipe, dataset, seed, device):
        filtered.append((recipe.name, recipe.epochs, seed))
        keep = torch.arange(len(dataset)) % 3 > 0
        return replace(dataset, labels=dataset.labels.where(keep, IGNORE_INDEX))

    def watch(recipe, dataset, *rest):
        seen.append(int((dataset.labels == IGNORE_INDEX).sum()))
        return stopping_train(recipe, dataset, *rest)

    monkeypatch.setitem(RECIPES, "best", replace(NAIVE, name="best"))
    monkeypatch.setattr(training, "filter_labels", drop_a_third)
    monkeypatch.setattr(training, "train", watch)
    options = ("--recipe", "best", "--epochs", 3, "--seed", 5)
    assert run_training(*options)[0] == 130
    assert run_training(*options, "--resume")[0] == 0
    assert filtered == [("best", 3, 5)]
    assert seen == [20, 20]
    assert run_training(*options, "--resume")[0] == 0
    assert (len(filtered), len(seen)) == (1, 2)


@pytest.mark.slow
def test_runs_killed_at_any_moment_end_with_the_numbers_of_whole_ones(course_folder, tmp_path):
    command = [sys.executable, PROJECT / "training.py", "--data", course_folder]
    command += ["--recipe", "weighted-sampler", "--epochs", "60", "--seed", "0,1"]
    start = time.monotonic()
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    subprocess.run([*command, "--out", whole], check=True, capture_output=True)
    duration, moments = time.monotonic() - start, np.random.default_rng(0)
    for _ in range(3):
        process = subprocess.Popen(
            [*command, "--out", stopped, "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moments.uniform(0.4, 0.9) * duration)
        process.kill()
        process.wait()
        for path in stopped.glob("[!.]*.ckpt"):
            load_checkpoint(path)
    subprocess.run([*command, "--out", stopped, "--resume"], check=True, capture_output=True)
    assert {path.name for path in stopped.iterdir()} == {path.name for path in whole.iterdir()}
    numbers = [without_times(numbers_of(folder=folder)) for folder in (whole, stopped)]
    assert numbers[0] == numbers[1]


# ---- settings and labels --------------------------------------------------------------------


def test_settings_that_were_found_are_trained_as_a_recipe(run_training, no_figures):
    settings = {"learning_rate": 0.02, "batch_size": 32, "color_jitter": 0, "cutout": 4}
    Path("tuning.json").write_text(json.dumps({"best": {"settings": settings, "g_mean": 0.9}}))
    assert run_training("--settings", "tuning.json", "--epochs", 1)[0] == 0
    (recipe,) = (found["recipe"] for found in numbers_of()["recipes"].values())
    assert recipe == asdict(replace(TUNED, name="found", epochs=1, **settings))
    assert load_checkpoint(Path("out/found.ckpt")).metadata["recipe"] == recipe


def best(**settings):
    return json.dumps({"best": {"settings": settings}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON file"),
        ("{}", "has no settings found by tuning.py"),
        ("[]", "has no settings"),
        ("null", "has no settings"),
        ('{"best": []}', "has no settings"),
        ('{"best": {"settings": [1]}}', "has no settings"),
        ('{"best": {"settings": null}}', "has no settings"),
        ("[" * 100_000, "not a JSON file"),
        ('{"best": ' * 50_000, "not a JSON file"),
        ("\udcff", "not a JSON file"),
        (f'{{"best": {{"settings": {{"cutout": {"9" * 5000}}}}}}}', "not a JSON file"),
        (best(learning_rate=float("nan")), "learning_rate is nan, not a number from 1e-06 to 1"),
        (best(learning_rate=float("inf")), "learning_rate is inf"),
        (best(learning_rate=0), "learning_rate is 0"),
        (best(learning_rate="0.1"), "learning_rate is '0.1'"),
        (best(batch_size=0), "batch_size is 0, not a whole number from 1 to 4096"),
        (best(batch_size=64.0), "batch_size is 64.0"),
        (best(batch_size=True), "batch_size is True"),
        (best(cutout=10**18), "cutout is a very large int"),
        (best(cutout=[4]), "cutout is of type list"),
        (best(epochs=10), "'epochs' is not a setting that can be changed"),
        (best(**{"\x1b[2J" * 10**6: 1}), "[2J"),
        (best(color_jitter="x" * 10**6), "color_jitter is 'xxx"),
    ],
    ids=range(23),
)
def test_settings_that_can_not_be_are_refused_in_one_short_line(text, message, tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError) as refusal:
        training.read_settings(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert message in str(refusal.value)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < len(str(path)) + 200


def test_a_settings_file_that_is_missing_is_named(run_training):
    status, _, error = run_training("--settings", "none.json")
    assert (status, error) == (2, "error: none.json: No such file or directory\n")


def test_corrected_labels_are_trained_on_and_those_of_other_data_refused(
    run_training, train, no_figures
):
    cats = torch.nonzero(train.labels == 2).flatten().tolist()
    corrections = [
        Correction(cats[0], 2, 0, 0.9),
        Correction(cats[1], 2, 1, 0.8, accept=False),
    ]
    Path("fixes.csv").write_text(format_corrections(train, corrections))
    options = ("--recipe", "naive", "--epochs", 1, "--labels", "fixes.csv")
    assert run_training(*options)[0] == 0
    metadata = load_checkpoint(Path("out/naive.ckpt")).metadata
    assert metadata["trained_on"]["class_counts"] == {"car": 41, "truck": 12, "cat": 7}
    assert metadata["trained_on"] == {"name": "course", **numbers_of()["data"]["splits"]["train"]}
    other = make_dataset("dev")
    Path("fixes.csv").write_text(format_corrections(other, corrections))
    status, _, error = run_training(*options)
    assert status == 2
    assert error.count("\n") == 1


# ---- options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--recipe", "naive", "--settings", "a.json"),
            "--recipe and --settings exclude each other",
        ),
        (("--epochs", "0"), "'0' is not a whole number from 1 to 5000"),
    ],
)
def test_options_that_do_not_go_together_end_with_one_line(run_training, options, message):
    status, printed, error = run_training(*options)
    assert (status, printed) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()


# ---- the report's lesson --------------------------------------------------------------------


@pytest.mark.slow
def test_the_reports_lesson_shows_on_synthetic_images(run_script):
    options = ("--data", "synthetic", "--recipe", "naive,final", "--out", "out")
    assert run_script(training, *options)[0] == 0
    naive, final = numbers_of()["recipes"].values()
    assert naive["accuracy"] > 0.9
    assert min(naive["recall"], key=naive["recall"].get) == "cat"
    assert naive["g_mean"] < naive["accuracy"] - 0.1
    assert naive["g_mean"] + 0.1 < final["g_mean"] < 0.99


@needs_course_data
@pytest.mark.slow
def test_final_recognizes_all_classes_of_the_courses_images_and_naive_does_not(
    run_script, monkeypatch
):
    monkeypatch.setattr("common.train.cpu_count", os.cpu_count)  # runs side by side
    options = ("--data", COURSE_DATA, "--recipe", "naive,final", "--seed", "0,1,2", "--out", "out")
    assert run_script(training, *options)[0] == 0
    naive, final = numbers_of()["recipes"].values()
    assert final["g_mean"] > 0.65
    assert naive["g_mean"] < final["g_mean"] - 0.05
