"""What a ledger says: facts of ledgers made to have them, and none beyond the evidence."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from funcloss.audit.ledger import Ledger
from funcloss.audit.ledger_words import (
    amount,
    certain,
    ledger_sentences,
    spoken_columns,
)

OTHERS = ("weight decay", "history", "statistics")


def ledger_of(
    net: list[list[float]],
    *,
    error: float | list[list[float]] = 0.0,
    error_of_sum: float = 0.0,
    begin: float = 9.0,
    missing: float = 0.0,
    against: float = 0.0,
    steps: int = 40,
) -> Ledger:
    """Return a ledger with these entries, whose rows add up but for ``missing`` of each.

    ``against``: what each entry was moved by against its sign on the way.
    """
    entries = torch.tensor(net, dtype=torch.float64)
    errors = torch.as_tensor(error, dtype=torch.float64).expand(entries.shape)
    start = torch.full((len(net),), begin, dtype=torch.float64)
    return Ledger(
        raised=entries.clamp(min=0.0) + against,
        lowered=entries.clamp(max=0.0) - against,
        variance=errors.square(),
        variance_of_sum=torch.full_like(start, error_of_sum**2),
        begin=start,
        now=start + entries.sum(1) + missing,
        memory={},
        steps=torch.tensor(steps),
    )


def names_of(classes: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names = tuple(f"k{c}" for c in range(classes))
    return names, (*names, *OTHERS)


def told(ledger: Ledger, weights: dict[int, float] | None = None, *, exact=True, **how) -> str:
    classes = len(ledger.begin)
    names, parts = names_of(classes)
    weight = torch.ones(classes)
    for c, w in (weights or {}).items():
        weight[c] = w
    parts = parts[: ledger.net.shape[1]]
    return "\n".join(ledger_sentences(names, parts, ledger, weight, exact=exact, **how))


# class 2 is the weighted one; it pays itself back, and class 0 pays most
NET = [
    [-106.5, 0.0, 103.9, 0.0, 0.0, 0.0],
    [1.0, -30.0, 20.0, 0.0, 0.0, 0.0],
    [4.0, 2.0, -48.5, 0.0, 0.0, 0.0],
]


def test_an_exact_ledger_says_who_paid_what_was_won_back_and_how_nearly_it_adds_up():
    lines = told(ledger_of(NET), {2: 5.0}).splitlines()
    assert lines[0] == (
        "Class k2 (weight 5): its examples lowered class k2's own loss by 48.5 and raised that of "
        "class k0 (by 103.9) and class k1 (by 20.0)."
    )
    assert lines[1] == (
        "Class k0's own examples lowered it again by 106.5; in all it fell by 2.6, from 9 to 6.4."
    )
    assert "80 %" in lines[2]
    assert "83.1 of the 103.9 on class k0's loss" in lines[2]
    assert "±" not in "".join(lines)
    assert "not how one at weight 1 would have gone: a baseline tells that" in lines[-2]
    assert lines[-1] == "The parts add up to the measured changes within 0 %."


def test_a_sampled_ledger_names_what_is_two_standard_errors_from_0():
    text = told(ledger_of(NET, error=11.0), {2: 5.0}, exact=False)
    assert "lowered class k2's own loss by 48.5 ± 11.0" in text
    assert "raised that of class k0 (by 103.9 ± 11.0)." in text
    assert "class k1" not in text  # 20 of 22
    assert text.splitlines()[-1].startswith("Some of 40 steps were measured")
    assert "--ledger exact" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("missing", "error", "near"), [(0.0, 0.0, 3), (3.0, 1.51, 3), (3.0, 1.4, 0), (3.0, math.inf, 0)]
)
def test_a_sampled_ledger_says_for_how_many_classes_its_rows_add_up(missing, error, near):
    ledger = ledger_of(NET, error=11.0, missing=missing, error_of_sum=error)
    known = 3 if error < math.inf else 0
    text = told(ledger, {2: 5.0}, exact=False)
    assert text.endswith(f"within two standard errors for {near} of {known} classes.")


@pytest.mark.parametrize(("samples", "enough"), [(1, False), (15, False), (16, True)])
@pytest.mark.parametrize("first", [0, 8])
def test_a_few_samples_name_nobody(samples, enough, first):
    drawn = SimpleNamespace(since=torch.tensor(first), samples=torch.tensor(samples))
    ledger = ledger_of(NET, error=1.0)._replace(sampling=drawn)
    text = told(ledger, {2: 5.0}, exact=False)
    assert ("class k0" in text) == enough
    assert f"{first + samples} of 40 steps were measured" in text
    assert ("the first 8 and" in text) == bool(first)
    assert "--ledger exact" in text
    assert certain(ledger, exact=False).any() == enough


ROSE = [[-10.0, 0.0, 60.0], [0.0, -5.0, 1.0], [0.0, 0.0, -2.0]]
RAISES_ITSELF = [[-1.0, 0.0, 4.0], [0.0, -1.0, 0.0], [0.0, 0.0, 3.0]]
OWN_TOO = [[2.0, 0.0, 4.0], [0.0, -1.0, 0.0], [0.0, 0.0, -3.0]]
HELPS = [[-1.0, 0.0, -4.0], [0.0, -1.0, -3.0], [0.0, 0.0, -3.0]]
REST = [[-50.0, -60.0, 100.0], [0.0, -1.0, 0.0], [0.0, 0.0, -3.0]]
MIXED = [[-50.0, 0.0, 30.0], [0.0, -1.0, 0.0], [0.0, 0.0, -3.0]]


@pytest.mark.parametrize(
    ("net", "how", "says"),
    [
        (ROSE, {}, "in all it rose by 50.0, from 9 to 59"),
        (RAISES_ITSELF, {}, "its examples raised class k2's own loss by 3.0 and raised that"),
        (OWN_TOO, {}, "Class k0's own examples raised it too, by 2.0"),
        (HELPS, {}, "They raised no other class's loss."),
        (HELPS, {}, "on class k2's own loss"),
        (REST, {}, "by 50.0, all other parts lowered it by 60.0; in all it fell by 10.0"),
        (MIXED, {"against": 2.0}, "class k0 (by 30.0: up 32.0 in some steps, down 2.0 in others)"),
    ],
)
def test_signs_and_sums_are_told_as_they_are(net, how, says):
    assert says in told(ledger_of(net, **how), {2: 3.0})


@pytest.mark.parametrize("exact", [True, False])
def test_what_was_moved_to_and_fro_is_told_of_an_exact_ledger_only(exact):
    text = told(ledger_of(MIXED, against=2.0, error=0.1), {2: 3.0}, exact=exact)
    assert ("in some steps" in text) == exact


@pytest.mark.parametrize(
    ("weight", "says", "not_said"),
    [
        (5.0, "80 % of these, (w - 1) / w, are due to the weight beyond 1: 83.1", "held back"),
        (0.5, "2 times as large at weight 1: the lower weight held back a rise", "due to"),
        (0.5, "held back a rise of class k0's loss by 103.9", "due to"),
        (0.25, "4 times as large at weight 1: the lower weight held back a rise", "due to"),
        (0.0, "Class k2 (weight 0)", "Along this path"),
    ],
)
def test_the_part_due_to_the_weight_has_the_sign_of_the_weight(weight, says, not_said):
    text = told(ledger_of(NET), {2: weight})
    assert says in text
    assert not_said not in text


def test_a_lower_weight_that_helps_itself_less_is_told_as_a_fall_held_back():
    text = told(ledger_of(HELPS), {2: 0.5})
    assert "held back a fall of class k2's own loss by 3.0" in text


@pytest.mark.parametrize(("exact", "when"), [(True, ""), (False, " in the steps that were")])
def test_a_class_of_weight_0_moved_nothing(exact, when):
    still = [[-1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.5, 0.0, 0.0]]
    first = told(ledger_of(still, error=0.1), {2: 0.0}, exact=exact).splitlines()[0]
    assert first.startswith(f"Class k2 (weight 0): its examples moved no loss{when}")


def test_weights_of_which_1_is_the_unusual_one_leave_nothing_due():
    text = told(ledger_of(NET), {0: 2.0, 1: 2.0})
    assert text.startswith("Class k2 (weight 1)")
    assert "Along this path" not in text


@pytest.mark.parametrize(
    ("missing", "closes"), [(0.0, True), (1.2, True), (1.3, False), (50.0, False)]
)
def test_a_ledger_that_does_not_add_up_within_5_percent_names_nobody(missing, closes):
    ledger = ledger_of(NET, missing=missing)
    text = told(ledger, {2: 5.0})
    assert (ledger.residual <= 0.05) == closes
    assert ("class k" in text.lower()) == closes
    assert text.startswith("The parts do not add up") != closes
    assert len(text.splitlines()) == 1 or closes


def test_entries_are_said_to_be_larger_than_the_changes_where_they_are():
    assert "Entries are larger than the changes" in told(ledger_of(NET), {2: 5.0})
    alone = [[-5.0, 0.0, 0.1], [0.0, -5.0, 0.1], [0.0, 0.0, -5.0]]
    assert "Entries are larger" not in told(ledger_of(alone), {2: 5.0})


def test_entries_smaller_than_what_their_row_misses_are_not_named():
    net = [[-106.5, 0.0, 103.9], [0.0, -30.0, 0.05], [4.0, 2.0, -48.5]]
    assert "class k1" not in told(ledger_of(net, missing=0.08), {2: 5.0})
    assert "class k1 (by 0.05)" in told(ledger_of(net, missing=0.02), {2: 5.0})


def test_samples_that_do_not_tell_are_said_not_to():
    text = told(ledger_of(NET, error=500.0), {2: 5.0}, exact=False)
    assert text.startswith(
        "Class k2 (weight 5): the samples do not tell what its examples did to any class's loss."
    )
    errors = [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 100.0]]
    net = [row[:3] for row in NET]
    text = told(ledger_of(net, error=errors), {2: 5.0}, exact=False)
    assert "; the samples do not tell what they did to class k2's own loss." in text
    errors = [[100.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    text = told(ledger_of(net, error=errors), {2: 5.0}, exact=False)
    assert "The samples do not tell what class k0's own examples did to it; in all it fell" in text


def test_a_sampled_entry_without_an_error_is_not_known():
    """One sample has no spread."""
    for error in (0.0, math.inf, math.nan):
        assert not certain(ledger_of(NET, error=error), exact=False).any()


def test_classes_without_held_out_examples_are_named_and_never_pay():
    ledger = ledger_of(NET)
    gone = torch.tensor([math.nan, 0.0, 0.0])
    ledger = ledger._replace(
        raised=ledger.raised + gone[:, None], begin=ledger.begin + gone, now=ledger.now + gone
    )
    text = told(ledger, {2: 5.0})
    assert "raised that of class k1 (by 20.0)" in text
    assert "Class k0 has no held-out examples." in text
    assert "nan" not in text
    own = torch.tensor([0.0, 0.0, math.nan])
    ledger = ledger_of(NET)
    ledger = ledger._replace(
        raised=ledger.raised + own[:, None], begin=ledger.begin + own, now=ledger.now + own
    )
    text = told(ledger, {2: 5.0})
    assert "Class k2 (weight 5): its examples raised the loss of class k0" in text
    assert "nan" not in text


def test_a_loss_that_is_not_finite_at_the_end_is_said():
    ledger = ledger_of(NET)
    now = ledger.now.clone()
    now[1] = math.inf
    text = told(ledger._replace(now=now), {2: 5.0})
    assert "No finite loss at the end: class k1." in text
    assert "by 20" not in text  # its row cannot be known to add up
    none = ledger._replace(now=now * math.nan)
    assert told(none, {2: 5.0}).startswith("No class has a finite loss")


def test_without_weights_the_two_who_did_most_to_others_are_named():
    net = [[-9.0, 5.0, 1.0], [-3.0, -9.0, 0.0], [4.0, 0.5, -90.0]]
    lines = told(ledger_of(net)).splitlines()
    assert lines[0] == "All classes have the same weight."
    assert lines[1].startswith("Class k0's examples moved other classes' losses most: they raised")
    assert "class k2 (by 4.0), and lowered the loss of class k1 (by 3.0)." in lines[1]
    assert lines[2].startswith("Class k1's examples moved them most after these")
    assert "weight 1" not in "".join(lines[3:]).replace("each at weight 1", "")
    text = told(ledger_of(net, error=90.0), exact=False)
    assert "The samples do not tell whose examples moved other classes' losses." in text


def test_one_class_and_no_steps():
    text = told(ledger_of([[-1.0, 0.0]]))
    assert "All classes have the same weight." in text
    assert "class k0" not in text.lower()
    assert told(ledger_of(NET, steps=0), {2: 5.0}) == "No step was measured: the ledger is empty."


def test_a_thousand_weighted_classes_take_a_bounded_number_of_words():
    classes = 1000
    net = torch.randn(classes, classes + 3, generator=torch.Generator().manual_seed(0)).double()
    weights = {c: 1.0 + c for c in range(1, classes)}
    text = told(ledger_of(net.tolist()), weights)
    assert len(text) < 4000
    assert "995 more classes have their weights: see the table." in text


def test_the_most_unusual_weight_comes_first():
    weights = torch.tensor([1.0, 0.1, 1.0, 5.0, 0.0, 1.0])
    zeros = ledger_of(torch.zeros(6, 6).tolist())
    assert spoken_columns(zeros, weights, exact=True, most=2) == [4, 1]
    assert spoken_columns(zeros, torch.ones(6), exact=True) == []


def test_names_are_written_as_asked():
    assert "class <k2>" in told(ledger_of(NET), {2: 5.0}, name=lambda text: f"<{text}>")


def test_a_ledger_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"must have 2 rows and 2 columns, .* got \(3, 6\)"):
        ledger_sentences("ab", "ab", ledger_of(NET), torch.ones(2), exact=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.0, "0"), (0.9949, "0.99"), (0.999, "1.0"), (-1234.56, "1,234.6"), (3e8, "3e+08")],  # noqa: E501
)  # fmt: skip
def test_amounts_have_no_sign_and_few_digits(value, text):
    assert amount(value) == text


# Any ledger


@st.composite
def any_ledger(draw) -> tuple[Ledger, Tensor, bool]:
    classes = draw(st.integers(1, 5))
    shape, numbers = (classes, classes + 3), torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def matrix(sizes: list[float]) -> Tensor:
        """Return numbers of which some are 0, up to one of the sizes."""
        made = torch.rand(shape, generator=numbers, dtype=torch.float64)
        return made * (made > draw(st.sampled_from([0.0, 0.5]))) * draw(st.sampled_from(sizes))

    raised, lowered = matrix([0.0, 1e-6, 1.0, 1e6]), -matrix([0.0, 1e-6, 1.0, 1e6])
    begin = torch.rand(classes, generator=numbers, dtype=torch.float64)
    missed = 1 + draw(st.sampled_from([0.0, 1e-3, 0.04, 0.2]))
    now = begin + (raised + lowered).sum(1) * missed
    variance = matrix([0.0, 1.0, 1e10])
    steps = torch.tensor(draw(st.integers(0, 2)))
    weight = st.sampled_from([0.0, 0.5, 1.0, 1.0, 5.0])
    weights = torch.tensor(draw(st.lists(weight, min_size=classes, max_size=classes)))
    ledger = Ledger(raised, lowered, variance, variance.sum(1), begin, now, {}, steps)
    return ledger, weights, draw(st.booleans())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(any_ledger())
def test_any_finite_ledger_is_told_and_whoever_pays_surely_lost(made):
    ledger, weights, exact = made
    names, parts = names_of(len(weights))
    lines = ledger_sentences(names, parts, ledger, weights, exact=exact)
    assert lines
    assert not re.search(r"\b(nan|inf)\b|(?<!e)-0", "\n".join(lines))
    net, changes = ledger.net, ledger.now - ledger.begin
    for line in lines:
        found = re.match(r"Class k(\d)(?: \(weight|'s examples)", line)
        payers = re.search(r"raised (?:that|the loss) of (.*?)(?:;|, and lowered|\.$)", line)
        if found is None or payers is None:
            continue
        c = int(found[1])
        for k in map(int, re.findall(r"class k(\d) \(by", payers[1])):
            entry = float(net[k, c])
            if exact:
                assert entry > abs(float(net[k].sum() - changes[k]))
                assert abs(float((net.sum(1) - changes).norm())) <= 0.05 * float(changes.norm())
            else:
                assert entry > 2 * float(ledger.variance[k, c].sqrt()) > 0
