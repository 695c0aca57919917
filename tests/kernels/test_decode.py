"""The ops of a decode step against their formulas: attention to a cache, and matmuls of a few rows with any weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from phi2_kernels import decode, decode_triton
from phi2_kernels.decode import (
    decode_attention,
    decode_attention_ref,
    dequantize_int4,
    dequantize_int8,
    gemv,
    gemv_int4,
    gemv_int8,
    gemv_ref,
    quantize_int4,
    quantize_int8,
)

pytestmark = pytest.mark.usefixtures("poison")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, dtype=torch.float32, device="cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def qkv(B=1, H=2, H_kv=2, S=70, D=80, dtype=torch.float32, device="cpu") -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        normal(*shape, dtype=dtype, device=device) for shape in ((B, H, 1, D), (B, H_kv, S, D), (B, H_kv, S, D))
    )


def int32(values: list, device="cpu") -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def largest_error(result: Tensor, exact: Tensor) -> float:
    assert result.shape == exact.shape
    return (result.double() - exact).abs().max().nan_to_num(torch.inf).item()


def exact_attention(q: Tensor, k: Tensor, v: Tensor, lengths=None, until=None) -> Tensor:
    """One row and one head at a time, in float64, over the keys that are seen and no others."""
    o = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for b in range(q.shape[0]):
        n = k.shape[2] if lengths is None else int(lengths[b])
        seen = [j for j in range(n) if until is None or n <= until[b, j]]
        for h in range(q.shape[1] if seen else 0):
            keys, values = (x[b, h * k.shape[1] // q.shape[1], seen].double() for x in (k, v))
            o[b, h, 0] = (keys @ q[b, h, 0].double() / q.shape[3] ** 0.5).softmax(dim=0) @ values
    return o


def assert_exact_but_for_rounding(result: Tensor, exact: Tensor, float32_error: float) -> None:
    """Sums are float32; a half-precision result is off by at most one unit in its last place beside.

    Half of one on a GPU; the interpreter cuts bfloat16 off.
    """
    unit = 0 if result.dtype == torch.float32 else torch.finfo(result.dtype).eps
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= unit * exact.abs() + float32_error).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("S", [1, 17, 129])
def test_attention_to_a_full_cache_equals_the_formula(S, dtype, device):
    arguments = qkv(S=S, dtype=dtype, device=device)
    out = decode_attention(*arguments, impl="triton")
    assert_exact_but_for_rounding(out, exact_attention(*arguments), 2e-6)


@pytest.mark.parametrize("D", [16, 64, 112])
def test_every_sum_of_three_powers_of_two_is_a_head_dim(D, device):
    arguments = qkv(S=33, D=D, device=device)
    assert largest_error(decode_attention(*arguments, impl="triton"), exact_attention(*arguments)) <= 2e-6


@pytest.mark.parametrize(("H", "H_kv"), [(4, 2), (3, 1)])
def test_grouped_heads_share_a_key_value_head(H, H_kv, device):
    arguments = qkv(H=H, H_kv=H_kv, S=40, device=device)
    assert largest_error(decode_attention(*arguments, impl="triton"), exact_attention(*arguments)) <= 2e-6


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_only_filled_and_visible_keys_count(impl, device):
    q, k, v = qkv(B=4, H=1, H_kv=1, S=50, device=device)
    lengths = int32([50, 37, 20, 0], device)
    until = int32([[50] * 50, [0] * 9 + [50] * 41, [0] * 20 + [50] * 30, [50] * 50], device)
    until[0, 10:20] = 30  # a document that ended
    out = decode_attention(q, k, v, lengths, until, impl=impl)
    assert largest_error(out, exact_attention(q, k, v, lengths, until)) <= 2e-6
    assert not out[2:].any()  # pads alone, and an empty row
    assert largest_error(out, exact_attention(q, k, v, lengths)) > 1e-2  # a dropped mask would be seen
    assert largest_error(out, exact_attention(q, k, v, None, until)) > 1e-2


def test_what_lies_behind_the_filled_keys_is_never_read(device):
    q, k, v = qkv(S=300, device=device)
    expected = decode_attention(q, k[:, :, :70], v[:, :, :70], impl="triton")
    k[:, :, 70:], v[:, :, 70:] = torch.nan, torch.nan
    assert largest_error(decode_attention(q, k, v, int32([70], device), impl="triton"), expected) <= 2e-6


def test_views_of_wider_buffers_and_odd_strides_are_read_where_they_lie(device):
    wide = normal(2, 3, 45, 3 * 80 + 7, device=device)
    q, k, v = wide[:, :, 44:, 1:81], wide[:, :, :43, 81:161], wide[:, :, 1:44, 163:243]
    lengths = int32([[30, 0], [43, 0]], device)[:, 0]
    out = decode_attention(q, k, v, lengths, impl="triton")
    assert largest_error(out, exact_attention(q, k, v, lengths)) <= 2e-6


def test_scores_past_the_range_of_half_precision_stay_finite(device):
    q, k, v = qkv(S=20, dtype=torch.float16, device=device)
    q, k = 300 * q.sign(), 300 * k.sign()  # |q . k| up to 7 200 000
    assert largest_error(decode_attention(q, k, v, impl="triton"), exact_attention(q, k, v)) < 2e-3


def test_a_lost_second_piece_of_the_head_is_seen(device, monkeypatch):
    arguments = qkv(S=20, device=device)
    monkeypatch.setattr(decode_triton, "pieces_of", lambda D: (64,))
    assert largest_error(decode_attention(*arguments, impl="triton"), exact_attention(*arguments)) > 1e-2


def test_the_reference_is_the_formula():
    q, k, v = qkv(B=2, H=2, H_kv=1, S=12)
    lengths, until = int32([12, 5]), int32([[0] * 3 + [12] * 9, [12] * 12])
    assert largest_error(decode_attention_ref(q, k, v, lengths, until), exact_attention(q, k, v, lengths, until)) < 2e-6


def test_splits_depend_on_the_size_of_the_cache_alone():
    assert [decode_triton.splits_of(S) for S in (1, 1024, 1025, 2048, 10**6)] == [4, 4, 5, 8, 64]


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
@pytest.mark.parametrize(("M", "N", "K"), [(1, 17, 1056), (3, 9, 96), (8, 5, 544)])
def test_a_matmul_of_few_rows_equals_the_formula(form, M, N, K, dtype, device):
    x, weight, bias = (normal(*s, dtype=dtype, device=device) for s in ((M, K), (N, K), (N,)))
    op, used = matmul(form, weight / 32)
    assert_exact_but_for_rounding(op(x, bias, impl="triton"), exact_matmul(x, used, bias), 1e-5)


@pytest.mark.parametrize("form", ["float", "int8", "int4"])
def test_torch_and_triton_are_one_op(form, device):
    x, weight = normal(2, 1, 64, device=device), normal(11, 64, device=device)
    op, _ = matmul(form, weight)
    torch.testing.assert_close(op(x, None, impl="triton"), op(x, None, impl="torch"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [16, 64, 256])
def test_a_group_may_be_any_power_of_two_from_16_to_256(group, device):
    x, weight = normal(1, 768, device=device), normal(3, 768, device=device)
    op, used = matmul("int4", weight, group)
    assert largest_error(op(x, None, impl="triton"), exact_matmul(x, used, None)) <= 1e-4


@pytest.mark.parametrize("K", [1, 31, 517])
def test_rows_and_widths_of_any_view_are_taken(K, device):
    x, weight = normal(3, K + 5, device=device)[:, 2 : 2 + K], normal(7, K + 3, device=device)[:, 3:]
    assert largest_error(gemv(x, weight, impl="triton"), exact_matmul(x, weight.double(), None)) <= 1e-4


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


q, k, v = qkv(S=5)
x, weight = normal(2, 32), normal(3, 32)
packed = quantize_int4(weight, 32)
REFUSED = {
    "one query per row": lambda: decode_attention(q.expand(-1, -1, 2, -1), k, v),
    "an H_kv that divides 2": lambda: decode_attention(q, k[:, :1].repeat(1, 3, 1, 1), v[:, :1].repeat(1, 3, 1, 1)),
    r"lengths must be of shape \(1,\), got \(2,\)": lambda: decode_attention(q, k, v, int32([5, 5])),
    r"until must be of shape \(1, 5\), got \(1, 4\)": lambda: decode_attention(q, k, v, None, int32([[5] * 4])),
    "lengths and until must be int32": lambda: decode_attention(q, k, v, torch.tensor([5]), impl="triton"),
    "at most three powers of two from 16 to 256, got 72": lambda: decode_attention(*qkv(D=72), impl="triton"),
    "at most three powers of two from 16 to 256, got 240": lambda: decode_attention(*qkv(D=240), impl="triton"),
    "at most 8 query heads": lambda: decode_attention(*qkv(H=9, H_kv=1), impl="triton"),
    "must be of one dtype": lambda: decode_attention(q.half(), k, v, impl="triton"),
    "last dim of k must be contiguous, got stride 5": lambda: decode_attention(
        q, k.mT.contiguous().mT, v, impl="triton"
    ),
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
    q, k, v = qkv(S=20, device=device)
    x, weight, bias = normal(2, 64, device=device), normal(3, 64, device=device), normal(3, device=device)
    return {
        "attention": (decode._decode_attention, (q, k, v, int32([15], device), int32([[20] * 20], device))),
        "gemv": (decode._gemv, (x, weight, None, bias)),
        "gemv_int8": (decode._gemv, (x, *quantize_int8(weight), bias)),
        "gemv_int4": (decode._gemv_int4, (x, *quantize_int4(weight), bias, 32)),
    }


@pytest.mark.parametrize("name", ["attention", "gemv", "gemv_int8", "gemv_int4"])
def test_ops_are_what_torch_compile_believes(name, device):
    op, arguments = ops(device)[name]
    torch.library.opcheck(op, arguments)


def test_a_decode_step_compiles_to_one_graph_with_equal_results(device):
    q, k, v = qkv(S=20, device=device)
    weight, lengths = normal(8, 160, device=device), int32([15], device)

    def step(q):
        attended = decode_attention(q, k, v, lengths, impl="triton")
        return gemv(attended.flatten(1), weight, impl="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), step(q), rtol=0, atol=0)


def test_the_matmul_reference_is_the_formula():
    bias = normal(3)
    assert largest_error(gemv_ref(x, weight, bias), exact_matmul(x, weight.double(), bias)) < 1e-5
