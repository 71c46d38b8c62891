"""Costs, priors, options of the loss and a long tail, from the command line to the numbers."""

import dataclasses
import functools
import inspect
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer.testing
from conftest import StopAt, resume
from sklearn.utils.class_weight import compute_class_weight
from torch.testing import assert_close

from funcloss import class_weighted, custom_vjp, losses, mixup, scaled
from funcloss.app import audits, data, registry, runs, sweep
from funcloss.app.cli import app as shell
from funcloss.app.config import make_config, read_toml
from funcloss.app.options import AuditOptions, EvaluateOptions
from funcloss.app.runs import folder
from funcloss.app.runs.options import balanced_weights, make_criterion, number_options
from funcloss.app.runs.setup import make_hyper, make_setup
from funcloss.app.train import train
from funcloss.decisions import make_costs
from funcloss.errors import ConfigError
from funcloss.typing import Batch

LOSSES = {name: row.load() for name, row in registry.LOSSES.items()}

TINY = {"dataset": "mnist-sample", "model": "linear", "compile": "off", "epochs": 1}
QUICK = ["--dataset", "mnist-sample", "--model", "linear", "--compile", "off", "--epochs", "1"]
QUICK += ["--audit-every", "0", "--val-fraction", "0.1", "--quiet"]
NEEDED = {"equalization": {"threshold": 0.05}, "cross_entropy_with_cost": {"price": 0.5}}


@dataclasses.dataclass
class Told:
    """What a loss is told, in float64: logits, labels, counts, costs of each label's decisions."""

    z: torch.Tensor
    y: torch.Tensor
    n: torch.Tensor
    c: torch.Tensor

    def cross_entropy(self, logits):
        return F.cross_entropy(logits, self.y, reduction="none")

    @property
    def is_label(self):
        return F.one_hot(self.y, 10).bool()

    @property
    def own(self):
        return self.z[self.is_label]


def equalization(t):
    wrong = F.binary_cross_entropy_with_logits(t.z, t.is_label.double(), reduction="none")
    return (wrong * (t.is_label | (t.n / t.n.sum() >= 0.05))).sum(1)


def class_balanced(t):
    weights = (1 - 0.99) / (1 - 0.99**t.n)
    weights = weights / ((weights * t.n).sum() / t.n.sum())  # 1 in the mean over the examples
    return weights[t.y] * t.cross_entropy(t.z)


# What is minimised, written once more; options as they are given, else the default.
REFERENCES = {
    "class_balanced": ({"beta": 0.99}, class_balanced),
    "balanced_softmax": ({}, lambda t: t.cross_entropy(t.z + t.n.log())),
    "logit_adjusted": (
        {"tau": 2},
        lambda t: t.cross_entropy(t.z + 2 * (t.n / t.n.sum()).log()),
    ),
    "ldam": (
        {"scale": 5, "max_margin": 0.3},
        lambda t: t.cross_entropy(5 * (t.z - t.is_label * 0.3 * (t.n.min() / t.n) ** 0.25)),
    ),
    "vector_scaling": (
        {"gamma": 0.1},
        lambda t: t.cross_entropy((t.n / t.n.max()) ** 0.1 * t.z + t.n.log()),
    ),
    "equalization": ({"threshold": 0.05}, equalization),
    "expected_cost": ({}, lambda t: (t.c * t.z.softmax(1)).sum(1)),
    "log_bilinear": (
        {},
        lambda t: -(t.c * (1 - t.z.softmax(1)).log() * ~t.is_label).sum(1),
    ),
    "softmax_margin": ({}, lambda t: (t.z + t.c).logsumexp(1) - t.own),
    "cost_hinge": ({}, lambda t: (t.z + t.c).amax(1) - t.own),
    "cross_entropy_with_cost": (
        {"price": 0.5},
        lambda t: t.cross_entropy(t.z) + 0.5 * (t.c * t.z.softmax(1)).sum(1),
    ),
}


def long_tail(largest, factor, classes=10):
    return [int(largest / factor ** (c / (classes - 1))) for c in range(classes)]


@pytest.mark.slow
@pytest.mark.parametrize("loss", REFERENCES)
def test_a_loss_of_counts_or_costs_trains_on_what_the_data_and_the_options_say(
    run_cli, tmp_path, sample, loss
):
    options, reference = REFERENCES[loss]
    args = [*QUICK, "--loss", loss, "--class-cost", "4=3", "--class-weight", "9=2"]
    args += ["--imbalance", "4", "--batch-size", "64"]
    for name, value in options.items():
        args += ["--loss-option", f"{name}={value}"]
    run = tmp_path / "run"
    code, _, err = run_cli(*args, "--run-dir", run, program=shell.main_train)
    assert code == 0, err
    epochs = [r for r in [*folder.records_of(run)] if r["kind"] == "epoch"]
    assert epochs[1]["test"]["loss"] < 0.9 * epochs[0]["test"]["loss"]
    judged = runs.evaluate_run(run)
    assert judged.evaluation.loss == pytest.approx(epochs[1]["test"]["loss"], rel=1e-6)
    costs = torch.ones(10, 10).double().fill_diagonal_(0.0)
    costs[4] *= 3
    y = sample.test.labels
    counts = torch.tensor(long_tail(400, 4)).double()
    told = Told(judged.evaluation.logits.double(), y, counts, costs[y])
    expected = (torch.where(y == 9, 2.0, 1.0) * reference(told)).mean()
    assert judged.evaluation.loss == pytest.approx(float(expected), rel=2e-6)


def test_the_table_of_references_has_every_loss_of_counts_or_costs():
    taking = {
        name
        for name, loss in LOSSES.items()
        if training_options(loss) & {"class_counts", "class_prior", "cost_matrix"}
    }
    assert taking == set(REFERENCES)


def training_options(loss):
    losses = getattr(loss, "losses", (loss,))
    return {name for part in losses for name in inspect.signature(part).parameters}


MATRIX = {t: {d: float(3 * (t < d) + (t > d)) for d in "0123456789"} for t in "0123456789"}
RESUMED = {
    "costs": {"loss": "cross_entropy_with_cost", "loss_option": {"price": 2}, "imbalance": 5}
    | {"cost_matrix": MATRIX},
    "oversampled": {"oversample": 0.7, "imbalance": 20, "batch_size": 40},
    "counts": {"loss": "vector_scaling", "loss_option": {"tau": 0.5}, "imbalance": 20},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", RESUMED.values(), ids=RESUMED.keys())
def test_a_run_with_costs_goes_on_to_the_same_bits(tmp_path, options):
    made = make_config(TINY, {"audit_every": 3, "batch_size": 50}, options)
    whole = train(made, tmp_path / "whole").folder
    part = train(made, tmp_path / "part", should_stop=StopAt(9))
    assert not part.finished
    assert resume(tmp_path / "part").finished
    for file in (folder.CHECKPOINT, folder.MODEL):
        a, b = (runs.load_tensors(run / file) for run in (whole, tmp_path / "part"))
        assert a[0].keys() == b[0].keys()
        assert all(torch.equal(a[0][name], b[0][name]) for name in a[0])
        assert a[1].get("class_counts") == b[1].get("class_counts")
    shares = [[r["share"] for r in [*folder.records_of(run)] if r["kind"] == "audit"]
              for run in (whole, tmp_path / "part")]  # fmt: skip
    assert shares[0]
    assert shares[0] == shares[1]


def write_matrix(path, matrix):
    columns = list(next(iter(matrix.values())))
    lines = [["true\\decided", *columns]]
    lines += [[truth, *(str(row[d]) for d in columns)] for truth, row in matrix.items()]
    path.write_text("\n".join(map(",".join, lines)) + "\n")
    return path


def test_a_cost_matrix_reaches_the_setup_from_the_command_and_from_the_run(run_cli, tmp_path):
    # Rows and columns in another order than the classes, and a decision that is no class.
    shuffled = {t: {"abstain": 0.5} | {d: MATRIX[t][d] for d in "9876543210"} for t in "1032547698"}
    args = [*QUICK, "--cost-matrix", write_matrix(tmp_path / "costs.csv", shuffled)]
    args += ["--prior", "9=0.01", "--run-dir", tmp_path / "run"]
    code, _, err = run_cli(*args, program=shell.main_train)
    assert code == 0, err
    written = read_toml(tmp_path / "run" / "config.toml")
    assert written["cost_matrix"] == shuffled
    assert list(written["cost_matrix"]["1"]) == list(shuffled["1"])
    config = folder.read_config(tmp_path / "run")
    assert config == make_config(written)
    costs = make_setup(config).costs
    assert costs.decisions == (*"0123456789", "abstain")
    expected = [[*(MATRIX[t][d] for d in "0123456789"), 0.5] for t in "0123456789"]
    assert costs.matrix.tolist() == expected
    assert config.prior == {"9": 0.01}


def test_single_costs_reach_training_evaluation_and_a_sweep(run_cli, tmp_path, sample):
    args = [*QUICK, "--loss", "expected_cost", "--class-cost", "9=2", "--cost", "9,4=20"]
    args += ["--cost", "0,0=-1"]
    code, _, err = run_cli(*args, "--run-dir", tmp_path / "run", program=shell.main_train)
    assert code == 0, err
    matrix = torch.ones(10, 10).double().fill_diagonal_(0.0)
    matrix[9, :9], matrix[9, 4], matrix[0, 0] = 2.0, 20.0, -1.0
    judged = runs.evaluate_run(tmp_path / "run").evaluation
    assert torch.equal(judged.rule.costs.matrix, matrix)
    expected = (matrix[sample.test.labels] * judged.logits.double().softmax(1)).sum(1).mean()
    assert judged.loss == pytest.approx(float(expected), rel=1e-5)
    told = json.loads((tmp_path / "run" / "summary.json").read_text())["costs"]
    assert "calling a true 9 a 4 costs 20" in told
    code, out, err = run_cli("evaluate", tmp_path / "run", "--cost", "3,8=7")
    assert code == 0, err
    assert out.startswith("cost: calling a true 3 a 8 costs 7\ncost: every other mistake costs 1")
    own = sweep.sweep(
        sweep.SweepSpec(make_config(TINY, {"cost": {"9,4": 20}, "audit_every": 0}),
                        [sweep.Axis("class_weight", "9", (1.0, 2.0))]),
        tmp_path / "sweep",
    )  # fmt: skip
    assert own.summary["costs"] == [
        "calling a true 9 a 4 costs 20", "every other mistake costs 1, a right decision 0",
    ]  # fmt: skip


def test_every_new_option_survives_the_file_of_a_run(tmp_path):
    given = {
        "imbalance": 7.5,
        "learning_rate": 0.01,
        "loss_option": {"gamma": 0.5},
        "cost_matrix": MATRIX,
        "cost": {"9,4": 20.0, 'a="b",c': -1.5},
        "prior": {"T-shirt/top": 0.25, "a \"name\" = 'x'": 0.5},
        "floor": {"9": 0.99, "a.b": 0.5},
        "ceiling": {"9:4": 0.01},
        "floor_every": 12,
    }
    resolved = {"dataset": "mnist-sample", "model": "linear", "device": "cpu", "batch_size": 8}
    made = make_config(resolved | {"epochs": 1}, given, {"class_cost": {"9": 2}})
    assert {name: getattr(made, name) for name in given} == given
    folder.write_config(tmp_path / folder.CONFIG, made, run={"command": "x"})
    assert folder.read_config(tmp_path) == made


def test_names_and_indices_of_classes_are_one(data_dir):
    options = {"dataset": "fashion-mnist", "data_dir": str(data_dir)}
    options |= {"class_cost": {"Shirt": 3, "9": 2}, "prior": {"0": 0.5, "Shirt": 0.1}}
    setup = make_setup(make_config(TINY, options))
    assert setup.config.class_cost == {"Shirt": 3.0, "Ankle boot": 2.0}
    assert setup.config.prior == {"T-shirt/top": 0.5, "Shirt": 0.1}
    assert setup.costs.matrix.sum(1).tolist() == [9.0] * 6 + [27.0, 9.0, 9.0, 18.0]


# What is refused, in one line.

EVERY_PRIOR = [x for c in range(10) for x in ("--prior", f"{c}=0.09")]
REFUSED = [
    (["--loss-option", "gamma"], "loss_option must be NAME=NUMBER, as in gamma=2; got 'gamma'"),
    (["--loss-option", "gamma=x"], "loss_option: 'x' is not a number"),
    (["--loss-option", "gamma=nan"], "loss_option gamma must be finite"),
    (["--loss-option", "a=1", "--loss-option", "a=2"], "loss_option: name 'a' is given twice"),
    (["--loss-option", "gamma=2"],
     "loss_option: cross_entropy has no option 'gamma'; it has label_smoothing"),
    (["--loss", "softmax_focal", "--loss-option", "gama=2"],
     "softmax_focal has no option 'gama' (did you mean 'gamma'?); it has gamma"),
    (["--loss", "earth_mover", "--loss-option", "p=2"], "it has none that is a number"),
    (["--loss", "softmax_focal", "--loss-option", "gamma=-1"],
     "loss_option: softmax_focal: gamma must be in [0, inf), got -1.0"),
    (["--loss", "bi_tempered", "--loss-option", "t1=3"], "loss_option: bi_tempered: t1 must be"),
    (["--loss", "bi_tempered", "--loss-option", "iterations=9"], "has no option 'iterations'"),
    (["--loss", "multi_margin", "--loss-option", "p=2"], "multi_margin has no option 'p'"),
    (["--loss", "multi_margin", "--loss-option", "class_weights=2"], "no option 'class_weights'"),
    (["--loss", "ldam", "--loss-option", "class_counts=2"], "no option 'class_counts'"),
    (["--loss", "equalization"], "loss equalization needs the loss_option threshold=NUMBER"),
    (["--loss", "equalization", "--loss-option", "threshold=2"], "threshold must be in [0, 1]"),
    (["--loss", "cross_entropy_with_cost"], "needs the loss_option price=NUMBER"),
    (["--loss", "softmax_focal", "--loss-option", "gamma=1e300"], "gamma must fit float32"),
    (["--loss", "expected_cost", "--class-cost", "9=1e300"], "beyond 1e+15"),
    (["--class-weight", "balanced:0"], "with a power above 0 and at most 10; got 'balanced:0'"),
    (["--class-weight", "balanced:x"], "with a power above 0 and at most 10; got 'balanced:x'"),
    (["--class-weight", "balance"], "class_weight must be CLASS=WEIGHT, as in 9=5; got 'balance'"),
    (["--class-weight", "balanced", "--class-weight", "9=5"],
     "class_weight balanced sets the weight of every class: give nothing else, got balanced, 9=5"),
    (["--class-cost", "9"], "class_cost must be CLASS=COST, as in 9=5; got '9'"),
    (["--class-cost", "ten=5"], "class_cost: no class 'ten'; the classes are 0, 1, 2"),
    (["--class-cost", "9=-5"], "class_cost 9 must be at least 0"),
    (["--class-cost", "9=5", "--cost-matrix", "costs.csv"], "two forms of the same: give one"),
    (["--cost-matrix", "none.csv"], "cannot read none.csv: No such file"),
    (["--cost-matrix", "small.csv"], "cost_matrix has no row for class 2, 3, 4, 5, 6"),
    (["--loss", "expected_cost", "--cost-matrix", "abstain.csv"],
     "loss expected_cost needs a square cost_matrix: the model has a logit a class, and none for "
     "abstain"),
    (["--cost", "9,4"], "cost must be TRUE,DECIDED=COST, as in 9,4=20; got '9,4'"),
    (["--cost", "9,4=x"], "cost names 'x', which is no number, and the cost of each example comes"),
    (["--cost", "9,4=inf"], "cost 9,4 must be finite"),
    (["--cost", "9,4=1", "--cost", "9,4=2"], "cost: true,decided '9,4' is given twice"),
    (["--cost", "9,ten=1"], "cost '9,ten': no decision 'ten'; the decisions are 0, 1, 2"),
    (["--prior", "9=2"], "prior 9 must be at least 0 and at most 1, got 2"),
    (["--prior", "9"], "prior must be CLASS=PART, as in 9=0.01; got '9'"),
    (["--prior", "ten=0.5"], "prior: no class 'ten'"),
    (["--prior", "9=0.6", "--prior", "8=0.5"], "must not add up to more than 1, got 1.1"),
    (EVERY_PRIOR, "prior: the parts of all classes must add up to 1, got 0.9"),
    (["--floor", "9"], "floor must be CLASS=RECALL, as in 9=0.99; got '9'"),
    (["--floor", "9=inf"], "floor 9 must be finite"),
    (["--ceiling", "0.1"], "ceiling must be TRUE:DECIDED=RATE, as in 9:4=0.01; got '0.1'"),
    (["--floor-every", "-1"], "floor_every must be at least 0"),
    (["--imbalance", "0.5"], "imbalance must be at least 1, got 0.5"),
    (["--imbalance", "inf"], "imbalance must be finite"),
    (["--imbalance", "1e9", "--batch-size", "4000"], "batch_size 4000 is more than the"),
    (["--resume", "x", "--cost-matrix", "costs.csv"], "--cost-matrix, --epochs"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), REFUSED, ids=[" ".join(a)[:60] for a, _ in REFUSED])
def test_a_bad_request_is_one_line_and_leaves_nothing(run_cli, tmp_path, monkeypatch, args,
                                                      message):  # fmt: skip
    write_matrix(tmp_path / "costs.csv", MATRIX)
    write_matrix(tmp_path / "small.csv", {t: {d: 1.0 for d in "01"} for t in "01"})
    write_matrix(tmp_path / "abstain.csv", {t: row | {"abstain": 0.5} for t, row in MATRIX.items()})
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(*QUICK, *args, program=shell.main_train)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_help_says_how_each_option_is_written():
    result = typer.testing.CliRunner().invoke(shell.train_app, ["--help"], env={"COLUMNS": "200"})
    for metavar in (
        *("NAME=NUMBER", "CLASS=WEIGHT", "CLASS=COST", "TRUE,DECIDED=COST", "CLASS=PART"),
        *("CLASS=RECALL", "TRUE:DECIDED=RATE", "FILE", "NUMBER,..."),
    ):
        assert metavar in result.output


# From options to tensors.


@pytest.mark.parametrize("loss", ["balanced_softmax", "logit_adjusted", "equalization"])
def test_a_class_without_training_examples_is_refused_by_losses_that_count(loss):
    config = make_config({"loss": loss, "loss_option": NEEDED.get(loss, {})})
    with pytest.raises(ConfigError, match=f"loss {loss} needs .* of b there are none"):
        make_hyper(config, make_costs("abc"), torch.tensor([3, 0, 2]), "cpu")
    plain = make_hyper(make_config(), make_costs("abc"), torch.tensor([3, 0, 2]), "cpu")
    assert list(plain) == ["learning_rate"]


def test_hyper_holds_what_the_loss_takes_and_nothing_else():
    counts = torch.tensor([6, 3, 1])
    made = {
        loss: make_hyper(make_config(options | {"loss": loss}), costs, counts, "cpu")
        for loss, costs, options in (
            ("logit_adjusted", make_costs("abc"), {"loss_option": {"tau": 2}}),
            ("ldam", make_costs("abc"), {"class_weight": {"b": 4}}),
            ("cost_hinge", make_costs("abc", class_cost={"b": 4.0}), {}),
        )
    }
    assert [sorted(hyper) for hyper in made.values()] == [
        ["class_prior", "learning_rate", "tau"],
        ["class_counts", "class_weights", "learning_rate"],
        ["cost_matrix", "learning_rate"],
    ]
    every = [value for hyper in made.values() for value in hyper.values()]
    assert {value.dtype for value in every} == {torch.float32}
    assert_close(made["logit_adjusted"]["class_prior"], torch.tensor([0.6, 0.3, 0.1]))
    assert made["logit_adjusted"]["tau"].shape == ()
    assert made["ldam"]["class_counts"].tolist() == [6.0, 3.0, 1.0]
    assert made["ldam"]["class_weights"].tolist() == [1.0, 4.0, 1.0]
    assert made["cost_hinge"]["cost_matrix"].tolist() == [[0, 1, 1], [4, 0, 4], [1, 1, 0]]


NUMBERS = {
    "cross_entropy": {"label_smoothing": False},
    "nll": {},
    "softmax_focal": {"gamma": False, "alpha": False},
    "bi_tempered": {"t1": False, "t2": False, "label_smoothing": False},
    "multi_margin": {"margin": False},
    "ldam": {"max_margin": False, "scale": False},
    "equalization": {"threshold": True},
    "expected_cost": {},
    "cross_entropy_with_cost": {"label_smoothing": False, "price": True},
}


@pytest.mark.parametrize(("loss", "numbers"), NUMBERS.items(), ids=NUMBERS.keys())
def test_the_numbers_among_the_options_of_a_loss_are_known(loss, numbers):
    assert number_options(LOSSES[loss]) == numbers


OWN_NUMBERS = [
    (class_weighted(losses.softmax_focal), {"gamma": False, "alpha": False}),
    (scaled(losses.equalization, "by"), {"threshold": True, "by": True}),
    (mixup(losses.poly1), {"epsilon": False, "mix": True}),
    (functools.partial(losses.equalization, threshold=0.1), {"threshold": False}),
    (functools.partial(scaled(losses.poly1, "by"), by=2.0), {"epsilon": False, "by": False}),
    (custom_vjp(lambda z, y: z.sum(-1), lambda z, y: torch.ones_like(z)), {}),
]


@pytest.mark.parametrize(("loss", "numbers"), OWN_NUMBERS)
def test_the_numbers_of_what_is_made_of_losses_are_known(loss, numbers):
    assert number_options(loss) == numbers


@pytest.mark.parametrize("loss", LOSSES)
def test_every_number_is_the_same_as_a_tensor(loss):
    """What a run gives as a tensor does what the number does where a function is called."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 10, generator=generator)
    batch = Batch(logits, torch.arange(40) % 10)
    parameters = inspect.signature(LOSSES[loss]).parameters
    for name in number_options(LOSSES[loss]):
        needed = NEEDED.get(loss, {})
        value = 0.3 + parameters[name].default if loss == "ldam" else needed.get(name, 0.25)
        value = {"t1": 0.5, "t2": 1.5, "log_zero": -3.0}.get(name, value)
        config = make_config({"loss": loss, "loss_option": needed | {name: value}})
        counts = torch.arange(1, 11) ** 2
        hyper = make_hyper(config, make_costs("0123456789"), counts, "cpu")
        as_numbers = {k: v for k, v in hyper.items() if k not in config.loss_option}
        del as_numbers["learning_rate"]
        expected = LOSSES[loss](logits, batch.targets, **as_numbers, **config.loss_option).mean()
        assert_close(make_criterion(loss)(logits, batch, hyper), expected)


# Balanced class weights.

BALANCED = [("balanced", 1.0), ("balanced:0.5", 0.5), ("balanced:2", 2.0)]


@pytest.mark.parametrize(("text", "power"), BALANCED)
def test_balanced_weights_are_those_of_sklearn_to_a_power(tmp_path, text, power):
    made = make_config(TINY, {"class_weight": text, "imbalance": 20})
    setup = make_setup(made)
    labels = setup.dataset.train.labels.numpy()
    theirs = compute_class_weight("balanced", classes=np.arange(10), y=labels) ** power
    assert_close(setup.hyper["class_weights"], torch.tensor(theirs).float())
    assert list(setup.config.class_weight) == list("0123456789")
    assert setup.config.balance == 0.0
    assert setup.notes[0].startswith(f"balanced class weights: 0={theirs[0]:.4g}, 1=")
    folder.write_config(tmp_path / folder.CONFIG, setup.config, run={})
    assert folder.read_config(tmp_path) == setup.config
    again = make_setup(setup.config)
    assert torch.equal(again.hyper["class_weights"], setup.hyper["class_weights"])
    assert not any("balanced" in note for note in again.notes)


def test_the_command_line_a_file_and_python_ask_for_balanced_weights_alike(run_cli, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('class_weight = "balanced:0.5"\nreduction = "weighted_mean"\n')
    args = [*QUICK[:-1], "--imbalance", "5"]
    code, out, _ = run_cli(*args, "--class-weight", "balanced:0.5", "--run-dir", tmp_path / "a",
                           program=shell.main_train)  # fmt: skip
    assert code == 0
    assert "balanced class weights: 0=0.7" in out
    code, _, _ = run_cli(*args, "--config", file, "--run-dir", tmp_path / "b",
                         program=shell.main_train)  # fmt: skip
    assert code == 0
    python = make_setup(make_config(TINY, {"class_weight": "balanced:0.5", "imbalance": 5}))
    for run in ("a", "b"):
        assert folder.read_config(tmp_path / run).class_weight == python.config.class_weight
    later = make_config({"class_weight": "balanced"}, {"class_weight": {"9": 5}})
    assert (later.balance, later.class_weight) == (0.0, {"9": 5.0})


def test_a_sweep_over_one_class_keeps_the_balanced_weights_of_the_others(run_cli, tmp_path):
    args = ["sweep", *QUICK[:-1], "--imbalance", "5", "--class-weight", "balanced"]
    args += ["--class-weight", "9=1:4:3", "--out", tmp_path / "s"]
    code, _, err = run_cli(*args)
    assert code == 0, err
    own = read_toml(tmp_path / "s" / "sweep.toml")["class_weight"]
    python = make_setup(make_config(TINY, {"class_weight": "balanced", "imbalance": 5})).config
    assert {**python.class_weight, "9": 1.0} == own
    chosen = folder.read_config(tmp_path / "s" / "chosen").class_weight
    assert chosen in ({}, *({**own, "9": w} for w in (1.0, 2.5, 4.0)))


def test_balanced_weights_need_an_example_of_every_class():
    config = make_config({"class_weight": "balanced"})
    counts = torch.tensor([6, 0, 2])
    with pytest.raises(ConfigError, match="needs training examples of every class; of b there are"):
        balanced_weights(config, ("a", "b", "c"), counts)
    weighed = dataclasses.replace(config, class_weight={"b": 7.0})
    found = balanced_weights(weighed, ("a", "b", "c"), counts)
    assert found == pytest.approx({"a": 8 / 18, "c": 8 / 6})


def test_a_class_called_balanced_has_a_weight_of_its_own(tmp_path, run_cli):
    rows = ["x,y", *(f"{i},{'balanced' if i % 3 else 'other'}" for i in range(60))]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    args = ["--dataset", tmp_path / "rows.csv", "--target", "y", "--epochs", "0", "--quiet"]
    args += ["--batch-size", "8", "--compile", "off"]
    for text, expected in (("balanced=3", {"balanced": 3.0}), ("balanced", None)):
        run = tmp_path / text
        code, _, err = run_cli(*args, "--class-weight", text, "--run-dir", run,
                               program=shell.main_train)  # fmt: skip
        assert code == 0, err
        found = folder.read_config(run).class_weight
        assert found == (expected or {"balanced": 0.75, "other": 1.5})


# The long tail, and who sees it.


def test_a_run_is_evaluated_and_audited_on_the_tail_that_it_was_trained_on(tmp_path, data_dir):
    options = {"imbalance": 10, "loss": "balanced_softmax", "data_dir": str(data_dir)}
    run = train(make_config(TINY, options), tmp_path / "run").folder
    counts = long_tail(400, 10)
    loaded = runs.load(run)
    assert loaded.class_counts.dtype == torch.float32
    assert loaded.class_counts.tolist() == counts
    for asked, expected in (
        (EvaluateOptions(split="train"), counts),
        (EvaluateOptions(dataset="mnist-sample", split="train"), counts),
        (EvaluateOptions(split="validation"), [50] * 10),
    ):
        found = runs.evaluate_run(run, asked).evaluation
        assert found.labels.bincount().tolist() == expected
    elsewhere = runs.evaluate_run(run, EvaluateOptions(dataset="mnist", split="train"))
    assert len(elsewhere.evaluation.labels) == 54_000
    told = elsewhere.evaluation.logits.double() + torch.tensor(counts).double().log()
    expected = float(F.cross_entropy(told, elsewhere.evaluation.labels))
    assert elsewhere.evaluation.loss == pytest.approx(expected, rel=2e-6)
    assert audits.audit_run(run, AuditOptions(examples=5000)).audit.count.tolist() == counts


def test_an_oversampled_run_repeats_rarer_classes_and_is_judged_by_the_data(run_cli, tmp_path):
    args = [*QUICK[:-1], "--imbalance", "20", "--oversample", "0.5", "--batch-size", "40"]
    run, counts = tmp_path / "run", torch.tensor(long_tail(400, 20))
    code, out, _ = run_cli(*args, "--run-dir", run, program=shell.main_train)
    assert code == 0
    draws = (counts * (400 / counts) ** 0.5).round().long()
    assert f"oversampling: an epoch is {draws.sum():,} draws of {counts.sum():,} examples" in out
    assert folder.read_summary(run)["steps"] == int(draws.sum()) // 40
    setup = make_setup(folder.read_config(run))
    order = setup.order(setup.state.key, 0)
    assert setup.dataset.train.labels[order].bincount().tolist() == draws.tolist()
    assert setup.counts.tolist() == counts.tolist()
    judged = runs.evaluate_run(run).evaluation
    # Validation data has as many of each class, the draws are the prior that was learnt.
    expected = -(draws / draws.sum()).double().log()
    shift = judged.rule.log_shift
    assert_close(shift - shift.mean(), expected - expected.mean())
    found = audits.audit_run(run, AuditOptions(examples=400))
    assert any("repeated in training" in note for note in found.audit.notes)


def test_a_trial_of_an_oversampled_sweep_trains_as_it_would_alone(tmp_path):
    options = {"oversample": 1, "imbalance": 10, "audit_every": 0}
    axes = [sweep.Axis("class_weight", "9", (1.0, 3.0))]
    made = sweep.sweep(sweep.SweepSpec(make_config(TINY, options), axes), tmp_path / "s")
    assert made.summary["steps"] == 400 * 10 // 128
    config = folder.read_config(made.run_dir)
    alone = train(config, tmp_path / "alone").folder
    together = runs.load_tensors(made.run_dir / folder.MODEL)[0]
    for name, tensor in runs.load_tensors(alone / folder.MODEL)[0].items():
        assert_close(tensor, together[name], atol=1e-4, rtol=1e-3)


AUDITED = {
    "balanced_softmax": set(),
    "logit_adjusted": {"tau"},
    "equalization": {"threshold"},
    "softmax_margin": {"cost_matrix"},
    "cross_entropy_with_cost": {"cost_matrix", "price"},
}


@pytest.mark.parametrize(("loss", "elastic"), AUDITED.items(), ids=AUDITED.keys())
def test_a_run_with_costs_is_audited_by_the_options_that_one_sets(
    run_cli, tmp_path, monkeypatch, loss, elastic
):
    monkeypatch.setattr("funcloss.app.audits.draw_all", lambda *found: {})  # the figures are slow
    options = {"logit_adjusted": {"tau": 1.5}} | NEEDED
    made = {"loss": loss, "loss_option": options.get(loss, {}), "class_cost": {"9": 5}}
    config = make_config(TINY, made, {"imbalance": 3, "class_weight": {"8": 2}, "audit_every": 10})
    run = train(config, tmp_path / "run").folder
    records = [r for r in [*folder.records_of(run)] if r["kind"] == "audit"]
    assert records
    for step in {r["step"] for r in records}:
        shares = [r["share"] for r in records if r["step"] == step]
        assert sum(shares) == pytest.approx(1.0, abs=1e-6)
    code, _, err = run_cli("audit", run, "--examples", 500, "--quiet")
    assert (code, err) == (0, "")
    found = audits.audit_run(run, AuditOptions(examples=500)).audit
    assert set(found.elasticities) == elastic
    if "price" in elastic:
        # The price multiplies the costs, and nothing else does: Euler's theorem.
        of_costs = found.elasticities["cost_matrix"].sum()
        assert_close(found.elasticities["price"], of_costs, rtol=1e-4, atol=1e-6)
    told = json.loads((run / "audit.json").read_text())
    assert "class_counts" not in json.dumps(told)


def test_a_saved_model_is_audited_under_costs(tmp_path):
    config = make_config(TINY, {"loss": "expected_cost", "class_cost": {"9": 5}})
    setup = make_setup(config)
    runs.save_tensors(tmp_path / "m.safetensors", setup.state.params, {})
    found = audits.audit_checkpoint(
        tmp_path / "m.safetensors", config, AuditOptions(examples=300)
    ).audit
    batch = data.get_batch(setup.dataset, setup.dataset.train, torch.arange(4000))
    assert found.count.sum() == 300
    logits = batch.inputs.flatten(1) @ setup.state.params["fc.weight"].T
    p = (logits + setup.state.params["fc.bias"]).softmax(1)
    nines = 5 * (1 - p[batch.targets == 9, 9]).mean()
    assert float(found.loss[9]) == pytest.approx(float(nines), rel=0.05)  # 30 of them, of 400
