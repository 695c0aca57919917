"""Adapters on disk in peft's form: a folder of `adapter_config.json` and `adapter_model.safetensors`.

The key of a tensor is `base_model.model.` and the parameter's name. An adapter on `lm_head` brings the head's own
weight and bias along (`lm_head.base_layer.*`), because peft's users often resize the vocabulary before they train one.
The metadata of the safetensors file, which peft does not look at, tells the base it was trained on (`same_base.py`).
A whole embedding or head (peft's `modules_to_save`, or what a resized vocabulary leaves) takes the place of the
model's. Everything else that peft can put in such a folder and that would change the result (DoRA, PiSSA, ...) is
refused by name, and what we do not know is named.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from phi2.checkpoints.same_base import is_same_base, sample_of_base
from phi2.files import one_line, read_json, whole_file
from phi2.hub import of_a_run
from phi2.lora import DEFAULT, adapter_state, insert, lora_modules
from phi2.lora_config import LoraConfig
from phi2.lora_targets import target_names
from phi2.model import Phi2ForCausalLM

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_SAVED_COPY = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.(weight|bias)$)")  # beside it stands what it was copied from
BASE_SAMPLE = "phi2_base_sample"  # key of the metadata
HEAD = "lm_head"
HEAD_WEIGHT, HEAD_BIAS = f"{HEAD}.base_layer.weight", f"{HEAD}.base_layer.bias"

NEEDED_FIELDS = ("r", "lora_alpha", "target_modules")  # peft's defaults for them have changed, or depend on the model
ALLOWED = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    # Other ways to begin (pissa, olora, corda, loftq, lora_ga) change the base weight too, which is not in the folder.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva", "mica"),
}
MUST_BE_OFF = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "trainable_token_indices",
    "target_parameters",
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
WITHOUT_EFFECT = (  # on what an adapter computes, unless a field above is on
    "alora_invocation_tokens auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config"
    " inference_mode loftq_config lora_ga_config megatron_core modules_to_save peft_version qalora_group_size revision"
    " runtime_config task_type"
).split()
OTHER_TENSORS = {"model.embed_tokens.lora_embedding_A": "LoRA on embed_tokens"}  # a feature that only shows here
EMBEDDING = "model.embed_tokens.weight"
WHOLE = {"lm_head": (f"{HEAD}.weight", f"{HEAD}.bias"), "embed_tokens": (EMBEDDING,)}  # what peft may save as it is


def save_adapter(model: Phi2ForCausalLM, folder: str | Path, base_model_name_or_path: str) -> None:
    """Writes the model's adapter as peft would; an adapter that was there stays whole until the new one is.

    Args:
        model: with an adapter.
        folder: made if need be; its other files are left alone.
        base_model_name_or_path: what the adapter was trained on, for whoever loads it.

    Raises:
        ValueError: when the model has no adapter, or one that brought parts of its own; or `folder` is a file.
    """
    if model.lora_config is None:
        raise ValueError("the model has no adapter to save")
    if model.brought_by_adapter:
        raise ValueError(f"the adapter brought its own {', '.join(model.brought_by_adapter)}: merge it into its base")
    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder}: must be a folder, and is a file")
    state = adapter_state(model)
    head = lora_modules(model).get(HEAD)
    if head is not None and head.weight.is_floating_point():
        state |= {HEAD_WEIGHT: head.weight.detach(), HEAD_BIAS: head.bias.detach()}
    tensors = {PREFIX + name: tensor.contiguous().cpu() for name, tensor in state.items()}
    metadata = {"format": "pt", BASE_SAMPLE: sample_of_base(model)}
    folder.mkdir(parents=True, exist_ok=True)
    config = _config_to_write(model.lora_config, base_model_name_or_path)
    with whole_file(folder / CONFIG_FILE) as config_file, whole_file(folder / WEIGHTS_FILE) as weights_file:
        # Not save_file: it leaves the file unreadable to all but its owner.
        weights_file.write_bytes(_in_order(safetensors.torch.save(tensors, metadata)))
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _in_order(content: bytes) -> bytes:
    """A safetensors file with the keys of its header in order: safetensors writes those of metadata in any."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def require_adapter(folder: Path) -> None:
    """Refuses a folder that holds no adapter, before anything large is read for it.

    Raises:
        FileNotFoundError: saying where the adapter is, when the folder is that of a run.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file{of_a_run(folder)}")


def load_adapter(
    model: Phi2ForCausalLM, folder: str | Path, trainable: bool = False, adapter_name: str = DEFAULT
) -> None:
    """Freezes the model and puts the adapter of a folder on it; the model is untouched when anything is wrong.

    Warns when the adapter was trained on other weights, where `save_adapter` wrote it.

    When the adapter brings its own `lm_head` or `embed_tokens`, they replace the model's. If they have another number
    of rows, the vocabulary is resized to it, with a warning where one of the two is not in the folder. Fewer rows: its
    last rows are dropped, as peft's user did before training (51200 to 50297 for ChatML on Phi-2). More rows: the added
    ones become the mean of the others, as transformers starts them; their exact values are not in the folder.

    Args:
        model: what the adapter was trained on.
        folder: written by `save_adapter` or by peft.
        trainable: whether the adapter is to be trained further.
        adapter_name: what it is called among the adapters of the model; it is the active one from now on.

    Raises:
        FileNotFoundError: when one of the two files is missing.
        ValueError: one line naming the file: not readable, unsupported features, or tensors missing, unexpected or of
            another shape; or when the model has an adapter of that name already.
    """
    if adapter_name in model.adapters:
        raise ValueError("the model has an adapter already: merge it first")
    folder = Path(folder)
    require_adapter(folder)
    raw, tensors = read_json(folder / CONFIG_FILE), _read_tensors(folder / WEIGHTS_FILE)
    _refuse_other_features(raw, tensors, folder)
    config = _config_of(raw, folder / CONFIG_FILE)
    names = [name for name in target_names(model, config) if name.rpartition(".")[2] not in _saved(raw)]
    if not names:
        raise ValueError(f"{folder / CONFIG_FILE}: target_modules {raw['target_modules']} match no layer of the model")
    whole = [name for part, group in WHOLE.items() for name in group if name in tensors or part in _saved(raw)]
    if whole and trainable:
        raise ValueError(f"{folder}: brings its own {', '.join(whole)}, not to be trained on: merge it into its base")
    _check_tensors(tensors, _expected_shapes(model, config, names, tensors, whole), folder / WEIGHTS_FILE)
    given = {n.replace(".base_layer", ""): tensors.pop(n) for n in (*whole, HEAD_WEIGHT, HEAD_BIAS) if n in tensors}
    _require_replaceable(model, given, folder)
    _warn_of_another_base(model, folder, raw)
    if given:
        _replace_vocabulary(model, given, folder)
    insert(model, config, names, adapter_name)
    model.brought_by_adapter = tuple(whole)
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
    with _readable(path):
        tensors = safetensors.torch.load_file(path)
    tensors = {key: tensor for key, tensor in tensors.items() if ".original_module." not in key}
    return {_SAVED_COPY.sub("", key.removeprefix(PREFIX)): tensor for key, tensor in tensors.items()}


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What is read inside it is there and whole, or the error says so in one line."""
    if not path.is_file():
        pickled = path.with_name(PICKLE_FILE).is_file()
        hint = f" ({PICKLE_FILE} is a pickle, which is never read: save it again with a newer peft)" if pickled else ""
        raise FileNotFoundError(f"{path}: no such file{hint}")
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({one_line(error)})") from error


def is_base_of(model: nn.Module, folder: Path) -> bool | None:
    """Whether the adapter of a folder was trained on these weights; None where its file does not tell.

    Raises:
        FileNotFoundError: without weights in the folder.
        ValueError: when they are not a safetensors file.
    """
    path = folder / WEIGHTS_FILE
    with _readable(path), safe_open(path, framework="pt") as file:
        sample = (file.metadata() or {}).get(BASE_SAMPLE)
    return None if sample is None else is_same_base(model, sample)


def _warn_of_another_base(model: nn.Module, folder: Path, raw: dict[str, Any]) -> None:
    if is_base_of(model, folder) is False:
        name = raw.get("base_model_name_or_path")
        warnings.warn(f"{folder}: trained on {name}, whose weights differ from those of this model", stacklevel=3)


def _refuse_other_features(raw: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """Whatever we would compute otherwise than peft does, all of it in one line; what we do not know is named."""
    refused = [f"{key} {raw[key]!r}" for key, allowed in ALLOWED.items() if raw.get(key, allowed[0]) not in allowed]
    refused += [f"{key} {raw[key]!r}" for key in MUST_BE_OFF if raw.get(key)]
    refused += [f"modules_to_save {name!r}" for name in _saved(raw) if name not in WHOLE]
    for name, feature in OTHER_TENSORS.items():
        refused += [feature] if name in tensors else []
    if refused:
        raise ValueError(f"{folder}: not supported: {'; '.join(refused)} (merge this adapter into its base with peft)")
    known = {*ALLOWED, *MUST_BE_OFF, *WITHOUT_EFFECT, *(f.name for f in fields(LoraConfig))}
    unknown = [f"{key} {value!r}"[:80] for key, value in raw.items() if value and key not in known]
    if unknown:
        warnings.warn(f"{folder / CONFIG_FILE}: not read: {', '.join(unknown)}", stacklevel=3)


def _saved(raw: dict[str, Any]) -> list[str]:
    """The last parts of the names under `modules_to_save`."""
    return [str(name).rpartition(".")[2] for name in raw.get("modules_to_save") or ()]


def _config_of(raw: dict[str, Any], path: Path) -> LoraConfig:
    missing = [key for key in NEEDED_FIELDS if raw.get(key) is None]
    if missing:
        raise ValueError(f"{path}: missing {', '.join(missing)}")
    try:
        return LoraConfig(**{f.name: raw[f.name] for f in fields(LoraConfig) if raw.get(f.name) is not None})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _expected_shapes(
    model: Phi2ForCausalLM, config: LoraConfig, names: list[str], tensors: dict[str, Tensor], whole: list[str]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything the weights file must hold; the file decides how large the vocabulary is."""
    given = next((tensors[name] for name in (*whole, HEAD_WEIGHT) if name in tensors), None)
    vocabulary = model.lm_head.weight.shape[:1] if given is None else given.shape[:1]
    columns = model.lm_head.in_features
    shapes = {name: (*vocabulary,) if name.endswith("bias") else (*vocabulary, columns) for name in whole}
    for name in names:
        linear, r = model.get_submodule(name), config.rank(name)
        rows = vocabulary if name == HEAD else (linear.out_features,)
        if name == HEAD and HEAD_WEIGHT in tensors:
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


def _require_replaceable(model: Phi2ForCausalLM, given: dict[str, Tensor], folder: Path) -> None:
    """A model that others count on keeps its embedding and head, and one that is quantised has no place for these."""
    own = model.state_dict()
    other = [name for name, tensor in given.items() if model.adapters and not _is_same(tensor, own[name])]
    if other:
        raise ValueError(f"{folder}: brings its own {', '.join(other)}, not for a model with other adapters")
    quantised = [name for name in given if not own[name].is_floating_point()]
    if quantised:
        raise ValueError(f"{folder}: brings its own {', '.join(quantised)}: load it before the model is quantised")


def _is_same(tensor: Tensor, own: Tensor) -> bool:
    return tensor.shape == own.shape and torch.equal(tensor.to(own), own)


def _replace_vocabulary(model: Phi2ForCausalLM, given: dict[str, Tensor], folder: Path) -> None:
    """Gives the model this embedding or head or both, and as many rows to what is not given."""
    rows, had = len(next(iter(given.values()))), model.config.vocab_size
    for name in (EMBEDDING, f"{HEAD}.weight", f"{HEAD}.bias"):
        module_name, _, attribute = name.rpartition(".")
        module = model.get_submodule(module_name)
        old = getattr(module, attribute).detach()
        if name in given:
            setattr(module, attribute, nn.Parameter(given[name].to(old, copy=True)))
        elif rows != had:
            setattr(module, attribute, nn.Parameter(resized(old, rows)))
            if attribute == "weight":
                _warn_of_resizing(folder, "embeddings" if name == EMBEDDING else "rows of the head", rows, had)
    model.model.embed_tokens.num_embeddings = model.lm_head.out_features = rows
    model.config = model.model.config = replace(model.config, vocab_size=rows)


def resized(old: Tensor, rows: int) -> Tensor:
    """The first `rows` rows; those that are new are the mean of all the old ones."""
    added = old.float().mean(0, keepdim=True).to(old).expand(max(rows - len(old), 0), *old.shape[1:])
    return torch.cat((old[:rows], added))


def _warn_of_resizing(folder: Path, what: str, rows: int, had: int) -> None:
    told = f"the last {what} are dropped" if rows < had else f"the added {what} are the mean of the others"
    warnings.warn(f"{folder}: trained with {rows} vocabulary rows, the model has {had}: {told}", stacklevel=5)
