"""What the options of a training mean for its classes and its loss."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import get_args

import torch
from torch import Tensor

from funcloss._files import usable_memory
from funcloss.app.config import TrainConfig, did_you_mean
from funcloss.app.data import Examples
from funcloss.app.registry import REDUCTIONS, loss_named
from funcloss.combinators import (
    Combined,
    class_weighted,
    correction_of,
    factor_names,
    options_of,
)
from funcloss.decisions import Costs, class_index, make_costs
from funcloss.errors import ConfigError
from funcloss.objectives.supervised import Reduced
from funcloss.typing import Hyper, LossFn

_MATRICES = 32  # of classes by classes, float64, that an evaluation holds at its peak
_ROUNDING = 1e-6  # of fractions that add up to 1


def make_criterion(
    loss: str,
    reduction: str = "mean",
    *,
    weighted: bool = False,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> Reduced:
    """Return the criterion that a configuration names.

    Args:
        loss: What :func:`funcloss.app.registry.loss_named` takes.
        reduction: ``mean`` or ``weighted_mean``.
        weighted: Whether ``hyper`` holds ``class_weights``.
        refused: The ``refused_code`` of the configuration.

    Returns:
        A criterion ``(logits, batch, hyper) -> scalar``.
    """
    chosen = loss_named(loss, refused=refused)
    if weighted and reduction != "weighted_mean":
        chosen = class_weighted(chosen)
    return REDUCTIONS[reduction].load()(chosen)


def chosen_loss(config: TrainConfig) -> LossFn:
    """Return the loss that a configuration names, without class weights."""
    return loss_named(config.loss, refused=config.refused_code)


def make_hyper(
    config: TrainConfig, costs: Costs, counts: Tensor, device: str | torch.device
) -> Hyper:
    """Return what may be swept: learning rate, class weights if any, and what the loss takes.

    Args:
        config: Its ``class_weight`` by name of the class.
        costs: What decisions cost, for the losses that look at it.
        counts: Training examples of each class, ``(classes,)``, for the losses of counts or priors.
        device: Where the tensors go.

    Returns:
        float32 tensors by name.

    Raises:
        ConfigError: the loss has no use for these costs or counts, or a number is too large.
    """
    data = data_options(config, costs, counts)
    numbers: dict = {"learning_rate": config.learning_rate, **config.loss_option}
    if config.class_weight or config.floor or config.ceiling:  # constraints act on the weights
        numbers["class_weights"] = [config.class_weight.get(name, 1.0) for name in costs.classes]
    hyper = {name: torch.tensor(n, dtype=torch.float32) for name, n in numbers.items()} | data
    if large := [name for name, value in hyper.items() if not value.isfinite().all()]:
        raise ConfigError(f"{', '.join(large)} must fit float32, so be below 3.4e38")
    return {name: value.to(device) for name, value in hyper.items()}


def data_options(config: TrainConfig, costs: Costs, counts: Tensor) -> Hyper:
    """Return those options of a loss that the data and the costs decide."""
    loss = config.loss
    takes = options_of(chosen_loss(config))
    if takes & {"class_counts", "class_prior"} and not counts.all():
        missing = [name for name, n in zip(costs.classes, counts.tolist(), strict=True) if not n]
        raise ConfigError(
            f"loss {loss} needs training examples of every class; of {', '.join(missing[:5])} "
            "there are none"
        )
    if costs.amounts and "cost_matrix" in takes and "costs" not in takes:
        raise ConfigError(
            f"loss {loss} reads one cost_matrix for all examples, and cost names "
            f"{costs.amounts[0][2]!r}, of which each example has its own: use a loss that takes "
            "costs, such as expected_cost, or give a number"
        )
    if "cost_matrix" in takes and costs.extra:
        raise ConfigError(
            f"loss {loss} needs a square cost_matrix: the model has a logit a class, and none for "
            f"{', '.join(costs.extra[:5])}; train with another loss, or without that column"
        )
    known = {
        "class_counts": counts,
        "class_prior": counts.double() / counts.sum(),
        "cost_matrix": costs.matrix,
    }
    if costs.amounts:  # the batches bring them
        del known["cost_matrix"]
    return {name: value.float() for name, value in known.items() if name in takes}


def with_costs(config: TrainConfig, costs: Costs, examples: Examples) -> Examples:
    """Return examples with what each decision costs on them, if the loss is to be given that.

    Args:
        config: The training, for its loss.
        costs: What decisions cost.
        examples: Examples with the amounts that the costs name.

    Returns:
        The same examples; their ``costs`` are float32, on the device of the labels, or None.
    """
    rows = None
    if costs.amounts and "costs" in options_of(chosen_loss(config)):
        labels = examples.labels
        rows = costs.of_labels(labels.cpu(), examples.amounts).float().to(labels.device)
    return replace(examples, costs=rows)


def amounts_of(config: TrainConfig) -> tuple[str, ...]:
    """Return the names of the costs of each example that a configuration asks for."""
    return tuple(dict.fromkeys(v for v in config.cost.values() if isinstance(v, str)))


def number_options(loss: Callable[..., Tensor]) -> dict[str, bool]:
    """Return the options of a loss that are numbers, by name whether they must be given.

    Class weights, counts, cost matrices and masks are none, nor is what shapes the computation,
    such as a number of iterations.

    Example:
        >>> from funcloss import losses
        >>> number_options(losses.equalization), number_options(losses.bi_tempered)
        ({'threshold': True}, {'t1': False, 't2': False, 'label_smoothing': False})
    """
    if isinstance(loss, Combined):
        numbers = {name: n for part in loss.losses for name, n in number_options(part).items()}
        return numbers | dict.fromkeys(factor_names(*loss.factors), True)
    if isinstance(loss, functools.partial):
        numbers = number_options(loss.func)
        bound = [k for k, v in loss.keywords.items() if k in numbers or isinstance(v, float)]
        return numbers | dict.fromkeys(bound, False)
    parameters = inspect.signature(loss).parameters.values()
    return {
        p.name: p.default is p.empty
        for p in parameters
        if p.kind is not p.POSITIONAL_ONLY and _is_number(p)
    }


def _is_number(parameter: inspect.Parameter) -> bool:
    annotation = parameter.annotation
    if annotation is parameter.empty:
        return isinstance(parameter.default, float)
    if isinstance(annotation, str):  # of a module with postponed annotations
        return "float" in re.findall(r"\w+", annotation)
    return annotation is float or float in get_args(annotation)


def check_loss_options(config: TrainConfig, costs: Costs, counts: Tensor) -> None:
    """Raise ``ConfigError`` unless the loss takes its options, and they are all that it needs.

    Args:
        config: Its ``loss`` and ``loss_option``.
        costs: What decisions cost.
        counts: Training examples of each class, ``(classes,)``.
    """
    loss, given, classes = config.loss, config.loss_option, len(costs.classes)
    data = data_options(config, costs, counts)
    function = chosen_loss(config)
    known = number_options(function)
    for name in given:
        if name not in known:
            there = f"it has {', '.join(known)}" if known else "it has none that is a number"
            guess = did_you_mean(name, known)
            raise ConfigError(f"loss_option: {loss} has no option {name!r}{guess}; {there}")
    if missing := [name for name, needed in known.items() if needed and name not in given]:
        raise ConfigError(f"loss {loss} needs the loss_option {missing[0]}=NUMBER")
    own = {}
    if costs.amounts and "costs" in options_of(function):
        own["costs"] = costs.matrix.nan_to_num(1.0).float()
    try:  # a loss checks the range of plain numbers only: in training they are tensors
        values = function(torch.eye(classes), torch.arange(classes), **data, **given, **own)
    except ValueError as error:
        raise ConfigError(f"loss_option: {error}") from None
    except Exception as error:  # somebody's own
        raise ConfigError(
            f"loss {loss} fails on logits {(classes, classes)} and labels {(classes,)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(values, Tensor) or values.shape != (classes,):
        got = tuple(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
        raise ConfigError(
            f"loss {loss} must give one value an example, {(classes,)} for {classes} of them; got "
            f"{got}: leave out the mean or sum in it"
        )
    _check_probabilities(config, {**data, **given}, classes)


def _check_probabilities(config: TrainConfig, options: dict, classes: int) -> None:
    """Raise ``ConfigError`` unless what a loss states of its scores can be used after training."""
    loss = config.loss
    try:
        function = chosen_loss(config)
        scale, offset = correction_of(function, options)
        shape = tuple((scale * torch.zeros(classes) + offset).shape)
    except Exception as error:  # somebody's own
        raise ConfigError(
            f"loss {loss}: its probabilities cannot be used: {type(error).__name__}: {error}"
        ) from error
    if shape != (classes,):
        raise ConfigError(
            f"loss {loss}: its probabilities must give a Correction of numbers or tensors of shape "
            f"{(classes,)}; got shape {shape}"
        )


def balanced_weights(
    config: TrainConfig, classes: tuple[str, ...], counts: Tensor
) -> dict[str, float]:
    """Return the class weights of ``class_weight balanced``, ``(n / (C * n_c)) ** power``.

    Args:
        config: Its ``balance`` is the power. A class that its ``class_weight`` names has none here.
        classes: Names of the ``C`` classes, in the order of the labels.
        counts: Training examples of each class, ``(C,)``, ``n`` in all.

    Returns:
        Weights by name of the class; empty unless the configuration asks for them.

    Raises:
        ConfigError: there is no training example of a class.
    """
    if not config.balance:
        return {}
    numbers = counts.tolist()
    named = by_name("class_weight", config.class_weight, classes)
    sizes = {c: n for c, n in zip(classes, numbers, strict=True) if c not in named}
    if missing := [name for name, n in sizes.items() if not n]:
        raise ConfigError(
            "class_weight balanced needs training examples of every class; of "
            f"{', '.join(missing[:5])} there are none"
        )
    mean = sum(numbers) / len(classes)
    return {name: (mean / n) ** config.balance for name, n in sizes.items()}


def costs_of(config: TrainConfig, classes: tuple[str, ...]) -> Costs:
    """Return what decisions cost, as a configuration has it.

    Raises:
        ConfigError: the costs do not fit the classes, or the classes are too many for matrices of
            them.
    """
    needed = _MATRICES * 8 * len(classes) ** 2
    if needed > usable_memory():
        raise ConfigError(
            f"{len(classes):,} classes need about {needed / 2**30:.0f} GiB for what is counted per "
            f"pair of classes, and there are {usable_memory() / 2**30:.0f}: train on fewer classes"
        )
    return make_costs(classes, config.cost_matrix, config.class_cost, config.cost)


def resolved_costs(config: TrainConfig, classes: tuple[str, ...]) -> TrainConfig:
    """Return a configuration with its costs and priors by name of the class.

    Args:
        config: A configuration.
        classes: Names of the classes, in the order of the labels.

    Returns:
        The same, each class named once.

    Raises:
        ConfigError: there is no such class, or the priors do not add up.
    """
    prior = by_name("prior", config.prior, classes)
    _check_prior(prior, len(classes))
    costs = by_name("class_cost", config.class_cost, classes)
    return replace(config, class_cost=costs, prior=prior)


def _check_prior(prior: dict[str, float], classes: int) -> None:
    total = sum(prior.values())
    if total > 1.0 + _ROUNDING:
        raise ConfigError(f"prior: the parts must not add up to more than 1, got {total:g}")
    if len(prior) == classes and total < 1.0 - _ROUNDING:
        raise ConfigError(f"prior: the parts of all classes must add up to 1, got {total:g}")


def by_name(what: str, values: dict[str, float], classes: tuple[str, ...]) -> dict[str, float]:
    """Return the values by name of the class; a key that is no name may be an index."""
    named = {}
    for key, value in values.items():
        name = classes[class_index(what, key, classes)]
        if name in named:
            raise ConfigError(f"{what}: class {name!r} is given twice")
        named[name] = value
    return named
