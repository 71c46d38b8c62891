"""Losses of ordered classes: a mistake by two classes is worse than a mistake by one."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from funcloss._checks import check_floating, check_labels, option_of
from funcloss._numbers import finite_at_zero, wide_dtype
from funcloss.losses._shared import class_inputs, finished, known_labels, states


def _classes_of(logits: Tensor, **options: object) -> int:
    """Return how many classes as many thresholds separate."""
    return logits.shape[-1] + 1


@states(classes=_classes_of, probabilities="none")
def coral(
    logits: Float[Tensor, "*batch thresholds"],
    labels: Int[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Binary cross-entropy of every threshold, ``sum_k bce(logit_k, [label > k])``, in nats.

    Logit ``k`` is that of "the class is above ``k``", one less than there are classes; the sum is
    over thresholds, nothing is divided. The gradient with respect to the logits is
    ``sigmoid(logits) - [label > k]``. The paper's model shares the weights of all thresholds and
    gives each a bias, so that its probabilities fall with ``k``; the loss does not ask for it.

    Args:
        logits: One logit a threshold, shape ``(*batch, classes - 1)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis.

    Example:
        >>> coral(torch.tensor([[9.0, -9.0], [0.0, 0.0]]), torch.tensor([1, 2]))
        tensor([2.4680e-04, 1.3863e+00])

    References:
        Cao, Mirjalili and Raschka, "Rank consistent ordinal regression for neural networks with
        application to age estimation", 2020.
    """
    scores, labels, spoiled = class_inputs(
        "coral", logits, labels, where, classes=_classes_of(logits)
    )
    return finished(_of_thresholds(scores, labels).sum(-1), where, logits, spoiled)


def coral_decision(logits: Float[Tensor, "*batch thresholds"]) -> Int[Tensor, "*batch"]:
    """Class that a :func:`coral` model decides: the number of thresholds with ``p > 1 / 2``.

    Args:
        logits: One logit a threshold, shape ``(*batch, classes - 1)``.

    Returns:
        Class indices, shape ``(*batch)``.

    Raises:
        TypeError: ``logits`` is not floating point.

    Example:
        >>> coral_decision(torch.tensor([[2.0, 1.0, -1.0], [-3.0, -4.0, -5.0]]))
        tensor([2, 0])

    References:
        Cao, Mirjalili and Raschka, "Rank consistent ordinal regression for neural networks with
        application to age estimation", 2020.
    """
    check_floating("coral_decision", "logits", logits)
    return (logits > 0).sum(-1)


@states(classes=_classes_of, probabilities="none")
def corn(
    logits: Float[Tensor, "*batch thresholds"],
    labels: Int[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Conditional thresholds, ``sum_{k <= label} bce(logit_k, [label > k])``, in nats.

    Logit ``k`` is that of "above ``k``, given above ``k - 1``", so an example trains only
    the thresholds up to its label: the value is the negative log-likelihood of the label. The
    gradient is ``sigmoid(logits) - [label > k]`` at those thresholds and 0 at the others.

    Nothing is divided here. The paper divides the sum over a batch by the number of its terms,
    ``sum_i min(label_i + 1, classes - 1)``, not by the number of examples.

    Args:
        logits: One logit a threshold, shape ``(*batch, classes - 1)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis.

    Example:
        >>> corn(torch.zeros(3, 2), torch.tensor([0, 1, 2]))
        tensor([0.6931, 1.3863, 1.3863])

    References:
        Shi, Cao and Raschka, "Deep neural networks for rank-consistent ordinal regression based on
        conditional probabilities", 2021.
    """
    scores, labels, spoiled = class_inputs(
        "corn", logits, labels, where, classes=_classes_of(logits)
    )
    reached = labels.unsqueeze(-1) >= torch.arange(scores.shape[-1], device=labels.device)
    values = torch.where(reached, _of_thresholds(scores, labels), 0.0)
    return finished(values.sum(-1), where, logits, spoiled)


def corn_decision(logits: Float[Tensor, "*batch thresholds"]) -> Int[Tensor, "*batch"]:
    """Class that a :func:`corn` model decides: the number of thresholds with ``p > 1 / 2``.

    ``p`` is the product of the conditional probabilities up to the threshold.

    Args:
        logits: One logit a threshold, shape ``(*batch, classes - 1)``.

    Returns:
        Class indices, shape ``(*batch)``.

    Raises:
        TypeError: ``logits`` is not floating point.

    Example:
        >>> corn_decision(torch.tensor([[2.0, 1.0, 0.5], [-3.0, 4.0, 5.0]]))
        tensor([2, 0])

    References:
        Shi, Cao and Raschka, "Deep neural networks for rank-consistent ordinal regression based on
        conditional probabilities", 2021.
    """
    check_floating("corn_decision", "logits", logits)
    passed = F.logsigmoid(logits.to(wide_dtype(logits))).cumsum(-1)
    return (passed > -math.log(2)).sum(-1)


def _of_thresholds(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of each logit and ``[label > k]``."""
    above = labels.unsqueeze(-1) > torch.arange(scores.shape[-1], device=labels.device)
    return -F.logsigmoid(torch.where(above, scores, -scores))


@states(probabilities="none")
def earth_mover(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Squared earth mover's distance, ``sum_k (P_k - [label <= k])^2``, of ``softmax(logits)``.

    ``P`` is the cumulative distribution, classes in their order. In ``[0, classes - 1]``: a
    certain decision that is off by ``d`` classes costs ``d``. The sum is over classes; nothing is
    divided. With two classes it is the Brier score of the second.

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
        >>> earth_mover(torch.tensor([[99.0, 0.0, 0.0, 0.0]]).expand(4, 4), torch.arange(4))
        tensor([0., 1., 2., 3.])

    References:
        Hou, Yu and Samaras, "Squared earth mover's distance-based loss for training deep neural
        networks", 2016.
    """
    scores, labels, spoiled = class_inputs("earth_mover", logits, labels, where)
    reached = labels.unsqueeze(-1) <= torch.arange(scores.shape[-1], device=labels.device)
    cumulative = scores.softmax(-1).cumsum(-1)
    return finished(
        (cumulative - reached.to(scores.dtype)).square().sum(-1), where, logits, spoiled
    )


def sord_targets(
    labels: Int[Tensor, "*batch"],
    classes: int,
    *,
    scale: float | Tensor = 1.0,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*batch classes"]:
    """Soft labels of ordered classes, ``softmax_k(-scale * (k - label)^2)``.

    Args:
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        classes: How many there are.
        scale: How fast the targets fall with the distance, not negative: 0 is uniform, and a large
            one is one-hot.
        dtype: Of the targets; None: torch's default.

    Returns:
        Distributions, shape ``(*batch, classes)``.

    Raises:
        TypeError: ``labels`` is not of integers.
        ValueError: ``scale`` is negative.

    Example:
        >>> sord_targets(torch.tensor(1), 4)
        tensor([0.2097, 0.5701, 0.2097, 0.0104])

    References:
        Diaz and Marathe, "Soft labels for ordinal regression", 2019.
    """
    check_labels("sord_targets", "labels", labels)
    labels, spoiled = known_labels("sord_targets", labels, classes)
    scale = option_of("sord_targets", "scale", scale, tuple(labels.shape), axes=1, low=0)
    distances = torch.arange(classes, device=labels.device) - labels.unsqueeze(-1)
    distances = distances.to(dtype or torch.get_default_dtype())
    targets = (-scale * distances.square()).softmax(-1)
    return targets if spoiled is None else targets + spoiled.unsqueeze(-1)


@states(probabilities="softmax")
def sord(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    scale: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy to the soft labels of ordered classes, ``-sum(sord_targets * log_softmax)``.

    In nats, not below the entropy of the targets. Its gradient with respect to the logits is
    ``softmax(logits) - sord_targets(labels)``. As ``scale`` grows it becomes
    :func:`cross_entropy`. The paper lets any distance stand for ``scale * (k - label)^2``: for
    another one, hand its softmax to :func:`soft_cross_entropy`.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        scale: How fast the targets fall with the distance, not negative.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis, or ``scale`` is negative.

    Example:
        >>> sord(torch.tensor([[0.0, 3.0, 0.0, 0.0]]), torch.tensor([1]))
        tensor([1.4289])

    References:
        Diaz and Marathe, "Soft labels for ordinal regression", 2019.
    """
    scores, labels, spoiled = class_inputs("sord", logits, labels, where)
    targets = sord_targets(labels, scores.shape[-1], scale=scale, dtype=scores.dtype)
    log_probs = finite_at_zero(scores.log_softmax(-1), targets)
    return finished(-(targets * log_probs).sum(-1), where, logits, spoiled)
