"""Which keys a query sees, for padded, packed and prefix-shared rows: one int32 per key.

    query i sees key j   iff   j <= i < until[j]

`until` ("visible until") says everything the layouts of this library need:

    plain causal           None
    padding                0 at a pad key
    packed documents       the end of the key's document
    prefix-shared pair     prompt keys: end of the pair; chosen keys: end of chosen; rejected keys: end of rejected

Two documents, a and b; and a pair of a prompt p, its chosen answer c and its rejected answer r:

    key      a a a b b          key      p p c c r
    until    3 3 3 5 5          until    5 5 4 4 5
    query a  x . . . .          query p  x . . . .
          a  x x . . .                p  x x . . .
          a  x x x . .                c  x x x . .
          b  . . . x .                c  x x x x .
          b  . . . x x                r  x x . . x

Everything that an implementation of attention derives from it is made once here and used by every layer: a mask, runs
of queries for fused calls, tables of what a block of a Triton kernel need not look at.

Dims: B batch, T queries, S keys; queries are the last T of the S tokens, and are counted from the first token.
Source: FlashMask's column-wise form, arXiv:2410.01359; prefix sharing, arXiv:2410.20305.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

CELLS_AT_ONCE = 2**22  # of a table of blocks by keys, about 50 bytes each while it is made
WORTHWHILE_GAP = 64  # keys; a smaller hole in what a block of queries sees is masked, not skipped
CALL, KEY = 512, 16  # what a fused call costs, and each key it gathers, in scores: measured at head dims 64 and 80


class Run(NamedTuple):
    """Neighbouring queries of one row, and the ranges of keys they see; the last range ends with the queries."""

    start: int
    end: int
    keys: list[tuple[int, int]]

    @property
    def is_square(self) -> bool:
        """True when the queries see themselves and nothing before, causally."""
        return self.keys == [(self.start, self.end)]


class Call(NamedTuple):
    """Neighbouring queries of one row that a fused call takes together, the ranges of keys that any of them sees, and
    whether these are the queries' own, seen causally; else a mask tells."""

    start: int
    end: int
    keys: list[tuple[int, int]]
    is_causal: bool

    @property
    def cost(self) -> float:
        """In units of one score."""
        queries, keys = self.end - self.start, sum(b - a for a, b in self.keys)
        return CALL + KEY * keys + queries * keys * (0.5 if self.is_causal else 1.0)


class Tables(NamedTuple):
    """What the kernels of attention read of a `Visibility`; nothing when plain causal.

    Attributes:
        until: (B, S) int32.
        key_ranges, query_ends: those of the block sizes of the kernels.
    """

    until: Tensor | None
    key_ranges: Tensor | None = None
    query_ends: Tensor | None = None


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


def calls_of(runs: list[Run]) -> list[Call]:
    """One call for each run, or for several where a mask over all of them costs less: the leaves of a trie."""
    calls: list[Call] = []
    for run in runs:
        alone = Call(*run, run.is_square)
        if calls and calls[-1].end == run.start:
            keys = _joined(sorted(calls[-1].keys + run.keys))
            both = Call(calls[-1].start, run.end, keys, False)
            if both.cost <= calls[-1].cost + alone.cost:
                calls[-1] = both
                continue
        calls.append(alone)
    return calls


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same keys, of sorted ranges, in as few ranges as possible."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and joined[-1][1] >= start:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
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
        if queries > keys:
            raise ValueError(f"queries are the last of the keys: at most {keys}, got {queries}")
        self.queries, self.keys, self.device = queries, keys, device
        self.until = None if until is None else until.int().contiguous()
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}
        self.tables: dict[Any, Tables] = {}  # made once for each kind of kernels
        self._key_ranges: dict[int, Tensor] = {}
        self._query_ends: dict[int, Tensor] = {}

    @property
    def is_causal(self) -> bool:
        """True when no mask is needed beside the causal one of a square pass."""
        return self.until is None and self.queries == self.keys

    @cached_property
    def calls(self) -> list[list[Call]]:
        """For each row of a square pass, the fused calls that compute it."""
        assert self.until is not None, "a plain causal pass is one call"
        return [calls_of(runs_of(row)) for row in self.until.tolist()]

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

    def mask_of(self, row: int, call: Call, dtype: torch.dtype) -> Tensor:
        """(n, m), added to the scores of a call: -inf where a query does not see a key. Made once."""
        if (row, call.start, dtype) not in self._masks:
            assert self.until is not None
            query = torch.arange(call.start, call.end, device=self.device)[:, None]
            key = torch.cat([torch.arange(a, b, device=self.device) for a, b in call.keys])
            hidden = (key > query) | (query >= self.until[row, key])
            mask = torch.zeros(hidden.shape, dtype=dtype, device=self.device)
            self._masks[row, call.start, dtype] = mask.masked_fill_(hidden, float("-inf"))
        return self._masks[row, call.start, dtype]

    def key_ranges(self, block: int) -> Tensor | None:
        """Where each block of queries has to look: two ranges of keys, made once a block size without asking the GPU.

        Args:
            block: queries in a block; the first block begins with the first of the T queries.
        Returns:
            (B, ceil(T / block), 6) int32, or None when plain causal. Each range is (begin, full, end): outside of both
            ranges no key is seen by any query of the block, and from begin to full every key is seen by all of them.
        """
        if self.until is not None and block not in self._key_ranges:
            self._key_ranges[block] = _key_ranges(self.until, self.queries, block)
        return self._key_ranges.get(block)

    def query_ends(self, block: int) -> Tensor | None:
        """Which queries see the keys of each block, causality apart; made once a block size.

        Args:
            block: keys in a block.
        Returns:
            (B, ceil(S / block), 2) int32, or None when plain causal: all keys of the block are visible until the first
            number, none is from the second on.
        """
        if self.until is not None and block not in self._query_ends:
            blocks = -(-self.keys // block)
            key = torch.arange(blocks * block, device=self.device).clamp(max=self.keys - 1)
            until = self.until[:, key].unflatten(1, (blocks, block)).clamp(max=self.keys)  # (B, blocks, block)
            self._query_ends[block] = torch.stack([until.amin(-1), until.amax(-1)], dim=-1).int()
        return self._query_ends.get(block)


def _key_ranges(until: Tensor, queries: int, block: int) -> Tensor:
    """The table of `Visibility.key_ranges`, some blocks at a time."""
    keys = until.shape[1]
    first = torch.arange(keys - queries, keys, block, device=until.device)  # the first query of each block
    at_once = -(-CELLS_AT_ONCE // max(1, until.numel()))
    return torch.cat([_ranges_of(some, until, block) for some in first.split(at_once)], dim=1)


def _ranges_of(first: Tensor, until: Tensor, block: int) -> Tensor:
    """(B, n, 6): what blocks that begin at `first` (n,) see, cut in two at the widest hole."""
    keys, first = until.shape[1], first[:, None]  # (n, 1)
    key = torch.arange(keys, device=until.device)
    end = (first + block).clamp(max=keys)
    some = (key < end) & (until[:, None] > torch.maximum(first, key))  # (B, n, S): a query of the block sees the key
    every = (key <= first) & (until[:, None] >= end)

    last_seen = torch.where(some, key, -1).cummax(dim=-1).values
    end2 = last_seen[..., -1] + 1
    begin1 = torch.where(some, key, keys).amin(dim=-1).minimum(end2)
    before = torch.cat([torch.full_like(last_seen[..., :1], -1), last_seen[..., :-1]], dim=-1)  # last key seen before
    step, begin2 = torch.where(some & (before >= 0), key - before, 0).max(dim=-1)
    is_cut = step > WORTHWHILE_GAP
    begin2 = torch.where(is_cut, begin2, begin1)
    end1 = torch.where(is_cut, begin2 - step + 1, begin1)

    def first_not_full(begin: Tensor) -> Tensor:
        return torch.where(~every & (key >= begin[..., None]), key, keys).amin(dim=-1)

    full1, full2 = first_not_full(begin1).minimum(end1), first_not_full(begin2).minimum(end2)
    return torch.stack([begin1, full1, end1, begin2, full2, end2], dim=-1).int()
