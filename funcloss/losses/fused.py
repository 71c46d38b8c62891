"""A linear head and its loss in one, so that the logits of a batch never exist at once.

The one loss here that is not made of elementary operations: autograd would keep the logits of every
chunk for the backward, so a hand-written backward makes them again.
"""

from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function

from funcloss._checks import check_floating, check_labels, check_number, check_shape, check_where
from funcloss._numbers import wide_dtype
from funcloss.losses._shared import finished, known_labels, masked, of_label, states

_NAME = "linear_cross_entropy"


def _classes_of(features: Tensor, weight: Tensor, **options: object) -> int:
    """Return how many classes the head has."""
    return weight.shape[0]


@states(classes=_classes_of, probabilities="softmax")
def linear_cross_entropy(
    features: Float[Tensor, "*batch features"],
    weight: Float[Tensor, "classes features"],
    labels: Int[Tensor, "*batch"],
    *,
    bias: Float[Tensor, " classes"] | None = None,
    chunk_size: int = 1024,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Cross-entropy of a linear head, ``cross_entropy(features @ weight.T + bias, labels)``.

    In nats. The examples go through the head ``chunk_size`` at a time, in the forward and again in
    the backward, which makes the logits of each chunk anew: of the ``(examples, classes)`` logits
    and their gradient at most two chunks are in memory. The price is one more matrix product. With
    ``p`` the softmax, the gradients are ``(p - one_hot(label)) @ weight`` for ``features``,
    ``outer(p - one_hot(label), features)`` for ``weight`` and ``p - one_hot(label)`` for ``bias``.

    It has a first derivative in reverse mode (``backward``, ``torch.func.grad``, ``vjp``), and
    nothing else: a second derivative, ``jvp``, ``jacfwd`` and ``vmap`` raise. Where these are
    wanted, use :func:`cross_entropy` of the product. ``torch.compile`` takes it in one graph, but
    does not see the refusal of a second derivative: ``torch.func.grad`` of ``torch.func.grad``
    inside a compiled function takes the first derivative for a constant. ``torch.func.grad``
    inside a compiled function raises in torch 2.6.

    Products run in the dtype of the inputs, in float32 for half precision (of ``weight`` this
    takes a copy), and inside ``torch.autocast`` too.

    Args:
        features: What the head is applied to, shape ``(*batch, features)``.
        weight: Weight of the head, as in ``torch.nn.Linear``, shape ``(classes, features)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        bias: Bias of the head, shape ``(classes,)``.
        chunk_size: Examples in a chunk: a chunk of logits takes ``4 * chunk_size * classes`` bytes
            in float32.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``features``.

    Raises:
        TypeError: ``features``, ``weight`` or ``bias`` is not floating point, ``labels`` is, or
            ``where`` is not boolean.
        ValueError: the shapes do not fit, or ``chunk_size`` is less than 1.
        RuntimeError: a second derivative, forward mode or ``vmap`` is asked for.

    Example:
        >>> features, weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.eye(2)
        >>> linear_cross_entropy(features, weight, torch.tensor([0, 0]))
        tensor([0.3133, 2.1269])

    References:
        Wijmans et al., "Cut your losses in large-vocabulary language models", 2025; Hsu et al.,
        "Liger kernel: efficient Triton kernels for LLM training", 2024.
    """
    _check(features, weight, labels, bias, where)
    check_number(_NAME, "chunk_size", chunk_size, low=1)
    rows = masked(features, where).reshape(labels.numel(), weight.shape[-1])
    labels, spoiled = known_labels(_NAME, masked(labels, where), weight.shape[0])
    loss = _LinearCrossEntropy.apply(rows, weight, bias, labels.reshape(-1), chunk_size)
    return finished(loss.reshape(labels.shape), where, features, spoiled)


def _check(
    features: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, where: Tensor | None
) -> None:
    """Check the head against ``features``, and ``labels`` against the batch."""
    check_floating(_NAME, "features", features)
    check_floating(_NAME, "weight", weight)
    check_labels(_NAME, "labels", labels)
    if features.dim() == 0:
        raise ValueError(f"{_NAME}: features must have a feature axis, got a scalar")
    shape, head = tuple(features.shape), tuple(weight.shape)
    if len(head) != 2 or head[1] != shape[-1]:
        raise ValueError(
            f"{_NAME}: weight must have shape (classes, {shape[-1]}) to match features {shape}, "
            f"got {head}"
        )
    check_shape(_NAME, "labels", labels, shape[:-1], f"features {shape}")
    check_where(_NAME, where, shape[:-1])
    if bias is not None:
        check_floating(_NAME, "bias", bias)
        check_shape(_NAME, "bias", bias, head[:1], f"weight {head}")


def _logits(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the logits of one chunk, in the dtype of ``weight``."""
    rows = rows.to(weight.dtype)
    return rows @ weight.T if bias is None else torch.addmm(bias.to(weight.dtype), rows, weight.T)


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"{_NAME}: only a first derivative in reverse mode is there, got {what}; "
        "use cross_entropy(features @ weight.T, labels) instead"
    )


class _FirstOrder(Function):
    """A function that refuses ``vmap``; forward mode torch refuses itself.

    A ``jvp`` here, to say it in our words, would keep torch.compile from tracing the function.
    """

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        """Refuse ``vmap``."""
        _refuse("vmap")


class _LinearCrossEntropy(_FirstOrder):
    @staticmethod
    def forward(
        rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, chunk_size: int
    ) -> Tensor:
        """Return the loss of each row, in float32 or wider."""
        losses = []
        with torch.autocast(rows.device.type, enabled=False):
            head = weight.to(wide_dtype(rows))
            chunks = zip(rows.split(chunk_size), labels.split(chunk_size), strict=True)
            for chunk, index in chunks:
                losses.append(-of_label(_logits(chunk, head, bias).log_softmax(-1), index))
        return torch.cat(losses)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the inputs alone."""
        *tensors, ctx.chunk_size = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, loss_grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of rows, weight and bias, those that are asked for."""
        needed = ctx.needs_input_grad[:3]
        grads = _Gradients.apply(loss_grads, *ctx.saved_tensors, ctx.chunk_size, needed)
        return (*grads, None, None)


class _Gradients(_FirstOrder):
    """The backward as a function of its own, so that to differentiate it again is seen."""

    @staticmethod
    def forward(
        loss_grads: Tensor,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_size: int,
        needed: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """Add up the gradients chunk by chunk, in float32 or wider."""
        with torch.autocast(rows.device.type, enabled=False):
            head = weight.to(wide_dtype(rows))
            rows_grad = torch.empty_like(rows) if needed[0] else None
            weight_grad = torch.zeros_like(head) if needed[1] else None
            bias_grad = head.new_zeros(head.shape[:1]) if needed[2] else None
            for start in range(0, len(rows), chunk_size):
                part = slice(start, start + chunk_size)
                errors = _errors(rows[part], head, bias, labels[part], loss_grads[part])
                if rows_grad is not None:
                    rows_grad[part] = (errors @ head).to(rows.dtype)
                if weight_grad is not None:
                    weight_grad.addmm_(errors.T, rows[part].to(head.dtype))
                if bias_grad is not None:
                    bias_grad += errors.sum(0)
        return (
            rows_grad,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None or bias is None else bias_grad.to(bias.dtype),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep nothing: there is no backward."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Refuse a second derivative."""
        _refuse("a second derivative")


def _errors(
    rows: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor, loss_grads: Tensor
) -> Tensor:
    """Return the gradient of one chunk of logits, ``(softmax - one_hot(label)) * loss_grad``."""
    probs = _logits(rows, head, bias).softmax(-1)
    # In place: these are the function's own, and as large as a chunk of logits.
    probs.scatter_(-1, labels[:, None], (of_label(probs, labels) - 1)[:, None])
    return probs.mul_(loss_grads[:, None])
