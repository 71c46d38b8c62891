"""The laws of a loss, each tried on batches of growing size until one breaks it."""

import copy
import re
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from funcloss.combinators import couples_examples, sample_weighted
from funcloss.laws.effect import cost_effect
from funcloss.laws.subject import Batch, Broken, NotApplicable, Subject, in_dtype, shown

HALF = (torch.float16, torch.bfloat16)


class Law(NamedTuple):
    """What must hold, how it is tried, and what to write where it does not."""

    holds: Callable[[Subject, Batch], str | None]  # raises Broken or NotApplicable; may remark
    meaning: str
    advice: str
    sizes: tuple[int, ...] = (1, 2, 3, 16)


class Finding(NamedTuple):
    """What one law says of one loss."""

    law: str
    verdict: str  # "pass", "fail" or "not applicable"
    detail: str = ""  # the smallest counter-example, why the law does not apply, or a remark
    advice: str = ""  # what to write instead


def try_law(name: str, subject: Subject) -> Finding:
    """Try one law on a loss.

    Args:
        name: A key of ``LAWS``.
        subject: The loss and its data.

    Returns:
        The finding; a failure shows the smallest batch that broke the law.

    Example:
        >>> from funcloss.laws import SUBJECTS
        >>> try_law("shift", SUBJECTS["cross_entropy"]).verdict
        'pass'
    """
    law = LAWS[name]
    subject = subject.fresh()
    if name in subject.limits:
        return Finding(name, "not applicable", subject.limits[name])
    remark = None
    try:
        for n in law.sizes:
            batch = subject.data(n, Generator().manual_seed(n))
            try:
                with warnings.catch_warnings():
                    # torch's own, at the first forward-mode derivative of a process
                    warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
                    remark = law.holds(subject, batch)
            except (Broken, NotApplicable):
                raise
            except (Exception, SystemExit) as error:  # what the loss raises is its failure
                raise Broken(f"{_raised(error)}; at {shown(batch)}") from error
    except NotApplicable as reason:
        return Finding(name, "not applicable", str(reason))
    except Broken as failure:
        cure = "" if name == "masked = dropped" else _cure(failure)
        return Finding(name, "fail", str(failure), cure or law.advice)
    return Finding(name, "pass", remark or "")


def check(subject: Subject, *, inductor: bool = False) -> list[Finding]:
    """Try every law on a loss.

    Args:
        subject: The loss and its data.
        inductor: Whether to try the default compiler too, which takes seconds to minutes.

    Returns:
        A finding a law, in the order of ``LAWS``.
    """
    names = [name for name in LAWS if inductor or name != "inductor"]
    runs = try_law("runs", subject)
    if runs.verdict == "fail":
        why = "it does not run on every batch"
        return [runs, *(Finding(name, "not applicable", why) for name in names[1:])]
    return [runs, *(try_law(name, subject) for name in names[1:])]


def _raised(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"raised {type(error).__name__}: {lines[0].split('. ')[0][:200]}"


_CURES = {
    "one_hot": "make one-hots by comparison: labels[..., None] == torch.arange(classes)",
    "scalar type Long": "labels are integers: leave them so, and take a mask as labels == c",
    "Long or Byte": "labels are integers: leave them so, and take a mask as labels == c",
    "setup_context": "give the gradient to funcloss.custom_vjp instead of an autograd.Function",
    "generate_vmap_rule": "give the gradient to funcloss.custom_vjp, not an autograd.Function",
    "autograd.Function": "give the gradient to funcloss.custom_vjp, not an autograd.Function",
    "jvp": "give the gradient to funcloss.custom_vjp, which has every derivative",
    "numpy": "stay in torch, or wrap NumPy's forward and backward in funcloss.from_numpy",
    "item()": "no .item() and no `if` on a tensor's values: choose with torch.where",
    "data-dependent": "no .item() and no `if` on a tensor's values: choose with torch.where",
    "random operation": "draw nothing: make what is random an input",
    "dynamic shape": "no boolean indexing: choose with torch.where",
    "out of bounds": "axis 0 is the batch: reach the classes as the last axis, [..., c]",
}


_LOOKUP = re.compile(r"^ +.*\w\[(y|labels?|targets?)\]", re.M)  # in a line of the loss


def _cure(failure: Broken) -> str:
    """Return what to write instead, where what was raised tells it."""
    if failure.__cause__ is None:
        return ""
    told = "".join(traceback.format_exception(failure.__cause__))
    if "item()" in told and _LOOKUP.search(told):
        return "look up by gather, w.gather(0, y.reshape(-1)).reshape(y.shape), not by w[y]"
    return next((cure for sign, cure in _CURES.items() if sign in told), "")


# -- what the laws have in common --------------------------------------------------------------


def _same(
    got: Tensor, expected: Tensor, what: str, batch: Batch, tolerance: float | None = None
) -> None:
    """Raise ``Broken`` unless two tensors agree, relative to the largest that is expected."""
    if got.shape != expected.shape:
        raise Broken(f"{what}: shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    if tolerance is None:
        tolerance = 1e-7 if expected.dtype == torch.float64 else 1e-4
    size = expected.detach().abs().nan_to_num(0, 0, 0).max() if expected.numel() else 0.0
    off = (got - expected).abs() > tolerance * max(1.0, float(size))
    unequal = off | (got.isnan() != expected.isnan()) | (got.isinf() != expected.isinf())
    if unequal.any():
        where = tuple(unequal.nonzero()[0].tolist()) if unequal.dim() else ()
        raise Broken(
            f"{what}: {float(got[where]):.6g}, not {float(expected[where]):.6g}; at {shown(batch)}"
        )


def _total(subject: Subject, batch: Batch) -> Callable[..., Tensor]:
    """Return the sum of the values as a function of the predictions."""

    def total(*predictions: Tensor) -> Tensor:
        return subject(*predictions, *batch[subject.predictions :]).sum()

    return total


def _gradients(subject: Subject, batch: Batch) -> tuple[Tensor, ...]:
    """Return the gradients by plain autograd, which any loss must have."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in batch[: subject.predictions])
    total = _total(subject, batch)(*inputs)
    return torch.autograd.grad(total, inputs, materialize_grads=True)


def _uncoupled(subject: Subject) -> None:
    if couples_examples(subject.loss):
        raise NotApplicable("it couples the examples of a batch")


def _per_example(subject: Subject, law: str) -> None:
    if subject.reduction != "none":
        raise NotApplicable(f"it is reduced: {law}")


def _of_classes(subject: Subject, batch: Batch) -> None:
    if not any(x.dim() > 1 and x.shape[-1] == subject.classes for x in batch[:1]):
        raise NotApplicable("its predictions have no axis of classes")


# -- the laws ----------------------------------------------------------------------------------


def _runs(subject: Subject, batch: Batch) -> None:
    values = subject(*batch)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise Broken(f"it gives {type(values).__name__}, not a floating tensor")
    if not values.isfinite().all():
        raise Broken(f"at ordinary predictions it gives {shown((values,))}; at {shown(batch)}")


def _map_over_examples(subject: Subject, batch: Batch) -> None:
    _uncoupled(subject)
    values = subject(*batch)
    n = batch[0].shape[0]
    alone = torch.stack([subject(*(x[i : i + 1] for x in batch)).sum() for i in range(n)])
    if subject.reduction == "none":
        if tuple(values.shape) != (n,):
            raise Broken(
                f"{n} examples give shape {tuple(values.shape)}, not one value an example, ({n},)"
            )
        _same(values, alone, "an example's value within its batch, against alone", batch)
        mapped = vmap(subject.of_one)(*batch)
        _same(mapped, alone, "vmap(loss), against one example at a time", batch)
    else:
        expected = alone.sum() if subject.reduction == "sum" else alone.mean()
        whole = "sum" if subject.reduction == "sum" else "mean"
        _same(values, expected, f"the batch's value, against the {whole} of its examples'", batch)


def _per_sample_gradients(subject: Subject, batch: Batch) -> None:
    _uncoupled(subject)
    k = subject.predictions
    ones = torch.ones((), dtype=batch[0].dtype)

    def of_scale(scale: Tensor, *data: Tensor) -> Tensor:
        return subject(*(scale * x for x in data[:k]), *data[k:]).sum()

    def of_one(scale: Tensor, *example: Tensor) -> Tensor:
        return subject.of_one(*(scale * x for x in example[:k]), *example[k:])

    each = vmap(grad(of_one), in_dims=(None, *(0 for _ in batch)))(ones, *batch)
    expected = each.sum() if subject.reduction in ("none", "sum") else each.mean()
    whole = "sum" if subject.reduction in ("none", "sum") else "mean"
    got = grad(of_scale)(ones, *batch)
    _same(got, expected, f"the batch's gradient, against the {whole} of its examples'", batch)


def _differences(check: Callable[..., bool], **settings: bool) -> Callable[[Subject, Batch], None]:
    def holds(subject: Subject, batch: Batch) -> None:
        if batch[0].dtype != torch.float64:
            raise NotApplicable("finite differences need float64, which it refuses: see dtype")
        k = subject.predictions
        options = {name: o for name, o in subject.options.items() if isinstance(o, Tensor)}
        named = [name for name, option in options.items() if option.is_floating_point()]
        if subject.reference is None:  # a user's options need no gradient
            named = []
        varied = (*batch[:k], *(options[name] for name in named))
        inputs = [x.detach().clone().requires_grad_() for x in varied]

        def of(*args: Tensor) -> Tensor:
            given = dict(zip(named, args[k:], strict=True))
            return subject(*args[:k], *batch[k:], **given)

        try:
            check(of, inputs, **settings)
        except GradcheckError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise Broken(f"{' '.join(lines[:3])[:240]}; at {shown(batch)}") from None

    return holds


def _forward_is_reverse(subject: Subject, batch: Batch) -> None:
    k = subject.predictions
    argnums = tuple(range(k))

    def of(*predictions: Tensor) -> Tensor:
        return subject(*predictions, *batch[k:])

    forward, reverse = (jac(of, argnums)(*batch[:k]) for jac in (jacfwd, jacrev))
    for f, r in zip(forward, reverse, strict=True):
        _same(f, r, "jacfwd, against jacrev", batch)


def _hessian_is_symmetric(subject: Subject, batch: Batch) -> None:
    total = _total(subject, batch)
    rest = batch[1 : subject.predictions]
    size = batch[0].numel()
    second = hessian(lambda p: total(p, *rest))(batch[0]).reshape(size, size)
    if not second.isfinite().all():
        raise Broken(f"the Hessian is not finite; at {shown(batch)}")
    _same(second, second.T, "the Hessian, against its transpose", batch)


def _one_graph(backend: str) -> Callable[[Subject, Batch], None]:
    def holds(subject: Subject, batch: Batch) -> None:
        # What is traced is made of plain functions: an older compiler traces no more than that.
        loss, options, k = subject.loss, dict(subject.options), subject.predictions
        unbatched = subject.unbatched and subject.reduction == "none"

        def value(*data: Tensor) -> Tensor:
            return loss(*data, **options)

        def gradient(*data: Tensor) -> tuple[Tensor, ...]:
            def total(*predictions: Tensor) -> Tensor:
                return value(*predictions, *data[k:]).sum()

            return grad(total, tuple(range(k)))(*data[:k])

        def of_one(*example: Tensor) -> Tensor:
            if unbatched:
                return value(*example)
            return value(*(x.unsqueeze(0) for x in example)).sum()

        forms = {"the value": value, "grad": gradient}
        if not couples_examples(loss):
            forms["vmap(grad)"] = vmap(grad(of_one, tuple(range(k))))

        def together(*data: Tensor) -> dict:
            return {name: form(*data) for name, form in forms.items()}

        torch.compiler.reset()
        try:
            got = torch.compile(together, fullgraph=True, backend=backend)(*batch)
        except Exception as error:
            raise Broken(_which(forms, batch, backend) or _raised(error)) from error
        for name, expected in together(*batch).items():
            pairs = (got[name], expected) if name != "the value" else ((got[name],), (expected,))
            for g, e in zip(*pairs, strict=True):
                _same(g, e, f"compiled {name}, against eager", batch)

    return holds


def _which(forms: dict[str, Callable], batch: Batch, backend: str) -> str:
    """Return which form does not compile, and what the compiler says."""
    for name, form in forms.items():
        torch.compiler.reset()
        try:
            torch.compile(form, fullgraph=True, backend=backend)(*batch)
        except Exception as error:  # the compiler raises what it likes
            return f"torch.compile of {name} {_raised(error)}"
    return ""


def _stays_finite(subject: Subject, batch: Batch) -> str | None:
    k = subject.predictions
    for dtype in (torch.float32, batch[0].dtype):
        data, there = in_dtype(batch, dtype), subject.in_dtype(dtype)
        for extreme in subject.extremes:
            for every in (1, 2, 3):
                far = [x.clone() for x in data[:k]]
                for x in far:
                    x.view(-1)[::every] = extreme
                _finite(there, (*far, *data[k:]), f"at predictions of {extreme:g}")
    if subject.minus_inf:
        logits, labels = batch
        classes = torch.arange(logits.shape[-1])
        barred = classes == (labels[:, None] + 1) % logits.shape[-1]
        _finite(subject, (torch.where(barred, -torch.inf, logits), labels), "at a logit of -inf")
    if subject.extremes == (1e4, -1e4):
        return None
    return f"tried at {' and '.join(f'{x:g}' for x in subject.extremes)}"


def _finite(subject: Subject, batch: Batch, where: str) -> None:
    values = subject(*batch)
    if not values.isfinite().all():
        raise Broken(f"{where} its value is {shown((values,))}; at {shown(batch)}")
    for gradient in _gradients(subject, batch):
        if not gradient.isfinite().all():
            raise Broken(f"{where} its gradient is {shown((gradient,))}; at {shown(batch)}")


def _masked_is_dropped(subject: Subject, batch: Batch) -> None:
    if not subject.takes_where:
        raise NotApplicable("it takes no `where`")
    n = batch[0].shape[0]
    where = torch.arange(n) % 3 != 1 if n > 1 else torch.tensor([subject.reduction != "none"])
    kept = tuple(x[where] for x in batch)
    for bad in (torch.inf, -torch.inf, torch.nan, 1e300):
        spoilt = tuple(_spoilt(x, where, bad) for x in batch)
        under = subject._replace(options={**subject.options, "where": where})
        values, gradients = under(*spoilt), _gradients(under, spoilt)
        if subject.reduction == "none":
            _same(values[~where], torch.zeros_like(values[~where]), "a masked value", batch)
            values = values[where]
        for got in gradients:
            _same(got[~where], torch.zeros_like(got[~where]), "a masked gradient", batch)
        if where.any():
            _same(values, subject(*kept), "values beside masked ones, against alone", batch)
            for got, expected in zip(gradients, _gradients(subject, kept), strict=True):
                _same(got[where], expected, "gradients beside masked ones", batch)


def _spoilt(x: Tensor, where: Tensor, bad: float) -> Tensor:
    spoilt = x.clone()
    spoilt[~where] = bad if x.is_floating_point() else 99
    return spoilt


def _dtype_is_kept(subject: Subject, batch: Batch) -> None:
    for dtype in (*HALF, torch.float32, torch.float64):
        data, there = in_dtype(batch, dtype), subject.in_dtype(dtype)
        values = there(*data)
        if values.dtype != dtype:
            raise Broken(f"{dtype} in, {values.dtype} out")
        if batch[0].dtype != torch.float64:
            continue
        exact = there.in_dtype(torch.float64)(*in_dtype(data, torch.float64))
        largest = max(1.0, *(float(x.abs().max()) for x in data[: subject.predictions]))
        tolerance = 4 * torch.finfo(dtype).eps * largest
        _same(values.double(), exact, f"in {dtype}, against float64", data, tolerance)


def _is_pure(subject: Subject, batch: Batch) -> None:
    tensors = [*batch, *(o for o in subject.options.values() if isinstance(o, Tensor))]
    before = [x.clone() for x in tensors]
    kept = copy.deepcopy(_state(subject.loss))
    first = subject(*batch)
    subject(*(x.flip(0) for x in batch))
    second = subject(*batch)
    for x, was in zip(tensors, before, strict=True):
        if not torch.equal(x, was):
            raise Broken(f"it changed what it was given: {shown((was,))} became {shown((x,))}")
    _same(second, first, "the second answer to one question, against the first", batch, 0.0)
    for name, now in _state(subject.loss).items():
        was = kept.get(name)
        same = (
            torch.equal(was, now)
            if isinstance(now, Tensor) and isinstance(was, Tensor)
            else (was == now)
        )
        if not same:
            raise Broken(f"it keeps a state: {name} changed")


def _state(loss: Callable[..., Tensor]) -> dict[str, Any]:
    """Return what a module remembers: its tensors, and the plain values among its attributes."""
    if not isinstance(loss, torch.nn.Module):
        return {}
    plain = {n: v for n, v in vars(loss).items() if isinstance(v, (int, float, str, Tensor))}
    return {**plain, **loss.state_dict()}


def _permutes(subject: Subject, batch: Batch) -> None:
    _of_classes(subject, batch)
    c = subject.classes
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

    options = {name: permuted_option(option) for name, option in subject.options.items()}
    moved = tuple(permuted(x) for x in batch)
    try:
        _same(
            subject(*moved, **options), subject(*batch), "after the classes changed places", batch
        )
    except Broken:
        # A cost may be written into a user's loss, or its classes have an order.
        plain = {n: torch.ones_like(o) for n, o in options.items() if isinstance(o, Tensor)}
        by_itself = not plain or not torch.allclose(
            subject(*moved, **plain), subject(*batch, **plain), equal_nan=True
        )
        if subject.reference is None and by_itself:
            raise NotApplicable("it treats its classes differently: see cost effect") from None
        raise


def _shift(subject: Subject, batch: Batch) -> None:
    if subject.shift is False:
        raise NotApplicable("its predictions are no logits of a softmax")
    _of_classes(subject, batch)
    k = subject.predictions
    moved = subject(*(x + 3.25 for x in batch[:k]), *batch[k:])
    try:
        _same(moved, subject(*batch), "with 3.25 added to every logit", batch)
    except Broken:
        if subject.shift is None:
            raise NotApplicable("it is no function of softmax(logits)") from None
        raise


def _weights(subject: Subject, batch: Batch) -> None:
    _uncoupled(subject)
    n = batch[0].shape[0]
    if "class_weights" in subject.options:
        labels, c = batch[-1], subject.classes
        weights = (torch.arange(c) % 3).to(batch[0].dtype)  # 0, 1, 2, 0, 1 ...
        weighted = {"class_weights": weights}
        plain = {"class_weights": torch.ones_like(weights)}
        if labels.is_floating_point():
            raise NotApplicable("its class weights act within an example's sum over classes")
        factors = weights[labels.long()]
        got = subject(*batch, **weighted)
        expected = subject(*batch, **plain)
        if subject.reduction != "none":
            alone = [
                subject(*(x[i : i + 1] for x in batch), **plain) * factors[i] for i in range(n)
            ]
            for i in range(n):
                one = tuple(x[i : i + 1] for x in batch)
                what = f"alone, an example of class weight {factors[i]:g}"
                _same(subject(*one, **weighted), alone[i], what, one)
            return
        _same(got, factors * expected, "with class weights, against weight times value", batch)
        return
    _per_example(subject, "a weight has no single value to act on; reduce outside")
    weights = (torch.arange(n) % 3).to(batch[0].dtype) if n > 1 else batch[0].new_tensor([3.0])
    k = subject.predictions

    def weighted_values(*predictions: Tensor) -> Tensor:
        loss = sample_weighted(subject)
        return loss(*predictions, *batch[k:], sample_weights=weights)

    def weighted_total(*predictions: Tensor) -> Tensor:
        return weighted_values(*predictions).sum()

    _same(weighted_values(*batch[:k]), weights * subject(*batch), "weighted values", batch)
    got = grad(weighted_total, tuple(range(k)))(*batch[:k])
    for g, e in zip(got, _gradients(subject, batch), strict=True):
        scale = weights.reshape(-1, *(1 for _ in e.shape[1:]))
        _same(g, scale * e, "weighted gradients", batch)


def _cost_order(subject: Subject, batch: Batch) -> None:
    if not subject.costs:
        raise NotApplicable("it takes no costs")
    for i, label in enumerate(batch[-1].long().tolist()):
        one = tuple(x[i : i + 1] for x in batch)
        for name in subject.costs:
            cost = subject.options[name]
            assert isinstance(cost, Tensor)
            before = subject(*one).sum()
            mistakes = range(cost.shape[-1]) if cost.dim() == 2 else (None,)
            for decision in mistakes:
                if decision == label:
                    continue  # no mistake
                dearer = cost.clone()
                dearer[label if decision is None else (label, decision)] += 0.01
                change = float(subject(*one, **{name: dearer}).sum() - before)
                if change < -1e-12 * max(1.0, float(before.abs())):
                    raise Broken(
                        f"raising {name} for a mistake on class {label} by 0.01 changes the value "
                        f"by {change:.3g}; at {shown(one)}"
                    )


def _agrees(subject: Subject, batch: Batch) -> None:
    if subject.reference is None:
        raise NotApplicable("no other computation of it was given")
    expected = subject.reference(*batch, **subject.options)
    got = subject(*batch)
    largest = max(1.0, *(float(x.abs().max()) for x in batch[: subject.predictions]))
    _same(got, expected.to(got.dtype), "its value, against the reference", batch, 1e-10 * largest)


def _cost_effect(subject: Subject, batch: Batch) -> str:
    return cost_effect(subject).judge()


LAWS: dict[str, Law] = {
    "runs": Law(
        _runs,
        "it takes batches of any size, and is finite on ordinary ones",
        "take predictions and targets whose first axis is a batch of any size",
    ),
    "map over examples": Law(
        _map_over_examples,
        "the values of a batch are those of its examples alone",
        "give one value an example and reduce outside: funcloss.mean(loss(predictions, targets)); "
        "a loss that is to couple its examples says so: loss.couples_examples = True",
    ),
    "per-sample gradients": Law(
        _per_sample_gradients,
        "the gradients of vmap(grad(loss)) sum to the gradient of the batch",
        "let no example's value depend on the rest of its batch, and divide by the number of "
        "examples alone: funcloss.mean",
    ),
    "gradcheck": Law(
        _differences(gradcheck, check_forward_ad=True),
        "the gradient is that of finite differences, forward mode too",
        "let torch differentiate the forward, or correct the backward; it must use the "
        "gradient that comes in",
        sizes=(1, 3),
    ),
    "gradgradcheck": Law(
        _differences(gradgradcheck),
        "the second derivative is that of finite differences",
        "write the backward in differentiable torch operations, through funcloss.custom_vjp",
        sizes=(1, 3),
    ),
    "jacrev = jacfwd": Law(
        _forward_is_reverse,
        "forward and reverse mode agree",
        "use differentiable torch operations, or funcloss.custom_vjp for a gradient by hand",
        sizes=(1, 3),
    ),
    "hessian": Law(
        _hessian_is_symmetric,
        "the Hessian is symmetric",
        "the backward is not the gradient of the forward: give both to funcloss.custom_vjp",
        sizes=(1, 3),
    ),
    "compile": Law(
        _one_graph("aot_eager"),
        "value, grad and vmap(grad) are one graph each, and equal eager",
        "torch operations only: no .item(), .numpy(), boolean indexing or `if` on values",
        sizes=(3,),
    ),
    "inductor": Law(
        _one_graph("inductor"),
        "the default compiler gives the same value, grad and vmap(grad)",
        "torch operations only: no .item(), .numpy(), boolean indexing or `if` on values",
        sizes=(3,),
    ),
    "extremes": Law(
        _stays_finite,
        "value and gradient are finite at predictions of 1e4 and -1e4, or where the table says",
        "compute in log space: log_softmax, logsumexp, logsigmoid, softplus; never log(sum(exp))",
    ),
    "masked = dropped": Law(
        _masked_is_dropped,
        "a masked example counts as if it were not there, also when it is inf or NaN",
        "mask with torch.where what goes into the loss and what comes out; never multiply by 0",
    ),
    "dtype": Law(
        _dtype_is_kept,
        "float16, bfloat16, float32 and float64 come out as they came in",
        "create constants with the dtype of the predictions, compute half precision in float32",
    ),
    "pure": Law(
        _is_pure,
        "no argument and no attribute of a module changes, the same question has one answer",
        "operate out of place (clone before editing a NumPy view) and keep nothing",
    ),
    "class permutation": Law(
        _permutes,
        "classes that change places, costs with them, change nothing",
        "treat the classes alike; what is particular to one belongs in an option",
    ),
    "shift": Law(
        _shift,
        "a constant added to all logits changes nothing",
        "take log_softmax of the logits first",
    ),
    "weights": Law(
        _weights,
        "weight 0 removes an example, weight k multiplies it, at batch size one too",
        "divide by the number of examples, not by the sum of the weights: "
        "funcloss.mean(funcloss.class_weighted(loss)(...))",
    ),
    "cost order": Law(
        _cost_order,
        "a larger cost never makes the costly mistake cheaper",
        "let the loss grow with each entry of the costs",
    ),
    "reference": Law(
        _agrees,
        "the value is that of torch, or of a plain loop in float64",
        "compare the formulas",
    ),
    "cost effect": Law(
        _cost_effect,
        "a class weighs the same in a batch, across random batches and alone, and what its cost "
        "says where one is stated",
        "multiply each value before reducing: "
        "funcloss.mean(funcloss.class_weighted(loss)(logits, labels, class_weights=w))",
        sizes=(1,),
    ),
}
