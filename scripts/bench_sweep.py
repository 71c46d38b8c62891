"""Sixteen trials of a sweep against sixteen separate trainings, in one process.

Both take the same steps on the same data: the sweep as `funcloss sweep` runs it (trials in one
program, or in a loop if the model has convolutions and the device is not CUDA; the examples of a
step read once), the separate trainings one after another as `funcloss-train` runs them. A round
times a few steps of each in turn; the ratio is the median over the rounds of that within a round.

    python scripts/bench_sweep.py --model linear --model mlp --model article-cnn
"""

import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from funcloss.app.config import make_config
from funcloss.app.data import get_batch
from funcloss.app.runs.setup import make_setup
from funcloss.app.sweep import choose_vmap_size, init_trials, make_groups, make_trials_step
from funcloss.training.loop import epoch_order


def main(
    model: Annotated[list[str], typer.Option(help="Networks, repeatable.")] = [  # noqa: B006
        "linear",
        "mlp",
        "article-cnn",
        "fast-cnn",
    ],
    trials: Annotated[int, typer.Option(help="Trials of the sweep.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 15,
    steps: Annotated[int, typer.Option(help="Steps of each in a round.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = 128,
    dataset: Annotated[str, typer.Option(help="Data set.")] = "mnist",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Print the time of a sweep's steps over that of the same trainings apart."""
    table = Table("model", "the sweep runs", "sweep, ms a step", "separate, ms", "ratio", "spread")
    found = {}
    for name in model:
        row = _measured(name, trials, rounds, steps, batch_size, dataset, device)
        found[name] = row
        low, high = min(row["ratios"]), max(row["ratios"])
        table.add_row(
            name,
            row["width"],
            f"{1e3 * row['sweep']:.1f}",
            f"{1e3 * row['separate']:.1f}",
            f"{row['ratio']:.2f}",
            f"{low:.2f} to {high:.2f}",
        )
    Console(width=120).print(table)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    print(
        f"{trials} trials, batches of {batch_size}, {rounds} rounds of {steps} steps; torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads, {where or platform.machine()}"
    )
    if out is not None:
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _measured(
    name: str, trials: int, rounds: int, steps: int, batch_size: int, dataset: str, device: str
) -> dict:
    options = {"model": name, "dataset": dataset, "batch_size": batch_size, "device": device}
    setup = make_setup(make_config(options, {"class_weight": {"9": 1.0}}))
    weights = torch.ones(trials, 10, device=setup.config.device)
    weights[:, 9] = torch.logspace(0, 2, trials)
    hypers = [setup.hyper | {"class_weights": row} for row in weights]
    order = epoch_order(setup.state.key, 0, len(setup.dataset.train.labels))
    indices = order.to(setup.config.device).split(batch_size)[:steps]
    batch_at = partial(get_batch, setup.dataset, setup.dataset.train)
    vmap = choose_vmap_size(setup.model, trials)
    groups = make_groups(setup.train_step, hypers, vmap.size)
    step_on = make_trials_step(groups)
    together = init_trials(setup.state, groups)
    apart = [setup.state] * trials

    def sweep() -> None:
        nonlocal together
        for index in indices:
            together, metrics = step_on(together, batch_at(index))
        float(metrics["loss"])  # waits for the device

    def separate() -> None:
        for number, hyper in enumerate(hypers):
            for index in indices:
                apart[number], metrics = setup.train_step(apart[number], batch_at(index), hyper)
        float(metrics["loss"])

    times: dict[str, list[float]] = {"sweep": [], "separate": []}
    for _ in range(1 + rounds):
        for run in (sweep, separate):
            began = time.perf_counter()
            run()
            times[run.__name__].append((time.perf_counter() - began) / steps)
    ratios = [a / b for a, b in zip(times["sweep"][1:], times["separate"][1:], strict=True)]
    return {
        "width": "a loop" if vmap.size == 1 else "one program",
        "sweep": statistics.median(times["sweep"][1:]),
        "separate": statistics.median(times["separate"][1:]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "note": vmap.note,
    }


if __name__ == "__main__":
    typer.run(main)
