"""Losses for classes that do not come equally often."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from funcloss._checks import check_floating, check_per_class, option_of
from funcloss._numbers import product, wide_dtype
from funcloss.losses._shared import class_inputs, finished, of_label, one_hot, states
from funcloss.typing import Correction

# What a count of 0 is taken as, in every dtype: the least normal number of float32.
_ABSENT = 2.0**-126


def effective_number_weights(
    class_counts: Float[Tensor, " classes"], *, beta: float | Tensor = 0.9999
) -> Float[Tensor, " classes"]:
    r"""Class weights by the effective number of examples, ``(1 - beta) / (1 - beta^count)``.

    Scaled to sum to the number of classes. At ``beta = 0`` all weights are 1, at ``beta = 1``, the
    limit, they go as ``1 / count``. An absent class gets 0. They are meant for
    :func:`funcloss.class_weighted`, which makes the class-balanced loss of the paper.

    Args:
        class_counts: Training examples of each class, shape ``(classes,)``.
        beta: How slowly another example of a class loses its novelty, in ``[0, 1]``.

    Returns:
        Weights, shape ``(classes,)``, dtype of ``class_counts``; NaN when every count is 0.

    Raises:
        TypeError: ``class_counts`` is not floating point.
        ValueError: ``class_counts`` is not a vector, or ``beta`` is outside its range.

    Example:
        >>> effective_number_weights(torch.tensor([1.0, 2.0]), beta=0.5)
        tensor([1.2000, 0.8000])

    References:
        Cui et al., "Class-balanced loss based on effective number of samples", 2019.
    """
    name = "effective_number_weights"
    beta = option_of(name, "beta", beta, None, low=0, high=1)
    check_floating(name, "class_counts", class_counts)
    if class_counts.dim() != 1:
        got = tuple(class_counts.shape)
        raise ValueError(f"{name}: class_counts must have shape (classes,), got {got}")
    counts = class_counts.to(wide_dtype(class_counts))
    return _effective_weights(counts, beta).to(class_counts.dtype)


def _effective_weights(counts: Tensor, beta: float | Tensor) -> Tensor:
    """Return the weights of the classes; ``beta`` may have one entry per example, ``(n, 1)``."""
    # In float32 the 1 - beta of a plain 0.9999 would be off by 2e-4, so take its logarithm before.
    base = beta if isinstance(beta, Tensor) else torch.tensor(beta, dtype=torch.float64)
    # A logarithm of 0 would be 0 / 0; this close to it the quotient is the limit to the last bit.
    log_beta = base.log().to(counts).clamp(max=-1e-30)
    weights = log_beta.expm1() / (log_beta * torch.where(counts > 0, counts, 1)).expm1()
    weights = torch.where(counts > 0, weights, 0)
    return weights * (counts.shape[0] / weights.sum(-1, keepdim=True))


def _of_effective_number(*, class_counts: Tensor, beta: float | Tensor = 0.9999) -> Correction:
    return Correction(offset=-effective_number_weights(class_counts, beta=beta).log())


@states(probabilities=_of_effective_number)
def class_balanced(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    class_counts: Float[Tensor, " classes"],
    beta: float | Tensor = 0.9999,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy weighted by :func:`effective_number_weights` of the class, in nats.

    The weights are scaled to a mean of 1 over the training examples, so that ``beta`` moves the
    balance and not the size of the steps. The gradient is the weight of the label times
    ``softmax(logits) - one_hot(label)``. At ``beta = 0`` it is :func:`cross_entropy`.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        class_counts: Training examples of each class, shape ``(classes,)``. A class of count 0
            has weight 0.
        beta: How slowly another example of a class loses its novelty, in ``[0, 1]``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, not negative, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``class_counts`` is not floating point, ``labels`` is, or ``where``
            is not boolean.
        ValueError: ``labels``, ``where`` or ``class_counts`` does not fit the shape of ``logits``,
            or ``beta`` is outside its range.

    Example:
        >>> class_balanced(torch.zeros(2, 2), torch.tensor([0, 1]),
        ...                class_counts=torch.tensor([1.0, 2.0]), beta=0.5)
        tensor([0.8912, 0.5941])

    References:
        Cui et al., "Class-balanced loss based on effective number of samples", 2019.
    """
    scores, labels, spoiled = class_inputs("class_balanced", logits, labels, where)
    check_per_class("class_balanced", "class_counts", class_counts, logits)
    beta = option_of("class_balanced", "beta", beta, tuple(labels.shape), axes=1, low=0, high=1)
    counts = class_counts.to(scores.dtype)
    weights = _effective_weights(counts, beta)
    weights = weights * (counts.sum() / (weights * counts).sum(-1, keepdim=True))
    of_class = of_label(weights.expand_as(scores), labels)
    return finished(product(of_class, _nll(scores, labels)), where, logits, spoiled)


def _of_counts(*, class_counts: Tensor) -> Correction:
    return Correction(offset=_log(class_counts, class_counts.dtype))


@states(probabilities=_of_counts)
def balanced_softmax(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    class_counts: Float[Tensor, " classes"],
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy of ``softmax(logits + log(class_counts))`` and labels, in nats.

    Trained so, ``softmax(logits)`` without the counts is the posterior under equally frequent
    classes. The gradient is ``softmax(logits + log(class_counts)) - one_hot(label)``. A factor
    common to all counts cancels: equal counts give :func:`cross_entropy`, and the class prior
    gives the same as the counts (:func:`logit_adjusted` at ``tau = 1``).

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        class_counts: Training examples of each class, shape ``(classes,)``. A 0 is taken as
            ``2^-126``: the class is left out of the softmax, and as a label costs 87 nats more
            than at a count of 1.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, not negative, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``class_counts`` is not floating point, ``labels`` is, or ``where``
            is not boolean.
        ValueError: ``labels``, ``where`` or ``class_counts`` does not fit the shape of ``logits``.

    Example:
        >>> balanced_softmax(torch.zeros(2, 2), torch.tensor([0, 1]),
        ...                  class_counts=torch.tensor([1.0, 3.0]))
        tensor([1.3863, 0.2877])

    References:
        Ren et al., "Balanced meta-softmax for long-tailed visual recognition", 2020.
    """
    scores, labels, spoiled = class_inputs("balanced_softmax", logits, labels, where)
    check_per_class("balanced_softmax", "class_counts", class_counts, logits)
    return finished(_nll(scores + _log(class_counts, scores.dtype), labels), where, logits, spoiled)


def _of_prior(*, class_prior: Tensor, tau: float | Tensor = 1.0) -> Correction:
    return Correction(offset=tau * _log(class_prior, class_prior.dtype))


@states(probabilities=_of_prior)
def logit_adjusted(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    class_prior: Float[Tensor, " classes"],
    tau: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy of ``softmax(logits + tau * log(class_prior))`` and labels, in nats.

    At ``tau = 1`` the largest logit is the decision of least balanced error. The gradient is
    ``softmax(logits + tau * log(class_prior)) - one_hot(label)``. At ``tau = 0`` it is
    :func:`cross_entropy`, at ``tau = 1`` :func:`balanced_softmax`.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        class_prior: Frequency of each class, shape ``(classes,)``; a common factor cancels. A 0 is
            taken as ``2^-126``, 87 nats below 1.
        tau: Strength of the adjustment, not negative.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, not negative, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``class_prior`` is not floating point, ``labels`` is, or ``where``
            is not boolean.
        ValueError: ``labels``, ``where`` or ``class_prior`` does not fit the shape of ``logits``,
            or ``tau`` is outside its range.

    Example:
        >>> logit_adjusted(torch.zeros(2, 2), torch.tensor([0, 1]),
        ...                class_prior=torch.tensor([0.25, 0.75]))
        tensor([1.3863, 0.2877])

    References:
        Menon et al., "Long-tail learning via logit adjustment", 2021, eq. 10.
    """
    scores, labels, spoiled = class_inputs("logit_adjusted", logits, labels, where)
    tau = option_of("logit_adjusted", "tau", tau, tuple(labels.shape), axes=1, low=0)
    check_per_class("logit_adjusted", "class_prior", class_prior, logits)
    return finished(
        _nll(scores + tau * _log(class_prior, scores.dtype), labels), where, logits, spoiled
    )


@states(probabilities="softmax")
def ldam(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    class_counts: Float[Tensor, " classes"],
    max_margin: float | Tensor = 0.5,
    scale: float | Tensor = 30.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Label-distribution-aware margin: cross-entropy of ``scale * (logits - margin of label)``.

    The logit of the label is lowered by ``max_margin * (least count / count)^(1/4)``, so that the
    rarest class keeps the widest margin; in nats. The gradient is ``scale`` times the softmax of
    these scores less ``one_hot(label)``. At ``max_margin = 0`` and ``scale = 1`` it is
    :func:`cross_entropy`.

    Args:
        logits: Cosines of features and class vectors in the paper, shape ``(*batch, classes)``,
            which is why it scales them; any scores are accepted.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        class_counts: Training examples of each class, shape ``(classes,)``. A class of count 0 has
            the margin of the rarest present class.
        max_margin: Margin of the rarest class, in units of the logits, not negative.
        scale: Inverse temperature, above 0.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, not negative, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``class_counts`` is not floating point, ``labels`` is, or ``where``
            is not boolean.
        ValueError: ``labels``, ``where`` or ``class_counts`` does not fit the shape of ``logits``,
            or ``max_margin`` or ``scale`` is outside its range.

    Example:
        >>> ldam(torch.zeros(2, 2), torch.tensor([0, 1]), class_counts=torch.tensor([16.0, 1.0]),
        ...      scale=1.0)
        tensor([0.8259, 0.9741])

    References:
        Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", 2019.
    """
    scores, labels, spoiled = class_inputs("ldam", logits, labels, where)
    examples = tuple(labels.shape)
    max_margin = option_of("ldam", "max_margin", max_margin, examples, axes=1, low=0)
    scale = option_of("ldam", "scale", scale, examples, axes=1, low=0, above=True)
    check_per_class("ldam", "class_counts", class_counts, logits)
    counts = class_counts.to(scores.dtype)
    rarest = torch.where(counts > 0, counts, torch.inf).amin()
    margins = max_margin * (rarest / torch.where(counts > 0, counts, rarest)) ** 0.25
    margins = torch.where(one_hot(labels, scores.shape[-1]), margins, 0)
    return finished(_nll(scale * (scores - margins), labels), where, logits, spoiled)


def _of_vector_scaling(
    *, class_counts: Tensor, gamma: float | Tensor = 0.2, tau: float | Tensor = 1.0
) -> Correction:
    log_counts = _log(class_counts, class_counts.dtype)
    relative = log_counts - log_counts.amax()
    return Correction((gamma * relative).exp(), tau * relative)


@states(probabilities=_of_vector_scaling)
def vector_scaling(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    class_counts: Float[Tensor, " classes"],
    gamma: float | Tensor = 0.2,
    tau: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Vector scaling: cross-entropy of ``(n / max(n))^gamma * logits + tau * log(n)``, in nats.

    Here ``n`` is ``class_counts``. The factors act late in a training, when the logits have grown,
    the terms early. The gradient is ``(n / max(n))^gamma`` times the softmax of these scores less
    ``one_hot(label)``. At ``gamma = 0`` it is :func:`logit_adjusted`, at ``tau = 0`` the
    class-dependent temperatures (CDT) of Ye et al., at both :func:`cross_entropy`.

    Args:
        logits: Unnormalised scores, shape ``(*batch, classes)``. Unlike those of a softmax, their
            common shift matters unless ``gamma`` is 0.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        class_counts: Training examples of each class, shape ``(classes,)``; a common factor
            cancels. A 0 is taken as ``2^-126``.
        gamma: Strength of the factors, not negative. The paper tunes it, and ``tau``, per data set.
        tau: Strength of the terms, not negative.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, not negative, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``class_counts`` is not floating point, ``labels`` is, or ``where``
            is not boolean.
        ValueError: ``labels``, ``where`` or ``class_counts`` does not fit the shape of ``logits``,
            or ``gamma`` or ``tau`` is outside its range.

    Example:
        >>> vector_scaling(torch.tensor([[2.0, 0.0]]), torch.tensor([0]),
        ...                class_counts=torch.tensor([1.0, 4.0]), gamma=0.5, tau=0.0)
        tensor([0.3133])

    References:
        Kini et al., "Label-imbalanced and group-sensitive classification under
        overparameterization", 2021; Ye et al., "Identifying and compensating for feature deviation
        in imbalanced deep learning", 2020.
    """
    scores, labels, spoiled = class_inputs("vector_scaling", logits, labels, where)
    examples = tuple(labels.shape)
    gamma = option_of("vector_scaling", "gamma", gamma, examples, axes=1, low=0)
    tau = option_of("vector_scaling", "tau", tau, examples, axes=1, low=0)
    check_per_class("vector_scaling", "class_counts", class_counts, logits)
    counts = class_counts.to(scores.dtype)
    scale, offset = _of_vector_scaling(class_counts=counts, gamma=gamma, tau=tau)
    return finished(_nll(scale * scores + offset, labels), where, logits, spoiled)


@states(probabilities="softmax")
def equalization(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    class_counts: Float[Tensor, " classes"],
    threshold: float | Tensor,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Equalization: binary cross-entropies that spare a rare class the examples of the others.

    The sum over classes :math:`j` of :math:`-w_j \log \hat p_j`, in nats, where :math:`\hat p_j`
    is ``sigmoid(logit)`` for the label and ``1 - sigmoid(logit)`` for the others, and
    :math:`w_j = 1 - E\,T(f_j)\,(1 - y_j)` with :math:`T(f_j) = 1` where the frequency
    :math:`f_j = n_j / \sum n` is below ``threshold``, else 0. Every example here belongs to a
    class, so the paper's :math:`E`, which is 0 for background, is 1. The gradient is
    ``w * (sigmoid(logits) - one_hot(label))``. At ``threshold = 0`` it is the sum of the binary
    cross-entropies.

    Args:
        logits: Log-odds of each class, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        class_counts: Training examples of each class, shape ``(classes,)``; zeros are allowed.
        threshold: Frequency below which a class is rare, in ``[0, 1]``; 1.76e-3 in the paper, for
            1230 classes. The value jumps as a class passes it: it has no useful derivative.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, not negative, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``class_counts`` is not floating point, ``labels`` is, or ``where``
            is not boolean.
        ValueError: ``labels``, ``where`` or ``class_counts`` does not fit the shape of ``logits``,
            or ``threshold`` is outside its range.

    Example:
        >>> equalization(torch.zeros(2, 3), torch.tensor([0, 2]), threshold=0.1,
        ...              class_counts=torch.tensor([60.0, 39.0, 1.0]))
        tensor([1.3863, 2.0794])

    References:
        Tan et al., "Equalization loss for long-tailed object recognition", 2020.
    """
    scores, labels, spoiled = class_inputs("equalization", logits, labels, where)
    threshold = option_of(
        "equalization", "threshold", threshold, tuple(labels.shape), axes=1, low=0, high=1
    )
    check_per_class("equalization", "class_counts", class_counts, logits)
    counts = class_counts.to(scores.dtype)
    is_label = one_hot(labels, scores.shape[-1])
    # Not softplus, which torch rounds to its argument from 20 on.
    terms = -F.logsigmoid(torch.where(is_label, scores, -scores))
    counted = is_label | (counts >= threshold * counts.sum())
    return finished(torch.where(counted, terms, 0).sum(-1), where, logits, spoiled)


def _log(frequencies: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the logarithm of what may be 0, finite, in a dtype."""
    wide = frequencies.to(dtype)
    return torch.where(wide > 0, wide, _ABSENT).log()


def _nll(scores: Tensor, labels: Tensor) -> Tensor:
    return -of_label(scores.log_softmax(-1), labels)
