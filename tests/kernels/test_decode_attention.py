"""Attention of one query to its cache, against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi2_kernels import decode_attention as op
from phi2_kernels import decode_attention_triton
from phi2_kernels.decode_attention import decode_attention, decode_attention_ref

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


@pytest.mark.parametrize("D", [16, 48, 64])
def test_every_multiple_of_16_up_to_80_is_a_head_dim(D, device):
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
    monkeypatch.setattr(decode_attention_triton, "pieces_of", lambda D: (64,))
    assert largest_error(decode_attention(*arguments, impl="triton"), exact_attention(*arguments)) > 1e-2


def test_the_reference_is_the_formula():
    q, k, v = qkv(B=2, H=2, H_kv=1, S=12)
    lengths, until = int32([12, 5]), int32([[0] * 3 + [12] * 9, [12] * 12])
    assert largest_error(decode_attention_ref(q, k, v, lengths, until), exact_attention(q, k, v, lengths, until)) < 2e-6


def test_splits_depend_on_the_size_of_the_cache_alone():
    assert [decode_attention_triton.splits_of(S) for S in (1, 1024, 1025, 2048, 10**6)] == [4, 4, 5, 8, 64]


q, k, v = qkv(S=5)
REFUSED = {
    "one query per row": lambda: decode_attention(q.expand(-1, -1, 2, -1), k, v),
    "an H_kv that divides 2": lambda: decode_attention(q, k[:, :1].repeat(1, 3, 1, 1), v[:, :1].repeat(1, 3, 1, 1)),
    r"lengths must be of shape \(1,\), got \(2,\)": lambda: decode_attention(q, k, v, int32([5, 5])),
    r"until must be of shape \(1, 5\), got \(1, 4\)": lambda: decode_attention(q, k, v, None, int32([[5] * 4])),
    "lengths and until must be int32": lambda: decode_attention(q, k, v, torch.tensor([5]), impl="triton"),
    "multiple of 16 up to 80, got 72": lambda: decode_attention(*qkv(D=72), impl="triton"),
    "multiple of 16 up to 80, got 96": lambda: decode_attention(*qkv(D=96), impl="triton"),
    "at most 8 query heads": lambda: decode_attention(*qkv(H=9, H_kv=1), impl="triton"),
    "must be of one dtype": lambda: decode_attention(q.half(), k, v, impl="triton"),
    "last dim of k must be contiguous, got stride 5": lambda: decode_attention(
        q, k.mT.contiguous().mT, v, impl="triton"
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_run_is_refused_in_one_line(message):
    with pytest.raises(ValueError, match=message) as raised:
        REFUSED[message]()
    assert "\n" not in str(raised.value)


def test_the_op_is_what_torch_compile_believes(device):
    arguments = (*qkv(S=20, device=device), int32([15], device), int32([[20] * 20], device))
    torch.library.opcheck(op._decode_attention, arguments)


def test_it_compiles_to_one_graph_with_equal_results(device):
    q, k, v = qkv(S=20, device=device)
    lengths = int32([15], device)

    def attend(q):
        return decode_attention(q, k, v, lengths, impl="triton")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), attend(q), rtol=0, atol=0)
