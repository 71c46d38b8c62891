"""The laws that a loss must keep: one definition, for the tests and for ``funcloss check``."""

from funcloss.laws.adapt import TASKS, Adapted, adapt
from funcloss.laws.catalogue import SUBJECTS
from funcloss.laws.effect import CostEffect, cost_effect
from funcloss.laws.laws import LAWS, Finding, Law, check, try_law
from funcloss.laws.subject import Subject

__all__ = [
    "LAWS",
    "SUBJECTS",
    "TASKS",
    "Adapted",
    "CostEffect",
    "Finding",
    "Law",
    "Subject",
    "adapt",
    "check",
    "cost_effect",
    "try_law",
]
