"""The model under audit, as a pure function of its params."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from funcloss.errors import AuditError
from funcloss.keys import keyed_randomness, make_key
from funcloss.objectives import make_forward
from funcloss.objectives.supervised import Forward
from funcloss.optim import OptState
from funcloss.training import TrainState
from funcloss.training.step import preferred_layout
from funcloss.transforms import Predict
from funcloss.typing import Buffers, Params


@dataclass(frozen=True, eq=False)
class ModelState:
    """A model as a function, where it is, and how its randomness goes on."""

    predict: Predict
    params: Params
    opt_state: OptState | None  # None: not known
    step: Tensor  # number of the next step
    key: Tensor

    @property
    def device(self) -> torch.device:
        """Device of the params."""
        return next(iter(self.params.values())).device


def make_model_state(
    model: nn.Module,
    state: TrainState | Params | None,
    key: Tensor | None = None,
    *,
    forward: Forward | None = None,
) -> ModelState:
    """Return the model at a state as a function.

    Args:
        model: Any module, in the mode to audit it in; never touched.
        state: A training state, tensors by name, or None for the model's own; the model says
            which of them are trained.
        key: Key of the dropout masks, unless the state brings one.
        forward: The model's :func:`make_forward`, where it is at hand already.

    Raises:
        AuditError: the model couples examples or has nothing to train, or the state is not its own.
    """
    check_no_coupling(model)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    opt_state, step = None, None
    if isinstance(state, TrainState):
        params, buffers = state.params, state.buffers
        opt_state, step, key = state.opt_state, state.step, state.key
    else:
        given = {} if state is None else state
        if unknown := [name for name in given if name not in named]:
            raise AuditError(f"audit: {unknown[0]} of the state is not of the model")
        tensors = {n: preferred_layout(t.detach()) for n, t in {**named, **given}.items()}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        params = {name: t for name, t in tensors.items() if name in trained}
        buffers = {name: t for name, t in tensors.items() if name not in trained}
    if not params:
        raise AuditError("audit: the model has no parameter that requires a gradient")
    for name, tensor in params.items():
        if name not in named or named[name].shape != tensor.shape:
            raise AuditError(f"audit: {name} of the state is not of the model")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise AuditError(
                f"audit: parameters must be float32 or float64, got {tensor.dtype}: model.float()"
            )
    device = next(iter(params.values())).device
    return ModelState(
        predict=make_predict(forward or make_forward(model), buffers),
        params=params,
        opt_state=opt_state,
        step=torch.zeros((), dtype=torch.int64, device=device) if step is None else step,
        key=make_key(0, device=device) if key is None else key,
    )


def make_predict(forward: Forward, buffers: Buffers) -> Predict:
    """Return a model with its buffers as a function, in which dropout draws from the keys."""

    def predict(params: Params, inputs: Any, keys: Tensor) -> Tensor:
        # The other attention kernels have no forward-mode derivative.
        with keyed_randomness(keys), sdpa_kernel(SDPBackend.MATH):
            # Its own copy of the inputs: a model may write to them.
            predictions, _ = forward(params, buffers, tree_map(torch.clone, inputs))
        if not isinstance(predictions, Tensor):
            kind = type(predictions).__name__
            raise AuditError(
                f"audit: the model must give one tensor, got a {kind}: wrap it in one that does"
            )
        return predictions

    return predict


def has_dropout(model: nn.Module) -> bool:
    """Return whether a layer of the model drops out in its present mode.

    One does that is in training mode and has a probability: ``p`` as torch's dropout layers and
    torchvision's stochastic depth, ``dropout`` as attention and recurrent layers, ``drop_prob`` as
    timm's. What a model calls as a function is not seen.

    Example:
        >>> has_dropout(nn.LSTM(2, 2, 2, dropout=0.1)), has_dropout(nn.Linear(2, 2))
        (True, False)
    """
    return any(_drops(m) for m in model.modules() if m.training)


def _drops(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase) and module.num_layers == 1:
        return False
    given = (getattr(module, name, None) for name in ("p", "dropout", "drop_prob"))
    return any(isinstance(p, float) and p > 0 for p in given)


def couples(model: nn.Module) -> bool:
    """Return whether the model has a layer that couples the examples of a batch."""
    try:
        check_no_coupling(model)
    except AuditError:
        return True
    return False


def check_no_coupling(model: nn.Module) -> None:
    """Raise ``AuditError`` if the model has a layer that couples the examples of a batch."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.modules.batchnorm._BatchNorm):
            continue
        layer = f"audit: the layer {name!r} ({type(module).__name__})"
        couples = "so the gradient of one example depends on the others of its batch"
        if module.running_mean is None:
            raise AuditError(f"{layer} keeps no running statistics, {couples}: use GroupNorm")
        if module.training:
            raise AuditError(
                f"{layer} is in training mode, {couples}: audit model.eval(), put this layer "
                "alone into evaluation mode, or use GroupNorm"
            )
