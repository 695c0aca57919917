"""Attention over packed rows, each pair's two sequences apart or with their prompt shared, beside torch's own ways.

FlexAttention takes any mask; torch's `varlen_attn` takes sequences one behind the other, so without sharing only.

Dims: H heads, T tokens, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from benchmarks.cases.attention import compare_attention, flex
from benchmarks.cases.prefix import Layout, Pair, sample_pairs
from benchmarks.harness.comparison import Comparison, Implementation, of_function
from benchmarks.harness.gpu import gpu_case

TARGETS = {"FlexAttention": 1.3, "varlen_attn": 1.3}


@gpu_case(
    "attention_packed",
    turns=30,
    summary="attention over 16384 packed tokens with its gradients, sequences apart and prompts shared",
    tiny=dict(dtype=torch.float32, H=2, pairs=[Pair(5, 3, 4), Pair(2, 4, 1)]),
)
def attention_packed(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, H: int = 32, pairs: list[Pair] | None = None
) -> list[Comparison]:
    """Of pairs of random lengths, unless they are given."""
    pairs = pairs or sample_pairs(16384)
    layout = Layout(pairs, device)
    lengths = [pair.prompt + answer for pair in pairs for answer in pair[1:]]
    compare = partial(_compare, device=device, dtype=dtype, H=H, D=80)
    return [
        compare("packed", layout.unshared.visible_until, lambda: varlen(lengths, device)),
        compare(
            "shared prompts", layout.shared.visible_until, lambda: layout.of_copies(varlen(lengths, device), dim=2)
        ),
    ]


def _compare(
    name: str,
    until: Tensor,
    varlen_attn: Callable[[], Implementation],
    device: torch.device,
    dtype: torch.dtype,
    H: int,
    D: int,
) -> Comparison:
    causal = compare_attention(device, dtype, 1, H, until.shape[1], D, True, until)
    peers = {"FlexAttention": lambda: flex(until.shape[1], device, until), "varlen_attn": varlen_attn}
    return replace(causal, name=f"{name} {str(dtype)[6:]} T{until.shape[1]}", peers=peers, targets=TARGETS)


def varlen(lengths: list[int], device: torch.device) -> Implementation:
    """Sequences one behind the other; q, k, v are (1, H, T, D)."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    longest = max(lengths)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, H, D)
        out = varlen_attn(*tokens, ends, ends, longest, longest, window_size=(-1, 0))  # causal
        return out.transpose(0, 1)[None]

    return of_function(forward, "q k v")
