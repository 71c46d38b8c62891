"""Combinators against plain loops and torch: what each makes of a loss, and what it refuses."""

import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.testing import assert_close

from funcloss import as_module, custom_vjp, from_module, from_numpy, losses
from funcloss.combinators import (
    class_weighted,
    class_weights_of,
    correction_of,
    couples_examples,
    from_logits,
    mixup,
    name_of,
    one_hot_targets,
    options_of,
    parts,
    probabilities_of,
    sample_weighted,
    scaled,
    smoothed,
    soft,
    summed,
    temperature,
    where,
)

N, CLASSES = 7, 4
RANDOM = torch.Generator().manual_seed(11)
LOGITS = 3 * torch.randn(N, CLASSES, generator=RANDOM, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 1, 1, 0])
OTHERS = torch.tensor([1, 1, 0, 2, 3, 0, 2])
TARGETS = torch.randn(N, CLASSES, generator=RANDOM, dtype=torch.float64).softmax(-1)
WEIGHTS = torch.tensor([1.0, 0.25, 3.0, 0.0], dtype=torch.float64)
IMPORTANCE = torch.rand(N, generator=RANDOM, dtype=torch.float64)
MIX = torch.rand(N, generator=RANDOM, dtype=torch.float64)
KEPT = torch.tensor([True, False, True, True, False, True, True])
COSTS = torch.rand(CLASSES, CLASSES, generator=RANDOM, dtype=torch.float64)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


def by_loops(value):
    """Return ``value(-log p of each class, i)`` of every example, the logits halved and not."""
    for heat in (1.0, 2.0):
        values = []
        for i, row in enumerate((LOGITS / heat).tolist()):
            top = max(row)
            total = top + math.log(sum(math.exp(z - top) for z in row))
            values.append(value([total - z for z in row], i))
        yield torch.tensor(values, dtype=torch.float64)


W, Y, COLD = WEIGHTS.tolist(), LABELS.tolist(), 0.3
TRUE, HALF = by_loops(lambda s, i: s[Y[i]])
OTHER, _ = by_loops(lambda s, i: s[OTHERS[i]])
EVEN, HALF_EVEN = by_loops(lambda s, i: sum(s) / CLASSES)
COSTLY_SOFT, _ = by_loops(lambda s, i: sum(TARGETS[i, k].item() * W[k] * s[k] for k in range(4)))
ODDS, _ = by_loops(lambda s, i: math.exp(-s[Y[i]]))
COST, _ = by_loops(lambda s, i: sum(COSTS[Y[i], k].item() * math.exp(-s[k]) for k in range(4)))
PAYS = torch.tensor([W[y] for y in Y], dtype=torch.float64)
SMOOTH, HALF_SMOOTH = 0.7 * TRUE + 0.3 * EVEN, 0.7 * HALF + 0.3 * HALF_EVEN

ce, weighted = losses.cross_entropy, class_weighted(losses.cross_entropy)
nest = scaled(class_weighted(smoothed(temperature(ce, 2.0), COLD)), "by")
cool = scaled(temperature(ce, "heat"), 4.0)
both = summed({"fit": (0.5, sample_weighted(weighted)), "cool": ("by", cool)})
distance = one_hot_targets(losses.absolute_error)
TWO, EPS, COSTLY = scalar(2.0), scalar(COLD), {"class_weights": WEIGHTS}
ALL = {**COSTLY, "sample_weights": IMPORTANCE, "by": 0.25, "heat": 2.0}

ROWS = {  # the loss, its data after the logits, its options, its values
    "scaled": (scaled(ce, 2.5), (LABELS,), {}, 2.5 * TRUE),
    "scaled by name": (scaled(ce, "by"), (LABELS,), {"by": 0.5}, 0.5 * TRUE),
    "temperature by name": (temperature(ce, "heat"), (LABELS,), {"heat": TWO}, HALF),
    "sample_weighted": (
        sample_weighted(ce), (LABELS,), {"sample_weights": IMPORTANCE}, IMPORTANCE * TRUE
    ),
    "soft(class_weighted)": (soft(weighted), (TARGETS,), COSTLY, COSTLY_SOFT),
    "smoothed by name": (smoothed(ce, "eps"), (LABELS,), {"eps": EPS}, SMOOTH),
    "mixup, one an example": (
        mixup(ce), (LABELS, OTHERS), {"mix": MIX}, MIX * TRUE + (1 - MIX) * OTHER
    ),
    "a nest": (nest, (LABELS,), {**COSTLY, "by": 1.5}, 1.5 * PAYS * HALF_SMOOTH),
    "a sum of nests": (both, (LABELS,), ALL, 0.5 * IMPORTANCE * PAYS * TRUE + HALF),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "data", "options", "expected"), ROWS.values(), ids=ROWS.keys())
def test_the_values_are_those_of_a_plain_loop(loss, data, options, expected):
    assert_close(loss(LOGITS, *data, **options), expected, rtol=1e-12, atol=1e-12)


def hidden(data):
    """Return labels and distributions that only the examples that count have."""
    if data.dim() == 1:
        return torch.where(KEPT, data, -100)
    return torch.where(KEPT[:, None], data, torch.nan)


@pytest.mark.parametrize(("loss", "data", "options", "expected"), ROWS.values(), ids=ROWS.keys())
def test_what_does_not_count_is_zero_whatever_it_holds(loss, data, options, expected):
    logits = LOGITS.clone()
    logits[1], logits[4] = torch.nan, torch.inf
    data = tuple(hidden(x) for x in data)
    if "sample_weights" in options:
        options = {**options, "sample_weights": torch.where(KEPT, IMPORTANCE, torch.nan)}
    values = loss(logits, *data, where=KEPT, **options)
    assert_close(values, torch.where(KEPT, expected, 0), rtol=1e-12, atol=1e-12)
    slope = grad(lambda z: loss(z, *data, where=KEPT, **options).sum())(logits)
    clean = grad(lambda z: loss(z, *data, where=KEPT, **options).sum())(LOGITS)
    assert (slope[~KEPT] == 0).all()
    assert_close(slope[KEPT], clean[KEPT], rtol=1e-12, atol=1e-12)


def test_both_orders_of_smoothing_and_weighting_beside_torch():
    torchs = functools.partial(F.cross_entropy, LOGITS, LABELS, reduction="none")
    within, around = smoothed(weighted, COLD), class_weighted(smoothed(ce, COLD))
    ours = within(LOGITS, LABELS, class_weights=WEIGHTS)
    assert_close(ours, torchs(weight=WEIGHTS, label_smoothing=COLD))
    ours = around(LOGITS, LABELS, class_weights=WEIGHTS)
    assert_close(ours, WEIGHTS[LABELS] * torchs(label_smoothing=COLD))
    # An example of the class that costs nothing pays for the others in torch's order alone.
    assert ours[3] == 0 < within(LOGITS, LABELS, class_weights=WEIGHTS)[3]


def test_where_is_torchs_ignore_index():
    labels = torch.where(KEPT, LABELS, -100)
    known = where(ce, lambda z, y: y != -100)
    torchs = functools.partial(F.cross_entropy, ignore_index=-100, reduction="none")
    assert_close(known(LOGITS, labels), torchs(LOGITS, labels))
    assert_close(
        grad(lambda z: known(z, labels).sum())(LOGITS),
        grad(lambda z: torchs(z, labels).sum())(LOGITS),
    )
    both = known(LOGITS, labels, where=torch.arange(N) < 3)
    assert both.nonzero().flatten().tolist() == [0, 2]


# -- sums -----------------------------------------------------------------------------------------

TERMS = {
    "fit": ("trust", weighted),
    "cost": (0.5, losses.expected_cost),
    "poly": (TWO, losses.poly1),
}
OPTIONS = {
    "trust": scalar(0.7),
    "class_weights": WEIGHTS,
    "cost_matrix": COSTS,
    "epsilon": 0.25,
}


def test_each_term_is_given_the_options_that_it_takes_and_all_are_given_where():
    values = parts(TERMS)(LOGITS, LABELS, where=KEPT, **OPTIONS)
    expected = {
        "fit": 0.7 * PAYS * TRUE,
        "cost": 0.5 * COST,
        "poly": 2 * (TRUE + 0.25 * (1 - ODDS)),
    }
    assert list(values) == list(expected)
    for name, value in expected.items():
        assert_close(values[name], value * KEPT)
    total = summed(TERMS)(LOGITS, LABELS, where=KEPT, **OPTIONS)
    assert_close(total, values["fit"] + values["cost"] + values["poly"])


def test_an_option_of_one_name_goes_to_every_term_that_takes_it():
    both = summed({"a": (1.0, weighted), "b": (1.0, class_weighted(losses.poly1))})
    ours = both(LOGITS, LABELS, class_weights=WEIGHTS, epsilon=0.0)
    assert_close(ours, 2 * weighted(LOGITS, LABELS, class_weights=WEIGHTS))


def test_a_sum_is_differentiated_and_mapped_over_its_factor():
    total = summed(TERMS)
    rest = {name: value for name, value in OPTIONS.items() if name != "trust"}

    def of(trust):
        return total(LOGITS, LABELS, trust=trust, **rest).sum()

    fit = (PAYS * TRUE).sum()
    assert_close(grad(of)(OPTIONS["trust"]), fit)
    factors = torch.linspace(-1, 3, 5, dtype=torch.float64)
    assert_close(vmap(of)(factors), torch.stack([of(f) for f in factors]))
    assert_close(vmap(of)(factors).diff(), fit.expand(4))


VALUE_ERRORS = [
    (lambda: summed({}), "there must be a term, got none"),
    (lambda: parts({}), "there must be a term, got none"),
    (lambda: temperature(ce, 0.0), r"temperature: value must be in \(0, inf\), got 0.0"),
    (lambda: smoothed(ce, 1.5), r"smoothed: smoothing must be in \[0, 1\], got 1.5"),
    (lambda: mixup(ce)(LOGITS, LABELS, OTHERS, mix=-1.0), r"mix must be in \[0, 1\], got -1.0"),
    (
        lambda: class_weights_of(COSTS, LABELS),
        r"class_weights must have shape \(classes,\), got \(4, 4\)",
    ),
    (
        lambda: class_weighted(lambda z, y: F.cross_entropy(z, y))(LOGITS, LABELS, **COSTLY),
        r"what the loss gives must have shape \(7,\) to match labels, got \(\)",
    ),
    (
        lambda: sample_weighted(ce)(LOGITS, LABELS, sample_weights=WEIGHTS),
        r"sample_weights must have shape \(7,\) to match the values, got \(4,\)",
    ),
    (
        lambda: soft(ce)(LOGITS, TARGETS[:, :3]),
        r"soft: targets must have shape \(7, 4\) to match logits and cross_entropy, got",
    ),
]
TYPE_ERRORS = [
    (
        lambda: summed(TERMS)(LOGITS, LABELS, gamma=2.0, **OPTIONS),
        "no term takes the option 'gamma'; they take class_weights, cost_matrix, .*, trust",
    ),
    (lambda: parts(TERMS)(LOGITS, LABELS, gamma=2.0), "no term takes the option 'gamma'"),
    (
        lambda: summed({"a": ("trust", ce)})(LOGITS, LABELS),
        "the option 'trust' is missing: it is a factor of the loss",
    ),
    (lambda: scaled(ce, "by")(LOGITS, LABELS), "the option 'by' is missing"),
    (lambda: temperature(ce, "heat")(LOGITS, LABELS), "the option 'heat' is missing"),
    (lambda: mixup(ce)(LOGITS, LABELS, OTHERS), "'mix'"),
    (lambda: class_weights_of(LABELS, LABELS), "class_weights must be floating point, got torch.i"),
    (lambda: class_weights_of(WEIGHTS, WEIGHTS), "class_weights_of: labels must hold integer cla"),
    (
        lambda: sample_weighted(ce)(LOGITS, LABELS, sample_weights=LABELS),
        "sample_weighted: sample_weights must be floating point",
    ),
    (lambda: soft(ce)(LOGITS, LABELS), "soft: targets must be floating point, got torch.int64"),
    (lambda: distance(LOGITS, TARGETS), "one_hot_targets: labels must hold integer classes"),
]
REFUSED = [(*row, ValueError) for row in VALUE_ERRORS] + [(*row, TypeError) for row in TYPE_ERRORS]


@pytest.mark.parametrize(("call", "message", "error"), REFUSED)
def test_a_wrong_request_is_refused(call, message, error):
    with pytest.raises(error, match=message):
        call()


# -- what a loss says of itself, and what survives nesting ---------------------------------------


def test_weights_are_looked_up_in_any_shape_and_never_behind_the_mask():
    labels = torch.tensor([[2, -100, 0], [1, 3, 99]], dtype=torch.int32)
    kept = torch.tensor([[True, False, True], [True, True, False]])
    ours = class_weights_of(WEIGHTS, labels, kept)
    assert ours.tolist() == [[W[2], 0.0, W[0]], [W[1], W[3], 0.0]]
    assert class_weights_of(WEIGHTS, torch.tensor(2)).item() == W[2]
    slope = grad(lambda w: (class_weights_of(w, labels, kept) * 10).sum())(WEIGHTS)
    assert slope.tolist() == [10, 10, 10, 10]


DESCRIBED = {
    "scaled(class_weighted(smoothed(poly1)))": (
        scaled(class_weighted(smoothed(losses.poly1, "eps")), "by"),
        {"by", "class_weights", "eps", "epsilon", "where"},
    ),
    "sample_weighted(temperature(cross_entropy))": (
        sample_weighted(temperature(ce, "heat")),
        {"sample_weights", "heat", *options_of(ce)},
    ),
    "mixup(where(from_logits(nll)))": (
        mixup(where(from_logits(losses.nll), torch.ge)),
        {"mix", *options_of(losses.nll)},
    ),
    "summed(cross_entropy, one_hot_targets(squared_error))": (
        summed({"a": ("x", ce), "b": (1.0, one_hot_targets(losses.squared_error))}),
        {"x", *options_of(ce), "where"},
    ),
    "soft(cross_entropy)": (soft(ce), options_of(ce)),
}


@pytest.mark.parametrize("written", DESCRIBED)
def test_a_loss_says_what_it_is_made_of_and_what_it_takes(written):
    loss, options = DESCRIBED[written]
    assert repr(loss) == name_of(loss) == written
    assert options_of(loss) == options
    assert not couples_examples(loss)


@pytest.mark.parametrize(
    "around", [lambda x: scaled(x, 2.0), lambda x: summed({"a": (1.0, ce), "b": (1.0, x)})]
)
def test_a_loss_that_couples_examples_does_so_in_any_nest(around):
    assert couples_examples(around(sample_weighted(losses.nt_xent)))
    assert not couples_examples(around(ce))


def odd(logits, labels):
    return labels % 2 == 1


def squares(x, y):
    return (x - y) ** 2


def slopes_of_squares(x, y):
    return 2 * (x - y)


MADE = {  # each is made twice, and once of something else
    "class_weighted": (lambda: class_weighted(ce), class_weighted(losses.poly1)),
    "sample_weighted": (lambda: sample_weighted(ce), class_weighted(ce)),
    "scaled": (lambda: scaled(ce, torch.tensor(2.0)), scaled(ce, torch.tensor(3.0))),
    "scaled by name": (lambda: scaled(ce, "by"), scaled(ce, "of")),
    "summed": (
        lambda: summed({"a": (torch.tensor(2.0), ce), "b": ("by", losses.expected_cost)}),
        summed({"a": (torch.tensor(2.0), ce), "b": ("of", losses.expected_cost)}),
    ),
    "parts": (lambda: parts({"a": (2.0, ce)}), parts({"b": (2.0, ce)})),
    "from_logits": (lambda: from_logits(losses.nll), from_logits(ce)),
    "one_hot_targets": (
        lambda: one_hot_targets(losses.squared_error), one_hot_targets(losses.huber)
    ),
    "temperature": (lambda: temperature(ce, 2.0), temperature(ce, "heat")),
    "soft": (lambda: soft(ce), soft(losses.poly1)),
    "smoothed": (lambda: smoothed(ce), smoothed(ce, 0.2)),
    "mixup": (lambda: mixup(ce), soft(ce)),
    "where": (lambda: where(ce, odd), where(ce, torch.ge)),
    "nest": (
        lambda: class_weighted(smoothed(temperature(ce, "heat"), "eps")),
        class_weighted(smoothed(temperature(ce, "heat"), "heat")),
    ),
    "custom_vjp": (
        lambda: custom_vjp(squares, slopes_of_squares), custom_vjp(squares, torch.sub)
    ),
    "from_numpy": (
        lambda: from_numpy(squares, slopes_of_squares),
        from_numpy(squares, slopes_of_squares, example_axes=1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MADE)
def test_what_a_combinator_makes_is_compared_hashed_and_pickled(name):
    make, other = MADE[name]
    made, copy = make(), pickle.loads(pickle.dumps(make()))
    assert made == make() == copy
    assert hash(made) == hash(make()) == hash(copy)
    assert made != other
    assert repr(copy) == repr(made)
    with pytest.raises(AttributeError):
        made.losses = (losses.poly1,)


def test_a_criterion_as_a_loss_is_pickled():
    made = from_module(torch.nn.CrossEntropyLoss(weight=torch.tensor(W)))
    copy = pickle.loads(pickle.dumps(made))
    assert repr(copy) == repr(made) == "CrossEntropyLoss()"
    assert_close(copy(LOGITS.float(), LABELS), made(LOGITS.float(), LABELS))
    criterion = pickle.loads(pickle.dumps(as_module(weighted, class_weights=WEIGHTS)))
    assert_close(criterion(LOGITS, LABELS), (PAYS * TRUE).mean())


def test_a_combinator_may_be_called_in_what_is_traced():
    """Two of one kind, too: in the trace of torch 2.6 they are hashed before they have parts."""

    def inside(logits, labels, class_weights):
        twice = scaled(scaled(class_weighted(smoothed(smoothed(ce, 0.1), 0.3)), 2.0), 3.0)
        of_labels = twice(logits, labels, class_weights=class_weights)
        return of_labels, soft(scaled(ce, 2.0))(logits, logits.softmax(-1))

    compiled = torch.compile(inside, fullgraph=True, backend="aot_eager")
    assert_close(compiled(LOGITS, LABELS, WEIGHTS), inside(LOGITS, LABELS, WEIGHTS))


# -- how scores become probabilities --------------------------------------------------------------


def unstated(logits, labels):
    return losses.cross_entropy(logits, labels)


def every(logits, labels):
    return labels >= 0


def halved(logits, labels):
    return losses.cross_entropy(logits / 2, labels)


STATED = {
    "a function": (ce, "softmax"),
    "not stated": (unstated, None),
    "partial": (functools.partial(losses.multi_margin, margin=2.0), "none"),
    "partial, not stated": (functools.partial(unstated), None),
    "from_logits": (from_logits(losses.nll), "softmax"),
    "one_hot_targets": (distance, "none"),
    "a nest": (scaled(mixup(where(smoothed(soft(ce)), odd)), "by"), "softmax"),
    "a nest of a hinge": (class_weighted(temperature(losses.multi_margin, 2.0)), "none"),
    "a nest of costs": (class_weighted(scaled(losses.cost_hinge, 2.0)), "costs"),
    "a nest, not stated": (class_weighted(temperature(unstated, 2.0)), None),
    "a sum": (summed({"a": (1.0, ce), "b": ("x", losses.poly1)}), "softmax"),
    "a sum, costs": (
        summed({"a": (1.0, losses.expected_cost), "b": (1.0, losses.multi_margin)}), "costs"
    ),
    "a sum, hinge": (summed({"a": (1.0, ce), "b": (1.0, losses.multi_margin)}), "none"),
    "a sum, not stated": (summed({"a": (1.0, ce), "b": (1.0, unstated)}), None),
    "a sum that disagrees": (
        summed({"a": (1.0, ce), "b": (1.0, losses.balanced_softmax)}), "none"
    ),
    "custom_vjp": (custom_vjp(squares, slopes_of_squares), None),
    "from_module": (from_module(torch.nn.CrossEntropyLoss()), None),
    "as_module": (as_module(losses.multi_margin), "none"),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "stated"), STATED.values(), ids=STATED.keys())
def test_a_loss_states_how_its_scores_become_probabilities(loss, stated):
    assert probabilities_of(loss) == stated
    assert correction_of(loss, {}) == (1.0, 0.0)


PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
FACTS = {"class_counts": 100 * PRIOR, "class_prior": PRIOR}
UNEVEN = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
own_correction = functools.partial(halved)
own_correction.probabilities = lambda: (0.5, 0.0)
bound = functools.partial(weighted, class_weights=UNEVEN)
CORRECTED = {
    "class_balanced": (losses.class_balanced, {"beta": 0.9}),
    "balanced_softmax": (losses.balanced_softmax, {}),
    "logit_adjusted": (losses.logit_adjusted, {"tau": 0.5}),
    "vector_scaling": (losses.vector_scaling, {"gamma": 0.3, "tau": 0.7}),
    "class_weighted": (weighted, {"class_weights": UNEVEN}),
    "class_weighted, on top": (
        class_weighted(losses.logit_adjusted), {"class_weights": UNEVEN, "tau": 2.0}
    ),
    "weights bound, on top": (class_weighted(bound), {"class_weights": UNEVEN}),
    "bound": (bound, {}),
    "bound tau": (functools.partial(losses.logit_adjusted, tau=0.5), {}),
    "bound tau, other given": (functools.partial(losses.logit_adjusted, tau=0.5), {"tau": 2.0}),
    "temperature": (temperature(ce, "heat"), {"heat": 2.0}),
    "temperature of scaled scores": (temperature(losses.vector_scaling, 2.0), {"gamma": 0.3}),
    "a nest": (
        scaled(where(class_weighted(temperature(losses.balanced_softmax, 3.0)), every), "by"),
        {"by": 0.5, "class_weights": UNEVEN},
    ),
    "a sum of one kind": (
        summed({"a": (1.0, class_weighted(ce)), "b": ("by", class_weighted(ce))}),
        {"by": 0.5, "class_weights": UNEVEN},
    ),
    "a module": (as_module(weighted, reduction="none", class_weights=UNEVEN), {}),
    "one's own": (own_correction, {}),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "options"), CORRECTED.values(), ids=CORRECTED.keys())
def test_corrected_scores_at_the_minimum_are_the_prior(loss, options):
    """What sees nothing learns, but for the correction, how often the classes come."""
    options = {name: x for name, x in FACTS.items() if name in options_of(loss)} | options
    scale, offset = correction_of(loss, options)
    labels = torch.arange(4)
    scores = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [scores],
        max_iter=300,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        total = (PRIOR * loss(scores.expand(4, 4), labels, **options)).sum()
        total.backward()
        return total

    optimizer.step(closure)
    found = (scale * scores.detach() + offset).softmax(-1)
    assert_close(found, PRIOR, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(scores.detach().softmax(-1), PRIOR, atol=1e-2)


def test_a_statement_that_means_nothing_is_refused():
    def own(logits, labels):
        return ce(logits, labels)

    own.probabilities = "sigmoid"
    for loss in (own, scaled(own, 2.0), functools.partial(own)):
        with pytest.raises(ValueError, match=r"own.probabilities must be one of 'softmax', .*'sig"):
            probabilities_of(loss)


costly = class_weighted(smoothed(temperature(ce, "heat"), "eps"))
NEST = summed({"fit": ("trust", costly), "cost": (0.5, losses.expected_cost)})


def of_nest(logits, labels, class_weights, trust):
    own = {"heat": TWO, "eps": EPS, "cost_matrix": COSTS}
    return NEST(logits, labels, class_weights=class_weights, trust=trust, **own)


def test_a_nest_under_traced_weights_is_one_graph_and_mapped_is_a_loop():
    trust = scalar(0.7)
    arguments = (LOGITS, LABELS, WEIGHTS, trust)

    def per_example(logits, labels, weights, trust):
        slopes = grad(of_nest, argnums=(0, 2, 3))
        return vmap(slopes, in_dims=(0, 0, None, None))(logits, labels, weights, trust)

    of_logits, of_weights, of_trust = per_example(*arguments)
    one_hot = F.one_hot(LABELS, CLASSES)
    assert_close(of_weights, 0.7 * HALF_SMOOTH[:, None] * one_hot)
    assert_close(of_trust, PAYS * HALF_SMOOTH)
    probs = LOGITS.softmax(-1)
    rows = COSTS[LABELS]
    cost = probs * (rows - (probs * rows).sum(-1, keepdim=True))
    fit = ((LOGITS / 2).softmax(-1) - 0.7 * one_hot - 0.3 / CLASSES) / 2
    assert_close(of_logits, 0.7 * PAYS[:, None] * fit + 0.5 * cost)
    compiled = torch.compile(per_example, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*arguments), (of_logits, of_weights, of_trust))
    whole = torch.compile(of_nest, fullgraph=True, backend="aot_eager")
    assert_close(whole(*arguments), of_nest(*arguments))
    table = torch.stack([WEIGHTS, 2 * WEIGHTS, WEIGHTS.flip(0)])
    swept = vmap(of_nest, in_dims=(None, None, 0, None))(LOGITS, LABELS, table, trust)
    assert_close(swept, torch.stack([of_nest(LOGITS, LABELS, w, trust) for w in table]))


# -- what would be wrong in silence ---------------------------------------------------------------


def plainly_written(logits, labels, where=None):
    return losses.cross_entropy(logits, labels, where=where)


def without_where(logits, labels):
    return losses.cross_entropy(logits, labels)


def test_where_reaches_a_term_however_it_takes_it_or_is_refused():
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    where = torch.tensor([True, False, True])
    terms = {"a": (1.0, losses.cross_entropy), "b": (1.0, plainly_written)}
    assert summed(terms)(logits, labels, where=where)[1] == 0.0
    terms["c"] = (1.0, without_where)
    with pytest.raises(TypeError, match="the term 'c' takes no `where`"):
        summed(terms)(logits, labels, where=where)
    assert summed(terms)(logits, labels).shape == (3,)


def test_an_option_that_is_a_factor_too_goes_to_both():
    logits, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    got = scaled(losses.poly1, "epsilon")(logits, labels, epsilon=2.0)
    torch.testing.assert_close(got, 2 * losses.poly1(logits, labels, epsilon=2.0))
    twice = scaled(scaled(losses.cross_entropy, "a"), "a")(logits, labels, a=3.0)
    torch.testing.assert_close(twice, 9 * losses.cross_entropy(logits, labels))


def test_a_factor_is_no_vector():
    with pytest.raises(ValueError, match="a factor must be a number or a scalar tensor"):
        scaled(losses.squared_error, torch.ones(3, 1))(torch.ones(3), torch.zeros(3))


def test_a_loss_that_knows_no_where_is_taken_as_it_is():
    logits, labels, weights = torch.randn(3, 4), torch.tensor([0, 1, 2]), torch.arange(4.0)
    plain = losses.cross_entropy(logits, labels)
    got = class_weighted(without_where)(logits, labels, class_weights=weights)
    torch.testing.assert_close(got, weights[labels] * plain)
    torch.testing.assert_close(from_logits(without_where)(logits, labels), plain)
    for made in (smoothed(without_where), soft(without_where), mixup(without_where)):
        assert made.losses == (without_where,)
    smoothed(without_where)(logits, labels)


def test_a_masked_row_leaves_the_gradient_of_a_temperature_alone():
    logits, labels = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), torch.tensor([0, 99])
    where = torch.tensor([True, False])
    loss = temperature(losses.cross_entropy, "t")
    slope = grad(lambda t: loss(logits, labels, where=where, t=t).sum())(torch.tensor(2.0))
    alone = grad(lambda t: loss(logits[:1], labels[:1], t=t).sum())(torch.tensor(2.0))
    torch.testing.assert_close(slope, alone)


@pytest.mark.parametrize("label", [-100, 3])
def test_compiled_a_label_out_of_range_is_nan_and_not_0(label):
    compiled = torch.compile(losses.cross_entropy, fullgraph=True, backend="aot_eager")
    values = compiled(torch.zeros(2, 3), torch.tensor([0, label]))
    assert values[0].isfinite()
    assert values[1].isnan()
