"""A hand-written gradient under every transform, beside torch's own derivative."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close
from tutorial_losses import NumpyCrossEntropy, WeightedL1Function

from funcloss import (
    class_weighted,
    custom_vjp,
    from_numpy,
    losses,
    models,
    objectives,
    optim,
    sample_weighted,
    scaled,
    training,
)
from funcloss.laws import adapt, check
from funcloss.typing import Batch

# The tensors, the loss and the gradient that the tutorial prints.
LOGITS = torch.tensor(
    [
        [1.1785, -0.0969, 0.5756, -1.2113, -0.1120],
        [-0.5199, -0.8051, 1.0953, 0.1480, 0.2879],
        [2.3401, 0.6403, 1.4306, 0.0982, -0.7363],
    ]
)
LABELS = torch.tensor([4, 3, 1])
PUBLISHED = torch.tensor(
    [
        [0.1520, 0.0424, 0.0832, 0.0139, -0.2915],
        [0.0304, 0.0228, 0.1528, -0.2741, 0.0681],
        [0.1918, -0.2983, 0.0772, 0.0204, 0.0088],
    ]
)


def shifted_cross_entropy(logits, labels):
    shifted = logits - logits.amax(-1, keepdim=True)
    true = shifted.gather(-1, labels[..., None]).squeeze(-1)
    return shifted.exp().sum(-1).log() - true


def softmax_less_one_hot(logits, labels):
    classes = torch.arange(logits.shape[-1])
    return logits.softmax(-1) - (labels[..., None] == classes).to(logits.dtype)


by_hand = custom_vjp(shifted_cross_entropy, softmax_less_one_hot)


def numpy_forward(scores, labels):
    """Shift in place, as the tutorial does: what it was given is not what it was."""
    scores -= scores.max(-1, keepdims=True)
    true = np.take_along_axis(scores, labels[..., None], -1)[..., 0]
    return np.log(np.exp(scores).sum(-1)) - true


def numpy_backward(scores, labels):
    scores -= scores.max(-1, keepdims=True)
    probs = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return probs - (labels[..., None] == np.arange(scores.shape[-1]))


by_numpy = from_numpy(numpy_forward, numpy_backward)
BOTH = {"torch": by_hand, "numpy": by_numpy}
ids = {"argvalues": BOTH.values(), "ids": BOTH.keys()}


def torchs(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def torchs_of_one(logits, label):
    return F.cross_entropy(logits, label)


def double_batch(n=6, classes=5):
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits, torch.randint(classes, (n,), generator=generator)


# -- weighted L1 ----------------------------------------------------------------------------------


def weighted_distance(x, t, w):
    return w * (x - t).abs()


def slope_in_x(x, t, w):
    return w * torch.sign(x - t)


def slopes_in_x_and_w(x, t, w):
    return w * torch.sign(x - t), None, (x - t).abs()


X, T, W = torch.arange(1.0, 6.0), torch.arange(5.0), torch.tensor(2.0)


def test_weighted_l1_is_that_of_the_tutorial_and_its_weight_may_learn():
    as_published = custom_vjp(weighted_distance, slope_in_x)
    assert as_published(X, T, W).sum() == 10
    slopes = grad(lambda *a: as_published(*a).sum(), argnums=(0, 1, 2))(X, T, W)
    assert [s.tolist() for s in slopes] == [[2.0] * 5, [0.0] * 5, 0.0]
    learning = custom_vjp(weighted_distance, slopes_in_x_and_w)
    assert learning(X, T, W).sum() == 10
    shift = torch.tensor([0.0, -3.0, 1.0, 2.0, -0.5])
    slopes = grad(lambda *a: learning(*a).sum(), argnums=(0, 1, 2))(X + shift, T, W)
    distance = [1.0, 2.0, 2.0, 3.0, 0.5]
    assert slopes[0].tolist() == [2.0, -2.0, 2.0, 2.0, 2.0]
    assert slopes[1].tolist() == [0.0] * 5
    assert slopes[2].item() == sum(distance)
    each = vmap(grad(learning, argnums=2), in_dims=(0, 0, None))(X + shift, T, W)
    assert each.tolist() == distance


def test_what_an_autograd_function_as_published_cannot_its_twin_can():
    with pytest.raises(RuntimeError, match="setup_context"):
        vmap(grad(WeightedL1Function.apply))(X, T)
    with pytest.raises(RuntimeError, match="setup_context"):
        grad(NumpyCrossEntropy.apply)(LOGITS.clone(), LABELS)
    twin = custom_vjp(weighted_distance, slope_in_x)
    assert vmap(grad(twin), in_dims=(0, 0, None))(X, T, W).tolist() == [2.0] * 5
    assert_close(vmap(grad(by_numpy))(LOGITS, LABELS) / 3, PUBLISHED, rtol=0, atol=6e-5)


# -- cross-entropy by hand ------------------------------------------------------------------------


@pytest.mark.parametrize("loss", **ids)
def test_the_published_loss_and_gradient(loss):
    logits = LOGITS.clone().requires_grad_()
    value = loss(logits, LABELS).mean()
    assert value.item() == pytest.approx(2.0187, abs=5e-5)
    (slope,) = torch.autograd.grad(5 * value, logits)
    assert_close(slope, 5 * PUBLISHED, rtol=0, atol=5 * 6e-5)
    assert torch.equal(logits, LOGITS)
    assert_close(grad(lambda z: loss(z, LABELS).mean())(LOGITS), PUBLISHED, rtol=0, atol=6e-5)


def test_the_published_function_edits_its_logits_and_forgets_what_comes_in():
    logits = LOGITS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(5 * NumpyCrossEntropy.apply(logits, LABELS), logits)
    assert not torch.equal(logits, LOGITS)
    assert_close(slope, PUBLISHED, rtol=0, atol=6e-5)  # not five times


@pytest.mark.parametrize("loss", **ids)
def test_first_derivatives_are_those_of_torch(loss):
    logits, labels = double_batch()
    direction = torch.randn(6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def ours(z):
        return loss(z, labels)

    def theirs(z):
        return torchs(z, labels)

    assert_close(ours(logits), theirs(logits))
    squared = grad(lambda z: theirs(z).square().sum())(logits)
    assert_close(grad(lambda z: ours(z).square().sum())(logits), squared)
    assert_close(vmap(loss)(logits, labels), theirs(logits))
    assert_close(vmap(grad(loss))(logits, labels), vmap(grad(torchs_of_one))(logits, labels))
    one_row = torchs(logits[0].expand(6, 5), labels)
    assert_close(vmap(loss, in_dims=(None, 0))(logits[0], labels), one_row)
    for transform in (jacrev, jacfwd):
        assert_close(transform(ours)(logits), jacrev(theirs)(logits))
    assert_close(jvp(ours, (logits,), (direction,)), jvp(theirs, (logits,), (direction,)))
    cotangent = direction[:, 0]
    assert_close(vjp(ours, logits)[1](cotangent), vjp(theirs, logits)[1](cotangent))
    table = torch.stack([logits, 2 * logits])  # a batch of two axes, mapped and not
    assert_close(loss(table, labels.expand(2, 6)), torch.stack([theirs(z) for z in table]))
    slopes = [grad(lambda z: theirs(z).sum())(z) for z in table]
    assert_close(vmap(grad(lambda z: ours(z).sum()))(table), torch.stack(slopes))


def test_second_derivatives_are_those_of_torch():
    logits, labels = double_batch()
    of_one = vmap(hessian(by_hand))(logits, labels)
    probs = logits.softmax(-1)
    assert_close(of_one, probs.diag_embed() - probs[:, :, None] * probs[:, None, :])
    for outer in (jacrev, jacfwd):
        for inner in (jacrev, jacfwd):
            twice = outer(inner(lambda z: by_hand(z, labels).mean()))(logits)
            assert_close(twice, hessian(lambda z: torchs(z, labels).mean())(logits))


def test_gradcheck_holds_twice_and_forward():
    logits, labels = double_batch(3)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(by_hand, (logits, labels), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(by_hand, (logits, labels), check_fwd_over_rev=True)
    assert torch.autograd.gradcheck(by_numpy, (logits, labels), check_forward_ad=True)
    x, t = logits.detach()[:, 0].clone().requires_grad_(), torch.zeros(3).double()
    w = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    learning = custom_vjp(weighted_distance, slopes_in_x_and_w)
    assert torch.autograd.gradcheck(learning, (x, t, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(learning, (x, t, w))  # the mixed derivative, sign(x - t)


def test_shared_weights_have_a_gradient_for_each_value():
    def forward(logits, labels, weights):
        of_label = weights.gather(0, labels.reshape(-1)).reshape(labels.shape)
        return of_label * shifted_cross_entropy(logits, labels)

    def backward(logits, labels, weights):
        one_hot = (labels[..., None] == torch.arange(5)).to(logits.dtype)
        weight = (one_hot * weights).sum(-1, keepdim=True)
        of_weights = one_hot * shifted_cross_entropy(logits, labels)[..., None]
        return weight * softmax_less_one_hot(logits, labels), None, of_weights

    ours = custom_vjp(forward, backward)
    logits, labels = double_batch()
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 5.0], dtype=torch.float64)

    def theirs(logits, labels, weights):
        return torchs(logits, labels) * (F.one_hot(labels, 5).double() @ weights)

    for f in (lambda *a: a, lambda z, y, w: (z[0], y[0], w)):  # a batch, and one example
        z, y, w = f(logits, labels, weights)
        for argnum in (0, 2):
            assert_close(jacrev(ours, argnum)(z, y, w), jacrev(theirs, argnum)(z, y, w))
            assert_close(jacfwd(ours, argnum)(z, y, w), jacrev(theirs, argnum)(z, y, w))
    each = vmap(grad(ours, argnums=(0, 2)), in_dims=(0, 0, None))(logits, labels, weights)
    assert_close(each[0], weights[labels][:, None] * softmax_less_one_hot(logits, labels))
    assert_close(each[1], torchs(logits, labels)[:, None] * F.one_hot(labels, 5))
    mixed = jacrev(grad(lambda w, z: ours(z, labels, w).sum()), argnums=1)(weights, logits)
    expected = jacrev(grad(lambda w, z: theirs(z, labels, w).sum()), argnums=1)(weights, logits)
    assert_close(mixed, expected)


# -- compiled -------------------------------------------------------------------------------------


def compiled_as_eager(loss, backend):
    logits, labels = double_batch()
    for function in (
        loss,
        lambda z, y: grad(lambda z: loss(z, y).square().sum())(z),
        lambda z, y: vmap(grad(loss))(z, y),
    ):
        compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
        assert_close(compiled(logits, labels), function(logits, labels))


@pytest.mark.parametrize("loss", **ids)
def test_compiled_it_is_one_graph_that_gives_the_same(loss):
    compiled_as_eager(loss, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("loss", **ids)
def test_the_default_compiler_gives_the_same(loss):
    compiled_as_eager(loss, "inductor")


# -- the laws, dtypes and refusals ----------------------------------------------------------------


def test_the_hand_written_cross_entropy_keeps_every_law():
    adapted = adapt(by_hand)
    assert adapted.kind == "function, one value per example"
    findings = check(adapted.case)
    assert [f for f in findings if f.verdict == "fail"] == []
    # No costs, options and reference were given: all other laws were tried.
    untried = {f.law for f in findings if f.verdict != "pass"}
    assert untried == {"cost order", "option shapes", "reference"}


@pytest.mark.parametrize(
    "second",
    [
        lambda f: vmap(grad(lambda z: grad(f)(z).square().sum())),
        lambda f: vmap(hessian(f)),
        lambda f: vmap(jacrev(jacrev(f))),
    ],
)
def test_a_second_derivative_of_numpy_is_not_a_silent_zero(second):
    logits, _ = double_batch()
    assert second(lambda z: by_numpy(z, torch.tensor(1)))(logits).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("loss", **ids)
def test_the_dtype_that_comes_in_goes_out(loss, dtype):
    logits = LOGITS.to(dtype)
    value, slope = loss(logits, LABELS), grad(lambda z: loss(z, LABELS).sum())(logits)
    assert value.dtype == slope.dtype == dtype


def test_numpy_of_one_tensor_and_of_more_axes():
    assert from_numpy(np.square, lambda p: 2 * p)(torch.tensor([3.0, -1.0])).tolist() == [9.0, 1.0]
    square = from_numpy(lambda p, t: (p - t) ** 2, lambda p, t: 2 * (p - t))
    p, t = torch.randn(2, 3, 4, dtype=torch.float64)
    assert_close(square(p, t), (p - t) ** 2)
    assert_close(vmap(vmap(grad(square)))(p, t), 2 * (p - t))


def a_mean(scores, labels):
    return numpy_forward(scores, labels).mean()


def a_column(scores, labels):
    return numpy_forward(scores, labels)[:, None]


REFUSED = {
    "a mean": (a_mean, numpy_backward, r"expected \(3,\), got \(\)"),
    "a column": (a_column, numpy_backward, r"expected \(3,\), got \(3, 1\)"),
    "a slope a value": (numpy_forward, numpy_forward, r"expected \(3, 5\), got \(3,\)"),
}


@pytest.mark.parametrize(("forward", "backward", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_numpy_of_the_wrong_shape_is_refused(forward, backward, message):
    with pytest.raises(ValueError, match=f"from_numpy: forward must give one value.*{message}"):
        from_numpy(forward, backward)(LOGITS, LABELS)


def test_more_gradients_than_tensors_are_refused():
    greedy = custom_vjp(torch.square, lambda x: (2 * x, x))
    with pytest.raises(ValueError, match="custom_vjp: backward must give .*, 1 at most; got 2"):
        greedy(torch.tensor(3.0))


def test_it_takes_options_and_combines():
    def forward(x, t, beta=1.0):
        return beta * (x - t).square()

    distance = custom_vjp(forward, lambda x, t, beta=1.0: 2 * beta * (x - t))
    assert grad(lambda x: distance(x, torch.tensor(1.0), beta=3.0))(torch.tensor(4.0)) == 18
    both = scaled(sample_weighted(by_hand), 2.0)
    weights = torch.tensor([1.0, 0.0, 3.0])
    slope = grad(lambda z: both(z, LABELS, sample_weights=weights).sum())(LOGITS)
    assert_close(slope / 6, weights[:, None] * PUBLISHED, rtol=0, atol=2e-4)


def test_it_trains_in_a_step_and_composes_with_combinators():
    loss = class_weighted(by_hand)
    model, optimizer = models.linear((1, 2, 2), 5), optim.sgd()
    step = training.make_train_step(
        objectives.supervised(model, objectives.mean_of(loss)), optimizer
    )
    state = training.init_state(model, optimizer)
    batch = Batch(torch.randn(6, 1, 2, 2), torch.arange(6) % 5, torch.arange(6) < 4)
    hyper = {"learning_rate": torch.tensor(0.1), "class_weights": torch.ones(5)}
    _, metrics = step(state, batch, hyper)
    plain = objectives.supervised(model, objectives.mean_of(losses.cross_entropy))
    expected, _ = plain(state.params, state.buffers, batch, torch.arange(6), {})
    assert_close(metrics["loss"], expected)
    assert repr(loss).startswith("class_weighted(custom_vjp(")


def test_an_infinite_argument_or_slope_leaves_the_value_alone():
    total = custom_vjp(lambda z: z.exp().sum(-1), lambda z: z.exp())
    assert_close(total(torch.tensor([1.0, -math.inf])), torch.tensor(math.e))
    root = custom_vjp(torch.sqrt, lambda x: 0.5 / x.sqrt())
    assert root(torch.tensor(0.0)) == 0.0
    assert not torch.func.grad(root)(torch.tensor(0.0)).isfinite()


@pytest.mark.parametrize("gradient", [torch.ones(()), torch.ones(4), torch.ones(3, 1)])
def test_a_gradient_of_another_shape_is_refused(gradient):
    loss = custom_vjp(lambda z: z.sum(-1), lambda z: gradient)
    with pytest.raises(ValueError, match=r"the gradient of tensor 0 must have shape \(3, 4\)"):
        loss(torch.zeros(3, 4))


@pytest.mark.parametrize(
    "function",
    [
        custom_vjp(lambda x, w: w * x**2, lambda x, w: 2 * w * x),
        custom_vjp(lambda x, w: w * x**2, lambda x, w: (2 * w * x, None)),
        custom_vjp(lambda x, w: w * x**2, lambda x, w: (2 * w * x, x**2)),
    ],
)
def test_how_the_gradient_answers_to_another_tensor_is_exact(function):
    x, w = torch.tensor(3.0), torch.tensor(5.0)
    assert torch.func.grad(lambda w: torch.func.grad(function)(x, w))(w) == 6.0
    assert torch.func.grad(torch.func.grad(function))(x, w) == 10.0


def test_of_numpy_a_mixed_second_derivative_is_nan_too():
    square = from_numpy(lambda p, t: (p - t) ** 2, lambda p, t: 2 * (p - t))
    p, t = torch.tensor(3.0), torch.tensor(1.0)
    assert torch.func.grad(lambda t: torch.func.grad(square)(p, t))(t).isnan()
    assert torch.func.grad(square)(p, t) == 4.0
