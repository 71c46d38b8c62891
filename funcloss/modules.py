"""Between losses and the criteria of other libraries, which are modules that reduce."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from funcloss._checks import check_where
from funcloss.combinators import (
    Combined,
    correction_of,
    couples_examples,
    name_of,
    probabilities_of,
)
from funcloss.losses._shared import masked
from funcloss.reduction import mean
from funcloss.typing import Correction, LossFn, Probabilities

REDUCTIONS = ("none", "mean", "sum")


class LossModule(nn.Module):
    """A loss as a criterion; tensors among its options are buffers, and move and save with it."""

    def __init__(self, loss: LossFn, reduction: str, options: dict[str, Any]) -> None:
        """Keep the loss, how to reduce it and its options."""
        super().__init__()
        self.loss = loss
        self.reduction = reduction
        self.options = {}
        for name, value in options.items():
            if isinstance(value, nn.Parameter):
                self.register_parameter(name, value)
            elif isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                self.options[name] = value

    def forward(self, *data: Tensor, where: Tensor | None = None, **options: Any) -> Tensor:
        """Return the reduced loss; what is given here goes before what was given first."""
        options = {**self._held(), **options}
        if where is not None:
            options["where"] = where
        where = options.get("where")
        values = self.loss(*data, **options)
        if self.reduction == "mean":
            return mean(values, where=where)
        return values.sum() if self.reduction == "sum" else values

    @property
    def couples_examples(self) -> bool:
        """Whether the value of one example depends on the others of its batch."""
        return couples_examples(self.loss)

    @property
    def probabilities(self) -> Probabilities | None:
        """How the scores become probabilities, under the options that the module holds."""
        stated = probabilities_of(self.loss)
        return self.correction if callable(stated) else stated

    def correction(self, **options: Any) -> Correction:
        """Return the correction that the scores need; what is given here goes first."""
        return correction_of(self.loss, {**self._held(), **options})

    def _held(self) -> dict[str, Any]:
        tensors = [*self.named_buffers(recurse=False), *self.named_parameters(recurse=False)]
        return {**self.options, **dict(tensors)}

    def extra_repr(self) -> str:
        """Return what the module prints of itself."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{name_of(self.loss)}, reduction={self.reduction!r}{options}"


def as_module(loss: LossFn, *, reduction: str = "mean", **options: Any) -> LossModule:
    """Return a loss as an ``nn.Module`` criterion, for loops, Lightning and trainers that have one.

    Args:
        loss: A loss.
        reduction: ``mean`` (divides by the examples that count, whatever their weights), ``sum``
            or ``none``.
        **options: Options of the loss. Tensors become buffers, parameters stay parameters: they
            follow ``.to(device)`` and are in ``state_dict``.

    Returns:
        A module of the loss's data; ``where`` and other options may be given with each call.

    Raises:
        ValueError: there is no such reduction.

    Example:
        >>> from funcloss import class_weighted, losses
        >>> criterion = as_module(
        ...     class_weighted(losses.cross_entropy), class_weights=torch.tensor([1.0, 3.0])
        ... )
        >>> criterion(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor(1.3863)
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"as_module: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    return LossModule(loss, reduction, options)


def from_module(module: nn.Module, *, example_axes: int = 0) -> LossFn:
    """Return a criterion as a loss: one value an example, each evaluated as a batch of one.

    What a criterion divides by is thereby 1, so its class weights act where a mean would cancel
    them: a ``reduction`` of ``mean`` is replaced by ``sum``.

    Args:
        module: A criterion of predictions and targets. It is copied, so its buffers stay as they
            are now.
        example_axes: How many axes one example has in the last tensor: 0 for labels and values, 1
            for vectors and distributions, 2 for an image of labels. The axes before them are the
            batch, in every tensor.

    Returns:
        A loss of the same data, with ``where``.

    Raises:
        ValueError: the module has parameters to train; or, on a call, the tensors have other
            batch axes.

    Example:
        >>> criterion = torch.nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))
        >>> from_module(criterion)(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor([0.6931, 2.0794])
    """
    if any(p.requires_grad for p in module.parameters()):
        raise ValueError(
            f"from_module: {type(module).__name__} has parameters to train, which would be copied "
            "and lost; write it as a function with them as options"
        )
    module = copy.deepcopy(module)
    for part in module.modules():
        if isinstance(getattr(part, "reduction", None), str):
            part.reduction = "sum"  # pyright: ignore[reportArgumentType]
    return FromModule((module,), example_axes)


@dataclass(frozen=True, eq=False, repr=False)
class FromModule(Combined):
    """What :func:`from_module` returns."""

    example_axes: int
    keeps = ("where",)

    def __repr__(self) -> str:
        """Return the name of the module's class."""
        return f"{type(self.losses[0]).__name__}()"

    def of_one(self, *example: Tensor) -> Tensor:
        """Return the value of one example."""
        (module,) = self.losses
        return module(*(x.unsqueeze(0) for x in example)).sum()

    def __call__(self, *data: Tensor, where: Tensor | None = None) -> Tensor:
        """Return one value per example."""
        axes = data[-1].dim() - self.example_axes
        batch = tuple(data[-1].shape[:axes])
        for x in data:
            if tuple(x.shape[:axes]) != batch:
                raise ValueError(
                    f"from_module: every tensor must begin with the batch axes of the last, "
                    f"{batch}, got {tuple(x.shape)}; example_axes says how many are an example's"
                )
        check_where("from_module", where, batch)
        data = tuple(masked(x, where) for x in data)
        each = self.of_one
        for _ in range(axes):
            each = vmap(each)
        values = each(*data)
        return values if where is None else torch.where(where, values, 0.0)
