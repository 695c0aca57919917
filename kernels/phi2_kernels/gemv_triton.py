"""The Triton kernels of `gemv.py`: one x by several weights, and several products added up.

A program makes some outputs of one weight, for all rows of x. Between layers of a decode step nothing but the reading
of weights takes time, so that the fewer launches there are, the fewer beginnings and ends leave the memory idle.

`gemv_lanes_triton.py` multiplies one or two rows, `gemv_rows_triton.py` up to eight on tensor cores.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi2_kernels._dispatch import architecture, cdiv, on_its_device, power_of_2, tl, triton
from phi2_kernels.gelu_triton import gelu_tanh
from phi2_kernels.gemv_lanes_triton import lane_sums
from phi2_kernels.gemv_rows_triton import ROWS, row_sums


class GemvLaunch(NamedTuple):
    """Columns and rows of the weight that a program reads at a time, its warps, and how far it reads ahead."""

    columns: int
    rows: int
    num_warps: int
    num_stages: int


# With one row of x: rows of the weight become fewer with more, that accumulators fit. Out of a layer, 2560 outputs are
# 19 a multiprocessor, and a round reads 512 columns of each: in half precision 19 KB, where an H100 or H200 needs 18 to
# 22 on their way to hide its latency, and an A100 10 to 13. int8 reads 1024, which is as much; int4 with its 16
# instructions a byte waits for arithmetic.
_LANES = {
    "half": GemvLaunch(512, 8, num_warps=4, num_stages=1),
    "int8": GemvLaunch(1024, 4, num_warps=4, num_stages=1),
    "int4": GemvLaunch(512, 8, num_warps=4, num_stages=1),
}
_ROWS = {
    "half rows": GemvLaunch(256, 16, num_warps=4, num_stages=3),
    "int8 rows": GemvLaunch(256, 16, num_warps=4, num_stages=3),
    "int4 rows": GemvLaunch(256, 16, num_warps=8, num_stages=1),
}
LAUNCH = {80: _LANES | _ROWS, 90: _LANES | _ROWS}


@triton.jit
def _sums(
    x_ptr, x_stride, codes_ptr, codes_stride, scales_ptr, zeros_ptr, n, N, K, x_rows,
    M: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows n of a weight times all rows of x, in one tile of ROWS or in M of one.  # [BLOCK_N, ROWS or 1]"""
    if PARTS > 0:
        sums = row_sums(
            x_ptr, x_stride, codes_ptr, codes_stride, scales_ptr, zeros_ptr, n, N, K, x_rows,
            GROUP, BLOCK_N, BLOCK_K, PARTS, UPCAST,
        )  # fmt: skip
    else:
        sums = lane_sums(
            x_ptr, x_stride, codes_ptr, codes_stride, scales_ptr, zeros_ptr, n, N, K, M, GROUP, BLOCK_N, BLOCK_K
        )
    return sums


@triton.jit
def _at(pointers, i: tl.constexpr):
    """The i-th of what may be missing altogether."""
    if pointers is None:
        pointer = None
    else:
        pointer = pointers[i]
    return pointer


@triton.jit
def _add_bias(sums, bias_ptr, n, N):
    """The same number to all rows of x."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        added = ()
        for i in tl.static_range(len(sums)):
            added = added + (sums[i] + bias,)
        sums = added
    return sums


@triton.jit(do_not_specialize=["x_rows"])
def _each_kernel(
    x_ptr, codes, scales, zeros, biases, ys, x_stride, codes_strides, y_strides, sizes, K, x_rows,
    GELU: tl.constexpr, M: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Programs are dealt out to the weights in turn."""
    block = tl.program_id(0)
    for i in tl.static_range(len(codes)):
        N = sizes[i]
        blocks = tl.cdiv(N, BLOCK_N)
        if (block >= 0) & (block < blocks):
            n = block * BLOCK_N + tl.arange(0, BLOCK_N)
            sums = _sums(
                x_ptr, x_stride, codes[i], codes_strides[i], _at(scales, i), _at(zeros, i), n, N, K, x_rows,
                M, GROUP, BLOCK_N, BLOCK_K, PARTS, UPCAST,
            )  # fmt: skip
            sums = _add_bias(sums, _at(biases, i), n, N)
            for j in tl.static_range(len(sums)):
                y = sums[j]
                if GELU and i == len(codes) - 1:
                    y = gelu_tanh(y)
                m = j + tl.arange(0, y.shape[1])
                mask = (n < N)[:, None] & (m < x_rows)[None, :]
                tl.store(ys[i] + m[None, :] * y_strides[i] + n[:, None], y, mask=mask)
        block -= blocks


@triton.jit(do_not_specialize=["x_rows"])
def _sum_kernel(
    xs, codes, scales, zeros, biases, skip_ptr, y_ptr, x_strides, codes_strides, skip_stride, y_stride, depths, N,
    x_rows,
    M: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = ()
    for i in tl.static_range(len(codes)):
        sums = _sums(
            xs[i], x_strides[i], codes[i], codes_strides[i], _at(scales, i), _at(zeros, i), n, N, depths[i], x_rows,
            M, GROUP, BLOCK_N, BLOCK_K, PARTS, UPCAST,
        )  # fmt: skip
        sums = _add_bias(sums, _at(biases, i), n, N)
        added = ()
        for j in tl.static_range(len(sums)):
            added = added + (sums[j] if i == 0 else sums[j] + total[j],)
        total = added
    for j in tl.static_range(len(total)):
        m = j + tl.arange(0, total[j].shape[1])
        mask = (n < N)[:, None] & (m < x_rows)[None, :]
        skip = tl.load(skip_ptr + m[None, :] * skip_stride + n[:, None], mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + m[None, :] * y_stride + n[:, None], total[j] + skip, mask=mask)


def takes_tensor_cores(x: Tensor, codes: Tensor, group: int) -> bool:
    """Whether they multiply x (M, K) by a weight exactly, and are worth it; a group must fill an instruction."""
    is_exact = codes.dtype in (x.dtype, torch.int8, torch.uint8)
    return 2 < x.shape[0] <= ROWS and x.dtype != torch.float32 and is_exact and (group == 0 or group >= 32)


@on_its_device
def each(
    x: Tensor, codes: list[Tensor], scales: list[Tensor], zeros: list[Tensor], biases: list[Tensor], gelu_last: bool,
    ys: list[Tensor],
) -> None:  # fmt: skip
    """Writes each y (M, N), which like x (M, K) and the codes may be a view with wider rows.

    Args:
        codes, scales, zeros, biases: see `gemv.Weight`; a list is empty where the weights have none of it.
        gelu_last: the last y goes through GELU.
    """
    (M, K), sizes = x.shape, [len(code) for code in codes]
    if M == 0:
        return
    options = _options(x, codes[0], scales, zeros)
    programs = sum(cdiv(N, options["BLOCK_N"]) for N in sizes)
    if programs:
        tensors = x, tuple(codes), *map(_given, (scales, zeros, biases)), tuple(ys)
        strides = x.stride(0), _strides(codes), _strides(ys)
        _each_kernel[(programs,)](*tensors, *strides, tuple(sizes), K, M, GELU=gelu_last, **options)


@on_its_device
def summed(
    skip: Tensor, xs: list[Tensor], codes: list[Tensor], scales: list[Tensor], zeros: list[Tensor],
    biases: list[Tensor], y: Tensor,
) -> None:  # fmt: skip
    """Writes y = skip + the products (M, N), which like skip, the xs and the codes may be a view with wider rows."""
    if y.numel() == 0:
        return
    options = _options(xs[0], codes[0], scales, zeros)
    tensors = tuple(xs), tuple(codes), *map(_given, (scales, zeros, biases)), skip, y
    strides = _strides(xs), _strides(codes), skip.stride(0), y.stride(0)
    depths, N = tuple(x.shape[1] for x in xs), y.shape[1]
    _sum_kernel[(cdiv(N, options["BLOCK_N"]),)](*tensors, *strides, depths, N, len(y), **options)


def _given(tensors: list[Tensor]) -> tuple[Tensor, ...] | None:
    return tuple(tensors) or None


def _strides(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(tensor.stride(0) for tensor in tensors)


def _options(x: Tensor, codes: Tensor, scales: list[Tensor], zeros: list[Tensor]) -> dict[str, Any]:
    """Of a launch: all its weights have one form."""
    group = 2 * codes.shape[1] // scales[0].shape[1] if zeros else 0
    form = "int4" if zeros else "int8" if scales else "half"
    on_tensor_cores = takes_tensor_cores(x, codes, group)
    M = ROWS.value if on_tensor_cores else x.shape[0]
    launch = LAUNCH[architecture(x.device)][f"{form} rows" if on_tensor_cores else form]
    return {
        "M": M,  # on tensor cores one variant serves all numbers of rows
        "GROUP": group,
        "BLOCK_N": launch.rows if on_tensor_cores else max(2, launch.rows // power_of_2(M)),
        "BLOCK_K": launch.columns,
        "PARTS": launch.num_warps if on_tensor_cores else 0,
        "UPCAST": not x.is_cuda,  # the interpreter multiplies bfloat16's bits as integers
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "enable_fp_fusion": True,
    }
