"""The audit as a callback of Lightning's Trainer, of ``lightning`` or ``pytorch_lightning``."""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from funcloss.audit.data import GroupBy
from funcloss.audit.ledger import Ledger
from funcloss.audit.loss import LossSpec
from funcloss.audit.watch_ledger import LedgerOptions
from funcloss.errors import AuditError, ConfigError
from funcloss.integrations.listening import Listener, Settings, labels_of, missing
from funcloss.typing import LossFn

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")


class AuditCallback:
    """Logs each class's share of the gradient and of the optimizer's step while Lightning trains.

    ``Trainer(callbacks=[AuditCallback(classes=...)])``. To the trainer's loggers go ``share/NAME``
    and ``expected_share/NAME`` (from weight and count) of the gradient, ``update_share/NAME`` of
    the step, with rows for ``weight decay`` and ``history`` (momentum), and ``audit/moved``, the
    relative distance of the step taken from the one that was split. With ``held_out=`` follow the
    sums of the ledger at the end of each epoch, ``ledger/A/B``: what B's examples changed A's
    held-out mean loss by, for each B with a weight and for A = B. They are in the checkpoint and
    go on from it. The training is the same to
    the bit with and without it, and no failure here ends it: a warning is logged once.

    Args:
        classes: Names of the classes, or how many there are; None: those in each batch.
        groups: From a batch to the group of each prediction, integers of the predictions' shape
            without the classes' axis; below 0: none. None: the labels, ``batch[1]`` or
            ``labels``, ``label``, ``targets``, ``target`` of a dict.
        predictions: Name of the submodule whose output is the predictions; None: the last output,
            of the module or of one of its direct children with parameters, that the loss
            depends on.
        class_weights: That the loss has in it, for the expected shares.
        every: Audit one step in so many.
        class_dim: The classes' axis of the predictions.
        held_out: Examples for the ledger of the training: what each class's part of every step did
            to each class's held-out mean loss. Batches with labels, as for :func:`audit.watch`.
        held_out_loss: Of one held-out example; None: cross-entropy of the predictions.
        group_by: From a held-out batch to the group of each example, in place of its label.
        ledger: ``sampled``, for a tenth of the training's time, or ``exact``: every step.
        optimizer: Where there are several: the number, or the name of the class, of one.

    Attributes:
        found: The findings of the last step that was audited; None before the first.
        ledger: The ledger so far, of ``held_out``; ``ledger_parts`` names its columns and
            ``ledger_note`` says what is in doubt.

    Raises:
        ImportError: Lightning is not installed.

    Example:
        >>> callback = AuditCallback(classes=("cat", "dog"), every=50)
        >>> callback.found
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "AuditCallback":
        """Return one that is a Callback of the Lightning that is imported."""
        return object.__new__(_with_base(cls))

    def __init__(
        self,
        classes: Sequence[str] | int | None = None,
        *,
        groups: Callable[[Any], Tensor] | None = None,
        predictions: str | None = None,
        class_weights: Tensor | Sequence[float] | None = None,
        every: int = 20,
        class_dim: int = -1,
        held_out: Any = None,
        held_out_loss: LossFn | LossSpec | None = None,
        group_by: GroupBy | None = None,
        ledger: str | LedgerOptions = "sampled",
        optimizer: int | str | None = None,
    ) -> None:
        """Keep the settings."""
        settings = Settings(
            classes, groups, predictions, class_weights, every, class_dim, held_out, held_out_loss,
            group_by, ledger,
        )  # fmt: skip
        self._listener, self._optimizer = Listener(settings), optimizer

    def __reduce__(self) -> tuple:
        """Pickle without the class that was made for the Lightning at hand."""
        return AuditCallback, (), self.__dict__

    @property
    def found(self) -> Any:
        """The findings of the last step that was audited."""
        return self._listener.found

    @property
    def ledger(self) -> Ledger | None:
        """The ledger of the training so far; None without ``held_out=``."""
        return self._listener.kept.ledger

    @property
    def ledger_parts(self) -> tuple[str, ...]:
        """Names of the columns of the ledger."""
        return self._listener.kept.parts

    @property
    def ledger_note(self) -> str:
        """Why the ledger ended, or what is in doubt; empty: nothing."""
        return self._listener.kept.note

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin to listen to the module and its optimizer."""
        with self._listener.guarded():
            self._listener.start(
                pl_module,
                _chosen(trainer.optimizers, self._optimizer),
                groups_of=lambda batch, predictions: labels_of(batch),
                wrapped=trainer.strategy.model,
                scaler=getattr(trainer.precision_plugin, "scaler", None),
                predicts=lambda: _predicts(pl_module),
            )

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch for the forward passes to come."""
        self._listener.begin_batch(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Wait for the predictions' gradient."""
        self._listener.begin_backward()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Warn if none came."""
        self._listener.end_backward()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a step that was audited."""
        self._listener.begin_batch(None)
        with self._listener.guarded():
            if news := self._listener.news():
                for logger in trainer.loggers:
                    logger.log_metrics(news, step=trainer.global_step - 1)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the ledger so far."""
        with self._listener.guarded():
            if news := self._listener.ledger_news():
                for logger in trainer.loggers:
                    logger.log_metrics(news, step=trainer.global_step - 1)

    @property
    def state_key(self) -> str:
        """Name of the ledger in a checkpoint: callbacks of other groups have others."""
        of = self._listener.settings
        if of.held_out is None:
            return f"{type(self).__qualname__}/{id(self)}"  # nothing is kept
        groups = getattr(of.groups, "__qualname__", None)
        which = {"classes": of.classes, "groups": groups, "optimizer": self._optimizer}
        return f"{type(self).__qualname__}{which}"

    def state_dict(self) -> dict[str, Any]:
        """Return the ledger, for the checkpoint."""
        return dict(self._listener.kept.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the ledger of a checkpoint."""
        self._listener.load(state_dict)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop listening."""
        self._listener.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop listening."""
        self._listener.stop()


def _with_base(cls: type) -> type:
    """Return the class as a Callback of each Lightning that is imported, else of one installed."""
    bases = [sys.modules[name].Callback for name in _PACKAGES if sys.modules.get(name)]
    for name in () if bases else _PACKAGES:
        try:
            bases = [importlib.import_module(name).Callback]
            break
        except ModuleNotFoundError:
            continue
    if not bases:
        raise missing("Lightning", "lightning")
    return _made(cls, *bases)


@functools.cache
def _made(cls: type, *bases: type) -> type:
    return type(cls.__name__, (cls, *bases), {"__doc__": cls.__doc__, "__module__": cls.__module__})


def _predicts(module: nn.Module) -> nn.Module:
    """Return what gives predictions: the module, or its only child if it has no ``forward``.

    Raises:
        AuditError: it has several.
    """
    defined = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    if defined is not nn.Module and defined.__name__ != "LightningModule":
        return module
    children = [m for m in module.children() if any(True for _ in m.parameters())]
    if len(children) != 1:
        raise AuditError(
            f"{type(module).__name__} has no forward() and {len(children)} children: define one, "
            "or give ledger=LedgerOptions(model=...)"
        )
    return children[0]


def _chosen(optimizers: Sequence[Any], wanted: int | str | None) -> Any:
    """Return the optimizer that is meant."""
    names = [type(optimizer).__name__ for optimizer in optimizers]
    if wanted is None and len(optimizers) == 1:
        return optimizers[0]
    places = [i for i, name in enumerate(names) if wanted in (i, name)]
    if len(places) != 1:
        raise ConfigError(
            f"optimizer= must be the number, or the name of the class, of one of {names}, got "
            f"{wanted!r}"
        )
    return optimizers[places[0]]
