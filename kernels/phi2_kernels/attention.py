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
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Run(NamedTuple):
    """Neighbouring queries of one row, and the ranges of keys they see; the last range ends with the queries."""

    start: int
    end: int
    keys: list[tuple[int, int]]

    @property
    def is_square(self) -> bool:
        """True when the queries see themselves and nothing before, causally."""
        return self.keys == [(self.start, self.end)]


def runs_of(until: list[int]) -> list[Run]:
    """Cuts a row into runs of queries so that, past keys being whole ranges, only the last range of each is causal.

    Queries that see nothing are in no run.

    Args:
        until: for each key of the row, the end of the queries that may see it.
    """
    length = len(until)
    changes = {i for i in range(1, length) if until[i] != until[i - 1]}
    cuts = sorted({0, length} | changes | {u for u in until if 0 < u < length})
    runs: list[Run] = []
    seen: list[tuple[int, int]] = []  # key ranges that are still visible
    for start, end in pairwise(cuts):
        seen = [(a, b) for a, b in seen if until[a] >= end]
        if until[start] < end:
            continue
        if runs and runs[-1].is_square and _joined(seen) == [(runs[-1].start, start)]:
            runs[-1] = Run(runs[-1].start, end, [(runs[-1].start, end)])
        else:
            runs.append(Run(start, end, _joined([*seen, (start, end)])))
        seen.append((start, end))
    return runs


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same keys in as few ranges as possible."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


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
        self._lower_right: dict[tuple[int, int, torch.dtype], Tensor] = {}

    @property
    def is_causal(self) -> bool:
        """True when no mask is needed beside the causal one of a square pass."""
        return self.until is None and self.queries == self.keys

    @cached_property
    def runs(self) -> list[list[Run]]:
        """For each row of a square pass, its runs of queries."""
        return [runs_of(row) for row in self.until.tolist()]

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

    def lower_right(self, queries: int, keys: int, dtype: torch.dtype) -> Tensor:
        """(n, m), added to scores: the last query sees every key, each one before it one key less. Made once a size."""
        if (queries, keys, dtype) not in self._lower_right:
            hidden = torch.full((queries, keys), float("-inf"), dtype=dtype, device=self.device)
            self._lower_right[queries, keys, dtype] = hidden.triu(keys - queries + 1)
        return self._lower_right[queries, keys, dtype]


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
    if visibility.until is not None and visibility.queries == visibility.keys:
        return _attention_by_runs(q, k, v, visibility, dropout)
    mask = None if visibility.is_causal else visibility.mask
    return _sdpa(q, k, v, mask, visibility.is_causal, dropout)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, dropout: float) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )


def _attention_by_runs(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, dropout: float) -> Tensor:
    """One fused call for each run of queries with just the keys it sees: no work is spent on what a mask would hide."""
    rows = zip(q.split(1), k.split(1), v.split(1), visibility.runs, strict=True)
    return _joined_in_memory([_attention_of_row(*row, visibility, dropout) for row in rows], dim=0)


def _attention_of_row(
    q: Tensor, k: Tensor, v: Tensor, runs: list[Run], visibility: Visibility, dropout: float
) -> Tensor:
    """q, k, v are (1, H, T, D). They are split once, not sliced per run, so that the backward joins each once."""
    edges = {edge for run in runs for span in ((run.start, run.end), *run.keys) for edge in span}
    cuts = sorted(edges | {0, q.shape[2]})
    sizes = [end - start for start, end in pairwise(cuts)]
    pieces = [dict(zip(cuts[:-1], x.split(sizes, dim=2), strict=True)) for x in (q, k, v)]
    attended, done = [], 0
    for run in runs:
        own = _pieces(pieces[0], [(run.start, run.end)])
        keys, values = (_pieces(x, run.keys) for x in pieces[1:])
        mask = None if run.is_square else visibility.lower_right(own.shape[2], keys.shape[2], q.dtype)
        if run.start > done:
            attended.append(torch.zeros_like(q[:, :, done : run.start]))
        attended.append(_sdpa(own, keys, values, mask, run.is_square, dropout))
        done = run.end
    if done < q.shape[2]:
        attended.append(torch.zeros_like(q[:, :, done:]))
    return _joined_in_memory(attended, dim=2)


def _pieces(pieces: dict[int, Tensor], ranges: list[tuple[int, int]]) -> Tensor:
    """The pieces that begin inside the ranges, as one (1, H, n, D)."""
    chosen = [piece for start, piece in pieces.items() if any(a <= start < b for a, b in ranges)]
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=2)


def _joined_in_memory(parts: list[Tensor], dim: int) -> Tensor:
    """(b, H, n, D) parts joined, with the heads of a token side by side in memory: the output projection reads them so.

    Args:
        dim: 0 or 2, along which they are joined.
    """
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.transpose(1, 2) for part in parts], dim=dim // 2).transpose(1, 2)
