"""Packed preference pairs with and without a shared prompt: [prompt | chosen | rejected] or two whole sequences.

Lengths follow a fixed distribution like UltraFeedback's. Both layouts hold the same pairs in one row, and the library's
own packing makes them. The report says what sharing can save at most.

Dims: T tokens of the shared row, P prompt, C chosen, R rejected, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import attention, block
from benchmarks.harness import gpu
from benchmarks.harness.comparison import ROUNDING, Comparison, Implementation, Inputs, Outputs, of_function
from benchmarks.registry import Report, case
from phi2.config import Phi2Config
from phi2.data.encode import EncodedPair, EncodedSequence
from phi2.training.packing import TokenRow, row_of_pairs, row_of_sequences
from phi2_kernels.attention import attention as attend
from phi2_kernels.visibility import Visibility

PROMPT, ANSWER = (150, 0.8), (250, 0.6)  # median, and deviation of the logarithm, in tokens
MAX_LENGTH = 1024  # tokens of a prompt with either answer
TARGET = 1.4


class Pair(NamedTuple):
    """Tokens of a pair's three parts."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def unshared(self) -> int:
        """Tokens of both sequences."""
        return 2 * self.prompt + self.chosen + self.rejected


@case("prefix_sharing", turns=20, summary="packed pairs, 16384 tokens unshared, with shared prompts against without")
def prefix_sharing(turns: int) -> Report:
    device, pairs = gpu.device(), sample_pairs(16384)
    layout = Layout(pairs, device)
    comparisons = [
        compare_attention(layout, torch.bfloat16, H=32, D=80),
        *(compare_block(layout, torch.bfloat16, Phi2Config(), rank) for rank in (16, 0)),
    ]
    return gpu.report(comparisons, turns, saving(pairs))


def sample_pairs(tokens: int, seed: int = 0) -> list[Pair]:
    """Pairs whose unshared sequences fill at most so many tokens; the next one would not fit."""
    generator = np.random.default_rng(seed)

    def length(median: float, deviation: float, most: int) -> int:
        return int(np.clip(median * np.exp(deviation * generator.standard_normal()), 1, most))

    pairs: list[Pair] = []
    while True:
        prompt = length(*PROMPT, MAX_LENGTH // 2)
        pair = Pair(prompt, *(length(*ANSWER, MAX_LENGTH - prompt) for _ in range(2)))
        if sum(p.unshared for p in pairs) + pair.unshared > tokens:
            return pairs
        pairs.append(pair)


def saving(pairs: list[Pair]) -> dict[str, str | int]:
    """What sharing can gain: as many times fewer tokens in all matmuls, and fewer scores in attention."""
    tokens = sum(p.unshared for p in pairs), sum(map(sum, pairs))
    scores = sum(map(unshared_scores, pairs)), sum(map(shared_scores, pairs))
    return {
        "pairs": len(pairs),
        "tokens, unshared and shared": f"{tokens[0]} and {tokens[1]}, {tokens[0] / tokens[1]:.3f} x",
        "scores, unshared and shared": f"{scores[0]} and {scores[1]}, {scores[0] / scores[1]:.3f} x",
    }


def unshared_scores(pair: Pair) -> int:
    """(query, key) pairs that see each other in the two sequences."""
    return sum(n * (n + 1) // 2 for n in (pair.prompt + pair.chosen, pair.prompt + pair.rejected))


def shared_scores(pair: Pair) -> int:
    """The same where the prompt stands once."""
    return unshared_scores(pair) - pair.prompt * (pair.prompt + 1) // 2


class Layout:
    """The same pairs in both layouts.

    Attributes:
        shared, unshared: rows whose token ids are places in the shared row.
        index: (unshared tokens,) the shared token that each one is a copy of.
        first: (T,) where the first copy of each shared token stands.
        is_first: (unshared tokens,) bool.
    """

    def __init__(self, pairs: list[Pair], device: torch.device) -> None:
        self.pairs = pairs
        bounds = np.cumsum([0, *(part for pair in pairs for part in pair)])
        parts = [
            np.arange(a, b) for a, b in zip(bounds, bounds[1:], strict=False)
        ]  # prompt, chosen, rejected, prompt ...
        encoded = [EncodedPair(*parts[i : i + 3], origin=None, columns={}) for i in range(0, len(parts), 3)]
        sequences = [np.concatenate((p.prompt, answer)) for p in encoded for answer in (p.chosen, p.rejected)]
        whole = [EncodedSequence(ids, np.ones(len(ids), dtype=bool), origin=None) for ids in sequences]
        self.shared: TokenRow = row_of_pairs(encoded).to(device)
        self.unshared: TokenRow = row_of_sequences(whole).to(device)
        first = np.unique(np.concatenate(sequences), return_index=True)[1]
        self.index, self.first = self.unshared.input_ids[0], torch.from_numpy(first).to(device)
        self.is_first = torch.zeros(len(self.index), dtype=torch.bool, device=device)
        self.is_first[self.first] = True

    def spread_out(self, dim: int, *inputs: Tensor) -> Inputs:
        """Inputs of the unshared row. The last one is the gradient of the output: only a token's first copy gets it."""
        *leaves, grad = (x.detach().index_select(dim, self.index) for x in inputs)
        grad.mul_(self.is_first.view([-1 if d == dim else 1 for d in range(grad.ndim)]))
        return *(x.requires_grad_() for x in leaves), grad

    def folded(self, dim: int, outputs: Outputs, names: tuple[str, ...]) -> Outputs:
        """Outputs of the unshared row as those of the shared one: gradients of a token's copies are added up."""
        folded = {**outputs, "output": outputs["output"].index_select(dim, self.first)}
        for name in names:
            shape = folded["output"].shape
            folded[name] = outputs[name].new_zeros(shape, dtype=torch.float32)
            folded[name].index_add_(dim, self.index, outputs[name].float())
        return folded


def compare_attention(layout: Layout, dtype: torch.dtype, H: int, D: int) -> Comparison:
    """q, k, v are (1, H, T, D)."""
    shared, unshared = (
        Visibility(row.input_ids.shape[1], row.input_ids.shape[1], row.visible_until, row.input_ids.device)
        for row in (layout.shared, layout.unshared)
    )

    def of(visibility: Visibility, impl: str = "triton", **options) -> Implementation:
        forward = partial(attend, visibility=visibility, impl=impl)
        return of_function(forward, "q k v", **options)

    gradients = ("grad of q", "grad of k", "grad of v")
    T = shared.keys
    return Comparison(
        name="attention",
        inputs=attention.attention_inputs(shared.device, dtype, 1, H, T, D, backward=True),
        reference=partial(attention.reference, shared),
        ours=of(shared),
        plain=of(shared, impl="torch"),
        peers={
            "without sharing": lambda: of(
                unshared, prepare=partial(layout.spread_out, 2), finish=lambda o: layout.folded(2, o, gradients)
            )
        },
        work=attention.attention_work(H, sum(map(shared_scores, layout.pairs)), T, D, backward=True),
        rounding=ROUNDING[dtype],
        targets={"without sharing": TARGET},
        per_second=(len(layout.pairs), "pairs/s"),
    )


def compare_block(layout: Layout, dtype: torch.dtype, config: Phi2Config, rank: int) -> Comparison:
    """A fused layer; see `block.compare_block` for the rank."""
    rows = layout.shared, layout.unshared
    device, T = layout.index.device, rows[0].input_ids.shape[1]
    layer, unfused = (block.new_layer(device, dtype, config, rank) for _ in range(2))
    ours, theirs = (block.our_layer(layer, config, row.positions, row.visible_until, fused=True) for row in rows)
    where = config, rows[0].positions, rows[0].visible_until
    unshared = replace(
        theirs,
        prepare=partial(layout.spread_out, 1),
        finish=lambda outputs: theirs.finish(layout.folded(1, outputs, ("grad of x",))),
    )
    return Comparison(
        name=f"block {f'LoRA r{rank}' if rank else 'in full'}",
        inputs=block.block_inputs(device, dtype, 1, T, config.hidden_size),
        reference=partial(block.block_reference, unfused, *where),
        ours=ours,
        plain=block.our_layer(unfused, *where, fused=False, impl="torch"),
        peers={"without sharing": lambda: unshared},
        work=block.block_work(config, T, sum(map(shared_scores, layout.pairs)), rank),
        rounding=ROUNDING[dtype],
        targets={"without sharing": TARGET},
        per_second=(len(layout.pairs), "pairs/s"),
    )
