"""How the project is laid out: who imports whom, what an import does, which words are used."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from common.cli import PROJECT

import pytest

FOLDERS = ("common", "data", "tests", "benchmarks")  # with code of ours, beside the scripts
SCRIPTS = sorted(path.stem for path in PROJECT.glob("*.py"))
CODE = [file for folder in (".", *FOLDERS) for file in sorted((PROJECT / folder).glob("*.py"))]
DOCS = [PROJECT / "README.md", PROJECT / "data/README.md", *sorted(PROJECT.glob("docs/*.md"))]
TEXTS = [*(file for file in CODE if file != Path(__file__)), *PROJECT.glob("*.html")]

MAY_IMPORT = {
    "cli": set(),
    "plots": set(),
    "recipes": set(),
    "data": {"common.cli", "data.pickles", "data.cifar10", "data.synthetic"},  # prepared if asked
    "metrics": {"common.data"},  # the names of the classes
    "model": {"common.cli", "common.data", "data.pickles"},
    "attacks": {"common.data", "common.model"},
    "train": {
        f"common.{name}" for name in ("cli", "data", "metrics", "model", "attacks", "recipes")
    },
}

# Words of a dialect, and the words that papers and libraries use instead. A "net" in quotes may
# be the key of somebody's checkpoint.
DIALECT = {
    r"pictur\w*": "image",
    r"""(?<!["'.])nets?(?!["'])""": "model, network",
    r"judg\w*": "evaluate, out-of-fold predictions",
    r"sketch\w*": "synthetic",
    r"(?<!-)colour\w*": "color",
    r"\w+(normalis|initialis|optimis|generalis)\w*": "American spelling",
}
NAME = re.compile(r"\b[A-Za-z]\w*_\w+")  # with an underscore: certainly a name in the code
PATHS = re.compile(r"(?<![\w.>/])/(work|home|root|tmp|usr|Users|mnt|content)/|[A-Z]:\\\\?Users")


def imports_of(path: Path) -> set[str]:
    """Return the modules of ours that a file imports, anywhere in it, such as common.cli."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            whole = node.module in ("common", "data")
            found |= {f"{node.module}.{a.name}" for a in node.names} if whole else {node.module}
    ours = (*FOLDERS, *SCRIPTS)
    return {name for name in found if name.split(".")[0] in ours}


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_imports_common_and_nothing_else_of_ours(script):
    imported = imports_of(PROJECT / f"{script}.py")
    assert imported
    assert all(name.startswith("common.") for name in imported)


@pytest.mark.parametrize("module", [path.stem for path in sorted(PROJECT.glob("common/[!_]*.py"))])
def test_modules_of_common_import_one_way_only(module):
    assert imports_of(PROJECT / f"common/{module}.py") <= MAY_IMPORT[module]


def test_common_is_small_and_its_package_imports_nothing():
    assert len(list(PROJECT.glob("common/[!_]*.py"))) <= 8
    assert imports_of(PROJECT / "common/__init__.py") == set()


def test_scripts_that_prepare_data_stand_alone():
    for path in PROJECT.glob("data/*.py"):
        assert imports_of(path) <= {"common.cli", "data.synthetic"}, path.name


def test_imports_print_nothing_and_start_nothing(tmp_path):
    modules = [*SCRIPTS, *(f"common.{name}" for name in MAY_IMPORT)]
    modules += [f"data.{path.stem}" for path in PROJECT.glob("data/*.py")]
    code = f"""
import multiprocessing, sys, threading
sys.path.insert(0, {str(PROJECT)!r})
import {", ".join(modules)}
assert not multiprocessing.active_children()
assert threading.active_count() == 1, threading.enumerate()
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_an_example_and_the_shared_options(script, run_script):
    status, printed, _ = run_script(import_module(script), "--help")
    assert status == 0
    assert f"    python {script}.py" in printed
    for option in ("--data", "--seed", "--device", "--out", "--quick"):
        assert f"  {option}" in printed
    assert "(default: auto)" in printed


@pytest.mark.parametrize("path", [*TEXTS, *DOCS], ids=lambda path: path.name)
def test_words_are_those_of_the_field(path):
    text = path.read_text(encoding="utf-8")
    for word, better in DIALECT.items():
        found = re.search(rf"\b(?:{word})\b", text, re.IGNORECASE)
        assert not found, (
            f"{found[0]!r} in line {text.count(chr(10), 0, found.start()) + 1}: {better}"
        )


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_path_of_one_machine_is_in_the_code(path):
    assert not PATHS.search(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_names_in_the_docs_exist_in_the_code(path):
    code = "".join(
        file.read_text(encoding="utf-8")
        for file in [*CODE, *PROJECT.glob("*.html")]
        if file.parent.name != "tests"
    )
    prose = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    names = {name for quoted in re.findall(r"`[^`]+`", prose) for name in NAME.findall(quoted)}
    assert names
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", code)) == []
