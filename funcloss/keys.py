"""Counter-based randomness: every random number is a hash of what it is for.

A generator that moves as it draws cannot be mapped over, compiled whole or replayed for one
example. Here, as in JAX, a key is a value: each example of a step has its own, and dropout under
:class:`keyed_randomness` draws its mask from that key alone. The mask is therefore the same eager,
compiled, chunked or mapped over examples one by one, and torch's generator is never touched.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
    """Draw every dropout mask in this context from the examples' own keys.

    ``F.dropout`` and its kin (and so ``nn.Dropout`` and its kin) take as many words as they need
    from the stream of each example, word ``j`` of example ``i`` being a hash of ``keys[i] + j``.
    (Of 256 examples that draw 100,000 words each, about one pair shares a stretch of its streams.)
    The other random functions of torch's Python API are refused by name: they would read a
    generator that no transform can map over.

    Args:
        keys: One key an example, shape ``(batch,)``; the first axis of what is dropped.

    Raises:
        RuntimeError: in the context, on a random operation other than dropout.
        ValueError: in the context, on dropout of a tensor whose first axis is not the batch.

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
        """Draw dropout masks from the keys, refuse other randomness, let the rest pass."""
        kwargs = kwargs or {}
        if func in _DROPOUT:
            return self._dropout(func, *args, **kwargs)
        if func in _RANDOM and _RANDOM[func](args, kwargs):
            raise RuntimeError(
                f"keyed_randomness: {func.__name__} draws from torch's global generator, which no "
                "transform can map over or replay; only dropout (F.dropout and its kin) can be "
                "used in a training step: set the probability to 0, or make what is random an input"
            )
        return func(*args, **kwargs)

    def _dropout(self, func, input, p=0.5, training=None, inplace=False):
        whole_maps, alpha = _DROPOUT[func]
        training = (not alpha) if training is None else training  # torch's own defaults
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"{func.__name__}: p must be in [0, 1], got {p}")
        if not training or p == 0.0:
            return input
        if p == 1.0:
            return input * 0.0
        if input.dim() == 0 or input.shape[0] != self.keys.shape[0]:
            raise ValueError(
                f"{func.__name__}: the first axis must be the batch of {self.keys.shape[0]} "
                f"examples for each to draw its own mask, got shape {tuple(input.shape)}"
            )
        drawn = input.shape[:2] + (1,) * (input.dim() - 2) if whole_maps else input.shape
        keep = self._words(math.prod(drawn[1:])) >= int(p * 2**32)
        if len(drawn) != 2:
            keep = keep.reshape(drawn)
        if alpha:
            scale = ((1.0 - p) * (1.0 + p * _ALPHA_DROPPED**2)) ** -0.5
            out = scale * (torch.where(keep, input, _ALPHA_DROPPED) - p * _ALPHA_DROPPED)
        else:
            out = input * (keep.to(input.dtype) * (1.0 / (1.0 - p)))
        return input.copy_(out) if inplace else out

    def _words(self, n: int) -> Tensor:
        """Return the next ``n`` words of each example's stream, int64 in [0, 2^32)."""
        first, self.used = self.used, self.used + n
        if self.used > self.end:
            self.start, self.end = first, max(self.used, first + _BLOCK)
            counters = torch.arange(self.start, self.end, device=self.keys.device)
            self.block = _mix(self.keys[:, None] + counters)
        return self.block[:, first - self.start : self.used - self.start]


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
