"""The laws of a loss's values: how far it reaches, what it leaves alone, what its costs do.

Each takes a case and a batch, raises ``Broken`` or ``NotApplicable`` where it does not hold, and
may return a remark where it does.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.func import grad

from funcloss.combinators import sample_weighted
from funcloss.laws._common import (
    check_finite,
    check_of_classes,
    check_per_example,
    check_uncoupled,
    gradients_of,
    same,
    seen_in,
)
from funcloss.laws.case import Batch, Broken, LossCase, NotApplicable, in_dtype, shown
from funcloss.laws.effect import check_costs, cost_effect

HALF = (torch.float16, torch.bfloat16)
_CHANGING = ("rand", "dropout", "self.", "global ", ".append(", "bernoulli", "shuffle")
_MOST = 10  # decisions whose costs are raised


def stays_finite(case: LossCase, batch: Batch) -> str | None:
    """Value and gradient are finite far out."""
    k = case.predictions
    for dtype in (torch.float32, batch[0].dtype):
        data, there = in_dtype(batch, dtype), case.in_dtype(dtype)
        for extreme in case.extremes:
            for every in (1, 2, 3):
                far = [x.clone() for x in data[:k]]
                for i, x in enumerate(far):  # apart from each other, where there are several
                    x.view(-1)[::every] = extreme if i % 2 == 0 else -extreme
                check_finite(there, (*far, *data[k:]), f"at predictions of {extreme:g}")
    if case.minus_inf:
        logits, labels = batch
        classes = torch.arange(logits.shape[-1])
        barred = classes == (labels[:, None] + 1) % logits.shape[-1]
        check_finite(case, (torch.where(barred, -torch.inf, logits), labels), "at a logit of -inf")
    if case.extremes == (1e4, -1e4):
        return None
    return f"tried at {' and '.join(f'{x:g}' for x in case.extremes)}"


def masked_is_dropped(case: LossCase, batch: Batch) -> None:
    """What is masked counts as if it were not there, whatever it holds."""
    if not case.takes_where:
        raise NotApplicable("it takes no `where`")
    n = batch[0].shape[0]
    where = torch.arange(n) % 3 != 1 if n > 1 else torch.tensor([case.reduction != "none"])
    kept = tuple(x[where] for x in batch)
    for bad in (torch.inf, -torch.inf, torch.nan, 1e300):
        spoilt = tuple(_spoilt(x, where, bad) for x in batch)
        under = replace(case, options={**case.options, "where": where})
        values, gradients = under(*spoilt), gradients_of(under, spoilt)
        if case.reduction == "none":
            same(values[~where], torch.zeros_like(values[~where]), "a masked value", batch)
            values = values[where]
        for got in gradients:
            same(got[~where], torch.zeros_like(got[~where]), "a masked gradient", batch)
        if where.any():
            same(values, case(*kept), "values beside masked ones, against alone", batch)
            for got, expected in zip(gradients, gradients_of(case, kept), strict=True):
                same(got[where], expected, "gradients beside masked ones", batch)


def _spoilt(x: Tensor, where: Tensor, bad: float) -> Tensor:
    spoilt = x.clone()
    spoilt[~where] = bad if x.is_floating_point() else 99
    return spoilt


def dtype_is_kept(case: LossCase, batch: Batch) -> None:
    """The dtype that comes in goes out, and half precision is computed in single."""
    for dtype in (*HALF, torch.float32, torch.float64):
        data, there = in_dtype(batch, dtype), case.in_dtype(dtype)
        values = there(*data)
        if values.dtype != dtype:
            raise Broken(f"{dtype} in, {values.dtype} out")
        if batch[0].dtype != torch.float64:
            continue
        exact = there.in_dtype(torch.float64)(*in_dtype(data, torch.float64))
        largest = max(1.0, *(float(x.abs().max()) for x in data[: case.predictions]))
        tolerance = 4 * torch.finfo(dtype).eps * largest
        same(values.double(), exact, f"in {dtype}, against float64", data, tolerance)


def is_pure(case: LossCase, batch: Batch) -> None:
    """Nothing that the loss is given changes, nor a module itself, nor the answer."""
    tensors = [*batch, *(o for o in case.options.values() if isinstance(o, Tensor))]
    before = [x.clone() for x in tensors]
    kept = copy.deepcopy(_state(case.loss))
    first = case(*batch)
    if not torch.is_grad_enabled():
        raise Broken(
            "it leaves the gradients of everything after it switched off",
            "switch gradients off in a block alone, `with torch.no_grad():`, or not at all",
        )
    case(*(x.flip(0) for x in batch))
    second = case(*batch)
    for x, was in zip(tensors, before, strict=True):
        if not torch.equal(x, was):
            raise Broken(f"it changed what it was given: {shown((was,))} became {shown((x,))}")
    what = "the second answer to one question, against the first"
    same(second, first, what, batch, 0.0, also=seen_in(case, _CHANGING))
    for name, now in _state(case.loss).items():
        was = kept.get(name)
        unchanged = (
            torch.equal(was, now)
            if isinstance(now, Tensor) and isinstance(was, Tensor)
            else (was == now)
        )
        if not unchanged:
            raise Broken(f"it keeps a state: {name} changed")


def _state(loss: Callable[..., Tensor]) -> dict[str, Any]:
    """Return what an object remembers: its tensors, and the plain values among its attributes."""
    held = getattr(loss, "__dict__", {})
    plain = {n: v for n, v in held.items() if isinstance(v, (int, float, str, Tensor))}
    return {**plain, **(loss.state_dict() if isinstance(loss, torch.nn.Module) else {})}


def permutes(case: LossCase, batch: Batch) -> None:
    """Classes that change places, costs with them, change nothing."""
    check_of_classes(case, batch)
    c = case.classes
    order = torch.randperm(c, generator=Generator().manual_seed(1))
    place = order.argsort()

    def permuted(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return place[x.long()].to(x.dtype)
        return x[..., order] if x.dim() > 1 and x.shape[-1] == c else x

    def permuted_option(option: Tensor | float) -> Tensor | float:
        if isinstance(option, Tensor):
            for axis in [axis for axis, size in enumerate(option.shape) if size == c]:
                option = option.index_select(axis, order)
        return option

    options = {name: permuted_option(option) for name, option in case.options.items()}
    moved = tuple(permuted(x) for x in batch)
    try:
        same(case(*moved, **options), case(*batch), "after the classes changed places", batch)
    except Broken:
        # A cost may be written into a user's loss, or its classes have an order.
        plain = {n: torch.ones_like(o) for n, o in options.items() if isinstance(o, Tensor)}
        by_itself = not plain or not torch.allclose(
            case(*moved, **plain), case(*batch, **plain), equal_nan=True
        )
        if case.reference is None and by_itself:
            raise NotApplicable("it treats its classes differently: see cost effect") from None
        raise


def shift(case: LossCase, batch: Batch) -> None:
    """A constant added to all logits changes nothing."""
    if case.shift is False:
        raise NotApplicable("its predictions are no logits of a softmax")
    check_of_classes(case, batch)
    k = case.predictions
    moved = case(*(x + 3.25 for x in batch[:k]), *batch[k:])
    try:
        same(moved, case(*batch), "with 3.25 added to every logit", batch)
    except Broken:
        if case.shift is None:
            raise NotApplicable("it is no function of softmax(logits)") from None
        raise


def weights(case: LossCase, batch: Batch) -> None:
    """A weight multiplies its example's value and gradient, at batch size one too."""
    check_uncoupled(case)
    n = batch[0].shape[0]
    if "class_weights" in case.options:
        labels, c = batch[-1], case.classes
        weights = (torch.arange(c) % 3).to(batch[0].dtype)  # 0, 1, 2, 0, 1 ...
        weighted = {"class_weights": weights}
        plain = {"class_weights": torch.ones_like(weights)}
        if labels.is_floating_point():
            raise NotApplicable("its class weights act within an example's sum over classes")
        factors = weights[labels.long()]
        got = case(*batch, **weighted)
        expected = case(*batch, **plain)
        if case.reduction != "none":
            alone = [case(*(x[i : i + 1] for x in batch), **plain) * factors[i] for i in range(n)]
            for i in range(n):
                one = tuple(x[i : i + 1] for x in batch)
                what = f"alone, an example of class weight {factors[i]:g}"
                same(case(*one, **weighted), alone[i], what, one)
            return
        same(got, factors * expected, "with class weights, against weight times value", batch)
        return
    check_per_example(case, "a weight has no single value to act on; reduce outside")
    weights = (torch.arange(n) % 3).to(batch[0].dtype) if n > 1 else batch[0].new_tensor([3.0])
    k = case.predictions

    def weighted_values(*predictions: Tensor) -> Tensor:
        loss = sample_weighted(case)
        return loss(*predictions, *batch[k:], sample_weights=weights)

    def weighted_total(*predictions: Tensor) -> Tensor:
        return weighted_values(*predictions).sum()

    same(weighted_values(*batch[:k]), weights * case(*batch), "weighted values", batch)
    got = grad(weighted_total, tuple(range(k)))(*batch[:k])
    for g, e in zip(got, gradients_of(case, batch), strict=True):
        scale = weights.reshape(-1, *(1 for _ in e.shape[1:]))
        same(g, scale * e, "weighted gradients", batch)


def cost_order(case: LossCase, batch: Batch) -> None:
    """A larger cost never makes the costly mistake cheaper."""
    if not case.costs:
        raise NotApplicable("it takes no costs")
    for i, label in enumerate(batch[-1].long().tolist()):
        one = tuple(x[i : i + 1] for x in batch)
        for name in case.costs:
            cost = case.options[name]
            assert isinstance(cost, Tensor)
            before = case(*one).sum()
            d = cost.shape[-1]
            mistakes = range(0, d, max(1, d // _MOST)) if cost.dim() == 2 else (None,)
            for decision in mistakes:
                if decision == label:
                    continue  # no mistake
                dearer = cost.clone()
                dearer[label if decision is None else (label, decision)] += 0.01
                change = float(case(*one, **{name: dearer}).sum() - before)
                if change < -1e-12 * max(1.0, float(before.abs())):
                    raise Broken(
                        f"raising {name} for a mistake on class {label} by 0.01 changes the value "
                        f"by {change:.3g}; at {shown(one)}"
                    )


def agrees(case: LossCase, batch: Batch) -> None:
    """The value is that of another computation."""
    if case.reference is None:
        raise NotApplicable("no other computation of it was given")
    expected = case.reference(*batch, **case.options)
    got = case(*batch)
    largest = max(1.0, *(float(x.abs().max()) for x in batch[: case.predictions]))
    same(got, expected.to(got.dtype), "its value, against the reference", batch, 1e-10 * largest)


def weighs_what_it_says(case: LossCase, batch: Batch) -> str:
    """A class weighs the same however it is batched, and what its cost says."""
    check_costs(case)
    return cost_effect(case).judge()
