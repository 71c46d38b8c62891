"""Class parts of a gradient from a graph that is there: one masked backward pass per group.

``g_c``, the gradient of the terms of group ``c`` alone, is exact for every model and every loss:
``sum_c g_c`` is the gradient, whatever couples the examples on the way (batch normalisation,
dropout, attention), since all passes go through the graph of the one forward pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NO_GROUP, POOLED = -1, -2  # terms of no group; groups that share a row, as memory is short

Parts = dict[int, list[Tensor | None]]  # by group, one for each parameter; None is 0


_passing: list[bool] = []


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of each term of a batch, and which there are."""

    of_terms: Tensor  # int64; NO_GROUP: in the loss, and in no group
    counts: dict[int, int]  # terms of each group that is there, the most frequent last

    def mask(self, group: int, dims: int) -> Tensor:
        """Return where a group's terms are, with axes of length 1 added up to ``dims``."""
        here = self.of_terms == group
        return here.reshape(*here.shape, *(1,) * (dims - here.dim()))


def groups_in(of_terms: Tensor, most: int) -> Groups:
    """Return the groups of the terms; where there are more than ``most``, the rarest share one.

    Args:
        of_terms: A group per term, any shape; below 0: none.
        most: How many gradients can be held.

    Example:
        >>> groups_in(torch.tensor([4, 4, 4, 1, 1, 0, 2, -100]), 3).counts
        {-2: 3, 1: 2, 4: 3}
    """
    of_terms = of_terms.long().clamp(min=NO_GROUP)
    ids, counts = of_terms.unique(return_counts=True)
    ids, counts = torch.stack([ids, counts]).tolist()
    found = dict(sorted(zip(ids, counts, strict=True), key=lambda item: item[1]))
    if len(found) > most:
        rare = list(found)[: len(found) - most + 1]
        pooled = sum(found.pop(group) for group in rare)
        of_terms = torch.where(torch.isin(of_terms, of_terms.new_tensor(rare)), POOLED, of_terms)
        found = {POOLED: pooled, **found}
    return Groups(of_terms, found)


def class_parts(
    outputs: Tensor,
    cotangents: Tensor,
    groups: Groups,
    params: Sequence[nn.Parameter],
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
    """Add the parts of another micro-batch in place."""
    for group, found in more.items():
        held = into.get(group)
        if held is None:
            into[group] = found
            continue
        for i, part in enumerate(found):
            if part is not None:
                held[i] = part if held[i] is None else held[i] + part


def difference(whole: Tensor | None, parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return what is left of a gradient without some of its parts."""
    if whole is None:
        return None
    rest = whole.to_dense() if whole.layout != torch.strided else whole.clone()
    for part in parts:
        if part is not None:
            rest -= part.to_dense() if part.layout != torch.strided else part
    return rest


def rows_at(parts: Parts, rows: Sequence[int], i: int, like: Tensor) -> Tensor:
    """Return the parts of one parameter side by side, ``(rows, *shape)``, dense."""
    found = (parts[group][i] for group in rows)
    return torch.stack(
        [
            torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))
            if part is None
            else (part.to_dense() if part.layout != torch.strided else part).to(
                torch.promote_types(like.dtype, torch.float32)
            )
            for part in found
        ]
    )
