"""Forward and backward of every loss that torch has too, against torch's own.

    python scripts/bench_losses.py --json bench_losses.json
    python scripts/bench_losses.py --only cross_entropy --rounds 21
    python scripts/bench_losses.py --only linear_cross_entropy --memory-rows 32768

Both are reduced by a mean, eager and compiled. The four take turns in one process, so that a
machine that slows down slows all of them, and the time is that of the processor, so that what else
runs there counts for little. What tensors free is kept, as a long training run keeps it; otherwise
rows of 1,000 classes measure how the system maps pages. A ratio is the median over the rounds of
the ratio within a round, with its quartiles. linear_cross_entropy is measured in processes of its
own: its time and its peak memory above the inputs against the plain product.
"""

import contextlib
import ctypes
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from funcloss import losses, mean
from funcloss.app.runs.folder import environment

SLOW_EAGER, SLOW_COMPILED = 1.5, 1.05  # ratios above these are marked
TURN = 0.03  # seconds at least that a loss runs in its turn
FEW, MANY, FLAT, VECTORS = (65536, 10), (4096, 1000), (65536 * 10,), (4096, 128)
HEAD = {"features": 1024, "classes": 50_000}  # of linear_cross_entropy
ROWS = 32_768  # examples it is asked for

Data = Callable[[tuple[int, ...]], tuple[Tensor, ...]]


class Case(NamedTuple):
    """A loss of ours and torch's, reduced by a mean, and what both are fed."""

    name: str  # in funcloss.losses
    torch_loss: Callable[..., Tensor]
    data: Data
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, float] = {}  # of ours  # noqa: RUF012
    torch_data: Callable[..., tuple[Tensor, ...]] = lambda *data: data  # from ours


def labelled(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return 3 * torch.randn(shape), torch.randint(shape[-1], shape[:-1])


def log_labelled(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    logits, labels = labelled(shape)
    return logits.log_softmax(-1), labels


def soft(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return 3 * torch.randn(shape), torch.randn(shape).softmax(-1)


def log_soft(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.randn(shape).log_softmax(-1), torch.randn(shape).softmax(-1)


def bits(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return 3 * torch.randn(shape), (torch.rand(shape) > 0.5).float()


def probabilities(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    logits, targets = bits(shape)
    return logits.sigmoid(), targets


def signs(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(2, shape).float() * 2 - 1


def signed(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.randn(shape), signs(shape)


def pairs(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.randn(shape), torch.randn(shape)


def counts(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.randn(shape), torch.poisson(torch.full(shape, 3.0))


def with_variances(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.randn(shape), torch.rand(shape) + 0.1, torch.randn(shape)


def signed_pairs(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.randn(shape), torch.randn(shape), signs(shape[:1])


def triplets(shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.randn(shape), torch.randn(shape), torch.randn(shape)


def listed(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Return targets as torch's multilabel_margin wants them: classes, then -1."""
    order = torch.sort(targets, dim=-1, descending=True)
    return logits, torch.where(order.values == 1, order.indices, -1)


def torchvision_focal(logits: Tensor, targets: Tensor) -> Tensor:
    from torchvision.ops import sigmoid_focal_loss

    return sigmoid_focal_loss(logits, targets, reduction="mean")


def variances_last(predictions: Tensor, variances: Tensor, targets: Tensor) -> Tensor:
    return F.gaussian_nll_loss(predictions, targets, variances)


# float data are differentiated, but for the targets, which come last
CASES = [
    Case("cross_entropy", F.cross_entropy, labelled, (FEW, MANY)),
    Case("cross_entropy", partial(F.cross_entropy, label_smoothing=0.1), labelled, (FEW, MANY),
         {"label_smoothing": 0.1}),
    Case("soft_cross_entropy", F.cross_entropy, soft, (FEW, MANY)),
    Case("nll", F.nll_loss, log_labelled, (FEW, MANY)),
    Case("multi_margin", F.multi_margin_loss, labelled, (FEW, MANY)),
    # ours compares every class with every other: 4096 * 1000 * 1000 values would be 16 GB
    Case("multilabel_margin", F.multilabel_margin_loss, bits, (FEW,), torch_data=listed),
    Case("multilabel_soft_margin", F.multilabel_soft_margin_loss, bits, (FEW, MANY)),
    Case("kl_div", partial(F.kl_div, reduction="batchmean"), log_soft, (FEW, MANY)),
    Case("binary_cross_entropy", F.binary_cross_entropy, probabilities, (FLAT,)),
    Case("binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits, bits, (FLAT,)),
    Case("sigmoid_focal", torchvision_focal, bits, (FLAT,), {"alpha": 0.25, "gamma": 2.0}),
    Case("soft_margin", F.soft_margin_loss, signed, (FLAT,)),
    Case("absolute_error", F.l1_loss, pairs, (FLAT,)),
    Case("squared_error", F.mse_loss, pairs, (FLAT,)),
    Case("smooth_l1", F.smooth_l1_loss, pairs, (FLAT,)),
    Case("huber", F.huber_loss, pairs, (FLAT,)),
    Case("poisson_nll", F.poisson_nll_loss, counts, (FLAT,)),
    Case("gaussian_nll", variances_last, with_variances, (FLAT,)),
    Case("hinge_embedding", F.hinge_embedding_loss, signed, (FLAT,)),
    Case("margin_ranking", F.margin_ranking_loss, signed_pairs, (FLAT,)),
    Case("triplet_margin", F.triplet_margin_loss, triplets, (VECTORS,)),
    Case("cosine_embedding", F.cosine_embedding_loss, signed_pairs, (VECTORS,)),
]  # fmt: skip


def main(
    rounds: Annotated[int, typer.Option(help="Turns that each loss takes.", min=2)] = 15,
    only: Annotated[list[str] | None, typer.Option(help="Losses to time; all if none.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    memory_rows: Annotated[
        int, typer.Option(help="Examples for linear_cross_entropy; 0: what fits, up to 32768.")
    ] = 0,
    head: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time all losses, then the memory of linear_cross_entropy, and print tables."""
    if head:  # this process is one that is measured
        print(json.dumps(head_figures(head, memory_rows)))
        return
    known = {case.name for case in CASES} | {"linear_cross_entropy"}
    if unknown := set(only or ()) - known:
        raise typer.BadParameter(f"no such loss: {', '.join(sorted(unknown))}")
    console = Console()
    if not console.is_terminal:
        console.width = 140  # of the tables, in a log
    keep_freed_memory()
    console.print(environment(), f"{torch.get_num_threads()} threads")
    torch.manual_seed(0)
    chosen = [case for case in CASES if not only or case.name in only]
    found = [measured(case, shape, rounds) for case in chosen for shape in case.shapes]
    if found:
        console.print(table_of(found))
    record = {"environment": environment(), "threads": torch.get_num_threads(), "losses": found}
    if not only or "linear_cross_entropy" in only:
        record["linear_cross_entropy"] = fused_figures(memory_rows or rows_that_fit(), console)
    if out:
        out.write_text(json.dumps(record, indent=2) + "\n")


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, in place of mapping its pages again for the next tensor."""
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h numbers them
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**30)


def measured(case: Case, shape: tuple[int, ...], rounds: int) -> dict:
    """Return the ratios of ours to torch's, eager and compiled, at one shape."""
    data = case.data(shape)
    ours = reduced(getattr(losses, case.name), case.options, len(data))
    steps = {}
    torch.compiler.reset()  # the graphs of one function are limited in number
    for mode in ("eager", "compiled"):
        for who, loss, args in (
            ("ours", ours, data),
            ("torch", case.torch_loss, case.torch_data(*data)),
        ):
            if mode == "compiled":
                # torch's gaussian_nll looks at values, which breaks its graph
                loss = torch.compile(loss, fullgraph=who == "ours", dynamic=False)
            steps[mode, who] = make_step(loss, args)
    times = timed(steps, rounds)
    figures = {"loss": case.name, "shape": shape, "options": case.options}
    for mode in ("eager", "compiled"):
        pairs_ = zip(times[mode, "ours"], times[mode, "torch"], strict=True)
        quartiles = statistics.quantiles([a / b for a, b in pairs_], n=4, method="inclusive")
        figures[mode] = dict(zip(("low", "ratio", "high"), quartiles, strict=True))
        for who in ("ours", "torch"):
            figures[mode][f"{who}_ms"] = statistics.median(times[mode, who]) * 1e3
    return figures


def reduced(loss: Callable[..., Tensor], options: dict[str, float], count: int) -> Callable:
    """Return the mean of one of our losses of so many tensors, as it is written in a step."""
    if count == 2:
        return lambda first, second: mean(loss(first, second, **options))
    return lambda first, second, third: mean(loss(first, second, third, **options))


def make_step(loss: Callable[..., Tensor], data: tuple[Tensor, ...]) -> Callable[[], None]:
    """Return one forward and backward; all but the targets are differentiated."""
    triplet = len(data) == 3 and all(t.shape == data[0].shape and t.dim() > 1 for t in data)
    inputs = data if triplet else data[:-1]
    leaves = [t.clone().requires_grad_() for t in inputs]
    rest = data[len(inputs) :]

    def step() -> None:
        torch.autograd.grad(loss(*leaves, *rest), leaves)

    return step


def timed(steps: dict, rounds: int) -> dict:
    """Return seconds per call of each step, round by round."""
    for step in steps.values():
        step(), step()  # compiles, and warms the caches
    counts_ = {name: max(1, math.ceil(TURN / seconds_of(step, 1))) for name, step in steps.items()}
    times = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds_of(step, counts_[name]))
    return times


def seconds_of(step: Callable[[], None], count: int) -> float:
    """Return the seconds that the processor works per call, whatever else the machine does."""
    began = time.process_time()
    for _ in range(count):
        step()
    return (time.process_time() - began) / count


def table_of(found: list[dict]) -> Table:
    """Return a row a loss and shape; a star marks what is slower than it should be."""
    table = Table("loss", "shape", "eager ratio", "ours / torch ms", "compiled ratio",
                  "ours / torch ms", title="ours / torch (quartiles)")  # fmt: skip
    for row in found:
        cells = []
        for mode, limit in (("eager", SLOW_EAGER), ("compiled", SLOW_COMPILED)):
            f = row[mode]
            star = " *" if f["ratio"] > limit else ""
            cells.append(f"{f['ratio']:.2f} ({f['low']:.2f}..{f['high']:.2f}){star}")
            cells.append(f"{f['ours_ms']:.2f} / {f['torch_ms']:.2f}")
        options = "".join(f", {name} {value}" for name, value in row["options"].items())
        table.add_row(row["loss"] + options, str(list(row["shape"])), *cells)
    return table


def rows_that_fit() -> int:
    """Return the greatest power of two of examples, up to ROWS, whose plain loss fits here."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        free = int(meminfo.read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    # logits, their log-softmax and the gradients of both, float32
    most = 0.8 * free / (4 * 4 * HEAD["classes"])
    return min(ROWS, 2 ** int(math.log2(most)))


def fused_figures(rows: int, console: Console) -> dict:
    """Measure the fused head and the plain one, each in its own process, and print both."""
    figures = {}
    for which in ("fused", "plain"):
        command = [sys.executable, __file__, "--head", which, "--memory-rows", str(rows)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        figures[which] = json.loads(result.stdout)
    ratios = {key: figures["fused"][key] / figures["plain"][key] for key in ("bytes", "seconds")}
    size = f"{rows} x {HEAD['features']} -> {HEAD['classes']}"
    table = Table("linear_cross_entropy", "fused", "plain", "ratio", title=size)
    gigabytes = [f"{figures[w]['bytes'] / 1e9:.2f} GB" for w in ("fused", "plain")]
    seconds = [f"{figures[w]['seconds']:.1f} s" for w in ("fused", "plain")]
    table.add_row("peak above the inputs", *gigabytes, f"{ratios['bytes']:.3f}")
    table.add_row("forward and backward", *seconds, f"{ratios['seconds']:.2f}")
    console.print(table)
    return {"rows": rows, **HEAD, **figures, "ratio": ratios}


def head_figures(which: str, rows: int) -> dict:
    """Return the seconds, and the peak memory above the inputs, of one forward and backward."""
    from funcloss.losses.fused import linear_cross_entropy

    def step(rows: int) -> float:
        features = torch.randn(rows, HEAD["features"], requires_grad=True)
        labels = torch.randint(HEAD["classes"], (rows,))
        before[:] = [peak()]
        began = time.perf_counter()
        if which == "fused":
            loss = linear_cross_entropy(features, weight, labels)
        else:
            loss = losses.cross_entropy(features @ weight.T, labels)
        torch.autograd.grad(mean(loss), (features, weight))
        return time.perf_counter() - began

    before: list[int] = []
    weight = torch.randn(HEAD["classes"], HEAD["features"]).mul_(0.02).requires_grad_()
    seconds = step(rows)
    return {"seconds": seconds, "bytes": peak() - before[0]}


def peak() -> int:
    """Return the most memory this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss starts at the parent's there
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


if __name__ == "__main__":
    typer.run(main)
