"""Log-probabilities of a reference that were computed once: every answer's, token by token, kept in a file.

The name of the file is a hash of the reference's weights, and its rows are named by a hash of the tokens of a prompt
and an answer. Such a cache serves every run over the same answers, in pairs, swapped pairs, lists or alone, whatever
its loss, learning rate or batch size, and never a wrong one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor
from tqdm import tqdm

from phi2.data.encode import EncodedPreference
from phi2.files import write_whole
from phi2.lora import lora_modules
from phi2.model import Phi2ForCausalLM
from phi2.training.packing import TokenRow, row_of_answers

# The log-probabilities of a pass's targets, (N,), in the order of `row_of_answers`.
Reference = Callable[[Sequence[EncodedPreference], TokenRow], Tensor]


class Precomputed:
    """A reference whose log-probabilities are known.

    Args:
        known: those of each answer by its key.
        complete: whether none had to be scored for this run.
    """

    def __init__(self, known: dict[bytes, np.ndarray], complete: bool, device: torch.device) -> None:
        self.known, self.complete, self.device = known, complete, device

    def __call__(self, batch: Sequence[EncodedPreference], row: TokenRow) -> Tensor:
        return torch.from_numpy(np.concatenate([self.known[key] for key in answer_keys(batch)])).to(self.device)

    def digest(self, rows: Sequence[EncodedPreference]) -> str:
        """Of what it says about these answers."""
        digest = hashlib.sha256()
        for key in answer_keys(rows):
            digest.update(self.known[key].tobytes())
        return digest.hexdigest()


def precomputed(
    live: Reference,
    fingerprint: str,
    rows: Sequence[EncodedPreference],
    batch_size: int,
    folder: Path,
    device: torch.device,
    known: dict[bytes, np.ndarray] | None = None,
) -> Precomputed:
    """The same reference from a cache file in `folder`, which is completed first with the answers it lacks.

    What was scored before Ctrl-C or a failure is kept.

    Args:
        known: log-probabilities that need not be scored.
    """
    path = cache_file(folder, fingerprint)
    stored = _read_cache(path)
    known = {**(known or {}), **stored}
    missing = _unknown(rows, known)
    try:
        for start in tqdm(range(0, len(missing), batch_size), desc="reference", unit="batch", disable=not missing):
            batch = missing[start : start + batch_size]
            scores = live(batch, row_of_answers(batch).to(device)).cpu().numpy()
            ends = np.cumsum([len(answer) for row in batch for answer in row.answers])
            known.update(zip(answer_keys(batch), np.split(scores, ends[:-1]), strict=True))
    finally:
        if len(known) > len(stored):
            _write_cache(path, known)
    return Precomputed(known, not missing, device)


def cache_file(folder: Path, fingerprint: str) -> Path:
    """Where the log-probabilities of the reference with this fingerprint are."""
    return folder / f"{fingerprint[:16]}.safetensors"


def _unknown(rows: Sequence[EncodedPreference], known: Iterable[bytes]) -> list[EncodedPreference]:
    """The rows with the answers that are not known, each once."""
    found, seen = [], {*known}
    for row in rows:
        missing = [i for i, key in enumerate(answer_keys([row])) if key not in seen]
        seen.update(answer_keys([row]))
        if missing:
            answers, scores = tuple(row.answers[i] for i in missing), tuple(row.scores[i] for i in missing)
            found.append(replace(row, answers=answers, scores=scores, has_gold=False))
    return found


def answer_keys(rows: Iterable[EncodedPreference]) -> list[bytes]:
    """Names every answer by its tokens and those of the prompt."""
    keys = []
    for row in rows:
        prompt = hashlib.sha256(len(row.prompt).to_bytes(8, "little") + row.prompt.astype("<i4").tobytes())
        for answer in row.answers:
            digest = prompt.copy()
            digest.update(answer.astype("<i4").tobytes())
            keys.append(digest.digest())
    return keys


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


def _read_cache(path: Path) -> dict[bytes, np.ndarray]:
    if not path.exists():
        return {}
    try:
        stored = safetensors.numpy.load_file(path)
        logps = np.split(stored["logps"], stored["ends"][:-1])
        return {key.tobytes(): values for key, values in zip(stored["keys"], logps, strict=True)}
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: not a reference cache ({error}); delete it to compute it again") from error


def _write_cache(path: Path, known: dict[bytes, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, 32)
    ends = np.cumsum([len(values) for values in known.values()])
    tensors = {"keys": keys, "logps": np.concatenate(list(known.values())), "ends": ends}
    write_whole(path, safetensors.numpy.save(tensors))
