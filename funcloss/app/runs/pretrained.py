"""Pretrained weights of torchvision, the form of images that they expect, and what is frozen."""

import copy
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from funcloss.app.config import TORCHVISION, did_you_mean
from funcloss.app.data.fetch import check_network, stall_timeout
from funcloss.errors import ConfigError, DataError

# Their weights take pixels in -1..1, which torchvision makes of its usual scale within the model.
OF_TENSORFLOW = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class ImageForm:
    """The images that pretrained weights expect."""

    size: int  # height and width
    mean: tuple[float, ...]  # of red, green and blue, pixels in 0..1
    std: tuple[float, ...]

    def of_channels(self, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and deviation of grey or coloured images; none for others, to be measured."""
        if channels == 1:
            return (sum(self.mean) / 3,), (sum(self.std) / 3,)
        return (self.mean, self.std) if channels == 3 else ((), ())


def pretrained_form(address: str) -> ImageForm:
    """Return the size and scale of images that the weights of ``torchvision:NAME`` expect.

    Raises:
        ConfigError: torchvision has no weights of that name.

    Example:
        >>> pretrained_form("torchvision:resnet18").size
        224
    """
    transforms = _weights(address).transforms()
    size, mean, std = transforms.crop_size[0], tuple(transforms.mean), tuple(transforms.std)
    if address.removeprefix(TORCHVISION) in OF_TENSORFLOW:
        mean = std = (0.5, 0.5, 0.5)
    return ImageForm(size, mean, std)


def pretrained_tensors(address: str, model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return torchvision's own weights for a model, fetched where they are not there.

    Args:
        address: ``torchvision:NAME``.
        model: Of that name; the weights are those of its tensors. If it takes grey images, its
            first convolution has the sum of theirs over the channels: the same as three equal ones.

    Returns:
        Tensors by name, and the name of the weights.

    Raises:
        ConfigError: torchvision has no weights of that name.
        DataError: they cannot be had, or are damaged.
    """
    weights = _weights(address)
    place = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    about, fix = f"the pretrained weights of {address}", "or train without pretrained"
    try:
        if not place.exists():
            check_network([weights.url])
        with stall_timeout():
            found = weights.get_state_dict(
                progress=sys.stderr.isatty(), check_hash=True, weights_only=True
            )
    except DataError as error:
        raise DataError(
            f"{about} are not there: {error}; put {weights.url} into {place.parent}, {fix}"
        ) from None
    except Exception as error:  # whatever a mirror, the disk or a damaged file does
        line = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise DataError(f"{about}, {place}, cannot be read: {line}; delete it, {fix}") from None
    # as torchvision itself renames those of its DenseNets
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12])\.")
    own = model.state_dict()
    tensors = {old.sub(r"\1\2.", name): tensor for name, tensor in found.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if name in own}
    first = next((n for n, t in tensors.items() if t.dim() == 4), None)
    if first and tensors[first].shape[1] == 3 and own[first].shape[1] == 1:
        tensors[first] = tensors[first].sum(1, keepdim=True)
    return tensors, f"torchvision's {weights}"


def frozen(model: nn.Module) -> nn.Module:
    """Return a copy of a model of which the last layer alone is trained.

    The others are in evaluation mode: their statistics stay too, and they drop nothing out.

    Example:
        >>> model = frozen(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 3)))
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['2.weight', '2.bias']
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    *_, last = (m for m in model.modules() if next(m.parameters(recurse=False), None) is not None)
    last.train().requires_grad_(True)
    return model


def torchvision_models(address: str) -> Any:
    """Return the module ``torchvision.models``, which ``address`` needs.

    Raises:
        ConfigError: there is no torchvision that matches torch.
    """
    try:
        import torchvision.models
    except Exception as error:  # a build for another torch fails in more ways than ImportError
        line = str(error).strip().splitlines()[-1]
        raise ConfigError(
            f"model {address} needs a torchvision that matches torch {torch.__version__}: {line}"
        ) from None
    return torchvision.models


def _weights(address: str) -> Any:
    name, models = address.removeprefix(TORCHVISION), torchvision_models(address)
    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"torchvision has no model {name!r}{did_you_mean(name, known)}")
    try:
        return models.get_model_weights(name).DEFAULT
    except AttributeError:
        raise ConfigError(f"torchvision has no pretrained weights of {name!r}") from None
