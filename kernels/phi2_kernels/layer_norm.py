"""LayerNorm over the last dim; statistics and sums in float32 whatever the dtype.

    mean = sum_c x[c] / C        rstd = (sum_c (x[c] - mean)^2 / C + eps)^(-1/2)        n = (x - mean) rstd
    y = weight n + bias
    dx = rstd (g - sum_c g[c] / C - n sum_c (g n)[c] / C),  g = weight dy
    dweight = sum_rows dy n        dbias = sum_rows dy

The forward pass keeps x and two numbers a row. From these the normalised output can be made again, bit for bit, so that
a backward pass that needs y need not have kept it.

Dims: N rows, C columns (2560 in Phi-2).
Source: arXiv:1607.06450 Eq. 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import unsupported_layout, use_triton

MAX_COLUMNS = 8192  # a program of the kernels holds a whole row in its registers


def layer_norm_ref(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The formula above, in float32. Arguments and result as in `layer_norm`."""
    centred = x.float() - x.float().mean(dim=-1, keepdim=True)
    rstd = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (weight.float() * centred * rstd + bias.float()).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, impl: str = "auto") -> Tensor:
    """Rows of x with mean 0 and variance 1, scaled and shifted.

    Args:
        x: (..., C), its last dim contiguous.
        weight, bias: (C,).
        eps: added to the variance.
        impl: see `use_triton`.
    Returns:
        (..., C) in the dtype of x.
    Raises:
        ValueError: when weight and bias do not fit x, or when Triton was named and cannot run.
    """
    if not weight.shape == bias.shape == x.shape[-1:]:
        shapes = f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ValueError(f"weight and bias must be of shape {tuple(x.shape[-1:])}, {shapes}")
    if use_triton(impl, x, lambda: _unsupported_reason(x, weight, bias)):
        return _layer_norm(x.reshape(-1, x.shape[-1]), weight, bias, eps)[0].view(x.shape)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _unsupported_reason(x: Tensor, weight: Tensor, bias: Tensor) -> str:
    if not 0 < x.shape[-1] <= MAX_COLUMNS:
        return f"x must have 1 to {MAX_COLUMNS} columns, got {x.shape[-1]}"
    return unsupported_layout(x, x=x, weight=weight, bias=bias)


@custom_op("phi2::layer_norm", mutates_args=())
def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C) -> y (N, C), and mean and rstd (N,) in float32."""
    from phi2_kernels import layer_norm_triton

    y, mean, rstd = _new_outputs(x)
    layer_norm_triton.forward(x, weight, bias, eps, y, mean, rstd)
    return y, mean, rstd


def _new_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[0], dtype=torch.float32, device=x.device) for _ in range(2))
    return y, mean, rstd


@custom_op("phi2::layer_norm_backward", mutates_args=())
def _layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, sums: bool
) -> tuple[Tensor, Tensor]:
    """dx (N, C); dweight and dbias as (2, C) in float32, which is (2, 0) unless `sums` asks for them."""
    from phi2_kernels import layer_norm_triton

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, layer_norm_triton.backward(grad, x, weight, mean, rstd, dx, sums=sums)


@_layer_norm.register_fake
def _(x, weight, bias, eps):
    return _new_outputs(x)


@_layer_norm_backward.register_fake
def _(grad, x, weight, mean, rstd, sums):
    dweight_dbias = torch.empty((2, x.shape[1] if sums else 0), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dweight_dbias


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = bias.dtype


def _backward(ctx, grad: Tensor, *_) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    x, weight, mean, rstd = ctx.saved_tensors
    sums = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    dx, (dweight, dbias) = _layer_norm_backward(grad, x, weight, mean, rstd, sums)
    return dx, dweight.to(weight.dtype) if sums else None, dbias.to(ctx.bias_dtype) if sums else None, None


_layer_norm.register_autograd(_backward, setup_context=_setup_context)
