"""The audit beside a loop that somebody already has: ``torch.optim``'s own memory is read."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from funcloss.audit.gram import REDUCTIONS
from funcloss.audit.inner import distance, grams, layers_of, norm_of, scaled_rows, total_of
from funcloss.audit.result import StepAudit
from funcloss.audit.step import OWN_ROWS, split_step
from funcloss.audit.subject import Subject, make_subject
from funcloss.audit.torch_optim import read_optimizer, strangers
from funcloss.audit.training import AuditStep, StepFindings, make_audit_step
from funcloss.errors import ConfigError
from funcloss.keys import example_keys
from funcloss.optim import Optimizer, OptState, Split, clip_factor
from funcloss.training import init_state
from funcloss.typing import Batch, Grads, LossFn, Params

_SAME = 0.01  # relative distance of two gradients that are one but for rounding


class Watch(Protocol):
    """What :func:`watch` gives: called with a batch, it says who owns the step on it."""

    def __call__(
        self,
        inputs: Any,
        labels: Int[Tensor, " batch"],
        *,
        where: Bool[Tensor, " batch"] | None = None,
    ) -> StepFindings:
        """Return what the batch does at the parameters of now, ``note`` saying what to doubt."""
        ...


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: LossFn,
    *,
    classes: Sequence[str] | int | None = None,
    class_weights: Float[Tensor, " classes"] | None = None,
    reduction: str = "mean",
    options: Mapping[str, Any] | None = None,
    clip_norm: float = 0.0,
) -> Watch:
    """Return a function that says whose the step is that ``torch.optim`` is about to take.

    ``u = sum_c u_c + u_decay + u_history``, exactly, for ``torch.optim.SGD``, ``Adam`` and
    ``AdamW``, whose options, rates and memory are read at every call; of another optimiser, of
    ``amsgrad`` and of ``maximize`` the gradient alone is told, and ``note`` says so. Nothing is
    changed: no parameter, buffer, ``.grad``, mode or memory, and no generator of torch's.

    Call it between ``backward()`` and ``step()``: there it also compares its gradient with the one
    in ``.grad``, and ``note`` says if they are two. Where dropout is at work they are: the audit
    draws masks of its own, and ``note`` says that.

    Args:
        model: In the mode that it is trained in. It must couple no examples, as BatchNorm in
            training mode does.
        optimizer: Of ``torch.optim``, on the model's parameters, in any number of groups.
        loss: One value an example, at cost 1: of this package, or of torch with
            ``reduction="none"``; or the loop's own scalar, to be read as it is.
        classes: Names of the classes, or how many there are; None: as the model has scores.
        class_weights: Cost of each true class, as the loop puts it, shape ``(classes,)``.
        reduction: What the loop divides by: ``mean``, ``weighted_mean`` (torch's ``weight=``) or
            ``sum``.
        options: The loss's own, by name.
        clip_norm: What the loop gives to ``torch.nn.utils.clip_grad_norm_``; 0 clips nothing.

    Returns:
        ``(inputs, labels, where=None) -> findings``. Inputs in a tuple are the model's positional
        arguments, in a dict its keywords.

    Raises:
        ConfigError: an argument makes no sense, or the optimiser has none of the parameters.

    Example:
        >>> from funcloss import losses
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> watched = watch(model, optimizer, losses.cross_entropy, classes=("a", "b", "c"))
        >>> found = watched(torch.ones(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> found.step.rows, found.note
        (('a', 'b', 'c', 'weight decay', 'history'), '')
    """
    _check(model, optimizer, classes, class_weights, reduction, clip_norm)
    known: dict[tuple[bool, ...], tuple[AuditStep, str]] = {}  # by mode, with what to doubt

    def watched(inputs: Any, labels: Tensor, *, where: Tensor | None = None) -> StepFindings:
        _check_labels(labels)
        if (mode := _mode(model)) not in known:
            names = _names(classes, class_weights, make_subject(model, None, None), inputs)
            known[mode] = _audit_step(model, loss, options, names, reduction), _doubt(model)
        audit_step, doubt = known[mode]
        state = init_state(model, _keeping())
        hyper = _hyper(class_weights, options, next(iter(state.params.values())))
        found, kept = audit_step(state, Batch(inputs, labels, where), hyper, None)
        parts = {name: rows[: -len(OWN_ROWS)] for name, rows in kept.items()}
        whole = total_of(parts)
        clip = clip_factor(whole, clip_norm) if clip_norm else torch.ones(())
        step, why = _step_audit(optimizer, model, found.classes, parts, clip)
        notes = (why, doubt or _compared(model, whole, float(clip)))
        return found._replace(step=step, note="; ".join(filter(None, notes)))

    return torch.no_grad()(watched)


def _keeping() -> Optimizer:
    """Return an optimiser that moves nothing and remembers the parts of the gradient.

    So the memory that comes back from an audit step is the gradient, class by class.
    """

    def keep(parts: Grads, memory: Params, grads: Grads, state: OptState, learning_rate: Tensor):
        return {name: part[:0] for name, part in parts.items()}, parts

    def update(grads: Grads, state: OptState, params: Params, learning_rate: Tensor):
        return grads, state

    split = Split(lambda state: {}, lambda params, learning_rate: ({}, {}), keep)
    return Optimizer(lambda params: (), update, split)


def _step_audit(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    classes: tuple[str, ...],
    parts: Grads,
    clip: Tensor,
) -> tuple[StepAudit | None, str]:
    """Return how the step on parts of a gradient is made up; or None, and why."""
    pieces, why = read_optimizer(optimizer, model)
    if not pieces:
        return None, why
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    moves: Params = {}
    for piece in pieces:
        params = {name: tensors[name] for name in piece.names}
        own = scaled_rows(clip.expand(len(classes)), {name: parts[name] for name in piece.names})
        split, why = split_step(
            piece.optimizer, piece.state, params, total_of(own), piece.rate, 0.0
        )
        if split is None:
            return None, why
        moves |= split.split(own, None)[0]
    rates = {float(piece.rate) for piece in pieces}
    rate = rates.pop() if len(rates) == 1 else math.nan
    gram = grams(moves, moves, layers_of(moves)).sum(0)
    strange = strangers(optimizer, model)
    return StepAudit((*classes, *OWN_ROWS), gram, rate, float(clip), strange), ""


def _compared(model: nn.Module, gradient: Grads, clip: float) -> str:
    """Say whether the loop's own gradient, where there is one, is another."""
    grads = {n: p.grad.to_dense() for n, p in model.named_parameters() if p.grad is not None}
    here = {name: grads[name] for name in gradient if name in grads}
    size = norm_of(here)
    if not size:
        return ""
    audited = {name: gradient[name] for name in here}
    clipped = {name: clip * g for name, g in audited.items()}
    if min(distance(audited, here), distance(clipped, here)) <= _SAME * size:
        return ""
    return (
        f"the gradient in .grad, of length {size:.3g}, is not this batch's, of length "
        f"{norm_of(audited):.3g}: accumulated, scaled, clipped or of another step, or the loss or "
        "what divides it is another"
    )


def _audit_step(
    model: nn.Module,
    loss: LossFn,
    options: Mapping[str, Any] | None,
    classes: tuple[str, ...],
    reduction: str,
) -> AuditStep:
    """Return the audit of the gradient, which the step is split by."""
    if options and "class_weights" in options:  # as the loss puts them: the audit does not
        loss = functools.partial(loss, class_weights=options["class_weights"])
    return make_audit_step(model, loss, _keeping(), classes=classes, reduction=reduction)


def _hyper(
    class_weights: Tensor | None, options: Mapping[str, Any] | None, like: Tensor
) -> dict[str, Any]:
    """Return what an audit step takes beside the batch."""
    hyper: dict[str, Any] = {**(options or {}), "learning_rate": torch.ones(())}
    hyper.pop("class_weights", None)
    return hyper if class_weights is None else {**hyper, "class_weights": class_weights.to(like)}


def _mode(model: nn.Module) -> tuple[bool, ...]:
    """Return what a forward pass and a gradient hang on beside the tensors."""
    modes = [m.training for m in model.modules()]
    return (*modes, *(p.requires_grad for p in model.parameters()))


def _doubt(model: nn.Module) -> str:
    """Say what makes the audit's gradient another than the loop's."""
    layers = (m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    if not any(m.training and m.p > 0 for m in layers):
        return ""
    return (
        "dropout is at work: this gradient is under masks of the audit's own, not under the step's"
    )


def _names(
    classes: Sequence[str] | int | None, weights: Tensor | None, subject: Subject, inputs: Any
) -> tuple[str, ...]:
    """Return the names of the classes; where none are given, a number for each score."""
    if classes is not None and not isinstance(classes, int):
        return tuple(map(str, classes))
    if classes is None and weights is not None:
        classes = len(weights)
    if classes is None:
        one = tree_map(lambda x: x[:1], inputs)
        keys = example_keys(subject.key, subject.step, 1)
        scores = subject.predict(subject.params, one, keys)
        if scores.dim() != 2 or scores.shape[1] < 2:
            raise ConfigError(
                "watch: the model must give a score a class, (batch, classes), got "
                f"{tuple(scores.shape)} of one example: say classes="
            )
        classes = scores.shape[1]
    return tuple(map(str, range(classes)))


def _check(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    classes: Sequence[str] | int | None,
    class_weights: Tensor | None,
    reduction: str,
    clip_norm: float,
) -> None:
    """Raise ``ConfigError`` where an argument of :func:`watch` makes no sense."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise ConfigError(
            f"watch: optimizer must be of torch.optim, got a {kind}: make_audit_step takes ours"
        )
    own = set(model.parameters())
    if not any(p in own for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            "watch: the optimizer has no parameter of the model: give the model that it moves"
        )
    if reduction not in REDUCTIONS:
        known = ", ".join(REDUCTIONS)
        raise ConfigError(f"watch: reduction must be one of {known}; got {reduction!r}")
    if not clip_norm >= 0.0:
        raise ConfigError(f"watch: clip_norm must be at least 0, got {clip_norm}")
    number = classes if isinstance(classes, int) or classes is None else len(classes)
    if number is not None and number < 1:
        raise ConfigError(f"watch: classes must be at least 1, got {number}")
    if class_weights is None:
        return
    if class_weights.dim() != 1 or len(class_weights) != (number or len(class_weights)):
        wanted = "(classes,)" if number is None else f"({number},)"
        raise ConfigError(
            f"watch: class_weights must have shape {wanted}, got {tuple(class_weights.shape)}"
        )
    if not bool((class_weights >= 0).all()):
        raise ConfigError(f"watch: class_weights must be at least 0, got {class_weights.tolist()}")


def _check_labels(labels: Tensor) -> None:
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            "watch: labels must be integers, one an example, (batch,), got "
            f"{labels.dtype} {tuple(labels.shape)}: funcloss.audit.audit takes group_by= for others"
        )
