"""Inner products of gradients that lie side by side, by layer and block by block."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from funcloss.typing import Grads, Params

_STRETCH = 1 << 16  # numbers of a row that are widened and multiplied at once

Layers = dict[str, list[str]]  # names of the parameters of each layer


def layers_of(params: Params) -> Layers:
    """Return the parameters by layer, the module that holds them.

    Example:
        >>> one = torch.zeros(1)
        >>> layers_of({"fc.weight": one, "fc.bias": one, "scale": one})
        {'fc': ['fc.weight', 'fc.bias'], 'scale': ['scale']}
    """
    layers: Layers = {}
    for name in params:
        module, _, last = name.rpartition(".")
        layers.setdefault(module or last, []).append(name)
    return layers


def grams(a: Grads, b: Grads, layers: Layers) -> Float[Tensor, "layers rows columns"]:
    """Inner products of each row of ``a`` with each of ``b``, by layer, on the CPU in float64."""
    return grams_in_place(a, b, layers).cpu().double()


def grams_in_place(a: Grads, b: Grads, layers: Layers) -> Float[Tensor, "layers rows columns"]:
    """As :func:`grams`, but where the gradients are: nothing waits for the device."""
    by_layer = [
        torch.stack([_products(flat(a[n]), flat(b[n])) for n in names]).sum(0)
        for names in layers.values()
    ]
    return torch.stack(by_layer)


def side_by_side(params: Params, rows: int) -> Grads:
    """Return zeros for ``rows`` gradients, each in the layout that :func:`flat` reads."""
    return {
        name: p.new_zeros(rows, *p.movedim(1, -1).shape).movedim(-1, 2)
        if p.dim() == 4
        else p.new_zeros(rows, *p.shape)
        for name, p in params.items()
    }


def flat(rows: Tensor) -> Tensor:
    """Return each row as a vector, those of images' filters channels last."""
    return (rows.movedim(2, -1) if rows.dim() == 5 else rows)[..., None].flatten(1)


def _unflat(vector: Tensor, shape: torch.Size) -> Tensor:
    """Return what :func:`flat` made of one row."""
    if len(shape) != 4:
        return vector.reshape(shape)
    return vector.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Return all inner products of rows with rows, a stretch at a time in the widest dtype.

    The gradient may be far shorter than the class gradients that it is the sum of, so rounding in
    their products would show in every share.
    """
    pairs = zip(a.split(_STRETCH, 1), b.split(_STRETCH, 1), strict=True)
    return torch.stack([wide(x) @ wide(y).T for x, y in pairs]).sum(0)


def wide(x: Tensor) -> Tensor:
    """Return numbers in the widest dtype that their device has."""
    return x.to(widest(x))


def widest(x: Tensor) -> torch.dtype:
    """Return the widest floating-point dtype of a tensor's device."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def held(function: Callable[[range], Grads], blocks: Sequence[range]) -> Callable[[range], Grads]:
    """Return the function; if one block has all classes, its value, computed once."""
    if len(blocks) > 1:
        return function
    (value,) = map(function, blocks)
    return lambda block: value


def cross(
    left: Callable[[range], Grads],
    right: Callable[[range], Grads],
    blocks: Sequence[range],
    layers: Layers,
) -> Float[Tensor, "layers classes classes"]:
    """Inner products of all rows of ``left`` with all of ``right``, a block of each at a time."""
    found = [
        torch.cat([grams_in_place(of_left, right(block), layers) for block in blocks], 2)
        for of_left in map(left, blocks)
    ]
    return torch.cat(found, 1).cpu().double()


def total_of(parts: Grads, weights: Tensor | None = None) -> Grads:
    """Return the sum over the first axis, weighted if weights are given."""
    if weights is None:
        return {name: part.sum(0) for name, part in parts.items()}
    return {
        name: _unflat(weights.to(part) @ flat(part), part.shape[1:]) for name, part in parts.items()
    }


def scaled_rows(weights: Tensor, parts: Grads) -> Grads:
    """Return each row times its weight."""
    return {
        name: weights.to(part).reshape(-1, *(1,) * (part.dim() - 1)) * part
        for name, part in parts.items()
    }


def plus(a: Params, b: Params) -> Params:
    """Return the sum of two dicts of tensors."""
    return {name: x + b[name] for name, x in a.items()}


def add_to(into: Params, more: Params) -> None:
    """Add in place: class gradients are too large to allocate for every batch."""
    for name, x in more.items():
        into[name] += x


def norm_of(tree: Params) -> float:
    """Return the Euclidean norm of all entries together, in float64."""
    if not tree:
        return 0.0
    lengths = [torch.linalg.vector_norm(x, dtype=widest(x)) for x in tree.values()]
    return float(torch.linalg.vector_norm(torch.stack(lengths)))


def distance(a: Params, b: Params) -> float:
    """Return the norm of the difference."""
    return norm_of({name: x - b[name] for name, x in a.items()})
