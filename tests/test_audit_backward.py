"""Class parts from a loop's own graph: what they are of, how they add up, what is said of them."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from funcloss.audit import watch
from funcloss.errors import ConfigError

CLASSES, N = 4, 12
COSTS = torch.tensor([1.0, 3.0, 0.5, 2.0]).double()


class Net(nn.Module):
    """Everything that couples examples or draws random numbers in training mode."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(4 * 16, CLASSES)
        self.unused, self.reentrant = nn.Linear(2, 2), reentrant

    def forward(self, x):
        h = self.norm(self.conv(x)).relu()
        if self.reentrant is not None:
            h = checkpoint(lambda h: h.tanh().square(), h, use_reentrant=self.reentrant)
        return self.last(self.drop(h.flatten(1)))


def make_net(**options):
    torch.manual_seed(0)
    return Net(**options).double()


def batch_of(number, classes=CLASSES):
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, classes, (N,), generator=generator)
    noise = torch.randn(N, 1, 6, 6, generator=generator).double()
    return noise + labels[:, None, None, None], labels


def terms(model, inputs, labels, *, seed=0):
    """Return a value per example under the masks of a seed."""
    torch.manual_seed(seed)
    return F.cross_entropy(model(inputs), labels, reduction="none")


def expected_parts(model, inputs, labels, weights=None, divisor=N, groups=None):
    """Return each class's gradient from a forward and a backward pass of its own."""
    groups, rows = labels if groups is None else groups, []
    for c in range(CLASSES):
        twin = copy.deepcopy(model)
        values = terms(twin, inputs, labels)
        values = values if weights is None else weights[groups] * values
        grads = torch.autograd.grad(
            values[groups == c].sum() / divisor, [*twin.parameters()], materialize_grads=True
        )
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def shares(rows):
    whole = rows.sum(0)
    return rows @ whole / (whole @ whole)


def grads_of(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def watched_net(
    make=lambda params: optim.SGD(params, lr=0.1, momentum=0.9), *, net=None, **options
):
    model = make_net() if net is None else net
    optimizer = make(model.parameters())
    return model, optimizer, watch(model, optimizer, **{"classes": CLASSES, **options})


# What the parts are.

MODELS = {"plain": {}, "checkpointed": {"reentrant": False}}


@pytest.mark.parametrize("entry", ["backward", "through"])
@pytest.mark.parametrize("weights", [None, COSTS], ids=["", "weighted"])
@pytest.mark.parametrize("model", MODELS)
def test_shares_are_those_of_a_backward_pass_per_class(model, weights, entry):
    model, optimizer, watched = watched_net(net=make_net(**MODELS[model]))
    for step in range(3):
        inputs, labels = batch_of(step)
        expected, twin = expected_parts(model, inputs, labels, weights), copy.deepcopy(model)
        plain = terms(twin, inputs, labels)
        (plain if weights is None else weights[labels] * plain).mean().backward()
        optimizer.zero_grad()
        torch.manual_seed(0)
        logits = model(inputs)
        values = F.cross_entropy(logits, labels, reduction="none")
        if entry == "backward":
            watched.backward(values, labels, class_weights=weights)
        else:
            watched.through(logits, labels)
            (values if weights is None else weights[labels] * values).mean().backward()
        assert same(grads_of(model), grads_of(twin))  # to the bit
        optimizer.step()
        found = watched.found
        assert found.note == ""
        assert_close(found.balance.share, shares(expected), rtol=1e-9, atol=1e-9)
        assert_close(found.balance.norm, expected.norm(dim=1), rtol=1e-9, atol=1e-12)
        assert found.moved < 1e-12
        assert float(found.step.share.sum()) == pytest.approx(1.0)
        if entry == "backward":
            counts = labels.bincount(minlength=CLASSES)
            assert_close(found.count, counts)
            losses = torch.zeros(CLASSES).double().index_add_(0, labels, values.detach()) / counts
            assert_close(found.loss.double(), losses, rtol=1e-6, atol=0, equal_nan=True)
            held = torch.ones(CLASSES).double() if weights is None else weights
            assert_close(found.balance.expected_share, held * counts / (held * counts).sum())


def test_terms_may_be_of_any_shape_and_groups_are_whatever_they_are_named():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)).double()
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    watched = watch(model, optimizer)
    inputs, labels = torch.randn(2, 1, 4, 4).double(), torch.arange(32).reshape(2, 4, 4) % 3
    domains = 10 * (labels + 1)
    domains[0, 0] = -1
    values = F.cross_entropy(model(inputs), labels, reduction="none")
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(
            values[domains == d].sum() / 32, [*model.parameters()], retain_graph=True)])
        for d in (10, 20, 30, -1)
    ]  # fmt: skip
    watched.backward(values, domains)
    optimizer.step()
    found = watched.found
    assert found.classes == ("10", "20", "30", "no group")
    assert_close(found.balance.share, shares(torch.stack(rows)))
    assert found.count.tolist() == [(domains == d).sum().item() for d in (10, 20, 30, -1)]


def test_predictions_may_have_their_classes_second_or_be_grouped_one_by_one():
    torch.manual_seed(0)
    model = nn.Conv2d(1, 3, 3, padding=1).double()
    inputs, labels = torch.randn(2, 1, 4, 5).double(), torch.arange(40).reshape(2, 4, 5) % 3

    def found(*groups, loss, **options):
        optimizer = optim.SGD(model.parameters(), lr=0.0)
        watched = watch(model, optimizer, classes=3)
        optimizer.zero_grad()
        logits = model(inputs)
        watched.through(logits, *groups, **options)
        loss(logits).backward()
        optimizer.step()
        return watched.found

    by_pixel = found(labels, loss=lambda z: F.cross_entropy(z, labels), class_dim=1)
    optimizer = optim.SGD(model.parameters(), lr=0.0)
    watched = watch(model, optimizer, classes=3)
    optimizer.zero_grad()
    watched.backward(F.cross_entropy(model(inputs), labels, reduction="none"), labels)
    optimizer.step()
    assert_close(by_pixel.balance.share, watched.found.balance.share)
    each = torch.arange(3)[None, :, None, None].expand(2, 3, 4, 5)
    targets = (each == labels[:, None]).double()
    by_label = found(each, loss=lambda z: F.binary_cross_entropy_with_logits(z, targets))
    rows = []
    for c in range(3):
        values = F.binary_cross_entropy_with_logits(model(inputs), targets, reduction="none")
        part = values[:, c].sum() / values.numel()
        grads = torch.autograd.grad(part, [*model.parameters()])
        rows.append(torch.cat([g.flatten() for g in grads]))
    assert_close(by_label.balance.share, shares(torch.stack(rows)))


@pytest.mark.parametrize("to_none", [True, False])
def test_parts_of_micro_batches_add_up(to_none):
    model, optimizer, watched = watched_net(lambda params: optim.AdamW(params, lr=0.1))
    for step in range(2):
        batches = [batch_of(10 * step + i) for i in range(3)]
        twin, rows = copy.deepcopy(model), 0.0
        for inputs, labels in batches:
            rows = rows + expected_parts(twin, inputs, labels, COSTS, divisor=3 * N)
            terms(twin, inputs, labels)  # moves its running statistics on
        optimizer.zero_grad(set_to_none=to_none)
        for inputs, labels in batches:
            values = terms(model, inputs, labels)
            watched.backward(values, labels, class_weights=COSTS, divisor=3 * N)
        optimizer.step()
        assert_close(watched.found.balance.share, shares(rows), rtol=1e-8, atol=1e-8)
        assert watched.found.note == ""
        assert watched.found.moved < 1e-12
        assert int(watched.found.count.sum()) == 3 * N


def test_little_memory_puts_the_rarest_classes_into_one_row():
    model = make_net()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    _, optimizer, watched = watched_net(net=model, memory=2.5 * size / 2**20)
    labels = torch.tensor([0, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 2])
    inputs, _ = batch_of(0)
    expected = expected_parts(model, inputs, labels)
    watched.backward(terms(model, inputs, labels), labels)
    optimizer.step()
    found = watched.found
    assert found.classes == ("1", "other classes")
    assert "memory=" in found.note
    assert found.count.tolist() == [5, 7]
    rows = torch.stack([expected[1], expected[[0, 2, 3]].sum(0)])
    assert_close(found.balance.share, shares(rows))


def test_little_memory_holds_over_micro_batches():
    """Classes that have a row keep it; those that come later share one."""
    model = make_net().eval()  # the same masks, none, in all
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    _, optimizer, watched = watched_net(net=model, memory=2.5 * size / 2**20)
    first = torch.tensor([0] * 9 + [1] * 3)
    second = torch.tensor([1] * 5 + [2] * 4 + [3] * 2 + [0])
    inputs, _ = batch_of(0)
    rows = expected_parts(model, inputs, first) + expected_parts(model, inputs, second)
    for labels in (first, second):
        watched.backward(terms(model, inputs, labels), labels)
    optimizer.step()
    found = watched.found
    assert found.classes == ("0", "1", "other classes")
    assert found.count.tolist() == [10, 8, 6]
    assert_close(found.balance.share, shares(torch.stack([*rows[:2], rows[2:].sum(0)])))


# What the optimiser gets may be another gradient, and that is found.


def by_norm(model):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def by_value(model):
    nn.utils.clip_grad_value_(model.parameters(), 1e-3)


def scaled(model):
    for p in model.parameters():
        if p.grad is not None:
            p.grad *= 3.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (by_norm, "was clipped or scaled, by a factor of"),
        (by_value, "was clipped entry by entry, at 0.001"),
        (scaled, "was scaled, by a factor of 3, "),
    ],
)
@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_clipping_after_the_backward_pass_is_found(kind, change, said):
    model, optimizer, watched = watched_net(lambda params: getattr(optim, kind)(params, lr=0.1))
    inputs, labels = batch_of(0)
    rows = expected_parts(model, inputs, labels)
    watched.backward(terms(model, inputs, labels), labels)
    change(model)
    grads = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten()
                       for p in model.parameters()])  # fmt: skip
    optimizer.step()
    found = watched.found
    assert said in found.note
    assert found.moved < 1e-12
    assert_close(found.balance.share, shares(rows))  # of the gradient itself
    whole = rows.sum(0)
    factor = torch.where(whole == 0, 0.0, grads / whole)
    if kind == "SGD":  # whose step is the gradient that it gets
        assert_close(found.step.share[:CLASSES], shares(rows * factor))


def test_a_penalty_is_a_row_of_its_own():
    model, optimizer, watched = watched_net(lambda params: optim.SGD(params, lr=0.1))
    inputs, labels = batch_of(0)
    rows = expected_parts(model, inputs, labels)
    watched.backward(terms(model, inputs, labels), labels)
    penalty = sum(p.square().sum() for p in model.parameters())
    penalty.backward()
    beside = torch.cat([2.0 * p.detach().flatten() for p in model.parameters()])
    optimizer.step()
    found = watched.found
    assert found.step.rows == (*"0123", "other gradient", "weight decay", "history")
    assert "the rest is the row 'other gradient'" in found.note
    assert_close(found.step.share[:5], shares(torch.cat([rows, beside[None]])))
    assert found.moved < 1e-12


def test_a_step_that_is_not_the_one_told_is_noted():
    model = make_net()
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    def push(optimizer, args, kwargs):
        with torch.no_grad():
            model.last.weight += 1.0

    optimizer.register_step_post_hook(push)
    watched = watch(model, optimizer, classes=CLASSES)
    watched.backward(terms(model, *batch_of(0)), batch_of(0)[1])
    optimizer.step()
    assert "is not the one that was told" in watched.found.note
    assert watched.found.moved > 0.1


def test_a_scaler_is_taken_out_again():
    model, optimizer, watched = watched_net(lambda params: optim.SGD(params, lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    inputs, labels = batch_of(0)
    rows = expected_parts(model, inputs, labels)
    watched.backward(terms(model, inputs, labels), labels, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert watched.found.note == ""
    assert watched.found.moved < 1e-12
    assert_close(watched.found.balance.norm, rows.norm(dim=1))
    # A step that the scaler skips is not told, and leaves nothing to the next.
    before = watched.found
    optimizer.zero_grad()
    watched.backward(terms(model, inputs, labels), labels, scaler=scaler)
    model.last.weight.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert watched.found is before
    optimizer.zero_grad()
    rows = expected_parts(model, inputs, labels)
    watched.backward(terms(model, inputs, labels), labels, scaler=scaler)
    scaler.step(optimizer)
    assert_close(watched.found.balance.norm, rows.norm(dim=1))


def test_parts_that_cancel_are_told_to_be_rounding():
    model = nn.Linear(2, 1, bias=False).double()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    watched = watch(model, optimizer, classes=2)
    inputs = torch.tensor([[1.0, 2.0], [1.0, 2.0 + 1e-6]]).double()
    signs = torch.tensor([1.0, -1.0]).double()
    watched.backward(signs * model(inputs)[:, 0], torch.tensor([0, 1]))
    optimizer.step()
    assert "the class parts cancel" in watched.found.note


# What cannot be told does not end a training.


def test_a_loss_that_is_not_finite_is_noted_and_the_next_step_told():
    model, optimizer, watched = watched_net()
    inputs, labels = batch_of(0)
    state = copy.deepcopy(model.state_dict())
    watched.backward(terms(model, inputs * math.nan, labels), labels)
    optimizer.step()
    assert "the loss is not finite" in watched.found.note
    assert watched.found.records() == []
    model.load_state_dict(state)
    optimizer.state.clear()
    optimizer.zero_grad()
    watched.backward(terms(model, inputs, labels), labels)
    optimizer.step()
    assert watched.found.note == ""
    assert watched.found.moved < 1e-12


FAILURES = {
    "reentrant": (lambda: make_net(reentrant=True), lambda y: y, "use_reentrant=False"),
    "labels out of range": (make_net, lambda y: y + 3, "labels must be below 4"),
    "floating groups": (make_net, lambda y: y.double(), "groups must be integers"),
    "another shape": (make_net, lambda y: y[:-1], "groups must be integers of the shape"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("case", FAILURES)
def test_what_cannot_be_split_is_noted_and_trained(case):
    make, change, said = FAILURES[case]
    model, optimizer, watched = watched_net(net=make())
    twin = make()
    inputs, labels = batch_of(0)
    terms(twin, inputs, labels).mean().backward()
    watched.backward(terms(model, inputs, labels), change(labels))
    assert same(grads_of(model), grads_of(twin))
    optimizer.step()
    assert said in watched.found.note
    assert watched.found.step is None


def test_class_weights_that_fit_no_group_leave_no_loss_to_take():
    model, optimizer, watched = watched_net()
    inputs, labels = batch_of(0)
    with pytest.raises(ValueError, match=r"a weight for each group, got \(2,\) for groups up to 3"):
        watched.backward(terms(model, inputs, labels), labels, class_weights=COSTS[:2])


def test_it_looks_at_every_so_many_steps_and_not_at_validation():
    seen = []
    model, optimizer, watched = watched_net(every=3, on_step=seen.append)
    for step in range(7):
        inputs, labels = batch_of(step)
        optimizer.zero_grad()
        logits = model(inputs)
        watched.through(logits, labels)
        F.cross_entropy(logits, labels).backward()
        with torch.no_grad():
            watched.through(model(inputs), labels)
        optimizer.step()
    assert len(seen) == 3
    assert seen[-1] is watched.found
    watched.close()
    optimizer.step()
    assert len(seen) == 3


def test_gradients_from_a_closure_are_told():
    model, optimizer, watched = watched_net(lambda params: optim.SGD(params, lr=0.1))
    inputs, labels = batch_of(0)
    rows = expected_parts(model, inputs, labels)

    def closure():
        optimizer.zero_grad()
        values = terms(model, inputs, labels)
        watched.backward(values, labels)
        return values.mean()

    for step in (lambda: optimizer.step(closure), lambda: optimizer.step(closure=closure)):
        rows = expected_parts(model, inputs, labels)
        step()
        assert_close(watched.found.balance.share, shares(rows))
        assert watched.found.moved < 1e-12


class GradSampleModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (GradSampleModule(), "Opacus' hooks.*before make_private"),
        (nn.DataParallel(nn.Linear(2, 2)), "DataParallel: use DistributedDataParallel"),
    ],
)
def test_models_that_cannot_be_watched_are_refused_at_once(model, said):
    with pytest.raises(ConfigError, match=f"^watch: .*{said}"):
        watch(model, optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("options", [{"every": 0}, {"memory": 0.0}, {"memory": math.inf}])
def test_settings_that_make_no_sense_are_refused(options):
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="^watch: every must be at least 1, and memory positive"):
        watch(model, optim.SGD(model.parameters(), lr=0.1), **options)
