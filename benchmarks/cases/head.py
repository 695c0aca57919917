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
from phi2_kernels import linear_logprob as op
from phi2_kernels.linear_logprob import linear_logprob, linear_logprob_ref

ARGUMENTS = "hidden weight bias targets"
# Rows of other chunks. The product of a chunk's gradient and the weight has 10 tiles of 128 x 256 for 128 rows, which a
# GPU's multiprocessors take in rounds: 100 of 108 and 210 of 216 on an A100; 120 and 130 of 132, and 260 of 264 on an
# H100. The 160 of the shipped 2048 rows leave a second round of either mostly idle.
CHUNKS = (1280, 1536, 1664, 2688, 3328)


@gpu_case(
    "head",
    turns=20,
    summary="log-probabilities of 16384 tokens and their gradients, head frozen and trainable",
    tiny=dict(N=12, C=32, V=77),
)
def head(device: torch.device, N: int = 16384, C: int = 2560, V: int = 51200) -> list[Comparison]:
    """At most 1.1 x the time of its matmuls and 0.6 GB beside the inputs; with a trainable head 1.15 x."""
    return [compare_head(device, torch.bfloat16, N, C, V, trainable) for trainable in (False, True)]


def compare_head(device: torch.device, dtype: torch.dtype, N: int, C: int, V: int, trainable: bool) -> Comparison:
    """hidden, weight, bias, targets -> log-probabilities."""

    def draw(normal: Callable[..., Tensor]) -> Inputs:
        weights = (normal(*shape, scale=C**-0.5, grad=trainable) for shape in ((V, C), (V,)))
        targets = torch.arange(N, device=device) % V
        return normal(N, C, grad=True), *weights, targets, normal(N, dtype=torch.float32)

    def eager(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")

    def ours(*x: Tensor) -> Tensor:
        return linear_logprob(*x, impl="triton")[0]

    own = 3 if trainable else 2
    others = () if trainable else CHUNKS
    return comparison.compare_functions(
        f"head {'trainable' if trainable else 'frozen'}",
        comparison.drawn(device, dtype, draw),
        ours,
        lambda *x: linear_logprob_ref(*x)[0],
        {
            **comparison.eager_and_compiled(eager, ARGUMENTS, device),
            f"its {own} matmuls": partial(matmuls, own),
            **{f"{rows} rows a chunk": partial(in_chunks, rows, V, of_function(ours, ARGUMENTS)) for rows in others},
            "Liger": lambda: of_function(_liger(), ARGUMENTS),
            "F.linear_cross_entropy": lambda: of_function(_linear_cross_entropy(), ARGUMENTS),
        },
        head_work(N, C, V, trainable),
        dtype,
        names=ARGUMENTS,
        targets={f"its {own} matmuls": 1 / (1.15 if trainable else 1.1)},
        peak_limit=None if trainable else 0.6,
    )


def head_work(N: int, C: int, V: int, trainable: bool) -> Work:
    """Logits, and one matmul for each gradient; hidden and its gradient, the weight and, if it is wanted, its own."""
    matmuls, weights = (3, 2) if trainable else (2, 1)
    return Work(matmuls * 2 * N * C * V, 2 * (2 * N * C + weights * V * C))


def matmuls(count: int) -> Implementation:
    """The first so many of: logits, gradient of hidden, gradient of the weight."""

    def run(hidden: Tensor, weight: Tensor, *_) -> Outputs:
        with torch.no_grad():
            logits = hidden @ weight.T  # they stand for their gradient too
            rest = (lambda: logits @ weight, lambda: logits.T @ hidden)
            return {str(i): matmul() for i, matmul in enumerate(rest[: count - 1])}

    return Implementation(run, is_compared=False)


def in_chunks(rows: int, V: int, ours: Implementation) -> Implementation:
    """Ours with chunks of so many rows."""

    def run(*inputs: Tensor) -> Outputs:
        with mock.patch.object(op, "GPU_CHUNK_BYTES", 4 * rows * V):
            return ours.run(*inputs)

    return Implementation(run)


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


# The kernel reads logits (n, V) and writes their gradient. Candidates: columns at a time, warps.
STATS = Call(
    "linear_logprob_triton.stats",
    dict(
        logits="CHUNK V:float32", bias="V", targets="CHUNK:int64%V", logp="CHUNK:float32", entropies=None,
        grad="CHUNK V",
    ),
    also=dict(entropies="CHUNK:float32"),
)  # fmt: skip
STATS_ROWS = spec.on_both((8192, 32), (4096, 32), (4096, 16), (8192, 16), (2048, 8))
spec.ENTRIES |= {
    "linear_logprob_stats": Entry("linear_logprob_triton", "stats", "linear_logprob stats", STATS_ROWS, (STATS,))
}


def unordered() -> None:
    """Without a barrier between reading logits and writing over them."""
    from phi2_kernels import linear_logprob_triton

    flags = linear_logprob_triton._flags
    with mock.patch.object(linear_logprob_triton, "_flags", lambda *call: flags(*call) | {"BARRIER": False}):
        STATS.compile(spec.PHI2)


spec.FORMS[spec.UNORDERED] = unordered
