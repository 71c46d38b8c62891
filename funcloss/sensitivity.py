"""What a cost is worth: the derivative of a validation cost through a few steps of training.

A train step is a pure function, so a few of them are one pure function of the costs in ``hyper``,
and every transform of ``torch.func`` applies to it. What comes out looks ``k`` steps ahead and no
further, which favours whatever pays at once (short-horizon bias; Wu, Ren, Liao and Grosse, 2018).
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from funcloss import losses
from funcloss._checks import check_floating, check_shape
from funcloss._numbers import wide_dtype
from funcloss.objectives.supervised import Forward
from funcloss.reduction import mean, weighted_mean
from funcloss.training.step import TrainState, TrainStep
from funcloss.transforms import quiet_jvp
from funcloss.typing import Batch, Buffers, Hyper, Inputs, Params

ValidationCost = Callable[[Params, Buffers], Tensor]  # a scalar
Transform = Callable[..., Callable[[Tensor], tuple[Tensor, Tensor]]]  # (function, has_aux=True)

MOST_STEPS = 10  # unrolled at once: beyond, memory grows and derivatives turn chaotic
_TOLD = 5  # sentences


class CostGradient(NamedTuple):
    """A validation cost after a few steps, and what it answers to a tensor of ``hyper``."""

    cost: Float[Tensor, ""]
    gradient: Float[Tensor, "*value"]  # cost per unit of each entry


def unrolled_cost(
    train_step: TrainStep,
    state: TrainState,
    batches: Sequence[Batch],
    validation_cost: ValidationCost,
    hyper: Hyper,
    *,
    name: str = "class_weights",
) -> Callable[[Tensor], Tensor]:
    """Return ``value -> validation_cost(state_k)`` after ``k`` steps at ``hyper[name] = value``.

    A pure function, for ``torch.func.grad``, ``jacfwd``, ``vmap`` and the rest; its Hessian is
    ``jacfwd(grad(cost_of))``, an order that torch 2.6 has for convolutions too. The running
    statistics of BatchNorm are differentiated, which torch alone takes for constants; whatever
    else a module writes without a derivative stays one. Attention takes the kernel that has
    second derivatives.

    Args:
        train_step: ``(state, batch, hyper) -> (state, metrics)``, not compiled: compile what the
            transform gives.
        state: Where the steps begin.
        batches: What the steps are taken on, 1 to 10 of them.
        validation_cost: ``(params, buffers) -> scalar``, as :func:`mean_expected_cost` gives.
        hyper: What the steps take; all of it but ``name`` is fixed.
        name: The tensor in ``hyper`` to vary.

    Returns:
        ``value -> cost``, from a tensor of the shape of ``hyper[name]`` to a scalar.

    Raises:
        ValueError: there are not 1 to 10 batches, or ``hyper`` has no ``name``; on a call, the
            value has another shape or the cost is no scalar.
        TypeError: ``hyper[name]`` is not floating point.

    Example:
        >>> from funcloss import class_weighted, losses, models, optim
        >>> from funcloss.objectives import mean_of, supervised
        >>> from funcloss.training import init_state, make_train_step
        >>> model, optimizer = models.linear((1, 2, 2), 2), optim.sgd()
        >>> objective = supervised(model, mean_of(class_weighted(losses.cross_entropy)))
        >>> train_step, state = make_train_step(objective, optimizer), init_state(model, optimizer)
        >>> batches = [Batch(torch.ones(2, 1, 2, 2), torch.tensor([0, 1]))] * 3
        >>> hyper = {"learning_rate": torch.tensor(0.1), "class_weights": torch.ones(2)}
        >>> cost_of = unrolled_cost(
        ...     train_step, state, batches, lambda params, _: params["fc.bias"][0].sigmoid(), hyper)
        >>> torch.func.jacrev(torch.func.grad(cost_of))(torch.ones(2)).shape
        torch.Size([2, 2])

    References:
        Maclaurin, Duvenaud and Adams, "Gradient-based hyperparameter optimization through
        reversible learning", 2015.
    """
    if not 1 <= len(batches) <= MOST_STEPS:
        raise ValueError(
            f"unrolled_cost: batches must hold 1 to {MOST_STEPS} steps, got {len(batches)}; "
            "a longer horizon costs memory and its derivative is seldom of use"
        )
    if name not in hyper:
        raise ValueError(f"unrolled_cost: hyper must hold {name!r} to vary, got {sorted(hyper)}")
    check_floating("unrolled_cost", f"hyper[{name!r}]", hyper[name])
    shape = tuple(hyper[name].shape)

    def cost_of(value: Tensor) -> Tensor:
        check_shape("unrolled_cost", name, value, shape, f"hyper[{name!r}]")
        # BatchNorm writes to its buffers: under vmap they must be mapped over before it does.
        zero = torch.zeros_like(value).sum()
        buffers = tree_map_only(Tensor, lambda b: b + zero.to(b), state.buffers)
        here = state._replace(buffers=buffers)
        with _differentiable_batch_norm(), sdpa_kernel(SDPBackend.MATH):
            for batch in batches:
                here, _ = train_step(here, batch, {**hyper, name: value})
            cost = validation_cost(here.params, here.buffers)
        check_shape("unrolled_cost", "the validation cost", cost, (), "a derivative of it")
        return cost

    return cost_of


def cost_gradient(
    train_step: TrainStep,
    state: TrainState,
    batches: Sequence[Batch],
    validation_cost: ValidationCost,
    hyper: Hyper,
    *,
    name: str = "class_weights",
    transform: Transform = torch.func.grad,
) -> CostGradient:
    """Derivative of a validation cost through ``k`` steps, ``d cost(state_k) / d hyper[name]``.

    Exact for these ``k`` steps, and myopic: it tells what an entry is worth ``k`` steps from here,
    not at the end of the training. On a short horizon whatever lowers the cost at once looks
    best: noise of the batches weighs more than direction, a decayed learning rate looks too good,
    a class that learns slowly looks not worth its weight. A state that has just begun adds to
    that: Adam's first step is the sign of the gradient, which hardly answers to any weight, and
    momentum passes on later what the horizon does not see. Take it from a state that has trained,
    over several draws of batches, and trust signs and order more than sizes. It is also a slope:
    the further from here, the less it says.

    Args:
        train_step: ``(state, batch, hyper) -> (state, metrics)``, not compiled.
        state: Where the steps begin.
        batches: What the steps are taken on, 1 to 10 of them.
        validation_cost: ``(params, buffers) -> scalar``; of data that no step is taken on.
        hyper: What the steps take; the derivative is at ``hyper[name]``.
        name: The tensor in ``hyper`` to differentiate by.
        transform: ``torch.func.grad``, reverse mode: one pass whatever the number of entries, with
            the activations of all ``k`` steps in memory. ``torch.func.jacfwd``, forward mode: the
            memory of one step and its slopes, times the number of entries; for few entries.

    Returns:
        Cost and gradient, detached, the gradient of shape and dtype of ``hyper[name]``.

    Raises:
        ValueError: as :func:`unrolled_cost`.
        TypeError: ``hyper[name]`` is not floating point.
        NotImplementedError: torch has not the derivative that an operation needs: in forward mode
            of an LSTM on the CPU and of ``cdist``, in both modes of ``embedding_bag``.

    Example:
        >>> from funcloss import class_weighted, losses, models, optim
        >>> from funcloss.objectives import mean_of, supervised
        >>> from funcloss.training import init_state, make_train_step
        >>> model, optimizer = models.linear((1, 2, 2), 2), optim.sgd()
        >>> objective = supervised(model, mean_of(class_weighted(losses.cross_entropy)))
        >>> train_step, state = make_train_step(objective, optimizer), init_state(model, optimizer)
        >>> batches = [Batch(torch.ones(2, 1, 2, 2), torch.tensor([0, 1]))] * 3
        >>> hyper = {"learning_rate": torch.tensor(0.1), "class_weights": torch.ones(2)}
        >>> result = cost_gradient(
        ...     train_step, state, batches, lambda params, _: params["fc.bias"][0].sigmoid(), hyper)
        >>> result.gradient.sign()  # dearer examples of 0 raise the bias of 0
        tensor([ 1., -1.])

    References:
        Maclaurin, Duvenaud and Adams, "Gradient-based hyperparameter optimization through
        reversible learning", 2015; Franceschi, Donini, Frasconi and Pontil, "Forward and reverse
        gradient-based hyperparameter optimization", 2017; Ren, Zeng, Yang and Urtasun, "Learning
        to reweight examples for robust deep learning", 2018; Wu, Ren, Liao and Grosse,
        "Understanding short-horizon bias in stochastic meta-optimization", 2018.
    """
    state, batches, hyper = tree_map_only(Tensor, torch.detach, (state, list(batches), dict(hyper)))
    cost_of = unrolled_cost(train_step, state, batches, validation_cost, hyper, name=name)

    def twice(value: Tensor) -> tuple[Tensor, Tensor]:
        cost = cost_of(value)
        return cost, cost

    try:
        with quiet_jvp():
            gradient, cost = transform(twice, has_aux=True)(hyper[name])
    except RuntimeError as error:  # NotImplementedError is one
        raise _explained(error) from error
    # Forward mode widens what is multiplied by a scalar parameter.
    return CostGradient(cost.detach(), gradient.detach().to(hyper[name].dtype))


def mean_expected_cost(
    forward: Forward,
    inputs: Inputs,
    labels: Int[Tensor, " n"],
    cost_matrix: Float[Tensor, "classes decisions"],
    *,
    sample_weights: Float[Tensor, " n"] | None = None,
) -> ValidationCost:
    """Return the expected cost of validation examples, ``mean(cost_matrix[label] @ softmax)``.

    That of decisions drawn from the model's probabilities: unlike the cost of those by argmax it
    has a gradient.

    Args:
        forward: The model in evaluation mode, ``make_forward(model.eval())``.
        inputs: Validation inputs, ``n`` of them.
        labels: Their true classes, shape ``(n,)``.
        cost_matrix: Cost of each decision (column) in each true class (row), shape
            ``(classes, decisions)``.
        sample_weights: Importance of each example, shape ``(n,)``; the mean is over these. Where
            classes will be as frequent as ``prior``, that is ``(prior / class_prior)[labels]``,
            ``class_prior`` being the part of ``labels`` that each class makes up. None: all alike.

    Returns:
        ``(params, buffers) -> cost`` an example, a scalar.

    Raises:
        ValueError: ``sample_weights`` has not the shape of ``labels``; on a call, ``cost_matrix``
            does not fit the logits.

    Example:
        >>> cost_of = mean_expected_cost(
        ...     lambda params, buffers, inputs: (inputs * params["w"], buffers),
        ...     torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]),
        ...     cost_matrix=torch.tensor([[0.0, 1.0], [9.0, 0.0]]))
        >>> cost_of({"w": torch.ones(2)}, {})
        tensor(1.5000)

    References:
        Elkan, "The foundations of cost-sensitive learning", 2001, eq. 1.
    """
    if sample_weights is not None:
        check_shape(
            "mean_expected_cost", "sample_weights", sample_weights, tuple(labels.shape), "labels"
        )

    def cost_of(params: Params, buffers: Buffers) -> Tensor:
        logits, _ = forward(params, buffers, inputs)
        values = losses.expected_cost(logits, labels, cost_matrix=cost_matrix)
        return mean(values) if sample_weights is None else weighted_mean(values, sample_weights)

    return cost_of


def gradient_sentences(result: CostGradient, classes: Sequence[str], *, steps: int) -> list[str]:
    """Return what one more unit on each class would change, the largest first, at most five.

    Args:
        result: A gradient by class, one entry each.
        classes: Names of the classes, in the order of the labels.
        steps: How many steps it looks ahead.

    Returns:
        Lines such as ``one more unit on 9 changes the validation cost by -0.0031 (over 5 steps)``,
        to first order.

    Raises:
        ValueError: the gradient has not one entry a class.

    Example:
        >>> result = CostGradient(torch.tensor(0.4), torch.tensor([0.0002, -0.0031]))
        >>> gradient_sentences(result, ("cat", "dog"), steps=5)[0]
        'one more unit on dog changes the validation cost by -0.0031 (over 5 steps)'
    """
    check_shape("gradient_sentences", "gradient", result.gradient, (len(classes),), "classes")
    slopes = dict(zip(classes, result.gradient.tolist(), strict=True))
    # A slope that is no number is first: whoever reads on must know of it.
    largest = sorted(slopes, key=lambda c: (slopes[c] == slopes[c], -abs(slopes[c])))[:_TOLD]
    over = f"over {steps} step" + ("" if steps == 1 else "s")
    return [
        f"one more unit on {c} changes the validation cost by {slopes[c]:+.2g} ({over})"
        for c in largest
    ]


class _differentiable_batch_norm(TorchFunctionMode):  # noqa: N801 - used as a verb
    """Normalise batches as torch does, in operations that have every derivative.

    In torch's own the running statistics have none. From the second step on they depend on the
    costs, through the layers before; a validation cost in evaluation mode reads them, and its
    gradient over ten steps is wrong by up to a tenth. Nor is its third derivative right, which a
    Hessian of the cost needs.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Replace ``F.batch_norm``, let the rest pass."""
        func = _batch_norm if func is F.batch_norm else func
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    wide = input.to(wide_dtype(input))
    center, var = running_mean, running_var
    if training:
        var, center = torch.var_mean(wide, (0, *range(2, input.dim())), correction=0)
        if running_mean is not None:
            n = input.numel() // input.shape[1]
            for running, fresh in ((running_mean, center), (running_var, var * (n / (n - 1)))):
                running.copy_((1.0 - momentum) * running + momentum * fresh)
    scale = (var + eps).rsqrt() * (1.0 if weight is None else weight)
    offset = (0.0 if bias is None else bias) - center * scale
    axes = (1, -1, *(1 for _ in input.shape[2:]))
    return (wide * scale.reshape(axes) + offset.reshape(axes)).to(input.dtype)


def _explained(error: RuntimeError) -> RuntimeError:
    """Return torch's complaint of a derivative it does not have, in the words of the caller."""
    text = str(error)
    if found := re.search(r"forward AD with (?:aten::)?(\w+)", text):
        return NotImplementedError(
            f"cost_gradient: torch has no forward-mode derivative of {found[1]}, which the step "
            "uses; take transform=torch.func.grad"
        )
    if found := re.search(r"derivative for '?(?:aten::)?(\w+)'? is not implemented", text):
        return NotImplementedError(
            "cost_gradient: a derivative through a step is a second derivative, and torch has "
            f"none where it needs {found[1]}; replace the layer by one that is made of others"
        )
    if "is_contiguous inside of vmap" in text:
        return NotImplementedError(
            "cost_gradient: this torch maps no backward pass over channels-last convolutions, as "
            "jacrev does; take transform=torch.func.grad or jacfwd"
        )
    return error
