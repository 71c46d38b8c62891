"""The layers of the audit: each against explicit gradients, and what is refused and why."""

import audit_reference as ref
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funcloss import losses
from funcloss.audit import LAYERS, AuditSettings, audit
from funcloss.errors import AuditError, FunclossError

N, CLASSES, T, D = 13, 3, 5, 8
LABELS = torch.arange(N) % CLASSES


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def parameter(*shape, seed=1):
    return nn.Parameter(0.5 * draw(*shape, seed=seed).float())


class Called(nn.Module):
    """A module whose forward is given."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.how = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.how(self, *inputs)


class Conv1D(nn.Module):
    """GPT-2's linear layer, of a weight that is transposed."""

    def __init__(self, outs, ins):
        super().__init__()
        self.outs, self.weight = outs, nn.Parameter(torch.empty(ins, outs))
        self.bias = parameter(outs)
        nn.init.normal_(self.weight, std=0.4)

    def forward(self, x):
        out = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return out.view(*x.size()[:-1], self.outs)


class GPT2(nn.Module):
    """A block of GPT-2 with its embeddings, the last token being classified."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, D), nn.Embedding(T + 2, D)
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.c_attn, self.c_proj = Conv1D(3 * D, D), Conv1D(D, D)
        self.c_fc, self.c_out = Conv1D(4 * D, D), Conv1D(D, 4 * D)
        self.score = nn.Linear(D, CLASSES, bias=False)

    def forward(self, ids):
        places = torch.arange(ids.shape[-1], device=ids.device).unsqueeze(0)
        x = self.wte(ids) + self.wpe(places)
        q, k, v = self.c_attn(self.ln_1(x)).split(D, dim=2)
        q, k, v = (h.view(*h.shape[:2], 2, D // 2).transpose(1, 2) for h in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(a.transpose(1, 2).contiguous().view(*x.shape))
        x = x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))
        return self.score(x)[:, -1]


def vit():
    from torchvision.models import VisionTransformer

    net = VisionTransformer(8, 4, 2, 2, D, 2 * D, num_classes=CLASSES)
    nn.init.normal_(net.class_token)
    nn.init.normal_(net.heads.head.weight, std=0.5)  # else all gradients are 0
    return net


def encoder(**options):
    return lambda: Called(
        lambda self, x: self.head(self.net(x).mean(1 if options.get("batch_first") else 0)),
        net=nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.0, **options),
        head=nn.Linear(D, CLASSES),
    )


def seq_first(make):
    def built():
        net = make()
        return Called(lambda self, x: self.net(x.transpose(0, 1)), net=net)

    return built


def crossed(distinct):
    """Attention of a few queries of the model's own; its packed weight is cut in 2 or 3."""

    def forward(self, x):
        queries = self.queries.expand(len(x), -1, -1)
        values = torch.tanh(x) if distinct else x
        return self.head(self.net(queries, x, values, need_weights=False)[0].mean(1))

    return lambda: Called(
        forward,
        queries=parameter(1, 2, D),
        net=nn.MultiheadAttention(D, 2, batch_first=True),
        head=nn.Linear(D, CLASSES),
    )


def scaled():
    """Layer scale, the root mean square, a scalar, a scale from a slice, a difference."""

    def forward(self, x):
        x = x + self.gamma * self.inner(self.norm(x))
        x = (x - self.middle[1:]) * self.wide[:, :D].T.reshape(D) / self.temperature
        return self.scale * self.head(x.mean(1))

    return Called(
        forward,
        gamma=parameter(D),
        inner=nn.Linear(D, D),
        norm=nn.RMSNorm(D),
        middle=parameter(D + 1, seed=2),
        wide=parameter(1, D + 3, seed=3),
        temperature=nn.Parameter(torch.tensor(1.5)),
        scale=nn.Parameter(torch.tensor([0.5])),
        head=nn.Linear(D, CLASSES),
    )


def looked_up(how):
    """A table of positions, in the ways that there are."""

    def forward(self, x):
        return self.head(torch.tanh(x + how(self.table, x)).mean(1))

    return lambda: Called(forward, table=parameter(T + 4, D), head=nn.Linear(D, CLASSES))


def relative_bias():
    """A table that shared positions look the same entries up of, as windowed attention has it."""

    def forward(self, x):
        place = torch.arange(T)
        bias = self.table[(place[:, None] - place + T - 1).flatten()].view(T, T)
        scores = x @ x.mT + bias
        return self.head((scores.softmax(-1) @ x).mean(1))

    return Called(forward, table=parameter(2 * T - 1), head=nn.Linear(D, CLASSES))


def own_rows():
    """Rows of a bare table that each example chooses."""

    def forward(self, ids):
        return self.head(torch.tanh(self.table[ids]).mean(1))

    return Called(forward, table=parameter(11, D), head=nn.Linear(D, CLASSES))


def one_category():
    """A category per example, beside as many positions as there may be examples."""
    return Called(
        lambda self, ids: self.head(torch.tanh(self.table(ids[:, 0]))),
        table=nn.Embedding(11, D),
        head=nn.Linear(D, CLASSES),
    )


def matrices():
    def forward(self, x):
        x = torch.tanh(x @ self.a + self.bias)
        return torch.matmul(x.mean(1), self.b.t())

    return Called(
        forward, a=parameter(D, 6), bias=parameter(6, seed=2), b=parameter(CLASSES, 6, seed=3)
    )


def bilinear():
    net = nn.Bilinear(D, D, CLASSES)
    return Called(lambda self, x: self.net(x[:, 0], torch.tanh(x[:, 1])), net=net)


def token_in_front():
    def forward(self, x):
        x = torch.cat([self.token.repeat(len(x), 1, 1), x], 1) + self.places
        return self.head(torch.tanh(self.inner(x))[:, 0] + x.mean(1))

    return Called(
        forward,
        token=parameter(1, 1, D),
        places=parameter(1, T + 1, D, seed=2),
        inner=nn.Linear(D, D),
        head=nn.Linear(D, CLASSES),
    )


def windows():
    """Examples cut into windows, which then lie along the first axis with them."""

    def forward(self, x):
        cut = x[:, :4].reshape(-1, 2, D)
        return self.head(torch.tanh(self.inner(cut) + self.shift).reshape(-1, 4, D).mean(1))

    return Called(forward, inner=nn.Linear(D, D), shift=parameter(2, D), head=nn.Linear(D, CLASSES))


def sequence_outside():
    """Positions and examples on one axis, the examples inside."""

    def forward(self, x):
        flat = x.transpose(0, 1).reshape(-1, D)
        return self.head(torch.tanh(self.inner(flat) * self.scale).view(T, -1, D).mean(0))

    return Called(forward, inner=nn.Linear(D, D), scale=parameter(D), head=nn.Linear(D, CLASSES))


def slopes():
    return nn.Sequential(nn.Conv1d(T, 4, 3), nn.PReLU(4), nn.Flatten(), nn.PReLU(),
                         nn.Linear(24, CLASSES))  # fmt: skip


VECTORS = draw(N, T, D)
IDS = torch.randint(11, (N, T), generator=torch.Generator().manual_seed(5))
CASES = {
    "ViT of torchvision": (vit, draw(N, 3, 8, 8)),
    "GPT-2's block": (GPT2, IDS),
    "encoder layer": (encoder(batch_first=True), VECTORS),
    "encoder layer, norm first": (encoder(batch_first=True, norm_first=True), VECTORS),
    "encoder layer, sequence first": (seq_first(encoder()), VECTORS),
    "attention of own queries": (crossed(distinct=False), VECTORS),
    "attention of three": (crossed(distinct=True), VECTORS),
    "scales": (scaled, VECTORS),
    "table[:n]": (looked_up(lambda table, x: table[: x.shape[1]]), VECTORS),
    "table[index]": (looked_up(lambda table, x: table[torch.arange(T).flip(0)]), VECTORS),
    "table[None, 1:n]": (looked_up(lambda table, x: table[None, 1 : T + 1]), VECTORS),
    "embedding (positions,)": (looked_up(lambda t, x: F.embedding(torch.arange(T), t)), VECTORS),
    "embedding (1, positions)": (
        looked_up(lambda t, x: F.embedding(torch.arange(T)[None], t)),
        VECTORS,
    ),
    "embedding, expanded": (
        looked_up(lambda t, x: F.embedding(torch.arange(T).expand(len(x), T), t)),
        VECTORS,
    ),
    "embedding, as many positions as tried": (
        looked_up(lambda t, x: F.embedding(torch.arange(3), t)),
        VECTORS[:, :3],
    ),
    "relative positions": (relative_bias, VECTORS),
    "rows of its own": (own_rows, IDS),
    "one category": (one_category, IDS),
    "matrices": (matrices, VECTORS),
    "bilinear": (bilinear, VECTORS),
    "token in front": (token_in_front, VECTORS),
    "windows": (windows, VECTORS),
    "sequence outside": (sequence_outside, VECTORS),
    "slopes below 0": (slopes, VECTORS),
}


def built(make, dtype=torch.float64):
    torch.manual_seed(3)
    return make().to(dtype)


def audited(model, inputs, *, dtype=torch.float64, labels=LABELS, batch_size=5, **settings):
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    settings = AuditSettings(classes=CLASSES, batch_size=batch_size, **settings)
    return audit(model, None, losses.cross_entropy, (inputs, labels), settings=settings)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_gives_what_the_explicit_gradients_say(name, dtype, training):
    make, inputs = CASES[name]
    model = built(make).train(training)
    objective = ref.Objective(
        model,
        losses.cross_entropy,
        (ref.Part(inputs, LABELS),),
        CLASSES,
        torch.ones(CLASSES).double(),
        {},
        "mean",
    )
    expected = ref.measured(objective)
    found = audited(built(make, dtype).train(training), inputs, dtype=dtype)
    assert found.method.name == "layers", found.method.why
    near = 1e-9 if dtype == torch.float64 else 2e-5
    size = float(expected.gram.abs().max())
    assert torch.allclose(found.gram, expected.gram, rtol=near, atol=near * size)
    norms = expected.example_norm
    assert found.examples is not None
    assert torch.allclose(found.examples.norm, norms, rtol=near, atol=near * float(norms.max()))
    for at, columns in enumerate(expected.layer_parts(found.layers)):
        unit = expected.unit[:, columns]
        wanted = unit @ unit.T
        assert torch.allclose(found.layer_gram[at], wanted, rtol=near, atol=near * size)


def through(layer):
    """Return a module that puts its input through a function of a parameter of its own."""

    def forward(self, x):
        return self.head(torch.tanh(layer(x, self.scale)).mean(1))

    return Called(forward, scale=parameter(D), head=nn.Linear(D, CLASSES)).double()


def test_a_layer_function_of_ones_own_is_used(monkeypatch):
    model = through(lambda x, scale: torch.hypot(x, scale))
    before = audited(model, VECTORS)
    assert before.method.name == "examples"
    assert "not layers: scale is used in hypot" in before.method.why

    def hypot(backprops, input, other):
        yield other, (backprops * other / torch.hypot(input, other)).sum(1)

    monkeypatch.setitem(LAYERS, torch.hypot, hypot)
    after = audited(model, VECTORS)
    assert after.method.name == "layers"
    torch.testing.assert_close(after.gram, before.gram)
    torch.testing.assert_close(after.examples.norm, before.examples.norm)


@pytest.mark.parametrize("method", ["auto", "layers"])
def test_a_wrong_layer_function_ends_the_audit_by_the_name_of_the_parameter(monkeypatch, method):
    def hypot(backprops, input, other):
        yield other, (1.1 * backprops * other / torch.hypot(input, other)).sum(1)

    monkeypatch.setitem(LAYERS, torch.hypot, hypot)
    says = "gradient of scale .* is not the plain one: a layer function in funcloss.audit.LAYERS"
    with pytest.raises(AuditError, match=says):
        audited(through(lambda x, scale: torch.hypot(x, scale)), VECTORS, method=method)


@pytest.mark.parametrize("method", ["auto", "layers", "examples", "backward"])
def test_a_model_that_couples_examples_ends_the_audit_by_the_name_of_a_parameter(method):
    model = through(lambda x, scale: (x - x.mean(0)) * scale)
    with pytest.raises(AuditError, match="couples examples: the gradient of scale"):
        audited(model, VECTORS, method=method)


def positions_mixed(x, scale):
    return x + F.linear(scale.expand(T, D), torch.eye(D).double())


REASONS = {
    "unknown function": (lambda x, s: torch.hypot(x, s), "scale is used in hypot"),
    "in place": (
        lambda x, s: x.clone().mul_(s),
        "scale is used in mul_, whose input is changed in place",
    ),
    "not per example": (positions_mixed, "scale is used in linear, not for each example by itself"),
    "nonlinear before": (lambda x, s: x * torch.sigmoid(s), "scale is used in sigmoid"),
    "two parameters": (lambda x, s: x * (s * s), "scale is used in mul, not for each example"),
}


@pytest.mark.parametrize("name", REASONS)
def test_what_no_layer_function_knows_is_a_reason_for_another_method(name):
    layer, why = REASONS[name]
    model = through(layer)
    by_other = audited(model, VECTORS)
    assert by_other.method.name == "examples"
    assert f"not layers: {why}" in by_other.method.why
    with pytest.raises(FunclossError, match=f"the method layers cannot measure this model: {why}"):
        audited(model, VECTORS, method="layers")


def test_other_layers_than_those_that_were_tried_are_refused():
    def forward(self, x):
        x = self.inner(x) if bool((x > 99).any()) else x
        return self.head(x.mean(1))

    net = Called(forward, inner=nn.Linear(D, D), head=nn.Linear(D, CLASSES)).double()
    inputs = VECTORS.clone()
    inputs[-1] = 100.0
    with pytest.raises(AuditError, match="other layers for these examples than for those that"):
        audited(net, inputs, method="layers")
    assert audited(net, inputs, method="backward").method.name == "backward"


class Rounded(torch.autograd.Function):
    """An operation that can be differentiated once, in reverse, and not under vmap."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor) -> Tensor:
        return grads[0]


def test_what_cannot_be_measured_of_single_examples_is_said():
    """Neither vmap nor a layer function: shares and conflicts are measured all the same."""
    model = through(lambda x, scale: Rounded.apply(torch.hypot(x, scale)))
    found = audited(model, VECTORS)
    assert found.method.name == "backward"
    assert found.examples.norm.isnan().all()
    assert found.examples.slope.isnan().all()
    assert found.balance.share.isfinite().all()
    norms, slopes = (next(n for n in found.notes if what in n) for what in ("norms", "slopes"))
    assert "not measured: a backward pass gives the sum over a class" in norms
    assert "not measured: the model has an operation that can be differentiated only once" in slopes
