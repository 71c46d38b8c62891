"""A model on labelled examples, in one pass."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from funcloss.decisions import DecisionRule, Evaluation, make_costs, score
from funcloss.objectives.supervised import Criterion, Forward
from funcloss.typing import Batch, Buffers, Hyper, Params


class HasTensors(Protocol):
    """A model's tensors: a training state has them, and a trained model."""

    @property
    def params(self) -> Params:
        """Trainable tensors by name."""
        ...

    @property
    def buffers(self) -> Buffers:
        """The other tensors by name."""
        ...


def evaluate(
    forward: Forward,
    model: HasTensors,
    batches: Iterable[Batch],
    criterion: Criterion,
    hyper: Hyper,
    *,
    rule: DecisionRule | None = None,
    amounts: Mapping[str, Tensor] | None = None,
) -> Evaluation:
    """Evaluate a model on labelled examples in one pass.

    Args:
        forward: The model as a function, in evaluation mode.
        model: Its tensors, a :class:`funcloss.training.TrainState` for instance.
        batches: The examples, on the device of the tensors.
        criterion: The loss to report, over all examples at once.
        hyper: What the criterion takes.
        rule: How decisions are made of the scores, and what they cost; None: their softmax for
            probabilities, and 1 for every mistake.
        amounts: Costs of each example by name, for the cells of the rule's costs that have one.

    Returns:
        The evaluation, its tensors on the CPU.

    Raises:
        ValueError: there are no examples, or an amount is missing.

    Example:
        >>> from funcloss import losses, models, optim
        >>> from funcloss.objectives import make_forward, mean_of
        >>> from funcloss.training import init_state
        >>> model = models.linear((1, 2, 2), 3)
        >>> batches = [Batch(torch.ones(4, 1, 2, 2), torch.tensor([0, 1, 2, 0]))]
        >>> found = evaluate(make_forward(model.eval()), init_state(model, optim.sgd()), batches,
        ...                  mean_of(losses.cross_entropy), {})
        >>> found.argmax.confusion.sum()
        tensor(4)
    """
    logits, labels, own = [], [], []
    with torch.no_grad():
        for batch in batches:
            logits.append(forward(model.params, model.buffers, batch.inputs)[0])
            labels.append(batch.targets)
            own += [] if batch.costs is None else [batch.costs]
        if not labels:
            raise ValueError("evaluate: there are no examples")
        scores, targets = torch.cat(logits).float(), torch.cat(labels)
        whole = Batch(targets[:0], targets, costs=torch.cat(own) if own else None)
        loss = float(criterion(scores, whole, hyper))
    rule = rule or DecisionRule(make_costs(tuple(map(str, range(scores.shape[-1])))))
    return score(scores, targets, rule, loss=loss, amounts=amounts)
