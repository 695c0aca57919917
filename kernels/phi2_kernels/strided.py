"""A tensor as a kernel takes it: one argument, its pointer and its strides.

Triton specialises each of the strides as it does an argument of its own: what 16 divides, it knows to be divisible.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Strided(NamedTuple):
    """Strides are those of all dims but the last, whose is 1."""

    ptr: Tensor
    strides: tuple[int, ...]


def strided(x: Tensor) -> Strided:
    return Strided(x, x.stride()[:-1])
