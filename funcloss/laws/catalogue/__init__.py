"""The rows of the catalogue: every loss with its data, its costs and another computation of it."""

from funcloss.laws.catalogue import (
    binary,
    classification,
    combinators,
    cost_sensitive,
    divergence,
    embedding,
    fused,
    imbalance,
    margin,
    ordinal,
    overlap,
    regression,
    robust,
)

SUBJECTS = {
    **binary.SUBJECTS,
    **classification.SUBJECTS,
    **combinators.SUBJECTS,
    **cost_sensitive.SUBJECTS,
    **divergence.SUBJECTS,
    **embedding.SUBJECTS,
    **fused.SUBJECTS,
    **imbalance.SUBJECTS,
    **margin.SUBJECTS,
    **ordinal.SUBJECTS,
    **overlap.SUBJECTS,
    **regression.SUBJECTS,
    **robust.SUBJECTS,
}

__all__ = ["SUBJECTS"]
