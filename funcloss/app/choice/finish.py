"""The end of a choice: the test set, the run folder of the chosen model, the report."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from funcloss._files import write_csv, write_text
from funcloss._json import jsonable
from funcloss.app.audits import RunAudit, about_of, audit_training
from funcloss.app.choice.tested import quality_of, row_of
from funcloss.app.choice.words import slope_sentences, tested_sentences
from funcloss.app.data import get_batch
from funcloss.app.options import AuditOptions
from funcloss.app.report.choice import Choice, Quality, Row
from funcloss.app.report.choice import Constraint as Reached
from funcloss.app.report.choice_figures import frontier, placed
from funcloss.app.report.choice_page import render_choice_page
from funcloss.app.report.run_figures import own_style, save_figure
from funcloss.app.runs.evaluation import deployment_prior
from funcloss.app.runs.rules import rule_fits
from funcloss.app.runs.setup import Setup, make_optimizer
from funcloss.constraints.ascent import decision_weights
from funcloss.constraints.bounds import Constraint, constraint_text, held, reached
from funcloss.decisions import Costs, DecisionScores, Evaluation, cost_sentences, log_posterior
from funcloss.errors import AuditError
from funcloss.objectives import supervised
from funcloss.sensitivity import cost_gradient, mean_expected_cost
from funcloss.training import TrainState, make_train_step
from funcloss.typing import Hyper

_HORIZON = 5  # steps of the cost gradient
_BATCH, _VALIDATION = 128, 1000  # examples of each step, and of what it is judged by


@dataclass(frozen=True)
class Candidates:
    """The models that are compared: evaluations by split, one per seed or repeat of folds."""

    plain: Sequence[Mapping[str, Evaluation]]  # the baseline
    chosen: Sequence[Mapping[str, Evaluation]] | None  # None: it is the baseline
    name: str  # of the chosen model
    plain_name: str = "plain"  # of the baseline, or of another model that stands in for it
    chosen_on: str = "validation data"
    tested_on: str = "test set"  # what the evaluations call ``test``


def report_on(
    setup: Setup,
    candidates: Candidates,
    constraints: Sequence[Constraint],
    swept: Sequence[str],
    end: tuple[TrainState, Hyper],
) -> Choice:
    """Return what the test set, read once, says of a chosen model beside what is cheaper.

    Args:
        setup: The training of the chosen model.
        candidates: The models.
        constraints: What has to hold.
        swept: Classes whose weight was looked for.
        end: The state of the chosen model's training, and what its next step would be given.

    Returns:
        A choice with everything that the test set says. Its rows: the baseline by argmax, by
        minimum expected cost and, under constraints, by moved thresholds; then the chosen model by
        argmax and, where its loss makes probabilities of logits, by minimum expected cost.
    """
    costs = setup.costs
    focus = focus_of(costs, constraints, swept)
    names = [costs.classes[c] for c in focus]
    rows, lines = _on_test(setup, candidates, constraints, focus)
    gradient, horizon = _gradient_of(setup, *end)
    return Choice(
        title="",
        lines=(*lines, *slope_sentences(gradient, horizon)),
        costs=tuple(cost_sentences(costs)),
        focus=tuple(names),
        axes=(),
        points=(),
        constraints=(),
        ascent=(),
        rows=rows,
        gradient=gradient,
        gradient_steps=horizon,
        seeds=len(candidates.plain),
        chosen_on=candidates.chosen_on,
        tested_on=candidates.tested_on,
        qualities=_qualities(candidates),
    )


def constraint_rows(
    constraints: Sequence[Constraint], values: Sequence[float], classes: Sequence[str]
) -> tuple[Reached, ...]:
    """Return the constraints, and what was reached of them, as a report shows them."""
    return tuple(
        Reached(
            constraint_text(constraint, classes),
            constraint.bound,
            value,
            held([constraint], [value]),
        )
        for constraint, value in zip(constraints, values, strict=True)
    )


def _on_test(
    setup: Setup, candidates: Candidates, constraints: Sequence[Constraint], focus: Sequence[int]
) -> tuple[tuple[Row, ...], list[str]]:
    """Return the rows of the test set, and sentences on them."""
    plain, chosen = candidates.plain, candidates.chosen
    name, plain_name, rule = candidates.name, candidates.plain_name, "minimum expected cost"
    base = [found["test"].argmax for found in plain]
    scores = {plain_name: base, f"{plain_name}, {rule}": [f["test"].min_cost for f in plain]}
    if constraints:
        scores[f"{plain_name}, thresholds moved"] = [_moved(found, constraints) for found in plain]
    cheap = list(scores)[-1]
    best = base
    if chosen is not None:
        best = scores[name] = [found["test"].argmax for found in chosen]
        if rule_fits(setup.config):
            scores[f"{name}, {rule}"] = [found["test"].min_cost for found in chosen]
    compare = functools.partial(row_of, evaluation=plain[0]["test"], focus=focus)
    rows = {
        title: compare(title, found, plain=None if title == plain_name else base)
        for title, found in scores.items()
    }
    gap = compare(name, best, plain=scores[cheap]).difference if chosen is not None else None
    classes = setup.costs.classes
    reaches = zip(*(reached(constraints, s) for s in best), strict=True)
    texts = [constraint_text(constraint, classes) for constraint in constraints]
    held_out = [(text, sum(v) / len(v)) for text, v in zip(texts, reaches, strict=True)]
    trained = None if chosen is None else rows[name]
    lines = tested_sentences(
        rows[plain_name],
        trained,
        rows[cheap],
        gap,
        held_out,
        [classes[c] for c in focus],
        candidates.tested_on,
    )
    return tuple(rows.values()), lines


def _qualities(candidates: Candidates) -> tuple[Quality, ...]:
    every = {candidates.plain_name: candidates.plain}
    if candidates.chosen is not None:
        every[candidates.name] = candidates.chosen
    return tuple(quality_of(name, [f["test"] for f in found]) for name, found in every.items())


def _moved(plain: Mapping[str, Evaluation], constraints: Sequence[Constraint]) -> DecisionScores:
    """Move the thresholds of plain training to the constraints on validation; score the test."""
    held_out, test = plain["validation"], plain["test"]

    log_probs = log_posterior(held_out.logits)
    log_weights, _ = decision_weights(log_probs, constraints, held_out.rule.costs, held_out.scored)
    return test.scored((log_posterior(test.logits) + log_weights).argmax(-1))


def focus_of(
    costs: Costs, constraints: Sequence[Constraint], swept: Sequence[str], most: int = 3
) -> list[int]:
    """Return the classes that a report speaks of.

    Args:
        costs: What each mistake costs.
        constraints: What has to hold.
        swept: Classes whose weight was looked for.
        most: How many are taken.

    Returns:
        Limited ones first, then swept ones; else the costliest, else the last.
    """
    named = [constraint.truth for constraint in constraints if constraint.truth >= 0]
    named += [costs.classes.index(name) for name in swept]
    # What costs each example another amount goes before all that has one cost.
    rows = costs.matrix.nan_to_num(math.inf).clamp(min=0).sum(1)
    if not named and float(rows.max()) > float(rows.min()):
        named.append(int(rows.argmax()))
    return list(dict.fromkeys(named or [len(costs.classes) - 1]))[:most]


def _gradient_of(setup: Setup, state: TrainState, hyper: Hyper) -> tuple[dict[str, float], int]:
    """Return what one more unit of each class's weight would do to the validation cost.

    Through five further steps at the peak learning rate, on a fraction of the validation data; none
    where there are no class weights or no validation data, decisions that are no class, or costs of
    each example.
    """
    held_out = len(setup.dataset.validation.labels)
    if "class_weights" not in hyper or setup.costs.extra or setup.costs.amounts or not held_out:
        return {}, 0
    dataset, config, device = setup.dataset, setup.config, state.key.device
    step = make_train_step(
        supervised(setup.model, setup.trained(state, hyper).criterion),
        make_optimizer(config),
        clip_norm=config.clip_norm,
    )
    order = setup.order(state.key, 0).to(device)
    size = min(_BATCH, config.batch_size)
    pieces = [piece for piece in order.split(size)[:_HORIZON] if len(piece) == size]
    held = torch.arange(len(dataset.validation.labels), device=device)
    batch = get_batch(dataset, dataset.validation, held[:: math.ceil(len(held) / _VALIDATION)])
    support = batch.targets.bincount(minlength=len(dataset.classes)).cpu()
    prior = deployment_prior(config, dataset.classes, support)
    weights = None
    if prior is not None:
        weights = (prior / support).float().to(device)[batch.targets] * len(batch.targets)
    cost = mean_expected_cost(
        setup.untrained.forward,
        batch.inputs,
        batch.targets,
        setup.costs.matrix.float().to(device),
        sample_weights=weights,
    )
    batches = [get_batch(dataset, dataset.train, piece) for piece in pieces]
    found = cost_gradient(step, state, batches, cost, hyper)
    return dict(zip(dataset.classes, found.gradient.tolist(), strict=True)), len(batches)


def written(choice: Choice, page: Path, run_dir: Path, setup: Setup) -> list[Path]:
    """Write the page, the frontier, the table and the numbers of a choice.

    Args:
        choice: The choice.
        page: The page to write; the other files go beside it.
        run_dir: The run folder of the chosen model, which is audited.
        setup: Its training.

    Returns:
        The files, the page first.

    Raises:
        RunError: one cannot be written; what was there is as it was.
    """
    out = page.parent
    audited = _audited(run_dir, setup)
    if audited is None:
        n = len(setup.dataset.train.labels)
        about, found = about_of(setup, choice.title, AuditOptions(), examples=n), None
        more: dict[str, Any] = {}
    else:
        found, about = audited.audit, dataclasses.replace(audited.about, title=choice.title)
        more = {"history": audited.history, "pictures": audited.pictures}
    write_text(page, render_choice_page(choice, found, about, **more))
    files = [page, page.with_suffix(".json")]
    if choice.points:
        files.append(page.with_suffix(".csv"))
        _write_points(files[-1], choice)
    if len(placed(choice)) > 1:
        files.append(out / "frontier.png")
        with own_style():
            drawn = frontier(choice)
        save_figure(drawn, files[-1])
    # Last: it is the sign that all of it is there.
    text = json.dumps(jsonable(choice), indent=2, allow_nan=False)
    write_text(files[1], text + "\n")
    return files


def _write_points(path: Path, choice: Choice) -> None:
    names = [*choice.axes, "accuracy", "expected_cost", "rule_cost"]
    names += [f"recall {name}" for name in choice.focus]
    spread = [part for name in names[len(choice.axes) :] for part in (name, "low", "high")]
    rows: list[tuple[Any, ...]] = [
        (*choice.axes, *spread, "feasible", "chosen", "plain", "diverged", "seeds")
    ]
    for p in choice.points:
        scores = (p.accuracy, p.expected_cost, p.rule_cost, *p.recall)
        values = [p.values.get(axis, "") for axis in choice.axes]
        numbers = [f"{v:.6g}" for score in scores for v in score]
        rows.append((*values, *numbers, p.feasible, p.chosen, p.plain, p.diverged, p.seeds))
    write_csv(path, rows)


def _audited(run_dir: Path, setup: Setup) -> RunAudit | None:
    try:
        return audit_training(run_dir, setup)
    except AuditError:  # the page says what was chosen all the same
        return None
