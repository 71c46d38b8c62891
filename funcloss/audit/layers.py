"""Class gradients and per-example norms from layers' activations and backprops.

One backward pass to the layers' outputs, all at once, gives the backprops of each use of a
parameter: the gradient of a zero that is added there. What a use makes of them is for its layer
function (:data:`LAYERS`). Slices, reshapes, expansions and shared look-ups of a parameter only
move its entries, and are followed until something uses them. Where a use has its examples is found
by trying, on a few of them.
"""

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from funcloss.audit.layer_kinds import BATCH_FIRST, ENTRYWISE, LAYERS, add, sub
from funcloss.audit.per_example import (
    Gradient,
    Lookup,
    Outer,
    Segments,
    Spread,
    add_vectors,
    segments_of,
)
from funcloss.typing import Grads, Params


class NotByLayers(Exception):  # noqa: N818 - a reason, no error
    """Why the layers cannot give a model's gradients, in a few words."""


@dataclass(frozen=True, eq=False)
class Source:
    """A parameter, or entries of it that were moved."""

    name: str
    shape: torch.Size  # of the parameter
    index: Callable[[], Tensor] | None = None  # which entry of the parameter lies where

    def moved(self, func: Callable[..., Any], args: Any, kwargs: Any, own: Tensor) -> "Source":
        """Return the entries after a function that only moves them."""

        def index() -> Tensor:
            numbers = torch.arange(self.shape.numel(), device=own.device).reshape(self.shape)
            here = numbers if self.index is None else self.index()
            changed = tree_map(lambda x: here if x is own else x, (args, kwargs))
            return func(*changed[0], **changed[1])

        return Source(self.name, self.shape, index)

    def item(self, at: int) -> "Source":
        """Return one of several results of a function that moved the entries."""
        index = self.index
        assert index is not None
        return Source(self.name, self.shape, lambda: index()[at])


@dataclass(frozen=True)
class Layout:
    """Where the examples lie in an output."""

    axis: int
    inner: bool = False  # where they share the axis with something else: whether they are inside
    whole: bool = False  # the output is of one example

    def turned(self, x: Tensor, n: int) -> Tensor:
        """Return a tensor with its examples along the first axis."""
        if self.whole:
            return x[None]
        if x.shape[self.axis] == n:
            return x.movedim(self.axis, 0)
        sizes, first = ((-1, n), 1) if self.inner else ((n, -1), 0)
        return x.unflatten(self.axis, sizes).movedim(self.axis + first, 0)

    def fits(self, shape: torch.Size, n: int) -> bool:
        """Return whether an output of this shape can hold ``n`` examples so."""
        if self.whole:
            return n == 1
        return len(shape) > self.axis and shape[self.axis] % n == 0


@dataclass(frozen=True, eq=False)
class LayerUse:
    """One use of parameters: a call whose output is linear in them."""

    func: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    sources: dict[int, Source]  # by identity of the argument
    zero: Tensor  # added to the output; its gradient is the backprops
    versions: Sequence[tuple[Tensor, int]] = ()  # of what the gradients need, as it was then
    moved: bool = False  # it only gives each example moved entries of its own

    @property
    def names(self) -> list[str]:
        """Parameters that are used."""
        return [source.name for source in self.sources.values()]

    @property
    def called(self) -> str:
        """What it is, for a message."""
        return f"{self.names[0]} is used in {name_of(self.func)}"

    def gradients(
        self, backprops: Tensor, layout: Layout, n: int
    ) -> Iterator[tuple[Source, Gradient]]:
        """Yield each example's gradient by parameter.

        Raises:
            NotByLayers: the layer function does not know this use.
        """
        shape = self.zero.shape
        if any(x._version != version for x, version in self.versions):
            raise NotByLayers(f"{self.called}, whose input is changed in place")
        if self.func in BATCH_FIRST and (layout.axis or shape[0] != n) and not layout.whole:
            raise NotByLayers(f"{self.called}, whose first axis holds more than the examples")
        if self.func in BATCH_FIRST and layout.whole:
            layout = Layout(0)

        def seen(x: Any) -> Any:
            if not isinstance(x, Tensor) or id(x) in self.sources:
                return x
            x = x.detach()
            if self.func in ENTRYWISE:
                x = x.expand(shape)
            prefix = layout.axis + 1
            fits = layout.whole or x.shape[:prefix] == shape[:prefix]
            return layout.turned(x, n) if fits else x

        args, kwargs = tree_map(seen, (self.args, self.kwargs))
        missing = dict(self.sources)
        try:
            function = _moved if self.moved else LAYERS[self.func]
            for argument, gradient in function(layout.turned(backprops, n), *args, **kwargs):
                source = missing.pop(id(argument), None)
                if source is None:
                    continue
                if isinstance(gradient, Spread):
                    assert argument is not None
                    yield _gathered(source, argument, gradient.values, shape, layout, n)
                else:
                    yield source, gradient
        except NotImplementedError as error:
            raise NotByLayers(f"{self.called}: {error}") from None
        except (TypeError, RuntimeError, ValueError) as error:
            text = str(error).splitlines()[0][:160]
            raise NotByLayers(f"{self.called}, which its layer function rejects: {text}") from None
        if missing:
            raise NotByLayers(f"{next(iter(missing.values())).name} is used in {self.called}")


def _moved(backprops: Tensor, input: Tensor):
    """Yield the gradient of entries that were moved to where each example has its own."""
    yield input, Spread(backprops)


def _gathered(
    source: Source, argument: Tensor, values: Tensor, shape: torch.Size, layout: Layout, n: int
) -> tuple[Source, Gradient]:
    """Return the gradient in an argument from that at each entry that it is spread to.

    ``values`` have the turned shape of the output, whose shape is ``shape``.
    """
    behind = len(shape) - 1 - layout.axis  # axes of the output after that of the examples
    if argument.dim() <= behind or layout.whole:
        sizes = (1,) * (values.dim() - 1 - argument.dim()) + tuple(argument.shape)
        over = tuple(i + 1 for i, s in enumerate(sizes) if s == 1 and values.shape[i + 1] != 1)
        summed = values.sum(over) if over else values
        return source, summed.reshape(n, *argument.shape)
    index = torch.arange(source.shape.numel(), device=values.device).reshape(source.shape)
    index = index if source.index is None else source.index()
    index = layout.turned(index.expand(shape), n)
    if bool((index == index[:1]).all()):  # the same entries for each example
        same = index[0]
        return Source(source.name, source.shape, lambda: same), values
    flat = values.new_zeros(n, source.shape.numel())
    flat.scatter_add_(1, index.flatten(1), values.flatten(1))
    return Source(source.name, source.shape), flat.reshape(n, *source.shape)


class LayerInputs(TorchFunctionMode):
    """Record every use of a parameter in this context, and add a zero to its output.

    Args:
        params: The parameters, by name; uses are known by identity.
        inputs: Of the model: a look-up that depends on them is each example's own.
    """

    def __init__(self, params: Params, inputs: Any) -> None:
        """Begin with no use."""
        super().__init__()
        self.sources = {id(p): Source(name, p.shape) for name, p in params.items()}
        # By identity, so what is known must live: whole numbers that depend on the examples.
        self.chosen = {id(x): x for x in tree_leaves(inputs) if _counts(x)}
        self.uses: list[LayerUse] = []
        self.kept: list[Any] = []
        self.reason = ""  # why the layers cannot measure this; empty: none is known

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Record a layer, follow what moves a parameter's entries, pass the rest."""
        kwargs = kwargs or {}
        name = name_of(func)
        flat = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        used = {id(x): self.sources[id(x)] for x in flat if id(x) in self.sources}
        moving = bool(used) and _moves(func, name, args)
        if name == "__get__" and not moving:  # the dtype of a weight is no use of it
            return func(*args, **kwargs)
        if not used or name in _NO_USE:
            return self._noted(func(*args, **kwargs), name, flat)
        if func in _COMPOSED:
            with self:
                return _COMPOSED[func](*args, **kwargs)
        chosen = any(id(x) in self.chosen for x in flat)
        if moving and not chosen and len(used) == 1 and kwargs.get("padding_idx") is None:
            return self._followed(func, args, kwargs, next(x for x in flat if id(x) in used))
        if func not in LAYERS or (moving and not chosen):
            args, kwargs = tree_map(lambda x: self._materialised(func, x), (args, kwargs))
            return func(*args, **kwargs)
        if func not in ENTRYWISE and (own := used.get(id(args[0]))) and own.index is not None:
            del used[id(args[0])]  # moved entries that a layer reads as its input
            args = (self._materialised(func, args[0]), *args[1:])
        versions = [(x, x._version) for x in flat if id(x) not in used]
        if LAYERS[func] in (add, sub):  # no value is needed, so none is kept
            versions = []
        out = func(*args, **kwargs)
        if not versions:
            args, kwargs = tree_map(
                lambda x: _shape_alone(x) if isinstance(x, Tensor) and id(x) not in used else x,
                (args, kwargs),
            )
        return self._used(LayerUse(func, args, kwargs, used, _zero(out), versions), out)

    def _used(self, use: LayerUse, out: Tensor) -> Tensor:
        self.uses.append(use)
        # In place saves a copy, but a function that is not known may keep its output to go back.
        return out.add_(use.zero) if use.moved or use.func in _KNOWN else out + use.zero

    def _followed(self, func, args, kwargs, own):
        """Return the result of a function that moves entries, which is a source from now on."""
        out = func(*args, **kwargs)
        source = self.sources[id(own)].moved(func, args, kwargs, own)
        several = isinstance(out, tuple | list)
        for at, x in enumerate(out) if several else [(0, out)]:
            self.sources[id(x)] = source.item(at) if several else source
        self.kept.append(out)
        return out

    def _materialised(self, func: Callable[..., Any], x: Any) -> Any:
        """Return moved entries as a tensor of each example's own; note a parameter as unknown."""
        source = self.sources.get(id(x)) if isinstance(x, Tensor) else None
        if source is None:
            return x
        if source.index is None:
            self.reason = self.reason or f"{source.name} is used in {name_of(func)}"
            return x
        out = x.detach().clone()
        use = LayerUse(func, (x,), {}, {id(x): source}, _zero(out), moved=True)
        return self._used(use, out)

    def _noted(self, out: Any, name: str, flat: list[Tensor]) -> Any:
        """Return an output, noted if it holds whole numbers that depend on the examples."""
        if name.endswith("_like") or name.startswith("new_") or not flat:
            return out
        if any(x.is_floating_point() or id(x) in self.chosen for x in flat):
            self.chosen |= {id(x): x for x in tree_leaves(out) if _counts(x)}
        return out

    def reason_against_norms(self) -> str:
        """Return why the squares of the uses do not add up to those of the parameters."""
        uses: dict[str, list[Source]] = {}
        for use in self.uses:
            for source in use.sources.values():
                uses.setdefault(source.name, []).append(source)
        for name, sources in uses.items():
            if len(sources) == 1:
                continue
            indices = [source.index().flatten() for source in sources if source.index is not None]
            if len(indices) < len(sources) or not _distinct(torch.cat(indices)):
                return f"{name} is used more than once"
        return ""


def add_layers(
    uses: Sequence[LayerUse],
    layouts: Sequence[Layout],
    backprops: Sequence[Tensor],
    groups: Tensor,
    sums: Grads,
    *,
    norms: bool,
) -> Tensor | None:
    """Add each group's gradient to its row of ``sums``; return the squared norms, if asked for.

    ``groups``, ``(n,)``, ascend; ``sums`` have shape ``(groups, *shape)``.
    """
    n = len(groups)
    squares = next(iter(sums.values())).new_zeros(n) if norms else None
    segments = segments_of(groups)
    for use, layout, back in zip(uses, layouts, backprops, strict=True):
        if back.stride() and not any(back.stride()):
            back = back.contiguous()
        for source, gradient in use.gradients(back, layout, n):
            _accumulate(source, gradient, segments, sums[source.name], squares)
    return squares


def macs_of(
    uses: Sequence[LayerUse],
    layouts: Sequence[Layout],
    backprops: Sequence[Tensor],
    n: int,
    *,
    norms: bool,
) -> tuple[int, int]:
    """Return the multiplications of an example going forward, and those of the products."""
    shapes = [
        gradient.shape
        for use, layout, back in zip(uses, layouts, backprops, strict=True)
        for _, gradient in use.gradients(back, layout, n)
        if isinstance(gradient, Outer)
    ]
    return sum(s.macs for s in shapes), sum(s.macs_of_products(norms=norms) for s in shapes)


def _accumulate(
    source: Source, gradient: Gradient, segments: Segments, into: Tensor, squares: Tensor | None
) -> None:
    """Add one use's gradient by group, and its squares."""
    if source.index is None:
        if isinstance(gradient, Lookup):
            gradient.add_to(segments, into, squares)
        elif isinstance(gradient, Outer):
            gradient.add_to(segments, lambda label, g: into[label].add_(g), squares)
        else:
            assert isinstance(gradient, Tensor)
            add_vectors(gradient, segments, into, squares)
        return
    index, groups = source.index().flatten(), len(into)
    once = squares is None or _distinct(index)
    entries = into.new_zeros(groups, source.shape.numel())
    if isinstance(gradient, Outer) and once:
        gradient.add_to(
            segments, lambda label, g: entries[label].index_add_(0, index, g.flatten()), squares
        )
    elif isinstance(gradient, Tensor) and once:
        moved = into.new_zeros(groups, *gradient.shape[1:])
        add_vectors(gradient, segments, moved, squares)
        entries.index_add_(1, index, moved.flatten(1))
    elif isinstance(gradient, Tensor):
        each = into.new_zeros(len(gradient), source.shape.numel())
        each.index_add_(1, index, gradient.flatten(1))
        add_vectors(each, segments, entries, squares)
    else:
        raise NotByLayers(f"{source.name} is moved before it is used")
    into += entries.reshape(groups, *source.shape)


def name_of(func: Callable[..., Any]) -> str:
    """Return the name of one of torch's functions."""
    return getattr(func, "__name__", str(func))


def _counts(x: Any) -> bool:
    """Return whether it is a tensor of whole numbers."""
    return isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex()


def _zero(out: Tensor) -> Tensor:
    return torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape).requires_grad_()


def _shape_alone(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)


def _distinct(index: Tensor) -> bool:
    return index.unique().numel() == index.numel()


def _moves(func: Callable[..., Any], name: str, args: Any) -> bool:
    """Return whether a function only moves the entries of the parameter that it is given."""
    if func is F.embedding:
        return True
    if name == "__get__":
        return getattr(func, "__self__", None) in (Tensor.T, Tensor.mT)
    return name in _MOVES and not any(isinstance(x, torch.dtype) for x in args)


def _opened(func: Any) -> Callable[..., Any]:
    """Return a function of torch's written in Python, whose own calls are seen one by one."""
    seen = func.__globals__ | {"has_torch_function": lambda _: False}
    opened = types.FunctionType(func.__code__, seen, func.__name__, func.__defaults__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


_MOVES = {
    "__getitem__", "broadcast_to", "chunk", "clone", "contiguous", "expand", "expand_as", "flatten",
    "flip", "index_select", "movedim", "narrow", "permute", "repeat", "reshape", "roll", "select",
    "split", "squeeze", "t", "tile", "transpose", "unbind", "unflatten", "unsqueeze", "view",
    "view_as",
}  # fmt: skip
_NO_USE = {
    "__hash__", "__len__", "__repr__", "detach", "dim", "element_size", "get_device",
    "is_complex", "is_contiguous", "is_floating_point", "ndimension", "nelement", "numel",
    "requires_grad_", "size", "storage_offset", "stride", "zeros_like", "ones_like", "empty_like",
    "full_like", "new_zeros", "new_ones", "new_empty", "new_full", "new_tensor",
}  # fmt: skip
_COMPOSED = {F.multi_head_attention_forward: _opened(F.multi_head_attention_forward)}
_KNOWN = frozenset(LAYERS)  # what is there at first, none of which keeps its output
