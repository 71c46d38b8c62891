"""Three ways to the same class gradients, and the rule that chooses between them.

| method | how | delivers | cost, in plain passes |
|---|---|---|---|
| layers | one backward pass; products per layer and class | classes, examples | 1 and a part |
| examples | ``vmap`` of each example's vjp, in chunks | classes, examples | about 2.5 |
| backward | a masked backward pass per class, few classes to a graph | classes | 1 and a part |

A plain pass is a forward and a backward of the same examples. The rule: of the methods that can
measure this model and deliver what is asked for, the one of least predicted cost. ``layers`` (ghost
norms and book-keeping, in the literature) needs every use of a parameter to be in a function that
:data:`funcloss.audit.LAYERS` has. All are compared with plain gradients on a few examples before
they are trusted.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from funcloss.audit.data import MaskedBatch
from funcloss.audit.inner import side_by_side
from funcloss.audit.layers import LayerInputs, Layout, NotByLayers, add_layers, macs_of
from funcloss.audit.per_example import Segments, add_by_group, as_rows, segments_of
from funcloss.audit.state import ModelState
from funcloss.errors import AuditError
from funcloss.transforms import per_sample_vjps
from funcloss.typing import Grads

METHODS = ("layers", "examples", "backward")

# (cotangents, sums, norms) -> the examples' squared norms or None; adds each group's gradient to
# its row of ``sums``. To be called once.
Pullback = Callable[[Tensor, Grads, bool], Tensor | None]
# (model, batch sorted by group, these from 0) -> (predictions, pullback)
Measure = Callable[[ModelState, MaskedBatch], tuple[Tensor, Pullback]]

_TOGETHER = 8  # examples that a graph should have, so that a pass over it is worth its calls
_SUMS_ALONE = "a backward pass gives the sum over a class, not its single examples"


def by_layers(
    state: ModelState, batch: MaskedBatch, *, layouts: Sequence[Layout]
) -> tuple[Tensor, Pullback]:
    """Return predictions and a pullback, from each layer's activations and backprops."""
    predictions, layers = _recorded(state, batch)
    shapes = [use.zero.shape for use in layers.uses]
    same = len(shapes) == len(layouts) and not layers.reason
    if not same or not all(
        at.fits(shape, len(batch)) for at, shape in zip(layouts, shapes, strict=True)
    ):
        raise AuditError(
            "audit: the model calls other layers for these examples than for those that the "
            "method 'layers' was tried on: give method='backward' or 'examples'"
        )

    def pullback(cotangents: Tensor, sums: Grads, norms: bool) -> Tensor | None:
        backprops = _backprops(predictions, layers, cotangents)
        try:
            return add_layers(layers.uses, layouts, backprops, batch.groups, sums, norms=norms)
        except NotByLayers as reason:
            raise AuditError(f"audit: the method 'layers' cannot go on: {reason}") from None

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


def by_backward(state: ModelState, batch: MaskedBatch) -> tuple[Tensor, Pullback]:
    """Return predictions and a pullback, from a masked backward pass per group.

    A pass costs as much as its graph has examples, so each graph has few groups: one, or as many as
    it takes to have 8 examples.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    graphs = []
    for run in _runs(segments_of(batch.groups)):
        inside = slice(run[0][1].start, run[-1][1].stop)
        part = batch.at(inside)
        with torch.enable_grad():
            graphs.append((run, inside, state.predict(leaves, part.inputs, part.keys)))

    def pullback(cotangents: Tensor, sums: Grads, norms: bool) -> None:
        for run, inside, predictions in graphs:
            for group, piece in run:
                masked = torch.zeros_like(predictions)
                at = slice(piece.start - inside.start, piece.stop - inside.start)
                masked[at] = cotangents[piece]
                more = piece.stop < inside.stop
                found = _vjp(predictions, leaves, masked, retain_graph=more)
                for name, g in found.items():
                    sums[name][group] += g

    return torch.cat([predictions.detach() for *_, predictions in graphs]), pullback


def _runs(segments: Segments) -> list[Segments]:
    """Return the groups in runs of at least ``_TOGETHER`` examples, but perhaps the last."""
    runs: list[Segments] = [[]]
    for segment in segments:
        if runs[-1] and runs[-1][-1][1].stop - runs[-1][0][1].start >= _TOGETHER:
            runs.append([])
        runs[-1].append(segment)
    return runs


def _recorded(state: ModelState, batch: MaskedBatch) -> tuple[Tensor, LayerInputs]:
    with torch.enable_grad(), LayerInputs(state.params, batch.inputs) as layers:
        return state.predict(state.params, batch.inputs, batch.keys), layers


def _backprops(
    predictions: Tensor, layers: LayerInputs, cotangents: Tensor, *, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(
        predictions,
        [use.zero for use in layers.uses],
        cotangents,
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )


def _vjp(
    predictions: Tensor, leaves: Grads, cotangents: Tensor, *, retain_graph: bool = False
) -> Grads:
    found = torch.autograd.grad(
        predictions,
        list(leaves.values()),
        cotangents,
        retain_graph=retain_graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(leaves, found, strict=True))


@dataclass(frozen=True)
class Plan:
    """The method that measures, and what it is predicted to take."""

    method: str
    why: str
    costs: dict[str, float]  # predicted, in plain passes, of the methods that can measure this
    bytes_per_example: int
    measure: Measure
    norms: bool  # whether every example's norm is measured
    note: str = ""  # why it is not, where it was asked for


@dataclass(frozen=True)
class _Way:
    """A method that can measure the model."""

    measure: Measure
    cost: float
    against_norms: str = ""  # why it cannot give norms; empty: it can


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
        AuditError: the model couples examples, a layer function is wrong, or the method that is
            asked for cannot measure this model.
    """
    plain = _each_plainly(state, batch, cotangents)
    ways = {"backward": _Way(by_backward, 1.25, _SUMS_ALONE)}
    cannot: dict[str, str] = {}

    def attempt(name: str, make: Callable[..., _Way]) -> None:
        try:
            ways[name] = make(state, batch, cotangents, plain, norms=norms)
        except NotByLayers as reason:
            cannot[name] = str(reason)

    if method in ("auto", "layers"):
        attempt("layers", _try_layers)
    if method == "examples" or (
        method == "auto" and ("layers" in cannot or (norms and ways["layers"].against_norms))
    ):
        attempt("examples", _try_examples)
    if why := cannot.get(method):
        raise AuditError(f"audit: the method {method} cannot measure this model: {why}")
    named = {name: ways[name] for name in METHODS if name in ways}
    able = {n: way for n, way in named.items() if not (norms and way.against_norms)} or named
    best = method if method != "auto" else min(able, key=lambda name: able[name].cost)
    way, measured = ways[best], norms and not ways[best].against_norms
    what = "class gradients and norms" if measured else "class gradients"
    why = "asked for"
    if method == "auto":
        reasons = (f"not {name}: {text}" for name, text in cannot.items())
        why = "; ".join([f"least predicted cost for {what}", *reasons])
    note = ""
    if norms and not measured:
        note = f"the norms of single examples' gradients are not measured: {way.against_norms}"
    return Plan(
        method=best,
        why=why,
        costs={name: each.cost for name, each in named.items()},
        bytes_per_example=_bytes(state, batch, best),
        measure=way.measure,
        norms=measured,
        note=note,
    )


def _each_plainly(state: ModelState, batch: MaskedBatch, cotangents: Tensor) -> Grads:
    """Return each example's gradient by plain autograd, within the batch.

    Raises:
        AuditError: alone, an example has another gradient.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    n = len(batch)
    with torch.enable_grad():
        predictions = state.predict(leaves, batch.inputs, batch.keys)
    inside, alone = [], []
    for i in range(n):
        one, only = slice(i, i + 1), torch.zeros_like(cotangents)
        only[i] = cotangents[i]
        inside.append(_vjp(predictions, leaves, only, retain_graph=i < n - 1))
        alone.append(plain_vjp(state, batch.at(one), cotangents[one]))
    found = {name: torch.stack([g[name] for g in inside]) for name in leaves}
    apart = {name: torch.stack([g[name] for g in alone]) for name in leaves}
    # A unit that is all but 0 may round to the other side, so that these need not be so near.
    if name := _unlike(apart, found, 0.0, 1e-8 if _exact(found) else 0.05):
        raise AuditError(
            f"audit: the model couples examples: the gradient of {name} of an example is another "
            "beside other examples than alone, so no class has a part of its own: look for "
            "statistics over the batch, and put such layers into evaluation mode"
        )
    return found


def _exact(grads: Grads) -> bool:
    return next(iter(grads.values())).dtype == torch.float64


def _unlike(found: Grads, expected: Grads, of_own: float, of_all: float) -> str:
    """Return the name of a parameter whose gradients differ, by parts of their and all lengths."""
    pairs = [(as_rows(found[name]), as_rows(g)) for name, g in expected.items()]
    errors = torch.stack([torch.linalg.vector_norm(a - b, dim=1) for a, b in pairs])
    sizes = torch.stack([torch.linalg.vector_norm(b, dim=1) for _, b in pairs])
    length = sizes.square().sum(0).sqrt().amax()
    held = (errors <= of_own * sizes.amax(1, keepdim=True) + of_all * length).all(1)
    return next((n for n, well in zip(expected, held.tolist(), strict=True) if not well), "")


def _try_layers(
    state: ModelState, batch: MaskedBatch, cotangents: Tensor, plain: Grads, *, norms: bool
) -> _Way:
    """Return the method, with where each layer has its examples.

    Raises:
        AuditError: a layer function is wrong.
        NotByLayers: the layers cannot measure this model.
    """
    predictions, layers = _recorded(state, batch)
    if layers.reason:
        raise NotByLayers(layers.reason)
    layouts = _layouts(state, batch, cotangents, predictions, layers)
    against = layers.reason_against_norms()
    backprops = _backprops(predictions, layers, cotangents)
    macs, extra = macs_of(layers.uses, layouts, backprops, len(batch), norms=norms and not against)
    each, alone = _sums_of_single(state, batch)
    squares = add_layers(layers.uses, layouts, backprops, alone.groups, each, norms=not against)
    if name := _disagreement(each, squares, plain):
        raise AuditError(
            f"audit: by the layers the gradient of {name} of an example is not the plain one: a "
            "layer function in funcloss.audit.LAYERS is wrong, or the model couples examples"
        )
    measure = functools.partial(by_layers, layouts=layouts)
    reason = against and f"{against}, and norms of its uses do not add up"
    return _Way(measure, (2 * macs + extra) / max(3 * macs, 1), reason)


def _layouts(
    state: ModelState,
    batch: MaskedBatch,
    cotangents: Tensor,
    predictions: Tensor,
    layers: LayerInputs,
) -> list[Layout]:
    """Return where each use has its examples: on the axis that grows with their number.

    Raises:
        NotByLayers: there is no such axis, or it is not known how they share it.
    """
    n = len(batch)
    if n == 1:
        return [Layout(0, whole=True) for _ in layers.uses]
    _, fewer = _recorded(state, batch.at(slice(0, n - 1)))
    if len(fewer.uses) != len(layers.uses):
        raise NotByLayers("its layers depend on the number of examples")
    layouts: list[Layout] = []
    singles: list[tuple[Tensor, ...]] = []
    for number, (use, other) in enumerate(zip(layers.uses, fewer.uses, strict=True)):
        shape, smaller = use.zero.shape, other.zero.shape
        axes = [a for a in range(len(shape)) if shape[a] != smaller[a : a + 1].numel()]
        if len(shape) != len(smaller) or len(axes) != 1:
            raise NotByLayers(f"{use.called}, not for each example by itself")
        (axis,) = axes
        if shape[axis] * (n - 1) != smaller[axis] * n:
            raise NotByLayers(f"{use.called}, not for each example by itself")
        choices = [Layout(axis)]
        if shape[axis] > n:
            if not singles:
                for i in range(n):
                    only = torch.zeros_like(cotangents)
                    only[i] = cotangents[i]
                    singles.append(_backprops(predictions, layers, only, retain_graph=True))
            own = [back[number] for back in singles]
            both = (Layout(axis), Layout(axis, inner=True))
            choices = [at for at in both if _apart(own, at)]
        if len(choices) != 1:
            raise NotByLayers(f"{use.called}, on an axis whose order is not known")
        layouts += choices
    return layouts


def _apart(backprops: list[Tensor], at: Layout) -> bool:
    """Return whether the backprops of each example's loss alone are all at that example."""
    n = len(backprops)
    turned = torch.stack([at.turned(back, n) for back in backprops])
    strange = turned.abs().flatten(2).sum(2)
    return not bool((strange - strange.diagonal().diag()).any())


def _try_examples(
    state: ModelState, batch: MaskedBatch, cotangents: Tensor, plain: Grads, *, norms: bool
) -> _Way:
    """Return the method.

    Raises:
        NotByLayers: ``vmap`` cannot take the model.
    """
    each, alone = _sums_of_single(state, batch)
    try:
        _, pullback = by_examples(state, alone)
        squares = pullback(cotangents, each, True)
    except (RuntimeError, ValueError) as error:
        text = str(error).strip() or type(error).__name__
        raise NotByLayers(f"vmap cannot take the model ({text.splitlines()[0][:160]})") from None
    if name := _disagreement(each, squares, plain):
        raise NotByLayers(f"under vmap the gradient of {name} is another")
    return _Way(by_examples, 2.5)


def _sums_of_single(state: ModelState, batch: MaskedBatch) -> tuple[Grads, MaskedBatch]:
    """Return zeros for each example's gradient, and the batch with each a group of its own."""
    n = len(batch)
    own = torch.arange(n, device=batch.groups.device)
    return side_by_side(state.params, n), replace(batch, groups=own)


def _disagreement(each: Grads, squares: Tensor | None, plain: Grads) -> str:
    """Return the name of a parameter whose gradients by example are not the plain ones."""
    of_own, of_all = (1e-7, 1e-9) if _exact(plain) else (1e-2, 1e-4)
    if name := _unlike(each, plain, of_own, of_all):
        return name
    if squares is None:
        return ""
    expected = torch.stack([as_rows(g).square().sum(1) for g in plain.values()]).sum(0).sqrt()
    errors = (squares.clamp(min=0.0).sqrt() - expected).abs()
    allowed = 10 * of_all * expected.amax()
    return "" if bool((errors <= allowed).all()) else "all parameters, by its norm,"


def plain_vjp(state: ModelState, batch: MaskedBatch, cotangents: Tensor) -> Grads:
    """Return ``sum_i J_i^T cotangents_i`` by plain autograd, which every module goes through."""
    leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    with torch.enable_grad():
        predictions = state.predict(leaves, batch.inputs, batch.keys)
    return _vjp(predictions, leaves, cotangents)


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
