import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, vmap
from torch.testing import assert_close

from funcloss import channels_first, mean
from funcloss.losses.classification import soft_cross_entropy
from funcloss.losses.divergence import distillation, generalized_kl, jensen_shannon, kl_div

DOUBLE = torch.float64
SYMMETRIC = [jensen_shannon, distillation]


def two_logits(n=50, classes=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, n, classes, generator=generator, dtype=DOUBLE)).unbind()


def edge_logits():
    """Logits, with ties, zeros, tiny and huge values among them."""
    plain, other = two_logits(8)
    plain[0], plain[1], plain[2] = 0.0, 1.5, 1e-30
    plain[3, ::2], plain[4, ::2] = 1e4, -1e4
    other[:2], other[5] = 0.0, torch.tensor([1e4, 0, 0, 0, 0, 0])
    return plain, other


# -- torch's own -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
def test_the_mean_of_torch_divides_by_the_classes_too():
    scores, targets = (z.softmax(-1) for z in two_logits())
    theirs = F.kl_div(scores.log(), targets, reduction="mean")
    assert_close(mean(kl_div(scores.log(), targets)) / 6, theirs)


def test_classes_may_stand_on_another_axis():
    first, second = (z.reshape(5, 10, 6) for z in two_logits())
    for loss in (kl_div, generalized_kl, jensen_shannon, distillation):
        second_ = second.softmax(-1) if loss in (kl_div, generalized_kl) else second
        at_1 = channels_first(loss)(first.movedim(-1, 1), second_.movedim(-1, 1))
        assert_close(at_1, loss(first, second_))


# -- limits ------------------------------------------------------------------------------------


def test_generalized_kl_of_distributions_is_kl():
    logits, others = two_logits()
    scores, targets = logits.log_softmax(-1), others.softmax(-1)
    assert_close(generalized_kl(scores, targets), kl_div(scores, targets), rtol=1e-12, atol=1e-12)


def test_generalized_kl_is_poisson_nll_less_its_least():
    logs, _ = two_logits(200)
    counts = torch.randint(9, logs.shape, generator=torch.Generator().manual_seed(1)).double()
    nll = F.poisson_nll_loss(logs, counts, log_input=True, reduction="none").sum(-1)
    least = (counts - torch.xlogy(counts, counts)).sum(-1)
    assert_close(generalized_kl(logs, counts), nll - least)
    gradient = grad(lambda z: generalized_kl(z, counts).sum())(logs)
    assert_close(gradient, logs.exp() - counts)


def test_generalized_kl_keeps_the_small_gap_of_two_large_masses():
    masses = torch.tensor([[1e6, 2e6]])
    logs = (masses.double().log() + 1e-3).float()
    gap = logs.double() - masses.double().log()
    exact = (masses * (gap.expm1() - gap)).sum(-1)
    assert_close(generalized_kl(logs, masses).double(), exact, rtol=2e-3, atol=0)


def test_distillation_at_temperature_one_is_cross_entropy_less_the_teachers_entropy():
    student, teacher = two_logits()
    probs = teacher.softmax(-1)
    entropy = soft_cross_entropy(teacher, probs)
    expected = soft_cross_entropy(student, probs) - entropy
    assert_close(distillation(student, teacher, temperature=1.0), expected)


def test_a_hot_distillation_is_half_the_mean_squared_difference_of_the_centred_logits():
    student, teacher = (z - z.mean(-1, keepdim=True) for z in two_logits())
    expected = (student - teacher).square().mean(-1) / 2
    got = distillation(student, teacher, temperature=1e4)
    assert_close(got, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_gradient_of_distillation_is_the_difference_of_the_softmaxes(temperature):
    student, teacher = two_logits()
    gradient = grad(lambda z: distillation(z, teacher, temperature=temperature).sum())(student)
    softer = [(z / temperature).softmax(-1) for z in (student, teacher)]
    assert_close(gradient, temperature * (softer[0] - softer[1]))


def test_the_temperature_may_be_mapped_over():
    student, teacher = two_logits(4)
    temperatures = torch.tensor([1.0, 2.0, 5.0], dtype=DOUBLE)
    swept = vmap(lambda t: distillation(student, teacher, temperature=t))(temperatures)
    each = [distillation(student, teacher, temperature=t) for t in temperatures.tolist()]
    assert_close(swept, torch.stack(each))


# -- range, symmetry, known values -------------------------------------------------------------


def test_jensen_shannon_is_symmetric_and_bounded():
    first, second = edge_logits()
    values = jensen_shannon(first, second)
    assert torch.equal(values, jensen_shannon(second, first))
    assert (values >= -1e-15).all()
    assert (values <= math.log(2) + 1e-15).all()
    assert torch.equal(jensen_shannon(first, first), torch.zeros(8, dtype=DOUBLE))


def test_the_gradient_of_jensen_shannon_is_as_stated():
    first, second = two_logits()
    p, q = first.softmax(-1), second.softmax(-1)
    a = (2 * p / (p + q)).log()
    expected = p * (a - (p * a).sum(-1, keepdim=True)) / 2
    assert_close(grad(lambda z: jensen_shannon(z, second).sum())(first), expected)


@pytest.mark.parametrize(
    ("loss", "first", "second", "expected"),
    [
        (kl_div, [math.log(0.25), math.log(0.75)], [0.5, 0.5], math.log(2 / math.sqrt(3))),
        (kl_div, [0.0, -math.inf], [1.0, 0.0], 0.0),
        (kl_div, [-math.inf, 0.0], [1.0, 0.0], math.inf),
        (generalized_kl, [0.0, 0.0], [1.0, 3.0], 3 * math.log(3) - 2),
        (generalized_kl, [0.0, -math.inf], [0.0, 0.0], 1.0),
        (jensen_shannon, [0.0, -math.inf], [-math.inf, 0.0], math.log(2)),
        # p = (1, 0), q = (1/2, 1/2), so m = (3/4, 1/4)
        (jensen_shannon, [0.0, -math.inf], [0.0, 0.0], 0.75 * math.log(4 / 3)),
        (distillation, [0.0, -math.inf], [0.0, -math.inf], 0.0),
        (distillation, [0.0, 0.0], [0.0, -math.inf], 4 * math.log(2)),
    ],
)
def test_known_values(loss, first, second, expected):
    first, second = torch.tensor(first, dtype=DOUBLE), torch.tensor(second, dtype=DOUBLE)
    assert_close(loss(first, second), torch.tensor(expected, dtype=DOUBLE))


@pytest.mark.parametrize("loss", [kl_div, generalized_kl])
@pytest.mark.parametrize("argnum", [0, 1])
def test_a_target_of_zero_has_finite_derivatives(loss, argnum):
    scores = torch.tensor([-0.5, -2.0, -1.0], dtype=DOUBLE)
    targets = torch.tensor([0.0, 0.4, 0.6], dtype=DOUBLE)
    assert grad(loss, argnum)(scores, targets).isfinite().all()
    assert hessian(loss, argnum)(scores, targets).isfinite().all()
    assert_close(kl_div(scores, targets), kl_div(scores[1:], targets[1:]))


def test_the_log_of_a_target_of_zero_adds_nothing():
    scores = torch.tensor([-math.inf, -2.0, -1.0], dtype=DOUBLE)
    targets = torch.tensor([0.0, 0.4, 0.6], dtype=DOUBLE)
    got = kl_div(scores, targets.log(), log_target=True)
    assert_close(got, kl_div(scores, targets))
    gradient = grad(lambda s: kl_div(s, targets.log(), log_target=True))(scores)
    assert_close(gradient, -targets)


@pytest.mark.parametrize("loss", SYMMETRIC)
@pytest.mark.parametrize("argnum", [0, 1])
def test_logits_of_minus_infinity_have_finite_derivatives(loss, argnum):
    first = torch.tensor([0.5, -math.inf, 1.0, -math.inf], dtype=DOUBLE)
    second = torch.tensor([0.0, -math.inf, -2.0, -math.inf], dtype=DOUBLE)
    assert grad(loss, argnum)(first, second).isfinite().all()


@pytest.mark.parametrize(
    ("loss", "args", "options", "error", "match"),
    [
        (
            kl_div,
            (torch.zeros(2, 3), torch.zeros(2, 4)),
            {},
            ValueError,
            r"kl_div: targets must have shape \(2, 3\) to match log_probs \(2, 3\), got \(2, 4\)",
        ),
        (
            kl_div,
            (torch.zeros(2, 3), torch.zeros(2, 3).long()),
            {},
            TypeError,
            "kl_div: targets must be floating point, got torch.int64",
        ),
        (
            generalized_kl,
            (torch.zeros(()), torch.zeros(())),
            {},
            ValueError,
            "generalized_kl: log_predictions must have 1 axes or more",
        ),
        (
            jensen_shannon,
            (torch.zeros(2, 3), torch.zeros(3)),
            {},
            ValueError,
            r"jensen_shannon: other_logits must have shape \(2, 3\)",
        ),
        (
            distillation,
            (torch.zeros(2, 3), torch.zeros(2, 3)),
            {"temperature": 0.0},
            ValueError,
            r"distillation: temperature must be in \(0, inf\), got 0.0",
        ),
        (
            distillation,
            (torch.zeros(2, 3), torch.zeros(2, 3)),
            {"where": torch.ones(2, 3, dtype=torch.bool)},
            ValueError,
            r"distillation: where must have shape \(2,\)",
        ),
    ],
)
def test_a_wrong_request_says_what_was_expected_and_what_came(loss, args, options, error, match):
    with pytest.raises(error, match=match):
        loss(*args, **options)
