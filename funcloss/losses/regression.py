"""Losses of real-valued targets."""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from funcloss._checks import check_floating, check_shape, option_of
from funcloss._numbers import product, wide_dtype
from funcloss.losses._shared import as_tensor, box_cox, finished, masked, paired_inputs

LARGEST = torch.finfo(torch.float64).max
_LARGE = 1e8  # from here on log(1 + x^2) is 2 log(x) to the last bit


def _spread(
    name: str,
    what: str,
    option: float | Tensor,
    values: Tensor,
    where: Tensor | None,
    **bounds: Any,
) -> float | Tensor:
    """Return an option as a number, or as a tensor with 1 where an example does not count."""
    shape = tuple(values.shape)
    option = option_of(name, what, option, shape, columns=shape[-1] if shape else None, **bounds)
    if not isinstance(option, Tensor):
        return option
    option = option.to(values.dtype)
    if option.dim() == 0 or where is None:
        return option
    # What is masked may be NaN, and 0 * NaN is NaN in a gradient.
    return torch.where(where, option, 1.0)


def absolute_error(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    weights: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Absolute error, ``weight * |prediction - target|``, in units of the target.

    Its gradient with respect to the prediction is ``weight * sign(prediction - target)``, 0 at a
    tie; with respect to the weight it is ``|prediction - target|``.

    Args:
        predictions: Predicted values, shape ``(*batch)``.
        targets: True values, shape ``(*batch)``.
        weights: Weight of the values: one, one per value, or one per entry of the last axis.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``predictions``. Reduced with
        :func:`mean` the weights are no part of the divisor, as they are in torch's ``l1_loss``.

    Raises:
        TypeError: ``predictions`` or ``targets`` is not floating point, or ``where`` not boolean.
        ValueError: the shapes differ, or ``weights`` does not fit them.

    Example:
        >>> absolute_error(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]), weights=3.0)
        tensor([3., 6.])

    References:
        Laplace, "Mémoire sur la probabilité des causes par les évènements", 1774.
    """
    p, t = paired_inputs("absolute_error", predictions, targets, where)
    values = (p - t).abs()
    weights = _spread("absolute_error", "weights", weights, p, where)
    return finished(product(weights, values), where, predictions)


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
    p, t = paired_inputs("squared_error", predictions, targets, where)
    return finished(F.mse_loss(p, t, reduction="none"), where, predictions)


def huber(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    delta: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Huber loss, ``e^2 / 2`` of an error ``e``, from delta on ``delta * (|e| - delta / 2)``.

    ``e`` is ``prediction - target``. The gradient with respect to the prediction is ``e`` clamped
    to ``[-delta, delta]``. It is ``delta`` times :func:`smooth_l1` with ``beta = delta``; as
    ``delta`` grows it becomes half of :func:`squared_error`.

    Args:
        predictions: Predicted values, shape ``(*batch)``.
        targets: True values, shape ``(*batch)``.
        delta: Error at which the square becomes a line, above 0, in units of the target.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``predictions``.

    Raises:
        TypeError: ``predictions`` or ``targets`` is not floating point, or ``where`` not boolean.
        ValueError: the shapes differ, or ``delta`` is not above 0.

    Example:
        >>> huber(torch.tensor([0.5, 4.0]), torch.tensor([0.0, 0.0]), delta=2.0)
        tensor([0.1250, 6.0000])

    References:
        Huber, "Robust estimation of a location parameter", 1964.
    """
    p, t = paired_inputs("huber", predictions, targets, where)
    delta = _spread("huber", "delta", delta, p, where, low=0, above=True)
    if not isinstance(delta, Tensor):  # one kernel
        return finished(F.huber_loss(p, t, "none", delta), where, predictions)
    return finished(_huber(p - t, delta), where, predictions)


def _huber(error: Tensor, delta: Tensor) -> Tensor:
    """Return the Huber loss without a branch: its square cannot overflow."""
    near = error.clamp(-delta, delta)
    return near * (error - 0.5 * near)


def smooth_l1(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    beta: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Smooth L1, ``e^2 / (2 * beta)`` of an error ``e``, from beta on ``|e| - beta / 2``.

    ``e`` is ``prediction - target``. The gradient with respect to the prediction is ``e / beta``
    clamped to ``[-1, 1]``. It is :func:`huber` over ``beta``, and at ``beta = 0``
    :func:`absolute_error`.

    Args:
        predictions: Predicted values, shape ``(*batch)``.
        targets: True values, shape ``(*batch)``.
        beta: Error at which the square becomes a line, not negative, in units of the target.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``predictions``.

    Raises:
        TypeError: ``predictions`` or ``targets`` is not floating point, or ``where`` not boolean.
        ValueError: the shapes differ, or ``beta`` is negative.

    Example:
        >>> smooth_l1(torch.tensor([0.5, 4.0]), torch.tensor([0.0, 0.0]), beta=2.0)
        tensor([0.0625, 3.0000])

    References:
        Girshick, "Fast R-CNN", 2015, eq. 3.
    """
    p, t = paired_inputs("smooth_l1", predictions, targets, where)
    beta = _spread("smooth_l1", "beta", beta, p, where, low=0)
    if not isinstance(beta, Tensor):  # one kernel
        return finished(F.smooth_l1_loss(p, t, reduction="none", beta=beta), where, predictions)
    error, divisor = p - t, torch.where(beta > 0, beta, 1.0)
    values = torch.where(beta > 0, _huber(error, divisor) / divisor, error.abs())
    return finished(values, where, predictions)


def log_cosh(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Logarithm of the hyperbolic cosine of the error, ``log(cosh(prediction - target))``.

    Near 0 it is half of :func:`squared_error`, far from it :func:`absolute_error` less ``log(2)``.
    Its gradient with respect to the prediction is ``tanh(prediction - target)``. The unit is fixed:
    divide both by a scale to move the bend.

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
        >>> log_cosh(torch.tensor([1.0, 1000.0]), torch.tensor([0.0, 0.0]))
        tensor([4.3378e-01, 9.9931e+02])

    References:
        Green, "Bayesian reconstructions from emission tomography data using a modified EM
        algorithm", 1990.
    """
    p, t = paired_inputs("log_cosh", predictions, targets, where)
    error = p - t
    near = error.abs() < 1
    # log cosh x is log(1 + 2 sinh(x / 2)^2): exact where x^2 is below the rounding of 1.
    small = torch.log1p(2 * torch.sinh(torch.where(near, error, 0.0) / 2).square())
    size = torch.where(near, 1.0, error).abs()
    large = size + torch.log1p(torch.exp(-2 * size)) - math.log(2)
    return finished(torch.where(near, small, large), where, predictions)


def quantile(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    q: float | Tensor = 0.5,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Quantile (pinball) loss, ``q * (t - p)`` below the target, ``(1 - q) * (p - t)`` above it.

    ``p`` is the prediction, ``t`` the target; in units of the target. The constant that minimises
    its mean is the ``q`` quantile of the targets. Its gradient with respect to the prediction is
    ``-q`` below the target, ``1 - q`` above it and 0 at a tie. At ``q = 0.5`` it is half of
    :func:`absolute_error`.

    Args:
        predictions: Predicted values, shape ``(*batch)``.
        targets: True values, shape ``(*batch)``.
        q: Quantile, in ``[0, 1]``: one, one per value, or one per entry of the last axis.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``predictions``.

    Raises:
        TypeError: ``predictions`` or ``targets`` is not floating point, or ``where`` not boolean.
        ValueError: the shapes differ, or ``q`` does not fit them or is outside its range.

    Example:
        >>> quantile(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 2.0]), q=0.75)
        tensor([0.2500, 0.7500])

    References:
        Koenker and Bassett, "Regression quantiles", 1978.
    """
    p, t = paired_inputs("quantile", predictions, targets, where)
    q = _spread("quantile", "q", q, p, where, low=0, high=1)
    return finished(q * F.relu(t - p) + (1 - q) * F.relu(p - t), where, predictions)


def poisson_nll(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    log_input: bool = True,
    full: bool = False,
    eps: float | Tensor = 1e-8,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Negative log-likelihood of a count under a Poisson law, ``rate - target * log(rate)``.

    In nats, less ``log(target!)``, which does not depend on the prediction. Its gradient with
    respect to a log-rate is ``rate - target``. The rate is an exponential, so in float32 a log-rate
    above 88 gives an infinite loss: that is its value.

    Args:
        predictions: ``log(rate)``, or the rate itself, shape ``(*batch)``.
        targets: Counts, not negative, shape ``(*batch)``.
        log_input: Whether predictions are ``log(rate)``; otherwise they are rates, not negative.
        full: Whether to add Stirling's approximation of ``log(target!)`` for targets above 1.
        eps: Added to a rate before its logarithm, above 0; without use for log-rates.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``predictions``.

    Raises:
        TypeError: ``predictions`` or ``targets`` is not floating point, or ``where`` not boolean.
        ValueError: the shapes differ, or ``eps`` is not above 0.

    Example:
        >>> poisson_nll(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 7.0]))
        tensor([ 1.0000, -6.6109])

    References:
        Cameron and Trivedi, "Regression analysis of count data", 2013, section 3.2.
    """
    p, t = paired_inputs("poisson_nll", predictions, targets, where)
    eps = _spread("poisson_nll", "eps", eps, p, where, low=0, above=True)
    values = p.exp() - t * p if log_input else p - t * (p + eps).log()
    if full:
        count = torch.where(t > 1, t, 1.0)
        stirling = count * count.log() - count + 0.5 * (2 * math.pi * count).log()
        values = values + torch.where(t > 1, stirling, 0.0)
    return finished(values, where, predictions)


def gaussian_nll(
    predictions: Float[Tensor, "*batch"],
    variances: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    full: bool = False,
    eps: float | Tensor = 1e-6,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Negative log-likelihood of a normal law, ``(log(variance) + error^2 / variance) / 2``.

    In nats. A variance below ``eps`` counts as ``eps``, and its gradient is the one at ``eps``, as
    in torch: by the value alone it would be 0, and such a variance could never grow again. The
    order is that of funcloss, what is predicted before the targets; torch takes the variances last.

    Args:
        predictions: Predicted means, shape ``(*batch)``.
        variances: Predicted variances, shape ``(*batch)``: expand one that is shared.
        targets: True values, shape ``(*batch)``.
        full: Whether to add the constant ``log(2 * pi) / 2``.
        eps: Least variance, above 0.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``predictions``.

    Raises:
        TypeError: ``predictions``, ``variances`` or ``targets`` is not floating point, or ``where``
            not boolean.
        ValueError: the shapes differ, or ``eps`` is not above 0.

    Example:
        >>> gaussian_nll(torch.tensor([1.0]), torch.tensor([4.0]), torch.tensor([3.0]))
        tensor([1.1931])

    References:
        Nix and Weigend, "Estimating the mean and variance of the target probability distribution",
        1994.
    """
    p, t = paired_inputs("gaussian_nll", predictions, targets, where)
    eps = _spread("gaussian_nll", "eps", eps, p, where, low=0, above=True)
    check_floating("gaussian_nll", "variances", variances)
    shape = tuple(predictions.shape)
    check_shape("gaussian_nll", "variances", variances, shape, f"predictions {shape}")
    v = masked(variances, where).to(wide_dtype(predictions))
    v = torch.where(v < eps, v - v.detach() + eps, v)  # worth eps, with the gradient of v
    values = (v.log() + ((p - t) / v.sqrt()).square()) / 2  # the square alone may overflow
    return finished(values + 0.5 * math.log(2 * math.pi) if full else values, where, predictions)


def charbonnier(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    epsilon: float | Tensor = 1e-3,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Charbonnier loss, ``sqrt(error^2 + epsilon^2)``, in units of the target.

    A smooth :func:`absolute_error`, ``epsilon`` where there is no error. Its gradient with respect
    to the prediction is the error over the loss.

    Args:
        predictions: Predicted values, shape ``(*batch)``.
        targets: True values, shape ``(*batch)``.
        epsilon: Error at which the square becomes a line, above 0, in units of the target.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``predictions``.

    Raises:
        TypeError: ``predictions`` or ``targets`` is not floating point, or ``where`` not boolean.
        ValueError: the shapes differ, or ``epsilon`` is not above 0.

    Example:
        >>> charbonnier(torch.tensor([0.0, 4.0]), torch.tensor([0.0, 0.0]), epsilon=3.0)
        tensor([3., 5.])

    References:
        Charbonnier et al., "Two deterministic half-quadratic regularization algorithms for computed
        imaging", 1994; in this form: Lai et al., "Deep Laplacian pyramid networks for fast and
        accurate super-resolution", 2017.
    """
    p, t = paired_inputs("charbonnier", predictions, targets, where)
    epsilon = as_tensor(_spread("charbonnier", "epsilon", epsilon, p, where, low=0, above=True), p)
    return finished(torch.hypot(p - t, epsilon), where, predictions)


def barron(
    predictions: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    alpha: float | Tensor,
    scale: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """General robust loss, ``b / alpha * ((x^2 / b + 1)^(alpha / 2) - 1)``, ``b = |alpha - 2|``.

    ``x`` is ``(prediction - target) / scale``. Of one family in ``alpha``: ``x^2 / 2`` at 2,
    ``sqrt(x^2 + 1) - 1`` (Charbonnier) at 1, ``log(x^2 / 2 + 1)`` (Cauchy) at 0,
    ``2 * x^2 / (x^2 + 4)`` (Geman-McClure) at -2, ``1 - exp(-x^2 / 2)`` (Welsch) at ``-inf``. Its
    gradient with respect to the prediction is ``x / scale * (x^2 / b + 1)^(alpha / 2 - 1)``.

    It may be differentiated with respect to ``alpha`` and ``scale`` too. At exactly ``alpha = 2``
    the derivative with respect to ``alpha`` is infinite; it is given as 0, as it is at ``-inf``.
    (To learn ``alpha`` the paper adds the logarithm of a normaliser, which this loss leaves out.)

    Args:
        predictions: Predicted values, shape ``(*batch)``.
        targets: True values, shape ``(*batch)``.
        alpha: Shape, ``-inf`` or any finite number: the less, the less an outlier counts. One, one
            per value, or one per entry of the last axis.
        scale: Error at which the square ends, above 0, in units of the target. As many as of
            ``alpha``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``predictions``, without a unit.

    Raises:
        TypeError: ``predictions`` or ``targets`` is not floating point, or ``where`` not boolean.
        ValueError: the shapes differ, or an option does not fit them or is outside its range.

    Example:
        >>> barron(torch.tensor([2.0, 2.0]), torch.zeros(2), alpha=torch.tensor([2.0, -2.0]))
        tensor([2., 1.])

    References:
        Barron, "A general and adaptive robust loss function", 2019.
    """
    p, t = paired_inputs("barron", predictions, targets, where)
    alpha = as_tensor(_spread("barron", "alpha", alpha, p, where, high=LARGEST), p)
    x = (p - t) / _spread("barron", "scale", scale, p, where, low=0, above=True)
    half_square = x.square() / 2
    square, welsch = alpha == 2, alpha == -math.inf
    shape = torch.where(square | welsch, 1.0, alpha)
    half_b = (shape - 2).abs() / 2
    values = half_b * box_cox(_log1p_square(x / (2 * half_b).sqrt()), shape / 2)
    values = torch.where(welsch, -torch.expm1(-half_square), values)
    return finished(torch.where(square, half_square, values), where, predictions)


def _log1p_square(x: Tensor) -> Tensor:
    """Return ``log(1 + x^2)`` of an ``x`` whose square overflows too."""
    large = x.abs() > _LARGE
    size = torch.where(large, x, 1.0).abs()
    near = torch.where(large, 0.0, x).square().log1p()
    return torch.where(large, 2 * size.log(), near)
