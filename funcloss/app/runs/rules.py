"""Which rule a run decides by, and what is to be doubted about its probabilities."""

from collections.abc import Callable
from functools import partial
from typing import Any

from funcloss.app.config import TrainConfig
from funcloss.app.runs.options import chosen_loss
from funcloss.combinators import Combined, name_of, options_of, probabilities_of
from funcloss.decisions import RULES
from funcloss.errors import ConfigError
from funcloss.typing import Probabilities


def usual_rule(config: TrainConfig) -> str:
    """Return the rule that a run decides by: of least expected cost if its mistakes have costs.

    A run without costs, or whose logits are no scores of probabilities, takes the likeliest class.
    """
    has_costs = bool(config.cost_matrix or config.class_cost or config.cost)
    argmax, min_cost = RULES
    return min_cost if has_costs and rule_fits(config) else argmax


def check_rule(name: str) -> None:
    """Raise ``ConfigError`` unless there is such a rule; an empty name is the usual one's."""
    if name not in ("", *RULES):
        raise ConfigError(f"rule must be one of {', '.join(RULES)}, got {name!r}")


def rule_fits(config: TrainConfig) -> bool:
    """Return whether decisions of minimum expected cost fit what a loss makes of logits.

    A loss that does not state how its scores become probabilities is taken like the cross-entropy,
    unless it takes the costs.
    """
    return _statement(config) not in ("none", "costs")


def rule_caveat(config: TrainConfig) -> str:
    """Return what to doubt about decisions of minimum expected cost after a training.

    Args:
        config: The training.

    Returns:
        A sentence; empty where the loss states how its scores become probabilities, and they do.
    """
    stated, loss = _statement(config), config.loss
    if stated == "costs":
        return (
            f"the logits of {loss} have the costs in them already: decisions of minimum "
            "expected cost count them twice, go by argmax"
        )
    if stated == "none":
        return (
            f"the softmax of the logits of {loss} estimates no probabilities: decisions of "
            "minimum expected cost rest on a temperature alone"
        )
    if stated is None:
        name = _unstated(chosen_loss(config), loss.rpartition(":")[2])
        return (
            f"{loss} does not state how its scores become probabilities; their softmax is used, "
            f'as for cross_entropy: set {name}.probabilities = "softmax" where it is defined if '
            'that is right, "none" if not'
        )
    return ""


def _unstated(loss: Callable[..., Any], name: str) -> str:
    """Return the name of the function inside a loss that states nothing of its scores."""
    while isinstance(loss, (partial, Combined)):
        inside = (loss.func,) if isinstance(loss, partial) else loss.losses
        loss = next(part for part in inside if probabilities_of(part) is None)
        name = name_of(loss)
    return name


def _statement(config: TrainConfig) -> Probabilities | None:
    loss = chosen_loss(config)
    stated = probabilities_of(loss)
    return "costs" if stated is None and "cost_matrix" in options_of(loss) else stated
