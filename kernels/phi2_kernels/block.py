"""A whole parallel block of Phi as two matmuls, with a backward pass of its own.

    n = LN(x)        [q k v f] = n W_in^T + b_in        m = [attention(turn(q), turn(k), v), gelu(f)]
    y = x + m W_out + b_out

Attention and MLP read the same n and are added to the same x, so [Wq; Wk; Wv; Wfc1] are one matrix and so are
[Wdense^T; Wfc2^T], and a layer takes two matmuls forward and four backward in place of twelve and twenty-four. All
that lies between is written straight into columns of three buffers, h = [q k v f], m, and their gradients.

Of a layer only x, h, the attention's output and four numbers a row and head are kept; n and gelu(f) are made again.

LoRA: adapters on q, k, v and fc1 share one reading of n, those on dense and fc2 read their columns of m:

    h[:, span] += s (n A^T) B^T        y += s (m[:, span] A^T) B^T

Dims: B batch, T tokens, N = B T rows, C hidden, H heads, H_kv key-value heads, D head dim, F mlp width,
E = (H + 2 H_kv) D + F columns of h, M = H D + F columns of m, r LoRA rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phi2_kernels._dispatch import use_triton
from phi2_kernels.attention import Visibility


class Shape(NamedTuple):
    """How the columns of h and m are divided."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def attended(self) -> int:
        """Columns of m that come from attention."""
        return self.heads * self.head_dim

    @property
    def qkv(self) -> int:
        """Columns of h that go into attention."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def split(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as views of h (B, T, E): (B, H or H_kv, T, D)."""
        sizes = [self.attended, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        parts = h[..., : self.qkv].split(sizes, dim=-1)
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)

    def attention_columns(self, m: Tensor) -> Tensor:
        """The attention's columns of m (B, T, M) as (B, H, T, D)."""
        return m[..., : self.attended].unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Adapter(NamedTuple):
    """LoRA on some of the columns that a matmul writes (h) or reads (m)."""

    start: int
    end: int
    A: Tensor  # (r, in) float32
    B: Tensor  # (out, r) float32
    scaling: float


class Weights(NamedTuple):
    """The parameters of a block.

    Attributes:
        norm_weight, norm_bias: (C,), of the LayerNorm; eps: added to its variance.
        w_in, b_in: (E, C) and (E,), rows in the order q, k, v, fc1.
        w_out: (M, C), rows in the order dense, fc2. b_out: (C,), the sum of their biases.
        adapters_in, adapters_out: LoRA on columns of h, and on columns of m.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: Tensor
    adapters_in: tuple[Adapter, ...] = ()
    adapters_out: tuple[Adapter, ...] = ()


def block(
    x: Tensor,
    weights: Weights,
    shape: Shape,
    angles: tuple[Tensor, Tensor],
    visibility: Visibility,
    dtype: torch.dtype | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """The formula above.

    Args:
        x: (B, T, C) residual stream.
        weights: differentiable, frozen or mixed; only what needs a gradient gets one.
        angles: cosine and sine from `rotary_angles`.
        dtype: of the matmuls; that of x unless autocast wants another.
        impl: of the kernels between the matmuls, see `use_triton`.
    Returns:
        (B, T, C) in the dtype of x.
    Raises:
        ValueError: when Triton was named and cannot run.
    """
    ops = _ops(use_triton(impl, x))
    tensors, layout = _flatten(weights)
    context = (shape, weights.eps, angles, visibility, dtype or x.dtype, ops, layout)
    return _Block.apply(context, x, *tensors)


def _ops(triton: bool):
    """The module whose functions fill the buffers between the matmuls."""
    if triton:
        from phi2_kernels import block_triton

        return block_triton
    from phi2_kernels import block_torch

    return block_torch


class _Layout(NamedTuple):
    """What of the adapters is no tensor: (start, end, scaling) of each."""

    into: tuple[tuple[int, int, float], ...]
    out: tuple[tuple[int, int, float], ...]


def _flatten(weights: Weights) -> tuple[list[Tensor], _Layout]:
    """Every tensor of the weights, as autograd wants them: six of the block, then A and B of each adapter."""
    adapters = weights.adapters_in + weights.adapters_out
    plain = [weights.norm_weight, weights.norm_bias, weights.w_in, weights.b_in, weights.w_out, weights.b_out]
    spans = (tuple((a.start, a.end, a.scaling) for a in group) for group in (weights.adapters_in, weights.adapters_out))
    return plain + [tensor for adapter in adapters for tensor in (adapter.A, adapter.B)], _Layout(*spans)


def _unflatten(tensors: tuple[Tensor, ...], layout: _Layout, eps: float) -> Weights:
    pairs = list(zip(tensors[6::2], tensors[7::2], strict=True))
    adapters = [
        Adapter(start, end, A, B, scaling)
        for (start, end, scaling), (A, B) in zip(layout.into + layout.out, pairs, strict=True)
    ]
    cut = len(layout.into)
    return Weights(*tensors[:2], eps, *tensors[2:6], tuple(adapters[:cut]), tuple(adapters[cut:]))


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context, x, *tensors):
        shape, eps, angles, visibility, dtype, ops, layout = context
        w = _unflatten(tensors, layout, eps)
        rows = x.flatten(0, 1)  # (N, C)
        n, mean, rstd = ops.norm(rows, w.norm_weight, w.norm_bias, eps, dtype)
        h = torch.addmm(w.b_in.to(dtype), n, w.w_in.to(dtype).T)  # (N, E)
        _add_adapters(h, n, w.adapters_in)
        h = h.unflatten(0, x.shape[:2])  # (B, T, E)
        q, k, v = shape.split(h)
        ops.turn(q, *angles)
        ops.turn(k, *angles)
        m = torch.empty((*h.shape[:2], w.w_out.shape[0]), dtype=dtype, device=x.device)
        lse = ops.attend(q, k, v, shape.attention_columns(m), visibility)
        ops.gelu(h[..., shape.qkv :].flatten(0, 1), m[..., shape.attended :].flatten(0, 1))
        m = m.flatten(0, 1)  # (N, M)
        y = torch.addmm(w.b_out.to(dtype), m, w.w_out.to(dtype))  # (N, C)
        for adapter in w.adapters_out:
            y.add_(_through(m[:, adapter.start : adapter.end], adapter))
        attended = m[:, : shape.attended].clone()  # not a view: the rest of m may go
        ctx.context = context
        ctx.save_for_backward(x, h, attended, mean, rstd, lse, *tensors)
        return (y + rows).view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        shape, eps, angles, visibility, dtype, ops, layout = ctx.context
        x, h, attended, mean, rstd, lse, *tensors = ctx.saved_tensors
        w, rows = _unflatten(tuple(tensors), layout, eps), x.flatten(0, 1)
        needs = _Needs(*ctx.needs_input_grad[2:8])
        dy = dy.flatten(0, 1)
        grad = dy.to(dtype)  # (N, C)

        dm = grad @ w.w_out.to(dtype).T  # (N, M)
        dw_out, adapters_out = None, []
        if needs.w_out or layout.out:
            m = torch.empty_like(dm)
            m[:, : shape.attended] = attended
            ops.gelu(h[..., shape.qkv :].flatten(0, 1), m[:, shape.attended :])
            dw_out = m.T @ grad if needs.w_out else None  # (M, C)
            adapters_out = [_pull_back_out(adapter, m, grad, dm) for adapter in w.adapters_out]

        dh = torch.empty_like(h)  # (B, T, E)
        o, do = (shape.attention_columns(z.unflatten(0, x.shape[:2])) for z in (attended, dm))
        dq, dk, dv = shape.split(dh)
        ops.attend_backward(do, *shape.split(h), o, lse, dq, dk, dv, visibility)
        cos, sin = angles
        ops.turn(dq, cos, -sin)
        ops.turn(dk, cos, -sin)
        f, df = h[..., shape.qkv :].flatten(0, 1), dh[..., shape.qkv :].flatten(0, 1)
        ops.gelu_backward(dm[:, shape.attended :], f, df)
        dh = dh.flatten(0, 1)  # (N, E)

        dn = dh @ w.w_in.to(dtype)  # (N, C)
        dw_in, adapters_in = None, []
        if needs.w_in or layout.into:
            n = ops.normalised(rows, mean, rstd, w.norm_weight, w.norm_bias, dtype)
            dw_in = dh.T @ n if needs.w_in else None  # (E, C)
            adapters_in = _pull_back_in(w.adapters_in, n, dh, dn)
        dx, dnorm_weight, dnorm_bias = ops.norm_backward(
            dn, rows, w.norm_weight, mean, rstd, dy, sums=needs.norm_weight or needs.norm_bias
        )
        db_in = dh.sum(dim=0, dtype=torch.float32) if needs.b_in else None
        db_out = dy.sum(dim=0, dtype=torch.float32) if needs.b_out else None
        plain = (dnorm_weight, dnorm_bias, dw_in, db_in, dw_out, db_out)
        adapters = [g for pair in adapters_in + adapters_out for g in pair]
        return None, dx.view(x.shape), *_as_asked([*plain, *adapters], tensors, ctx.needs_input_grad[2:])


class _Needs(NamedTuple):
    """Which tensors of a block need a gradient."""

    norm_weight: bool
    norm_bias: bool
    w_in: bool
    b_in: bool
    w_out: bool
    b_out: bool


def _as_asked(grads: list[Tensor | None], tensors: list[Tensor], needs: tuple[bool, ...]) -> list[Tensor | None]:
    return [g.to(t.dtype) if need else None for g, t, need in zip(grads, tensors, needs, strict=True)]


def _through(x: Tensor, adapter: Adapter) -> Tensor:
    """s (x A^T) B^T in float32."""
    return (x.float() @ adapter.A.T * adapter.scaling) @ adapter.B.T


def _add_adapters(h: Tensor, n: Tensor, adapters: tuple[Adapter, ...]) -> None:
    """Adds every adapter to its columns of h (N, E); n (N, C) is read once for all of them."""
    if not adapters:
        return
    inner = _inner(n, adapters)
    for adapter, u in zip(adapters, inner, strict=True):
        h[:, adapter.start : adapter.end].add_(u @ adapter.B.T)


def _inner(n: Tensor, adapters: tuple[Adapter, ...]) -> tuple[Tensor, ...]:
    """s n A^T of every adapter, (N, r) each."""
    together = n.float() @ torch.cat([adapter.A * adapter.scaling for adapter in adapters]).T
    return together.split([len(adapter.A) for adapter in adapters], dim=1)


def _pull_back_in(adapters: tuple[Adapter, ...], n: Tensor, dh: Tensor, dn: Tensor) -> list[tuple[Tensor, Tensor]]:
    """dA and dB of the adapters on h; what they send to n is added to dn."""
    if not adapters:
        return []
    parts = [dh[:, adapter.start : adapter.end].float() for adapter in adapters]
    inner = _inner(n, adapters)
    dB = [part.T @ u for part, u in zip(parts, inner, strict=True)]
    du = torch.cat([part @ a.B * a.scaling for part, a in zip(parts, adapters, strict=True)], dim=1)
    dn.add_(du @ torch.cat([adapter.A for adapter in adapters]))
    dA = (du.T @ n.float()).split([len(adapter.A) for adapter in adapters])
    return list(zip(dA, dB, strict=True))


def _pull_back_out(adapter: Adapter, m: Tensor, dy: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
    """dA and dB of an adapter that reads columns of m; what it sends to them is added to dm."""
    columns, grad = m[:, adapter.start : adapter.end].float(), dy.float()
    dinner = grad @ adapter.B * adapter.scaling  # (N, r)
    dm[:, adapter.start : adapter.end].add_(dinner @ adapter.A)
    return dinner.T @ columns, grad.T @ (columns @ adapter.A.T * adapter.scaling)
