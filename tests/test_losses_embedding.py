import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, vmap
from torch.testing import assert_close

from funcloss import mean
from funcloss.losses.embedding import (
    cosine_distance,
    cosine_embedding,
    hinge_embedding,
    margin_ranking,
    nt_xent,
    supervised_contrastive,
    triplet_margin,
)

DOUBLE = torch.float64


def signs_of(n):
    return torch.tensor([1.0, -1.0], dtype=DOUBLE).repeat(n)[:n]


def numbers(count, n=40):
    """``count`` tensors of ``n`` numbers: random, tied, zero, tiny and huge."""
    rows = torch.randn(count, n, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    rows[:, :2], rows[:, 2:4], rows[:, 4:6] = 0.0, 0.625, 1e-12
    rows[0, 6:10], rows[-1, 8:12] = 1e4, -1e4
    return rows.unbind()


def vectors(count, n=20, features=3):
    """``count`` batches of vectors: random, equal, zero, tiny and huge."""
    rows = torch.randn(count, n, features, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)
    rows[:, :2], rows[:, 2:4] = 0.0, 0.5
    rows[0, 4:6] = 0.0
    rows[-1, 6:8] = 1e-3
    rows[0, 8:10], rows[-1, 9:12] = 1e4, -1e4
    return rows.unbind()


@pytest.mark.parametrize("kind", [torch.int64, torch.int8, torch.float16])
def test_signs_may_be_integers(kind):
    signs = torch.tensor([1, -1, -1]).to(kind)
    x, y = torch.tensor([0.5, 0.25, 3.0]), torch.tensor([1.0, 0.0, 2.0])
    assert_close(hinge_embedding(x, signs), torch.tensor([0.5, 0.75, 0.0]))
    assert_close(margin_ranking(x, y, signs), torch.tensor([0.5, 0.25, 1.0]))
    pair = torch.eye(3), torch.eye(3)
    assert_close(cosine_embedding(*pair, signs), torch.tensor([0.0, 1.0, 1.0]))


# -- limits and known values -------------------------------------------------------------------


def test_cosine_distance_is_that_of_like_pairs():
    one, other = (x[12:] for x in vectors(2))
    like = cosine_embedding(one, other, torch.ones(len(one), dtype=DOUBLE))
    assert_close(cosine_distance(one, other), like, rtol=1e-9, atol=1e-9)
    units = F.normalize(one, dim=-1), F.normalize(other, dim=-1)
    assert_close(cosine_distance(*units), (units[0] - units[1]).square().sum(-1) / 2)


def test_margin_ranking_against_zero_is_the_hinge():
    (scores,) = numbers(1)
    signs = signs_of(40)
    got = margin_ranking(scores, torch.zeros_like(scores), signs, margin=1.0)
    assert_close(got, (1 - signs * scores).relu())


def test_triplet_margin_of_its_own_norm_is_that_without_a_distance():
    data = vectors(3)

    def distance(one, other):
        return (one - other + 1e-6).square().sum(-1).sqrt()

    assert_close(triplet_margin(*data, distance=distance), triplet_margin(*data))


def test_supervised_contrastive_of_two_views_is_nt_xent():
    first, second = (x[12:] for x in vectors(2))
    both, labels = torch.cat([first, second]), torch.arange(8).repeat(2)
    supervised = supervised_contrastive(both, labels, temperature=0.5)
    assert_close((supervised[:8] + supervised[8:]) / 2, nt_xent(first, second, temperature=0.5))
    assert_close(mean(supervised), mean(nt_xent(first, second)))


def test_known_values_of_contrastive_losses():
    # Cosines of 1 to its own and of 0 to the two others, for each of the four views.
    expected = torch.full((2,), math.log(1 + 2 / math.e), dtype=DOUBLE)
    assert_close(
        nt_xent(3 * torch.eye(2).double(), torch.eye(2).double(), temperature=1.0), expected
    )
    # All alike: nothing tells the positive from the 2 * 4 - 2 negatives.
    ones = torch.ones(4, 3, dtype=DOUBLE)
    assert_close(nt_xent(ones, ones), torch.full((4,), math.log(7), dtype=DOUBLE))
    same = supervised_contrastive(ones, torch.zeros(4).long())
    assert_close(same, torch.full((4,), math.log(3), dtype=DOUBLE))


def test_an_anchor_without_a_positive_costs_nothing_but_counts():
    embeddings, labels = vectors(1)[0][12:16], torch.tensor([0, 0, 1, 2])
    values = supervised_contrastive(embeddings, labels)
    assert (values[:2] > 0).all()
    assert torch.equal(values[2:], torch.zeros(2, dtype=DOUBLE))
    assert_close(mean(values), values.sum() / 4)
    # It is still a negative of the others.
    assert (values[:2] > supervised_contrastive(embeddings[:2], labels[:2])).all()


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("kept", [True, False])
def test_a_small_or_empty_batch_is_fine(n, kept):
    first, second = (x[12 : 12 + n] for x in vectors(2))
    where = torch.full((n,), kept)
    contrastive = nt_xent(first, second, where=where)
    supervised = supervised_contrastive(first, torch.zeros(n).long(), where=where)
    for values in (contrastive, supervised):
        assert values.shape == (n,)
        assert values.isfinite().all()
        assert n == 2 and kept or (values == 0).all()
    gradient = grad(lambda x: supervised_contrastive(x, torch.arange(n), where=where).sum())(first)
    assert torch.equal(gradient, torch.zeros_like(first))


def test_coupled_losses_say_so():
    assert nt_xent.couples_examples
    assert supervised_contrastive.couples_examples
    assert not hasattr(triplet_margin, "couples_examples")


def test_coupled_losses_may_be_mapped_over_sets_of_examples():
    first, second = (x.reshape(5, 4, 3) for x in vectors(2))
    mapped = vmap(nt_xent)(first, second)
    assert_close(mapped, torch.stack([nt_xent(*pair) for pair in zip(first, second, strict=True)]))


# -- where a norm has no slope -----------------------------------------------------------------


ZEROS = torch.zeros(2, 3)
AT_ZERO = {
    "cosine_embedding": lambda x: cosine_embedding(x, ZEROS + 1, torch.tensor([1, -1])),
    "both zero": lambda x: cosine_embedding(x, x, torch.tensor([1, -1]), margin=-0.5),
    "cosine_distance": lambda x: cosine_distance(x, ZEROS + 1),
    "nt_xent": lambda x: nt_xent(x, ZEROS + 1),
    "nt_xent of zeros": lambda x: nt_xent(x, x),
    "supervised_contrastive": lambda x: supervised_contrastive(x, torch.tensor([1, 1])),
    **{
        f"triplet, p={p}, eps={eps}": lambda x, p=p, eps=eps: triplet_margin(
            x, ZEROS, ZEROS + 0.1, p=p, eps=eps
        )
        for p in (1.0, 1.5, 2.0, 3.0, math.inf)
        for eps in (0.0, 1e-6)
    },
}


@pytest.mark.parametrize("at", AT_ZERO)
def test_derivatives_at_zero_vectors_are_finite(at):
    assert AT_ZERO[at](ZEROS).isfinite().all()
    gradient = grad(lambda x: AT_ZERO[at](x).sum())(ZEROS)
    assert gradient.isfinite().all()
    assert not hessian(lambda x: AT_ZERO[at](x).sum())(ZEROS).isnan().any()


@pytest.mark.parametrize(
    ("loss", "args", "options", "error", "match"),
    [
        (
            hinge_embedding,
            (torch.zeros(2), torch.ones(3)),
            {},
            ValueError,
            r"hinge_embedding: signs must have shape \(2,\) to match distances \(2,\), got \(3,\)",
        ),
        (
            margin_ranking,
            (torch.zeros(2), torch.zeros(2), torch.tensor([True, False])),
            {},
            TypeError,
            "margin_ranking: signs must hold -1 and \\+1, got torch.bool",
        ),
        (
            margin_ranking,
            (torch.zeros(2), torch.zeros(2, 1), torch.ones(2)),
            {},
            ValueError,
            r"margin_ranking: second must have shape \(2,\) to match first \(2,\), got \(2, 1\)",
        ),
        (
            triplet_margin,
            (ZEROS, ZEROS, ZEROS.long()),
            {},
            TypeError,
            "triplet_margin: negative must be floating point, got torch.int64",
        ),
        (
            triplet_margin,
            (ZEROS, ZEROS, ZEROS),
            {"margin": 0.0},
            ValueError,
            r"triplet_margin: margin must be in \(0, inf\), got 0.0",
        ),
        (
            triplet_margin,
            (ZEROS, ZEROS, ZEROS),
            {"distance": lambda a, b: a - b},
            ValueError,
            r"triplet_margin: distance\(...\) must have shape \(2,\) to match vectors \(2, 3\)",
        ),
        (
            triplet_margin,
            (torch.zeros(()),) * 3,
            {},
            ValueError,
            "triplet_margin: anchor must have 1 axes or more",
        ),
        (
            cosine_embedding,
            (ZEROS, ZEROS, torch.ones(2)),
            {"margin": 1.5},
            ValueError,
            r"cosine_embedding: margin must be in \[-1, 1\], got 1.5",
        ),
        (
            cosine_distance,
            (ZEROS, ZEROS),
            {"where": torch.ones(2, 3, dtype=torch.bool)},
            ValueError,
            r"cosine_distance: where must have shape \(2,\)",
        ),
        (
            nt_xent,
            (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)),
            {},
            ValueError,
            r"nt_xent: first must have shape \(batch, features\), got \(2, 3, 4\)",
        ),
        (
            supervised_contrastive,
            (ZEROS, torch.zeros(3).long()),
            {},
            ValueError,
            r"supervised_contrastive: labels must have shape \(2,\) to match embeddings \(2, 3\)",
        ),
        (
            supervised_contrastive,
            (ZEROS, torch.zeros(2)),
            {},
            TypeError,
            "supervised_contrastive: labels must hold integer classes, got torch.float32",
        ),
        (
            supervised_contrastive,
            (ZEROS, torch.zeros(2).long()),
            {"temperature": -1},
            ValueError,
            r"supervised_contrastive: temperature must be in \(0, inf\), got -1",
        ),
    ],
)
def test_a_wrong_request_says_what_was_expected_and_what_came(loss, args, options, error, match):
    with pytest.raises(error, match=match):
        loss(*args, **options)
