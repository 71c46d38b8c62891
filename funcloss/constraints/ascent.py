"""Training under floors: dual ascent on class weights, by what validation data shows."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from funcloss.constraints.bounds import Constraint, directions, held, reached, violations
from funcloss.decisions import Costs, DecisionScores

RATE = 0.2  # of a multiplier's logarithm, for a floor missed by all the room that it leaves
CAP = math.log(1000.0)  # of a multiplier's logarithm
_NOTHING = 0.005  # a weight as near to 1 is none


class Dual(NamedTuple):
    """The multipliers of a dual ascent, tensors only."""

    multipliers: Float[Tensor, " constraints"]  # in logarithms of a class weight, at least 0
    log_weights: Float[Tensor, " classes"]  # what the multipliers make of the class weights
    total: Float[Tensor, " classes"]  # sum of log_weights over the second half
    measured: Float[Tensor, ""]  # measurements made


def init_dual(constraints: Sequence[Constraint], classes: int) -> Dual:
    """Return the multipliers before the first measurement: every class weighs 1.

    Args:
        constraints: What is to hold.
        classes: Number of classes.

    Returns:
        Zeros, float64.
    """
    zeros = torch.zeros(classes, dtype=torch.float64)
    return Dual(torch.zeros(len(constraints), dtype=torch.float64), zeros, zeros, zeros.sum())


def ascend(
    dual: Dual,
    constraints: Sequence[Constraint],
    scores: DecisionScores,
    costs: Costs,
    *,
    rate: float = RATE,
) -> Dual:
    """Take a step of the dual ascent.

    ``multiplier <- clamp(multiplier + rate * clamp(violation, -1, 1), 0, log 1000)``, projected
    ascent on the multipliers of ``minimise loss subject to the constraints``; ``log_weights =
    multipliers @ directions``. A constraint that is kept lets its multiplier fall, so the weights
    found are the smallest that keep it. What is measured is the true rate, which has no
    gradient; the loss only carries the weights (a proxy Lagrangian).

    Args:
        dual: The multipliers.
        constraints: What is to hold.
        scores: What the model does now, on validation data.
        costs: What decisions cost.
        rate: Step of the ascent.

    Returns:
        The new multipliers and class weights.

    References:
        Cotter, Jiang and Sridharan, "Two-player games for efficient non-convex constrained
        optimization", 2019; Eban et al., "Scalable learning of non-decomposable objectives", 2017.
    """
    missed = violations(constraints, reached(constraints, scores), scores.confusion.sum(1))
    moved = dual.multipliers + rate * missed.clamp(-1.0, 1.0)
    multipliers = moved.clamp(0.0, CAP)
    log_weights = (multipliers @ directions(constraints, scores, costs)).clamp(-CAP, CAP)
    # The mean is of what was in force, which the new weights are only now.
    return Dual(multipliers, log_weights, dual.total + dual.log_weights, dual.measured + 1)


def weights_of(log_weights: Float[Tensor, " classes"]) -> dict[int, float]:
    """Return the class weights that differ from 1 by half a percent, by class, to four digits.

    Args:
        log_weights: Logarithms of the class weights.

    Returns:
        Weights by index of the class.
    """
    weights = {c: float(f"{math.exp(v):.4g}") for c, v in enumerate(log_weights.tolist())}
    return {c: w for c, w in weights.items() if abs(w - 1.0) >= _NOTHING}


class Snapshot(NamedTuple):
    """How a moment of an ascent compares with others: the largest is the best."""

    feasible: bool
    margin: float  # less the largest violation; 0 where every constraint holds
    worth: float  # less the expected cost


def snapshot_of(constraints: Sequence[Constraint], scores: DecisionScores) -> Snapshot:
    """Return how good a moment is: constraints first, then expected cost.

    Args:
        constraints: What is to hold.
        scores: What the model does, on validation data.

    Returns:
        What sorts it among others.
    """
    values = reached(constraints, scores)
    if held(constraints, values):
        return Snapshot(True, 0.0, -scores.expected_cost.value)
    missed = violations(constraints, values, scores.confusion.sum(1))
    undefined = any(math.isnan(v) for v in values)
    margin = -math.inf if undefined else -float(missed.max())
    return Snapshot(False, margin, -scores.expected_cost.value)


def decision_weights(
    log_probs: Float[Tensor, "n classes"],
    constraints: Sequence[Constraint],
    costs: Costs,
    scored: Callable[[Tensor], DecisionScores],
    *,
    rounds: int = 200,
) -> tuple[Tensor, bool]:
    """Return class weights for a trained model's decisions, ``argmax(w * p)``, under constraints.

    The cheap way to a floor: nothing is trained, thresholds move. The same dual ascent, on fixed
    probabilities.

    Args:
        log_probs: Log-probabilities on validation data.
        constraints: What is to hold.
        costs: What decisions cost.
        scored: Judges decisions, ``(n,)`` class indices, on the same data.
        rounds: Steps of the ascent.

    Returns:
        Log-weights of the best moment, shape ``(classes,)``, and whether all constraints hold.
    """
    dual = init_dual(constraints, log_probs.shape[-1])
    best, chosen = None, dual.log_weights
    for i in range(rounds):
        scores = scored((log_probs + dual.log_weights).argmax(-1))
        now = snapshot_of(constraints, scores)
        if best is None or now > best:
            best, chosen = now, dual.log_weights
        dual = ascend(dual, constraints, scores, costs, rate=RATE / math.sqrt(1 + i / 20))
    return chosen, best is not None and best.feasible
