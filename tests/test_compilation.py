import time

import pytest
import torch

from funcloss.errors import RunError
from funcloss.models import linear
from funcloss.optim import sgd
from funcloss.training import compilation, init_state, prepare

INDEX = torch.arange(4)


@pytest.fixture
def state():
    return init_state(linear((1, 2, 2), 3), sgd())


def step_on(state, index):
    return state._replace(step=state.step + 1), {"loss": index.float().mean()}


def slow_step_on(state, index):
    time.sleep(0.01)
    return step_on(state, index)


def no_compiler(*args, **kwargs):
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")


def test_a_run_of_seconds_is_never_compiled(state, monkeypatch):
    monkeypatch.setattr(torch, "compile", no_compiler)
    made = prepare(step_on, "auto", state, (INDEX,), 1000)
    assert made.step_on is step_on
    assert not made.on
    assert made.note.startswith("eager, for a training of about 0 s")


def test_off_is_off(state):
    made = prepare(slow_step_on, "off", state, (INDEX,), 10**9)
    assert made == (slow_step_on, False, "eager", 0.0)


def test_a_long_run_is_compiled_and_the_time_is_said(state, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    made = prepare(slow_step_on, "auto", state, (INDEX,), 10**9)
    assert made.on
    assert made.note.startswith("compiled in ")
    assert made.seconds > 0.02


@pytest.mark.parametrize("there", [True, False])
def test_without_a_compiler_auto_says_so_and_on_fails(state, monkeypatch, there):
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: "/bin/true" if there else None)
    reason = "InvalidCxxCompiler: No working C" if there else "there is no C\\+\\+ compiler"
    made = prepare(slow_step_on, "auto", state, (INDEX,), 10**9)
    assert made.step_on is slow_step_on
    with pytest.raises(RunError, match=f"the step cannot be compiled: {reason}"):
        prepare(step_on, "on", state, (INDEX,), 10)
    assert made.note.startswith("eager, since compiling failed: ")


def test_trying_a_step_changes_nothing(state):
    before = {name: p.clone() for name, p in state.params.items()}
    prepare(step_on, "auto", state, (INDEX,), 10)
    assert state.step == 0
    assert all(torch.equal(before[name], p) for name, p in state.params.items())
