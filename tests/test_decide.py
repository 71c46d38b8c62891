"""From costs to a decision on new data: one rule, kept with the run, whoever asks."""

import csv
import json

import numpy as np
import pytest
import torch

import funcloss
from funcloss.app import runs
from funcloss.app.config import make_config
from funcloss.app.options import EvaluateOptions
from funcloss.app.runs import folder
from funcloss.app.runs.setup import make_setup
from funcloss.app.train import train

COSTS = {"malignant": 20.0}


def write_rows(path, rows, classes=None):
    """Write rows of the breast cancer table that scikit-learn ships."""
    from sklearn.datasets import load_breast_cancer

    table = load_breast_cancer()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        target = [] if classes is None else ["diagnosis"]
        writer.writerow([*(name.replace(" ", "_") for name in table.feature_names), *target])
        for i in rows:
            name = [] if classes is None else [classes[table.target[i]]]
            writer.writerow([*table.data[i], *name])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of 357 benign and 70 malignant tumours, and rows that no model has seen."""
    from sklearn.datasets import load_breast_cancer

    target = load_breast_cancer().target
    malignant = np.random.default_rng(0).permutation(np.flatnonzero(target == 0))
    rows = np.sort(np.concatenate([np.flatnonzero(target == 1), malignant[:70]]))
    place = tmp_path_factory.mktemp("tumours")
    write_rows(place / "rows.csv", rows, ("malignant", "benign"))
    write_rows(place / "new.csv", malignant[70:90])
    return place


@pytest.fixture(scope="module")
def run(table):
    options = {"dataset": str(table / "rows.csv"), "target": "diagnosis", "class_cost": COSTS}
    options |= {"epochs": 15, "batch_size": 16, "learning_rate": 0.003, "audit_every": 0}
    options |= {"compile": "off", "seed": 1}
    train(make_config(options), table / "run")
    return table / "run"


def columns_of(path):
    rows = list(csv.DictReader(path.read_text().splitlines()))
    return {name: [row[name] for row in rows] for name in rows[0]}


def test_the_same_rows_get_the_same_decisions_whoever_asks(table, run, run_cli, tmp_path):
    asked = {
        "evaluate": ("evaluate", run, "--dataset", tmp_path / "folder" / "rows.csv"),
        "predict": ("predict", run, table / "rows.csv"),
        "predict a folder": ("predict", run, tmp_path / "folder"),
    }
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.csv").write_bytes((table / "rows.csv").read_bytes())
    found = {}
    for who, command in asked.items():
        code, _, err = run_cli(*command, "--csv", tmp_path / "out.csv")
        assert (code, err) == (0, "")
        found[who] = columns_of(tmp_path / "out.csv")
    dataset = make_setup(folder.read_config(run)).dataset
    model = funcloss.load(run)
    first = found["predict"]
    for columns in found.values():
        for name in ("decision", "probability", "expected_cost", "cost benign"):
            assert columns[name] == first[name]
    assert len(set(first["decision"])) == 2
    # The run's own splits, which are cut from the same file.
    by_row = {}
    inputs, _ = runs.use.read_features(table / "rows.csv", model.columns)
    for row, decision in zip(inputs.tolist(), first["decision"], strict=True):
        by_row[tuple(row)] = decision
    for split in ("train", "validation", "test"):
        report = runs.evaluate_run(run, EvaluateOptions(split=split))
        decisions = report.evaluation.rule.costs.decisions
        kept = [decisions[i] for i in report.evaluation.min_cost.decisions.tolist()]
        examples = dataset.splits[split].inputs
        assert kept == [by_row[tuple(row)] for row in examples.tolist()]
        assert kept == model.decide(examples).names


def test_a_row_of_the_table_adds_up(run, table, run_cli, tmp_path):
    code, out, _ = run_cli("predict", run, table / "new.csv", "--csv", tmp_path / "new-out.csv")
    assert code == 0
    lines = out.splitlines()
    columns = columns_of(tmp_path / "new-out.csv")
    assert len(lines) == len(columns["row"]) == 20
    for i, line in enumerate(lines):
        p = float(columns["probability malignant"][i])
        assert p + float(columns["probability benign"][i]) == pytest.approx(1, abs=1e-5)
        assert float(columns["cost benign"][i]) == pytest.approx(20 * p, rel=1e-4)
        decision = "malignant" if p > 1 / 21 else "benign"
        assert columns["decision"][i] == decision
        cost = float(columns[f"cost {decision}"][i])
        assert float(columns["expected_cost"][i]) == cost
        shown = f"{table / 'new.csv'}:{i + 1}: {decision} ("
        assert line.startswith(shown)
        shown_cost = float(line.removesuffix(")").rpartition("expected cost ")[2])
        assert shown_cost == pytest.approx(cost, rel=1e-3)


def test_the_rule_can_be_asked_for_and_costs_can_be_others(run, table, run_cli):
    model = funcloss.load(run)
    inputs, _ = runs.use.read_features(table / "rows.csv", model.columns)
    assert model.decide(inputs).rule == "min-cost"
    sure = model.decide(inputs, by="argmax")
    assert sure.index.tolist() == sure.probabilities.argmax(-1).tolist()
    assert run_cli("predict", run, table / "new.csv", "--rule", "argmax")[0] == 0
    code, out, err = run_cli("predict", run, table / "new.csv", "--rule", "cheapest")
    assert (code, out) == (2, "")
    assert "rule must be one of argmax, min-cost, got 'cheapest'" in err
    code, _, err = run_cli("predict", run, table / "run")
    assert code == 1
    assert "has no file to predict: .csv" in err
    other = runs.evaluate_run(run, EvaluateOptions(class_cost={"benign": 3.0})).evaluation
    own = runs.evaluate_run(run).evaluation
    assert other.rule.temperature == own.rule.temperature
    assert torch.equal(other.rule.log_probs(own.logits), own.rule.log_probs(own.logits))
    assert other.rule.costs.matrix.tolist() == [[0, 3], [1, 0]]


def test_another_prior_changes_the_odds_by_as_much(run):
    model, own = funcloss.load(run), runs.evaluate_run(run).evaluation
    other = runs.evaluate_run(run, EvaluateOptions(prior={"malignant": 0.5})).evaluation
    change = other.rule.log_probs(own.logits) - own.rule.log_probs(own.logits)
    counts = model.class_counts.double()
    expected = torch.tensor([0.5, 0.5]).log() - (counts / counts.sum()).log()
    odds = change[:, 1] - change[:, 0]
    torch.testing.assert_close(odds, (expected[1] - expected[0]).expand(len(odds)))


def test_threshold_and_calibration_are_said_and_kept(run, run_cli):
    summary = json.loads((run / "summary.json").read_text())
    sentence = "predict malignant when its probability exceeds 0.0476"
    assert summary["decisions"] == [sentence]
    assert summary["rule"] == "min-cost"
    assert summary["calibration"] == funcloss.load(run).calibration.record()
    code, out, _ = run_cli("evaluate", run)
    assert code == 0
    assert f"decision: {sentence}" in out
    assert f"calibration: {summary['calibrated']}" in out
    assert "right threshold" in out
    # The training counts are the prior of a validation set that was cut from the training set.
    counts = funcloss.load(run).class_counts.double()
    assert summary["calibration"]["prior"] == pytest.approx((counts / counts.sum()).tolist())


def test_without_costs_the_likeliest_class_is_predicted(table, run_cli, tmp_path):
    run = tmp_path / "plain"
    code, _, _ = run_cli("train", "--dataset", table / "rows.csv", "--target", "diagnosis",
                         "--batch-size", 32, "--class-weight", "malignant=5", "--compile", "off",
                         "--run-dir", run)  # fmt: skip
    assert code == 0
    model = funcloss.load(run)
    inputs, _ = runs.use.read_features(table / "rows.csv", model.columns)
    decided = model.decide(inputs)
    assert decided.rule == "argmax"
    logits = model.model(((inputs - model.mean) / model.std).float())
    assert decided.index.tolist() == logits.argmax(-1).tolist()
    _, out, _ = run_cli("predict", run, table / "new.csv")
    assert "expected cost" not in out


def test_a_run_that_is_not_finished_decides_and_says_that_it_is_not_calibrated(table, tmp_path):
    config = make_config({"dataset": str(table / "rows.csv"), "target": "diagnosis",
                          "batch_size": 16, "epochs": 2, "class_cost": COSTS})  # fmt: skip
    outcome = train(config, tmp_path / "run", should_stop=lambda: True)
    assert not outcome.finished
    model = funcloss.load(tmp_path / "run")
    assert "not calibrated" in model.calibration.sentence
    assert len(model.decide(torch.zeros(3, 30)).names) == 3


@pytest.fixture(scope="module")
def payments(tmp_path_factory):
    """A table of payments, each of which costs its own amount if it is a fraud let through."""
    generator = np.random.default_rng(1)
    place = tmp_path_factory.mktemp("payments")
    fraud = generator.random(120) < 0.3
    x = generator.normal(size=(120, 2)) + fraud[:, None]
    amount = np.round(generator.lognormal(1.0, 1.5, size=120), 2)
    with (place / "payments.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["u", "v", "amount", "kind"])
        for row, price, is_fraud in zip(x, amount, fraud, strict=True):
            writer.writerow([*row, price, "fraud" if is_fraud else "legit"])
    options = {"dataset": str(place / "payments.csv"), "target": "kind", "model": "linear",
               "cost": {"fraud,legit": "amount", "legit,fraud": 2.0}, "epochs": 5, "folds": 3,
               "batch_size": 16, "audit_every": 0, "compile": "off"}  # fmt: skip
    train(make_config(options), place / "run")
    return place


def test_the_cost_of_each_example_is_its_own_everywhere(payments, run_cli, tmp_path):
    (tmp_path / "copy.csv").write_bytes((payments / "payments.csv").read_bytes())
    run, found = payments / "run", {}
    for command in (("predict", run, tmp_path / "copy.csv"),
                    ("evaluate", run, "--dataset", tmp_path / "copy.csv")):  # fmt: skip
        code, _, err = run_cli(*command, "--csv", tmp_path / "out.csv")
        assert (code, err) == (0, "")
        found[command[0]] = columns_of(tmp_path / "out.csv")
    for name in ("decision", "expected_cost", "cost fraud", "cost legit"):
        assert found["predict"][name] == found["evaluate"][name]
    rows = columns_of(tmp_path / "copy.csv")
    amount = np.array(rows["amount"], dtype=float)
    p = np.array(found["predict"]["probability fraud"], dtype=float)
    by_hand = np.where(p * amount > (1 - p) * 2, "fraud", "legit")
    assert found["predict"]["decision"] == by_hand.tolist()
    assert set(by_hand) == {"fraud", "legit"}
    model = funcloss.load(run)
    inputs, amounts = runs.use.read_features(tmp_path / "copy.csv", model.columns, ["amount"])
    assert [column.name for column in model.columns] == ["u", "v"]
    assert model.decide(inputs, amounts=amounts).names == by_hand.tolist()
    with pytest.raises(ValueError, match="costs each example its amount"):
        model.decide(inputs)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["decisions"] == ["the threshold of each example depends on its amount"]
    paid = runs.evaluate_run(run).evaluation  # out of fold
    truth = paid.labels == paid.rule.costs.classes.index("fraud")
    missed = truth & (paid.argmax.decisions != paid.labels)
    expected = (paid.amounts["amount"] * missed).sum() + 2 * (
        ~truth & (paid.argmax.decisions != paid.labels)
    ).sum()
    assert paid.argmax.expected_cost.value == pytest.approx(float(expected) / 120)
    assert not (run / "threshold.png").exists()
    code, _, err = run_cli("export", run, "--torch", tmp_path / "run.pt2")
    assert code == 2
    assert "decides by the amount of each example" in err
    (tmp_path / "bare.csv").write_text("u,v\n0,1\n")
    code, _, err = run_cli("predict", run, tmp_path / "bare.csv")
    assert code == 2
    assert "amount" in err


def test_a_curve_of_the_cost_is_drawn_for_two_classes(run):
    assert (run / "threshold.png").stat().st_size > 10_000


def test_a_run_with_folds_is_evaluated_on_its_own_data_out_of_fold(table, run_cli, tmp_path):
    data, other = table / "rows.csv", tmp_path / "other.csv"
    other.write_bytes(data.read_bytes())
    options = {"dataset": str(data), "target": "diagnosis", "class_cost": COSTS, "model": "linear"}
    options |= {"epochs": 1, "batch_size": 64, "audit_every": 0, "folds": 2}
    train(make_config(options), tmp_path / "run")
    for place, said in (
        ([], "427 examples of rows, out-of-fold"),
        (["--dataset", data], "427 examples of rows, out-of-fold"),
        (["--dataset", other], "427 examples of other, test"),
    ):
        code, out, err = run_cli("evaluate", tmp_path / "run", *place)
        assert (code, err) == (0, "")
        assert f"on {said}" in out
    code, _, err = run_cli(
        "evaluate", tmp_path / "run", "--dataset", other, "--split", "out-of-fold"
    )
    assert code == 2
    assert "split out-of-fold is of a run with folds, on its own data" in err
