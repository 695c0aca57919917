"""What `block.py` needs between its matmuls, in plain torch: the oracle of the kernels, and the way on a CPU.

Each function fills columns of a buffer it is given, as the kernels do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2_kernels.attention import attention
from phi2_kernels.rotary import rotary_
from phi2_kernels.visibility import Tables, Visibility


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x (N, C) in `dtype`, and mean and rstd (N, 1) in float32."""
    y, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    return y.to(dtype), mean, rstd


def normalised(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The output of `norm` again."""
    return ((x.float() - mean) * rstd * weight.float() + bias.float()).to(dtype)


def norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, skip: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor]:
    """dx (N, C) with the gradient of the residual stream added; dweight and dbias as (2, C), (2, 0) unless wanted."""
    bias = torch.empty_like(weight, dtype=torch.float32)  # of which only the shape counts
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dn.float(), x.float(), x.shape[-1:], mean, rstd, weight.float(), bias, [True, sums, sums]
    )
    return (dx + skip).to(x.dtype), torch.stack((dweight, dbias)) if sums else dx.new_empty((2, 0))


def tables_of(visibility: Visibility, head: Tensor) -> Tables:
    """What says who sees whom."""
    return Tables(visibility.until)


def empty_statistics(x: Tensor, shape) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like the mean, rstd and logsumexp that `norm` and `attend` return."""
    mean, rstd = (x.new_empty((x.shape[0] * x.shape[1], 1), dtype=torch.float32) for _ in range(2))
    return mean, rstd, x.new_empty(0, dtype=torch.float32)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> None:
    """Rotates x (N, heads, D) in place."""
    rotary_(x, cos, sin, inverse=inverse, impl="torch")


def attend(q: Tensor, k: Tensor, v: Tensor, o: Tensor, tables: Tables) -> Tensor:
    """Writes o (B, H, T, D). The backward pass does without a logsumexp, so there is none."""
    visibility = Visibility(q.shape[2], k.shape[2], tables.until, q.device)
    o.copy_(attention(q, k, v, visibility, impl="torch"))
    return q.new_empty(0, dtype=torch.float32)


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    tables: Tables,
) -> None:  # fmt: skip
    """Writes dq (B, H, T, D), dk and dv (B, H_kv, T, D), by the textbook, in float32."""
    scale, groups = q.shape[-1] ** -0.5, q.shape[1] // k.shape[1]
    visibility = Visibility(q.shape[2], k.shape[2], tables.until, q.device)
    q, do = q.float(), do.float()
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))  # (B, H, T, D)
    scores = q @ k.mT * scale  # (B, H, T, T)
    if visibility.mask is not None:
        scores = scores.masked_fill(~visibility.mask, float("-inf"))
    p = scores.softmax(dim=-1).nan_to_num(0.0)
    ds = p * (do @ v.mT - (do * o).sum(dim=-1, keepdim=True)) * scale
    dq.copy_(ds @ k)
    dk.copy_((ds.mT @ q).unflatten(1, (-1, groups)).sum(dim=2))
    dv.copy_((p.mT @ do).unflatten(1, (-1, groups)).sum(dim=2))


def gelu(x: Tensor, y: Tensor) -> None:
    """Writes y (N, F)."""
    y.copy_(F.gelu(x, approximate="tanh"))


def gelu_backward(grad: Tensor, x: Tensor, dx: Tensor) -> None:
    """Writes dx (N, F)."""
    dx.copy_(torch.ops.aten.gelu_backward(grad, x, approximate="tanh"))
