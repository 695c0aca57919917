"""The Triton kernels of `gelu.py`: one pass forward, one pass backward, float32 inside.

A program takes BLOCK_N rows by BLOCK_F columns. The bias gradient is summed over a program's rows first and over the
programs by torch, in a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi2_kernels._dispatch import tl, triton

BLOCK_N, BLOCK_F = 16, 256
LAUNCH = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _sigmoid_of_2u(z):
    return tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))  # 2 sqrt(2 / pi)


@triton.jit
def _load_z(x_ptr, bias_ptr, rows, cols, stride, mask, F, HAS_BIAS: tl.constexpr):
    """x + bias in float32.  # [BLOCK_N, BLOCK_F]"""
    z = tl.load(x_ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _forward_kernel(
    x_ptr, bias_ptr, y_ptr, x_stride, y_stride, N, F,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    z = _load_z(x_ptr, bias_ptr, rows, cols, x_stride, mask, F, HAS_BIAS)
    tl.store(y_ptr + rows[:, None] * y_stride + cols[None, :], z * _sigmoid_of_2u(z), mask=mask)


@triton.jit
def _backward_kernel(
    grad_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, grad_stride, x_stride, dx_stride, N, F,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    z = _load_z(x_ptr, bias_ptr, rows, cols, x_stride, mask, F, HAS_BIAS)
    grad = tl.load(grad_ptr + rows[:, None] * grad_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    s = _sigmoid_of_2u(z)
    slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)  # 2 du/dz
    dx = grad * (s + z * s * (1.0 - s) * slope)
    tl.store(dx_ptr + rows[:, None] * dx_stride + cols[None, :], dx, mask=mask)
    if HAS_BIAS:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * F + cols, tl.sum(dx, axis=0), mask=cols < F)


def _grid(N: int, F: int) -> tuple[int, int]:
    return triton.cdiv(N, BLOCK_N), triton.cdiv(F, BLOCK_F)


def forward(x: Tensor, bias: Tensor | None, y: Tensor) -> None:
    """Writes y (N, F), which like x may be a view with wider rows."""
    N, F = x.shape
    if x.numel() == 0:
        return
    blocks = {"HAS_BIAS": bias is not None, "BLOCK_N": BLOCK_N, "BLOCK_F": BLOCK_F}
    _forward_kernel[_grid(N, F)](x, bias, y, x.stride(0), y.stride(0), N, F, **blocks, **LAUNCH)


def backward(grad: Tensor, x: Tensor, bias: Tensor | None, dx: Tensor) -> Tensor:
    """Writes dx (N, F) and returns dbias (F,) float32, empty without a bias."""
    N, F = x.shape
    if x.numel() == 0:
        return torch.zeros(0 if bias is None else F, dtype=torch.float32, device=x.device)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()  # sum().backward() sends expanded scalars
    grid = _grid(N, F)
    partial = torch.empty((grid[0], F if bias is not None else 0), dtype=torch.float32, device=x.device)
    blocks = {"HAS_BIAS": bias is not None, "BLOCK_N": BLOCK_N, "BLOCK_F": BLOCK_F}
    strides = grad.stride(0), x.stride(0), dx.stride(0)
    _backward_kernel[grid](grad, x, bias, dx, partial, *strides, N, F, **blocks, **LAUNCH)
    return partial.sum(dim=0)
