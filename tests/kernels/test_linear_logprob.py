"""The log-prob head against its formula: values, every gradient, every chunk size, and what is kept in memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

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
    monkeypatch.setattr(op, "_chunk_rows", lambda V, on_gpu: request.param)


KEPT_ROWS = [0, 7, 10**6]  # none, some and all


def keep(monkeypatch, rows: int, V: int) -> None:
    """The gradients of logits of so many rows are within the budget."""
    monkeypatch.setattr(op, "KEPT_BYTES", 4 * rows * V)


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> None:
    """Operands of matmuls in the weight's own dtype."""
    monkeypatch.setattr(op, "operand_dtype", lambda weight: weight.dtype)


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
@pytest.mark.parametrize("kept", KEPT_ROWS)
def test_every_gradient_equals_the_formulas(shape, trainable, kept, chunked, monkeypatch):
    keep(monkeypatch, kept, V=shape[2])
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


def drawn(dtype: torch.dtype, size: float, N: int = 64, C: int = 64, V: int = 512) -> list[torch.Tensor | None]:
    """As `inputs`, with logits of a size; every second target is the likeliest token."""
    arguments = inputs(N, C, V)
    hidden, weight, bias, targets, u, b = arguments
    weight, u = weight * size * C**-0.5, u * size * 0.1
    likeliest = (hidden @ weight.T + bias + u @ b.T).argmax(-1)
    targets = torch.where(torch.arange(N) % 2 == 0, likeliest, targets)
    return [hidden.to(dtype), weight.to(dtype), bias.to(dtype), targets, u, b]


def logps_from_logits(hidden, weight, bias, targets, u, b, dtype: torch.dtype) -> torch.Tensor:
    """Of whole logits in a dtype, as F.linear gives them; what is behind them is at least float32."""
    logits = torch.nn.functional.linear(*(x.to(dtype) for x in (hidden, weight, bias)))
    if u is not None:
        logits = logits + (u @ b.T).to(dtype)
    logits = logits if dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def gradients(logps, arguments, wanted, factors) -> list[torch.Tensor]:
    leaves = with_grads(arguments, wanted)
    return torch.autograd.grad(logps(*leaves), [leaves[i] for i in sorted(wanted)], factors)


@pytest.mark.parametrize("size", [1.0, 8.0])  # logits up to 5, and up to 40
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainable", ["frozen head under an adapter", "adapter on the head", "whole head"])
@pytest.mark.parametrize("kept", [0, 10**6], ids=["made again", "kept"])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_are_as_exact_as_those_of_torchs_logits(
    size, dtype, trainable, kept, entropy, as_on_a_gpu, monkeypatch
):
    keep(monkeypatch, kept, V=512)
    wanted, factors = TRAINABLE[trainable], torch.linspace(-1, 2, 64)
    arguments = drawn(dtype, size)
    arguments[4:] = arguments[4:] if ADAPTER_HIDDEN in wanted else (None, None)
    in_float64 = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    exact = gradients(lambda *x: logps_from_logits(*x, torch.float64), in_float64, wanted, factors.double())
    torchs = gradients(lambda *x: logps_from_logits(*x, dtype), arguments, wanted, factors)
    ours = gradients(lambda *x: linear_logprob(*x, entropy=entropy)[0], arguments, wanted, factors)
    for found, theirs, true in zip(ours, torchs, exact, strict=True):
        assert found.dtype == theirs.dtype
        assert (found - true).norm() <= 2 * (theirs - true).norm()
        assert (found - true).abs().max() <= 2 * (theirs - true).abs().max()


@pytest.mark.parametrize("kept", KEPT_ROWS)
@pytest.mark.parametrize("scale", [1e-5, 2e4])  # without a loss scale, and with one
def test_in_float16_gradients_of_a_head_neither_vanish_nor_overflow(scale, kept, as_on_a_gpu, monkeypatch):
    keep(monkeypatch, kept, V=512)
    arguments, factors = drawn(torch.float16, 1.0), torch.linspace(-1, 2, 64) * scale
    arguments[HIDDEN] *= 4  # rows times factors are over 65504, and their products with D here and there are not
    arguments[WEIGHT] /= 4
    arguments[4:] = None, None
    in_float64 = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    (exact,) = gradients(lambda *x: logps_from_logits(*x, torch.float64), in_float64, {WEIGHT}, factors.double())
    (ours,) = gradients(lambda *x: linear_logprob(*x)[0], arguments, {WEIGHT}, factors)
    representable = exact.abs() < 60000
    apart = (ours.double() - exact)[representable]
    assert apart.norm() < 2e-3 * exact[representable].norm() + 6e-8 * apart.numel() ** 0.5


def test_the_gradient_of_logits_is_kept_of_as_many_rows_as_the_budget_holds():
    made, real = [], op._Head.logits
    arguments = with_grads(inputs(13, 32, 101), {HIDDEN, WEIGHT, BIAS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "_chunk_rows", lambda V, on_gpu: 3)
        patch.setattr(op._Head, "logits", lambda self, h, u: made.append(len(h)) or real(self, h, u))
        for budget in (12 * 101 * 4 - 1, 12 * 101 * 4, 13 * 101 * 4):
            patch.setattr(op, "KEPT_BYTES", budget)
            linear_logprob(*arguments)[0].sum().backward()
    once = [3, 3, 3, 3, 1]
    assert made == [*once, 3, 1, *once, 1, *once]  # of 9 rows, of 12, and of all


@pytest.mark.parametrize("trainable", ["whole head", "adapter on the head"])
def test_a_trainable_head_keeps_one_number_a_logit_and_no_more(trainable, as_on_a_gpu):
    """Beside its inputs."""
    saved: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        saved[x.data_ptr()] = x.untyped_storage().nbytes()
        return x

    arguments = with_grads(inputs(40, 24, 257, torch.bfloat16), TRAINABLE[trainable])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        linear_logprob(*arguments)
    given = {x.data_ptr() for x in arguments}
    assert [size for place, size in saved.items() if place not in given] == [40 * 257 * 2]


@pytest.mark.parametrize(("trainable", "kept"), [("frozen head", 0), ("everything", 7), ("everything", 10**6)])
def test_it_runs_under_activation_checkpointing(trainable, kept, monkeypatch):
    keep(monkeypatch, kept, V=101)
    wanted, results = TRAINABLE[trainable], []
    plain = lambda *x: linear_logprob(*x)[0]  # noqa: E731
    for function in (plain, lambda *x: checkpoint(plain, *x, use_reentrant=False)):
        results.append(gradients(function, inputs(13, 32, 101), wanted, torch.linspace(-1, 2, 13)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_float32_logits_are_never_held_whole():
    seen = []
    real = op._Head.logits
    arguments = with_grads(inputs(1000, 8, 1031), {HIDDEN, WEIGHT, BIAS, ADAPTER_HIDDEN, ADAPTER_WEIGHT})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(op, "CHUNK_BYTES", 2**18)
        patch.setattr(op, "KEPT_BYTES", 0)
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
