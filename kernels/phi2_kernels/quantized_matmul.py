"""Products of any number of rows with a quantised weight W (N, K), int8 or int4, that is read as it is kept.

    quantized_matmul             y = x W^T + bias
    quantized_matmul_backward    dx = dy W
    dense                        W

Tiles of codes become half precision on the chip, where tensor cores multiply them: of a weight nothing else is ever in
memory. With very many rows a tile is unpacked over and over, and the matmuls of cuBLAS are faster than ours: from
`DENSE_FROM` rows on one weight at a time is written in the dtype of x and multiplied there. That moves four bytes a
weight more, which takes as long as 310 rows of its product on an A100 (2.0 TB/s, 312 TFLOP/s) and 590 on an H100
(3.35 TB/s, 989 TFLOP/s). At 512 rows that is what ours loses at 0.62 of cuBLAS's speed on the one, 0.46 on the other.

`gemv.py` has the products of few rows.

Dims: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import use_triton
from phi2_kernels.weight_forms import Weight, check_product, unsupported_weight

DENSE_FROM = 512  # rows
Product = Callable[[Tensor, Weight], Tensor]


def quantized_matmul_ref(x: Tensor, weight: Weight) -> Tensor:
    """x W^T + bias in float32. Shapes and result as in `quantized_matmul`."""
    y = x.float() @ weight.dense().T
    return (y if weight.bias is None else y + weight.bias.float()).to(x.dtype)


def quantized_matmul(x: Tensor, weight: Weight, *, impl: str = "auto") -> Tensor:
    """x W^T + bias, accumulated in float32 and rounded once. Has no gradient: `quantized_matmul_backward`.

    Args:
        x: (..., K).
        weight: (N, K), int8 or int4.
        impl: see `use_triton`.
    Returns:
        (..., N) in the dtype of x.
    Raises:
        ValueError: when shapes do not agree, or when Triton was named and cannot run.
    """
    check_product(x, weight)
    rows = _rows(x)
    if use_triton(impl, x, lambda: unsupported_weight(rows, rows, weight)):
        y = _quantized_matmul(rows, *_parts(weight), weight.bias)
    else:
        y = _product(rows, weight)
    return y.view(*x.shape[:-1], y.shape[1])


def quantized_matmul_backward(dy: Tensor, weight: Weight, *, impl: str = "auto") -> Tensor:
    """The gradient of x, (..., K), of dy (..., N); arguments and errors as of `quantized_matmul`."""
    (N, K), rows = weight.shape, _rows(dy)
    if dy.shape[-1] != N:
        raise ValueError(f"dy must have {N} columns, as the weight has rows, got {dy.shape[-1]}")
    if use_triton(impl, dy, lambda: unsupported_weight(rows, rows, weight)):
        dx = _quantized_matmul_backward(rows, *_parts(weight))
    else:
        dx = rows @ weight.dense().to(dy.dtype)
    return dx.view(*dy.shape[:-1], K)


def dense(weight: Weight, dtype: torch.dtype, *, impl: str = "auto") -> Tensor:
    """W (N, K): itself, or of codes in a dtype, on a GPU without another copy. For what must have it whole."""
    if weight.scales is None:
        return weight.codes
    if use_triton(impl, weight.scales, lambda: unsupported_weight(weight.codes, weight.codes, weight)):
        return _dense(dtype, weight)
    return weight.dense().to(dtype)


def _rows(x: Tensor) -> Tensor:
    """(M, columns), each row in one piece; gradients of sums have no strides."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _parts(weight: Weight) -> tuple[Tensor, Tensor, Tensor | None]:
    assert weight.scales is not None
    return weight.codes, weight.scales, weight.zeros


def _product(x: Tensor, weight: Weight) -> Tensor:
    """x (M, K) -> (M, N) in torch. On a CPU its packed kernel takes int8 in bfloat16 only."""
    codes, scales, _, bias = weight
    packs = x.device.type == "cpu" and codes.dtype == torch.int8 and x.dtype == torch.bfloat16
    if packs and scales is not None and scales.dtype == x.dtype and x.shape[1] % 16 == 0:
        y = torch._weight_int8pack_mm(x.contiguous(), codes, scales)
        return y if bias is None else y + bias
    return F.linear(x, weight.dense().to(x.dtype), bias)


@custom_op("phi2::quantized_matmul", mutates_args=())
def _quantized_matmul(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N)."""
    return _either_way(
        x, Weight(codes, scales, zeros, bias), _tiled, lambda x, w: F.linear(x, _dense(x.dtype, w), w.bias)
    )


@_quantized_matmul.register_fake
def _(x, codes, scales, zeros, bias):
    return x.new_empty(len(x), len(codes))


@custom_op("phi2::quantized_matmul_backward", mutates_args=())
def _quantized_matmul_backward(dy: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """dy (M, N) -> (M, K)."""
    return _either_way(dy, Weight(codes, scales, zeros), _tiled_backward, lambda dy, w: dy @ _dense(dy.dtype, w))


@_quantized_matmul_backward.register_fake
def _(dy, codes, scales, zeros):
    return dy.new_empty(len(dy), Weight(codes, scales, zeros).shape[1])


_COMPILED: set[tuple] = set()  # products, devices, dtypes and forms


def _either_way(x: Tensor, weight: Weight, tiled: Product, whole: Product) -> Tensor:
    """The product by tiles, or with the whole weight. The first of a form goes both ways: none is compiled later."""
    way, other = (whole, tiled) if len(x) >= DENSE_FROM else (tiled, whole)
    form = tiled, x.device, x.dtype, weight.codes.dtype, weight.group
    if form not in _COMPILED:
        _COMPILED.add(form)
        other(x[:1], weight)
    return way(x, weight)


def _tiled(x: Tensor, weight: Weight) -> Tensor:
    from phi2_kernels import quantized_matmul_triton

    y = x.new_empty(len(x), weight.shape[0])
    if y.numel():
        quantized_matmul_triton.forward(x, *weight, y)
    return y


def _tiled_backward(dy: Tensor, weight: Weight) -> Tensor:
    from phi2_kernels import quantized_matmul_triton

    dx = dy.new_empty(len(dy), weight.shape[1])
    if dx.numel():
        quantized_matmul_triton.backward(dy, *weight[:3], dx)
    return dx


def _dense(dtype: torch.dtype, weight: Weight) -> Tensor:
    from phi2_kernels import quantized_matmul_triton

    whole = torch.empty(weight.shape, dtype=dtype, device=weight.codes.device)
    quantized_matmul_triton.dense(*weight[:3], whole)
    return whole
