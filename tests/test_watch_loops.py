"""Loops as people write them, watched: the same training to the bit, and shares by a reference."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from funcloss.audit import watch
from funcloss.audit.optimizers import bare

CLASSES, N = 3, 12


def make_model(drop=0.2):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(drop), nn.Linear(8, CLASSES)
    ).double()


def batch_of(number, size=N):
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, CLASSES, (size,), generator=generator)
    return torch.randn(size, 5, generator=generator).double() + F.one_hot(labels, 5), labels


def params_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def flat(grads):
    return torch.cat([g.to_dense().flatten() for g in grads])


class Loop:
    """What a loop calls in place of ``backward()``; it may be watched, and keeps a reference."""

    def __init__(self, entry, model, optimizer, **options):
        self.entry, self.parts, self.reference, self.notes = entry, {}, {}, []
        self.trained, self.optimizer = [model], optimizer
        self.watched = watch(model, optimizer, **options) if entry else None

    def train(self, model, batch, *, divisor=None, scaler=None, groups=None, retain=False):
        """Compute a loss, and its gradient in ``.grad``."""
        inputs, labels = batch
        logits = model(inputs)
        values = F.cross_entropy(logits, labels.long(), reduction="none")
        groups = labels if groups is None else groups
        divisor = divisor or len(values)
        self.refer(model, values, groups, divisor)
        if self.entry == "backward":
            self.watched.backward(values, groups, divisor=divisor, scaler=scaler)
            return values.detach().sum() / divisor
        if self.entry:
            self.watched.through(logits, groups, scaler=scaler)
        loss = values.sum() / divisor
        (loss if scaler is None else scaler.scale(loss)).backward(retain_graph=retain)
        return loss.detach()

    def refer(self, model, values, groups, divisor):
        moved = [p for group in bare(self.optimizer).param_groups for p in group["params"]]
        for group in groups.unique().tolist() if groups.shape == values.shape else ():
            grads = torch.autograd.grad(
                values[groups == group].sum() / divisor,
                [p for p in moved if p.requires_grad],
                retain_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )
            name = str(group) if group >= 0 else "no group"
            self.parts[name] = self.parts.get(name, 0.0) + flat(grads)

    def clear(self, optimizer, set_to_none=True):
        optimizer.zero_grad(set_to_none=set_to_none)
        self.parts = {}

    def step(self, optimizer, *args):
        """Take a step; note what was found."""
        before = len(self.notes)
        (optimizer if not args else args[0]).step(*([optimizer] if args else []))
        self.see()
        assert len(self.notes) == before + 1

    def see(self):
        if not self.entry:
            return self.notes.append("")
        found = self.watched.found
        self.notes.append(found.note)
        if found.classes and self.parts:
            near(found, self.parts)
            self.parts = {}
        return None


def near(found, parts):
    names = [name for name in found.classes if name in parts]
    rows = torch.stack([parts[name] for name in names])
    gram = rows @ rows.T
    index = [found.classes.index(name) for name in names]
    assert_close(found.balance.share[index], gram.sum(1) / gram.sum(), rtol=0, atol=1e-8)
    assert_close(found.balance.share.nan_to_num().sum(), torch.tensor(1.0).double())


def sgd(model, **options):
    return optim.SGD(params_of(model), **{"lr": 0.1, "momentum": 0.9, **options})


# Loops: (entry, make) -> (loop, model); the notes of the steps are given beside them


def plain(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        loop.step(optimizer)
    return loop, model


def zeros(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        loop.clear(optimizer, set_to_none=False)
        loop.train(model, batch_of(number))
        loop.step(optimizer)
    return loop, model


def accumulated(start, set_to_none=True):
    model, optimizer, loop = start(sgd)
    loop.clear(optimizer, set_to_none)
    for number in range(6):
        loop.train(model, batch_of(number), divisor=2 * N)
        if number % 2:
            loop.step(optimizer)
            loop.clear(optimizer, set_to_none)
    return loop, model


def accumulated_in_zeros(start):
    return accumulated(start, set_to_none=False)


def closure(start):
    model, optimizer, loop = start(sgd)

    for number in range(3):

        def again(number=number):
            loop.clear(optimizer)
            return loop.train(model, batch_of(number))

        optimizer.step(again)
        loop.see()
    return loop, model


def lbfgs(start):
    model, optimizer, loop = start(lambda m: optim.LBFGS(m.parameters(), lr=0.1, max_iter=3))

    for number in range(2):

        def again(number=number):
            loop.clear(optimizer)
            return loop.train(model, batch_of(number))

        optimizer.step(again)
        loop.parts = {}
        loop.see()
    return loop, model


def scheduled(start):
    model, optimizer, loop = start(lambda m: optim.AdamW(m.parameters(), lr=0.1))
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=5)
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        loop.step(optimizer)
        schedule.step()
    return loop, model


def scaled(start, make=sgd, unscale=True, infinite=False):
    model, optimizer, loop = start(make)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number), scaler=scaler)
        if unscale:
            scaler.unscale_(optimizer)
        if infinite and number == 1:
            model[0].weight.grad[0, 0] = torch.inf
            scaler._check_inf_per_device(optimizer)
            scaler.step(optimizer)
            scaler.update()
            continue
        loop.step(optimizer, scaler)
        scaler.update()
    return loop, model


def scaled_in_step(start):
    return scaled(start, unscale=False)


def scaled_fused(start):
    return scaled(start, lambda m: optim.Adam(m.parameters(), lr=0.1, fused=True), unscale=False)


def scaled_and_skipped(start):
    return scaled(start, infinite=True)


def clipped(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        loop.step(optimizer)
    return loop, model


def clipped_by_value(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        nn.utils.clip_grad_value_(model.parameters(), 0.02)
        loop.step(optimizer)
    return loop, model


def averaged(start):
    model, optimizer, loop = start(sgd)
    mean = optim.swa_utils.AveragedModel(model)
    other = copy.deepcopy(model)
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        loop.step(optimizer)
        mean.update_parameters(model)
        other = copy.deepcopy(model)
    copy.deepcopy(optimizer), other
    return loop, model


def sharpness_aware(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        moves = [0.05 * p.grad / p.grad.norm() for p in model.parameters()]
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p += move
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        with torch.no_grad():
            for p, move in zip(model.parameters(), moves, strict=True):
                p -= move
        loop.step(optimizer)
    return loop, model


def adversarial(start):
    model, optimizer, loop = start(sgd)
    other = nn.Linear(CLASSES, 1).double()
    against = optim.Adam(other.parameters(), lr=0.1)
    for number in range(3):
        batch = batch_of(number)
        against.zero_grad()
        other(model(batch[0]).detach()).mean().backward()
        against.step()
        loop.clear(optimizer)
        loop.train(model, batch)
        (-other(model(batch[0])).mean()).backward()
        loop.step(optimizer)
    return loop, model


def frozen_on_the_way(start):
    model, optimizer, loop = start(sgd)
    for number in range(4):
        for p in model[0].parameters():
            p.requires_grad_(number in (0, 3))
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        loop.step(optimizer)
    return loop, model


def frozen_in_a_step(start):
    model, optimizer, loop = start(sgd)
    loop.clear(optimizer)
    loop.train(model, batch_of(0), divisor=2 * N)
    for p in model[0].parameters():
        p.requires_grad_(False)
    loop.parts = {}
    loop.train(model, batch_of(1), divisor=2 * N)
    loop.parts = {}
    loop.step(optimizer)
    return loop, model


def thawed_in_a_step(start):
    model, optimizer, loop = start(sgd)
    for p in model[0].parameters():
        p.requires_grad_(False)
    loop.clear(optimizer)
    loop.train(model, batch_of(0), divisor=2 * N)
    loop.parts = {}
    for p in model[0].parameters():
        p.requires_grad_(True)
    loop.train(model, batch_of(1), divisor=2 * N)
    loop.parts = {}
    loop.step(optimizer)
    return loop, model


def grown(start):
    model, optimizer, loop = start(lambda m: optim.AdamW(m[4].parameters(), lr=0.1))
    for number in range(3):
        if number == 1:
            optimizer.add_param_group({"params": [*model[0].parameters()], "lr": 0.01})
        if number == 2:
            optimizer.add_param_group({"params": [*model[1].parameters()]})
        model.zero_grad()
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        loop.step(optimizer)
    return loop, model


def a_loss_that_is_no_number(start):
    model, optimizer, loop = start(sgd)
    state = None
    for number in range(3):
        inputs, labels = batch_of(number)
        if number == 1:
            inputs = inputs * torch.nan
            state = copy.deepcopy(model.state_dict())
        loop.clear(optimizer)
        loop.train(model, (inputs, labels))
        loop.step(optimizer)
        if number == 1:
            loop.parts = {}
            model.load_state_dict(state)
            optimizer.state.clear()
    return loop, model


def of_no_class(start):
    model, optimizer, loop = start(sgd, classes=4)
    for number in range(3):
        inputs, labels = batch_of(number)
        groups = torch.where(labels == 0, -1, labels)
        loop.clear(optimizer)
        loop.train(model, (inputs, labels), groups=groups)
        loop.step(optimizer)
    return loop, model


def one_class(start):
    model, optimizer, loop = start(sgd, classes=3)
    for number in range(3):
        inputs, labels = batch_of(number)
        loop.clear(optimizer)
        loop.train(model, (inputs, torch.full_like(labels, 2)))
        loop.step(optimizer)
    return loop, model


def small_integers(start):
    model, optimizer, loop = start(sgd)
    for dtype in (torch.uint8, torch.int32, torch.int16):
        inputs, labels = batch_of(0)
        loop.clear(optimizer)
        loop.train(model, (inputs, labels.to(dtype)))
        loop.step(optimizer)
    return loop, model


def booleans(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        inputs, labels = batch_of(number)
        loop.clear(optimizer)
        loop.train(model, (inputs, labels), groups=labels == 1)
        loop.parts = {}
        loop.step(optimizer)
    return loop, model


def labels_of_another_shape(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        inputs, labels = batch_of(number)
        loop.clear(optimizer)
        loop.train(model, (inputs, labels), groups=labels[1:])
        loop.step(optimizer)
    return loop, model


def fractions(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        inputs, labels = batch_of(number)
        loop.clear(optimizer)
        loop.train(model, (inputs, labels), groups=labels.double())
        loop.parts = {}
        loop.step(optimizer)
    return loop, model


def clamped_by_hooks(start):
    model, optimizer, loop = start(sgd)
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-0.01, 0.01))
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        loop.parts = {}
        loop.step(optimizer)
    return loop, model


def stepped_in_backward(start):
    model, optimizer, loop = start(sgd)
    rest = {p: optim.SGD([p], lr=0.1) for p in params_of(model)[1:]}
    del rest
    last = params_of(model)[0]

    def then(_):
        optimizer.step()
        optimizer.zero_grad()

    last.register_post_accumulate_grad_hook(then)
    for number in range(3):
        loop.train(model, batch_of(number))
        loop.parts = {}
        loop.see()
    return loop, model


def evaluated_between(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        model.eval()
        with torch.no_grad():
            logits = model(batch_of(9)[0])
            if loop.entry == "through":
                loop.watched.through(logits, batch_of(9)[1])
        with torch.inference_mode():
            model(batch_of(9)[0])
        model.train()
        loop.step(optimizer)
    return loop, model


def in_evaluation(start):
    model, optimizer, loop = start(sgd)
    model.eval()
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        loop.step(optimizer)
    return loop, model


def twice(start):
    """Two losses of the same batch are accumulated."""
    model, optimizer, loop = start(sgd)
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        loop.train(model, batch_of(number))
        loop.step(optimizer)
    return loop, model


def given_up(start):
    """A batch fails between backward() and step(), and the loop goes on with the next."""
    model, optimizer, loop = start(sgd)
    for number in range(4):
        try:
            loop.clear(optimizer)
            loop.train(model, batch_of(number))
            if number == 1:
                raise RuntimeError
            loop.step(optimizer)
        except RuntimeError:
            continue
    return loop, model


def never_cleared(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        loop.parts = {}
        loop.train(model, batch_of(number))
        loop.step(optimizer)
    return loop, model


def noised(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        for p in params_of(model):
            p.grad += 0.1 * torch.randn_like(p)
        loop.step(optimizer)
    return loop, model


def stepped_twice(start):
    model, optimizer, loop = start(sgd)
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        loop.step(optimizer)
        optimizer.step()
    return loop, model


def an_empty_batch(start):
    model, optimizer, loop = start(sgd)
    model.eval()
    for size in (N, 0, N):
        loop.clear(optimizer)
        loop.train(model, batch_of(0, size), divisor=N)
        loop.parts = loop.parts if size else {}
        loop.step(optimizer)
    return loop, model


def two_optimisers(start):
    model, optimizer, loop = start(lambda m: optim.SGD(m[0].parameters(), lr=0.1))
    other = optim.AdamW([*model[1].parameters(), *model[4].parameters()], lr=0.1)
    for number in range(3):
        loop.clear(optimizer)
        other.zero_grad()
        loop.train(model, batch_of(number))
        loop.step(optimizer)
        other.step()
    return loop, model


def rate_of_nothing(start):
    model, optimizer, loop = start(lambda m: optim.SGD(m.parameters(), lr=0.0))
    for number in range(3):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        loop.step(optimizer)
    return loop, model


def a_gradient_of_nothing(start):
    """Of a last layer of zeros, in which all but the first gradients are 0."""
    model, optimizer, loop = start(sgd)
    for number in range(3):
        inputs, labels = batch_of(number)
        loop.clear(optimizer)
        loop.train(model, (inputs, labels), divisor=torch.inf)
        loop.parts = {}
        loop.step(optimizer)
    return loop, model


def punished(start):
    """Add a penalty on the gradient in the predictions, whose own backward pass is no step's."""
    model, optimizer, loop = start(sgd)
    for number in range(3):
        inputs, labels = batch_of(number)
        loop.clear(optimizer)
        logits = model(inputs.requires_grad_())
        if loop.entry:
            loop.watched.through(logits, labels)
        (slope,) = torch.autograd.grad(logits.logsumexp(1).sum(), inputs, create_graph=True)
        (F.cross_entropy(logits, labels) + slope.pow(2).mean()).backward()
        loop.step(optimizer)
    return loop, model


def reset(start):
    """The optimiser's memory is loaded, and parameters change in place, between steps."""
    model, optimizer, loop = start(lambda m: optim.Adam(m.parameters(), lr=0.1))
    for number in range(4):
        loop.clear(optimizer)
        loop.train(model, batch_of(number))
        loop.step(optimizer)
        if number == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            model.load_state_dict({k: 0.5 * v for k, v in model.state_dict().items()}, assign=False)
    return loop, model


OTHER = "the rest is the row 'other gradient'"
LOOPS = [
    (plain, ["", "", ""]),
    (zeros, ["", "", ""]),
    (accumulated, ["", "", ""]),
    (accumulated_in_zeros, ["", "", ""]),
    (closure, ["", "", ""]),
    (lbfgs, ["LBFGS", "LBFGS"]),
    (scheduled, ["", "", ""]),
    (scaled, ["", "", ""]),
    (scaled_in_step, ["", "", ""]),
    (scaled_fused, ["", "", ""]),
    (scaled_and_skipped, ["", ""]),
    (clipped, ["clipped or scaled"] * 3),
    (clipped_by_value, ["entry by entry"] * 3),
    (averaged, ["", "", ""]),
    (sharpness_aware, ["", "", ""]),
    (adversarial, [OTHER] * 3),
    (frozen_on_the_way, ["", "", "", ""]),
    (frozen_in_a_step, ["does not require grad"]),
    (thawed_in_a_step, ["changed within the step"]),
    (grown, ["", "", ""]),
    (a_loss_that_is_no_number, ["", "not finite", ""]),
    (of_no_class, ["", "", ""]),
    (one_class, ["", "", ""]),
    (small_integers, ["", "", ""]),
    (booleans, ["", "", ""]),
    (labels_of_another_shape, ["integers of the shape"] * 3),
    (fractions, ["integers of the shape"] * 3),
    (clamped_by_hooks, [OTHER] * 3),
    (stepped_in_backward, [("stepped within backward()", "")] * 3),
    (evaluated_between, ["", "", ""]),
    (in_evaluation, ["", "", ""]),
    (twice, ["", "", ""]),
    (given_up, ["", "", ""]),
    (never_cleared, ["", OTHER, OTHER]),
    (noised, [OTHER] * 3),
    (stepped_twice, ["", "", ""]),
    (an_empty_batch, ["", "", ""]),
    (two_optimisers, ["", "", ""]),
    (rate_of_nothing, ["", "", ""]),
    (a_gradient_of_nothing, ["", "", ""]),
    (punished, [OTHER] * 3),
    (reset, ["", "", "", ""]),
]


def started(entry):
    """Return what makes a model, its optimiser and a loop, watched or not."""

    def start(make, **options):
        model = make_model()
        optimizer = make(model)
        return model, optimizer, Loop(entry, model, optimizer, **options)

    return start


@pytest.mark.parametrize("entry", ["backward", "through"])
@pytest.mark.parametrize(("loop", "notes"), LOOPS, ids=[loop.__name__ for loop, _ in LOOPS])
def test_a_loop_is_watched_and_left_as_it_is(loop, notes, entry):
    _, alone = loop(started(""))
    generator = torch.get_rng_state()
    seen, model = loop(started(entry))
    assert torch.equal(torch.get_rng_state(), generator)
    for a, b in zip(alone.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert len(seen.notes) == len(notes)
    for found, expected in zip(seen.notes, notes, strict=True):
        if isinstance(expected, tuple):  # by entry
            expected = expected[entry == "through"]
        assert expected in found if expected else not found, seen.notes


def test_two_watches_see_one_backward_pass():
    model = make_model()
    optimizers = optim.SGD(model[0].parameters(), lr=0.1), optim.AdamW(model[4].parameters())
    watches = [watch(model, optimizer) for optimizer in optimizers]
    for number in range(3):
        inputs, labels = batch_of(number)
        model.zero_grad()
        logits = model(inputs)
        for watched in watches:
            watched.through(logits, labels)
        values = F.cross_entropy(logits, labels, reduction="none")
        references = [Loop("", model, optimizer) for optimizer in optimizers]
        for reference in references:
            reference.refer(model, values, labels, N)
        values.mean().backward()
        for optimizer, watched, reference in zip(optimizers, watches, references, strict=True):
            optimizer.step()
            assert not watched.found.note
            near(watched.found, reference.parts)


def test_frozen_parameters_of_the_optimiser_are_not_called_those_of_another_model():
    model = make_model()
    optimizer = sgd(model)
    model[0].requires_grad_(False)
    watched = watch(model, optimizer)
    inputs, labels = batch_of(0)
    watched.backward(F.cross_entropy(model(inputs), labels, reduction="none"), labels)
    optimizer.step()
    assert (watched.found.note, watched.found.step.note) == ("", "")


@pytest.mark.parametrize("whole", [True, False], ids=["of all", "of a part"])
def test_a_reentrant_checkpoint_is_found(whole):
    """Passes for some parameters never reach those within it, or are refused by torch."""
    model = make_model()
    optimizer = sgd(model)
    watched = watch(model, optimizer)
    for number in range(2):
        inputs, labels = batch_of(number)
        body, rest = (model, nn.Identity()) if whole else (model[:4], model[4])
        optimizer.zero_grad()
        h = checkpoint(body, inputs.requires_grad_(), use_reentrant=True)
        watched.backward(F.cross_entropy(rest(h), labels, reduction="none"), labels)
        optimizer.step()
        assert "a checkpoint is reentrant" in watched.found.note
        assert "other gradient" in watched.found.step.rows


def test_the_advice_on_a_reentrant_checkpoint():
    model = make_model()
    optimizer = sgd(model)
    watched = watch(model, optimizer)
    inputs, labels = batch_of(0)
    h = checkpoint(model[1:4], model[0](inputs), use_reentrant=True)
    watched.backward(F.cross_entropy(model[4](h), labels, reduction="none"), labels)
    optimizer.step()
    assert watched.found.note.endswith(": checkpoint with use_reentrant=False")


def erased(model):
    for p in model.parameters():
        p.grad.zero_()


def spoilt(model):
    model[0].weight.grad[0, 0] = torch.inf


@pytest.mark.parametrize(("spoil", "note"), [(erased, "is 0, and"), (spoilt, "is not finite")])
def test_a_gradient_that_was_spoilt_is_said_to_be(spoil, note):
    model = make_model()
    optimizer = sgd(model)
    watched = watch(model, optimizer)
    inputs, labels = batch_of(0)
    watched.backward(F.cross_entropy(model(inputs), labels, reduction="none"), labels)
    spoil(model)
    optimizer.step()
    assert note in watched.found.note
