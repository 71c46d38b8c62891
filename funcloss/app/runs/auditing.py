"""The audit of single steps while a run trains."""

import time
from collections.abc import Callable

from funcloss.app.runs.augmentation import augmented
from funcloss.app.runs.events import Audited, Note, Show
from funcloss.app.runs.options import chosen_loss
from funcloss.app.runs.setup import Setup, make_optimizer, make_schedule
from funcloss.audit import LossSpec, make_audit_step
from funcloss.combinators import class_weighted
from funcloss.errors import AuditError
from funcloss.training import TrainState
from funcloss.typing import Batch, Hyper, LossFn

Audit = Callable[[TrainState, Batch, Hyper], Audited | None]


def step_auditor(setup: Setup, show: Show) -> Audit | None:
    """Return what audits a step before it is taken; None if none is asked for, or possible.

    What cannot be audited is said once, and the training goes on without.

    Args:
        setup: The training.
        show: Called with the one warning.

    Returns:
        ``(state, batch, hyper) -> audited``, or None.
    """
    config = setup.config
    if not config.audit_every:
        return None
    told = False

    def on_failure(error: AuditError) -> None:
        nonlocal told
        if not told:
            show(Note(f"audits during training are disabled: {error}", warning=True))
        told = True

    try:
        if setup.dataset.train.costs is not None:
            raise AuditError(f"each example has costs of its own, by which {config.loss} learns")
        audit_step = make_audit_step(
            setup.model,
            LossSpec(loss_of(setup), reduction=config.reduction),
            make_optimizer(config),
            classes=setup.dataset.classes,
            schedule=make_schedule(config, setup.per_epoch),
            clip_norm=config.clip_norm,
        )
    except AuditError as error:
        on_failure(error)
        return None

    def audit(state: TrainState, batch: Batch, hyper: Hyper) -> Audited | None:
        begin = time.perf_counter()
        try:
            seen = augmented(state, batch, config.augment)
            found, _ = audit_step(state, seen, hyper, None)
        except AuditError as error:
            on_failure(error)
            return None
        return Audited(int(state.step) + 1, time.perf_counter() - begin, found.records())

    return audit


def loss_of(setup: Setup) -> LossFn:
    """Return the loss of a training, class-weighted if it has class weights."""
    loss = chosen_loss(setup.config)
    return class_weighted(loss) if "class_weights" in setup.hyper else loss
