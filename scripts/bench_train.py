"""Seconds of training: the tutorial's loop, a plain loop and ours, interleaved in one process.

    python scripts/bench_train.py --data-dir DATA --json bench_train.json

For each model and batch size it trains the same number of steps with

- tutorial: DataLoader with per-image transforms, module and optimiser, as the tutorials do;
- plain: a plain loop over one tensor on the device, module and optimiser, in our memory layout;
- plain nchw: the same in torch's default layout;
- eager, compiled: our stateless step.

The loops take turns, so that a machine that slows down slows all of them; a ratio is the median
over the rounds of the ratio within a round.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import torchvision
import typer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

from funcloss import losses, optim
from funcloss.app.data import Dataset, LoadOptions, get_batch, load_dataset, moved, normalised
from funcloss.app.registry import MODELS
from funcloss.app.runs.run import folder
from funcloss.objectives import mean_of, supervised
from funcloss.training import epoch_order, init_state, make_train_step

CASES = {  # model, batch size, optimiser
    "article, batch 32": ("article-cnn", 32, "sgd"),
    "article, batch 256": ("article-cnn", 256, "sgd"),
    "fast, batch 256": ("fast-cnn", 256, "adam"),
}


def main(
    data_dir: Annotated[str, typer.Option(help="Folder of MNIST.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Annotated[int, typer.Option(help="Turns that each loop takes.")] = 9,
    steps: Annotated[int, typer.Option(help="Steps a turn at batch 256; more at smaller.")] = 40,
    out: Annotated[Path, typer.Option("--json", help="Where the figures go.")] = Path(
        "bench_train.json"
    ),
) -> None:
    """Time all loops and print a table of medians, spreads and ratios."""
    dataset = moved(load_dataset(LoadOptions("mnist", data_dir, val_fraction=0.0)), device)
    console = Console()
    console.print(f"{platform.processor() or platform.machine()}: {folder.environment()}")
    console.print(f"{torch.get_num_threads()} threads, device {device}")
    results = {}
    for name, (model, batch_size, optimizer) in CASES.items():
        count = steps * max(1, 128 // batch_size)
        loops = make_loops(dataset, model, batch_size, optimizer, device)
        results[name] = timed(loops, rounds, count, device)
        console.print(table_of(name, results[name], batch_size))
    record = {"environment": folder.environment(), "threads": torch.get_num_threads()}
    record |= {"device": device, "torchvision": torchvision.__version__, "ms_a_step": results}
    out.write_text(json.dumps(record, indent=2) + "\n")


def timed(
    loops: dict[str, Callable[[int], None]], rounds: int, count: int, device: str
) -> dict[str, list[float]]:
    """Return milliseconds a step of each loop, round by round."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for run in loops.values():
        run(10)  # warms caches and compiles
    for _ in range(rounds):
        for name, run in loops.items():
            wait(device)
            began = time.perf_counter()
            run(count)
            wait(device)
            times[name].append((time.perf_counter() - began) / count * 1e3)
    return times


def table_of(name: str, times: dict[str, list[float]], batch_size: int) -> Table:
    """Return a table with a row a loop: its time, and its ratio to the others."""
    bases = [base for base in ("tutorial", "plain", "plain nchw") if base in times]
    table = Table("loop", "ms a step", "min..max", "s an epoch", *(f"/ {b}" for b in bases),
                  title=name)  # fmt: skip
    for loop, ms in times.items():
        median = statistics.median(ms)
        ratios = [
            statistics.median(a / b for a, b in zip(ms, times[base], strict=True)) for base in bases
        ]
        table.add_row(
            loop,
            f"{median:.2f}",
            f"{min(ms):.2f}..{max(ms):.2f}",
            f"{median * (60_000 // batch_size) / 1e3:.2f}",
            *(f"{ratio:.2f}" for ratio in ratios),
        )
    return table


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def make_loops(
    dataset: Dataset, name: str, batch_size: int, optimizer: str, device: str
) -> dict[str, Callable[[int], None]]:
    """Return the loops to compare, by name."""
    return {
        "tutorial": tutorial_loop(dataset, name, batch_size, optimizer, device),
        "plain": plain_loop(dataset, name, batch_size, optimizer, torch.channels_last),
        "plain nchw": plain_loop(dataset, name, batch_size, optimizer, torch.contiguous_format),
        "eager": our_loop(dataset, name, batch_size, optimizer, compiled=False),
        "compiled": our_loop(dataset, name, batch_size, optimizer, compiled=True),
    }


def torch_optimizer(name: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    return torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.7, 0.9))


class Digits(TensorDataset):
    """Images one by one through PIL and transforms, as torchvision's data sets give them."""

    def __init__(self, dataset: Dataset) -> None:
        """Keep the training images on the CPU."""
        super().__init__(dataset.train.inputs.cpu().squeeze(-1), dataset.train.labels.cpu())
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
        )

    def __getitem__(self, index: int):
        """Return one image, transformed, and its label."""
        image, label = super().__getitem__(index)
        return self.transform(transforms.functional.to_pil_image(image)), int(label)


def tutorial_loop(dataset: Dataset, name: str, batch_size: int, optimizer: str, device: str):
    """DataLoader and transforms, model, loss, backward, step."""
    model = MODELS[name].load()((1, 28, 28), 10).to(device)
    optim_ = torch_optimizer(optimizer, model)
    loader = DataLoader(Digits(dataset), batch_size=batch_size, shuffle=True)

    def run(count: int) -> None:
        batches = iter(loader)
        for _ in range(count):
            images, labels = next(batches)
            images, labels = images.to(device), labels.to(device)
            optim_.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optim_.step()

    return run


def plain_loop(dataset: Dataset, name: str, batch_size: int, optimizer: str, layout):
    """One tensor on the device, indexed and normalised a batch at a time, in a memory layout."""
    device = dataset.train.inputs.device
    model = MODELS[name].load()((1, 28, 28), 10).to(device).to(memory_format=layout)
    optim_ = torch_optimizer(optimizer, model)
    images, labels = dataset.train.inputs, dataset.train.labels
    order = torch.randperm(len(labels), device=device)

    def run(count: int) -> None:
        for i in range(count):
            index = order[i * batch_size : (i + 1) * batch_size]
            inputs = normalised(images[index], dataset.mean, dataset.std)
            if layout == torch.contiguous_format:  # one channel: contiguous() would do nothing
                inputs = inputs.clone(memory_format=layout).view(inputs.shape)
            optim_.zero_grad()
            F.cross_entropy(model(inputs), labels[index]).backward()
            optim_.step()

    return run


def our_loop(dataset: Dataset, name: str, batch_size: int, optimizer: str, *, compiled: bool):
    """The stateless step on batches of the same tensor."""
    device = dataset.train.inputs.device
    model = MODELS[name].load()((1, 28, 28), 10).to(device)
    make = optim.sgd(momentum=0.5) if optimizer == "sgd" else optim.adam(betas=(0.7, 0.9))
    train_step = make_train_step(supervised(model, mean_of(losses.cross_entropy)), make)
    hyper = {"learning_rate": torch.tensor(0.01, device=device)}

    step = torch.compile(train_step, fullgraph=True, dynamic=False) if compiled else train_step
    box = [init_state(model, make)]
    order = epoch_order(box[0].key, 0, len(dataset.train.labels)).to(device)

    def run(count: int) -> None:
        for i in range(count):
            index = order[i * batch_size : (i + 1) * batch_size]
            box[0], _ = step(box[0], get_batch(dataset, dataset.train, index), hyper)

    return run


if __name__ == "__main__":
    typer.run(main)
