"""What the rows of the table are made of: data, plain values of one example, torch's losses."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcloss.laws import LossCase
from funcloss.laws.case import CLASSES
from funcloss.laws.feed import Feed, feeds_for

LABELS = Feed(("logits", "labels"), (CLASSES,))
BITS = Feed(("logits", "targets"))
MULTI_HOT = Feed(("logits", "targets"), (CLASSES,))
SIGNS = Feed(("scores", "signs"))
VALUES = Feed(("predictions", "targets"))
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.25, 5.0], dtype=torch.float64)


def number(value: float) -> Tensor:
    """Return an option that is a tensor, so that the laws differentiate in it too."""
    return torch.tensor(value, dtype=torch.float64)


def wide(*names: str) -> Feed:
    """Return data with an axis of classes or features."""
    return [feed for feed in feeds_for(names) if feed.names == names][-1]


def row(
    loss: Callable[..., Tensor],
    feed: Callable[..., Any],
    reference: Callable[..., Tensor],
    options: dict[str, Any] | None = None,
    **fields: Any,
) -> LossCase:
    """Return a case whose data say what is predicted and how far."""
    if isinstance(feed, Feed):
        fields = {"predictions": feed.predictions, "extremes": feed.extremes, **fields}
    return LossCase(loss, feed, options or {}, reference=reference, **fields)


def each(value: Callable[..., float]) -> Callable[..., Tensor]:
    """Return ``value(*row, **options)`` of one example at a time, in Python's numbers."""

    def reference(*data: Tensor, **options: Any) -> Tensor:
        plain = {n: o.tolist() if isinstance(o, Tensor) else o for n, o in options.items()}
        rows = zip(*(x.tolist() for x in data), strict=True)
        return torch.tensor([value(*row, **plain) for row in rows], dtype=torch.float64)

    return reference


@dataclass(frozen=True)
class OfTorch:
    """A loss of torch's, which has gradients and reductions to compare with too."""

    function: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, *data: Tensor, reduction: str = "none", **options: Any) -> Tensor:
        """Return its values, with options by our names."""
        options = {
            {"class_weights": "weight"}.get(name, name): float(o)
            if isinstance(o, Tensor) and not o.dim() and name != "pos_weight"
            else o
            for name, o in {**self.options, **options}.items()
        }
        return self.function(*data, reduction=reduction, **options)


def softmax(row: list[float], temperature: float = 1.0) -> list[float]:
    """Return probabilities."""
    powers = [math.exp((z - max(row)) / temperature) for z in row]
    return [power / math.fsum(powers) for power in powers]


def sigmoid(z: float) -> float:
    """Return a probability."""
    return 1 / (1 + math.exp(-z))
