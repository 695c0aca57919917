"""Where `auto` takes cuDNN's forward pass, and that our backward pass goes on from what it leaves."""

from __future__ import annotations

import pytest
import torch

from phi2_kernels import _dispatch, attention_cudnn
from phi2_kernels.attention import _attention, attention
from phi2_kernels.attention_cudnn import takes_cudnn
from phi2_kernels.visibility import Visibility

HOPPER, BFLOAT16 = (9, 0), torch.bfloat16
LONG = (8, 32, 2048, 80)
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="the rule is Hopper's"
)


def make_qkv(B=1, H=2, T=48, D=80, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    torch.manual_seed(T)
    heads = [torch.randn(B, T, H, D, device=device).to(dtype).transpose(1, 2) for _ in range(3)]
    return [x.requires_grad_() for x in heads]


@pytest.mark.parametrize(
    "capability, dtype, shape, kv_heads, expected",
    [
        (HOPPER, BFLOAT16, LONG, 32, True),
        (HOPPER, torch.float16, (2, 32, 8192, 80), 32, True),
        (HOPPER, BFLOAT16, (32, 32, 512, 80), 32, True),  # the least work that was measured
        (HOPPER, BFLOAT16, (31, 32, 512, 80), 32, False),
        (HOPPER, BFLOAT16, (1, 32, 2048, 80), 32, False),  # a prompt saves less than a plan costs
        (HOPPER, BFLOAT16, (8, 32, 2047, 80), 32, False),  # a length of no second batch
        (HOPPER, BFLOAT16, LONG, 8, False),
        (HOPPER, torch.float32, LONG, 32, False),
        ((8, 0), BFLOAT16, LONG, 32, False),  # an A100
        ((8, 9), BFLOAT16, LONG, 32, False),
        ((10, 0), BFLOAT16, LONG, 32, False),  # not measured
    ],
)
def test_the_rule(capability, dtype, shape, kv_heads, expected):
    assert takes_cudnn(capability, dtype, shape, kv_heads) == expected


@pytest.fixture
def hopper(monkeypatch) -> list[torch.Size]:
    """Tensors on a CPU are taken for a Hopper's, and attention by torch for cuDNN's. Lists its calls."""
    calls: list[torch.Size] = []

    def cudnn(q, k, v, bias, compute_log_sumexp, *, is_causal):
        assert bias is None and compute_log_sumexp and is_causal
        calls.append(q.shape)
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, float("-inf"))
        return scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True), None

    monkeypatch.setattr(attention_cudnn, "_is_usable", lambda q, k, v: True)
    monkeypatch.setattr(attention_cudnn, "takes_cudnn", lambda *_: True)
    monkeypatch.setattr(attention_cudnn, "_cudnn", cudnn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    return calls


def grads_of(inputs, out):
    return torch.autograd.grad(out, inputs, torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape))


def test_our_gradients_go_on_from_its_output_and_logsumexp(hopper):
    inputs = make_qkv()
    chosen, ours = (_attention(*inputs, None, None, None, auto)[0] for auto in (True, False))
    assert len(hopper) == 1
    torch.testing.assert_close(chosen, ours, rtol=1e-5, atol=1e-5)
    for mine, other in zip(grads_of(inputs, chosen), grads_of(inputs, ours), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_its_output_has_the_memory_that_the_op_promises(hopper):
    q, k, v = (x.contiguous() for x in make_qkv())  # of which torch would make an output with heads apart
    torch.library.opcheck(_attention, (q, k, v, None, None, None, True), test_utils="test_faketensor")


@pytest.mark.parametrize("named", ["argument", "environment"])
def test_named_kernels_are_ours(hopper, named, monkeypatch):
    q, k, v = make_qkv()
    if named == "environment":
        monkeypatch.setattr(_dispatch, "default_impl", "triton")
    attention(q, k, v, Visibility(48, 48, None, q.device), impl="triton" if named == "argument" else "auto")
    assert not hopper


@pytest.mark.parametrize("auto", [True, False])
def test_auto_lets_the_rule_choose(hopper, auto, monkeypatch):
    """A CPU's tensors stand for a GPU's, which auto gives to the kernels."""
    q, k, v = make_qkv()
    monkeypatch.setattr("phi2_kernels.attention.use_triton", lambda *_: True)
    attention(q, k, v, Visibility(48, 48, None, q.device), impl="auto" if auto else "triton")
    assert len(hopper) == auto


def test_the_choice_breaks_no_graph_and_guards_no_length(hopper, monkeypatch):
    monkeypatch.setattr("phi2_kernels.attention.use_triton", lambda *_: True)
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, Visibility(q.shape[2], k.shape[2], None, q.device)),
        fullgraph=True, dynamic=True, backend="aot_eager",
    )  # fmt: skip
    for T, stance in ((48, "default"), (49, "fail_on_recompile")):
        q, k, v = make_qkv(T=T)
        with torch.compiler.set_stance(stance):
            out = compiled(q, k, v)
        torch.testing.assert_close(out, attention(q, k, v, Visibility(T, T, None, q.device), impl="torch"))
    assert [shape[2] for shape in hopper] == [48, 49]


@pytest.mark.parametrize("T, until", [(48, [48] * 48), (40, None)], ids=["packed", "behind a cache"])
def test_what_is_not_plain_causal_is_ours(hopper, T, until, monkeypatch):
    q, k, v = make_qkv()
    monkeypatch.setattr("phi2_kernels.attention.use_triton", lambda *_: True)
    until = None if until is None else torch.tensor([until], dtype=torch.int32)
    attention(q[:, :, 48 - T :], k, v, Visibility(T, 48, until, q.device))
    assert not hopper


@pytest.mark.parametrize(
    "x, is_aligned",
    [
        (torch.zeros(2, 4, 2, 80, dtype=BFLOAT16), True),
        (torch.zeros(2, 4, 2, 83, dtype=BFLOAT16)[..., :80], False),  # rows of 83 numbers
        (torch.zeros(2, 4, 2, 88, dtype=BFLOAT16)[..., 1:81], False),  # begins between two accesses
        (torch.zeros(1, 4, 2, 80, dtype=BFLOAT16).expand(2, -1, -1, -1), False),  # one row for two
    ],
)
def test_tensors_that_it_cannot_read_are_ours(x, is_aligned):
    assert attention_cudnn._is_aligned(x) == is_aligned


@pytest.mark.gpu
@needs_hopper
def test_on_a_hopper_auto_is_as_good_as_torchs_and_repeats_its_bits(monkeypatch):
    """Small enough for float64, so the rule is asked for less work than it wants."""
    monkeypatch.setattr(attention_cudnn, "LEAST_SCORES", 0)
    inputs = make_qkv(B=2, T=256, dtype=BFLOAT16, device="cuda")
    visibility, exact = Visibility(256, 256, None, inputs[0].device), [x.detach().double() for x in inputs]
    assert attention_cudnn.is_chosen(*inputs, None)

    def results(impl):
        out = attention(*inputs, visibility, impl=impl)
        return out.detach(), *grads_of(inputs, out)

    true_inputs = [x.requires_grad_() for x in exact]
    scores = true_inputs[0] @ true_inputs[1].mT / 80**0.5
    seen = torch.ones(256, 256, dtype=torch.bool, device="cuda").tril()
    out = scores.masked_fill(~seen, float("-inf")).softmax(-1) @ true_inputs[2]
    true = out.detach(), *grads_of(true_inputs, out)
    for mine, other, reference in zip(results("auto"), results("torch"), true, strict=True):
        assert (mine - reference).norm() <= 2 * (other - reference).norm() + 1e-6
    assert all(torch.equal(a, b) for a, b in zip(results("auto"), results("auto"), strict=True))
