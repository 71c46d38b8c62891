import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, grad_and_value, vmap
from torch.testing import assert_close

from funcloss import class_weighted, class_weights_of, losses, mean, weighted_mean
from funcloss.objectives import mean_of, sum_of, weighted_mean_of
from funcloss.reduction import REDUCTIONS, divisor, fraction
from funcloss.typing import Batch

WEIGHTS = torch.tensor([1.0, 5.0, 0.5])


def batch(n=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, generator=generator), torch.randint(3, (n,), generator=generator)


def test_mean_divides_by_the_examples_that_count():
    values = torch.tensor([1.0, 2.0, torch.inf, 6.0])
    where = torch.tensor([True, True, False, True])
    assert mean(values, where=where) == 3.0
    assert mean(values[where]) == 3.0


def test_mean_of_half_precision_does_not_overflow_on_the_way():
    values = torch.full((4000,), 60000.0, dtype=torch.float16)
    assert mean(values, where=torch.ones(4000, dtype=torch.bool)) == 60000.0
    assert mean(values, where=torch.ones(4000, dtype=torch.bool)).dtype == torch.float16
    weights = torch.ones(4000, dtype=torch.float16)
    assert weighted_mean(values, weights) == 60000.0


def test_weighted_mean_is_torchs_division_and_mean_is_not():
    logits, labels = batch()
    values = losses.cross_entropy(logits, labels)
    torchs = F.cross_entropy(logits, labels, weight=WEIGHTS)
    assert_close(weighted_mean(values, class_weights_of(WEIGHTS, labels)), torchs)
    ours = mean(class_weighted(losses.cross_entropy)(logits, labels, class_weights=WEIGHTS))
    summed = F.cross_entropy(logits, labels, weight=WEIGHTS, reduction="sum")
    assert_close(ours, summed / len(labels))


def test_a_masked_weight_does_not_count():
    values, weights = torch.tensor([1.0, 9.0, 4.0]), torch.tensor([2.0, torch.nan, 1.0])
    where = torch.tensor([True, False, True])
    assert weighted_mean(values, weights, where=where) == 2.0
    gradient = grad(lambda v: weighted_mean(v, weights, where=where))(values)
    assert_close(gradient, torch.tensor([2 / 3, 0.0, 1 / 3]))


def test_at_batch_size_one_the_weight_acts_in_a_mean_and_cancels_in_torchs():
    logits, labels = batch()

    def with_mean(z, y):
        return mean(class_weighted(losses.cross_entropy)(z, y, class_weights=WEIGHTS))

    def as_torch(z, y):
        return weighted_mean(losses.cross_entropy(z, y), class_weights_of(WEIGHTS, y))

    plain = vmap(grad(lambda z, y: losses.cross_entropy(z, y)))(logits, labels)
    single = logits[:, None], labels[:, None]
    weighted = vmap(grad(with_mean))(*single).squeeze(1)
    cancelled = vmap(grad(as_torch))(*single).squeeze(1)
    assert_close(weighted, WEIGHTS[labels][:, None] * plain)
    assert_close(cancelled, plain)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_numerators_and_denominators_of_parts_add_up_to_the_whole(reduction):
    logits, labels = batch()
    where = torch.arange(8) % 3 > 0
    values = losses.cross_entropy(logits, labels)
    weights = class_weights_of(WEIGHTS, labels)
    total = (weights * values)[where].sum()
    by = {"mean": 5.0, "weighted_mean": weights[where].sum(), "sum": 1.0}[reduction]
    found = divisor(reduction, where.sum(), weights[where].sum())
    assert float(found) == pytest.approx(float(by))
    parts = [
        fraction(reduction, (weights * values)[k], weights=weights[k], where=where[k])
        for k in (slice(0, 2), slice(2, 8))
    ]
    numerator = sum(part.numerator for part in parts)
    denominator = 1.0 if reduction == "sum" else sum(part.denominator for part in parts)
    assert_close(numerator / denominator, total / by)
    criterion = {
        "mean": mean_of(class_weighted(losses.cross_entropy)),
        "weighted_mean": weighted_mean_of(losses.cross_entropy),
        "sum": sum_of(class_weighted(losses.cross_entropy)),
    }[reduction]
    hyper = {"learning_rate": torch.tensor(1.0), "class_weights": WEIGHTS}
    assert_close(criterion(logits, Batch(None, labels, where), hyper), total / by)


@pytest.mark.parametrize("criterion", [mean_of, sum_of, weighted_mean_of])
def test_a_criterion_is_pickled_and_equal_to_another_of_the_same(criterion):
    made = criterion(class_weighted(losses.softmax_focal))
    assert (
        pickle.loads(pickle.dumps(made)) == made == criterion(class_weighted(losses.softmax_focal))
    )
    assert made != criterion(losses.softmax_focal)


NONE = torch.zeros(3, dtype=torch.bool)


@pytest.mark.parametrize(
    "reduce",
    [
        lambda values, **given: mean(values, where=NONE, **given),
        lambda values, **given: weighted_mean(values, torch.ones(3), where=NONE, **given),
        lambda values, **given: weighted_mean(values, torch.zeros(3), **given),
        lambda values, **given: mean(values, divisor=torch.tensor(0), where=NONE, **given),
        lambda values, **given: mean(values[:0], **given),
        lambda values, **given: mean(values[:0], divisor=0, **given),
    ],
)
def test_of_nothing_it_is_nan_or_what_is_asked_for_with_zero_gradient(reduce):
    values = torch.tensor([1.0, torch.inf, torch.nan])
    assert reduce(torch.ones(3), empty=7.0) == 7.0
    assert reduce(torch.ones(3)).isnan()
    assert torch.equal(grad(lambda v: reduce(v, empty=0.0))(torch.ones(3)), torch.zeros(3))
    if "NONE" in reduce.__code__.co_names:  # what does not count may hold anything
        assert reduce(values, empty=0.0) == 0.0
        assert torch.equal(grad(lambda v: reduce(v, empty=0.0))(values), torch.zeros(3))


def test_what_is_empty_changes_nothing_else_and_maps():
    values, where = torch.tensor([1.0, 3.0, 8.0]), torch.tensor([True, True, False])
    assert mean(values, where=where, empty=0.0) == 2.0
    masks = torch.stack([where, NONE])
    mapped = vmap(lambda w: mean(values, where=w, empty=0.0))(masks)
    assert torch.equal(mapped, torch.tensor([2.0, 0.0]))
    compiled = torch.compile(lambda w: mean(values, where=w, empty=0.0), backend="aot_eager")
    assert compiled(NONE) == 0.0


@pytest.mark.parametrize("whole", [5, 5.0, torch.tensor(5), torch.tensor(5.0)])
def test_batches_divided_by_the_number_of_all_add_up_to_the_whole(whole):
    logits, labels = batch()
    where, weights = torch.arange(8) % 3 > 0, class_weights_of(WEIGHTS, labels)
    parts = [slice(0, 2), slice(2, 7), slice(7, 8)]

    def of(z, k, **given):
        return mean(losses.cross_entropy(z[k], labels[k]), where=where[k], **given)

    def accumulated(z):
        return sum(of(z, k, divisor=whole) for k in parts)

    slope, added = grad_and_value(accumulated)(logits)
    assert_close(added, of(logits, slice(None)))
    assert_close(slope, grad(lambda z: of(z, slice(None)))(logits))
    values, total = losses.cross_entropy(logits, labels), weights[where].sum()
    each = [weighted_mean(values[k], weights[k], where=where[k], divisor=total) for k in parts]
    assert_close(sum(each), weighted_mean(values, weights, where=where))


def test_an_infinite_value_at_weight_zero_adds_nothing():
    values, weights = torch.tensor([torch.inf, 2.0]), torch.tensor([0.0, 3.0])
    assert weighted_mean(values, weights) == 2.0
    assert grad(lambda v: weighted_mean(v, weights))(values).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mean(torch.ones(2).long()), TypeError, "mean: values must be floating point"),
        (
            lambda: mean(torch.ones(2), where=torch.ones(3, dtype=torch.bool)),
            ValueError,
            r"mean: where must have shape \(2,\)",
        ),
        (
            lambda: weighted_mean(torch.ones(2), torch.ones(3)),
            ValueError,
            r"weighted_mean: weights must have shape \(2,\) to match values, got \(3,\)",
        ),
        (
            lambda: mean(torch.ones(2), divisor=-1),
            ValueError,
            r"mean: divisor must be in \[0, inf\)",
        ),
        (
            lambda: mean(torch.ones(2), divisor=torch.ones(2)),
            ValueError,
            r"mean: divisor must be a number or a scalar tensor; got shape \(2,\)",
        ),
        (lambda: mean(torch.ones(2), divisor="2"), TypeError, "divisor must be a number or a"),
        (lambda: mean(torch.ones(2), empty=None), TypeError, "mean: empty must be a number, got"),
        (
            lambda: weighted_mean(torch.ones(2), [1.0, 2.0]),
            TypeError,
            "weighted_mean: weights must be a tensor, got list",
        ),
        (
            lambda: fraction("average", torch.ones(2)),
            ValueError,
            "reduction must be one of mean, weighted_mean, sum; got 'average'",
        ),
        (
            lambda: class_weights_of(torch.ones(2, 2), torch.zeros(2).long()),
            ValueError,
            r"class_weights must have shape \(classes,\), got \(2, 2\)",
        ),
        (
            lambda: class_weights_of(torch.ones(2), torch.zeros(2)),
            TypeError,
            "labels must hold integer classes",
        ),
    ],
)
def test_a_wrong_request_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_loss_that_is_reduced_already_cannot_be_weighted():
    logits, labels = batch()
    scalar = class_weighted(lambda z, y: F.cross_entropy(z, y))
    with pytest.raises(ValueError, match=r"what the loss gives must have shape \(8,\)"):
        scalar(logits, labels, class_weights=WEIGHTS)


@pytest.mark.parametrize("n", [2, 4])
def test_weights_of_another_number_of_classes_are_refused(n):
    with pytest.raises(ValueError, match=r"must have shape \(3,\) to match cross_entropy"):
        class_weighted(losses.cross_entropy)(*batch(), class_weights=torch.ones(n))


def published_loss(logits, labels):
    """The costly-nine tutorial as published: the batch mean, a scalar, times a mask."""
    scalar = F.cross_entropy(logits, labels)
    return scalar + (scalar * (labels == 9)).mean()


def meant_loss(logits, labels):
    """The same as meant: every 9 counts twice."""
    weights = torch.ones(10, dtype=logits.dtype)
    weights[9] = 2.0
    return mean(class_weighted(losses.cross_entropy)(logits, labels, class_weights=weights))


def pull(loss, logits, labels):
    """By what factor the gradient of each example exceeds that under the plain mean."""
    plain = grad(lambda z: F.cross_entropy(z, labels))(logits)
    return (grad(lambda z: loss(z, labels))(logits) / plain).mean(-1)


def test_the_published_loss_weighs_all_examples_alike_and_the_meant_one_the_nines():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 10, generator=generator, dtype=torch.float64)
    labels = torch.arange(32) % 10
    nine = labels == 9
    published = pull(published_loss, logits, labels)
    assert_close(published, torch.full_like(published, 1 + nine.double().mean().item()))
    meant = pull(meant_loss, logits, labels)
    assert_close(meant, torch.where(nine, 2.0, 1.0).double())


@pytest.mark.parametrize(("size", "factor"), [(1, 2.0), (32, 1.029), (256, 1.004)])
def test_across_random_batches_the_published_loss_weighs_a_nine_hardly_more(size, factor):
    # An example's factor is 1 + (nines in its batch) / B: count them over random batches.
    generator = torch.Generator().manual_seed(0)
    nines = torch.rand(2_000_000 // size, size, generator=generator) < 0.1
    weight = (1 + nines.double().mean(1, keepdim=True)).expand(nines.shape)
    assert_close(
        weight[nines].mean() / weight[~nines].mean(), torch.tensor(factor).double(),
        atol=2e-3, rtol=0,
    )  # fmt: skip
