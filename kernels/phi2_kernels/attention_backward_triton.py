"""The Triton kernels of `attention.py`'s backward pass: two that share no output and so need no atomics.

    dq         a block of queries against the keys it sees, with p = exp(s - lse) made again
               ds = p (do v^T - delta)        dq = ds k
    dk, dv     a block of keys against the queries that see it
               dk = ds^T q                    dv = p^T do

delta[i] = o[i] . do[i]. Everything on the way from one matmul to the next is float32. `attention_tiles_triton.py` says
how a head of 80 dims is held, and how a block walks over its keys or queries.

Shapes: q, o, do, dq (B, H, T, D); k, v, dk, dv (B, H_kv, S, D); any strides with neighbouring dims side by side.
Source: arXiv:2307.08691 (FlashAttention-2), with the gradient of q in a kernel of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi2_kernels._dispatch import cdiv, on_its_device, power_of_2, tl, triton
from phi2_kernels.attention_tiles_triton import (
    LOG2E,
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
    seen,
    seen_keys,
    store_rows,
    tile_at,
    tiles_in,
    zero_tiles,
)
from phi2_kernels.launch import Known, launch
from phi2_kernels.strided import strided

BLOCK_DELTA = 64  # queries a program of the delta kernel takes


@triton.jit(do_not_specialize=["T"])
def _delta_kernel(
    o, do, delta_ptr, H, T,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < T)[:, None] & (columns < D)[None, :]
    o_ptrs = head_at(o, b, h) + rows[:, None] * o.strides[2] + columns[None, :]
    do_ptrs = head_at(do, b, h) + rows[:, None] * do.strides[2] + columns[None, :]
    products = tl.load(o_ptrs, mask=mask, other=0.0).to(tl.float32) * tl.load(do_ptrs, mask=mask, other=0.0).to(
        tl.float32
    )
    tl.store(delta_ptr + (b * H + h) * T + rows, tl.sum(products, axis=1), mask=rows < T)


@triton.jit
def _dkdv_loop(
    dk, dv, k, v, q_rows, do_rows, lse_ptr, delta_ptr, keys, until, scale_log2, ranges,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Walks over ranges of queries. Scores are transposed, so that no p or ds ever has to be."""
    rows = tl.arange(0, BLOCK_M)
    for i in range(tiles_in(ranges, BLOCK_M, MASKED)):
        begin, end = tile_at(i, ranges, BLOCK_M, MASKED)
        inside = begin + rows < end
        q = read_rows(q_rows, begin, rows, inside, PIECES, MASKED, UPCAST)
        p = tl.exp2(inner(k, q, PRECISION) * scale_log2 - _load_row(lse_ptr + begin, rows, inside, MASKED) * LOG2E)
        if MASKED:
            own = None
            if until is not None:
                own = (until - begin)[:, None]
            p = tl.where(
                seen(rows[None, :], (keys - begin)[:, None], own) & inside[None, :], p, 0.0
            )  # [BLOCK_N, BLOCK_M]
        do = read_rows(do_rows, begin, rows, inside, PIECES, MASKED, UPCAST)
        dv = add_product(dv, p.to(do[0].dtype), do, PRECISION)
        ds = p * (inner(v, do, PRECISION) - _load_row(delta_ptr + begin, rows, inside, MASKED))
        dk = add_product(dk, ds.to(q[0].dtype), q, PRECISION)
    return dk, dv


@triton.jit
def _load_row(ptr, rows, mask, MASKED: tl.constexpr):
    """One number per query.  # [1, BLOCK_M]"""
    if MASKED:
        return tl.load(ptr + rows, mask=mask, other=0.0)[None, :]
    else:
        return tl.load(ptr + rows)[None, :]


@triton.jit
def _query_ranges(table_ptr, first_key, offset, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Three ranges of queries for a block of keys: to mask, whole tiles that see the whole block, and to mask again.

    The table is that of `Visibility.query_ends`.
    """
    first_query = first_key - offset  # sees the first key, if it is one of this pass
    begin = tl.maximum(first_query, 0)
    full, end = T, T
    if table_ptr is not None:
        full, end = tl.load(table_ptr) - offset, tl.load(table_ptr + 1) - offset
    end = tl.maximum(end, begin)
    diagonal = tl.cdiv(tl.maximum(first_query + BLOCK_N - 1 - begin, 0), BLOCK_M) * BLOCK_M
    middle = tl.minimum(begin + diagonal, end)
    full = middle + tl.maximum(full - middle, 0) // BLOCK_M * BLOCK_M
    return (begin, middle), (middle, full), (full, end)


@triton.jit(do_not_specialize=["T", "S"])
def _dkdv_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dk, dv, until_ptr, ends_ptr, q_tiles, do_tiles, H_kv, T, S, scale,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)  # the first keys are seen most: they go first
    b, h = (tl.program_id(1) // H_kv).to(tl.int64), (tl.program_id(1) % H_kv).to(tl.int64)
    row = block * BLOCK_N
    rows = tl.arange(0, BLOCK_N)
    exists = row + rows < S
    keys = row - (S - T) + rows  # counted from the first query of this pass, as everything is below
    until = None
    if until_ptr is not None:
        until = tl.load(until_ptr + b * S + row + rows, mask=exists, other=0) - (S - T)
        ends_ptr += (b * tl.num_programs(0) + block) * 2
    before, whole, behind = _query_ranges(ends_ptr, row, S - T, T, BLOCK_M, BLOCK_N)
    k_ptr = head_at(k, b, h) + row.to(tl.int64) * k.strides[2]
    v_ptr = head_at(v, b, h) + row.to(tl.int64) * v.strides[2]
    k_tiles = load_rows(k_ptr, k.strides[2], rows, exists, PIECES, True, UPCAST)
    v_tiles = load_rows(v_ptr, v.strides[2], rows, exists, PIECES, True, UPCAST)
    dk_tiles, dv_tiles = zero_tiles(BLOCK_N, PIECES), zero_tiles(BLOCK_N, PIECES)
    lse_ptr += (b * H_kv + h) * GROUP * T
    delta_ptr += (b * H_kv + h) * GROUP * T
    for i in range(GROUP):  # the query heads of a group, one after another
        q_rows = rows_of(q, q_tiles, b, h * GROUP + i, T, PIECES)
        do_rows = rows_of(do, do_tiles, b, h * GROUP + i, T, PIECES)
        dk_tiles, dv_tiles = _dkdv_loop(
            dk_tiles, dv_tiles, k_tiles, v_tiles, q_rows, do_rows, lse_ptr, delta_ptr,
            keys, until, scale * LOG2E, (before, behind), True, BLOCK_M, PIECES, PRECISION, UPCAST,
        )  # fmt: skip
        dk_tiles, dv_tiles = _dkdv_loop(
            dk_tiles, dv_tiles, k_tiles, v_tiles, q_rows, do_rows, lse_ptr, delta_ptr,
            keys, until, scale * LOG2E, (whole, whole), False, BLOCK_M, PIECES, PRECISION, UPCAST,
        )  # fmt: skip
        lse_ptr += T
        delta_ptr += T
    dk_ptr = head_at(dk, b, h) + row.to(tl.int64) * dk.strides[2]
    dv_ptr = head_at(dv, b, h) + row.to(tl.int64) * dv.strides[2]
    store_rows(dk_ptr, dk.strides[2], rows, exists, scaled(dk_tiles, scale), PIECES)
    store_rows(dv_ptr, dv.strides[2], rows, exists, dv_tiles, PIECES)


@triton.jit
def _dq_loop(
    dq, q, do, lse, delta, k_rows, v_rows, until_ptr, queries, scale_log2, ranges,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Walks over ranges of keys, as `_forward_loop` does."""
    TWO: tl.constexpr = until_ptr is not None
    rows = tl.arange(0, BLOCK_N)
    for i in range(tiles_in(ranges, BLOCK_N, TWO)):
        begin, end = tile_at(i, ranges, BLOCK_N, TWO)
        inside = begin + rows < end
        k = read_rows(k_rows, begin, rows, inside, PIECES, MASKED, UPCAST)
        v = read_rows(v_rows, begin, rows, inside, PIECES, MASKED, UPCAST)
        p = tl.exp2(inner(q, k, PRECISION) * scale_log2 - (lse * LOG2E)[:, None])  # [BLOCK_M, BLOCK_N]
        if MASKED:
            p = tl.where(seen_keys(queries, rows, begin, inside, until_ptr), p, 0.0)
        ds = p * (inner(do, v, PRECISION) - delta[:, None])
        dq = add_product(dq, ds.to(k[0].dtype), k, PRECISION)
    return dq


@triton.jit(do_not_specialize=["T", "S"])
def _dq_kernel(
    q, k, v, do, lse_ptr, delta_ptr, dq, until_ptr, ranges_ptr, k_tiles, v_tiles, H, T, S, scale,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see most: they go first
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = block * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    exists = row + rows < T
    q_ptr = head_at(q, b, h) + row.to(tl.int64) * q.strides[2]
    do_ptr = head_at(do, b, h) + row.to(tl.int64) * do.strides[2]
    k_rows, v_rows = rows_of(k, k_tiles, b, h // GROUP, S, PIECES), rows_of(v, v_tiles, b, h // GROUP, S, PIECES)
    if until_ptr is not None:
        until_ptr += b * S
        ranges_ptr += (b * tl.num_programs(0) + block) * 6
    whole1, whole2, masked1, masked2 = key_ranges(ranges_ptr, S - T + row, S, BLOCK_M, BLOCK_N)
    q_tiles = load_rows(q_ptr, q.strides[2], rows, exists, PIECES, True, UPCAST)
    do_tiles = load_rows(do_ptr, do.strides[2], rows, exists, PIECES, True, UPCAST)
    lse = tl.load(lse_ptr + (b * H + h) * T + row + rows, mask=exists, other=float("inf"))
    delta = tl.load(delta_ptr + (b * H + h) * T + row + rows, mask=exists, other=0.0)
    queries = S - T + row + rows
    dq_tiles = zero_tiles(BLOCK_M, PIECES)
    dq_tiles = _dq_loop(
        dq_tiles, q_tiles, do_tiles, lse, delta, k_rows, v_rows, until_ptr, queries,
        scale * LOG2E, (whole1, whole2), False, BLOCK_N, PIECES, PRECISION, UPCAST,
    )  # fmt: skip
    dq_tiles = _dq_loop(
        dq_tiles, q_tiles, do_tiles, lse, delta, k_rows, v_rows, until_ptr, queries,
        scale * LOG2E, (masked1, masked2), True, BLOCK_N, PIECES, PRECISION, UPCAST,
    )  # fmt: skip
    dq_ptr = head_at(dq, b, h) + row.to(tl.int64) * dq.strides[2]
    store_rows(dq_ptr, dq.strides[2], rows, exists, scaled(dq_tiles, scale), PIECES)


@on_its_device
def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    until: Tensor | None = None, ranges: Tensor | None = None, ends: Tensor | None = None, known: Known | None = None,
) -> None:  # fmt: skip
    """Writes dq like q, dk like k and dv like v, whose strides are as free as those of q.

    Args:
        do: like o; its last dim need not be contiguous (`sum().backward()` sends one expanded number).
        o, lse: what `forward` wrote.
        until, ranges: as given to `forward`.
        ends: `Visibility.query_ends` of the block_n of "dkdv"; None with until.
    """
    B, H, T, D = q.shape
    H_kv, S = k.shape[1:3]
    if q.numel() == 0:
        dk.zero_(), dv.zero_()
        return
    do = do if do.stride(-1) == 1 else do.contiguous()
    delta = torch.empty_like(lse)
    blocks = {"D": D, "BLOCK_M": BLOCK_DELTA, "BLOCK_D": power_of_2(D), "num_warps": 4, "enable_fp_fusion": True}
    launch(
        _delta_kernel, (cdiv(T, BLOCK_DELTA), B * H, 1), (strided(o), strided(do), delta, H, T),
        lambda: blocks, known, "attention delta",
    )  # fmt: skip
    given = *map(strided, (q, k, v, do)), lse, delta
    dkdv, dq_ = launch_of("dkdv", q), launch_of("dq", q)
    tiles = (descriptors_of(x, dkdv.block_m, dkdv) for x in (q, do))
    launch(
        _dkdv_kernel, (cdiv(S, dkdv.block_n), B * H_kv, 1),
        (*given, strided(dk), strided(dv), until, ends, *tiles, H_kv, T, S, D**-0.5),
        lambda: options(dkdv, q, k), known, "attention dkdv",
    )  # fmt: skip
    tiles = (descriptors_of(x, dq_.block_n, dq_) for x in (k, v))
    launch(
        _dq_kernel, (cdiv(T, dq_.block_m), B * H, 1),
        (*given, strided(dq), until, ranges, *tiles, H, T, S, D**-0.5),
        lambda: options(dq_, q, k), known, "attention dq",
    )  # fmt: skip
