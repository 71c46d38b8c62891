"""Four ways to the same class gradients, and the rule that chooses between them.

| method | how | delivers | cost, in plain passes |
|---|---|---|---|
| products | one backward pass; a product per layer and class | classes, examples | 1 and a part |
| examples | ``vmap`` of each example's vjp, in chunks | classes, examples | about 2.5 |
| loop | a backward pass per example | classes, examples | about 20 |
| classes | a backward pass for the examples of each class | classes | 4/3 |

A plain pass is a forward and a backward of the same examples. The rule: of the methods that can
measure this model and deliver what is asked for, the one of least predicted cost. ``products``
(ghost norms and book-keeping, in the literature) needs every parameter to be used once, in a linear
layer, a convolution, an embedding or a normalisation; it is compared with plain gradients on a few
examples before it is trusted.
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from funcloss.audit.data import MaskedBatch
from funcloss.audit.inner import norm_of, side_by_side
from funcloss.audit.products import (
    LayerInputs,
    LayerShape,
    add_by_group,
    add_products,
    as_rows,
    segments_of,
    shape_of,
)
from funcloss.audit.state import ModelState
from funcloss.errors import AuditError
from funcloss.transforms import directional, per_sample_vjps
from funcloss.typing import Grads

BY_EXAMPLE = ("products", "examples", "loop")  # these deliver norms

# (cotangents, sums, norms) -> the examples' squared norms or None; adds each group's gradient to
# its row of ``sums``
Pullback = Callable[[Tensor, Grads, bool], Tensor | None]


def by_products(state: ModelState, batch: MaskedBatch) -> tuple[Tensor, Pullback]:
    """Return predictions and a pullback, from each layer's activations and backprops."""
    with torch.enable_grad(), LayerInputs(state.params) as layers:
        predictions = state.predict(state.params, batch.inputs, batch.keys)
    if reason := layers.reason_against():
        raise AuditError(f"audit: the method products cannot measure this model: {reason}")

    def pullback(cotangents: Tensor, sums: Grads, norms: bool) -> Tensor | None:
        backprops = torch.autograd.grad(
            predictions,
            [use.zero for use in layers.uses],
            cotangents,
            allow_unused=True,
            materialize_grads=True,
        )
        return add_products(layers.uses, backprops, batch.groups, sums, norms=norms)

    return predictions.detach(), pullback


def by_examples(state: ModelState, batch: MaskedBatch) -> tuple[Tensor, Pullback]:
    """Return predictions and a pullback, from a gradient per example."""

    def pullback(cotangents: Tensor, sums: Grads, norms: bool) -> Tensor | None:
        with warnings.catch_warnings():  # which operation ``vmap`` takes one example at a time
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            vjps = per_sample_vjps(state.predict)
            grads = vjps(state.params, batch.inputs, batch.keys, cotangents)
        for name, g in grads.items():
            add_by_group(g, batch.groups, sums[name])
        if not norms:
            return None
        return torch.stack([as_rows(g).square().sum(1) for g in grads.values()]).sum(0)

    return state.predict(state.params, batch.inputs, batch.keys), pullback


def by_classes(state: ModelState, batch: MaskedBatch) -> tuple[Tensor, Pullback]:
    """Return predictions and a pullback, from a backward pass of each group's examples alone."""

    def pullback(cotangents: Tensor, sums: Grads, norms: bool) -> None:
        for group, piece in segments_of(batch.groups):
            for name, g in plain_vjp(state, batch.at(piece), cotangents[piece]).items():
                sums[name][group] += g

    return state.predict(state.params, batch.inputs, batch.keys), pullback


def by_loop(state: ModelState, batch: MaskedBatch) -> tuple[Tensor, Pullback]:
    """Return predictions and a pullback, from a backward pass per example."""

    def pullback(cotangents: Tensor, sums: Grads, norms: bool) -> Tensor:
        squares = []
        for i, group in enumerate(batch.groups.tolist()):
            one = slice(i, i + 1)
            grads = plain_vjp(state, batch.at(one), cotangents[one])
            for name, g in grads.items():
                sums[name][group] += g
            squares.append(torch.stack([g.square().sum() for g in grads.values()]).sum())
        return torch.stack(squares)

    return state.predict(state.params, batch.inputs, batch.keys), pullback


# (model, batch sorted by group, these from 0) -> (predictions, pullback)
METHODS: dict[str, Callable[[ModelState, MaskedBatch], tuple[Tensor, Pullback]]] = {
    "products": by_products,
    "examples": by_examples,
    "classes": by_classes,
    "loop": by_loop,
}


def plain_vjp(state: ModelState, batch: MaskedBatch, cotangents: Tensor) -> Grads:
    """Return ``sum_i J_i^T cotangents_i`` by plain autograd, which every module goes through."""
    leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    with torch.enable_grad():
        predictions = state.predict(leaves, batch.inputs, batch.keys)
    found = torch.autograd.grad(
        predictions, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


@dataclass(frozen=True)
class Plan:
    """The method that measures, and what it is predicted to take."""

    method: str
    why: str
    costs: dict[str, float]  # predicted, in plain passes, of the methods that can measure this
    bytes_per_example: int


def make_plan(
    state: ModelState,
    batch: MaskedBatch,
    cotangents: Tensor,
    *,
    norms: bool,
    method: str = "auto",
) -> Plan:
    """Compare the methods on a few examples; return the cheapest that can measure, or ``method``.

    Raises:
        AuditError: the method that is asked for cannot measure this model.
    """
    costs = {"classes": 4 / 3, "loop": 20.0}
    plain = _each_plainly(state, batch, cotangents)
    layers, why_not = _try_products(state, batch, cotangents, plain)
    cannot = {"products": why_not}
    if why_not or method == "examples":
        cannot["examples"] = _try_examples(state, batch, cotangents, plain)
    if not why_not:
        macs = sum(layer.macs for layer in layers)
        extra = sum(layer.macs_of_products(norms=norms) for layer in layers)
        costs["products"] = (2 * macs + extra) / max(3 * macs, 1)
    if not cannot.get("examples"):
        costs["examples"] = 2.5
    if method != "auto":
        if why := cannot.get(method):
            raise AuditError(f"audit: the method {method} cannot measure this model: {why}")
        return Plan(method, "asked for", costs, _bytes(state, batch, method))
    able = [m for m in METHODS if m in costs and (m in BY_EXAMPLE or not norms)]
    best = min(able, key=lambda name: costs[name])
    what = "class gradients and norms" if norms else "class gradients"
    reasons = (f"not {name}: {why}" for name, why in cannot.items() if why)
    why = "; ".join([f"least predicted cost for {what}", *reasons])
    return Plan(best, why, costs, _bytes(state, batch, best))


def _each_plainly(
    state: ModelState, batch: MaskedBatch, cotangents: Tensor
) -> list[tuple[Grads, float]]:
    """Return each example's gradient by plain autograd, twice, each with a tolerance.

    First within the batch, whose rounding the methods share; then alone, which tells whether the
    model couples examples. There a unit that is all but 0 may round to the other side, so that one
    need not be so near.
    """
    exact = cotangents.dtype == torch.float64
    found = []
    for i in range(len(batch)):
        one, only = slice(i, i + 1), torch.zeros_like(cotangents)
        only[i] = cotangents[i]
        found.append((plain_vjp(state, batch, only), 1e-8 if exact else 1e-3))
        alone = plain_vjp(state, batch.at(one), cotangents[one])
        found.append((alone, 1e-8 if exact else 0.05))
    return found


def _try_products(
    state: ModelState, batch: MaskedBatch, cotangents: Tensor, plain: list[tuple[Grads, float]]
) -> tuple[list[LayerShape], str]:
    """Return the layers and, in a few words, why products cannot measure them, if so."""
    with torch.enable_grad(), LayerInputs(state.params) as layers:
        state.predict(state.params, batch.inputs, batch.keys)
    if reason := layers.reason_against():
        return [], reason
    shapes = [shape_of(use, len(batch)) for use in layers.uses]
    try:
        wrong = _disagreement("products", state, batch, cotangents, plain)
    except RuntimeError:
        return [], "a layer does not read the examples along its first axis"
    return (shapes, "") if not wrong else ([], f"{wrong} is not a sum over the examples in order")


def _try_examples(
    state: ModelState, batch: MaskedBatch, cotangents: Tensor, plain: list[tuple[Grads, float]]
) -> str:
    """Return, in a few words, why ``vmap`` cannot take the model; empty if it can."""
    try:
        wrong = _disagreement("examples", state, batch, cotangents, plain)
    except (RuntimeError, ValueError) as error:
        text = str(error).strip() or type(error).__name__
        return f"vmap cannot take the model ({text.splitlines()[0][:160]})"
    return wrong and f"under vmap the gradient of {wrong} is another"


def _disagreement(
    method: str,
    state: ModelState,
    batch: MaskedBatch,
    cotangents: Tensor,
    plain: list[tuple[Grads, float]],
) -> str:
    """Return the name of a parameter whose gradients by example are not the plain ones."""
    n = len(batch)
    each = side_by_side(state.params, n)
    alone = replace(batch, groups=torch.arange(n, device=batch.groups.device))
    _, pullback = METHODS[method](state, alone)
    squares = pullback(cotangents, each, True)
    assert squares is not None
    length = max(norm_of(expected) for expected, _ in plain)
    for name, stacked in each.items():
        for at, (expected, tolerance) in enumerate(plain):
            if not float((stacked[at // 2] - expected[name]).norm()) <= tolerance * length:
                return name
    for at, (expected, tolerance) in enumerate(plain):
        norm = abs(float(squares[at // 2])) ** 0.5
        if not abs(norm - norm_of(expected)) <= tolerance * length:
            return "a norm"
    return ""


def has_forward_mode(state: ModelState, batch: MaskedBatch) -> bool:
    """Return whether every operation of the model has a forward-mode derivative."""
    with contextlib.suppress(RuntimeError, ValueError):  # NotImplementedError is a RuntimeError
        directional(
            lambda p: state.predict(p, batch.inputs, batch.keys), state.params, state.params
        )
        return True
    return False


def _bytes(state: ModelState, batch: MaskedBatch, method: str) -> int:
    """Return the memory that an example takes while it is measured."""
    leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}

    def saved_by(n: int) -> int:
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        some = batch.at(slice(0, n))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            state.predict(leaves, some.inputs, some.keys)
        return sum(saved.values())

    n = len(batch)  # what one more example adds is its own; weights are saved by all alike
    more = saved_by(n) - saved_by(n - 1) if n > 1 else saved_by(n)
    inputs = sum(x.nbytes for x in tree_leaves(batch.inputs)) / n
    grads = sum(p.nbytes for p in state.params.values()) if method == "examples" else 0
    # What is saved going forward has a gradient of its size going back, and room to compute it.
    return int(max(more, 0) * 3 + 2 * inputs + 3 * grads) + 1
