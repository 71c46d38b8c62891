"""How good a model is: loss, accuracy, recall and precision by class, in one pass."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss.objectives.supervised import Criterion, Forward
from funcloss.typing import Batch, Buffers, Hyper, Params


class Evaluation(NamedTuple):
    """What a model does on a set of labelled examples."""

    loss: float  # the criterion over all examples at once
    accuracy: float
    support: Int[Tensor, " classes"]  # examples of each true class
    recall: Float[Tensor, " classes"]  # NaN for a class that does not occur
    precision: Float[Tensor, " classes"]  # NaN for a class that is never predicted
    confusion: Int[Tensor, "classes classes"]  # rows the truth, columns the prediction
    logits: Float[Tensor, "n classes"]


def evaluate(
    forward: Forward,
    params: Params,
    buffers: Buffers,
    feed: Callable[[Iterable[Tensor]], Iterable[Batch]],
    n: int,
    criterion: Criterion,
    hyper: Hyper,
    *,
    batch_size: int = 1024,
) -> Evaluation:
    """Evaluate a model on ``n`` examples in one pass, in batches of one size.

    Args:
        forward: The model as a function, in evaluation mode.
        params: The model's parameters.
        buffers: Its other tensors.
        feed: From indices, each ``(batch,)`` int64 on the device of ``params``, to their batches.
        n: Number of examples, at least 1.
        criterion: The loss to report, over all examples at once.
        hyper: What the criterion takes.
        batch_size: Examples a batch; the last one is filled up and the filling dropped.

    Returns:
        The evaluation, its tensors on the CPU.

    Raises:
        ValueError: there are no examples.
    """
    if n == 0:
        raise ValueError("evaluate: there are no examples")
    device = next(iter(params.values())).device
    # Full batches of one shape: a compiled forward is compiled once.
    size = min(batch_size, n)
    index = torch.arange(math.ceil(n / size) * size, device=device).clamp(max=n - 1)
    logits, labels = [], []
    with torch.no_grad():
        for batch in feed(index.split(size)):
            logits.append(forward(params, buffers, batch.inputs)[0])
            labels.append(batch.targets)
        every = Batch(inputs=index[:0], targets=torch.cat(labels)[:n])
        scores = torch.cat(logits)[:n].float()
        loss = float(criterion(scores, every, hyper))
    return _judged(loss, scores.cpu(), every.targets.cpu())


def _judged(loss: float, logits: Tensor, labels: Tensor) -> Evaluation:
    confusion = confusion_matrix(labels, logits.argmax(-1), logits.shape[-1])
    hits = confusion.diagonal().double()
    return Evaluation(
        loss=loss,
        accuracy=float(hits.sum() / len(labels)),
        support=confusion.sum(1),
        recall=hits / confusion.sum(1),
        precision=hits / confusion.sum(0),
        confusion=confusion,
        logits=logits,
    )


def confusion_matrix(
    labels: Int[Tensor, " n"], predictions: Int[Tensor, " n"], classes: int
) -> Int[Tensor, "classes classes"]:
    """Count each pair of true and predicted class.

    Args:
        labels: True classes, shape ``(n,)``.
        predictions: Predicted classes, shape ``(n,)``.
        classes: Number of classes.

    Returns:
        Counts, rows the truth, columns the prediction.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2)
        tensor([[1, 0],
                [1, 1]])
    """
    return torch.bincount(labels * classes + predictions, minlength=classes**2).reshape(
        classes, classes
    )
