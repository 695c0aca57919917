"""Products of half-precision and float32 tensors against float64: any shape, any scale, and nothing lost on the way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phi2_kernels import products
from phi2_kernels.products import matmul, product, weighted_matmul

# Of a float32 number kept as two; of one; and the smallest number.
LOST = {torch.bfloat16: 2**-17, torch.float16: 2**-23}
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALLEST = {torch.bfloat16: 0.0, torch.float16: 2**-24}
HALF = pytest.mark.parametrize("dtype", LOST, ids=str)


def draw(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def check_product(a: Tensor, b: Tensor) -> None:
    """a (n, k) half, b (k, m) float32: as good as float32 but for what two halves cannot hold."""
    exact = a.double() @ b.double()
    actual = product(a, b)
    error, plain = ((result.double() - exact).abs() for result in (actual, a.float() @ b))
    largest = a.double().abs().sum(dim=1, keepdim=True) * b.double().abs().max()  # (n, 1)
    assert actual.dtype == torch.float32 and actual.shape == exact.shape
    assert (error <= 4 * plain.max() + LOST[a.dtype] * largest).all()


FORMS = {
    "x A^T": lambda x: (x, draw(16, 80, seed=1).T),
    "g B": lambda x: (x, draw(80, 16, seed=1)),
    "g^T u": lambda x: (x.T, draw(40, 3, seed=1)),
    "x^T d": lambda x: (x[:, 7:].T, draw(40, 32, seed=1)[:, 16:]),
}


@HALF
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_products_are_as_good_as_float32(form, dtype, poison):
    check_product(*form(draw(40, 80).to(dtype)))


@HALF
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_weights_between_two_factors_cost_one_rounding_at_any_scale(scale, dtype, poison):
    """In float16 the weighted rows would vanish at the first scale and be infinite at the last."""
    a, b, weights = draw(40, 80).to(dtype), draw(80, 24, seed=1).to(dtype), draw(80, 1, scale=scale, seed=2)
    actual, terms = weighted_matmul(a, weights, b), weights.double() * b.double()
    allowed = a.double().abs() @ (ROUNDING[dtype] * terms.abs() + SMALLEST[dtype] * weights.abs().max())
    assert actual.dtype == torch.float32 and actual.isfinite().all()
    assert ((actual - a.double() @ terms).abs() <= allowed).all()


def test_weights_between_float32_factors_are_not_rounded():
    a, b, weights = draw(40, 80), draw(80, 24, seed=1), draw(80, 1, seed=2)
    torch.testing.assert_close(weighted_matmul(a, weights, b), a @ (weights * b))


@HALF
def test_the_low_halves_are_needed(dtype, monkeypatch):
    whole = products._halves

    def without_low(w: Tensor, dtype: torch.dtype) -> Tensor:
        halves = whole(w, dtype)
        halves[:, w.shape[1] :] = 0
        return halves

    monkeypatch.setattr(products, "_halves", without_low)
    for form in FORMS.values():
        with pytest.raises(AssertionError):
            check_product(*form(draw(40, 80).to(dtype)))


sizes, ranks, scales = st.integers(1, 40), st.sampled_from([1, 3, 16]), st.floats(-6, 4).map(lambda power: 10**power)
settled = settings(max_examples=60, deadline=None)


@settled
@given(st.sampled_from(list(LOST)), sizes, sizes, ranks, scales, st.integers(0, 99))
def test_products_of_any_shape_and_scale(dtype, n, k, rank, scale, seed):
    a = draw(n, k, seed=seed).to(dtype)
    check_product(a, draw(k, rank, scale=scale, seed=seed + 1))
    check_product(a, torch.zeros(k, rank))


@HALF
def test_factors_beyond_the_range_of_float16(dtype):
    a = draw(8, 8).to(dtype)
    for scale in (1e-30, 1e30):
        check_product(a, draw(8, 3, scale=scale))
    assert product(a, draw(8, 3, scale=1e-42)).abs().max() < 1e-40  # where float32 ends, too


@HALF
def test_what_is_not_finite_is_not_hidden(dtype):
    for value in (float("inf"), float("nan")):
        a = draw(8, 3)
        a[2, 1] = value
        assert not product(draw(4, 8).to(dtype), a)[:, 1].isfinite().any()


def test_float32_is_not_split(monkeypatch):
    monkeypatch.setattr(products, "_halves", lambda *_: pytest.fail("split"))
    a, b = draw(8, 3), draw(3, 5)
    assert torch.equal(product(a, b), a @ b)


@HALF
def test_a_matmul_of_halves_has_a_float32_result(dtype):
    a, b, bias = draw(8, 16).to(dtype), draw(16, 5).to(dtype), draw(5)
    assert torch.equal(matmul(a, b), a.float() @ b.float())
    torch.testing.assert_close(matmul(a, b, bias), a.float() @ b.float() + bias)
