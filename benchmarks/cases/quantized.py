"""Products of many rows with int8 and int4 weights, and their gradients, as prompts and adapters need them.

Dims: M rows, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.decode import GROUP, WEIGHT_FORMS, gemv_work
from benchmarks.harness import spec
from benchmarks.harness.comparison import Comparison, Inputs, compare_functions, drawn, of_function
from benchmarks.harness.gpu import gpu_case
from benchmarks.harness.spec import Call, Entry
from phi2_kernels.quantized_matmul import quantized_matmul, quantized_matmul_backward
from phi2_kernels.weight_forms import Weight

FORMS = ("int8", "int4")


@gpu_case(
    "quantized_matmul",
    turns=30,
    summary="64 to 2560 rows by int8 and int4 weights, and their gradients",
    tiny=dict(rows=(20,), N=48, K=64),
)
def quantized_matmuls(
    device: torch.device, rows: tuple[int, ...] = (64, 256, 2560), N: int = 10240, K: int = 2560
) -> list[Comparison]:
    dtype = torch.bfloat16
    return [
        *(compare_forward(device, dtype, form, M, N, K) for form in FORMS for M in rows),
        *(compare_backward(device, dtype, form, M, N, K) for form in FORMS for M in rows[-2:]),
    ]


def compare_forward(device: torch.device, dtype: torch.dtype, form: str, M: int, N: int, K: int) -> Comparison:
    """The peer multiplies the half-precision weight that a small one stands for."""
    return compare_functions(
        f"{form} {M} rows {N}x{K}",
        _drawn(device, dtype, form, M, N, K, columns=K),
        lambda x, *parts: quantized_matmul(x, Weight(*parts), impl="triton"),
        lambda x, *parts: x.float() @ Weight(*parts).dense().float().T,
        {"F.linear": lambda: of_function(F.linear, prepare=lambda x, *w: (x, Weight(*w).dense().to(dtype)))},
        gemv_work(form, M, N, K),
        dtype,
    )


def compare_backward(device: torch.device, dtype: torch.dtype, form: str, M: int, N: int, K: int) -> Comparison:
    return compare_functions(
        f"{form} {M} rows {N}x{K}, gradient",
        _drawn(device, dtype, form, M, N, K, columns=N),
        lambda dy, *parts: quantized_matmul_backward(dy, Weight(*parts), impl="triton"),
        lambda dy, *parts: dy.float() @ Weight(*parts).dense().float(),
        {"matmul": lambda: of_function(torch.matmul, prepare=lambda dy, *w: (dy, Weight(*w).dense().to(dtype)))},
        gemv_work(form, M, N, K),
        dtype,
    )


def _drawn(
    device: torch.device, dtype: torch.dtype, form: str, M: int, N: int, K: int, columns: int
) -> Callable[[int], Inputs]:
    def draw(normal: Callable[..., Tensor]) -> Inputs:
        weight = WEIGHT_FORMS[form](normal(N, K, scale=columns**-0.5))
        return normal(M, columns), *(part for part in weight if part is not None)

    return drawn(device, dtype, draw)


def useful(BLOCK_M: int, BLOCK_N: int, BLOCK_K: int, **_) -> int:
    """Of one round of a product's loop."""
    return BLOCK_M * BLOCK_N * BLOCK_K


INT8 = dict(codes="F C:int8%16", scales="F", zeros=None)
INT4 = dict(codes="F C/2:uint8%256", scales=f"F C/{GROUP}", zeros=f"F C/{GROUP}")


def entry(function: str, arguments: dict[str, str | None], *candidates: tuple) -> Entry:
    """With weights of both forms. Candidates: rows, outputs, columns, warps, stages."""
    call = Call(f"quantized_matmul_triton.{function}", arguments, also=INT4)
    kernel = f"quantized_matmul {function}"
    return Entry("quantized_matmul_triton", function, kernel, spec.on_both(*candidates), (call,))


ENTRIES = [
    entry(
        "forward", dict(x="256 C", **INT8, bias="F", y="256 F"),
        (64, 64, 128, 4, 3), (64, 64, 64, 4, 4), (64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (32, 32, 128, 4, 4),
    ),
    entry(
        "backward", dict(dy="256 F", **INT8, dx="256 C"),
        (64, 64, 128, 4, 3), (64, 64, 64, 4, 4), (128, 64, 128, 8, 3), (64, 32, 128, 4, 3),
    ),
    entry(
        "dense", dict(**INT8, weight="F C"),
        (1, 16, 256, 4, 1), (1, 32, 256, 8, 1), (1, 8, 512, 4, 1), (1, 8, 256, 4, 1),
    ),
]  # fmt: skip
spec.ENTRIES |= {f"quantized_{entry.key}": entry for entry in ENTRIES}
spec.USEFUL |= {"quantized_matmul forward": useful, "quantized_matmul backward": useful}
