"""Objectives in, an objective out: regularised, trained against an adversary, of several tasks.

An objective is what a step minimises, ``(params, buffers, batch, keys, hyper) -> (loss, (buffers,
metrics))``; :func:`funcloss.objectives.supervised` makes one of a model and a criterion. A factor
is a number, a scalar tensor, or the name of the entry of ``hyper`` that brings it.
"""

# Annotations stay text: older compilers stumble over those of functions that they trace.
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad

from funcloss._checks import check_number
from funcloss._numbers import wide_dtype
from funcloss.combinators import Factor, factor_names, taken
from funcloss.keys import fold_in
from funcloss.typing import Batch, Buffers, Hyper, Metrics, Objective, Params

Bounds = tuple[float | Tensor, float | Tensor]

LOG_VARIANCES = "log_variances"  # the entry of params that uncertainty weighting trains
_START = 0x5EED  # tells the keys of random starts from those of dropout


def _every(name: str) -> bool:
    return True


def l1(
    objective: Objective, strength: Factor, *, select: Callable[[str], bool] = _every
) -> Objective:
    """Return ``objective + strength * sum(|p|)`` over chosen parameters.

    Args:
        objective: What to regularise.
        strength: Factor of the penalty.
        select: From a parameter's name to whether it is penalised; all are by default.

    Returns:
        An objective with the unscaled penalty among its metrics, as ``l1``.

    Raises:
        ValueError: on a call, no parameter is selected.

    References:
        Tibshirani, "Regression shrinkage and selection via the lasso", 1996.
    """
    return _Penalised(objective, strength, select, "l1")


def l2(
    objective: Objective, strength: Factor, *, select: Callable[[str], bool] = _every
) -> Objective:
    """Return ``objective + strength * sum(p**2)`` over chosen parameters.

    Under SGD it is a weight decay of ``2 * strength``; under Adam it is not AdamW's.

    Args:
        objective: What to regularise.
        strength: Factor of the penalty.
        select: From a parameter's name to whether it is penalised; all are by default.

    Returns:
        An objective with the unscaled penalty among its metrics, as ``l2``.

    Raises:
        ValueError: on a call, no parameter is selected.

    Example:
        >>> def zero(params, buffers, batch, keys, hyper):
        ...     return torch.zeros(()), (buffers, {})
        >>> params = {"fc.weight": torch.ones(2, 2), "fc.bias": torch.ones(2)}
        >>> objective = l2(zero, 0.5, select=lambda name: name.endswith("weight"))
        >>> objective(params, {}, None, None, {})[0]
        tensor(2.)

    References:
        Hoerl and Kennard, "Ridge regression", 1970.
    """
    return _Penalised(objective, strength, select, "l2")


@dataclass(frozen=True, eq=False)
class _Penalised:
    """What :func:`l1` and :func:`l2` return."""

    objective: Objective
    strength: Factor
    select: Callable[[str], bool]
    name: str

    def __call__(
        self, params: Params, buffers: Buffers, batch: Batch, keys: Tensor, hyper: Hyper
    ) -> tuple[Tensor, tuple[Buffers, Metrics]]:
        """Return ``(loss, (buffers, metrics))``."""
        chosen = [p for key, p in params.items() if self.select(key)]
        if not chosen:
            names = sorted(params)
            raise ValueError(f"{self.name}: select chooses none of the parameters {names}")
        own = _less(hyper, factor_names(self.strength))
        loss, (buffers, metrics) = self.objective(params, buffers, batch, keys, own)
        size = torch.abs if self.name == "l1" else torch.square
        penalty = torch.stack([size(p).sum() for p in chosen]).sum()
        loss = loss + taken(self.strength, hyper, penalty) * penalty
        return loss, (buffers, {**metrics, self.name: penalty})


@dataclass(frozen=True, eq=False)
class _Ascent:
    """Signed gradient ascent of a function of inputs, within a cube around them."""

    epsilon: float | Tensor
    step_size: float | Tensor
    steps: int
    bounds: Bounds | None

    def __call__(
        self, of_inputs: Callable[[Tensor], Tensor], inputs: Tensor, start: Tensor
    ) -> Tensor:
        """Return where it leads from ``start``, as a constant."""
        inputs = inputs.detach()
        low, high = inputs - self.epsilon, inputs + self.epsilon
        at = _bounded(start.detach(), self.bounds)
        for _ in range(self.steps):
            at = at + self.step_size * grad(of_inputs)(at).sign()
            at = _bounded(torch.maximum(torch.minimum(at, high), low), self.bounds)
        return at.detach()


def fgsm(
    objective: Objective,
    *,
    epsilon: float | Tensor,
    clean: float = 0.5,
    bounds: Bounds | None = None,
) -> Objective:
    """Return ``clean * J(x) + (1 - clean) * J(x + epsilon * sign(dJ/dx))``: one adversarial step.

    Args:
        objective: What to make robust, J; a mean or a sum of losses, as only the signs count.
        epsilon: Largest change of an input, in the units of the inputs as the model sees them
            (normalised, if they are).
        clean: Part of the objective on inputs left as they are, in ``[0, 1]``.
        bounds: Least and largest value that an input may have; None: any.

    Returns:
        An objective with ``clean_loss`` and ``adversarial_loss`` among its metrics. The attack is
        a constant: nothing is differentiated through it. Buffers come from the clean pass.

    Raises:
        ValueError: a number is out of range.

    References:
        Goodfellow, Shlens and Szegedy, "Explaining and harnessing adversarial examples", 2015.
    """
    check_number("fgsm", "epsilon", epsilon, low=0)
    check_number("fgsm", "clean", clean, low=0, high=1)
    return _Fgsm(objective, _Ascent(epsilon, epsilon, 1, bounds), clean)


@dataclass(frozen=True, eq=False)
class _Fgsm:
    """What :func:`fgsm` returns."""

    objective: Objective
    ascent: _Ascent
    clean: float

    def __call__(
        self, params: Params, buffers: Buffers, batch: Batch, keys: Tensor, hyper: Hyper
    ) -> tuple[Tensor, tuple[Buffers, Metrics]]:
        """Return ``(loss, (buffers, metrics))``."""
        given = (self.objective, params, buffers, batch, keys, hyper)
        inputs = self.ascent(_of_inputs(*given), batch.inputs, batch.inputs)
        hard, _ = self.objective(params, buffers, _with_inputs(batch, inputs), keys, hyper)
        plain, (buffers, metrics) = self.objective(params, buffers, batch, keys, hyper)
        metrics = {**metrics, "clean_loss": plain, "adversarial_loss": hard}
        return self.clean * plain + (1 - self.clean) * hard, (buffers, metrics)


def pgd(
    objective: Objective,
    *,
    epsilon: float | Tensor,
    step_size: float | Tensor,
    steps: int = 7,
    bounds: Bounds | None = None,
) -> Objective:
    """Return ``max J(x')`` over ``|x' - x| <= epsilon``, sought by projected gradient ascent.

    The search starts at a point of the cube drawn from the examples' keys, and moves by
    ``step_size * sign(dJ/dx')``.

    Args:
        objective: What to make robust, J; a mean or a sum of losses, as only the signs count.
        epsilon: Largest change of an input, in the units of the inputs as the model sees them.
        step_size: How far a step moves each input.
        steps: How many steps the search takes.
        bounds: Least and largest value that an input may have; None: any.

    Returns:
        An objective of the attacked inputs. The attack is a constant: nothing is differentiated
        through it.

    Raises:
        ValueError: a number is out of range.

    References:
        Madry, Makelov, Schmidt, Tsipras and Vladu, "Towards deep learning models resistant to
        adversarial attacks", 2018.
    """
    check_number("pgd", "epsilon", epsilon, low=0)
    check_number("pgd", "step_size", step_size, low=0)
    check_number("pgd", "steps", steps, low=1)
    return _Pgd(objective, _Ascent(epsilon, step_size, steps, bounds))


@dataclass(frozen=True, eq=False)
class _Pgd:
    """What :func:`pgd` returns."""

    objective: Objective
    ascent: _Ascent

    def __call__(
        self, params: Params, buffers: Buffers, batch: Batch, keys: Tensor, hyper: Hyper
    ) -> tuple[Tensor, tuple[Buffers, Metrics]]:
        """Return ``(loss, (buffers, metrics))``."""
        start = _start(batch.inputs, keys, self.ascent.epsilon)
        given = (self.objective, params, buffers, batch, keys, hyper)
        inputs = self.ascent(_of_inputs(*given), batch.inputs, start)
        return self.objective(params, buffers, _with_inputs(batch, inputs), keys, hyper)


def multi_task(objectives: Mapping[str, Objective], factors: Mapping[str, Factor]) -> Objective:
    """Return the sum of several objectives of one model, ``sum(factor * objective)``.

    Args:
        objectives: Objectives by name of the task.
        factors: A factor for each.

    Returns:
        An objective with each task's loss among its metrics, by name, and its metrics as
        ``name/metric``. The tasks share parameters, batch, keys and ``hyper`` (an option that one
        loss alone takes is bound to it: ``partial(loss, option=...)``); buffers pass from one to
        the next.

    Raises:
        ValueError: the names differ, there is none, or one is ``loss``, as the sum is called.

    Example:
        >>> def of(value):
        ...     return lambda params, buffers, batch, keys, hyper: (value, (buffers, {}))
        >>> tasks = {"digit": of(torch.tensor(1.0)), "parity": of(torch.tensor(2.0))}
        >>> multi_task(tasks, {"digit": 1.0, "parity": 0.25})({}, {}, None, None, {})[0]
        tensor(1.5000)
    """
    if not objectives or set(objectives) != set(factors):
        raise ValueError(
            f"multi_task: each task must have an objective and a factor; got objectives for "
            f"{sorted(objectives)} and factors for {sorted(factors)}"
        )
    _check_names("multi_task", objectives)
    return _MultiTask(dict(objectives), dict(factors))


@dataclass(frozen=True, eq=False)
class _MultiTask:
    """What :func:`multi_task` returns."""

    objectives: dict[str, Objective]
    factors: dict[str, Factor]

    def __call__(
        self, params: Params, buffers: Buffers, batch: Batch, keys: Tensor, hyper: Hyper
    ) -> tuple[Tensor, tuple[Buffers, Metrics]]:
        """Return ``(loss, (buffers, metrics))``."""
        own = _less(hyper, factor_names(*self.factors.values()))
        losses, (buffers, metrics) = _each(self.objectives, params, buffers, batch, keys, own)
        weighted = [taken(self.factors[name], hyper, x) * x for name, x in losses.items()]
        return torch.stack(weighted).sum(), (buffers, {**metrics, **losses})


def uncertainty_weighted(objectives: Mapping[str, Objective]) -> Objective:
    """Return ``sum(exp(-s) * objective + s / 2)``, each task's ``s`` learnt with the model.

    ``s`` is the logarithm of a task's noise variance, ``params["log_variances"]`` of shape
    ``(tasks,)`` in the order of ``objectives``; zeros are a good start. (The paper's regression
    has ``exp(-s) / 2``: scale that task's objective by half.)

    Args:
        objectives: Objectives by name of the task.

    Returns:
        An objective of parameters with ``log_variances`` among them; each task's loss is among its
        metrics, by name.

    Raises:
        ValueError: there is no objective, or one named ``loss``; or, on a call, ``log_variances``
            does not fit.

    Example:
        >>> def of(value):
        ...     return lambda params, buffers, batch, keys, hyper: (value, (buffers, {}))
        >>> tasks = {"digit": of(torch.tensor(1.0)), "parity": of(torch.tensor(2.0))}
        >>> params = {"log_variances": torch.zeros(2)}
        >>> uncertainty_weighted(tasks)(params, {}, None, None, {})[0]
        tensor(3.)

    References:
        Kendall, Gal and Cipolla, "Multi-task learning using uncertainty to weigh losses", 2018.
    """
    if not objectives:
        raise ValueError("uncertainty_weighted: there must be an objective, got none")
    _check_names("uncertainty_weighted", objectives)
    return _UncertaintyWeighted(dict(objectives))


@dataclass(frozen=True, eq=False)
class _UncertaintyWeighted:
    """What :func:`uncertainty_weighted` returns."""

    objectives: dict[str, Objective]

    def __call__(
        self, params: Params, buffers: Buffers, batch: Batch, keys: Tensor, hyper: Hyper
    ) -> tuple[Tensor, tuple[Buffers, Metrics]]:
        """Return ``(loss, (buffers, metrics))``."""
        logs, tasks = params.get(LOG_VARIANCES), len(self.objectives)
        if logs is None or logs.shape != (tasks,):
            got = "none" if logs is None else f"shape {tuple(logs.shape)}"
            raise ValueError(
                f"uncertainty_weighted: params must hold {LOG_VARIANCES} of shape "
                f"({tasks},), got {got}"
            )
        own = _less(params, (LOG_VARIANCES,))
        losses, (buffers, metrics) = _each(self.objectives, own, buffers, batch, keys, hyper)
        total = (torch.exp(-logs) * torch.stack(list(losses.values())) + logs / 2).sum()
        return total, (buffers, {**metrics, **losses})


def _check_names(name: str, objectives: Mapping[str, Objective]) -> None:
    if "loss" in objectives:
        raise ValueError(f"{name}: a task must not be called 'loss', as the sum of them is")


def _each(
    objectives: Mapping[str, Objective],
    params: Params,
    buffers: Buffers,
    batch: Batch,
    keys: Tensor,
    hyper: Hyper,
) -> tuple[dict[str, Tensor], tuple[Buffers, Metrics]]:
    """Return the loss of each objective, the buffers that passed through all, their metrics."""
    losses: dict[str, Tensor] = {}
    metrics: Metrics = {}
    for name, objective in objectives.items():
        losses[name], (buffers, own) = objective(params, buffers, batch, keys, hyper)
        metrics = {**metrics, **{f"{name}/{key}": value for key, value in own.items()}}
    return losses, (buffers, metrics)


def _less(tensors: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _with_inputs(batch: Batch, inputs: Tensor) -> Batch:
    # torch 2.6 does not trace _replace
    return Batch(inputs, batch.targets, batch.where, batch.costs)


def _of_inputs(
    objective: Objective, params: Params, buffers: Buffers, batch: Batch, keys: Tensor, hyper: Hyper
) -> Callable[[Tensor], Tensor]:
    """Return the objective as a function of the inputs alone."""
    fixed = {name: p.detach() for name, p in params.items()}
    return lambda inputs: objective(fixed, buffers, _with_inputs(batch, inputs), keys, hyper)[0]


def _start(inputs: Tensor, keys: Tensor, epsilon: float | Tensor) -> Tensor:
    """Return inputs moved to a point of the cube around them that each example's key decides."""
    counters = torch.arange(inputs[0].numel(), device=inputs.device)
    words = fold_in(fold_in(keys, torch.tensor(_START, device=keys.device))[:, None], counters)
    uniform = words.to(wide_dtype(inputs)).reshape(inputs.shape) / 2**31 - 1
    return inputs + epsilon * uniform.to(inputs.dtype)


def _bounded(inputs: Tensor, bounds: Bounds | None) -> Tensor:
    if bounds is None:
        return inputs
    low, high = (torch.as_tensor(b, dtype=inputs.dtype, device=inputs.device) for b in bounds)
    return torch.maximum(torch.minimum(inputs, high), low)
