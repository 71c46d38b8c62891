"""The step that an optimiser takes as the sum of what each part of the gradient does to it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcloss.audit.checks import check_update, rounding_of
from funcloss.audit.data import MakeBatches
from funcloss.audit.gradients import AuditContext, ClassGradients, block_gradients
from funcloss.audit.inner import (
    add_to,
    cross,
    grams,
    held,
    plus,
    scaled_rows,
    side_by_side,
    total_of,
)
from funcloss.audit.loss import cotangents_of, values_of
from funcloss.audit.result import Check, Impact, StepAudit
from funcloss.optim import Optimizer, OptState, Schedule, SGDState, clip_factor
from funcloss.typing import Grads, Params

OWN_ROWS = ("weight decay", "history")  # what moves beside the parts of this gradient
_CLOSES = 0.05  # relative distance of an impact's parts from the measured change
_MOST_PIECES = 8  # of a step, until they do


@dataclass(frozen=True, eq=False)
class StepSpec:
    """The step to audit beside the gradient.

    Args:
        optimizer: What takes the step.
        learning_rate: Its learning rate.
        schedule: Factor on it by number of the step; None: 1.
        clip_norm: Largest norm of the gradient; 0 clips nothing.
        held_out: Further examples to predict the impact of the step on, as the data.

    Raises:
        ValueError: ``clip_norm`` is below 0.
    """

    optimizer: Optimizer
    learning_rate: float | Tensor
    schedule: Schedule | None = None
    clip_norm: float = 0.0
    held_out: Any = None

    def __post_init__(self) -> None:
        """Check what holds before any gradient is known."""
        if not self.clip_norm >= 0.0:
            raise ValueError(f"StepSpec: clip_norm must be at least 0, got {self.clip_norm}")


@dataclass(frozen=True, eq=False)
class SplitStep:
    """A step, ready to be split, ``u = sum(steps(parts)) + sum(own)``."""

    clip: Tensor  # factor on the gradient
    learning_rate: Tensor
    whole: Params  # u, as the optimiser itself gives it
    # (parts of the gradient, unclipped, side by side; memory) -> (steps, memory), in rows: the
    # parts and then ``OWN_ROWS``; without what decay adds to the step itself
    rows: Callable[[Grads, Params], tuple[Params, Params]]
    # memory in rows -> the steps that it makes alone
    remembered: Callable[[Params], Params]
    decay: Params  # what decay adds to the step beside the gradient; empty: nothing
    history: Params  # what the optimiser remembers of earlier steps
    keeps: float  # what part of the memory a step keeps
    note: str  # what is not known; empty: nothing

    def split(self, parts: Grads, memory: Params | None) -> tuple[Params, Params]:
        """Return the steps of parts and of ``OWN_ROWS``, and the memory of each after them.

        Args:
            parts: Of the gradient, unclipped, side by side.
            memory: Of each row; None: all that the optimiser remembers is history.
        """
        number = 0 if not parts else len(next(iter(parts.values())))
        steps, memory = self.rows(parts, self.all_history(number) if memory is None else memory)
        for name, move in self.decay.items():
            steps[name][-len(OWN_ROWS)] += move
        return steps, memory

    def all_history(self, parts: int) -> Params:
        """Return the memory of so many parts and ``OWN_ROWS``, where all of it is history."""
        return {
            name: torch.cat([m.new_zeros(parts + len(OWN_ROWS) - 1, *m.shape), m[None]])
            for name, m in self.history.items()
        }

    def of_parts(self, parts: Grads) -> Params:
        """Return the steps of parts of the gradient alone."""
        rows, _ = self.split(parts, None)
        return {name: row[: -len(OWN_ROWS)] for name, row in rows.items()}

    def own(self) -> Params:
        """Return the steps that no part of this gradient causes, in the order of ``OWN_ROWS``."""
        none = {name: move.new_zeros(0, *move.shape) for name, move in self.whole.items()}
        rows, _ = self.split(none, None)
        return rows

    def audited(self, classes: tuple[str, ...], gram: Tensor) -> StepAudit:
        """Return the step with its rows' inner products as a result."""
        rows = (*classes, *OWN_ROWS)
        return StepAudit(rows, gram, float(self.learning_rate), float(self.clip), self.note)


def split_step(
    optimizer: Optimizer,
    opt_state: OptState | None,
    params: Params,
    grads: Grads,
    learning_rate: Tensor,
    clip_norm: float,
) -> tuple[SplitStep | None, str]:
    """Split the step on a gradient.

    Args:
        optimizer: What takes the step.
        opt_state: Its memory; None: not known.
        params: The parameters.
        grads: The whole gradient, unclipped.
        learning_rate: The schedule's factor included.
        clip_norm: Largest global norm of the gradient; 0 clips nothing.

    Returns:
        The step; or None, and why it cannot be split.
    """
    parting = optimizer.split
    if parting is None:
        return None, "this optimiser does not say how its step is made up: see the gradient's parts"
    state = optimizer.init(params) if opt_state is None else opt_state
    remembered = parting.memory(state)
    note = ""
    if opt_state is None and remembered:
        if not isinstance(state, SGDState):
            why = "the optimiser's memory is not known, and every part of its step depends on it: "
            return None, why + "see the gradient's parts"
        note = "the momentum is not known: these are the steps of this gradient alone"
    clip = clip_factor(grads, clip_norm) if clip_norm else torch.ones_like(learning_rate)
    clipped = {name: clip.to(g) * g for name, g in grads.items()}
    added, moved = parting.decay(params, learning_rate)
    gradient = {name: g + added[name] for name, g in clipped.items()} if added else clipped

    def rows(parts: Grads, memory: Params) -> tuple[Params, Params]:
        with_own = {}
        for name, part in parts.items():
            nothing = torch.zeros_like(params[name])
            own = torch.stack([added.get(name, nothing), nothing])
            with_own[name] = torch.cat([clip.to(part) * part, own])
        return parting.steps(with_own, memory, gradient, state, learning_rate)

    def of_memory(memory: Params) -> Params:
        nothing = {name: torch.zeros_like(row) for name, row in memory.items()}
        return parting.steps(nothing, memory, gradient, state, learning_rate)[0]

    whole, _ = optimizer.update(clipped, state, params, learning_rate)
    return (
        SplitStep(
            clip,
            learning_rate,
            whole,
            rows,
            of_memory,
            decay=moved,
            history=remembered,
            keeps=parting.keeps,
            note=note,
        ),
        "",
    )


def step_and_impact(
    context: AuditContext,
    gradients: ClassGradients,
    spec: StepSpec,
    data: Mapping[str, MakeBatches],
) -> tuple[StepAudit | None, dict[str, Impact], list[Check], str]:
    """Split the step, and its impact on every class in ``data``, by name.

    Returns:
        The step, the impact by name of the data, the checks, and a note: why there is no step, or
        that the parts of the impact do not add up.
    """
    state, blocks, layers = context.state, context.blocks, context.layers
    dtype = next(iter(state.params.values())).dtype
    rate = spec.learning_rate
    rate = rate if isinstance(rate, Tensor) else torch.as_tensor(rate, dtype=dtype)
    rate = rate.to(state.device)
    if spec.schedule is not None:
        rate = rate * spec.schedule(state.step)
    split, why_not = split_step(
        spec.optimizer, state.opt_state, state.params, gradients.gradient, rate, spec.clip_norm
    )
    if split is None:
        return None, {}, [], why_not

    def moves_of(block: range) -> Params:
        weights = context.weights[block.start : block.stop]
        factors = (gradients.scale / len(gradients.examples.label)) * weights
        return split.of_parts(scaled_rows(factors, gradients.sums(block)))

    moves, own = held(moves_of, blocks), split.own()
    products = _row_products(moves, moves, own, context).sum(0)
    across = torch.cat([grams(own, moves(block), layers).sum(0) for block in blocks], 1)
    within = grams(own, own, layers).sum(0)
    gram = torch.cat([products, torch.cat([across, within], 1)])
    total = total_of(own)
    for block in blocks:
        total = plus(total, total_of(moves(block)))
    after = plus(state.params, split.whole)
    checks = [check_update(state.params, after, total)]
    # A step that rounding swallows, as at the end of a schedule, closes in no number of pieces.
    rounded = rounding_of(state.params, split.whole) > _CLOSES
    impact = {
        part: _impact(
            context,
            make_batches,
            gradients.sums if part == "train" and not context.coupled else None,
            split.whole,
            lambda left: _row_products(left, moves, own, context).sum(0),
            math.inf if rounded else _CLOSES,
        )
        for part, make_batches in data.items()
    }
    error = max(found.residual for found in impact.values())
    says = "parts of the change of each class's loss against the change that the step makes"
    checks.append(Check("impact", error, None, says))
    note = ""
    if not error <= _CLOSES and rounded:
        note = (
            "the step is so short that rounding shows in the measured change of the losses: the "
            f"parts of the impact add up to it only within {error:.0%}"
        )
    elif not error <= _CLOSES:
        note = (
            f"the parts of the impact add up to the measured change only within {error:.0%}, in "
            f"{_MOST_PIECES} pieces: the step is too large for them"
        )
    return split.audited(context.names, gram), impact, checks, note


def _impact(
    context: AuditContext,
    make_batches: MakeBatches,
    first: Callable[[range], Grads] | None,
    step: Params,
    products: Callable[[Callable[[range], Grads]], Tensor],
    closes: float,
) -> Impact:
    """Integrate along the step; ``first``: the sums of gradients before it, if they are known."""
    params = context.state.params
    before, count = class_losses(context, make_batches, params)
    after, _ = class_losses(context, make_batches, plus(params, step))

    def sums_at(at: Params) -> Callable[[range], Grads]:
        if at is params and first is not None:
            return first
        there = replace(context, state=replace(context.state, params=at))
        return lambda block: loss_gradients(there, make_batches, block)

    def mean_products(left: Callable[[range], Grads]) -> Tensor:
        sums = products(left)
        return torch.where(count[:, None] > 0, sums / count[:, None], torch.nan)

    found, _ = impact_along(
        params, step, sums_at, mean_products, before, after, context.blocks, closes=closes
    )
    return found


def impact_along(
    params: Params,
    step: Params,
    sums_at: Callable[[Params], Callable[[range], Grads]],
    products: Callable[[Callable[[range], Grads]], Tensor],
    before: Tensor,
    after: Tensor,
    blocks: Sequence[range],
    *,
    closes: float = _CLOSES,
    end: Params | None = None,
) -> tuple[Impact, Callable[[range], Grads]]:
    """Integrate along a step by Simpson's rule, in as many pieces as it takes to add up.

    Args:
        params: Before the step.
        step: The whole of it.
        sums_at: From params on the way to the gradients of the classes' losses there, by block.
        products: From gradients by block of classes to their inner products with the step's rows.
        before: The classes' mean losses at the params.
        after: Those one step on.
        blocks: Of classes.
        closes: Relative distance of the parts from the measured change that ends it.
        end: After the step, as the next one begins; None: their sum.

    Returns:
        The impact, and the mean gradients along the step that it was found by.
    """

    def along(pieces: int) -> tuple[Impact, Callable[[range], Grads]]:
        def mean_gradients(block: range) -> Grads:
            total: Grads = {}
            for point, weight in enumerate(_simpson(pieces)):
                part = point / (2 * pieces)
                at = {0.0: params, 1.0: end}.get(part)
                at = at or {name: p + part * step[name] for name, p in params.items()}
                found = sums_at(at)(block)
                factors = torch.full((len(block),), weight, dtype=torch.float64)
                scaled = scaled_rows(factors, found)
                if total:
                    add_to(total, scaled)
                else:
                    total = scaled
            return total

        along_step = held(mean_gradients, blocks)
        return Impact(products(along_step), before, after, pieces), along_step

    found, gradients = along(1)
    while not found.residual <= closes and found.pieces < _MOST_PIECES:
        found, gradients = along(2 * found.pieces)
    return found, gradients


def _simpson(pieces: int) -> list[float]:
    """Return the weights of Simpson's rule on ``[0, 1]``, of ``2 * pieces + 1`` points.

    Example:
        >>> [round(6 * weight, 2) for weight in _simpson(1)]
        [1.0, 4.0, 1.0]
    """
    inner = [4.0 if point % 2 else 2.0 for point in range(1, 2 * pieces)]
    return [weight / (6.0 * pieces) for weight in (1.0, *inner, 1.0)]


def _row_products(
    left: Callable[[range], Grads],
    moves: Callable[[range], Params],
    own: Params,
    context: AuditContext,
) -> Tensor:
    """Inner products of all rows of ``left`` with those of the step, by layer."""
    blocks, layers = context.blocks, context.layers
    with_own = torch.cat([grams(left(block), own, layers) for block in blocks], 1)
    return torch.cat([cross(left, moves, blocks, layers), with_own], 2)


def loss_gradients(context: AuditContext, make_batches: MakeBatches, block: range) -> Grads:
    """Return the gradient of each class's sum of losses, of a block of classes."""
    if context.coupled:  # class parts of the whole loss are not gradients of the classes' losses
        return coupled_gradients(context, make_batches, block)
    return block_gradients(context, make_batches, block)


def coupled_gradients(context: AuditContext, make_batches: MakeBatches, wanted: range) -> Grads:
    """Return the gradient of each class's sum of losses, where a loss couples the examples."""
    sums = side_by_side(context.state.params, len(wanted))
    for batch in make_batches():
        if not len(batch):
            continue
        predictions = context.predictions(batch)
        whole = batch.in_one_group()
        for row, label in enumerate(wanted):
            of_class = (batch.groups == label).to(predictions)
            if not bool(of_class.any()):
                continue
            _, cotangents = cotangents_of(context.loss, predictions, batch.targets, of_class)
            one = {name: part[row : row + 1] for name, part in sums.items()}
            for piece in context.pieces(batch):
                _, pullback = context.measure(context.state, whole.at(piece))
                pullback(cotangents[piece], one, False)
    return sums


def class_losses(
    context: AuditContext, make_batches: MakeBatches, params: Params
) -> tuple[Tensor, Tensor]:
    """Return the mean loss of each class at weight 1, NaN without examples, and its count."""
    total = torch.zeros(context.classes, dtype=torch.float64)  # on the CPU: MPS has no float64
    count = torch.zeros_like(total)
    for batch in make_batches():
        if not len(batch):
            continue
        predictions = context.predictions(batch, params)
        values = values_of(context.loss, predictions, batch.targets).cpu().double()
        groups = batch.groups.cpu()
        total.index_add_(0, groups, values)
        count.index_add_(0, groups, torch.ones_like(values))
    return total / count, count
