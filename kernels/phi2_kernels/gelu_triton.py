"""The Triton kernels of `gelu.py`: one pass forward, one pass backward, float32 inside.

A program takes BLOCK_N rows by BLOCK_F columns.
"""

from __future__ import annotations

from torch import Tensor

from phi2_kernels._dispatch import architecture, cdiv, on_its_device, tl, triton
from phi2_kernels.launch import Known, launch
from phi2_kernels.strided import strided

_TILE = {"BLOCK_N": 4, "BLOCK_F": 1024, "num_warps": 4}  # a thread holds 8 columns of 4 rows
_KERNELS = {"forward": _TILE, "backward": _TILE}
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


@triton.jit(do_not_specialize=["N"])
def _forward_kernel(x, y, N, F, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    z = tl.load(_tile_at(x, rows, cols), mask=mask, other=0.0).to(tl.float32)
    tl.store(_tile_at(y, rows, cols), gelu_tanh(z), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(grad, x, dx, N, F, AGAIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    rows = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    z = tl.load(_tile_at(x, rows, cols), mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(_tile_at(grad, rows, cols), mask=mask, other=0.0).to(tl.float32)
    t = _two_u(z)
    small = tl.exp(-tl.abs(t))
    large = 1.0 / (1.0 + small)
    s = tl.where(t < 0, small * large, large)  # and s (1 - s) is small * large^2, without a difference of near numbers
    slope = 1.5957691216057308 * (1.0 + 0.134145 * z * z)  # 2 du/dz
    tl.store(_tile_at(dx, rows, cols), dy * (s + z * small * large * large * slope), mask=mask)
    if AGAIN:
        tl.store(_tile_at(grad, rows, cols), z * s, mask=mask)


@on_its_device
def forward(x: Tensor, y: Tensor, known: Known | None = None) -> None:
    """Writes y (N, F), which like x may be a view with wider rows."""
    _launch(_forward_kernel, "forward", (x, y), {}, known)


@on_its_device
def backward(grad: Tensor, x: Tensor, dx: Tensor, *, again: bool = False, known: Known | None = None) -> None:
    """Writes dx (N, F), which like x may be a view with wider rows.

    Args:
        again: writes the output of the forward pass too, over grad, whose last dim is contiguous then.
    """
    assert not again or grad.stride(1) == 1
    grad = grad if grad.stride(1) == 1 else grad.contiguous()  # sum().backward() sends expanded scalars
    _launch(_backward_kernel, "backward", (grad, x, dx), {"AGAIN": again}, known)


def _launch(kernel, name: str, tensors: tuple[Tensor, ...], flags: dict[str, bool], known: Known | None) -> None:
    """Of tensors (N, F)."""
    N, F = tensors[0].shape
    if N and F:
        own = LAUNCH[architecture(tensors[0].device)][name]
        grid = cdiv(N, own["BLOCK_N"]), cdiv(F, own["BLOCK_F"]), 1
        arguments, place = (*map(strided, tensors), N, F), ("gelu", name, *flags.values())
        launch(kernel, grid, arguments, lambda: {**flags, **own, "enable_fp_fusion": True}, known, place)
