"""The audit that travels with a training: step by step, and through the command."""

import copy
import dataclasses
import json
import re

import audit_reference as ref
import pytest
import torch
from conftest import StopAt, resume
from torch import nn
from torch.testing import assert_close

from funcloss import losses, optim
from funcloss._trees import flatten
from funcloss.app import runs
from funcloss.app.cli import app as shell
from funcloss.app.config import make_config
from funcloss.app.data import get_batch
from funcloss.app.registry import LOSSES
from funcloss.app.runs import folder
from funcloss.app.runs.auditing import step_auditor
from funcloss.app.runs.options import make_criterion
from funcloss.app.runs.setup import make_setup
from funcloss.app.train import train
from funcloss.audit import AuditSettings, LossSpec, StepSpec, audit, make_audit_step
from funcloss.combinators import class_weighted
from funcloss.errors import AuditError, RunError
from funcloss.keys import example_keys
from funcloss.objectives import mean_of, sum_of, supervised, weighted_mean_of
from funcloss.training import init_state, make_train_step
from funcloss.training.loop import epoch_order
from funcloss.typing import Batch

CLASSES, N, RATE, STEPS = 4, 16, 0.125, 5
NAMES = ("a", "b", "c", "d")
WEIGHTS = torch.tensor([1.0, 3.0, 0.5, 2.0]).double()
EVEN = torch.ones(CLASSES).double()
OURS = ref.OURS
RULES = {
    name: ref.RULES[name]
    for name in (
        "sgd", "sgd, decay, clipped", "momentum", "dampened", "nesterov", "adam",
        "adam, decay, clipped", "adamw", "adamw, decay, clipped",
    )
}  # fmt: skip
SCHEDULE = optim.step_decay(every=2, factor=0.5)
FACTORS = (1.0, 1.0, 0.5, 0.5, 0.25)


def make_model(drop=0.4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Dropout(drop), nn.Linear(8, CLASSES)
    ).double()


def batch_of(number, *, absent=None, where=None):
    """Return a batch of its own for every step; one class may be absent."""
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(N, 5, generator=generator).double()
    labels = torch.arange(N) % CLASSES
    if absent is not None:
        labels = torch.where(labels == absent, (absent + 1) % CLASSES, labels)
    inputs += torch.nn.functional.one_hot(labels, 5)
    return Batch(inputs, labels, where)


def criterion_of(reduction):
    loss = losses.cross_entropy
    return {
        "mean": lambda: mean_of(class_weighted(loss)),
        "weighted_mean": lambda: weighted_mean_of(loss),
        "sum": lambda: sum_of(class_weighted(loss)),
    }[reduction]()


def flat(params):
    return torch.cat([p.flatten() for p in params.values()])


def expected_parts(state, batch, weights, reduction, model):
    """Return each class's part of the gradient by its definition, one example after another."""
    twin = copy.deepcopy(model)
    twin.load_state_dict(state.params)
    keys = example_keys(state.key, state.step, len(batch.targets))
    part = ref.Part(batch.inputs, batch.targets, batch.where, None, keys)
    objective = ref.Objective(twin, losses.cross_entropy, (part,), CLASSES, weights, {}, reduction)
    return ref.class_parts(objective, NAMES), ref.flat_params(twin)


def near(found, expected, tolerance, size=None):
    size = float(expected.abs().max()) if size is None else float(size)
    assert float((found - expected).abs().max()) <= tolerance * max(size, 1e-300)


@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum"])
@pytest.mark.parametrize("name", RULES)
def test_the_step_of_every_class_adds_up_to_the_step_of_the_training(name, reduction):
    rule, model = RULES[name], make_model()
    optimizer = OURS[rule.name](**rule.options)
    how = {"schedule": SCHEDULE, "clip_norm": rule.clip_norm}
    step = make_train_step(supervised(model, criterion_of(reduction)), optimizer, **how)
    loss = LossSpec(losses.cross_entropy, reduction=reduction)
    audit_step = make_audit_step(model, loss, optimizer, classes=NAMES, **how)
    hyper = {"learning_rate": torch.tensor(RATE).double(), "class_weights": WEIGHTS}
    state = init_state(model, optimizer, seed=2)
    memory, known = None, ref.Memory(0, {})
    for number in range(STEPS):
        batch = batch_of(number, absent=3 if number > 1 else None)
        findings, memory = audit_step(state, batch, hyper, memory)
        parts, params = expected_parts(state, batch, WEIGHTS, reduction, model)
        rows, known = rule.split(parts, params, known, RATE * FACTORS[number])
        after, _ = step(state, batch, hyper)
        moved = flat(after.params) - flat(state.params)
        near(ref.total(rows), moved, 1e-9)

        found = findings.step
        assert found.rows == (*NAMES, "weight decay", "history")
        nothing = torch.zeros_like(moved)
        matrix = torch.stack([rows.get(row, nothing) for row in found.rows])
        near(found.gram, matrix @ matrix.T, 1e-9)
        near(found.gram.sum(1), matrix @ moved, 1e-9, (matrix @ matrix.T).abs().max())
        assert_close(found.share.sum().item(), 1.0)
        assert found.learning_rate == pytest.approx(RATE * FACTORS[number], rel=1e-12)
        gradient = ref.total(parts)
        assert found.clip == pytest.approx(rule.clip(gradient), rel=1e-9)
        assert found.note == ""
        stacked = torch.stack(list(parts.values()))
        near(findings.balance.share, stacked @ gradient / gradient.square().sum(), 1e-9)
        near(findings.balance.norm, stacked.norm(dim=1), 1e-9)
        near(findings.balance.gradient_norm, gradient.norm(), 1e-9)
        if memory:
            total = torch.cat([m.sum(0).flatten() for m in memory.values()])
            near(total, flat(optimizer.split.memory(after.opt_state)), 1e-12)
        state = after


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "adamw"])
def test_a_class_that_stops_occurring_keeps_a_row_that_decays(name):
    rule, model = RULES[name], make_model()
    optimizer = OURS[rule.name](**rule.options)
    step = make_train_step(supervised(model, mean_of(losses.cross_entropy)), optimizer)
    audit_step = make_audit_step(model, losses.cross_entropy, optimizer, classes=NAMES)
    hyper = {"learning_rate": torch.tensor(RATE).double()}
    state, memory, lengths, shares = init_state(model, optimizer), None, [], []
    for number in range(6):
        batch = batch_of(number, absent=2 if number > 1 else None)
        findings, memory = audit_step(state, batch, hyper, memory)
        state, _ = step(state, batch, hyper)
        lengths.append(torch.cat([m[2].flatten() for m in memory.values()]).norm())
        shares.append(float(findings.step.share[2]))
        if number > 1:
            assert findings.count[2] == 0
            assert findings.balance.share[2] == 0
            assert findings.balance.norm[2] == 0
            assert findings.loss[2].isnan()
            assert findings.step.norm[2] > 0
    ratios = [float(b / a) for a, b in zip(lengths[1:], lengths[2:], strict=False)]
    assert ratios == pytest.approx([0.9] * 4, rel=1e-9)
    assert all(share != 0 for share in shares)
    gone, _ = audit_step(state, batch_of(9, absent=2), hyper, None)
    assert gone.step.norm[2] == 0
    assert gone.step.norm[-1] > 0  # history


def test_the_memory_is_of_the_step_that_was_audited_and_nothing_given_is_touched():
    model, optimizer = make_model(), optim.adam(weight_decay=0.1)
    audit_step = make_audit_step(model, losses.cross_entropy, optimizer, classes=NAMES)
    hyper = {"learning_rate": torch.tensor(RATE).double(), "class_weights": WEIGHTS}
    state = init_state(model, optimizer)
    _, memory = audit_step(state, batch_of(0), hyper, None)
    given = {**flatten(state), **{f"memory {n}": m for n, m in memory.items()}}
    before = {name: t.clone() for name, t in given.items()}
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    outside = torch.get_rng_state()
    first, later = audit_step(state, batch_of(1), hyper, memory)
    again, same = audit_step(state, batch_of(1), hyper, memory)
    assert all(torch.equal(given[name], t) for name, t in before.items())
    assert all(torch.equal(model.state_dict()[name], t) for name, t in weights.items())
    assert torch.equal(torch.get_rng_state(), outside)
    assert torch.equal(first.step.gram, again.step.gram)
    assert all(torch.equal(later[name], same[name]) for name in later)
    assert not any(t.requires_grad for t in later.values())


@pytest.mark.parametrize("where", [None, torch.arange(N) % 5 != 0], ids=["all", "where"])
@pytest.mark.parametrize("reduction", ["mean", "weighted_mean", "sum"])
@pytest.mark.parametrize("name", ["sgd, decay, clipped", "dampened", "adam, decay, clipped"])
def test_it_says_what_an_audit_of_the_same_batch_and_state_says(name, reduction, where):
    rule, model = RULES[name], make_model()
    optimizer = OURS[rule.name](**rule.options)
    how = {"schedule": SCHEDULE, "clip_norm": rule.clip_norm}
    step = make_train_step(supervised(model, criterion_of(reduction)), optimizer, **how)
    hyper = {"learning_rate": torch.tensor(RATE).double(), "class_weights": WEIGHTS}
    state = init_state(model, optimizer, seed=5)
    for number in range(3):
        state, _ = step(state, batch_of(number), hyper)
    batch = batch_of(7, where=where)
    loss = LossSpec(losses.cross_entropy, reduction=reduction)
    audit_step = make_audit_step(model, loss, optimizer, classes=NAMES, **how)
    findings, _ = audit_step(state, batch, hyper, None)
    loss = LossSpec(losses.cross_entropy, WEIGHTS, reduction=reduction)
    whole = audit(model, state, loss, [batch], step=StepSpec(optimizer, RATE, **how))
    assert torch.equal(findings.count, whole.count)
    assert_close(findings.loss, whole.loss)
    for part in ("share", "expected_share", "elasticity", "norm", "conflict", "gradient_norm"):
        found, expected = getattr(findings.balance, part), getattr(whole.balance, part)
        assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert findings.step.rows[CLASSES:] == whole.step.rows[CLASSES:]
    near(findings.step.gram, whole.step.gram, 1e-9)
    assert findings.step.learning_rate == pytest.approx(whole.step.learning_rate, rel=1e-12)
    assert findings.step.clip == pytest.approx(whole.step.clip, rel=1e-9)
    asleep = audit(copy.deepcopy(model).eval(), state, loss, [batch])
    assert (asleep.balance.share - whole.balance.share).abs().max() > 1e-3  # dropout is at work


def test_a_changed_batch_size_and_changed_options_are_seen():
    model, optimizer = make_model(), optim.sgd()
    audit_step = make_audit_step(model, losses.softmax_focal, optimizer, classes=NAMES)
    state, batch = init_state(model, optimizer), batch_of(0)
    for rows, gamma in ((16, 0.0), (5, 2.0), (16, 4.0), (1, 1.0)):
        part = Batch(batch.inputs[:rows], batch.targets[:rows])
        hyper = {"learning_rate": torch.tensor(RATE).double(), "gamma": torch.tensor(gamma)}
        findings, _ = audit_step(state, part, hyper, None)
        loss = LossSpec(losses.softmax_focal, options={"gamma": torch.tensor(gamma)})
        whole = audit(model, state, loss, [part], settings=AuditSettings(classes=NAMES))
        assert_close(findings.balance.share, whole.balance.share, rtol=1e-9, atol=1e-12)


def test_weights_and_options_of_the_loss_hold_where_hyper_has_none():
    model, optimizer, batch = make_model(), optim.sgd(), batch_of(0)
    gamma = {"gamma": torch.tensor(2.0)}
    spec = LossSpec(losses.softmax_focal, WEIGHTS, gamma)
    bare, rate = LossSpec(losses.softmax_focal), {"learning_rate": torch.tensor(RATE).double()}
    state = init_state(model, optimizer)
    own, given, over = (
        make_audit_step(model, loss, optimizer, classes=NAMES)(state, batch, rate | hyper, None)[0]
        for loss, hyper in (
            (spec, {}),
            (bare, {"class_weights": WEIGHTS, **gamma}),
            (spec, {"class_weights": EVEN}),
        )
    )
    assert torch.equal(own.balance.share, given.balance.share)
    assert torch.equal(over.balance.class_weights, EVEN)
    assert not torch.equal(own.balance.share, over.balance.share)


def test_a_model_that_couples_its_examples_is_refused_at_once():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))
    with pytest.raises(AuditError, match="BatchNorm1d"):
        make_audit_step(model, losses.cross_entropy, optim.sgd(), classes=NAMES)


def test_a_batch_of_which_no_example_counts_is_refused():
    model, optimizer = make_model(), optim.sgd()
    audit_step = make_audit_step(model, losses.cross_entropy, optimizer, classes=NAMES)
    hyper = {"learning_rate": torch.tensor(RATE).double()}
    none = batch_of(0, where=torch.zeros(N, dtype=torch.bool))
    with pytest.raises(AuditError, match="no example counts"):
        audit_step(init_state(model, optimizer), none, hyper, None)


# Through a run.

SMALL = {
    "dataset": "mnist-sample",
    "model": "article-cnn",
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "schedule": "cosine",
    "class_weight": {"9": 5},
    "epochs": 1,
    "batch_size": 100,
    "log_every": 10,
    "compile": "off",
    "audit_every": 7,
}
KEYS = {
    "kind", "step", "epoch", "class", "count", "loss", "share", "expected_share", "elasticity",
    "norm", "update_share", "seconds",
}  # fmt: skip
AUDITED = [1, 8, 15, 22, 29, 36]


def config(**options):
    return make_config(SMALL, options)


def audits(run):
    return [r for r in [*folder.records_of(run)] if r["kind"] == "audit"]


def timeless(records):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def same(a, b):
    """Whether two runs ended in the same state and the same model, to the bit."""
    files = "checkpoint.safetensors", "model.safetensors"
    pairs = [[runs.load_tensors(run / file)[0] for run in (a, b)] for file in files]
    return all(x.keys() == y.keys() and all(map(torch.equal, x.values(), y.values()))
               for x, y in pairs)  # fmt: skip


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A run that was audited on the way, and the events."""
    events = []
    run = tmp_path_factory.mktemp("audited") / "run"
    train(config(), run, show=events.append)
    return run, events


def test_every_audit_is_a_line_a_class(audited):
    run, events = audited
    records = audits(run)
    assert [r["step"] for r in records] == [step for step in AUDITED for _ in range(10)]
    assert [r["class"] for r in records] == [*"0123456789"] * len(AUDITED)
    assert all(r.keys() == KEYS for r in records)
    assert {r["epoch"] for r in records} == {1}
    for step in AUDITED:
        now = [r for r in records if r["step"] == step]
        assert sum(r["count"] for r in now) == 100
        assert sum(r["share"] for r in now) == pytest.approx(1.0)
        assert sum(r["expected_share"] for r in now) == pytest.approx(1.0)
        sums = [r["count"] * (5 if r["class"] == "9" else 1) for r in now]
        assert [r["expected_share"] for r in now] == pytest.approx([b / sum(sums) for b in sums])
        assert len({r["seconds"] for r in now}) == 1
        assert now[0]["seconds"] > 0
    first = [r for r in records if r["step"] == 1]
    assert sum(r["update_share"] for r in first) == pytest.approx(1.0)  # no history yet
    seen = [e for e in events if isinstance(e, runs.Audited)]
    assert [e.step for e in seen] == AUDITED
    assert [row for e in seen for row in e.rows] == [
        {k: v for k, v in r.items() if k not in ("kind", "step", "epoch", "seconds")}
        for r in records
    ]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["audits"] == len(AUDITED)
    assert summary["audit_seconds"] == pytest.approx(sum(e.seconds for e in seen))


def test_the_lines_are_what_an_audit_of_the_state_before_the_step_says(audited, tmp_path):
    run, _ = audited
    setup = make_setup(config())
    state = setup.state
    order = epoch_order(state.key, 0, len(setup.dataset.train.labels))
    for number in range(AUDITED[1]):
        index = order[100 * number : 100 * (number + 1)]
        batch = get_batch(setup.dataset, setup.dataset.train, index)
        if number + 1 in AUDITED:
            loss = LossSpec(losses.cross_entropy, setup.hyper["class_weights"])
            step = StepSpec(optim.sgd(momentum=0.9), 0.05, optim.cosine(steps=40))
            found = audit(setup.model, state, loss, [batch], step=step).to_dict()["classes"]
            lines = [r for r in audits(run) if r["step"] == number + 1]
            for line, row in zip(lines, found, strict=True):
                assert line["class"] == row["name"]
                for key in ("count", "loss", "share", "expected_share", "elasticity", "norm",
                            "update_share"):  # fmt: skip
                    assert line[key] == pytest.approx(row[key], rel=1e-3, abs=1e-4), key
        state, _ = setup.train_step(state, batch, setup.hyper)


def test_the_weights_are_the_same_to_the_bit_without_audits(audited, tmp_path):
    run, _ = audited
    train(config(audit_every=0), tmp_path / "none")
    assert audits(tmp_path / "none") == []
    assert same(run, tmp_path / "none")
    assert json.loads((tmp_path / "none" / "summary.json").read_text())["audits"] == 0


@pytest.mark.parametrize("at", [1, 7, 8, 13, 39])
def test_a_run_that_is_stopped_goes_on_to_the_same_audits(tmp_path, audited, at):
    whole, _ = audited
    run = tmp_path / "run"
    stopped = train(config(), run, should_stop=StopAt(at))
    assert not stopped.finished
    assert [r["step"] for r in audits(run)[::10]] == [s for s in AUDITED if s <= at]
    assert resume(run).finished
    assert timeless(audits(run)) == timeless(audits(whole))
    assert same(run, whole)


def test_what_was_audited_after_the_checkpoint_is_audited_again_once(tmp_path, audited):
    """A kill loses the steps since the checkpoint, and not their lines."""
    whole, _ = audited
    run = tmp_path / "run"
    train(config(), run, should_stop=StopAt(10))
    for line in audits(whole):
        if line["step"] == 15:
            folder.append_line(run / "metrics.jsonl", line)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "audit", "step": 15, "cl')
    resume(run)
    assert timeless(audits(run)) == timeless(audits(whole))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adam", "weight_decay": 0.1, "learning_rate": 0.01},
        {"optimizer": "adamw", "weight_decay": 0.1, "learning_rate": 0.01},
        {"nesterov": True, "clip_norm": 0.3},
        {"reduction": "weighted_mean", "schedule": "one-cycle"},
        {"loss": "squared_error", "learning_rate": 1e-3},
        {"model": "linear", "loss": "multiclass_hinge", "schedule": "step"},
        {"class_weight": {"9": 0.0}},
        {
            "learning_rate": 1e-3,
            "batch_size": 1,
            "log_every": 4000,
            "audit_every": 3999,
            "momentum": 0.0,
        },
    ],
    ids=str,
)
def test_every_option_is_audited(tmp_path, options):
    options = {"model": "linear", "class_weight": {"9": 5}, **options}
    run = tmp_path / "run"
    train(config(**options), run)
    records = audits(run)
    assert records
    for step in {r["step"] for r in records}:
        now = [r for r in records if r["step"] == step]
        assert sum(r["share"] for r in now) == pytest.approx(1.0, abs=1e-6)
        none = [r for r in now if r["count"] == 0]
        assert all(r["share"] == 0 and r["norm"] == 0 and r["loss"] is None for r in none)
    if options.get("reduction") == "weighted_mean":
        assert all(
            r["elasticity"] == pytest.approx(r["share"] - r["expected_share"]) for r in records
        )
    if options["class_weight"] == {"9": 0.0}:
        assert all(r["share"] == 0 for r in records if r["class"] == "9")


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_that_trains_is_audited_as_it_trains(loss):
    needed = {"equalization": {"threshold": 0.05}, "cross_entropy_with_cost": {"price": 0.5}}
    options = {"loss": loss, "model": "linear", "optimizer": "adam", "clip_norm": 0.5}
    setup = make_setup(config(**options, loss_option=needed.get(loss, {})))
    batch = get_batch(setup.dataset, setup.dataset.train, torch.arange(0, 4000, 40))
    rows = step_auditor(setup, print)(setup.state, batch, setup.hyper).rows
    grads = []
    for c in range(10):
        mine = batch._replace(where=batch.targets == c)
        part, _ = torch.func.grad(
            supervised(setup.model, make_criterion(loss, weighted=True)), has_aux=True
        )(setup.state.params, {}, mine, torch.arange(100), setup.hyper)
        grads.append(flat(part).double() * int(mine.where.sum()) / 100)
    grads = torch.stack(grads)
    share = grads @ grads.sum(0) / grads.sum(0).square().sum()
    assert [r["share"] for r in rows] == pytest.approx(share.tolist(), rel=1e-4, abs=1e-5)
    assert [r["norm"] for r in rows] == pytest.approx(grads.norm(dim=1).tolist(), rel=1e-4)
    assert sum(r["update_share"] for r in rows) == pytest.approx(1.0)


def test_a_batch_of_which_every_class_weighs_nothing_stops_no_training(tmp_path):
    """A batch may hold the free classes only: its gradient is 0, and no class has a share."""
    free = dict.fromkeys("012345678", 0.0)
    options = {"model": "linear", "class_weight": free, "batch_size": 4, "audit_every": 10}
    options |= {"log_every": 1000, "learning_rate": 1e-4}
    outcome = train(config(**options), tmp_path / "run")
    assert outcome.finished
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in lines
    assert {r["share"] for r in audits(tmp_path / "run")} >= {None, 1.0}


def test_a_training_that_diverges_ends_as_it_does_without_audits(tmp_path):
    """An audit tells of a training and never ends it."""
    made = config(model="linear", learning_rate=1e38, audit_every=1, batch_size=1000)
    said = []
    for audit_every in (1, 0):
        place = tmp_path / f"run{audit_every}"
        with pytest.raises(RunError, match="cross_entropy is not finite at step 2") as end:
            train(dataclasses.replace(made, audit_every=audit_every), place)
        said.append(str(end.value))
        text = (place / "metrics.jsonl").read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
    assert said[0] == said[1]


def test_no_step_is_no_audit(tmp_path):
    train(config(model="linear", epochs=0), tmp_path / "run")
    assert audits(tmp_path / "run") == []


def test_tensorboard_gets_the_shares(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(config(model="linear", tensorboard=True), run)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for score in ("share", "norm", "update_share"):
        for name in "0123456789":
            found = events.Scalars(f"{score}/{name}")
            lines = [r for r in audits(run) if r["class"] == name]
            assert [e.step for e in found] == AUDITED
            assert [e.value for e in found] == pytest.approx([r[score] for r in lines], rel=1e-5)
    assert [e.step for e in events.Scalars("loss/train")] == [10, 20, 30, 40]


# Through the command.

FAST = ["--dataset", "mnist-sample", "--model", "linear", "--compile", "off", "--epochs", "1"]


def test_the_command_says_how_many_audits_were_recorded_and_prints_none(run_cli, tmp_path):
    code, out, _ = run_cli(
        *FAST, "--audit-every", 10, "--class-weight", "9=5", "--run-dir", tmp_path / "run",
        program=shell.main_train,
    )  # fmt: skip
    assert code == 0
    records = audits(tmp_path / "run")
    assert [r["step"] for r in records[::10]] == [1, 11, 21, 31]
    told = re.search(r"^epoch 1/1 .* s  4 audits recorded, (\d+\.\d)% of the time$", out, re.M)
    assert told
    spent = sum(r["seconds"] for r in records[::10])
    epoch = [r for r in [*folder.records_of(tmp_path / "run")] if r["kind"] == "epoch"][-1]
    assert float(told[1]) == pytest.approx(100 * spent / epoch["seconds"], abs=0.06)
    assert "share" not in out
    assert "\x1b" not in out


def test_the_command_audits_once_where_there_are_fewer_steps_and_never_at_0(run_cli, tmp_path):
    for every, steps in ((1000, [1]), (31, [1]), (30, [1, 31]), (0, [])):
        run = tmp_path / f"{every}"
        code, out, _ = run_cli(*FAST, "--audit-every", every, "--run-dir", run,
                               program=shell.main_train)  # fmt: skip
        assert code == 0
        assert [r["step"] for r in audits(run)[::10]] == steps
        assert ("recorded" in out) == bool(steps)


def test_one_audit_is_told_in_the_singular(run_cli, tmp_path):
    _, out, _ = run_cli(*FAST, "--audit-every", 1000, "--run-dir", tmp_path / "run",
                        program=shell.main_train)  # fmt: skip
    assert re.search(r" 1 audit recorded, \d+\.\d% of the time$", out, re.M)


def test_a_quiet_command_audits_without_a_word(run_cli, tmp_path):
    code, out, _ = run_cli(*FAST, "--quiet", "--run-dir", tmp_path / "run",
                           program=shell.main_train)  # fmt: skip
    assert code == 0
    assert out.count("\n") == 1
    assert len(audits(tmp_path / "run")) == 10


@pytest.mark.parametrize("every", ["-1", "1.5", "many"])
def test_a_wrong_interval_is_refused(run_cli, tmp_path, every):
    code, out, err = run_cli(*FAST, "--audit-every", every, "--run-dir", tmp_path / "run",
                             program=shell.main_train)  # fmt: skip
    assert code == 2
    assert out == ""
    assert "audit" in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
