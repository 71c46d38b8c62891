"""Training runs that are long enough: early stopping, and defaults by the number of examples."""

import contextlib
import inspect
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Killed, StopAt, kill_at_write, resume, swept

from funcloss.app import audits, length, registry, runs, sweep
from funcloss.app.config import Typed, make_config, read_toml
from funcloss.app.options import AuditOptions
from funcloss.app.runs import folder
from funcloss.app.runs.early import better, first_best
from funcloss.app.runs.setup import make_setup
from funcloss.app.sweep import Axis
from funcloss.app.train import train
from funcloss.errors import ConfigError

WAITS = [  # epochs done, steps of each, and the epochs to wait for
    (1, 100, 10),
    (50, 100, 10),
    (51, 100, 11),
    (200, 1000, 40),
    (1, 20, 10),
    (1, 19, 11),
    (1, 1, 200),
    (999, 1, 200),
    (30, 7, 29),
]


@pytest.mark.parametrize(("epoch", "per_epoch", "waits"), WAITS)
def test_the_patience_is_ten_epochs_200_steps_or_a_fifth_of_the_epochs(epoch, per_epoch, waits):
    assert length.patience(epoch, per_epoch) == waits


ENDS = [  # losses by epoch, the last again and again; steps of an epoch; the last epoch
    ([1.0], 100, 11),
    ([3.0, 2.0, 1.0], 100, 13),
    ([3.0, 2.0, 1.0], 4, 53),
    ([1.0] * 9 + [0.5], 100, 20),
    ([float(-e) for e in range(60)], 100, 75),  # best: 60, and a fifth of 75 is 15
    ([float(-e) for e in range(5000)], 100, 200),  # 20,000 steps
    ([float(-e) for e in range(5000)], 3, 1000),
    ([float(-e) for e in range(5000)], 30_000, 1),
]


@pytest.mark.parametrize(("losses", "per_epoch", "end"), ENDS, ids=range(len(ENDS)))
def test_a_run_ends_where_the_loss_has_not_fallen_for_the_patience(losses, per_epoch, end):
    best, least = 0, math.inf
    for epoch in itertools.count(1):
        loss = losses[min(epoch, len(losses)) - 1]
        if loss < least:
            best, least = epoch, loss
        if length.is_over(epoch, best, per_epoch):
            break
    assert epoch == end
    assert epoch <= length.last_epoch("auto", per_epoch)


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3.0, 2.0, 2.5], 2),
        ([3.0, 2.0, 2.0], 2),  # the first of equal ones
        ([math.nan, 2.0, 2.5], 2),
        ([math.inf, math.inf], 1),
        ([math.nan, math.nan], 1),
        ([2.0, math.nan, math.inf, 1.0], 4),
        ([], 0),
    ],
)
def test_the_memory_is_of_the_lowest_loss(losses, kept):
    def state(step):
        params = {"w": torch.tensor([float(step)])}
        number = torch.tensor(step)
        return runs.lifecycle.TrainState(params, {}, None, number, number)

    best = first_best(state(0))
    for step, loss in enumerate(losses, 1):
        best = better(best, state(step), loss)
    assert (int(best.step), float(best.params["w"])) == (kept, kept)


def test_the_rows_of_the_schedules_say_which_need_the_number_of_steps():
    for row in registry.SCHEDULES.values():
        assert row.of_length == ("steps" in inspect.signature(row.load()).parameters)


@pytest.mark.parametrize(
    ("n", "size"),
    [(0, 1), (3, 3), (8, 8), (100, 8), (181, 8), (182, 16), (341, 16), (455, 32), (10**6, 128)],
)
def test_the_batch_of_few_examples_is_the_power_of_two_nearest_to_a_sixteenth(n, size):
    assert length.batch_size_for(n) == size


def test_three_epochs_of_few_examples_are_less_than_500_steps():
    assert length.EPOCHS * (length.FEW // length.BATCH_SIZE) < 500


def rows(path, n, *, noise=0.5, seed=0):
    """Write a table of two classes that overlap, every split cut from it."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    features = draw.normal(size=(n, 3)) + labels[:, None] * (1 - noise)
    np.savez(path, images=features.astype("float32"), labels=labels)
    return str(path)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """Figures take longer than these runs."""
    monkeypatch.setattr(runs.report.figures, "FIGURES", {})


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return rows(tmp_path_factory.mktemp("data") / "rows.npz", 250)


SMALL = {
    "model": "linear",
    "learning_rate": 0.02,
    "epochs": "auto",
    "batch_size": 10,  # of 200: 20 steps an epoch
    "compile": "off",
    "device": "cpu",
    "log_every": 15,
    "audit_every": 0,
}


def config(table, **options):
    return make_config(SMALL, {"dataset": table}, options)


def tensors(run, file):
    return runs.load_tensors(Path(run) / f"{file}.safetensors")[0]


def same(a, b):
    """Whether two runs ended in the same state and memory, the same model and the same summary."""
    for file in ("checkpoint", "model"):
        x, y = tensors(a, file), tensors(b, file)
        if x.keys() != y.keys() or not all(map(torch.equal, x.values(), y.values())):
            return False
    timed = ("train_seconds", "audit_seconds", "images_per_second")
    one, other = (folder.read_summary(Path(run)) for run in (a, b))
    return all(one[key] == other[key] for key in one if key not in timed)


def epochs_of(run):
    return [r for r in [*folder.records_of(Path(run))] if r["kind"] == "epoch"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, table):
    """A run that stopped early, and the events on the way."""
    events, run = [], tmp_path_factory.mktemp("runs") / "finished"
    outcome = train(config(table), run, show=events.append)
    return run, outcome, events


def test_the_run_stops_early_and_keeps_the_model_of_the_lowest_validation_loss(finished, table):
    run, outcome, events = finished
    losses = [e["validation"]["loss"] for e in epochs_of(run)][1:]
    best = min(range(len(losses)), key=losses.__getitem__) + 1
    summary = outcome.summary
    assert (summary["best_epoch"], summary["best_step"]) == (best, 20 * best)
    assert summary["epochs"] == len(losses) == best + 10
    assert 1 < best < 30
    assert summary["steps"] == 20 * len(losses)
    assert summary["validation"]["loss"] == pytest.approx(losses[best - 1], rel=1e-6)
    assert summary["test"]["loss"] == pytest.approx(epochs_of(run)[best]["test"]["loss"], rel=1e-6)
    checkpoint, model = tensors(run, "checkpoint"), tensors(run, "model")
    assert all(torch.equal(checkpoint[f"best/params/{name}"], model[name]) for name in model)
    assert any(not torch.equal(checkpoint[f"state/params/{n}"], model[n]) for n in model)
    said = [e.text for e in events if isinstance(e, runs.Note)]
    assert any(
        f"stopped after epoch {best + 10}, {20 * (best + 10)} steps: the validation loss has not "
        f"fallen for 10 epochs; the model kept is that of epoch {best}" in text
        for text in said
    )
    assert summary["warnings"] == []


def test_a_fixed_number_of_epochs_takes_the_same_steps(finished, table, tmp_path):
    run, outcome, _ = finished
    best = outcome.summary["best_epoch"]
    train(config(table, epochs=best, schedule="constant"), tmp_path / "fixed")
    fixed, kept = tensors(tmp_path / "fixed", "model"), tensors(run, "model")
    assert all(torch.equal(fixed[name], kept[name]) for name in kept)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 20, 33, "best", "after best", -1, 0])
def test_stopped_and_resumed_it_ends_at_the_same_bits(tmp_path, finished, table, at):
    whole, outcome, _ = finished
    best, steps = outcome.summary["best_step"], outcome.summary["steps"]
    at = {"best": best, "after best": best + 1, -1: steps - 1, 0: steps}.get(at, at)
    ended = train(config(table), tmp_path / "run", should_stop=StopAt(at))
    assert ended.finished == (at == steps)
    if not ended.finished:
        assert int(tensors(tmp_path / "run", "checkpoint")["state/step"]) == at
        assert resume(tmp_path / "run").finished
    assert same(tmp_path / "run", whole)


def test_stopped_often_it_ends_at_the_same_bits(tmp_path, finished, table):
    ended = train(config(table), tmp_path / "run", should_stop=StopAt(7))
    while not ended.finished:
        ended = resume(tmp_path / "run", should_stop=StopAt(47))
    assert same(tmp_path / "run", finished[0])


@pytest.mark.parametrize(
    "every", [pytest.param(0.0, marks=[pytest.mark.slow, pytest.mark.long]), 1e9]
)
def test_killed_at_any_write_it_ends_at_the_same_bits(
    tmp_path, finished, table, monkeypatch, every
):
    """Whether each epoch but the last writes a checkpoint, or none does."""
    whole, outcome, _ = finished
    monkeypatch.setattr(runs.lifecycle, "_SAVED_EVERY", every)
    last = 4 + 4 + (not every) * 3 * (outcome.summary["epochs"] - 1)
    ended = []
    for at in sorted({6, 7, last - 2, last - 1, last, last + 1}):
        run = tmp_path / f"run{at}"
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at_write(patch, at)
            ended.append(train(config(table), run).finished)
        if folder.read_summary(run) is None:
            assert resume(run).finished
        assert same(run, whole)
        assert len([*folder.records_of(run)]) == len([*folder.records_of(whole)])
    assert ended == [True]  # where no write was left to be killed at


def test_killed_in_a_step_it_goes_on_from_a_checkpoint_of_before(tmp_path, finished, table):
    def killed(event):
        if isinstance(event, runs.EpochReport) and event.number == 5:
            raise Killed

    with pytest.raises(Killed):
        train(config(table), tmp_path / "run", show=killed)
    assert resume(tmp_path / "run").finished
    assert same(tmp_path / "run", finished[0])


def test_a_run_reads_back_and_makes_the_same_again(tmp_path, finished):
    run, _, _ = finished
    resolved = read_toml(run / "config.toml")
    assert (resolved["epochs"], resolved["schedule"]) == ("auto", "constant")
    train(make_config(resolved), tmp_path / "again")
    assert same(tmp_path / "again", run)


def test_it_may_be_audited_on_the_way_and_after(tmp_path, finished, table):
    run = tmp_path / "run"
    train(config(table, audit_every=30), run, should_stop=StopAt(31))
    resume(run)
    audited = [r["step"] for r in [*folder.records_of(run)] if r["kind"] == "audit"]
    summary = folder.read_summary(run)
    assert sorted(set(audited)) == list(range(1, summary["steps"] + 1, 30))
    kept, whole = tensors(run, "model"), tensors(finished[0], "model")
    assert all(torch.equal(kept[name], whole[name]) for name in whole)
    notes = audits.audit_run(run, AuditOptions(examples=50)).audit.notes
    assert any(f"kept is of epoch {summary['best_epoch']}" in note for note in notes)
    assert any("a step like the last one taken" in note for note in notes)


@pytest.mark.slow
def test_it_may_be_compiled(tmp_path, table):
    made = config(table, compile="on")
    train(made, tmp_path / "whole")
    train(made, tmp_path / "run", should_stop=StopAt(50))
    resume(tmp_path / "run")
    assert same(tmp_path / "run", tmp_path / "whole")


def test_it_ends_at_the_most_steps(tmp_path, table, monkeypatch):
    monkeypatch.setattr(length, "MOST_STEPS", 70)
    notes = []
    summary = train(config(table), tmp_path / "run", show=notes.append).summary
    assert summary["epochs"] == 3
    text = next(n.text for n in notes if "stopped after" in getattr(n, "text", ""))
    assert "stopped after epoch 3, 60 steps: the most that epochs auto takes" in text


REFUSED = [
    (
        {"schedule": "cosine"},
        "does not go with schedule cosine, .*: use schedule auto, or set",
    ),
    ({"schedule": "one-cycle"}, "does not go with schedule one-cycle"),
    (
        {"floor": {"1": 0.5}},
        "auto does not go with floor, .*: leave floor out, or set epochs",
    ),
    ({"ceiling": {"cost": 0.5}}, "epochs auto does not go with ceiling"),
    ({"epochs": "automatic"}, "epochs must be a whole number or auto, got 'automatic'"),
    ({"epochs": "3"}, "epochs must be a whole number or auto, got '3'"),
    ({"val_fraction": 0}, "epochs auto stops by the loss on validation data, and none is held out"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_what_does_not_go_with_it_is_refused_with_the_fix(tmp_path, table, options, message):
    with pytest.raises(ConfigError, match=message):
        train(config(table, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_later_layer_lays_down_a_schedule_that_needs_the_end():
    file = {"schedule": "one-cycle", "warmup": 0.2, "epochs": 3}
    made = make_config(file, Typed(epochs="auto"))
    assert (made.epochs, made.schedule) == ("auto", "auto")
    assert make_config({"schedule": "step"}, {"epochs": "auto"}).schedule == "step"
    with pytest.raises(ConfigError, match="schedule one-cycle"):
        make_config(file, Typed(epochs="auto", schedule="one-cycle"))


NOT_GIVEN = {"model": "linear", "compile": "off", "device": "cpu", "audit_every": 0}
CHOSEN = {  # number of rows (0: mnist-sample), options; epochs, batch size and schedule; the note
    "few": (100, {}, ("auto", 8, "constant"), "epochs auto and batch_size 8 for 80 training exam"),
    "more": (1000, {}, ("auto", 64, "constant"), "epochs auto and batch_size 64 for 800 training"),
    "many": (30_000, {}, (3, 128, "one-cycle"), ""),
    "a published set": (0, {}, (3, 128, "one-cycle"), ""),
    "a published set, auto": (0, {"epochs": "auto"}, ("auto", 128, "constant"), ""),
    "epochs": (100, {"epochs": 4}, (4, 8, "one-cycle"), "batch_size 8 for 80 training examples"),
    "no epoch": (100, {"epochs": 0}, (0, 8, "one-cycle"), "batch_size 8 for 80"),
    "a batch size": (100, {"batch_size": 80}, ("auto", 80, "constant"), "epochs auto for 80 train"),
    "both": (100, {"epochs": 3, "batch_size": 80}, (3, 80, "one-cycle"), ""),
    "a schedule": (
        100,
        {"schedule": "cosine"},
        (100, 8, "cosine"),
        "epochs 100 and batch_size 8 for 80 training examples; about 1,000 steps, as there is no "
        "early stopping with schedule cosine",
    ),
    "a schedule without an end": (100, {"schedule": "step"}, ("auto", 8, "step"), "epochs auto"),
    "a floor": (100, {"floor": {"1": 0.5}}, (100, 8, "one-cycle"), "no early stopping with floor"),
    "nothing held out": (
        100,
        {"val_fraction": 0},
        (91, 8, "one-cycle"),  # 11 steps an epoch
        "epochs 91 and batch_size 8 for 90 training examples; .* without validation data",
    ),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_what_is_not_given_is_chosen_by_the_number_of_examples(tmp_path, case):
    n, options, chosen, note = CHOSEN[case]
    dataset = rows(tmp_path / "rows.npz", n) if n else "mnist-sample"
    setup = make_setup(make_config(NOT_GIVEN, {"dataset": dataset}, options))
    made = setup.config
    assert (made.epochs, made.batch_size, made.schedule) == chosen
    assert bool(setup.notes) == bool(note)
    if note:
        assert re.search(note, setup.notes[0])
    again = make_setup(made)
    assert (again.config, again.notes) == (made, ())


def test_the_command_says_and_records_what_was_chosen(tmp_path, table, run_cli):
    run = tmp_path / "run"
    args = ("train", "--dataset", table, "--model", "linear", "--compile", "off", "--run-dir", run)
    code, out, err = run_cli(*args)
    assert code == 0
    assert err == ""
    assert "epochs auto and batch_size 16 for 200 training examples" in out
    assert "step 0 of at most 12,000," in out
    resolved, tables = runs.folder.read_record(run / "config.toml")
    assert (resolved["epochs"], resolved["batch_size"]) == ("auto", 16)
    assert tables["run"]["requested"]["epochs"] == ""
    assert tables["run"]["requested"]["batch_size"] == 0
    shown = [line.split()[1] for line in out.splitlines() if line.startswith("epoch ")]
    assert shown[:10] == [*map(str, range(1, 10)), "10"]
    assert all(len(number.rstrip("0")) == 1 for number in shown)
    code, _, err = run_cli(*args, "--overwrite", "--epochs", "three")
    assert code == 2
    assert "epochs must be a whole number or auto, got 'three'" in err
    assert run_cli(*args, "--overwrite", "--epochs", "2", "--quiet")[0] == 0
    assert json.loads((run / "summary.json").read_text())["epochs"] == 2


NINE = Axis("class_weight", "1", (1.0, 3.0))


def test_a_sweep_takes_a_fixed_number_of_epochs(tmp_path, table, monkeypatch):
    monkeypatch.setattr(length, "STEPS", 30)
    notes, made = [], make_config(NOT_GIVEN, {"dataset": table})
    swept(made, [NINE], tmp_path / "s", show=notes.append)
    said = "epochs 3 and batch_size 16 for 200 training examples; about 30 steps, as there is no"
    assert any(f"{said} early stopping in a sweep" in getattr(n, "text", "") for n in notes)
    config = sweep.read_spec(tmp_path / "s").config
    assert (config.epochs, config.batch_size, config.schedule) == (3, 16, "one-cycle")
    assert folder.read_summary(tmp_path / "s" / "chosen")["epochs"] == 3
    with pytest.raises(ConfigError, match="same number of epochs: set epochs to a number"):
        swept(make_config(NOT_GIVEN, {"dataset": table, "epochs": "auto"}), [NINE], tmp_path / "t")
