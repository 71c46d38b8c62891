"""The laws that a loss must keep: one definition, for the tests and for ``funcloss check``."""

from funcloss.laws.adapt import TASKS, Adapted, adapt
from funcloss.laws.case import LossCase
from funcloss.laws.effect import CostEffect, cost_effect
from funcloss.laws.laws import LAWS, Finding, Law, check, try_law
from funcloss.laws.verdict import BATCHES, WORKS, WRONG, Verdict, verdict_of

__all__ = [
    "BATCHES",
    "LAWS",
    "TASKS",
    "WORKS",
    "WRONG",
    "Adapted",
    "CostEffect",
    "Finding",
    "Law",
    "LossCase",
    "Verdict",
    "adapt",
    "check",
    "cost_effect",
    "try_law",
    "verdict_of",
]
