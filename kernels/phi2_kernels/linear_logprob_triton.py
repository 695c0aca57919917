"""The Triton kernel of `linear_logprob.py`: everything between the logits of a chunk and their gradient.

A program takes one row of float32 logits, 205 KB at V = 51200, and walks it twice: once for its maximum, sum, target
and entropy, once to write the gradient. One program fills a multiprocessor, so that the second walk finds the row in
the L2 cache (108 rows are 22 MB).

A gradient that is used at once is written over the logits. In half precision, which is what the matmuls behind it read,
it takes the first half of its row's bytes: a second buffer would move as many bytes but hold half a chunk more, or make
chunks a third smaller. Its columns [a, b) lie where the logits [a/2, b/2) were, never ahead of what has been read,
provided that the warps of a program stay together; a barrier in every step sees to that, and the next block is on its
way by then.

Every lane keeps its own running maximum and sums, with one exponential a logit; lanes meet once a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phi2_kernels._dispatch import architecture, on_its_device, power_of_2, tl, triton

_STATS = {"BLOCK_V": 8192, "num_warps": 32}  # one program fills a multiprocessor
LAUNCH = {80: {"stats": _STATS}, 90: {"stats": _STATS}}


@triton.jit
def _load_logits(logits_ptr, bias_ptr, cols, V):
    """-inf behind the last column, in either term. All rows read the bias: L1 is to keep it.  # [BLOCK_V]"""
    logits = tl.load(logits_ptr + cols, mask=cols < V, other=float("-inf"))
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + cols, mask=cols < V, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return logits


@triton.jit
def _write_gradient(
    logits_ptr, bias_ptr, grad_ptr, target, top, sum_exp, V, BARRIER: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """grad = onehot(target) - exp(logits - top) / sum_exp, a block behind the logits.  # [BLOCK_V]"""
    scale = 1.0 / sum_exp
    cols = tl.arange(0, BLOCK_V)
    logits = _load_logits(logits_ptr, bias_ptr, cols, V)
    for start in range(0, V, BLOCK_V):
        ahead = _load_logits(logits_ptr, bias_ptr, start + BLOCK_V + cols, V)
        grad = tl.where(start + cols == target, 1.0, 0.0) - tl.exp(logits - top) * scale
        if BARRIER:
            tl.debug_barrier()
        tl.store(grad_ptr + start + cols, grad, mask=start + cols < V)
        logits = ahead


@triton.jit
def _stats_kernel(
    logits_ptr, bias_ptr, targets_ptr, logp_ptr, entropy_ptr, grad_ptr, logits_stride, grad_stride, V,
    ENTROPY: tl.constexpr, GRADIENT: tl.constexpr, BARRIER: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < V)  # another target gives NaN, not a read beyond the row
    picked = tl.load(logits_ptr + target, mask=known, other=float("nan"))
    if bias_ptr is not None:
        picked += tl.load(bias_ptr + target, mask=known, other=0.0).to(tl.float32)
    cols = tl.arange(0, BLOCK_V)
    top = tl.full([BLOCK_V], -1e30, tl.float32)  # finite: a difference from it is a number
    total = tl.zeros([BLOCK_V], tl.float32)  # sum exp(logit - top)
    moment = tl.zeros([BLOCK_V], tl.float32)  # sum exp(logit - top) (logit - top)
    logits = _load_logits(logits_ptr, bias_ptr, cols, V)
    for start in range(0, V, BLOCK_V):
        ahead = _load_logits(logits_ptr, bias_ptr, start + BLOCK_V + cols, V)
        rise = logits - top
        is_top = rise > 0
        shrink = tl.exp(-tl.abs(rise))  # of what is there under a new maximum, or of the new logit
        if ENTROPY:
            rise = tl.where(start + cols < V, rise, 0.0)  # -inf behind the last column, where 0 * inf would be NaN
            moment = tl.where(is_top, (moment - rise * total) * shrink, moment + rise * shrink)
        total = tl.where(is_top, total * shrink + 1.0, total + shrink)
        top = tl.where(is_top, logits, top)
        logits = ahead
    highest = tl.max(top, axis=0)
    share = tl.exp(top - highest)
    sum_exp = tl.sum(total * share, axis=0)
    tl.store(logp_ptr + row, picked - highest - tl.log(sum_exp))
    if ENTROPY:
        mean = tl.sum((moment + (top - highest) * total) * share, axis=0) / sum_exp
        tl.store(entropy_ptr + row, tl.log(sum_exp) - mean)
    if GRADIENT:
        grad_ptr += row * grad_stride
        _write_gradient(logits_ptr, bias_ptr, grad_ptr, target, highest, sum_exp, V, BARRIER, BLOCK_V)


def room_over(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, V) of a dtype, in the memory of the logits."""
    return logits.view(dtype)[:, : logits.shape[1]]


@on_its_device
def stats(
    logits: Tensor, bias: Tensor | None, targets: Tensor, logp: Tensor, entropies: Tensor | None, grad: Tensor | None
) -> None:
    """Writes the log-probability of each row's target, its entropy and its gradient.

    Args:
        logits: (n, V) float32 without the bias, contiguous.
        bias: (V,) of any float dtype, or None.
        targets: (n,) int64.
        logp, entropies: (n,) float32; the last may be None.
        grad: (n, V) of any float dtype for onehot - softmax: `room_over` the logits or apart from them; or None.
    """
    if not logits.numel():
        return
    flags = _flags(logits, entropies, grad)
    strides = logits.stride(0), 0 if grad is None else grad.stride(0)
    _stats_kernel[(len(logits),)](logits, bias, targets, logp, entropies, grad, *strides, logits.shape[1], **flags)


def _flags(logits: Tensor, entropies: Tensor | None, grad: Tensor | None) -> dict[str, int | bool]:
    """Of a float32 gradient every thread writes what it has itself read; only a narrower one needs the barrier."""
    launch = LAUNCH[architecture(logits.device)]["stats"] | {"enable_fp_fusion": True}
    block = min(launch["BLOCK_V"], power_of_2(logits.shape[1]))
    forms = {"ENTROPY": entropies is not None, "GRADIENT": grad is not None}
    return launch | forms | {"BLOCK_V": block, "BARRIER": grad is not None and grad.dtype != torch.float32}
