"""Rotary's kernels against the formula in float64: into a new tensor, in place in a packed buffer, into the cache."""

from __future__ import annotations

import pytest
import torch

from phi2_kernels import rotary as op
from phi2_kernels.rotary import rotary, rotary_, rotary_and_store, rotary_angles

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 1, 1, 80, 32), (2, 3, 4, 80, 32), (1, 17, 2, 64, 32), (3, 2, 33, 16, 16), (2, 5, 3, 25, 12)]  # B T H D R


def heads(*shape: int, dtype=torch.float32, device="cpu") -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def tables(positions: torch.Tensor, R: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(L, R/2) each, in float32."""
    cos, sin = rotary_angles(positions[None], R, 10000.0)
    return cos.flatten(0, 2), sin.flatten(0, 2)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The formula on complex numbers, in float64; cos and sin (N, R/2), x (N, H, D)."""
    half = cos.shape[-1]
    z = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double())
    z = z * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((z.real, z.imag, x[..., 2 * half :].double()), dim=-1)


def assert_rounded(got: torch.Tensor, exact: torch.Tensor) -> None:
    eps = torch.finfo(got.dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=eps, atol=2e-7 if got.dtype == torch.float32 else eps * 1e-2)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradient_equal_the_formula(shape, dtype, impl, device):
    B, T, H, D, R = shape
    x, upstream = heads(B, T, H, D, dtype=dtype, device=device), heads(B, T, H, D + 1, dtype=dtype, device=device)
    upstream = upstream[..., 1:]  # unaligned, with wider rows
    cos, sin = rotary_angles(torch.randint(0, 2000, (B, T), device=device), R, 10000.0)
    x.requires_grad_()
    y = rotary(x, cos, sin, impl=impl)
    y.backward(upstream)
    flat = cos.flatten(0, 2), sin.flatten(0, 2)
    assert_rounded(y.detach().flatten(0, 1), rotated(x.detach().flatten(0, 1), *flat))
    assert_rounded(x.grad.flatten(0, 1), rotated(upstream.flatten(0, 1), flat[0], -flat[1]))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_row_of_angles_serves_every_batch_row(impl, device):
    x = heads(3, 5, 2, 80, device=device)
    cos, sin = rotary_angles(torch.arange(5, device=device)[None], 32, 10000.0)
    assert_rounded(rotary(x, cos, sin, impl=impl)[2], rotated(x[2], cos[0, :, 0], sin[0, :, 0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_queries_and_keys_turn_where_they_lie_in_a_packed_buffer(impl, inverse, dtype, device):
    N, H, D, R = 7, 4, 80, 32
    buffer = heads(N, 3 * H * D + 40, dtype=dtype, device=device)
    before = buffer.clone()
    cos, sin = tables(torch.tensor([0, 1, 2, 49, 3, 3, 17], device=device), R)  # packed: they start again
    rotary_(buffer[:, 16 : 16 + 2 * H * D].unflatten(1, (2 * H, D)), cos, sin, inverse=inverse, impl=impl)
    view = before[:, 16 : 16 + 2 * H * D].unflatten(1, (2 * H, D))
    exact = rotated(view, cos, -sin if inverse else sin)
    assert_rounded(buffer[:, 16 : 16 + 2 * H * D].unflatten(1, (2 * H, D)), exact)
    untouched = torch.cat((buffer[:, :16], buffer[:, 16 + 2 * H * D :]), 1)
    assert torch.equal(untouched, torch.cat((before[:, :16], before[:, 16 + 2 * H * D :]), 1))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_turning_back_restores(impl, device):
    x = heads(9, 3, 80, device=device)
    there = x.clone()
    cos, sin = tables(torch.arange(3, device=device), 32)  # three entries serve nine rows in turn
    rotary_(there, cos, sin, impl=impl)
    assert not torch.allclose(there, x)
    rotary_(there, cos, sin, inverse=True, impl=impl)
    torch.testing.assert_close(there, x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "H_kv"), [(4, 4), (6, 2), (2, 17)])
def test_a_decode_step_turns_queries_and_fills_the_slots_of_the_cache(H, H_kv, dtype, impl, device):
    B, D, R, S = 3, 80, 32, 11
    packed = heads(B, (H + 2 * H_kv) * D, dtype=dtype, device=device)
    q, k, v = (z.unflatten(1, (-1, D)) for z in packed.split([H * D, H_kv * D, H_kv * D], dim=1))
    cache = torch.full((2, B, H_kv, S, D), 7.0, dtype=dtype, device=device)
    cos, sin = tables(torch.tensor([4, 0, 19], device=device), R)
    slots = torch.tensor([4, 10, 0], dtype=torch.int32, device=device)
    expected_q, expected_k = (rotated(z.clone(), cos, sin) for z in (q, k))
    before_k, before_v = k.clone(), v.clone()
    rotary_and_store(q, k, v, cos, sin, slots, *cache, impl=impl)
    assert_rounded(q, expected_q)
    assert torch.equal(k, before_k) and torch.equal(v, before_v)
    written = torch.zeros(B, S, dtype=torch.bool, device=device)
    written[torch.arange(B), slots.long()] = True
    keys, values = cache.transpose(2, 3)  # (B, S, H_kv, D)
    assert_rounded(keys[written], expected_k)
    assert torch.equal(values[written], v)
    assert (cache.transpose(2, 3)[:, ~written] == 7).all()


def test_a_slot_outside_the_cache_is_not_written(device):
    q, k, v = (heads(2, 2, 80, device=device) for _ in range(3))
    cache = torch.full((2, 2, 2, 4, 80), 7.0, device=device)
    cos, sin = tables(torch.arange(5, device=device), 32)
    wrong = torch.tensor([5, -1], dtype=torch.int32, device=device)
    rotary_and_store(q, k, v, cos, sin, wrong, *cache, impl="triton")
    assert q.isfinite().all() and (cache == 7).all()


def test_no_rows_are_nothing_to_do(device):
    cos, sin = tables(torch.arange(5, device=device), 32)
    rotary_(heads(0, 2, 80, device=device), cos, sin, impl="triton")
    angles = (table.view(1, 5, 1, 16)[:, :0] for table in (cos, sin))
    assert rotary(heads(1, 0, 2, 80, device=device), *angles, impl="triton").shape == (1, 0, 2, 80)


def test_an_expanded_gradient_is_understood(device):
    x = heads(1, 3, 2, 80, device=device).requires_grad_()
    cos, sin = rotary_angles(torch.arange(3, device=device)[None], 32, 10000.0)
    rotary(x, cos, sin, impl="triton").sum().backward()
    assert_rounded(x.grad[0], rotated(torch.ones_like(x[0]), cos[0, :, 0], -sin[0, :, 0]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (torch.zeros(3, 80, 2).mT, torch.zeros(3, 16)), "last dim must be contiguous, got stride 2"),
        (lambda: (torch.zeros(3, 2, 24), torch.zeros(3, 16)), "cannot turn 32 of 24 dims"),
        (
            lambda: (torch.zeros(3, 2, 80), torch.zeros(3, 32)[:, ::2]),
            r"tables must be contiguous and alike, got strides \(32, 2\)",
        ),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_in_one_line(make, message, device):
    with torch.device(device):  # not `.to`, which would copy what is strided into what is not
        x, cos = make()
    with pytest.raises(ValueError, match=message) as refused:
        rotary_(x, cos, cos, impl="triton")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype, step", [(torch.int32, 2), (torch.int64, 1)])
def test_slots_are_int32_and_contiguous(dtype, step, device):
    q, cos, cache = (torch.zeros(size, device=device) for size in ((3, 2, 80), (3, 16), (3, 2, 4, 80)))
    slots = torch.zeros(3 * step, dtype=dtype, device=device)[::step]
    with pytest.raises(ValueError, match="slots must be int32 and contiguous"):
        rotary_and_store(q, q, q, cos, cos, slots, cache, cache, impl="triton")


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_angles_must_be_of_every_token(impl, device):
    cos = torch.zeros(1, 7, 1, 16, device=device)
    with pytest.raises(ValueError, match=r"angles must be of \(1 or 2, 10\) tokens, got \(1, 7\)"):
        rotary(torch.zeros(2, 10, 3, 80, device=device), cos, cos, impl=impl)


def test_a_turn_the_wrong_way_is_caught(monkeypatch, device):
    from phi2_kernels import rotary_triton

    real = rotary_triton.apply_rotary
    monkeypatch.setattr(rotary_triton, "apply_rotary", lambda x, c, s, inverse, y=None: real(x, c, s, not inverse, y))
    with pytest.raises(AssertionError):
        test_values_and_gradient_equal_the_formula(SHAPES[1], torch.bfloat16, "triton", device)


def test_the_ops_obey_the_rules_of_custom_ops(device):
    x = heads(6, 2, 80, device=device)
    cos, sin = tables(torch.arange(6, device=device), 32)
    numbers = torch.arange(6, dtype=torch.int32, device=device)
    cache = torch.zeros(2, 6, 2, 8, 80, device=device)
    torch.library.opcheck(op._rotary, (x.clone().requires_grad_(), cos, sin, False))
    torch.library.opcheck(op._rotary_, (x, cos, sin, True))
    torch.library.opcheck(op._rotary_and_store, (x, x + 1, x + 2, cos, sin, numbers, *cache.unbind()))


def test_it_compiles_whole_and_gives_the_same_numbers(device):
    cos, sin = rotary_angles(torch.arange(5, device=device)[None], 32, 10000.0)

    def there_and_back(x):
        y = rotary(x, cos, sin, impl="triton")
        back = y.detach().clone()
        rotary_(back.flatten(0, 1), cos.flatten(0, 2), sin.flatten(0, 2), inverse=True, impl="triton")
        return y, back

    results = []
    for function in (there_and_back, torch.compile(there_and_back, fullgraph=True, backend="aot_eager")):
        x = heads(2, 5, 3, 80, device=device).requires_grad_()
        y, back = function(x)
        y.square().sum().backward()
        results.append((y, back, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
