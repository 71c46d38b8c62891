"""A sweep: trials train as they would alone, stop and go on, and the test set is read once."""

import dataclasses
import errno
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Killed, StopAt, lines_of, resume_sweep, swept
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from funcloss import losses, models, objectives, optim, training
from funcloss._files import write_text
from funcloss._trees import flatten
from funcloss.app import data, report, runs, sweep
from funcloss.app.choice import finish
from funcloss.app.config import make_config, read_toml
from funcloss.app.runs import folder, setup
from funcloss.app.sweep import Axis, SweepSpec, plan, seeds, trials
from funcloss.app.sweep.axes import trial_config, trials_of
from funcloss.app.sweep.trials import mapped, trial_state
from funcloss.app.train import train
from funcloss.combinators import class_weighted
from funcloss.errors import ConfigError, RunError
from funcloss.typing import Batch

SMALL = {
    "dataset": "mnist-sample",
    "model": "linear",
    "learning_rate": 0.02,
    "epochs": 2,
    "batch_size": 40,  # of 400 digits: 10 steps an epoch
    "log_every": 5,
    "compile": "off",
    "audit_every": 0,
}
NINE = Axis("class_weight", "9", (2.0, 10.0))
RATES = Axis("learning_rate", "", (0.02, 0.1))


def config(**options):
    return make_config(SMALL, options)


def state_of(made, seed, number):
    """The state of a trial at the end of a seed's training."""
    return trial_state(seeds.restored(made, seed), made.groups, number)


@pytest.fixture(scope="module")
def tiny(sample):
    """Every tenth digit of the sample."""
    splits = {
        name: data.Examples(split.inputs[::10].clone(), split.labels[::10].clone())
        for name, split in sample.splits.items()
    }
    return dataclasses.replace(sample, **splits)


def given(monkeypatch, dataset):
    """Let a data set be the sample, long-tailed where that is asked for."""

    def load_dataset(options, **more):
        if options.imbalance == 1:
            return dataset
        return data.long_tailed(dataset, options.imbalance)

    monkeypatch.setattr(setup, "load_dataset", load_dataset)


def started(config, axes, out, *, seeds=1, method="auto", show=lambda event: None, **how):
    return plan.start(SweepSpec(config, axes, seeds, method), Path(out), show, **how)


def taken_up(out, show=lambda event: None):
    return plan.taken_up(plan.read_spec(out), out, show)


def run_seeds(sweep, **watch):
    return seeds.run_seeds(sweep, runs.Watcher(**watch))


def width_of(sweep):
    return max(group.size for group in sweep.groups)


def plainly(monkeypatch, dataset):
    """Train on these digits, draw nothing and audit nothing."""
    given(monkeypatch, dataset)
    for module, names in (
        (report.run_figures, ("curves", "confusion", "predictions")),
        (finish, ("frontier",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, lambda *args: None)
        monkeypatch.setattr(module, "save_figure", lambda figure, path: write_text(path, "drawn"))
    monkeypatch.setattr(finish, "_audited", lambda *args: None)


@pytest.fixture
def plain_files(monkeypatch, tiny):
    plainly(monkeypatch, tiny)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    """A sweep over two seeds that nothing stopped, and what it showed."""
    events = []
    out = tmp_path_factory.mktemp("sweeps") / "whole"
    with pytest.MonkeyPatch.context() as patched:
        plainly(patched, tiny)
        ended = swept(config(), [NINE], out, seeds=2, method="vmap", show=events.append)
    return out, ended, events


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A sweep under a floor and costs, with all of its files."""
    out = tmp_path_factory.mktemp("sweeps") / "full"
    made = config(class_cost={"9": 5}, floor={"9": 0.93}, batch_size=400, compile="auto")
    axis = Axis("class_weight", "9", (1.0, 3.0, 30.0))
    return out, swept(made, [axis], out, seeds=2, method="vmap")


def tensors(path):
    return runs.load_tensors(Path(path))[0]


def same(a, b):
    """Whether two sweeps ended in the same records, choice and model, to the bit."""
    files = ("trials.jsonl", "sweep.json", "sweep.csv")
    if any((a / file).read_bytes() != (b / file).read_bytes() for file in files):
        return False
    pairs = [[tensors(x / "chosen" / f"{n}.safetensors") for x in (a, b)]
             for n in ("model", "checkpoint")]  # fmt: skip
    return all(x.keys() == y.keys() and all(map(torch.equal, x.values(), y.values()))
               for x, y in pairs)  # fmt: skip


# Every trial's step is the step of that training alone.


class Trainings:
    """EnsembleState, each also as a training of its own, and a batch in a precision."""

    def __init__(self, steps, hypers, state, batch_at):
        self.steps, self.hypers, self.state, self.batch_at = steps, hypers, state, batch_at

    @classmethod
    def of(cls, options, axis, dtype):
        made = make_config(SMALL, {"batch_size": 16, "learning_rate": 0.01}, options)
        configs = [trial_config(made, [axis], trial) for trial in trials_of([axis])]
        first = setup.make_setup(configs[0])
        found = {name: getattr(first.config, name) for name in ("device", "epochs", "schedule")}
        alone = [setup.setup_on(replace(c, **found), first.dataset) for c in configs]

        def batch_at(index):
            batch = data.get_batch(first.dataset, first.dataset.train, index)
            return batch._replace(inputs=batch.inputs.to(dtype))

        hypers = [{n: t.to(dtype) for n, t in s.hyper.items()} for s in alone]
        return cls([s.train_step for s in alone], hypers, in_dtype(first.state, dtype), batch_at)


def in_dtype(state, dtype):
    return mapped(lambda t, _: t.to(dtype) if t.is_floating_point() else t, state, None)


def index_of(step):
    return torch.arange(16) * 61 + 7 * step  # the sample is sorted by class


def gaps(trainings, width, steps=3):
    """Return how far trials and trainings alone are apart after a step, of what it moved."""
    groups = sweep.make_groups(trainings.steps[0], trainings.hypers, width)
    step_on = sweep.make_trials_step(groups)
    state, found = sweep.init_trials(trainings.state, groups), []
    for i in range(steps):
        before = state
        state, metrics = step_on(state, trainings.batch_at(index_of(i)))
        for n, (alone, hyper) in enumerate(zip(trainings.steps, trainings.hypers, strict=True)):
            own = trial_state(before, groups, n)
            expected, scores = alone(own, trainings.batch_at(index_of(i)), hyper)
            got = trial_state(state, groups, n)
            assert int(got.step) == int(expected.step) == i + 1
            assert torch.equal(got.key, expected.key)
            found.append(float((metrics["losses"][n] - scores["loss"]).abs()))
            pairs = [(got.params, expected.params, own.params),
                     (got.buffers, expected.buffers, own.buffers),
                     *opt_pairs(got, expected, own)]  # fmt: skip
            found += [apart(*trees) for trees in pairs if trees[0]]
    return found


def opt_pairs(*states):
    trees = [flatten({"": s.opt_state}) for s in states]
    return [trees]


def apart(got, expected, before):
    moved = torch.cat([(expected[k] - before[k]).double().flatten() for k in expected]).norm()
    error = torch.cat([(got[k] - expected[k]).double().flatten() for k in expected]).norm()
    return float(error / moved.clamp(min=1e-12))


WEIGHTS = Axis("class_weight", "9", (0.0, 1.0, 3.0, 10.0, 100.0))
STEPS = {
    "weights, linear, nesterov": ({"optimizer": "sgd", "nesterov": True}, WEIGHTS),
    "weights, cnn with dropout, adamw, one-cycle": (
        {"model": "article-cnn", "optimizer": "adamw", "weight_decay": 0.1},
        WEIGHTS,
    ),
    "learning rate, mlp, adam, clipped, cosine": (
        {"model": "mlp", "optimizer": "adam", "clip_norm": 0.5, "schedule": "cosine"},
        Axis("learning_rate", "", (1e-4, 1e-3, 3e-3, 1e-2, 1e-1)),
    ),
    "gamma, linear, sgd, step": (
        {"loss": "softmax_focal", "optimizer": "sgd", "schedule": "step"},
        Axis("loss_option", "gamma", (0.0, 0.5, 1.0, 2.0, 5.0)),
    ),
    "tau, mlp, adam, long tail": (
        {"model": "mlp", "loss": "logit_adjusted", "optimizer": "adam", "imbalance": 20},
        Axis("loss_option", "tau", (0.0, 0.5, 1.0, 2.0, 3.0)),
    ),
    "price, linear, adamw": (
        {"loss": "cross_entropy_with_cost", "class_cost": {"9": 5}, "optimizer": "adamw"},
        Axis("loss_option", "price", (0.0, 0.5, 1.0, 2.0, 5.0)),
    ),
    "weights in a weighted mean": ({"reduction": "weighted_mean", "class_weight": {"4": 2}},
                                   WEIGHTS),
}  # fmt: skip
# In float32 AdamW magnifies the rounding of small gradients, which differs from CPU to CPU.
DTYPES = [pytest.param(torch.float32, 1e-3, id="32"), pytest.param(torch.float64, 1e-10, id="64")]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize(("options", "axis"), STEPS.values(), ids=STEPS)
def test_a_trials_step_is_that_of_its_training_alone(options, axis, dtype, tolerance):
    trainings = Trainings.of(options, axis, dtype)
    assert max(gaps(trainings, 1)) == 0.0
    for width in (2, 5):  # two do not divide five
        assert max(gaps(trainings, width)) < tolerance


class Normed(nn.Module):
    """A network with batch normalisation, dropout and a buffer of counts."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4 * 26 * 26, 10)

    def forward(self, images):
        hidden = nn.functional.dropout(self.norm(self.conv(images)).relu(), 0.2, self.training)
        return self.fc(hidden.flatten(1))


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_so_it_is_of_a_model_of_ones_own_with_batch_normalisation(sample, dtype, tolerance):
    optimizer, model = optim.sgd(momentum=0.9), Normed().to(dtype)
    objective = objectives.supervised(
        model, objectives.mean_of(class_weighted(losses.cross_entropy))
    )
    step = training.make_train_step(objective, optimizer, clip_norm=1.0)

    def batch_at(index):
        batch = data.get_batch(sample, sample.train, index)
        return Batch(batch.inputs.to(dtype), batch.targets)

    hypers = []
    for i in range(5):
        weights = torch.ones(10, dtype=dtype)
        weights[9] = 3.0**i
        hypers.append({"learning_rate": torch.tensor(0.01 * (i + 1), dtype=dtype),
                       "class_weights": weights})  # fmt: skip
    trainings = Trainings([step] * 5, hypers, training.init_state(model, optimizer), batch_at)
    for width in (1, 2, 5):
        assert max(gaps(trainings, width)) < tolerance


def indices(monkeypatch, asked):
    """Note which training examples are asked for."""
    real = setup.iter_batches

    def iter_batches(dataset, examples, indices):
        indices = list(indices)
        if examples is dataset.train:
            asked.extend(indices)
        return real(dataset, examples, indices)

    monkeypatch.setattr(setup, "iter_batches", iter_batches)


def test_a_sweep_in_a_loop_is_its_trainings_to_the_bit(tmp_path, monkeypatch, plain_files):
    shared = config(model="mlp", epochs=1)
    asked = []
    with monkeypatch.context() as patched:
        indices(patched, asked)
        made = started(shared, [NINE], tmp_path / "sweep", seeds=2, method="loop")
        made = replace(made, trials=made.trials[1:], groups=made.groups[1:])  # plain apart
        # Scoring asks for training examples too, in order.
        patched.setattr(seeds, "score", lambda sweep, number, state: {"trial": number})
        run_seeds(made)
    orders = []
    for seed, (number, weight) in itertools.product(range(2), enumerate(NINE.values)):
        alone, order = tmp_path / f"{seed}{number}", []
        with monkeypatch.context() as patched:
            indices(patched, order)
            train(replace(shared, seed=seed, class_weight={"9": weight}), alone)
        state = state_of(made, seed, number)
        expected = runs.beneath(tensors(alone / "checkpoint.safetensors"), "state")
        found = flatten(state)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], t) for name, t in expected.items())
        orders.append(torch.stack(order))
    # One order a seed, each batch taken once for all trials.
    assert torch.equal(torch.stack(asked), torch.cat([orders[0], orders[2]]))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_all_in_one_program_and_one_after_another_come_to_the_same(whole, tmp_path, plain_files):
    out, ended, _ = whole
    again = swept(config(), [NINE], tmp_path / "loop", seeds=2, method="loop")
    for a, b in zip(again.choice.points, ended.choice.points, strict=True):
        assert (a.name, a.chosen) == (b.name, b.chosen)
        assert a.accuracy.value == pytest.approx(b.accuracy.value, abs=0.004)
    first = [json.loads((x / "steps.jsonl").read_text().splitlines()[0])["losses"]
             for x in (out, tmp_path / "loop")]  # fmt: skip
    assert first[0] == pytest.approx(first[1], rel=1e-4)


def test_convolutions_off_cuda_go_in_a_loop_and_all_else_in_one_program():
    assert trials.choose_vmap_size(models.article_cnn(), 20) == trials.VmapSize(
        1, "20 trials in a loop: the model has convolutions")  # fmt: skip
    linear = trials.choose_vmap_size(models.linear(), 20)
    assert linear == trials.VmapSize(20, "20 trials in one program")
    for model in (models.linear(), models.article_cnn()):
        assert trials.choose_vmap_size(model, 1) == trials.VmapSize(1, "one trial")

    class OnCuda(torch.Tensor):
        device = property(lambda self: torch.device("cuda"))

    conv = nn.Sequential(nn.Conv1d(1, 1, 1))
    assert trials.choose_vmap_size(conv, 3).size == 1
    conv.parameters = lambda: iter([torch.zeros(1).as_subclass(OnCuda)])
    assert trials.choose_vmap_size(conv, 3).size == 3


@pytest.mark.parametrize(("model", "width"), [("linear", 3), ("lenet5", 1)])
def test_auto_goes_by_the_model_and_times_nothing(tmp_path, monkeypatch, model, width):
    notes, taken = [], []
    monkeypatch.setattr(trials, "make_trials_step", taken.append)
    made = started(config(model=model), [NINE], tmp_path / "s", method="auto", show=notes.append)
    assert width_of(made) == width
    assert notes[-1].text.startswith("3 trials in ")
    assert not taken


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_a_sweep_compiled_wrongly_warns_and_is_the_eager_sweep(
    tmp_path, monkeypatch, plain_files, method
):
    def dropped(step, **options):
        def wrong(state, *inputs):
            velocity = {name: v / 0.9 for name, v in state.opt_state.velocity.items()}
            memory = state.opt_state._replace(velocity=velocity)
            return step(state._replace(opt_state=memory), *inputs)

        return wrong

    monkeypatch.setattr(torch, "compile", dropped)
    warned = {}
    for compile in ("on", "off"):
        notes = []
        made = config(optimizer="sgd", momentum=0.9, compile=compile, epochs=1)
        swept(made, [NINE], tmp_path / compile, method=method, show=notes.append)
        told = [n for n in notes if isinstance(n, runs.Note) and n.text.startswith("step: ")]
        warned[compile] = [note.text for note in told if note.warning]
        assert read_toml(tmp_path / compile / "chosen" / "config.toml")["compile"] == "off"
    assert warned["on"]
    assert all("compiled step 2 is wrong: " in text for text in warned["on"])
    assert not warned["off"]
    a, b = (tensors(tmp_path / name / "chosen" / "model.safetensors") for name in ("on", "off"))
    assert all(map(torch.equal, a.values(), b.values()))


def test_what_a_sweep_shows_on_its_way(whole):
    _, ended, events = whole
    assert ended.finished
    started, *rest = [e for e in events if not isinstance(e, runs.Note)]
    assert isinstance(started, sweep.SweepStarted)
    assert (started.trials, started.seeds, started.steps, started.done) == (3, 2, 20, 0)
    done = [e for e in rest if isinstance(e, sweep.SeedReport)]
    assert [(e.number, e.seeds, len(e.records)) for e in done] == [(1, 2, 3), (2, 2, 3)]
    steps = [e.step for e in rest if isinstance(e, training.Progress)]
    assert steps == 2 * [5, 10, 15, 20]


@pytest.mark.parametrize("n", [9_999, 10_000, 10_001, 19_999, 54_000])
def test_the_training_error_is_of_ten_thousand_examples_at_most(n):
    labels = torch.arange(n) % 2
    part = data.Examples(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), labels)
    assert 5_000 <= len(seeds.few_of(part).labels) <= 10_000


# Divergence.

LOST = {
    "learning rate": ({"model": "mlp", "optimizer": "sgd"}, RATES, (1e9,)),
    "weight": ({"model": "mlp", "optimizer": "sgd"}, NINE, (1e30, 1e35)),
    "weight, in Adam's memory": ({"optimizer": "adam"}, NINE, (1e30,)),
}


@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize(("options", "axis", "lost"), LOST.values(), ids=LOST)
def test_a_trial_that_diverges_leaves_the_others_alone(
    tmp_path, plain_files, options, axis, lost, method
):
    records, states = {}, {}
    for name, values in (("with", (*lost, *axis.values)), ("without", axis.values)):
        wide = replace(axis, values=values)
        made = started(config(epochs=1, **options), [wide], tmp_path / name, method=method)
        records[name] = {r["name"]: r for r in run_seeds(made)}
        states[name] = {e.name: state_of(made, 0, n) for n, e in enumerate(made.trials)}
    diverged = {name for name, record in records["with"].items() if record["diverged"]}
    assert diverged == records["with"].keys() - records["without"].keys()
    assert len(diverged) == len(lost)
    for name, state in states["without"].items():
        if method == "loop":
            assert records["with"][name]["accuracy"] == records["without"][name]["accuracy"]
        found = flatten(states["with"][name])
        for path, tensor in flatten(state).items():
            if method == "loop":
                assert torch.equal(found[path], tensor)
            else:  # the products of fewer trials may be rounded in another order
                assert_close(found[path], tensor, rtol=1e-4, atol=1e-6)
    text = (tmp_path / "with" / "steps.jsonl").read_text()
    text += (tmp_path / "with" / "trials.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    # The loss that is shown is that of the trials that have one.
    assert json.loads(text.splitlines()[1])["loss"] is not None


def test_what_diverged_is_told_and_is_not_what_is_compared_with(tmp_path, plain_files):
    made = config(model="mlp", epochs=1, optimizer="sgd")
    ended = swept(made, [replace(RATES, values=(0.02, 1e9))], tmp_path / "s")
    said = ended.choice.lines
    assert said[1] == "Diverged, and out of the choice: learning_rate=1e+09 on 1 of 1 seeds."
    assert said[0].startswith("learning_rate=0.02 has the least expected cost")
    assert [(p.plain, p.diverged) for p in ended.choice.points] == [(True, 0), (True, 1)]
    assert [row.name for row in ended.choice.rows] == ["plain", "plain, minimum expected cost"]
    assert "NaN" not in (tmp_path / "s" / "sweep.json").read_text()


def test_what_stands_in_for_a_plain_training_that_diverged_goes_by_its_own_name(
    tmp_path, monkeypatch, tiny
):
    plainly(monkeypatch, tiny)
    real = seeds.score

    def score(sweep, number, state):
        return real(sweep, number, state) | {"diverged": sweep.trials[number].plain}

    monkeypatch.setattr(seeds, "score", score)
    ended = swept(config(epochs=1, batch_size=100), [NINE], tmp_path / "s")
    name = next(p.name for p in ended.choice.points if p.chosen)
    assert [row.name for row in ended.choice.rows] == [name, f"{name}, minimum expected cost"]
    assert ended.choice.lines[0].endswith("; plain diverged.")
    assert not any("plain:" in line or "plain," in line for line in ended.choice.lines)


def test_where_all_diverge_it_says_so_and_the_folder_can_be_used_again(
    tmp_path, run_cli, plain_files
):
    out = tmp_path / "s"
    lost = [*FAST, "--model", "mlp", "--learning-rate", "1e30,1e31", "--batch-size", "100"]
    for args in ((*lost, "--out", out), ("--resume", out)):
        code, _, err = run_cli("sweep", *args)
        assert code == 1
        assert f"error: every trial of {out} diverged: sweep smaller values, or lower" in err
        assert "Traceback" not in err
    assert not (out / "sweep.json").exists()
    code, said, _ = run_cli("sweep", *FAST, "--learning-rate", "0.01,0.1", "--out", out,
                            "--overwrite")  # fmt: skip
    assert code == 0
    assert said.splitlines()[-1] == f"report: {out}/sweep.html"
    assert (out / "sweep.json").exists()


# Stopped, killed, out of space.


@pytest.mark.parametrize("at", [(1,), (10,), (13,), (20,), (21,), (39,), (7, 9, 15)])
def test_a_sweep_that_is_stopped_goes_on_to_the_same_bits(tmp_path, whole, plain_files, at):
    out, started = tmp_path / "s", []
    ended = swept(config(), [NINE], out, seeds=2, method="vmap", should_stop=StopAt(at[0]))
    assert not ended.finished
    assert ended.choice is None
    assert sorted(f.name for f in out.iterdir() if f.name[:4] != "seed") == (
        ["steps.jsonl", "sweep.toml"] + ["trials.jsonl"] * (at[0] >= 20)
    )
    for more in at[1:]:
        assert not resume_sweep(out, should_stop=StopAt(more)).finished
    ended = resume_sweep(out, show=started.append)
    assert ended.finished
    done = next(e.done for e in started if isinstance(e, sweep.SweepStarted))
    assert done == (20 if sum(at) >= 20 else 0)
    assert same(out, whole[0])
    steps = [(r["seed"], r["step"]) for r in lines_of(out / "steps.jsonl")]
    assert steps == sorted(set(steps))


def test_stopped_at_the_last_step_it_is_finished(tmp_path, whole, plain_files):
    out = tmp_path / "s"
    stop = StopAt(40)
    assert swept(config(), [NINE], out, seeds=2, method="vmap", should_stop=stop).finished
    assert same(out, whole[0])


def test_a_convolutional_sweep_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "score", lambda sweep, number, state: {"trial": number})
    made = config(model="article-cnn", epochs=1, imbalance=100, batch_size=100)
    states = []
    for name, stop in (("a", lambda: False), ("b", StopAt(3))):
        out = tmp_path / name
        found = run_seeds(started(made, [NINE], out, method="vmap"), should_stop=stop)
        sweep = taken_up(out)
        if name == "b":
            assert found is None
            assert run_seeds(sweep)
        states.append([flatten(state_of(sweep, 0, n)) for n in range(3)])
    for a, b in zip(*states, strict=True):
        assert int(a["step"]) > 3
        assert all(torch.equal(a[path], b[path]) for path in a)


def killing(monkeypatch, at):
    """Let nothing arrive in its place from the ``at``-th file or folder on."""
    left = [at]
    for name in ("replace", "rename"):
        real = getattr(Path, name)

        def moved(path, target, real=real):
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            return real(path, target)

        monkeypatch.setattr(Path, name, moved)


@pytest.mark.long
@pytest.mark.slow
def test_killed_at_any_write_the_sweep_goes_on_to_the_same_bits(tmp_path, monkeypatch, tiny):
    plainly(monkeypatch, tiny)
    monkeypatch.setattr(finish, "_gradient_of", lambda *args: ({}, 0))
    made = config(epochs=1, batch_size=100, log_every=10)
    how = {"seeds": 2, "method": "vmap"}
    swept(made, [NINE], tmp_path / "whole", **how)
    for at in range(1, 60):
        out = tmp_path / str(at)
        with monkeypatch.context() as patched:
            killing(patched, at)
            try:
                swept(made, [NINE], out, **how)
                break
            except Killed:
                pass
        if out.exists():
            assert not (out / "sweep.json").exists()  # the sign that all is there comes last
            assert resume_sweep(out).finished
            assert same(out, tmp_path / "whole")
        names = {f.name for f in (out if out.exists() else tmp_path / "whole").iterdir()}
        assert names == {f.name for f in (tmp_path / "whole").iterdir()}
        shutil.rmtree(out, ignore_errors=True)
    assert at > 12
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".")]


def test_killed_within_an_epoch_no_step_is_logged_twice(tmp_path, whole, plain_files):
    out, seen = tmp_path / "s", []

    def show(event):
        seen.append(isinstance(event, training.Progress))
        if sum(seen) == 7:  # at step 15 of the second seed, its last checkpoint at 10
            raise Killed

    with pytest.raises(Killed):
        swept(config(), [NINE], out, seeds=2, method="vmap", show=show)
    resume_sweep(out)
    assert same(out, whole[0])
    logged = [[(r["seed"], r["step"], r["losses"]) for r in lines_of(x / "steps.jsonl")]
              for x in (out, whole[0])]  # fmt: skip
    assert logged[0] == logged[1]


def test_killed_while_finishing_twice_it_still_ends_well(tmp_path, monkeypatch, whole, tiny):
    plainly(monkeypatch, tiny)
    out = tmp_path / "s"
    assert not swept(config(), [NINE], out, seeds=2, method="vmap",
                            should_stop=StopAt(39)).finished  # fmt: skip
    for at in (13, 7):  # before the last file, then between the old chosen run and the new one
        with monkeypatch.context() as patched:
            killing(patched, at)
            with pytest.raises(Killed):
                resume_sweep(out)
    assert resume_sweep(out).finished
    assert same(out, whole[0])


@pytest.mark.parametrize("writes", [1, 2, 3, 4, 6, 9])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, whole, tiny, writes):
    plainly(monkeypatch, tiny)
    out = tmp_path / "s"
    with monkeypatch.context() as patched:
        filling(patched, writes)
        with pytest.raises(RunError, match="cannot (write|make) .*: No space left on device"):
            swept(config(), [NINE], out, seeds=2, method="vmap")
    assert not [f for f in out.rglob(".*")]
    assert not (out / "sweep.json").exists()
    for path in out.glob("seed-*.safetensors"):
        tensors(path)  # whole
    resume_sweep(out)
    assert same(out, whole[0])


def filling(monkeypatch, writes):
    """Let a number of files be written, and half of the next."""
    left = [writes]
    for name in ("write_bytes", "write_text"):
        real = getattr(Path, name)

        def written(path, content, *args, real=real, **options):
            left[0] -= 1
            if left[0] < 0:
                real(path, content[: len(content) // 2], *args, **options)
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(path, content, *args, **options)

        monkeypatch.setattr(Path, name, written)


def test_a_disk_that_is_full_from_the_start_leaves_the_sweep_that_was_there(
    tmp_path, monkeypatch, whole
):
    out = tmp_path / "s"
    shutil.copytree(whole[0], out)
    with monkeypatch.context() as patched:
        filling(patched, 0)
        with pytest.raises(RunError, match="No space left on device"):
            swept(config(), [NINE], out, overwrite=True)
        with pytest.raises(RunError, match="No space left on device"):
            swept(config(), [NINE], tmp_path / "new")
    assert same(out, whole[0])
    assert [f.name for f in tmp_path.iterdir()] == ["s"]


def test_a_line_that_a_kill_cut_short_is_made_again(tmp_path, whole, plain_files):
    out = tmp_path / "s"
    swept(config(), [NINE], out, seeds=2, method="vmap", should_stop=StopAt(26))
    for name in ("trials.jsonl", "steps.jsonl"):
        text = (out / name).read_text()
        (out / name).write_text(text + '{"seed": 1, "step": 7, "lo')
    resume_sweep(out)
    assert same(out, whole[0])


def test_a_changed_environment_is_named_on_resuming(tmp_path, monkeypatch, plain_files):
    out, notes = tmp_path / "s", []
    swept(config(), [NINE], out, method="vmap", should_stop=StopAt(3))
    monkeypatch.setattr(folder, "environment", lambda: {"torch": "1.0"})
    taken_up(out, show=notes.append)
    assert [n.text for n in notes] == [
        f"not the same to the bit as without a stop: torch was {torch.__version__}, is 1.0"
    ]


DAMAGE = {
    "no table": lambda spec: re.sub(r"(?s)\[sweep\].*?\[run\]", "[run]", spec),
    "no environment": lambda spec: spec.partition("[run.environment]")[0],
    "no seeds": lambda spec: spec.replace("\nseeds = 1\n", "\n"),
    "no width": lambda spec: re.sub(r"\nwidth = \d+\n", "\n", spec),
    "an axis without values": lambda spec: re.sub(r"(?s)values = \[.*?\]", "", spec, count=1),
    "an unknown option": lambda spec: "colour = 3\n" + spec,
    "no TOML": lambda spec: spec[: len(spec) // 2] + "[",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_specification_is_one_clear_error(tmp_path, damage):
    made = started(config(), [NINE], tmp_path / "s", method="loop")
    path = made.folder / "sweep.toml"
    path.write_text(damage(path.read_text()))
    with pytest.raises(RunError, match=r"sweep\.toml"):
        resume_sweep(made.folder)


def test_a_sweep_of_a_newer_format_is_refused(tmp_path):
    made = started(config(), [NINE], tmp_path / "s", method="loop")
    path = made.folder / "sweep.toml"
    assert "\n[run]\nversion = 2\n" in path.read_text()
    path.write_text(path.read_text().replace("\nversion = 2\n", "\nversion = 3\n"))
    said = "newer funcloss: format 3, this one reads 2"
    with pytest.raises(RunError, match=said):
        resume_sweep(made.folder)
    with pytest.raises(ConfigError, match=said):
        swept(config(), [NINE], made.folder, overwrite=True)


def test_nothing_but_a_sweep_is_replaced_and_nothing_else_lost(tmp_path):
    made = started(config(), [NINE], tmp_path / "s", method="loop")
    path = made.folder / "sweep.toml"
    for name in ("notes.txt", "chosen/notes.txt", "chosen/plain/notes.txt"):
        note = made.folder / name
        note.parent.mkdir(exist_ok=True)
        note.write_text("ten years")
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=f"did not write: {name}; move") as error:
                started(config(), [NINE], made.folder, method="loop", overwrite=overwrite)
            assert "overwrite" not in str(error.value)
        assert note.read_text() == "ten years"
        note.unlink()
    started(config(), [NINE], made.folder, method="loop", overwrite=True)
    text = path.read_text()
    unversioned = text.replace("\nversion = 2\n", "\n")
    for spec in (unversioned, DAMAGE["no table"](text), "a = 1"):
        path.write_text(spec)
        with pytest.raises(ConfigError, match="is not a sweep folder to replace"):
            started(config(), [NINE], made.folder, method="loop", overwrite=True)
        assert path.read_text() == spec


def test_resuming_what_is_no_sweep_removes_nothing(tmp_path):
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "seed-0.safetensors").write_text("ten years")
    with pytest.raises(RunError, match="is not the folder of a sweep"):
        resume_sweep(tmp_path)
    assert (tmp_path / "seed-0.safetensors").exists()


def test_a_sweep_is_taken_up_as_it_was_started(tmp_path):
    options = {"reduction": "weighted_mean", "class_weight": {"9": 1}, "class_cost": {"4": 2},
               "floor": {"9": 0.9}, "betas": (0.5, 0.6)}  # fmt: skip
    axes = [NINE, replace(RATES, values=(0.1, 0.2))]
    made = started(config(**options), axes, tmp_path / "s", seeds=3, method="vmap")
    again = taken_up(tmp_path / "s")
    for name in ("config", "axes", "seeds", "trials", "constraints"):
        assert getattr(again, name) == getattr(made, name), name
    assert width_of(again) == width_of(made)
    assert [e.plain for e in made.trials] == [True, True, False, False, False, False]
    for a, b in zip(made.groups, again.groups, strict=True):
        assert a.hyper.keys() == b.hyper.keys()
        assert all(torch.equal(a.hyper[name], b.hyper[name]) for name in a.hyper)


def test_seeds_that_cannot_be_counted_are_refused(tmp_path):
    last = 2**63 - 1
    assert started(config(seed=last), [NINE], tmp_path / "s", method="loop").seeds == 1
    with pytest.raises(ConfigError, match="which leaves no room for 2"):
        started(config(seed=last), [NINE], tmp_path / "t", seeds=2, method="loop")


# Honest: chosen by validation data, the test set read once.


class Reads(TorchDispatchMode):
    """Notes every operation that is given a tensor of the test set."""

    def __init__(self, examples):
        super().__init__()
        tensors = {n: t for n, t in vars(examples).items() if isinstance(t, torch.Tensor)}
        self.places = {t.untyped_storage().data_ptr(): n for n, t in tensors.items()}
        self.log = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu":
                place = self.places.get(leaf.untyped_storage().data_ptr())
                if place:
                    self.log.append((place, str(func)))
        return func(*args, **(kwargs or {}))


FLOORED = {"class_cost": {"9": 5}, "floor": {"9": 0.95}, "epochs": 1}


def test_the_test_set_is_read_once_and_at_the_end(tmp_path, tiny, plain_files):
    marks = []
    with Reads(tiny.test) as reads:

        def show(event):
            marks.append((event, sum("aten.index." in func for _, func in reads.log)))

        made = config(**FLOORED, batch_size=100, log_every=2)
        ended = swept(made, [NINE], tmp_path / "s", seeds=2, method="vmap", show=show)
    early = [type(e) for e, n in marks if not n]
    assert early.count(training.Progress) == 4
    assert early.count(sweep.SeedReport) == 2
    reading = marks.index((runs.Note("reading the test set"), 0))
    # After it, at most warnings that the chosen one learned nothing.
    assert all(type(e) is runs.Note and e.warning for e, _ in marks[reading + 1 :])
    assert [row.name for row in ended.choice.rows][3] == "class_weight 9=10"
    # Plain training and the chosen trial, on each of two seeds, in one batch each; and what
    # the figure of the chosen run shows.
    passes = [where for where, func in reads.log if where == "inputs" and "aten.index." in func]
    assert len(passes) == 4 + 1


def garbage(dataset):
    """Return a data set whose test set is noise under wrong labels."""
    draw = torch.Generator().manual_seed(7)
    images = torch.randint(256, dataset.test.inputs.shape, generator=draw, dtype=torch.uint8)
    labels = (
        dataset.test.labels + torch.randint(1, 10, dataset.test.labels.shape, generator=draw)
    ) % 10
    return dataclasses.replace(dataset, test=data.Examples(images, labels))


def test_another_test_set_changes_nothing_but_its_rows(tmp_path, monkeypatch, tiny, plain_files):
    ended = {}
    for name, dataset in (("real", tiny), ("noise", garbage(tiny))):
        with monkeypatch.context() as patched:
            given(patched, dataset)
            ended[name] = swept(config(**FLOORED), [NINE], tmp_path / name, seeds=2,
                                       method="vmap")  # fmt: skip
    real, noise = (tmp_path / name for name in ended)
    assert (real / "trials.jsonl").read_bytes() == (noise / "trials.jsonl").read_bytes()
    assert (real / "sweep.csv").read_bytes() == (noise / "sweep.csv").read_bytes()
    a, b = (e.choice for e in ended.values())
    kept = [f for f in vars(a) if f not in ("rows", "lines", "qualities")]
    assert all(getattr(a, f) == getattr(b, f) for f in kept)
    assert a.lines[0] == b.lines[0]
    assert a.lines[1] != b.lines[1]
    assert [row.name for row in a.rows] == [row.name for row in b.rows]
    assert all(x.accuracy.value > 0.7 and y.accuracy.value < 0.3
               for x, y in zip(a.rows, b.rows, strict=True))  # fmt: skip
    models = [tensors(x / "chosen" / "model.safetensors") for x in (real, noise)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    said = [folder.read_summary(x / "chosen") for x in (real, noise)]
    for part in ("validation", "test"):
        found = [s[part]["temperature"] for s in said]
        assert found[0] == found[1] != 1.0
    assert said[0]["validation"] == said[1]["validation"]
    assert said[0]["validation"] == said[1]["validation"]
    assert said[0]["test"] != said[1]["test"]


# What it leaves.


def test_a_sweep_leaves_all_of_it_in_its_folder(full):
    out, ended = full
    assert sorted(f.name for f in out.iterdir()) == [
        "chosen", "frontier.png", "steps.jsonl", "sweep.csv", "sweep.html", "sweep.json",
        "sweep.toml", "trials.jsonl",
    ]  # fmt: skip
    assert sorted(f.name for f in (out / "chosen").iterdir()) == [
        "checkpoint.safetensors", "config.toml", "confusion.png", "curves.png", "metrics.jsonl",
        "model.safetensors", "predictions.png", "reliability.png", "summary.json",
    ]  # fmt: skip
    assert folder.foreign(out) == []
    assert ended.files[0] == out / "sweep.html"
    assert all(file.is_file() for file in ended.files)
    records = lines_of(out / "trials.jsonl")
    assert [(r["seed"], r["trial"]) for r in records] == list(itertools.product((0, 1), range(3)))
    assert json.loads((out / "sweep.json").read_text())["seeds"] == 2
    summary = json.loads((out / "chosen" / "summary.json").read_text())
    taken = sum(
        line["seconds"] for line in lines_of(out / "steps.jsonl") if line["seed"] == summary["seed"]
    )
    assert summary["train_seconds"] == pytest.approx(taken)


def test_the_chosen_is_the_smallest_weight_whose_mean_recall_keeps_the_floor(full):
    out, ended = full
    records = lines_of(out / "trials.jsonl")
    recall = {
        w: sum(r["recall"]["9"] for r in records if r["values"]["class_weight 9"] == w) / 2
        for w in (1.0, 3.0, 30.0)
    }
    assert recall[1.0] < 0.93 <= recall[30.0]
    smallest = min(w for w, r in recall.items() if r >= 0.93)
    chosen = next(p for p in ended.choice.points if p.chosen)
    assert chosen.values == {"class_weight 9": smallest}
    assert ended.choice.constraints[0].reached == pytest.approx(recall[smallest])
    assert (
        f"9={smallest:g} is the smallest weight that keeps every constraint"
        in ended.choice.lines[0]
    )
    # Of its seeds one that keeps the floor itself, of least expected cost.
    own = [r for r in records if r["name"] == chosen.name and r["recall"]["9"] >= 0.93]
    best = min(own, key=lambda r: r["expected_cost"])
    resolved = read_toml(out / "chosen" / "config.toml")
    assert resolved["seed"] == best["seed"]
    assert resolved["class_weight"] == {"9": smallest}
    assert resolved["compile"] == "off"
    summary = folder.read_summary(out / "chosen")
    assert summary["validation"]["rules"]["argmax"]["accuracy"][0] == pytest.approx(
        best["accuracy"]
    )
    recall = {c: r for c, (r, *_) in summary["validation"]["rules"]["argmax"]["recall"].items()}
    assert recall == pytest.approx(best["recall"])
    assert summary["validation"]["temperature"] == pytest.approx(best["temperature"])


def test_the_report_says_what_the_summary_of_the_chosen_run_says(tmp_path, plain_files):
    made = config(epochs=1, class_cost={"9": 5}, prior={"9": 0.3})
    ended = swept(made, [NINE], tmp_path / "s", method="vmap")
    summary = folder.read_summary(tmp_path / "s" / "chosen")
    name = next(p.name for p in ended.choice.points if p.chosen and not p.plain)
    rows = {row.name: row for row in ended.choice.rows}
    for row, rule in ((name, "argmax"), (f"{name}, minimum expected cost",
                                         "minimum expected cost")):  # fmt: skip
        judged = summary["test"]["rules"][rule]
        assert rows[row].expected_cost == pytest.approx(judged["expected_cost"])
        assert rows[row].normalised_cost.value == pytest.approx(judged["normalised_cost"])
        assert rows[row].accuracy.value == pytest.approx(judged["accuracy"][0])
        assert rows[row].recall[0].value == pytest.approx(judged["recall"]["9"][0])


def test_the_chosen_run_is_a_run_like_any_other(full, run_cli, tmp_path, sample):
    chosen = full[0] / "chosen"
    summary = folder.read_summary(chosen)
    code, table, _ = run_cli("evaluate", chosen, "--json", tmp_path / "e.json")
    assert code == 0
    assert f"accuracy {summary['test']['rules']['argmax']['accuracy'][0]:.2%}" in table
    Image.fromarray(sample.test.inputs[0].squeeze().numpy()).save(tmp_path / "a.png")
    code, out, _ = run_cli("predict", chosen, tmp_path / "a.png")
    assert code == 0
    assert re.match(r".*a\.png: \d \(\d+\.\d%, expected cost [\d.e-]+\)$", out)
    code, out, _ = run_cli("audit", chosen, "--out", tmp_path / "audit")
    assert code == 0
    code, out, _ = run_cli("train", "--resume", chosen)
    assert code == 0
    assert "is finished: there is nothing to resume" in out
    assert folder.read_summary(chosen) == summary


def test_its_configuration_trains_that_trial_alone(full, run_cli, tmp_path):
    out, ended = full
    alone = tmp_path / "again"
    code, _, _ = run_cli("train", "--config", out / "chosen" / "config.toml", "--run-dir", alone)
    assert code == 0
    chosen = next(p for p in ended.choice.points if p.chosen)
    found = [r for r in lines_of(out / "trials.jsonl") if r["name"] == chosen.name]
    spread = abs(found[0]["accuracy"] - found[1]["accuracy"])
    again, once = (folder.read_summary(r) for r in (alone, out / "chosen"))
    for part in ("validation", "test"):
        a, b = (r[part]["rules"]["argmax"]["accuracy"][0] for r in (again, once))
        gap = abs(a - b)
        assert gap <= max(spread, 0.004)
    logged = [
        [r["loss"] for r in [*folder.records_of(run)] if r["kind"] == "step"]
        for run in (alone, out / "chosen")
    ]
    assert len(logged[0]) == 4
    assert logged[0] == pytest.approx(logged[1], rel=1e-3)
    models = [tensors(run / "model.safetensors") for run in (alone, out / "chosen")]
    assert_close(models[0], models[1], rtol=1e-3, atol=1e-4)  # apart by rounding, and its drift
    assert again["class_weight"] == once["class_weight"]
    assert again["steps"] == once["steps"] == 20


def test_plain_training_beside_the_grid_is_compared_with(tmp_path, plain_files):
    tau = Axis("loss_option", "tau", (0.5, 1.0))
    made = config(loss="logit_adjusted", imbalance=10, epochs=1)
    ended = swept(made, [tau], tmp_path / "s", method="vmap")
    names = [(p.name, p.plain) for p in ended.choice.points]
    assert names == [("tau=0.5", False), ("tau=1", False), ("plain", True)]
    assert [row.name for row in ended.choice.rows[:2]] == ["plain", "plain, minimum expected cost"]
    assert ended.choice.rows[2].name in ("tau=0.5", "tau=1")
    assert ended.choice.gradient == {}
    alone = train(config(imbalance=10, epochs=1), tmp_path / "plain").summary
    rules = alone["test"]["rules"]
    for row, rule in zip(ended.choice.rows, rules.values(), strict=False):
        assert row.expected_cost.value == pytest.approx(rule["expected_cost"][0], abs=1e-9)


def test_plain_training_beside_the_grid_may_be_the_choice(tmp_path, monkeypatch, tiny):
    plainly(monkeypatch, tiny)
    made = config(epochs=1, batch_size=100, class_weight={"4": 100})
    ended = swept(made, [NINE, RATES], tmp_path / "s", method="vmap")
    plain = [p.name for p in ended.choice.points if p.plain]
    assert plain == ["plain at learning_rate=0.02", "plain at learning_rate=0.1"]
    chosen = next(p for p in ended.choice.points if p.chosen)
    assert chosen.plain
    assert [row.name for row in ended.choice.rows] == ["plain", "plain, minimum expected cost"]
    resolved = read_toml(tmp_path / "s" / "chosen" / "config.toml")
    assert (resolved["class_weight"], resolved["loss"]) == ({}, "cross_entropy")
    assert f"{resolved['learning_rate']:g}" in chosen.name


@pytest.mark.parametrize(
    ("imbalance", "said"),
    [
        pytest.param(1, "2019); decisions of minimum expected cost do not.", id="even"),
        pytest.param(3, "vector_scaling --loss-option tau=0:2:5.", id="long tail"),
    ],
)
def test_weights_that_have_faded_are_told_and_what_does_not_fade_is_named(
    tmp_path, monkeypatch, tiny, imbalance, said
):
    plainly(monkeypatch, tiny)
    few = config(model="mlp", imbalance=imbalance, batch_size=50, epochs=12, learning_rate=0.005)
    ended = swept(few, [NINE], tmp_path / "few", method="vmap")
    told = [line for line in ended.choice.lines if "class weights fade" in line]
    assert len(told) == 1
    assert told[0].startswith("The training error is 0.0")
    assert told[0].endswith(said)


def test_weights_that_have_not_faded_are_not_told_so(whole):
    assert not [line for line in whole[1].choice.lines if "fade" in line]


# The command.

FAST = ["--dataset", "mnist-sample", "--model", "linear", "--compile", "off", "--epochs", "1",
        "--audit-every", "0", "--method", "loop"]  # fmt: skip
SWEPT = ["--class-weight", "9=1,5"]
REFUSED = [
    ([], "a sweep needs something to sweep: a class_weight, loss_option or learning_rate"),
    (["--class-weight", "9=5"], "a sweep needs something to sweep"),
    (["--class-weight", "9=1:2"], "class_weight 9 must be a number, a list as in 1,2,5, or FIRST"),
    (["--class-weight", "9=a:b:3"], "class_weight 9: 'a' is not a number"),
    (["--class-weight", "9=0:10:log4"], "class_weight 9: log values must be above 0"),
    (["--class-weight", "9=1,-2"], "class_weight 9: a weight must be at least 0"),
    (["--class-weight", "9=1,1e39"], "class_weights must fit float32"),
    (["--class-weight", "ten=1,2"], "no class 'ten'"),
    (["--class-weight", "1,2"], "class_weight must be swept as CLASS=VALUES, got the key ''"),
    (["--learning-rate", "x=1,2"], "learning_rate must be swept as VALUES alone, got the key 'x'"),
    (["--learning-rate", "0,1"], "learning_rate must be above 0"),
    (["--learning-rate", "fast"], "learning_rate: 'fast' is not a number"),
    (["--loss-option", "tau=0:2:3"], "loss_option: cross_entropy has no option 'tau'"),
    (["--loss", "logit_adjusted", "--loss-option", "tua=0:2:3"], "did you mean 'tau'?"),
    (["--loss", "softmax_focal", "--loss-option", "gamma=1,-1"], "gamma must be"),
    ([*SWEPT, "--val-fraction", "0"], "none is held out: set val_fraction, to 0.1 say"),
    ([*SWEPT, "--method", "x"], "method must be one of auto, vmap, loop; got 'x'"),
    ([*SWEPT, *SWEPT], "class_weight 9 is swept twice"),
    ([*SWEPT, "--class-weight", "9=3"], "class_weight 9 is given a value and swept: leave out one"),
    ([*SWEPT, "--class-weight", "09=3"], "no class '09'"),
    ([*SWEPT, "--floor", "9=2"], "floor 9 must be a recall above 0 and at most 1"),
    ([*SWEPT, "--ceiling", "9=0.1"], "ceiling must be TRUE:DECIDED"),
    ([*SWEPT, "--batch-size", "5000"], "batch_size 5000 is more than the 4,000"),
    ([*SWEPT, "--config", "none.toml"], "cannot read none.toml"),
    ([*SWEPT, "--reduction", "weighted_mean", "--learning-rate", "0"], "learning_rate must be"),
    (["--reduction", "weighted_mean", "--learning-rate", "1,2"], "weighted_mean needs a class_w"),
    (["--class-weight", "9=1:100:4096", "--learning-rate", "1,2"], "8,192 trials; at most 4,096"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_a_bad_request_is_one_line_and_leaves_nothing(
    run_cli, tmp_path, monkeypatch, args, message
):
    monkeypatch.chdir(tmp_path)
    method = [] if "--method" in args else FAST[-2:]
    code, out, err = run_cli("sweep", *FAST[:-2], *method, *args)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["--momentum", "0:0.9:3"], ["--seeds", "0"], ["--seeds", "two"]])
def test_what_typer_refuses_leaves_nothing_either(run_cli, tmp_path, monkeypatch, args):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli("sweep", *FAST, *SWEPT, *args)
    assert code == 2
    assert args[0] in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


RESUMED = [
    (["--seeds", "2"], "leave out --seeds"),
    (SWEPT, "leave out --class-weight"),
    (["--method", "loop", "--overwrite", "--out", "y"], "leave out --out, --overwrite, --method"),
    (["--epochs", "3", "--floor", "9=0.9"], "leave out --floor, --epochs"),
    (["--recipe", "fast"], "leave out --recipe"),
]


@pytest.mark.parametrize(("args", "message"), RESUMED)
def test_resume_takes_nothing_beside_it(run_cli, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli("sweep", "--resume", "x", *args)
    assert code == 2
    assert err == f"error: --resume goes on with the sweep as it was: {message}\n"


def test_folders_in_use_and_folders_of_something_else(run_cli, tmp_path, whole):
    used, other, empty = (tmp_path / name for name in ("used", "other", "empty"))
    shutil.copytree(whole[0], used)
    other.mkdir()
    (other / "thesis.tex").write_text("ten years")
    empty.mkdir()
    cases = [
        (["--out", used, *FAST, *SWEPT], 2, f"{used} holds a sweep already: resume it, overwrite"),
        (["--out", other, *FAST, *SWEPT], 2, f"{other} is there and is not a sweep folder"),
        (["--out", other, "--overwrite", *FAST, *SWEPT], 2, "is not a sweep folder"),
        (["--out", used, "--overwrite", *FAST, "--class-weight", "ten=1,2"], 2, "no class 'ten'"),
        (["--resume", other], 1, f"{other} is not the folder of a sweep: it has no sweep.toml"),
        (["--resume", tmp_path / "none"], 1, "is not the folder of a sweep"),
        (["--resume", used], 1, f"{used} is finished: its report is {used}/sweep.html"),
    ]
    for args, exit_code, message in cases:
        code, out, err = run_cli("sweep", *args)
        assert (code, out) == (exit_code, "")
        assert message in err
        assert err.count("\n") == 1
    assert same(used, whole[0])
    assert (other / "thesis.tex").read_text() == "ten years"
    assert not (tmp_path / "none").exists()
    assert list(empty.iterdir()) == []


def interrupting(monkeypatch, *, at):
    """Send Ctrl-C when a number of reports were shown."""
    from funcloss.app.cli.console import TrainingConsole

    real, seen = TrainingConsole.show, []

    def show(console, event):
        real(console, event)
        seen.append(isinstance(event, training.Progress))
        if seen[-1] and sum(seen) == at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainingConsole, "show", show)


def test_ctrl_c_saves_and_says_how_to_go_on(run_cli, tmp_path, monkeypatch, plain_files):
    out = tmp_path / "my sweep"
    args = ["sweep", *FAST, "--class-weight", "9=1:9:log2", "--reduction", "weighted_mean",
            "--seeds", "2", "--batch-size", "40", "--log-every", "2", "--out", out]  # fmt: skip
    with monkeypatch.context() as patched:
        interrupting(patched, at=9)  # in the second seed
        code, said, err = run_cli(*args)
    assert code == 130
    last = said.splitlines()[-1]
    assert last == f"stopped and saved; go on with: funcloss sweep --resume '{out}'"
    assert "finishing this step, then saving" in err
    assert "seed 1/2 trained in" in said
    assert not (out / "sweep.json").exists()
    code, said, _ = run_cli(*shlex.split(last.partition("go on with: funcloss ")[2]))
    assert code == 0
    assert re.search(r"^class_weight 9=\d has the least expected cost on validation", said, re.M)
    assert re.search(r"^training 2 trials with 2 seeds each, 10 steps, into ", said, re.M)
    assert f"run folder: {out}/chosen" in said
    assert f"report: {out}/sweep.html" in said
    resolved = read_toml(out / "chosen" / "config.toml")
    assert resolved["reduction"] == "weighted_mean"
    # A second one over the first.
    before = (out / "sweep.json").read_bytes()
    code, _, err = run_cli("sweep", *FAST, *SWEPT, "--out", out)
    assert code == 2
    assert "holds a sweep already" in err
    code, said, _ = run_cli("sweep", *FAST, *SWEPT, "--out", out, "--overwrite", "--quiet")
    assert code == 0
    assert (out / "sweep.json").read_bytes() != before
    assert said.count("\n") < 8
    assert not [f.name for f in tmp_path.iterdir() if f != out]


def test_a_file_gives_what_is_fixed_and_the_command_line_what_is_swept(
    run_cli, tmp_path, plain_files
):
    file = tmp_path / "c.toml"
    file.write_text("seed = 5\n[class_weight]\n4 = 2.0\n9 = 7.0\n")
    code, _, _ = run_cli("sweep", *FAST, *SWEPT, "--config", file, "--out", tmp_path / "s")
    assert code == 0
    spec = read_toml(tmp_path / "s" / "sweep.toml")
    assert spec["seed"] == 5
    assert spec["class_weight"]["4"] == 2.0
    trials = taken_up(tmp_path / "s").trials
    assert [(e.name, e.config.class_weight) for e in trials] == [
        ("class_weight 9=1", {"4": 2.0, "9": 1.0}),
        ("class_weight 9=5", {"4": 2.0, "9": 5.0}),
        ("plain", {}),
    ]


def test_help_of_the_sweep_does_not_load_torch():
    code = (
        "import sys; sys.argv = ['funcloss', 'sweep', '--help']\n"
        "from funcloss.app.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--resume" in done.stdout
