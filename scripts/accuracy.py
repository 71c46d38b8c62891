"""Test accuracy of the recipes over several seeds: the table in the README.

    python scripts/accuracy.py --recipe article=3 --recipe lenet5-fashion=3 --recipe fast=10

Every seed is a run of its own under ``--runs``, made by what ``funcloss-train`` calls; finished
ones are read, not trained again.
"""

import json
import platform
import statistics
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from funcloss.app.config import make_config, read_recipe
from funcloss.app.train import train


def main(
    recipe: Annotated[list[str], typer.Option(help="RECIPE=SEEDS, repeatable.")],
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/accuracy"),
    compile: Annotated[str, typer.Option(help="auto, on or off.")] = "auto",
) -> None:
    """Train each recipe with seeds 0, 1, ... and print mean, spread and training time."""
    table = Table("recipe", "seeds", "test accuracy, mean ± sd", "lowest", "median training s")
    results = {}
    for text in recipe:
        name, _, seeds = text.partition("=")
        summaries = [
            _run(name, seed, runs / f"{name}-{seed}", compile) for seed in range(int(seeds))
        ]
        scores = [s["test"]["rules"]["argmax"]["accuracy"][0] for s in summaries]
        seconds = [s["train_seconds"] for s in summaries]
        spread = statistics.stdev(scores) if len(scores) > 1 else float("nan")
        results[name] = {"accuracy": scores, "seconds": seconds}
        table.add_row(
            name,
            seeds,
            f"{statistics.mean(scores):.4f} ± {spread:.4f}",
            f"{min(scores):.4f}",
            f"{statistics.median(seconds):.1f}",
        )
    Console().print(table)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.platform()}")
    (runs / "accuracy.json").write_text(json.dumps(results, indent=2) + "\n")


def _run(recipe: str, seed: int, folder: Path, compile: str) -> dict:
    if (folder / "summary.json").exists():
        return json.loads((folder / "summary.json").read_text())
    options = read_recipe(recipe) | {"seed": seed, "compile": compile}
    outcome = train(make_config(options), folder)
    accuracy = outcome.summary["test"]["rules"]["argmax"]["accuracy"][0]
    print(f"{folder}: test accuracy {accuracy:.4f}", flush=True)
    return outcome.summary


if __name__ == "__main__":
    typer.run(main)
