"""LoRA inside a fused block: what adapters add to the output of a matmul, and their gradients.

    u = s / (1 - p) (keep x) A^T        y += u B^T
    dB = dy^T u        du = s / (1 - p) dy B        dA = du^T (keep x)        dx += keep (du A)

All adapters that are added to one output go together. Each reads columns of x and writes columns of y: in the first
matmul of a block all of x and a part of y, in the second a part of x and all of y. The three products are `inner`,
`add` and `gradients` of `block_torch.py` or `block_triton.py`. A, B and u are float32; x and y stay in the dtype of the
matmuls, and nothing of their size is float32 on a GPU.

Dims: N rows, K columns that an adapter reads or writes, r LoRA rank, R sum of the ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int]  # columns from, to


class Adapter(NamedTuple):
    """LoRA on some of the columns that a matmul writes (h) or reads (m); `dropout` is that of its input."""

    start: int
    end: int
    A: Tensor  # (r, in) float32
    B: Tensor  # (out, r) float32
    scaling: float
    dropout: float = 0.0

    @property
    def factor(self) -> float:
        return self.scaling / (1 - self.dropout)


class Side(NamedTuple):
    """One side of some adapters, x or y.

    Attributes:
        factors: of each adapter A (r, K), or B (K, r), contiguous.
        is_output: whether they are B.
        spans: the columns that each reads or writes.
        ranks: r of each.
        rates, masks: of each the dropout of what it reads, and the number of its mask; empty where nothing is dropped.
        name: tells the sides of a block apart.
    """

    factors: tuple[Tensor, ...]
    spans: tuple[Span, ...]
    is_output: bool
    ranks: tuple[int, ...]
    rates: tuple[float, ...] = ()
    masks: tuple[int, ...] = ()
    name: tuple[int, bool] = (0, False)


class AdapterGroup(NamedTuple):
    """Adapters that are added to one output.

    Attributes:
        input, output: with the factors A, and with the factors B.
        scales: s / (1 - p) of each.
    """

    input: Side
    output: Side
    scales: tuple[float, ...]

    def add(self, ops: Any, x: Tensor, y: Tensor, u: Tensor, seed: Tensor | None) -> None:
        """Writes u (N, R) and adds to y (N, any), given the input x (N, any) before dropout."""
        if self.scales:
            ops.inner(x, u, self.input, self.scales, seed)
            ops.add(y, u, self.output, None)

    def send(self, ops: Any, dy: Tensor, dx: Tensor, seed: Tensor | None) -> Tensor:
        """du (N, R), given the gradient of y; what the adapters send to x is added to dx."""
        du = dy.new_empty((dy.shape[0], sum(self.input.ranks)), dtype=torch.float32)
        if self.scales:
            ops.inner(dy, du, self.output, self.scales, None)
            ops.add(dx, du, self.input, seed)
        return du

    def gradients(self, ops: Any, x: Tensor, du: Tensor, dy: Tensor, u: Tensor, seed: Tensor | None) -> list[Tensor]:
        """dA and dB of each adapter in turn."""
        if not self.scales:
            return []
        dA, dB = ops.gradients(x, du, self.input, dy, u, self.output, seed)
        return [gradient for pair in zip(dA, dB, strict=True) for gradient in pair]


NO_ADAPTERS = AdapterGroup(Side((), (), False, ()), Side((), (), True, ()), ())


def group_of(adapters: tuple[Adapter, ...], reads: list[Span], writes: list[Span], first_mask: int) -> AdapterGroup:
    """Adapters with the columns that they read and write, whose masks are numbered from `first_mask`."""
    if not adapters:
        return NO_ADAPTERS
    rates, ranks = tuple(a.dropout for a in adapters), tuple(a.A.shape[0] for a in adapters)
    drops: Any = {"rates": rates, "masks": tuple(range(first_mask, first_mask + len(rates)))} if any(rates) else {}
    return AdapterGroup(
        Side(tuple(a.A.contiguous() for a in adapters), tuple(reads), False, ranks, **drops, name=(first_mask, False)),
        Side(tuple(a.B.contiguous() for a in adapters), tuple(writes), True, ranks, name=(first_mask, True)),
        tuple(a.factor for a in adapters),
    )
