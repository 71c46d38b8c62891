"""Decisions and what they cost: cost matrices, decision rules, and honest scores of both."""

from funcloss.decisions.cost_file import read_cost_matrix
from funcloss.decisions.costs import Costs, class_index, cost_cell, cost_sentences, make_costs
from funcloss.decisions.evaluation import DecisionScores, Evaluation, calibration_error, score
from funcloss.decisions.intervals import Interval, mean_interval, seed_interval, student, wilson
from funcloss.decisions.rules import (
    DecisionRule,
    expected_costs,
    fit_temperature,
    log_posterior,
    min_cost_decisions,
    posterior_shift,
)

__all__ = [
    "Costs",
    "DecisionRule",
    "DecisionScores",
    "Evaluation",
    "Interval",
    "calibration_error",
    "class_index",
    "cost_cell",
    "cost_sentences",
    "expected_costs",
    "fit_temperature",
    "log_posterior",
    "make_costs",
    "mean_interval",
    "min_cost_decisions",
    "posterior_shift",
    "read_cost_matrix",
    "score",
    "seed_interval",
    "student",
    "wilson",
]
