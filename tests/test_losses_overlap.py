import copy
import pickle

import pytest
import torch
from torch.func import grad, vmap
from torch.testing import assert_close

from funcloss import mean
from funcloss.combinators import couples_examples, options_of
from funcloss.losses.overlap import (
    dice,
    focal_tversky,
    generalized_dice,
    jaccard,
    over_batch,
    tversky,
)

DOUBLE = torch.float64
ALL = [dice, jaccard, tversky, focal_tversky]


def images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.rand(*shape, generator=generator, dtype=DOUBLE)
    return probabilities, (torch.rand(*shape, generator=generator) > 0.6).double()


# -- limits and known values -------------------------------------------------------------------


def test_tversky_is_dice_jaccard_and_focal_at_their_settings():
    data = images(20, 7)
    assert_close(tversky(*data, alpha=1.0, beta=1.0, smooth=0.3), jaccard(*data, smooth=0.3))
    assert_close(tversky(*data, alpha=0.5, beta=0.5, smooth=0.3), dice(*data, smooth=0.6))
    assert_close(focal_tversky(*data, gamma=1.0), tversky(*data))
    assert_close(focal_tversky(*data, gamma=2.0), tversky(*data).sqrt())
    d = dice(*data, smooth=0.6)
    assert_close(jaccard(*data, smooth=0.3), 2 * d / (1 + d))


@pytest.mark.parametrize(
    ("loss", "options", "expected"),
    [  # of TP = 2, FP = 1, FN = 3
        (dice, {}, 4 / 9),
        (dice, {"smooth": 2.0}, 4 / 10),
        (jaccard, {}, 4 / 7),
        (tversky, {}, 2.4 / 5.4),
        (tversky, {"alpha": 1.0, "beta": 0.0}, 1 / 4),
        (tversky, {"alpha": 0.0, "beta": 1.0}, 3 / 6),
        (focal_tversky, {"gamma": 0.5}, (2.4 / 5.4) ** 2),
    ],
)
def test_known_values(loss, options, expected):
    probabilities = torch.tensor([1.0, 1, 1, 0, 0, 0, 0], dtype=DOUBLE)
    targets = torch.tensor([1.0, 1, 0, 1, 1, 1, 0], dtype=DOUBLE)
    got = loss(probabilities, targets, **options)
    assert_close(got, torch.tensor(expected, dtype=DOUBLE))


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("smooth", [1.0, 1e-3])
def test_an_empty_or_perfect_image_costs_nothing_and_has_a_finite_slope(loss, smooth):
    targets = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    assert torch.equal(loss(targets, targets, smooth=smooth), torch.zeros(3))
    gradient = grad(lambda p: loss(p, targets, smooth=smooth).sum())(targets)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", ALL)
def test_the_worst_image_costs_almost_one(loss):
    targets = torch.tensor([[1.0, 0.0] * 50], dtype=DOUBLE)
    value = loss(1 - targets, targets, smooth=1e-9)
    assert (value < 1).all()
    assert_close(value, torch.ones(1, dtype=DOUBLE))


@pytest.mark.parametrize("loss", [tversky, focal_tversky])
def test_alpha_prices_false_alarms_and_beta_misses(loss):
    probabilities, targets = images(1, 7)

    def of(alpha, beta):
        return loss(probabilities, targets, alpha=alpha, beta=beta).sum()

    costs = torch.tensor(0.3, dtype=DOUBLE), torch.tensor(0.7, dtype=DOUBLE)
    assert all(slope > 0 for slope in grad(of, (0, 1))(*costs))
    none_missed = probabilities.maximum(targets)
    slope = grad(lambda b: loss(none_missed, targets, beta=b).sum())(costs[1])
    assert_close(slope, torch.zeros((), dtype=DOUBLE))


# -- axes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL)
def test_images_with_classes_last_give_a_value_an_image_and_class(loss):
    probabilities, targets = images(2, 4, 5, 3)  # N, H, W, C
    values = loss(probabilities, targets, dim=(-3, -2))
    assert values.shape == (2, 3)
    for n in range(2):
        for c in range(3):
            alone = loss(probabilities[n, :, :, c].flatten(), targets[n, :, :, c].flatten())
            assert_close(values[n, c], alone)
    assert_close(loss(probabilities, targets, dim=(-2, -3)), values)
    channels_first = (x.movedim(-1, 1) for x in (probabilities, targets))
    assert_close(loss(*channels_first, dim=(-2, -1)), values)


def test_where_has_the_shape_of_what_remains():
    probabilities, targets = images(2, 4, 5, 3)
    where = torch.tensor([[True, False, True], [False, True, True]])
    values = dice(probabilities, targets, dim=(-3, -2), where=where)
    assert_close(values, dice(probabilities, targets, dim=(-3, -2)) * where)
    gradient = grad(lambda p: dice(p, targets, dim=(-3, -2), where=where).sum())(probabilities)
    assert (gradient[0, ..., 1] == 0).all()
    assert (gradient[0, ..., 0] != 0).any()


# -- a batch as one image ----------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL)
def test_over_batch_joins_the_images(loss):
    probabilities, targets = images(4, 6, 5)
    whole = loss(probabilities.flatten(), targets.flatten(), smooth=0.5)
    values = over_batch(loss)(probabilities, targets, dim=(-2, -1), smooth=0.5)
    assert_close(values, whole.expand(4))
    assert_close(mean(values), whole)
    assert (whole - loss(probabilities, targets, dim=(-2, -1), smooth=0.5)).abs().max() > 1e-3


def test_over_batch_leaves_out_what_does_not_count():
    probabilities, targets = images(4, 6)
    where = torch.tensor([True, False, True, False])
    values = over_batch(dice)(probabilities, targets, where=where)
    kept = dice(probabilities[where].flatten(), targets[where].flatten())
    assert_close(values, torch.where(where, kept, 0.0))
    assert_close(mean(values, where=where), kept)


def test_over_batch_is_mapped_over_classes():
    probabilities, targets = images(2, 4, 5, 3)

    def batch_dice(p, t):
        return over_batch(dice)(p, t, dim=(-2, -1))

    values = vmap(batch_dice, in_dims=-1, out_dims=-1)(probabilities, targets)
    per_class = [dice(probabilities[..., c].flatten(), targets[..., c].flatten()) for c in range(3)]
    assert_close(values, torch.stack(per_class).expand(2, 3))


def test_over_batch_is_coupled_and_the_loss_it_came_from_is_not():
    assert couples_examples(over_batch(dice))
    assert not couples_examples(dice)
    assert repr(over_batch(dice)) == "over_batch(dice)"
    assert options_of(over_batch(tversky)) == options_of(tversky)


def test_over_batch_is_pickled_copied_and_equal_to_another_of_the_same():
    loss = over_batch(tversky)
    data = images(3, 7)
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert other == loss
        assert couples_examples(other)
        assert_close(other(*data, beta=0.4), loss(*data, beta=0.4))
    assert loss != over_batch(dice)


# -- pixels that count -------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
def test_a_pixel_that_does_not_count_is_as_if_it_were_not_there(loss, bad):
    probabilities, targets = images(3, 4, 5)
    where = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    where[2] = False
    spoilt = [torch.where(where, x, bad) for x in (probabilities, targets)]
    values = loss(*spoilt, dim=(-2, -1), where=where)
    for p, t, w, value in zip(probabilities, targets, where, values, strict=True):
        assert_close(value, loss(p[w], t[w]) if w.any() else torch.zeros((), dtype=DOUBLE))
    slope = grad(lambda p: loss(p, spoilt[1], dim=(-2, -1), where=where).sum())(spoilt[0])
    assert (slope[~where] == 0).all()
    assert (slope[where] != 0).any()
    mapped = vmap(lambda p, t, w: loss(p, t, dim=(-2, -1), where=w))(*spoilt, where)
    assert_close(mapped, values)


def test_pixels_that_count_move_with_the_axes_of_the_image():
    probabilities, targets = images(2, 4, 5, 3)  # N, H, W, C
    where = torch.rand(2, 4, 5, 3, generator=torch.Generator().manual_seed(1)) > 0.4
    values = dice(probabilities, targets, dim=(-3, -2), where=where)
    assert values.shape == (2, 3)
    for n in range(2):
        for c in range(3):
            w = where[n, ..., c]
            assert_close(values[n, c], dice(probabilities[n, ..., c][w], targets[n, ..., c][w]))


def test_over_batch_takes_pixels_too():
    probabilities, targets = images(4, 6)
    where = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    where[1] = False
    values = over_batch(dice)(torch.where(where, probabilities, torch.nan), targets, where=where)
    kept = dice(probabilities[where], targets[where])
    assert_close(values, torch.where(where.any(-1), kept, 0.0))


@pytest.mark.parametrize("loss", [*ALL, generalized_dice])
def test_an_option_is_one_number_or_one_per_image(loss):
    probabilities, targets = images(3, 6, 2)
    given = {dice: "smooth", jaccard: "smooth", tversky: "alpha", focal_tversky: "gamma",
             generalized_dice: "power"}[loss]  # fmt: skip
    options = {} if loss is generalized_dice else {"dim": (-2, -1)}
    each = torch.tensor([0.5, 1.0, 2.0], dtype=DOUBLE)
    values = loss(probabilities, targets, **options, **{given: each})
    alone = [
        loss(p, t, **options, **{given: float(g)})
        for p, t, g in zip(probabilities, targets, each, strict=True)
    ]
    assert_close(values, torch.stack(alone))
    for wrong in (each[:2], each[:, None]):
        with pytest.raises(ValueError, match=rf"{given} must be a number or a scalar tensor, or"):
            loss(probabilities, targets, **options, **{given: wrong})


# -- generalised Dice --------------------------------------------------------------------------


def class_images(*shape, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(*shape, classes, generator=generator, dtype=DOUBLE).softmax(-1)
    labels = torch.randint(classes, shape, generator=generator)
    return probabilities, torch.nn.functional.one_hot(labels, classes).double()


def of_the_paper(p, t):
    """Sudre et al., eq. 2, of one image ``(pixels, classes)`` in which every class is."""
    weights = [1 / float(t[:, c].sum()) ** 2 for c in range(t.shape[1])]
    both = sum(w * float((p[:, c] * t[:, c]).sum()) for c, w in enumerate(weights))
    return 1 - 2 * both / sum(w * float((p[:, c] + t[:, c]).sum()) for c, w in enumerate(weights))


def test_generalised_dice_is_the_papers():
    probabilities, targets = class_images(5, 40)
    values = generalized_dice(probabilities, targets, smooth=1e-9)
    expected = [of_the_paper(p, t) for p, t in zip(probabilities, targets, strict=True)]
    assert_close(values, torch.tensor(expected, dtype=DOUBLE), rtol=1e-8, atol=1e-8)
    square = [x.reshape(5, 8, 5, 4) for x in (probabilities, targets)]
    assert_close(generalized_dice(*square, dim=(-3, -2), smooth=1e-9), values)


def test_at_power_zero_it_is_the_dice_of_all_classes_at_their_weights():
    probabilities, targets = class_images(5, 40)
    even = generalized_dice(probabilities, targets, power=0.0)
    assert_close(even, dice(probabilities, targets, dim=(-2, -1)))
    only = generalized_dice(
        probabilities, targets, power=0.0, class_weights=torch.tensor([0.0, 1.0, 0, 0]).double()
    )
    assert_close(only, dice(probabilities[..., 1], targets[..., 1]))


def test_an_absent_class_weighs_as_much_as_the_rarest():
    probabilities, targets = class_images(6, 40, classes=3)
    absent = torch.nn.functional.one_hot(targets.argmax(-1).clamp(max=1), 3).double()
    value = generalized_dice(probabilities, absent)
    volumes = absent.sum(-2)
    weights = (volumes[:, :2].amin(-1, keepdim=True) / volumes).clamp(max=1).square()
    both = 2 * (weights * (probabilities * absent).sum(-2)).sum(-1)
    every = (weights * (probabilities + absent).sum(-2)).sum(-1)
    assert_close(value, 1 - (both + 1) / (every + 1))
    slopes = grad(lambda p: generalized_dice(p, absent).sum())(probabilities)
    assert slopes.isfinite().all()
    assert (slopes[..., 2] > 0).all()  # a false alarm
    nothing = generalized_dice(probabilities, 0 * absent)
    assert ((nothing > 0) & (nothing < 1)).all()
    assert torch.equal(generalized_dice(absent, absent), torch.zeros(6, dtype=DOUBLE))


def test_generalised_dice_counts_the_pixels_that_count():
    probabilities, targets = class_images(3, 4, 5)
    where = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.4
    where[2] = False
    spoilt = torch.where(where[..., None], probabilities, torch.nan)
    values = generalized_dice(spoilt, targets, dim=(-3, -2), where=where)
    for p, t, w, value in zip(probabilities, targets, where, values, strict=True):
        expected = generalized_dice(p[w], t[w]) if w.any() else torch.zeros((), dtype=DOUBLE)
        assert_close(value, expected)
    slope = grad(lambda p: generalized_dice(p, targets, dim=(-3, -2), where=where).sum())(spoilt)
    assert (slope[~where] == 0).all()
    some = torch.tensor([True, False, True])
    kept = generalized_dice(probabilities, targets, dim=(-3, -2), where=some)
    assert_close(kept, generalized_dice(probabilities, targets, dim=(-3, -2)) * some)


@pytest.mark.parametrize(
    ("loss", "args", "options", "error", "match"),
    [
        (
            dice,
            (torch.zeros(2, 7), torch.zeros(2, 6)),
            {},
            ValueError,
            r"dice: targets must have shape \(2, 7\) to match probabilities \(2, 7\), got \(2, 6\)",
        ),
        (
            jaccard,
            (torch.zeros(2, 7), torch.zeros(2, 7, dtype=torch.bool)),
            {},
            TypeError,
            "jaccard: targets must be floating point, got torch.bool",
        ),
        (
            dice,
            (torch.zeros(2, 7), torch.zeros(2, 7)),
            {"dim": 1},
            ValueError,
            "dice: dim must be one or more distinct negative axes, got 1",
        ),
        (
            dice,
            (torch.zeros(2, 7), torch.zeros(2, 7)),
            {"dim": (-1, -1)},
            ValueError,
            r"dice: dim must be one or more distinct negative axes, got \(-1, -1\)",
        ),
        (
            tversky,
            (torch.zeros(7), torch.zeros(7)),
            {"dim": (-2, -1)},
            ValueError,
            r"tversky: probabilities must have 2 axes or more, got shape \(7,\)",
        ),
        (
            tversky,
            (torch.zeros(2, 7), torch.zeros(2, 7)),
            {"alpha": -0.1},
            ValueError,
            r"tversky: alpha must be in \[0, inf\), got -0.1",
        ),
        (
            focal_tversky,
            (torch.zeros(2, 7), torch.zeros(2, 7)),
            {"gamma": 0},
            ValueError,
            r"focal_tversky: gamma must be in \(0, inf\), got 0",
        ),
        (
            jaccard,
            (torch.zeros(2, 7), torch.zeros(2, 7)),
            {"smooth": 0.0},
            ValueError,
            r"jaccard: smooth must be in \(0, inf\), got 0.0",
        ),
        (
            over_batch(dice),
            (torch.zeros(2, 7), torch.zeros(2, 7)),
            {"where": torch.ones(7, dtype=torch.bool)},
            ValueError,
            r"over_batch: where must have shape \(2,\), of images, or \(2, 7\), of pixels, got",
        ),
        (
            dice,
            (torch.zeros(2, 7), torch.zeros(2, 7)),
            {"where": torch.ones(2)},
            TypeError,
            "dice: where must be boolean, got torch.float32",
        ),
        (
            generalized_dice,
            (torch.zeros(2, 7, 3), torch.zeros(2, 7, 3)),
            {"dim": (-2, -1)},
            ValueError,
            "generalized_dice: dim must be .* before the last, the classes, got",
        ),
        (
            generalized_dice,
            (torch.zeros(2, 7, 3), torch.zeros(2, 7, 3)),
            {"class_weights": [1.0, 2.0, 3.0]},
            TypeError,
            "generalized_dice: class_weights must be a tensor, got list",
        ),
    ],
)
def test_a_wrong_request_says_what_was_expected_and_what_came(loss, args, options, error, match):
    with pytest.raises(error, match=match):
        loss(*args, **options)
