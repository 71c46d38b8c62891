"""Losses of real-valued targets."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from funcloss._checks import check_floating, check_shape, check_where
from funcloss._precision import wide_dtype


def squared_error(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Squared error, ``(prediction - target)^2``, in squared units of the target.

    Its gradient with respect to the prediction is ``2 * (prediction - target)``.

    Args:
        predictions: Predicted values, shape ``(*batch)``.
        targets: True values, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``predictions``.

    Raises:
        TypeError: ``predictions`` or ``targets`` is not floating point, or ``where`` not boolean.
        ValueError: the shapes differ.

    Example:
        >>> squared_error(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
        tensor([1., 4.])

    References:
        Gauss, "Theoria combinationis observationum erroribus minimis obnoxiae", 1823.
    """
    check_floating("squared_error", "predictions", predictions)
    check_floating("squared_error", "targets", targets)
    shape = tuple(predictions.shape)
    check_shape("squared_error", "targets", targets, shape, f"predictions {shape}")
    check_where("squared_error", where, shape)
    wide = wide_dtype(predictions)
    error = predictions.to(wide) - targets.to(wide)
    if where is not None:
        error = torch.where(where, error, 0.0)
    return error.square().to(predictions.dtype)
