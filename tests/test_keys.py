from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, vmap
from torch.testing import assert_close
from torchvision.ops import stochastic_depth

from funcloss.keys import SEES_RAND, example_keys, fold_in, keyed_randomness, make_key

N = 64


def keys(seed=0, step=0, n=N):
    return example_keys(make_key(seed), torch.tensor(step), n)


def dropped(fn, x, k):
    with keyed_randomness(k):
        return fn(x)


DROPOUTS = {
    "dropout": (nn.Dropout(0.3), (N, 40, 5)),
    "dropout1d": (nn.Dropout1d(0.3), (N, 40, 5)),
    "dropout2d": (nn.Dropout2d(0.3), (N, 40, 5, 3)),
    "dropout3d": (nn.Dropout3d(0.3), (N, 40, 2, 2, 2)),
    "alpha_dropout": (nn.AlphaDropout(0.3), (N, 40, 5)),
    "feature_alpha_dropout": (nn.FeatureAlphaDropout(0.3), (N, 40, 5)),
}


@pytest.fixture(params=DROPOUTS.values(), ids=DROPOUTS.keys())
def dropout(request):
    module, shape = request.param
    return module, torch.randn(shape, generator=torch.Generator().manual_seed(1))


def test_the_same_keys_give_the_same_mask_and_torchs_generator_is_left_alone(dropout):
    module, x = dropout
    before = torch.get_rng_state()
    assert torch.equal(dropped(module, x, keys()), dropped(module, x, keys()))
    assert not torch.equal(dropped(module, x, keys()), dropped(module, x, keys(step=1)))
    assert not torch.equal(dropped(module, x, keys()), dropped(module, x, keys(seed=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_each_example_draws_its_own_mask_alone_mapped_in_chunks_or_compiled(dropout):
    module, x = dropout
    whole = dropped(module, x, keys())
    alone = vmap(lambda one, k: dropped(module, one[None], k[None])[0])(x, keys())
    chunks = torch.cat([dropped(module, x[i : i + 7], keys()[i : i + 7]) for i in range(0, N, 7)])
    compiled = torch.compile(
        lambda x, k: dropped(module, x, k), fullgraph=True, backend="aot_eager"
    )
    assert_close(alone, whole)
    assert_close(chunks, whole)
    assert_close(compiled(x, keys()), whole)


def test_it_drops_what_torch_drops(dropout):
    module, x = dropout
    x = torch.ones_like(x)
    torch.manual_seed(0)
    ours, theirs = dropped(module, x, keys()), module(x)
    assert_close(ours.unique(), theirs.unique())
    constant_maps = (ours.flatten(2).std(-1) == 0).all()
    assert constant_maps == (theirs.flatten(2).std(-1) == 0).all()
    kept, expected = (ours == ours.max()).float().mean(), 0.7
    assert abs(kept - expected) < 0.05


# --- attention, recurrent layers, stochastic depth and noise: functions of (batch, 4, 5, 6) ---


def drop_path(x):
    """timm's, of a keep probability of 0.7."""
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.7)
    mask.div_(0.7)
    return x * mask


def floored(x):
    """transformers' drop path: the whole part of a uniform number and the keep probability."""
    mask = 0.7 + torch.rand((x.shape[0], 1, 1, 1), dtype=x.dtype, device=x.device)
    return x.div(0.7) * mask.floor_()


def attention(**options):
    return lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3, **options)


def module(made, swap=False):
    """A module of one sequence per example of shape (20, 6); the batch is second on ``swap``."""

    def call(x):
        x = x.flatten(1, 2)
        x = x.transpose(0, 1) if swap else x
        out = made(x, x, x) if isinstance(made, nn.MultiheadAttention) else made(x)
        out = out if isinstance(out, torch.Tensor) else out[0]
        return out.transpose(0, 1) if swap else out

    return call


torch.manual_seed(0)
RECURRENT = {
    "lstm": module(nn.LSTM(6, 3, 2, dropout=0.3, batch_first=True)),
    "lstm, batch second": module(nn.LSTM(6, 3, 2, dropout=0.3), swap=True),
    "gru, both directions": module(
        nn.GRU(6, 3, 3, dropout=0.3, bidirectional=True, batch_first=True)
    ),
    "rnn, batch second": module(nn.RNN(6, 3, 2, dropout=0.3), swap=True),
}
KEYED = {
    "attention": attention(),
    "attention, causal": attention(is_causal=True, scale=0.5),
    "attention, masked": attention(attn_mask=torch.ones(5, 5).triu(-2).bool()),
    "attention, one head of keys": lambda x: F.scaled_dot_product_attention(
        x, x[:, :1], x[:, :1], dropout_p=0.3, enable_gqa=True
    ),
    "heads": module(nn.MultiheadAttention(6, 2, dropout=0.3, batch_first=True)),
    "heads, batch second": module(nn.MultiheadAttention(6, 2, dropout=0.3), swap=True),
    "encoder layer": module(nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True)),
    "stochastic depth": lambda x: stochastic_depth(x, 0.3, "row"),
    "drop path": drop_path,
    "drop path, floored": floored,
    "bernoulli": lambda x: torch.bernoulli(torch.full_like(x, 0.7)),
    "bernoulli, method": lambda x: x * x.bernoulli(0.7),
    "bernoulli, in place": lambda x: torch.empty_like(x).bernoulli_(torch.full((5, 6), 0.7)),
    "rand": lambda x: torch.rand(x.shape[0], 3),
    "randn": lambda x: torch.randn((x.shape[0], 3), dtype=torch.float64),
    "noise": lambda x: x + torch.randn(x.shape),
    "uniform_": lambda x: torch.empty_like(x).uniform_(0.9, to=1.1),
    "normal_": lambda x: torch.empty_like(x).normal_(1.0, std=0.1),
}
if not SEES_RAND:
    for name in ("rand", "randn", "noise", "drop path, floored"):
        KEYED.pop(name)
MAPPED = [pytest.param(fn, id=name) for name, fn in KEYED.items()]
ALL = [pytest.param(fn, id=name) for name, fn in {**KEYED, **RECURRENT}.items()]


def images(n=N):
    return torch.randn(n, 4, 5, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fn", ALL)
def test_keyed_numbers_are_those_of_their_keys_in_any_chunk_and_no_generator_moves(fn):
    x, before = images(), torch.get_rng_state()
    whole = dropped(fn, x, keys())
    assert torch.equal(dropped(fn, x, keys()), whole)
    assert not torch.equal(dropped(fn, x, keys(step=1)), whole)
    chunks = torch.cat([dropped(fn, x[i : i + 7], keys()[i : i + 7]) for i in range(0, N, 7)])
    assert_close(chunks, whole)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert_close(dropped(fn, x[order], keys()[order]), whole[order])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fn", ALL)
def test_two_examples_and_two_calls_draw_apart(fn):
    x = images(1).expand(N, -1, -1, -1)
    with keyed_randomness(keys()):
        first, second = fn(x), fn(x)
    assert len(first.flatten(1).unique(dim=0)) > 1
    assert not torch.equal(first, second)


@pytest.mark.parametrize("fn", MAPPED)
def test_keyed_numbers_are_the_same_mapped_and_compiled(fn):
    x = images(8)

    def call(x, k):
        return dropped(fn, x, k)

    def slope(x, k):
        return grad(lambda x: (x.sum() + call(x[None], k[None]).square().sum()).float())(x)

    whole, k = call(x, keys(n=8)), keys(n=8)
    slopes = grad(lambda x: (x.sum() + call(x, k).square().sum()).float())(x)
    assert_close(vmap(lambda one, k: call(one[None], k[None])[0])(x, k), whole)
    assert_close(vmap(slope)(x, k), slopes)
    torch._dynamo.reset()  # its limit is on compilations of a function, whatever closes over it
    assert_close(torch.compile(vmap(slope), fullgraph=True, backend="aot_eager")(x, k), slopes)


def heads_weights(net):
    return lambda x: net(*3 * [x.flatten(1, 2)], average_attn_weights=False)[1]


def one_head(p):
    """Attention whose output is its weights: that of 5 sources, whose values are unit vectors."""
    return lambda x: F.scaled_dot_product_attention(
        x, x, torch.eye(5).expand(len(x), 4, 5, 5), dropout_p=p
    )


def between_layers(p):
    """A net of two layers, of which the second passes a positive sum of inputs on as it is."""
    net = nn.RNN(6, 6, 2, dropout=p, nonlinearity="relu", bias=False, batch_first=True)
    for name, weight in net.named_parameters():
        weight.data = torch.eye(6) if "ih" in name else torch.zeros(6, 6)
    return lambda x: net(x.abs().flatten(1, 2))[0]


def heads(p):
    return heads_weights(nn.MultiheadAttention(6, 2, dropout=p, batch_first=True))


# what is multiplied by a mask and the reciprocal of the probability to keep
MASKS = {
    "attention": one_head,
    "heads": heads,
    "between layers": between_layers,
    "stochastic depth": lambda p: lambda x: stochastic_depth(torch.ones_like(x), p, "row")[:, 0, 0],
}


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 0.75, 1.0])
@pytest.mark.parametrize("name", MASKS)
def test_what_is_kept_is_scaled_and_as_frequent_as_it_should_be(name, p):
    torch.manual_seed(0)
    dropping, x = MASKS[name](p), images(1024)
    torch.manual_seed(0)
    expected = MASKS[name](0.0)(x)
    with keyed_randomness(example_keys(make_key(3), torch.tensor(0), 1024)):
        first, second = dropping(x), dropping(x)
    ratios = torch.stack([first, second])[:, expected > 1e-6] / expected[expected > 1e-6]
    kept = (ratios - 1 / max(1 - p, 1e-9)).abs() < 1e-4
    assert_close(ratios[~kept], torch.zeros_like(ratios[~kept]))
    # a mask of stochastic depth is one number per example, the others one per number
    n = 1024 if name == "stochastic depth" else ratios.shape[1]
    sd = (p * (1 - p)) ** 0.5
    assert (kept.float().mean(1) - (1 - p)).abs().max() <= 5 * sd / n**0.5
    both = (kept[0] & kept[1]).float().mean() - kept[0].float().mean() * kept[1].float().mean()
    assert both.abs() <= 5 * sd**2 / n**0.5


@pytest.mark.skipif(not SEES_RAND, reason="rand and randn are refused")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_noise_is_uniform_or_normal_and_independent(dtype):
    with keyed_randomness(keys(n=512)):
        uniform, more = (torch.rand(512, 300, dtype=dtype).double() for _ in "ab")
        normal = torch.randn((512, 300), dtype=dtype).double()
    n = uniform.numel() ** 0.5
    assert uniform.min() >= 0
    assert uniform.max() < 1
    resolution = max(2**-9, 5 / n)  # bfloat16 has 8 bits, and its mean is half of one too low
    assert abs(uniform.mean() - 0.5) < resolution
    assert abs(uniform.var() - 1 / 12) < 5 / n
    assert abs(((uniform - 0.5) * (more - 0.5)).mean()) < 5 / 12 / n
    assert abs(normal.mean()) < 5 / n
    assert abs(normal.var() - 1) < 5 * 2**0.5 / n
    assert abs(normal.pow(4).mean() - 3) < 5 * 96**0.5 / n
    assert abs((normal[:, 1:] * normal[:, :-1]).mean()) < 5 / n


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_coins_at_the_ends_of_the_scale(p):
    x = torch.full((N, 8), p)
    for coins in (torch.bernoulli, torch.Tensor.bernoulli):
        assert torch.equal(dropped(coins, x, keys()), x)
    assert torch.equal(dropped(lambda x: torch.empty_like(x).bernoulli_(p), x, keys()), x)
    filled = torch.empty(N, 8, dtype=torch.bool)
    assert dropped(lambda x: x.bernoulli_(p), filled, keys()) is filled
    assert torch.equal(filled.float(), x)


@pytest.mark.parametrize(
    "call", [lambda x: x.bernoulli_(1.5), lambda x: F.dropout(x, -0.5)], ids=["coins", "dropout"]
)
def test_what_is_no_probability_is_refused(call):
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\], got"):
        dropped(call, torch.ones(N, 2), keys())


@pytest.mark.skipif(not SEES_RAND, reason="rand and randn are refused")
def test_whole_numbers_are_not_drawn():
    with pytest.raises(TypeError, match="rand: dtype must be floating point .*int64"):
        dropped(lambda x: torch.rand(x.shape, dtype=torch.int64), torch.ones(N, 2), keys())


def test_two_calls_draw_two_masks():
    with keyed_randomness(keys()):
        first, second = F.dropout(torch.ones(N, 300)), F.dropout(torch.ones(N, 300))
    agree = (first == second).float().mean()
    assert abs(agree - 0.5) < 0.02


def test_the_masks_are_as_random_as_they_should_be():
    with keyed_randomness(keys(n=2048)):
        mask = (F.dropout(torch.ones(2048, 500)) > 0).double() - 0.5
    sd = 0.25 / mask.numel() ** 0.5
    assert mask.mean().abs() < 5 * 0.5 / mask.numel() ** 0.5
    for lag in (1, 2, 3, 8, 17):
        assert (mask[:, :-lag] * mask[:, lag:]).mean().abs() < 5 * sd
        assert (mask[:-lag] * mask[lag:]).mean().abs() < 5 * sd
    # Rows and columns vary as independent coins do.
    assert 0.8 < mask.mean(0).var() / (0.25 / 2048) < 1.25
    assert 0.8 < mask.mean(1).var() / (0.25 / 500) < 1.25


def test_keys_of_many_steps_and_seeds_are_distinct():
    steps = torch.stack([keys(step=s, n=32) for s in range(300)])
    seeds = torch.stack([keys(seed=s, n=32) for s in (1, 2, 3, -1, 2**40, 2**63, 2**64 - 2)])
    assert steps.unique().numel() == steps.numel()
    assert seeds.unique().numel() == seeds.numel()
    assert (steps >= 0).all()
    assert (steps < 2**32).all()


def test_fold_in_broadcasts():
    assert fold_in(make_key(0), torch.zeros(2, 3).long()).shape == (2, 3)


def test_seeds_beyond_64_bits_are_refused():
    with pytest.raises(ValueError, match="seed must fit into 64 bits"):
        make_key(2**64)


def test_evaluation_mode_drops_nothing():
    x = torch.randn(N, 4)
    assert dropped(nn.Dropout().eval(), x, keys()) is x
    assert dropped(nn.AlphaDropout().eval(), x, keys()) is x


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_ends_of_the_scale(p):
    assert_close(dropped(nn.Dropout(p), torch.ones(N, 3), keys()), torch.full((N, 3), 1.0 - p))


def test_in_place_dropout_writes_to_its_input():
    x = torch.ones(N, 8)
    out = dropped(nn.Dropout(0.5, inplace=True), x, keys())
    assert out is x
    assert torch.equal(x, dropped(nn.Dropout(0.5), torch.ones(N, 8), keys()))


HEADS = nn.MultiheadAttention(4, 2, dropout=0.1)
OFF_THE_BATCH = {
    "dropout": lambda: nn.Dropout()(torch.ones(3, N)),
    "rand": lambda: torch.rand(3),
    "randn": lambda: torch.randn(()),
    "bernoulli_": lambda: stochastic_depth(torch.ones(N, 3), 0.5, "batch"),
    "bernoulli": lambda: torch.bernoulli(torch.full((1, N), 0.5)),
    "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(
        *3 * [torch.ones(2 * N, 3, 4)], dropout_p=0.1
    ),
    "multi_head_attention_forward": partial(HEADS, *3 * [torch.ones(N, 3, 4)]),
    "lstm": partial(nn.LSTM(4, 4, 2, dropout=0.5), torch.ones(N, 3, 4)),
    "gru": partial(nn.GRU(4, 4, 2, dropout=0.5), torch.ones(3, 4)),
}


@pytest.mark.skipif(not SEES_RAND, reason="rand and randn are refused")
@pytest.mark.parametrize("name", OFF_THE_BATCH)
def test_draws_off_the_batch_axis_are_refused_by_name(name):
    with (
        pytest.raises(ValueError, match=f"^{name}: the first axis must be the batch of 64 .* move"),
        keyed_randomness(keys()),
    ):
        OFF_THE_BATCH[name]()


@pytest.mark.parametrize("query", [torch.ones(N, 4), torch.ones(N, 3, 4)[:, 0]])
def test_attention_of_one_example_without_an_axis_of_the_batch_is_refused(query):
    with pytest.raises(ValueError, match="first axis must be the batch"):
        dropped(lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5), query, keys())
    with pytest.raises(ValueError, match="first axis must be the batch"):
        dropped(lambda x: HEADS(x, x, x), query, keys())


def test_packed_sequences_are_refused_with_dropout_alone():
    packed = nn.utils.rnn.pack_padded_sequence(torch.ones(3, N, 4), torch.full((N,), 3))
    with pytest.raises(ValueError, match="gru: a packed sequence .* pad it"):
        dropped(nn.GRU(4, 4, 2, dropout=0.5), packed, keys())
    dropped(nn.GRU(4, 4, 2), packed, keys())


REFUSED = {
    "multinomial": lambda x: x.abs().multinomial(1),
    "gumbel_softmax": F.gumbel_softmax,
    "rrelu": nn.RReLU(),
    "dropout": lambda x: torch.dropout(x, 0.5, True),
    "binomial": lambda x: torch.binomial(x.abs().round(), torch.full_like(x, 0.5)),
    "_standard_gamma": lambda x: torch.distributions.Gamma(1.0, 1.0).sample(),
    "normal": lambda x: torch.distributions.Normal(0.0, 1.0).sample(),
    "rand_like": torch.rand_like,  # compiled, it is not seen by a mode: so not eager either
    "randn_like": torch.randn_like,
    "randint": lambda x: torch.randint(3, x.shape),
    "rand": lambda x: torch.rand(x.shape, generator=torch.Generator()),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.5, generator=torch.Generator()),
    "bernoulli": lambda x: torch.bernoulli(x.abs().clamp(max=1), out=torch.empty_like(x)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_randomness_is_refused_by_name(name):
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=f"keyed_randomness: {name} draws from torch's global"):
        dropped(REFUSED[name], torch.randn(N, 2, 4, generator=torch.Generator()), keys())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "module",
    [
        nn.GRU(4, 4, 2),
        nn.LSTM(4, 4),
        nn.RReLU().eval(),
        nn.GRU(4, 4, 2, dropout=0.5).eval(),
        lambda x: torch.dropout(x, 0.5, False),
    ],
    ids=["gru", "lstm", "rrelu in evaluation", "gru in evaluation", "dropout in evaluation"],
)
def test_what_draws_nothing_is_let_pass(module):
    dropped(module, torch.zeros(N, 2, 4), keys())


def test_attention_without_dropout_is_let_pass():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True, dropout=0.0)
    dropped(layer, torch.zeros(N, 2, 8), keys())
