import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

from funcloss import models, optim
from funcloss._trees import flatten

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
    from funcloss.app.data import get_batch, load_dataset

    dataset = load_dataset("mnist-sample")
    index = torch.randperm(4000, generator=torch.Generator().manual_seed(0))
    batch = get_batch(dataset, dataset.train, index[: 50 * 20])
    return batch.inputs.double(), batch.targets


def make_net():
    torch.manual_seed(0)
    return models.fast_cnn().double()


@pytest.mark.slow
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


# A step as the sum of the steps of its gradient's parts.

SPLITS = {
    **{name: ours for name, (ours, _) in TWINS.items()},
    "sgd nesterov without decay": optim.sgd(momentum=0.9, nesterov=True),
    "sgd dampened without decay": optim.sgd(momentum=0.9, dampening=0.3),
    "sgd dampened to nothing": optim.sgd(momentum=0.9, dampening=1.0),
}
PARTS, STEPS = 3, 5


def parts_of(number):
    """Return parts of a gradient, the last of them 0 after two steps; one tensor is idle."""
    generator = torch.Generator().manual_seed(number)
    shapes = {"w": (2, 3), "v": (4,), "idle": (2,)}
    parts = {
        name: torch.randn(PARTS, *shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    parts["idle"] *= 0.0
    if number > 1:
        parts = {name: torch.cat([p[:-1], 0.0 * p[-1:]]) for name, p in parts.items()}
    return parts


def rate_of(number):
    return torch.tensor(0.1 / (1 + number), dtype=torch.float64)


def split_steps(optimizer):
    """Yield each of several steps: what ``split.steps`` was given, what it gave, and ``update``."""
    split = optimizer.split
    params = {name: p[0].clone() + 1.0 for name, p in parts_of(99).items()}
    state = optimizer.init(params)
    memory = {
        name: torch.zeros(PARTS + 1, *m.shape, dtype=m.dtype)
        for name, m in split.memory(state).items()
    }
    for number in range(STEPS):
        parts, rate = parts_of(number), rate_of(number)
        grads = {name: p.sum(0) for name, p in parts.items()}
        added, moved = split.decay(params, rate)
        nothing = {name: torch.zeros_like(p) for name, p in params.items()}
        rows = {n: torch.cat([p, added.get(n, nothing[n])[None]]) for n, p in parts.items()}
        whole = {name: g + added.get(name, nothing[name]) for name, g in grads.items()}
        steps, later = split.steps(rows, memory, whole, state, rate)
        moves, after = optimizer.update(grads, state, params, rate)
        total = {name: s.sum(0) + moved.get(name, nothing[name]) for name, s in steps.items()}
        yield rows, memory, whole, state, rate, steps, later, total, moves, after
        memory, state = later, after
        params = {name: p + moves[name] for name, p in params.items()}


@pytest.mark.parametrize("optimizer", SPLITS.values(), ids=SPLITS.keys())
def test_the_steps_of_the_parts_sum_to_the_step_and_their_memory_to_the_memory(optimizer):
    seen = 0
    for *_, memory, total, moves, after in split_steps(optimizer):
        assert total.keys() == moves.keys()
        for name, move in moves.items():
            assert_close(total[name], move, rtol=1e-12, atol=1e-12)
        whole = optimizer.split.memory(after)
        assert memory.keys() == whole.keys()
        for name, m in whole.items():
            assert_close(memory[name].sum(0), m, rtol=1e-12, atol=1e-12)
        seen += 1
    assert seen == STEPS


@pytest.mark.parametrize("optimizer", SPLITS.values(), ids=SPLITS.keys())
def test_the_step_of_a_part_is_linear_in_the_part_and_its_memory_and_hangs_on_no_other(optimizer):
    for rows, memory, whole, state, rate, steps, later, *_ in split_steps(optimizer):
        factor = torch.tensor([1.0, -2.0, 0.0, 5.0], dtype=torch.float64)

        def scaled(tree, factor=factor):
            return {n: factor.reshape(-1, *(1,) * (t.dim() - 1)) * t for n, t in tree.items()}

        moved, kept = optimizer.split.steps(scaled(rows), scaled(memory), whole, state, rate)
        pairs = [(moved, scaled(steps)), (kept, scaled(later))]
        together = {n: torch.stack([r[0] + r[1], r[2]]) for n, r in rows.items()}
        before = {n: torch.stack([m[0] + m[1], m[2]]) for n, m in memory.items()}
        moved, kept = optimizer.split.steps(together, before, whole, state, rate)
        for found, of in ((moved, steps), (kept, later)):
            pairs.append((found, {n: torch.stack([r[0] + r[1], r[2]]) for n, r in of.items()}))
        for found, expected in pairs:
            assert found.keys() == expected.keys()
            for name, row in expected.items():
                assert_close(found[name], row, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("optimizer", SPLITS.values(), ids=SPLITS.keys())
def test_a_split_writes_nothing_in_place_and_takes_no_part_at_all(optimizer):
    for rows, memory, whole, state, rate, *_ in split_steps(optimizer):
        given = [*rows.values(), *memory.values(), *whole.values(), *optimizer.split.memory(
            state).values()]  # fmt: skip
        before = [t.clone() for t in given]
        optimizer.split.steps(rows, memory, whole, state, rate)
        assert all(map(torch.equal, before, given))
        none, empty = ({n: t[:0] for n, t in tree.items()} for tree in (rows, memory))
        steps, _ = optimizer.split.steps(none, empty, whole, state, rate)
        assert {n: s.shape for n, s in steps.items()} == {n: r.shape for n, r in none.items()}


@pytest.mark.parametrize(
    ("optimizer", "invariant"),
    [
        (optim.adam(), True),
        (optim.adamw(weight_decay=0.1), True),
        (optim.sgd(), False),
        (optim.sgd(momentum=0.9, nesterov=True), False),
    ],
)
def test_an_optimiser_states_whether_a_factor_on_the_gradients_changes_its_steps(
    optimizer, invariant
):
    params, rate = {"w": torch.tensor([2.0, -1.0], dtype=torch.float64)}, torch.tensor(0.1)
    ends = []
    for factor in (1.0, 1000.0):
        state = optimizer.init(params)
        for g in ([1.0, -2.0], [0.5, 3.0]):
            grads = {"w": factor * torch.tensor(g, dtype=torch.float64)}
            step, state = optimizer.update(grads, state, params, rate)
        ends.append(step["w"])
    assert torch.allclose(*ends, rtol=1e-6) == optimizer.scale_invariant == invariant


def test_a_part_that_stops_lives_on_in_its_memory_only():
    ratios = {}
    for name, optimizer in (("momentum", optim.sgd(momentum=0.9)), ("adam", optim.adam())):
        kept = [later["w"][2].norm() for *_, later, _, _, _ in split_steps(optimizer)]
        ratios[name] = [float(b / a) for a, b in zip(kept[1:], kept[2:], strict=False)]
    assert ratios["momentum"] == pytest.approx([0.9] * 3, rel=1e-12)
    assert ratios["adam"] == pytest.approx([0.9] * 3, rel=1e-12)
    plain = [steps["w"][2].norm() for *_, steps, _, _, _, _ in split_steps(optim.sgd())]
    assert [float(s) > 0 for s in plain] == [True, True, False, False, False]


def test_weight_decay_is_through_the_gradient_or_beside_it_and_never_both():
    params, rate = {"w": torch.tensor([2.0])}, torch.tensor(0.1)
    for make in (optim.sgd, optim.adam):
        added, moved = make(weight_decay=0.5).split.decay(params, rate)
        assert (added["w"].item(), moved) == (1.0, {})
        assert make(weight_decay=0.0).split.decay(params, rate) == ({}, {})
    added, moved = optim.adamw(weight_decay=0.5).split.decay(params, rate)
    assert added == {}
    assert moved["w"].item() == pytest.approx(-0.1)
    assert optim.adamw(weight_decay=0.0).split.decay(params, rate) == ({}, {})


def test_an_optimiser_that_does_not_say_how_it_splits_is_usable(digits):
    from funcloss import losses, objectives, training
    from funcloss.audit import StepSpec, audit, make_audit_step
    from funcloss.typing import Batch

    def update(grads, state, params, learning_rate):
        return {name: -learning_rate * g.sign() for name, g in grads.items()}, state

    own = optim.Optimizer(lambda params: {}, update)
    assert own.split is None
    inputs, labels = digits
    batch = Batch(inputs[:20], labels[:20])
    net = models.linear((1, 28, 28), 10).double()
    step = training.make_train_step(
        objectives.supervised(net, objectives.mean_of(losses.cross_entropy)), own
    )
    hyper = {"learning_rate": torch.tensor(0.01, dtype=torch.float64)}
    state = training.init_state(net, own)
    after, _ = step(state, batch, hyper)
    assert after.step == 1
    found = audit(net, state, losses.cross_entropy, [batch], step=StepSpec(own, 0.01))
    assert found.step is None
    assert any("does not say how its step is made up" in note for note in found.notes)
    audit_step = make_audit_step(net, losses.cross_entropy, own, classes=tuple("0123456789"))
    findings, memory = audit_step(state, batch, hyper, None)
    assert (findings.step, memory) == (None, {})
    assert_close(findings.balance.share, found.balance.share)


# Compiled they are what they are: inductor has patterns of its own where a gradient is a product.

COMPILED = {
    "sgd": (
        optim.sgd,
        [{"weight_decay": w} for w in (0.0, 0.1)]
        + [
            {"momentum": 0.9, "weight_decay": w} | more
            for w in (0.0, 0.1)
            for more in ({}, {"dampening": 0.3}, {"nesterov": True})
        ],
    ),
    **{
        name: (
            make,
            [
                {"betas": betas, "eps": eps, "weight_decay": w}
                for betas in ((0.9, 0.999), (0.0, 0.5))
                for eps in (1e-8, 1e-2)
                for w in (0.0, 0.1)
            ],
        )
        for name, make in (("adam", optim.adam), ("adamw", optim.adamw))
    },
}
SCHEDULES = {
    "constant": None,
    "step": optim.step_decay(every=2, factor=0.5),
    "cosine": optim.cosine(steps=6),
    "one-cycle": optim.one_cycle(steps=6),
}
COMPILED_NETS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(25, 6), nn.Tanh(), nn.Linear(6, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 2), nn.Flatten(), nn.Linear(8, 3)
    ),
}


def compiled_is_eager(net, optimizer, clip_norm, schedule):
    """Compare five steps of a training, each from the same state."""
    from funcloss import losses, objectives, training
    from funcloss.typing import Batch

    torch.manual_seed(0)
    torch.compiler.reset()
    model = COMPILED_NETS[net]().double()
    objective = objectives.supervised(model, objectives.mean_of(losses.cross_entropy))
    step = training.make_train_step(
        objective, optimizer, clip_norm=clip_norm, schedule=SCHEDULES[schedule]
    )
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    state = training.init_state(model, optimizer)
    batch = Batch(torch.randn(8, 1, 5, 5, dtype=torch.float64), torch.arange(8) % 3)
    hyper = {"learning_rate": torch.tensor(0.1, dtype=torch.float64)}
    for _ in range(5):
        got = flatten(compiled(state, batch, hyper)[0])
        state, _ = step(state, batch, hyper)
        for name, expected in flatten(state).items():
            assert_close(got[name], expected, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(
    ("net", "optimizer", "clip_norm", "schedule"),
    [
        ("linear", optim.sgd(momentum=0.9), 0.0, "constant"),
        ("linear", optim.adamw(betas=(0.7, 0.9)), 0.1, "one-cycle"),
        ("convolution", optim.sgd(momentum=0.9, nesterov=True, weight_decay=0.1), 0.0, "constant"),
    ],
    ids=["sgd with momentum", "adamw", "nesterov"],
)
def test_compiled_five_steps_are_those_of_eager(net, optimizer, clip_norm, schedule):
    compiled_is_eager(net, optimizer, clip_norm, schedule)


@pytest.mark.slow
@pytest.mark.parametrize("net", COMPILED_NETS)
@pytest.mark.parametrize(
    ("name", "options"), [(n, o) for n, (_, table) in COMPILED.items() for o in table], ids=str
)
def test_compiled_every_option_is_what_it_is_in_eager(net, name, options):
    compiled_is_eager(net, COMPILED[name][0](**options), 0.0, "constant")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("clip_norm", [0.0, 0.1])
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("net", COMPILED_NETS)
def test_compiled_clipping_and_schedules_are_what_they_are_in_eager(net, name, clip_norm, schedule):
    make, table = COMPILED[name]
    compiled_is_eager(net, make(**table[-1]), clip_norm, schedule)
