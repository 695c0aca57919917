"""Products of a few rows with a weight in each of its forms, against the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phi2_kernels import _dispatch
from phi2_kernels import gemv as op
from phi2_kernels.gemv import (
    MAX_ROWS,
    dequantize_int4,
    dequantize_int8,
    gemv,
    gemv_int4,
    gemv_int8,
    gemv_ref,
    linear,
    quantize_int4,
    quantize_int8,
)
from phi2_kernels.gemv_rows_triton import takes

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def largest_error(result: Tensor, exact: Tensor) -> float:
    assert result.shape == exact.shape
    return (result.double() - exact).abs().max().nan_to_num(torch.inf).item()


def assert_exact_but_for_rounding(result: Tensor, exact: Tensor, float32_error: float) -> None:
    """Sums are float32; a half-precision result is off by at most one unit in its last place beside.

    Half of one on a GPU; the interpreter cuts bfloat16 off.
    """
    unit = 0 if result.dtype == torch.float32 else torch.finfo(result.dtype).eps
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= unit * exact.abs() + float32_error).all()


def matmul(form: str, weight: Tensor, group: int = 32) -> tuple[Callable, Tensor]:
    """An op that takes (x, bias, impl=), and the weight it really multiplies by, in float64."""
    if form == "float":
        return lambda x, bias, impl: gemv(x, weight, bias, impl=impl), weight.double()
    if form == "int8":
        codes, scale = quantize_int8(weight)
        return lambda x, bias, impl: gemv_int8(x, codes, scale, bias, impl=impl), dequantize_int8(codes, scale).double()
    parts = quantize_int4(weight, group)
    used = dequantize_int4(*parts, group).double()
    return lambda x, bias, impl: gemv_int4(x, *parts, bias, group, impl=impl), used


def exact_matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("form", ["float", "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 17, 1056), (2, 7, 512), (3, 9, 96), (8, 5, 544), (5, 35, 1056)])
def test_a_matmul_of_few_rows_equals_the_formula(form, M, N, K, dtype, device):
    x, weight, bias = (normal(*s, dtype=dtype, device=device) for s in ((M, K), (N, K), (N,)))
    op, used = matmul(form, weight / 32)
    assert_exact_but_for_rounding(op(x, bias, impl="triton"), exact_matmul(x, used, bias), 1e-5)


@pytest.mark.parametrize("form", ["float", "int8", "int4"])
def test_torch_and_triton_are_one_op(form, device):
    x, weight = normal(2, 1, 64, device=device), normal(11, 64, device=device)
    op, _ = matmul(form, weight)
    torch.testing.assert_close(op(x, None, impl="triton"), op(x, None, impl="torch"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (4, torch.float16)])
@pytest.mark.parametrize("group", [16, 64, 256])
def test_a_group_may_be_any_power_of_two_from_16_to_256(group, rows, dtype, device):
    x, weight = normal(rows, 768, dtype=dtype, device=device), normal(3, 768, device=device)
    op, used = matmul("int4", weight, group)
    assert_exact_but_for_rounding(op(x, None, impl="triton"), exact_matmul(x, used, None), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("K", [1, 31, 517])
def test_rows_and_widths_of_any_view_are_taken(K, dtype, device):
    x, weight = (normal(n, K + 5, dtype=dtype, device=device)[:, 2 : 2 + K] for n in (3, 7))
    assert_exact_but_for_rounding(gemv(x, weight, impl="triton"), exact_matmul(x, weight.double(), None), 1e-4)


def test_tensor_cores_take_several_rows_of_half_precision_that_they_multiply_exactly(device):
    half, wide = normal(3, 32, dtype=torch.float16, device=device), normal(3, 32, device=device)
    assert takes(half, half) and takes(half, quantize_int8(wide)[0]) and takes(half, quantize_int4(wide)[0])
    assert not takes(half[:2], half) and not takes(wide, wide) and not takes(half, wide) and not takes(half, half, 16)


def test_leading_dims_are_kept(device):
    weight = normal(4, 32, device=device)
    assert gemv(normal(32, device=device), weight, impl="triton").shape == (4,)
    assert gemv(normal(2, 3, 32, device=device), weight, impl="triton").shape == (2, 3, 4)
    assert gemv(normal(0, 32, device=device), weight, impl="triton").shape == (0, 4)


def test_int8_is_off_by_at_most_half_a_step_and_keeps_the_largest():
    weight = normal(6, 100)
    weight[2] = 0
    codes, scale = quantize_int8(weight)
    assert codes.dtype == torch.int8 and (codes.abs().amax(dim=1)[[0, 1, 3, 4, 5]] == 127).all()
    assert ((dequantize_int8(codes, scale) - weight).abs() <= 0.501 * scale[:, None]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4_is_off_by_little_more_than_half_a_step(dtype):
    weight = normal(6, 96, dtype=dtype)
    weight[0, :32], weight[1, :32] = 0, 3
    packed, scales, zeros = quantize_int4(weight, 32)
    step = scales.float().repeat_interleave(32, dim=1)
    # The ends of a range move by the rounding of scale and zero: 15 steps of 2^-8 each in bfloat16.
    allowed = step * (0.501 + (0 if dtype == torch.float32 else 16 * torch.finfo(dtype).eps))
    assert ((dequantize_int4(packed, scales, zeros, 32) - weight.float()).abs() <= allowed).all()


def test_int4_packs_columns_half_a_group_apart():
    packed, scales, zeros = quantize_int4(torch.arange(16.0).repeat(1, 2), 16)
    assert packed[0, :8].tolist() == [0x80, 0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7]
    assert scales.tolist() == [[1, 1]] and zeros.tolist() == [[0, 0]]


x, weight = normal(2, 32), normal(3, 32)
packed = quantize_int4(weight, 32)
REFUSED = {
    "x must have 32 columns, as the weight has, got 31": lambda: gemv(x[:, 1:], weight),
    r"bias must be of shape \(3,\)": lambda: gemv(x, weight, torch.zeros(2)),
    "at most 8 rows, got 9": lambda: gemv(normal(9, 32), weight, impl="triton"),
    "weight must be floating point, got torch.int8": lambda: gemv(x, weight.to(torch.int8), impl="triton"),
    r"scale must be of shape \(3,\)": lambda: gemv_int8(x, weight.to(torch.int8), torch.ones(1)),
    "group must be even and divide the 32 columns of the weight, got 24": lambda: quantize_int4(weight, 24),
    r"zeros must be of shape \(3, 1\)": lambda: gemv_int4(x, *packed[:2], torch.ones(3, 2)),
    "group must be a power of two from 16 to 256, got 8": lambda: gemv_int4(
        x, *quantize_int4(weight, 8), group=8, impl="triton"
    ),
    "must be one of auto, torch, triton, got .cuda.": lambda: gemv(x, weight, impl="cuda"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_run_is_refused_in_one_line(message):
    with pytest.raises(ValueError, match=message) as raised:
        REFUSED[message]()
    assert "\n" not in str(raised.value)


def ops(device: str) -> dict[str, tuple[Callable, tuple]]:
    x, weight, bias = normal(2, 64, device=device), normal(3, 64, device=device), normal(3, device=device)
    return {
        "float": (op._gemv, (x, weight, None, bias)),
        "int8": (op._gemv, (x, *quantize_int8(weight), bias)),
        "int4": (op._gemv_int4, (x, *quantize_int4(weight), bias, 32)),
    }


@pytest.mark.parametrize("form", ["float", "int8", "int4"])
def test_ops_are_what_torch_compile_believes(form, device):
    torch.library.opcheck(*ops(device)[form])


def test_it_compiles_to_one_graph_with_equal_results(device):
    x, weight = normal(1, 160, device=device), normal(8, 160, device=device)

    def product(x):
        return gemv(x, weight, impl="triton")

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), product(x), rtol=0, atol=0)


def test_the_matmul_reference_is_the_formula():
    bias = normal(3)
    assert largest_error(gemv_ref(x, weight, bias), exact_matmul(x, weight.double(), bias)) < 1e-5


def test_torchs_packed_int8_kernel_takes_our_codes():
    """What a CPU runs in bfloat16."""
    x, weight, bias = (normal(*s, dtype=torch.bfloat16) for s in ((3, 5, 64), (17, 64), (17,)))
    codes, scale = quantize_int8(weight)
    exact = exact_matmul(x, dequantize_int8(codes, scale).double(), bias)
    assert largest_error(gemv_int8(x, codes, scale, bias, impl="torch"), exact) < 0.01 * exact.abs().max()


@pytest.mark.parametrize("rows", [1, MAX_ROWS, MAX_ROWS + 1])
def test_a_linear_is_a_gemv_where_rows_are_few_and_no_gradient_is_asked_for(rows, device, monkeypatch):
    monkeypatch.setattr(_dispatch, "default_impl", "triton")
    x, weight, bias = (normal(*s, device=device).requires_grad_() for s in ((rows, 64), (7, 64), (7,)))
    calls = []
    monkeypatch.setattr(op, "_gemv", lambda *a, run=op._gemv: calls.append(a) or run(*a))
    expected = F.linear(x, weight, bias)
    assert linear(x, weight, bias).requires_grad and not calls
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == (rows <= MAX_ROWS)
