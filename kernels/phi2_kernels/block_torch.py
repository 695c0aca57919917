"""What `block.py` needs between its matmuls, in plain torch: the oracle of the kernels, and the way on a CPU.

Each function fills columns of a buffer it is given, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2_kernels.attention import attention
from phi2_kernels.block_adapters import Side
from phi2_kernels.dropout import keep_mask
from phi2_kernels.rotary import rotary_
from phi2_kernels.visibility import Tables, Visibility


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of x (N, C) in `dtype`, and mean and rstd (N, 1) in float32."""
    y, mean, rstd = torch.native_layer_norm(x.float(), x.shape[-1:], weight.float(), bias.float(), eps)
    return y.to(dtype), mean, rstd


def norm_backward(
    dn: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, skip: Tensor, *,
    sums: bool, again: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """dx (N, C) with the gradient of the residual stream added; dweight and dbias as (2, C); the output of `norm`.

    Args:
        sums: whether dweight and dbias are wanted; without they are (2, 0).
        again: whether the output of `norm` is, in the dtype of dn; without it is None.
    """
    exact, weight, bias = x.float(), weight.float(), bias.float()
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dn.float(), exact, x.shape[-1:], mean, rstd, weight, bias, [True, sums, sums]
    )
    n = ((exact - mean) * rstd * weight + bias).to(dn.dtype) if again else None
    return (dx + skip).to(x.dtype), torch.stack((dweight, dbias)) if sums else dx.new_empty((2, 0)), n


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


def gelu_backward(grad: Tensor, x: Tensor, dx: Tensor, *, again: bool) -> None:
    """Writes dx (N, F) and, again, the output of `gelu` over grad."""
    dx.copy_(torch.ops.aten.gelu_backward(grad, x, approximate="tanh"))
    if again:
        gelu(x, grad)


def inner(x: Tensor, u: Tensor, side: Side, scales: Sequence[float], seed: Tensor | None) -> None:
    """Writes u (N, R): the columns of x (N, any) that each adapter reads, times its factor and its scale."""
    for (columns, kept, part), factor, scale in zip(_parts(x, u, side, seed), _factors(side), scales, strict=True):
        read = columns if kept is None else columns * kept
        torch.mul(read.float() @ factor.T, scale, out=part)


def add(y: Tensor, u: Tensor, side: Side, seed: Tensor | None) -> None:
    """Adds to the columns of y (N, any) that each adapter writes its part of u (N, R) times its factor."""
    for (columns, kept, part), factor in zip(_parts(y, u, side, seed), _factors(side), strict=True):
        if kept is None and y.dtype == torch.float32:
            columns.addmm_(part, factor)
        else:
            columns.add_(part @ factor * (1 if kept is None else kept))


def gradients(
    x: Tensor, du: Tensor, input: Side, dy: Tensor, u: Tensor, output: Side, seed: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """dA and dB: of each adapter its du times the columns of x (N, any), its u (N, R) times those of dy (N, any)."""
    reads, writes = _parts(x, du, input, seed), _parts(dy, u, output, None)
    dA = [part.T @ (columns if kept is None else columns * kept).float() for columns, kept, part in reads]
    return dA, [columns.float().T @ part for columns, _, part in writes]


def _factors(side: Side) -> list[Tensor]:
    """(r, K) each."""
    return [factor.T if side.is_output else factor for factor in side.factors]


def _parts(x: Tensor, u: Tensor, side: Side, seed: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Of each adapter its columns of x, which of them are kept, and its part of u (N, r)."""
    for i, ((start, end), part) in enumerate(zip(side.spans, u.split(side.ranks, dim=1), strict=True)):
        columns, kept = x[:, start:end], None
        if side.rates and side.rates[i]:
            assert seed is not None
            kept = keep_mask(columns, side.rates[i], seed, side.masks[i])
        yield columns, kept, part
