"""What rounding does to a weight, and where int4 puts its codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi2_kernels.weight_forms import Weight, quantize_int4, quantize_int8


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def test_int8_is_off_by_at_most_half_a_step_and_keeps_the_largest():
    weight = normal(6, 100)
    weight[2] = 0
    rounded = quantize_int8(weight)
    assert rounded.codes.dtype == torch.int8 and (rounded.codes.abs().amax(dim=1)[[0, 1, 3, 4, 5]] == 127).all()
    assert ((rounded.dense() - weight).abs() <= 0.501 * rounded.scales[:, None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_int4_is_off_by_little_more_than_half_a_step(dtype):
    weight = normal(6, 96, dtype=dtype)
    weight[0, :32], weight[1, :32] = 0, 3
    rounded = quantize_int4(weight, 32)
    step = rounded.scales.float().repeat_interleave(32, dim=1)
    # The ends of a range move by the rounding of scale and zero: 15 steps of 2^-8 each in bfloat16.
    allowed = step * (0.501 + (0 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps))
    assert ((rounded.dense() - weight.float()).abs() <= allowed).all()


def test_int4_packs_columns_half_a_group_apart():
    packed, scales, zeros, _ = quantize_int4(torch.arange(16.0).repeat(1, 2), 16)
    assert packed[0, :8].tolist() == [0x80, 0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7]
    assert scales.tolist() == [[1, 1]] and zeros.tolist() == [[0, 0]]


def test_a_weight_knows_its_shape_in_every_form():
    weight = normal(3, 64)
    for form, group in ((Weight(weight), 0), (quantize_int8(weight), 0), (quantize_int4(weight, 16), 16)):
        assert form.shape == (3, 64) == form.dense().shape and form.group == group


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_codes_of_a_transposed_weight_lie_in_rows(quantize):
    weight = normal(6, 64)
    for ours, plain in zip(quantize(weight.T.contiguous().T), quantize(weight), strict=True):
        assert ours is plain is None or (ours.is_contiguous() and torch.equal(ours, plain))


def test_a_group_that_does_not_divide_a_row_is_refused():
    with pytest.raises(ValueError, match="group must be even and divide the 32 columns of the weight, got 24"):
        quantize_int4(normal(3, 32), 24)
