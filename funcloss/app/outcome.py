"""What the class weights of a run changed: its kept model beside that of its baseline."""

import dataclasses
import functools
import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from funcloss._json import or_nan
from funcloss.app.config import TrainConfig, plain_config
from funcloss.app.data import short_name
from funcloss.app.decoding import Count, Number, from_json, read_json
from funcloss.app.options import AuditOptions
from funcloss.app.report.outcome import Change, ClassOutcome, RunOutcome
from funcloss.app.runs import folder
from funcloss.app.runs.baseline import PLAIN, differing, seed_dir, train_pairs
from funcloss.app.runs.checkpoint import load_header
from funcloss.app.runs.evaluation import evaluate_examples, rescored
from funcloss.app.runs.events import Watcher
from funcloss.app.runs.folds import OUT_OF_FOLD, read_folds
from funcloss.app.runs.lifecycle import note_on_data
from funcloss.app.runs.log import lines_of
from funcloss.app.runs.model import TrainedModel, load_model
from funcloss.app.runs.options import chosen_loss
from funcloss.app.runs.rules import usual_rule
from funcloss.app.runs.setup import Setup, make_setup
from funcloss.audit.words import unusual
from funcloss.combinators import options_of
from funcloss.decisions import (
    RULES,
    Costs,
    Evaluation,
    Interval,
    mean_interval,
    paired_interval,
    part_interval,
    seed_interval,
    widened_by_seeds,
)
from funcloss.errors import ConfigError, RunError

_UNKNOWN = Interval(math.nan, math.nan, math.nan)
_OF_PART = (-1.0, 1.0)  # what a difference of two fractions can be
_DEFAULTS = AuditOptions()


def train_baseline(
    run_dir: str | Path,
    options: AuditOptions = _DEFAULTS,
    *,
    seeds: int = 1,
    show: Callable[[Any], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train what the outcome of a run is compared with, unless it is there.

    The baseline is the same training with all class weights 1 and the cross-entropy, of the same
    seed, so that first weights, batches and masks are the same. It goes into ``plain`` in the run
    folder. Each further seed adds a run and its baseline, in ``seed-N``. A stopped one goes on.

    Args:
        run_dir: A finished run.
        options: Of these ``data_dir``, ``device`` and ``allow_import`` count.
        seeds: Pairs of run and baseline, that of the run's own seed among them.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.

    Returns:
        Whether all are trained; False if it was told to stop.

    Raises:
        ConfigError: the run is not finished, or has nothing to compare, or the request makes no
            sense on this machine.
        DataError: the data cannot be had.
        RunError: the run cannot be read, its data has changed, or a folder cannot be written.
    """
    run_dir = Path(run_dir).expanduser()
    config = folder.read_config(run_dir, allow_import=options.allow_import)
    if folder.read_summary(run_dir) is None:
        raise ConfigError(f"{run_dir} is not finished: resume it before you train its baseline")
    weighted = set(config.class_weight.values()) - {1.0}
    if not (weighted or config.floor or config.ceiling or _has_costs(config)):
        raise ConfigError(
            f"{run_dir} has no class weights and no costs in its loss: there is nothing to compare"
        )
    device = config.device if options.device == "auto" else options.device
    config = dataclasses.replace(
        config, data_dir=options.data_dir or config.data_dir, device=device
    )
    places = [run_dir] + [seed_dir(run_dir, config.seed + k) for k in range(1, seeds)]
    if {*places} <= {pair[0] for pair in _pairs(run_dir, config)[0]}:
        return True
    setup = make_setup(dataclasses.replace(config, init="", pretrained=False))
    if changed := note_on_data(run_dir, setup):
        raise RunError(f"{changed}: a baseline would be trained on other data; put it back")
    del setup
    # Audits and ledgers change no step, and nobody reads those of what a run is compared with.
    quiet = dataclasses.replace(config, audit_every=0, ledger="off")
    return train_pairs(quiet, run_dir, seeds, Watcher(show, should_stop))


def measured(run_dir: Path, config: TrainConfig, setup: Setup) -> RunOutcome | str:
    """Return a run beside its baseline, on the split that its summary reports.

    Args:
        run_dir: A run folder.
        config: Its configuration, as the folder has it.
        setup: Its training, on the data as they are now.

    Returns:
        The outcome; or a sentence that says why there is none.

    Raises:
        RunError: the run, or its baseline, cannot be read.
    """
    summary = folder.read_summary(run_dir)
    what = "what its class weights changed in recall is not known"
    if summary is None:
        return f"The training is not finished: {what}."
    if changed := note_on_data(run_dir, setup):
        of_end = "summary.json has the recall at the end of the training"
        return f"{changed[0].upper()}{changed[1:]}: {what}; {of_end}."
    split = "test" if "test" in summary else OUT_OF_FOLD
    model = _load(run_dir, config, setup)
    weights = [1.0] * len(model.classes)
    if "weights_found" in summary:  # under constraints: they moved as it trained
        weights = [summary["weights_found"].get(name, 1.0) for name in model.classes]
    elif model.class_weights is not None:
        weights = model.class_weights.tolist()
    focus = unusual(weights) or [c for c, weight in enumerate(weights) if weight != 1.0]
    if not focus and _has_costs(config):
        focus = [_costliest(model.costs)]
    outcome = RunOutcome(
        run=shlex.quote(str(run_dir)),
        split=split,
        examples=0,
        classes=(),
        focus=tuple(focus),
        loss="" if config.loss == "cross_entropy" else short_name(config.loss),
        accuracy=Change(_UNKNOWN),
        expected_cost=Change(_UNKNOWN),
        rule_cost=None,
    )
    pairs, note = _pairs(run_dir, config) if focus else ([], "")
    if pairs and pairs[0][0] != run_dir:  # those of other seeds alone are of other runs
        pairs = []
    swept = _swept(run_dir) if focus else []
    if len(swept) > len(pairs):
        return _of_sweep(dataclasses.replace(outcome, note=note), swept, weights, config)
    runs = [_evaluated(run, own, setup, split) for run, own, _, _ in pairs]
    bases = [_evaluated(base, plain, setup, split) for _, _, base, plain in pairs]
    runs = runs or [_evaluated(run_dir, config, setup, split)]
    return _of_pairs(dataclasses.replace(outcome, note=note), runs, bases, weights, config)


def _has_costs(config: TrainConfig) -> bool:
    """Return whether the loss of a training learns by costs that are not all alike."""
    takes = options_of(chosen_loss(config)) & {"cost_matrix", "costs"}
    return bool(takes and (config.cost_matrix or config.class_cost or config.cost))


def _costliest(costs: Costs) -> int:
    # What costs each example another amount goes before all that has one cost.
    return int(costs.matrix.nan_to_num(math.inf).clamp(min=0).sum(1).argmax())


def _finished(run_dir: Path) -> bool:
    return folder.read_summary(run_dir) is not None


def _seeds(run_dir: Path) -> dict[int, Path]:
    """Return the finished runs with other seeds in a run folder, by seed."""
    found = {}
    for place in run_dir.glob("seed-[0-9]*"):
        seed = place.name.removeprefix("seed-")
        if seed.isdigit() and place.is_dir() and _finished(place):
            found[int(seed)] = place
    return dict(sorted(found.items()))


_Pair = tuple[Path, TrainConfig, Path, TrainConfig]  # run, baseline, each with its configuration


def _pairs(run_dir: Path, config: TrainConfig) -> tuple[list[_Pair], str]:
    """Return the runs that have a baseline, and a note on what is there and is none."""
    others = {seed: place for seed, place in _seeds(run_dir).items() if seed != config.seed}
    pairs, notes = [], []
    for seed, place in {config.seed: run_dir, **others}.items():
        own, base = dataclasses.replace(config, seed=seed), place / PLAIN
        plain = plain_config(own)
        if place == run_dir and not base.exists() and _of_a_sweep(run_dir):
            base = run_dir.parent / PLAIN  # of a sweep with folds
        if not _finished(base):
            continue
        apart = (differing(own, place) if place != run_dir else []) + differing(plain, base)
        if apart:
            notes.append(f"{base} is not compared: it has other options ({', '.join(apart)}).")
            continue
        pairs.append((place, own, base, plain))
        if changed := folder.differences(_environment(place), _environment(base)):
            notes.append(
                f"{base} was trained in another environment ({'; '.join(changed)}): it may differ "
                "from its run in rounding too."
            )
    return pairs, " ".join(notes)


@dataclass(frozen=True)
class _Header:
    """What is read of the header of a checkpoint."""

    environment: dict[str, str]


def _environment(run_dir: Path) -> dict[str, str]:
    return load_header(run_dir / folder.CHECKPOINT, _Header).environment


def _load(run_dir: Path, config: TrainConfig, setup: Setup) -> TrainedModel:
    model = load_model(run_dir / folder.MODEL, config, device=setup.config.device)
    if model.data != setup.dataset.fingerprint:
        raise RunError(f"{run_dir} was trained on other data than the run that it belongs to")
    return model


def _evaluated(run_dir: Path, config: TrainConfig, setup: Setup, split: str) -> Evaluation:
    """Return the kept model of a run on the split that its summary reports, by the run's rule."""
    model = _load(run_dir, config, setup)
    if split == OUT_OF_FOLD:
        found = read_folds(run_dir).evaluation(model)
    else:
        found = evaluate_examples(model, setup.dataset, setup.dataset.test)
    return rescored(model, {split: found})[split]


def _of_pairs(
    outcome: RunOutcome,
    runs: Sequence[Evaluation],
    bases: Sequence[Evaluation],
    weights: Sequence[float],
    config: TrainConfig,
) -> RunOutcome:
    """Fill in the scores of runs and their baselines, paired by example."""
    first = runs[0]
    n = len(first.labels) // first.repeats
    least, most = first.possible_costs
    change = functools.partial(_mean_change, first, within=(least, most))
    rule_cost = None
    if usual_rule(config) != RULES[0]:
        rule_cost = change(*([e.min_cost.example_cost for e in each] for each in (runs, bases)))
    accuracy = runs[0].argmax.accuracy
    if len(runs) > 1:
        accuracy = part_interval([e.argmax.accuracy.value for e in runs], n)
    return dataclasses.replace(
        outcome,
        examples=n,
        classes=tuple(
            ClassOutcome(
                name,
                weights[c],
                int((first.labels == c).sum()) // first.repeats,
                _recall(c, runs, bases),
                _precision(c, runs, bases),
            )
            for c, name in enumerate(first.rule.costs.classes)
        ),
        accuracy=Change(accuracy),
        expected_cost=change(*([e.argmax.example_cost for e in each] for each in (runs, bases))),
        rule_cost=rule_cost,
        seeds=len(bases),
        paired_by="example" if bases else "",
    )


def _recall(c: int, runs: Sequence[Evaluation], bases: Sequence[Evaluation]) -> Change:
    """Return the recall of a class: intervals over its examples, moved out by the seeds."""

    def right(each: Sequence[Evaluation]) -> list[Tensor]:
        return [(e.argmax.decisions == c)[e.labels == c] for e in each]

    repeats = runs[0].repeats
    n = int((runs[0].labels == c).sum()) // repeats
    if not n:
        return Change(_UNKNOWN)

    def part(hits: list[Tensor]) -> Interval:
        return part_interval([float(h.double().mean()) for h in hits], n)

    ours, theirs = right(runs), right(bases)
    if not bases:
        return Change(part(ours))
    gained = [float((a & ~b).sum()) / repeats for a, b in zip(ours, theirs, strict=True)]
    lost = [float((b & ~a).sum()) / repeats for a, b in zip(ours, theirs, strict=True)]
    of_examples = paired_interval(_mean(gained), _mean(lost), n)
    of_seed = [(g - m) / n for g, m in zip(gained, lost, strict=True)]
    difference = widened_by_seeds(of_examples, of_seed, within=_OF_PART)
    return Change(part(ours), part(theirs), difference)


def _precision(c: int, runs: Sequence[Evaluation], bases: Sequence[Evaluation]) -> Change:
    """Return the precision of a class, a ratio of two means, by its linearisation.

    ``r = sum w h / sum w d``, of examples decided as the class (``d``) and rightly so (``h``), has
    the error of the mean of ``r + (h - r d) / mean(d)``: Cochran, "Sampling techniques", 1977,
    section 6.
    """

    def linear(found: Evaluation) -> Tensor:
        decided = (found.argmax.decisions == c).double()
        right = decided * (found.labels == c)
        mean = found.weights @ decided / found.weights.sum()
        ratio = found.weights @ right / (found.weights @ decided)
        return ratio + (right - ratio * decided) / mean

    change = _mean_change(
        runs[0], [linear(e) for e in runs], [linear(e) for e in bases], within=(0.0, 1.0)
    )
    if len(runs) > 1:
        return change
    precision = (Interval(*(float(v[c]) for v in e.argmax.precision)) for e in (*runs, *bases))
    return Change(*precision, *([change.difference] if bases else []))


def _mean_change(
    of: Evaluation,
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    *,
    within: tuple[float, float],
) -> Change:
    """Return the mean of a value per example, and of its paired difference, with intervals."""
    n = len(of.labels) // of.repeats
    strata = of.labels[:n] if of.known_prior else None

    def mean(values: Sequence[Tensor], within: tuple[float, float]) -> Interval:
        each = torch.stack([v.reshape(of.repeats, n).mean(0) for v in values])
        if not each.isfinite().all():
            return _UNKNOWN
        found = mean_interval(each, of.weights[:n], strata=strata, within=within)
        # Values that are all alike say nothing of others.
        return found if found.high > found.low else Interval(found.value)

    if not theirs:
        return Change(mean(ours, within))
    reach = within[1] - within[0]
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    return Change(mean(ours, within), mean(theirs, within), mean(apart, (-reach, reach)))


# A sweep keeps its trials' scores on validation data, seed by seed, and the chosen model alone.


class _Trial(TypedDict):
    """What is read of a line of ``trials.jsonl``."""

    seed: Count
    name: str
    plain: bool
    diverged: bool
    expected_cost: float
    rule_cost: Number
    recall: dict[str, Number]
    precision: dict[str, Number]
    support: list[Count]


class _Point(TypedDict):
    name: str
    chosen: bool


class _Report(TypedDict):
    """What is read of ``sweep.json``."""

    points: list[_Point]


def _trial_line(text: bytes, where: str) -> dict[str, Any]:
    return cast(dict[str, Any], from_json(_Trial, text, where))


def _of_a_sweep(run_dir: Path) -> bool:
    place = run_dir.absolute()
    return place.name == "chosen" and (place.parent / folder.SIGNS["sweep"]).is_file()


def _swept(run_dir: Path) -> list[tuple[_Trial, _Trial]]:
    """Return the chosen and the plain trial of each seed of the sweep that a run is part of."""
    sweep_dir = run_dir.absolute().parent
    report, path = sweep_dir / "sweep.json", sweep_dir / "trials.jsonl"
    if not (_of_a_sweep(run_dir) and report.is_file() and path.is_file()):
        return []
    chosen = [p["name"] for p in read_json(_Report, report)["points"] if p["chosen"]]
    trials = [cast(_Trial, trial) for _, trial in lines_of(path, _trial_line)]
    pairs = []
    for seed in sorted({trial["seed"] for trial in trials}):
        sound = [t for t in trials if t["seed"] == seed and not t["diverged"]]
        own = [t for t in sound if t["name"] in chosen]
        plain = [t for t in sound if t["plain"]]
        if len(own) == len(plain) == 1:  # of several learning rates each has its own
            pairs.append((own[0], plain[0]))
    return pairs


def _of_sweep(
    outcome: RunOutcome,
    pairs: Sequence[tuple[_Trial, _Trial]],
    weights: Sequence[float],
    config: TrainConfig,
) -> RunOutcome:
    """Fill in the scores of a sweep's trials on validation data, paired by seed."""
    support = pairs[0][0]["support"]

    def change(value: Callable[[_Trial], Number], low: float, high: float) -> Change:
        ours, theirs = [], []
        for chosen, plain in pairs:
            ours.append(or_nan(value(chosen)))
            theirs.append(or_nan(value(plain)))
        apart = [a - b for a, b in zip(ours, theirs, strict=True)]
        return Change(
            seed_interval(ours, within=(low, high)),
            seed_interval(theirs, within=(low, high)),
            seed_interval(apart, within=(low - high, high - low)),
        )

    names = [*pairs[0][0]["recall"]]
    return dataclasses.replace(
        outcome,
        split="validation",
        examples=sum(support),
        classes=tuple(
            ClassOutcome(
                name,
                weight,
                n,
                change(lambda trial, name=name: trial["recall"][name], 0.0, 1.0),
                change(lambda trial, name=name: trial["precision"][name], 0.0, 1.0),
            )
            for name, weight, n in zip(names, weights, support, strict=True)
        ),
        expected_cost=change(lambda trial: trial["expected_cost"], -math.inf, math.inf),
        rule_cost=change(lambda trial: trial["rule_cost"], -math.inf, math.inf)
        if usual_rule(config) != RULES[0]
        else None,
        seeds=len(pairs),
        paired_by="seed",
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
