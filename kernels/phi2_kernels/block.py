"""A whole parallel block of Phi as two matmuls, with a backward pass of its own.

    n = LN(x)        [q k v f] = n W_in^T + b_in        m = [attention(rotary(q), rotary(k), v), gelu(f)]
    y = x + m W_out + b_out

Attention and MLP read the same n and are added to the same x, so [Wq; Wk; Wv; Wfc1] are one matrix and so are
[Wdense^T; Wfc2^T], and a layer takes two matmuls forward and four backward in place of six and twelve. All that
lies between is written straight into columns of three buffers, h = [q k v f], m, and their gradients.

Of a layer only x, h, the attention's output, two numbers a row and one a row and head are kept; n and gelu(f) are
made again.

LoRA (`block_adapters.py`): adapters on q, k, v and fc1 read n, those on dense and fc2 their columns of m:

    h[:, span] += s (n A^T) B^T        y += s (m[:, span] A^T) B^T

Where the residual stream has dropout, attention's part of y and the MLP's are dropped apart, and the second matmul is
two. Masks come from a seed and are made again in the backward pass (`dropout.py`).

Dims: B batch, T tokens, N = B T rows, C hidden, H heads, H_kv key-value heads, D head dim, F mlp width,
E = (H + 2 H_kv) D + F columns of h, M = H D + F columns of m, r LoRA rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import use_triton
from phi2_kernels.attention import unsupported_heads
from phi2_kernels.block_adapters import Adapter, AdapterGroup, adapters_backward, add_adapters, group_adapters
from phi2_kernels.dropout import keep_mask, new_seed
from phi2_kernels.layer_norm import MAX_COLUMNS
from phi2_kernels.visibility import Visibility

PLAIN = 14  # tensors of a block without adapters
IN_MASKS, OUT_MASKS = 2, 6  # numbers of the first masks of adapters; 0 and 1 are the residual stream's


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
        """q, k, v as views of h (B, T, E): (B, H or H_kv, T, D)."""
        sizes = [self.attention_width, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        parts = h[..., : self.qkv_width].split(sizes, dim=-1)
        return tuple(part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in parts)

    def qk(self, h: Tensor) -> Tensor:
        """q and k, the part of h (B, T, E) that is rotated, as (N, H + H_kv, D)."""
        columns = (self.heads + self.kv_heads) * self.head_dim
        return h.flatten(0, 1)[:, :columns].unflatten(-1, (-1, self.head_dim))

    def attention_columns(self, m: Tensor) -> Tensor:
        """The attention's columns of m (B, T, M) as (B, H, T, D)."""
        return m[..., : self.attention_width].unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Weights(NamedTuple):
    """The parameters of a block.

    Attributes:
        norm_weight, norm_bias: (C,), of the LayerNorm; eps: added to its variance.
        w_in, b_in: weights (out, C) and biases (out,) of q, k, v, fc1.
        w_out, b_out: weights (C, in) and biases (C,) of dense, fc2.
        adapters_in, adapters_out: LoRA on columns of h, and on columns of m.
        dropout: of what is added to the residual stream.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    w_in: tuple[Tensor, Tensor, Tensor, Tensor]
    b_in: tuple[Tensor, Tensor, Tensor, Tensor]
    w_out: tuple[Tensor, Tensor]
    b_out: tuple[Tensor, Tensor]
    adapters_in: tuple[Adapter, ...] = ()
    adapters_out: tuple[Adapter, ...] = ()
    dropout: float = 0.0


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
    triton = use_triton(impl, x, lambda: _unsupported_reason(x, shape, visibility))
    x = x.contiguous()
    plain = weights.norm_weight, weights.norm_bias, *weights.w_in, *weights.b_in, *weights.w_out, *weights.b_out
    adapters = weights.adapters_in + weights.adapters_out
    matrices = [matrix for adapter in adapters for matrix in (adapter.A, adapter.B)]
    spans = [edge for adapter in adapters for edge in (adapter.start, adapter.end)]
    rates = [weights.dropout, *(adapter.dropout for adapter in adapters)]
    numbers = [weights.eps, *(adapter.scaling for adapter in adapters), *rates]
    seeds = [new_seed()] if any(rates) else []
    layout = (spans, numbers, len(weights.adapters_in), list(shape), dtype or x.dtype, triton)
    tables = [table.flatten(0, 2).contiguous() for table in angles]  # (L, R/2)
    masks = _ops(triton).masks(visibility, x.new_empty(0, dtype=dtype or x.dtype))
    return _BlockFunction.apply(x, tables, masks, seeds, layout, *plain, *matrices)


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


def _ops(triton: bool):
    """The module whose functions fill the buffers between the matmuls."""
    if triton:
        from phi2_kernels import block_triton

        return block_triton
    from phi2_kernels import block_torch

    return block_torch


class _BlockFunction(torch.autograd.Function):
    """`tensors` are the PLAIN ones of the block, in the order of `Weights`, then A and B of each adapter."""

    @staticmethod
    def forward(ctx, x, tables, masks, seeds, layout, *tensors):
        y, *kept = _forward(x, tables, masks, seeds, list(tensors), *layout)
        ctx.layout, ctx.counts = layout, (len(tables), len(masks), len(seeds), len(kept))
        ctx.save_for_backward(x, *tables, *masks, *seeds, *kept, *tensors)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, *rest = ctx.saved_tensors
        groups = []
        for count in ctx.counts:
            groups.append(rest[:count])
            rest = rest[count:]
        needs = list(ctx.needs_input_grad[5:])
        dx, *grads = _backward(dy, x, *groups, rest, needs, *ctx.layout)
        grads = _apart(grads, rest)
        asked = zip(grads, rest, needs, strict=True)
        return dx, None, None, None, None, *(g.to(t.dtype) if need else None for g, t, need in asked)


class _Parts(NamedTuple):
    """The tensors of a block, those of each matmul together."""

    norm_weight: Tensor  # (C,)
    norm_bias: Tensor  # (C,)
    w_in: Tensor  # (E, C)
    b_in: Tensor  # (E,)
    w_out: Tensor  # (M, C)
    b_out: tuple[Tensor, Tensor]  # (C,) each
    adapters_in: tuple[Adapter, ...]
    adapters_out: tuple[Adapter, ...]
    dropout: float


def _parts(tensors: list[Tensor], spans: list[int], numbers: list[float], into: int, dtype: torch.dtype) -> _Parts:
    """The matmuls' tensors in the dtype they compute in; the first `into` adapters are those on h."""
    count = len(spans) // 2
    scalings, (dropout, *rates) = numbers[1 : 1 + count], numbers[1 + count :]
    columns, matrices = (spans[::2], spans[1::2]), (tensors[PLAIN::2], tensors[PLAIN + 1 :: 2])
    adapters = tuple(map(Adapter, *columns, *matrices, scalings, rates))
    w_in, b_in, w_out = tensors[2:6], tensors[6:10], [w.T for w in tensors[10:12]]
    joined = (_joined(parts).to(dtype) for parts in (w_in, b_in, w_out))
    return _Parts(*tensors[:2], *joined, tuple(tensors[12:14]), adapters[:into], adapters[into:], dropout)


class _Output(NamedTuple):
    """A product with columns of m that is added to the residual stream."""

    columns: slice
    bias: Tensor
    adapters: list[tuple[AdapterGroup, slice]]  # adapters, each with the columns of m it reads


def _outputs(w: _Parts, shape: Shape) -> list[_Output]:
    """One of all columns, or two where attention and MLP have a dropout of their own."""
    each = [(AdapterGroup((a,), OUT_MASKS + i), slice(a.start, a.end)) for i, a in enumerate(w.adapters_out)]
    if not w.dropout:
        return [_Output(slice(None), w.b_out[0] + w.b_out[1], each)]
    cut = shape.attention_width
    first, second = ([pair for pair in each if (pair[1].start < cut) == is_first] for is_first in (True, False))
    return [_Output(slice(0, cut), w.b_out[0], first), _Output(slice(cut, None), w.b_out[1], second)]


def _apart(grads: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The gradients of `_Parts`, one for each of the tensors; an empty one stands for all of its parts."""
    norm, w_in, b_in, w_out, b_out, *adapters = grads
    b_out = b_out if b_out.numel() else [b_out] * 2

    def split(grad: Tensor, parts: list[Tensor], dim: int = 0) -> list[Tensor]:
        return list(grad.split([p.shape[dim] for p in parts])) if grad.numel() else [grad] * len(parts)

    out = [g.T if g.ndim == 2 else g for g in split(w_out, tensors[10:12], dim=1)]
    return [
        *norm, *split(w_in, tensors[2:6]), *split(b_in, tensors[6:10]), *out, *b_out, *adapters
    ]  # fmt: skip


def are_adjacent(parts: list[Tensor]) -> bool:
    """Whether each tensor begins in memory where the one before it ends."""
    ends = [part.data_ptr() + part.numel() * part.element_size() for part in parts]
    storages = {part.untyped_storage().data_ptr() for part in parts}
    begins_at_end = all(part.data_ptr() == end for part, end in zip(parts[1:], ends, strict=False))
    return len(storages) == 1 and begins_at_end and all(part.is_contiguous() for part in parts)


def _joined(parts: list[Tensor]) -> Tensor:
    """The tensors as one along dim 0: where they lie, if they are neighbours, else a copy."""
    if not are_adjacent(parts):
        return torch.cat(parts)
    first = parts[0]
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())


@custom_op("phi2::block", mutates_args=())
def _forward(
    x: Tensor, tables: list[Tensor], masks: list[Tensor], seeds: list[Tensor], tensors: list[Tensor], spans: list[int],
    numbers: list[float], into: int, dims: list[int], dtype: torch.dtype, triton: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (B, T, C), and what the backward pass reads: h, the attention's output, mean, rstd, logsumexp."""
    w, shape, ops = _parts(tensors, spans, numbers, into, dtype), Shape(*dims), _ops(triton)
    seed, rows = next(iter(seeds), None), x.flatten(0, 1)  # (N, C)
    n, mean, rstd = ops.norm(rows, w.norm_weight, w.norm_bias, numbers[0], dtype)
    h = torch.addmm(w.b_in, n, w.w_in.T)  # (N, E)
    for group in group_adapters(w.adapters_in, IN_MASKS):
        add_adapters(group, n, [h[:, a.start : a.end] for a in group.adapters], seed)
    h = h.unflatten(0, x.shape[:2])  # (B, T, E)
    ops.apply_rotary(shape.qk(h), *tables, inverse=False)
    m = torch.empty((*h.shape[:2], w.w_out.shape[0]), dtype=dtype, device=x.device)  # (B, T, M)
    lse = ops.attend(*shape.split(h), shape.attention_columns(m), masks)
    m, f = m.flatten(0, 1), h.flatten(0, 1)[:, shape.qkv_width :]
    ops.gelu(f, m[:, shape.attention_width :])
    stream = rows
    for number, output in enumerate(_outputs(w, shape)):
        y = torch.addmm(output.bias.to(dtype), m[:, output.columns], w.w_out[output.columns])  # (N, C)
        for group, columns in output.adapters:
            add_adapters(group, m[:, columns], [y], seed)
        stream = stream + _dropped(y, w.dropout, seed, number)
    attended = m[:, : shape.attention_width].clone()  # (N, H D), not a view: the rest of m may go
    return stream.view(x.shape), h, attended, mean, rstd, lse


def _dropped(x: Tensor, p: float, seed: Tensor | None, number: int) -> Tensor:
    """Dropout, and its backward pass too."""
    return x * keep_mask(x, p, seed, number) / (1 - p) if p else x


@custom_op("phi2::block_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, tables: list[Tensor], masks: list[Tensor], seeds: list[Tensor], kept: list[Tensor],
    tensors: list[Tensor], needs: list[bool], spans: list[int], numbers: list[float], into: int, dims: list[int],
    dtype: torch.dtype, triton: bool,
) -> list[Tensor]:  # fmt: skip
    """dx, the gradients of `_Parts`, each empty where none is needed, the LayerNorm's in one, dA and dB of adapters."""
    w, shape, ops = _parts(tensors, spans, numbers, into, dtype), Shape(*dims), _ops(triton)
    h, attended, mean, rstd, lse = kept
    groups = (needs[:2], needs[2:6], needs[6:10], needs[10:12], needs[12:14])
    need_norm, need_w_in, need_b_in, need_w_out, need_b_out = map(any, groups)
    seed, rows, dy, flat = next(iter(seeds), None), x.flatten(0, 1), dy.flatten(0, 1), h.flatten(0, 1)
    f, outputs = flat[:, shape.qkv_width :], _outputs(w, shape)
    grads = [_dropped(dy, w.dropout, seed, number) for number in range(len(outputs))]  # of the outputs, (N, C)
    db_out = [grad.sum(dim=0, dtype=torch.float32) for grad in grads] if need_b_out else []
    grads = [grad.to(dtype) for grad in grads]

    dm = _side_by_side([grad @ w.w_out[o.columns].T for grad, o in zip(grads, outputs, strict=True)], dim=1)  # (N, M)
    dw_out, adapters_out = x.new_empty(0, dtype=dtype), []
    if need_w_out or w.adapters_out:
        m = torch.empty_like(dm)
        m[:, : shape.attention_width] = attended
        ops.gelu(f, m[:, shape.attention_width :])
        for grad, output in zip(grads, outputs, strict=True):
            for group, columns in output.adapters:
                adapters_out += adapters_backward(group, m[:, columns], [grad], dm[:, columns], seed)
        if need_w_out:
            products = [m[:, o.columns].T @ grad for grad, o in zip(grads, outputs, strict=True)]
            dw_out = _side_by_side(products, dim=0)  # (M, C)
        del m  # before attention needs room

    dh = torch.empty_like(h)  # (B, T, E)
    o, do = (shape.attention_columns(z.unflatten(0, x.shape[:2])) for z in (attended, dm))
    ops.attend_backward(do, *shape.split(h), o, lse, *shape.split(dh), masks)
    ops.apply_rotary(shape.qk(dh), *tables, inverse=True)
    dh = dh.flatten(0, 1)  # (N, E)
    ops.gelu_backward(dm[:, shape.attention_width :], f, dh[:, shape.qkv_width :])

    dn, dw_in, adapters_in = dh @ w.w_in, x.new_empty(0, dtype=dtype), []  # (N, C)
    if need_w_in or w.adapters_in:
        n = ops.normalised(rows, mean, rstd, w.norm_weight, w.norm_bias, dtype)
        dw_in = dh.T @ n if need_w_in else dw_in  # (E, C)
        for group in group_adapters(w.adapters_in, IN_MASKS):
            adapters_in += adapters_backward(group, n, [dh[:, a.start : a.end] for a in group.adapters], dn, seed)
    dx, dnorm = ops.norm_backward(dn, rows, w.norm_weight, mean, rstd, dy, sums=need_norm)
    no_sums = x.new_empty(0, dtype=torch.float32)
    db_in = dh.sum(dim=0, dtype=torch.float32) if need_b_in else no_sums
    db_out = torch.stack((db_out[0], db_out[-1])) if need_b_out else no_sums.clone()  # (2, C)
    return [dx.view(x.shape), dnorm, dw_in, db_in, dw_out, db_out, *adapters_in, *adapters_out]


def _side_by_side(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@_forward.register_fake
def _(x, tables, masks, seeds, tensors, spans, numbers, into, dims, dtype, triton):
    shape = Shape(*dims)
    h = x.new_empty((*x.shape[:2], sum(map(len, tensors[2:6]))), dtype=dtype)
    attended = h.new_empty((h.shape[0] * h.shape[1], shape.attention_width))
    return torch.empty_like(x), h, attended, *_ops(triton).empty_statistics(x, shape)


@_backward.register_fake
def _(dy, x, tables, masks, seeds, kept, tensors, needs, spans, numbers, into, dims, dtype, triton):
    shape, C, E = Shape(*dims), x.shape[2], kept[0].shape[2]
    M = E - shape.qkv_width + shape.attention_width
    groups = (needs[2:6], needs[6:10], needs[10:12], needs[12:14])
    sizes, dtypes = ((E, C), (E,), (M, C), (2, C)), (dtype, torch.float32) * 2
    norm = x.new_empty((2, C if any(needs[:2]) else 0), dtype=torch.float32)
    plain = [
        x.new_empty(size if any(group) else 0, dtype=kind)
        for group, size, kind in zip(groups, sizes, dtypes, strict=True)
    ]
    return [torch.empty_like(x), norm, *plain, *(torch.empty_like(t) for t in tensors[PLAIN:])]
