"""The first answer of an audit: what the weights of a run changed, beside its baseline."""

import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import StopAt

from funcloss._trees import flatten
from funcloss.app import outcome as measuring
from funcloss.app.audits import audit_run
from funcloss.app.cli.stopping import StopOnSignal
from funcloss.app.config import make_config, plain_config
from funcloss.app.options import AuditOptions
from funcloss.app.report import run_figures
from funcloss.app.report.audit_page import render_page
from funcloss.app.report.outcome import (
    Change,
    ClassOutcome,
    RunOutcome,
    of_saved_model,
    outcome_sentences,
)
from funcloss.app.runs import folder, load
from funcloss.app.runs.baseline import PLAIN
from funcloss.app.runs.setup import make_setup, setup_on
from funcloss.app.train import train
from funcloss.decisions import Interval, mean_interval, paired_interval
from funcloss.errors import ConfigError, RunError

ROOT = Path(__file__).parent.parent
SMALL = {
    "dataset": "mnist-sample",
    "model": "linear",
    "epochs": 1,
    "batch_size": 500,
    "compile": "off",
    "audit_every": 0,
    "class_weight": {"9": 5},
    "seed": 3,
}
FEW = ("--examples", "300", "--quiet")


@pytest.fixture(scope="module", autouse=True)
def _no_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_figures, "FIGURES", {})
        patch.setattr("funcloss.app.audits.draw_all", lambda *args: {})
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with a weight on the nines; only read."""
    place = tmp_path_factory.mktemp("outcome") / "run"
    train(make_config(SMALL), place)
    return place


@pytest.fixture(scope="module")
def setup(run):
    return make_setup(folder.read_config(run))


@pytest.fixture(scope="module")
def paired(run, tmp_path_factory):
    """A copy of the run with its baseline; only read."""
    place = shutil.copytree(run, tmp_path_factory.mktemp("outcome") / "paired")
    assert measuring.train_baseline(place)
    return place


@pytest.fixture
def copy(paired, tmp_path):
    return shutil.copytree(paired, tmp_path / "copy")


def outcome_of(run, setup) -> RunOutcome:
    found = measuring.measured(run, folder.read_config(run), setup)
    assert isinstance(found, RunOutcome)
    return found


def recall_of(run, name="9"):
    return folder.read_summary(run)["test"]["rules"]["argmax"]["recall"][name][0]


# The baseline.


def test_the_baseline_begins_at_the_same_weights_and_sees_the_same_batches(setup):
    plain = setup_on(plain_config(setup.config), setup.dataset)
    assert "class_weights" in setup.hyper
    assert "class_weights" not in plain.hyper
    ours, theirs = flatten(setup.state), flatten(plain.state)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # the key of masks too
    assert (plain.per_epoch, plain.epochs) == (setup.per_epoch, setup.epochs)
    for epoch in range(2):
        key = setup.state.key
        assert torch.equal(setup.order(key, epoch), plain.order(key, epoch))


def test_the_command_trains_the_baseline_once_and_compares(run, tmp_path, run_cli):
    run = shutil.copytree(run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    code, out, err = run_cli("audit", run, *FEW[:2], "--baseline")
    assert code == 0
    assert all(line.startswith("warning: ") for line in err.splitlines()), err
    assert f"training the baseline of seed 3, all class weights 1, into {run / PLAIN}" in out
    assert all((run / name).read_bytes() == content for name, content in before.items())
    config = folder.read_config(run / PLAIN)
    assert (config.class_weight, config.seed, config.epochs) == ({}, 3, 1)
    model = (run / PLAIN / "model.safetensors").read_bytes()
    direction = "higher|raised" if recall_of(run) > recall_of(run / PLAIN) else "lower"
    answer = out[out.index("Outcome.\n") :].splitlines()[1]
    assert "recall of class 9" in answer
    assert re.search(direction, answer)
    assert f"{100 * recall_of(run):.1f} %" in answer
    assert f"{100 * recall_of(run / PLAIN):.1f} %" in answer
    page = (run / "audit.html").read_text(encoding="utf-8")
    assert page.index("<h2>Outcome</h2>") < page.index("<h2>Now</h2>")
    told = json.loads((run / "audit.json").read_text())["outcome"]
    assert (told["seeds"], told["split"], told["examples"]) == (1, "test", 500)
    # A second call, with the option or without, trains nothing.
    for flags in (["--baseline"], []):
        code, again, err = run_cli("audit", run, *FEW, *flags)
        assert (code, err) == (0, "")
        assert again.startswith(f"Outcome.\n{answer}\n")
    assert (run / PLAIN / "model.safetensors").read_bytes() == model
    assert folder.foreign(run) == []


def test_a_stopped_baseline_goes_on_and_further_seeds_are_pairs(paired, copy, setup, run_cli):
    per_epoch = setup.per_epoch
    stopped = measuring.train_baseline(copy, seeds=2, should_stop=StopAt(per_epoch + 3))
    assert not stopped
    other = copy / "seed-4"
    assert folder.read_summary(other) is not None
    assert folder.read_summary(other / PLAIN) is None
    assert (other / PLAIN / "config.toml").exists()
    assert outcome_of(copy, setup).seeds == 1  # the pair is not whole
    shown = []
    assert measuring.train_baseline(copy, seeds=2, show=lambda event: shown.append(event))
    started = [event for event in shown if hasattr(event, "steps") and hasattr(event, "config")]
    assert [(event.folder, event.step) for event in started] == [(other / PLAIN, 3)]
    assert folder.foreign(copy) == []
    found = outcome_of(copy, setup)
    assert found.seeds == 2
    nine = found.classes[9].recall
    mean = (recall_of(copy) + recall_of(other)) / 2
    before = (recall_of(paired / PLAIN) + recall_of(other / PLAIN)) / 2
    assert nine.run.value == pytest.approx(mean)
    assert nine.baseline.value == pytest.approx(before)
    assert nine.difference.value == pytest.approx(mean - before)
    one = outcome_of(paired, setup).classes[9].recall.difference
    assert one.low <= one.value <= one.high
    assert "Means over 2 seeds; the intervals are over examples and seeds." in outcome_sentences(
        found
    )
    shutil.rmtree(copy / PLAIN)  # pairs of other seeds alone are of other runs
    assert outcome_of(copy, setup).seeds == 0


def test_ctrl_c_in_the_baseline_says_how_to_go_on(run, tmp_path, run_cli, monkeypatch):
    run = shutil.copytree(run, tmp_path / "a run")
    monkeypatch.setattr(StopOnSignal, "asked", lambda self: True)
    code, out, _ = run_cli("audit", run, *FEW, "--baseline", "--seeds", "3")
    assert code == 130
    again = f"funcloss audit {shlex.quote(str(run))} --baseline --seeds 3"
    assert out == f"stopped and saved; go on with: {again}\n"
    assert folder.read_summary(run / PLAIN) is None
    assert not (run / "audit.html").exists()


def test_another_training_in_its_place_is_no_baseline(copy, setup, run_cli):
    path = copy / PLAIN / "config.toml"
    path.write_text(path.read_text().replace("\nseed = 3", "\nseed = 7"))
    found = outcome_of(copy, setup)
    assert found.seeds == 0
    assert found.note == f"{copy / PLAIN} is not compared: it has other options (seed)."
    lines = outcome_sentences(found)
    assert lines[-1].startswith("No baseline: what the weight changed in recall is not known; run")
    assert found.note in lines
    code, out, err = run_cli("audit", copy, *FEW, "--baseline")
    assert (code, out) == (1, "")
    said = f"{copy / PLAIN} holds another training (other options: seed): remove it, then try again"
    assert err.splitlines()[-1] == f"error: {said}"


def test_where_the_data_has_changed_nothing_is_compared(paired, setup, monkeypatch):
    changed = "mnist-sample has changed since the run was trained on it"
    monkeypatch.setattr(measuring, "note_on_data", lambda *args: changed)
    found = measuring.measured(paired, folder.read_config(paired), setup)
    assert found == (
        f"{changed[0].upper()}{changed[1:]}: what its class weights changed in recall is not "
        "known; summary.json has the recall at the end of the training."
    )
    with pytest.raises(RunError, match="a baseline would be trained on other data"):
        measuring.train_baseline(paired, seeds=2)


def test_a_run_that_is_not_finished_has_no_outcome(copy, setup):
    (copy / "summary.json").unlink()
    found = measuring.measured(copy, folder.read_config(copy), setup)
    assert found == (
        "The training is not finished: what its class weights changed in recall is not known."
    )
    with pytest.raises(ConfigError, match="is not finished: resume it"):
        measuring.train_baseline(copy)


# The numbers, computed another way.


def test_recall_precision_and_cost_are_those_of_the_kept_models(paired, setup):
    found = outcome_of(paired, setup)
    test = setup.dataset.test
    inputs = test.inputs.float() / 255
    decided = []
    for place in (paired, paired / PLAIN):
        model = load(place)
        scaled = ((inputs - model.mean) / model.std).permute(0, 3, 1, 2)
        with torch.no_grad():
            decided.append(model.model(scaled).argmax(-1))
    ours, theirs = decided
    labels, n = test.labels, len(test.labels)
    assert found.examples == n
    for c, row in enumerate(found.classes):
        own = labels == c
        assert (row.weight, row.examples) == (5.0 if c == 9 else 1.0, int(own.sum()))
        gained = int(((ours == c) & (theirs != c) & own).sum())
        lost = int(((theirs == c) & (ours != c) & own).sum())
        assert row.recall.run.value == pytest.approx(float((ours[own] == c).double().mean()))
        assert row.recall.difference == pytest.approx(paired_interval(gained, lost, row.examples))
        of = [float((labels[d == c] == c).double().mean()) for d in decided]
        assert (row.precision.run.value, row.precision.baseline.value) == pytest.approx(of)
        assert row.precision.difference.value == pytest.approx(of[0] - of[1])
    cost = (ours != labels).double() - (theirs != labels).double()
    assert found.expected_cost.difference == pytest.approx(mean_interval(cost[None]))
    assert found.rule_cost is None
    summary = folder.read_summary(paired)["test"]["rules"]["argmax"]
    assert found.classes[9].precision.run == pytest.approx(tuple(summary["precision"]["9"]))


def test_the_error_of_a_precision_is_that_of_the_bootstrap(paired, setup):
    found = outcome_of(paired, setup).classes[9].precision.difference
    labels = setup.dataset.test.labels
    config = folder.read_config(paired)
    evaluations = [
        measuring._evaluated(place, own, setup, "test")
        for place, own in ((paired, config), (paired / PLAIN, plain_config(config)))
    ]
    decided = torch.stack([e.argmax.decisions == 9 for e in evaluations]).double()
    right = decided * (labels == 9)
    index = torch.randint(len(labels), (2000, len(labels)), generator=torch.manual_seed(0))
    ours, theirs = right[:, index].sum(-1) / decided[:, index].sum(-1)
    assert (found.high - found.low) / 2 == pytest.approx(
        1.96 * float((ours - theirs).std()), rel=0.1
    )


@pytest.mark.parametrize("n", [10, 50, 400])
@pytest.mark.parametrize(("gain", "loss"), [(0.0, 0.0), (0.08, 0.0), (0.1, 0.05), (0.3, 0.3)])
def test_paired_intervals_hold_the_truth_in_most_samples(n, gain, loss):
    draw = torch.distributions.Multinomial(n, torch.tensor([gain, loss, 1 - gain - loss]))
    torch.manual_seed(n)
    found = [paired_interval(g, m, n) for g, m, _ in draw.sample((1000,)).tolist()]
    held = [interval.low <= gain - loss <= interval.high for interval in found]
    assert sum(held) / len(held) >= 0.93
    assert all(interval.low <= interval.value <= interval.high for interval in found)


def test_a_paired_interval_of_nothing_is_unknown():
    assert all(map(math.isnan, paired_interval(0, 0, 0)))
    assert paired_interval(4, 0, 4).high == 1.0
    assert paired_interval(0, 4, 4).low == -1.0


# A sweep keeps scores, seed by seed.


def in_a_sweep(run, place, recalls):
    """Copy a run as what a sweep of these recalls of the nines, by seed, has chosen."""
    chosen = shutil.copytree(run, place / "chosen", ignore=shutil.ignore_patterns("plain"))
    (place / "sweep.toml").write_text("")
    points = [{"name": "class_weight 9=5", "chosen": True}, {"name": "plain", "chosen": False}]
    (place / "sweep.json").write_text(json.dumps({"points": points}))
    names, lines = [str(c) for c in range(10)], []
    for seed, pair in enumerate(recalls):
        for point, recall in zip(points, pair, strict=True):
            scores = {**dict.fromkeys(names, 0.5), "9": recall}
            trial = {"seed": seed, "name": point["name"], "plain": not point["chosen"]}
            trial |= {"diverged": False, "expected_cost": 1 - recall, "rule_cost": None}
            trial |= {"recall": scores, "precision": scores, "support": [50] * 10}
            lines.append(json.dumps(trial))
    (place / "trials.jsonl").write_text("\n".join(lines) + "\n")
    return chosen


def test_the_plain_model_of_a_sweep_is_the_baseline_over_its_seeds(run, setup, tmp_path):
    chosen = in_a_sweep(run, tmp_path, [(0.9, 0.8), (0.95, 0.83), (0.92, 0.84)])
    found = outcome_of(chosen, setup)
    assert (found.seeds, found.split, found.paired_by) == (3, "validation", "seed")
    nine = found.classes[9].recall
    apart = torch.tensor([0.1, 0.12, 0.08], dtype=torch.float64)
    half = 4.303 * float(apart.std()) / 3**0.5
    assert nine.difference == pytest.approx((0.1, 0.1 - half, 0.1 + half), abs=1e-5)
    lines = outcome_sentences(found)
    assert lines[0].startswith(
        "Weight 5 raised the recall of class 9 from 82.3 % to 92.3 %: +10.0 ["
    )
    assert lines[-1] == "Means over 3 seeds; the intervals are over seeds."


def test_of_one_seed_of_a_sweep_no_interval_is_known(run, setup, tmp_path):
    found = outcome_of(in_a_sweep(run, tmp_path, [(0.9, 0.8)]), setup)
    lines = outcome_sentences(found)
    assert lines[0] == (
        "The recall of class 9 is higher with weight 5, 90.0 % instead of 80.0 %, but how surely "
        "is not known: +10.0 percentage points."
    )
    assert "no intervals: a sweep keeps no predictions" in lines[-2]


# The sentences.


def made(recall=None, *, precision=None, weight=5.0, seeds=1, **changes) -> RunOutcome:
    unknown = Change(Interval(0.9, 0.8, 0.95))
    nine = ClassOutcome("9", weight, 50, recall or unknown, precision or unknown)
    cost = Change(Interval(0.2), Interval(0.1), Interval(0.1, 0.05, 0.15))
    found = RunOutcome(
        run="runs/nine",
        split="test",
        examples=500,
        classes=(replace(nine, name="8", weight=1.0), nine),
        focus=(1,),
        loss="",
        accuracy=Change(Interval(0.87, 0.85, 0.9)),
        expected_cost=cost,
        rule_cost=None,
        seeds=seeds,
        paired_by="example",
    )
    return replace(found, **changes)


def change(run, baseline, low, high):
    return Change(Interval(run), Interval(baseline), Interval(run - baseline, low, high))


UP, DOWN = change(0.98, 0.88, 0.02, 0.18), change(0.8, 0.9, -0.2, -0.01)
FIRST = [
    (UP, {}, "Weight 5 raised the recall of class 9 from 88.0 % to 98.0 %: +10.0 [+2.0, +18.0] "
     "percentage points."),
    (DOWN, {}, "Weight 5 lowered the recall of class 9 from 90.0 % to 80.0 %: -10.0 [-20.0, -1.0] "
     "percentage points."),
    (change(0.9, 0.88, -0.04, 0.08), {}, "The recall of class 9 is higher with weight 5, 90.0 % "
     "instead of 88.0 %, but not significantly: +2.0 [-4.0, +8.0] percentage points."),
    (change(0.86, 0.88, -0.08, 0.04), {}, "The recall of class 9 is lower with weight 5, 86.0 % "
     "instead of 88.0 %, but not significantly: -2.0 [-8.0, +4.0] percentage points."),
    (change(0.9, 0.9, -0.05, 0.05), {}, "The recall of class 9 is 90.0 % with weight 5 and in the "
     "baseline: +0.0 [-5.0, +5.0] percentage points."),
    (UP, {"loss": "poly1"}, "Poly1 and weight 5 raised the recall of class 9 from"),
    (UP, {"weight": 1.0, "loss": "expected_cost"}, "Expected_cost raised the recall of class 9"),
    (Change(Interval(math.nan)), {}, "The recall of class 9 is not known: the test split has no "
     "example of it."),
]  # fmt: skip


@pytest.mark.parametrize(("recall", "changes", "says"), FIRST)
def test_the_first_sentence_says_whether_recall_rose(recall, changes, says):
    assert outcome_sentences(made(recall, **changes))[0].startswith(says)


def test_precision_and_cost_follow_and_then_what_the_baseline_is():
    rule = change(0.05, 0.06, -0.02, 0.01)
    assert outcome_sentences(made(UP, precision=DOWN, rule_cost=rule))[1:] == (
        "Its precision fell from 90.0 % to 80.0 %: -10.0 [-20.0, -1.0] percentage points.",
        "The expected cost per example rose from 0.1000 to 0.2000: +0.1000 [+0.0500, +0.1500].",
        "By decisions of minimum expected cost, the expected cost per example is lower, 0.0500 "
        "instead of 0.0600, but not significantly: -0.0100 [-0.0200, +0.0100].",
        "Baseline: the same seed, first weights and batches, with all class weights 1 (test split, "
        "500 examples; 95 % intervals, paired by example).",
        "One training seed: another may give another difference; try `funcloss audit runs/nine "
        "--baseline --seeds 5`.",
    )
    never = Change(Interval(math.nan), Interval(0.9, 0.8, 0.95))
    assert outcome_sentences(made(UP, precision=never))[1] == (
        "Its precision is not defined (the class is never predicted); in the baseline 90.0 % "
        "[80.0, 95.0]."
    )


def test_without_a_baseline_nothing_is_said_of_a_change():
    assert outcome_sentences(made(seeds=0)) == (
        "Class 9 (weight 5) has a recall of 90.0 % [80.0, 95.0] and a precision of 90.0 % "
        "[80.0, 95.0].",
        "The expected cost is 0.2000 per example (test split, 500 examples).",
        "No baseline: what the weight changed in recall is not known; run `funcloss audit "
        "runs/nine --baseline`.",
    )
    many = outcome_sentences(made(seeds=0, focus=(1, 0)), most=1)
    assert "1 more class has its weight: see the report." in many
    assert "what the weights changed" in many[-1]
    costly = made(seeds=0, weight=1.0)
    assert "what the costs in the loss changed" in outcome_sentences(costly)[-1]


def test_without_weights_the_worst_recall_is_told_and_of_a_saved_model_what_is_known():
    assert outcome_sentences(made(focus=())) == (
        "Class 8 has the lowest recall, 90.0 % [80.0, 95.0]; accuracy 87.0 % [85.0, 90.0] (test "
        "split, 500 examples).",
    )
    assert outcome_sentences(of_saved_model({"9": 5.0})) == (
        "A saved model has no baseline: what its class weights changed in recall is not known.",
    )
    assert outcome_sentences(of_saved_model({})) == ()


def test_the_page_has_the_outcome_the_ledger_and_the_moment_in_this_order(paired):
    found = audit_run(paired, AuditOptions(examples=300))
    ledger = '<section id="ledger"><h2>Ledger</h2></section>'
    nine = replace(found.outcome.classes[9], name="<b>9</b>")
    outcome = replace(found.outcome, classes=(*found.outcome.classes[:9], nine))
    page = render_page(found.audit, found.about, outcome=outcome, ledger_section=ledger)
    places = [page.index(text) for text in ('id="outcome"', ledger, 'id="words"', 'id="shares"')]
    assert places == sorted(places)
    assert "<b>9</b>" not in page
    assert "<bdi>&lt;b&gt;9&lt;/b&gt;</bdi>" in page


# The story of the start page.


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_first_sentence_of_the_start_page_agrees_with_the_recalls(seed, tmp_path, run_cli):
    text = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    first, second = re.findall(r"^(?:funcloss-train|funcloss audit) .*$", text, re.MULTILINE)
    run = tmp_path / "nine"
    assert "runs/nine" in first
    assert "--baseline" in second
    options = shlex.split(first.replace("runs/nine", str(run)))[1:]
    assert run_cli("train", *options, "--seed", seed, "--quiet")[0] == 0
    code, out, _ = run_cli(*shlex.split(second.replace("runs/nine", str(run)))[1:], "--quiet")
    assert code == 0
    now, before = recall_of(run), recall_of(run / PLAIN)
    answer = out[out.index("Outcome.\n") :].splitlines()[1]
    words = {True: "raised|is higher", False: "lowered|is lower"}[now > before]
    assert re.search(words, answer), (answer, now, before)
    assert now > before  # the story that the page tells
