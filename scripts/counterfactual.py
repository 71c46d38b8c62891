"""Does the ledger of a training tell what a training without the class weight would have been?

Each seed is trained at weight 1 and, for each weighted class, at a weight: from the same first
weights, on the same batches, under the same dropout masks. Measured is the change of the other
classes' mean losses on test digits, at the weight minus at weight 1, at the end. The ledger of the
weighted training says beside it what was due to the weight, `Ledger.due_to`, and the table has the
rank correlation of the two over the other classes.

    export FUNCLOSS_DATA_DIR=../shared/data
    python scripts/counterfactual.py --network mlp --steps 234 --out trainings.jsonl
    python scripts/counterfactual.py --network article-cnn --every 16 --held-out 1000
    python scripts/counterfactual.py --quick

Each finished training is a line of the file that --out names, and is not repeated. The correlation
is Spearman's, of the means over the seeds. Its interval is the middle 95 % of 10,000 bootstrap
samples of the seeds, of both columns together. "Per seed" is the range of the correlations of
single seeds. The ceiling is the correlation of the measured changes, their mean over half of the
seeds, with those of the other half: the mean over 1,000 random halvings. "Ledger's own" is the same
of what the ledger says.
"""

import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from funcloss import class_weighted, losses, models, optim
from funcloss.app import data
from funcloss.audit import LedgerKeeper, make_ledger, make_sampled_ledger
from funcloss.objectives import make_forward, mean_of, supervised
from funcloss.optim import Optimizer
from funcloss.training import TrainState, init_state, make_train_step
from funcloss.typing import Batch

NETWORKS = {"article-cnn": models.article_cnn, "mlp": models.mlp}
WEIGHTED = (9, 2, 4, 1)  # the class that has the weight, one at a time
BATCH, RATE, MOMENTUM = 128, 0.05, 0.9
JUDGED = 1000  # test digits of each class, where it has as many
RESAMPLES, HALVINGS = 10_000, 1_000
CRITERION = mean_of(class_weighted(losses.cross_entropy))


@dataclass(frozen=True)
class Settings:
    """What a training was made with, beside its network, seed and weighted class."""

    dataset: str
    weight: float
    steps: int
    every: int  # 1: the exact ledger; else one step in so many is sampled
    held_out: int  # digits of each class that the ledger is kept on or, sampled, draws from


def main(
    network: Annotated[str, typer.Option(help=f"Any of {', '.join(NETWORKS)}, or all.")] = "all",
    seeds: Annotated[int, typer.Option(help="Paired trainings.", min=2)] = 10,
    steps: Annotated[int, typer.Option(help="Of each training.", min=2)] = 468,
    every: Annotated[int, typer.Option(help="1: the exact ledger; else sampled.", min=1)] = 1,
    held_out: Annotated[int, typer.Option(help="Digits per class for the ledger.", min=2)] = 20,
    weight: Annotated[float, typer.Option(help="Of the weighted class.")] = 5.0,
    out: Annotated[Path | None, typer.Option(help="File of the finished trainings.")] = None,
    quick: Annotated[bool, typer.Option(help="A trial: mlp, few steps and seeds.")] = False,
) -> None:
    """Print a table of correlations between the ledger and paired trainings at weight 1."""
    if quick:
        network, seeds, steps, held_out = "mlp", 2, 4, 4
    names = [*NETWORKS] if network == "all" else [network]
    if unknown := [name for name in names if name not in NETWORKS]:
        raise typer.BadParameter(f"no network {unknown[0]!r}; there are {', '.join(NETWORKS)}, all")
    digits = data.load_dataset(data.LoadOptions("auto", val_fraction=0.0))
    settings = Settings(digits.name, weight, steps, every, held_out)
    kind = "exact ledger" if every == 1 else f"ledger of one step in {every}"
    print(
        f"{digits.name}, {steps} steps of {BATCH}, SGD {RATE} momentum {MOMENTUM}, {seeds} seeds; "
        f"{kind} on {held_out} digits of each class; {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        flush=True,
    )
    rows = {name: trainings(name, digits, settings, seeds, out) for name in names}
    print(
        "| network | weight | correlation [95 %] | per seed | ceiling | ledger's own "
        "| measured, nats | the ledger's, nats |\n|---|---|---|---|---|---|---|---|"
    )
    for name, found in rows.items():
        for label in WEIGHTED:
            cells = compared(*columns(found, label))
            print(f"| {name} | {label}={weight:g} | {' | '.join(cells)} |", flush=True)
    for name, found in rows.items():
        residuals = [r["residual"] for r in found if r.get("residual") is not None]
        of_ledgers = f", residuals up to {max(residuals):.2%}" if residuals else ""
        print(f"{name}: {sum(r['seconds'] for r in found):.0f} seconds{of_ledgers}")


def trainings(
    network: str, digits: data.Dataset, settings: Settings, seeds: int, out: Path | None
) -> list[dict]:
    """Return a record of each training: read where it is finished, else made and written."""
    lines = out.read_text(encoding="utf-8").splitlines() if out and out.exists() else []
    asked = {"network": network, **settings.__dict__}
    read = [json.loads(line) for line in lines]
    read = [r for r in read if asked.items() <= r.items() and r["seed"] < seeds]
    known = {(r["seed"], r["label"]) for r in read}
    pairs = [(seed, label) for seed in range(seeds) for label in (None, *WEIGHTED)]
    for seed, label in (pair for pair in pairs if pair not in known):
        began = time.perf_counter()
        found = train(network, digits, settings, seed, label)
        record = {**asked, "seed": seed, "label": label, **found}
        record["seconds"] = time.perf_counter() - began
        on = "no weight" if label is None else f"weight on {label}"
        print(f"{network}, seed {seed}, {on}: {record['seconds']:.1f} s", flush=True)
        read.append(record)
        if out:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
    return sorted(read, key=lambda r: r["seed"])


def train(
    network: str, digits: data.Dataset, settings: Settings, seed: int, label: int | None
) -> dict:
    """Train once; return the classes' losses at the end and what was due to the weight."""
    torch.manual_seed(seed)
    model, optimizer = NETWORKS[network](), optim.sgd(momentum=MOMENTUM)
    weights = torch.ones(len(digits.classes))
    weights[[] if label is None else label] = settings.weight
    hyper = {"learning_rate": torch.tensor(RATE), "class_weights": weights}
    train_step = make_train_step(supervised(model, CRITERION), optimizer)
    state = init_state(model, optimizer, seed=seed)
    keeper = ledger = None
    if label is not None:
        keeper = keeper_of(model, optimizer, digits, settings, seed)
        ledger = keeper.init(state)
    for batch in batches(digits, settings.steps, seed):
        after, _ = train_step(state, batch, hyper)
        if keeper is not None and ledger is not None:
            ledger = keeper.update(ledger, state, batch, hyper, after)
        state = after
    found: dict = {"losses": judge(model, state, chosen(digits, JUDGED, 0), len(weights)).tolist()}
    if ledger is not None:
        found["due_to"] = ledger.due_to(weights)[:, label].tolist()
        found["error"] = ((1.0 - 1.0 / settings.weight) * ledger.standard_error[:, label]).tolist()
        found["residual"] = ledger.residual if settings.every == 1 else None
    return found


def keeper_of(
    model: torch.nn.Module,
    optimizer: Optimizer,
    digits: data.Dataset,
    settings: Settings,
    seed: int,
) -> LedgerKeeper:
    """Return what keeps the exact ledger or, in the same way, a sampled one."""
    held_out = chosen(digits, settings.held_out, seed)
    asked = (model, CRITERION, optimizer, held_out, losses.cross_entropy)
    if settings.every == 1:
        return make_ledger(*asked, classes=digits.classes)
    sampled = make_sampled_ledger(*asked, classes=digits.classes, seed=seed)
    return LedgerKeeper(
        sampled.init, lambda *taken: sampled.update(*taken, settings.every), sampled.parts
    )


def batches(digits: data.Dataset, steps: int, seed: int) -> Iterator[Batch]:
    """Yield the batches of a seed: full ones, in a new order for each epoch."""
    generator = torch.Generator().manual_seed(seed)
    whole = len(digits.train.labels) // BATCH  # an epoch
    for step in range(steps):
        if step % whole == 0:
            order = torch.randperm(len(digits.train.labels), generator=generator)
        index = order[step % whole * BATCH :][:BATCH]
        yield data.get_batch(digits, digits.train, index)


def chosen(digits: data.Dataset, per_class: int, seed: int) -> Batch:
    """Return up to so many test digits of each class, other ones for each seed."""
    labels = digits.test.labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows = [order[labels[order] == k][:per_class] for k in range(len(digits.classes))]
    return data.get_batch(digits, digits.test, torch.cat(rows))


@torch.no_grad()
def judge(model: torch.nn.Module, state: TrainState, judged: Batch, classes: int) -> Tensor:
    """Return each class's mean loss, in evaluation mode."""
    forward = make_forward(model.eval())
    predictions, _ = forward(state.params, state.buffers, judged.inputs)
    values = losses.cross_entropy(predictions, judged.targets).double()
    return torch.stack([values[judged.targets == k].mean() for k in range(classes)])


def columns(found: list[dict], label: int) -> tuple[Tensor, Tensor]:
    """Return what was measured and what the ledger says of the other classes, a row per seed."""
    ones = {r["seed"]: torch.tensor(r["losses"]).double() for r in found if r["label"] is None}
    weighted = [r for r in found if r["label"] == label]
    others = [k for k in range(len(weighted[0]["losses"])) if k != label]
    changed = [torch.tensor(r["losses"]).double() - ones[r["seed"]] for r in weighted]
    told = [torch.tensor(r["due_to"]).double() for r in weighted]
    return torch.stack(changed)[:, others], torch.stack(told)[:, others]


def compared(measured: Tensor, told: Tensor) -> list[str]:
    """Return the cells of a row of the table, of two tables of seeds by classes."""
    seeds = len(measured)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(seeds, (RESAMPLES, seeds), generator=generator)
    means = told.mean(0), measured.mean(0)
    resampled = spearman(told[drawn].mean(1), measured[drawn].mean(1))
    low, high = resampled.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    each = spearman(told, measured)
    order = torch.rand(HALVINGS, seeds, generator=generator).argsort(1)
    halves = order.tensor_split([seeds // 2], 1)
    ceiling, own = (spearman(*(table[h].mean(1) for h in halves)) for table in (measured, told))
    ranges = (f"{m.min():+.3f} to {m.max():+.3f}" for m in reversed(means))
    return [
        f"{spearman(*means):.2f} [{low:.2f}, {high:.2f}]",
        f"{each.min():.2f} to {each.max():.2f}",
        f"{ceiling.mean():.2f}",
        f"{own.mean():.2f}",
        *ranges,
    ]


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Return the rank correlation along the last axis, NaN where all values of one are equal."""
    a, b = (ranks(t) for t in (a, b))
    a, b = (t - t.mean(-1, keepdim=True) for t in (a, b))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def ranks(values: Tensor) -> Tensor:
    """Return the ranks along the last axis; equal values share the mean of theirs."""
    one, other = values[..., :, None], values[..., None, :]
    return (one > other).double().sum(-1) + (one == other).double().sum(-1) / 2


if __name__ == "__main__":
    typer.run(main)
