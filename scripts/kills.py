"""Kill commands at random moments, go on with them, and compare with the same left alone.

    python scripts/kills.py --kills 100 --json kills.json

Five commands: a training, one that stops early, one with folds, one under a floor (with its
baseline and its report), and a sweep. Each is killed by signal 9 at a moment drawn from a seed, and
taken up until it ends, or begun again where nothing was left of it. Then

- the model, and the trials of a sweep, have the same bits as those of the command that nobody
  killed; the log has the same lines, but for seconds;
- nothing is left over: the folder has the same files.

Each command runs in a process of its own, forked from one in which all is imported.
"""

import csv
import dataclasses
import hashlib
import json
import random
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from hostile import forked  # beside this script

DATA = ("--dataset", "rows.csv", "--target", "y", "--model", "linear", "--batch-size", "8")
DATA += ("--device", "cpu", "--threads", "1", "--compile", "off")
COMMANDS = {
    "training": ("train", *DATA, "--epochs", "12"),
    "early": ("train", *DATA, "--epochs", "auto"),
    "folds": ("train", *DATA, "--epochs", "4", "--folds", "4"),
    "floor": ("train", *DATA, "--epochs", "4", "--floor", "1=0.6"),
    "sweep": ("sweep", *DATA, "--epochs", "4", "--class-weight", "1=1,3", "--seeds", "2"),
}
SECONDS = 120  # that a command may take


@dataclass(frozen=True)
class Outcome:
    """What became of a command that was killed."""

    name: str
    after: float  # seconds
    resumed: str  # "ended before", "taken up", "begun again"
    wrong: str  # empty: nothing


def placed(name: str) -> tuple[str, ...]:
    """Return a command with its folder."""
    option = "--out" if name == "sweep" else "--run-dir"
    return (*COMMANDS[name], option, "run")


def state(run: Path) -> dict[str, str]:
    """Return what must be the same of a folder: its files, and the content of some."""
    found = {}
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        found[name] = ""
        if path.suffix == ".safetensors" and "checkpoint" not in path.name:
            found[name] = hashlib.md5(path.read_bytes()).hexdigest()
        elif path.suffix in (".jsonl", ".csv"):
            text = re.sub(r'"(seconds|images_per_second)": [\d.e+-]+', "", path.read_text())
            found[name] = hashlib.md5(text.encode()).hexdigest()
    return found


def killed(name: str, whole: dict[str, str], seconds: float, work: Path, draw: float) -> Outcome:
    """Kill a command once, go on until it ends, and compare."""
    after, run = draw * seconds, work / "run"
    shutil.rmtree(run, ignore_errors=True)
    code, *_ = forked(placed(name), work, after)
    resumed, said = "ended before", ""
    if code:
        there = (run / ("sweep.toml" if name == "sweep" else "config.toml")).exists()
        resumed = "taken up" if there else "begun again"
        again = (COMMANDS[name][0], "--resume", "run") if there else placed(name)
        code, said, *_ = forked(again, work, SECONDS)
    if code and "is finished" not in said:
        return Outcome(name, after, resumed, f"exit code {code}: {said[-300:]}")
    found = state(run)
    names = sorted(n for n in found.keys() | whole.keys() if found.get(n) != whole.get(n))
    left = [p.name for p in work.iterdir() if p.name.startswith(".run")]
    wrong = f"differs in {', '.join(names)}" if names else f"left over {left}" if left else ""
    return Outcome(name, after, resumed, wrong)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    kills: Annotated[int, typer.Option(help="How many, over all commands.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    output: Annotated[Path | None, typer.Option("--json", help="Where the outcomes go.")] = None,
) -> None:
    """Count the commands that end as if nobody had killed them."""
    torch.set_num_threads(1)
    moments, every = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder).resolve()
        rng = random.Random(0)
        with (work / "rows.csv").open("w", newline="") as file:
            rows = [(rng.gauss(i % 2, 1), rng.gauss(0, 1), i % 2) for i in range(160)]
            csv.writer(file).writerows([("a", "b", "y"), *rows])
        for name in COMMANDS:
            code, said, seconds, _ = forked(placed(name), work, SECONDS)
            if code:
                raise SystemExit(f"{name}: {said}")
            whole = state(work / "run")
            for _ in range(kills // len(COMMANDS)):
                every.append(killed(name, whole, seconds, work, moments.random()))
                if every[-1].wrong:
                    print(every[-1])
            shutil.rmtree(work / "run")
    right = sum(not outcome.wrong for outcome in every)
    print(f"{right} of {len(every)} right; {dict(Counter(o.resumed for o in every))}")
    if output is not None:
        output.write_text(json.dumps([dataclasses.asdict(outcome) for outcome in every], indent=1))
    raise typer.Exit(int(right < len(every)))


if __name__ == "__main__":
    app()
