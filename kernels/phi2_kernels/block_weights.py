"""The parameters of a fused block: as a caller names them, as a flat list, and those of a matmul as one matrix.

An operator of torch takes lists of tensors and of numbers, and its gradients may share no memory: `flatten` and
`unflatten` lead from one form to the other, `joined` to the matrices that `block.py` multiplies by, `apart` back.

Dims: C hidden, E columns of h, M columns of m (see `block.py`), r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi2_kernels.block_adapters import Adapter, AdapterGroup, group_of

IN_MASKS, OUT_MASKS = 2, 6  # numbers of the first masks of adapters; 0 and 1 are the residual stream's


class Weights(NamedTuple):
    """The parameters of a block.

    Attributes:
        norm_weight, norm_bias: (C,), of the LayerNorm; eps: added to its variance.
        w_in, b_in: weights (out, C) and biases (out,) of q, k, v, fc1.
        w_out, b_out: weights (C, in) and biases (C,) of dense, fc2.
        adapters_in, adapters_out: LoRA on columns of h, and on columns of m.
        dropout: of what is added to the residual stream.
        adjacent: the caller has seen that w_in, b_in and the transposes of w_out are neighbours in memory.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    eps: float
    w_in: tuple[Tensor, ...]
    b_in: tuple[Tensor, ...]
    w_out: tuple[Tensor, ...]
    b_out: tuple[Tensor, ...]
    adapters_in: tuple[Adapter, ...] = ()
    adapters_out: tuple[Adapter, ...] = ()
    dropout: float = 0.0
    adjacent: bool = False


class PerTensor(NamedTuple):
    """Something of each tensor of a block: itself, its gradient, or whether that is needed."""

    norm: Sequence[Any]  # weight and bias
    w_in: Sequence[Any]  # q, k, v, fc1
    b_in: Sequence[Any]
    w_out: Sequence[Any]  # dense, fc2
    b_out: Sequence[Any]
    matrices: Sequence[Any]  # A and B of each adapter, those on h first


def flatten(groups: PerTensor) -> list[Any]:
    return [each for group in groups for each in group]


def unflatten(flat: Iterable[Any]) -> PerTensor:
    rest = iter(flat)
    norm, w_in, b_in, w_out, b_out = (list(islice(rest, count)) for count in (2, 4, 4, 2, 2))
    return PerTensor(norm, w_in, b_in, w_out, b_out, list(rest))


def tensors_of(w: Weights) -> PerTensor:
    matrices = [matrix for adapter in w.adapters_in + w.adapters_out for matrix in (adapter.A, adapter.B)]
    return PerTensor((w.norm_weight, w.norm_bias), w.w_in, w.b_in, w.w_out, w.b_out, matrices)


class Layout(NamedTuple):
    """What a block is beside its tensors, in types that an operator of torch takes.

    Attributes:
        starts, ends, scalings, rates: of each adapter its columns, its scaling and the dropout of its input.
        into: how many of the adapters are on h.
        dims: of `block.Shape`.
        dtype: of the matmuls.
        triton: whether the kernels run between them.
        adjacent: as in `Weights`.
    """

    eps: float
    dropout: float
    starts: Sequence[int]
    ends: Sequence[int]
    scalings: Sequence[float]
    rates: Sequence[float]
    into: int
    dims: Sequence[int]
    dtype: torch.dtype
    triton: bool
    adjacent: bool


def layout_of(w: Weights, dims: tuple[int, ...], dtype: torch.dtype, triton: bool) -> Layout:
    adapters = w.adapters_in + w.adapters_out
    starts, ends, _, _, scalings, rates = zip(*adapters, strict=True) if adapters else ((),) * 6
    into = len(w.adapters_in)
    return Layout(w.eps, w.dropout, starts, ends, scalings, rates, into, dims, dtype, triton, w.adjacent)


class Output(NamedTuple):
    """A product with columns of m that is added to the residual stream, and its adapters with their columns of u.

    Attributes:
        columns: of m; None: all.
        weight, bias: (columns, C) and (C,).
        inner: columns of u.
    """

    columns: slice | None
    weight: Tensor
    bias: Tensor
    adapters: AdapterGroup
    inner: slice

    def of(self, m: Tensor) -> Tensor:
        """The columns of m (N, M) that the product reads."""
        return m if self.columns is None else m[:, self.columns]


@dataclass(eq=False)
class Joined:
    """A block as its passes take it: the tensors of each matmul together, in the dtype that it computes in.

    Attributes:
        w_in, b_in: (E, C) and (E,); w_out: (M, C); b_out: (C,) of dense and of fc2.
        adapters_in, adapters_out: LoRA on columns of h, and on columns of m.
        is_view: whether this is no more than where the tensors lie; else the matmuls have copies.
    """

    norm_weight: Tensor
    norm_bias: Tensor
    w_in: Tensor
    b_in: Tensor
    w_out: Tensor
    b_out: tuple[Tensor, Tensor]
    adapters_in: tuple[Adapter, ...]
    adapters_out: tuple[Adapter, ...]
    layout: Layout
    is_view: bool

    @cached_property
    def ranks_in(self) -> int:
        """The sum of the ranks of the adapters on h."""
        return sum(adapter.A.shape[0] for adapter in self.adapters_in)

    @cached_property
    def ranks(self) -> int:
        """The sum of all adapters' ranks."""
        return self.ranks_in + sum(adapter.A.shape[0] for adapter in self.adapters_out)

    @cached_property
    def reading(self) -> AdapterGroup:
        """The adapters from n to columns of h."""
        each, C = self.adapters_in, self.w_in.shape[1]
        return group_of(each, [(0, C)] * len(each), [(a.start, a.end) for a in each], IN_MASKS)

    @cached_property
    def outputs(self) -> list[Output]:
        """One of all columns of m, or two where attention and MLP have a dropout of their own."""
        if not self.layout.dropout:
            bias = (self.b_out[0] + self.b_out[1]).to(self.layout.dtype)
            return [Output(None, self.w_out, bias, self._writing(self.adapters_out), slice(self.ranks_in, None))]
        heads, _, head_dim = self.layout.dims
        cut = heads * head_dim
        first = tuple(adapter for adapter in self.adapters_out if adapter.start < cut)
        second = self.adapters_out[len(first) :]
        middle = self.ranks_in + sum(adapter.A.shape[0] for adapter in first)
        places = slice(0, cut), slice(cut, None)
        inner = slice(self.ranks_in, middle), slice(middle, None)
        groups = self._writing(first), self._writing(second, OUT_MASKS + len(first))
        weights, biases = [self.w_out[place] for place in places], [bias.to(self.layout.dtype) for bias in self.b_out]
        return [Output(*each) for each in zip(places, weights, biases, groups, inner, strict=True)]

    def _writing(self, each: tuple[Adapter, ...], first_mask: int = OUT_MASKS) -> AdapterGroup:
        """Adapters from columns of m to the residual stream."""
        C = self.w_out.shape[1]
        return group_of(each, [(a.start, a.end) for a in each], [(0, C)] * len(each), first_mask)


def joined(w: PerTensor, layout: Layout) -> Joined:
    """The tensors of a block together. Not to be called where torch records gradients."""
    into, matrices = layout.into, (w.matrices[::2], w.matrices[1::2])
    adapters = tuple(map(Adapter, layout.starts, layout.ends, *matrices, layout.scalings, layout.rates))
    parts = w.w_in, w.b_in, [weight.T for weight in w.w_out]
    w_in, b_in, w_out = (_one_matrix(each, layout.adjacent).to(layout.dtype) for each in parts)
    (weight, bias), (b_dense, b_fc2) = w.norm, w.b_out
    both, is_view = (adapters[:into], adapters[into:]), layout.adjacent and w.w_in[0].dtype == layout.dtype
    return Joined(weight, bias, w_in, b_in, w_out, (b_dense, b_fc2), *both, layout, is_view)


def apart(grads: list[Tensor], flat: list[Tensor]) -> list[Tensor]:
    """The gradients of `Joined`, one for each of the tensors; an empty one stands for all of its parts."""
    norm, w_in, b_in, w_out, b_out, *matrices = grads
    if not any(grad.numel() for grad in grads[:5]):  # adapters alone
        return [norm[0]] * (len(flat) - len(matrices)) + matrices
    tensors = unflatten(flat)

    def split(grad: Tensor, parts: Sequence[Tensor], dim: int = 0) -> list[Tensor]:
        return list(grad.split([p.shape[dim] for p in parts])) if grad.numel() else [grad] * len(parts)

    out = [g.T if g.ndim == 2 else g for g in split(w_out, tensors.w_out, dim=1)]
    b_dense, b_fc2 = b_out if b_out.numel() else (b_out, b_out)
    into = split(w_in, tensors.w_in), split(b_in, tensors.b_in)
    return flatten(PerTensor(list(norm), *into, out, (b_dense, b_fc2), matrices))


def are_adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether each tensor begins in memory where the one before it ends."""
    end = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            return False
        end += part.nbytes
    return parts[0].untyped_storage().data_ptr() == parts[-1].untyped_storage().data_ptr()


def _one_matrix(parts: Sequence[Tensor], adjacent: bool) -> Tensor:
    """The tensors as one along dim 0: where they lie, if they are neighbours, else a copy."""
    if not adjacent and not are_adjacent(parts):
        return torch.cat(list(parts))
    first, size = parts[0], list(parts[0].shape)
    size[0] = sum([part.shape[0] for part in parts])
    return first.as_strided(size, first.stride())
