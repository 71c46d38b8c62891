"""Class parts of a gradient from a graph that is there: one masked backward pass per group.

``g_c``, the gradient of the terms of group ``c`` alone, is exact for every model and every loss:
``sum_c g_c`` is the gradient, whatever couples the examples on the way (batch normalisation,
dropout, attention), since all passes go through the graph of the one forward pass.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from funcloss.audit.inner import widest

NO_GROUP, POOLED = -1, -2  # terms of no group; groups that share a row, as memory is short

Parts = dict[int, list[Tensor | None]]  # by group, one for each parameter; None is 0


_passing: list[bool] = []


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of each term of a batch, and which there are."""

    of_terms: Tensor  # int64; NO_GROUP: in the loss, and in no group
    counts: dict[int, int]  # terms of each group that is there, the most frequent last
    sums: dict[int, float]  # of the values of its terms; NaN where none are given
    pooled: tuple[int, ...] = ()  # groups that share a row

    def mask(self, group: int, dims: int) -> Tensor:
        """Return where a group's terms are, with axes of length 1 added up to ``dims``."""
        here = self.of_terms == group
        return here.reshape(*here.shape, *(1,) * (dims - here.dim()))


def groups_in(
    of_terms: Tensor, most: int, values: Tensor | None = None, *, held: Collection[int] = ()
) -> Groups:
    """Return the groups of the terms; where there are more than ``most``, the rarest share one.

    Args:
        of_terms: A group per term, any shape; below 0: none.
        most: How many gradients can be held.
        values: Of the terms, to be summed by group.
        held: Groups whose gradients are held already.

    Example:
        >>> groups_in(torch.tensor([4, 4, 4, 1, 1, 0, 2, -100]), 3).counts
        {-2: 3, 1: 2, 4: 3}
    """
    of_terms = of_terms.long().clamp(min=NO_GROUP)
    ids, place, counts = of_terms.unique(return_inverse=True, return_counts=True)
    sums = torch.full_like(ids, torch.nan, dtype=widest(ids))
    if values is not None:
        within = values.dim() - of_terms.dim()
        each = values.detach().flatten(-within).sum(-1) if within else values.detach()
        sums = sums.zero_().index_add_(0, place.flatten(), each.flatten().to(sums))
    rows = torch.stack([ids.to(sums), counts.to(sums), sums]).tolist()  # the device waits once
    found = sorted(zip(*rows, strict=True), key=lambda row: row[1])
    fresh = [row for row in found if row[0] not in held]
    over = len(fresh) + len(held) - most
    rare = fresh[: over + (POOLED not in held)] if over > 0 else []
    if rare:
        which = of_terms.new_tensor([int(group) for group, _, _ in rare])
        of_terms = torch.where(torch.isin(of_terms, which), POOLED, of_terms)
        pooled = (POOLED, sum(n for _, n, _ in rare), sum(total for _, _, total in rare))
        found = [pooled, *(row for row in found if row not in rare)]
    return Groups(
        of_terms,
        {int(group): int(count) for group, count, _ in found},
        {int(group): total for group, _, total in found},
        tuple(int(group) for group, _, _ in rare),
    )


def class_parts(
    outputs: Tensor,
    cotangents: Tensor,
    groups: Groups,
    params: Sequence[Tensor],
    wanted: Sequence[int],
) -> Parts:
    """Return ``J^T (mask_c * cotangents)`` of the groups wanted; the graph stays as it is.

    Args:
        outputs: What the gradient comes from, terms of a loss or predictions.
        cotangents: The gradient of the loss in them, of their shape.
        groups: Of shape ``(*terms)``, the first axes of the outputs.
        params: What the gradient is taken in.
        wanted: Groups.
    """
    nothing = torch.zeros((), dtype=cotangents.dtype, device=cotangents.device)
    _passing.append(True)  # seen from all threads: hooks may run in another
    try:
        return {
            group: list(
                torch.autograd.grad(
                    outputs,
                    params,
                    torch.where(groups.mask(group, outputs.dim()), cotangents, nothing),
                    retain_graph=True,
                    allow_unused=True,
                )
            )
            for group in wanted
        }
    finally:
        _passing.pop()


def passing() -> bool:
    """Return whether a pass of :func:`class_parts` is running, whose gradients are of one group."""
    return bool(_passing)


def add_parts(into: Parts, more: Parts) -> None:
    """Add the parts of another micro-batch."""
    for group, found in more.items():
        held = into.get(group, found)
        if held is found:
            into[group] = found
            continue
        into[group] = [
            a if b is None else b if a is None else a + b for a, b in zip(held, found, strict=True)
        ]


def difference(whole: Tensor | None, parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return what is left of a gradient without some of its parts."""
    if whole is None:
        return None
    rest = dense(whole).clone()
    for part in parts:
        if part is not None:
            rest -= dense(part)
    return rest


def dense(grad: Tensor) -> Tensor:
    """Return a gradient, sparse or not, as one that is not."""
    grad = grad.detach()
    return grad if grad.layout == torch.strided else grad.to_dense()
