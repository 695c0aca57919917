"""The Triton attention against dense masks in float64: outputs, logsumexp, every gradient, and what is skipped."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from phi2_kernels import attention_backward_triton, attention_forward_triton, attention_tiles_triton
from phi2_kernels._dispatch import tl, triton
from phi2_kernels.attention import _attention, attention, attention_with_lse
from phi2_kernels.attention_tiles_triton import AttentionLaunch
from phi2_kernels.visibility import Visibility

LAYOUTS = {
    "left padded": [0] * 19 + [70] * 51,
    "right padded": [51] * 51 + [0] * 19,
    "documents that end inside tiles": [1] + [34] * 33 + [35] + [70] * 35,
    "documents with pads between": [20] * 20 + [0] * 5 + [64] * 39 + [0] * 6,
    "prefix-shared pair": [70] * 40 + [57] * 17 + [70] * 13,
    "two pairs": [40] * 10 + [33] * 23 + [40] * 7 + [70] * 3 + [60] * 17 + [70] * 10,
    "four answers, one empty": [70] * 20 + [29] * 9 + [60] * 31 + [70] * 10,
    "pads alone": [0] * 70,
}


@pytest.fixture(autouse=True)
def interpreted_launches(monkeypatch) -> None:
    """In the interpreter float32, whose numbers are the sharpest, takes the tiles that half precision has on a GPU."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(attention_tiles_triton, "FLOAT32", attention_tiles_triton.LAUNCH[80])


def make_qkv(T: int, S: int | None = None, *, B=1, H=1, H_kv=1, D=80, dtype=torch.float32, device="cpu", width=0):
    """q (B, H, T, D), k and v (B, H_kv, S, D): views of one buffer, whose rows are `width` longer than they need be."""
    S = S or T
    torch.manual_seed(T + S)
    rows = torch.randn(B, S, (H + 2 * H_kv) * D + width, dtype=dtype).to(device)
    q, k, v = rows[..., : (H + 2 * H_kv) * D].unflatten(-1, (-1, D)).split([H, H_kv, H_kv], dim=2)
    return [x.requires_grad_() for x in (q[:, S - T :].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))]


def make_visibility(T: int, S: int, *rows: list[int], device="cpu") -> Visibility:
    """Plain causal without rows of `until`."""
    until = torch.tensor(rows, dtype=torch.int32, device=device) if rows else None
    return Visibility(T, S, until, torch.device(device, 0) if device == "cuda" else torch.device(device))


def exact(q, k, v, visibility):
    """o and lse with a dense mask, in float64; differentiable."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    i = torch.arange(visibility.keys - visibility.queries, visibility.keys, device=q.device)[:, None]
    j = torch.arange(visibility.keys, device=q.device)
    seen = (j <= i)[None, None]
    if visibility.until is not None:
        seen = seen & (i < visibility.until[:, None, None])
    scores = q @ k.repeat_interleave(groups, dim=1).mT / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -1e30).softmax(-1) * seen
    lse = scores.masked_fill(~seen, float("-inf")).logsumexp(-1)
    return weights @ v.repeat_interleave(groups, dim=1), lse, (q, k, v)


def results(q, k, v, visibility, impl, upstream):
    """o, dq, dk, dv."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*inputs, visibility, impl=impl)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream.to(out.dtype))


def expected(q, k, v, visibility, upstream):
    out, _, inputs = exact(q, k, v, visibility)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream.double())


def check(q, k, v, visibility, impl="triton"):
    """Float32 equals the dense mask to rounding; halves are at most twice as far from it as torch's own kernels."""
    upstream = torch.randn(q.shape, device=q.device).to(q.dtype)
    ours, true = results(q, k, v, visibility, impl, upstream), expected(q, k, v, visibility, upstream)
    if q.dtype == torch.float32:
        for mine, other in zip(ours, true, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)
        return
    theirs = results(q, k, v, visibility, "torch", upstream)
    for mine, other, reference in zip(ours, theirs, true, strict=True):
        assert (mine - reference).norm() <= 2 * (other - reference).norm() + 1e-6


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 200])
def test_causal_equals_a_dense_mask_at_every_length(T, device, poison):
    check(*make_qkv(T, H=2, H_kv=2, device=device), make_visibility(T, T, device=device))


@pytest.mark.parametrize("D", [16, 32, 48, 64])
def test_every_multiple_of_16_up_to_80_is_a_head_dim(D, device, poison):
    check(*make_qkv(35, D=D, device=device), make_visibility(35, 35, device=device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_equal_a_dense_mask(layout, device, poison):
    check(*make_qkv(70, B=2, device=device), make_visibility(70, 70, LAYOUTS[layout], [70] * 70, device=device))


@pytest.mark.parametrize("rows", [[], [LAYOUTS["two pairs"]]], ids=["causal", "pairs"])
@pytest.mark.parametrize("M, N", [(16, 64), (64, 16), (32, 128), (128, 32)])
def test_blocks_need_not_be_square(M, N, rows, device, poison, monkeypatch):
    if device == "cuda" and M * N > 1024:
        pytest.skip("a float32 tile of this size spills, and takes a minute to compile")
    launch = AttentionLaunch(M, N, num_warps=4, num_stages=1)
    monkeypatch.setattr(attention_tiles_triton, "FLOAT32", {"forward": launch, "dkdv": launch, "dq": launch})
    D = (
        80 if device == "cpu" else 48
    )  # a compiler takes half a minute and more for 80 exact dims; 48 are two tiles as well
    check(*make_qkv(70, D=D, device=device), make_visibility(70, 70, *rows, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D, H", [(80, 2), (64, 1)])
@pytest.mark.parametrize("rows", [[], [[140] * 70 + [105] * 35 + [140] * 35]], ids=["causal", "pair"])
def test_half_precision_is_as_good_as_torchs(dtype, D, H, rows, device, poison):
    q, k, v = make_qkv(140, D=D, H=H, H_kv=H, dtype=dtype, device=device)
    check(q, k, v, make_visibility(140, 140, *rows, device=device))


@pytest.mark.parametrize("H, H_kv", [(4, 2), (3, 1)])
@pytest.mark.parametrize("rows", [[], [LAYOUTS["prefix-shared pair"]]], ids=["causal", "pair"])
def test_grouped_heads_share_keys(H, H_kv, rows, device, poison):
    check(*make_qkv(70, H=H, H_kv=H_kv, device=device), make_visibility(70, 70, *rows, device=device))


@pytest.mark.parametrize("T, S", [(1, 1), (1, 64), (5, 37), (17, 90), (64, 65)])
@pytest.mark.parametrize("is_padded", [False, True])
def test_queries_may_be_the_last_of_the_keys(T, S, is_padded, device, poison):
    rows = [[0] * (S // 3) + [S] * (S - S // 3), [S] * S] if is_padded else []
    check(*make_qkv(T, S, B=2, device=device), make_visibility(T, S, *rows, device=device))


def test_rows_need_not_be_aligned(device, poison):
    check(*make_qkv(33, dtype=torch.float16, width=3, device=device), make_visibility(33, 33, device=device))


def test_documents_equal_separate_sequences(device, poison):
    lengths = [1, 40, 29]
    q, k, v = make_qkv(70, device=device)
    until = [end for n, end in zip(lengths, (1, 41, 70), strict=True) for _ in range(n)]
    upstream = torch.randn(q.shape, device=device)
    packed = results(q, k, v, make_visibility(70, 70, until, device=device), "triton", upstream)
    parts = list(zip(*(x.split(lengths, dim=2) for x in (q, k, v, upstream)), strict=True))
    causal = [make_visibility(n, n, device=device) for n in lengths]
    alone = [results(*part[:3], each, "triton", part[3]) for each, part in zip(causal, parts, strict=True)]
    for together, each in zip(packed, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(together, torch.cat(each, dim=2), rtol=1e-5, atol=1e-5)


def test_a_shared_prompt_equals_its_answers_apart(device, poison):
    prompt, answers = 40, (17, 0, 13)
    T = prompt + sum(answers)
    q, k, v = make_qkv(T, device=device)
    until = [T] * prompt + [prompt + 17] * 17 + [T] * 13
    upstream = torch.randn(q.shape, device=device)
    upstream[:, :, :prompt] = 0  # each answer apart would have the prompt's once more
    shared = results(q, k, v, make_visibility(T, T, until, device=device), "triton", upstream)
    summed = [torch.zeros_like(x) for x in shared]
    start = prompt
    for n in answers:
        own = torch.tensor([*range(prompt), *range(start, start + n)], device=device)
        parts = [x[:, :, own] for x in (q, k, v)]
        visibility = make_visibility(prompt + n, prompt + n, device=device)
        for total, part in zip(summed[1:], results(*parts, visibility, "triton", upstream[:, :, own])[1:], strict=True):
            total.index_add_(2, own, part)
        summed[0][:, :, own] = attention(*parts, visibility, impl="triton").detach()
        start += n
    for mine, other in zip(shared, summed, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [[], [LAYOUTS["documents with pads between"]]], ids=["causal", "pads"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_lse_is_the_natural_logsumexp(impl, rows, device, poison):
    q, k, v = make_qkv(70, device=device)
    visibility = make_visibility(70, 70, *rows, device=device)
    lse = attention_with_lse(q, k, v, visibility, impl=impl)[1]
    torch.testing.assert_close(lse.double(), exact(q, k, v, visibility)[1].detach(), rtol=1e-6, atol=1e-6)


def tables(visibility, q):
    blocks = [attention_tiles_triton.launch_of(kernel, q) for kernel in ("forward", "dkdv")]
    return visibility.until, visibility.key_ranges(blocks[0].block_m), visibility.query_ends(blocks[1].block_n)


def test_queries_that_see_nothing_give_and_get_zero(device, poison):
    q, k, v = make_qkv(70, device=device)
    visibility = make_visibility(70, 70, [0] * 40 + [70] * 30, device=device)
    out, dq, dk, dv = results(q, k, v, visibility, "triton", torch.ones_like(q))
    for x in (out, dq, dk, dv):
        assert not x[:, :, :40].any() and x.isfinite().all()
    lse = attention_with_lse(q, k, v, visibility, impl="triton")[1]
    assert (lse[:, :, :40] == float("-inf")).all()


def test_scores_beyond_float16_stay_finite(device, poison):
    q, k, v = (x.detach() for x in make_qkv(40, dtype=torch.float16, device=device))
    q, k = q.sign() * 300, k.sign() * 300
    assert (q.float() @ k.float().mT).abs().max() > 65504
    visibility = make_visibility(40, 40, device=device)
    ours = results(q, k, v, visibility, "triton", torch.ones_like(q))
    assert all(x.isfinite().all() for x in ours)
    torch.testing.assert_close(ours[0].double(), exact(q, k, v, visibility)[0].detach(), rtol=1e-3, atol=1e-3)


def test_an_expanded_gradient_is_read_right(device, poison):
    q, k, v = make_qkv(33, device=device)
    visibility = make_visibility(33, 33, device=device)
    one = torch.ones((), device=device)
    for upstream in (one.expand(q.shape), torch.randn(q.shape[-1:], device=device).expand(q.shape)):
        ours, true = results(q, k, v, visibility, "triton", upstream), expected(q, k, v, visibility, upstream)
        for mine, other in zip(ours, true, strict=True):
            torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)


def test_launchers_write_into_columns_of_one_buffer(device, poison):
    q, k, v = (x.detach() for x in make_qkv(40, H=4, H_kv=2, device=device))
    visibility = make_visibility(40, 40, device=device)
    rows = torch.full((1, 40, 8 * 80 + 16), 7.0, device=device)
    dq, dk, dv = (x.transpose(1, 2) for x in rows[..., : 8 * 80].unflatten(-1, (8, 80)).split([4, 2, 2], dim=2))
    wide = torch.full((1, 40, 4 * 80 + 16), 7.0, device=device)
    o = wide[..., : 4 * 80].unflatten(-1, (4, 80)).transpose(1, 2)
    lse, do = torch.empty(1, 4, 40, device=device), torch.randn(q.shape, device=device)
    attention_forward_triton.forward(q, k, v, o, lse)
    attention_backward_triton.backward(do, q, k, v, o, lse, dq, dk, dv)
    for mine, other in zip((o, dq, dk, dv), expected(q, k, v, visibility, do), strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5)
    assert (rows[..., 8 * 80 :] == 7).all() and (wide[..., 4 * 80 :] == 7).all()


def test_the_same_input_gives_the_same_bits(device):
    q, k, v = make_qkv(129, H=2, dtype=torch.float16, device=device)
    visibility = make_visibility(129, 129, [129] * 60 + [100] * 40 + [129] * 29, device=device)
    first, second = (results(q, k, v, visibility, "triton", torch.ones_like(q)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("leaf", [0, 1, 2])
def test_a_single_query_has_gradients_too(leaf, device):
    """Decoding has a kernel of its own, without a gradient."""
    inputs = [x.detach() for x in make_qkv(1, 9, device=device)]
    inputs[leaf].requires_grad_()
    seen = make_visibility(1, 9, device=device)
    grads = [
        torch.autograd.grad(attention(*inputs, seen, impl=impl).sum(), inputs[leaf])[0] for impl in ("triton", "torch")
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


def test_no_queries_and_no_rows_are_fine(device):
    for B, T in ((0, 5), (1, 0)):
        q, k, v = (torch.randn(B, 2, n, 80, device=device, requires_grad=True) for n in (T, 5, 5))
        attention(q, k, v, make_visibility(T, 5, device=device), impl="triton").sum().backward()
        assert not k.grad.any() and not v.grad.any() and k.grad.shape == k.shape


# What is skipped


def test_other_documents_are_not_even_read(device, poison):
    q, k, v = (x.detach() for x in make_qkv(192, device=device))
    visibility = make_visibility(192, 192, [128] * 128 + [192] * 64, device=device)
    upstream = torch.randn(q.shape, device=device)
    clean = results(q, k, v, visibility, "triton", upstream)
    for x in (q, k, v, upstream):
        x[:, :, :128] = float("nan")  # a mask would not hold it back: 0 * nan is nan
    for mine, other in zip(results(q, k, v, visibility, "triton", upstream), clean, strict=True):
        assert torch.equal(mine[:, :, 128:], other[:, :, 128:])


def test_other_answers_are_not_even_read(device, poison):
    q, k, v = (x.detach() for x in make_qkv(320, device=device))
    prompt, chosen = slice(0, 128), slice(128, 256)
    visibility = make_visibility(320, 320, [320] * 128 + [256] * 128 + [320] * 64, device=device)
    upstream = torch.randn(q.shape, device=device)
    out, dq, dk, dv = results(q, k, v, visibility, "triton", upstream)
    for x in (q, k, v, upstream):
        x[:, :, chosen] = float("nan")
    ours = results(q, k, v, visibility, "triton", upstream)
    for mine, other in zip(ours, (out, dq, dk, dv), strict=True):
        assert torch.equal(mine[:, :, 256:], other[:, :, 256:])
    assert torch.equal(ours[0][:, :, prompt], out[:, :, prompt]) and torch.equal(
        ours[1][:, :, prompt], dq[:, :, prompt]
    )


# That these tests can fail


@triton.jit
def _seen_without_until(queries, keys, until):
    return keys <= queries


@triton.jit
def _seen_without_causality(queries, keys, until):
    return keys < keys + 1 if until is None else queries < until


@triton.jit
def _inner_of_the_last_piece(a, b, PRECISION: tl.constexpr):
    product = tl.dot(a[0], tl.trans(b[0]))
    for i in tl.static_range(1, len(a)):
        product = tl.dot(a[i], tl.trans(b[i]))
    return product


@triton.jit
def _add_product_once(sums, weights, tiles, PRECISION: tl.constexpr):
    added = (tl.dot(weights, tiles[0], sums[0]),)
    for i in tl.static_range(1, len(tiles)):
        added = added + (tl.dot(weights, tiles[i]),)
    return added


@pytest.mark.parametrize(
    "name, broken",
    [
        ("seen", _seen_without_until),
        ("seen", _seen_without_causality),
        ("inner", _inner_of_the_last_piece),
        ("add_product", _add_product_once),
    ],
)
def test_a_broken_kernel_is_caught(name, broken, device, monkeypatch):
    if device == "cuda":
        pytest.skip("compiled kernels hold on to the functions they were compiled with")
    for module in (attention_tiles_triton, attention_forward_triton, attention_backward_triton):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, broken)
    with pytest.raises(AssertionError):
        check(*make_qkv(70), make_visibility(70, 70, LAYOUTS["two pairs"]))


# How it fits in


def test_the_op_keeps_torchs_rules(device):
    q, k, v = make_qkv(20, H=2, device=device)
    visibility = make_visibility(20, 20, [20] * 10 + [15] * 5 + [20] * 5, device=device)
    torch.library.opcheck(_attention, (q, k, v, *tables(visibility, q), True))


@pytest.mark.parametrize("rows", [[], [LAYOUTS["prefix-shared pair"]]], ids=["causal", "pair"])
def test_compiles_into_one_graph(rows, device):
    q, k, v = make_qkv(70, device=device)
    until = torch.tensor(rows, dtype=torch.int32, device=device) if rows else None

    def twice(q, k, v):
        visibility = Visibility(70, 70, until, q.device)
        return attention(attention(q, k, v, visibility, impl="triton"), k, v, visibility, impl="triton")

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(q.shape, device=device)
    for mine, other in zip(
        torch.autograd.grad(compiled(q, k, v), (q, k, v), upstream),
        torch.autograd.grad(twice(q, k, v), (q, k, v), upstream),
        strict=True,
    ):
        assert torch.equal(mine, other)


def test_checkpointing_changes_nothing(device):
    q, k, v = make_qkv(70, device=device)
    visibility = make_visibility(70, 70, LAYOUTS["prefix-shared pair"], device=device)
    out = checkpoint(lambda *x: attention(*x, visibility, impl="triton"), q, k, v, use_reentrant=False)
    fresh = make_visibility(70, 70, LAYOUTS["prefix-shared pair"], device=device)
    plain = results(q, k, v, fresh, "triton", torch.ones_like(q))[1:]
    for mine, other in zip(torch.autograd.grad(out.sum(), (q, k, v)), plain, strict=True):
        assert torch.equal(mine, other)


def test_forward_and_dq_read_the_same_table():
    for launches in (
        *attention_tiles_triton.LAUNCH.values(),
        attention_tiles_triton.LAUNCH[80] | attention_tiles_triton.NARROW[80],
        attention_tiles_triton.FLOAT32,
    ):
        assert launches["forward"].block_m == launches["dq"].block_m


def strided(x):
    return torch.stack([x, x], dim=-1)[..., 0]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda q, k, v, s: (q, k, v, s, 0.1), "dropout must be 0, got 0.1"),
        (lambda q, k, v, s: (q[..., :72], k[..., :72], v[..., :72], s), "multiple of 16 up to 80, got 72"),
        (lambda *_: (*make_qkv(20, D=96), make_visibility(20, 20)), "multiple of 16 up to 80, got 96"),
        (lambda q, k, v, s: (strided(q), k, v, s), r"must be contiguous, got strides \[2, 1, 1\]"),
        (lambda q, k, v, s: (q, k[:, :3], v[:, :3], s), "multiple of 3 key-value heads, got 4"),
        (lambda q, k, v, s: (q, k[:, :, 1:], v[:, :, 1:], s), r"twice \(B, H_kv, 20, D\), got"),
        (lambda q, k, v, s: (*(x.expand(16384, -1, -1, -1) for x in (q, k, v)), s), "must be at most 65535, got 65536"),
        (lambda q, k, v, s: (q, k.half(), v, s), "must have one dtype"),
        (lambda q, k, v, s: (q.double(), k.double(), v.double(), s), "dtype must be one of"),
        (lambda q, k, v, s: (q, k, v, make_visibility(20, 20, [20] * 20, [20] * 20)), "until must have 1 rows, got 2"),
    ],
)
def test_what_the_kernels_cannot_do_is_said_in_one_line(change, complaint):
    arguments = change(*make_qkv(20, H=4, H_kv=4), make_visibility(20, 20))
    with pytest.raises(ValueError, match=complaint) as error:
        attention(*arguments, impl="triton")
    assert "\n" not in str(error.value)


def test_a_head_dim_that_no_phi_has_is_left_to_torch(device):
    inputs = *make_qkv(20, D=96, device=device), make_visibility(20, 20, device=device)
    assert torch.equal(attention(*inputs), attention(*inputs, impl="torch"))
