"""The ledger that a watch keeps of a loop of torch.optim, against that of the pure step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from funcloss import class_weighted, losses, optim
from funcloss.audit import LedgerOptions, make_ledger, watch
from funcloss.objectives import mean_of, supervised
from funcloss.training import init_state, make_train_step
from funcloss.typing import Batch

NAMES = ("a", "b", "c")
CLASSES, N, STEPS = len(NAMES), 12, 6
WEIGHTS = torch.tensor([1.0, 4.0, 0.5]).double()
EXACT = LedgerOptions("exact")
EACH = LedgerOptions("sampled", share=torch.inf, per_class=1000)  # every step, all examples
OWN = [0, 1, 2, 4, 5, 6]  # columns of a pure ledger among a watch's, which has "other gradient"


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def normed():
    return nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, CLASSES)
    )


def made(make):
    torch.manual_seed(0)
    return make().double()


def batch_of(number, n=N):
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    noise = torch.randn(n, 4, generator=generator).double()
    return Batch(noise + labels[:, None] * torch.tensor([1.0, 0, -1.0, 0.5]), labels)


HELD_OUT = [batch_of(100, 20), batch_of(101, 9)]
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
PAIRS = {  # torch's optimiser, and the same as a pure rule
    "sgd": (lambda p: SGD(p, lr=0.05), optim.sgd()),
    "momentum": (
        lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
        optim.sgd(momentum=0.9, weight_decay=0.01),
    ),
    "nesterov": (
        lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        optim.sgd(momentum=0.9, nesterov=True),
    ),
    "adam": (lambda p: ADAM(p, lr=0.05, weight_decay=0.01), optim.adam(weight_decay=0.01)),
    "adamw": (lambda p: ADAMW(p, lr=0.05, weight_decay=0.1), optim.adamw(weight_decay=0.1)),
}


def watched_training(
    make, optimizer, options=EXACT, *, entry="backward", clip=0.0, steps=STEPS, weights=WEIGHTS,
    **arguments,
):  # fmt: skip
    """Return the watch of a training, and its model."""
    model = made(make)
    rule = optimizer(model.parameters())
    watched = watch(
        model, rule, classes=NAMES, held_out=HELD_OUT, ledger=options, every=1000, **arguments
    )
    for number in range(steps):
        train(model, rule, watched, number, entry=entry, clip=clip, weights=weights)
    return watched, model


def train(model, rule, watched, number, *, entry="backward", clip=0.0, weights=WEIGHTS):
    inputs, labels, *_ = batch_of(number)
    predictions = model(inputs)
    values = F.cross_entropy(predictions, labels, reduction="none")
    rule.zero_grad()
    if entry == "backward":
        watched.backward(values, labels, class_weights=weights)
    else:
        watched.through(predictions, labels)
        (weights[labels] * values).mean().backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    rule.step()


def pure_ledger(make, rule, *, clip=0.0):
    model, criterion = made(make), mean_of(class_weighted(losses.cross_entropy))
    hyper = {"learning_rate": torch.tensor(0.05, dtype=torch.float64), "class_weights": WEIGHTS}
    train_step = make_train_step(supervised(model, criterion), rule, clip_norm=clip)
    keeper = make_ledger(
        model, criterion, rule, HELD_OUT, losses.cross_entropy, classes=NAMES, clip_norm=clip
    )
    state = init_state(model, rule)
    ledger = keeper.init(state)
    for number in range(STEPS):
        after, _ = train_step(state, batch_of(number), hyper)
        ledger, state = keeper.update(ledger, state, batch_of(number), hyper, after), after
    return ledger


@pytest.mark.parametrize(
    ("entry", "clip"), [("backward", 0.0), ("through", 0.3)], ids=["backward", "through, clipped"]
)
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("make", [net, normed])
def test_the_ledger_is_that_of_the_pure_step(make, name, clip, entry):
    optimizer, rule = PAIRS[name]
    watched, _ = watched_training(make, optimizer, entry=entry, clip=clip)
    expected, found = pure_ledger(make, rule, clip=clip), watched.ledger
    assert watched.ledger_note == ""
    assert watched.ledger_parts[3] == "other gradient"
    for a, b in ((found.raised, expected.raised), (found.lowered, expected.lowered)):
        assert_close(a[:, OWN], b, rtol=1e-9, atol=1e-9)
        assert a[:, 3].abs().max() < 1e-9
    assert_close((found.begin, found.now), (expected.begin, expected.now))
    assert found.residual < 0.02
