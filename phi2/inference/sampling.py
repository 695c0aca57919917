"""From the logits of one step to the next token of every row.

The order is that of transformers, so that the same settings mean the same distribution there and here:
repetition penalty -> temperature -> top-k -> top-p -> min-p, then a draw. Temperature 0 takes the largest logit.

Dims: B rows, V ids to choose from.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

COLDEST = 1e-4  # below it logits / temperature leaves float32; ask for 0 instead


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop; names and meanings are those of transformers' GenerationConfig.

    Args:
        max_new_tokens: tokens to generate at most; the context of the model caps it.
        temperature: 0 is greedy; 1 is the model's own distribution; higher is flatter.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities reach p; 1 keeps all.
        min_p: keep tokens at least min_p times as likely as the most likely one; 0 keeps all.
        repetition_penalty: makes every token of the prompt and the reply less likely (above 1) or more (below 1).
        seed: row i of a batch draws from its own generator, seeded with seed + i; None takes a new one each time, which
            stands in the attribute afterwards.
        stop: the text ends before the first of these strings.

    Raises:
        ValueError: when a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    stop: str | Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        t = self.temperature
        _check("max_new_tokens", self.max_new_tokens, int, lambda v: v >= 1, "a whole number of at least 1")
        _check("temperature", t, (int, float), lambda v: v == 0 or v >= COLDEST, f"0 (greedy) or at least {COLDEST}")
        _check("top_k", self.top_k, int, lambda v: v >= 0, "0 (off) or a positive whole number")
        _check("top_p", self.top_p, (int, float), lambda v: 0 <= v <= 1, "in [0, 1]")
        _check("min_p", self.min_p, (int, float), lambda v: 0 <= v <= 1, "in [0, 1]")
        _check("repetition_penalty", self.repetition_penalty, (int, float), lambda v: v > 0, "a positive number")
        if self.seed is not None:
            _check("seed", self.seed, int, lambda v: 0 <= v < 2**63, "a whole number in [0, 2**63)")
        for text in self.stop:
            _check("stop", text, str, len, "strings of at least one character")
        if t == 0:
            self._refuse_without_draws()
        elif self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(32))

    def _refuse_without_draws(self) -> None:
        """What shapes a distribution means nothing to a choice that draws from none."""
        for name, neutral in (("top_k", 0), ("top_p", 1), ("min_p", 0), ("seed", 0)):
            if getattr(self, name) != neutral:
                raise ValueError(f"{name} {getattr(self, name)} needs a temperature above 0, got 0 (greedy)")


def _check(name: str, value, kind: type | tuple[type, ...], allowed, rule: str) -> None:
    known = isinstance(value, kind) and not isinstance(value, bool)
    if not known or (isinstance(value, float) and not isfinite(value)) or not allowed(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


class Sampler:
    """Chooses the next token of every row and remembers what the choice depends on.

    Args:
        params: the settings, the same for all rows.
        prompts: the token ids of each row's prompt, which the repetition penalty counts as said.
        choices: V, the ids that exist; a model may have more logits than the tokenizer has tokens.
        device: where the logits are.
    """

    def __init__(self, params: SamplingParams, prompts: list[list[int]], choices: int, device: torch.device) -> None:
        self.params, self.choices = params, choices
        assert params.seed is not None
        self.generators = [torch.Generator(device).manual_seed(params.seed + row) for row in range(len(prompts))]
        self.seen = None
        if params.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(prompts), choices, dtype=torch.bool, device=device)
            for seen, prompt in zip(self.seen, prompts, strict=True):
                seen[torch.tensor(prompt, device=device)] = True

    def __call__(self, logits: Tensor) -> Tensor:
        """One token id for each row, (B,), from logits (B, at least V) float32; never an id of V or above."""
        scores = process_logits(logits[:, : self.choices], self.params, self.seen)
        tokens = scores.argmax(dim=-1) if self.params.temperature == 0 else draw(scores, self.generators)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def keep(self, rows: list[int]) -> None:
        """Forgets every row but these."""
        self.generators = [self.generators[row] for row in rows]
        self.seen = None if self.seen is None else self.seen[rows]


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
