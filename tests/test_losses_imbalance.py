"""The losses for imbalanced classes, where they meet others and where the papers give numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.testing import assert_close

from funcloss import mean, weighted_mean
from funcloss.losses.classification import cross_entropy
from funcloss.losses.imbalance import (
    balanced_softmax,
    effective_number_weights,
    equalization,
    ldam,
    logit_adjusted,
    vector_scaling,
)

COUNTS = torch.tensor([500.0, 120.0, 30.0, 8.0, 1.0], dtype=torch.float64)
ABSENT = torch.tensor([500.0, 120.0, 30.0, 0.0, 0.0], dtype=torch.float64)
EQUAL = torch.full((5,), 40.0, dtype=torch.float64)
TAU = 1.3


def logits_of(kind: str, n: int = 50) -> torch.Tensor:
    logits = torch.randn(n, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if kind == "ties":
        return logits.round()
    scale = {"random": 3.0, "tiny": 1e-9, "zeros": 0.0, "large": 1e4}[kind]
    return logits * scale


LABELS = torch.arange(50) % 5


def cdt(z, y):
    """Ye et al., 2020: logits over class-dependent temperatures, (n_max / n)^gamma."""
    return F.cross_entropy(z / (COUNTS.max() / COUNTS).to(z) ** 0.2, y, reduction="none")


def log_prior(z):
    return (COUNTS / COUNTS.sum()).log().to(z)


def of_counts(loss, counts=COUNTS, **options):
    return lambda z, y: loss(z, y, class_counts=counts.to(z), **options)


def of_prior(prior, tau):
    return lambda z, y: logit_adjusted(z, y, class_prior=prior.to(z), tau=tau)


def torch_cross_entropy(z, y):
    return F.cross_entropy(z, y, reduction="none")


def torch_adjusted(tau):
    return lambda z, y: F.cross_entropy(z + tau * log_prior(z), y, reduction="none")


def torch_one_against_all(z, y):
    targets = F.one_hot(y, 5).to(z)
    return F.binary_cross_entropy_with_logits(z, targets, reduction="none").sum(-1)


MEETINGS = {
    "balanced_softmax, equal counts": (of_counts(balanced_softmax, EQUAL), torch_cross_entropy),
    "balanced_softmax": (of_counts(balanced_softmax), torch_adjusted(1.0)),
    "logit_adjusted, tau = 0": (of_prior(COUNTS, 0.0), torch_cross_entropy),
    "logit_adjusted, equal prior": (of_prior(EQUAL / 200, TAU), torch_cross_entropy),
    "logit_adjusted, tau = 1": (of_prior(COUNTS / 659, 1.0), of_counts(balanced_softmax)),
    "logit_adjusted": (of_prior(COUNTS, TAU), torch_adjusted(TAU)),
    "ldam, no margin": (of_counts(ldam, max_margin=0.0, scale=1.0), torch_cross_entropy),
    "vector_scaling, neither": (
        of_counts(vector_scaling, gamma=0.0, tau=0.0),
        torch_cross_entropy,
    ),
    "vector_scaling, equal counts": (of_counts(vector_scaling, EQUAL), torch_cross_entropy),
    "vector_scaling, gamma = 0": (
        of_counts(vector_scaling, gamma=0.0, tau=TAU),
        of_prior(COUNTS, TAU),
    ),
    "vector_scaling, tau = 0": (of_counts(vector_scaling, gamma=0.2, tau=0.0), cdt),
    "equalization, threshold = 0": (
        of_counts(equalization, threshold=0.0),
        torch_one_against_all,
    ),
}


@pytest.mark.parametrize("kind", ["random", "tiny", "zeros", "ties", "large"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("ours", "theirs"), MEETINGS.values(), ids=MEETINGS.keys())
def test_where_an_option_is_neutral_it_is_another_loss(ours, theirs, dtype, tolerance, kind):
    logits = logits_of(kind).to(dtype)
    got, expected = ours(logits, LABELS), theirs(logits, LABELS)
    size = expected.abs().maximum(logits.abs().amax(-1)).clamp(min=1.0)
    assert ((got - expected).abs() <= tolerance * size).all()
    got, expected = (grad(lambda z: f(z, LABELS).sum())(logits) for f in (ours, theirs))  # noqa: B023
    # A gradient is as exact as its softmax, whose logits carry this rounding.
    assert ((got - expected).abs() <= 4 * tolerance * size[:, None]).all()


def test_the_reductions_of_torch():
    logits, prior = logits_of("random"), COUNTS / COUNTS.sum()
    adjusted = logits + log_prior(logits)
    values = balanced_softmax(logits, LABELS, class_counts=COUNTS)
    assert_close(values.sum(), F.cross_entropy(adjusted, LABELS, reduction="sum"))
    assert_close(mean(values), F.cross_entropy(adjusted, LABELS))
    weights = effective_number_weights(COUNTS)
    # torch divides by the weights of the batch, which weighted_mean does by name.
    expected = F.cross_entropy(adjusted, LABELS, weight=weights)
    assert_close(weighted_mean(values, weights[LABELS]), expected)
    assert_close(values, logit_adjusted(logits, LABELS, class_prior=prior))


@pytest.mark.parametrize(
    ("counts", "beta", "expected"),
    [
        ([3.0, 3.0, 3.0], 0.999, [1.0, 1.0, 1.0]),
        ([1.0, 2.0], 0.9, [2 / (1 + 0.1 / 0.19), 2 * (0.1 / 0.19) / (1 + 0.1 / 0.19)]),
        ([7.0, 90.0], 0.0, [1.0, 1.0]),
        ([1.0, 3.0], 1.0, [1.5, 0.5]),
        ([1.0, 3.0, 0.0], 1.0, [2.25, 0.75, 0.0]),  # an absent class
        ([1.0, 3.0], 1 - 1e-13, [1.5, 0.5]),
    ],
)
def test_effective_number_weights(counts, beta, expected):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        got = effective_number_weights(torch.tensor(counts, dtype=dtype), beta=beta)
        assert_close(got, torch.tensor(expected, dtype=dtype), rtol=tolerance, atol=tolerance)


def test_effective_number_weights_are_exact_in_single_precision():
    counts = torch.tensor([6000.0, 600.0, 60.0])
    for beta in (0.9999, 0.99999, 1 - 1e-9):
        raw = [math.expm1(math.log1p(beta - 1)) / math.expm1(n * math.log(beta)) for n in counts]
        expected = torch.tensor([3 * w / sum(raw) for w in raw])
        assert_close(effective_number_weights(counts, beta=beta), expected, rtol=1e-6, atol=0)


def test_effective_number_weights_are_mapped_over_and_differentiated_by_beta():
    betas = torch.tensor([0.0, 0.9, 0.999, 1.0], dtype=torch.float64)
    each = [effective_number_weights(COUNTS, beta=beta) for beta in betas.tolist()]
    mapped = vmap(lambda beta: effective_number_weights(COUNTS, beta=beta))(betas)
    assert_close(mapped, torch.stack(each))

    def rarest(beta):
        return effective_number_weights(COUNTS, beta=beta)[-1]

    slope = (rarest(0.9 + 1e-6) - rarest(0.9 - 1e-6)) / 2e-6
    assert_close(grad(rarest)(betas[1]), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        # Balanced softmax by hand: the chance of label 0 is 1 / (1 + 9 e) at logits 0 and 1.
        (
            balanced_softmax(
                torch.tensor([0.0, 1.0]), torch.tensor(0), class_counts=torch.tensor([1.0, 9.0])
            ),
            math.log1p(9 * math.e),
        ),
        # LDAM: the margins are 0.5 and 0.5 / 16^(1/4) = 0.25.
        (
            ldam(
                torch.tensor([0.75, 0.25]), torch.tensor(0), class_counts=torch.tensor([1.0, 16.0])
            ),
            math.log(2),
        ),
        (
            ldam(
                torch.tensor([0.5, 0.5]),
                torch.tensor(1),
                class_counts=torch.tensor([1.0, 16.0]),
                scale=4.0,
            ),
            math.log1p(math.e),
        ),
        # Vector scaling: the logits 2 and 8 at counts 1 and 16, gamma = 1/4, are 1 and 8.
        (
            vector_scaling(
                torch.tensor([2.0, 8.0]),
                torch.tensor(0),
                class_counts=torch.tensor([1.0, 16.0]),
                gamma=0.25,
                tau=0.0,
            ),
            7 + math.log1p(math.exp(-7)),
        ),
        # Equalization: class 2 is rare and not the label, so its term falls away.
        (
            equalization(
                torch.tensor([0.0, 0.0, 5.0]),
                torch.tensor(0),
                class_counts=torch.tensor([50.0, 49.0, 1.0]),
                threshold=0.1,
            ),
            2 * math.log(2),
        ),
    ],
    ids=["balanced_softmax", "ldam, rarest", "ldam", "vector_scaling", "equalization"],
)
def test_known_values(got, expected):
    assert_close(got, torch.tensor(expected))


def test_a_rare_class_is_pushed_by_its_own_examples_alone():
    logits = logits_of("random")
    push = grad(lambda z: of_counts(equalization, threshold=0.02)(z, LABELS).sum())(logits)
    rare = COUNTS / COUNTS.sum() < 0.02
    assert rare.tolist() == [False, False, False, True, True]
    own = LABELS[:, None] == torch.arange(5)
    assert (push[:, rare][own[:, rare]] < 0).all()
    assert (push[:, rare][~own[:, rare]] == 0).all()
    assert (push[:, ~rare] != 0).all()


LOSSES = {
    "balanced_softmax": of_counts(balanced_softmax, ABSENT),
    "logit_adjusted": of_prior(ABSENT, TAU),
    "ldam": of_counts(ldam, ABSENT),
    "vector_scaling": of_counts(vector_scaling, ABSENT),
    "equalization": of_counts(equalization, ABSENT, threshold=0.1),
}


@pytest.mark.parametrize("kind", ["random", "large"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_absent_classes_leave_all_finite(loss, kind):
    for dtype in (torch.float32, torch.float64):
        logits = logits_of(kind).to(dtype)
        assert loss(logits, LABELS).isfinite().all()
        assert grad(lambda z: loss(z, LABELS).sum())(logits).isfinite().all()


@pytest.mark.parametrize("name", ["balanced_softmax", "ldam", "vector_scaling"])
def test_the_derivative_by_counts_is_finite_where_a_class_is_absent(name):
    loss = {"balanced_softmax": balanced_softmax, "ldam": ldam, "vector_scaling": vector_scaling}
    logits = logits_of("random")
    by_counts = grad(lambda c: loss[name](logits, LABELS, class_counts=c).sum())(ABSENT)
    assert by_counts.isfinite().all()
    assert (by_counts[3:] == 0).all()
    assert (by_counts[:3] != 0).any()


def test_an_absent_class_is_left_out_of_the_softmax():
    logits, labels = logits_of("random"), LABELS % 3
    got = balanced_softmax(logits, labels, class_counts=ABSENT)
    expected = cross_entropy(logits[:, :3] + ABSENT[:3].log(), labels)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


LOGITS, ZERO = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)
N = torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: balanced_softmax(LOGITS, ZERO, class_counts=torch.ones(4)),
            ValueError,
            r"balanced_softmax: class_counts must have shape \(3,\) to match logits \(2, 3\)",
        ),
        (
            lambda: balanced_softmax(LOGITS, ZERO, class_counts=torch.ones(3).long()),
            TypeError,
            "balanced_softmax: class_counts must be floating point, got torch.int64",
        ),
        (
            lambda: logit_adjusted(LOGITS, ZERO, class_prior=N, tau=-1.0),
            ValueError,
            r"logit_adjusted: tau must be in \[0, inf\), got -1.0",
        ),
        (
            lambda: ldam(LOGITS, ZERO, class_counts=N, scale=0.0),
            ValueError,
            r"ldam: scale must be in \(0, inf\), got 0.0",
        ),
        (
            lambda: ldam(LOGITS, ZERO, class_counts=N, max_margin=-0.5),
            ValueError,
            "ldam: max_margin must be in",
        ),
        (
            lambda: vector_scaling(LOGITS, ZERO, class_counts=N, gamma=-0.5),
            ValueError,
            "vector_scaling: gamma must be in",
        ),
        (
            lambda: equalization(LOGITS, ZERO, class_counts=N, threshold=1.5),
            ValueError,
            r"equalization: threshold must be in \[0, 1\], got 1.5",
        ),
        (
            lambda: equalization(LOGITS, LOGITS, class_counts=N, threshold=0.5),
            TypeError,
            "equalization: labels must hold integer classes",
        ),
        (
            lambda: effective_number_weights(torch.ones(2, 2)),
            ValueError,
            r"effective_number_weights: class_counts must have shape \(classes,\), got \(2, 2\)",
        ),
        (
            lambda: effective_number_weights(N, beta=1.1),
            ValueError,
            r"effective_number_weights: beta must be in \[0, 1\], got 1.1",
        ),
    ],
)
def test_a_wrong_request_says_what_was_expected_and_what_came(call, error, message):
    with pytest.raises(error, match=message):
        call()
