"""What a name on the command line stands for."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import cast, get_args

from torch import Tensor

from funcloss import losses
from funcloss.app.addresses import imported
from funcloss.combinators import (
    Combined,
    class_weighted,
    factor_names,
    from_logits,
    one_hot_targets,
    summed,
)
from funcloss.errors import ConfigError
from funcloss.objectives import mean_of, weighted_mean_of
from funcloss.objectives.supervised import Criterion
from funcloss.typing import LossFn

LOSSES: dict[str, LossFn] = {  # of logits and labels
    "cross_entropy": losses.cross_entropy,
    "nll": from_logits(losses.nll),
    "squared_error": one_hot_targets(losses.squared_error),
    "softmax_focal": losses.softmax_focal,
    "poly1": losses.poly1,
    "asymmetric_single_label": losses.asymmetric_single_label,
    "multiclass_hinge": losses.multiclass_hinge,
    "multi_margin": losses.multi_margin,
    "generalized_cross_entropy": losses.generalized_cross_entropy,
    "symmetric_cross_entropy": losses.symmetric_cross_entropy,
    "normalized_cross_entropy": losses.normalized_cross_entropy,
    "mean_absolute_error": losses.mean_absolute_error,
    "bi_tempered": losses.bi_tempered,
    "earth_mover": losses.earth_mover,
    "sord": losses.sord,
    "class_balanced": losses.class_balanced,
    "balanced_softmax": losses.balanced_softmax,
    "logit_adjusted": losses.logit_adjusted,
    "ldam": losses.ldam,
    "vector_scaling": losses.vector_scaling,
    "equalization": losses.equalization,
    "expected_cost": losses.expected_cost,
    "log_bilinear": losses.log_bilinear,
    "softmax_margin": losses.softmax_margin,
    "cost_hinge": losses.cost_hinge,
    "cross_entropy_with_cost": summed(
        {"fit": (1.0, losses.cross_entropy), "cost": ("price", losses.expected_cost)}
    ),
}


def loss_named(name: str, *, refused: Mapping[str, str]) -> LossFn:
    """Return a loss of labels by its name in ``LOSSES``, or somebody's own by ``module:function``.

    Args:
        name: What a configuration's ``loss`` may be.
        refused: Its ``refused_code``.

    Returns:
        The loss, one value an example.

    Raises:
        ConfigError: it is refused, or cannot be imported or called.

    Example:
        >>> loss_named("cross_entropy", refused={}) is losses.cross_entropy
        True
    """
    if name in LOSSES:
        return LOSSES[name]
    found = imported(name, what="loss", refused=refused)
    if isinstance(found, type) or not callable(found):
        kind = "a class" if isinstance(found, type) else f"a {type(found).__name__}"
        raise ConfigError(
            f"loss {name} must be a function of logits and labels that gives one value an example; "
            f"got {kind}"
        )
    return cast(LossFn, found)


def number_options(loss: Callable[..., Tensor]) -> dict[str, bool]:
    """Return the options of a loss that are numbers, by name whether they must be given.

    Class weights, counts, cost matrices and masks are none, nor is what shapes the computation,
    such as a number of iterations.

    Example:
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


def make_criterion(
    loss: str,
    reduction: str = "mean",
    *,
    weighted: bool = False,
    refused: Mapping[str, str] = MappingProxyType({}),
) -> Criterion:
    """Return the criterion that a configuration names.

    Args:
        loss: What :func:`loss_named` takes.
        reduction: ``mean`` or ``weighted_mean``.
        weighted: Whether ``hyper`` holds ``class_weights``.
        refused: What :func:`loss_named` takes too.

    Returns:
        A criterion ``(logits, batch, hyper) -> scalar``.
    """
    chosen = loss_named(loss, refused=refused)
    if reduction == "weighted_mean":
        return weighted_mean_of(chosen)
    return mean_of(class_weighted(chosen) if weighted else chosen)
