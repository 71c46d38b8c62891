"""Gradients of single examples that are never formed: their class sums and their norms.

The gradient of one example in a layer that multiplies by a matrix is ``sum_t outer(backprops_t,
activations_t)`` over the positions ``t`` that the matrix is applied at. Its sum over the examples
of a class is one product (book-keeping). Where the positions are few, as in linear layers and deep
convolutions, a norm needs no gradient at all (the ghost norm): its square is ``sum_ts <backprops_t,
backprops_s> <activations_t, activations_s>``.

References:
    Goodfellow, "Efficient per-example gradient computations", 2015. Bu, Mao and Xu, "Scalable and
    efficient training of large convolutional neural networks with differential privacy", 2022
    (choosing between the two ways to a norm layer by layer).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Segments = list[tuple[int, slice]]  # which examples each group has
Add = Callable[[int, Tensor], object]  # takes a group and a part of its gradient

_CACHED = 1 << 19  # numbers that a piece of a batch takes: they should stay in cache


@dataclass(frozen=True)
class LayerShape:
    """Size of the matrix products of a layer, for one example."""

    positions: int
    parts: int
    ins: int
    outs: int

    @property
    def macs(self) -> int:
        """Multiplications going forward."""
        return self.positions * self.parts * self.ins * self.outs

    def explicit(self) -> bool:
        """Whether a norm is cheaper from the gradient itself than from pairs of positions."""
        if self.positions == 1:
            return False
        # A gradient that is at hand costs its reading and writing beside the multiplications.
        return self.positions**2 * (self.ins + self.outs) > 16 * self.ins * self.outs

    def macs_of_products(self, *, norms: bool) -> int:
        """Multiplications for class gradients, and for norms; small products cost twice."""
        if not norms:
            return self.macs
        if self.explicit():
            return 2 * self.macs
        return self.macs + self.positions**2 * self.parts * (self.ins + self.outs)


@dataclass(frozen=True, eq=False)
class Outer:
    """``sum_t outer(backprops_t, activations_t)`` for each example.

    Args:
        activations: From a range of examples to theirs, ``(m, parts, positions, ins)``.
        backprops: Shape ``(n, parts, positions, outs)``.
        ins: Inputs of a matrix.
        arrange: From a gradient ``(parts, outs, ins)`` to one of the parameter's shape.
        sums: Adds the class gradients where these alone are asked for; None: as with norms.
    """

    activations: Callable[[slice], Tensor]
    backprops: Tensor
    ins: int
    arrange: Callable[[Tensor], Tensor]
    sums: Callable[[Segments, Add], None] | None = None

    @property
    def shape(self) -> LayerShape:
        """Size of the products."""
        _, parts, positions, outs = self.backprops.shape
        return LayerShape(positions, parts, self.ins, outs)

    def add_to(self, segments: Segments, add: Add, squares: Tensor | None) -> None:
        """Add each group's gradient, and the squared norms if there is where to."""
        if squares is None and self.sums is not None:
            self.sums(segments, add)
            return
        n, parts, positions, outs = self.backprops.shape
        ins, explicit = self.ins, squares is not None and self.shape.explicit()
        room = parts * (max(positions * ins, outs * ins) if explicit else positions * ins)
        step = max(1, _CACHED // room) if positions > 1 else n
        for start in range(0, n, step):
            piece = slice(start, min(start + step, n))
            a, b = self.activations(piece), self.backprops[piece]
            inside = _inside(segments, piece)
            if explicit and squares is not None:
                grads = b.mT @ a
                squares[piece] += square_of(grads)
                for label, part in inside:
                    add(label, self.arrange(grads[part].sum(0)))
                continue
            if squares is not None and positions == 1:
                squares[piece] += (_square_rows(a) * _square_rows(b)).sum((1, 2))
            elif squares is not None:
                squares[piece] += ((a @ a.mT) * (b @ b.mT)).sum((1, 2, 3))
            for label, part in inside:
                of_part = b[part].transpose(0, 1).reshape(parts, -1, outs)
                grads = of_part.mT @ a[part].transpose(0, 1).reshape(parts, -1, ins)
                add(label, self.arrange(grads))


@dataclass(frozen=True, eq=False)
class Lookup:
    """Rows of a table, each example its own.

    Args:
        words: Which rows, ``(n, m)``.
        backprops: Gradient of each row that was looked up, ``(n, m, width)``.
    """

    words: Tensor
    backprops: Tensor

    def add_to(self, segments: Segments, into: Tensor, squares: Tensor | None) -> None:
        """Add each group's gradient, and the squared norms if there is where to."""
        for label, part in segments:
            rows = self.backprops[part].flatten(0, 1)
            into[label].index_add_(0, self.words[part].flatten(), rows)
        if squares is not None:
            same = self.words[:, :, None] == self.words[:, None, :]
            squares += torch.where(same, self.backprops @ self.backprops.mT, 0.0).sum((1, 2))


@dataclass(frozen=True, eq=False)
class Spread:
    """A parameter that acts on each entry of the output: ``values``, its gradient at each.

    The parameter's own gradient is their sum over the entries that it was broadcast to.
    """

    values: Tensor


# What a layer function gives for a parameter; a tensor is a gradient per example, (n, *shape)
Gradient = Tensor | Outer | Lookup | Spread


def add_vectors(grads: Tensor, segments: Segments, into: Tensor, squares: Tensor | None) -> None:
    """Add gradients by example, ``(n, *shape)``, to those of their groups."""
    if len(segments) * 8 > len(into):  # one product for all groups
        members = grads.new_zeros(len(into), len(grads))
        for label, part in segments:
            members[label, part] = 1.0
        into += (members @ as_rows(grads)).reshape(into.shape)
    else:
        for label, part in segments:
            into[label] += grads[part].sum(0).reshape(into.shape[1:])
    if squares is not None:
        squares += square_of(grads)


def add_by_group(grads: Tensor, groups: Tensor, into: Tensor) -> None:
    """Add gradients by example, ``(n, *shape)``, to those of their groups, which ascend."""
    add_vectors(grads, segments_of(groups), into, None)


def as_rows(grads: Tensor) -> Tensor:
    """Return gradients by example, ``(n, *shape)``, as vectors; a scalar parameter's have one."""
    return grads[..., None].flatten(1)


def square_of(grads: Tensor) -> Tensor:
    """Return the squared norm of each example's gradient, ``(n,)``."""
    flat = as_rows(grads)
    return torch.linalg.vecdot(flat, flat)


def _square_rows(rows: Tensor) -> Tensor:
    return torch.linalg.vecdot(rows, rows)


def segments_of(groups: Tensor) -> Segments:
    """Return where each group's examples are; ``groups`` ascends."""
    segments: Segments = []
    start = 0
    labels = groups.tolist()
    for end in range(1, len(labels) + 1):
        if end == len(labels) or labels[end] != labels[start]:
            segments.append((labels[start], slice(start, end)))
            start = end
    return segments


def _inside(segments: Segments, piece: slice) -> Segments:
    """Return the segments within a piece, counted from its beginning."""
    cut = [
        (
            label,
            max(part.start, piece.start) - piece.start,
            min(part.stop, piece.stop) - piece.start,
        )
        for label, part in segments
    ]
    return [(label, slice(start, stop)) for label, start, stop in cut if start < stop]
