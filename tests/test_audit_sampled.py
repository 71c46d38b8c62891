"""The ledger by some of the steps: what it expects to find, how sure it is, and that it resumes."""

import pytest
import test_audit_ledger as whole
import torch
from torch.testing import assert_close

from funcloss import class_weighted, losses, optim
from funcloss._trees import flatten
from funcloss.audit import ledger as whole_ledger
from funcloss.audit import make_ledger, make_sampled_ledger
from funcloss.audit import sampled as sampled_ledger
from funcloss.audit.sampling import every_for, every_within, geometric
from funcloss.objectives import mean_of, supervised
from funcloss.training import init_state, make_train_step

SEEDS = 40


class Training:
    """A training, and the ledgers of it."""

    def __init__(self, make, rule, *, steps, rate=0.05, loss=losses.cross_entropy):
        self.model, self.rule, self.steps = whole.made(make), rule, steps
        self.criterion = mean_of(class_weighted(losses.cross_entropy))
        self.hyper = {
            "learning_rate": torch.tensor(rate).double(),
            "class_weights": whole.WEIGHTS,
        }
        step = make_train_step(supervised(self.model, self.criterion), rule)
        shared = (self.model, self.criterion, rule, whole.HELD_OUT, loss)
        self.exact = make_ledger(*shared, classes=whole.NAMES)
        self.make = lambda **more: make_sampled_ledger(*shared, classes=whole.NAMES, **more)
        state, self.states, self.ledgers = init_state(self.model, rule), [], []
        ledger = self.exact.init(state)
        for number in range(steps):
            self.states.append(state)
            self.ledgers.append(ledger)
            after, _ = step(state, whole.batch_of(number), self.hyper)
            ledger = self.exact.update(ledger, state, whole.batch_of(number), self.hyper, after)
            state = after
        self.states.append(state)
        self.ledgers.append(ledger)

    def sampled(self, every, *, first=0, last=None, ledger=None, **more):
        """Return the ledger of the steps from ``first`` on, handed on or begun there."""
        keeper = self.make(**more)
        ledger = ledger or keeper.init(self.states[first])
        for number in range(first, self.steps if last is None else last):
            before, after = self.states[number : number + 2]
            batch = whole.batch_of(number)
            ledger = keeper.update(ledger, before, batch, self.hyper, after, every)
        return ledger


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (whole.plain_net, optim.sgd(weight_decay=0.01)),
        (whole.random_net, optim.adamw(betas=(0.0, 0.99), weight_decay=0.1)),
    ],
    ids=["sgd", "adamw without momentum, batch normalisation"],
)
def test_every_step_on_all_examples_is_the_whole_ledger(make, rule, monkeypatch):
    monkeypatch.setattr(sampled_ledger, "_CLOSES", whole_ledger._CLOSES)  # in as many pieces
    training = Training(make, rule, steps=6)
    found = training.sampled(1, per_class=100)
    expected = training.ledgers[-1]
    assert_close(found.net, expected.net, rtol=1e-9, atol=1e-12)
    assert int(found.sampling.samples) == 6
    judged = training.make().judge(found, training.states[-1])
    assert_close(judged.now, expected.now)


KINDS = {
    "sgd": (whole.plain_net, optim.sgd(), {}),
    "momentum, decay": (whole.plain_net, optim.sgd(momentum=0.9, weight_decay=0.01), {}),
    "adamw": (whole.plain_net, optim.adamw(weight_decay=0.1), {"rate": 0.02}),
    "batch normalisation, handed on": (whole.random_net, optim.sgd(momentum=0.9), {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_true_entries_lie_within_two_standard_errors(kind):
    make, rule, more = KINDS[kind]
    training = Training(make, rule, steps=60, **more)
    first = 5 if "handed" in kind else 0
    ledger = training.ledgers[first] if first else None
    found = [
        training.sampled(4, first=first, ledger=ledger, per_class=3, seed=seed)
        for seed in range(SEEDS)
    ]
    _check(found, training.ledgers[-1])


def test_the_true_entries_lie_within_two_standard_errors_of_a_linear_model():
    rule = optim.sgd(momentum=0.5)
    training = Training(whole.linear_net, rule, steps=16, loss=whole.score)
    found = [training.sampled(2, per_class=3, seed=seed) for seed in range(SEEDS)]
    _check(found, training.ledgers[-1])


def _check(found, true):
    nets = torch.stack([ledger.net for ledger in found])
    errors = torch.stack([ledger.standard_error for ledger in found])
    live = true.net.abs() > 1e-12
    within = ((nets - true.net).abs() <= 2 * errors)[:, live].double().mean()
    assert 0.9 <= within <= 0.99
    of_mean = nets.std(0) / SEEDS**0.5
    apart = ((nets.mean(0) - true.net) / of_mean)[live]
    assert apart.square().mean() < 4.0  # 1 in expectation; entries go together
    sums = torch.stack([ledger.net.sum(1) for ledger in found])
    of_sums = torch.stack([ledger.variance_of_sum.sqrt() for ledger in found])
    assert ((sums - true.net.sum(1)).abs() <= 2 * of_sums).double().mean() > 0.85
    assert not nets[:, ~live].any()


def test_a_ledger_goes_on_from_its_tensors_to_the_bit():
    training = Training(whole.random_net, optim.sgd(momentum=0.9), steps=24)
    unbroken = training.sampled(3, seed=5)
    half = training.sampled(3, last=11, seed=5)
    copied = half._replace(
        **{name: getattr(half, name).clone() for name in ("raised", "lowered", "variance")}
    )
    resumed = training.sampled(3, first=11, ledger=copied, seed=5)
    plain = [flatten(ledger._asdict()) for ledger in (unbroken, resumed)]
    assert_close(*plain, rtol=0, atol=0)


def test_a_step_that_is_not_drawn_looks_at_nothing():
    training = Training(whole.plain_net, optim.sgd(), steps=2)
    keeper = training.make(seed=3)
    ledger = keeper.init(training.states[0])
    ledger = keeper.update(ledger, training.states[0], whole.batch_of(0), training.hyper,
                           training.states[1], 10**6)  # fmt: skip
    again = keeper.update(ledger, None, None, None, None, 1)  # within the block of a million
    assert int(again.steps) == 2


@pytest.mark.parametrize("keeps", [0.0, 0.5, 0.9])
def test_delays_have_the_probabilities_of_the_memory(keeps):
    generator = torch.Generator().manual_seed(0)
    delays = torch.tensor([geometric(keeps, generator) for _ in range(4_000)])
    for delay in range(4):
        assert abs(float((delays == delay).double().mean()) - (1 - keeps) * keeps**delay) < 0.03


@pytest.mark.parametrize("cost", [0.5, 3.0])
def test_blocks_keep_to_a_share_of_the_time(cost):
    """Of trainings whose steps take 0.01 s: one of unknown length, one of 10,000 steps."""
    spent, samples, steps = 0.0, 0, 0
    while steps < 50_000:
        steps += every_for(0.1, spent, 0.01 * steps, steps, samples)
        spent, samples = spent + cost, samples + 1
    assert spent <= 0.1 * 0.01 * steps + cost
    assert samples >= 0.8 * 0.1 * 500 / cost
    spent, steps, budget = 0.0, 0, 0.1 * 100
    while steps < 10_000:
        steps += every_within(budget - spent, cost, 10_000 - steps)
        spent += cost * (steps <= 10_000)
    assert spent <= budget + cost
