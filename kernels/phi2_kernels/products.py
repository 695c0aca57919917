"""Products of half-precision operands with float32 accumulation and result."""

from __future__ import annotations

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
