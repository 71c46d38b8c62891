"""What a step minimises: a model, a loss and a reduction, as one pure function."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from funcloss.combinators import class_weighted, masking, options_of, target_weights
from funcloss.keys import keyed_randomness
from funcloss.objectives.skeleton import skeleton_of
from funcloss.reduction import fraction
from funcloss.typing import Batch, Buffers, Hyper, Inputs, LossFn, Metrics, Objective, Params

# (predictions, batch, hyper) -> scalar; an evaluation gives no inputs in its batch
Criterion = Callable[[Tensor, Batch, Hyper], Tensor]
Forward = Callable[[Params, Buffers, Inputs], tuple[Tensor, Buffers]]


@dataclass(frozen=True)
class Reduced:
    """The criterion of a loss and a reduction; it is given everything in ``hyper`` by name.

    A loss that takes ``costs`` is given those of the batch, where it has some. Of
    ``weighted_mean`` the loss is an unweighted one, and ``hyper`` holds ``class_weights``.
    """

    loss: LossFn
    reduction: str = "mean"
    takes_costs: bool = field(init=False)  # found here: a compiled step cannot read a signature

    def __post_init__(self) -> None:
        """Read from the loss whether it takes the costs of each example."""
        object.__setattr__(self, "takes_costs", "costs" in options_of(self.loss))

    def __call__(self, predictions: Tensor, batch: Batch, hyper: Hyper) -> Tensor:
        """Return the scalar to minimise."""
        loss, weights = self.loss, None
        options = {name: value for name, value in hyper.items() if name != "learning_rate"}
        if self.takes_costs and batch.costs is not None:
            options["costs"] = batch.costs
        if self.reduction == "weighted_mean":
            loss = class_weighted(self.loss)
            weights = target_weights(
                self.loss, options["class_weights"], batch.targets, batch.where
            )
        values = loss(predictions, batch.targets, **masking(batch.where), **options)
        numerator, denominator = fraction(
            self.reduction, values, weights=weights, where=batch.where
        )
        return (numerator / denominator).to(values.dtype)


def mean_of(loss: LossFn) -> Reduced:
    """Return the mean over the examples that count, ``sum(loss) / sum(where)``.

    Args:
        loss: A loss; it is given everything in ``hyper`` but the learning rate, by name.

    Returns:
        A criterion ``(predictions, batch, hyper) -> scalar``.
    """
    return Reduced(loss, "mean")


def sum_of(loss: LossFn) -> Reduced:
    """Return the sum over the examples that count, ``sum(loss)``; as :func:`mean_of` otherwise."""
    return Reduced(loss, "sum")


def weighted_mean_of(loss: LossFn) -> Reduced:
    """Return torch's mean over class weights, ``sum(w[label] * loss) / sum(w[label])``.

    Args:
        loss: An unweighted loss of labels; ``hyper["class_weights"]`` weighs it.

    Returns:
        A criterion ``(predictions, batch, hyper) -> scalar``.
    """
    return Reduced(loss, "weighted_mean")


def make_forward(model: nn.Module) -> Forward:
    """Return ``model`` as a pure function of its tensors, in the mode it is in now.

    Args:
        model: Any module. It is copied without its tensors and never touched again.

    Returns:
        ``(params, buffers, inputs) -> (predictions, buffers)``. Inputs in a tuple are the model's
        positional arguments, in a dict its keywords. The buffers that come back are new: what a
        module writes to its own, in place or by assignment, is in them.

    Raises:
        ConfigError: an attribute of the model cannot be copied; which one.
    """
    skeleton = skeleton_of(model)
    return _ForwardOf(skeleton, aliases_of(model), {name for name, _ in model.named_buffers()})


@dataclass(frozen=True, eq=False)
class _ForwardOf:
    """What :func:`make_forward` returns."""

    skeleton: nn.Module
    aliases: dict[str, str]
    written: set[str]  # names of the tensors that the module may write to

    def __call__(self, params: Params, buffers: Buffers, inputs: Inputs) -> tuple[Tensor, Buffers]:
        """Return ``(predictions, buffers)``."""
        # What the module may write to is cloned; frozen parameters are not.
        fresh = {name: b.clone() if name in self.written else b for name, b in buffers.items()}
        tensors = {**params, **fresh}
        for alias, name in self.aliases.items():
            tensors[alias] = tensors[name]
        # tie_weights=False: the aliases are above, and torch would write to a copy of the dict.
        named = inputs if isinstance(inputs, dict) else {}
        listed = inputs if isinstance(inputs, tuple) else () if named else (inputs,)
        predictions = functional_call(self.skeleton, tensors, listed, named, tie_weights=False)
        return predictions, {name: tensors[name] for name in buffers}


def supervised(model: nn.Module, criterion: Criterion, *, bfloat16: bool = False) -> Objective:
    """Return the objective of predicting a batch's targets from its inputs.

    Args:
        model: Any module, in the mode to train it in.
        criterion: From predictions, batch and hyper to the scalar to minimise.
        bfloat16: Run the model, not the loss, in bfloat16 where that is safe (autocast).

    Returns:
        ``(params, buffers, batch, keys, hyper) -> (loss, (buffers, metrics))``, pure; dropout draws
        from ``keys``.

    Example:
        >>> from funcloss import losses
        >>> from funcloss.models import linear
        >>> objective = supervised(linear((1, 2, 2), 3), mean_of(losses.cross_entropy))
        >>> params = {"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}
        >>> batch = Batch(torch.ones(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1]))
        >>> loss, _ = objective(params, {}, batch, torch.arange(5), {})
        >>> loss
        tensor(1.0986)
    """
    return _Supervised(make_forward(model), criterion, bfloat16)


@dataclass(frozen=True, eq=False)
class _Supervised:
    """What :func:`supervised` returns."""

    forward: Forward
    criterion: Criterion
    bfloat16: bool

    def __call__(
        self, params: Params, buffers: Buffers, batch: Batch, keys: Tensor, hyper: Hyper
    ) -> tuple[Tensor, tuple[Buffers, Metrics]]:
        """Return ``(loss, (buffers, metrics))``."""
        with keyed_randomness(keys):
            if self.bfloat16:
                with torch.autocast(batch.inputs.device.type, torch.bfloat16):
                    predictions, buffers = self.forward(params, buffers, batch.inputs)
                predictions = predictions.float()
            else:
                predictions, buffers = self.forward(params, buffers, batch.inputs)
        return self.criterion(predictions, batch, hyper), (buffers, {})


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Return the further names of tied tensors, each with the name that the state has."""
    first: dict[Tensor, str] = {}
    aliases = {}
    for named in (model.named_parameters, model.named_buffers):
        for name, tensor in named(remove_duplicate=False):
            if first.setdefault(tensor, name) != name:
                aliases[name] = first[tensor]
    return aliases


def split_tensors(model: nn.Module) -> tuple[Params, Buffers]:
    """Return the tensors of a model by name: those that are trained, and all others.

    Every buffer is among them, persistent or not, and every parameter that is not trained; of tied
    tensors the first name.
    """
    named = dict(model.named_parameters())
    params: Params = {name: p for name, p in named.items() if p.requires_grad}
    fixed: Buffers = {name: p for name, p in named.items() if not p.requires_grad}
    return params, fixed | dict(model.named_buffers())
