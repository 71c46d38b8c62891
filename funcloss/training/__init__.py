"""Training: the stateless step, the loop around it, and the run folder that keeps it all."""

from funcloss.training import folder
from funcloss.training.checkpoint import beneath, flatten, load_tensors, restore, save_tensors
from funcloss.training.compilation import Compiled, prepare
from funcloss.training.evaluation import Evaluation, confusion_matrix, evaluate
from funcloss.training.loop import Epoch, Progress, epoch_order, fit
from funcloss.training.objective import (
    make_forward,
    mean_of,
    sum_of,
    supervised,
    weighted_mean_of,
)
from funcloss.training.run import (
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
from funcloss.training.steering import Model, Steering
from funcloss.training.step import TrainState, init_state, make_train_step
from funcloss.training.use import (
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
    "Compiled",
    "Epoch",
    "EpochReport",
    "Evaluation",
    "Event",
    "Guess",
    "Judgement",
    "LoadedRun",
    "Model",
    "Note",
    "Outcome",
    "Progress",
    "Started",
    "Steered",
    "Steering",
    "TrainState",
    "beneath",
    "confusion_matrix",
    "epoch_order",
    "evaluate",
    "evaluate_run",
    "fit",
    "flatten",
    "folder",
    "init_state",
    "load",
    "load_checkpoint",
    "load_model",
    "load_tensors",
    "make_forward",
    "make_train_step",
    "mean_of",
    "predict_files",
    "prepare",
    "restore",
    "resume",
    "save_tensors",
    "sum_of",
    "supervised",
    "train",
    "weighted_mean_of",
    "write_judgement",
    "write_predictions",
    "write_run",
]
