"""The laws of learning: a loss rewards the right answer, and has a gradient that says so.

Each takes a case and a batch, raises ``Broken`` or ``NotApplicable`` where it does not hold, and
may return a remark where it does.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from funcloss.laws._common import check_finite, seen_in
from funcloss.laws.case import Batch, Broken, LossCase, in_dtype, shown
from funcloss.laws.poles import answers, class_pairs, costs_of, of_classes, poles_of, targets_for

_CERTAIN = 10.0  # a logit of a certain answer, and minus that of the others
_SURE = 5.0  # one at which a probability is 5e-5, above what is clamped for safety alone
_SIZES = (20.0, -20.0, 100.0, -100.0, 1e4, -1e4)  # of one logit: float32 and float64 round p to 1
_SQUASHING: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
_CUTS = (
    "no_grad", "set_grad_enabled", ".detach(", ".data", ".item(", ".numpy(", ".tolist(",
    "argmax", "topk", ".long(", ".int(", "round(", "torch.tensor(", "float(",
)  # fmt: skip


def direction(case: LossCase, batch: Batch) -> None:
    """Certain and right costs less than certain and wrong."""
    poles = poles_of(case, batch, _CERTAIN)
    right, wrong = (costs_of(case, side, poles.rows) for side in (poles.right, poles.wrong))
    room = 1e-6 * wrong.abs().clamp(min=1.0)
    if (lost := ~(right < wrong - room)).any():
        i = int(lost.nonzero()[0])
        what = poles.rows[i] if len(right) > 1 else "the targets' own, against another's"
        cure = "it grows with what is right: change its sign" if (right > wrong).all() else ""
        raise Broken(
            f"certain and right costs {float(right[i]):.4g}, certain and wrong "
            f"{float(wrong[i]):.4g} ({what})",
            cure or "compare the predictions with the targets themselves, each in its own place",
        )
    if not of_classes(case, batch) or "log_probs" in case.parameters[0]:
        return
    true, _ = class_pairs(case.classes, case.weightless)
    rest = targets_for(case, batch, true)
    sign = -1.0 if case.parameters[0] == "cost_estimates" else 1.0
    high = torch.full((len(true), batch[0].shape[-1]), sign * _CERTAIN, dtype=batch[0].dtype)
    all_high, all_zero = (costs_of(case, (z, *rest), poles.rows) for z in (high, 0 * high))
    if (all_high < all_zero - room).all():
        raise Broken(
            f"raising every logit alike lowers it, from {float(all_zero[0]):.4g} to "
            f"{float(all_high[0]):.4g}: nothing holds it against the other classes",
            "take log_softmax of the logits first; or, if it is given log-probabilities, call its "
            "parameter log_probs",
        )


def has_gradient(case: LossCase, batch: Batch) -> None:
    """The gradient is not 0 everywhere."""
    if not _gradient(case, batch, case.predictions).any():
        raise Broken(f"its gradient is 0 everywhere{seen_in(case, _CUTS)}")


def not_flat(case: LossCase, batch: Batch) -> str | None:
    """The gradient is not 0 where the model is surest and wrong."""
    if squashed := _squashed_twice(case, batch):
        raise Broken(
            f"it takes the cross-entropy of {squashed}(logits), which takes another softmax or "
            "sigmoid: so it is nearly flat, and never near 0",
            f"give cross-entropy the logits themselves: leave out the extra {squashed}",
        )
    if _is_likelihood(case, batch):
        raise Broken(
            "its value is -softmax(logits)[label], without a logarithm: nearly flat where it is "
            "surest and wrong",
            "give nll_loss the logarithms, log_softmax(logits)",
        )
    two_sided = case.parameters in (("logits", "targets"), ("scores", "signs"))
    if not of_classes(case, batch) and not (two_sided and batch[0].dim() == 1):
        return None  # an outlier among values, or a pair far enough apart, may count no further
    for size in (_SURE, 2 * _SURE):
        wrong = poles_of(case, batch, size).wrong
        gradient = _gradient(case, wrong, 1).reshape(len(wrong[0]), -1)
        stuck = (gradient == 0).all(-1)
        if 2 * int(stuck.sum()) <= len(stuck):
            continue
        probability = 1 / (1 + math.exp(2 * size))
        where = f"where the model is surest and wrong, at a probability of {probability:.1g}"
        if size > _SURE:
            return f"its gradient is 0 {where}"
        i = int(stuck.nonzero()[0])
        raise Broken(f"its gradient is 0 {where}: at {shown(tuple(x[i : i + 1] for x in wrong))}")
    return None


def _gradient(case: LossCase, batch: Batch, predictions: int) -> Tensor:
    """Return the gradients with respect to the first of the data, side by side and flat."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in batch[:predictions])
    values = case(*inputs, *batch[predictions:])
    if not values.requires_grad:
        return torch.zeros(batch[0].numel())
    # Not their sum, which is constant where values are divided by it.
    unlike = torch.linspace(1, 2, values.numel(), dtype=values.dtype).reshape(values.shape)
    gradients = torch.autograd.grad((unlike * values).sum(), inputs, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


def _squashed_twice(case: LossCase, batch: Batch) -> str:
    """Return "softmax", "sigmoid" or "tanh" where the cross-entropy is taken of that.

    Of softmax, two predictions are made at which softmax(softmax(logits)) is the same at the label,
    while softmax(logits) is not; of sigmoid, the cross-entropy is compared.
    """
    logits, columns = batch[0], batch[0].shape[-1]
    if case.parameters == ("logits", "targets") and logits.dim() == 1:
        z = torch.linspace(-4, 4, 9, dtype=logits.dtype)
        twice = z.sigmoid()
        return "sigmoid" * all(
            _proportional(case, z, torch.full_like(z, t), F.softplus((1 - 2 * t) * twice))
            for t in (0.0, 1.0)
        )
    if case.parameters[:1] != ("logits",) or not of_classes(case, batch):
        return ""
    if batch[-1].is_floating_point() or case.reduction == "other":
        return ""
    for name, squashing in _SQUASHING.items():
        if _is_cross_entropy_of(squashing, case, batch):
            return name
    if columns < 3:
        return ""
    label = next((k for k in range(case.classes) if k not in case.weightless), 0)
    targets = targets_for(case, batch, torch.tensor([label]))
    values = [
        float(case(_one(p, label, logits), *targets).sum())
        for share in (0.3, 0.5, 0.7)
        for p in _of_one_level(share, columns)
    ]
    room = 1e-9 if logits.dtype == torch.float64 else 1e-5
    pairs = list(zip(values[::2], values[1::2], strict=True))
    alike = all(abs(a - b) <= room * max(1.0, abs(a)) for a, b in pairs)
    return "softmax" * (alike and max(values) - min(values) > 1e-3 * max(map(abs, values)))


def _is_likelihood(case: LossCase, batch: Batch) -> bool:
    """Return whether nll_loss is given probabilities."""
    of_labels = of_classes(case, batch) and not batch[-1].is_floating_point()
    if case.parameters[:1] != ("logits",) or not of_labels or not seen_in(case, ("nll_loss",)):
        return False
    one = tuple(x[:1] for x in batch)
    p = one[0].softmax(-1).gather(-1, one[-1][:, None].long())
    return bool((case(*one).sum() + p.sum()).abs() < 1e-6)


def _is_cross_entropy_of(
    squashing: Callable[[Tensor], Tensor], case: LossCase, batch: Batch
) -> bool:
    """Return whether, for one label, the value is a sum of logsumexp(p), p of the label and 1.

    So it is for every weight and label smoothing; the absolute error has no part of the first.
    """
    label = next((k for k in range(case.classes) if k not in case.weightless), 0)
    rows = torch.randn(12, batch[0].shape[-1], generator=Generator().manual_seed(0)).double() * 2
    targets = targets_for(case, batch, torch.tensor([label]))
    values = torch.stack([case(row[None].to(batch[0].dtype), *targets).sum() for row in rows])
    p = squashing(rows)
    parts = torch.stack([p.logsumexp(-1), p[:, label], torch.ones(12).double()], -1)
    values = values.detach().double()[:, None]
    found = torch.linalg.lstsq(parts, values).solution
    size = values.std()
    close = (parts @ found - values).abs().max() <= 1e-5 * size
    return bool(close and (found[0] * parts[:, 0].std()).abs() > 1e-3 * size)


def _proportional(case: LossCase, logits: Tensor, targets: Tensor, expected: Tensor) -> bool:
    """Return whether each value is the same multiple of what is expected."""
    pairs = zip(logits.split(1), targets.split(1), strict=True)
    ratios = torch.stack([case(*pair).sum() for pair in pairs]) / expected
    return bool((ratios - ratios[0]).abs().max() <= 1e-5 * ratios[0].abs())


def _one(p: Tensor, label: int, like: Tensor) -> Tensor:
    """Return the logits of one distribution, turned so that its first class is the label."""
    return p.clamp(min=1e-18).log().roll(label)[None].to(like.dtype)


def _of_one_level(share: float, columns: int) -> tuple[Tensor, Tensor]:
    """Return two distributions whose softmax is alike at the first class, where one has a share."""
    p = torch.zeros(columns, dtype=torch.float64)
    p[0], p[1] = share, 1 - share

    def even(first: float) -> Tensor:
        q = torch.full_like(p, (1 - first) / (columns - 1))
        q[0] = first
        return q

    low, high = 0.0, share
    for _ in range(60):
        middle = (low + high) / 2
        above = even(middle).softmax(0)[0] > p.softmax(0)[0]
        low, high = (low, middle) if above else (middle, high)
    return p, even(low)


def saturates_finitely(case: LossCase, batch: Batch) -> None:
    """Value and gradient are finite where one class alone saturates, at ties and at the target."""
    for dtype in (torch.float32, batch[0].dtype):
        there, data = case.in_dtype(dtype), in_dtype(batch, dtype)
        for what, saturated in _saturated(there, data):
            check_finite(there, saturated, what)


def _saturated(case: LossCase, batch: Batch) -> Iterator[tuple[str, Batch]]:
    """Yield batches at the edges of what a loss may be given, and what they are."""
    low, high = min(case.extremes), max(case.extremes)
    k, names = case.predictions, case.parameters

    def held(predictions: Tensor) -> Tensor:
        return predictions.clamp(low, high)

    if of_classes(case, batch):
        true, other = (x[:6] for x in class_pairs(case.classes))
        rest = targets_for(case, batch, true)
        for size in _SIZES:
            for classes, whose in ((true, "its own"), (other, "another")):
                alone = answers(case, batch, classes, size, 0.0)
                yield f"with the logit of {whose} class alone at {size:g}", (held(alone), *rest)
        yield "at a tie of all classes", (answers(case, batch, true, 0.0, 0.0), *rest)
        return
    first, rest = batch[0], batch[k:]
    vectors = names[:1] in (("first",), ("anchor",), ("anchors",), ("embeddings",))
    if len(batch) > 1 and all(x.shape == first.shape for x in batch) and not vectors:
        if k == 1 or names[0] == "predictions":
            yield "where predictions equal targets", (held(batch[-1]), *batch[1:])
        if k == 1:
            zero = torch.full_like(first, max(low, 0.0))
            yield "at targets of 0", (held(zero), *batch[1:-1], zero)
            for size in _SIZES:
                far = held(zero + size)
                yield f"at targets of 0, predictions of {size:g}", (far, *batch[1:-1], zero)
    if vectors and first.dim() == 2:
        alike = (first,) * k if k > 1 else (first[:1].expand_as(first),)
        yield "where vectors are alike", (*alike, *rest)
    if first.dim() == 1:
        for size in _SIZES:
            yield f"at {size:g}", (held(torch.full_like(first, size)), *batch[1:])
