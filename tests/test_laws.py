"""The laws: every loss keeps them, every law can be broken, and the published losses' verdicts."""

import inspect
import json
import math
from dataclasses import replace

import check_cases
import pytest
import torch
import tutorial_losses
from catalogue import CASES
from catalogue.rows import VALUES
from torch import nn

from funcloss import class_weighted, from_module, laws, losses, mean
from funcloss.errors import ConfigError
from funcloss.laws import LAWS, adapt, check, cost_effect, try_law

QUICK = [name for name in LAWS if name != "inductor"]
PUBLIC = [
    name
    for name in losses.__all__
    if "where" in inspect.signature(getattr(losses, name)).parameters
]


FIRST = {case.loss.__module__: name for name, case in reversed(CASES.items())}.values()  # of a room

LONG = ("compile", "labels out of range", "cost effect", "gradgradcheck")


def law_of(name, law):
    # By default the long laws are tried of a row of each room, and of all where the default
    # compiler is tried too.
    slow = law in LONG and name not in FIRST
    marks = [pytest.mark.slow] if slow else []
    return pytest.param(name, law, id=f"{name}-{law}", marks=marks)


@pytest.mark.parametrize(("name", "law"), [law_of(n, law) for n in CASES for law in QUICK])
def test_every_loss_keeps_every_law(name, law):
    finding = try_law(law, CASES[name])
    assert finding.verdict != "fail", finding.detail
    assert finding.verdict == "pass" or finding.detail, "a law is skipped in silence"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in FIRST else [pytest.mark.long]) for n in CASES],
)
def test_the_default_compiler_changes_nothing(name):
    finding = try_law("inductor", CASES[name])
    assert finding.verdict != "fail", finding.detail


def test_every_loss_has_a_row_and_every_row_names_laws():
    tried = {name.split(",")[0] for name in CASES}
    assert set(PUBLIC) - {"linear_cross_entropy"} <= tried  # which has tests of its own
    for case in CASES.values():
        assert set(case.limits) <= set(LAWS)
        assert set(case.costs) <= set(case.options)
        assert case.reference is not None


# -- every law can be broken ----------------------------------------------------------------------


def of_labels(z, y, where=None):
    return losses.cross_entropy(z, y, where=where)


def minus_the_batch(z, y):
    return losses.cross_entropy(z - z.mean(-2, keepdim=True), y)


def detached(z, y):
    return (z.detach() * losses.cross_entropy(z, y)[..., None]).sum(-1)


def twice_detached(z, y):
    """Its gradient is right, the gradient of that is not."""
    still = z.detach()
    slope = z.detach().softmax(-1) - torch.nn.functional.one_hot(y, z.shape[-1])
    return losses.cross_entropy(still, y) + (slope * (z - still)).sum(-1)


class WrongJvp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return z * z

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx, t):
        return 3 * t * ctx.saved_tensors[0]


class NotAGradient(torch.autograd.Function):
    """Its backward is the gradient of no function: it turns the last axis."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return z.square().sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g[..., None] * ctx.saved_tensors[0].roll(1, -1)

    @staticmethod
    def jvp(ctx, t):
        return (t * ctx.saved_tensors[0].roll(1, -1)).sum(-1)


def with_item(z, y):
    return losses.cross_entropy(z, y) * (1.0 if z.sum().item() > 0 else 2.0)


def by_exp(z, y):
    return (z.exp().sum(-1) / z.exp().gather(-1, y[..., None]).squeeze(-1)).log()


def masked_by_zero(z, y, where=None):
    values = losses.cross_entropy(z, y.clamp(max=z.shape[-1] - 1))
    return values if where is None else values * where


def in_double(z, y):
    return losses.cross_entropy(z.double(), y)


def in_place(z, y):
    z.data.sub_(1.0)
    return losses.cross_entropy(z, y)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, y):
        self.calls += 1
        return losses.cross_entropy(z, y)


def of_the_next_class(z, y, class_weights):
    weights = class_weights.roll(1).gather(0, y.reshape(-1)).reshape(y.shape)
    return weights * losses.cross_entropy(z, y)


def of_scores(z, y):
    return -z.gather(-1, y[..., None]).squeeze(-1).exp()


def divided(z, y, class_weights):
    values = losses.cross_entropy(z, y)
    return (class_weights[y] * values).sum() / class_weights[y].sum()


def cheaper(z, y, class_weights):
    return losses.cross_entropy(z, y) / class_weights.gather(0, y.reshape(-1)).reshape(y.shape)


def off(z, y):
    return losses.cross_entropy(z, y) + 1e-3


def by_comparison(z, y):
    """A label out of range is no column's."""
    return -torch.where(y[..., None] == torch.arange(z.shape[-1]), z.log_softmax(-1), 0).sum(-1)


def broadcasting(z, y, gamma):
    return losses.cross_entropy(z, y) * gamma


class Forgetful:
    """Its pickle leaves out what it needs."""

    def __init__(self):
        self.power = 1.0

    def __call__(self, z, y):
        return losses.cross_entropy(z, y) * self.power

    def __getstate__(self):
        return {"other": 1}

    def __deepcopy__(self, memo):
        return Forgetful()


BREAKERS = [
    ("has a gradient", check_cases.zero_one, "0 everywhere: see argmax"),
    ("direction", check_cases.minus_cross_entropy, "certain and wrong -20"),
    ("not flat", check_cases.clamped_probabilities, "surest and wrong"),
    ("saturation", check_cases.focal_of_a_root, "gradient is nan"),
    ("vmap", check_cases.doubled_in_place, "boolean|dynamic shape"),
    ("pickles", Forgetful(), "out of pickle it raised AttributeError"),
    ("runs", tutorial_losses.float_labels, "raised RuntimeError"),
    ("runs", tutorial_losses.published_sum_over_classes, "out of bounds"),
    ("map over examples", minus_the_batch, "alone"),
    ("map over examples", lambda z, y: z, "not one value per example"),
    ("per-sample gradients", tutorial_losses.published_costly_nine, "mean of its examples"),
    ("gradcheck", lambda z, y: NotAGradient.apply(z), "Jacobian mismatch"),
    ("gradgradcheck", twice_detached, "mismatch|Numerical"),
    ("jacrev = jacfwd", lambda z, y: WrongJvp.apply(z).sum(-1), "jacfwd, against jacrev"),
    ("hessian", lambda z, y: NotAGradient.apply(z), "against its transpose"),
    ("compile", with_item, "torch.compile of the value"),
    ("compile", tutorial_losses.NumpyCrossEntropy, "torch.compile of vmap"),
    ("extremes", by_exp, "at predictions of 10000"),
    ("masked = dropped", masked_by_zero, "masked"),
    ("dtype", in_double, "float16 in, torch.float64 out"),
    ("pure", in_place, "it changed what it was given"),
    ("pure", Counting, "it keeps a state: calls"),
    ("class permutation", of_the_next_class, "after the classes changed places"),
    ("weights", divided, "alone, an example of class weight"),
    ("cost order", cheaper, "changes the value by -"),
    ("cost effect", check_cases.class_three_dropped, "class 3 weighs 0"),
]


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
@pytest.mark.parametrize(("law", "loss", "detail"), BREAKERS)
def test_every_law_can_be_broken(law, loss, detail):
    case = adapt(loss, classes=10 if "costly_nine" in str(loss) else 5).case
    finding = try_law(law, case)
    assert finding.verdict == "fail", finding
    assert finding.advice
    with pytest.raises(AssertionError, match=detail):
        raise AssertionError(finding.detail)


@pytest.mark.parametrize(
    ("law", "change"),
    [
        ("reference", {"loss": off}),
        ("shift", {"loss": of_scores, "shift": True}),
        ("labels out of range", {"loss": by_comparison}),
        ("option shapes", {"loss": broadcasting, "options": {"gamma": 2.0}}),
    ],
)
def test_laws_that_only_the_catalogue_can_break(law, change):
    assert try_law(law, replace(CASES["cross_entropy"], **change)).verdict == "fail"


def with_alpha(z, y):
    """inductor takes its sum for a product's bias, and drops the -0.5."""
    wanted = (y[..., None] == torch.arange(z.shape[-1])).to(z)
    return torch.add(z, wanted, alpha=-0.5).square().sum(-1)


@pytest.mark.slow
def test_inductor_is_broken_by_what_it_compiles_wrongly_behind_a_linear_layer():
    finding = try_law("inductor", adapt(with_alpha, classes=3).case)
    assert finding.verdict == "fail"
    assert finding.detail.startswith("compiled a linear layer, against eager: ")
    assert "c * b" in finding.advice
    assert try_law("compile", adapt(with_alpha, classes=3).case).verdict == "pass"


def test_inductor_is_a_law_of_its_own():
    of_ours = {"reference", "shift", "inductor", "labels out of range", "option shapes"}
    assert {name for name, *_ in BREAKERS} | of_ours == set(LAWS)


def test_the_smallest_counter_example_is_shown():
    finding = try_law("map over examples", adapt(minus_the_batch, classes=3).case)
    assert finding.detail.count("[") == 4  # two examples of three logits, and two labels


def test_a_loss_that_does_not_run_says_so_once():
    findings = check(adapt(tutorial_losses.float_labels).case)
    assert [f.verdict for f in findings].count("fail") == 1
    assert "labels are integers" in findings[0].advice


# -- the published losses -------------------------------------------------------------------------

FUNCTORCH = {"per-sample gradients", "gradcheck", "jacrev = jacfwd", "hessian", "compile"}
VERDICTS = [
    ("published_costly_nine", "classification",
     {"map over examples", "per-sample gradients", "cost effect"}),
    ("meant_costly_nine", "classification", set()),
    ("weighted_by_torch", "classification",
     {"map over examples", "per-sample gradients", "dtype", "cost effect"}),
    ("float_labels", "classification", {"runs"}),
    ("WeightedL1", "regression", set()),
    ("WeightedL1Function", "regression", FUNCTORCH),
    ("published_sum_over_classes", "classification", {"runs"}),
    ("meant_sum_over_classes", "classification", {"vmap"}),
    ("hand_made_cross_entropy", "classification", {"extremes", "saturation", "vmap"}),
    ("NumpyCrossEntropy", "classification",
     FUNCTORCH | {"gradgradcheck", "extremes", "saturation", "dtype", "pure", "vmap"}),
    ("custom_mean_squared_error", "regression", set()),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
@pytest.mark.parametrize(("name", "task", "broken"), VERDICTS)
def test_the_published_losses_get_the_verdict_they_deserve(name, task, broken):
    nine = {9: 2.0} if name.endswith(("nine", "torch")) else None
    case = adapt(getattr(tutorial_losses, name), task=task, class_weights=nine).case
    assert {f.law for f in check(case) if f.verdict == "fail"} == broken


@pytest.mark.parametrize("batch_size", [8, 32, 256])
def test_the_published_cost_acts_across_batches_only_and_as_the_formula_says(batch_size):
    case = adapt(
        tutorial_losses.published_costly_nine, class_weights={9: 2.0}, batch_size=batch_size
    ).case
    effect = cost_effect(case)
    share = 0.1
    expected = (batch_size + 1 + (batch_size - 1) * share) / (batch_size + (batch_size - 1) * share)
    assert effect.within[9] == pytest.approx(1.0, abs=1e-6)
    assert effect.across[9] == pytest.approx(expected, abs=2e-3)
    assert effect.alone[9] == pytest.approx(2.0, abs=1e-6)


def test_the_meant_cost_weighs_two_at_any_batch_size():
    case = adapt(tutorial_losses.meant_costly_nine, class_weights={9: 2.0}).case
    effect = cost_effect(case)
    for factors in (effect.within, effect.across, effect.alone):
        torch.testing.assert_close(factors, torch.tensor([1.0] * 9 + [2.0]).double())


def test_the_weights_of_torch_vanish_at_batch_size_one():
    case = adapt(tutorial_losses.weighted_by_torch, class_weights={9: 2.0}).case
    effect = cost_effect(case)
    assert effect.within[9] == pytest.approx(2.0, abs=1e-5)
    assert 1.5 < effect.across[9] < 1.99
    assert effect.alone[9] == pytest.approx(1.0, abs=1e-5)
    assert "divided out" in try_law("cost effect", case).detail


def test_two_classes_and_their_costs():
    def costly_positives(logits, targets):
        return losses.binary_cross_entropy_with_logits(logits, targets, pos_weight=3.0)

    effect = cost_effect(adapt(costly_positives, task="binary", class_weights={1: 3.0}).case)
    torch.testing.assert_close(effect.within, torch.tensor([1.0, 3.0]).double())


def infinite_cost(z, y):
    return losses.cross_entropy(z, y) * (y == 4)


def no_gradient(z, y):
    return (z * 0).sum(-1) + (z.argmax(-1) != y)


def masked_mean(z, y, *, where=None):
    return mean(losses.cross_entropy(z, y, where=where), where=where)


def by_index(z, y, class_weights):
    return class_weights[y] * torch.nn.functional.cross_entropy(z, y, reduction="none")


def by_mask(z, y):
    values, nine = losses.cross_entropy(z, y), y == 9
    values[nine] *= 2
    return values


def of_torchs_weight(z, y, class_weights):
    return torch.nn.functional.cross_entropy(z, y, weight=class_weights, reduction="none")


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, z, y):
        self.calls += 1
        return losses.cross_entropy(z, y)


def ordered(z, y, class_weights):
    return class_weighted(losses.earth_mover)(z, y, class_weights=class_weights)


def quits(z, y):
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("loss", "law", "verdict", "says"),
    [
        (infinite_cost, "cost effect", "fail", "classes 0, 1, 2, 3 weigh 0"),
        (no_gradient, "cost effect", "not applicable", "see has a gradient"),
        (detached, "gradcheck", "not applicable", "part of it is detached"),
        (masked_mean, "masked = dropped", "pass", ""),
        (masked_mean, "map over examples", "pass", ""),
        (by_index, "per-sample gradients", "fail", "in the lookup class_weights[y]: vmap: "),
        (by_mask, "per-sample gradients", "fail", "in the boolean index values[nine]: vmap: "),
        (of_torchs_weight, "extremes", "pass", ""),
        (of_torchs_weight, "cost order", "pass", ""),
        (of_torchs_weight, "gradcheck", "pass", ""),
        (Counter, "pure", "fail", "it keeps a state: calls"),
        (ordered, "class permutation", "not applicable", "treats its classes differently"),
        (ordered, "cost effect", "pass", "0: 0.67"),
        (quits, "runs", "fail", "raised SystemExit"),
    ],
)
def test_the_verdict_is_about_the_loss_and_not_about_the_trial(loss, law, verdict, says):
    finding = try_law(law, adapt(loss, classes=5).case)
    assert finding.verdict == verdict, finding
    assert says in finding.detail


@pytest.mark.parametrize(("loss", "instead"), [(by_index, "gather"), (by_mask, "torch.where")])
def test_what_to_write_instead_of_an_index(loss, instead):
    finding = try_law("per-sample gradients", adapt(loss, classes=5).case)
    assert instead in finding.advice


def test_a_module_with_a_state_spoils_no_law_but_its_own():
    broken = {f.law for f in check(adapt(Counting, classes=5).case) if f.verdict == "fail"}
    assert "pure" in broken
    assert "extremes" not in broken


# -- what a loss may be ---------------------------------------------------------------------------


def reduced(z, y, class_weights):
    return mean(class_weighted(losses.cross_entropy)(z, y, class_weights=class_weights))


@pytest.mark.parametrize(
    ("loss", "task", "kind"),
    [
        (lambda z, y: losses.cross_entropy(z, y), "", "function, one value per example"),
        (reduced, "", "function, reduced by the mean"),
        (nn.CrossEntropyLoss, "", "module, reduced by the mean"),
        (nn.CrossEntropyLoss(reduction="sum"), "", "module, reduced by the sum"),
        (lambda: nn.CrossEntropyLoss(reduction="none"), "", "module, one value per example"),
        (nn.BCEWithLogitsLoss, "binary", "module, reduced by the mean"),
        (nn.MSELoss, "regression", "module, reduced by the mean"),
        (nn.TripletMarginLoss, "embedding", "module, reduced by the mean"),
        (from_module(nn.L1Loss()), "regression", "function, one value per example"),
        (class_weighted(losses.cross_entropy), "", "function, one value per example"),
        (losses.triplet_margin, "", "function, one value per example"),
    ],
)
def test_anything_that_is_meant_as_a_loss_is_tried(loss, task, kind):
    adapted = adapt(loss, task=task, classes=4)
    assert adapted.kind == kind
    for law in ("runs", "map over examples", "gradcheck", "weights", "cost effect"):
        finding = try_law(law, adapted.case)
        assert finding.verdict != "fail", finding


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (3, {}, "a loss must be a function, a module or an autograd.Function; got int"),
        (lambda: 3, {}, "gave int, which is no loss"),
        (lambda: 1 / 0, {}, "raised ZeroDivisionError"),
        (of_labels, {"task": "ranking"}, "task must be one of classification, binary"),
        (of_labels, {"class_weights": {12: 2.0}}, r"class weights must name classes in 0..9"),
        (of_labels, {"task": "binary", "class_weights": {2: 2.0}}, r"classes in 0..1"),
        (of_labels, {"task": "regression", "class_weights": {1: 2.0}}, "regression has none"),
        (losses.huber, {"class_weights": {1: 2.0}}, "regression has none"),
        (losses.sigmoid_focal, {"class_weights": {2: 2.0}}, r"classes in 0..1"),
    ],
)
def test_what_is_no_loss_is_refused(loss, options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(loss, **options)


# -- what a loss is fed, by the names of its parameters -------------------------------------------

NOT_BY_NAMES = {"linear_cross_entropy": "its weight is no prediction, and belongs to no example"}
IMAGES = {"generalized_dice", "lovasz_softmax"}  # an example is pixels by classes, as no name says


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PUBLIC if name not in IMAGES])
def test_every_public_loss_is_fed_by_its_names_and_keeps_every_law(name):
    case = adapt(getattr(losses, name), classes=4).case
    if name in NOT_BY_NAMES:
        assert {f.law for f in check(case) if f.verdict == "fail"} == {"runs"}
        return
    # The compiler and second derivatives have no other data in the table above.
    laws = set(QUICK) - {"compile", "labels out of range", "gradgradcheck", "hessian"}
    findings = {law: try_law(law, case) for law in laws}
    assert not [f for f in findings.values() if f.verdict == "fail"]
    assert {findings[law].verdict for law in ("runs", "gradcheck", "dtype")} == {"pass"}


def of_named(*names):
    """Return a loss of parameters of these names: of classes, where the last are integers."""

    def loss(first, *others):
        last = others[-1]
        if not last.is_floating_point():
            return losses.cross_entropy(first, last)
        values = sum((first - x).square() for x in others)
        return values.sum(-1) if values.dim() > 1 else values

    loss.__signature__ = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    )
    return loss


@pytest.mark.parametrize(
    ("names", "task", "shapes"),
    [
        (("z", "y"), "classification", [(6, 5), (6,)]),
        (("logits", "labels"), "classification", [(6, 5), (6,)]),
        (("logits", "targets"), "classification", [(6, 5), (6,)]),
        (("log_probs", "targets"), "log_probs, targets", [(6, 5), (6, 5)]),
        (("scores", "signs"), "scores, signs", [(6,), (6,)]),
        (("first", "second", "signs"), "first, second, signs", [(6,), (6,), (6,)]),
        (("embeddings", "labels"), "embeddings, labels", [(6, 4), (6,)]),
        (
            ("anchors", "positives", "negatives"),
            "anchors, positives, negatives",
            [(6, 4), (6, 4), (6, 4)],
        ),
    ],
)
def test_the_names_of_the_parameters_say_what_is_fed(names, task, shapes):
    adapted = adapt(of_named(*names), classes=5)
    assert adapted.task == task
    data = adapted.case.data(6, torch.Generator().manual_seed(0))
    assert [tuple(x.shape) for x in data] == shapes


def of_bits(logits, targets):
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def of_rows(predictions, targets):
    return (predictions - targets).square().sum(-1)


def of_called_labels(logits, targets):
    return mean(losses.cross_entropy(logits, targets))


@pytest.mark.parametrize(
    ("loss", "task", "kind"),
    [
        (of_bits, "binary", "one value per example"),
        (of_rows, "predictions, targets", "one value per example"),
        (of_called_labels, "classification", "reduced by the mean"),
    ],
)
def test_of_several_feeds_the_one_that_fits_is_taken(loss, task, kind):
    adapted = adapt(loss)
    assert (adapted.task, adapted.kind) == (task, f"function, {kind}")
    assert all(f.verdict != "fail" for f in check(adapted.case))
    assert adapt(loss, task="binary").task == "binary"  # what is asked for comes first


# -- the command ----------------------------------------------------------------------------------

PUBLISHED = "tests/tutorial_losses.py:published_costly_nine"


def test_the_command_says_what_the_published_cost_does(run_cli):
    code, out, err = run_cli("check", PUBLISHED, "--class-weight", "9=2")
    assert code == 1
    assert "class 9 weighs 1.00 of the others within a batch, 1.03 across" in out
    assert "does not do what it says" in out
    assert err == f"error: {PUBLISHED} is wrong: cost effect\n"
    assert out.startswith("wrong: cost effect: class 9 weighs 1.00 of the others")
    assert out.splitlines()[1].startswith("  -> multiply each value before reducing")
    lines = [line for line in out.splitlines()[2:] if not line.startswith(" ")]
    said = ("pass", "fail", "follows", "not applicable")
    assert sum(line.startswith(said) for line in lines) == len(QUICK)
    assert sum(line.startswith("fail") for line in lines) == 1  # the others follow


def test_the_command_takes_what_works_on_batches_and_says_how_to_go_further(run_cli):
    code, out, err = run_cli("check", "tests/check_cases.py:indexed_weight")
    assert (code, err) == (0, "")
    first, cure = out.splitlines()[:2]
    assert first.startswith("works on batches: it trains and can be audited; not under vmap with")
    assert "W.gather(0, y.reshape(-1)).reshape(y.shape), not W[y]" in cure


def test_the_command_passes_the_meant_loss_and_a_loss_of_ours(run_cli):
    meant = "tests/tutorial_losses.py:meant_costly_nine"
    code, out, err = run_cli("check", meant, "--class-weight", "9=2")
    assert (code, err) == (0, ""), out
    assert out.startswith("works everywhere: ")
    assert "9: 2.00" in out
    code, out, err = run_cli("check", "funcloss.losses:triplet_margin")
    assert (code, err) == (0, "")


def test_the_command_prints_json(run_cli):
    code, out, _ = run_cli(
        "check", "torch.nn.functional:mse_loss", "--task", "regression", "--json"
    )
    assert code == 0
    report = json.loads(out)
    assert report["kind"] == "function, reduced by the mean"
    assert (report["verdict"], report["cause"], report["cure"]) == ("works everywhere", "", "")
    assert {entry["law"] for entry in report["laws"]} == set(QUICK)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere:loss"], "cannot import nowhere: ModuleNotFoundError"),
        (["tests/none.py:loss"], "no file tests/none.py"),
        (["funcloss.losses:cross_entrpy"], "did you mean cross_entropy?"),
        (["cross_entropy"], "module:name or file.py:name"),
        (["funcloss.losses:nll", "--task", "x"], "task must be one of"),
        (["funcloss.losses:nll", "--class-weight", "nine=2"], "an index and a weight"),
        (["funcloss.losses:nll", "--class-weight", "9"], "CLASS=WEIGHT"),
        (["funcloss.losses:nll", "--class-weight", "3=-1"], "an index and a weight"),
        (["funcloss.losses:__all__"], "a loss must be a function"),
    ],
)
def test_the_command_refuses_what_it_cannot_try(args, message, run_cli):
    code, out, err = run_cli("check", *args)
    assert (code, out) == (2, "")
    assert message in err


def test_a_file_that_fails_while_it_is_imported_is_named(tmp_path, run_cli):
    file = tmp_path / "mine.py"
    file.write_text("raise ValueError('no')\n")
    code, out, err = run_cli("check", f"{file}:loss")
    assert (code, out) == (2, "")
    assert "ValueError: no" in err


def test_a_file_that_exits_or_is_called_as_a_library_is_refused_or_tried(tmp_path, run_cli):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    code, out, err = run_cli("check", f"{tmp_path / 'leaves.py'}:loss")
    assert (code, out) == (2, "")
    assert "SystemExit" in err
    text = "print('hello')\nfrom funcloss.losses import cross_entropy as loss\n"
    (tmp_path / "torch.py").write_text(text)
    code, out, err = run_cli("check", f"{tmp_path / 'torch.py'}:loss", "--json")
    assert code == 0
    assert json.loads(out)["kind"] == "function, one value per example"
    assert "hello" in err


def test_a_case_of_one_s_own():
    case = laws.LossCase(losses.absolute_error, VALUES)
    assert all(f.verdict != "fail" for f in check(case))
    assert math.isfinite(case.extremes[0])


def test_the_command_prints_the_verdict_its_cause_and_its_cure_as_json(run_cli):
    code, out, _ = run_cli("check", "tests/check_cases.py:extra_softmax", "--json")
    report = json.loads(out)
    assert (code, report["verdict"], report["law"]) == (1, "wrong", "not flat")
    assert "cross-entropy of softmax(logits)" in report["cause"]
    assert "leave out the extra softmax" in report["cure"]
    assert report["causes"] == ["not flat"]


# -- the verdict ----------------------------------------------------------------------------------


def broken(*names, detail="detail"):
    return [laws.Finding(name, "fail", detail, "advice") for name in names]


@pytest.mark.parametrize(
    ("findings", "degree", "causes"),
    [
        ([laws.Finding("runs", "pass")], "works everywhere", []),
        (broken("dtype"), "works on batches", ["dtype"]),
        (broken("compile", "per-sample gradients", "vmap"), "works on batches", ["vmap"]),
        (
            broken("vmap", "per-sample gradients", "compile", detail="in the lookup W[y]"),
            "works on batches",
            ["per-sample gradients"],
        ),
        (broken("vmap", "direction"), "wrong", ["direction", "vmap"]),
        (broken("extremes", "gradcheck", "compile", "pure"), "wrong", ["pure"]),
        (broken("saturation", "extremes"), "wrong", ["extremes"]),
        (broken("map over examples", "cost effect"), "wrong", ["cost effect"]),
        (broken("masked = dropped", "dtype"), "wrong", ["masked = dropped", "dtype"]),
    ],
)
def test_the_root_cause_comes_first_and_what_follows_is_left_out(findings, degree, causes):
    verdict = laws.verdict_of(findings)
    assert (verdict.degree, [f.law for f in verdict.causes]) == (degree, causes)


def test_a_class_that_is_said_to_weigh_nothing_may():
    case = adapt(check_cases.class_three_dropped, class_weights={3: 0.0}).case
    assert laws.verdict_of(check(case)).degree == "works everywhere"


def test_of_many_classes_few_are_tried_and_neighbours_among_them():
    assert (
        try_law("direction", adapt(check_cases.of_the_next_class, classes=1000).case).verdict
        == "fail"
    )
    effect = cost_effect(adapt(of_labels, classes=1000, class_weights={777: 1.0}).case)
    assert 777 in effect.classes
    assert len(effect.classes) < 10
