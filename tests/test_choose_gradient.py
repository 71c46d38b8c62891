import copy
import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.func import grad, jacfwd, jacrev, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from funcloss import class_weighted, losses, models, optim
from funcloss._trees import flatten
from funcloss.app.data import get_batch
from funcloss.objectives import make_forward, mean_of, supervised
from funcloss.sensitivity import (
    CostGradient,
    _differentiable_batch_norm,
    cost_gradient,
    gradient_sentences,
    mean_expected_cost,
    unrolled_cost,
)
from funcloss.training import init_state, make_train_step
from funcloss.transforms import quiet_jvp

CLASSES = 10
H = 1e-6  # small, so that hardly a kink of a rectifier or of max pooling lies within
EPS = torch.finfo(torch.float64).eps


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 5, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout2d(0.25),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(108, CLASSES),
    )


def batch_norm_net():
    # Without biases before the norms: their gradients are rounding, which Adam makes steps of.
    return nn.Sequential(
        nn.Conv2d(1, 3, 5, stride=3, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192, CLASSES, bias=False),
        nn.BatchNorm1d(CLASSES, momentum=0.3, affine=False),
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(28, 4, batch_first=True)
        self.head = nn.Linear(28, CLASSES)

    def forward(self, x):
        rows = x[:, 0]
        return self.head(self.mix(rows, rows, rows, need_weights=False)[0].mean(1))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(256, CLASSES)

    def forward(self, x):
        return self.bag((x.flatten(1) * 10).clamp(0, 255).long())


class Scaled(nn.Module):
    """A linear classifier with a parameter that is a scalar."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.fc = nn.Linear(784, CLASSES)

    def forward(self, x):
        return self.scale * self.fc(x.flatten(1))


MODELS = {
    "linear": models.linear,
    "conv": conv_net,
    "batch norm": batch_norm_net,
    "attention": Attention,
    "bag": Bag,
    "scaled": Scaled,
}
OPTIMIZERS = {
    "sgd": (optim.sgd(momentum=0.9), 0.05, {}),
    "clipped sgd": (optim.sgd(momentum=0.9), 0.05, {"clip_norm": 0.5}),
    "adam": (optim.adam(), 0.01, {}),
    "adamw": (optim.adamw(weight_decay=0.1), 0.01, {"clip_norm": 0.5}),
}


class Problem(NamedTuple):
    """The arguments of ``unrolled_cost``, in order."""

    train_step: object
    state: object
    batches: list
    validation_cost: object
    hyper: dict


def as_dtype(tree, dtype):
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def costly_nine(dtype=torch.float64):
    costs = 1.0 - torch.eye(CLASSES, dtype=dtype)
    costs[9] *= 10.0
    return costs


@pytest.fixture
def make_problem(sample):
    """Return what makes a problem of real digits, seeded, from a state that has trained."""

    def make(
        model="linear",
        optimizer="sgd",
        k=3,
        loss=None,
        dtype=torch.float64,
        warm=5,
        **hyper,
    ):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1)

        def draw(part, n):
            index = torch.randint(len(part.labels), (n,), generator=generator)
            return as_dtype(get_batch(sample, part, index), dtype)

        net = MODELS[model]().to(dtype)
        update, rate, options = OPTIMIZERS[optimizer]
        loss = loss or class_weighted(losses.cross_entropy)
        step = make_train_step(supervised(net, mean_of(loss)), update, **options)
        hyper = as_dtype({"learning_rate": torch.tensor(rate), **hyper}, dtype)
        if len(hyper) == 1:
            weights = torch.rand(CLASSES, generator=generator, dtype=torch.float64)
            hyper["class_weights"] = (weights + 0.5).to(dtype)
        state = init_state(net, update)
        for _ in range(warm):
            state, _ = step(state, draw(sample.train, 16), hyper)
        judged = draw(sample.validation, 32)
        cost = mean_expected_cost(
            make_forward(net.eval()), judged.inputs, judged.targets, costly_nine(dtype)
        )
        return Problem(step, state, [draw(sample.train, 16) for _ in range(k)], cost, hyper)

    return make


def plain_cost(problem, name, value):
    """The cost after the same steps, as a training takes them."""
    state, hyper = problem.state, {**problem.hyper, name: value}
    for batch in problem.batches:
        state, _ = problem.train_step(state, batch, hyper)
    return problem.validation_cost(state.params, state.buffers)


def central(function, value, direction, h):
    return float(function(value + h * direction) - function(value - h * direction)) / (2 * h)


def check_by_differences(problem, name, gradient, directions=2):
    """Compare slopes along random directions with those of trainings at other values.

    A central difference errs by its truncation, ``h^2 f''' / 6``, a third of its change from ``h``
    to ``2h``, and by the rounding of two costs over ``2h``. That is taken as 512 units in the last
    place: ten steps of Adam through BatchNorm need a few hundred, all else less than 64.
    """
    generator = torch.Generator().manual_seed(2)
    value = problem.hyper[name]
    room = 512 * EPS * max(1.0, float(plain_cost(problem, name, value))) / (2 * H)
    for _ in range(directions):
        direction = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        direction = direction / direction.norm()
        near, far = (
            central(lambda v: plain_cost(problem, name, v), value, direction, h) for h in (H, 2 * H)
        )
        allowed = room + abs(far - near)
        assert abs(float((gradient * direction).sum()) - near) <= allowed
        # or the comparison would say nothing
        assert allowed <= 1e-3 * float(gradient.norm())


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", ["linear", "conv", "batch norm"])
def test_the_gradient_is_that_of_whole_trainings(make_problem, model, optimizer, k):
    problem = make_problem(model, optimizer, k)
    reverse = cost_gradient(*problem)
    forward = cost_gradient(*problem, transform=jacfwd)
    assert_close(forward, reverse, rtol=1e-9, atol=1e-13)
    here = plain_cost(problem, "class_weights", problem.hyper["class_weights"])
    assert_close(reverse.cost, here, rtol=1e-12, atol=0.0)
    check_by_differences(problem, "class_weights", reverse.gradient)


NAMED = {
    "learning_rate": (None, {}),
    "class_weights": (class_weighted(losses.softmax_focal), {"class_weights": torch.ones(10)}),
    "gamma": (losses.softmax_focal, {"gamma": torch.tensor(1.5)}),
    "cost_matrix": (losses.softmax_margin, {"cost_matrix": costly_nine()}),
}


@pytest.mark.parametrize("name", NAMED)
def test_anything_in_hyper_has_a_gradient(make_problem, name):
    loss, hyper = NAMED[name]
    problem = make_problem("conv", "adam", 3, loss, **hyper)
    reverse, forward = (cost_gradient(*problem, name=name, transform=t) for t in (grad, jacfwd))
    assert reverse.gradient.shape == problem.hyper[name].shape
    assert_close(forward, reverse, rtol=1e-9, atol=1e-13)
    check_by_differences(problem, name, reverse.gradient)


def test_attention_is_differentiated_twice(make_problem):
    problem = make_problem("attention")
    reverse = cost_gradient(*problem)
    assert_close(cost_gradient(*problem, transform=jacfwd), reverse, rtol=1e-9, atol=1e-13)
    check_by_differences(problem, "class_weights", reverse.gradient)


def test_a_backward_pass_that_is_mapped_over_gives_the_same_or_the_way_out(make_problem):
    problem = make_problem("conv")
    if torch.__version__.startswith("2.6."):
        with pytest.raises(NotImplementedError, match=r"take transform=torch\.func\.grad"):
            cost_gradient(*problem, transform=jacrev)
    else:
        mapped = cost_gradient(*problem, transform=jacrev)
        assert_close(mapped, cost_gradient(*problem), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("model", ["linear", "conv", "batch norm"])
def test_every_transform_applies(make_problem, model):
    problem = make_problem(model)
    cost_of = unrolled_cost(*problem)
    value = problem.hyper["class_weights"]
    values = torch.stack([value, 2.0 * value, value.flip(0)])
    each = torch.stack([plain_cost(problem, "class_weights", v) for v in values])
    assert_close(vmap(cost_of)(values), each, rtol=1e-11, atol=0.0)
    with quiet_jvp():
        hessian = jacfwd(grad(cost_of))(value)
    assert_close(hessian, hessian.T, rtol=1e-8, atol=1e-12 * float(hessian.norm()))
    direction = torch.linspace(-1.0, 1.0, CLASSES, dtype=torch.float64)
    up, down = (grad(cost_of)(value + sign * 1e-5 * direction) for sign in (1, -1))
    # Truncation and rounding of a slope of slopes, each about 1e-10 at this step.
    assert_close(hessian @ direction, (up - down) / 2e-5, rtol=1e-6, atol=1e-9)


NORMS = {
    "images": lambda: (nn.BatchNorm2d(3), (6, 3, 5, 4)),
    "rows, no affine": lambda: (nn.BatchNorm1d(3, affine=False), (6, 3)),
    "sequences, own momentum": lambda: (nn.BatchNorm1d(3, momentum=0.4), (6, 3, 5)),
    "untracked": lambda: (nn.BatchNorm2d(3, track_running_stats=False), (6, 3, 5, 4)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dtype", "room"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)],
    ids=str,
)
@pytest.mark.parametrize("norm", NORMS)
def test_batches_are_normalised_as_torch_does(norm, dtype, room, training):
    torch.manual_seed(0)
    layer, shape = NORMS[norm]()
    layer = layer.to(torch.float64 if dtype == torch.float64 else torch.float32)
    inputs = (2.0 * torch.randn(shape, dtype=torch.float64) + 3.0).to(dtype)
    layer(inputs.flip(0))  # so that no statistics are those at the beginning
    twin = copy.deepcopy(layer).train(training)
    expected = layer.train(training)(inputs)
    with _differentiable_batch_norm():
        outputs = twin(inputs)
    assert outputs.dtype == dtype
    assert_close(outputs, expected, rtol=room, atol=8 * room)
    assert_close(twin.state_dict(), layer.state_dict(), rtol=room, atol=room)


@pytest.mark.parametrize("transform", [grad, jacfwd])
def test_the_result_is_detached_and_of_the_dtype_that_came(make_problem, transform):
    problem = make_problem("scaled", dtype=torch.float32)
    state = tree_map_only(
        torch.Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), problem.state
    )
    hyper = {name: t.clone().requires_grad_() for name, t in problem.hyper.items()}
    before = {path: t.detach().clone() for path, t in flatten(state).items()}
    result = cost_gradient(*problem._replace(state=state, hyper=hyper), transform=transform)
    assert all(not t.requires_grad for t in result)
    assert all(t.dtype == torch.float32 for t in result)
    assert all(torch.equal(t, before[path]) for path, t in flatten(state).items())
    double = cost_gradient(
        *(as_dtype(part, torch.float64) for part in problem[:3]),
        lambda p, b: problem.validation_cost(as_dtype(p, torch.float32), b),
        as_dtype(problem.hyper, torch.float64),
        transform=transform,
    )
    assert_close(result.gradient.double(), double.gradient, rtol=1e-3, atol=1e-6)


def test_the_first_step_of_adam_hardly_answers_to_the_weights(make_problem):
    first = cost_gradient(*make_problem(optimizer="adam", k=1, warm=0)).gradient.norm()
    third = cost_gradient(*make_problem(optimizer="adam", k=3, warm=0)).gradient.norm()
    assert first < 1e-2 * third


REFUSED = {
    "no steps": ({"batches": []}, {}, ValueError, "batches must hold 1 to 10 steps, got 0"),
    "many steps": ({"batches": [None] * 11}, {}, ValueError, "1 to 10 steps, got 11"),
    "unknown": ({}, {"name": "gamma"}, ValueError, "must hold 'gamma' to vary, got"),
    "integers": (
        {"hyper": {"class_weights": torch.ones(10, dtype=torch.int64)}},
        {},
        TypeError,
        r"hyper\['class_weights'\] must be floating point, got torch.int64",
    ),
    "no scalar": (
        {"validation_cost": lambda params, buffers: params["fc.bias"]},
        {},
        ValueError,
        r"the validation cost must have shape \(\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_unrolled_is_refused(make_problem, case):
    replaced, options, error, text = REFUSED[case]
    with pytest.raises(error, match=f"unrolled_cost: .*{text}"):
        cost_gradient(*make_problem(k=1)._replace(**replaced), **options)


def test_a_value_of_another_shape_is_refused(make_problem):
    cost_of = unrolled_cost(*make_problem())
    with pytest.raises(ValueError, match=r"class_weights must have shape \(10,\) .* got \(9,\)"):
        cost_of(torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize(
    ("transform", "text"),
    [
        (grad, "second derivative, and torch has none where it needs _embedding_bag"),
        (jacfwd, "no forward-mode derivative of _embedding_bag.*transform=torch.func.grad"),
    ],
)
def test_an_operation_without_the_derivative_is_named(make_problem, transform, text):
    with pytest.raises(NotImplementedError, match=f"^cost_gradient: .*{text}"):
        cost_gradient(*make_problem("bag", warm=0), transform=transform)


def test_other_errors_of_a_step_are_its_own(make_problem):
    def broken(state, batch, hyper):
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match=r"^the disk is full$"):
        cost_gradient(*make_problem()._replace(train_step=broken))


def scores(params, buffers, inputs):
    return inputs @ params["w"], buffers


@pytest.mark.parametrize("weighted", [False, True])
def test_the_expected_cost_is_that_of_a_loop(weighted):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    params = {"w": torch.randn(4, 5, generator=generator, dtype=torch.float64)}
    costs = torch.rand(3, 5, generator=generator, dtype=torch.float64)  # two decisions no class
    labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2])
    prior, class_prior = (0.2, 0.3, 0.5), (6 / 12, 4 / 12, 2 / 12)
    weights = (torch.tensor(prior) / torch.tensor(class_prior)).double()[labels]
    by_class = [[], [], []]
    for x, label in zip(inputs, labels.tolist(), strict=True):
        odds = [math.exp(z) for z in (x @ params["w"]).tolist()]
        by_class[label].append(
            sum(float(costs[label, d]) * o for d, o in enumerate(odds)) / sum(odds)
        )
    means = [sum(values) / len(values) for values in by_class]
    expected = sum(p * m for p, m in zip(prior if weighted else class_prior, means, strict=True))
    cost = mean_expected_cost(
        scores, inputs, labels, costs, sample_weights=weights if weighted else None
    )
    # The weights were float32.
    assert float(cost(params, {})) == pytest.approx(expected, rel=1e-6 if weighted else 1e-12)


def test_sample_weights_of_another_shape_are_refused():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="mean_expected_cost: sample_weights must have shape"):
        mean_expected_cost(
            scores, torch.ones(2, 2), labels, torch.ones(2, 2), sample_weights=torch.ones(3)
        )


def test_sentences_tell_the_largest_first():
    gradient = torch.tensor([0.001, -0.0031, 0.02, 0.0, 4e-7, -0.5, 0.0007])
    lines = gradient_sentences(CostGradient(torch.tensor(1.0), gradient), tuple("abcdefg"), steps=5)
    assert lines == [
        f"one more unit on {c} changes the validation cost by {slope} (over 5 steps)"
        for c, slope in zip("fcbag", ["-0.5", "+0.02", "-0.0031", "+0.001", "+0.0007"], strict=True)
    ]


def test_sentences_of_few_classes_one_step_and_no_number():
    result = CostGradient(torch.tensor(1.0), torch.tensor([1.0, math.nan]))
    assert gradient_sentences(result, ("cat", "dog"), steps=1) == [
        "one more unit on dog changes the validation cost by +nan (over 1 step)",
        "one more unit on cat changes the validation cost by +1 (over 1 step)",
    ]
    with pytest.raises(ValueError, match=r"gradient must have shape \(3,\) to match classes"):
        gradient_sentences(result, ("a", "b", "c"), steps=1)
