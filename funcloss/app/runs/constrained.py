"""Training under floors and ceilings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss.app.data import Dataset
from funcloss.app.runs.evaluation import deployment_prior, evaluate
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.setup import Setup
from funcloss.constraints.ascent import Dual, Snapshot, ascend, init_dual, snapshot_of, weights_of
from funcloss.constraints.bounds import Constraint, constraint_text, held, make_constraints, reached
from funcloss.decisions import DecisionScores, score
from funcloss.errors import ConfigError
from funcloss.training import TrainState
from funcloss.typing import Buffers, Hyper, Params

_PER_EPOCH = 5  # measurements


class Held(NamedTuple):
    """What a training under constraints remembers: its multipliers, and the best moment so far."""

    dual: Dual
    params: Params  # of the best moment
    buffers: Buffers
    log_weights: Float[Tensor, " classes"]  # at it
    reached: Float[Tensor, " constraints"]
    feasible: Float[Tensor, ""]  # 1 where every constraint holds
    margin: Float[Tensor, ""]
    worth: Float[Tensor, ""]  # less the expected cost
    step: Int[Tensor, ""]


def constraints_of(setup: Setup) -> tuple[Constraint, ...]:
    """Return the constraints of a training.

    Args:
        setup: The training.

    Returns:
        Its floors and ceilings.

    Raises:
        ConfigError: one makes no sense, or nothing is held out to measure it on.
    """
    config, dataset = setup.config, setup.dataset
    constraints = make_constraints(config.floor, config.ceiling, dataset.classes)
    check_measurable(constraints, dataset)
    weightless = [
        dataset.classes[constraint.truth]
        for constraint in constraints
        if constraint.truth >= 0 and config.class_weight.get(dataset.classes[constraint.truth]) == 0
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
    return constraints


@dataclass(frozen=True)
class Controller:
    """Keeps a training run within its floors and ceilings: dual ascent on class weights.

    Every so many steps the model decides on the validation data, a multiplier per constraint moves
    by how far it is missed (:func:`funcloss.constraints.ascent.ascend`), and the multipliers make
    the class weights that the next steps are given in ``hyper``, times those of the configuration.
    The best moment is kept: one at which every constraint holds before one at which some does not,
    then one of the second half of the training, then by expected cost.

    All methods are pure: what is remembered travels in ``memory``, which checkpoints keep, so that
    a resumed training goes on to the same bits.
    """

    setup: Setup
    constraints: tuple[Constraint, ...]

    @property
    def every(self) -> int:
        """Steps between two measurements; one more follows the last step."""
        return self.setup.config.floor_every or max(1, self.setup.per_epoch // _PER_EPOCH)

    def init(self, state: TrainState) -> Held:
        """Return the memory before the first step."""
        dual = init_dual(self.constraints, len(self.setup.dataset.classes))
        worst = torch.tensor(-math.inf, dtype=torch.float64)
        none = torch.full((len(self.constraints),), math.nan, dtype=torch.float64)
        return Held(
            dual, state.params, state.buffers, dual.log_weights, none,
            feasible=torch.zeros_like(worst), margin=worst, worth=worst, step=state.step.cpu(),
        )  # fmt: skip

    def update(self, memory: Held, state: TrainState) -> tuple[Held, dict[str, Any]]:
        """Measure the constraints at a state; return the memory after it, and a record of it."""
        setup, constraints = self.setup, self.constraints
        classes, half = setup.dataset.classes, setup.steps // 2
        scores = self._measured(state)
        now, values = snapshot_of(constraints, scores), reached(constraints, scores)
        best = Snapshot(bool(memory.feasible), float(memory.margin), float(memory.worth))
        # Early on a constraint may hold by chance, of a model that has hardly learnt.
        late, was_late = int(state.step) > half, int(memory.step) > half
        if (now.feasible, late, *now[1:]) > (best.feasible, was_late, *best[1:]):
            feasible, margin, worth = (torch.tensor(v, dtype=torch.float64) for v in now)
            memory = Held(
                memory.dual, state.params, state.buffers, memory.dual.log_weights,
                torch.tensor(values, dtype=torch.float64), feasible, margin, worth,
                state.step.cpu(),
            )  # fmt: skip
        record = {
            "weights": self._weights(memory.dual.log_weights),
            "reached": {
                constraint_text(constraint, classes): None if math.isnan(v) else v
                for constraint, v in zip(constraints, values, strict=True)
            },
            "accuracy": scores.accuracy.value,
            "feasible": now.feasible,
        }
        dual = ascend(memory.dual, constraints, scores, setup.costs)
        if int(state.step) <= half:  # the weights found are a mean over the second half
            dual = dual._replace(total=0 * dual.total, measured=0 * dual.measured)
        return memory._replace(dual=dual), record

    def hyper(self, memory: Held) -> Hyper:
        """Return what the next steps are given."""
        return self._given(memory.dual.log_weights)

    def model(self, memory: Held) -> TrainedModel:
        """Return the model of the best moment."""
        return self.setup.trained(memory, self._given(memory.log_weights))

    def summary(self, memory: Held) -> dict[str, Any]:
        """Return what ``summary.json`` says of the constraints."""
        values, classes = memory.reached.tolist(), self.setup.dataset.classes
        mean = memory.dual.total / memory.dual.measured.clamp(min=1)
        return {
            "constraints": [
                {"constraint": constraint_text(constraint, classes), "bound": constraint.bound,
                 "reached": None if math.isnan(v) else v, "held": held([constraint], [v])}
                for constraint, v in zip(self.constraints, values, strict=True)
            ],
            "feasible": bool(memory.feasible),
            "best_step": int(memory.step),
            "weights_found": self._weights(mean),
            "weights_at_best": self._weights(memory.log_weights),
        }  # fmt: skip

    def _measured(self, state: TrainState) -> DecisionScores:
        setup = self.setup
        found = evaluate(setup.trained(state), setup.dataset, ("validation",))["validation"]
        prior = deployment_prior(setup.config, setup.dataset.classes, found.counts)
        judged = score(found.logits, found.labels, found.rule, prior=prior, amounts=found.amounts)
        return judged.argmax

    def _given(self, log_weights: Tensor) -> Hyper:
        base = self.setup.hyper["class_weights"]
        return self.setup.hyper | {"class_weights": base * log_weights.exp().to(base)}

    def _weights(self, log_weights: Tensor) -> dict[str, float]:
        base = self.setup.hyper["class_weights"].cpu().double()
        weights = weights_of(log_weights + base.log())
        return {self.setup.dataset.classes[c]: w for c, w in weights.items()}


def make_controller(setup: Setup) -> Controller | None:
    """Return what keeps a training run within its constraints; None if it has none.

    Raises:
        ConfigError: the constraints make no sense, or nothing is held out to measure them on.
    """
    if not (setup.config.floor or setup.config.ceiling):
        return None
    return Controller(setup, constraints_of(setup))


def check_measurable(constraints: Sequence[Constraint], dataset: Dataset) -> None:
    """Raise ``ConfigError`` unless validation data has what constraints are measured on.

    Args:
        constraints: The constraints.
        dataset: The data.
    """
    labels = dataset.validation.labels
    if constraints and not len(labels):
        raise ConfigError(
            "floors and ceilings are measured on validation data, and none is held out: set "
            "val_fraction, to 0.1 say"
        )
    for constraint in constraints:
        if constraint.truth >= 0 and not (labels == constraint.truth).any():
            name = dataset.classes[constraint.truth]
            raise ConfigError(
                f"there is no validation example of {name} to measure its constraint on"
            )
