"""Training under floors and ceilings: what steers it, and what it came to."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss.app.data import Dataset
from funcloss.app.runs import Steering
from funcloss.app.runs.evaluation import deployment_prior, evaluate
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.setup import Setup
from funcloss.constraints.ascent import Dual, Snapshot, ascend, init_dual, snapshot_of, weights_of
from funcloss.constraints.limits import Limit, held, limit_text, make_limits, reached
from funcloss.decisions import DecisionScores, score
from funcloss.errors import ConfigError
from funcloss.training import TrainState
from funcloss.typing import Buffers, Hyper, Params

_AN_EPOCH = 5  # measurements


class Held(NamedTuple):
    """What a training under limits remembers: its multipliers, and the best moment so far."""

    dual: Dual
    params: Params  # of the best moment
    buffers: Buffers
    log_weights: Float[Tensor, " classes"]  # at it
    reached: Float[Tensor, " limits"]
    feasible: Float[Tensor, ""]  # 1 where every limit holds
    margin: Float[Tensor, ""]
    worth: Float[Tensor, ""]  # less the expected cost
    step: Int[Tensor, ""]


def limits_of(setup: Setup) -> tuple[Limit, ...]:
    """Return the limits of a training.

    Args:
        setup: The training.

    Returns:
        Its floors and ceilings.

    Raises:
        ConfigError: there is none, one makes no sense, or nothing is held out to measure it on.
    """
    config, dataset = setup.config, setup.dataset
    limits = make_limits(config.floor, config.ceiling, dataset.classes)
    if not limits:
        raise ConfigError("no floor and no ceiling is given, as in floor 9=0.99")
    check_measurable(limits, dataset)
    weightless = [
        dataset.classes[limit.truth]
        for limit in limits
        if limit.truth >= 0 and config.class_weight.get(dataset.classes[limit.truth]) == 0
    ]
    if weightless:
        raise ConfigError(
            f"class {weightless[0]} has class_weight 0, which no multiplier can raise: leave it out"
        )
    if config.reduction != "mean":
        raise ConfigError(
            f"floors and ceilings set class weights, which reduction {config.reduction} divides "
            "by again: use reduction mean"
        )
    return limits


def steer_by_limits(setup: Setup) -> Steering:
    """Return what keeps a training within its floors and ceilings: dual ascent on class weights.

    Every so many steps the model decides on the validation data, a multiplier a limit moves by how
    far it is missed (:func:`funcloss.app.sweep.ascend`), and the multipliers make the class weights
    that the next steps are given in ``hyper``, times those that the configuration has. The best
    moment is kept: one at which every limit holds before one at which some does not, then one of
    the second half of the training, then by expected cost.

    Args:
        setup: The training.

    Returns:
        The init/update pair, for :func:`funcloss.app.runs.train`.

    Raises:
        ConfigError: the limits make no sense, or nothing is held out to measure them on.
    """
    limits, dataset, costs = limits_of(setup), setup.dataset, setup.costs
    classes, config = dataset.classes, setup.config
    base = setup.hyper["class_weights"]
    half = config.epochs * setup.per_epoch // 2
    labels = dataset.validation.labels.cpu()
    prior = deployment_prior(config, classes, labels.bincount(minlength=len(classes)))

    def measure(state: TrainState) -> DecisionScores:
        found = evaluate(setup.trained(state), dataset, ("validation",))["validation"]
        return score(found.logits, labels, found.rule, prior=prior).argmax

    def told(log_weights: Tensor) -> dict[str, float]:
        weights = weights_of(log_weights + base.cpu().double().log())
        return {classes[c]: w for c, w in weights.items()}

    def init(state: TrainState) -> Held:
        dual = init_dual(limits, len(classes))
        worst = torch.tensor(-math.inf, dtype=torch.float64)
        none = torch.full((len(limits),), math.nan, dtype=torch.float64)
        return Held(
            dual, state.params, state.buffers, dual.log_weights, none,
            feasible=torch.zeros_like(worst), margin=worst, worth=worst, step=state.step.cpu(),
        )  # fmt: skip

    def update(memory: Held, state: TrainState) -> tuple[Held, dict[str, Any]]:
        scores = measure(state)
        now, values = snapshot_of(limits, scores), reached(limits, scores)
        best = Snapshot(bool(memory.feasible), float(memory.margin), float(memory.worth))
        # Early on a limit may hold by chance, of a model that has hardly learnt.
        late, was_late = int(state.step) > half, int(memory.step) > half
        if (now.feasible, late, *now[1:]) > (best.feasible, was_late, *best[1:]):
            feasible, margin, worth = (torch.tensor(v, dtype=torch.float64) for v in now)
            memory = Held(
                memory.dual, state.params, state.buffers, memory.dual.log_weights,
                torch.tensor(values, dtype=torch.float64), feasible, margin, worth,
                state.step.cpu(),
            )  # fmt: skip
        record = {
            "weights": told(memory.dual.log_weights),
            "reached": {
                limit_text(limit, classes): None if math.isnan(v) else v
                for limit, v in zip(limits, values, strict=True)
            },
            "accuracy": scores.accuracy.value,
            "feasible": now.feasible,
        }
        dual = ascend(memory.dual, limits, scores, costs)
        if int(state.step) <= half:  # the weights found are a mean over the second half
            dual = dual._replace(total=0 * dual.total, measured=0 * dual.measured)
        return memory._replace(dual=dual), record

    def given(log_weights: Tensor) -> Hyper:
        return setup.hyper | {"class_weights": base * log_weights.exp().to(base)}

    def hyper(memory: Held) -> Hyper:
        return given(memory.dual.log_weights)

    def model(memory: Held) -> TrainedModel:
        return setup.trained(memory, given(memory.log_weights))

    def summary(memory: Held) -> dict[str, Any]:
        values = memory.reached.tolist()
        mean = memory.dual.total / memory.dual.measured.clamp(min=1)
        return {
            "limits": [
                {"limit": limit_text(limit, classes), "bound": limit.bound,
                 "reached": None if math.isnan(v) else v, "held": held([limit], [v])}
                for limit, v in zip(limits, values, strict=True)
            ],
            "feasible": bool(memory.feasible),
            "best_step": int(memory.step),
            "weights_found": told(mean),
            "weights_at_best": told(memory.log_weights),
        }  # fmt: skip

    every = config.floor_every or max(1, setup.per_epoch // _AN_EPOCH)
    return Steering(every, init, update, hyper, model, summary)


def check_measurable(limits: Sequence[Limit], dataset: Dataset) -> None:
    """Raise ``ConfigError`` unless validation data has what limits are measured on.

    Args:
        limits: The limits.
        dataset: The data.
    """
    labels = dataset.validation.labels
    if limits and not len(labels):
        raise ConfigError(
            "floors and ceilings are measured on validation data, and none is held out: set "
            "val_fraction, to 0.1 say"
        )
    for limit in limits:
        if limit.truth >= 0 and not (labels == limit.truth).any():
            name = dataset.classes[limit.truth]
            raise ConfigError(f"there is no validation example of {name} to measure its limit on")
