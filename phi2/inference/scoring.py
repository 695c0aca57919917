"""Log-probabilities of given continuations, with every common prefix of them computed once.

Requests are sorted by their tokens, and those of a pass are laid out in one row as the trie of their prefixes, depth
first: shots, then a question, then its options one behind the other. A key is visible until the end of its node's
subtree and positions count along each path, so that every request gets what it would get alone. The head runs only
where a token is predicted.

    sequences    a b c    a b c x y    a b d
    row          a b c x y d
    position     0 1 2 3 4 2
    until        6 6 5 5 5 6

Dims: T tokens of a row, N predictions, C hidden, V vocabulary.
Source: prefix sharing, arXiv:2410.20305, here with any number of branches at any depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phi2.called import must_be_called
from phi2.inference.engine import evaluation_mode, first_nonfinite_module
from phi2.lora import LoraLinear
from phi2.model import Phi2ForCausalLM
from phi2_kernels.products import matmul

TOKENS_PER_PASS = 4096
CHUNK_BYTES = 64 * 2**20  # of float32 logits that exist at once


class Request(NamedTuple):
    """Token ids: a context that is read, and its continuation, which is predicted. Neither is empty."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Score:
    """What a model says of a continuation.

    Attributes:
        logprobs: of each of its tokens, in nats.
        best: the most likely token in the place of each.
        is_greedy: whether each of its tokens is the most likely one.
        top: the likeliest ids in the place of each with their log-probs, largest first; as many as were asked for.
    """

    logprobs: list[float]
    best: list[int]
    is_greedy: bool
    top: list[list[tuple[int, float]]]

    @property
    def total(self) -> float:
        """Of all its tokens together, in nats."""
        return sum(self.logprobs)


class TrieRow:
    """The tokens of one pass; sequences are added in sorted order.

    Attributes:
        ids, positions, until: of each token: its id, its place in its sequences, the end of the tokens that see it.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.until: list[int] = []
        self._path: list[int] = []  # where the tokens of the sequence added last stand

    def add(self, ids: Sequence[int], shared: int) -> list[int]:
        """Adds a sequence that has its first `shared` tokens in common with the one before it.

        Returns:
            Where its tokens stand in the row.
        """
        self._leave(shared)
        self._path += range(len(self.ids), len(self.ids) + len(ids) - shared)
        self.ids += ids[shared:]
        self.positions += range(shared, len(ids))
        self.until += [0] * (len(ids) - shared)
        return [*self._path]

    def _leave(self, depth: int) -> None:
        """Nothing that follows sees what stands deeper than `depth` on the path."""
        for place in self._path[depth:]:
            self.until[place] = len(self.ids)
        del self._path[depth:]

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """What `Phi2Model.forward` takes, each (1, T)."""
        self._leave(0)
        return {
            "input_ids": torch.tensor([self.ids], device=device),
            "positions": torch.tensor([self.positions], device=device),
            "visible_until": torch.tensor([self.until], dtype=torch.int32, device=device),
        }


def score(
    model: Phi2ForCausalLM,
    requests: Sequence[Request],
    tokens_per_pass: int = TOKENS_PER_PASS,
    top_logprobs: int = 0,
) -> Iterator[tuple[int, Score]]:
    """The score of every request, in the order in which passes complete.

    Args:
        tokens_per_pass: how long a row may become; a longer request has a row of its own.
        top_logprobs: how many of the likeliest tokens to report in the place of each.
    Returns:
        The index of a request and its score.
    Raises:
        ValueError: naming the request that is empty or does not fit the model, and for logits that are not finite.
    """
    for number, request in enumerate(requests, start=1):
        _require_fit(request, number, model)
    return _scores(model, requests, tokens_per_pass, top_logprobs)


def _require_fit(request: Request, number: int, model: Phi2ForCausalLM) -> None:
    context, continuation = request
    config = model.config
    if not len(context) or not len(continuation):
        raise ValueError(f"request {number}: context and continuation need a token each at least")
    if (length := len(context) + len(continuation) - 1) > config.max_position_embeddings:
        raise ValueError(
            f"request {number}: {length} tokens are to be read, the model's context is {config.max_position_embeddings}"
        )
    if (largest := max(*context, *continuation)) >= config.vocab_size:
        raise ValueError(f"request {number} has token id {largest}, the model knows ids below {config.vocab_size}")


@torch.no_grad()
def _scores(
    model: Phi2ForCausalLM, requests: Sequence[Request], tokens_per_pass: int, top_logprobs: int
) -> Iterator[tuple[int, Score]]:
    read = [np.array([*context, *continuation[:-1]], dtype=">u4") for context, continuation in requests]
    order = sorted(range(len(read)), key=lambda i: read[i].tobytes())  # big-endian bytes sort as the tokens do
    shared = [0, *(_common(read[a], read[b]) for a, b in zip(order, order[1:], strict=False))]
    lengths = [len(read[i]) for i in order]
    for start, end in passes(lengths, shared, tokens_per_pass):
        row, places = TrieRow(), []
        for turn in range(start, end):
            index = order[turn]
            path = row.add(read[index].tolist(), shared[turn] if turn > start else 0)
            places.append(path[-len(requests[index].continuation) :])
        chosen = order[start:end]
        with evaluation_mode(model):
            scored = _score_row(model, row, places, [requests[i].continuation for i in chosen], top_logprobs)
        yield from zip(chosen, scored, strict=True)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that both begin with."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def passes(lengths: Sequence[int], shared: Sequence[int], tokens: int) -> Iterator[tuple[int, int]]:
    """Cuts sorted sequences into passes: as full as `tokens` lets them be, but in the last half where it costs least.

    Args:
        lengths: of the sequences.
        shared: tokens that each has in common with the one before; behind a cut they are computed again.
        tokens: of a pass at most, unless a single sequence is longer.
    Returns:
        The first sequence of each pass, and the one behind its last.
    """
    start = 0
    while start < len(lengths):
        used, end, cut = lengths[start], start + 1, start + 1
        while end < len(lengths) and (used := used + lengths[end] - shared[end]) <= tokens:
            end += 1
            if end < len(lengths) and (2 * used <= tokens or shared[end] <= shared[cut]):
                cut = end
        cut = end if end == len(lengths) else cut
        yield start, cut
        start = cut


def _score_row(
    model: Phi2ForCausalLM,
    row: TrieRow,
    places: list[list[int]],
    continuations: list[Sequence[int]],
    top_logprobs: int,
) -> list[Score]:
    """One pass.

    Args:
        places: for each continuation, where in the row its tokens are predicted.
    """
    inputs = row.tensors(model.device)
    where = torch.tensor([place for of_one in places for place in of_one], device=model.device)  # (N,)
    targets = torch.tensor([token for of_one in continuations for token in of_one], device=model.device)
    logps, best, top = _predictions(model, model.model(**inputs)[0], where, targets, top_logprobs)
    if not logps.isfinite().all():
        name = first_nonfinite_module(model, lambda: model(**inputs))
        raise ValueError(f"non-finite logits; first in {name} ({model.dtype})")
    scores, end = [], 0
    for of_one in continuations:
        start, end = end, end + len(of_one)
        most_likely = best[start:end].tolist()
        scores.append(Score(logps[start:end].tolist(), most_likely, most_likely == list(of_one), top[start:end]))
    return scores


def _predictions(
    model: Phi2ForCausalLM, hidden: Tensor, where: Tensor, targets: Tensor, top_logprobs: int
) -> tuple[Tensor, Tensor, list[list[tuple[int, float]]]]:
    """Log-probabilities of the targets, (N,) float32, the most likely tokens, (N,), both on the CPU, and `Score.top`.

    Args:
        hidden: (T, C).
        where: (N,) rows of `hidden`.
    """
    rows = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
    logps, best, top = [], [], []
    for some, wanted in zip(where.split(rows), targets.split(rows), strict=True):
        logits = logits_of(model, hidden[some])  # (n, V)
        lse = logits.logsumexp(dim=-1)
        logps.append(logits.gather(1, wanted[:, None])[:, 0] - lse)
        best.append(logits.argmax(dim=-1))
        values, ids = logits.topk(top_logprobs)  # (n, k) twice
        top += [
            list(zip(*row, strict=True)) for row in zip(ids.tolist(), (values - lse[:, None]).tolist(), strict=True)
        ]
    return torch.cat(logps).cpu(), torch.cat(best).cpu(), top


def logits_of(model: Phi2ForCausalLM, hidden: Tensor) -> Tensor:
    """(n, V) float32 of hidden states (n, C): products of halves are not rounded to halves, as the layer would."""
    head = model.lm_head
    if not head.weight.is_floating_point() or must_be_called([head]):
        return head(hidden).float()
    logits = matmul(hidden, head.weight.T, head.bias.float())
    if isinstance(head, LoraLinear) and head.adapter is not None:
        logits += head.adapter.lora_B(head.adapter.hidden(hidden))
    return logits
