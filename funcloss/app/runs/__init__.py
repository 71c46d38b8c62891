"""A run: a training with a folder that holds all of it, made, resumed and used."""

from funcloss.app.runs import folder
from funcloss.app.runs.checkpoint import beneath, load_tensors, restore, save_tensors
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.run import (
    Audited,
    EpochReport,
    Event,
    Note,
    Outcome,
    Started,
    Steered,
    kept_model,
    load_checkpoint,
    resume,
    train,
    write_run,
)
from funcloss.app.runs.steering import Steering
from funcloss.app.runs.use import (
    EvaluationReport,
    Prediction,
    evaluate_run,
    load,
    predict_files,
    write_evaluation,
    write_predictions,
)

__all__ = [
    "Audited",
    "EpochReport",
    "Event",
    "EvaluationReport",
    "Note",
    "Outcome",
    "Prediction",
    "Started",
    "Steered",
    "Steering",
    "TrainedModel",
    "beneath",
    "evaluate_run",
    "folder",
    "load",
    "kept_model",
    "load_checkpoint",
    "load_tensors",
    "predict_files",
    "restore",
    "resume",
    "save_tensors",
    "train",
    "write_evaluation",
    "write_predictions",
    "write_run",
]
