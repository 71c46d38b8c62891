"""What the callbacks share: finding a model's predictions, and handing them to the watch."""

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from funcloss.audit.parts import passing
from funcloss.audit.training import StepFindings
from funcloss.audit.watch import Watch, watch
from funcloss.errors import AuditError

LABELS = ("labels", "label", "targets", "target")  # of a batch that is a dict
_LOG = logging.getLogger("funcloss.integrations")
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
        self._settings = settings
        self._warned: set[str] = set()
        self._watched: Watch | None = None
        self._on_modules: list[RemovableHandle] = []
        self._on_tensors: list[RemovableHandle] = []  # each holds the graph of a forward pass
        self._batch: Any = None
        self._taken = False  # whether the backward pass has come to predictions
        self._new = False
        self.found: StepFindings | None = None

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        groups_of: Callable[[Any, Tensor], Tensor],
        wrapped: nn.Module | None = None,
        scaler: Any = None,
    ) -> None:
        """Begin to listen.

        Args:
            model: The model.
            optimizer: The optimizer whose steps are audited.
            groups_of: From a batch and its predictions to the groups, where the user gave none.
            wrapped: The model in DistributedDataParallel, if it is.
            scaler: The GradScaler, if there is one.
        """
        self.stop()
        of = self._settings
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
            self._watched.close()
            self._watched = None

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
    def guarded(self) -> Iterator[None]:
        """Make a warning of what fails: the training goes on."""
        try:
            yield
        except Exception as error:  # of the user's function, the framework, the model
            lines = str(error).strip().splitlines() or [""]
            self.warn(f"not audited: {type(error).__name__}: {lines[0]}")

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
            of = self._settings
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


def missing(framework: str, extra: str) -> ImportError:
    """Return the error that says how to install a framework."""
    return ImportError(
        f"funcloss.integrations.{extra}: {framework} is not installed: "
        f"pip install 'funcloss[{extra}]'"
    )
