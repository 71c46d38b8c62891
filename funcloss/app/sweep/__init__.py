"""Many trainings with different values, one chosen by validation data."""

from funcloss.app.sweep.axes import Axis, parse_values
from funcloss.app.sweep.members import choose_width, init_members, make_groups, make_members_step
from funcloss.app.sweep.run import (
    Chosen,
    resume_sweep,
    resume_under_limits,
    sweep,
    train_under_limits,
)
from funcloss.app.sweep.seeds import SeedReport, SweepStarted

__all__ = [
    "Axis",
    "Chosen",
    "SeedReport",
    "SweepStarted",
    "choose_width",
    "init_members",
    "make_groups",
    "make_members_step",
    "parse_values",
    "resume_sweep",
    "resume_under_limits",
    "sweep",
    "train_under_limits",
]
