"""What the callbacks share: finding a model's predictions, and handing them to the watch."""

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from funcloss.audit.data import GroupBy
from funcloss.audit.ledger import Ledger
from funcloss.audit.loss import LossSpec
from funcloss.audit.parts import passing
from funcloss.audit.training import StepFindings
from funcloss.audit.watch import Watch, watch
from funcloss.audit.watch_ledger import LedgerOptions
from funcloss.errors import AuditError
from funcloss.typing import LossFn

LABELS = ("labels", "label", "targets", "target")  # of a batch that is a dict
_LOG = logging.getLogger("funcloss.integrations")
_ENTRIES = 200  # of a ledger that are logged
_NUMBER = re.compile(r"-?\d[\d.,]*(e[+-]?\d+)?")


@dataclass(frozen=True)
class Settings:
    """The arguments of a callback."""

    classes: Sequence[str] | int | None = None
    groups: Callable[[Any], Tensor] | None = None
    predictions: str | None = None
    class_weights: Tensor | Sequence[float] | None = None
    every: int = 20
    class_dim: int = -1
    held_out: Any = None
    held_out_loss: LossFn | LossSpec | None = None
    group_by: GroupBy | None = None
    ledger: str | LedgerOptions = "sampled"

    def __post_init__(self) -> None:
        """Check what holds before any model is known."""
        if isinstance(self.ledger, str):
            object.__setattr__(self, "ledger", LedgerOptions(self.ledger))


class Listener:
    """Hears a model's forward passes in a framework's loop, and audits the steps that follow.

    Of the outputs of the model and of its direct children with parameters, the last that the loss
    depends on has the predictions: its gradient is the first that a backward pass comes to.
    Nothing that fails ends the training: it is logged as a warning, once.

    Attributes:
        found: The findings of the last step that was audited; None before the first.
    """

    def __init__(self, settings: Settings) -> None:
        """Keep the settings; :meth:`start` begins."""
        self.settings = settings
        self._warned: set[str] = set()
        self._watched: Watch | None = None
        self._on_modules: list[RemovableHandle] = []
        self._on_tensors: list[RemovableHandle] = []  # each holds the graph of a forward pass
        self._batch: Any = None
        self._taken = False  # whether the backward pass has come to predictions
        self._new = False
        self._kept: _Kept | None = None  # the ledger of the training before
        self._saved: Mapping[str, Tensor] = {}  # that of a checkpoint
        self.found: StepFindings | None = None

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        groups_of: Callable[[Any, Tensor], Tensor],
        wrapped: nn.Module | None = None,
        scaler: Any = None,
        predicts: Callable[[], nn.Module] | None = None,
    ) -> None:
        """Begin to listen.

        Args:
            model: The model.
            optimizer: The optimizer whose steps are audited.
            groups_of: From a batch and its predictions to the groups, where the user gave none.
            wrapped: The model in DistributedDataParallel, if it is.
            scaler: The GradScaler, if there is one.
            predicts: Returns what gives the predictions of held-out inputs; None: the model.
        """
        self.stop()
        of = self.settings
        self._groups_of, self._scaler = groups_of, scaler
        weights = of.class_weights
        self._weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        heard = [model, *model.children()]
        if of.predictions is not None:
            heard = [model.get_submodule(of.predictions)]
        self._watched = watch(
            wrapped or model,
            optimizer,
            classes=of.classes,
            every=of.every,
            on_step=self._keep,
        )
        if of.held_out is not None:
            with self.guarded("no ledger"):
                self._begin_ledger(self._watched, predicts or (lambda: model))
        self._on_modules = [
            module.register_forward_hook(_Hear(self))
            for module in dict.fromkeys(heard)
            if of.predictions is not None or any(True for _ in module.parameters())
        ]

    def stop(self) -> None:
        """Stop listening."""
        self.begin_batch(None)
        for handle in self._on_modules:
            handle.remove()
        self._on_modules = []
        if self._watched is not None:
            self._kept = self._ledger_of(self._watched)
            self._watched.close()
            self._watched = None

    def _begin_ledger(self, watched: Watch, predicts: Callable[[], nn.Module]) -> None:
        of, saved, self._saved = self.settings, self._saved, {}
        assert isinstance(of.ledger, LedgerOptions)
        options = of.ledger
        if options.model is None:
            options = replace(options, model=PredictionsOf(predicts()))
        watched.keep_ledger(of.held_out, of.held_out_loss, of.group_by, options)
        if saved:
            watched.load_ledger(saved)

    def _ledger_of(self, watched: Watch) -> "_Kept":
        ledger = watched.ledger
        if note := watched.ledger_note:
            self.warn(f"ledger: {note}")
        return _Kept(ledger, watched.ledger_parts, note, watched.ledger_state())

    @property
    def kept(self) -> "_Kept":
        """The ledger so far; of a training that is over, as it was at its end."""
        if self._watched is not None:
            return self._ledger_of(self._watched)
        return self._kept or _Kept(None, (), "", self._saved)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the ledger of a checkpoint in the training to come."""
        self._saved = state

    def ledger_news(self) -> dict[str, float]:
        """Return what is logged of the ledger; empty if there is none."""
        kept = self.kept
        weights = self.settings.class_weights
        return {} if kept.ledger is None else ledger_metrics(kept.ledger, kept.parts, weights)

    def begin_batch(self, batch: Any) -> None:
        """Take the batch of the forward passes to come; forget those so far."""
        self._batch = batch
        while self._on_tensors:
            self._on_tensors.pop().remove()
        self._taken = False

    def begin_backward(self) -> None:
        """Wait for predictions again: a backward pass begins."""
        self._taken = False

    def end_backward(self) -> None:
        """Warn if the backward pass came to no predictions."""
        if self._watched is not None and not self._taken:
            self.warn(
                "no predictions seen in the backward pass: give predictions= the name of the "
                "submodule whose output they are"
            )

    def news(self) -> dict[str, float]:
        """Return the metrics of a step that was audited since the last call; none: empty."""
        if not self._new or self.found is None:
            return {}
        self._new = False
        return metrics(self.found)

    def warn(self, text: str) -> None:
        """Log a warning once; of those that differ in numbers alone, the first."""
        if (kind := _NUMBER.sub("", text)) not in self._warned:
            self._warned.add(kind)
            _LOG.warning("AuditCallback: %s", text)

    @contextmanager
    def guarded(self, what: str = "not audited") -> Iterator[None]:
        """Make a warning of what fails: the training goes on."""
        try:
            yield
        except Exception as error:  # of the user's function, the framework, the model
            lines = str(error).strip().splitlines() or [""]
            self.warn(f"{what}: {type(error).__name__}: {lines[0]}")

    def _keep(self, found: StepFindings) -> None:
        self.found, self._new = found, True
        if found.note:
            self.warn(found.note)

    def hear(self, output: Any) -> None:
        """Wait for the gradient of the predictions in an output."""
        if torch.compiler.is_compiling():
            return
        with self.guarded():
            predictions = predictions_in(output)
            if predictions is None or not predictions.requires_grad:
                return
            hook = functools.partial(self._take, predictions)
            self._on_tensors.append(predictions.register_hook(hook))

    def _take(self, predictions: Tensor, cotangents: Tensor) -> None:
        if self._taken or self._watched is None or passing():
            return
        self._taken = True  # whatever fails below
        with self.guarded():
            of = self.settings
            given = (
                of.groups(self._batch) if of.groups else self._groups_of(self._batch, predictions)
            )
            groups = torch.as_tensor(given, device=predictions.device)
            self._taken = self._watched.take(
                predictions,
                cotangents,
                groups,
                class_dim=of.class_dim,
                class_weights=self._weights,
                scaler=self._scaler,
            )


@dataclass(frozen=True, eq=False)
class _Kept:
    """A ledger as a callback has it."""

    ledger: Ledger | None
    parts: tuple[str, ...]
    note: str
    state: Mapping[str, Tensor]


class PredictionsOf(nn.Module):
    """The predictions in a module's output, as its own output."""

    def __init__(self, inner: nn.Module) -> None:
        """Wrap a module."""
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the predictions, or the output if there are none in it."""
        output = self.inner(*args, **kwargs)
        found = predictions_in(output)
        return output if found is None else found


class _Hear:
    """A forward hook that copies and pickles of the module do without."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._listener.hear(output)

    def __reduce__(self) -> tuple:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _hear_nothing


def _hear_nothing(*args: Any) -> None:
    pass


def predictions_in(output: Any) -> Tensor | None:
    """Return the predictions in a module's output, or None if there are none.

    A tensor with an axis; ``logits`` of a mapping or an object; else the first such tensor of a
    tuple, or the only one of a mapping.

    Example:
        >>> predictions_in({"loss": torch.tensor(1.0), "logits": torch.ones(2, 3)}).shape
        torch.Size([2, 3])
        >>> predictions_in(torch.tensor(1.0))
    """
    if isinstance(output, Tensor):
        return output if output.dim() and output.is_floating_point() else None
    if isinstance(output, Mapping):
        if "logits" in output:
            return predictions_in(output["logits"])
        found = [x for x in map(predictions_in, output.values()) if x is not None]
        return found[0] if len(found) == 1 else None
    if isinstance(output, tuple | list):
        return next((x for x in map(predictions_in, output) if x is not None), None)
    return predictions_in(output.logits) if hasattr(output, "logits") else None


def labels_of(batch: Any) -> Tensor:
    """Return the labels of a batch: of a dict by name, else its second member.

    Raises:
        AuditError: there are none.

    Example:
        >>> labels_of((torch.ones(2, 3), torch.tensor([0, 1])))
        tensor([0, 1])
    """
    found = None
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in LABELS if name in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[1]
    if not isinstance(found, Tensor):
        raise AuditError(
            f"no labels in the batch, a {type(batch).__name__}: give groups=, a function from the "
            "batch to an integer tensor"
        )
    return found


def metrics(found: StepFindings) -> dict[str, float]:
    """Return what is logged of a step, by name; NaN is left out."""
    of, step = found.balance, found.step
    rows = {
        "share": zip(found.classes, of.share.tolist(), strict=True),
        "expected_share": zip(found.classes, of.expected_share.tolist(), strict=True),
        "update_share": zip(step.rows, step.share.tolist(), strict=True) if step else (),
    }
    named = {f"{kind}/{name}": x for kind, pairs in rows.items() for name, x in pairs}
    return {name: x for name, x in {**named, "audit/moved": found.moved}.items() if isfinite(x)}


def ledger_metrics(
    ledger: Ledger, parts: Sequence[str], weights: Tensor | Sequence[float] | None
) -> dict[str, float]:
    """Return what is logged of a ledger: what classes with a weight did, and each to itself.

    ``ledger/A/B`` is what B's examples changed A's held-out mean loss by so far; of a sampled
    ledger ``ledger_error/A/B`` is its standard error. At most 200 pairs.
    """
    number = len(ledger.begin)
    weighted = [] if weights is None else [c for c, w in enumerate(weights) if float(w) != 1.0]
    pairs = [(k, c) for c in weighted for k in range(number)] + [(k, k) for k in range(number)]
    tables = {"ledger": ledger.net}
    if ledger.sampling is not None:
        tables["ledger_error"] = ledger.standard_error
    named = {
        f"{kind}/{parts[k]}/{parts[c]}": float(table[k, c])
        for kind, table in tables.items()
        for k, c in [*dict.fromkeys(pairs)][:_ENTRIES]
    }
    return {name: x for name, x in named.items() if isfinite(x)}


def missing(framework: str, extra: str) -> ImportError:
    """Return the error that says how to install a framework."""
    return ImportError(
        f"funcloss.integrations.{extra}: {framework} is not installed: "
        f"pip install 'funcloss[{extra}]'"
    )
