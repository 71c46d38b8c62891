"""The ledger of trainings by Lightning and transformers, against that of a plain loop."""

import copy

import pytest
import test_watch_ledger as plain
import torch
import torch.nn.functional as F
from test_integrations import warned  # noqa: F401
from torch import nn, optim
from torch.testing import assert_close
from torch.utils.data import DataLoader

from funcloss.audit import LedgerOptions

WEIGHTS = plain.WEIGHTS.float()
HELD_OUT = [(b.inputs.float(), b.targets) for b in plain.HELD_OUT]
BATCHES = [(b.inputs.float(), b.targets) for b in map(plain.batch_of, range(plain.STEPS))]


def make_net(drop=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(drop),
        nn.Linear(6, plain.CLASSES),
    )  # fmt: skip


def rule(net):
    return optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def of_a_plain_loop(epochs=1):
    """Return the watch of a loop of the same steps."""
    net = make_net()
    optimizer = rule(net)
    watched = plain.watch(net, optimizer, classes=plain.NAMES, held_out=HELD_OUT, ledger="exact")
    torch.manual_seed(3)
    for inputs, labels in BATCHES * epochs:
        optimizer.zero_grad()
        predictions = net(inputs)
        watched.through(predictions, labels)
        F.cross_entropy(predictions, labels, WEIGHTS, reduction="none").mean().backward()
        optimizer.step()
    return watched, net


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request):
    return pytest.importorskip(request.param)


def callback_of(**arguments):
    from funcloss.integrations.lightning import AuditCallback

    return AuditCallback(
        **{"classes": plain.NAMES, "every": 4, "class_weights": WEIGHTS, "held_out": HELD_OUT,
           "ledger": "exact", **arguments}
    )  # fmt: skip


def fit(pl, callbacks=(), *, with_forward=False, children=1, drop=0.0, ckpt_path=None, **trainer):
    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net(drop)
            self.more = nn.ModuleList(nn.Linear(1, 1) for _ in range(children - 1))

        def configure_optimizers(self):
            return rule(self.net)

        def training_step(self, batch, number):
            return F.cross_entropy(self.net(batch[0]), batch[1], WEIGHTS, reduction="none").mean()

    class Forward(Module):
        def forward(self, inputs):
            return {"logits": self.net(inputs)}

    module = Forward() if with_forward else Module()
    torch.manual_seed(3)
    quiet = {
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "accelerator": "cpu", "devices": 1, "max_epochs": 1,
        "log_every_n_steps": 1,
    }  # fmt: skip
    trainer = pl.Trainer(callbacks=[*callbacks], **{**quiet, **trainer})
    trainer.fit(module, DataLoader(BATCHES, batch_size=None), ckpt_path=ckpt_path)
    return module, trainer


def same(callback, watched):
    assert_close(callback.ledger.net, watched.ledger.net, rtol=1e-4, atol=1e-6)
    assert_close(callback.ledger.now, watched.ledger.now, rtol=1e-5, atol=1e-6)
    assert callback.ledger_parts == watched.ledger_parts
    assert callback.ledger_note == watched.ledger_note == ""
    assert callback.ledger.residual < 0.02


@pytest.mark.parametrize("with_forward", [False, True])
def test_lightning_keeps_the_ledger_of_a_plain_loop(pl, with_forward, warned):  # noqa: F811
    callback = callback_of()
    module, _ = fit(pl, [callback], with_forward=with_forward)
    watched, net = of_a_plain_loop()
    assert_close(module.net.state_dict(), net.state_dict())
    same(callback, watched)
    assert not warned


def test_lightning_trains_the_same_to_the_bit_with_a_sampled_ledger(pl, warned):  # noqa: F811
    callback = callback_of(ledger=LedgerOptions(share=torch.inf))
    module, _ = fit(pl, [callback], drop=0.2)
    alone, _ = fit(pl, drop=0.2)
    assert_close(module.state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert int(callback.ledger.steps) == plain.STEPS
    assert callback.ledger.now.isfinite().all()
    assert not warned


def test_lightning_logs_the_ledger_after_each_epoch(pl):
    logged = []

    class Logger(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, metrics))

    callback = callback_of()
    fit(pl, [callback], logger=Logger(), max_epochs=2)
    ends = [(step, m) for step, m in logged if any(name.startswith("ledger/") for name in m)]
    assert [step for step, _ in ends] == [plain.STEPS - 1, 2 * plain.STEPS - 1]
    last, net = ends[-1][1], callback.ledger.net
    assert set(last) == {
        "ledger/a/b", "ledger/b/b", "ledger/c/b", "ledger/a/c", "ledger/b/c", "ledger/c/c",
        "ledger/a/a",
    }  # fmt: skip
    assert last["ledger/c/b"] == float(net[2, 1])


def test_lightning_goes_on_with_the_ledger_of_a_checkpoint(pl, tmp_path, warned):  # noqa: F811
    whole = callback_of()
    fit(pl, [whole], max_epochs=2)
    _, trainer = fit(pl, [first := callback_of()], max_epochs=1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = callback_of()
    fit(pl, [again], max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert int(first.ledger.steps) == plain.STEPS
    assert int(again.ledger.steps) == 2 * plain.STEPS
    assert_close(again.ledger.net, whole.ledger.net, rtol=1e-5, atol=1e-7)
    assert not again.ledger.net[:, again.ledger_parts.index("history")].any()
    assert not warned
    copied = copy.deepcopy(again)
    assert_close(copied.ledger.net, again.ledger.net)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({}, {"children": 2}, "no ledger: AuditError: Module has no forward() and 2 children"),
        ({"held_out": []}, {}, "no ledger: ConfigError: watch: held_out: there are no held-out"),
    ],
)
def test_without_a_ledger_the_shares_are_told_all_the_same(
    pl, arguments, options, message, warned  # noqa: F811
):  # fmt: skip
    callback = callback_of(**arguments)
    fit(pl, [callback], **options)
    assert callback.ledger is None
    assert callback.found is not None
    assert len(warned) == 1
    assert message in warned[0]


def test_transformers_keeps_the_ledger_of_a_plain_loop(tmp_path, warned):  # noqa: F811
    transformers = pytest.importorskip("transformers")
    from funcloss.integrations.transformers import AuditCallback

    class Hugged(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def forward(self, inputs, labels=None):
            logits = self.net(inputs)
            if labels is None:
                return {"logits": logits}
            loss = F.cross_entropy(logits, labels, WEIGHTS, reduction="none").mean()
            return {"loss": loss, "logits": logits}

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    torch.manual_seed(3)
    model = Hugged()
    held_out = [{"inputs": inputs, "labels": labels} for inputs, labels in HELD_OUT]
    callback = AuditCallback(
        classes=plain.NAMES, class_weights=WEIGHTS, held_out=held_out, ledger="exact"
    )
    trainer = Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=plain.N, use_cpu=True, num_train_epochs=1,
            report_to=[], save_strategy="no", max_grad_norm=0.0, disable_tqdm=True, seed=3,
            dataloader_pin_memory=False,
        ),
        train_dataset=[
            {"inputs": x, "labels": y}
            for inputs, labels in BATCHES
            for x, y in zip(inputs, labels, strict=True)
        ],
        callbacks=[callback],
        optimizers=(rule(model), None),
    )  # fmt: skip
    trainer.create_scheduler = lambda *args, **kwargs: optim.lr_scheduler.ConstantLR(
        trainer.optimizer, 1.0
    )
    trainer.lr_scheduler = trainer.create_scheduler()
    trainer.train()
    watched, net = of_a_plain_loop()
    assert_close(model.net.state_dict(), net.state_dict(), rtol=0, atol=0)
    same(callback, watched)
    (line,) = [m for m in trainer.state.log_history if "ledger/a/a" in m]
    assert line["ledger/c/b"] == float(callback.ledger.net[2, 1])
    assert not warned
