"""Products of many rows with quantised weights, and their gradients, against the weight that the codes stand for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from phi2_kernels import quantized_matmul as op
from phi2_kernels import quantized_matmul_triton
from phi2_kernels.quantized_matmul import dense, quantized_matmul, quantized_matmul_backward, quantized_matmul_ref
from phi2_kernels.weight_forms import Weight, quantize_int4, quantize_int8

from .conftest import INTERPRETED

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORMS: dict[str, Callable[[Tensor], Weight]] = {"int8": quantize_int8, "int4": quantize_int4}
SIZES = [(9, 33, 96), (17, 5, 320), (64, 48, 32), (70, 130, 288), (130, 20, 64)]  # M, N, K


def normal(*shape: int, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def make(form: str, N: int, K: int, *, bias: bool = True, **kind) -> Weight:
    """A weight whose products are about as large as x."""
    return FORMS[form](normal(N, K, **kind) / K**0.5)._replace(bias=normal(N, **kind) if bias else None)


def exact(x: Tensor, weight: Weight) -> Tensor:
    y = x.double() @ weight.dense().double().T
    return y if weight.bias is None else y + weight.bias.double()


def assert_off_by_at_most_twice(result: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """The error of a result against that of torch's, which multiplies the weight rounded to the dtype of x.

    The interpreter cuts bfloat16 off, where a GPU rounds: up to half a unit in the last place more.
    """
    ours, theirs = ((each.double() - exact).abs().max() for each in (result, torchs))
    cut = torch.finfo(result.dtype).eps / 2 if INTERPRETED and result.dtype == torch.bfloat16 else 0
    assert result.shape == exact.shape and result.dtype == torchs.dtype
    assert ours <= 2 * theirs + cut * exact.abs().max() + 1e-6


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), SIZES)
def test_a_product_is_no_further_off_than_torchs_with_the_rounded_weight(form, M, N, K, dtype, device):
    x, weight = normal(M, K, dtype=dtype, device=device), make(form, N, K, dtype=dtype, device=device)
    torchs = F.linear(x, weight.dense().to(dtype), weight.bias)
    assert_off_by_at_most_twice(quantized_matmul(x, weight, impl="triton"), torchs, exact(x, weight))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "K"), [(1, 4, 64), *SIZES])
def test_the_gradient_of_x_is_no_further_off_than_torchs_with_the_rounded_weight(form, M, N, K, dtype, device):
    dy, weight = normal(M, N, dtype=dtype, device=device), make(form, N, K, dtype=dtype, device=device)
    result = quantized_matmul_backward(dy, weight, impl="triton")
    expected = dy.double() @ weight.dense().double()
    assert_off_by_at_most_twice(result, dy @ weight.dense().to(dtype), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_that_is_made_whole_is_rounded_once(form, dtype, device):
    weight = make(form, 35, 288, dtype=dtype, device=device)
    whole = dense(weight, dtype, impl="triton")
    assert whole.dtype == dtype
    torch.testing.assert_close(whole.double(), weight.dense().double(), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole", [False, True])
def test_a_weight_is_made_whole_with_many_rows_only_and_never_in_float32(form, whole, device, monkeypatch):
    kind = dict(dtype=torch.float16, device=device)
    x, dy, weight = normal(20, 64, **kind), normal(20, 24, **kind), make(form, 24, 64, **kind)
    expected = exact(x, weight), dy.double() @ weight.dense().double()
    quantized_matmul_backward(
        quantized_matmul(x, weight, impl="triton"), weight, impl="triton"
    )  # the first go both ways
    made = []
    monkeypatch.setattr(Weight, "dense", None)
    monkeypatch.setattr(op, "_dense", lambda *parts, make=op._dense: made.append(make(*parts)) or made[-1])
    monkeypatch.setattr(op, "DENSE_FROM", 20 if whole else 21)
    products = quantized_matmul(x, weight, impl="triton"), quantized_matmul_backward(dy, weight, impl="triton")
    assert [each.dtype for each in made] == [torch.float16] * (2 if whole else 0)
    for product, right in zip(products, expected, strict=True):
        torch.testing.assert_close(product.double(), right, rtol=2e-3, atol=5e-3)


def test_the_first_product_of_a_form_compiles_what_other_numbers_of_rows_will_need(device, monkeypatch):
    monkeypatch.setattr(op, "_COMPILED", set())
    ways = []
    for name in ("forward", "backward", "dense"):
        launch = getattr(quantized_matmul_triton, name)
        monkeypatch.setattr(quantized_matmul_triton, name, lambda *a, n=name, f=launch: ways.append(n) or f(*a))
    weight = make("int8", 4, 32, device=device)
    for _ in range(2):
        quantized_matmul(normal(9, 32, device=device), weight, impl="triton")
    quantized_matmul_backward(normal(op.DENSE_FROM, 4, device=device), weight, impl="triton")
    assert ways == ["dense", "forward", "forward", "backward", "dense"]


@pytest.mark.parametrize("group", [16, 64, 256])
def test_a_group_may_be_any_power_of_two_from_16_to_256(group, device):
    x, weight = normal(9, 768, device=device), quantize_int4(normal(3, 768, device=device) / 28, group)
    torch.testing.assert_close(quantized_matmul(x, weight, impl="triton").double(), exact(x, weight), rtol=0, atol=1e-5)
    dx = quantized_matmul_backward(x[:, :3], weight, impl="triton")
    torch.testing.assert_close(dx.double(), x[:, :3].double() @ weight.dense().double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("K", [1, 31, 67])
def test_int8_may_have_any_number_of_columns(K, device):
    x, weight = normal(9, K, device=device), make("int8", 7, K, device=device)
    torch.testing.assert_close(quantized_matmul(x, weight, impl="triton").double(), exact(x, weight), rtol=0, atol=1e-5)
    dx = quantized_matmul_backward(x[:, :1].expand(-1, 7), weight, impl="triton")
    torch.testing.assert_close(dx.double(), x[:, :1].double() * weight.dense().double().sum(dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_views_of_wider_rows_are_read_where_they_lie(form, device):
    x, whole = normal(10, 2, 80, device=device)[:, 1, 9:73], make(form, 18, 128, bias=False, device=device)
    half = 64 if form == "int8" else 32
    weight = whole._replace(codes=whole.codes[1::2, :half], scales=whole.scales[1::2].narrow(-1, 0, 2).contiguous())
    if form == "int8":
        weight = weight._replace(scales=whole.scales[1::2].contiguous())
    else:
        weight = weight._replace(zeros=whole.zeros[1::2, :2].contiguous())
    expected = x.double() @ whole.dense().double()[1::2, :64].T
    torch.testing.assert_close(quantized_matmul(x, weight, impl="triton").double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_and_triton_are_one_op(form, dtype, device):
    x, weight = normal(3, 4, 64, dtype=dtype, device=device), make(form, 16, 64, dtype=dtype, device=device)
    dy, tolerance = normal(3, 4, 16, dtype=dtype, device=device), 4 * torch.finfo(dtype).eps + 1e-6
    for call in (
        lambda impl: quantized_matmul(x, weight, impl=impl),
        lambda impl: quantized_matmul_backward(dy, weight, impl=impl),
    ):
        torch.testing.assert_close(call("triton"), call("torch"), rtol=tolerance, atol=4 * tolerance)


def test_leading_dims_are_kept_and_there_may_be_no_rows(device):
    weight = make("int8", 4, 32, device=device)
    for shape in ((32,), (3, 5, 32), (0, 32)):
        x = normal(*shape, device=device)
        assert quantized_matmul(x, weight, impl="triton").shape == (*shape[:-1], 4)
        assert quantized_matmul_backward(x[..., :4], weight, impl="triton").shape == shape


x, int8, int4 = normal(9, 32), make("int8", 3, 32), make("int4", 3, 32)
REFUSED = {
    "x must have 32 columns, as the weight has, got 31": lambda: quantized_matmul(x[:, 1:], int8),
    "dy must have 3 columns, as the weight has rows, got 32": lambda: quantized_matmul_backward(x, int8),
    "scales must be of shape": lambda: quantized_matmul(x, int8._replace(scales=torch.ones(1))),
    "group must be a power of two from 16 to 256, got 8": lambda: quantized_matmul(
        x, quantize_int4(normal(3, 32), 8), impl="triton"
    ),
    "zeros must be contiguous": lambda: quantized_matmul_backward(
        normal(9, 2), quantize_int4(normal(2, 64))._replace(zeros=torch.ones(2, 2).T), impl="triton"
    ),
    "must be one of auto, torch, triton, got .cuda.": lambda: quantized_matmul(x, int8, impl="cuda"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_run_is_refused_in_one_line(message):
    with pytest.raises(ValueError, match=message) as raised:
        REFUSED[message]()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("form", FORMS)
def test_ops_are_what_torch_compile_believes(form, device):
    weight = make(form, 3, 64, device=device)
    codes, scales, zeros, bias = weight
    torch.library.opcheck(op._quantized_matmul, (normal(9, 64, device=device), codes, scales, zeros, bias))
    torch.library.opcheck(op._quantized_matmul_backward, (normal(9, 3, device=device), codes, scales, zeros))


def test_they_compile_to_one_graph_with_equal_results(device):
    x, weight = normal(9, 64, device=device), make("int4", 32, 64, device=device)

    def there_and_back(x):
        return quantized_matmul_backward(quantized_matmul(x, weight, impl="triton"), weight, impl="triton")

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), there_and_back(x), rtol=0, atol=0)


def test_the_reference_is_the_formula():
    weight = make("int4", 3, 32)
    torch.testing.assert_close(quantized_matmul_ref(x, weight).double(), exact(x, weight), rtol=0, atol=1e-5)


def test_torchs_packed_int8_kernel_takes_our_codes():
    """What a CPU runs in bfloat16."""
    x, weight = normal(3, 5, 64, dtype=torch.bfloat16), make("int8", 17, 64, dtype=torch.bfloat16)
    y = exact(x, weight)
    assert (quantized_matmul(x, weight, impl="torch").double() - y).abs().max() < 0.01 * y.abs().max()
