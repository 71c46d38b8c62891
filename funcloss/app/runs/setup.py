"""From a configuration to what trains: device, data, model, objective, optimiser."""

import copy
import dataclasses
import inspect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from funcloss import optim
from funcloss.app import length
from funcloss.app.config import (
    DATASETS,
    TrainConfig,
    check_code,
    why_not_early,
    with_final_names,
)
from funcloss.app.data import (
    Column,
    Dataset,
    InputSchema,
    LoadOptions,
    Stream,
    class_counts,
    data_folder,
    enough_memory,
    get_batch,
    iter_batches,
    load_dataset,
    moved,
    resized,
)
from funcloss.app.registry import MODELS, OPTIMIZERS, SCHEDULES
from funcloss.app.runs.augmentation import augmenting
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.network import (
    first_weights,
    make_model,
    resolve_model,
    try_model,
    with_first_weights,
)
from funcloss.app.runs.options import (
    amounts_of,
    balanced_weights,
    by_name,
    check_loss_options,
    costs_of,
    make_hyper,
    resolved_costs,
    with_costs,
)
from funcloss.app.runs.pretrained import pretrained_form
from funcloss.decisions import Calibration, Costs
from funcloss.errors import ConfigError
from funcloss.objectives import make_forward, supervised
from funcloss.training.evaluation import HasTensors
from funcloss.training.loop import epoch_order, oversampled_counts, oversampled_order
from funcloss.training.step import TrainState, TrainStep, init_state, make_train_step
from funcloss.typing import Batch, Hyper

_THREADS = 64  # that any machine may be asked for
_SHOWN = 20  # class weights that a note lists


@dataclass(frozen=True)
class Setup:
    """All that a training needs, made from a resolved configuration."""

    config: TrainConfig  # nothing left to decide but ``compile``
    dataset: Dataset  # on the device
    model: nn.Module  # in training mode, with its first weights
    hyper: Hyper
    train_step: TrainStep
    state: TrainState  # before the first step
    per_epoch: int  # steps of an epoch; the last partial batch is left out
    untrained: TrainedModel  # with its first weights
    notes: tuple[str, ...] = ()  # what the user should read

    @property
    def epochs(self) -> int:
        """Epochs of the training run; of one that stops early, at most."""
        return length.last_epoch(self.config.epochs, self.per_epoch)

    @property
    def steps(self) -> int:
        """Steps of the training run; of one that stops early, at most."""
        return self.epochs * self.per_epoch

    def iter_batches(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """Yield the training examples at one index after another."""
        return iter_batches(self.dataset, self.dataset.train, indices)

    @property
    def drawn(self) -> int:
        """Examples that an epoch goes through, repeated ones among them."""
        return int(oversampled_counts(self.counts, self.config.oversample).sum())

    def order(self, key: Tensor, epoch: int) -> Tensor:
        """Return the indices of the training examples in an epoch, see :func:`fit`."""
        labels, power = self.dataset.train.labels, self.config.oversample
        if not power:
            return epoch_order(key, epoch, len(labels))
        return oversampled_order(key, epoch, labels, power)

    @property
    def counts(self) -> Tensor:
        """Training examples of each class, on the CPU."""
        return self.untrained.class_counts

    @property
    def costs(self) -> Costs:
        """What decisions cost, which not every loss looks at."""
        return self.untrained.costs

    def trained(self, state: HasTensors, hyper: Hyper | None = None) -> TrainedModel:
        """Return the model with the tensors of a state, and the class weights of ``hyper``."""
        hyper = self.hyper if hyper is None else hyper
        return dataclasses.replace(
            self.untrained,
            config=self.config,
            params=state.params,
            buffers=state.buffers,
            class_weights=hyper.get("class_weights"),
        )


def make_setup(config: TrainConfig, *, early: bool = True) -> Setup:
    """Decide what a configuration leaves open and make what it names.

    Args:
        config: What is asked for. A resolved configuration stays as it is.
        early: Whether the training may be decided to stop early.

    Returns:
        Everything for the training. The number of torch's CPU threads is set on the way.

    Raises:
        ConfigError: a device, a class or a size that this machine or data set does not have, an
            option that the loss does not take, or code that is refused.
        DataError: the data cannot be had.
    """
    check_code(config)
    device = resolve_device(config.device)
    if config.amp != "off" and device != "cuda":
        raise ConfigError(f"amp {config.amp} needs device cuda, and here it is {device}")
    most = max(_THREADS, 4 * (os.cpu_count() or 1))
    if config.threads > most:
        raise ConfigError(
            f"threads {config.threads}: this machine has {os.cpu_count()} processors, on which so "
            f"many threads only wait for each other: use at most {most}"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    config = with_absolute_paths(dataclasses.replace(config, device=device))
    if config.pretrained:
        config = dataclasses.replace(config, image_size=_image_size(config))
    dataset = load_data(config)
    balanced = _balanced(config, dataset)
    with enough_memory(dataset.name):
        config, dataset = _resolve(config, dataset, balanced)
        dataset = moved(dataset, device)
    config, note = _with_length(config, dataset, early=early)
    setup = setup_on(config, dataset)
    notes = (*_in_words(balanced), *setup.notes, *([note] if note else []))
    return dataclasses.replace(setup, notes=notes)


def load_data(
    config: TrainConfig,
    *,
    schema: InputSchema | None = None,
    columns: tuple[Column, ...] = (),
    amounts: tuple[str, ...] | None = None,
) -> Dataset:
    """Return the data set that a configuration names, as it describes it.

    Args:
        config: Its data options; of the others only ``model``, for the size that lenet5 takes, and
            ``cost``.
        schema: As for :func:`funcloss.app.data.load_dataset`.
        columns: The features of a table; empty: all columns that are nothing else.
        amounts: Names of the costs of each example; None: those of ``cost``.

    Raises:
        ConfigError: the request does not fit the data.
        DataError: the data cannot be had.
    """
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    names = [field.name for field in dataclasses.fields(LoadOptions) if field.name in known]
    asked: dict[str, Any] = {name: getattr(config, name) for name in names}
    asked["image_size"] = _image_size(config)
    if config.folds and not config.test_dataset and config.dataset not in ("auto", *DATASETS):
        asked["test_fraction"] = 0.0  # every example is held out once
    asked["columns"] = columns
    asked["amounts"] = amounts_of(config) if amounts is None else amounts
    return load_dataset(LoadOptions(**asked), schema=schema, refused_code=config.refused_code)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return a configuration that means the same from any folder."""
    data_dir = str(data_folder(config.data_dir).absolute())
    return dataclasses.replace(with_final_names(config), data_dir=data_dir)


def setup_on(config: TrainConfig, dataset: Dataset) -> Setup:
    """Make what a resolved configuration names, on data that is there.

    Args:
        config: A resolved configuration, as a setup has it.
        dataset: The data that it names, on its device.

    Returns:
        Everything for the training.

    Raises:
        ConfigError: a size or a cost that does not fit the data, or an option that the loss does
            not take.
    """
    device = config.device
    costs = costs_of(config, dataset.classes)
    counts = class_counts(dataset.train, len(dataset.classes)).cpu()
    check_loss_options(config, costs, counts)
    hyper = make_hyper(config, costs, counts, device)
    splits = {name: with_costs(config, costs, part) for name, part in dataset.splits.items()}
    dataset = dataclasses.replace(dataset, **splits)
    if len(dataset.train.labels) < config.batch_size:
        raise ConfigError(
            f"batch_size {config.batch_size} is more than the {len(dataset.train.labels):,} "
            "training examples: use a smaller one"
        )
    model, note = first_model(config, dataset)
    size = min(config.batch_size, len(dataset.train.labels))
    few = get_batch(dataset, dataset.train, torch.arange(size, device=device))
    try_model(model, config.model, few.inputs, len(dataset.classes))
    optimizer = make_optimizer(config)
    state = init_state(model, optimizer, seed=config.seed)
    network, inputs = copy.deepcopy(model).eval(), dataset.train.inputs
    even = torch.full((len(dataset.classes),), 1 / len(dataset.classes), dtype=torch.float64)
    untrained = TrainedModel(
        model=network,
        forward=make_forward(network),
        params=state.params,
        buffers=state.buffers,
        class_weights=hyper.get("class_weights"),
        config=config,
        classes=dataset.classes,
        class_counts=counts,
        mean=dataset.mean,
        std=dataset.std,
        input_shape=dataset.input_shape,
        columns=dataset.columns,
        images=dataset.has_images,
        dtype=str(inputs.dtype).removeprefix("torch.") if isinstance(inputs, Tensor) else "",
        data=dataset.fingerprint,
        calibration=Calibration(even, even),
    )
    drawn = int(oversampled_counts(counts, config.oversample).sum())
    per_epoch = drawn // config.batch_size
    train_step = make_train_step(
        supervised(model, untrained.criterion, bfloat16=config.amp == "bf16"),
        optimizer,
        schedule=make_schedule(config, per_epoch),
        clip_norm=config.clip_norm,
    )
    train_step = augmenting(train_step, config.augment)
    return Setup(
        config=config,
        dataset=dataset,
        model=model,
        hyper=hyper,
        train_step=train_step,
        state=state,
        per_epoch=per_epoch,
        untrained=untrained,
        notes=tuple(filter(None, (_on_streaming(dataset), _on_sampling(counts, drawn), note))),
    )


def _on_sampling(counts: Tensor, drawn: int) -> str:
    n = int(counts.sum())
    return "" if drawn == n else f"oversampling: an epoch is {drawn:,} draws of {n:,} examples"


def _on_streaming(dataset: Dataset) -> str:
    inputs = dataset.train.inputs
    if not isinstance(inputs, Stream):
        return ""
    ahead = f"{inputs.workers} processes ahead" if inputs.workers else "none ahead"
    return f"{len(inputs):,} training inputs are read as they are needed, {ahead}"


def first_model(config: TrainConfig, dataset: Dataset) -> tuple[nn.Module, str]:
    """Return the network with its first weights on its device, and a note on where they are from.

    Args:
        config: A resolved configuration.
        dataset: The data that it is for.

    Raises:
        ConfigError: the network cannot be made, or the first weights are not of it.
        DataError: the first weights cannot be had.
    """
    model, note = make_model(config, dataset.input_shape, len(dataset.classes)), ""
    tensors, source = first_weights(config, model)
    if source:
        model, note = with_first_weights(model, tensors, source)
    try:
        return model.to(config.device), note
    except (NotImplementedError, RuntimeError) as error:  # without weights, or too large
        raise ConfigError(f"model {config.model} cannot go to {config.device}: {error}") from error


def seeded_state(setup: Setup, seed: int) -> TrainState:
    """Return the state before the first step of a training with another seed.

    Args:
        setup: A training.
        seed: The seed of the model's first weights and of everything that the training draws.

    Returns:
        The state, as :func:`setup_on` makes it for a configuration with that seed.
    """
    config = dataclasses.replace(setup.config, seed=seed)
    model, _ = first_model(config, setup.dataset)
    return init_state(model, make_optimizer(config), seed=seed)


def trial_batch(setup: Setup) -> Batch:
    """Return a batch of training examples from all over the set, which may be sorted by class.

    Args:
        setup: A training, of as many examples as a batch needs.

    Returns:
        The batch, on the device.
    """
    n, size = len(setup.dataset.train.labels), setup.config.batch_size
    index = torch.arange(size, device=setup.config.device) * n // size
    return get_batch(setup.dataset, setup.dataset.train, index)


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


def make_optimizer(config: TrainConfig) -> optim.Optimizer:
    """Return the optimiser that a configuration names."""
    row = OPTIMIZERS[config.optimizer]
    return row.load()(**{option: getattr(config, option) for option in row.takes})


def make_schedule(config: TrainConfig, per_epoch: int) -> optim.Schedule:
    """Return the schedule that a configuration names, over steps of which an epoch has some."""
    make = SCHEDULES[config.schedule].load()
    known = {
        "steps": max(length.last_epoch(config.epochs, per_epoch) * per_epoch, 2),
        "warmup": config.warmup,
        "every": config.decay_every * per_epoch,
        "factor": config.decay_factor,
    }
    return make(**{name: known[name] for name in known.keys() & inspect.signature(make).parameters})


def _balanced(config: TrainConfig, dataset: Dataset) -> dict[str, float]:
    counts = class_counts(dataset.train, len(dataset.classes))
    return balanced_weights(config, dataset.classes, counts)


def _in_words(balanced: dict[str, float]) -> list[str]:
    few = ", ".join(f"{name}={weight:.4g}" for name, weight in [*balanced.items()][:_SHOWN])
    more = f" and {len(balanced) - _SHOWN} more" if len(balanced) > _SHOWN else ""
    return [f"balanced class weights: {few}{more}"] if balanced else []


def _resolve(
    config: TrainConfig, dataset: Dataset, balanced: dict[str, float]
) -> tuple[TrainConfig, Dataset]:
    """Fill in what only the data can tell, and give the data the size and scale asked for."""
    classes = dataset.classes
    if config.augment != "off" and not dataset.has_images:
        raise ConfigError(f"augment is for images, and {dataset.name} has none: leave it out")
    if config.pretrained and dataset.has_images and not config.pixel_mean:
        mean, std = pretrained_form(config.model).of_channels(dataset.input_shape[0])
        config = dataclasses.replace(config, pixel_mean=mean, pixel_std=std)
    resolved = dataclasses.replace(
        resolved_costs(config, classes),
        dataset=dataset.name if config.dataset == "auto" else config.dataset,
        model=resolve_model(config.model, dataset.input_shape),
        class_weight=balanced | by_name("class_weight", config.class_weight, classes),
        balance=0.0,
        threads=torch.get_num_threads(),
    )
    weights = resolved.class_weight.values()
    if len(weights) == len(classes) and not any(weights):
        raise ConfigError("class_weight: every class weighs 0, so nothing would be learnt")
    return resolved, _as_asked(config, dataset)


def _with_length(config: TrainConfig, dataset: Dataset, *, early: bool) -> tuple[TrainConfig, str]:
    """Fill in epochs, batch size and schedule by the number of examples; say what was chosen."""
    n, epochs, batch_size = len(dataset.train.labels), config.epochs, config.batch_size
    few = n < length.FEW and config.dataset not in DATASETS
    batch_size = batch_size or (length.batch_size_for(n) if few else length.BATCH_SIZE)
    fixed = ""  # why it cannot stop early
    if epochs == "" and not few:
        epochs = length.EPOCHS
    elif epochs == "":
        if not early:
            fixed = "in a sweep"
        elif option := why_not_early(config):
            fixed = f"with {option}"
        elif not len(dataset.validation.labels):
            fixed = "without validation data"
        epochs = length.epochs_for(max(n // batch_size, 1)) if fixed else "auto"
    schedule = config.schedule
    if schedule == "auto":
        schedule = "constant" if epochs == "auto" else "one-cycle"
    rate = length.CONSTANT_RATE if schedule == "constant" else length.LEARNING_RATE
    chosen = dataclasses.replace(
        config,
        epochs=epochs,
        batch_size=batch_size,
        schedule=schedule,
        learning_rate=config.learning_rate or rate,
    )
    options = [
        f"{name} {getattr(chosen, name)}"
        for name in ("epochs", "batch_size")
        if getattr(chosen, name) != getattr(config, name)
    ]
    if not (few and options):
        return chosen, ""
    why = f"; about {length.STEPS:,} steps, as there is no early stopping {fixed}" if fixed else ""
    return chosen, f"{' and '.join(options)} for {n:,} training examples{why}"


def _as_asked(config: TrainConfig, dataset: Dataset) -> Dataset:
    """Return the data at the size and scale that a configuration asks for."""
    size = _image_size(config)
    if size and not dataset.has_images:
        what = f"image_size {size}" if config.image_size else f"model {config.model}"
        raise ConfigError(
            f"{what} is for images, and {dataset.name} has none: use the model mlp or linear"
        )
    if size and dataset.input_shape[1:] != (size, size):
        dataset = resized(dataset, size)
    if not config.pixel_mean:
        return dataset
    if not dataset.has_images:
        raise ConfigError(f"pixel_mean and pixel_std are for images, and {dataset.name} has none")
    channels = len(dataset.mean)
    if not len(config.pixel_mean) == len(config.pixel_std) == channels:
        raise ConfigError(f"pixel_mean and pixel_std must have a number a channel: {channels}")
    mean, std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
    return dataclasses.replace(dataset, mean=mean, std=std, measured=False)


def _image_size(config: TrainConfig) -> int:
    if not config.image_size and config.pretrained:
        return pretrained_form(config.model).size
    return config.image_size or (MODELS[config.model].image_size if config.model in MODELS else 0)
