"""Checks on shapes, dtypes and plain numbers: all that is known before any value is.

Every message says who refuses, what was expected and what came.
"""

import math

import torch
from torch import Tensor


def check_tensor(name: str, what: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        got = type(value).__name__
        raise TypeError(f"{name}: {what} must be a tensor, got {got}; torch.as_tensor makes one")


def check_floating(name: str, what: str, tensor: Tensor) -> None:
    """Raise ``TypeError`` unless ``tensor`` is a floating-point tensor."""
    check_tensor(name, what, tensor)
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
    check_tensor(name, "where", where)
    if where.dtype != torch.bool:
        raise TypeError(f"{name}: where must be boolean, got {where.dtype}")
    check_shape(name, "where", where, shape, "one entry an example")


def check_labels(name: str, what: str, labels: Tensor) -> None:
    """Raise ``TypeError`` unless ``labels`` is a tensor of integers."""
    check_tensor(name, what, labels)
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


def check_range(name: str, labels: Tensor, classes: int) -> None:
    """Raise ``IndexError`` unless labels lie in ``[0, classes)``; not for what is compiled.

    By a lookup, which refuses a label under ``vmap`` too, where no value can be asked for.
    """
    try:
        torch.empty(classes, dtype=torch.int8, device=labels.device).gather(0, labels.reshape(-1))
    except RuntimeError as error:
        raise IndexError(
            f"{name}: labels must be in [0, {classes}); {str(error).splitlines()[0]}; leave an "
            "example out by where=labels != ..."
        ) from None


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
    if not isinstance(value, (int, float)):
        got = type(value).__name__
        raise TypeError(f"{name}: {what} must be a number or a tensor, got {got}")
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


def option_of(
    name: str,
    what: str,
    value: "float | Tensor",
    examples: tuple[int, ...] | None,
    *,
    axes: int = 0,
    columns: int | None = None,
    low: float = -math.inf,
    high: float = math.inf,
    above: bool = False,
) -> "float | Tensor":
    """Return an option as it meets ``examples`` and ``axes`` more axes of an example.

    Args:
        name: Who asks.
        what: The option.
        value: A number, a scalar tensor, or a tensor with one entry per example.
        examples: Shape of the values of the loss; None: the option is one for all of them.
        axes: How many axes an example has where the option is used.
        columns: Entries of the last axis, if the option may have one for each of them.
        low: Least number allowed; ``above``: more than it.
        high: Largest number allowed.
        above: Whether ``low`` itself is refused.

    Raises:
        TypeError: it is no number and no tensor.
        ValueError: a number is out of range, or a tensor has another shape.
    """
    check_number(name, what, value, low=low, high=high, above=above)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    shape = tuple(value.shape)
    if shape == examples:
        return value.reshape(shape + (1,) * axes)
    if columns is not None and shape == (columns,):
        return value
    known = {examples: "one per example", () if columns is None else (columns,): "one per column"}
    shapes = "".join(f", or of shape {s}, {per}" for s, per in known.items() if s)
    raise ValueError(
        f"{name}: {what} must be a number or a scalar tensor{shapes}; got shape {shape}"
    )
