"""The reference of preference optimisation: whose log-probabilities the policy's are compared with.

Three kinds: the policy with its adapters off, a frozen copy of the policy as it starts, or another checkpoint. Each can
be asked during training, or once before it: then every pair's log-probabilities, token by token, are kept in a file
whose name is a hash of the reference's weights and whose rows are named by a hash of the pair's tokens. Such a cache
serves every run over the same pairs, whatever its loss, learning rate or batch size, and never a wrong one.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
from torch import Tensor
from tqdm import tqdm

from phi2.config import Phi2Config
from phi2.data.encode import EncodedPair
from phi2.files import write_whole
from phi2.lora import disabled, lora_modules
from phi2.losses.head import target_logps
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer
from phi2.training.packing import TokenRow, row_of_pairs

# The log-probabilities of a micro-batch's targets, (N,), in the order of `row_of_pairs`.
Reference = Callable[[Sequence[EncodedPair], TokenRow], Tensor]


def frozen_copy(model: Phi2ForCausalLM) -> Phi2ForCausalLM:
    """The model as it is now, for good; weights that do not train are shared, not copied."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, memo=shared).requires_grad_(False).eval()


def adapters_off(model: Phi2ForCausalLM) -> Reference:
    """The policy's own base."""

    def logps(pairs: Sequence[EncodedPair], row: TokenRow) -> Tensor:
        training = model.training
        model.eval()
        with disabled(model):
            result = score(model, row)
        model.train(training)
        return result

    return logps


def another_model(reference: Phi2ForCausalLM) -> Reference:
    """A model that stands beside the policy."""
    return lambda pairs, row: score(reference, row)


@torch.no_grad()
def score(model: Phi2ForCausalLM, row: TokenRow) -> Tensor:
    """(N,) log-probabilities of a row's targets."""
    hidden = model.model(row.input_ids, positions=row.positions, visible_until=row.visible_until)
    return target_logps(model, hidden, row.rows, row.targets)[0]


def require_fit(name: str, config: Phi2Config, pairs: Sequence[EncodedPair]) -> None:
    """Refuses a reference that cannot read the pairs: too few vocabulary rows, or too short a context.

    Args:
        name: of the reference, for the error.
        config: of the reference.
    Raises:
        ValueError: naming both numbers and a row.
    """
    if not pairs:
        return
    longest, highest = max(pairs, key=lambda pair: pair.length), max(pairs, key=_highest_id)
    if _highest_id(highest) >= config.vocab_size:
        raise ValueError(
            f"reference {name} has {config.vocab_size} vocabulary rows, but {highest.origin} holds the token id"
            f" {_highest_id(highest)}: it must know the tokens of the policy"
        )
    if longest.length > config.max_position_embeddings:
        raise ValueError(
            f"reference {name} has a context of {config.max_position_embeddings}, but {longest.origin} has"
            f" {longest.length} tokens: give a max_length of {config.max_position_embeddings} at most"
        )


def _highest_id(pair: EncodedPair) -> int:
    return max(int(part.max(initial=0)) for part in (pair.prompt, pair.chosen, pair.rejected))


def warn_of_another_vocabulary(folder: Path | None, tokenizer: Tokenizer) -> None:
    """Tells of a reference whose own tokenizer would read the rows as other tokens."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return
    own, others = tokenizer.backend.get_vocab(), Tokenizer.from_folder(folder).backend.get_vocab()
    if own != others:
        token = min(own.items() ^ others.items(), key=lambda entry: entry[1])[0]
        warnings.warn(
            f"reference {folder}: its tokenizer has another vocabulary than the policy's ({len(others)} tokens and"
            f" {len(own)}; {token!r} is {others.get(token)} and {own.get(token)})",
            stacklevel=2,
        )


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
    live: Reference, fingerprint: str, pairs: Sequence[EncodedPair], batch_size: int, folder: Path, device: torch.device
) -> Precomputed:
    """The same reference from a cache file in `folder`, which is completed first with the pairs it lacks.

    What was scored before Ctrl-C or a failure is kept.
    """
    path = folder / f"{fingerprint[:16]}.safetensors"
    known = _read_cache(path)
    missing = [pair for pair in pairs if pair_key(pair) not in known]
    before = len(known)
    try:
        for start in tqdm(range(0, len(missing), batch_size), desc="reference", unit="batch", disable=not missing):
            batch = missing[start : start + batch_size]
            scores = live(batch, row_of_pairs(batch).to(device)).cpu().numpy()
            ends = np.cumsum([pair.target_tokens for pair in batch])
            known.update(zip(map(pair_key, batch), np.split(scores, ends[:-1]), strict=True))
    finally:
        if len(known) > before:
            _write_cache(path, known)
    return Precomputed(known, not missing, device)


def pair_key(pair: EncodedPair) -> bytes:
    """Names a pair by its tokens and by where its answers begin."""
    digest = hashlib.sha256()
    for part in (pair.prompt, pair.chosen, pair.rejected):
        digest.update(len(part).to_bytes(8, "little") + part.astype("<i4").tobytes())
    return digest.digest()


@torch.no_grad()
def fingerprint(model: Phi2ForCausalLM, adapters: bool, compute_dtype: torch.dtype) -> str:
    """Hash of all that its log-probabilities depend on: shape, weights, and the precision it computes in.

    Args:
        adapters: whether its adapters belong to it.
    """
    scalings = {name: module.active.scaling for name, module in lora_modules(model).items()} if adapters else {}
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
