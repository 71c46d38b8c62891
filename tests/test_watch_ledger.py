"""The ledger that a watch keeps of a loop of torch.optim, against that of the pure step."""

import socket

import pytest
import test_watch_loops as loops
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from funcloss import class_weighted, losses, optim
from funcloss.audit import LedgerOptions, make_ledger, watch
from funcloss.audit import watch_ledger as module
from funcloss.audit.optimizers import STEPS as STEPS_OF_TORCH
from funcloss.audit.optimizers import LinearStep
from funcloss.errors import ConfigError
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


@pytest.mark.parametrize(
    "options", [EXACT, pytest.param(EACH, marks=pytest.mark.slow)], ids=["exact", "sampled"]
)
@pytest.mark.parametrize(
    ("loop", "notes"), loops.LOOPS, ids=[loop.__name__ for loop, _ in loops.LOOPS]
)
def test_a_loop_with_a_ledger_is_left_as_it_is(loop, notes, options):
    """To the bit, and what is found is what it is without the ledger."""
    _, alone = loop(loops.started(""))
    generator = torch.get_rng_state()

    def start(make, **more):
        model = loops.make_model()
        optimizer = make(model)
        held_out = [loops.batch_of(100, 20), loops.batch_of(101, 9)]
        more = {"classes": 3, **more, "held_out": held_out, "ledger": options}
        return model, optimizer, loops.Loop("through", model, optimizer, **more)

    seen, model = loop(start)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_close(model.state_dict(), alone.state_dict(), rtol=0, atol=0)
    for found, expected in zip(seen.notes, notes, strict=True):
        expected = expected[1] if isinstance(expected, tuple) else expected
        assert expected in found if expected else not found
    watched, note = seen.watched, LEDGER_NOTES.get(loop.__name__, "")
    if options is EACH and loop is loops.grown:
        note = "the ledger ends after 1 steps: the momentum grew, or 0.weight joined"
    assert note in watched.ledger_note if note else not watched.ledger_note
    if options is EXACT and "ends" not in note and "between" not in note:
        assert watched.ledger.residual < 0.02
        assert int(watched.ledger.steps) >= len(notes)


WITHOUT = "a step without class parts is in 'other gradient'"
LEDGER_NOTES = {
    "lbfgs": "ends after 0 steps: the step of LBFGS is not known",
    "frozen_in_a_step": "ends after 0 steps: One of the differentiated Tensors",
    "thawed_in_a_step": "ends after 0 steps: what is trained changed within the step",
    "a_loss_that_is_no_number": "ends after 1 steps: the loss is not finite",
    "labels_of_another_shape": "ends after 0 steps: watch: groups must be integers",
    "fractions": "ends after 0 steps: watch: groups must be integers",
    "stepped_twice": WITHOUT,
    "an_empty_batch": WITHOUT,
    "two_optimisers": "parameters were changed between two steps",
    "reset": "parameters were changed between two steps",
}


@pytest.mark.parametrize("make", [net, normed])
def test_a_sampled_ledger_of_every_step_is_the_exact_one_without_momentum(make):
    def short(p):  # steps that either takes in one piece
        return SGD(p, lr=0.002, weight_decay=0.1)

    sampled, _ = watched_training(make, short, EACH)
    exact, _ = watched_training(make, short)
    assert_close(sampled.ledger.net, exact.ledger.net, rtol=1e-9, atol=1e-12)
    assert_close(sampled.ledger.now, exact.ledger.now)
    assert int(sampled.ledger.sampling.samples) == STEPS


def score(logits, labels):
    """Linear in the logits: the integral along a step of a linear model is exact."""
    return -logits.take_along_dim(labels[:, None], 1)[:, 0]


def varied(options, kind, steps=14):
    """Return the ledger of a training whose momentum differs by group and by step."""
    model = made(lambda: nn.Linear(4, CLASSES))
    groups = [{"params": [model.weight]}, {"params": [model.bias], **GROUPS[kind]}]
    rule = RULES[kind](groups)
    watched = watch(
        model, rule, classes=NAMES, held_out=HELD_OUT, held_out_loss=score, ledger=options
    )
    for number in range(steps):
        rule.param_groups[0].update(CYCLES[kind](number))
        train(model, rule, watched, number)
    assert not watched.ledger_note
    return watched.ledger


RULES = {
    "sgd": lambda groups: SGD(groups, lr=0.05, momentum=0.8, weight_decay=0.1),
    "adam": lambda groups: ADAM(groups, lr=0.02, betas=(0.8, 0.99), weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.01, momentum=0.8),
}
GROUPS = {"sgd": {"momentum": 0.3}, "adam": {"betas": (0.3, 0.99)}, "rmsprop": {"momentum": 0.0}}
CYCLES = {
    "sgd": lambda n: {"momentum": 0.8 - 0.1 * min(n % 8, 8 - n % 8)},
    "adam": lambda n: {"betas": (0.8 - 0.1 * min(n % 8, 8 - n % 8), 0.99)},
    "rmsprop": lambda n: {},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
def test_a_sampled_ledger_is_unbiased_where_momentum_differs_by_group_and_step(kind):
    true = varied(EXACT, kind).net
    assert_close(true.sum(1), varied(EXACT, kind).now - varied(EXACT, kind).begin)
    nets = torch.stack([
        varied(LedgerOptions("sampled", torch.inf, 1000, seed=seed), kind).net
        for seed in range(60)
    ])  # fmt: skip
    live = true.abs() > 1e-9
    apart = (nets.mean(0) - true)[live] / (nets.std(0) / len(nets) ** 0.5)[live]
    assert apart.square().mean() < 3.0  # 1 in expectation; entries go together
    assert apart.abs().max() < 4.5


MANY = {
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.02, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.02, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.02, weight_decay=0.1),
    "amsgrad, to the maximum": lambda p: ADAM(p, lr=0.02, amsgrad=True, maximize=True),
    "sgd, dampened": lambda p: SGD(p, lr=0.05, momentum=0.9, dampening=0.5, weight_decay=0.1),
    "sgd, to the maximum": lambda p: SGD(p, lr=0.05, momentum=0.9, maximize=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.8, weight_decay=0.1),
    "rmsprop, centred": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.8, centered=True),
    "rmsprop from no rate": lambda p: torch.optim.RMSprop(p, lr=0.0, momentum=0.8),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
}


@pytest.mark.parametrize("name", MANY)
def test_each_class_has_a_memory_of_its_own_under_every_optimiser(name):
    """All that moves is the classes' and decay's, and nothing is history from the beginning."""
    model = made(lambda: nn.Linear(4, CLASSES))
    rule = MANY[name](model.parameters())
    watched = watch(
        model, rule, classes=NAMES, held_out=HELD_OUT, held_out_loss=score, ledger="exact"
    )
    for number in range(STEPS):
        train(model, rule, watched, number)
        if number == 1 and "no rate" in name:
            rule.param_groups[0]["lr"] = 0.01
    ledger = watched.ledger
    assert not watched.ledger_note
    assert_close(ledger.net.sum(1), ledger.now - ledger.begin, rtol=1e-6, atol=1e-9)
    for column, part in enumerate(watched.ledger_parts):
        if part in ("history", "statistics", "other gradient"):
            assert ledger.net[:, column].abs().max() < 1e-9
        if part == "weight decay":
            decays = any(g["weight_decay"] for g in rule.param_groups)
            assert bool(ledger.net[:, column].any()) == decays


def test_a_memory_that_is_not_known_is_one_column():
    class Heavy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            return super().step(closure)

    def heavy(options, state, p, grad):
        velocity = state.get("momentum_buffer") if state else None
        history = None if velocity is None else -options["lr"] * options["momentum"] * velocity
        return LinearStep(p.new_tensor(-options["lr"]), None, history)

    STEPS_OF_TORCH[Heavy] = heavy
    try:
        exact, _ = watched_training(net, lambda p: Heavy(p, lr=0.05, momentum=0.9))
        sampled, _ = watched_training(net, lambda p: Heavy(p, lr=0.05, momentum=0.9), EACH)
    finally:
        del STEPS_OF_TORCH[Heavy]
    assert exact.ledger_note == "the memory of Heavy is one column, 'history'"
    assert exact.ledger.net[:, exact.ledger_parts.index("history")].abs().min() > 1e-4
    assert exact.ledger.residual < 0.02
    assert "use ledger='exact'" in sampled.ledger_note
    assert sampled.ledger.now.isnan().all()


def test_a_ledger_that_begins_within_a_training_calls_what_was_before_history():
    model = made(net)
    rule = SGD(model.parameters(), lr=0.05, momentum=0.9)
    first = watch(model, rule)
    for number in range(3):
        train(model, rule, first, number)
    first.close()
    watched = watch(model, rule, classes=NAMES, held_out=HELD_OUT, ledger="exact")
    for number in range(3, 6):
        train(model, rule, watched, number)
    assert watched.ledger.net[:, watched.ledger_parts.index("history")].abs().min() > 1e-4
    assert watched.ledger.residual < 0.02


@pytest.mark.parametrize("options", [EXACT, EACH], ids=["exact", "sampled"])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_ledger_goes_on_from_its_state_to_the_bit(name, options):
    whole, _ = watched_training(normed, PAIRS[name][0], options, entry="through")
    model = made(normed)
    rule = PAIRS[name][0](model.parameters())
    arguments = {"classes": NAMES, "held_out": HELD_OUT, "ledger": options}
    first = watch(model, rule, **arguments)
    for number in range(3):
        train(model, rule, first, number, entry="through")
    state = {n: t.clone() for n, t in first.ledger_state().items()}
    first.close()
    again = watch(model, rule, **arguments)
    again.load_ledger(state)
    for number in range(3, STEPS):
        train(model, rule, again, number, entry="through")
    for name in ("net", "variance", "begin", "now", "steps"):
        assert torch.equal(getattr(again.ledger, name), getattr(whole.ledger, name))
    other = watch(model, rule, classes=4, held_out=HELD_OUT, ledger=options)
    with pytest.raises(ConfigError, match="the state is of another ledger"):
        other.load_ledger(state)
    with pytest.raises(ConfigError, match="it keeps no ledger"):
        watch(model, rule).load_ledger(state)


def test_groups_may_be_other_than_labels():
    model = made(net)
    rule = SGD(model.parameters(), lr=0.05)
    watched = watch(
        model, rule, classes=("left", "right"), held_out=[tuple(b[:2]) for b in HELD_OUT],
        ledger="exact", group_by=lambda batch: (batch.inputs[:, 0] > 1.0).long(),
    )  # fmt: skip
    inputs, labels, *_ = batch_of(0)
    values = F.cross_entropy(model(inputs), labels, reduction="none")
    watched.backward(values, (inputs[:, 0] > 1.0).long())
    rule.step()
    assert watched.ledger.net.shape == (2, 6)
    assert watched.ledger.residual < 0.02
    assert watched.ledger.net[:, :2].abs().min() > 0


def test_classes_that_share_a_row_are_beside_the_others():
    watched, _ = watched_training(net, PAIRS["sgd"][0], memory=1e-3)
    assert "memory= holds some classes' gradients" in watched.ledger_note
    assert watched.ledger.net[:, 3].abs().max() > 1e-3
    assert watched.ledger.residual < 0.02


def test_labels_beyond_the_classes_end_the_ledger():
    model = made(net)
    rule = SGD(model.parameters(), lr=0.05)
    inputs, labels, *_ = batch_of(0)
    watched = watch(model, rule, held_out=(inputs, labels.clamp(max=1)), ledger="exact")
    train(model, rule, watched, 0)
    assert watched.found.note == ""
    assert "labels must be below 2, got 2: give watch classes=" in watched.ledger_note


def test_bfloat16_is_the_trainings_and_not_the_held_out_losses():
    model = made(net).float()
    rule = SGD(model.parameters(), lr=0.05, momentum=0.9)
    held_out = [Batch(b.inputs.float(), b.targets) for b in HELD_OUT]
    watched = watch(model, rule, classes=NAMES, held_out=held_out, ledger="exact")
    begin = held_out_losses(model, held_out)
    for number in range(STEPS):
        inputs, labels, *_ = batch_of(number)
        with torch.autocast("cpu", torch.bfloat16):
            predictions = model(inputs.float())
            values = F.cross_entropy(predictions, labels, reduction="none")
            rule.zero_grad()
            watched.backward(values, labels)
            rule.step()
    assert not watched.ledger_note
    assert watched.ledger.residual < 0.02
    assert_close(watched.ledger.begin, begin)
    assert_close(watched.ledger.now, held_out_losses(model, held_out))


def held_out_losses(model, held_out):
    with torch.no_grad():
        inputs, labels = (torch.cat([b[i] for b in held_out]) for i in (0, 1))
        values = F.cross_entropy(model(inputs), labels, reduction="none").double()
    return torch.stack([values[labels == c].mean() for c in range(CLASSES)])


class Unheard(nn.Module):
    """Gives no tensor."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, CLASSES)

    def forward(self, inputs):
        return {"logits": self.inner(inputs)}


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (net, {"held_out": []}, "there are no held-out examples"),
        (net, {"held_out": HELD_OUT, "ledger": "all"}, r"must be one of \('sampled', 'exact'\)"),
        (net, {"held_out": HELD_OUT, "classes": 2}, "labels must be in 0..1, got 2"),
        (net, {"held_out": [3]}, r"a batch must be \(inputs, targets\)"),
        (Unheard, {"held_out": HELD_OUT}, "the model must give one tensor, got a dict"),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), net()),
            {"held_out": HELD_OUT},
            "keeps no running statistics",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(make, arguments, message):
    model = made(make)
    rule = SGD(model.parameters(), lr=0.05)
    with pytest.raises(ConfigError, match=message):
        watch(model, rule, **arguments)
    assert not rule._optimizer_step_pre_hooks


def test_a_sampled_ledger_keeps_to_its_share_of_the_time(monkeypatch):
    """By a clock that moves by half a second a step, and by one where held-out losses are taken."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    original = module.with_perhaps

    def slow(ledger, held, take, every, **more):
        asked = []
        found = original(ledger, held, lambda by: asked.append(1) or take(by), every, **more)
        now[0] += 1.0 * bool(asked)
        return found

    monkeypatch.setattr(module, "with_perhaps", slow)
    model = made(lambda: nn.Linear(4, CLASSES))
    rule = SGD(model.parameters(), lr=0.05)
    watched = watch(model, rule, classes=NAMES, held_out=HELD_OUT, every=10**6)
    for number in range(600):
        train(model, rule, watched, number % 7)
        now[0] += 0.5
    samples = int(watched.ledger.sampling.samples)
    assert 20 <= samples <= 33  # of 300 seconds a tenth, and two that it always has
    assert not watched.ledger_note


# Several processes ---

RANKS = 2


def rank_ledger(rank, port, into, options, failing):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    model = nn.parallel.DistributedDataParallel(made(net))
    rule = SGD(model.parameters(), lr=0.05, momentum=0.9)
    watched = watch(model, rule, classes=NAMES, held_out=HELD_OUT, ledger=options, every=4)
    for number in range(STEPS):
        if failing and rank == 1 and number == 3:
            watched._ledger._held = None
        inputs, labels, *_ = batch_of(number)
        mine = slice(rank, None, RANKS)
        values = F.cross_entropy(model(inputs[mine]), labels[mine], reduction="none")
        rule.zero_grad()
        watched.backward(WEIGHTS[labels[mine]] * values, labels[mine])
        rule.step()
    kept = watched.ledger
    torch.save((kept.net, kept.now, int(kept.steps), watched.ledger_note), f"{into}/{rank}")
    torch.distributed.destroy_process_group()


def ranks(tmp_path, options, failing=False):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_ledger, (port, str(tmp_path), options, failing), RANKS)
    return [torch.load(tmp_path / str(rank)) for rank in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("options", [EXACT, EACH], ids=["exact", "sampled"])
def test_two_processes_keep_the_ledger_that_one_does(tmp_path, options):
    first, second = ranks(tmp_path, options)
    one, _ = watched_training(net, lambda p: SGD(p, lr=0.05, momentum=0.9), options)
    for net_found, now, steps, note in (first, second):
        assert (steps, note) == (STEPS, "")
        assert_close(net_found, one.ledger.net, rtol=1e-6, atol=1e-8)
        assert_close(now, one.ledger.now)
    assert torch.equal(first[0], second[0])


@pytest.mark.slow
def test_a_ledger_that_ends_in_one_process_ends_in_all(tmp_path):
    first, second = ranks(tmp_path, EXACT, failing=True)
    assert "the ledger ends after" in second[3]
    assert "in another process" in first[3]
