"""The ledger of a run: kept beside its training, for a share of the time, and in its folder."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcloss._json import jsonable
from funcloss._trees import flatten
from funcloss.app.config import TrainConfig
from funcloss.app.data import get_batch
from funcloss.app.report.kept_ledger import KeptLedger
from funcloss.app.runs.augmentation import augmented
from funcloss.app.runs.checkpoint import beneath, load_record, save_tensors
from funcloss.app.runs.events import LedgerReport, Note, Show
from funcloss.app.runs.log import Thinned
from funcloss.app.runs.options import chosen_loss
from funcloss.app.runs.setup import Setup, make_optimizer, make_schedule
from funcloss.audit import Ledger, LossSpec
from funcloss.audit.behind import behind_of
from funcloss.audit.held_out import some_of_each
from funcloss.audit.ledger import exact_keeper, ledger_from, make_course
from funcloss.audit.sampled import sampled_keeper
from funcloss.audit.sampling import Waiting, every_within
from funcloss.audit.training import loss_options
from funcloss.errors import AuditError, ConfigError, RunError
from funcloss.training import TrainState
from funcloss.typing import Batch, Hyper

FILE = "ledger.safetensors"
_SHARE = 0.1  # of the training's time
# Where classes weigh differently or mistakes have costs: seconds that it may always take, and
# trainings so short may take as long again.
_LITTLE, _SHORT = 2.0, 10.0
_HELD_OUT, _LEAST, _MOST = 2_000, 2, 100  # examples in all, and of each class
_LARGEST = 2**30  # bytes of what is remembered for each class
_MATRICES = 100  # classes at most of which the sums after each epoch are kept
_THIRD = 3  # one drawn step in so many tells of its examples too, and stands for the others
_EXAMPLES = 20_000  # training examples at most whose effects are kept
_BESIDE = ("weights", "epochs", "nets", "examples", "labels", "effects")  # beside the ledger
_LOGGED = 20  # classes at most whose sums are a line of metrics.jsonl


@dataclass(frozen=True)
class _Header:
    """The header of the file."""

    classes: tuple[str, ...]
    parts: tuple[str, ...]
    step: int  # of the training that it goes to
    first: int
    seconds: float
    training_seconds: float
    timed: int  # of these
    measured: int  # steps that were measured in full
    fastest: float  # seconds of the fastest of these; 0: none
    sampling_seconds: float  # of the samples
    note: str = ""
    judged_on: str = "validation"


class RunLedger:
    """Keeps the ledger beside a training: every step, or as many as its share of the time allows.

    What goes wrong is said once, and the training goes on without.
    """

    def __init__(self, setup: Setup, show: Show, state: TrainState, run_dir: Path) -> None:
        """Begin at a state, or go on with the ledger that the run folder has up to there."""
        self._setup, self._show, self._note = setup, show, ""
        self._spent = self._trained = 0.0  # seconds of the ledger, and of the steps without it
        self._drawn = 0  # steps that were drawn since the training began or went on
        self._timed = self._measured = 0  # steps that were timed, and that were measured in full
        self._fastest = self._sampling_took = 0.0  # seconds: of a step in full; of all samples
        self._left: float | None = None  # when the last step was done with
        self._sums = Thinned()
        self._effects: dict[int, Tensor] = {}  # of examples of weighted classes, by index
        self._order = -1, torch.zeros(0, dtype=torch.int64)  # of the examples in an epoch
        self._first = int(state.step)
        self._ledger: Ledger | None = None
        begin = time.perf_counter()
        self._tried(lambda: self._make(state, run_dir))
        self._spent += time.perf_counter() - begin

    def _make(self, state: TrainState, run_dir: Path) -> None:
        setup = self._setup
        config, dataset = setup.config, setup.dataset
        if why := _why_not(setup, state):
            raise AuditError(why)
        course = make_course(
            setup.model,
            setup.untrained.criterion,
            make_optimizer(config),
            _judged(setup),
            LossSpec(chosen_loss(config), options=loss_options(setup.hyper)),
            classes=dataset.classes,
            schedule=make_schedule(config, setup.per_epoch),
            clip_norm=config.clip_norm,
        )
        layers, seed = config.ledger_layers, config.seed
        self._exact = exact_keeper(course, by_layer=layers)
        self._sampled = sampled_keeper(course, by_layer=layers, seed=seed)
        self._weighted = class_weights_of(setup) != 1.0
        weighted = bool(self._weighted.any())
        self._behind = behind_of(setup.model, course, seed=seed) if weighted else None
        kept = _read(run_dir / FILE)
        if kept is not None and kept[1].step == int(state.step):
            tensors, header = kept
            self._ledger = _ledger_of(tensors, header, run_dir / FILE, config.device)
            self._spent, self._trained = header.seconds, header.training_seconds
            self._timed, self._measured = header.timed, header.measured
            self._fastest, self._sampling_took = header.fastest, header.sampling_seconds
            self._first, self._note = header.first, header.note
            for number, net in zip(tensors["epochs"].tolist(), tensors["nets"], strict=False):
                self._sums.add((number, net))
            rows = zip(tensors["examples"].tolist(), tensors["effects"], strict=True)
            self._effects = dict(rows)
            return
        if self._first:
            self._note = f"it begins after step {self._first:,} of the training"
        self._ledger = self._exact.init(state)

    def update(self, state: TrainState, batch: Batch, hyper: Hyper, after: TrainState) -> None:
        """Take in a step, after it was taken."""
        ledger = self._ledger
        if ledger is None:
            return
        begin = time.perf_counter()
        if self._left is not None:
            self._trained += begin - self._left
            self._timed += 1

        def take_in() -> None:
            seen = augmented(state, batch, self._setup.config.augment)
            if self._stays_exact(ledger):
                self._ledger = self._exact.update(ledger, state, seen, hyper, after)
                self._measured += 1
                self._look_behind(state, seen, hyper, 1)
                return
            every = self._every(ledger)
            now = self._sampled.update(ledger, state, seen, hyper, after, every)
            self._ledger = now
            if now.sampling is not None and int(now.sampling.chosen) == int(ledger.steps):
                self._drawn += 1
                if self._drawn % _THIRD == 1:
                    self._look_behind(state, seen, hyper, _THIRD * int(now.sampling.every))

        self._tried(take_in)
        self._left = time.perf_counter()
        took = self._left - begin
        self._spent += took
        if ledger.sampling is None:
            self._fastest = min(self._fastest or took, took)
        else:
            self._sampling_took += took

    def _look_behind(self, state: TrainState, batch: Batch, hyper: Hyper, stands_for: int) -> None:
        """Add what each example of a weighted class does in a step to what it did in others."""
        if self._behind is None:
            return
        setup, labels = self._setup, batch.targets.cpu()
        which = self._weighted[labels]
        try:
            found = self._behind(state, batch, hyper, which)
        except (RuntimeError, NotImplementedError):  # without a forward-mode derivative
            self._behind = None
            return
        epoch, place = divmod(int(state.step), setup.per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, setup.order(state.key, epoch).cpu()
        size = setup.config.batch_size
        index = self._order[1][place * size :][: len(labels)].tolist()
        for i, effect in zip(which.nonzero()[:, 0].tolist(), found.T, strict=True):
            more = stands_for * effect
            held = self._effects.get(index[i])
            self._effects[index[i]] = more if held is None else held + more
        if len(self._effects) > _EXAMPLES:
            largest = sorted(self._effects.items(), key=lambda row: -float(row[1].abs().max()))
            self._effects = dict(largest[: _EXAMPLES // 2])

    def epoch(self, number: int, state: TrainState) -> dict[str, Any] | None:
        """Keep the sums after an epoch, and return a line for the log."""
        self._left = None  # what comes until the next step is no step
        begin = time.perf_counter()
        self._tried(lambda: self._judge(state))
        self._spent += time.perf_counter() - begin
        if (ledger := self._ledger) is None:
            return None
        names, config = self._setup.dataset.classes, self._setup.config
        if len(names) <= _MATRICES:
            self._sums.add((number, ledger.net))
        if config.ledger == "exact" or speaks_of_costs(config):
            self._show(
                LedgerReport(
                    number,
                    names,
                    self._exact.parts,
                    ledger,
                    ledger.sampling is None,
                    self._spent,
                    self._trained,
                    class_weights_of(self._setup),
                )
            )
        return {
            "kind": "ledger",
            "exact": ledger.sampling is None,
            "samples": self._samples(ledger),
            "seconds": self._spent,
            "net": jsonable(ledger.net) if len(names) <= _LOGGED else None,
        }

    def save(self, run_dir: Path, step: int, *, finished: bool = False) -> None:
        """Write the ledger beside a checkpoint; of a finished training without what goes on."""
        ledger = self._ledger
        if ledger is None and not self._note:
            return
        tensors: dict[str, Tensor] = {}
        if ledger is not None:
            kept = ledger._asdict()
            if finished:
                kept |= {"memory": {}}
                if ledger.sampling is not None:
                    kept["sampling"] = ledger.sampling._replace(waiting=Waiting.none())
            tensors = flatten({"ledger": {k: v for k, v in kept.items() if v is not None}})
            numbers = [number for number, _ in self._sums.items]
            tensors["weights"] = class_weights_of(self._setup)
            tensors["epochs"] = torch.tensor(numbers, dtype=torch.int64)
            nets = [net for _, net in self._sums.items]
            tensors["nets"] = torch.stack(nets) if nets else ledger.net.new_zeros(0, 0, 0)
            tensors["examples"] = torch.tensor([*self._effects], dtype=torch.int64)
            none = ledger.net.new_zeros(0, len(ledger.begin))
            tensors["effects"] = torch.stack([*self._effects.values()]) if self._effects else none
            held = self._setup.dataset.train.labels.cpu()
            tensors["labels"] = held[tensors["examples"]]
        header = _Header(
            classes=self._setup.dataset.classes,
            parts=() if ledger is None else self._exact.parts,
            step=step,
            first=self._first,
            seconds=self._spent,
            training_seconds=self._trained,
            timed=self._timed,
            measured=self._measured,
            fastest=self._fastest,
            sampling_seconds=self._sampling_took,
            note=self._note,
            judged_on=_split_of(self._setup),
        )
        save_tensors(run_dir / FILE, tensors, dataclasses.asdict(header))

    def _judge(self, state: TrainState) -> None:
        if self._ledger is not None and self._ledger.sampling is not None:
            self._ledger = self._sampled.judge(self._ledger, state)

    def _stays_exact(self, ledger: Ledger) -> bool:
        """Return whether each step is measured, as it was so far."""
        if ledger.sampling is not None:
            return False
        if self._setup.config.ledger == "exact" or not self._timed:
            return True
        if self._timed == 1:  # the first steps are slow on both sides
            return self._fastest <= self._allowed(ledger) / 10
        return self._spent + self._fastest * self._left_of(ledger) <= self._allowed(ledger)

    def _every(self, ledger: Ledger) -> int:
        """Return how long the next block of steps is, one of which is measured."""
        samples = 0 if ledger.sampling is None else int(ledger.sampling.samples)
        cost = self._sampling_took / samples if samples else self._fastest
        return every_within(self._allowed(ledger) - self._spent, cost, self._left_of(ledger))

    def _left_of(self, ledger: Ledger) -> int:
        """Return how many steps are left; of a training that stops early, as many as are done."""
        done = self._first + int(ledger.steps)
        left = max(self._setup.steps - done, 1)
        if self._setup.config.epochs != "auto":
            return left
        return min(left, max(done, 10 * self._setup.per_epoch))

    def _allowed(self, ledger: Ledger) -> float:
        """Return the seconds that the ledger may take of the whole training."""
        step = self._trained / max(self._timed, 1)
        whole = step * (int(ledger.steps) + self._left_of(ledger))
        short = min(max(whole, _LITTLE), _SHORT) if speaks_of_costs(self._setup.config) else 0.0
        return max(_SHARE * whole, short)

    def _samples(self, ledger: Ledger) -> int:
        return self._measured + (0 if ledger.sampling is None else int(ledger.sampling.samples))

    def _tried(self, act: Callable[[], None]) -> None:
        """Do something; if it fails, say so once, and go on without a ledger."""
        try:
            act()
        except (AuditError, ConfigError, RuntimeError, NotImplementedError, TypeError) as error:
            reason = str(error).strip().partition("\n")[0]
            done = "" if self._ledger is None else f" from step {int(self._ledger.steps):,} on"
            self._ledger, self._note = None, f"no ledger is kept{done}: {reason}"
            if self._setup.config.ledger == "exact" or speaks_of_costs(self._setup.config):
                self._show(Note(self._note, warning=True))


def speaks_of_costs(config: TrainConfig) -> bool:
    """Return whether a training was given weights or costs, so that its ledger is shown."""
    return bool(config.class_weight or config.class_cost or config.cost or config.cost_matrix)


def class_weights_of(setup: Setup) -> Tensor:
    """Return the class weights of a training, 1 where it has none, in float64 on the CPU."""
    weights = setup.hyper.get("class_weights")
    return (
        torch.ones(len(setup.dataset.classes)).double()
        if weights is None
        else weights.cpu().double()
    )


def read_ledger(run_dir: Path) -> KeptLedger | None:
    """Return the ledger of a run, as its folder has it; None if it kept none.

    Raises:
        RunError: its file is damaged.
    """
    kept = _read(run_dir / FILE)
    if kept is None or not kept[1].parts:
        return None
    tensors, header = kept
    ledger = _ledger_of(tensors, header, run_dir / FILE)
    samples = header.measured
    if ledger.sampling is not None:
        samples += int(ledger.sampling.samples)
    return KeptLedger(
        header.classes,
        header.parts,
        tensors["weights"],
        ledger.sampling is None,
        ledger,
        tensors["epochs"],
        tensors["nets"],
        header.seconds,
        header.training_seconds,
        samples,
        header.first,
        header.note,
        header.judged_on,
        tensors["examples"],
        tensors["labels"],
        tensors["effects"],
    )


def why_no_ledger(run_dir: Path) -> str:
    """Return why :func:`read_ledger` finds no ledger of a run, in one sentence without its end."""
    kept = _read(run_dir / FILE)
    return kept[1].note if kept is not None else "this run kept no ledger: --ledger off, or a sweep"


def _read(path: Path) -> tuple[dict[str, Tensor], _Header] | None:
    return load_record(path, _Header) if path.exists() else None


def _ledger_of(
    tensors: dict[str, Tensor], header: _Header, path: Path, device: str = "cpu"
) -> Ledger:
    """Return a ledger from the tensors of its file.

    Raises:
        RunError: they are not those of one.
    """
    found = beneath(tensors, "ledger")
    rows, columns = len(header.classes), len(header.parts)
    matrix, row = (rows, columns), (rows,)
    shapes = {
        "raised": matrix, "lowered": matrix, "variance": matrix, "variance_of_sum": row,
        "begin": row, "now": row, "steps": (),
    }  # fmt: skip
    if any(name.startswith("sampling/") for name in found):
        scalars = ("since", "ends", "chosen", "every", "samples")
        shapes |= {f"sampling/{name}": () for name in scalars}
        shapes |= {f"sampling/{name}": matrix for name in ("total", "squares")}
        shapes |= {"sampling/squares_of_sum": row}
        waiting = found.get("sampling/waiting/due", torch.zeros(0)).shape
        shapes |= {f"sampling/waiting/{name}": waiting for name in ("due", "scale", "every")}
    if any(n not in tensors for n in _BESIDE) or len(tensors["weights"]) != rows:
        raise RunError(f"{path} is damaged: it lacks the weights, or the sums after each epoch")
    for name, shape in shapes.items():
        if name not in found or found[name].shape != shape:
            raise RunError(f"{path} is damaged: it has no {name} of shape {shape}")
    return ledger_from(found, device)


def _why_not(setup: Setup, state: TrainState) -> str:
    """Return why a training has no ledger, or nothing if it can have one."""
    config, dataset = setup.config, setup.dataset
    if config.floor or config.ceiling:
        return "class weights that follow constraints are others at each step"
    if dataset.train.costs is not None:
        return f"each example has costs of its own, by which {config.loss} learns"
    if config.amp != "off":
        return f"the training is in {config.amp}, and a ledger in float32 is of another step"
    rows = len(dataset.classes) + 2
    size = rows * sum(p.numel() * p.element_size() for p in state.params.values())
    if config.ledger != "exact" and size > _LARGEST:
        return f"what is remembered for each class takes {size / 2**30:.1f} GiB"
    return ""


def _split_of(setup: Setup) -> str:
    """Return the split whose losses are told: never the test set."""
    return "validation" if len(setup.dataset.validation.labels) else "train"


def _judged(setup: Setup) -> Batch:
    """Return the examples whose losses are told, at most 100 of a class and about 2,000 in all."""
    held = setup.dataset.splits[_split_of(setup)]
    labels = held.labels.cpu()
    most = min(max(_HELD_OUT // len(setup.dataset.classes), _LEAST), _MOST)
    drawn = torch.Generator().manual_seed(0)
    index = some_of_each(labels, len(setup.dataset.classes), most, drawn)
    return get_batch(setup.dataset, held, index.to(held.labels.device))
