"""A whole parallel block of Phi as two matmuls, with a backward pass of its own.

    n = LN(x)        [q k v f] = n W_in^T + b_in        m = [attention(rotary(q), rotary(k), v), gelu(f)]
    y = x + m W_out + b_out

Attention and MLP read the same n and are added to the same x, so [Wq; Wk; Wv; Wfc1] are one matrix and so are
[Wdense^T; Wfc2^T], and a layer takes two matmuls forward and four backward in place of six and twelve. All that
lies between is written straight into columns of three buffers, h = [q k v f], m, and their gradients.

Of a layer only x, h, the attention's output, two numbers a row and one a row and head are kept, and of adapters r
numbers a row; n and gelu(f) are made again. A pass without gradient keeps nothing.

LoRA (`block_adapters.py`): adapters on q, k, v and fc1 read n, those on dense and fc2 their columns of m:

    h[:, span] += s (n A^T) B^T        y += s (m[:, span] A^T) B^T

Where the residual stream has dropout, attention's part of y and the MLP's are dropped apart, and the second matmul is
two. Masks come from a seed and are made again in the backward pass.

Dims: B batch, T tokens, N = B T rows, C hidden, H heads, H_kv key-value heads, D head dim, F mlp width,
E = (H + 2 H_kv) D + F columns of h, M = H D + F columns of m, r LoRA rank.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import use_triton
from phi2_kernels.attention import unsupported_heads
from phi2_kernels.block_weights import (
    Joined,
    Layout,
    PerTensor,
    Weights,
    apart,
    flatten,
    joined,
    layout_of,
    tensors_of,
    unflatten,
)
from phi2_kernels.dropout import keep_mask, new_seed
from phi2_kernels.layer_norm import MAX_COLUMNS
from phi2_kernels.visibility import Tables, Visibility

SevenTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Shape(NamedTuple):
    """How the columns of h and m are divided."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def attention_width(self) -> int:
        """Columns of m that come from attention."""
        return self.heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """Columns of h that go into attention."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def split(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as views of h (B, T, E), contiguous: (B, H or H_kv, T, D)."""
        (B, T, E), D = h.shape, self.head_dim
        strides, q = (T * E, D, E, 1), h.storage_offset()
        k, keys = q + self.heads * D, (B, self.kv_heads, T, D)
        v = k + self.kv_heads * D
        first = h.as_strided((B, self.heads, T, D), strides, q)
        return first, h.as_strided(keys, strides, k), h.as_strided(keys, strides, v)

    def qk(self, h: Tensor) -> Tensor:
        """q and k, the part of h (B, T, E) that is rotated, as (N, H + H_kv, D)."""
        columns = (self.heads + self.kv_heads) * self.head_dim
        return h.flatten(0, 1)[:, :columns].unflatten(-1, (-1, self.head_dim))

    def attention_columns(self, m: Tensor) -> Tensor:
        """The attention's columns of m (B, T, M) as (B, H, T, D)."""
        return m[..., : self.attention_width].unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


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
        weights: differentiable, frozen or mixed. Those that are neighbours in memory, w_out by their transposes, are
            one matrix as they lie; others are copied together in every pass.
        angles: cosine and sine from `rotary_angles`.
        dtype: of the matmuls; that of x unless autocast wants another.
        impl: of the kernels between the matmuls, see `use_triton`.
    Returns:
        (B, T, C) in the dtype of x.
    Raises:
        ValueError: when Triton was named and cannot run.
    """
    triton, dtype = use_triton(impl, x, lambda: _unsupported_reason(x, shape, visibility)), dtype or x.dtype
    layout = layout_of(weights, list(shape), dtype, triton)
    seed = new_seed() if layout.dropout or any(layout.rates) else None
    flat_angles = [table.flatten(0, 2).contiguous() for table in angles]  # (L, R/2) twice
    tables = list(_ops(triton).tables_of(visibility, x.new_empty((0, shape.head_dim), dtype=dtype)))
    given, tensors = (x.contiguous(), flat_angles, tables, seed), tensors_of(weights)
    if torch.compiler.is_compiling():
        return _BlockFunction.apply(*given, layout, None, *flatten(tensors))
    w = joined(tensors, layout)
    if not torch.is_grad_enabled():
        return _forward(*given, w)[0]
    return _BlockFunction.apply(*given, layout, w, *flatten(tensors))


def _unsupported_reason(x: Tensor, shape: Shape, visibility: Visibility) -> str:
    """What keeps the kernels from a stream x."""
    B, T, C = x.shape
    if (visibility.queries, visibility.keys) != (T, T):
        return f"the visibility must be of {T} queries and keys, got {visibility.queries} and {visibility.keys}"
    if x.device != visibility.device:
        return f"the visibility must be on {x.device}, got {visibility.device}"
    if C > MAX_COLUMNS:
        return f"x must have at most {MAX_COLUMNS} columns, got {C}"
    return unsupported_heads(B, *shape, visibility)


def _ops(triton: bool) -> ModuleType:
    """The module whose functions fill the buffers between the matmuls."""
    if triton:
        from phi2_kernels import block_triton

        return block_triton
    from phi2_kernels import block_torch

    return block_torch


class _BlockFunction(torch.autograd.Function):
    """`tensors` are a flat `PerTensor`, and w what is made of them. Without w it is traced, and sees operators."""

    @staticmethod
    def forward(ctx, x, angles, tables, seed, layout, w, *tensors):
        given = x, angles, tables, seed
        y, *saved = _traced_forward(*given, list(tensors), *layout) if w is None else _keep(*_forward(*given, w))
        ctx.layout, ctx.traced, ctx.w = layout, w is None, w if w is not None and w.is_view else None
        ctx.save_for_backward(x, *angles, *tables, seed, *saved, *tensors)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, cos, sin, until, key_ranges, query_ends, seed, *others = ctx.saved_tensors
        saved, tensors, needs = others[:6], others[6:], list(ctx.needs_input_grad[6:])
        given = dy, x, [cos, sin], [until, key_ranges, query_ends], seed, saved
        if ctx.traced:
            dx, *grads = _traced_backward(*given, tensors, needs, *ctx.layout)
        else:
            w = joined(unflatten(tensors), ctx.layout) if ctx.w is None else ctx.w  # copies are not kept
            dx, *grads = _backward(*given, w, unflatten(needs))
        each = zip(apart(grads, tensors), tensors, needs, strict=True)
        return dx, None, None, None, None, None, *(grad.to(t.dtype) if need else None for grad, t, need in each)


def _forward(
    x: Tensor, angles: list[Tensor], tables: list[Tensor | None], seed: Tensor | None, w: Joined
) -> SevenTensors:
    """y (B, T, C), and what the backward pass reads: h, attention's columns of m, u of adapters, mean, rstd, lse."""
    eps, dropout, dtype = w.layout.eps, w.layout.dropout, w.layout.dtype
    shape, ops = Shape(*w.layout.dims), _ops(w.layout.triton)
    rows = x.flatten(0, 1)  # (N, C)
    n, mean, rstd = ops.norm(rows, w.norm_weight, w.norm_bias, eps, dtype)
    h = torch.addmm(w.b_in, n, w.w_in.T)  # (N, E)
    u = torch.empty((len(n), w.ranks), dtype=torch.float32, device=x.device)  # inner products of all adapters
    w.reading.add(ops, n, h, u[:, : w.ranks_in], seed)
    h = h.unflatten(0, x.shape[:2])  # (B, T, E)
    ops.apply_rotary(shape.qk(h), *angles, inverse=False)
    m = torch.empty((*h.shape[:2], w.w_out.shape[0]), dtype=dtype, device=x.device)  # (B, T, M)
    lse = ops.attend(*shape.split(h), shape.attention_columns(m), Tables(*tables))
    m, f = m.flatten(0, 1), h.flatten(0, 1)[:, shape.qkv_width :]
    ops.gelu(f, m[:, shape.attention_width :])
    stream = rows
    for number, output in enumerate(w.outputs):
        bias = w.b_out[number] if dropout else w.b_out[0] + w.b_out[1]
        y = torch.addmm(bias.to(dtype), m[:, output.columns], w.w_out[output.columns])  # (N, C)
        output.adapters.add(ops, m, y, u[:, output.inner], seed)
        stream = stream + _dropped(y, dropout, seed, number)
    return stream.view(x.shape), h, m[:, : shape.attention_width], u, mean, rstd, lse


def _keep(y: Tensor, h: Tensor, attended: Tensor, *others: Tensor) -> SevenTensors:
    """What `_forward` gives, with an attention's output of its own: all the rest of m may go."""
    u, mean, rstd, lse = others
    return y, h, attended.clone(), u, mean, rstd, lse


def _dropped(x: Tensor, p: float, seed: Tensor | None, number: int) -> Tensor:
    """Dropout, and its backward pass too."""
    if not p:
        return x
    assert seed is not None
    return x * keep_mask(x, p, seed, number) / (1 - p)


def _backward(
    dy: Tensor, x: Tensor, angles: list[Tensor], tables: list[Tensor | None], seed: Tensor | None, saved: list[Tensor],
    w: Joined, need: PerTensor,
) -> list[Tensor]:  # fmt: skip
    """dx, the gradients of `Joined`, each empty where none is needed, the LayerNorm's in one, dA and dB of adapters."""
    dropout, dtype = w.layout.dropout, w.layout.dtype
    shape, ops = Shape(*w.layout.dims), _ops(w.layout.triton)
    h, attended, u, mean, rstd, lse = saved
    rows, dy, flat = x.flatten(0, 1), dy.flatten(0, 1), h.flatten(0, 1)
    f, outputs = flat[:, shape.qkv_width :], w.outputs
    grads = [_dropped(dy, dropout, seed, number) for number in range(len(outputs))]  # of the outputs, (N, C)
    db_out = [grad.sum(dim=0, dtype=torch.float32) for grad in grads] if any(need.b_out) else []
    grads = [grad.to(dtype).contiguous() for grad in grads]  # sum().backward() sends expanded scalars

    dm = _side_by_side([grad @ w.w_out[o.columns].T for grad, o in zip(grads, outputs, strict=True)], dim=1)  # (N, M)
    dw_out, adapters_out = x.new_empty(0, dtype=dtype), []
    if any(need.w_out) or w.adapters_out:
        m = torch.empty_like(dm)
        m[:, : shape.attention_width] = attended
        ops.gelu(f, m[:, shape.attention_width :])
        for grad, output in zip(grads, outputs, strict=True):
            adapters_out += output.adapters.backward(ops, m, u[:, output.inner], grad, dm, seed)
        if any(need.w_out):
            products = [m[:, o.columns].T @ grad for grad, o in zip(grads, outputs, strict=True)]
            dw_out = _side_by_side(products, dim=0)  # (M, C)
        del m  # before attention needs room

    dh = torch.empty_like(h)  # (B, T, E)
    o, do = (shape.attention_columns(z.unflatten(0, x.shape[:2])) for z in (attended, dm))
    ops.attend_backward(do, *shape.split(h), o, lse, *shape.split(dh), Tables(*tables))
    ops.apply_rotary(shape.qk(dh), *angles, inverse=True)
    dh = dh.flatten(0, 1)  # (N, E)
    ops.gelu_backward(dm[:, shape.attention_width :], f, dh[:, shape.qkv_width :])

    dn, dw_in, adapters_in = dh @ w.w_in, x.new_empty(0, dtype=dtype), []  # (N, C)
    if any(need.w_in) or w.adapters_in:
        n = ops.normalised(rows, mean, rstd, w.norm_weight, w.norm_bias, dtype)
        dw_in = dh.T @ n if any(need.w_in) else dw_in  # (E, C)
        adapters_in = w.reading.backward(ops, n, u[:, : w.ranks_in], dh, dn, seed)
    dx, dnorm = ops.norm_backward(dn, rows, w.norm_weight, mean, rstd, dy, sums=any(need.norm))
    no_sums = x.new_empty(0, dtype=torch.float32)
    db_in = dh.sum(dim=0, dtype=torch.float32) if any(need.b_in) else no_sums
    db_out = torch.stack((db_out[0], db_out[-1])) if any(need.b_out) else no_sums.clone()  # (2, C)
    return [dx.view(x.shape), dnorm, dw_in, db_in, dw_out, db_out, *adapters_in, *adapters_out]


def _side_by_side(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


# ---- as operators, which a tracer sees from outside ----


@custom_op("phi2::block", mutates_args=())
def _traced_forward(
    x: Tensor, angles: list[Tensor], tables: list[Tensor | None], seed: Tensor | None, tensors: list[Tensor],
    eps: float, dropout: float, starts: list[int], ends: list[int], scalings: list[float], rates: list[float],
    into: int, dims: list[int], dtype: torch.dtype, triton: bool, adjacent: bool,
) -> SevenTensors:  # fmt: skip
    layout = Layout(eps, dropout, starts, ends, scalings, rates, into, dims, dtype, triton, adjacent)
    return _keep(*_forward(x, angles, tables, seed, joined(unflatten(tensors), layout)))


@custom_op("phi2::block_backward", mutates_args=())
def _traced_backward(
    dy: Tensor, x: Tensor, angles: list[Tensor], tables: list[Tensor | None], seed: Tensor | None, saved: list[Tensor],
    tensors: list[Tensor], needs: list[bool],
    eps: float, dropout: float, starts: list[int], ends: list[int], scalings: list[float], rates: list[float],
    into: int, dims: list[int], dtype: torch.dtype, triton: bool, adjacent: bool,
) -> list[Tensor]:  # fmt: skip
    layout = Layout(eps, dropout, starts, ends, scalings, rates, into, dims, dtype, triton, adjacent)
    return _backward(dy, x, angles, tables, seed, saved, joined(unflatten(tensors), layout), unflatten(needs))


@_traced_forward.register_fake
def _(x, angles, tables, seed, tensors, *layout):
    layout = Layout(*layout)
    shape, E = Shape(*layout.dims), sum(map(len, unflatten(tensors).w_in))
    h = x.new_empty((*x.shape[:2], E), dtype=layout.dtype)
    attended = h.new_empty((h.shape[0] * h.shape[1], shape.attention_width))
    u = x.new_empty((len(attended), sum(map(len, unflatten(tensors).matrices[::2]))), dtype=torch.float32)
    return torch.empty_like(x), h, attended, u, *_ops(layout.triton).empty_statistics(x, shape)


@_traced_backward.register_fake
def _(dy, x, angles, tables, seed, saved, tensors, needs, *layout):
    dtype, need, parts = Layout(*layout).dtype, unflatten(needs), unflatten(tensors)
    C, E, M = x.shape[2], sum(map(len, parts.w_in)), sum(w.shape[1] for w in parts.w_out)
    norm = x.new_empty((2, C if any(need.norm) else 0), dtype=torch.float32)
    dw_in = x.new_empty((E, C) if any(need.w_in) else 0, dtype=dtype)
    db_in = x.new_empty(E if any(need.b_in) else 0, dtype=torch.float32)
    dw_out = x.new_empty((M, C) if any(need.w_out) else 0, dtype=dtype)
    db_out = x.new_empty((2, C) if any(need.b_out) else 0, dtype=torch.float32)
    return [torch.empty_like(x), norm, dw_in, db_in, dw_out, db_out, *map(torch.empty_like, parts.matrices)]
