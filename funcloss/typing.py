"""The words that every room shares: the shapes of states, batches, losses and objectives."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Params = dict[str, Tensor]  # trainable tensors by name, as ``named_parameters`` gives them
Grads = Params  # the same keys and shapes
Buffers = dict[str, Tensor]  # what is not trained: running statistics, frozen parameters
Metrics = dict[str, Tensor]

# What may be swept, all tensors: ``learning_rate``, a scalar, for the optimiser; the rest goes to
# the loss by name: ``class_weights`` of shape ``(classes,)``, and each option that it has.
Hyper = dict[str, Tensor]

# ``loss(predictions, targets, *, where=None, ...) -> Tensor``: one value an example, shape
# ``(*batch)``; every option is a keyword. Which ones there are is each loss's own.
LossFn = Callable[..., Tensor]


class Correction(NamedTuple):
    """What makes probabilities of the scores of a loss: ``softmax(scale * scores + offset)``.

    They are the class probabilities under the training data, as they occur there.
    """

    scale: float | Tensor = 1.0  # or one per class, ``(classes,)``
    offset: float | Tensor = 0.0  # or one per class, ``(classes,)``


# How the scores of a loss become probabilities, its attribute ``probabilities``:
# ``"softmax"``: ``softmax(scores)`` estimates the class probabilities under the training data;
# ``"none"``: the softmax of the scores estimates no probabilities;
# ``"costs"``: the scores have the costs of decisions in them already;
# or a function of the loss's options, by name, to the ``Correction`` that the scores need.
Probabilities = str | Callable[..., Correction]


# What a model takes: one tensor, several in order, or several by name.
Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


class Batch(NamedTuple):
    """Examples side by side, along the first axis of every field."""

    inputs: Any  # (batch, *features), or ``Inputs`` of which each tensor begins with the batch
    targets: Tensor  # (batch,) labels, or (batch, ...) values
    where: Tensor | None = None  # (batch,) bool: which examples count; None: all
    costs: Tensor | None = None  # (batch, decisions), for a loss that takes the costs of each one


class Objective(Protocol):
    """What a step minimises: a scalar, beside new buffers and metrics."""

    def __call__(
        self, params: Params, buffers: Buffers, batch: Batch, keys: Tensor, hyper: Hyper, /
    ) -> tuple[Tensor, tuple[Buffers, Metrics]]:
        """Return ``(loss, (buffers, metrics))``; ``keys`` holds one random key an example."""
        ...
