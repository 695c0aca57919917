"""The Triton kernels of `gemv.py`. No tensor cores: every byte of a weight is read once and meets few numbers.

Products are spread over a block and summed into float32 accumulators of the block's own shape; what is summed across
threads is summed once, at the end.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from phi2_kernels._dispatch import architecture, on_its_device, tl, triton


class Launch(NamedTuple):
    """Columns and rows of the weight that a program with one row of x reads at a time, and its warps."""

    columns: int
    rows: int
    num_warps: int


_FORMS = dict.fromkeys(("half", "int8", "int4"), Launch(512, 8, num_warps=4))
LAUNCH = {80: dict(_FORMS), 90: dict(_FORMS)}


@triton.jit
def _zeros(COUNT: tl.constexpr, SHAPE: tl.constexpr):
    """Accumulators, one for each row of x."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros(SHAPE, tl.float32),)
    return tiles


@triton.jit
def _gemv_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, x_stride, weight_stride, y_stride, N, K,
    M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    for m in tl.static_range(M):
        y = tl.sum(acc[m], axis=1)
        if scale_ptr is not None:
            y *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        _store_row(y, bias_ptr, y_ptr + m * y_stride, n, N)


@triton.jit
def _store_row(y, bias_ptr, y_ptr, n, N):
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(y_ptr + n, y, mask=n < N)


@triton.jit
def _one_and_sixteenths(code_at_top_of_mantissa):
    """1 + code / 16 as a float32, put together from its bits: much cheaper than a conversion."""
    return (code_at_top_of_mantissa | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _gemv_int4_kernel(
    x_ptr, packed_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    x_stride, packed_stride, scales_stride, zeros_stride, y_stride, N, GROUPS,
    M: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Group by group, sum scale (code - zero) x = scale (16 sum (1 + code / 16) x - (16 + zero) sum x)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, i = n.to(tl.int64)[:, None], tl.arange(0, HALF)[None, None, :]
    acc = _zeros(M, (BLOCK_N, BLOCK_G))
    for start in range(0, GROUPS, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)[None, :]
        mask = (n < N)[:, None] & (g < GROUPS)
        mask3 = mask[:, :, None]
        packed_ptrs = packed_ptr + (rows * packed_stride)[:, :, None] + g[:, :, None] * HALF + i
        byte = tl.load(packed_ptrs, mask=mask3, other=0, eviction_policy="evict_first").to(tl.int32)
        low, high = _one_and_sixteenths((byte & 0x0F) << 19), _one_and_sixteenths((byte & 0xF0) << 15)
        scales = tl.load(scales_ptr + rows * scales_stride + g, mask=mask, other=0.0).to(tl.float32)
        zeros = tl.load(zeros_ptr + rows * zeros_stride + g, mask=mask, other=0.0).to(tl.float32)
        added = ()
        for m in tl.static_range(M):
            x_ptrs = x_ptr + m * x_stride + g[:, :, None] * (2 * HALF) + i + tl.zeros_like(n)[:, None, None]
            x_low = tl.load(x_ptrs, mask=mask3, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_G, HALF]
            x_high = tl.load(x_ptrs + HALF, mask=mask3, other=0.0).to(tl.float32)
            codes_x, sum_x = tl.sum(x_low * low + x_high * high, axis=2), tl.sum(x_low + x_high, axis=2)
            added = added + (acc[m] + scales * (16.0 * codes_x - (16.0 + zeros) * sum_x),)
        acc = added
    for m in tl.static_range(M):
        _store_row(tl.sum(acc[m], axis=1), bias_ptr, y_ptr + m * y_stride, n, N)


@on_its_device
def gemv(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    """Writes y (M, N), which like x (M, K) and weight (N, K) may be a view with wider rows.

    Args:
        scale: (N,), each the factor of a row of the weight; None: no factors.
    """
    (M, K), N = x.shape, weight.shape[0]
    if y.numel() == 0:
        return
    launch = LAUNCH[architecture(x.device)]["half" if scale is None else "int8"]
    blocks = {"M": M, "BLOCK_N": _rows(M, launch.rows), "BLOCK_K": launch.columns}
    strides = x.stride(0), weight.stride(0), y.stride(0)
    grid = (triton.cdiv(N, blocks["BLOCK_N"]),)
    arguments = x, weight, scale, bias, y, *strides, N, K
    _gemv_kernel[grid](*arguments, **blocks, num_warps=launch.num_warps, enable_fp_fusion=True)


def _rows(M: int, rows: int) -> int:
    """Rows of the weight that a program takes: the more rows x has, the fewer, that the accumulators fit."""
    return max(2, rows // triton.next_power_of_2(M))


@on_its_device
def gemv_int4(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int, y: Tensor
) -> None:
    """Writes y (M, N), which like x (M, K) may be a view with wider rows. The weight as in `quantize_int4`."""
    (M, K), N = x.shape, packed.shape[0]
    if y.numel() == 0:
        return
    launch = LAUNCH[architecture(x.device)]["int4"]
    groups = max(1, launch.columns // group)
    blocks = {"M": M, "HALF": group // 2, "BLOCK_N": _rows(M, launch.rows), "BLOCK_G": groups}
    strides = x.stride(0), packed.stride(0), scales.stride(0), zeros.stride(0), y.stride(0)
    grid = (triton.cdiv(N, blocks["BLOCK_N"]),)
    arguments = x, packed, scales, zeros, bias, y, *strides, N, K // group
    _gemv_int4_kernel[grid](*arguments, **blocks, num_warps=launch.num_warps, enable_fp_fusion=True)
