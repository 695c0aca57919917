"""The Triton kernels of `quantized_matmul.py`: tiles of a weight are read as codes and made half precision on the chip.

A byte of int4 holds two columns half a group apart: the thread that reads 16 bytes has 32 neighbouring columns. Scales
of int8 meet the sums of y; all others meet the tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from phi2_kernels._dispatch import architecture, cdiv, on_its_device, tl, triton

COLUMNS = tl.constexpr(32)  # of int8, read as if they were a group; 16 bytes of int4 are 32 columns too


class MatmulLaunch(NamedTuple):
    """Rows of x, and outputs and columns of the weight, that a program takes at a time; its warps; how far it reads."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


# With two hundred rows a small tile is what makes programs enough; with many, cuBLAS multiplies. Of 128 columns the
# scales of int4 are wide enough to be copied ahead, as the codes are.
_LAUNCH = {
    "forward": MatmulLaunch(64, 64, 128, num_warps=4, num_stages=3),
    "backward": MatmulLaunch(64, 64, 128, num_warps=4, num_stages=3),
    "dense": MatmulLaunch(1, 16, 256, num_warps=4, num_stages=1),
}
LAUNCH = {80: {**_LAUNCH}, 90: {**_LAUNCH}}
FLOAT32 = MatmulLaunch(32, 32, 32, num_warps=4, num_stages=2)  # without tensor cores


@triton.jit
def _apart(tile):
    """The same numbers; what is before it stays with the threads that read the codes.

    Without this sum over one number Triton deals out the codes, byte by byte, as matrix instructions want them, and
    each is made half precision in several warps. Behind it they are so where they were read, once each and 16 bytes at
    a time, and are dealt out as half precision.
    """
    return tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1], 1)), axis=2)


@triton.jit
def _one_and_sixteenths(code_at_top_of_mantissa):
    """1 + code / 16 as a float32, put together from its bits."""
    return (code_at_top_of_mantissa | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _from_int8(code):
    """A float32, put together from its bits as 2^23 + 128 + code, since conversions are slow."""
    return ((code.to(tl.int32) & 0xFF) ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _tile(
    codes_ptr, codes_stride, scales_ptr, zeros_ptr, groups, n, start, N, K, dtype: tl.constexpr,
    SCALED: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows n of a weight from column `start` on; without SCALED int8 lacks its scale.  # [BLOCK_N, BLOCK_K]

    groups: of a row; as an argument, so that Triton knows what divides it.
    """
    BLOCK_G: tl.constexpr = BLOCK_K // GROUP
    PACKED: tl.constexpr = 1 if zeros_ptr is None else 2  # columns of a byte
    WIDTH: tl.constexpr = GROUP // PACKED
    rows = n.to(tl.int64)[:, None]
    g = start // GROUP + tl.arange(0, BLOCK_G)[None, :]
    columns = (g * WIDTH)[:, :, None] + tl.arange(0, WIDTH)[None, None, :]
    mask = (n < N)[:, None] & (g < groups)
    codes_mask = mask[:, :, None] if PACKED == 2 else (n < N)[:, None, None] & (columns < K)
    codes = tl.load(codes_ptr + (rows * codes_stride)[:, :, None] + columns, mask=codes_mask, other=0)
    if zeros_ptr is None:
        tile = _from_int8(codes)
        if SCALED:
            tile *= tl.load(scales_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None, None]
    else:
        scales = tl.load(scales_ptr + rows * groups + g, mask=mask, other=0.0).to(tl.float32)
        zeros = tl.load(zeros_ptr + rows * groups + g, mask=mask, other=0.0).to(tl.float32)
        slope, offset = (16.0 * scales)[:, :, None], (scales * (16.0 + zeros))[:, :, None]
        codes = codes.to(tl.int32)
        low = _one_and_sixteenths((codes & 0x0F) << 19) * slope - offset
        high = _one_and_sixteenths((codes & 0xF0) << 15) * slope - offset
        tile = tl.permute(tl.join(low, high), (0, 1, 3, 2))  # [BLOCK_N, BLOCK_G, 2, WIDTH]
    return _apart(tl.reshape(tile, (n.shape[0], BLOCK_K))).to(dtype)


@triton.jit(do_not_specialize=["M"])
def _forward_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr, x_stride, codes_stride, y_stride, groups, M, N, K,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Programs of one tile of the weight are neighbours: it is read from memory once."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        w = _tile(codes_ptr, codes_stride, scales_ptr, zeros_ptr, groups, n, start, N, K, dtype, False, GROUP, BLOCK_K)
        k = start + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptrs + k, mask=(m < M)[:, None] & (k < K), other=0.0).to(dtype)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if zeros_ptr is None:
        acc *= tl.load(scales_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(y_ptrs, acc, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _backward_kernel(
    dy_ptr, codes_ptr, scales_ptr, zeros_ptr, dx_ptr, dy_stride, codes_stride, dx_stride, groups, M, N, K,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    m, start = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_K
    dtype: tl.constexpr = tl.float32 if UPCAST else dy_ptr.dtype.element_ty
    dy_ptrs = dy_ptr + m.to(tl.int64)[:, None] * dy_stride
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        w = _tile(codes_ptr, codes_stride, scales_ptr, zeros_ptr, groups, n, start, N, K, dtype, True, GROUP, BLOCK_K)
        dy = tl.load(dy_ptrs + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0).to(dtype)
        acc = tl.dot(dy, w, acc, input_precision="ieee")
    k = start + tl.arange(0, BLOCK_K)[None, :]
    tl.store(dx_ptr + m.to(tl.int64)[:, None] * dx_stride + k, acc, mask=(m < M)[:, None] & (k < K))


@triton.jit
def _dense_kernel(
    codes_ptr, scales_ptr, zeros_ptr, weight_ptr, codes_stride, groups, N, K,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, start = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_K
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    w = _tile(codes_ptr, codes_stride, scales_ptr, zeros_ptr, groups, n, start, N, K, dtype, True, GROUP, BLOCK_K)
    k = start + tl.arange(0, BLOCK_K)[None, :]
    tl.store(weight_ptr + n.to(tl.int64)[:, None] * K + k, w, mask=(n < N)[:, None] & (k < K))


@on_its_device
def forward(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    """Writes y (M, N), which like x (M, K) and the codes may be a view with wider rows.

    Args:
        codes, scales, zeros, bias: see `weight_forms.Weight`.
    """
    M, N, K = len(x), len(codes), x.shape[1]
    options = _options("forward", x, codes, scales, zeros)
    grid = cdiv(M, options["BLOCK_M"]), cdiv(N, options["BLOCK_N"])
    strides = x.stride(0), codes.stride(0), y.stride(0), cdiv(K, options["GROUP"])
    _forward_kernel[grid](x, codes, scales, zeros, bias, y, *strides, M, N, K, **options)


@on_its_device
def backward(dy: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, dx: Tensor) -> None:
    """Writes dx (M, K), which like dy (M, N) and the codes may be a view with wider rows."""
    M, N, K = len(dy), len(codes), dx.shape[1]
    options = _options("backward", dy, codes, scales, zeros)
    grid = cdiv(M, options["BLOCK_M"]), cdiv(K, options["BLOCK_K"])
    strides = dy.stride(0), codes.stride(0), dx.stride(0), cdiv(K, options["GROUP"])
    _backward_kernel[grid](dy, codes, scales, zeros, dx, *strides, M, N, K, **options)


@on_its_device
def dense(codes: Tensor, scales: Tensor, zeros: Tensor | None, weight: Tensor) -> None:
    """Writes W (N, K), contiguous."""
    (N, K), launch, group = weight.shape, LAUNCH[architecture(codes.device)]["dense"], _group(codes, scales, zeros)
    grid = cdiv(N, launch.block_n), cdiv(K, launch.block_k)
    _dense_kernel[grid](
        codes, scales, zeros, weight, codes.stride(0), cdiv(K, group), N, K,
        GROUP=group, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k,
        num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def _group(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> int:
    return COLUMNS.value if zeros is None else 2 * codes.shape[1] // scales.shape[1]


def _options(key: str, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Any]:
    launch = FLOAT32 if x.element_size() == 4 else LAUNCH[architecture(x.device)][key]
    group = _group(codes, scales, zeros)
    return {
        "GROUP": group,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": max(launch.block_k, group),
        "UPCAST": not x.is_cuda,  # the interpreter multiplies bfloat16's bits as integers
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }
