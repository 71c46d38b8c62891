"""A step of ``torch.optim`` as a :class:`SplitStep`: each part with a memory of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from funcloss.audit.inner import norm_of
from funcloss.audit.optimizers import Memory, linear_step, memory_of
from funcloss.audit.parts import Parts, dense
from funcloss.audit.step import OWN_ROWS, SplitStep
from funcloss.audit.taken import Match, cut_off
from funcloss.errors import AuditError
from funcloss.typing import Grads, Params

SURVIVES = "(kept)"  # among the names of what waits: what a step kept until it was put there
_APART = 1e-3  # of the memory's parts from the memory, relative to theirs lengths


@dataclass(frozen=True, eq=False)
class ParameterStep:
    """The step at one parameter, linear in the gradient and in the memory.

    ``u = on_gradient * g + on_memory * m + decay + history``, and then
    ``m -> keeps * m + takes * g + decay_takes``.
    """

    on_gradient: Tensor
    on_memory: Tensor | None  # None: nothing is remembered yet
    decay: Tensor | None
    history: Tensor | None  # what is remembered in a way that is not known
    memory: Tensor | None  # m before the step
    keeps: float
    takes: Tensor | float | None  # None: nothing is remembered
    decay_takes: Tensor | None


def parameter_step(
    group: Mapping, kind: type, state: Mapping, p: Tensor, grad: Tensor
) -> ParameterStep:
    """Return the step that an optimiser is about to take at a parameter; args as ``linear_step``.

    Raises:
        AuditError: the step of such an optimiser cannot be split.
    """
    made = linear_step(group, kind, state, p, grad)
    memory = memory_of(group, kind, state)
    if memory is None:
        return ParameterStep(
            made.on_gradient, None, made.decay, made.history, None, 0.0, None, None
        )
    held, on_memory = state.get(memory.name), None
    if held is not None:
        ones = {**state, memory.name: torch.ones_like(dense(held))}
        on_memory = linear_step(group, kind, ones, p, grad).history
        held = dense(held).to(made.on_gradient.dtype, copy=True)  # it changes in place
    takes, decay_takes = _taken(memory, group, kind, state, p, grad)
    return ParameterStep(
        made.on_gradient, on_memory, made.decay, None, held, float(memory.keeps), takes, decay_takes
    )


def _taken(
    memory: Memory, group: Mapping, kind: type, state: Mapping, p: Tensor, grad: Tensor
) -> tuple[Tensor | float, Tensor | None]:
    """Return what the memory takes of the gradient, as a factor, and of weight decay."""
    if memory.adapted:
        unit = linear_step({**group, "lr": -1.0}, kind, state, p, grad)
        return unit.on_gradient, unit.decay
    decays = isinstance(memory.decay, Tensor) or memory.decay != 0
    decay = memory.takes * memory.decay * p.detach() if decays else None
    return -memory.takes if group.get("maximize") else memory.takes, decay


def part_rows(
    grads: Grads,
    parts: Parts,
    place: Mapping[str, int],
    classes: int,
    match: Match,
    scale: float,
) -> Grads:
    """Return the parts of gradients side by side: of each class, and last what is beside them.

    Args:
        grads: By name, as the optimiser gets them.
        parts: By group, one for each parameter.
        place: From a name to the parameter's place there.
        classes: How many.
        match: How the gradients are made of the parts.
        scale: What the parts are multiplied by and the gradients no longer are.

    Raises:
        AuditError: a part is of no class.
    """
    if beyond := [group for group in parts if group >= classes]:
        raise AuditError(f"labels must be below {classes}, got {beyond[0]}: give watch classes=")
    rows = {}
    for name, grad in grads.items():
        there = place.get(name)
        own = [None if there is None else found[there] for found in parts.values()]
        own = cut_off(own, match.bound * scale)
        row = grad.new_zeros(classes + 1, *grad.shape)
        for group, part in zip(parts, own, strict=True):
            if group >= 0 and part is not None:
                row[group] = (match.factor / scale) * dense(part).to(row)
        row[-1] = grad - row.sum(0)
        rows[name] = row
    return rows


def split_torch_step(
    found: Mapping[str, ParameterStep],
    like: Params,
    rows: int,
    *,
    keeps: float = 0.0,
    remember: Sequence[str] = (),
    kept: Tensor | None = None,
    kept_then: Tensor | None = None,
) -> SplitStep:
    """Return a step of ``torch.optim`` ready to be split.

    What a sampled ledger takes for kept of the memory is ``keeps``, at every step and parameter;
    where it is another part, the memory's effect is corrected for it.

    Args:
        found: The step at each parameter that moves, by name.
        like: Tensors of all parameters that are remembered for, by name.
        rows: How many, with those of ``OWN_ROWS``.
        keeps: What part of the memory a step is taken to keep.
        remember: Names that each memory has, for a sampled ledger.
        kept: ``(remember,)``, logarithm of what the steps before have kept, beyond ``keeps``.
        kept_then: The same after this step.
    """

    def nothing(name: str) -> Tensor:
        return like[name].new_zeros(rows, *like[name].shape)

    def survives(memory: Params) -> dict[str, float]:
        if kept is None or SURVIVES not in memory:
            return {}
        ratio = (kept - memory[SURVIVES][-1]).exp().tolist()
        return dict(zip(remember, ratio, strict=True))

    def remembered(memory: Params) -> Params:
        ratio, moves = survives(memory), {}
        for name, at in found.items():
            move = nothing(name)
            if name in memory and at.on_memory is not None:
                move += ratio.get(name, 1.0) * at.on_memory * memory[name]
            moves[name] = move
        return moves

    def own_memory(name: str, memory: Params) -> Tensor:
        """Return the memory in rows; what is not that of the rows is history."""
        at, own = found[name], memory.get(name)
        if at.memory is None:
            return nothing(name)
        if own is None or _differs(at.memory, own):
            own = nothing(name)
            own[-1] = at.memory
        return own

    def step_rows(parts: Grads, memory: Params) -> tuple[Params, Params]:
        sampled = bool(remember)
        if not sampled:
            memory = {**memory, **{name: own_memory(name, memory) for name in found}}
        moves, after = remembered(memory), {**memory}
        for name, at in found.items():
            part, number = parts[name], rows - len(OWN_ROWS)
            moves[name][:number] += at.on_gradient * part
            if at.history is not None:
                moves[name][-1] += at.history
            if at.takes is None:
                after.pop(name, None)
                continue
            now = at.keeps * memory[name] if name in memory else nothing(name)
            now[:number] += at.takes * part
            if at.decay_takes is not None and at.decay is not None:
                now[number] += at.decay_takes
                moves[name][number] += at.decay
            after[name] = now
        if sampled and kept_then is not None:
            after = {name: after.get(name, nothing(name)) for name in remember}
            after[SURVIVES] = kept_then.expand(rows, -1).clone()
        return moves, after

    held = {name: at.memory for name, at in found.items() if at.memory is not None}
    if remember and kept is not None:
        held = {name: held.get(name, torch.zeros_like(like[name])) for name in remember}
        held[SURVIVES] = kept
    return SplitStep(
        clip=torch.ones(()),
        learning_rate=torch.ones(()),
        whole={},
        rows=step_rows,
        remembered=remembered,
        decay={
            name: at.decay
            for name, at in found.items()
            if at.decay is not None and at.decay_takes is None
        },
        history=held,
        keeps=keeps,
        note="",
    )


def _differs(memory: Tensor, own: Tensor) -> bool:
    """Return whether the rows of a memory do not add up to it."""
    length = norm_of({"": own}) + norm_of({"": memory})
    return norm_of({"": own.sum(0) - memory}) > _APART * length
