"""A sweep under cross-validation: chosen by out-of-fold predictions, one model on all data."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import resume_sweep, swept

from funcloss.app import runs
from funcloss.app.config import make_config
from funcloss.app.report.choice import OUT_OF_FOLD_EXAMPLES
from funcloss.app.runs import folder
from funcloss.app.runs.folds import OUT_OF_FOLD
from funcloss.app.sweep import Axis, read_spec
from funcloss.app.train import train
from funcloss.errors import ConfigError

OPTIONS = {
    "target": "kind", "model": "linear", "epochs": 2, "batch_size": 8, "learning_rate": 0.05,
    "compile": "off", "audit_every": 0, "cost": {"b,a": 5.0}, "seed": 3, "folds": 3, "repeats": 2,
}  # fmt: skip
WEIGHTS = Axis("class_weight", "b", (1.0, 3.0))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two Gaussians, 60 of a and 24 of b."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], [60, 24])
    x = generator.normal(size=(84, 2)) * [1, 30] + labels[:, None]
    path = tmp_path_factory.mktemp("folds") / "rows.csv"
    with path.open("w", newline="") as file:
        rows = [[*row, "ab"[label]] for row, label in zip(x.tolist(), labels, strict=True)]
        csv.writer(file).writerows([["u", "v", "kind"], *rows])
    return path


def config(table, **options):
    return make_config(OPTIONS, {"dataset": str(table)}, options)


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):
    """A sweep that nothing stopped, and the out-of-fold scores of its trials while it ran."""
    out, kept = tmp_path_factory.mktemp("sweeps") / "whole", {}

    def show(event):
        if isinstance(event, runs.Started):
            for path in out.glob("folds-*.safetensors"):
                kept[path.name] = runs.load_tensors(path)[0]

    return swept(config(table), [WEIGHTS], out, show=show), kept


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_trial_is_a_run_with_folds_of_its_own(whole, table, tmp_path):
    ended, kept = whole
    assert len(kept) == len(ended.choice.points) == 2
    for number, weight in enumerate(WEIGHTS.values):
        alone = tmp_path / f"alone-{number}"
        summary = train(config(table, class_weight={"b": weight}), alone).summary
        expected = runs.load_tensors(alone / "folds.safetensors")[0]
        assert same_tensors(kept[f"folds-{number}.safetensors"], expected)
        point, rules = ended.choice.points[number], summary["over_folds"]
        assert point.accuracy == pytest.approx(rules["argmax"]["accuracy"])
        assert point.expected_cost == pytest.approx(rules["argmax"]["expected_cost"])
        by_rule = rules["minimum expected cost"]["expected_cost"]
        assert point.rule_cost == pytest.approx(by_rule)
        if point.chosen:
            assert summary[OUT_OF_FOLD] == ended.summary[OUT_OF_FOLD]
            for name in ("model", "checkpoint", "folds"):
                a, b = (runs.load_tensors(place / f"{name}.safetensors")[0]
                        for place in (alone, ended.run_dir))  # fmt: skip
                assert same_tensors(a, b)
            assert {p.name for p in alone.iterdir()} <= {p.name for p in ended.run_dir.iterdir()}


def test_the_trial_of_least_cost_over_the_folds_is_chosen(whole):
    ended, kept = whole
    costs, labels = np.array([[0, 1.0], [5, 0]]), kept["folds-0.safetensors"]["labels"].numpy()
    means, recalls = [], []
    for number in range(2):
        scores = kept[f"folds-{number}.safetensors"]
        of_fold, found = [], []
        for logits, fold in zip(scores["logits"], scores["fold"], strict=True):
            decided = logits.argmax(-1).numpy()
            for k in range(3):
                held = fold.numpy() == k
                of_fold.append(costs[labels[held], decided[held]].mean())
                found.append((decided[held & (labels == 1)] == 1).mean())
        means.append(np.mean(of_fold))
        recalls.append(np.mean(found))
    points = ended.choice.points
    assert [p.expected_cost.value for p in points] == pytest.approx(means)
    assert [p.recall[0].value for p in points] == pytest.approx(recalls)
    assert [p.chosen for p in points] == [mean == min(means) for mean in means]
    assert means[0] != means[1]


def test_trials_are_compared_on_the_same_examples_and_the_report_says_which(whole, table):
    ended, kept = whole
    choice, costs = ended.choice, np.array([[0, 1.0], [5, 0]])
    assert (choice.chosen_on, choice.tested_on, choice.seeds) == (
        OUT_OF_FOLD_EXAMPLES, OUT_OF_FOLD_EXAMPLES, 6)  # fmt: skip
    paid = [costs[scores["labels"].numpy(), scores["logits"].argmax(-1).numpy()].mean()
            for _, scores in sorted(kept.items())]  # fmt: skip
    rows = {row.name: row for row in choice.rows}
    assert rows["plain"].expected_cost.value == pytest.approx(paid[0])
    assert rows["class_weight b=3"].difference.value == pytest.approx(paid[1] - paid[0])
    page = (ended.folder / "sweep.html").read_text()
    said = " ".join(choice.lines) + page
    assert "On the out-of-fold examples" in page
    assert "test set" not in " ".join(choice.lines)
    assert "The test set" not in page
    assert "on the low side" in " ".join(choice.lines)
    assert "The choice was made on these examples too" in page
    assert "from fold to fold, 6 folds" in page
    assert "from seed to seed" not in page
    assert "least expected cost on out-of-fold examples" in said
    assert "least expected cost on validation data" not in said
    assert not list(ended.folder.glob("folds-*"))
    assert json.loads((ended.folder / "sweep.json").read_text())["tested_on"] == choice.tested_on
    assert read_spec(ended.folder).config.folds == 3
    assert read_spec(ended.folder).config.repeats == 2


@pytest.mark.parametrize("folds", [4, 9, 12])
def test_a_stop_goes_on_to_the_same_choice(whole, table, tmp_path, folds):
    """In the second fold of the second trial, in its last, and in the model at the end."""
    ended, _ = whole
    seen = []

    def should_stop():
        return sum(isinstance(e, runs.FoldReport) for e in seen) >= folds

    out = tmp_path / "sweep"
    stopped = swept(config(table), [WEIGHTS], out, show=seen.append, should_stop=should_stop)
    assert not stopped.finished
    assert not (out / "sweep.json").exists()
    again = []
    assert resume_sweep(out, show=again.append).finished
    assert sum(isinstance(e, runs.FoldReport) for e in again) == 12 - folds
    for name in ("sweep.json", "sweep.csv"):
        assert (out / name).read_bytes() == (ended.folder / name).read_bytes()
    a, b = (runs.load_tensors(place / "chosen" / "model.safetensors")[0]
            for place in (out, ended.folder))  # fmt: skip
    assert same_tensors(a, b)


def test_a_trial_that_diverges_is_out_of_the_choice(table, tmp_path):
    rates = Axis("learning_rate", "", (0.05, 1e38))
    made = config(table, optimizer="sgd", repeats=1)
    ended = swept(made, [rates], tmp_path / "sweep")
    assert [p.diverged for p in ended.choice.points] == [0, 1]
    assert [p.chosen for p in ended.choice.points] == [True, False]
    assert "Diverged, and out of the choice: learning_rate=1e+38." in " ".join(ended.choice.lines)


def test_a_test_split_of_its_own_is_read_once_for_both(table, tmp_path):
    made = config(table, test_dataset=str(table), repeats=1)
    ended = swept(made, [WEIGHTS], tmp_path / "sweep")
    assert (ended.choice.chosen_on, ended.choice.tested_on) == (OUT_OF_FOLD_EXAMPLES, "test set")
    assert {p.name for p in ended.folder.iterdir() if p.is_dir()} == {"plain", "chosen"}
    rows = {row.name: row for row in ended.choice.rows}
    for name, run in (("plain", "plain"), ("class_weight b=3", "chosen")):
        test = folder.read_summary(ended.folder / run)["test"]["rules"]
        assert rows[name].expected_cost.value == test["argmax"]["expected_cost"][0]
        by_rule = rows[f"{name}, minimum expected cost"].expected_cost.value
        assert by_rule == test["minimum expected cost"]["expected_cost"][0]
    assert "On the test set, read once" in " ".join(ended.choice.lines)
    assert "low side" not in " ".join(ended.choice.lines)


def test_no_validation_data_is_needed(table, tmp_path):
    made = config(table, val_fraction=0.0, repeats=1)
    ended = swept(made, [WEIGHTS], tmp_path / "sweep")
    assert ended.finished
    assert not ended.choice.gradient


@pytest.mark.slow
def test_epochs_may_be_auto(table, tmp_path):
    shown = []
    made = config(table, epochs="auto", folds=2, repeats=1, batch_size=20, learning_rate=1.0)
    assert swept(made, [WEIGHTS], tmp_path / "sweep", show=shown.append).finished
    assert sum(isinstance(e, runs.FoldReport) for e in shown) == 4


@pytest.mark.parametrize(
    ("options", "how", "message"),
    [
        ({}, {"seeds": 2}, "folds 3 with seeds 2 and method auto: .* set repeats"),
        ({}, {"method": "loop"}, "folds 3 with seeds 1 and method loop"),
        ({"folds": 25}, {}, "folds 25: class b has 24 examples"),
        (
            {"epochs": "auto", "val_fraction": 0.0},
            {},
            "epochs auto stops by the loss",
        ),
        ({"epochs": "auto", "folds": 0, "repeats": 1}, {}, "all train for the same number of epo"),
        ({"val_fraction": 0.0, "folds": 0, "repeats": 1}, {}, "set val_fraction, .* or folds"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_trained(
    table, tmp_path, options, how, message
):
    with pytest.raises(ConfigError, match=message):
        swept(config(table, **options), [WEIGHTS], tmp_path / "sweep", **how)
    assert not (tmp_path / "sweep").exists()


def test_the_command_says_what_it_chose_on(table, tmp_path, run_cli):
    made = replace(config(table), data_dir="")
    options = [f"--{name.replace('_', '-')}={getattr(made, name)}"
               for name in OPTIONS if name not in ("cost", "repeats")]  # fmt: skip
    code, out, err = run_cli("sweep", "--dataset", table, *options, "--cost", "b,a=5",
                             "--class-weight", "b=1,3", "--out", tmp_path / "sweep")  # fmt: skip
    assert code == 0, err
    assert "trial 2 of 2, class_weight b=3" in out
    assert "on out-of-fold examples, 95 % over the folds" in " ".join(out.split())
    assert "on the out-of-fold examples, 95 %" in " ".join(out.split())
