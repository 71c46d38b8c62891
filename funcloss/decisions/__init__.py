"""Decisions and what they cost: cost matrices, decision rules, and honest scores of both."""

from funcloss.decisions.calibration import Calibration, calibrate, class_frequencies
from funcloss.decisions.cost_file import read_cost_matrix
from funcloss.decisions.costs import Costs, class_index, cost_cell, cost_sentences, make_costs
from funcloss.decisions.evaluation import DecisionScores, Evaluation, calibration_error, score
from funcloss.decisions.intervals import (
    Interval,
    cost_interval,
    fold_interval,
    mean_interval,
    paired_interval,
    part_interval,
    seed_interval,
    student,
    widened_by_seeds,
    wilson,
)
from funcloss.decisions.metrics import Metrics, Reliability, make_metrics, reliability
from funcloss.decisions.rules import (
    RULES,
    DecisionRule,
    Decisions,
    expected_costs,
    fit_temperature,
    log_posterior,
    min_cost_decisions,
    posterior_shift,
)
from funcloss.decisions.thresholds import (
    CostCurve,
    Sensitivity,
    Threshold,
    cost_curve,
    decision_sentences,
    pair_thresholds,
    ratio_sensitivity,
)

__all__ = [
    "RULES",
    "Calibration",
    "CostCurve",
    "Costs",
    "DecisionRule",
    "DecisionScores",
    "Decisions",
    "Evaluation",
    "Interval",
    "Metrics",
    "Reliability",
    "Sensitivity",
    "Threshold",
    "calibrate",
    "calibration_error",
    "class_frequencies",
    "class_index",
    "cost_cell",
    "cost_curve",
    "cost_interval",
    "cost_sentences",
    "decision_sentences",
    "expected_costs",
    "fit_temperature",
    "fold_interval",
    "log_posterior",
    "make_costs",
    "make_metrics",
    "mean_interval",
    "min_cost_decisions",
    "pair_thresholds",
    "paired_interval",
    "part_interval",
    "posterior_shift",
    "ratio_sensitivity",
    "read_cost_matrix",
    "reliability",
    "score",
    "seed_interval",
    "student",
    "widened_by_seeds",
    "wilson",
]
