"""The elementwise ops: LayerNorm, GELU and rotary embedding; their work is what both passes read and write.

Dims: N rows, C hidden, F mlp, B batch, T tokens, S positions or keys, H heads, D head dim, R rotary dims.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import spec
from benchmarks.harness.comparison import Comparison, Inputs, Work, compare_functions, drawn, eager_and_compiled
from benchmarks.harness.gpu import gpu_case
from benchmarks.harness.spec import Call, Entry
from phi2_kernels.gelu import gelu, gelu_ref
from phi2_kernels.layer_norm import layer_norm, layer_norm_ref
from phi2_kernels.rotary import rotary, rotary_angles

EPS = 1e-5


@gpu_case(
    "elementwise",
    turns=50,
    summary="layer_norm, gelu and rotary with their gradients, over 8192 tokens",
    tiny=dict(B=1, T=9, H=2, C=48, F=96),
)
def elementwise(
    device: torch.device, B: int = 4, T: int = 2048, H: int = 32, C: int = 2560, F: int = 10240
) -> list[Comparison]:
    dtype, N = torch.bfloat16, B * T
    return [
        compare_layer_norm(device, dtype, N, C, trainable=False),
        compare_layer_norm(device, dtype, N, C, trainable=True),
        compare_gelu(device, dtype, N, F),
        compare_rotary(device, dtype, B, T, H, D=80, R=32),
    ]


# ---- LayerNorm ----


def compare_layer_norm(device: torch.device, dtype: torch.dtype, N: int, C: int, trainable: bool) -> Comparison:
    def draw(normal: Callable[..., Tensor]) -> Inputs:
        weight, bias = (normal(C, grad=trainable) for _ in range(2))
        return normal(N, C, grad=True), weight, bias, normal(N, C)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (C,), weight, bias, EPS)

    return compare_functions(
        f"layer_norm {'trainable' if trainable else 'frozen'}",
        drawn(device, dtype, draw),
        lambda x, weight, bias: layer_norm(x, weight, bias, EPS, impl="triton"),
        lambda x, weight, bias: layer_norm_ref(x, weight, bias, EPS),
        eager_and_compiled(plain, "x weight bias", device),
        Work(0, 5 * N * C * dtype.itemsize),
        dtype,
        names="x weight bias",
    )


# Candidates: warps; a row is 2560 columns.
WARPS = spec.on_both((1,), (2,), (4,), (8,))
NORM = Call(
    "layer_norm_triton.forward",
    dict(x="N C", weight="C", bias="C", eps=EPS, y="N C", mean="N:float32", rstd="N:float32"),
)
NORM_BACKWARD, NORM_SUMS = (
    Call(
        "layer_norm_triton.backward",
        dict(grad="N C", x="N C", weight="C", mean="N:float32", rstd="N:float32", skip="N C", dx="N C", sums=sums),
        also=dict(again=("C", "N C")),
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
    return compare_functions(
        "gelu",
        drawn(device, dtype, lambda normal: (normal(N, F, grad=True), normal(N, F))),
        partial(gelu, impl="triton"),
        gelu_ref,
        eager_and_compiled(partial(torch.nn.functional.gelu, approximate="tanh"), "x", device),
        Work(0, 5 * N * F * dtype.itemsize),
        dtype,
        names="x",
    )


# Candidates: rows, columns, warps.
TILES = spec.on_both((4, 1024, 4), (1, 1024, 4), (2, 1024, 4), (1, 2048, 4), (4, 1024, 8))
GELU = Call("gelu_triton.forward", dict(x="N F", y="N F"))
GELU_BACKWARD = Call("gelu_triton.backward", dict(grad="N F", x="N F", dx="N F"), also=dict(again=True))
spec.ENTRIES |= {
    "gelu_forward": Entry("gelu_triton", "forward", "gelu forward", TILES, (GELU,)),
    "gelu_backward": Entry("gelu_triton", "backward", "gelu backward", TILES, (GELU_BACKWARD,)),
}


# ---- rotary embedding ----


def compare_rotary(device: torch.device, dtype: torch.dtype, B: int, T: int, H: int, D: int, R: int) -> Comparison:
    """Queries or keys (B, T, H, D)."""
    cos, sin = rotary_angles(torch.arange(T, device=device)[None], R, 10000.0)

    def plain(x: Tensor) -> Tensor:
        first, second, rest = x.split([R // 2, R // 2, D - R], dim=-1)
        rotated = first * cos - second * sin, second * cos + first * sin
        return torch.cat([*(part.to(x.dtype) for part in rotated), rest], dim=-1)

    return compare_functions(
        "rotary",
        drawn(device, dtype, lambda normal: (normal(B, T, H, D, grad=True), normal(B, T, H, D))),
        lambda x: rotary(x, cos, sin, impl="triton"),
        plain,
        eager_and_compiled(plain, "x", device),
        Work(0, 4 * B * T * H * D * dtype.itemsize),
        dtype,
        names="x",
    )


# Candidates: heads, warps.
MANY_HEADS = spec.on_both((32, 1), (16, 1), (64, 1), (32, 2), (64, 2))
FEW_HEADS = spec.on_both((16, 1), (8, 1), (32, 1), (16, 2), (32, 2))
ANGLES = dict(cos="S 16:float32", sin="S 16:float32")
APPLY = Call("rotary_triton.apply_rotary", dict(x="N 2H D", **ANGLES, inverse=False))
TOKEN = dict(q="1 H D", k="1 H D", v="1 H D", slots="1:int32%S", keys="1 H S D", values="1 H S D")
STORE = Call("rotary_triton.apply_rotary_and_store", TOKEN | ANGLES)
spec.ENTRIES |= {
    "apply_rotary": Entry("rotary_triton", "apply_rotary", "rotary apply_rotary", MANY_HEADS, (APPLY,)),
    "apply_rotary_and_store": Entry(
        "rotary_triton", "apply_rotary_and_store", "rotary apply_rotary_and_store", FEW_HEADS, (STORE,), in_graph=True
    ),
}
