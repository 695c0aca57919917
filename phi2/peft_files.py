"""Adapters on disk in peft's form: a folder of `adapter_config.json` and `adapter_model.safetensors`.

The key of a tensor is `base_model.model.` and the parameter's name. An adapter on `lm_head` brings the head's own
weight and bias along (`lm_head.base_layer.*`), because peft's users often resize the vocabulary before they train one.
The metadata of the safetensors file, which peft does not look at, tells the base it was trained on (`same_base.py`).
Everything else that peft can put in such a folder and that would change the result (DoRA, PiSSA, whole modules, ...) is
refused by name.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from phi2.hub import of_a_run, one_line, read_json
from phi2.lora import LoraConfig, adapter_state, has_adapter, insert, lora_modules, target_names
from phi2.same_base import is_same_base, sample_of_base

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
BASE_SAMPLE = "phi2_base_sample"  # key of the metadata
HEAD = "lm_head"
HEAD_WEIGHT, HEAD_BIAS = f"{HEAD}.base_layer.weight", f"{HEAD}.base_layer.bias"

NEEDED_FIELDS = ("r", "lora_alpha", "target_modules")  # peft's defaults for them have changed, or depend on the model
ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # Other ways to begin (pissa, olora, corda, loftq, lora_ga) change the base weight too, which is not in the folder.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
MUST_BE_OFF = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
)
OTHER_TENSORS = {  # features that only show in the weights
    "model.embed_tokens.lora_embedding_A": "LoRA on embed_tokens",
    "model.embed_tokens.weight": "a whole embed_tokens, saved because the vocabulary was resized",
}


def save_adapter(model: nn.Module, folder: str | Path, base_model_name_or_path: str) -> None:
    """Writes the model's adapter as peft would; an adapter that was there stays whole until the new one is.

    Args:
        model: with an adapter.
        folder: made if need be; its other files are left alone.
        base_model_name_or_path: what the adapter was trained on, for whoever loads it.

    Raises:
        ValueError: when the model has no adapter, or `folder` is a file.
    """
    if not has_adapter(model):
        raise ValueError("the model has no adapter to save")
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: must be a folder, and is a file")
    state = adapter_state(model)
    head = lora_modules(model).get(HEAD)
    if head is not None:
        state |= {HEAD_WEIGHT: head.weight.detach(), HEAD_BIAS: head.bias.detach()}
    tensors = {PREFIX + name: tensor.contiguous().cpu() for name, tensor in state.items()}
    metadata = {"format": "pt", BASE_SAMPLE: sample_of_base(model)}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as staging:
        # Not save_file: it leaves the file unreadable to all but its owner.
        Path(staging, WEIGHTS_FILE).write_bytes(safetensors.torch.save(tensors, metadata))
        config = _config_to_write(model.lora_config, base_model_name_or_path)
        Path(staging, CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(Path(staging, name), folder / name)


def require_adapter(folder: Path) -> None:
    """Refuses a folder that holds no adapter, before anything large is read for it.

    Raises:
        FileNotFoundError: saying where the adapter is, when the folder is that of a run.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file{of_a_run(folder)}")


def load_adapter(model: nn.Module, folder: str | Path, trainable: bool = False) -> None:
    """Freezes the model and puts the adapter of a folder on it; the model is untouched when anything is wrong.

    Warns when the adapter was trained on other weights, where `save_adapter` wrote it.

    When the adapter brings its own `lm_head`, that head replaces the model's. If it has another number of rows, the
    vocabulary is resized to it, with a warning. Fewer rows: the last embeddings are dropped, as peft's user did before
    training (51200 to 50297 for ChatML on Phi-2). More rows: the added embeddings become the mean of the others, as
    transformers starts them; their exact values are not in the folder.

    Args:
        model: the `Phi2ForCausalLM` that the adapter was trained on, without an adapter.
        folder: written by `save_adapter` or by peft.
        trainable: whether the adapter is to be trained further.

    Raises:
        FileNotFoundError: when one of the two files is missing.
        ValueError: one line naming the file: not readable, unsupported features, or tensors missing, unexpected or of
            another shape; or when the model has an adapter already.
    """
    if has_adapter(model):
        raise ValueError("the model has an adapter already: merge it first")
    folder = Path(folder)
    require_adapter(folder)
    raw, tensors = read_json(folder / CONFIG_FILE), _read_tensors(folder / WEIGHTS_FILE)
    _refuse_other_features(raw, tensors, folder)
    config = _config_of(raw, folder / CONFIG_FILE)
    names = target_names(model, config)
    if not names:
        raise ValueError(f"{folder / CONFIG_FILE}: target_modules {raw['target_modules']} match no layer of the model")
    _check_tensors(tensors, _expected_shapes(model, config, names, tensors), folder / WEIGHTS_FILE)
    _warn_of_another_base(model, folder, raw)
    if HEAD_WEIGHT in tensors:
        _replace_head(model, tensors.pop(HEAD_WEIGHT), tensors.pop(HEAD_BIAS), folder)
    insert(model, config, names)
    for name, parameter in adapter_state(model).items():
        parameter.copy_(tensors[name])
    for module in lora_modules(model).values():
        module.lora_A.requires_grad_(trainable)
        module.lora_B.requires_grad_(trainable)


def restore_adapter(model: nn.Module, folder: str | Path) -> None:
    """Writes the adapter of a folder over the model's own, which must have the same layers and ranks.

    Raises:
        FileNotFoundError: when the weights are missing.
        ValueError: one line naming the file and the tensors that are missing, unexpected or of another shape.
    """
    path, state = Path(folder) / WEIGHTS_FILE, adapter_state(model)
    tensors = {
        name: tensor for name, tensor in _read_tensors(path).items() if not name.startswith(f"{HEAD}.base_layer")
    }
    _check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in state.items()}, path)
    for name, tensor in state.items():
        tensor.copy_(tensors[name])


def _config_to_write(config: LoraConfig, base_model_name_or_path: str) -> dict[str, Any]:
    """`adapter_config.json`: our fields, and those of peft that every version of it looks at."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model_name_or_path),
        "inference_mode": True,
        **asdict(config),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file on the CPU, by its parameter's name."""
    if not path.is_file():
        pickled = path.with_name(PICKLE_FILE).is_file()
        hint = f" ({PICKLE_FILE} is a pickle, which is never read: save it again with a newer peft)" if pickled else ""
        raise FileNotFoundError(f"{path}: no such file{hint}")
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({one_line(error)})") from error
    return {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}


def _warn_of_another_base(model: nn.Module, folder: Path, raw: dict[str, Any]) -> None:
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        sample = (file.metadata() or {}).get(BASE_SAMPLE)
    if sample is not None and not is_same_base(model, sample):
        name = raw.get("base_model_name_or_path")
        warnings.warn(f"{folder}: trained on {name}, whose weights differ from those of this model", stacklevel=3)


def _refuse_other_features(raw: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Whatever we would compute otherwise than peft does, all of it in one line; unknown fields pass."""
    refused = [f"{key} {raw[key]!r}" for key, allowed in ALLOWED.items() if raw.get(key, allowed[0]) not in allowed]
    refused += [f"{key} {raw[key]!r}" for key in MUST_BE_OFF if raw.get(key)]
    for name, feature in OTHER_TENSORS.items():
        refused += [feature] if name in tensors else []
    if refused:
        raise ValueError(f"{folder}: not supported: {'; '.join(refused)} (merge this adapter into its base with peft)")


def _config_of(raw: dict[str, Any], path: Path) -> LoraConfig:
    missing = [key for key in NEEDED_FIELDS if raw.get(key) is None]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    try:
        return LoraConfig(**{f.name: raw[f.name] for f in fields(LoraConfig) if raw.get(f.name) is not None})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _expected_shapes(
    model: nn.Module, config: LoraConfig, names: list[str], tensors: dict[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything the weights file must hold."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        linear, r = model.get_submodule(name), config.rank(name)
        rows = (linear.out_features,)
        if name == HEAD and HEAD_WEIGHT in tensors:
            rows = tensors[HEAD_WEIGHT].shape[:1]  # the head in the file decides how large the vocabulary is
            shapes |= {HEAD_WEIGHT: (*rows, linear.in_features), HEAD_BIAS: (*rows,)}
        shapes |= {f"{name}.lora_A.weight": (r, linear.in_features), f"{name}.lora_B.weight": (*rows, r)}
    return shapes


def _check_tensors(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], path: Path) -> None:
    problems = {
        "missing": [name for name in shapes if name not in tensors],
        "unexpected": [name for name in tensors if name not in shapes],
        "of the wrong shape": [
            f"{name} {tuple(tensors[name].shape)}, not {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    told = [f"{len(found)} tensors {what}: {_some(found)}" for what, found in problems.items() if found]
    if told:
        raise ValueError(f"{path}: does not fit adapter_config.json and the model: {'; '.join(told)}")


def _some(items: list[str], most: int = 4) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _replace_head(model: nn.Module, weight: Tensor, bias: Tensor, folder: Path) -> None:
    """Gives the model this `lm_head`, and the embedding as many rows."""
    head = model.lm_head
    if len(weight) != model.config.vocab_size:
        _resize_embedding(model, len(weight), folder)
    head.out_features = len(weight)
    head.weight = nn.Parameter(weight.to(head.weight, copy=True))
    head.bias = nn.Parameter(bias.to(head.bias, copy=True))


def _resize_embedding(model: nn.Module, rows: int, folder: Path) -> None:
    had, embedding = model.config.vocab_size, model.model.embed_tokens
    model.config = model.model.config = replace(model.config, vocab_size=rows)
    what = "the last embeddings are dropped" if rows < had else "the added embeddings are the mean of the others"
    warnings.warn(f"{folder}: trained with {rows} vocabulary rows, the model has {had}: {what}", stacklevel=4)
    old = embedding.weight.detach()
    added = old.float().mean(0, keepdim=True).to(old).expand(max(rows - had, 0), -1)
    embedding.weight = nn.Parameter(torch.cat((old[:rows], added)))  # (rows, C)
    embedding.num_embeddings = rows
