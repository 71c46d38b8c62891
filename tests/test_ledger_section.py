"""The ledger on the page of an audit: what names cannot do to it, and what its cells say."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from audit_examples import make_audit
from browser import Reader, assert_offline, assert_told, browse, needs_browser
from test_audit_page import HOSTILE, about

from funcloss.app.report.audit_page import render_page
from funcloss.app.report.ledger_section import render
from funcloss.audit.ledger import Ledger
from funcloss.audit.ledger_words import certain, signed

EXTRA = ("weight decay", "history", "statistics")


def kept_of(
    count: int = 10, *, weights: dict[int, float] | None = None, error=0.0, epochs=3, **changes
) -> SimpleNamespace:
    """Return a ledger of a run as its folder has it, exact where ``error`` is 0."""
    numbers = torch.Generator().manual_seed(0)
    net = 100 * torch.randn(count, count + 3, generator=numbers, dtype=torch.float64)
    net[:, -2:] = 0.0  # no history, no statistics
    weight = torch.ones(count, dtype=torch.float64)
    for c, w in (weights or {}).items():
        weight[c] = w
    begin, variance = 2.0 + torch.rand(count, generator=numbers).double(), error**2 + 0 * net
    ledger = Ledger(
        raised=net.clamp(min=0.0) + 1,
        lowered=net.clamp(max=0.0) - 1,
        variance=variance,
        variance_of_sum=variance.sum(1),
        begin=begin,
        now=begin + net.sum(1),
        memory={},
        steps=torch.tensor(50),
    )
    names = tuple(f"k{c}" for c in range(count))
    values = {
        "classes": names,
        "weights": weight,
        "exact": not error,
        "ledger": ledger,
        "epochs": torch.arange(1, epochs + 1),
        "nets": torch.stack([net * (e + 1) / epochs for e in range(epochs)] or [net])[:epochs],
        "seconds": 1.5,
        "training_seconds": 20.0,
        "note": "",
        "judged": "held-out",
    }
    values |= changes
    return SimpleNamespace(parts=(*values["classes"], *EXTRA), **values)


def unknown_row() -> SimpleNamespace:
    found = kept_of(weights={9: 5.0})
    for matrix in (found.ledger.raised, found.ledger.begin, found.ledger.now):
        matrix[4] = math.nan
    found.nets[:, 4] = math.nan
    return found


KEPT = {
    "10": lambda: kept_of(weights={9: 5.0}),
    "sampled": lambda: kept_of(weights={9: 5.0, 3: 0.5}, error=40.0),
    "no weights": lambda: kept_of(),
    "1": lambda: kept_of(1),
    "300": lambda: kept_of(300, weights={7: 3.0, 200: 0.2}),
    "300 sampled": lambda: kept_of(300, weights={7: 3.0, 200: 0.2}, error=1.0),
    "hostile": lambda: hostile(),
    "not closed": lambda: (lambda f: kept_of(ledger=f.ledger._replace(now=3 * f.ledger.now)))(
        kept_of()
    ),
    "too few samples": lambda: too_few(),
    "no epochs": lambda: kept_of(weights={9: 5.0}, epochs=0),
    "sums not kept": lambda: kept_of(weights={9: 5.0}, nets=torch.zeros(0, 10, 13)),
    "a thousand epochs": lambda: kept_of(weights={9: 5.0}, epochs=1000),
    "a class without held-out examples": unknown_row,
    "no step": lambda: (lambda f: kept_of(
        ledger=f.ledger._replace(
            raised=0 * f.ledger.raised, lowered=0 * f.ledger.lowered, now=f.ledger.begin,
            steps=torch.tensor(0)),
        note="it begins after step 7 <of> the training"))(kept_of()),
}  # fmt: skip


def too_few() -> SimpleNamespace:
    found = kept_of(weights={9: 5.0}, error=1.0)
    found.ledger = found.ledger._replace(sampling=SimpleNamespace(
        since=torch.tensor(1), samples=torch.tensor(2)))  # fmt: skip
    return found


def hostile() -> SimpleNamespace:
    return kept_of(weights={1: 4.0}, classes=HOSTILE)


@pytest.mark.parametrize("name", KEPT)
def test_the_section_is_well_formed_and_asks_nothing_of_a_network(name):
    found = KEPT[name]()
    section = render(found)
    reader = Reader(section)
    assert_told(reader)
    assert len(section) < 120_000
    assert "nan" not in " ".join(reader.words).lower()
    page = render_page(make_audit(), about(), before=section)
    assert_offline(page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len({*ids})


def rows_of(section: str) -> list[list[str]]:
    """Return the cells of the matrix, with the texts of a cell one after the other."""
    table = section[section.index('<table class="ledger"') : section.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
    return [
        [re.sub(r"<[^>]+>", " ", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", row)]
        for row in rows
    ]


def test_the_matrix_has_the_entries_and_its_rows_add_up():
    found = kept_of(weights={9: 5.0})
    head, *rows = rows_of(render(found))
    assert head[4:] == [*(f"by  k{c}" for c in range(10)), "weight decay"]
    net = found.ledger.net
    for k, row in enumerate(rows):
        assert row[0] == f"k{k}"
        change, *cells = (float(text.replace(",", "")) for text in row[3:])
        assert cells == pytest.approx(net[k, :11].tolist(), abs=0.51)
        assert sum(cells) == pytest.approx(change, abs=6)
        assert float(row[2]) - float(row[1]) == pytest.approx(change, rel=0.01)


@pytest.mark.parametrize("error", [0.0, 60.0])
def test_cells_are_coloured_where_their_sign_is_known(error):
    found = kept_of(weights={9: 5.0}, error=error)
    section = render(found)
    sure = certain(found.ledger, exact=found.exact)[:, :11]
    net = found.ledger.net[:, :11]
    kinds = re.findall(r'<td class="(\w+)" style', section)
    assert kinds.count("harm") == int((sure & (net > 0)).sum())
    assert kinds.count("good") == int((sure & (net < 0)).sum())
    assert (len(kinds) < 110) == bool(error)
    titles = re.findall(r'title="([^"]+)"', section)
    assert len(titles) == 110
    for title in titles:
        assert ("±" in title) == bool(error)
        assert ("raised" in title) != bool(error)
    up, down = float(found.ledger.raised[0, 1]), float(found.ledger.lowered[0, 1])
    if not error:
        assert f"k1 on the loss of k0: raised {signed(up)}, lowered {signed(down)}" in titles


def test_of_many_classes_the_weighted_and_the_largest_are_shown():
    found = kept_of(300, weights={7: 3.0, 200: 0.2})
    head, *rows = rows_of(render(found))
    assert len(rows) == 24
    assert {"k7", "k200"} <= {row[0] for row in rows}
    assert head[-1] == "by 276 more classes"
    for row in rows:
        cells = [float(text.replace(",", "")) for text in row[3:]]
        assert sum(cells[1:]) == pytest.approx(cells[0], abs=15)
    head, *_ = rows_of(render(kept_of(300, weights={7: 3.0}, error=1.0)))
    assert head[-1] == "weight decay"  # the error of the rest is not known


def test_the_course_begins_at_0_and_ends_at_the_sum():
    found = kept_of(weights={9: 5.0})
    section = render(found)
    numbers = section[section.index("<summary>Numbers") :]
    names = re.findall(r"<bdi>k(\d)</bdi> by <bdi>k(\d)</bdi>", numbers)
    assert len(names) == 4
    rows = re.findall(r"<tr><th scope=\"row\">(\d+)</th>(.*?)</tr>", numbers)
    assert [int(epoch) for epoch, _ in rows] == [0, 1, 2, 3]
    for column, (k, c) in enumerate(names):
        line = [float(re.findall(r"<td>(.*?)</td>", row)[column]) for _, row in rows]
        wanted = [n * float(found.ledger.net[int(k), int(c)]) / 3 for n in range(4)]
        assert line == pytest.approx(wanted, rel=0.01)
    sizes = found.ledger.net[:, 9].abs()
    assert {int(k) for k, _ in names} == {*sizes.argsort(descending=True)[:4].tolist()}


def test_of_too_few_samples_nothing_is_shown():
    section = render(too_few())
    assert "<table" not in section
    assert "3 of 50 steps were measured" in section


def test_a_note_is_shown_as_text():
    assert "it begins after step 7 &lt;of&gt; the training" in render(KEPT["no step"]())


@needs_browser
def test_the_section_fits_a_phone_and_runs_without_an_error(tmp_path):
    page = render_page(make_audit(names=HOSTILE), about(), before=render(hostile()))
    seen = browse(page, tmp_path)
    assert seen["errors"] == []
    assert seen["resources"] == []
    assert seen["width"][0] <= seen["width"][1]
