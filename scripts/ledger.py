"""How nearly the ledger of a training adds up, and what it costs.

    FUNCLOSS_DATA_DIR=../shared/data python scripts/ledger.py
    python scripts/ledger.py --steps 20 --only mlp

Each network is trained on MNIST, or on its sample, with the weight 5 on class 9, and its ledger is
kept on held-out digits. A residual is the distance of the sums of parts from the measured changes
of the classes' losses over the training, relative to these: of the ledger, and of the gradients at
the two ends of each step (trapezoid) and at its start alone.
"""

import platform
import statistics
import time
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from funcloss import class_weighted, losses, models, optim
from funcloss.app import data
from funcloss.audit import make_ledger
from funcloss.objectives import make_forward, mean_of, supervised
from funcloss.optim import Optimizer
from funcloss.training import TrainState, init_state, make_train_step
from funcloss.typing import Batch, Params

BATCH = 128


def resnet18() -> nn.Module:
    """Return torchvision's network, for grey images."""
    import torchvision

    net = torchvision.models.resnet18(num_classes=10)
    net.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return net


NETWORKS = {
    "linear": models.linear,
    "mlp": models.mlp,
    "article-cnn": models.article_cnn,
    "fast-cnn": models.fast_cnn,
    "resnet18, BatchNorm": resnet18,
}
RULES: dict[str, tuple[Optimizer, float]] = {
    "SGD 0.05, momentum 0.9": (optim.sgd(momentum=0.9), 0.05),
    "Adam 0.003": (optim.adam(), 0.003),
}


def main(
    only: Annotated[str, typer.Option(help="Part of the names of networks.")] = "",
    steps: Annotated[int, typer.Option(help="Of each training.", min=2)] = 40,
    held_out: Annotated[int, typer.Option(help="Held-out digits.", min=20)] = 200,
) -> None:
    """Print a table of residuals and times."""
    digits = data.load_dataset("auto")
    test = data.get_batch(digits, digits.validation, torch.arange(held_out))
    print(
        f"{digits.name}, {steps} steps of {BATCH}, {held_out} held-out digits; "
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print("| network | optimizer | ledger | trapezoid | start | cost of a step, in plain steps |")
    print("|---|---|---|---|---|---|")
    for name, make in NETWORKS.items():
        for rule, (optimizer, rate) in RULES.items() if only in name else ():
            torch.manual_seed(0)
            row = one(make(), optimizer, rate, digits, test, steps)
            print(f"| {name} | {rule} | {' | '.join(row)} |", flush=True)


def one(
    model: nn.Module,
    optimizer: Optimizer,
    rate: float,
    digits: data.Dataset,
    test: Batch,
    steps: int,
) -> list[str]:
    """Train once; return the three residuals and the time of an update over that of a step."""
    criterion = mean_of(class_weighted(losses.cross_entropy))
    weights = torch.ones(10)
    weights[9] = 5.0
    hyper = {"learning_rate": torch.tensor(rate), "class_weights": weights}
    train_step = make_train_step(supervised(model, criterion), optimizer)
    keeper = make_ledger(
        model, criterion, optimizer, test, losses.cross_entropy, classes=digits.classes
    )
    state = init_state(model, optimizer)
    slopes = make_slopes(model, test)
    ledger = keeper.init(state)
    ratios, at_start, at_both = [], torch.zeros(10).double(), torch.zeros(10).double()
    order = torch.randperm(len(digits.train.labels))
    for index in order[: steps * BATCH].split(BATCH):
        batch = data.get_batch(digits, digits.train, index)
        began = time.perf_counter()
        after, _ = train_step(state, batch, hyper)
        stepped = time.perf_counter()
        ledger = keeper.update(ledger, state, batch, hyper, after)
        ratios.append((time.perf_counter() - began) / (stepped - began))
        moved = {name: after.params[name] - p for name, p in state.params.items()}
        first, last = slopes(state, moved), slopes(after, moved)
        at_start, at_both = at_start + first, at_both + (first + last) / 2
        state = after
    statistics_row = ledger.net[:, -1]
    changed = ledger.now - ledger.begin - statistics_row

    def residual(sums: Tensor) -> str:
        return f"{float((sums - changed).norm() / changed.norm()):.4f}"

    low, middle, high = statistics.quantiles(ratios, n=4)
    cost = f"{middle:.1f} ({low:.1f} to {high:.1f})"
    return [f"{ledger.residual:.4f}", residual(at_both), residual(at_start), cost]


def make_slopes(model: nn.Module, test: Batch):
    """Return what gives the slope of each class's mean held-out loss along a move."""
    mode = model.training
    forward = make_forward(model.eval())
    model.train(mode)

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
