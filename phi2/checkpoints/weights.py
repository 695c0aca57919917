"""Checkpoints in and out: Hugging Face's layout of safetensors shards beside `config.json` and the tokenizer's files.

Loading builds the model without memory (on torch's meta device), compares the files' headers with it, and only then
reads: one tensor at a time, straight to its device and dtype. Saving writes a new folder under a temporary name and
renames it when it is complete, so that a full disk or a Ctrl-C leaves nothing half-written behind.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from phi2.checkpoints.layouts import refuse_older_layouts
from phi2.checkpoints.peft_files import load_adapter, require_adapter
from phi2.config import Phi2Config
from phi2.files import one_line, read_json, require_folder, whole_folder
from phi2.hub import of_a_run, resolve
from phi2.lora import merge
from phi2.model import Phi2ForCausalLM
from phi2.quantize import quantize_model
from phi2.text.tokenizer_files import read_stop_ids
from phi2.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT_FORMATS = ("F64", "F32", "BF16", "F16")  # safetensors' names
INDEX = "model.safetensors.index.json"
GENERATION_KEYS = frozenset(  # of generation_config.json: read, or without influence on the text
    "bos_token_id eos_token_id pad_token_id decoder_start_token_id transformers_version _from_model_config use_cache"
    " cache_implementation cache_config return_legacy_cache output_attentions output_hidden_states output_scores"
    " output_logits return_dict_in_generate".split()
)
NEUTRAL = {"top_k": 50, "max_length": 20} | dict.fromkeys(  # what transformers takes where the file says nothing
    "temperature top_p typical_p repetition_penalty encoder_repetition_penalty length_penalty num_beams num_beam_groups"
    " num_return_sequences".split(),
    1,
)


class StoredTensor(NamedTuple):
    """What a safetensors header says about one tensor."""

    path: Path
    shape: tuple[int, ...]
    format: str


def load(
    path_or_id: str | Path,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = "auto",
    revision: str | None = None,
    adapter: str | Path | None = None,
    quantize: str | None = None,
) -> tuple[Phi2ForCausalLM, Tokenizer]:
    """A model in eval mode and its tokenizer.

    Args:
        path_or_id: folder, hub id, "nano" or "nano-instruct".
        device: "auto" (CUDA where there is one, else the CPU) or a torch device.
        dtype: see `pick_dtype`; None keeps every tensor as it is stored, for a model that is only saved again.
        revision: branch, tag or commit of a hub repository.
        adapter: folder or hub id of a LoRA adapter in PEFT's format, attached to the model. A tokenizer beside it is
            the one it was trained with, and is used in place of the model's.
        quantize: "int8" or "int4" for a model that only generates, see `phi2.quantize`. An adapter is merged first,
            and "auto" then means bfloat16 on a CPU too.

    Raises:
        FileNotFoundError: when the folder or one of its files is not there.
        ValueError: when a file is damaged or does not describe a Phi; the message names it.
    """
    folder = resolve(path_or_id, revision)
    adapter_folder = None if adapter is None else resolve(adapter)
    load_config(folder)  # before a tokenizer is missed: this knows what else the folder may be
    tokenizer = load_tokenizer(folder, adapter_folder)
    _name_unused_generation_settings(folder)
    device = pick_device(device)
    if quantize is not None and dtype == "auto" and device.type == "cpu":
        dtype = torch.bfloat16  # what torch's packed kernels take
    dtype = None if dtype is None else pick_dtype(dtype, device)
    model = load_model(folder, device if quantize is None else "cpu", dtype)
    if adapter_folder is not None:
        load_adapter(model, adapter_folder)
    rows = model.config.vocab_size
    if len(tokenizer) > rows:
        raise ValueError(f"{folder}: the tokenizer has {len(tokenizer)} ids, more than the {rows} embedding rows")
    if quantize is not None:
        if adapter_folder is not None:
            merge(model)
        quantize_model(model, quantize, device)
    return model, tokenizer


def _name_unused_generation_settings(folder: Path) -> None:
    """Warns of what transformers' generate would do by `generation_config.json` and `generate` here does not."""
    path = folder / "generation_config.json"
    given = read_json(path) if path.is_file() else {}
    unused = [f"{k} {v!r}"[:60] for k, v in given.items() if v and k not in GENERATION_KEYS and v != NEUTRAL.get(k)]
    if unused:
        warnings.warn(f"{path}: not used unless you give it: {', '.join(unused)}", stacklevel=3)


def load_tokenizer(folder: Path, adapter: Path | None = None) -> Tokenizer:
    """The tokenizer an adapter was trained with, where its folder holds one, else the model's. All ends of both count.

    Raises:
        FileNotFoundError: when there is no tokenizer, or no adapter in its folder.
        ValueError: naming the file that is damaged.
    """
    if adapter is None:
        return Tokenizer.from_folder(folder)
    require_adapter(adapter)
    if not (adapter / "tokenizer.json").is_file():
        return Tokenizer.from_folder(folder)
    tokenizer = Tokenizer.from_folder(adapter)
    return tokenizer.with_stop_ids(read_stop_ids(folder, len(tokenizer)))


def load_config(folder: str | Path) -> Phi2Config:
    """Reads `config.json`.

    Raises:
        FileNotFoundError: without one.
        ValueError: one line naming the file and the field; for a LoRA adapter, what to do instead.
    """
    path = Path(folder) / "config.json"
    if path.is_file():
        return Phi2Config.from_dict(read_json(path), where=str(path))
    if (path.parent / "adapter_config.json").is_file():
        raise ValueError(f"{folder} is a LoRA adapter: give its base model as the model, and this folder as --adapter")
    raise FileNotFoundError(f"no config.json in {folder}{of_a_run(path.parent)}")


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = "auto"
) -> Phi2ForCausalLM:
    """Loads the weights of a folder into a new model in eval mode, every parameter trainable.

    The vocabulary size is the number of embedding rows (Phi-2 has 51200, ChatML fine-tunes often 50297), whatever
    `config.json` says. Parameters are copies, never views of the file, so the file may be replaced while the model
    lives. Peak memory is the weights and one tensor. A dtype of None keeps that of each tensor.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when a file is damaged, of an older layout, or its tensors are not this model's.
    """
    folder, device = Path(folder), pick_device(device)
    dtype = None if dtype is None else pick_dtype(dtype, device)
    config, stored = load_config(folder), _stored_tensors(folder)
    refuse_older_layouts(folder, stored)
    config = _with_stored_rows(config, stored)
    with torch.device("meta"):
        model = Phi2ForCausalLM(config)
    _check_fit(folder, model.state_dict(), stored)
    state = {name: _read(name, tensor.path, device, dtype) for name, tensor in stored.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def load_shape(folder: str | Path) -> Phi2Config:
    """The shape of the model that `load_model` would give, from the headers of its files.

    Raises:
        FileNotFoundError, ValueError: as `load_config`, and for weights that are missing or damaged.
    """
    return _with_stored_rows(load_config(folder), _stored_tensors(Path(folder)))


def _with_stored_rows(config: Phi2Config, stored: dict[str, StoredTensor]) -> Phi2Config:
    embedding = stored.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        return config
    return replace(config, vocab_size=embedding.shape[0])


def save_pretrained(
    model: Phi2ForCausalLM,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a folder that transformers 4 and 5 and `load` read: weights, config, generation config, tokenizer.

    Args:
        max_shard_size: bytes, or text such as "5GB"; a larger model becomes several files and an index.
        dtype: of the stored weights; None keeps that of each.
        overwrite: replace a folder that already holds a model, once the new one is complete.

    Raises:
        ValueError: when LoRA is attached, the model is quantised, or `folder` is not empty and may not be replaced.
        OSError: when the disk is full; the folder is then as it was before.
    """
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("the model has LoRA attached: merge it before saving, or save the adapter alone")
    state = model.state_dict()
    if not all(tensor.is_floating_point() for tensor in state.values()):
        raise ValueError(
            "the model is quantised: this layout holds floating-point weights only, save it before quantising"
        )
    dtypes = {name: tensor.dtype if dtype is None else _named_dtype(dtype) for name, tensor in state.items()}
    limit = max(model.config.vocab_size, len(tokenizer))  # an end or pad beyond it went with the row it had
    pad = model.config.pad_token_id
    config = replace(
        model.config,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=None if pad is None or pad >= limit else pad,
        dtype=str(_most_common(state, dtypes)).removeprefix("torch."),
    )
    ends = sorted(end for end in tokenizer.stop_ids if end < limit)
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    with whole_folder(_place(Path(folder), overwrite)) as unfinished:
        _write_json(unfinished / "config.json", config.to_dict())
        _save_tensors(state, unfinished, max_shard_size, dtypes)
        tokenizer.save(unfinished)
        _write_json(unfinished / "generation_config.json", generation)  # with ends that the tokenizer has no token for


def pick_device(device: str | torch.device) -> torch.device:
    """A torch device; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: for a name torch does not know, or CUDA where there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {str(device)!r} is not here: torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """A torch dtype; "auto" depends on the device, not on the file.

    On CUDA it is bfloat16, or float16 where the hardware has none: Phi-2 was published in float16, in which its
    attention scores are known to overflow. On a CPU it is float32, the one dtype that every CPU computes quickly; ask
    for bfloat16 to halve the memory.

    Raises:
        ValueError: for any other than float32, bfloat16 and float16.
    """
    if dtype != "auto":
        return _named_dtype(dtype)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def _named_dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder by name, from the headers of its one file or of the shards its index names."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return _read_header(single)
    if not index.is_file():
        remedy = "convert .bin or .pt weights with transformers' save_pretrained(safe_serialization=True)"
        raise FileNotFoundError(f"{folder}: no model.safetensors and no {INDEX}; {remedy}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(v, str) and v == Path(v).name for v in weight_map.values()
    ):
        raise ValueError(f"{index}: weight_map must give each tensor the name of a file in the same folder")
    stored: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{index}: names the shard {shard}, which is not there")
        header = _read_header(folder / shard)
        disputed = header.keys() ^ {name for name, file in weight_map.items() if file == shard}
        disputed = [name for name in disputed if not _is_harmless(name)]
        if disputed:
            raise ValueError(f"{index}: disagrees with {shard} on what it holds: {_listed(sorted(disputed))}")
        stored |= header
    return stored


def _read_header(path: Path) -> dict[str, StoredTensor]:
    with _damage_named(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys() if not _is_harmless(name)}
        return {name: StoredTensor(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}


def _read(name: str, path: Path, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """One tensor, copied. The file is opened anew for each: pages of a mapping count as ours until it is closed."""
    with _damage_named(path), safe_open(path, framework="pt") as file:
        return file.get_tensor(name).to(device=device, dtype=dtype, copy=True)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged ({one_line(error)})") from error


def _is_harmless(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")  # a table some versions of transformers saved; it is computed here


def _check_fit(folder: Path, expected: dict[str, Tensor], stored: dict[str, StoredTensor]) -> None:
    both = expected.keys() & stored.keys()
    shapes = {name: (stored[name].shape, tuple(expected[name].shape)) for name in sorted(both)}
    faults = {
        "missing": [name for name in expected if name not in stored],
        "unexpected": [name for name in stored if name not in expected],
        "of another shape": [f"{name} {has} for {needs}" for name, (has, needs) in shapes.items() if has != needs],
        "not floating point": [
            f"{name} {stored[name].format}" for name in shapes if stored[name].format not in FLOAT_FORMATS
        ],
    }
    found = [f"{len(names)} {fault} ({_listed(names)})" for fault, names in faults.items() if names]
    if found:
        raise ValueError(f"{folder}: its tensors are not those of its config.json: {'; '.join(found)}")


def _listed(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _most_common(state: dict[str, Tensor], dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """The dtype that most of the numbers have."""
    numbers = Counter[torch.dtype]()
    for name, tensor in state.items():
        numbers[dtypes[name]] += tensor.numel()
    return numbers.most_common(1)[0][0]


def _save_tensors(
    state: dict[str, Tensor], folder: Path, max_shard_size: int | str, dtypes: dict[str, torch.dtype]
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    sizes = {name: torch.empty(tensor.shape, dtype=dtypes[name], device="meta") for name, tensor in state.items()}
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: state[name].to(device="cpu", dtype=dtypes[name]).contiguous() for name in names}
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file}: could not be written ({one_line(error)})") from error
        shutil.copymode(folder / "config.json", folder / file)  # safetensors lets only the owner read it
    if plan.is_sharded:
        _write_json(folder / INDEX, {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename})


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _place(folder: Path, overwrite: bool) -> Path:
    """Where a model may be written: nothing is there, or a model that may go."""
    folder = folder.expanduser().resolve()
    require_folder(folder)
    occupied = folder.exists() and any(folder.iterdir())
    if occupied and not overwrite:
        raise ValueError(f"{folder}: not empty; give another folder (in Python, overwrite=True replaces it)")
    if occupied and not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no model, so it is not replaced")
    return folder
