"""A trained model, and the file that keeps it."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from jaxtyping import Float
from torch import Tensor, nn

from funcloss.app.config import TORCHVISION, TrainConfig
from funcloss.app.data import Column, features_of, normalised
from funcloss.app.data.records import Frame
from funcloss.app.decoding import Count, Number
from funcloss.app.registry import MODELS
from funcloss.app.runs.checkpoint import load_record, save_tensors
from funcloss.app.runs.network import make_model, set_tensors
from funcloss.app.runs.options import costs_of, make_criterion, make_hyper
from funcloss.app.runs.rules import usual_rule
from funcloss.decisions import Calibration, Costs, DecisionRule, Decisions
from funcloss.errors import ConfigError, RunError
from funcloss.objectives import make_forward
from funcloss.objectives.supervised import Criterion, Forward, split_tensors
from funcloss.training.step import preferred_layout
from funcloss.typing import Buffers, Hyper, Params

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Least0 = Annotated[float, msgspec.Meta(ge=0)]
_Pair = tuple[Number, Number]


@dataclass(frozen=True)
class _CalibrationRecord:
    """What :meth:`Calibration.record` makes."""

    implied_prior: tuple[_Positive, ...]
    prior: tuple[_Least0, ...]
    scale: float | tuple[float, ...]
    temperature: _Positive
    fitted_on: str
    examples: Count
    tried: _Positive
    log_score: _Pair
    error: _Pair


@dataclass(frozen=True)
class Header:
    """The header of a model's file."""

    step: Count
    classes: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    class_weights: tuple[_Least0, ...] | None
    class_counts: tuple[_Least0, ...]
    mean: tuple[float, ...]
    std: tuple[_Positive, ...]
    input_shape: tuple[Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)], ...]
    columns: tuple[Column, ...]
    images: bool
    dtype: str
    data: str
    calibration: _CalibrationRecord

    def __post_init__(self) -> None:
        """Hold the lengths against each other."""
        per_class = {
            "class_weights": self.class_weights,
            "class_counts": self.class_counts,
            "calibration.implied_prior": self.calibration.implied_prior,
            "calibration.prior": self.calibration.prior,
            "calibration.scale": self.calibration.scale,
        }
        for name, values in per_class.items():
            if isinstance(values, tuple) and len(values) != len(self.classes):
                raise ValueError(f"{len(self.classes)} classes, and {len(values)} {name}")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class is named twice")
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} numbers of mean, and {len(self.std)} of std")
        if self.images and len(self.input_shape) != 3:
            raise ValueError(f"images must have channels, height, width; got {self.input_shape}")
        features = sum(len(column.features) for column in self.columns)
        if self.columns and self.input_shape != (features,):
            raise ValueError(f"{features} features for inputs of shape {self.input_shape}")
        if self.mean and self.images and len(self.mean) != self.input_shape[0]:
            raise ValueError(f"{len(self.mean)} numbers of mean, of {self.input_shape[0]} channels")


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, and what is needed to use it and to judge it."""

    model: nn.Module  # in evaluation mode; ``forward`` is what runs it on the tensors below
    forward: Forward
    params: Params
    buffers: Buffers
    class_weights: Float[Tensor, " classes"] | None  # of the last step; None: none
    config: TrainConfig
    classes: tuple[str, ...]
    class_counts: Float[Tensor, " classes"]  # training examples of each class, on the CPU
    mean: Float[Tensor, " channels"]  # pixels in 0..1; empty: inputs go to the model as they are
    std: Float[Tensor, " channels"]
    input_shape: tuple[int, ...]  # channels, height, width of an image
    columns: tuple[Column, ...]  # of a table
    images: bool  # whether the inputs are images
    dtype: str  # of the inputs, ``uint8`` say; empty: not known
    data: str  # fingerprint of the data that it was trained on
    calibration: Calibration  # what makes probabilities of its scores

    @functools.cached_property
    def costs(self) -> Costs:
        """What decisions cost."""
        return costs_of(self.config, self.classes)

    @functools.cached_property
    def rule(self) -> DecisionRule:
        """How decisions of minimum expected cost are made of its scores."""
        return self.calibration.rule(self.costs)

    def decide(
        self,
        inputs: Tensor | Frame,
        *,
        amounts: Mapping[str, Tensor] | None = None,
        by: str = "",
    ) -> Decisions:
        """Return the decisions on examples, with their probabilities and expected costs.

        Args:
            inputs: As the data set has them, neither scaled nor moved: images ``(n, height, width,
                channels)``, uint8 or in 0..1; of a table a ``pandas.DataFrame`` with its columns,
                or the features ``(n, features)``; else what the model takes.
            amounts: Costs of each example by name, where the run's costs name some.
            by: ``min-cost`` or ``argmax``; empty: the first if the run was given costs.

        Raises:
            ConfigError: a column is missing.
            DataError: a cell is not what its column holds.
            ValueError: there is no such rule, or an amount is missing.

        Example:
            >>> import funcloss
            >>> run = funcloss.load("runs/loans")  # doctest: +SKIP
            >>> run.decide(torch.tensor([[5000.0, 24.0]])).names  # doctest: +SKIP
            ['refuse']
        """
        if not isinstance(inputs, Tensor):
            inputs = features_of(inputs, self.columns)
        with torch.no_grad():
            pieces = [normalised(x, self.mean, self.std) for x in inputs.split(1024)]
            logits = [self.forward(self.params, self.buffers, x.to(self.device))[0] for x in pieces]
        each = self.costs.of_examples(amounts or {}) if self.costs.amounts else None
        return self.rule.decisions(torch.cat(logits), each, by=by or usual_rule(self.config))

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.params.values())).device

    @property
    def hyper(self) -> Hyper:
        """What the loss was given at the last step."""
        hyper = make_hyper(self.config, self.costs, self.class_counts, self.device)
        hyper.pop("class_weights", None)
        if self.class_weights is not None:
            hyper["class_weights"] = self.class_weights.to(self.device)
        return hyper

    @property
    def criterion(self) -> Criterion:
        """The loss that it was trained with, reduced."""
        weighted = self.class_weights is not None
        config = self.config
        return make_criterion(
            config.loss, config.reduction, weighted=weighted, refused=config.refused_code
        )


def save_model(path: Path, model: TrainedModel, *, step: int) -> None:
    """Write a model's tensors and what they are of, whole or not at all.

    Args:
        path: The safetensors file to make or replace.
        model: The model.
        step: Steps that it was trained for.

    Raises:
        RunError: the file cannot be written; what was there is as it was.
    """
    weights = model.class_weights
    header = {
        "step": step,
        "model": model.config.model,
        "classes": model.classes,
        "class_weights": None if weights is None else weights.tolist(),
        "class_counts": model.class_counts.tolist(),
        "mean": model.mean.tolist(),
        "std": model.std.tolist(),
        "input_shape": model.input_shape,
        "columns": [dataclasses.asdict(column) for column in model.columns],
        "images": model.images,
        "dtype": model.dtype,
        "data": model.data,
        "calibration": model.calibration.record(),
    }
    save_tensors(path, model.params | model.buffers, header)


def load_model(path: Path, config: TrainConfig, *, device: str = "cpu") -> TrainedModel:
    """Read what :func:`save_model` wrote.

    Args:
        path: The safetensors file.
        config: The training's, for the network, the loss and the costs.
        device: Where the tensors go.

    Returns:
        The model.

    Raises:
        RunError: the file cannot be read, or is of another model.
    """
    tensors, header = load_record(path, Header)
    classes, shape = header.classes, header.input_shape
    other = f"{path} is of another model than its folder's {config.model}"
    _check_size(config, header, tensors, other)
    model = make_model(config, shape, len(classes))
    try:
        misshapen = set_tensors(model, tensors)
    except ConfigError as error:
        raise RunError(f"{other}: {error}") from None
    if misshapen:
        raise RunError(f"{other}: the shape of its {misshapen[0]} differs")
    if spoilt := [name for name, t in tensors.items() if t.isnan().any()]:
        raise RunError(f"{path}: its {spoilt[0]} is not a number: train the run again")
    model = model.eval().to(device)
    params, buffers = (
        {name: preferred_layout(t.detach()) for name, t in named.items()}
        for named in split_tensors(model)
    )
    scale = torch.float64 if header.dtype == "float64" else torch.float32
    return TrainedModel(
        model=model,
        forward=make_forward(model),
        params=params,
        buffers=buffers,
        class_weights=weights_of(header),
        config=config,
        classes=classes,
        class_counts=torch.tensor(header.class_counts, dtype=torch.float32),
        mean=torch.tensor(header.mean, dtype=scale),
        std=torch.tensor(header.std, dtype=scale),
        input_shape=shape,
        columns=header.columns,
        images=header.images,
        dtype=header.dtype,
        data=header.data,
        calibration=Calibration.of_record(dataclasses.asdict(header.calibration)),
    )


def weights_of(header: Header) -> Tensor | None:
    """Return the class weights of a model's header."""
    weights = header.class_weights
    return None if weights is None else torch.tensor(weights, dtype=torch.float32)


def _check_size(config: TrainConfig, header: Header, tensors: Params, other: str) -> None:
    """Raise ``RunError`` if a header's shapes make another model, before it takes any memory."""
    if config.model not in MODELS and not config.model.startswith(TORCHVISION):
        return  # code of the user's, which may need real tensors
    try:
        with torch.device("meta"):
            model = make_model(config, header.input_shape, len(header.classes))
    except (ConfigError, RuntimeError, OverflowError) as error:
        raise RunError(f"{other}: {str(error).splitlines()[0]}") from None
    for name, tensor in model.state_dict().items():
        if name in tensors and tensors[name].shape != tensor.shape:
            raise RunError(f"{other}: the shape of its {name} differs")
