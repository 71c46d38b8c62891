"""The memory of ``torch.optim``, read as that of our own optimisers."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funcloss.optim import AdamState, Optimizer, OptState, SGDState, adam, adamw, sgd

_SEE = "see the gradient"


@dataclass(frozen=True, eq=False)
class ParamGroup:
    """Parameters that one rule moves at one rate, from one memory."""

    names: tuple[str, ...]
    optimizer: Optimizer
    state: OptState
    rate: Float[Tensor, ""]


def read_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> tuple[tuple[ParamGroup, ...], str]:
    """Read the memory of SGD, Adam or AdamW, or Lightning's wrapper of one, for a model.

    Where some parameters have a ``.grad``, those without are left out, as torch leaves them.

    Returns:
        Each trained parameter in one group; or none, and why.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> groups, why = read_optimizer(torch.optim.Adam(model.parameters(), lr=0.5), model)
        >>> groups[0].names, groups[0].rate.item()
        (('weight', 'bias'), 0.5)
        >>> read_optimizer(torch.optim.Adagrad(model.parameters()), model)[1]
        'the step of Adagrad is not read, SGD, Adam and AdamW are: see the gradient'
    """
    optimizer = _bare(optimizer)
    kind = type(optimizer)
    if kind not in _RULES:
        return (), f"the step of {kind.__name__} is not read, SGD, Adam and AdamW are: {_SEE}"
    named = {p: name for name, p in model.named_parameters() if p.requires_grad}
    graded = {p for p in named if p.grad is not None} or set(named)
    groups = []
    for group in optimizer.param_groups:
        if refused := [option for option in ("amsgrad", "maximize") if group.get(option)]:
            return (), f"the step of {kind.__name__} with {refused[0]} is not read: {_SEE}"
        try:
            rule = _RULES[kind](group)
        except ValueError as error:
            return (), f"the step of {kind.__name__} is not read, {error}: {_SEE}"
        rate = torch.as_tensor(group["lr"], dtype=torch.float64).detach().cpu().reshape(())
        by_age: dict[int, dict[str, nn.Parameter]] = {}
        for p in (p for p in group["params"] if p in graded):
            by_age.setdefault(_age(optimizer, p), {})[named[p]] = p
        for age, params in by_age.items():
            memory = _memory(rule, optimizer, params, age)
            groups.append(ParamGroup(tuple(params), rule, memory, rate))
    return tuple(groups), "" if groups else f"the optimiser moves none of what is trained: {_SEE}"


def strangers(optimizer: torch.optim.Optimizer, model: nn.Module) -> str:
    """Return a note if the optimiser moves parameters that the model has not, else nothing."""
    own = set(model.parameters())
    if all(p in own for group in optimizer.param_groups for p in group["params"]):
        return ""
    return "the optimiser moves parameters of another model too, which are left out"


def _sgd(group: Mapping[str, Any]) -> Optimizer:
    momentum, dampening, decay = (
        float(group[option]) for option in ("momentum", "dampening", "weight_decay")
    )
    return sgd(
        momentum=momentum, dampening=dampening, weight_decay=decay, nesterov=group["nesterov"]
    )


def _adam(group: Mapping[str, Any], *, decoupled: bool = False) -> Optimizer:
    rule = adamw if group.get("decoupled_weight_decay", decoupled) else adam
    first, second = map(float, group["betas"])
    return rule(
        betas=(first, second), eps=float(group["eps"]), weight_decay=float(group["weight_decay"])
    )


_RULES: dict[type, Callable[[Mapping[str, Any]], Optimizer]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: functools.partial(_adam, decoupled=True),
}


def _bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimiser within Lightning's, which takes its step; others take their own."""
    wrapped = any(kind.__name__ == "LightningOptimizer" for kind in type(optimizer).__mro__)
    return getattr(optimizer, "optimizer") if wrapped else optimizer  # noqa: B009


def _age(optimizer: torch.optim.Optimizer, p: nn.Parameter) -> int:
    """Return how many steps a parameter has made; of SGD, which does not count, 1 for any."""
    state = optimizer.state.get(p, {})
    return int(state.get("step", state.get("momentum_buffer") is not None))


def _memory(
    rule: Optimizer, optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter], age: int
) -> OptState:
    """Return torch's memory of parameters of one age as the rule's own."""
    fresh = rule.init({name: p.detach() for name, p in params.items()})
    if not age:
        return fresh
    held = {name: optimizer.state[p] for name, p in params.items()}
    if isinstance(fresh, SGDState):
        velocity = {name: held[name]["momentum_buffer"] for name in fresh.velocity}
        return SGDState(torch.tensor(age), velocity)
    first, second = (
        {name: memory[key] for name, memory in held.items()} for key in ("exp_avg", "exp_avg_sq")
    )
    return AdamState(torch.tensor(age), first, second)
