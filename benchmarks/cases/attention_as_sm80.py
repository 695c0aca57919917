"""Our attention as an A100 has it, on the GPU that is here, beside torch's FlashAttention-2, which is such code too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.cases import attention
from benchmarks.harness import spec
from benchmarks.harness.as_sm80 import as_sm80
from benchmarks.harness.comparison import Comparison, Implementation, Outputs
from benchmarks.harness.gpu import gpu_case
from benchmarks.harness.spec import PHI2

FLASH = "SDPA flash"


@gpu_case(
    "attention_as_sm80",
    turns=50,
    summary="attention compiled for an A100, on the GPU that is here, beside FlashAttention-2",
    tiny=dict(H=2, shapes=((2, 21), (1, 33))),
)
def attention_as_sm80(
    device: torch.device, H: int = 32, shapes: Sequence[tuple[int, int]] = attention.SHAPES
) -> list[Comparison]:
    """Forward, and with gradients."""
    return [
        _as_sm80(attention.compare_attention(device, torch.bfloat16, B, H, S, 80, backward))
        for backward in (False, True)
        for B, S in shapes
    ]


def _as_sm80(shipped: Comparison) -> Comparison:
    """With what this GPU gets by itself as one of the peers."""

    def run(*inputs) -> Outputs:
        with as_sm80():
            return shipped.ours.run(*inputs)

    return replace(
        shipped,
        ours=Implementation(run),
        peers={FLASH: shipped.peers[FLASH], "ours for this GPU": lambda: shipped.ours},
        targets={FLASH: 1.2},
    )


def compile_as_sm80() -> None:
    with as_sm80():
        attention.FORWARD.compile(PHI2)
        attention.BACKWARD.compile(PHI2)


spec.FORMS[spec.AS_SM80] = compile_as_sm80
