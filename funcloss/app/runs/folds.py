"""Cross-validation: the same training on folds of the data, and what it says of held-out examples.

On a few hundred examples one split holds out too few to conclude anything from. Here every example
is held out once per repeat, from a model that is trained as the run's own is, on the other folds.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from funcloss._trees import flatten
from funcloss.app import length
from funcloss.app.data import Dataset, Examples, joined, stratified_split, subset
from funcloss.app.data.splits import measured_scale
from funcloss.app.data.streaming import Stream
from funcloss.app.decoding import Count
from funcloss.app.runs.checkpoint import beneath, load_record, save_tensors
from funcloss.app.runs.early import better, make_first_best
from funcloss.app.runs.evaluation import evaluate_examples
from funcloss.app.runs.events import Watcher
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.options import with_costs
from funcloss.app.runs.setup import Setup, setup_on
from funcloss.decisions import Evaluation, Interval, fold_interval, score
from funcloss.errors import ConfigError, RunError
from funcloss.training import fit
from funcloss.typing import Batch

FILE = "folds.safetensors"
OUT_OF_FOLD = "out-of-fold"  # as a split


class DivergedError(RunError):
    """The training on the other folds ended in scores that are not finite."""


@dataclass(frozen=True)
class FoldReport:
    """A fold is trained, and its examples are scored."""

    number: int  # from 1, over all repeats
    folds: int  # of all repeats together
    seconds: float
    epochs: int
    evaluation: Evaluation  # of its examples


@dataclass(frozen=True)
class OutOfFold:
    """The scores of models on examples that they were not trained on."""

    logits: Float[Tensor, "repeats n classes"]
    labels: Int[Tensor, " n"]
    fold: Int[Tensor, "repeats n"]  # that each example was held out in
    amounts: dict[str, Float[Tensor, " n"]]  # costs of each example, as its data set has them

    def evaluation(self, model: TrainedModel, prior: Tensor | None = None) -> Evaluation:
        """Return the evaluation of all of them by the rule of a model."""
        repeats, logits = len(self.logits), self.logits.flatten(0, 1)
        labels = self.labels.repeat(repeats)
        amounts = {name: values.repeat(repeats) for name, values in self.amounts.items()}
        examples = with_costs(model.config, model.costs, Examples(labels, labels, amounts))
        batch = Batch(labels[:0], labels, costs=examples.costs)
        hyper = {name: values.to(logits.device) for name, values in model.hyper.items()}
        loss = float(model.criterion(logits, batch, hyper))
        return score(
            logits, labels, model.rule, prior=prior, loss=loss, repeats=repeats, amounts=amounts
        )

    def over_folds(self, evaluation: Evaluation) -> dict[str, dict[str, list[float]]]:
        """Return expected cost and accuracy by rule, with intervals over the folds.

        Args:
            evaluation: Theirs.

        Returns:
            By name of the rule, the mean over the folds and its interval at 95 %.
        """
        weights, possible = evaluation.weights, evaluation.possible_costs
        return {
            name: {
                "expected_cost": list(self.mean(scores.example_cost, weights, within=possible)),
                "accuracy": list(self.mean(scores.decisions == evaluation.labels, weights)),
            }
            for name, scores in evaluation.rules.items()
        }

    def mean(
        self,
        values: Shaped[Tensor, " repeats*n"],
        weights: Shaped[Tensor, " repeats*n"],
        *,
        within: tuple[float, float] = (0.0, 1.0),
    ) -> Interval:
        """Return the mean over the folds of what holds of each example, with its interval at 95 %.

        Args:
            values: In the order of :meth:`evaluation`.
            weights: Of each example within its fold, in the same order.
            within: Least and largest mean there can be.
        """
        folds = int(self.fold.max()) + 1
        place = (self.fold + folds * torch.arange(len(self.fold))[:, None]).flatten()
        none = torch.zeros(folds * len(self.fold)).double()
        total = none.index_add(0, place, weights.double())
        summed = none.index_add(0, place, weights.double() * values)
        return fold_interval((summed / total).tolist(), folds, within=within)


def folds_of(
    labels: Int[Tensor, " n"], folds: int, repeats: int, seed: int, classes: Sequence[str]
) -> Int[Tensor, "repeats n"]:
    """Return the fold of each example in each repeat, stratified by class, int64 ``(repeats, n)``.

    They are scikit-learn's: ``StratifiedKFold(folds, shuffle=True, random_state=seed + repeat)``.

    Args:
        labels: Class of each example, shape ``(n,)``.
        folds: How many.
        repeats: How often the examples are dealt out anew.
        seed: Of the first repeat.
        classes: Names of the classes, for the error.

    Raises:
        ConfigError: a class has fewer examples than there are folds.

    Example:
        >>> folds_of(torch.tensor([0, 1] * 4), 4, 1, 0, ("a", "b"))[0].bincount()
        tensor([2, 2, 2, 2])
    """
    from sklearn.model_selection import StratifiedKFold

    counts = labels.bincount()
    fewest = int(torch.where(counts > 0, counts, len(labels)).argmin())
    if counts[fewest] < folds:
        raise ConfigError(
            f"folds {folds}: class {classes[fewest]} has {int(counts[fewest])} examples, and each "
            "fold needs one: use fewer folds"
        )
    found = torch.empty(repeats, len(labels), dtype=torch.int64)
    for repeat in range(repeats):
        dealt = StratifiedKFold(folds, shuffle=True, random_state=(seed + repeat) % 2**32)
        for number, (_, held) in enumerate(dealt.split(np.zeros(len(labels)), labels.numpy())):
            found[repeat, torch.from_numpy(held)] = number
    return found


def pooled(dataset: Dataset) -> Examples:
    """Return the examples that are dealt into folds: training, and validation cut from it.

    Raises:
        ConfigError: they are streamed.
    """
    if isinstance(dataset.train.inputs, Stream):
        raise ConfigError("folds needs the data in memory: set stream to off")
    if not dataset.cut:
        return dataset.train
    return joined(dataset.train, dataset.validation)


def make_folds(setup: Setup) -> Int[Tensor, "repeats n"]:
    """Return the fold of each example of a run in each repeat.

    Raises:
        ConfigError: a class is too small for so many folds, or the data is streamed.
    """
    config = setup.config
    labels = pooled(setup.dataset).labels.cpu()
    return folds_of(labels, config.folds, config.repeats, config.seed, setup.dataset.classes)


def cross_validated(setup: Setup, path: Path, watcher: Watcher) -> OutOfFold | None:
    """Train on the folds of a run's data, from where a file is.

    Args:
        setup: The training of the run.
        path: The file, which keeps the scores of every fold that is done.
        watcher: Its callbacks.

    Returns:
        The scores of every example; None if it was told to stop.

    Raises:
        ConfigError: a class is too small for so many folds, or the data is streamed.
        DivergedError: a training diverged.
        RunError: the file cannot be written.
    """
    config, pool = setup.config, pooled(setup.dataset)
    labels = pool.labels.cpu()
    fold = make_folds(setup)
    logits = torch.full((*fold.shape, len(setup.dataset.classes)), torch.nan)
    found, done = OutOfFold(logits, labels, fold, pool.amounts), 0
    if path.exists():
        kept, so_far = read_done(path)
        of_these = kept.fold.equal(fold) and kept.labels.equal(labels)
        alike = kept.logits.shape == logits.shape and kept.amounts.keys() == pool.amounts.keys()
        if of_these and alike:
            found, done = kept, so_far
    total = config.folds * config.repeats
    for number in range(done, total):
        began = time.perf_counter()
        repeat, k = divmod(number, config.folds)
        held = fold[repeat] == k
        own = dataclasses.replace(config, seed=(config.seed + 1 + number) % 2**63)
        made = setup_on(own, _without(setup.dataset, pool, held, config.val_fraction))
        trained = _trained(made, watcher)
        if trained is None:
            return None
        model, epochs = trained
        evaluation = evaluate_examples(model, made.dataset, made.dataset.test)
        if not evaluation.logits.isfinite().all():
            raise DivergedError(f"fold {number + 1} of {total} diverged: lower learning_rate")
        found.logits[repeat, held] = evaluation.logits
        _write(path, found, number + 1)
        seconds = time.perf_counter() - began
        watcher.show(FoldReport(number + 1, total, seconds, epochs, evaluation))
    return found


def read_folds(run_dir: Path) -> OutOfFold:
    """Return the scores that a run keeps of its folds.

    Raises:
        RunError: they cannot be read, or not all folds are done.
    """
    found, _ = read_done(run_dir / FILE)
    if found.logits.isnan().any():
        raise RunError(f"{run_dir} is not finished: not all of its folds are done; resume it")
    return found


def _without(dataset: Dataset, pool: Examples, held: Tensor, val_fraction: float) -> Dataset:
    """Return the data without a fold, which is its test set; validation is cut as for the run."""
    device = pool.labels.device
    rest = (~held).nonzero().squeeze(1)
    train, validation = rest, rest[:0]
    if dataset.cut:
        parts = stratified_split(pool.labels.cpu()[rest], val_fraction)
        train, validation = (rest[part] for part in parts)
    examples = subset(pool, train.to(device))
    mean, std = measured_scale(examples) if dataset.measured else (dataset.mean, dataset.std)
    return dataclasses.replace(
        dataset,
        train=examples,
        validation=subset(pool, validation.to(device)) if dataset.cut else dataset.validation,
        test=subset(pool, held.nonzero().squeeze(1).to(device)),
        mean=mean,
        std=std,
    )


def _trained(setup: Setup, watcher: Watcher) -> tuple[TrainedModel, int] | None:
    """Train in memory, as a run does; return the model, and after how many epochs it was."""
    best, stopped = make_first_best(setup), False

    def should_stop() -> bool:
        nonlocal stopped
        stopped = stopped or watcher.should_stop()
        return stopped

    state = setup.state
    for epoch in fit(
        state,
        lambda state, batch: setup.train_step(state, batch, setup.hyper),
        setup.drawn,
        iter_batches=setup.iter_batches,
        order=setup.order,
        epochs=setup.epochs,
        batch_size=setup.config.batch_size,
        log_every=setup.steps + 1,
        should_stop=should_stop,
    ):
        if stopped:
            return None
        state = epoch.state
        if best is not None:
            found = evaluate_examples(setup.trained(state), setup.dataset, setup.dataset.validation)
            best = better(best, state, found.loss)
            at = int(best.step) // setup.per_epoch
            if length.is_over(epoch.number, at, setup.per_epoch):
                break
    if best is None:
        return setup.trained(state), setup.epochs
    return setup.trained(best), int(best.step) // setup.per_epoch


@dataclass(frozen=True)
class _Header:
    done: Count  # folds


def read_done(path: Path) -> tuple[OutOfFold, int]:
    """Return the scores that a file keeps, and how many folds are done.

    Raises:
        RunError: it cannot be read, or its tensors are not those of folds.
    """
    tensors, header = load_record(path, _Header)
    if missing := [name for name in ("logits", "labels", "fold") if name not in tensors]:
        raise RunError(f"{path} has no {missing[0]}: it is of another program")
    logits, labels, fold = (tensors[name] for name in ("logits", "labels", "fold"))
    amounts = beneath(tensors, "amounts")
    n = len(labels) if labels.dim() == 1 else -1
    fits = logits.dim() == 3 and logits.shape[:2] == fold.shape and fold.shape[1:] == (n,)
    whole = labels.dtype == fold.dtype == torch.int64 and logits.is_floating_point()
    if not (fits and whole and n and all(a.shape == (n,) for a in amounts.values())):
        raise RunError(f"{path} is damaged: its tensors are not of the same examples")
    known = 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[2]
    if not (known and int(fold.min()) >= 0 and int(fold.max()) < n):
        raise RunError(f"{path} is damaged: it has a class or a fold that there is not")
    return OutOfFold(logits, labels, fold, amounts), header.done


def _write(path: Path, found: OutOfFold, done: int) -> None:
    save_tensors(path, flatten(vars(found)), {"done": done})
