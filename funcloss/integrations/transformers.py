"""The audit as a callback of the Trainer of Hugging Face's ``transformers``."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from funcloss.audit.data import GroupBy
from funcloss.audit.ledger import Ledger
from funcloss.audit.loss import LossSpec
from funcloss.audit.watch_ledger import LedgerOptions
from funcloss.errors import AuditError
from funcloss.integrations.listening import Listener, Settings, labels_of, missing
from funcloss.typing import LossFn

try:
    _Base: Any = importlib.import_module("transformers").TrainerCallback
except ModuleNotFoundError:
    raise missing("transformers", "transformers") from None


class AuditCallback(_Base):
    """Logs each class's share of the gradient and of the optimizer's step while a Trainer trains.

    ``Trainer(callbacks=[AuditCallback(classes=...)])``. To the Trainer's log go ``share/NAME`` and
    ``expected_share/NAME`` (from weight and count) of the gradient, ``update_share/NAME`` of
    the step, with rows for ``weight decay`` and ``history`` (momentum), and ``audit/moved``, the
    relative distance of the step taken from the one that was split. With ``held_out=`` follow the
    sums of the ledger at the end of each epoch, ``ledger/A/B``: what B's examples changed A's
    held-out mean loss by, for each B with a weight and for A = B. It begins again where a training
    is resumed. The training is the same to
    the bit with and without it, and no failure here ends it: a warning is logged once.

    Args:
        classes: Names of the classes, or how many there are; None: those in each batch.
        groups: From a batch, a dict, to the group of each prediction, integers of the predictions'
            shape without the classes' axis, or ``(batch,)``; below 0: none. None: its ``labels``.
            Of a language model say it: position ``t`` predicts token ``t + 1``, so groups of
            tokens are to be shifted by one.
        predictions: Name of the submodule whose output is the predictions; None: the last output,
            of the model or of one of its direct children with parameters, that the loss depends
            on.
        class_weights: That the loss has in it, for the expected shares.
        every: Audit one step in so many.
        class_dim: The classes' axis of the predictions.
        held_out: Examples for the ledger of the training: what each class's part of every step did
            to each class's held-out mean loss. Batches with labels, as for :func:`audit.watch`.
        held_out_loss: Of one held-out example; None: cross-entropy of the predictions.
        group_by: From a held-out batch to the group of each example, in place of its label.
        ledger: ``sampled``, for a tenth of the training's time, or ``exact``: every step.

    Attributes:
        found: The findings of the last step that was audited; None before the first.
        ledger: The ledger so far, of ``held_out``; ``ledger_parts`` names its columns and
            ``ledger_note`` says what is in doubt.
    """

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
    ) -> None:
        """Keep the settings."""
        settings = Settings(
            classes, groups, predictions, class_weights, every, class_dim, held_out, held_out_loss,
            group_by, ledger,
        )  # fmt: skip
        self._listener = Listener(settings)
        self._trainer: Any = None

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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to listen to the model and its optimizer."""
        with self._listener.guarded():
            self._restore()
            self._trainer = trainer = _trainer_that_calls()
            model = kwargs["model"]
            vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)

            def groups_of(batch: Any, predictions: Tensor) -> Tensor:
                labels = labels_of(batch)
                if labels.dim() > 1 and predictions.shape[-1] == vocabulary:
                    raise AuditError(
                        "the classes are the tokens of a vocabulary: give groups=, a function from "
                        "the batch to a group for each token"
                    )
                return labels

            self._listener.start(
                model,
                kwargs["optimizer"],
                groups_of=groups_of,
                wrapped=trainer.model_wrapped,
                scaler=getattr(kwargs["optimizer"], "scaler", None),
            )
            step = trainer.training_step

            def heard(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                batch = dict(inputs) if isinstance(inputs, Mapping) else inputs
                self._listener.begin_batch(batch)  # a copy: the loss may take the labels out
                try:
                    loss = step(model, inputs, *args, **kwargs)
                    self._listener.end_backward()
                    return loss
                finally:
                    self._listener.begin_batch(None)

            trainer.training_step = heard

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log a step that was audited."""
        with self._listener.guarded():
            self._log(self._listener.news(), control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the ledger so far."""
        with self._listener.guarded():
            self._log(self._listener.ledger_news(), control)

    def _log(self, news: dict[str, float], control: Any) -> None:
        if not news:
            return
        due = control.should_log
        try:
            self._trainer.log(news)  # takes should_log for answered
        finally:
            control.should_log = due

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop listening."""
        self._restore()

    def _restore(self) -> None:
        self._listener.stop()
        if self._trainer is not None:
            vars(self._trainer).pop("training_step", None)
        self._trainer = None


def _trainer_that_calls() -> Any:
    """Return the Trainer that called; it gives its callbacks neither batches nor loggers."""
    kind, frame = importlib.import_module("transformers").Trainer, sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), kind):
            return found
        frame = frame.f_back
    raise AuditError("no Trainer calls this callback")
