"""Attention of one query per row to the keys and values of its cache, as a decode step has it.

It reads much and computes little, so that the bytes read are the time taken. Of a row that holds n tokens, whose query
is the last of them:

    the query sees key j   iff   j < n  and  n <= until[j]               (`visibility.py` says what `until` can express)
    o = sum_j softmax_j(q . k[j] / sqrt(D)) v[j]                         o = 0 where it sees nothing

One head of one row is too little work for a GPU: its keys are cut into splits, each of which finds the logsumexp l[s]
of its own scores and its own output o[s], and a second kernel joins them:

    o = sum_s exp(l[s] - l) o[s]        l = log sum_s exp(l[s])

There are no gradients.

Dims: B batch, H query heads, H_kv key-value heads, S keys the cache has room for, D head dim.
Source: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import unsupported_layout, use_triton

MAX_GROUP_SIZE = 8  # query heads of a key-value head


def decode_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, until: Tensor | None = None
) -> Tensor:
    """The formula above, in float32. Arguments and result as in `decode_attention`."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.float() @ k.mT / q.shape[-1] ** 0.5  # (B, H, 1, S)
    seen = _seen(k.shape[2], lengths, until, q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(dim=-1).nan_to_num(0.0) @ v).to(q.dtype)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, until: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Attention of one query per row to the keys and values of its cache.

    Neither the shapes nor the number of programs depend on `lengths`, which stays on its device: a CUDA graph that
    was captured once serves every step.

    Args:
        q: (B, H, 1, D).
        k, v: (B, H_kv, S, D), a layer of the cache with its empty end, or the filled part of it.
        lengths: (B,) int32, how many keys of each row are filled, the query's own among them; default: all.
        until: (B, S) int32, for each key the end of the queries that may see it (0 at a pad); default: all see it.
        impl: see `use_triton`.
    Returns:
        (B, H, 1, D) in the dtype of q.
    Raises:
        ValueError: when shapes do not agree, or when Triton was named and cannot run.
    """
    _check_attention(q, k, v, lengths, until)
    if use_triton(impl, q, lambda: _unsupported_reason(q, k, v, lengths, until)):
        return _decode_attention(q, k, v, lengths, until)
    seen = _seen(k.shape[2], lengths, until, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])


def _seen(S: int, lengths: Tensor | None, until: Tensor | None, device: torch.device) -> Tensor | None:
    """(B or 1, 1, 1, S) bool, True where the query sees the key; None when it sees all."""
    if lengths is None and until is None:
        return None
    end = torch.full((1,), S, device=device) if lengths is None else lengths
    seen = torch.arange(S, device=device) < end[:, None]
    if until is not None:
        seen = seen & (end[:, None] <= until)
    return seen[:, None, None]


def _check_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, until: Tensor | None) -> None:
    B, H, T, D = q.shape
    if T != 1:
        raise ValueError(f"q must hold one query per row, (B, H, 1, D), got {tuple(q.shape)}")
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or H % k.shape[1]:
        raise ValueError(
            f"k and v must both be ({B}, H_kv, S, {D}) with an H_kv that divides {H}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"lengths must be of shape ({B},), got {tuple(lengths.shape)}")
    if until is not None and until.shape != (B, k.shape[2]):
        raise ValueError(f"until must be of shape ({B}, {k.shape[2]}), got {tuple(until.shape)}")


def _unsupported_reason(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, until: Tensor | None) -> str:
    if reason := unsupported_head_dim(q.shape[3]):
        return reason
    if q.shape[1] // k.shape[1] > MAX_GROUP_SIZE:
        return f"at most {MAX_GROUP_SIZE} query heads can share a key-value head, got {q.shape[1] // k.shape[1]}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must be of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
    if any(x is not None and x.dtype != torch.int32 for x in (lengths, until)):
        return "lengths and until must be int32"
    column = None if lengths is None else lengths[:, None]  # any stride will do, so that one number can serve all rows
    return unsupported_layout(q, q=q, k=k, v=v, until=until, lengths=column)


def unsupported_head_dim(D: int) -> str:
    """What keeps the kernels from heads of so many dims: Phi has 64 or 80."""
    return f"the head dim must be a multiple of 16 up to 80, got {D}" if D % 16 or D > 80 else ""


@custom_op("phi2::decode_attention", mutates_args=())
def _decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, until: Tensor | None) -> Tensor:
    from phi2_kernels import decode_attention_triton

    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode_attention_triton.attend(q, k, v, lengths, until, o)
    return o


@_decode_attention.register_fake
def _(q, k, v, lengths, until):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)
