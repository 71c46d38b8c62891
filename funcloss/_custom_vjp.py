"""A gradient written by hand that still composes with every transform."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from funcloss._numbers import wide_dtype
from funcloss.combinators import Combined
from funcloss.losses._shared import masked

Backward = Callable[..., Tensor | tuple[Tensor | None, ...]]


def custom_vjp(forward: Callable[..., Tensor], backward: Backward) -> Callable[..., Tensor]:
    r"""Return ``forward`` with the gradient ``backward``, for ``grad``, ``vmap`` and all the rest.

    An ``autograd.Function`` does not compose: compiled ``vmap(grad)`` fails, and forward mode or
    compilation is refused. This is a sum of plain operations instead, with :math:`\bar x` the
    detached argument, :math:`f` the forward and :math:`g` the backward,

    .. math:: f(\bar x) + \tfrac12 (g(\bar x) + g(x)) \cdot (x - \bar x),

    of value :math:`f`, gradient :math:`g` and Hessian :math:`\partial g`, exactly, how the gradient
    answers to a tensor that has none included; third and higher derivatives are not those of
    :math:`f`. ``forward`` is never differentiated and may be anything that torch runs;
    ``backward`` must be differentiable where a second derivative is asked for.

    Args:
        forward: From tensors to values of shape ``(*batch)``, or to a scalar.
        backward: From the same tensors to the gradient of each value: that with respect to the
            first tensor alone, of its shape, or a tuple, one for each tensor; None has no
            gradient. For a tensor that the examples share (a weight of shape ``(classes,)``, say)
            it has one for each value, ``(*batch, *shape)``. At an infinite argument the gradient
            is 0; an infinite slope leaves the value alone.

    Returns:
        A function of the same tensors, with ``where``: of the examples that do not count the first
        two tensors (predictions and targets) are replaced by 0, and so is the value.

    Raises:
        TypeError: on a call, ``forward`` gives no tensor.
        ValueError: on a call, ``backward`` gives more gradients than there are tensors, or one of
            another shape.

    Example:
        >>> square = custom_vjp(torch.square, lambda x: 2 * x)
        >>> torch.func.grad(torch.func.grad(square))(torch.tensor(3.0))
        tensor(2.)

    References:
        Frostig, Johnson, Maclaurin, Paszke and Radul, "Decomposing reverse-mode automatic
        differentiation", 2021, for the problem; the surrogate is the trapezoidal rule.
    """
    return CustomVjp((forward,), backward)


@dataclass(frozen=True, eq=False, repr=False)
class CustomVjp(Combined):
    """What :func:`custom_vjp` returns."""

    backward: Backward
    name = "custom_vjp"
    keeps = ("where",)

    def __call__(self, *tensors: Tensor, where: Tensor | None = None, **options: Any) -> Tensor:
        """Return one value per example."""
        (forward,) = self.losses
        tensors = _masked(tensors, where)
        fixed = tuple(x.detach() for x in tensors)
        value = forward(*fixed, **options)
        if not isinstance(value, Tensor):
            raise TypeError(f"custom_vjp: forward must give a tensor, got {type(value).__name__}")
        value = value.detach()
        batch = tuple(value.shape)
        there = _tupled(self.backward(*tensors, **options))
        if len(there) > len(tensors):
            raise ValueError(
                f"custom_vjp: backward must give a gradient a tensor, {len(tensors)} at most; "
                f"got {len(there)}"
            )
        # What has no gradient stays as it is: the slopes answer to it in full, not by half.
        slopes = (*there, *(None for _ in tensors[len(there) :]))
        still = [f if g is not None else x for x, f, g in zip(tensors, fixed, slopes, strict=True)]
        here = _tupled(self.backward(*still, **options))
        for i, (g_still, g) in enumerate(zip(here, there, strict=True)):
            if g is not None and g_still is not None:
                _check_gradient(i, tuple(g.shape), tuple(tensors[i].shape), batch)
                step = _step(tensors[i], fixed[i])
                value = value + _dot((g_still + g) / 2, step, len(batch))
        return value if where is None else torch.where(where, value, 0.0)


def from_numpy(
    forward: Callable[..., np.ndarray],
    backward: Callable[..., np.ndarray],
    *,
    example_axes: int | None = None,
) -> Callable[..., Tensor]:
    """Return a loss whose forward and backward are NumPy, differentiable once.

    NumPy is given copies on the CPU, so that editing them changes nothing; what it gives goes back
    to where the predictions are, in their dtype. The loss composes with ``grad``, ``jvp``, ``vmap``
    and ``torch.compile``, on any device, at the price of two copies a call. The other tensors are
    data, of gradient 0. A second derivative is NaN, rather than a silent 0.

    Args:
        forward: From arrays (the predictions first) to one value an example; it must take any
            number of leading axes, for ``vmap`` adds one.
        backward: From the same arrays to the gradient of each value with respect to the
            predictions, of their shape.
        example_axes: How many axes one example has in the predictions; None: as many as they have
            more than the last of the other tensors, which suits labels and values.

    Returns:
        A loss ``(predictions, *others)`` of values ``(*batch)``, with ``where``, as
        :func:`custom_vjp` has it. Half precision is computed in float32.

    Raises:
        ValueError: on a call, the arrays that come back have another shape.

    Example:
        >>> square = from_numpy(lambda p, t: (p - t) ** 2, lambda p, t: 2 * (p - t))
        >>> torch.func.grad(square)(torch.tensor(3.0), torch.tensor(1.0))
        tensor(4.)
    """
    return FromNumpy(
        (forward,), backward, example_axes, _registered(forward), _registered(backward)
    )


@dataclass(frozen=True, eq=False, repr=False)
class FromNumpy(Combined):
    """What :func:`from_numpy` returns."""

    backward: Callable[..., np.ndarray]
    example_axes: int | None
    values: int  # the numbers of forward and backward in this process
    slopes: int
    name = "from_numpy"
    keeps = ("where",)

    def __reduce__(self):
        """Pickle what it is made of: another process has other numbers."""
        make = functools.partial(from_numpy, example_axes=self.example_axes)
        return make, (*self.losses, self.backward)

    def __call__(self, *tensors: Tensor, where: Tensor | None = None) -> Tensor:
        """Return one value per example."""
        tensors = _masked(tensors, where)
        still, *fixed = (x.detach() for x in tensors)
        inner = self.example_axes
        if inner is None:
            inner = still.dim() - fixed[-1].dim() if fixed else 0
        value = torch.ops.funcloss.numpy([still, *fixed], self.values, inner)
        slope = torch.ops.funcloss.numpy([still, *fixed], self.slopes, 0)
        step = _step(tensors[0], still)
        # |step|^1.5 is 0, has gradient 0, and no second derivative: where one is asked for, NaN.
        pairs = zip(tensors[1:], fixed, strict=True)
        others = [_step(x, y).sum() for x, y in pairs if x.is_floating_point()]
        bend = (step + sum(others)).abs() ** 1.5
        value = value + _dot(slope, step, value.dim()) + _total(bend, value.dim())
        return value if where is None else torch.where(where, value, 0.0)


def _masked(tensors: tuple[Tensor, ...], where: Tensor | None) -> tuple[Tensor, ...]:
    return (*(masked(x, where) for x in tensors[:2]), *tensors[2:])


def _step(x: Tensor, still: Tensor) -> Tensor:
    """Return ``x - still``, which is 0, and differentiated is not; inf - inf would be NaN."""
    return torch.where(still.isfinite(), x - torch.where(still.isfinite(), still, 0.0), 0.0)


def _check_gradient(
    i: int, got: tuple[int, ...], shape: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    shared = (*batch, *shape)
    own = shape[: len(batch)] == batch
    if got != shared and not (own and got == shape):
        expected = f"{shape} or {shared}" if own and shape != shared else f"{shared}"
        raise ValueError(
            f"custom_vjp: the gradient of tensor {i} must have shape {expected}, got {got}"
        )


def _tupled(gradients: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(gradients) if isinstance(gradients, (tuple, list)) else (gradients,)


def _dot(gradient: Tensor, step: Tensor, batch_axes: int) -> Tensor:
    """Return the product of a gradient and a step, summed over the axes of an example."""
    largest = torch.finfo(gradient.dtype).max
    return _total(gradient.clamp(-largest, largest) * step, batch_axes)


def _total(products: Tensor, batch_axes: int) -> Tensor:
    inner = tuple(range(batch_axes, products.dim()))
    return products.sum(inner) if inner else products


# A custom operator is opaque to the compiler and to vmap, and so may leave torch; functions cannot
# be its arguments, so each has a number.
_FUNCTIONS: list[Callable[..., np.ndarray]] = []


def _registered(function: Callable[..., np.ndarray]) -> int:
    for number, known in enumerate(_FUNCTIONS):
        if known is function:
            return number
    _FUNCTIONS.append(function)
    return len(_FUNCTIONS) - 1


def _numpy(tensors: list[Tensor], function: int, inner: int) -> Tensor:
    """Return what a function of NumPy makes of copies of the tensors."""
    first = tensors[0]
    wide = [x.to(wide_dtype(x)) if x.is_floating_point() else x for x in tensors]
    arrays = [x.detach().cpu().numpy().copy() for x in wide]
    result = torch.as_tensor(np.asarray(_FUNCTIONS[function](*arrays)))
    shape = first.shape[: first.dim() - inner]
    if result.shape != shape:
        raise ValueError(
            f"from_numpy: forward must give one value an example and backward the shape of the "
            f"predictions; expected {tuple(shape)}, got {tuple(result.shape)}"
        )
    return result.to(first.device, first.dtype, copy=True)


def _numpy_shape(tensors: list[Tensor], function: int, inner: int) -> Tensor:
    first = tensors[0]
    return first.new_empty(first.shape[: first.dim() - inner])


def _numpy_vmap(info: Any, in_dims: Any, tensors: list[Tensor], function: int, inner: int) -> Any:
    batched = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims[0], strict=True)
    ]
    return torch.ops.funcloss.numpy(batched, function, inner), 0


_operator = torch.library.custom_op(
    "funcloss::numpy",
    _numpy,
    mutates_args=(),
    schema="(Tensor[] tensors, int function, int inner) -> Tensor",
)
_operator.register_fake(_numpy_shape)
_operator.register_vmap(_numpy_vmap)
