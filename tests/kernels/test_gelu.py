"""GELU's kernels against the formula in float64, in every dtype, on whole tensors and on views with wider rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from phi2_kernels import gelu as op
from phi2_kernels.gelu import gelu, gelu_ref

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 15), (4, 17), (5, 64), (129, 16), (2, 1025)]


def inputs(N: int, F: int, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    """x from -6 to 6 or so and an upstream gradient, which are views of wider rows."""
    g = torch.Generator().manual_seed(N * F)
    wide = (torch.randn(N, 2 * F + 24, generator=g) * 2).to(device, dtype)
    return [wide[:, 8 : 8 + F], wide[:, F + 16 : 2 * F + 16]]


def with_gradients(function, x, grad) -> list[torch.Tensor]:
    """y and dx."""
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y, leaf, grad)]


def triton(x):
    return gelu(x, impl="triton")


def in_float64(x, grad) -> list[torch.Tensor]:
    return with_gradients(partial(torch.nn.functional.gelu, approximate="tanh"), x.double(), grad.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_every_gradient_are_as_exact_as_torchs(shape, dtype, device):
    arguments = inputs(*shape, dtype, device)
    ours = with_gradients(triton, *arguments)
    theirs = with_gradients(partial(gelu, impl="torch"), *arguments)
    for mine, other, truth in zip(ours, theirs, in_float64(*arguments), strict=True):
        assert mine.dtype == dtype
        allowed = 2 * (other - truth).abs().max() + torch.finfo(dtype).eps * max(1, truth.abs().max())
        assert (mine - truth).abs().max() <= allowed


def test_float32_is_exact_to_its_rounding(device):
    arguments = inputs(17, 129, device=device)
    for mine, truth in zip(with_gradients(triton, *arguments), in_float64(*arguments), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=2e-6)


def test_the_formula_is_torchs():
    x, _ = inputs(5, 80)
    torch.testing.assert_close(gelu_ref(x), gelu(x, impl="torch"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_inputs_pass_or_vanish(dtype, device):
    x = torch.tensor([[-6e4, -1e3, -20.0, 20.0, 1e3, 6e4]], device=device).to(dtype)
    y, dx = with_gradients(triton, x, torch.ones_like(x))
    assert torch.equal(y, torch.where(x > 0, x, 0)) and torch.equal(dx, (x > 0).to(dtype))


def test_equal_runs_give_equal_bits(device):
    arguments = inputs(129, 16, torch.bfloat16, device)
    first, second = (with_gradients(triton, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_beside_a_view_is_touched(device):
    from phi2_kernels import gelu_triton

    x, grad = inputs(5, 17, device=device)
    buffer = torch.empty(2, 5, 40, device=device)
    gelu_triton.forward(x, buffer[0, :, 3:20])
    gelu_triton.backward(grad, x, buffer[1, :, 3:20])
    assert torch.isfinite(buffer[:, :, 3:20]).all()
    assert buffer[:, :, :3].isnan().all() and buffer[:, :, 20:].isnan().all()


def test_the_output_made_again_is_written_over_the_gradient_and_changes_nothing_else(device):
    from phi2_kernels import gelu_triton

    x, grad = inputs(5, 17, device=device)
    dx, other = torch.empty_like(x), torch.empty_like(x)
    gelu_triton.backward(grad, x, dx)
    gelu_triton.backward(grad, x, other, again=True)
    assert torch.equal(dx, other)
    torch.testing.assert_close(grad, gelu_ref(x))


def test_an_expanded_gradient_is_understood(device):
    x, _ = inputs(5, 17, device=device)
    x = x.detach().requires_grad_()
    triton(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), in_float64(x, torch.ones_like(x))[1], rtol=1e-5, atol=2e-6)


def test_no_rows_give_no_rows(device):
    assert [z.shape for z in with_gradients(triton, *inputs(0, 17, device=device))] == [(0, 17)] * 2


def test_batches_of_rows_keep_their_shape(device):
    x, _ = inputs(6, 17, device=device)
    assert torch.equal(triton(x.unflatten(0, (2, 3))).flatten(0, 1), triton(x))
    assert torch.equal(triton(x[0]), triton(x)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(17, 2).T, "last dim of x must be contiguous, got stride 2"),
        (lambda: torch.zeros(2, 17).double(), "got torch.float64"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_in_one_line(make, message, device):
    with torch.device(device):  # not `.to`, which would copy what is strided into what is not
        x = make()
    with pytest.raises(ValueError, match=message) as refused:
        triton(x)
    assert "\n" not in str(refused.value)


def test_a_kernel_that_forgets_the_last_columns_is_caught(monkeypatch, device):
    from phi2_kernels import gelu_triton

    monkeypatch.setattr(gelu_triton, "cdiv", lambda a, b: max(1, a // b))
    x, _ = inputs(2, 1025, device=device)
    assert triton(x)[:, 1024].isnan().all()


def test_the_op_obeys_the_rules_of_custom_ops(device):
    x, _ = inputs(3, 17, device=device)
    torch.library.opcheck(op._gelu, (x.detach().requires_grad_(),))


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
