"""The three forms in which a weight W (N, K) is kept, for products whose time is that of reading it.

    floating point    W[n, k]
    int8              W[n, k] = scale[n] code[n, k]                             code in -127..127
    int4              W[n, k] = scale[n, g] (code[n, k] - zero[n, g])           g = k // G, code in 0..15
                      packed[n, g G/2 + i] = code[n, g G + i] + 16 code[n, g G + G/2 + i]       i < G/2

A byte of the last holds columns half a group apart, so that both nibbles of neighbouring bytes meet neighbouring x.
Weights are rounded to nearest, without data.

Dims: N outputs, K inputs, G neighbouring columns of a row that share a scale.
Source: arXiv:2210.17323 section 4 for grouped 4-bit weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from phi2_kernels._dispatch import unsupported_layout

SLICE = 1 << 22  # weights that are rounded at a time


class Weight(NamedTuple):
    """A weight in one of the forms, and its bias.

    Attributes:
        codes: (N, K) floating point or int8, or (N, K/2) uint8.
        scales: (N,) of int8, (N, K/G) of int4.
        zeros: (N, K/G) of int4.
        bias: (N,) or None.
    """

    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        N, columns = self.codes.shape
        return N, columns if self.zeros is None else 2 * columns

    @property
    def group(self) -> int:
        """G of int4; 0 of the others."""
        return 0 if self.zeros is None or self.scales is None else self.shape[1] // self.scales.shape[1]

    def dense(self) -> Tensor:
        """W (N, K), in float32 where it has scales."""
        if self.scales is None:
            return self.codes
        if self.zeros is None:
            return self.codes.float() * self.scales.float()[:, None]
        codes = unpack_int4(self.codes, self.group).float()
        return (self.scales.float()[..., None] * (codes - self.zeros.float()[..., None])).flatten(1)


def quantize_int8(weight: Tensor) -> Weight:
    """W (N, K) in 8 bits; a scale has the dtype of the weight."""
    codes, scales = weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(len(weight))
    for w, code, scale in _in_slices(weight, codes, scales):
        w = w.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        largest = torch.linalg.vector_norm(w, ord=torch.inf, dim=1)
        scale.copy_(torch.where(largest > 0, largest / 127, 1.0))
        # Codes are found with the scales as they are kept, so that their rounding is not an error of the weight.
        code.copy_(w.div_(scale.float()[:, None]).round_().clamp_(-127, 127))
    return Weight(codes, scales)


def quantize_int4(weight: Tensor, group: int = 32) -> Weight:
    """W (N, K) in 4 bits, each group of a row over its own range; scales and zeros have the dtype of the weight.

    Raises:
        ValueError: unless the group, G, is even and divides K.
    """
    N, K = weight.shape
    if group < 2 or group % 2 or K % group:
        raise ValueError(f"group must be even and divide the {K} columns of the weight, got {group}")
    packed = weight.new_empty((N, K // 2), dtype=torch.uint8)
    scales, zeros = (weight.new_empty((N, K // group)) for _ in range(2))
    for w, code, scale, zero in _in_slices(weight, packed, scales, zeros):
        w = w.to(torch.float32, copy=True, memory_format=torch.contiguous_format).view(len(w), -1, group)
        low, high = w.amin(dim=-1).clamp(max=0.0), w.amax(dim=-1).clamp(min=0.0)
        scale.copy_((high - low) / 15)
        scale.masked_fill_(scale <= 0, 1.0)
        zero.copy_(-low / scale.float())
        # Codes are found with scales and zeros as they are kept: their rounding is not an error of the weight.
        w.div_(scale.float()[..., None]).add_(zero.float()[..., None])
        first, second = w.round_().clamp_(0, 15).to(torch.uint8).chunk(2, dim=-1)
        code.copy_((first | second << 4).view(code.shape))
    return Weight(packed, scales, zeros)


def _in_slices(weight: Tensor, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The weight and its parts, some rows at a time: in float32 a whole one would take twice its memory again."""
    rows = max(1, SLICE // weight.shape[1])
    return zip(*(each.split(rows) for each in (weight, *parts)), strict=True)


def unpack_int4(packed: Tensor, group: int = 32) -> Tensor:
    """The codes (N, K/G, G) uint8, in the order of the weight's columns."""
    halves = packed.view(packed.shape[0], -1, group // 2)
    return torch.cat((halves & 15, halves >> 4), dim=-1)


def check_product(x: Tensor, weight: Weight) -> None:
    """That x (..., K) can be multiplied by a weight, whose parts agree.

    Raises:
        ValueError: where they do not.
    """
    (N, K), codes = weight.shape, weight.codes
    if x.shape[-1] != K:
        raise ValueError(f"x must have {K} columns, as the weight has, got {x.shape[-1]}")
    if (weight.scales is None) != codes.is_floating_point() or (weight.zeros is None) != (codes.dtype != torch.uint8):
        raise ValueError(
            f"a weight must be floating point, int8 with scales, or uint8 with scales and zeros, got {codes.dtype}"
        )
    sizes = {"bias": (N,), "scales": (N,) if weight.zeros is None else (N, K // weight.group)}
    for name, size in (sizes | {"zeros": sizes["scales"]}).items():
        part = getattr(weight, name)
        if part is not None and part.shape != size:
            raise ValueError(f"{name} must be of shape {size}, got {tuple(part.shape)}")


def unsupported_weight(first: Tensor, x: Tensor, weight: Weight) -> str:
    """What keeps kernels from multiplying x by a weight on the device of `first`, as the end of a sentence, or ""."""
    if weight.group not in (0, 16, 32, 64, 128, 256):
        return f"group must be a power of two from 16 to 256, got {weight.group}"
    for name in ("scales", "zeros"):
        part = getattr(weight, name)
        if part is not None and not part.is_contiguous():
            return f"{name} must be contiguous, got strides {part.stride()}"
    return unsupported_layout(first, x=x, **weight._asdict())
