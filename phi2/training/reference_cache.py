"""Log-probabilities of a reference that were computed once: every answer's, token by token, kept in a folder.

The folder is named by a hash of the reference's weights, and what it holds by a hash of the tokens of a prompt and an
answer. Such a cache serves every run over the same answers, in pairs, swapped pairs, lists or alone, whatever its loss,
learning rate or batch size, and never a wrong one: before it is used, the reference scores some of the rows again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from phi2.arriving import without_wait
from phi2.data.encoded import EncodedPreference
from phi2.lora import lora_modules
from phi2.model import Phi2ForCausalLM
from phi2.training.packing import TokenRow, row_of_answers
from phi2.training.reference_shards import KEY, Shards, ShardWriter

# The log-probabilities of a pass's targets, (N,), in the order of `row_of_answers`.
Reference = Callable[[Sequence[EncodedPreference], TokenRow], Tensor]

# How far apart, in nats per token, what is cached and what the same model says now may be: they saw the rows in other
# batches, and half-precision matmuls round each shape in their own way.
CACHED_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}
CHECKED_ROWS = 4  # that are scored again


class Precomputed:
    """A reference whose log-probabilities are known.

    Args:
        shards: hold those of every answer that it will be asked for.
        complete: whether none had to be scored for this run.
    """

    def __init__(self, shards: Shards, complete: bool, device: torch.device) -> None:
        self.shards, self.complete, self.device = shards, complete, device

    def __call__(self, batch: Sequence[EncodedPreference], row: TokenRow) -> Tensor:
        logps = torch.cat([self.shards.logps(place) for place in self._places(batch)])
        return without_wait(logps, self.device)

    def digest(self, rows: Sequence[EncodedPreference]) -> str:
        """Of what it says about these answers."""
        digest = hashlib.sha256()
        for place in self._places(rows):
            digest.update(self.shards.logps(place).numpy().tobytes())
        return digest.hexdigest()

    def _places(self, rows: Sequence[EncodedPreference]) -> np.ndarray:
        places = self.shards.find(_keys(rows))
        assert (places >= 0).all(), "an answer that no run had asked for"
        return places


def precomputed(
    live: Reference,
    fingerprint: str,
    rows: Sequence[EncodedPreference],
    max_tokens: int,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    about: Mapping[str, Any] = {},
    known: Shards | None = None,
) -> Precomputed:
    """The same reference from its cache in `folder`, which is completed first with the answers it lacks.

    What was scored before Ctrl-C or a failure is kept, and before a kill all but the last minute.

    Args:
        max_tokens: of a pass; a row with more has one to itself.
        dtype: that the reference computes in.
        about: told in the cache's `reference.json`.
        known: log-probabilities that need not be scored.
    Raises:
        ValueError: one line, for a shard that is damaged, and when the reference says something else than its cache.
        OSError: one line, when the cache lacks answers and cannot be written.
    """
    place, keys = cache_folder(folder, fingerprint), _keys(rows)
    shards = Shards(place, fingerprint)
    require_agreement(live, rows, shards, max_tokens, device, CACHED_TOLERANCE[dtype])
    lacking = _lacking(keys, shards)
    if not len(lacking):
        return Precomputed(shards, True, device)
    with ShardWriter(place, {**about, "dtype": str(dtype), "fingerprint": fingerprint}) as writer:
        if known is not None:
            lacking = _take_over(known, keys, lacking, writer)
        longest_first = sorted(_with_answers(rows, lacking), key=lambda row: -row.tokens)
        total = sum(row.tokens for row in longest_first)
        with tqdm(total=total, desc="reference", unit="tok", unit_scale=True, disable=not total) as progress:
            for batch, logps in _scored(live, longest_first, max_tokens, device):
                writer.add(_keys(batch), logps)
                progress.update(sum(row.tokens for row in batch))
    return Precomputed(Shards(place, fingerprint), not len(lacking), device)


def cache_folder(folder: Path, fingerprint: str) -> Path:
    """Where the log-probabilities of the reference with this fingerprint are."""
    return folder / fingerprint[:16]


def require_agreement(
    live: Reference,
    rows: Sequence[EncodedPreference],
    shards: Shards,
    max_tokens: int,
    device: torch.device,
    tolerance: float,
) -> None:
    """Refuses a cache that the reference contradicts: some of the rows, spread over those it has, are scored again.

    Args:
        tolerance: in nats, of each token.
    Raises:
        ValueError: naming the shard with the largest difference.
    """
    places = shards.find(_keys(rows))
    unknown = np.cumsum(places < 0)[_ends(rows) - 1]  # answers up to each row
    known = np.flatnonzero(np.diff(unknown, prepend=0) == 0)
    if not len(known):
        return
    again = [rows[known[i]] for i in np.unique(np.linspace(0, len(known) - 1, CHECKED_ROWS).astype(int))]
    places = shards.find(_keys(again))
    scored = torch.cat([values for _, logps in _scored(live, again, max_tokens, device) for values in logps])
    apart = (scored - torch.cat([shards.logps(place) for place in places])).abs()
    worst = int(apart.argmax())
    if not apart[worst] <= tolerance:
        answers = np.cumsum([len(answer) for row in again for answer in row.answers])
        path = shards.path(places[np.searchsorted(answers, worst, side="right")])
        raise ValueError(
            f"{path}: not what the reference says now, by up to {apart[worst]:.2g} nats per token (allowed"
            f" {tolerance:g}, in {len(again)} rows); delete {path.parent} to score it again"
        )


def _scored(
    live: Reference, rows: Sequence[EncodedPreference], max_tokens: int, device: torch.device
) -> Iterator[tuple[Sequence[EncodedPreference], Sequence[Tensor]]]:
    """The rows of each pass, in their order, and of each answer its (tokens,) log-probabilities."""
    for batch in _passes(rows, max_tokens):
        scores = live(batch, row_of_answers(batch).to(device)).cpu()
        yield batch, scores.split([len(answer) for row in batch for answer in row.answers])


def _passes(rows: Sequence[EncodedPreference], max_tokens: int) -> Iterator[list[EncodedPreference]]:
    """The rows, as many as a pass holds at a time."""
    batch: list[EncodedPreference] = []
    tokens = 0
    for row in rows:
        if batch and tokens + row.tokens > max_tokens:
            yield batch
            batch, tokens = [], 0
        batch.append(row)
        tokens += row.tokens
    if batch:
        yield batch


def _lacking(keys: np.ndarray, shards: Shards) -> np.ndarray:
    """Indices of the keys that are not known, each key once."""
    unknown = np.flatnonzero(shards.find(keys) < 0)
    return np.sort(unknown[np.unique(keys[unknown], return_index=True)[1]])


def _take_over(known: Shards, keys: np.ndarray, lacking: np.ndarray, writer: ShardWriter) -> np.ndarray:
    """Writes what is known of what is lacking, and returns what is still lacking then."""
    places = known.find(keys[lacking])
    for i, place in zip(lacking[places >= 0], places[places >= 0], strict=True):
        writer.add(keys[i : i + 1], [known.logps(place)])
    return lacking[places < 0]


def _with_answers(rows: Sequence[EncodedPreference], wanted: np.ndarray) -> list[EncodedPreference]:
    """The rows with those answers alone, given by their indices among all answers."""
    found, ends = [], _ends(rows)
    cuts = np.searchsorted(wanted, ends)
    for row, end, (first, last) in zip(rows, ends, pairwise([0, *cuts]), strict=True):
        if first < last:
            which = wanted[first:last] - (end - len(row.answers))
            answers, scores = tuple(row.answers[i] for i in which), tuple(row.scores[i] for i in which)
            found.append(replace(row, answers=answers, scores=scores, has_gold=False))
    return found


def _ends(rows: Sequence[EncodedPreference]) -> np.ndarray:
    """(rows,) where the answers of each end among all answers."""
    return np.cumsum([len(row.answers) for row in rows], dtype=np.int64)


def answer_keys(rows: Iterable[EncodedPreference]) -> list[bytes]:
    """Names of 16 bytes: every answer by its tokens and those of the prompt."""
    keys = []
    for row in rows:
        prompt = hashlib.blake2b(len(row.prompt).to_bytes(8, "little"), digest_size=KEY.itemsize)
        prompt.update(row.prompt.astype("<i4").tobytes())
        for answer in row.answers:
            digest = prompt.copy()
            digest.update(answer.astype("<i4").tobytes())
            keys.append(digest.digest())
    return keys


def _keys(rows: Iterable[EncodedPreference]) -> np.ndarray:
    """(answers,) of KEY. An array keeps zeros at the end of a name, which its elements, taken out, do not."""
    return np.frombuffer(b"".join(answer_keys(rows)), KEY)


def key_of(rows: Sequence[EncodedPreference]) -> bytes:
    """Names answers in their order."""
    return hashlib.sha256(b"".join(answer_keys(rows))).digest()


@torch.no_grad()
def fingerprint(model: Phi2ForCausalLM, adapters: bool, compute_dtype: torch.dtype) -> str:
    """Hash of all that its log-probabilities depend on: shape, weights, and the precision it computes in.

    Args:
        adapters: whether its adapters belong to it.
    """
    layers = lora_modules(model).items() if adapters else ()
    scalings = {name: module.active.scaling for name, module in layers if module.active is not None}
    digest = hashlib.sha256(repr((model.config.to_dict(), model.dtype, compute_dtype, scalings)).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if adapters or ".lora_" not in name:
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
