"""What a run's decisions cost: from its loss, counts and priors to what ``evaluate`` prints."""

import csv
import dataclasses
import itertools
import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten

from funcloss.app import registry, runs
from funcloss.app.config import make_config
from funcloss.app.data import normalised
from funcloss.app.options import EvaluateOptions
from funcloss.app.runs.evaluation import (
    calibrated,
    deployment_prior,
    implied_prior,
    logit_scale,
    record_of,
    rescored,
)
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.options import check_loss_options, make_criterion, make_hyper
from funcloss.app.runs.rules import rule_caveat, rule_fits
from funcloss.app.train import train
from funcloss.decisions import (
    DecisionRule,
    fit_temperature,
    log_posterior,
    make_costs,
    posterior_shift,
    score,
)
from funcloss.errors import ConfigError
from funcloss.keys import make_key
from funcloss.training import oversampled_order
from funcloss.typing import Batch

ABC = ("a", "b", "c")
COUNTS = torch.tensor([600.0, 300.0, 100.0])
WEIGHTS = torch.tensor([1.0, 2.0, 5.0])

LOSSES = [
    ({}, None, lambda n, w: n),
    ({}, WEIGHTS, lambda n, w: n * w),
    ({"loss": "balanced_softmax"}, None, lambda n, w: n**0),
    ({"loss": "balanced_softmax"}, WEIGHTS, lambda n, w: w),
    ({"loss": "logit_adjusted"}, None, lambda n, w: n**0),
    ({"loss": "logit_adjusted", "loss_option": {"tau": 0.5}}, None, lambda n, w: n**0.5),
    ({"loss": "logit_adjusted", "loss_option": {"tau": 0.0}}, WEIGHTS, lambda n, w: n * w),
    ({"loss": "logit_adjusted", "loss_option": {"tau": 2.0}}, WEIGHTS, lambda n, w: w / n),
    (
        {"loss": "class_balanced", "loss_option": {"beta": 0.99}},
        WEIGHTS,
        lambda n, w: n * w / (1 - 0.99**n),
    ),
    (
        {"loss": "vector_scaling", "loss_option": {"gamma": 0.3, "tau": 0.5}},
        WEIGHTS,
        lambda n, w: n**0.5 * w,
    ),
]
NAMED = [
    "cross_entropy", "weighted", "balanced_softmax", "balanced_softmax weighted",
    "logit_adjusted", "tau 0.5", "tau 0 weighted", "tau 2 weighted",
    "class_balanced weighted",
    "vector_scaling weighted",
]  # fmt: skip


@pytest.mark.parametrize(("options", "weights", "by_hand"), LOSSES, ids=NAMED)
def test_the_implied_prior_is_what_the_loss_is_least_at(options, weights, by_hand):
    """A model that sees nothing learns the prior: minimise over one vector of logits."""
    config = make_config(options)
    n, w = COUNTS.double().numpy(), (torch.ones(3) if weights is None else weights).double().numpy()
    expected = by_hand(n, w) / by_hand(n, w).sum()
    found = implied_prior(config, COUNTS, weights)
    assert_close(found, torch.from_numpy(expected))

    hyper = make_hyper(config, make_costs(ABC), COUNTS, "cpu")
    if weights is not None:
        hyper["class_weights"] = weights
    hyper = {name: value.double() for name, value in hyper.items()}
    criterion = make_criterion(config.loss, "mean", weighted=weights is not None)
    labels = torch.arange(3).repeat_interleave((COUNTS / 100).long())
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    batch = Batch(inputs=labels, targets=labels)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        loss = criterion(logits.expand(len(labels), 3), batch, hyper)
        loss.backward()
        return loss

    optimizer.step(closure)
    scores = logits.detach() * logit_scale(config, COUNTS)
    assert_close(scores.softmax(-1), found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("power", [0.25, 0.5, 1.0])
def test_oversampling_implies_the_prior_of_balanced_weights_to_its_power(power):
    weights = (COUNTS.sum() / (3 * COUNTS)) ** power
    sampled = implied_prior(make_config({"oversample": power}), COUNTS, None)
    weighed = implied_prior(make_config(), COUNTS, weights)
    assert_close(sampled, weighed, atol=2e-3, rtol=0)  # draws are whole numbers
    losses = {"loss": "logit_adjusted", "loss_option": {"tau": 0.5}}
    both = implied_prior(make_config(losses, {"oversample": power}), COUNTS, None)
    assert_close(both, implied_prior(make_config(losses), COUNTS, weights), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("power", "tolerance"), [(1.0, 1e-12), (0.7, 0.01)])
def test_what_an_oversampled_training_learns_is_corrected_to_the_data_as_it_is(power, tolerance):
    """Eight kinds of inputs; a model that is perfect has their class frequencies in an epoch."""
    counts = torch.tensor([240, 120, 40])
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(counts)
    kinds = (labels + torch.randint(0, 6, labels.shape, generator=generator)) % 8

    def frequencies(order):
        pairs = (kinds[order] * 3 + labels[order]).bincount(minlength=24).reshape(8, 3)
        return pairs.double()

    # Whole multiples at 1, so that one epoch is enough; else the mean over many.
    epochs = 1 if power == 1.0 else 100
    orders = [oversampled_order(make_key(0), e, labels, power) for e in range(epochs)]
    learnt = sum(map(frequencies, orders)).log()
    implied = implied_prior(make_config({"oversample": power}), counts, None)
    shift = posterior_shift(prior=counts.double() / counts.sum(), train_prior=implied)
    plain = frequencies(torch.arange(len(labels)))
    found = log_posterior(learnt, log_shift=shift).exp()
    assert_close(found, plain / plain.sum(1, keepdim=True), atol=tolerance, rtol=0)
    assert (learnt.softmax(1) - found).abs().max() > 0.05


@pytest.mark.parametrize(
    ("counts", "weights", "parts"),
    [
        ([6.0, 0.0, 2.0], None, [6, 2, 2]),  # never seen: as rare as the rarest
        ([6.0, 3.0, 1.0], [1.0, 0.0, 9.0], [6, 6, 9]),  # at weight 0
        ([6.0, 3.0, 1.0], [0.0, 0.0, 0.0], [1, 1, 1]),
    ],
)
def test_a_class_that_was_never_learnt_has_the_least_of_the_others(counts, weights, parts):
    weights = None if weights is None else torch.tensor(weights)
    found = implied_prior(make_config(), torch.tensor(counts), weights)
    parts = torch.tensor(parts, dtype=torch.float64)
    assert_close(found, parts / parts.sum())


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"a": 0.2}, [0.2, 0.8 * 10 / 30, 0.8 * 20 / 30]),
        ({"a": 0.2, "b": 0.5, "c": 0.3}, [0.2, 0.5, 0.3]),
        ({"a": 0.0}, [0.0, 1 / 3, 2 / 3]),
        ({"a": 0.25, "c": 0.75}, [0.25, 0.0, 0.75]),
        ({"b": 1.0}, [0.0, 1.0, 0.0]),
    ],
)
def test_a_prior_leaves_the_rest_to_the_others_as_they_occur(given, parts):
    found = deployment_prior(make_config({"prior": given}), ABC, torch.tensor([70, 10, 20]))
    assert_close(found, torch.tensor(parts, dtype=torch.float64))
    assert deployment_prior(make_config(), ABC, torch.tensor([70, 10, 20])) is None


# Judged, against numpy.


def judged(parts, config, costs, weights=None):
    """Evaluations of a model that gives these logits, by the rule that is fitted to them."""
    model = TrainedModel(
        model=None, forward=None, params={}, buffers={}, class_weights=weights, config=config,
        classes=costs.classes, class_counts=COUNTS, mean=None, std=None, input_shape=(3,),
        columns=(), images=False, dtype="float32", data="", calibration=None,
    )  # fmt: skip
    table = dict(zip(costs.classes, costs.matrix.tolist(), strict=True))
    table = {t: dict(zip(costs.decisions, row, strict=True)) for t, row in table.items()}
    model = dataclasses.replace(model, config=dataclasses.replace(config, cost_matrix=table))
    rule = DecisionRule(costs)
    found = {name: score(*part, rule) for name, part in parts.items()}
    return rescored(calibrated(model, found.get("validation"), cut=False), found)


def drawn(seed, counts):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    logits = torch.randn(len(labels), 3, generator=g) + 1.5 * torch.eye(3)[labels]
    return logits * 2.5, labels  # too sure of itself


COSTS = make_costs(
    ABC,
    {
        "a": {"a": 0, "b": 1, "c": 2, "ask": 0.4},
        "b": {"a": 3, "b": 0, "c": 1, "ask": 0.4},
        "c": {"a": 9, "b": 6, "c": 0, "ask": 0.4},
    },
)
TABLE = np.array([[0, 1, 2, 0.4], [3, 0, 1, 0.4], [9, 6, 0, 0.4]])


def softmax(scores):
    e = np.exp(scores - scores.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def temperature_by_grid(logits, labels, shift):
    """The likeliest temperature over a grid, finer and finer; its logarithm is normal, with 0.5."""
    low, high = math.log(0.05), math.log(20.0)
    for _ in range(12):
        grid = np.linspace(low, high, 21)
        losses = [
            -np.log(softmax(logits / math.exp(t) + shift)[np.arange(len(labels)), labels]).mean()
            + t**2 / (2 * 0.5**2 * len(labels))
            for t in grid
        ]
        best = int(np.argmin(losses))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 20)]
    return math.exp((low + high) / 2)


def expected_by_hand(given, support):
    """Deployment prior where ``given`` names some parts."""
    left = 1.0 - sum(given.values())
    others = sum(s for c, s in zip(ABC, support, strict=True) if c not in given)
    rest = {c: left * s / others if others else 0.0 for c, s in zip(ABC, support, strict=True)}
    return np.array([given.get(c, rest[c]) for c in ABC])


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"c": 0.05}, {"a": 0.2, "b": 0.5, "c": 0.3}],
                         ids=["no prior", "a part", "all"])  # fmt: skip
@pytest.mark.parametrize(("options", "weights", "by_hand"), LOSSES, ids=NAMED)
def test_parts_are_judged_as_by_hand(options, weights, by_hand, given):
    held_out, tested = drawn(0, [960, 800, 640]), drawn(1, [150, 90, 60])
    by_split = judged(
        {"validation": held_out, "test": tested},
        make_config(options, {"prior": given}),
        COSTS,
        weights,
    )
    n, w = COUNTS.double().numpy(), (torch.ones(3) if weights is None else weights).double().numpy()
    implied = by_hand(n, w) / by_hand(n, w).sum()
    support = np.array([120, 100, 80]) / 300
    gamma = options.get("loss_option", {}).get("gamma", 0.0)
    factors = (n / n.max()) ** gamma  # of the logits, in vector scaling
    val_logits, val_labels = held_out[0].double().numpy() * factors, held_out[1].numpy()
    temperature = temperature_by_grid(val_logits, val_labels, np.log(support / implied))
    # Decisions know the validation data alone; the scores weigh each class as the prior has it.
    expected = expected_by_hand(given, support) if given else support
    for name, (logits, labels) in (("validation", held_out), ("test", tested)):
        found, y = by_split[name], labels.numpy()
        # One that is near 1 does not lower the error, and is not applied.
        applied = temperature if temperature > 1.05 else 1.0
        assert found.rule.temperature == pytest.approx(applied, rel=1e-4)
        scores = logits.double().numpy() * factors / found.rule.temperature
        scores = scores + np.log(expected / implied)
        decisions = (softmax(scores) @ TABLE).argmin(1)
        assert found.min_cost.decisions.tolist() == decisions.tolist()
        counted = np.bincount(y, minlength=3)
        prior = expected_by_hand(given, counted) if given else counted / len(y)
        example = (prior / counted)[y]
        for scores, made in (
            (found.argmax, logits.numpy().argmax(1)),
            (found.min_cost, found.min_cost.decisions.numpy()),
        ):
            cost = (example * TABLE[y, made]).sum()
            assert scores.expected_cost.value == pytest.approx(cost)
            assert scores.normalised_cost == pytest.approx(cost / (prior @ TABLE).min())
            assert scores.accuracy.value == pytest.approx((example * (y == made)).sum())
            assert_close(scores.confusion.sum(1), torch.from_numpy(counted))
        assert {0, 1, 3} <= set(found.min_cost.decisions.tolist())  # asks, too
        assert_close(found.prior, torch.from_numpy(prior))


def parts(tested, held_out, **options):
    found = {"validation": held_out, "test": tested} if held_out else {"test": tested}
    return judged(found, make_config(options), COSTS)


@pytest.mark.parametrize("options", [{}, {"prior": {"c": 0.05}}], ids=["no prior", "a part"])
def test_the_labels_that_are_judged_have_no_say_in_the_decisions(options):
    held_out, (logits, labels) = drawn(0, [120, 100, 80]), drawn(1, [150, 90, 60])
    honest = parts((logits, labels), held_out, **options)
    for garbage in (torch.zeros_like(labels), labels.flip(0)):
        other = parts((logits, garbage), held_out, **options)
        assert other["test"].rule.temperature == honest["test"].rule.temperature
        assert torch.equal(other["test"].min_cost.decisions, honest["test"].min_cost.decisions)
        assert (
            other["validation"].min_cost.expected_cost
            == honest["validation"].min_cost.expected_cost
        )
    louder = parts((logits * 4, labels), held_out, **options)
    assert louder["test"].rule.temperature == honest["test"].rule.temperature


def test_a_temperature_is_fitted_where_the_labels_come_from():
    """To the parts of validation, not to those of a prior elsewhere."""
    held_out = drawn(0, [120, 100, 80])
    shift = (torch.tensor([120.0, 100.0, 80.0]) / 300).log() - (COUNTS / 1000).log()
    expected = fit_temperature(*held_out, log_shift=shift, spread=0.5)
    for options in ({}, {"prior": {"c": 0.9}}):
        found = parts(held_out, held_out, **options)
        assert found["validation"].rule.temperature == pytest.approx(expected, rel=1e-6)


def test_without_validation_the_temperature_is_1_and_the_prior_that_of_the_training():
    logits, labels = drawn(1, [150, 90, 60])
    found = parts((logits, labels), None)
    assert list(found) == ["test"]
    assert found["test"].rule.temperature == 1.0
    decisions = (softmax(logits.double().numpy()) @ TABLE).argmin(1)  # no shift: as in training
    assert found["test"].min_cost.decisions.tolist() == decisions.tolist()
    garbage = parts((logits, torch.zeros_like(labels)), None)["test"]
    assert torch.equal(garbage.min_cost.decisions, found["test"].min_cost.decisions)
    other = parts((logits, labels), None, loss="balanced_softmax")["test"]
    assert not torch.equal(other.min_cost.decisions, found["test"].min_cost.decisions)


def test_a_class_that_validation_lacks_keeps_its_share_of_the_training():
    found = parts(drawn(1, [150, 90, 60]), drawn(0, [120, 100, 0]))
    shift = found["test"].rule.log_shift
    trained = COUNTS / COUNTS.sum()
    assert float(shift.exp()[2] * trained[2]) == pytest.approx(float(trained[2]))
    made = found["test"].min_cost
    assert math.isfinite(made.expected_cost.value)
    assert int(made.confusion[2, 2]) > 0


def test_a_record_is_json_with_none_for_what_is_not_defined():
    found = parts(drawn(1, [150, 90, 0]), None)["test"]
    record = json.loads(json.dumps(record_of(found), allow_nan=False))
    argmax = record["rules"]["argmax"]
    assert argmax["recall"]["c"] == [None, None, None]
    assert argmax["decisions"] == ["a", "b", "c", "ask"]
    assert argmax["confusion"] == found.argmax.confusion.tolist()
    assert record["prior"] == pytest.approx({"a": 150 / 240, "b": 90 / 240, "c": 0.0})
    assert argmax["f1"] == {**dict(zip("ab", found.argmax.f1.tolist(), strict=False)), "c": None}
    assert argmax["macro_f1"] == found.argmax.macro_f1
    assert argmax["balanced_accuracy"] == found.argmax.balanced_accuracy
    measured = record["metrics"]
    aucs = found.metrics.auc.tolist()
    assert measured["auc"] == {"a": aucs[0], "b": aucs[1], "c": None}
    assert measured["average_precision"]["c"] is None
    assert sum(measured["reliability"]["count"]) == 240
    assert measured["reliability"]["accuracy"][0] is None
    assert measured["log_score"] == found.metrics.log_score
    assert list(record["rules"]) == ["argmax", "minimum expected cost"]


CAVEATS = [
    ("cross_entropy", ""),
    ("balanced_softmax", ""),
    ("vector_scaling", ""),
    ("cost_hinge", "the logits of cost_hinge have the costs in them already"),
    ("cross_entropy_with_cost", "the logits of cross_entropy_with_cost have the costs in them"),
    ("multi_margin", "the softmax of the logits of multi_margin estimates no probabilities"),
]


@pytest.mark.parametrize(("loss", "start"), CAVEATS, ids=[loss for loss, _ in CAVEATS])
def test_a_loss_that_the_rule_does_not_fit_is_said_so(loss, start):
    caveat = rule_caveat(make_config({"loss": loss}))
    assert caveat.startswith(start)
    assert bool(caveat) == bool(start)


# Every loss by its short name: what its scores are multiplied by, and what they leave out.

COSTLY = {
    "expected_cost",
    "log_bilinear",
    "softmax_margin",
    "cost_hinge",
    "cross_entropy_with_cost",
}
IMPROBABLE = {
    "squared_error", "multiclass_hinge", "multi_margin", "mean_absolute_error", "earth_mover",
}  # fmt: skip
PINNED = [
    *((name, {}) for name in registry.LOSSES),
    ("class_balanced", {"beta": 0.99}),
    ("logit_adjusted", {"tau": 0.5}),
    ("logit_adjusted", {"tau": 2.0}),
    ("vector_scaling", {"gamma": 0.3, "tau": 0.7}),
    ("vector_scaling", {"gamma": 0.0}),
]


def left_out(name, n, options):
    """The factor on the parts of the classes that a loss makes for itself."""
    tau = {"balanced_softmax": 1.0, "logit_adjusted": 1.0, "vector_scaling": 1.0}.get(name, 0.0)
    power = n ** -(options.get("tau", tau) if tau else 0.0)
    if name == "class_balanced":
        return 1.0 / (1.0 - options.get("beta", 0.9999) ** n)
    return power


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 5.0], [3.0, 0.0, 0.5]])
@pytest.mark.parametrize("counts", [[600.0, 300.0, 100.0], [60.0, 0.0, 5.0]], ids=["all", "absent"])
@pytest.mark.parametrize(("name", "options"), PINNED, ids=[f"{n} {o}" for n, o in PINNED])
def test_what_is_known_of_the_scores_of_every_loss(name, options, counts, weights):
    config = make_config({"loss": name, "loss_option": options})
    n, w = np.array(counts), np.ones(3) if weights is None else np.array(weights)
    seen = (n > 0) & (w > 0)
    parts = left_out(name, np.where(seen, n, 1.0), options) * n * w
    parts = np.where(seen, parts, parts[seen].min())
    given = None if weights is None else torch.tensor(weights)
    found = implied_prior(config, torch.tensor(counts), given)
    assert_close(found, torch.from_numpy(parts / parts.sum()), rtol=1e-12, atol=0)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    gamma = options.get("gamma", 0.2) if name == "vector_scaling" else 0.0
    factors = (np.maximum(n, 0.5) / n.max()) ** gamma
    scores = logits * logit_scale(config, torch.tensor(counts))
    assert_close(scores.double(), logits.double() * torch.from_numpy(factors), rtol=1e-12, atol=0)
    caveat = rule_caveat(config)
    assert ("the costs in them already" in caveat) == (name in COSTLY)
    assert ("estimates no probabilities" in caveat) == (name in IMPROBABLE)
    assert bool(caveat) == (name in COSTLY | IMPROBABLE)


# A name, an address, a partial and a module of one's own are judged alike.

OWN = {  # by what it is called where it has a short name
    "nll": "from_logits(losses.nll)",
    "squared_error": "one_hot_targets(losses.squared_error)",
    "cross_entropy_with_cost":
        'summed({"fit": (1.0, losses.cross_entropy), "cost": ("price", losses.expected_cost)})',
}  # fmt: skip
GIVEN = {"equalization": {"threshold": 0.05}, "cross_entropy_with_cost": {"price": 0.5},
         "logit_adjusted": {"tau": 0.5}, "vector_scaling": {"gamma": 0.3},
         "class_balanced": {"beta": 0.99}}  # fmt: skip
PREAMBLE = """
from functools import partial
import torch
from funcloss import *
from funcloss import losses
from funcloss.typing import Correction

def of_prior(*, class_prior, tau=1.0):
    return Correction(offset=tau * class_prior.log())

def adjusted(logits, labels, *, class_prior, tau: float = 1.0, where=None):
    return losses.cross_entropy(logits + tau * class_prior.log(), labels, where=where)

adjusted.probabilities = of_prior

def unstated(logits, labels, *, where=None):
    return losses.cross_entropy(logits, labels, where=where)

def costly(logits, labels, *, cost_matrix, where=None):
    return losses.expected_cost(logits, labels, cost_matrix=cost_matrix, where=where)

class Callable:
    probabilities = "none"

    def __call__(self, logits, labels, *, where=None):
        return losses.multi_margin(logits, labels, where=where)
"""
SQUARE = make_costs(ABC, class_cost={"b": 2.0, "c": 6.0})
_modules = itertools.count()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write one expression as the loss of a module of one's own; return its address."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(expression):
        name = f"judged_{os.getpid()}_{next(_modules)}"
        (tmp_path / f"{name}.py").write_text(f"{PREAMBLE}\nloss = {expression}\n")
        return f"{name}:loss"

    yield write
    for name in [n for n in sys.modules if n.startswith(f"judged_{os.getpid()}_")]:
        del sys.modules[name]


def all_that_is_said(loss, options, weights):
    """The judgement, what is swept and the caveat, the name of the loss left out."""
    config = make_config({"loss": loss, "loss_option": options})
    held_out, tested = drawn(0, [120, 100, 80]), drawn(1, [150, 90, 60])
    found = judged({"validation": held_out, "test": tested}, config, SQUARE, weights)
    hyper = make_hyper(config, SQUARE, COUNTS, "cpu")
    return (
        {split: record_of(evaluation) for split, evaluation in found.items()},
        {name: value.tolist() for name, value in hyper.items()},
        rule_caveat(config).replace(config.loss, "LOSS"),
        rule_fits(config),
    )


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("name", registry.LOSSES)
def test_a_loss_is_judged_alike_by_name_by_address_and_as_a_partial(name, weights, mine):
    short = all_that_is_said(name, GIVEN.get(name, {}), weights)
    written = OWN.get(name, f"losses.{name}")
    addresses = [mine(written), mine(f"partial({written})"), mine(f"scaled({written}, 0.5)")]
    if name not in OWN:
        addresses.append(f"funcloss.losses:{name}")
    for address in addresses:
        assert all_that_is_said(address, GIVEN.get(name, {}), weights) == short


ALIKE = [  # what is written, the short name and the weights that it amounts to
    ("partial(losses.logit_adjusted, tau=0.5)", "logit_adjusted", {"tau": 0.5}, None),
    ("adjusted", "logit_adjusted", {}, None),
    ("partial(class_weighted(losses.cross_entropy), class_weights=torch.tensor([1.0, 2.0, 5.0]))",
     "cross_entropy", {}, WEIGHTS),
    ("partial(class_weighted(adjusted), class_weights=torch.tensor([1.0, 2.0, 5.0]))",
     "logit_adjusted", {}, WEIGHTS),
    ("smoothed(losses.multi_margin)", "multi_margin", {}, None),
    ("Callable()", "multi_margin", {}, None),
    ("costly", "expected_cost", {}, None),
]  # fmt: skip


@pytest.mark.parametrize(("written", "name", "options", "weights"), ALIKE)
def test_what_a_loss_is_made_of_is_judged_as_what_it_amounts_to(
    written, name, options, weights, mine
):
    own, short = all_that_is_said(mine(written), {}, None), all_that_is_said(name, options, weights)
    found, expected = (tree_flatten(said[0]) for said in (own, short))
    assert found[1] == expected[1]
    assert found[0] == [  # but for the rounding of float32 weights
        pytest.approx(x, rel=1e-6) if isinstance(x, float) else x for x in expected[0]
    ]
    assert own[2:] == short[2:]


@pytest.mark.parametrize("written", ["unstated", "partial(unstated)", "scaled(unstated, 2.0)"])
def test_a_loss_that_states_nothing_is_taken_like_the_cross_entropy_and_said_so(written, mine):
    judged, _, caveat, fits = all_that_is_said(mine(written), {}, WEIGHTS)
    plain = all_that_is_said("cross_entropy", {}, WEIGHTS)
    assert (judged, fits) == (plain[0], plain[3]) == (plain[0], True)
    assert caveat.startswith("LOSS does not state how its scores become probabilities; their soft")
    name = "loss" if written == "unstated" else "unstated"
    assert f'set {name}.probabilities = "softmax" where it is defined' in caveat


@pytest.mark.parametrize(
    ("statement", "match"),
    [
        (
            '"sigmoid"',
            r"its probabilities cannot be used: ValueError: .*'softmax', 'none', 'costs'",
        ),
        ("lambda gamma: None", "its probabilities cannot be used: TypeError: .*'gamma'"),
        ("lambda: Correction(torch.ones(2))", "its probabilities cannot be used: RuntimeError"),
        ("lambda: Correction(offset=torch.ones(2, 3))", r"shape \(3,\); got shape \(2, 3\)"),
    ],
)
def test_a_statement_that_cannot_be_used_is_refused_before_the_training(statement, match, mine):
    address = mine(f"unstated\nloss.probabilities = {statement}")
    with pytest.raises(ConfigError, match=match):
        check_loss_options(make_config({"loss": address}), SQUARE, COUNTS)


# The command, on real digits.

DIGITS = tuple("0123456789")
NINES = np.ones((10, 10)) - np.eye(10)
NINES[9] *= 8.0


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("judging")


@pytest.fixture(scope="module")
def run(room):
    """A run of class weights and class costs on a tail."""
    config = make_config(
        {
            "dataset": "mnist-sample", "model": "linear", "epochs": 1, "compile": "off",
            "audit_every": 0, "threads": 1, "imbalance": 5, "class_weight": {"9": 3},
            "class_cost": {"9": 8},
        }
    )  # fmt: skip
    train(config, room / "run")
    return room / "run"


def table_file(path, matrix, extra=(), corner="true\\decided"):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([corner, *DIGITS, *extra])
        writer.writerows([name, *row] for name, row in zip(DIGITS, matrix.tolist(), strict=True))
    return path


ABSTAIN = np.concatenate([NINES, np.full((10, 1), 0.3)], axis=1)
JUDGED = [
    ([], NINES, {}),
    (["--class-cost", "3=20", "--class-cost", "5=0"], None, {}),
    (["--cost-matrix", "FILE"], ABSTAIN, {}),
    (["--prior", "9=0.3"], NINES, {"9": 0.3}),
    (["--prior", "0=0.5", "--class-cost", "0=2"], None, {"0": 0.5}),
    (["--cost-matrix", "FILE", "--prior", "9=0.01"], ABSTAIN, {"9": 0.01}),
]


def wilson_by_roots(p, n):
    """The bounds are where ``(p - x)^2 = z^2 x (1 - x) / n``."""
    z2 = 1.959963984540054**2 / n
    return sorted(float(np.real(x)) for x in np.roots([1 + z2, -(2 * p + z2), p * p]))


@pytest.mark.parametrize(("args", "matrix", "given"), JUDGED, ids=[" ".join(a) for a, *_ in JUDGED])
def test_evaluate_writes_what_loops_count(run, tmp_path, sample, run_cli, args, matrix, given):
    if matrix is None:
        costly = dict(pair.split("=") for pair in args[args.index("--class-cost") + 1 :: 2])
        matrix = np.ones((10, 10)) - np.eye(10)
        for name, cost in costly.items():
            matrix[int(name)] *= float(cost)
    file = table_file(tmp_path / "costs.csv", ABSTAIN, ["ask"])
    args = [file if a == "FILE" else a for a in args]
    path, lines = tmp_path / "scores.json", tmp_path / "lines.csv"
    code, out, err = run_cli("evaluate", run, "--json", path, "--csv", lines, *args)
    assert (code, err) == (0, "")
    record = json.loads(path.read_text())
    judged = record

    loaded = runs.load(run)
    with torch.no_grad():
        held_out, tested = (
            loaded.model(normalised(part.inputs, loaded.mean, loaded.std)).double().numpy()
            for part in (sample.validation, sample.test)
        )
    y = sample.test.labels.numpy()
    counts = loaded.class_counts.double().numpy()
    assert counts.tolist()[::9] == [400.0, 80.0]
    implied = counts * np.where(np.arange(10) == 9, 3.0, 1.0)
    implied /= implied.sum()
    temperature = temperature_by_grid(
        held_out, sample.validation.labels.numpy(), np.log(0.1 / implied)
    )
    assert judged["temperature"] == pytest.approx(temperature, rel=1e-3)
    rest = (1 - sum(given.values())) / (10 - len(given))
    prior = np.array([given.get(name, rest) for name in DIGITS])
    assert judged["prior"] == pytest.approx(dict(zip(DIGITS, prior, strict=True)))
    posterior = softmax(tested / judged["temperature"] + np.log(prior / implied))
    rules = {
        "argmax": tested.argmax(1),
        "minimum expected cost": (posterior @ matrix).argmin(1),
    }
    with lines.open() as rows:
        decided = [row["decision"] for row in csv.DictReader(rows)]
    assert record["rule"] == "min-cost" if "FILE" in args or "--class-cost" in args else "argmax"
    by_cost = record["rule"] == "min-cost"
    names = [*DIGITS, "ask"]
    rule = rules["minimum expected cost" if by_cost else "argmax"]
    assert decided == [names[i] for i in rule.tolist()]
    assert judged["constant_cost"] == pytest.approx((prior @ matrix).min())
    for name, made in rules.items():
        found = judged["rules"][name]
        confusion = np.zeros_like(matrix)
        for truth, decision in zip(y, made, strict=True):
            confusion[truth, decision] += 1
        assert found["confusion"] == confusion.tolist()
        assert_close(np.array(found["confusion_cost"]), confusion * matrix)
        cost = sum(prior[t] / 50 * matrix[t, d] for t, d in zip(y, made, strict=True))
        assert found["expected_cost"][0] == pytest.approx(cost)
        assert found["expected_cost"][1] < cost < found["expected_cost"][2]
        assert found["normalised_cost"] == pytest.approx(cost / judged["constant_cost"])
        for c, digit in enumerate(DIGITS):
            recall = confusion[c, c] / 50
            low, high = wilson_by_roots(recall, 50)
            assert found["recall"][digit] == pytest.approx([recall, low, high], abs=1e-9)
        assert f"decisions by {name}: accuracy {found['accuracy'][0]:.2%} [" in out
        assert f"expected cost {cost:.4f} [" in out
        assert f"{found['normalised_cost']:.3f} of the best constant decision" in out
        assert printed(out, name, "counts") == confusion.tolist()
        assert_close(np.array(printed(out, name, "cost")), confusion * matrix, rtol=1e-5, atol=0)
    assert rules["argmax"].tolist() != rules["minimum expected cost"].tolist()
    abstained = judged["rules"]["minimum expected cost"]["confusion"]
    assert (sum(row[-1] for row in abstained) > 0) or "FILE" not in args


def printed(out, rule, what):
    """A matrix that was printed below a rule's name."""
    text = out[out.index(f"decisions by {rule}") :]
    text = text[text.index(f"{what}, rows the truth") :].splitlines()[1:11]
    rows = [line.split() for line in text]
    assert [row[0] for row in rows] == list(DIGITS)
    return [[0.0 if cell == "." else float(cell) for cell in row[1:]] for row in rows]


def test_evaluate_says_what_it_judged_by(run, run_cli):
    code, out, _ = run_cli("evaluate", run)
    assert code == 0
    assert out.startswith("cost: calling a true 9 anything else costs 8\n")
    assert re.search(r"^calibration: temperature \d\.\d{3}: cross-entropy .* on 500 validation "
                     r"examples$", out, re.M)  # fmt: skip
    assert re.search(r"^accuracy \d\d\.\d\d%  loss \d\.\d{4}  on 500 examples of mnist-sample, "
                     r"test$", out, re.M)  # fmt: skip
    summary = json.loads((run / "summary.json").read_text())["test"]
    measured = summary["metrics"]
    assert (
        f"AUC {measured['mean_auc']:.4f}, average precision "
        f"{measured['mean_average_precision']:.4f} (one class against the rest, class mean)\n"
        f"log score {measured['log_score']:.4f} nats per example, "
        f"Brier score {measured['brier_score']:.4f} (0 best, 2 worst)\n"
    ) in out
    scores = summary["rules"]["argmax"]
    assert (
        f"balanced accuracy {scores['balanced_accuracy']:.2%}, macro F1 {scores['macro_f1']:.4f}, "
    ) in out
    assert re.search(rf"^9 +50 .* {scores['f1']['9']:.4f}$", out, re.M)
    cost, low, high = summary["rules"]["minimum expected cost"]["expected_cost"]
    assert f"expected cost {cost:.4f} [{low:.4f}, {high:.4f}]" in out


def test_costs_of_the_command_replace_those_of_the_run(run, tmp_path):
    file = table_file(tmp_path / "costs.csv", ABSTAIN, ["ask"])
    own = runs.evaluate_run(run)
    assert own.evaluation.rule.costs.matrix.tolist() == NINES.tolist()
    from funcloss.decisions import read_cost_matrix

    by_table = runs.evaluate_run(run, EvaluateOptions(cost_matrix=read_cost_matrix(file)))
    assert by_table.evaluation.rule.costs.extra == ("ask",)
    by_class = runs.evaluate_run(run, EvaluateOptions(class_cost={"0": 2.0}))
    assert by_class.evaluation.rule.costs.matrix[9].tolist() == [1.0] * 9 + [0.0]
    weighed = runs.evaluate_run(run, EvaluateOptions(prior={"9": 0.5}))
    assert weighed.evaluation.rule.costs.matrix.tolist() == NINES.tolist()
    for other in (by_table, by_class, weighed):  # what it learnt by is what it was
        assert other.evaluation.loss == own.evaluation.loss
        assert other.evaluation.rule.temperature == own.evaluation.rule.temperature
        assert torch.equal(other.evaluation.logits, own.evaluation.logits)


def test_a_run_that_held_nothing_out_is_judged_as_it_is(tmp_path, run_cli):
    made = {"dataset": "mnist-sample", "model": "linear", "epochs": 0, "val_fraction": 0,
            "compile": "off"}  # fmt: skip
    train(make_config(made), tmp_path / "run")
    code, out, _ = run_cli("evaluate", tmp_path / "run", "--json", tmp_path / "scores.json")
    assert code == 0
    assert "probabilities are not calibrated: there was no held-out data" in out
    assert json.loads((tmp_path / "scores.json").read_text())["temperature"] == 1.0
    code, _, err = run_cli("evaluate", tmp_path / "run", "--split", "validation")
    assert code == 2
    assert "has no validation split: the run held out none" in err


REFUSED = [
    (["--cost-matrix", "CORNER"], "is transposed: its first cell 'decided\\\\true' makes"),
    (["--cost-matrix", "ROWS"], "cost_matrix is transposed: rows are the truth and columns the"),
    (["--cost-matrix", "SHORT"], "cost_matrix has no row for class 9"),
    (["--cost-matrix", "none.csv"], "cannot read none.csv: No such file"),
    (["--cost-matrix", "GOOD", "--class-cost", "9=2"], "two forms of the same: give one"),
    (["--class-cost", "ten=2"], "class_cost: no class 'ten'; the classes are 0, 1"),
    (["--class-cost", "9=-1"], "class_cost 9 must be at least 0"),
    (["--class-cost", "9"], "class_cost must be CLASS=COST, as in 9=5; got '9'"),
    (["--prior", "9=1.5"], "prior 9 must be at least 0 and at most 1, got 1.5"),
    (["--prior", "9=0.6", "--prior", "8=0.6"], "must not add up to more than 1, got 1.2"),
    (["--prior", "ten=0.1"], "prior: no class 'ten'"),
    (["--prior", "9=0.1", "--prior", "9=0.2"], "class '9' is given twice"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_what_cannot_be_judged_by_is_one_line_and_exit_code_2(
    run, tmp_path, monkeypatch, run_cli, args, message
):
    monkeypatch.chdir(tmp_path)
    files = {
        "CORNER": table_file(tmp_path / "corner.csv", NINES, corner="decided\\true"),
        "GOOD": table_file(tmp_path / "good.csv", NINES),
        "ROWS": tmp_path / "rows.csv",
        "SHORT": tmp_path / "short.csv",
    }
    good = files["GOOD"].read_text()
    files["ROWS"].write_text(good + "ask" + ",0.3" * 10 + "\n")
    files["SHORT"].write_text("\n".join(good.splitlines()[:-1]))
    args = [files.get(a, a) for a in args]
    code, out, err = run_cli("evaluate", run, *args, "--json", tmp_path / "scores.json")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "scores.json").exists()


def test_a_prior_of_no_class_that_is_judged_is_refused(run):
    with pytest.raises(ConfigError, match="the parts of all classes must add up to 1, got 0.5"):
        runs.evaluate_run(run, EvaluateOptions(prior=dict.fromkeys(DIGITS, 0.05)))


def test_scores_that_cannot_be_written_are_exit_code_1(run, tmp_path, run_cli):
    code, _, err = run_cli("evaluate", run, "--json", tmp_path / "no" / "scores.json")
    assert code == 1
    assert err.startswith("error: cannot write ")
