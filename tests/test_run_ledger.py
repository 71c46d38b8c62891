"""The ledger of a run: kept for its share of the time, in its folder, and resumed."""

import json

import pandas
import pytest
import torch
from torch.testing import assert_close

from funcloss.app import runs
from funcloss.app.audits import audit_run, write_report
from funcloss.app.config import make_config
from funcloss.app.options import AuditOptions
from funcloss.app.runs import ledger as kept
from funcloss.app.runs import read_ledger
from funcloss.app.runs.setup import make_setup
from funcloss.app.train import train
from funcloss.errors import RunError

OPTIONS = {
    "dataset": "mnist-sample",
    "model": "linear",
    "epochs": 1,
    "batch_size": 400,
    "class_weight": {"9": 5.0},
    "ledger": "exact",
}


@pytest.fixture(autouse=True)
def _of_all_examples(monkeypatch):
    monkeypatch.setattr(kept, "_HELD_OUT", 2_000)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with an exact ledger, and what it showed."""
    folder, shown = tmp_path_factory.mktemp("runs") / "exact", []
    train(make_config(OPTIONS | {"epochs": 2, "ledger_layers": True}), folder, show=shown.append)
    return folder, shown


def tensors_of(folder):
    tensors, _ = runs.load_tensors(folder / kept.FILE)
    return tensors


def test_an_exact_ledger_adds_up_to_what_the_losses_changed_by(run):
    found = read_ledger(run[0])
    assert found is not None
    assert found.exact
    assert found.samples == int(found.ledger.steps) == 20
    assert found.ledger.residual < 0.01
    assert found.weights.tolist() == [1.0] * 9 + [5.0]
    assert found.parts[-3:] == ("weight decay", "history", "statistics")
    assert not found.note
    assert found.first == 0
    assert not found.ledger.standard_error.any()
    assert_close(sum(found.ledger.layers.values()), found.ledger.net[:, :-1])


def test_its_sums_are_kept_by_epoch(run):
    folder, shown = run
    found = read_ledger(folder)
    assert found.epochs.tolist() == [1, 2]
    assert_close(found.nets[-1], found.ledger.net)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in lines if line["kind"] == "ledger"]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert_close(torch.tensor(lines[0]["net"]).double(), found.nets[0])
    reports = [event for event in shown if isinstance(event, runs.LedgerReport)]
    assert [report.epoch for report in reports] == [1, 2]
    assert_close(reports[-1].ledger.net, found.ledger.net)


def test_a_finished_run_keeps_no_memory_of_the_optimiser(run):
    assert not any("memory" in name for name in tensors_of(run[0]))


def test_the_examples_behind_a_pair_are_of_its_class(run, sample):
    found = read_ledger(run[0])
    behind = found.behind(4, 9)
    assert 0 < len(behind) <= 8
    assert [value for _, value in behind] == sorted((v for _, v in behind), reverse=True)
    assert all(int(sample.train.labels[index]) == 9 for index, _ in behind)
    assert not found.behind(4, 3)  # of classes with a weight alone


def test_the_audit_of_a_run_tells_its_ledger(tmp_path, run):
    found = audit_run(run[0], AuditOptions(examples=200))
    assert_close(found.ledger.ledger.net, read_ledger(run[0]).ledger.net)
    (pair,) = found.behind
    assert pair.by == "9"
    harm = found.ledger.ledger.net[:, 9].clone()
    harm[9] = 0.0
    assert pair.loss == str(int(harm.argmax()))
    assert all(example.picture for example in pair.examples)
    assert all(example.effect > 0 for example in pair.examples)
    write_report(found, tmp_path)
    page = (tmp_path / "audit.html").read_text()
    assert 'id="outcome"' in page
    assert page.index('id="ledger"') < page.index('id="shares"')
    table = pandas.read_csv(tmp_path / "audit_ledger.csv")
    sums = torch.tensor(table.groupby("loss_of")["net"].sum().to_list())
    assert_close(sums.double(), found.ledger.ledger.net.sum(1))


@pytest.mark.parametrize("stop", [3, 10, 14])
def test_a_stopped_run_goes_on_to_the_same_ledger(tmp_path, run, stop):
    steps = 0

    def should_stop():
        nonlocal steps
        steps += 1
        return steps == stop

    config = make_config(OPTIONS | {"epochs": 2, "ledger_layers": True})
    train(config, tmp_path / "run", should_stop=should_stop)
    config = runs.folder.read_config(tmp_path / "run")
    train(config, tmp_path / "run", resume=True)
    now, then = tensors_of(tmp_path / "run"), tensors_of(run[0])
    assert now.keys() == then.keys()
    for name in then.keys() - {"examples", "effects", "labels"}:
        assert_close(now[name], then[name], rtol=0, atol=0, msg=name)
    assert sorted(now["examples"].tolist()) == sorted(then["examples"].tolist())


def test_a_ledger_that_was_lost_begins_again_and_says_so(tmp_path):
    config = make_config(OPTIONS)
    train(config, tmp_path / "run", should_stop=iter([False] * 3 + [True]).__next__)
    (tmp_path / "run" / kept.FILE).unlink()
    train(runs.folder.read_config(tmp_path / "run"), tmp_path / "run", resume=True)
    found = read_ledger(tmp_path / "run")
    assert found.first == 4
    assert "after step 4" in found.note
    assert found.ledger.residual < 0.01
    assert found.ledger.net[:, found.parts.index("history")].any()


def test_a_damaged_ledger_is_refused(tmp_path, run):
    tensors, header = runs.load_tensors(run[0] / kept.FILE)
    tensors["ledger/raised"] = tensors["ledger/raised"][1:]
    runs.save_tensors(tmp_path / kept.FILE, tensors, header)
    with pytest.raises(RunError, match="is damaged: it has no raised"):
        read_ledger(tmp_path)
    (tmp_path / kept.FILE).write_bytes(b"nothing")
    with pytest.raises(RunError, match=kept.FILE):
        read_ledger(tmp_path)


def test_none_is_kept_where_none_is_asked_for(tmp_path):
    train(make_config(OPTIONS | {"ledger": "off"}), tmp_path / "run")
    assert read_ledger(tmp_path / "run") is None
    assert not (tmp_path / "run" / kept.FILE).exists()
    found = audit_run(tmp_path / "run", AuditOptions(examples=100))
    assert (found.ledger, found.behind) == (None, ())
    assert any("kept no ledger" in note for note in found.audit.notes)


def test_a_ledger_that_fails_ends_no_training(tmp_path, monkeypatch):
    shown = []

    def fails(*args, **more):
        raise RuntimeError("CUDA error: out of luck\nand more")

    monkeypatch.setattr(kept, "make_course", fails)
    outcome = train(make_config(OPTIONS), tmp_path / "run", show=shown.append)
    assert outcome.finished
    said = [e.text for e in shown if isinstance(e, runs.Note) and e.warning]
    assert "no ledger is kept: CUDA error: out of luck" in said
    assert read_ledger(tmp_path / "run") is None


class Clock:
    """Time that goes on when something is done."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def after(self, seconds, act):
        """Return ``act``, which takes so long."""

        def slow(*args):
            self.now += seconds
            return act(*args)

        return slow


@pytest.mark.parametrize("cost", [0.08, 2.0, 30.0])
def test_a_ledger_takes_its_share_of_the_time(tmp_path, monkeypatch, cost):
    """Of 500 steps of 0.2 s, 100 s: at most 10 s, whatever a measured step takes."""
    clock = Clock()
    monkeypatch.setattr(kept, "time", clock)
    config = make_config(OPTIONS | {"epochs": 50, "ledger": "sampled"})
    setup = make_setup(config)
    state = setup.state
    ours = kept.RunLedger(setup, lambda event: None, state, tmp_path)
    ours._behind = None
    one = ours._ledger

    def exact(ledger, *step):
        clock.now += cost
        return ledger._replace(steps=ledger.steps + 1)

    sampled = ours._sampled.update

    def drawn(ledger, state, batch, hyper, after, every):
        before = 0 if ledger.sampling is None else int(ledger.sampling.samples)
        found = sampled(ledger, state, batch, hyper, after, every)
        clock.now += cost * (int(found.sampling.samples) - before)
        return found

    ours._exact = ours._exact._replace(update=exact)
    ours._sampled = ours._sampled._replace(update=drawn)
    batch = next(setup.iter_batches([torch.arange(40)]))
    after, _ = setup.train_step(state, batch, setup.hyper)
    for _ in range(500):
        clock.now += 0.2
        ours.update(state, batch, setup.hyper, after)
    assert one is not None
    taken = clock.now - 500 * 0.2
    assert taken <= 10.0 + 2 * cost
    if cost < 30.0:
        assert taken >= 4.0


def test_what_a_sample_costs_is_known_again_when_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "_SHARE", 5.0)  # of a training of milliseconds: some samples
    config = make_config(OPTIONS | {"epochs": 4, "ledger": "sampled"})
    train(config, tmp_path / "run", should_stop=iter([False] * 30 + [True]).__next__)
    before = kept._read(tmp_path / "run" / kept.FILE)[1]
    ours = kept.RunLedger(
        setup := make_setup(runs.folder.read_config(tmp_path / "run")),
        lambda event: None,
        runs.load_checkpoint(tmp_path / "run", setup)[0],
        tmp_path / "run",
    )
    assert (ours._fastest, ours._sampling_took) == (before.fastest, before.sampling_seconds)
    assert before.fastest > 0


def test_weights_that_follow_constraints_have_no_ledger(tmp_path):
    shown = []
    options = {name: value for name, value in OPTIONS.items() if name != "class_weight"}
    train(make_config(options | {"floor": {"9": 0.5}}), tmp_path / "run", show=shown.append)
    said = [e.text for e in shown if isinstance(e, runs.Note) and e.warning]
    assert any(text.startswith("no ledger is kept: class weights that follow") for text in said)
    assert read_ledger(tmp_path / "run") is None
