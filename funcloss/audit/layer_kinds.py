"""The kinds of layers: from a layer's backprops and arguments to each example's gradients.

A layer function takes the gradient in the layer's output, ``backprops``, and then the arguments of
torch's function. It yields pairs of an argument and each example's gradient in it, ``(n, *shape)``;
the arguments that are no parameters are left aside. Examples lie along the first axis, also where
the model has them elsewhere. It raises ``NotImplementedError`` for what it does not know.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from funcloss.audit.per_example import Add, Gradient, Lookup, Outer, Segments, Spread

Gradients = Iterator[tuple[Tensor | None, Gradient]]
LayerFunction = Callable[..., Gradients]

_FEW_CHANNELS = 4


def linear(backprops: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None):
    """Yield the gradients of ``input @ weight.T + bias``."""
    if weight.dim() != 2:
        raise NotImplementedError("its weight is no matrix")
    yield weight, _matrix(input, backprops)
    if bias is not None:
        yield bias, _over_positions(backprops)


def addmm(
    backprops: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha=1
):
    """Yield the gradients of ``beta * input + alpha * mat1 @ mat2``."""
    yield input, Spread(backprops if beta == 1 else beta * backprops)
    yield mat2, _matrix(mat1, backprops if alpha == 1 else alpha * backprops, transposed=True)


def matmul(backprops: Tensor, input: Tensor, other: Tensor):
    """Yield the gradients of ``input @ other``, ``other`` being a matrix."""
    if other.dim() != 2:
        raise NotImplementedError("what it multiplies by is no matrix")
    yield other, _matrix(input, backprops, transposed=True)


def bilinear(
    backprops: Tensor, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None
):
    """Yield the gradients of ``input1 @ weight @ input2 + bias``."""
    n = len(backprops)
    a, b, g = (x.reshape(n, -1, x.shape[-1]) for x in (input1, input2, backprops))
    yield weight, torch.einsum("npo,npi,npj->noij", g, a, b)
    if bias is not None:
        yield bias, g.sum(1)


def _matrix(input: Tensor, backprops: Tensor, *, transposed: bool = False) -> Outer:
    n = len(backprops)
    activations = input.reshape(n, 1, -1, input.shape[-1])
    backprops = backprops.reshape(n, 1, -1, backprops.shape[-1])

    def arrange(grads: Tensor) -> Tensor:
        return grads[0].T if transposed else grads[0]

    return Outer(activations.__getitem__, backprops, activations.shape[-1], arrange)


def _over_positions(backprops: Tensor) -> Tensor:
    return backprops.flatten(1, -2).sum(1) if backprops.dim() > 2 else backprops


def convolution(axes: int) -> LayerFunction:
    """Return the layer function of a convolution over so many axes."""
    weight_grad: Callable[..., Tensor] = (
        grad.conv1d_weight,
        grad.conv2d_weight,
        grad.conv3d_weight,
    )[axes - 1]

    def of_convolution(
        backprops: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Gradients:
        """Yield the gradients of a convolution."""

        def each(value):
            if isinstance(value, int):
                return (value,) * axes
            return tuple(value) * (axes // len(value))

        if isinstance(padding, str):
            raise NotImplementedError(f"its padding is {padding!r}, not a number")
        if input.dim() != axes + 2:
            raise NotImplementedError("its input has no batch")
        at = {"stride": each(stride), "padding": each(padding), "dilation": each(dilation)}
        outs, ins, *kernel = weight.shape
        n = len(backprops)
        if bias is not None:
            yield bias, backprops.flatten(2).sum(2)

        def sums(segments: Segments, add: Add) -> None:
            for label, part in segments:  # by torch's own kernel for all examples of a class
                found = weight_grad(input[part], weight.shape, backprops[part], **at, groups=groups)
                add(label, found)

        def arrange(grads: Tensor) -> Tensor:
            return grads.reshape(outs, *kernel, ins).movedim(-1, 1)

        windows = _windows(input, kernel, groups, **at)
        # (n, positions, outs) is no copy where the layout is channels-last.
        by_place = backprops.flatten(2).mT.reshape(n, -1, groups, outs // groups).transpose(1, 2)
        yield weight, Outer(windows, by_place, math.prod(kernel) * ins, arrange, sums)

    return of_convolution


def _windows(
    activations: Tensor,
    kernel: list[int],
    parts: int,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Callable[[slice], Tensor]:
    """Return what a convolution multiplies at each place, ``(m, parts, positions, ins)``."""
    axes = len(kernel)
    activations = activations.movedim(1, -1)  # channels last
    channels = activations.shape[-1]
    widths = [side for width in reversed(padding) for side in (width, width)]
    places = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, p, k, s, d in zip(
            activations.shape[1:-1], padding, kernel, stride, dilation, strict=True
        )
    ]

    def windows(piece: slice) -> Tensor:
        part = activations[piece]
        if any(padding):
            part = F.pad(part, (0, 0, *widths))
        strides = part.stride()
        steps = (
            *(step * s for step, s in zip(strides[1:-1], stride, strict=True)),
            *(step * d for step, d in zip(strides[1:-1], dilation, strict=True)),
            strides[-1],
        )
        shape = (len(part), *places, *kernel, channels)
        view = part.as_strided(shape, (strides[0], *steps), part.storage_offset())
        if parts == 1 and channels < _FEW_CHANNELS:  # long runs to copy lie along the positions
            last = view.movedim(tuple(range(1, 1 + axes)), tuple(range(-axes, 0)))
            return last.reshape(len(part), 1, -1, math.prod(places)).mT
        if parts == 1:
            return view.reshape(len(part), 1, math.prod(places), -1)
        split = view.reshape(len(part), math.prod(places), math.prod(kernel), parts, -1)
        return split.permute(0, 3, 1, 2, 4).reshape(len(part), parts, math.prod(places), -1)

    return windows


def batch_norm(
    backprops: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
):
    """Yield the gradients of a normalisation by running statistics."""
    if training:
        raise NotImplementedError("it normalises by the statistics of the batch")
    normal = F.batch_norm(input, running_mean, running_var, eps=eps)
    yield from _per_channel(backprops, normal, weight, bias)


def group_norm(
    backprops: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
):
    """Yield the gradients of a normalisation over groups of channels."""
    yield from _per_channel(backprops, F.group_norm(input, num_groups, eps=eps), weight, bias)


def _per_channel(backprops: Tensor, normal: Tensor, weight: Tensor | None, bias: Tensor | None):
    places = tuple(range(2, backprops.dim()))
    for parameter, each in ((weight, backprops * normal), (bias, backprops)):
        yield parameter, each.sum(places) if places else each


def layer_norm(
    backprops: Tensor,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
):
    """Yield the gradients of a normalisation over the last axes."""
    yield weight, Spread(backprops * F.layer_norm(input, normalized_shape, eps=eps))
    yield bias, Spread(backprops)


def rms_norm(
    backprops: Tensor,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
):
    """Yield the gradient of a normalisation by the root mean square over the last axes."""
    yield weight, Spread(backprops * F.rms_norm(input, normalized_shape, eps=eps))


def embedding(
    backprops: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
):
    """Yield the gradient of a table that each example looks up its own rows of."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NotImplementedError("it is scaled or sparse")
    n, width = len(backprops), backprops.shape[-1]
    words, backprops = input.reshape(n, -1), backprops.reshape(n, -1, width)
    if padding_idx is not None:
        padding = padding_idx % len(weight)
        backprops = torch.where((words == padding)[..., None], 0.0, backprops)
    yield weight, Lookup(words, backprops)


def rows(backprops: Tensor, table: Tensor, index: Any):
    """Yield the gradient of ``table[index]``, the rows that each example takes."""
    if not isinstance(index, Tensor) or index.is_floating_point() or table.dim() != 2:
        raise NotImplementedError("its index is not one tensor of row numbers")
    if index.dtype in (torch.bool, torch.uint8):
        raise NotImplementedError("its index is a mask")
    yield from embedding(backprops, index % len(table), table)


def add(backprops: Tensor, input: Any, other: Any, *, alpha: float = 1):
    """Yield the gradients of ``input + alpha * other``."""
    yield input, Spread(backprops)
    yield other, Spread(backprops if alpha == 1 else alpha * backprops)


def sub(backprops: Tensor, input: Any, other: Any, *, alpha: float = 1):
    """Yield the gradients of ``input - alpha * other``."""
    yield input, Spread(backprops)
    yield other, Spread(-alpha * backprops)


def mul(backprops: Tensor, input: Any, other: Any):
    """Yield the gradients of ``input * other``."""
    yield input, Spread(backprops * other)
    yield other, Spread(backprops * input)


def div(backprops: Tensor, input: Any, other: Any):
    """Yield the gradients of ``input / other``."""
    yield input, Spread(backprops / other)
    yield other, Spread(-backprops * input / other**2)


def prelu(backprops: Tensor, input: Tensor, weight: Tensor):
    """Yield the gradient of the slope below 0, one for all channels or one per channel."""
    below = torch.where(input < 0, backprops * input, 0.0)
    if weight.numel() == 1:
        yield weight, below.flatten(1).sum(1).reshape(-1, *weight.shape)
    else:
        yield weight, below.flatten(2).sum(2) if below.dim() > 2 else below


# torch's function -> its layer function. Add your own here.
LAYERS: dict[Callable[..., Any], LayerFunction] = {
    F.linear: linear,
    torch.addmm: addmm,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm), matmul),
    Tensor.__matmul__: matmul,
    F.bilinear: bilinear,
    F.conv1d: convolution(1),
    F.conv2d: convolution(2),
    F.conv3d: convolution(3),
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.embedding: embedding,
    Tensor.__getitem__: rows,
    **dict.fromkeys((torch.add, Tensor.add, Tensor.add_, Tensor.__add__), add),
    **dict.fromkeys((Tensor.__radd__, Tensor.__iadd__), add),
    **dict.fromkeys((torch.sub, Tensor.sub, Tensor.sub_, Tensor.__sub__), sub),
    **dict.fromkeys((torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__), mul),
    **dict.fromkeys((Tensor.__rmul__, Tensor.__imul__), mul),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.div_, Tensor.__truediv__), div),
    F.prelu: prelu,
}
# These read their input as (batch, channels, ...): nothing else may be folded into the batch.
BATCH_FIRST = {F.conv1d, F.conv2d, F.conv3d, F.batch_norm, F.group_norm, F.prelu}
# These act on each entry of the output; their arguments are spread to its shape first.
ENTRYWISE = {func for func, layer in LAYERS.items() if layer in (add, sub, mul, div)}
