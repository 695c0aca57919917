"""The Triton kernels of `block_adapters.py`: three products of LoRA, each in one launch for all adapters on a matmul.

    inner       u = x W^T           skinny: x is read once, r numbers a row are left
    add         y += keep (u W)     a walk over y, in which r multiply-adds a number are free
    gradients   dW = u^T x          a walk down the columns of x, for A and B at once

x and y are columns of a block's buffers in the dtype of its matmuls, u and the factors W are float32. Tensor cores
multiply a bfloat16 x by W as two halves, W = high + low with |W - high - low| <= 2^-17 |W|. Products of float32 on both
sides, and of float16, whose low halves would underflow, are three in TF32.

What is kept of x under dropout follows from a seed, the row and the column, and is made again wherever it is asked for.

A program axis counts the parts: an adapter, or RANKS of its ranks. What is the same in every pass, the columns and
sizes of the parts, are constants: each number that Triton has to look at takes the host a third of a microsecond.

Dims: N rows, K columns that an adapter reads or writes, r LoRA rank, R sum of the ranks.
Source: splitting as in arXiv:1803.04014; random numbers by counters, Salmon et al., SC 2011 (Philox, `tl.rand`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from phi2_kernels._dispatch import architecture, cdiv, on_its_device, power_of_2, tl, triton
from phi2_kernels.block_adapters import Side
from phi2_kernels.launch import Known, launch
from phi2_kernels.strided import strided

RANKS = 64  # of an adapter that a program takes at a time: more would not fit its registers
_KERNELS = {
    "inner": {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    "add": {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 1},
    "add dropped": {"BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 1},  # random numbers take registers
    "gradients": {"BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
}
LAUNCH = {80: _KERNELS, 90: _KERNELS}


class _Part(NamedTuple):
    """Some ranks of an adapter.

    Attributes:
        start, width: columns of x or y, from and how many (K).
        place, rank: columns of u, likewise.
        stride: of the factor's rows.
        adapter, first: which one it is of, and from which of its ranks on.
    """

    start: int
    width: int
    place: int
    rank: int
    stride: int
    adapter: int
    first: int


_FIELDS = {field: place for place, field in enumerate(_Part._fields)}


@triton.constexpr_function
def _of(parts, i, field):
    return parts[i][_FIELDS[field]]  # by place: the interpreter of Triton 3.6 makes them plain tuples


@triton.jit
def _factor_at(W, k, r, STRIDE: tl.constexpr, IS_OUTPUT: tl.constexpr):
    """Pointers to W (r, K), or to one that lies as (K, r).  # [k, r]"""
    if IS_OUTPUT:
        ptrs = W + k[:, None] * STRIDE + r[None, :]
    else:
        ptrs = W + r[None, :] * STRIDE + k[:, None]
    return ptrs


@triton.jit
def _kept(rows, k, K, seed, rate):
    """Whether numbers of an adapter's input are kept.  # [rows, k]"""
    return tl.rand(seed, rows[:, None] * K + k[None, :]) >= rate


@triton.jit
def _add_product(acc, x, w, UPCAST: tl.constexpr):
    """acc + x w, with x in the dtype of the matmuls and w float32."""
    if x.dtype == tl.bfloat16:
        high = w.to(tl.bfloat16)
        low = (w - high.to(tl.float32)).to(tl.bfloat16)
        if UPCAST:
            x, high, low = x.to(tl.float32), high.to(tl.float32), low.to(tl.float32)
        acc = tl.dot(x, high, tl.dot(x, low, acc))
    else:
        acc = tl.dot(x.to(tl.float32), w, acc, input_precision="tf32x3")
    return acc


@triton.jit(do_not_specialize=["N", "seed"])
def _inner_kernel(
    x, u, factors, scales, rates, masks, seed, N,
    PARTS: tl.constexpr, IS_OUTPUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows, r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    there = (rows < N)[:, None]
    x_ptrs = x.ptr + rows.to(tl.int64)[:, None] * x.strides[0]
    for i in tl.static_range(len(PARTS)):
        if tl.program_id(1) == i:
            K = _of(PARTS, i, "width")
            is_rank = (r < _of(PARTS, i, "rank"))[None, :]
            acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
            for start in range(0, K, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                tile = tl.load(x_ptrs + _of(PARTS, i, "start") + k[None, :], mask=there & (k < K)[None, :], other=0.0)
                if rates is not None:
                    tile = tl.where(_kept(rows, k, K, seed + masks[i], rates[i]), tile, 0.0).to(tile.dtype)
                ptrs = _factor_at(factors[i], k, r, _of(PARTS, i, "stride"), IS_OUTPUT)
                acc = _add_product(acc, tile, tl.load(ptrs, mask=(k < K)[:, None] & is_rank, other=0.0), UPCAST)
            u_ptrs = u.ptr + rows.to(tl.int64)[:, None] * u.strides[0] + _of(PARTS, i, "place") + r[None, :]
            tl.store(u_ptrs, acc * scales[i], mask=there & is_rank)


@triton.jit(do_not_specialize=["N", "seed"])
def _add_kernel(
    y, u, factors, rates, masks, seed, N,
    FIRST: tl.constexpr, LAST: tl.constexpr, PARTS: tl.constexpr, IS_OUTPUT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Columns FIRST to LAST of y: those that any adapter writes."""
    begin = FIRST + tl.program_id(1) * BLOCK_K
    rows, columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), begin + tl.arange(0, BLOCK_K)
    r, there = tl.arange(0, BLOCK_R), (rows < N)[:, None]
    y_ptrs = y.ptr + rows.to(tl.int64)[:, None] * y.strides[0] + columns[None, :]
    u_ptrs = u.ptr + rows.to(tl.int64)[:, None] * u.strides[0] + r[None, :]
    acc = tl.load(y_ptrs, mask=there & (columns < LAST)[None, :], other=0.0).to(tl.float32)
    for i in tl.static_range(len(PARTS)):
        K = _of(PARTS, i, "width")
        k = columns - _of(PARTS, i, "start")
        if (begin < _of(PARTS, i, "start") + K) & (begin + BLOCK_K > _of(PARTS, i, "start")):
            is_rank = (r < _of(PARTS, i, "rank"))[None, :]
            ptrs = _factor_at(factors[i], k, r, _of(PARTS, i, "stride"), IS_OUTPUT)
            factor = tl.load(ptrs, mask=((k >= 0) & (k < K))[:, None] & is_rank, other=0.0)
            inner = tl.load(u_ptrs + _of(PARTS, i, "place"), mask=there & is_rank, other=0.0)
            change = tl.dot(inner, tl.trans(factor), input_precision="tf32x3")
            if rates is not None:
                change = tl.where(_kept(rows, k, K, seed + masks[i], rates[i]), change, 0.0)
            acc += change
    tl.store(y_ptrs, acc, mask=there & (columns < LAST)[None, :])


@triton.jit
def _store_gradients(
    u, x, grads, rates, masks, seed, N, axis,
    PARTS: tl.constexpr, IS_OUTPUT: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_K
    k, r = first + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    for i in tl.static_range(len(PARTS)):
        K = _of(PARTS, i, "width")
        if (axis == i) & (first < K):
            is_column, is_rank = (k < K)[None, :], (r < _of(PARTS, i, "rank"))[None, :]
            acc = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
            for start in range(0, N, BLOCK_N):
                rows = start + tl.arange(0, BLOCK_N)
                there, row = (rows < N)[:, None], rows.to(tl.int64)[:, None]
                x_ptrs = x.ptr + row * x.strides[0] + _of(PARTS, i, "start") + k[None, :]
                tile = tl.load(x_ptrs, mask=there & is_column, other=0.0)
                if rates is not None:
                    tile = tl.where(_kept(rows, k, K, seed + masks[i], rates[i]), tile, 0.0).to(tile.dtype)
                u_ptrs = u.ptr + row * u.strides[0] + _of(PARTS, i, "place") + r[None, :]
                acc = _add_product(acc, tl.trans(tile), tl.load(u_ptrs, mask=there & is_rank, other=0.0), UPCAST)
            ptrs = _factor_at(grads[i], k, r, _of(PARTS, i, "stride"), IS_OUTPUT)
            tl.store(ptrs, acc, mask=(k < K)[:, None] & is_rank)


@triton.jit(do_not_specialize=["N", "seed"])
def _gradients_kernel(
    du, x, u, dy, grads_a, grads_b, rates, masks, seed, N,
    PARTS_A: tl.constexpr, PARTS_B: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    axis = tl.program_id(1)
    _store_gradients(du, x, grads_a, rates, masks, seed, N, axis, PARTS_A, False, UPCAST, BLOCK_N, BLOCK_K, BLOCK_R)
    axis -= len(PARTS_A)
    _store_gradients(u, dy, grads_b, None, None, 0, N, axis, PARTS_B, True, UPCAST, BLOCK_N, BLOCK_K, BLOCK_R)


@on_its_device
def inner(
    x: Tensor, u: Tensor, side: Side, scales: Sequence[float], seed: Tensor | None, known: Known | None = None
) -> None:
    """Writes u (N, R): the columns of x (N, any) that each adapter reads, times its factor and its scale."""
    if not u.numel():
        return
    parts, own, N = _parts_of(side), LAUNCH[architecture(x.device)]["inner"], x.shape[0]
    factors, each = _factors(side, parts, side.factors), tuple(scales[part.adapter] for part in parts)
    launch(
        _inner_kernel, (cdiv(N, own["BLOCK_N"]), len(parts), 1),
        (strided(x), strided(u), factors, each, *_dropout(side, parts, seed), N),
        lambda: {"PARTS": parts, "IS_OUTPUT": side.is_output, "UPCAST": not x.is_cuda, **_options(own, parts)},
        known, ("inner", side.name),
    )  # fmt: skip


@on_its_device
def add(y: Tensor, u: Tensor, side: Side, seed: Tensor | None, known: Known | None = None) -> None:
    """Adds to the columns of y (N, any) that each adapter writes its part of u (N, R) times its factor."""
    if not u.numel():
        return
    parts, own = _parts_of(side), LAUNCH[architecture(y.device)]["add dropped" if side.rates else "add"]
    first, last, N = min(start for start, _ in side.spans), max(end for _, end in side.spans), y.shape[0]
    launch(
        _add_kernel, (cdiv(N, own["BLOCK_N"]), cdiv(last - first, own["BLOCK_K"]), 1),
        (strided(y), strided(u), _factors(side, parts, side.factors), *_dropout(side, parts, seed), N),
        lambda: {"FIRST": first, "LAST": last, "PARTS": parts, "IS_OUTPUT": side.is_output, **_options(own, parts)},
        known, ("add", side.name),
    )  # fmt: skip


@on_its_device
def gradients(
    x: Tensor, du: Tensor, input: Side, dy: Tensor, u: Tensor, output: Side, seed: Tensor | None,
    known: Known | None = None,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """dA and dB: of each adapter its du times the columns of x (N, any), its u (N, R) times those of dy (N, any)."""
    dA, dB = ([torch.empty_like(factor) for factor in side.factors] for side in (input, output))
    if not u.numel():
        return [grad.zero_() for grad in dA], [grad.zero_() for grad in dB]
    a, b, own = _parts_of(input), _parts_of(output), LAUNCH[architecture(x.device)]["gradients"]
    widest, factors = max(part.width for part in a + b), (_factors(input, a, dA), _factors(output, b, dB))
    launch(
        _gradients_kernel, (cdiv(widest, own["BLOCK_K"]), len(a) + len(b), 1),
        (*map(strided, (du, x, u, dy)), *factors, *_dropout(input, a, seed), x.shape[0]),
        lambda: {"PARTS_A": a, "PARTS_B": b, "UPCAST": not x.is_cuda, **_options(own, a)},
        known, ("gradients", input.name),
    )  # fmt: skip
    return dA, dB


def _parts_of(side: Side) -> tuple[_Part, ...]:
    return _cut(side.spans, side.ranks, side.is_output)


@cache
def _cut(spans: tuple[tuple[int, int], ...], ranks: tuple[int, ...], is_output: bool) -> tuple[_Part, ...]:
    parts, place = [], 0
    for i, ((start, end), rank) in enumerate(zip(spans, ranks, strict=True)):
        stride = rank if is_output else end - start
        for first in range(0, rank, RANKS):
            part = _Part(start, end - start, place + first, min(RANKS, rank - first), stride, i, first)
            parts.append(part)
        place += rank
    return tuple(parts)


def _factors(side: Side, parts: tuple[_Part, ...], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A factor, or a gradient that lies like one, for each part."""
    if len(parts) == len(factors):
        return tuple(factors)
    return tuple(factors[part.adapter].narrow(int(side.is_output), part.first, part.rank) for part in parts)


def _dropout(side: Side, parts: tuple[_Part, ...], seed: Tensor | None) -> tuple[Any, Any, int]:
    """Rates and numbers of the parts' masks, and the seed."""
    if not side.rates:
        return None, None, 0
    assert seed is not None
    which = [part.adapter for part in parts]
    return tuple(float(side.rates[i]) for i in which), tuple(side.masks[i] for i in which), int(seed)


def _options(own: dict[str, int], parts: tuple[_Part, ...]) -> dict[str, Any]:
    return {"BLOCK_R": _block_of(parts), "enable_fp_fusion": True, **own}


@cache
def _block_of(parts: tuple[_Part, ...]) -> int:
    """A power of two, of which a matrix instruction takes 16 at least."""
    return max(16, *(power_of_2(part.rank) for part in parts))
