"""The launches that `aot.py` compiles, at the shapes of a training step and of a decode step of Phi-2.

Tensors have a shape and a dtype but no memory: these functions run within `aot.compile_only`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

B, H, S, D, C, F, V = 8, 32, 2048, 80, 2560, 10240, 51200
N = B * S


class Work(NamedTuple):
    """What one round of a kernel's main loop needs, or one program where there is no loop."""

    multiply_adds: int = 0  # on tensor cores
    dram_bytes: int = 0
    float32: int = 0  # multiply-adds without them


WORK: dict[str, Callable[..., Work]] = {  # of a launch's constants and the types of its pointers
    "attention forward": lambda **constants: attention_work(2, **constants),
    "attention delta": lambda BLOCK_M, D, o, **_: Work(dram_bytes=2 * BLOCK_M * D * BYTES[o.ptr]),
    "attention dkdv": lambda **constants: attention_work(4, **constants),
    "attention dq": lambda **constants: attention_work(3, **constants),
    "gelu forward": lambda BLOCK_N, BLOCK_F, **_: Work(dram_bytes=BLOCK_N * BLOCK_F * 4),
    "gelu backward": lambda BLOCK_N, BLOCK_F, **_: Work(dram_bytes=BLOCK_N * BLOCK_F * 6),
    "layer_norm forward": lambda **_: Work(dram_bytes=C * 4),
    "layer_norm backward": lambda **_: Work(dram_bytes=C * 8),
    "rotary apply_rotary": lambda BLOCK_H, HALF, **_: Work(dram_bytes=BLOCK_H * HALF * 8),
    "rotary apply_rotary_and_store": lambda BLOCK_H, **_: Work(dram_bytes=BLOCK_H * D * 4),
    "linear_logprob stats": lambda BLOCK_V, **_: Work(dram_bytes=BLOCK_V * 4),
    "linear_logprob gradient": lambda BLOCK_V, **_: Work(dram_bytes=BLOCK_V * 6),
    "decode_attention attend": lambda BLOCK_S, **_: Work(dram_bytes=BLOCK_S * D * 4),
    "decode_attention combine": lambda BLOCK_SPLITS, **_: Work(dram_bytes=BLOCK_SPLITS * D * 4),
    "gemv each": lambda codes, **constants: product_work(codes, **constants),
    "gemv sum": lambda codes, **constants: product_work(codes, **constants),
}


BYTES = {"*fp32": 4, "*bf16": 2}


def attention_work(matmuls: int, BLOCK_M: int, BLOCK_N: int, PIECES: tuple[int, ...], q: Any, **_) -> Work:
    """One tile of queries by keys, of heads that are as wide as their pieces together."""
    work = matmuls * BLOCK_M * BLOCK_N * sum(PIECES)
    return Work(float32=work) if q.ptr == "*fp32" else Work(work)


def product_work(codes: tuple[str, ...], BLOCK_N: int, BLOCK_K: int, GROUP: int, PARTS: int, **_) -> Work:
    """One round of a product's loop: codes and, for int4, scales and zeros; on tensor cores eight rows of x.

    Args:
        codes: the types of their pointers.
    """
    bits = {"*bf16": 16, "*i8": 8, "*u8": 4 + 32 // max(1, GROUP)}[codes[0]]
    matmuls = 0 if PARTS == 0 else 2 if GROUP else 1  # int4: codes by x, and ones by x
    return Work(8 * matmuls * BLOCK_N * BLOCK_K, BLOCK_N * BLOCK_K * bits // 8)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def floats(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.float32)


def whole(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int32)


def attention(D: int = D, dtype: torch.dtype = torch.bfloat16) -> None:
    """Plain causal, and over packed documents."""
    from phi2_kernels import attention_backward_triton, attention_forward_triton, attention_tiles_triton

    q, o, lse = heads(3 * H * D, D, dtype), heads(H * D, D, dtype), floats(B, H, S)
    until, blocks = whole(B, S), [attention_tiles_triton.launch_of(kernel, q) for kernel in ("forward", "dkdv")]
    ranges, ends = whole(B, S // blocks[0].block_m, 6), whole(B, S // blocks[1].block_n, 2)
    attention_forward_triton.forward(q, q, q, o, lse)
    attention_backward_triton.backward(o, q, q, q, o, lse, q, q, q)
    attention_forward_triton.forward(q, q, q, o, lse, until, ranges)
    attention_backward_triton.backward(o, q, q, q, o, lse, q, q, q, until, ranges, ends)


def heads(row: int, D: int = D, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(B, H, S, D): the heads of q, k or v in a buffer whose rows are so long."""
    return torch.empty_strided((B, H, S, D), (S * row, D, row, 1), dtype=dtype, device="cuda")


def gelu() -> None:
    from phi2_kernels import gelu_triton

    x, y = empty(N, F), empty(N, F)
    gelu_triton.forward(x, y)
    gelu_triton.backward(y, x, x)


def layer_norm() -> None:
    from phi2_kernels import layer_norm_triton

    x, weight, mean = empty(N, C), empty(C), floats(N)
    layer_norm_triton.forward(x, weight, weight, 1e-5, x, mean, mean)
    for sums in (False, True):
        layer_norm_triton.backward(x, x, weight, mean, mean, x, x, sums=sums)


def rotary() -> None:
    from phi2_kernels import rotary_triton

    angles = floats(S, 16)
    rotary_triton.apply_rotary(empty(N, 3 * H, D)[:, : 2 * H], angles, angles, False)
    q, cache = empty(B, H, D), empty(B, H, S, D)
    rotary_triton.apply_rotary_and_store(q, q, q, angles, angles, whole(B), cache, cache)


def linear_logprob() -> None:
    from phi2_kernels import linear_logprob_triton

    n = 2048
    logits, targets, logp = floats(n, V), empty(n, dtype=torch.int64), floats(n)
    linear_logprob_triton.stats(logits, empty(V), targets, logp, logp, logp, torch.bfloat16)
    linear_logprob_triton.gradient(logits, empty(V), targets, logp, logp, torch.bfloat16)


def decode() -> None:
    from phi2_kernels import decode_attention_triton

    q, cache = empty(1, H, 1, D), empty(1, H, S, D)
    decode_attention_triton.attend(q, cache, cache, whole(1), whole(1, S), q)


def gemv(form: str, M: int) -> None:
    """M rows into a layer and out of it."""
    from phi2_kernels import gemv_triton

    x, m = empty(M, C), empty(M, F)
    gemv_triton.each(x, *weights(form, (C, C), (C, C), (C, C), (F, C)), True, [empty(M, N) for N in (C, C, C, F)])
    gemv_triton.summed(x, [x, m], *weights(form, (C, C), (C, F)), x)


def weights(form: str, *sizes: tuple[int, int]) -> list[list[Tensor]]:
    """Codes, scales, zeros and biases of weights (N, K)."""
    biases = [empty(N) for N, _ in sizes]
    if form == "half":
        return [[empty(*size) for size in sizes], [], [], biases]
    if form == "int8":
        return [[empty(*size, dtype=torch.int8) for size in sizes], [empty(N) for N, _ in sizes], [], biases]
    groups = [empty(N, K // 32) for N, K in sizes]
    return [[empty(N, K // 2, dtype=torch.uint8) for N, K in sizes], groups, groups, biases]


def padded() -> None:
    """Causal attention with 128 dims in the place of 80, not even masked: the least that padding costs."""
    from phi2_kernels import attention_backward_triton, attention_forward_triton, attention_tiles_triton

    q, o, lse = heads(3 * H * D), heads(H * D), floats(B, H, S)
    with mock.patch.object(attention_tiles_triton, "pieces_of", lambda D: (128,)):
        attention_forward_triton.forward(q, q, q, o, lse)
        attention_backward_triton.backward(o, q, q, q, o, lse, q, q, q)


def unaligned() -> None:
    """Causal attention on rows whose length no power of two divides."""
    from phi2_kernels import attention_forward_triton

    q = heads(3 * H * D + 1)
    attention_forward_triton.forward(q, q, q, heads(H * D), floats(B, H, S))


def unordered() -> None:
    """The head's gradients without a barrier between reading logits and writing over them."""
    from phi2_kernels import linear_logprob_triton

    flags = linear_logprob_triton._flags
    with mock.patch.object(linear_logprob_triton, "_flags", lambda *call: flags(*call) | {"BARRIER": False}):
        linear_logprob()


GEMVS = [partial(gemv, form, M) for M in (1, 8) for form in ("half", "int8", "int4")]
ATTENTIONS = [attention, partial(attention, 64), partial(attention, 80, torch.float32)]
WIDTHS = (32, 48)
SHIPPED, OTHER_WIDTHS = "shipped", "other widths"  # for other models than Phi
PADDED, UNALIGNED, UNORDERED = "padded", "unaligned", "unordered"
FORMS = {
    SHIPPED: (*ATTENTIONS, gelu, layer_norm, rotary, linear_logprob, decode, *GEMVS),
    OTHER_WIDTHS: [partial(attention, *each) for each in product(WIDTHS, (torch.bfloat16, torch.float32))],
    PADDED: (padded,),
    UNALIGNED: (unaligned,),
    UNORDERED: (unordered,),
}
