import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_map

from funcloss import class_weighted, losses, optim
from funcloss._trees import flatten
from funcloss.app import runs
from funcloss.app.config import make_config
from funcloss.app.train import train
from funcloss.errors import RunError
from funcloss.models import linear
from funcloss.objectives import mean_of, supervised
from funcloss.training import Compiled, compilation, init_state, make_train_step, prepare
from funcloss.typing import Batch

INDEX = torch.arange(4)
HYPER = {"learning_rate": torch.tensor(0.1), "class_weights": torch.tensor([1.0, 1.0, 5.0])}


@pytest.fixture
def state():
    return init_state(linear((1, 2, 2), 3), optim.sgd())


def step_on(state, index):
    return state._replace(step=state.step + 1), {"loss": index.float().mean()}


class OnCuda(torch.Tensor):
    """A key that says it lies on a GPU."""

    device = property(lambda self: torch.device("cuda"))


def no_compiler(*args, **kwargs):
    raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand more")


def compiled_to(change):
    """A torch.compile that makes of a step ``change(step)``."""
    return lambda step, **options: change(step)


def of_velocity(factor):
    """The step, at which momentum counts ``factor`` times: alpha dropped is 1 / momentum."""

    def change(step):
        def wrong(state, *inputs):
            velocity = {name: factor * v for name, v in state.opt_state.velocity.items()}
            return step(state._replace(opt_state=state.opt_state._replace(velocity=velocity)),
                        *inputs)  # fmt: skip

        return wrong

    return change


def of_rate(factor):
    def change(step):
        def wrong(state, batch, hyper):
            return step(state, batch, hyper | {"learning_rate": factor * hyper["learning_rate"]})

        return wrong

    return change


def of_the_loss(factor):
    """The step, which tells another loss."""

    def change(step):
        def wrong(state, *inputs):
            after, metrics = step(state, *inputs)
            return after, metrics | {"loss": factor * metrics["loss"]}

        return wrong

    return change


def without_counting(step):
    return lambda state, *inputs: (step(state, *inputs)[0]._replace(step=state.step),
                                   step(state, *inputs)[1])  # fmt: skip


def in_double(step):
    """The step as another order of sums has it: the same but for rounding."""

    def to(dtype):
        def change(leaf):
            floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            return leaf.to(dtype) if floating else leaf

        return lambda tree: tree_map(change, tree)

    return lambda *inputs: to(torch.float32)(step(*to(torch.float64)(inputs)))


class Convolved(nn.Module):
    """The bias before BatchNorm has no gradient but rounding, which Adam makes a whole step."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.2)
        self.head = nn.Linear(4 * 16, 3)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).flatten(1))


def trial(net, optimizer, **how):
    torch.manual_seed(0)
    model = net()
    objective = supervised(model, mean_of(class_weighted(losses.cross_entropy)), **how)
    step = make_train_step(objective, optimizer, schedule=optim.one_cycle(steps=50))
    batch = Batch(torch.randn(32, 1, 6, 6), torch.arange(32) % 3)
    return step, init_state(model, optimizer), (batch, HYPER)


def flat():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.ReLU(), nn.Linear(12, 3))


NETS = [flat, Convolved]
OPTIMIZERS = [optim.sgd(momentum=0.9), optim.adam(), optim.adamw(betas=(0.5, 0.9))]


def test_auto_compiles_on_cuda_alone(state, monkeypatch):
    monkeypatch.setattr(torch, "compile", no_compiler)
    made = prepare(step_on, "auto", state, (INDEX,))
    assert made == Compiled(step_on, False, "eager", 0.0)
    monkeypatch.setattr(torch, "compile", compiled_to(lambda step: lambda *given: step(*given)))
    made = prepare(step_on, "auto", state._replace(key=state.key.as_subclass(OnCuda)), (INDEX,))
    assert made.on
    assert made.step_on is not step_on
    assert made.note.startswith("compiled in ")


def test_off_is_off(state, monkeypatch):
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert prepare(step_on, "off", state, (INDEX,)) == Compiled(step_on, False, "eager", 0.0)


@pytest.mark.parametrize("there", [True, False])
def test_without_a_compiler_auto_says_so_and_on_fails(state, monkeypatch, there):
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(compilation.shutil, "which", lambda name: "/bin/true" if there else None)
    reason = "InvalidCxxCompiler: No working C" if there else "there is no C\\+\\+ compiler"
    made = prepare(step_on, "auto", state._replace(key=state.key.as_subclass(OnCuda)), (INDEX,))
    assert made.step_on is step_on
    assert made.note.startswith("eager, since compiling failed: ")
    with pytest.raises(RunError, match=f"the step cannot be compiled: {reason}"):
        prepare(step_on, "on", state, (INDEX,))


def test_trying_a_step_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch, "compile", compiled_to(in_double))
    step, state, inputs = trial(Convolved, optim.adam())
    before = {name: t.clone() for name, t in flatten(state).items()}
    generator = torch.get_rng_state()
    prepare(step, "on", state, inputs)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(before[name], t) for name, t in flatten(state).items())


# A compiled step is checked against the eager one.

WRONG = {
    "the momentum is dropped": (of_velocity(1 / 0.9), 0, "opt_state/velocity/|[0-9]|head|conv"),
    "a high momentum is dropped": (of_velocity(1 / 0.99), 0, "opt_state/velocity/|[0-9]|head|conv"),
    "the steps are longer": (of_rate(1.01), 1, "[a-z0-9]+.(weight|bias)"),
    "the loss is another": (of_the_loss(1.001), 1, "loss"),
    "nothing is counted": (without_counting, 1, "step"),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_compiled_step_is_not_used_and_the_note_says_what_is_off(monkeypatch, wrong, net):
    change, optimizer, name = WRONG[wrong]
    step, state, inputs = trial(net, OPTIMIZERS[optimizer])
    monkeypatch.setattr(torch, "compile", compiled_to(change))
    made = prepare(step, "on", state, inputs)
    assert made.step_on is step
    assert (made.on, made.warning) == (False, True)
    number = 1 if optimizer else 2  # there is no velocity before
    begin = f"eager, since compiled step {number} is wrong: ({name})"
    with pytest.raises(AssertionError, match=f"{begin}.* is off by .*, of a change of .*; round"):
        raise AssertionError(made.note)


def test_the_note_tells_how_far_it_is_off(monkeypatch):
    step, state, inputs = trial(flat, optim.sgd())
    monkeypatch.setattr(torch, "compile", compiled_to(of_rate(2.0)))
    words = prepare(step, "on", state, inputs).note.split(": ")[1].split()
    assert words[:4] == ["1.weight", "is", "off", "by"]
    change = step(state, *inputs)[0].params["1.weight"] - state.params["1.weight"]
    assert float(words[4].rstrip(",")) == pytest.approx(float(change.norm()), rel=0.06)
    assert float(words[9].rstrip(";")) == pytest.approx(float(change.norm()), rel=0.06)
    assert float(words[12]) < 1e-3 * float(change.norm())


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adam", "adamw"])
@pytest.mark.parametrize("net", NETS)
def test_a_step_that_is_rounded_differently_is_used(monkeypatch, net, optimizer):
    step, state, inputs = trial(net, optimizer)
    monkeypatch.setattr(torch, "compile", compiled_to(in_double))
    assert not all(
        torch.equal(a, b)
        for a, b in zip(
            *(s(state, *inputs)[0].params.values() for s in (step, in_double(step))), strict=True
        )  # fmt: skip
    )
    made = prepare(step, "on", state, inputs)
    assert made.on, made.note
    assert not made.warning


@pytest.mark.parametrize("net", NETS)
def test_in_bfloat16_rounding_is_that_of_bfloat16(monkeypatch, net):
    step, state, inputs = trial(net, OPTIMIZERS[0], bfloat16=True)
    single, *_ = trial(net, OPTIMIZERS[0])
    monkeypatch.setattr(torch, "compile", compiled_to(lambda step: single))
    made = prepare(step, "on", state, inputs)
    assert made.on, made.note
    monkeypatch.setattr(torch, "compile", compiled_to(of_velocity(1 / 0.9)))
    assert prepare(step, "on", state, inputs).warning


def test_a_training_that_diverges_is_no_error_of_the_compiler(monkeypatch):
    step, state, (batch, hyper) = trial(flat, OPTIMIZERS[0])
    inputs = batch, hyper | {"learning_rate": torch.tensor(1e30)}
    monkeypatch.setattr(torch, "compile", compiled_to(lambda step: lambda *given: step(*given)))
    after = step(step(step(state, *inputs)[0], *inputs)[0], *inputs)[0]
    assert not after.params["1.weight"].isfinite().all()
    assert prepare(step, "on", state, inputs).on


def test_where_only_the_compiled_step_is_not_finite_it_is_wrong(monkeypatch):
    step, state, inputs = trial(flat, OPTIMIZERS[0])
    monkeypatch.setattr(torch, "compile", compiled_to(of_rate(float("nan"))))
    assert "1.weight is off by inf" in prepare(step, "on", state, inputs).note


def test_a_run_whose_compiled_step_is_wrong_warns_and_is_the_eager_run(tmp_path, monkeypatch):
    small = {
        "dataset": "mnist-sample", "model": "linear", "optimizer": "sgd", "momentum": 0.9,
        "epochs": 1, "batch_size": 200, "audit_every": 0, "class_weight": {"9": 5.0},
    }  # fmt: skip
    monkeypatch.setattr(torch, "compile", compiled_to(of_velocity(1 / 0.9)))
    found = {}
    for compile in ("on", "off"):
        events = []
        out = train(make_config(small, {"compile": compile}), tmp_path / compile,
                             show=events.append)  # fmt: skip
        warned = [e.text for e in events if isinstance(e, runs.Note) and e.warning
                  and e.text.startswith("step: ")]  # fmt: skip
        tensors, _ = runs.load_tensors(tmp_path / compile / "model.safetensors")
        found[compile] = warned, out.summary["compile"], tensors
    (text,), *_ = found["on"]
    assert text.startswith("step: eager, since compiled step 2 is wrong: ")
    assert found["off"][0] == []
    assert found["on"][1] == found["off"][1] == "off"
    assert_close(found["on"][2], found["off"][2], rtol=0, atol=0)
