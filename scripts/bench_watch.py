"""Time and memory of a watched step, against the step without the watch.

    python scripts/bench_watch.py
    python scripts/bench_watch.py --only resnet --rounds 21 --json bench_watch.json

Both take turns in one process; a ratio is the median over the turns of the ratio within a turn,
with its quartiles. One class a pass, forward and backward counted 1 and 2, a step with ``C``
classes takes ``(1 + 2 C) / 3`` of a step, before the step itself is split. Memory is the most that
a process of its own holds in a step, measured after five steps; what it holds before torch's
tensors are made is left out.
"""

import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
import typer
from torch import nn

from funcloss.audit import watch


class Case(NamedTuple):
    """A model, what it is fed, and how it is watched."""

    title: str
    make: Callable[[int], nn.Module]
    classes: int
    size: int  # of images
    batch: int = 64
    through: bool = False
    options: dict[str, Any] = {}


def resnet18(classes: int) -> nn.Module:
    return torchvision.models.resnet18(num_classes=classes)


def vit_tiny(classes: int) -> nn.Module:
    """Return the network of ViT-tiny, 5.5 million parameters, for patches of 4 in 32."""
    return torchvision.models.VisionTransformer(32, 4, 12, 3, 192, 768, num_classes=classes)


def mlp(classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, classes)
    )


CASES = {
    "resnet-4": Case("ResNet-18, BatchNorm, 64 of 32x32", resnet18, 4, 32),
    "resnet-4-64": Case("ResNet-18, BatchNorm, 64 of 64x64", resnet18, 4, 64),
    "resnet-10": Case("ResNet-18, BatchNorm, 64 of 32x32", resnet18, 10, 32),
    "resnet-10-every": Case(
        "ResNet-18, BatchNorm, 64 of 32x32, every=20", resnet18, 10, 32, options={"every": 20}
    ),
    "vit-4": Case("ViT-tiny, patches of 4, 16 of 32x32, backward", vit_tiny, 4, 32, 16),
    "vit-4-through": Case(
        "ViT-tiny, patches of 4, 16 of 32x32, through", vit_tiny, 4, 32, 16, True
    ),
    "many": Case(
        "MLP, BatchNorm, 64 of 32x32, memory=256", mlp, 1000, 32, options={"memory": 256.0}
    ),
    "resnet-many": Case(
        "ResNet-18, BatchNorm, 64 of 32x32, memory=256", resnet18, 1000, 32,
        options={"memory": 256.0},
    ),
}  # fmt: skip


def main(
    only: Annotated[str, typer.Option(help=f"Part of a name: {', '.join(CASES)}.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns that each takes.", min=3)] = 9,
    threads: Annotated[int, typer.Option(help="Of torch.", min=1)] = 1,
    out: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time watched steps, and print a table."""
    torch.set_num_threads(threads)
    if memory_of:
        name, watched = memory_of.split("/")
        print(peak(CASES[name], watched == "watched"))
        return
    print(f"{processor()}, threads {threads}, torch {torch.__version__}, float32, {rounds} turns\n")
    print("| model and batch | classes | by passes | time | of it the split | memory | MiB |")
    print("|---|---|---|---|---|---|---|")
    record = []
    for name, case in CASES.items():
        if only not in name:
            continue
        record.append(figures := {"case": name, **timed(case, rounds), **memory(name)})
        print(line_of(case, figures), flush=True)
    if out is not None:
        out.write_text(json.dumps(record, indent=1))


def stepper(case: Case, watched: bool) -> Callable[[], Any]:
    """Return what takes a step, of SGD with momentum; the labels go through all classes."""
    torch.manual_seed(0)
    model = case.make(case.classes).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    beside = watch(model, optimizer, classes=case.classes, **case.options) if watched else None
    images = torch.randn(case.batch, 3, case.size, case.size)
    labels = torch.arange(case.batch) * 7 % case.classes

    def step() -> Any:
        optimizer.zero_grad()
        logits = model(images)
        values = F.cross_entropy(logits, labels, reduction="none")
        if beside is not None and not case.through:
            beside.backward(values, labels)
        else:
            if beside is not None:
                beside.through(logits, labels)
            values.mean().backward()
        began = time.perf_counter()
        optimizer.step()
        return time.perf_counter() - began, beside and beside.found

    return step


def timed(case: Case, rounds: int) -> dict[str, Any]:
    """Return the ratio of times, and the part of it that is in ``optimizer.step()``."""
    plain, watched = stepper(case, False), stepper(case, True)
    many = case.options.get("every", 1)
    for _ in range(2):
        plain(), watched()
    for _ in range(many - 2 if many > 2 else 0):
        watched()  # the next one is audited
    ratios, splits, seconds = [], [], []
    for _ in range(rounds):
        first, _ = lasting(lambda: [plain() for _ in range(many)])
        second, told = lasting(lambda: [watched() for _ in range(many)])
        ratios.append(second / first)
        splits.append(sum(of_step for of_step, _ in told) / first)
        seconds.append(first / many)
        found = told[-1][1]
        if found.note and "memory=" not in found.note:
            raise SystemExit(f"{case.title}: {found.note}")
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": middle,
        "quartiles": [low, high],
        "split": statistics.median(splits),
        "seconds": statistics.median(seconds),
        "rows": int((found.count > 0).sum()),
    }


def lasting(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = call()
    return time.perf_counter() - began, found


def memory(name: str) -> dict[str, float]:
    """Return the most memory of a step in MiB, without and with the watch."""
    most = {}
    for how in ("plain", "watched"):
        command = [sys.executable, __file__, "--memory-of", f"{name}/{how}"]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
        most[how] = float(told.stdout.split()[-1])
    return most


def peak(case: Case, watched: bool) -> float:
    """Return the most memory of a step above that before the model was made, in MiB."""
    F.conv2d(torch.randn(1, 3, 8, 8), torch.randn(3, 3, 3, 3))  # loads code
    before = resident("VmRSS")
    step = stepper(case, watched)
    for _ in range(5):
        step()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high water mark starts again here
    step()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{field}:")[2].split()[0]) / 1024


def line_of(case: Case, figures: dict[str, Any]) -> str:
    low, high = figures["quartiles"]
    every = case.options.get("every", 1)
    passes = (every - 1 + (1 + 2 * figures["rows"]) / 3) / every
    return (
        f"| {case.title} | {case.classes}, {figures['rows']} rows | {passes:.1f} | "
        f"**{figures['ratio']:.2f}** ({low:.2f} to {high:.2f}) of {figures['seconds']:.2f} s | "
        f"{figures['split']:.2f} | {figures['watched'] / figures['plain']:.2f} | "
        f"{figures['plain']:.0f}, {figures['watched']:.0f} |"
    )


def processor() -> str:
    """Return the name of the processor, as Linux has it."""
    info = Path("/proc/cpuinfo")
    names = [s for s in info.read_text().splitlines() if s.startswith("model name")] if (
        info.exists()
    ) else []  # fmt: skip
    return names[0].split(":")[1].strip() if names else platform.processor()


if __name__ == "__main__":
    typer.run(main)
