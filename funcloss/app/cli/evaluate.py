"""``funcloss evaluate``: a run's model on any data set, and what its decisions cost."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funcloss.app.cli.output import say
from funcloss.app.cli.table import given_of, parsed, with_table
from funcloss.app.cli.tables import between, make_console, make_table, number
from funcloss.app.config import fields
from funcloss.app.options import EvaluateOptions

if TYPE_CHECKING:  # they load torch
    from rich.table import Table

    from funcloss.app.runs import EvaluationReport
    from funcloss.decisions import CostCurve, Costs, DecisionScores, Metrics, Sensitivity

_SQUARE = 20  # decisions in a printed matrix


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    *,
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Write a row per example: label, decision, all probabilities and expected costs."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all scores, matrices included.")] = None,
    **typed: Any,
) -> None:
    """Evaluate a run's model, class by class, and report what its decisions cost.

    Twice: the most probable class, and the decision of minimum expected cost. Costs, temperature
    and prior are those kept in the run, unless others are given here.
    """
    options = EvaluateOptions(**parsed(given_of(typed), fields(EvaluateOptions)))

    from funcloss.app import runs

    found = runs.evaluate_run(run, options)
    if csv is not None:
        runs.write_evaluated(csv, found)
    if json is not None:
        runs.write_evaluation(json, found)
    _print_evaluation(found)
    scores = found.evaluation
    say(
        f"accuracy {scores.argmax.accuracy.value:.2%}  loss {scores.loss:.4f}  "
        f"on {len(scores.labels) // scores.repeats:,} examples of {found.dataset}, {found.split}"
    )
    if found.note:
        say(f"note: {found.note}")


def _print_evaluation(found: "EvaluationReport") -> None:
    """Print what a model's decisions cost, by rule, class by class and pair by pair."""
    from funcloss.decisions import cost_sentences, decision_sentences

    out, scored, costs = make_console(), found.evaluation, found.evaluation.rule.costs
    for line in cost_sentences(costs):
        out.print(f"cost: {line}")
    for line in decision_sentences(costs):
        out.print(f"decision: {line}")
    out.print(f"calibration: {found.calibration.sentence}")
    out.print(
        f"calibration error here: {scored.calibration_error:.4f} of the softmax, "
        f"{scored.calibrated_error:.4f} of the probabilities in use"
    )
    for line in _metric_lines(scored.metrics):
        out.print(line)
    if (curve := scored.curve) is not None:
        out.print()
        out.print(
            f"expected cost {curve.cost:.4f} at the threshold {curve.threshold:.3g} of "
            f"{curve.positive}; the least on these examples is {curve.lowest[1]:.4f}, at "
            f"{curve.lowest[0]:.3g}"
        )
        out.print(_sensitivity_table(scored.sensitivity, curve))
    for name, scores in scored.rules.items():
        out.print()
        out.print(_rule_line(name, scores))
        out.print(_class_table(scores, costs.classes))
        if len(costs.decisions) <= _SQUARE:
            for title, matrix in (("counts", scores.confusion), ("cost", scores.cost)):
                out.print(_matrix_table(f"{title}, rows the truth", matrix, costs))


def _metric_lines(found: "Metrics") -> list[str]:
    """Return the metrics of the probabilities that the rule of minimum expected cost decides by."""
    auc, precision = number(found.mean_auc, ".4f"), number(found.mean_average_precision, ".4f")
    return [
        f"AUC {auc}, average precision {precision} (one class against the rest, class mean)",
        f"log score {number(found.log_score, '.4f')} nats per example, "
        f"Brier score {number(found.brier_score, '.4f')} (0 best, 2 worst)",
    ]


def _rule_line(name: str, scores: "DecisionScores") -> str:
    normal = number(scores.normalised_cost, ".3f")
    compared = "" if normal == "-" else f", {normal} of the best constant decision"
    return (
        f"decisions by {name}: accuracy {between(scores.accuracy, '.2%')}, "
        f"balanced accuracy {scores.balanced_accuracy:.2%}, macro F1 {scores.macro_f1:.4f}, "
        f"expected cost {between(scores.expected_cost, '.4f')}{compared}"
    )


def _sensitivity_table(rows: "list[Sensitivity]", curve: "CostCurve") -> "Table":
    head = (f"missing {curve.positive} costs", "right threshold", "expected cost at it")
    cells = (
        (f"{r.factor:g} x", f"{r.threshold:.3g}", f"{r.right:.4f}", f"{r.kept:.4f}") for r in rows
    )
    return make_table((*head, f"at {curve.threshold:.3g}"), cells)


def _matrix_table(title: str, matrix: Any, costs: "Costs") -> "Table":
    rows = zip(costs.classes, matrix.tolist(), strict=True)
    cells = ((name, *("." if v == 0 else f"{v:g}" for v in row)) for name, row in rows)
    return make_table([title, *costs.decisions], cells)


def _class_table(scores: "DecisionScores", classes: tuple[str, ...]) -> "Table":
    """Return count, recall and precision with their intervals, and F1, a row per class."""
    rows = []
    for c, (name, count) in enumerate(zip(classes, scores.confusion.sum(1).tolist(), strict=True)):
        cells = []
        for value, low, high in (scores.recall, scores.precision):
            share = number(value[c], ".2%")
            cells += [share, "-" if share == "-" else f"{low[c]:.2%} to {high[c]:.2%}"]
        rows.append((name, f"{count:,}", *cells, number(scores.f1[c], ".4f")))
    return make_table(("class", "count", "recall", "95 %", "precision", "95 %", "F1"), rows)


with_table(evaluate, fields(EvaluateOptions))
