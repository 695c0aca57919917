"""What `block.py` needs between its matmuls, by the kernels of the ops: they read and write columns of its buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from phi2_kernels import (
    attention_backward_triton,
    attention_cudnn,
    attention_forward_triton,
    gelu_triton,
    layer_norm_triton,
    rotary_triton,
)
from phi2_kernels.attention_tiles_triton import tables_of as tables_of
from phi2_kernels.block_adapters_triton import add as add
from phi2_kernels.block_adapters_triton import gradients as gradients
from phi2_kernels.block_adapters_triton import inner as inner
from phi2_kernels.visibility import Tables


def empty_statistics(x: Tensor, shape) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like the mean, rstd and logsumexp that `norm` and `attend` return."""
    mean, rstd = (x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32) for _ in range(2))
    return mean, rstd, x.new_empty((x.shape[0], shape.heads, x.shape[1]), dtype=torch.float32)


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x (N, C) in `dtype`, and mean and rstd (N,) in float32."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    layer_norm_triton.forward(x, weight, bias, eps, y, mean, rstd)
    return y, mean, rstd


def normalised(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The output of `norm` again."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    layer_norm_triton.normalised(x, mean, rstd, weight, bias, y)
    return y


def norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, skip: Tensor, *, sums: bool
) -> tuple[Tensor, Tensor]:
    """dx (N, C) with the gradient of the residual stream added; dweight and dbias as (2, C), (2, 0) unless wanted."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    skip = skip if skip.stride(1) == 1 else skip.contiguous()
    return dx, layer_norm_triton.backward(dn, x, weight, mean, rstd, dx, skip, sums=sums)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> None:
    """Rotates x (N, heads, D) in place."""
    rotary_triton.apply_rotary(x, cos, sin, inverse)


def attend(q: Tensor, k: Tensor, v: Tensor, o: Tensor, tables: Tables, *, auto: bool = False) -> Tensor:
    """Writes o (B, H, T, D) and returns the logsumexp (B, H, T).

    Args:
        auto: it may be by cuDNN, where `attention_cudnn.py` says so.
    """
    if auto and attention_cudnn.is_chosen(q, k, v, tables.until):
        attended, lse = attention_cudnn.forward(q, k, v)
        o.copy_(attended)
        return lse
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    attention_forward_triton.forward(q, k, v, o, lse, tables.until, tables.key_ranges)
    return lse


def attend_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    tables: Tables,
) -> None:  # fmt: skip
    """Writes dq (B, H, T, D), dk and dv (B, H_kv, T, D)."""
    attention_backward_triton.backward(do, q, k, v, o, lse, dq, dk, dv, *tables)


def gelu(x: Tensor, y: Tensor) -> None:
    """Writes y (N, F)."""
    gelu_triton.forward(x, y)


def gelu_backward(grad: Tensor, x: Tensor, dx: Tensor) -> None:
    """Writes dx (N, F)."""
    gelu_triton.backward(grad, x, dx)
