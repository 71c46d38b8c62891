"""What the laws have in common: how tensors are compared, and what a loss must be for a law."""

from collections.abc import Callable

import torch
from torch import Tensor

from funcloss.combinators import couples_examples
from funcloss.laws.case import Batch, Broken, LossCase, NotApplicable, shown


def raised(error: BaseException) -> str:
    """Return a line on what was raised."""
    lines = str(error).strip().splitlines() or [""]
    return f"raised {type(error).__name__}: {lines[0].split('. ')[0][:200]}"


def same(
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


def total_of(case: LossCase, batch: Batch) -> Callable[..., Tensor]:
    """Return the sum of the values as a function of the predictions."""

    def total(*predictions: Tensor) -> Tensor:
        return case(*predictions, *batch[case.predictions :]).sum()

    return total


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
