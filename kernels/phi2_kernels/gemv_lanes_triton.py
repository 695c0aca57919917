"""How `gemv_triton.py` multiplies one or two rows of x, or float32: without tensor cores.

Every byte of a weight is read once and meets few numbers. Products are spread over a block and summed into float32
accumulators of the block's own shape; what is summed across threads is summed once, at the end.
"""

from __future__ import annotations

from phi2_kernels._dispatch import tl, triton


@triton.jit
def lane_sums(
    x_ptr, x_stride, codes_ptr, codes_stride, scales_ptr, zeros_ptr, n, N, K,
    M: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows n of a weight times each of the M rows of x: M tiles.  # [BLOCK_N, 1]"""
    if zeros_ptr is not None:
        acc = _int4_products(
            x_ptr, x_stride, codes_ptr, codes_stride, scales_ptr, zeros_ptr, n, N, K, M, GROUP, BLOCK_N, BLOCK_K
        )
    else:
        acc = _products(x_ptr, x_stride, codes_ptr, codes_stride, n, N, K, M, BLOCK_N, BLOCK_K)
    sums = ()
    for m in tl.static_range(M):
        y = tl.sum(acc[m], axis=1)
        if zeros_ptr is None and scales_ptr is not None:
            y *= tl.load(scales_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        sums = sums + (y[:, None],)
    return sums


@triton.jit
def _zeros(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """Accumulators, one for each row of x."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros(SHAPE, tl.float32),)
    return tiles


@triton.jit
def _products(
    x_ptr, x_stride, weight_ptr, weight_stride, n, N, K, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """M tiles, summed over blocks of columns only.  # [BLOCK_N, BLOCK_K]"""
    weight_ptrs = weight_ptr + n.to(tl.int64)[:, None] * weight_stride
    acc = _zeros(M, (BLOCK_N, BLOCK_K))
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        mask = (n < N)[:, None] & (k < K)
        w = tl.load(weight_ptrs + k, mask=mask, other=0, eviction_policy="evict_first").to(tl.float32)
        added = ()
        for m in tl.static_range(M):  # x is read in the shape of w: by the thread that needs it, out of the L1 cache
            x = tl.load(x_ptr + m * x_stride + k + tl.zeros_like(n)[:, None], mask=mask, other=0.0)
            added = added + (acc[m] + x.to(tl.float32) * w,)
        acc = added
    return acc


@triton.jit
def _one_and_sixteenths(code_at_top_of_mantissa):
    """1 + code / 16 as a float32, put together from its bits: much cheaper than a conversion."""
    return (code_at_top_of_mantissa | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _int4_products(
    x_ptr, x_stride, packed_ptr, packed_stride, scales_ptr, zeros_ptr, n, N, K,
    M: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same, with scale (code - zero) = 16 scale (1 + code / 16) - scale (16 + zero): one multiply-add a weight.

    M tiles.  # [BLOCK_N, BLOCK_G]
    """
    BLOCK_G: tl.constexpr = tl.constexpr(max(1, BLOCK_K // GROUP))
    HALF: tl.constexpr = GROUP // 2
    rows, i, groups = n.to(tl.int64)[:, None], tl.arange(0, HALF)[None, None, :], K // GROUP
    acc = _zeros(M, (BLOCK_N, BLOCK_G, HALF))
    for start in range(0, groups, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)[None, :]
        mask = (n < N)[:, None] & (g < groups)
        mask3 = mask[:, :, None]
        packed_ptrs = packed_ptr + (rows * packed_stride)[:, :, None] + g[:, :, None] * HALF + i
        byte = tl.load(packed_ptrs, mask=mask3, other=0, eviction_policy="evict_first").to(tl.int32)
        scales = tl.load(scales_ptr + rows * groups + g, mask=mask, other=0.0).to(tl.float32)
        zeros = tl.load(zeros_ptr + rows * groups + g, mask=mask, other=0.0).to(tl.float32)
        slope, offset = (16.0 * scales)[:, :, None], (scales * (16.0 + zeros))[:, :, None]
        low = _one_and_sixteenths((byte & 0x0F) << 19) * slope - offset
        high = _one_and_sixteenths((byte & 0xF0) << 15) * slope - offset
        added = ()
        for m in tl.static_range(M):
            x_ptrs = x_ptr + m * x_stride + g[:, :, None] * GROUP + i + tl.zeros_like(n)[:, None, None]
            x_low = tl.load(x_ptrs, mask=mask3, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_G, HALF]
            x_high = tl.load(x_ptrs + HALF, mask=mask3, other=0.0).to(tl.float32)
            added = added + (acc[m] + x_low * low + x_high * high,)
        acc = added
    sums = ()
    for m in tl.static_range(M):
        sums = sums + (tl.sum(acc[m], axis=2),)
    return sums
