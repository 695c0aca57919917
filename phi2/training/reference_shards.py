"""Log-probabilities of answers on disk: shards that are added to a folder as they are made, and read as they are asked.

    reference.json                             for a person: whose they are, when they were made, how many there are
    20261129T014600.123456-4711.safetensors    a shard: keys (n, 16) uint8, ends (n,) int64, logps (tokens,) float32

A shard is written whole, named by the time and the process, and never changed: a kill loses what was not yet a shard,
and any number of processes may add to one folder. Of an answer that two of them scored the earlier shard counts. The
shards alone are read; `reference.json` tells of them.

In memory an answer takes 24 bytes, of its place in the folder: a million answers 24 MB. On disk it takes 24 bytes and 4
for each of its tokens, which are mapped into memory and need not fit.
"""

from __future__ import annotations

import bisect
import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from phi2.files import crc_of, one_line, write_whole

KEY = np.dtype("S16")  # names an answer
MANIFEST, SUFFIX = "reference.json", ".safetensors"
SECONDS, TOKENS = 60.0, 2**22  # a shard holds the scores of a minute, or 16 MiB of them


class Shard(NamedTuple):
    """One file; its tensors are mapped."""

    path: Path
    keys: np.ndarray  # (n,) of KEY
    ends: np.ndarray  # (n,) where the tokens of each answer end
    logps: Tensor  # (tokens,) float32, nats


class Shards:
    """Those of a folder, by the key of an answer.

    Args:
        folder: may be missing, and then holds nothing.
        fingerprint: of the model whose log-probabilities they must be.
    Raises:
        ValueError: naming the file that is damaged, or of another model.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        self.shards = [_read(path, fingerprint) for path in shard_files(folder)]
        joined = np.concatenate([np.empty(0, KEY), *(shard.keys for shard in self.shards)])
        self.places = np.argsort(joined, kind="stable")  # the first shard that has a key stands first
        self.keys = joined[self.places]
        self.firsts = np.cumsum([0, *(len(shard.keys) for shard in self.shards)]).tolist()

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """(n,) keys to the place of each answer, -1 where it is not known."""
        if not len(self):
            return np.full(len(keys), -1)
        at = np.searchsorted(self.keys, keys).clip(max=len(self) - 1)
        return np.where(self.keys[at] == keys, self.places[at], -1)

    def logps(self, place: int) -> Tensor:
        """(tokens,) float32 of the answer there."""
        shard, row = self._shard_of(place)
        return shard.logps[shard.ends[row - 1] if row else 0 : shard.ends[row]]

    def path(self, place: int) -> Path:
        """Of the file that holds the answer there."""
        return self._shard_of(place)[0].path

    def _shard_of(self, place: int) -> tuple[Shard, int]:
        number = bisect.bisect_right(self.firsts, place) - 1
        return self.shards[number], place - self.firsts[number]


class ShardWriter:
    """Adds shards to a folder; behind the block the last one is written, whatever ended it.

    Args:
        about: for `reference.json`, with the fingerprint of the model.
    Raises:
        OSError: one line, before anything is scored, for a folder that cannot be written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.keys: list[bytes] = []
        self.logps: list[Tensor] = []
        self.tokens, self.since = 0, time.monotonic()

    def __enter__(self) -> ShardWriter:
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_manifest(self.folder, self.about)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()

    def add(self, keys: np.ndarray, logps: Sequence[Tensor]) -> None:
        """(n,) keys and the (tokens,) log-probabilities of each."""
        self.keys.append(keys.tobytes())
        self.logps += logps
        self.tokens += sum(map(len, logps))
        if self.tokens >= TOKENS or time.monotonic() - self.since >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Makes a shard of what was added since the last one."""
        if not self.logps:
            return
        keys = np.frombuffer(b"".join(self.keys), np.uint8).reshape(-1, KEY.itemsize)
        ends = np.cumsum([len(values) for values in self.logps])
        tensors = {"keys": torch.tensor(keys), "ends": torch.tensor(ends), "logps": torch.cat(self.logps).float()}
        name = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{os.getpid()}{SUFFIX}"
        with _writing(self.folder):
            write_whole(self.folder / name, shard_of(tensors, self.about["fingerprint"]))
            _write_manifest(self.folder, self.about)
        self.keys, self.logps, self.tokens, self.since = [], [], 0, time.monotonic()


def shard_files(folder: Path) -> list[Path]:
    """The earliest first."""
    return sorted(folder.glob(f"*{SUFFIX}"))


def shard_of(tensors: dict[str, Tensor], fingerprint: str) -> bytes:
    """The content of a shard: its metadata hold a CRC of all that stands behind them."""
    about = {"fingerprint": fingerprint}
    plain = safetensors.torch.save(tensors, about)
    return safetensors.torch.save(tensors, about | {"crc": str(zlib.crc32(plain[_header(plain) :]))})


def _header(content: bytes) -> int:
    """Bytes in front of the tensors: a length in eight, and so many."""
    return 8 + int.from_bytes(content[:8], "little")


def _read(path: Path, fingerprint: str) -> Shard:
    try:
        with safe_open(path, framework="pt") as file:
            keys, ends, logps = (file.get_tensor(name) for name in ("keys", "ends", "logps"))
            metadata = file.metadata() or {}
            found = metadata.get("fingerprint")
        with path.open("rb") as file:
            start = _header(file.read(8))
        if "crc" in metadata and metadata["crc"] != str(crc_of(path, start)):  # earlier versions wrote none
            raise ValueError("it holds other numbers than were written")
        shard = Shard(path, keys.numpy().view(KEY)[:, 0], ends.numpy(), logps)
        if (
            not len(shard.keys) == len(shard.ends) > 0
            or shard.ends[-1] != len(logps)
            or np.any(np.diff(shard.ends) < 0)
        ):
            raise ValueError("keys, ends and log-probabilities do not fit")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{path}: not a shard of a reference cache ({one_line(error)}); delete it to score its answers again"
        ) from error
    if found != fingerprint:
        raise ValueError(f"{path}: of the reference {found}, not of {fingerprint}; it does not belong into this folder")
    return shard


def _write_manifest(folder: Path, about: Mapping[str, Any]) -> None:
    """Also when processes add shards side by side, the last one to write tells of all."""
    told: list[Path] | None = None
    while told != (files := shard_files(folder)):
        shards = {path.name: _counts(path) for path in files}
        total = {what: sum(each[what] for each in shards.values()) for what in ("answers", "tokens")}
        written = {"updated": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
        write_whole(folder / MANIFEST, json.dumps({**about, **written, **total, "shards": shards}, indent=1))
        told = files


def _counts(path: Path) -> dict[str, int]:
    with safe_open(path, framework="pt") as file:
        return {what: file.get_slice(name).get_shape()[0] for what, name in (("answers", "keys"), ("tokens", "logps"))}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{folder}: log-probabilities of the reference cannot be written ({error.strerror or one_line(error)}); the"
            " shards that are there stay: make room, or give another reference_cache"
        ) from error
