"""The options of the commands that use a run: a record each, checked when it is made.

Nothing here loads torch, so that ``--help`` answers at once.
"""

from dataclasses import dataclass, field
from typing import Annotated

from funcloss.app.config import DATASETS, Option, check_options, fields

ALLOW_IMPORT = Option(
    "Import the code of yours that the folder or file names, and run it.", flag="--allow-import"
)
_TRAINING = {row.name: row.option for row in fields()}
_DATA_DIR = Option("Folder of the data; else that of the run.")


class _Checked:
    """A record that refuses, with ``ConfigError``, what its table does not allow."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class EvaluateOptions(_Checked):
    """Which data a run's model is evaluated on, and by which costs; empty: those of the run.

    Of other data of your own that comes in one part, the split ``test`` is all of it. The split
    ``train`` is as long-tailed as it was trained on, where the data set is the run's own.
    """

    dataset: Annotated[
        str,
        Option(
            "Data set, or a path to your own; else the one trained on.",
            DATASETS,
            own="torchvision:NAME, or a path",
        ),
    ] = ""
    split: Annotated[
        str,
        Option(
            "Split to evaluate; of a run with folds that has no test split, test is out-of-fold.",
            ("test", "validation", "train", "out-of-fold"),
        ),
    ] = "test"
    cost_matrix: Annotated[dict[str, dict[str, float]], _TRAINING["cost_matrix"]] = field(
        default_factory=dict
    )
    class_cost: Annotated[dict[str, float], _TRAINING["class_cost"]] = field(default_factory=dict)
    cost: Annotated[dict[str, float | str], _TRAINING["cost"]] = field(default_factory=dict)
    prior: Annotated[dict[str, float], _TRAINING["prior"]] = field(default_factory=dict)
    data_dir: Annotated[str, _DATA_DIR] = ""
    device: Annotated[str, Option("Where to run.", _TRAINING["device"].choices)] = "auto"
    allow_import: Annotated[bool, ALLOW_IMPORT] = False


@dataclass(frozen=True)
class AuditOptions(_Checked):
    """What of a run or of a saved model is audited, and how."""

    split: Annotated[
        str, Option("Split of the data to audit.", ("train", "validation", "test"))
    ] = "train"
    examples: Annotated[int, Option("Examples of it, at most.", low=2)] = 10_000
    evaluation_mode: Annotated[
        bool, Option("Audit in evaluation mode, without dropout.", flag="--eval")
    ] = False
    method: Annotated[
        str, Option("How to measure.", ("auto", "layers", "examples", "backward"))
    ] = "auto"
    memory: Annotated[
        float, Option("MiB that intermediate results may take, beside the model.", low=1)
    ] = 2048.0
    data_dir: Annotated[str, _DATA_DIR] = ""
    device: Annotated[str, Option("Where to measure.", _TRAINING["device"].choices)] = "auto"
    allow_import: Annotated[bool, ALLOW_IMPORT] = False


@dataclass(frozen=True)
class CheckOptions(_Checked):
    """How the laws are tried on a loss."""

    task: Annotated[
        str,
        Option(
            "Task type; determines the generated test inputs; else inferred from the names of the "
            "loss's parameters.",
            ("classification", "binary", "regression", "embedding"),
        ),
    ] = ""
    classes: Annotated[int, Option("Number of classes.", low=2, high=1000)] = 10
    class_weight: Annotated[
        dict[str, float],
        Option(
            "Weight that a true class is meant to have, by index; repeatable.",
            metavar="CLASS=WEIGHT",
            example="9=2",
        ),
    ] = field(default_factory=dict)
    batch_size: Annotated[
        int,
        Option("Size of the random batches that show the weights' effect.", low=2, high=4096),
    ] = 32
    inductor: Annotated[
        bool, Option("Try the default compiler too, which takes longer.", flag="--inductor")
    ] = False
