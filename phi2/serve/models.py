"""What an endpoint serves: one base, and adapters on it, each a model with a name of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from phi2.hub import resolve
from phi2.model import Phi2ForCausalLM
from phi2.serve.bases import Base, adapter_folder, require_distinct, split_name
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
        adapters: each NAME=FOLDER, to be served as NAME, or a folder or hub id alone.
        adapter: one that is part of `model`, as in `phi2.load`.

    Raises:
        FileNotFoundError: when a folder or a file is missing.
        ValueError: for names that are given twice, and adapters that `Base.add` refuses.
    """
    if adapters and adapter is not None:
        raise ValueError("adapter makes it part of the model, adapters serve it beside the model: give one of them")
    given = [split_name(text) for text in adapters]
    require_distinct([model, *(name for name, _ in given)])
    folders = {name: adapter_folder(path_or_id) for name, path_or_id in given}
    base = Base(model, resolve(model), device=device, dtype=dtype, adapter=adapter, quantize=quantize)
    for name, folder in folders.items():
        base.add(name, folder)
    names = {model: None if adapter is None else base.model.active_adapter}
    return Served(base.model, base.tokenizer, names | {name: name for name in folders})
