"""What the laws have in common: how tensors are compared, and what a loss must be for a law."""

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from funcloss.combinators import couples_examples
from funcloss.laws.case import Batch, Broken, LossCase, NotApplicable, shown


@contextlib.contextmanager
def left_as_found() -> Iterator[None]:
    """Try a loss in torch's usual state, and put back whatever of it the loss changes.

    On one thread: the batches are so small that several would mostly wait for each other.
    """
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)


def raised(error: BaseException, where: str = "") -> str:
    """Return a line on what was raised, and where, if that is known."""
    lines = str(error).strip().splitlines() or [""]
    kind = f"{type(error).__name__} in {where}" if where else type(error).__name__
    return f"raised {kind}: {lines[0].split('. ')[0][:200]}"


def same(
    got: Tensor,
    expected: Tensor,
    what: str,
    batch: Batch,
    tolerance: float | None = None,
    also: str = "",
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
            f"{what}: {float(got[where]):.6g}, not {float(expected[where]):.6g}{also}; "
            f"at {shown(batch)}"
        )


def total_of(case: LossCase, batch: Batch) -> Callable[..., Tensor]:
    """Return the sum of the values as a function of the predictions."""

    def total(*predictions: Tensor) -> Tensor:
        return case(*predictions, *batch[case.predictions :]).sum()

    return total


def seen_in(case: LossCase, signs: tuple[str, ...]) -> str:
    """Return which of some signs are in the code of a loss, as the end of a line; else nothing."""
    loss = case.loss.forward if isinstance(case.loss, nn.Module) else case.loss
    try:
        source = inspect.getsource(inspect.unwrap(loss))
    except (OSError, TypeError):
        return ""
    lines = [line.split("#")[0] for line in source.splitlines()]
    found = [sign.strip(".(") for sign in signs if any(sign in line for line in lines)]
    return f": see {', '.join(dict.fromkeys(found))} in its code" if found else ""


def gradients_of(case: LossCase, batch: Batch) -> tuple[Tensor, ...]:
    """Return the gradients by plain autograd, which any loss must have."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in batch[: case.predictions])
    total = total_of(case, batch)(*inputs)
    return torch.autograd.grad(total, inputs, materialize_grads=True)


def check_uncoupled(case: LossCase) -> None:
    """Raise ``NotApplicable`` where a loss couples its examples."""
    if couples_examples(case.loss):
        raise NotApplicable("it couples the examples of a batch")


def check_per_example(case: LossCase, law: str) -> None:
    """Raise ``NotApplicable`` where a loss is reduced."""
    if case.reduction != "none":
        raise NotApplicable(f"it is reduced: {law}")


def check_of_classes(case: LossCase, batch: Batch) -> None:
    """Raise ``NotApplicable`` where the predictions are not one a class."""
    if not any(x.dim() > 1 and x.shape[-1] == case.classes for x in batch[:1]):
        raise NotApplicable("its predictions have no axis of classes")


def check_finite(case: LossCase, batch: Batch, where: str) -> None:
    """Raise ``Broken`` unless value and gradient are finite."""
    named = {"value": (case(*batch),)}
    if named["value"][0].isfinite().all():
        named = {"gradient": gradients_of(case, batch)}
    for what, tensors in named.items():
        for x in tensors:
            if x.isfinite().all():
                continue
            i = int((~x.isfinite()).nonzero()[0][0]) if x.dim() else None
            one = batch if i is None else tuple(part[i : i + 1] for part in batch)
            bad = x if i is None else x[i]
            bad = bad[~bad.isfinite()].flatten()[:1]
            raise Broken(f"{where} its {what} is {float(bad):g}; at {shown(one)}")
