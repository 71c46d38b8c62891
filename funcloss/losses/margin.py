"""Losses of a margin: what is right by enough costs nothing."""

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from funcloss._checks import check_per_class, option_of
from funcloss._numbers import product
from funcloss.losses._shared import (
    class_inputs,
    finished,
    of_label,
    one_hot,
    paired_inputs,
    signed_inputs,
    states,
)


@states(targets="signs")
def hinge(
    scores: Float[Tensor, "*batch"],
    signs: Num[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Hinge loss, ``max(0, 1 - sign * score)``, in units of the score.

    Its gradient with respect to the score is ``-sign`` where ``sign * score < 1``, else 0.

    Args:
        scores: Signed scores, positive for the class +1, shape ``(*batch)``.
        signs: True classes, -1 or +1, floating or integer, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``scores``.

    Raises:
        TypeError: ``scores`` is not floating point, ``signs`` is boolean, or ``where`` is not.
        ValueError: the shapes differ.

    Example:
        >>> hinge(torch.tensor([2.0, 0.5, 0.5]), torch.tensor([1, 1, -1]))
        tensor([0.0000, 0.5000, 1.5000])

    References:
        Cortes and Vapnik, "Support-vector networks", 1995.
    """
    z, s = signed_inputs("hinge", scores, signs, where)
    return finished((1 - s * z).relu(), where, scores)


@states(targets="signs")
def squared_hinge(
    scores: Float[Tensor, "*batch"],
    signs: Num[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Squared hinge loss, ``max(0, 1 - sign * score)^2``, in squared units of the score.

    Its gradient with respect to the score is ``-2 * sign * max(0, 1 - sign * score)``, which is
    continuous.

    Args:
        scores: Signed scores, positive for the class +1, shape ``(*batch)``.
        signs: True classes, -1 or +1, floating or integer, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``scores``.

    Raises:
        TypeError: ``scores`` is not floating point, ``signs`` is boolean, or ``where`` is not.
        ValueError: the shapes differ.

    Example:
        >>> squared_hinge(torch.tensor([2.0, 0.5, 0.5]), torch.tensor([1, 1, -1]))
        tensor([0.0000, 0.2500, 2.2500])

    References:
        Lee and Mangasarian, "SSVM: a smooth support vector machine for classification", 2001.
    """
    z, s = signed_inputs("squared_hinge", scores, signs, where)
    return finished((1 - s * z).relu().square(), where, scores)


@states(targets="signs")
def perceptron(
    scores: Float[Tensor, "*batch"],
    signs: Num[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Perceptron loss, ``max(0, -sign * score)``, in units of the score: a hinge without margin.

    Its gradient with respect to the score is ``-sign`` where ``sign * score <= 0``, else 0: at a
    score of 0 the perceptron learns, as it must to leave weights of zero.

    Args:
        scores: Signed scores, positive for the class +1, shape ``(*batch)``.
        signs: True classes, -1 or +1, floating or integer, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``scores``.

    Raises:
        TypeError: ``scores`` is not floating point, ``signs`` is boolean, or ``where`` is not.
        ValueError: the shapes differ.

    Example:
        >>> perceptron(torch.tensor([2.0, 0.5, 0.5]), torch.tensor([1, 1, -1]))
        tensor([0.0000, 0.0000, 0.5000])

    References:
        Rosenblatt, "The perceptron: a probabilistic model for information storage and
        organization in the brain", 1958.
    """
    z, s = signed_inputs("perceptron", scores, signs, where)
    # Not relu, whose derivative at 0 is 0. 0 - x and not -x, which is -0 at 0.
    return finished(torch.where(s * z <= 0, 0 - s * z, 0), where, scores)


@states(probabilities="none")
def multiclass_hinge(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    margin: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Hinge loss of the worst wrong class, ``max(0, margin + max_{k != y} z_k - z_y)``.

    In units of the logits. Where it is positive, its gradient is +1 at the best wrong class, shared
    evenly among ties, and -1 at the label. With two classes it is :func:`hinge` of the difference
    of the logits, times the sign, at a margin of 1.

    Args:
        logits: Scores of the classes, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        margin: Lead of the label at which an example costs nothing, not negative.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis, or ``margin`` is negative.

    Example:
        >>> multiclass_hinge(torch.tensor([[3.0, 1.0, 0.5], [3.0, 1.0, 2.5]]), torch.tensor([0, 2]))
        tensor([0.0000, 1.5000])

    References:
        Crammer and Singer, "On the algorithmic implementation of multiclass kernel-based vector
        machines", 2001.
    """
    scores, labels, spoiled = class_inputs("multiclass_hinge", logits, labels, where)
    margin = option_of("multiclass_hinge", "margin", margin, tuple(labels.shape), low=0)
    label = one_hot(labels, scores.shape[-1])
    best_wrong = torch.where(label, torch.finfo(scores.dtype).min, scores).amax(-1)
    return finished((margin + best_wrong - of_label(scores, labels)).relu(), where, logits, spoiled)


@states(probabilities="none")
def multi_margin(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    margin: float | Tensor = 1.0,
    p: int = 1,
    class_weights: Float[Tensor, " classes"] | None = None,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Hinge loss of all wrong classes, ``w_y sum_{k != y} max(0, margin + z_k - z_y)^p / classes``.

    Divided by the number of all classes, the label among them, as
    ``torch.nn.functional.multi_margin_loss`` does. In units of the logits to the power ``p``.

    Args:
        logits: Scores of the classes, shape ``(*batch, classes)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        margin: Lead of the label at which a wrong class costs nothing, not negative.
        p: Power, 1 or 2.
        class_weights: Cost ``w`` of each true class, shape ``(classes,)``; None: all 1.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``class_weights`` is not floating point, ``labels`` is, or
            ``where`` is not boolean.
        ValueError: a shape does not fit ``logits``, ``margin`` is negative, or ``p`` is neither.

    Example:
        >>> multi_margin(torch.tensor([[3.0, 2.5, 0.5, 2.0]]), torch.tensor([0]))
        tensor([0.1250])

    References:
        Weston and Watkins, "Support vector machines for multi-class pattern recognition", 1999.
    """
    if p not in (1, 2):
        raise ValueError(f"multi_margin: p must be 1 or 2, got {p}")
    scores, labels, spoiled = class_inputs("multi_margin", logits, labels, where)
    margin = option_of("multi_margin", "margin", margin, tuple(labels.shape), axes=1, low=0)
    slack = (scores + (margin - of_label(scores, labels).unsqueeze(-1))).relu()
    label = one_hot(labels, scores.shape[-1])
    loss = torch.where(label, 0, slack if p == 1 else slack.square()).mean(-1)
    if class_weights is not None:
        check_per_class("multi_margin", "class_weights", class_weights, logits)
        loss = product(of_label(class_weights.expand(scores.shape), labels), loss)
    return finished(loss, where, logits, spoiled)


@states(probabilities="none")
def multilabel_margin(
    logits: Float[Tensor, "*batch classes"],
    targets: Float[Tensor, "*batch classes"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Hinge loss of each pair of a true and a false label, ``sum max(0, 1 + z_k - z_j) / classes``.

    The sum runs over the ``j`` with target 1 and the ``k`` with target 0. It is divided by the
    number of classes, as ``torch.nn.functional.multilabel_margin_loss`` does; that one takes
    lists of class indices ended by -1, this one takes multi-hot targets. In units of the logits.
    Memory of ``classes^2`` an example.

    Args:
        logits: Scores of the classes, shape ``(*batch, classes)``.
        targets: 1 for each class that applies, else 0, the shape of ``logits``.
        where: Examples that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``targets`` is not floating point, or ``where`` is not boolean.
        ValueError: ``targets`` or ``where`` does not fit the shape of ``logits``.

    Example:
        >>> multilabel_margin(torch.tensor([0.1, 0.2, 0.4, 0.8]), torch.tensor([1.0, 0, 0, 1]))
        tensor(0.8500)

    References:
        Elisseeff and Weston, "A kernel method for multi-labelled classification", 2001.
    """
    names = ("logits", "targets")
    scores, bits = paired_inputs("multilabel_margin", logits, targets, where, axes=1, names=names)
    slack = (1 + scores.unsqueeze(-2) - scores.unsqueeze(-1)).relu()  # row true, column false
    pairs = bits.unsqueeze(-1) * (1 - bits).unsqueeze(-2)
    return finished((pairs * slack).sum((-2, -1)) / scores.shape[-1], where, logits)
