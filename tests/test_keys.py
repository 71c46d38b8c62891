import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from torch.testing import assert_close

from funcloss.keys import example_keys, fold_in, keyed_randomness, make_key

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


def test_dropout_off_the_batch_axis_is_refused():
    with pytest.raises(ValueError, match="dropout: the first axis must be the batch of 64"):
        dropped(nn.Dropout(), torch.ones(3, N), keys())


ATTENTION = nn.MultiheadAttention(4, 2, dropout=0.1)
REFUSED = {
    "rand": lambda x: torch.rand(3),
    "randn_like": torch.randn_like,
    "bernoulli": lambda x: torch.bernoulli(x.abs().clamp(max=1)),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.5),
    "normal_": lambda x: x.clone().normal_(),
    "multinomial": lambda x: x.abs().multinomial(1),
    "gumbel_softmax": F.gumbel_softmax,
    "rrelu": nn.RReLU(),
    "dropout": lambda x: torch.dropout(x, 0.5, True),
    "binomial": lambda x: torch.binomial(x.abs().round(), torch.full_like(x, 0.5)),
    "_standard_gamma": lambda x: torch.distributions.Gamma(1.0, 1.0).sample(),
    "gru": nn.GRU(4, 4, 2, dropout=0.5),
    "lstm": nn.LSTM(4, 4, 2, dropout=0.5),
    "multi_head_attention_forward": lambda x: ATTENTION(x, x, x),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(
        x, x, x, dropout_p=0.1
    ),
    "normal": lambda x: torch.distributions.Normal(0.0, 1.0).sample(),
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
