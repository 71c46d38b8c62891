"""One table of losses, one test a law: a new loss is a new row."""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.testing import assert_close

from funcloss import class_weighted, from_logits, losses, one_hot_targets


class Case(NamedTuple):
    """A loss, what it is fed, and the same in torch."""

    loss: object
    batch: object  # n, generator -> (predictions, targets)
    torch_loss: object  # (predictions, targets) -> values


def logits_and_labels(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(5, (n,), generator=generator)


def log_probs_and_labels(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits, labels = logits_and_labels(n, generator)
    return logits.log_softmax(-1), labels


def values_and_targets(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, n, generator=generator, dtype=torch.float64).unbind())


WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, 5.0], dtype=torch.float64)


def weighted_cross_entropy(logits, labels, *, where=None):
    weights = WEIGHTS.to(logits.dtype)
    return class_weighted(losses.cross_entropy)(logits, labels, class_weights=weights, where=where)


def torch_squared_error_of_one_hot(logits, labels):
    return F.mse_loss(logits, F.one_hot(labels, 5).to(logits), reduction="none").sum(-1)


CASES = {
    "cross_entropy": Case(
        losses.cross_entropy,
        logits_and_labels,
        lambda z, y: F.cross_entropy(z, y, reduction="none"),
    ),
    "nll": Case(losses.nll, log_probs_and_labels, lambda z, y: F.nll_loss(z, y, reduction="none")),
    "squared_error": Case(
        losses.squared_error, values_and_targets, lambda p, t: F.mse_loss(p, t, reduction="none")
    ),
    "class_weighted": Case(
        weighted_cross_entropy,
        logits_and_labels,
        lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS.to(z), reduction="none"),
    ),
    "from_logits": Case(
        from_logits(losses.nll),
        logits_and_labels,
        lambda z, y: F.cross_entropy(z, y, reduction="none"),
    ),
    "one_hot_targets": Case(
        one_hot_targets(losses.squared_error), logits_and_labels, torch_squared_error_of_one_hot
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


def make(case: Case, n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    return case.batch(n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_values_and_gradients_are_those_of_torch(case, dtype, tolerance):
    for scale in (1.0, 1e-3, 1e3):
        predictions, targets = make(case, n=200)
        predictions = (predictions * scale).to(dtype)
        targets = targets.to(dtype) if targets.is_floating_point() else targets
        ours, theirs = case.loss(predictions, targets), case.torch_loss(predictions, targets)
        size = theirs.abs().clamp(min=1.0).maximum(predictions.abs().reshape(200, -1).amax(-1))
        assert ((ours - theirs).abs() / size).max() < tolerance
        ours = grad(lambda p: case.loss(p, targets).sum())(predictions)  # noqa: B023
        theirs = grad(lambda p: case.torch_loss(p, targets).sum())(predictions)  # noqa: B023
        assert_close(ours, theirs, rtol=10 * tolerance, atol=10 * tolerance * max(1.0, scale))


@pytest.mark.parametrize("n", [0, 1, 6])
def test_a_batch_is_a_map_over_examples(case, n):
    batch = make(case, n=max(n, 1))
    batch = tuple(b[:n] for b in batch)
    values = case.loss(*batch)
    assert values.shape == (n,)
    if n:
        assert_close(vmap(case.loss)(*batch), values)
        each = torch.stack([case.loss(p, t) for p, t in zip(*batch, strict=True)])
        assert_close(each, values)


def test_more_batch_axes_are_more_examples(case):
    predictions, targets = make(case, n=6)
    folded = case.loss(predictions.unflatten(0, (2, 3)), targets.unflatten(0, (2, 3)))
    assert_close(folded, case.loss(predictions, targets).unflatten(0, (2, 3)))


def test_per_sample_gradients_sum_to_the_batch_gradient(case):
    predictions, targets = make(case)

    def of_scale(scale, p, t):
        return case.loss(scale * p, t).sum()

    scale = torch.tensor(1.3, dtype=torch.float64)
    each = vmap(grad(of_scale), in_dims=(None, 0, 0))(scale, predictions, targets)
    assert_close(each.sum(), grad(of_scale)(scale, predictions, targets))


def test_derivatives_agree_with_finite_differences(case):
    predictions, targets = make(case, n=3)
    predictions.requires_grad_()
    assert gradcheck(lambda p: case.loss(p, targets), predictions, check_forward_ad=True)
    assert gradgradcheck(lambda p: case.loss(p, targets), predictions)


def test_forward_and_reverse_mode_agree_and_the_hessian_is_symmetric(case):
    predictions, targets = make(case, n=3)

    def of(p):
        return case.loss(p, targets)

    assert_close(jacrev(of)(predictions), jacfwd(of)(predictions))
    size = predictions.numel()
    second = hessian(lambda p: of(p).sum())(predictions).reshape(size, size)
    assert_close(second, second.T)


def compiled_forms(case):
    return {
        "value": case.loss,
        "grad": grad(lambda p, t: case.loss(p, t).sum()),
        "vmap of grad": vmap(grad(case.loss)),
    }


@pytest.mark.parametrize("form", ["value", "grad", "vmap of grad"])
def test_it_is_one_graph(case, form):
    batch = make(case)
    fn = compiled_forms(case)[form]
    assert_close(torch.compile(fn, fullgraph=True, backend="aot_eager")(*batch), fn(*batch))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["value", "grad", "vmap of grad"])
def test_the_compiler_gives_the_same(case, form):
    batch = make(case)
    fn = compiled_forms(case)[form]
    assert_close(torch.compile(fn, fullgraph=True)(*batch), fn(*batch))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan, 1e300])
def test_what_is_masked_is_as_good_as_dropped(case, bad):
    predictions, targets = make(case)
    where = torch.tensor([True, False, True, True, False, True])
    spoilt = predictions.clone()
    spoilt[~where] = bad
    wrong = targets.clone()
    wrong[~where] = bad if targets.is_floating_point() else 99

    def total(p):
        return case.loss(p, wrong, where=where).sum()

    values = case.loss(spoilt, wrong, where=where)
    assert_close(values[where], case.loss(predictions[where], targets[where]))
    assert (values[~where] == 0).all()
    kept = grad(lambda p: case.loss(p, targets[where]).sum())(predictions[where])
    assert_close(grad(total)(spoilt)[where], kept)
    assert (grad(total)(spoilt)[~where] == 0).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_predictions_give_finite_values_and_gradients(case, size, dtype):
    predictions, targets = make(case, n=5)
    predictions = torch.zeros_like(predictions, dtype=dtype)
    predictions.view(-1)[::2] = size
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    assert case.loss(predictions, targets).isfinite().all()
    assert grad(lambda p: case.loss(p, targets).sum())(predictions).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_that_came_in_goes_out_and_half_is_computed_in_single(case, dtype):
    predictions, targets = make(case)
    predictions = predictions.to(dtype)
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    values = case.loss(predictions, targets)
    assert values.dtype == dtype
    wide = targets.double() if targets.is_floating_point() else targets
    exact = case.torch_loss(predictions.double(), wide)
    assert_close(values.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3 if dtype in
                 (torch.float16, torch.bfloat16) else 1e-5)  # fmt: skip


def test_the_arguments_stay_as_they_were_and_the_answer_too(case):
    predictions, targets = make(case)
    before = predictions.clone(), targets.clone()
    first = case.loss(predictions, targets)
    assert torch.equal(case.loss(predictions, targets), first)
    assert torch.equal(predictions, before[0])
    assert torch.equal(targets, before[1])


@pytest.mark.parametrize("name", ["cross_entropy", "nll", "squared_error"])
def test_the_annotations_are_true(name):
    case = CASES[name]
    checked = jaxtyped(typechecker=beartype)(case.loss)
    predictions, targets = make(case)
    checked(predictions, targets, where=torch.ones(6, dtype=torch.bool))


def test_known_values():
    # The five examples of the hand-written cross-entropy tutorial, as published.
    logits = torch.tensor(
        [
            [1.1785, -0.0969, 0.5756, -1.2113, -0.1120],
            [-0.5199, -0.8051, 1.0953, 0.1480, 0.2879],
            [2.3401, 0.6403, 1.4306, 0.0982, -0.7363],
        ]
    )
    labels = torch.tensor([4, 3, 1])
    published = torch.tensor(
        [
            [0.1520, 0.0424, 0.0832, 0.0139, -0.2915],
            [0.0304, 0.0228, 0.1528, -0.2741, 0.0681],
            [0.1918, -0.2983, 0.0772, 0.0204, 0.0088],
        ]
    )
    assert_close(
        losses.cross_entropy(logits, labels).mean(), torch.tensor(2.0187), atol=5e-5, rtol=0
    )
    gradient = grad(lambda z: losses.cross_entropy(z, labels).mean())(logits)
    assert_close(gradient, published, atol=5.1e-5, rtol=0)


def test_the_difference_of_two_large_logits_is_exact():
    # logsumexp(z) - z[y] would be off by 4e-4 here.
    logits = torch.tensor([[1e4, 1e4 - 0.5]])
    exact = math.log1p(math.exp(-0.5))
    assert_close(losses.cross_entropy(logits, torch.tensor([0])), torch.tensor([exact]))


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 4), max_size=3),
    classes=st.integers(1, 6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_any_shape_keeps_its_batch_axes(shape, classes, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, classes, generator=generator).to(dtype)
    labels = torch.randint(classes, shape, generator=generator)
    where = torch.rand(shape, generator=generator) > 0.5
    values = losses.cross_entropy(logits, labels, where=where)
    assert values.shape == tuple(shape)
    assert values.dtype == dtype
    assert (values >= 0).all()
    assert (values[~where] == 0).all()


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        (
            (torch.zeros(8, 10), torch.zeros(8, 10).long()),
            {},
            ValueError,
            r"labels must have shape \(8,\) to match logits \(8, 10\), got \(8, 10\)",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(2)),
            {},
            TypeError,
            "cross_entropy: labels must hold integer classes, got torch.float32",
        ),
        (
            (torch.zeros(2, 3).long(), torch.zeros(2).long()),
            {},
            TypeError,
            "cross_entropy: logits must be floating point, got torch.int64",
        ),
        (
            (torch.zeros(()), torch.zeros(()).long()),
            {},
            ValueError,
            "cross_entropy: logits must have a class axis",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(2).long()),
            {"where": torch.ones(2)},
            TypeError,
            "cross_entropy: where must be boolean, got torch.float32",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(2).long()),
            {"where": torch.ones(3, dtype=torch.bool)},
            ValueError,
            r"cross_entropy: where must have shape \(2,\)",
        ),
    ],
)
def test_a_wrong_request_says_what_was_expected_and_what_came(args, options, error, message):
    with pytest.raises(error, match=message):
        losses.cross_entropy(*args, **options)


def test_squared_error_refuses_targets_of_another_shape():
    with pytest.raises(ValueError, match=r"squared_error: targets must have shape \(2, 1\)"):
        losses.squared_error(torch.zeros(2, 1), torch.zeros(2))
