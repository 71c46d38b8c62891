"""How numbers are computed: in which dtype, and that 0 times infinity is 0."""

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 for float16 and bfloat16, else that of ``tensor``."""
    return torch.promote_types(tensor.dtype, torch.float32)


def product(weights: float | Tensor, values: Tensor) -> Tensor:
    """Return ``weights * values``, 0 where a weight is 0, of an infinite value too."""
    if not isinstance(weights, Tensor):
        if weights == 1:
            return values
        return weights * values if weights else torch.zeros_like(values)
    lost = (weights == 0) & ~values.isfinite()
    return weights * torch.where(lost, 0, values)


def finite_at_zero(logs: Tensor, weights: Tensor) -> Tensor:
    """Return logarithms, finite where a weight is 0: there ``0 * -inf`` would be NaN.

    Unlike :func:`product` it leaves them where they are: the weight has their derivative.
    """
    least = torch.finfo(logs.dtype).min / 2  # the difference of two of these is finite too
    return torch.where((weights == 0) & (logs < least), least, logs)
