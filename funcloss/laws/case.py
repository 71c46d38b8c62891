"""A case of the laws: a loss, and the data that it is fed."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from funcloss.typing import LossFn

CLASSES = 5  # of the data, where nothing else is said
Batch = tuple[Tensor, ...]  # data of a loss, examples along the first axis


class Broken(Exception):  # noqa: N818 - a finding, not an error
    """A law does not hold: what came, what should have come, for which data, and what to write."""

    def __init__(self, detail: str, cure: str = "") -> None:
        """Give the detail, and a cure that is better than the law's own advice."""
        super().__init__(detail)
        self.cure = cure


class NotApplicable(Exception):  # noqa: N818 - a finding, not an error
    """A law does not apply, and why."""


def shown(batch: Batch) -> str:
    """Return data as a line: numbers where they are few, else shapes."""
    return ", ".join(
        str([round(v, 4) for v in x.flatten().tolist()] if x.dim() < 2 else _rows(x))
        if x.numel() <= 20
        else f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
        for x in (x.detach() for x in batch)
    )


def _rows(x: Tensor) -> list:
    return [[round(v, 4) for v in row.flatten().tolist()] for row in x]


@dataclass(frozen=True, eq=False)
class LossCase:
    """A loss, the data that it is fed, and the laws that cannot hold for it."""

    loss: LossFn  # loss(*data, where=..., **options)
    data: Callable[[int, Generator], Batch]  # n examples; floats are float64
    options: Mapping[str, Any] = field(default_factory=dict)  # given to every call
    predictions: int = 1  # how many of the data come first and are differentiated
    costs: tuple[str, ...] = ()  # options of which more must never make a mistake cheaper
    reference: Callable[..., Tensor] | None = None  # (*data, **options) -> values, another way
    extremes: tuple[float, ...] = (1e4, -1e4)  # predictions at which it must stay finite
    minus_inf: bool = False  # whether the logit of a class that is not the label may be -inf
    shift: bool | None = None  # whether a constant added to all logits must change nothing
    limits: Mapping[str, str] = field(default_factory=dict)  # law -> why it does not apply
    classes: int = CLASSES
    reduction: str = "none"  # what the loss does with its values: none, mean, sum or other
    takes_where: bool = True
    unbatched: bool = True  # whether it takes one example without a batch axis
    stated: Mapping[int, float] = field(default_factory=dict)  # what a class is said to weigh
    batch_size: int = 32  # of the random batches across which a class's weight is measured
    names: tuple[str, ...] = ()  # of the data, as logits and labels; by default, those of a feed

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the data, from which the laws know what is a right answer."""
        return self.names or getattr(self.data, "names", ())

    @property
    def weightless(self) -> frozenset[int]:
        """The classes that are said to weigh nothing."""
        given = [self.options[name] for name in self.costs if self.options[name].dim() == 1]
        zeros = {k for option in given for k in (option == 0).nonzero().flatten().tolist()}
        return frozenset(zeros | {k for k, weight in self.stated.items() if weight == 0})

    def __call__(self, *data: Tensor, **options: Any) -> Tensor:
        """Return the loss under its options, or under those given here."""
        return self.loss(*data, **{**self.options, **options})

    def fresh(self) -> "LossCase":
        """Return it with an object of its own, so that what a trial does to it stays there."""
        try:
            return replace(self, loss=copy.deepcopy(self.loss))
        except Exception:  # what cannot be copied is tried as it is
            return self

    def in_dtype(self, dtype: torch.dtype) -> "LossCase":
        """Return it with its floating options in another dtype."""
        return replace(self, options={name: _cast(o, dtype) for name, o in self.options.items()})

    def of_one(self, *example: Tensor) -> Tensor:
        """Return the loss of one example without a batch axis, a scalar."""
        if self.unbatched and self.reduction == "none":
            return self(*example)
        return self(*(x.unsqueeze(0) for x in example)).sum()


def in_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return data with floats in another dtype."""
    return tuple(_cast(x, dtype) for x in batch)


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
