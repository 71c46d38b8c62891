"""Between losses and the criteria of other libraries, which are modules that reduce."""

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from funcloss._checks import check_tensor, check_where
from funcloss.combinators import (
    Combined,
    correction_of,
    couples_examples,
    name_of,
    options_of,
    probabilities_of,
    target_weights,
)
from funcloss.losses._shared import masked
from funcloss.reduction import REDUCTIONS as _DIVIDED
from funcloss.reduction import fraction
from funcloss.typing import Correction, LossFn, Probabilities

REDUCTIONS = ("none", *_DIVIDED)
_WEIGHTS = ("class_weights", "sample_weights")


class LossModule(nn.Module):
    """A loss as a criterion; tensors among its options are buffers, and move and save with it."""

    def __init__(self, loss: LossFn, reduction: str, options: Mapping[str, Any]) -> None:
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
        if self.reduction == "none":
            return values
        weights = self._weights(data, options) if self.reduction == "weighted_mean" else None
        found = fraction(self.reduction, values, weights=weights, where=where)
        return found.quotient().to(values.dtype)

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

    def _weights(self, data: tuple[Tensor, ...], options: Mapping[str, Any]) -> Tensor | None:
        """Return the weight of each value, from those of its class and its own; None: 1 each."""
        bound = self.loss.keywords if isinstance(self.loss, functools.partial) else {}
        of_class, own, where = ({**bound, **options}.get(name) for name in (*_WEIGHTS, "where"))
        if of_class is None:
            return own
        if sum(not x.is_floating_point() for x in data) > 1:
            raise ValueError(
                f"as_module: weighted_mean needs the one label of each example, and "
                f"{name_of(self.loss)} takes several; take none, mean or sum"
            )
        weights = target_weights(self.loss, of_class, data[-1], where)
        return weights if own is None else weights * own

    def _held(self) -> dict[str, Any]:
        tensors = [*self.named_buffers(recurse=False), *self.named_parameters(recurse=False)]
        return {**self.options, **dict(tensors)}

    def extra_repr(self) -> str:
        """Return what the module prints of itself."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{name_of(self.loss)}, reduction={self.reduction!r}{options}"


def as_module(loss: LossFn, *, reduction: str = "mean", **options: Any) -> LossModule:
    """Return a loss as an ``nn.Module`` criterion, for loops, Lightning and trainers that have one.

    Its data have the layout of the loss: classes last, or torch's ``(N, C, H, W)`` of
    ``channels_first(loss)``.

    Args:
        loss: A loss.
        reduction: ``mean`` (divides by the examples that count, whatever their weights),
            ``weighted_mean`` (divides by the sum of the ``class_weights`` of the labels, or of the
            ``sample_weights``, that count, as torch's classes do), ``sum`` or ``none``.
        **options: Options of the loss. Tensors become buffers, parameters stay parameters: they
            follow ``.to(device)`` and are in ``state_dict``.

    Returns:
        A module of the loss's data; ``where`` and other options may be given with each call. It
        can be pickled and copied as far as the loss can.

    Raises:
        TypeError: the loss does not take one of the options, or one is a list or an array.
        ValueError: there is no such reduction, or the loss has no weights to divide by.

    Example:
        >>> from funcloss import class_weighted, losses
        >>> weights = torch.tensor([1.0, 3.0])
        >>> criterion = as_module(class_weighted(losses.cross_entropy), class_weights=weights)
        >>> criterion(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor(1.3863)
        >>> as_module(
        ...     class_weighted(losses.cross_entropy),
        ...     reduction="weighted_mean",
        ...     class_weights=weights,
        ... )(torch.zeros(2, 2), torch.tensor([0, 1]))
        tensor(0.6931)
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"as_module: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    known, any_more = options_of(loss), _takes_any(loss)
    for name, value in options.items():
        if name not in known and not any_more:
            raise TypeError(
                f"as_module: {name_of(loss)} has no option {name!r}; it has "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        if isinstance(value, list) or (hasattr(value, "__array__") and not _plain(value)):
            check_tensor("as_module", name, value)
    if reduction == "weighted_mean" and not any_more and not known.intersection(_WEIGHTS):
        raise ValueError(
            f"as_module: weighted_mean divides by weights, and {name_of(loss)} has no option "
            f"{' or '.join(_WEIGHTS)}: give class_weighted(loss) or sample_weighted(loss)"
        )
    return LossModule(loss, reduction, options)


def _plain(value: Any) -> bool:
    """Return whether a value is a tensor or a number, of NumPy too."""
    return isinstance(value, Tensor) or getattr(value, "shape", None) == ()


def _takes_any(loss: Callable[..., Any]) -> bool:
    """Return whether a loss takes options that it does not name."""
    if isinstance(loss, Combined):
        return any(map(_takes_any, loss.losses))
    if isinstance(loss, functools.partial):
        return _takes_any(loss.func)
    if isinstance(loss, nn.Module):
        loss = loss.forward
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):  # built in
        return True
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def from_module(module: nn.Module, *, example_axes: int = 0) -> LossFn:
    """Return a criterion as a loss: one value per example, each evaluated as a batch of one.

    What a criterion divides by is thereby 1, so its class weights act where a mean would cancel
    them: a ``reduction`` of ``mean`` is replaced by ``sum``.

    ``nn.CrossEntropyLoss`` and ``nn.NLLLoss`` take images in torch's layout, ``(N, C, H, W)`` and
    labels ``(N, H, W)``, and give one value per pixel, as torch does with ``reduction="none"``; for
    one value per image, its sum, give ``example_axes=2``. Where the data have not that layout, the
    classes are the last axis.

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

    def _classes_last(self, data: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return data with the classes last, of ``(N, C, ...)`` and ``(N, ...)`` too."""
        of_classes = isinstance(self.losses[0], (nn.CrossEntropyLoss, nn.NLLLoss))
        if len(data) != 2 or not of_classes or self.example_axes:
            return data
        scores, labels = data
        if labels.dim() < 2 or labels.is_floating_point() or scores.dim() != labels.dim() + 1:
            return data
        in_torchs = (scores.shape[0], *scores.shape[2:]) == tuple(labels.shape)
        return (scores.movedim(1, -1), labels) if in_torchs else data

    def __call__(self, *data: Tensor, where: Tensor | None = None) -> Tensor:
        """Return one value per example."""
        for i, x in enumerate(data):
            check_tensor("from_module", f"argument {i}", x)
        data = self._classes_last(data)
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
