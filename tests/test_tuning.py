import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import tuning
from common.cli import PROJECT, UserError
from common.data import Correction, format_corrections, open_data
from common.recipes import TUNED
from tuning import complete_trials, end_killed_trials, search

import numpy as np
import optuna
import pytest
import torch
from conftest import make_dataset, write_course_pickle
from optuna.trial import TrialState

OWN = {name: getattr(TUNED, name) for name in tuning.SPACE}


@pytest.fixture
def study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(direction="maximize")


def best_near_a_third(recipe):
    return 1 - abs(recipe.sampling_exponent - 1 / 3) - abs(np.log(recipe.learning_rate / 2e-3)) / 10


def settings_of(study):
    return [trial.params for trial in complete_trials(study)]


# ---- search ---------------------------------------------------------------------------------


def test_search_starts_from_the_recipe_and_gets_close_to_what_is_best(study):
    search(study, TUNED, 50, best_near_a_third, seed=0)
    own, *others = settings_of(study)
    assert own == OWN
    assert all(settings != OWN for settings in others)
    assert study.best_value > best_near_a_third(TUNED)
    assert abs(study.best_params["sampling_exponent"] - 1 / 3) < 0.1
    assert 1e-3 < study.best_params["learning_rate"] < 4e-3


def test_the_recipe_lies_in_the_space():
    for name, distribution in tuning.SPACE.items():
        value = distribution.to_internal_repr(OWN[name])
        assert distribution._contains(value)


def test_search_follows_its_seed_and_goes_on_as_if_it_had_not_stopped():
    def run(seed, *stops):
        study = optuna.create_study(direction="maximize")
        for trials in stops:
            search(study, TUNED, trials, best_near_a_third, seed)
        return settings_of(study)

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    assert run(0, 14) == run(0, 3, 11, 14) != run(1, 14)


def test_trials_in_the_file_count_when_a_search_is_started_again(tmp_path):
    folder = tmp_path / "a$b_{$c? d%20"  # characters that mean something in a URL or a template
    folder.mkdir()
    scored = []

    def score(recipe):
        scored.append(recipe)
        return best_near_a_third(recipe)

    for trials in (2, 5, 4):
        study = tuning.open_study(None, folder, "name")
        search(study, TUNED, trials, score, seed=0)
    assert len(scored) == len(settings_of(study)) == 5
    assert [path.name for path in folder.iterdir()] == ["tuning.db"]
    assert not tuning.open_study(None, folder, "of other data").trials


def test_search_reports_after_each_trial(study):
    seen = []
    report = lambda: seen.append(len(tuning.search_entry(study, TUNED)["trials"]))  # noqa: E731
    search(study, TUNED, 3, best_near_a_third, 0, report)
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("failure", [KeyboardInterrupt, UserError("no memory")])
def test_a_trial_that_is_interrupted_is_not_left_running(study, failure):
    def score(recipe):
        raise failure

    with pytest.raises((KeyboardInterrupt, UserError)):
        search(study, TUNED, 3, score, 0)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]
    search(study, TUNED, 2, best_near_a_third, 0)
    assert settings_of(study)[0] == OWN  # it is tried again


def leave_running(study, host, process):
    trial = study.ask(tuning.SPACE)
    trial.set_user_attr("worker", [host, process])
    return trial.number


def states(study):
    return [trial.state.name for trial in study.trials]


def test_a_trial_whose_process_was_killed_is_ended_and_its_settings_are_tried_again(study):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    study.enqueue_trial(OWN)
    leave_running(study, socket.gethostname(), killed.pid)
    leave_running(study, socket.gethostname(), os.getpid())
    leave_running(study, "another machine", killed.pid)
    end_killed_trials(study)
    search(study, TUNED, 2, best_near_a_third, 0)
    assert states(study) == ["FAIL", "RUNNING", "RUNNING", "COMPLETE", "COMPLETE"]
    assert settings_of(study)[0] == OWN


def test_a_trial_that_another_worker_has_ended_meanwhile_does_no_harm(study):
    def score(recipe):
        if len(study.trials) == 1:
            study.tell(0, state=TrialState.FAIL)
        return 0.5

    search(study, TUNED, 2, score, 0)
    assert states(study) == ["FAIL", "COMPLETE", "COMPLETE"]


def test_the_name_of_a_study_tells_apart_what_can_not_be_compared(tmp_path, monkeypatch):
    data = make_dataset(), make_dataset("dev"), make_dataset(counts=(40, 12, 9))
    names = {tuning.study_name(TUNED, dataset, 0) for dataset in data}
    names |= {tuning.study_name(TUNED, data[0], 1)}
    names |= {tuning.study_name(replace(TUNED, epochs=3), data[0], 0)}
    names |= {tuning.study_name(replace(TUNED, network="SmallVGG"), data[0], 0)}
    assert len(names) == 6
    assert tuning.study_name(TUNED, make_dataset(), 0) in names
    for file in tuning.CODE:
        (tmp_path / file).write_text("changed")
    monkeypatch.setattr(tuning, "COMMON", tmp_path)
    assert tuning.study_name(TUNED, make_dataset(), 0) not in names


# ---- the images held out --------------------------------------------------------------------


def test_split_leaves_a_third_of_each_class_aside_and_keeps_near_duplicates_together():
    dataset = make_dataset(counts=(60, 30, 21))
    twins = dataset.subset(torch.arange(len(dataset)).repeat_interleave(2))
    searched, held_out = tuning.split(twins, seed=0)
    assert len(searched) + len(held_out) == len(twins)
    assert np.array(held_out.class_counts) == pytest.approx(np.array([40, 20, 14]), abs=2)
    both = {image.numpy().tobytes() for image in searched.images} & {
        image.numpy().tobytes() for image in held_out.images
    }
    assert not both
    assert not torch.equal(tuning.split(twins, seed=1)[1].images, held_out.images)


def test_a_class_with_too_few_images_is_named():
    cats = make_dataset(counts=(40, 30, 11))
    with pytest.raises(UserError, match="tiny: cat: 11 different images; tuning needs 12"):
        tuning.split(cats, seed=0)
    copies = cats.subset(
        torch.cat([torch.arange(len(cats)), torch.nonzero(cats.labels == 2)[:, 0]])
    )
    with pytest.raises(UserError, match="cat: 11 different images"):
        tuning.split(copies, seed=0)


def test_check_compares_both_recipes_on_the_images_left_aside(monkeypatch):
    searched, held_out = tuning.split(make_dataset(counts=(90, 60, 60)), seed=0)
    best, seen = replace(TUNED, cutout=8), []

    def right_or_half_right(function, jobs, *_):
        for recipe, trained_on, images, seed, _ in jobs:
            seen.append((recipe, seed))
            assert trained_on is searched
            assert images is held_out.images
            right = torch.ones(len(held_out), dtype=torch.bool)
            if recipe == TUNED:
                right[seed % 2 :: 2] = False
            yield torch.eye(3)[torch.where(right, held_out.labels, (held_out.labels + 1) % 3)]

    monkeypatch.setattr(tuning, "parallel_map", right_or_half_right)
    found = tuning.compare_on_held_out(TUNED, best, searched, held_out, 7, torch.device("cpu"))
    assert seen == [(recipe, seed) for recipe in (TUNED, best) for seed in (7, 8, 9)]
    assert found["best"] == {"g_mean": 1.0, "runs": [1.0] * 3}
    own = found["default"]
    assert own["g_mean"] == pytest.approx(0.5, abs=0.1)
    assert own["g_mean"] == pytest.approx(np.mean(own["runs"]))
    comparison = found["comparison"]
    assert comparison["difference"] == pytest.approx(1 - own["g_mean"])
    assert comparison["interval"][0] > 0
    assert comparison["runs"] == 3


# ---- the script -----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    write_course_pickle(folder / "train.pickle", make_dataset(counts=(30, 15, 15)))
    write_course_pickle(folder / "dev.pickle", make_dataset("dev"))
    return folder


@pytest.fixture
def no_training(monkeypatch):
    """Let trials differ without any training: the more cutout, the better."""

    def logits(recipe, labels, seed):
        noise = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(seed))
        return torch.eye(3)[labels] * (1 + recipe.cutout) + noise

    monkeypatch.setattr(
        tuning,
        "cross_val_logits",
        lambda recipe, dataset, seed, device: logits(recipe, dataset.labels, seed),
    )
    monkeypatch.setattr(
        tuning,
        "parallel_map",
        lambda function, jobs, *_: [
            logits(recipe, torch.zeros(len(images), dtype=torch.long), seed)
            for recipe, _, images, seed, _ in jobs
        ],
    )


def test_script_searches_compares_and_goes_on(run_script, folder, no_training, tmp_path):
    options = ("--data", folder, "--out", tmp_path / "out")
    status, printed, error = run_script(tuning, *options, "--trials", 6)
    assert status == 0, error
    assert "On images that no trial has seen, 3 seeds" in printed
    numbers = json.loads((tmp_path / "out/tuning.json").read_text())
    assert len(numbers["trials"]) == 6
    assert numbers["best"]["g_mean"] == max(trial["g_mean"] for trial in numbers["trials"])
    assert numbers["best"]["settings"].keys() == tuning.SPACE.keys()
    assert replace(TUNED, **numbers["best"]["settings"]) != TUNED
    assert numbers["check"].keys() == {"default", "best", "comparison"}
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"tuning.db", "tuning.json", "tuning.png", "tuning.svg"}

    status, printed, _ = run_script(tuning, *options, "--trials", 7)
    assert status == 0
    again = json.loads((tmp_path / "out/tuning.json").read_text())
    assert again["trials"][:6] == numbers["trials"]
    assert len(again["trials"]) == 7


def test_a_single_trial_is_the_recipe_itself_and_needs_no_comparison(
    run_script, folder, no_training, tmp_path
):
    status, printed, _ = run_script(tuning, "--data", folder, "--out", "out", "--trials", 1)
    assert status == 0
    assert "No trial was better than the recipe's own settings." in printed
    numbers = json.loads((tmp_path / "out/tuning.json").read_text())
    assert numbers["best"]["settings"] == OWN
    assert numbers["check"] is None


def test_label_corrections_make_other_data(run_script, folder, no_training, tmp_path):
    train = open_data(str(folder)).load("train")
    given = train.labels[3].item()
    correction = Correction(3, given, (given + 1) % 3, 0.9)
    (tmp_path / "labels.csv").write_text(format_corrections(train, [correction]))
    options = ("--data", folder, "--out", "out", "--trials", 1, "--labels", "labels.csv")
    assert run_script(tuning, *options)[0] == 0
    numbers = json.loads((tmp_path / "out/tuning.json").read_text())
    corrected = replace(train, labels=train.labels.clone())
    corrected.labels[3] = correction.suggested
    assert corrected.fingerprint in numbers["study"]
    assert numbers["data"]["splits"]["train"]["fingerprint"] == corrected.fingerprint


def test_too_few_images_end_in_one_line(run_script, course_folder):
    status, _, error = run_script(tuning, "--data", course_folder)
    assert status == 2
    assert error == "error: course: cat: 8 different images; tuning needs 12\n"


def test_passwords_are_not_shown():
    url = "postgresql+psycopg://me:secret@host/name?password=secret"
    assert tuning.hide_password(url) == "postgresql+psycopg://me:***@host/name"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "--storage: not the URL of a database, such as postgresql"),
        ("postgresql://host:port/name", "--storage: not the URL of a database"),
        (
            "sqlite:////no/such/folder/x.db",
            "--storage sqlite:////no/such/folder/x.db: not reachable",
        ),
        ("postgresql+pg8000://me:secret@host/x", "//me:***@host/x: its driver is not installed"),
        ("sqlite:///x.db?timeout=abc", "--storage sqlite:///x.db: not reachable"),
        (
            "sqlite:///text.db",
            "--storage sqlite:///text.db: not reachable, not Optuna's, or its disk is full",
        ),
    ],
)
def test_a_storage_that_does_not_work_ends_in_one_line(run_script, folder, tmp_path, url, words):
    (tmp_path / "text.db").write_text("no database " * 100)
    status, _, error = run_script(tuning, "--data", folder, "--out", "out", "--storage", url)
    assert status == 2
    assert words in error
    assert "secret" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE trials SET state = 'NONE'",
        "UPDATE trial_params SET distribution_json = '[]'",
        "UPDATE trial_params SET distribution_json = '{}'",
    ],
)
def test_a_damaged_database_ends_in_one_line(run_script, folder, tmp_path, damage):
    train = open_data(str(folder)).load("train")
    (tmp_path / "out").mkdir()
    name = tuning.study_name(tuning.RECIPE, train, 0)
    study = tuning.open_study(None, tmp_path / "out", name)
    search(study, tuning.RECIPE, 1, best_near_a_third, seed=0)
    with sqlite3.connect(tmp_path / "out/tuning.db") as database:
        database.execute(damage)
    status, _, error = run_script(tuning, "--data", folder, "--out", "out", "--trials", 1)
    assert status == 2
    assert (
        error
        == "error: --storage out/tuning.db: not reachable, not Optuna's, or its disk is full\n"
    )


def test_an_error_of_the_training_is_not_taken_for_one_of_the_database(
    run_script, folder, monkeypatch
):
    monkeypatch.setattr(tuning, "cross_val_logits", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_script(tuning, "--data", folder, "--out", "out", "--trials", 1)


def test_figure_marks_the_recipe_and_the_best(study):
    search(study, TUNED, 6, best_near_a_third, seed=0)
    numbers = tuning.search_entry(study, TUNED)
    history, *settings = tuning.draw_search(numbers).axes
    assert list(np.diff(history.lines[0].get_ydata()) >= 0) == [True] * 5
    scores = [trial["g_mean"] for trial in numbers["trials"]]
    assert list(history.lines[1].get_ydata()) == scores
    for ax, name in zip(settings, tuning.SPACE, strict=True):
        every, own, best = ax.lines
        assert len(every.get_xdata()) == 6
        assert list(own.get_xdata()) == [OWN[name]]
        assert list(best.get_xdata()) == [numbers["best"]["settings"][name]]


# ---- several machines -----------------------------------------------------------------------


@pytest.fixture
def postgres_url():
    """Start a PostgreSQL server in a folder of its own; return the URL of its database."""
    if not (shutil.which("initdb") and shutil.which("pg_ctl")):
        pytest.skip("PostgreSQL (initdb, pg_ctl) is not installed")
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        user = "nobody" if os.geteuid() == 0 else None  # the server refuses to run as root
        if user:
            shutil.chown(folder, user)

        def run(*command):
            subprocess.run(
                command, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL, timeout=120
            )

        run("initdb", "-D", "data", "-U", "me", "-A", "trust", "--no-sync")
        options = f"-p {port} -k {folder} -h 127.0.0.1"
        run("pg_ctl", "start", "-D", "data", "-w", "-l", "log", "-o", options)
        try:
            yield f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "stop", "-D", "data", "-m", "fast")


@pytest.mark.slow
def test_two_workers_share_one_search(postgres_url, folder, tmp_path):
    command = [sys.executable, PROJECT / "tuning.py", "--data", folder, "--storage", postgres_url]
    command += ["--epochs", "1", "--trials", "4", "--device", "cpu"]
    workers = [
        subprocess.Popen(
            [*command, "--out", tmp_path / name], stderr=subprocess.PIPE, text=True, cwd=PROJECT
        )
        for name in "ab"
    ]
    errors = [worker.communicate(timeout=900)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    numbers = [json.loads((tmp_path / name / "tuning.json").read_text()) for name in "ab"]
    assert numbers[0]["study"] == numbers[1]["study"]
    storage = optuna.storages.RDBStorage(postgres_url)
    trials = optuna.load_study(study_name=numbers[0]["study"], storage=storage).trials
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert 4 <= len(trials) <= 5  # the last two may have been begun at the same time
    processes = {trial.user_attrs["worker"][1] for trial in trials}
    assert processes == {worker.pid for worker in workers}
