"""Cross-validation: every fold is a training run of its own, and nothing is held out twice."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

import funcloss
from funcloss.app import runs
from funcloss.app.config import make_config
from funcloss.app.options import EvaluateOptions
from funcloss.app.runs import folder
from funcloss.app.runs.folds import OUT_OF_FOLD, folds_of, pooled
from funcloss.app.runs.setup import make_setup
from funcloss.app.train import train
from funcloss.decisions import fold_interval
from funcloss.errors import ConfigError

OPTIONS = {
    "target": "kind", "model": "linear", "epochs": 2, "batch_size": 8, "learning_rate": 0.05,
    "compile": "off", "audit_every": 0, "cost": {"b,a": 5.0}, "seed": 3,
}  # fmt: skip


def write(path, x, names):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["u", "v", "kind"])
        writer.writerows(
            [*map(repr, row.tolist()), name] for row, name in zip(x, names, strict=True)
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1], [60, 24])
    x = generator.normal(size=(84, 2)).astype(np.float32) * [1, 30] + labels[:, None]
    place = tmp_path_factory.mktemp("folds")
    write(place / "rows.csv", x.astype(np.float32), np.array(["a", "b"])[labels])
    return place


@pytest.fixture(scope="module")
def run(place):
    config = make_config(OPTIONS | {"dataset": str(place / "rows.csv"), "folds": 3, "repeats": 2})
    assert train(config, place / "run").finished
    return place / "run"


def test_every_fold_is_a_training_run_of_its_own(run, place, tmp_path):
    """The scores of a fold are those of a run on files of the other folds, tested on it."""
    kept = runs.read_folds(run)
    pool = pooled(make_setup(folder.read_config(run)).dataset)
    assert kept.labels.tolist() == pool.labels.tolist()
    names = np.array(["a", "b"])[pool.labels.numpy()]
    for number in (0, 4):
        repeat, k = divmod(number, 3)
        held = (kept.fold[repeat] == k).numpy()
        write(tmp_path / "rest.csv", pool.inputs.numpy()[~held], names[~held])
        write(tmp_path / "held.csv", pool.inputs.numpy()[held], names[held])
        options = {"dataset": str(tmp_path / "rest.csv"), "seed": 3 + 1 + number}
        options["test_dataset"] = str(tmp_path / "held.csv")
        alone = tmp_path / f"alone-{number}"
        train(make_config(OPTIONS | options), alone)
        expected = runs.evaluate_run(alone).evaluation.logits
        torch.testing.assert_close(kept.logits[repeat][torch.from_numpy(held)], expected)


def test_the_folds_are_scikit_learns_and_hold_each_example_out_once(run):
    from sklearn.model_selection import StratifiedKFold

    kept = runs.read_folds(run)
    assert kept.logits.shape == (2, 84, 2)
    assert kept.logits.isfinite().all()
    assert not kept.fold[0].equal(kept.fold[1])
    for repeat in range(2):
        dealt = StratifiedKFold(3, shuffle=True, random_state=3 + repeat)
        for k, (_, held) in enumerate(dealt.split(np.zeros(84), kept.labels.numpy())):
            assert (kept.fold[repeat] == k).nonzero().squeeze(1).tolist() == held.tolist()


def test_the_scores_are_of_all_folds_with_intervals_over_them(run):
    summary, kept = folder.read_summary(run), runs.read_folds(run)
    assert "test" not in summary
    assert summary[OUT_OF_FOLD]["n"] == 84
    assert (summary["folds"], summary["repeats"]) == (3, 2)
    costs = np.array([[0, 1.0], [5, 0]])
    means = []
    for logits, fold in zip(kept.logits, kept.fold, strict=True):
        paid = costs[kept.labels.numpy(), logits.argmax(-1).numpy()]
        means += [paid[fold.numpy() == k].mean() for k in range(3)]
    over = summary["over_folds"]["argmax"]["expected_cost"]
    half = stats.t.ppf(0.975, 5) * np.sqrt(np.var(means, ddof=1) * (1 / 6 + 1 / 2))
    assert over[0] == pytest.approx(np.mean(means))
    assert over[1] == pytest.approx(max(0, np.mean(means) - half), abs=1e-3)
    assert over[2] == pytest.approx(min(5, np.mean(means) + half), abs=1e-3)
    confusion = np.array(summary[OUT_OF_FOLD]["rules"]["argmax"]["confusion"])
    assert confusion.sum(1).tolist() == [120, 48]
    # Each example counts once for its interval, however often it was held out.
    recall, low, high = summary[OUT_OF_FOLD]["rules"]["argmax"]["recall"]["b"]
    once = stats.binomtest(round(recall * 24), 24).proportion_ci(method="wilson")
    if float(recall * 24).is_integer():
        assert (low, high) == pytest.approx((once.low, once.high), abs=1e-6)
    assert high - low > 0.9 * (once.high - once.low)


def test_the_calibration_is_that_of_the_examples_held_out(run, run_cli):
    model = funcloss.load(run)
    assert model.calibration.fitted_on == OUT_OF_FOLD
    assert model.calibration.examples == 84
    own = runs.evaluate_run(run)  # of a run without a test split
    assert own.split == OUT_OF_FOLD
    summary = folder.read_summary(run)
    record = summary[OUT_OF_FOLD]["rules"]["minimum expected cost"]
    assert own.evaluation.min_cost.expected_cost.value == record["expected_cost"][0]
    other = runs.evaluate_run(run, EvaluateOptions(class_cost={"b": 50.0}))
    assert other.evaluation.rule.costs.matrix[1, 0] == 50
    code, out, _ = run_cli("evaluate", run)
    assert code == 0
    assert "on 168 examples of rows, out-of-fold" not in out
    assert "on 84 examples of rows, out-of-fold" in out


def test_a_stop_within_the_folds_goes_on_to_the_same_bits(run, place, tmp_path):
    config = make_config(OPTIONS | {"dataset": str(place / "rows.csv"), "folds": 3, "repeats": 2})
    seen = []

    def show(event):
        seen.append(event)

    def should_stop():
        return sum(isinstance(e, runs.FoldReport) for e in seen) >= 2

    stopped = train(config, tmp_path / "run", show=show, should_stop=should_stop)
    assert not stopped.finished
    assert not (tmp_path / "run" / "summary.json").exists()
    kept = folder.read_config(tmp_path / "run")
    again = []
    assert train(kept, tmp_path / "run", resume=True, show=again.append).finished
    assert [e.number for e in again if isinstance(e, runs.FoldReport)] == [3, 4, 5, 6]
    for name in ("folds.safetensors", "model.safetensors"):
        (tensors, header), (expected, ran_through) = (
            runs.load_tensors(place / name) for place in (tmp_path / "run", run)
        )
        assert header == ran_through
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(t, expected[key]) for key, t in tensors.items())


def test_early_stopping_has_a_validation_split_in_every_fold(place, tmp_path):
    options = OPTIONS | {"dataset": str(place / "rows.csv"), "folds": 2, "epochs": "auto"}
    shown = []
    train(make_config(options), tmp_path / "run", show=shown.append)
    epochs = [e.epochs for e in shown if isinstance(e, runs.FoldReport)]
    assert len(epochs) == 2
    assert min(epochs) >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "folds must be 2 or more"),
        ({"repeats": 3}, "repeats 3 is of folds"),
        ({"folds": 25}, "folds 25: class b has 24 examples"),
        ({"folds": 3, "floor": {"b": 0.9}}, "folds does not go with floor"),
        ({"folds": 3, "imbalance": 3.0}, "folds does not go with imbalance"),
    ],
)
def test_what_cannot_be_cross_validated_is_refused_before_anything_is_trained(
    place, tmp_path, options, message
):
    with pytest.raises(ConfigError, match=message):
        train(make_config(OPTIONS | {"dataset": str(place / "rows.csv")} | options), tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_the_interval_over_folds_is_wider_than_that_of_independent_values():
    values = [0.1, 0.3, 0.2, 0.2, 0.4]
    found = fold_interval(values, 5)
    assert found.value == pytest.approx(0.24)
    alone = stats.t.ppf(0.975, 4) * np.std(values, ddof=1) / math.sqrt(5)
    assert found.high - found.value == pytest.approx(alone * math.sqrt(1 + 5 / 4), rel=1e-3)
    assert fold_interval(values, 5, within=(0.2, 0.3))[1:] == (0.2, 0.3)


def test_folds_of_is_stratified_and_names_a_class_that_is_too_small():
    labels = torch.tensor([0] * 10 + [1] * 5)
    found = folds_of(labels, 5, 2, 0, ("a", "b"))
    for repeat in found:
        assert repeat[10:].sort().values.tolist() == [0, 1, 2, 3, 4]
        assert repeat[:10].bincount().tolist() == [2] * 5
    with pytest.raises(ConfigError, match="class b has 5 examples"):
        folds_of(labels, 6, 1, 0, ("a", "b"))


def test_a_published_data_set_keeps_its_test_split(tmp_path, run_cli):
    code, out, err = run_cli("train", "--dataset", "mnist-sample", "--model", "linear", "--epochs",
                             1, "--folds", 2, "--compile", "off", "--audit-every", 0,
                             "--run-dir", tmp_path / "run")  # fmt: skip
    assert code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test"]["n"] == 500
    assert summary[OUT_OF_FOLD]["n"] == 4500
    assert "out-of-fold accuracy" in out
    assert dataclasses.asdict(make_config())["folds"] == 0
