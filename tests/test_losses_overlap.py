import pytest
import torch
from torch.func import grad, vmap
from torch.testing import assert_close

from funcloss import mean
from funcloss.losses.overlap import dice, focal_tversky, jaccard, over_batch, tversky

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
    assert over_batch(dice).couples_examples
    assert not hasattr(dice, "couples_examples")
    assert over_batch(dice).__name__ == "dice"


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
            {"where": torch.ones(2, 7, dtype=torch.bool)},
            ValueError,
            r"over_batch: where must have shape \(2,\)",
        ),
    ],
)
def test_a_wrong_request_says_what_was_expected_and_what_came(loss, args, options, error, match):
    with pytest.raises(error, match=match):
        loss(*args, **options)
