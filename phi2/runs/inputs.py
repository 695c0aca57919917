"""A resumed run must see what it began with: digests of all that it depends on beside its settings, in inputs.json.

A data file that grew by a line would silently give another order of rows; another base under the same name, an edited
loss or a reference that was trained further, other gradients. Weights are known by their files, so that a digest costs
milliseconds, loads nothing, and is the same on every device and in every compute dtype.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from phi2.data.encoded import Encoded
from phi2.data.flat import digests
from phi2.files import one_line, read_json, write_whole
from phi2.hub import resolve
from phi2.inference.config import ModelConfig
from phi2.runs.config import RunConfig
from phi2.tokenizer import Tokenizer

FILE = "inputs.json"
SAMPLED = 1024  # numbers of a weight that its digest reads at least; of a matrix one in every row

Inputs = dict[str, str | None]  # what a person calls it -> its digest, None where it cannot be known


def inputs_of(
    config: RunConfig,
    tokenizer: Tokenizer,
    rows: Sequence[Encoded],
    eval_rows: Sequence[Encoded],
    dtype: torch.dtype,
    from_scratch: bool = False,
) -> Inputs:
    """Digests of what every run depends on."""
    data, evaluation = digests(rows), {"evaluation data": "".join(digests(eval_rows))} if eval_rows else {}
    adapter = {} if config.adapter is None else {"adapter": digest_of_adapter(resolve(config.adapter))}
    return {
        "data": data.tokens,
        "columns of the data": data.columns,
        **evaluation,
        **start_of(config, from_scratch),
        **adapter,
        "tokenizer": digest_of_tokenizer(config, tokenizer),
        "chat template": digest_of_texts([tokenizer.chat_template or ""]),
        "compute dtype": str(dtype),
    }


def start_of(config: RunConfig, from_scratch: bool) -> Inputs:
    """The weights a run begins with, whether or not they train; a run from random ones has only their shapes."""
    folder = resolve(config.model)
    if from_scratch:
        return {"start model": digest_of_texts([_content(folder / "config.json")])}
    return {"start model" if config.lora is None else "base model": digest_of_model(folder)}


def require_same_inputs(run: Path, now: Inputs, resumed: bool) -> None:
    """Writes down what a run begins with; when it is resumed, compares. What cannot be compared is told.

    Raises:
        ValueError: naming what has changed since.
    """
    if resumed:
        require_same(run, _read(run), now)
    else:
        (run / FILE).unlink(missing_ok=True)
    note_inputs(run, now)


def require_same(run: Path, before: Inputs, now: Inputs) -> None:
    """Compares what a run began with and what it finds now. What cannot be compared is told.

    Raises:
        ValueError: naming what has changed since.
    """
    unknown = [name for name in now if not _alike(before.get(name), now[name])]
    changed = [name for name in now if name not in unknown and before[name] != now[name]]
    if changed:
        kept = run / "loss.py"
        way = f"; the file of its losses, as it was, is {kept}" if "loss" in changed and kept.is_file() else ""
        told = " and the ".join(changed)
        raise ValueError(f"{run}: the {told} changed since this run began; it cannot be resumed{way}")
    if unknown:
        what = " and the ".join(unknown)
        warnings.warn(f"{run}: whether the {what} changed since this run began is not known", stacklevel=3)


def note_inputs(run: Path, inputs: Inputs) -> None:
    """Puts those of the digests that are known into inputs.json."""
    known = {name: digest for name, digest in inputs.items() if digest is not None}
    write_whole(run / FILE, json.dumps(_read(run) | known, indent=1))


def _read(run: Path) -> Inputs:
    return read_json(run / FILE) if (run / FILE).exists() else {}


def _alike(digest: str | None, other: str | None) -> bool:
    """Whether both are known and made in the same way, which stands before the colon: others do not tell a change."""
    if digest is None or other is None:
        return False
    return digest.rpartition(":")[0] == other.rpartition(":")[0]


def digest_of_texts(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def digest_of_tokenizer(config: RunConfig | ModelConfig, tokenizer: Tokenizer) -> str:
    """Of `tokenizer.json`, beside the adapter where there is one, and of the ids that begin, end and pad a text."""
    folders = [resolve(name) for name in (config.adapter, config.model) if name is not None]
    path = next(folder / "tokenizer.json" for folder in folders if (folder / "tokenizer.json").is_file())
    return digest_of_texts([_content(path), repr((tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))])


def digest_of_model(folder: Path) -> str | None:
    """Of a checkpoint as it lies in its files, None without weights. How tensors are spread over files does not count.

    Raises:
        ValueError: naming the file that is damaged.
    """
    single = folder / "model.safetensors"
    return _digest_of_files(folder / "config.json", [single] if single.is_file() else folder.glob("model*.safetensors"))


def digest_of_adapter(folder: Path) -> str | None:
    """Of an adapter as it lies in its files, None without weights.

    Raises:
        ValueError: naming the file that is damaged.
    """
    return _digest_of_files(folder / "adapter_config.json", folder.glob("adapter_model.safetensors"))


def _digest_of_files(config: Path, weights: Iterable[Path]) -> str | None:
    """Of the configuration, and of each tensor's name, shape, dtype and evenly spaced numbers."""
    samples = {name: sample for path in weights for name, sample in _samples(path).items()}
    if not samples:
        return None
    digest = hashlib.sha256(_content(config).encode() if config.is_file() else b"")
    for name in sorted(samples):
        digest.update(name.encode() + samples[name])
    return f"files:{digest.hexdigest()}"


def _content(path: Path) -> str:
    """A JSON file, however it is laid out."""
    return json.dumps(read_json(path), sort_keys=True)


def _samples(path: Path) -> dict[str, bytes]:
    """Shape, dtype and some numbers of each tensor; only the pages that hold these are read."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _sample(file.get_tensor(name)) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged ({one_line(error)})") from error


def _sample(tensor: torch.Tensor) -> bytes:
    numbers = tensor.flatten()
    width = tensor.shape[-1] if tensor.ndim > 1 else len(numbers)
    taken = numbers[:: max(1, min(len(numbers) // SAMPLED, width))].contiguous().view(torch.uint8)
    return f"{tuple(tensor.shape)} {tensor.dtype}".encode() + taken.numpy().tobytes()
