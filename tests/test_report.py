"""The report as a whole: its steps, its page, and the zip file to hand in."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import report
import training
from common import cli, metrics
from common.cli import UserError
from common.data import SPLITS, Correction, DataFolder, format_corrections, open_data
from common.model import build_model, save_checkpoint
from common.recipes import RECIPES, REPORT_RECIPES

import pytest
import torch
from conftest import make_dataset, running_in, write_course_pickle

VOID = {"meta", "img", "br", "link", "hr", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


# ---- scripts that leave the files of the real ones, but do no work --------------------------


def predict(labels, seed):
    """Return logits for which two in three images are classified correctly."""
    logits = torch.rand(len(labels), 3, generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(len(labels)), labels] += 0.6
    return logits


def write_png(path):
    """Write a white image of 100 x 50 pixels."""
    chunk = struct.pack(">IIBBBBB", 100, 50, 8, 0, 0, 0, 0)
    body = zlib.compress((b"\0" + b"\xff" * 100) * 50)
    chunks = [(b"IHDR", chunk), (b"IDAT", body), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


class FakeScripts:
    """Stands for report.run_script; keeps the calls. `stop_at` names a script not to finish."""

    def __init__(self):
        self.calls, self.stop_at = [], None
        self.load = lru_cache(lambda data, split, quick: open_data(data).load(split, quick))

    def __call__(self, script, options, printed):
        self.calls.append([script, *options])
        pairs = zip(options, [*options[1:], ""], strict=True)
        self.options = {name: value for name, value in pairs if name.startswith("--")}
        self.out = Path(self.options["--out"])
        data, quick = self.options["--data"], "--quick" in options
        self.train, self.dev = (self.load(data, split, quick) for split in SPLITS)
        if script == self.stop_at:
            raise KeyboardInterrupt
        getattr(self, Path(script).stem)()

    def save(self, name, content):
        self.out.joinpath(name).write_text(json.dumps(content), encoding="utf-8")

    def scores(self, seed):
        return metrics.evaluate(self.dev.labels, predict(self.dev.labels, seed).argmax(dim=1))

    def inspectData(self):  # noqa: N802
        pair = {"dev": 0, "train": 3, "labels": ["car", "car"], "correlation": 0.99}
        numbers = {"near_duplicates": [pair], "class_fractions_p_value": 0.5}
        numbers["splits"] = {
            split.split: {
                "images": len(split),
                "class_counts": split.metadata()["class_counts"],
                "class_fractions": {"car": 0.7, "truck": 0.2, "cat": 0.1},
                "independence_p_value": None,
                "outliers": [1, 5],
            }
            for split in (self.train, self.dev)
        }
        self.save("inspectData.json", numbers)
        write_png(self.out / "1-label-counts.png")
        write_png(self.out / "2-label-order.png")
        (self.out / "2-label-order.svg").write_text("<svg/>")

    def evaluation(self):
        logits = predict(self.dev.labels, 0)
        numbers = {**self.scores(0), "ece": 0.1}
        if "--show-mismatch" in self.options:
            found = {"difference": -0.2, "interval": [-0.3, -0.1], "runs": 1}
            numbers["other_range"] = self.scores(1) | {"comparison": found}
        self.save("evaluation.json", numbers)
        text = metrics.format_predictions(self.dev.labels, logits)
        (self.out / "predictions.csv").write_text(text)
        write_png(self.out / "confusion.png")

    def label_errors(self):
        classes = {"cat": {"flagged": 1}, "all": {}}
        found = {"chance_level": False, "flagged": 2, "accepted": 1, "classes": classes}
        self.save("label_errors.json", found)
        corrections = [Correction(0, int(self.train.labels[0]), 1, 0.9, True)]
        text = format_corrections(self.train, corrections, reviewed=False)
        (self.out / "label_corrections.csv").write_text(text)

    def training(self):
        name = self.options["--recipe"]
        recipes = [*REPORT_RECIPES, "tuned"] if name == "all" else [name]
        seeds = [int(seed) for seed in self.options["--seed"].split(",")]
        runs, summaries = {}, {}
        for place, recipe in enumerate(recipes):
            runs[recipe] = [self.run(recipe, seed, 10 * place) for seed in seeds]
            baseline = runs.get(training.BASELINES.get(recipe, ""), [])
            summaries[recipe] = training.summarize(runs[recipe], self.dev, baseline)
            for run in runs[recipe]:
                name = recipe if run.seed == seeds[0] else f"{recipe}-seed{run.seed}"
                text = metrics.format_predictions(self.dev.labels, run.logits)
                (self.out / f"predictions-{name}.csv").write_text(text)
            settings = {"epochs": 2, "augment_from": 0, "cutout": 0, "sampler": None}
            settings |= {"tta_flip": False, "label_filter": {"name": "filter"}}
            about = {"recipe": {"name": recipe, **settings}, "seed": seeds[0]}
            about["trained_on"] = {"name": self.train.name}
            torch.manual_seed(0)
            save_checkpoint(self.out / f"{recipe}.ckpt", build_model(), about)
        self.save("training.json", {"recipes": summaries})

    def run(self, recipe, seed, place):
        history = [{"loss": 1.0, "seconds": 1.0, **self.scores(seed)} for _ in range(2)]
        logits = predict(self.dev.labels, seed + place)
        return training.Trained(RECIPES[recipe], seed, Path(), logits, history)

    def tuning(self):
        trials = [{"number": 0, "g_mean": 0.5, "settings": {}, "is_default": True}]
        self.save("tuning.json", {"trials": trials, "best": trials[0], "check": None})

    def lr_analysis(self):
        rates = {"0.5": {"verdict": "too high", "smoothed_losses": [1.0, 2.0]}}
        test = {"suggestion": 0.003, "explanation": "the loss falls most steeply there"}
        self.save("lr_analysis.json", {"model": "a CNN", "rates": rates, "range_test": test})

    def adversarial(self):
        each = {"success_rate": 0.5, "most_predicted": {"class": "car", "fraction": 0.7}}
        each = {epsilon: self.scores(1) | each for epsilon in ("0.02", "0.05", "0.1")}
        noise = {"spread": dict.fromkeys(metrics.SCORE_TITLES, 0.1), "runs": [{}, {}]}
        noise = {epsilon: scores | noise for epsilon, scores in each.items()}
        universal = {"universal": noise, "universal_to_next_label": noise}
        attacks = {"random_noise": noise, "fgsm": each, "pgd": each, **universal}
        one = {"clean": self.scores(0), "attacks": attacks}
        found = {"images": 60, "models": {"plain": one}}
        if "--robust" in self.options:
            difference = {"difference": 0.2, "interval": [0.1, 0.3], "runs": 1}
            found["models"]["robust"] = one
            found["comparison"] = {"pgd": dict.fromkeys(each, difference)}
        self.save("adversarial.json", found)


@pytest.fixture
def scripts(monkeypatch):
    fake = FakeScripts()
    monkeypatch.setattr(report, "run_script", fake)
    monkeypatch.setattr(metrics, "DRAWS", 200)  # intervals of no use are fast
    return fake


@pytest.fixture
def make_report(run_script, scripts, course_folder):
    """Return a function that makes a report in the folder `out` of the current folder."""

    def make(*options):
        scripts.calls.clear()
        return run_script(report, "--data", course_folder, "--out", "out", *options)

    return make


def steps_that_ran(scripts):
    return [Path(call[call.index("--out") + 1]).name for call in scripts.calls]


# ---- the page -------------------------------------------------------------------------------


class Page(HTMLParser):
    """Reads a page: its numbers, its links, and whether each element is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.numbers, self.errors, self.ids = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "data":
            self.numbers.append([attributes["title"], attributes["value"], ""])
        if tag not in VOID:
            self.open.append(tag)

    def handle_data(self, text):
        if self.open and self.open[-1] == "data":
            self.numbers[-1][2] += text

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append((tag, self.getpos()))


def check_page(folder):
    """Check that a page is whole, stands alone, and shows what the JSON files hold."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert (page.errors, page.open) == ([], [])
    assert len(page.ids) == len(set(page.ids))
    assert "http" not in text
    assert "url(" not in text
    assert "data:image/svg+xml" in text
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "link")
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            kind, _, image = attributes["src"].partition(";base64,")
            assert kind in ("data:image/png", "data:image/svg+xml") and image
            assert attributes["alt"]
        if tag == "a":
            assert attributes["href"].removeprefix("#") in page.ids
    assert len(page.numbers) > 100
    for title, value, shown in page.numbers:
        check_number(folder / "steps", title, value, shown)
    return text


def check_number(folder, title, value, shown):
    file, path = title.split(": ")
    expected = json.loads((folder / file).read_text(encoding="utf-8"))
    for key in filter(None, path.removesuffix(", entries").split("/")):
        expected = expected[int(key) if isinstance(expected, list) else key]
    expected = len(expected) if path.endswith(", entries") else expected
    assert float(value) == expected, title
    shown = shown.replace("\N{MINUS SIGN}", "-")
    specs = (".3f", ".2f", ".1%", ".0%", "+.3f", ",.0f", ".2g")
    assert shown in {format(expected, spec) for spec in specs}, title


@pytest.mark.parametrize("options", [(), ("--full", "--seed", "0,1"), ("--quick",)])
def test_page_shows_what_the_json_files_hold(options, make_report, tmp_path):
    status, _, error = make_report(*options)
    assert (status, error) == (0, "")
    text = check_page(tmp_path / "out")
    assert ("mean nothing" in text) == ("--quick" in options)
    assert ("One seed" in text) == ("--seed" not in options)
    assert ("tuning.py</code> tried" in text) == ("--full" in options)
    assert "Figure 1." in text
    checkpoint = Path("out/steps/recipes/final.ckpt")
    assert f"<code>evaluation.py --show-mismatch --checkpoint {checkpoint} --data " in text


def test_page_names_the_command_that_ran(make_report, tmp_path, course_folder):
    make_report("--author", "Ada & <i>Bob</i>", "--seed", "0,1")
    text = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "Ada &amp; &lt;i&gt;Bob&lt;/i&gt;" in text
    command = f"python report.py --data {course_folder} --out out --author"
    assert f"<code>{command} &#39;Ada &amp; &lt;i&gt;Bob&lt;/i&gt;&#39; --seed 0,1</code>" in text


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ([0.01, 0.1], "better than <b>"),
        ([-0.1, -0.01], "worse than <b>"),
        ([-0.01, 0.1], "not measurably different from <b>"),
        ([0.0, 0.1], "not measurably different from <b>"),
    ],
)
def test_words_about_a_comparison_follow_its_interval(interval, words, tmp_path):
    content = {"found": {"difference": sum(interval) / 2, "interval": interval, "runs": 1}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    text = report.Files(tmp_path).comparison("a.json", "found", report.Markup("<b>"))
    assert text.startswith(words)
    assert [float(value) for value in re.findall('value="([^"]*)"', text)][1:] == interval


def test_models_of_different_steps_are_compared_by_their_predictions(make_report, tmp_path):
    make_report("--full", "--seed", "0,1")
    found = json.loads((tmp_path / "out/steps/comparisons.json").read_text())
    tuned = json.loads((tmp_path / "out/steps/recipes/training.json").read_text())["recipes"][
        "tuned"
    ]
    best = json.loads((tmp_path / "out/steps/best/training.json").read_text())["recipes"]["best"]
    for score in ("accuracy", "g_mean"):
        assert found["best"][score]["difference"] == pytest.approx(best[score] - tuned[score])
    assert found["best"]["g_mean"]["runs"] == 2


def test_scores_without_near_duplicates_leave_those_images_out(make_report, tmp_path, dev):
    make_report()
    found = json.loads((tmp_path / "out/steps/comparisons.json").read_text())["near_duplicates"]
    assert found["images"] == 1
    right = (predict(dev.labels, 0).argmax(dim=1) == dev.labels)[1:]
    assert found["others"]["accuracy"] == pytest.approx(right.float().mean().item())


# ---- running again --------------------------------------------------------------------------


def test_second_run_takes_all_from_the_first(make_report, scripts, tmp_path):
    make_report()
    before = (tmp_path / "out/index.html").read_bytes()
    _, printed, _ = make_report()
    assert scripts.calls == []
    assert printed.count("done before") == 9
    assert (tmp_path / "out/index.html").read_bytes() == before


def test_stopped_report_goes_on_where_it_was(make_report, scripts, tmp_path):
    scripts.stop_at = "training.py"
    status, _, error = make_report()
    assert status == 130
    assert "to resume" in error
    assert not (tmp_path / "out/index.html").exists()
    scripts.stop_at = None
    assert make_report()[0] == 0
    assert steps_that_ran(scripts)[0] == "recipes"
    assert "--resume" in scripts.calls[0]
    assert not any("--resume" in call for call in scripts.calls[1:])
    check_page(tmp_path / "out")


def test_stopped_training_with_other_options_is_not_resumed(make_report, scripts, tmp_path):
    scripts.stop_at = "training.py"
    make_report()
    stale = tmp_path / "out/steps/recipes/final.ckpt"
    stale.write_bytes(b"of the old options")
    trials = tmp_path / "out/steps/recipes/tuning.db"  # of a search with the old code, for example
    trials.touch()
    scripts.stop_at = None
    make_report("--seed", "0,1")
    assert not any("--resume" in call for call in scripts.calls)
    assert stale.read_bytes() != b"of the old options"
    assert not trials.exists()


def test_results_of_another_device_are_not_taken_for_those_of_this_one(
    make_report, scripts, monkeypatch
):
    make_report()
    monkeypatch.setattr(report, "choose_device", lambda name: torch.device("cuda"))
    make_report()
    assert len(scripts.calls) == 9


def test_other_seeds_run_only_what_takes_several(make_report, scripts):
    make_report()
    make_report("--seed", "0,1")
    assert steps_that_ran(scripts) == ["recipes", "corrected-labels", "learning-rates"]


def test_changed_corrections_are_used(make_report, scripts, tmp_path):
    make_report()
    path = tmp_path / "out/steps/label-errors/label_corrections.csv"
    path.write_text(path.read_text().replace("yes", "no"))
    make_report()
    assert steps_that_ran(scripts) == ["corrected-labels"]


@pytest.mark.parametrize(("name", "option"), [("cifar10", "cifar10"), ("data", "auto")])
def test_steps_use_one_data_set_and_no_path_of_the_home_folder(
    course_folder, monkeypatch, name, option
):
    folder = DataFolder(name, Path(course_folder))
    monkeypatch.setattr(report, "open_data", lambda _: folder)
    monkeypatch.setattr(sys, "argv", ["report.py"])
    assert report.Report(report.parse_arguments(), Path("out")).data_option == option


def test_many_seeds_are_not_taken_for_the_name_of_a_file(course_folder, monkeypatch):
    seeds = ",".join(map(str, range(200)))
    monkeypatch.setattr(sys, "argv", ["report.py", "--data", str(course_folder), "--seed", seeds])
    made = report.Report(report.parse_arguments(), Path("out"))
    recipes = next(step for step in made.steps if step.name == "recipes")
    assert seeds in made.origin_of(recipes)["options"]


def test_own_corrections_take_the_place_of_the_automatic_ones(make_report, scripts, tmp_path):
    make_report()
    page = tmp_path / "out/index.html"
    assert ", 1 of 1 accepted, not reviewed by a person)" in page.read_text(encoding="utf-8")
    automatic = tmp_path / "out/steps/label-errors/label_corrections.csv"
    (tmp_path / "mine.csv").write_text(automatic.read_text().replace("yes", "no"))
    make_report("--labels", "mine.csv", "--hand-in", "work")
    assert steps_that_ran(scripts) == ["corrected-labels"]
    assert scripts.calls[0][scripts.calls[0].index("--labels") + 1] == "mine.csv"
    assert "mine.csv, 0 of 1 accepted)" in page.read_text(encoding="utf-8")


BROKEN = ["", "[]", "null", "3", "{}", '{"seconds": "x"}', '{"seconds": null}', "[" * 10_000]


def test_step_whose_state_is_broken_runs_again(make_report, scripts, tmp_path):
    make_report()
    (tmp_path / "out/steps/attacks/step.json").unlink()
    for content in BROKEN:
        (tmp_path / "out/steps/data/step.json").write_text(content)
        scripts.stop_at = "adversarial.py"
        assert make_report()[0] == 130
        assert steps_that_ran(scripts) == ["data", "attacks"], content


def test_steps_that_took_no_possible_time_run_again(make_report, scripts, tmp_path):
    make_report()
    impossible = (float("nan"), float("inf"), -1.0, 1e300, True, "1", [1.0])
    done = steps_that_ran(scripts)
    for name, seconds in zip(done, impossible, strict=False):
        path = tmp_path / "out/steps" / name / "step.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds}))
    status, _, error = make_report()
    assert (status, error) == (0, "")
    assert steps_that_ran(scripts) == done[: len(impossible)]


def test_step_whose_result_is_gone_runs_again(make_report, scripts, tmp_path):
    make_report()
    (tmp_path / "out/steps/mismatch/evaluation.json").unlink()
    assert make_report()[0] == 0
    assert steps_that_ran(scripts) == ["mismatch"]


BROKEN_RESULTS = {
    "mismatch/evaluation.json": ["{", "{}"],
    "recipes/training.json": ["[]"],
    "recipes/predictions-final.csv": [
        "",
        "index;label;predicted\n0;cat;car\n",
        "index,label,predicted\n0,dog,car\n",
        "index,label,predicted\n0,car,car\n",
        "index,label,predicted\n0,\udcff\n",
    ],
    "data/inspectData.json": ["[]", '{"near_duplicates": [{"dev": 60, "train": 0}]}'],
    "attacks/4-fgsm.png": ["no image"],  # the last: there is none to restore
}


def test_broken_result_ends_with_one_line(make_report, tmp_path):
    make_report()
    for file, contents in BROKEN_RESULTS.items():
        path = tmp_path / "out/steps" / file
        whole = path.read_bytes() if path.exists() else b""
        for content in contents:
            path.write_text(content, encoding="utf-8", errors="surrogateescape")
            status, _, error = make_report()
            assert status == 2
            assert error.count("\n") == 1
            assert f"{path.name}: can't be read; delete" in error
        path.write_bytes(whole)


# ---- running at the same time, and failing --------------------------------------------------


def test_second_report_in_the_same_folder_is_refused(make_report, scripts, tmp_path):
    (tmp_path / "out").mkdir()
    with report.lock(tmp_path / "out"):
        status, _, error = make_report()
    assert status == 2
    assert error == "error: out: another report.py is writing to it\n"
    assert scripts.calls == []
    assert make_report()[0] == 0


def test_lock_of_a_killed_process_is_free(tmp_path):
    hold = "import report, sys, pathlib; lock = report.lock(pathlib.Path(sys.argv[1])); "
    hold += "print('locked', flush=True); input()"
    command = [sys.executable, "-c", hold, tmp_path]
    with subprocess.Popen(
        command, cwd=cli.PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="another report.py is writing"):
            report.lock(tmp_path)
        holder.kill()
    with report.lock(tmp_path):
        pass


def test_failing_script_ends_the_report_with_its_own_line(tmp_path, capfd, monkeypatch):
    (tmp_path / "fail.py").write_text(
        "import sys; print(1); print(2, file=sys.stderr); sys.exit(3)"
    )
    monkeypatch.setattr(report, "PROJECT", tmp_path)
    with (tmp_path / "printed.txt").open("wb") as printed, pytest.raises(SystemExit) as stop:
        report.run_script("fail.py", [], printed)
    assert stop.value.code == 3
    assert capfd.readouterr() == ("", "2\n")
    assert (tmp_path / "printed.txt").read_text() == "1\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--hand-in", "nowhere/mine"), "'nowhere/mine': no such folder"),
        (("--hand-in", "course/.."), "'course/..': no such folder, or no file name after it"),
        (("--hand-in", "caf\udce9"), "a zip file can't have such a name"),
        (("--labels", "nowhere.csv"), "nowhere.csv"),
        (("--checkpoint", "nowhere.ckpt"), "nowhere.ckpt: No such file"),
        (("--pixel-range", "0,1"), "--pixel-range goes with --checkpoint"),
        (("--out", "course/dev.pickle/out"), "course/dev.pickle/out: Not a directory"),
    ],
)
def test_mistakes_are_told_before_any_work(options, message, make_report, scripts):
    status, printed, error = make_report(*options)
    assert (status, printed) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert scripts.calls == []


# ---- handing in -----------------------------------------------------------------------------


def test_zip_holds_all_that_is_needed_and_no_images(make_report, tmp_path):
    make_report("--full", "--seed", "0,1")
    os.utime(tmp_path / "out/steps/label-errors/label_corrections.csv", (0, 0))  # before 1980
    (tmp_path / "out/steps/data/secret.png").write_bytes(b"")
    status, printed, _ = make_report("--hand-in", "work.zip", "--author", "Ada\x1b L.")
    assert status == 0
    assert "work.zip" in printed
    with zipfile.ZipFile(tmp_path / "work.zip") as archive:
        names = archive.namelist()
        about = archive.read("work/AUTHOR.txt").decode()
        page = archive.read("work/report/index.html")
    assert len(names) == len(set(names))
    for name in (
        *("Makefile", "LICENSE", "README.md", "requirements.txt", "pyproject.toml"),
        *("report.py", "report.html", "training.py", "common/train.py", "data/synthetic.py"),
        *("models/pre_trained.ckpt", "tests/conftest.py", "report/model.ckpt"),
        *("report/label_corrections.csv", "report/steps/comparisons.json"),
    ):
        assert f"work/{name}" in names
    assert {Path(name).suffix for name in names if "/data/" in name} <= {".py", ".md", ".json"}
    assert {Path(name).suffix for name in names if "/docs/" in name} == {".md", ".png"}  # no zip
    assert page == (tmp_path / "out/index.html").read_bytes()
    for title, *_ in Page(page.decode()).numbers:
        assert f"work/report/steps/{title.split(': ')[0]}" in names
    assert not any(name.endswith("step.json") for name in names)
    assert not any("steps/best" in name or "seed1" in name for name in names)  # earlier report's
    assert "author: Ada\N{REPLACEMENT CHARACTER} L.\n" in about
    assert "model: tuned.ckpt, recipe tuned, 2 epochs, seed 0, trained on course\n" in about
    settings = "name 'tuned', epochs 2, augment_from 0, cutout 0, label_filter 'filter'"
    assert f"settings: {settings}\n" in about
    assert "--hand-in work.zip --author" in about


def test_own_checkpoint_is_evaluated_and_packed(make_report, scripts, tmp_path):
    save_checkpoint(tmp_path / "mine.ckpt", build_model(), {})
    status, _, _ = make_report("--checkpoint", "mine.ckpt", "--hand-in", "work")
    assert status == 0
    call = scripts.calls[steps_that_ran(scripts).index("model")]
    assert call[call.index("--checkpoint") + 1] == "mine.ckpt"
    with zipfile.ZipFile(tmp_path / "work.zip") as archive:
        packed = archive.read("work/report/model.ckpt")
    assert packed == (tmp_path / "mine.ckpt").read_bytes()


@pytest.mark.parametrize("options", [(), ("--pixel-range", "0,1")])
def test_page_says_so_if_the_pixel_range_is_assumed(options, make_report, tmp_path):
    torch.save(build_model().state_dict(), tmp_path / "bare.ckpt")
    make_report("--checkpoint", "bare.ckpt", *options)
    text = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert ("bare.ckpt, of unknown training; assuming pixels in [-1, 1]" in text) == (not options)


# ---- the whole report, with the scripts themselves ------------------------------------------


def command(*options):
    fixed = [str(cli.PROJECT / "report.py"), "--data", "tiny", "--out", "out", "--quick"]
    return [sys.executable, *fixed, *options]


def write_tiny(folder):
    (folder / "tiny").mkdir()
    for split in SPLITS:
        dataset = make_dataset(split, counts=(60, 40, 30))  # enough for tuning.py
        write_course_pickle(folder / f"tiny/{split}.pickle", dataset)
    return folder


@pytest.fixture
def tiny(tmp_path):
    """Return a folder with a small data set in its folder `tiny`."""
    return write_tiny(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a folder with a small data set, a whole quick report on it, and its zip file."""
    folder = write_tiny(tmp_path_factory.mktemp("whole"))
    options = ("--full", "--hand-in", "work")
    done = subprocess.run(command(*options), cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


@pytest.mark.slow
def test_whole_report(whole):
    check_page(whole / "out")
    text = (whole / "out/index.html").read_text(encoding="utf-8")
    assert text.count("<img") >= 20
    assert re.findall(r"Figure \d\.", text) == [f"Figure {n}." for n in range(1, 6)]


@pytest.mark.slow
def test_packed_model_gives_the_numbers_of_the_page(whole, tmp_path):
    with zipfile.ZipFile(whole / "work.zip") as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path)
    options = ["--checkpoint", "report/model.ckpt", "--data", whole / "tiny", "--quick"]
    evaluation = [sys.executable, "evaluation.py", *options, "--out", "out"]
    subprocess.run(evaluation, cwd=tmp_path / "work", check=True, capture_output=True)
    files = (tmp_path / "work/out/evaluation.json", whole / "out/steps/model/evaluation.json")
    theirs, ours = (json.loads(file.read_text()) for file in files)
    for score in ("accuracy", "balanced_accuracy", "g_mean", "recall", "confusion"):
        assert theirs[score] == ours[score]


def start_report(folder, until):
    """Start a report in a process group of its own, and wait until a file is there."""
    log = (folder / "log").open("a")
    started = subprocess.Popen(
        command(), cwd=folder, stdout=log, stderr=log, start_new_session=True
    )
    while not until.exists():
        assert started.poll() is None, (folder / "log").read_text()
        time.sleep(0.1)
    return started


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_report_leaves_no_process_and_the_next_run_goes_on(number, tiny):
    steps = tiny / "out/steps"
    for step in ("label-errors", "recipes"):
        process = start_report(tiny, until=steps / step / "printed.txt")
        time.sleep(5)
        os.kill(process.pid, number)  # the report alone, not the scripts that it has started
        process.wait()
        deadline = time.monotonic() + 60
        while running_in(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert running_in(process.pid) == []
    log = (tiny / "log").read_text()
    assert log.count("What is in the data: done before") == 1
    assert "Traceback" not in log
    assert json.loads((steps / "label-errors/step.json").read_text())["seconds"] > 0
    assert json.loads((steps / "recipes/step.json").read_text())["seconds"] is None


def browse(*options):
    """Run Chromium without a window; return what it prints."""
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run([CHROMIUM, *fixed, *options], capture_output=True, timeout=120)
    return done.stdout.decode(errors="replace")


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_the_window_and_follows_light_and_dark(whole, tmp_path, width, dark):
    # Headless windows are never narrower than 500 pixels, a frame may be.
    probe = """<script>addEventListener("load", () => {
        const inside = document.querySelector("iframe").contentDocument;
        const color = getComputedStyle(inside.documentElement).backgroundColor;
        const card = getComputedStyle(inside.querySelector(".card")).backgroundColor;
        const page = inside.documentElement;
        document.title = [page.scrollWidth, page.clientWidth, color, card].join(" ");
    })</script>"""
    shutil.copy(whole / "out/index.html", tmp_path / "page.html")
    frame = f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
    (tmp_path / "frame.html").write_text(f"<title></title>{frame}{probe}", encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    options = ["--allow-file-access-from-files", "--window-size=1400,1000", "--dump-dom"]
    shown = browse(*scheme, *options, (tmp_path / "frame.html").as_uri())
    needed, given, red, card = re.search(
        r"<title>(\d+) (\d+) rgb\((\d+).* (rgb[^<]*)<", shown
    ).groups()
    assert int(given) == width
    assert int(needed) <= width
    assert (int(red) < 60) == dark
    assert card == "rgb(255, 255, 255)"


@pytest.mark.slow
@needs_chromium
def test_page_prints_on_a4(whole, tmp_path):
    pdf = tmp_path / "page.pdf"
    browse(f"--print-to-pdf={pdf}", (whole / "out/index.html").as_uri())
    sizes = set(re.findall(rb"/MediaBox ?\[([^\]]*)\]", pdf.read_bytes()))
    assert len(sizes) == 1
    width, height = map(float, sizes.pop().split()[2:])
    assert (round(width), round(height)) == (595, 842)
