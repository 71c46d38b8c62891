"""Losses as criteria and criteria as losses, beside the modules of torch."""

import copy
import functools
import io
import multiprocessing
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close

from funcloss import losses
from funcloss.combinators import (
    class_weighted,
    couples_examples,
    mixup,
    sample_weighted,
    scaled,
    smoothed,
)
from funcloss.modules import as_module, from_module

N, CLASSES = 8, 4
RANDOM = torch.Generator().manual_seed(2)
LOGITS = 2 * torch.randn(N, CLASSES, generator=RANDOM, dtype=torch.float64)
LABELS = torch.arange(N) % CLASSES
VALUES, REAL = torch.randn(2, N, generator=RANDOM, dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 0.5, 3.0, 0.0], dtype=torch.float64)
KEPT = torch.tensor([True, False, True, True, False, True, False, True])
PER_EXAMPLE = WEIGHTS[LABELS] * F.cross_entropy(LOGITS, LABELS, reduction="none")

weighted = class_weighted(losses.cross_entropy)

# -- as_module ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [None, KEPT], ids=["all", "some"])
def test_each_reduction_is_its_own(where):
    kept = torch.ones(N, dtype=torch.bool) if where is None else where
    values = [float(v) if k else 0.0 for v, k in zip(PER_EXAMPLE, kept, strict=True)]
    expected = {"none": values, "sum": sum(values), "mean": sum(values) / int(kept.sum())}
    for reduction, value in expected.items():
        criterion = as_module(weighted, reduction=reduction, class_weights=WEIGHTS)
        ours = criterion(LOGITS, LABELS, where=where)
        assert_close(ours, torch.tensor(value, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    ours = as_module(losses.cross_entropy)(LOGITS, LABELS)
    assert_close(ours, nn.CrossEntropyLoss()(LOGITS, LABELS))


def test_options_of_the_call_go_before_those_of_the_module():
    criterion = as_module(scaled(weighted, "by"), reduction="sum", class_weights=WEIGHTS, by=2.0)
    assert_close(criterion(LOGITS, LABELS), 2 * PER_EXAMPLE.sum())
    assert_close(criterion(LOGITS, LABELS, by=5.0), 5 * PER_EXAMPLE.sum())
    ones = torch.ones(CLASSES, dtype=torch.float64)
    ours = criterion(LOGITS, LABELS, class_weights=ones, label_smoothing=0.2)
    assert_close(ours, 2 * F.cross_entropy(LOGITS, LABELS, reduction="sum", label_smoothing=0.2))
    assert_close(criterion(LOGITS, LABELS), 2 * PER_EXAMPLE.sum())  # nothing was remembered


def test_tensors_are_buffers_that_move_and_save():
    criterion = as_module(weighted, class_weights=WEIGHTS, label_smoothing=0.1)
    assert list(criterion.parameters()) == []
    assert list(criterion.state_dict()) == ["class_weights"]
    assert torch.equal(criterion.state_dict()["class_weights"], WEIGHTS)
    assert criterion.to(torch.float32).class_weights.dtype == torch.float32
    assert criterion(LOGITS.float(), LABELS).dtype == torch.float32
    other = as_module(weighted, class_weights=torch.ones(CLASSES), label_smoothing=0.1)
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other(LOGITS, LABELS), criterion(LOGITS, LABELS))
    assert criterion.to("meta").class_weights.device.type == "meta"
    written = "LossModule(class_weighted(cross_entropy), reduction='mean', label_smoothing=0.1)"
    assert repr(criterion) == written


def test_in_a_plain_loop_of_torch_it_trains_as_torchs_own():
    torch.manual_seed(0)
    inputs = torch.randn(64, 5, dtype=torch.float64)
    labels = (inputs @ torch.randn(5, CLASSES, dtype=torch.float64)).argmax(-1)
    ours = as_module(weighted, class_weights=WEIGHTS + 0.5)
    theirs = nn.CrossEntropyLoss(weight=WEIGHTS + 0.5, reduction="sum")
    histories = []
    for criterion, divisor in ((ours, 1), (theirs, 64)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, CLASSES)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        history = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels) / divisor
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        histories.append(history)
    assert histories[0] == pytest.approx(histories[1], rel=1e-9)
    assert histories[0][-1] < 0.3 * histories[0][0]


# -- as_module, weights and options ---------------------------------------------------------------


@pytest.mark.parametrize("where", [None, KEPT], ids=["all", "some"])
def test_the_weighted_mean_is_torchs(where):
    kept = torch.ones(N, dtype=torch.bool) if where is None else where
    logits = torch.where(kept[:, None], LOGITS, torch.nan)
    labels = torch.where(kept, LABELS, -100)
    torchs = nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1)
    ours = as_module(smoothed(weighted, 0.1), reduction="weighted_mean", class_weights=WEIGHTS)
    expected = torchs(LOGITS[kept], LABELS[kept])
    assert_close(ours(logits, labels, where=where), expected)
    slope = grad(lambda z: ours(z, labels, where=where))(logits)
    assert_close(slope[kept], grad(lambda z: torchs(z, LABELS[kept]))(LOGITS[kept]))
    assert (slope[~kept] == 0).all()


def test_the_weighted_mean_divides_by_all_weights_that_count():
    own = torch.arange(1.0, N + 1, dtype=torch.float64)
    plain = F.cross_entropy(LOGITS, LABELS, reduction="none")

    def expected(weights):
        return (weights * plain)[KEPT].sum() / weights[KEPT].sum()

    by_example = as_module(sample_weighted(losses.cross_entropy), reduction="weighted_mean")
    got = by_example(LOGITS, LABELS, sample_weights=own, where=KEPT)
    assert_close(got, expected(own))
    both = as_module(
        sample_weighted(weighted), reduction="weighted_mean", class_weights=WEIGHTS, where=KEPT
    )
    assert_close(both(LOGITS, LABELS, sample_weights=own), expected(own * WEIGHTS[LABELS]))
    bound = functools.partial(weighted, class_weights=WEIGHTS)
    of_partial = as_module(bound, reduction="weighted_mean")
    assert_close(of_partial(LOGITS, LABELS, where=KEPT), expected(WEIGHTS[LABELS]))
    # An option of the loss; torch divides this one by the number of examples.
    margin = as_module(losses.multi_margin, reduction="weighted_mean", class_weights=WEIGHTS)
    total = F.multi_margin_loss(LOGITS, LABELS, weight=WEIGHTS, reduction="sum")
    assert_close(margin(LOGITS, LABELS), total / WEIGHTS[LABELS].sum())


def test_a_weighted_mean_without_weights_is_refused():
    message = "weighted_mean divides by weights, and cross_entropy has no option class_weights or"
    with pytest.raises(ValueError, match=message):
        as_module(losses.cross_entropy, reduction="weighted_mean")
    criterion = as_module(
        mixup(weighted), reduction="weighted_mean", class_weights=WEIGHTS, mix=0.5
    )
    with pytest.raises(ValueError, match="needs the one label of each example, and mixup"):
        criterion(LOGITS, LABELS, LABELS)
    bits = as_module(
        losses.multilabel_soft_margin, reduction="weighted_mean", class_weights=WEIGHTS
    )
    with pytest.raises(TypeError, match="labels must hold integer classes, got torch.float64"):
        bits(LOGITS, LOGITS.sigmoid())


def test_weighted_mean_of_two_classes_divides_by_the_weights_of_the_bits():
    scores, bits = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([0.0, 1.0, 0.25])
    made = as_module(
        class_weighted(losses.binary_cross_entropy_with_logits),
        reduction="weighted_mean",
        class_weights=torch.tensor([1.0, 3.0]),
    )
    values = losses.binary_cross_entropy_with_logits(scores, bits)
    weights = torch.tensor([1.0, 3.0, 1.5])
    torch.testing.assert_close(made(scores, bits), (weights * values).sum() / weights.sum())


def of_any(logits, labels, **options):
    return losses.cross_entropy(logits, labels, **options)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (losses.softmax_focal, {"gama": 1.0}, "softmax_focal has no option 'gama'; it has alpha, "),
        (weighted, {"weight": WEIGHTS}, "no option 'weight'; it has class_weights, label_smooth"),
        (losses.nll, {"logits": LOGITS}, "nll has no option 'logits'; it has where"),
        (functools.partial(losses.huber, delta=2.0), {"beta": 1.0}, "has no option 'beta'"),
        (from_module(nn.MSELoss()), {"delta": 1.0}, "has no option 'delta'; it has where"),
        (losses.over_batch(losses.dice), {"gamma": 1.0}, "has no option 'gamma'; it has dim, smo"),
        (weighted, {"class_weights": [1.0] * 4}, "class_weights must be a tensor, got list"),
        (weighted, {"class_weights": WEIGHTS.numpy()}, "class_weights must be a tensor, got ndarr"),
    ],
)  # fmt: skip
def test_an_option_that_the_loss_cannot_take_is_refused_when_the_module_is_made(
    loss, options, message
):
    with pytest.raises(TypeError, match=f"as_module: .*{message}"):
        as_module(loss, **options)


def test_an_option_that_the_loss_may_take_is_left_to_it():
    assert_close(
        as_module(of_any, label_smoothing=0.1)(LOGITS, LABELS),
        F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1),
    )
    inner = as_module(as_module(losses.huber, reduction="none"), delta=0.5)
    assert_close(inner(VALUES, REAL), F.huber_loss(VALUES, REAL, delta=0.5))


# -- to other processes ---------------------------------------------------------------------------

CARRIED = {
    "as_module": as_module(weighted, class_weights=WEIGHTS, label_smoothing=0.1),
    "weighted mean": as_module(weighted, reduction="weighted_mean", class_weights=WEIGHTS),
    "of a module": as_module(from_module(nn.CrossEntropyLoss(weight=WEIGHTS))),
    "from_module": from_module(nn.CrossEntropyLoss(weight=WEIGHTS)),
    "there and back": from_module(as_module(weighted, class_weights=WEIGHTS)),
}


def saved_and_loaded(loss):
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize(
    "carry", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_it_is_copied_pickled_and_saved(carry, name):
    loss = CARRIED[name]
    other = carry(loss)
    assert torch.equal(other(LOGITS, LABELS, where=KEPT), loss(LOGITS, LABELS, where=KEPT))
    assert repr(other) == repr(loss)


def test_it_goes_to_spawned_processes():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        for loss in CARRIED.values():
            there = pool.apply(operator.call, (loss, LOGITS, LABELS))
            assert torch.equal(there, loss(LOGITS, LABELS))


def test_a_reduction_that_does_not_exist_is_refused():
    message = "as_module: reduction must be one of none, mean, weighted_mean, sum, got 'average'"
    with pytest.raises(ValueError, match=message):
        as_module(losses.cross_entropy, reduction="average")


# -- from_module ----------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """A criterion of one's own, without a reduction to replace."""

    def forward(self, predictions, targets):
        return (predictions - targets).square().mean()


PLAIN = F.cross_entropy(LOGITS, LABELS, reduction="none")
HUBER = F.huber_loss(VALUES, REAL, reduction="none", delta=0.5)
CRITERIA = {  # the criterion, its data, and its value of each example
    "labels": (nn.CrossEntropyLoss(), (LOGITS, LABELS), PLAIN),
    **{
        f"weights, {way}": (
            nn.CrossEntropyLoss(weight=WEIGHTS, reduction=way), (LOGITS, LABELS), PER_EXAMPLE
        )
        for way in ("mean", "sum", "none")
    },
    "values": (nn.HuberLoss(delta=0.5), (VALUES, REAL), HUBER),
    "one's own": (Quadratic(), (VALUES, REAL), (VALUES - REAL) ** 2),
    "ours": (as_module(weighted, class_weights=WEIGHTS), (LOGITS, LABELS), PER_EXAMPLE),
}  # fmt: skip


@pytest.mark.parametrize(("module", "data", "expected"), CRITERIA.values(), ids=CRITERIA.keys())
def test_each_example_is_a_batch_of_one(module, data, expected):
    loss = from_module(module)
    assert_close(loss(*data), expected)
    assert_close(loss(*(x[2] for x in data)), expected[2])  # no batch axis at all
    pairs = tuple(x.unflatten(0, (4, 2)) for x in data)
    assert_close(loss(*pairs), expected.unflatten(0, (4, 2)))
    slopes = vmap(grad(loss))(*data)
    whole = grad(lambda p: loss(p, *data[1:]).sum())(data[0])
    assert_close(slopes, whole)
    assert whole.abs().amax() > 0.1


def test_the_weights_of_a_criterion_act_at_batch_one():
    module = nn.CrossEntropyLoss(weight=WEIGHTS)

    def by_the_recipe(logits, label):  # the mean over the weights cancels them
        return module(logits[None], label[None])

    kept = WEIGHTS[LABELS] > 0
    logits, labels = LOGITS[kept], LABELS[kept]
    plain = logits.softmax(-1) - F.one_hot(labels, CLASSES)
    assert_close(vmap(grad(by_the_recipe))(logits, labels), plain)
    ours = vmap(grad(from_module(module)))(logits, labels)
    assert_close(ours, WEIGHTS[labels][:, None] * plain)


def test_the_module_is_copied():
    module = nn.CrossEntropyLoss(weight=WEIGHTS.clone())
    loss = from_module(module)
    module.weight.fill_(100.0)
    assert_close(loss(LOGITS, LABELS), PER_EXAMPLE)
    assert module.reduction == "mean"
    assert_close(module(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_what_does_not_count_reaches_no_gradient(bad):
    loss = from_module(nn.CrossEntropyLoss(weight=WEIGHTS))
    logits = torch.where(KEPT[:, None], LOGITS, bad)
    labels = torch.where(KEPT, LABELS, -7)
    values = loss(logits, labels, where=KEPT)
    assert_close(values, torch.where(KEPT, PER_EXAMPLE, 0.0))
    slope = grad(lambda z: loss(z, labels, where=KEPT).sum())(logits)
    expected = KEPT[:, None] * WEIGHTS[LABELS][:, None] * (LOGITS.softmax(-1) - F.one_hot(LABELS))
    assert_close(slope, expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch maps this one by a loop
def test_vectors_have_an_axis_of_their_own():
    anchor, near, far = torch.randn(3, N, 6, generator=RANDOM, dtype=torch.float64)
    loss = from_module(nn.TripletMarginLoss(margin=2.0), example_axes=1)
    per_example = F.triplet_margin_loss(anchor, near, far, margin=2.0, reduction="none")
    assert_close(loss(anchor, near, far), per_example)
    where = torch.where(KEPT[:, None], far, torch.nan)
    assert_close(loss(anchor, near, where, where=KEPT), torch.where(KEPT, per_example, 0.0))
    slopes = vmap(grad(loss))(anchor, near, far)
    expected = grad(lambda a: F.triplet_margin_loss(a, near, far, margin=2.0, reduction="sum"))
    assert_close(slopes, expected(anchor))
    soft = LOGITS.flip(0).softmax(-1)
    of_distributions = from_module(nn.CrossEntropyLoss(), example_axes=1)
    assert_close(of_distributions(LOGITS, soft), F.cross_entropy(LOGITS, soft, reduction="none"))


def test_there_and_back_is_the_loss():
    back = from_module(as_module(weighted, class_weights=WEIGHTS))
    assert_close(back(LOGITS, LABELS), PER_EXAMPLE)
    assert_close(back(LOGITS, LABELS, where=KEPT), PER_EXAMPLE * KEPT)
    forth = as_module(from_module(nn.CrossEntropyLoss(weight=WEIGHTS)))
    assert_close(forth(LOGITS, LABELS), PER_EXAMPLE.mean())
    assert_close(forth(LOGITS, LABELS, where=KEPT), PER_EXAMPLE[KEPT].mean())
    assert repr(from_module(nn.CrossEntropyLoss())) == "CrossEntropyLoss()"
    twice = class_weighted(from_module(nn.CrossEntropyLoss(weight=WEIGHTS)))
    assert_close(twice(LOGITS, LABELS, class_weights=WEIGHTS), WEIGHTS[LABELS] * PER_EXAMPLE)


@pytest.mark.parametrize(
    "loss",
    [as_module(weighted, class_weights=WEIGHTS), from_module(nn.CrossEntropyLoss(weight=WEIGHTS))],
    ids=["as_module", "from_module"],
)
def test_compiled_it_is_one_graph_that_gives_the_same(loss):
    def slope(z, y):
        return grad(lambda z: loss(z, y, where=KEPT).sum())(z)

    compiled = torch.compile(slope, fullgraph=True, backend="aot_eager")
    assert_close(compiled(LOGITS, LABELS), slope(LOGITS, LABELS))


def test_a_mask_kept_by_the_module_divides_too():
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    where = torch.tensor([True, True, False, False])
    kept, given = as_module(losses.cross_entropy, where=where), as_module(losses.cross_entropy)
    assert_close(kept(logits, labels), given(logits, labels, where=where))


class Nested(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.inner = nn.CrossEntropyLoss(**options)

    def forward(self, logits, labels):
        return self.inner(logits, labels)


def test_a_reduction_within_is_replaced_too():
    weight = torch.tensor([1.0, 5.0, 0.5])
    logits, labels = torch.randn(3, 3), torch.arange(3)
    expected = weight * losses.cross_entropy(logits, labels)
    assert_close(from_module(Nested(weight=weight))(logits, labels), expected)


@pytest.mark.parametrize("options", [{}, {"weight": WEIGHTS}, {"ignore_index": 2}])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (4, 4), (2, 3, 2)])
def test_images_of_torchs_layout_give_what_torch_gives_per_pixel(shape, options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, CLASSES, *shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (3, *shape), generator=generator)
    for module, data in (
        (nn.CrossEntropyLoss, logits), (nn.NLLLoss, logits.log_softmax(1))
    ):  # fmt: skip
        loss = from_module(module(**options))
        expected = module(**options, reduction="none")(data, labels)
        assert_close(loss(data, labels), expected)
        where = labels != 1
        spoilt = torch.where(where.unsqueeze(1), data, torch.nan)
        assert_close(loss(spoilt, labels, where=where), torch.where(where, expected, 0.0))
        slope = grad(lambda z: loss(z, labels).sum())(data)  # noqa: B023
        torchs = grad(lambda z: module(**options, reduction="sum")(z, labels))(data)  # noqa: B023
        assert_close(slope, torchs)
        assert_close(as_module(loss)(data, labels), expected.mean())


def test_an_image_is_an_example_where_it_is_asked_for():
    logits, labels = torch.randn(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
    loss = from_module(nn.CrossEntropyLoss(), example_axes=2)
    expected = F.cross_entropy(logits, labels, reduction="none").sum((1, 2))
    assert_close(loss(logits, labels), expected)
    assert_close(vmap(loss)(logits, labels), expected)


def test_what_cannot_be_a_batch_is_refused():
    logits, labels = torch.randn(2, 3, 4, 5), torch.zeros(2, 4, 6, dtype=torch.long)
    with pytest.raises(ValueError, match=r"begin with the batch axes of the last, \(2, 4, 6\)"):
        from_module(nn.CrossEntropyLoss())(logits, labels)
    with pytest.raises(TypeError, match="from_module: argument 1 must be a tensor, got list"):
        from_module(nn.CrossEntropyLoss())(LOGITS, LABELS.tolist())


def test_parameters_train_in_a_module_and_are_refused_from_one():
    alpha = nn.Parameter(torch.ones(3))
    criterion = as_module(losses.softmax_focal, alpha=alpha)
    assert list(criterion.parameters()) == [alpha]
    criterion(torch.randn(2, 3), torch.tensor([0, 1])).backward()
    assert alpha.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="has parameters to train"):
        from_module(criterion)


def test_a_module_and_a_partial_still_say_that_they_couple():
    bound = functools.partial(losses.nt_xent, temperature=0.1)
    assert couples_examples(bound)
    assert couples_examples(as_module(bound))
