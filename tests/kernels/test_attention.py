"""Attention against its formula on every layout that one int32 per key can describe."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from phi2_kernels.attention import attention, attention_ref, attention_with_lse
from phi2_kernels.visibility import Visibility

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@st.composite
def layouts(draw) -> list[int]:
    """A row of documents, prefix-shared groups and pads, in any order."""
    until: list[int] = []
    for kind in draw(st.lists(st.sampled_from(["document", "group", "pad"]), min_size=1, max_size=4)):
        start = len(until)
        if kind == "pad":
            until += [0] * draw(st.integers(1, 5))
        elif kind == "document":
            n = draw(st.integers(1, 20))
            until += [start + n] * n
        else:
            prompt, answers = draw(st.integers(1, 12)), draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))
            until += [start + prompt + sum(answers)] * prompt
            for n in answers:
                until += [len(until) + n] * n
    return until


def qkv(B: int, T: int, H: int = 4, H_kv: int = 4, D: int = 80, dtype=torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(T)
    return [torch.randn(B, h, T, D, generator=g).to(dtype).requires_grad_() for h in (H, H_kv, H_kv)]


@given(layouts())
@settings(max_examples=30, deadline=None)
def test_layouts_equal_the_formula_with_every_gradient(until):
    assume(any(until))  # a row of pads alone has nothing to differentiate
    T = len(until)
    ours, theirs = qkv(1, T), qkv(1, T)
    visibility = Visibility(T, T, torch.tensor([until]).int(), torch.device("cpu"))
    upstream = torch.randn(1, 4, T, 80)
    out, expected = attention(*ours, visibility), attention_ref(*theirs, visibility)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    out.backward(upstream), expected.backward(upstream)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 129])
def test_plain_causal_equals_the_formula(T):
    q, k, v = qkv(2, T)
    visibility = Visibility(T, T, None, q.device)
    torch.testing.assert_close(attention(q, k, v, visibility), attention_ref(q, k, v, visibility), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
def test_queries_behind_a_cache_see_all_of_it(padded):
    S, T = 21, 4
    _, k, v = qkv(2, S)
    q = qkv(2, T)[0]
    until = torch.full((2, S), S).int() if padded else None
    if padded:
        until[1, :6] = 0
    visibility = Visibility(T, S, until, q.device)
    torch.testing.assert_close(attention(q, k, v, visibility), attention_ref(q, k, v, visibility), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("until", [None, [9] * 4 + [6] * 2 + [9] * 3])
def test_grouped_heads_equal_the_formula(until):
    q, k, v = qkv(1, 9, H=4, H_kv=2)
    visibility = Visibility(9, 9, None if until is None else torch.tensor([until]).int(), q.device)
    torch.testing.assert_close(attention(q, k, v, visibility), attention_ref(q, k, v, visibility), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_its_rounding_of_the_formula(dtype):
    q, k, v = qkv(1, 33, dtype=dtype)
    visibility = Visibility(33, 33, torch.tensor([[20] * 20 + [33] * 13]).int(), q.device)
    exact = attention_ref(q.float(), k.float(), v.float(), visibility)
    rounding = (exact.to(dtype).float() - exact).abs().max()
    assert (attention(q, k, v, visibility).float() - exact).abs().max() <= 4 * rounding


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("T", [1, 20])
def test_results_over_disjoint_keys_are_joined_by_their_lse(impl, T, device):
    q, k, v = (x[:, :, -n:].to(device) for x, n in zip(qkv(1, 48, H=4, H_kv=2), (T, 48, 48), strict=True))
    whole, first, second = (
        Visibility(T, 48, until and torch.tensor([until], device=device).int(), q.device)
        for until in (None, [48] * 17 + [0] * 31, [0] * 17 + [48] * 31)
    )
    (o1, lse1), (o2, lse2) = (attention_with_lse(q, k, v, part, impl=impl) for part in (first, second))
    o, lse = attention_with_lse(q, k, v, whole, impl=impl)
    joined = torch.logaddexp(lse1, lse2)
    torch.testing.assert_close(lse, joined)
    torch.testing.assert_close(o, o1 * (lse1 - joined).exp()[..., None] + o2 * (lse2 - joined).exp()[..., None])
    assert not lse.requires_grad
