"""The step split by class, and what it does to every class's loss."""

from typing import NamedTuple

import torch
from torch import Tensor

from funcloss.audit.checks import check_update
from funcloss.audit.gradients import Measured, block_sums
from funcloss.audit.inner import cross, grams, held, plus, scaled_rows, total_of
from funcloss.audit.passes import Passes, Work, class_losses, own_gradients
from funcloss.audit.result import Check, Impact, StepAudit
from funcloss.audit.step import OWN_ROWS, split_step
from funcloss.optim import Optimizer, Schedule
from funcloss.typing import Params


class StepRequest(NamedTuple):
    """The step that is asked for."""

    optimizer: Optimizer
    learning_rate: Tensor
    schedule: Schedule | None
    clip_norm: float


def step_and_impact(
    work: Work,
    method: str,
    passes: Passes,
    held_out: Passes | None,
    measured: Measured,
    names: tuple[str, ...],
    request: StepRequest,
) -> tuple[StepAudit | None, dict[str, Impact], list[Check], list[str]]:
    """Split the step, predict what it does to every class, and take it."""
    subject, blocks = work.subject, measured.blocks
    rate = request.learning_rate.to(subject.device)
    if request.schedule is not None:
        rate = rate * request.schedule(subject.step)
    split, why_not = split_step(
        request.optimizer,
        subject.opt_state,
        subject.params,
        measured.gradient,
        rate,
        request.clip_norm,
    )
    if split is None:
        return None, {}, [], [why_not]
    weights = measured.weights
    n, layers = int(measured.counts.sum()), measured.layers

    def moves_of(block: range) -> Params:
        of_block = (measured.scale / n) * weights[block.start : block.stop]
        return split.of_parts(scaled_rows(of_block, measured.sums(block)))

    moves, own = held(moves_of, blocks), split.own()
    rows = (*names, *OWN_ROWS)
    classes = len(names)
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    gram[:classes, :classes] = cross(moves, moves, blocks, layers).sum(0)
    gram[classes:, classes:] = grams(own, own, layers).sum(0)
    total = total_of(own)
    for block in blocks:
        part = moves(block)
        total = plus(total, total_of(part))
        across = grams(part, own, layers).sum(0)
        gram[block.start : block.stop, classes:] = across
        gram[classes:, block.start : block.stop] = across.T
    after = plus(subject.params, split.whole)
    checks = [check_update(subject.params, after, total)]
    step = StepAudit(rows, gram, float(split.learning_rate), float(split.clip), split.note)
    parts = {"train": (passes, measured.sums)}
    if held_out is not None:
        parts["held_out"] = (held_out, lambda block: block_sums(work, method, held_out, block))
    if work.side.coupled:  # class parts of the whole loss are not gradients of the classes' losses
        parts = {
            part: (data, lambda block, data=data: own_gradients(work, method, data, block))
            for part, (data, _) in parts.items()
        }
    impact = {}
    for part, (data, sums_of) in parts.items():
        sums = held(sums_of, blocks)
        matrix = torch.full((classes, len(rows)), torch.nan, dtype=torch.float64)
        matrix[:, :classes] = cross(sums, moves, blocks, layers).sum(0)
        for block in blocks:
            matrix[block.start : block.stop, classes:] = grams(sums(block), own, layers).sum(0)
        before, count = class_losses(work, data, subject.params)
        matrix = torch.where(count[:, None] > 0, matrix / count[:, None], torch.nan)
        impact[part] = Impact(matrix, before, class_losses(work, data, after)[0])
    known = impact["train"].predicted.isfinite()
    predicted, changed = impact["train"].predicted[known], impact["train"].measured[known]
    says = "predicted change of each class's loss against the change that the step makes"
    error = float((predicted - changed).norm() / changed.norm().clamp(min=1e-300))
    checks.append(Check("impact", error, None, says))
    return step, impact, checks, []
