"""The step of ``torch.optim``: told from class parts before it is taken, and compared after."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from funcloss.audit.inner import _wide
from funcloss.audit.optimizers import bare, direction, has_direction, linear_step, why_not
from funcloss.audit.parts import dense
from funcloss.audit.result import StepAudit
from funcloss.audit.step import OWN_ROWS
from funcloss.errors import AuditError

REST = "other gradient"  # what is in .grad beside the parts
_STRETCH = 1 << 16  # numbers of a row that are multiplied at once


@dataclass(frozen=True, eq=False)
class Match:
    """How the gradient that an optimiser gets is made of parts: scaled, cut off, or more."""

    factor: float = 1.0  # on every part
    bound: float = math.inf  # of each entry
    distance: float = 0.0  # of the rest, relative to the gradient
    note: str = ""


@dataclass(frozen=True, eq=False)
class Told:
    """What is told of a step before it is taken."""

    gram: Tensor  # <g_a, g_b> of the parts of the gradient, on the CPU in float64
    step: StepAudit | None
    expected: list[tuple[nn.Parameter, Tensor]]  # where each parameter will be; empty: not known
    length: float  # of the step
    match: Match
    why_not: str  # why the step is not told, or in part; empty: it is

    def distance(self) -> tuple[float, float]:
        """Return how far from there the parameters are, relative to the step, and the rounding."""
        if not self.expected or not self.length:
            return math.nan, math.nan
        with torch.no_grad():
            apart = [_square(p - there) for p, there in self.expected]
            size = [_square(p) * torch.finfo(p.dtype).eps ** 2 for p, _ in self.expected]
            apart, size = torch.stack([torch.stack(apart).sum(), torch.stack(size).sum()]).tolist()
        return math.sqrt(apart) / self.length, math.sqrt(size) / self.length


def tell_step(
    optimizer: torch.optim.Optimizer,
    params: Sequence[nn.Parameter],
    grads: Sequence[Tensor | None],
    rows_at: Callable[[int], Tensor],
    names: tuple[str, ...],
    *,
    scale: float = 1.0,
    strange: str = "",
) -> Told:
    """Split the step that an optimiser is about to take by parts of its gradient.

    ``u = sum_c u_c + u_rest + u_decay + u_history``, one parameter and one stretch of it at a time.

    Args:
        optimizer: What takes the step.
        params: The parameters.
        grads: Of each, as the optimiser gets it; None: it does not move.
        rows_at: From the number of a parameter to the parts of its gradient, ``(rows, *shape)``.
        names: Of the rows.
        scale: What the parts are multiplied by and the gradients no longer are (a GradScaler's).
        strange: What the optimiser does beside, to be noted with the step.

    Returns:
        The inner products of the parts and of the rows of the step, and where it leads to.
    """
    optimizer = bare(optimizer)
    refused = why_not(optimizer)
    make = linear_step if not refused else direction if has_direction(optimizer) else None
    match = match_of(params, grads, rows_at, scale)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    rest = (REST,) if match.distance > _tolerance(params) else ()
    device = params[0].device
    wide = torch.float32 if device.type == "mps" else torch.float64
    gram = torch.zeros(len(names), len(names), dtype=wide, device=device)
    rows = (*names, *rest, *OWN_ROWS)
    step_gram = torch.zeros(len(rows), len(rows), dtype=wide, device=device)
    expected, squares, rates = [], [], set()
    for i, p in enumerate(params):
        if (given := grads[i]) is None:
            continue
        parts = rows_at(i) / scale
        grad = dense(given).to(parts.dtype)
        _add_products(gram, [parts])
        if (group := group_of.get(p)) is None or make is None:
            continue
        parts = _as_the_optimiser_gets_it(parts, match)
        try:
            found = make(group, type(optimizer), optimizer.state.get(p, {}), p.detach(), grad)
        except AuditError as error:  # its memory is not that of its kind
            refused, make, squares, expected = str(error), None, [], []
            continue
        rates.add(float(group["lr"]))
        beside = [grad - parts.sum(0)] if rest else []
        none = torch.zeros_like(grad)
        own = [none if row is None else row for row in (found.decay, found.history)]
        moves = [parts * found.on_gradient, *(r[None] * found.on_gradient for r in beside)]
        moves += [row.expand_as(grad)[None] for row in own]
        _add_products(step_gram, moves)
        move = grad * found.on_gradient + own[0] + own[1]
        squares.append(_square(move))
        if not refused:
            expected.append((p, (p.detach() + move).to(p.dtype)))
    length = math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0
    step = None
    if squares:
        rate = rates.pop() if len(rates) == 1 else math.nan
        note = "; ".join(filter(None, (refused, strange)))
        step = StepAudit(rows, step_gram.cpu().double(), rate, match.factor, note)
    elif not refused:
        refused = "the optimiser moves none of what is trained: see the gradient"
    return Told(gram.cpu().double(), step, expected, length, match, refused)


def match_of(
    params: Sequence[nn.Parameter],
    grads: Sequence[Tensor | None],
    rows_at: Callable[[int], Tensor],
    scale: float,
) -> Match:
    """Find how gradients are made of the parts: as they are, scaled, cut off, or with a rest."""
    there = [(i, g) for i, g in enumerate(grads) if g is not None]
    if not there:
        return Match()

    def pair(i: int, grad: Tensor) -> tuple[Tensor, Tensor]:
        whole = rows_at(i).sum(0) / scale
        return whole, dense(grad).to(whole.dtype)

    sums = torch.stack([_moments(*pair(i, g)) for i, g in there])
    sums = torch.cat([sums[:, :3].sum(0), sums[:, 3:].amax(0)])
    with_grad, square, of_grad, largest = sums.tolist()
    tolerance = _tolerance(params)
    if not math.isfinite(of_grad + square):
        return Match(distance=math.inf, note="the gradient in .grad is not finite")
    if not of_grad:
        note = "the gradient in .grad is 0, and the class parts are not" if square else ""
        return Match(distance=math.inf if square else 0.0, note=note)
    apart = math.sqrt(max(of_grad - 2.0 * with_grad + square, 0.0) / of_grad)
    if apart <= tolerance:
        return Match(distance=apart)
    factor = with_grad / square if square else 0.0
    scaled = math.sqrt(max(of_grad - with_grad * factor, 0.0) / of_grad)
    if factor > 0.0 and scaled <= tolerance:
        what = "clipped or scaled" if factor < 1.0 else "scaled"
        note = f"the gradient was {what}, by a factor of {factor:.3g}, before the step"
        return Match(factor=factor, distance=scaled, note=note)
    apart_cut = (_square(w.clamp(-largest, largest) - g) for w, g in (pair(*of) for of in there))
    cut = math.sqrt(float(torch.stack([*apart_cut]).sum()) / of_grad)
    if cut <= tolerance:
        note = (
            f"the gradient was clipped entry by entry, at {largest:.3g}: the parts of an entry "
            "that was clipped are scaled alike"
        )
        return Match(bound=largest, distance=cut, note=note)
    note = (
        f"the gradient in .grad differs from the sum of the class parts, by {apart:.2g} of its "
        f"length: the rest is the row {REST!r} (a penalty, another loss or batch, or a hook)"
    )
    return Match(distance=apart, note=note)


def _as_the_optimiser_gets_it(parts: Tensor, match: Match) -> Tensor:
    if math.isinf(match.bound):
        return parts * match.factor
    whole = parts.sum(0)
    return parts * torch.where(
        whole.abs() > match.bound, match.bound / whole.abs(), torch.ones_like(whole)
    )


def _tolerance(params: Sequence[nn.Parameter]) -> float:
    """Return the relative distance of two gradients that are one but for rounding."""
    return max(0.01, 8.0 * max(torch.finfo(p.dtype).eps for p in params))


def _moments(whole: Tensor, grad: Tensor) -> Tensor:
    w, g = _wide(whole.flatten()), _wide(grad.flatten())
    return torch.stack([w @ g, w @ w, g @ g, g.abs().max()])


def _add_products(gram: Tensor, rows: Sequence[Tensor]) -> None:
    """Add the inner products of rows, given side by side in several tensors."""
    flat = [r.reshape(len(r), -1) for r in rows]
    for pieces in zip(*(r.split(_STRETCH, 1) for r in flat), strict=True):
        piece = torch.cat([_wide(x) for x in pieces])
        gram += piece @ piece.T


def _square(x: Tensor) -> Tensor:
    flat = _wide(x.detach().flatten())
    return flat @ flat
