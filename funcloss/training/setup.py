"""From a configuration to what trains: device, data, model, objective, optimiser."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcloss import models, optim
from funcloss.config import TrainConfig
from funcloss.data import Dataset, data_folder, load_dataset, moved, resized, take
from funcloss.errors import ConfigError
from funcloss.training.objective import Criterion, make_criterion, supervised
from funcloss.training.step import TrainState, TrainStep, init_state, make_train_step
from funcloss.typing import Hyper, Metrics


class Setup(NamedTuple):
    """All that a training needs, made from a resolved configuration."""

    config: TrainConfig  # nothing left to decide but ``compile``
    dataset: Dataset  # on the device
    model: nn.Module  # in training mode, with its first weights
    criterion: Criterion
    hyper: Hyper
    train_step: TrainStep
    state: TrainState  # before the first step
    per_epoch: int  # steps of an epoch; the last partial batch is left out

    def step_on(self, state: TrainState, index: Tensor) -> tuple[TrainState, Metrics]:
        """Take the step on the training examples at ``index``."""
        batch = take(self.dataset, self.dataset.train, index)
        return self.train_step(state, batch, self.hyper)


def make_setup(config: TrainConfig) -> Setup:
    """Decide what a configuration leaves open and make what it names.

    Args:
        config: What is asked for. A resolved configuration stays as it is.

    Returns:
        Everything for the training. The number of torch's CPU threads is set on the way.

    Raises:
        ConfigError: a device, a class or a size that this machine or data set does not have.
        DataError: the data cannot be had.
    """
    device = resolve_device(config.device)
    if config.amp != "off" and device != "cuda":
        raise ConfigError(f"amp {config.amp} needs device cuda, and here it is {device}")
    if config.threads:
        torch.set_num_threads(config.threads)
    config = config._replace(device=device, data_dir=str(data_folder(config.data_dir).absolute()))
    loaded = load_dataset(config.dataset, config.data_dir, val_fraction=config.val_fraction)
    config, dataset = _resolve(config, loaded)
    dataset = moved(dataset, device)
    if len(dataset.train.labels) < config.batch_size:
        raise ConfigError(
            f"batch_size {config.batch_size} is more than the {len(dataset.train.labels):,} "
            "training examples"
        )
    model = make_model(config, input_shape(dataset), len(dataset.classes)).to(device)
    weighted = bool(config.class_weight)
    criterion = make_criterion(config.loss, config.reduction, weighted=weighted)
    optimizer = make_optimizer(config)
    per_epoch = len(dataset.train.labels) // config.batch_size
    train_step = make_train_step(
        supervised(model, criterion, bfloat16=config.amp == "bf16"),
        optimizer,
        schedule=make_schedule(config, per_epoch),
        clip_norm=config.clip_norm,
    )
    return Setup(
        config=config,
        dataset=dataset,
        model=model,
        criterion=criterion,
        hyper=make_hyper(config, dataset.classes, device),
        train_step=train_step,
        state=init_state(model, optimizer, seed=config.seed),
        per_epoch=per_epoch,
    )


def resolve_device(name: str) -> str:
    """Return the device to use: the one asked for if it is there, the fastest on ``auto``.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``mps``.

    Returns:
        ``cpu``, ``cuda`` or ``mps``.

    Raises:
        ConfigError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return next((device for device, is_there in there.items() if is_there), "cpu")
    if name != "cpu" and not there.get(name, False):
        raise ConfigError(f"device {name} is not on this machine: use cpu, or auto")
    return name


def input_shape(dataset: Dataset) -> models.InputShape:
    """Return channels, height and width of the data set's images."""
    height, width, channels = dataset.test.images.shape[1:]
    return channels, height, width


def make_model(config: TrainConfig, shape: models.InputShape, classes: int) -> nn.Module:
    """Return the network that a configuration names, with weights that hang on its seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            return models.MODELS[config.model](shape, classes)
        except ValueError as error:
            raise ConfigError(f"{error}: use a larger image_size") from None


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """Return the optimiser that a configuration names."""
    if config.optimizer == "sgd":
        return optim.sgd(
            momentum=config.momentum,
            dampening=config.dampening,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
    make = {"adam": optim.adam, "adamw": optim.adamw}[config.optimizer]
    b1, b2 = config.betas
    return make(betas=(b1, b2), eps=config.eps, weight_decay=config.weight_decay)


def make_schedule(config: TrainConfig, per_epoch: int) -> optim.Schedule:
    """Return the schedule that a configuration names, over steps of which an epoch has some."""
    steps = max(config.epochs * per_epoch, 2)
    if config.schedule == "step":
        return optim.step_decay(every=config.decay_every * per_epoch, factor=config.decay_factor)
    if config.schedule == "cosine":
        return optim.cosine(steps=steps)
    if config.schedule == "one-cycle":
        return optim.one_cycle(steps=steps, warmup=config.warmup)
    return optim.constant()


def make_hyper(config: TrainConfig, classes: tuple[str, ...], device: str) -> Hyper:
    """Return what may be swept: ``learning_rate``, and ``class_weights`` if any is given.

    Args:
        config: Its ``class_weight`` by name of the class.
        classes: Names of the classes, in the order of the labels.
        device: Where the tensors go.

    Returns:
        Tensors by name.
    """
    hyper = {"learning_rate": torch.tensor(config.learning_rate, device=device)}
    if config.class_weight:
        weights = [config.class_weight.get(name, 1.0) for name in classes]
        hyper["class_weights"] = torch.tensor(weights, device=device)
    return hyper


def _resolve(config: TrainConfig, dataset: Dataset) -> tuple[TrainConfig, Dataset]:
    """Fill in what only the data can tell, and give the data the size and scale asked for."""
    size = config.image_size or (32 if config.model == "lenet5" else 0)
    if size and dataset.test.images.shape[1:3] != (size, size):
        dataset = resized(dataset, size)
    if config.pixel_mean:
        channels = len(dataset.mean)
        if not len(config.pixel_mean) == len(config.pixel_std) == channels:
            raise ConfigError(f"pixel_mean and pixel_std must have a number a channel: {channels}")
        mean, std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
        dataset = dataset._replace(mean=mean, std=std)
    resolved = config._replace(
        dataset=dataset.name,
        class_weight=_by_name(config.class_weight, dataset.classes),
        threads=torch.get_num_threads(),
    )
    return resolved, dataset


def _by_name(class_weight: dict[str, float], classes: tuple[str, ...]) -> dict[str, float]:
    """Return the weights by name of the class; a key that is no name may be an index."""
    named = {}
    for key, weight in class_weight.items():
        if key not in classes and not (key.isdecimal() and int(key) < len(classes)):
            known = ", ".join(classes)
            raise ConfigError(f"class_weight: no class {key!r}; the classes are {known}")
        name = key if key in classes else classes[int(key)]
        if name in named:
            raise ConfigError(f"class_weight: class {name!r} is given twice")
        named[name] = weight
    if classes and len(named) == len(classes) and not any(named.values()):
        raise ConfigError("class_weight: every class weighs 0, so nothing would be learnt")
    return named
