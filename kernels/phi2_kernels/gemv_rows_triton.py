"""The Triton kernels of `gemv.py` for three to eight rows of x in half precision, on tensor cores.

Eight rows of x are as wide as the matrix instruction, and 16 rows of the weight as high. A block's columns are dealt
out in parts, one a warp: what they found is summed at the end. Codes become half-precision numbers, exactly, so that a
weight is unpacked once for all rows of x; products are summed in float32, and int4's scales meet the sums of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phi2_kernels._dispatch import architecture, on_its_device, tl, triton

ROWS = 8  # of x, in a matrix instruction; what there are less is 0


class Launch(NamedTuple):
    """Columns and rows of the weight that a program reads at a time, its warps, and how far it reads ahead."""

    columns: int
    rows: int
    num_warps: int
    num_stages: int


_FORMS = {
    "half": Launch(256, 16, num_warps=4, num_stages=3),
    "int8": Launch(256, 16, num_warps=4, num_stages=3),
    "int4": Launch(256, 16, num_warps=8, num_stages=1),
}
LAUNCH = {80: dict(_FORMS), 90: dict(_FORMS)}


def takes(x: Tensor, weight: Tensor, group: int = 32) -> bool:
    """Whether these kernels are for x (M, K) and a weight, or its codes; else those of `gemv_triton.py` are."""
    is_exact = weight.dtype in (x.dtype, torch.int8, torch.uint8)
    return 2 < x.shape[0] <= ROWS and x.dtype != torch.float32 and is_exact and group >= 32


@triton.jit
def _store(acc, bias_ptr, y_ptr, y_stride, n, m, M, N, scale_ptr=None):
    """acc: [PARTS, BLOCK_N, ROWS]"""
    y = tl.sum(acc, axis=0)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + m[None, :] * y_stride + n[:, None], y, mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _gemv_kernel(
    x_ptr, weight_ptr, scale_ptr, bias_ptr, y_ptr, x_stride, weight_stride, y_stride, M, N, K,
    PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    columns = tl.arange(0, PARTS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    weight_ptrs = weight_ptr + n.to(tl.int64)[None, :, None] * weight_stride
    x_ptrs = x_ptr + m[None, :, None] * x_stride
    acc = tl.zeros((PARTS, BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, PARTS * BLOCK_K):
        k = start + columns
        w = tl.load(weight_ptrs + k, mask=(n < N)[None, :, None] & (k < K), other=0, eviction_policy="evict_first")
        x = tl.load(x_ptrs + k, mask=(m < M)[None, :, None] & (k < K), other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
        acc = tl.dot(w.to(x.dtype), tl.permute(x, (0, 2, 1)), acc)
    _store(acc, bias_ptr, y_ptr, y_stride, n, m, M, N, scale_ptr)


@triton.jit
def _one_and_sixteenths(code, dtype: tl.constexpr):
    """1 + code / 16 in a half precision, put together from its bits."""
    if dtype == tl.bfloat16:
        bits = code << 3 | 0x3F80
    else:
        bits = code << 6 | 0x3C00
    return bits.to(tl.int16).to(dtype, bitcast=True)


@triton.jit
def _gemv_int4_kernel(
    x_ptr, packed_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr,
    x_stride, packed_stride, scales_stride, zeros_stride, y_stride, M, N, GROUPS,
    HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The sums of `gemv_triton._gemv_int4_kernel`, a group a part; sum x is a product with ones, to lie like others."""
    n, m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    rows, i = n.to(tl.int64)[None, :], tl.arange(0, HALF)[None, None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_G, BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, GROUPS, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)[:, None]
        mask = (n < N)[None, :] & (g < GROUPS)
        packed_ptrs = packed_ptr + (rows * packed_stride)[:, :, None] + g[:, :, None] * HALF + i
        byte = tl.load(packed_ptrs, mask=mask[:, :, None], other=0, eviction_policy="evict_first").to(tl.int16)
        scales = tl.load(scales_ptr + rows * scales_stride + g, mask=mask, other=0.0).to(tl.float32)
        zeros = tl.load(zeros_ptr + rows * zeros_stride + g, mask=mask, other=0.0).to(tl.float32)
        x_ptrs = x_ptr + m[None, :, None] * x_stride + g[:, :, None] * (2 * HALF) + i
        x_mask = (m < M)[None, :, None] & (g < GROUPS)[:, :, None]
        x_low = tl.load(x_ptrs, mask=x_mask, other=0.0)  # [BLOCK_G, BLOCK_M, HALF]
        x_high = tl.load(x_ptrs + HALF, mask=x_mask, other=0.0)
        low, high = _one_and_sixteenths(byte & 15, dtype), _one_and_sixteenths(byte >> 4, dtype)
        if UPCAST:
            x_low, x_high, low, high = (
                x_low.to(tl.float32),
                x_high.to(tl.float32),
                low.to(tl.float32),
                high.to(tl.float32),
            )
        x_low, x_high = tl.permute(x_low, (0, 2, 1)), tl.permute(x_high, (0, 2, 1))
        ones = tl.full((BLOCK_G, BLOCK_N, HALF), 1.0, low.dtype)
        codes_x = tl.dot(high, x_high, tl.dot(low, x_low))  # [BLOCK_G, BLOCK_N, BLOCK_M]
        sum_x = tl.dot(ones, x_high, tl.dot(ones, x_low))
        acc += scales[:, :, None] * (16.0 * codes_x - (16.0 + zeros[:, :, None]) * sum_x)
    _store(acc, bias_ptr, y_ptr, y_stride, n, m, M, N)


@on_its_device
def gemv(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    """As `gemv_triton.gemv`."""
    (M, K), N = x.shape, weight.shape[0]
    if y.numel() == 0:
        return
    launch = LAUNCH[architecture(x.device)]["half" if scale is None else "int8"]
    strides = x.stride(0), weight.stride(0), y.stride(0)
    _gemv_kernel[(triton.cdiv(N, launch.rows),)](
        x, weight, scale, bias, y, *strides, M, N, K,
        PARTS=launch.num_warps, BLOCK_K=launch.columns // launch.num_warps, **_options(x, launch),
    )  # fmt: skip


@on_its_device
def gemv_int4(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int, y: Tensor
) -> None:
    """As `gemv_triton.gemv_int4`."""
    (M, K), N = x.shape, packed.shape[0]
    if y.numel() == 0:
        return
    launch = LAUNCH[architecture(x.device)]["int4"]
    strides = x.stride(0), packed.stride(0), scales.stride(0), zeros.stride(0), y.stride(0)
    _gemv_int4_kernel[(triton.cdiv(N, launch.rows),)](
        x, packed, scales, zeros, bias, y, *strides, M, N, K // group,
        HALF=group // 2, BLOCK_G=max(1, launch.columns // group), **_options(x, launch),
    )  # fmt: skip


def _options(x: Tensor, launch: Launch) -> dict[str, int | bool]:
    return {
        "BLOCK_N": launch.rows,
        "BLOCK_M": ROWS,
        "UPCAST": not x.is_cuda,  # the interpreter multiplies bfloat16's bits as integers
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }
