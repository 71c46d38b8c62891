"""The laws of a loss under transforms: mapped, differentiated, compiled.

Each takes a case and a batch, and raises ``Broken`` or ``NotApplicable`` where it does not hold.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, vmap

from funcloss.combinators import couples_examples
from funcloss.laws._common import (
    check_per_example,
    check_uncoupled,
    gradients_of,
    raised,
    same,
    seen_in,
    total_of,
)
from funcloss.laws.case import Batch, Broken, LossCase, NotApplicable, shown

_COUPLING = (
    "dim=0", "axis=0", "softmax(0", "amax()", ".max()", ".mean()", ".sum()", ".std(", ".var(",
    ".median()", ".item()", "weight=", "topk", "batch_norm",
)  # fmt: skip
_DETACHING = (".detach(", "no_grad", ".data")  # which cut a part of the gradient, on purpose
_MOST_COLUMNS = 16  # of predictions that finite differences and second derivatives are tried in


def runs(case: LossCase, batch: Batch) -> None:
    """It takes batches of any size, and is finite on ordinary ones."""
    values = case(*batch)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise Broken(f"it gives {type(values).__name__}, not a floating tensor")
    if not values.isfinite().all():
        raise Broken(f"at ordinary predictions it gives {shown((values,))}; at {shown(batch)}")


def map_over_examples(case: LossCase, batch: Batch) -> None:
    """The values of a batch are those of its examples alone, also where predictions are large."""
    check_uncoupled(case)
    k = case.predictions
    _is_map(case, batch)
    n, together = len(batch[0]), gradients_of(case, batch)
    for i in range(n):
        alone = gradients_of(case, tuple(x[i : i + 1] for x in batch))
        for whole, one in zip(together, alone, strict=True):
            scale = 1 if case.reduction in ("none", "sum") else n
            what = "an example's gradient within its batch, against alone"
            same(scale * whole[i : i + 1], one, what, batch, also=seen_in(case, _COUPLING))
    for scale in (10, 30) if case.extremes == (1e4, -1e4) else ():
        _is_map(case, (*(scale * x for x in batch[:k]), *batch[k:]))


def _is_map(case: LossCase, batch: Batch) -> None:
    values = case(*batch)
    n = batch[0].shape[0]
    alone = torch.stack([case(*(x[i : i + 1] for x in batch)).sum() for i in range(n)])
    shape = tuple(values.shape)
    if case.reduction == "none" and shape != (n,) and (n, values.numel()) != (1, 1):
        raise Broken(f"{n} examples give shape {shape}, not one value per example, ({n},)")
    sums = case.reduction in ("none", "sum")
    whole = "value within its batch, against alone"
    if case.reduction != "none":
        alone = alone.sum() if sums else alone.mean()
        whole = f"part in the value, against the {'sum' if sums else 'mean'} of all alone"
    code = seen_in(case, _COUPLING)
    same(values.reshape(alone.shape), alone, f"an example's {whole}", batch, also=code)


def maps_single_examples(case: LossCase, batch: Batch) -> None:
    """Vmap gives the values of single examples, which have no batch axis."""
    check_uncoupled(case)
    if not case.unbatched:
        _says_why(case, tuple(x[0] for x in batch))
    check_per_example(case, "there is no single value to map")
    alone = torch.stack([case(*(x[i : i + 1] for x in batch)).sum() for i in range(len(batch[0]))])
    same(vmap(case.of_one)(*batch), alone, "vmap(loss), against one example at a time", batch)


def _says_why(case: LossCase, example: Batch) -> None:
    """Raise ``Broken`` with what a single example does."""
    try:
        value = case(*example)
    except Exception as error:
        raise Broken(
            f"it needs a batch axis: a single example {raised(error)}",
            "count axes from the last: dim=-1, labels[..., None]; gather looks up, not "
            "[arange(len(labels)), labels]",
        ) from error
    raise Broken(f"it needs a batch axis: a single example gives shape {tuple(value.shape)}")


def per_sample_gradients(case: LossCase, batch: Batch) -> None:
    """The gradients of single examples sum to the gradient of the batch."""
    check_uncoupled(case)
    k = case.predictions
    ones = torch.ones((), dtype=batch[0].dtype)

    def of_scale(scale: Tensor, *data: Tensor) -> Tensor:
        return case(*(scale * x for x in data[:k]), *data[k:]).sum()

    def of_one(scale: Tensor, *example: Tensor) -> Tensor:
        return case.of_one(*(scale * x for x in example[:k]), *example[k:])

    each = vmap(grad(of_one), in_dims=(None, *(0 for _ in batch)))(ones, *batch)
    expected = each.sum() if case.reduction in ("none", "sum") else each.mean()
    whole = "sum" if case.reduction in ("none", "sum") else "mean"
    got = grad(of_scale)(ones, *batch)
    same(got, expected, f"the batch's gradient, against the {whole} of its examples'", batch)


def _narrowed(case: LossCase, batch: Batch) -> tuple[Batch, Callable[[Tensor, int], Tensor]]:
    """Return the predictions in few of their columns, and how to put them back."""
    wide, labels = batch[: case.predictions], batch[-1]
    if wide[0].dim() != 2 or wide[0].shape[-1] <= _MOST_COLUMNS:
        return wide, lambda x, i: x
    columns = torch.arange(3)
    if not labels.is_floating_point():
        columns = torch.cat([columns, labels]).unique()

    def widened(x: Tensor, i: int) -> Tensor:
        return wide[i].scatter(-1, columns.expand(len(wide[i]), -1), x)

    return tuple(x[:, columns] for x in wide), widened


def differences(check: Callable[..., bool]) -> Callable[[LossCase, Batch], None]:
    """Return the law that a check by finite differences holds, and that torch.func agrees."""

    def holds(case: LossCase, batch: Batch) -> None:
        if batch[0].dtype != torch.float64:
            raise NotApplicable("finite differences need float64, which it refuses: see dtype")
        k = case.predictions
        if check is gradcheck:
            total = total_of(case, batch)
            functional = grad(total, tuple(range(k)))(*batch[:k])
            for f, g in zip(functional, gradients_of(case, batch), strict=True):
                same(f, g, "torch.func.grad, against autograd", batch)
        options = {name: o for name, o in case.options.items() if isinstance(o, Tensor)}
        named = [name for name, option in options.items() if option.is_floating_point()]
        if case.reference is None:  # a user's options need no gradient
            named = []
        few, widened = _narrowed(case, batch)
        varied = (*few, *(options[name] for name in named))
        inputs = [x.detach().clone().requires_grad_() for x in varied]

        def of(*args: Tensor) -> Tensor:
            given = dict(zip(named, args[k:], strict=True))
            return case(*map(widened, args[:k], range(k)), *batch[k:], **given)

        try:
            check(of, inputs)
            if check is gradcheck and case.reference is not None:  # of the options too
                check(of, inputs, check_forward_ad=True)
        except GradcheckError as error:
            if check is gradcheck and seen_in(case, _DETACHING):
                raise NotApplicable(
                    "part of it is detached: its gradient is not the derivative of its value"
                ) from None
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise Broken(f"{' '.join(lines[:3])[:240]}; at {shown(batch)}") from None

    return holds


def forward_is_reverse(case: LossCase, batch: Batch) -> None:
    """Forward and reverse mode agree."""
    few, widened = _narrowed(case, batch)
    k = case.predictions
    argnums = tuple(range(k))

    def of(*predictions: Tensor) -> Tensor:
        return case(*map(widened, predictions, range(k)), *batch[k:])

    forward, reverse = (jac(of, argnums)(*few) for jac in (jacfwd, jacrev))
    for f, r in zip(forward, reverse, strict=True):
        same(f, r, "jacfwd, against jacrev", batch)


def hessian_is_symmetric(case: LossCase, batch: Batch) -> None:
    """The Hessian is finite and symmetric."""
    total = total_of(case, batch)
    rest = batch[1 : case.predictions]
    few, widened = _narrowed(case, batch)
    size = few[0].numel()
    second = hessian(lambda p: total(widened(p, 0), *rest))(few[0]).reshape(size, size)
    if not second.isfinite().all():
        raise Broken(f"the Hessian is not finite; at {shown(batch)}")
    same(second, second.T, "the Hessian, against its transpose", batch)


def one_graph(backend: str) -> Callable[[LossCase, Batch], None]:
    """Return the law that the compiled loss is one graph and gives what eager gives."""

    def holds(case: LossCase, batch: Batch) -> None:
        # What is traced is made of plain functions: an older compiler traces no more than that.
        loss, options, k = case.loss, dict(case.options), case.predictions
        unbatched = case.unbatched and case.reduction == "none"

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

        def layer(*data: Tensor) -> tuple[Tensor, ...]:
            """Return the value of products and its gradients, which are products too."""

            def total(*parts: Tensor) -> Tensor:
                pairs = zip(parts[:k], parts[k:], strict=True)
                predictions = ((mix @ p.reshape(n, -1)).view_as(p) for mix, p in pairs)
                return value(*predictions, *data[k:]).sum()

            grads, of_products = grad_and_value(total, tuple(range(2 * k)))(*mixes, *data[:k])
            return (of_products, *grads)

        # Each row a weighted mean of the predictions, which a loss takes as it takes them.
        n = len(batch[0])
        mixes = tuple(0.7 * torch.eye(n, dtype=p.dtype) + 0.3 / n for p in batch[:k])
        forms: dict[str, Callable] = {"the value": value, "grad": gradient}
        if backend == "inductor":  # which alone fuses the loss with what is before it
            forms["a linear layer"] = layer
        if not couples_examples(loss):
            forms["vmap(grad)"] = vmap(grad(of_one, tuple(range(k))))

        def together(*data: Tensor) -> dict:
            return {name: form(*data) for name, form in forms.items()}

        torch.compiler.reset()
        try:
            got = torch.compile(together, fullgraph=True, backend=backend)(*batch)
        except Exception as error:
            raise Broken(_which(forms, batch, backend) or raised(error)) from error
        for name, expected in together(*batch).items():
            pairs = (got[name], expected) if name != "the value" else ((got[name],), (expected,))
            for g, e in zip(*pairs, strict=True):
                same(g, e, f"compiled {name}, against eager", batch)

    return holds


def _which(forms: dict[str, Callable], batch: Batch, backend: str) -> str:
    """Return which form does not compile, and what the compiler says."""
    for name, form in forms.items():
        torch.compiler.reset()
        try:
            torch.compile(form, fullgraph=True, backend=backend)(*batch)
        except Exception as error:  # the compiler raises what it likes
            return f"torch.compile of {name} {raised(error)}"
    return ""
