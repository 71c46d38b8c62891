"""Small networks, each a plain ``nn.Module`` from images or features to logits."""

import copy
import math
from collections import OrderedDict

import torch
from torch import nn

InputShape = tuple[int, ...]  # channels, height, width of an image; or the number of features


def linear(input_shape: InputShape = (1, 28, 28), classes: int = 10) -> nn.Module:
    """Softmax classifier, ``W x + b``.

    Args:
        input_shape: Shape of an input, of images or features.
        classes: Number of classes.

    Returns:
        A module from inputs ``(batch, *input_shape)`` to logits ``(batch, classes)``.

    Example:
        >>> linear()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    return _stack(flatten=nn.Flatten(), fc=nn.Linear(math.prod(input_shape), classes))


def mlp(
    input_shape: InputShape = (1, 28, 28), classes: int = 10, *, hidden: int = 256
) -> nn.Module:
    """Two hidden layers of rectified units.

    Args:
        input_shape: Shape of an input, of images or features.
        classes: Number of classes.
        hidden: Units in each hidden layer.

    Returns:
        A module from inputs ``(batch, *input_shape)`` to logits ``(batch, classes)``.

    Example:
        >>> mlp(classes=3)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 3])
    """
    return _stack(
        flatten=nn.Flatten(),
        fc1=nn.Linear(math.prod(input_shape), hidden),
        relu1=nn.ReLU(),
        fc2=nn.Linear(hidden, hidden),
        relu2=nn.ReLU(),
        fc3=nn.Linear(hidden, classes),
    )


def article_cnn(input_shape: InputShape = (1, 28, 28), classes: int = 10) -> nn.Module:
    """The MNIST network of the costly-nine tutorial: 21,840 parameters, dropout twice.

    The tutorial ends in a log-softmax; this ends in logits, which under cross-entropy are the same.

    Args:
        input_shape: Channels, height and width of an image, at least 16 by 16.
        classes: Number of classes.

    Returns:
        A module from images ``(batch, *input_shape)`` to logits ``(batch, classes)``.

    Raises:
        ValueError: the images are too small for its convolutions.

    Example:
        >>> article_cnn()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])

    References:
        The basic MNIST example of PyTorch, 2017.
    """
    features: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(input_shape[0], 10, 5),
        "pool1": nn.MaxPool2d(2),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(10, 20, 5),
        "drop2": nn.Dropout2d(),
        "pool2": nn.MaxPool2d(2),
        "relu2": nn.ReLU(),
        "flatten": nn.Flatten(),
    }
    size = _size_of("article_cnn", features, input_shape)
    return _stack(
        **features,
        fc1=nn.Linear(size, 50),
        relu3=nn.ReLU(),
        drop3=nn.Dropout(),
        fc2=nn.Linear(50, classes),
    )


def lenet5(input_shape: InputShape = (1, 32, 32), classes: int = 10) -> nn.Module:
    """LeNet-5 with max pooling and rectified units, on 32 by 32 images: 61,706 parameters.

    As in the tutorial of the hand-written cross-entropy, nothing bends the third convolution.

    Args:
        input_shape: Channels, height and width of an image, at least 32 by 32.
        classes: Number of classes.

    Returns:
        A module from images ``(batch, *input_shape)`` to logits ``(batch, classes)``.

    Raises:
        ValueError: the images are too small for its convolutions.

    Example:
        >>> lenet5()(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 10])

    References:
        LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document
        recognition", 1998.
    """
    features: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(input_shape[0], 6, 5),
        "pool1": nn.MaxPool2d(2),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(6, 16, 5),
        "pool2": nn.MaxPool2d(2),
        "relu2": nn.ReLU(),
        "conv3": nn.Conv2d(16, 120, 5),
        "flatten": nn.Flatten(),
    }
    size = _size_of("lenet5", features, input_shape)
    return _stack(**features, fc1=nn.Linear(size, 84), relu3=nn.ReLU(), fc2=nn.Linear(84, classes))


def fast_cnn(input_shape: InputShape = (1, 28, 28), classes: int = 10) -> nn.Module:
    """A network that learns MNIST to 99 % in one epoch, under the ``fast`` recipe.

    Args:
        input_shape: Channels, height and width of an image, at least 12 by 12.
        classes: Number of classes.

    Returns:
        A module from images ``(batch, *input_shape)`` to logits ``(batch, classes)``.

    Raises:
        ValueError: the images are too small for its convolutions.

    Example:
        >>> fast_cnn()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    features: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(input_shape[0], 24, 5),
        "pool1": nn.MaxPool2d(2),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(24, 32, 3),
        "pool2": nn.MaxPool2d(2),
        "relu2": nn.ReLU(),
        "flatten": nn.Flatten(),
    }
    size = _size_of("fast_cnn", features, input_shape)
    return _stack(
        **features, fc1=nn.Linear(size, 256), relu3=nn.ReLU(), fc2=nn.Linear(256, classes)
    )


def cifar_cnn(input_shape: InputShape = (3, 32, 32), classes: int = 10) -> nn.Module:
    """Three padded 3 by 3 convolutions of 64 with pooling and a hidden layer of 512.

    Args:
        input_shape: Channels, height and width of an image, at least 8 by 8.
        classes: Number of classes.

    Returns:
        A module from images ``(batch, *input_shape)`` to logits ``(batch, classes)``.

    Raises:
        ValueError: the images are too small for its pooling.

    Example:
        >>> cifar_cnn()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    features: dict[str, nn.Module] = {}
    channels = input_shape[0]
    for i in (1, 2, 3):
        features[f"conv{i}"] = nn.Conv2d(channels, 64, 3, padding=1)
        features[f"pool{i}"] = nn.MaxPool2d(2)
        features[f"relu{i}"] = nn.ReLU()
        channels = 64
    features["flatten"] = nn.Flatten()
    size = _size_of("cifar_cnn", features, input_shape)
    return _stack(
        **features, fc1=nn.Linear(size, 512), relu4=nn.ReLU(), fc2=nn.Linear(512, classes)
    )


def _stack(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def _size_of(name: str, features: dict[str, nn.Module], input_shape: InputShape) -> int:
    """Return how many features an image becomes."""
    if len(input_shape) != 3:
        shape = " x ".join(map(str, input_shape))
        raise ValueError(f"{name}: it takes images, and the inputs are of shape {shape}")
    tried = copy.deepcopy(_stack(**features)).eval()  # no running statistics change
    if (size := _features_of(tried, input_shape)) is None:
        shape, channels = "×".join(map(str, input_shape)), input_shape[0]
        least = next(n for n in range(1, 512) if _features_of(tried, (channels, n, n)) is not None)
        raise ValueError(
            f"{name}: images of {shape} are too small for its convolutions, which take "
            f"{least}x{least} and larger"
        )
    return size


def _features_of(layers: nn.Module, input_shape: InputShape) -> int | None:
    """Return how many features an image becomes, None if it is too small."""
    try:
        with torch.no_grad():
            return layers(torch.zeros(1, *input_shape)).shape[1] or None
    except RuntimeError:
        return None
