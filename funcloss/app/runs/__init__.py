"""A run: a training with a folder that holds all of it, made, resumed and used."""

from funcloss.app.runs import folder
from funcloss.app.runs.checkpoint import beneath, flatten, load_tensors, restore, save_tensors
from funcloss.app.runs.run import (
    Audited,
    EpochReport,
    Event,
    Note,
    Outcome,
    Started,
    Steered,
    load_checkpoint,
    load_model,
    resume,
    train,
    write_run,
)
from funcloss.app.runs.steering import Model, Steering
from funcloss.app.runs.use import (
    Guess,
    Judgement,
    LoadedRun,
    evaluate_run,
    load,
    predict_files,
    write_judgement,
    write_predictions,
)

__all__ = [
    "Audited",
    "EpochReport",
    "Event",
    "Guess",
    "Judgement",
    "LoadedRun",
    "Model",
    "Note",
    "Outcome",
    "Started",
    "Steered",
    "Steering",
    "beneath",
    "evaluate_run",
    "flatten",
    "folder",
    "load",
    "load_checkpoint",
    "load_model",
    "load_tensors",
    "predict_files",
    "restore",
    "resume",
    "save_tensors",
    "train",
    "write_judgement",
    "write_predictions",
    "write_run",
]
