"""The report as a whole: its steps, its page, what it packs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from conftest import make_dataset, write_course_pickle

import lr_analysis
import report
from common import console
from common.page import FORMATS, Files, joined, versus

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
VOID = {"meta", "img", "br", "link", "hr", "input"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a small data set and the quick report on it, made once."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "tiny").mkdir()
    for part in ("train", "dev"):
        write_course_pickle(folder / f"tiny/{part}.pickle", make_dataset(part))
    run_report(folder)
    return folder


def command(*options):
    script = str(console.PROJECT / "report.py")
    return [sys.executable, script, "--data", "tiny", "--out", "out", "--quick", *options]


def run_report(folder, *options):
    done = subprocess.run(command(*options), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Page(HTMLParser):
    """Reads a page: its numbers, its links, and whether each element is closed in its turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.numbers, self.errors, self.ids = [], [], [], [], []
        self.strong = []
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
        if self.open and self.open[-1] == "strong":
            self.strong.append(text)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append((tag, self.getpos()))


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "out/index.html").read_text(encoding="utf-8"))


def test_all_numbers_on_the_page_are_those_of_the_json_files(page, folder):
    assert len(page.numbers) > 100
    files = Files(folder / "out/steps")
    for title, value, text in page.numbers:
        file, path = title.split(": ")
        if path.endswith(", entries"):
            expected = len(files.value(file, path.removesuffix(", entries")))
        else:
            expected = files.value(file, path)
        assert float(value) == expected, title
        shown = text.replace("\N{MINUS SIGN}", "-")
        assert shown in {form.format(expected) for form in FORMATS.values()}, title


def test_page_is_whole_and_stands_alone(page, folder):
    assert page.errors == []
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "link")
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
            assert attributes["alt"]
        if tag == "a":
            assert attributes["href"].removeprefix("#") in page.ids
    text = (folder / "out/index.html").read_text(encoding="utf-8")
    assert "http" not in text
    assert "url(" not in text
    assert "mean nothing" in text  # a quick run says so


def test_page_has_each_figure_of_the_report(page):
    captions = [attributes["alt"] for tag, attributes in page.elements if tag == "img"]
    assert len(captions) >= 12
    numbered = [label for label in page.strong if label.startswith("Figure")]
    assert numbered == [f"Figure {number}." for number in range(1, 6)]


def test_second_run_takes_all_from_the_first_and_writes_the_same_page(folder):
    before = (folder / "out/index.html").read_text(encoding="utf-8")
    printed = run_report(folder)
    assert printed.count("done before") == len(report.steps_of(full=False))
    assert (folder / "out/index.html").read_text(encoding="utf-8") == before


def test_stopped_report_goes_on_where_it_was(folder, tmp_path, run_script, monkeypatch):
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    options = ("--data", "tiny", "--out", "out", "--quick")
    with monkeypatch.context() as patch:
        patch.setattr(lr_analysis, "main", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        status, _, error = run_script(report, *options)
    assert status == 130
    assert "stopped" in error
    assert not (tmp_path / "out/index.html").exists()
    status, printed, _ = run_script(report, *options)
    assert status == 0
    done = [line for line in printed.splitlines() if "done before" in line]
    assert len(done) == 6
    assert "Learning rates" not in "".join(done)
    numbers = {}
    for place in (folder, tmp_path):
        text = (place / "out/steps/recipes/training.json").read_text()
        numbers[place] = re.sub(r'"seconds": [\d.]+', "", text).replace(str(place), "")
    assert numbers[folder] == numbers[tmp_path]


def test_another_seed_runs_anew_and_what_does_not_need_it_too(folder, run_script, monkeypatch):
    steps = report.steps_of(full=True)
    assert [step.name for step in steps if step.full] == ["best", "tuning", "robust"]
    assert "--robust" in steps[-1].options

    class Arguments:
        data, data_seed, seed, quick, full = str(folder / "tiny"), 0, [0, 1], True, True
        device, fresh, hand_in = "cpu", False, None

    made = report.Report(folder / "out", Arguments)
    by_name = {step.name: step for step in steps}
    keys = {name: made.key_of(step) for name, step in by_name.items()}
    Arguments.seed = [0, 2]
    assert made.key_of(by_name["data"]) == keys["data"]  # it takes the first seed alone
    assert made.key_of(by_name["recipes"]) != keys["recipes"]
    assert made.key_of(by_name["attacks"]) != keys["attacks"]  # what it needs has changed
    assert len(set(keys.values())) == len(keys)


def test_sources_are_all_that_a_script_imports():
    names = {path.name for path in report.sources_of(console.PROJECT / "evaluation.py")}
    assert {"evaluation.py", "network.py", "dataset.py", "sketches.py", "results.py"} <= names
    assert not {"training.py", "trainer.py"} & names
    names = {path.name for path in report.sources_of(console.PROJECT / "adversarial.py")}
    assert {"training.py", "attacks.py", "evaluation.py"} <= names
    assert "lr_analysis.py" not in names


def test_packed_net_gives_the_numbers_of_the_page(folder, tmp_path):
    printed = run_report(folder, "--hand-in", str(tmp_path / "mine"))
    assert "mine.zip" in printed
    with zipfile.ZipFile(tmp_path / "mine.zip") as archive:
        assert archive.testzip() is None
        archive.extractall(tmp_path / "unpacked")
    unpacked = tmp_path / "unpacked/mine"
    assert (unpacked / "report/index.html").read_bytes() == (folder / "out/index.html").read_bytes()
    evaluation = [sys.executable, "evaluation.py", "--checkpoint", "report/net.ckpt", "--quick"]
    options = ["--data", str(folder / "tiny"), "--out", "out"]
    subprocess.run([*evaluation, *options], cwd=unpacked, check=True, capture_output=True)
    theirs = json.loads((unpacked / "out/evaluation.json").read_text())
    path = "recipes/tuned/runs/0"
    ours = Files(folder / "out/steps").value("recipes/training.json", path)
    for score in ("accuracy", "balanced_accuracy", "g_mean", "recall", "confusion"):
        assert theirs[score] == ours[score]


def test_bad_name_to_hand_in_is_refused_before_any_work(run_script):
    status, printed, error = run_script(report, "--data", "sketches", "--hand-in", "nowhere/mine")
    assert status == 2
    assert printed == ""
    assert "'nowhere/mine': no such folder" in error


def test_versus_claims_only_what_intervals_allow():
    def scores(low, high):
        return {"interval": {"g_mean": [low, high]}}

    assert versus(scores(0.1, 0.3), scores(0.4, 0.5), "g_mean") == "clearly higher"
    assert versus(scores(0.4, 0.5), scores(0.1, 0.3), "g_mean") == "clearly lower"
    assert versus(scores(0.1, 0.4), scores(0.3, 0.5), "g_mean") == "not clearly different"
    assert joined("clearly lower") == "clearly lower than"
    assert joined("not clearly different") == "not clearly different from"


def browse(*options):
    """Run Chromium without a window; return what it prints."""
    fixed = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run([CHROMIUM, *fixed, *options], capture_output=True, timeout=120)
    return done.stdout.decode(errors="replace")


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_page_fits_the_window_and_follows_light_and_dark(folder, tmp_path, width, dark):
    # Headless windows are never narrower than 500 pixels, a frame may be.
    probe = """<script>addEventListener("load", () => {
        const inside = document.querySelector("iframe").contentDocument.documentElement;
        const colour = getComputedStyle(inside).backgroundColor;
        document.title = [inside.scrollWidth, inside.clientWidth, colour].join(" ");
    })</script>"""
    page = (folder / "out/index.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    frame = f'<iframe src="page.html" style="width:{width}px;height:900px;border:0"></iframe>'
    (tmp_path / "frame.html").write_text(f"<title></title>{frame}{probe}", encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    options = ["--allow-file-access-from-files", "--window-size=1400,1000", "--dump-dom"]
    shown = browse(*scheme, *options, (tmp_path / "frame.html").as_uri())
    needed, given, red = re.search(r"<title>(\d+) (\d+) rgb\((\d+)", shown).groups()
    assert int(given) == width
    assert int(needed) <= width
    assert (int(red) < 60) == dark


@needs_chromium
def test_page_prints_on_a4(folder, tmp_path):
    pdf = tmp_path / "page.pdf"
    browse(f"--print-to-pdf={pdf}", (folder / "out/index.html").as_uri())
    sizes = set(re.findall(rb"/MediaBox ?\[([^\]]*)\]", pdf.read_bytes()))
    assert len(sizes) == 1
    width, height = map(float, sizes.pop().split()[2:])
    assert (round(width), round(height)) == (595, 842)


@pytest.mark.slow
def test_killed_reports_end_like_one_that_was_not(folder, tmp_path):
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    for seconds in (4.0, 7.0, 11.0):
        process = subprocess.Popen(command(), cwd=tmp_path, start_new_session=True)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    run_report(tmp_path)
    pages = [
        re.sub(r'<td class="number">\d+</td></tr>', "", text)
        for text in (Path(place, "out/index.html").read_text() for place in (folder, tmp_path))
    ]
    assert [Page(text).numbers for text in pages][0] == Page(pages[1]).numbers
