"""The laws that a loss must keep: one definition, for the tests and for ``funcloss check``."""

from funcloss.laws.adapt import TASKS, Adapted, adapt
from funcloss.laws.case import LossCase
from funcloss.laws.effect import CostEffect, cost_effect
from funcloss.laws.laws import LAWS, Finding, Law, check, try_law

__all__ = [
    "LAWS",
    "TASKS",
    "Adapted",
    "CostEffect",
    "Finding",
    "Law",
    "LossCase",
    "adapt",
    "check",
    "cost_effect",
    "try_law",
]
