"""The held-out losses of the classes and their gradients, wherever a training is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from funcloss.audit.data import GroupBy, MakeBatches, as_batch, groups_of, reiterable
from funcloss.audit.gradients import AuditContext
from funcloss.audit.loss import LossSpec
from funcloss.audit.measure import AuditSettings, prepare, probe_of
from funcloss.audit.state import make_model_state
from funcloss.audit.step import class_losses, loss_gradients
from funcloss.errors import AuditError
from funcloss.objectives import make_forward
from funcloss.objectives.skeleton import skeleton_of
from funcloss.objectives.supervised import Forward
from funcloss.typing import Batch, Buffers, Grads, Params

_BATCH = 256  # examples at a time


class Point(NamedTuple):
    """Where a training is, as far as a model's predictions depend on it."""

    params: Params
    buffers: Buffers


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The mean loss of each class on held-out examples, in evaluation mode, at any point."""

    skeleton: nn.Module
    forward: Forward
    context: AuditContext
    batch: Batch  # all examples
    groups: Tensor  # what each counts for; -1: nothing
    group_by: GroupBy | None
    make_batches: MakeBatches
    # The last points and what was found there: where a step ends, the next one begins.
    last: dict[str, tuple[Point, Any]] = field(default_factory=dict)

    @property
    def classes(self) -> range:
        """Return all classes."""
        return range(self.context.classes)

    def losses(self, point: Point) -> tuple[Tensor, Tensor]:
        """Return the mean loss of each class, and how many examples it has."""
        return self._once(
            "losses",
            point,
            lambda: class_losses(self._at(point), self.make_batches, point.params),
        )

    def gradients(self, point: Point) -> Grads:
        """Return the gradient of each class's sum of losses."""
        return self._once(
            "gradients",
            point,
            lambda: loss_gradients(self._at(point), self.make_batches, self.classes),
        )

    @property
    def counts(self) -> Tensor:
        """Return how many examples each class has, in float64 on the CPU."""
        groups = self.groups.cpu()
        return groups[groups >= 0].bincount(minlength=len(self.classes)).double()

    def sample(self, most: int, generator: torch.Generator) -> "HeldOut":
        """Return the losses on at most so many examples of each class, drawn at random."""
        index = some_of_each(self.groups.cpu(), len(self.classes), most, generator)
        index = index.to(self.groups.device)
        if len(index) == int(self.counts.sum()):
            return self
        batch = tree_map(lambda x: x[index] if isinstance(x, Tensor) else x, self.batch)
        make_batches = _batches(batch, self.context.state, self.group_by)
        groups = self.groups[index]
        return replace(self, batch=batch, groups=groups, make_batches=make_batches, last={})

    def _once(self, what: str, point: Point, find: Callable[[], Any]) -> Any:
        """Return what is found at a point, as it was if that was the last one."""
        if what not in self.last or not _same(self.last[what][0], point):
            self.last[what] = point, find()
        return self.last[what][1]

    def _at(self, point: Point) -> AuditContext:
        at = {**point.params, **point.buffers}
        return replace(
            self.context, state=make_model_state(self.skeleton, at, forward=self.forward)
        )


def make_held_out(
    model: nn.Module,
    held_out: Batch | Sequence[Batch],
    spec: LossSpec,
    names: tuple[str, ...],
    group_by: GroupBy | None,
) -> HeldOut:
    """Choose, at the model's own tensors, how the gradients of held-out losses are measured.

    Args:
        model: In any mode; it is not touched.
        held_out: The examples, as a batch or several.
        spec: Of the loss; its class weights are left out.
        names: Of the classes.
        group_by: From a batch to the group of each example, in place of its label.

    Raises:
        AuditError: they cannot be audited.
    """
    batches = [held_out] if isinstance(held_out, Batch) else [as_batch(b) for b in held_out]
    if not batches:
        raise AuditError("ledger: there are no held-out examples")
    batch = tree_map(lambda *x: torch.cat(x) if isinstance(x[0], Tensor) else x[0], *batches)
    skeleton = skeleton_of(model).eval()
    forward = make_forward(skeleton)
    with torch.no_grad():
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        state = make_model_state(skeleton, own, forward=forward)
        make_batches = _batches(batch, state, group_by)
        settings = AuditSettings(classes=names, per_example=False, group_by=group_by)
        _, probe = probe_of(make_batches)
        spec = replace(spec, class_weights=None)
        context, _ = prepare(state, spec, make_batches, probe, settings, with_step=False)
    context = replace(context, blocks=(range(len(names)),))
    groups = groups_of(batch, group_by)
    return HeldOut(skeleton, forward, context, batch, groups, group_by, make_batches)


def some_of_each(groups: Tensor, number: int, most: int, generator: torch.Generator) -> Tensor:
    """Return the places of at most so many of each of a number of groups, drawn; ascending."""
    shuffled = torch.randperm(len(groups), generator=generator)
    of_each = [shuffled[groups[shuffled] == c][:most] for c in range(number)]
    return torch.cat(of_each).sort().values


def _same(a: Point, b: Point) -> bool:
    """Return whether two points are of the same tensors."""
    return all(x[name] is y.get(name) for x, y in zip(a, b, strict=True) for name in x)


def _batches(batch: Batch, state, group_by: GroupBy | None) -> MakeBatches:
    return reiterable(batch, state, batch_size=_BATCH, group_by=group_by)
