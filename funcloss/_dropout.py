"""Attention and recurrent layers of torch, with the dropout within them given as a function."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from funcloss._numbers import wide_dtype

Drop = Callable[[Tensor], Tensor]  # of a tensor whose first axis is the batch


def attention(
    drop: Drop,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return ``drop(softmax(scale * query @ key^T + mask)) @ value``.

    Args:
        drop: Of the attention weights, ``(batch, ..., targets, sources)``.
        query: ``(batch, ..., targets, width)``.
        key: ``(batch, ..., sources, width)``.
        value: ``(batch, ..., sources, values)``.
        attn_mask: True where a source is attended to, or what is added to the scores.
        is_causal: No target attends to a later source.
        scale: Of the scores; None: ``1 / sqrt(width)``.
        enable_gqa: Several heads of queries share one of keys and values.

    Raises:
        ValueError: a mask is given to attention that is causal already.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal, not both")
    if is_causal:
        shape = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    return drop(_weights(query, key, attn_mask, scale)).to(value.dtype) @ value


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return the attention weights, 0 for a target that may attend to nothing."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    scores = scores.to(wide_dtype(scores))
    if mask is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def multi_head_attention(
    drop: Drop,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    projections: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return torch's multi-head attention in training mode, and its weights of each head.

    Args:
        drop: Of the attention weights, ``(batch, heads, targets, sources)``.
        query: ``(targets, batch, width)``.
        key: ``(sources, batch, width of keys)``.
        value: ``(sources, batch, width of values)``.
        num_heads: Number of heads.
        projections: Of query, key and value to the heads.
        biases: Of the projections.
        bias_k: A further key.
        bias_v: A further value.
        add_zero_attn: Attend to a source of zeros too.
        out_proj_weight: Projection of the heads' outputs.
        out_proj_bias: Its bias.
        key_padding_mask: ``(batch, sources)``, True where a source is left out, or what is added.
        attn_mask: ``(targets, sources)`` or ``(batch * heads, targets, sources)``, likewise.

    Returns:
        ``(targets, batch, width)``, and ``(batch, heads, targets, sources)`` after ``drop``.
    """
    given = zip((query, key, value), projections, biases or (None,) * 3, strict=True)
    q, k, v = (F.linear(x, weight, bias) for x, weight, bias in given)
    (targets, batch, width), added = q.shape, 0
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, batch, -1)])
        v = torch.cat([v, bias_v.expand(1, batch, -1)])
        added += 1
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        added += 1
    # torch 2.6 cannot compile ``unflatten`` where functions are looked at, as here.
    q, k, v = (x.reshape(*x.shape[:2], num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    bias = None
    if attn_mask is not None:
        bias = _added(attn_mask, q.dtype)
        bias = bias if bias.dim() == 2 else bias.reshape(batch, num_heads, *bias.shape[1:])
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, q.dtype)[:, None, None]
        bias = padding if bias is None else bias + padding
    if bias is not None:
        bias = F.pad(bias, (0, added))
    weights = drop(_weights(q, k, bias, None))
    out = (weights.to(v.dtype) @ v).permute(2, 0, 1, 3).reshape(targets, batch, width)
    return F.linear(out, out_proj_weight, out_proj_bias), weights


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a mask adds to the scores; of booleans, True leaves out."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def recurrent(
    drop: Drop,
    net: Callable[..., tuple[Tensor, ...]],
    input: Tensor,
    hx: Tensor | tuple[Tensor, ...],
    params: tuple[Tensor, ...],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Any, ...]:
    """Return what a recurrent net of torch returns, layer by layer, ``drop`` between two of them.

    Args:
        drop: Of the outputs of a layer, the batch their first axis.
        net: ``torch.lstm`` or its kin; all further arguments are its own.
        input: ``(batch, length, width)``, or ``(length, batch, width)`` without ``batch_first``.
        hx: First states, ``(layers * directions, batch, hidden)``.
        params: Weights, those of a layer after those of the layer before.
        has_biases: Whether there are biases among them.
        num_layers: Number of layers.
        dropout: Not used: ``drop`` knows.
        train: Whether the net is in training mode.
        bidirectional: Whether there are two directions.
        batch_first: Whether the batch is the first axis of ``input``.
    """
    axis, directions = 0 if batch_first else 1, 2 if bidirectional else 1
    states = (hx,) if isinstance(hx, Tensor) else hx
    each, ends = len(params) // num_layers, []
    for layer in range(num_layers):
        if layer:
            input = drop(input.transpose(0, axis)).transpose(0, axis)
        own = tuple(h[layer * directions : (layer + 1) * directions] for h in states)
        begin = own[0] if isinstance(hx, Tensor) else own
        weights = tuple(params[layer * each : (layer + 1) * each])
        options = (has_biases, 1, 0.0, train, bidirectional, batch_first)
        input, *end = net(input, begin, weights, *options)
        ends.append(end)
    return (input, *(torch.cat(h) for h in zip(*ends, strict=True)))
