"""The size of all gradients together, and a bound on it."""

import torch
from jaxtyping import Float
from torch import Tensor

from funcloss.typing import Grads, Params


def global_norm(tree: Params) -> Float[Tensor, ""]:
    """Euclidean norm of all entries of a dict of tensors together, ``sqrt(sum(x^2))``.

    Args:
        tree: Tensors by name, at least one.

    Returns:
        The norm, a scalar, with gradient 0 where all entries are 0.

    Example:
        >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        tensor(5.)
    """
    return safe_sqrt(torch.stack([x.square().sum() for x in tree.values()]).sum())


def clip_by_global_norm(grads: Grads, max_norm: float | Tensor) -> Grads:
    """Scale ``grads`` down to a global norm of at most ``max_norm``, as torch's clip_grad_norm_.

    Args:
        grads: Gradients by name.
        max_norm: The largest norm allowed, positive.

    Returns:
        ``grads * min(1, max_norm / (norm + 1e-6))``, keys and shapes of ``grads``.

    Example:
        >>> clip_by_global_norm({"w": torch.tensor([3.0, 4.0])}, 1.0)["w"]
        tensor([0.6000, 0.8000])

    References:
        Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks",
        2013.
    """
    scale = clip_factor(grads, max_norm)
    return {name: scale.to(g) * g for name, g in grads.items()}


def clip_factor(grads: Grads, max_norm: float | Tensor) -> Float[Tensor, ""]:
    """Factor that clipping puts on every gradient, ``min(1, max_norm / (norm + 1e-6))``.

    Args:
        grads: Gradients by name.
        max_norm: The largest norm allowed, positive.

    Returns:
        A scalar in ``(0, 1]``.

    Example:
        >>> clip_factor({"w": torch.tensor([3.0, 4.0])}, 1.0)
        tensor(0.2000)
    """
    return (max_norm / (global_norm(grads) + 1e-6)).clamp(max=1.0)


def safe_sqrt(square: Tensor) -> Tensor:
    """Return the square root, with gradient 0 at 0 (a unit that never fired), not infinity."""
    return square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
