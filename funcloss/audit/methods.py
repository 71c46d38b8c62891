"""Four ways to the same class gradients, and the rule that chooses between them.

| method | how | delivers | costs, in plain passes |
|---|---|---|---|
| products | one backward pass; a product a layer and class | classes, examples | 1 and a part |
| examples | ``vmap`` of each example's vjp, in chunks | classes, examples | about 2.5 |
| loop | a backward pass an example | classes, examples | about 20 |
| classes | a backward pass for the examples of each class | classes | 4/3 |

A plain pass is a forward and a backward of the same examples. The rule: of the methods that can
measure this model and deliver what is asked for, the one of least predicted cost. ``products``
needs every parameter to be used once, in a linear layer, a convolution, an embedding or a
normalisation; it is compared with plain gradients on a few examples before it is trusted.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from funcloss.audit.inner import norm_of, side_by_side
from funcloss.audit.products import (
    add_by_group,
    add_products,
    as_rows,
    form_of,
    segments_of,
    tapping,
)
from funcloss.errors import AuditError
from funcloss.transforms import Predict, directional, per_sample_vjps
from funcloss.typing import Grads, Params

METHODS = ("products", "examples", "classes", "loop")
BY_EXAMPLE = ("products", "examples", "loop")  # these deliver norms


class Chunk(NamedTuple):
    """Examples to measure at once, sorted by group."""

    inputs: Any
    keys: Tensor
    groups: Tensor  # (n,) ascending, from 0

    def __getitem__(self, piece: slice) -> "Chunk":  # pyright: ignore
        """Return some of the examples."""
        inputs = tree_map(lambda x: x[piece], self.inputs)
        return Chunk(inputs, self.keys[piece], self.groups[piece])


# predictions -> gradient of the loss in them
Cotangents = Callable[[Tensor], Tensor]
# (predict, params, chunk, cotangents, sums, norms) -> squared norms or None; adds to sums
Measure = Callable[[Predict, Params, Chunk, Cotangents, Grads, bool], Tensor | None]


def by_products(
    predict: Predict,
    params: Params,
    chunk: Chunk,
    cotangents: Cotangents,
    sums: Grads,
    norms: bool,
) -> Tensor | None:
    """Add each group's gradient to ``sums``, from what the layers read and what flows back."""
    with torch.enable_grad(), tapping(params) as noted:
        predictions = predict(params, chunk.inputs, chunk.keys)
    if reason := noted.reason_against():
        raise AuditError(f"audit: the method products cannot measure this model: {reason}")
    zeros = [tap.zero for tap in noted.taps]
    backs = torch.autograd.grad(
        predictions,
        zeros,
        cotangents(predictions.detach()),
        allow_unused=True,
        materialize_grads=True,
    )
    return add_products(noted.taps, list(backs), chunk.groups, sums, norms=norms)


def by_examples(
    predict: Predict,
    params: Params,
    chunk: Chunk,
    cotangents: Cotangents,
    sums: Grads,
    norms: bool,
) -> Tensor | None:
    """Add each group's gradient to ``sums``, from a gradient an example."""
    back = cotangents(predict(params, chunk.inputs, chunk.keys))
    with _slowly():
        grads = per_sample_vjps(predict)(params, chunk.inputs, chunk.keys, back)
    for name, g in grads.items():
        add_by_group(g, chunk.groups, sums[name])
    if not norms:
        return None
    squares = [as_rows(g).square().sum(1) for g in grads.values()]
    return torch.stack(squares).sum(0)


def by_classes(
    predict: Predict,
    params: Params,
    chunk: Chunk,
    cotangents: Cotangents,
    sums: Grads,
    norms: bool,
) -> None:
    """Add each group's gradient to ``sums``, from a backward pass of its examples alone."""
    back = cotangents(predict(params, chunk.inputs, chunk.keys))
    for group, piece in segments_of(chunk.groups):
        for name, g in plain_vjp(predict, params, chunk[piece], back[piece]).items():
            sums[name][group] += g


def by_loop(
    predict: Predict,
    params: Params,
    chunk: Chunk,
    cotangents: Cotangents,
    sums: Grads,
    norms: bool,
) -> Tensor:
    """Add each group's gradient to ``sums``, from a backward pass an example."""
    back = cotangents(predict(params, chunk.inputs, chunk.keys))
    squares = []
    for i, group in enumerate(chunk.groups.tolist()):
        one = slice(i, i + 1)
        grads = plain_vjp(predict, params, chunk[one], back[one])
        for name, g in grads.items():
            sums[name][group] += g
        squares.append(torch.stack([g.square().sum() for g in grads.values()]).sum())
    return torch.stack(squares)


def plain_vjp(predict: Predict, params: Params, chunk: Chunk, back: Tensor) -> Grads:
    """Return ``sum_i J_i^T back_i`` by nothing but autograd, which every module goes through."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad():
        predictions = predict(leaves, chunk.inputs, chunk.keys)
    found = torch.autograd.grad(
        predictions, list(leaves.values()), back, allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, found, strict=True))


@contextlib.contextmanager
def _slowly() -> Iterator[None]:
    """Keep torch from telling the user which operation ``vmap`` takes one example at a time."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        yield


MEASURES: dict[str, Measure] = {
    "products": by_products,
    "examples": by_examples,
    "classes": by_classes,
    "loop": by_loop,
}


class Plan(NamedTuple):
    """What measures, and on how many examples at a time."""

    method: str
    why: str
    costs: dict[str, float]  # predicted, in plain passes, of the methods that can measure this
    bytes_per_example: int


def make_plan(
    predict: Predict,
    params: Params,
    probe: Chunk,
    back: Tensor,
    *,
    norms: bool,
    forced: str = "auto",
) -> Plan:
    """Choose the method for a model.

    Args:
        predict: The model.
        params: Its parameters.
        probe: A few examples.
        back: Their cotangents, to compare the methods on.
        norms: Whether every example's norm is asked for.
        forced: The method to use; ``auto``: the rule's.

    Returns:
        The plan of least predicted cost.

    Raises:
        AuditError: the method that is asked for cannot measure this model.
    """
    costs = {"classes": 4 / 3, "loop": 20.0}
    cannot = {}
    plain = _each_plainly(predict, params, probe, back)
    layers, cannot["products"] = _try_products(predict, params, probe, back, plain)
    if cannot["products"] or forced == "examples":
        cannot["examples"] = _try_examples(predict, params, probe, back, plain)
    macs = sum(layer.macs for layer in layers)
    if not cannot["products"]:
        extra = sum(layer.macs_of_products(norms=norms) for layer in layers)
        costs["products"] = (2 * macs + extra) / max(3 * macs, 1)
    if not cannot.get("examples"):
        costs["examples"] = 2.5
    if forced != "auto":
        if why := cannot.get(forced):
            raise AuditError(f"audit: the method {forced} cannot measure this model: {why}")
        size = _bytes(predict, params, probe, forced)
        return Plan(forced, "asked for", costs, size)
    able = {name: costs[name] for name in METHODS if name in costs}
    if norms:
        able = {name: cost for name, cost in able.items() if name in BY_EXAMPLE}
    why_not = "; ".join(f"not {name}: {why}" for name, why in cannot.items() if why)
    best = min(able, key=lambda name: able[name])
    what = "class gradients and norms" if norms else "class gradients"
    why = f"least predicted cost for {what}" + (f"; {why_not}" if why_not else "")
    return Plan(best, why, costs, _bytes(predict, params, probe, best))


def _each_plainly(
    predict: Predict, params: Params, probe: Chunk, back: Tensor
) -> list[tuple[Grads, float]]:
    """Return each example's gradient by nothing but autograd, and how near another must be to it.

    First within the batch, whose rounding the methods share; then alone, which tells whether the
    model couples examples. There a unit that is all but 0 may round to the other side, so that one
    need not be so near.
    """
    n, exact = len(probe.keys), back.dtype == torch.float64
    found = []
    for i in range(n):
        alone = slice(i, i + 1)
        only = torch.zeros_like(back)
        only[i] = back[i]
        found.append((plain_vjp(predict, params, probe, only), 1e-8 if exact else 1e-3))
        found.append(
            (plain_vjp(predict, params, probe[alone], back[alone]), 1e-8 if exact else 0.05)
        )
    return found


def _try_products(
    predict: Predict, params: Params, probe: Chunk, back: Tensor, plain: list[tuple[Grads, float]]
):
    """Return the layers and, in a few words, why products cannot measure them, if so."""
    with torch.enable_grad(), tapping(params) as noted:
        predict(params, probe.inputs, probe.keys)
    if reason := noted.reason_against():
        return [], reason
    layers = [form_of(tap, len(probe.keys)) for tap in noted.taps]
    try:
        wrong = _disagreement(*_try("products", predict, params, probe, back), plain)
    except RuntimeError:
        return [], "a layer does not read the examples along its first axis"
    return (layers, "") if not wrong else ([], f"{wrong} is not a sum over the examples in order")


def _try_examples(
    predict: Predict, params: Params, probe: Chunk, back: Tensor, plain: list[tuple[Grads, float]]
) -> str:
    """Return, in a few words, why ``vmap`` cannot take the model; empty if it can."""
    try:
        each, squares = _try("examples", predict, params, probe, back)
    except (RuntimeError, ValueError) as error:
        return f"vmap cannot take the model ({_first_line(error)})"
    wrong = _disagreement(each, squares, plain)
    return wrong and f"under vmap the gradient of {wrong} is another"


def _try(
    method: str, predict: Predict, params: Params, probe: Chunk, back: Tensor
) -> tuple[Grads, Tensor | None]:
    """Return the gradient of each example by a method, and its squared norm, a group each."""
    n = len(probe.keys)
    alone = probe._replace(groups=torch.arange(n, device=probe.groups.device))
    each = side_by_side(params, n)
    return each, MEASURES[method](predict, params, alone, lambda z: back, each, True)


def has_forward_mode(predict: Predict, params: Params, probe: Chunk) -> bool:
    """Return whether every operation of the model has a forward-mode derivative.

    Args:
        predict: The model.
        params: Its parameters.
        probe: A few examples.
    """
    try:
        directional(lambda p: predict(p, probe.inputs, probe.keys), params, params)
    except (RuntimeError, ValueError):  # NotImplementedError is a RuntimeError
        return False
    return True


def _disagreement(each: Grads, squares: Tensor | None, plain: list[tuple[Grads, float]]) -> str:
    """Return the name of a parameter whose gradients by example are not the plain ones."""
    assert squares is not None
    length = max(norm_of(of) for of, _ in plain)
    for name, stacked in each.items():
        for at, (of, room) in enumerate(plain):
            if not float((stacked[at // 2] - of[name]).norm()) <= room * length:
                return name
    for at, (of, room) in enumerate(plain):
        if not abs(abs(float(squares[at // 2])) ** 0.5 - norm_of(of)) <= room * length:
            return "a norm"
    return ""


def _bytes(predict: Predict, params: Params, probe: Chunk, method: str) -> int:
    """Return the memory that an example takes while it is measured."""
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}

    def kept(n: int) -> int:
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        some = probe[slice(0, n)]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            predict(leaves, some.inputs, some.keys)
        return sum(saved.values())

    n = len(probe.keys)  # what one more example adds is its own; weights are kept by all alike
    more = kept(n) - kept(n - 1) if n > 1 else kept(n)
    inputs = sum(x.nbytes for x in tree_leaves(probe.inputs)) / n
    grads = sum(p.nbytes for p in params.values()) if method == "examples" else 0
    # What is saved going forward has a gradient of its size going back, and room to compute it.
    return int(max(more, 0) * 3 + 2 * inputs + 3 * grads) + 1


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:160] if text else type(error).__name__
