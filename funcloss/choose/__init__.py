"""Choosing the costs: from what mistakes cost, or a recall that must be reached, to a training."""

from funcloss.choose.axes import Axis, parse_values
from funcloss.choose.floors import steer_by_limits
from funcloss.choose.gradient import (
    CostGradient,
    cost_gradient,
    gradient_sentences,
    mean_expected_cost,
    unrolled_cost,
)
from funcloss.choose.members import choose_width, init_members, make_groups, make_members_step
from funcloss.choose.page import render_choice, render_choice_page
from funcloss.choose.result import Ascent, Choice, Limit, Point, Row, Score
from funcloss.choose.run import (
    Chosen,
    resume_sweep,
    resume_under_limits,
    sweep,
    train_under_limits,
)
from funcloss.choose.seeds import SeedReport, SweepStarted

__all__ = [
    "Ascent",
    "Axis",
    "Choice",
    "Chosen",
    "CostGradient",
    "Limit",
    "Point",
    "Row",
    "Score",
    "SeedReport",
    "SweepStarted",
    "choose_width",
    "cost_gradient",
    "gradient_sentences",
    "init_members",
    "make_groups",
    "make_members_step",
    "mean_expected_cost",
    "parse_values",
    "render_choice",
    "render_choice_page",
    "resume_sweep",
    "resume_under_limits",
    "steer_by_limits",
    "sweep",
    "train_under_limits",
    "unrolled_cost",
]
