"""The audit beside a loop that somebody already has: ``torch.optim``'s own memory is read."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from funcloss.audit.inner import distance, grams, layers_of, norm_of, scaled_rows, total_of
from funcloss.audit.loss import LossSpec, as_spec
from funcloss.audit.result import StepAudit
from funcloss.audit.state import ModelState, has_dropout, make_model_state
from funcloss.audit.step import OWN_ROWS, split_step
from funcloss.audit.torch_optim import read_optimizer, strangers
from funcloss.audit.training import BatchAudit, StepFindings, make_batch_audit
from funcloss.errors import ConfigError
from funcloss.keys import example_keys
from funcloss.objectives import make_forward
from funcloss.objectives.supervised import Forward
from funcloss.optim import clip_factor
from funcloss.typing import Batch, Grads, LossFn, Params

_SAME = 0.01  # relative distance of two gradients that are one but for rounding
_DROPOUT = "dropout is active: this gradient is under masks of the audit's own, not the step's"


class Watch(Protocol):
    """A function of a batch that splits the step on it by class, as :func:`watch` returns it."""

    def __call__(
        self,
        inputs: Any,
        labels: Int[Tensor, " batch"],
        *,
        where: Bool[Tensor, " batch"] | None = None,
    ) -> StepFindings:
        """Return the shares of the batch at the present parameters; ``note`` says what to doubt."""
        ...


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: LossFn | LossSpec,
    *,
    classes: Sequence[str] | int | None = None,
    clip_norm: float = 0.0,
) -> Watch:
    """Return a function that splits the step that ``torch.optim`` is about to take by class.

    ``u = sum_c u_c + u_decay + u_history``, exactly, for ``torch.optim.SGD``, ``Adam`` and
    ``AdamW``, whose options, rates and memory are read at every call; of another optimiser, of
    ``amsgrad`` and of ``maximize`` the gradient alone is audited, and ``note`` says so. Nothing is
    changed: no parameter, buffer, ``.grad``, mode or memory, and no generator of torch's.

    Call it between ``backward()`` and ``step()``: there it also compares its gradient with the one
    in ``.grad``, and ``note`` says if they are two. Where dropout is active they are: the audit
    draws masks of its own, and ``note`` says that.

    Args:
        model: In the mode that it is trained in. It must couple no examples, as BatchNorm in
            training mode does.
        optimizer: Of ``torch.optim``, on the model's parameters, in any number of groups.
        loss: One value per example, at weight 1: of this package, or of torch with
            ``reduction="none"``; or the loop's own scalar, to be read as it is. Class weights,
            options and what the loop divides by come in a :class:`LossSpec`.
        classes: Names of the classes, or how many there are; None: as the model has scores.
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
    spec = as_spec(loss)
    _check(model, optimizer, spec, classes, clip_norm)
    known: dict[tuple[bool, ...], tuple[Forward, BatchAudit]] = {}  # by mode

    def watched(inputs: Any, labels: Tensor, *, where: Tensor | None = None) -> StepFindings:
        _check_labels(labels)
        forward, batch_audit = known.get(mode := _mode(model), (None, None))
        if forward is None or batch_audit is None:
            forward = make_forward(model)
            state = make_model_state(model, None, forward=forward)
            batch_audit = make_batch_audit(spec, _names(classes, spec, state, inputs))
            known[mode] = forward, batch_audit
        state = make_model_state(model, None, forward=forward)
        found, parts = batch_audit(state, Batch(inputs, labels, where), {})
        whole = total_of(parts)
        clip = clip_factor(whole, clip_norm) if clip_norm else torch.ones(())
        step, why = _step_audit(optimizer, model, found.classes, parts, clip)
        doubt = _DROPOUT if has_dropout(model) else _compared(model, whole, float(clip))
        return replace(found, step=step, note="; ".join(filter(None, (why, doubt))))

    return torch.no_grad()(watched)


def _step_audit(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    classes: tuple[str, ...],
    parts: Grads,
    clip: Tensor,
) -> tuple[StepAudit | None, str]:
    """Return the step on parts of a gradient by class; or None, and why."""
    groups, why = read_optimizer(optimizer, model)
    if not groups:
        return None, why
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    moves: Params = {}
    for group in groups:
        params = {name: tensors[name] for name in group.names}
        own = scaled_rows(clip.expand(len(classes)), {name: parts[name] for name in group.names})
        split, why = split_step(
            group.optimizer, group.state, params, total_of(own), group.rate, 0.0
        )
        if split is None:
            return None, why
        moves |= split.split(own, None)[0]
    rates = {float(group.rate) for group in groups}
    rate = rates.pop() if len(rates) == 1 else math.nan
    gram = grams(moves, moves, layers_of(moves)).sum(0)
    strange = strangers(optimizer, model)
    return StepAudit((*classes, *OWN_ROWS), gram, rate, float(clip), strange), ""


def _compared(model: nn.Module, gradient: Grads, clip: float) -> str:
    """Return how the loop's own gradient differs, where there is one that does; or nothing."""
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


def _mode(model: nn.Module) -> tuple[bool, ...]:
    """Return what a forward pass and a gradient depend on beside the tensors."""
    modes = [m.training for m in model.modules()]
    return (*modes, *(p.requires_grad for p in model.parameters()))


def _names(
    classes: Sequence[str] | int | None, spec: LossSpec, state: ModelState, inputs: Any
) -> tuple[str, ...]:
    """Return the names of the classes; where none are given, a number for each score."""
    if classes is not None and not isinstance(classes, int):
        return tuple(map(str, classes))
    if classes is None and spec.class_weights is not None:
        classes = len(spec.class_weights)
    if classes is None:
        one = tree_map(lambda x: x[:1], inputs)
        scores = state.predict(state.params, one, example_keys(state.key, state.step, 1))
        if scores.dim() != 2 or scores.shape[1] < 2:
            raise ConfigError(
                "watch: the model must give a score per class, (batch, classes), got "
                f"{tuple(scores.shape)} of one example: say classes="
            )
        classes = scores.shape[1]
    return tuple(map(str, range(classes)))


def _check(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    spec: LossSpec,
    classes: Sequence[str] | int | None,
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
    if not clip_norm >= 0.0:
        raise ConfigError(f"watch: clip_norm must be at least 0, got {clip_norm}")
    number = classes if isinstance(classes, int) or classes is None else len(classes)
    if number is not None and number < 1:
        raise ConfigError(f"watch: classes must be at least 1, got {number}")
    weights = spec.class_weights
    if number is not None and weights is not None and len(weights) != number:
        raise ConfigError(
            f"watch: class_weights must have shape ({number},), got {tuple(weights.shape)}"
        )


def _check_labels(labels: Tensor) -> None:
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            "watch: labels must be integers, one per example, (batch,), got "
            f"{labels.dtype} {tuple(labels.shape)}: audit() takes others, with group_by="
        )
