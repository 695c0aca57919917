"""GELU by its tanh approximation.

    u = sqrt(2 / pi) (x + 0.044715 x^3)        y = x (1 + tanh u) / 2 = x sigmoid(2 u)
    dy/dx = s + 2 x s (1 - s) du/dx,  s = sigmoid(2 u)

The backward pass computes everything from x again: nothing else is kept.

Dims: N rows, F columns (10240 in Phi-2).
Source: arXiv:1606.08415 section 2; `NewGELUActivation` of transformers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import unsupported_layout, use_triton


def gelu_ref(x: Tensor) -> Tensor:
    """The formula above, in float32. Arguments and result as in `gelu`."""
    z = x.float()
    u = (2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)
    return (0.5 * z * (1 + torch.tanh(u))).to(x.dtype)


def gelu(x: Tensor, *, impl: str = "auto") -> Tensor:
    """GELU of x.

    Args:
        x: (..., F), its last dim contiguous.
        impl: see `use_triton`.
    Returns:
        (..., F) in the dtype of x.
    Raises:
        ValueError: when Triton was named and cannot run.
    """
    if use_triton(impl, x, lambda: unsupported_layout(x, x=x)):
        return _gelu(x.reshape(-1, x.shape[-1])).view(x.shape)
    return F.gelu(x, approximate="tanh")


@custom_op("phi2::gelu", mutates_args=())
def _gelu(x: Tensor) -> Tensor:
    """x (N, F) -> (N, F)."""
    from phi2_kernels import gelu_triton

    y = _new_like(x)
    gelu_triton.forward(x, y)
    return y


@custom_op("phi2::gelu_backward", mutates_args=())
def _gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """dx (N, F)."""
    from phi2_kernels import gelu_triton

    dx = _new_like(x)
    gelu_triton.backward(grad, x, dx)
    return dx


def _new_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_gelu.register_fake
def _(x):
    return _new_like(x)


@_gelu_backward.register_fake
def _(grad, x):
    return _new_like(x)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> Tensor:
    return _gelu_backward(grad, *ctx.saved_tensors)


_gelu.register_autograd(_backward, setup_context=_setup_context)
