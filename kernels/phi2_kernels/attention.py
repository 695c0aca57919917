"""Causal attention over padded, packed or prefix-shared rows, described by one int32 per key.

    query i sees key j   iff   j <= i < until[j]                       until: see `visibility.py`
    o[i] = sum_j softmax_j(q[i] . k[j] / sqrt(D)) v[j]                 o[i] = 0 where a query sees nothing
    lse[i] = log sum_j exp(q[i] . k[j] / sqrt(D))

The backward pass makes the softmax again from q, k and lse.

Dims: B batch, T queries, S keys, H query heads, H_kv key-value heads, D head dim. Queries are the last T of S tokens.
Source: arXiv:2307.08691 (FlashAttention-2).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from phi2_kernels import attention_cudnn
from phi2_kernels._dispatch import is_auto, use_triton
from phi2_kernels.decode_attention import decode_attention, unsupported_head_dim
from phi2_kernels.visibility import Visibility

MAX_BATCH_HEADS = 65535  # of all batch rows: how far the second dim of a grid goes


def attention_ref(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """The formula above, in float32. Shapes as in `attention`."""
    weights = _scores_ref(q, k, visibility).softmax(dim=-1).nan_to_num(0.0)
    return (weights @ _to_query_heads(v, q)).to(q.dtype)


def _scores_ref(q: Tensor, k: Tensor, visibility: Visibility) -> Tensor:
    """(B, H, T, S) float32, -inf where a query does not see a key."""
    scores = q.float() @ _to_query_heads(k, q).mT / q.shape[-1] ** 0.5
    return scores if visibility.mask is None else scores.masked_fill(~visibility.mask, float("-inf"))


def _to_query_heads(x: Tensor, q: Tensor) -> Tensor:
    return x.float().repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, dropout: float = 0.0, *, impl: str = "auto"
) -> Tensor:
    """Attention whose scores and softmax are float32 in every dtype. A single query is left to `decode_attention`.

    Args:
        q: (B, H, T, D).
        k, v: (B, H_kv, S, D); H must be a multiple of H_kv. Query head h reads key-value head h // (H / H_kv).
        visibility: which keys each query sees.
        dropout: probability of dropping an attention weight.
        impl: see `use_triton`; "torch" is its fused kernels, "triton" ours. "auto" takes cuDNN's forward pass in place
            of ours where `attention_cudnn.py` says so.
    Returns:
        (B, H, T, D) in the dtype of q.
    Raises:
        ValueError: when Triton was named and cannot run.
    """
    has_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if visibility.queries == 1 and not dropout and not has_gradient:
        return decode_attention(q, k, v, until=visibility.until, impl=impl)
    if use_triton(impl, q, lambda: _unsupported_reason(q, k, v, visibility, dropout)):
        return _attention_by_kernels(q, k, v, visibility, impl)[0]
    if visibility.until is not None and visibility.queries == visibility.keys:
        return _attention_by_calls(q, k, v, visibility, dropout)
    mask = None if visibility.is_causal else visibility.mask
    return _sdpa(q, k, v, mask, visibility.is_causal, dropout)


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """`attention`, and the logsumexp of each query's scores: with both, results over disjoint keys can be joined.

    Args:
        q, k, v, visibility, impl: as in `attention`. "torch" makes all scores for lse: (B, H, T, S) float32.
    Returns:
        o (B, H, T, D) in the dtype of q; lse (B, H, T), float32, natural, without gradient; -inf for a query that sees
        nothing.
    Raises:
        ValueError: when Triton was named and cannot run.
    """
    if use_triton(impl, q, lambda: _unsupported_reason(q, k, v, visibility, 0.0)):
        return _attention_by_kernels(q, k, v, visibility, impl)
    with torch.no_grad():
        lse = _scores_ref(q, k, visibility).logsumexp(dim=-1)
    return attention(q, k, v, visibility, impl="torch"), lse


def _attention_by_kernels(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, impl: str) -> tuple[Tensor, Tensor]:
    from phi2_kernels.attention_tiles_triton import tables_of

    return _attention(q, k, v, *tables_of(visibility, q), is_auto(impl))


def _unsupported_reason(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, dropout: float) -> str:
    """What keeps the kernels from this call."""
    B, H, T, D = q.shape
    if dropout > 0:
        return f"dropout must be 0, got {dropout}"
    if k.shape != (B, k.shape[1], visibility.keys, D) or v.shape != k.shape or T != visibility.queries:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        return (
            f"q, k, v must be (B, H, {visibility.queries}, D) and twice (B, H_kv, {visibility.keys}, D), got {shapes}"
        )
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
    if not q.device == k.device == v.device == visibility.device:
        devices = (q.device, k.device, v.device, visibility.device)
        return f"q, k, v and the visibility must be on one device, got {', '.join(map(str, devices))}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return f"the last dim of q, k and v must be contiguous, got strides {[x.stride(-1) for x in (q, k, v)]}"
    return unsupported_heads(B, H, k.shape[1], D, visibility)


def unsupported_heads(B: int, H: int, H_kv: int, D: int, visibility: Visibility) -> str:
    """What keeps the kernels from so many heads of so many dims."""
    if reason := unsupported_head_dim(D):
        return reason
    if H % H_kv:
        return f"the number of query heads must be a multiple of {H_kv} key-value heads, got {H}"
    if B * H > MAX_BATCH_HEADS:
        return f"batch rows times query heads must be at most {MAX_BATCH_HEADS}, got {B * H}"
    if visibility.until is not None and visibility.until.shape[0] != B:
        return f"until must have {B} rows, got {visibility.until.shape[0]}"
    return ""


def _heads_last(x: Tensor) -> Tensor:
    """New memory like x (B, H, T, D), with the heads of a token side by side: the output projection reads them so."""
    B, H, T, D = x.shape
    return torch.empty((B, T, H, D), dtype=x.dtype, device=x.device).transpose(1, 2)


def _new_lse(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


@custom_op("phi2::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor,
    until: Tensor | None, key_ranges: Tensor | None, query_ends: Tensor | None, auto: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (B, H, T, D) and lse (B, H, T) float32, which carries no gradient.

    Args:
        until, key_ranges, query_ends: the tables of `Visibility`.
        auto: the forward pass may be cuDNN's.
    """
    from phi2_kernels import attention_forward_triton

    if auto and attention_cudnn.is_chosen(q, k, v, until):
        o, lse = attention_cudnn.forward(q, k, v)
        return o.transpose(1, 2).contiguous().transpose(1, 2), lse
    o, lse = _heads_last(q), _new_lse(q)
    attention_forward_triton.forward(q, k, v, o, lse, until, key_ranges)
    return o, lse


@custom_op("phi2::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    until: Tensor | None, key_ranges: Tensor | None, query_ends: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv."""
    from phi2_kernels import attention_backward_triton

    grads = _heads_last(q), _heads_last(k), _heads_last(v)
    attention_backward_triton.backward(do, q, k, v, o, lse, *grads, until, key_ranges, query_ends)
    return grads


@_attention.register_fake
def _(q, k, v, until, key_ranges, query_ends, auto):
    return _heads_last(q), _new_lse(q)


@_attention_backward.register_fake
def _(do, q, k, v, o, lse, until, key_ranges, query_ends):
    return _heads_last(q), _heads_last(k), _heads_last(v)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *tables, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, *tables)


def _backward(ctx, do: Tensor, _) -> tuple[Tensor | None, ...]:
    return *_attention_backward(do, *ctx.saved_tensors), None, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )


def _attention_by_calls(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """A fused call for each few runs of queries with just the keys they see: little is computed that a mask hides."""
    rows = enumerate(zip(q.split(1), k.split(1), v.split(1), strict=True))
    return _joined_in_memory([_attention_of_row(*qkv, visibility, row, dropout) for row, qkv in rows], dim=0)


def _attention_of_row(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, row: int, dropout: float) -> Tensor:
    """q, k, v are (1, H, T, D). They are split once, not sliced per call, so that the backward joins each once."""
    calls = visibility.calls[row]
    edges = {edge for call in calls for span in ((call.start, call.end), *call.keys) for edge in span}
    cuts = sorted(edges | {0, q.shape[2]})
    place = {edge: i for i, edge in enumerate(cuts)}
    sizes = [end - start for start, end in pairwise(cuts)]
    pieces = [x.split(sizes, dim=2) for x in (q, k, v)]
    attended, done = [], 0
    for call in calls:
        own = _pieces(pieces[0], place, [(call.start, call.end)])
        keys, values = (_pieces(x, place, call.keys) for x in pieces[1:])
        mask = None if call.is_causal else visibility.mask_of(row, call, q.dtype)
        if call.start > done:
            attended.append(torch.zeros_like(q[:, :, done : call.start]))
        attended.append(_sdpa(own, keys, values, mask, call.is_causal, dropout))
        done = call.end
    if done < q.shape[2]:
        attended.append(torch.zeros_like(q[:, :, done:]))
    return _joined_in_memory(attended, dim=2)


def _pieces(pieces: tuple[Tensor, ...], place: dict[int, int], ranges: list[tuple[int, int]]) -> Tensor:
    """The pieces that make up the ranges, as one (1, H, n, D); `place` says which piece begins at an edge."""
    chosen = [piece for start, end in ranges for piece in pieces[place[start] : place[end]]]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)


def _joined_in_memory(parts: list[Tensor], dim: int) -> Tensor:
    """(b, H, n, D) parts joined, with the heads of a token side by side in memory: the output projection reads them so.

    Args:
        dim: 0 or 2, along which they are joined.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=dim // 2).transpose(1, 2)
