"""Audits to write reports of: random gradients per example, and all that follows from them."""

import math
from collections.abc import Sequence

import torch

from funcloss.audit.gram import balance
from funcloss.audit.result import (
    QUANTILES,
    Audit,
    Check,
    ExampleRows,
    Impact,
    Method,
    StandardErrors,
    StepAudit,
)
from funcloss.reduction import divisor

LAYERS = {"features.0": 12, "features.3": 20, "classifier": 8}


def make_audit(
    classes: int = 10,
    *,
    names: Sequence[str] | None = None,
    weights: dict[int, float] | None = None,
    per_class: int = 24,
    batches: int = 8,
    reduction: str = "mean",
    absent: Sequence[int] = (),
    step: bool = True,
    examples: bool = True,
    linear: bool = True,
    elasticities: dict[str, torch.Tensor] | None = None,
    seed: int = 0,
) -> Audit:
    """Return an audit whose parts fit together; a single batch has no standard errors."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    size = sum(LAYERS.values())
    present = torch.tensor([c for c in range(classes) if c not in absent])
    labels = present[torch.randperm(per_class * len(present), generator=random) % len(present)]
    n = len(labels)
    towards = normal(classes, size) / size**0.5
    towards[-1] -= 1.2 * towards[(classes - 1) // 2]  # somebody to fight
    grads = towards[labels] + 0.7 * normal(n, size) / size**0.5
    grads = grads * (0.7 * normal(n)).exp()[:, None]
    class_weights = torch.ones(classes, dtype=torch.float64)
    for c, weight in (weights or {}).items():
        class_weights[c] = weight

    def of_classes(grads: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        sums = torch.zeros(classes, size, dtype=torch.float64).index_add(0, labels, grads)
        return sums / len(labels)

    parts = of_classes(grads, labels)
    count = labels.bincount(minlength=classes)
    gram = parts @ parts.T
    now = balance(gram, count, class_weights, reduction=reduction)
    scale = n / divisor(reduction, n, (class_weights * count).sum())
    whole = scale * (class_weights @ parts)
    norm = grads.norm(dim=1)
    loss = torch.full((classes,), math.nan, dtype=torch.float64)
    loss[present] = 0.5 + normal(len(present)).abs()
    rows = ExampleRows(torch.arange(n), labels, normal(n).abs(), norm, grads @ whole, normal(n))
    alignment = rows.alignment(whole.norm())
    quantiles = torch.full((classes, len(QUANTILES)), math.nan, dtype=torch.float64)
    aligned = torch.full((classes,), math.nan, dtype=torch.float64)
    length = torch.zeros(classes, dtype=torch.float64).index_add(0, labels, norm) / n
    for c in present.tolist():
        quantiles[c] = norm[labels == c].quantile(torch.tensor(QUANTILES, dtype=torch.float64))
        aligned[c] = alignment[labels == c].mean()

    errors = None
    if batches > 1:
        single = [
            balance(g @ g.T, y.bincount(minlength=classes), class_weights, reduction=reduction)
            for g, y in (
                (of_classes(a, b), b)
                for a, b in zip(grads.chunk(batches), labels.chunk(batches), strict=True)
            )
        ]
        errors = StandardErrors(
            batches,
            -(-n // batches),
            torch.stack([b.share for b in single]).std(0) / batches**0.5,
            torch.stack([b.conflict for b in single]).std(0) / batches**0.5,
        )

    taken, impact = None, {}
    if step:
        rate = 0.05
        decay = -rate * 0.02 * normal(1, size)
        moves = torch.cat([-rate * scale * class_weights[:, None] * parts, decay])
        named = tuple(names or map(str, range(classes)))
        taken = StepAudit((*named, "weight decay"), moves @ moves.T, rate, 1.0, "")
        slopes = parts * (n / count.double())[:, None]
        for part, noise in (("train", 0.0), ("held_out", 0.05)):
            matrix = (slopes + noise * normal(classes, size)) @ moves.T
            after = loss + 0.9 * matrix.sum(1)
            impact[part] = Impact(matrix, loss, after)

    sizes = list(LAYERS.values())
    return Audit(
        classes=tuple(names or map(str, range(classes))),
        reduction=reduction,
        linear_in_weights=linear,
        class_weights=class_weights,
        count=count,
        loss=loss,
        gram=gram,
        layers=tuple(LAYERS),
        layer_sizes=tuple(sizes),
        layer_gram=torch.stack([p @ p.T for p in parts.split(sizes, dim=1)]),
        length=length,
        norm_quantiles=quantiles,
        alignment=aligned,
        standard_errors=errors,
        examples=rows if examples else None,
        step=taken,
        impact=impact,
        elasticities={"class_weights": now.elasticity} if elasticities is None else elasticities,
        method=Method("layers", "every layer has a rule", {"layers": 1.6}, 256, 0.4),
        checks=(
            Check("gradient", 3e-8, 1e-5, "the sum of the class gradients with the gradient"),
            Check("step", 2e-9, 1e-6, "the sum of the parts with the step that was taken"),
            Check("impact", 0.1, None, "predicted changes of the losses with measured ones"),
        ),
    )
