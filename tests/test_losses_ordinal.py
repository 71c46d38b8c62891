import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.testing import assert_close

from funcloss import mean, weighted_mean
from funcloss.losses.classification import cross_entropy, soft_cross_entropy
from funcloss.losses.ordinal import (
    coral,
    coral_decision,
    corn,
    corn_decision,
    earth_mover,
    sord,
    sord_targets,
)


def thresholds(scale=3.0, n=50, count=4):
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(n, count, generator=generator, dtype=torch.float64)
    return logits, torch.randint(count + 1, (n,), generator=generator)


def classes(n=50):
    logits, labels = thresholds(n=n)
    return logits, labels.clamp(max=3)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 3.0, 1e4])
def test_coral_is_torchs_binary_cross_entropy_of_the_thresholds(scale):
    logits, labels = thresholds(scale)
    above = (labels[:, None] > torch.arange(4)).double()

    def theirs(z):
        return F.binary_cross_entropy_with_logits(z, above, reduction="none").sum(-1)

    size = max(1.0, scale)
    assert_close(coral(logits, labels), theirs(logits), rtol=1e-12, atol=1e-12 * size)
    ours = grad(lambda z: coral(z, labels).sum())(logits)
    assert_close(ours, logits.sigmoid() - above, rtol=1e-12, atol=1e-12)
    # With the mean over examples and thresholds that torch would take:
    averaged = F.binary_cross_entropy_with_logits(logits, above)
    assert_close(mean(coral(logits, labels)) / 4, averaged)


def test_corn_in_the_papers_tasks_and_with_the_papers_divisor():
    logits, labels = thresholds()
    total, terms = torch.zeros((), dtype=torch.float64), 0
    for k in range(4):  # task k trains on those with a label above k - 1
        reached = labels > k - 1
        total = total + F.binary_cross_entropy_with_logits(
            logits[reached, k], (labels[reached] > k).double(), reduction="sum"
        )
        terms += int(reached.sum())
    values, counts = corn(logits, labels), (labels + 1).clamp(max=4).double()
    assert_close(values.sum(), total)
    assert counts.sum() == terms
    assert_close(weighted_mean(values / counts, counts), total / terms)


def test_corn_is_the_likelihood_of_the_label():
    logits = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = corn(logits.expand(5, 4), torch.arange(5))
    assert_close((-values).exp().sum(), torch.ones((), dtype=torch.float64))


def test_two_classes_are_the_binary_losses():
    logits, labels = thresholds(count=1)
    binary = F.binary_cross_entropy_with_logits(logits[:, 0], labels.double(), reduction="none")
    assert_close(coral(logits, labels), binary)
    assert_close(corn(logits, labels), binary)
    two = torch.cat([torch.zeros_like(logits), logits], -1)
    assert_close(earth_mover(two, labels), (logits[:, 0].sigmoid() - labels).square())


@pytest.mark.parametrize("label", range(5))
def test_a_certain_decision_off_by_d_costs_earth_mover_d(label):
    decided = torch.arange(5)
    logits = 1e4 * torch.eye(5)
    values = earth_mover(logits, torch.full((5,), label))
    assert_close(values, (decided - label).abs().float())


def test_earth_mover_known_value():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    # Cumulative 0.1, 0.3, 0.6, 1 against 0, 0, 1, 1.
    value = earth_mover(logits, torch.tensor(2))
    assert_close(value, torch.tensor(0.01 + 0.09 + 0.16, dtype=torch.float64))


def test_sord_between_uniform_and_one_hot():
    logits, labels = classes()
    assert_close(sord(logits, labels, scale=1e4), cross_entropy(logits, labels))
    uniform = cross_entropy(logits, labels, label_smoothing=1.0)
    assert_close(sord(logits, labels, scale=0.0), uniform)


def test_sord_is_the_cross_entropy_to_its_targets():
    logits, labels = classes()
    targets = sord_targets(labels, 4, scale=0.3, dtype=torch.float64)
    values = sord(logits, labels, scale=0.3)
    assert_close(values, soft_cross_entropy(logits, targets))
    assert_close(values, F.cross_entropy(logits, targets, reduction="none"))
    gradient = grad(lambda z: sord(z, labels, scale=0.3).sum())(logits)
    assert_close(gradient, logits.softmax(-1) - targets)


def test_sord_targets_are_the_papers():
    targets = sord_targets(torch.tensor([0, 2]), 3, scale=1.0, dtype=torch.float64)
    weights = [1.0, math.exp(-1), math.exp(-4)]
    row = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)
    assert_close(targets, torch.stack([row, row.flip(0)]))
    assert sord_targets(torch.tensor(0), 3).dtype == torch.get_default_dtype()
    assert sord_targets(torch.zeros(2, 3).long(), 4).shape == (2, 3, 4)


def test_the_scale_of_sord_may_be_mapped_over():
    logits, labels = classes(n=4)
    scales = torch.tensor([0.0, 0.7], dtype=torch.float64)
    mapped = vmap(lambda s: sord(logits, labels, scale=s))(scales)
    each = [sord(logits, labels, scale=s) for s in (0.0, 0.7)]
    assert_close(mapped, torch.stack(each))


@pytest.mark.parametrize(
    ("decision", "logits", "expected"),
    [
        (coral_decision, [[3.0, 2.0, 1.0], [3.0, 2.0, -1.0], [-1.0, -2.0, -3.0]], [3, 2, 0]),
        (coral_decision, [[0.0, -1.0, -1.0]], [0]),  # exactly 1 / 2 is not passed
        # 0.8 * 0.8 = 0.64 and 0.64 * 0.7 = 0.448: above 1 / 2 each, together not.
        (corn_decision, [[math.log(4), math.log(4), math.log(7 / 3)]], [2]),
        (corn_decision, [[-1.0, 9.0, 9.0], [1e4, 1e4, 1e4], [-1e4, 0.0, 0.0]], [0, 3, 0]),
    ],
)
def test_decisions(decision, logits, expected):
    assert decision(torch.tensor(logits)).tolist() == expected


@pytest.mark.parametrize(("loss", "decide"), [(coral, coral_decision), (corn, corn_decision)])
def test_descent_on_the_loss_leads_to_the_decision_of_the_label(loss, decide):
    labels = torch.arange(5)
    logits = torch.zeros(5, 4, dtype=torch.float64)
    step = grad(lambda z: loss(z, labels).sum())
    for _ in range(200):
        logits = logits - step(logits)
    assert decide(logits).tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: coral(torch.zeros(2, 3), torch.zeros(3).long()),
            ValueError,
            r"coral: labels must have shape \(2,\) to match logits \(2, 3\), got \(3,\)",
        ),
        (
            lambda: corn(torch.zeros(2, 3), torch.zeros(2)),
            TypeError,
            "corn: labels must hold integer classes, got torch.float32",
        ),
        (
            lambda: earth_mover(torch.zeros(2, 3).long(), torch.zeros(2).long()),
            TypeError,
            "earth_mover: logits must be floating point, got torch.int64",
        ),
        (
            lambda: sord(torch.zeros(2, 3), torch.zeros(2).long(), scale=-1.0),
            ValueError,
            r"sord_targets: scale must be in \[0, inf\), got -1.0",
        ),
        (
            lambda: sord_targets(torch.zeros(2), 3),
            TypeError,
            "sord_targets: labels must hold integer classes, got torch.float32",
        ),
        (
            lambda: sord_targets(torch.zeros(2).long(), 3, scale=-1.0),
            ValueError,
            r"sord_targets: scale must be in \[0, inf\), got -1.0",
        ),
        (
            lambda: coral_decision(torch.zeros(2).long()),
            TypeError,
            "coral_decision: logits must be floating point, got torch.int64",
        ),
        (
            lambda: corn_decision(torch.zeros(2).long()),
            TypeError,
            "corn_decision: logits must be floating point, got torch.int64",
        ),
    ],
)
def test_a_wrong_request_says_what_was_expected(call, error, match):
    with pytest.raises(error, match=match):
        call()
