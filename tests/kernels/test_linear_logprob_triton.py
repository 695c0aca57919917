"""The head's kernels against the formula in float64, from the whole op down to one chunk of logits."""

from __future__ import annotations

import pytest
import torch

from phi2_kernels import linear_logprob as op
from phi2_kernels.linear_logprob import linear_logprob

pytestmark = pytest.mark.usefixtures("poison")

HIDDEN, WEIGHT, BIAS, ADAPTER_HIDDEN, ADAPTER_WEIGHT = 0, 1, 2, 4, 5
TRAINABLE = {
    "frozen head": {HIDDEN},
    "frozen head under an adapter": {HIDDEN, ADAPTER_HIDDEN},
    "adapter on the head": {HIDDEN, ADAPTER_HIDDEN, ADAPTER_WEIGHT},
    "bias alone": {BIAS},
    "everything": {HIDDEN, WEIGHT, BIAS, ADAPTER_HIDDEN, ADAPTER_WEIGHT},
}
SHAPES = [(1, 16, 7), (13, 32, 101), (5, 8, 129), (2, 4, 50297)]  # N, C, V


def inputs(N: int, C: int, V: int, dtype=torch.float32, device="cpu", adapter=True) -> list[torch.Tensor | None]:
    g = torch.Generator().manual_seed(N + V)
    tensors = [torch.randn(s, generator=g).to(device) for s in ((N, C), (V, C), (V,), (N, 4), (V, 4))]
    hidden, weight, bias = (x.to(dtype) for x in tensors[:3])
    targets = torch.randint(V, (N,), generator=g).to(device)
    return [hidden, weight, bias, targets, *(tensors[3:] if adapter else (None, None))]


def in_float64(hidden, weight, bias, targets, adapter_hidden, adapter_weight):
    logits = torch.nn.functional.linear(hidden.double(), weight.double(), bias.double())
    if adapter_hidden is not None:
        logits = logits + adapter_hidden.double() @ adapter_weight.double().T
    logp = logits.log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def with_grads(arguments, trainable) -> list[torch.Tensor | None]:
    return [x.clone().requires_grad_() if i in trainable and x is not None else x for i, x in enumerate(arguments)]


def upstream(N: int, device: str) -> torch.Tensor:
    return torch.linspace(-1, 2, N, device=device)


ALL = 10**6  # rows whose gradient of logits is kept
FORMS = [*((name, ALL) for name in TRAINABLE), ("adapter on the head", 0), ("everything", 0), ("everything", 7)]


def keep(monkeypatch, rows: int, V: int, dtype: torch.dtype = torch.float32) -> None:
    """The gradients of logits of so many rows are within the budget."""
    for budget in ("KEPT_BYTES", "GPU_KEPT_BYTES"):
        monkeypatch.setattr(op, budget, rows * V * dtype.itemsize)


@pytest.fixture(params=[32, 8192], ids=["narrow-blocks", "shipped-blocks"])
def block(request, monkeypatch) -> int:
    """The columns a program takes at a time; narrow ones make many blocks of a small vocabulary."""
    from phi2_kernels import linear_logprob_triton

    if request.param != 8192:
        narrow = {"BLOCK_V": request.param, "num_warps": 4}
        monkeypatch.setattr(linear_logprob_triton, "LAUNCH", dict.fromkeys((80, 90), {"stats": narrow}))
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapter", [False, True])
def test_values_equal_the_formula(shape, adapter, device):
    arguments = inputs(*shape, device=device, adapter=adapter)
    logp, entropy = linear_logprob(*arguments, entropy=True, impl="triton")
    expected_logp, expected_entropy = in_float64(*arguments)
    torch.testing.assert_close(logp.double(), expected_logp, rtol=2e-6, atol=5e-6)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("rows", [1, 5, 10**9])
@pytest.mark.parametrize(("trainable", "kept"), FORMS)
def test_every_gradient_equals_the_formulas(trainable, kept, rows, device, monkeypatch):
    monkeypatch.setattr(op, "_chunk_rows", lambda V, on_gpu: rows)
    keep(monkeypatch, kept, V=101)
    arguments, wanted = inputs(13, 32, 101, device=device), TRAINABLE[trainable]
    ours, exact = with_grads(arguments, wanted), with_grads(arguments, wanted)
    linear_logprob(*ours, impl="triton")[0].backward(upstream(13, device))
    in_float64(*exact)[0].backward(upstream(13, device).double())
    for i in wanted:
        torch.testing.assert_close(ours[i].grad, exact[i].grad, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("trainable", "kept"), [("frozen head", ALL), *FORMS[-3:]])
def test_a_half_precision_head_is_as_exact_as_torchs(trainable, kept, dtype, device, monkeypatch):
    if dtype == torch.float16:  # the interpreter cuts numbers off to bfloat16 where a GPU rounds them
        monkeypatch.setattr(op, "operand_dtype", lambda weight: weight.dtype)
    monkeypatch.setattr(op, "_chunk_rows", lambda V, on_gpu: 3)
    keep(monkeypatch, kept, V=101, dtype=dtype)
    arguments, wanted = inputs(13, 32, 101, dtype, device), TRAINABLE[trainable]
    grad = upstream(13, device)
    exact = with_grads([x.double() if x.is_floating_point() else x for x in arguments], wanted)
    logp = in_float64(*exact)[0]
    logp.backward(grad.double())
    ours, theirs = with_grads(arguments, wanted), with_grads(arguments, wanted)
    found = linear_logprob(*ours, impl="triton")[0]
    found.backward(grad)
    linear_logprob(*theirs, impl="torch")[0].backward(grad)
    torch.testing.assert_close(found.double(), logp, rtol=1e-5, atol=1e-5)
    for i in wanted:
        truth = exact[i].grad
        assert ours[i].grad.dtype == arguments[i].dtype
        allowed = 2 * (theirs[i].grad - truth).abs().max() + torch.finfo(arguments[i].dtype).eps * truth.abs().max()
        assert (ours[i].grad - truth).abs().max() <= allowed, i


def logits_of(n: int, V: int, device: str, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(V)
    logits, bias = torch.randn(n, V, generator=g) * spread, torch.randn(V, generator=g)
    targets = torch.tensor([0, V - 1, *torch.randint(V, (n,), generator=g).tolist()][:n])
    return logits.to(device), bias.to(device), targets.to(device)


def run_stats(logits, bias, targets, dtype, apart=False):
    """logp, entropy and gradient of a dtype, over the logits, which are copied before, or apart from them."""
    from phi2_kernels import linear_logprob_triton

    logits, grad = logits.clone(), None
    if dtype is not None:
        grad = torch.empty_like(logits, dtype=dtype) if apart else linear_logprob_triton.room_over(logits, dtype)
    logp, entropy = (torch.empty(len(logits), device=logits.device) for _ in range(2))
    linear_logprob_triton.stats(logits, bias, targets, logp, entropy, grad)
    return logp, entropy, grad


def logp_gradient(logits, bias, targets) -> torch.Tensor:
    softmax = (logits.double() + bias.double()).softmax(-1)
    return torch.nn.functional.one_hot(targets, logits.shape[1]) - softmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 17, 32, 33, 64, 200, 1000])
@pytest.mark.parametrize("apart", [False, True], ids=["over its logits", "apart"])
def test_one_chunk_gives_statistics_and_a_gradient(apart, V, dtype, block, device):
    logits, bias, targets = logits_of(3, V, device)
    logp, entropy, grad = run_stats(logits, bias, targets, dtype, apart)
    expected = (logits.double() + bias.double()).log_softmax(-1)
    torch.testing.assert_close(logp.double(), expected.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-6, atol=5e-6)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), logp_gradient(logits, bias, targets), rtol=eps, atol=1e-6)


def test_a_half_precision_gradient_may_lie_in_the_memory_of_its_logits(device):
    from phi2_kernels import linear_logprob_triton

    logits = torch.zeros(3, 5, device=device)
    grad = linear_logprob_triton.room_over(logits, torch.float16)
    assert grad.shape == (3, 5) and grad.data_ptr() == logits.data_ptr() and grad.stride() == (10, 1)


@pytest.mark.parametrize("spread", [1e-3, 1e3, 1e6])
def test_logits_of_any_size_neither_overflow_nor_vanish(spread, block, device):
    logits, bias, targets = logits_of(3, 200, device, spread)
    logp, entropy, grad = run_stats(logits, bias, targets, torch.float32)
    expected = (logits + bias).double().log_softmax(-1)
    torch.testing.assert_close(logp.double(), expected.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-5)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_a_maximum_may_come_first_or_last(order, block, device):
    logits = torch.linspace(-30, 30, 200, device=device)[None].repeat(2, 1)
    logits = logits.contiguous() if order == "rising" else logits.flip(1)
    bias, targets = torch.zeros(200, device=device), torch.tensor([0, 199], device=device)
    logp, entropy, _ = run_stats(logits, bias, targets, torch.float32)
    expected = logits.double().log_softmax(-1)
    torch.testing.assert_close(logp.double(), expected.gather(1, targets[:, None])[:, 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-5, atol=1e-6)


def test_a_nan_among_the_logits_and_a_target_outside_the_vocabulary_show(device):
    logits, bias, targets = logits_of(3, 50, device)
    logits[0, 7], targets[2] = float("nan"), 50
    logp = run_stats(logits, bias, targets, None)[0]
    assert logp.isnan().tolist() == [True, False, True]


def test_a_kernel_that_forgets_the_bias_is_caught(monkeypatch, device):
    from phi2_kernels import linear_logprob_triton

    real = linear_logprob_triton.stats
    monkeypatch.setattr(linear_logprob_triton, "stats", lambda logits, bias, *rest: real(logits, None, *rest))
    with pytest.raises(AssertionError):
        test_values_equal_the_formula(SHAPES[1], False, device)


def test_a_bias_that_is_not_contiguous_is_refused(device):
    hidden, weight, bias, targets, *_ = inputs(5, 8, 11, device=device)
    with pytest.raises(ValueError, match="the last dim of bias must be contiguous, got stride 2"):
        linear_logprob(hidden, weight, bias.repeat_interleave(2)[::2], targets, impl="triton")


def test_an_adapter_in_half_precision_is_read_as_it_is(device):
    arguments = inputs(13, 32, 101, torch.bfloat16, device)
    arguments[4:] = (x.bfloat16() for x in arguments[4:])
    logp, _ = linear_logprob(*arguments, impl="triton")
    torch.testing.assert_close(logp.double(), in_float64(*arguments)[0], rtol=1e-4, atol=1e-4)


def test_a_frozen_head_computes_its_logits_once(monkeypatch, device):
    calls = []
    real = op._Head.logits
    monkeypatch.setattr(op._Head, "logits", lambda self, h, u: calls.append(1) or real(self, h, u))
    arguments = with_grads(inputs(5, 8, 17, device=device), {HIDDEN, ADAPTER_HIDDEN})
    linear_logprob(*arguments, impl="triton")[0].sum().backward()
    assert len(calls) == 1


def test_without_gradients_none_is_prepared(device):
    arguments = with_grads(inputs(5, 8, 17, device=device), {HIDDEN})
    with torch.no_grad():
        assert not any(kept.numel() for kept in op._linear_logprob(*arguments, False, False, False, True)[1:])
        assert not linear_logprob(*arguments, impl="triton")[0].requires_grad


def test_no_rows_give_no_logps_and_zero_gradient(device):
    arguments = with_grads(inputs(0, 8, 11, device=device), {HIDDEN, WEIGHT})
    logp, _ = linear_logprob(*arguments, impl="triton")
    logp.sum().backward()
    assert logp.shape == (0,) and not arguments[WEIGHT].grad.any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("trainable", "kept"), [("frozen head under an adapter", ALL), *FORMS[-2:]])
def test_the_op_obeys_the_rules_of_custom_ops(trainable, kept, impl, device, monkeypatch):
    keep(monkeypatch, kept, V=11)
    arguments = with_grads(inputs(9, 8, 11, device=device), TRAINABLE[trainable])
    trains_head = trainable == "everything"
    torch.library.opcheck(op._linear_logprob, (*arguments, True, not trains_head, trains_head, impl == "triton"))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize(("trainable", "kept"), FORMS)
def test_it_compiles_whole_and_gives_the_same_numbers(trainable, kept, impl, device, monkeypatch):
    keep(monkeypatch, kept, V=17)
    torch._dynamo.reset()  # it allows one function eight versions, and each case here is one
    wanted, results = TRAINABLE[trainable], []

    def run(*arguments):
        return linear_logprob(*arguments, entropy=True, impl=impl)

    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        arguments = with_grads(inputs(9, 8, 17, device=device), wanted)
        logp, entropy = function(*arguments)
        logp.square().sum().backward()
        results.append([logp, entropy, *(arguments[i].grad for i in sorted(wanted))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_one_compiled_form_serves_any_number_of_rows_within_the_budget_and_one_beyond_it(device, monkeypatch):
    keep(monkeypatch, 12, V=17)
    monkeypatch.setattr(op, "_chunk_rows", lambda V, on_gpu: 4)
    torch._dynamo.reset()
    graphs = []

    def note(graph, _):
        graphs.append(graph)
        return graph

    def logps(*arguments):
        return linear_logprob(*arguments, impl="triton")[0]

    compiled = torch.compile(logps, fullgraph=True, dynamic=True, backend=note)
    for N in (5, 7, 12, 15, 23):
        arguments = with_grads(inputs(N, 8, 17, device=device), TRAINABLE["everything"])
        assert torch.equal(compiled(*arguments), logps(*arguments))
    assert len(graphs) == 2
