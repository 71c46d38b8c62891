"""From the passes over the data to the class gradients of the whole, and the slopes along it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcloss.audit.gram import scale_of
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
from funcloss.audit.loss import swept_options
from funcloss.audit.passes import Passes, Work, gradient_pass, slope_pass, slope_pass_backward
from funcloss.audit.result import Spread
from funcloss.audit.spread import BatchSample
from funcloss.errors import AuditError
from funcloss.typing import Grads


class Measured(NamedTuple):
    """What the first pass came to."""

    sums: Callable[[range], Grads]  # class gradients of a block, sum_{y_i = c} grad l_i
    blocks: list[range]
    layers: Layers
    grams: Tensor  # (layers, classes, classes), of G_c = sums / n
    position: Tensor  # by example, in the order of the data
    label: Tensor
    loss: Tensor
    norm: Tensor
    margin: Tensor
    counts: Tensor  # (classes,)
    gradient: Grads  # of the reduced loss
    weights: Tensor  # of the classes
    scale: float  # gradient = scale / n * sum_c w_c sums_c
    first: Grads  # sum_c w_c sums_c of the first batch that has any
    first_length: float  # sqrt(sum_c |w_c sums_c|^2) of it
    spread: Spread | None

    @property
    def norm_of_gradient(self) -> float:
        """Norm of the gradient of the reduced loss."""
        return norm_of(self.gradient)

    @property
    def length(self) -> float:
        """Square root of the sum of the squared norms of its class parts."""
        squares = self.grams.sum(0).diagonal() * self.weights.cpu().double().square()
        return self.scale * float(squares.sum()) ** 0.5


class Along(NamedTuple):
    """What the second pass came to."""

    slope: Tensor  # by example, <grad l_i, g>
    elasticities: dict[str, Tensor]


def whole_gradient(
    work: Work,
    method: str,
    passes: Passes,
    weights: Tensor,
    reduction: str,
    blocks: list[range],
    probed: int,
    room: float,
    *,
    norms: bool,
) -> Measured:
    """Pass over the data once a block of classes: gradients, norms, losses."""
    params = work.subject.params
    layers = layers_of(params)
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    rows: list[tuple[Tensor, ...]] = []
    sample = BatchSample(room)
    first_square = 0.0
    kept: Grads = {}
    for block in blocks:
        kept = side_by_side(params, len(block))
        of_block = weights[block.start : block.stop]
        found = gradient_pass(work, passes, method, norms=norms, wanted=block)
        for findings in found:
            if findings.number == probed:
                first = plus(first, total_of(findings.sums, of_block))
                first_square += norm_of(scaled_rows(of_block, findings.sums)) ** 2
            if len(blocks) == 1:
                sample.add(findings.sums, findings.size, len(findings.loss))
            add_to(kept, findings.sums)
            rows.append(
                (
                    findings.rows.position,
                    findings.rows.chunk.groups,
                    findings.loss,
                    findings.square.clamp(min=0.0).sqrt(),
                    findings.margin,
                )
            )
        total = plus(total, total_of(kept, of_block))
    index, label, loss, norm, margin = (torch.cat(part) for part in zip(*rows, strict=True))
    order = index.argsort()
    count = label.bincount(minlength=work.classes).cpu()
    n = int(count.sum())
    burden = (weights.cpu().double() * count).sum()
    scale = float(scale_of(reduction, torch.tensor(float(n), dtype=torch.float64), burden))

    def sums(block: range) -> Grads:
        if len(blocks) == 1:
            return kept
        return block_sums(work, method, passes, block)

    found_grams = cross(sums, sums, blocks, layers) / n**2
    spread = None
    if len(blocks) == 1:
        spread = sample.spread(kept, n, found_grams.sum(0), weights.cpu(), layers)
    return Measured(
        sums=sums,
        blocks=blocks,
        layers=layers,
        grams=found_grams,
        position=index[order].cpu(),
        label=label[order].cpu(),
        loss=loss[order].cpu().double(),
        norm=norm[order].cpu().double(),
        margin=margin[order].cpu().double(),
        counts=count,
        gradient={name: (scale / n) * part for name, part in total.items()},
        weights=weights,
        scale=scale,
        first=first,
        first_length=first_square**0.5,
        spread=spread,
    )


def block_sums(work: Work, method: str, passes: Passes, block: range) -> Grads:
    """Pass over the examples of a block of classes for their gradients alone."""
    kept = side_by_side(work.subject.params, len(block))
    for findings in gradient_pass(work, passes, method, norms=False, wanted=block):
        add_to(kept, findings.sums)
    return kept


def slopes_along(work: Work, passes: Passes, measured: Measured, *, forward: bool) -> Along:
    """Pass over the data along the gradient."""
    rows, by_name = [], {}
    swept = swept_options(work.side)
    found_of = (
        slope_pass(work, passes, measured.gradient, measured.weights, by_option=bool(swept))
        if forward
        else slope_pass_backward(work, passes, measured.gradient)
    )
    for found in found_of:
        rows.append((found.rows.position, found.rows.chunk.groups, found.loss, found.slope))
        for name, value in found.by_option.items():
            by_name[name] = by_name.get(name, 0) + value
    index, label, loss, slope = (torch.cat(part) for part in zip(*rows, strict=True))
    order = index.argsort()
    same = torch.equal(index[order].cpu(), measured.position)
    same = same and torch.equal(label[order].cpu(), measured.label)
    if not same or not torch.allclose(
        loss[order].cpu().double(), measured.loss, rtol=1e-3, atol=1e-5
    ):
        raise AuditError(
            "audit: the data gave other examples in the second pass than in the first: give data "
            "that comes in one order and without random changes"
        )
    factor = measured.scale / len(index) / max(measured.norm_of_gradient**2, 1e-300)
    elasticities = {
        name: (value.double() * by_name[name].double() * factor).cpu()
        for name, value in swept.items()
        if name in by_name
    }
    return Along(slope[order].cpu().double(), elasticities)
