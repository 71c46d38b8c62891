"""The second pass: each example's slope along the gradient, and the elasticities of options."""

from dataclasses import dataclass

import torch
from torch import Tensor

from funcloss.audit.data import MakeBatches, MaskedBatch
from funcloss.audit.gradients import AuditContext, ClassGradients
from funcloss.audit.loss import cotangents_of, option_slopes, tensor_options
from funcloss.audit.methods import plain_vjp
from funcloss.errors import AuditError
from funcloss.transforms import directional
from funcloss.typing import Params


@dataclass(frozen=True, eq=False)
class DirectionalDerivatives:
    """Derivatives along the gradient ``g``."""

    slope: Tensor  # of each example, <grad l_i, g>
    elasticities: dict[str, Tensor]  # d log |g| / d log k, by option of the loss


def directional_derivatives(
    context: AuditContext, make_batches: MakeBatches, gradients: ClassGradients, *, forward: bool
) -> DirectionalDerivatives:
    """Pass over the data along its gradient.

    Without ``forward`` mode it takes a gradient per example, and no option gets an elasticity.
    """
    rows, by_option = [], {}
    along = _forward_slopes if forward else _backward_slopes
    for batch in make_batches():
        if not len(batch):
            continue
        loss, slope, options = along(context, batch, gradients.gradient)
        rows.append((batch.position, batch.groups, loss, slope))
        by_option = {name: by_option.get(name, 0) + value for name, value in options.items()}
    index, label, loss, slope = (torch.cat(column) for column in zip(*rows, strict=True))
    order, expected = index.argsort(), gradients.examples
    same = torch.equal(index[order].cpu(), expected.index)
    same = same and torch.equal(label[order].cpu(), expected.label)
    loss = loss[order].cpu().double()
    if not same or not torch.allclose(loss, expected.loss, rtol=1e-3, atol=1e-5):
        raise AuditError(
            "audit: the data gave other examples in the second pass than in the first: give data "
            "that comes in one order and without random changes"
        )
    factor = gradients.scale / len(index) / max(gradients.gradient_norm**2, 1e-300)
    options = tensor_options(context.loss)
    return DirectionalDerivatives(
        slope[order].cpu().double(),
        {
            name: (options[name].double() * value.double() * factor).cpu()
            for name, value in by_option.items()
        },
    )


def _forward_slopes(context: AuditContext, batch: MaskedBatch, direction: Params):
    """Return losses, slopes and those of the options, by forward mode."""
    state, moved = context.state, []
    for piece in context.pieces(batch):
        part = batch.at(piece)
        predictions, tangents = directional(
            lambda p, part=part: state.predict(p, part.inputs, part.keys), state.params, direction
        )
        moved.append((part, predictions, tangents))
    if context.coupled:  # the loss of a piece depends on the others
        _, predictions, tangents = zip(*moved, strict=True)
        moved = [(batch, torch.cat(predictions), torch.cat(tangents))]
    losses, slopes, by_option = [], [], {}
    for part, predictions, tangents in moved:
        loss, cotangents = cotangents_of(context.loss, predictions, part.targets)
        losses.append(loss)
        slopes.append((cotangents * tangents).reshape(len(loss), -1).sum(1))
        if tensor_options(context.loss):
            weights = context.weights[part.groups]
            found = option_slopes(context.loss, predictions, tangents, part.targets, weights)
            by_option = {name: by_option.get(name, 0) + value for name, value in found.items()}
    return torch.cat(losses), torch.cat(slopes), by_option


def _backward_slopes(context: AuditContext, batch: MaskedBatch, direction: Params):
    """Return losses and slopes from a gradient per example, where there is no forward mode."""
    loss, cotangents = cotangents_of(context.loss, context.predictions(batch), batch.targets)
    slopes = []
    for i in range(len(batch)):
        one = slice(i, i + 1)
        grads = plain_vjp(context.state, batch.at(one), cotangents[one])
        slopes.append(torch.stack([(g * direction[n]).sum() for n, g in grads.items()]).sum())
    return loss, torch.stack(slopes), {}
