"""The fused block: its kernels against its torch functions, which tests/test_fused.py holds against plain blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as fn
from torch import Tensor

from phi2_kernels import block as block_file
from phi2_kernels import block_torch
from phi2_kernels.attention import attention_ref
from phi2_kernels.block import Shape, Weights, block
from phi2_kernels.block_adapters import Adapter, Side
from phi2_kernels.block_weights import IN_MASKS, OUT_MASKS, are_adjacent
from phi2_kernels.dropout import keep_mask, new_seed
from phi2_kernels.rotary import rotary, rotary_angles
from phi2_kernels.visibility import Visibility

B, T, C, F = 2, 21, 64, 48
SHAPES = {"heads 80": Shape(2, 2, 80), "grouped": Shape(4, 2, 16)}
PACKED = torch.tensor([[8] * 8 + [21] * 13, [0] * 3 + [21] * 6 + [15] * 6 + [21] * 6], dtype=torch.int32)


def draw(shape: Shape, trainable: bool, adapters: bool, device: str = "cpu") -> tuple[Tensor, Weights]:
    """A stream and the weights of a block, which are not neighbours in memory; everything that trains is a leaf."""
    g = torch.Generator().manual_seed(0)

    def new(*size: int, leaf: bool = trainable) -> Tensor:
        return (torch.randn(size, generator=g) * 0.2).to(device).requires_grad_(leaf)

    attended, kv = shape.attention_width, shape.kv_heads * shape.head_dim
    into, out = (attended, kv, kv, F), (attended, F)
    edges = [sum(into[:i]) for i in range(5)]
    in_adapters = [
        Adapter(start, end, new(r, C, leaf=True), new(end - start, r, leaf=True), scaling)
        for start, end, r, scaling in zip(edges, edges[1:], (3, 1, 5, 2), (2.0, 1.0, 0.4, 0.7), strict=False)
    ]
    out_adapters = [
        Adapter(0, attended, new(4, attended, leaf=True), new(C, 4, leaf=True), 1.5),
        Adapter(attended, attended + F, new(2, F, leaf=True), new(C, 2, leaf=True), 0.5),
    ]
    weights = Weights(
        *(new(C), new(C)),
        1e-5,
        tuple(new(n, C) for n in into),
        tuple(new(n) for n in into),
        tuple(new(C, n) for n in out),
        (new(C), new(C)),
        *((tuple(in_adapters), tuple(out_adapters)) if adapters else ()),
    )
    return new(B, T, C, leaf=True), weights


def leaves(x: Tensor, w: Weights) -> list[Tensor]:
    low_rank = [matrix for adapter in w.adapters_in + w.adapters_out for matrix in (adapter.A, adapter.B)]
    every = [x, w.norm_weight, w.norm_bias, *w.w_in, *w.b_in, *w.w_out, *w.b_out, *low_rank]
    return [tensor for tensor in every if tensor.requires_grad]


def outcome(impl: str, shape: Shape, until: Tensor | None, device: str, **kind: bool) -> list[Tensor]:
    """The output, and the gradient of every leaf."""
    x, weights = draw(shape, **kind, device=device)
    angles = rotary_angles(torch.arange(T, device=device)[None], 8, 10000.0)
    until = None if until is None else until.to(device)
    y = block(x, weights, shape, angles, Visibility(T, T, until, x.device), impl=impl)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device)
    return [y.detach(), *torch.autograd.grad(y, leaves(x, weights), upstream)]


KINDS = {
    "frozen with adapters": dict(trainable=False, adapters=True),
    "trainable": dict(trainable=True, adapters=False),
}


@pytest.mark.parametrize("until", [None, PACKED], ids=["causal", "packed"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_and_torch_agree_in_every_gradient(shape, kind, until, poison, device):
    expected, actual = (outcome(impl, shape, until, device, **kind) for impl in ("torch", "triton"))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_a_stream_of_one_token_has_gradients():
    """There is no mask then."""
    x, weights = draw(SHAPES["grouped"], **KINDS["trainable"])
    angles, one = rotary_angles(torch.arange(1)[None], 8, 10000.0), x[:, :1].detach().requires_grad_()
    seen = Visibility(1, 1, None, x.device)
    ours, expected = (
        torch.autograd.grad(block(one, weights, SHAPES["grouped"], angles, seen, impl=impl).sum(), one)[0]
        for impl in ("triton", "torch")
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_weights_that_are_neighbours_are_found():
    whole = torch.randn(6, 4)
    assert are_adjacent(list(whole.split([1, 2, 3])))
    assert not are_adjacent(list(whole.split([1, 2, 3]))[::-1]) and not are_adjacent([whole[:3], whole[3:].clone()])
    assert not are_adjacent(list(whole.T.split([2, 2])))


# Dropout


SEED = torch.tensor(11)
RATES = {"adapters": (0.0, 0.3), "residual stream": (0.4, 0.0), "both": (0.4, 0.3)}


def dropping(weights: Weights, residual: float, adapters: float) -> Weights:
    into, out = (
        tuple(a._replace(dropout=adapters) for a in group) for group in (weights.adapters_in, weights.adapters_out)
    )
    return weights._replace(adapters_in=into, adapters_out=out, dropout=residual)


def dropped(x: Tensor, p: float, number: int) -> Tensor:
    return x * keep_mask(x, p, SEED, number) / (1 - p) if p else x


def dropped_by_kernels(x: Tensor, p: float, number: int) -> Tensor:
    """By the masks that the kernels of adapters make: what they add where there is nothing, times one."""
    from phi2_kernels import block_adapters_triton

    kept, (N, K) = torch.zeros(x.shape), x.shape
    side = Side((torch.ones(1, K),), ((0, K),), False, (1,), (p,), (number,))
    block_adapters_triton.add(kept, torch.ones(N, 1), side, SEED)
    return x * kept / (1 - p) if p else x


def plain_block(
    x: Tensor, w: Weights, shape: Shape, angles: tuple[Tensor, Tensor], visibility: Visibility, dropped_lora=dropped
) -> Tensor:
    """A block as one would write it, each mask where peft and transformers have one; differentiable."""
    stream = x.flatten(0, 1)
    n = fn.layer_norm(stream, (C,), w.norm_weight, w.norm_bias, w.eps)
    h = torch.cat([fn.linear(n, weight, bias) for weight, bias in zip(w.w_in, w.b_in, strict=True)], dim=1)
    for i, a in enumerate(w.adapters_in):
        change = a.scaling * dropped_lora(n, a.dropout, IN_MASKS + i) @ a.A.T @ a.B.T
        h = h + fn.pad(change, (a.start, h.shape[1] - a.end))
    q, k, v = shape.split(h, T)
    q, k = (rotary(z.transpose(1, 2), *angles, impl="torch").transpose(1, 2) for z in (q, k))
    attended = attention_ref(q, k, v, visibility).transpose(1, 2).flatten(2).flatten(0, 1)
    halves = attended, fn.gelu(h[:, shape.qkv_width :], approximate="tanh")
    outputs = [fn.linear(half, weight, bias) for half, weight, bias in zip(halves, w.w_out, w.b_out, strict=True)]
    for i, a in enumerate(w.adapters_out):
        which = int(a.start > 0)
        outputs[which] = (
            outputs[which] + a.scaling * dropped_lora(halves[which], a.dropout, OUT_MASKS + i) @ a.A.T @ a.B.T
        )
    return (stream + sum(dropped(y, w.dropout, i) for i, y in enumerate(outputs))).view(x.shape)


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_dropout_gives_the_gradients_of_a_plain_block_with_its_masks(impl, rates, poison, monkeypatch):
    monkeypatch.setattr(block_file, "new_seed", lambda: SEED)
    shape, angles = SHAPES["grouped"], rotary_angles(torch.arange(T)[None], 8, 10000.0)
    x, weights = draw(shape, trainable=True, adapters=True)
    weights, visibility = dropping(weights, *rates), Visibility(T, T, PACKED, x.device)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    by = {"torch": dropped, "triton": dropped_by_kernels}[impl]
    expected = plain_block(x, weights, shape, angles, visibility, by)
    actual = block(x, weights, shape, angles, visibility, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    grads = (torch.autograd.grad(y, leaves(x, weights), upstream) for y in (actual, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
def test_a_mask_that_the_backward_pass_makes_otherwise_is_seen(rates, monkeypatch):
    seeds = iter([SEED, SEED + 1])
    monkeypatch.setattr(block_file, "new_seed", lambda: next(seeds))
    gradients = []
    for _ in range(2):
        x, weights = draw(SHAPES["grouped"], trainable=True, adapters=True)
        angles, visibility = rotary_angles(torch.arange(T)[None], 8, 10000.0), Visibility(T, T, None, x.device)
        y = block(x, dropping(weights, *rates), SHAPES["grouped"], angles, visibility)
        gradients.append(torch.autograd.grad(y.sum(), x)[0])
    assert not torch.allclose(*gradients, rtol=1e-2, atol=1e-3)


def test_no_two_masks_of_a_block_have_a_number_in_common(monkeypatch):
    numbers = []

    def recorded(x: Tensor, p: float, seed: Tensor, number: int) -> Tensor:
        numbers.append(number)
        return keep_mask(x, p, seed, number)

    for file in (block_file, block_torch):
        monkeypatch.setattr(file, "keep_mask", recorded)
    x, weights = draw(SHAPES["grouped"], trainable=False, adapters=True)
    angles, visibility = rotary_angles(torch.arange(T)[None], 8, 10000.0), Visibility(T, T, None, x.device)
    block(x, dropping(weights, 0.4, 0.3), SHAPES["grouped"], angles, visibility)
    assert len(numbers) == len(set(numbers)) == 8  # six adapters and two halves of the residual stream


def test_the_mean_of_many_draws_is_the_output_without_dropout():
    shape, angles = SHAPES["grouped"], rotary_angles(torch.arange(T)[None], 8, 10000.0)
    x, weights = draw(shape, trainable=False, adapters=True)
    weights = weights._replace(adapters_in=())  # behind them things are not linear
    visibility = Visibility(T, T, None, x.device)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = [block(x, dropping(weights, 0.2, 0.5), shape, angles, visibility) for _ in range(300)]
        mean, error = torch.stack(draws).mean(dim=0), torch.stack(draws).std(dim=0) / 300**0.5
        apart = (mean - block(x, weights, shape, angles, visibility)) / error
    assert apart.pow(2).mean().sqrt() < 1.1 and apart.abs().max() < 6


def test_masks_have_their_rate_and_differ_by_number_and_seed():
    x = torch.empty(200, 500)
    masks = [keep_mask(x, 0.3, *which) for which in ((SEED, 0), (SEED, 1), (SEED + 100, 0), (SEED, 0))]
    assert all(abs(mask.float().mean() - 0.7) < 0.01 and mask.dtype == torch.bool for mask in masks)
    assert all(abs((masks[0] & mask).float().mean() - 0.49) < 0.01 for mask in masks[1:3])
    assert torch.equal(masks[0], masks[3])


def test_seeds_follow_the_global_one():
    torch.manual_seed(5)
    first = new_seed(), new_seed()
    torch.manual_seed(5)
    assert first == (new_seed(), new_seed()) and first[0] != first[1]


# Half precision


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    """The base in `dtype`; adapters stay float32."""
    groups = (tuple(w.to(dtype) for w in group) for group in (weights.w_in, weights.b_in, weights.w_out, weights.b_out))
    norm = weights.norm_weight.to(dtype), weights.norm_bias.to(dtype)
    return Weights(*norm, weights.eps, *groups, *weights[7:])


def outcome_in(dtype: torch.dtype, rounded: torch.dtype, impl: str) -> list[Tensor]:
    """The output, and the gradients of x and adapters, in `dtype`, of a base that has been rounded to `rounded`."""
    x, weights = draw(SHAPES["heads 80"], trainable=False, adapters=True)
    x, weights = x.detach().to(rounded).to(dtype).requires_grad_(), cast(cast(weights, rounded), dtype)
    angles = rotary_angles(torch.arange(T)[None], 8, 10000.0)
    y = block(x, weights, SHAPES["heads 80"], angles, Visibility(T, T, PACKED, x.device), impl=impl)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(rounded).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves(x, weights), upstream)]


def test_kernels_are_as_good_in_half_precision_as_torch():
    """Not in bfloat16, to which the interpreter does not round but cuts."""
    kinds = ((torch.float32, "torch"), (torch.float16, "torch"), (torch.float16, "triton"))
    exact, torchs, actual = (outcome_in(dtype, torch.float16, impl) for dtype, impl in kinds)
    assert all(grad.dtype == torch.float32 for grad in actual[2:])
    for ours, theirs, truth in zip(actual, torchs, exact, strict=True):
        errors = [(result.float() - truth).norm() / truth.norm() for result in (ours, theirs)]
        assert errors[0] <= 2 * errors[1] < 0.1


@pytest.mark.parametrize("impl", ["cuda", "cudnn"])
def test_an_unknown_implementation_is_refused(impl):
    with pytest.raises(ValueError, match=f"must be one of auto, torch, triton, got '{impl}'"):
        outcome(impl, SHAPES["grouped"], None, "cpu", **KINDS["trainable"])


WIDE = torch.zeros(1, T, 8208)


@pytest.mark.parametrize(
    ("x", "shape", "visibility", "complaint"),
    [
        (torch.zeros(3, T, C), SHAPES["grouped"], (T, T, PACKED[:1]), "until must have 3 rows, got 1"),
        (torch.zeros(2, T, C), SHAPES["grouped"], (8, 8, None), "must be of 21 queries and keys, got 8 and 8"),
        (torch.zeros(2, T, C), Shape(2, 2, 40), (T, T, None), "multiple of 16 up to 80, got 40"),
        (torch.zeros(2, T, C), Shape(3, 2, 16), (T, T, None), "multiple of 2 key-value heads, got 3"),
        (torch.zeros(1, T, C).expand(32768, -1, -1), SHAPES["heads 80"], (T, T, None), "at most 65535, got 65536"),
        (WIDE, SHAPES["heads 80"], (T, T, None), "at most 8192 columns, got 8208"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_in_one_line(x, shape, visibility, complaint):
    _, weights = draw(SHAPES["heads 80"], trainable=False, adapters=False)
    angles, seen = rotary_angles(torch.arange(T)[None], 8, 10000.0), Visibility(*visibility, x.device)
    with pytest.raises(ValueError, match=complaint) as refused:
        block(x, weights, shape, angles, seen, impl="triton")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_stream_in_another_order_is_read_right(impl, poison):
    shape = SHAPES["heads 80"]
    x, weights = draw(shape, trainable=False, adapters=False)
    angles, seen = rotary_angles(torch.arange(T)[None], 8, 10000.0), Visibility(T, T, None, x.device)
    transposed = x[:1].mT.contiguous().mT  # the same numbers, columns far apart
    ours, expected = (block(each, weights, shape, angles, seen, impl=impl) for each in (transposed, x[:1]))
    assert not transposed.is_contiguous() and torch.equal(ours, expected)
