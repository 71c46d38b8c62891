"""The passes over the data: class gradients and norms, slopes along a direction, losses."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from funcloss.audit.data import Rows
from funcloss.audit.inner import side_by_side
from funcloss.audit.loss import LossSide, cotangents_of, margins, option_slopes, values_of
from funcloss.audit.methods import MEASURES, Chunk, plain_vjp
from funcloss.audit.subject import Subject
from funcloss.errors import AuditError
from funcloss.keys import example_keys
from funcloss.transforms import directional
from funcloss.typing import Grads, Params

Passes = Callable[[], Iterator[Rows]]


class Work(NamedTuple):
    """What every pass needs."""

    subject: Subject
    side: LossSide
    classes: int
    chunk: int  # examples at a time


class Kept(NamedTuple):
    """The examples of a batch that count."""

    chunk: Chunk
    targets: Tensor
    position: Tensor  # of each in the data

    def at(self, index: Tensor) -> "Kept":
        """Return some of them."""
        inputs = tree_map(lambda x: _select(x, index), self.chunk.inputs)
        chunk = Chunk(inputs, self.chunk.keys[index], self.chunk.groups[index])
        return Kept(chunk, self.targets[index], self.position[index])

    def some(self, most: int) -> "Kept":
        """Return at most so many of them, evenly spread."""
        n = len(self.position)
        even = torch.linspace(0, n - 1, min(n, most), device=self.position.device)
        return self.at(even.long())


class Findings(NamedTuple):
    """What a pass found of a batch: its class gradients, and a row an example."""

    number: int  # of the batch in the data
    sums: Grads  # of the classes asked for, (classes, *shape), at cost 1
    rows: Kept
    loss: Tensor
    square: Tensor  # of the norm; NaN where not measured
    margin: Tensor
    size: int  # examples of the batch, those that do not count among them


def kept_rows(subject: Subject, number: int, rows: Rows) -> Kept:
    """Return the rows of a batch that count, in the order of the data.

    Args:
        subject: For the keys: batch ``number`` draws as step ``subject.step + number`` does.
        number: Number of the batch in the data.
        rows: The batch.
    """
    keys = example_keys(subject.key, subject.step + number, len(rows.groups))
    chunk = Chunk(rows.inputs, keys, rows.groups)
    positions = rows.first + torch.arange(len(keys), device=keys.device)
    every = Kept(chunk, rows.targets, positions)
    counts = rows.groups >= 0
    return every if bool(counts.all()) else every.at(counts.nonzero().squeeze(1))


def _order(groups: Tensor, wanted: range) -> Tensor:
    """Return the index that takes examples of the wanted classes, those of a class together."""
    order = groups.argsort(stable=True)
    inside = (groups >= wanted.start) & (groups < wanted.stop)
    return order[inside[order]]


def gradient_pass(work: Work, passes: Passes, method: str, *, norms: bool, wanted: range):
    """Yield the class gradients of each batch, and its examples' losses and norms.

    Args:
        work: The model, the loss and the size of a chunk.
        passes: The data.
        method: A key of ``MEASURES``.
        norms: Whether to measure the examples' norms.
        wanted: The classes to measure.

    Yields:
        The findings of each batch. Its class gradients are good until the next.

    Raises:
        AuditError: a label is out of range, or a loss is not finite.
    """
    subject, side = work.subject, work.side
    sums = side_by_side(subject.params, len(wanted))
    for number, rows in enumerate(passes()):
        check_labels(rows.groups, work.classes)
        every = kept_rows(subject, number, rows)
        order = _order(every.chunk.groups, wanted)
        if not len(order):
            continue
        known = None
        if side.coupled:  # a loss may read the order of its batch
            predictions = _predicted(work, every.chunk)
            values, back = cotangents_of(side, predictions, every.targets)
            known = (values[order], back[order])
        every = every.at(order)
        chunk = every.chunk._replace(groups=every.chunk.groups - wanted.start)
        for part in sums.values():
            part.zero_()
        losses, squares, margin = [], [], []
        for piece in _pieces(len(chunk.keys), work.chunk):
            of_piece = None if known is None else (known[0][piece], known[1][piece])
            seen = _ChunkLoss(side, every.targets[piece], of_piece)
            square = MEASURES[method](
                subject.predict, subject.params, chunk[piece], seen.cotangents, sums, norms
            )
            losses.append(seen.losses)
            margin.append(seen.margin)
            squares.append(torch.full_like(seen.losses, torch.nan) if square is None else square)
        found = Findings(
            number=number,
            sums=sums,
            rows=every,
            loss=torch.cat(losses),
            square=torch.cat(squares),
            margin=torch.cat(margin),
            size=len(rows.groups),
        )
        _check_finite(found)
        yield found


class _ChunkLoss:
    """The loss of a chunk: gives its cotangents once it sees predictions, and keeps the rest."""

    def __init__(
        self,
        side: LossSide,
        targets: Tensor,
        known: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.side, self.targets, self.known = side, targets, known
        self.losses = self.margin = targets

    def cotangents(self, predictions: Tensor) -> Tensor:
        self.losses, back = self.known or cotangents_of(self.side, predictions, self.targets)
        self.margin = margins(predictions, self.targets)
        return back


class Slopes(NamedTuple):
    """What a pass along a direction found of a batch."""

    rows: Kept
    loss: Tensor
    slope: Tensor  # <J_i^T dL/dz_i, direction>
    by_option: dict[str, Tensor]


def slope_pass(
    work: Work, passes: Passes, direction: Params, weights: Tensor, *, by_option: bool
) -> Iterator[Slopes]:
    """Yield each example's slope along a direction, by forward mode.

    Args:
        work: The model, the loss and the size of a chunk.
        passes: The data.
        direction: Keys and shapes of the params.
        weights: Of the classes, for the options' part.
        by_option: Whether to differentiate the slopes by the loss's tensor options too.

    Yields:
        The slopes of each batch.
    """
    subject, side = work.subject, work.side
    for number, rows in enumerate(passes()):
        every = kept_rows(subject, number, rows)
        if not len(every.position):
            continue
        pieces = _pieces(len(every.position), work.chunk)
        moved: list[tuple[slice, Tensor, Tensor]] = []
        for piece in pieces:
            part = every.chunk[piece]
            predictions, moves = directional(
                lambda p, part=part: subject.predict(p, part.inputs, part.keys),
                subject.params,
                direction,
            )
            moved.append((piece, predictions, moves))
        if side.coupled:  # the loss of a piece hangs on the others
            _, predictions, moves = zip(*moved, strict=True)
            moved = [(slice(None), torch.cat(predictions), torch.cat(moves))]
        losses, slopes = [], []
        by_name: dict[str, Tensor] = {}
        for piece, predictions, moves in moved:
            targets = every.targets[piece]
            values, back = cotangents_of(side, predictions, targets)
            losses.append(values)
            slopes.append((back * moves).reshape(len(back), -1).sum(1))
            if by_option:
                of_rows = weights[every.chunk.groups[piece]]
                for name, slope in option_slopes(
                    side, predictions, moves, targets, of_rows
                ).items():
                    by_name[name] = by_name[name] + slope if name in by_name else slope
        yield Slopes(every, torch.cat(losses), torch.cat(slopes), by_name)


def slope_pass_backward(work: Work, passes: Passes, direction: Params) -> Iterator[Slopes]:
    """Yield each example's slope along a direction, from a gradient an example.

    The way for models that have an operation without a forward-mode derivative.

    Args:
        work: The model, the loss and the size of a chunk.
        passes: The data.
        direction: Keys and shapes of the params.

    Yields:
        The slopes of each batch.
    """
    subject = work.subject
    for number, rows in enumerate(passes()):
        every = kept_rows(subject, number, rows)
        if not len(every.position):
            continue
        values, back = cotangents_of(work.side, _predicted(work, every.chunk), every.targets)
        slopes = []
        for i in range(len(every.position)):
            one = slice(i, i + 1)
            grads = plain_vjp(subject.predict, subject.params, every.chunk[one], back[one])
            slopes.append(torch.stack([(g * direction[n]).sum() for n, g in grads.items()]).sum())
        yield Slopes(every, values, torch.stack(slopes), {})


def own_gradients(work: Work, method: str, passes: Passes, wanted: range) -> Grads:
    """Return the gradient of each class's sum of losses, where a loss couples the examples.

    Args:
        work: The model and the loss.
        method: A key of ``MEASURES``.
        passes: The data.
        wanted: The classes.

    Returns:
        Side by side, ``(classes, *shape)``.
    """
    subject, side = work.subject, work.side
    sums = side_by_side(subject.params, len(wanted))
    for number, rows in enumerate(passes()):
        every = kept_rows(subject, number, rows)
        if not len(every.position):
            continue
        predictions = _predicted(work, every.chunk)
        for row, label in enumerate(wanted):
            of_class = (every.chunk.groups == label).to(predictions)
            if not bool(of_class.any()):
                continue
            _, back = cotangents_of(side, predictions, every.targets, of_class)
            one = {name: part[row : row + 1] for name, part in sums.items()}
            whole = every.chunk._replace(groups=torch.zeros_like(every.chunk.groups))
            for piece in _pieces(len(every.position), work.chunk):
                MEASURES[method](
                    subject.predict,
                    subject.params,
                    whole[piece],
                    lambda z, back=back[piece]: back,
                    one,
                    False,
                )
    return sums


def class_losses(work: Work, passes: Passes, params: Params) -> tuple[Tensor, Tensor]:
    """Return the mean loss of each class at ``params``, at cost 1, and its count; NaN without."""
    subject = work.subject
    total = torch.zeros(work.classes, dtype=torch.float64)  # on the CPU: MPS has no float64
    count = torch.zeros_like(total)
    for number, rows in enumerate(passes()):
        every = kept_rows(subject, number, rows)
        if not len(every.position):
            continue
        predictions = _predicted(work, every.chunk, params)
        values = values_of(work.side, predictions, every.targets).cpu().double()
        groups = every.chunk.groups.cpu()
        total.index_add_(0, groups, values)
        count.index_add_(0, groups, torch.ones_like(values))
    return total / count, count


def _predicted(work: Work, chunk: Chunk, params: Params | None = None) -> Tensor:
    params = work.subject.params if params is None else params
    parts = [chunk[piece] for piece in _pieces(len(chunk.keys), work.chunk)]
    return torch.cat([work.subject.predict(params, p.inputs, p.keys) for p in parts])


def _pieces(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _select(inputs: Tensor, index: Tensor) -> Tensor:
    """Return the inputs at an index, images in the layout that convolutions like."""
    if inputs.dim() != 4:
        return inputs[index]
    return inputs.movedim(1, -1)[index].movedim(-1, 1)


def check_labels(groups: Tensor, classes: int) -> None:
    """Raise ``AuditError`` if an example counts for a class that there is not."""
    if len(groups) and int(groups.max()) >= classes:
        raise AuditError(
            f"audit: labels must be in 0..{classes - 1}, got {int(groups.max())}: give classes= "
            "for more"
        )


def _check_finite(found: Findings) -> None:
    bad = (~found.loss.isfinite()).nonzero()
    if len(bad):
        where = int(bad[0])
        raise AuditError(
            f"audit: the loss of example {int(found.rows.position[where])} is "
            f"{float(found.loss[where])}: there is no gradient to part"
        )
