"""What holds of every loss beside the laws: its reference, shapes, annotations, docstrings."""

import inspect
import math

import pytest
import torch
from beartype import beartype
from catalogue import CASES
from catalogue.rows import OfTorch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import jaxtyped
from torch.func import grad
from torch.testing import assert_close

from funcloss import losses
from funcloss.combinators import couples_examples, probabilities_of
from funcloss.laws.case import in_dtype
from funcloss.reduction import mean

OWN = {name: case for name, case in CASES.items() if name.split(",")[0] in losses.__all__}
FREE = {name: case for name, case in CASES.items() if not couples_examples(case.loss)}


def batch_of(case, n, seed=0):
    return case.data(n, torch.Generator().manual_seed(seed))


REDUCTIONS = {"none": lambda values: values, "sum": torch.sum, "mean": mean}
INPUTS = {  # what the random predictions become
    "random": lambda x, far: x,
    "zeros": lambda x, far: 0 * x,
    "ties": lambda x, far: x.round(),
    "tiny": lambda x, far: 1e-30 * x,
    "far": lambda x, far: torch.where(x > x.mean(), *(far if (x < 0).any() else map(abs, far))),
}
NO_ONE_SLOPE = {  # of rows at some inputs
    "binary_cross_entropy": ("zeros", "ties", "tiny", "far"),  # torch's is 1e12 at 0 and 1
    "triplet_margin, p=1": ("ties",),  # rounding decides on which side of the hinge a tie is
}


AGAINST = [  # far out plain formulas overflow: there the law of extremes holds ours
    (name, inputs)
    for name, case in CASES.items()
    for inputs in INPUTS
    if inputs != "far" or isinstance(case.reference, OfTorch)
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("name", "inputs"), AGAINST)
def test_values_gradients_and_reductions_are_those_of_the_reference(name, dtype, tolerance, inputs):
    case = CASES[name].in_dtype(dtype)
    of_torch = isinstance(case.reference, OfTorch)
    k = case.predictions
    data = in_dtype(batch_of(case, 20), dtype)
    data = tuple(INPUTS[inputs](x, case.extremes).to(dtype) for x in data[:k]) + data[k:]
    for reduction in ("none", "sum", "mean") if of_torch else ("none",):
        reduced = {"reduction": reduction} if of_torch else {}
        first = [x.clone().requires_grad_() for x in data[:k]]
        second = [x.clone().requires_grad_() for x in data[:k]]
        ours = REDUCTIONS[reduction](case(*first, *data[k:]))
        theirs = case.reference(*second, *data[k:], **case.options, **reduced)
        size = max(1.0, *(float(x.detach().abs().max()) for x in (*data[:k], theirs)))
        assert_close(ours, theirs.to(dtype), rtol=0, atol=tolerance * size)
        if theirs.requires_grad and inputs not in NO_ONE_SLOPE.get(name, ()):
            gradients = (
                torch.autograd.grad(v.sum(), x) for v, x in ((ours, first), (theirs, second))
            )
            for got, expected in zip(*gradients, strict=True):
                size = max(1.0, float(expected.abs().max()))
                assert_close(got, expected, rtol=0, atol=10 * tolerance * size)


@pytest.mark.parametrize("name", OWN)
def test_the_annotations_are_true(name):
    case = OWN[name]
    checked = jaxtyped(typechecker=beartype)(case.loss)
    data = batch_of(case, 6)
    checked(*data, where=torch.ones(6, dtype=torch.bool), **case.options)
    with pytest.raises(Exception, match="where|type|Type"):
        checked(*data, where=torch.ones(6), **case.options)


@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 3), max_size=3).map(tuple),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    masked=st.booleans(),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("name", FREE)
def test_any_batch_axes_dtype_mask_and_weights(name, shape, dtype, masked, seed):
    case = FREE[name]
    n = math.prod(shape)
    data = batch_of(case, max(n, 1), seed)
    data = tuple(x.to(dtype) if x.is_floating_point() else x for x in data)
    flat = tuple(x[:n] for x in data)
    folded = tuple(x.reshape((*shape, *x.shape[1:])) for x in flat)
    generator = torch.Generator().manual_seed(seed)
    where = torch.rand(shape, generator=generator) > 0.5 if masked else None
    weights = torch.rand(shape, generator=generator).to(dtype)
    values = case(*folded, **({"where": where} if masked else {}))
    assert values.shape == shape
    assert values.dtype == dtype
    expected = case(*flat).reshape(shape)
    if where is not None:
        expected = torch.where(where, expected, 0.0)
    assert_close(values, expected, rtol=1e-3 if dtype.itemsize == 2 else 1e-5, atol=1e-3)
    assert_close(weights * values, torch.where(weights > 0, weights * expected, 0.0))


@pytest.mark.parametrize("name", losses.__all__)
def test_every_docstring_says_all_there_is_to_say(name):
    function = getattr(losses, name)
    text = inspect.getdoc(function)
    first = text.splitlines()[0]
    assert first.endswith("."), first
    for part in ("Args:", "Returns:", "Example:", "References:", ">>> "):
        assert part in text, f"{name} has no {part}"
    for parameter in inspect.signature(function).parameters:
        assert f"    {parameter}:" in text, f"{name} does not document {parameter}"


@pytest.mark.parametrize("name", OWN)
def test_data_are_positional_and_options_are_keywords_with_where_last(name):
    parameters = list(inspect.signature(OWN[name].loss).parameters.values())
    data = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert len(data) + len(options) == len(parameters)
    assert all(p.default is p.empty for p in data)
    assert options[-1].name == "where"
    assert options[-1].default is None


def test_known_values():
    # The five examples of the hand-written cross-entropy tutorial, as published.
    logits = torch.tensor(
        [
            [1.1785, -0.0969, 0.5756, -1.2113, -0.1120],
            [-0.5199, -0.8051, 1.0953, 0.1480, 0.2879],
            [2.3401, 0.6403, 1.4306, 0.0982, -0.7363],
        ]
    )
    labels = torch.tensor([4, 3, 1])
    published = torch.tensor(
        [
            [0.1520, 0.0424, 0.0832, 0.0139, -0.2915],
            [0.0304, 0.0228, 0.1528, -0.2741, 0.0681],
            [0.1918, -0.2983, 0.0772, 0.0204, 0.0088],
        ]
    )
    assert_close(
        losses.cross_entropy(logits, labels).mean(), torch.tensor(2.0187), atol=5e-5, rtol=0
    )
    gradient = grad(lambda z: losses.cross_entropy(z, labels).mean())(logits)
    assert_close(gradient, published, atol=5.1e-5, rtol=0)
    # The catalogue tutorial: 64 classes, all logits 1.5, all targets 1.
    values = losses.binary_cross_entropy_with_logits(torch.full((10, 64), 1.5), torch.ones(10, 64))
    assert_close(values.mean(), torch.tensor(0.2014), atol=5e-5, rtol=0)
    # The weighted L1 tutorial: value 10, gradient 2 everywhere.
    x, t = torch.arange(1.0, 6.0), torch.arange(0.0, 5.0)
    value = losses.absolute_error(x, t, weights=2.0)
    assert value.sum() == 10.0
    slope = grad(lambda x: losses.absolute_error(x, t, weights=2.0).sum())(x)
    assert torch.equal(slope, torch.full((5,), 2.0))


def test_the_difference_of_two_large_logits_is_exact():
    # logsumexp(z) - z[y] would be off by 4e-4 here.
    logits = torch.tensor([[1e4, 1e4 - 0.5]])
    exact = math.log1p(math.exp(-0.5))
    assert_close(losses.cross_entropy(logits, torch.tensor([0])), torch.tensor([exact]))


OF_LABELS = [
    name for name in losses.__all__
    if {"labels"} & set([*inspect.signature(getattr(losses, name)).parameters][1:])
]  # fmt: skip


@pytest.mark.parametrize("name", OF_LABELS)
def test_every_loss_of_labels_states_how_its_scores_become_probabilities(name):
    loss = getattr(losses, name)
    stated = probabilities_of(loss)
    assert stated is not None
    parameters = inspect.signature(loss).parameters
    assert ("cost_matrix" in parameters) == (stated == "costs")
    if callable(stated):  # it takes the options of the loss, with their defaults
        own = {
            key: (p.kind, p.default)
            for key, p in parameters.items()
            if p.kind is p.KEYWORD_ONLY and key != "where"
        }
        takes = inspect.signature(stated).parameters
        assert {key: (p.kind, p.default) for key, p in takes.items()} == own
