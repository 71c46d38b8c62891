"""The step of every optimiser of torch.optim, against the step that torch itself takes."""

import copy
import functools
import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.testing import assert_close

from funcloss.audit.optimizers import (
    STEPS,
    LinearStep,
    bare,
    direction,
    has_direction,
    linear_step,
    why_not,
)
from funcloss.errors import AuditError

SHAPES = ((), (5,), (4, 3), (2, 3, 1, 2))
DECAY, UP = {"weight_decay": 0.1}, {"maximize": True}
DECOUPLED = DECAY | {"decoupled_weight_decay": True}
BETAS = {"betas": (0.7, 0.9), "eps": 1e-3}
MUON = hasattr(optim, "Muon")
RECENT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)


def either(*options):
    """Return every union of some of the options."""
    picks = itertools.product(*(({}, option) for option in options))
    return [functools.reduce(dict.__or__, pick, {}) for pick in picks]


MOMENTUM = {"momentum": 0.9}
NESTEROV = {"momentum": 0.8, "nesterov": True}
TABLE = {
    optim.SGD: [
        *either(DECAY, UP),
        *(MOMENTUM | more for more in either(DECAY, UP, {"dampening": 0.3})),
        *(NESTEROV | more for more in either(DECAY, UP)),
        MOMENTUM | {"foreach": True},
        MOMENTUM | {"fused": True},
    ],
    optim.Adam: [
        *either(BETAS, DECAY, UP, {"amsgrad": True}),
        {"betas": (0.0, 0.9)},
        {"foreach": True},
        {"fused": True, "amsgrad": True} | DECAY,
    ],
    optim.AdamW: [
        *either(BETAS, {"weight_decay": 0.0}, UP, {"amsgrad": True}),
        {"fused": True} | UP,
    ],
    optim.RMSprop: [
        *either(MOMENTUM, DECAY, UP, {"centered": True}),
        {"alpha": 0.5, "foreach": True},
    ],
    optim.Adagrad: [
        *either(DECAY, UP, {"lr_decay": 0.2}, {"initial_accumulator_value": 0.3}),
        {"foreach": True},
    ],
    optim.Adadelta: [*either({"rho": 0.5, "eps": 1e-3}, DECAY, UP), {"foreach": True}],
    optim.Adamax: [*either(BETAS, DECAY, UP), {"foreach": True}],
    optim.NAdam: [
        *either(BETAS, DECAY, UP, {"momentum_decay": 0.1}),
        DECOUPLED,
        DECOUPLED | UP | {"foreach": True},
    ],
    # of 0.99 and 0.999 the sixth step is the first that is rectified, and of 0.5 none is
    optim.RAdam: [
        *either({"betas": (0.7, 0.99)}, DECAY, UP),
        {"betas": (0.9, 0.5)},
        DECOUPLED,
        DECOUPLED | UP | {"foreach": True},
    ],
    optim.ASGD: [*either({"lambd": 0.1, "alpha": 0.6, "t0": 2.0}, DECAY, UP), {"foreach": True}],
}
CASES = [
    pytest.param(kind, options, id=f"{kind.__name__} {options}")
    for kind, table in TABLE.items()
    for options in table
]
EACH = pytest.mark.parametrize(("kind", "options"), CASES)
RATES = (0.1, 0.02)


def make(kind, options, dtype=torch.float64, seed=0, rates=RATES, shapes=SHAPES):
    """Return an optimiser of two groups of random parameters at two rates, and its generator."""
    gen = torch.Generator().manual_seed(seed)
    draws = [[torch.randn(shape, generator=gen, dtype=torch.float64) for shape in shapes]] * 2
    groups = [
        {"params": [nn.Parameter(x.to(dtype) + 0.1) for x in xs], "lr": rate}
        for xs, rate in zip(draws, rates, strict=True)
    ]
    return kind(groups, **options), gen


def draw(optimizer, gen):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p.dtype)


def splits(optimizer, of=linear_step):
    """Return (parameter, its gradient, its step split) of each parameter."""
    kind, state = type(optimizer), optimizer.state
    return [
        (p, p.grad, of(group, kind, state.get(p, {}), p, p.grad))
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def total(split, grad):
    rows = [split.on_gradient * grad, split.decay, split.history]
    return sum(row for row in rows if row is not None)


def assert_torch_steps_so(optimizer, gen, steps=7, relative=1e-12, eps=None):
    for _ in range(steps):
        draw(optimizer, gen)
        expected = splits(optimizer)
        before = [p.detach().clone() for p, _, _ in expected]
        optimizer.step()
        for old, (p, grad, split) in zip(before, expected, strict=True):
            u = total(split, grad)
            assert u.dtype == split.on_gradient.dtype == p.dtype
            rounding = 4 * (eps or torch.finfo(p.dtype).eps) * old.abs().max()
            assert u.norm() > 0
            assert (p.detach() - old - u).abs().max() <= relative * u.norm() + rounding


@EACH
def test_the_step_is_that_of_torch(kind, options):
    assert_torch_steps_so(*make(kind, options))


@EACH
def test_the_step_is_that_of_torch_in_single_precision(kind, options):
    assert_torch_steps_so(*make(kind, options, torch.float32), relative=1e-5)


def test_radam_is_tried_before_and_after_it_is_rectified():
    optimizer, gen = make(optim.RAdam, {})
    seen = []
    for _ in range(7):
        draw(optimizer, gen)
        _, _, split = splits(optimizer)[1]
        seen.append(split.on_gradient.dim())
        optimizer.step()
    assert seen == [0] * 5 + [1] * 2  # a factor per element once it is


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_after_many_steps_and_from_a_saved_state(kind):
    optimizer, gen = make(kind, {})
    for _ in range(60):
        draw(optimizer, gen)
        optimizer.step()
    other, _ = make(kind, {}, seed=1)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_torch_steps_so(other, gen, steps=2)


@EACH
def test_nothing_is_changed(kind, options):
    optimizer, gen = make(kind, options)
    for _ in range(2):
        draw(optimizer, gen)
        optimizer.step()
    draw(optimizer, gen)
    known = set(optimizer.state)
    before = copy.deepcopy([*optimizer.state.values(), *optimizer.param_groups])
    grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
    splits(optimizer)
    assert_close([*optimizer.state.values(), *optimizer.param_groups], before, rtol=0, atol=0)
    assert_close([p.grad for g in optimizer.param_groups for p in g["params"]], grads)
    assert set(optimizer.state) == known


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_parts_that_add_up_to_the_gradient_have_steps_that_add_up(kind):
    optimizer, gen = make(kind, DECAY)
    for _ in range(3):
        draw(optimizer, gen)
        for p, grad, split in splits(optimizer):
            parts = torch.randn(4, *p.shape, generator=gen, dtype=p.dtype)
            parts[-1] = grad - parts[:-1].sum(0)
            rows = split.on_gradient * parts
            others = [row for row in (split.decay, split.history) if row is not None]
            assert rows.shape == parts.shape
            assert all(row.shape == p.shape for row in others)
            assert_close(rows.sum(0) + sum(others), total(split, grad))
        optimizer.step()


def without(optimizer, options):
    """Return the same optimiser at the same parameters and memory, with other options."""
    other = copy.deepcopy(optimizer)
    for group in other.param_groups:
        group |= options
    for p, q in zip(
        *([p for g in o.param_groups for p in g["params"]] for o in (optimizer, other)), strict=True
    ):
        q.grad = p.grad.clone()
    return other


def moved(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in params]
    optimizer.step()
    return [p.detach() - old for p, old in zip(params, before, strict=True)]


# Where the statistics do not see the decay, it is what torch does with it less without it.
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.SGD, DECAY),
        (optim.SGD, DECAY | NESTEROV | UP),
        (optim.SGD, DECAY | MOMENTUM | {"dampening": 0.4}),
        (optim.AdamW, DECAY),
        (optim.AdamW, DECAY | UP | {"amsgrad": True}),
        (optim.NAdam, DECOUPLED),
        (optim.RAdam, DECOUPLED),
    ],
    ids=str,
)
def test_weight_decay_is_what_torch_does_with_it_less_without(kind, options):
    optimizer, gen = make(kind, options)
    for _ in range(4):
        draw(optimizer, gen)
        rows = [split.decay for _, _, split in splits(optimizer)]
        plain = moved(without(optimizer, {"weight_decay": 0.0}))
        for row, u, v in zip(rows, moved(optimizer), plain, strict=True):
            assert_close(row, u - v, rtol=1e-9, atol=1e-14)


# Where no statistic depends on the gradient, history is what torch does at a gradient of 0.
@pytest.mark.parametrize("options", [MOMENTUM, NESTEROV, MOMENTUM | {"dampening": 0.4} | UP])
def test_history_of_sgd_is_its_step_on_no_gradient(options):
    optimizer, gen = make(optim.SGD, options)
    draw(optimizer, gen)
    assert all(split.history is None for _, _, split in splits(optimizer))
    optimizer.step()
    draw(optimizer, gen)
    rows = [split.history for _, _, split in splits(optimizer)]
    still = without(optimizer, {})
    for group in still.param_groups:
        for p in group["params"]:
            p.grad.zero_()
    for row, u in zip(rows, moved(still), strict=True):
        assert_close(row, u, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    "kind", [optim.Adam, optim.Adamax, optim.NAdam, optim.RAdam], ids=lambda k: k.__name__
)
def test_history_of_moments_is_the_step_less_that_without_the_first(kind):
    optimizer, gen = make(kind, {})
    for _ in range(6):
        draw(optimizer, gen)
        optimizer.step()
    draw(optimizer, gen)
    rows = [split.history for _, _, split in splits(optimizer)]
    forgetful = without(optimizer, {})
    for state in forgetful.state.values():
        state["exp_avg"].zero_()
    for row, u, v in zip(rows, moved(optimizer), moved(forgetful), strict=True):
        assert_close(row, u - v, rtol=1e-9, atol=1e-14)


def test_no_decay_and_no_memory_are_none():
    for kind in (optim.SGD, optim.Adam, optim.Adagrad, optim.Adadelta):
        optimizer, gen = make(kind, {})
        draw(optimizer, gen)
        assert all(s.decay is None and s.history is None for _, _, s in splits(optimizer))


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
@pytest.mark.skipif(not RECENT, reason="torch's own steps take no such tensors")
def test_tensors_as_options(kind):
    rates = [torch.tensor(rate, dtype=torch.float64) for rate in RATES]
    assert_torch_steps_so(*make(kind, {}, rates=rates))
    assert_torch_steps_so(*make(kind, {}, rates=[rate.reshape(1) for rate in rates]))


def test_tensors_as_betas():
    betas = tuple(torch.tensor(beta, dtype=torch.float64) for beta in (0.7, 0.9))
    for kind in (optim.Adam, optim.AdamW):
        assert_torch_steps_so(*make(kind, {"betas": betas, "foreach": False}))


CAPTURABLE = (
    optim.Adam,
    optim.AdamW,
    optim.RMSprop,
    optim.Adadelta,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.ASGD,
)


@pytest.mark.parametrize("kind", CAPTURABLE, ids=lambda kind: kind.__name__)
@pytest.mark.skipif(not RECENT, reason="AdamW has a module of its own")
def test_capturable(kind, monkeypatch):
    """As on an accelerator, where torch and the audit compute with numbers that are tensors."""
    name = "adam" if kind is optim.AdamW else kind.__name__.lower()
    module = importlib.import_module(f"torch.optim.{name}")
    allow = "_get_capturable_supported_devices"
    monkeypatch.setattr(module, allow, lambda supports_xla=True: ["cpu"])
    monkeypatch.setattr("funcloss.audit.optimizers._number", lambda x: x)
    options = {"capturable": True, "foreach": False}
    optimizer, gen = make(kind, options | DECAY)
    # of float32, as these numbers are
    assert_torch_steps_so(optimizer, gen, steps=8, relative=1e-5, eps=1e-7)
    assert all(state["step"].dtype == torch.float32 for state in optimizer.state.values())


def sparse(p, gen, rows):
    index = torch.randperm(len(p), generator=gen)[:rows].repeat(2)  # each row twice
    values = torch.randn(len(index), *p.shape[1:], generator=gen, dtype=p.dtype)
    return torch.sparse_coo_tensor(index[None], values, p.shape, check_invariants=True)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's, of its own tensors
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.SGD, {}),
        (optim.SGD, MOMENTUM),
        (optim.SGD, NESTEROV | UP),
        (optim.Adagrad, {"lr_decay": 0.1} | UP),
    ],
    ids=str,
)
def test_sparse_gradients(kind, options):
    gen = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(6, 2, generator=gen, dtype=torch.float64))
    optimizer = kind([p], lr=0.1, **options)
    for _ in range(5):
        p.grad = sparse(p, gen, 3)
        ((_, grad, split),) = splits(optimizer)
        before = p.detach().clone()
        optimizer.step()
        assert p.grad.is_sparse
        rows = (split.on_gradient, split.decay, split.history)
        assert {row.layout for row in rows if row is not None} == {torch.strided}
        assert_close(total(split, grad.to_dense()), p.detach() - before, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.__name__)
def test_half_precision_is_computed_in_single(kind, dtype):
    optimizer, gen = make(kind, {}, dtype)
    for _ in range(2):
        draw(optimizer, gen)
        optimizer.step()
    draw(optimizer, gen)
    expected = splits(optimizer)
    twin, _ = make(kind, {}, torch.float32)
    twin.load_state_dict(optimizer.state_dict())  # which casts to the parameters' dtype
    pairs = zip(expected, (p for g in twin.param_groups for p in g["params"]), strict=True)
    for (p, _, _), q in pairs:
        q.data.copy_(p.detach())
        q.grad = p.grad.float()
    for (_, grad, split), u, q in zip(
        expected, moved(twin), (p for g in twin.param_groups for p in g["params"]), strict=True
    ):
        assert split.on_gradient.dtype == torch.float32
        assert_close(
            total(split, grad.float()), u, rtol=1e-4, atol=3e-7 * q.detach().abs().max().item()
        )


def test_nesterov_with_dampening_set_later():
    optimizer, gen = make(optim.SGD, NESTEROV | DECAY)
    for group in optimizer.param_groups:
        group["dampening"] = 0.3  # refused when it is made, and taken later
    assert_torch_steps_so(optimizer, gen)


def test_adagrad_of_an_empty_memory_begins_as_torch_does():
    optimizer, gen = make(optim.Adagrad, {"initial_accumulator_value": 0.3, "lr_decay": 0.2})
    draw(optimizer, gen)
    expected = splits(optimizer)
    optimizer.state.clear()
    for (_, _, split), (_, _, begun) in zip(expected, splits(optimizer), strict=True):
        assert_close(begun.on_gradient, split.on_gradient)


def test_parameters_that_joined_late_have_their_own_age():
    optimizer, gen = make(optim.Adam, DECAY)
    late = optimizer.param_groups[0]["params"][1]
    for _ in range(3):
        draw(optimizer, gen)
        late.grad = None
        optimizer.step()
    assert late not in optimizer.state
    assert_torch_steps_so(optimizer, gen, steps=2)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        [optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.NAdam, optim.RAdam, optim.Adamax]
    ),
    st.floats(1e-3, 1.0),
    st.floats(0.0, 0.95),
    st.floats(0.1, 0.99),
    st.floats(0.0, 0.5),
    st.booleans(),
    st.integers(0, 9),
)
def test_any_options(kind, rate, first, second, decay, maximize, seed):
    options = {"weight_decay": decay, "maximize": maximize}
    if kind is optim.SGD:
        options |= {"momentum": first, "dampening": second}
    elif kind is optim.RMSprop:
        options |= {"momentum": first, "alpha": second}
    else:
        options |= {"betas": (first, second)}
    made = make(kind, options, seed=seed, rates=(rate, rate / 2), shapes=((3,),))
    assert_torch_steps_so(*made, steps=4, relative=1e-11)


# What cannot be split.


class Renamed(optim.AdamW):
    """As AdamW."""


class Overriding(optim.Adam):
    @torch.no_grad()
    def step(self, closure=None):
        return super().step(closure)


class Lion(optim.Optimizer):
    """The published rule, as in the appendix of its paper."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                first = state.setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * (beta1 * first + (1 - beta1) * p.grad).sign())
                state["exp_avg"] = beta2 * first + (1 - beta2) * p.grad


def test_why_not():
    p = nn.Parameter(torch.zeros(2, 2))
    for kind in TABLE:
        assert why_not(kind([p])) == "", kind
        assert not has_direction(kind([p]))
    for kind in (
        optim.Rprop,
        optim.LBFGS,
        optim.SparseAdam,
        getattr(optim, "Adafactor", optim.Rprop),
    ):
        name = kind.__name__
        assert why_not(kind([p])) == (
            f"the step of {name} is not known: see the gradient, or add {name} to "
            "funcloss.audit.optimizers.STEPS"
        )
        assert not has_direction(kind([p]))
    assert why_not(Renamed([p])) == ""
    assert why_not(Overriding([p])).startswith("Overriding overrides the step of Adam: see the")
    assert "enters its sign" in why_not(Lion([p]))
    assert has_direction(Lion([p]))
    assert "complex" in why_not(optim.Adam([p.detach().to(torch.complex64)]))
    with pytest.raises(AuditError, match="linear_step: the step of Rprop is not known"):
        linear_step({}, optim.Rprop, {}, p, p)
    with pytest.raises(AuditError, match="linear_step: the step of Lion is not linear"):
        linear_step({}, Lion, {}, p, p)
    with pytest.raises(AuditError, match=r"expected Lion or torch\.optim\.Muon, got SGD"):
        direction({}, optim.SGD, {}, p, p)


def test_muon_is_not_needed(monkeypatch):
    """Of torch before 2.9, which has none."""
    monkeypatch.delattr(optim, "Muon", raising=False)
    p = nn.Parameter(torch.zeros(2, 2))
    assert why_not(optim.Adam([p])) == ""
    assert "Rprop is not known" in why_not(optim.Rprop([p]))


def test_adamw_of_earlier_torch_does_not_say_that_it_is_decoupled():
    p = torch.tensor([1.0, -2.0], dtype=torch.float64)
    optimizer = optim.AdamW([p], lr=0.1, weight_decay=0.5)
    group = {**optimizer.param_groups[0]}
    group.pop("decoupled_weight_decay", None)
    p.grad = torch.tensor([0.3, 0.2], dtype=torch.float64)
    for kind in (optim.AdamW, Renamed):
        split = linear_step(group, kind, {}, p, p.grad)
        assert_close(split.decay, -0.1 * 0.5 * p)
    before = p.clone()
    optimizer.step()
    assert_close(total(split, p.grad), p - before)


def test_subclasses_are_their_base():
    assert_torch_steps_so(*make(Renamed, {}))  # with AdamW's decay

    class Base(optim.NAdam):
        @torch.no_grad()
        def step(self, closure=None): ...

    class Early(Base): ...

    STEPS[Base] = STEPS[optim.NAdam]
    try:
        assert why_not(Early([torch.zeros(2)])) == ""  # before torch has wrapped the base's step
        assert why_not(Base([torch.zeros(2)])) == ""
        assert why_not(Early([torch.zeros(2)])) == ""
    finally:
        del STEPS[Base]


def test_memory_of_another_make_is_refused():
    p = torch.ones(2)
    group = optim.Adam([p]).param_groups[0]
    with pytest.raises(AuditError, match="step of Adam cannot be read: .* 'exp_avg_sq'"):
        linear_step(group, optim.Adam, {"step": torch.ones(()), "state1": p}, p, p)
    with pytest.raises(AuditError, match="step of Lion cannot be read: .* 'betas'"):
        direction({"lr": 1.0}, Lion, {}, p, p)


def test_own_optimisers_can_be_added():
    def step(options, state, p, grad):
        assert type(options["lr"]) is float
        return LinearStep(-options["lr"] / grad.abs(), None, None)

    class SignSGD(optim.Optimizer):
        def __init__(self, params, lr=0.1):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad.sign())

    assert why_not(SignSGD([torch.zeros(2)])) != ""
    STEPS[SignSGD] = step
    try:
        assert why_not(SignSGD([torch.zeros(2)])) == ""
        assert_torch_steps_so(*make(SignSGD, {}))
    finally:
        del STEPS[SignSGD]


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_direction_of_lion_has_the_sign_of_its_step(decay):
    optimizer, gen = make(Lion, {"weight_decay": decay})
    for _ in range(4):
        draw(optimizer, gen)
        found = splits(optimizer, direction)
        before = [p.detach().clone() for p, _, _ in found]
        rates = [group["lr"] for group in optimizer.param_groups for _ in group["params"]]
        optimizer.step()
        for old, rate, (p, grad, split) in zip(before, rates, found, strict=True):
            assert split.decay is None
            u = p.detach() - old + rate * decay * old
            assert_close(u, rate * total(split, grad).sign(), rtol=1e-9, atol=1e-14)


@pytest.mark.skipif(not MUON, reason="this torch has no Muon")
@pytest.mark.parametrize("options", either({"nesterov": False}, {"momentum": 0.6}), ids=str)
def test_direction_of_muon_is_what_it_makes_orthogonal(options):
    from torch.optim._muon import _zeropower_via_newtonschulz

    options = options | {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizer, gen = make(optim.Muon, options, torch.float32, shapes=((4, 3), (2, 5)))
    assert "enters its orthogonalisation" in why_not(optimizer)
    assert has_direction(optimizer)
    for _ in range(4):
        draw(optimizer, gen)
        found = splits(optimizer, direction)
        before = [p.detach().clone() for p, _, _ in found]
        rates = [group["lr"] for group in optimizer.param_groups for _ in group["params"]]
        optimizer.step()
        for old, rate, (p, grad, split) in zip(before, rates, found, strict=True):
            assert split.decay is None
            entering = total(split, grad)
            polar = _zeropower_via_newtonschulz(entering, (3.4445, -4.775, 2.0315), 5, 1e-7)
            u = p.detach() - old + rate * 0.1 * old
            expected = 0.2 * max(p.shape) ** 0.5 * rate * polar.float()
            assert_close(u, expected, rtol=0.02, atol=0.02 * rate)  # in bfloat16
            # and not merely its polar: the momentum that torch holds next gives it exactly
            held = optimizer.state[p]["momentum_buffer"]
            m = options.get("momentum", 0.95)
            after = held if "nesterov" in options else grad.lerp(held, m)
            assert_close(entering, -rate * after)


# Wrappers.


class AcceleratedOptimizer:
    def __init__(self, optimizer):
        self.optimizer = optimizer


class OptimWrapper:
    def __init__(self, opt):
        self.opt = opt


def test_bare():
    from pytorch_lightning.core.optimizer import LightningOptimizer

    inner = optim.Adam([torch.zeros(2)])
    subclass = type("Prepared", (AcceleratedOptimizer,), {})
    for wrapped in (
        inner,
        AcceleratedOptimizer(inner),
        OptimWrapper(inner),
        LightningOptimizer(inner),
        subclass(OptimWrapper(LightningOptimizer(inner))),
    ):
        assert bare(wrapped) is inner
        assert why_not(wrapped) == ""
    strange = OptimWrapper(None)
    assert bare(strange) is strange
    assert "OptimWrapper is not known" in why_not(strange)
