"""Whether a training run has learned anything, and long enough: what to say of one that has not."""

import itertools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from funcloss._names import short

_LEFT = 0.5  # of the loss that a run began with: below it, it has learned
_RATE = 0.25  # of the mean rate at which the loss fell: below it, it has flattened
_FALLS = 3  # of the validation loss, at the end
_REPORTS = 9  # that show a fall without validation data


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


def no_better_than_constant(confusion: Int[Tensor, "classes classes"]) -> bool:
    """Return whether the mean recall of the classes is at most that of a constant prediction.

    A constant prediction has recall 1 on one class and 0 on the others, whatever their counts.

    Args:
        confusion: Counts, rows the truth, shape ``(classes, classes)``.

    Example:
        >>> no_better_than_constant(torch.tensor([[9, 1], [1, 0]]))
        True
    """
    support = confusion.sum(1)
    present = support > 0
    recall = confusion.diagonal()[present].double() / support[present]
    return bool(present.any()) and float(recall.sum()) <= 1.0


def underfitted(
    losses: Sequence[tuple[float, int]],
    validation: Sequence[float],
    *,
    epochs: int,
    constant: bool,
) -> list[str]:
    """Return a warning if a training run of a fixed number of epochs should have gone on.

    Either the model predicts no better than a constant on its training data; or its training loss
    is above half of the first report's and was still falling: over the last third of the reports
    at a quarter of the mean rate of the run or more (one-cycle and cosine flatten the end of every
    run), while the validation loss fell after each of the last three epochs. Against noise, every
    report of the last two thirds must be below the mean of the third before: noise alone passes in
    less than one run of a hundred.

    Args:
        losses: Mean training loss and number of steps of each report, in order.
        validation: Loss on validation data before the first epoch and after each; if fewer than
            two are known, nine reports are needed to tell.
        epochs: How many the run took.
        constant: Whether the model is :func:`no_better_than_constant` on training data.

    Returns:
        A sentence with what to try; empty if there is no such sign.

    Example:
        >>> falling = [(1.0, 50), (0.9, 50), (0.8, 50)]
        >>> underfitted(falling, (1.1, 0.9, 0.8), epochs=2, constant=False)[0][:61]
        'underfitted: the training loss was still falling at the end, '
        >>> underfitted(falling, (1.1, 0.9, 0.95), epochs=2, constant=False)
        []
    """
    if _loss_warning(losses):  # another fix comes first
        return []
    longer = f"train longer (--epochs {2 * epochs}, or auto)"
    if constant:
        return [
            "underfitted: on its training data the model does no better than a constant "
            f"prediction: {longer}; if that does not help, its inputs do not tell the classes apart"
        ]
    falls = [after < before for before, after in itertools.pairwise(validation)][-_FALLS:]
    known = all(falls) if falls else len(losses) >= _REPORTS
    if not known or not _still_falling(losses):
        return []
    return [
        "underfitted: the training loss was still falling at the end, from "
        f"{losses[0][0]:.4g} in the first report to {losses[-1][0]:.4g} in the last: {longer}"
    ]


def _still_falling(losses: Sequence[tuple[float, int]]) -> bool:
    third = len(losses) // 3
    if not third or not all(math.isfinite(loss) for loss, _ in losses):
        return False
    ends = list(itertools.accumulate(steps for _, steps in losses))
    middles = [(end - steps / 2, steps) for end, (_, steps) in zip(ends, losses, strict=True)]
    parts = slice(0, third), slice(-2 * third, -third), slice(-third, None)
    first, middle, last = (_mean(losses[part]) for part in parts)
    begin, before, end = (_mean(middles[part]) for part in parts)
    steady = all(loss < first for loss, _ in losses[parts[1]])
    steady = steady and all(loss < middle for loss, _ in losses[parts[2]])
    rate, mean_rate = (middle - last) / (end - before), (first - last) / (end - begin)
    return steady and rate >= _RATE * mean_rate and last > _LEFT * losses[0][0] > 0.0
