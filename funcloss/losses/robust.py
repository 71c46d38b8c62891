"""Losses of labels that may be wrong: a hopeless example pulls less than in cross-entropy."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funcloss._checks import check_floating, check_number, option_of
from funcloss._numbers import product, wide_dtype
from funcloss.losses._shared import (
    LEAST,
    SMALL,
    as_tensor,
    box_cox,
    class_inputs,
    finished,
    of_label,
    one_hot,
    states,
)


def _inverse_log(depths: Tensor, rate: float | Tensor) -> Tensor:
    """Return ``log(1 + rate * depth) / rate``, smooth at ``rate = 0``, where it is the depth."""
    if not isinstance(rate, Tensor):
        return (rate * depths).log1p() / rate if rate > LEAST else depths
    x = rate * depths
    small = x.abs() < SMALL
    near = torch.where(small, x, 0.0)
    y2 = (near / (2 + near)).square()  # log1p(x) = 2 atanh(x / (2 + x))
    series = 2 * depths / (2 + near) * (1 + y2 * (1 / 3 + y2 * (1 / 5 + y2 / 7)))
    far = torch.log1p(torch.where(small, 1.0, x)) / torch.where(small, 1.0, rate)
    return torch.where(small, series, far)


@states(probabilities="softmax")
def generalized_cross_entropy(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    q: float | Tensor = 0.7,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Generalised cross-entropy, ``(1 - p^q) / q`` of the label's probability ``p``.

    Its gradient with respect to the logits is that of cross-entropy times ``p^q``:
    ``p^q * (softmax(logits) - one_hot(label))``. It lies in ``[0, 1 / q]``. As ``q`` goes to 0 it
    becomes :func:`cross_entropy`, which it is at 0; at ``q = 1`` it is ``1 - p``, half of
    :func:`mean_absolute_error`.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        q: How much the loss doubts the labels, in ``[0, 1]``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis, or ``q`` is outside its range.

    Example:
        >>> generalized_cross_entropy(torch.zeros(1, 4), torch.tensor([3]), q=0.5)
        tensor([1.])

    References:
        Zhang and Sabuncu, "Generalized cross entropy loss for training deep neural networks with
        noisy labels", 2018.
    """
    scores, labels, spoiled = class_inputs("generalized_cross_entropy", logits, labels, where)
    q = option_of("generalized_cross_entropy", "q", q, tuple(labels.shape), low=0, high=1)
    return finished(-box_cox(of_label(scores.log_softmax(-1), labels), q), where, logits, spoiled)


@states(probabilities="softmax")
def symmetric_cross_entropy(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 1.0,
    log_zero: float | Tensor = -4.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy both ways, ``alpha * -log(p) + beta * -log_zero * (1 - p)``, in nats.

    ``p`` is the label's probability. The second term is the reverse cross-entropy ``-sum(softmax *
    log(one_hot))``, with ``log_zero`` in the place of ``log(0)``. The gradient with respect to the
    logits is ``(alpha - beta * log_zero * p) * (softmax(logits) - one_hot(label))``. At
    ``beta = 0`` it is ``alpha`` times :func:`cross_entropy`; at ``alpha = 0`` and ``log_zero = -2``
    it is ``beta`` times :func:`mean_absolute_error`.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        alpha: Weight of the cross-entropy, not negative. The paper takes 0.1 on CIFAR-10 and 6 on
            CIFAR-100, with ``beta`` 1 and 0.1.
        beta: Weight of the reverse cross-entropy, not negative.
        log_zero: What stands for the logarithm of 0, not positive.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis, or an option is outside its range.

    Example:
        >>> symmetric_cross_entropy(torch.zeros(1, 4), torch.tensor([3]))
        tensor([4.3863])

    References:
        Wang et al., "Symmetric cross entropy for robust learning with noisy labels", 2019.
    """
    name = "symmetric_cross_entropy"
    scores, labels, spoiled = class_inputs(name, logits, labels, where)
    examples = tuple(labels.shape)
    alpha = option_of(name, "alpha", alpha, examples, low=0)
    beta = option_of(name, "beta", beta, examples, low=0)
    log_zero = option_of(name, "log_zero", log_zero, examples, high=0)
    log_p = of_label(scores.log_softmax(-1), labels)
    # -expm1(log p) is 1 - p.
    loss = product(alpha, -log_p) + beta * log_zero * torch.expm1(log_p)
    return finished(loss, where, logits, spoiled)


@states(probabilities="softmax")
def normalized_cross_entropy(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy over its sum for every label, ``log(p_label) / sum_k log(p_k)``.

    In ``[0, 1]``, without a unit; over all labels of an example it sums to 1. The divisor is the
    example's own and depends on its logits.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``, two classes or more.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis, or there is one class alone.

    Example:
        >>> normalized_cross_entropy(torch.zeros(1, 4), torch.tensor([3]))
        tensor([0.2500])

    References:
        Ma et al., "Normalized loss functions for deep learning with noisy labels", 2020.
    """
    scores, labels, spoiled = class_inputs("normalized_cross_entropy", logits, labels, where)
    if scores.shape[-1] < 2:
        raise ValueError(
            "normalized_cross_entropy: logits must have 2 classes or more, "
            f"got shape {tuple(logits.shape)}"
        )
    log_probs = scores.log_softmax(-1)
    return finished(of_label(log_probs, labels) / log_probs.sum(-1), where, logits, spoiled)


@states(probabilities="none")
def mean_absolute_error(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Distance of ``softmax(logits)`` to the one-hot label, ``sum_k |one_hot_k - p_k| = 2 - 2 p``.

    ``p`` is the label's probability. It bears the name that its paper gave it: nothing is averaged,
    and it takes logits and labels, where :func:`absolute_error` takes two real values. In
    ``[0, 2]``; over all labels of an example it sums to ``2 * (classes - 1)``, which is what makes
    it robust to evenly wrong labels. Its gradient with respect to the logits is
    ``2 * p * (softmax(logits) - one_hot(label))``, which vanishes where the label is hopeless.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis.

    Example:
        >>> mean_absolute_error(torch.zeros(1, 4), torch.tensor([3]))
        tensor([1.5000])

    References:
        Ghosh, Kumar and Sastry, "Robust loss functions under label noise for deep neural
        networks", 2017.
    """
    scores, labels, spoiled = class_inputs("mean_absolute_error", logits, labels, where)
    return finished(
        -2 * torch.expm1(of_label(scores.log_softmax(-1), labels)), where, logits, spoiled
    )


def tempered_softmax(
    logits: Float[Tensor, "*batch classes"],
    *,
    t: float | Tensor = 1.2,
    iterations: int = 5,
) -> Float[Tensor, "*batch classes"]:
    """Softmax with a heavy tail, ``exp_t(logit - lambda)``, ``lambda`` such that it sums to 1.

    ``exp_t(x) = (1 + (1 - t) x)^(1 / (1 - t))``; at ``t = 1`` it is the softmax. These are the
    probabilities of a model that :func:`bi_tempered` trained with ``t2 = t``.

    Args:
        logits: Unnormalised scores, shape ``(*batch, classes)``.
        t: Temperature, 1 or more: the greater, the heavier the tail; ``classes^(t - 1)`` must fit
            the dtype.
        iterations: Newton steps, one or more, that find ``lambda`` before the derivatives are
            taken.

    Returns:
        Probabilities, shape ``(*batch, classes)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point.
        ValueError: ``t`` or ``iterations`` is outside its range.

    Example:
        >>> tempered_softmax(torch.tensor([0.0, 1.0, 4.0]), t=2.0)
        tensor([0.1771, 0.2153, 0.6076])

    References:
        Amid et al., "Robust bi-tempered logistic loss based on Bregman divergences", 2019.
    """
    check_floating("tempered_softmax", "logits", logits)
    t = option_of("tempered_softmax", "t", t, tuple(logits.shape[:-1]), axes=1, low=1)
    check_number("tempered_softmax", "iterations", iterations, low=1)
    scores = logits.to(wide_dtype(logits))
    return _tempered_log_softmax(scores, t, iterations).exp().to(logits.dtype)


def _tempered_log_softmax(scores: Tensor, t: float | Tensor, iterations: int) -> Tensor:
    """Return the logarithm of the tempered softmax, ``-log(1 + (t - 1) * depth) / (t - 1)``.

    Newton's method climbs to the level from below and never passes it, as the function whose root
    it seeks, ``(sum_k p_k)^(1 - t)``, is concave and increasing; at ``t = 1`` it needs one step.
    """
    scores = scores - scores.detach().amax(-1, keepdim=True)
    rate = as_tensor(t, scores) - 1 if isinstance(t, Tensor) else t - 1
    fixed = rate.detach() if isinstance(rate, Tensor) else rate

    def step(level: Tensor, scores: Tensor, rate: float | Tensor) -> Tensor:
        log_p = -_inverse_log(level - scores, rate)
        total = log_p.logsumexp(-1, keepdim=True)
        slope = ((1 + rate) * log_p).logsumexp(-1, keepdim=True)
        return level + box_cox(total, rate) * (total - slope).exp()

    level = torch.zeros_like(scores[..., :1])
    for _ in range(iterations):
        level = step(level, scores.detach(), fixed)
    # From the root one differentiable step gives the first derivative of the implicit function,
    # two give the second and the third.
    for _ in range(2):
        level = step(level, scores, rate)
    return -_inverse_log(level - scores, rate)


@states(probabilities="softmax")
def bi_tempered(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    t1: float | Tensor = 0.8,
    t2: float | Tensor = 1.2,
    label_smoothing: float | Tensor = 0.0,
    iterations: int = 5,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Bi-tempered logistic loss: a bounded divergence of labels from a heavy-tailed softmax.

    With ``y`` the target distribution and ``p = tempered_softmax(logits, t=t2)`` it is ``sum_k y_k
    * (log_t1(y_k) - log_t1(p_k)) - (y_k^(2 - t1) - p_k^(2 - t1)) / (2 - t1)``, where ``log_t(x) =
    (x^(1 - t) - 1) / (1 - t)``. In ``[0, 1 / (1 - t1)]``. At ``t1 = t2 = 1`` it is
    :func:`cross_entropy`, less the entropy of ``y`` where the labels are smoothed.

    Derivatives of first and second order, also those with respect to ``t1`` and ``t2``, are those
    of the implicit function, not of the iteration.

    Args:
        logits: Unnormalised scores, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        t1: Temperature of the divergence, in ``[0, 1]``: the less, the tighter it is bounded.
        t2: Temperature of the softmax, 1 or more: the greater, the heavier its tail;
            ``classes^(t2 - 1)`` must fit the dtype. The paper's ``t2 < 1``, where some
            probabilities are exactly 0, is left out.
        label_smoothing: Part of the target spread over all classes, in ``[0, 1]``, as in
            :func:`cross_entropy`.
        iterations: Newton steps, one or more, that find the normalisation before the derivatives
            are taken.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis, or an option is outside its range.

    Example:
        >>> bi_tempered(torch.zeros(1, 4), torch.tensor([3]), t1=0.0, t2=1.0)
        tensor([0.3750])

    References:
        Amid et al., "Robust bi-tempered logistic loss based on Bregman divergences", 2019.
    """
    check_number("bi_tempered", "iterations", iterations, low=1)
    scores, labels, spoiled = class_inputs("bi_tempered", logits, labels, where)
    examples = tuple(labels.shape)
    t1 = option_of("bi_tempered", "t1", t1, examples, axes=1, low=0, high=1)
    t2 = option_of("bi_tempered", "t2", t2, examples, axes=1, low=1)
    label_smoothing = option_of(
        "bi_tempered", "label_smoothing", label_smoothing, examples, axes=1, low=0, high=1
    )
    log_p, power = _tempered_log_softmax(scores, t2, iterations), 1 - t1
    classes = scores.shape[-1]
    smoothing = as_tensor(label_smoothing, scores)
    y = (1 - smoothing) * one_hot(labels, classes) + smoothing / classes
    log_y = y.clamp(min=torch.finfo(y.dtype).tiny).log()  # times y: 0 at 0
    gap = ((1 + power) * log_y).exp() - ((1 + power) * log_p).exp()
    terms = y * (box_cox(log_y, power) - box_cox(log_p, power)) - gap / (1 + power)
    return finished(terms.sum(-1), where, logits, spoiled)
