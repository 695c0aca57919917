"""GELU by its tanh approximation, of a matmul's result and its bias.

    z = x + bias        u = sqrt(2 / pi) (z + 0.044715 z^3)        y = z (1 + tanh u) / 2 = z sigmoid(2 u)
    dy/dz = s + 2 z s (1 - s) du/dz,  s = sigmoid(2 u)             dbias = column sums of dz

The backward pass computes everything from x again: nothing but the matmul's own result is kept.

Dims: N rows, F columns (10240 in Phi-2).
Source: arXiv:1606.08415 section 2; `NewGELUActivation` of transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import unsupported_layout, use_triton


def gelu_ref(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The formula above, in float32. Arguments and result as in `gelu`."""
    z = x.float() if bias is None else x.float() + bias.float()
    u = (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    return (0.5 * z * (1 + torch.tanh(u))).to(x.dtype)


def gelu(x: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """GELU of x + bias.

    Args:
        x: (..., F), its last dim contiguous.
        bias: (F,) or None.
        impl: see `use_triton`.
    Returns:
        (..., F) in the dtype of x.
    Raises:
        ValueError: when Triton was named and cannot run.
    """
    if use_triton(impl, x, lambda: _unsupported_reason(x, bias)):
        return _gelu(x.reshape(-1, x.shape[-1]), bias).view(x.shape)
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _unsupported_reason(x: Tensor, bias: Tensor | None) -> str:
    if bias is not None and bias.shape != x.shape[-1:]:
        return f"bias must be of shape {tuple(x.shape[-1:])}, got {tuple(bias.shape)}"
    return unsupported_layout(x, x=x, bias=bias)


@custom_op("phi2::gelu", mutates_args=())
def _gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, F) -> (N, F)."""
    from phi2_kernels import gelu_triton

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gelu_triton.forward(x, bias, y)
    return y


@custom_op("phi2::gelu_backward", mutates_args=())
def _gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, sums: bool) -> tuple[Tensor, Tensor]:
    """dx (N, F), and dbias (F,) in float32, which is empty unless `sums` asks for it."""
    from phi2_kernels import gelu_triton

    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, gelu_triton.backward(grad, x, bias, dx, sums=sums)


@_gelu.register_fake
def _(x, bias):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_gelu_backward.register_fake
def _(grad, x, bias, sums):
    dbias = torch.empty(x.shape[1] if sums else 0, dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dbias


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    x, bias = ctx.saved_tensors
    sums = ctx.needs_input_grad[1]  # False for a frozen bias, and for none
    dx, dbias = _gelu_backward(grad, x, bias, sums)
    return dx, dbias.to(bias.dtype) if sums else None


_gelu.register_autograd(_backward, setup_context=_setup_context)
