"""The step of ``torch.optim``: told from class parts before it is taken, and compared after."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from funcloss.audit.inner import wide, widest
from funcloss.audit.optimizers import (
    LinearStep,
    bare,
    direction,
    has_direction,
    linear_step,
    why_not,
)
from funcloss.audit.parts import dense
from funcloss.audit.result import StepAudit
from funcloss.audit.step import OWN_ROWS
from funcloss.errors import AuditError

REST = "other gradient"  # what is in .grad beside the parts
_STRETCH = 1 << 14  # numbers of a row that are multiplied at once: they stay in the cache


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
    parts_at: Callable[[int], Iterable[Tensor | None]],
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
        parts_at: From the number of a parameter to the parts of its gradient; None: 0.
        names: Of the parts.
        scale: What the parts are multiplied by and the gradients no longer are (a GradScaler's).
        strange: What the optimiser does beside, to be noted with the step.

    Returns:
        The inner products of the parts and of the rows of the step, and where it leads to.
    """
    optimizer = bare(optimizer)
    refused = why_not(optimizer)
    make = linear_step if not refused else direction if has_direction(optimizer) else None
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}

    def walk(bound: float = math.inf) -> tuple[_Walked, str]:
        walked, failed = _Walked(len(names), params[0]), ""
        for i, p in enumerate(params):
            if (given := grads[i]) is None:
                continue
            grad = dense(given).to(torch.promote_types(p.dtype, torch.float32))
            parts = [None if part is None else dense(part) for part in parts_at(i)]
            if not math.isinf(bound):
                parts = cut_off(parts, bound * scale)
            found = None
            if (group := group_of.get(p)) is not None and make is not None and not failed:
                try:
                    found = make(group, type(optimizer), optimizer.state.get(p, {}), p, grad)
                except AuditError as error:  # its memory is not that of its kind
                    failed = str(error)
                else:
                    walked.rates.add(float(group["lr"]))
            walked.add(p, parts, grad, found)
        return walked, failed

    walked, failed = walk()
    gram, step_gram = walked.products()
    one = torch.ones(len(names), dtype=torch.float64)
    gram = _changed(gram, [*(one / scale), 1.0])
    there = [i for i, grad in enumerate(grads) if grad is not None]
    match = _match_of(gram, _tolerance(params), lambda: _cut_at(there, grads, parts_at, scale))
    if not math.isinf(match.bound):
        walked, failed = walk(match.bound)
        _, step_gram = walked.products()
    refused = failed or refused
    rest = match.distance > _tolerance(params)
    length = math.sqrt(max(float(step_gram[len(names) :, len(names) :].sum()), 0.0))
    step = None
    if walked.moves and not failed:
        rows = (*names, *((REST,) if rest else ()), *OWN_ROWS)
        step_gram = _changed(step_gram, [*(one * match.factor / scale), 1.0, 1.0, 1.0])
        step_gram = _rest_of(step_gram, len(names), rest)
        rate = walked.rates.pop() if len(walked.rates) == 1 else math.nan
        note = "; ".join(filter(None, (refused, strange)))
        step = StepAudit(rows, step_gram, rate, match.factor, note)
    elif not refused:
        refused = "the optimiser moves none of what is trained: see the gradient"
    expected = [] if refused else [(p, p.detach() + move) for p, move in walked.moves]
    return Told(gram[:-1, :-1], step, expected, length, match, refused)


class _Walked:
    """Inner products of what is at each parameter, added up from one to the next.

    Of the gradient: the parts, and all of it. Of the step: what each of these does, and at last
    what weight decay does and what is remembered.
    """

    def __init__(self, parts: int, like: Tensor) -> None:
        device, self.dtype = like.device, widest(like)
        self.stretch = _STRETCH if device.type == "cpu" else 64 * _STRETCH
        self.of_grad = torch.zeros(parts + 1, parts + 1, dtype=self.dtype, device=device)
        self.of_step = torch.zeros(parts + 3, parts + 3, dtype=self.dtype, device=device)
        self.moves: list[tuple[nn.Parameter, Tensor]] = []
        self.rates: set[float] = set()

    def add(
        self,
        p: nn.Parameter,
        parts: Sequence[Tensor | None],
        grad: Tensor,
        found: LinearStep | None,
    ) -> None:
        rows = [*parts, grad] if found is None else [*parts, grad, found.decay, found.history]
        flat = [None if r is None else r.expand_as(grad).reshape(-1) for r in rows]
        most, linear = min(self.stretch, grad.numel()), len(parts) + 1
        held = torch.zeros(len(rows), most, dtype=self.dtype, device=grad.device)
        factor = None if found is None else found.on_gradient.detach()
        each = None if factor is None or factor.numel() == 1 else factor.expand_as(grad).reshape(-1)
        gram = held.new_zeros(len(rows), len(rows))
        for start in range(0, grad.numel(), most):
            piece = held[:, : min(most, grad.numel() - start)]
            for row, values in zip(piece, flat, strict=True):
                if values is not None:
                    row.copy_(values[start : start + most])
            if each is None:
                gram += piece @ piece.T
            else:
                self.of_grad += piece[:linear] @ piece[:linear].T
                piece[:linear] *= each[start : start + most]
                self.of_step += piece @ piece.T
        if each is None:
            self.of_grad += gram[:linear, :linear]
        if found is None or factor is None:
            return
        if each is None:
            alike = torch.cat([factor.to(gram).expand(linear), gram.new_ones(2)])
            self.of_step += alike[:, None] * gram * alike
        move = grad * factor
        for row in (found.decay, found.history):
            move = move if row is None else move.add_(row)
        self.moves.append((p, move))

    def products(self) -> tuple[Tensor, Tensor]:
        """Return both, in float64 on the CPU; the device waits once."""
        both = torch.cat([self.of_grad.flatten(), self.of_step.flatten()]).cpu().double()
        first, second = both.split([self.of_grad.numel(), self.of_step.numel()])
        return first.reshape(self.of_grad.shape), second.reshape(self.of_step.shape)


def _changed(gram: Tensor, factors: Sequence[float | Tensor]) -> Tensor:
    """Return the inner products of rows times factors."""
    by = torch.tensor([float(factor) for factor in factors], dtype=gram.dtype)
    return by[:, None] * gram * by


def _rest_of(gram: Tensor, parts: int, rest: bool) -> Tensor:
    """Return the inner products with the whole gradient's row as what the parts leave of it."""
    rows = torch.eye(len(gram), dtype=gram.dtype)
    rows[parts, :parts] = -1.0
    rows = rows if rest else torch.cat([rows[:parts], rows[parts + 1 :]])
    return rows @ gram @ rows.T


def _match_of(gram: Tensor, tolerance: float, cut_at: Callable[[], tuple[float, float]]) -> Match:
    """Find how a gradient is made of its parts: as they are, scaled, cut off, or with a rest.

    Args:
        gram: Inner products of the parts and, last, the gradient.
        tolerance: The relative distance of two gradients that are one but for rounding.
        cut_at: Returns the largest entry of the gradient, and the square of its distance from the
            sum of the parts with all entries cut off there.
    """
    with_grad, square = float(gram[:-1, -1].sum()), float(gram[:-1, :-1].sum())
    of_grad = float(gram[-1, -1])
    if not math.isfinite(of_grad + square):
        return Match(distance=math.inf, note="the gradient in .grad is not finite")
    if not of_grad:
        note = "the gradient in .grad is 0, and the class parts are not" if square else ""
        return Match(distance=math.inf if square else 0.0, note=note)
    apart = math.sqrt(max(of_grad - 2.0 * with_grad + square, 0.0) / of_grad)
    factor = with_grad / square if square else 0.0
    scaled = math.sqrt(max(of_grad - with_grad * factor, 0.0) / of_grad)
    if apart <= tolerance:  # rounding, or hardly scaled
        return Match(factor=factor if scaled < 0.01 * apart else 1.0, distance=apart)
    if factor > 0.0 and scaled <= tolerance:
        what = "clipped or scaled" if factor < 1.0 else "scaled"
        note = f"the gradient was {what}, by a factor of {factor:.3g}, before the step"
        return Match(factor=factor, distance=scaled, note=note)
    largest, cut = cut_at()
    cut = math.sqrt(cut / of_grad)
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


def _cut_at(
    there: Sequence[int],
    grads: Sequence[Tensor | None],
    parts_at: Callable[[int], Iterable[Tensor | None]],
    scale: float,
) -> tuple[float, float]:
    """Return the largest entry of gradients, and how far they are from parts cut off there."""
    given = [dense(grad) for i in there if (grad := grads[i]) is not None]
    largest = float(torch.stack([g.abs().max() for g in given if g.numel()]).max())
    apart = [
        _square(_sum_of(parts_at(i), g).div(scale).clamp(-largest, largest) - g)
        for i, g in zip(there, given, strict=True)
    ]
    return largest, float(torch.stack(apart).sum())


def _sum_of(parts: Iterable[Tensor | None], like: Tensor) -> Tensor:
    """Return the sum of parts of the gradient of one parameter."""
    whole = torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
    for part in parts:
        if part is not None:
            whole += dense(part)
    return whole


def cut_off(parts: Sequence[Tensor | None], bound: float) -> list[Tensor | None]:
    """Return parts scaled alike wherever their sum is above a bound."""
    there = [part for part in parts if part is not None]
    if not there or math.isinf(bound):
        return [*parts]
    whole = _sum_of(there, there[0]).abs()
    factor = torch.where(whole > bound, bound / whole, torch.ones_like(whole))
    return [None if part is None else part * factor for part in parts]


def _tolerance(params: Sequence[nn.Parameter]) -> float:
    """Return the relative distance of two gradients that are one but for rounding."""
    return max(0.01, 8.0 * max(torch.finfo(p.dtype).eps for p in params))


def _square(x: Tensor) -> Tensor:
    flat = wide(x.detach().flatten())
    return flat @ flat
