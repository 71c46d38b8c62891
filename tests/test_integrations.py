"""The callbacks of Lightning and transformers: shares by an independent reference, and no harm."""

import copy
import importlib
import logging
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.testing import assert_close
from torch.utils.data import DataLoader

from funcloss.audit import watch
from funcloss.integrations.listening import labels_of, predictions_in

CLASSES, N, STEPS = 4, 12, 6
NAMES = ("a", "b", "c", "d")
WEIGHTS = torch.tensor([1.0, 3.0, 0.5, 2.0]).double()
PACKAGES = ("pytorch_lightning", "lightning.pytorch")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Net(nn.Module):
    """A network that couples its examples, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.body(x))


def make_net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def batches(count=STEPS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(count):
        labels = torch.randint(0, CLASSES, (N,), generator=generator)
        made.append((torch.randn(N, 5, generator=generator).to(dtype) + labels[:, None], labels))
    return made


def loss_terms(net, inputs, labels):
    return WEIGHTS.to(inputs)[labels] * F.cross_entropy(net(inputs), labels, reduction="none")


def class_gradients(passes, divisor):
    """Return each class's gradient by a forward pass of its own for each class, ``(C, P)``.

    Args:
        passes: (network, batch, state of the random numbers), as before each micro-batch.
        divisor: Of the sum of the terms of all micro-batches.
    """
    rows = []
    for c in range(CLASSES):
        total = 0.0
        for net, (inputs, labels), random in passes:
            net = copy.deepcopy(net)
            with torch.random.fork_rng():
                torch.set_rng_state(random)
                part = loss_terms(net, inputs, labels)[labels == c].sum() / divisor
            grads = torch.autograd.grad(part, list(net.parameters()), materialize_grads=True)
            total = total + torch.cat([g.flatten() for g in grads])
        rows.append(total)
    return torch.stack(rows)


def shares(parts):
    whole = parts.sum(0)
    return parts @ whole / whole.square().sum()


def expected_shares(labels):
    sums = WEIGHTS * labels.bincount(minlength=CLASSES)
    return sums / sums.sum()


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


class Log(logging.Handler):
    """The warnings of the callbacks."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@pytest.fixture
def warned():
    log = Log()
    logger = logging.getLogger("funcloss.integrations")
    logger.addHandler(log)
    yield log.lines
    logger.removeHandler(log)


# Lightning ---


@pytest.fixture(params=PACKAGES)
def pl(request):
    return pytest.importorskip(request.param)


def lightning(package, **arguments):
    pytest.importorskip(package)
    from funcloss.integrations.lightning import AuditCallback

    return AuditCallback(**{"classes": NAMES, "every": 1, **arguments})


def module_of(pl, **options):
    """Return a LightningModule that keeps what a reference needs."""
    scope = SimpleNamespace(**{"rate": 0.1, "unseen": False, "kind": optim.SGD, **options})

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.passes, self.moved = make_net(), [], []

        def configure_optimizers(self):
            return scope.kind(self.net.parameters(), lr=scope.rate)

        def training_step(self, batch, number):
            self.passes.append((copy.deepcopy(self.net), batch, torch.get_rng_state()))
            if scope.unseen:
                logits = self.net.forward(batch[0])
                values = F.cross_entropy(logits, batch[1], reduction="none")
                return (WEIGHTS[batch[1]] * values).mean()
            return loss_terms(self.net, *batch).mean()

        def validation_step(self, batch, number):
            return loss_terms(self.net, *batch).mean()

    return Module()


def fit(pl, callbacks=(), *, module=None, loader=None, **trainer):
    module = module or module_of(pl)
    torch.manual_seed(3)
    quiet = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "devices": 1, "max_epochs": 1,
    }  # fmt: skip
    trainer = pl.Trainer(callbacks=[*callbacks], **{**quiet, **trainer})
    loader = loader or DataLoader(batches(), batch_size=None)
    trainer.fit(module, loader, DataLoader(batches(2), batch_size=None))
    return module, trainer


def collector(pl, callback, into):
    class Collector(pl.Callback):
        def on_train_batch_end(self, *args):
            if callback.found is not None and (not into or into[-1] is not callback.found):
                into.append(callback.found)

    return Collector()


@pytest.mark.parametrize("accumulated", [1, 3])
def test_lightning_tells_the_shares_that_each_class_has(pl, accumulated, warned):
    callback, found = lightning(pl.__name__, class_weights=WEIGHTS), []
    assert isinstance(callback, pl.Callback)
    module, _ = fit(
        pl,
        [callback, collector(pl, callback, found)],
        accumulate_grad_batches=accumulated,
        val_check_interval=accumulated,
    )
    assert len(found) == STEPS // accumulated
    for i, of in enumerate(found):
        passes = module.passes[i * accumulated : (i + 1) * accumulated]
        parts = class_gradients(passes, N * accumulated)
        assert_close(of.balance.share, shares(parts), atol=1e-6, rtol=0)
        assert_close(of.balance.norm, parts.norm(dim=1))
        labels = torch.cat([labels for _, (_, labels), _ in passes])
        assert of.count.tolist() == labels.bincount(minlength=CLASSES).tolist()
        assert_close(of.balance.expected_share, expected_shares(labels))
        assert_close(of.step.share[:CLASSES], shares(parts), atol=1e-6, rtol=0)  # plain SGD
        assert of.moved < 1e-6
        assert of.note == ""
    assert warned == []


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({}, ""),
        ({"gradient_clip_val": 0.01}, "clipped or scaled, by a factor of"),
        (
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
            "entry by entry, at 0.01",
        ),
    ],
    ids=["", "norm", "value"],
)
def test_lightning_trains_the_same_to_the_bit_and_finds_clipping(pl, options, note, warned):
    callback, found = lightning(pl.__name__), []
    of = {"kind": optim.AdamW, "rate": 0.01}
    watched, _ = fit(
        pl, [callback, collector(pl, callback, found)], module=module_of(pl, **of), **options
    )
    alone, _ = fit(pl, module=module_of(pl, **of), **options)
    assert torch.equal(flat(watched.net), flat(alone.net))
    for a, b in zip(watched.net.buffers(), alone.net.buffers(), strict=True):
        assert torch.equal(a, b)
    assert len(found) == STEPS
    for i, of in enumerate(found):
        parts = class_gradients(watched.passes[i : i + 1], N)
        assert_close(of.balance.share, shares(parts), atol=1e-6, rtol=0)
        assert of.moved < 1e-6
        assert note in of.note
        assert bool(of.note) == bool(note)
    assert len(warned) == bool(note)


def test_lightning_logs_to_the_loggers_of_the_trainer(pl, tmp_path):
    logged = []

    class Logger(importlib.import_module(f"{pl.__name__}.loggers.logger").DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, metrics))

    callback = lightning(pl.__name__, every=2)
    fit(pl, [callback], logger=Logger(), log_every_n_steps=1, default_root_dir=tmp_path)
    of = [(step, metrics) for step, metrics in logged if "share/a" in metrics]
    assert [step for step, _ in of] == [0, 2, 4]
    found, last = callback.found, of[-1][1]
    rows = (*NAMES, "weight decay", "history")
    assert [*last] == [
        *(f"share/{name}" for name in NAMES),
        *(f"expected_share/{name}" for name in NAMES),
        *(f"update_share/{name}" for name in rows),
        "audit/moved",
    ]
    assert [last[f"share/{name}"] for name in NAMES] == found.balance.share.tolist()
    assert [last[f"update_share/{name}"] for name in rows] == found.step.share.tolist()


def test_lightning_in_mixed_bf16(pl, warned):
    callback, found = lightning(pl.__name__), []
    loader = DataLoader(batches(dtype=torch.float32), batch_size=None)
    module = module_of(pl)
    module.net.float()
    module, _ = fit(
        pl, [callback, collector(pl, callback, found)], module=module, loader=loader,
        precision="bf16-mixed", num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    assert len(found) == STEPS
    for i, of in enumerate(found):
        parts = class_gradients(module.passes[i : i + 1], N)
        assert_close(of.balance.share.float(), shares(parts), atol=0.03, rtol=0)
        assert of.moved < 0.01
    assert warned == []


def test_lightning_with_a_scaler(pl, warned):
    precision = importlib.import_module(f"{pl.__name__}.plugins.precision")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    class Scaled(precision.MixedPrecision):
        def forward_context(self):
            return precision.Precision.forward_context(self)

    callback, found = lightning(pl.__name__), []
    module, _ = fit(
        pl, [callback, collector(pl, callback, found)],
        plugins=[Scaled("16-mixed", "cpu", scaler)], gradient_clip_val=100.0,
    )  # fmt: skip
    assert len(found) == STEPS
    for i, of in enumerate(found):
        parts = class_gradients(module.passes[i : i + 1], N)
        assert_close(of.balance.share, shares(parts), atol=1e-6, rtol=0)
        assert_close(of.balance.norm, parts.norm(dim=1))
        assert of.note == ""
    assert warned == []


UNSEEN = "no predictions seen in the backward pass: give predictions= the name of the submodule"


@pytest.mark.parametrize(
    ("arguments", "of", "message"),
    [
        ({}, {"unseen": True}, UNSEEN),
        ({"predictions": "net.tail"}, {}, "has no attribute `tail`"),
        ({"groups": lambda batch: batch[7]}, {}, "not audited: IndexError: "),
        ({"groups": lambda batch: batch[1].double()}, {}, "groups must be integers of the shape"),
        ({"groups": lambda batch: batch[1][:-1]}, {}, "groups must be integers of the shape"),
        ({"classes": 2}, {}, "labels must be below 2, got"),
        ({"optimizer": "Adam"}, {}, "the name of the class, of one of ['SGD'], got 'Adam'"),
    ],
)
def test_what_cannot_be_audited_in_lightning_is_one_warning(pl, arguments, of, message, warned):
    module, _ = fit(pl, [lightning(pl.__name__, **arguments)], module=module_of(pl, **of))
    alone, _ = fit(pl, module=module_of(pl, **of))
    assert torch.equal(flat(module.net), flat(alone.net))
    assert len(warned) == 1
    assert message in warned[0]


def test_the_submodule_that_is_named_has_the_predictions(pl):
    callback = lightning(pl.__name__, predictions="net.head")
    module, _ = fit(pl, [callback])
    parts = class_gradients(module.passes[-1:], N)
    assert_close(callback.found.balance.share, shares(parts), atol=1e-6, rtol=0)


def test_one_optimizer_of_several_is_chosen_by_name(pl, warned):
    def make():
        class Several(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net, self.other = make_net(), nn.Linear(5, 1).double()
                self.automatic_optimization = False
                self.passes = []

            def configure_optimizers(self):
                return optim.SGD(self.net.parameters(), lr=0.1), optim.Adam(self.other.parameters())

            def training_step(self, batch, number):
                one, two = self.optimizers()
                self.other(batch[0]).mean().backward()
                two.step()
                self.passes.append((copy.deepcopy(self.net), batch, torch.get_rng_state()))
                one.zero_grad()
                self.manual_backward(loss_terms(self.net, *batch).mean())
                one.step()

            def validation_step(self, batch, number):
                return None

        return Several()

    loader = DataLoader(batches(), batch_size=None)
    callback = lightning(pl.__name__, optimizer="SGD")
    module, _ = fit(pl, [callback], module=make(), loader=loader)
    parts = class_gradients(module.passes[-1:], N)
    assert_close(callback.found.balance.share, shares(parts), atol=1e-6, rtol=0)
    assert warned == []
    assert int(callback.found.count.sum()) == N
    refused = lightning(pl.__name__)
    fit(pl, [refused], module=make(), loader=loader)
    assert refused.found is None
    assert len(warned) == 1
    assert "of one of ['SGD', 'Adam'], got None" in warned[0]


def test_two_callbacks_tell_by_class_and_by_source(pl):
    by_class = lightning(pl.__name__)
    by_source = lightning(pl.__name__, classes=2, groups=lambda batch: batch[1] // 2)
    module, _ = fit(pl, [by_class, by_source])
    parts = class_gradients(module.passes[-1:], N)
    assert_close(by_class.found.balance.share, shares(parts), atol=1e-6, rtol=0)
    assert_close(
        by_source.found.balance.share, shares(parts.view(2, 2, -1).sum(1)), atol=1e-6, rtol=0
    )


def test_a_lightning_callback_can_be_copied_and_pickled(pl):
    callback = lightning(pl.__name__, every=7)
    for again in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert isinstance(again, pl.Callback)
        assert again._listener.settings.every == 7


def test_a_module_that_is_copied_or_pickled_leaves_the_hooks_behind(pl):
    copies = []

    class Copier(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            copies.append((copy.deepcopy(module.net), pickle.loads(pickle.dumps(module.net))))

    callback = lightning(pl.__name__)
    module, _ = fit(pl, [callback, Copier()])
    last = callback.found
    for net in copies[-1]:
        assert torch.equal(flat(net), flat(module.net))
        loss_terms(net, *batches(1)[0]).mean().backward()
    assert callback.found is last
    assert not module.net._forward_hooks
    assert not module._forward_hooks


# transformers ---


def hugging():
    pytest.importorskip("transformers")
    from transformers import Trainer, TrainingArguments

    from funcloss.integrations.transformers import AuditCallback

    return Trainer, TrainingArguments, AuditCallback


class Hugged(nn.Module):
    """A model of dicts, as those of transformers."""

    def __init__(self):
        super().__init__()
        self.net, self.passes = make_net(), []

    def forward(self, inputs, labels=None):
        if torch.is_grad_enabled():
            self.given = (copy.deepcopy(self.net), torch.get_rng_state())
        logits = self.net(inputs)
        loss = None
        if labels is not None:
            values = F.cross_entropy(logits, labels, reduction="none")
            loss = (WEIGHTS.to(logits)[labels] * values).mean()
        return {"loss": loss, "logits": logits}


def train(tmp_path, callback=None, *, own_loss=None, dtype=torch.float64, cls=Hugged, **options):
    base, arguments, _ = hugging()
    examples = [
        {"inputs": x, "labels": y}
        for inputs, labels in batches(dtype=dtype)
        for x, y in zip(inputs, labels, strict=True)
    ]
    model = cls()
    model.to(dtype)

    class Trainer(base):
        def training_step(self, model, inputs, *args, **kwargs):
            loss = super().training_step(model, inputs, *args, **kwargs)
            inner = self.model
            net, random = inner.given
            inner.passes.append((net, (examples_in(inputs)), random))
            return loss

    def examples_in(inputs):
        found = next(
            (x, y)
            for x, y in batches(dtype=dtype)
            if any(torch.equal(x, v) for v in inputs.values())
        )
        return found

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    args = arguments(
        **{
            "output_dir": str(tmp_path), "per_device_train_batch_size": N, "use_cpu": True,
            "num_train_epochs": 1, "report_to": [], "save_strategy": "no", "optim": "sgd",
            "learning_rate": 0.1, "max_grad_norm": 0.0, "disable_tqdm": True, "logging_steps": 2,
            "lr_scheduler_type": "constant", "seed": 3, "eval_strategy": "steps",
            "eval_steps": 2, "dataloader_pin_memory": False, **options,
        }
    )  # fmt: skip
    found = []

    class Collect(importlib.import_module("transformers").TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            if callback.found is not None and (not found or found[-1] is not callback.found):
                found.append(callback.found)

    trainer = InOrder(
        model,
        args,
        train_dataset=examples,
        eval_dataset=examples[: 2 * N],
        callbacks=[] if callback is None else [callback, Collect],
        **({} if own_loss is None else {"compute_loss_func": own_loss}),
    )
    trainer.train()
    return trainer, found


def own_loss(outputs, labels, num_items_in_batch=None):
    values = F.cross_entropy(outputs["logits"], labels, reduction="none")
    divisor = len(labels) if num_items_in_batch is None else num_items_in_batch
    return (WEIGHTS.to(values)[labels] * values).sum() / divisor


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("loss", [None, own_loss], ids=["the model's loss", "an own loss"])
def test_transformers_tells_the_shares_that_each_class_has(tmp_path, accumulated, loss, warned):
    *_, AuditCallback = hugging()
    callback = AuditCallback(NAMES, every=1, class_weights=WEIGHTS)
    trainer, found = train(
        tmp_path, callback, own_loss=loss, gradient_accumulation_steps=accumulated
    )
    assert len(found) == STEPS // accumulated
    for i, of in enumerate(found):
        passes = trainer.model.passes[i * accumulated : (i + 1) * accumulated]
        parts = class_gradients(passes, N * accumulated)
        assert_close(of.balance.share, shares(parts), atol=1e-6, rtol=0)
        size = of.balance.norm / of.balance.gradient_norm  # divisors differ by version
        assert_close(size, parts.norm(dim=1) / parts.sum(0).norm())
        labels = torch.cat([labels for _, (_, labels), _ in passes])
        assert of.count.tolist() == labels.bincount(minlength=CLASSES).tolist()
        assert_close(of.balance.expected_share, expected_shares(labels))
        assert_close(of.step.share[:CLASSES], shares(parts), atol=1e-6, rtol=0)  # plain SGD
        assert of.moved < 1e-6
    assert warned == []


@pytest.mark.parametrize(
    ("options", "note"),
    [({}, ""), ({"max_grad_norm": 0.01}, "clipped or scaled, by a factor of")],
    ids=["", "clipped"],
)
def test_transformers_trains_the_same_to_the_bit_and_finds_clipping(
    tmp_path, options, note, warned
):
    *_, AuditCallback = hugging()
    options = {"optim": "adamw_torch", "learning_rate": 0.01, **options}
    trainer, found = train(tmp_path, callback := AuditCallback(NAMES, every=1), **options)
    alone, _ = train(tmp_path, None, **options)
    assert torch.equal(flat(trainer.model.net), flat(alone.model.net))
    for a, b in zip(trainer.model.net.buffers(), alone.model.net.buffers(), strict=True):
        assert torch.equal(a, b)
    assert len(found) == STEPS
    for of in found:
        assert of.moved < 1e-6
        assert note in of.note
        assert bool(of.note) == bool(note)
    assert len(warned) == bool(note)
    rows = [row for row in trainer.state.log_history if "share/a" in row]
    assert [row["step"] for row in rows] == [*range(1, STEPS + 1)]
    assert [rows[-1][f"share/{name}"] for name in NAMES] == callback.found.balance.share.tolist()
    assert {"expected_share/d", "update_share/history", "audit/moved"} < {*rows[-1]}
    losses = [
        [row["loss"] for row in of.state.log_history if "loss" in row] for of in (trainer, alone)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS // 2
    assert "training_step" not in vars(trainer)
    assert not trainer.model.net._forward_hooks


def test_what_transformers_reports_to_gets_the_shares(tmp_path):
    *_, AuditCallback = hugging()
    logged = []

    class Reports(importlib.import_module("transformers").TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    callback = AuditCallback(NAMES, every=3)
    callback.on_log = Reports().on_log
    train(tmp_path, callback)
    assert len([logs for logs in logged if "share/a" in logs]) == STEPS // 3


@pytest.mark.parametrize("loss", [None, own_loss], ids=["the model's loss", "an own loss"])
def test_transformers_in_bf16(tmp_path, loss, warned):
    *_, AuditCallback = hugging()
    callback = AuditCallback(NAMES, every=1)
    options = {"bf16": True, "eval_strategy": "no", "dtype": torch.float32, "own_loss": loss}
    trainer, found = train(tmp_path, callback, **options)
    alone, _ = train(tmp_path, None, **options)
    assert torch.equal(flat(trainer.model.net), flat(alone.model.net))
    assert len(found) == STEPS
    for i, of in enumerate(found):
        parts = class_gradients(trainer.model.passes[i : i + 1], N)
        assert_close(of.balance.share.float(), shares(parts), atol=0.03, rtol=0)
        assert of.moved < 0.01
    assert warned == []


class Unseen(Hugged):
    def forward(self, inputs, labels=None):
        self.given = (copy.deepcopy(self.net), torch.get_rng_state())
        logits = self.net.forward(inputs)  # past the hooks
        return {"loss": F.cross_entropy(logits, labels), "logits": logits.detach()}


@pytest.mark.parametrize(
    ("arguments", "model", "message"),
    [
        ({}, Unseen, UNSEEN),
        ({"predictions": "net.tail"}, Hugged, "has no attribute `tail`"),
        ({"groups": lambda batch: batch["kind"]}, Hugged, "not audited: KeyError: 'kind'"),
        ({"classes": 2}, Hugged, "labels must be below 2, got"),
    ],
)
def test_what_cannot_be_audited_in_transformers_is_one_warning(
    tmp_path, arguments, model, message, warned
):
    *_, AuditCallback = hugging()
    callback = AuditCallback(**{"every": 1, **arguments})
    trainer, _ = train(tmp_path, callback, cls=model, eval_strategy="no")
    alone, _ = train(tmp_path, None, cls=model, eval_strategy="no")
    assert torch.equal(flat(trainer.model.net), flat(alone.model.net))
    assert len(warned) == 1
    assert message in warned[0]


def language_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).double()


def train_language_model(tmp_path, callback):
    base, arguments, _ = hugging()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 11, (4, 8), generator=generator)
    labels = tokens.masked_fill(torch.rand(4, 8, generator=generator) < 0.2, -100)
    model = language_model()
    examples = [{"input_ids": x, "labels": y} for x, y in zip(tokens, labels, strict=True)]
    args = arguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, use_cpu=True, max_steps=1,
        report_to=[], save_strategy="no", optim="sgd", learning_rate=0.1, disable_tqdm=True,
        lr_scheduler_type="constant", max_grad_norm=0.0, dataloader_pin_memory=False,
    )  # fmt: skip
    base(model, args, train_dataset=examples, callbacks=[callback]).train()
    return tokens, labels


def test_a_language_model_by_groups_of_its_tokens(tmp_path, warned):
    *_, AuditCallback = hugging()

    def groups(batch):  # position t predicts token t + 1
        shifted = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return torch.where(shifted < 0, -1, shifted % 3)

    callback = AuditCallback(("x", "y", "z"), groups=groups, every=1)
    tokens, labels = train_language_model(tmp_path, callback)
    model = language_model()
    rows = []
    for c in range(3):
        values = F.cross_entropy(
            model(tokens).logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
        )
        of_class = (labels[:, 1:] >= 0) & (labels[:, 1:] % 3 == c)
        part = values[of_class].sum() / (labels[:, 1:] >= 0).sum()
        grads = torch.autograd.grad(part, list(model.parameters()), materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
        assert int(callback.found.count[c]) == int(of_class.sum())
    of = callback.found
    assert of.classes[:3] == ("x", "y", "z")
    assert_close(of.balance.share[:3], shares(torch.stack(rows)), atol=1e-6, rtol=0)
    assert of.moved < 1e-6
    assert warned == []


def test_a_language_model_without_groups_is_one_warning(tmp_path, warned):
    *_, AuditCallback = hugging()
    callback = AuditCallback(every=1)
    train_language_model(tmp_path, callback)
    assert callback.found is None
    assert len(warned) == 1
    assert "the classes are the tokens of a vocabulary: give groups=" in warned[0]


# What both share ---


@pytest.mark.parametrize(
    ("output", "shape"),
    [
        (torch.ones(2, 3), (2, 3)),
        (torch.ones(()), None),
        (torch.ones(2, 3, dtype=torch.int64), None),
        ({"loss": torch.ones(()), "logits": torch.ones(2, 3)}, (2, 3)),
        ({"loss": torch.ones(()), "scores": torch.ones(2, 3)}, (2, 3)),
        ({"one": torch.ones(2, 3), "two": torch.ones(2, 4)}, None),
        ((torch.ones(()), torch.ones(2, 3), torch.ones(2, 4)), (2, 3)),
        (SimpleNamespace(logits=torch.ones(2, 3)), (2, 3)),
        (None, None),
        ("text", None),
    ],
)
def test_where_the_predictions_are_in_an_output(output, shape):
    found = predictions_in(output)
    assert (None if found is None else tuple(found.shape)) == shape


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2, 3), LABELS),
        [torch.ones(2, 3), LABELS, torch.ones(2)],
        *({"x": torch.ones(2), name: LABELS} for name in ("labels", "label", "targets", "target")),
    ],
)
def test_where_the_labels_are_in_a_batch(batch):
    assert labels_of(batch) is LABELS


@pytest.mark.parametrize("batch", [torch.ones(2, 3), {"x": LABELS}, (LABELS,), ("a", "b"), None])
def test_a_batch_without_labels_asks_for_groups(batch):
    with pytest.raises(Exception, match=r"no labels in the batch, a \w+: give groups="):
        labels_of(batch)


@pytest.mark.parametrize(
    ("extra", "packages"),
    [("lightning", [*PACKAGES, "lightning"]), ("transformers", ["transformers"])],
)
def test_a_framework_that_is_missing_is_named_with_its_extra(extra, packages):
    code = f"""
import sys
for name in {packages}: sys.modules[name] = None
try:
    import funcloss.integrations.{extra} as room
    room.AuditCallback()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"is not installed: pip install 'funcloss[{extra}]'" in done.stdout


# What the callbacks found of the watch ---


@pytest.mark.parametrize(
    ("shape", "class_dim"), [((6, 4), -1), ((6, 4), 1), ((3, 4, 5, 2), 1), ((3, 5, 4), -1)]
)
def test_each_prediction_counts_once(shape, class_dim):
    torch.manual_seed(0)
    model = nn.Linear(7, torch.Size(shape[1:]).numel()).double()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    watched = watch(model, optimizer, classes=CLASSES)
    predictions = model(torch.randn(shape[0], 7).double()).view(shape)
    rows = predictions.movedim(class_dim, 1)
    labels = torch.randint(0, CLASSES, (rows.shape[0], *rows.shape[2:]))
    watched.through(predictions, labels, class_dim=class_dim, class_weights=WEIGHTS)
    values = F.cross_entropy(rows, labels, WEIGHTS, reduction="none")
    parts = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        values[labels == c].sum(), [*model.parameters()], retain_graph=True
                    )
                ]
            )
            for c in range(CLASSES)
        ]
    )
    values.sum().backward()
    optimizer.step()
    found = watched.found
    assert found.count.tolist() == labels.flatten().bincount(minlength=CLASSES).tolist()
    assert_close(found.balance.share, shares(parts), atol=1e-10, rtol=0)
    assert_close(found.balance.expected_share, expected_shares(labels.flatten()))
    assert found.note == ""


def test_a_step_lets_go_of_the_graph():
    import weakref

    net = make_net()
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    watched = watch(net, optimizer, classes=CLASSES)
    held = []
    for inputs, labels in batches(3):
        predictions = net(inputs)
        held.append(weakref.ref(predictions))
        watched.through(predictions, labels)
        F.cross_entropy(predictions, labels).backward()
        optimizer.step()
    del predictions
    assert [of() for of in held] == [None] * 3


def test_two_watches_of_one_graph_do_not_meet():
    net, (inputs, labels) = make_net(), batches(1)[0]
    optimizer = optim.SGD(net.parameters(), lr=0.1)
    one, two = (watch(net, optimizer, classes=count) for count in (CLASSES, 2))
    predictions = net(inputs)
    one.through(predictions, labels)
    two.through(predictions, labels % 2)
    F.cross_entropy(predictions, labels).backward()
    optimizer.step()
    assert one.found.note == two.found.note == ""
    sums = one.found.balance.share.view(2, 2).sum(0)
    assert_close(two.found.balance.share, sums)


# Several processes ---

RANKS = 2
SIZES = 9, 3  # examples of each rank: DistributedDataParallel averages means of different sizes


def rank_batch(rank):
    generator = torch.Generator().manual_seed(rank)
    labels = torch.randint(rank, CLASSES, (SIZES[rank],), generator=generator)
    return torch.randn(SIZES[rank], 5, generator=generator).double() + labels[:, None], labels


def make_plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def rank_steps(rank, port, into, how):
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    model = nn.parallel.DistributedDataParallel(make_plain())
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    watched = watch(model, optimizer, classes=NAMES)
    inputs, labels = rank_batch(rank)
    for _ in range(2):
        optimizer.zero_grad()
        predictions = model(inputs)
        values = F.cross_entropy(predictions, labels, reduction="none")
        if how == "backward":
            watched.backward(values, labels)
        else:
            watched.through(predictions, labels)
            values.mean().backward()
        optimizer.step()
    found = watched.found
    torch.save(
        (found.balance.share, found.balance.norm, found.count, found.step.gram, found.note,
         found.moved),
        f"{into}/{rank}",
    )  # fmt: skip
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["backward", "through"])
def test_two_processes_find_what_one_does(tmp_path, how):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(rank_steps, (port, str(tmp_path), how), RANKS)
    one = make_plain()
    optimizer = optim.SGD(one.parameters(), lr=0.1, momentum=0.9)
    watched = watch(one, optimizer, classes=NAMES)
    inputs, labels = map(torch.cat, zip(*map(rank_batch, range(RANKS)), strict=True))
    divisors = torch.cat([torch.full((size,), 1.0 * size * RANKS) for size in SIZES])
    for _ in range(2):
        optimizer.zero_grad()
        values = F.cross_entropy(one(inputs), labels, reduction="none")
        watched.backward(values / divisors, labels, divisor=1)
        optimizer.step()
    expected = watched.found
    for rank in range(RANKS):
        share, norm, count, gram, note, moved = torch.load(tmp_path / str(rank))
        assert_close(share, expected.balance.share, atol=1e-6, rtol=0)
        assert_close(norm, expected.balance.norm, atol=1e-6, rtol=0)
        assert_close(gram, expected.step.gram, atol=1e-6 * float(gram.abs().max()), rtol=0)
        assert count.tolist() == labels.bincount(minlength=CLASSES).tolist()
        assert note == ""
        assert moved < 1e-6
