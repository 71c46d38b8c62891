"""The network that a configuration names: ours, torchvision's or somebody's own."""

import contextlib
import copy
import inspect
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.func import vjp
from torch.utils._pytree import tree_leaves

from funcloss.app.addresses import imported
from funcloss.app.config import TORCHVISION, TrainConfig, did_you_mean
from funcloss.app.registry import MODELS
from funcloss.app.runs.checkpoint import load_tensors
from funcloss.app.runs.pretrained import (
    OF_TENSORFLOW,
    frozen,
    pretrained_tensors,
    torchvision_models,
)
from funcloss.errors import ConfigError, DataError, FunclossError, RunError
from funcloss.keys import example_keys, keyed_randomness, make_key
from funcloss.models import InputShape
from funcloss.objectives import make_forward
from funcloss.objectives.supervised import aliases_of, split_tensors
from funcloss.typing import Inputs, Params

_SMALLEST = 12  # pixels that fast-cnn needs
_SIZES = (8, 16, 24, 32, 48, 64, 96, 128, 224, 256, 299, 384)  # of images, to be tried


def resolve_model(name: str, shape: InputShape) -> str:
    """Return the network to use: the one asked for, or what suits the inputs on ``auto``.

    Args:
        name: Of a network, or ``auto``.
        shape: Of an input.

    Example:
        >>> resolve_model("auto", (1, 28, 28)), resolve_model("auto", (30,))
        ('fast-cnn', 'mlp')
    """
    if name != "auto":
        return name
    return "fast-cnn" if len(shape) == 3 and min(shape[1:]) >= _SMALLEST else "mlp"


def make_model(config: TrainConfig, shape: InputShape, classes: int) -> nn.Module:
    """Return the network that a configuration names, with weights that hang on its seed alone.

    Args:
        config: Its ``model`` and ``seed``.
        shape: Of an input.
        classes: Number of classes.

    Raises:
        ConfigError: it cannot be made for such inputs, or somebody's own gives no module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.model.startswith(TORCHVISION):
            made = _of_torchvision(config.model, shape, classes)
        else:
            made = _of_code(config, shape, classes)
        return frozen(made) if config.freeze else made


def _of_torchvision(address: str, shape: InputShape, classes: int) -> nn.Module:
    """Return one of torchvision's classifiers with a head and a first layer of the right size."""
    models = torchvision_models(address)
    name = address.removeprefix(TORCHVISION)
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"torchvision has no model {name!r}{did_you_mean(name, known)}")
    if len(shape) != 3:
        raise ConfigError(f"model {address} takes images, and the inputs are of shape {shape}")
    more = {"aux_logits": False, "init_weights": True} if name in OF_TENSORFLOW else {}
    more |= {"image_size": shape[1]} if name.startswith("vit_") else {}
    try:
        model = models.get_model(name, weights=None, num_classes=classes, **more)
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"model {address} cannot be made for images of {shape}: {error}"
        ) from None
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            return model if layer.in_channels == shape[0] else _with_channels(model, shape[0])
    return model


def _with_channels(model: nn.Module, channels: int) -> nn.Module:
    """Return a model whose first convolution takes images of other channels, its weights drawn."""
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    if layer.groups != 1:
        raise ConfigError(f"the first layer of the model cannot take {channels} channels")
    new = nn.Conv2d(
        channels,
        layer.out_channels,
        layer.kernel_size,  # pyright: ignore[reportArgumentType]
        stride=layer.stride,  # pyright: ignore[reportArgumentType]
        padding=layer.padding,  # pyright: ignore[reportArgumentType]
        dilation=layer.dilation,  # pyright: ignore[reportArgumentType]
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
    )
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return model


def _of_code(config: TrainConfig, shape: InputShape, classes: int) -> nn.Module:
    """Return what a factory makes, called with the input's shape and the classes, or without."""
    ours = config.model in MODELS
    address = MODELS[config.model].address if ours else config.model
    factory = imported(address, what="model", refused=config.refused_code)
    if isinstance(factory, nn.Module):
        raise ConfigError(f"{address} is a module: name a function that makes it, or its class")
    if not callable(factory):
        kind = type(factory).__name__
        raise ConfigError(f"{address} must be a function that returns an nn.Module, got a {kind}")
    arguments = (shape, classes) if ours or _takes_two(factory) else ()
    try:
        made = factory(*arguments)
    except FunclossError:
        raise
    except (Exception, SystemExit) as error:
        if ours:
            way = "use image_size" if len(shape) == 3 else "use linear or mlp"
            raise ConfigError(f"{error}: {way}") from None
        said = f"{type(error).__name__}: {error}"
        call = f"{address}({', '.join(map(str, arguments))})"
        raise ConfigError(f"{call} raised {said}; a factory takes nothing, or the shape of an input"
                          " and the number of classes") from error  # fmt: skip
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{address}() must return an nn.Module, got a {type(made).__name__}")
    return made


def _takes_two(factory: Any) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    listed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes = [p for p in parameters if p.kind in listed]
    needs = sum(p.default is p.empty for p in takes)
    return len(takes) >= 2 and needs in (1, 2)


def try_model(model: nn.Module, name: str, inputs: Inputs, classes: int) -> None:
    """Raise ``ConfigError`` unless a model makes logits of inputs that can be differentiated.

    It is tried in the mode that it is in, under ``torch.func`` as a training step is.

    Args:
        model: It is not touched.
        name: What it is called.
        inputs: A few, on the model's device.
        classes: Number of classes.
    """
    lazy = nn.parameter.is_lazy
    if any(lazy(t) for t in (*model.parameters(), *model.buffers())):
        raise ConfigError(
            f"model {name} has lazy modules, whose shapes are not known yet: let the factory take "
            "the shape of an input, or run the model once before it is returned"
        )
    params, buffers = ({n: t.detach() for n, t in named.items()} for named in split_tensors(model))
    if not params:
        raise ConfigError(f"model {name} has no parameter that requires a gradient")
    first = tree_leaves(inputs)[0]
    keys = example_keys(make_key(0), torch.tensor(0), len(first)).to(first.device)
    shape = tuple(first.shape)

    try:
        of_model = make_forward(model)  # outside of the transform, which no module is copied in

        def forward(params: Params) -> tuple[Tensor, Any]:
            with keyed_randomness(keys):
                logits, _ = of_model(params, buffers, inputs)
            floating = isinstance(logits, Tensor) and logits.is_floating_point()
            scalar = logits.sum() if floating else torch.zeros(())
            return scalar, logits

        *_, logits = vjp(forward, params, has_aux=True)
    except Exception as error:
        if _within(error, torch.utils.checkpoint):
            raise ConfigError(
                f"model {name} uses gradient checkpointing (torch.utils.checkpoint), which "
                "torch.func cannot differentiate: turn it off, such as by "
                "model.gradient_checkpointing_disable() of transformers, and use a smaller "
                "batch_size if memory is short"
            ) from error
        line = next((s.strip() for s in str(error).splitlines() if s.strip()), "")
        least = _least_size(model, shape[1:]) if len(shape) == 4 else 0
        raise ConfigError(
            f"model {name} fails on inputs of shape {shape} ({first.dtype}): "
            f"{type(error).__name__}: {line}" + (f"; use image_size {least}" if least else "")
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (len(first), classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ConfigError(
            f"model {name} must give logits of shape {(len(first), classes)} for inputs of shape "
            f"{shape}, one a class; got {got}"
        )


def _within(error: Exception, module: ModuleType) -> bool:
    """Return whether an error came out of a function of a module."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_filename == module.__file__ for frame, _ in frames)


def _least_size(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Return the least usual size of an image that a model takes, 0 if there is none."""
    tried = copy.deepcopy(model).cpu().eval()
    for size in _SIZES:
        with contextlib.suppress(Exception), torch.no_grad():
            tried(torch.zeros(1, shape[0], size, size))
            return size
    return 0


def set_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Give a model tensors by name; of tied ones any name will do.

    Args:
        model: It is changed in place.
        tensors: A tensor for each parameter and buffer, but for buffers that a ``state_dict``
            leaves out. One of another shape is passed over.

    Returns:
        The names of those that were passed over.

    Raises:
        ConfigError: one is missing, or is not of the model.
    """
    params, buffers = split_tensors(model)
    own, aliases = params | buffers, aliases_of(model)
    given = {aliases.get(name, name): tensor for name, tensor in tensors.items()}
    needed = own.keys() & {aliases.get(name, name) for name in model.state_dict()}
    if missing := needed - given.keys():
        raise ConfigError(f"it lacks {min(missing)}")
    if unknown := given.keys() - own.keys():
        raise ConfigError(f"it has an unknown {min(unknown)}")
    passed = [name for name, tensor in given.items() if tensor.shape != own[name].shape]
    with torch.no_grad():
        for name, tensor in given.items():
            if name not in passed:
                own[name].copy_(tensor)
    return passed


def with_first_weights(
    model: nn.Module, tensors: Mapping[str, Tensor], source: str
) -> tuple[nn.Module, str]:
    """Return a model with first weights, and a line on what of it begins at random.

    Args:
        model: A module.
        tensors: By name. One of another shape than the model's, as a head for other classes is, is
            left as it was initialised.
        source: Where they are from.

    Raises:
        ConfigError: they are of another model.
    """
    model = copy.deepcopy(model)
    try:
        anew = set_tensors(model, tensors)
    except ConfigError as error:
        raise ConfigError(f"{source} is of another model: {error}") from None
    n = len(tensors)
    if len(anew) == n:
        raise ConfigError(f"no tensor of {source} has the shape that the model's has")
    if not anew:
        return model, ""
    return model, (
        f"loaded {n - len(anew)} of {n} tensors of {source}; randomly initialised because of "
        f"another shape: {', '.join(anew[:6])}"
    )


def first_weights(config: TrainConfig, model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return the first weights that a configuration names, and where they are from; else none.

    Raises:
        DataError: they cannot be read, or cannot be had.
    """
    if config.pretrained:
        return pretrained_tensors(config.model, model)
    if not config.init:
        return {}, ""
    path = Path(config.init).expanduser()
    try:
        return load_tensors(path)[0], f"init: {path.name}"
    except RunError as error:
        raise DataError(f"init: {error}; first weights are a .safetensors file") from None
