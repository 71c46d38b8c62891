"""CONTRIBUTING.md: the changes that it shows, made to a copy of the project and used."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOSS, OPTIMIZER, FIGURE = DIFFS = re.findall(
    r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S
)
COPIED = ("funcloss", "tests", "scripts", "docs", "pyproject.toml")

RUN = """
from funcloss.app.config import make_config
from funcloss.app.runs import folder
from funcloss.app.train import train

train(make_config({"dataset": "mnist-sample", "model": "linear", "epochs": 1, "loss": "brier",
                   "optimizer": "sign-sgd", "weight_decay": 1e-4, "learning_rate": 1e-3,
                   "audit_every": 0, "compile": "off"}), "run")
assert folder.foreign(Path("run")) == []
"""
LAWS = """
import pytest
assert pytest.main(["-q", "-n", "0", "tests/test_docs_losses.py"]) == 0
from funcloss.app.config import fields
from funcloss.laws import LAWS, try_law
from catalogue import CASES
from names_table import names_table

(loss,) = (row.option for row in fields() if row.name == "loss")
assert "brier" in loss.choices
assert "| `brier` | `funcloss.losses:brier` | Brier score of " in names_table("loss")
verdicts = {law: try_law(law, CASES["brier"]).verdict for law in LAWS if law != "inductor"}
assert "fail" not in verdicts.values(), verdicts
assert list(verdicts.values()).count("pass") > len(LAWS) / 2, verdicts
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project with all three changes."""
    tree = tmp_path_factory.mktemp("copy")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name)
    for diff in DIFFS:
        subprocess.run(["git", "apply", "-"], cwd=tree, input=diff, text=True, check=True)
    return tree


def python(tree: Path, code: str) -> None:
    path = os.pathsep.join(str(tree / name) for name in (".", "tests", "scripts"))
    code = f"from pathlib import Path\n{code}"
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=env, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def run(tree) -> Path:
    """A tiny run with the new loss and the new optimiser."""
    python(tree, RUN)
    return tree / "run"


@pytest.mark.parametrize(("diff", "most"), [(LOSS, 4), (OPTIMIZER, 3), (FIGURE, 2)])
def test_a_change_touches_few_places(diff, most):
    assert len(re.findall(r"^\+\+\+ b/", diff, re.M)) <= most


@pytest.mark.slow
def test_the_new_loss_is_an_option_in_the_documentation_and_lawful(tree):
    python(tree, LAWS)


@pytest.mark.long
@pytest.mark.slow
def test_the_new_loss_and_the_new_optimiser_train(run):
    summary = (run / "summary.json").read_text()
    assert '"loss": "brier"' in summary
    assert 'optimizer = "sign-sgd"' in (run / "config.toml").read_text()
    assert "betas" not in (run / "config.toml").read_text()
    accuracy = re.search(r'"accuracy": \[\s*([\d.]+)', summary)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.6


@pytest.mark.slow
@pytest.mark.long
def test_the_new_figure_is_written(tree, run):
    assert (run / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert "`speed.png`" in (tree / "docs" / "reference" / "run-folder.md").read_text()
