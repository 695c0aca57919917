"""The log-prob head against its formula: values, every gradient, every chunk size, no [N, V] memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from phi2_kernels import linear_logprob as op
from phi2_kernels.linear_logprob import linear_logprob, linear_logprob_ref

SHAPES = [(1, 16, 7), (13, 32, 101), (40, 24, 257)]  # N, C, V


def inputs(N: int, C: int, V: int, dtype=torch.float32, adapter=True) -> list[torch.Tensor | None]:
    g = torch.Generator().manual_seed(N + V)
    tensors = [torch.randn(s, generator=g) for s in ((N, C), (V, C), (V,), (N, 4), (V, 4))]
    hidden, weight, bias = (x.to(dtype) for x in tensors[:3])
    targets = torch.randint(V, (N,), generator=g)
    return [hidden, weight, bias, targets, *(tensors[3:] if adapter else (None, None))]


def with_grads(arguments, trainable) -> list[torch.Tensor | None]:
    return [
        x.clone().requires_grad_() if index in trainable and x is not None else x for index, x in enumerate(arguments)
    ]


@pytest.fixture(params=[1, 5, 10**9], ids=["row-chunks", "odd-chunks", "one-chunk"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(
        op, "_chunks", lambda rows, V: [slice(i, i + request.param) for i in range(0, rows, request.param)]
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapter", [False, True])
def test_values_equal_the_formula(shape, adapter, chunked):
    arguments = inputs(*shape, adapter=adapter)
    logp, entropy = linear_logprob(*arguments, entropy=True)
    expected_logp, expected_entropy = linear_logprob_ref(*arguments)
    torch.testing.assert_close(logp, expected_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-5, atol=1e-5)


HIDDEN, WEIGHT, BIAS, ADAPTER_HIDDEN, ADAPTER_WEIGHT = 0, 1, 2, 4, 5
TRAINABLE = {
    "frozen head": {HIDDEN},
    "frozen head under an adapter": {HIDDEN, ADAPTER_HIDDEN},
    "adapter on the head": {HIDDEN, ADAPTER_HIDDEN, ADAPTER_WEIGHT},
    "whole head": {HIDDEN, WEIGHT, BIAS},
    "weight alone": {WEIGHT},
    "everything": {HIDDEN, WEIGHT, BIAS, ADAPTER_HIDDEN, ADAPTER_WEIGHT},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trainable", TRAINABLE)
def test_every_gradient_equals_the_formulas(shape, trainable, chunked):
    arguments = inputs(*shape)
    wanted = TRAINABLE[trainable]
    ours, theirs = with_grads(arguments, wanted), with_grads(arguments, wanted)
    upstream = torch.randn(shape[0], generator=torch.Generator().manual_seed(0))
    linear_logprob(*ours)[0].backward(upstream)
    linear_logprob_ref(*theirs)[0].backward(upstream)
    for index in wanted:
        torch.testing.assert_close(ours[index].grad, theirs[index].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_head_loses_no_more_than_its_inputs(dtype):
    arguments = inputs(13, 32, 101, dtype)
    logp = linear_logprob(*arguments)[0]
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp, linear_logprob_ref(*arguments)[0], rtol=1e-5, atol=1e-5)


def test_logits_are_never_held_whole():
    seen = []
    real = op._Head.logits
    arguments = with_grads(inputs(1000, 8, 1031), {HIDDEN, WEIGHT, BIAS, ADAPTER_HIDDEN, ADAPTER_WEIGHT})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "CHUNK_BYTES", 2**18)
        patch.setattr(op._Head, "logits", lambda self, h, u: seen.append(h.shape[0]) or real(self, h, u))
        linear_logprob(*arguments)[0].sum().backward()
    assert max(seen) * 1031 * 4 <= 2**18 and sum(seen) == 2000


def test_a_frozen_head_computes_its_logits_once():
    calls = itertools.count()
    real = op._Head.logits
    arguments = with_grads(inputs(13, 32, 101), {HIDDEN, ADAPTER_HIDDEN})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op._Head, "logits", lambda self, h, u: (next(calls), real(self, h, u))[1])
        linear_logprob(*arguments)[0].sum().backward()
    assert next(calls) == 1


def test_no_rows_give_no_logps_and_zero_gradient():
    arguments = with_grads(inputs(0, 8, 11), {HIDDEN, WEIGHT})
    logp, _ = linear_logprob(*arguments)
    logp.sum().backward()
    assert logp.shape == (0,) and not arguments[WEIGHT].grad.any()


def test_rows_and_targets_must_agree():
    hidden, weight, bias, targets, *_ = inputs(5, 8, 11)
    with pytest.raises(ValueError, match="hidden has 5 rows, targets has 4"):
        linear_logprob(hidden, weight, bias, targets[:4])
    with pytest.raises(ValueError, match=r"bias must be of shape \(11,\), got \(5,\)"):
        linear_logprob(hidden, weight, bias[:5], targets)


@pytest.mark.parametrize("trainable", [{HIDDEN}, {HIDDEN, WEIGHT}], ids=["frozen head", "trainable head"])
def test_differentiating_twice_is_refused(trainable):
    arguments = with_grads(inputs(5, 8, 11), trainable)
    loss = -torch.nn.functional.logsigmoid(linear_logprob(*arguments)[0]).sum()
    (grad,) = torch.autograd.grad(loss, arguments[HIDDEN], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        grad.square().sum().backward()
