"""What holds for every script: imports, bad input, whole files."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import make_dataset, write_course_pickle

import adversarial
import evaluation
import inspectData
import label_errors
import lr_analysis
import report
import training
import tuning
from common import console, machine, results

STEPS = [inspectData, evaluation, training, label_errors, lr_analysis, adversarial, tuning]
SCRIPTS = [*STEPS, report]
NAMES = [script.__name__ for script in SCRIPTS]


def test_importing_all_scripts_prints_nothing_and_starts_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(console.PROJECT)!r}); import {', '.join(NAMES)}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def imports_of(path):
    lines = path.read_text().splitlines()
    words = [line.split() for line in lines if line.startswith(("import ", "from "))]
    return {line[1].split(".")[0] for line in words}


def test_imports_run_one_way_only():
    for path in (console.PROJECT / "common").glob("*.py"):
        assert not imports_of(path) & set(NAMES), path.name
    assert not imports_of(console.PROJECT / "evaluation.py") & {"training", "adversarial"}
    assert not imports_of(console.PROJECT / "inspectData.py") & set(NAMES)
    assert not imports_of(console.PROJECT / "training.py") & {
        "lr_analysis",
        "label_errors",
        "adversarial",
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_help_shows_an_example_and_defaults(script, run_script):
    status, printed, _ = run_script(script, "--help")
    assert status == 0
    assert f"python {script.__name__}.py" in printed
    assert "(default: auto)" in printed
    for option in ("--data", "--seed", "--device", "--out", "--quick"):
        assert option in printed


BAD_OPTIONS = {
    ("--data", "nowhere"): "no such folder",
    ("--seed", "4000000001"): "4000000001 is more than 4000000000",
    ("--seed", "-1"): "'-1' is not a whole number of at least 0",
    ("--seed", "x"): "'x' is not a whole number",
    ("--device", "abacus"): "--device abacus: not on this machine",
    ("--colour", "red"): "unrecognized arguments: --colour red",
}


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=" ".join)
@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_bad_option_ends_with_one_line_and_status_2(script, options, run_script, course_folder):
    data = () if "--data" in options else ("--data", course_folder)
    status, printed, error = run_script(script, *data, *options)
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert BAD_OPTIONS[options] in error
    assert printed == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_broken_data_ends_with_one_line_and_leaves_nothing(
    script, run_script, course_folder, tmp_path
):
    for part in ("train", "dev"):
        path = course_folder / f"{part}.pickle"
        path.write_bytes(path.read_bytes()[:5000])
    status, _, error = run_script(script, "--data", course_folder, "--out", "out")
    assert status == 2
    assert error.count("\n") == 1
    assert "not a whole pickle" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_results_folder_that_cannot_be_written_is_named_before_any_work(
    script, run_script, course_folder, tmp_path
):
    (tmp_path / "file").write_text("in the way")
    status, _, error = run_script(script, "--data", course_folder, "--out", "file/out")
    assert status == 2
    assert "error: --out file/out: can't be written" in error
    assert error.count("\n") == 1


def test_unknown_recipe_is_answered_with_the_known_ones(run_script, course_folder):
    status, _, error = run_script(training, "--data", course_folder, "--recipe", "magic")
    assert status == 2
    assert "invalid choice: 'magic'" in error
    assert "weighted-sampler" in error


def test_empty_class_in_dev_ends_with_one_line(run_script, tmp_path):
    folder = tmp_path / "no-cats"
    folder.mkdir()
    dev = make_dataset("dev")
    keep = dev.labels != 2
    labels = dev.labels[keep]
    write_course_pickle(folder / "dev.pickle", type(dev)("x", "dev", dev.pictures[keep], labels))
    status, _, error = run_script(evaluation, "--data", folder)
    assert status == 2
    assert "no-cats, dev: class cat has no pictures" in error


def test_quick_results_go_to_a_folder_of_their_own(run_script, course_folder, tmp_path):
    assert run_script(evaluation, "--data", course_folder, "--quick")[0] == 0
    assert (tmp_path / "results/course-quick/evaluation.json").exists()


def test_same_command_gives_the_same_numbers(run_script, course_folder, tmp_path):
    options = ("--data", course_folder, "--quick", "--recipe", "final", "--seed", "3")
    files = []
    for _ in range(2):
        assert run_script(training, *options, "--out", "out")[0] == 0
        numbers = json.loads((tmp_path / "out/training.json").read_text())
        for run in numbers["recipes"]["final"]["runs"]:
            del run["seconds"]
        files.append(numbers)
    assert files[0] == files[1]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.write_whole(path, fail)
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]
    results.write_whole(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"


def test_interrupt_ends_without_a_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        console.run(interrupted)
    assert stop.value.code == 130
    assert "stopped" in capsys.readouterr().err


def test_figures_say_which_data_they_show(run_script, course_folder, monkeypatch):
    lines = []
    original = results.Figure.supxlabel
    monkeypatch.setattr(
        results.Figure,
        "supxlabel",
        lambda self, text, **options: lines.append(text) or original(self, text, **options),
    )
    assert run_script(evaluation, "--data", course_folder, "--quick", "--out", "out")[0] == 0
    assert len(lines) == 2
    assert all(line.startswith("QUICK DRY RUN") and "Data: course, dev" in line for line in lines)


def test_table_lines_up(capsys):
    console.print_table(["a", "number"], [["long name", "1"], ["b", "22"]])
    assert capsys.readouterr().out.splitlines() == [
        "a          number",
        "---------  ------",
        "long name       1",
        "b              22",
    ]


def test_jobs_side_by_side_keep_their_order():
    jobs = [(number,) for number in (3, 1, 2)]
    together = machine.side_by_side(float, jobs, torch.device("cpu"), "jobs")
    assert list(together) == [3.0, 1.0, 2.0]
