"""Losses in, a loss out: each result is as pure as what it was made of."""

# Annotations stay text: a combinator may be called, and its loss defined, in what is being traced.
from __future__ import annotations

import torch
from torch import Tensor

from funcloss._checks import check_floating, check_labels, check_shape, check_where
from funcloss.typing import LossFn


def class_weights_of(class_weights: Tensor, labels: Tensor, where: Tensor | None = None) -> Tensor:
    """Weight of each example's class, ``class_weights[label]``, 0 where an example does not count.

    Args:
        class_weights: Cost of each true class, shape ``(classes,)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        where: Examples that count, shape ``(*batch)``; the labels of the others may be anything.

    Returns:
        Weights, shape ``(*batch)``, dtype of ``class_weights``.

    Raises:
        TypeError: ``class_weights`` is not floating point, or ``labels`` is.
        ValueError: ``class_weights`` is not a vector.

    Example:
        >>> class_weights_of(torch.tensor([1.0, 5.0]), torch.tensor([1, 0, 1]))
        tensor([5., 1., 5.])
    """
    check_floating("class_weights_of", "class_weights", class_weights)
    check_labels("class_weights_of", "labels", labels)
    check_where("class_weights_of", where, tuple(labels.shape))
    if class_weights.dim() != 1:
        got = tuple(class_weights.shape)
        raise ValueError(f"class_weights_of: class_weights must have shape (classes,), got {got}")
    if where is not None:
        labels = torch.where(where, labels, 0)
    weights = class_weights.gather(0, labels.reshape(-1).long()).reshape(labels.shape)
    return weights if where is None else torch.where(where, weights, 0.0)


def class_weighted(loss: LossFn) -> LossFn:
    """Return ``class_weights[label] * loss``: each example at the cost of its true class.

    The result takes one more keyword, ``class_weights`` of shape ``(classes,)``, which may be
    mapped over and differentiated. Reduced with :func:`funcloss.mean`, the sum is divided by the
    number of examples, so a weight acts also at batch size one; torch's division by the sum of
    the weights is :func:`funcloss.weighted_mean`, on the unweighted loss.

    Args:
        loss: A loss of ``(logits, labels)``.

    Returns:
        A loss of ``(logits, labels)`` with the keyword ``class_weights``. It raises ``ValueError``
        if these do not have one entry a class, or if ``loss`` does not give one value an example.

    Example:
        >>> from funcloss.losses import cross_entropy
        >>> weights = torch.tensor([1.0, 1.0, 5.0])
        >>> class_weighted(cross_entropy)(torch.zeros(2, 3), torch.tensor([0, 2]),
        ...                               class_weights=weights)
        tensor([1.0986, 5.4931])

    References:
        Elkan, "The foundations of cost-sensitive learning", 2001.
    """

    def weighted(
        logits: Tensor,
        labels: Tensor,
        /,
        *,
        class_weights: Tensor,
        where: Tensor | None = None,
        **options,
    ) -> Tensor:
        check_shape("class_weighted", "class_weights", class_weights, logits.shape[-1:], "logits")
        values = loss(logits, labels, where=where, **options)
        # A loss that is reduced already would be weighted as a whole, which weighs no class.
        check_shape("class_weighted", "what the loss gives", values, labels.shape, "labels")
        return class_weights_of(class_weights, labels, where).to(values.dtype) * values

    return weighted


def from_logits(loss: LossFn) -> LossFn:
    """Return ``loss`` of log-probabilities as a loss of logits, ``loss(log_softmax(logits))``.

    Args:
        loss: A loss whose predictions are log-probabilities, such as :func:`funcloss.losses.nll`.

    Returns:
        The same loss of unnormalised logits, shape ``(*batch, classes)``.

    Example:
        >>> from funcloss.losses import nll
        >>> from_logits(nll)(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """

    def of_logits(
        logits: Tensor, targets: Tensor, /, *, where: Tensor | None = None, **options
    ) -> Tensor:
        if where is not None:
            logits = torch.where(where[..., None], logits, 0.0)
        return loss(logits.log_softmax(-1), targets, where=where, **options)

    return of_logits


def one_hot_targets(loss: LossFn) -> LossFn:
    """Return a loss of values as a loss of labels, ``sum_c loss(prediction_c, [c == label])``.

    Args:
        loss: A loss of real values and targets, such as :func:`funcloss.losses.squared_error`.

    Returns:
        A loss of predictions ``(*batch, classes)`` and labels ``(*batch)``: the targets are 1 at
        the label and 0 elsewhere, and the values are summed over the classes.

    Example:
        >>> from funcloss.losses import squared_error
        >>> one_hot_targets(squared_error)(torch.tensor([[0.0, 0.5, 0.0]]), torch.tensor([1]))
        tensor([0.2500])

    References:
        Brier, "Verification of forecasts expressed in terms of probability", 1950, for
        predictions that are probabilities.
    """

    def of_labels(
        predictions: Tensor, labels: Tensor, /, *, where: Tensor | None = None, **options
    ) -> Tensor:
        check_labels("one_hot_targets", "labels", labels)
        classes = torch.arange(predictions.shape[-1], device=predictions.device)
        targets = (labels[..., None] == classes).to(predictions.dtype)
        every = None if where is None else where[..., None].expand(targets.shape)
        return loss(predictions, targets, where=every, **options).sum(-1)

    return of_labels
