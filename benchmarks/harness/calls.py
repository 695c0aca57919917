"""One call of each launcher that `benchmarks/tune.py` times, and its inputs at the shapes of Phi-2.

A function of inputs takes a device and a seed. A call writes into new memory, or over an input that it names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import attention as ops_attention
from benchmarks.cases.elementwise import FORMS
from benchmarks.harness import gpu
from benchmarks.harness.gpu import Inputs, Outputs
from benchmarks.harness.launches import B, C, D, F, H, N, S, V
from phi2_kernels import (
    attention_backward_triton,
    attention_forward_triton,
    decode_attention_triton,
    gelu_triton,
    layer_norm_triton,
    linear_logprob_triton,
    rotary_triton,
)
from phi2_kernels.gemv import gemv_each, gemv_sum
from phi2_kernels.rotary import rotary_angles
from phi2_kernels.weight_forms import Weight

HALF = torch.bfloat16
CHUNK = 2048  # rows of logits


def attention_inputs(device: torch.device, seed: int) -> Inputs:
    """The gradient of the output, then q, k, v (B, H, S, D), and what a forward pass made of them."""
    q, k, v, do = (x.detach() for x in ops_attention.attention_inputs(device, HALF, B, H, S, D, True, seed))
    return do, q, k, v, *attention_forward(do, q, k, v).values()


def norm_inputs(device: torch.device, seed: int) -> Inputs:
    """x, the gradients of y and of what went past (N, C), weight and bias (C,), mean and rstd (N,)."""
    normal = gpu.random(seed, device)
    x, grad, skip = (normal(N, C, dtype=HALF) for _ in range(3))
    variance, mean = torch.var_mean(x.float(), dim=1, correction=0)
    return x, grad, skip, normal(C, dtype=HALF), normal(C, dtype=HALF), mean, torch.rsqrt(variance + 1e-5)


def gelu_inputs(device: torch.device, seed: int) -> Inputs:
    """x and the gradient of y (N, F)."""
    normal = gpu.random(seed, device)
    return normal(N, F, dtype=HALF), normal(N, F, dtype=HALF)


def rotary_inputs(device: torch.device, seed: int) -> Inputs:
    """The queries and keys in rows that end with values (N, 2 H, D), and the tables of S tokens."""
    rows = gpu.random(seed, device)(N, 3 * H, D, dtype=HALF)
    return rows[:, : 2 * H], *_tables(device)


def _tables(device: torch.device) -> list[Tensor]:
    return [table.flatten(0, 2) for table in rotary_angles(torch.arange(S, device=device)[None], 32, 10000.0)]


def token_inputs(device: torch.device, seed: int) -> Inputs:
    """One token's q, k and v (1, H, D), tables, its slot (1,), and the cache (1, H, S, D), twice."""
    normal = gpu.random(seed, device)
    slot = torch.full((1,), S // 2, device=device, dtype=torch.int32)
    cache = (normal(1, H, S, D, dtype=HALF) for _ in range(2))
    return *(normal(1, H, D, dtype=HALF) for _ in range(3)), *_tables(device), slot, *cache


def logits_inputs(device: torch.device, seed: int) -> Inputs:
    """Logits (CHUNK, V), bias (V,), targets, logsumexp and factors of the gradient (CHUNK,)."""
    normal = gpu.random(seed, device)
    targets = torch.randint(V, (CHUNK,), generator=torch.Generator().manual_seed(seed)).to(device)
    logits, bias = normal(CHUNK, V, dtype=torch.float32), normal(V, dtype=HALF)
    return logits, bias, targets, torch.logsumexp(logits + bias, dim=1), normal(CHUNK, dtype=torch.float32)


def query_inputs(device: torch.device, seed: int) -> Inputs:
    """One query (1, H, 1, D), a full cache of keys and values (1, H, S, D), and its length (1,)."""
    normal = gpu.random(seed, device)
    return *(normal(1, H, n, D, dtype=HALF) for n in (1, S, S)), torch.full((1,), S, device=device, dtype=torch.int32)


def layer_inputs(form: str, M: int, device: torch.device, seed: int) -> Inputs:
    """x (M, C), and the weights of q, k, v, fc1, dense and fc2."""
    normal = gpu.random(seed, device)

    def weight(N: int, K: int) -> Weight:
        bias = normal(N, dtype=HALF)
        return FORMS["bf16" if form == "half" else form](normal(N, K, dtype=HALF, scale=K**-0.5))._replace(bias=bias)

    return normal(M, C, dtype=HALF), *(weight(*size) for size in ((C, C), (C, C), (C, C), (F, C), (C, C), (C, F)))


def attention_forward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_) -> Outputs:
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    attention_forward_triton.forward(q, k, v, o, lse)
    return {"output": o, "logsumexp": lse}


def attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor) -> Outputs:
    """The whole pass: while one of its kernels has another launch, the others run as shipped."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    attention_backward_triton.backward(do, q, k, v, o, lse, dq, dk, dv)
    return {"grad of q": dq, "grad of k": dk, "grad of v": dv}


def norm_forward(x: Tensor, grad: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, *_) -> Outputs:
    y, mean, rstd = torch.empty_like(x), *(torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
    layer_norm_triton.forward(x, weight, bias, 1e-5, y, mean, rstd)
    return {"output": y, "mean": mean, "rstd": rstd}


def norm_backward(
    sums: bool, x: Tensor, grad: Tensor, skip: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> Outputs:
    dx = torch.empty_like(x)
    summed = layer_norm_triton.backward(grad, x, weight, mean, rstd, dx, skip, sums=sums)
    return {"grad of x": dx, "grads of weight and bias": summed}


def gelu_forward(x: Tensor, *_) -> Outputs:
    y = torch.empty_like(x)
    gelu_triton.forward(x, y)
    return {"output": y}


def gelu_backward(x: Tensor, grad: Tensor) -> Outputs:
    dx = torch.empty_like(x)
    gelu_triton.backward(grad, x, dx)
    return {"grad of x": dx}


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Outputs:
    rotary_triton.apply_rotary(x, cos, sin, False)
    return {"rotated": x}


def apply_rotary_and_store(q, k, v, cos, sin, slot, keys, values) -> Outputs:
    rotary_triton.apply_rotary_and_store(q, k, v, cos, sin, slot, keys, values)
    return {"query": q, "key": keys[:, :, S // 2], "value": values[:, :, S // 2]}


def stats(logits: Tensor, bias: Tensor, targets: Tensor, lse: Tensor, scale: Tensor) -> Outputs:
    logp, lse = torch.empty_like(lse), torch.empty_like(lse)
    grad = linear_logprob_triton.stats(logits, bias, targets, logp, lse, None, HALF)
    return {"log-probabilities": logp, "logsumexp": lse, "gradient": grad}


def gradient(logits: Tensor, bias: Tensor, targets: Tensor, lse: Tensor, scale: Tensor) -> Outputs:
    return {"gradient": linear_logprob_triton.gradient(logits, bias, targets, lse, scale, HALF)}


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Outputs:
    o = torch.empty_like(q)
    decode_attention_triton.attend(q, keys, values, lengths, None, o)
    return {"output": o}


def layer(x: Tensor, *weights: Weight) -> Outputs:
    """The products of a decode step's layer."""
    q, k, v, f = gemv_each(x, weights[:4], gelu_last=True, impl="triton")
    return {"q": q, "k": k, "v": v, "output": gemv_sum([q, f], weights[4:], x, impl="triton")}
