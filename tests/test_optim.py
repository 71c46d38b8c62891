import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

from funcloss import models, optim

RATE = 0.05
TWINS = {
    f"{name} {options}": (ours(**options), lambda ps, t=theirs, o=options: t(ps, lr=RATE, **o))
    for name, ours, theirs, table in (
        (
            "sgd",
            optim.sgd,
            torch.optim.SGD,
            [
                {},
                {"weight_decay": 0.1},
                {"momentum": 0.9},
                {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
                {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            ],
        ),
        (
            "adam",
            optim.adam,
            torch.optim.Adam,
            [{}, {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1}, {"betas": (0.0, 0.9)}],
        ),
        (
            "adamw",
            optim.adamw,
            torch.optim.AdamW,
            [{}, {"betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1}, {"weight_decay": 0.0}],
        ),
    )
    for options in table
}


@pytest.fixture(scope="module")
def digits():
    """A real net and real digits, in double precision."""
    from funcloss.data import load_dataset, take

    dataset = load_dataset("mnist-sample")
    index = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    batch = take(dataset, dataset.train, index[: 50 * 20])
    return batch.inputs.double(), batch.targets


def make_net():
    torch.manual_seed(0)
    return models.fast_cnn().double()


@pytest.mark.parametrize(("optimizer", "make_twin"), TWINS.values(), ids=TWINS.keys())
def test_fifty_steps_are_those_of_the_twin(digits, optimizer, make_twin):
    inputs, labels = digits
    net = make_net()
    params = {name: p.detach().clone() for name, p in net.named_parameters()}
    state = optimizer.init(params)
    twin = make_twin(net.parameters())
    rate = torch.tensor(RATE, dtype=torch.float64)

    def loss(params, x, y):
        return F.cross_entropy(functional_call(net, params, (x,)), y)

    for x, y in zip(inputs.split(20), labels.split(20), strict=True):
        moves, state = optimizer.update(grad(loss)(params, x, y), state, params, rate)
        params = {name: p + moves[name] for name, p in params.items()}
        twin.zero_grad()
        F.cross_entropy(net(x), y).backward()
        twin.step()
    assert state.step == 50
    for name, p in net.named_parameters():
        assert (params[name] - p.detach()).norm() <= 1e-9 * p.detach().norm()


def quadratic(params):
    """A bowl with a flat direction: one parameter never gets a gradient."""
    return (
        (params["w"] ** 4).sum() / 4 + (params["w"] * params["v"]).sum() + 0 * params["idle"].sum()
    )


def start():
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return dict(zip(("w", "v", "idle"), draw, strict=True))


def after_three_steps(optimizer, rate, params, clip=0.0):
    state = optimizer.init(params)
    for _ in range(3):
        grads = grad(quadratic)(params)
        if clip:
            grads = optim.clip_by_global_norm(grads, clip)
        moves, state = optimizer.update(grads, state, params, rate)
        params = {name: p + moves[name] for name, p in params.items()}
    return quadratic(params)


OPTIMIZERS = [
    optim.sgd(momentum=0.9, dampening=0.1, weight_decay=0.1),
    optim.sgd(momentum=0.9, nesterov=True),
    optim.adam(weight_decay=0.1),
    optim.adamw(weight_decay=0.1),
]
NAMES = ["sgd", "nesterov", "adam", "adamw"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=NAMES)
def test_mapped_over_learning_rates_is_a_loop(optimizer):
    rates = torch.tensor([0.001, 0.01, 0.1], dtype=torch.float64)
    params = start()
    mapped = vmap(lambda rate: after_three_steps(optimizer, rate, params))(rates)
    loop = torch.stack([after_three_steps(optimizer, rate, params) for rate in rates])
    assert_close(mapped, loop, rtol=1e-12, atol=0)


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=NAMES)
def test_differentiated_through_three_steps_is_finite_differences(optimizer, clip):
    rate = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda rate: after_three_steps(optimizer, rate, start(), clip), rate
    )
    params = start()
    w = params["w"].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: after_three_steps(optimizer, rate.detach(), {**params, "w": w}, clip), w
    )


def test_nothing_is_written_in_place():
    params, optimizer = start(), optim.adam(weight_decay=0.1)
    state = optimizer.init(params)
    grads = grad(quadratic)(params)
    before = [t.clone() for t in (*params.values(), *grads.values(), *state.first.values())]
    optimizer.update(grads, state, params, torch.tensor(0.1))
    after = [*params.values(), *grads.values(), *state.first.values()]
    assert all(map(torch.equal, before, after))


def test_single_precision_keeps_the_first_bias_correction_exact():
    params = {"w": torch.tensor([1.0])}
    optimizer = optim.adam()
    moves, _ = optimizer.update(
        {"w": torch.tensor([1e-4])}, optimizer.init(params), params, torch.tensor(1.0)
    )
    assert_close(moves["w"], torch.tensor([-1.0]), rtol=1e-3, atol=0)


def test_clipping_is_torchs():
    grads = {"a": torch.randn(5, 3), "b": torch.randn(7)}
    for limit in (0.1, 1.0, 100.0):
        twin = [nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
        for p, g in zip(twin, grads.values(), strict=True):
            p.grad = g.clone()
        nn.utils.clip_grad_norm_(twin, limit)
        clipped = optim.clip_by_global_norm(grads, limit)
        for p, g in zip(twin, clipped.values(), strict=True):
            assert_close(g, p.grad)


def test_clipping_no_gradient_at_all_is_none():
    zero = {"w": torch.zeros(3)}
    assert (optim.clip_by_global_norm(zero, 1.0)["w"] == 0).all()
    slope = grad(lambda w: optim.global_norm({"w": w}))(torch.zeros(3))
    assert (slope == 0).all()


def rates_of(make_scheduler, steps):
    twin = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(twin)
    rates = []
    for _ in range(steps):
        rates.append(twin.param_groups[0]["lr"])
        twin.step()
        scheduler.step()
    return torch.tensor(rates)


SCHEDULES = {
    "constant": (optim.constant(), lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
    "step": (
        optim.step_decay(every=7, factor=0.3),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 7, 0.3),
    ),
    "cosine": (
        optim.cosine(steps=40, final=0.1),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40, 0.1),
    ),
    "one-cycle": (
        optim.one_cycle(steps=40, warmup=0.25),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 1.0, total_steps=40, pct_start=0.25, cycle_momentum=False
        ),
    ),
}


@pytest.mark.parametrize(("schedule", "make_scheduler"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_schedules_are_those_of_torch(schedule, make_scheduler):
    ours = torch.stack([schedule(torch.tensor(step)) for step in range(40)])
    assert_close(ours, rates_of(make_scheduler, 40), rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("steps", [2, 3, 4, 10])
def test_one_cycle_is_finite_and_within_bounds_in_a_run_of_a_few_steps(steps):
    schedule = optim.one_cycle(steps=steps)
    factors = torch.stack([schedule(torch.tensor(step)) for step in range(steps + 2)])
    assert factors.isfinite().all()
    assert (factors > 0).all()
    assert (factors <= 1).all()


REFUSED = [
    (lambda: optim.sgd(momentum=1.0), r"sgd: momentum must be in \[0, 1.0\), got 1.0"),
    (lambda: optim.sgd(nesterov=True), "sgd: nesterov needs momentum above 0"),
    (lambda: optim.sgd(weight_decay=-1.0), "sgd: weight_decay must be"),
    (lambda: optim.adam(betas=(0.9, 1.0)), "adam: betas must be"),
    (lambda: optim.adamw(eps=-1.0), "adamw: eps must be"),
    (lambda: optim.step_decay(every=0), "step_decay: every must be at least 1"),
    (lambda: optim.cosine(steps=0), "cosine: steps must be at least 1"),
    (lambda: optim.one_cycle(steps=1), "one_cycle: steps must be at least 2"),
    (lambda: optim.one_cycle(steps=9, warmup=1.0), "one_cycle: warmup must be between 0 and 1"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_a_wrong_request_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
