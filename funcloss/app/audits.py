"""The audit of a run, or of a saved model, and the files that it leaves."""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from funcloss._files import write_text
from funcloss._folders import settle
from funcloss._json import jsonable
from funcloss.app.config import TrainConfig
from funcloss.app.data import Dataset, Examples, as_pixels, iter_batches, short_name, subset
from funcloss.app.options import AuditOptions
from funcloss.app.outcome import measured
from funcloss.app.report.audit_figures import draw_all
from funcloss.app.report.audit_page import render_page
from funcloss.app.report.ledger_section import Behind, ExampleBehind
from funcloss.app.report.ledger_section import render as render_ledger
from funcloss.app.report.outcome import RunOutcome, of_saved_model
from funcloss.app.report.pages import About
from funcloss.app.report.run_figures import own_style, save_figure
from funcloss.app.runs import folder, load_checkpoint, load_tensors
from funcloss.app.runs.auditing import loss_of
from funcloss.app.runs.ledger import KeptLedger, read_ledger, why_no_ledger
from funcloss.app.runs.lifecycle import note_on_data
from funcloss.app.runs.log import Thinned
from funcloss.app.runs.network import set_tensors
from funcloss.app.runs.setup import Setup, make_optimizer, make_schedule, make_setup
from funcloss.app.runs.use import sources_of, split_of
from funcloss.audit import Audit, AuditSettings, LossSpec, StepSpec, audit
from funcloss.audit.ledger_words import certain
from funcloss.audit.result import write_rows
from funcloss.audit.training import loss_options
from funcloss.audit.words import unusual
from funcloss.combinators import couples_examples
from funcloss.errors import ConfigError, RunError
from funcloss.training import TrainState
from funcloss.typing import Batch, Params

_FACTS = ("class_counts", "class_prior")  # options of a loss that nobody sets
_PICTURED = 8  # examples of a class that are shown
_WEIGHTED = 4  # weighted classes whose examples are shown
_FIGURES = ("share", "conflict", "impact", "ledger", "norms", "examples", "history", "elasticity")
_BATCHES, _SMALLEST = 8, 32  # batches that standard errors need, examples in each
_DEFAULTS = AuditOptions()
_LEDGER = "audit_ledger.csv"
_LARGEST = 100  # classes of which the table of the ledger has all pairs
_NAMES = ("audit_examples.csv", _LEDGER, *(f"audit_{name}.png" for name in _FIGURES))


@dataclass(frozen=True)
class RunAudit:
    """An audit with what its report needs."""

    audit: Audit
    about: About
    history: Sequence[dict[str, Any]]  # the audits of the training
    pictures: dict[int, bytes]  # PNG files, by index in the split of the data set
    outcome: RunOutcome | str = ""  # beside the baseline; or why there is none
    ledger: KeptLedger | None = None  # of the training; None: none was kept
    behind: tuple[Behind, ...] = ()  # the examples behind the largest harm of each weighted class


def audit_run(run_dir: str | Path, options: AuditOptions = _DEFAULTS) -> RunAudit:
    """Audit a run: what its weights changed, and gradient and step at its last checkpoint.

    Args:
        run_dir: A run folder, finished or not.
        options: What is audited, and how.

    Returns:
        The audit and what its report needs.

    Raises:
        AuditError: it cannot be audited.
        ConfigError: the split is empty, or the device is not there.
        DataError: the data cannot be had.
        RunError: the run cannot be read.
    """
    run_dir = Path(run_dir).expanduser()
    config = folder.read_config(run_dir, allow_import=options.allow_import)
    here = {"data_dir": options.data_dir or config.data_dir, "device": options.device}
    setup = make_setup(replace(config, **here, init="", pretrained=False))  # its weights are there
    found, kept = audit_training(run_dir, setup, options), read_ledger(run_dir)
    behind = () if kept is None else _behind(kept, setup)
    if kept is None:
        notes = (*found.audit.notes, why_no_ledger(run_dir))
        found = replace(found, audit=replace(found.audit, notes=notes))
    return replace(found, outcome=measured(run_dir, config, setup), ledger=kept, behind=behind)


def audit_training(run_dir: Path, setup: Setup, options: AuditOptions = _DEFAULTS) -> RunAudit:
    """Audit the checkpoint of a run as :func:`audit_run` does, where its training is set up."""
    config = setup.config
    changed = note_on_data(run_dir, setup)
    state, hyper = load_checkpoint(run_dir, setup)
    setup = replace(setup, hyper=hyper)
    summary = folder.read_summary(run_dir)
    done = int(state.step)
    going_on = done == 0 or (summary is None and done < setup.steps)
    schedule = make_schedule(config, setup.per_epoch)
    step = StepSpec(
        make_optimizer(config),
        hyper["learning_rate"],
        # A checkpoint has the state after its last step; that of a finished run takes no more.
        schedule=schedule if going_on else lambda step: schedule(step - 1),
        clip_norm=config.clip_norm,
    )
    found = _audited(setup, state, options, step)
    notes = [changed] * bool(changed) + [_step_note(found, going_on=going_on)]
    if summary is not None and "best_epoch" in summary:
        notes.append(
            f"audited after the last epoch, {summary['epochs']}; the model that the run kept is of "
            f"epoch {summary['best_epoch']}"
        )
    if config.amp != "off":
        notes.append(f"trained in {config.amp}, audited in float32")
    if config.oversample:
        notes.append("rarer classes were repeated in training; here each example counts once")
    if config.augment != "off":
        notes.append("images were varied in training; here they are as they are")
    found = replace(found, notes=(*found.notes, *notes))
    return _with_report(setup, found, options, run_dir.name, int(state.step), _history(run_dir))


def _step_note(found: Audit, *, going_on: bool) -> str:
    """Return which step the audit shows."""
    what = "the next step" if going_on else "a step like the last one taken"
    note = f"the step shown is {what}"
    if found.step is not None:
        note += f": its learning rate, {found.step.learning_rate:.3g}"
    note += f", on the mean gradient of {int(found.count.sum()):,} examples"
    return note if going_on else f"{note}; the last batch itself is not kept"


def _history(run_dir: Path) -> list[dict[str, Any]]:
    """Return what was logged of the audits of a training, of very many some."""
    kept = Thinned()
    audits = (r for r in folder.records_of(run_dir) if r["kind"] == "audit")
    for _, rows in itertools.groupby(audits, key=lambda row: row["step"]):
        kept.add([*rows])
    return [row for rows in kept.items for row in rows]


def audit_checkpoint(
    path: str | Path, config: TrainConfig, options: AuditOptions = _DEFAULTS
) -> RunAudit:
    """Audit a saved model, a safetensors file of its tensors by name, which has no history.

    Args:
        path: The file, for example a run's ``model.safetensors``.
        config: Model, loss, class weights and data set; its optimiser is not looked at.
        options: What is audited, and how; its ``data_dir`` and ``device``, if they are set, come
            before those of ``config``.

    Returns:
        The audit of the gradient, and what its report needs.

    Raises:
        AuditError: it cannot be audited.
        ConfigError: the request makes no sense on this machine or data.
        DataError: the data cannot be had.
        RunError: the file cannot be read, or is of another model.
    """
    device = config.device if options.device == "auto" else options.device
    config = replace(config, data_dir=options.data_dir or config.data_dir, device=device)
    setup, path = make_setup(config), Path(path).expanduser()
    tensors, _ = load_tensors(path)
    other = f"{path} is not of {config.model} on {config.dataset}"
    try:
        misshapen = set_tensors(setup.model, tensors)
    except ConfigError as error:
        raise RunError(f"{other}: {error}") from None
    if misshapen:
        raise RunError(f"{other}: see its {misshapen[0]}")
    found = _with_report(setup, _audited(setup, None, options), options, path.name)
    return replace(found, outcome=of_saved_model(setup.config.class_weight))


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
    settle(out, last=folder.CONFIG)
    page = render_page(
        found.audit,
        found.about,
        history=found.history,
        pictures=found.pictures,
        outcome=found.outcome,
        ledger_section="" if found.ledger is None else render_ledger(found.ledger, found.behind),
    )
    write_text(out / "audit.html", page)
    facts = {"about": asdict(found.about), "outcome": jsonable(found.outcome) or None}
    paths = [out / "audit.html", *found.audit.write(out, facts=facts)]
    if found.ledger is not None:
        paths.append(out / _LEDGER)
        write_rows(paths[-1], _ledger_rows(found.ledger))
    with own_style():
        figures = draw_all(found.audit, found.history, found.ledger)
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        save_figure(figure, paths[-1])
    for name in _NAMES:  # of an earlier audit, which had more to show
        if out / name not in paths:
            (out / name).unlink(missing_ok=True)
    return paths


def _audited(
    setup: Setup,
    state: TrainState | Params | None,
    options: AuditOptions,
    step: StepSpec | None = None,
) -> Audit:
    config, dataset = setup.config, setup.dataset
    chosen = split_of(dataset, options.split)
    held = dataset.validation if options.split == "train" else None

    def batches(examples: Examples) -> Callable[[], Iterator[Batch]]:
        index, size = _index(examples, options.examples), max(config.batch_size, 256)
        if not couples_examples(loss_of(setup)):  # else a batch is what the loss looks at
            size = min(size, max(len(index) // _BATCHES, _SMALLEST))
        pieces = index.split(size)
        return lambda: iter_batches(dataset, examples, pieces)

    if step is not None and held is not None and len(held.labels):
        step = replace(step, held_out=batches(held))
    loss = LossSpec(
        loss_of(setup),
        setup.hyper.get("class_weights"),
        loss_options(setup.hyper),
        config.reduction,
    )
    found = audit(
        setup.model.train(not options.evaluation_mode),
        state,
        loss,
        batches(chosen),
        step=step,
        settings=AuditSettings(dataset.classes, method=options.method, memory=options.memory),
    )
    assert found.examples is not None
    index = _index(chosen, options.examples).cpu()
    return replace(
        found,
        examples=replace(found.examples, index=index[found.examples.index]),
        elasticities={k: v for k, v in found.elasticities.items() if k not in _FACTS},
    )


def _index(chosen: Examples, most: int) -> Tensor:
    """Return which examples are audited, shuffled with one seed: data may be sorted by class."""
    drawn = torch.randperm(len(chosen.labels), generator=torch.Generator().manual_seed(0))
    return drawn[:most].to(chosen.labels.device)


def _with_report(
    setup: Setup,
    found: Audit,
    options: AuditOptions,
    name: str,
    step: int | None = None,
    history: Sequence[dict[str, Any]] = (),
) -> RunAudit:
    n = int(found.count.sum())
    about = about_of(setup, f"Audit of {name}", options, examples=n, step=step)
    return RunAudit(found, about, history, _pictures(found, setup.dataset, options.split))


def _pictures(found: Audit, dataset: Dataset, split: str) -> dict[int, bytes]:
    """Return the most opposed and most dominant examples of each class as PNG files."""
    if found.examples is None or found.examples.norm.isnan().all() or not dataset.has_images:
        return {}
    chosen = split_of(dataset, split)
    shown = (found.most_opposed, found.most_dominant)
    wanted = {i for c in range(len(found.classes)) for most in shown for i in most(c, _PICTURED)}
    index = torch.tensor(sorted(wanted), dtype=torch.int64)
    images = as_pixels(subset(chosen, index.to(chosen.labels.device)))
    return {position: _png(image) for position, image in zip(index.tolist(), images, strict=True)}


def _behind(found: KeptLedger, setup: Setup) -> tuple[Behind, ...]:
    """Return the training examples behind the largest harm that each weighted class surely did."""
    sure = certain(found.ledger, exact=found.exact)
    pairs = []
    for c in unusual(found.weights.tolist())[:_WEIGHTED]:
        harm = found.ledger.net[:, c].where(sure[:, c], 0.0)
        harm[c] = 0.0
        k = int(harm.argmax())
        rows = found.behind(k, c, _PICTURED) if harm[k] > 0 else []
        if rows:
            index = torch.tensor([position for position, _ in rows])
            pairs.append((found.classes[k], found.classes[c], index, [e for _, e in rows]))
    return tuple(
        Behind(loss, by, tuple(map(ExampleBehind, *_shown(setup, index, effects))))
        for loss, by, index, effects in pairs
    )


def _shown(
    setup: Setup, index: Tensor, effects: list[float]
) -> tuple[list[str], list[float], list[bytes]]:
    """Return where training examples are, what they did, and their pictures, if they are images."""
    train = setup.dataset.train
    examples = subset(train, index.to(train.labels.device))
    every = sources_of(setup.config, setup.dataset, "train", train)
    places = [
        file if row is None else f"{file}, number {row:,}"
        for file, row in (every[position] for position in index.tolist())
    ]
    pictures = map(_png, as_pixels(examples)) if setup.dataset.has_images else [b""] * len(index)
    return places, effects, [*pictures]


def _ledger_rows(found: KeptLedger) -> Iterator[dict[str, Any]]:
    """Yield a row per held-out class and part; of very many classes, those of weighted ones."""
    ledger, error = found.ledger, found.ledger.standard_error
    columns = range(len(found.parts))
    if len(found.classes) > _LARGEST:
        columns = unusual(found.weights.tolist())[:_LARGEST]
    for k, name in enumerate(found.classes):
        for r in columns:
            yield {
                "loss_of": name,
                "by": found.parts[r],
                "net": ledger.net[k, r],
                "standard_error": None if found.exact else error[k, r],
                "raised": ledger.raised[k, r] if found.exact else None,
                "lowered": ledger.lowered[k, r] if found.exact else None,
            }


def _png(image: Tensor) -> bytes:
    pixels = image.squeeze(-1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def about_of(
    setup: Setup, title: str, options: AuditOptions, *, examples: int, step: int | None = None
) -> About:
    """Return where the numbers of a page come from, with the command and the versions."""
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
        split=options.split,
        examples=examples,
        step=step,
        mode="eval" if options.evaluation_mode else "train",
        optimizer=config.optimizer if step is not None else "",
        scale_invariant=make_optimizer(config).scale_invariant,
        log_loss=short_name(config.loss) == "cross_entropy",
        command=folder.command_line(),
        versions={name: str(environment[name]) for name in names},
        made=datetime.now().astimezone().isoformat(timespec="seconds"),
    )
