"""Models that drop out within: transformers of four kinds, torchvision's with stochastic depth."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.testing import assert_close
from torchvision import models as torchvision_models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import MBConvConfig

from funcloss import losses, optim
from funcloss.keys import example_keys, keyed_randomness
from funcloss.objectives import mean_of, sum_of, supervised
from funcloss.training import init_state, make_train_step
from funcloss.typing import Batch

N, LENGTH, WORDS, WIDTH, HEADS, CLASSES, P = 6, 7, 11, 8, 2, 3, 0.3


def split(x):
    """``(batch, length, width)`` to ``(batch, heads, length, width / heads)``."""
    return x.reshape(*x.shape[:-1], HEADS, -1).transpose(1, 2)


def merged(x):
    return x.transpose(1, 2).flatten(2)


class Fused(nn.Module):
    """Self-attention as BERT's and GPT-2's are now: torch's own function, with its dropout."""

    def __init__(self, causal):
        super().__init__()
        self.causal, self.qkv = causal, nn.Linear(WIDTH, 3 * WIDTH)
        self.out, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(P)

    def forward(self, x, mask=None):
        q, k, v = map(split, self.qkv(x).chunk(3, -1))
        p = P if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, mask, p, is_causal=self.causal)
        return self.drop(self.out(merged(x)))


class Plain(nn.Module):
    """Attention by hand: DistilBERT's (masked, scaled) and T5's (biased by the distance)."""

    def __init__(self, scaled, causal=False):
        super().__init__()
        self.scaled, self.causal = scaled, causal
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in "qkvo")

    def forward(self, x, mask=None, memory=None, bias=0.0):
        memory = x if memory is None else memory
        q, k, v = split(self.q(x)), split(self.k(memory)), split(self.v(memory))
        scores = q @ k.transpose(-2, -1) / ((WIDTH / HEADS) ** 0.5 if self.scaled else 1.0) + bias
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(-1), P, self.training)
        return self.out(merged(weights @ v))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(P)

    def forward(self, words):
        x = self.words(words) + self.places(torch.arange(words.shape[1]))
        return self.drop(self.norm(x))


class FeedForward(nn.Sequential):
    def __init__(self, bend):
        super().__init__(nn.Linear(WIDTH, 16), bend, nn.Dropout(P), nn.Linear(16, WIDTH))


class Bert(nn.Module):
    """Normalised after each sum, classified by the first word; words 0 are padding."""

    def __init__(self, attention=Fused, option=False):
        super().__init__()
        self.embed = Embedded()
        self.attend, self.feed = attention(option), FeedForward(nn.GELU())
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in "ab")
        self.drop, self.head = nn.Dropout(P), nn.Linear(WIDTH, CLASSES)

    def forward(self, words):
        mask = (words != 0)[:, None, None].expand(-1, 1, words.shape[1], -1)
        x = self.embed(words)
        x = self.norms[0](x + self.attend(x, mask))
        x = self.norms[1](x + self.drop(self.feed(x)))
        return self.head(self.drop(x[:, 0]))


class Gpt2(nn.Module):
    """Causal, normalised before each branch, classified by the last word; its head is tied."""

    def __init__(self):
        super().__init__()
        self.embed = Embedded()
        self.attend, self.feed = Fused(True), FeedForward(nn.GELU("tanh"))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in "ab")
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.words.weight

    def forward(self, words):
        x = self.embed(words)
        x = x + self.attend(self.norms[0](x))
        x = x + self.feed(self.norms[1](x))
        return self.head(x[:, -1])[:, :CLASSES]


class T5(nn.Module):
    """Encoder and decoder, root-mean-square norms, a bias of the distance shared by the layers."""

    def __init__(self):
        super().__init__()
        self.words, self.distance = nn.Embedding(WORDS, WIDTH), nn.Embedding(2 * LENGTH, HEADS)
        self.encode, self.decode, self.cross = Plain(False), Plain(False, True), Plain(False)
        self.feed = nn.ModuleList(FeedForward(nn.ReLU()) for _ in "ab")
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in "abcde")
        self.drop, self.head = nn.Dropout(P), nn.Linear(WIDTH, CLASSES)

    def forward(self, words):
        places = torch.arange(words.shape[1])
        bias = self.distance(places[:, None] - places + LENGTH).permute(2, 0, 1)
        x = self.drop(self.words(words))
        x = x + self.drop(self.encode(self.norms[0](x), bias=bias))
        x = x + self.drop(self.feed[0](self.norms[1](x)))
        y = self.drop(self.words(words.flip(1)))
        y = y + self.drop(self.decode(self.norms[2](y), bias=bias))
        y = y + self.drop(self.cross(self.norms[3](y), memory=x))
        y = y + self.drop(self.feed[1](self.norms[4](y)))
        return self.head(y[:, -1])


def efficientnet():
    blocks = [MBConvConfig(4, 3, 1, 8, 8, 2)]
    return torchvision_models.EfficientNet(blocks, 0.2, 0.5, num_classes=CLASSES, last_channel=16)


def convnext():
    blocks = [CNBlockConfig(8, None, 2)]
    return torchvision_models.ConvNeXt(blocks, 0.5, layer_scale=1.0, num_classes=CLASSES)


def swin():
    return torchvision_models.SwinTransformer(
        [4, 4], 8, [2], [2], [4, 4], stochastic_depth_prob=0.5, num_classes=CLASSES
    )


def vit():
    return torchvision_models.VisionTransformer(
        32, 16, 1, 2, 8, 16, dropout=P, attention_dropout=P, num_classes=CLASSES
    )


TEXTS = {
    "bert": Bert,
    "gpt2": Gpt2,
    "distilbert": lambda: Bert(Plain, True),
    "t5": T5,
}
IMAGES = {"convnext": convnext, "swin": swin, "vit": vit}
APART = {**TEXTS, **IMAGES}
MODELS = {**APART, "efficientnet": efficientnet}


def made(name):
    """Return a model, a batch for it, and the state before its first step."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for p in model.parameters():  # a head that begins at zero passes nothing on
        nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.3)
    if name in TEXTS:
        inputs = torch.randint(1, WORDS, (N, LENGTH))
        inputs[::2, 5:] = 0
    else:
        model, inputs = model.double(), torch.randn(N, 3, 32, 32, dtype=torch.float64)
    model = model.double()
    batch = Batch(inputs, torch.arange(N) % CLASSES)
    return model, batch, init_state(model, optim.sgd(), seed=1)


HYPER = {"learning_rate": torch.tensor(0.1, dtype=torch.float64)}


def step_of(model):
    return make_train_step(supervised(model, mean_of(losses.cross_entropy)), optim.sgd())


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_torchs_of_the_same_masks(name):
    model, batch, state = made(name)
    before = torch.get_rng_state()
    after, metrics = step_of(model)(state, batch, HYPER)
    assert torch.equal(torch.get_rng_state(), before)
    twin = torch.optim.SGD(model.parameters(), lr=0.1)
    with keyed_randomness(example_keys(state.key, state.step, N)):
        loss = F.cross_entropy(model(batch.inputs), batch.targets)
    loss.backward()
    twin.step()
    assert_close(metrics["loss"], loss.detach())
    own = dict(model.named_parameters(remove_duplicate=False))
    for tensor, p in after.params.items():
        assert_close(p, own[tensor].detach())
    asleep = functional_call(model.eval(), (state.params, state.buffers), batch.inputs)
    assert (F.cross_entropy(asleep, batch.targets) - loss).abs() > 1e-3  # the masks are at work


QUICK = ("bert", "gpt2")  # to compile


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in MODELS]
)
def test_a_step_is_one_graph_that_gives_the_same(name):
    model, batch, state = made(name)
    torch.compiler.reset()
    step = step_of(model)
    compiled = torch.compile(step, fullgraph=True, dynamic=False, backend="aot_eager")
    for _ in range(2):
        expected, ours = step(state, batch, HYPER), compiled(state, batch, HYPER)
        assert_close(ours[0].params, expected[0].params)
        assert_close(ours[1], expected[1])
        state = expected[0]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of layers of convnext and swin
@pytest.mark.parametrize("name", APART)
def test_gradients_of_microbatches_and_of_examples_sum_to_that_of_the_batch(name):
    model, batch, state = made(name)
    objective = supervised(model, sum_of(losses.cross_entropy))
    keys = example_keys(state.key, state.step, N)

    def loss(params, inputs, targets, keys):
        return objective(params, state.buffers, Batch(inputs, targets), keys, {})[0]

    def of_one(params, *example):
        return loss(params, *(t[None] for t in example))

    given = batch.inputs, batch.targets, keys
    whole = grad(loss)(state.params, *given)
    parts = [grad(loss)(state.params, *(t[i : i + 4] for t in given)) for i in (0, 4)]
    each = vmap(grad(of_one), in_dims=(None, 0, 0, 0))(state.params, *given)
    for tensor, expected in whole.items():
        assert_close(sum(part[tensor] for part in parts), expected)
        assert_close(each[tensor].sum(0), expected)
