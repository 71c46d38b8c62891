"""The page and the pictures of an audit: what names cannot do to it, and what its sliders say."""

import json
import math
import re
import shlex
from dataclasses import replace

import pytest
import torch
from audit_examples import make_audit
from browser import PNG, Reader, assert_offline, assert_told, browse, needs_browser
from PIL import Image

from funcloss.app.report import audit_figures as figures
from funcloss.app.report.audit_page import render_page
from funcloss.app.report.pages import About, Axis, log_axis, zero_axis
from funcloss.app.report.run_figures import save_figure

HOSTILE = (
    'it\'s "quoted"',
    "</script><img src=x onerror=alert(1)>",
    "<!-- comment",
    "<b>bold</b> &amp; $x$",
    "العربية",
    "עברית\u202e\u2069",
    "a=b c",
    "\x00\n",
    "http://example.org/a.png",
    "a name that is much too long for a label in a figure",
)


def about(**changes) -> About:
    values = {
        "title": "Audit of a run",
        "model": "article-cnn",
        "parameters": 21_840,
        "loss": "cross_entropy",
        "dataset": "mnist",
        "note": "",
        "split": "train",
        "examples": 240,
        "step": 900,
        "mode": "eval",
        "optimizer": "sgd",
        "scale_invariant": False,
        "command": "funcloss audit runs/<one> & 'two'",
        "versions": {"torch": "2.15"},
        "made": "2026-01-01T00:00:00Z",
    }
    return About(**(values | changes))


def history_of(audit, steps=(0, 100, 200)) -> list[dict]:
    shares, expected = audit.balance.share.tolist(), audit.balance.expected_share.tolist()
    return [
        {"kind": "audit", "step": step, "class": name, "share": share, "expected_share": wanted}
        for step in steps
        for name, share, wanted in zip(audit.classes, shares, expected, strict=True)
    ] + [{"kind": "step", "step": 5, "loss": 1.0}]


NAMES = {
    "2": lambda: make_audit(2, weights={1: 5.0}),
    "10": lambda: make_audit(weights={9: 5.0}),
    "300": lambda: make_audit(300, per_class=6, weights={7: 3.0, 200: 0.2}),
    "hostile": lambda: make_audit(names=HOSTILE, weights={1: 4.0}, absent=(4,)),
    "one batch": lambda: make_audit(batches=1, absent=(0, 3)),
    "no step": lambda: make_audit(step=False),
    "no examples": lambda: make_audit(examples=False),
    "coupled": lambda: make_audit(linear=False, elasticities={"gamma": torch.tensor(0.4)}),
    "matrix": lambda: make_audit(
        elasticities={"cost_matrix": torch.randn(10, 10).double(), "margin": torch.randn(10)}
    ),
    "gradient 0": lambda: (lambda a: replace(a, gram=0 * a.gram, layer_gram=0 * a.layer_gram))(
        make_audit()
    ),
    "norms alike": lambda: (lambda a: replace(a, norm_quantiles=7.3 + 0.01 * a.norm_quantiles))(
        make_audit()
    ),
    "hinge": lambda: (lambda a: replace(a, norm_quantiles=0 * a.norm_quantiles))(make_audit()),
}


@pytest.fixture(params=NAMES.values(), ids=NAMES.keys())
def audit(request):
    return request.param()


def test_a_page_is_well_formed_and_asks_nothing_of_a_network(audit):
    page = render_page(audit, about(), history=history_of(audit), pictures={0: PNG, 3: PNG})
    assert_offline(page)
    (policy,) = (a["content"] for t, a in Reader(page).seen if "http-equiv" in a)
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    )


def test_every_figure_has_its_numbers_in_words(audit):
    reader = Reader(render_page(audit, about(), history=history_of(audit)))
    assert len(reader.figures) >= 4
    assert_told(reader)
    for section in ("words", "shares", "what-if", "conflict", "impact", "norms", "alignment"):
        assert ("section", section) in [(t, a.get("id")) for t, a in reader.seen]


def test_the_sections_come_in_their_order():
    made = NAMES["matrix"]()
    reader = Reader(render_page(made, about(), history=history_of(made)))
    order = (
        *("words", "shares", "what-if", "conflict", "impact", "norms", "alignment", "history"),
        *("examples", "elasticities", "step", "layers", "proof"),
    )
    assert tuple(a["id"] for t, a in reader.seen if t == "section") == order


def test_names_come_out_as_text():
    made = NAMES["hostile"]()
    page = render_page(made, about(), history=history_of(made), pictures={0: PNG})
    reader = Reader(page)
    assert "<img src=x" not in page
    assert "<b>bold" not in page
    assert "<!--" not in page
    assert page.count("</script>") == 2
    for name in (*HOSTILE[:5], HOSTILE[6], HOSTILE[8]):
        assert name in reader.words
    assert "עברית\ufffd\ufffd" in reader.words  # what turns all the text after it is gone
    assert "\x00" not in page
    for tag, attrs in reader.seen:
        assert tag != "img" or attrs["src"].startswith("data:image/png;base64,")
    names = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])["names"]
    assert tuple(names) == HOSTILE
    first = page[page.index('<ul class="answer">') :].partition("</li>")[0]
    assert "<bdi>&lt;/script&gt;" in first


def test_what_describes_the_audit_comes_out_as_text():
    odd = {"title": "<i>t</i>", "dataset": "<i>d</i>", "note": "<i>n</i>", "command": "<i>c</i>"}
    page = render_page(make_audit(3), about(**odd, versions={"<i>v</i>": "<i>1</i>"}, step=None))
    assert "<i>" not in page
    assert page.count("&lt;i&gt;") >= 6


def test_a_page_of_many_classes_is_bounded_and_says_what_it_shows():
    sizes = {}
    for classes in (150, 300, 1000):
        made = make_audit(classes, per_class=6)
        page = render_page(made, about(), history=history_of(made, range(0, 50_000, 100)))
        sizes[classes] = len(page)
        assert f"Of {classes:,} classes this page shows the 24 with the largest shares" in page
    assert max(sizes.values()) < 700_000
    assert sizes[300] < 1.1 * sizes[150]
    assert sizes[1000] < 1.1 * sizes[300]


def test_missing_parts_are_said_to_be_missing():
    bare = make_audit(batches=1, step=False, examples=False, linear=False, absent=(3,))
    page = render_page(bare, about(step=None, optimizer=""))
    for said in (
        "A single batch: no standard errors are known",
        "There are no sliders: this loss couples the examples",
        "Not measured: no step was audited",
        "The examples were not kept one by one",
        "The training was not audited on its way",
        "The step of the optimiser was not audited",
    ):
        assert said in page
    assert 'id="data"' not in page
    assert "nan" not in re.sub(r"<[^>]*>", " ", page).lower().split()


def test_an_audit_tells_failed_checks_and_those_to_be_read():
    made = make_audit()
    failed = replace(made.checks[0], error=1.0)
    page = render_page(replace(made, checks=(failed, *made.checks[1:])), about())
    assert '<span class="bad">failed</span>' in page
    assert "to be read" in page
    assert "passed" in page
    assert "do not trust these numbers" in page


def test_pictures_are_inside():
    made = make_audit(weights={9: 5.0})
    wanted = made.most_opposed(9)[0]
    page = render_page(made, about(), pictures={wanted: PNG})
    images = [a for t, a in Reader(page).seen if t == "img"]
    assert images
    assert {a["alt"] for a in images} == {f"example {wanted} of class 9"}


def test_values_are_placed_on_axes():
    linear = Axis(-1.0, 1.0, (-1.0, 1.0))
    assert [linear.at(v) for v in (-2.0, -1.0, 0.0, 1.0, 5.0, math.nan)] == [0, 0, 50, 100, 100, 0]
    assert Axis(0.1, 10.0, (), log=True).at(1.0) == 50


@pytest.mark.parametrize("low", [3e-9, 0.031, 0.7, 2.0, 6.1, 99.0, 4e7])
@pytest.mark.parametrize("times", [1.0, 1.0001, 1.3, 2.2, 3.9, 4.1, 30.0, 1e4, 1e12])
def test_axes_hold_their_values_and_have_ticks(low, times):
    values = torch.tensor([low, low * times], dtype=torch.float64)
    for axis in (zero_axis(values), log_axis(values)):
        assert axis.low <= low * (1 + 1e-9)
        assert axis.high >= low * times * (1 - 1e-9)
        assert 2 <= len(axis.ticks) <= 24
        assert all(a < b for a, b in zip(axis.ticks, axis.ticks[1:], strict=False))
        assert all(0 <= axis.at(t) <= 100 for t in axis.ticks)


# The page in a browser


def as_printed(text: str, value: float) -> bool:
    """Return whether a number was rounded to the digits in ``text``."""
    if text == "–":
        return not math.isfinite(value)
    shown = float(text.removesuffix(" %"))
    if text.endswith("%"):
        return abs(shown - 100 * value) <= 0.05 + 1e-9
    digit = 10.0 ** (math.floor(math.log10(abs(value))) - 2) if value else 1e-12
    return abs(shown - value) <= 0.5001 * digit


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(
    ("make", "moves"),
    [
        pytest.param(
            lambda: make_audit(weights={9: 5.0}),
            [(9, "range", 1.3), (4, "number", "0.25"), (0, "number", "0"), (0, "number", "-3")],
            id="10",
        ),
        pytest.param(
            lambda: make_audit(
                names=HOSTILE, weights={1: 4.0}, absent=(4,), reduction="weighted_mean"
            ),
            [(0, "range", 1.0), (6, "number", "0.3333333"), (4, "range", 2)],
            id="hostile names, weighted mean",
        ),
        pytest.param(
            lambda: make_audit(
                300,
                per_class=6,
                weights={c: 0.5 + c / 99 for c in range(0, 300, 2)},
                reduction="sum",
            ),
            [(2, "range", 2.0), (20, "number", "40")],
            id="300, sum",
        ),
    ],
)
def test_sliders_agree_with_the_audit(make, moves, tmp_path):
    made = make()
    page = render_page(made, about(), history=history_of(made), pictures={0: PNG})
    seen = browse(page, tmp_path, moves)
    assert seen["errors"] == []
    assert seen["resources"] == []
    width, window = seen["width"]
    assert width <= window == 320

    shown = figures.largest(made)
    weights = made.class_weights.clone()
    states = [weights.clone()]
    for row, kind, value in moves:
        wanted = float(f"{10 ** float(value):.3g}") if kind == "range" else float(value)
        if wanted >= 0:  # what is no weight is not taken
            weights[shown[row]] = wanted
        states.append(weights.clone())
    states.append(made.class_weights)  # reset
    assert len(seen["reads"]) == len(states)
    for read, state in zip(seen["reads"], states, strict=True):
        now = made.reweighted(state)
        gradient = float(now.gradient_norm)
        assert as_printed(read["length"], gradient)
        for c, row in zip(shown, read["rows"], strict=True):
            share, norm = float(now.share[c]), float(now.norm[c])
            assert as_printed(row["share"], share)
            assert as_printed(row["elasticity"], float(now.elasticity[c]))
            assert as_printed(row["norm"], norm)
            if norm > 0:
                assert as_printed(row["whole"], share * gradient / norm)
        given = dict(
            word.rpartition("=")[::2]
            for word in shlex.split(read["paste"])
            if word != "--class-weight" and "=" in word
        )
        asked = {
            made.classes[c]: float(w) for c, w in enumerate(state.tolist()) if abs(w - 1) > 1e-6
        }
        assert given.keys() == asked.keys()
        assert all(math.isclose(float(given[k]), asked[k], rel_tol=1e-5) for k in asked)
    assert seen["reads"][1]["bars"] != seen["reads"][0]["bars"]
    assert seen["reads"][-1] == seen["reads"][0]


@needs_browser
def test_a_page_without_sliders_opens_too(tmp_path):
    bare = make_audit(batches=1, step=False, examples=False, linear=False)
    seen = browse(render_page(bare, about()), tmp_path)
    assert seen["errors"] == []
    assert seen["resources"] == []
    width, window = seen["width"]
    assert width <= window == 320


# The pictures


@pytest.mark.slow
def test_every_figure_is_drawn(audit, tmp_path):
    drawn = figures.draw_all(audit, history_of(audit))
    assert {"audit_share", "audit_conflict", "audit_history", "audit_norms"} <= drawn.keys()
    assert ("audit_impact" in drawn) == bool(audit.impact)
    assert ("audit_examples" in drawn) == (audit.examples is not None)
    assert ("audit_elasticity" in drawn) == ("cost_matrix" in audit.elasticities)
    for figure in drawn.values():
        figure.draw_without_rendering()
    save_figure(drawn["audit_share"], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_many_classes_say_what_they_show():
    title = figures.conflicts(make_audit(300, per_class=4)).axes[0].get_title()
    assert "the 24 largest shares of 300 classes" in title
    assert "largest" not in figures.conflicts(make_audit(10)).axes[0].get_title()


@pytest.mark.slow
def test_figures_of_many_classes_with_long_names_are_bounded(tmp_path):
    names = [f"class {c} " + "x" * 3_000 for c in range(1000)]
    matrices = {"cost_matrix": torch.randn(1000, 1000).double()}
    made = make_audit(1000, per_class=3, names=names, elasticities=matrices)
    drawn = figures.draw_all(made, history_of(made))
    assert len(drawn) == 7
    for name, figure in drawn.items():
        save_figure(figure, tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as image:
            assert max(image.size) < 4_000, name


def test_figures_show_the_numbers():
    made = make_audit(weights={9: 5.0})
    axes = figures.conflicts(made).axes[0]
    shown = torch.as_tensor(axes.images[0].get_array().filled(math.nan))
    torch.testing.assert_close(shown, made.balance.conflict)
    assert axes.images[0].get_clim() == (-1.0, 1.0)
    low, high = figures.impacts(made).axes[0].images[0].get_clim()
    assert low == -high


def test_points_are_spread_over_the_classes_and_always_the_same():
    rows = make_audit(10, per_class=100).examples
    kept = figures.subsample(rows, 200)
    assert torch.equal(kept, figures.subsample(rows, 200))
    assert rows.label[kept].bincount().tolist() == [20] * 10
    assert len(figures.subsample(rows, 10_000)) == 1000
    half = replace(rows, norm=rows.norm.where(rows.label > 4, math.nan))
    assert rows.label[figures.subsample(half, 200)].unique().tolist() == [5, 6, 7, 8, 9]


def test_a_long_history_is_thinned_and_keeps_its_ends():
    made = make_audit(3)
    lines = figures.history_lines(made, history_of(made, range(0, 1000)), most=100)
    assert list(lines) == [0, 1, 2]
    assert len(lines[0]) <= 101
    assert [lines[0][0][0], lines[0][-1][0]] == [0, 999]
