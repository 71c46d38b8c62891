"""Class gradients and per-example norms from layers' activations and backprops: ghost norms.

The gradient of one example in a layer that multiplies by a matrix is ``sum_t outer(backprops_t,
activations_t)`` over the positions ``t`` that the matrix is applied at: ``activations``, the
layer's input, is known going forward, ``backprops`` is the gradient of a zero that is added to its
output. One backward pass for all layers and all examples then gives both the class gradients, a
product for each class (book-keeping), and the norms, without a gradient per example being kept.
Where the positions are few, as in linear layers and deep convolutions, a norm needs no gradient at
all (the ghost norm): its square is ``sum_ts <backprops_t, backprops_s> <activations_t,
activations_s>``.

References:
    Goodfellow, "Efficient per-example gradient computations", 2015. Bu, Mao and Xu, "Scalable and
    efficient training of large convolutional neural networks with differential privacy", 2022
    (choosing between the two ways to a norm layer by layer).
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad
from torch.overrides import TorchFunctionMode

from funcloss.typing import Grads, Params


@dataclass(frozen=True, eq=False)
class LayerUse:
    """One use of a layer's parameters."""

    kind: Callable[..., Any]
    activations: Tensor  # the layer's input
    zero: Tensor  # added to its output; its gradient is the layer's backprops
    weight: str | None  # names of the parameters
    bias: str | None
    settings: dict[str, Any]


class LayerInputs(TorchFunctionMode):
    """Record every use of a parameter in this context, and add a zero to its output.

    Args:
        params: The parameters, by name; uses are known by identity.
    """

    def __init__(self, params: Params) -> None:
        """Begin with no use."""
        super().__init__()
        self.names = {id(p): name for name, p in params.items()}
        self.uses: list[LayerUse] = []
        self.others: dict[str, str] = {}  # what else a parameter was used in

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Record a layer, pass the rest."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # the dtype of a weight is no use of it
            return func(*args, **kwargs)
        used = [self.names[i] for i in _ids((args, tuple(kwargs.values()))) if i in self.names]
        if not used:
            return func(*args, **kwargs)
        call = _READERS[func](*args, **kwargs) if func in _READERS else None
        out = func(*args, **kwargs)
        if call is None:
            self.others |= dict.fromkeys(used, getattr(func, "__name__", str(func)))
            return out
        kind, activations, weight, bias, settings = call
        zero = torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)
        zero = zero.requires_grad_()
        settings["shape"] = None if weight is None else tuple(weight.shape)
        names = (self.names.get(id(weight)), self.names.get(id(bias)))
        self.uses.append(LayerUse(kind, activations.detach(), zero, *names, settings))
        return out.add_(zero)

    def reason_against(self) -> str:
        """Return why products cannot give the gradients of these uses; empty if they can."""
        used = [name for use in self.uses for name in (use.weight, use.bias) if name]
        if self.others:
            name, func = next(iter(self.others.items()))
            return f"{name} is used in {func}"
        twice = next((name for name in used if used.count(name) > 1), None)
        return f"{twice} is used more than once" if twice else ""


def _ids(nested: tuple | list) -> Iterator[int]:
    """Yield the identity of each tensor in nested tuples and lists."""
    for item in nested:
        if isinstance(item, Tensor):
            yield id(item)
        elif isinstance(item, tuple | list):
            yield from _ids(item)


def add_products(
    uses: Sequence[LayerUse],
    backprops: Sequence[Tensor],
    groups: Tensor,
    sums: Grads,
    *,
    norms: bool,
) -> Tensor | None:
    """Add each group's gradient to its row of ``sums``; return the squared norms, if asked for.

    ``groups``, ``(n,)``, ascend; ``sums`` have shape ``(groups, *shape)``.
    """
    squares = torch.zeros(len(groups), dtype=backprops[0].dtype, device=groups.device)
    segments = segments_of(groups)
    for use, back in zip(uses, backprops, strict=True):
        if back.stride() and not any(back.stride()):
            back = back.contiguous()
        use.kind(use, back, segments, sums, squares if norms else None)
    return squares if norms else None


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


def shape_of(use: LayerUse, n: int) -> LayerShape:
    """Return the shape of a layer's products for ``n`` examples; 0 where it multiplies nothing."""
    shape = use.settings["shape"]
    if use.kind is _linear and shape:
        return LayerShape(max(use.activations.shape[:-1].numel() // n, 1), 1, shape[1], shape[0])
    if use.kind is _convolution and shape:
        parts, (outs, ins, *kernel) = use.settings["groups"], shape
        positions = use.zero.shape[2:].numel()
        return LayerShape(positions, parts, ins * math.prod(kernel), outs // parts)
    return LayerShape(0, 0, 0, 0)


# One layer: activations, backprops -> sums and squares ----------------------------------------

Segments = list[tuple[int, slice]]  # which examples each group has

_FEW_CHANNELS = 4
_CACHED = 1 << 19  # numbers that a piece of a batch takes: they should stay in cache


def _outer(
    activations: Callable[[slice], Tensor],
    backprops: Tensor,
    segments: Segments,
    ins: int,
    add: Callable[[int, Tensor], None],
    squares: Tensor | None,
) -> None:
    """Add ``sum_t outer(backprops_t, activations_t)`` by group.

    Args:
        activations: From a range of examples to theirs, ``(m, parts, positions, ins)``.
        backprops: Shape ``(n, parts, positions, outs)``.
        segments: Where each group's examples are.
        ins: Inputs of a matrix.
        add: Takes a group and a gradient of its, ``(parts, outs, ins)``.
        squares: Squared norms to add to, or None.
    """
    n, parts, positions, outs = backprops.shape
    explicit = squares is not None and LayerShape(positions, parts, ins, outs).explicit()
    room = parts * (max(positions * ins, outs * ins) if explicit else positions * ins)
    step = max(1, _CACHED // room) if positions > 1 else n
    for start in range(0, n, step):
        piece = slice(start, min(start + step, n))
        a, b = activations(piece), backprops[piece]
        inside = _inside(segments, piece)
        if explicit and squares is not None:
            grads = b.mT @ a
            squares[piece] += _square(grads)
            for label, part in inside:
                add(label, grads[part].sum(0))
            continue
        if squares is not None and positions == 1:
            squares[piece] += (_square_rows(a) * _square_rows(b)).sum((1, 2))
        elif squares is not None:
            squares[piece] += ((a @ a.mT) * (b @ b.mT)).sum((1, 2, 3))
        for label, part in inside:
            of_part = b[part].transpose(0, 1).reshape(parts, -1, outs)
            add(label, of_part.mT @ a[part].transpose(0, 1).reshape(parts, -1, ins))


def _vectors(grads: Tensor, segments: Segments, into: Tensor, squares: Tensor | None) -> None:
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
        squares += _square(grads)


def add_by_group(grads: Tensor, groups: Tensor, into: Tensor) -> None:
    """Add gradients by example, ``(n, *shape)``, to those of their groups, which ascend."""
    _vectors(grads, segments_of(groups), into, None)


def as_rows(grads: Tensor) -> Tensor:
    """Return gradients by example, ``(n, *shape)``, as vectors; a scalar parameter's have one."""
    return grads[..., None].flatten(1)


def _square(grads: Tensor) -> Tensor:
    flat = as_rows(grads)
    return torch.linalg.vecdot(flat, flat)


def _square_rows(rows: Tensor) -> Tensor:
    return torch.linalg.vecdot(rows, rows)


def segments_of(groups: Tensor) -> Segments:
    """Return where each group's examples are; ``groups`` ascends."""
    found, counts = groups.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return list(zip(found.tolist(), map(slice, starts, ends), strict=True))


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


def _linear(
    use: LayerUse, backprops: Tensor, segments: Segments, sums: Grads, squares: Tensor | None
) -> None:
    n = segments[-1][1].stop
    activations = use.activations.reshape(n, 1, -1, use.activations.shape[-1])
    backprops = backprops.reshape(n, 1, -1, backprops.shape[-1])
    if use.weight:
        into = sums[use.weight]

        def add(label: int, grads: Tensor) -> None:
            into[label] += grads[0]

        _outer(activations.__getitem__, backprops, segments, into.shape[-1], add, squares)
    if use.bias:
        _vectors(backprops.sum((1, 2)), segments, sums[use.bias], squares)


def _convolution(
    use: LayerUse, backprops: Tensor, segments: Segments, sums: Grads, squares: Tensor | None
) -> None:
    axes = use.activations.dim() - 2
    n, outs = backprops.shape[:2]
    parts = use.settings["groups"]
    if use.bias:
        _vectors(backprops.flatten(2).sum(2), segments, sums[use.bias], squares)
    if not use.weight:
        return
    _, ins, *kernel = use.settings["shape"]
    if squares is None:
        _convolution_sums(use, backprops, segments, sums[use.weight])
        return
    windows = _windows(use, kernel, axes)
    # (n, positions, outs) is no copy where the layout is channels-last.
    by_place = backprops.flatten(2).mT.reshape(n, -1, parts, outs // parts).transpose(1, 2)
    into = sums[use.weight].movedim(2, -1)  # (groups, outs, *kernel, ins)

    def add(label: int, grads: Tensor) -> None:
        into[label] += grads.reshape(into.shape[1:])

    _outer(windows, by_place, segments, math.prod(kernel) * ins, add, squares)


def _convolution_sums(use: LayerUse, backprops: Tensor, segments: Segments, into: Tensor) -> None:
    """Add class gradients alone, by torch's own kernel for all examples of a class."""
    weight_grad = {
        1: grad.conv1d_weight,
        2: grad.conv2d_weight,
        3: grad.conv3d_weight,
    }[use.activations.dim() - 2]
    settings = {name: use.settings[name] for name in ("stride", "padding", "dilation", "groups")}
    for label, part in segments:
        into[label] += weight_grad(
            use.activations[part], use.settings["shape"], backprops[part], **settings
        )


def _windows(use: LayerUse, kernel: list[int], axes: int) -> Callable[[slice], Tensor]:
    """Return what a convolution multiplies at each place, ``(m, parts, positions, ins)``."""
    settings = use.settings
    activations = use.activations.movedim(1, -1)  # channels last
    if any(settings["padding"]):
        widths = [side for width in reversed(settings["padding"]) for side in (width, width)]
        activations = F.pad(activations, (0, 0, *widths))
    parts, channels = settings["groups"], activations.shape[-1]
    places = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(
            activations.shape[1:-1], kernel, settings["stride"], settings["dilation"], strict=True
        )
    ]
    strides = activations.stride()
    shape = (*places, *kernel, channels)
    steps = (
        *(stride * s for stride, s in zip(strides[1:-1], settings["stride"], strict=True)),
        *(stride * d for stride, d in zip(strides[1:-1], settings["dilation"], strict=True)),
        strides[-1],
    )

    def windows(piece: slice) -> Tensor:
        part = activations[piece]
        view = part.as_strided((len(part), *shape), (strides[0], *steps), part.storage_offset())
        if parts == 1 and channels < _FEW_CHANNELS:  # long runs to copy lie along the positions
            last = view.movedim(tuple(range(1, 1 + axes)), tuple(range(-axes, 0)))
            return last.reshape(len(part), 1, -1, math.prod(places)).mT
        if parts == 1:
            return view.reshape(len(part), 1, math.prod(places), -1)
        split = view.reshape(len(part), math.prod(places), math.prod(kernel), parts, -1)
        return split.permute(0, 3, 1, 2, 4).reshape(len(part), parts, math.prod(places), -1)

    return windows


def _normalisation(
    use: LayerUse, backprops: Tensor, segments: Segments, sums: Grads, squares: Tensor | None
) -> None:
    normal = use.settings["normal"]
    summed = use.settings["summed"]  # the axes that a parameter is shared over, the batch aside
    for name, grads in ((use.weight, lambda: backprops * normal()), (use.bias, lambda: backprops)):
        if name:
            each = grads()
            _vectors(each.sum(summed) if summed else each, segments, sums[name], squares)


def _embedding(
    use: LayerUse, backprops: Tensor, segments: Segments, sums: Grads, squares: Tensor | None
) -> None:
    if not use.weight:
        return
    n, width = len(backprops), backprops.shape[-1]
    words, backprops = use.activations.reshape(n, -1), backprops.reshape(n, -1, width)
    padding = use.settings["padding"]
    if padding is not None:
        backprops = torch.where((words == padding)[..., None], 0.0, backprops)
    into = sums[use.weight]
    for label, part in segments:
        into[label].index_add_(0, words[part].flatten(), backprops[part].reshape(-1, width))
    if squares is not None:
        same = words[:, :, None] == words[:, None, :]
        squares += torch.where(same, backprops @ backprops.mT, 0.0).sum((1, 2))


# The arguments of each of torch's functions -> its kind, activations, weight, bias and settings ---


def _read_linear(input, weight, bias=None):
    if weight.dim() != 2:
        return None
    return _linear, input, weight, bias, {}


def _read_convolution(axes: int):
    def read(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        def each(value):
            return (
                (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(value))
            )

        if isinstance(padding, str) or input.dim() != axes + 2:
            return None
        settings = {"stride": each(stride), "padding": each(padding), "dilation": each(dilation)}
        return _convolution, input, weight, bias, settings | {"groups": groups}

    return read


def _normalised(input, weight, bias, function, summed):
    """Return the settings of a normalisation; ``summed`` are the axes that its weight is not of."""
    settings = {"normal": lambda: function(input.detach()), "summed": tuple(summed)}
    return _normalisation, input, weight, bias, settings


def _read_batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    if training:
        return None
    normal = functools.partial(
        F.batch_norm, running_mean=running_mean, running_var=running_var, eps=eps
    )
    return _normalised(input, weight, bias, normal, range(2, input.dim()))


def _read_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    normal = functools.partial(F.layer_norm, normalized_shape=normalized_shape, eps=eps)
    summed = range(1, input.dim() - len(normalized_shape))
    return _normalised(input, weight, bias, normal, summed)


def _read_group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    normal = functools.partial(F.group_norm, num_groups=num_groups, eps=eps)
    return _normalised(input, weight, bias, normal, range(2, input.dim()))


def _read_embedding(
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
):
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return _embedding, input, weight, None, {"padding": padding_idx}


_READERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _read_linear,
    F.conv1d: _read_convolution(1),
    F.conv2d: _read_convolution(2),
    F.conv3d: _read_convolution(3),
    F.batch_norm: _read_batch_norm,
    F.layer_norm: _read_layer_norm,
    F.group_norm: _read_group_norm,
    F.embedding: _read_embedding,
}
