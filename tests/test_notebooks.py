"""The notebooks: they run, are committed as they were rendered, and stay thin."""

import ast
import base64
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SCRIPT = ROOT / "scripts" / "notebooks.py"
DATA = os.environ.get("FUNCLOSS_DATA_DIR", "")  # before a fixture hides it
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str = "code") -> list[dict]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def pictures(cell: dict) -> list[str]:
    found = [output.get("data", {}).get("image/png", "") for output in cell["outputs"]]
    return [picture for picture in found if picture]


def texts(cell: dict) -> list[str]:
    """Return what a code cell printed or showed, pictures aside."""
    said = []
    for output in cell["outputs"]:
        shown = {**output.get("data", {}), "printed": output.get("text", "")}
        said += ["".join(text) for kind, text in shown.items() if kind != "image/png"]
    return said


def python(cell: dict) -> ast.Module:
    """Return the Python of a cell; lines of magic and shell are none, a cell of magic has none."""
    text = source(cell)
    if text.startswith("%%"):
        return ast.parse("")
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", text, flags=re.M))


def render(*words, env=None):
    """Run the script; return its exit code, stdout and stderr."""
    command = [sys.executable, SCRIPT, *words]
    env = {**os.environ, **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)
    return done.returncode, done.stdout, done.stderr


def write(path: Path, *sources: str) -> Path:
    """Write a notebook of code cells that was never run, with metadata as an editor leaves it."""
    code = [
        {
            "cell_type": "code",
            "id": f"cell-{i}",
            "execution_count": None,
            "metadata": {"tags": ["kept"], "execution": {"iopub.status.busy": "2020-01-01"}},
            "outputs": [],
            "source": text,
        }
        for i, text in enumerate(sources, 1)
    ]
    metadata = {"language_info": {"name": "python", "version": "3.0.0"}, "widgets": {}}
    notebook = {"cells": code, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook))
    return path


# They run


@pytest.mark.slow
@each_notebook
def test_it_runs_from_top_to_bottom(path, tmp_path):
    pytest.importorskip("nbclient", reason="notebooks need the extra notebooks")
    copy = shutil.copy(path, tmp_path)
    code, said, errors = render(copy, env={"FUNCLOSS_DATA_DIR": DATA} if DATA else None)
    assert code == 0, errors
    assert re.fullmatch(rf"{path.stem}: \d+ s\n", said)
    for cell in cells(Path(copy)):
        assert "Warning" not in "".join(texts(cell)), source(cell)


# As committed


def test_there_are_notebooks():
    assert NOTEBOOKS


@each_notebook
def test_it_was_rendered_in_one_run_without_an_error(path):
    code = cells(path)
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert "stream" in kinds
    assert "error" not in kinds
    streams = {output.get("name") for cell in code for output in cell["outputs"]}
    assert "stderr" not in streams
    assert any(pictures(cell) for cell in code)


@each_notebook
def test_what_it_shows_names_no_machine(path):
    machine = platform.node() or "localhost"
    for cell in cells(path):
        for text in (source(cell), *texts(cell)):
            assert not re.search(r"(?<![\w.])/(home|root|tmp|usr|work|Users|var)/", text), text
            assert not re.search(r"0x[0-9a-f]{6,}|localhost|\b[A-Z]:\\Users", text), text
            assert not re.search(rf"\b{re.escape(machine)}\b", text), text


@each_notebook
def test_it_says_no_more_than_can_be_read(path):
    assert path.stat().st_size < 1_000_000
    for cell in cells(path):
        for text in texts(cell):
            assert text.count("\n") <= 100, source(cell)
        for picture in pictures(cell):
            assert len(base64.b64decode(picture)) < 60_000, source(cell)


@each_notebook
def test_it_shows_the_library_and_defines_little(path):
    trees = [python(cell) for cell in cells(path)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    modules |= {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    assert any(re.match(r"funcloss\b", module) for module in modules)
    assert not any("._" in module for module in modules)
    kinds = (ast.FunctionDef, ast.ClassDef)
    assert sum(isinstance(node, kinds) for tree in trees for node in tree.body) <= 7


@each_notebook
def test_its_links_are_relative_and_lead_somewhere(path):
    said = "\n".join(source(cell) for cell in cells(path, "markdown"))
    targets = re.findall(r"\]\(([^)\s]+)\)", said)
    assert targets
    for target in targets:
        assert not re.match(r"\w+:|[/#]", target), target
        assert (path.parent / target.partition("#")[0]).exists(), target


@each_notebook
def test_its_cells_have_names_and_its_metadata_does_not_change_from_run_to_run(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    names = [cell["id"] for cell in notebook["cells"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z]+-\d+", name) for name in names)
    assert not any(set(cell["metadata"]) - {"tags"} for cell in notebook["cells"])


# The script that renders them


def test_the_script_fills_in_what_cells_say_and_nothing_of_when(tmp_path):
    pytest.importorskip("nbclient", reason="notebooks need the extra notebooks")
    printing = "import sys\nfor i in range(3):\n    print(i)\n    sys.stdout.flush()"
    path = write(tmp_path / "small.ipynb", printing, "import os\nos.listdir('.')", "1 + 1")
    code, said, errors = render(path)
    assert (code, errors) == (0, "")
    assert re.fullmatch(r"small: \d+ s\n", said)
    first, here, last = cells(path)
    assert [cell["execution_count"] for cell in (first, here, last)] == [1, 2, 3]
    assert first["metadata"] == {"tags": ["kept"]}
    assert len(first["outputs"]) == 1
    assert texts(first) == ["0\n1\n2\n"]
    assert "[]" in texts(here)  # a folder of its own, and empty
    assert "2" in texts(last)
    assert json.loads(path.read_text())["metadata"]["language_info"] == {"name": "python"}
    before = path.read_bytes()
    assert render(path)[0] == 0
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["small.ipynb"]


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("raise ValueError('no such\\nthing')", "broken: cell cell-2: ValueError: no such\n"),
        ("import os\nos._exit(1)", "broken: cell cell-2: its kernel died\n"),
    ],
    ids=["error", "kernel"],
)
def test_an_error_of_a_cell_is_one_line_and_leaves_the_file(failing, message, tmp_path):
    pytest.importorskip("nbclient", reason="notebooks need the extra notebooks")
    path = write(tmp_path / "broken.ipynb", "print(1)", failing, "print(2)")
    before = path.read_bytes()
    code, said, errors = render(path)
    assert (code, said) == (1, "")
    assert errors == message
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["broken.ipynb"]


def test_a_cell_that_takes_too_long_is_ended(tmp_path):
    pytest.importorskip("nbclient", reason="notebooks need the extra notebooks")
    path = write(tmp_path / "slow.ipynb", "import time\ntime.sleep(60)")
    code, _, errors = render(path, "--timeout", "2")
    assert code == 1
    assert errors == "slow: cell cell-1: it took too long\n"
    assert cells(path)[0]["execution_count"] is None


def test_a_notebook_that_is_not_there_is_told_before_any_is_run():
    pytest.importorskip("nbclient", reason="notebooks need the extra notebooks")
    code, said, errors = render("01_losses", "99_none")
    assert (code, said) == (1, "")
    assert errors == "no notebook '99_none' in notebooks/, and no such file\n"
