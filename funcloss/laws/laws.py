"""The table of laws, each tried on batches of growing size until one breaks it."""

import linecache
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator
from torch.autograd import gradcheck, gradgradcheck

from funcloss.laws import edges, learning, transforms, values
from funcloss.laws._common import left_as_found, raised
from funcloss.laws.case import CLASSES, Batch, Broken, LossCase, NotApplicable, shown
from funcloss.transforms import quiet_jvp

LOOKUP = "the lookup"  # of a single label in a table, as a finding's detail calls it
_TORCH, _HERE = (str(Path(file).parent) for file in (torch.__file__, __file__))


@dataclass(frozen=True)
class Law:
    """What must hold, how it is tried, and what to write where it does not."""

    holds: Callable[[LossCase, Batch], str | None]  # raises Broken or NotApplicable; may remark
    meaning: str
    advice: str
    sizes: tuple[int, ...] = (1, 2, 3, 16)
    everywhere: bool = False  # whether a loss that breaks it still trains on batches


@dataclass(frozen=True)
class Finding:
    """What one law says of one loss."""

    law: str
    verdict: str  # "pass", "fail" or "not applicable"
    detail: str = ""  # the smallest counter-example, why the law does not apply, or a remark
    advice: str = ""  # what to write instead


def try_law(name: str, case: LossCase) -> Finding:
    """Try one law on a loss.

    Args:
        name: A key of ``LAWS``.
        case: The loss and its data.

    Returns:
        The finding; a failure shows the smallest batch that broke the law.

    Example:
        >>> from funcloss import laws, losses
        >>> try_law("shift", laws.adapt(losses.cross_entropy).case).verdict
        'pass'
    """
    law = LAWS[name]
    case = case.fresh()
    if name in case.limits:
        return Finding(name, "not applicable", case.limits[name])
    remark = None
    try:
        for n in law.sizes:
            batch = case.data(n, Generator().manual_seed(n))
            try:
                with quiet_jvp(), left_as_found():
                    remark = law.holds(case, batch)
            except (Broken, NotApplicable):
                raise
            except (Exception, SystemExit) as error:  # what the loss raises is its failure
                index, _ = _index_at_fault(error)
                raise Broken(f"{raised(error, index)}; at {shown(batch)}") from error
    except NotApplicable as reason:
        return Finding(name, "not applicable", str(reason))
    except Broken as failure:
        told = "" if name == "masked = dropped" else _cure(failure)
        return Finding(name, "fail", str(failure), failure.cure or told or law.advice)
    return Finding(name, "pass", remark or "")


def check(case: LossCase, *, inductor: bool = False) -> list[Finding]:
    """Try every law on a loss.

    Args:
        case: The loss and its data.
        inductor: Whether to try the default compiler too, which takes seconds to minutes.

    Returns:
        A finding per law, in the order of ``LAWS``.
    """
    names = [name for name in LAWS if inductor or name != "inductor"]
    runs = try_law("runs", case)
    if runs.verdict == "fail":
        why = "it does not run on every batch"
        return [runs, *(Finding(name, "not applicable", why) for name in names[1:])]
    return [runs, *(try_law(name, case) for name in names[1:])]


_CURES = {
    "one_hot": "make one-hots by comparison: labels[..., None] == torch.arange(classes)",
    "scalar type Long": "labels are integers: leave them so, and take a mask as labels == c",
    "Long or Byte": "labels are integers: leave them so, and take a mask as labels == c",
    "setup_context": "give the gradient to funcloss.custom_vjp instead of an autograd.Function",
    "generate_vmap_rule": "give the gradient to funcloss.custom_vjp, not an autograd.Function",
    "autograd.Function": "give the gradient to funcloss.custom_vjp, not an autograd.Function",
    "tolist()": "no .tolist() and no loop over a tensor's values: choose with torch.where",
    "jvp": "give the gradient to funcloss.custom_vjp, which has every derivative",
    "numpy": "stay in torch, or wrap NumPy's forward and backward in funcloss.from_numpy",
    "item()": "no .item() and no `if` on a tensor's values: choose with torch.where",
    "data-dependent": "no .item() and no `if` on a tensor's values: choose with torch.where",
    "boolean mask": "no boolean indexing: choose with torch.where(labels == c, a, b)",
    "random operation": "draw nothing: make what is random an input",
    "dynamic shape": "no boolean indexing: choose with torch.where",
    "is out of bounds.": "labels count from 0 to classes - 1",
    "out of bounds for": "axis 0 is the batch: reach the classes as the last axis, [..., c]",
}


# A table and its index: a name, or a comparison.
_INDEX = re.compile(r"([\w.]+(?:\([\w., ]*\))?)\[([^\W\d]\w*|[^\[\]]*(?:[=!]=|[<>])[^\[\]]*)\]")


def _cure(failure: Broken) -> str:
    """Return what to write instead, where what was raised tells it."""
    if failure.__cause__ is None:
        return ""
    _, cure = _index_at_fault(failure.__cause__)
    told = _told(failure.__cause__)
    return cure or next((cure for sign, cure in _CURES.items() if sign in told), "")


def _index_at_fault(error: BaseException) -> tuple[str, str]:
    """Return the index that calls .item() where the code does not, and what to write instead.

    Torch says that .item() is called where a 0-d tensor is an index; which index, it does not say.
    """
    line, names = _line_at_fault(error)
    found = _INDEX.search(line)
    if found is None or ".item(" in line or "item()" not in _told(error):
        return "", ""
    table, index = found.groups()
    held = names.get(index)
    if not index.isidentifier() or (isinstance(held, torch.Tensor) and held.dtype is torch.bool):
        return f"the boolean index {found[0]}", _CURES["boolean mask"]
    at = f"(0, {index}.reshape(-1)).reshape"
    if _dim(table, names) > 1:  # whole rows
        cure = f"look up by index_select: {table}.index_select{at}(*{index}.shape, -1)"
    else:
        cure = f"look up by gather: {table}.gather{at}({index}.shape)"
    return f"{LOOKUP} {found[0]}", f"{cure}, not {found[0]}"


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _dim(table: str, names: Mapping[str, Any]) -> int:
    """Return how many axes a table has that a line names; 1 where that is not known."""
    first, *rest = table.partition("(")[0].split(".")
    held = names.get(first)
    for name in rest:
        inner = getattr(held, name, None)
        held = inner if isinstance(inner, (torch.Tensor, torch.nn.Module)) else held
    return held.dim() if isinstance(held, torch.Tensor) else 1


def _line_at_fault(error: BaseException) -> tuple[str, dict[str, Any]]:
    """Return the innermost line that is neither torch's nor the laws', and what its names hold."""
    found: tuple[str, dict[str, Any]] = ("", {})
    for frame, number in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if not file.startswith((_TORCH, _HERE, "<")):
            found = linecache.getline(file, number), {**frame.f_globals, **frame.f_locals}
    return found


LAWS: dict[str, Law] = {
    "runs": Law(
        transforms.runs,
        "it takes batches of any size, and is finite on ordinary ones",
        "take predictions and targets whose first axis is a batch of any size",
    ),
    "pure": Law(
        values.is_pure,
        "no argument and no attribute of an object changes, nor the mode of gradients; the same "
        "question has one answer",
        "operate out of place (clone before editing a NumPy view) and keep nothing",
        sizes=(1, 2, 3, 16, 64),  # so that a class is there which alone is changed
    ),
    "has a gradient": Law(
        learning.has_gradient,
        "the gradient is not 0 everywhere",
        "let every step from the predictions to the value be differentiable: take out what cuts "
        "the gradient, and let the value depend on the predictions",
        sizes=(16,),
    ),
    "direction": Law(
        learning.direction,
        "certain and right costs less than certain and wrong, for each pair of classes; a value "
        "near its target less than one near another, a right pair less than a wrong one",
        "check the sign, the target, and whether log_softmax of the logits is taken",
        sizes=(16,),
    ),
    "cost effect": Law(
        values.weighs_what_it_says,
        "a class weighs the same in a batch, across random batches and alone, more than 0, the "
        "same whatever is predicted, and what its cost says where one is stated; the rows of a "
        "cost matrix are the true classes",
        "multiply each value before reducing: "
        "funcloss.mean(funcloss.class_weighted(loss)(logits, labels, class_weights=w))",
        sizes=(1,),
    ),
    "map over examples": Law(
        transforms.map_over_examples,
        "the values of a batch are those of its examples alone",
        "give one value per example and reduce outside: funcloss.mean(loss(predictions, targets)); "
        "a loss that is to couple its examples says so: loss.couples_examples = True",
    ),
    "not flat": Law(
        learning.not_flat,
        "the gradient is not 0 where the model is surest and wrong, and no softmax is taken of "
        "probabilities",
        "compute in log space, log_softmax(logits), instead of clamping probabilities or values",
        sizes=(16,),
    ),
    "gradcheck": Law(
        transforms.differences(gradcheck),
        "the gradient is that of finite differences, by autograd and by torch.func",
        "let torch differentiate the forward, or correct the backward; it must use the "
        "gradient that comes in",
        sizes=(1, 3),
    ),
    "extremes": Law(
        values.stays_finite,
        "value and gradient are finite at predictions of 1e4 and -1e4, or where the table says",
        "compute in log space: log_softmax, logsumexp, logsigmoid, softplus; never log(sum(exp))",
    ),
    "saturation": Law(
        learning.saturates_finitely,
        "value and gradient are finite where one class alone is certain, at ties, where "
        "predictions equal targets, and at targets of 0",
        "the derivative of a root, a power below 1 or a logarithm is infinite at 0: bound what is "
        "under it, (1 - p).clamp(min=eps), or take it from the logits by logsigmoid",
        sizes=(4,),
    ),
    "masked = dropped": Law(
        values.masked_is_dropped,
        "a masked example counts as if it were not there, also when it is inf or NaN",
        "mask with torch.where what goes into the loss and what comes out; never multiply by 0",
    ),
    "class permutation": Law(
        values.permutes,
        "classes that change places, costs with them, change nothing",
        "treat the classes alike; what is particular to one belongs in an option",
    ),
    "shift": Law(
        values.shift,
        "a constant added to all logits changes nothing",
        "take log_softmax of the logits first",
    ),
    "weights": Law(
        values.weights,
        "weight 0 removes an example, weight k multiplies it, at batch size one too",
        "divide by the number of examples, not by the sum of the weights: "
        "funcloss.mean(funcloss.class_weighted(loss)(...))",
    ),
    "cost order": Law(
        values.cost_order,
        "a larger cost never makes the costly mistake cheaper",
        "let the loss grow with each entry of the costs",
    ),
    "labels out of range": Law(
        edges.refuses_labels,
        "a label out of range raises, and gives NaN where it is compiled; of a loss of one's own "
        "it is only noted",
        "look up by gather, which refuses such a label, or check the labels",
        sizes=(1,),
    ),
    "option shapes": Law(
        edges.options_have_shapes,
        "a number may be a 0-d tensor or one per example, and no other shape",
        "check the shape of each option: 0-d, or that of the labels",
        sizes=(CLASSES, 3),
    ),
    "pickles": Law(
        edges.survives_pickling,
        "what comes out of a pickle, a deep copy and torch.save gives the same values",
        "keep what the loss needs in the attributes of an object, and no lambda among them",
        sizes=(3,),
    ),
    "reference": Law(
        values.agrees,
        "the value is that of torch, or of a plain loop in float64",
        "compare the formulas",
    ),
    "vmap": Law(
        transforms.maps_single_examples,
        "vmap gives the values of single examples",
        "torch operations only: no .item(), .numpy(), boolean indexing or `if` on values",
        everywhere=True,
    ),
    "per-sample gradients": Law(
        transforms.per_sample_gradients,
        "the gradients of vmap(grad(loss)) sum to the gradient of the batch",
        "let no example's value depend on the rest of its batch, and divide by the number of "
        "examples alone: funcloss.mean",
        everywhere=True,
    ),
    "gradgradcheck": Law(
        transforms.differences(gradgradcheck),
        "the second derivative is that of finite differences",
        "write the backward in differentiable torch operations, through funcloss.custom_vjp",
        sizes=(1, 3),
        everywhere=True,
    ),
    "jacrev = jacfwd": Law(
        transforms.forward_is_reverse,
        "forward and reverse mode agree",
        "use differentiable torch operations, or funcloss.custom_vjp for a gradient by hand",
        sizes=(1, 3),
        everywhere=True,
    ),
    "hessian": Law(
        transforms.hessian_is_symmetric,
        "the Hessian is symmetric",
        "the backward is not the gradient of the forward: give both to funcloss.custom_vjp",
        sizes=(1, 3),
        everywhere=True,
    ),
    "compile": Law(
        transforms.one_graph("aot_eager"),
        "value, grad and vmap(grad) are one graph, and equal eager",
        "torch operations only: no .item(), .numpy(), boolean indexing or `if` on values",
        sizes=(3,),
        everywhere=True,
    ),
    "inductor": Law(
        transforms.one_graph("inductor"),
        "the default compiler gives the same, for a linear layer before the loss too",
        "write a + c * b and not torch.add(a, b, alpha=c), whose alpha the compiler may drop",
        sizes=(3,),
        everywhere=True,
    ),
    "dtype": Law(
        values.dtype_is_kept,
        "float16, bfloat16, float32 and float64 come out as they came in",
        "bring constants and costs .to(predictions.dtype), compute half precision in float32",
        everywhere=True,
    ),
}
