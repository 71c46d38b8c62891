"""A floor on the recall of one class: reached on how many seeds, and at what price.

Trains each seed under the floor, plainly, and with the loss that the costly-nine tutorial meant
(class weight 2), and reads the test set at the end: recall of the class, accuracy, and those of
plain training with its thresholds moved on validation data, which needs no training. With a cost of
each class alone, moved thresholds are the decisions of minimum expected cost.

    python scripts/floors.py --recipe article --floor 9=0.99 --seeds 5
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch

from funcloss.app import runs
from funcloss.app.config import make_config, read_recipe
from funcloss.app.train import train
from funcloss.decisions import seed_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="article")
    parser.add_argument("--floor", default="9=0.99")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=0, help="0: as the recipe has them")
    parser.add_argument("--json", type=Path, help="write each seed's numbers")
    asked = parser.parse_args()
    name, _, bound = asked.floor.partition("=")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    rows: dict[str, list[tuple[float, float]]] = {}
    reached, seeds = [], []
    for seed in range(asked.seeds):
        options = read_recipe(asked.recipe) | {"seed": seed, "val_fraction": 0.1, "audit_every": 0}
        options |= {"epochs": asked.epochs} if asked.epochs else {}
        with tempfile.TemporaryDirectory() as scratch:
            config = make_config(options, {"floor": {name: float(bound)}})
            found = train(config, Path(scratch) / "floor").choice
            meant = make_config(options, {"class_weight": {name: 2.0}})
            twice = runs.run(meant, Path(scratch) / "meant", test_once=True).summary["test"]
        assert found is not None
        here = {row.name: (row.recall[0].value, row.accuracy.value) for row in found.rows}
        argmax = twice["rules"]["argmax"]
        meant_scores = (argmax["recall"][name][0], argmax["accuracy"][0])
        here["class weight 2, the loss that was meant"] = meant_scores
        reached.append(found.constraints[0])
        weights = next(a.weights for a in reversed(found.ascent))
        print(f"seed {seed}: {found.lines[0]} last weights {weights}", flush=True)
        seeds.append(
            {"seed": seed, "validation": found.constraints[0].reached, "lines": found.lines}
        )
        for title, numbers in here.items():
            rows.setdefault(title, []).append(numbers)
        seeds[-1]["test"] = here
    held = sum(constraint.held for constraint in reached)
    print(f"{reached[0].text} on validation data: {held} of {asked.seeds} seeds")
    print(
        f"| on the test set, mean over seeds [95 %] | recall of {name} | accuracy |\n|---|---|---|"
    )
    for title, numbers in rows.items():
        cells = [seed_interval([pair[k] for pair in numbers], within=(0.0, 1.0)) for k in (0, 1)]
        told = (f"{100 * v:.2f} [{100 * low:.2f}, {100 * high:.2f}]" for v, low, high in cells)
        print(f"| {title} | {' | '.join(told)} |")
    if asked.json:
        asked.json.write_text(json.dumps(seeds, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
