"""Products of half-precision tensors with a float32 result."""

from __future__ import annotations

import pytest
import torch

from phi2_kernels.products import matmul


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_matmul_of_halves_has_a_float32_result(dtype):
    normal = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(shape, generator=normal) for shape in ((8, 16), (16, 5), (5,)))
    a, b = a.to(dtype), b.to(dtype)
    assert torch.equal(matmul(a, b), a.float() @ b.float())
    torch.testing.assert_close(matmul(a, b, bias), a.float() @ b.float() + bias)
