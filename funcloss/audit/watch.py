"""The audit beside a loop that somebody already has: class parts of its own gradient and step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from funcloss.audit.data import GroupBy, number_of
from funcloss.audit.gram import balance, cancelled
from funcloss.audit.inner import distance, norm_of, total_of
from funcloss.audit.ledger import Ledger
from funcloss.audit.loss import LossSpec, as_spec
from funcloss.audit.optimizers import bare
from funcloss.audit.parts import (
    NO_GROUP,
    POOLED,
    Groups,
    Parts,
    add_parts,
    class_parts,
    dense,
    difference,
    groups_in,
    passing,
)
from funcloss.audit.state import ModelState, check_no_coupling, has_dropout, make_model_state
from funcloss.audit.taken import Match, Told, tell_step
from funcloss.audit.training import BatchAudit, StepFindings, make_batch_audit, nothing_found
from funcloss.audit.watch_ledger import LedgerOptions, WatchLedger
from funcloss.errors import AuditError, ConfigError
from funcloss.keys import example_keys
from funcloss.objectives import make_forward
from funcloss.objectives.supervised import Forward
from funcloss.optim import clip_factor
from funcloss.typing import Batch, Grads, LossFn

_ALL_ROWS = 1000  # classes of which each has a row, in the batch or not
_DROPOUT = "dropout is active: this gradient is under masks of the audit's own, not the step's"
_WITHIN = "not audited: the optimiser stepped within backward(): use watched.through()"
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")
_PLAIN_ROWS = {NO_GROUP: "no group", POOLED: "other classes"}


class Watch:
    """Splits the steps of a loop by class, as :func:`watch` returns it.

    Attributes:
        found: What was told of the last step that was audited.
    """

    found: StepFindings

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        spec: LossSpec | None,
        classes: Sequence[str] | int | None,
        *,
        clip_norm: float,
        every: int,
        memory: float,
        on_step: Callable[[StepFindings], None] | None,
    ) -> None:
        """Begin to listen to the optimiser's steps."""
        self._model, self._optimizer, self._spec = model, optimizer, spec
        self._classes, self._clip_norm = classes, clip_norm
        self._every, self._memory, self._on_step = every, memory, on_step
        self._known: dict[tuple[bool, ...], tuple[Forward, BatchAudit]] = {}  # by mode
        self._steps = 0
        self._within = 0  # calls of step() that are running
        self._doubt: str | None = None  # whether the parts add up to .grad; None: not tried yet
        self._hooks: list[RemovableHandle] = []
        self.found = nothing_found("no step has been audited yet")
        self._ledger: WatchLedger | None = None
        self._forget()
        stepping = bare(optimizer)
        self._handles = [
            stepping.register_step_pre_hook(self._before_step),
            stepping.register_step_post_hook(self._after_step),
        ]

    def backward(
        self,
        values: Float[Tensor, "*terms"],
        groups: Int[Tensor, "*terms"],
        *,
        class_weights: Float[Tensor, " classes"] | None = None,
        divisor: float | Tensor | None = None,
        scaler: Any = None,
        retain_graph: bool = False,
    ) -> None:
        """Fill ``.grad`` as ``loss.backward()`` does, and keep each class's part of it.

        The loss is ``sum_i w[group_i] values_i / divisor``; class ``c``'s part is the gradient of
        its own terms, from the graph of the loop's own forward pass: exact with batch
        normalisation, dropout, autocast, gradient checkpointing, whatever couples the examples.
        The parts are told with the step, at ``optimizer.step()``, in ``found``.

        Args:
            values: Terms of the loss, one per example, pixel, token or label, of any shape.
            groups: What each term counts for, of that shape: classes, domains, sources. Below 0:
                nothing; such a term is in the loss and in a row ``no group``.
            class_weights: Factor on the terms of each group, ``(classes,)``, where the values do
                not have it in them.
            divisor: Of the sum; None: the number of values, as ``values.mean()``.
            scaler: The loop's ``torch.amp.GradScaler``, if it has one.
            retain_graph: Whether another backward pass needs the graph.

        Raises:
            ValueError: the class weights do not fit the groups, so that the loss is not defined.
        """
        if class_weights is not None:
            values_in = _weighted(values, groups, class_weights)
        else:
            values_in = values
        total = values_in.mean() if divisor is None else values_in.sum() / divisor
        if scaler is not None:
            total = scaler.scale(total)
        params, before = self._begin()
        parts, seen, last, steps = {}, None, None, self._steps
        if self._due() and (seen := self._seen(values, groups, values)) and seen.counts:
            # The most frequent group's part is what the others leave of .grad, but for the first
            # time, and where .grad will be that of several processes.
            *others, last = seen.counts
            by_difference = self._doubt == "" and self._world() == 1
            wanted = others if by_difference else [*others, last]

            def passes() -> Parts:
                (cotangents,) = torch.autograd.grad(total, values, retain_graph=True)
                return class_parts(values, cotangents, seen, params, wanted)

            parts = self._passed(passes)
        total.backward(retain_graph=retain_graph)
        if self._steps > steps:
            self.found = nothing_found(_WITHIN)
            return
        if last is None or seen is None or self._why:
            return
        if last not in parts:
            parts[last] = [
                difference(p.grad, [b, *(own[i] for own in parts.values())])
                for i, (p, b) in enumerate(zip(params, before, strict=True))
            ]
        elif self._doubt is None and self._world() == 1:
            self._doubt = _adds_up(params, before, parts)
        self._scale = 1.0 if scaler is None else scaler.get_scale()
        self._keep(parts, seen, class_weights)

    def through(
        self,
        predictions: Float[Tensor, "*terms classes"],
        groups: Tensor,
        *,
        class_dim: int = -1,
        class_weights: Float[Tensor, " classes"] | None = None,
        scaler: Any = None,
    ) -> None:
        """Keep each class's part of the gradient that the loop's own ``backward()`` will take.

        Called between the forward pass and ``loss.backward()``, it changes neither. Class ``c``'s
        part is ``J^T (mask_c * dL/dpredictions)``: exact for every loss of these predictions,
        with the loop's weights, division and scaling in it. What reaches the parameters on
        another way (a penalty) is told as a row ``other gradient``.

        Args:
            predictions: Of the model, with their graph; without one, as in validation, nothing
                happens.
            groups: What the loss of each prediction counts for: the shape of the predictions
                without the classes' axis, or its first axes, or all of it. Below 0: nothing.
            class_dim: The classes' axis, -1, or 1 for ``(batch, classes, height, width)``.
            class_weights: That the loss has in it, ``(classes,)``: for the expected shares.
            scaler: The loop's ``torch.amp.GradScaler``, if it has one.
        """
        if not predictions.requires_grad or not self._due():
            return

        def split(cotangents: Tensor) -> None:
            self.take(
                predictions,
                cotangents,
                groups,
                class_dim=class_dim,
                class_weights=class_weights,
                scaler=scaler,
            )

        self._hooks.append(predictions.register_hook(split))  # holds the graph until removed

    def take(
        self,
        predictions: Float[Tensor, "*terms classes"],
        cotangents: Float[Tensor, "*terms classes"],
        groups: Tensor,
        *,
        class_dim: int = -1,
        class_weights: Float[Tensor, " classes"] | None = None,
        scaler: Any = None,
    ) -> bool:
        """Do as :meth:`through`, in a hook of one's own, of ``predictions.register_hook``.

        Args:
            predictions: That have the hook.
            cotangents: As the hook gets them, ``dL/dpredictions``.
            groups: As for :meth:`through`, and all that follow.
            class_dim: The classes' axis.
            class_weights: That the loss has in it.
            scaler: The loop's GradScaler.

        Returns:
            Whether any of the parameters has a gradient through them.
        """
        if passing() or not self._due():
            return True
        params, _ = self._begin()
        dims = predictions.dim()
        terms = cotangents.detach()
        wide = groups.dim() == dims - 1  # the classes' axis is to be passed over
        seen = self._seen(terms.movedim(class_dim, -1) if wide else terms, groups)
        if seen is None:
            return True
        over = replace(seen, of_terms=seen.of_terms.unsqueeze(class_dim)) if wide else seen
        parts = self._passed(
            lambda: class_parts(predictions, cotangents, over, params, [*seen.counts])
        )
        if parts and all(p is None for own in parts.values() for p in own):
            return False
        if parts:
            self._scale = 1.0 if scaler is None else scaler.get_scale()
            self._keep(parts, seen, class_weights)
        return True

    @torch.no_grad()
    def __call__(
        self,
        inputs: Any,
        labels: Int[Tensor, " batch"],
        *,
        where: Bool[Tensor, " batch"] | None = None,
    ) -> StepFindings:
        """Return the shares of a batch at the present parameters, from a forward pass of its own.

        For loops that cannot be changed: between ``loss.backward()`` and ``optimizer.step()``. It
        needs the loss that the watch was given, and a model that couples no examples.

        Args:
            inputs: As for the model; a tuple holds its arguments, a dict its keywords.
            labels: One integer per example.
            where: Which examples count; None: all.

        Returns:
            The findings; where there are none, ``note`` says why.

        Raises:
            ConfigError: the watch was given no loss.
        """
        if self._spec is None:
            raise ConfigError("watch: it was given no loss: use backward() or through()")
        device = next(iter(self._model.parameters())).device.type
        try:
            _check_labels(labels)
            with torch.autocast(device, enabled=False):  # verdicts of half precision would stay
                return self._of_batch(self._spec, Batch(inputs, labels, where))
        except Exception as error:  # whatever the model does: the training goes on
            return nothing_found(_said(error))

    def keep_ledger(
        self,
        held_out: Any,
        loss: LossFn | LossSpec | None = None,
        group_by: GroupBy | None = None,
        options: LedgerOptions | None = None,
    ) -> None:
        """Begin a ledger, as ``watch(held_out=)`` does; args as there.

        Raises:
            ConfigError: the held-out losses cannot be measured.
        """
        self._ledger = WatchLedger(
            self._model,
            self._optimizer,
            held_out,
            self._spec if loss is None else as_spec(loss),
            self._classes,
            group_by=group_by,
            options=options or LedgerOptions(),
            processes=self._processes,
        )

    @property
    def ledger(self) -> Ledger | None:
        """The ledger of the steps so far; None before the first, or without ``held_out=``."""
        return None if self._ledger is None else self._ledger.ledger

    @property
    def ledger_parts(self) -> tuple[str, ...]:
        """Names of the columns of the ledger."""
        return () if self._ledger is None else self._ledger.parts

    @property
    def ledger_note(self) -> str:
        """Why the ledger ended, or what is in doubt; empty: nothing."""
        return "" if self._ledger is None else self._ledger.note

    def ledger_state(self) -> dict[str, Tensor]:
        """Return the ledger with what it needs to go on, by name, to be kept with a checkpoint."""
        return {} if self._ledger is None else self._ledger.state()

    def load_ledger(self, state: Mapping[str, Tensor]) -> None:
        """Go on with a ledger from :meth:`ledger_state`; load model and optimiser before.

        Raises:
            ConfigError: the watch keeps no ledger, or another.
        """
        if self._ledger is None:
            raise ConfigError("watch: it keeps no ledger to go on with: give held_out=")
        self._ledger.load(state)

    def close(self) -> None:
        """Stop listening to the optimiser."""
        for handle in (*self._handles, *self._hooks):
            handle.remove()
        self._forget()

    # A micro-batch ---

    def _forget(self) -> None:
        self._parts: Parts = {}
        self._counts: dict[int, int] = {}
        self._sums: dict[int, float] = {}  # of the terms, at weight 1
        self._pooled: set[int] = set()  # groups that share a row, in some micro-batch
        self._trained: list[nn.Parameter] = []
        self._weights: Tensor | None = None
        self._scale = 1.0
        self._why = ""  # why this step cannot be told
        self._told: tuple[Told, StepFindings] | None = None

    def _audited(self) -> bool:
        return self._steps % self._every == 0

    def _due(self) -> bool:
        """Return whether the parts of this step are asked for."""
        return self._audited() or (self._ledger is not None and self._ledger.wants_parts)

    def _params(self) -> list[nn.Parameter]:
        """Return what is trained by this optimiser, which may be one of several."""
        moved = {p for group in bare(self._optimizer).param_groups for p in group["params"]}
        return [p for p in self._model.parameters() if p.requires_grad and p in moved]

    def _strange(self) -> str:
        """Return a note if the optimiser moves what is not the model's, else nothing."""
        own = set(self._model.parameters())
        groups = bare(self._optimizer).param_groups
        if all(p in own for group in groups for p in group["params"]):
            return ""
        return "the optimiser moves parameters of another model too, which are left out"

    def _world(self) -> int:
        group = self._processes()
        return 1 if group is None else dist.get_world_size(group)

    def _processes(self) -> dist.ProcessGroup | None:
        """Return the processes that average their gradients; None: there is one."""
        model: Any = self._model
        wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        return model.process_group if wrapped else None

    def _begin(self) -> tuple[list[nn.Parameter], list[Tensor | None]]:
        """Return the step's parameters and copies of their gradients; if all are 0, it begins."""
        self._within = 0  # whatever became of the last step
        now = self._params()
        grads = [p.grad for p in now if p.grad is not None]
        if not self._due() or not grads or not any(bool(g.any()) for g in map(dense, grads)):
            if self._parts or self._why:
                self._forget()
            self._trained = now
            return now, [None] * len(now)
        if not self._parts:
            self._trained = now
        params = self._trained
        return params, [None if p.grad is None else p.grad.detach().clone() for p in params]

    def _seen(self, terms: Tensor, groups: Tensor, values: Tensor | None = None) -> Groups | None:
        """Return the groups of the terms, or None and the reason in ``_why``."""

        def find() -> Groups | None:
            if groups.is_floating_point() or groups.shape != terms.shape[: groups.dim()]:
                raise ValueError(
                    "watch: groups must be integers of the shape of the terms, "
                    f"{tuple(terms.shape)}, got {groups.dtype} {tuple(groups.shape)}"
                )
            size = sum(p.numel() * p.element_size() for p in self._params())
            most = max(2, int(self._memory * 2**20 / size))
            seen = groups_in(groups, most, values, held=self._parts)
            whole = float(terms.sum()) if values is None else sum(seen.sums.values())
            if not math.isfinite(whole):
                raise AuditError("the loss is not finite: there is no gradient to split")
            number = number_of(self._classes)
            if number and max(seen.counts, default=0) >= number:
                raise AuditError(
                    f"labels must be below {number}, got {max(seen.counts)}: give watch classes="
                )
            return seen

        return self._tried(find, None)

    def _passed(self, make: Callable[[], Parts]) -> Parts:
        """Return parts by passes, or nothing; time that the ledger alone asks for is counted."""
        if self._ledger is None or self._audited():
            return self._tried(make, {})
        with self._ledger.measuring():
            return self._tried(make, {})

    def _tried(self, make: Callable[[], Any], otherwise: Any) -> Any:
        """Return what is made; a failure is noted, and the loop goes on."""
        if self._why:
            return otherwise
        try:
            return make()
        except Exception as error:  # of autograd, of the model's own hooks, of memory
            self._why = _said(error)
            self._parts = {}
            return otherwise

    def _keep(self, parts: Parts, seen: Groups, weights: Tensor | None) -> None:
        add_parts(self._parts, parts)
        self._weights = weights
        self._pooled.update(seen.pooled)
        for group, count in seen.counts.items():
            self._counts[group] = self._counts.get(group, 0) + count
            self._sums[group] = self._sums.get(group, 0.0) + seen.sums[group]

    # The step ---

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> Any:
        """Tell the step; where the gradient is computed in a closure, after that."""
        self._within += 1
        if self._within > 1:  # a subclass's step() calls that of its base, which has the hooks too
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._tell()
            return None

        def and_tell() -> Any:
            loss = closure()
            self._tell()
            return loss

        if len(args) > 1:
            return (args[0], and_tell, *args[2:]), kwargs
        return args, {**kwargs, "closure": and_tell}

    @torch.no_grad()
    def _tell(self) -> None:
        """Tell the step, and let the ledger read it."""
        if self._due() and (self._parts or self._why or self._world() > 1):
            if self._world() > 1:
                try:
                    self._reduce()
                except Exception as error:  # of a process that is gone, say
                    self._why = self._why or _said(error)
            self._told = self._tried(self._split, None)
            if self._told is None and self._audited():
                self.found = nothing_found(self._why)
        if self._ledger is not None:
            match = Match() if self._told is None else self._told[0].match
            self._ledger.before_step(
                self._parts, self._trained, match, self._scale, self._as_stepped, self._why
            )
        self._parts = {}

    def _split(self) -> tuple[Told, StepFindings]:
        for group in self._pooled & self._parts.keys():  # of its own in another process
            add_parts(self._parts, {POOLED: self._parts.pop(group)})
            self._counts[POOLED] += self._counts.pop(group)
            self._sums[POOLED] += self._sums.pop(group)
        params, ids = self._params(), sorted(self._parts, key=lambda g: (g < 0, g))
        if ids and [*map(id, params)] != [*map(id, self._trained)]:
            raise AuditError(
                "what is trained changed within the step: freeze before its first batch"
            )
        names = tuple(self._name(group) for group in ids)
        told = tell_step(
            self._optimizer,
            params,
            [None if p.grad is None else self._as_stepped(p.grad) for p in params],
            lambda i: (self._parts[group][i] for group in ids),
            names,
            scale=self._scale,
            strange=self._strange(),
        )
        number = number_of(self._classes) or 0
        if number <= _ALL_ROWS and POOLED not in ids:
            every = sorted({*range(number), *ids}, key=lambda g: (g < 0, g))
            names = tuple(self._name(group) for group in every)
            told, ids = _with_all(told, [every.index(group) for group in ids], names), every
        count = torch.tensor([self._counts.get(group, 0) for group in ids])
        sums = [self._sums.get(group, math.nan) for group in ids]
        loss = torch.tensor(sums, dtype=torch.float64)
        weights = torch.ones(len(ids), dtype=torch.float64)
        if self._weights is not None:
            held = self._weights.detach().cpu().double()
            weights = torch.stack([held[g] if g >= 0 else weights.new_ones(()) for g in ids])
        inverse = torch.where(weights > 0, 1.0 / weights, 0.0)
        at_one = told.gram * inverse[:, None] * inverse
        now = balance(at_one, count, weights)
        notes = [
            told.why_not,
            told.match.note,
            self._doubt,
            cancelled(now, max(torch.finfo(p.dtype).eps for p in params)),
        ]
        if POOLED in ids:
            notes.append("memory= holds the gradients of some classes: the others share a row")
        note = "; ".join(filter(None, notes))
        return told, StepFindings(now, count, loss / count, told.step, names, note)

    def _as_stepped(self, grad: Tensor) -> Tensor:
        """Return a gradient as the step takes it: a fused kernel takes the scale out itself."""
        scale = getattr(bare(self._optimizer), "grad_scale", None)
        return grad if scale is None else dense(grad) / scale

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        """Compare the step that was told with the one that was taken."""
        self._within = max(self._within - 1, 0)
        if self._within:
            return
        told, due = self._told, self._audited() and (self._told or self._why)
        if told is not None and self._audited():
            self.found = self._tried(lambda: _compared(*told), told[1])
        if self._ledger is not None:
            apart = 0.0 if told is None else self._tried(lambda: _apart(told[0])[0], 0.0)
            self._ledger.after_step(apart)
        self._steps += 1
        while self._hooks:
            self._hooks.pop().remove()
        self._forget()
        if due and self._on_step is not None:
            self._on_step(self.found)

    def _reduce(self) -> None:
        """Bring together the parts of all processes, averaged as DistributedDataParallel does."""
        group = self._processes()
        told: list[Any] = [None] * self._world()
        mine = (self._counts, self._sums, self._pooled, self._why)
        dist.all_gather_object(told, mine, group=group)
        if failed := [why for _, _, _, why in told if why]:
            self._why = failed[0]
            return
        self._pooled = set().union(*(pooled for _, _, pooled, _ in told))
        ids = sorted({g for counts, _, _, _ in told for g in counts})
        params = self._params()
        found: Parts = {}
        for of in ids:
            mine = self._parts.get(of, [None] * len(params))
            found[of] = []
            for p, part in zip(params, mine, strict=True):
                part = torch.zeros_like(p) if part is None else dense(part).contiguous()
                dist.all_reduce(part, group=group)
                found[of].append(part / len(told))
        self._parts = found
        self._counts = {g: sum(counts.get(g, 0) for counts, _, _, _ in told) for g in ids}
        self._sums = {g: sum(sums.get(g, 0.0) for _, sums, _, _ in told) for g in ids}

    # Names ---

    def _name(self, group: int) -> str:
        if group < 0:
            return _PLAIN_ROWS[group]
        if self._classes is None or isinstance(self._classes, int):
            return str(group)
        return str(self._classes[group])

    # A batch of its own forward pass ---

    def _of_batch(self, spec: LossSpec, batch: Batch) -> StepFindings:
        model = self._model
        forward, batch_audit = self._known.get(mode := _mode(model), (None, None))
        if forward is None or batch_audit is None:
            forward = make_forward(model)
            state = make_model_state(model, None, forward=forward)
            names = _names(self._classes, spec, state, batch.inputs)
            batch_audit = make_batch_audit(spec, names)
            self._known[mode] = forward, batch_audit
        state = make_model_state(model, None, forward=forward)
        found, parts = batch_audit(state, batch, {})
        whole = total_of(parts)
        clip = float(clip_factor(whole, self._clip_norm)) if self._clip_norm else 1.0
        named = {n: p for n, p in model.named_parameters() if n in parts}
        moving = any(p.grad is not None for p in named.values())
        told = tell_step(
            self._optimizer,
            [*named.values()],
            [
                clip * whole[n] if p.grad is not None or not moving else None
                for n, p in named.items()
            ],
            lambda i: [*parts.values()][i],
            found.classes,
            strange=self._strange(),
        )
        doubt = _DROPOUT if has_dropout(model) else _differs(named, whole, clip)
        note = "; ".join(filter(None, (told.why_not, doubt)))
        return replace(found, step=told.step, note=note)


def watch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: LossFn | LossSpec | None = None,
    *,
    classes: Sequence[str] | int | None = None,
    clip_norm: float = 0.0,
    every: int = 1,
    memory: float = 2048.0,
    on_step: Callable[[StepFindings], None] | None = None,
    held_out: Any = None,
    held_out_loss: LossFn | LossSpec | None = None,
    group_by: GroupBy | None = None,
    ledger: str | LedgerOptions = "sampled",
) -> Watch:
    """Return what splits the gradients and steps of a loop of ``torch.optim`` by class.

    ``u = sum_c u_c + u_decay + u_history``, exactly: each class's part of the gradient comes from
    the graph of the loop's own forward pass, and the step is split as the optimiser takes it. One
    line of the loop changes::

        watched.backward(values, labels)    # for values.mean().backward()

    or is added, ``watched.through(predictions, labels)`` before ``loss.backward()``. The parts are
    told at ``optimizer.step()``, in ``watched.found`` and to ``on_step``. Nothing else is changed:
    the training is the same to the bit, and nothing that the watch meets in a step ends it: what
    cannot be told is said in ``found.note``.

    Args:
        model: In the mode that it is trained in; perhaps in DistributedDataParallel. Its gradient
            is that in the parameters which the optimizer moves.
        optimizer: Of ``torch.optim``, or accelerate's, Lightning's or fastai's of one.
        loss: For ``watched(inputs, labels)`` alone: one value per example, at weight 1: of this
            package, or of torch with ``reduction="none"``; or the loop's own scalar. Class
            weights, options and what the loop divides by come in a :class:`LossSpec`.
        classes: Names of the classes, or how many there are: each has a row, if there are at most
            1,000; None: those in the batch have.
        clip_norm: For ``watched(inputs, labels)``: what the loop gives to ``clip_grad_norm_``.
            Elsewhere clipping is found.
        every: Audit one step in so many.
        memory: What the class gradients may take, in MiB; the rarest classes share a row.
        on_step: Takes the findings of each step that was audited, after it.
        held_out: Examples for a ledger of the steps, ``watched.ledger``: what each class's part
            of them did to each class's held-out mean loss. A batch ``(inputs, labels)``, a dict
            or a :class:`~funcloss.typing.Batch`, or several of these. None: no ledger.
        held_out_loss: Of one held-out example, at weight 1; None: ``loss``, or else
            cross-entropy of the predictions.
        group_by: From a held-out batch to the group of each example, in place of its label.
        ledger: ``exact`` measures every step; ``sampled`` some, drawn at random, for a tenth of
            the training's time. Either asks for class parts at the steps that it measures,
            whatever ``every`` is. A :class:`LedgerOptions` says more.

    Returns:
        The watch, which listens to the optimiser until ``close()``.

    Raises:
        ConfigError: an argument makes no sense, or the model, as it is wrapped, cannot be watched.

    Example:
        >>> import torch.nn.functional as F
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> watched = watch(model, optimizer, classes=("a", "b", "c"))
        >>> inputs, labels = torch.ones(6, 2), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> values = F.cross_entropy(model(inputs), labels, reduction="none")
        >>> watched.backward(values, labels)
        >>> optimizer.step()
        >>> watched.found.step.rows, watched.found.note
        (('a', 'b', 'c', 'weight decay', 'history'), '')
    """
    spec = None if loss is None else as_spec(loss)
    _check(model, optimizer, spec, classes, clip_norm, every, memory)
    options = LedgerOptions(ledger) if isinstance(ledger, str) else ledger
    watched = Watch(
        model,
        optimizer,
        spec,
        classes,
        clip_norm=clip_norm,
        every=every,
        memory=memory,
        on_step=on_step,
    )
    if held_out is not None:
        try:
            watched.keep_ledger(held_out, held_out_loss, group_by, options)
        except ConfigError:
            watched.close()
            raise
    return watched


def _weighted(values: Tensor, groups: Tensor, class_weights: Tensor) -> Tensor:
    """Return the terms times the weights of their groups; those of none count 1."""
    if groups.shape != values.shape or groups.is_floating_point():
        raise ValueError(
            f"watch: groups must be integers of the shape of the values, {tuple(values.shape)}, "
            f"got {groups.dtype} {tuple(groups.shape)}"
        )
    if class_weights.dim() != 1 or bool((groups >= len(class_weights)).any()):
        raise ValueError(
            "watch: class_weights must have a weight for each group, got "
            f"{tuple(class_weights.shape)} for groups up to {int(groups.max())}"
        )
    of_terms = class_weights.to(values)[groups.long().clamp(min=0)]
    return torch.where(groups < 0, 1.0, of_terms) * values


def _adds_up(params: Sequence[nn.Parameter], before: Sequence[Tensor | None], parts: Parts) -> str:
    """Return how far the parts are from what ``backward()`` added to .grad; or nothing."""
    apart, size = [], []
    for i, p in enumerate(params):
        if p.grad is None:
            continue
        own = [part[i] for part in parts.values()]
        apart.append(difference(p.grad, [before[i], *own]))
        size += [dense(x) for x in (p.grad, *own) if x is not None]
    if not apart:
        return ""
    error, length = (
        float(torch.stack([torch.linalg.vector_norm(x.float()) for x in some]).norm())
        for some in (apart, size)
    )
    half = max(torch.finfo(p.dtype).eps for p in params) > 1e-4
    if not error > (0.05 if half else 0.01) * length:
        return ""
    return (
        f"the class parts add up to .grad only within {error / length:.1%} of their lengths: "
        "a hook changes gradients, a pass is not the same twice, or a checkpoint is reentrant"
    )


def _with_all(told: Told, place: Sequence[int], names: tuple[str, ...]) -> Told:
    """Return what is told with rows of 0 for the names that are not at a place."""
    index, rows, step = torch.tensor(place), len(names), told.step
    gram = torch.zeros(rows, rows, dtype=torch.float64)
    gram[index[:, None], index] = told.gram
    if step is not None:
        beside = step.rows[len(place) :]
        where = torch.cat([index, torch.arange(rows, rows + len(beside))])
        wide = torch.zeros(len(where) + rows - len(place), dtype=torch.float64).diag()
        wide[where[:, None], where] = step.gram
        step = replace(step, rows=(*names, *beside), gram=wide)
    return replace(told, gram=gram, step=step)


def _apart(told: Told) -> tuple[float, float]:
    """Return how far the step taken is from the one told, 0 if by rounding; and the distance."""
    distance, rounding = told.distance()
    return (distance if distance > 0.01 + 4.0 * rounding else 0.0), distance


def _compared(told: Told, found: StepFindings) -> StepFindings:
    """Return findings with the distance of the step that was taken from the one told."""
    apart, distance = _apart(told)
    if not apart:
        return replace(found, moved=distance)
    more = (
        f"the step that was taken is not the one that was told: they differ by {apart:.2g} of "
        "its length"
    )
    return replace(found, moved=distance, note="; ".join(filter(None, (found.note, more))))


def _said(error: Exception) -> str:
    """Return the first sentence of an error as a note."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0].partition(". ")[0][:240]
    for what, way_out in _WAYS_OUT.items():
        if what in text:
            return f"not audited: {line}: {way_out}"
    return f"not audited: {line}"


_WAYS_OUT = {
    "donated buffers": (
        "set torch._functorch.config.donated_buffer = False before the first call of the "
        "compiled model"
    ),
    "compatible with .grad()": "checkpoint with use_reentrant=False",
}


def _differs(named: dict[str, nn.Parameter], gradient: Grads, clip: float) -> str:
    """Return how the loop's own gradient differs, where there is one that does; or nothing."""
    here = {n: dense(p.grad) for n, p in named.items() if p.grad is not None}
    size = norm_of(here)
    if not size:
        return ""
    audited = {name: gradient[name] for name in here}
    clipped = {name: clip * g for name, g in audited.items()}
    if min(distance(audited, here), distance(clipped, here)) <= 0.01 * size:
        return ""
    return (
        f"the gradient in .grad is not this batch's: they differ by {distance(audited, here):.2g} "
        f"at lengths of {size:.3g} and {norm_of(audited):.3g}: accumulated, scaled, clipped or of "
        "another step, or the loss or what divides it is another"
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
    spec: LossSpec | None,
    classes: Sequence[str] | int | None,
    clip_norm: float,
    every: int,
    memory: float,
) -> None:
    """Raise ``ConfigError`` where an argument of :func:`watch` makes no sense."""
    stepping = bare(optimizer)
    if not isinstance(stepping, torch.optim.Optimizer):
        kind = type(optimizer).__name__
        raise ConfigError(
            f"watch: optimizer must be of torch.optim, got a {kind}: make_audit_step takes ours"
        )
    _check_model(model, spec)
    own = set(model.parameters())
    if not any(p in own for group in stepping.param_groups for p in group["params"]):
        raise ConfigError(
            "watch: the optimizer has no parameter of the model: give the model that it moves"
        )
    if not clip_norm >= 0.0:
        raise ConfigError(f"watch: clip_norm must be at least 0, got {clip_norm}")
    if every < 1 or not 0.0 < memory < math.inf:
        raise ConfigError(
            "watch: every must be at least 1, and memory positive and finite, got "
            f"{every} and {memory}"
        )
    number = number_of(classes)
    if number is not None and number < 1:
        raise ConfigError(f"watch: classes must be at least 1, got {number}")
    weights = None if spec is None else spec.class_weights
    if number is not None and weights is not None and len(weights) != number:
        raise ConfigError(
            f"watch: class_weights must have shape ({number},), got {tuple(weights.shape)}"
        )


def _check_model(model: nn.Module, spec: LossSpec | None) -> None:
    """Raise ``ConfigError`` for models that, as they are wrapped, cannot be watched."""
    kinds = {kind.__name__ for m in model.modules() for kind in type(m).__mro__}
    if sharded := [kind for kind in _SHARDED if kind in kinds]:
        raise ConfigError(
            f"watch: the model is sharded ({sharded[0]}), and its gradients are where no process "
            "has all of them: train it with DistributedDataParallel to watch it"
        )
    if "DataParallel" in kinds:
        raise ConfigError(
            "watch: the model is in DataParallel: use DistributedDataParallel, or one device"
        )
    if "GradSampleModule" in kinds:
        raise ConfigError(
            "watch: the model has Opacus' hooks, which keep a gradient per example at every "
            "backward pass: give the model from before make_private"
        )
    if spec is None:
        return
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            "watch: a loss is for watched(inputs, labels), which no TorchScript module can take: "
            "leave it out, and use watched.backward() or watched.through()"
        )
    try:
        check_no_coupling(model)
    except AuditError as error:
        raise ConfigError(
            f"{error}; or leave out the loss and use watched.backward(), which takes any model"
        ) from None


def _check_labels(labels: Tensor) -> None:
    if labels.dim() != 1 or labels.is_floating_point():
        raise ValueError(
            "watch: labels must be integers, one per example, (batch,), got "
            f"{labels.dtype} {tuple(labels.shape)}: audit() takes others, with group_by="
        )
