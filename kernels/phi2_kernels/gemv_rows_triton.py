"""How `gemv_triton.py` multiplies three to eight rows of x in half precision: on tensor cores.

Eight rows of x are as wide as the matrix instruction, and 16 rows of the weight as high. A block's columns are dealt
out in parts, one a warp: what they found is summed at the end. Codes become half-precision numbers, exactly, so that a
weight is unpacked once for all rows of x; products are summed in float32, and int4's scales meet the sums of a group.
"""

from __future__ import annotations

from phi2_kernels._dispatch import tl, triton

ROWS = tl.constexpr(8)  # of x, in a matrix instruction; what there are less is 0


@triton.jit
def row_sums(
    x_ptr, x_stride, codes_ptr, codes_stride, scales_ptr, zeros_ptr, n, N, K, x_rows,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows n of a weight times the rows of x: one tile.  # [BLOCK_N, ROWS]"""
    m = tl.arange(0, ROWS)
    if zeros_ptr is not None:
        acc = _int4_products(
            x_ptr, x_stride, codes_ptr, codes_stride, scales_ptr, zeros_ptr, n, m, N, K, x_rows,
            GROUP, BLOCK_N, BLOCK_K, UPCAST,
        )  # fmt: skip
    else:
        acc = _products(x_ptr, x_stride, codes_ptr, codes_stride, n, m, N, K, x_rows, BLOCK_N, BLOCK_K, PARTS, UPCAST)
    y = tl.sum(acc, axis=0)
    if zeros_ptr is None and scales_ptr is not None:
        y *= tl.load(scales_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    return (y,)


@triton.jit
def _products(
    x_ptr, x_stride, weight_ptr, weight_stride, n, m, N, K, x_rows,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile for each part.  # [PARTS, BLOCK_N, ROWS]"""
    COLUMNS: tl.constexpr = BLOCK_K // PARTS
    columns = tl.arange(0, PARTS)[:, None, None] * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    weight_ptrs = weight_ptr + n.to(tl.int64)[None, :, None] * weight_stride
    x_ptrs = x_ptr + m[None, :, None] * x_stride
    acc = tl.zeros((PARTS, BLOCK_N, ROWS), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + columns
        w = tl.load(weight_ptrs + k, mask=(n < N)[None, :, None] & (k < K), other=0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + k, mask=(m < x_rows)[None, :, None] & (k < K), other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
        acc = tl.dot(w.to(x.dtype), tl.permute(x, (0, 2, 1)), acc)
    return acc


@triton.jit
def _one_and_sixteenths(code, dtype: tl.constexpr):
    """1 + code / 16 in a half precision, put together from its bits."""
    if dtype == tl.bfloat16:
        bits = code << 3 | 0x3F80
    else:
        bits = code << 6 | 0x3C00
    return bits.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _int4_products(
    x_ptr, x_stride, packed_ptr, packed_stride, scales_ptr, zeros_ptr, n, m, N, K, x_rows,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Group by group, sum scale (code - zero) x = scale (16 sum (1 + code / 16) x - (16 + zero) sum x).

    The last sum is a product with ones, to lie like the other.
    A tile for each group of a block.  # [BLOCK_G, BLOCK_N, ROWS]
    """
    BLOCK_G: tl.constexpr = tl.constexpr(max(1, BLOCK_K // GROUP))
    HALF: tl.constexpr = GROUP // 2
    rows, i, groups = n.to(tl.int64)[None, :], tl.arange(0, HALF)[None, None, :], K // GROUP
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_G, BLOCK_N, ROWS), tl.float32)
    for start in range(0, groups, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)[:, None]
        mask = (n < N)[None, :] & (g < groups)
        packed_ptrs = packed_ptr + (rows * packed_stride)[:, :, None] + g[:, :, None] * HALF + i
        byte = tl.load(packed_ptrs, mask=mask[:, :, None], other=0, eviction_policy="evict_first").to(tl.int16)
        scales = tl.load(scales_ptr + rows * groups + g, mask=mask, other=0.0).to(tl.float32)
        zeros = tl.load(zeros_ptr + rows * groups + g, mask=mask, other=0.0).to(tl.float32)
        x_ptrs = x_ptr + m[None, :, None] * x_stride + g[:, :, None] * GROUP + i
        x_mask = (m < x_rows)[None, :, None] & (g < groups)[:, :, None]
        x_low = tl.load(x_ptrs, mask=x_mask, other=0.0)  # [BLOCK_G, ROWS, HALF]
        x_high = tl.load(x_ptrs + HALF, mask=x_mask, other=0.0)
        low, high = _one_and_sixteenths(byte & 15, dtype), _one_and_sixteenths(byte >> 4, dtype)
        if UPCAST:
            x_low, x_high = x_low.to(tl.float32), x_high.to(tl.float32)
            low, high = low.to(tl.float32), high.to(tl.float32)
        x_low, x_high = tl.permute(x_low, (0, 2, 1)), tl.permute(x_high, (0, 2, 1))
        ones = tl.full((BLOCK_G, BLOCK_N, HALF), 1.0, low.dtype)
        codes_x = tl.dot(high, x_high, tl.dot(low, x_low))  # [BLOCK_G, BLOCK_N, ROWS]
        sum_x = tl.dot(ones, x_high, tl.dot(ones, x_low))
        acc += scales[:, :, None] * (16.0 * codes_x - (16.0 + zeros[:, :, None]) * sum_x)
    return acc
