"""Packed preference pairs with and without a shared prompt: [prompt | chosen | rejected] or two whole sequences.

Lengths follow a fixed distribution like UltraFeedback's. Both layouts hold the same pairs in one row, and the library's
own packing makes them. Of 16 pairs sharing makes 12,715 tokens out of 16,099, and 4.30 M scores a head out of 4.85 M:
it can save 1.27 x in all matmuls at most, and 1.13 x in attention.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import attention, block
from benchmarks.harness.comparison import Comparison, Implementation, Inputs, Outputs, of_function
from benchmarks.harness.gpu import gpu_case
from benchmarks.harness.models import PHI2, TINY
from phi2.config import Phi2Config
from phi2.data.encode import EncodedPreference, EncodedSequence
from phi2.data.records import PAIR
from phi2.training.packing import row_of_answers, row_of_sequences
from phi2_kernels.attention import attention as attend
from phi2_kernels.visibility import Visibility

PROMPT, ANSWER = (150, 0.8), (250, 0.6)  # median, and deviation of the logarithm, in tokens
MAX_LENGTH = 1024  # tokens of a prompt with either answer


class Pair(NamedTuple):
    """Tokens of a pair's three parts."""

    prompt: int
    chosen: int
    rejected: int


@gpu_case(
    "prefix_sharing",
    turns=20,
    summary="packed pairs, 16384 tokens unshared, with shared prompts against without",
    tiny=dict(dtype=torch.float32, pairs=[Pair(5, 3, 4), Pair(2, 4, 1)], config=TINY),
)
def prefix_sharing(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    pairs: list[Pair] | None = None,
    config: Phi2Config = PHI2,
) -> list[Comparison]:
    """Of pairs of random lengths, unless they are given."""
    layout = Layout(pairs or sample_pairs(16384), device)
    return [
        compare_attention(layout, dtype, config.num_attention_heads, config.head_dim),
        *(compare_block(layout, dtype, config, rank) for rank in (16, 0)),
    ]


def sample_pairs(tokens: int, seed: int = 0) -> list[Pair]:
    """Pairs whose unshared sequences fill at most so many tokens; the next one would not fit."""
    generator = np.random.default_rng(seed)

    def length(median: float, deviation: float, most: int) -> int:
        return int(np.clip(median * np.exp(deviation * generator.standard_normal()), 1, most))

    pairs: list[Pair] = []
    while True:
        prompt = length(*PROMPT, MAX_LENGTH // 2)
        pair = Pair(prompt, *(length(*ANSWER, MAX_LENGTH - prompt) for _ in range(2)))
        tokens -= prompt + sum(pair)
        if tokens < 0:
            return pairs
        pairs.append(pair)


class Layout:
    """The same pairs in both layouts.

    Attributes:
        shared, unshared: rows whose token ids are places in the shared row.
        index: (unshared tokens,) the shared token that each one is a copy of.
        first: (shared tokens,) where the first copy of each stands.
        is_first: (unshared tokens,) bool.
    """

    def __init__(self, pairs: list[Pair], device: torch.device) -> None:
        parts = [np.arange(a, b) for a, b in pairwise(np.cumsum([0, *chain(*pairs)]))]
        encoded = [
            EncodedPreference(parts[i], (parts[i + 1], parts[i + 2]), PAIR, origin=None, columns={})
            for i in range(0, len(parts), 3)
        ]
        sequences = [np.concatenate((p.prompt, answer)) for p in encoded for answer in (p.chosen, p.rejected)]
        whole = [EncodedSequence(ids, np.ones(len(ids), dtype=bool), origin=None) for ids in sequences]
        self.shared, self.unshared = row_of_answers(encoded).to(device), row_of_sequences(whole).to(device)
        first = np.unique(np.concatenate(sequences), return_index=True)[1]
        self.index, self.first = self.unshared.input_ids[0], torch.from_numpy(first).to(device)
        self.is_first = torch.zeros(len(self.index), dtype=torch.bool, device=device)
        self.is_first[self.first] = True

    def beside(self, shared: Comparison, unshared: Implementation, dim: int) -> Comparison:
        """What is compared on the shared row, with the same on the unshared row as its peer; tokens are in `dim`."""
        name = "without sharing"
        return replace(shared, peers={name: lambda: self.of_copies(unshared, dim)}, targets={name: 1.4})

    def of_copies(self, unshared: Implementation, dim: int) -> Implementation:
        """What computes the unshared row, given inputs of the shared row and giving outputs of it."""
        return replace(
            unshared,
            prepare=partial(self.spread_out, dim),
            finish=lambda outputs: unshared.finish(self.folded(dim, outputs)),
        )

    def spread_out(self, dim: int, *inputs: Tensor) -> Inputs:
        """Inputs of the unshared row. The last one is the gradient of the output: only a token's first copy gets it."""
        *leaves, grad = (x.detach().index_select(dim, self.index) for x in inputs)
        grad.mul_(self.is_first.view([-1 if d == dim else 1 for d in range(grad.ndim)]))
        return *(x.requires_grad_() for x in leaves), grad

    def folded(self, dim: int, outputs: Outputs) -> Outputs:
        """Outputs of the unshared row as those of the shared one: gradients of a token's copies are added up."""
        folded = {**outputs, "output": outputs["output"].index_select(dim, self.first)}
        for name in (name for name in outputs if name.startswith("grad of ")):
            folded[name] = torch.zeros_like(folded["output"], dtype=torch.float32)
            folded[name].index_add_(dim, self.index, outputs[name].float())
        return folded


def compare_attention(layout: Layout, dtype: torch.dtype, H: int, D: int) -> Comparison:
    """q, k, v are (1, H, T, D)."""
    device, S, T = layout.index.device, len(layout.index), len(layout.first)
    shared = attention.compare_attention(device, dtype, 1, H, T, D, True, layout.shared.visible_until)
    visibility = Visibility(S, S, layout.unshared.visible_until, device)
    unshared = of_function(partial(attend, visibility=visibility, impl="triton"), "q k v")
    return layout.beside(replace(shared, name="attention"), unshared, dim=2)


def compare_block(layout: Layout, dtype: torch.dtype, config: Phi2Config, rank: int) -> Comparison:
    """A fused layer; see `block.compare_block` for the rank."""
    shared, unshared = ((row.positions, row.visible_until) for row in (layout.shared, layout.unshared))
    layer = block.new_layer(layout.index.device, dtype, config, rank)
    peer = block.our_layer(layer, config, *unshared, fused=True)
    return layout.beside(block.compare_block(dtype, config, rank, 1, *shared), peer, dim=1)
