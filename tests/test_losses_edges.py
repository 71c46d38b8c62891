"""What goes wrong at the edges of a loss: labels, options, infinities, large numbers, pickles."""

import copy
import inspect
import io
import math
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from catalogue import CASES
from torch import Generator, Tensor
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.testing import assert_close

from funcloss import (
    as_module,
    channels_first,
    class_weighted,
    class_weights_of,
    from_logits,
    from_module,
    losses,
    mean,
    mixup,
    one_hot_targets,
    sample_weighted,
    scaled,
    smoothed,
    soft,
    summed,
    temperature,
    weighted_mean,
)
from funcloss.objectives import mean_of, weighted_mean_of
from funcloss.typing import Batch

INF = math.inf


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


# -- torch's layout --------------------------------------------------------------------------------

IMAGES, MAPS = normal(2, 3, 4, 3), torch.arange(24).reshape(2, 4, 3) % 3
WEIGHTS = torch.tensor([1.0, 5.0, 0.5], dtype=torch.float64)
LABEL_LOSSES = {
    "cross_entropy": losses.cross_entropy,
    "softmax_focal": losses.softmax_focal,
    "smoothed": smoothed(losses.cross_entropy),
    "temperature": temperature(losses.poly1, 2.0),
    "summed": summed({"a": (1.0, losses.cross_entropy), "b": (0.5, losses.multi_margin)}),
    "one_hot": one_hot_targets(losses.squared_error),
    "from_logits": from_logits(losses.nll),
    "coral": losses.coral,
}


@pytest.mark.parametrize("name", LABEL_LOSSES)
def test_channels_first_moves_what_has_channels_and_nothing_else(name):
    loss = LABEL_LOSSES[name]
    where = MAPS.flip(0) != 1
    given = {"where": where, "sample_weights": normal(2, 4, 3).abs()}
    got = channels_first(sample_weighted(loss))(IMAGES, MAPS, **given)
    assert_close(got, sample_weighted(loss)(IMAGES.movedim(1, -1), MAPS, **given))
    weights = torch.arange(1.0, 5.0 if name == "coral" else 4.0).double()  # thresholds are 1 fewer
    costly = channels_first(class_weighted(loss))(IMAGES, MAPS, class_weights=weights)
    assert_close(costly, weights[MAPS] * loss(IMAGES.movedim(1, -1), MAPS))


COMBINED = {  # a combinator of cross-entropy, and the options and targets that it takes besides
    "class_weighted": (class_weighted(losses.cross_entropy), {"class_weights": WEIGHTS}, None),
    "sample_weighted": (
        sample_weighted(losses.cross_entropy), {"sample_weights": normal(2, 4, 3).abs()}, None
    ),
    "scaled": (scaled(losses.cross_entropy, 3.0), {}, None),
    "summed": (LABEL_LOSSES["summed"], {}, None),
    "smoothed": (smoothed(losses.cross_entropy, 0.2), {}, None),
    "soft": (soft(losses.cross_entropy), {}, normal(2, 3, 4, 3, seed=2).softmax(1)),
    "mixup": (mixup(losses.cross_entropy), {"mix": 0.3}, None),
    "temperature": (temperature(losses.cross_entropy, 2.0), {}, None),
    "from_logits": (from_logits(losses.nll), {}, None),
    "one_hot_targets": (one_hot_targets(losses.squared_error), {}, None),
    "several": (
        sample_weighted(class_weighted(smoothed(temperature(losses.softmax_focal, 2.0)))),
        {"class_weights": WEIGHTS, "sample_weights": normal(2, 4, 3).abs(), "gamma": 1.0},
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("first", [False, True], ids=["classes last", "classes first"])
@pytest.mark.parametrize("name", COMBINED)
def test_every_combinator_masks_in_either_layout(name, first):
    loss, options, soft_targets = COMBINED[name]
    where = torch.arange(24).reshape(2, 4, 3) % 5 != 0
    spoilt = torch.where(where[:, None], IMAGES, math.nan)
    labels = torch.where(where, MAPS, -100)
    targets = (
        (labels,)
        if soft_targets is None
        else (torch.where(where[:, None], soft_targets, math.inf),)
    )
    targets *= 2 if name == "mixup" else 1

    def of(images: Tensor) -> Tensor:
        if first:
            return channels_first(loss)(images, *targets, where=where, **options)
        last = [t.movedim(1, -1) if t.dim() == 4 else t for t in targets]
        return loss(images.movedim(1, -1), *last, where=where, **options)

    whole = (MAPS,) if soft_targets is None else (soft_targets,)
    unmasked = channels_first(loss)(IMAGES, *whole * (2 if name == "mixup" else 1), **options)
    assert_close(of(spoilt), torch.where(where, unmasked, 0.0))
    slopes = grad(lambda images: of(images).sum())(spoilt)
    assert (slopes.movedim(1, -1)[~where] == 0).all()
    assert slopes.isfinite().all()


def test_channels_first_of_images_as_wide_as_there_are_classes_is_torch_s():
    values = channels_first(from_logits(losses.nll))(IMAGES, MAPS)
    assert_close(values, F.cross_entropy(IMAGES, MAPS, reduction="none"))
    cooled = channels_first(temperature(losses.cross_entropy, 2.0))(IMAGES, MAPS, where=MAPS > 0)
    expected = F.cross_entropy(IMAGES / 2, MAPS, reduction="none")
    assert_close(cooled, torch.where(MAPS > 0, expected, 0.0))
    flat = channels_first(losses.cross_entropy)(normal(5, 3), MAPS[0, 0].repeat(2)[:5])
    assert flat.shape == (5,)


def test_channels_first_of_elementwise_losses_and_of_soft_targets():
    targets = IMAGES.sigmoid()
    got = channels_first(losses.binary_cross_entropy_with_logits)(
        IMAGES, targets, pos_weight=WEIGHTS
    )
    pos_weight = WEIGHTS[:, None, None]
    expected = F.binary_cross_entropy_with_logits(
        IMAGES, targets, pos_weight=pos_weight, reduction="none"
    )
    assert_close(got, expected)
    shares = IMAGES.softmax(1)
    got = channels_first(soft(losses.cross_entropy))(IMAGES, shares)
    assert_close(got, F.cross_entropy(IMAGES, shares, reduction="none"))


# -- labels out of range ---------------------------------------------------------------------------

OUT_OF_RANGE = {
    name: case
    for name, case in CASES.items()
    if tuple(inspect.signature(case.loss).parameters)[1:2] == ("labels",)
    and not name.startswith(("supervised_contrastive", "lovasz", "costs of each"))
}


@pytest.mark.parametrize("label", [-100, -1, "K", "K + 3"])
@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_label_out_of_range_is_refused_by_name(name, label):
    case = OUT_OF_RANGE[name]
    logits, labels = case.data(3, Generator().manual_seed(0))
    label = {"K": case.classes, "K + 3": case.classes + 3}.get(label, label)
    wrong = torch.where(torch.arange(3) == 1, label, labels)
    with pytest.raises(IndexError, match=r"labels must be in \[0, \d+\); index"):
        case(logits, wrong)
    with pytest.raises(IndexError, match=r"labels must be in \[0, \d+\); index"):
        vmap(grad(lambda z, y: case(z, y).sum()))(logits, wrong)
    if case.takes_where:
        assert_close(case(logits, wrong, where=wrong == labels)[::2], case(logits, labels)[::2])


COMPILED = {
    "cross_entropy": losses.cross_entropy,
    "coral": losses.coral,
    "corn": losses.corn,
    "sord": losses.sord,
    "earth_mover": losses.earth_mover,
    "multiclass_hinge": losses.multiclass_hinge,
    "asymmetric_single_label": losses.asymmetric_single_label,
    "one_hot_targets": one_hot_targets(losses.squared_error),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_a_label_out_of_range_is_nan(name):
    torch.compiler.reset()
    compiled = torch.compile(COMPILED[name], fullgraph=True, backend="aot_eager")
    values = compiled(normal(4, 3), torch.tensor([0, -100, 7, 1]))
    assert values.isnan().tolist() == [False, True, True, False]


# -- classes that are not the columns --------------------------------------------------------------


def test_the_classes_are_those_of_the_weights_and_not_the_columns():
    thresholds, labels = normal(4, 2), torch.tensor([0, 1, 2, 2])
    for loss in (losses.coral, losses.corn):
        got = class_weighted(loss)(thresholds, labels, class_weights=WEIGHTS)
        assert_close(got, WEIGHTS[labels] * loss(thresholds, labels))
    costs = {"cost_matrix": torch.rand(3, 5, dtype=torch.float64)}
    got = class_weighted(losses.expected_cost)(normal(4, 5), labels, class_weights=WEIGHTS, **costs)
    assert_close(got, WEIGHTS[labels] * losses.expected_cost(normal(4, 5), labels, **costs))
    embedded = class_weighted(losses.supervised_contrastive)
    got = embedded(normal(4, 7), labels, class_weights=WEIGHTS)
    assert_close(got, WEIGHTS[labels] * losses.supervised_contrastive(normal(4, 7), labels))
    head = normal(3, 6), torch.tensor([0, 1, 2, 2])
    got = class_weighted(losses.linear_cross_entropy)(normal(4, 6), *head, class_weights=WEIGHTS)
    assert_close(got, WEIGHTS[labels] * losses.linear_cross_entropy(normal(4, 6), *head))


@pytest.mark.parametrize(
    ("loss", "targets", "weights"),
    [
        (losses.hinge, [-1, 1, 1, -1], [2.0, 7.0, 7.0, 2.0]),
        (losses.soft_margin, [-1.0, 1.0, 1.0, -1.0], [2.0, 7.0, 7.0, 2.0]),
        (losses.binary_cross_entropy_with_logits, [0.0, 1.0, 0.25, 0.0], [2.0, 7.0, 3.25, 2.0]),
        (losses.sigmoid_focal, [0.0, 1.0, 1.0, 0.0], [2.0, 7.0, 7.0, 2.0]),
    ],
)
def test_bits_and_signs_are_two_classes(loss, targets, weights):
    scores, of_two = normal(4), torch.tensor([2.0, 7.0], dtype=torch.float64)
    targets = (
        torch.tensor(targets).double() if isinstance(targets[0], float) else torch.tensor(targets)
    )
    weights = torch.tensor(weights, dtype=torch.float64)
    values = class_weighted(loss)(scores, targets, class_weights=of_two)
    assert_close(values, weights * loss(scores, targets))
    got = weighted_mean_of(loss)(scores, Batch(scores, targets), {"class_weights": of_two})
    assert_close(got, weighted_mean(loss(scores, targets), weights))
    with pytest.raises(ValueError, match=r"class_weights must have shape \(2,\)"):
        class_weighted(loss)(scores, targets, class_weights=WEIGHTS)


def test_smoothing_and_soft_targets_run_over_the_classes():
    assert_close(smoothed(losses.coral, 0.3)(torch.tensor([[1.0, -1.0]]), torch.tensor([2])),
                 torch.tensor([1.5265]), rtol=0, atol=5e-5)  # fmt: skip
    thresholds, labels = normal(4, 2), torch.tensor([0, 1, 2, 2])
    each = torch.stack([losses.coral(thresholds, torch.full((4,), k)) for k in range(3)], -1)
    expected = 0.7 * losses.coral(thresholds, labels) + 0.3 * each.mean(-1)
    assert_close(smoothed(losses.coral, 0.3)(thresholds, labels), expected)
    own = smoothed(lambda z, y: losses.coral(z, y), 0.3, classes=3)  # says nothing of its classes
    assert_close(own(thresholds, labels), expected)
    shares = normal(4, 3).softmax(-1)
    assert_close(soft(losses.coral)(thresholds, shares), (shares * each).sum(-1))
    with pytest.raises(ValueError, match=r"shape \(4, 3\) to match logits and coral"):
        soft(losses.coral)(thresholds, shares[:, :2])


@pytest.mark.parametrize("loss", [losses.binary_cross_entropy_with_logits, losses.hinge])
def test_two_classes_are_smoothed_over_both(loss):
    scores = normal(5)
    low = 0.0 if loss is losses.binary_cross_entropy_with_logits else -1.0
    targets = torch.tensor([low, 1.0, 1.0, low, 1.0], dtype=torch.float64)
    both = [loss(scores, torch.full_like(scores, t)) for t in (low, 1.0)]
    expected = 0.8 * loss(scores, targets) + 0.2 * (both[0] + both[1]) / 2
    assert_close(smoothed(loss, 0.2)(scores, targets), expected)


# -- options ---------------------------------------------------------------------------------------


def test_an_option_is_one_or_one_per_example_and_nothing_broadcasts():
    logits, labels = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"gamma must be a number .*got shape \(4, 1\)"):
        losses.softmax_focal(logits, labels, gamma=torch.full((4, 1), 2.0))
    square, teacher = normal(3, 3), normal(3, 3, seed=1)
    each = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    got = losses.distillation(square, teacher, temperature=each)
    rows = [losses.distillation(s, t, temperature=float(c))
            for s, t, c in zip(square, teacher, each, strict=True)]  # fmt: skip
    assert_close(got, torch.stack(rows))


@pytest.mark.parametrize(
    "call",
    [
        lambda: class_weighted(losses.cross_entropy)(
            torch.zeros(2, 3), torch.tensor([0, 1]), class_weights=[1.0, 2.0, 3.0]
        ),
        lambda: class_weights_of(np.ones(3), torch.tensor([0, 1])),
        lambda: losses.softmax_focal(
            torch.zeros(2, 3), torch.tensor([0, 1]), alpha=[1.0, 2.0, 3.0]
        ),
        lambda: losses.balanced_softmax(
            torch.zeros(2, 3), torch.tensor([0, 1]), class_counts=np.ones(3)
        ),
        lambda: losses.binary_cross_entropy_with_logits(
            torch.zeros(3), torch.zeros(3), pos_weight=[1.0, 2.0, 3.0]
        ),
        lambda: losses.expected_cost(
            torch.zeros(2, 3), torch.tensor([0, 1]), cost_matrix=[[0.0, 1.0, 1.0]] * 3
        ),
        lambda: losses.cross_entropy(torch.zeros(2, 3), [0, 1]),
        lambda: losses.cross_entropy(np.zeros((2, 3)), torch.tensor([0, 1])),
        lambda: sample_weighted(losses.squared_error)(
            torch.zeros(2), torch.zeros(2), sample_weights=[1.0, 2.0]
        ),
        lambda: mean([1.0, 2.0]),
        lambda: losses.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), where=[True, False]),
    ],
)
def test_what_is_no_tensor_is_refused_in_one_line(call):
    with pytest.raises(
        TypeError, match=r"must be a (number or a )?tensor, got (list|ndarray)"
    ) as e:
        call()
    assert "\n" not in str(e.value)


def test_one_alpha_weighs_all_classes():
    logits, labels = normal(4, 3), torch.tensor([0, 1, 2, 2])
    plain = losses.softmax_focal(logits, labels)
    for alpha in (0.25, torch.tensor(0.25).double(), torch.full((3,), 0.25).double()):
        assert_close(losses.softmax_focal(logits, labels, alpha=alpha), 0.25 * plain)


# -- infinities and large numbers ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "data", "value"),
    [
        (losses.soft_cross_entropy, ([[-INF, 0.0]], [[0.5, 0.5]]), INF),
        (losses.soft_cross_entropy, ([[-INF, 0.0]], [[0.0, 1.0]]), 0.0),
        (losses.distillation, ([[-INF, 0.0]], [[0.0, 0.0]]), INF),
        (losses.distillation, ([[-INF, 0.0]], [[-INF, 0.0]]), 0.0),
        (losses.sord, ([[-INF, 0.0, 0.0]], [0]), INF),
        (losses.softmax_focal, ([[-INF, 0.0]], [0]), INF),
        (losses.softmax_focal, ([[-INF, 0.0]], [1]), 0.0),
        (losses.asymmetric_single_label, ([[-INF, 0.0]], [0]), INF),
        (scaled(losses.cross_entropy, 0.0), ([[-INF, 0.0]], [0]), 0.0),
        (smoothed(losses.cross_entropy, 0.0), ([[-INF, 0.0]], [1]), 0.0),
        (soft(losses.cross_entropy), ([[-INF, 0.0]], [[0.0, 1.0]]), 0.0),
    ],
)
def test_zero_times_infinity_is_zero_and_half_of_it_is_infinite(loss, data, value):
    predictions, targets = (torch.tensor(x) for x in data)
    assert_close(loss(predictions, targets), torch.tensor([value]))


def test_a_weight_of_zero_removes_an_infinite_value():
    logits, labels = torch.tensor([[-INF, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    weights = torch.tensor([0.0, 2.0])
    values = class_weighted(losses.cross_entropy)(logits, labels, class_weights=weights)
    assert_close(values, torch.tensor([0.0, 2 * 1.3133]), rtol=0, atol=1e-4)
    values = sample_weighted(losses.cross_entropy)(logits, labels, sample_weights=weights)
    assert_close(values, torch.tensor([0.0, 2 * 1.3133]), rtol=0, atol=1e-4)
    first = torch.tensor([0.0, 1.0])
    values = mixup(losses.cross_entropy)(logits, labels, 1 - labels, mix=first)
    assert values.isfinite().all()


LARGE = {
    "barron, 1": lambda x: losses.barron(x, torch.zeros_like(x), alpha=1.0),
    "barron, 0": lambda x: losses.barron(x, torch.zeros_like(x), alpha=0.0),
    "barron, -2": lambda x: losses.barron(x, torch.zeros_like(x), alpha=-2.0),
    "charbonnier": lambda x: losses.charbonnier(x, torch.zeros_like(x)),
    "huber": lambda x: losses.huber(x, torch.zeros_like(x)),
    "gaussian_nll": lambda x: losses.gaussian_nll(x, x.abs(), torch.zeros_like(x)),
    "cosine_distance": lambda x: losses.cosine_distance(_vectors(x), _vectors(x).flip(-1)),
    "cosine_embedding": lambda x: losses.cosine_embedding(
        _vectors(x), _vectors(x).flip(-1), torch.ones(len(x))
    ),
    "triplet_margin": lambda x: losses.triplet_margin(
        _vectors(x), torch.zeros(len(x), 3).to(x), -_vectors(x).roll(1, -1)
    ),
    "nt_xent": lambda x: losses.nt_xent(_vectors(x), _vectors(x).roll(1, -1)),
    "supervised_contrastive": lambda x: losses.supervised_contrastive(
        _vectors(x), torch.arange(len(x)) % 2
    ),
}


def _vectors(x: Tensor) -> Tensor:
    return x[:, None] * torch.tensor([1.0, -2.0, 0.5]).to(x) + x.flip(0)[:, None]


@pytest.mark.parametrize("size", [1e4, 1e15, 1e18, 3e19, 1e20])
@pytest.mark.parametrize("name", LARGE)
def test_squares_of_large_numbers_do_not_overflow(name, size):
    x = size * torch.tensor([1.0, -0.7, 0.9, 1.3])
    exact = LARGE[name](x.double())
    assert_close(LARGE[name](x).double(), exact, rtol=2e-5, atol=2e-6)
    slopes = [grad(lambda x: LARGE[name](x).sum())(y) for y in (x, x.double())]
    assert_close(slopes[0].double(), slopes[1], rtol=1e-3, atol=1e-6 / size + 1e-6 * (size < 1e5))


# -- pickles ---------------------------------------------------------------------------------------

SCORES, CLASSES_OF = normal(4, 3), torch.tensor([0, 1, 2, 2])
COSTLY = {"class_weights": WEIGHTS}
MADE = {  # what is made, and what it is called with
    "class_weighted": (class_weighted(losses.cross_entropy), COSTLY),
    "smoothed": (smoothed(losses.cross_entropy, 0.2), {}),
    "scaled": (scaled(losses.cross_entropy, torch.tensor(2.0)), {}),
    "summed": (summed({"a": (1.0, losses.cross_entropy), "b": ("c", losses.poly1)}), {"c": 2.0}),
    "channels_first": (channels_first(class_weighted(losses.softmax_focal)), COSTLY),
    "from_module": (from_module(torch.nn.CrossEntropyLoss(weight=WEIGHTS)), {}),
    "as_module": (as_module(class_weighted(losses.cross_entropy), **COSTLY), {}),
}


def stored(made):
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"pickle": lambda made: pickle.loads(pickle.dumps(made)), "deepcopy": copy.deepcopy,
        "torch.save": stored}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_losses_can_be_copied_and_stored(name, way):
    made, options = MADE[name]
    other = WAYS[way](made)
    assert_close(other(SCORES, CLASSES_OF, **options), made(SCORES, CLASSES_OF, **options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("criterion", [mean_of, weighted_mean_of])
def test_a_criterion_can_be_copied_and_stored(criterion, way):
    made, batch = criterion(losses.cross_entropy), Batch(SCORES, CLASSES_OF)
    hyper = COSTLY if criterion is weighted_mean_of else {}
    assert_close(WAYS[way](made)(SCORES, batch, hyper), made(SCORES, batch, hyper))


def test_a_process_of_its_own_takes_a_criterion():
    made, _ = MADE["as_module"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert_close(pool.apply(made, (SCORES, CLASSES_OF)), made(SCORES, CLASSES_OF))
