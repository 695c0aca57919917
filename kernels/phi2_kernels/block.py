"""A whole parallel block of Phi as two matmuls, with a backward pass of its own.

    n = LN(x)        [q k v f] = n W_in^T + b_in        m = [attention(rotary(q), rotary(k), v), gelu(f)]
    y = x + m W_out + b_out

Attention and MLP read the same n and are added to the same x, so [Wq; Wk; Wv; Wfc1] are one matrix and so are
[Wdense^T; Wfc2^T], and a layer takes two matmuls forward and four backward in place of six and twelve. All that
lies between is written straight into columns of three buffers, h = [q k v f], m, and their gradients.

Of a layer only x, h, the attention's output, two numbers a row and one a row and head are kept, and of adapters r
numbers a row; n and gelu(f) are made again on the way through their own gradients, the latter in place of m's. A pass
without gradient keeps nothing.

LoRA (`block_adapters.py`): adapters on q, k, v and fc1 read n, those on dense and fc2 their columns of m:

    h[:, span] += s (n A^T) B^T        y += s (m[:, span] A^T) B^T

Where the residual stream has dropout, attention's part of y and the MLP's are dropped apart, and the second matmul is
two. Masks come from a seed and are made again in the backward pass.

Dims: B batch, T tokens, N = B T rows, C hidden, H heads, H_kv key-value heads, D head dim, F mlp width,
E = (H + 2 H_kv) D + F columns of h, M = H D + F columns of m, r LoRA rank.
"""

from __future__ import annotations

from itertools import compress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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
from phi2_kernels.launch import Known
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

    def split(self, h: Tensor, T: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as views of h (N, E): (B, H or H_kv, T, D)."""
        k, v = self.heads * self.head_dim, (self.heads + self.kv_heads) * self.head_dim
        return _heads(h, T, self, 0), _heads(h, T, self, k, self.kv_heads), _heads(h, T, self, v, self.kv_heads)

    def qk(self, h: Tensor) -> Tensor:
        """q and k, the part of h (N, E) that is rotated, as (N, H + H_kv, D)."""
        size = (h.shape[0], self.heads + self.kv_heads, self.head_dim)
        return h.as_strided(size, (h.stride(0), self.head_dim, 1))

    def attention_columns(self, m: Tensor, T: int) -> Tensor:
        """The attention's columns of m (N, M) as (B, H, T, D)."""
        return _heads(m, T, self, 0)


def _heads(x: Tensor, T: int, shape: Shape, start: int, heads: int | None = None) -> Tensor:
    """Columns of x (N, any) from `start` on, as (B, heads, T, D)."""
    heads, D, row = heads or shape.heads, shape.head_dim, x.stride(0)
    return x.as_strided((x.shape[0] // max(1, T), heads, T, D), (T * row, D, row, 1), x.storage_offset() + start)


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
    layout = layout_of(weights, shape, dtype, triton)
    seed = new_seed() if layout.dropout or any(layout.rates) else None
    flat_angles = [_plain(table.flatten(0, 2)) for table in angles]  # (L, R/2) twice
    tables = list(_tables_of(visibility, shape.head_dim, dtype, triton))
    given, tensors = (_plain(x), flat_angles, tables, seed), tensors_of(weights)
    if torch.compiler.is_compiling():
        return _TracedBlock.apply(*given, layout, *flatten(tensors))
    ops = _ops(triton, _known_of(given[0], flat_angles[0], tensors, layout, visibility))
    if not torch.is_grad_enabled():
        return _forward(*given, joined(tensors, layout), ops)[0]
    flat = flatten(tensors)
    needs = [tensor.requires_grad for tensor in flat]
    return _Block.apply(*given, layout, ops, tensors, needs, *compress(flat, needs))


def _plain(x: Tensor) -> Tensor:
    """x in one piece that begins where 16 bytes do."""
    if torch.compiler.is_compiling():  # addresses cannot be traced
        return x.contiguous()
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


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


def _tables_of(visibility: Visibility, head_dim: int, dtype: torch.dtype, triton: bool) -> Tables:
    """What attention's kernels, or torch, read of a visibility."""
    key = head_dim, dtype, triton
    if key not in visibility.tables:
        head = torch.empty((0, head_dim), dtype=dtype, device=visibility.device)
        made = _ops(triton).tables_of(visibility, head)
        visibility.tables[key] = Tables(*(table if table is None else _plain(table) for table in made))
    return visibility.tables[key]


_KNOWN: dict[tuple, Known] = {}  # for all blocks of the process: there are few kinds


def _known_of(x: Tensor, cos: Tensor, tensors: PerTensor, layout: Layout, visibility: Visibility) -> Known | None:
    """The forms of kernels for a stream like x (B, T, C) and weights like these; None where they depend on more.

    Constants, and all that Triton looks at, are the same between two such calls, whatever B and T: dtypes, widths of
    rows, and that every tensor begins where 16 bytes do, as `_plain` ones and all that torch makes new.
    """
    if not layout.triton or layout.dtype.itemsize != 2:  # float32 products follow a setting of torch
        return None
    if tensors.norm[0].dtype != tensors.norm[1].dtype or any([x.dtype != torch.float32 for x in tensors.matrices]):
        return None
    widths = *tensors.w_out[1].shape, *[tensor.shape[0] for tensor in (*tensors.w_in, *tensors.matrices)]
    is_regular = all([width % 16 == 0 for width in widths[:6]]) and x.shape[0] * x.shape[1] * sum(widths[:6]) < 2**31
    if not is_regular or any([tensor.data_ptr() % 16 for tensor in (*tensors.norm, *tensors.matrices)]):
        return None
    dropped = bool(layout.dropout), *[rate > 0 for rate in layout.rates]
    adapters = layout.starts, layout.ends, layout.into, dropped
    dtypes = x.dtype, layout.dtype, tensors.norm[0].dtype, cos.dtype
    key = layout.dims, widths, cos.shape[1], adapters, dtypes, visibility.until is None, x.device
    return _KNOWN.setdefault(key, {})


def _ops(triton: bool, known: Known | None = None) -> Any:
    """The functions that fill the buffers between the matmuls."""
    if triton:
        from phi2_kernels.block_triton import Kernels

        return Kernels(known)
    from phi2_kernels import block_torch

    return block_torch


class _Block(torch.autograd.Function):
    """Of `tensors`, a `PerTensor`, those that need a gradient come again as `trained`."""

    @staticmethod
    def forward(ctx, x, angles, tables, seed, layout, ops, tensors, needs, *trained):
        w = joined(tensors, layout)
        y, *saved = _keep(*_forward(x, angles, tables, seed, w, ops))
        ctx.layout, ctx.ops, ctx.needs, ctx.w = layout, ops, needs, w if w.is_view else None  # copies are not kept
        ctx.save_for_backward(x, *angles, *tables, seed, *saved, *flatten(tensors))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        given, saved, tensors = _saved(ctx)
        w = joined(unflatten(tensors), ctx.layout) if ctx.w is None else ctx.w
        dx, *grads = _backward(dy, *given, saved, w, unflatten(ctx.needs), ctx.ops)
        trained = compress(zip(apart(grads, tensors), tensors, strict=True), ctx.needs)
        return dx, None, None, None, None, None, None, None, *(grad.to(t.dtype) for grad, t in trained)


class _TracedBlock(torch.autograd.Function):
    """The same, of which a tracer sees two operators."""

    @staticmethod
    def forward(ctx, x, angles, tables, seed, layout, *tensors):
        y, *saved = _traced_forward(x, angles, tables, seed, list(tensors), *layout)
        ctx.layout = layout
        ctx.save_for_backward(x, *angles, *tables, seed, *saved, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        given, saved, tensors = _saved(ctx)
        needs = list(ctx.needs_input_grad[5:])
        dx, *grads = _traced_backward(dy, *given, saved, tensors, needs, *ctx.layout)
        each = zip(apart(grads, tensors), tensors, needs, strict=True)
        return dx, None, None, None, None, *(grad.to(t.dtype) if need else None for grad, t, need in each)


def _saved(ctx) -> tuple[tuple, list[Tensor], list[Tensor]]:
    """x, angles, tables and seed; what `_forward` gave; all tensors of the block."""
    x, cos, sin, until, key_ranges, query_ends, seed, *others = ctx.saved_tensors
    return (x, [cos, sin], [until, key_ranges, query_ends], seed), others[:6], others[6:]


def _forward(
    x: Tensor, angles: list[Tensor], tables: list[Tensor | None], seed: Tensor | None, w: Joined, ops: Any
) -> SevenTensors:
    """y (B, T, C), and what the backward pass reads: h, attention's columns of m, u of adapters, mean, rstd, lse."""
    layout, shape, (B, T, C) = w.layout, Shape(*w.layout.dims), x.shape
    N, (M, _) = B * T, w.w_out.shape
    rows = x.view(N, C)
    n, mean, rstd = ops.norm(rows, w.norm_weight, w.norm_bias, layout.eps, layout.dtype)
    h = torch.addmm(w.b_in, n, w.w_in.T)  # (N, E)
    u = n.new_empty((N, w.ranks), dtype=torch.float32)  # inner products of all adapters
    w.reading.add(ops, n, h, u[:, : w.ranks_in], seed)
    ops.apply_rotary(shape.qk(h), *angles, inverse=False)
    m = n.new_empty((N, M))
    lse = ops.attend(*shape.split(h, T), shape.attention_columns(m, T), Tables(*tables))
    ops.gelu(h[:, shape.qkv_width :], m[:, shape.attention_width :])
    stream = rows
    for number, output in enumerate(w.outputs):
        y = torch.addmm(output.bias, output.of(m), output.weight)  # (N, C)
        output.adapters.add(ops, m, y, u[:, output.inner], seed)
        stream = stream + _dropped(y, layout.dropout, seed, number)
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
    w: Joined, need: PerTensor, ops: Any,
) -> list[Tensor]:  # fmt: skip
    """dx, the gradients of `Joined`, each empty where none is needed, the LayerNorm's in one, dA and dB of adapters."""
    layout, shape, (B, T, C) = w.layout, Shape(*w.layout.dims), x.shape
    dropout, dtype = layout.dropout, layout.dtype
    h, attended, u, mean, rstd, lse = saved
    rows, dy, outputs = x.view(B * T, C), _plain(dy.reshape(B * T, C)), w.outputs  # sum() sends expanded scalars
    f = h[:, shape.qkv_width :]
    grads = [_dropped(dy, dropout, seed, number) for number in range(len(outputs))]  # of the outputs, (N, C)
    db_out = [grad.sum(dim=0, dtype=torch.float32) for grad in grads] if any(need.b_out) else []
    grads = [grad.to(dtype) for grad in grads]

    dm = _side_by_side([grad @ o.weight.T for grad, o in zip(grads, outputs, strict=True)], dim=1)  # (N, M)
    sent = [o.adapters.send(ops, grad, dm, seed) for grad, o in zip(grads, outputs, strict=True)]
    dh = torch.empty_like(h)  # (N, E)
    out, dout = shape.attention_columns(attended, T), shape.attention_columns(dm, T)
    ops.attend_backward(dout, *shape.split(h, T), out, lse, *shape.split(dh, T), Tables(*tables))
    ops.apply_rotary(shape.qk(dh), *angles, inverse=True)
    wants_m, wants_n = bool(any(need.w_out) or w.adapters_out), bool(any(need.w_in) or w.adapters_in)
    ops.gelu_backward(dm[:, shape.attention_width :], f, dh[:, shape.qkv_width :], again=wants_m)
    dw_out, adapters_out = x.new_empty(0, dtype=dtype), []
    if wants_m:
        m = dm  # whose gradient has been read: m again, in its place
        m[:, : shape.attention_width] = attended
        for grad, o, du in zip(grads, outputs, sent, strict=True):
            adapters_out += o.adapters.gradients(ops, m, du, grad, u[:, o.inner], seed)
    if any(need.w_out):
        dw_out = _side_by_side([o.of(m).T @ grad for grad, o in zip(grads, outputs, strict=True)], dim=0)  # (M, C)

    dn = dh @ w.w_in  # (N, C)
    du = w.reading.send(ops, dh, dn, seed)
    norm = w.norm_weight, w.norm_bias, mean, rstd
    dx, dnorm, n = ops.norm_backward(dn, rows, *norm, dy, sums=any(need.norm), again=wants_n)
    adapters_in = w.reading.gradients(ops, n, du, dh, u[:, : w.ranks_in], seed)
    dw_in = dh.T @ n if any(need.w_in) else x.new_empty(0, dtype=dtype)  # (E, C)
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
    return _keep(*_forward(x, angles, tables, seed, joined(unflatten(tensors), layout), _ops(triton)))


@custom_op("phi2::block_backward", mutates_args=())
def _traced_backward(
    dy: Tensor, x: Tensor, angles: list[Tensor], tables: list[Tensor | None], seed: Tensor | None, saved: list[Tensor],
    tensors: list[Tensor], needs: list[bool],
    eps: float, dropout: float, starts: list[int], ends: list[int], scalings: list[float], rates: list[float],
    into: int, dims: list[int], dtype: torch.dtype, triton: bool, adjacent: bool,
) -> list[Tensor]:  # fmt: skip
    layout = Layout(eps, dropout, starts, ends, scalings, rates, into, dims, dtype, triton, adjacent)
    w = joined(unflatten(tensors), layout)
    return _backward(dy, x, angles, tables, seed, saved, w, unflatten(needs), _ops(triton))


@_traced_forward.register_fake
def _(x, angles, tables, seed, tensors, *layout):
    layout = Layout(*layout)
    shape, E = Shape(*layout.dims), sum(map(len, unflatten(tensors).w_in))
    h = x.new_empty((x.shape[0] * x.shape[1], E), dtype=layout.dtype)
    attended = h.new_empty((len(h), shape.attention_width))
    u = x.new_empty((len(h), sum(map(len, unflatten(tensors).matrices[::2]))), dtype=torch.float32)
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
