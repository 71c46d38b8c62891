"""Losses of a cost for each pair of true class and decision: rows true, columns decided.

Decision ``k`` is class ``k``; a matrix may have more columns than rows, for decisions that are no
class, such as to abstain, each with a logit of its own. Where the costs differ from example to
example, ``costs`` gives each its own row.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from funcloss._checks import check_floating, check_labels, check_shape, check_where
from funcloss._numbers import product, wide_dtype
from funcloss.losses._shared import finished, known_labels, masked, of_label, one_hot, states


def _classes(
    logits: Tensor, *, cost_matrix: Tensor | None = None, costs: Tensor | None = None, **_: object
) -> int:
    """Return how many classes there are: the rows of the matrix, whatever its columns."""
    return logits.shape[-1] if cost_matrix is None else cost_matrix.shape[0]


@states(classes=_classes, probabilities="costs")
def expected_cost(
    logits: Float[Tensor, "*batch decisions"],
    labels: Int[Tensor, "*batch"],
    *,
    cost_matrix: Float[Tensor, "classes decisions"] | None = None,
    costs: Float[Tensor, "*batch decisions"] | None = None,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Expected cost of deciding by ``softmax(logits)``, ``sum(cost_matrix[label] * softmax)``.

    In units of the costs, between the least and the largest of the label's row. Its gradient is
    ``softmax * (cost_matrix[label] - loss)``, which vanishes where the decision is certain, right
    or wrong. At a cost of 1 for every mistake it is ``1 - softmax(logits)[label]``.

    Args:
        logits: Unnormalised log-probabilities of the decisions, shape ``(*batch, decisions)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``; of ``costs``, in
            ``[0, decisions)``.
        cost_matrix: Cost of each decision (column) in each true class (row), shape
            ``(classes, decisions)``; fewer or more decisions than classes are allowed.
        costs: Cost of each decision for each example, in place of ``cost_matrix``, shape
            ``(*batch, decisions)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or the costs are not floating point, ``labels`` is, or ``where`` is
            not boolean.
        IndexError: a label is out of range; compiled, the loss is NaN instead.
        ValueError: ``labels``, ``where`` or the costs do not fit the shape of ``logits``, or not
            exactly one of ``cost_matrix`` and ``costs`` is given.

    Example:
        >>> cost_matrix = torch.tensor([[0.0, 1.0, 0.5], [9.0, 0.0, 0.5]])  # the last: abstain
        >>> expected_cost(torch.zeros(2, 3), torch.tensor([0, 1]), cost_matrix=cost_matrix)
        tensor([0.5000, 3.1667])

    References:
        Elkan, "The foundations of cost-sensitive learning", 2001, eq. 1.
    """
    given = (cost_matrix, costs)
    scores, labels, costs, spoiled = _inputs("expected_cost", logits, labels, given, where)
    return finished(product(scores.softmax(-1), costs).sum(-1), where, logits, spoiled)


@states(classes=_classes, probabilities="costs")
def log_bilinear(
    logits: Float[Tensor, "*batch decisions"],
    labels: Int[Tensor, "*batch"],
    *,
    cost_matrix: Float[Tensor, "classes decisions"] | None = None,
    costs: Float[Tensor, "*batch decisions"] | None = None,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Log-bilinear: ``-sum(cost_matrix[label] * log(1 - softmax(logits)))``, the label left out.

    In nats times cost, not negative if the costs are not. With ``r = cost * p / (1 - p)`` and
    ``p = softmax(logits)`` its gradient is ``r - p * sum(r)``. The cost of the label's own
    decision is not read: the diagonal may hold anything. With two classes and a cost of 1 it is
    :func:`cross_entropy`. The paper adds it to the cross-entropy in parts ``1 - alpha`` and
    ``alpha``: :func:`funcloss.summed` does that.

    Args:
        logits: Unnormalised log-probabilities of the decisions, shape ``(*batch, decisions)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``; of ``costs``, in
            ``[0, decisions)``.
        cost_matrix: Cost of each decision (column) in each true class (row), shape
            ``(classes, decisions)``, no fewer decisions than classes.
        costs: Cost of each decision for each example, in place of ``cost_matrix``, shape
            ``(*batch, decisions)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or the costs are not floating point, ``labels`` is, or ``where`` is
            not boolean.
        IndexError: a label is out of range; compiled, the loss is NaN instead.
        ValueError: ``labels``, ``where`` or the costs do not fit the shape of ``logits``, there are
            more classes than decisions, or not exactly one of ``cost_matrix`` and ``costs`` is
            given.

    Example:
        >>> cost_matrix = torch.tensor([[0.0, 1.0, 1.0], [9.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
        >>> log_bilinear(torch.zeros(2, 3), torch.tensor([0, 1]), cost_matrix=cost_matrix)
        tensor([0.8109, 4.0547])

    References:
        Resheff, Mandelbaum and Weinshall, "Every untrue label is untrue in its own way: controlling
        error type with the log bilinear loss", 2017.
    """
    given = (cost_matrix, costs)
    scores, labels, costs, spoiled = _inputs("log_bilinear", logits, labels, given, where, own=True)
    is_label = one_hot(labels, scores.shape[-1])
    log_others = torch.where(is_label, 0, _log_one_minus_softmax(scores))
    return finished(-product(costs, log_others).sum(-1), where, logits, spoiled)


@states(classes=_classes, probabilities="costs")
def softmax_margin(
    logits: Float[Tensor, "*batch decisions"],
    labels: Int[Tensor, "*batch"],
    *,
    cost_matrix: Float[Tensor, "classes decisions"] | None = None,
    costs: Float[Tensor, "*batch decisions"] | None = None,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Softmax margin: ``logsumexp(logits + cost_matrix[label]) - logits[label]``, in nats.

    The cross-entropy of logits raised by what each decision would cost, so that a dear mistake must
    be kept further off. Its gradient is ``softmax(logits + cost_matrix[label]) -
    one_hot(label)``. At costs of 0 it is :func:`cross_entropy`. It bounds :func:`cost_hinge` from
    above, by ``log(decisions)`` at most.

    Args:
        logits: Unnormalised log-probabilities of the decisions, shape ``(*batch, decisions)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``; of ``costs``, in
            ``[0, decisions)``.
        cost_matrix: Cost of each decision (column) in each true class (row), in units of the
            logits, shape ``(classes, decisions)``, no fewer decisions than classes.
        costs: Cost of each decision for each example, in place of ``cost_matrix``, shape
            ``(*batch, decisions)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, not negative if the costs are not, shape ``(*batch)``, dtype of
        ``logits``.

    Raises:
        TypeError: ``logits`` or the costs are not floating point, ``labels`` is, or ``where`` is
            not boolean.
        IndexError: a label is out of range; compiled, the loss is NaN instead.
        ValueError: ``labels``, ``where`` or the costs do not fit the shape of ``logits``, there are
            more classes than decisions, or not exactly one of ``cost_matrix`` and ``costs`` is
            given.

    Example:
        >>> cost_matrix = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
        >>> softmax_margin(torch.zeros(2, 2), torch.tensor([0, 1]), cost_matrix=cost_matrix)
        tensor([1.3133, 3.0486])

    References:
        Gimpel and Smith, "Softmax-margin CRFs: training log-linear models with cost functions",
        2010.
    """
    given = (cost_matrix, costs)
    scores, labels, costs, spoiled = _inputs(
        "softmax_margin", logits, labels, given, where, own=True
    )
    log_probs = (scores + costs).log_softmax(-1)
    return finished(of_label(costs, labels) - of_label(log_probs, labels), where, logits, spoiled)


@states(classes=_classes, probabilities="costs")
def cost_hinge(
    logits: Float[Tensor, "*batch decisions"],
    labels: Int[Tensor, "*batch"],
    *,
    cost_matrix: Float[Tensor, "classes decisions"] | None = None,
    costs: Float[Tensor, "*batch decisions"] | None = None,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Cost-sensitive hinge: ``max(logits + cost_matrix[label]) - logits[label]``.

    0 once the logit of the label exceeds every other by that decision's cost, if its own is 0; an
    upper bound of the cost of the decision ``argmax(logits)``. Its gradient is 1 at the largest
    term, shared equally between ties, and -1 at the label. At a cost of 1 for every mistake it is
    the multiclass hinge of Crammer and Singer. :func:`softmax_margin` is its smooth form.

    Args:
        logits: Scores of the decisions, shape ``(*batch, decisions)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``; of ``costs``, in
            ``[0, decisions)``.
        cost_matrix: Cost of each decision (column) in each true class (row), in units of the
            logits, shape ``(classes, decisions)``, no fewer decisions than classes.
        costs: Cost of each decision for each example, in place of ``cost_matrix``, shape
            ``(*batch, decisions)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, not less than the cost of its label's own decision, shape
        ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or the costs are not floating point, ``labels`` is, or ``where`` is
            not boolean.
        IndexError: a label is out of range; compiled, the loss is NaN instead.
        ValueError: ``labels``, ``where`` or the costs do not fit the shape of ``logits``, there are
            more classes than decisions, or not exactly one of ``cost_matrix`` and ``costs`` is
            given.

    Example:
        >>> cost_matrix = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> cost_hinge(logits, torch.tensor([0, 1]), cost_matrix=cost_matrix)
        tensor([0., 1.])

    References:
        Tsochantaridis et al., "Large margin methods for structured and interdependent output
        variables", 2005, margin re-scaling; Crammer and Singer, "On the algorithmic implementation
        of multiclass kernel-based vector machines", 2001.
    """
    given = (cost_matrix, costs)
    scores, labels, costs, spoiled = _inputs("cost_hinge", logits, labels, given, where, own=True)
    # Subtracted inside: small costs would be lost in the rounding of a large logit.
    margins = scores - of_label(scores, labels).unsqueeze(-1)
    # Of two equal infinities the difference is NaN: a decision that is never taken has no margin,
    # and that of the label over itself is 0.
    margins = torch.where(scores == -torch.inf, scores, margins)
    margins = torch.where(one_hot(labels, scores.shape[-1]), 0, margins)
    return finished((margins + costs).amax(-1), where, logits, spoiled)


@states(classes=_classes, probabilities="costs")
def one_sided_regression(
    cost_estimates: Float[Tensor, "*batch decisions"],
    labels: Int[Tensor, "*batch"],
    *,
    cost_matrix: Float[Tensor, "classes decisions"] | None = None,
    costs: Float[Tensor, "*batch decisions"] | None = None,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Smooth one-sided regression of costs, ``sum(softplus(sign * (estimate - cost)))``.

    The costs are those of the label's row; the sign is 1 for its cheapest decisions, whose
    estimates should not be above their costs, and -1 for the others, whose should not be below.
    What :func:`one_sided_decision` costs beyond the cheapest is at most the sum of these one-sided
    errors. The gradient is ``sign * sigmoid(sign * (estimate - cost))``.

    Args:
        cost_estimates: What each decision is thought to cost, low is good: no logits, shape
            ``(*batch, decisions)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``; of ``costs``, in
            ``[0, decisions)``.
        cost_matrix: Cost of each decision (column) in each true class (row), shape
            ``(classes, decisions)``; fewer or more decisions than classes are allowed.
        costs: Cost of each decision for each example, in place of ``cost_matrix``, shape
            ``(*batch, decisions)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, in nats, not negative, shape ``(*batch)``, dtype of
        ``cost_estimates``.

    Raises:
        TypeError: ``cost_estimates`` or the costs are not floating point, ``labels`` is, or
            ``where`` is not boolean.
        IndexError: a label is out of range; compiled, the loss is NaN instead.
        ValueError: ``labels``, ``where`` or the costs do not fit the shape of ``cost_estimates``,
            or not exactly one of ``cost_matrix`` and ``costs`` is given.

    Example:
        >>> cost_matrix = torch.tensor([[0.0, 1.0], [3.0, 0.0]])
        >>> one_sided_regression(torch.zeros(2, 2), torch.tensor([0, 1]), cost_matrix=cost_matrix)
        tensor([2.0064, 3.7417])

    References:
        Tu and Lin, "One-sided support vector regression for multiclass cost-sensitive
        classification", 2010; the smooth form: Chung, Lin and Yang, "Cost-aware pre-training for
        multiclass cost-sensitive deep learning", 2016.
    """
    given = (cost_matrix, costs)
    inputs = _inputs("one_sided_regression", cost_estimates, labels, given, where, "cost_estimates")
    estimates, _, costs, spoiled = inputs
    excess = estimates - costs
    cheapest = costs <= costs.amin(-1, keepdim=True)
    # softplus(x) = -logsigmoid(-x); torch rounds softplus to its argument from 20 on.
    terms = -F.logsigmoid(torch.where(cheapest, -excess, excess))
    return finished(terms.sum(-1), where, cost_estimates, spoiled)


def one_sided_decision(
    cost_estimates: Float[Tensor, "*batch decisions"],
) -> Int[Tensor, "*batch"]:
    """Return the decision that is thought to cost least, ``argmin(cost_estimates)``.

    Args:
        cost_estimates: What was trained by :func:`one_sided_regression`, shape
            ``(*batch, decisions)``.

    Returns:
        Decisions, shape ``(*batch)``.

    Raises:
        TypeError: ``cost_estimates`` is not floating point.

    Example:
        >>> one_sided_decision(torch.tensor([[0.5, 2.0, -1.0], [0.0, 3.0, 1.0]]))
        tensor([2, 0])

    References:
        Tu and Lin, "One-sided support vector regression for multiclass cost-sensitive
        classification", 2010.
    """
    check_floating("one_sided_decision", "cost_estimates", cost_estimates)
    return cost_estimates.argmin(-1)


def _inputs(
    name: str,
    scores: Tensor,
    labels: Tensor,
    given: tuple[Tensor | None, Tensor | None],
    where: Tensor | None,
    what: str = "logits",
    *,
    own: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Check everything; return scores, labels and each example's costs, masked and wide.

    Last comes the NaN of a label out of range, to be added to the loss.

    ``given`` is the matrix and the costs, of which one is None; ``own``: every class must have a
    decision of its own.
    """
    matrix, costs = given
    if (matrix is None) == (costs is None):
        came = "neither" if costs is None else "both"
        raise ValueError(
            f"{name}: give either cost_matrix (classes, decisions) or costs (*batch, decisions); "
            f"got {came}"
        )
    check_floating(name, what, scores)
    if not scores.dim():
        raise ValueError(f"{name}: {what} must have a decision axis, got a scalar")
    check_labels(name, "labels", labels)
    shape, decisions = tuple(scores.shape), scores.shape[-1]
    check_shape(name, "labels", labels, shape[:-1], f"{what} {shape}")
    if costs is not None:
        check_floating(name, "costs", costs)
        check_shape(name, "costs", costs, shape, f"{what} {shape}")
    if matrix is not None:
        _check_matrix(name, matrix, decisions, own=own)
    classes = decisions if matrix is None else matrix.shape[0]
    check_where(name, where, shape[:-1])
    labels, spoiled = known_labels(name, masked(labels, where), classes)
    scores = masked(scores, where).to(wide_dtype(scores))
    if matrix is not None:
        # Not a product with one-hots, which a GPU may round to TF32.
        costs = matrix.gather(0, labels.reshape(-1, 1).expand(-1, decisions)).reshape(shape)
    assert costs is not None
    return scores, labels, masked(costs, where).to(scores.dtype), spoiled


def _check_matrix(name: str, matrix: Tensor, decisions: int, *, own: bool) -> None:
    check_floating(name, "cost_matrix", matrix)
    got = tuple(matrix.shape)
    if len(got) != 2 or got[1] != decisions:
        raise ValueError(
            f"{name}: cost_matrix must have shape (classes, {decisions}), one column per decision, "
            f"got {got}"
        )
    if own and got[0] > decisions:
        raise ValueError(f"{name}: cost_matrix must have a decision for each class, got {got}")


def _log_one_minus_softmax(scores: Tensor) -> Tensor:
    """Return ``log(1 - softmax(scores))``, exact at both ends."""
    # Finite, or the sum over the others had no gradient where none of them is possible.
    least = torch.finfo(scores.dtype).min
    log_probs = scores.log_softmax(-1).clamp(min=least)
    # Only the likeliest may come near 1, where 1 - p is lost: there it is the sum of the others.
    likeliest = one_hot(log_probs.argmax(-1), scores.shape[-1])
    others = torch.where(likeliest, least, log_probs).logsumexp(-1, keepdim=True)
    probs = torch.where(likeliest, 0, log_probs).exp()
    logs = torch.where(likeliest, others, torch.log1p(-torch.where(likeliest, 0, probs)))
    return torch.where(logs <= least, -torch.inf, logs)
