"""GELU's kernels against the formula in float64, in every dtype, on whole tensors and on views with wider rows."""

from __future__ import annotations

import pytest
import torch

from phi2_kernels import gelu as op
from phi2_kernels.gelu import gelu, gelu_ref

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 15), (4, 17), (5, 64), (129, 16), (2, 1025)]


def inputs(N: int, F: int, dtype=torch.float32, device="cpu", has_bias: bool = True) -> list[torch.Tensor | None]:
    """x from -6 to 6 or so, bias, and an upstream gradient; x and the gradient are views of wider rows."""
    g = torch.Generator().manual_seed(N * F)
    wide = (torch.randn(N, 2 * F + 24, generator=g) * 2).to(device, dtype)
    bias = torch.randn(F, generator=g).to(device, dtype) if has_bias else None
    return [wide[:, 8 : 8 + F], bias, wide[:, F + 16 : 2 * F + 16]]


def with_gradients(function, x, bias, grad) -> list[torch.Tensor]:
    """y, dx, and dbias where there is a bias."""
    leaves = [None if z is None else z.detach().requires_grad_() for z in (x, bias)]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, [z for z in leaves if z is not None], grad)]


def triton(x, bias):
    return gelu(x, bias, impl="triton")


def in_float64(x, bias, grad) -> list[torch.Tensor]:
    def formula(x, bias=None):
        return torch.nn.functional.gelu(x if bias is None else x + bias, approximate="tanh")

    return with_gradients(formula, *(None if z is None else z.double() for z in (x, bias, grad)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_every_gradient_are_as_exact_as_torchs(shape, has_bias, dtype, device):
    arguments = inputs(*shape, dtype, device, has_bias)
    ours = with_gradients(triton, *arguments)
    theirs = with_gradients(lambda x, bias: gelu(x, bias, impl="torch"), *arguments)
    for mine, other, truth in zip(ours, theirs, in_float64(*arguments), strict=True):
        assert mine.dtype == dtype
        allowed = 2 * (other - truth).abs().max() + torch.finfo(dtype).eps * max(1, truth.abs().max())
        assert (mine - truth).abs().max() <= allowed


@pytest.mark.parametrize("has_bias", [True, False])
def test_float32_is_exact_to_its_rounding(has_bias, device):
    arguments = inputs(17, 129, device=device, has_bias=has_bias)
    for mine, truth in zip(with_gradients(triton, *arguments), in_float64(*arguments), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=2e-6)


def test_the_formula_is_torchs():
    x, bias, _ = inputs(5, 80)
    torch.testing.assert_close(gelu_ref(x, bias), gelu(x, bias, impl="torch"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_inputs_pass_or_vanish(dtype, device):
    x = torch.tensor([[-6e4, -1e3, -20.0, 20.0, 1e3, 6e4]], device=device).to(dtype)
    y, dx = with_gradients(triton, x, None, torch.ones_like(x))
    assert torch.equal(y, torch.where(x > 0, x, 0)) and torch.equal(dx, (x > 0).to(dtype))


def test_more_rows_than_a_program_takes_are_all_summed(device):
    arguments = inputs(131, 7, device=device)  # 64 rows a program
    dbias = with_gradients(triton, *arguments)[2]
    torch.testing.assert_close(dbias.double(), in_float64(*arguments)[2], rtol=1e-5, atol=1e-5)


def test_equal_runs_give_equal_bits(device):
    arguments = inputs(129, 16, torch.bfloat16, device)
    first, second = (with_gradients(triton, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_beside_a_view_is_touched(device):
    from phi2_kernels import gelu_triton

    x, bias, grad = inputs(5, 17, device=device)
    buffer = torch.empty(2, 5, 40, device=device)
    gelu_triton.forward(x, bias, buffer[0, :, 3:20])
    gelu_triton.backward(grad, x, bias, buffer[1, :, 3:20], sums=False)
    assert torch.isfinite(buffer[:, :, 3:20]).all()
    assert buffer[:, :, :3].isnan().all() and buffer[:, :, 20:].isnan().all()


def test_the_bias_gradient_is_summed_only_for_a_bias_that_trains(monkeypatch, device):
    asked = []
    real = op._gelu_backward
    monkeypatch.setattr(op, "_gelu_backward", lambda *a: asked.append(a[-1]) or real(*a))
    x, bias, grad = inputs(4, 17, device=device)
    for trains in (False, True):
        x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_(trains)
        triton(x, bias).backward(grad)
    assert asked == [False, True] and torch.isfinite(bias.grad).all()


def test_an_expanded_gradient_is_understood(device):
    x, bias, _ = inputs(5, 17, device=device)
    x = x.detach().requires_grad_()
    triton(x, bias).sum().backward()
    torch.testing.assert_close(x.grad.double(), in_float64(x, bias, torch.ones_like(x))[1], rtol=1e-5, atol=2e-6)


def test_no_rows_give_no_rows_and_a_zero_bias_gradient(device):
    _, dx, dbias = with_gradients(triton, *inputs(0, 17, device=device))
    assert dx.shape == (0, 17) and not dbias.any()


def test_batches_of_rows_keep_their_shape(device):
    x, bias, _ = inputs(6, 17, device=device)
    assert torch.equal(triton(x.unflatten(0, (2, 3)), bias).flatten(0, 1), triton(x, bias))
    assert torch.equal(triton(x[0], bias), triton(x, bias)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (torch.zeros(17, 2).T, None), "last dim of x must be contiguous, got stride 2"),
        (lambda: (torch.zeros(2, 17), torch.zeros(34)[::2]), "last dim of bias must be contiguous, got stride 2"),
        (lambda: (torch.zeros(2, 17), torch.zeros(16)), r"bias must be of shape \(17,\), got \(16,\)"),
        (lambda: (torch.zeros(2, 17).double(), None), "got torch.float64"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_in_one_line(make, message, device):
    with torch.device(device):  # not `.to`, which would copy what is strided into what is not
        x, bias = make()
    with pytest.raises(ValueError, match=message) as refused:
        triton(x, bias)
    assert "\n" not in str(refused.value)


def test_a_kernel_that_forgets_the_last_columns_is_caught(monkeypatch, device):
    from phi2_kernels import gelu_triton

    monkeypatch.setattr(gelu_triton.triton, "cdiv", lambda a, b: max(1, a // b))
    x, bias, _ = inputs(2, 1025, device=device)
    assert triton(x, bias)[:, 1024].isnan().all()


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_op_obeys_the_rules_of_custom_ops(has_bias, device):
    x, bias, _ = inputs(3, 17, device=device, has_bias=has_bias)
    leaves = [None if z is None else z.detach().requires_grad_() for z in (x, bias)]
    torch.library.opcheck(op._gelu, tuple(leaves))


def test_it_compiles_whole_and_gives_the_same_numbers(device):
    arguments = inputs(5, 17, device=device)
    whole = torch.compile(triton, fullgraph=True, backend="aot_eager")
    eager, compiled = with_gradients(triton, *arguments), with_gradients(whole, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_it_runs_under_activation_checkpointing(device):
    from torch.utils.checkpoint import checkpoint

    arguments = inputs(5, 17, device=device)
    again = with_gradients(lambda *a: checkpoint(triton, *a, use_reentrant=False), *arguments)
    assert all(torch.equal(a, b) for a, b in zip(with_gradients(triton, *arguments), again, strict=True))
