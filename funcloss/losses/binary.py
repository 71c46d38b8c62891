"""Losses of independent yes-or-no questions, one of them or one per class."""

import math

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor
from torch.nn import functional as F

from funcloss._checks import check_per_class, option_of
from funcloss._numbers import finite_at_zero, product
from funcloss.losses._shared import finished, paired_inputs, signed_inputs, states

_NAMES = ("logits", "targets")


def _finite_log(values: Tensor) -> Tensor:
    """Return the logarithm, and at 0 the least number in place of ``-inf``."""
    positive = values > 0
    # The inner where keeps 0 * inf = NaN out of the gradient.
    return torch.where(
        positive, torch.where(positive, values, 1).log(), torch.finfo(values.dtype).min
    )


def _log_sum(first: Tensor, second: Tensor) -> Tensor:
    """Return ``log(exp(first) + exp(second))``; logaddexp has NaN in its second derivative."""
    return torch.stack(torch.broadcast_tensors(first, second)).logsumexp(0)


def _entropy(z: Tensor, yes: Tensor, no: Tensor, both: float | Tensor = 1.0) -> Tensor:
    """Return ``-yes log_sigmoid(z) - no log_sigmoid(-z)`` by one logarithm; ``both`` is their sum.

    A weight of 0 times infinity is 0.
    """
    low, wrong = _sides(z, yes, no)
    small = F.softplus(low)
    small = small if isinstance(both, float) else both * small
    return small - wrong * finite_at_zero(low, wrong)


def _sides(z: Tensor, yes: Tensor, no: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``-|z|``, and what the less likely side counts: there the loss is ``|z|`` larger."""
    negative = z < 0
    # Unlike that of abs, its slope at 0 is that of one side, so the loss has its own there.
    sign = torch.where(negative, 1.0, -1.0).to(z.dtype)
    return sign * z, torch.where(negative, yes, no)


def _focused(log_factor: Tensor, values: Tensor) -> Tensor:
    """Return ``exp(log_factor) * values``; what is infinite stays so, and has a gradient."""
    lost = values == torch.inf
    return torch.where(lost, values, log_factor.exp() * torch.where(lost, 0, values))


def _smoothed(name: str, t: Tensor, smoothing: float | Tensor) -> Tensor:
    """Return the targets, ``t (1 - s) + s / 2``."""
    s = option_of(name, "label_smoothing", smoothing, tuple(t.shape), low=0, high=1)
    return t if not isinstance(s, Tensor) and s == 0 else t * (1 - s) + s / 2


@states(targets="bits")
def binary_cross_entropy(
    probabilities: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Binary cross-entropy, ``-t log(p) - (1 - t) log(1 - p)``, in nats, elementwise.

    Each logarithm is at least -100, as in ``torch.nn.functional.binary_cross_entropy``, so the
    loss lies in ``[0, 100]``. Its gradient with respect to ``p`` is ``(p - t) / (p * (1 - p))``; a
    logarithm at its bound gives 0 (torch bounds the divisor by 1e-12 instead). An example is one
    probability. Where logits are at hand, :func:`binary_cross_entropy_with_logits` is exact.

    Args:
        probabilities: Probabilities of the class 1, in ``[0, 1]``, shape ``(*batch)``.
        targets: 0 or 1, or a probability, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``probabilities``.

    Raises:
        TypeError: ``probabilities`` or ``targets`` is not floating point, or ``where`` not boolean.
        ValueError: the shapes differ.

    Example:
        >>> binary_cross_entropy(torch.tensor([0.5, 0.25, 0.0]), torch.tensor([1.0, 0.0, 1.0]))
        tensor([  0.6931,   0.2877, 100.0000])

    References:
        Bishop, "Pattern Recognition and Machine Learning", 2006, eq. 4.90.
    """
    names = ("probabilities", "targets")
    p, t = paired_inputs("binary_cross_entropy", probabilities, targets, where, names=names)
    # Below the least normal number 1 / p would overflow.
    yes = p > max(math.exp(-100), torch.finfo(p.dtype).tiny)
    no = p < 1
    log_yes = torch.where(yes, torch.where(yes, p, 1).log(), -100)
    log_no = torch.where(no, torch.where(no, -p, 0).log1p(), -100)
    return finished(-t * log_yes - (1 - t) * log_no, where, probabilities)


@states(targets="bits")
def binary_cross_entropy_with_logits(
    logits: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    pos_weight: float | Tensor = 1.0,
    label_smoothing: float | Tensor = 0.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Binary cross-entropy of logits, ``-w t log_sigmoid(z) - (1 - t) log_sigmoid(-z)``.

    In nats, elementwise: an example is one logit. At ``w = 1`` its gradient with respect to the
    logit is ``sigmoid(z) - t``. An infinite logit that is right costs 0, one that is wrong inf.

    Args:
        logits: Log-odds of the class 1, shape ``(*batch)``.
        targets: 0 or 1, or a probability, shape ``(*batch)``.
        pos_weight: Weight ``w`` of the class 1, at least 0: a number, a scalar tensor, one per
            example or one per entry of the last axis, such as one per class.
        label_smoothing: Share ``s`` of each target that becomes 1/2, ``t (1 - s) + s / 2``, in
            ``[0, 1]``: a number, a scalar tensor or one per example.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``targets`` is not floating point, or ``where`` is not boolean.
        ValueError: the shapes differ, or an option does not fit them or is outside its range.

    Example:
        >>> logits, targets = torch.zeros(2), torch.tensor([0.0, 1.0])
        >>> binary_cross_entropy_with_logits(logits, targets, pos_weight=3.0)
        tensor([0.6931, 2.0794])

    References:
        Bishop, "Pattern Recognition and Machine Learning", 2006, eq. 4.90; smoothing: Szegedy et
        al., "Rethinking the Inception architecture for computer vision", 2016, with two classes.
    """
    name = "binary_cross_entropy_with_logits"
    z, t = paired_inputs(name, logits, targets, where, names=_NAMES)
    columns = logits.shape[-1] if logits.dim() else None
    pos_weight = option_of(name, "pos_weight", pos_weight, tuple(z.shape), columns=columns, low=0)
    t = _smoothed(name, t, label_smoothing)
    if not isinstance(pos_weight, Tensor) and pos_weight == 1:
        return finished(_entropy(z, t, 1 - t), where, logits)
    yes, no = pos_weight * t, 1 - t
    return finished(_entropy(z, yes, no, yes + no), where, logits)


def multilabel_soft_margin(
    logits: Float[Tensor, "*batch classes"],
    targets: Float[Tensor, "*batch classes"],
    *,
    class_weights: Float[Tensor, " classes"] | None = None,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Mean over the classes of ``w_c`` times the binary cross-entropy of logit and target.

    In nats, divided by the number of classes and not by the sum of the weights, as
    ``torch.nn.functional.multilabel_soft_margin_loss`` does. Its gradient with respect to the
    logits is ``w * (sigmoid(z) - t) / classes``.

    Args:
        logits: Log-odds of each class, shape ``(*batch, classes)``.
        targets: 1 for each class that applies, else 0, the shape of ``logits``.
        class_weights: Weight ``w`` of each class, shape ``(classes,)``; None: all 1.
        where: Examples that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: a tensor is not floating point, or ``where`` is not boolean.
        ValueError: ``targets``, ``where`` or ``class_weights`` does not fit ``logits``.

    Example:
        >>> multilabel_soft_margin(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([0.6931])

    References:
        Bishop, "Pattern Recognition and Machine Learning", 2006, eq. 4.90, for each class.
    """
    name = "multilabel_soft_margin"
    z, t = paired_inputs(name, logits, targets, where, axes=1, names=_NAMES)
    loss = _entropy(z, t, 1 - t)
    if class_weights is not None:
        check_per_class(name, "class_weights", class_weights, logits)
        loss = product(class_weights, loss)
    return finished(loss.mean(-1), where, logits)


@states(targets="signs")
def soft_margin(
    scores: Float[Tensor, "*batch"],
    signs: Num[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Logistic loss of a signed score, ``log(1 + exp(-sign * score))``, in nats.

    Its gradient with respect to the score is ``-sign * sigmoid(-sign * score)``. It is
    :func:`binary_cross_entropy_with_logits` at the target ``(sign + 1) / 2``.

    Args:
        scores: Signed scores, the log-odds of the class +1, shape ``(*batch)``.
        signs: True classes, -1 or +1, floating or integer, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``scores``.

    Raises:
        TypeError: ``scores`` is not floating point, ``signs`` is boolean, or ``where`` is not.
        ValueError: the shapes differ.

    Example:
        >>> soft_margin(torch.tensor([0.0, 2.0]), torch.tensor([1, -1]))
        tensor([0.6931, 2.1269])

    References:
        Hastie, Tibshirani and Friedman, "The Elements of Statistical Learning", 2009.
    """
    z, s = signed_inputs("soft_margin", scores, signs, where)
    return finished(-F.logsigmoid(s * z), where, scores)


@states(targets="bits")
def sigmoid_focal(
    logits: Float[Tensor, "*batch"],
    targets: Float[Tensor, "*batch"],
    *,
    gamma: float | Tensor = 2.0,
    alpha: float | Tensor | None = None,
    label_smoothing: float | Tensor = 0.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Focal loss of logits, ``(1 - p_t)^gamma`` times the binary cross-entropy, elementwise.

    Here ``p_t = t * p + (1 - t) * (1 - p)`` with ``p = sigmoid(z)``. In nats; an example is one
    logit. With ``alpha`` it is weighted by ``alpha`` at target 1 and by ``1 - alpha`` at 0. At
    ``gamma = 0`` it is :func:`binary_cross_entropy_with_logits`. The focusing weight is part of the
    gradient.

    Args:
        logits: Log-odds of the class 1, shape ``(*batch)``.
        targets: 0 or 1, or a probability, shape ``(*batch)``.
        gamma: Focus on what is hard, not negative: a number, a scalar tensor, one per example or
            one per entry of the last axis.
        alpha: Weight of the class 1, in ``[0, 1]``, of the same shapes; None weighs nothing
            (torchvision's -1).
        label_smoothing: Share ``s`` of each target that becomes 1/2, ``t (1 - s) + s / 2``, in
            ``[0, 1]``: a number, a scalar tensor or one per example.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``targets`` is not floating point, or ``where`` is not boolean.
        ValueError: the shapes differ, or an option does not fit them or is outside its range.

    Example:
        >>> sigmoid_focal(torch.zeros(2), torch.tensor([0.0, 1.0]), alpha=0.25)
        tensor([0.1300, 0.0433])

    References:
        Lin et al., "Focal loss for dense object detection", 2017.
    """
    name = "sigmoid_focal"
    z, t = paired_inputs(name, logits, targets, where, names=_NAMES)
    examples, columns = tuple(z.shape), z.shape[-1] if z.dim() else None
    gamma = option_of(name, "gamma", gamma, examples, columns=columns, low=0)
    t = _smoothed(name, t, label_smoothing)
    low, wrong = _sides(z, t, 1 - t)
    small, costly = F.softplus(low), wrong
    entropy = small
    if alpha is not None:
        alpha = option_of(name, "alpha", alpha, examples, columns=columns, low=0, high=1)
        weight = alpha * t + (1 - alpha) * (1 - t)
        costly, entropy = weight * wrong, weight * small
    entropy = entropy - costly * finite_at_zero(low, costly)
    # 1 - p_t is (wrong + (1 - wrong) exp(-|z|)) / (1 + exp(-|z|)); as a power it has no finite
    # derivative where p_t rounds to 1.
    mixed = torch.where(wrong > 0, wrong + (1 - wrong) * low.exp(), 1)
    log_wrong = torch.where(wrong > 0, mixed.log(), finite_at_zero(low, wrong)) - small
    return finished(_focused(gamma * log_wrong, entropy), where, logits)


def asymmetric(
    logits: Float[Tensor, "*batch classes"],
    targets: Float[Tensor, "*batch classes"],
    *,
    gamma_pos: float | Tensor = 0.0,
    gamma_neg: float | Tensor = 4.0,
    shift: float | Tensor = 0.05,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Asymmetric loss of many labels: negatives are focused more, easy ones not counted at all.

    With ``p = sigmoid(z)`` and ``q = max(p - shift, 0)`` it is the sum over the classes of
    ``-t (1 - p)^gamma_pos log(p) - (1 - t) q^gamma_neg log(1 - q)``, in nats, divided by nothing.
    At ``shift = 0`` and equal gammas it is the sum of :func:`sigmoid_focal`. The focusing weights
    are part of the gradient (the published code has a switch that detaches them), and no logarithm
    is cut off (there, at 1e-8).

    Args:
        logits: Log-odds of each class, shape ``(*batch, classes)``.
        targets: 1 for each class that applies, else 0, the shape of ``logits``.
        gamma_pos: Focus of the targets of 1, not negative: a number, a scalar tensor or one per
            example.
        gamma_neg: Focus of the targets of 0, of the same.
        shift: Probability below which a target of 0 costs nothing, in ``[0, 1]``, of the same.
        where: Examples that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``targets`` is not floating point, or ``where`` is not boolean.
        ValueError: ``targets`` or ``where`` does not fit the shape of ``logits``, or an option is
            outside its range.

    Example:
        >>> asymmetric(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), gamma_neg=1.0)
        tensor([0.9622])

    References:
        Ridnik et al., "Asymmetric loss for multi-label classification", 2021.
    """
    name = "asymmetric"
    z, t = paired_inputs(name, logits, targets, where, axes=1, names=_NAMES)

    def checked(what: str, value: float | Tensor, high: float = math.inf) -> float | Tensor:
        return option_of(name, what, value, tuple(z.shape[:-1]), axes=1, low=0, high=high)

    gamma_pos, gamma_neg = checked("gamma_pos", gamma_pos), checked("gamma_neg", gamma_neg)
    shift = checked("shift", shift, 1.0)
    log_yes, log_no = F.logsigmoid(z), F.logsigmoid(-z)
    # Finite where it is multiplied by a gamma or a target that may be 0.
    power = gamma_pos * log_no.clamp(min=torch.finfo(z.dtype).min / 2)
    positive = _focused(power, -finite_at_zero(log_yes, t))
    negative = _shifted_negative(z, (log_yes, log_no), 1 - t, gamma_neg, shift)
    return finished((t * positive + (1 - t) * negative).sum(-1), where, logits)


def _shifted_negative(
    z: Tensor,
    logs: tuple[Tensor, Tensor],
    weight: Tensor,
    gamma: float | Tensor,
    shift: float | Tensor,
) -> Tensor:
    """Return ``-q^gamma log(1 - q)`` of ``q = max(sigmoid(z) - shift, 0)``, finite at weight 0."""
    log_yes, log_no = logs
    cut = shift.to(z.dtype) if isinstance(shift, Tensor) else torch.full_like(z, shift)
    p = z.sigmoid()
    counts = (p > cut) & (p > torch.finfo(z.dtype).tiny)
    # log(q) = log(p) + log(1 - shift / p), finite also where nothing counts.
    log_q = torch.where(counts, log_yes, 0)
    log_q = log_q + torch.where(counts, -cut / torch.where(counts, p, 1), 0).log1p()
    log_rest = torch.where(cut == 0, log_no, _log_sum(log_no, _finite_log(cut)))
    log_rest = finite_at_zero(log_rest, weight)
    return torch.where(counts, _focused(gamma * log_q, -log_rest), 0)
