"""The baseline of a run: the same training with all class weights 1 and no cost in the loss.

It has the run's seed, so its first weights, batches and masks too: the two are paired.
"""

from dataclasses import fields, replace
from pathlib import Path

from funcloss._folders import holding
from funcloss.app.config import TrainConfig, code_in, option_values, plain_config
from funcloss.app.runs import folder
from funcloss.app.runs.events import Note, Watcher
from funcloss.app.runs.lifecycle import Outcome, run
from funcloss.errors import RunError

PLAIN = "plain"  # the folder of a baseline, in that of its run
# Options that change neither the state before the first step nor any step after it, but by rounding
# (or, of floors, that a baseline has none of).
_APART = {
    *("data_dir", "stream", "workers", "device", "threads", "compile", "check"),
    *("log_every", "audit_every", "ledger", "ledger_layers", "tensorboard", "floor_every"),
}


def trained(config: TrainConfig, run_dir: Path, watcher: Watcher, *, note: str) -> Outcome:
    """Train a run that belongs to another, or go on with it, if that is not done.

    Args:
        config: Its configuration.
        run_dir: Its folder, in that of the other.
        watcher: Its callbacks.
        note: What is shown before it trains.

    Returns:
        The run, finished or told to stop.

    Raises:
        RunError: the folder holds another training.
    """
    there = (run_dir / folder.CONFIG).is_file()
    if there and (others := differing(config, run_dir)):
        raise RunError(
            f"{run_dir} holds another training (other options: {', '.join(others)}): remove it, "
            "then try again"
        )
    if (summary := folder.read_summary(run_dir)) is not None:
        return Outcome(run_dir, True, config, summary)
    watcher.show(Note(f"{note} into {run_dir}"))
    # What the nested folder names is not looked at: it is the training that was asked for.
    return run(config, run_dir, resume=there, test_once=True, watcher=watcher)


def differing(config: TrainConfig, run_dir: Path) -> list[str]:
    """Return the options by which the training of a folder is not that of a configuration.

    Raises:
        RunError: the folder's configuration cannot be read.
    """
    # Nothing is imported here, and what names code is not looked at.
    kept = folder.read_config(run_dir, used=())
    apart = {*_APART, "refused_code", *code_in(option_values(kept))}
    names = [field.name for field in fields(config) if field.name not in apart]
    return [name for name in names if getattr(config, name) != getattr(kept, name)]


def seed_dir(run_dir: Path, seed: int) -> Path:
    """Return the folder of the same training with another seed, in that of a run."""
    return run_dir / f"seed-{seed}"


def train_pairs(config: TrainConfig, run_dir: Path, seeds: int, watcher: Watcher) -> bool:
    """Train the baseline of a run, and run and baseline again with each of the seeds after its own.

    Args:
        config: The configuration of the run.
        run_dir: Its folder; it is finished.
        seeds: Pairs of a run and its baseline, this run's among them.
        watcher: Its callbacks.

    Returns:
        Whether all are trained; False if it was told to stop.

    Raises:
        ConfigError: a folder that is needed holds something else.
        DataError: the data cannot be had.
        RunError: a folder cannot be written, or holds another training.
    """
    with holding(run_dir):
        for seed in range(config.seed, config.seed + seeds):
            own, place = replace(config, seed=seed), run_dir
            if seed != config.seed:
                place = seed_dir(run_dir, seed)
                note = f"training the run with seed {seed}"
                if not trained(own, place, watcher, note=note).finished:
                    return False
            note = f"training the baseline of seed {seed}, all class weights 1,"
            if not trained(plain_config(own), place / PLAIN, watcher, note=note).finished:
                return False
    return True
