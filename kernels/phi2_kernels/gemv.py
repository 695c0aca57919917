"""Products of a few rows with a weight, as a decode step has them: y = x W^T + bias, with W in one of three forms.

    gemv        W[n, k], floating point
    gemv_int8   W[n, k] = scale[n] code[n, k]                             code in -127..127
    gemv_int4   W[n, k] = scale[n, g] (code[n, k] - zero[n, g])           g = k // G, code in 0..15
                packed[n, g G/2 + i] = code[n, g G + i] + 16 code[n, g G + G/2 + i]       i < G/2

A byte of the last holds columns half a group apart, so that both nibbles of neighbouring bytes meet neighbouring x.
The time taken is that of reading the weight. There are no gradients.

Dims: M rows, N outputs, K inputs, G neighbouring columns of a row that share a scale.
Source: arXiv:2210.17323 section 4 for grouped 4-bit weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import FLOATS, layout_obstacle, use_triton

MAX_ROWS = 8  # more are a matmul for tensor cores


def gemv_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in float32. Arguments and result as in `gemv`."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x W^T + bias for a few rows, accumulated in float32.

    Args:
        x: (..., K); the kernels take at most `MAX_ROWS` rows.
        weight: (N, K), as `nn.Linear` keeps it.
        bias: (N,) or None.
        impl: see `use_triton`.
    Returns:
        (..., N) in the dtype of x.
    Raises:
        ValueError: when shapes do not agree, or when Triton was named and cannot run.
    """
    N, K = weight.shape
    _check_matmul(x, N, K, bias)
    if use_triton(impl, x, lambda: _weight_obstacle(weight) or _matmul_obstacle(x, weight=weight, bias=bias)):
        return _gemv(x.reshape(-1, K), weight, None, bias).view(*x.shape[:-1], N)
    return F.linear(x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; by `gemv` where rows are few and nobody asks for a gradient, as in a decode step."""
    if torch.is_grad_enabled() or x.numel() > MAX_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    return gemv(x, weight, bias)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (N, K) in 8 bits: codes (N, K) int8, and the scale (N,) of each row in the dtype of the weight."""
    w = weight.to(torch.float32, copy=True)
    largest = torch.linalg.vector_norm(w, ord=torch.inf, dim=1)
    scale = torch.where(largest > 0, largest / 127, 1.0).to(weight.dtype)
    # Codes are found with the scale as it is kept, so that its rounding is not an error of the weight.
    return w.div_(scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """The weight (N, K) in float32 that codes and scale stand for."""
    return codes.float() * scale.float()[:, None]


def gemv_int8(
    x: Tensor, weight_int8: Tensor, scale: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """`gemv` with a weight (N, K) int8 and a scale (N,) for each of its rows, as `quantize_int8` gives them."""
    N, K = weight_int8.shape
    _check_matmul(x, N, K, bias)
    _check_weight(scale=(scale, (N,)))
    if use_triton(impl, x, lambda: _matmul_obstacle(x, weight_int8=weight_int8, scale=scale, bias=bias)):
        return _gemv(x.reshape(-1, K), weight_int8, scale, bias).view(*x.shape[:-1], N)
    if x.device.type == "cpu" and x.dtype == scale.dtype == torch.bfloat16 and K % 16 == 0:  # all its kernel takes
        y = torch._weight_int8pack_mm(x.reshape(-1, K).contiguous(), weight_int8, scale).view(*x.shape[:-1], N)
        return y if bias is None else y + bias
    return F.linear(x, dequantize_int8(weight_int8, scale).to(x.dtype), bias)


@custom_op("phi2::gemv", mutates_args=())
def _gemv(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N)."""
    from phi2_kernels import gemv_rows_triton, gemv_triton

    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    kernels = gemv_rows_triton if gemv_rows_triton.takes(x, weight) else gemv_triton
    kernels.gemv(x, weight, scale, bias, y)
    return y


@_gemv.register_fake
def _(x, weight, scale, bias):
    return torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)


def quantize_int4(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (N, K) in 4 bits, each group of a row over its own range.

    Args:
        weight: (N, K) floating point.
        group: G, even; it must divide K.
    Returns:
        packed (N, K/2) uint8, scales and zeros (N, K/G) in the dtype of the weight.
    Raises:
        ValueError: when the group does not divide K.
    """
    N, K = weight.shape
    _check_group(K, group)
    w = weight.to(torch.float32, copy=True).view(N, K // group, group)
    low, high = w.amin(dim=-1).clamp(max=0.0), w.amax(dim=-1).clamp(min=0.0)
    scales = ((high - low) / 15).to(weight.dtype)
    scales = torch.where(scales > 0, scales, 1.0)
    zeros = (-low / scales.float()).to(weight.dtype)
    # Codes are found with the scales and zeros as they are kept, so that their rounding is not an error of the weight.
    w.div_(scales.float()[..., None]).add_(zeros.float()[..., None])
    codes = w.round_().clamp_(0, 15).to(torch.uint8)
    first, second = codes.chunk(2, dim=-1)
    return (first | second << 4).view(N, K // 2), scales, zeros


def unpack_int4(packed: Tensor, group: int = 32) -> Tensor:
    """The codes (N, K/G, G) uint8, in the order of the weight's columns."""
    halves = packed.view(packed.shape[0], -1, group // 2)
    return torch.cat((halves & 15, halves >> 4), dim=-1)


def dequantize_int4(packed: Tensor, scales: Tensor, zeros: Tensor, group: int = 32) -> Tensor:
    """The weight (N, K) in float32 that the three stand for."""
    codes = unpack_int4(packed, group).float()
    return (scales.float()[..., None] * (codes - zeros.float()[..., None])).flatten(1)


def gemv_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None = None,
    group: int = 32,
    *,
    impl: str = "auto",
) -> Tensor:
    """`gemv` with a weight in the form that `quantize_int4` gives."""
    N, K = packed.shape[0], 2 * packed.shape[1]
    _check_matmul(x, N, K, bias)
    _check_group(K, group)
    _check_weight(scales=(scales, (N, K // group)), zeros=(zeros, (N, K // group)))
    tensors = dict(packed=packed, scales=scales, zeros=zeros, bias=bias)
    if use_triton(impl, x, lambda: _group_obstacle(group) or _matmul_obstacle(x, **tensors)):
        return _gemv_int4(x.reshape(-1, K), packed, scales, zeros, bias, group).view(*x.shape[:-1], N)
    return F.linear(x, dequantize_int4(packed, scales, zeros, group).to(x.dtype), bias)


@custom_op("phi2::gemv_int4", mutates_args=())
def _gemv_int4(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """x (M, K) -> (M, N)."""
    from phi2_kernels import gemv_rows_triton, gemv_triton

    y = torch.empty((x.shape[0], packed.shape[0]), dtype=x.dtype, device=x.device)
    kernels = gemv_rows_triton if gemv_rows_triton.takes(x, packed, group) else gemv_triton
    kernels.gemv_int4(x, packed, scales, zeros, bias, group, y)
    return y


@_gemv_int4.register_fake
def _(x, packed, scales, zeros, bias, group):
    return torch.empty((x.shape[0], packed.shape[0]), dtype=x.dtype, device=x.device)


def _check_matmul(x: Tensor, N: int, K: int, bias: Tensor | None) -> None:
    if x.shape[-1] != K:
        raise ValueError(f"x must have {K} columns, as the weight has, got {x.shape[-1]}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be of shape ({N},), got {tuple(bias.shape)}")


def _check_weight(**parts: tuple[Tensor, tuple[int, ...]]) -> None:
    for name, (x, shape) in parts.items():
        if x.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {tuple(x.shape)}")


def _check_group(K: int, group: int) -> None:
    if group < 2 or group % 2 or K % group:
        raise ValueError(f"group must be even and divide the {K} columns of the weight, got {group}")


def _weight_obstacle(weight: Tensor) -> str:
    return "" if weight.dtype in FLOATS else f"weight must be floating point, got {weight.dtype}"


def _group_obstacle(group: int) -> str:
    return "" if group in (16, 32, 64, 128, 256) else f"group must be a power of two from 16 to 256, got {group}"


def _matmul_obstacle(x: Tensor, **tensors: Tensor | None) -> str:
    rows = x.shape[:-1].numel()
    if rows > MAX_ROWS:
        return f"x must have at most {MAX_ROWS} rows, got {rows}"
    return layout_obstacle(x, x=x, **tensors)
