"""What `block.py` needs between its matmuls, by the kernels of the ops: they read and write columns of its buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phi2_kernels import (
    attention_backward_triton,
    attention_forward_triton,
    block_adapters_triton,
    gelu_triton,
    layer_norm_triton,
    rotary_triton,
)
from phi2_kernels.attention_tiles_triton import tables_of
from phi2_kernels.block_adapters import Side
from phi2_kernels.launch import Known
from phi2_kernels.visibility import Tables


class Kernels:
    """The functions of `block_torch.py`.

    Args:
        known: forms of kernels that earlier passes of the same block have found (`launch.py`); None: Triton looks.
    """

    tables_of = staticmethod(tables_of)

    def __init__(self, known: Known | None = None) -> None:
        self.known = known

    @staticmethod
    def empty_statistics(x: Tensor, shape) -> tuple[Tensor, Tensor, Tensor]:
        """Tensors like the mean, rstd and logsumexp that `norm` and `attend` return."""
        mean, rstd = (x.new_empty(x.shape[0] * x.shape[1], dtype=torch.float32) for _ in range(2))
        return mean, rstd, x.new_empty((x.shape[0], shape.heads, x.shape[1]), dtype=torch.float32)

    def norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """LayerNorm of x (N, C) in `dtype`, and mean and rstd (N,) in float32."""
        y = torch.empty_like(x, dtype=dtype)
        mean, rstd = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
        layer_norm_triton.forward(x, weight, bias, eps, y, mean, rstd, self.known)
        return y, mean, rstd

    def norm_backward(
        self, dn: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, skip: Tensor, *,
        sums: bool, again: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """See `block_torch.py`."""
        dx, n = torch.empty_like(x), torch.empty_like(dn) if again else None
        made = None if n is None else (bias, n)
        return dx, layer_norm_triton.backward(dn, x, weight, mean, rstd, dx, skip, made, sums=sums, known=self.known), n

    def apply_rotary(self, x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool) -> None:
        """Rotates x (N, heads, D) in place."""
        rotary_triton.apply_rotary(x, cos, sin, inverse, known=self.known)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, o: Tensor, tables: Tables) -> Tensor:
        """Writes o (B, H, T, D) and returns the logsumexp (B, H, T)."""
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        attention_forward_triton.forward(q, k, v, o, lse, tables.until, tables.key_ranges, self.known)
        return lse

    def attend_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
        tables: Tables,
    ) -> None:  # fmt: skip
        """Writes dq (B, H, T, D), dk and dv (B, H_kv, T, D)."""
        attention_backward_triton.backward(do, q, k, v, o, lse, dq, dk, dv, *tables, known=self.known)

    def gelu(self, x: Tensor, y: Tensor) -> None:
        """Writes y (N, F)."""
        gelu_triton.forward(x, y, self.known)

    def gelu_backward(self, grad: Tensor, x: Tensor, dx: Tensor, *, again: bool) -> None:
        """Writes dx (N, F) and, again, the output of `gelu` over grad."""
        gelu_triton.backward(grad, x, dx, again=again, known=self.known)

    def inner(self, x: Tensor, u: Tensor, side: Side, scales: Sequence[float], seed: Tensor | None) -> None:
        """See `block_adapters_triton.py`, and so for the next two."""
        block_adapters_triton.inner(x, u, side, scales, seed, self.known)

    def add(self, y: Tensor, u: Tensor, side: Side, seed: Tensor | None) -> None:
        block_adapters_triton.add(y, u, side, seed, self.known)

    def gradients(
        self, x: Tensor, du: Tensor, input: Side, dy: Tensor, u: Tensor, output: Side, seed: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        return block_adapters_triton.gradients(x, du, input, dy, u, output, seed, self.known)
