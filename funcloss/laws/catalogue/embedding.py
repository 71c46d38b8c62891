"""The rows of :mod:`funcloss.losses.embedding`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from funcloss.laws.subject import Subject
from funcloss.losses.embedding import (
    cosine_distance,
    cosine_embedding,
    hinge_embedding,
    margin_ranking,
    nt_xent,
    supervised_contrastive,
    triplet_margin,
)

FEATURES = 4  # not as many as there are classes: they are no classes

_COUPLED = {
    law: "couples the examples of a batch" for law in ("map over examples", "per-sample gradients")
}


def distances_and_signs(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return distances and signs of -1 or +1, both ``(n)``."""
    return 2 * torch.rand(n, generator=generator, dtype=torch.float64), _signs(n, generator)


def two_scores_and_signs(n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return two scores and signs of -1 or +1, all ``(n)``."""
    first, second = torch.randn(2, n, generator=generator, dtype=torch.float64).unbind()
    return first, second, _signs(n, generator)


def two_vectors(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return two vectors an example, both ``(n, FEATURES)``."""
    vectors = torch.randn(2, n, FEATURES, generator=generator, dtype=torch.float64)
    return vectors[0], vectors[1]


def two_vectors_and_signs(n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return two vectors ``(n, FEATURES)`` and signs of -1 or +1 ``(n)``."""
    return *two_vectors(n, generator), _signs(n, generator)


def triplets(n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return three vectors an example, all ``(n, FEATURES)``."""
    vectors = torch.randn(3, n, FEATURES, generator=generator, dtype=torch.float64)
    return vectors[0], vectors[1], vectors[2]


def vectors_and_labels(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return vectors ``(n, FEATURES)`` and labels ``(n)`` of three classes."""
    vectors = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    return vectors, torch.randint(3, (n,), generator=generator)


def city_block(first: Tensor, second: Tensor) -> Tensor:
    """Sum of the absolute differences: a distance to hand to ``triplet_margin``."""
    return (first - second).abs().sum(-1)


def _signs(n: int, generator: Generator) -> Tensor:
    return 2 * (torch.rand(n, generator=generator) > 0.5).double() - 1


def _hinge_embedding(distances: Tensor, signs: Tensor, margin: float | Tensor = 1.0) -> Tensor:
    return F.hinge_embedding_loss(distances, signs, margin=float(margin), reduction="none")


def _margin_ranking(
    first: Tensor, second: Tensor, signs: Tensor, margin: float | Tensor = 0.0
) -> Tensor:
    return F.margin_ranking_loss(first, second, signs, margin=float(margin), reduction="none")


def _triplet_margin(
    anchor: Tensor,
    positive: Tensor,
    negative: Tensor,
    margin: float | Tensor = 1.0,
    p: float | Tensor = 2.0,
    swap: bool = False,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    options: dict[str, Any] = {"margin": float(margin), "swap": swap, "reduction": "none"}
    if distance is not None:
        options["distance_function"] = distance
        return F.triplet_margin_with_distance_loss(anchor, positive, negative, **options)
    return F.triplet_margin_loss(anchor, positive, negative, p=float(p), **options)


def _cosine_embedding(
    first: Tensor, second: Tensor, signs: Tensor, margin: float | Tensor = 0.0
) -> Tensor:
    options = {"margin": float(margin), "reduction": "none"}
    return F.cosine_embedding_loss(first, second, signs, **options)


def _cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(first, second, dim=-1)


def _cosine(first: list[float], second: list[float]) -> float:
    product = sum(a * b for a, b in zip(first, second, strict=True))
    return product / math.hypot(*first) / math.hypot(*second)


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


def _triplet(**options: float | Tensor) -> Subject:
    return Subject(triplet_margin, triplets, options, predictions=3, reference=_triplet_margin)


SUBJECTS = {
    "hinge_embedding": Subject(hinge_embedding, distances_and_signs, reference=_hinge_embedding),
    "hinge_embedding, wide": Subject(
        hinge_embedding,
        distances_and_signs,
        {"margin": torch.tensor(1.7, dtype=torch.float64)},
        reference=_hinge_embedding,
    ),
    "margin_ranking": Subject(
        margin_ranking, two_scores_and_signs, predictions=2, reference=_margin_ranking
    ),
    "margin_ranking, margin": Subject(
        margin_ranking,
        two_scores_and_signs,
        {"margin": torch.tensor(0.5, dtype=torch.float64)},
        predictions=2,
        reference=_margin_ranking,
    ),
    "triplet_margin": _triplet(),
    "triplet_margin, swap": _triplet(swap=True, margin=torch.tensor(2.0, dtype=torch.float64)),
    "triplet_margin, p=1": _triplet(p=1.0),
    "triplet_margin, p=inf": _triplet(p=math.inf),
    "triplet_margin, p tensor": _triplet(p=torch.tensor(3.0, dtype=torch.float64)),
    "triplet_margin, distance": Subject(
        triplet_margin,
        triplets,
        {"distance": city_block},  # pyright: ignore[reportArgumentType]
        predictions=3,
        reference=_triplet_margin,
    ),
    "cosine_embedding": Subject(
        cosine_embedding, two_vectors_and_signs, predictions=2, reference=_cosine_embedding
    ),
    "cosine_embedding, margin": Subject(
        cosine_embedding,
        two_vectors_and_signs,
        {"margin": torch.tensor(0.2, dtype=torch.float64)},
        predictions=2,
        reference=_cosine_embedding,
    ),
    "cosine_distance": Subject(
        cosine_distance, two_vectors, predictions=2, reference=_cosine_distance
    ),
    "nt_xent": Subject(nt_xent, two_vectors, predictions=2, reference=_nt_xent, limits=_COUPLED),
    "nt_xent, temperature": Subject(
        nt_xent,
        two_vectors,
        {"temperature": torch.tensor(0.2, dtype=torch.float64)},
        predictions=2,
        reference=_nt_xent,
        limits=_COUPLED,
    ),
    "supervised_contrastive": Subject(
        supervised_contrastive,
        vectors_and_labels,
        reference=_supervised_contrastive,
        limits=_COUPLED,
    ),
    "supervised_contrastive, temperature": Subject(
        supervised_contrastive,
        vectors_and_labels,
        {"temperature": torch.tensor(0.5, dtype=torch.float64)},
        reference=_supervised_contrastive,
        limits=_COUPLED,
    ),
}
