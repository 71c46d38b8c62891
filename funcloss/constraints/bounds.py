"""Floors and ceilings: what must hold of a model's decisions, measured and weighed."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from funcloss.decisions import Costs, DecisionScores, class_index
from funcloss.errors import ConfigError

_PAIRS = "TRUE:DECIDED as in 9:4, or cost"
_ROUNDING = 1e-9  # of rates and costs, which are sums of float64


@dataclass(frozen=True)
class Constraint:
    """A floor or a ceiling on what a model does."""

    kind: str  # "recall", "precision", "pair" or "cost"
    bound: float
    truth: int = -1  # class of a recall, of a precision, true class of a pair
    decided: int = -1  # decided class of a pair

    @property
    def is_floor(self) -> bool:
        """Return whether the bound is to be reached rather than kept below."""
        return self.kind in ("recall", "precision")


def make_constraints(
    floor: Mapping[str, float], ceiling: Mapping[str, float], classes: Sequence[str]
) -> tuple[Constraint, ...]:
    """Return the constraints that floors and ceilings name.

    Args:
        floor: ``9`` or ``recall:9`` for the recall of a class, ``precision:9`` for its precision.
        ceiling: ``9:4`` for the part of the true 9 that are called 4, ``cost`` for the expected
            cost of an example.
        classes: Names of the classes, in the order of the labels.

    Returns:
        The constraints, floors first.

    Raises:
        ConfigError: a key names no such thing, a bound is out of range, or one is named twice.

    Example:
        >>> make_constraints({"dog": 0.9}, {"dog:cat": 0.05}, ("cat", "dog"))[1]
        Constraint(kind='pair', bound=0.05, truth=1, decided=0)
    """
    constraints = [_floor(key, bound, classes) for key, bound in floor.items()]
    constraints += [_ceiling(key, bound, classes) for key, bound in ceiling.items()]
    for i, constraint in enumerate(constraints):
        if any(
            replace(constraint, bound=0.0) == replace(other, bound=0.0) for other in constraints[:i]
        ):
            raise ConfigError(f"{constraint_text(constraint, classes)} is named twice")
    return tuple(constraints)


def constraint_text(constraint: Constraint, classes: Sequence[str]) -> str:
    """Return a constraint in words.

    Args:
        constraint: The constraint.
        classes: Names of the classes, in the order of the labels.

    Returns:
        Words such as ``recall of 9 at least 0.99``.
    """
    what = {
        "recall": lambda: f"recall of {classes[constraint.truth]}",
        "precision": lambda: f"precision of {classes[constraint.truth]}",
        "pair": lambda: (
            f"part of the true {classes[constraint.truth]} called {classes[constraint.decided]}"
        ),
        "cost": lambda: "expected cost an example",
    }[constraint.kind]()
    return f"{what} {'at least' if constraint.is_floor else 'at most'} {constraint.bound:g}"


def reached(constraints: Sequence[Constraint], scores: DecisionScores) -> tuple[float, ...]:
    """Return what a model reaches of each constraint.

    Args:
        constraints: The constraints.
        scores: Its decisions, judged.

    Returns:
        One number a constraint; NaN where it is not defined, as the precision of a class never
        decided.
    """
    return tuple(_reached(constraint, scores) for constraint in constraints)


def held(constraints: Sequence[Constraint], values: Sequence[float]) -> bool:
    """Return whether every constraint is kept, to rounding; what is not defined is not.

    Args:
        constraints: The constraints.
        values: What was reached of each.

    Returns:
        Whether all hold.
    """
    return all(
        (constraint.bound - v if constraint.is_floor else v - constraint.bound)
        <= _ROUNDING * max(1.0, abs(constraint.bound))
        for constraint, v in zip(constraints, values, strict=True)
    )


def violations(
    constraints: Sequence[Constraint], values: Sequence[float], support: Float[Tensor, " classes"]
) -> Float[Tensor, " constraints"]:
    """Return how far each constraint is missed, in units of what it leaves; negative: kept.

    ``(bound - value) / (1 - bound)`` of a floor, ``(value - bound) / bound`` of a ceiling, the room
    being no less than one example of the class: so 0.98 under a floor of 0.99 is 1, as is a rate of
    0.002 under a ceiling of 0.001.

    Args:
        constraints: The constraints.
        values: What was reached of each.
        support: Examples of each true class that it was measured on.

    Returns:
        Violations, 0 where a value is not defined.
    """
    missed = []
    for constraint, value in zip(constraints, values, strict=True):
        room = 1.0 - constraint.bound if constraint.is_floor else constraint.bound
        least = 1.0 / max(
            float(support[constraint.truth] if constraint.truth >= 0 else support.sum()), 1.0
        )
        gap = constraint.bound - value if constraint.is_floor else value - constraint.bound
        if constraint.kind == "cost":  # in units of the costs, whatever they are
            room, least = abs(constraint.bound), max(abs(value) * least, 1e-300)
        missed.append(gap / max(room, least))
    return torch.tensor(missed, dtype=torch.float64).nan_to_num(0.0)


def directions(
    constraints: Sequence[Constraint], scores: DecisionScores, costs: Costs
) -> Float[Tensor, "constraints classes"]:
    """Return which classes' log-weights each constraint's multiplier moves.

    A recall and a pair raise their true class; a precision lowers its class, so that fewer examples
    are taken for it; a cost raises the classes in which it arises and lowers the others, so that
    the mean over the examples stays: all together would only be a larger learning rate.

    Args:
        constraints: The constraints.
        scores: The model's decisions, judged.
        costs: What decisions cost.

    Returns:
        A row a constraint, entries in [-1, 1].
    """
    rows = torch.zeros(len(constraints), len(costs.classes), dtype=torch.float64)
    for row, constraint in zip(rows, constraints, strict=True):
        if constraint.kind == "cost":
            arises, part = scores.class_cost.clamp(min=0), scores.confusion.sum(1).double()
            relative = arises / arises.max().clamp(min=1e-300)
            row += relative - (part * relative).sum() / part.sum()
        else:
            row[constraint.truth] = -1.0 if constraint.kind == "precision" else 1.0
    return rows


def _reached(constraint: Constraint, scores: DecisionScores) -> float:
    if constraint.kind == "cost":
        return scores.expected_cost.value
    if constraint.kind == "pair":
        row = scores.confusion[constraint.truth].double()
        return float(row[constraint.decided] / row.sum())
    found = scores.recall if constraint.kind == "recall" else scores.precision
    return float(found.value[constraint.truth])


def _floor(key: str, bound: float, classes: Sequence[str]) -> Constraint:
    kind, colon, name = key.partition(":")
    if key in classes or not colon or kind not in ("recall", "precision"):
        kind, name = "recall", key
    index = class_index("floor", name, classes)
    if not 0.0 < bound <= 1.0:
        raise ConfigError(f"floor {key} must be a {kind} above 0 and at most 1, got {bound:g}")
    return Constraint(kind, bound, index)


def _ceiling(key: str, bound: float, classes: Sequence[str]) -> Constraint:
    if key == "cost":
        if not math.isfinite(bound):
            raise ConfigError(f"ceiling cost must be a number, got {bound:g}")
        return Constraint("cost", bound)
    truth, decided = _pair(key, classes)
    if truth == decided:
        raise ConfigError(f"ceiling {key}: a {classes[truth]} called itself is no mistake")
    if not 0.0 <= bound < 1.0:
        raise ConfigError(f"ceiling {key} must be a rate of at least 0 and below 1, got {bound:g}")
    return Constraint("pair", bound, truth, decided)


def _pair(key: str, classes: Sequence[str]) -> tuple[int, int]:
    """Return the classes that ``TRUE:DECIDED`` names; a name may hold a colon of its own."""
    pairs = []
    for colon in (i for i, letter in enumerate(key) if letter == ":"):
        with contextlib.suppress(ConfigError):
            truth = class_index("ceiling", key[:colon], classes)
            pairs.append((truth, class_index("ceiling", key[colon + 1 :], classes)))
    if not pairs:
        known = ", ".join(classes[:20])
        raise ConfigError(f"ceiling must be {_PAIRS}; got {key!r}; the classes are {known}")
    if len(pairs) > 1:
        told = " or ".join(f"a true {classes[t]} called {classes[d]}" for t, d in pairs)
        raise ConfigError(f"ceiling {key} may be {told}: name the classes by their index")
    return pairs[0]
