"""The linear layers of a Phi, in whatever form their weight is kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from phi2_kernels.gemv import linear
from phi2_kernels.weight_forms import Weight


class PhiLinear(nn.Module):
    """What all forms have in common: float (`Linear`), int8 and int4 (`phi2.quantize`), with adapters (`phi2.lora`).

    Attributes:
        weight: (out, in) in floating point, else its codes.
        bias: (out,).
    """

    in_features: int
    out_features: int
    weight: Tensor
    bias: Any  # a tensor; torch says that of an nn.Linear may be None

    @property
    def form(self) -> Weight | None:
        """Weight and bias as a decode step reads them; None where the layer is more than a product with its weight."""
        return None


class Linear(nn.Linear, PhiLinear):
    """torch's, by our kernel where a GPU decodes."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    @property
    def form(self) -> Weight | None:
        return Weight(self.weight, bias=self.bias)
