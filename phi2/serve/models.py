"""What an endpoint serves: one base, and adapters on it, each a model with a name of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from phi2.checkpoints.peft_files import load_adapter, require_adapter
from phi2.checkpoints.weights import load, load_tokenizer
from phi2.hub import resolve
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Served:
    """A model and what it is called.

    Attributes:
        adapters: by the name of a served model, the adapter that it computes; None: the base alone.
    """

    model: Phi2ForCausalLM
    tokenizer: Tokenizer
    adapters: dict[str, str | None]


def load_served(
    model: str,
    adapters: Sequence[str] = (),
    *,
    adapter: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
) -> Served:
    """Loads a base once, and every adapter beside the others.

    All are read with one tokenizer: the adapters', where they bring one, else the base's.

    Args:
        model: folder or hub id, which is also the name it is served by.
        adapters: each NAME=PATH_OR_ID, to be served as NAME.
        adapter: one that is part of `model`, as in `phi2.load`.

    Raises:
        FileNotFoundError: when a folder or a file is missing.
        ValueError: for names that are given twice, tokenizers that differ, and whatever `load_adapter` refuses.
    """
    if adapters and adapter is not None:
        raise ValueError("adapter makes it part of the model, adapters serve it beside the model: give one of them")
    folders = {name: resolve(path) for name, path in _named(adapters, model).items()}
    for folder in folders.values():
        require_adapter(folder)
    loaded, tokenizer = load(model, device, dtype, adapter=adapter, quantize=quantize)
    for name, folder in folders.items():
        load_adapter(loaded, folder, adapter_name=name)
        if loaded.brought_by_adapter:
            brought = ", ".join(loaded.brought_by_adapter)
            raise ValueError(f"{folder}: brings its own {brought}: merge it and serve it alone")
    tokenizer = _common_tokenizer(resolve(model), list(folders.values())) or tokenizer
    if len(tokenizer) > (rows := loaded.config.vocab_size):
        raise ValueError(f"the adapters' tokenizer has {len(tokenizer)} ids, more than the {rows} embedding rows")
    names = {model: None if adapter is None else loaded.active_adapter}
    return Served(loaded, tokenizer, names | {name: name for name in folders})


def _common_tokenizer(base: Path, adapters: Sequence[Path]) -> Tokenizer | None:
    """The tokenizer of those adapters that bring one."""
    bringing = [folder for folder in adapters if (folder / "tokenizer.json").is_file()]
    found = [load_tokenizer(base, folder) for folder in bringing]
    for folder, other in zip(bringing, found, strict=True):
        first = found[0]
        if (other.backend.to_str(), other.chat_template) != (first.backend.to_str(), first.chat_template):
            raise ValueError(f"{folder}: its tokenizer or chat template is not that of {bringing[0]}: serve it alone")
    return found[0] if found else None


def _named(adapters: Sequence[str], model: str) -> dict[str, str]:
    """By name, the folder or hub id."""
    named: dict[str, str] = {}
    for text in adapters:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ValueError(f"adapters must be NAME=PATH_OR_ID each, got {text!r}")
        if name in named or name == model:
            raise ValueError(f"adapters: two models would be called {name!r}")
        named[name] = path
    return named
