"""A sweep under cross-validation: its trials on the folds, and the one that is chosen on all data.

Every trial holds out the same folds, so that two trials are compared on the same examples, each
scored by models that were not trained on it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from funcloss.app.report.choice import Point
from funcloss.app.runs import folder
from funcloss.app.runs.evaluation import calibrated, evaluate, rescored
from funcloss.app.runs.events import Note, Watcher
from funcloss.app.runs.folds import OUT_OF_FOLD, DivergedError, OutOfFold, cross_validated
from funcloss.app.runs.lifecycle import Outcome, kept_model, run
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.rules import rule_fits
from funcloss.app.runs.setup import Setup, setup_on
from funcloss.app.sweep.plan import Sweep, Trial, folds_file
from funcloss.decisions import Evaluation, Interval

_UNKNOWN = Interval(math.nan, math.nan, math.nan)


def run_folds(sweep: Sweep, watcher: Watcher) -> dict[int, OutOfFold] | None:
    """Train every trial on the folds, from where the folder's files are.

    Args:
        sweep: The sweep.
        watcher: Its callbacks.

    Returns:
        The out-of-fold scores by number of the trial, without those that diverged; None if it was
        told to stop.
    """
    done: dict[int, OutOfFold] = {}
    for number, trial in enumerate(sweep.trials):
        named = f"trial {number + 1} of {len(sweep.trials)}, {trial.name}"
        watcher.show(Note(f"{named}: training on folds, into {sweep.folder}"))
        try:
            found = cross_validated(
                setup_of(sweep, trial), folds_file(sweep.folder, number), watcher
            )
        except DivergedError as error:
            watcher.show(Note(f"{named}: {error}", warning=True))
            continue
        if found is None:
            return None
        done[number] = found
    return done


def setup_of(sweep: Sweep, trial: Trial) -> Setup:
    """Return the training of a trial on all of the data."""
    return setup_on(trial.config, sweep.setup.dataset)


def points_of(sweep: Sweep, found: Mapping[int, OutOfFold], focus: Sequence[int]) -> list[Point]:
    """Return the trials on the out-of-fold examples, none chosen yet.

    Args:
        sweep: The sweep.
        found: As :func:`run_folds` returns it.
        focus: Classes whose recall is told.

    Returns:
        A point per trial with intervals over the folds, by the rule that is calibrated on all of
        its out-of-fold scores.
    """
    return [
        _point(trial, setup_of(sweep, trial), found.get(number), focus)
        for number, trial in enumerate(sweep.trials)
    ]


def on_repeats(setup: Setup, found: OutOfFold) -> list[dict[str, Evaluation]]:
    """Return a trial on the out-of-fold examples of each repeat, as ``test``."""
    model = _on_folds(setup.untrained, setup, found)
    parts = [
        dataclasses.replace(found, logits=logits[None], fold=fold[None])
        for logits, fold in zip(found.logits, found.fold, strict=True)
    ]
    return [rescored(model, {"test": part.evaluation(model)}) for part in parts]


def on_test(outcome: Outcome, setup: Setup, found: OutOfFold) -> list[dict[str, Evaluation]]:
    """Return the model of a run on the test set, by the rule of its out-of-fold scores."""
    model = _on_folds(kept_model(outcome.folder, setup), setup, found)
    return [rescored(model, evaluate(model, setup.dataset, ("test",)))]


def run_trial(sweep: Sweep, number: int, name: str, watcher: Watcher) -> Outcome:
    """Train a trial on all of the data, into a run folder in that of the sweep.

    Args:
        sweep: The sweep, whose folder has the out-of-fold scores of the trial.
        number: Which trial.
        name: Of the run folder.
        watcher: Its callbacks.

    Returns:
        The run, which is that of the trial's configuration alone.
    """
    run_dir = sweep.folder / name
    return run(
        sweep.trials[number].config,
        run_dir,
        resume=(run_dir / folder.CONFIG).is_file(),
        test_once=True,
        folds=folds_file(sweep.folder, number),
        watcher=watcher,
    )


def _on_folds(model: TrainedModel, setup: Setup, found: OutOfFold) -> TrainedModel:
    """Return a model of a trial, calibrated as a run under cross-validation is."""
    held_out = found.evaluation(model)
    return calibrated(model, held_out, cut=setup.dataset.cut, on=OUT_OF_FOLD)


def _point(trial: Trial, setup: Setup, found: OutOfFold | None, focus: Sequence[int]) -> Point:
    accuracy = expected_cost = rule_cost = _UNKNOWN
    recall = (_UNKNOWN,) * len(focus)
    if found is not None:
        model = _on_folds(setup.untrained, setup, found)
        judged = rescored(model, {OUT_OF_FOLD: found.evaluation(model)})[OUT_OF_FOLD]
        by_argmax, by_rule = found.over_folds(judged).values()
        accuracy = Interval(*by_argmax["accuracy"])
        expected_cost = Interval(*by_argmax["expected_cost"])
        if rule_fits(trial.config):
            rule_cost = Interval(*by_rule["expected_cost"])
        right = judged.argmax.decisions == judged.labels
        recall = tuple(found.mean(right, judged.labels == c) for c in focus)
    return Point(
        name=trial.name,
        values=trial.values,
        accuracy=accuracy,
        expected_cost=expected_cost,
        rule_cost=rule_cost,
        recall=recall,
        plain=trial.plain,
        chosen=False,
        feasible=None,
        seeds=1,
        diverged=int(found is None),
    )
