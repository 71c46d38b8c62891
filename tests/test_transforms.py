"""Gradients by example and by class against loops, and slopes against finite differences."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.testing import assert_close

from funcloss import class_weighted, losses
from funcloss.keys import example_keys, keyed_randomness
from funcloss.objectives import mean_of, sum_of, supervised, weighted_mean_of
from funcloss.training import init_state
from funcloss.transforms import class_grads, directional, per_sample_grads, per_sample_vjps
from funcloss.typing import Batch

N, CLASSES = 9, 4
WEIGHTS = torch.tensor([1.0, 2.0, 0.0, 5.0]).double()
WHERE = torch.tensor([True, True, False, True, False, True, True, True, False])
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def make_model():
    """A convolution, dropout of both kinds, a frozen and a tied parameter."""
    torch.manual_seed(0)
    layers = nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 4, 3),
            "maps": nn.Dropout2d(0.3),
            "fc1": nn.Linear(16, 6),
            "drop": nn.Dropout(0.5),
            "fc2": nn.Linear(6, 6),
            "fc3": nn.Linear(6, 6),
            "head": nn.Linear(6, CLASSES),
        }
    )
    layers["fc3"].weight = layers["fc2"].weight
    layers["head"].bias.requires_grad_(False)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            at = self.layers
            x = F.max_pool2d(at["maps"](torch.relu(at["conv"](x))), 2).flatten(1)
            x = at["drop"](torch.tanh(at["fc1"](x)))
            return at["head"](torch.relu(at["fc3"](torch.tanh(at["fc2"](x)))))

    return Model().double()


class Given:
    """A model, a state and a batch."""

    def __init__(self, where=None):
        from funcloss import optim

        self.model = make_model()
        state = init_state(self.model, optim.sgd(), seed=3)
        self.params, self.buffers = state.params, state.buffers
        self.keys = example_keys(state.key, torch.tensor(5), N)
        self.batch = Batch(draw(N, 2, 6, 6), torch.tensor([0, 1, 2, 3, 3, 0, 1, 0, 0]), where)

    def predict(self, params, inputs, keys):
        with keyed_randomness(keys):
            return functional_call(self.model, {**params, **self.buffers}, (inputs,))


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], **(tolerance or EXACT))


# Each example by itself.

CRITERIA = {
    "mean": mean_of(losses.cross_entropy),
    "weighted": mean_of(class_weighted(losses.cross_entropy)),
    "sum": sum_of(losses.softmax_focal),
}


@pytest.mark.parametrize("where", [None, WHERE], ids=["all", "where"])
@pytest.mark.parametrize("name", CRITERIA)
def test_the_gradient_of_each_example_is_that_of_a_loop(name, where):
    given = Given(where)
    objective = supervised(given.model, CRITERIA[name])
    hyper = {"class_weights": WEIGHTS} if name == "weighted" else {}
    found = per_sample_grads(objective)(given.params, given.buffers, given.batch, given.keys, hyper)
    for i in range(N):
        one = Batch(given.batch.inputs[i : i + 1], given.batch.targets[i : i + 1])
        expected, _ = grad(objective, has_aux=True)(
            given.params, given.buffers, one, given.keys[i : i + 1], hyper
        )
        left_out = where is not None and not where[i]
        scale = 0.0 if left_out else 1.0
        assert_same({n: g[i] for n, g in found.items()}, {n: scale * g for n, g in
                    expected.items()})  # fmt: skip
        if left_out:
            assert all((g[i] == 0).all() for g in found.values())


def test_the_gradients_of_the_examples_average_to_that_of_the_batch():
    given = Given(WHERE)
    objective = supervised(given.model, CRITERIA["weighted"])
    hyper = {"class_weights": WEIGHTS}
    asked = given.params, given.buffers, given.batch, given.keys, hyper
    each = per_sample_grads(objective)(*asked)
    whole, _ = grad(objective, has_aux=True)(*asked)
    assert_same({name: g.sum(0) / WHERE.sum() for name, g in each.items()}, whole)


def test_dropout_is_drawn_from_the_keys_and_from_nothing_else():
    given = Given()
    grads_of = per_sample_grads(supervised(given.model, CRITERIA["mean"]))
    asked = given.params, given.buffers, given.batch
    before = torch.get_rng_state()
    first, again = (grads_of(*asked, given.keys, {}) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    other = grads_of(*asked, given.keys.flip(0), {})
    name = "layers.fc1.weight"
    assert torch.equal(first[name], again[name])
    assert (first[name] - other[name]).abs().max() > 0.01 * first[name].abs().max()


def test_a_left_out_example_is_0_whatever_it_holds():
    given = Given(WHERE)
    inputs = given.batch.inputs.clone()
    inputs[~WHERE] = torch.inf
    labels = torch.where(WHERE, given.batch.targets, 0)
    grads_of = per_sample_grads(supervised(given.model, CRITERIA["mean"]))
    found = grads_of(given.params, given.buffers, Batch(inputs, labels, WHERE), given.keys, {})
    plain = grads_of(given.params, given.buffers, given.batch, given.keys, {})
    assert_same(found, plain)


def test_a_division_by_the_weights_shows_no_weight_one_example_at_a_time():
    given = Given()
    batch = given.batch._replace(targets=given.batch.targets.clamp(max=1))
    weights = torch.tensor([1.0, 50.0, 1.0, 1.0]).double()
    found = [
        per_sample_grads(supervised(given.model, weighted_mean_of(losses.cross_entropy)))(
            given.params, given.buffers, batch, given.keys, {"class_weights": w}
        )
        for w in (weights, torch.ones(CLASSES).double())
    ]
    assert_same(*found)


def test_frozen_parameters_have_no_gradient_and_tied_ones_have_one():
    given = Given()
    found = per_sample_grads(supervised(given.model, CRITERIA["mean"]))(
        given.params, given.buffers, given.batch, given.keys, {}
    )
    assert found.keys() == {n for n, p in given.model.named_parameters() if p.requires_grad}
    assert {n: g.shape for n, g in found.items()} == {
        n: (N, *p.shape) for n, p in given.params.items()
    }


def test_inputs_by_name_are_mapped_over_too():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, CLASSES), nn.Linear(2, CLASSES)

        def forward(self, *, left, right):
            return self.left(left) * self.right(right)

    torch.manual_seed(0)
    model = Sum().double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    inputs, labels = {"left": draw(5, 3), "right": draw(5, 2, seed=1)}, torch.arange(5) % CLASSES
    found = per_sample_grads(supervised(model, CRITERIA["mean"]))(
        params, {}, Batch(inputs, labels), torch.arange(5), {}
    )
    for i in range(5):

        def loss(params, i=i):
            z = functional_call(model, params, (), {n: x[i : i + 1] for n, x in inputs.items()})
            return F.cross_entropy(z, labels[i : i + 1])

        assert_same({n: g[i] for n, g in found.items()}, grad(loss)(params))


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, CLASSES)),
        (nn.Flatten(), nn.Linear(72, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)),
    ],
    ids=["maps", "features"],
)
def test_batch_norm_in_training_mode_is_an_error_that_names_it(layers):
    model = nn.Sequential(*layers).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    batch = Batch(draw(N, 2, 6, 6), torch.zeros(N, dtype=torch.int64))
    grads_of = per_sample_grads(supervised(model, CRITERIA["mean"]))
    before = {name: b.clone() for name, b in buffers.items()}
    with pytest.raises(Exception, match=r"(?i)batch.?norm|more than 1 value per channel"):
        grads_of(params, buffers, batch, torch.arange(N), {})
    assert_same(buffers, before)
    model.eval()
    found = per_sample_grads(supervised(model, CRITERIA["mean"]))(
        params, buffers, batch, torch.arange(N), {}
    )
    assert all(g.isfinite().all() for g in found.values())


# By the gradient in the predictions.


def soft_dice(logits, labels):
    """A loss of the whole batch, a scalar."""
    p = logits.softmax(-1)
    y = (labels[:, None] == torch.arange(CLASSES)).to(p)
    overlap = 2 * (p * y).sum(0) / (p.sum(0) + y.sum(0))
    return 1 - overlap.mean()


def whole_and_cotangents(given, loss):
    """Return the gradient of a loss of the batch in the params, and in the predictions."""

    def of_params(params):
        return loss(given.predict(params, given.batch.inputs, given.keys), given.batch.targets)

    z = given.predict(given.params, given.batch.inputs, given.keys).detach()
    return grad(of_params)(given.params), grad(loss)(z, given.batch.targets)


def of_one(given, i, cotangents):
    """Return the part of one example in the gradient, by itself."""

    def along(params):
        inputs, keys = given.batch.inputs[i : i + 1], given.keys[i : i + 1]
        return (given.predict(params, inputs, keys) * cotangents[i]).sum()

    return grad(along)(given.params)


COUPLED = {"mean": F.cross_entropy, "dice": soft_dice}


@pytest.mark.parametrize("name", COUPLED)
def test_the_part_of_each_example_is_that_of_a_loop_and_they_sum_to_the_gradient(name):
    given = Given()
    whole, cotangents = whole_and_cotangents(given, COUPLED[name])
    found = per_sample_vjps(given.predict)(given.params, given.batch.inputs, given.keys, cotangents)
    for i in range(N):
        assert_same({n: g[i] for n, g in found.items()}, of_one(given, i, cotangents))
    assert_same({n: g.sum(0) for n, g in found.items()}, whole)


@pytest.mark.parametrize("name", COUPLED)
def test_the_part_of_each_class_is_that_of_its_examples_and_they_sum_to_the_gradient(name):
    given = Given()
    given.batch = given.batch._replace(targets=given.batch.targets.clamp(max=2))  # no example of 3
    whole, cotangents = whole_and_cotangents(given, COUPLED[name])
    labels = given.batch.targets
    found = class_grads(given.predict, CLASSES)(
        given.params, given.batch.inputs, given.keys, cotangents, labels
    )
    assert_same({n: g.sum(0) for n, g in found.items()}, whole)
    singles = [of_one(given, i, cotangents) for i in range(N)]
    for c in range(CLASSES):
        nothing = {n: torch.zeros_like(p) for n, p in given.params.items()}
        members = [singles[i] for i in range(N) if labels[i] == c]
        expected = {n: nothing[n] + sum(m[n] for m in members) for n in nothing}
        assert_same({n: g[c] for n, g in found.items()}, expected)
    assert all((g[3] == 0).all() for g in found.values())


def test_an_example_labelled_minus_one_is_in_no_class():
    given = Given()
    _, cotangents = whole_and_cotangents(given, soft_dice)
    asked = given.params, given.batch.inputs, given.keys
    labels = torch.where(WHERE, given.batch.targets, -1)
    found = class_grads(given.predict, CLASSES)(*asked, cotangents, labels)
    silent = torch.where(WHERE[:, None], cotangents, 0.0)
    expected = class_grads(given.predict, CLASSES)(*asked, silent, given.batch.targets)
    assert_same(found, expected)
    of_all = per_sample_vjps(given.predict)(*asked, cotangents)
    assert_same(
        {n: g.sum(0) for n, g in found.items()}, {n: g[WHERE].sum(0) for n, g in of_all.items()}
    )


def test_an_example_labelled_minus_one_is_in_no_class_whatever_its_cotangent():
    given = Given()
    _, cotangents = whole_and_cotangents(given, soft_dice)
    asked = given.params, given.batch.inputs, given.keys
    labels = torch.where(WHERE, given.batch.targets, -1)
    expected = class_grads(given.predict, CLASSES)(*asked, cotangents, labels)
    broken = torch.where(WHERE[:, None], cotangents, torch.nan)
    assert_same(class_grads(given.predict, CLASSES)(*asked, broken, labels), expected)


def test_predictions_of_many_axes_are_summed_over_all_of_them():
    params = {"w": draw(3, 2)}
    inputs, cotangents = draw(5, 7, 3), draw(5, 7, 2, seed=1)
    labels = torch.tensor([0, 1, 1, 0, -1])

    def predict(params, inputs, keys):
        return inputs @ params["w"]

    each = torch.einsum("nti,nto->nio", inputs, cotangents)
    asked = params, inputs, torch.arange(5), cotangents
    assert_close(per_sample_vjps(predict)(*asked)["w"], each, **EXACT)
    found = class_grads(predict, 2)(*asked, labels)["w"]
    assert_close(found, torch.stack([each[[0, 3]].sum(0), each[[1, 2]].sum(0)]), **EXACT)


@pytest.mark.parametrize("transform", [per_sample_vjps, lambda p: class_grads(p, CLASSES)])
def test_inputs_in_a_tuple_and_single_precision_are_kept(transform):
    params = {"w": draw(3, CLASSES).float(), "v": draw(2, CLASSES, seed=1).float()}
    inputs = draw(N, 3).float(), torch.arange(2 * N).reshape(N, 2)  # integers have no gradient

    def predict(params, inputs, keys):
        return inputs[0] @ params["w"] + inputs[1].float() @ params["v"]

    labels = (torch.arange(N) % CLASSES,) if transform is not per_sample_vjps else ()
    found = transform(predict)(
        params, inputs, torch.arange(N), draw(N, CLASSES, seed=2).float(), *labels
    )
    assert {n: (g.dtype, g.shape[1:]) for n, g in found.items()} == {
        n: (torch.float32, p.shape) for n, p in params.items()
    }


# Slopes.


def test_slopes_along_a_direction_are_finite_differences():
    given = Given()
    direction = {n: draw(*p.shape, seed=i) for i, (n, p) in enumerate(given.params.items())}

    def values_at(t):
        moved = {n: p + t * direction[n] for n, p in given.params.items()}
        return of_examples(moved)

    def of_examples(params):
        z = given.predict(params, given.batch.inputs, given.keys)
        return losses.cross_entropy(z, given.batch.targets)

    values, slopes = directional(of_examples, given.params, direction)
    assert values.shape == slopes.shape == (N,)
    assert_close(values, values_at(0.0), **EXACT)
    h = 1e-5
    near, far = values_at(h) - values_at(-h), values_at(2 * h) - values_at(-2 * h)
    assert_close(slopes, (8 * near - far) / (12 * h), rtol=1e-7, atol=1e-8)
    each = per_sample_grads(supervised(given.model, CRITERIA["mean"]))(
        given.params, given.buffers, given.batch, given.keys, {}
    )
    along = sum((each[n] * direction[n]).flatten(1).sum(1) for n in direction)
    assert_close(slopes, along, **EXACT)


@pytest.mark.parametrize("shape", [(), (3, 2)])
def test_slopes_have_the_shape_of_the_values(shape):
    params = {"w": draw(*shape)}
    values, slopes = directional(lambda p: p["w"] ** 3, params, {"w": torch.ones(shape).double()})
    assert_close(values, params["w"] ** 3)
    assert_close(slopes, 3 * params["w"] ** 2)


def test_a_direction_that_does_not_fit_is_an_error():
    with pytest.raises(Exception, match=r"(?i)structure|shape|keys"):
        directional(lambda p: p["w"], {"w": torch.ones(2)}, {"v": torch.ones(2)})
    with pytest.raises(Exception, match=r"(?i)shape|size"):
        directional(lambda p: p["w"], {"w": torch.ones(2)}, {"w": torch.ones(3)})


def test_the_first_slope_of_a_process_warns_of_nothing():
    """Torch's own first forward-mode derivative does."""
    code = (
        "import warnings, torch\n"
        "from funcloss.transforms import directional\n"
        "warnings.simplefilter('error')\n"
        "one = {'w': torch.ones(2)}\n"
        "print(directional(lambda p: (p['w'] ** 2).sum(), one, one)[1].item())\n"
        "before = list(warnings.filters)\n"
        "directional(lambda p: p['w'], one, one)\n"
        "assert list(warnings.filters) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4.0\n", "")
