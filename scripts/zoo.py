"""Watch one model after another in training mode, and compare with passes of one class each.

    python scripts/zoo.py
    python scripts/zoo.py --only 'BERT|resnet'

For each row of ``zoo_models.ROWS``, with random weights and small inputs:

- *share*: the largest distance between a class's share of the gradient and that of references,
  each a forward pass of its own with the same random numbers and a backward pass of the terms of
  that class alone; in float64 where the model can be computed in it. Norms and counts are compared
  too;
- *moved*: the distance of the parameters after the step from where they were told to be, relative
  to the step;
- *same*: losses, ``.grad``, parameters, buffers and torch's generator are those of the loop without
  the watch, to the bit;
- *time* and *memory*: the watched step over the step, in float32: the median of turns taken in
  alternation, and the most that is held in a step, parameters and optimiser included.

The exit code is 1 if anything is wrong. A model that cannot be watched is said to be so by name,
when the watch is made or in the note of the step, and never by an error in the loop.
"""

import gc
import importlib.util
import platform
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from zoo_models import ROWS, Loop, Row

from funcloss.audit import watch
from funcloss.audit.training import StepFindings
from funcloss.audit.watch import Watch
from funcloss.errors import ConfigError

STEPS = 2  # the last is compared, so that optimisers have a memory and hooks have been made
ROUNDS = 5
MOST_REFUSED = 4
RATES = {"SGD": 0.05, "Adadelta": 1.0, "Adagrad": 0.01, "ASGD": 0.01}  # of the others: 1e-3


@dataclass(frozen=True)
class Outcome:
    """What one model came to."""

    row: Row
    entry: str = ""
    classes: int = 0
    share: float = float("nan")
    moved: float = float("nan")
    same: bool = False
    time: float = float("nan")
    memory: float = float("nan")
    note: str = ""
    wrong: str = ""


def main(
    only: Annotated[str, typer.Option(help="Pattern of the names of models.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of time; 0: no time, no memory.")] = ROUNDS,
) -> None:
    """Watch the models, and print a table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    began, outcomes, skipped = time.perf_counter(), [], []
    typer.echo(environment())
    print()
    print("| model | entry | optimiser | classes | share | moved | same | time | memory | note |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in ROWS:
        if not re.search(only, row.name):
            continue
        if row.needs and importlib.util.find_spec(row.needs) is None:
            skipped.append(f"{row.name} ({row.needs})")
            continue
        outcomes.append(outcome := examined(row, rounds))
        print(line_of(outcome), flush=True)
        gc.collect()
    refused = [o.row.name for o in outcomes if o.row.refused and not o.wrong]
    wrong = [f"{o.row.name}: {o.wrong}" for o in outcomes if o.wrong]
    if len(refused) > MOST_REFUSED:
        wrong.append(f"more than {MOST_REFUSED} models are refused: {', '.join(refused)}")
    print()
    print(
        f"{len(outcomes)} models, {len(refused)} refused by name, {len(skipped)} skipped for want "
        f"of a package, {len(wrong)} wrong; {time.perf_counter() - began:.0f} s"
    )
    for text in (*skipped, *wrong):
        print(f"- {text}")
    sys.exit(1 if wrong else 0)


def examined(row: Row, rounds: int = 0) -> Outcome:
    """Return what a model comes to; with rounds, also how long it takes and what it holds."""
    dtype = torch.float64 if row.double else torch.float32
    try:
        with default(dtype):
            outcome = compared(row)
        if rounds and not row.refused and not outcome.wrong:
            with default(torch.float32):
                seconds, held = prices(row, rounds)
            outcome = Outcome(**{**vars(outcome), "time": seconds, "memory": held})
        return outcome
    except Exception as error:  # whatever a model raises is its row's
        return Outcome(row, wrong=f"{type(error).__name__}: {error}".splitlines()[0])


def compared(row: Row) -> Outcome:
    """Return the comparison with a loop without the watch and with passes of one class each."""
    plain, watched = run(row), None
    try:
        seen, watched = run_watched(row)
    except ConfigError as error:
        named = row.refused and row.refused in str(error)
        return Outcome(row, note=str(error), wrong="" if named else f"refused: {error}")
    loop, found = made(row), watched.found
    outcome = Outcome(
        row,
        "backward" if loop.predictions is None else "through",
        len(loop.groups.clamp(min=-1).unique()),
        same=len(plain) == len(seen) and all(map(torch.equal, plain, seen)),
        note="" if found is None else found.note,
    )
    if found is None:
        return Outcome(**{**vars(outcome), "wrong": "nothing was found"})
    if row.refused:
        named = row.refused in found.note and outcome.same
        return Outcome(**{**vars(outcome), "wrong": "" if named else "it is not refused by name"})
    share, wrong = apart(row, loop, found)
    if not outcome.same:
        wrong.append("the training is another with the watch")
    if not share <= row.tolerance:
        wrong.append(f"shares are off by {share:.1e}")
    if row.moved and row.double and not found.moved <= 1e-5:  # else a note says so
        wrong.append(f"the step was not foretold: moved {found.moved:.1e}")
    allowed = "other gradient" if row.rest else "is not known" if not row.moved else None
    if found.note and not (allowed and allowed in found.note):
        wrong.append(f"note: {found.note}")
    return Outcome(
        **{**vars(outcome), "share": share, "moved": found.moved, "wrong": "; ".join(wrong)}
    )


def apart(row: Row, loop: Loop, found: StepFindings) -> tuple[float, list[str]]:
    """Return the distance of the shares from the reference, and what else is wrong."""
    groups = loop.groups.clamp(min=-1)
    ids = sorted(groups.unique().tolist(), key=lambda group: (group < 0, group))
    wrong = []
    names = tuple("no group" if group < 0 else str(group) for group in ids)
    if found.classes != names:
        wrong.append(f"rows are {found.classes}, not {names}")
        return float("nan"), wrong
    if found.count.tolist() != [int((groups == group).sum()) for group in ids]:
        wrong.append(f"counts are {found.count.tolist()}")
    parts = torch.stack([part_of(row, group) for group in ids])
    gram = parts @ parts.T
    share, norm = gram.sum(1) / gram.sum(), gram.diag().sqrt()
    if not float((found.balance.norm - norm).abs().max() / norm.max()) <= row.tolerance:
        wrong.append("norms are off")
    return float((found.balance.share - share).abs().max()), wrong


def part_of(row: Row, group: int) -> Tensor:
    """Return a group's part of the gradient of the last step, from a forward pass of its own."""
    loop = made(row)
    optimizer = optimizer_of(row, loop)
    for _ in range(STEPS - 1):
        step(loop, optimizer)
    optimizer.zero_grad()
    out, here = loop.forward(loop.model), loop.groups.clamp(min=-1) == group
    if loop.values is not None:
        values = loop.values(out)
        part = values[here].sum() / (loop.divisor or values.numel())
    else:  # of a loss without terms: what reaches the parameters through the group's predictions
        of = loop.predictions(out)
        part = loop.loss(torch.where(here.reshape(-1, *(1,) * (of.dim() - 1)), of, of.detach()))
    part.backward()
    grads = [p.grad for p in loop.model.parameters() if p.requires_grad]
    zeros = [torch.zeros_like(p) for p in loop.model.parameters() if p.requires_grad]
    dense = (z if g is None else g.to_dense() for g, z in zip(grads, zeros, strict=True))
    return torch.cat([g.flatten().double() for g in dense])


def run(row: Row) -> list[Tensor]:
    """Return all that a loop leaves, without a watch."""
    loop = made(row)
    optimizer = optimizer_of(row, loop)
    return [t for _ in range(STEPS) for t in (step(loop, optimizer), *left(loop))]


def run_watched(row: Row) -> tuple[list[Tensor], Watch]:
    """Return all that a watched loop leaves, and the watch."""
    loop = made(row)
    optimizer = optimizer_of(row, loop)
    watched = watch(loop.model, optimizer)
    return [t for _ in range(STEPS) for t in (step(loop, optimizer, watched), *left(loop))], watched


def left(loop: Loop) -> list[Tensor]:
    """Return copies of the gradients, of all that the model holds and of the generator."""
    grads = [p.grad.to_dense() for p in loop.model.parameters() if p.grad is not None]
    held = [*loop.model.parameters(), *loop.model.buffers()]
    return [t.detach().clone() for t in (*grads, *held, torch.get_rng_state())]


def step(loop: Loop, optimizer: torch.optim.Optimizer, watched: Watch | None = None) -> Tensor:
    """Take one step of the loop, and return its loss."""
    optimizer.zero_grad()
    out = loop.forward(loop.model)
    if loop.predictions is not None:
        if watched is not None:
            watched.through(loop.predictions(out), loop.groups, class_dim=loop.class_dim)
        loss = loop.loss(out)
        loss.backward()
    else:
        values = loop.values(out)
        loss = values.mean() if loop.divisor is None else values.sum() / loop.divisor
        if watched is None:
            loss.backward()
        else:
            watched.backward(values, loop.groups, divisor=loop.divisor)
    optimizer.step()
    return loss.detach()


def made(row: Row) -> Loop:
    """Return a row's loop, the same at every call."""
    torch.manual_seed(0)
    loop = row.make()
    loop.model.train()
    return loop


def optimizer_of(row: Row, loop: Loop) -> torch.optim.Optimizer:
    params = [p for p in loop.model.parameters() if p.requires_grad]
    rate = RATES.get(row.optimizer, 1e-3)
    return getattr(torch.optim, row.optimizer)(params, **{"lr": rate, **row.options})


@contextmanager
def default(dtype: torch.dtype) -> Iterator[None]:
    """Make models and inputs in a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# Prices ---


def prices(row: Row, rounds: int) -> tuple[float, float]:
    """Return time and memory of a watched step over those of a step."""
    plain, beside = made(row), made(row)
    optimizers = optimizer_of(row, plain), optimizer_of(row, beside)
    watched = watch(beside.model, optimizers[1])

    def one() -> object:
        return step(plain, optimizers[0])

    def other() -> object:
        return step(beside, optimizers[1], watched)

    for _ in range(STEPS):
        one(), other()
    ratios = []
    for _ in range(rounds):
        first, second = seconds(one), seconds(other)
        ratios.append(second / first)
    always = sum(t.numel() * t.element_size() for t in always_held(plain, optimizers[0]))
    return statistics.median(ratios), (always + held(other)) / (always + held(one))


def always_held(loop: Loop, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Return what is held between steps, but for gradients."""
    yield from loop.model.parameters()
    yield from loop.model.buffers()
    for state in optimizer.state.values():
        yield from (t for t in state.values() if isinstance(t, Tensor))


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def held(call: Callable[[], object]) -> float:
    """Return the most bytes that torch allocated in a call, beside what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


# Words ---


def line_of(outcome: Outcome) -> str:
    row = outcome.row
    what = f"**wrong**: {outcome.wrong}" if outcome.wrong else outcome.note
    if row.refused and not outcome.wrong:
        return f"| {row.name} | refused | | | | | | | | {what} |"
    dtype = "" if row.double else "not in float64"
    note = "; ".join(filter(None, (dtype, what)))
    return (
        f"| {row.name} | {outcome.entry} | {row.optimizer} | {outcome.classes} | "
        f"{outcome.share:.0e} | {outcome.moved:.0e} | {'yes' if outcome.same else 'no'} | "
        f"{outcome.time:.1f} | {outcome.memory:.1f} | {note} |"
    )


def environment() -> str:
    """Return hardware and versions in a line."""
    packages = ("torchvision", "timm", "transformers", "peft")
    there = [f"{name} {metadata.version(name)}" for name in packages if installed(name)]
    return ", ".join([processor(), "1 thread", f"torch {torch.__version__}", *there])


def processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(s.split(":")[1].strip() for s in lines if s.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    typer.run(main)
