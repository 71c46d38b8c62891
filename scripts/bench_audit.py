"""Seconds and memory of an audit, against a plain forward and backward and against its peers.

    python scripts/bench_audit.py --data-dir DATA --threads 2 --json bench_audit.json
    python scripts/bench_audit.py --only article --no-peers --rounds 21

The audit gives each class's share of the gradient, the conflict of the classes, and the norm and
alignment of each example's gradient, over all of the data. A peer is timed for those of the four
that it delivers, and says which. All take turns in one process on the same images, channels-last,
so that a machine that slows down slows all of them; a ratio is the median over the rounds of the
ratio within a round, with its quartiles; the slowest peers take three turns. Before anything is
timed, what they deliver is compared on a small batch. Memory is measured in processes of its own.
"""

import copy
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from funcloss import losses, models
from funcloss.app.data import LoadOptions, get_batch, load_dataset
from funcloss.app.runs.folder import environment

QUANTITIES = ("share", "conflict", "norm", "alignment")
CLASSES = 10
SMALL = 48  # examples that the agreement is checked on
CLOSE = 1e-3  # largest error of what is delivered, relative to its largest value
PACKAGES = ("opacus", "backpack-for-pytorch", "torchjd", "torchvision")
MEMORY_EXAMPLES = (2_000, 10_000)
SLOW = 10  # times the unit; who takes longer takes fewer turns
FEW_TURNS = 3


class Data(NamedTuple):
    """What is audited, channels-last."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Return images and labels, ``size`` at a time."""
        return zip(self.images.split(size), self.labels.split(size), strict=True)


class Found(NamedTuple):
    """What somebody delivers of the data: of the mean loss over all of it, but for TorchJD."""

    gram: Tensor | None = None  # <G_a, G_b>, which gives shares and conflicts
    norm: Tensor | None = None  # |grad l_i|
    slope: Tensor | None = None  # <grad l_i, g>, which with the norms gives alignments


Run = Callable[[Data], Found]


class Case(NamedTuple):
    """A model, and the data that it is audited on."""

    title: str
    make: Callable[[], nn.Module]
    examples: int
    mnist: bool  # else random images of 3x32x32


class Setting(NamedTuple):
    """What all of them are told."""

    batch_size: int
    peer_memory: float  # MiB of per-example gradients that a peer may hold at a time

    def chunk(self, model: nn.Module) -> int:
        """Return how many examples' gradients a peer takes at a time."""
        one = 4 * sum(p.numel() for p in model.parameters())
        return max(1, min(self.batch_size, int(self.peer_memory * 2**20 / one)))


class Peer(NamedTuple):
    """Somebody who is timed; ``make`` raises where it does not serve."""

    name: str
    delivers: tuple[str, ...]
    make: Callable[[nn.Module, Setting], Run]
    note: str = ""
    whole: bool = True  # False: within each batch alone


def tutorial_cnn() -> nn.Module:
    """Return the network of torch's basic MNIST example, without its dropout, to logits."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Linear(128, CLASSES),
    )  # fmt: skip


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=CLASSES)


CASES = {
    "article": Case("article-cnn, MNIST", models.article_cnn, 10_000, True),
    "tutorial": Case("CNN of torch's MNIST example, MNIST", tutorial_cnn, 2_000, True),
    "resnet18": Case("ResNet-18, random normal 3x32x32", resnet18, 2_000, False),
}


def main(
    data_dir: Annotated[str, typer.Option(help="Folder of MNIST.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns that each takes.", min=2)] = 9,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(CASES)}, memory; all if none.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Of torch; 0: as torch chooses.", min=0)] = 0,
    batch_size: Annotated[int, typer.Option(help="Examples in a batch.", min=1)] = 256,
    examples: Annotated[int, typer.Option(help="In each case; 0: as the case says.", min=0)] = 0,
    peers: Annotated[bool, typer.Option(help="Time the peers too.")] = True,
    peer_memory: Annotated[
        float, typer.Option(help="MiB of per-example gradients that a peer holds at a time.")
    ] = 512.0,
    out: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
    memory_of: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Time the audit and its peers, then measure the audit's memory, and print tables."""
    if unknown := set(only or ()) - {*CASES, "memory"}:
        raise typer.BadParameter(f"no such case: {', '.join(sorted(unknown))}")
    if threads:
        torch.set_num_threads(threads)
    setting = Setting(batch_size, peer_memory)
    if memory_of:  # this process is one that is measured
        print(json.dumps(memory_figures(CASES[memory_of], data_dir, examples, setting)))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 150  # of the tables, in a log
    record = {
        "environment": environment() | {name: version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        **setting._asdict(),
        "cases": {},
    }
    console.print(record["environment"], f"{record['threads']} threads, batches of {batch_size}")
    for name in CASES:
        if not only or name in only:
            record["cases"][name] = timed(CASES[name], data_dir, examples, setting, rounds, peers)
            console.print(table_of(CASES[name], record["cases"][name]))
    if not only or "memory" in only:
        record["memory"] = all_memory(data_dir, setting)
        console.print(memory_table(record["memory"]))
    if out:
        out.write_text(json.dumps(record, indent=2) + "\n")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def data_of(case: Case, data_dir: str, examples: int) -> Data:
    """Return the first training images of MNIST, or random ones."""
    n = examples or case.examples
    if case.mnist:
        dataset = load_dataset(LoadOptions("mnist", data_dir, val_fraction=0.0))
        batch = get_batch(dataset, dataset.train, torch.arange(n))
        return Data(batch.inputs, batch.targets)
    return Data(torch.randn(n, 32, 32, 3).permute(0, 3, 1, 2), torch.randint(CLASSES, (n,)))


# --- who is timed ---------------------------------------------------------------------------


def plain(model: nn.Module, setting: Setting) -> Run:
    """Forward and backward of each batch, which training does: the unit."""
    params = list(model.parameters())

    def run(data: Data) -> Found:
        for images, labels in data.batches(setting.batch_size):
            torch.autograd.grad(F.cross_entropy(model(images), labels), params)
        return Found()

    return run


def ours(model: nn.Module, setting: Setting) -> Run:
    """The audit."""
    from funcloss.audit import AuditSettings, audit

    settings = AuditSettings(batch_size=setting.batch_size)

    def run(data: Data) -> Found:
        found = audit(model, None, losses.cross_entropy, tuple(data), settings=settings)
        return Found(found.gram, found.examples.norm, found.examples.slope)

    return run


def mapped(model: nn.Module, setting: Setting) -> Run:
    """``vmap(grad)``, as torch's tutorial on per-sample gradients has it, in chunks."""
    gradients = mapped_gradients(model)
    return lambda data: grouped(gradients, data, setting.chunk(model))[1]


def mapped_aligned(model: nn.Module, setting: Setting) -> Run:
    """``vmap(grad)``, then each loss's slope along the gradient by a ``jvp``."""
    gradients = mapped_gradients(model)
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def slopes(along: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        def values(params: dict[str, Tensor]) -> Tensor:
            logits = functional_call(model, (params, buffers), (images,))
            return F.cross_entropy(logits, labels, reduction="none")

        return jvp(values, (params,), (along,))[1]

    def run(data: Data) -> Found:
        sums, found = grouped(gradients, data, setting.chunk(model))
        means = [g.sum(0) / len(data.labels) for g in sums]
        along = {k: g.view_as(p) for (k, p), g in zip(params.items(), means, strict=True)}
        batches = data.batches(setting.batch_size)
        return found._replace(slope=torch.cat([slopes(along, *batch) for batch in batches]))

    return run


def mapped_gradients(model: nn.Module) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Return images and labels to each example's gradient, a tensor a parameter."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(params: dict, buffers: dict, image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, (params, buffers), (image.unsqueeze(0),))
        return F.cross_entropy(logits, label.unsqueeze(0))

    per_example = vmap(grad(loss), in_dims=(None, None, 0, 0))
    return lambda images, labels: list(per_example(params, buffers, images, labels).values())


def one_class_each(model: nn.Module, setting: Setting) -> Run:
    """One ``autograd.grad`` a class on the graph of each batch."""
    params = list(model.parameters())

    def run(data: Data) -> Found:
        sums = [torch.zeros(CLASSES, p.numel()) for p in params]
        for images, labels in data.batches(setting.batch_size):
            values = F.cross_entropy(model(images), labels, reduction="none")
            for c in range(CLASSES):
                part = torch.where(labels == c, values, 0.0).sum()
                found = torch.autograd.grad(part, params, retain_graph=c < CLASSES - 1)
                for total, g in zip(sums, found, strict=True):
                    total[c] += g.flatten()
        return Found(gram_of(sums, len(data.labels)))

    return run


def opacus(model: nn.Module, setting: Setting) -> Run:
    """Opacus's hooks; they work in training mode alone, so what has no parameters is in eval."""
    from opacus import GradSampleModule

    # Opacus 1.6's own rule for convolutions is wrong, without a word, on channels-last images
    hooked = GradSampleModule(model, loss_reduction="sum", strict=False, force_functorch=True)
    for module in hooked.modules():
        module.training = any(True for _ in module.parameters(recurse=False))

    def gradients(images: Tensor, labels: Tensor) -> list[Tensor]:
        F.cross_entropy(hooked(images), labels, reduction="sum").backward()
        found = [p.grad_sample for p in hooked.parameters()]
        hooked.zero_grad()
        return found

    return lambda data: grouped(gradients, data, setting.chunk(model))[1]


def backpack_gradients(model: nn.Module, setting: Setting) -> Run:
    """BackPACK's ``BatchGrad``."""
    from backpack.extensions import BatchGrad

    backward, params = backpacked(model)

    def gradients(images: Tensor, labels: Tensor) -> list[Tensor]:
        backward(BatchGrad(), images, labels)
        return [p.grad_batch for p in params]

    return lambda data: grouped(gradients, data, setting.chunk(model))[1]


def backpack_norms(model: nn.Module, setting: Setting) -> Run:
    """BackPACK's ``BatchL2Grad``."""
    from backpack.extensions import BatchL2Grad

    backward, params = backpacked(model)

    def norms(images: Tensor, labels: Tensor) -> Tensor:
        backward(BatchL2Grad(), images, labels)
        return torch.stack([p.batch_l2 for p in params]).sum(0).sqrt()

    size = setting.chunk(model)
    return lambda data: Found(norm=torch.cat([norms(*batch) for batch in data.batches(size)]))


def backpacked(model: nn.Module) -> tuple[Callable[..., None], list[nn.Parameter]]:
    """Return a backward under an extension of BackPACK, and the parameters that it fills."""
    from backpack import backpack, extend

    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # its hooks refuse it
    # its converter, which residual networks need, does not take every module
    extended = extend(model, use_converter=isinstance(model, torchvision.models.ResNet)).eval()
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))

    def backward(extension: object, images: Tensor, labels: Tensor) -> None:
        extended.zero_grad()
        with backpack(extension):
            loss(extended(images), labels).backward()

    return backward, list(extended.parameters())


def torchjd_examples(model: nn.Module, setting: Setting) -> Run:
    """TorchJD's Gramian of all examples of a batch, and what follows from it."""
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=0)

    def found(images: Tensor, labels: Tensor) -> Found:
        values = F.cross_entropy(model(images), labels, reduction="none")
        gram = engine.compute_gramian(values)
        member = one_hot(labels)
        by_class = member.T @ gram @ member / len(labels) ** 2
        return Found(by_class, gram.diagonal().sqrt(), gram.mean(1))

    return lambda data: [found(*batch) for batch in data.batches(setting.batch_size)][-1]


def torchjd_classes(model: nn.Module, setting: Setting) -> Run:
    """TorchJD's Gramian of the classes' parts of a batch's loss."""
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=None)

    def found(images: Tensor, labels: Tensor) -> Found:
        values = F.cross_entropy(model(images), labels, reduction="none")
        return Found(engine.compute_gramian(values @ one_hot(labels) / len(labels)))

    return lambda data: [found(*batch) for batch in data.batches(setting.batch_size)][-1]


def grouped(
    gradients: Callable[[Tensor, Tensor], list[Tensor]], data: Data, size: int
) -> tuple[list[Tensor], Found]:
    """Return the classes' sums of per-example gradients, their Gram matrix and the norms."""
    sums, norms = [], []
    for images, labels in data.batches(size):
        member = one_hot(labels)
        found = [g.flatten(1) for g in gradients(images, labels)]
        lengths = [torch.linalg.vector_norm(g, dim=1) for g in found]
        norms.append(torch.linalg.vector_norm(torch.stack(lengths), dim=0))
        if not sums:
            sums = [torch.zeros(CLASSES, g.shape[1]) for g in found]
        for total, g in zip(sums, found, strict=True):
            total.addmm_(member.T, g)
    return sums, Found(gram_of(sums, len(data.labels)), torch.cat(norms))


def gram_of(sums: list[Tensor], n: int) -> Tensor:
    return torch.stack([g @ g.T for g in sums]).sum(0) / n**2


def one_hot(labels: Tensor) -> Tensor:
    return F.one_hot(labels, CLASSES).float()


AUDIT = Peer("audit", QUANTITIES, ours)
UNIT = Peer("plain forward and backward", (), plain)
PEERS = (
    Peer("vmap(grad)", QUANTITIES[:3], mapped),
    Peer("vmap(grad), then jvp", QUANTITIES, mapped_aligned),
    Peer("autograd.grad for each class", QUANTITIES[:2], one_class_each),
    Peer("Opacus, GradSampleModule", QUANTITIES[:3], opacus, "by functorch in channels-last"),
    Peer("BackPACK, BatchGrad", QUANTITIES[:3], backpack_gradients),
    Peer("BackPACK, BatchL2Grad", QUANTITIES[2:3], backpack_norms),
    Peer("TorchJD, examples' Gramian", QUANTITIES, torchjd_examples, "within each batch", False),
    Peer("TorchJD, classes' Gramian", QUANTITIES[:2], torchjd_classes, "within each batch", False),
)


# --- how ------------------------------------------------------------------------------------


def timed(
    case: Case, data_dir: str, examples: int, setting: Setting, rounds: int, peers: bool
) -> dict:
    """Return the seconds of all, round by round, and their ratios to the unit and the audit."""
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of the peers' hooks, and of torch's first jvp
    model = case.make().eval()
    data = data_of(case, data_dir, examples)
    everybody = (UNIT, AUDIT, *(PEERS if peers else ()))
    runs, failures, errors = ready(everybody, model, data, setting)
    load = os.getloadavg()
    times: dict[str, list[float]] = {name: [] for name in runs}
    slow: set[str] = set()
    for turn in range(rounds):
        if turn == FEW_TURNS:
            slow = {n for n in times if ratio(times[n], times[UNIT.name])["ratio"] > SLOW}
        for name, run in runs.items():
            if name in slow and name != AUDIT.name:
                continue
            began = time.perf_counter()
            run(data)
            times[name].append(time.perf_counter() - began)
    rows = []
    for peer in everybody:
        row = {"name": peer.name, "delivers": peer.delivers, "note": peer.note}
        if peer.name in times:
            row |= {"seconds": times[peer.name], "error": errors.get(peer.name, {})}
            for key, base in (("of_plain", UNIT.name), ("of_audit", AUDIT.name)):
                if base in times:
                    row[key] = ratio(times[peer.name], times[base])
        else:
            row["failed"] = failures[peer.name]
        rows.append(row)
    return {
        "title": case.title,
        "examples": len(data.labels),
        "parameters": sum(p.numel() for p in model.parameters()),
        "chunk_of_peers": setting.chunk(model),
        "load_before": load,
        "load_after": os.getloadavg(),
        "rows": rows,
    }


def ready(
    everybody: tuple[Peer, ...], model: nn.Module, data: Data, setting: Setting
) -> tuple[dict[str, Run], dict[str, str], dict[str, dict[str, float]]]:
    """Return those who serve, why the others do not, and how far each is from the audit.

    Raises:
        AssertionError: somebody delivers other numbers than the audit.
    """
    small = Data(*(t[: min(SMALL, setting.batch_size)] for t in data))
    warm = Data(*(t[: setting.batch_size + len(small.labels)] for t in data))  # two batches
    runs, failures, errors = {}, {}, {}
    truth: dict[str, Found] = {}
    for peer in everybody:
        try:
            run = peer.make(copy.deepcopy(model), setting)
            found = {"small": run(small), "warm": run(warm)}
        except ImportError as error:
            if peer is AUDIT:
                raise
            failures[peer.name] = f"not installed: {error}"
            continue
        except Exception as error:  # whatever a peer raises is its reason
            if peer in (UNIT, AUDIT):
                raise
            text = str(error).split("\n")[0]
            failures[peer.name] = f"{type(error).__name__}: {text[:160]}"
            continue
        runs[peer.name] = run
        if peer is AUDIT:
            truth = found
        for part in ("small", "warm") if peer.whole else ("small",):
            if part in truth and peer is not AUDIT:
                here = disagreement(found[part], truth[part])
                assert all(e < CLOSE for e in here.values()), f"{peer.name} is off by {here}"
                errors[peer.name] = here
    return runs, failures, errors


def disagreement(found: Found, truth: Found) -> dict[str, float]:
    """Return the largest error of each quantity, relative to its largest value."""
    pairs = zip(Found._fields, found, truth, strict=True)
    return {
        name: ((ours.double() - theirs.double()).abs().max() / theirs.abs().max()).item()
        for name, ours, theirs in pairs
        if ours is not None and theirs is not None
    }


def ratio(times: list[float], base: list[float]) -> dict[str, float]:
    """Return the median and quartiles of the rounds' ratios."""
    ratios = [a / b for a, b in zip(times, base, strict=False)]  # the slow have fewer rounds
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return dict(zip(("low", "ratio", "high"), quartiles, strict=True))


def table_of(case: Case, record: dict) -> Table:
    """Return a row for each: what it delivers, and its time; or why it does not serve."""
    title = f"{case.title}: {record['examples']} examples, {record['parameters']:,} parameters"
    table = Table("", *QUANTITIES, "s", "/ plain (quartiles)", "/ audit", "", title=title)
    most = max(len(row.get("seconds", ())) for row in record["rows"])
    for row in record["rows"]:
        marks = ["x" if q in row["delivers"] else "" for q in QUANTITIES]
        if "failed" in row:
            table.add_row(row["name"], *marks, "", "", "", row["failed"])
            continue
        cells = [f"{statistics.median(row['seconds']):.2f}"]
        cells.append("{ratio:.2f} ({low:.2f}..{high:.2f})".format(**row["of_plain"]))
        cells.append(f"{row['of_audit']['ratio']:.2f}" if "of_audit" in row else "")
        turns = f"{len(row['seconds'])} turns" if len(row["seconds"]) < most else ""
        table.add_row(row["name"], *marks, *cells, ", ".join(filter(None, (row["note"], turns))))
    return table


# --- memory ---------------------------------------------------------------------------------


def all_memory(data_dir: str, setting: Setting) -> list[dict]:
    """Measure the audit's memory on two models at two sizes, each in a process of its own."""
    return [
        in_own_process(name, n, data_dir, setting)
        for name in ("article", "tutorial")
        for n in MEMORY_EXAMPLES
    ]


def in_own_process(name: str, examples: int, data_dir: str, setting: Setting) -> dict:
    command = [
        sys.executable, __file__, "--memory-of", name, "--examples", str(examples),
        "--data-dir", data_dir, "--batch-size", str(setting.batch_size),
        "--threads", str(torch.get_num_threads()),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        return {"case": name, "examples": examples, "failed": result.stderr.strip()[-200:]}
    return json.loads(result.stdout)


def memory_figures(case: Case, data_dir: str, examples: int, setting: Setting) -> dict:
    """Return the most that a plain pass, and then the audit, hold above what was held before.

    Both first see a few examples, as code is loaded at the first call; what that took is
    ``loading``.
    """
    torch.manual_seed(0)
    model = case.make().eval()
    data = data_of(case, data_dir, examples)
    few = Data(*(t[:8] for t in data))
    runs = {"plain": plain(model, setting), "audit": ours(model, setting)}
    figures: dict = {"case": case.title, "examples": examples}
    warnings.simplefilter("ignore")  # of torch's first jvp
    runs["plain"](few)
    figures["loading"] = extra(lambda: runs["audit"](few))
    for name, run in runs.items():
        figures[name] = extra(lambda run=run: run(data))
    return figures


def extra(run: Callable[[], object]) -> float:
    """Return the most memory held during a call above what was held before, in MiB."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory that is reused would not show
        Path("/proc/self/clear_refs").write_text("5")  # the high water mark starts again here
    before = memory("VmRSS")
    run()
    return (memory("VmHWM") - before) / 2**20


def memory(field: str) -> int:
    """Return this process's memory in bytes: VmRSS, what it holds; VmHWM, the most it held."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition(f"{field}:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def memory_table(record: list[dict]) -> Table:
    title = "most memory above what was held before, MiB"
    table = Table("", "examples", "plain", "audit", "code, at the first call", title=title)
    for row in record:
        if "failed" in row:
            table.add_row(row["case"], str(row["examples"]), "", row["failed"], "")
            continue
        cells = [f"{row[key]:.0f}" for key in ("plain", "audit", "loading")]
        table.add_row(row["case"], str(row["examples"]), *cells)
    return table


if __name__ == "__main__":
    typer.run(main)
