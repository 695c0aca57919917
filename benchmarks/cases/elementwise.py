"""The elementwise ops: LayerNorm, GELU and rotary embedding.

Dims: N rows, C hidden, F mlp, B batch, T tokens, S positions or keys, H heads, D head dim, R rotary dims.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import comparison, gpu, spec
from benchmarks.harness.comparison import ROUNDING, Comparison, Inputs, Work
from benchmarks.harness.spec import Call, Entry
from benchmarks.registry import Report, case
from phi2_kernels.gelu import gelu, gelu_ref
from phi2_kernels.layer_norm import layer_norm, layer_norm_ref
from phi2_kernels.rotary import rotary, rotary_angles

EPS = 1e-5


@case("elementwise", turns=50, summary="layer_norm, gelu and rotary with their gradients, over 8192 tokens")
def elementwise(turns: int) -> Report:
    device, dtype, N = gpu.device(), torch.bfloat16, 8192
    comparisons = [
        compare_layer_norm(device, dtype, N, C=2560, trainable=False),
        compare_layer_norm(device, dtype, N, C=2560, trainable=True),
        compare_gelu(device, dtype, N, F=10240),
        compare_rotary(device, dtype, B=4, T=2048, H=32, D=80, R=32),
    ]
    return gpu.report(comparisons, turns, {"tokens": N})


def bound_by_memory(elements: int, dtype: torch.dtype) -> dict:
    """What elementwise comparisons have in common; elements are read or written, in both passes together."""
    work = Work(0, elements * dtype.itemsize)
    return {"work": work, "rounding": ROUNDING[dtype], "per_second": (work.bytes / 1e9, "GB/s")}


# ---- LayerNorm ----


def compare_layer_norm(device: torch.device, dtype: torch.dtype, N: int, C: int, trainable: bool) -> Comparison:
    def inputs(seed: int) -> Inputs:
        normal = comparison.random(seed, device)
        weight, bias = (normal(C, dtype=dtype, grad=trainable) for _ in range(2))
        return normal(N, C, dtype=dtype, grad=True), weight, bias, normal(N, C, dtype=dtype)

    functions = (
        lambda x, weight, bias: layer_norm(x, weight, bias, EPS, impl="triton"),
        lambda x, weight, bias: layer_norm_ref(x, weight, bias, EPS),
        lambda x, weight, bias: F.layer_norm(x, (C,), weight, bias, EPS),
    )
    name = f"layer_norm {'trainable' if trainable else 'frozen'}"
    common = bound_by_memory(5 * N * C, dtype)
    return comparison.compare_functions(name, inputs, "x weight bias", functions, device=device, **common)


# Candidates: warps; a row is 2560 columns.
WARPS = spec.on_both((1,), (2,), (4,), (8,))
NORM = Call(
    "layer_norm_triton.forward",
    reads=dict(x="N C", weight="C", bias="C", eps=EPS),
    writes=dict(y="N C", mean="N:float32", rstd="N:float32"),
)
NORM_BACKWARD, NORM_SUMS = (
    Call(
        "layer_norm_triton.backward",
        reads=dict(grad="N C", x="N C", weight="C", mean="N:float32", rstd="N:float32", skip="N C", sums=sums),
        writes=dict(dx="N C"),
    )
    for sums in (False, True)
)
spec.ENTRIES |= {
    "layer_norm_forward": Entry("layer_norm_triton", "forward", "layer_norm forward", WARPS, (NORM,)),
    "layer_norm_backward": Entry("layer_norm_triton", "backward", "layer_norm backward", WARPS, (NORM_BACKWARD,)),
    "layer_norm_backward_sums": Entry("layer_norm_triton", "backward_sums", "layer_norm backward", WARPS, (NORM_SUMS,)),
}


# ---- GELU ----


def compare_gelu(device: torch.device, dtype: torch.dtype, N: int, F: int) -> Comparison:
    def inputs(seed: int) -> Inputs:
        normal = comparison.random(seed, device)
        return normal(N, F, dtype=dtype, grad=True), normal(N, F, dtype=dtype)

    functions = partial(gelu, impl="triton"), gelu_ref, partial(torch.nn.functional.gelu, approximate="tanh")
    return comparison.compare_functions(
        "gelu", inputs, "x", functions, device=device, **bound_by_memory(5 * N * F, dtype)
    )


# Candidates: rows, columns, warps.
TILES = spec.on_both((4, 1024, 4), (1, 1024, 4), (2, 1024, 4), (1, 2048, 4), (4, 1024, 8))
GELU = Call("gelu_triton.forward", reads=dict(x="N F"), writes=dict(y="N F"))
GELU_BACKWARD = Call("gelu_triton.backward", reads=dict(grad="N F", x="N F"), writes=dict(dx="N F"))
spec.ENTRIES |= {
    "gelu_forward": Entry("gelu_triton", "forward", "gelu forward", TILES, (GELU,)),
    "gelu_backward": Entry("gelu_triton", "backward", "gelu backward", TILES, (GELU_BACKWARD,)),
}


# ---- rotary embedding ----


def compare_rotary(device: torch.device, dtype: torch.dtype, B: int, T: int, H: int, D: int, R: int) -> Comparison:
    """Queries or keys (B, T, H, D)."""
    cos, sin = rotary_angles(torch.arange(T, device=device)[None], R, 10000.0)

    def inputs(seed: int) -> Inputs:
        normal = comparison.random(seed, device)
        return normal(B, T, H, D, dtype=dtype, grad=True), normal(B, T, H, D, dtype=dtype)

    def plain(x: Tensor) -> Tensor:
        first, second, rest = x.split([R // 2, R // 2, D - R], dim=-1)
        rotated = first * cos - second * sin, second * cos + first * sin
        return torch.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1)

    functions = (lambda x: rotary(x, cos, sin, impl="triton"), plain, plain)
    common = bound_by_memory(4 * B * T * H * D, dtype)
    return comparison.compare_functions("rotary", inputs, "x", functions, device=device, **common)


# Candidates: heads, warps.
MANY_HEADS = spec.on_both((32, 1), (16, 1), (64, 1), (32, 2), (64, 2))
FEW_HEADS = spec.on_both((16, 1), (8, 1), (32, 1), (16, 2), (32, 2))
ANGLES = dict(cos="S 16:float32", sin="S 16:float32")
APPLY = Call("rotary_triton.apply_rotary", reads=dict(x="N 2H D", **ANGLES, inverse=False), over=("x",))
TOKEN = dict(q="1 H D", k="1 H D", v="1 H D", slots="1:int32%S", keys="1 H S D", values="1 H S D")
STORE = Call("rotary_triton.apply_rotary_and_store", reads=TOKEN | ANGLES, over=("q", "keys", "values"))
spec.ENTRIES |= {
    "apply_rotary": Entry("rotary_triton", "apply_rotary", "rotary apply_rotary", MANY_HEADS, (APPLY,)),
    "apply_rotary_and_store": Entry(
        "rotary_triton", "apply_rotary_and_store", "rotary apply_rotary_and_store", FEW_HEADS, (STORE,), in_graph=True
    ),
}
