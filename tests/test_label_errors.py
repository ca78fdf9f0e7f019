import csv
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import label_errors
from common import cli
from common.data import CLASS_NAMES, Correction, format_corrections, open_data, read_corrections
from common.recipes import LABEL_ERRORS
from common.train import FOLDS, IGNORE_INDEX, cross_val_logits

import numpy as np
import pytest
import torch
from conftest import make_dataset, make_images, write_course_pickle
from sklearn.metrics import precision_score, recall_score

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def sure_logits(labels, scale=6.0):
    """Return logits of models that are mostly sure of these labels."""
    noise = torch.randn(len(labels), 3, generator=torch.Generator().manual_seed(0))
    return scale * torch.nn.functional.one_hot(labels, 3) + noise


@pytest.fixture
def noisy(tmp_path):
    """A folder of data in which images 0, 1, 2 of the training set have wrong labels."""
    dataset = make_dataset("train", (90, 40, 30))
    true = dataset.labels.clone()
    labels = dataset.labels.clone()
    labels[:3] = (labels[:3] + 1) % 3
    folder = tmp_path / "noisy"
    folder.mkdir()
    write_course_pickle(folder / "train.pickle", replace(dataset, labels=labels))
    dev = make_dataset("dev", (20, 10, 8))
    write_course_pickle(folder / "dev.pickle", dev)
    true_labels = {"train": true.tolist(), "dev": dev.labels.tolist()}
    (folder / "true_labels.json").write_text(json.dumps(true_labels))
    return folder


@pytest.fixture
def models(monkeypatch, noisy):
    """Models that know the true labels, in place of trained ones."""
    true = torch.tensor(json.loads((noisy / "true_labels.json").read_text())["train"])
    monkeypatch.setattr(
        label_errors, "cross_val_logits", lambda recipe, dataset, seed, device: sure_logits(true)
    )


def read_rows(path):
    return list(csv.DictReader(path.read_text().splitlines()[1:]))


def test_wrong_labels_are_flagged_written_and_counted(noisy, models, run_script, tmp_path):
    status, out, _ = run_script(label_errors, "--data", noisy, "--out", tmp_path / "out")
    assert status == 0
    train = open_data(str(noisy)).load("train")
    rows = read_rows(tmp_path / "out" / "label_corrections.csv")
    assert {int(row["index"]) for row in rows} == {0, 1, 2}
    for row in rows:
        assert row["given"] == CLASS_NAMES[train.labels[int(row["index"])]]
        assert row["suggested"] == CLASS_NAMES[train.true_labels[int(row["index"])]]
    numbers = json.loads((tmp_path / "out" / "label_errors.json").read_text())
    assert numbers["flagged"] == 3
    everything = numbers["classes"]["all"]
    assert (everything["flagged_recall"], everything["flagged_precision"]) == (1, 1)
    assert everything["estimated_wrong"] == pytest.approx(3, abs=1)
    assert "label_review.html" in out


def test_recall_and_precision_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    dataset = make_dataset("train", (60, 40, 30))
    true = dataset.labels.clone()
    wrong = torch.from_numpy(generator.choice(130, 30, replace=False))
    true[wrong] = (true[wrong] + 1) % 3
    dataset = replace(dataset, true_labels=true)
    chosen = generator.choice(130, 40, replace=False)
    found = [
        Correction(int(index), int(dataset.labels[index]), 0, 0.9, accept=bool(number % 2))
        for number, index in enumerate(chosen)
    ]
    summary = label_errors.summarize(dataset, found, np.full((130, 3), 1 / 3))
    is_wrong = (dataset.labels != true).numpy()
    for kind, index in (("flagged", chosen), ("accepted", chosen[1::2])):
        selected = np.isin(np.arange(130), index)
        for name in (*CLASS_NAMES, "all"):
            own = np.ones(130, bool)
            if name != "all":
                own = (dataset.labels == CLASS_NAMES.index(name)).numpy()
            row = summary[name]
            assert row[kind] == selected[own].sum()
            recall = recall_score(is_wrong[own], selected[own])
            assert row[f"{kind}_recall"] == pytest.approx(recall)
            precision = precision_score(is_wrong[own], selected[own])
            assert row[f"{kind}_precision"] == pytest.approx(precision)
    assert summary["all"]["estimated_wrong"] == pytest.approx(130 * 2 / 3)


def test_decisions_of_the_user_are_kept(noisy, models, run_script, tmp_path):
    options = ("--data", noisy, "--out", tmp_path / "out")
    run_script(label_errors, *options)
    path = tmp_path / "out" / "label_corrections.csv"
    train = open_data(str(noisy)).load("train")
    first = read_corrections(path, train)
    own = [replace(each, accept=not each.accept) for each in first[:2]]
    own.append(Correction(7, int(train.labels[7]), (int(train.labels[7]) + 1) % 3, 0.5, True))
    path.write_text(format_corrections(train, own))
    status, out, _ = run_script(label_errors, *options)
    assert status == 0
    assert "3 rows" in out
    merged = {each.index: each for each in read_corrections(path, train)}
    assert [merged[each.index] for each in own] == own
    assert merged[first[2].index] == first[2]
    assert len(merged) == 4


def test_a_table_that_nobody_has_edited_holds_no_decisions(noisy, models, run_script, tmp_path):
    options = ("--data", noisy, "--out", tmp_path / "out")
    path, train = tmp_path / "out" / "label_corrections.csv", open_data(str(noisy)).load("train")
    (tmp_path / "out").mkdir()
    found = [Correction(5, int(train.labels[5]), 1 - int(train.labels[5]), 0.7)]
    path.write_text(format_corrections(train, found, reviewed=False))
    assert label_errors.read_decisions(path, train) == {}
    assert run_script(label_errors, *options)[0] == 0
    assert 5 not in [each.index for each in read_corrections(path, train)]
    assert json.loads((tmp_path / "out/label_errors.json").read_text())["reviewed"] == 0
    first = path.read_text()
    path.write_text(first, encoding="utf-16")  # as spreadsheets save "Unicode text"
    assert label_errors.read_decisions(path, train) == {}
    path.write_text(first.replace("yes", "no", 1))  # a person's edit
    assert len(label_errors.read_decisions(path, train)) == 3
    status, printed, _ = run_script(label_errors, *options)
    assert (status, read_rows(path)[0]["accept"]) == (0, "no")
    assert "3 rows" in printed
    run_script(label_errors, *options)  # and again: the merged table counts as reviewed
    assert read_rows(path)[0]["accept"] == "no"


def test_decisions_come_back_with_their_data(noisy, models, run_script, tmp_path):
    train, other = open_data(str(noisy)).load("train"), make_dataset("dev")
    path = tmp_path / "label_corrections.csv"
    for dataset in (train, other):
        decided = [Correction(1, int(dataset.labels[1]), 0, 0.9, False)]
        path.write_text(format_corrections(dataset, decided))
        label_errors.read_decisions(path, other if dataset is train else train)
    assert label_errors.read_decisions(path, train)[1].given == train.labels[1]
    assert label_errors.read_decisions(path, other)[1].given == other.labels[1]
    assert label_errors.read_decisions(path, train)[1].given == train.labels[1]


def test_decisions_are_kept_whatever_the_data_folder_is_called(tmp_path):
    dataset = replace(make_dataset(), name="my fingerprint set")
    decided = Correction(1, int(dataset.labels[1]), (int(dataset.labels[1]) + 1) % 3, 0.9, False)
    path = tmp_path / "label_corrections.csv"
    path.write_text(format_corrections(dataset, [decided]))
    assert label_errors.read_decisions(path, dataset) == {1: decided}


def test_decisions_for_other_data_are_set_aside(noisy, models, run_script, tmp_path):
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / "label_corrections.csv"
    other = make_dataset("dev")
    text = format_corrections(other, [Correction(1, int(other.labels[1]), 0, 0.9, False)])
    path.write_text(text)
    status, out, _ = run_script(label_errors, "--data", noisy, "--out", tmp_path / "out")
    assert status == 0
    assert (tmp_path / "out" / f"label_corrections-{other.fingerprint}.csv").read_text() == text
    assert len(read_rows(path)) == 3


def test_a_broken_file_of_decisions_is_reported_before_the_models_are_trained(
    noisy, run_script, monkeypatch, tmp_path
):
    monkeypatch.setattr(label_errors, "cross_val_logits", lambda *_: pytest.fail("too late"))
    (tmp_path / "out").mkdir()
    train = open_data(str(noisy)).load("train")
    text = format_corrections(train, [Correction(1, int(train.labels[1]), 0, 0.9, True)])
    (tmp_path / "out" / "label_corrections.csv").write_text(text.replace("yes", "perhaps"))
    status, _, error = run_script(label_errors, "--data", noisy, "--out", tmp_path / "out")
    assert status == 2
    assert "'perhaps'" in error


def test_a_file_of_decisions_that_excel_has_locked_is_reported_before_the_models_are_trained(
    noisy, run_script, monkeypatch, tmp_path
):
    monkeypatch.setattr(label_errors, "cross_val_logits", lambda *_: pytest.fail("too late"))
    path, opens = tmp_path / "out" / "label_corrections.csv", Path.open

    def locked(self, mode="r", **settings):
        if self == path and "r" not in mode:
            raise PermissionError(13, "Permission denied", str(self))
        return opens(self, mode, **settings)

    path.parent.mkdir()
    path.write_text(format_corrections(open_data(str(noisy)).load("train"), []))
    monkeypatch.setattr(Path, "open", locked)
    status, _, error = run_script(label_errors, "--data", noisy, "--out", tmp_path / "out")
    assert (status, error) == (2, f"error: {path}: Permission denied\n")


def test_models_at_chance_level_flag_nothing_and_it_is_said(
    noisy, monkeypatch, run_script, tmp_path
):
    logits = torch.randn(160, 3, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(label_errors, "cross_val_logits", lambda *_: logits)
    status, out, _ = run_script(label_errors, "--data", noisy, "--out", tmp_path / "out")
    assert status == 0
    assert "no better than chance" in out
    assert read_rows(tmp_path / "out" / "label_corrections.csv") == []
    assert json.loads((tmp_path / "out" / "label_errors.json").read_text())["chance_level"]


def test_of_near_duplicates_with_different_labels_the_less_likely_is_flagged():
    dataset = make_dataset("train", (20, 10, 10))
    images, labels = dataset.images.clone(), dataset.labels.clone()
    images[5] = images[3].flip(-1)
    labels[3], labels[5] = 0, 1
    dataset = replace(dataset, images=images, labels=labels)
    posterior = np.full((40, 3), 0.01)
    posterior[np.arange(40), labels] = 0.98
    posterior[5] = [0.1, 0.9, 0]
    (found,) = label_errors.find_corrections(dataset, posterior)
    assert (found.index, found.given, found.suggested, found.accept) == (5, 1, 0, False)


def test_accepted_corrections_leave_every_class_an_image():
    dataset = make_dataset("train", (20, 10, 3))
    posterior = np.tile([0.98, 0.01, 0.01], (33, 1))
    posterior[dataset.labels == 1] = [0.01, 0.98, 0.01]
    found = label_errors.find_corrections(dataset, posterior)
    assert [each.given for each in found] == [2, 2, 2]
    assert not any(each.accept for each in found)


def test_images_that_the_first_models_flag_are_not_trained_on_by_the_next(monkeypatch, train):
    calls = []

    def predict(function, jobs, device, description):
        for recipe, inside, outside, _, _ in jobs:
            calls.append((recipe, (inside.labels == IGNORE_INDEX).sum().item()))
            logits = sure_logits(true_labels_of(outside, train))
            if recipe == LABEL_ERRORS.label_filter:
                flagged = (outside == train.images[0]).all(dim=(1, 2, 3))
                logits[flagged] = logits[flagged].roll(1, dims=1)
            yield logits

    monkeypatch.setattr("common.train.parallel_map", predict)
    logits = cross_val_logits(LABEL_ERRORS, train, 0, torch.device("cpu"))
    first, second = calls[:FOLDS], calls[FOLDS:]
    assert first == [(LABEL_ERRORS.label_filter, 0)] * FOLDS
    assert [recipe for recipe, _ in second] == [LABEL_ERRORS] * FOLDS
    assert sorted(ignored for _, ignored in second) == [0, *[1] * (FOLDS - 1)]
    assert torch.equal(logits.argmax(dim=1), train.labels)  # the first pass only filters


def true_labels_of(images, dataset):
    """Return the labels of some of a data set's images."""
    same = (images[:, None] == dataset.images[None]).flatten(2).all(dim=2)
    return dataset.labels[same.float().argmax(dim=1)]


@pytest.mark.slow
def test_the_script_trains_and_writes_a_table_that_can_be_applied(noisy, run_script, tmp_path):
    status, _, error = run_script(
        label_errors, "--data", noisy, "--out", tmp_path / "out", "--quick"
    )
    assert status == 0, error
    dataset = open_data(str(noisy)).load("train", quick=True)
    read_corrections(tmp_path / "out/label_corrections.csv", dataset)
    assert (tmp_path / "out/label-errors-cat.png").stat().st_size > 0


# ---- the review page ------------------------------------------------------------------------


class Browser:
    """Chromium without a window, driven over pipes by the DevTools protocol."""

    def __init__(self, folder):
        to_read, write = os.pipe()
        read, to_write = os.pipe()
        command = (
            f"exec {CHROMIUM} --headless=new --no-sandbox --disable-gpu --remote-debugging-pipe "
            f"--user-data-dir={folder}/profile about:blank 3<&{to_read} 4>&{to_write}"
        )
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        self.input, self.output = os.fdopen(write, "wb"), os.fdopen(read, "rb")
        self.number, self.session, self.rest, self.events = 0, None, b"", []
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(each for each in targets if each["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)[
            "sessionId"
        ]

    def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.input.write(json.dumps(message).encode() + b"\0")
        self.input.flush()
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self):
        while b"\0" not in self.rest:
            chunk = os.read(self.output.fileno(), 2**16)
            assert chunk, "the browser ended"
            self.rest += chunk
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def wait_for(self, method):
        while not any(each.get("method") == method for each in self.events):
            self.events.append(self.read())
        self.events = [each for each in self.events if each.get("method") != method]

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)[
            "result"
        ].get("value")

    def press(self, key):
        text = {"text": key} if len(key) == 1 else {}
        code = {" ": 32, "ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38}
        code = {"windowsVirtualKeyCode": code.get(key, ord(key[0].upper()))}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text, **code)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, **code)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_the_review_page_in_a_browser(tmp_path):
    labels = torch.tensor([0] * 20 + [1] * 5 + [2] * 5)
    name = "</script><b>&amp;"
    dataset = replace(
        make_dataset(), name=name, images=make_images(labels), labels=labels, true_labels=None
    )
    corrections = [Correction(i, 0, 1, 0.9, accept=True) for i in range(4)]
    corrections += [Correction(i, 2, 0, 0.6, accept=False) for i in range(25, 28)]
    page = tmp_path / "label_review.html"
    page.write_text(label_errors.render_review(dataset, corrections), encoding="utf-8")

    browser = Browser(tmp_path)
    try:
        browser.call("Page.enable")
        browser.call("Runtime.enable")
        browser.call("Page.navigate", url=page.as_uri())
        browser.wait_for("Page.loadEventFired")
        assert name in browser.evaluate("document.title")
        assert browser.evaluate("document.querySelectorAll('b').length") == 0
        counts = "document.getElementById('counts').textContent"
        assert browser.evaluate(counts) == "accepted: cat 0 of 3, truck 0 of 0, car 4 of 4"
        assert browser.evaluate("[...document.images].every(i => i.naturalWidth == 32)")
        focused = "document.activeElement.dataset.index"

        # The cats come first: accept 25 and move on, reject 26 and move on, change 27.
        browser.evaluate("document.querySelector('.tile').focus()")
        for key in "yn ":
            browser.press(key)
        assert browser.evaluate(focused) == "27"
        assert browser.evaluate(counts) == "accepted: cat 2 of 3, truck 0 of 0, car 4 of 4"
        browser.press("ArrowDown")
        assert browser.evaluate(focused) == "2"
        browser.press("ArrowLeft")
        browser.press("n")
        browser.evaluate("document.querySelector('[data-index=\"0\"]').click()")
        assert browser.evaluate(counts) == "accepted: cat 2 of 3, truck 0 of 0, car 2 of 4"
        assert browser.evaluate("document.querySelectorAll('.tile[tabindex=\"0\"]').length") == 1

        browser.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.evaluate("document.getElementById('save').click()")
        browser.wait_for("Page.downloadWillBegin")
        while "completed" not in json.dumps(browser.events):
            browser.events.append(browser.read())

        # Opened again, the page has the decisions; made anew, it has those of the file.
        rejected = [replace(each, accept=False) for each in corrections]
        for opened, accepted in (
            (corrections, "cat 2 of 3, truck 0 of 0, car 2 of 4"),
            (rejected, "cat 0 of 3, truck 0 of 0, car 0 of 4"),
        ):
            page.write_text(label_errors.render_review(dataset, opened), encoding="utf-8")
            browser.call("Page.navigate", url=page.as_uri())
            browser.wait_for("Page.loadEventFired")
            assert browser.evaluate(counts) == f"accepted: {accepted}"
        errors = [
            each for each in browser.events if each.get("method") == "Runtime.exceptionThrown"
        ]
        assert not errors
    finally:
        browser.process.kill()
        browser.process.wait()
    saved = {
        each.index: each.accept for each in read_corrections(tmp_path / label_errors.FILE, dataset)
    }
    assert saved == {0: False, 1: False, 2: True, 3: True, 25: True, 26: False, 27: True}
    assert (tmp_path / label_errors.FILE).read_text() == format_corrections(
        dataset, [replace(each, accept=saved[each.index]) for each in corrections]
    )


def test_the_review_page_is_one_file_that_needs_no_network():
    page = (cli.PROJECT / "label_review.html").read_text()
    assert "http" not in page
    assert 'src="data:' in page
