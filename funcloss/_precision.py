"""Half precision computes in float32 and comes back as what it was."""

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32 for float16 and bfloat16, else that of ``tensor``."""
    return torch.promote_types(tensor.dtype, torch.float32)
