"""What a training can be asked for: one table of options, read from TOML and the command line.

Nothing here loads torch, so that ``--help`` answers at once.
"""

import dataclasses
import difflib
import math
import os
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from funcloss.app.addresses import final, final_path, is_address, refusal
from funcloss.app.data.names import DATASETS as PUBLISHED
from funcloss.app.data.names import TORCHVISION
from funcloss.app.decoding import read_toml_table
from funcloss.app.length import (
    BATCH_SIZE,
    CONSTANT_RATE,
    EPOCHS,
    FEW,
    LEARNING_RATE,
    MOST_EPOCHS,
    MOST_STEPS,
    PATIENCE,
    STEPS,
)
from funcloss.app.registry import (
    LOSSES,
    MODELS,
    OPTIMIZERS,
    REDUCTIONS,
    ROWS,
    SCHEDULES,
    short_name,
    takers,
)
from funcloss.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """What the table says of one option, beside its type and default."""

    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: bool = False  # low itself is refused
    metavar: str = ""  # how the command line writes a value; empty: as its type says
    example: str = ""
    own: str = ""  # what else than its choices it may name; empty: nothing
    word: str = ""  # of a table: may be given instead, alone or as WORD:NUMBER; empty: nothing
    flag: str = ""  # of a switch that the command line has no opposite of


FORMAT = 2  # of run and sweep folders; config.toml and sweep.toml say theirs under [run]
DATASETS = tuple(PUBLISHED)
_MOST_POWER = 10.0  # of balanced weights
_DATA = ("dataset", "validation_dataset", "test_dataset")
CODE = (*_DATA, "model", "loss")  # the options that may name it


def _of(option: str, meaning: str) -> str:
    """Return the help of an option that some optimisers or schedules alone take."""
    choice, names = takers(option)
    return f"{meaning}." if len(names) == len(ROWS[choice]) else f"{meaning} ({', '.join(names)})."


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training. The defaults reach 98 % on MNIST in under two minutes."""

    dataset: Annotated[
        str,
        Option(
            "Data set. auto: mnist, else mnist-sample; "
            + "; ".join(f"{name}: {row.summary}" for name, row in PUBLISHED.items())
            + ".",
            ("auto", *DATASETS),
            own="torchvision:CIFAR100 and the like; a folder of images, .npz, .safetensors or .csv "
            "of your own; or module:function",
        ),
    ] = "auto"
    target: Annotated[str, Option("Column of the classes, of a table.", metavar="COLUMN")] = ""
    ignore: Annotated[
        tuple[str, ...],
        Option("Column of a table to leave out; repeatable.", metavar="COLUMN"),
    ] = ()
    drop_unlabelled: Annotated[
        bool, Option("Leave out the rows of a table that have no class.")
    ] = False
    class_order: Annotated[
        tuple[str, ...],
        Option("Classes from the lowest to the highest, for ordinal losses.", metavar="A,B,C"),
    ] = ()
    validation_dataset: Annotated[str, Option("Separate validation data.", metavar="PATH")] = ""
    test_dataset: Annotated[str, Option("Separate test data.", metavar="PATH")] = ""
    data_dir: Annotated[
        str, Option("Folder of the data; else $FUNCLOSS_DATA_DIR, else a cache folder.")
    ] = ""
    val_fraction: Annotated[
        float, Option("Fraction of the training set held out for validation.", low=0, high=0.8)
    ] = 0.1
    test_fraction: Annotated[
        float,
        Option(
            "Fraction of your own data held out for the test, if it brings no test split.",
            low=0,
            high=0.8,
            above=True,
        ),
    ] = 0.1
    folds: Annotated[
        int,
        Option(
            "Cross-validate: train once more without each of so many folds of the data, stratified "
            "by class; scores, temperature and thresholds come from the examples held out. No test "
            "split is cut then. 0: off.",
            low=0,
            high=1000,
        ),
    ] = 0
    repeats: Annotated[
        int, Option("How often to cross-validate, with other folds.", low=1, high=1000)
    ] = 1
    imbalance: Annotated[
        float,
        Option(
            "Subsample the training split to a long tail with this ratio of largest to smallest "
            "class; 1: off.",
            low=1,
        ),
    ] = 1.0
    oversample: Annotated[
        float,
        Option(
            "Repeat training examples of rarer classes in each epoch; 0: each example once, 1: all "
            "classes as often as the largest.",
            low=0,
            high=1,
        ),
    ] = 0.0
    image_size: Annotated[
        int,
        Option("Resize images to this height and width; 0: as the model needs.", low=0, high=4096),
    ] = 0
    pixel_mean: Annotated[
        tuple[float, ...], Option("Mean a channel, pixels in 0..1; none: the data set's own.")
    ] = ()
    pixel_std: Annotated[
        tuple[float, ...],
        Option("Standard deviation a channel; none: the data set's own.", low=0, above=True),
    ] = ()
    augment: Annotated[
        str,
        Option(
            "Vary training images at random; light: shift by up to an eighth, turn by up to 10 "
            "degrees; flip: mirror left and right too, not for digits or text.",
            ("off", "light", "flip"),
        ),
    ] = "off"
    stream: Annotated[
        str,
        Option(
            "Read a folder of images as it is needed; auto: where it would fill a quarter of the "
            "memory.",
            ("auto", "on", "off"),
        ),
    ] = "auto"
    workers: Annotated[
        int, Option("Processes that read streamed data ahead; 0: none.", low=0, high=1024)
    ] = 2
    model: Annotated[
        str,
        Option(
            "Network; auto: fast-cnn on images, mlp on what is none or too small.",
            ("auto", *MODELS),
            own="module:factory, or torchvision:resnet18 and the like",
        ),
    ] = "auto"
    init: Annotated[
        str, Option("First weights, a .safetensors file; else drawn.", metavar="FILE")
    ] = ""
    pretrained: Annotated[
        bool,
        Option(
            "Begin from torchvision's own weights (torchvision:NAME), at the image size and scale "
            "that they expect; fetched if they are not there."
        ),
    ] = False
    freeze: Annotated[
        bool, Option("Train the last layer alone; the others stay at their first weights.")
    ] = False
    loss: Annotated[
        str,
        Option("Loss to minimise.", tuple(LOSSES), own="module:function, tried by the laws first"),
    ] = "cross_entropy"
    check: Annotated[bool, Option("Try the laws on a loss of your own first.")] = True
    loss_option: Annotated[
        dict[str, float],
        Option(
            "Option of the loss, NAME=NUMBER, such as gamma=2; repeatable.",
            metavar="NAME=NUMBER",
            example="gamma=2",
        ),
    ] = field(default_factory=dict)
    class_weight: Annotated[
        dict[str, float],
        Option(
            "Weight of a true class in the loss, CLASS=WEIGHT, by name or index; repeatable. Or "
            "balanced: n / (classes * n_c) of n training examples, n_c of the class; balanced:0.5: "
            "that to the power of 0.5.",
            low=0,
            metavar="CLASS=WEIGHT",
            example="9=5",
            word="balanced",
        ),
    ] = field(default_factory=dict)
    reduction: Annotated[
        str, Option("Divide by the examples, or by their class weights.", tuple(REDUCTIONS))
    ] = "mean"
    cost_matrix: Annotated[
        dict[str, dict[str, float]],
        Option(
            "What each decision costs in each true class, a CSV file: rows the truth, columns the "
            "decision, true\\decided in the first cell.",
            metavar="FILE",
        ),
    ] = field(default_factory=dict)
    class_cost: Annotated[
        dict[str, float],
        Option(
            "What every mistake on a true class costs, CLASS=COST, else 1; repeatable.",
            low=0,
            metavar="CLASS=COST",
            example="9=5",
        ),
    ] = field(default_factory=dict)
    cost: Annotated[
        dict[str, float | str],
        Option(
            "Cost of one decision on one true class, over what --cost-matrix or --class-cost say: "
            "a number, or the column of a table (the array of a file) that has that of each "
            "example; repeatable.",
            metavar="TRUE,DECIDED=COST",
            example="9,4=20",
        ),
    ] = field(default_factory=dict)
    prior: Annotated[
        dict[str, float],
        Option(
            "Part of the examples that a class makes up where the model will be used, CLASS=PART; "
            "repeatable.",
            low=0,
            high=1,
            metavar="CLASS=PART",
            example="9=0.01",
        ),
    ] = field(default_factory=dict)
    floor: Annotated[
        dict[str, float],
        Option(
            "Least recall of a class on validation data, or precision:CLASS=PRECISION; repeatable.",
            metavar="CLASS=RECALL",
            example="9=0.99",
        ),
    ] = field(default_factory=dict)
    ceiling: Annotated[
        dict[str, float],
        Option(
            "Largest part of a true class that may be decided as another, or cost=COST, the "
            "expected cost of an example; repeatable.",
            metavar="TRUE:DECIDED=RATE",
            example="9:4=0.01",
        ),
    ] = field(default_factory=dict)
    floor_every: Annotated[
        int,
        Option("Steps between two measurements under floors; 0: five an epoch.", low=0, high=1e9),
    ] = 0
    optimizer: Annotated[str, Option("Optimiser.", tuple(OPTIMIZERS))] = "adam"
    learning_rate: Annotated[
        float,
        Option(
            f"Peak learning rate. If not given: {LEARNING_RATE:g}, and {CONSTANT_RATE:g} if the "
            "schedule is constant.",
            low=0,
            above=True,
        ),
    ] = 0.0
    momentum: Annotated[float, Option(_of("momentum", "Momentum"), low=0, high=0.9999)] = 0.9
    dampening: Annotated[
        float, Option(_of("dampening", "Dampening of the momentum"), low=0, high=1)
    ] = 0.0
    nesterov: Annotated[bool, Option(_of("nesterov", "Nesterov's form of the momentum"))] = False
    betas: Annotated[
        tuple[float, ...],
        Option(_of("betas", "Decays of the running means, two numbers"), low=0, high=0.999999),
    ] = (0.7, 0.9)
    eps: Annotated[float, Option(_of("eps", "Added to the denominator"), low=0)] = 1e-8
    weight_decay: Annotated[float, Option(_of("weight_decay", "Weight decay"), low=0)] = 0.0
    clip_norm: Annotated[float, Option("Clip gradients to this norm; 0: never.", low=0)] = 0.0
    schedule: Annotated[
        str,
        Option(
            "Learning rate over time; auto: one-cycle, and constant where the epochs are auto.",
            ("auto", *SCHEDULES),
        ),
    ] = "auto"
    warmup: Annotated[
        float,
        Option(_of("warmup", "Fraction of the steps that warm up"), low=0, high=0.99, above=True),
    ] = 0.3
    decay_every: Annotated[
        int, Option(_of("decay_every", "Epochs between two decays"), low=1, high=1e6)
    ] = 1
    decay_factor: Annotated[
        float, Option(_of("decay_factor", "Factor of a decay"), low=0, high=1)
    ] = 0.1
    epochs: Annotated[
        int | str,
        Option(
            "Passes over the training set; auto: until the validation loss has not fallen for "
            f"{PATIENCE}, at most {MOST_EPOCHS:,} epochs or {MOST_STEPS:,} steps, and the model of "
            f"the lowest is kept. If not given: {EPOCHS}; for fewer than {FEW:,} training examples "
            f"of other data than {', '.join(DATASETS)}: auto, or about {STEPS:,} steps where auto "
            "cannot be, as in a sweep without folds.",
            ("auto",),
            low=0,
            high=1e6,
        ),
    ] = ""
    batch_size: Annotated[
        int,
        Option(
            f"Batch size; 0: {BATCH_SIZE}; for as few examples as make --epochs auto, the power of "
            f"two nearest to a sixteenth of them, 8 to {BATCH_SIZE}.",
            low=0,
            high=1e9,
        ),
    ] = 0
    seed: Annotated[int, Option("Seed of everything random.", low=0, high=2**63 - 1)] = 0
    device: Annotated[str, Option("Where to train.", ("auto", "cpu", "cuda", "mps"))] = "auto"
    compile: Annotated[
        str, Option("Compile the step (torch.compile); auto: on CUDA only.", ("auto", "on", "off"))
    ] = "auto"
    amp: Annotated[str, Option("Mixed precision, on CUDA.", ("off", "bf16"))] = "off"
    threads: Annotated[int, Option("CPU threads; 0: torch's choice.", low=0, high=1024)] = 0
    log_every: Annotated[int, Option("Steps between two logged losses.", low=1, high=1e9)] = 50
    audit_every: Annotated[
        int, Option("Steps between two audits of the update by class; 0: none.", low=0, high=1e9)
    ] = 100
    ledger: Annotated[
        str,
        Option(
            "Sum up what each class's examples did to each class's held-out loss: of every step, "
            "or of some for a tenth of the time.",
            ("exact", "sampled", "off"),
        ),
    ] = "sampled"
    ledger_layers: Annotated[bool, Option("Keep the sums of the ledger for each layer too.")] = (
        False
    )
    tensorboard: Annotated[bool, Option("Also log for TensorBoard (an extra).")] = False
    # No option: the power of class_weight balanced, of which a setup makes weights; 0: none.
    balance: float = 0.0
    # No option: code that a file named and nobody allowed to import, with the file.
    refused_code: dict[str, str] = field(default_factory=dict)


def option_values(config: TrainConfig) -> dict[str, Any]:
    """Return the options of a configuration by name, without those ignored or not given."""
    left = {name for choice in ROWS for name in _ignored(choice, getattr(config, choice))}
    if config.learning_rate == 0:  # no number that may be given
        left.add("learning_rate")
    return {row.name: getattr(config, row.name) for row in fields() if row.name not in left}


def _ignored(choice: str, chosen: str) -> set[str]:
    """Return the options that some other names of ``choice`` take, and the chosen one does not."""
    rows = ROWS[choice]
    taken = rows[chosen].takes if chosen in rows else ()
    return {name for row in rows.values() for name in row.takes} - set(taken)


class Typed(dict[str, Any]):
    """Options from the command line: an error names them as they were typed."""


class FileOptions(dict[str, Any]):
    """Options that a file names. Code that they name is imported only where that is allowed."""

    def __init__(self, options: Mapping[str, Any], *, place: Path, allow_import: bool) -> None:
        """Hold options.

        Args:
            options: By name, not yet checked.
            place: The file, for errors.
            allow_import: Whether code that it names may be imported.
        """
        super().__init__(options)
        self.place, self.allow_import = place, allow_import


@dataclass(frozen=True)
class Field:
    """One row of a table: a field of a record of options, and its description."""

    name: str
    type: Any
    default: Any
    option: Option


def fields(record: type = TrainConfig) -> tuple[Field, ...]:
    """Return the table of options that the annotated fields of a record make, in their order.

    Example:
        >>> fields()[0].name, fields()[0].default
        ('dataset', 'auto')
    """
    defaults = _defaults(record)
    return tuple(
        Field(name, get_args(hint)[0], defaults[name], get_args(hint)[1])
        for name, hint in get_type_hints(record, include_extras=True).items()
        if get_origin(hint) is Annotated
    )


def _defaults(record: type) -> Mapping[str, Any]:
    return {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in record.__dataclass_fields__.values()
    }


def check_options(options: Any) -> None:
    """Raise ``ConfigError`` if a field of a record is not of the type or range of its row.

    A default needs no check: it may be empty, and stand for what another place decides.
    """
    for row in fields(type(options)):
        value = getattr(options, row.name)
        if value != row.default:
            _checked(row.name, row.type, row.option, value)


def make_config(*layers: Mapping[str, Any]) -> TrainConfig:
    """Check layers of options, each over the one before, and make a configuration of them.

    Args:
        layers: Options by name, as a TOML file has them; a later layer wins. Code is imported if a
            layer names it that is a plain mapping, or of a file that is allowed to.

    Returns:
        The configuration, defaults where no layer says otherwise, and its paths and addresses of
        code final: absolute, the symbolic links in them resolved.

    Raises:
        ConfigError: an option is unknown, of the wrong type, not among its choices or out of range,
            two options clash, or the optimiser or schedule ignores one that is given with it or in
            a later layer (one of an earlier layer is left out, and so is a schedule that does not
            go with a later ``epochs = "auto"``).

    Example:
        >>> make_config({"epochs": 5}, {"epochs": 2}).epochs
        2
    """
    known = {row.name: row for row in fields()}
    values: dict[str, Any] = {}
    origin: dict[str, int] = {}  # the layer that each value is from
    for number, layer in enumerate(layers):
        for name, value in layer.items():
            if name not in known:
                raise ConfigError(f"unknown option {name!r}{did_you_mean(name, list(known))}")
            row = known[name]
            if name == "class_weight":
                value, values["balance"] = _without_word(value)
            values[name] = _checked(name, row.type, row.option, short_name(name, value))
            origin[name] = number
    earlier = origin.get("schedule", math.inf) < origin.get("epochs", -1)
    if values.get("epochs") == "auto" and earlier and _needs_length(values["schedule"]):
        values["schedule"], origin["schedule"] = "auto", origin["epochs"]
    _leave_out_ignored(values, origin, layers)
    config = with_final_names(TrainConfig(**values))
    _check_together(config)
    refused = {
        address: str(layer.place)
        for name, address in code_in(option_values(config)).items()
        if isinstance(layer := layers[origin[name]], FileOptions) and not layer.allow_import
    }
    return replace(config, refused_code=refused)


def gives_word(option: Option, text: str) -> bool:
    """Return whether a text is the word of an option, alone or with a number, and no pair.

    Example:
        >>> option = Option("", word="balanced")
        >>> [gives_word(option, t) for t in ("balanced", "balanced:0.5", "balanced=2", "9=5")]
        [True, True, False, False]
    """
    return bool(option.word) and "=" not in text and text.partition(":")[0] == option.word


def _without_word(value: Any) -> tuple[Any, float]:
    """Return class weights without ``balanced``, and the power that it was given with, else 0."""
    if not isinstance(value, str):
        return value, 0.0
    word, colon, text = value.partition(":")
    try:
        power = float(text) if colon else 1.0
    except ValueError:
        power = math.nan
    if word != "balanced" or not 0.0 < power <= _MOST_POWER:
        raise ConfigError(
            "class_weight must be a table of numbers, balanced or balanced:POWER with a power "
            f"above 0 and at most {_MOST_POWER:g}; got {value!r}"
        )
    return {}, power


def _leave_out_ignored(
    values: dict[str, Any], origin: Mapping[str, int], layers: Sequence[Mapping[str, Any]]
) -> None:
    """Take out the options that a later layer's choice ignores; refuse one given with or after it.

    A recipe may say ``sgd`` with its ``momentum``, and the command line ``adam``.
    """
    for choice in ROWS:
        chosen = values.get(choice, getattr(TrainConfig, choice))
        for name in sorted(_ignored(choice, chosen) & values.keys()):
            if origin[name] >= origin.get(choice, -1):
                says = _as_typed if isinstance(layers[origin[name]], Typed) else str
                takes = " or ".join(takers(name)[1])
                raise ConfigError(
                    f"{says(name)} is an option of {says(choice)} {takes}, and the {choice} is "
                    f"{chosen}: leave {says(name)} out, or use {says(choice)} {takes}"
                )
            del values[name]


def _as_typed(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def with_final_names(config: TrainConfig) -> TrainConfig:
    """Return a configuration whose paths and addresses of code mean the same from any folder.

    Raises:
        ConfigError: one is a path that there cannot be.
    """
    paths = {name: getattr(config, name) for name in _DATA}
    paths = {
        name: value
        for name, value in paths.items()
        if value not in ("", "auto", *DATASETS) and not value.startswith(TORCHVISION)
    }
    named = {
        name: final(text)
        for name, text in (paths | code_in(option_values(config))).items()
        if text not in config.refused_code  # else final, and to stay the text that is refused
    }
    return replace(config, init=config.init and final_path(config.init), **named)


def plain_config(config: TrainConfig) -> TrainConfig:
    """Return the configuration of plain training: cross-entropy, every class at a cost of 1.

    It keeps no ledger: there is no weight to tell of.
    """
    return dataclasses.replace(
        config,
        loss="cross_entropy",
        loss_option={},
        class_weight={},
        balance=0.0,
        reduction="mean",
        floor={},
        ceiling={},
        ledger="off",
    )


def check_code(config: TrainConfig, used: Collection[str] = CODE) -> None:
    """Raise ``ConfigError`` if options name code that is refused, all of it in one message.

    Args:
        config: A configuration.
        used: Those of its options that will be used.
    """
    refused = config.refused_code
    code = code_in(option_values(config)).items()
    named = {name: address for name, address in code if name in used and address in refused}
    if named:
        places = dict.fromkeys(refused[address] for address in named.values())
        raise ConfigError(refusal(" and ".join(places), named))


def read_toml(path: Path, *, allow_import: bool = False) -> FileOptions:
    """Read options from a TOML file; the tables that run and sweep folders add are left out.

    Args:
        path: A TOML file, such as the ``config.toml`` of a run folder.
        allow_import: Whether code that it names may be imported.

    Returns:
        Options by name, not yet checked: a layer of its own for :func:`make_config`.

    Raises:
        ConfigError: the file cannot be read, is not TOML or is of a newer format.
    """
    return read_record(path, allow_import=allow_import)[0]


def read_record(path: Path, *, allow_import: bool = False) -> tuple["FileOptions", dict[str, Any]]:
    """Read options as :func:`read_toml` does, and apart the tables that folders add.

    Args:
        path: The ``config.toml`` of a run folder or the ``sweep.toml`` of a sweep.
        allow_import: Whether code that it names may be imported.

    Returns:
        Options by name, not yet checked; ``run`` and ``sweep``, those that are there.

    Raises:
        ConfigError: the file cannot be read, is not TOML or is of a newer format.
    """
    options = read_toml_table(Path(path), ConfigError)
    tables = {name: options.pop(name) for name in ("run", "sweep") if name in options}
    version = recorded_format(tables)
    if version is not None and version > FORMAT:
        raise ConfigError(
            f"{path} was made by a newer funcloss: format {version}, this one reads {FORMAT}; "
            "update funcloss"
        )
    return FileOptions(options, place=Path(path), allow_import=allow_import), tables


def recorded_format(tables: Mapping[str, Any]) -> int | None:
    """Return the format that a folder says it has, None where it says none.

    Args:
        tables: As :func:`read_record` returns them.

    Example:
        >>> recorded_format({"run": {"version": 1}}), recorded_format({"run": {}})
        (1, None)
    """
    run = tables.get("run")
    version = run.get("version") if isinstance(run, dict) else None
    return version if type(version) is int else None


def recipe_names() -> tuple[str, ...]:
    """Return the names of the recipes that come with the package.

    Example:
        >>> recipe_names()
        ('article', 'fast', 'lenet5-fashion')
    """
    folder = resources.files("funcloss.app") / "recipes"
    return tuple(sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.is_file()))


def read_recipe(name: str) -> dict[str, Any]:
    """Return the options of a recipe.

    Args:
        name: One of :func:`recipe_names`.

    Returns:
        Options by name.

    Raises:
        ConfigError: there is no such recipe.

    Example:
        >>> read_recipe("article")["batch_size"]
        32
    """
    if name not in recipe_names():
        raise ConfigError(
            f"no recipe {name!r}{did_you_mean(name, recipe_names())}; "
            f"there are {', '.join(recipe_names())}"
        )
    text = (resources.files("funcloss.app") / "recipes" / f"{name}.toml").read_text(
        encoding="utf-8"
    )
    return tomllib.loads(text)


def _checked(name: str, kind: Any, option: Option, value: Any) -> Any:
    """Return ``value`` as the type ``kind``, or say what is wrong with it."""
    if get_origin(kind) is tuple:
        inner = get_args(kind)[0]
        if not isinstance(value, list | tuple):
            what = "numbers" if inner is float else "texts"
            raise ConfigError(f"{name} must be a list of {what}, got {value!r}")
        return tuple(_checked(name, inner, option, item) for item in value)
    if get_origin(kind) is dict:
        _, inner = get_args(kind)
        if not isinstance(value, Mapping):
            what = "tables" if get_origin(inner) is dict else "numbers"
            raise ConfigError(f"{name} must be a table of {what}, got {value!r}")
        return {str(k): _checked(f"{name} {k}", inner, option, v) for k, v in value.items()}
    if kind == int | str:
        return value if value in ("", *option.choices) else _number(name, option, value, int)
    if kind in (int, float):
        return _number(name, option, value, kind)
    if kind == float | str:
        return _number(name, option, value, float) if not isinstance(value, str) else value
    if not isinstance(value, kind):
        raise ConfigError(f"{name} must be a {kind.__name__}, got {value!r}")
    if option.choices and value not in option.choices and not (option.own and names_own(value)):
        choices = ", ".join(option.choices)
        guess = did_you_mean(value, option.choices)
        own = f", or {option.own}" if option.own else ""
        raise ConfigError(f"{name} must be one of {choices}{own}; got {value!r}{guess}")
    return value


def names_own(value: str) -> bool:
    """Return whether a text names something of the user's: code, a file or a folder.

    Example:
        >>> names_own("mine:net"), names_own("rows.csv"), names_own("mnits")
        (True, True, False)
    """
    return any(mark in value for mark in ":/.") or (value != "" and os.path.exists(value))


def code_in(options: Mapping[str, Any]) -> dict[str, str]:
    """Return those of some options that name code, which would be imported.

    Args:
        options: Options by name, a configuration's or a TOML file's.

    Returns:
        ``module:name`` by option.

    Example:
        >>> code_in({"model": "torchvision:resnet18", "loss": "mine:loss"})
        {'loss': 'mine:loss'}
    """
    return {
        name: value
        for name in CODE
        if isinstance(value := options.get(name), str)
        and is_address(value)
        and not (name != "loss" and value.startswith(TORCHVISION))
    }


def _number(name: str, option: Option, value: Any, kind: type) -> Any:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind is int and not whole):
        what = "a whole number" if kind is int else "a number"
        what = " or ".join((what, *option.choices))
        raise ConfigError(f"{name} must be {what}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value}")
    low = value > option.low if option.above else value >= option.low
    if not low or value > option.high:
        bounds = [f"{'above' if option.above else 'at least'} {option.low:g}"]
        bounds += [f"at most {option.high:g}"] if option.high < math.inf else []
        raise ConfigError(f"{name} must be {' and '.join(bounds)}, got {value}")
    try:
        return kind(value)
    except OverflowError:
        raise ConfigError(f"{name} must be a number below 1.8e308") from None


def _check_together(config: TrainConfig) -> None:
    if len(config.betas) != 2:
        raise ConfigError(f"betas must be two numbers, got {len(config.betas)}")
    if bool(config.pixel_mean) != bool(config.pixel_std):
        raise ConfigError("pixel_mean and pixel_std must be given together")
    if config.pretrained and not config.model.startswith(TORCHVISION):
        raise ConfigError(
            f"pretrained weights are those of torchvision's models, got model {config.model}: use "
            f"{TORCHVISION}resnet18, or init for a file"
        )
    if config.pretrained and config.init:
        raise ConfigError("pretrained and init both name first weights: leave one of them out")
    random = config.model in ("auto", *MODELS) or config.model.startswith(TORCHVISION)
    if config.freeze and random and not (config.pretrained or config.init):
        raise ConfigError(
            "freeze keeps first weights, and those of this model are random: add pretrained or init"
        )
    if config.nesterov and (not config.momentum or config.dampening):
        raise ConfigError("nesterov needs momentum above 0 and dampening 0")
    weighted = bool(config.class_weight) or config.balance > 0.0
    if config.reduction == "weighted_mean" and not weighted:
        raise ConfigError("reduction weighted_mean needs a class_weight: without one it is mean")
    if config.epochs == "auto":
        _check_stops_early(config)
    if config.folds == 1:
        raise ConfigError("folds must be 2 or more, or 0 for none; got 1")
    if config.repeats > 1 and not config.folds:
        raise ConfigError(f"repeats {config.repeats} is of folds: set folds, to 5 say")
    clash = [n for n in ("floor", "ceiling") if getattr(config, n)]
    clash += ["imbalance"] if config.imbalance != 1 else []
    if config.folds and clash:
        raise ConfigError(f"folds does not go with {clash[0]}: leave one of them out")
    if config.amp != "off" and config.device in ("cpu", "mps"):
        raise ConfigError(f"amp {config.amp} needs device cuda, got {config.device}")


def _check_stops_early(config: TrainConfig) -> None:
    if why := why_not_early(config):
        fix = "use schedule auto" if why.startswith("schedule") else f"leave {why} out"
        raise ConfigError(
            f"epochs auto does not go with {why}, which needs the number of steps beforehand: "
            f"{fix}, or set epochs to a number"
        )


def why_not_early(config: TrainConfig) -> str:
    """Return the option of a configuration that needs to know when the training run will end.

    Example:
        >>> why_not_early(make_config({"schedule": "cosine"})), why_not_early(make_config())
        ('schedule cosine', '')
    """
    if _needs_length(config.schedule):
        return f"schedule {config.schedule}"
    return next((name for name in ("floor", "ceiling") if getattr(config, name)), "")


def _needs_length(schedule: str) -> bool:
    return schedule != "auto" and SCHEDULES[schedule].of_length


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return the end of an error: what a wrong name may have been meant to be, if anything."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
