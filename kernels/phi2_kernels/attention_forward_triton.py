"""The Triton kernel of `attention.py`'s forward pass: a block of queries against the keys it sees.

    s = q k^T        o = softmax(s) v

Scores, and everything on the way from one matmul to the next, are float32. `attention_tiles_triton.py` says how a head
of 80 dims is held, and how a block walks over its keys.

Shapes: q, o (B, H, T, D); k, v (B, H_kv, S, D); any strides with neighbouring dims side by side.
Source: arXiv:2307.08691 (FlashAttention-2); scores in units of log2, as its authors do.
"""

from __future__ import annotations

from torch import Tensor

from phi2_kernels._dispatch import cdiv, on_its_device, tl, triton
from phi2_kernels.attention_tiles_triton import (
    LOG2E,
    LOWEST,
    add_product,
    descriptors_of,
    head_at,
    inner,
    key_ranges,
    launch_of,
    load_rows,
    options,
    read_rows,
    rows_of,
    scaled,
    seen_keys,
    store_rows,
    tile_at,
    tiles_in,
    zero_tiles,
)
from phi2_kernels.launch import Known, launch
from phi2_kernels.strided import strided


@triton.jit
def _forward_loop(
    row_max, row_sum, acc, q, k_rows, v_rows, until_ptr, queries, scale_log2, ranges,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Walks over two ranges of keys. row_max: largest score so far, in log2; row_sum: of exp; acc: weighted values."""
    TWO: tl.constexpr = until_ptr is not None
    rows = tl.arange(0, BLOCK_N)
    for i in range(tiles_in(ranges, BLOCK_N, TWO)):
        begin, end = tile_at(i, ranges, BLOCK_N, TWO)
        inside = begin + rows < end
        k = read_rows(k_rows, begin, rows, inside, PIECES, MASKED, UPCAST)
        s = inner(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            s = tl.where(seen_keys(queries, rows, begin, inside, until_ptr), s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, axis=1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, axis=1)
        v = read_rows(v_rows, begin, rows, inside, PIECES, MASKED, UPCAST)
        acc = add_product(scaled(acc, rescale[:, None]), p.to(v[0].dtype), v, PRECISION)
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit(do_not_specialize=["T", "S"])
def _forward_kernel(
    q, k, v, o, lse_ptr, until_ptr, ranges_ptr, k_tiles, v_tiles, H, T, S, scale,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see most: they go first
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = block * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    exists = row + rows < T
    q_ptr = head_at(q, b, h) + row.to(tl.int64) * q.strides[2]
    k_rows, v_rows = rows_of(k, k_tiles, b, h // GROUP, S, PIECES), rows_of(v, v_tiles, b, h // GROUP, S, PIECES)
    if until_ptr is not None:
        until_ptr += b * S
        ranges_ptr += (b * tl.num_programs(0) + block) * 6
    whole1, whole2, masked1, masked2 = key_ranges(ranges_ptr, S - T + row, S, BLOCK_M, BLOCK_N)
    q_tiles = load_rows(q_ptr, q.strides[2], rows, exists, PIECES, True, UPCAST)
    queries = S - T + row + rows
    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = zero_tiles(BLOCK_M, PIECES)
    row_max, row_sum, acc = _forward_loop(
        row_max, row_sum, acc, q_tiles, k_rows, v_rows, until_ptr, queries, scale * LOG2E,
        (whole1, whole2), False, BLOCK_N, PIECES, PRECISION, UPCAST,
    )  # fmt: skip
    row_max, row_sum, acc = _forward_loop(
        row_max, row_sum, acc, q_tiles, k_rows, v_rows, until_ptr, queries, scale * LOG2E,
        (masked1, masked2), True, BLOCK_N, PIECES, PRECISION, UPCAST,
    )  # fmt: skip
    saw = row_sum > 0
    row_sum = tl.where(saw, row_sum, 1.0)
    o_ptr = head_at(o, b, h) + row.to(tl.int64) * o.strides[2]
    store_rows(o_ptr, o.strides[2], rows, exists, scaled(acc, 1.0 / row_sum[:, None]), PIECES)
    lse = tl.where(saw, row_max / LOG2E + tl.log(row_sum), float("-inf"))
    tl.store(lse_ptr + (b * H + h) * T + row + rows, lse, mask=exists)


@on_its_device
def forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, until: Tensor | None = None, ranges: Tensor | None = None,
    known: Known | None = None,
) -> None:  # fmt: skip
    """Writes o (B, H, T, D) and lse (B, H, T), float32, natural; a query that sees nothing gets 0 and -inf.

    Args:
        q, k, v: see above; any strides, but for the last, which is 1. The same goes for o.
        until: (B, S) int32, contiguous; None means plain causal.
        ranges: `Visibility.key_ranges` of this launch's block_m; None with until.
    """
    B, H, T, D = q.shape
    if q.numel() == 0:
        return
    own = launch_of("forward", q)
    tiles = (descriptors_of(x, own.block_n, own) for x in (k, v))
    launch(
        _forward_kernel, (cdiv(T, own.block_m), B * H, 1),
        (*map(strided, (q, k, v, o)), lse, until, ranges, *tiles, H, T, k.shape[2], D**-0.5),
        lambda: options(own, q, k), known, "attention",
    )  # fmt: skip
