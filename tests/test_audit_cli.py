"""``funcloss audit``: what it prints, what it writes, what it refuses, and what it leaves."""

import csv
import errno
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tutorial_losses
from conftest import StopAt
from matplotlib.figure import Figure
from torch.testing import assert_close

from funcloss import class_weighted, losses, models, optim
from funcloss.app import runs
from funcloss.app.audits import audit_checkpoint, audit_run, write_report
from funcloss.app.config import make_config
from funcloss.app.data import get_batch
from funcloss.app.options import AuditOptions
from funcloss.app.registry import LOSSES
from funcloss.app.runs.setup import make_setup
from funcloss.app.train import train
from funcloss.audit import AuditSettings, LossSpec, audit, compare, sentences
from funcloss.errors import RunError
from funcloss.laws import adapt, cost_effect
from funcloss.typing import Batch

SMALL = {
    "dataset": "mnist-sample",
    "model": "linear",
    "epochs": 1,
    "compile": "off",
    "audit_every": 10,
    "ledger": "exact",
}
FEW = ("--examples", "600")
FILES = [
    "audit.html",
    "audit.json",
    "audit_classes.csv",
    "audit_conflict.png",
    "audit_examples.csv",
    "audit_examples.png",
    "audit_history.png",
    "audit_impact.png",
    "audit_ledger.csv",
    "audit_ledger.png",
    "audit_norms.png",
    "audit_pairs.csv",
    "audit_share.png",
]


def trained(run, *, stop=0, **options):
    should_stop = StopAt(stop) if stop else lambda: False
    train(make_config(SMALL, options), run, should_stop=should_stop)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with a cost on the nines; only read."""
    run = tmp_path_factory.mktemp("cli") / "run"
    return trained(run, class_weight={"9": 5})


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped on its way: dropout, momentum, decay, clipping and a schedule."""
    return trained(
        tmp_path_factory.mktemp("cli") / "stopped",
        stop=13,
        model="article-cnn",
        optimizer="sgd",
        momentum=0.8,
        learning_rate=0.05,
        weight_decay=0.01,
        clip_norm=0.5,
        schedule="cosine",
        batch_size=100,
        class_weight={"9": 5},
    )


@pytest.fixture(scope="module")
def unweighted(tmp_path_factory):
    """A finished run without class weights; only read."""
    return trained(tmp_path_factory.mktemp("cli") / "unweighted", audit_every=0)


@pytest.fixture
def no_figures(monkeypatch):
    """Most tests look at numbers, and drawing takes longer than these do."""
    monkeypatch.setattr("funcloss.app.audits.draw_all", lambda *args: {})


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to write into."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def reported(finished, tmp_path_factory):
    """What the command prints and writes, run as a user runs it."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("cli") / "reported")
    done = command("audit", run, *FEW)
    assert done.returncode == 0, done.stderr
    return run, done.stdout, done.stderr


def command(*args, **options):
    line = [sys.executable, "-m", "funcloss", *map(str, args)]
    wide = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(line, capture_output=True, text=True, env=wide, **options)


def rows_of(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def read(folder):
    return json.loads((folder / "audit.json").read_text(encoding="utf-8"))


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def listing(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def without_time(found):
    """Return what two audits of the same thing have in common."""
    found = json.loads(json.dumps(found))
    found.pop("about", None)
    found["method"].pop("seconds")
    found["method"].pop("costs")
    found["method"].pop("why")
    return found


def assert_numbers(found, expected, path="", *, rel=1e-6, size=1e-6):
    """Assert that two trees of JSON are the same to rounding."""
    assert type(found) is type(expected) or {type(found), type(expected)} <= {int, float}, path
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_numbers(found[key], expected[key], f"{path}/{key}", rel=rel, size=size)
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_numbers(a, b, f"{path}/{i}", rel=rel, size=size)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=rel, abs=size), path
    else:
        assert found == expected, path


# What it prints.


def test_plain_words_come_first_then_a_table_the_checks_and_the_report(reported):
    run, out, err = reported
    lines = out.splitlines()
    blank = lines.index("")
    words = lines[:blank]
    assert 6 <= len(words) <= 24
    assert all(re.match(r"[A-Z].*\.$", line) for line in words), words
    assert words[0] == "Outcome."
    assert words[1].startswith("Class 9 (weight 5) has a recall of ")
    ledger, _ = (
        next(i for i, line in enumerate(words) if line.startswith(head))
        for head in ("Ledger: ", "Now: ")
    )
    assert words[ledger - 1] == (
        f"No baseline: what the weight changed in recall is not known; run `funcloss audit {run} "
        "--baseline`."
    )
    head = next(i for i, line in enumerate(lines) if i > blank and "expected" in line)
    assert lines[head].split()[0] == "class"
    rows = lines[head + 1 : head + 11]
    expected = read(run)["classes"]
    for line, row in zip(rows, expected, strict=True):
        cells = line.split()
        weight, wanted, share = row["class_weight"], row["expected_share"], row["share"]
        assert cells[:3] == [row["name"], str(row["count"]), f"{weight:g}"]
        assert cells[3:5] == [f"{wanted:.1%}", f"{share:.1%}"]
        assert f"{row['update_share']:.1%}" in cells
    checks = re.findall(
        r"^check (\w+): relative error (\S+) \((?:tolerance (\S+)|informational)\)$", out, re.M
    )
    told = read(run)["checks"]
    assert [name for name, _, _ in checks] == [check["name"] for check in told]
    assert {"gradient", "slopes", "update", "impact"} <= {check["name"] for check in told}
    assert all(float(error) <= float(most) for _, error, most in checks if most)
    assert lines[-1] == f"report: {run / 'audit.html'}"
    assert "600 examples of mnist-sample, train" in out
    assert "note: 5,000 digits of MNIST's training set" in out
    assert err == ""
    assert "\x1b" not in out


def test_a_finished_run_says_that_the_step_is_like_the_last_one(reported):
    run, out, _ = reported
    rate = 0.01 * float(optim.one_cycle(steps=31)(torch.tensor(30)))
    note = (
        f"the step shown is a step like the last one taken: its learning rate, {rate:.3g}, on the "
        "mean gradient of 600 examples; the last batch itself is not kept"
    )
    assert f"note: {note}" in out
    found = read(run)
    assert found["step"]["learning_rate"] == pytest.approx(rate)
    assert note in found["notes"]
    assert "a step like the last one taken" in (run / "audit.html").read_text(encoding="utf-8")


def test_quiet_prints_the_words_and_writes_the_report(run, run_cli, no_figures):
    code, out, err = run_cli("audit", run, *FEW, "--quiet")
    assert (code, err) == (0, "")
    assert all(re.match(r"[A-Z].*\.$", line) for line in out.splitlines())
    assert "report" not in out
    assert (run / "audit.html").exists()


@pytest.mark.parametrize("columns", ["60", "80"])
def test_a_table_that_goes_to_a_file_is_whole_at_any_width(
    run, run_cli, monkeypatch, no_figures, columns
):
    monkeypatch.setenv("COLUMNS", columns)
    _, out, _ = run_cli("audit", run, *FEW)
    assert "…" not in out
    assert re.search(r"^class +count +weight +expected +share ", out, re.M)


def test_the_uncertainty_that_is_told_covers_what_other_examples_would_tell(finished, sample):
    """Of other examples of the same run, the words say the same, or that they cannot tell."""
    model, weights = runs.load(finished).model, torch.tensor([1.0] * 9 + [5.0])
    shares, errors, verdicts = [], [], []
    for seed in range(20):
        index = torch.randperm(4000, generator=torch.Generator().manual_seed(seed))[:1024]
        batches = [get_batch(sample, sample.train, part) for part in index.split(128)]
        spec = LossSpec(losses.cross_entropy, weights)
        found = audit(model, None, spec, batches, settings=AuditSettings(per_example=False))
        told = " ".join(sentences(found))
        shares.append(float(found.balance.share[9]))
        errors.append(float(found.standard_errors.share[9]))
        verdicts += re.findall(
            "the class weight (increases|decreases) class 9", told, re.IGNORECASE
        )
    assert statistics.stdev(shares) <= 1.5 * statistics.median(errors)
    assert min(verdicts.count(verdict) for verdict in ("increases", "decreases")) <= 1


# What it writes.


def test_the_run_holds_the_page_the_numbers_the_tables_and_the_figures(reported, finished):
    run, _, _ = reported
    new = set(listing(run)) - set(listing(finished))
    assert sorted(new) == FILES
    before, after = listing(finished), listing(run)
    assert all(after[name] == content for name, content in before.items())
    for name in FILES:
        if name.endswith(".png"):
            assert (run / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
            assert len((run / name).read_bytes()) > 5000
    page = (run / "audit.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", page)
    assert all((run / name).stat().st_mode & 0o444 == 0o444 for name in FILES)


def test_the_json_has_what_a_reader_needs(reported):
    run, _, _ = reported
    found = read(run)
    assert {"classes", "gram", "conflict", "impact", "checks", "about", "step", "layers",
            "standard_errors", "method", "notes"} <= found.keys()  # fmt: skip
    assert [row["name"] for row in found["classes"]] == list("0123456789")
    for row in found["classes"]:
        assert {"name", "count", "loss", "class_weight", "share", "share_standard_error",
                "expected_share", "elasticity", "norm", "agreement", "alignment", "update_share",
                "most_opposed", "most_dominant"} <= row.keys()  # fmt: skip
    assert sum(row["count"] for row in found["classes"]) == 600
    for key in ("share", "expected_share", "elasticity"):
        assert sum(row[key] for row in found["classes"]) == pytest.approx(1.0)
    gram = double(found["gram"])
    assert gram.shape == (10, 10)
    assert_close(gram, gram.T)
    assert_close(sum(double(layer["gram"]) for layer in found["layers"]), gram)
    weights = double([row["class_weight"] for row in found["classes"]])
    assert weights.tolist() == [1.0] * 9 + [5.0]
    along = weights * (gram @ weights)
    assert_close(double([row["share"] for row in found["classes"]]),
                 along / along.sum())  # fmt: skip
    assert found["gradient_norm"] == pytest.approx(float(along.sum().sqrt()))
    length = gram.diagonal().sqrt()
    assert_close(double(found["conflict"]), gram / length[:, None] / length)
    assert found["impact"].keys() == {"train", "held_out"}
    for part in found["impact"].values():
        assert {"matrix", "predicted", "measured", "before", "after"} <= part.keys()
        assert len(part["matrix"]) == 10
        matrix = double(part["matrix"])
        assert_close(matrix.sum(1), double(part["predicted"]))
    assert sum(found["step"]["share"]) == pytest.approx(1.0)
    assert found["step"]["rows"][:10] == list("0123456789")
    about = found["about"]
    assert (about["model"], about["loss"], about["split"]) == ("linear", "cross_entropy", "train")
    assert (about["examples"], about["step"], about["parameters"]) == (600, 31, 7850)
    assert (about["optimizer"], about["scale_invariant"]) == ("adam", True)
    assert about["command"].endswith(f"audit {run} --examples 600")
    assert {"torch", "funcloss", "python"} <= about["versions"].keys()


def test_the_tables_have_a_row_a_class_a_pair_and_an_example(reported, sample):
    run, _, _ = reported
    found = read(run)
    of_class = rows_of(run / "audit_classes.csv")
    assert [row["name"] for row in of_class] == list("0123456789")
    for row, told in zip(of_class, found["classes"], strict=True):
        for key in ("count", "loss", "share", "expected_share", "elasticity", "norm", "agreement"):
            assert float(row[key]) == told[key]
        quantiles = [float(v) for k, v in row.items() if k.startswith("norm_q")]
        assert quantiles == told["norm_quantiles"]
    pairs = rows_of(run / "audit_pairs.csv")
    assert len(pairs) == 100
    for k, row in enumerate(pairs):
        a, b = divmod(k, 10)
        assert (row["class"], row["other"]) == (str(a), str(b))
        assert float(row["gram"]) == found["gram"][a][b]
        assert float(row["conflict"]) == found["conflict"][a][b]
        for part in ("train", "held_out"):
            told = found["impact"][part]["matrix"][a][b]
            assert float(row[f"impact_{part}_of_other_on_class"]) == told
    examples = rows_of(run / "audit_examples.csv")
    assert len(examples) == 600
    index = [int(row["index"]) for row in examples]
    assert len(set(index)) == 600
    assert sample.train.labels[index].tolist() == [int(row["class"]) for row in examples]
    by_index = dict(zip(index, examples, strict=True))
    for row in found["classes"]:
        own = [r for r in examples if r["class"] == row["name"]]
        assert len(own) == row["count"]
        assert sum(float(r["loss"]) for r in own) / len(own) == pytest.approx(row["loss"])
        opposed = [float(by_index[i]["alignment"]) for i in row["most_opposed"]]
        assert opposed == sorted(float(r["alignment"]) for r in own)[: len(opposed)]
        dominant = [float(by_index[i]["norm"]) for i in row["most_dominant"]]
        assert dominant == sorted((float(r["norm"]) for r in own), reverse=True)[: len(dominant)]


def test_the_numbers_of_an_example_are_those_of_the_image_at_its_index(reported, sample):
    """The index is the position in the part of the data, whatever was drawn and shuffled."""
    run, _, _ = reported
    rows = rows_of(run / "audit_examples.csv")[:50]
    index = torch.tensor([int(row["index"]) for row in rows])
    batch = get_batch(sample, sample.train, index)
    model = runs.load(run).model
    with torch.no_grad():
        logits = model(batch.inputs)
    values = losses.cross_entropy(logits, batch.targets)
    assert_close(
        double([float(row["loss"]) for row in rows]), values.double(), rtol=1e-4, atol=1e-6
    )
    inputs = batch.inputs.flatten(1).square().sum(1) + 1
    slope = logits.softmax(-1) - torch.nn.functional.one_hot(batch.targets, 10)
    norms = (inputs * slope.square().sum(1)).sqrt()
    assert_close(double([float(row["norm"]) for row in rows]), norms.double(), rtol=1e-4, atol=1e-6)


def test_the_numbers_are_those_of_the_library(reported, finished):
    run, _, _ = reported
    found = audit_run(finished, AuditOptions(examples=600))
    written = without_time(read(run))
    outcome = written.pop("outcome")
    assert outcome["examples"] == 500
    assert (
        outcome["classes"][9]["recall"]["run"]["value"] == found.outcome.classes[9].recall.run.value
    )
    assert_numbers(written, without_time(found.audit.to_dict()))


def test_a_second_audit_replaces_the_first_and_what_it_does_not_have_is_gone(run, run_cli):
    """A figure of another audit beside the page would be taken for one of this."""
    assert run_cli("audit", run, *FEW)[0] == 0
    first = listing(run)
    assert run_cli("audit", run, "--examples", "300", "--split", "validation")[0] == 0
    assert set(listing(run)) == set(first)
    assert read(run)["about"]["split"] == "validation"
    assert len(rows_of(run / "audit_examples.csv")) == 300
    changed = {name for name, content in listing(run).items() if content != first[name]}
    of_the_training = {"audit_history.png", "audit_ledger.csv", "audit_ledger.png"}
    assert changed == set(FILES) - of_the_training
    assert run_cli("audit", run, "--examples", "300", "--method", "backward")[0] == 0
    assert read(run)["classes"][0]["agreement"] is None
    assert not (run / "audit_norms.png").exists()
    assert not (run / "audit_examples.png").exists()
    assert (run / "curves.png").exists()


def test_the_report_goes_elsewhere_if_asked_to(run, run_cli, tmp_path):
    before = listing(run)
    out = tmp_path / "a" / "b"
    code, printed, _ = run_cli("audit", run, *FEW, "--out", out)
    assert code == 0
    assert f"report: {out / 'audit.html'}" in printed
    assert sorted(path.name for path in out.iterdir()) == FILES
    assert listing(run) == before


def test_a_file_of_the_users_own_in_the_folder_stays(run, run_cli, tmp_path, no_figures):
    out = tmp_path / "mine"
    out.mkdir()
    for name in ("notes.txt", "audit_of_mine.csv", "audit.txt", "figure.png"):
        (out / name).write_text("ten years")
    assert run_cli("audit", run, *FEW, "--out", out, "--quiet")[0] == 0
    for name in ("notes.txt", "audit_of_mine.csv", "audit.txt", "figure.png"):
        assert (out / name).read_text() == "ten years"


# What it audits.


def test_a_saved_model_is_audited_as_its_run_is(finished, run_cli, tmp_path):
    out = tmp_path / "saved"
    code, printed, err = run_cli(
        "audit", "--checkpoint", finished / "model.safetensors", "--model", "linear", "--dataset",
        "mnist-sample", "--loss", "cross_entropy", "--class-weight", "9=5", "--eval", "--out", out,
        *FEW,
    )  # fmt: skip
    assert (code, err) == (0, "")
    found, expected = (
        read(out),
        audit_run(finished, AuditOptions(examples=600, evaluation_mode=True)).audit,
    )
    assert_numbers(found["gram"], expected.gram.tolist(), rel=1e-12, size=0)
    told = expected.to_dict()
    for row, of_run in zip(found["classes"], told["classes"], strict=True):
        of_run["update_share"] = None
        assert_numbers(row, of_run)
    assert found["step"] is None
    assert found["impact"] == {}
    assert found["about"]["step"] is None
    assert found["about"]["mode"] == "eval"
    assert "The optimizer step was not audited" in printed
    assert not (out / "audit_impact.png").exists()
    assert not (out / "audit_history.png").exists()


def test_a_saved_model_with_dropout_is_audited_as_its_run_in_evaluation_mode(stopped, tmp_path):
    config = make_config(
        {"model": "article-cnn", "dataset": "mnist-sample", "class_weight": {"9": 5}}
    )
    saved = audit_checkpoint(
        stopped / "model.safetensors", config, AuditOptions(examples=300, evaluation_mode=True)
    ).audit
    of_run = audit_run(stopped, AuditOptions(examples=300, evaluation_mode=True)).audit
    awake = audit_run(stopped, AuditOptions(examples=300)).audit
    assert_close(saved.gram, of_run.gram, rtol=1e-5, atol=1e-9)
    assert (awake.gram - of_run.gram).abs().max() > 0.01 * of_run.gram.abs().max()


def test_the_loss_of_a_saved_model_is_the_one_named(finished, tmp_path, run_cli, no_figures):
    out = tmp_path / "focal"
    code, _, _ = run_cli(
        "audit", "--checkpoint", finished / "model.safetensors", "--model", "linear",
        "--dataset", "mnist-sample", "--loss", "softmax_focal", "--out", out, *FEW,
    )  # fmt: skip
    assert code == 0
    found = read(out)
    assert found["about"]["loss"] == "softmax_focal"
    assert [row["class_weight"] for row in found["classes"]] == [1.0] * 10
    values = [float(row["loss"]) for row in rows_of(out / "audit_examples.csv")]
    plain = audit_run(finished, AuditOptions(examples=600)).audit.examples.loss
    assert all(focal <= full + 1e-6 for focal, full in zip(values, plain.tolist(), strict=True))


def test_dropout_sleeps_in_evaluation_mode_only(stopped, run_cli, tmp_path, no_figures):
    found = []
    for name, flags in (("train", ()), ("eval", ("--eval",))):
        args = ("--examples", "200", "--quiet", "--out", tmp_path / name, *flags)
        assert run_cli("audit", stopped, *args)[0] == 0
        found.append(read(tmp_path / name))
    assert [f["about"]["mode"] for f in found] == ["train", "eval"]
    assert found[0]["gram"] == audit_run(stopped, AuditOptions(examples=200)).audit.gram.tolist()
    assert found[0]["gram"] != found[1]["gram"]


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_each_part_of_the_data_is_audited(finished, run_cli, tmp_path, part, sample, no_figures):
    out = tmp_path / part
    code, printed, _ = run_cli("audit", finished, "--split", part, "--out", out)
    assert code == 0
    found, examples = read(out), getattr(sample, part)
    counts = examples.labels.bincount(minlength=10).tolist()
    assert [row["count"] for row in found["classes"]] == counts
    assert found["about"]["split"] == part
    assert f"{len(examples.labels):,} examples of mnist-sample, {part}" in printed
    # the validation examples are held out of what trains
    assert ("held_out" in found["impact"]) == (part == "train")


def test_a_part_that_is_not_there_is_named(tmp_path, run_cli, no_figures):
    run = trained(tmp_path / "run", val_fraction=0.0, epochs=0)
    before = listing(run)
    code, out, err = run_cli("audit", run, "--split", "validation")
    assert (code, out) == (2, "")
    assert "mnist-sample has no validation split: the run held out none" in err
    assert listing(run) == before
    code, out, _ = run_cli("audit", run, *FEW)
    assert code == 0
    assert read(run)["impact"].keys() == {"train"}


@pytest.fixture(scope="module")
def by_examples(stopped):
    return audit_run(stopped, AuditOptions(examples=60, method="examples")).audit


@pytest.mark.parametrize("method", ["layers", "examples", "backward"])
def test_every_method_can_be_forced_and_they_agree(
    stopped, by_examples, run_cli, tmp_path, method, no_figures
):
    args = ("--examples", "60", "--method", method, "--out", tmp_path)
    code, printed, err = run_cli("audit", stopped, *args)
    assert (code, err) == (0, "")
    assert f", train; {method}, " in printed
    assert "nan" not in printed
    found = read(tmp_path)
    assert found["method"]["name"] == method
    size = float(by_examples.gram.abs().max())
    assert_close(double(found["gram"]), by_examples.gram, rtol=1e-4, atol=1e-5 * size)
    norms = [row["norm_quantiles"] for row in found["classes"]]
    if method == "backward":
        assert all(q is None for row in norms for q in row)
    else:
        assert_close(double(norms), by_examples.norm_quantiles, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_little_memory_changes_no_number(stopped, run_cli, tmp_path, no_figures):
    for name, memory in (("little", "1"), ("much", "4096")):
        args = ("--examples", "60", "--memory", memory, "--quiet", "--out", tmp_path / name)
        assert run_cli("audit", stopped, *args)[0] == 0
    little, much = read(tmp_path / "little"), read(tmp_path / "much")
    assert_numbers(little["gram"], much["gram"], rel=1e-3, size=1e-6)


def test_two_examples_are_enough(finished, run_cli, tmp_path):
    code, out, err = run_cli("audit", finished, "--examples", "2", "--out", tmp_path / "two")
    assert (code, err) == (0, "")
    assert "nan" not in out
    found = read(tmp_path / "two")
    assert sum(row["count"] for row in found["classes"]) == 2
    absent = [row for row in found["classes"] if row["count"] == 0]
    assert len(absent) >= 8
    assert all(row["share"] == 0 and row["loss"] is None for row in absent)
    assert found["standard_errors"] is None


def test_more_examples_than_there_are_are_all(finished, run_cli, tmp_path, no_figures):
    code, _, _ = run_cli(
        "audit", finished, "--examples", "99999", "--split", "test", "--out", tmp_path, "--quiet"
    )
    assert code == 0
    assert len(rows_of(tmp_path / "audit_examples.csv")) == 500


# How the run was trained.


def test_a_stopped_run_is_audited_at_the_step_it_would_take(stopped):
    found = audit_run(stopped, AuditOptions(examples=300))
    step, audited = found.audit.step, found.audit
    assert found.about.step == 13
    assert step.learning_rate == pytest.approx(
        0.05 * float(optim.cosine(steps=40)(torch.tensor(13))), rel=1e-6
    )
    assert 0 < step.learning_rate < 0.05
    assert not any("over" in note for note in audited.notes)
    assert step.rows == (*"0123456789", "weight decay", "history")
    norm = dict(zip(step.rows, step.norm.tolist(), strict=True))
    assert norm["history"] > 0
    assert norm["weight decay"] > 0
    clip = min(1.0, 0.5 / (float(audited.balance.gradient_norm) + 1e-6))
    assert step.clip == pytest.approx(clip, rel=1e-4)
    assert step.clip < 1
    parts = step.gram.diagonal()[:10].sqrt()
    expected = step.learning_rate * step.clip * audited.balance.norm
    assert_close(parts, expected, rtol=1e-4, atol=1e-9)
    velocity = runs.load_tensors(stopped / "checkpoint.safetensors")[0]
    history = sum(
        float(t.double().square().sum())
        for name, t in velocity.items()
        if name.startswith("state/opt_state/velocity/")
    )
    assert norm["history"] == pytest.approx(0.8 * step.learning_rate * history**0.5, rel=1e-4)


def test_a_stopped_run_says_its_clipping_and_its_history_in_the_report(
    stopped, run_cli, tmp_path, no_figures
):
    code, out, _ = run_cli("audit", stopped, "--examples", "300", "--out", tmp_path)
    assert code == 0
    assert "note: the step shown is the next step: its learning rate" in out
    assert out.startswith("Outcome.\nThe training is not finished: what its class weights changed")
    found = read(tmp_path)
    assert found["step"]["clip"] < 1
    assert found["about"]["step"] == 13
    page = (tmp_path / "audit.html").read_text(encoding="utf-8")
    assert "history" in page
    assert "weight decay" in page


def test_a_run_that_divides_by_its_weights_is_audited_so(tmp_path, run_cli, no_figures):
    run = trained(tmp_path / "run", class_weight={"9": 5}, reduction="weighted_mean")
    code, _, _ = run_cli("audit", run, *FEW)
    assert code == 0
    found = read(run)
    assert found["reduction"] == "weighted_mean"
    for row in found["classes"]:
        assert row["elasticity"] == pytest.approx(row["share"] - row["expected_share"], abs=1e-9)
    assert sum(row["elasticity"] for row in found["classes"]) == pytest.approx(0.0, abs=1e-9)
    gram = double(found["gram"])
    weights = double([1.0] * 9 + [5.0])
    counts = double([row["count"] for row in found["classes"]])
    scale = 600 / (weights @ counts)
    assert found["gradient_norm"] == pytest.approx(
        float(scale * (weights @ gram @ weights).sqrt()), rel=1e-9
    )


def test_momentum_of_a_finished_run_is_its_history(tmp_path):
    run = trained(
        tmp_path / "run", optimizer="sgd", momentum=0.9, learning_rate=0.01, audit_every=0
    )
    found = audit_run(run, AuditOptions(examples=300))
    assert found.audit.step.note == ""
    norm = dict(zip(found.audit.step.rows, found.audit.step.norm.tolist(), strict=True))
    assert norm["history"] > 0
    assert norm["weight decay"] == 0
    assert found.history == []
    assert "audit_history.png" not in {path.name for path in write_report(found, tmp_path / "out")}


def test_a_run_of_no_step_is_audited(tmp_path, run_cli, no_figures):
    run = trained(tmp_path / "run", epochs=0)
    code, out, err = run_cli("audit", run, *FEW)
    assert (code, err) == (0, "")
    assert read(run)["about"]["step"] == 0
    assert "note: the step shown is the next step: its learning rate, 0.0004" in out
    assert "No verdict on the shares: the model is at chance (weighted loss" in out


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_of_every_loss_can_be_audited(tmp_path, loss):
    """At the first weights, with costs and without: what trains can be audited."""
    needed = {"equalization": {"threshold": 0.05}, "cross_entropy_with_cost": {"price": 0.5}}
    options = {"loss": loss, "loss_option": needed.get(loss, {})}
    for name, weights in (("costs", {"9": 5}), ("none", {})):
        made = make_config(SMALL, options, {"class_weight": weights})
        tensors = make_setup(made).state.params
        runs.save_tensors(tmp_path / f"{name}.safetensors", tensors, {})
        found = audit_checkpoint(
            tmp_path / f"{name}.safetensors", made, AuditOptions(examples=100)
        ).audit
        assert found.balance.share.sum() == pytest.approx(1.0)
        assert found.linear_in_weights


def test_without_weights_the_lowest_recall_is_told(unweighted, tmp_path, run_cli, no_figures):
    code, out, _ = run_cli("audit", unweighted, *FEW, "--out", tmp_path)
    assert code == 0
    assert out.startswith("Outcome.\nClass ")
    assert "has the lowest recall, " in out
    assert "baseline" not in out


# What it refuses.

REFUSED = [
    ([], 2, "name a run folder, or a model's file with --checkpoint"),
    (["RUN", "--checkpoint", "MODEL"], 2, "name a run folder, or a model's file"),
    (["RUN", "--split", "all"], 2, "split must be one of train, validation, test; got 'all'"),
    (["RUN", "--method", "magic"], 2, "method must be one of auto, layers"),
    (["RUN", "--device", "gpu"], 2, "device must be one of auto, cpu, cuda, mps; got 'gpu'"),
    (["RUN", "--model", "linear"], 2, "a run says itself what it is: leave out --model"),
    (["RUN", "--class-weight", "9=2"], 2, "leave out --class-weight"),
    (["RUN", "--loss", "nll", "--dataset", "mnist"], 2, "leave out --dataset, --loss"),
    (["RUN", "--seeds", "2"], 2, "seeds 2 is of --baseline: add it"),
    (["--checkpoint", "MODEL", "OF", "--baseline"], 2, "a saved model has no training to repeat"),
    (["PLAIN", "--baseline"], 2, "has no class weights and no costs in its loss"),
    (["STOPPED", "--baseline"], 2, "is not finished: resume it before you train its baseline"),
    (["nothing", "--baseline"], 1, "nothing is not a run folder: it has no config.toml"),
    (["RUN", "--memory", "inf"], 2, "memory must be finite, got inf"),
    (["RUN", "--memory", "nan"], 2, "memory must be finite, got nan"),
    (["RUN", "--memory", "0"], 2, "memory must be at least 1, got 0.0"),
    (["RUN", "--examples", "1"], 2, "examples must be at least 2, got 1"),
    (["RUN", "--examples", "-5"], 2, "examples must be at least 2, got -5"),
    (["--checkpoint", "MODEL"], 2, "say with --out where the report of a --checkpoint goes"),
    (["--checkpoint", "MODEL", *["--model", "lenet", "--out", "out"]], 2, "model must be one of"),
    (["--checkpoint", "MODEL", *["--loss", "huber", "--out", "out"]], 2, "loss must be one of"),
    (["--checkpoint", "MODEL", *["--dataset", "svhn", "--out", "out"]], 2,
     "dataset must be one of"),
    (["--checkpoint", "MODEL", *["--class-weight", "9", "--out", "out"]], 2,
     "class_weight must be CLASS=WEIGHT"),
    (["--checkpoint", "MODEL", "OF", "--class-weight", "ten=2"], 2, "no class 'ten'"),
    (["--checkpoint", "MODEL", "OF", "--class-weight", "9=-1"], 2, "must be at least 0"),
    (["nothing"], 1, "nothing is not a run folder: it has no config.toml"),
    (["MODEL"], 1, "is not a run folder: it has no config.toml"),
    (["--checkpoint", "gone.safetensors", "OF"], 1, "cannot read gone.safetensors: No such file"),
    (["--checkpoint", "TEXT", "OF"], 1, "is not a safetensors file"),
    (["--checkpoint", "PICTURE", "OF"], 1, "is not a safetensors file"),
    (["--checkpoint", "RUN", "OF"], 1, "cannot read"),
    (["--checkpoint", "STATE", "OF"], 1, "is not of linear on mnist-sample"),
    (["--checkpoint", "MODEL", *["--model", "mlp", "--dataset", "mnist-sample", "--out", "out"]], 1,
     "model.safetensors is not of mlp on mnist-sample: it lacks fc1.bias"),
    (["--checkpoint", "WIDE", "OF"], 1, "is not of linear on mnist-sample: see its fc.weight"),
    (["--checkpoint", "MORE", "OF"], 1, "is not of linear on mnist-sample: it has an unknown"),
]  # fmt: skip


@pytest.fixture
def places(finished, stopped, unweighted, tmp_path):
    """What the words of the tables above stand for."""
    (tmp_path / "text.safetensors").write_text("no tensors")
    tensors, header = runs.load_tensors(finished / "model.safetensors")
    wide = {**tensors, "fc.weight": torch.zeros(10, 99)}
    runs.save_tensors(tmp_path / "wide.safetensors", wide, header)
    runs.save_tensors(tmp_path / "more.safetensors", {**tensors, "extra": torch.zeros(1)}, header)
    return {
        "RUN": [finished],
        "PLAIN": [unweighted],
        "STOPPED": [stopped],
        "MODEL": [finished / "model.safetensors"],
        "STATE": [finished / "checkpoint.safetensors"],
        "PICTURE": [finished / "curves.png"],
        "TEXT": [tmp_path / "text.safetensors"],
        "WIDE": [tmp_path / "wide.safetensors"],
        "MORE": [tmp_path / "more.safetensors"],
        "OF": ["--model", "linear", "--dataset", "mnist-sample", "--out", "out"],
    }


@pytest.mark.parametrize(
    ("args", "code", "message"), REFUSED, ids=[" ".join(a) or "nothing" for a, _, _ in REFUSED]
)
def test_a_wrong_request_is_one_line_on_stderr_and_leaves_nothing(
    finished, places, run_cli, tmp_path, monkeypatch, args, code, message
):
    monkeypatch.chdir(tmp_path)
    before, beside = listing(finished), set(tmp_path.rglob("*"))
    found, out, err = run_cli("audit", *[x for a in args for x in places.get(a, [a])])
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert (found, out) == (code, "")
    assert listing(finished) == before
    assert set(tmp_path.rglob("*")) == beside


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "config.toml"])
@pytest.mark.parametrize("harm", ["gone", "cut", "folder"])
def test_a_damaged_run_is_one_line(run, run_cli, name, harm):
    content = (run / name).read_bytes()
    (run / name).unlink()
    if harm == "cut":
        (run / name).write_bytes(content[:50])
    if harm == "folder":
        (run / name).mkdir()
    before = listing(run)
    code, out, err = run_cli("audit", run)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert name in err
    assert listing(run) == before


def test_a_run_with_the_checkpoint_of_another_is_one_line(run, stopped, run_cli):
    shutil.copy(stopped / "checkpoint.safetensors", run)
    before = listing(run)
    code, _, err = run_cli("audit", run)
    assert code == 1
    assert err.count("\n") == 1
    assert "it is of another model" in err
    assert listing(run) == before


@pytest.mark.parametrize(
    "lines",
    [None, b"", b'{"kind": "audit", "st', b'{"kind": "step", "step": 1}\n{"kind'],
)
def test_a_log_that_is_cut_or_gone_costs_its_history_at_most(run, lines):
    (run / "metrics.jsonl").unlink()
    if lines is not None:
        (run / "metrics.jsonl").write_bytes(lines)
    assert audit_run(run, AuditOptions(examples=100)).history == []


def test_a_log_that_is_no_text_is_one_line_at_most(run, run_cli, no_figures):
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe")
    code, _, err = run_cli("audit", run, "--examples", "100", "--quiet")
    assert (code, err) == (0, "") or (code, err.count("\n"), "metrics.jsonl" in err) == (1, 1, True)


def test_data_that_is_gone_is_one_line(run_cli, tmp_path, finished, monkeypatch):
    monkeypatch.setattr("funcloss.app.data.fetch.answering", lambda urls, **how: [])
    run = shutil.copytree(finished, tmp_path / "run")
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace('"mnist-sample"', '"mnist"', 1))
    before = listing(run)
    code, out, err = run_cli("audit", run, "--data-dir", tmp_path / "nowhere")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert "not in" in err
    assert listing(run) == before


def test_a_place_that_cannot_hold_the_report_is_one_line(finished, run_cli, tmp_path):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        code, _, err = run_cli("audit", finished, *FEW, "--out", out)
        assert code == 1
        assert re.fullmatch(r"error: cannot make .*: (File exists|Not a directory)\n", err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_that_may_not_be_written_is_one_line(run, run_cli):
    run.chmod(0o555)
    try:
        code, _, err = run_cli("audit", run, *FEW)
    finally:
        run.chmod(0o755)
    assert code == 1
    assert re.fullmatch(r"error: cannot write .*: Permission denied\n", err)


def full_disk(monkeypatch, name):
    """Let a file of this name, and no other, fail half-way, as on a full disk."""
    opened, saved = Path.open, Figure.savefig

    def fails(path):
        path = Path(path)
        if path.name.startswith(f".{Path(name).stem}-") and path.suffix == Path(name).suffix:
            with open(path, "w") as file:
                file.write("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_(path, mode="r", *args, **options):
        if "w" in mode:
            fails(path)
        return opened(path, mode, *args, **options)

    def savefig(figure, path, **options):
        fails(path)
        return saved(figure, path, **options)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(Figure, "savefig", savefig)


@pytest.mark.parametrize(
    "name", ["audit.html", "audit.json", "audit_pairs.csv", "audit_examples.csv",
             "audit_conflict.png"],
)  # fmt: skip
def test_a_disk_that_fills_leaves_no_half_of_a_file(reported, tmp_path, run_cli, monkeypatch, name):
    run = shutil.copytree(reported[0], tmp_path / "run")
    before = listing(run)
    full_disk(monkeypatch, name)
    code, _, err = run_cli("audit", run, "--examples", "300")
    assert code == 1
    assert err == f"error: cannot write {run / name}: No space left on device\n"
    monkeypatch.undo()
    after = listing(run)
    assert after.keys() == before.keys()  # no hidden file either
    assert after[name] == before[name]


def test_ctrl_c_leaves_one_word_and_nothing_half_written(run, run_cli, monkeypatch):
    before = listing(run)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    for place in ("audit_run", "write_report"):
        with monkeypatch.context() as patched:
            patched.setattr(f"funcloss.app.audits.{place}", interrupted)
            code, out, err = run_cli("audit", run, *FEW)
        assert code in (1, 2, 130)
        assert out == ""
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert listing(run) == before
    with monkeypatch.context() as patched:
        patched.setattr(Figure, "savefig", interrupted)
        code, _, err = run_cli("audit", run, *FEW)
    assert code in (1, 2, 130)
    assert err.count("\n") == 1
    assert not [name for name in listing(run) if Path(name).name.startswith(".")]


def test_ctrl_c_of_a_terminal_ends_it_at_once(run, tmp_path):
    """The signal itself, in the middle of the work."""
    code = (
        "import sys, threading, os, signal\n"
        "from funcloss.app import audits\n"
        "real = audits.audit_run\n"
        "def slow(*a, **k):\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    while True: real(*a, **k)\n"
        "audits.audit_run = slow\n"
        "from funcloss.app.cli import main\n"
        f"sys.argv = ['funcloss', 'audit', {str(run)!r}, '--examples', '100']\n"
        "main()\n"
    )
    before = listing(run)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode in (1, 2, 130)
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert listing(run) == before


def test_the_library_refuses_a_model_in_place_of_a_run(finished):
    with pytest.raises(RunError, match="is not a run folder"):
        audit_run(finished / "model.safetensors")


# The first tutorial's loss.


@pytest.fixture(scope="module")
def tutorial(finished, sample):
    """The tutorial's network after some training, without dropout, and batches of 32."""
    torch.manual_seed(0)
    model = models.article_cnn().double().eval()
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(1))
    batches = [get_batch(sample, sample.train, index) for index in order[:1600].split(32)]
    batches = [Batch(batch.inputs.double(), batch.targets) for batch in batches]
    fast = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches[:40]:
        fast.zero_grad()
        torch.nn.functional.cross_entropy(model(batch.inputs), batch.targets).backward()
        fast.step()
    return model, batches[40:]


def audited(model, loss, batch):
    return audit(model, None, loss, [batch], settings=AuditSettings(per_example=False))


def test_the_published_cost_leaves_the_share_of_the_nines_as_it_is(tutorial):
    model, batches = tutorial
    for batch in batches[:4]:
        assert 0 < int((batch.targets == 9).sum()) < 32
        plain = audited(model, losses.cross_entropy, batch)
        costly = audited(model, tutorial_losses.published_costly_nine, batch)
        assert not costly.linear_in_weights
        assert abs(costly.balance.share - plain.balance.share).max() < 1e-6
        told = compare(costly, plain)
        assert told[0].startswith("The weighting has no effect on class")
        assert "9" in told[0]
        assert not any("raises" in line or "lowers" in line for line in told)
        times = 1 + float((batch.targets == 9).double().mean())
        assert costly.balance.gradient_norm / plain.balance.gradient_norm == pytest.approx(times)
        assert f"The gradient is {times:.3g} times as long" in told[-1]
        assert "another learning rate" in told[-1]


def test_across_random_batches_of_32_the_published_cost_is_a_factor_of_1_03():
    case = adapt(tutorial_losses.published_costly_nine, class_weights={9: 2.0}, batch_size=32).case
    effect = cost_effect(case)
    assert float(effect.within[9]) == pytest.approx(1.0, abs=1e-6)
    assert float(effect.across[9]) == pytest.approx(1.03, abs=0.005)
    assert "1.03 across random batches of 32" in effect.of_class(9)


def test_the_meant_cost_raises_the_share_of_the_nines_and_is_said_to(tutorial):
    model, batches = tutorial
    for batch in batches[:4]:
        plain = audited(model, losses.cross_entropy, batch)
        meant = audited(model, tutorial_losses.meant_costly_nine, batch)
        nine = LossSpec(class_weighted(losses.cross_entropy), double([1.0] * 9 + [2.0]))
        weighted = audited(model, nine, batch)
        assert meant.balance.share[9] > plain.balance.share[9]
        assert_close(meant.balance.share, weighted.balance.share, rtol=1e-9, atol=1e-12)
        told = compare(meant, plain)
        (line,) = [
            line for line in told if line.startswith("The weighting raises the share of class 9")
        ]
        first, last = re.findall(r"-?\d+\.\d", line)
        assert float(first) == pytest.approx(100 * float(plain.balance.share[9]), abs=0.051)
        assert float(last) == pytest.approx(100 * float(meant.balance.share[9]), abs=0.051)
        assert not any("no effect" in line and "class 9" in line for line in told)
