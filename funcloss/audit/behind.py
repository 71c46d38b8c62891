"""The training examples behind an entry of a ledger: whose gradients raise a class's loss."""

from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from funcloss.audit.data import GroupBy
from funcloss.audit.inner import scaled_rows
from funcloss.audit.ledger import Course, make_course, point_of
from funcloss.audit.loss import LossSpec
from funcloss.audit.sampling import drawn
from funcloss.audit.state import couples
from funcloss.keys import example_keys, keyed_randomness
from funcloss.objectives.supervised import Criterion
from funcloss.optim import Optimizer, Schedule
from funcloss.training import TrainState
from funcloss.transforms import quiet_jvp
from funcloss.typing import Batch, Hyper, LossFn, Params


class Behind(Protocol):
    """What tells how examples move the losses."""

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        hyper: Hyper,
        which: Bool[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "classes examples"]:
        """Return what examples do in the step that begins at a state: all of them, or ``which``."""
        ...


def make_behind(
    model: nn.Module,
    criterion: Criterion,
    optimizer: Optimizer,
    held_out: Batch | Sequence[Batch],
    loss: LossFn | LossSpec,
    *,
    classes: Sequence[str],
    schedule: Schedule | None = None,
    clip_norm: float = 0.0,
    group_by: GroupBy | None = None,
    per_class: int = 5,
    seed: int = 0,
) -> Behind:
    """Return what tells how each example of a batch moves each class's held-out loss.

    To first order, ``<grad L_k, u_i>``, with ``u_i`` the step of the example's own part of the
    gradient, ``J_i^T dL/dz_i``, and of all that the optimiser's memory makes of it later, at the
    step's own rate and scale. One forward-mode pass for each class, along the step that its
    gradient would be: ``a * grad L_k``, where the optimiser makes ``a * g`` of a gradient ``g``.

    Args:
        model: As for :func:`make_ledger`, and all that follow.
        criterion: What the training minimises of predictions.
        optimizer: What takes the steps.
        held_out: Examples that the losses are of.
        loss: Of one held-out example, at weight 1.
        classes: Names of the classes.
        schedule: Factor on the learning rate by number of the step.
        clip_norm: Largest norm of the gradient.
        group_by: From a batch to the group of each example.
        per_class: Held-out examples of each class, drawn for each step.
        seed: Of what is drawn.

    Returns:
        The function; below 0: the example lowers the loss.

    Raises:
        AuditError: as :func:`make_ledger`.

    Example:
        >>> from funcloss import losses, models, optim
        >>> from funcloss.objectives import mean_of
        >>> from funcloss.training import init_state
        >>> _ = torch.manual_seed(0)
        >>> model, optimizer = models.linear((1, 2, 2), 2), optim.sgd()
        >>> batch = Batch(torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> behind = make_behind(
        ...     model, mean_of(losses.cross_entropy), optimizer, batch, losses.cross_entropy,
        ...     classes=("a", "b"))
        >>> state, hyper = init_state(model, optimizer), {"learning_rate": torch.tensor(0.1)}
        >>> effect = behind(state, batch, hyper)
        >>> effect.shape, bool((effect[0, [0, 2, 4]] < 0).all())
        (torch.Size([2, 6]), True)

    References:
        Pruthi, Liu, Kale and Sundararajan, "Estimating training data influence by tracing gradient
        descent", 2020.
    """
    course = make_course(
        model, criterion, optimizer, held_out, loss, classes=classes, schedule=schedule,
        clip_norm=clip_norm, group_by=group_by,
    )  # fmt: skip
    return behind_of(model, course, per_class=per_class, seed=seed)


def behind_of(model: nn.Module, course: Course, *, per_class: int = 5, seed: int = 0) -> Behind:
    """Return what tells of the examples of a course of training, as :func:`make_behind`."""
    held, rows, apart = course.held, len(course.held.classes), not couples(model)

    @torch.no_grad()
    def behind(
        state: TrainState, batch: Batch, hyper: Hyper, which: Tensor | None = None
    ) -> Tensor:
        judged = held.sample(per_class, drawn(seed, int(state.step), 0))
        count = judged.counts
        mean = scaled_rows(1.0 / count.clamp(min=1.0), judged.gradients(point_of(state)))
        split = course.take(state, batch, hyper, state, False).split
        nothing = {n: torch.zeros_like(m) for n, m in split.all_history(rows).items()}
        moves, _ = split.rows(mean, nothing)
        along = {name: move[:rows] for name, move in moves.items()}
        keys = example_keys(state.key, state.step, len(batch.targets))

        def predict(params: Params, some: slice | Tensor = slice(None)) -> Tensor:
            inputs = tree_map(lambda x: x[some] if isinstance(x, Tensor) else x, batch.inputs)
            with keyed_randomness(keys[some]), sdpa_kernel(SDPBackend.MATH):
                return course.forward(params, state.buffers, inputs)[0]

        with torch.enable_grad():
            predictions = predict(state.params).detach().requires_grad_()
            scalar = course.criterion(predictions, batch, hyper)
        (cotangents,) = torch.autograd.grad(scalar, predictions)
        every = torch.ones_like(keys, dtype=torch.bool)
        asked = (every if which is None else which.to(keys.device)).nonzero()[:, 0]
        some = asked if apart else every.nonzero()[:, 0]  # others may move an example's prediction
        if not len(asked):
            return torch.zeros(rows, 0, dtype=torch.float64)

        def slopes(tangents: Params) -> Tensor:
            return jvp(lambda params: predict(params, some), (state.params,), (tangents,))[1]

        with quiet_jvp():
            try:
                along_each = vmap(slopes)(along)
            except RuntimeError:  # something in the model cannot be mapped over
                each = [{n: move[k] for n, move in along.items()} for k in range(rows)]
                along_each = torch.stack([slopes(tangents) for tangents in each])
        found = (cotangents[some] * along_each).flatten(2).sum(2)
        found = (found if apart else found[:, asked]).cpu().double() / (1.0 - split.keeps)
        return torch.where(count[:, None] > 0, found, torch.nan)

    return behind
