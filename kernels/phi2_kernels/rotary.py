"""Rotary position embedding on the first R of D dims, half-split: dim d turns with dim d + R/2.

    angle(t, d) = position(t) * theta^(-2d/R)                 d < R/2
    y[d]        = x[d] * cos - x[d + R/2] * sin
    y[d + R/2]  = x[d + R/2] * cos + x[d] * sin

Dims: B batch, T tokens, H heads, D head dim (80 in Phi-2), R rotary dims (32 in Phi-2).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, computed once for all layers.

    Args:
        positions: (B, T) whole numbers.
        rotary_dim: R, even.
        theta: base of the frequencies.
    Returns:
        cos, sin: (B, T, 1, R/2) float32.
    Source: arXiv:2104.09864 Eq. 34; half-split as in GPT-NeoX.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    angles = positions[..., None].float() * (1.0 / theta**exponent)  # (B, T, R/2)
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first R dims of every head by its position's angles, in float32, and passes the others through.

    Args:
        x: (B, T, H, D) queries or keys.
        cos, sin: (B, T, 1, R/2) from `rotary_angles`; they get no gradient.
    Returns:
        (B, T, H, D) in the dtype of x.
    """
    return _Rotary.apply(x, cos, sin)


class _Rotary(torch.autograd.Function):
    """The backward pass turns the other way, and needs nothing of x."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in turned), rest), dim=-1)
