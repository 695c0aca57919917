"""The Triton kernels of `decode_attention.py`. No tensor cores: every byte is read once and meets one query.

Each of the keys a program reads at a time is a lane with a running maximum, sum and output of its own, so that the loop
has no exchange between threads but the dot product's; lanes are joined once, at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi2_kernels._dispatch import architecture, cdiv, on_its_device, power_of_2, tl, triton
from phi2_kernels.attention_tiles_triton import first_column, head_at, piece, pieces_of
from phi2_kernels.strided import strided

KEYS_PER_SPLIT, MIN_SPLITS, MAX_SPLITS = 256, 4, 64


class DecodeLaunch(NamedTuple):
    """Keys that a program with one query head reads at a time, stages of its loop, and its warps."""

    lanes: int
    stages: int
    num_warps: int


LAUNCH = {80: {"attend": DecodeLaunch(32, 3, num_warps=4)}, 90: {"attend": DecodeLaunch(32, 3, num_warps=4)}}


@triton.jit
def _load(pointers, mask, PIECES: tl.constexpr):
    """Heads as one float32 tile per piece; pointers and mask are [G or 1, BLOCK_S or 1, 1]."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        columns = first_column(PIECES, i) + tl.arange(0, piece(PIECES, i))[None, None, :]
        tiles = tiles + (tl.load(pointers + columns, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _scores(q, k):
    scores = tl.sum(q[0] * k[0], axis=2)  # [BLOCK_G, BLOCK_S]
    for i in tl.static_range(1, len(q)):
        scores += tl.sum(q[i] * k[i], axis=2)
    return scores


@triton.jit
def _rescaled_plus(acc, rescale, weights, v):
    """The running outputs of all lanes, one [BLOCK_G, BLOCK_S, piece] tile per piece."""
    added = ()
    for i in tl.static_range(len(acc)):
        added = added + (acc[i] * rescale[:, :, None] + weights[:, :, None] * v[i],)
    return added


@triton.jit
def _zero_heads(BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, PIECES: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles = tiles + (tl.zeros([BLOCK_G, BLOCK_S, piece(PIECES, i)], tl.float32),)
    return tiles


@triton.jit(do_not_specialize=["until_stride", "S"])
def _attend_kernel(
    q, k, v, lengths_ptr, until_ptr, partial_ptr, lse_ptr, lengths_stride, until_stride, S, G, D, scale_log2,
    PIECES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(2)
    length = S
    if lengths_ptr is not None:
        length = tl.minimum(tl.load(lengths_ptr + b * lengths_stride), S)  # never beside the cache
    keys_each = tl.cdiv(tl.cdiv(length, splits), BLOCK_S) * BLOCK_S  # of the filled keys: all splits work
    start = tl.program_id(2) * keys_each
    end = tl.minimum(start + keys_each, length)

    g = tl.arange(0, BLOCK_G)
    heads = h * G + g
    q_tiles = _load(head_at(q, b, heads[:, None, None]), (g < G)[:, None, None], PIECES)
    k_ptr, v_ptr = head_at(k, b, h), head_at(v, b, h)
    lane_max = tl.full([BLOCK_G, BLOCK_S], float("-inf"), tl.float32)
    lane_sum = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
    acc = _zero_heads(BLOCK_G, BLOCK_S, PIECES)
    for at in tl.range(start, end, BLOCK_S, num_stages=STAGES):
        keys = at + tl.arange(0, BLOCK_S)
        seen = keys < end
        if until_ptr is not None:
            seen = seen & (length <= tl.load(until_ptr + b * until_stride + keys, mask=seen, other=0))
        rows = keys.to(tl.int64)[None, :, None]
        k_tiles = _load(k_ptr + rows * k.strides[2], seen[None, :, None], PIECES)
        scores = tl.where(seen[None, :], _scores(q_tiles, k_tiles) * scale_log2, float("-inf"))
        new_max = tl.maximum(lane_max, scores)
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # a lane that saw nothing yet
        rescale, weights = tl.exp2(lane_max - safe_max), tl.exp2(scores - safe_max)
        lane_sum = lane_sum * rescale + weights
        acc = _rescaled_plus(acc, rescale, weights, _load(v_ptr + rows * v.strides[2], seen[None, :, None], PIECES))
        lane_max = new_max

    row_max = tl.max(lane_max, axis=1)  # [BLOCK_G]
    share = tl.exp2(lane_max - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None])  # [BLOCK_G, BLOCK_S]
    row_sum = tl.sum(lane_sum * share, axis=1)
    saw = row_sum > 0.0
    row_sum = tl.where(saw, row_sum, 1.0)
    share = share / row_sum[:, None]
    row = (b * tl.num_programs(1) * G + heads) * splits + tl.program_id(2)  # of (B, H, splits)
    tl.store(lse_ptr + row, tl.where(saw, row_max + tl.log2(row_sum), float("-inf")), mask=g < G)
    for i in tl.static_range(len(PIECES)):
        columns = first_column(PIECES, i) + tl.arange(0, piece(PIECES, i))[None, :]
        output = tl.sum(acc[i] * share[:, :, None], axis=1)  # [BLOCK_G, piece]
        tl.store(partial_ptr + row[:, None] * D + columns, output, mask=(g < G)[:, None])


@triton.jit(do_not_specialize=["SPLITS"])
def _combine_kernel(
    partial_ptr, lse_ptr, o, H, SPLITS, D,
    BLOCK_SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    s, d = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_D)
    row = (b * H + h) * SPLITS + s
    lse = tl.load(lse_ptr + row, mask=s < SPLITS, other=float("-inf"))
    row_max = tl.max(lse, axis=0)
    share = tl.exp2(lse - tl.where(row_max == float("-inf"), 0.0, row_max))
    row_sum = tl.sum(share, axis=0)
    share = share / tl.where(row_sum > 0.0, row_sum, 1.0)
    mask = (s < SPLITS)[:, None] & (d < D)[None, :]
    partial = tl.load(partial_ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0)  # [BLOCK_SPLITS, BLOCK_D]
    tl.store(head_at(o, b, h) + d, tl.sum(partial * share[:, None], axis=0), mask=d < D)


def splits_of(S: int) -> int:
    """How many splits the keys of a cache with room for S are cut into; the cache's size alone decides."""
    return min(max(cdiv(S, KEYS_PER_SPLIT), MIN_SPLITS), MAX_SPLITS)


@on_its_device
def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, until: Tensor | None, o: Tensor) -> None:
    """Writes o (B, H, 1, D). Shapes as in `decode_attention`; only the last dims must be contiguous."""
    B, H, _, D = q.shape
    H_kv, S = k.shape[1:3]
    if o.numel() == 0:
        return
    splits, G = splits_of(S), H // H_kv
    partial = torch.empty((B, H, splits, D), dtype=torch.float32, device=q.device)
    lse = torch.empty((B, H, splits), dtype=torch.float32, device=q.device)  # of base 2
    lengths_stride, until_stride = (0 if x is None else x.stride(0) for x in (lengths, until))
    scale_log2 = D**-0.5 * 1.4426950408889634  # log2(e): the kernels count in powers of two
    _attend_kernel[B, H_kv, splits](
        *map(strided, (q, k, v)), lengths, until, partial, lse, lengths_stride, until_stride, S, G, D, scale_log2,
        **_attend_blocks(D, G, q.device),
    )  # fmt: skip
    blocks = {"BLOCK_SPLITS": power_of_2(splits), "BLOCK_D": power_of_2(D)}
    _combine_kernel[B, H](partial, lse, strided(o), H, splits, D, **blocks, num_warps=4, enable_fp_fusion=True)


def _attend_blocks(D: int, G: int, device: torch.device) -> dict[str, Any]:
    BLOCK_G = power_of_2(G)
    launch = LAUNCH[architecture(device)]["attend"]
    lanes = max(16, launch.lanes // BLOCK_G)  # that the accumulators stay in registers
    blocks = {"PIECES": pieces_of(D), "BLOCK_G": BLOCK_G, "BLOCK_S": lanes}
    return blocks | {"STAGES": launch.stages, "num_warps": launch.num_warps, "enable_fp_fusion": True}
