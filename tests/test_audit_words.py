"""What a report says in words: each rule on audits made to meet it, or just not to."""

import math
from dataclasses import replace

import pytest
import torch
from audit_examples import make_audit

from funcloss import optim
from funcloss.audit.result import Audit, Check, ExampleRows, Impact, StandardErrors
from funcloss.audit.words import (
    compare,
    conflicting,
    doubts,
    largest,
    percent,
    sentences,
    spoken_of,
)


def audit_of(
    gram: list[list[float]],
    *,
    weights: dict[int, float] | None = None,
    error: float | None = 0.0,
    **others,
) -> Audit:
    """Return an audit with these inner products and the same standard error for every number."""
    classes = len(gram)
    made = make_audit(classes, weights=weights, step=False, examples=False)
    table = torch.tensor(gram, dtype=torch.float64)
    errors = None
    if error is not None:
        of_pairs = torch.full((classes, classes), error)
        errors = StandardErrors(16, 8, torch.full((classes,), error), of_pairs)
    return replace(made, gram=table, layer_gram=table[None], standard_errors=errors, **others)


def text_of(audit: Audit, **options) -> str:
    return "\n".join(sentences(audit, **options))


EYE = torch.eye(3).tolist()


def with_impact(audit: Audit, train: list[float], held_out: list[float] | None = None) -> Audit:
    """Return the audit with what the part of its last class does to the losses of the others."""
    zeros = torch.zeros(len(audit.classes), dtype=torch.float64)
    impact = {}
    for part, rises in (("train", train), ("held_out", held_out)):
        if rises is not None:
            matrix = torch.zeros(len(rises), len(rises), dtype=torch.float64)
            matrix[:, -1] = torch.tensor(rises)
            impact[part] = Impact(matrix, zeros, zeros)
    return replace(audit, impact=impact)


INCREASES = "The class weight increases class 2's contribution to the current gradient."


# at weight 3 class 2 has 9/11 of the gradient, 1/3 at equal weights; 3/5 are expected
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (0.025, INCREASES),
        (0.225, INCREASES),  # 2 * 0.225 = 0.45 < 9/11 - 1/3
        (0.25, "Class 2's share does not differ significantly from unweighted."),
    ],
)
def test_a_weight_moves_a_share_where_it_moves_by_two_standard_errors(error, says):
    lines = sentences(audit_of(EYE, weights={2: 3.0}, error=error))
    assert lines[0].startswith(says)
    assert "of the gradient; for the same model with all weights 1, 33.3 %." in lines[1]
    assert lines[1].startswith("With weight 3, class 2 contributes 81.8 ")


def test_a_low_weight_lowers_the_share():
    decreases = INCREASES.replace("increases", "decreases")
    assert decreases in text_of(audit_of(EYE, weights={2: 0.5}))


def test_a_weight_may_move_the_share_the_other_way_and_no_intention_is_judged():
    # class 1 points against the much longer class 0, so a little more of it pulls back
    gram = [[100.0, -3.0], [-3.0, 1.0]]
    audit = audit_of(gram, weights={1: 1.5}, class_weights=torch.tensor([1.0, 1.5]).double())
    assert float(audit.balance.share[1]) < float(audit.reweighted(torch.ones(2)).share[1])
    text = text_of(audit)
    assert "The class weight decreases class 1's contribution" in text
    assert "intended" not in text


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (0.025, "the actual share is higher."),
        (0.125, "the difference is not significant."),
    ],
)
def test_share_and_expected_share_differ_by_two_standard_errors_or_not_significantly(error, says):
    lines = sentences(audit_of(EYE, weights={2: 3.0}, error=error))
    assert lines[2] == f"Expected from weight x count: 60.0 %; {says}"


@pytest.mark.parametrize("error", [0.0, 0.025, 0.149, 0.151, 0.5, math.nan])
@pytest.mark.parametrize("cosine", [-0.9, -0.3, -0.01, 0.0, 0.3])
def test_a_conflict_is_a_cosine_two_standard_errors_below_zero(cosine, error):
    audit = audit_of([[1.0, cosine], [cosine, 1.0]], weights={1: 2.0}, error=0.0)
    of_pairs = torch.full((2, 2), error)
    audit = replace(audit, standard_errors=replace(audit.standard_errors, conflict=of_pairs))
    text = text_of(audit)
    sure = cosine < 0 and cosine <= -2 * error
    assert ("Conflicting gradients (cosine similarity with class 1): class 0 (" in text) == sure
    assert conflicting(audit, audit.balance.conflict, 0, 1) == sure
    known = not math.isnan(error)
    assert ("On these examples the lowest cosine similarity" in text) == (not known)
    assert ("No significant gradient conflict" in text) == (known and cosine < 0 and not sure)
    assert ("No gradient conflict" in text) == (known and cosine >= 0)


# Where there is no verdict.


def with_examples(audit: Audit, *, right: float = 1.0, norm: float = 0.0) -> Audit:
    """Return the audit with ten examples per class: how many are right, and their norms."""
    classes, n = len(audit.classes), 10
    label = torch.arange(classes).repeat_interleave(n)
    margin = torch.where(torch.arange(n) < round(right * n), 1.0, -1.0).repeat(classes).double()
    flat = torch.zeros(n * classes, dtype=torch.float64)
    rows = ExampleRows(torch.arange(n * classes), label, flat, flat + norm, flat, margin)
    return replace(audit, examples=rows, count=torch.full((classes,), n))


def loss_of(value: float) -> dict:
    return {"loss": torch.full((3,), value, dtype=torch.float64)}


THREE = {"weights": {2: 3.0}}
# |g|^2 = 0.02, of two classes of norm 1 with a share of 1/2 each
NEAR = [[1.0, -0.99, 0.0], [-0.99, 1.0, 0.0], [0.0, 0.0, 0.0]]
DOUBTS = [
    ("sound", lambda: audit_of(EYE, **THREE), []),
    ("one batch", lambda: audit_of(EYE, error=None, **THREE), ["too few batches for standard"]),
    (
        "below -100 %",
        lambda: audit_of([[4.0, -5.0, 0.0], [-5.0, 6.8, 0.0], [0.0, 0.0, 0.0]], error=0.01),
        ["those of classes 0 and 1 lie outside -100 to 200 %"],
    ),
    (
        "one outside",
        lambda: audit_of([[5.0, -1.4, -1.4], [-1.4, 1.5, -0.7], [-1.4, -0.7, 1.5]], error=0.01),
        ["that of class 0 lies outside -100 to 200 %"],
    ),
    ("exact norms", lambda: with_examples(audit_of(EYE, **THREE), norm=0.0), []),
    (
        "noisy gradient",  # |g|^2 = 11, error^2 = (11 / 3 * 5.1^2 - 11) / 30 = 2.81
        lambda: with_examples(audit_of(EYE, **THREE), norm=5.1),
        ["the class gradients nearly cancel (the norm of their sum is 66.3 % of their norms"],
    ),
    ("less noise", lambda: with_examples(audit_of(EYE, **THREE), norm=5.0), []),
    ("parts cancel", lambda: with_examples(audit_of(NEAR), norm=1.0), ["nearly cancel (the norm"]),
    ("parts cancel, exactly known", lambda: with_examples(audit_of(NEAR), norm=0.1), []),
    ("all wrong", lambda: with_examples(audit_of(EYE, **THREE), right=0.0), ["is at chance (mean"]),
    (
        "some right",
        lambda: with_examples(audit_of(EYE, **THREE), right=0.4),
        ["is at chance (mean"],
    ),
    ("most right", lambda: with_examples(audit_of(EYE, **THREE), right=0.6), []),
]


@pytest.mark.parametrize(
    ("made", "reasons"), [case[1:] for case in DOUBTS], ids=[case[0] for case in DOUBTS]
)
def test_a_verdict_that_nothing_bears_out_is_not_given_and_the_reason_comes_first(made, reasons):
    audit = made()
    found = doubts(audit)
    assert len(found) == len(reasons)
    assert all(reason in text for reason, text in zip(reasons, found, strict=True))
    lines = sentences(audit)
    if reasons:
        assert lines == (*(f"No verdict on the shares: {r}." for r in found), *lines[len(found) :])
        assert lines[len(found)] == "The table has the numbers."
        for strong in ("contributes", "increases", "onflict", "significant", "±"):
            assert strong not in "".join(lines).replace("nearly", "")
    else:
        assert "The table has the numbers." not in lines


# Of weights 1, 1, 3 and equal counts the prior is 1/5, 1/5, 3/5, its entropy 0.950.
@pytest.mark.parametrize(("loss", "chance"), [(0.94, False), (0.96, True)])
def test_a_model_is_at_chance_whose_loss_is_not_below_that_of_the_prior(loss, chance):
    audit = audit_of(EYE, **THREE, **loss_of(loss))
    assert doubts(audit) == []  # of another loss nothing is known
    found = doubts(audit, log_loss=True)
    assert found == ["the model is at chance (weighted loss 0.96, that of the prior 0.95)"] * chance
    text = text_of(audit, log_loss=True)
    assert text.startswith("No verdict on the shares: the model is at chance") == chance


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (0.9, "No verdict on the share of class 2: its error exceeds it; see the table."),
        (math.nan, "No verdict on the share of class 2: its standard error is not known; see the"),
        (0.8, "Class 2's share does not differ significantly"),
    ],
)
def test_of_a_share_whose_error_exceeds_it_nothing_is_said(error, says):
    text = text_of(audit_of(EYE, weights={2: 3.0}, error=error))
    assert text.startswith(says)
    assert ("81.8" in text) == (error == 0.8)


def test_of_one_batch_no_verdict_is_given():
    lines = sentences(make_audit(weights={9: 5.0}, batches=1))
    assert lines == (
        "No verdict on the shares: too few batches for standard errors.",
        "The table has the numbers.",
    )


OPPOSED = [[1.0, 0.0, -0.5], [0.0, 1.0, -0.1], [-0.5, -0.1, 1.0]]


def test_losers_are_those_whose_loss_rises_and_whose_gradients_conflict():
    audit = audit_of(OPPOSED, weights={2: 3.0}, error=0.15)  # 1 does not conflict significantly
    text = text_of(with_impact(audit, [0.02, 0.01, -0.3]))
    assert "Class 2's part of the step raises the loss of class 0 (+0.02)." in text
    assert "class 1 (+" not in text
    assert "held-out" not in text


@pytest.mark.parametrize(
    ("held_out", "says"),
    [
        ([0.01, 0.1, -0.1], "the same losses rise"),
        ([-0.01, 0.1, -0.1], "this holds for class 1 only"),
        ([-0.01, -0.1, -0.1], "none of these losses rises"),
    ],
)
def test_losers_are_looked_up_in_held_out_data(held_out, says):
    audit = with_impact(audit_of(OPPOSED, weights={2: 3.0}), [0.02, 0.01, -0.3], held_out)
    assert f"On held-out data {says}" in text_of(audit)


def test_a_rise_that_may_be_chance_makes_no_loser():
    text = text_of(with_impact(audit_of(OPPOSED, weights={2: 3.0}, error=0.5), [0.02, 0.01, -0.3]))
    assert "No class loses significantly from class 2's part of the step" in text
    assert "on these examples it raises the loss of classes 0 and 1." in text


def test_where_no_loss_rises_no_class_loses():
    audit = with_impact(audit_of(EYE, weights={2: 3.0}), [-0.1, math.nan, -0.3])
    assert "raises no other class's loss" in text_of(audit)


def test_the_part_of_the_step_is_said_with_its_note():
    audit = make_audit(weights={9: 5.0})
    share = percent(audit.step.share[9])
    assert f"Of the step, {share} comes from class 9's current gradient" in text_of(audit)
    noted = replace(audit, step=replace(audit.step, note="the momentum is not known"))
    assert "Optimizer step: the momentum is not known." in text_of(noted)
    assert "was not audited" in text_of(make_audit(step=False))


def test_classes_with_a_weight_of_their_own_are_spoken_of():
    assert spoken_of(make_audit(weights={9: 5.0, 4: 1.5})) == [9, 4]
    assert spoken_of(make_audit(weights={c: 2.0 for c in range(9)})) == [9]
    assert spoken_of(make_audit(2, weights={0: 3.0})) == [0]  # of two, 1 is the usual weight
    assert spoken_of(make_audit(weights={3: 0.0, 4: 9.0})) == [3, 4]
    assert spoken_of(make_audit(weights={c: 2.0 + c for c in range(7)}), most=2) == [6, 5]
    many = text_of(make_audit(weights={c: 2.0 + c / 9 for c in range(1, 5)}), most=1)
    assert "3 more classes have their weights" in many


def test_where_all_weigh_the_same_the_two_extremes_are_spoken_of():
    audit = audit_of([[1.0, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 4.0]])
    assert spoken_of(audit) == [1, 0]
    lines = sentences(audit)
    assert lines[0] == "All classes have the same weight."
    assert lines[1] == (
        "Class 1 has the largest gradient share relative to its frequency: 64.3 ± 0.0 %, "
        "expected 33.3 %."
    )
    assert any("Class 0 has the smallest" in line for line in lines)
    assert "; the difference is not significant." in text_of(audit_of(EYE))
    assert spoken_of(replace(audit, class_weights=audit.class_weights * 5)) == [1, 0]


def by_sign(grads, state, params, learning_rate):
    return {name: -learning_rate * g.sign() for name, g in grads.items()}, state


def by_length(grads, state, params, learning_rate):
    return {name: -learning_rate * g for name, g in grads.items()}, state


LION_LIKE = optim.Optimizer(lambda params: (), by_sign, scale_invariant=True)
ADAMANT = optim.Optimizer(lambda params: (), by_length)


@pytest.mark.parametrize(
    ("name", "optimizer", "reduction", "says"),
    [
        ("adam", optim.adam(), "mean", "A step of adam hardly changes"),
        ("AdamW", optim.adamw(), "sum", "A step of AdamW hardly changes"),
        ("lion_like", LION_LIKE, "mean", "A step of lion_like hardly changes"),
        ("adamant", ADAMANT, "mean", "A step of adamant grows with the class weights"),
        ("sgd", optim.sgd(), "mean", "A step of sgd grows with the class weights"),
        ("momentum", optim.sgd(momentum=0.9), "mean", "as a larger learning rate would."),
        ("sgd", optim.sgd(), "weighted_mean", "by one number changes nothing"),
    ],
)
def test_what_scaled_weights_do_depends_on_optimizer_and_reduction(
    name, optimizer, reduction, says
):
    audit = make_audit(weights={9: 5.0}, reduction=reduction)
    told = {"optimizer": name, "scale_invariant": optimizer.scale_invariant}
    assert says in sentences(audit, **told)[-1]
    assert "by one number" not in text_of(audit)


def test_a_clipped_step_does_not_grow_without_end():
    audit = make_audit()
    clipped = replace(audit, step=replace(audit.step, clip=0.5))
    assert "up to the clipping" in text_of(clipped, optimizer="sgd")
    assert "clipping" not in text_of(audit, optimizer="sgd")


def test_a_loss_that_couples_examples_is_not_reweighted():
    text = text_of(make_audit(weights={9: 5.0}, linear=False), optimizer="sgd")
    assert "The weights act inside the loss" in text
    assert "all weights 1" not in text
    assert "by one number" not in text


def test_options_of_the_loss_are_spoken_of_by_their_largest_entry():
    matrix = torch.zeros(10, 10, dtype=torch.float64)
    matrix[9, 4], matrix[0, 0] = -0.25, math.nan
    options = {"cost_matrix": matrix, "gamma": torch.tensor(0.5), "class_weights": torch.ones(10)}
    text = text_of(make_audit(elasticities=options))
    assert "cost_matrix at true class 9, decided class 4" in text
    assert "shortens the gradient by 0.25 %" in text
    assert "1 % more of gamma lengthens the gradient by 0.5 %" in text
    assert "class_weights" not in text


def test_a_failed_check_comes_first():
    audit = make_audit()
    bad = Check("step", 0.1, 1e-6, "")
    assert "Self-check failed (step)" in sentences(replace(audit, checks=(bad,)))[0]
    assert "Self-check" not in text_of(audit)  # that of the impact only informs
    assert Check("impact", 9.0, None, "").holds
    assert not Check("step", math.nan, 1.0, "").holds


def test_a_gradient_of_zero_has_no_shares():
    audit = make_audit(weights={9: 5.0})
    assert "no class has a share" in text_of(replace(audit, gram=0 * audit.gram))


def test_a_class_without_examples_is_not_judged():
    names = [*"012345678", "Nine"]
    text = text_of(make_audit(names=names, weights={9: 5.0}, absent=(9,)))
    assert text.startswith("Class Nine has no examples here: its weight of 5 has no effect.")
    assert "onflict" not in text


def test_names_are_written_as_asked():
    text = text_of(make_audit(weights={9: 5.0}), name=lambda name: f"<{name}>")
    assert "class <9>" in text
    assert "class 9" not in text


def test_a_weighting_without_effect_is_said_to_have_none():
    plain = make_audit()
    assert compare(plain, plain) == (
        "The weighting has no effect on classes 0, 1, 2, 3, 4, 5, 6, 7, 8 and 9: "
        "their shares of the gradient are the same with and without it, to 1 %.",
    )
    scaled = compare(replace(plain, gram=plain.gram * 1.03**2), plain)
    assert "no effect on classes 0," in scaled[0]
    assert "1.03 times as long as without the weighting: that acts as another" in scaled[1]


@pytest.mark.parametrize(("times", "same"), [(1.009, True), (1.03, False)])
def test_shares_are_the_same_to_one_percent(times, same):
    plain = audit_of([[1.0, 0.0], [0.0, 1.0]])
    length = math.sqrt(times / (2 - times))  # the share of class 1 is then times / 2
    now = audit_of([[1.0, 0.0], [0.0, length**2]])
    assert float(now.balance.share[1]) == pytest.approx(times / 2)
    text = "\n".join(compare(now, plain))
    assert ("no effect on classes 0 and 1" in text) == same
    if not same:
        assert "raises the share of class 1 from 50.0 % to 51.5 %" in text
        assert "lowers the share of class 0 from 50.0 % to 48.5 %" in text


def test_the_meant_loss_is_seen_to_change_the_shares():
    lines = compare(make_audit(weights={9: 5.0}), make_audit())
    assert lines[0].startswith("The weighting raises the share of class 9 from ")


def test_many_changed_classes_are_counted():
    lines = compare(make_audit(30, weights={9: 50.0}), make_audit(30), most=3)
    assert sum("the share of" in line for line in lines) == 3
    assert any("more changed by less" in line for line in lines)


def test_audits_of_other_data_are_not_compared():
    with pytest.raises(ValueError, match="same classes and examples"):
        compare(make_audit(3), make_audit(4))
    zero = replace(make_audit(3), gram=torch.zeros(3, 3, dtype=torch.float64))
    assert "nothing to compare" in compare(zero, zero)[0]


def test_of_many_classes_those_with_the_largest_shares_are_shown():
    audit = make_audit(300, per_class=4, weights={7: 0.5})
    shown = largest(audit)
    assert len(shown) == 24
    assert shown == sorted(shown)
    assert 7 in shown
    assert int(audit.balance.share.abs().argmax()) in shown
    assert largest(make_audit(24, per_class=4)) == list(range(24))
