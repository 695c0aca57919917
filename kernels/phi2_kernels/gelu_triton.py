"""The Triton kernels of `gelu.py`: one pass forward, one pass backward, float32 inside.

A program takes BLOCK_N rows by BLOCK_F columns, or STEPS times as many rows where the bias gradient is wanted. That is
summed over a program's rows first and over the programs by torch, in a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi2_kernels._dispatch import architecture, on_its_device, tl, triton
from phi2_kernels.strided import strided

_TILE = {"BLOCK_N": 4, "BLOCK_F": 1024, "num_warps": 4}  # a thread holds 8 columns of 4 rows, and their bias
# A program's share of the bias gradient is 2% of the bytes it moves when it takes 64 rows; from 4 it would be 33%.
_KERNELS = {"forward": _TILE, "backward": _TILE | {"STEPS": 1}, "backward_sums": _TILE | {"STEPS": 16}}
LAUNCH = {80: _KERNELS, 90: _KERNELS}


@triton.jit
def _two_u(z):
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)  # 2 sqrt(2 / pi)


@triton.jit
def gelu_tanh(z):
    return z * tl.sigmoid(_two_u(z))


@triton.jit
def _tile_at(x, rows, cols):
    """Pointers.  # [BLOCK_N, BLOCK_F]"""
    return x.ptr + rows[:, None] * x.strides[0] + cols[None, :]


@triton.jit
def _load_z(x, bias_ptr, rows, cols, mask, F):
    """x + bias in float32.  # [BLOCK_N, BLOCK_F]"""
    z = tl.load(_tile_at(x, rows, cols), mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _forward_kernel(x, bias_ptr, y, N, F, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    z = _load_z(x, bias_ptr, rows, cols, mask, F)
    tl.store(_tile_at(y, rows, cols), gelu_tanh(z), mask=mask)


@triton.jit
def _backward_tile(grad, x, bias_ptr, dx, rows, cols, N, F):
    """Writes dx and returns it in float32.  # [BLOCK_N, BLOCK_F]"""
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    z = _load_z(x, bias_ptr, rows, cols, mask, F)
    dy = tl.load(_tile_at(grad, rows, cols), mask=mask, other=0.0).to(tl.float32)
    t = _two_u(z)
    small = tl.exp(-tl.abs(t))
    large = 1.0 / (1.0 + small)
    s = tl.where(t < 0, small * large, large)  # and s (1 - s) is small * large^2, without a difference of near numbers
    slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)  # 2 du/dz
    dz = dy * (s + z * small * large * large * slope)
    tl.store(_tile_at(dx, rows, cols), dz, mask=mask)
    return dz


@triton.jit
def _backward_kernel(
    grad, x, bias_ptr, dx, partial_ptr, N, F,
    SUMS: tl.constexpr, STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    dbias = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for step in range(STEPS):
        rows = (program * STEPS + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        dbias += _backward_tile(grad, x, bias_ptr, dx, rows, cols, N, F)
    if SUMS:
        tl.store(partial_ptr + program * F + cols, tl.sum(dbias, axis=0), mask=cols < F)


@on_its_device
def forward(x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes y (N, F), which like x may be a view with wider rows."""
    N, F = x.shape
    if x.numel() == 0:
        return
    launch = LAUNCH[architecture(x.device)]["forward"]
    grid = triton.cdiv(N, launch["BLOCK_N"]), triton.cdiv(F, launch["BLOCK_F"])
    _forward_kernel[grid](strided(x), bias, strided(y), N, F, **launch, enable_fp_fusion=True)


@on_its_device
def backward(grad: Tensor, x: Tensor, bias: Tensor | None, dx: Tensor, *, sums: bool) -> Tensor:
    """Writes dx (N, F) and returns dbias (F,) float32, empty unless `sums` asks for it."""
    N, F = x.shape
    if x.numel() == 0:
        return torch.zeros(F if sums else 0, dtype=torch.float32, device=x.device)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()  # sum().backward() sends expanded scalars
    launch = LAUNCH[architecture(x.device)]["backward_sums" if sums else "backward"]
    grid = triton.cdiv(N, launch["BLOCK_N"] * launch["STEPS"]), triton.cdiv(F, launch["BLOCK_F"])
    partial = torch.empty((grid[0] if sums else 0, F if sums else 0), dtype=torch.float32, device=x.device)
    tensors = strided(grad), strided(x), bias, strided(dx), partial
    _backward_kernel[grid](*tensors, N, F, SUMS=sums, **launch, enable_fp_fusion=True)
    return partial.sum(dim=0)
