"""Losses of one label an example, or of one distribution over the classes."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funcloss._checks import check_number, check_per_class, option_of
from funcloss._numbers import finite_at_zero, product
from funcloss.losses._shared import class_inputs, finished, of_label, one_hot, paired_inputs, states


@states(probabilities="softmax")
def cross_entropy(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    label_smoothing: float | Tensor = 0.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Cross-entropy of ``softmax(logits)`` and labels, ``-log_softmax(logits)[label]``, in nats.

    With ``label_smoothing`` :math:`\varepsilon` it is the cross-entropy to the distribution
    ``(1 - eps) * one_hot(label) + eps / classes``. Its gradient with respect to the logits is
    ``softmax(logits)`` less that distribution.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``. Log-probabilities
            are logits too: the softmax leaves them as they are.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        label_smoothing: Part of the target spread over all classes, in ``[0, 1]``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its class
            axis, or ``label_smoothing`` is outside its range.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])

    References:
        Bishop, "Pattern Recognition and Machine Learning", 2006, eq. 4.108; smoothing: Szegedy et
        al., "Rethinking the inception architecture for computer vision", 2016.
    """
    scores, labels, spoiled = class_inputs("cross_entropy", logits, labels, where)
    label_smoothing = option_of(
        "cross_entropy", "label_smoothing", label_smoothing, tuple(labels.shape), low=0, high=1
    )
    log_probs, log_sum = _unnormalised(scores)
    loss = log_sum - of_label(log_probs, labels)
    if isinstance(label_smoothing, Tensor) or label_smoothing > 0:
        even = log_sum - log_probs.mean(-1)
        loss = product(1 - label_smoothing, loss) + product(label_smoothing, even)
    return finished(loss, where, logits, spoiled)


def _unnormalised(scores: Tensor) -> tuple[Tensor, Tensor | float]:
    """Return log-probabilities but for a constant a row, and the constant; neither is large."""
    if not torch.compiler.is_compiling():
        return scores.log_softmax(-1), 0.0
    # Normalised only after the label is picked, the compiler reads the scores once less.
    shifted = scores - scores.amax(-1, keepdim=True).detach()
    return shifted, shifted.exp().sum(-1).log()


@states(probabilities="softmax")
def soft_cross_entropy(
    logits: Float[Tensor, "*batch classes"],
    targets: Float[Tensor, "*batch classes"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy of ``softmax(logits)`` and a distribution, ``-sum(targets * log_softmax)``.

    In nats. Its gradient with respect to the logits is ``softmax(logits) * sum(targets) -
    targets``; at a one-hot target it is :func:`cross_entropy`. A logit of ``-inf`` adds 0
    where its target is 0; elsewhere the loss is infinite.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        targets: Probabilities, the shape of ``logits``.
        where: Examples that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``targets`` is not floating point, or ``where`` is not boolean.
        ValueError: ``targets`` or ``where`` does not fit the shape of ``logits``.

    Example:
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.tensor([[0.25, 0.75]]))
        tensor([0.6931])

    References:
        Bishop, "Pattern Recognition and Machine Learning", 2006, eq. 4.108.
    """
    names = ("logits", "targets")
    scores, probs = paired_inputs("soft_cross_entropy", logits, targets, where, axes=1, names=names)
    log_probs, log_sum = _unnormalised(scores)
    loss = -(probs * finite_at_zero(log_probs, probs)).sum(-1)
    if isinstance(log_sum, Tensor):
        loss = log_sum * probs.sum(-1) + loss
    return finished(loss, where, logits)


@states(probabilities="softmax")
def nll(
    log_probs: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Negative log-likelihood of the labels, ``-log_probs[label]``, in nats.

    Its gradient with respect to ``log_probs`` is ``-one_hot(label)``.

    Args:
        log_probs: Log-probabilities, shape ``(*batch, classes)``. They are taken as they are: for
            unnormalised scores use :func:`cross_entropy`.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``log_probs``.

    Raises:
        TypeError: ``log_probs`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``log_probs`` less its class
            axis.

    Example:
        >>> nll(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), torch.tensor([0, 1]))
        tensor([0.6931, 0.2877])

    References:
        Bishop, "Pattern Recognition and Machine Learning", 2006, eq. 4.108.
    """
    scores, labels, spoiled = class_inputs("nll", log_probs, labels, where)
    # One entry a row is all that is read: a sum over the classes, even fused, would read them all.
    loss = -scores.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return finished(loss, where, log_probs, spoiled)


def _log_of_others(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Return ``log(1 - p_label)`` as the sum of the others, which does not round to ``-inf``."""
    label, least = one_hot(labels, log_probs.shape[-1]), torch.finfo(log_probs.dtype).min
    return torch.where(label, least, log_probs.clamp(min=least)).logsumexp(-1)


@states(probabilities="softmax")
def softmax_focal(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    gamma: float | Tensor = 2.0,
    alpha: float | Float[Tensor, " classes"] | None = None,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Focal loss of ``p = softmax(logits)``, ``-alpha_y * (1 - p_y)^gamma * log(p_y)``, in nats.

    At ``gamma = 0`` it is :func:`cross_entropy`. Its gradient with respect to the logits is
    ``alpha_y * ((1 - p_y)^gamma - gamma * p_y * (1 - p_y)^(gamma - 1) * log(p_y))`` times
    ``p - one_hot(label)``.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        gamma: Focus on what is hard, not negative.
        alpha: Weight of each true class, shape ``(classes,)``, or one number for all of them;
            None: all 1.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``alpha`` is not floating point, ``labels`` is, or ``where`` is not
            boolean.
        ValueError: a shape does not fit ``logits``, or ``gamma`` is negative.

    Example:
        >>> softmax_focal(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([0.7798, 0.7798])

    References:
        Lin et al., "Focal loss for dense object detection", 2017.
    """
    scores, labels, spoiled = class_inputs("softmax_focal", logits, labels, where)
    gamma = option_of("softmax_focal", "gamma", gamma, tuple(labels.shape), low=0)
    log_probs = scores.log_softmax(-1)
    # As a power, (1 - p)^gamma has no finite derivative where p rounds to 1.
    loss = (gamma * _log_of_others(log_probs, labels)).exp() * -of_label(log_probs, labels)
    if alpha is not None:
        if isinstance(alpha, Tensor) and alpha.dim():
            check_per_class("softmax_focal", "alpha", alpha, logits)
            alpha = of_label(alpha.expand(scores.shape), labels)
        else:
            check_number("softmax_focal", "alpha", alpha, low=0)
        loss = product(alpha, loss)
    return finished(loss, where, logits, spoiled)


@states(probabilities="softmax")
def poly1(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    epsilon: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Poly-1 cross-entropy, ``-log(p_y) + epsilon * (1 - p_y)`` of ``p = softmax(logits)``.

    In nats: the first coefficient of cross-entropy's series in ``1 - p_y`` is moved by ``epsilon``.
    At ``epsilon = 0`` it is :func:`cross_entropy`. Its gradient with respect to the logits is
    ``(1 + epsilon * p_y) * (p - one_hot(label))``.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        epsilon: Change of the first coefficient, -1 or more.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis, or ``epsilon`` is below -1.

    Example:
        >>> poly1(torch.zeros(2, 4), torch.tensor([0, 3]), epsilon=2.0)
        tensor([2.8863, 2.8863])

    References:
        Leng et al., "PolyLoss: a polynomial expansion perspective of classification loss
        functions", 2022.
    """
    scores, labels, spoiled = class_inputs("poly1", logits, labels, where)
    epsilon = option_of("poly1", "epsilon", epsilon, tuple(labels.shape), low=-1)
    log_prob = of_label(scores.log_softmax(-1), labels)
    return finished(-log_prob - epsilon * log_prob.expm1(), where, logits, spoiled)


@states(probabilities="softmax")
def asymmetric_single_label(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    gamma_pos: float | Tensor = 0.0,
    gamma_neg: float | Tensor = 4.0,
    label_smoothing: float | Tensor = 0.1,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Asymmetric loss of one label, ``-sum_k t_k * w_k * log(p_k)`` of ``p = softmax(logits)``.

    The weight ``w`` is ``(1 - p_y)^gamma_pos`` at the label and ``p_k^gamma_neg`` elsewhere; ``t``
    is the label smoothed, ``(1 - eps) * one_hot(label) + eps / classes``. In nats. With both gammas
    0 it is :func:`cross_entropy`; without smoothing only the label counts, and it is
    :func:`softmax_focal` at ``gamma_pos``. The weights are part of the gradient.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        gamma_pos: Focus of the label, not negative.
        gamma_neg: Focus of the other classes, not negative.
        label_smoothing: Part ``eps`` of the target spread over all classes, in ``[0, 1]``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis, or an option is outside its range.

    Example:
        >>> asymmetric_single_label(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.2827, 1.2827])

    References:
        Ridnik et al., "Asymmetric loss for multi-label classification", 2021: the single-label
        form of its code.
    """
    name = "asymmetric_single_label"
    scores, labels, spoiled = class_inputs(name, logits, labels, where)
    examples = tuple(labels.shape)
    gamma_pos = option_of(name, "gamma_pos", gamma_pos, examples, axes=1, low=0)
    gamma_neg = option_of(name, "gamma_neg", gamma_neg, examples, axes=1, low=0)
    label_smoothing = option_of(
        name, "label_smoothing", label_smoothing, examples, axes=1, low=0, high=1
    )
    log_probs, classes = scores.log_softmax(-1), scores.shape[-1]
    label = one_hot(labels, classes)
    log_others = _log_of_others(log_probs, labels).unsqueeze(-1)
    finite = log_probs.clamp(min=torch.finfo(scores.dtype).min)
    weights = torch.where(label, gamma_pos * log_others, gamma_neg * finite).exp()
    targets = (1 - label_smoothing) * label.to(scores.dtype) + label_smoothing / classes
    weights = targets * weights
    return finished(-(weights * finite_at_zero(log_probs, weights)).sum(-1), where, logits, spoiled)
