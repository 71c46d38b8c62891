"""Costs of each example: from a column or an array to the loss, the decision and the score."""

import csv
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import StopAt, lines_of, resume
from safetensors.numpy import save_file
from torch.testing import assert_close

from funcloss import losses, models, transforms
from funcloss.app import audits, data, runs, sweep
from funcloss.app.cli import app as shell
from funcloss.app.config import make_config
from funcloss.app.data import get_batch, iter_batches, load_dataset, moved, subset
from funcloss.app.data.records import LoadOptions
from funcloss.app.options import AuditOptions, EvaluateOptions
from funcloss.app.runs import folder
from funcloss.app.runs.setup import make_setup
from funcloss.app.train import train
from funcloss.decisions import (
    DecisionRule,
    cost_sentences,
    expected_costs,
    make_costs,
    min_cost_decisions,
    score,
)
from funcloss.errors import AuditError, ConfigError, DataError
from funcloss.objectives import mean_of, supervised
from funcloss.typing import Batch

BANK = ("fraud", "legit")
BANK_COSTS = make_costs(BANK, class_cost={"legit": 3.0}, cost={"fraud,legit": "amount"})


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Decisions: the library.


def test_costs_of_each_example_are_read_from_their_amounts():
    table = {t: {"a": 0, "b": 1, "c": 2, "ask": 0.5} for t in "abc"}
    cost = {"a,b": "x", "b,ask": "y", "c,c": -1.0, "c,a": "x"}
    costs = make_costs("abc", table, cost=cost)
    assert costs.amounts == ((0, 1, "x"), (1, 3, "y"), (2, 0, "x"))
    x, y = random(5), 9 * random(5, seed=1)
    each = costs.of_examples({"x": x, "y": y, "unused": y})
    labels = torch.tensor([0, 1, 2, 0, 2])
    for i in range(5):
        expected = [[0, x[i], 2, 0.5], [0, 1, 2, y[i]], [x[i], 1, -1, 0.5]]
        assert each[i].tolist() == [[float(v) for v in row] for row in expected]
    rows = costs.of_labels(labels, {"x": x, "y": y})
    assert torch.equal(rows, each[torch.arange(5), labels])


WRONG_AMOUNTS = [
    (
        {},
        "fraud decided as legit costs each example its amount: give amounts with 'amount', got no",
    ),
    ({"other": torch.ones(2)}, "got other"),
    ({"amount": torch.ones(3)}, r"amount must have shape \(2,\)"),
    ({"amount": torch.tensor([1.0, -1.0])}, "amount must be finite and at least 0"),
    ({"amount": torch.tensor([1.0, math.nan])}, "amount must be finite and at least 0"),
]


@pytest.mark.parametrize(("amounts", "message"), WRONG_AMOUNTS)
def test_amounts_that_do_not_fit_are_refused(amounts, message):
    with pytest.raises(ValueError, match=message):
        BANK_COSTS.of_labels(torch.tensor([0, 1]), amounts)
    with pytest.raises(ValueError, match=message):
        score(torch.zeros(2, 2), torch.tensor([0, 1]), DecisionRule(BANK_COSTS), amounts=amounts)


@pytest.mark.parametrize("batch", [(), (7,), (2, 3)])
def test_decisions_by_a_matrix_per_example_are_those_of_one_after_another(batch):
    log_probs = torch.log_softmax(3 * random(*batch, 4), -1)
    matrices = 5 * random(*batch, 4, 6, seed=1) - 1
    expected, decided = expected_costs(log_probs, matrices), min_cost_decisions(log_probs, matrices)
    flat = zip(log_probs.reshape(-1, 4), matrices.reshape(-1, 4, 6), strict=True)
    one_by_one = torch.stack([expected_costs(p, matrix) for p, matrix in flat])
    assert_close(expected.reshape(-1, 6), one_by_one)
    assert torch.equal(decided, one_by_one.argmin(-1).reshape(batch))


def test_a_rule_of_such_costs_needs_them():
    with pytest.raises(
        ValueError, match="depend on the amount of each example: give example_costs"
    ):
        DecisionRule(BANK_COSTS).decide(torch.zeros(2, 2))


@pytest.mark.parametrize("prior", [None, torch.tensor([0.1, 0.9])])
@pytest.mark.parametrize("at_once", [2**22, 100])  # the second in pieces
def test_an_evaluation_adds_up_what_each_example_costs(monkeypatch, prior, at_once):
    n = 333
    monkeypatch.setattr("funcloss.decisions.evaluation._AT_ONCE", at_once)
    amounts, labels = 100 * random(n) ** 3, (random(n, seed=1) > 0.3).long()
    logits = torch.stack([random(n, seed=2), 2 * random(n, seed=3)], 1)
    found = score(
        logits, labels, DecisionRule(BANK_COSTS), prior=prior, amounts={"amount": amounts}
    )
    p = logits.softmax(1).numpy()
    a, y = amounts.numpy(), labels.numpy()
    expected = np.stack([p[:, 1] * 3, p[:, 0] * a], 1)
    assert found.min_cost.decisions.tolist() == expected.argmin(1).tolist()
    counts = np.bincount(y)
    weights = np.full(n, 1 / n) if prior is None else (prior.numpy() / counts)[y]
    for scores in found.rules.values():
        d = scores.decisions.numpy()
        paid = np.where(y == d, 0.0, np.where(y == 0, a, 3.0))
        assert_close(scores.example_cost.numpy(), paid)
        assert scores.expected_cost.value == pytest.approx(weights @ paid, rel=1e-6)
        by_class = [(weights * paid)[y == c].sum() for c in range(2)]
        assert_close(scores.class_cost.numpy(), np.array(by_class), rtol=1e-6, atol=1e-12)
        cells = [[paid[(y == t) & (d == k)].sum() for k in range(2)] for t in range(2)]
        assert_close(scores.cost.numpy(), np.array(cells))
    always = [weights @ np.where(y == 1, 3.0, 0.0), weights @ np.where(y == 0, a, 0.0)]
    assert_close(found.constant_costs.numpy(), np.array(always), rtol=1e-6, atol=1e-12)
    best = found.min_cost.expected_cost.value / min(always)
    assert found.min_cost.normalised_cost == pytest.approx(best, rel=1e-6)


def test_equal_amounts_are_one_cost_for_all():
    n = 200
    logits, labels = random(n, 2), (random(n, seed=1) > 0.5).long()
    one = make_costs(BANK, cost={"fraud,legit": 7.0, "legit,fraud": 0.5})
    each = make_costs(BANK, cost={"fraud,legit": "a", "legit,fraud": "b"})
    amounts = {"a": torch.full((n,), 7.0), "b": torch.full((n,), 0.5)}
    plain = score(logits, labels, DecisionRule(one))
    found = score(logits, labels, DecisionRule(each), amounts=amounts)
    for name, scores in found.rules.items():
        assert torch.equal(scores.decisions, plain.rules[name].decisions)
        expected = plain.rules[name].expected_cost.value
        assert scores.expected_cost.value == pytest.approx(expected)
    assert found.constant_cost == pytest.approx(plain.constant_cost)


SAID = [
    (BANK_COSTS, ["calling a true fraud a legit costs its amount",
                  "every other mistake costs 3, a right decision 0"]),
    (make_costs("abc", cost={"a,b": "loss", "a,c": "loss"}),
     ["calling a true a anything else costs its loss",
      "every other mistake costs 1, a right decision 0"]),
    (make_costs(BANK, cost={"legit,legit": "gain"}),
     ["every mistake costs 1", "rightly deciding legit costs its gain",
      "every other right decision costs 0"]),
    (make_costs(BANK, cost={"fraud,legit": "loss", "legit,fraud": "loss"}),
     ["every mistake costs its loss, a right decision 0"]),
]  # fmt: skip


@pytest.mark.parametrize(("costs", "lines"), SAID)
def test_they_are_spoken_of(costs, lines):
    assert cost_sentences(costs) == lines


# The step: costs travel with the batch to a loss that takes them.


@pytest.mark.parametrize("weighted", [False, True])
def test_a_step_and_the_gradient_of_each_example_see_the_costs_of_the_batch(weighted):
    model = models.mlp((1, 2, 2), 3)
    params = {name: p.detach() for name, p in model.named_parameters()}
    labels, costs = torch.tensor([0, 2, 1, 0]), 5 * random(4, 3).float()
    batch = Batch(torch.rand(4, 1, 2, 2), labels, costs=costs)
    from funcloss import class_weighted

    loss = class_weighted(losses.expected_cost) if weighted else losses.expected_cost
    hyper = {"class_weights": torch.tensor([1.0, 2.0, 4.0])} if weighted else {}
    objective = supervised(model, mean_of(loss))
    found, _ = objective(params, {}, batch, torch.arange(4), hyper)
    weights = hyper["class_weights"][labels] if weighted else torch.ones(4)
    expected = (weights * (costs * model(batch.inputs).softmax(1)).sum(1)).mean()
    assert_close(found, expected.detach())
    each = transforms.per_sample_grads(objective)(params, {}, batch, torch.arange(4), hyper)
    whole = torch.func.grad(lambda p: objective(p, {}, batch, torch.arange(4), hyper)[0])(params)
    for name, gradient in whole.items():
        assert_close(each[name].mean(0), gradient)
    # A loss that takes no costs is not given any.
    other = supervised(model, mean_of(losses.cross_entropy))(params, {}, batch, torch.arange(4), {})
    assert_close(other[0], torch.nn.functional.cross_entropy(model(batch.inputs), labels).detach())


# Data.

N = 240
LABELS = (random(N, seed=5) < 0.7).long()
AMOUNT = (1 + 99 * random(N, seed=6) ** 3).round(decimals=2)
FEATURES = torch.stack([LABELS + random(N, seed=7), random(N, seed=8)], 1).float()


def write_table(path, *, amounts=None, header=("x", "amount", "z", "kind")):
    amounts = AMOUNT.tolist() if amounts is None else amounts
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        rows = zip(FEATURES.tolist(), amounts, LABELS.tolist(), strict=True)
        writer.writerows((x, a, z, BANK[y]) for (x, z), a, y in rows)
    return str(path)


def write_arrays(path, **changed):
    arrays = {}
    for split, part in (
        ("train", slice(0, 160)),
        ("val", slice(160, 200)),
        ("test", slice(200, N)),
    ):
        arrays |= {
            f"{split}_images": FEATURES[part].numpy(),
            f"{split}_labels": LABELS[part].numpy(),
            f"{split}_amount": AMOUNT[part].numpy(),
        }
    arrays |= changed
    if path.suffix == ".npz":
        np.savez(path, **arrays, classes=np.array(BANK))
    else:
        save_file(arrays, path, metadata={"classes": json.dumps(BANK)})
    return str(path)


CODE = """
import torch
from torch.utils.data import Dataset
from funcloss.app import data

features, labels, amount = torch.load({path!r})


CLASSES = ("fraud", "legit")


def three():
    train = (features, labels, {{"amount": amount, "other": 3}})
    return {{"train": train, "classes": CLASSES}}


def examples():
    train = data.Examples(features, labels, {{"amount": amount}})
    return {{"train": train, "classes": CLASSES}}


class Items(Dataset):
    classes = CLASSES
    targets = labels
    amount = amount.numpy()

    def __len__(self):
        return len(labels)

    def __getitem__(self, i):
        return features[i], int(labels[i])


def whole():
    part = data.Examples(features, labels, {{"amount": amount}})
    none = torch.zeros(0)
    return data.Dataset("whole", CLASSES, part, part, part, mean=none, std=none)
"""


def write_code(folder, function):
    torch.save((FEATURES, LABELS, AMOUNT), folder / "kept.pt")
    file = folder / "mine.py"
    file.write_text(CODE.format(path=str(folder / "kept.pt")))
    return f"{file}:{function}"


FORMS = {
    "table": lambda folder: write_table(folder / "rows.csv"),
    "npz": lambda folder: write_arrays(folder / "rows.npz"),
    "safetensors": lambda folder: write_arrays(folder / "rows.safetensors"),
    **{name: lambda folder, name=name: write_code(folder, name)
       for name in ("three", "examples", "Items", "whole")},
}  # fmt: skip


def loaded(address, amounts=("amount",), **options):
    options = {"target": "kind", **options} if address.endswith(".csv") else options
    return load_dataset(LoadOptions(address, amounts=amounts, workers=0, **options))


@pytest.mark.parametrize("form", FORMS)
def test_amounts_stay_with_their_examples(tmp_path, form):
    read = loaded(FORMS[form](tmp_path), imbalance=1.0 if form == "whole" else 2.0)
    # Each example is known by its first feature.
    place = {float(x): i for i, x in enumerate(FEATURES[:, 0])}
    for part in (*moved(read, "cpu").splits.values(), subset(read.train, torch.tensor([5, 2]))):
        inputs = part.inputs
        if isinstance(inputs, data.Stream):
            inputs = torch.cat([*inputs.batches([torch.arange(len(inputs))])])
        index = torch.tensor([place[float(x)] for x in inputs[:, 0]])
        assert len(index) > 1
        assert part.amounts["amount"].dtype == torch.float64
        assert torch.equal(part.amounts["amount"], AMOUNT[index])
        assert torch.equal(part.labels, LABELS[index])
        given = dataclasses.replace(part, costs=AMOUNT[index, None].float())
        batches = list(iter_batches(read, given, torch.arange(len(index)).split(7)))
        assert torch.equal(torch.cat([b.costs for b in batches]), given.costs)
        assert get_batch(read, part, torch.tensor([0])).costs is None
    assert [c.name for c in read.columns] == (["x", "z"] if form == "table" else [])
    assert read.input_shape == (2,)


def spoilt(place, text):
    amounts = AMOUNT.tolist()
    amounts[place] = text
    return amounts


def of_arrays(name, **arrays):
    return lambda folder: write_arrays(folder / name, **arrays)


REFUSED = [
    (lambda f: write_table(f / "t.csv", header=("x", "amounts", "z", "kind")), ConfigError,
     "has no 'amount', which cost names (did you mean 'amounts'?); it has x, amounts, z, kind"),
    (lambda f: write_table(f / "t.csv", amounts=spoilt(3, "")), DataError,
     "row 4, column 'amount': the cost of an example must be finite and at least 0, got nothing"),
    (lambda f: write_table(f / "t.csv", amounts=spoilt(3, "x")), DataError,
     "row 4, column 'amount': 'x' is not a number"),
    (lambda f: write_table(f / "t.csv", amounts=spoilt(0, "nan")), DataError, "got nothing"),
    (lambda f: write_table(f / "t.csv", amounts=spoilt(0, "-1")), DataError, "got -1"),
    (of_arrays("a.npz", test_amount=AMOUNT[:3].numpy()), DataError,
     "3 values of amount but 40 labels"),
    (of_arrays("a.npz", test_amount=-AMOUNT[200:].numpy()), DataError,
     "a.npz: test_amount must be finite and at least 0, as costs of single examples are; got -"),
    (of_arrays("a.npz", test_amount=np.array(["1"] * 40)), DataError,
     "a.npz: test_amount must be one number per example, (n,); got <U1 (40,)"),
    (of_arrays("a.safetensors", val_amount=np.ones((40, 2))), DataError,
     "val_amount must be one number per example, (n,); got float64 (40, 2)"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "error", "message"), REFUSED)
def test_amounts_that_are_not_there_or_spoilt_are_refused(tmp_path, write, error, message):
    with pytest.raises(error) as raised:
        loaded(write(tmp_path))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("extras", "error", "message"),
    [
        ("{'amount': 3}", DataError, "amount must be one number per example, (n,); got int64 ()"),
        ("{'amount': amount[1:]}", DataError, "239 values of amount but 240 labels"),
        ("amount", DataError, "must be (inputs, labels), a torch"),
        ("{'amount': -amount}", DataError, "amount must be finite and at least 0"),
        ("{'amount': amount.bfloat16()}", None, ""),
        ("{'amount': amount.tolist()}", None, ""),
    ],
)
def test_amounts_of_code_are_checked(tmp_path, extras, error, message):
    address = write_code(tmp_path, "other")
    file = tmp_path / "mine.py"
    file.write_text(f"{file.read_text()}\n\ndef other():\n    return features, labels, {extras}\n")
    if error is None:
        assert loaded(address).train.amounts["amount"].dtype == torch.float64
        return
    with pytest.raises(error, match=re.escape(message)):
        loaded(address)


OTHER = [
    (lambda f: write_arrays(f / "a.npz"), "has no 'train_price', which cost names"),
    (lambda f: write_code(f, "three"), "has no 'price', which cost names; it has amount, other"),
    (lambda f: write_code(f, "Items"), "has no 'price', which cost names"),
    (lambda f: write_code(f, "whole"), "train has no 'price', which cost names; it has amount"),
    (
        lambda f: "mnist-sample",
        "cost names 'price', which is no number, and the cost of each example",
    ),
]


@pytest.mark.parametrize(("write", "message"), OTHER)
def test_data_without_the_amounts_are_refused(tmp_path, write, message):
    with pytest.raises(ConfigError) as raised:
        loaded(write(tmp_path), amounts=("price",))
    assert message in str(raised.value)


# Runs.

LINEAR = {"target": "kind", "model": "linear", "epochs": 3, "batch_size": 16, "compile": "off",
          "test_fraction": 0.25, "val_fraction": 0.2, "class_cost": {"legit": 3},
          "cost": {"fraud,legit": "amount"}, "device": "cpu"}  # fmt: skip


def config(tmp_path, **options):
    path = tmp_path / "rows.csv"
    if not path.exists():
        write_table(path)
    return make_config(LINEAR, {"dataset": str(path)}, options)


def told_by_hand(examples, logits, weights=(1.0, 1.0)):
    """Return the mean expected cost of the softmax, and the paid cost by argmax and by the rule."""
    a, y, p = examples.amounts["amount"], examples.labels, logits.double().softmax(1)
    values = torch.where(y == 0, p[:, 1] * a, p[:, 0] * 3)
    return (torch.tensor(weights)[y] * values).mean(), a, y


LEARNT = {
    "expected_cost": ({"loss": "expected_cost"}, lambda v, z, y: v),
    "with cross-entropy": (
        {"loss": "cross_entropy_with_cost", "loss_option": {"price": 0.5}},
        lambda v, z, y: torch.nn.functional.cross_entropy(z, y) + 0.5 * v,
    ),
    "cross_entropy": ({}, lambda v, z, y: torch.nn.functional.cross_entropy(z, y)),
}


@pytest.mark.parametrize(("options", "reference"), LEARNT.values(), ids=LEARNT)
def test_a_run_learns_and_is_scored_by_the_costs_of_each_example(tmp_path, options, reference):
    made = train(config(tmp_path, **options), tmp_path / "run", show=lambda event: None)
    assert folder.read_config(made.folder).cost == {"fraud,legit": "amount"}
    assert made.summary["costs"] == cost_sentences(BANK_COSTS)
    setup = make_setup(folder.read_config(made.folder))
    test = setup.dataset.test
    found = runs.evaluate_run(made.folder).evaluation
    values, a, y = told_by_hand(test, found.logits)
    assert found.loss == pytest.approx(float(reference(values, found.logits.double(), y)), rel=1e-5)
    for scores in found.rules.values():
        d = scores.decisions
        paid = torch.where(d == y, 0.0, torch.where(y == 0, a, 3.0))
        assert_close(scores.example_cost, paid)
        assert scores.expected_cost.value == pytest.approx(float(paid.mean()))
    p = found.rule.log_probs(found.logits).exp()
    by_hand = torch.stack([p[:, 1] * 3, p[:, 0] * a], 1).argmin(1)
    assert torch.equal(found.min_cost.decisions, by_hand)
    rule = made.summary["test"]["rules"]["minimum expected cost"]
    assert rule["expected_cost"][0] == pytest.approx(found.min_cost.expected_cost.value)


def test_class_weights_multiply_the_costs_of_each_example(tmp_path):
    made = config(tmp_path, loss="expected_cost", class_weight={"fraud": 4}, epochs=0)
    setup = make_setup(made)
    found = runs.evaluation.evaluate(setup.trained(setup.state), setup.dataset, ("train",))["train"]
    values, *_ = told_by_hand(setup.dataset.train, found.logits, (4.0, 1.0))
    assert found.loss == pytest.approx(float(values), rel=1e-5)
    batch = get_batch(setup.dataset, setup.dataset.train, torch.arange(16))
    _, metrics = setup.train_step(setup.state, batch, setup.hyper)
    some = dataclasses.replace(
        setup.dataset.train, labels=batch.targets,
        amounts={"amount": setup.dataset.train.amounts["amount"][:16]},
    )  # fmt: skip
    expected, *_ = told_by_hand(some, found.logits[:16], (4.0, 1.0))
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_run_by_such_costs_goes_on_to_the_same_bits_and_is_not_audited(tmp_path):
    made = config(tmp_path, loss="expected_cost", audit_every=2, oversample=0.5)
    notes = []
    whole = train(made, tmp_path / "whole", show=notes.append).folder
    said = [
        n.text for n in notes if "audits during training are disabled" in getattr(n, "text", "")
    ]
    assert said == ["audits during training are disabled: each example has costs of its own, by "
                    "which expected_cost learns"]  # fmt: skip
    assert not train(made, tmp_path / "part", should_stop=StopAt(5)).finished
    assert resume(tmp_path / "part").finished
    a, b = (runs.load_tensors(run / folder.MODEL)[0] for run in (whole, tmp_path / "part"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(AuditError, match="a loss under costs of each example cannot be audited"):
        audits.audit_run(whole)
    plain = train(config(tmp_path, audit_every=2), tmp_path / "plain").folder
    assert audits.audit_run(plain, AuditOptions(examples=100)).audit.count.sum() == 100


def test_the_step_compiles(tmp_path):
    setup = make_setup(config(tmp_path, loss="expected_cost", class_weight={"fraud": 2}))
    batch = get_batch(setup.dataset, setup.dataset.train, torch.arange(16))
    compiled = torch.compile(setup.train_step, fullgraph=True, dynamic=False, backend="aot_eager")
    found, expected = (
        step(setup.state, batch, setup.hyper) for step in (compiled, setup.train_step)
    )
    assert_close(found, expected)


def test_a_sweep_trains_plain_beside_and_scores_by_the_costs_of_each_example(tmp_path):
    axes = [sweep.Axis("class_weight", "fraud", (1.0, 3.0))]
    made = config(tmp_path, loss="expected_cost", audit_every=0, epochs=2)
    ended = sweep.sweep(sweep.SweepSpec(made, axes), tmp_path / "s")
    assert [p.plain for p in ended.choice.points] == [False, False, True]
    assert ended.choice.gradient == {}
    records = lines_of(tmp_path / "s" / "trials.jsonl")
    alone = train(dataclasses.replace(made, loss="cross_entropy"), tmp_path / "alone")
    plain = next(r for r in records if r["plain"])
    cost = alone.summary["validation"]["rules"]["argmax"]["expected_cost"][0]
    assert plain["expected_cost"] == pytest.approx(cost, rel=1e-5)


def test_a_constraint_on_the_cost_is_measured_by_the_costs_of_each_example(tmp_path):
    made = config(tmp_path, ceiling={"cost": 5.0}, audit_every=0)
    ended = train(made, tmp_path / "run")
    reached = ended.summary["constraints"][0]["reached"]
    cost = ended.summary["validation"]["rules"]["argmax"]["expected_cost"][0]
    assert reached == pytest.approx(cost)


def test_evaluate_takes_other_costs_and_other_data(tmp_path, run_cli):
    made = config(tmp_path, cost={}, ignore=("amount",), class_cost={})
    run = train(made, tmp_path / "run").folder
    found = runs.evaluate_run(run, EvaluateOptions(cost={"fraud,legit": "amount"})).evaluation
    own = make_setup(config(tmp_path)).dataset.test
    assert torch.equal(found.amounts["amount"], own.amounts["amount"])
    paid = torch.where(found.argmax.decisions == own.labels, 0.0,
                       torch.where(own.labels == 0, own.amounts["amount"], 1.0))  # fmt: skip
    assert found.argmax.expected_cost.value == pytest.approx(float(paid.mean()))
    code, out, err = run_cli("evaluate", run, "--cost", "fraud,legit=amount", "--cost",
                             "legit,fraud=2", "--json", tmp_path / "out.json")  # fmt: skip
    assert code == 0, err
    assert out.startswith("cost: calling a true fraud a legit costs its amount\n")
    judged = json.loads((tmp_path / "out.json").read_text())
    assert math.isfinite(judged["rules"]["argmax"]["expected_cost"][0])
    # As new data a table is test set, all of it.
    write_table(tmp_path / "new.csv", header=("z", "amount", "x", "kind"))
    asked = EvaluateOptions(dataset=str(tmp_path / "new.csv"), cost={"fraud,legit": "amount"})
    assert torch.equal(runs.evaluate_run(run, asked).evaluation.amounts["amount"], AMOUNT)
    write_table(tmp_path / "bare.csv", header=("x", "price", "z", "kind"))
    code, _, err = run_cli("evaluate", run, "--dataset", tmp_path / "bare.csv",
                           "--cost", "fraud,legit=amount")  # fmt: skip
    assert code == 2
    assert "bare.csv has no 'amount', which cost names" in err


def test_a_feature_may_be_a_cost_as_well(tmp_path):
    """Of a run that learnt from the amounts, evaluated by them."""
    run = train(config(tmp_path, cost={}), tmp_path / "run").folder
    assert [c.name for c in runs.load(run).columns] == ["x", "amount", "z"]
    found = runs.evaluate_run(run, EvaluateOptions(cost={"fraud,legit": "amount"})).evaluation
    assert found.argmax.example_cost.max() > 1


def test_other_costs_need_no_amounts_where_the_loss_knows_none(tmp_path):
    write_table(tmp_path / "bare.csv", header=("x", "price", "z", "kind"))
    asked = EvaluateOptions(dataset=str(tmp_path / "bare.csv"), class_cost={"fraud": 9})
    run = train(config(tmp_path), tmp_path / "run").folder
    found = runs.evaluate_run(run, asked).evaluation
    assert found.rule.costs.matrix.tolist() == [[0.0, 9.0], [1.0, 0.0]]
    by_costs = train(config(tmp_path, loss="expected_cost"), tmp_path / "by").folder
    with pytest.raises(ConfigError, match="has no 'amount', which cost names"):
        runs.evaluate_run(by_costs, asked)


def test_requests_that_make_no_sense_are_refused(run_cli, tmp_path):
    path = write_table(tmp_path / "rows.csv")
    quick = ["--target", "kind", "--model", "linear", "--epochs", "0", "--quiet"]
    for args, message in (
        (["--dataset", path, "--cost", "fraud,legit=price"], "rows.csv has no 'price', which cost"),
        (["--dataset", path, "--cost", "fraud,legit=kind"], "target 'kind' cannot be ignored, nor"),
        (
            ["--dataset", path, "--cost", "fraud,legit="],
            "cost must be TRUE,DECIDED=COST, as in 9,4",
        ),
    ):
        code, _, err = run_cli(*quick, *args, "--run-dir", tmp_path / "r", program=shell.main_train)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_a_loss_of_one_matrix_for_all_is_refused(tmp_path):
    (tmp_path / "own.py").write_text(
        "def loss(logits, labels, *, cost_matrix):\n"
        "    return (cost_matrix[labels] * logits.softmax(-1)).sum(-1)\n"
    )
    with pytest.raises(ConfigError, match="reads one cost_matrix for all examples, and cost names "
                                          "'amount'"):  # fmt: skip
        make_setup(config(tmp_path, loss=f"{tmp_path}/own.py:loss"))
