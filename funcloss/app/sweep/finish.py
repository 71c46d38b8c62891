"""The end of a choice: the test set, the run folder of the chosen model, the report."""

import copy
import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funcloss._files import replacing, write_text
from funcloss._json import jsonable
from funcloss.app.audits import RunAudit, about_of, audit_training
from funcloss.app.data import get_batch
from funcloss.app.options import AuditOptions
from funcloss.app.report.choice import Choice, Row
from funcloss.app.report.choice_figures import frontier, placed
from funcloss.app.report.choice_page import render_choice_page
from funcloss.app.report.run_figures import save_figure
from funcloss.app.runs.evaluation import (
    deployment_prior,
    evaluate,
    rule_fits,
    with_fitted_rule,
)
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.setup import Setup, make_optimizer
from funcloss.app.sweep.tested import row_of
from funcloss.app.sweep.words import tested_sentences
from funcloss.constraints.ascent import decision_weights
from funcloss.constraints.limits import Limit, limit_text, reached
from funcloss.decisions import Costs, DecisionScores, Evaluation, log_posterior
from funcloss.errors import AuditError
from funcloss.objectives import make_forward, supervised
from funcloss.sensitivity import cost_gradient, mean_expected_cost
from funcloss.training import TrainState, epoch_order, make_train_step
from funcloss.typing import Hyper

_HORIZON = 5  # steps of the cost gradient
_BATCH, _VALIDATION = 128, 1000  # examples of each step, and of what it is judged by


def judged(setup: Setup, model: TrainedModel) -> dict[str, Evaluation]:
    """Evaluate a model on validation and test set: here the test set is read.

    Args:
        setup: The training that made the model.
        model: The model.

    Returns:
        The evaluations, the temperature fitted on validation data.
    """
    return with_fitted_rule(model, evaluate(model, setup.dataset, ("validation", "test")))


class Tested(NamedTuple):
    """What the test set says of the chosen model, beside what is cheaper."""

    rows: tuple[Row, ...]
    lines: tuple[str, ...]  # in plain words


def on_test(
    setup: Setup,
    plain: Sequence[Mapping[str, Evaluation]],
    chosen: Sequence[Mapping[str, Evaluation]] | None,
    name: str,
    limits: Sequence[Limit],
    focus: Sequence[int],
    *,
    plain_name: str = "plain",
) -> Tested:
    """Return the chosen model beside plain training and what needs no training at all.

    Args:
        setup: The training of the chosen model.
        plain: Plain training, one a seed.
        chosen: The chosen model, one a seed; None: it is plain training.
        name: What it is called.
        limits: What has to hold.
        focus: Classes whose recall is told.
        plain_name: What plain training is called; that of another model that stands in for it.

    Returns:
        Rows of plain training by argmax, by minimum expected cost and, under limits, by moved
        thresholds; then of the chosen model by argmax and, where its loss makes probabilities of
        logits, by minimum expected cost.
    """
    labels, costs = setup.dataset.test.labels.cpu(), setup.costs
    rule = "minimum expected cost"
    base = [j["test"].argmax for j in plain]
    scores = {plain_name: base, f"{plain_name}, {rule}": [j["test"].min_cost for j in plain]}
    if limits:
        scores[f"{plain_name}, thresholds moved"] = [_moved(setup, j, limits) for j in plain]
    cheap = list(scores)[-1]
    best = base
    if chosen is not None:
        best = scores[name] = [j["test"].argmax for j in chosen]
        if rule_fits(setup.config):
            scores[f"{name}, {rule}"] = [j["test"].min_cost for j in chosen]
    compare = partial(
        row_of,
        evaluation=plain[0]["test"],
        labels=labels,
        focus=focus,
        known_prior=bool(setup.config.prior),
    )
    rows = {
        title: compare(title, found, plain=None if title == plain_name else base)
        for title, found in scores.items()
    }
    gap = compare(name, best, plain=scores[cheap]).difference if chosen is not None else None
    names = [costs.classes[c] for c in focus]
    reaches = zip(*(reached(limits, s) for s in best), strict=True)
    texts = [limit_text(limit, costs.classes) for limit in limits]
    held_out = [(text, sum(v) / len(v)) for text, v in zip(texts, reaches, strict=True)]
    trained = None if chosen is None else rows[name]
    lines = tested_sentences(rows[plain_name], trained, rows[cheap], gap, held_out, names)
    return Tested(tuple(rows.values()), tuple(lines))


def _moved(
    setup: Setup, plain: Mapping[str, Evaluation], limits: Sequence[Limit]
) -> DecisionScores:
    """Move the thresholds of plain training to the limits on validation, and judge the test."""
    held_out, test = plain["validation"], plain["test"]

    log_probs = log_posterior(held_out.logits)
    log_weights, _ = decision_weights(log_probs, limits, setup.costs, held_out.scored)
    return test.scored((log_posterior(test.logits) + log_weights).argmax(-1))


def focus_of(
    costs: Costs, limits: Sequence[Limit], swept: Sequence[str], most: int = 3
) -> list[int]:
    """Return the classes that a report speaks of: limited, swept, dearest, else the last.

    Args:
        costs: What decisions cost.
        limits: What has to hold.
        swept: Classes whose weight is swept.
        most: How many at most.

    Returns:
        Indices of classes, at least one.
    """
    named = [limit.truth for limit in limits if limit.truth >= 0]
    named += [costs.classes.index(name) for name in swept]
    rows = costs.matrix.clamp(min=0).sum(1)
    if not named and float(rows.max()) > float(rows.min()):
        named.append(int(rows.argmax()))
    return list(dict.fromkeys(named or [len(costs.classes) - 1]))[:most]


def gradient_of(setup: Setup, state: TrainState, hyper: Hyper) -> tuple[dict[str, float], int]:
    """Return what one more unit of each class's weight would do to the validation cost.

    Through five further steps at the peak learning rate, on a part of the validation data.

    Args:
        setup: The training of the state.
        state: Where the steps begin.
        hyper: What they are given.

    Returns:
        Changes of the expected cost by class, and over how many steps; none where there are no
        class weights.
    """
    if "class_weights" not in hyper or setup.costs.extra:
        return {}, 0
    dataset, config, device = setup.dataset, setup.config, state.key.device
    step = make_train_step(
        supervised(setup.model, setup.criterion), make_optimizer(config), clip_norm=config.clip_norm
    )
    order = epoch_order(state.key, 0, len(dataset.train.labels)).to(device)
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
        make_forward(copy.deepcopy(setup.model).eval()),
        batch.inputs,
        batch.targets,
        setup.costs.matrix.float().to(device),
        sample_weights=weights,
    )
    batches = [get_batch(dataset, dataset.train, piece) for piece in pieces]
    found = cost_gradient(step, state, batches, cost, hyper)
    return dict(zip(dataset.classes, found.gradient.tolist(), strict=True)), len(batches)


def write_choice(choice: Choice, out: Path, run_dir: Path, setup: Setup, page: str) -> list[Path]:
    """Write the page, the frontier, the table and the numbers of a choice.

    Args:
        choice: The choice.
        out: The folder.
        run_dir: The run folder of the chosen model, which is audited.
        setup: Its training.
        page: Name of the page, ``sweep.html`` say.

    Returns:
        The files, the page first.

    Raises:
        RunError: one cannot be written; what was there is as it was.
    """
    audited = _audited(run_dir, setup)
    if audited is None:
        n = len(setup.dataset.train.labels)
        about, found = about_of(setup, choice.title, AuditOptions(), examples=n), None
        more: dict[str, Any] = {}
    else:
        found, about = audited.audit, dataclasses.replace(audited.about, title=choice.title)
        more = {"history": audited.history, "pictures": audited.pictures}
    stem = Path(page).stem
    write_text(out / page, render_choice_page(choice, found, about, **more))
    files = [out / page, out / f"{stem}.json"]
    if choice.points:
        files.append(out / f"{stem}.csv")
        _write_points(files[-1], choice)
    if len(placed(choice)) > 1:
        files.append(out / "frontier.png")
        save_figure(frontier(choice), files[-1])
    # Last: it is the sign that all of it is there.
    text = json.dumps(jsonable(choice), indent=2, allow_nan=False)
    write_text(files[1], text + "\n")
    return files


def _write_points(path: Path, choice: Choice) -> None:
    names = [*choice.axes, "accuracy", "expected_cost", "rule_cost"]
    names += [f"recall {name}" for name in choice.focus]
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        spread = [part for name in names[len(choice.axes) :] for part in (name, "low", "high")]
        writer.writerow((*choice.axes, *spread, "feasible", "chosen", "plain", "diverged", "seeds"))
        for p in choice.points:
            scores = (p.accuracy, p.expected_cost, p.rule_cost, *p.recall)
            values = [p.values.get(axis, "") for axis in choice.axes]
            numbers = [f"{v:.6g}" for score in scores for v in score]
            writer.writerow((*values, *numbers, p.feasible, p.chosen, p.plain, p.diverged, p.seeds))


def _audited(run_dir: Path, setup: Setup) -> RunAudit | None:
    try:
        return audit_training(run_dir, setup)
    except AuditError:  # the page says what was chosen all the same
        return None
