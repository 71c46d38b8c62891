"""The ledger of a training: what it adds up to, and whose the parts are."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from funcloss import class_weighted, losses, optim
from funcloss.audit.behind import make_behind
from funcloss.audit.ledger import STATISTICS, make_course, make_ledger
from funcloss.errors import AuditError
from funcloss.objectives import mean_of, supervised, weighted_mean_of
from funcloss.training import init_state, make_train_step
from funcloss.typing import Batch

NAMES = ("a", "b", "c")
CLASSES, N, STEPS = len(NAMES), 12, 6
WEIGHTS = torch.tensor([1.0, 4.0, 0.5]).double()


def plain_net():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def random_net():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, CLASSES)
    )


def linear_net():
    return nn.Linear(4, CLASSES)


def made(make):
    torch.manual_seed(0)
    return make().double()


def batch_of(number, n=N):
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    noise = torch.randn(n, 4, generator=generator).double()
    return Batch(noise + labels[:, None] * torch.tensor([1.0, 0, -1.0, 0.5]), labels)


HELD_OUT = [batch_of(100, 20), batch_of(101, 9)]
RULES = {
    "sgd": optim.sgd(),
    "momentum": optim.sgd(momentum=0.9, weight_decay=0.01),
    "nesterov": optim.sgd(momentum=0.9, nesterov=True),
    "adam": optim.adam(weight_decay=0.01),
    "adamw": optim.adamw(weight_decay=0.1),
}
PATHS = {
    "plain": {},
    "clipped": {"clip_norm": 0.3},
    "scheduled": {"schedule": optim.cosine(steps=STEPS)},
}


def kept(make, rule, *, weighted=False, loss=losses.cross_entropy, begin=0, rate=0.05,
         by_layer=False, **path):  # fmt: skip
    """Return the ledger of a training, and its states."""
    model, inner = made(make), losses.cross_entropy
    criterion = {
        False: mean_of(inner),
        True: mean_of(class_weighted(inner)),
        "mean": weighted_mean_of(inner),
    }[weighted]
    hyper = {"learning_rate": torch.tensor(rate, dtype=torch.float64)}
    hyper |= {"class_weights": WEIGHTS} if weighted else {}
    train_step = make_train_step(supervised(model, criterion), rule, **path)
    keeper = make_ledger(
        model, criterion, rule, HELD_OUT, loss, classes=NAMES, by_layer=by_layer, **path
    )
    state = init_state(model, rule)
    before = copy.deepcopy(model.state_dict())
    ledger, states = None, []
    for number in range(STEPS):
        if number == begin:
            ledger = keeper.init(state)
        states.append(state)
        after, _ = train_step(state, batch_of(number), hyper)
        if ledger is not None:
            ledger = keeper.update(ledger, state, batch_of(number), hyper, after)
        state = after
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    return ledger, [*states, state], keeper


def held_out_losses(make, state):
    """Return the mean of each class, by the module itself in evaluation mode."""
    model = made(make).eval()
    model.load_state_dict({**state.params, **state.buffers})
    inputs = torch.cat([b.inputs for b in HELD_OUT])
    labels = torch.cat([b.targets for b in HELD_OUT])
    with torch.no_grad():
        values = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
    return torch.stack([values[labels == c].mean() for c in range(CLASSES)])


@pytest.mark.parametrize("weighted", [False, True, "mean"], ids=["", "weighted", "weighted mean"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [plain_net, random_net])
def test_the_parts_add_up_to_what_the_losses_changed_by(make, rule, path, weighted):
    ledger, states, _ = kept(make, RULES[rule], weighted=weighted, **PATHS[path])
    assert_close(ledger.begin, held_out_losses(make, states[0]))
    assert_close(ledger.now, held_out_losses(make, states[-1]))
    assert ledger.residual < 0.02
    assert int(ledger.steps) == STEPS
    assert (ledger.raised >= 0).all()
    assert (ledger.lowered <= 0).all()


def score(logits, labels):
    """Linear in the logits: the integral along a step of a linear model is exact."""
    return -logits.take_along_dim(labels[:, None], 1)[:, 0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rule", RULES)
def test_the_parts_of_all_steps_are_the_way_that_was_gone(rule, path):
    ledger, _, _ = kept(linear_net, RULES[rule], weighted=True, loss=score, **PATHS[path])
    assert_close(ledger.net.sum(1), ledger.now - ledger.begin, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["momentum", "adam"])
def test_each_class_has_a_memory_of_its_own(kind):
    """The recursion of each class's first moment, from gradients of passes of its own."""
    momentum, (b1, b2) = 0.9, (0.9, 0.999)
    rule = optim.sgd(momentum=momentum) if kind == "momentum" else optim.adam()
    ledger, states, _ = kept(linear_net, rule, weighted=True, loss=score)
    first = torch.zeros(CLASSES, 3 * 5).double()
    second, moved = torch.zeros(3 * 5).double(), torch.zeros_like(first)
    for number, state in enumerate(states[:-1]):
        model, batch = made(linear_net), batch_of(number)
        model.load_state_dict(state.params)
        values = nn.functional.cross_entropy(model(batch.inputs), batch.targets, reduction="none")
        values = WEIGHTS[batch.targets] * values / N
        grads = torch.stack([
            torch.cat([g.flatten() for g in torch.autograd.grad(
                values[batch.targets == c].sum(), [*model.parameters()], retain_graph=True)])
            for c in range(CLASSES)
        ])  # fmt: skip
        if kind == "momentum":
            first = momentum * first + grads
            moved += -0.05 * first
            continue
        first = b1 * first + (1 - b1) * grads
        second = b2 * second + (1 - b2) * grads.sum(0).square()
        size = (second / (1 - b2 ** (number + 1))).sqrt() + 1e-8
        moved += -0.05 * first / (1 - b1 ** (number + 1)) / size
    inputs = torch.cat([b.inputs for b in HELD_OUT])
    labels = torch.cat([b.targets for b in HELD_OUT])
    slopes = []
    for c in range(CLASSES):
        model = made(linear_net)
        score(model(inputs), labels)[labels == c].mean().backward()
        slopes.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(ledger.net[:, :CLASSES], torch.stack(slopes) @ moved.T, rtol=1e-8, atol=1e-10)
    assert not ledger.net[:, CLASSES:].any()


def test_what_was_remembered_before_the_ledger_is_history():
    ledger, _, keeper = kept(plain_net, RULES["momentum"], begin=3)
    history = keeper.parts.index("history")
    assert ledger.net[:, history].abs().max() > 1e-4
    assert ledger.residual < 0.02
    whole, _, _ = kept(plain_net, RULES["momentum"])
    assert not whole.net[:, history].any()


def test_statistics_of_batches_are_a_part_of_their_own():
    ledger, _, keeper = kept(random_net, RULES["sgd"])
    assert keeper.parts[-1] == STATISTICS
    assert ledger.net[:, -1].abs().max() > 1e-3
    plain, _, _ = kept(plain_net, RULES["sgd"])
    assert not plain.net[:, -1].any()


def test_a_long_step_is_taken_in_pieces():
    ledger, _, _ = kept(plain_net, RULES["sgd"], rate=3.0)
    assert ledger.residual < 0.05


def test_what_is_due_to_a_weight_is_its_part_beyond_1():
    ledger, _, _ = kept(plain_net, RULES["sgd"], weighted=True)
    due = ledger.due_to(WEIGHTS)
    assert not due[:, 0].any()
    assert_close(due[:, 1], 0.75 * ledger.net[:, 1])
    assert_close(due[:, 2], -1.0 * ledger.net[:, 2])


def test_groups_may_be_other_than_labels():
    model, rule, criterion = made(plain_net), RULES["sgd"], mean_of(losses.cross_entropy)
    keeper = make_ledger(
        model, criterion, rule, HELD_OUT, losses.cross_entropy, classes=("left", "right"),
        group_by=lambda batch: (batch.inputs[:, 0] > 1.0).long(),
    )  # fmt: skip
    state, hyper = init_state(model, rule), {"learning_rate": torch.tensor(0.1).double()}
    after, _ = make_train_step(supervised(model, criterion), rule)(state, batch_of(0), hyper)
    ledger = keeper.update(keeper.init(state), state, batch_of(0), hyper, after)
    assert ledger.net.shape == (2, 5)
    assert ledger.residual < 0.02


def test_an_optimiser_that_does_not_say_how_it_steps_is_refused():
    model, rule = made(plain_net), optim.sgd()._replace(split=None)
    criterion = mean_of(losses.cross_entropy)
    keeper = make_ledger(model, criterion, rule, HELD_OUT, losses.cross_entropy, classes=NAMES)
    state, hyper = init_state(model, rule), {"learning_rate": torch.tensor(0.1).double()}
    with pytest.raises(AuditError, match="^ledger: this optimiser does not say"):
        keeper.update(keeper.init(state), state, batch_of(0), hyper, state)


@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("make", [plain_net, random_net])
def test_what_is_behind_an_entry_is_each_example_s_own_step(make, rule):
    """The parts of a class's examples add up to the class's own, to first order."""
    model, optimizer = made(make), RULES[rule]
    criterion = mean_of(class_weighted(losses.cross_entropy))
    hyper = {"learning_rate": torch.tensor(0.05).double(), "class_weights": WEIGHTS}
    shared = (model, criterion, optimizer, HELD_OUT, losses.cross_entropy)
    behind = make_behind(*shared, classes=NAMES, per_class=100)
    state, batch = init_state(model, optimizer), batch_of(0)
    train_step = make_train_step(supervised(model, criterion), optimizer)
    found = behind(state, batch, hyper)
    after, _ = train_step(state, batch, hyper)
    course = make_course(*shared, classes=NAMES)
    taken = course.take(state, batch, hyper, after, True)
    moves, _ = taken.split.rows(taken.gradients, taken.split.all_history(CLASSES))
    held_model = made(make).eval()
    inputs = torch.cat([b.inputs for b in HELD_OUT])
    labels = torch.cat([b.targets for b in HELD_OUT])
    values = nn.functional.cross_entropy(held_model(inputs), labels, reduction="none")
    for k in range(CLASSES):
        params = dict(held_model.named_parameters())
        grads = torch.autograd.grad(
            values[labels == k].mean(), [*params.values()], retain_graph=True
        )
        for c in range(CLASSES):
            direct = sum((g * moves[n][c]).sum() for g, n in zip(grads, params, strict=True)) / (
                1.0 - taken.split.keeps
            )
            assert_close(found[k, batch.targets == c].sum(), direct, rtol=1e-8, atol=1e-12)


def test_the_parts_of_the_layers_add_up_to_the_whole():
    whole, _, _ = kept(random_net, RULES["momentum"], weighted=True)
    layered, _, _ = kept(random_net, RULES["momentum"], weighted=True, by_layer=True)
    assert_close(layered.net, whole.net, rtol=1e-12, atol=1e-14)
    assert set(layered.layers) == {"0", "1", "4"}
    parts = torch.stack([*layered.layers.values()]).sum(0)
    assert_close(parts, layered.net[:, :-1], rtol=1e-9, atol=1e-12)
