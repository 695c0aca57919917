"""The fused block: its kernels against its torch functions, which tests/test_fused.py holds against plain blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phi2_kernels.block import Adapter, Shape, Weights, block, follow
from phi2_kernels.rotary import rotary_angles
from phi2_kernels.visibility import Visibility

B, T, C, F = 2, 21, 64, 48
SHAPES = {"heads 80": Shape(2, 2, 80), "grouped": Shape(4, 2, 16)}
PACKED = torch.tensor([[8] * 8 + [21] * 13, [0] * 3 + [21] * 6 + [15] * 6 + [21] * 6], dtype=torch.int32)


def draw(shape: Shape, trainable: bool, adapters: bool) -> tuple[Tensor, Weights]:
    """A stream and the weights of a block, which are not neighbours in memory; everything that trains is a leaf."""
    g = torch.Generator().manual_seed(0)

    def new(*size: int, leaf: bool = trainable) -> Tensor:
        return (torch.randn(size, generator=g) * 0.2).requires_grad_(leaf)

    attended, kv = shape.attended, shape.kv_heads * shape.head_dim
    into, out = (attended, kv, kv, F), (attended, F)
    low_rank = [Adapter(0, attended, new(3, C, leaf=True), new(attended, 3, leaf=True), 2.0)]
    reading = [Adapter(attended, attended + F, new(2, F, leaf=True), new(C, 2, leaf=True), 0.5)]
    weights = Weights(
        *(new(C), new(C)),
        1e-5,
        tuple(new(n, C) for n in into),
        tuple(new(n) for n in into),
        tuple(new(C, n) for n in out),
        (new(C), new(C)),
        *((tuple(low_rank), tuple(reading)) if adapters else ()),
    )
    return new(B, T, C, leaf=True), weights


def leaves(x: Tensor, w: Weights) -> list[Tensor]:
    low_rank = [matrix for adapter in w.adapters_in + w.adapters_out for matrix in (adapter.A, adapter.B)]
    every = [x, w.norm_weight, w.norm_bias, *w.w_in, *w.b_in, *w.w_out, *w.b_out, *low_rank]
    return [tensor for tensor in every if tensor.requires_grad]


def outcome(impl: str, shape: Shape, until: Tensor | None, **kind: bool) -> list[Tensor]:
    """The output, and the gradient of every leaf."""
    x, weights = draw(shape, **kind)
    angles = rotary_angles(torch.arange(T)[None], 8, 10000.0)
    y = block(x, weights, shape, angles, Visibility(T, T, until, x.device), impl=impl)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return [y.detach(), *torch.autograd.grad(y, leaves(x, weights), upstream)]


KINDS = {
    "frozen with adapters": dict(trainable=False, adapters=True),
    "trainable": dict(trainable=True, adapters=False),
}


@pytest.mark.parametrize("until", [None, PACKED], ids=["causal", "packed"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels_and_torch_agree_in_every_gradient(shape, kind, until, poison):
    expected, actual = (outcome(impl, shape, until, **kind) for impl in ("torch", "triton"))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


def test_weights_that_are_neighbours_are_found():
    whole = torch.randn(6, 4)
    assert follow(list(whole.split([1, 2, 3])))
    assert not follow(list(whole.split([1, 2, 3]))[::-1]) and not follow([whole[:3], whole[3:].clone()])
    assert not follow(list(whole.T.split([2, 2])))


@pytest.mark.parametrize("impl", ["cuda", "cudnn"])
def test_an_unknown_implementation_is_refused(impl):
    with pytest.raises(ValueError, match=f"must be one of auto, torch, triton, got '{impl}'"):
        outcome(impl, SHAPES["grouped"], None, **KINDS["trainable"])
