"""The rows of losses of pairs, triplets and sets."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from catalogue.rows import OfTorch, number, row, wide
from funcloss import losses
from funcloss.laws.feed import Feed


def city_block(first: Tensor, second: Tensor) -> Tensor:
    """Sum of the absolute differences: a distance to hand to ``triplet_margin``."""
    return (first - second).abs().sum(-1)


def _triplet_margin(*data: Tensor, distance=None, **options) -> Tensor:
    if distance is None:
        return F.triplet_margin_loss(*data, **options)
    return F.triplet_margin_with_distance_loss(*data, distance_function=distance, **options)


def _cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(first, second, dim=-1)


def _cosine(first: list[float], second: list[float]) -> float:
    product = sum(a * b for a, b in zip(first, second, strict=True))
    return product / max(math.hypot(*first), 1e-8) / max(math.hypot(*second), 1e-8)


def _nt_xent(first: Tensor, second: Tensor, temperature: float | Tensor = 0.5) -> Tensor:
    """The loss of the paper's algorithm 1, view by view."""
    n, t = first.shape[0], float(temperature)
    views = first.tolist() + second.tolist()
    powers = [[math.exp(_cosine(a, b) / t) for b in views] for a in views]

    def of_view(i: int) -> float:
        others = [powers[i][k] for k in range(2 * n) if k != i]
        return -math.log(powers[i][(i + n) % (2 * n)] / sum(others))

    values = [(of_view(i) + of_view(i + n)) / 2 for i in range(n)]
    return torch.tensor(values, dtype=torch.float64)


def _supervised_contrastive(
    embeddings: Tensor, labels: Tensor, temperature: float | Tensor = 0.1
) -> Tensor:
    """Equation 2 of the paper, anchor by anchor."""
    vectors, classes, t = embeddings.tolist(), labels.tolist(), float(temperature)
    values = []
    for i, anchor in enumerate(vectors):
        others = [k for k in range(len(vectors)) if k != i]
        total = sum(math.exp(_cosine(anchor, vectors[k]) / t) for k in others)
        shares = [
            _cosine(anchor, vectors[k]) / t - math.log(total)
            for k in others
            if classes[k] == classes[i]
        ]
        values.append(-sum(shares) / len(shares) if shares else 0.0)
    return torch.tensor(values, dtype=torch.float64)


_DISTANCES = Feed(("distances", "signs"))
_SCORES = Feed(("first", "second", "signs"))
_PAIRS = wide("first", "second", "signs")
_VIEWS = wide("first", "second")
_LABELLED = wide("embeddings", "labels")
_TRIPLETS = wide("anchor", "positive", "negative")
_HINGE = OfTorch(F.hinge_embedding_loss)
_RANKING = OfTorch(F.margin_ranking_loss)
_COSINE = OfTorch(F.cosine_embedding_loss)


def _triplet(**options: object):
    return row(losses.triplet_margin, _TRIPLETS, OfTorch(_triplet_margin), options)


CASES = {
    "hinge_embedding": row(losses.hinge_embedding, _DISTANCES, _HINGE),
    "hinge_embedding, wide": row(
        losses.hinge_embedding, _DISTANCES, _HINGE, {"margin": number(1.7)}
    ),
    "margin_ranking": row(losses.margin_ranking, _SCORES, _RANKING),
    "margin_ranking, margin": row(
        losses.margin_ranking, _SCORES, _RANKING, {"margin": number(0.5)}
    ),
    "triplet_margin": _triplet(),
    "triplet_margin, swap": _triplet(swap=True, margin=number(2.0)),
    "triplet_margin, p=1": _triplet(p=1.0),
    "triplet_margin, p=inf": _triplet(p=math.inf),
    "triplet_margin, p tensor": _triplet(p=number(1.5), eps=1e-3),
    "triplet_margin, distance": _triplet(distance=city_block, swap=True),
    "cosine_embedding": row(losses.cosine_embedding, _PAIRS, _COSINE),
    "cosine_embedding, margin": row(
        losses.cosine_embedding, _PAIRS, _COSINE, {"margin": number(0.2)}
    ),
    "cosine_distance": row(
        losses.cosine_distance, wide("predictions", "targets"), _cosine_distance, predictions=2
    ),
    "nt_xent": row(losses.nt_xent, _VIEWS, _nt_xent),
    "nt_xent, temperature": row(losses.nt_xent, _VIEWS, _nt_xent, {"temperature": number(0.2)}),
    "supervised_contrastive": row(
        losses.supervised_contrastive, _LABELLED, _supervised_contrastive
    ),
    "supervised_contrastive, temperature": row(
        losses.supervised_contrastive,
        _LABELLED,
        _supervised_contrastive,
        {"temperature": number(0.5)},
    ),
}
