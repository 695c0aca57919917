"""The ops beside attention: the head, the elementwise kernels, and what a decode step is made of.

Dims: N rows, C hidden, V vocabulary, F mlp, B batch, T tokens, S keys, H heads, D head dim, M rows of a gemv, K its
inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import gpu
from benchmarks.harness.gpu import ROUNDING, Inputs, Outputs, Side, Task, Work, pulled_back
from benchmarks.registry import Report, case
from phi2_kernels.decode_attention import decode_attention, decode_attention_ref
from phi2_kernels.gelu import gelu, gelu_ref
from phi2_kernels.gemv import gemv
from phi2_kernels.layer_norm import layer_norm, layer_norm_ref
from phi2_kernels.linear_logprob import linear_logprob, linear_logprob_ref
from phi2_kernels.rotary import rotary, rotary_angles
from phi2_kernels.weight_forms import Weight, quantize_int4, quantize_int8

GROUP = 32  # columns of an int4 weight that share a scale
EPS = 1e-5


@case("head", turns=20, summary="log-probabilities of 16384 tokens and their gradients, head frozen and trainable")
def head(turns: int) -> Report:
    """At most 1.1 x the time of its matmuls, and with a frozen head 0.6 GB beside the inputs."""
    device, shape = gpu.device(), dict(N=16384, C=2560, V=51200)
    tasks = [head_task(device, torch.bfloat16, trainable=trainable, **shape) for trainable in (False, True)]
    return gpu.report(tasks, turns, shape)


def head_task(device: torch.device, dtype: torch.dtype, N: int, C: int, V: int, trainable: bool) -> Task:
    """hidden, weight, bias, targets -> log-probabilities; a trainable head makes its logits twice."""

    def inputs(seed: int) -> Inputs:
        normal = gpu.random(seed, device)
        weights = (normal(*shape, dtype=dtype, scale=C**-0.5, grad=trainable) for shape in ((V, C), (V,)))
        targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed)).to(device)
        return normal(N, C, dtype=dtype, grad=True), *weights, targets, normal(N, dtype=torch.float32)

    def eager(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")

    names = "hidden weight bias targets"
    reference = pulled_back(lambda *x: linear_logprob_ref(*x)[0], names)
    own = 4 if trainable else 2
    kept = {"the 3 matmuls of kept logits": lambda: Side(partial(_matmuls, 3), is_compared=False)}
    return Task(
        name=f"head {'trainable' if trainable else 'frozen'}",
        inputs=inputs,
        reference=lambda *x: reference(*gpu.in_float32(*x)),
        ours=Side(pulled_back(lambda *x: linear_logprob(*x, impl="triton")[0], names)),
        plain=Side(pulled_back(eager, names)),
        peers={
            f"its {own} matmuls": lambda: Side(partial(_matmuls, own), is_compared=False),
            **(kept if trainable else {}),
            "Liger": lambda: Side(pulled_back(_liger(), names)),
            "F.linear_cross_entropy": lambda: Side(pulled_back(_linear_cross_entropy(), names)),
            **plain_and_compiled(eager, names, device),
        },
        work=head_work(N, C, V, trainable),
        rounding=ROUNDING[dtype],
        targets={f"its {own} matmuls": 1.1},
        peak_limit=None if trainable else 0.6,
        sets=2,
    )


def head_work(N: int, C: int, V: int, trainable: bool) -> Work:
    """Logits, and one matmul for each gradient; hidden and its gradient, the weight and, if it is wanted, its own."""
    matmuls, weights = (3, 2) if trainable else (2, 1)
    return Work(matmuls * 2 * N * C * V, 2 * (2 * N * C + weights * V * C))


def _matmuls(count: int, hidden: Tensor, weight: Tensor, *_) -> Outputs:
    """The first `count` of: logits, gradient of hidden, gradient of the weight, logits again."""
    with torch.no_grad():
        logits = hidden @ weight.T  # they stand for their gradient too
        matmuls = (lambda: logits @ weight, lambda: logits.T @ hidden, lambda: hidden @ weight.T)
        return {str(i): matmul() for i, matmul in enumerate(matmuls[: count - 1])}


def _liger() -> Callable[..., Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden, weight, bias, targets: -loss(weight, hidden, targets, bias)


def _linear_cross_entropy() -> Callable[..., Tensor]:
    """torch's, from 2.13 on, in chunks."""
    chunks = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, bias, targets: (
        -F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="none", options=chunks)
    )


def plain_and_compiled(forward: Callable[..., Tensor], names: str, device: torch.device) -> dict:
    """The two peers that torch itself gives for a function and its gradients."""
    return {
        "eager": lambda: Side(pulled_back(forward, names)),
        "torch.compile": lambda: Side(pulled_back(gpu.compiled(forward, device), names)),
    }


@case("elementwise", turns=50, summary="layer_norm, gelu and rotary with their gradients, over 8192 tokens")
def elementwise(turns: int) -> Report:
    device, dtype, N = gpu.device(), torch.bfloat16, 8192
    tasks = [
        layer_norm_task(device, dtype, N, C=2560, trainable=False),
        layer_norm_task(device, dtype, N, C=2560, trainable=True),
        gelu_task(device, dtype, N, F=10240),
        rotary_task(device, dtype, B=4, T=2048, H=32, D=80, R=32),
    ]
    return gpu.report(tasks, turns, {"tokens": N})


def layer_norm_task(device: torch.device, dtype: torch.dtype, N: int, C: int, trainable: bool) -> Task:
    def inputs(seed: int) -> Inputs:
        normal = gpu.random(seed, device)
        weight, bias = (normal(C, dtype=dtype, grad=trainable) for _ in range(2))
        return normal(N, C, dtype=dtype, grad=True), weight, bias, normal(N, C, dtype=dtype)

    ways = (
        lambda x, weight, bias: layer_norm(x, weight, bias, EPS, impl="triton"),
        lambda x, weight, bias: layer_norm_ref(x, weight, bias, EPS),
        lambda x, weight, bias: F.layer_norm(x, (C,), weight, bias, EPS),
    )
    name = f"layer_norm {'trainable' if trainable else 'frozen'}"
    return elementwise_task(name, inputs, ways, "x weight bias", 5 * N * C, device, dtype)


def gelu_task(device: torch.device, dtype: torch.dtype, N: int, F: int) -> Task:
    def inputs(seed: int) -> Inputs:
        normal = gpu.random(seed, device)
        return normal(N, F, dtype=dtype, grad=True), normal(N, F, dtype=dtype)

    ways = (partial(gelu, impl="triton"), gelu_ref, partial(torch.nn.functional.gelu, approximate="tanh"))
    return elementwise_task("gelu", inputs, ways, "x", 5 * N * F, device, dtype)


def rotary_task(device: torch.device, dtype: torch.dtype, B: int, T: int, H: int, D: int, R: int) -> Task:
    """Queries or keys (B, T, H, D)."""
    cos, sin = rotary_angles(torch.arange(T, device=device)[None], R, 10000.0)

    def inputs(seed: int) -> Inputs:
        normal = gpu.random(seed, device)
        return normal(B, T, H, D, dtype=dtype, grad=True), normal(B, T, H, D, dtype=dtype)

    def plain(x: Tensor) -> Tensor:
        first, second, rest = x.split([R // 2, R // 2, D - R], dim=-1)
        turned = first * cos - second * sin, second * cos + first * sin
        return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)

    ways = (lambda x: rotary(x, cos, sin, impl="triton"), plain, plain)
    return elementwise_task("rotary", inputs, ways, "x", 4 * B * T * H * D, device, dtype)


def elementwise_task(
    name: str,
    inputs: Callable[[int], Inputs],
    ways: tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]],
    names: str,
    elements: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Task:
    """A function and its gradients, bound by memory.

    Args:
        ways: ours, the formula, and what torch has.
        elements: read and written, in both passes together.
    """
    ours, formula, plain = ways
    reference = pulled_back(formula, names)
    work = Work(0, elements * dtype.itemsize)
    return Task(
        name=name,
        inputs=inputs,
        reference=lambda *x: reference(*gpu.in_float32(*x)),
        ours=Side(pulled_back(ours, names)),
        plain=Side(pulled_back(plain, names)),
        peers=plain_and_compiled(plain, names, device),
        work=work,
        rounding=ROUNDING[dtype],
        per_second=(work.bytes / 1e9, "GB/s"),
    )


@case("decode_ops", turns=50, summary="attention to a cache of 2048 keys; gemv of bf16, int8 and int4 weights")
def decode_ops(turns: int) -> Report:
    """Each timed inside a CUDA graph, as a decode step runs."""
    device, dtype = gpu.device(), torch.bfloat16
    tasks = [decode_attention_task(device, dtype, B, H=32, S=2048, D=80) for B in (1, 8)]
    for N, K in ((17920, 2560), (2560, 12800), (51200, 2560)):  # into a layer, out of it, and the head
        tasks += [gemv_task(device, dtype, form, 1, N, K) for form in FORMS]
    return gpu.report(tasks, turns, {"int4 group": GROUP})


def decode_attention_task(device: torch.device, dtype: torch.dtype, B: int, H: int, S: int, D: int) -> Task:
    """One query per row, all S keys filled."""
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)

    def inputs(seed: int) -> Inputs:
        normal = gpu.random(seed, device)
        return tuple(normal(B, H, n, D, dtype=dtype) for n in (1, S, S))

    return short_task(
        f"decode_attention B{B} S{S}",
        inputs,
        Side(lambda q, k, v: {"output": decode_attention(q, k, v, lengths, impl="triton")}),
        lambda q, k, v: decode_attention_ref(q, k, v, lengths),
        {"SDPA": Side(lambda q, k, v: {"output": F.scaled_dot_product_attention(q, k, v)})},
        decode_attention_work(B, H, S, D),
        dtype,
    )


def decode_attention_work(B: int, H: int, S: int, D: int) -> Work:
    """Two matmuls of one query; keys and values, the query and the output."""
    return Work(4 * B * H * S * D, 2 * B * H * D * (2 * S + 2))


FORMS: dict[str, Callable[[Tensor], Weight]] = {
    "bf16": Weight,
    "int8": quantize_int8,
    "int4": partial(quantize_int4, group=GROUP),
}


def gemv_task(device: torch.device, dtype: torch.dtype, form: str, M: int, N: int, K: int) -> Task:
    """M rows times a weight (N, K); the peers multiply the half-precision weight that a small one stands for."""

    def inputs(seed: int) -> Inputs:
        normal = gpu.random(seed, device)
        return normal(M, K, dtype=dtype), *_present(FORMS[form](normal(N, K, dtype=dtype, scale=K**-0.5)))

    def int8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return (F.linear(x, codes.to(x.dtype)) * scale).to(x.dtype)

    peers = {
        "F.linear": Side(
            lambda x, w: {"output": F.linear(x, w)}, prepare=lambda x, *parts: (x, Weight(*parts).dense().to(dtype))
        )
    }
    if form == "int8":
        fast = gpu.compiled(int8_linear, device)
        peers["torch.compile"] = Side(lambda *inputs: {"output": fast(*inputs)})
    return short_task(
        f"gemv {form} {N}x{K}",
        inputs,
        Side(lambda x, *parts: {"output": gemv(x, Weight(*parts), impl="triton")}),
        lambda x, *parts: x.float() @ Weight(*parts).dense().float().T,
        peers,
        gemv_work(form, M, N, K),
        dtype,
    )


def _present(weight: Weight) -> list[Tensor]:
    """Its tensors, in the order of `Weight`."""
    return [part for part in weight if part is not None]


def gemv_work(form: str, M: int, N: int, K: int) -> Work:
    """The weight in its form, with the scales of rows (int8) or the scales and zeros of groups (int4); x and y."""
    weight = {"bf16": 2 * N * K, "int8": N * K + 2 * N, "int4": N * K // 2 + 4 * N * K // GROUP}[form]
    return Work(2 * M * N * K, weight + 2 * M * (K + N))


def short_task(
    name: str,
    inputs: Callable[[int], Inputs],
    ours: Side,
    formula: Callable[..., Tensor],
    peers: dict[str, Side],
    work: Work,
    dtype: torch.dtype,
) -> Task:
    """A step of decoding, bound by memory. The first peer is torch's own, which is always there."""
    return Task(
        name=name,
        inputs=inputs,
        reference=lambda *x: {"output": formula(*gpu.in_float32(*x))},
        ours=ours,
        plain=next(iter(peers.values())),
        peers={name: lambda peer=peer: peer for name, peer in peers.items()},
        work=work,
        rounding=ROUNDING[dtype],
        per_second=(work.bytes / 1e9, "GB/s"),
        sets=8,
        in_graph=True,
    )
