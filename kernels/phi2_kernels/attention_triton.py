"""The Triton kernels of `attention.py`: forward, and two backward passes that share no output and so need no atomics.

    forward    a block of queries against the keys it sees        s = q k^T        o = softmax(s) v
    dq         the same loop, with p = exp(s - lse) made again    ds = p (do v^T - delta)        dq = ds k
    dk, dv     a block of keys against the queries that see it    dk = ds^T q                    dv = p^T do

delta[i] = o[i] . do[i]. Scores and everything on the way from one matmul to the next are float32.

Tensor cores want tiles whose sides are powers of two, and 80 is none. So a head's dims are held as a tuple of tiles,
for 80 one of 64 columns and one of 16, and each matmul over them becomes one per tile; nothing is padded to 128.

Loops run over two key (or query) ranges as if they were one, so that what lies between is skipped without a branch.
Tiles that every query of the block sees whole are in a loop of their own, which masks nothing.

Shapes: q, o, do, dq (B, H, T, D); k, v, dk, dv (B, H_kv, S, D); any strides with neighbouring dims side by side.
Source: arXiv:2307.08691 (FlashAttention-2); scores in units of log2, as its authors do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi2_kernels._dispatch import architecture, tl, triton


class Launch(NamedTuple):
    """A kernel's tile, BLOCK_M queries by BLOCK_N keys, and how it is laid on the machine."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By architecture, for heads up to 80 wide. Forward and dq read one table of key ranges, so their block_m is equal.
LAUNCH = {
    80: {
        "forward": Launch(128, 64, num_warps=4, num_stages=3),
        "dkdv": Launch(32, 64, num_warps=4, num_stages=2),
        "dq": Launch(128, 32, num_warps=4, num_stages=2),
    },
    90: {
        "forward": Launch(128, 128, num_warps=8, num_stages=2),
        "dkdv": Launch(64, 128, num_warps=8, num_stages=2),
        "dq": Launch(128, 64, num_warps=8, num_stages=2),
    },
}
WIDE = {  # for heads of more than 80 dims, which no Phi has: sure to fit, not tuned
    "forward": Launch(64, 32, num_warps=4, num_stages=2),
    "dkdv": Launch(16, 32, num_warps=4, num_stages=2),
    "dq": Launch(64, 32, num_warps=4, num_stages=2),
}
FLOAT32 = {  # exact products, without tensor cores
    "forward": Launch(32, 32, num_warps=4, num_stages=2),
    "dkdv": Launch(16, 32, num_warps=4, num_stages=2),
    "dq": Launch(32, 32, num_warps=4, num_stages=2),
}
BLOCK_DELTA = 64  # queries a program of the delta kernel takes
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # the largest score of none: -inf - -inf would be NaN


def pieces_of(D: int) -> tuple[int, ...]:
    """The powers of two that sum up to a head dim, largest first."""
    return tuple(1 << bit for bit in reversed(range(D.bit_length())) if D >> bit & 1)


@triton.constexpr_function
def _piece(pieces, i):
    return pieces[i]


@triton.constexpr_function
def _first_column(pieces, i):
    return sum(pieces[:i])


@triton.jit
def _load(ptr, stride, rows, mask, PIECES: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a head as one [BLOCK, piece] tile per piece; rows that are masked are 0."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        columns = _first_column(PIECES, i) + tl.arange(0, _piece(PIECES, i))
        pointers = ptr + rows[:, None] * stride + columns[None, :]
        if MASKED:
            tile = tl.load(pointers, mask=mask[:, None], other=0.0)
        else:
            tile = tl.load(pointers)
        if UPCAST:
            tile = tile.to(tl.float32)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _store(ptr, stride, rows, mask, tiles, PIECES: tl.constexpr):
    for i in tl.static_range(len(PIECES)):
        columns = _first_column(PIECES, i) + tl.arange(0, _piece(PIECES, i))
        pointers = ptr + rows[:, None] * stride + columns[None, :]
        tl.store(pointers, tiles[i].to(ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _zeros(BLOCK: tl.constexpr, PIECES: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles = tiles + (tl.zeros([BLOCK, _piece(PIECES, i)], tl.float32),)
    return tiles


@triton.jit
def _scaled(tiles, factor):
    """Rows times their factors, or times one number."""
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled = scaled + (tiles[i] * factor,)
    return scaled


@triton.jit
def _inner(a, b, PRECISION: tl.constexpr):
    """a b^T, summed over the pieces."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision=PRECISION)
    return product


@triton.jit
def _add_product(sums, weights, tiles, PRECISION: tl.constexpr):
    """sums + weights @ tiles, piece by piece."""
    added = ()
    for i in tl.static_range(len(tiles)):
        added = added + (tl.dot(weights, tiles[i], sums[i], input_precision=PRECISION),)
    return added


@triton.jit
def _tile(i, first, second, BLOCK: tl.constexpr, TWO: tl.constexpr):
    """Begin of the i-th tile of two ranges (begin, end) that are walked as one, and the end of its range."""
    begin, end = second[0] + i * BLOCK, second[1]
    if TWO:
        skip = tl.cdiv(first[1] - first[0], BLOCK)
        begin = tl.where(i < skip, first[0] + i * BLOCK, begin - skip * BLOCK)
        end = tl.where(i < skip, first[1], end)
    return begin, end


@triton.jit
def _tiles(first, second, BLOCK: tl.constexpr, TWO: tl.constexpr):
    """Number of tiles in two ranges."""
    count = tl.cdiv(second[1] - second[0], BLOCK)
    if TWO:
        count += tl.cdiv(first[1] - first[0], BLOCK)
    return count


@triton.jit
def _key_ranges(table_ptr, first_query, S, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Four ranges of keys for a block of queries: two of tiles that all its queries see whole, two of tiles to mask.

    The table is that of `Visibility.key_ranges`. Without one the first range of either kind is not looked at.
    """
    if table_ptr is not None:
        begin1, full1, end1 = tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2)
        begin2, full2, end2 = tl.load(table_ptr + 3), tl.load(table_ptr + 4), tl.load(table_ptr + 5)
    else:
        begin1, full1, end1 = first_query, first_query, first_query
        begin2, full2, end2 = first_query * 0, first_query + 1, tl.minimum(first_query + BLOCK_M, S)
    full1 = begin1 + (full1 - begin1) // BLOCK_N * BLOCK_N
    full2 = begin2 + (full2 - begin2) // BLOCK_N * BLOCK_N
    return (begin1, full1), (begin2, full2), (full1, end1), (full2, end2)


@triton.jit
def _seen(queries, keys, until):
    """The rule of `attention.py`; queries and keys shaped to be broadcast, until like keys or None."""
    seen = keys <= queries
    if until is not None:
        seen = seen & (queries < until)
    return seen


@triton.jit
def _attend(
    top, total, acc, q, k_ptr, v_ptr, until_ptr, k_stride, v_stride, queries, scale_log2, first, second,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Walks over two ranges of keys. top: largest score so far, in log2; total: sum of exp; acc: weighted values."""
    TWO: tl.constexpr = until_ptr is not None
    rows = tl.arange(0, BLOCK_N)
    for i in range(_tiles(first, second, BLOCK_N, TWO)):
        begin, end = _tile(i, first, second, BLOCK_N, TWO)
        inside = begin + rows < end
        k = _load(k_ptr + begin.to(tl.int64) * k_stride, k_stride, rows, inside, PIECES, MASKED, UPCAST)
        s = _inner(q, k, PRECISION)  # [BLOCK_M, BLOCK_N]
        if MASKED:
            s = tl.where(_seen_keys(queries, rows, begin, inside, until_ptr), s, float("-inf"))
        top_new = tl.maximum(top, tl.max(s, axis=1) * scale_log2)
        p = tl.exp2(s * scale_log2 - top_new[:, None])
        decay = tl.exp2(top - top_new)
        total = total * decay + tl.sum(p, axis=1)
        v = _load(v_ptr + begin.to(tl.int64) * v_stride, v_stride, rows, inside, PIECES, MASKED, UPCAST)
        acc = _add_product(_scaled(acc, decay[:, None]), p.to(v[0].dtype), v, PRECISION)
        top = top_new
    return top, total, acc


@triton.jit
def _seen_keys(queries, rows, begin, inside, until_ptr):
    """[BLOCK_M, BLOCK_N] for the keys `begin + rows`. Counted from `begin`, keys are constants: no registers."""
    until = None
    if until_ptr is not None:
        until = tl.load(until_ptr + begin + rows, mask=inside, other=0)[None, :] - begin
    return _seen((queries - begin)[:, None], rows[None, :], until)


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, until_ptr, ranges_ptr,
    q_strides, k_strides, v_strides, o_strides, scale, H, T, S,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see most: they go first
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = block * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    exists = row + rows < T
    q_ptr += b * q_strides[0] + h * q_strides[1] + row.to(tl.int64) * q_strides[2]
    k_ptr += b * k_strides[0] + h // GROUP * k_strides[1]
    v_ptr += b * v_strides[0] + h // GROUP * v_strides[1]
    if until_ptr is not None:
        until_ptr += b * S
        ranges_ptr += (b * tl.num_programs(0) + block) * 6
    whole1, whole2, masked1, masked2 = _key_ranges(ranges_ptr, S - T + row, S, BLOCK_M, BLOCK_N)
    q = _load(q_ptr, q_strides[2], rows, exists, PIECES, True, UPCAST)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = _zeros(BLOCK_M, PIECES)
    top, total, acc = _attend(
        top, total, acc, q, k_ptr, v_ptr, until_ptr, k_strides[2], v_strides[2], S - T + row + rows, scale * LOG2E,
        whole1, whole2, False, BLOCK_N, PIECES, PRECISION, UPCAST,
    )  # fmt: skip
    top, total, acc = _attend(
        top, total, acc, q, k_ptr, v_ptr, until_ptr, k_strides[2], v_strides[2], S - T + row + rows, scale * LOG2E,
        masked1, masked2, True, BLOCK_N, PIECES, PRECISION, UPCAST,
    )  # fmt: skip
    saw = total > 0
    total = tl.where(saw, total, 1.0)
    o_ptr += b * o_strides[0] + h * o_strides[1] + row.to(tl.int64) * o_strides[2]
    _store(o_ptr, o_strides[2], rows, exists, _scaled(acc, 1.0 / total[:, None]), PIECES)
    lse = tl.where(saw, top / LOG2E + tl.log(total), float("-inf"))
    tl.store(lse_ptr + (b * H + h) * T + row + rows, lse, mask=exists)


@triton.jit
def _delta_kernel(
    o_ptr, do_ptr, delta_ptr, o_strides, do_strides, H, T,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < T)[:, None] & (columns < D)[None, :]
    o_ptr += b * o_strides[0] + h * o_strides[1]
    do_ptr += b * do_strides[0] + h * do_strides[1]
    o = tl.load(o_ptr + rows[:, None] * o_strides[2] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    do = tl.load(do_ptr + rows[:, None] * do_strides[2] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + (b * H + h) * T + rows, tl.sum(o * do, axis=1), mask=rows < T)


@triton.jit
def _pull_back_to_keys(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, do_stride, keys, until, scale_log2, first, second,
    MASKED: tl.constexpr, BLOCK_M: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Walks over ranges of queries. Scores are transposed, so that no p or ds ever has to be."""
    rows = tl.arange(0, BLOCK_M)
    for i in range(_tiles(first, second, BLOCK_M, MASKED)):
        begin, end = _tile(i, first, second, BLOCK_M, MASKED)
        inside = begin + rows < end
        q = _load(q_ptr + begin.to(tl.int64) * q_stride, q_stride, rows, inside, PIECES, MASKED, UPCAST)
        p = tl.exp2(_inner(k, q, PRECISION) * scale_log2 - _load_row(lse_ptr + begin, rows, inside, MASKED) * LOG2E)
        if MASKED:
            own = None
            if until is not None:
                own = (until - begin)[:, None]
            p = tl.where(
                _seen(rows[None, :], (keys - begin)[:, None], own) & inside[None, :], p, 0.0
            )  # [BLOCK_N, BLOCK_M]
        do = _load(do_ptr + begin.to(tl.int64) * do_stride, do_stride, rows, inside, PIECES, MASKED, UPCAST)
        dv = _add_product(dv, p.to(do[0].dtype), do, PRECISION)
        ds = p * (_inner(v, do, PRECISION) - _load_row(delta_ptr + begin, rows, inside, MASKED))
        dk = _add_product(dk, ds.to(q[0].dtype), q, PRECISION)
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


@triton.jit
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, until_ptr, ends_ptr,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, scale, H_kv, T, S,
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
    k_ptr += b * k_strides[0] + h * k_strides[1] + row.to(tl.int64) * k_strides[2]
    v_ptr += b * v_strides[0] + h * v_strides[1] + row.to(tl.int64) * v_strides[2]
    k = _load(k_ptr, k_strides[2], rows, exists, PIECES, True, UPCAST)
    v = _load(v_ptr, v_strides[2], rows, exists, PIECES, True, UPCAST)
    dk, dv = _zeros(BLOCK_N, PIECES), _zeros(BLOCK_N, PIECES)
    q_ptr += b * q_strides[0] + h * GROUP * q_strides[1]
    do_ptr += b * do_strides[0] + h * GROUP * do_strides[1]
    lse_ptr += (b * H_kv + h) * GROUP * T
    delta_ptr += (b * H_kv + h) * GROUP * T
    for _ in range(GROUP):  # the query heads of a group, one after another
        dk, dv = _pull_back_to_keys(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_strides[2], do_strides[2], keys, until, scale * LOG2E,
            before, behind, True, BLOCK_M, PIECES, PRECISION, UPCAST,
        )  # fmt: skip
        dk, dv = _pull_back_to_keys(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_strides[2], do_strides[2], keys, until, scale * LOG2E,
            whole, whole, False, BLOCK_M, PIECES, PRECISION, UPCAST,
        )  # fmt: skip
        q_ptr += q_strides[1]
        do_ptr += do_strides[1]
        lse_ptr += T
        delta_ptr += T
    dk_ptr += b * dk_strides[0] + h * dk_strides[1] + row.to(tl.int64) * dk_strides[2]
    dv_ptr += b * dv_strides[0] + h * dv_strides[1] + row.to(tl.int64) * dv_strides[2]
    _store(dk_ptr, dk_strides[2], rows, exists, _scaled(dk, scale), PIECES)
    _store(dv_ptr, dv_strides[2], rows, exists, dv, PIECES)


@triton.jit
def _pull_back_to_queries(
    dq, q, do, lse, delta, k_ptr, v_ptr, until_ptr, k_stride, v_stride, queries, scale_log2, first, second,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Walks over ranges of keys, as `_attend` does."""
    TWO: tl.constexpr = until_ptr is not None
    rows = tl.arange(0, BLOCK_N)
    for i in range(_tiles(first, second, BLOCK_N, TWO)):
        begin, end = _tile(i, first, second, BLOCK_N, TWO)
        inside = begin + rows < end
        k = _load(k_ptr + begin.to(tl.int64) * k_stride, k_stride, rows, inside, PIECES, MASKED, UPCAST)
        v = _load(v_ptr + begin.to(tl.int64) * v_stride, v_stride, rows, inside, PIECES, MASKED, UPCAST)
        p = tl.exp2(_inner(q, k, PRECISION) * scale_log2 - (lse * LOG2E)[:, None])  # [BLOCK_M, BLOCK_N]
        if MASKED:
            p = tl.where(_seen_keys(queries, rows, begin, inside, until_ptr), p, 0.0)
        ds = p * (_inner(do, v, PRECISION) - delta[:, None])
        dq = _add_product(dq, ds.to(k[0].dtype), k, PRECISION)
    return dq


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, until_ptr, ranges_ptr,
    q_strides, k_strides, v_strides, do_strides, dq_strides, scale, H, T, S,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries see most: they go first
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    row = block * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    exists = row + rows < T
    q_ptr += b * q_strides[0] + h * q_strides[1] + row.to(tl.int64) * q_strides[2]
    do_ptr += b * do_strides[0] + h * do_strides[1] + row.to(tl.int64) * do_strides[2]
    k_ptr += b * k_strides[0] + h // GROUP * k_strides[1]
    v_ptr += b * v_strides[0] + h // GROUP * v_strides[1]
    if until_ptr is not None:
        until_ptr += b * S
        ranges_ptr += (b * tl.num_programs(0) + block) * 6
    whole1, whole2, masked1, masked2 = _key_ranges(ranges_ptr, S - T + row, S, BLOCK_M, BLOCK_N)
    q = _load(q_ptr, q_strides[2], rows, exists, PIECES, True, UPCAST)
    do = _load(do_ptr, do_strides[2], rows, exists, PIECES, True, UPCAST)
    lse = tl.load(lse_ptr + (b * H + h) * T + row + rows, mask=exists, other=float("inf"))
    delta = tl.load(delta_ptr + (b * H + h) * T + row + rows, mask=exists, other=0.0)
    dq = _zeros(BLOCK_M, PIECES)
    dq = _pull_back_to_queries(
        dq, q, do, lse, delta, k_ptr, v_ptr, until_ptr, k_strides[2], v_strides[2], S - T + row + rows, scale * LOG2E,
        whole1, whole2, False, BLOCK_N, PIECES, PRECISION, UPCAST,
    )  # fmt: skip
    dq = _pull_back_to_queries(
        dq, q, do, lse, delta, k_ptr, v_ptr, until_ptr, k_strides[2], v_strides[2], S - T + row + rows, scale * LOG2E,
        masked1, masked2, True, BLOCK_N, PIECES, PRECISION, UPCAST,
    )  # fmt: skip
    dq_ptr += b * dq_strides[0] + h * dq_strides[1] + row.to(tl.int64) * dq_strides[2]
    _store(dq_ptr, dq_strides[2], rows, exists, _scaled(dq, scale), PIECES)


def launch_of(kernel: str, x: Tensor) -> Launch:
    """How "forward", "dkdv" or "dq" runs on the device of x, with its dtype and head dim."""
    if x.dtype == torch.float32:
        return FLOAT32[kernel]
    return WIDE[kernel] if x.shape[-1] > 80 else LAUNCH[architecture(x.device)][kernel]


def _options(launch: Launch, q: Tensor, k: Tensor) -> dict[str, Any]:
    """What the three big kernels have in common. Float32 is multiplied as torch multiplies it, exactly by default."""
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "PIECES": pieces_of(q.shape[-1]),
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
        "UPCAST": not q.is_cuda and q.dtype == torch.bfloat16,  # the interpreter multiplies its bits as integers
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    """Strides of all dims but the last, whose is 1."""
    return [tensor.stride()[:-1] for tensor in tensors]


def forward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, until: Tensor | None = None, ranges: Tensor | None = None
) -> None:
    """Writes o (B, H, T, D) and lse (B, H, T), float32, natural; a query that sees nothing gets 0 and -inf.

    Args:
        q, k, v: see above; any strides, but for the last, which is 1. The same goes for o.
        until: (B, S) int32, contiguous; None means plain causal.
        ranges: `Visibility.key_ranges` of this launch's block_m; None with until.
    """
    B, H, T, D = q.shape
    if q.numel() == 0:
        return
    launch = launch_of("forward", q)
    _forward_kernel[triton.cdiv(T, launch.block_m), B * H](
        q, k, v, o, lse, until, ranges, *_strides(q, k, v, o), D**-0.5, H, T, k.shape[2], **_options(launch, q, k)
    )


def backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    until: Tensor | None = None, ranges: Tensor | None = None, ends: Tensor | None = None,
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
    blocks = {"D": D, "BLOCK_M": BLOCK_DELTA, "BLOCK_D": triton.next_power_of_2(D)}
    _delta_kernel[triton.cdiv(T, BLOCK_DELTA), B * H](
        o, do, delta, *_strides(o, do), H, T, **blocks, num_warps=4, enable_fp_fusion=True
    )
    launch = launch_of("dkdv", q)
    _dkdv_kernel[triton.cdiv(S, launch.block_n), B * H_kv](
        q, k, v, do, lse, delta, dk, dv, until, ends,
        *_strides(q, k, v, do, dk, dv), D**-0.5, H_kv, T, S, **_options(launch, q, k),
    )  # fmt: skip
    launch = launch_of("dq", q)
    _dq_kernel[triton.cdiv(T, launch.block_m), B * H](
        q, k, v, do, lse, delta, dq, until, ranges,
        *_strides(q, k, v, do, dq), D**-0.5, H, T, S, **_options(launch, q, k),
    )  # fmt: skip
