"""Losses of one label an example."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funcloss._checks import check_class_labels
from funcloss._precision import wide_dtype


def cross_entropy(
    logits: Float[Tensor, "*batch classes"],
    labels: Int[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy of ``softmax(logits)`` and labels, ``-log_softmax(logits)[label]``, in nats.

    Its gradient with respect to the logits is ``softmax(logits) - one_hot(label)``.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``. Log-probabilities
            are logits too: the softmax leaves them as they are.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: ``labels`` or ``where`` does not have the shape of ``logits`` less its last
            axis.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])

    References:
        Bishop, "Pattern Recognition and Machine Learning", 2006, eq. 4.108.
    """
    check_class_labels("cross_entropy", logits, labels, where)
    if where is not None:
        # Mask the inputs too: masking the output alone leaves 0 * inf = NaN in the gradient.
        logits = torch.where(where[..., None], logits, 0.0)
    log_probs = logits.log_softmax(-1, dtype=wide_dtype(logits))
    return nll(log_probs, labels, where=where).to(logits.dtype)


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
        ValueError: ``labels`` or ``where`` does not have the shape of ``log_probs`` less its last
            axis.

    Example:
        >>> nll(torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), torch.tensor([0, 1]))
        tensor([0.6931, 0.2877])

    References:
        Bishop, "Pattern Recognition and Machine Learning", 2006, eq. 4.108.
    """
    check_class_labels("nll", log_probs, labels, where)
    if where is not None:
        log_probs = torch.where(where[..., None], log_probs, 0.0)
        labels = torch.where(where, labels, 0)
    # gather, because indexing with a 0-d label fails under vmap(grad).
    loss = -log_probs.gather(-1, labels.unsqueeze(-1).long()).squeeze(-1)
    return loss if where is None else torch.where(where, loss, 0.0)
