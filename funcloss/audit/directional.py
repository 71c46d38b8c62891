"""The second pass: each example's slope along the gradient, and the elasticities of options."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from funcloss.audit.checks import tolerance_of
from funcloss.audit.data import MakeBatches, MaskedBatch
from funcloss.audit.gradients import AuditContext, ClassGradients
from funcloss.audit.loss import cotangents_of, option_slopes, tensor_options
from funcloss.audit.methods import plain_vjp
from funcloss.audit.state import ModelState
from funcloss.errors import AuditError
from funcloss.transforms import quiet_jvp, twice_backward
from funcloss.typing import Params

# (function of the params, params, direction) -> (values, their derivatives along the direction)
Directional = Callable[[Callable[[Params], Tensor], Params, Params], tuple[Tensor, Tensor]]


class _LinearInWeights(TorchFunctionMode):
    """Push a tangent through a convolution of constants as the convolution by the tangent.

    Torch convolves the input's tangent too, zeros here, on a path that takes thrice as long.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Take convolutions of constants, pass the rest."""
        kwargs = kwargs or {}
        if func not in _CONVOLUTIONS or len(args) < 2:
            return func(*args, **kwargs)
        input, weight, *rest = args
        given = dict(kwargs)
        bias = rest.pop(0) if rest else given.pop("bias", None)
        weight, moved = forward_ad.unpack_dual(weight)
        bias, shifted = (None, None) if bias is None else forward_ad.unpack_dual(bias)
        if moved is None or forward_ad.unpack_dual(input).tangent is not None:
            return func(*args, **kwargs)
        value = func(input, weight, bias, *rest, **given)
        return forward_ad.make_dual(value, func(input, moved, shifted, *rest, **given))


def forward_mode(
    function: Callable[[Params], Tensor], params: Params, direction: Params
) -> tuple[Tensor, Tensor]:
    """As :func:`funcloss.transforms.directional`, without the wrappers of ``torch.func``."""
    with quiet_jvp(), torch.no_grad(), forward_ad.dual_level(), _LinearInWeights():
        dual = {name: forward_ad.make_dual(p, direction[name]) for name, p in params.items()}
        values, slopes = forward_ad.unpack_dual(function(dual))
    return values, torch.zeros_like(values) if slopes is None else slopes


_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}


def directional_of(state: ModelState, batch: MaskedBatch, direction: Params) -> Directional | None:
    """Return a way to derivatives along a direction that the model has; None if it has none.

    Forward mode; or, where an operation has none, the derivative of a backward pass, which is
    linear in what it starts from. An operation may cut that one off without a word, so it is
    compared with a backward pass.
    """

    def predict(params: Params) -> Tensor:
        return state.predict(params, batch.inputs, batch.keys)

    with contextlib.suppress(RuntimeError, ValueError):  # NotImplementedError is a RuntimeError
        forward_mode(predict, state.params, direction)
        return forward_mode
    with contextlib.suppress(RuntimeError, ValueError):
        predictions, slopes = twice_backward(predict, state.params, direction)
        along = torch.linspace(1.0, 2.0, predictions.numel()).to(predictions)
        along = along.reshape(predictions.shape)
        grads = plain_vjp(state, batch, along)
        terms = torch.stack([(g * direction[name]).sum() for name, g in grads.items()])
        error = (terms.sum() - (along * slopes).sum()).abs()
        size = terms.abs().sum() + (along * slopes).abs().sum()
        if bool(error <= tolerance_of(state.params) * size):
            return twice_backward
    return None


@dataclass(frozen=True, eq=False)
class DirectionalDerivatives:
    """Derivatives along the gradient ``g``."""

    slope: Tensor  # of each example, <grad l_i, g>
    elasticities: dict[str, Tensor]  # d log |g| / d log k, by option of the loss


def directional_derivatives(
    context: AuditContext,
    make_batches: MakeBatches,
    gradients: ClassGradients,
    derivative: Directional,
) -> DirectionalDerivatives:
    """Pass over the data along its gradient."""
    rows, by_option = [], {}
    for batch in make_batches():
        if not len(batch):
            continue
        loss, slope, options = _slopes(context, batch, gradients.gradient, derivative)
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


def _slopes(
    context: AuditContext, batch: MaskedBatch, direction: Params, derivative: Directional
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return losses, slopes and those of the options."""
    state, moved = context.state, []
    for piece in context.pieces(batch):
        part = batch.at(piece)
        predictions, tangents = derivative(
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
