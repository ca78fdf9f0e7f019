import argparse
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from common import cli, plots
from common.cli import PROJECT, Results, UserError

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

REPLACED = "\N{REPLACEMENT CHARACTER}"


# ---- what is printed ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, ±0.1 é שלום 猫", "plain, ±0.1 é שלום 猫"),
        ("two\nlines", "two\nlines"),
        ("\x1b[2J\x07\rhidden", f"{REPLACED}[2J{REPLACED * 2}hidden"),
        ("\udc80\u202efdp.exe", f"{REPLACED * 2}fdp.exe"),
    ],
)
def test_text_can_not_steer_the_terminal(text, expected):
    assert cli.clean(text) == expected


def test_a_name_stays_in_one_line():
    assert cli.one_line(Path("a\n\x1berror: b")) == f"a {REPLACED}error: b"


def test_an_error_that_can_not_be_printed_still_decides_the_exit_status(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    def fail():
        raise UserError("wrong")

    monkeypatch.setattr("sys.stderr", Full())
    with pytest.raises(SystemExit) as stop:
        cli.run(fail)
    assert stop.value.code == 2


def deep_list(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, "None"),
        (True, "True"),
        (-3, "-3"),
        (0.5, "0.5"),
        (float("nan"), "nan"),
        ("cat", "'cat'"),
        (10**5000, "a very large int"),
        ("x" * 3_000_000, repr("x" * 60)),
        ("\x1b[2J\udc80\nerror", repr(f"{REPLACED}[2J{REPLACED}\nerror")),
        (deep_list(100_000), "of type list"),
        (np.zeros(3), "of type ndarray"),
        (b"\x1b", "of type bytes"),
    ],
    ids=range(12),
)
def test_a_value_from_a_file_is_shown_in_a_few_printable_characters(value, expected):
    assert cli.safe_repr(value) == expected
    assert cli.safe_repr(value).isprintable()


def test_table_aligns_names_left_and_numbers_right_and_is_cleaned(capsys):
    cli.print_table(["a", "number"], [["long name", "1"], ["b\x1b", "22"]])
    assert capsys.readouterr().out.splitlines() == [
        "a          number",
        "---------  ------",
        "long name       1",
        f"b{REPLACED}             22",
    ]


# ---- options --------------------------------------------------------------------------------


def parse(*options, **settings):
    parser = cli.make_parser("A script.", **settings)
    cli.add_checkpoint_option(parser, "none is used")
    return parser.parse_args(options)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0", [0]), ("3,1,2", [3, 1, 2]), ("1,1,0,1", [1, 0]), ("4294967295", [2**32 - 1])],
)
def test_seeds_keep_their_order_and_count_once(text, seeds):
    assert parse("--seed", text, several_seeds=True).seed == seeds


@pytest.mark.parametrize("text", ["", "1,", "a", "-1", "1.0", "1 2", "٣", "4294967296", "9" * 5000])
@pytest.mark.parametrize("several_seeds", [False, True])
def test_what_is_no_seed_is_refused(text, several_seeds):
    with pytest.raises(UserError, match="argument --seed: "):
        parse(f"--seed={text}", several_seeds=several_seeds)


def test_defaults():
    arguments = parse(several_seeds=True)
    assert arguments == argparse.Namespace(
        data="auto",
        seed=[0],
        device="auto",
        out=None,
        quick=False,
        checkpoint=None,
        pixel_range=None,
    )


def test_what_writes_no_files_has_no_option_for_their_folder():
    assert "out" not in parse(writes_files=False)


@pytest.mark.parametrize(("text", "expected"), [("-1,1", (-1.0, 1.0)), ("0,1", (0.0, 1.0))])
def test_pixel_range_is_one_of_the_two_in_use(text, expected):
    assert parse("--pixel-range", text).pixel_range == expected
    for wrong in ("1,0", "0,255", "-1", "0,1,", ""):
        with pytest.raises(UserError, match="is neither 0,1 nor -1,1"):
            parse(f"--pixel-range={wrong}")


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (cli.natural_number, {"0": 0, "17": 17}, ["-1", "1e3", "0x1", ""]),
        (cli.positive_int, {"1": 1, "17": 17}, ["0", "-1", "2.5"]),
        (cli.epoch_count, {"1": 1, "5000": 5_000}, ["0", "5001"]),
        (
            cli.positive_float,
            {"1e-3": 0.001, "2": 2.0},
            ["0", "-1", "nan", "inf", "1e999", "a", ""],
        ),
        (cli.epsilon, {"0.05": 0.05, "1": 1.0}, ["0", "-0.1", "1.01", "8/255"]),
    ],
)
def test_numbers_are_parsed_or_refused(kind, right, wrong):
    assert {text: kind(text) for text in right} == right
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(text)


@pytest.mark.parametrize(
    "options", [("--colour", "red"), ("--see", "3"), ("--seed",), ("extra",), ("--device",)]
)
def test_a_wrong_option_is_answered_with_the_way_to_help(options):
    with pytest.raises(UserError, match=r"\(--help lists the options\)$"):
        parse(*options)


# ---- how a script ends ----------------------------------------------------------------------


def end_of(main, capsys):
    """Return exit status and stderr of a script that does `main`."""
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (UserError("a.ckpt: is\nno \x1b[2J file"), 2, f"error: a.ckpt: is no {REPLACED}[2J file\n"),
        (KeyboardInterrupt(), 130, "\nstopped; files that were already written are complete\n"),
        (OSError(28, "No space left on device"), 2, "error: output: No space left on device\n"),
        (PermissionError(13, "Permission denied", "x\x07"), 2, f"error: x{REPLACED}: Permission"),
        (OSError("odd"), 2, "error: output: failed\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_expected_end_is_one_line_and_a_status(error, status, printed, capsys):
    def main():
        raise error

    code, shown = end_of(main, capsys)
    assert code == status
    assert shown.startswith(printed)
    assert shown.strip().count("\n") == 0


def test_a_bug_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


def start(code, **settings):
    """Start a Python script with these lines as its main()."""
    script = "import os, sys, time\nfrom common import cli\ndef main():\n"
    script += "".join(f"    {line}\n" for line in code.splitlines()) + "cli.run(main)\n"
    settings = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        # A shell that runs tests in the background lets them ignore Ctrl-C.
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    } | settings
    environment = os.environ | {"PYTHONPATH": str(PROJECT)} | settings.pop("env", {})
    return subprocess.Popen([sys.executable, "-c", script], env=environment, **settings)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_script_cleans_up_and_says_one_line(sent, tmp_path):
    process = start(
        "from pathlib import Path\n"
        "def write(part):\n"
        "    part.touch()\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "cli.write_atomic(Path('a.txt'), write)",
        cwd=tmp_path,
    )
    process.stdout.readline()
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(sent)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert error.strip() == "stopped; files that were already written are complete"
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early_is_no_error():
    process = start("while True: cli.say('line')")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == ""


def test_a_stream_that_can_not_be_reconfigured_as_in_idle_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    cli.run(lambda: cli.say("hello"))
    assert sys.stdout.getvalue() == "hello\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only POSIX has names that are not text")
def test_a_data_folder_with_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = {"name": "data", "path": os.fsdecode(b"/caf\xe9"), "splits": {}}
    for _ in range(2):
        results = Results(argparse.Namespace(out=None, quick=False), data)
        assert results.folder == Path("results/data")


def test_results_are_found_again_after_project_and_data_were_moved_together(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for move in (False, True):
        project = tmp_path / "project"
        if move:
            project = project.rename(tmp_path / "elsewhere/project")
        monkeypatch.chdir(project)
        data = {"name": "data", "path": str(project / "data"), "splits": {}}
        results = Results(argparse.Namespace(out=None, quick=False), data)
        assert results.folder == Path("results/data")
    (results.folder / cli.OWNER).write_text(data["path"])  # as earlier versions did
    results = Results(argparse.Namespace(out=None, quick=False), data)
    assert results.folder == Path("results/data")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with Path("/dev/full").open("w") as full:
        process = start("cli.say('hello')", stdout=full)
        error = process.communicate(timeout=30)[1]
    assert (process.returncode, error) == (2, "error: output: No space left on device\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has /dev/full")
def test_an_error_is_still_one_line_if_stdout_is_full():
    code = "cli.say('hello')\nraise cli.UserError('no such file')"
    with Path("/dev/full").open("w") as full:
        process = start(code, stdout=full, env={"PYTHONUNBUFFERED": ""})
        error = process.communicate(timeout=30)[1]
    assert (process.returncode, error) == (2, "error: no such file\n")


def test_closed_streams_and_old_terminals_are_no_reason_to_fail():
    closed = start("cli.say('a')\ncli.say('b', error=True)", preexec_fn=lambda: os.closerange(1, 3))
    old = start("cli.say('± שלום')", env={"PYTHONIOENCODING": "cp1252"}, text=False)
    assert old.communicate(timeout=30) == (b"\xb1 ????\n", b"")
    closed.communicate(timeout=30)
    assert (closed.returncode, old.returncode) == (0, 0)


def test_a_script_ends_with_the_one_that_started_it():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    process = start("time.sleep(60)", env={cli.PARENT: str(gone.pid)})
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert error == ""  # the one that started it says that it was stopped


def test_what_is_no_process_is_no_parent(monkeypatch, capsys):
    monkeypatch.setenv(cli.PARENT, "abc")
    cli.run(lambda: cli.say("hello"))
    assert capsys.readouterr() == ("hello\n", "")


def test_an_interrupt_during_the_imports_prints_no_traceback():
    code = "import common, signal; signal.raise_signal(signal.SIGINT)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # if run by `make &`
    )
    assert done.stderr == "\nstopped\n"
    assert done.returncode != 0


def test_an_interrupt_while_an_object_is_deleted_is_not_lost():
    process = start(
        "class Deleted:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "import signal\n"
        "Deleted()\n"
        "time.sleep(60)"
    )
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert error.strip() == "stopped; files that were already written are complete"


# ---- files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_file_is_written_whole_or_not_at_all(error, tmp_path):
    path = tmp_path / "file.txt"
    cli.write_atomic(path, lambda part: part.write_text("old"))
    assert path.read_text() == "old"

    def fail(part):
        part.write_text("half")
        assert part.suffix == ".txt"  # some writers choose their format by it
        raise error

    raised = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(raised) as failure:
        cli.write_atomic(path, fail)
    if raised is UserError:
        assert str(failure.value) == f"{path}: can't be written: No space left on device"
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]
    cli.write_atomic(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new"


@pytest.mark.parametrize(("locked", "code"), [(2, 32), (2, 5), (99, 32), (1, None)])
def test_a_file_that_windows_locks_for_a_moment_is_written(locked, code, tmp_path, monkeypatch):
    rename, tries = Path.replace, []

    def replace(source, path):
        tries.append(path)
        if len(tries) <= locked:
            error = PermissionError(13, "Access is denied")
            error.winerror = code
            raise error
        return rename(source, path)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    if locked == 2:
        cli.write_text(tmp_path / "file.txt", "new")
        assert (tmp_path / "file.txt").read_text() == "new"
    else:
        with pytest.raises(UserError, match=r"file\.txt: can't be written: Access is denied$"):
            cli.write_text(tmp_path / "file.txt", "new")
        assert len(tries) == (7 if code else 1)
    assert not list(tmp_path.glob(".*"))


def test_leftovers_of_dead_processes_only_are_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        f".final.{dead.pid}.part.ckpt": False,
        f".training.{os.getpid()}.part.json": True,
        f".{dead.pid}.txt": True,
        f"a.{dead.pid}.part.txt": True,
        ".notes.part": True,
        ".a.99999999999999999999.part": True,
    }
    for name in names:
        (tmp_path / name).touch()
    folder = f".folder.{dead.pid}.part"
    (tmp_path / folder).mkdir()
    names[folder] = True
    cli.remove_leftovers(tmp_path)
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_files_are_read_up_to_a_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 2**20)
    assert cli.read_bytes(tmp_path / "file", 2**20) == b"x" * 2**20
    (tmp_path / "file").write_bytes(b"x" * (2**20 + 1))
    with pytest.raises(UserError, match="file: is larger than 1 MB, the most that is read"):
        cli.read_bytes(tmp_path / "file", 2**20)
    with pytest.raises(UserError, match="missing: No such file or directory"):
        cli.read_bytes(tmp_path / "missing", 10)


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux' files of processes"
)
def test_a_file_that_holds_more_than_its_size_is_not_read_on():
    with pytest.raises(UserError, match="still being written"):
        cli.read_bytes(Path("/proc/self/status"), 10)  # its size is 0


@pytest.mark.parametrize("content", [b"", b"[1", b"[" * 100_000, b"9" * 5000, b"\xff"])
def test_a_broken_json_file_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: not a JSON file, or cut short"):
        cli.read_json(tmp_path / "a.json")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="only Unix has /dev/zero")
def test_what_has_no_end_is_not_read():
    with pytest.raises(UserError, match="^/dev/zero: not a file on a disk"):
        cli.read_bytes(Path("/dev/zero"), 2**20)


def test_a_pipe_is_not_read(make_pipe, tmp_path):
    make_pipe(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: not a file on a disk$"):
        cli.read_bytes(tmp_path / "pipe", 2**20)


# ---- results --------------------------------------------------------------------------------

DATA = {"name": "course", "splits": {"dev": {"fingerprint": "0123456789ab"}}}


def make_results(out=None, quick=False, data=DATA):
    return Results(argparse.Namespace(out=out, quick=quick, seed=3), data)


def test_results_go_to_a_folder_of_their_data_and_quick_ones_elsewhere(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert make_results().folder == Path("results/course")
    assert capsys.readouterr().out == ""
    assert make_results(quick=True).folder == Path("results/course-quick")
    assert "QUICK DRY RUN" in capsys.readouterr().out
    assert make_results(tmp_path / "a/b", quick=True).folder == tmp_path / "a/b"
    assert (tmp_path / "a/b").is_dir()


def test_data_with_a_long_name_has_a_folder_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for letter in ("x", "\N{CAT FACE}"):
        results = make_results(quick=True, data=DATA | {"name": 250 * letter})
        assert results.folder.is_dir()
        assert results.folder.name == cli.MAX_FOLDER_NAME * letter + "-quick"


def test_a_folder_that_can_not_be_written_is_found_out_at_once(tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/out"):
        with pytest.raises(UserError, match=f"^--out {out}: can't be written: "):
            make_results(out)


def test_json_says_where_numbers_come_from_and_has_no_nan(tmp_path):
    numbers = {
        "g_mean": np.float64(0.5),
        "recall": {"cat": float("nan"), "car": [float("inf"), 1.0]},
        "path": Path("a/b"),
        "runs": (1, None, True),
    }
    make_results(tmp_path).save_json("training", numbers)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads((tmp_path / "training.json").read_text(), parse_constant=refuse)
    assert found["g_mean"] == 0.5
    assert found["recall"] == {"cat": None, "car": [None, 1.0]}
    assert found["path"] == os.path.join("a", "b")  # noqa: PTH118
    assert found["runs"] == [1, None, True]
    assert (found["step"], found["data"], found["settings"]["seed"]) == ("training", DATA, 3)
    assert found["versions"].keys() >= {"python", "torch", "numpy"}


def test_results_list_what_was_written_and_is_still_there(tmp_path, capsys):
    results = make_results(tmp_path)
    for _ in range(2):
        results.save_text("a.txt", "± text")
    (tmp_path / "b.png").touch()
    results.save_figure("b", None)
    results.print_written()
    assert capsys.readouterr().out.split("\n")[1:3] == [f"written to {tmp_path}:", "  a.txt"]
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt"}
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "± text"


def test_two_data_sets_of_one_name_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = argparse.Namespace(out=None, quick=False)
    folders = [
        Results(options, DATA | {"path": path}).folder.name
        for path in ("a/course", "b/course", "a/course", "c/course")
    ]
    assert folders == ["course", "course-2", "course", "course-3"]
    (tmp_path / "results/older").mkdir()  # by a version that did not note the data's folder
    assert Results(options, {"name": "older", "splits": {}}).folder.name == "older"


def test_a_figure_without_images_is_a_drawing_too(tmp_path):
    results, figure = make_results(tmp_path), Figure()
    results.save_figure("a", figure)
    first = (tmp_path / "a.svg").read_bytes()
    results.save_figure("a", figure)
    assert b"<svg" in first and (tmp_path / "a.svg").read_bytes() == first  # no date in it
    figure.subplots().imshow(np.zeros((2, 2)))
    results.save_figure("a", figure)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png"}


ODD_NAMES = ["a$b_{$c", r"cost\$x$", "$$", "plain"]


@pytest.mark.parametrize("name", [*ODD_NAMES, "猫"])
def test_figures_name_their_data_whatever_it_is_called(name, tmp_path, recwarn):
    results = make_results(tmp_path, quick=True, data=DATA | {"name": name})
    figure = Figure()
    results.save_figure("1-classes", figure)
    assert (tmp_path / "1-classes.png").stat().st_size > 1000
    assert not recwarn.list  # of letters that the font lacks
    assert figure.get_supxlabel() == (
        f"QUICK DRY RUN, numbers mean nothing.  Data: {name}, dev 0123456789ab"
    )


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_literal_name_is_drawn_letter_by_letter(name):
    def pixels(text, **settings):
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(Figure(figsize=(3, 0.5)))
        canvas.figure.text(0.1, 0.4, text, **settings)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())

    drawn = pixels(plots.literal(name))
    assert np.array_equal(drawn, pixels(name, parse_math=False))
    assert drawn.min() < 128


def test_a_matplotlibrc_in_the_current_folder_changes_no_figure(tmp_path):
    (tmp_path / "matplotlibrc").write_text("figure.facecolor: red")
    with mpl.rc_context():
        mpl.rc_file(tmp_path / "matplotlibrc")  # as matplotlib does when it is imported
        importlib.reload(plots)
        assert plots.new_figure()[0].get_facecolor() == (1, 1, 1, 1)
