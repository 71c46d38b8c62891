"""Lovász losses: the paper's algorithm in plain loops, limits, axes, what does not count."""

import math

import pytest
import torch
from catalogue.binary import lovasz_of, lovasz_weights
from torch.func import grad, hessian, jacrev, vmap
from torch.testing import assert_close

from funcloss.losses import lovasz_hinge, lovasz_softmax

DOUBLE = torch.float64
INF = math.inf


def maps(*shape, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(*shape, classes, generator=generator, dtype=DOUBLE)
    return logits, torch.randint(classes, shape, generator=generator)


def masks(*shape, seed=0):
    logits, labels = maps(*shape, classes=1, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return logits[..., 0], (torch.rand(*shape, generator=generator) > 0.6).double()


# -- against the algorithm and the definition ------------------------------------------------------


def test_the_weights_of_the_algorithm_are_the_steps_of_the_jaccard_loss():
    # Of two pixels of the mask and one beside it: 1/2 of 2, then 1/2 of 3 ... by hand.
    assert lovasz_weights([1, 0, 1]) == pytest.approx([1 / 2, 1 / 6, 1 / 3])
    assert lovasz_weights([0, 0]) == pytest.approx([1.0, 0.0])


@pytest.mark.parametrize("classes", [2, 3])
def test_where_every_pixel_is_certain_it_is_one_minus_iou(classes):
    _, labels = maps(20, 9, classes=classes)
    _, decided = maps(20, 9, classes=classes, seed=1)
    far = torch.where(decided.unsqueeze(-1) == torch.arange(classes), 1e4, 0.0).double()
    expected = []
    for y, d in zip(labels, decided, strict=True):
        there = [c for c in range(classes) if (y == c).any()]
        ious = [((y == c) & (d == c)).sum() / ((y == c) | (d == c)).sum() for c in there]
        expected.append(1 - sum(map(float, ious)) / len(there))
    assert_close(lovasz_softmax(far, labels), torch.tensor(expected, dtype=DOUBLE))


@pytest.mark.parametrize("loss", [lovasz_softmax, lovasz_hinge])
@pytest.mark.parametrize("pixels", [1, 2, 30])
def test_the_gradient_is_that_of_the_loops(loss, pixels):
    softmax = loss is lovasz_softmax
    logits, targets = (maps if softmax else masks)(5, pixels)
    for z, y in zip(logits, targets, strict=True):
        z = z.clone().requires_grad_()
        if softmax:
            p, there = z.softmax(-1), sorted(set(y.tolist()))
            of_class = []
            for c in there:
                mask = [int(label == c) for label in y]
                errors = [abs(m - q) for m, q in zip(mask, p[:, c], strict=True)]
                of_class.append(lovasz_of(errors, mask))
            value = sum(of_class) / len(there)
        else:
            errors = [(1 - (2 * t - 1) * a).relu() for a, t in zip(z, y, strict=True)]
            value = lovasz_of(errors, [int(t) for t in y])
        assert_close(loss(z, y), value)
        got = grad(lambda z: loss(z, y))(z.detach())  # noqa: B023
        assert_close(got, torch.autograd.grad(value, z)[0])


def test_a_step_of_the_hinge_by_hand():
    # Errors 1.5 (inside), 1.5 (outside), 0.5 (inside): 1.5 * (1/2 + 1/6) + 0.5 * 1/3.
    logits, targets = torch.tensor([-0.5, 0.5, 0.5]), torch.tensor([1.0, 0.0, 1.0])
    assert_close(lovasz_hinge(logits, targets), torch.tensor(1.5 * 2 / 3 + 0.5 / 3))
    empty = lovasz_hinge(torch.tensor([0.5, -2.0, 0.0]), torch.zeros(3))
    assert_close(empty, torch.tensor(1.5))  # the largest error


# -- derivatives, one image at a time, compiled ----------------------------------------------------


@pytest.mark.parametrize(("loss", "batch"), [(lovasz_softmax, maps), (lovasz_hinge, masks)])
def test_it_maps_and_differentiates(loss, batch):
    data = batch(4, 7)
    values = loss(*data)
    assert_close(vmap(loss)(*data), values)
    each = vmap(grad(loss))(*data)
    assert_close(each, grad(lambda z: loss(z, data[1]).sum())(data[0]))
    rows = jacrev(lambda z: loss(z, data[1]))(data[0])
    assert_close(torch.stack([rows[i, i] for i in range(4)]), each)
    second = hessian(lambda z: loss(z, data[1][0]))(data[0][0]).reshape(data[0][0].numel(), -1)
    assert second.isfinite().all()
    assert_close(second, second.T)
    for form in (loss, vmap(grad(loss))):
        compiled = torch.compile(form, fullgraph=True, backend="aot_eager")
        assert_close(compiled(*data), form(*data))


# -- axes and what counts --------------------------------------------------------------------------


def test_images_with_classes_last_give_one_value_each():
    logits, labels = maps(3, 4, 5)
    values = lovasz_softmax(logits, labels, dim=(-3, -2))
    assert_close(values, lovasz_softmax(logits.flatten(1, 2), labels.flatten(1)))
    assert lovasz_softmax(logits, labels).shape == (3, 4)  # a line of pixels each
    moved = lovasz_softmax(logits.movedim(0, 2), labels.movedim(0, 2), dim=(-4, -3))
    assert_close(moved, values)
    z, t = masks(3, 4, 5)
    assert_close(lovasz_hinge(z, t, dim=(-2, -1)), lovasz_hinge(z.flatten(1), t.flatten(1)))


@pytest.mark.parametrize(("loss", "batch"), [(lovasz_softmax, maps), (lovasz_hinge, masks)])
@pytest.mark.parametrize("bad", [torch.nan, INF, -INF])
def test_a_pixel_that_does_not_count_is_as_if_it_were_not_there(loss, batch, bad):
    data = batch(3, 8)
    keep = torch.tensor([True, False, True, True, False, True, True, False])
    where = torch.stack([keep, ~keep, torch.zeros_like(keep)])
    dropped = where if loss is lovasz_hinge else where.unsqueeze(-1)
    logits = torch.where(dropped, data[0], bad)
    targets = torch.where(where, data[1], -100 if loss is lovasz_softmax else bad)
    values = loss(logits, targets, where=where)
    kept = [loss(data[0][i][w], data[1][i][w]) for i, w in enumerate((keep, ~keep))]
    assert_close(values, torch.stack([*kept, torch.zeros((), dtype=DOUBLE)]))
    slope = grad(lambda z: loss(z, targets, where=where).sum())(logits)
    assert (slope[~where] == 0).all()
    for i, w in enumerate((keep, ~keep)):
        alone = grad(lambda z: loss(z, data[1][i][w]))(data[0][i][w])  # noqa: B023
        assert_close(slope[i][w], alone)


def test_an_absent_class_counts_no_more_than_what_it_takes():
    logits, labels = maps(6, classes=3)
    labels = labels.clamp(max=1)
    more = torch.cat([logits, torch.full((6, 4), -1e4, dtype=DOUBLE)], -1)
    assert_close(lovasz_softmax(more, labels), lovasz_softmax(logits, labels))


def test_infinite_logits():
    z, t = torch.tensor([INF, -INF]), torch.tensor([1.0, 0.0])
    assert lovasz_hinge(z, t) == 0
    assert lovasz_hinge(-z, t) == INF
    assert torch.equal(grad(lambda z: lovasz_hinge(z, t))(z), torch.zeros(2))
    assert lovasz_softmax(torch.tensor([[0.0, -INF], [-INF, 0.0]]), torch.tensor([0, 1])) == 0


@pytest.mark.parametrize("label", [-100, 3])
def test_a_label_out_of_range_is_refused_and_compiled_gives_nan(label):
    logits, labels = torch.zeros(2, 4, 3), torch.zeros(2, 4, dtype=torch.long)
    labels[1, 2] = label
    with pytest.raises(IndexError, match=r"lovasz_softmax: labels must be in \[0, 3\)"):
        lovasz_softmax(logits, labels)
    values = torch.compile(lovasz_softmax, backend="aot_eager")(logits, labels)
    assert values.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: lovasz_softmax(torch.zeros(2, 5, 3), torch.zeros(2, 5).long(), dim=-1),
            ValueError,
            "lovasz_softmax: dim must be .* negative axes before the last, the classes, got -1",
        ),
        (
            lambda: lovasz_softmax(torch.zeros(5, 3), torch.zeros(5).long(), dim=(-3, -2)),
            ValueError,
            r"lovasz_softmax: logits must have 3 axes or more, got shape \(5, 3\)",
        ),
        (
            lambda: lovasz_softmax(torch.zeros(2, 5, 3), torch.zeros(2, 4).long()),
            ValueError,
            r"lovasz_softmax: labels must have shape \(2, 5\)",
        ),
        (
            lambda: lovasz_hinge(torch.zeros(2, 5), torch.zeros(2, 5), where=torch.ones(5).bool()),
            ValueError,
            r"where must have shape \(2,\), of images, or \(2, 5\), of pixels, got \(5,\)",
        ),
        (
            lambda: lovasz_hinge(torch.zeros(2, 5), torch.zeros(2, 5).long()),
            TypeError,
            "lovasz_hinge: targets must be floating point",
        ),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
