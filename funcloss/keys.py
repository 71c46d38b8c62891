"""Counter-based randomness: every random number is a hash of what it is for.

A generator that moves as it draws cannot be mapped over, compiled whole or replayed for one
example. Here, as in JAX, a key is a value: each example of a step has its own, and dropout and
noise under :class:`keyed_randomness` are drawn from that key alone. They are therefore the same
eager, compiled, chunked or mapped over examples one by one, and torch's generator is never touched.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

from funcloss import _dropout
from funcloss._numbers import wide_dtype

_STRIDE, _STEP_STRIDE = 0x3504F333, 0x1F83D9AB  # odd, below 2^30, unlike each other
_MASK = 0xFFFFFFFF  # keys are 32 bits in int64: no product of _mix leaves 63 bits, none overflows


def _mix(bits: Tensor) -> Tensor:
    """Scramble the low 32 bits, of values below 2^33 (Wellons' two-round hash, constants too)."""
    bits = ((bits ^ (bits >> 15)) * 0x2C1B3C6D) & _MASK
    bits = ((bits ^ (bits >> 12)) * 0x297A2D39) & _MASK
    return bits ^ (bits >> 15)


def make_key(seed: int, *, device: torch.device | str | None = None) -> Int[Tensor, ""]:
    """Return the random key of a seed.

    Args:
        seed: Any integer of at most 64 bits.
        device: Where the key lives.

    Returns:
        A key: an int64 scalar in ``[0, 2**32)``.

    Raises:
        ValueError: ``seed`` does not fit into 64 bits.

    Example:
        >>> make_key(0).item(), make_key(1).item()
        (0, 3979630085)
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"make_key: seed must fit into 64 bits, got {seed}")
    low, high = seed & _MASK, (seed >> 32) & _MASK
    key = _mix(torch.tensor(low, dtype=torch.int64, device=device))
    return key if high == 0 else fold_in(key, torch.tensor(high, device=device))


def fold_in(key: Int[Tensor, "*keys"], data: Int[Tensor, "*data"]) -> Int[Tensor, "*both"]:
    """Derive new keys from ``key``, one for each integer in ``data``; the shapes broadcast.

    Args:
        key: Keys, int64 in ``[0, 2**32)``.
        data: Counters that tell the new keys apart, int64 in ``[0, 2**32)``.

    Returns:
        Keys, the shape of ``key`` and ``data`` together.

    Example:
        >>> fold_in(make_key(1), torch.arange(3)).unique().numel()
        3

    References:
        Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    return _mix((key + data * _STRIDE) & _MASK)


def example_keys(key: Int[Tensor, ""], step: Int[Tensor, ""], batch: int) -> Int[Tensor, " batch"]:
    """Return the key of each example of a step: a hash of (key, step, position).

    Args:
        key: The key of the training.
        step: The number of the step, an int64 scalar.
        batch: How many examples the step has.

    Returns:
        One key an example, shape ``(batch,)``.

    Example:
        >>> example_keys(make_key(0), torch.tensor(0), 4).shape
        torch.Size([4])
    """
    # One round for both counters: this runs at every step.
    return fold_in(key + step * _STEP_STRIDE, torch.arange(batch, device=key.device))


_BLOCK = 128  # words of each stream drawn at once: eager, an operation costs more than they do
_ALPHA_DROPPED = -1.7580993408473766  # what torch's alpha dropout makes of a unit: -scale * alpha


class keyed_randomness(TorchFunctionMode):  # noqa: N801 - a context manager, used as a verb
    """Draw what is random in this context from the examples' own keys.

    That is dropout of every kind (functional and in modules, of attention, of recurrent layers),
    ``bernoulli`` and so stochastic depth, ``uniform_``, ``normal_``, and from torch 2.14 on
    ``rand`` and ``randn``, which older compilers hide. Each
    takes as many words as it needs from the stream of each example, word ``j`` of example ``i``
    being a hash of ``keys[i] + j``. (Of 256 examples that draw 100,000 words each, about one pair
    shares a stretch of its streams.) Attention that drops out is computed as
    ``drop(softmax(scores)) @ value``, without a fused kernel. The other random functions of torch's
    Python API are refused by name: they would read a generator that no transform can map over.

    Args:
        keys: One key per example, shape ``(batch,)``; the first axis of what is drawn. The shape is
            all that can be checked: another axis of that length, come first, is taken for it.

    Raises:
        RuntimeError: in the context, on another random operation, or with a generator of its own.
        ValueError: in the context, on numbers whose first axis is not the batch (the second of a
            recurrent layer and of ``nn.MultiheadAttention`` that are not ``batch_first``); on
            packed sequences with dropout.

    Example:
        >>> keys = example_keys(make_key(0), torch.tensor(0), 2)
        >>> with keyed_randomness(keys):
        ...     mask = F.dropout(torch.ones(2, 4))
        >>> with keyed_randomness(keys):
        ...     torch.equal(mask, F.dropout(torch.ones(2, 4)))
        True
    """

    def __init__(self, keys: Int[Tensor, " batch"]) -> None:
        """Keep the examples' keys, at the beginning of their streams."""
        super().__init__()
        self.keys = keys
        self.start, self.end = 0, 0  # the words of each stream that ``block`` holds
        self.block = keys[:, None]
        self.used = 0  # the next word to hand out

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Draw from the keys what can be, refuse other randomness, let the rest pass."""
        kwargs = kwargs or {}
        if func in _DROPOUT:
            return self._dropout(func, *args, **kwargs)
        if func in _EMPTY:
            # Mapped as the keys are: vmap refuses to write what differs per example into a tensor
            # that does not, and stochastic depth fills an empty one.
            made = func(*args, **kwargs)
            if made.device != self.keys.device:
                return made
            return torch.where(self.keys.sum() < 0, made, made)
        if func in _RANDOM and _RANDOM[func](args, kwargs):
            if func not in _KEYED or kwargs.get("generator") is not None or "out" in kwargs:
                raise RuntimeError(
                    f"keyed_randomness: {func.__name__} draws from torch's global generator or one "
                    "of its own, which no transform can map over or replay; in a training step use "
                    "dropout, stochastic depth, bernoulli, from torch 2.14 on rand(x.shape) and "
                    "randn(x.shape), without generator or out; or set the probability to 0, or "
                    "make what is random an input"
                )
            own = {option: value for option, value in kwargs.items() if option != "generator"}
            return _KEYED[func](self, func, *args, **own)
        return func(*args, **kwargs)

    def _dropout(self, func, input, p=0.5, training=None, inplace=False):
        whole_maps, alpha = _DROPOUT[func]
        training = (not alpha) if training is None else training  # torch's own defaults
        out = self._drop(func.__name__, input, p if training else 0.0, whole_maps, alpha)
        return input.copy_(out) if inplace and out is not input else out

    def _drop(self, name: str, input: Tensor, p: float, whole_maps=False, alpha=False) -> Tensor:
        """Return ``input`` after dropout, on behalf of the function ``name``."""
        _check_probability(name, p)
        if p == 0.0:
            return input
        if p == 1.0:
            return input * 0.0
        drawn = input.shape[:2] + (1,) * (input.dim() - 2) if whole_maps else input.shape
        keep = self._words(name, drawn) >= int(p * 2**32)
        if alpha:
            scale = ((1.0 - p) * (1.0 + p * _ALPHA_DROPPED**2)) ** -0.5
            return scale * (torch.where(keep, input, _ALPHA_DROPPED) - p * _ALPHA_DROPPED)
        return input * (keep.to(input.dtype) * (1.0 / (1.0 - p)))

    def _attention(
        self, func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options
    ):
        name = func.__name__
        if query.dim() < 3:
            self._refuse_shape(name, query.shape)
        drop = partial(self._drop, name, p=dropout_p)
        return _dropout.attention(drop, query, key, value, attn_mask, is_causal, **options)

    def _multi_head_attention(
        self, func, query, key, value, embed_dim_to_check, num_heads, in_proj_weight, in_proj_bias,
        bias_k, bias_v, add_zero_attn, dropout_p, out_proj_weight, out_proj_bias, training=True,
        key_padding_mask=None, need_weights=True, attn_mask=None, use_separate_proj_weight=False,
        q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, static_k=None, static_v=None,
        average_attn_weights=True, is_causal=False,
    ):  # fmt: skip
        name = func.__name__
        if query.dim() < 3:
            self._refuse_shape(name, query.shape)
        if static_k is not None or static_v is not None:
            raise RuntimeError(f"{name}: static_k and static_v cannot be used with dropout")
        if is_causal and attn_mask is None:  # a hint about the mask, not the mask itself
            raise RuntimeError(f"{name}: is_causal needs attn_mask beside it")
        separate: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        out, weights = _dropout.multi_head_attention(
            partial(self._drop, name, p=dropout_p), query, key, value, num_heads,
            separate if use_separate_proj_weight else in_proj_weight.chunk(3),
            None if in_proj_bias is None else in_proj_bias.chunk(3),
            bias_k, bias_v, add_zero_attn, out_proj_weight, out_proj_bias,
            key_padding_mask, attn_mask,
        )  # fmt: skip
        if not need_weights:
            return out, None
        return out, weights.mean(1) if average_attn_weights else weights

    def _recurrent(self, func, input, hx, *others):
        name = func.__name__
        if isinstance(others[1], (tuple, list)):  # (batch_sizes,) hx, params, ...
            raise ValueError(
                f"{name}: a packed sequence has no axis of examples to draw dropout for: pad it, "
                "without pack_padded_sequence, or set dropout to 0"
            )
        drop = partial(self._drop, name, p=others[3])
        return _dropout.recurrent(drop, func, input, hx, *others)

    def _bernoulli(self, func, input, p=None):
        return self._coins(func.__name__, input, input if p is None else p)

    def _bernoulli_(self, func, input, p=0.5):
        return input.copy_(self._coins(func.__name__, input, p))

    def _coins(self, name: str, like: Tensor, p: float | Tensor) -> Tensor:
        """Return 1 with probability ``p``, else 0, in the shape and dtype of ``like``."""
        if isinstance(p, Tensor):
            bound = (p.to(wide_dtype(p)) * 2.0**32).to(torch.int64)
        else:
            _check_probability(name, p)
            bound = int(p * 2**32)
        return (self._words(name, like.shape) < bound).to(like.dtype)

    def _rand(self, func, *args, **kwargs):
        return self._uniform(func.__name__, torch.empty(*args, **kwargs))

    def _randn(self, func, *args, **kwargs):
        return self._normal(func.__name__, torch.empty(*args, **kwargs))

    def _uniform_(self, func, input, *args, **kwargs):
        low = args[0] if args else kwargs.get("from", 0.0)
        high = args[1] if len(args) > 1 else kwargs.get("to", 1.0)
        return input.copy_(low + (high - low) * self._uniform(func.__name__, input))

    def _normal_(self, func, input, mean=0.0, std=1.0):
        return input.copy_(mean + std * self._normal(func.__name__, input))

    def _uniform(self, name: str, like: Tensor) -> Tensor:
        """Return numbers in [0, 1), with as many bits as the dtype holds, at most 32."""
        bits = _bits(name, like.dtype)
        words = self._words(name, like.shape) >> (32 - bits)
        return words.to(like.dtype) * 2.0**-bits

    def _normal(self, name: str, like: Tensor) -> Tensor:
        """Return standard normal numbers, by Box and Muller."""
        _bits(name, like.dtype)
        radii, angles = (self._words(name, like.shape).to(wide_dtype(like)) for _ in "ab")
        radii = (-2 * ((radii + 1) * 2.0**-32).clamp(max=1).log()).sqrt()
        return (radii * (angles * (2 * math.pi * 2.0**-32)).cos()).to(like.dtype)

    def _words(self, name: str, shape: torch.Size) -> Tensor:
        """Return the next words of the streams, int64 in [0, 2^32), in a shape."""
        if not shape or shape[0] != self.keys.shape[0]:
            self._refuse_shape(name, shape)
        n = math.prod(shape[1:])
        first, self.used = self.used, self.used + n
        if self.used > self.end:
            self.start, self.end = first, max(self.used, first + _BLOCK)
            counters = torch.arange(self.start, self.end, device=self.keys.device)
            self.block = _mix(self.keys[:, None] + counters)
        words = self.block[:, first - self.start : self.used - self.start]
        return words if len(shape) == 2 else words.reshape(shape)

    def _refuse_shape(self, name: str, shape: torch.Size) -> NoReturn:
        raise ValueError(
            f"{name}: the first axis must be the batch of {self.keys.shape[0]} examples for each "
            f"to draw its own numbers, got shape {tuple(shape)}; move it there (batch_first=True "
            "in torch's layers, mode='row' of stochastic depth)"
        )


def _check_probability(name: str, p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: p must be in [0, 1], got {p}")


def _bits(name: str, dtype: torch.dtype) -> int:
    """Return how many random bits a floating-point number in [0, 1) has room for."""
    bits = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 32}
    if dtype not in bits:
        raise TypeError(f"{name}: dtype must be floating point for keyed randomness, got {dtype}")
    return bits[dtype]


_DROPOUT = {
    F.dropout: (False, False),  # (a mask a feature map?, alpha dropout?)
    F.dropout1d: (True, False),
    F.dropout2d: (True, False),
    F.dropout3d: (True, False),
    F.alpha_dropout: (False, True),
    F.feature_alpha_dropout: (True, True),
}


def _always(args: tuple, kwargs: dict) -> bool:
    return True


def _in_training(args: tuple, kwargs: dict) -> bool:
    return bool(kwargs.get("training", True))


def _third_is_training(args: tuple, kwargs: dict) -> bool:
    return bool(args[2] if len(args) > 2 else kwargs.get("train", True))


def _with_dropout(position: int) -> Callable[[tuple, dict], bool]:
    """Return whether an attention drops out, its probability being an argument at ``position``."""

    def drops(args: tuple, kwargs: dict) -> bool:
        p = args[position] if len(args) > position else kwargs.get("dropout_p", 0.0)
        return p > 0.0 and _in_training(args, kwargs)

    return drops


def _between_layers(args: tuple, kwargs: dict) -> bool:
    """Return whether a recurrent net drops out: (..., biases, layers, dropout, train, ...)."""
    switch = next((i for i, a in enumerate(args) if isinstance(a, bool)), None)
    if switch is None:
        return False
    layers, dropout, training = args[switch + 1 : switch + 4]
    return layers > 1 and dropout > 0.0 and training


_RANDOM = {
    **dict.fromkeys((torch.rand, torch.randn, torch.randint, torch.randperm), _always),
    **dict.fromkeys((torch.rand_like, torch.randn_like, torch.randint_like), _always),
    **dict.fromkeys((torch.bernoulli, torch.multinomial, torch.normal, torch.poisson), _always),
    **dict.fromkeys((Tensor.bernoulli, Tensor.bernoulli_, Tensor.multinomial), _always),
    **dict.fromkeys((Tensor.uniform_, Tensor.normal_, Tensor.random_), _always),
    **dict.fromkeys((Tensor.exponential_, Tensor.geometric_, Tensor.cauchy_), _always),
    **dict.fromkeys((torch.binomial, Tensor.log_normal_, F.gumbel_softmax), _always),
    torch._standard_gamma: _always,  # pyright: ignore[reportPrivateImportUsage]
    torch._sample_dirichlet: _always,  # pyright: ignore[reportPrivateImportUsage]
    **dict.fromkeys((torch.dropout, torch.dropout_, torch.alpha_dropout), _third_is_training),
    **dict.fromkeys((torch.alpha_dropout_, torch.native_dropout), _third_is_training),
    **dict.fromkeys((torch.feature_dropout, torch.feature_dropout_), _third_is_training),
    **dict.fromkeys(
        (torch.feature_alpha_dropout, torch.feature_alpha_dropout_), _third_is_training
    ),
    **dict.fromkeys((F.fractional_max_pool2d, F.fractional_max_pool2d_with_indices), _always),
    **dict.fromkeys((F.fractional_max_pool3d, F.fractional_max_pool3d_with_indices), _always),
    **dict.fromkeys((F.rrelu, torch.rrelu), _in_training),
    F.scaled_dot_product_attention: _with_dropout(4),
    F.multi_head_attention_forward: _with_dropout(10),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _between_layers),
}

_EMPTY = (torch.empty, Tensor.new_empty)

_KEYED = {
    F.scaled_dot_product_attention: keyed_randomness._attention,
    F.multi_head_attention_forward: keyed_randomness._multi_head_attention,
    **dict.fromkeys(
        (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), keyed_randomness._recurrent
    ),
    **dict.fromkeys((torch.bernoulli, Tensor.bernoulli), keyed_randomness._bernoulli),
    Tensor.bernoulli_: keyed_randomness._bernoulli_,
    Tensor.uniform_: keyed_randomness._uniform_,
    Tensor.normal_: keyed_randomness._normal_,
}
# A compiled graph hides rand_like and randn_like from us; of older versions (2.6, say) these too.
SEES_RAND = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
if SEES_RAND:
    _KEYED |= {torch.rand: keyed_randomness._rand, torch.randn: keyed_randomness._randn}
