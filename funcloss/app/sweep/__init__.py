"""Many trainings with different values, one chosen by validation data."""

from funcloss.app.sweep.axes import Axis, parse_values
from funcloss.app.sweep.plan import SweepSpec, read_spec
from funcloss.app.sweep.run import sweep
from funcloss.app.sweep.seeds import SeedReport, SweepStarted
from funcloss.app.sweep.trials import choose_vmap_size, init_trials, make_groups, make_trials_step

__all__ = [
    "Axis",
    "SeedReport",
    "SweepSpec",
    "SweepStarted",
    "choose_vmap_size",
    "init_trials",
    "make_groups",
    "make_trials_step",
    "parse_values",
    "read_spec",
    "sweep",
]
