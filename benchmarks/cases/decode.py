"""What a decode step is made of: attention of one query to a cache, and products of few rows with weights.

Dims: B batch, H heads, S keys, D head dim, M rows of a product, K its inputs, N its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import spec
from benchmarks.harness.comparison import Comparison, Inputs, Work, compare_functions, compiled, drawn, of_function
from benchmarks.harness.gpu import gpu_case
from benchmarks.harness.spec import Call, Entry
from phi2_kernels.decode_attention import decode_attention, decode_attention_ref
from phi2_kernels.gemv import gemv
from phi2_kernels.weight_forms import Weight, quantize_int4, quantize_int8

GROUP = 32  # columns of an int4 weight that share a scale
PRODUCTS = (17920, 2560), (2560, 12800), (51200, 2560)  # N and K: into a layer, out of it, and the head
WEIGHT_FORMS: dict[str, Callable[[Tensor], Weight]] = {
    "bf16": Weight,
    "int8": quantize_int8,
    "int4": partial(quantize_int4, group=GROUP),
}


@gpu_case(
    "decode_ops",
    turns=50,
    summary="attention to a cache of 2048 keys; gemv of bf16, int8 and int4 weights",
    tiny=dict(H=2, S=33, shapes=((48, 64),)),
)
def decode_ops(
    device: torch.device, H: int = 32, S: int = 2048, shapes: Sequence[tuple[int, int]] = PRODUCTS
) -> list[Comparison]:
    """Each timed inside a CUDA graph, as a decode step runs."""
    dtype = torch.bfloat16
    return [
        *(compare_decode_attention(device, dtype, B, H, S, D=80) for B in (1, 8)),
        *(compare_gemv(device, dtype, form, 1, N, K) for N, K in shapes for form in WEIGHT_FORMS),
    ]


# ---- attention of one query ----


def compare_decode_attention(device: torch.device, dtype: torch.dtype, B: int, H: int, S: int, D: int) -> Comparison:
    """One query per row, all S keys filled."""
    lengths = torch.full((B,), S, dtype=torch.int32, device=device)
    return compare_functions(
        f"decode_attention B{B} S{S}",
        drawn(device, dtype, lambda normal: tuple(normal(B, H, n, D) for n in (1, S, S))),
        lambda q, k, v: decode_attention(q, k, v, lengths, impl="triton"),
        lambda q, k, v: decode_attention_ref(q, k, v, lengths),
        {"SDPA": lambda: of_function(F.scaled_dot_product_attention)},
        decode_attention_work(B, H, S, D),
        dtype,
        in_graph=True,
    )


def decode_attention_work(B: int, H: int, S: int, D: int) -> Work:
    """Two matmuls of one query; keys and values, the query and the output."""
    return Work(4 * B * H * S * D, 2 * B * H * D * (2 * S + 2))


# Candidates: keys at a time, stages, warps.
KEYS = spec.on_both((32, 3, 4), (16, 3, 4), (32, 2, 4), (32, 4, 4), (64, 3, 4), (64, 3, 8))
ATTEND = Call(
    "decode_attention_triton.attend",
    dict(q="1 H 1 D", k="1 H S D", v="1 H S D", o="1 H 1 D", lengths="1:int32=S", until=None),
    also=dict(until="1 S:int32=S"),
)
spec.ENTRIES["decode_attention"] = Entry(
    "decode_attention_triton", "attend", "decode_attention attend", KEYS, (ATTEND,), in_graph=True
)


# ---- products of few rows ----


def compare_gemv(device: torch.device, dtype: torch.dtype, form: str, M: int, N: int, K: int) -> Comparison:
    """M rows times a weight (N, K); the peers multiply the half-precision weight that a small one stands for."""

    def draw(normal: Callable[..., Tensor]) -> Inputs:
        weight = WEIGHT_FORMS[form](normal(N, K, scale=K**-0.5))
        return normal(M, K), *(part for part in weight if part is not None)

    def int8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return (F.linear(x, codes.to(x.dtype)) * scale).to(x.dtype)

    peers = {"F.linear": lambda: of_function(F.linear, prepare=lambda x, *w: (x, Weight(*w).dense().to(dtype)))}
    if form == "int8":
        peers["torch.compile"] = lambda: of_function(compiled(int8_linear, device))
    return compare_functions(
        f"gemv {form} {N}x{K}",
        drawn(device, dtype, draw),
        lambda x, *parts: gemv(x, Weight(*parts), impl="triton"),
        lambda x, *parts: x.float() @ Weight(*parts).dense().float().T,
        peers,
        gemv_work(form, M, N, K),
        dtype,
        in_graph=True,
    )


def gemv_work(form: str, M: int, N: int, K: int) -> Work:
    """The weight in its form, with the scales of rows (int8) or the scales and zeros of groups (int4); x and y."""
    weight = {"bf16": 2 * N * K, "int8": N * K + 2 * N, "int4": N * K // 2 + 4 * N * K // GROUP}[form]
    return Work(2 * M * N * K, weight + 2 * M * (K + N))


def useful(BLOCK_N: int, BLOCK_K: int, GROUP: int, PARTS: int, **_) -> int:
    """Of one round of a product's loop: eight rows of x by codes and, for int4, by ones."""
    matmuls = 0 if PARTS == 0 else 2 if GROUP else 1
    return 8 * matmuls * BLOCK_N * BLOCK_K


def weights(form: str, *sizes: str) -> dict[str, list[str]]:
    """Arguments of the launchers for weights of sizes "N K"; a list is empty where a form has none of it."""
    rows = [size.split()[0] for size in sizes]
    groups = [f"{size}/{GROUP}" for size in sizes]
    codes = {"half": "{}", "int8": "{}:int8%16", "int4": "{}/2:uint8%256"}[form]
    scales, zeros = {"half": ([], []), "int8": (rows, []), "int4": (groups, groups)}[form]
    return dict(codes=[codes.format(size) for size in sizes], scales=scales, zeros=zeros, biases=rows)


def gemv_entry(form: str, M: int) -> Entry:
    """Into a layer and out of it, by one entry. Candidates: columns, rows, warps, stages."""
    into = Call(
        "gemv_triton.each",
        dict(x=f"{M} C", **weights(form, "C C", "C C", "C C", "F C"), gelu_last=True, ys=[f"{M} C"] * 3 + [f"{M} F"]),
    )
    out = Call(
        "gemv_triton.summed",
        dict(skip=f"{M} C", xs=[f"{M} C", f"{M} F"], **weights(form, "C C", "C F"), y=f"{M} C"),
    )
    key, candidates = (form, ONE_ROW) if M == 1 else (f"{form} rows", ROWS)
    return Entry("gemv_triton", key, "gemv each", spec.on_both(*candidates), (into, out), in_graph=True)


ONE_ROW = (512, 8, 4, 1), (512, 4, 4, 1), (1024, 4, 4, 1), (1024, 8, 8, 1), (512, 16, 8, 1), (256, 8, 4, 1)
ROWS = (256, 16, 4, 3), (256, 16, 4, 4), (512, 16, 4, 3), (512, 16, 8, 3), (256, 16, 8, 1), (256, 32, 8, 1)
GEMVS = [gemv_entry(form, M) for M in (1, 8) for form in ("half", "int8", "int4")]
spec.ENTRIES |= {f"gemv_{gemv.key.replace(' ', '_')}": gemv for gemv in GEMVS}
spec.USEFUL |= {"gemv each": useful, "gemv sum": useful}
