"""LayerNorm's kernels against the formula in float64, in every dtype, on whole tensors and on views with wider rows."""

from __future__ import annotations

import pytest
import torch

from phi2_kernels import layer_norm as op
from phi2_kernels.layer_norm import layer_norm, layer_norm_ref

pytestmark = pytest.mark.usefixtures("poison")

EPS = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1), (3, 2), (2, 15), (5, 64), (4, 80), (17, 129), (3, 2560), (2, 3000), (1, 8192)]


def inputs(N: int, C: int, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    """x, far from mean 0 and variance 1, weight, bias and an upstream gradient; x and it are views of wider rows."""
    g = torch.Generator().manual_seed(N * C)
    wide = (torch.randn(N, 2 * C + 24, generator=g) * 3 + 1).to(device, dtype)
    weight, bias = torch.randn(2, C, generator=g).to(device, dtype)
    return [wide[:, 8 : 8 + C], weight, bias, wide[:, C + 16 : 2 * C + 16]]


def with_gradients(function, x, weight, bias, grad) -> list[torch.Tensor]:
    """y, dx, dweight, dbias."""
    leaves = [z.detach().requires_grad_() for z in (x, weight, bias)]
    y = function(*leaves, EPS)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def in_float64(x, weight, bias, grad) -> list[torch.Tensor]:
    def normalise(x, weight, bias, eps):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)

    return with_gradients(normalise, *(z.double() for z in (x, weight, bias, grad)))


def largest_term_of_dx(x, weight, bias, grad) -> torch.Tensor:
    """dx is a sum of these, and with a single column of nothing but their rounding."""
    rstd = (x.double().var(dim=-1, unbiased=False, keepdim=True) + EPS).rsqrt()
    return (grad.double() * weight.double() * rstd).abs().max()


def assert_as_exact_as(theirs, ours, exact, arguments, dtype) -> None:
    """At most twice the error torch has in the same dtype, or one rounding of the largest number."""
    for name, mine, other, truth in zip(("y", "dx", "dweight", "dbias"), ours, theirs, exact, strict=True):
        largest = largest_term_of_dx(*arguments) if name == "dx" else truth.abs().max()
        allowed = 2 * (other - truth).abs().max() + torch.finfo(dtype).eps * largest
        assert (mine - truth).abs().max() <= allowed, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_every_gradient_are_as_exact_as_torchs(shape, dtype, device):
    arguments = inputs(*shape, dtype, device)
    ours = with_gradients(lambda *a: layer_norm(*a, impl="triton"), *arguments)
    theirs = with_gradients(lambda *a: layer_norm(*a, impl="torch"), *arguments)
    assert all(z.dtype == dtype for z in ours)
    assert_as_exact_as(theirs, ours, in_float64(*arguments), arguments, dtype)


def test_the_formula_is_torchs():
    x, weight, bias, _ = inputs(5, 80)
    torch.testing.assert_close(layer_norm_ref(x, weight, bias, EPS), layer_norm(x, weight, bias, EPS, impl="torch"))


def test_float32_is_exact_to_its_rounding(device):
    arguments = inputs(17, 129, device=device)
    ours = with_gradients(lambda *a: layer_norm(*a, impl="triton"), *arguments)
    for mine, truth in zip(ours, in_float64(*arguments), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5)


def test_a_large_mean_does_not_swallow_the_variance(device):
    x, weight, bias, _ = inputs(3, 2560, device=device)
    y = layer_norm(x + 1000, weight, bias, EPS, impl="triton")
    exact = in_float64(x + 1000, weight, bias, x)[0]
    torch.testing.assert_close(y.double(), exact, rtol=1e-3, atol=1e-3)  # sum(x^2) - sum(x)^2 is off by 1e-1 here


def test_more_rows_than_programs_are_all_summed(monkeypatch, device):
    from phi2_kernels import layer_norm_triton

    arguments = inputs(17, 80, device=device)
    monkeypatch.setattr(layer_norm_triton, "MULTIPROCESSORS", {80: 2, 90: 2})
    ours = with_gradients(lambda *a: layer_norm(*a, impl="triton"), *arguments)
    for mine, truth in zip(ours, in_float64(*arguments), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-5)


def test_equal_runs_give_equal_bits(device):
    arguments = inputs(17, 129, torch.bfloat16, device)
    first, second = (with_gradients(lambda *a: layer_norm(*a, impl="triton"), *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_made_again_from_the_statistics_is_the_forward_passes_bit_for_bit(dtype, sums, device):
    from phi2_kernels import layer_norm_triton

    x, weight, bias, grad = inputs(5, 129, dtype, device)
    y, mean, rstd = op._layer_norm(x, weight, bias, EPS)
    buffer = torch.empty(5, 300, dtype=dtype, device=device)
    again = bias, buffer[:, 50:179]
    layer_norm_triton.backward(grad, x, weight, mean, rstd, torch.empty_like(x), again=again, sums=sums)
    assert torch.equal(buffer[:, 50:179], y)
    assert buffer[:, :50].isnan().all() and buffer[:, 179:].isnan().all()  # nothing beside it was touched


def test_the_gradient_that_came_past_is_added(device):
    from phi2_kernels import layer_norm_triton

    x, weight, bias, grad = inputs(5, 129, device=device)
    _, mean, rstd = op._layer_norm(x, weight, bias, EPS)
    dx, both = torch.empty_like(x), torch.empty_like(x)
    layer_norm_triton.backward(grad, x, weight, mean, rstd, dx, sums=False)
    layer_norm_triton.backward(grad, x, weight, mean, rstd, both, x, sums=False)
    torch.testing.assert_close(both, dx + x)


def test_sums_over_rows_are_made_only_for_a_weight_that_trains(monkeypatch, device):
    asked = []
    real = op._layer_norm_backward
    monkeypatch.setattr(op, "_layer_norm_backward", lambda *a: asked.append(a[-1]) or real(*a))
    x, weight, bias, grad = inputs(4, 80, device=device)
    for trains in (False, True):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_(trains)
        layer_norm(x, weight, bias, EPS, impl="triton").backward(grad)
    assert asked == [False, True] and torch.isfinite(weight.grad).all()


def test_an_expanded_gradient_is_understood(device):
    x, weight, bias, _ = inputs(5, 129, device=device)
    x = x.detach().requires_grad_()
    layer_norm(x, weight, bias, EPS, impl="triton").sum().backward()
    torch.testing.assert_close(
        x.grad.double(), in_float64(x, weight, bias, torch.ones_like(x))[1], rtol=1e-5, atol=1e-5
    )


def test_no_rows_give_no_rows_and_zero_sums(device):
    _, dx, dweight, dbias = with_gradients(lambda *a: layer_norm(*a, impl="triton"), *inputs(0, 80, device=device))
    assert dx.shape == (0, 80) and not dweight.any() and not dbias.any()


def test_batches_of_rows_keep_their_shape(device):
    x, weight, bias, _ = inputs(6, 80, device=device)
    y = layer_norm(x.unflatten(0, (2, 3)), weight, bias, EPS, impl="triton")
    assert torch.equal(y.flatten(0, 1), layer_norm(x, weight, bias, EPS, impl="triton"))
    assert torch.equal(layer_norm(x[0], weight, bias, EPS, impl="triton"), y[0, 0])


def test_a_weight_that_is_not_contiguous_is_refused(device):
    x, weight = torch.zeros(2, 80, device=device), torch.ones(160, device=device)[::2]
    with pytest.raises(ValueError, match="the last dim of weight must be contiguous, got stride 2"):
        layer_norm(x, weight, x[0], EPS, impl="triton")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(2, 8193), "1 to 8192 columns, got 8193"),
        (lambda: torch.zeros(80, 2).T, "last dim of x must be contiguous, got stride 2"),
        (lambda: torch.zeros(2, 80).double(), "got torch.float64"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_in_one_line(make, message, device):
    x = make().to(device)
    with pytest.raises(ValueError, match=message) as refused:
        layer_norm(x, x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1]), EPS, impl="triton")
    assert "\n" not in str(refused.value)


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"must be of shape \(80,\), got \(81,\) and \(80,\)"):
        layer_norm(torch.zeros(2, 80), torch.ones(81), torch.zeros(80), EPS)


def test_a_kernel_that_forgets_the_second_piece_of_a_row_is_caught(monkeypatch, device):
    from phi2_kernels import layer_norm_triton

    monkeypatch.setattr(layer_norm_triton, "_pieces", lambda C: {"C": C // 2, "C1": C // 2, "C2": 1})
    x, weight, bias, _ = inputs(3, 64, device=device)
    assert not torch.isfinite(layer_norm(x, weight, bias, EPS, impl="triton")).all()


@pytest.mark.parametrize("trains", [False, True])
def test_the_op_obeys_the_rules_of_custom_ops(trains, device):
    x, weight, bias, _ = inputs(3, 64, device=device)
    leaves = [x.detach().requires_grad_(), *(z.detach().requires_grad_(trains) for z in (weight, bias))]
    torch.library.opcheck(op._layer_norm, (*leaves, EPS))


def test_it_compiles_whole_and_gives_the_same_numbers(device):
    arguments = inputs(5, 80, device=device)
    eager = with_gradients(lambda *a: layer_norm(*a, impl="triton"), *arguments)
    whole = torch.compile(lambda *a: layer_norm(*a, impl="triton"), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(eager, with_gradients(whole, *arguments), strict=True))


def test_it_runs_under_activation_checkpointing(device):
    from torch.utils.checkpoint import checkpoint

    arguments = inputs(5, 80, device=device)
    plain = with_gradients(lambda *a: layer_norm(*a, impl="triton"), *arguments)
    again = with_gradients(
        lambda *a: checkpoint(lambda *b: layer_norm(*b, impl="triton"), *a, use_reentrant=False), *arguments
    )
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
