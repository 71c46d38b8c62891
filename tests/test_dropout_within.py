"""Attention and recurrent layers: torch's own without dropout, and its masks where they belong."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torchvision.ops import StochasticDepth

from funcloss import _dropout
from funcloss.audit.state import has_dropout
from funcloss.keys import example_keys, keyed_randomness, make_key

N, L, S, E = 3, 4, 5, 8


def same(x):
    return x


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def keys(n=N):
    return example_keys(make_key(0), torch.tensor(0), n)


MASKS = {
    "none": None,
    "bool": draw(L, S) > -1,
    "of each example": draw(N, 1, L, S) > -1,
    "float": draw(L, S),
    "nothing to attend to": torch.arange(L)[:, None].expand(L, S) > 0,
}
OPTIONS = [{}, {"scale": 0.3}, {"is_causal": True}, {"enable_gqa": True}]
ATTENTIONS = [
    pytest.param(mask, options, id=f"{name} {options}")
    for (name, mask), options in itertools.product(MASKS.items(), OPTIONS)
    if mask is None or "is_causal" not in options
]


@pytest.mark.parametrize(("mask", "options"), ATTENTIONS)
def test_attention_that_drops_nothing_is_torchs(mask, options):
    heads = 2 if "enable_gqa" in options else 4
    q, k, v = draw(N, 4, L, 6), draw(N, heads, S, 6, seed=1), draw(N, heads, S, 7, seed=2)
    given = [x.requires_grad_() for x in (q, k, v)]
    ours = _dropout.attention(same, *given, mask, **options)
    theirs = F.scaled_dot_product_attention(*given, mask, 0.0, **options)
    assert_close(ours, theirs)
    weights = draw(*ours.shape, seed=3)
    assert_close(*(torch.autograd.grad((out * weights).sum(), given) for out in (ours, theirs)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_half_precision_keeps_its_dtype(dtype):
    q, k, v = draw(N, 2, L, 6), draw(N, 2, S, 6, seed=1), draw(N, 2, S, 6, seed=2)
    ours = _dropout.attention(same, *(x.to(dtype) for x in (q, k, v)))
    assert ours.dtype == dtype
    assert_close(ours.double(), F.scaled_dot_product_attention(q, k, v), atol=0.03, rtol=0.03)


def test_a_mask_on_causal_attention_is_refused():
    x = draw(N, L, E)
    with pytest.raises(ValueError, match="attn_mask or is_causal, not both"):
        _dropout.attention(same, x, x, x, draw(L, L), is_causal=True)


def padding(kind):
    if kind is None:
        return None
    left_out = torch.arange(S)[None] >= torch.tensor([[5], [3], [1]])
    return left_out if kind is bool else left_out * -2.0


HEADS = [
    pytest.param(made, {"attn_mask": mask, "key_padding_mask": padding(pad)}, id=name)
    for name, made, mask, pad in [
        ("plain", {}, None, None),
        ("without biases", {"bias": False}, None, None),
        ("other widths", {"kdim": 6, "vdim": 7}, None, None),
        ("a further key", {"add_bias_kv": True}, draw(L, S), bool),
        ("a further zero", {"add_zero_attn": True}, draw(L, S) > 0.5, bool),
        ("both", {"add_bias_kv": True, "add_zero_attn": True}, None, bool),
        ("mask", {}, draw(L, S), None),
        ("mask of each head", {}, draw(N * 2, L, S), bool),
        ("padded", {}, None, bool),
        ("padded by numbers", {}, draw(L, S), float),
        ("batch first", {"batch_first": True}, draw(L, S), bool),
    ]
]


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(("made", "masks"), HEADS)
def test_heads_are_torchs_but_for_what_is_dropped(made, masks, need_weights):
    """So small a probability drops nothing: no word of the streams is below it."""
    torch.manual_seed(0)
    net = nn.MultiheadAttention(E, 2, dropout=1e-10, dtype=torch.float64, **made)
    for p in net.parameters():
        nn.init.normal_(p)
    swap = (0, 1, 2) if made.get("batch_first") else (1, 0, 2)
    q, k, v = draw(N, L, E), draw(N, S, net.kdim, seed=1), draw(N, S, net.vdim, seed=2)
    given = [x.permute(swap) for x in (q, k, v)]
    for average in (True, False):
        options = {**masks, "need_weights": need_weights, "average_attn_weights": average}
        theirs = net.eval()(*given, **options)
        with keyed_randomness(keys()):
            ours = net.train()(*given, **options)
        assert_close(ours[0], theirs[0])
        assert (ours[1] is None) == (theirs[1] is None)
        if need_weights:
            assert_close(ours[1], theirs[1])
        slopes = [
            torch.autograd.grad(
                o[0].square().sum(),
                net.in_proj_bias if net.in_proj_bias is not None else net.out_proj.weight,
            )
            for o in (ours, theirs)
        ]
        assert_close(*slopes)


def test_heads_that_are_causal_without_a_mask_are_refused_as_by_torch():
    net, x = nn.MultiheadAttention(E, 2, dropout=0.5), torch.ones(L, N, E)
    with pytest.raises(RuntimeError, match="is_causal needs attn_mask"), keyed_randomness(keys()):
        net(x, x, x, is_causal=True, need_weights=False)


NETS = [
    pytest.param(kind, options, id=f"{kind.__name__} {options}")
    for kind, options in [
        (nn.LSTM, {}),
        (nn.LSTM, {"batch_first": True, "bidirectional": True, "proj_size": 2}),
        (nn.LSTM, {"bias": False, "num_layers": 3}),
        (nn.GRU, {"bidirectional": True}),
        (nn.GRU, {"batch_first": True, "bias": False, "num_layers": 3}),
        (nn.RNN, {"nonlinearity": "relu"}),
        (nn.RNN, {"batch_first": True}),
    ]
]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("kind", "options"), NETS)
def test_recurrent_nets_are_torchs_but_for_what_is_dropped(kind, options, begun):
    torch.manual_seed(0)
    layers, directions = options.get("num_layers", 2), 1 + options.get("bidirectional", False)
    net = kind(E, 4, **{"num_layers": 2, **options}, dropout=1e-10, dtype=torch.float64)
    x = draw(N, L, E) if options.get("batch_first") else draw(L, N, E)
    h = draw(layers * directions, N, options.get("proj_size", 0) or 4, seed=1)
    begin = (h, draw(layers * directions, N, 4, seed=2)) if kind is nn.LSTM else h
    given = (x, begin) if begun else (x,)
    with keyed_randomness(keys()):
        ours = net(*given)
    assert_close(ours, net.eval()(*given))


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrent_net_drops_between_its_layers_and_nowhere_else(batch_first):
    net = nn.GRU(E, 4, 2, dropout=0.5, batch_first=batch_first, dtype=torch.float64)
    one, two = (nn.GRU(n, 4, batch_first=True, dtype=torch.float64) for n in (E, 4))
    for i, layer in enumerate((one, two)):
        for name, p in layer.named_parameters():
            p.data = getattr(net, name.replace("l0", f"l{i}")).data
    x = draw(N, L, E)
    with keyed_randomness(keys()):
        expected = two(F.dropout(one(x)[0], 0.5))
    with keyed_randomness(keys()):
        ours = net(x if batch_first else x.transpose(0, 1))
    assert_close(ours[0] if batch_first else ours[0].transpose(0, 1), expected[0])
    assert_close(ours[1][-1:], expected[1])


@pytest.mark.parametrize(
    ("layer", "drops"),
    [
        (nn.Dropout(0.5), True),
        (nn.Dropout(0.0), False),
        (nn.MultiheadAttention(4, 2, dropout=0.5), True),
        (nn.MultiheadAttention(4, 2), False),
        (nn.GRU(4, 4, 2, dropout=0.5), True),
        (nn.GRU(4, 4, 2), False),
        (StochasticDepth(0.5, "row"), True),
        (nn.Linear(2, 2), False),
    ],
)
def test_layers_that_drop_out_are_known_in_training_mode_alone(layer, drops):
    net = nn.Sequential(layer)
    assert has_dropout(net) == drops
    assert not has_dropout(net.eval())
