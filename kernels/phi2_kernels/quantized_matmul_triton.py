"""The Triton kernels of `quantized_matmul.py`: tiles of a weight are read as codes and made half precision on the chip.

A byte of int4 holds two columns half a group apart, so that a tile of bytes is two tiles of a weight: both meet their
own columns of x, or become their own columns of dx. Scales of int8 meet the sums of y; all others meet the tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from phi2_kernels._dispatch import architecture, on_its_device, tl, triton

COLUMNS = tl.constexpr(32)  # of int8, read as if they were a group; 16 bytes of int4 are 32 columns too


class MatmulLaunch(NamedTuple):
    """Rows of x, and outputs and columns of the weight, that a program takes at a time; its warps; how far it reads."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


FEW = 64  # rows whose product is the reading of the weight; there must be programs enough to read it
_FEW = MatmulLaunch(32, 16, 256, num_warps=4, num_stages=4)
_FLOAT32 = MatmulLaunch(32, 32, 32, num_warps=4, num_stages=2)
_DENSE = MatmulLaunch(1, 16, 256, num_warps=4, num_stages=1)
LAUNCH = {
    80: {
        "few rows": _FEW,
        "forward": MatmulLaunch(64, 128, 64, num_warps=4, num_stages=3),
        "backward": MatmulLaunch(64, 64, 128, num_warps=4, num_stages=3),
        "float32": _FLOAT32,
        "dense": _DENSE,
    },
    90: {
        "few rows": _FEW,
        "forward": MatmulLaunch(128, 128, 64, num_warps=8, num_stages=3),
        "backward": MatmulLaunch(128, 64, 128, num_warps=8, num_stages=3),
        "float32": _FLOAT32,
        "dense": _DENSE,
    },
}


@triton.jit
def _columns(start, i: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the columns of the i-th tile lie in the weight.  # [BLOCK_K / TILES]"""
    WIDTH: tl.constexpr = GROUP // TILES
    j = tl.arange(0, BLOCK_K // TILES)
    return start + j // WIDTH * GROUP + j % WIDTH + i * WIDTH


@triton.jit
def _apart(tile):
    """The same numbers; what it is made of stays as it was read.

    Without this sum over one number Triton lays the codes, byte by byte, as matrix instructions want a transposed
    operand. Behind it they are made half precision where they are, each once, and turned in shared memory.
    """
    return tl.sum(tile[:, :, :, None], axis=3)


@triton.jit
def _one_and_sixteenths(code_at_top_of_mantissa):
    """1 + code / 16 as a float32, put together from its bits."""
    return (code_at_top_of_mantissa | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _tiles(
    codes_ptr, codes_stride, scales_ptr, zeros_ptr, n, start, N, K, dtype: tl.constexpr,
    SCALED: tl.constexpr, APART: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows n of a weight from column `start` on: one tile of int8, two of int4.  # [BLOCK_N, BLOCK_K / tiles] each

    SCALED: int8 with its scale, which else is left to the caller.
    """
    TILES: tl.constexpr = 1 if zeros_ptr is None else 2
    WIDTH: tl.constexpr = GROUP // TILES  # bytes of a group
    BLOCK_G: tl.constexpr = BLOCK_K // GROUP
    rows, groups = n.to(tl.int64)[:, None], tl.cdiv(K, GROUP)
    g = start // GROUP + tl.arange(0, BLOCK_G)[None, :]
    i = tl.arange(0, WIDTH)[None, None, :]
    mask = (n < N)[:, None] & (g < groups)
    bytes_ = (g * WIDTH)[:, :, None] + i
    codes_mask = mask[:, :, None] & (bytes_ < K // TILES)
    codes = tl.load(codes_ptr + (rows * codes_stride)[:, :, None] + bytes_, mask=codes_mask, other=0)
    if zeros_ptr is None:
        tiles = (codes,)
        if SCALED:
            scales = tl.load(scales_ptr + n, mask=n < N, other=0.0).to(tl.float32)
            tiles = (codes.to(tl.float32) * scales[:, None, None],)
    else:
        scales = tl.load(scales_ptr + rows * groups + g, mask=mask, other=0.0).to(tl.float32)
        zeros = tl.load(zeros_ptr + rows * groups + g, mask=mask, other=0.0).to(tl.float32)
        slope, offset = (16.0 * scales)[:, :, None], (scales * (16.0 + zeros))[:, :, None]
        codes = codes.to(tl.int32)
        low, high = _one_and_sixteenths((codes & 0x0F) << 19), _one_and_sixteenths((codes & 0xF0) << 15)
        tiles = (low * slope - offset, high * slope - offset)
    made = ()
    for j in tl.static_range(TILES):
        tile = _apart(tiles[j]) if APART else tiles[j]
        made = made + (tl.reshape(tile.to(dtype), (n.shape[0], BLOCK_G * WIDTH)),)
    return made


@triton.jit(do_not_specialize=["M"])
def _forward_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, y_ptr, x_stride, codes_stride, y_stride, M, N, K,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Programs of one tile of the weight are neighbours: it is read from memory once."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    x_ptrs = x_ptr + m.to(tl.int64)[:, None] * x_stride
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        tiles = _tiles(
            codes_ptr, codes_stride, scales_ptr, zeros_ptr, n, start, N, K, dtype, False, False, GROUP, BLOCK_K
        )
        for i in tl.static_range(len(tiles)):
            k = _columns(start, i, len(tiles), GROUP, BLOCK_K)[None, :]
            x = tl.load(x_ptrs + k, mask=(m < M)[:, None] & (k < K), other=0.0).to(dtype)
            acc = tl.dot(x, tl.trans(tiles[i]), acc, input_precision="ieee")
    if zeros_ptr is None:
        acc *= tl.load(scales_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * y_stride + n[None, :]
    tl.store(y_ptrs, acc, mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def _backward_kernel(
    dy_ptr, codes_ptr, scales_ptr, zeros_ptr, dx_ptr, dy_stride, codes_stride, dx_stride, M, N, K,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    m, start = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_K
    dtype: tl.constexpr = tl.float32 if UPCAST else dy_ptr.dtype.element_ty
    TILES: tl.constexpr = 1 if zeros_ptr is None else 2
    dy_ptrs = dy_ptr + m.to(tl.int64)[:, None] * dy_stride
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_K // TILES), tl.float32),)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        dy = tl.load(dy_ptrs + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0).to(dtype)
        tiles = _tiles(
            codes_ptr, codes_stride, scales_ptr, zeros_ptr, n, start, N, K, dtype, True, True, GROUP, BLOCK_K
        )
        added = ()
        for i in tl.static_range(TILES):
            added = added + (tl.dot(dy, tiles[i], sums[i], input_precision="ieee"),)
        sums = added
    for i in tl.static_range(TILES):
        k = _columns(start, i, TILES, GROUP, BLOCK_K)[None, :]
        dx_ptrs = dx_ptr + m.to(tl.int64)[:, None] * dx_stride + k
        tl.store(dx_ptrs, sums[i], mask=(m < M)[:, None] & (k < K))


@triton.jit
def _dense_kernel(
    codes_ptr, scales_ptr, zeros_ptr, weight_ptr, codes_stride, N, K,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, start = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1) * BLOCK_K
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    tiles = _tiles(codes_ptr, codes_stride, scales_ptr, zeros_ptr, n, start, N, K, dtype, True, False, GROUP, BLOCK_K)
    for i in tl.static_range(len(tiles)):
        k = _columns(start, i, len(tiles), GROUP, BLOCK_K)[None, :]
        tl.store(weight_ptr + n.to(tl.int64)[:, None] * K + k, tiles[i], mask=(n < N)[:, None] & (k < K))


@on_its_device
def forward(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, y: Tensor) -> None:
    """Writes y (M, N), which like x (M, K) and the codes may be a view with wider rows.

    Args:
        codes, scales, zeros, bias: see `weight_forms.Weight`.
    """
    M, N, K = len(x), len(codes), x.shape[1]
    options = _options("few rows" if M <= FEW else "forward", x, codes, scales, zeros)
    grid = triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(N, options["BLOCK_N"])
    strides = x.stride(0), codes.stride(0), y.stride(0)
    _forward_kernel[grid](x, codes, scales, zeros, bias, y, *strides, M, N, K, **options)


@on_its_device
def backward(dy: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, dx: Tensor) -> None:
    """Writes dx (M, K), which like dy (M, N) and the codes may be a view with wider rows."""
    M, N, K = len(dy), len(codes), dx.shape[1]
    options = _options("backward", dy, codes, scales, zeros)
    grid = triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(K, options["BLOCK_K"])
    strides = dy.stride(0), codes.stride(0), dx.stride(0)
    _backward_kernel[grid](dy, codes, scales, zeros, dx, *strides, M, N, K, **options)


@on_its_device
def dense(codes: Tensor, scales: Tensor, zeros: Tensor | None, weight: Tensor) -> None:
    """Writes W (N, K), contiguous."""
    (N, K), launch = weight.shape, LAUNCH[architecture(codes.device)]["dense"]
    grid = triton.cdiv(N, launch.block_n), triton.cdiv(K, launch.block_k)
    _dense_kernel[grid](
        codes, scales, zeros, weight, codes.stride(0), N, K, GROUP=_group(codes, scales, zeros),
        BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, num_warps=launch.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def _group(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> int:
    return COLUMNS.value if zeros is None else 2 * codes.shape[1] // scales.shape[1]


def _options(key: str, x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Any]:
    launch = LAUNCH[architecture(x.device)][key if x.element_size() == 2 else "float32"]
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
