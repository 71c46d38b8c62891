"""The laws of a loss under transforms: mapped, differentiated, compiled.

Each takes a case and a batch, and raises ``Broken`` or ``NotApplicable`` where it does not hold.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, vmap

from funcloss.combinators import couples_examples
from funcloss.laws._common import check_uncoupled, raised, same, total_of
from funcloss.laws.case import Batch, Broken, LossCase, NotApplicable, shown


def runs(case: LossCase, batch: Batch) -> None:
    """It takes batches of any size, and is finite on ordinary ones."""
    values = case(*batch)
    if not isinstance(values, Tensor) or not values.is_floating_point():
        raise Broken(f"it gives {type(values).__name__}, not a floating tensor")
    if not values.isfinite().all():
        raise Broken(f"at ordinary predictions it gives {shown((values,))}; at {shown(batch)}")


def map_over_examples(case: LossCase, batch: Batch) -> None:
    """The values of a batch are those of its examples alone."""
    check_uncoupled(case)
    values = case(*batch)
    n = batch[0].shape[0]
    alone = torch.stack([case(*(x[i : i + 1] for x in batch)).sum() for i in range(n)])
    if case.reduction == "none":
        if tuple(values.shape) != (n,):
            raise Broken(
                f"{n} examples give shape {tuple(values.shape)}, not one value per example, ({n},)"
            )
        same(values, alone, "an example's value within its batch, against alone", batch)
        mapped = vmap(case.of_one)(*batch)
        same(mapped, alone, "vmap(loss), against one example at a time", batch)
    else:
        expected = alone.sum() if case.reduction == "sum" else alone.mean()
        whole = "sum" if case.reduction == "sum" else "mean"
        same(values, expected, f"the batch's value, against the {whole} of its examples'", batch)


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


def differences(check: Callable[..., bool], **settings: bool) -> Callable[[LossCase, Batch], None]:
    """Return the law that a check by finite differences holds."""

    def holds(case: LossCase, batch: Batch) -> None:
        if batch[0].dtype != torch.float64:
            raise NotApplicable("finite differences need float64, which it refuses: see dtype")
        k = case.predictions
        options = {name: o for name, o in case.options.items() if isinstance(o, Tensor)}
        named = [name for name, option in options.items() if option.is_floating_point()]
        if case.reference is None:  # a user's options need no gradient
            named = []
        varied = (*batch[:k], *(options[name] for name in named))
        inputs = [x.detach().clone().requires_grad_() for x in varied]

        def of(*args: Tensor) -> Tensor:
            given = dict(zip(named, args[k:], strict=True))
            return case(*args[:k], *batch[k:], **given)

        try:
            check(of, inputs, **settings)
        except GradcheckError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise Broken(f"{' '.join(lines[:3])[:240]}; at {shown(batch)}") from None

    return holds


def forward_is_reverse(case: LossCase, batch: Batch) -> None:
    """Forward and reverse mode agree."""
    k = case.predictions
    argnums = tuple(range(k))

    def of(*predictions: Tensor) -> Tensor:
        return case(*predictions, *batch[k:])

    forward, reverse = (jac(of, argnums)(*batch[:k]) for jac in (jacfwd, jacrev))
    for f, r in zip(forward, reverse, strict=True):
        same(f, r, "jacfwd, against jacrev", batch)


def hessian_is_symmetric(case: LossCase, batch: Batch) -> None:
    """The Hessian is finite and symmetric."""
    total = total_of(case, batch)
    rest = batch[1 : case.predictions]
    size = batch[0].numel()
    second = hessian(lambda p: total(p, *rest))(batch[0]).reshape(size, size)
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
