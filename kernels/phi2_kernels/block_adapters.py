"""LoRA inside a fused block: what adapters add to the output of a matmul, and their gradients.

    y += s / (1 - p) (keep x) A^T B^T

Adapters that read the same x without dropout share one matmul with all their A; with dropout each has a mask, and so an
input, of its own. Masks are made again in the backward pass (`dropout.py`). A and B are float32; x and the gradients
stay in the dtype of the matmuls, and nothing of their size is float32 (`products.py`).

Dims: N rows, r LoRA rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from phi2_kernels.dropout import keep_mask
from phi2_kernels.products import add_product_, product


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


class AdapterGroup(NamedTuple):
    """Adapters that multiply the same input.

    Attributes:
        mask: number of the input's mask; it counts where there is one adapter with dropout.
    """

    adapters: tuple[Adapter, ...]
    mask: int = 0

    def keep(self, x: Tensor, seed: Tensor | None) -> Tensor | None:
        p = self.adapters[0].dropout
        if not p:
            return None
        assert seed is not None
        return keep_mask(x, p, seed, self.mask)

    def inner(self, x: Tensor) -> tuple[Tensor, ...]:
        """s / (1 - p) x A^T of each adapter, (N, r)."""
        together = product(x, torch.cat([adapter.A * adapter.factor for adapter in self.adapters]).T)
        return together.split([len(adapter.A) for adapter in self.adapters], dim=1)


def group_adapters(adapters: tuple[Adapter, ...], first_mask: int) -> list[AdapterGroup]:
    """One for all adapters on an input, or one for each where they drop."""
    if any(adapter.dropout for adapter in adapters):
        return [AdapterGroup((adapter,), first_mask + i) for i, adapter in enumerate(adapters)]
    return [AdapterGroup(adapters)] if adapters else []


def add_adapters(group: AdapterGroup, x: Tensor, outputs: list[Tensor], seed: Tensor | None) -> None:
    """Adds every adapter to its output (N, out), given the input x (N, in) before dropout."""
    keep = group.keep(x, seed)
    inner = group.inner(x if keep is None else x * keep)
    for adapter, u, y in zip(group.adapters, inner, outputs, strict=True):
        add_product_(y, u, adapter.B.T)


def adapters_backward(
    group: AdapterGroup, x: Tensor, grads: list[Tensor], dx: Tensor, seed: Tensor | None
) -> list[Tensor]:
    """dA and dB of each adapter in turn; what they send to x is added to dx.

    Args:
        x: as given to `add_adapters`.
        grads: of the outputs.
    """
    keep = group.keep(x, seed)
    x = x if keep is None else x * keep
    dB = [product(grad.T, u) for grad, u in zip(grads, group.inner(x), strict=True)]
    dinner = torch.cat([product(grad, a.B) * a.factor for grad, a in zip(grads, group.adapters, strict=True)], dim=1)
    dA = product(x.T, dinner).split([len(adapter.A) for adapter in group.adapters], dim=1)  # (in, r) each
    del x  # as large as what comes
    _add_kept(dx, dinner, torch.cat([adapter.A for adapter in group.adapters]), keep)
    dA = [a.T.clone(memory_format=torch.contiguous_format) for a in dA]  # outputs of an op share no memory
    return [grad for pair in zip(dA, dB, strict=True) for grad in pair]


def _add_kept(dx: Tensor, dinner: Tensor, A: Tensor, keep: Tensor | None) -> None:
    """dx += keep (dinner A): what is not kept is put back, so that no product of the size of dx is float32."""
    if keep is None:
        add_product_(dx, dinner, A)
    else:
        whole = dx.clone()
        add_product_(whole, dinner, A)
        torch.where(keep, whole, dx, out=dx)
