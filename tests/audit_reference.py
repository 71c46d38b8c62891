"""The audit by its definitions: float64, one example after another, every gradient held whole.

Nothing here is fast, and nothing comes from ``funcloss.audit``. Examples that do not count are
dropped before the model sees them; each of the others goes through the model alone.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcloss import optim
from funcloss.keys import keyed_randomness


class Part(NamedTuple):
    """One batch, as the model and the loss take it."""

    inputs: Any  # a tensor, a tuple or a dict of them
    targets: Tensor
    where: Tensor | None = None
    groups: Tensor | None = None  # None: the targets are the classes
    keys: Tensor | None = None  # of the dropout

    def classes(self) -> Tensor:
        return self.targets if self.groups is None else self.groups

    def kept(self) -> "Part":
        """Return the examples that count."""
        rows = range(len(self.targets)) if self.where is None else self.where.nonzero().squeeze(1)
        index = torch.as_tensor(list(map(int, rows)), dtype=torch.int64)
        keys = None if self.keys is None else self.keys[index]
        inputs, groups = picked(self.inputs, index), self.classes()[index]
        return Part(inputs, self.targets[index], None, groups, keys)


def picked(inputs: Any, index: Tensor | slice) -> Any:
    if isinstance(inputs, dict):
        return {name: x[index] for name, x in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(x[index] for x in inputs)
    return inputs[index]


def called(model: nn.Module, inputs: Any, keys: Tensor | None) -> Tensor:
    with contextlib.nullcontext() if keys is None else keyed_randomness(keys):
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def one_by_one(model: nn.Module, part: Part) -> list[Tensor]:
    """Return the predictions of each example, ``(1, ...)`` each, by itself."""
    keys = [None if part.keys is None else part.keys[i : i + 1] for i in range(len(part.targets))]
    return [called(model, picked(part.inputs, slice(i, i + 1)), k) for i, k in enumerate(keys)]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat_grad(output: Tensor, model: nn.Module, along: Tensor | None = None) -> Tensor:
    """Return the gradient with respect to every trained parameter, ``(P,)``."""
    params = list(trainable(model).values())
    if not output.requires_grad:
        return torch.cat([torch.zeros_like(p).flatten() for p in params])
    grads = torch.autograd.grad(output, params, along, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(params, grads, strict=True)
        ]
    )


def flat_params(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainable(model).values()])


def moved(model: nn.Module, update: Tensor) -> nn.Module:
    """Return a copy of the model one update on."""
    model = copy.deepcopy(model)
    params = list(trainable(model).values())
    pieces = update.split([p.numel() for p in params])
    with torch.no_grad():
        for p, piece in zip(params, pieces, strict=True):
            p += piece.reshape(p.shape)
    return model


class Objective(NamedTuple):
    """A model, a loss and data, and what reduces the values."""

    model: nn.Module
    loss: Callable[..., Tensor]
    parts: tuple[Part, ...]
    classes: int
    class_weights: Tensor
    options: dict[str, Tensor]
    reduction: str = "mean"
    coupled: bool = False

    def kept(self) -> list[Part]:
        return [part.kept() for part in self.parts]

    def values(self, options: Mapping[str, Any] | None = None) -> Tensor:
        """Return the loss of every example that counts, at weight 1, with its graph."""
        options = self.options if options is None else options
        values = []
        for part in self.kept():
            if not len(part.targets):
                continue
            predictions = one_by_one(self.model, part)
            if self.coupled:
                values.append(self.loss(torch.cat(predictions), part.targets, **options))
            else:
                values += [
                    self.loss(z, part.targets[i : i + 1], **options)
                    for i, z in enumerate(predictions)
                ]
        return torch.cat(values)

    def groups(self) -> Tensor:
        return torch.cat([part.classes() for part in self.kept()])

    def total(
        self, class_weights: Tensor | None = None, options: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Return the scalar that training would minimise."""
        weights = self.class_weights if class_weights is None else class_weights
        of_each = weights[self.groups()]
        values = of_each * self.values(options)
        return values.sum() / self.divisor(of_each)

    def divisor(self, of_each: Tensor) -> Tensor | float:
        if self.reduction == "mean":
            return float(len(of_each))
        return of_each.sum() if self.reduction == "weighted_mean" else 1.0

    def log_norm(
        self, class_weights: Tensor | None = None, options: Mapping[str, Any] | None = None
    ) -> float:
        total = self.total(class_weights, options)
        return float(flat_grad(total, self.model).norm().log())

    def class_loss(self) -> Tensor:
        """Return the mean loss of each class at weight 1; NaN without examples."""
        values, groups = self.values().detach(), self.groups()
        return torch.stack([values[groups == c].mean() for c in range(self.classes)])

    def class_loss_grads(self) -> Tensor:
        """Return the gradient of each class's mean loss, ``(C, P)``; NaN without examples."""
        values, groups = self.values(), self.groups()
        nothing = torch.full_like(flat_params(self.model), torch.nan)
        return torch.stack(
            [
                flat_grad(values[groups == c].mean(), self.model)
                if (groups == c).any()
                else nothing
                for c in range(self.classes)
            ]
        )


class Reference(NamedTuple):
    """Every example's gradient, and what follows from these by definition."""

    objective: Objective
    grads: Tensor  # (n, P): of l_i at weight 1; coupled: J_i^T d(sum of all values)/dz_i
    positions: Tensor  # (n,) in the data
    label: Tensor
    losses: Tensor
    margin: Tensor  # NaN where the targets are no classes

    @property
    def n(self) -> int:
        return len(self.label)

    @property
    def classes(self) -> int:
        return self.objective.classes

    @property
    def counts(self) -> Tensor:
        return torch.stack([(self.label == c).sum() for c in range(self.classes)])

    def by_class(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``of(bool mask of the class's examples)`` for every class."""
        return torch.stack([of(self.label == c) for c in range(self.classes)])

    @property
    def loss(self) -> Tensor:
        return self.by_class(lambda mine: self.losses[mine].mean())

    @property
    def unit(self) -> Tensor:
        """``G_c = sum grad l_i / n``."""
        return self.by_class(lambda mine: self.grads[mine].sum(0) / self.n)

    @property
    def parts(self) -> Tensor:
        """``g_c``, each class's part of the gradient of the step, weights and divisor included."""
        of_each = self.objective.class_weights[self.label]
        weighted = of_each[:, None] * self.grads / self.objective.divisor(of_each)
        return self.by_class(lambda mine: weighted[mine].sum(0))

    @property
    def gradient(self) -> Tensor:
        return self.parts.sum(0)

    @property
    def gram(self) -> Tensor:
        return self.unit @ self.unit.T

    @property
    def share(self) -> Tensor:
        g = self.gradient
        return (self.parts @ g) / (g @ g)

    @property
    def expected_share(self) -> Tensor:
        weight_sums = self.objective.class_weights * self.counts
        return weight_sums / weight_sums.sum()

    @property
    def norm(self) -> Tensor:
        return self.parts.norm(dim=1)

    @property
    def conflict(self) -> Tensor:
        """``cos(g_a, g_b)``, of the directions, which a weight of 0 leaves."""
        return cosine_matrix(self.unit)

    @property
    def example_norm(self) -> Tensor:
        return self.grads.norm(dim=1)

    @property
    def slope(self) -> Tensor:
        return self.grads @ self.gradient

    @property
    def cosine(self) -> Tensor:
        return self.slope / (self.example_norm * self.gradient.norm())

    @property
    def length(self) -> Tensor:
        return self.by_class(lambda mine: self.example_norm[mine].sum() / self.n)

    @property
    def agreement(self) -> Tensor:
        return self.by_class(
            lambda mine: self.grads[mine].sum(0).norm() / self.example_norm[mine].sum()
        )

    @property
    def alignment(self) -> Tensor:
        return self.by_class(lambda mine: self.cosine[mine].nanmean())

    def quantiles(self, at: Sequence[float]) -> Tensor:
        levels = torch.tensor(at, dtype=torch.float64)
        nothing = torch.full_like(levels, torch.nan)
        return self.by_class(
            lambda mine: self.example_norm[mine].quantile(levels) if mine.any() else nothing
        )

    def layer_parts(self, layers: Sequence[str]) -> list[Tensor]:
        """Return the columns of each layer's parameters; each goes to its longest prefix."""
        columns: list[list[Tensor]] = [[] for _ in layers]
        start = 0
        for name, p in trainable(self.objective.model).items():
            fits = [i for i, at in enumerate(layers) if f"{name}.".startswith(f"{at}.") or not at]
            owner = max(fits, key=lambda i: len(layers[i]))
            columns[owner].append(torch.arange(start, start + p.numel()))
            start += p.numel()
        return [torch.cat(c) for c in columns]

    def elasticity(self) -> Tensor:
        """Return ``d log|g| / d log w_c`` by finite differences, 0 at a weight of 0."""
        objective = self.objective
        return elasticity_of(lambda w: objective.log_norm(class_weights=w), objective.class_weights)

    def option_elasticity(self, name: str) -> Tensor:
        """Return ``d log|g| / d log k`` of each entry of an option, by finite differences."""
        options = self.objective.options
        return elasticity_of(
            lambda k: self.objective.log_norm(options={**options, name: k}), options[name]
        )


def measured(objective: Objective) -> Reference:
    """Return the gradient of each example, one after another."""
    grads, index, labels, losses, margins, start = [], [], [], [], [], 0
    for part in objective.parts:
        n = len(part.targets)
        where = torch.ones(n, dtype=torch.bool) if part.where is None else part.where
        index.append(start + where.nonzero().squeeze(1))
        start += n
        kept = part.kept()
        if not len(kept.targets):
            continue
        predictions = one_by_one(objective.model, kept)
        values = slopes = None
        if objective.coupled:
            flat = torch.cat(predictions).detach().requires_grad_()
            values = objective.loss(flat, kept.targets, **objective.options)
            (slopes,) = torch.autograd.grad(values.sum(), flat)
        for i, z in enumerate(predictions):
            if values is not None and slopes is not None:
                grads.append(flat_grad(z, objective.model, slopes[i : i + 1]))
                losses.append(values[i].detach())
            else:
                value = objective.loss(z, kept.targets[i : i + 1], **objective.options).squeeze(0)
                grads.append(flat_grad(value, objective.model))
                losses.append(value.detach())
            margins.append(margin_of(z.detach()[0], kept.targets[i]))
        labels.append(kept.classes())
    return Reference(
        objective,
        torch.stack(grads),
        torch.cat(index),
        torch.cat(labels),
        torch.stack(losses),
        torch.stack(margins),
    )


def margin_of(scores: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point() or target.dim() or scores.dim() != 1:
        return torch.tensor(torch.nan, dtype=torch.float64)
    others = torch.ones(len(scores), dtype=torch.bool)
    others[target] = False
    return scores[target] - scores[others].max()


def cosine_matrix(rows: Tensor) -> Tensor:
    """Return the cosine of each pair of rows; NaN where one is 0."""
    length = rows.norm(dim=1)
    return (rows @ rows.T) / (length[:, None] * length[None, :])


def elasticity_of(log_norm: Callable[[Tensor], float], at: Tensor, h: float = 1e-3) -> Tensor:
    """Return the derivative in the log of each entry, central differences of fourth order."""
    result = torch.zeros_like(at)
    for i in range(at.numel()):
        if at.flatten()[i] == 0:
            continue

        def moved_by(step: float, i: int = i) -> float:
            there = at.clone().flatten()
            there[i] = there[i] * torch.tensor(step, dtype=torch.float64).exp()
            return log_norm(there.reshape(at.shape))

        near, far = moved_by(h) - moved_by(-h), moved_by(2 * h) - moved_by(-2 * h)
        result.view(-1)[i] = (8 * near - far) / (12 * h)
    return result


def total(rows: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(rows.values())).sum(0)


class Memory(NamedTuple):
    """What an optimiser remembers, its first moment apart by row."""

    step: int
    first: dict[str, Tensor]  # by row: classes and "weight decay", or "history" where unknown
    second: Tensor | float = 0.0  # Adam's, of the whole gradient


class Rule(NamedTuple):
    """An optimiser by name, with the options of its twin in ``torch.optim``."""

    name: str  # sgd, adam, adamw
    options: dict[str, Any]
    clip_norm: float = 0.0

    def twin(self, params, rate: float) -> torch.optim.Optimizer:
        kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        return kinds[self.name](params, lr=rate, **self.options)

    @property
    def decay(self) -> float:
        return self.options.get("weight_decay", 0.01 if self.name == "adamw" else 0.0)

    def clip(self, gradient: Tensor) -> float:
        if not self.clip_norm:
            return 1.0
        return min(1.0, self.clip_norm / (float(gradient.norm()) + 1e-6))

    def split(
        self, parts: dict[str, Tensor], params: Tensor, memory: Memory, rate: float
    ) -> tuple[dict[str, Tensor], Memory]:
        """Return each row's part of the update, and the memory of each row after it."""
        clip = self.clip(total(parts))
        fresh = {row: clip * g for row, g in parts.items()}
        if self.name != "adamw":
            fresh["weight decay"] = self.decay * params
        rows = [*fresh, *(row for row in memory.first if row not in fresh)]
        zero = torch.zeros_like(params)
        fresh = {row: fresh.get(row, zero) for row in rows}
        before = {row: memory.first.get(row, zero) for row in rows}
        if self.name == "sgd":
            return self._sgd(fresh, before, memory, rate)
        updates, memory = self._adam(fresh, before, memory, rate)
        if self.name == "adamw":
            updates["weight decay"] = -rate * self.decay * params
        return updates, memory

    def _sgd(self, fresh, before, memory, rate):
        momentum = self.options.get("momentum", 0.0)
        part = 1.0 - (self.options.get("dampening", 0.0) if memory.step else 0.0)
        if not momentum:
            return {r: -rate * d for r, d in fresh.items()}, Memory(memory.step + 1, {})
        velocity = {row: momentum * before[row] + part * fresh[row] for row in fresh}
        if self.options.get("nesterov"):
            updates = {row: -rate * (fresh[row] + momentum * velocity[row]) for row in fresh}
        else:
            updates = {row: -rate * v for row, v in velocity.items()}
        return updates, Memory(memory.step + 1, velocity)

    def _adam(self, fresh, before, memory, rate):
        b1, b2 = self.options.get("betas", (0.9, 0.999))
        eps, step = self.options.get("eps", 1e-8), memory.step + 1
        whole = total(fresh)
        second = b2 * memory.second + (1 - b2) * whole**2
        first = {row: b1 * before[row] + (1 - b1) * fresh[row] for row in fresh}
        below = (second / (1 - b2**step)).sqrt() + eps
        updates = {row: -rate * m / (1 - b1**step) / below for row, m in first.items()}
        return updates, Memory(step, first, second)


RULES = {
    "sgd": Rule("sgd", {}),
    "sgd, decay": Rule("sgd", {"weight_decay": 0.1}),
    "sgd, decay, clipped": Rule("sgd", {"weight_decay": 0.1}, 0.05),
    "sgd, not clipped": Rule("sgd", {}, 100.0),
    "momentum": Rule("sgd", {"momentum": 0.9}),
    "dampened": Rule("sgd", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}, 0.05),
    "nesterov": Rule("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, 0.05),
    "adam": Rule("adam", {}),
    "adam, decay, clipped": Rule("adam", {"betas": (0.7, 0.9), "weight_decay": 0.1}, 0.05),
    "adamw": Rule("adamw", {}),
    "adamw, decay, clipped": Rule("adamw", {"eps": 1e-3, "weight_decay": 0.3}, 0.05),
}
OURS = {"sgd": optim.sgd, "adam": optim.adam, "adamw": optim.adamw}


class TwinStep(NamedTuple):
    """One step of ``torch.optim`` on the whole loss: what is before it, and the update."""

    model: nn.Module
    first: Tensor | None  # velocity, or Adam's first moment, before the step; None: not yet
    second: Tensor | None
    update: Tensor


def twin_steps(
    objectives: Sequence[Objective], rule: Rule, rate: float, factors: Sequence[float]
) -> list[TwinStep]:
    """Take steps of ``torch.optim`` on the objectives in turn, from the first one's model."""
    model = copy.deepcopy(objectives[0].model)
    params = list(trainable(model).values())
    twin = rule.twin(params, rate)
    steps = []
    for objective, factor in zip(objectives, factors, strict=True):
        for group in twin.param_groups:
            group["lr"] = rate * factor
        before = copy.deepcopy(model)
        first = _memory(twin, params, "momentum_buffer" if rule.name == "sgd" else "exp_avg")
        second = _memory(twin, params, "exp_avg_sq")
        twin.zero_grad()
        objective._replace(model=model).total().backward()
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        if rule.clip_norm:
            nn.utils.clip_grad_norm_(params, rule.clip_norm)
        twin.step()
        steps.append(TwinStep(before, first, second, flat_params(model) - flat_params(before)))
    return steps


def _memory(twin: torch.optim.Optimizer, params: list[nn.Parameter], name: str) -> Tensor | None:
    found = [twin.state[p].get(name) for p in params]
    return None if any(f is None for f in found) else torch.cat([f.flatten() for f in found])


def class_parts(objective: Objective, names: Sequence[str]) -> dict[str, Tensor]:
    """Return each class's part of the gradient, by name."""
    return dict(zip(names, measured(objective).parts, strict=True))


def impact(
    objective: Objective, updates: dict[str, Tensor], pieces: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``(int <grad L_k, u_r> along the step, L_k before, L_k after)``, each by itself.

    By Simpson's rule, on so many pieces of the step that is the updates' sum.
    """
    grads, whole = 0.0, total(updates)
    for piece in range(pieces):
        for part, weight in ((0.0, 1.0), (0.5, 4.0), (1.0, 1.0)):
            there = moved(objective.model, (piece + part) / pieces * whole)
            grads = grads + weight * objective._replace(model=there).class_loss_grads()
    matrix = grads / (6 * pieces) @ torch.stack(list(updates.values())).T
    after = objective._replace(model=moved(objective.model, total(updates)))
    return matrix, objective.class_loss(), after.class_loss()
