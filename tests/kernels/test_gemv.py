"""Products of a few rows with weights in each of their forms, against the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phi2_kernels import _dispatch
from phi2_kernels import gemv as op
from phi2_kernels.gemv import MAX_ROWS, gemv, gemv_each, gemv_ref, gemv_sum, linear
from phi2_kernels.gemv_triton import takes_tensor_cores
from phi2_kernels.weight_forms import Weight, quantize_int4, quantize_int8

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS: dict[str, Callable[[Tensor], Weight]] = {"float": Weight, "int8": quantize_int8, "int4": quantize_int4}


def normal(*shape: int, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def make(form: str, N: int, K: int, *, bias: bool = True, **kind) -> Weight:
    """A weight whose products are about as large as x."""
    return FORMS[form](normal(N, K, **kind) / K**0.5)._replace(bias=normal(N, **kind) if bias else None)


def exact(x: Tensor, weight: Weight) -> Tensor:
    y = x.double() @ weight.dense().double().T
    return y if weight.bias is None else y + weight.bias.double()


def assert_exact_but_for_rounding(result: Tensor, exact: Tensor, float32_error: float = 1e-5) -> None:
    """Sums are float32; a half-precision result is off by at most one unit in its last place beside.

    Half of one on a GPU; the interpreter cuts bfloat16 off.
    """
    unit = 0 if result.dtype == torch.float32 else torch.finfo(result.dtype).eps
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= unit * exact.abs() + float32_error).all()


SIZES = [(1, 17, 1056), (2, 7, 512), (3, 9, 96), (8, 5, 544), (5, 35, 1056)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_a_product_of_few_rows_equals_the_formula(form, M, N, K, dtype, device):
    x, weight = normal(M, K, dtype=dtype, device=device), make(form, N, K, dtype=dtype, device=device)
    assert_exact_but_for_rounding(gemv(x, weight, impl="triton"), exact(x, weight))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 5])
def test_several_weights_read_one_x(form, M, dtype, device):
    kind = dict(dtype=dtype, device=device)
    x, weights = normal(M, 96, **kind), [make(form, N, 96, **kind) for N in (17, 1, 32, 5)]
    ys = gemv_each(x, weights, gelu_last=True, impl="triton")
    for y, weight in zip(ys[:-1], weights[:-1], strict=True):
        assert_exact_but_for_rounding(y, exact(x, weight))
    assert_exact_but_for_rounding(ys[-1], F.gelu(exact(x, weights[-1]), approximate="tanh"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 5])
def test_products_of_several_x_are_added_to_a_stream(form, M, dtype, device):
    kind = dict(dtype=dtype, device=device)
    xs, skip = [normal(M, K, **kind) for K in (96, 576)], normal(M, 19, **kind)
    weights = [make(form, 19, x.shape[1], **kind) for x in xs]
    expected = skip.double() + sum(exact(x, weight) for x, weight in zip(xs, weights, strict=True))
    assert_exact_but_for_rounding(gemv_sum(xs, weights, skip, impl="triton"), expected)


@pytest.mark.parametrize("form", FORMS)
def test_torch_and_triton_are_one_op(form, device):
    x, skip = normal(2, 1, 64, device=device), normal(2, 1, 11, device=device)
    weights = [make(form, 11, 64, device=device, bias=False) for _ in range(2)]
    for call in (
        lambda impl: gemv(x, weights[0], impl=impl),
        lambda impl: torch.cat(gemv_each(x, weights, gelu_last=True, impl=impl)),
        lambda impl: gemv_sum([x, x], weights, skip, impl=impl),
    ):
        torch.testing.assert_close(call("triton"), call("torch"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float32), (4, torch.float16)])
@pytest.mark.parametrize("group", [16, 64, 256])
def test_a_group_may_be_any_power_of_two_from_16_to_256(group, rows, dtype, device):
    x, weight = normal(rows, 768, dtype=dtype, device=device), quantize_int4(normal(3, 768, device=device), group)
    assert_exact_but_for_rounding(gemv(x, weight, impl="triton"), exact(x, weight), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("K", [1, 31, 517])
def test_rows_and_widths_of_any_view_are_taken(K, dtype, device):
    x, weight = (normal(n, K + 5, dtype=dtype, device=device)[:, 2 : 2 + K] for n in (3, 7))
    skip = normal(3, 9, dtype=dtype, device=device)[:, 1:8]
    assert_exact_but_for_rounding(gemv(x, Weight(weight), impl="triton"), exact(x, Weight(weight)), 1e-4)
    total = gemv_sum([x], [Weight(weight)], skip, impl="triton")
    assert_exact_but_for_rounding(total, exact(x, Weight(weight)) + skip.double(), 1e-4)


def test_tensor_cores_take_several_rows_of_half_precision_that_they_multiply_exactly(device):
    half, wide = normal(3, 32, dtype=torch.float16, device=device), normal(3, 32, device=device)
    codes = half, quantize_int8(wide).codes, quantize_int4(wide).codes
    assert all(takes_tensor_cores(half, each, group) for each, group in zip(codes, (0, 0, 32), strict=True))
    for x, each, group in ((half[:2], half, 0), (wide, wide, 0), (half, wide, 0), (half, codes[2], 16)):
        assert not takes_tensor_cores(x, each, group)


def test_leading_dims_are_kept(device):
    weight = make("float", 4, 32, device=device)
    assert gemv(normal(32, device=device), weight, impl="triton").shape == (4,)
    assert gemv(normal(2, 3, 32, device=device), weight, impl="triton").shape == (2, 3, 4)
    assert gemv(normal(0, 32, device=device), weight, impl="triton").shape == (0, 4)


x, skip = normal(2, 32), normal(2, 3)
float_, int8, int4 = (make(form, 3, 32, bias=False) for form in FORMS)
REFUSED = {
    "x must have 32 columns, as the weight has, got 31": lambda: gemv(x[:, 1:], float_),
    r"bias must be of shape \(3,\)": lambda: gemv(x, float_._replace(bias=torch.zeros(2))),
    "at most 8 rows, got 9": lambda: gemv(normal(9, 32), float_, impl="triton"),
    "uint8 with scales and zeros, got torch.int8": lambda: gemv(x, Weight(int8.codes)),
    r"scales must be of shape \(3,\)": lambda: gemv(x, int8._replace(scales=torch.ones(1))),
    r"zeros must be of shape \(3, 1\)": lambda: gemv(x, int4._replace(zeros=torch.ones(3, 2))),
    "group must be a power of two from 16 to 256, got 8": lambda: gemv(
        x, quantize_int4(normal(3, 32), 8), impl="triton"
    ),
    "all weights of a call must have one form": lambda: gemv_each(x, [float_, int8], impl="triton"),
    r"skip must be of shape \(2, 3\), got \(2, 4\)": lambda: gemv_sum([x], [float_], normal(2, 4)),
    "zeros must be contiguous": lambda: gemv(
        normal(2, 64), quantize_int4(normal(2, 64))._replace(zeros=torch.ones(2, 2).T), impl="triton"
    ),
    "must be one of auto, torch, triton, got .cuda.": lambda: gemv(x, float_, impl="cuda"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_run_is_refused_in_one_line(message):
    with pytest.raises(ValueError, match=message) as raised:
        REFUSED[message]()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", FORMS)
def test_ops_are_what_torch_compile_believes(form, device):
    weights = [make(form, 3, 64, device=device) for _ in range(2)]
    x, skip, parts = normal(2, 64, device=device), normal(2, 3, device=device), op._parts(weights)
    torch.library.opcheck(op._gemv_each, (x, *parts, True))
    torch.library.opcheck(op._gemv_sum, ([x, x], *parts, skip))


def test_they_compile_to_one_graph_with_equal_results(device):
    x, weight = normal(1, 160, device=device), make("float", 160, 160, device=device)

    def product(x):
        return gemv_sum(gemv_each(x, [weight, weight], impl="triton"), [weight, weight], x, impl="triton")

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), product(x), rtol=0, atol=0)


def test_the_reference_is_the_formula():
    weight = make("float", 3, 32)
    torch.testing.assert_close(gemv_ref(x, weight).double(), exact(x, weight), rtol=0, atol=1e-5)


def test_torchs_packed_int8_kernel_takes_our_codes():
    """What a CPU runs in bfloat16."""
    x, weight = normal(3, 5, 64, dtype=torch.bfloat16), make("int8", 17, 64, dtype=torch.bfloat16)
    y = exact(x, weight)
    assert (gemv(x, weight, impl="torch").double() - y).abs().max() < 0.01 * y.abs().max()


@pytest.mark.parametrize("rows", [1, MAX_ROWS, MAX_ROWS + 1])
def test_a_linear_is_a_gemv_where_rows_are_few_and_no_gradient_is_asked_for(rows, device, monkeypatch):
    monkeypatch.setattr(_dispatch, "default_impl", "triton")
    x, weight, bias = (normal(*s, device=device).requires_grad_() for s in ((rows, 64), (7, 64), (7,)))
    calls = []
    monkeypatch.setattr(op, "_gemv_each", lambda *a, run=op._gemv_each: calls.append(a) or run(*a))
    expected = F.linear(x, weight, bias)
    assert linear(x, weight, bias).requires_grad and not calls
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight, bias), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == (rows <= MAX_ROWS)
