"""Products with float32 accumulation and result, of half-precision operands and of half and float32 ones.

    matmul: a b        weighted_matmul: a diag(w) b        product: a b, b float32

A large half-precision a times a skinny float32 b, as of LoRA on the head, needs neither a float32 copy of a nor a
matmul without tensor cores: b is written as two halves, whose products with a are added.

    high = half(b)     low = half(b - high)     |b - high - low| <= 2^-17 |b| in bfloat16, 2^-23 |b| in float16

In float16 a factor is first multiplied by a power of two. Its low half would often lie below the smallest float16 (B of
LoRA starts at zero and takes small steps), and under a loss scale gradients times B can lie above the largest.
bfloat16 has the exponents of float32.

Source: splitting as in arXiv:1803.04014 and arXiv:2203.03341, which scales against underflow too.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b plus a bias in float32, (n, m); half-precision operands stay half on a GPU.

    Args:
        a: (n, k), cast to the dtype of b on a GPU.
        b: (k, m), any strides.
        bias: (m,) float32.
    """
    if b.is_cuda and b.dtype != torch.float32:
        result = torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
        return result if bias is None else result.add_(bias)
    a, b = a.float(), b.float()
    return a @ b if bias is None else torch.addmm(bias, a, b)


def weighted_matmul(a: Tensor, weights: Tensor, b: Tensor) -> Tensor:
    """a diag(weights) b in float32, (n, m). The rows of b are multiplied, and rounded to the dtype of a.

    In float16 they are so by weights of at most 1: under a loss scale they would be infinite, and without one vanish.

    Args:
        a: (n, k), any strides.
        weights: (k, 1) float32.
        b: (k, m).
    """
    if a.dtype != torch.float16:
        return matmul(a, _weighted(b, weights, a.dtype))
    exponent = _exponent(weights)
    return torch.ldexp(matmul(a, _weighted(b, torch.ldexp(weights, -exponent), a.dtype)), exponent)


def _weighted(b: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(b, weights, out=torch.empty_like(b, dtype=dtype))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, (n, m).

    Args:
        a: (n, k), half precision or float32.
        b: (k, m) float32.
    """
    if a.dtype == torch.float32:
        return a @ b
    if a.dtype == torch.bfloat16:
        return _product(a, b)
    shift = 15 - _exponent(b)  # the largest comes just under 2^15, so that small ones have most room
    return torch.ldexp(_product(a, torch.ldexp(b, shift)), -shift)


def _product(a: Tensor, b: Tensor) -> Tensor:
    both = matmul(a, _halves(b, a.dtype))  # (n, 2 m)
    return both.unflatten(1, (2, -1)).sum(dim=1)


def _halves(w: Tensor, dtype: torch.dtype) -> Tensor:
    """The high half of w (n, k) and its low one side by side, (n, 2 k)."""
    halves = w.new_empty((len(w), 2, w.shape[1]), dtype=dtype)
    halves[:, 0] = w
    torch.sub(w, halves[:, 0], out=halves[:, 1])  # in float32, rounded as it is written
    return halves.flatten(1)


def _exponent(w: Tensor) -> Tensor:
    """The least e with |w| < 2^e, as a tensor: no GPU is asked. 0 for zeros, and not so low that 2^-e is infinite."""
    return torch.frexp(torch.linalg.vector_norm(w, math.inf)).exponent.clamp(min=-100)
