"""Losses for a long tail, each swept over its own parameter on validation data.

Fashion-MNIST, its training part cut to an exponential tail of factor 100; validation and test part
stay even, so that accuracy on them is balanced accuracy. A mistake on one of the three rarest
classes costs 5, any other 1. Each sweep is one of `funcloss sweep`: the trial of least expected
cost on validation data is chosen, and the test set is read once, at the end.

    python scripts/long_tail.py --seeds 3 --out runs/long-tail
"""

import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer

from funcloss.app import sweep
from funcloss.app.config import make_config
from funcloss.app.sweep import Axis

BASE = {
    "dataset": "fashion-mnist",
    "imbalance": 100.0,
    "model": "lenet5",
    "epochs": 10,
    "batch_size": 128,
    "learning_rate": 0.002,
    "schedule": "one-cycle",
    "optimizer": "adam",
    "betas": [0.9, 0.999],
    "class_cost": {"7": 5.0, "8": 5.0, "9": 5.0},
    "audit_every": 0,
}
SWEEPS = {  # loss, what is swept, fixed options
    "class-weighted": ("class_balanced", {"beta": (0.9, 0.99, 0.999, 0.9999)}, {}),
    "focal": ("softmax_focal", {"gamma": (0.5, 1.0, 2.0, 4.0)}, {}),
    "balanced softmax": ("balanced_softmax", {}, {}),
    "logit-adjusted": ("logit_adjusted", {"tau": (0.5, 1.0, 1.5, 2.0)}, {}),
    "LDAM": ("ldam", {"max_margin": (0.5, 1.0, 2.0)}, {"scale": 3.0}),
    "VS": ("vector_scaling", {"gamma": (0.05, 0.2), "tau": (0.75, 1.25)}, {}),
}


def main(
    seeds: Annotated[int, typer.Option(help="Seeds of each trial.")] = 3,
    epochs: Annotated[int, typer.Option(help="Epochs of each training.")] = 10,
    only: Annotated[str, typer.Option(help="One loss of the table; empty: all.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the sweeps.")] = Path("runs/long-tail"),
) -> None:
    """Sweep each loss and print a table of the chosen trials on the test set."""
    choices = {
        name: _swept(loss, axes, fixed, seeds, epochs, out / loss)
        for name, (loss, axes, fixed) in SWEEPS.items()
        if only in ("", name)
    }
    print(
        "| loss | chosen on validation | balanced accuracy | expected cost | less plain, paired |"
    )
    print("|---|---|---|---|---|")
    first = next(iter(choices.values()))
    _print("plain", "-", first["rows"][0])
    _print("plain, minimum expected cost", "-", first["rows"][1])
    for name, choice in choices.items():
        chosen = next(p for p in choice["points"] if p["chosen"])
        _print(name, chosen["name"], choice["rows"][2])
        _print(f"{name}, minimum expected cost", "the same", choice["rows"][3])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")


def _swept(
    loss: str,
    axes: dict[str, tuple[float, ...]],
    fixed: dict[str, float],
    seeds: int,
    epochs: int,
    folder: Path,
) -> dict:
    """Sweep a loss, or go on with its sweep, and return the choice."""
    if not (folder / "sweep.json").exists():
        if (folder / "sweep.toml").exists():
            sweep.sweep(sweep.read_spec(folder), folder, resume=True)
        else:
            swept = [Axis("loss_option", key, values) for key, values in axes.items()]
            # Without a parameter of its own, only how fast it learns is left to choose.
            swept = swept or [Axis("learning_rate", "", (0.001, 0.002))]
            options = {"loss": loss, "loss_option": fixed, "epochs": epochs}
            spec = sweep.SweepSpec(make_config(BASE, options), swept, seeds)
            sweep.sweep(spec, folder)
        print(f"{loss} is swept", flush=True)
    return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))


def _print(name: str, chosen: str, row: dict) -> None:
    accuracy = _told(row["accuracy"], 100, ".1f")
    cost = _told(row["expected_cost"], 1, ".3f")
    difference = _told(row["difference"], 1, "+.3f") if row["difference"] else "-"
    print(f"| {name} | {chosen} | {accuracy} | {cost} | {difference} |")


def _told(score: dict, factor: float, form: str) -> str:
    value, low, high = (factor * score[key] for key in ("value", "low", "high"))
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


if __name__ == "__main__":
    typer.run(main)
