"""A run: a training with a folder that holds all of it, made, resumed and used."""

from funcloss.app.runs import folder
from funcloss.app.runs.checkpoint import beneath, load_tensors, restore, save_tensors
from funcloss.app.runs.events import (
    Audited,
    Constrained,
    EpochReport,
    Event,
    LedgerReport,
    Note,
    Started,
    Watcher,
)
from funcloss.app.runs.export import ExportReport, export_run
from funcloss.app.runs.folds import FoldReport, OutOfFold, read_folds
from funcloss.app.runs.ledger import KeptLedger, read_ledger
from funcloss.app.runs.lifecycle import Outcome, kept_model, load_checkpoint, run, write_run
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.use import (
    EvaluationReport,
    Predictions,
    evaluate_run,
    load,
    predict_files,
    write_decisions,
    write_evaluated,
    write_evaluation,
)

__all__ = [
    "Audited",
    "Constrained",
    "EpochReport",
    "EvaluationReport",
    "Event",
    "ExportReport",
    "FoldReport",
    "KeptLedger",
    "LedgerReport",
    "Note",
    "OutOfFold",
    "Outcome",
    "Predictions",
    "Started",
    "TrainedModel",
    "Watcher",
    "beneath",
    "evaluate_run",
    "export_run",
    "folder",
    "kept_model",
    "load",
    "load_checkpoint",
    "load_tensors",
    "predict_files",
    "read_folds",
    "read_ledger",
    "restore",
    "run",
    "save_tensors",
    "write_decisions",
    "write_evaluated",
    "write_evaluation",
    "write_run",
]
