"""From the logits of one step to the next token of every row.

The order is that of transformers, so that the same settings mean the same distribution there and here:
repetition penalty -> temperature -> top-k -> top-p -> min-p, then a draw. Temperature 0 takes the largest logit.

Dims: B rows, V ids to choose from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phi2.inference.config import SamplingParams


class Sampler:
    """What the choices of one reply depend on beside the logits.

    Args:
        params: the settings.
        prompt: token ids, which the repetition penalty counts as said.
        choices: V, the ids that exist; a model may have more logits than the tokenizer has tokens.
        device: where the logits are.
    """

    def __init__(self, params: SamplingParams, prompt: Sequence[int], choices: int, device: torch.device) -> None:
        assert params.seed is not None
        self.params, self.choices = params, choices
        self.generator = torch.Generator(device).manual_seed(params.seed) if params.temperature else None
        self.seen: Tensor | None = None  # (V,) bool
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(choices, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, device=device)] = True

    @property
    def kind(self) -> tuple[float, ...]:
        """Rows whose kinds are equal are processed together."""
        p = self.params
        return p.temperature, p.top_k, p.top_p, p.min_p, p.repetition_penalty, self.choices


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """The next token id of each row, (B,), from logits (B, at least V) float32 and each row's own sampler.

    No row's choice depends on the others. Never an id of V or above.
    """
    kinds: dict[tuple[float, ...], list[int]] = {}
    for row, sampler in enumerate(samplers):
        kinds.setdefault(sampler.kind, []).append(row)
    if len(kinds) == 1:
        return _choose_alike(logits, samplers)
    tokens = torch.empty(len(samplers), dtype=torch.int64, device=logits.device)
    for rows in kinds.values():
        tokens[rows] = _choose_alike(logits[rows], [samplers[row] for row in rows])
    return tokens


def _choose_alike(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    first, generators = samplers[0], [s.generator for s in samplers if s.generator is not None]
    said = [sampler.seen for sampler in samplers if sampler.seen is not None]
    scores = process_logits(logits[:, : first.choices], first.params, torch.stack(said) if said else None)
    tokens = draw(scores, generators) if generators else scores.argmax(dim=-1)
    for seen, token in zip(said, tokens, strict=False):  # none, or one a row
        seen[token] = True
    return tokens


def process_logits(logits: Tensor, params: SamplingParams, seen: Tensor | None = None) -> Tensor:
    """The scores whose softmax is sampled; -inf where a token is ruled out.

    Args:
        logits: (B, V) float32.
        seen: (B, V) bool, tokens already said; needed when there is a repetition penalty.
    Returns:
        (B, V) float32. At temperature 0 only the penalty is applied: nothing after it changes the largest.
    Source: the processors of transformers/generation/logits_process.py, in the order of _get_logits_processor.
    """
    scores = logits
    if params.repetition_penalty != 1.0:
        penalised = torch.where(scores < 0, scores * params.repetition_penalty, scores / params.repetition_penalty)
        assert seen is not None
        scores = torch.where(seen, penalised, scores)
    if params.temperature == 0:
        return scores
    if params.temperature != 1.0:
        scores = scores / params.temperature
    if params.top_k:
        smallest_kept = scores.topk(min(params.top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < smallest_kept, float("-inf"))
    if params.top_p < 1.0:
        scores = scores.masked_fill(_below_top_p(scores, params.top_p), float("-inf"))
    if params.min_p:
        probs = scores.softmax(dim=-1)
        scores = scores.masked_fill(probs < params.min_p * probs.amax(dim=-1, keepdim=True), float("-inf"))
    return scores


def _below_top_p(scores: Tensor, top_p: float) -> Tensor:
    """True for the least likely tokens that together hold at most 1 - top_p; the most likely one always stays."""
    ascending, order = scores.sort(dim=-1)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
    dropped[:, -1] = False
    return dropped.scatter(1, order, dropped)


def draw(scores: Tensor, generators: list[torch.Generator]) -> Tensor:
    """One draw per row from softmax(scores), each row from its own generator: argmax of p / e with e ~ Exp(1).

    Independent of the other rows, without waiting for the device, and never a token of probability zero.
    """
    noise = torch.empty_like(scores)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return (scores.softmax(dim=-1) / noise).argmax(dim=-1)  # (B,)
