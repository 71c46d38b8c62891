"""What a step minimises: a model, a loss and a reduction as one pure function, and additions."""

from funcloss.objectives.supervised import (
    make_forward,
    mean_of,
    sum_of,
    supervised,
    weighted_mean_of,
)
from funcloss.objectives.terms import fgsm, l1, l2, multi_task, pgd, uncertainty_weighted

__all__ = [
    "fgsm",
    "l1",
    "l2",
    "make_forward",
    "mean_of",
    "multi_task",
    "pgd",
    "sum_of",
    "supervised",
    "uncertainty_weighted",
    "weighted_mean_of",
]
