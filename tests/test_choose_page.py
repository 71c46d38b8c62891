"""The page and the picture of a choice: what names cannot do to it, and that its numbers hold."""

import math
import re
from dataclasses import replace

import pytest
from audit_examples import make_audit
from browser import (
    PNG,
    Reader,
    assert_offline,
    assert_told,
    browse,
    needs_browser,
    photograph,
    run_browser,
)
from PIL import Image
from test_audit_page import HOSTILE, about

from funcloss.app.report import choice_figures as figures
from funcloss.app.report.audit_page import render_page
from funcloss.app.report.choice import Ascent, Choice, Constraint, Point, Row
from funcloss.app.report.choice_page import render_choice, render_choice_page
from funcloss.app.report.run_figures import save_figure
from funcloss.decisions import Interval

AXIS = "class_weight 9"
WEIGHTS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def score(value: float, half: float = math.nan) -> Interval:
    return Interval(value, value - half, value + half)


def make_points(seeds: int = 3, axis: str = AXIS) -> tuple[Point, ...]:
    """Return a sweep in which more weight finds more of the class, and more false alarms."""
    half = 0.002 if seeds > 1 else math.nan
    points = []
    for weight in WEIGHTS:
        gain = math.log(weight)
        points.append(
            Point(
                name=f"{axis}={weight:g}",
                values={axis: weight},
                accuracy=score(0.9812 - 0.0011 * (gain - 0.6) ** 2, half),
                expected_cost=score(0.061 + 0.007 * (gain - 1.7) ** 2, 3 * half),
                rule_cost=score(0.049 + 0.001 * (gain - 1.2) ** 2, 3 * half),
                recall=(
                    score(0.9995 - 0.0285 * math.exp(-0.8 * gain), 2 * half),
                    score(0.97 - 0.004 * gain),
                ),
                plain=weight == 1.0,
                chosen=weight == 5.0,
                feasible=weight >= 5.0,
                seeds=seeds,
                diverged=int(weight == 50.0),
            )
        )
    return tuple(points)


ROWS = (
    Row("plain, argmax", score(0.9801, 0.0027), score(0.0912, 0.011), score(0.101, 0.012),
        (score(0.9683, 0.0105), score(0.9705, 0.01)), None),
    Row("plain, minimum expected cost", score(0.9772, 0.0029), score(0.0671, 0.009),
        score(0.0742, 0.01), (score(0.9881, 0.007), score(0.9613, 0.01)), score(-0.0241, 0.0077)),
    Row("chosen, argmax", score(0.9783, 0.0028), score(0.0701, 0.009), score(0.0775, 0.01),
        (score(0.9871, 0.007), score(0.9634, 0.01)), score(-0.0211, 0.0083)),
    Row("chosen, minimum expected cost", score(0.9755, 0.003), score(0.0689, 0.01),
        score(0.0762, 0.011), (score(0.9901, 0.006), score(0.9574, 0.011)),
        score(-0.0223, 0.0091)),
)  # fmt: skip
GRADIENT = {
    **{str(c): 0.0004 * math.sin(3.0 * c) for c in range(9)},
    "4": 0.00163,
    "9": -0.00314,
}
SWEEP = Choice(
    title="Choosing the weight of class 9",
    lines=(
        "Weight 5 on class 9: recall of 9 rises from 97.10 % to 99.16 %, for 0.11 points.",
        "On the test set it saves 0.0211 an example against plain (0.0128 to 0.0294): "
        "more than chance explains.",
        "Deciding by least expected cost saves as much without any training: 0.0241.",
    ),
    costs=("calling a true 9 anything else costs 10", "every other mistake costs 1"),
    focus=("9", "4"),
    axes=(AXIS,),
    points=make_points(),
    constraints=(Constraint("recall of 9 at least 0.99", 0.99, 0.9916, True),),
    ascent=(),
    rows=ROWS,
    gradient=GRADIENT,
    gradient_steps=5,
    seeds=3,
)


def make_ascent(names: tuple[str, ...] = ("9", "4"), steps: int = 40) -> tuple[Ascent, ...]:
    made = []
    for k in range(steps):
        rise = 1 - math.exp(-k / 9)
        first = 0.962 + 0.031 * rise
        made.append(
            Ascent(
                step=25 * k,
                weights={names[0]: 1 + 14 * rise, names[1]: 1 + 2.5 * rise} if k else {},
                reached=(first, 0.035 - 0.02 * rise),
                accuracy=0.95 + 0.03 * rise,
                feasible=first >= 0.99,
            )
        )
    return tuple(made)


FLOORS = replace(
    SWEEP,
    title="Training under floors",
    axes=(),
    points=tuple(
        replace(make_points(1)[k], name=name, values={}, chosen=name != "plain")
        for k, name in ((1, "plain"), (3, "under floors"))
    ),
    constraints=(
        *SWEEP.constraints,
        Constraint("4 called a 9 at most 0.01", 0.01, 0.0151, False),
    ),
    ascent=make_ascent(),
    gradient={},
    seeds=1,
)


AUDIT = make_audit(weights={9: 5.0})
PLAIN_PAGE = render_page(AUDIT, about())
EMPTY = replace(SWEEP,
    lines=(), costs=(), focus=(), axes=(), points=(), constraints=(), rows=(), gradient={},
    gradient_steps=0, seeds=0,
)  # fmt: skip


def lost(point: Point) -> Point:
    nan = Interval(math.nan)
    recall = tuple(nan for _ in point.recall)
    return replace(
        point, accuracy=nan, expected_cost=nan, rule_cost=nan, recall=recall, diverged=point.seeds
    )


def alike(point: Point) -> Point:
    return replace(point,
        accuracy=Interval(0.98), expected_cost=Interval(0.05), rule_cost=Interval(0.05),
        recall=(Interval(1.0), Interval(0.0)),
    )  # fmt: skip


def renamed(choice: Choice, names: tuple[str, str]) -> Choice:
    """Return a choice whose classes have other names, wherever they are told."""
    first, second = names
    axis = f"class_weight {first}"
    return replace(
        choice,
        title=f"Choosing the weight of {first}",
        lines=(f"Weight 5 on \u2068{first}\u2069 is the one.", f"Not so {second}."),
        costs=(f"calling a true {first} a {second} costs 10",),
        focus=names,
        axes=(axis,) * bool(choice.axes),
        points=make_points(axis=axis),
        constraints=(Constraint(f"recall of {first} at least 0.99", 0.99, 0.9916, True),),
        ascent=tuple(replace(row, reached=row.reached[:1]) for row in make_ascent(names)),
        rows=(*ROWS, replace(ROWS[-1], name=f"floor on {first}")),
        gradient={first: -0.003, second: 0.001},
    )


CHOICES = {
    "sweep": SWEEP,
    "floors": FLOORS,
    "empty": EMPTY,
    "one seed": replace(SWEEP, points=make_points(1), seeds=1),
    "one point": replace(SWEEP, points=SWEEP.points[:1]),
    "all diverged": replace(SWEEP, points=tuple(map(lost, SWEEP.points))),
    "some diverged": replace(SWEEP, points=(lost(SWEEP.points[0]), *SWEEP.points[1:])),
    "all alike": replace(SWEEP, points=tuple(map(alike, make_points(1)))),
    "no focus": replace(SWEEP,
        focus=(), points=tuple(replace(p, recall=()) for p in SWEEP.points), constraints=(),
        rows=tuple(replace(r, recall=()) for r in ROWS),
    ),
    "two axes": replace(SWEEP,
        axes=(AXIS, "gamma"),
        points=tuple(
            replace(p,
                name=f"{p.name}, gamma={g}", values=p.values | {"gamma": g},
                plain=p.plain and not g, chosen=p.chosen and not g,
            )
            for p in SWEEP.points
            for g in (0.0, 2.0)
        ),
    ),
    "many points": replace(SWEEP,
        points=tuple(
            replace(p, name=f"{p.name} {k}", chosen=p.chosen and k == 69, plain=p.plain and k == 0)
            for k in range(70)
            for p in SWEEP.points
        )
    ),
    "tiny costs": replace(SWEEP,
        points=tuple(
            replace(p, expected_cost=Interval(1.234e-5 * k), rule_cost=Interval(1.2345e-5))
            for k, p in enumerate(SWEEP.points, 1)
        ),
        rows=tuple(replace(r, difference=Interval(-1.23e-5, -2.34e-5, -1.12e-6)) for r in ROWS),
        gradient={"9": -1.234e-5, "4": 1.11e-6},
    ),
    "weights of 0": replace(FLOORS,
        ascent=tuple(replace(row, weights={"9": 0.0}) for row in make_ascent()),
    ),
    "nothing reached": replace(FLOORS,
        ascent=tuple(replace(row, reached=(math.nan,) * 2, weights={}) for row in make_ascent()),
    ),
    "many classes": replace(FLOORS,
        gradient={f"class {c}": math.cos(c) for c in range(300)},
        ascent=tuple(
            replace(row, weights={f"class {c}": 1 + c / 9 for c in range(300)})
            for row in make_ascent(steps=900)
        ),
    ),
    "slopes of 0": replace(SWEEP, gradient={"9": 0.0, "4": math.nan}),
    "markup": renamed(SWEEP, HOSTILE[1:3]),
    "right to left": renamed(FLOORS, HOSTILE[4:6]),
    "long": renamed(SWEEP, ("x" * 1000, "long words " * 100)),
    "odd characters": renamed(FLOORS, (HOSTILE[7], "\ud800 \u2067 $x$")),
}  # fmt: skip


@pytest.fixture(params=CHOICES.values(), ids=CHOICES.keys())
def choice(request):
    return request.param


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Reader(page).words))


def sections(page: str) -> list[str]:
    return [a["id"] for t, a in Reader(page).seen if t == "section"]


def tables(page: str, section: str) -> dict[str, list[list[list[float]]]]:
    """Return the numbers in the tables of a section: by caption, rows of cells of numbers."""
    part = page[page.index(f'<section id="{section}"') :].partition("</section>")[0]
    found = {}
    for caption, body in re.findall(r"<caption[^>]*>(.*?)</caption>(.*?)</table>", part, re.S):
        rows = re.findall(r"<tr[^>]*>(.*?)</tr>", body.partition("<tbody>")[2], re.S)
        cells = [re.findall(r"<td[^>]*>(.*?)</td>", row, re.S) for row in rows]
        found[caption] = [
            [
                [float(n) for n in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", re.sub("<[^>]+>", " ", c))]
                for c in row
                if "<svg" not in c
            ]
            for row in cells
        ]
    return found


def ends(score: Interval, times: float = 1.0) -> list[float]:
    return [times * v for v in score if math.isfinite(v)]


def near(shown: list[list[float]], wanted: list[list[float]]) -> None:
    """Check cells of numbers: those of two decimals, or of three digits."""
    assert len(shown) == len(wanted)
    for cell, values in zip(shown, wanted, strict=True):
        assert cell == pytest.approx(values, rel=5.01e-3, abs=5.01e-3 if max(values) > 1 else 1e-9)


# The page


@pytest.mark.parametrize("audit", [AUDIT, None], ids=["audited", "alone"])
@pytest.mark.parametrize("name", ["sweep", "empty"])
def test_the_page_of_an_audit_keeps_its_scripts_and_no_other_has_any(name, audit):
    page = render_choice_page(CHOICES[name], audit, about(), pictures={0: PNG})
    Reader(page)
    assert page.count("<script") == (2 if audit else 0)


def test_a_page_is_well_formed_and_asks_nothing_of_a_network(choice):
    page = render_choice_page(choice, None, about())
    assert_offline(page)
    assert not {"nan", "inf", "none"} & set(re.findall(r"\w+", words_of(render_choice(choice))))
    assert not re.search(r'(x|y|x1|cx|width|style|d)="[^"]*(nan|inf|None)', page)


def test_every_figure_has_its_numbers_in_words(choice):
    reader = Reader(str(render_choice(choice)))
    assert_told(reader)
    ids = [a["id"] for _, a in reader.seen if "id" in a]
    assert len(set(ids)) == len(ids)
    assert not set(ids) & set(re.findall(r' id="([^"]+)"', PLAIN_PAGE))


def test_the_sections_stand_before_those_of_the_audit():
    page = render_choice_page(SWEEP, AUDIT, about())
    own = ["choice", "costs", "constraints", "frontier", "test", "gradient"]
    assert sections(page) == own + sections(PLAIN_PAGE)
    audit_alone = PLAIN_PAGE[PLAIN_PAGE.index('<section id="words"') :]
    assert page.endswith(audit_alone)
    assert "<h1>Audit of a run</h1>" in page
    assert f"<h2>{SWEEP.title}</h2>" in page
    assert f"<h2>{SWEEP.title}</h2>" not in render_choice_page(
        SWEEP, None, about(title=SWEEP.title)
    )


def test_a_page_without_an_audit_tells_how_it_was_made():
    page = render_choice_page(FLOORS, None, about())
    assert sections(page) == [
        "choice",
        "costs",
        "constraints",
        "frontier",
        "ascent",
        "test",
        "made",
    ]
    assert "The chosen model was not audited" in page
    assert "funcloss audit runs/&lt;one&gt; &amp; &#39;two&#39;" in page


@pytest.mark.parametrize(
    ("part", "section"),
    [
        ({"costs": ()}, "costs"),
        ({"constraints": ()}, "constraints"),
        ({"points": ()}, "frontier"),
        ({"ascent": ()}, "ascent"),
        ({"ascent": FLOORS.ascent[:1]}, "ascent"),
        ({"rows": ()}, "test"),
        ({"gradient": {}}, "gradient"),
        ({"gradient": {"9": math.nan}}, "gradient"),
    ],
)
def test_what_is_not_there_is_left_out(part, section):
    whole = replace(FLOORS, gradient=GRADIENT)
    assert section in sections(str(render_choice(whole)))
    left = sections(str(render_choice(replace(whole, **part))))
    assert left == [s for s in sections(str(render_choice(whole))) if s != section]


def test_an_empty_choice_is_an_empty_answer():
    assert sections(str(render_choice(EMPTY))) == ["choice"]


@pytest.mark.parametrize(
    ("name", "drawn", "said"),
    [
        ("sweep", True, "95 % intervals from seed to seed, 3 seeds"),
        ("one seed", True, "One seed: how much another would differ is not known"),
        ("one point", False, "What was trained"),
        ("all diverged", False, "The training of 7 of 7 trials diverged"),
        ("some diverged", True, "The training of 1 of 7 trials diverged"),
        ("no focus", False, "What was trained"),
        ("all alike", True, "Accuracy against recall of 9"),
        ("many points", True, "400 of 490 trials"),
    ],
)
def test_the_frontier_is_drawn_where_it_can_be(name, drawn, said):
    page = str(render_choice(CHOICES[name]))
    assert ("choice-frontier-t" in page) == drawn
    assert said in words_of(page)


@pytest.mark.parametrize(("name", "spread"), [("sweep", True), ("one seed", False)])
def test_intervals_are_drawn_where_they_are_known(name, spread):
    page = str(render_choice(replace(CHOICES[name], rows=())))
    for mark in ('class="cross"', 'class="whisker"', "<small>"):
        assert (mark in page) == spread


def test_a_page_of_many_classes_is_bounded_and_says_what_it_draws():
    sizes = {}
    for classes in (20, 300, 1000):
        weights = {f"class {c}": 1 + c / 9 for c in range(classes)}
        ascent = tuple(replace(row, weights=weights) for row in make_ascent(steps=900))
        slopes = {f"class {c}": math.cos(c) for c in range(classes)}
        page = str(render_choice(replace(FLOORS, gradient=slopes, ascent=ascent)))
        sizes[classes] = len(page)
        said = words_of(page)
        assert ("those not drawn stay at 1" in said) == (classes == 20)
        assert ("the 24 that end furthest from 1, of 1,000 that moved" in said) == (classes == 1000)
        assert page.count('class="line c') == min(classes, 24) + len(FLOORS.constraints)
    assert sizes[1000] < 1.1 * sizes[300]


def test_names_come_out_as_text():
    first, second = HOSTILE[1:3]
    page = render_choice_page(CHOICES["markup"], None, about())
    assert "<img" not in page
    assert "<!--" not in page
    assert "<script" not in page
    reader = Reader(page)
    assert {first, second} <= set(reader.words)
    assert "<li>Weight 5 on <bdi>&lt;/script&gt;" in page

    page = render_choice_page(CHOICES["right to left"], None, about())
    assert "\u202e" not in page
    assert f"<bdi>{HOSTILE[4]}</bdi>" in page
    odd = render_choice_page(CHOICES["odd characters"], None, about())
    assert not re.search("[\x00\u2067\u2068\u2069]", odd)
    odd.encode("utf-8")


def test_isolates_that_do_not_pair_make_no_elements():
    page = str(render_choice(replace(SWEEP, lines=("\u2069a\u2068b \u2068c\u2069 d\u2069",))))
    assert "<li>\ufffda\ufffdb <bdi>c</bdi> d\ufffd</li>" in page


# The numbers


def test_the_numbers_are_those_of_the_choice():
    page = str(render_choice(SWEEP))
    shown = tables(page, "frontier")["All trials, on validation data"]
    for cells, point in zip(shown, SWEEP.points, strict=True):
        scores = [ends(point.accuracy, 100), *(ends(r, 100) for r in point.recall)]
        near(cells[:-2], [[*point.values.values()], *scores, ends(point.expected_cost),
                          ends(point.rule_cost)])  # fmt: skip
        assert cells[-1] == [point.diverged, point.seeds]
    for cells, point in zip(
        tables(page, "frontier")["Expected cost of each trial"], SWEEP.points, strict=True
    ):
        near(cells, [[point.expected_cost.value], [point.rule_cost.value]])
    for cells, row in zip(tables(page, "test")["Scores on the test set"], ROWS, strict=True):
        scores = [ends(row.accuracy, 100), *(ends(r, 100) for r in row.recall)]
        near(cells, [*scores, ends(row.expected_cost), ends(row.normalised_cost)])
    (differences,) = (v for k, v in tables(page, "test").items() if k.startswith("Difference"))
    near([row[0] for row in differences], [ends(row.difference) for row in ROWS[1:]])
    (slopes,) = tables(page, "gradient").values()
    near([row[0] for row in slopes], [[value] for value in GRADIENT.values()])
    (constraints,) = tables(page, "constraints").values()
    assert constraints == [[[0.99], [0.9916], [0.0016]]]


def test_the_ascent_is_told_in_numbers_too():
    page = str(render_choice(FLOORS))
    shown = tables(page, "ascent")["The training under floors"]
    kept = [row for k, row in enumerate(FLOORS.ascent) if k % 2 == 0 or k == 39]
    for cells, row in zip(shown, kept, strict=True):
        weights = [[row.weights.get(name, 1.0)] for name in ("9", "4")]
        near(cells[:-1], [*weights, *([v] for v in row.reached), [100 * row.accuracy]])
    assert page.count("missed") > page.count("held") > 1


def test_marks_lie_where_the_ticks_say():
    page = str(render_choice(SWEEP))
    part = page[page.index('aria-labelledby="choice-frontier-t') :].partition("</section>")[0]

    def scale(kind: str, side: str):
        found = re.findall(rf'class="{kind}" style="{side}:([\d.]+)%">([\d.]+)<', part)
        (at, value), (far, last) = ([float(v) for v in pair] for pair in (found[0], found[-1]))
        return lambda x: value + (x - at) * (last - value) / (far - at)

    across, up = scale("xt", "left"), scale("yt", "bottom")
    marks = re.findall(
        r'<(rect|circle) class="dot([^"]*)" style="(\w+):([^"]*)" c?x="([\d.]+)%" c?y="([\d.]+)%"'
        r".*?<title>(.*?)</title>",
        part,
    )
    by_name = {point.name: point for point in SWEEP.points}
    assert {m[-1] for m in marks} == set(by_name)
    for shape, breaks, paint, colour, x, y, name in marks:
        point = by_name[name]
        assert across(float(x)) == pytest.approx(100 * point.accuracy.value, abs=1e-3)
        assert up(100 - float(y)) == pytest.approx(100 * point.recall[0].value, abs=1e-3)
        assert (shape == "rect") == point.plain
        assert (" breaks" in breaks) == (paint == "stroke") == (point.feasible is False)
        cheaper = point.expected_cost.value < SWEEP.points[1].expected_cost.value
        assert ("--c2" in colour, "--c1" in colour) == (
            (False, False) if point.plain else (cheaper, not cheaper)
        )
    (ring,) = re.findall(r'class="ring" cx="([\d.]+)%"', part)
    assert across(float(ring)) == pytest.approx(100 * SWEEP.points[3].accuracy.value, abs=1e-3)
    (floor,) = re.findall(r'class="bound" x1="0" x2="100%" y1="([\d.]+)%"', part)
    assert up(100 - float(floor)) == pytest.approx(99.0, abs=1e-3)
    lines = re.findall(r'class="join" x1="([\d.]+)%"', part)
    swept = [100 * point.accuracy.value for point in SWEEP.points]
    assert [across(float(x)) for x in lines] == pytest.approx(swept[:-1], abs=1e-3)


def test_the_legend_tells_what_the_colours_cost():
    page = str(render_choice(SWEEP))
    legend = re.findall(r'class="swatch (c\d)"></span> ([^<]+)<', page)
    costs = [point.expected_cost.value for point in SWEEP.points]
    assert [key for key, _ in legend] == ["c2", "c0", "c1"]
    shown = [float(text.removesuffix(" (plain)")) for _, text in legend]
    assert shown == pytest.approx([min(costs), costs[1], max(costs)], rel=5e-3)
    assert legend[1][1].endswith("(plain)")
    without = tuple(replace(point, plain=False) for point in SWEEP.points)
    assert "(plain)" not in str(render_choice(replace(SWEEP, points=without)))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("recall of 9 at least 0.99", "bound"),
        ("accuracy at least 0.97", "bound"),
        ("recall of 4 at least 0.9", ""),
        ("precision of 9 at least 0.9", ""),
        ("recall of 99 at least 0.9", ""),
    ],
)
def test_only_limits_on_what_is_drawn_are_drawn(text, line):
    page = str(render_choice(replace(SWEEP, constraints=(Constraint(text, 0.97, 0.98, True),))))
    assert ('<line class="bound"' in page) == bool(line)


# The page in a browser

SHOWN = ["sweep", "tiny costs", "floors", "long", "right to left", "many points", "many classes"]


@needs_browser
@pytest.mark.parametrize("name", SHOWN)
def test_a_page_fits_a_phone_without_errors(name, tmp_path):
    audit = AUDIT if name == "sweep" else None
    seen = browse(render_choice_page(CHOICES[name], audit, about()), tmp_path, width=360)
    assert seen["errors"] == []
    assert seen["resources"] == []
    assert seen["width"] == [360, 360]


@needs_browser
def test_a_page_follows_the_colours_of_the_screen(tmp_path):
    page = render_choice_page(SWEEP, None, about())
    corners = []
    for scheme in (0, 1):
        picture = photograph(page, tmp_path, f"--blink-settings=preferredColorScheme={scheme}")
        with Image.open(picture) as image:
            corners.append(sum(image.convert("RGB").getpixel((2, 2))))
    assert corners[0] < 150 < 700 < corners[1]


@needs_browser
def test_a_page_prints(tmp_path):
    (tmp_path / "page.html").write_text(render_choice_page(SWEEP, None, about()), encoding="utf-8")
    file = tmp_path / "page.pdf"
    run_browser(tmp_path, f"--print-to-pdf={file}", (tmp_path / "page.html").as_uri())
    assert file.read_bytes().startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", file.read_bytes())) <= 6


# The picture


def test_the_picture_shows_the_numbers(tmp_path):
    figure = figures.frontier(SWEEP)
    axes, bar = figure.axes
    dots = [line for line in axes.lines if line.get_marker() in ("o", "s")]
    wanted = {(100 * p.accuracy.value, 100 * p.recall[0].value) for p in SWEEP.points}
    assert {(line.get_xdata()[0], line.get_ydata()[0]) for line in dots} == wanted
    assert sum(line.get_marker() == "s" for line in dots) == 1
    assert len(dots) == len(SWEEP.points) + 1  # the ring around the chosen one
    assert any(list(line.get_ydata()) == [99.0, 99.0] for line in axes.lines)
    costs = [p.expected_cost.value for p in SWEEP.points]
    assert bar.get_ylim() == pytest.approx((min(costs), max(costs)))
    save_figure(figure, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["floors", "all alike", "two axes", "right to left", "long"])
def test_a_picture_is_drawn_of_whatever_can_be_placed(name, tmp_path):
    save_figure(figures.frontier(CHOICES[name]), tmp_path / "frontier.png")


@pytest.mark.parametrize("name", ["empty", "one point", "all diverged", "no focus"])
def test_a_picture_of_less_than_two_points_is_refused(name):
    with pytest.raises(ValueError, match="two points with a recall are needed, got [01]"):
        figures.frontier(CHOICES[name])


def test_plain_and_chosen_are_kept_of_many_points():
    kept = figures.kept(CHOICES["many points"].points)
    assert len(kept) == 400
    assert sum(p.plain for p in kept) == 1
    assert [p.name for p in kept if p.chosen] == [f"{AXIS}=5 69"]
