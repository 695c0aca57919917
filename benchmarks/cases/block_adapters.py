"""The launches of LoRA's three products in a fused block, for the tuner and the ahead-of-time gate.

As of q, k, v and fc1, which read one x and write one h; `block.py` times them within their layer.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from benchmarks.harness import spec
from benchmarks.harness.spec import Call, Entry
from phi2_kernels.block_adapters import Side

EDGES = ("#0", "#C", "#2C", "#3C", "#7C")  # of the columns of h
A_IN = Side(("16 C:float32",) * 4, (("#0", "#C"),) * 4, False, (16,) * 4)
B_IN = Side((*("C 16:float32",) * 3, "4C 16:float32"), tuple(pairwise(EDGES)), True, (16,) * 4)
SEED, DROPPED = torch.tensor(2**61), A_IN._replace(rates=(0.1,) * 4, masks=(2, 3, 4, 5))
# Candidates: rows, columns, warps, stages.
SKINNY = spec.on_both((32, 128, 4, 3), (32, 64, 4, 4), (16, 128, 4, 4), (64, 64, 4, 3), (64, 128, 4, 3))
DROPPED_WALKS = spec.on_both((32, 64, 8, 1), (32, 32, 4, 1), (16, 64, 4, 1), (16, 128, 8, 1))
WALKS = spec.on_both((64, 128, 4, 1), (32, 256, 4, 1), (64, 64, 4, 1), (128, 64, 4, 1), (64, 256, 8, 1))


IN, WIDE, STREAM = "N 64:float32", "N 7C", "N C"
INNER = [
    Call("block_adapters_triton.inner", dict(x=x, u=IN, side=side, scales=(2.0,) * 4, seed=SEED))
    for x, side in ((STREAM, A_IN), (WIDE, B_IN), (STREAM, DROPPED))
]
ADD = [
    Call("block_adapters_triton.add", dict(y=y, u=IN, side=side, seed=None))
    for y, side in ((WIDE, B_IN), (STREAM, A_IN))
]
GRADIENTS = Call(
    "block_adapters_triton.gradients",
    dict(x=STREAM, du=IN, input=A_IN, dy=WIDE, u=IN, output=B_IN, seed=SEED),
    also=dict(input=DROPPED),
)
ADD_DROPPED = Call("block_adapters_triton.add", dict(y=STREAM, u=IN, side=DROPPED, seed=SEED))
spec.ENTRIES |= {
    "lora_inner": Entry("block_adapters_triton", "inner", "block_adapters inner", SKINNY, tuple(INNER)),
    "lora_add": Entry("block_adapters_triton", "add", "block_adapters add", WALKS, tuple(ADD)),
    "lora_add_dropped": Entry(
        "block_adapters_triton", "add dropped", "block_adapters add", DROPPED_WALKS, (ADD_DROPPED,)
    ),
    "lora_gradients": Entry("block_adapters_triton", "gradients", "block_adapters gradients", SKINNY, (GRADIENTS,)),
}


def useful(BLOCK_N: int, BLOCK_K: int, BLOCK_R: int, **_) -> int:
    """The multiply-adds of a tile by both halves of a factor."""
    return 2 * BLOCK_N * BLOCK_K * BLOCK_R


spec.USEFUL |= {"block_adapters inner": useful, "block_adapters gradients": useful}
