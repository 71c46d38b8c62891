"""How nearly the ledger of a training adds up, and what it costs.

    FUNCLOSS_DATA_DIR=../shared/data python scripts/ledger.py
    python scripts/ledger.py --steps 20 --only mlp

Each network is trained on MNIST, or on its sample, each recipe on its own data and as it says,
with the weight 5 on class 9; the ledger is kept on test images. A residual is the distance of the
sums of parts from the measured changes of the classes' losses over the training, relative to
these: of the ledger, and of the gradients at the two ends of each step (trapezoid) and at its start
alone. What new statistics of batch normalisation changed is no part of the last two. The cost of
the exact ledger is the median of the steps, with the quartiles; that of a sample of the sampled
one is the mean of a few.
"""

import copy
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from funcloss import losses
from funcloss.app.config import make_config, read_recipe, recipe_names
from funcloss.app.data import get_batch
from funcloss.app.runs.setup import Setup, make_optimizer, make_schedule, make_setup
from funcloss.audit import make_ledger, make_sampled_ledger
from funcloss.objectives import make_forward
from funcloss.training import TrainState
from funcloss.typing import Batch, Params

EVERY = 4  # steps for one of the sampled ledger
NETWORKS = {
    "linear": "linear",
    "mlp": "mlp",
    "article-cnn": "article-cnn",
    "fast-cnn": "fast-cnn",
    "ResNet-18, BatchNorm": "torchvision:resnet18",
}
RULES = {
    "SGD 0.05, momentum 0.9": {"optimizer": "sgd", "momentum": 0.9, "learning_rate": 0.05},
    "Adam 0.003": {"optimizer": "adam", "betas": [0.9, 0.999], "learning_rate": 0.003},
}


def main(
    only: Annotated[str, typer.Option(help="Part of what a row begins with.")] = "",
    steps: Annotated[int, typer.Option(help="Of each training.", min=2)] = 40,
    held_out: Annotated[int, typer.Option(help="Held-out images.", min=20)] = 200,
) -> None:
    """Print a table of residuals and times."""
    print(
        f"{steps} steps, {held_out} held-out images; {platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(
        "| network | trained by | ledger | trapezoid | start | a step with it, in plain steps "
        "| a sample, in plain steps |\n|---|---|---|---|---|---|---|"
    )
    for name, rule, options in trainings():
        if only in f"{name} {rule}":
            weighted = {"class_weight": {"9": 5.0}, "compile": "off", "audit_every": 0}
            row = one(make_setup(make_config(options, weighted)), steps, held_out)
            print(f"| {name} | {rule} | {' | '.join(row)} |", flush=True)


def trainings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the network, the optimiser or recipe, and the options of each row."""
    for name, model in NETWORKS.items():
        for rule, options in RULES.items():
            yield name, rule, {"model": model, "batch_size": 128, "schedule": "constant", **options}
    for recipe in recipe_names():
        options = read_recipe(recipe)
        yield options["model"], f"recipe {recipe}", options


def one(setup: Setup, steps: int, held_out: int) -> list[str]:
    """Train once; return the three residuals and what both ledgers cost."""
    test = get_batch(setup.dataset, setup.dataset.test, torch.arange(held_out))
    optimizer = make_optimizer(setup.config)
    of_training = (setup.model, setup.untrained.criterion, optimizer, test, losses.cross_entropy)
    options: dict[str, Any] = {
        "classes": setup.dataset.classes,
        "schedule": make_schedule(setup.config, setup.per_epoch),
        "clip_norm": setup.config.clip_norm,
    }
    keeper = make_ledger(*of_training, **options)
    sampler = make_sampled_ledger(*of_training, **options)
    slopes, state = make_slopes(setup.model, test), setup.state
    ledger, sampled = keeper.init(state), sampler.init(state)
    times, at_start, at_both = [], torch.zeros(10).double(), torch.zeros(10).double()
    order = setup.order(state.key, 0).split(setup.config.batch_size)[:steps]
    for batch in setup.iter_batches(order):
        began = time.perf_counter()
        after, _ = setup.train_step(state, batch, setup.hyper)
        stepped = time.perf_counter()
        ledger = keeper.update(ledger, state, batch, setup.hyper, after)
        kept = time.perf_counter()
        sampled = sampler.update(sampled, state, batch, setup.hyper, after, EVERY)
        times.append((stepped - began, kept - stepped, time.perf_counter() - kept))
        moved = {name: after.params[name] - p for name, p in state.params.items()}
        first, last = (slopes(state._replace(params=p.params), moved) for p in (state, after))
        at_start, at_both = at_start + first, at_both + (first + last) / 2
        state = after
    changed = ledger.now - ledger.begin - ledger.net[:, -1]  # by the parameters

    def residual(sums: Tensor) -> str:
        return f"{float((sums - changed).norm() / changed.norm()):.4f}"

    ratios = [1.0 + exact / step for step, exact, _ in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    cost = f"{middle:.1f} ({low:.1f} to {high:.1f})"
    samples = 0 if sampled.sampling is None else int(sampled.sampling.samples)
    plain = statistics.median(step for step, _, _ in times)
    of_sample = f"{sum(t for *_, t in times) / samples / plain:.0f}" if samples else "-"
    return [f"{ledger.residual:.4f}", residual(at_both), residual(at_start), cost, of_sample]


def make_slopes(model: nn.Module, test: Batch) -> Callable[[TrainState, Params], Tensor]:
    """Return what gives the slope of each class's mean held-out loss along a move."""
    forward = make_forward(copy.deepcopy(model).eval())

    def slopes(state: TrainState, moved: Params) -> Tensor:
        leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        predictions, _ = forward(leaves, state.buffers, test.inputs)
        values = losses.cross_entropy(predictions, test.targets)
        found = []
        for label in range(10):
            mean = values[test.targets == label].mean()
            grads = torch.autograd.grad(mean, [*leaves.values()], retain_graph=True)
            pairs = zip(grads, moved.values(), strict=True)
            found.append(sum((g.double() * m.double()).sum() for g, m in pairs))
        return torch.stack(found)

    return slopes


if __name__ == "__main__":
    typer.run(main)
