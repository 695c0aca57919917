"""The head: log-probabilities of tokens without their logits.

Dims: N tokens, C hidden, V vocabulary, n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import comparison, spec
from benchmarks.harness.comparison import Comparison, Implementation, Inputs, Outputs, Work, of_function
from benchmarks.harness.gpu import gpu_case
from benchmarks.harness.spec import Call, Entry
from phi2_kernels.linear_logprob import linear_logprob, linear_logprob_ref

ARGUMENTS = "hidden weight bias targets"


@gpu_case(
    "head",
    turns=20,
    summary="log-probabilities of 16384 tokens and their gradients, head frozen and trainable",
    tiny=dict(N=12, C=32, V=77),
)
def head(device: torch.device, N: int = 16384, C: int = 2560, V: int = 51200) -> list[Comparison]:
    """At most 1.1 x the time of its matmuls, and with a frozen head 0.6 GB beside the inputs."""
    return [compare_head(device, torch.bfloat16, N, C, V, trainable) for trainable in (False, True)]


def compare_head(device: torch.device, dtype: torch.dtype, N: int, C: int, V: int, trainable: bool) -> Comparison:
    """hidden, weight, bias, targets -> log-probabilities; a trainable head makes its logits twice."""

    def draw(normal: Callable[..., Tensor]) -> Inputs:
        weights = (normal(*shape, scale=C**-0.5, grad=trainable) for shape in ((V, C), (V,)))
        targets = torch.arange(N, device=device) % V
        return normal(N, C, grad=True), *weights, targets, normal(N, dtype=torch.float32)

    def eager(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")

    own = 4 if trainable else 2
    kept = {"the 3 matmuls of kept logits": partial(matmuls, 3)} if trainable else {}
    return comparison.compare_functions(
        f"head {'trainable' if trainable else 'frozen'}",
        comparison.drawn(device, dtype, draw),
        lambda *x: linear_logprob(*x, impl="triton")[0],
        lambda *x: linear_logprob_ref(*x)[0],
        {
            **comparison.eager_and_compiled(eager, ARGUMENTS, device),
            f"its {own} matmuls": partial(matmuls, own),
            **kept,
            "Liger": lambda: of_function(_liger(), ARGUMENTS),
            "F.linear_cross_entropy": lambda: of_function(_linear_cross_entropy(), ARGUMENTS),
        },
        head_work(N, C, V, trainable),
        dtype,
        names=ARGUMENTS,
        targets={f"its {own} matmuls": 1 / 1.1},
        peak_limit=None if trainable else 0.6,
    )


def head_work(N: int, C: int, V: int, trainable: bool) -> Work:
    """Logits, and one matmul for each gradient; hidden and its gradient, the weight and, if it is wanted, its own."""
    matmuls, weights = (3, 2) if trainable else (2, 1)
    return Work(matmuls * 2 * N * C * V, 2 * (2 * N * C + weights * V * C))


def matmuls(count: int) -> Implementation:
    """The first so many of: logits, gradient of hidden, gradient of the weight, logits again."""

    def run(hidden: Tensor, weight: Tensor, *_) -> Outputs:
        with torch.no_grad():
            logits = hidden @ weight.T  # they stand for their gradient too
            rest = (lambda: logits @ weight, lambda: logits.T @ hidden, lambda: hidden @ weight.T)
            return {str(i): matmul() for i, matmul in enumerate(rest[: count - 1])}

    return Implementation(run, is_compared=False)


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


# The kernels read logits (n, V) and write their gradient over them. Candidates: columns at a time, warps.
ROWS = dict(logits="CHUNK V:float32", bias="V", targets="CHUNK:int64%V", lse="CHUNK:float32", grad_dtype=torch.bfloat16)
STATS = Call(
    "linear_logprob_triton.stats",
    ROWS | dict(logp="CHUNK:float32", entropies=None),
    also=dict(entropies="CHUNK:float32"),
)
GRADIENT = Call("linear_logprob_triton.gradient", ROWS | dict(scale="CHUNK:float32"))
STATS_ROWS = spec.on_both((8192, 32), (4096, 32), (4096, 16), (8192, 16), (2048, 8))
GRADIENT_ROWS = spec.on_both((4096, 8), (2048, 4), (2048, 8), (4096, 16), (8192, 16))
FILE = "linear_logprob_triton"
spec.ENTRIES |= {
    "linear_logprob_stats": Entry(FILE, "stats", "linear_logprob stats", STATS_ROWS, (STATS,)),
    "linear_logprob_gradient": Entry(FILE, "gradient", "linear_logprob gradient", GRADIENT_ROWS, (GRADIENT,)),
}


def unordered() -> None:
    """Without a barrier between reading logits and writing over them."""
    from phi2_kernels import linear_logprob_triton

    flags = linear_logprob_triton._flags
    with mock.patch.object(linear_logprob_triton, "_flags", lambda *call: flags(*call) | {"BARRIER": False}):
        STATS.compile(spec.PHI2)
        GRADIENT.compile(spec.PHI2)


spec.FORMS[spec.UNORDERED] = unordered
