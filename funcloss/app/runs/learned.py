"""Whether a training run has learned anything: what to say of one that has not."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from funcloss._names import short


def learning_warnings(
    confusion: Int[Tensor, "classes classes"],
    classes: Sequence[str],
    losses: Sequence[tuple[float, int]],
    *,
    trained: bool,
) -> list[str]:
    """Return a warning for each sign that a training run has not learned.

    The signs: a training loss that is not finite at the end, or that did not fall, its mean over
    the last third of the reports against the first; and an accuracy that is no higher than that of
    always predicting the most frequent class.

    Args:
        confusion: Counts on the test set, rows the truth, shape ``(classes, classes)``.
        classes: Names of the classes.
        losses: Mean training loss and number of steps of each report, in order; fewer than two
            tell nothing.
        trained: Whether any step was taken.

    Returns:
        Sentences with what to try; empty if there is no such sign.

    Example:
        >>> right = torch.tensor([[5, 0], [1, 4]])
        >>> learning_warnings(right, ("cat", "dog"), [(0.7, 10), (0.2, 10)], trained=True)
        []
    """
    found = [_loss_warning(losses), _accuracy_warning(confusion, classes, trained=trained)]
    return [warning for warning in found if warning]


def _loss_warning(losses: Sequence[tuple[float, int]]) -> str:
    if len(losses) < 2:
        return ""
    third = max(1, len(losses) // 3)
    first, last = _mean(losses[:third]), _mean(losses[-third:])
    if not math.isfinite(last):
        return (
            "the training loss is not a finite number at the end: try a smaller learning_rate or "
            "clip_norm"
        )
    if last >= first:
        return (
            f"the training loss did not fall, from {first:.4g} at the start to {last:.4g} at the "
            "end: try a smaller learning_rate or more epochs"
        )
    return ""


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    return sum(loss * steps for loss, steps in losses) / sum(steps for _, steps in losses)


def _accuracy_warning(confusion: Tensor, classes: Sequence[str], *, trained: bool) -> str:
    support, right = confusion.sum(1), int(torch.trace(confusion))
    total, most = int(support.sum()), int(support.max())
    if not total or right > most:
        return ""
    warning = (
        f"test accuracy {right / total:.2%} is no higher than that of always predicting "
        f"{short(classes[int(support.argmax())], 40)} ({most / total:.2%}): "
    )
    if not trained:
        return f"{warning}the model was not trained, set epochs to 1 or more"
    return (
        f"{warning}try a smaller learning_rate, more epochs or smaller class weights; if accuracy "
        "was traded for recall or cost on purpose, judge the run by those"
    )
