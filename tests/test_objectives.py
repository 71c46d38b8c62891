"""Objectives made of objectives: by hand, by finite differences, and inside the training step."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close

from funcloss import losses, models, optim
from funcloss._trees import flatten
from funcloss.combinators import class_weighted
from funcloss.keys import example_keys, make_key
from funcloss.objectives import (
    fgsm,
    l1,
    l2,
    mean_of,
    multi_task,
    pgd,
    supervised,
    uncertainty_weighted,
)
from funcloss.training import init_state, make_train_step
from funcloss.typing import Batch

N, CLASSES, SHAPE = 12, 3, (1, 2, 2)
RANDOM = torch.Generator().manual_seed(4)
INPUTS = torch.randn(N, *SHAPE, generator=RANDOM, dtype=torch.float64)
BATCH = Batch(INPUTS, torch.arange(N) % CLASSES)
KEPT = torch.arange(N) % 4 != 1
MASKED = Batch(torch.where(KEPT[:, None, None, None], INPUTS, 9.0), BATCH.targets, KEPT)
KEYS = example_keys(make_key(3), torch.tensor(0), N)
EPSILON = 0.1


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


HYPER = {"learning_rate": scalar(0.1)}
criterion = mean_of(losses.cross_entropy)


def double(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2
    return model.double()


class Dropping(nn.Module):
    """BatchNorm, whose buffers move, after dropout, which draws from the examples' keys."""

    def __init__(self, norm=True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, CLASSES)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()

    def forward(self, x):
        x = F.dropout(torch.tanh(self.norm(self.fc1(x.flatten(1)))), 0.3, training=self.training)
        return self.fc2(x)


LINEAR, DROPPING = double(models.linear(SHAPE, CLASSES)), double(Dropping())
UNNORMED = double(Dropping(norm=False))


def state_of(model, optimizer=None):
    return init_state(model, optimizer or optim.sgd())


def plain(params, batch=BATCH, model=LINEAR):
    """Return the mean cross-entropy, in torch's own words."""
    logits, where = functional_call(model, params, (batch.inputs,)), batch.where
    values = F.cross_entropy(logits, batch.targets, reduction="none")
    return values.mean() if where is None else values[where].mean()


def slope(objective, params, buffers, batch=BATCH, keys=KEYS, hyper=HYPER):
    return grad(lambda p: objective(p, buffers, batch, keys, hyper)[0])(params)


def differences(function, params, h=1e-6):
    """Return the gradient by central differences, one entry at a time."""
    slopes = {name: torch.zeros_like(p) for name, p in params.items()}
    for name, p in params.items():
        for i in range(p.numel()):
            move = torch.zeros(p.numel(), dtype=p.dtype)
            move[i] = h
            up, down = ({**params, name: p + s * move.view_as(p)} for s in (1, -1))
            slopes[name].view(-1)[i] = (function(up) - function(down)) / (2 * h)
    return slopes


# -- penalties ------------------------------------------------------------------------------------


def only_weights(name):
    return name.endswith("weight")


PENALTIES = [(l1, "l1", torch.abs, torch.sign), (l2, "l2", torch.square, lambda p: 2 * p)]


@pytest.mark.parametrize("select", [None, only_weights], ids=["all", "weights"])
@pytest.mark.parametrize(("penalised", "name", "size", "tilt"), PENALTIES, ids=["l1", "l2"])
def test_a_penalty_and_its_gradient(penalised, name, size, tilt, select):
    chosen = {} if select is None else {"select": select}
    params = state_of(LINEAR).params
    objective = penalised(supervised(LINEAR, criterion), 0.25, **chosen)
    loss, (buffers, metrics) = objective(params, {}, BATCH, KEYS, HYPER)
    counted = [p for key, p in params.items() if select is None or select(key)]
    penalty = sum(size(x).item() for p in counted for x in p.flatten())
    assert metrics[name].item() == pytest.approx(penalty)
    assert loss.item() == pytest.approx(plain(params).item() + 0.25 * penalty)
    before = grad(plain)(params)
    for key, g in slope(objective, params, {}).items():
        tilted = tilt(params[key]) if select is None or select(key) else torch.zeros(())
        assert_close(g, before[key] + 0.25 * tilted)
    assert buffers == {}


@pytest.mark.parametrize(("penalised", "name"), [(l1, "l1"), (l2, "l2")])
def test_a_strength_by_name_comes_from_hyper_and_is_not_the_loss_s(penalised, name):
    params = state_of(LINEAR).params
    inner = supervised(LINEAR, criterion)  # whose loss refuses options that it does not know
    objective = penalised(inner, "decay")

    def of(decay):
        return objective(params, {}, BATCH, KEYS, {**HYPER, "decay": decay})[0]

    assert_close(of(scalar(0.5)), penalised(inner, 0.5)(params, {}, BATCH, KEYS, HYPER)[0])
    _, (_, metrics) = objective(params, {}, BATCH, KEYS, {**HYPER, "decay": scalar(0.0)})
    assert_close(grad(of)(scalar(0.5)), metrics[name])
    rates = scalar([0.0, 1.0, 2.0])
    assert_close(vmap(of)(rates), torch.stack([of(r) for r in rates]))
    with pytest.raises(TypeError, match="option 'decay' is missing"):
        objective(params, {}, BATCH, KEYS, HYPER)


def test_three_steps_of_sgd_under_l2_are_those_of_a_weight_decay_twice_as_strong():
    squared, decayed = optim.sgd(momentum=0.9), optim.sgd(momentum=0.9, weight_decay=0.2)
    inner = supervised(LINEAR, criterion)
    ours, theirs = make_train_step(l2(inner, "s"), squared), make_train_step(inner, decayed)
    one, two = state_of(LINEAR, squared), state_of(LINEAR, decayed)
    for _ in range(3):
        one, metrics = ours(one, BATCH, {**HYPER, "s": scalar(0.1)})
        two, _ = theirs(two, BATCH, HYPER)
    assert_close(one.params, two.params, rtol=1e-12, atol=1e-12)
    assert set(metrics) == {"loss", "l2"}
    assert not torch.allclose(one.params["fc.weight"], state_of(LINEAR).params["fc.weight"])


# -- attacks --------------------------------------------------------------------------------------


def signs_by_hand(params, batch=BATCH):
    """Return the signs of the loss's gradient in the inputs, (softmax(z) - onehot(y)) W."""
    logits = functional_call(LINEAR, params, (batch.inputs,))
    residual = logits.softmax(-1) - F.one_hot(batch.targets, CLASSES)
    return (residual @ params["fc.weight"]).sign().view_as(batch.inputs)


def seen_by(make, inner, state, batch=BATCH, keys=KEYS):
    """Return the inputs of each call of the inner objective whose value is used."""
    seen = []

    def watched(params, buffers, batch, keys, hyper):
        seen.append(batch.inputs)
        return inner(params, buffers, batch, keys, hyper)

    make(watched)(state.params, state.buffers, batch, keys, HYPER)
    return seen


@pytest.mark.parametrize("bounds", [None, (-0.4, scalar(0.6))], ids=["free", "bounded"])
@pytest.mark.parametrize("clean", [0.0, 0.5, 1.0])
def test_fgsm_of_a_linear_model_by_hand(clean, bounds):
    params, inner = state_of(LINEAR).params, supervised(LINEAR, criterion)
    objective = fgsm(inner, epsilon=scalar(EPSILON), clean=clean, bounds=bounds)
    loss, (_, metrics) = objective(params, {}, BATCH, KEYS, HYPER)
    attacked = INPUTS + EPSILON * signs_by_hand(params)
    attacked = attacked if bounds is None else attacked.clamp(-0.4, 0.6)
    hard = BATCH._replace(inputs=attacked)
    assert_close(metrics, {"clean_loss": plain(params), "adversarial_loss": plain(params, hard)})
    assert_close(loss, clean * plain(params) + (1 - clean) * plain(params, hard))
    # The attack is a constant: it stays where it is as the parameters are differentiated.
    of_fixed = grad(lambda p: clean * plain(p) + (1 - clean) * plain(p, hard))
    assert_close(slope(objective, params, {}), of_fixed(params))


@pytest.mark.parametrize("bounds", [None, (-0.4, 0.6)], ids=["free", "bounded"])
def test_pgd_stays_within_the_cube_and_the_bounds_and_climbs(bounds):
    state, inner = state_of(LINEAR), supervised(LINEAR, criterion)
    batch = BATCH if bounds is None else BATCH._replace(inputs=INPUTS.clamp(*bounds))

    def searching(steps):
        return lambda f: pgd(f, epsilon=EPSILON, step_size=0.03, steps=steps, bounds=bounds)

    for steps in (1, 5):
        found = seen_by(searching(steps), inner, state, batch)[-1]
        assert (found - batch.inputs).abs().amax() <= EPSILON + 1e-12
        if bounds is not None:
            assert bounds[0] <= found.amin() <= found.amax() <= bounds[1]
    still = pgd(inner, epsilon=EPSILON, step_size=0.0, steps=1, bounds=bounds)
    values = [still(state.params, {}, batch, KEYS, HYPER)[0].item()]  # at the random start
    for steps in (1, 2, 4, 8):
        climbing = pgd(inner, epsilon=EPSILON, step_size=0.02, steps=steps, bounds=bounds)
        values.append(climbing(state.params, {}, batch, KEYS, HYPER)[0].item())
    # A linear model's cross-entropy is convex in the inputs, so signed steps climb to a corner.
    assert values == sorted(values)
    assert values[-1] > plain(state.params, batch).item()


def test_the_starts_of_pgd_are_the_examples_own():
    state, inner = state_of(LINEAR), supervised(LINEAR, criterion)

    def standing(inner):
        return pgd(inner, epsilon=1.0, step_size=0.0, steps=1)

    def starts(batch, keys):
        return seen_by(standing, inner, state, batch, keys)[-1] - batch.inputs

    moves = starts(BATCH, KEYS)
    assert torch.equal(moves, starts(BATCH, KEYS))
    assert moves.flatten(1).unique(dim=0).shape[0] == N
    assert not torch.allclose(moves, starts(BATCH, KEYS + 1))
    order = torch.arange(N).flip(0)
    shuffled = starts(Batch(INPUTS[order], BATCH.targets[order]), KEYS[order])
    assert_close(shuffled, moves[order])
    many = torch.zeros(400, *SHAPE, dtype=torch.float64)
    keys = example_keys(make_key(0), torch.tensor(0), 400)
    uniform = starts(Batch(many, torch.zeros(400, dtype=torch.int64)), keys)
    assert uniform.abs().amax() <= 1
    assert abs(uniform.mean()) < 0.05  # 3.5 standard errors
    assert uniform.square().mean().item() == pytest.approx(1 / 3, abs=0.03)


def test_one_long_step_of_pgd_on_a_linear_model_ends_where_fgsm_does():
    model = double(models.linear(SHAPE, 2), seed=1)  # of two classes: the signs are those of any x
    state, inner = state_of(model), supervised(model, criterion)
    batch = BATCH._replace(targets=BATCH.targets % 2)
    far = seen_by(lambda f: pgd(f, epsilon=EPSILON, step_size=1.0, steps=1), inner, state, batch)
    near = seen_by(lambda f: fgsm(f, epsilon=EPSILON), inner, state, batch)
    assert_close(far[-1], near[1])
    assert_close((far[-1] - batch.inputs).abs(), torch.full_like(INPUTS, EPSILON))


# -- several tasks --------------------------------------------------------------------------------


def norm_of(params, buffers, batch, keys, hyper):
    size = sum(p.square().sum() for p in params.values())
    return size, (buffers, {"size": size})


TASKS = {"digit": supervised(LINEAR, criterion), "small": norm_of}


def test_tasks_are_summed_and_their_factors_come_from_hyper():
    params = state_of(LINEAR).params
    # The factor must not reach the tasks: cross-entropy refuses what it does not know.
    objective = multi_task(TASKS, {"digit": "trust", "small": 0.25})
    hyper = {**HYPER, "trust": scalar(2.0)}
    loss, (_, metrics) = objective(params, {}, BATCH, KEYS, hyper)
    square = sum(p.square().sum() for p in params.values())
    expected = {"digit": plain(params), "small": square, "small/size": square}
    assert_close(metrics, expected)
    assert_close(loss, 2 * plain(params) + 0.25 * square)
    first = grad(plain)(params)
    expected = {name: 2 * first[name] + 0.5 * p for name, p in params.items()}
    assert_close(slope(objective, params, {}, hyper=hyper), expected)
    of_trust = grad(lambda t: objective(params, {}, BATCH, KEYS, {**hyper, "trust": t})[0])
    assert_close(of_trust(scalar(2.0)), plain(params))


def test_uncertainty_weighting_by_hand_and_at_its_optimum():
    values = [scalar(v) for v in (0.3, 2.0, 5.0)]

    def task(value):
        return lambda params, buffers, batch, keys, hyper: (value, (buffers, {}))

    tasks = {f"task {i}": task(value) for i, value in enumerate(values)}
    objective = uncertainty_weighted(tasks)
    logs = scalar([0.5, -1.0, 0.0])
    params = {"log_variances": logs}
    loss, (_, metrics) = objective(params, {}, BATCH, KEYS, HYPER)
    three = torch.stack(values)
    assert_close(loss, (three / logs.exp() + logs / 2).sum())
    assert_close(metrics, dict(zip(tasks, values, strict=True)))
    ours = slope(objective, params, {})["log_variances"]
    assert_close(ours, 0.5 - three / logs.exp())
    # exp(-s) L + s / 2 is least at s = log(2 L), where it is 1/2 + log(2 L) / 2.
    best = {"log_variances": (2 * three).log()}
    assert_close(slope(objective, best, {})["log_variances"], torch.zeros(3).double())
    assert_close(objective(best, {}, BATCH, KEYS, HYPER)[0], (0.5 + (2 * three).log() / 2).sum())


# -- all of them in the step ----------------------------------------------------------------------

ATTACK = {"epsilon": EPSILON, "step_size": 0.05, "steps": 2}


def tasks_of(model):
    inner = supervised(model, criterion)
    return {"one": inner, "two": pgd(inner, **ATTACK)}


MAKE = {  # from a model to an objective
    "l1": lambda m: l1(supervised(m, criterion), 0.01),
    "l2": lambda m: l2(supervised(m, criterion), 0.01, select=only_weights),
    "fgsm": lambda m: fgsm(supervised(m, criterion), epsilon=EPSILON),
    "pgd": lambda m: pgd(supervised(m, criterion), **ATTACK),
    "multi_task": lambda m: multi_task(tasks_of(m), {"one": 1.0, "two": 0.5}),
    "uncertainty": lambda m: uncertainty_weighted(tasks_of(m)),
    "nest": lambda m: l2(fgsm(pgd(supervised(m, criterion), **ATTACK), epsilon=EPSILON), 0.01),
}


def start(name, model, optimizer):
    state = state_of(model, optimizer)
    if name != "uncertainty":
        return state
    params = {**state.params, "log_variances": scalar([0.0, 0.5])}
    return state._replace(params=params, opt_state=optimizer.init(params))


@pytest.mark.parametrize("name", MAKE)
def test_in_the_step_it_is_pure_and_moves_parameters_and_buffers(name):
    optimizer = optim.sgd(momentum=0.9)
    step = make_train_step(MAKE[name](DROPPING.train()), optimizer)
    state = start(name, DROPPING, optimizer)
    copies = {path: t.clone() for path, t in flatten(state).items()}
    after, metrics = step(state, BATCH, HYPER)
    again, _ = step(state, BATCH, HYPER)
    assert all(torch.equal(flatten(state)[path], t) for path, t in copies.items())
    assert all(torch.equal(flatten(again)[path], t) for path, t in flatten(after).items())
    assert after.buffers["norm.num_batches_tracked"] >= 1
    assert not torch.equal(after.buffers["norm.running_mean"], state.buffers["norm.running_mean"])
    del state.params["fc1.bias"]  # which BatchNorm makes idle
    assert not any(torch.equal(p, after.params[key]) for key, p in state.params.items())
    assert all(m.dim() == 0 and m.isfinite() for m in metrics.values())


def compiled_by_default(name):
    return pytest.param(name, marks=[] if name in ("l2", "pgd") else [pytest.mark.slow])


@pytest.mark.parametrize("name", [compiled_by_default(name) for name in MAKE])
def test_compiled_the_step_is_one_graph_that_gives_the_same(name):
    optimizer = optim.sgd(momentum=0.9)
    step = make_train_step(MAKE[name](DROPPING.train()), optimizer)
    state = start(name, DROPPING, optimizer)
    after, metrics = step(state, BATCH, HYPER)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    one, compiled_metrics = compiled(state, BATCH, HYPER)
    assert_close(flatten(one), flatten(after))
    assert_close(compiled_metrics, metrics)


@pytest.mark.parametrize("name", MAKE)
def test_masks_and_starts_are_the_examples_own_so_a_batch_is_a_mean(name):
    """Not so if dropout or a random start were drawn anew for each pass."""
    objective = MAKE[name](UNNORMED.train())
    params = start(name, UNNORMED, optim.sgd()).params

    def of_one(x, y, key):
        return objective(params, {}, Batch(x[None], y[None]), key[None], HYPER)[0]

    whole = objective(params, {}, BATCH, KEYS, HYPER)[0]
    mapped = vmap(of_one)(INPUTS, BATCH.targets, KEYS)
    assert_close(mapped.mean(), whole)
    assert (mapped - whole).abs().amax() > 0.01
    assert not torch.allclose(objective(params, {}, BATCH, KEYS + 1, HYPER)[0], whole, rtol=1e-6)


@pytest.mark.parametrize("name", MAKE)
def test_what_does_not_count_does_not_count(name):
    objective = MAKE[name](UNNORMED.train())
    params = start(name, UNNORMED, optim.sgd()).params
    few = Batch(INPUTS[KEPT], BATCH.targets[KEPT])
    ours = objective(params, {}, MASKED, KEYS, HYPER)[0], slope(objective, params, {}, MASKED)
    theirs = objective(params, {}, few, KEYS[KEPT], HYPER)[0]
    assert_close(ours, (theirs, slope(objective, params, {}, few, KEYS[KEPT])))


@pytest.mark.parametrize("name", MAKE)
def test_an_objective_is_the_same_after_a_pickle(name):
    objective, state = MAKE[name](DROPPING.train()), start(name, DROPPING, optim.sgd())
    again = pickle.loads(pickle.dumps(objective))
    given = (state.params, state.buffers, BATCH, KEYS, HYPER)
    assert_close(again(*given), objective(*given), rtol=0, atol=0)


def test_costs_reach_the_loss_through_every_objective():
    weights = scalar([1.0, 5.0, 0.5])
    inner = supervised(LINEAR, mean_of(class_weighted(losses.cross_entropy)))
    objective = l2(fgsm(inner, epsilon=EPSILON, clean=1.0), "s")
    params = state_of(LINEAR).params
    hyper = {**HYPER, "class_weights": weights, "s": scalar(0.0)}
    logits = functional_call(LINEAR, params, (INPUTS,))
    values = F.cross_entropy(logits, BATCH.targets, reduction="none")
    expected = (weights[BATCH.targets] * values).mean()
    assert_close(objective(params, {}, BATCH, KEYS, hyper)[0], expected)


INNER = supervised(LINEAR, criterion)


def called(objective, params):
    return objective(params, {}, BATCH, KEYS, HYPER)


REFUSED = [
    (
        lambda: called(l1(INNER, 1.0, select=lambda name: False), state_of(LINEAR).params),
        r"l1: select chooses none of the parameters \['fc.bias', 'fc.weight'\]",
    ),
    (lambda: fgsm(INNER, epsilon=-1.0), r"fgsm: epsilon must be in \[0, inf\), got -1.0"),
    (lambda: fgsm(INNER, epsilon=1.0, clean=1.5), r"fgsm: clean must be in \[0, 1\], got 1.5"),
    (
        lambda: pgd(INNER, epsilon=1.0, step_size=1.0, steps=0),
        r"pgd: steps must be in \[1, inf\), got 0",
    ),
    (lambda: pgd(INNER, epsilon=1.0, step_size=-1.0), "pgd: step_size must be"),
    (
        lambda: multi_task(TASKS, {"digit": 1.0}),
        r"objectives for \['digit', 'small'\] and factors for \['digit'\]",
    ),
    (lambda: multi_task({}, {}), "multi_task: each task must have an objective"),
    (lambda: uncertainty_weighted({}), "uncertainty_weighted: there must be an objective"),
    (
        lambda: called(uncertainty_weighted(TASKS), {}),
        r"params must hold log_variances of shape \(2,\), got none",
    ),
    (
        lambda: called(uncertainty_weighted(TASKS), {"log_variances": torch.zeros(3)}),
        r"of shape \(2,\), got shape \(3,\)",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_a_wrong_request_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("make", [lambda t: multi_task(t, dict.fromkeys(t, 1.0)),
                                  uncertainty_weighted])  # fmt: skip
def test_a_task_cannot_be_called_as_the_sum_is(make):
    with pytest.raises(ValueError, match="a task must not be called 'loss'"):
        make({"loss": TASKS["digit"]})
