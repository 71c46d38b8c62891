"""The audit beside loops of torch's own: its step, what it leaves alone, what it says it cannot."""

import copy
import functools
import math
import re

import audit_reference as ref
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch import nn, optim
from torch.testing import assert_close
from torch.utils.data import DataLoader

from funcloss import class_weighted, losses
from funcloss.audit import LossSpec, audit, watch
from funcloss.errors import ConfigError

CLASSES, N, STEPS = 4, 16, 4
NAMES = ("a", "b", "c", "d")
ROWS = (*NAMES, "weight decay", "history")
COSTS = torch.tensor([1.0, 3.0, 0.5, 2.0]).double()
WEIGHTED = LossSpec(losses.cross_entropy, COSTS)


class Model(nn.Module):
    """Two tied layers, one that nothing uses, and perhaps dropout."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.one, self.two, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)
        self.two.weight = self.one.weight
        self.unused, self.drop = nn.Linear(3, 3), nn.Dropout(drop)

    def forward(self, x):
        return self.last(self.drop(self.two(self.one(x).tanh()).tanh()))


def make_model(drop=0.0):
    torch.manual_seed(0)
    return Model(drop).double()


def batch_of(number):
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, CLASSES, (N,), generator=generator)
    return torch.randn(N, 5, generator=generator).double() + F.one_hot(labels, 5), labels


def values(model, inputs, labels):
    return COSTS[labels] * F.cross_entropy(model(inputs), labels, reduction="none")


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def one(kind, **options):
    """Return what makes an optimiser with one group for all parameters."""
    return lambda model: getattr(optim, kind)(model.parameters(), **{"lr": 0.125, **options})


def several(kind, *groups):
    """Return what makes an optimiser with a group for each layer in turn."""

    def make(model):
        layers = [model.one, model.two, model.last]
        own = [[*layers[0].parameters()], [layers[1].bias], [*layers[2].parameters()]]
        return getattr(optim, kind)(
            [{"params": params, **group} for params, group in zip(own, groups, strict=True)]
        )

    return make


OPTIMIZERS = {
    "sgd": one("SGD"),
    "sgd, decay": one("SGD", weight_decay=0.1),
    "momentum": one("SGD", momentum=0.9),
    "dampened": one("SGD", momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": one("SGD", momentum=0.9, nesterov=True, weight_decay=0.1),
    "a rate in a tensor, one by one": one("SGD", momentum=0.9, lr=torch.tensor(0.25).double(),
                                          foreach=False),
    "adam": one("Adam"),
    "adam, decay": one("Adam", betas=(0.7, 0.9), weight_decay=0.1, eps=1e-3),
    "adam without means": one("Adam", betas=(0.0, 0.0)),
    "adamw": one("AdamW"),
    "adamw, much decay": one("AdamW", eps=1e-3, weight_decay=0.3, foreach=True),
    "sgd, groups": several(
        "SGD",
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        {"lr": 0.3},
        {"lr": 0.2, "momentum": 0.5, "dampening": 0.2},
    ),
    "adamw, groups": several(
        "AdamW",
        {"lr": 0.1, "weight_decay": 0.3},
        {"lr": 0.1, "weight_decay": 0.0},
        {"lr": 0.01, "betas": (0.5, 0.6)},
    ),
}  # fmt: skip


def class_gradients(model, inputs, labels):
    """Return each class's part of the mean loss's gradient, by parameter."""
    parts = {}
    for c, name in enumerate(NAMES):
        part = values(model, inputs, labels)[labels == c].sum() / len(labels)
        grads = torch.autograd.grad(part, list(model.parameters()), materialize_grads=True)
        parts[name] = dict(zip(model.parameters(), grads, strict=True))
    return parts


def expected_rows(optimizer, parts, clip=1.0):
    """Return the rows of the step by the textbook, a parameter at a time, ``(rows, P)``."""
    rows, kind = [], type(optimizer).__name__.lower()
    known = "momentum", "dampening", "nesterov", "betas", "eps", "weight_decay"
    for group in optimizer.param_groups:
        rule = ref.Rule(kind, {name: group[name] for name in known if name in group})
        for p in (p for p in group["params"] if p.grad is not None):
            state = optimizer.state.get(p, {})
            first = state.get("exp_avg", state.get("momentum_buffer"))
            memory = ref.Memory(
                int(state.get("step", first is not None)),
                {} if first is None else {"history": first.flatten().clone()},
                state.get("exp_avg_sq", torch.zeros_like(p)).detach().flatten(),
            )
            own = {name: clip * grads[p].flatten() for name, grads in parts.items()}
            made, _ = rule.split(own, p.detach().flatten(), memory, float(group["lr"]))
            rows.append(torch.stack([made.get(r, 0.0 * made["a"]) for r in ROWS]))
    return torch.cat(rows, 1)


def moved_by(optimizer):
    """Take the step; return what moved, in the order of the rows."""
    params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = [p.detach().clone() for p in params]
    optimizer.step()
    return torch.cat([(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)])


def near(found, expected, tolerance=1e-10):
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@pytest.mark.parametrize("clip_norm", [0.0, 0.05], ids=["", "clipped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rows_are_the_step_that_torch_takes(name, clip_norm):
    model = make_model()
    optimizer = OPTIMIZERS[name](model)
    schedule = optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    watched = watch(model, optimizer, WEIGHTED, classes=NAMES, clip_norm=clip_norm)
    for number in range(STEPS):
        batch = batch_of(number)
        parts = class_gradients(model, *batch)
        optimizer.zero_grad()
        values(model, *batch).mean().backward()
        early = watched(*batch)
        norm, clip = ref.total({c: flat_of(g) for c, g in parts.items()}).norm(), 1.0
        if clip_norm:
            clip = min(1.0, clip_norm / (float(norm) + 1e-6))
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        rows = expected_rows(optimizer, parts, clip)
        found = watched(*batch)
        assert found.note == early.note == found.step.note == ""
        assert torch.equal(early.step.gram, found.step.gram)
        assert found.step.rows == ROWS
        assert found.step.clip == pytest.approx(clip, rel=1e-10)
        rates = {float(group["lr"]) for group in optimizer.param_groups}
        rate = rates.pop() if len(rates) == 1 else float("nan")
        assert found.step.learning_rate == pytest.approx(rate, nan_ok=True)
        moved = moved_by(optimizer)
        schedule.step()
        near(rows.sum(0), moved)
        near(found.step.gram, rows @ rows.T)
        near(found.step.update_norm, moved.norm())
        near(found.step.share, rows @ moved / moved.square().sum())


def flat_of(grads):
    return torch.cat([g.flatten() for g in grads.values()])


def test_a_layer_that_joins_late_has_an_age_of_its_own():
    model = make_model()
    model.last.requires_grad_(False)
    optimizer = optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    watched = watch(model, optimizer, WEIGHTED)
    for number in range(4):
        model.last.requires_grad_(number > 1)
        optimizer.zero_grad()
        values(model, *batch_of(number)).mean().backward()
        found = watched(*batch_of(number))
        assert found.note == ""
        near(found.step.update_norm, moved_by(optimizer).norm())


def test_before_the_backward_pass_it_says_the_same():
    model = make_model()
    del model.unused  # which nobody knows before
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    watched = watch(model, optimizer, WEIGHTED)
    for number in range(3):
        for set_to_none in (False, True):
            optimizer.zero_grad(set_to_none=set_to_none)
            before = watched(*batch_of(number))
        values(model, *batch_of(number)).mean().backward()
        after = watched(*batch_of(number))
        assert before.note == after.note == ""
        assert torch.equal(before.step.gram, after.step.gram)
        optimizer.step()


def test_the_class_gradients_are_those_of_the_loop():
    model, batch = make_model(), batch_of(0)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    values(model, *batch).mean().backward()
    found = watch(model, optimizer, WEIGHTED, classes=NAMES)(*batch)
    parts = torch.stack([flat_of(g) for g in class_gradients(model, *batch).values()])
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    near(parts.sum(0).norm(), grads.norm())
    near(found.balance.gradient_norm, grads.norm())
    near(found.balance.norm, parts.norm(dim=1))
    near(found.balance.share, parts @ parts.sum(0) / parts.sum(0).square().sum())
    plain = F.cross_entropy(model(batch[0]), batch[1], reduction="none").detach()
    assert_close(found.loss, torch.stack([plain[batch[1] == c].mean() for c in range(CLASSES)]))
    assert found.count.tolist() == batch[1].bincount(minlength=CLASSES).tolist()
    whole = audit(model, None, WEIGHTED, [batch])
    assert_close(found.balance.conflict, whole.balance.conflict)


def test_costs_may_be_whole_numbers():
    model, batch = make_model(), batch_of(0)
    optimizer, whole = optim.SGD(model.parameters(), lr=0.1), torch.tensor([1, 3, 2, 5])
    found, same = (
        watch(model, optimizer, LossSpec(losses.cross_entropy, costs))(*batch)
        for costs in (whole, whole.double())
    )
    assert_close(found.loss, same.loss)
    assert_close(found.balance.elasticity, same.balance.elasticity)
    assert_close(found.step.gram, same.step.gram)


# The loss, in the forms that loops have it.

TORCH = functools.partial(F.cross_entropy, reduction="none")
MEAN = lambda v, y: (COSTS[y] * v).mean()  # noqa: E731
LOSSES = {
    "ours": (losses.cross_entropy, {"class_weights": COSTS}, MEAN),
    "class-weighted": (class_weighted(losses.cross_entropy), {"class_weights": COSTS}, MEAN),
    "torch's function": (TORCH, {"class_weights": COSTS}, MEAN),
    "torch's module": (nn.CrossEntropyLoss(reduction="none"), {"class_weights": COSTS.float()},
                       MEAN),
    "no costs": (TORCH, {}, lambda v, y: v.mean()),
    "sum": (TORCH, {"class_weights": COSTS, "reduction": "sum"}, lambda v, y: (COSTS[y] * v).sum()),
    "divided by weights": (
        TORCH,
        {"class_weights": COSTS, "reduction": "weighted_mean"},
        lambda v, y: (COSTS[y] * v).sum() / COSTS[y].sum(),
    ),
    "costs as an option": (
        class_weighted(losses.cross_entropy), {"options": {"class_weights": COSTS}}, MEAN,
    ),
    "another option": (
        losses.softmax_focal, {"options": {"gamma": torch.tensor(0.0)}}, lambda v, y: v.mean(),
    ),
    "scalar": (nn.CrossEntropyLoss(), {}, lambda v, y: v.mean()),
    "weighted scalar": (
        nn.CrossEntropyLoss(weight=COSTS), {}, lambda v, y: (COSTS[y] * v).sum() / COSTS[y].sum(),
    ),
    "summed scalar": (nn.CrossEntropyLoss(reduction="sum"), {}, lambda v, y: v.sum()),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_every_form_of_a_loss_gives_the_gradient_of_the_loop(name):
    loss, options, reduced = LOSSES[name]
    model, (inputs, labels) = make_model(), batch_of(1)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    plain = F.cross_entropy(model(inputs), labels, reduction="none")
    reduced(plain, labels).backward()
    spec = LossSpec(loss, **options)
    found = watch(model, optimizer, spec)(inputs, labels)
    assert found.note == ""
    assert found.classes == ("0", "1", "2", "3")
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    near(found.balance.gradient_norm, grads.norm())
    near(found.step.update_norm, moved_by(optimizer).norm())
    again = watch(model, optimizer, spec)
    where = torch.arange(N) % 3 > 0
    kept = again(inputs[where], labels[where])
    assert_close(again(inputs, labels, where=where).balance.share, kept.balance.share)


@pytest.mark.parametrize(
    ("spoil", "factor"),
    [
        (lambda model, loss: (2 * loss).backward(), 2.0),
        (lambda model, loss: [loss.backward(retain_graph=True) for _ in range(3)], 3.0),
        (lambda model, loss: (loss.backward(), nn.utils.clip_grad_norm_(model.parameters(), 1e-3)),
         None),
    ],
    ids=["scaled", "accumulated", "clipped"],
)  # fmt: skip
def test_another_gradient_than_the_loops_is_told(spoil, factor):
    model, batch = make_model(), batch_of(2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    spoil(model, values(model, *batch).mean())
    found = watch(model, optimizer, WEIGHTED)(*batch)
    here, ours = map(float, re.findall(r"lengths of (\S+) and (\S+?):", found.note)[0])
    assert "is not this batch's" in found.note
    assert here / ours == pytest.approx(factor or 1e-3 / ours, rel=0.01)
    assert found.step is not None


def test_rounding_makes_no_other_gradient():
    model, (inputs, labels) = make_model().float(), batch_of(2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(inputs.float()), labels).backward()
    found = watch(model, optimizer, losses.cross_entropy)(inputs.float(), labels)
    assert found.note == ""


# Nothing is changed.


def train(kind, watching, *, set_to_none=True):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4))
    model[1].eval()
    optimizer = getattr(optim, kind)(model.parameters(), lr=0.1, weight_decay=0.1)
    watched = watch(model, optimizer, losses.cross_entropy)
    notes, states = [], []
    for number in range(4):
        inputs, labels = batch_of(number)
        optimizer.zero_grad(set_to_none=set_to_none)
        F.cross_entropy(model(inputs.float()), labels).backward()
        if watching:
            notes.append(watched(inputs.float(), labels).note)
        optimizer.step()
        grads = [p.grad.clone() for p in model.parameters()]
        states += [*map(torch.clone, model.state_dict().values()), *grads, torch.get_rng_state()]
    memory = copy.deepcopy(optimizer.state_dict())
    modes = [m.training for m in model.modules()]
    return states, memory, modes, [p.requires_grad for p in model.parameters()], notes


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_a_training_is_the_same_to_the_bit_with_and_without(kind):
    watched, alone = train(kind, True), train(kind, False)
    assert len(watched[0]) == len(alone[0])
    assert all(map(torch.equal, watched[0], alone[0]))
    assert_close(watched[1], alone[1], rtol=0, atol=0)
    assert watched[2:4] == alone[2:4]
    assert all("dropout is active" in note for note in watched[4])


def test_it_knows_the_mode_of_now():
    model = make_model(drop=0.5)
    optimizer, batch = optim.SGD(model.parameters(), lr=0.1), batch_of(3)
    watched = watch(model, optimizer, WEIGHTED)
    awake, again = watched(*batch), watched(*batch)
    assert "dropout" in awake.note
    assert torch.equal(awake.step.gram, again.step.gram)
    model.eval()
    values(model, *batch).mean().backward()
    asleep = watched(*batch)
    assert asleep.note == ""
    assert (awake.balance.share - asleep.balance.share).abs().max() > 1e-3
    assert "dropout" in watch(model.train(), optimizer, losses.cross_entropy)(*batch).note


def test_batch_norm_in_training_mode_is_refused_until_it_sleeps():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="'1' .BatchNorm1d. is in training mode.*backward"):
        watch(model, optimizer, losses.cross_entropy)
    model[1].eval()
    watched = watch(model, optimizer, losses.cross_entropy)
    assert watched(*batch_of(0)).step.share.sum() == pytest.approx(1.0)
    model[1].train()
    found = watched(*batch_of(0))
    assert found.records() == []
    assert "'1' (BatchNorm1d) is in training mode" in found.note


# What is not read.


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("Rprop", {}, "the step of Rprop is not known: see the gradient"),
        ("LBFGS", {}, "the step of LBFGS is not known: see the gradient"),
    ],
)
def test_of_other_optimisers_the_gradient_is_told(kind, options, why):
    model, batch = make_model(), batch_of(0)
    optimizer = getattr(optim, kind)(model.parameters(), lr=0.1, **options)
    values(model, *batch).mean().backward()
    found = watch(model, optimizer, WEIGHTED)(*batch)
    assert found.step is None
    assert why in found.note
    assert found.balance.share.sum() == pytest.approx(1.0)
    assert [row["update_share"] for row in found.records()] == [None] * CLASSES


def test_a_class_of_its_own_that_steps_otherwise_is_not_taken_for_torchs():
    class Backwards(optim.SGD):
        def step(self, closure=None):
            raise NotImplementedError

    model = make_model()
    found = watch(model, Backwards(model.parameters(), lr=0.1), TORCH)(*batch_of(0))
    assert found.step is None
    assert "Backwards overrides the step of SGD" in found.note


def test_parameters_that_are_elsewhere_are_told():
    model, other = make_model(), make_model()
    optimizer = optim.SGD([*model.last.parameters(), *other.parameters()], lr=0.1)
    watched = watch(model, optimizer, TORCH)
    found = watched(*batch_of(0))
    assert found.step.note == "the optimiser moves parameters of another model too, " + (
        "which are left out"
    )
    F.cross_entropy(model(batch_of(0)[0]), batch_of(0)[1]).backward()
    before = flat(model)
    optimizer.step()
    near(found.step.update_norm, (flat(model) - before).norm())
    model.last.requires_grad_(False)
    none = watched(*batch_of(0))
    assert none.step is None
    assert "the optimiser moves none of what is trained" in none.note


# Requests that make no sense.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clip_norm": -1.0}, "clip_norm must be at least 0, got -1.0"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"classes": ()}, "classes must be at least 1, got 0"),
        ({"classes": 3}, r"class_weights must have shape \(3,\), got \(4,\)"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_at_once(arguments, message):
    model = make_model()
    with pytest.raises(ConfigError, match=f"^watch: .*{message}"):
        watch(model, optim.SGD(model.parameters(), lr=0.1), WEIGHTED, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": "average"}, "reduction must be one of mean, weighted_mean, sum; got 'aver"),
        ({"class_weights": COSTS[None]}, r"class_weights must have shape \(classes,\), got \(1, 4"),
        ({"class_weights": -COSTS}, "class_weights must be at least 0, and one of them above, got"),
        ({"class_weights": 0 * COSTS}, "class_weights must be at least 0, and one of them above"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=f"^LossSpec: {message}"):
        LossSpec(TORCH, **arguments)


def test_an_optimiser_of_nothing_here_is_refused():
    model, other = make_model(), make_model()
    with pytest.raises(ConfigError, match="has no parameter of the model: give the model that"):
        watch(model, optim.SGD(other.parameters(), lr=0.1), TORCH)
    with pytest.raises(ConfigError, match="must be of torch.optim, got a float"):
        watch(model, 0.1, TORCH)


def test_batches_that_fit_nothing_are_noted_and_the_training_goes_on():
    model = nn.Linear(5, 1).double()
    inputs, labels = batch_of(0)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    found = watch(model, optimizer, losses.squared_error)(inputs, labels.double())
    assert re.search(r"labels must be integers, .* torch.float64 \(16,\)", found.note)
    found = watch(model, optimizer, losses.squared_error)(inputs, labels)
    assert re.search(r"score per class, .* got \(1, 1\) of one .* say classes=", found.note)
    model = make_model()
    watched = watch(model, optim.SGD(model.parameters(), lr=0.1), TORCH, classes=2)
    assert "labels must be in 0..1, got 3" in watched(inputs, labels).note


def test_one_score_will_do_where_the_classes_are_named():
    model, (inputs, labels) = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)).double(), batch_of(0)
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    def loss(logits, labels):
        return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none")

    loss(model(inputs), labels % 2).mean().backward()
    found = watch(model, optimizer, loss, classes=("no", "yes"))(inputs, labels % 2)
    assert found.note == ""
    assert [row["class"] for row in found.records()] == ["no", "yes"]
    assert found.step.rows[:2] == ("no", "yes")


def test_a_record_is_a_row_of_the_log():
    model = make_model()
    watched = watch(model, optim.Adam(model.parameters()), TORCH, classes=NAMES)
    found = watched(*batch_of(0))
    rows = found.records()
    assert [row["class"] for row in rows] == [*NAMES]
    assert [row["count"] for row in rows] == found.count.tolist()
    for name in ("share", "expected_share", "elasticity", "norm"):
        assert [row[name] for row in rows] == getattr(found.balance, name).tolist()
    assert [row["update_share"] for row in rows] == found.step.share[:CLASSES].tolist()
    assert [row["loss"] for row in rows] == found.loss.tolist()


# Lightning.

# Of torch, on how Lightning walks a tree; and of Lightning, on machines with many cores.
QUIET = ("ignore:.*isinstance.treespec, LeafSpec:FutureWarning", "ignore:.*does not have many wor")


class Classifier(LightningModule):
    def __init__(self, **trainer):
        super().__init__()
        self.net, self.seen, self.moved = make_model(), [], []

    def configure_optimizers(self):
        optimizer = optim.AdamW(self.net.parameters(), lr=0.1)
        self.watched = watch(self.net, optimizer, TORCH, classes=NAMES)
        return optimizer

    def training_step(self, batch, number):
        self.batch = batch
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        found = self.watched(*self.batch)
        wrapped = watch(self.net, self.optimizers(), TORCH, classes=NAMES)(*self.batch)
        assert torch.equal(found.step.gram, wrapped.step.gram)
        self.log_dict({f"share/{row['class']}": row["share"] for row in found.records()})
        self.seen.append(found)
        self.before = flat(self.net)

    def on_train_batch_end(self, outputs, batch, number):
        self.moved.append(flat(self.net) - self.before)


@pytest.mark.filterwarnings(QUIET[0])
@pytest.mark.filterwarnings(QUIET[1])
def test_a_lightning_module_logs_the_shares_of_its_own_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = Classifier()
    trainer = Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    batches = DataLoader([batch_of(number) for number in range(STEPS)], batch_size=None)
    trainer.fit(module, batches)
    assert len(module.seen) == STEPS
    for found, moved in zip(module.seen, module.moved, strict=True):
        assert found.note == ""
        near(found.step.update_norm, moved.norm())
    last = module.seen[-1].balance.share
    logged = [float(trainer.logged_metrics[f"share/{name}"]) for name in NAMES]
    assert logged == pytest.approx(last.tolist(), rel=1e-6)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_leaves_no_verdict():
    model, (inputs, labels) = make_model(), batch_of(0)
    watched = watch(model, optim.SGD(model.parameters(), lr=0.1), WEIGHTED)
    assert "the loss is not finite" in watched(inputs * math.nan, labels).note
    values(model, inputs, labels).mean().backward()
    found = watched(inputs, labels)
    assert found.note == ""
    assert found.balance.share.sum() == pytest.approx(1.0)


class Centred(nn.Module):
    """Couples the examples of a batch, without a layer that says so."""

    def __init__(self):
        super().__init__()
        self.inner = Model(0.3)

    def forward(self, x):
        return self.inner(x - x.mean(0) * self.inner.one.bias)


def test_a_model_that_couples_examples_is_not_split_by_passes_of_its_own():
    torch.manual_seed(0)
    model = Centred().double()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    found = watch(model, optimizer, WEIGHTED)(*batch_of(0))
    assert found.records() == []
    assert "the model couples examples" in found.note
