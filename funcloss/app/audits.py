"""The audit of a run, or of a saved model, and the files that it leaves."""

import io
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from funcloss._files import write_text
from funcloss.app.config import TrainConfig
from funcloss.app.data import Dataset, Examples, as_pixels, iter_batches, subset
from funcloss.app.registry import loss_named
from funcloss.app.report.audit_figures import draw_all
from funcloss.app.report.audit_page import About, render_page
from funcloss.app.report.run_figures import save_figure
from funcloss.app.runs import folder, load_checkpoint, load_tensors
from funcloss.app.runs.network import set_tensors
from funcloss.app.runs.setup import Setup, make_optimizer, make_schedule, make_setup
from funcloss.app.runs.use import split_of
from funcloss.audit.measure import audit
from funcloss.audit.result import Audit
from funcloss.audit.training import loss_options, make_audit_step
from funcloss.combinators import class_weighted
from funcloss.errors import ConfigError, RunError
from funcloss.training import TrainState
from funcloss.typing import Batch, Hyper, LossFn, Params

_FACTS = ("class_counts", "class_prior")  # options of a loss that nobody sets
_PICTURED = 8  # examples of a class that are shown
_FIGURES = ("share", "conflict", "impact", "norms", "examples", "history", "elasticity")
_NAMES = ("audit_examples.csv", *(f"audit_{name}.png" for name in _FIGURES))


class RunAudit(NamedTuple):
    """An audit with what its report needs."""

    audit: Audit
    about: About
    history: Sequence[dict[str, Any]]  # the audits of the training
    pictures: dict[int, bytes]  # PNG files, by index in the split of the data set


def audit_run(
    run_dir: str | Path,
    *,
    split: str = "train",
    examples: int = 10_000,
    evaluation_mode: bool = False,
    data_dir: str = "",
    device: str = "auto",
    allow_import: bool = False,
    method: str = "auto",
    memory: float = 2048.0,
) -> RunAudit:
    """Audit a run where its last checkpoint is: gradient, step, and impact on held-out data.

    Args:
        run_dir: A run folder, finished or not.
        split: What to audit: ``train``, ``validation`` or ``test``.
        examples: How many of it at most, drawn with one seed.
        evaluation_mode: Without dropout; else as the training steps go.
        data_dir: Where the data is now, if it has moved.
        device: Where to measure.
        allow_import: Whether code that the run names may be imported.
        method: As for :func:`funcloss.audit.audit`.
        memory: As for :func:`funcloss.audit.audit`, in MiB.

    Returns:
        The audit and what its report needs.

    Raises:
        AuditError: it cannot be audited.
        ConfigError: the split is empty, or the device is not there.
        DataError: the data cannot be had.
        RunError: the run cannot be read.
    """
    run_dir = Path(run_dir).expanduser()
    config = folder.read_config(run_dir, allow_import=allow_import)
    here = {"data_dir": data_dir or config.data_dir, "device": device, "init": ""}
    return audit_training(
        run_dir, make_setup(config._replace(**here)), split=split, examples=examples,
        evaluation_mode=evaluation_mode, method=method, memory=memory,
    )  # fmt: skip


def audit_training(
    run_dir: Path,
    setup: Setup,
    *,
    split: str = "train",
    examples: int = 10_000,
    evaluation_mode: bool = False,
    method: str = "auto",
    memory: float = 2048.0,
) -> RunAudit:
    """Audit a run as :func:`audit_run` does, where its training has been set up.

    Args:
        run_dir: The run folder.
        setup: Its training.
        split: As for :func:`audit_run`.
        examples: As for :func:`audit_run`.
        evaluation_mode: As for :func:`audit_run`.
        method: As for :func:`audit_run`.
        memory: As for :func:`audit_run`.

    Returns:
        The audit and what its report needs.

    Raises:
        AuditError: it cannot be audited.
        ConfigError: the split is empty.
        RunError: the run cannot be read.
    """
    config = setup.config
    state, hyper = load_checkpoint(run_dir, setup)
    setup = setup._replace(hyper=hyper)
    steps = config.epochs * setup.per_epoch
    going_on = int(state.step) < steps
    found = _audited(
        setup, state, split, examples, evaluation_mode, method, memory,
        optimizer=make_optimizer(setup.config),
        learning_rate=setup.hyper["learning_rate"],
        schedule=make_schedule(setup.config, setup.per_epoch) if going_on else None,
        clip_norm=config.clip_norm,
    )  # fmt: skip
    if not going_on:
        note = "the training is over: the step is one more, at the peak learning rate"
        found = found._replace(notes=(*found.notes, note))
    if config.amp != "off":
        note = f"trained in {config.amp}, audited in float32"
        found = found._replace(notes=(*found.notes, note))
    records = [r for r in folder.read_records(run_dir) if r["kind"] == "audit"]
    about = about_of(
        setup, f"Audit of {run_dir.name}", split=split, examples=int(found.count.sum()),
        step=int(state.step), evaluation_mode=evaluation_mode,
    )  # fmt: skip
    return RunAudit(found, about, records, _pictures(found, setup.dataset, split))


def audit_checkpoint(
    path: str | Path,
    config: TrainConfig,
    *,
    split: str = "train",
    examples: int = 10_000,
    evaluation_mode: bool = False,
    method: str = "auto",
    memory: float = 2048.0,
) -> RunAudit:
    """Audit a saved model, a safetensors file of its tensors by name, which has no history.

    Args:
        path: The file, a run's ``model.safetensors`` say.
        config: Model, loss, costs and data set; its optimiser is not looked at.
        split: As for :func:`audit_run`.
        examples: As for :func:`audit_run`.
        evaluation_mode: As for :func:`audit_run`.
        method: As for :func:`audit_run`.
        memory: As for :func:`audit_run`.

    Returns:
        The audit of the gradient, and what its report needs.

    Raises:
        AuditError: it cannot be audited.
        ConfigError: the request makes no sense on this machine or data.
        DataError: the data cannot be had.
        RunError: the file cannot be read, or is of another model.
    """
    setup = make_setup(config)
    tensors, _ = load_tensors(Path(path).expanduser())
    try:
        misshapen = set_tensors(setup.model, tensors)
    except ConfigError as error:
        raise RunError(f"{path} is not of {config.model} on {config.dataset}: {error}") from None
    if misshapen:
        raise RunError(
            f"{path} is not of {config.model} on {config.dataset}: see its {misshapen[0]}"
        )
    found = _audited(setup, None, split, examples, evaluation_mode, method, memory)
    title = f"Audit of {Path(path).name}"
    about = about_of(
        setup, title, split=split, examples=int(found.count.sum()),
        step=None, evaluation_mode=evaluation_mode,
    )  # fmt: skip
    return RunAudit(found, about, [], _pictures(found, setup.dataset, split))


def write_report(found: RunAudit, out: str | Path) -> list[Path]:
    """Write the page, JSON, tables and figures of an audit.

    Args:
        found: The audit.
        out: A folder; it is made if it is not there.

    Returns:
        The files; ``audit.html`` first.

    Raises:
        RunError: one cannot be written; what was there is as it was.
    """
    out = Path(out).expanduser()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make {out}: {error.strerror}") from None
    page = render_page(found.audit, found.about, history=found.history, pictures=found.pictures)
    write_text(out / "audit.html", page)
    paths = [out / "audit.html", *found.audit.write(out, about=found.about._asdict())]
    for name, figure in draw_all(found.audit, found.history).items():
        paths.append(out / f"{name}.png")
        save_figure(figure, paths[-1])
    for name in _NAMES:  # of an earlier audit, which had more to show
        if out / name not in paths:
            (out / name).unlink(missing_ok=True)
    return paths


def _audited(
    setup: Setup,
    state: TrainState | Params | None,
    split: str,
    examples: int,
    evaluation_mode: bool,
    method: str,
    memory: float,
    **step: Any,
) -> Audit:
    config, dataset = setup.config, setup.dataset
    model = setup.model.eval() if evaluation_mode else setup.model.train()
    held = dataset.validation if split == "train" and len(dataset.validation.labels) else None

    def batches(chosen: Examples):
        def passes() -> Iterator[Batch]:
            index = _index(chosen, examples)
            return iter_batches(dataset, chosen, index.split(max(config.batch_size, 256)))

        return passes

    found = audit(
        model,
        state,
        loss_of(setup),
        batches(split_of(dataset, split)),
        class_weights=setup.hyper.get("class_weights"),
        options=loss_options(setup.hyper),
        reduction=config.reduction,
        classes=dataset.classes,
        held_out=None if held is None or not step else batches(held),
        method=method,
        memory=memory,
        **step,
    )
    assert found.examples is not None
    index = _index(split_of(dataset, split), examples).cpu()
    rows = found.examples
    return found._replace(
        examples=rows._replace(index=index[rows.index]),
        elasticities={k: v for k, v in found.elasticities.items() if k not in _FACTS},
    )


def _index(chosen: Examples, most: int) -> Tensor:
    """Return which examples are audited, shuffled with one seed: data may be sorted by class."""
    drawn = torch.randperm(len(chosen.labels), generator=torch.Generator().manual_seed(0))
    return drawn[:most].to(chosen.labels.device)


def _pictures(found: Audit, dataset: Dataset, split: str) -> dict[int, bytes]:
    """Return the most opposed and most dominant examples of each class as PNG files."""
    if found.examples is None or found.examples.norm.isnan().all() or not dataset.has_images:
        return {}
    chosen = split_of(dataset, split)
    labels = range(len(found.classes))
    wanted = {
        position
        for c in labels
        for position in (*found.most_opposed(c, _PICTURED), *found.most_dominant(c, _PICTURED))
    }
    index = torch.tensor(sorted(wanted), dtype=torch.int64)
    images = as_pixels(subset(chosen, index.to(chosen.labels.device)))
    return {position: _png(image) for position, image in zip(index.tolist(), images, strict=True)}


def _png(image: Tensor) -> bytes:
    pixels = image.squeeze(-1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def about_of(
    setup: Setup,
    title: str,
    *,
    split: str,
    examples: int,
    step: int | None,
    evaluation_mode: bool = False,
) -> About:
    """Return what a page says of where its numbers come from.

    Args:
        setup: The training.
        title: Of the page.
        split: Of the data set.
        examples: How many of it.
        step: Of the training; None: not known.
        evaluation_mode: The model was without dropout.

    Returns:
        The description, with the command and the versions of this process.
    """
    config = setup.config
    environment = folder.environment()
    names = ("funcloss", "torch", "numpy", "python", "processor")
    return About(
        title=title,
        model=config.model,
        parameters=sum(p.numel() for p in setup.state.params.values()),
        loss=config.loss,
        dataset=setup.dataset.name,
        note=setup.dataset.note,
        split=split,
        examples=examples,
        step=step,
        mode="eval" if evaluation_mode else "train",
        optimizer=config.optimizer if step is not None else "",
        scale_invariant=make_optimizer(config).scale_invariant,
        command=folder.command_line(),
        versions={name: str(environment[name]) for name in names},
        made=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def observer(setup: Setup) -> Callable[[TrainState, Batch, Hyper], list[dict[str, Any]]]:
    """Return what a run calls every ``audit_every`` steps: a record a class, for its log.

    Args:
        setup: The training.

    Returns:
        ``(state, batch, hyper) -> records`` of the step on a batch.
    """
    config, dataset = setup.config, setup.dataset
    audit_step = make_audit_step(
        setup.model,
        loss_of(setup),
        make_optimizer(config),
        classes=dataset.classes,
        reduction=config.reduction,
        schedule=make_schedule(config, setup.per_epoch),
        clip_norm=config.clip_norm,
    )

    def observe(state: TrainState, batch: Batch, hyper: Hyper) -> list[dict[str, Any]]:
        found, _ = audit_step(state, batch, hyper, None)
        return found.records()

    return observe


def loss_of(setup: Setup) -> LossFn:
    """Return the loss of a training as it puts its class weights, if it has any."""
    loss = loss_named(setup.config.loss, refused=setup.config.refused_code)
    return class_weighted(loss) if "class_weights" in setup.hyper else loss
