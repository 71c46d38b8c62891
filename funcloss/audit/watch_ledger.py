"""The ledger of a loop that somebody already has, kept beside the steps of its optimiser."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from funcloss import losses
from funcloss._trees import flatten
from funcloss.audit.data import GroupBy, as_batch, groups_of, in_memory, number_of
from funcloss.audit.held_out import Point, make_held_out
from funcloss.audit.inner import distance
from funcloss.audit.ledger import STATISTICS, Ledger, Taken, begun, ledger_from, with_step
from funcloss.audit.loss import LossSpec, as_spec
from funcloss.audit.optimizers import bare, memory_of
from funcloss.audit.parts import POOLED, Parts, dense
from funcloss.audit.sampled import asks, judged, with_perhaps
from funcloss.audit.sampling import every_for
from funcloss.audit.step import OWN_ROWS
from funcloss.audit.taken import REST, Match
from funcloss.audit.torch_steps import (
    SURVIVES,
    ParameterStep,
    parameter_step,
    part_rows,
    split_torch_step,
)
from funcloss.errors import AuditError, ConfigError
from funcloss.typing import Batch, Grads, LossFn

KINDS = ("sampled", "exact")
_LITTLE = 2.0  # seconds that a sampled ledger may always take


@dataclass(frozen=True, eq=False)
class LedgerOptions:
    """How :func:`watch` keeps a ledger.

    Args:
        kind: ``exact`` measures every step; ``sampled`` some, drawn at random.
        share: What a sampled ledger may take, of the training's time; two seconds it always may.
        per_class: Held-out examples of each class that a sampled step is measured on.
        seed: Of what is drawn.
        model: What gives predictions of held-out inputs; None: the model that is watched.

    Raises:
        ConfigError: one of them makes no sense.
    """

    kind: str = "sampled"
    share: float = 0.1
    per_class: int = 20
    seed: int = 0
    model: nn.Module | None = None

    def __post_init__(self) -> None:
        """Check what holds before any model is known."""
        if self.kind not in KINDS:
            raise ConfigError(f"watch: ledger must be one of {KINDS}, got {self.kind!r}")
        if not self.share > 0.0 or self.per_class < 1:
            raise ConfigError(
                "watch: share must be above 0 and per_class at least 1, got "
                f"{self.share} and {self.per_class}"
            )


@dataclass(frozen=True, eq=False)
class _Pending:
    """What is known of a step before it is taken."""

    before: Point
    steps: dict[str, ParameterStep]
    rows: Grads
    kept_then: Tensor


class WatchLedger:
    """Keeps a ledger beside the steps of an optimiser; what goes wrong ends it with a note.

    Attributes:
        parts: Names of the ledger's columns.
        note: Why it ended, or what is in doubt; empty: nothing.
        wants_parts: Whether it asks for the class parts of the next step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        held_out: Any,
        loss: LossFn | LossSpec | None,
        classes: Sequence[str] | int | None,
        *,
        group_by: GroupBy | None,
        options: LedgerOptions,
        processes: Callable[[], dist.ProcessGroup | None],
    ) -> None:
        """Begin at the model as it is.

        Raises:
            ConfigError: its held-out losses cannot be measured.
        """
        self._model = _unwrapped(options.model or model)
        self._optimizer, self._options, self._processes = optimizer, options, processes
        self._group_by = group_by
        self._spec = as_spec(losses.cross_entropy if loss is None else loss)
        try:
            self._batches = _batches(held_out)
            self._names = _names(classes, self._batches, group_by)
            self._make()
        except ConfigError:
            raise
        except Exception as error:  # of the model, the loss or the examples
            raise ConfigError(f"watch: held_out: {error}") from error
        self.parts = (*self._names, REST, *OWN_ROWS, STATISTICS)
        self.note, self._ended = "", False
        self._ledger: Ledger | None = None
        self._judged = -1  # the step after which the losses of a sampled ledger were measured
        self._pending: _Pending | None = None
        self._asked = False  # whether this step is measured
        self._remember: tuple[str, ...] = ()  # parameters that have memory, when it began
        self._keeps, self._kept = 0.0, torch.zeros(0, dtype=torch.float64)
        self._spent = self._passed = 0.0  # seconds, of the ledger and in all
        self._clock: float | None = None
        self._left = self._copy()  # where the last step ended, or the training began
        self._followed = False  # whether that was a step
        self._every, self._wants, self.wants_parts = 1, True, True
        self._plan(0)

    @property
    def exact(self) -> bool:
        """Whether every step is measured."""
        return self._options.kind == "exact"

    @property
    def ledger(self) -> Ledger | None:
        """The ledger after the last step, with the losses there; None before the first."""
        ledger = self._ledger
        if ledger is None or self.exact or self._ended or self._judged == int(ledger.steps):
            return ledger
        with self.measuring():
            self._tried(lambda: self._judge(ledger))
        return self._ledger

    def state(self) -> dict[str, Tensor]:
        """Return what a training needs to go on, by name; empty before the first step."""
        if (ledger := self.ledger) is None:
            return {}
        kept = {name: value for name, value in ledger._asdict().items() if value is not None}
        seconds = torch.tensor([self._spent, self._passed], dtype=torch.float64)
        keeps = torch.tensor(self._keeps, dtype=torch.float64)
        own = {"seconds": seconds, "kept": self._kept, "keeps": keeps}
        return flatten({"ledger": kept, **own})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned, with the model as it is.

        Raises:
            ConfigError: it is of other classes.
        """
        if not tensors:
            return
        prefix = "ledger/"
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        device = next(self._model.parameters()).device
        try:
            ledger = ledger_from(own, device)
            waits = {} if ledger.sampling is None else ledger.sampling.waiting.memory
            if SURVIVES in waits:
                waits[SURVIVES] = waits[SURVIVES].cpu()
            spent, passed = tensors["seconds"].tolist()
            kept, keeps = tensors["kept"].cpu(), float(tensors["keeps"])
        except KeyError as error:
            raise ConfigError(f"watch: the state of the ledger has no {error}") from None
        expected = (len(self._names), len(self.parts))
        if ledger.raised.shape != expected or (ledger.sampling is None) != self.exact:
            raise ConfigError(
                f"watch: the state is of another ledger: expected {self._options.kind}, "
                f"{expected}, got {tuple(ledger.raised.shape)}"
            )
        self._ledger, self._kept, self._keeps = ledger, kept, keeps
        self._spent, self._passed, self._clock = spent, passed, None
        self._remember = self._remembered() if len(kept) else ()
        self._plan(int(ledger.steps))
        self._left, self._followed = self._copy(), False

    # The step ---

    def before_step(
        self,
        parts: Parts,
        trained: Sequence[nn.Parameter],
        match: Match,
        scale: float,
        as_stepped: Callable[[Tensor], Tensor],
        why: str,
    ) -> None:
        """Read the step that is about to be taken.

        Args:
            parts: Class parts of the gradient; none are known if empty.
            trained: Parameters that these are of.
            match: How the gradient is made of them.
            scale: What they are multiplied by and the gradient no longer is.
            as_stepped: From a gradient to how the step takes it.
            why: Why there are no parts; empty: none were given.
        """
        self._pending, self._asked = None, False
        if self._ended:
            return
        skipped = getattr(bare(self._optimizer), "found_inf", None)
        if skipped is not None and bool(skipped):
            return  # a fused kernel takes no step then
        self._asked = self._wants

        def read() -> None:
            if self.wants_parts and why:
                raise AuditError(why.removeprefix("not audited: "))
            self._begin()
            given = {name: p.grad for name, p in self._moved().items() if p.grad is not None}
            grads = {n: dense(as_stepped(g)) for n, g in given.items()} if self._wants else given
            if grads:
                self._pending = self._read(grads, parts, trained, match, scale)

        with self.measuring(self._wants):
            self._tried(read)

    def _read(
        self,
        grads: Grads,
        parts: Parts,
        trained: Sequence[nn.Parameter],
        match: Match,
        scale: float,
    ) -> _Pending:
        kept_then = self._kept_then(grads)
        if not self._wants:
            return _Pending(Point({}, {}), {}, {}, kept_then)
        steps, moved, groups = {}, self._moved(), self._groups()
        kind = type(bare(self._optimizer))
        for name, grad in grads.items():
            p = moved[name]
            state = bare(self._optimizer).state.get(p, {})
            made = parameter_step(groups[p], kind, state, p, grad)
            steps[name] = made
            if made.history is None:
                continue
            if not self.exact:
                raise AuditError(
                    f"the memory of {kind.__name__} is not known by class: use ledger='exact', "
                    "where it is the column 'history'"
                )
            self._doubt(f"the memory of {kind.__name__} is one column, 'history'")
        rows: Grads = {}
        if self.wants_parts:
            if not parts:
                self._doubt(
                    "a step without class parts is in 'other gradient': call watched.backward() "
                    "or watched.through() at each"
                )
            if POOLED in parts:
                self._doubt("memory= holds some classes' gradients: the rest: 'other gradient'")
            place = {p: i for i, p in enumerate(trained)}
            places = {name: place[moved[name]] for name in grads if moved[name] in place}
            rows = part_rows(grads, parts, places, len(self._names), match, scale)
        return _Pending(self._before(), steps, rows, kept_then)

    def after_step(self, apart: float) -> None:
        """Take in the step.

        Args:
            apart: How far the step that was taken is from the one that was told, relative to it;
                0: not farther than rounding, or not known.
        """
        pending, self._pending = self._pending, None
        asked, self._asked = self._asked, False
        if pending is None and not asked:
            return
        with self.measuring(asked):
            if pending is not None:
                self._tried(lambda: self._take_in(pending))
                if apart and asked:
                    self._doubt(
                        f"a step was taken that is not the one told, by {apart:.2g} of its "
                        "length, and the parts do not add up to it"
                    )
            if asked and self._world() > 1:
                self._agree()  # in each process, whatever happened in it
            if pending is not None and self._ledger is not None:
                self._kept, steps = pending.kept_then, int(self._ledger.steps)
                self._tried(lambda: self._plan(steps))

    def _take_in(self, pending: _Pending) -> None:
        ledger, options = self._ledger, self._options
        assert ledger is not None
        if not self._wants:
            self._followed = False
            self._ledger = with_perhaps(
                ledger, self._held, _unasked, self._every, seed=options.seed
            )
            return
        like = dict(self._model.named_parameters())
        split = split_torch_step(
            pending.steps,
            {n: like[n].detach() for n in {*pending.steps, *self._remember}},
            len(self.parts) - 1,
            keeps=self._keeps,
            remember=self._remember,
            kept=self._kept if self._remember else None,
            kept_then=pending.kept_then if self._remember else None,
        )
        before, now, left = pending.before, self._copy(), self._left
        common = {n: p for n, p in left.params.items() if n in before.params}
        length = distance(before.params, now.params)
        if self._followed and distance(common, before.params) > 0.01 * length:
            self._doubt(
                "parameters were changed between two steps (by another optimiser, or weights that "
                "were loaded): what that did is in no column"
            )
        self._left, self._followed = now, True
        taken = Taken(before, now, split, pending.rows)
        self._ledger = (
            with_step(ledger, self._held, taken)
            if self.exact
            else with_perhaps(
                ledger,
                self._held,
                lambda by_class: taken,
                self._every,
                per_class=options.per_class,
                seed=options.seed,
            )
        )

    def _judge(self, ledger: Ledger) -> None:
        self._ledger = judged(ledger, self._held, self._now())
        self._judged = int(ledger.steps)

    def _begin(self) -> None:
        """Begin the ledger before its first step."""
        if self._held_of != self._trained().keys():
            self._make()
        if self._ledger is not None:
            return
        self._ledger = begun(self._held, self._before(), more=1)
        if not self.exact:
            kind = type(bare(self._optimizer))
            known = [memory_of(g, kind, {}) for g in bare(self._optimizer).param_groups]
            self._keeps = max([float(m.keeps) for m in known if m is not None], default=0.0)
            self._remember = self._remembered() if self._keeps else ()
            self._kept = torch.zeros(len(self._remember), dtype=torch.float64)

    def _plan(self, step: int) -> None:
        """Decide what the next step is asked for, and copy the buffers if it is measured."""
        self._wants = self.wants_parts = True
        if not self.exact and self._ledger is not None:
            sampling = self._ledger.sampling
            if sampling is None or step >= int(sampling.ends):
                self._every = self._next_block(step)
            self._wants, self.wants_parts = asks(self._ledger, self._every, seed=self._options.seed)
        if self._wants and not self._followed:
            self._left, self._followed = self._copy(), step > 0

    def _next_block(self, steps: int) -> int:
        """Return the length of the next block of steps, the same for all processes."""
        every = 1
        if self._ledger is not None and self._ledger.sampling is not None:
            samples = int(self._ledger.sampling.samples)
            trained = max(self._passed - self._spent, 0.0)
            if self._spent > _LITTLE:
                every = every_for(self._options.share, self._spent, trained, steps, samples)
        if self._world() > 1:
            told = [every]
            dist.broadcast_object_list(told, group=self._processes(), group_src=0)
            every = told[0]
        return every

    # Time, and what goes wrong ---

    @contextmanager
    def measuring(self, measures: bool = True) -> Iterator[None]:
        """Count the time; the device is waited for where the ledger measures."""
        begin = self._time(measures)
        if self._clock is not None:
            self._passed += begin - self._clock
        try:
            yield
        finally:
            self._clock = self._time(measures)
            self._passed += self._clock - begin
            self._spent += self._clock - begin

    def _time(self, waits: bool) -> float:
        if waits and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _tried(self, act: Callable[[], Any]) -> None:
        """Do something; if it fails, the ledger ends there, and the training goes on."""
        if self._ended:
            return
        try:
            with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
                act()
        except Exception as error:  # of the model, of memory, of another process
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._end(lines[0].removeprefix("linear_step: "))

    def _end(self, why: str) -> None:
        done = 0 if self._ledger is None else int(self._ledger.steps)
        self._doubt(f"the ledger ends after {done:,} steps: {why}")
        self._ended, self._pending, self._left = True, None, Point({}, {})
        self._wants = self.wants_parts = False
        if self._ledger is not None and not self.exact and self._judged != done:
            unknown = torch.full_like(self._ledger.now, torch.nan)
            self._ledger = self._ledger._replace(now=unknown)

    def _doubt(self, text: str) -> None:
        if text not in self.note:
            self.note = "; ".join(filter(None, (self.note, text)))

    def _agree(self) -> None:
        """End the ledger in all processes if it ended in one."""
        told: list[Any] = [None] * self._world()
        try:
            dist.all_gather_object(told, self.note if self._ended else "", group=self._processes())
        except Exception as error:
            told = [str(error) or type(error).__name__]
        if not self._ended and (failed := [why for why in told if why]):
            self._end(f"in another process, {failed[0]}")

    def _world(self) -> int:
        group = self._processes()
        return 1 if group is None else dist.get_world_size(group)

    # The model ---

    def _make(self) -> None:
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            self._held = make_held_out(
                self._model, self._batches, self._spec, self._names, self._group_by
            )
        self._held_of = self._trained().keys()

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self._model.named_parameters() if p.requires_grad}

    def _now(self) -> Point:
        frozen = {n: p for n, p in self._model.named_parameters() if not p.requires_grad}
        rest = {**frozen, **dict(self._model.named_buffers())}
        return Point(
            {n: p.detach() for n, p in self._trained().items()},
            {n: b.detach() for n, b in rest.items()},
        )

    def _copy(self) -> Point:
        params, rest = self._now()
        buffers = dict(self._model.named_buffers())
        copied = {n: b.clone() if n in buffers else b for n, b in rest.items()}
        return Point({n: p.clone() for n, p in params.items()}, copied)

    def _before(self) -> Point:
        """Return where the training was before this step, whose forward pass is over."""
        left, (params, rest) = self._left, self._now()
        if left.params.keys() == params.keys() and all(
            p.device == left.params[n].device and torch.equal(p, left.params[n])
            for n, p in params.items()
        ):
            return left  # the very tensors: what was measured there is known
        own = dict(self._model.named_buffers())
        buffers = {n: b.to(self._device) for n, b in left.buffers.items() if n in own}
        return Point({n: p.clone() for n, p in params.items()}, {**rest, **buffers})

    def _moved(self) -> dict[str, nn.Parameter]:
        """Return the parameters on which the predictions depend and that the optimiser moves."""
        moved = {p for group in bare(self._optimizer).param_groups for p in group["params"]}
        return {n: p for n, p in self._trained().items() if p in moved}

    def _groups(self) -> dict[nn.Parameter, Mapping[str, Any]]:
        return {p: g for g in bare(self._optimizer).param_groups for p in g["params"]}

    def _remembered(self) -> tuple[str, ...]:
        return tuple(self._moved())

    def _kept_then(self, grads: Grads) -> Tensor:
        """Return what a sampled ledger takes for kept of each memory after this step.

        Raises:
            AuditError: more of it is kept than at the ledger's first step.
        """
        if self.exact:
            return self._kept
        groups, kind, moved = self._groups(), type(bare(self._optimizer)), self._moved()
        of_group: dict[int, float] = {}
        ratio = []
        for name in dict.fromkeys((*self._remember, *grads)):
            if name not in grads:  # it stays as it is, where all others fade
                ratio.append(-math.log(self._keeps))
                continue
            group = groups[moved[name]]
            if id(group) not in of_group:
                memory = memory_of(group, kind, {})
                of_group[id(group)] = 0.0 if memory is None else float(memory.keeps)
            keeps = of_group[id(group)]
            if keeps > self._keeps * (1.0 + 1e-9) or (keeps and name not in self._remember):
                raise AuditError(
                    f"the momentum grew, or {name} joined, after the first step, which only a "
                    "ledger of every step can follow: use ledger='exact'"
                )
            ratio.append(math.log(keeps / self._keeps) if keeps else 0.0)
        return self._kept + torch.tensor(ratio[: len(self._remember)], dtype=torch.float64)


def _unasked(by_class: bool) -> Taken:
    raise AuditError("a step was asked for that was not read")


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model within DistributedDataParallel and what ``torch.compile`` returned."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return _unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _batches(held_out: Any) -> list[Batch]:
    """Return held-out examples in batches, from one or several, each a Batch, tuple or dict."""
    if isinstance(held_out, Batch) or in_memory(held_out):
        return [as_batch(held_out)]
    batches = [as_batch(batch) for batch in held_out]
    if not any(len(batch.targets) for batch in batches):
        raise AuditError("there are no held-out examples")
    return batches


def _names(
    classes: Sequence[str] | int | None, batches: Sequence[Batch], group_by: GroupBy | None
) -> tuple[str, ...]:
    """Return the names of the classes; where none are given, those of the held-out examples."""
    if classes is not None and not isinstance(classes, int):
        return tuple(map(str, classes))
    number = number_of(classes)
    if number is None:
        number = 1 + max(int(groups_of(b, group_by).max()) for b in batches if len(b.targets))
    return tuple(map(str, range(number)))
