"""linear_cross_entropy against the explicit product, and what it refuses."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import PEAK
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, grad_and_value, jacfwd, vjp, vmap
from torch.testing import assert_close

from funcloss import mean
from funcloss.losses.classification import cross_entropy
from funcloss.losses.fused import linear_cross_entropy

ROWS, FEATURES, CLASSES = 10, 4, 7
TIGHT = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.float32: {"rtol": 2e-6, "atol": 2e-6}}


def head(shape: tuple[int, ...] = (ROWS,), dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(*shape, FEATURES, generator=generator, dtype=torch.float64)
    weight = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    bias = torch.randn(CLASSES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, shape, generator=generator)
    return features.to(dtype), weight.to(dtype), bias.to(dtype), labels


def explicit(features: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(features, weight, bias)
    return F.cross_entropy(logits.reshape(-1, len(weight)), labels.reshape(-1), reduction="none")


def total(x: Tensor, w: Tensor, b: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(x, w, labels, bias=b, chunk_size=3).sum()


def value_and_grads(loss, *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    values = loss(*leaves)
    # A different factor for each example: a sum would not see them exchanged.
    factors = torch.linspace(0.5, 2.0, values.numel(), dtype=values.dtype).reshape(values.shape)
    return values.detach(), *torch.autograd.grad((values * factors).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_size", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("shape", [(), (ROWS,), (2, 5), (0,)])
def test_it_is_cross_entropy_of_the_product(shape, chunk_size, dtype):
    *tensors, labels = head(shape, dtype)

    def ours(x, w, b):
        return linear_cross_entropy(x, w, labels, bias=b, chunk_size=chunk_size)

    def theirs(x, w, b):
        return explicit(x, w, b, labels).reshape(shape)

    assert_close(value_and_grads(ours, *tensors), value_and_grads(theirs, *tensors), **TIGHT[dtype])


@pytest.mark.parametrize("reduce", ["none", "sum", "mean"])
def test_all_reductions_without_a_bias(reduce):
    features, weight, _, labels = head()
    ours = {"none": lambda v: v, "sum": torch.sum, "mean": mean}[reduce]
    want = F.cross_entropy(features @ weight.T, labels, reduction=reduce)
    assert_close(ours(linear_cross_entropy(features, weight, labels)), want, **TIGHT[torch.float64])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e4, -1e4])
def test_edge_logits_in_float32(scale):
    *tensors, labels = head(dtype=torch.float32)
    tensors[0] = tensors[0].sign() * scale

    def ours(x, w, b):
        return linear_cross_entropy(x, w, labels, bias=b, chunk_size=3)

    found = value_and_grads(ours, *tensors)
    want = value_and_grads(lambda *t: explicit(*t, labels), *(t.double() for t in tensors))
    assert all(torch.isfinite(t).all() for t in found)
    for a, b in zip(found, want, strict=True):
        assert_close(a.double(), b, rtol=2e-6, atol=2e-6 * max(1.0, 4 * abs(scale)))


def test_known_value():
    loss = linear_cross_entropy(torch.ones(3, 2), torch.zeros(4, 2), torch.tensor([0, 1, 3]))
    assert_close(loss, torch.full((3,), 1.3862943611198906))  # log 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype):
    *tensors, labels = head(dtype=dtype)

    def ours(x, w, b):
        return linear_cross_entropy(x, w, labels, bias=b, chunk_size=3)

    found = value_and_grads(ours, *tensors)
    leaves = [t.float().requires_grad_() for t in tensors]
    values = explicit(*leaves, labels)
    factors = torch.linspace(0.5, 2.0, ROWS, dtype=dtype).float()
    want = values, *torch.autograd.grad((values * factors).sum(), leaves)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == dtype
        # Rounded once on the way out.
        assert_close(a.float(), b.detach(), rtol=torch.finfo(dtype).eps, atol=2e-3)


def test_autocast_changes_nothing():
    *tensors, labels = head(dtype=torch.float32)
    plain = linear_cross_entropy(*tensors[:2], labels, bias=tensors[2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_cross_entropy(*tensors[:2], labels, bias=tensors[2]), plain)


def test_non_contiguous_inputs():
    features, weight, bias, labels = head((2, 5))
    values = linear_cross_entropy(
        features.mT.contiguous().mT, weight.T.contiguous().T, labels.T.contiguous().T, bias=bias
    )
    assert_close(values, linear_cross_entropy(features, weight, labels, bias=bias))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_masked_is_dropped(bad):
    features, weight, bias, labels = head()
    where = torch.arange(ROWS) % 3 != 0
    broken = torch.where(where[:, None], features, bad)
    wrong = torch.where(where, labels, 99)

    def ours(x, w, b):
        return linear_cross_entropy(x, w, wrong, bias=b, chunk_size=4, where=where).sum()

    def kept(x, w, b):
        return explicit(x[where], w, b, labels[where]).sum()

    grads, value = grad_and_value(ours, (0, 1, 2))(broken, weight, bias)
    want, total = grad_and_value(kept, (0, 1, 2))(features, weight, bias)
    assert_close((value, *grads), (total, *want), **TIGHT[torch.float64])
    values = linear_cross_entropy(broken, weight, wrong, bias=bias, where=where)
    assert (values[~where] == 0).all()
    assert (grads[0][~where] == 0).all()


@pytest.mark.parametrize("argnum", [0, 1, 2])
def test_only_the_gradients_asked_for(argnum):
    *tensors, labels = head()
    leaves = [t.clone().requires_grad_(i == argnum) for i, t in enumerate(tensors)]
    linear_cross_entropy(
        leaves[0], leaves[1], labels, bias=leaves[2], chunk_size=3
    ).sum().backward()
    want = grad(lambda *t: explicit(*t, labels).sum(), argnum)(*tensors)
    assert_close(leaves[argnum].grad, want, **TIGHT[torch.float64])
    assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != argnum)


def test_gradcheck_in_reverse_mode():
    *tensors, labels = head()
    leaves = [t.clone().requires_grad_() for t in tensors]
    assert gradcheck(lambda *t: linear_cross_entropy(*t[:2], labels, bias=t[2]), leaves)


def test_torch_func_and_one_compiled_graph():
    *tensors, labels = head()
    want = grad(lambda *t: explicit(*t, labels).sum(), (0, 1, 2))(*tensors)
    found = vjp(lambda *t: total(*t, labels), *tensors)[1](torch.ones((), dtype=torch.float64))
    assert_close(found, want, **TIGHT[torch.float64])
    leaves = [t.clone().requires_grad_() for t in tensors]
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert_close(
        torch.autograd.grad(compiled(*leaves, labels), leaves), want, **TIGHT[torch.float64]
    )


def _twice(x: Tensor, rest: tuple[Tensor, ...]) -> None:
    leaf = x.clone().requires_grad_()
    first = torch.autograd.grad(total(leaf, *rest), leaf, create_graph=True)[0]
    # The square has a gradient of its own: a missing second derivative would go unseen.
    (first.sum() + leaf.square().sum()).backward()


REFUSED = {
    "double backward": (_twice, "got a second derivative"),
    "grad of grad": (
        lambda x, rest: grad(lambda x: grad(total)(x, *rest).sum())(x),
        "got a second derivative",
    ),
    "forward mode": (lambda x, rest: jacfwd(total)(x, *rest), "forward mode"),
    "vmap": (lambda x, rest: vmap(lambda x: total(x, *rest))(x[None]), "got vmap"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own, at the first jvp
@pytest.mark.parametrize(("ask", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_it_refuses_rather_than_give_zeros(ask, match):
    x, *rest = head()
    with pytest.raises(RuntimeError, match=match):
        ask(x, tuple(rest))


X, W, Y = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long)
ERRORS = [
    ((X.long(), W, Y), {}, TypeError, "features must be floating point, got torch.int64"),
    ((X, W.long(), Y), {}, TypeError, "weight must be floating point, got torch.int64"),
    ((X, W, Y.float()), {}, TypeError, "labels must hold integer classes, got torch.float32"),
    ((X, W, Y), {"bias": Y}, TypeError, "bias must be floating point"),
    ((X, W, Y), {"where": Y}, TypeError, "where must be boolean"),
    ((torch.tensor(1.0), W, Y), {}, ValueError, "features must have a feature axis"),
    ((X, W.T, Y), {}, ValueError, r"weight must have shape \(classes, 3\) .*got \(3, 4\)"),
    ((X, W, Y[:1]), {}, ValueError, r"labels must have shape \(2,\) to match features \(2, 3\)"),
    ((X, W, Y), {"bias": W[0]}, ValueError, r"bias must have shape \(4,\) to match weight"),
    ((X, W, Y), {"where": Y[:1] > 0}, ValueError, "where must have shape"),
    ((X, W, Y), {"chunk_size": 0}, ValueError, r"chunk_size must be in \[1, inf\), got 0"),
]


@pytest.mark.parametrize(("args", "options", "error", "match"), ERRORS)
def test_errors(args, options, error, match):
    with pytest.raises(error, match=f"linear_cross_entropy: {match}"):
        linear_cross_entropy(*args, **options)


STEP = """
import torch
from funcloss.losses.classification import cross_entropy
from funcloss.losses.fused import linear_cross_entropy

def step(rows):
    x, w = torch.randn(rows, 64, requires_grad=True), torch.randn(20_000, 64, requires_grad=True)
    y = torch.zeros(rows, dtype=torch.long)
    loss = linear_cross_entropy(x, w, y) if sys.argv[1] == "ours" else cross_entropy(x @ w.T, y)
    loss.mean().backward()

step(2)  # what the first call loads is no part of the figure
before = peak()
step(4096)
print(peak() - before)
"""


@pytest.mark.slow
def test_peak_memory_is_a_small_part_of_the_explicit_one():
    def peak(which: str) -> float:
        command = [sys.executable, "-c", PEAK + STEP, which]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    ours, plain = peak("ours"), peak("plain")
    assert 0 < ours < 0.35 * plain


def test_it_is_our_cross_entropy_too():
    features, weight, bias, labels = head()
    want = cross_entropy(features @ weight.T + bias, labels)
    assert_close(linear_cross_entropy(features, weight, labels, bias=bias), want)
