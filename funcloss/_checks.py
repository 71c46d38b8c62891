"""Checks on shapes, dtypes and plain numbers: all that is known before any value is.

Every message says who refuses, what was expected and what came.
"""

import math

import torch
from torch import Tensor


def check_floating(name: str, what: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is floating point."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: {what} must be floating point, got {tensor.dtype}")


def check_shape(name: str, what: str, tensor: Tensor, shape: tuple[int, ...], match: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` has ``shape``, which follows from ``match``."""
    if tuple(tensor.shape) != tuple(shape):
        expected, got = tuple(shape), tuple(tensor.shape)
        raise ValueError(f"{name}: {what} must have shape {expected} to match {match}, got {got}")


def check_where(name: str, where: Tensor | None, shape: tuple[int, ...]) -> None:
    """Raise unless ``where`` is None or a boolean tensor with one entry an example."""
    if where is None:
        return
    if where.dtype != torch.bool:
        raise TypeError(f"{name}: where must be boolean, got {where.dtype}")
    check_shape(name, "where", where, shape, "one entry an example")


def check_labels(name: str, what: str, labels: Tensor) -> None:
    """Raise ``TypeError`` unless ``labels`` holds integers."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{name}: {what} must hold integer classes, got {labels.dtype}")


def check_class_labels(name: str, logits: Tensor, labels: Tensor, where: Tensor | None) -> None:
    """Check ``logits`` of shape ``(*batch, classes)`` against ``labels`` of shape ``(*batch)``."""
    check_floating(name, "logits", logits)
    check_labels(name, "labels", labels)
    if logits.dim() == 0:
        raise ValueError(f"{name}: logits must have a class axis, got a scalar")
    shape = tuple(logits.shape)
    check_shape(name, "labels", labels, shape[:-1], f"logits {shape}")
    check_where(name, where, shape[:-1])


def check_number(
    name: str,
    what: str,
    value: "float | Tensor",
    *,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
) -> None:
    """Raise ``ValueError`` unless a plain number lies in ``[low, high]``; a tensor may hold any.

    ``above``: ``low`` itself is refused.
    """
    if isinstance(value, Tensor):
        return
    if not low <= value <= high or (above and value == low):
        first = "(" if above or low == -math.inf else "["
        last = ")" if high == math.inf else "]"
        raise ValueError(f"{name}: {what} must be in {first}{low:g}, {high:g}{last}, got {value}")


def check_per_class(name: str, what: str, tensor: Tensor, logits: Tensor) -> None:
    """Raise unless ``tensor`` is floating point and has one entry a class of ``logits``."""
    check_floating(name, what, tensor)
    check_shape(name, what, tensor, tuple(logits.shape[-1:]), f"logits {tuple(logits.shape)}")


def check_signs(name: str, signs: Tensor) -> None:
    """Raise ``TypeError`` unless ``signs`` is floating point or holds integers."""
    if signs.is_complex() or signs.dtype == torch.bool:
        raise TypeError(f"{name}: signs must hold -1 and +1, got {signs.dtype}")


def check_broadcasts(
    name: str, what: str, tensor: Tensor, shape: tuple[int, ...], match: str
) -> None:
    """Raise ``ValueError`` unless ``tensor`` broadcasts against the last axes of ``shape``."""
    got = tuple(tensor.shape)
    last = shape[max(0, len(shape) - len(got)) :]
    if len(got) != len(last) or any(
        size not in (1, axis) for size, axis in zip(got, last, strict=True)
    ):
        raise ValueError(f"{name}: {what} must broadcast to {match} {shape}, got {got}")
