"""What the forward and the backward kernels of attention share: heads in tiles, walks over ranges, who sees whom.

Tensor cores want tiles whose sides are powers of two, and 80 is none. So a head's dims are held as a tuple of tiles,
for 80 one of 64 columns and one of 16, and each matmul over them becomes one per tile; nothing is padded to 128.

Loops run over two key (or query) ranges as if they were one, so that what lies between is skipped without a branch.
Tiles that every query of the block sees whole are in a loop of their own, which masks nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi2_kernels._dispatch import architecture, tensor_descriptor, tl, triton
from phi2_kernels.visibility import Tables, Visibility


class AttentionLaunch(NamedTuple):
    """A kernel's tile, BLOCK_M queries by BLOCK_N keys, and how it is laid on the machine.

    Attributes:
        tma: Hopper's copy engine fetches the tiles of a loop, so that no thread keeps an address of them.
        maxnreg: registers of a thread at most; None is what the compiler likes best.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    maxnreg: int | None = None


# By architecture. Forward and dq read one table of key ranges, so their block_m is equal.
LAUNCH = {
    80: {
        "forward": AttentionLaunch(128, 64, num_warps=4, num_stages=3),
        "dkdv": AttentionLaunch(32, 64, num_warps=4, num_stages=2),
        "dq": AttentionLaunch(128, 32, num_warps=4, num_stages=2),
    },
    90: {
        "forward": AttentionLaunch(128, 128, num_warps=8, num_stages=2),
        "dkdv": AttentionLaunch(64, 128, num_warps=8, num_stages=2),
        "dq": AttentionLaunch(128, 64, num_warps=8, num_stages=2),
    },
}
NARROW = {
    80: {"dq": AttentionLaunch(128, 64, num_warps=8, num_stages=2)}
}  # heads up to 64: where the tile above would spill
FLOAT32 = {  # exact products, without tensor cores
    "forward": AttentionLaunch(32, 64, num_warps=8, num_stages=2),
    "dkdv": AttentionLaunch(16, 32, num_warps=4, num_stages=2),
    "dq": AttentionLaunch(32, 64, num_warps=8, num_stages=2),
}
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # the largest score of none: -inf - -inf would be NaN


@cache
def pieces_of(D: int) -> tuple[int, ...]:
    """The powers of two that sum up to a head dim, the largest first."""
    return tuple(1 << bit for bit in reversed(range(D.bit_length())) if D >> bit & 1)


@triton.constexpr_function
def piece(pieces, i):
    return pieces[i]


@triton.constexpr_function
def first_column(pieces, i):
    return sum(pieces[:i])


@triton.constexpr_function
def columns_of(pieces):
    return sum(pieces)


@triton.jit
def load_rows(ptr, stride, rows, mask, PIECES: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of a head as one [BLOCK, piece] tile per piece; rows that are masked are 0."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        columns = first_column(PIECES, i) + tl.arange(0, piece(PIECES, i))
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
def rows_of(x, tiles, b, h, N, PIECES: tl.constexpr):
    """What `read_rows` reads: head h of batch row b of a `Strided` of N rows, or of the `descriptors_of` it."""
    if tiles is None:
        return head_at(x, b, h), x.strides[2]
    else:
        return tiles, (b * N).to(tl.int32), h.to(tl.int32) * columns_of(PIECES)


@triton.jit
def read_rows(source, begin, rows, inside, PIECES: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """The rows `begin + rows` of a head, as `load_rows`. Descriptors read rows that are not inside, too."""
    if len(source) == 2:
        ptr, stride = source
        return load_rows(ptr + begin.to(tl.int64) * stride, stride, rows, inside, PIECES, MASKED, UPCAST)
    else:
        tiles, first_row, first = source
        read = ()
        for i in tl.static_range(len(PIECES)):
            tile = tiles[i].load([first_row + begin, first + first_column(PIECES, i)])
            if UPCAST:
                tile = tile.to(tl.float32)
            read = read + (tile,)
        return read


@triton.jit
def store_rows(ptr, stride, rows, mask, tiles, PIECES: tl.constexpr):
    for i in tl.static_range(len(PIECES)):
        columns = first_column(PIECES, i) + tl.arange(0, piece(PIECES, i))
        pointers = ptr + rows[:, None] * stride + columns[None, :]
        tl.store(pointers, tiles[i].to(ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def zero_tiles(BLOCK: tl.constexpr, PIECES: tl.constexpr):
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles = tiles + (tl.zeros([BLOCK, piece(PIECES, i)], tl.float32),)
    return tiles


@triton.jit
def scaled(tiles, factor):
    """Rows times their factors, or times one number."""
    products = ()
    for i in tl.static_range(len(tiles)):
        products = products + (tiles[i] * factor,)
    return products


@triton.jit
def inner(a, b, PRECISION: tl.constexpr):
    """a b^T, summed over the pieces."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]), product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(sums, weights, tiles, PRECISION: tl.constexpr):
    """sums + weights @ tiles, piece by piece."""
    added = ()
    for i in tl.static_range(len(tiles)):
        added = added + (tl.dot(weights, tiles[i], sums[i], input_precision=PRECISION),)
    return added


@triton.jit
def head_at(x, b, h):
    """The first row of head h of batch row b of a `Strided`."""
    return x.ptr + b * x.strides[0] + h * x.strides[1]


@triton.jit
def tile_at(i, ranges, BLOCK: tl.constexpr, TWO: tl.constexpr):
    """Begin of the i-th tile of two ranges (begin, end) that are walked as one, and the end of its range."""
    first, second = ranges
    begin, end = second[0] + i * BLOCK, second[1]
    if TWO:
        skip = tl.cdiv(first[1] - first[0], BLOCK)
        begin = tl.where(i < skip, first[0] + i * BLOCK, begin - skip * BLOCK)
        end = tl.where(i < skip, first[1], end)
    return begin, end


@triton.jit
def tiles_in(ranges, BLOCK: tl.constexpr, TWO: tl.constexpr):
    """Number of tiles in two ranges."""
    first, second = ranges
    count = tl.cdiv(second[1] - second[0], BLOCK)
    if TWO:
        count += tl.cdiv(first[1] - first[0], BLOCK)
    return count


@triton.jit
def key_ranges(table_ptr, first_query, S, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
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
def seen(queries, keys, until):
    """The rule of `attention.py`; queries and keys shaped to be broadcast, until like keys or None."""
    visible = keys <= queries
    if until is not None:
        visible = visible & (queries < until)
    return visible


@triton.jit
def seen_keys(queries, rows, begin, inside, until_ptr):
    """[BLOCK_M, BLOCK_N] for the keys `begin + rows`. Counted from `begin`, keys are constants: no registers."""
    until = None
    if until_ptr is not None:
        until = tl.load(until_ptr + begin + rows, mask=inside, other=0)[None, :] - begin
    return seen((queries - begin)[:, None], rows[None, :], until)


def launch_of(kernel: str, x: Tensor) -> AttentionLaunch:
    """How "forward", "dkdv" or "dq" runs on the device of x, with its dtype and head dim."""
    if x.dtype == torch.float32:
        return FLOAT32[kernel]
    arch = architecture(x.device)
    narrow = NARROW.get(arch, {}) if x.shape[-1] <= 64 else {}
    return narrow.get(kernel, LAUNCH[arch][kernel])


def descriptors_of(x: Tensor, block: int, launch: AttentionLaunch) -> tuple[Any, ...] | None:
    """x (B, H, N, D) as the copy engine sees it, a matrix (B N, H D): tiles of `block` rows, a size for each piece.

    None where the launch does without, or where x is no such matrix with rows at multiples of 16 bytes.
    """
    if not launch.tma:
        return None
    B, H, N, D = x.shape
    is_matrix = x.stride(1) == D and (B == 1 or x.stride(0) == N * x.stride(2))
    if not is_matrix or x.data_ptr() % 16 or x.stride(2) * x.element_size() % 16:
        return None
    descriptor = tensor_descriptor.TensorDescriptor
    return tuple(descriptor(x, [B * N, H * D], [x.stride(2), 1], [block, columns]) for columns in pieces_of(D))


def tables_of(visibility: Visibility, q: Tensor) -> Tables:
    """The tables of the kernels' own block sizes; of q the device, dtype and head dim count."""
    ranges = visibility.key_ranges(launch_of("forward", q).block_m)
    return Tables(visibility.until, ranges, visibility.query_ends(launch_of("dkdv", q).block_n))


def options(launch: AttentionLaunch, q: Tensor, k: Tensor) -> dict[str, Any]:
    """What the three big kernels have in common."""
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "PIECES": pieces_of(q.shape[-1]),
        "PRECISION": _precision_of(q),
        "UPCAST": not q.is_cuda and q.dtype == torch.bfloat16,  # the interpreter multiplies its bits as integers
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "maxnreg": launch.maxnreg,
        "enable_fp_fusion": True,
    }


def _precision_of(q: Tensor) -> str:
    """Float32 is multiplied as torch multiplies it, exactly by default; for others it means nothing."""
    takes_tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if takes_tf32 else "ieee"
