"""The audit against its definitions: the explicit gradients of ``audit_reference``."""

import contextlib
import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import audit_reference as ref
import pytest
import torch
from conftest import PEAK
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from funcloss import class_weighted, losses, optim, scaled
from funcloss.audit import AuditSettings, LossSpec, StepSpec, audit
from funcloss.combinators import one_hot_targets
from funcloss.errors import FunclossError
from funcloss.keys import example_keys
from funcloss.training import init_state
from funcloss.typing import Batch

METHODS = ("auto", "layers", "examples", "backward")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
CLASSES = 4


class Case(NamedTuple):
    """A model and data in double precision, exact in single, and how the audit is asked."""

    model: nn.Module
    data: Any
    parts: tuple[ref.Part, ...]
    loss: Callable[..., Tensor] = losses.cross_entropy
    classes: int = CLASSES
    coupled: bool = False
    options: dict[str, Tensor] = {}  # noqa: RUF012
    weights: Tensor | None = None
    reduction: str = "mean"
    inner: bool = False  # the reference weighs, and the loss of the audit does too
    extra: dict[str, Any] = {}  # noqa: RUF012

    def objective(self) -> ref.Objective:
        weights = torch.ones(self.classes).double() if self.weights is None else self.weights
        return ref.Objective(
            self.model,
            getattr(self.loss, "losses", (self.loss,))[0] if self.inner else self.loss,
            self.parts,
            self.classes,
            weights,
            self.options,
            self.reduction,
            self.coupled,
        )

    def audited(self, dtype=torch.float64, *, step=None, **settings) -> Any:
        options = {name: cast(value, dtype) for name, value in self.options.items()}
        spec = LossSpec(self.loss, cast(self.weights, dtype), options, self.reduction)
        settings = AuditSettings(**{"classes": self.classes, **self.extra, **settings})
        model = copy.deepcopy(self.model).to(dtype)
        return audit(model, None, spec, cast(self.data, dtype), step=step, settings=settings)


def cast(data, dtype):
    if isinstance(data, Tensor):
        return data.to(dtype) if data.is_floating_point() else data
    if isinstance(data, dict):
        return {name: cast(value, dtype) for name, value in data.items()}
    if isinstance(data, Batch):
        return Batch(*(cast(value, dtype) for value in data))
    if isinstance(data, (tuple, list)):
        return type(data)(cast(value, dtype) for value in data)
    return data


def draw(*shape, seed=0, scale=1.0):
    """Return normal numbers that single precision holds exactly, in double."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def labels_of(n, classes=CLASSES, seed=1):
    labels = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    labels[: min(n, classes)] = torch.arange(classes)[: min(n, classes)]
    return labels


# Models: each of (n, ...) inputs, with the inputs.


class Called(nn.Module):
    """A module whose forward is given, for the odd ways of calling layers."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.how = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs, **named):
        return self.how(self, *inputs, **named)


def conv():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 2 * 2, CLASSES),
    )


def odd_convs():
    return nn.Sequential(
        nn.Conv1d(3, 4, 3, padding="same", padding_mode="circular"),
        nn.Tanh(),
        nn.Conv1d(4, 4, 3, padding="same", dilation=2, groups=4),
        nn.ConvTranspose1d(4, 2, 3, stride=2),
        nn.Flatten(),
        nn.Linear(2 * 15, CLASSES),
    )


def conv3d():
    return nn.Sequential(nn.Conv3d(1, 2, 2, stride=(1, 2, 1)), nn.Flatten(), nn.Linear(24, CLASSES))


def batch_norm():
    first, second = nn.BatchNorm2d(4), nn.BatchNorm1d(64)
    for norm in (first, second):
        size = norm.num_features
        norm.running_mean = draw(size, seed=size, scale=0.2).float()
        norm.running_var = 0.5 + draw(size, seed=size + 1).float().square()
        norm.weight = nn.Parameter(1 + draw(size, seed=size + 2, scale=0.2).float())
    layers = nn.Conv2d(2, 4, 3), first, nn.ReLU(), nn.Flatten(), second, nn.Linear(64, CLASSES)
    return nn.Sequential(*layers).eval()


def norms():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.InstanceNorm2d(4, affine=True),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.LayerNorm(8),
        nn.PReLU(),
        nn.Linear(8, CLASSES),
    )


def text():
    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)).mean(1))

    embed = nn.Embedding(11, 5, padding_idx=0)
    return Called(forward, embed=embed, head=nn.Linear(5, CLASSES))


def bag():
    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)))

    return Called(forward, embed=nn.EmbeddingBag(11, 5), head=nn.Linear(5, CLASSES))


def tied():
    net = nn.Sequential(
        nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, CLASSES)
    )
    net[2].weight = net[0].weight
    return net


def tied_text():
    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)).mean(1))

    embed, head = nn.Embedding(11, 5), nn.Linear(5, 11)
    head.weight = embed.weight
    return Called(forward, embed=embed, head=head)


def reused():
    def forward(self, x):
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return self.head(x)

    return Called(forward, inner=nn.Linear(5, 5), head=nn.Linear(5, CLASSES))


class Tempered(nn.Module):
    """Logits times a scalar that is learnt too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(5, CLASSES), nn.Parameter(torch.tensor(1.5))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scale * self.fc(inputs)


def tempered() -> nn.Module:
    return Tempered()


def frozen():
    net = nn.Sequential(
        nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES)
    )
    net[0].requires_grad_(False)
    net[2].weight.requires_grad_(False)
    net[4].bias.requires_grad_(False)
    return net


def unused():
    return Called(lambda self, x: self.fc(x), fc=nn.Linear(5, CLASSES), spare=nn.Linear(3, 3))


def bare_parameters():
    def forward(self, x):
        return self.head(torch.tanh(self.scale * x + self.shift.sum()))

    return Called(
        forward,
        scale=nn.Parameter(torch.ones(5)),
        shift=nn.Parameter(0.1 * torch.ones(2, 2)),
        head=nn.Linear(5, CLASSES),
    )


def bypassed():
    """A weight that is used both by its layer and around it."""

    def forward(self, x):
        x = torch.tanh(self.fc(x) + F.linear(x, self.fc.weight.T))
        return F.linear(x, self.head.weight, self.head.bias)

    return Called(forward, fc=nn.Linear(5, 5), head=nn.Linear(5, CLASSES))


def parametrized():
    from torch.nn.utils.parametrizations import weight_norm

    return nn.Sequential(weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, CLASSES))


def sequence():
    def forward(self, x):
        return self.head(torch.tanh(self.inner(x)).mean(1))

    return Called(forward, inner=nn.Linear(3, 6), head=nn.Linear(6, CLASSES))


def time_first():
    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))

    return Called(forward, inner=nn.Linear(3, 6), head=nn.Linear(6, CLASSES))


def folded():
    def forward(self, x):
        inner = torch.tanh(self.inner(x.reshape(-1, x.shape[-1])))
        return self.head(inner.reshape(*x.shape[:2], -1).mean(1))

    return Called(forward, inner=nn.Linear(3, 6), head=nn.Linear(6, CLASSES))


def counting():
    """A buffer that is written in place and one that is assigned, in every forward pass."""

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + x.shape[-1]
        return self.head(torch.tanh(x))

    net = Called(forward, head=nn.Linear(5, CLASSES))
    net.register_buffer("calls", torch.zeros(()))
    net.register_buffer("seen", torch.zeros(()))
    return net


def positions():
    def forward(self, x):
        places = self.place(torch.arange(x.shape[1]))
        return self.head(torch.tanh(x + self.mix(places)).mean(1))

    return Called(
        forward, place=nn.Embedding(4, 3), mix=nn.Linear(3, 3), head=nn.Linear(3, CLASSES)
    )


def recurrent():
    def forward(self, x):
        return self.head(self.net(x)[0][:, -1])

    return Called(forward, net=nn.RNN(3, 4, batch_first=True), head=nn.Linear(4, CLASSES))


def gated():
    def forward(self, x):
        return self.head(self.net(x)[1][0][-1])

    return Called(forward, net=nn.LSTM(3, 4, batch_first=True), head=nn.Linear(4, CLASSES))


def attention():
    def forward(self, x):
        return self.head(self.net(x, x, x, need_weights=False)[0].mean(1))

    net = nn.MultiheadAttention(4, 2, batch_first=True)
    return Called(forward, net=net, head=nn.Linear(4, CLASSES))


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, CLASSES))


def linear():
    return nn.Linear(5, CLASSES)


N = 19
TOKENS = torch.randint(11, (N, 6), generator=torch.Generator().manual_seed(5))
MODELS = {
    "linear": (linear, draw(N, 5)),
    "mlp": (mlp, draw(N, 5)),
    "conv": (conv, draw(N, 2, 6, 6)),
    "odd convs": (odd_convs, draw(N, 3, 7)),
    "conv3d": (conv3d, draw(N, 1, 3, 4, 4)),
    "BatchNorm": (batch_norm, draw(N, 2, 6, 6)),
    "norms": (norms, draw(N, 2, 6, 6)),
    "text": (text, TOKENS),
    "bag": (bag, TOKENS),
    "tied": (tied, draw(N, 5)),
    "tied text": (tied_text, TOKENS),
    "reused": (reused, draw(N, 5)),
    "temperature": (tempered, draw(N, 5)),
    "frozen": (frozen, draw(N, 5)),
    "unused": (unused, draw(N, 5)),
    "bare parameters": (bare_parameters, draw(N, 5)),
    "bypassed": (bypassed, draw(N, 5)),
    "parametrized": (parametrized, draw(N, 5)),
    "sequence": (sequence, draw(N, 4, 3)),
    "time first": (time_first, draw(N, 4, 3)),
    "folded": (folded, draw(N, 4, 3)),
    "positions": (positions, draw(N, 4, 3)),
    "counting": (counting, draw(N, 5)),
    "recurrent": (recurrent, draw(N, 4, 3)),
    "gated": (gated, draw(N, 4, 3)),
    "attention": (attention, draw(N, 3, 4)),
}


def built(make):
    torch.manual_seed(3)
    return make().double()


@functools.cache
def model_case(name: str) -> Case:
    make, inputs = MODELS[name]
    classes = 11 if name == "tied text" else CLASSES
    labels = labels_of(N, classes)
    weights = torch.linspace(0.5, 3.0, classes).float().double()
    return Case(
        built(make),
        (inputs, labels),
        (ref.Part(inputs, labels),),
        classes=classes,
        weights=weights,
        extra={"batch_size": 8},  # which does not divide 19
    )


@functools.cache
def reference(name: str) -> ref.Reference:
    return ref.measured(CASES[name]().objective())


# Losses, reductions, masks and forms of data, on models small enough to see through.

ROWS = draw(N, 5)
LABELS = labels_of(N)
WHERE = torch.arange(N) % 3 != 1
COSTS = (1 - torch.eye(4)).double() * torch.tensor([[1.0], [2.0], [0.5], [4.0]]).double()
COSTS[2, 2] = 0.25
UNEVEN = torch.tensor([1.0, 0.0, 3.5, 0.25]).double()


def tempered(logits, labels, *, temperature, where=None):
    return losses.cross_entropy(logits / temperature, labels, where=where)


def centred(values, labels, *, strength=0.75, where=None):
    """A loss of one's own that couples: of logits less a part of the batch's mean."""
    kept = torch.ones(len(labels), dtype=torch.bool) if where is None else where
    safe = torch.where(kept[:, None], values, 0.0)
    middle = safe.sum(0) / kept.sum()
    return losses.cross_entropy(safe - strength * middle, labels, where=where)


centred.couples_examples = True  # pyright: ignore[reportFunctionMemberAccess]


def hidden_coupling(logits, labels, *, where=None):
    """Couple its examples and do not say so."""
    return losses.cross_entropy(logits - 0.5 * logits.mean(0), labels, where=where)


def batch_dice(logits, targets, *, smooth=1.0, where=None):
    return losses.over_batch(losses.dice)(logits.sigmoid(), targets, smooth=smooth, where=where)


batch_dice.couples_examples = True  # pyright: ignore[reportFunctionMemberAccess]


def one_value(predictions, targets, *, where=None):
    return losses.squared_error(predictions.squeeze(-1), targets, where=where)


def simple(make=mlp, labels=LABELS, inputs=ROWS, where=None, **more) -> Case:
    data = (inputs, labels) if where is None else Batch(inputs, labels, where)
    return Case(built(make), data, (ref.Part(inputs, labels, where),), **more)


def unreadable() -> Case:
    """Masked examples with infinite and undefined inputs: they must reach nothing."""
    inputs = ROWS.clone()
    inputs[~WHERE] = torch.inf
    inputs[1] = torch.nan
    return simple(inputs=inputs, where=WHERE, weights=UNEVEN)


def infinite_logits() -> Case:
    """Masked examples with infinite logits out of finite inputs."""

    def forward(self, x):
        return torch.where(x[..., :1] > 1e9, torch.inf, self.fc(x))

    inputs = ROWS.clone()
    inputs[~WHERE] = 1e10
    return simple(
        make=lambda: Called(forward, fc=nn.Linear(5, CLASSES)), inputs=inputs, where=WHERE
    )


def batched(where=None) -> Case:
    wheres = [None] * 3 if where is None else list(where.split(7))
    batches = [
        Batch(x, y, w) for x, y, w in zip(ROWS.split(7), LABELS.split(7), wheres, strict=True)
    ]
    parts = tuple(ref.Part(*batch) for batch in batches)
    return Case(built(mlp), batches, parts, weights=UNEVEN)


def coupled_batches() -> Case:
    case = batched()
    return case._replace(loss=centred, coupled=True, weights=None)


def a_batch_of_none() -> Case:
    where = WHERE.clone()
    where[7:14] = False
    return batched(where)


def as_dicts() -> Case:
    def forward(self, *, left, right):
        return self.head(torch.tanh(self.a(left) * self.b(right)))

    def make():
        return Called(
            forward, a=nn.Linear(5, 6), b=nn.Linear(3, 6, bias=False), head=nn.Linear(6, CLASSES)
        )

    left, right = ROWS, draw(N, 3, seed=8)
    batches = [
        {"left": a, "right": b, "labels": y, "where": w}
        for a, b, y, w in zip(*(t.split(8) for t in (left, right, LABELS, WHERE)), strict=True)
    ]
    parts = tuple(
        ref.Part({"left": b["left"], "right": b["right"]}, b["labels"], b["where"]) for b in batches
    )
    return Case(built(make), batches, parts)


def two_inputs(named=False) -> Case:
    def make():
        return nn.Bilinear(5, 3, CLASSES)

    inputs = (ROWS, draw(N, 3, seed=8))
    if named:
        inputs = {"input1": inputs[0], "input2": inputs[1]}
    return Case(built(make), (inputs, LABELS), (ref.Part(inputs, LABELS),), extra={"batch_size": 8})


def grouped() -> Case:
    """Classes by label, groups by something else: the margin is still the label's."""

    def group_by(batch):
        return (batch.inputs[..., 0] > 0).long()

    parts = (ref.Part(ROWS, LABELS, None, (ROWS[:, 0] > 0).long()),)
    extra = {"group_by": group_by, "batch_size": 8}
    weights = torch.tensor([1.0, 4.0]).double()
    return simple(**{"weights": weights})._replace(parts=parts, classes=2, extra=extra)


def regression_of_vectors() -> Case:
    targets = draw(N, 3, seed=6)

    def group_by(batch):
        return (batch.inputs[..., 0] > 0).long()

    def loss(predictions, targets, *, where=None):
        return (predictions - targets).square().sum(-1)

    parts = (ref.Part(ROWS, targets, None, (ROWS[:, 0] > 0).long()),)
    model = built(lambda: nn.Linear(5, 3))
    extra = {"group_by": group_by}
    return Case(model, (ROWS, targets), parts, loss=loss, classes=2, extra=extra)


def without_axis() -> Case:
    """One value an example, ``(n,)``."""
    case = regression()
    net = built(lambda: Called(lambda self, x: self.fc(x).squeeze(-1), fc=nn.Linear(5, 1)))
    return case._replace(model=net, loss=losses.squared_error)


def masked_labels(fill) -> Case:
    case = simple(where=WHERE, **WEIGHTED)
    return case._replace(data=Batch(ROWS, torch.where(WHERE, LABELS, fill), WHERE))


def small_labels(dtype) -> Case:
    return simple(**WEIGHTED)._replace(data=(ROWS, LABELS.to(dtype)))


def first_batch_of_none() -> Case:
    where = WHERE.clone()
    where[:7] = False
    return batched(where)


def regression(**more) -> Case:
    targets = draw(N, seed=6)

    def make():
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))

    def group_by(batch):
        return (batch.inputs[..., 0] > 0).long() + (batch.inputs[..., 1] > 1).long()

    groups = (ROWS[:, 0] > 0).long() + (ROWS[:, 1] > 1).long()
    return Case(
        built(make),
        (ROWS, targets),
        (ref.Part(ROWS, targets, None, groups),),
        loss=one_value,
        classes=3,
        extra={"group_by": group_by, "batch_size": 8},
        **more,
    )


def views(where=None, **more) -> Case:
    """Two views: the other one is the target, of which groups must be told."""
    other = draw(N, 3, seed=12)

    def make():
        return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def group_by(batch):
        return (batch.targets[..., 0] > 0).long()

    data = (ROWS, other) if where is None else Batch(ROWS, other, where)
    return Case(
        built(make),
        data,
        (ref.Part(ROWS, other, where, (other[:, 0] > 0).long()),),
        classes=2,
        coupled=True,
        extra={"group_by": group_by},
        **more,
    )


def masks_of_pixels() -> Case:
    case = views(loss=batch_dice, options={"smooth": torch.tensor(0.5).double()})
    targets = (case.parts[0].targets > 0.3).double()
    groups = targets.sum(1).clamp(max=1).long()

    def group_by(batch):
        return batch.targets.sum(-1).clamp(max=1).long()

    return case._replace(
        data=(ROWS, targets),
        parts=(ref.Part(ROWS, targets, None, groups),),
        extra={"group_by": group_by},
    )


TEMPERATURE = {"temperature": torch.tensor(1.75).double()}
GAMMA = {"gamma": torch.tensor(1.5).double()}
WEIGHTED = {"weights": UNEVEN}
ABSENT = torch.where(LABELS == 2, 1, LABELS)
SETTINGS: dict[str, Callable[[], Case]] = {
    "plain": simple,
    "one example": lambda: simple(inputs=ROWS[:1], labels=LABELS[:1]),
    "weights": lambda: simple(**WEIGHTED),
    "weighted mean": lambda: simple(reduction="weighted_mean", **WEIGHTED),
    "sum": lambda: simple(reduction="sum", **WEIGHTED),
    "where": lambda: simple(where=WHERE, **WEIGHTED),
    "where, weighted mean": lambda: simple(where=WHERE, reduction="weighted_mean", **WEIGHTED),
    "where, sum": lambda: simple(where=WHERE, reduction="sum"),
    "masked inputs not finite": unreadable,
    "masked logits not finite": infinite_logits,
    "absent class": lambda: simple(labels=ABSENT, **WEIGHTED),
    "a single class": lambda: simple(labels=torch.full_like(LABELS, 2)),
    "batches": batched,
    "batches, where": lambda: batched(WHERE),
    "a batch of none": a_batch_of_none,
    "first batch of none": first_batch_of_none,
    "masked labels below": lambda: masked_labels(-100),
    "masked labels above": lambda: masked_labels(999),
    "labels of 32 bits": lambda: small_labels(torch.int32),
    "labels of 8 bits": lambda: small_labels(torch.uint8),
    "groups of classes": grouped,
    "regression of vectors": regression_of_vectors,
    "predictions without an axis": without_axis,
    "class-weighted loss": lambda: simple(**WEIGHTED)._replace(
        loss=class_weighted(losses.cross_entropy), inner=True
    ),
    "dict batches": as_dicts,
    "two inputs": two_inputs,
    "named inputs": lambda: two_inputs(named=True),
    "focal": lambda: simple(loss=losses.softmax_focal, options=GAMMA, **WEIGHTED),
    "squared error": lambda: simple(loss=one_hot_targets(losses.squared_error)),
    "expected cost": lambda: simple(
        loss=losses.expected_cost, options={"cost_matrix": COSTS}, **WEIGHTED
    ),
    "expected cost, weighted mean": lambda: simple(
        loss=losses.expected_cost,
        options={"cost_matrix": COSTS},
        where=WHERE,
        reduction="weighted_mean",
        **WEIGHTED,
    ),
    "temperature": lambda: simple(loss=tempered, options=TEMPERATURE, reduction="sum"),
    "regression": regression,
    "regression, weights": lambda: regression(weights=torch.tensor([1.0, 4.0, 0.5]).double()),
    "coupled": lambda: simple(loss=centred, coupled=True),
    "coupled, where": lambda: simple(loss=centred, coupled=True, where=WHERE),
    "coupled, sum": lambda: simple(loss=centred, coupled=True, where=WHERE, reduction="sum"),
    "coupled, absent class": lambda: simple(loss=centred, coupled=True, labels=ABSENT),
    "coupled, option": lambda: simple(
        loss=centred, coupled=True, options={"strength": torch.tensor(0.5).double()}
    ),
    "coupled, batches": coupled_batches,
    "coupled in secret": lambda: simple(loss=hidden_coupling, coupled=True),
    "supervised contrastive": lambda: simple(
        loss=losses.supervised_contrastive, coupled=True, options=TEMPERATURE
    ),
    "nt_xent": lambda: views(loss=losses.nt_xent, options=TEMPERATURE),
    "nt_xent, where": lambda: views(WHERE, loss=losses.nt_xent),
    "batch dice": masks_of_pixels,
}
CASES: dict[str, Callable[[], Case]] = {
    **{name: functools.partial(model_case, name) for name in MODELS},
    **SETTINGS,
}


# Agreement.


def near(actual, expected, tolerance, what, size=None):
    """Assert that two tensors agree relative to the size of the expected, undefined alike."""
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert actual.shape == expected.shape, what
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: {actual}, not {expected}"
    defined = ~expected.isnan()
    if not defined.any():
        return
    size = expected[defined].abs().max() if size is None else size
    error = (actual - expected)[defined].abs().max() / max(float(size), 1e-300)
    assert error <= tolerance, f"{what}: off by {error:.1e} of {size:.3g}: {actual}, not {expected}"


def agree(audited, expected: ref.Reference, tolerance, *, norms=True, slopes=True):
    """Assert that an audit says what follows from the explicit gradients.

    ``norms``, ``slopes``: False where no example's is measured, which NaN says.
    """
    now, g, examples = audited.balance, expected.gradient.norm(), audited.examples
    pairs = {
        "gram": (audited.gram, expected.gram),
        "loss": (audited.loss, expected.loss),
        "share": (now.share, expected.share),
        "expected share": (now.expected_share, expected.expected_share),
        "norm": (now.norm, expected.norm),
        "gradient norm": (now.gradient_norm, g),
        "conflict": (now.conflict, expected.conflict),
        "examples' loss": (examples.loss, expected.losses),
    }
    by_example = {
        "length": (audited.length, expected.length),
        "norm quantiles": (audited.norm_quantiles, expected.quantiles(QUANTILES)),
        "agreement": (audited.agreement, expected.agreement),
        "examples' norm": (examples.norm, expected.example_norm),
    }
    if norms:
        pairs |= by_example
    else:
        assert all(actual.isnan().all() for actual, _ in by_example.values())
    if norms and slopes:
        pairs["alignment"] = (audited.alignment, expected.alignment)
    else:
        assert audited.alignment.isnan().all()
    if not expected.objective.coupled:
        pairs["margin"] = (examples.margin, expected.margin)
    assert torch.equal(audited.count, expected.counts)
    assert torch.equal(examples.index, expected.positions)
    assert torch.equal(examples.label, expected.label)
    for what, (actual, wanted) in pairs.items():
        near(actual, wanted, tolerance, what)
    if slopes:
        near(examples.slope, expected.slope, tolerance, "slope", expected.example_norm.max() * g)
    else:
        assert examples.slope.isnan().all()
    columns = expected.layer_parts(audited.layers)
    assert [len(c) for c in columns] == list(audited.layer_sizes)
    for i, at in enumerate(columns):
        unit = expected.unit[:, at]
        largest = expected.gram.abs().max()
        near(audited.layer_gram[i], unit @ unit.T, tolerance, audited.layers[i], largest)


# Where a parameter is used in a function that no layer function knows, or not for each example.
NOT_BY_LAYERS = {
    "odd convs",
    "norms",
    "bag",
    "bare parameters",
    "parametrized",
    "positions",
    "recurrent",
    "gated",
}
NOT_BY_EXAMPLES = {"recurrent", "gated"}
USED_TWICE = {"tied", "tied text", "reused", "bypassed"}
ONCE_DIFFERENTIABLE = {"bag"}


def has_norms(name, method):
    """Return whether a method measures single examples' norms of a case."""
    if method == "auto":
        return name not in NOT_BY_LAYERS & NOT_BY_EXAMPLES
    return method == "examples" or (method == "layers" and name not in USED_TWICE)


IN_SINGLE = {name: METHODS for name in MODELS} | {name: ("auto",) for name in SETTINGS}
TABLE = [
    pytest.param(name, method, dtype, id=f"{name}-{method}-{dtype}".replace("torch.", ""))
    for dtype in TOLERANCE
    for name in CASES
    for method in (METHODS if dtype == torch.float64 else IN_SINGLE[name])
]


@pytest.mark.parametrize(("name", "method", "dtype"), TABLE)
def test_an_audit_is_what_the_explicit_gradients_say(name, method, dtype):
    if method == "examples" and name in NOT_BY_EXAMPLES:
        with pytest.raises(FunclossError, match=f"{method} cannot measure this model: "):
            CASES[name]().audited(dtype, method=method)
        return
    if method == "layers" and name in NOT_BY_LAYERS:
        with pytest.raises(FunclossError, match="layers cannot measure this model: "):
            CASES[name]().audited(dtype, method=method)
        return
    audited = CASES[name]().audited(dtype, method=method)
    slopes, norms = name not in ONCE_DIFFERENTIABLE, has_norms(name, method)
    agree(audited, reference(name), TOLERANCE[dtype], norms=norms, slopes=slopes)
    told = [note for note in audited.notes if "norms of single examples" in note]
    assert bool(told) != norms
    assert any("slopes of single examples" in note for note in audited.notes) != slopes
    assert audited.linear_in_weights != CASES[name]().coupled
    held = [check for check in audited.checks if check.tolerance is not None]
    assert held
    assert all(check.error <= check.tolerance for check in held)


LITTLE = ["text", "where, weighted mean", "batches, where", "coupled, where", "focal"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LITTLE)
def test_little_memory_changes_nothing_but_the_time(name, method):
    case, expected = CASES[name](), reference(name)
    audited = case.audited(method=method, memory=1e-4, step=StepSpec(optim.sgd(), RATE))
    agree(audited, expected, 1e-10, norms=method != "backward")
    assert audited.method.chunk < 5
    for option in expected.objective.options:
        near(audited.elasticities[option], expected.option_elasticity(option), 1e-8, option, 1.0)
    if not case.coupled:
        step_parts = dict(zip(audited.classes, -RATE * expected.parts, strict=True))
        rows = step_agrees(audited.step, step_parts, 1e-9)
        impact_agrees(audited, {"train": expected.objective}, rows)


# What of an audit needs no method.


@pytest.mark.parametrize("name", ["where", "sum", "weighted mean", "regression, weights"])
def test_class_weights_are_as_elastic_as_finite_differences_say(name):
    audited, expected = CASES[name]().audited(), reference(name)
    near(audited.balance.elasticity, expected.elasticity(), 1e-8, "class weights", 1.0)
    if "class_weights" in audited.elasticities:
        near(audited.elasticities["class_weights"], expected.elasticity(), 1e-8, "again", 1.0)
    total = 0.0 if expected.objective.reduction == "weighted_mean" else 1.0
    assert abs(float(audited.balance.elasticity.sum()) - total) < 1e-10


WITH_OPTIONS = [name for name, make in SETTINGS.items() if make().options]


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_options_are_as_elastic_as_finite_differences_say(name):
    audited, expected = CASES[name]().audited(), reference(name)
    for option in expected.objective.options:
        wanted = expected.option_elasticity(option)
        assert wanted.abs().max() > 1e-3  # so that the next line can fail
        near(audited.elasticities[option], wanted, 1e-8, option, 1.0)


def dropping():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Dropout2d(0.25),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(6, CLASSES),
    )


@pytest.mark.parametrize("where", [None, WHERE], ids=["all", "where"])
@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_that_of_the_step(method, where):
    model, images = built(dropping), draw(N, 2, 6, 6)
    state = init_state(model, optim.sgd(), seed=7)._replace(step=torch.tensor(5))
    batches, parts = [], []
    for i, at in enumerate(torch.arange(N).split(8)):
        mask = None if where is None else where[at]
        batches.append(Batch(images[at], LABELS[at], mask))
        keys = example_keys(state.key, state.step + i, len(at))
        parts.append(ref.Part(images[at], LABELS[at], mask, None, keys))
    spec, settings = LossSpec(losses.cross_entropy, UNEVEN), AuditSettings(method=method)
    audited: Any = audit(model, state, spec, batches, settings=settings)
    objective = ref.Objective(
        model, losses.cross_entropy, tuple(parts), CLASSES, UNEVEN, {}, "mean"
    )
    expected = ref.measured(objective)
    asleep = ref.measured(objective._replace(model=copy.deepcopy(model).eval()))
    assert (expected.gram - asleep.gram).abs().max() > 0.01 * asleep.gram.abs().max()
    agree(audited, expected, 1e-10, norms=method != "backward")


# The step.

RULES, OURS = ref.RULES, ref.OURS
RATE, TAKEN = 0.25, 4
SCHEDULE, FACTORS = optim.step_decay(every=2, factor=0.5), (1.0, 1.0, 0.5, 0.5)


@functools.cache
def twin(name: str, rule: str) -> tuple[ref.TwinStep, ...]:
    """Steps of ``torch.optim``, each under other class weights, so that the memory matters."""
    objective = CASES[name]().objective()
    ones = torch.ones_like(objective.class_weights)
    weights = [ones, ones.cumsum(0), ones.cumsum(0).flip(0), objective.class_weights]
    if objective.coupled:
        weights = [objective.class_weights] * TAKEN
    objectives = [objective._replace(class_weights=w) for w in weights]
    return tuple(ref.twin_steps(objectives, RULES[rule], RATE, FACTORS))


def state_before(rule: ref.Rule, optimizer, taken: ref.TwinStep, number: int):
    """Return the state of a training that has come as far as the twin."""
    state = init_state(taken.model, optimizer)._replace(step=torch.tensor(number))

    def named(flat):
        pieces = flat.split([p.numel() for p in state.params.values()])
        return {
            n: piece.reshape(p.shape).clone()
            for piece, (n, p) in zip(pieces, state.params.items(), strict=True)
        }

    memory = state.opt_state._replace(step=torch.tensor(number))
    if rule.name == "sgd" and taken.first is not None:
        memory = memory._replace(velocity=named(taken.first))
    elif taken.first is not None:
        memory = memory._replace(first=named(taken.first), second=named(taken.second))
    return state._replace(opt_state=memory)


def rows_of(objective, rule: ref.Rule, taken: ref.TwinStep, number: int, names):
    """Return each row's part of the step after the twin's memory."""
    known = {} if taken.first is None else {"history": taken.first}
    memory = ref.Memory(number, known, 0.0 if taken.second is None else taken.second)
    parts = ref.class_parts(objective, names)
    rate = RATE * FACTORS[number]
    return rule.split(parts, ref.flat_params(taken.model), memory, rate)[0]


def step_agrees(step, expected: dict[str, Tensor], tolerance):
    """Assert that a step is made up as expected; a row may be left out where it is 0."""
    zero = torch.zeros_like(next(iter(expected.values())))
    missing = [row for row in expected if row not in step.rows]
    assert all((expected[row] == 0).all() for row in missing), missing
    rows = torch.stack([expected.get(row, zero) for row in step.rows])
    near(step.gram, rows @ rows.T, tolerance, "step")
    # Shares are these over |u|^2, which may be a hundred times smaller than the rows' own.
    largest = (rows @ rows.T).abs().max()
    near(step.gram.sum(1), rows @ rows.sum(0), tolerance, "update share", largest)
    near(step.update_norm**2, rows.sum(0).square().sum(), tolerance, "update norm", largest)
    return rows


@pytest.mark.parametrize("number", [0, TAKEN - 1])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "name", ["batches, where", "absent class", "weighted mean", "coupled, where"]
)
def test_the_step_is_made_up_as_that_of_torch(name, rule, number):
    case, recipe = CASES[name](), RULES[rule]
    optimizer, taken = OURS[recipe.name](**recipe.options), twin(name, rule)[number]
    weights = torch.ones(CLASSES).double().cumsum(0) if case.weights is None else case.weights
    weights = case.objective().class_weights if case.coupled else weights
    if number == 0:
        weights = torch.ones(CLASSES).double()  # of the twin's first step
    objective = case._replace(model=taken.model, weights=weights).objective()
    held_out = (ROWS.flip(1), LABELS)
    audited: Any = audit(
        case.model,
        state_before(recipe, optimizer, taken, number),
        LossSpec(case.loss, None if case.coupled else weights, reduction=case.reduction),
        case.data,
        step=StepSpec(optimizer, RATE, SCHEDULE, recipe.clip_norm, held_out),
    )
    expected = rows_of(objective, recipe, taken, number, audited.classes)
    near(ref.total(expected), taken.update, 1e-9, "torch's own step")
    rows = step_agrees(audited.step, expected, 1e-9)
    largest = (rows @ rows.T).abs().max()  # of which a small |u|^2 is the difference
    square = taken.update.square().sum()
    near(audited.step.update_norm**2, square, 1e-9, "torch's own step", largest)
    assert audited.step.learning_rate == pytest.approx(RATE * FACTORS[number], rel=1e-12)
    gradient = ref.total(ref.class_parts(objective, audited.classes))
    assert audited.step.clip == pytest.approx(recipe.clip(gradient), rel=1e-9)
    other = objective._replace(parts=(ref.Part(ROWS.flip(1), LABELS),))
    if not case.coupled:
        impact_agrees(audited, {"train": objective, "held_out": other}, rows)


def impact_agrees(audited, judged, rows):
    for part, objective in judged.items():
        found = audited.impact[part]
        matrix, before, after = ref.impact(
            objective, dict(zip(audited.step.rows, rows, strict=True)), found.pieces
        )
        assert found.residual <= 0.05 or found.pieces == 8
        near(found.matrix, matrix, 1e-9, f"{part} impact")
        near(found.before, before, 1e-10, f"{part} before")
        near(found.after, after, 1e-9, f"{part} after")
        near(
            found.predicted,
            matrix.sum(1),
            1e-9,
            f"{part} predicted",
            matrix.nan_to_num().abs().max(),
        )


def test_the_impact_adds_up_to_what_the_step_changes():
    """First order misses by more than a half at this rate; in pieces the parts close."""
    case = CASES["weights"]()
    rates = {}
    for rate in (0.3, 30.0, 300.0):
        audited = case.audited(step=StepSpec(optim.sgd(), rate))
        found = audited.impact["train"]
        assert float((found.predicted - found.measured).norm() / found.measured.norm()) < 0.05
        rates[rate] = found.pieces
        assert audited.notes == ()
    assert rates[0.3] == 1
    assert max(rates.values()) > 1


def test_the_impact_under_a_coupled_loss_is_on_each_class_s_mean_value():
    case = CASES["coupled, where"]()
    audited = case.audited(step=StepSpec(optim.sgd(), RATE))
    parts = -RATE * reference("coupled, where").parts
    zero = torch.zeros(len(audited.step.rows) - CLASSES, parts.shape[1]).double()
    impact_agrees(audited, {"train": case.objective()}, torch.cat([parts, zero]))


def test_a_step_without_history_is_of_the_gradient_and_says_so():
    case = CASES["weights"]()
    rules = optim.sgd(), optim.sgd(momentum=0.9), optim.adam()
    plain, cold, adam = (case.audited(step=StepSpec(rule, RATE)) for rule in rules)
    parts = RATE * reference("weights").parts
    for audited in (plain, cold):
        near(audited.step.gram[:CLASSES, :CLASSES], parts @ parts.T, 1e-10, "step")
    assert plain.step.note == ""
    assert cold.step.note
    assert adam.step is None


def several_steps(name):
    """Yield each step of a twin, with the class parts of its gradient and its learning rate."""
    names = [str(c) for c in range(CLASSES)]
    weights = [1.0] * 4, [1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0], UNEVEN.tolist()
    for taken, now, factor in zip(twin("where", name), weights, FACTORS, strict=True):
        objective = CASES["where"]().objective()
        objective = objective._replace(model=taken.model, class_weights=torch.tensor(now).double())
        yield taken, ref.class_parts(objective, names), RATE * factor


@pytest.mark.parametrize("name", RULES)
def test_an_optimiser_splits_several_steps_with_a_memory_for_every_row(name):
    rule, known = RULES[name], ref.Memory(0, {})
    optimizer = OURS[rule.name](**rule.options)
    split, memory = optimizer.split, None
    assert split is not None
    for number, (taken, parts, rate) in enumerate(several_steps(name)):
        params = ref.flat_params(taken.model)
        expected, known = rule.split(parts, params, known, rate)
        near(ref.total(expected), taken.update, 1e-9, f"torch's step {number}")
        state = state_before(rule, optimizer, taken, number)
        lr = torch.tensor(rate).double()
        clip = rule.clip(ref.total(parts))
        inside, outside = split.decay(state.params, lr)
        decay = torch.cat([inside[n].flatten() for n in state.params]) if inside else 0 * params
        fresh = torch.stack([*(clip * part for part in parts.values()), decay])
        stacked = unflattened(fresh, state.params)
        if memory is None:
            none = torch.zeros_like(fresh)
            memory = unflattened(none, state.params) if split.memory(state.opt_state) else {}
        whole = unflattened(fresh.sum(0), state.params)
        moves, memory = split.steps(stacked, memory, whole, state.opt_state, lr)
        found = torch.cat([moves[n].flatten(1) for n in state.params], 1)
        if outside:
            found[-1] += torch.cat([outside[n].flatten() for n in state.params])
        wanted = torch.stack([expected[row] for row in (*parts, "weight decay")])
        near(found, wanted, 1e-9, f"step {number}")


def unflattened(flat, params):
    """Return ``(..., P)`` as tensors by name, ``(..., *shape)``."""
    pieces = flat.split([p.numel() for p in params.values()], -1)
    return {
        name: piece.reshape(*flat.shape[:-1], *p.shape)
        for piece, (name, p) in zip(pieces, params.items(), strict=True)
    }


# The reference itself.


@pytest.mark.parametrize("name", CASES)
def test_the_reference_sums_to_the_gradient_of_the_loss(name):
    expected = reference(name)
    whole = ref.flat_grad(expected.objective.total(), expected.objective.model)
    near(expected.gradient, whole, 1e-12, "gradient")
    assert abs(float(expected.share.sum()) - 1) < 1e-10


@pytest.mark.parametrize("name", ["plain", "weights", "where, weighted mean", "sum"])
def test_the_reference_shares_are_finite_differences(name):
    expected = reference(name)
    weighted_mean = expected.objective.reduction == "weighted_mean"
    share = expected.share - expected.expected_share if weighted_mean else expected.share
    near(share, expected.elasticity(), 1e-9, "elasticity", 1.0)


# Forms of the same data.


class Pairs(TorchDataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return ROWS[i], int(LABELS[i])


FORMS = {
    "batch": lambda: Batch(ROWS, LABELS),
    "list of pairs": lambda: list(zip(ROWS.split(6), LABELS.split(6), strict=True)),
    "loader": lambda: DataLoader(TensorDataset(ROWS, LABELS), batch_size=6),
    "tensors' data set": lambda: TensorDataset(ROWS, LABELS),
    "data set": Pairs,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_data_is_the_same_data(form):
    model = simple().model
    spec = LossSpec(losses.cross_entropy, UNEVEN)
    audited: Any = audit(model, None, spec, FORMS[form](), settings=AuditSettings(batch_size=6))
    agree(audited, reference("weights"), 1e-10)


def test_state_params_and_the_model_itself_are_the_same_params():
    model = simple().model
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        for p in wrong.parameters():
            p += 1.0
    state = init_state(model, optim.sgd())
    for tensors in (state, state.params):
        spec = LossSpec(losses.cross_entropy, UNEVEN)
        audited: Any = audit(wrong, tensors, spec, (ROWS, LABELS))
        agree(audited, reference("weights"), 1e-10)
    assert not any(p.grad is not None for p in wrong.parameters())


def test_a_state_brings_the_buffers():
    case = CASES["BatchNorm"]()
    state = init_state(case.model, optim.sgd())
    fresh = copy.deepcopy(case.model)
    fresh.load_state_dict({name: 0.5 * t for name, t in fresh.state_dict().items()})
    before = copy.deepcopy(fresh.state_dict())
    audited: Any = audit(fresh, state, LossSpec(case.loss, case.weights), case.data)
    agree(audited, reference("BatchNorm"), 1e-10)
    assert all(torch.equal(t, before[name]) for name, t in fresh.state_dict().items())


def test_classes_have_names_or_as_many_as_there_are():
    case = simple()
    named = case.audited(classes=["a", "b", "c", "d"])
    assert named.classes == ("a", "b", "c", "d")
    absent = LABELS.clamp(max=1)
    assert len(audit(case.model, None, case.loss, (ROWS, absent)).classes) == CLASSES


def test_the_most_opposed_and_dominant_are_by_position_in_the_data():
    audited, expected = CASES["batches, where"]().audited(), reference("batches, where")
    for c in range(CLASSES):
        mine = (expected.label == c).nonzero().squeeze(1)
        opposed = mine[expected.cosine[mine].argsort()][:3]
        dominant = mine[expected.example_norm[mine].argsort(descending=True)][:3]
        assert audited.most_opposed(c, 3) == expected.positions[opposed].tolist()
        assert audited.most_dominant(c, 3) == expected.positions[dominant].tolist()


def test_without_examples_the_classes_are_the_same():
    case = CASES["where"]()
    audited, expected = case.audited(per_example=False), reference("where")
    assert audited.examples is None
    near(audited.gram, expected.gram, 1e-10, "gram")
    near(audited.balance.share, expected.share, 1e-10, "share")


def test_the_standard_error_is_that_of_leaving_out_a_batch():
    labels = torch.arange(40) % CLASSES
    rows = draw(40, 5, seed=4)
    batches = [ref.Part(x, y) for x, y in zip(rows.split(8), labels.split(8), strict=True)]
    costs = torch.tensor([1.0, 2.0, 0.5, 4.0]).double()
    case = simple(inputs=rows, labels=labels, weights=costs)
    audited = case.audited(batch_size=8)
    errors, root = audited.standard_errors, 5**0.5
    assert errors.batches == 5
    assert errors.batch_size == 8
    left = [
        ref.measured(case.objective()._replace(parts=(*batches[:b], *batches[b + 1 :])))
        for b in range(5)
    ]
    # a batch is kept to three digits
    near(root * errors.share, 4 * torch.stack([e.share for e in left]).std(0), 2e-2, "share")
    conflict = 4 * torch.stack([e.conflict for e in left]).std(0)
    near(root * errors.conflict, conflict.fill_diagonal_(0.0), 2e-2, "conflict")


def test_the_standard_error_is_that_of_fresh_data():
    weights = torch.tensor([1.0, 1.0, 1.0, 5.0]).double()
    model = torch.nn.Linear(5, CLASSES).double()
    shares, told = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        labels = torch.randint(CLASSES, (400,))
        rows = torch.randn(400, 5).double() + 0.7 * torch.eye(CLASSES, 5).double()[labels]
        torch.nn.init.constant_(model.weight, 0.1)
        torch.nn.init.zeros_(model.bias)
        spec, settings = LossSpec(losses.cross_entropy, weights), AuditSettings(batch_size=40)
        found = audit(model, None, spec, (rows, labels), settings=settings)
        shares.append(found.balance.share)
        told.append(found.standard_errors.share)
    true, said = torch.stack(shares).std(0), torch.stack(told).mean(0)
    assert ((said / true > 0.6) & (said / true < 1.6)).all(), said / true


# Laws, of any weights.

COSTS_OF_FOUR = st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 2.0, 7.0]), min_size=4, max_size=4)


@functools.cache
def in_single(reduction):
    return simple(reduction=reduction).audited(torch.float32)


@settings(max_examples=15, deadline=None)
@given(COSTS_OF_FOUR.filter(any), st.sampled_from(["mean", "weighted_mean", "sum"]))
def test_reweighting_is_a_fresh_audit(weights, reduction):
    weights = torch.tensor(weights)
    fresh = simple(reduction=reduction, weights=weights).audited(torch.float32)
    now, told = fresh.balance, in_single(reduction).reweighted(weights)
    for what in ("share", "expected_share", "elasticity", "conflict", "norm", "gradient_norm"):
        near(getattr(told, what), getattr(now, what), 1e-6, what)
    assert abs(float(now.share.sum()) - 1) < 1e-6
    total = 0.0 if reduction == "weighted_mean" else 1.0
    assert abs(float(now.elasticity.sum()) - total) < 1e-6
    near(fresh.layer_gram.sum(0), fresh.gram, 1e-6, "layers")
    near(fresh.layer_share.nansum(-1), torch.ones(len(fresh.layers)), 1e-6, "layer shares")


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=12),
    st.data(),
)
def test_any_few_examples_are_audited(labels, data):
    size = data.draw(st.integers(1, len(labels)))
    where = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels)))
    )
    where[data.draw(st.integers(0, len(labels) - 1))] = True
    method = data.draw(st.sampled_from(METHODS))
    case = simple(labels=torch.tensor(labels), inputs=ROWS[: len(labels)], where=where)
    audited = case.audited(method=method, batch_size=size)
    agree(audited, ref.measured(case.objective()), 1e-10, norms=method != "backward")


# Bounds and refusals.

MEMORY = """
import torch
from torch import nn
from funcloss import losses
from funcloss.audit import AuditSettings, audit
torch.set_num_threads(1)
torch.manual_seed(0)
hidden = nn.Linear(20, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh()
model = nn.Sequential(*hidden, nn.Linear(200, 5))
def after(n, method):
    data = torch.randn(n, 20), torch.arange(n) % 5
    settings = AuditSettings(method=method, memory=8.0)
    audit(model, None, losses.cross_entropy, data, settings=settings)
    return peak()
methods = "auto", "layers", "backward", "examples"
first = max(after(200, method) for method in methods)
print(*(after(1500, method) - first for method in methods))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_examples():
    """1,500 gradients of 45,405 numbers are 260 MiB; a chunk and the data are a few."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK + MEMORY], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    grown = [float(number) for number in done.stdout.split()]
    assert len(grown) == len(METHODS)
    assert max(grown) < 60.0


@pytest.mark.parametrize("classes", [150, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_classes_are_what_their_gradients_say(classes):
    torch.manual_seed(0)
    n = 300
    model = nn.Linear(6, classes).double()
    rows, labels = draw(n, 6), torch.randint(classes, (n,))
    settings = AuditSettings(memory=classes / 250, classes=classes)
    audited: Any = audit(model, None, losses.cross_entropy, (rows, labels), settings=settings)
    slopes = model(rows).softmax(1).detach() - F.one_hot(labels, classes)
    each = torch.cat([(slopes[:, :, None] * rows[:, None]).flatten(1), slopes], 1)
    unit = torch.zeros(classes, each.shape[1]).double().index_add_(0, labels, each) / n
    near(audited.gram, unit @ unit.T, 1e-10, "gram")
    near(audited.examples.norm, each.norm(dim=1), 1e-10, "norm")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("norm", "says"),
    [
        (nn.BatchNorm1d(6), r"'1\.0' \(BatchNorm1d\) is in training mode.*eval"),
        (nn.BatchNorm1d(6, track_running_stats=False).eval(), r"'1\.0'.* keeps no running stat"),
    ],
)
def test_batch_norm_that_couples_examples_is_named(norm, says, method):
    net = nn.Sequential(nn.Linear(5, 6), nn.Sequential(norm), nn.Linear(6, CLASSES))
    data, settings = (ROWS.float(), LABELS), AuditSettings(method=method)
    with pytest.raises(FunclossError, match=says):
        audit(net, None, losses.cross_entropy, data, settings=settings)


def test_class_weights_of_a_coupled_loss_are_refused():
    case = CASES["coupled"]()
    with pytest.raises(FunclossError, match="class weight"):
        case._replace(weights=UNEVEN).audited()
    with pytest.raises(ValueError, match="couples"):
        case.audited().reweighted(UNEVEN)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: AuditSettings(method="guess"), "AuditSettings: method must be one of auto, laye"),
        (lambda: AuditSettings(classes=0), "AuditSettings: classes must be at least 1, got 0"),
        (lambda: AuditSettings(classes=()), "AuditSettings: classes must be at least 1, got 0"),
        (lambda: AuditSettings(memory=float("inf")), "AuditSettings: memory and batch_size must"),
        (lambda: AuditSettings(batch_size=0), "AuditSettings: memory and batch_size must"),
        (lambda: StepSpec(optim.sgd(), RATE, clip_norm=-1.0), "StepSpec: clip_norm must be at l"),
        (
            lambda: simple(weights=UNEVEN[:3]).audited(),
            r"class_weights must have shape \(4,\), got",
        ),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_a_gradient_that_is_given_is_compared_with_the_parts():
    case = simple(**WEIGHTED)
    total = case.objective().total()
    grads = torch.autograd.grad(total, list(case.model.parameters()))
    given = dict(zip(dict(case.model.named_parameters()), grads, strict=True))
    (check,) = (c for c in case.audited(gradient=given).checks if c.name == "step")
    assert check.error < 1e-10
    twice = {name: 2 * g for name, g in given.items()}
    with pytest.raises(FunclossError, match="the check 'step' does not hold.* error 0.5, "):
        case.audited(gradient=twice)


def test_class_weights_may_be_an_option_and_are_as_elastic_as_shares():
    case = simple(
        loss=class_weighted(losses.cross_entropy), options={"class_weights": UNEVEN}, where=WHERE
    )
    expected = reference("where")
    near(case.audited().elasticities["class_weights"], expected.share, 1e-10, "elasticity", 1.0)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_out_of_range_is_refused(label):
    labels = LABELS.clone()
    labels[4] = label
    with pytest.raises((FunclossError, ValueError), match="label"):
        simple(labels=labels).audited()


def test_data_that_changes_or_ends_is_refused():
    model = simple().model
    shuffled = DataLoader(TensorDataset(ROWS, LABELS), batch_size=6, shuffle=True)
    once = (pair for pair in zip(ROWS.split(6), LABELS.split(6), strict=True))
    for data in (shuffled, once):
        with pytest.raises((FunclossError, TypeError)):
            audit(model, None, losses.cross_entropy, data)


def detached_coupling(logits, labels, *, where=None):
    """Couple its examples by a factor that no gradient passes through."""
    values = losses.cross_entropy(logits, labels, where=where)
    return values / values.detach().mean()


def test_a_coupling_that_no_gradient_tells_is_measured_or_refused():
    case = simple(loss=detached_coupling, coupled=True)
    told = None
    with contextlib.suppress(FunclossError):
        told = case.audited(memory=1e-4)
    if told is not None:
        near(told.gram, ref.measured(case.objective()).gram, 1e-10, "gram")


def test_norms_that_cancel_over_positions_keep_their_digits():
    """Images of a large mean before a layer that takes the mean away again."""

    def make():
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, 4)
        )
        net[4].requires_grad_(False)
        return net

    case = simple(make=make, inputs=5.0 + draw(N, 1, 12, 12, scale=0.25))
    expected = ref.measured(case.objective())
    for method in ("layers", "examples", "auto"):
        audited = case.audited(torch.float32, method=method)
        near(audited.examples.norm, expected.example_norm, 1e-5, method)


def test_weights_bound_in_a_partial_stay_inside_and_those_of_the_audit_come_on_top():
    inner, outer = torch.tensor([1.0, 2.0, 5.0]).double(), torch.tensor([3.0, 1.0, 2.0]).double()
    bound = functools.partial(class_weighted(losses.cross_entropy), class_weights=inner)
    torch.manual_seed(0)
    net, batch = nn.Linear(4, 3).double(), (torch.randn(9, 4).double(), torch.arange(9) % 3)
    found = audit(net, None, LossSpec(bound, outer), [batch])
    whole = audit(net, None, LossSpec(losses.cross_entropy, inner * outer), [batch])
    torch.testing.assert_close(found.balance.share, whole.balance.share)
    torch.testing.assert_close(found.class_weights, outer)
    nested = scaled(class_weighted(losses.cross_entropy), 2.0)
    with pytest.raises(FunclossError, match="applies class weights where it wants"):
        audit(net, None, LossSpec(nested, outer), [batch])


def test_the_files_of_many_classes_stay_small(tmp_path):
    n = 120
    model = nn.Linear(3, n)
    inputs, labels = torch.randn(2 * n, 3), torch.arange(2 * n) % n
    found = audit(model, None, losses.cross_entropy, [(inputs, labels)])
    found.write(tmp_path)
    record = json.loads((tmp_path / "audit.json").read_text())
    assert len(record["classes"]) == n
    assert record["gram"] is None
    assert len((tmp_path / "audit_pairs.csv").read_text().splitlines()) == 10_001
