"""What it costs to begin: importing, ``--help``, and the memory of a training.

    python scripts/bench_start.py --data-dir DATA

Every figure is of a whole process; the commands take turns, and the table gives medians.
"""

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import funcloss": ["-c", "import funcloss"],
    "import funcloss, its losses": ["-c", "import funcloss; funcloss.losses, funcloss.mean"],
    "funcloss-train --help": ["-m", "funcloss", "train", "--help"],
}


def main(
    data_dir: Annotated[str, typer.Option(help="Folder of MNIST.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns that each command takes.")] = 7,
) -> None:
    """Print a table of start-up times and the peak memory of a default training."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for turn in range(rounds + 1):
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            if turn:  # the first one fills the caches
                times[name].append(time.perf_counter() - began)
    table = Table("command", "median s", "min..max", "/ import torch")
    base = times["import torch"]
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, base, strict=True))
        spread = f"{min(seconds):.2f}..{max(seconds):.2f}"
        table.add_row(name, f"{statistics.median(seconds):.2f}", spread, f"{ratio:.2f}")
    console = Console()
    console.print(table)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "funcloss", "train", "--quiet", "--run-dir", folder]
        if data_dir:
            command += ["--data-dir", data_dir]
        began = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    console.print(f"funcloss-train: {seconds:.1f} s, peak memory {peak * unit / 1e9:.2f} GB")
    console.print(
        f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {platform.platform()}"
    )


if __name__ == "__main__":
    typer.run(main)
