"""What `block.py` needs between its matmuls, in plain torch: the oracle of the kernels, and the way on a CPU.

Each function fills columns of a buffer it is given, as the kernels do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2_kernels.attention import Visibility, attention


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x (N, C) in `dtype`, and mean and rstd (N, 1) in float32."""
    y, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    return y.to(dtype), mean, rstd


def normalised(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The output of `norm` again."""
    return ((x.float() - mean) * rstd * weight.float() + bias.float()).to(dtype)


def norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, skip: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dx (N, C) with the gradient of the residual stream added, and dweight and dbias (C,) where they are wanted."""
    bias = torch.empty_like(weight, dtype=torch.float32)  # of which only the shape counts
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dn.float(), x.float(), x.shape[-1:], mean, rstd, weight.float(), bias, [True, sums, sums]
    )
    return (dx + skip).to(x.dtype), dweight, dbias


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turns queries or keys (B, H, T, D) in place by the angles (B, T, 1, R/2) of `rotary_angles`."""
    half = cos.shape[-1]
    cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)  # (B, 1, T, R/2)
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    x[..., : 2 * half] = turned


def attend(q: Tensor, k: Tensor, v: Tensor, o: Tensor, visibility: Visibility) -> Tensor:
    """Writes o (B, H, T, D). The backward pass does without a logsumexp: it runs the forward again."""
    o.copy_(attention(q, k, v, visibility))
    return q.new_empty(0)


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    visibility: Visibility,
) -> None:  # fmt: skip
    """Writes dq (B, H, T, D), dk and dv (B, H_kv, T, D)."""
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, visibility)
    for buffer, gradient in zip((dq, dk, dv), torch.autograd.grad(out, inputs, do), strict=True):
        buffer.copy_(gradient)


def gelu(x: Tensor, y: Tensor) -> None:
    """Writes y (N, F)."""
    y.copy_(F.gelu(x, approximate="tanh"))


def gelu_backward(grad: Tensor, x: Tensor, dx: Tensor) -> None:
    """Writes dx (N, F)."""
    dx.copy_(torch.ops.aten.gelu_backward(grad, x, approximate="tanh"))
