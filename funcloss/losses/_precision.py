"""Half precision computes in float32 and comes back as what it was."""

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in float32 where it is float16 or bfloat16, else as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
