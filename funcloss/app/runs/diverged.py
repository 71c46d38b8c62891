"""Why a training is no longer finite: the loss, the step, the example and the option at fault."""

import inspect

import torch
from torch import Tensor

from funcloss.app.registry import LOSSES
from funcloss.app.runs.options import chosen_loss
from funcloss.app.runs.setup import Setup
from funcloss.combinators import options_of
from funcloss.training.loop import fit
from funcloss.training.step import TrainState
from funcloss.typing import Batch, Hyper, LossFn, Metrics

_OTHERS = (1.0, 2.0)  # values of an option at which a loss may be finite


def reason_of(setup: Setup, state: TrainState, hyper: Hyper, steps: int) -> str:
    """Return a sentence on the first step that is not finite.

    Args:
        setup: The training.
        state: A state before that step; the training is repeated from there.
        hyper: What its steps are given.
        steps: How many steps to repeat at most.

    Returns:
        The loss, the step, and the example and the option at fault if it is the loss.
    """
    found: list[tuple[TrainState, Batch]] = []
    done = 0

    def step_on(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        nonlocal done
        after, metrics = setup.train_step(state, batch, hyper)
        done += 1
        if not all(x.isfinite().all() for x in (metrics["loss"], *after.params.values())):
            found.append((state, batch))
        return after, metrics

    for _ in fit(
        state,
        step_on,
        setup.drawn,
        order=setup.order,
        iter_batches=setup.iter_batches,
        epochs=setup.epochs,
        batch_size=setup.config.batch_size,
        should_stop=lambda: bool(found) or done >= steps,
    ):
        if found:
            break
    name = setup.config.loss
    if not found:
        return f"the loss {name} is not finite"
    before, batch = found[0]
    loss = chosen_loss(setup.config)
    options = {n: x for n, x in hyper.items() if n in options_of(loss) and n != "class_weights"}
    if batch.costs is not None:
        options["costs"] = batch.costs
    logits, _ = setup.untrained.forward(before.params, before.buffers, batch.inputs)
    place = f"the loss {name} is not finite at step {int(before.step) + 1:,}"
    fault = _of_example(loss, logits.detach(), batch.targets, options)
    if not fault:
        return f"{place}, though that of each example is: a smaller learning_rate may help"
    own = "" if name in LOSSES else "; funcloss check tries it at the edges"
    return f"{place}: {fault}{own}"


def _of_example(loss: LossFn, logits: Tensor, labels: Tensor, options: Hyper) -> str:
    """Return the first example whose value or gradient is not finite, and the option at fault."""
    if not logits.isfinite().all():
        return ""
    bad, what = _unbounded(loss, logits, labels, options)
    if bad is None:
        return ""
    row = logits[bad].flatten()
    line = (
        f"its {what} is not for example {bad} of the batch, of label {labels[bad].tolist()} and "
        f"logits from {float(row.min()):.4g} to {float(row.max()):.4g}"
    )
    numbers = {**_defaults(loss), **{name: x for name, x in options.items() if not x.dim()}}
    for name, number in numbers.items():
        for other in _OTHERS:
            given = {**options, name: torch.full_like(number, other)}
            if _unbounded(loss, logits, labels, given)[0] is None:
                return f"{line}, with {name}={float(number):g} (at {other:g} it is finite)"
    named = ", ".join(f"{name}={float(x):g}" for name, x in numbers.items())
    return f"{line}, with {named}" if named else line


def _defaults(loss: LossFn) -> dict[str, Tensor]:
    """Return the numbers that a loss has by default."""
    try:
        parameters = inspect.signature(loss).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: torch.tensor(p.default) for p in parameters if isinstance(p.default, float)}


def _unbounded(
    loss: LossFn, logits: Tensor, labels: Tensor, options: Hyper
) -> tuple[int | None, str]:
    """Return the first example that is not finite, and what of it: its value or its gradient."""
    logits = logits.clone().requires_grad_()
    values = loss(logits, labels, **options)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    for what, tensor in (("value", values), ("gradient", gradient)):
        rows = tensor.reshape(len(labels), -1).isfinite().all(-1)
        if not rows.all():
            return int((~rows).nonzero()[0]), what
    return None, ""
