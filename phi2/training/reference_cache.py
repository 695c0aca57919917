"""Log-probabilities of a reference that were computed once: every pair's, token by token, kept in a file.

The name of the file is a hash of the reference's weights, and its rows are named by a hash of the pair's tokens. Such a
cache serves every run over the same pairs, whatever its loss, learning rate or batch size, and never a wrong one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor
from tqdm import tqdm

from phi2.data.encode import EncodedPair
from phi2.files import write_whole
from phi2.lora import lora_modules
from phi2.model import Phi2ForCausalLM
from phi2.training.packing import TokenRow, row_of_pairs

# The log-probabilities of a micro-batch's targets, (N,), in the order of `row_of_pairs`.
Reference = Callable[[Sequence[EncodedPair], TokenRow], Tensor]


class Precomputed:
    """A reference whose log-probabilities are known.

    Args:
        known: those of each pair by its key.
        complete: whether none had to be scored for this run.
    """

    def __init__(self, known: dict[bytes, np.ndarray], complete: bool, device: torch.device) -> None:
        self.known, self.complete, self.device = known, complete, device

    def __call__(self, batch: Sequence[EncodedPair], row: TokenRow) -> Tensor:
        return torch.from_numpy(np.concatenate([self.known[pair_key(pair)] for pair in batch])).to(self.device)

    def digest(self, pairs: Sequence[EncodedPair]) -> str:
        """Of what it says about these pairs."""
        digest = hashlib.sha256()
        for pair in pairs:
            digest.update(self.known[pair_key(pair)].tobytes())
        return digest.hexdigest()


def precomputed(
    live: Reference,
    fingerprint: str,
    pairs: Sequence[EncodedPair],
    batch_size: int,
    folder: Path,
    device: torch.device,
    known: dict[bytes, np.ndarray] | None = None,
) -> Precomputed:
    """The same reference from a cache file in `folder`, which is completed first with the pairs it lacks.

    What was scored before Ctrl-C or a failure is kept.

    Args:
        known: log-probabilities that need not be scored.
    """
    path = cache_file(folder, fingerprint)
    stored = _read_cache(path)
    known = {**(known or {}), **stored}
    keys = {pair_key(pair): pair for pair in pairs}  # each once
    missing = [pair for key, pair in keys.items() if key not in known]
    try:
        for start in tqdm(range(0, len(missing), batch_size), desc="reference", unit="batch", disable=not missing):
            batch = missing[start : start + batch_size]
            scores = live(batch, row_of_pairs(batch).to(device)).cpu().numpy()
            ends = np.cumsum([pair.target_tokens for pair in batch])
            known.update(zip(map(pair_key, batch), np.split(scores, ends[:-1]), strict=True))
    finally:
        if len(known) > len(stored):
            _write_cache(path, known)
    return Precomputed(known, not missing, device)


def cache_file(folder: Path, fingerprint: str) -> Path:
    """Where the log-probabilities of the reference with this fingerprint are."""
    return folder / f"{fingerprint[:16]}.safetensors"


def pair_key(pair: EncodedPair) -> bytes:
    """Names a pair by its tokens and by where its answers begin."""
    digest = hashlib.sha256()
    for part in (pair.prompt, pair.chosen, pair.rejected):
        digest.update(len(part).to_bytes(8, "little") + part.astype("<i4").tobytes())
    return digest.digest()


def key_of(pairs: Sequence[EncodedPair]) -> bytes:
    """Names pairs in their order."""
    return hashlib.sha256(b"".join(map(pair_key, pairs))).digest()


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
