"""The class gradients: of each batch, and of the whole."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from funcloss.audit.data import MakeBatches, MaskedBatch, check_labels
from funcloss.audit.inner import (
    Layers,
    add_to,
    cross,
    layers_of,
    norm_of,
    plus,
    scaled_rows,
    side_by_side,
    total_of,
)
from funcloss.audit.jackknife import Jackknife
from funcloss.audit.loss import LossSpec, cotangents_of, margins
from funcloss.audit.methods import Measure
from funcloss.audit.result import ExampleRows, StandardErrors
from funcloss.audit.state import ModelState
from funcloss.errors import AuditError
from funcloss.reduction import divisor
from funcloss.typing import Grads, Params


@dataclass(frozen=True, eq=False)
class AuditContext:
    """The model, the loss and the method, as every pass over the data needs them."""

    state: ModelState
    loss: LossSpec  # of which the values are taken at weight 1
    coupled: bool  # whether the loss couples examples
    names: tuple[str, ...]  # of the classes
    weights: Tensor  # of the classes, (classes,)
    measure: Measure
    chunk: int  # examples at a time
    blocks: tuple[range, ...]  # classes whose gradients are held together
    norms: bool = False  # whether every example's norm is measured

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def layers(self) -> Layers:
        """Names of the parameters of each layer."""
        return layers_of(self.state.params)

    def pieces(self, batch: MaskedBatch) -> list[slice]:
        """Return slices of a batch of at most ``chunk`` examples."""
        n = len(batch)
        return [slice(start, min(start + self.chunk, n)) for start in range(0, n, self.chunk)]

    def predictions(self, batch: MaskedBatch, params: Params | None = None) -> Tensor:
        """Return the predictions of a batch, at other params if these are given."""
        params = self.state.params if params is None else params
        parts = map(batch.at, self.pieces(batch))
        return torch.cat([self.state.predict(params, p.inputs, p.keys) for p in parts])


@dataclass(frozen=True, eq=False)
class BatchGradients:
    """The class gradients of a batch, and a row per example."""

    number: int  # of the batch in the data
    sums: Grads  # sum_{y_i = c} grad l_i of the classes asked for, (classes, *shape)
    batch: MaskedBatch
    loss: Tensor
    norm: Tensor  # NaN where not measured
    margin: Tensor


def batch_gradients(
    context: AuditContext, make_batches: MakeBatches, wanted: range, *, norms: bool = False
) -> Iterator[BatchGradients]:
    """Yield the gradients of the classes ``wanted`` of each batch, which are good until the next.

    Raises:
        AuditError: a label is out of range, or a loss is not finite.
    """
    sums = side_by_side(context.state.params, len(wanted))
    for number, batch in enumerate(make_batches()):
        check_labels(batch.groups, context.classes)
        order = batch.groups.argsort(stable=True)
        groups = batch.groups[order]
        order = order[(groups >= wanted.start) & (groups < wanted.stop)]
        if not len(order):
            continue
        known = None
        if context.coupled:  # a loss may read the order of its batch
            known = cotangents_of(context.loss, context.predictions(batch), batch.targets)
            known = [found[order] for found in known]
        batch = batch.at(order)
        from_zero = replace(batch, groups=batch.groups - wanted.start)
        for part in sums.values():
            part.zero_()
        rows = []
        for piece in context.pieces(batch):
            part = from_zero.at(piece)
            predictions, pullback = context.measure(context.state, part)
            loss, cotangents = (
                [found[piece] for found in known]
                if known
                else cotangents_of(context.loss, predictions, part.targets)
            )
            square = pullback(cotangents, sums, norms)
            norm = (
                torch.full_like(loss, torch.nan) if square is None else square.clamp(min=0).sqrt()
            )
            rows.append((loss, norm, margins(predictions, part.targets)))
        loss, norm, margin = (torch.cat(column) for column in zip(*rows, strict=True))
        _check_finite(batch, loss)
        yield BatchGradients(number, sums, batch, loss, norm, margin)


def block_gradients(context: AuditContext, make_batches: MakeBatches, block: range) -> Grads:
    """Return ``sum_{y_i = c} grad l_i`` of a block of classes over all batches."""
    sums = side_by_side(context.state.params, len(block))
    for found in batch_gradients(context, make_batches, block):
        add_to(sums, found.sums)
    return sums


@dataclass(frozen=True, eq=False)
class ClassGradients:
    """The class gradients of the whole data, and what follows from them."""

    sums: Callable[[range], Grads]  # of a block, sum_{y_i = c} grad l_i
    grams: Tensor  # (layers, classes, classes), of G_c = sums / n
    examples: ExampleRows  # without their slopes
    counts: Tensor  # (classes,)
    gradient: Grads  # of the reduced loss
    scale: float  # gradient = scale / n * sum_c w_c sums_c
    probe: Grads  # sum_c w_c sums_c of the batch that is checked
    probe_length: float  # sqrt(sum_c |w_c sums_c|^2) of it
    standard_errors: StandardErrors | None

    @property
    def gradient_norm(self) -> float:
        """Norm of the gradient of the reduced loss."""
        return norm_of(self.gradient)


def class_gradients(
    context: AuditContext, make_batches: MakeBatches, probe: int, sample_bytes: float
) -> ClassGradients:
    """Pass over the data once per block of classes: gradients, norms, losses.

    The sum of batch number ``probe`` is kept apart, to be checked; the class gradients of single
    batches may take ``sample_bytes``, for standard errors.
    """
    params, blocks, weights = context.state.params, context.blocks, context.weights
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    total, first, first_square = zeros, zeros, 0.0
    rows: list[tuple[Tensor, ...]] = []
    sample = Jackknife(sample_bytes if len(blocks) == 1 else 0.0)
    kept: Grads = {}
    for block in blocks:
        kept, of_block = side_by_side(params, len(block)), weights[block.start : block.stop]
        for found in batch_gradients(context, make_batches, block, norms=context.norms):
            if found.number == probe:
                first = plus(first, total_of(found.sums, of_block))
                first_square += norm_of(scaled_rows(of_block, found.sums)) ** 2
            sample.add(found.sums, found.batch)
            add_to(kept, found.sums)
            rows.append(
                (found.batch.position, found.batch.groups, found.loss, found.norm, found.margin)
            )
        total = plus(total, total_of(kept, of_block))
    index, label, *columns = (torch.cat(column) for column in zip(*rows, strict=True))
    order = index.argsort()
    loss, norm, margin = (column[order].cpu().double() for column in columns)
    counts = label.bincount(minlength=context.classes).cpu()
    n = len(index)
    weight_sum = (weights.cpu().double() * counts).sum()
    scale = float(torch.tensor(n) / divisor(context.loss.reduction, n, weight_sum))

    def sums(block: range) -> Grads:
        return kept if len(blocks) == 1 else block_gradients(context, make_batches, block)

    grams = cross(sums, sums, blocks, context.layers) / n**2
    unknown = torch.full_like(loss, torch.nan)
    return ClassGradients(
        sums=sums,
        grams=grams,
        examples=ExampleRows(index[order].cpu(), label[order].cpu(), loss, norm, unknown, margin),
        counts=counts,
        gradient={name: (scale / n) * part for name, part in total.items()},
        scale=scale,
        probe=first,
        probe_length=first_square**0.5,
        standard_errors=sample.standard_errors(kept, n, grams.sum(0), weights.cpu()),
    )


def _check_finite(batch: MaskedBatch, loss: Tensor) -> None:
    bad = (~loss.isfinite()).nonzero()
    if len(bad):
        where = int(bad[0])
        raise AuditError(
            f"audit: the loss of example {int(batch.position[where])} is {float(loss[where])}: "
            "there is no gradient to split"
        )
