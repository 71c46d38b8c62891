"""Losses that compare two distributions."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from funcloss._checks import option_of
from funcloss._numbers import finite_at_zero
from funcloss.losses._shared import finished, paired_inputs


def kl_div(
    log_probs: Float[Tensor, "*batch classes"],
    targets: Float[Tensor, "*batch classes"],
    *,
    log_target: bool = False,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Kullback-Leibler divergence, ``sum(targets * (log(targets) - log_probs))``, in nats.

    It is ``KL(targets || exp(log_probs))``, at least 0 when both are distributions. Its gradient
    with respect to ``log_probs`` is ``-targets``. It is summed over the classes, so that
    ``funcloss.mean`` is the ``"batchmean"`` of torch, whose ``"mean"`` divides by the number of
    classes as well. A class of target 0 adds exactly 0, with zero gradient, also where its
    log-probability is ``-inf``.

    Args:
        log_probs: Log-probabilities, shape ``(*batch, classes)``. They are taken as they are.
        targets: Probabilities, the shape of ``log_probs``; not negative.
        log_target: Whether ``targets`` are the logs of the probabilities.
        where: Examples that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``log_probs``.

    Raises:
        TypeError: ``log_probs`` or ``targets`` is not floating point, or ``where`` is not boolean.
        ValueError: ``targets`` or ``where`` does not fit the shape of ``log_probs``.

    Example:
        >>> kl_div(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[1.0, 0.0]]))
        tensor([0.6931])

    References:
        Kullback and Leibler, "On information and sufficiency", 1951.
    """
    names = ("log_probs", "targets")
    scores, given = paired_inputs("kl_div", log_probs, targets, where, axes=1, names=names)
    support = given != -math.inf if log_target else given != 0
    # Beyond the support every term is 1 * (log(1) - 0): 0 * -inf would be NaN.
    given = torch.where(support, given, 0.0 if log_target else 1.0)
    probs, log_targets = (given.exp(), given) if log_target else (given, given.log())
    terms = probs * (log_targets - torch.where(support, scores, 0.0))
    return finished(terms.sum(-1), where, log_probs)


def generalized_kl(
    log_predictions: Float[Tensor, "*batch classes"],
    targets: Float[Tensor, "*batch classes"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Kullback-Leibler divergence of masses, ``sum(t * log(t / p) - t + p)``, in nats.

    ``t`` are the targets and ``p = exp(log_predictions)``; neither need sum to 1. It is at least
    0, and 0 only where they are equal; where both sum to 1 it is :func:`kl_div`. Its gradient with
    respect to ``log_predictions`` is ``p - t``. It is infinite where ``p`` itself overflows: beyond
    a log-prediction of 88 in float32.

    Args:
        log_predictions: Logs of what is predicted, shape ``(*batch, classes)``.
        targets: Counts, rates or other masses, the shape of ``log_predictions``; not negative.
        where: Examples that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``log_predictions``.

    Raises:
        TypeError: ``log_predictions`` or ``targets`` is not floating point, or ``where`` is not
            boolean.
        ValueError: ``targets`` or ``where`` does not fit the shape of ``log_predictions``.

    Example:
        >>> generalized_kl(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]))
        tensor([1.2958])

    References:
        Csiszar, "Why least squares and maximum entropy?", 1991.
    """
    logs, masses = paired_inputs(
        "generalized_kl",
        log_predictions,
        targets,
        where,
        axes=1,
        names=("log_predictions", "targets"),
    )
    support = masses != 0
    gap = logs - torch.where(support, masses, 1.0).log()
    gap = torch.where(support, gap, 1.0)
    # p - t of two near masses, without their difference.
    near = masses * gap.clamp(max=1.0).expm1()
    excess = torch.where(gap < 1, near, logs.exp() - masses)
    return finished((excess - masses * gap).sum(-1), where, log_predictions)


def jensen_shannon(
    logits: Float[Tensor, "*batch classes"],
    other_logits: Float[Tensor, "*batch classes"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Jensen-Shannon divergence of two softmaxes, ``(KL(p || m) + KL(q || m)) / 2``, in nats.

    ``p`` and ``q`` are the softmaxes and ``m = (p + q) / 2``. It is symmetric, 0 where the
    distributions are equal and ``log(2)`` where they share no class. Its gradient with respect to
    ``logits`` is ``p * (a - sum(p * a)) / 2`` with ``a = log(p / m)``. A class of logit ``-inf``
    has probability 0.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        other_logits: Those of the other distribution, the shape of ``logits``; differentiated as
            well.
        where: Examples that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each example, in ``[0, log(2)]``, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``other_logits`` is not floating point, or ``where`` is not
            boolean.
        ValueError: ``other_logits`` or ``where`` does not fit the shape of ``logits``.

    Example:
        >>> jensen_shannon(torch.tensor([[9e9, 0.0]]), torch.tensor([[0.0, 9e9]]))
        tensor([0.6931])

    References:
        Lin, "Divergence measures based on the Shannon entropy", 1991.
    """
    names = ("logits", "other_logits")
    pair = paired_inputs("jensen_shannon", logits, other_logits, where, axes=1, names=names)
    # 0 * -inf is NaN; 0 times the least number is 0, and half of it may be subtracted.
    least = torch.finfo(pair[0].dtype).min / 2
    first, second = (z.log_softmax(-1).clamp(min=least) for z in pair)
    # log(p / m) = log(2) + log(sigmoid(log p - log q)), which never forms log m.
    terms = first.exp() * (math.log(2) + F.logsigmoid(first - second))
    terms = terms + second.exp() * (math.log(2) + F.logsigmoid(second - first))
    return finished(terms.sum(-1) / 2, where, logits)


def distillation(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    *,
    temperature: float | Tensor = 2.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Knowledge distillation, ``T^2 * KL(softmax(teacher / T) || softmax(student / T))``, in nats.

    ``T`` is the temperature; its square keeps the size of the gradient, which with respect to the
    student's logits is ``T * (softmax(student / T) - softmax(teacher / T))``. At ``T = 1`` it is
    :func:`soft_cross_entropy` to the teacher less the teacher's entropy; as ``T`` grows it becomes
    half the mean squared difference of the two logits, each less its own mean. The gradient reaches
    the teacher too: detach its logits unless both learn.

    Args:
        student_logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        teacher_logits: Those to learn from, the shape of ``student_logits``.
        temperature: Divisor of both logits, above 0; 1 leaves them as they are.
        where: Examples that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each example, at least 0, shape ``(*batch)``, dtype of ``student_logits``.

    Raises:
        TypeError: ``student_logits`` or ``teacher_logits`` is not floating point, or ``where`` is
            not boolean.
        ValueError: ``teacher_logits`` or ``where`` does not fit the shape of ``student_logits``,
            or ``temperature`` is not above 0.

    Example:
        >>> student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
        >>> distillation(student, teacher, temperature=2.0)
        tensor([0.4438])

    References:
        Hinton, Vinyals and Dean, "Distilling the knowledge in a neural network", 2015.
    """
    names = ("student_logits", "teacher_logits")
    pair = paired_inputs("distillation", student_logits, teacher_logits, where, axes=1, names=names)
    temperature = option_of(
        "distillation", "temperature", temperature, tuple(student_logits.shape[:-1]), axes=1, low=0,
        above=True,
    )  # fmt: skip
    student, teacher = ((z / temperature).log_softmax(-1) for z in pair)
    probs = teacher.exp()
    gap = finite_at_zero(teacher, probs) - finite_at_zero(student, probs)
    return finished((temperature**2 * probs * gap).sum(-1), where, student_logits)
