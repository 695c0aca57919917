"""Causal attention over padded, packed or prefix-shared rows, described by one int32 per key.

    query i sees key j   iff   j <= i < until[j]
    o[i] = sum_j softmax_j(q[i] . k[j] / sqrt(D)) v[j]        o[i] = 0 where a query sees nothing

`until` ("visible until") says everything the layouts of this library need:

    plain causal           None
    padding                0 at a pad key
    packed documents       the end of the key's document
    prefix-shared pair     prompt keys: end of the pair; chosen keys: end of chosen; rejected keys: end of rejected

Dims: B batch, T queries, S keys, H query heads, H_kv key-value heads, D head dim.
Source: FlashMask's column-wise form, arXiv:2410.01359; prefix sharing, arXiv:2410.20305.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


class Visibility:
    """Which keys each query of one forward pass sees; made once, used by every layer.

    Args:
        queries: T, the queries of this pass; they are the last T of the S tokens.
        keys: S.
        until: (B, S) int32, or None for plain causal.
        device: where the masks go.
    """

    def __init__(self, queries: int, keys: int, until: Tensor | None, device: torch.device) -> None:
        if until is not None and until.shape[-1] != keys:
            raise ValueError(f"visible_until must say something of each of the {keys} keys, got {until.shape[-1]}")
        self.queries, self.keys, self.until, self.device = queries, keys, until, device

    @property
    def is_causal(self) -> bool:
        """True when no mask is needed beside the causal one of a square pass."""
        return self.until is None and self.queries == self.keys

    @cached_property
    def mask(self) -> Tensor | None:
        """(B or 1, 1, T, S) bool, True where a query sees a key; None when every query sees every key."""
        if self.until is None and self.queries == 1:
            return None
        key = torch.arange(self.keys, device=self.device)
        query = key[self.keys - self.queries :, None]  # (T, 1)
        seen = (key <= query)[None]
        if self.until is not None:
            seen = seen & (query < self.until[:, None, :])
        return seen[:, None]


def attention_ref(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """The formula above, in float32. Shapes as in `attention`."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.float() @ k.mT / q.shape[-1] ** 0.5  # (B, H, T, S)
    if visibility.mask is not None:
        scores = scores.masked_fill(~visibility.mask, float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    return (weights @ v).to(q.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, dropout: float = 0.0) -> Tensor:
    """Attention by torch's fused kernels, whose scores and softmax are float32 in every dtype.

    Args:
        q: (B, H, T, D).
        k, v: (B, H_kv, S, D); H must be a multiple of H_kv.
        visibility: which keys each query sees.
        dropout: probability of dropping an attention weight.
    Returns:
        (B, H, T, D) in the dtype of q.
    """
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if visibility.is_causal else visibility.mask,
        is_causal=visibility.is_causal,
        dropout_p=dropout,
        enable_gqa=q.shape[1] != k.shape[1],
    )
