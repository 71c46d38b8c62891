"""Gradients by example and by class, and slopes along a direction, composed of ``torch.func``.

Each takes the model as ``predict(params, inputs, keys) -> predictions`` and the loss as its
gradient in the predictions, ``cotangents``. A loss that couples its examples is no exception then:
the gradient of the whole is ``sum_i J_i^T cotangents_i``, and these give its parts.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_map

from funcloss.typing import Batch, Buffers, Grads, Hyper, Objective, Params

# predictions of the inputs, (batch, ...); ``keys`` holds one random key an example
Predict = Callable[[Params, Any, Tensor], Tensor]


def per_sample_grads(
    objective: Objective,
) -> Callable[[Params, Buffers, Batch, Tensor, Hyper], Grads]:
    """Lift an objective to the gradient of each example, as a batch of one.

    ``vmap(grad(objective))``: what each example alone would do to the params. An objective that
    divides by the sum of the class weights therefore shows no class weight here.

    Args:
        objective: ``(params, buffers, batch, keys, hyper) -> (loss, (buffers, metrics))``; the
            model in it must not couple examples (BatchNorm in training mode does).

    Returns:
        ``(params, buffers, batch, keys, hyper) -> grads``, each of shape ``(batch, *shape)``; 0 for
        an example that ``batch.where`` leaves out.

    Example:
        >>> from funcloss import losses, models
        >>> from funcloss.objectives import mean_of, supervised
        >>> objective = supervised(models.linear((1, 2, 2), 3), mean_of(losses.cross_entropy))
        >>> params = {"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}
        >>> batch = Batch(torch.ones(5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1]))
        >>> grads = per_sample_grads(objective)(params, {}, batch, torch.arange(5), {})
        >>> grads["fc.bias"].shape
        torch.Size([5, 3])

    References:
        PyTorch, "Per-sample-gradients", tutorial of torch.func.
    """

    def loss_of_one(params, buffers, inputs, targets, costs, key, hyper):
        inputs = tree_map(lambda x: x[None], inputs)
        one = Batch(inputs, targets[None], costs=None if costs is None else costs[None])
        return objective(params, buffers, one, key[None], hyper)

    def grads_of(
        params: Params, buffers: Buffers, batch: Batch, keys: Tensor, hyper: Hyper
    ) -> Grads:
        costs = None if batch.costs is None else 0
        each = vmap(grad(loss_of_one, has_aux=True), in_dims=(None, None, 0, 0, costs, 0, None))
        grads, _ = each(params, buffers, batch.inputs, batch.targets, batch.costs, keys, hyper)
        if batch.where is None:
            return grads
        return {name: _kept(g, batch.where) for name, g in grads.items()}

    return grads_of


def per_sample_vjps(predict: Predict) -> Callable[[Params, Any, Tensor, Tensor], Grads]:
    """Lift a model to the part of each example in a gradient, ``J_i^T cotangents_i``.

    Args:
        predict: ``(params, inputs, keys) -> predictions``, which does not couple examples.

    Returns:
        ``(params, inputs, keys, cotangents) -> grads``, each of shape ``(batch, *shape)``.

    Example:
        >>> predict = lambda params, inputs, keys: inputs @ params["w"]
        >>> params, inputs = {"w": torch.ones(2, 1)}, torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> vjps = per_sample_vjps(predict)
        >>> vjps(params, inputs, torch.arange(2), torch.ones(2, 1))["w"].squeeze()
        tensor([[1., 2.],
                [3., 4.]])
    """

    def one(params: Params, inputs: Any, key: Tensor, cotangent: Tensor) -> Grads:
        inputs = tree_map(lambda x: x[None], inputs)
        pull = vjp(lambda p: predict(p, inputs, key[None])[0], params)[1]
        return pull(cotangent)[0]

    return vmap(one, in_dims=(None, 0, 0, 0))


def class_grads(
    predict: Predict, classes: int
) -> Callable[[Params, Any, Tensor, Tensor, Tensor], Grads]:
    """Lift a model to the part of each class in a gradient, ``sum_{y_i = c} J_i^T cotangents_i``.

    ``jacrev`` of the sums over each class, all classes in one mapped backward pass.

    Args:
        predict: ``(params, inputs, keys) -> predictions``, which does not couple examples.
        classes: Number of classes.

    Returns:
        ``(params, inputs, keys, cotangents, labels) -> grads``, of shape ``(classes, *shape)``; an
        example labelled -1 is in none. The parts sum to the gradient, for a loss that couples
        its examples too.

    Example:
        >>> predict = lambda params, inputs, keys: inputs @ params["w"]
        >>> params, inputs = {"w": torch.ones(2, 1)}, torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> parts = class_grads(predict, 2)(
        ...     params, inputs, torch.arange(2), torch.ones(2, 1), torch.tensor([1, 1]))
        >>> parts["w"].squeeze()
        tensor([[0., 0.],
                [4., 6.]])
    """

    def grads_of(
        params: Params, inputs: Any, keys: Tensor, cotangents: Tensor, labels: Tensor
    ) -> Grads:
        counts = (labels >= 0).reshape(-1, *(1,) * (cotangents.dim() - 1))
        cotangents = torch.where(counts, cotangents, 0.0)
        members = (labels == torch.arange(classes, device=labels.device)[:, None]).to(cotangents)

        def totals(params: Params) -> Tensor:
            along = (predict(params, inputs, keys) * cotangents).reshape(len(labels), -1).sum(1)
            return members @ along

        return jacrev(totals)(params)

    return grads_of


def directional(
    function: Callable[[Params], Float[Tensor, "*out"]], params: Params, direction: Params
) -> tuple[Float[Tensor, "*out"], Float[Tensor, "*out"]]:
    """Values of a function of the params and their slopes along a direction, in one forward pass.

    Args:
        function: ``params -> values``.
        params: Where.
        direction: Along what; keys and shapes of ``params``.

    Returns:
        Values, and ``d/dt function(params + t * direction)`` at ``t = 0``, of the same shape.

    Example:
        >>> values, slopes = directional(
        ...     lambda p: p["w"].square(), {"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])})
        >>> slopes
        tensor([6.])
    """
    with quiet_jvp():
        values, slopes, *_ = jvp(function, (params,), (direction,))
    return values, slopes


def twice_backward(
    function: Callable[[Params], Float[Tensor, "*out"]], params: Params, direction: Params
) -> tuple[Float[Tensor, "*out"], Float[Tensor, "*out"]]:
    """As :func:`directional`, by two backward passes, for operations without forward mode.

    The gradient ``J^T v`` is linear in ``v``, so the derivative of ``<J^T v, direction>`` in ``v``
    is ``J direction``.

    Args:
        function: ``params -> values``, each operation of which can be differentiated twice.
        params: Where.
        direction: Along what; keys and shapes of ``params``.

    Returns:
        Values, and ``d/dt function(params + t * direction)`` at ``t = 0``, of the same shape.

    Example:
        >>> values, slopes = twice_backward(
        ...     lambda p: p["w"].square(), {"w": torch.tensor([3.0])}, {"w": torch.tensor([1.0])})
        >>> slopes
        tensor([6.])
    """
    with torch.enable_grad():
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        values = function(leaves)
        along = torch.zeros_like(values, requires_grad=True)
        grads = torch.autograd.grad(
            values, list(leaves.values()), along, create_graph=True, allow_unused=True
        )
        pairs = zip(grads, direction.values(), strict=True)
        total = torch.stack([(g * d).sum() for g, d in pairs if g is not None]).sum()
        (slopes,) = torch.autograd.grad(total, along)
    return values.detach(), slopes


@contextlib.contextmanager
def quiet_jvp() -> Iterator[None]:
    """Silence what torch says of its own code at the first forward-mode derivative of a process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.script", FutureWarning)
        yield


def _kept(grads: Tensor, where: Bool[Tensor, " batch"]) -> Tensor:
    return torch.where(where.reshape(-1, *(1,) * (grads.dim() - 1)), grads, 0.0)
