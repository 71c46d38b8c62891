"""The ledger on the console: rows that add up, nothing that samples do not tell, 80 columns."""

import io
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from rich.table import Table

from funcloss.app import runs
from funcloss.app.cli.console import TrainingConsole
from funcloss.app.cli.ledger_tables import ledger_table, running_lines
from funcloss.audit.ledger import Ledger

EXTRA = ("weight decay", "history", "statistics")


def ledger_of(classes: int, *, error: float = 0.0, scale: float = 100.0, missing=0.0) -> Ledger:
    numbers = torch.Generator().manual_seed(0)
    net = scale * torch.randn(classes, classes + 3, generator=numbers, dtype=torch.float64)
    begin = torch.full((classes,), 2.5, dtype=torch.float64)
    variance = torch.full_like(net, error**2)
    return Ledger(
        raised=net.clamp(min=0.0),
        lowered=net.clamp(max=0.0),
        variance=variance,
        variance_of_sum=variance.sum(1),
        begin=begin,
        now=begin + net.sum(1) * (1 + missing),
        memory={},
        steps=torch.tensor(50),
    )


def report_of(ledger: Ledger, weights: dict[int, float], **how) -> runs.LedgerReport:
    classes = len(ledger.begin)
    names = how.pop("names", tuple(map(str, range(classes))))
    weight = torch.ones(classes)
    for c, w in weights.items():
        weight[c] = w
    values = {"exact": True, "seconds": 1.0, "training_seconds": 20.0, "epoch": 1}
    return runs.LedgerReport(
        classes=names, parts=(*names, *EXTRA), weights=weight, ledger=ledger, **(values | how)
    )


def kept_of(ledger: Ledger, weights: dict[int, float], *, exact=True, names=None):
    report = report_of(ledger, weights, **({} if names is None else {"names": names}))
    return SimpleNamespace(
        classes=report.classes, parts=report.parts, weights=report.weights, exact=exact,
        ledger=ledger, note="",
    )  # fmt: skip


def text_of(table: Table | None) -> list[str]:
    assert table is not None
    out = Console(file=io.StringIO(), width=400)
    out.print(table)
    return out.file.getvalue().splitlines()


def cells_of(table: Table | None) -> dict[str, list[str]]:
    assert table is not None
    columns = [[*column.cells] for column in table.columns]
    return {row[0]: list(row[1:]) for row in zip(*columns, strict=True)}


@pytest.mark.parametrize("weights", [{}, {9: 5.0}, {9: 5.0, 2: 0.5}, {3: 0.0, 9: 2.0}])
def test_the_rows_of_the_running_table_add_up(weights):
    ledger = ledger_of(10)
    ledger.raised[:, 3] *= weights.get(3, 1.0)  # a class of weight 0 moves nothing
    ledger.lowered[:, 3] *= weights.get(3, 1.0)
    ledger = ledger._replace(now=ledger.begin + ledger.net.sum(1))
    line, table = running_lines(report_of(ledger, weights))
    assert line.startswith("ledger: 1.0 s beside 20.0 s of training; change of")
    cells = cells_of(table)
    due = [c for c in weights if weights[c]]
    assert [*cells] == ["class", "own examples", *(f"class {c}'s weight" for c in due),
                        "all others", "in all"]  # fmt: skip
    values = {name: [float(x.replace(",", "")) for x in row] for name, row in cells.items()}
    net = ledger.net
    for k in range(10):
        parts = [row[k] for name, row in values.items() if name not in ("class", "in all")]
        assert sum(parts) == pytest.approx(float(net[k].sum()), abs=2.0)  # rounded to about 0.5
        assert values["in all"][k] == pytest.approx(float(net[k].sum()), abs=0.5)
        own = float(net[k, k]) / (weights.get(k) or 1.0)  # the rest is due to the weight
        assert values["own examples"][k] == pytest.approx(own, abs=0.5)
        for c in due:
            part = float(net[k, c]) * (1 - 1 / weights[c])
            assert values[f"class {c}'s weight"][k] == pytest.approx(part, abs=0.5)


def test_a_sampled_running_table_shows_what_is_known():
    ledger = ledger_of(10, error=60.0)
    line, table = running_lines(report_of(ledger, {9: 5.0}, exact=False))
    assert line.endswith("(n.s.: not significant)")
    cells, net = cells_of(table), ledger.net
    for k in range(10):
        assert (cells["class 9's weight"][k] == "n.s.") == (abs(float(net[k, 9])) <= 120)
        assert (cells["own examples"][k] == "n.s.") == (abs(float(net[k, k])) <= 120)
        rest = float(net[k].sum() - net[k, k] - (k != 9) * 0.8 * net[k, 9])
        bound = 2 * 60 * (1 + (k != 9) * 0.8)
        assert (cells["all others"][k] == "n.s.") == (abs(rest) <= bound)
        assert cells["in all"][k] != "n.s."


@pytest.mark.parametrize(
    ("ledger", "how", "says"),
    [
        (ledger_of(3, missing=0.5), {}, "the parts do not add up (off by 33%)"),
        (
            ledger_of(3, error=1.0)._replace(sampling=SimpleNamespace(samples=torch.tensor(15))),
            {"exact": False},
            "too few of its steps were drawn so far to tell",
        ),
    ],
)
def test_a_ledger_that_does_not_tell_has_a_line_and_no_table(ledger, how, says):
    line, table = running_lines(report_of(ledger, {0: 2.0}, **how))
    assert says in line
    assert table is None


def test_the_console_shows_the_ledger_of_an_epoch_once_and_not_when_quiet(capsys):
    report = report_of(ledger_of(3), {0: 2.0})
    for quiet in (False, True):
        with TrainingConsole(quiet=quiet) as console:
            console.show(report)
        out = capsys.readouterr().out
        assert out.count("class 0's weight") == (not quiet)
        assert out.count("\n") == (0 if quiet else 6)


NAMES = tuple(f"a very long name of class {c} 長い" for c in range(30))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("names", [None, NAMES])
@pytest.mark.parametrize("classes", [1, 2, 10, 30])
@pytest.mark.parametrize("weights", [{}, {0: 5.0}, {c: 2.0 + c for c in range(9)}])
def test_the_table_fits_a_terminal(weights, classes, names, exact):
    weights = {c: w for c, w in weights.items() if c < classes}
    ledger = ledger_of(classes, error=33.3, scale=1000.0)
    found = kept_of(ledger, weights, exact=exact, names=names and names[:classes])
    lines = text_of(ledger_table(found))
    assert max(map(len, lines)) <= 80
    assert len(lines) == 1 + min(classes, 24)
    assert not any("…" in line for line in lines) or names


def test_the_table_has_what_moved_each_loss():
    ledger = ledger_of(4)
    head, *rows = text_of(ledger_table(kept_of(ledger, {2: 5.0})))
    assert " ".join(head.split()) == "class before after own by 2 (w 5) others in all"
    net = ledger.net
    for k, row in enumerate(rows):
        name, before, after, own, *more = row.replace(",", "").split()
        assert (name, before, after) == (str(k), "2.5", f"{float(ledger.now[k]):.3g}")
        assert float(own) == pytest.approx(float(net[k, k]), abs=0.5)
        parts = [] if k == 2 else [float(net[k, 2])]
        assert [float(x) for x in more[:-2]] == [pytest.approx(p, abs=0.5) for p in parts]
        rest = float(net[k].sum() - net[k, k]) - sum(parts)
        assert [float(x) for x in more[-2:]] == [
            pytest.approx(rest, abs=0.5), pytest.approx(float(net[k].sum()), abs=0.5),
        ]  # fmt: skip
    head, row, *_ = text_of(ledger_table(kept_of(ledger_of(4, error=20), {2: 5.0}, exact=False)))
    assert "others" not in head
    assert row.count("± 20.0") == 2


def test_of_too_few_samples_the_table_has_the_losses_only():
    ledger = ledger_of(4, error=20.0)
    ledger = ledger._replace(sampling=SimpleNamespace(samples=torch.tensor(15)))
    lines = text_of(ledger_table(kept_of(ledger, {2: 5.0}, exact=False)))
    assert lines[0].split() == ["class", "before", "after", "in", "all"]
    assert {len(line.split()) for line in lines[1:]} == {4}


def test_what_is_not_known_is_a_dash():
    ledger = ledger_of(3)
    ledger.raised[1] = ledger.begin[1] = ledger.now[1] = math.nan
    row = text_of(ledger_table(kept_of(ledger, {2: 5.0})))[2]
    assert row.split() == ["1", *"------"]
    _, table = running_lines(report_of(ledger, {2: 5.0}))
    assert {row[1] for name, row in cells_of(table).items() if name != "class"} == {"-"}
