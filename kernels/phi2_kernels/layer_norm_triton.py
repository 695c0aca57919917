"""The Triton kernels of `layer_norm.py`: each row is read once, forward and backward.

A program holds a row in its registers, in two pieces of a power of two each: 2560 columns are 2048 + 512, where one
piece of 4096 would leave three lanes in eight idle. Where sums over rows are wanted, a program takes one row in
hundreds and keeps its own sums; torch adds up those of the programs, in a fixed order: the same input gives the same
bits. What the forward pass gave can be written again on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi2_kernels._dispatch import architecture, on_its_device, power_of_2, tl, triton
from phi2_kernels.launch import Known, launch
from phi2_kernels.strided import strided

MULTIPROCESSORS = {80: 108, 90: 132}  # of which each holds four programs that sum over rows, three that write y again
# For rows of up to 4096 columns, and twice the warps for wider ones. With two warps a thread reads 16 bytes at a time
# of both pieces of 2560, and a row takes the fewest instructions; the sums over rows need the registers of four.
_ROW = {"forward": {"num_warps": 2}, "backward": {"num_warps": 2}, "backward_sums": {"num_warps": 4}}
LAUNCH = {80: _ROW, 90: _ROW}


@triton.jit
def _load_row(ptr, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    """The first C1 columns of a row and the others, in float32; zeros behind its end.  # [C1], [C2]"""
    tail = C1 + tl.arange(0, C2)
    head = tl.load(ptr + tl.arange(0, C1))
    return head.to(tl.float32), tl.load(ptr + tail, mask=tail < C, other=0.0).to(tl.float32)


@triton.jit
def _store_row(ptr, head, tail, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    cols = C1 + tl.arange(0, C2)
    tl.store(ptr + tl.arange(0, C1), head)
    tl.store(ptr + cols, tail, mask=cols < C)


@triton.jit
def _mean(head, tail, C: tl.constexpr):
    return (tl.sum(head, axis=0) + tl.sum(tail, axis=0)) / C


@triton.jit
def _forward_kernel(
    x, weight_ptr, bias_ptr, y, mean_ptr, rstd_ptr, eps, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x1, x2 = _load_row(x.ptr + row * x.strides[0], C, C1, C2)
    mean = _mean(x1, x2, C)
    c1, c2 = x1 - mean, tl.where(C1 + tl.arange(0, C2) < C, x2 - mean, 0.0)
    rstd = tl.rsqrt(_mean(c1 * c1, c2 * c2, C) + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)
    w1, w2 = _load_row(weight_ptr, C, C1, C2)
    _store_affine((x1 - mean) * rstd, (x2 - mean) * rstd, w1, w2, bias_ptr, y, row, C, C1, C2)


@triton.jit
def _store_affine(n1, n2, w1, w2, bias_ptr, y, row, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr):
    """y = n weight + bias, of one row."""
    b1, b2 = _load_row(bias_ptr, C, C1, C2)
    _store_row(y.ptr + row * y.strides[0], n1 * w1 + b1, n2 * w2 + b2, C, C1, C2)


@triton.jit
def _backward_row(
    grad, x, mean_ptr, rstd_ptr, dx, skip, again, row, w1, w2, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr
):  # fmt: skip
    """Writes dx of one row, and y again, and returns what it adds to dweight and dbias, each in two pieces."""
    x1, x2 = _load_row(x.ptr + row * x.strides[0], C, C1, C2)
    d1, d2 = _load_row(grad.ptr + row * grad.strides[0], C, C1, C2)
    mean, rstd = tl.load(mean_ptr + row), tl.load(rstd_ptr + row)
    n1, n2 = (x1 - mean) * rstd, (x2 - mean) * rstd
    if again is not None:
        _store_affine(n1, n2, w1, w2, again[0], again[1], row, C, C1, C2)
    g1, g2 = d1 * w1, d2 * w2
    along, flat = _mean(g1 * n1, g2 * n2, C), _mean(g1, g2, C)
    dx1, dx2 = rstd * (g1 - flat - n1 * along), rstd * (g2 - flat - n2 * along)
    if skip is not None:
        s1, s2 = _load_row(skip.ptr + row * skip.strides[0], C, C1, C2)
        dx1, dx2 = dx1 + s1, dx2 + s2
    _store_row(dx.ptr + row * dx.strides[0], dx1, dx2, C, C1, C2)
    return d1 * n1, d2 * n2, d1, d2


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    grad, x, weight_ptr, mean_ptr, rstd_ptr, dx, skip, again, dweight_ptr, dbias_ptr, N,
    SUMS: tl.constexpr, C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    w1, w2 = _load_row(weight_ptr, C, C1, C2)
    dw1, db1 = tl.zeros([C1], tl.float32), tl.zeros([C1], tl.float32)
    dw2, db2 = tl.zeros([C2], tl.float32), tl.zeros([C2], tl.float32)
    for row in range(program, N, tl.num_programs(0)):
        more = _backward_row(grad, x, mean_ptr, rstd_ptr, dx, skip, again, row, w1, w2, C, C1, C2)
        dw1, dw2, db1, db2 = dw1 + more[0], dw2 + more[1], db1 + more[2], db2 + more[3]
    if SUMS:
        _store_row(dweight_ptr + program * C, dw1, dw2, C, C1, C2)
        _store_row(dbias_ptr + program * C, db1, db2, C, C1, C2)


def _pieces(C: int) -> dict[str, int]:
    """The row and its cut. The first piece is always full."""
    first = max(1, power_of_2(C) // 2)
    return {"C": C, "C1": first, "C2": power_of_2(max(1, C - first))}


def _constants(x: Tensor, kernel: str) -> dict[str, int | bool]:
    C = x.shape[1]
    warps = LAUNCH[architecture(x.device)][kernel]["num_warps"] * (1 if C <= 4096 else 2)
    return _pieces(C) | {"num_warps": warps, "enable_fp_fusion": True}


@on_its_device
def forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, y: Tensor, mean: Tensor, rstd: Tensor,
    known: Known | None = None,
) -> None:  # fmt: skip
    """Writes y (N, C), which like x may be a view with wider rows, and mean and rstd (N,)."""
    if rows := x.shape[0]:
        launch(
            _forward_kernel, (rows, 1, 1), (strided(x), weight, bias, strided(y), mean, rstd, eps),
            lambda: _constants(x, "forward"), known, "norm",
        )  # fmt: skip


@on_its_device
def backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, dx: Tensor,
    skip: Tensor | None = None, again: tuple[Tensor, Tensor] | None = None, *, sums: bool, known: Known | None = None,
) -> Tensor:  # fmt: skip
    """Writes dx (N, C), which like grad and x may be a view with wider rows.

    Args:
        skip: (N, C) added to dx: the gradient that came past the LayerNorm, along the residual stream.
        again: the bias and a y (N, C), which is written bit for bit as by `forward`.
        sums: whether dweight and dbias are wanted.
    Returns:
        dweight and dbias, (2, C) float32; (2, 0) unless they are wanted.
    """
    N, C = x.shape
    if N == 0:
        return torch.zeros((2, C if sums else 0), dtype=torch.float32, device=x.device)
    grad = grad if grad.stride(1) == 1 else grad.contiguous()  # sum().backward() sends expanded scalars
    most = MULTIPROCESSORS[architecture(x.device)] * (4 if again is None else 3)
    programs = min(N, most) if sums else N
    partial = torch.empty((2, programs, C), dtype=torch.float32, device=x.device) if sums else None
    past, made = None if skip is None else strided(skip), None if again is None else (again[0], strided(again[1]))
    own = (None, None) if partial is None else partial
    launch(
        _backward_kernel, (programs, 1, 1),
        (strided(grad), strided(x), weight, mean, rstd, strided(dx), past, made, *own, N),
        lambda: {"SUMS": sums} | _constants(x, "backward_sums" if sums else "backward"),
        known, ("norm backward", sums, again is None),
    )  # fmt: skip
    return x.new_empty((2, 0), dtype=torch.float32) if partial is None else partial.sum(dim=1)
