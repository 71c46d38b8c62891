"""How the step of a ``torch.optim`` optimiser at one parameter is made of the gradient's parts.

The step of nearly every optimiser is linear in the gradient, given statistics that all parts share:
``u = a * g + decay + history``, element by element. So a part ``g_c`` of the gradient has the step
``a * g_c``, and the steps of parts that add up to ``g``, with decay and history, add up to ``u``.
The second moments within ``a`` are those of the whole gradient. Where parts cancel, ``a`` is large,
and so are their steps.

``STEPS`` says how each class of optimisers takes its step. Add your own:

    >>> class SignSGD(torch.optim.Optimizer): ...
    >>> def sign_step(options, state, p, grad):
    ...     return LinearStep(-options["lr"] / grad.abs(), None, None)
    >>> STEPS[SignSGD] = sign_step
    >>> why_not(SignSGD([torch.zeros(2)], {"lr": 0.1}))
    ''
    >>> grad = torch.tensor([2.0, -4.0])
    >>> linear_step({"lr": 0.1}, SignSGD, {}, torch.zeros(2), grad).on_gradient
    tensor([-0.0500, -0.0250])
    >>> del STEPS[SignSGD]
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from funcloss.errors import AuditError

_Number = float | Tensor  # a tensor: 0-d, on an accelerator, which is not made to wait for it
_Options = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class LinearStep:
    """The step at one parameter, ``u = on_gradient * g + decay + history``.

    Args:
        on_gradient: Factor on the gradient, and on each part of it; broadcasts to the parameter.
        decay: What weight decay does, of the parameter's shape; None: nothing.
        history: What the memory of earlier steps does, of the parameter's shape; None: nothing.
    """

    on_gradient: Tensor
    decay: Tensor | None
    history: Tensor | None


StepFn = Callable[[_Options, Mapping[str, Any], Tensor, Tensor], LinearStep]


@dataclass(frozen=True)
class Memory:
    """What an optimiser remembers of all gradients, in a sum: ``m -> keeps * m + takes * g``.

    Args:
        name: Of ``m`` in the optimiser's state at a parameter.
        keeps: What part of it a step keeps.
        takes: Factor on the gradient, before the sign of ``maximize``.
        decay: Weight decay that comes with the gradient, ``decay * p``; a tensor of one number
            on an accelerator.
        adapted: Whether the gradient is first divided by what the step divides it by.
    """

    name: str
    keeps: float
    takes: float
    decay: _Number = 0.0
    adapted: bool = False


MemoryFn = Callable[[_Options, Mapping[str, Any]], Memory | None]


def bare(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimiser of torch within wrappers of accelerate, Lightning, Fabric and fastai.

    Args:
        optimizer: An optimiser, wrapped any number of times; one that is not is returned as it is.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(2)])
        >>> bare(optimizer) is optimizer
        True
    """
    for kind in type(optimizer).__mro__:
        name = _WRAPPERS.get(kind.__name__)
        if name and (inner := getattr(optimizer, name, None)) is not None:
            return bare(inner)
    return optimizer


_WRAPPERS = {
    "AcceleratedOptimizer": "optimizer",
    "LightningOptimizer": "optimizer",
    "_FabricOptimizer": "optimizer",
    "OptimWrapper": "opt",
}


def why_not(optimizer: Any) -> str:
    """Return why the step of an optimiser cannot be split, in one line, or nothing if it can.

    Args:
        optimizer: Of ``torch.optim``, a subclass or a wrapper of one, or of a class in ``STEPS``.

    Example:
        >>> why_not(torch.optim.Adam([torch.zeros(2)]))
        ''
        >>> why_not(torch.optim.Rprop([torch.zeros(2)]))  # doctest: +ELLIPSIS
        'the step of Rprop is not known: see the gradient, or add Rprop to ...optimizers.STEPS'
    """
    optimizer = bare(optimizer)
    kind = type(optimizer)
    if why := _not_linear(kind):
        return why
    if any(p.is_complex() for group in optimizer.param_groups for p in group["params"]):
        return f"the step of {kind.__name__} at complex parameters is not read: see the gradient"
    return ""


def has_direction(optimizer: Any) -> bool:
    """Return whether :func:`direction` says where the step goes, though it cannot be split.

    Example:
        >>> has_direction(torch.optim.Adam([torch.zeros(2)]))
        False
    """
    known, _ = _read(type(bare(optimizer)))
    return known is not None and known.enters != ""


def linear_step(
    group: Mapping[str, Any], kind: type, state: Mapping[str, Any], p: Tensor, grad: Tensor
) -> LinearStep:
    """Return how the step that an optimiser is about to take at a parameter is made up.

    ``p_after - p = on_gradient * grad + decay + history``. Nothing is changed.

    Args:
        group: The parameter's group in ``optimizer.param_groups``.
        kind: The optimiser's class, that of :func:`bare`.
        state: ``optimizer.state[p]`` as it is before the step; empty before the first.
        p: The parameter as it is before the step.
        grad: The whole gradient that the optimiser sees, after scaling and clipping, before the
            sign of ``maximize``. Sparse or dense, of the parameter's shape.

    Returns:
        The step, on the parameter's device, in its dtype; in float32 for half precision.

    Raises:
        AuditError: the step of such an optimiser cannot be split, as :func:`why_not` says; or
            its options or memory are not those of its kind.

    Example:
        >>> optimizer = torch.optim.SGD([p := torch.ones(2)], lr=0.5, weight_decay=0.1)
        >>> grad = torch.tensor([1.0, -2.0])
        >>> linear_step(optimizer.param_groups[0], torch.optim.SGD, {}, p, grad)
        LinearStep(on_gradient=tensor(-0.5000), decay=tensor([-0.0500, -0.0500]), history=None)
    """
    known, _ = _read(kind)
    if known is None or known.enters:
        raise AuditError(f"linear_step: {_not_linear(kind)}")
    return _applied(known.step, group, kind, state, p, grad)


def memory_of(group: Mapping[str, Any], kind: type, state: Mapping[str, Any]) -> Memory | None:
    """Return what an optimiser remembers of all gradients in a sum, or None if it is not known.

    The ``history`` of :func:`linear_step` is linear in it, so that each part of the gradient has
    a memory of its own.

    Args:
        group: As in :func:`linear_step`.
        kind: As in :func:`linear_step`.
        state: As in :func:`linear_step`.

    Example:
        >>> memory_of({"betas": (0.75, 0.999), "weight_decay": 0}, torch.optim.Adam, {})
        Memory(name='exp_avg', keeps=0.75, takes=0.25, decay=0, adapted=False)
    """
    known, _ = _read(kind)
    make = None if known is None else MEMORIES.get(known.base)
    return None if make is None else make(_options(group), state)


def direction(
    group: Mapping[str, Any], kind: type, state: Mapping[str, Any], p: Tensor, grad: Tensor
) -> LinearStep:
    """Return what enters the sign of Lion, or the orthogonalisation of Muon, as a step.

    The step itself is not linear in the gradient; this is, and points where the step does:
    ``-lr * ((1 - beta1) * g + beta1 * momentum)`` of Lion, ``-lr * (momentum after g)`` of Muon.
    Weight decay, which stays outside of both, is left out.

    Args:
        group: As in :func:`linear_step`.
        kind: ``torch.optim.Muon``, or a class that is called ``Lion``.
        state: As in :func:`linear_step`.
        p: As in :func:`linear_step`.
        grad: As in :func:`linear_step`.

    Raises:
        AuditError: of another class, or with other options or memory.

    Example:
        >>> class Lion(torch.optim.Optimizer): ...
        >>> group = {"lr": 0.5, "betas": (0.9, 0.99)}
        >>> direction(group, Lion, {}, torch.ones(2), torch.ones(2)).on_gradient
        tensor(-0.0500)

    References:
        Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023.
        Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
    """
    known, _ = _read(kind)
    if known is None or not known.enters:
        raise AuditError(f"direction: expected Lion or torch.optim.Muon, got {kind.__name__}")
    return _applied(known.step, group, kind, state, p, grad)


def _sgd(options: _Options, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> LinearStep:
    lr, momentum = options["lr"], options["momentum"]
    if momentum == 0:
        return _made(options, p, -lr)
    velocity = _held(state, "momentum_buffer", p) if "momentum_buffer" in state else None
    # torch's first velocity is the gradient itself, not dampened
    fresh = 1.0 if velocity is None else 1.0 - options["dampening"]
    factor, kept = (1.0 + momentum * fresh, momentum) if options["nesterov"] else (fresh, 1.0)
    history = None if velocity is None else -lr * kept * momentum * velocity
    return _made(options, p, -lr * factor, history)


def _adam(
    options: _Options,
    state: Mapping[str, Any],
    p: Tensor,
    grad: Tensor,
    *,
    decoupled: bool = False,
) -> LinearStep:
    decoupled = options.get("decoupled_weight_decay", decoupled)
    beta1, beta2 = options["betas"]
    step = _count(state)
    second = _second(state, "exp_avg_sq", beta2, _entering(options, p, grad, decoupled), p)
    if options.get("amsgrad") and (largest := _held(state, "max_exp_avg_sq", p)) is not None:
        second = torch.maximum(largest, second)
    size = second.sqrt() / (1 - beta2**step) ** 0.5 + options["eps"]
    scale = -options["lr"] / (1 - beta1**step) / size
    history = _times(scale * beta1, _held(state, "exp_avg", p))
    return _made(options, p, scale * (1 - beta1), history, decoupled)


def _rmsprop(options: _Options, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> LinearStep:
    alpha = options["alpha"]
    entering = _entering(options, p, grad)
    second = _second(state, "square_avg", alpha, entering, p)
    if options["centered"]:
        first = _held(state, "grad_avg", p)
        first = (torch.zeros_like(p) if first is None else first).lerp(entering, 1 - alpha)
        second = second - first * first
    scale = -options["lr"] / (second.sqrt() + options["eps"])
    momentum = options["momentum"]
    velocity = _held(state, "momentum_buffer", p) if momentum > 0 else None
    return _made(options, p, scale, _times(-options["lr"] * momentum, velocity))


def _adagrad(options: _Options, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> LinearStep:
    total = _held(state, "sum", p)
    total = options["initial_accumulator_value"] if total is None else total
    size = (total + _entering(options, p, grad) ** 2).sqrt() + options["eps"]
    lr = options["lr"] / (1 + (_count(state) - 1) * options["lr_decay"])
    return _made(options, p, -lr / size)


def _adadelta(options: _Options, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> LinearStep:
    eps = options["eps"]
    second = _second(state, "square_avg", options["rho"], _entering(options, p, grad), p)
    moved = _held(state, "acc_delta", p)
    moved = torch.zeros_like(p) if moved is None else moved
    return _made(options, p, -options["lr"] * (moved + eps).sqrt() / (second + eps).sqrt())


def _adamax(options: _Options, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> LinearStep:
    beta1, beta2 = options["betas"]
    size = _entering(options, p, grad).abs() + options["eps"]
    if (largest := _held(state, "exp_inf", p)) is not None:
        size = torch.maximum(beta2 * largest, size)
    scale = -options["lr"] / (1 - beta1 ** _count(state)) / size
    history = _times(scale * beta1, _held(state, "exp_avg", p))
    return _made(options, p, scale * (1 - beta1), history)


def _nadam(options: _Options, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> LinearStep:
    decoupled = options.get("decoupled_weight_decay", False)
    lr, (beta1, beta2) = options["lr"], options["betas"]
    step = _count(state)
    second = _second(state, "exp_avg_sq", beta2, _entering(options, p, grad, decoupled), p)
    size = (second / (1 - beta2**step)).sqrt() + options["eps"]
    now, then = (
        beta1 * (1.0 - 0.5 * 0.96 ** (n * options["momentum_decay"])) for n in (step, step + 1)
    )
    # torch keeps the product of all rates in single precision, and so the step has its rounding
    before = state["mu_product"] if state else torch.ones((), dtype=_scalar_dtype())
    product = _number(before * now)
    direct = -lr * (1.0 - now) / (1.0 - product)
    through = -lr * then / (1.0 - product * then)
    history = _times(through * beta1 / size, _held(state, "exp_avg", p))
    return _made(options, p, (direct + through * (1 - beta1)) / size, history, decoupled)


def _radam(options: _Options, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> LinearStep:
    decoupled = options.get("decoupled_weight_decay", False)
    beta1, beta2 = options["betas"]
    step = _count(state)
    unbias = 1 - beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / unbias
    second = _second(state, "exp_avg_sq", beta2, _entering(options, p, grad, decoupled), p)
    adapted = unbias**0.5 / (second.sqrt() + options["eps"])

    def rectified() -> _Number:
        ratio = (length - 4) * (length - 2) * longest
        return (ratio / ((longest - 4) * (longest - 2) * length)) ** 0.5

    if isinstance(length, Tensor):
        factor = torch.where(length > 5, adapted * rectified(), 1.0)
    else:
        factor = adapted * rectified() if length > 5 else 1.0
    scale = -options["lr"] / (1 - beta1**step) * factor
    history = _times(scale * beta1, _held(state, "exp_avg", p))
    return _made(options, p, scale * (1 - beta1), history, decoupled)


def _asgd(options: _Options, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> LinearStep:
    # torch keeps the rate in single precision
    start = torch.as_tensor(options["lr"], dtype=_scalar_dtype())
    rate = _number(state["eta"] if state else start)
    made = _made(options, p, -rate)
    shrunk = -options["lambd"] * rate * p
    return replace(made, decay=shrunk if made.decay is None else shrunk + made.decay)


def _lion(options: _Options, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> LinearStep:
    lr, beta = options["lr"], options["betas"][0]
    history = _times(-lr * beta, _held(state, "exp_avg", p))
    return _made({**options, "weight_decay": 0}, p, -lr * (1 - beta), history)


def _muon(options: _Options, state: Mapping[str, Any], p: Tensor, grad: Tensor) -> LinearStep:
    lr, momentum = options["lr"], options["momentum"]
    fresh, kept = 1.0 - momentum, momentum
    if options["nesterov"]:
        fresh, kept = 1.0 - momentum + momentum * fresh, momentum * kept
    history = _times(-lr * kept, _held(state, "momentum_buffer", p))
    return _made({**options, "weight_decay": 0}, p, -lr * fresh, history)


def _sgd_memory(options: _Options, state: Mapping[str, Any]) -> Memory | None:
    if options["momentum"] == 0:
        return None
    fresh = state.get("momentum_buffer") is None
    takes = 1.0 if fresh else 1.0 - options["dampening"]
    return Memory("momentum_buffer", options["momentum"], takes, options["weight_decay"])


def _adam_memory(
    options: _Options, state: Mapping[str, Any], *, decoupled: bool = False
) -> Memory | None:
    beta, decoupled = options["betas"][0], options.get("decoupled_weight_decay", decoupled)
    decay = 0.0 if decoupled else options["weight_decay"]
    return Memory("exp_avg", float(beta), 1.0 - float(beta), decay)


def _rmsprop_memory(options: _Options, state: Mapping[str, Any]) -> Memory | None:
    if options["momentum"] == 0:
        return None
    decay = options["weight_decay"]
    return Memory("momentum_buffer", options["momentum"], 1.0, decay, adapted=True)


# (options, state) -> Memory, or None where there is none; as for ``STEPS``.
MEMORIES: dict[type, MemoryFn] = {
    torch.optim.Adam: _adam_memory,
    torch.optim.AdamW: functools.partial(_adam_memory, decoupled=True),
    torch.optim.Adamax: _adam_memory,
    torch.optim.NAdam: _adam_memory,
    torch.optim.RAdam: _adam_memory,
    torch.optim.RMSprop: _rmsprop_memory,
    torch.optim.SGD: _sgd_memory,
}


# (options, state, p, grad) -> LinearStep, pure. ``options`` are those of the parameter's group,
# where a tensor of one number on the CPU has become a number; ``state`` is the optimiser's own at
# the parameter before the step, empty before the first; ``p`` and ``grad``, the whole gradient, are
# dense, detached and at least of single precision. A subclass that does not override ``step`` is
# taken for its base.
STEPS: dict[type, StepFn] = {
    torch.optim.ASGD: _asgd,
    torch.optim.Adadelta: _adadelta,
    torch.optim.Adagrad: _adagrad,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: functools.partial(_adam, decoupled=True),
    torch.optim.Adamax: _adamax,
    torch.optim.NAdam: _nadam,
    torch.optim.RAdam: _radam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.SGD: _sgd,
}


@dataclass(frozen=True)
class _Known:
    """A class of optimisers, and its step or what enters a function that is not linear."""

    base: type
    step: StepFn
    enters: str = ""  # the name of that function


def _known(kind: type) -> _Known | None:
    """Return what is known of the nearest class that a class of optimisers is, if any."""
    muon = getattr(torch.optim, "Muon", None)  # since torch 2.9
    for base in kind.__mro__:
        if base in STEPS:
            return _Known(base, STEPS[base])
        if base is muon:
            return _Known(base, _muon, "orthogonalisation")
        if base.__name__ == "Lion":
            return _Known(base, _lion, "sign")
    return None


def _read(kind: type) -> tuple[_Known | None, str]:
    """Return what is known of the step that a class itself takes; or None, and why nothing is."""
    name, known = kind.__name__, _known(kind)
    if known is None:
        why = f"the step of {name} is not known"
    elif any(_overrides(kind, known.base, method) for method in ("step", "_init_group")):
        why = f"{name} overrides the step of {known.base.__name__}"
    else:
        return known, ""
    return None, f"{why}: see the gradient, or add {name} to {__name__}.STEPS"


def _not_linear(kind: type) -> str:
    """Return why the step of a class cannot be split, or nothing if it can."""
    known, why = _read(kind)
    if known is None or not known.enters:
        return why
    return (
        f"the step of {kind.__name__} is not linear in the gradient: shares of what enters its "
        f"{known.enters} can be told instead"
    )


def _overrides(kind: type, base: type, method: str) -> bool:
    """Return whether a method is another than the base's; torch wraps each class's ``step``."""
    own, inherited = (inspect.unwrap(getattr(k, method, _no_method)) for k in (kind, base))
    return own is not inherited


def _no_method() -> None: ...


def _applied(
    step: StepFn,
    group: _Options,
    kind: type,
    state: Mapping[str, Any],
    p: Tensor,
    grad: Tensor,
) -> LinearStep:
    """Return the step on detached dense tensors of at least single precision."""
    dtype = p.dtype if p.dtype in (torch.float32, torch.float64) else torch.float32
    with torch.no_grad():
        try:
            made = step(_options(group), state, p.detach().to(dtype), _dense(grad).to(dtype))
        except KeyError as error:
            raise AuditError(
                f"the step of {kind.__name__} cannot be read: neither its options nor its memory "
                f"have {error} as expected, so see the gradient"
            ) from error
    decay, history = (None if x is None else x.to(dtype) for x in (made.decay, made.history))
    return LinearStep(made.on_gradient.to(dtype), decay, history)


def _options(group: _Options) -> dict[str, Any]:
    """Return the options of a group, with numbers for tensors of one number on the CPU."""
    return {
        name: tuple(map(_number, option)) if isinstance(option, tuple) else _number(option)
        for name, option in group.items()
        if name != "params"
    }


def _made(
    options: _Options,
    p: Tensor,
    scale: _Number,
    history: Tensor | None = None,
    decoupled: bool = False,
) -> LinearStep:
    """Return the step ``scale * (g + weight_decay * p) + history``, with the sign of ``maximize``.

    Decoupled, weight decay takes ``-lr * weight_decay * p`` instead.
    """
    scale = scale if isinstance(scale, Tensor) else p.new_full((), scale)
    pull = -options["lr"] if decoupled else scale
    decay = pull * options["weight_decay"] * p if _decays(options) else None
    return LinearStep(-scale if options.get("maximize") else scale, decay, history)


def _entering(options: _Options, p: Tensor, grad: Tensor, decoupled: bool = False) -> Tensor:
    """Return the gradient as the moments take it: with the sign of ``maximize`` and the decay."""
    grad = -grad if options.get("maximize") else grad
    return grad if decoupled or not _decays(options) else grad + options["weight_decay"] * p


def _decays(options: _Options) -> bool:
    decay = options["weight_decay"]
    return isinstance(decay, Tensor) or decay != 0  # a tensor is not waited for


def _second(
    state: Mapping[str, Any], name: str, beta: _Number, entering: Tensor, p: Tensor
) -> Tensor:
    """Return the running mean of squares after this gradient."""
    before = _held(state, name, p)
    now = (1 - beta) * entering**2
    return now if before is None else beta * before + now


def _held(state: Mapping[str, Any], name: str, p: Tensor) -> Tensor | None:
    """Return a tensor of the memory, dense and as the parameter; None before the first step."""
    held = state[name] if state else None
    return None if held is None else _dense(held).to(p)


def _times(factor: _Number, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else factor * tensor


def _count(state: Mapping[str, Any]) -> _Number:
    """Return the number of the step that is about to be taken, from 1."""
    return _number(state["step"] if state else 0) + 1


def _number(value: Any) -> Any:
    """Return a tensor of one number on the CPU as that number; leave all else, on its device."""
    if not isinstance(value, Tensor) or value.numel() != 1:
        return value
    return value.item() if value.device.type == "cpu" else value.detach().reshape(())


def _dense(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()


def _scalar_dtype() -> torch.dtype:
    """Return the dtype in which torch.optim makes its numbers that are tensors."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
