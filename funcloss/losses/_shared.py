"""What every loss does on its way in and out: check, mask, widen; mask again, narrow."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from funcloss._checks import (
    check_class_labels,
    check_floating,
    check_range,
    check_shape,
    check_signs,
    check_where,
)
from funcloss._numbers import wide_dtype

_Loss = TypeVar("_Loss", bound=Callable[..., Any])

LEAST = 1e-20  # a plain number below it stands for 0, which float32 may round it to
SMALL = 1e-2  # below it a quotient of small numbers is left for its series


def masked(tensor: Tensor, where: Tensor | None) -> Tensor:
    """Return ``tensor`` with 0 in the place of every example that does not count.

    Masking the output of a loss alone would leave ``0 * inf = NaN`` in its gradient.
    """
    if where is None:
        return tensor
    return torch.where(where.reshape(where.shape + (1,) * (tensor.dim() - where.dim())), tensor, 0)


def class_inputs(
    name: str,
    logits: Tensor,
    labels: Tensor,
    where: Tensor | None,
    *,
    classes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check logits and labels; return them masked and wide, and what :func:`known_labels` adds.

    ``classes`` is how many there are, where it is not the number of columns.
    """
    check_class_labels(name, logits, labels, where)
    scores = masked(logits, where).to(wide_dtype(logits))
    classes = scores.shape[-1] if classes is None else classes
    return scores, *known_labels(name, masked(labels, where), classes)


def known_labels(name: str, labels: Tensor, classes: int) -> tuple[Tensor, Tensor | None]:
    """Refuse a label out of range; compiled, return 0 for it, and NaN to add to its loss."""
    labels = labels.long()
    if not torch.compiler.is_compiling():
        check_range(name, labels, classes)
        return labels, None
    known = (labels >= 0) & (labels < classes)
    return torch.where(known, labels, 0), torch.where(known, 0.0, torch.nan)


def paired_inputs(
    name: str,
    predictions: Tensor,
    targets: Tensor,
    where: Tensor | None,
    *,
    axes: int = 0,
    names: tuple[str, str] = ("predictions", "targets"),
) -> tuple[Tensor, Tensor]:
    """Check two floating tensors of one shape; return them masked and wide.

    ``axes`` is how many of the last axes belong to an example: 0 for values, 1 for distributions.
    """
    first, second = alike_inputs(name, where, axes, names, predictions, targets)
    return first, second


def alike_inputs(
    name: str, where: Tensor | None, axes: int, names: tuple[str, ...], *tensors: Tensor
) -> list[Tensor]:
    """Check floating tensors of one shape, named in turn; return them masked and wide."""
    # Tuples alone: what a dict of keywords takes is checked again in each call of a compiled loss.
    head, first = names[0], tensors[0]
    shape = tuple(first.shape)
    for what, tensor in zip(names, tensors, strict=True):
        check_floating(name, what, tensor)
    if len(shape) < axes:
        raise ValueError(f"{name}: {head} must have {axes} axes or more, got shape {shape}")
    for what, tensor in zip(names[1:], tensors[1:], strict=True):
        check_shape(name, what, tensor, shape, f"{head} {shape}")
    check_where(name, where, shape[: len(shape) - axes])
    wide = wide_dtype(first)
    return [masked(tensor, where).to(wide) for tensor in tensors]


def signed_inputs(
    name: str, scores: Tensor, signs: Tensor, where: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Check scores and signs, floating or integer; return both masked and wide."""
    check_signs(name, signs)
    if not signs.is_floating_point() and scores.is_floating_point():
        signs = signs.to(scores.dtype)
    return paired_inputs(name, scores, signs, where, names=("scores", "signs"))


def finished(
    values: Tensor, where: Tensor | None, like: Tensor, spoiled: Tensor | None = None
) -> Tensor:
    """Return ``values``, 0 where an example does not count, in the dtype of ``like``."""
    return masked(values if spoiled is None else values + spoiled, where).to(like.dtype)


def of_label(scores: Tensor, labels: Tensor) -> Tensor:
    """Return ``scores[..., label]``; never by indexing, which fails under ``vmap(grad)``."""
    if torch.compiler.is_compiling():
        # The compiler fuses this sum; the gradient of a gather it writes through memory.
        return torch.where(one_hot(labels, scores.shape[-1]), scores, 0).sum(-1)
    return scores.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Return whether each class is the label, bool ``(*batch, classes)``."""
    return labels.unsqueeze(-1) == torch.arange(classes, device=labels.device)


def states(**facts: object) -> Callable[[_Loss], _Loss]:
    """Return a decorator that puts facts on a loss, which the loss states where others would ask.

    Args:
        **facts: ``probabilities``: how its scores become probabilities; ``targets``: ``"bits"`` or
            ``"signs"`` where they are no labels; ``classes``: from ``(*predictions, **options)``
            to how many there are, where they are not the columns; ``couples_examples``: whether
            the value of one example depends on the others of its batch.
    """

    def mark(loss: _Loss) -> _Loss:
        for name, fact in facts.items():
            setattr(loss, name, fact)
        return loss

    return mark


def as_tensor(option: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(option, dtype=like.dtype, device=like.device)


def box_cox(log_values: Tensor, power: float | Tensor) -> Tensor:
    """Return ``(x^power - 1) / power`` of ``log(x)``; at ``power = 0`` the logarithm itself.

    Smooth in both arguments. With ``power = 1 - t`` it is the tempered logarithm ``log_t(x)``.
    """
    if not isinstance(power, Tensor):
        return (power * log_values).expm1() / power if abs(power) > LEAST else log_values
    power = as_tensor(power, log_values)
    exponent = power * log_values
    small = exponent.abs() < SMALL
    x = torch.where(small, exponent, 0.0)
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6))))
    far = torch.expm1(torch.where(small, -1.0, exponent)) / torch.where(small, 1.0, power)
    return torch.where(small, log_values * series, far)
