"""Each script, killed and terminated at random moments: nothing is left, and the next run is right.

The moments are drawn anew for each machine: they are fractions of what a whole run takes there.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.cli import PROJECT
from data import synthetic

import pytest
from conftest import running_in

SCRIPTS = {
    "inspectData": [],
    "evaluation": [],
    "training": ["--recipe", "naive,final", "--seed", "0,1"],
    "label_errors": [],
    "tuning": [],
    "lr_analysis": ["--rates", "0.01", "0.001"],
    "adversarial": [],
    "report": [],
}
# A stopped search goes on, and label corrections that were written count as the user's decisions:
# what the next run finds need not be what a run that was never stopped has found.
GOES_ON = ("label_errors", "tuning", "report")
SECONDS_TO_END = 60


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a folder with a few synthetic images, just enough for each script."""
    folder, splits = tmp_path_factory.mktemp("data"), {}
    for number, (split, counts) in enumerate({"train": (50, 24, 18), "dev": (16, 9, 8)}.items()):
        labels = synthetic.np.repeat([0, 1, 2], counts)
        splits[split] = (synthetic.draw_images(labels, number), labels, labels)
    synthetic.write_course_form(folder, splits)
    return folder


def start(script, data, out, folder):
    """Start a script in a process group of its own; its messages go to `<out>.log`."""
    (folder / "tmp").mkdir(exist_ok=True)
    options = [*SCRIPTS[script], "--data", data, "--out", out, "--quick", "--device", "cpu"]
    with (folder / f"{out}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, PROJECT / f"{script}.py", *options],
            cwd=folder,
            env=os.environ | {"TMPDIR": str(folder / "tmp")},
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def is_torchs(path):
    """Return whether torch made a path: a cache, or in old versions a module of its own."""
    inside = path.iterdir() if path.is_dir() else []
    return "torchinductor" in path.name or any("_remote_module" in each.name for each in inside)


def numbers_in(folder):
    """Return the content of all JSON files but for times and for where the files are."""

    def without_times(value):
        if isinstance(value, dict):
            kept = {key: each for key, each in value.items() if key not in ("seconds", "out")}
            return {key: without_times(each) for key, each in kept.items()}
        return [without_times(each) for each in value] if isinstance(value, list) else value

    files = sorted(folder.rglob("*.json"))
    return {file.name: without_times(json.loads(file.read_text())) for file in files}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stopped_script_leaves_nothing_and_the_next_run_is_right(script, data, tmp_path):
    whole, stopped, moments = tmp_path / "whole", tmp_path / "stopped", random.Random(script)
    begun = time.monotonic()
    assert start(script, data, "whole", tmp_path).wait() == 0
    duration = time.monotonic() - begun

    for sent in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
        process = start(script, data, "stopped", tmp_path)
        time.sleep(moments.uniform(0.1, 0.95) * duration)
        process.send_signal(sent)  # to the script alone, not to those that it has started
        status, deadline = process.wait(), time.monotonic() + SECONDS_TO_END
        # It may have ended before; and while Python still imports, SIGTERM ends it at once.
        assert status in ((0, -sent) if sent == signal.SIGKILL else (0, -sent, 130))
        while running_in(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert running_in(process.pid) == []
        if sent == signal.SIGTERM:  # after a SIGKILL, Python's own helper may complain
            log = (tmp_path / "stopped.log").read_text()
            assert "Traceback" not in log and "leaked" not in log
        for file in stopped.rglob("[!.]*.json"):
            json.loads(file.read_text())

    assert start(script, data, "stopped", tmp_path).wait() == 0
    assert "Traceback" not in (tmp_path / "stopped.log").read_text()
    assert files_in(stopped) == files_in(whole)
    assert [path for path in (tmp_path / "tmp").iterdir() if not is_torchs(path)] == []
    numbers, expected = numbers_in(stopped), numbers_in(whole)
    if script in GOES_ON:
        numbers, expected = (
            {name: list(n) for name, n in each.items()} for each in (numbers, expected)
        )
    assert numbers == expected
