"""The result of an audit, as plain values, and the forms that it is written in."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss._files import write_csv, write_text
from funcloss._json import jsonable
from funcloss.audit.gram import Balance, balance, cosines

_SQUARE = 100  # classes of which a file has all pairs
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class ExampleRows:
    """One row per example that counts, in the order of the data; gradients are at weight 1."""

    index: Int[Tensor, " n"]  # position in the data
    label: Int[Tensor, " n"]
    loss: Float[Tensor, " n"]
    norm: Float[Tensor, " n"]  # |grad l_i|; NaN where not measured
    slope: Float[Tensor, " n"]  # <grad l_i, g>; minus the rate at which descent along g helps it
    margin: Float[Tensor, " n"]  # score of the true class less the best other; NaN in regression

    def alignment(self, gradient_norm: float | Tensor) -> Float[Tensor, " n"]:
        """Return ``cos(grad l_i, g)``: 1 pushes where all go, below 0 resists."""
        return self.slope / (self.norm * gradient_norm)


@dataclass(frozen=True, eq=False)
class StepAudit:
    """The step that the optimiser takes as a sum of rows: ``u = sum_r u_r``, exactly."""

    rows: tuple[str, ...]  # the classes, then "weight decay", "history" and what else moves
    gram: Float[Tensor, "rows rows"]  # <u_a, u_b>
    learning_rate: float  # the schedule's factor included
    clip: float  # factor on the gradients; 1: not clipped
    note: str  # what is not known of it; empty: nothing

    @property
    def share(self) -> Float[Tensor, " rows"]:
        """``<u_r, u> / |u|^2``: contribution of each row to the step; sums to 1."""
        return self.gram.sum(1) / self.gram.sum()

    @property
    def norm(self) -> Float[Tensor, " rows"]:
        """``|u_r|``."""
        return self.gram.diagonal().clamp(min=0.0).sqrt()

    @property
    def update_norm(self) -> Float[Tensor, ""]:
        """``|u|``."""
        return self.gram.sum().clamp(min=0.0).sqrt()


@dataclass(frozen=True, eq=False)
class Impact:
    """The change of each class's mean loss by the step, as a sum over its rows, and measured.

    ``M[k, r] = int_0^1 <grad L_k(params + t u), u_r> dt``, by Simpson's rule.
    """

    matrix: Float[Tensor, "classes rows"]  # M[k, r]; below 0: r helps k
    before: Float[Tensor, " classes"]  # L_k at the params
    after: Float[Tensor, " classes"]  # L_k one step on
    pieces: int = 1  # of the step, each with its own three points

    @property
    def predicted(self) -> Float[Tensor, " classes"]:
        """``sum_r M[k, r]``, what the parts say of the change of each class's mean loss."""
        return self.matrix.sum(1)

    @property
    def residual(self) -> float:
        """How far the parts are from adding up to the measured change, relative to it."""
        known = self.predicted.isfinite() & self.measured.isfinite()
        apart = (self.predicted - self.measured)[known].norm()
        # The change of a loss that hardly changes is rounding.
        size = torch.maximum(self.measured[known].norm(), 1e-6 * self.before[known].norm())
        return float(apart / size.clamp(min=1e-300))

    @property
    def measured(self) -> Float[Tensor, " classes"]:
        """``L_k(params + u) - L_k(params)``."""
        return self.after - self.before


@dataclass(frozen=True, eq=False)
class StandardErrors:
    """Standard errors of an audit's shares and conflicts, by the jackknife over batches."""

    batches: int
    batch_size: int  # examples in the first of them
    share: Float[Tensor, " classes"]
    conflict: Float[Tensor, "classes classes"]
    left_out: int = 100  # batches that were left out in turn


@dataclass(frozen=True, eq=False)
class Method:
    """The method of measurement."""

    name: str
    why: str
    costs: dict[str, float]  # predicted, in plain forward and backward passes, by method
    chunk: int  # examples at a time
    seconds: float


@dataclass(frozen=True, eq=False)
class Check:
    """One identity that must hold, and how far it is from holding here."""

    name: str
    error: float  # relative
    tolerance: float | None  # None: to be read, not to be held
    says: str  # what is compared with what

    @property
    def holds(self) -> bool:
        """Whether the identity holds; one without a tolerance only informs."""
        return self.tolerance is None or self.error <= self.tolerance


@dataclass(frozen=True, eq=False)
class Audit:
    """Each class's share of a gradient, and of the step: plain tensors on the CPU, in float64."""

    classes: tuple[str, ...]
    reduction: str  # what divides: mean, weighted_mean or sum
    linear_in_weights: bool  # False: the loss couples examples, so weights act inside it
    class_weights: Float[Tensor, " classes"]
    count: Int[Tensor, " classes"]  # examples that count
    loss: Float[Tensor, " classes"]  # mean of each class at weight 1; NaN without examples
    gram: Float[Tensor, "classes classes"]  # <G_a, G_b> at weight 1, G_c = sum grad l_i / n
    layers: tuple[str, ...]
    layer_sizes: tuple[int, ...]  # parameters in each
    layer_gram: Float[Tensor, "layers classes classes"]  # sums to ``gram``
    length: Float[Tensor, " classes"]  # sum |grad l_i| / n; NaN where not measured
    norm_quantiles: Float[Tensor, "classes quantiles"]  # of |grad l_i|, at ``QUANTILES``
    alignment: Float[Tensor, " classes"]  # mean cos(grad l_i, g)
    standard_errors: StandardErrors | None  # None: too few batches, or too little memory
    examples: ExampleRows | None
    step: StepAudit | None
    impact: dict[str, Impact]  # by part of the data: "train", "held_out"
    elasticities: dict[str, Tensor]  # d log |g| / d log k, by option of the loss
    method: Method
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()  # what could not be measured, and why

    def reweighted(self, class_weights: Float[Tensor, " classes"]) -> Balance:
        """Return the balance of a fresh audit under other class weights, from the Gram matrix.

        Args:
            class_weights: Weight of each class, at least 0, shape ``(classes,)``.

        Returns:
            Share, expected share, elasticity, norm and conflict.

        Raises:
            ValueError: the loss couples examples, so class weights would act inside it and take
                a fresh audit; or the weights do not fit.
        """
        if not self.linear_in_weights and not torch.equal(
            class_weights.to(self.class_weights), self.class_weights
        ):
            raise ValueError(
                "Audit.reweighted: the loss couples examples, so its gradient is not a weighted "
                "sum of class gradients: audit it again under the other weights"
            )
        return balance(self.gram, self.count, class_weights, reduction=self.reduction)

    @property
    def balance(self) -> Balance:
        """The balance under the class weights of the audit."""
        return self.reweighted(self.class_weights)

    @property
    def agreement(self) -> Float[Tensor, " classes"]:
        """``|sum grad l_i| / sum |grad l_i|`` within each class; 1: its examples agree."""
        return self.gram.diagonal().clamp(min=0.0).sqrt() / self.length

    @property
    def layer_share(self) -> Float[Tensor, "layers classes"]:
        """``<g_c, g> / |g|^2`` within each layer."""
        weights = self.class_weights.to(self.layer_gram)
        along = weights * (self.layer_gram @ weights)
        return along / along.sum(-1, keepdim=True)

    @property
    def layer_conflict(self) -> Float[Tensor, "layers classes classes"]:
        """``cos(g_a, g_b)`` within each layer."""
        return cosines(self.layer_gram)

    def most_opposed(self, label: int, k: int = 8) -> list[int]:
        """Return positions in the data of a class's examples that point most against ``g``."""
        return self._extreme(label, k, _rows(self).alignment(1.0))

    def most_dominant(self, label: int, k: int = 8) -> list[int]:
        """Return positions in the data of a class's examples with the longest gradients."""
        return self._extreme(label, k, -_rows(self).norm)

    def _extreme(self, label: int, k: int, score: Tensor) -> list[int]:
        rows = _rows(self)
        inside = ((rows.label == label) & ~score.isnan()).nonzero().squeeze(1)
        first = score[inside].argsort(stable=True)[:k]
        return rows.index[inside[first]].tolist()

    def to_dict(self) -> dict[str, Any]:
        """Return all but the examples as lists, numbers and text; None where not defined."""
        now, step, errors = self.balance, self.step, self.standard_errors
        by_class = {
            "count": self.count,
            "loss": self.loss,
            "class_weight": self.class_weights,
            "share": now.share,
            "share_standard_error": errors and errors.share,
            "expected_share": now.expected_share,
            "elasticity": now.elasticity,
            "norm": now.norm,
            "agreement": self.agreement,
            "norm_quantiles": self.norm_quantiles,
            "alignment": self.alignment,
            "update_share": step and step.share[: len(self.classes)],
        }
        rows = [
            {"name": name} | {k: None if v is None else v[c] for k, v in by_class.items()}
            for c, name in enumerate(self.classes)
        ]
        if self.examples is not None and not self.examples.norm.isnan().all():
            for c, row in enumerate(rows):
                row |= {
                    "most_opposed": self.most_opposed(c),
                    "most_dominant": self.most_dominant(c),
                }
        by_layer = {
            "name": self.layers,
            "parameters": self.layer_sizes,
            "gram": self.layer_gram,
            "share": self.layer_share,
            "conflict": self.layer_conflict,
        }
        of_step = step and {"share": step.share, "norm": step.norm, "update_norm": step.update_norm}
        return jsonable(
            {
                "reduction": self.reduction,
                "linear_in_weights": self.linear_in_weights,
                "gradient_norm": now.gradient_norm,
                "classes": rows,
                "gram": self.gram,
                "conflict": now.conflict,
                "standard_errors": errors,
                "layers": [
                    dict(zip(by_layer, row, strict=True))
                    for row in zip(*by_layer.values(), strict=True)
                ],
                "step": step and jsonable(step) | of_step,
                "impact": {
                    part: jsonable(impact)
                    | {
                        "predicted": impact.predicted,
                        "measured": impact.measured,
                        "residual": impact.residual,
                    }
                    for part, impact in self.impact.items()
                },
                "elasticities": self.elasticities,
                "method": self.method,
                "checks": self.checks,
                "notes": self.notes,
            }
        )

    def to_json(self) -> str:
        """Return :meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def write(self, folder: str | Path, *, facts: Mapping[str, Any] | None = None) -> list[Path]:
        """Write ``audit.json`` and tidy tables: a row per class, pair of classes, example.

        With more than 100 classes ``audit.json`` has nothing per pair of classes, and the table of
        pairs has the 10,000 with the largest inner product.

        Args:
            folder: An existing folder; each file is written whole or not at all.
            facts: What else ``audit.json`` says, by name: of model and data, say.

        Returns:
            The files: ``audit.json``, ``audit_classes.csv``, ``audit_pairs.csv`` and, where
            examples were kept, ``audit_examples.csv``.

        Raises:
            RunError: a file cannot be written; what was there is as it was.
        """
        folder = Path(folder)
        paths = [folder / "audit.json"]
        found = self.to_dict()
        if len(self.classes) > _SQUARE:
            found = _without_pairs(found, len(self.classes))
        text = json.dumps(dict(facts or {}) | found, indent=1, allow_nan=False)
        write_text(paths[0], text + "\n")
        tables = {"classes": self._class_rows(), "pairs": self._pair_rows()}
        if self.examples is not None:
            tables["examples"] = self._example_rows()
        for name, rows in tables.items():
            paths.append(folder / f"audit_{name}.csv")
            write_rows(paths[-1], rows)
        return paths

    def _class_rows(self) -> Iterable[dict[str, Any]]:
        skipped = ("norm_quantiles", "most_opposed", "most_dominant")
        for row in self.to_dict()["classes"]:
            quantiles = {
                f"norm_q{int(100 * q):02d}": value
                for q, value in zip(QUANTILES, row["norm_quantiles"], strict=True)
            }
            yield {k: v for k, v in row.items() if k not in skipped} | quantiles

    def _pair_rows(self) -> Iterable[dict[str, Any]]:
        conflict, n = self.balance.conflict, len(self.classes)
        pairs = range(n * n)
        if n > _SQUARE:
            largest = self.gram.abs().nan_to_num().flatten().topk(_SQUARE**2).indices
            pairs = largest.sort().values.tolist()
        for a, b in (divmod(pair, n) for pair in pairs):
            yield {
                "class": self.classes[a],
                "other": self.classes[b],
                "gram": self.gram[a, b],
                "conflict": conflict[a, b],
            } | {
                f"impact_{part}_of_other_on_class": impact.matrix[a, b]
                for part, impact in self.impact.items()
            }

    def _example_rows(self) -> Iterable[dict[str, Any]]:
        rows = _rows(self)
        alignment = rows.alignment(self.balance.gradient_norm)
        columns = [rows.index, rows.label, rows.loss, rows.norm, alignment, rows.margin]
        for index, label, *values in zip(*(c.tolist() for c in columns), strict=True):
            named = zip(("loss", "norm", "alignment", "margin"), values, strict=True)
            yield {"index": index, "class": self.classes[label]} | dict(named)


def _without_pairs(value: Any, classes: int) -> Any:
    """Return plain values with None for each matrix of as many rows and columns as classes."""
    if isinstance(value, dict):
        return {k: _without_pairs(v, classes) for k, v in value.items()}
    if not isinstance(value, list):
        return value
    first = value[0] if value else None
    if len(value) == classes and isinstance(first, list) and len(first) == classes:
        return None
    return [_without_pairs(v, classes) for v in value]


def class_statistics(
    examples: ExampleRows, classes: int, gradient_norm: float
) -> dict[str, Tensor]:
    """Return mean loss, length, norm quantiles and alignment of each class, NaN where not known."""
    mine = [examples.label == c for c in range(classes)]
    norm, cosine = examples.norm, examples.alignment(gradient_norm)
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    unknown = torch.full_like(levels, torch.nan)
    length = torch.zeros(classes).double().index_add_(0, examples.label, norm) / len(norm)
    return {
        "loss": torch.stack([examples.loss[own].mean() for own in mine]),
        "length": torch.full_like(length, torch.nan) if norm.isnan().all() else length,
        "norm_quantiles": torch.stack(
            [norm[own].quantile(levels) if own.any() else unknown for own in mine]
        ),
        "alignment": torch.stack([cosine[own].nanmean() for own in mine]),
    }


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a CSV file with a header, an empty field where a value is None.

    Raises:
        RunError: the file cannot be written; what was there is as it was.
    """
    lines = [jsonable(row) for row in rows]
    write_csv(path, [line.keys() for line in lines[:1]] + [line.values() for line in lines])


def _rows(audit: Audit) -> ExampleRows:
    if audit.examples is None:
        raise ValueError("Audit: the examples were not kept: audit with per_example=True")
    return audit.examples
