"""From the logits of one step to the next token of every row.

The order is that of transformers, so that the same settings mean the same distribution there and here:
repetition penalty -> temperature -> top-k -> top-p -> min-p, then a draw. Temperature 0 takes the largest logit.

Rows of any settings are processed together, without a question to the device, so that a CUDA graph can hold it all:
settings are tensors, and where a row does without a stage, its value there changes nothing. Which stages there are, the
host knows (`Stages`).

Draws have no state either. What a row draws at a place of its sequence is a hash of its seed, the place and each id:
it is the same on every device, whoever stands beside it, and in a reply that is taken up in the middle.

Dims: B rows, V ids to choose from.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phi2.inference.config import SamplingParams

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64: the step from one state of SplitMix64 to the next
MIX = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64  # its multipliers
BELOW_1 = 1 - 2**-24  # the largest such float32


class Stages(NamedTuple):
    """What a row needs, or some of those that stand side by side.

    Attributes:
        draws: it has a temperature.
        penalty: it has a repetition penalty.
        top_k: the next power of two from k on, 0 for none: few values, so that few graphs are recorded.
    """

    draws: bool
    penalty: bool
    top_k: int
    top_p: bool
    min_p: bool

    @classmethod
    def of(cls, params: SamplingParams) -> Stages:
        return cls(
            draws=params.temperature > 0,
            penalty=params.repetition_penalty != 1,
            top_k=1 << (params.top_k - 1).bit_length() if params.top_k else 0,
            top_p=params.top_p < 1,
            min_p=params.min_p > 0,
        )

    @classmethod
    def of_all(cls, rows: Iterable[Stages]) -> Stages:
        return cls(*map(max, zip(*rows, strict=True)))


class Settings(NamedTuple):
    """How each row chooses, (B, 1) each: two of int64, the others of float32.

    Attributes:
        temperature: 0 is greedy.
        dropped: what top-p may leave out, 1 - p; below 0 it leaves out nothing.
    """

    seed: Tensor
    top_k: Tensor
    temperature: Tensor
    dropped: Tensor
    min_p: Tensor
    penalty: Tensor

    @classmethod
    def unpack(cls, rows: Tensor) -> Settings:
        """From (B, 6) int64, each row made by `pack`."""
        return cls(*rows[:, :2].split(1, dim=1), *rows[:, 2:].view(torch.float64).float().split(1, dim=1))


def pack(params: SamplingParams) -> Tensor:
    """(6,) int64, the floats by their bits: one copy brings all of it to a device."""
    dropped = 1 - params.top_p if params.top_p < 1 else -1.0
    floats = np.array([params.temperature, dropped, params.min_p, params.repetition_penalty], dtype=np.float64)
    return torch.tensor([params.seed or 0, min(params.top_k, sys.maxsize), *floats.view(np.int64).tolist()])


def choose(logits: Tensor, settings: Settings, stages: Stages, places: Tensor, seen: Tensor | None = None) -> Tensor:
    """The next token id of each row, (B,). No row's choice depends on the others.

    Args:
        logits: (B, V) float32.
        places: (B,) whole numbers, where in its sequence each row's next token stands.
        seen: as in `process_logits`.
    """
    scores = process_logits(logits, settings, stages, seen)
    return draw(scores, settings, places) if stages.draws else scores.argmax(dim=-1)


def process_logits(logits: Tensor, settings: Settings, stages: Stages, seen: Tensor | None = None) -> Tensor:
    """The scores whose softmax is sampled; -inf where a token is ruled out.

    Args:
        logits: (B, V) float32.
        seen: (B, V) bool, tokens already said; needed when there is a repetition penalty.
    Returns:
        (B, V) float32. At temperature 0 only the penalty is applied.
    Source: the processors of transformers/generation/logits_process.py, in the order of _get_logits_processor.
    """
    scores = logits
    if stages.penalty:
        penalised = torch.where(scores < 0, scores * settings.penalty, scores / settings.penalty)
        assert seen is not None
        scores = torch.where(seen, penalised, scores)
    if stages.draws:
        scores = scores / settings.temperature.masked_fill(settings.temperature == 0, 1.0)
    if stages.top_k:
        scores = scores.masked_fill(scores < _smallest_kept(scores, settings.top_k, stages.top_k), float("-inf"))
    if stages.top_p:
        scores = scores.masked_fill(_below_top_p(scores, settings.dropped), float("-inf"))
    if stages.min_p:
        probs = scores.softmax(dim=-1)
        scores = scores.masked_fill(probs < settings.min_p * probs.amax(dim=-1, keepdim=True), float("-inf"))
    return scores


def _smallest_kept(scores: Tensor, top_k: Tensor, most: int) -> Tensor:
    """(B, 1), the k-th largest score of each row, of which `most` is no less; -inf where k is 0."""
    largest = scores.topk(min(most, scores.shape[-1])).values
    return largest.gather(1, (top_k - 1).clamp(0, largest.shape[1] - 1)).masked_fill(top_k == 0, float("-inf"))


def _below_top_p(scores: Tensor, dropped: Tensor) -> Tensor:
    """True for the least likely tokens that together hold at most 1 - top_p; the most likely one always stays."""
    ascending, order = scores.sort(dim=-1)
    below = ascending.softmax(dim=-1).cumsum(dim=-1) <= dropped
    below[:, -1] = False
    return below.scatter(1, order, below)


def draw(scores: Tensor, settings: Settings, places: Tensor) -> Tensor:
    """One draw per row from softmax(scores), (B,); at temperature 0 the largest score. Never one of -inf.

    The largest of score + Gumbel noise is such a draw. The largest score is taken off before, since noise that is added
    to thousands, as a low temperature makes them, would be rounded away.
    """
    noise = gumbel_noise(settings.seed, places[:, None], scores.shape[-1])
    noise.masked_fill_(settings.temperature == 0, 0.0)
    return noise.add_(scores - scores.amax(dim=-1, keepdim=True)).argmax(dim=-1)


def gumbel_noise(seeds: Tensor, places: Tensor, V: int) -> Tensor:
    """-log(-log(1 - u)), (B, V) float32, finite: each u in (0, 1) is a hash of a seed, a place and an id.

    Every seed and place begin a SplitMix64 of their own, and each id takes the number of its turn.

    Args:
        seeds: (B, 1) int64.
        places: (B, 1) whole numbers.
    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    begin = _mix_(_mix_(seeds + GOLDEN) + places.long() * GOLDEN)
    turns = torch.arange(1, V + 1, device=seeds.device) * GOLDEN
    u = _shifted(_mix_(begin + turns), 8).float().add_(0.5).mul_(2.0**-56).clamp_(max=BELOW_1)
    return u.neg_().log1p_().neg_().log_().neg_()


def _mix_(z: Tensor) -> Tensor:
    """SplitMix64's output for each state, in its place: every bit of it depends on every bit of z."""
    for bits, factor in zip((30, 27), MIX, strict=True):
        z.bitwise_xor_(_shifted(z, bits)).mul_(factor)
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits of an int64 whose sign is a bit like the others."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def told(logits: Tensor, chosen: Tensor) -> Tensor:
    """(B, 3) float32, which holds ids exactly: id, its log-probability, and 1 where all logits of the row are finite.

    Args:
        logits: (B, at least V) float32; the distribution is over all of them.
        chosen: (B,) ids.
    """
    logprobs = logits.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]
    finite = logits.abs().amax(dim=-1) < float("inf")  # a nan is not
    return torch.stack((chosen, logprobs, finite), dim=1)
