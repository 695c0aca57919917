"""A model in memory, and the adapters that stand on it by name: what the endpoint and the page both load."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from phi2.checkpoints.peft_files import load_adapter, require_adapter
from phi2.checkpoints.weights import load, load_tokenizer
from phi2.hub import resolve
from phi2.tokenizer import Tokenizer

NAMED = re.compile(r"([\w./-]+)=(.+)")  # NAME=FOLDER
OF_A_RUN = ("adapter", "model", "merged")  # folders of a run, which is what it is called by


class Base:
    """A model and its adapters, which share its weights.

    Args:
        loading: the other arguments of `phi2.load`.

    Attributes:
        tokenizer: what the adapters bring, where they bring one, else the base's.
        adapters: names, in the order in which they came.
    """

    def __init__(self, name: str, folder: Path, **loading: Any) -> None:
        self.name, self.folder = name, folder
        self.model, self.tokenizer = load(folder, **loading)
        self.adapters: list[str] = []
        self._brought_by: Path | None = None  # whose tokenizer it is

    def add(self, name: str, folder: Path) -> None:
        """Puts an adapter beside the others. What it was trained to read is what the base reads from now on.

        Raises:
            ValueError: for an adapter that reads otherwise than another one, or changes the base for all of them.
        """
        self._take_tokenizer(folder)
        head = self.model.lm_head.weight
        load_adapter(self.model, folder, adapter_name=name)
        if not _same_rows(head, self.model.lm_head.weight) or self.model.brought_by_adapter:
            raise ValueError(f"{folder}: brings a head or embedding of its own: merge it, and give that as a model")
        rows = self.model.config.vocab_size
        if len(self.tokenizer) > rows:
            raise ValueError(f"{folder}: its tokenizer has {len(self.tokenizer)} ids, more than {rows} embedding rows")
        self.adapters.append(name)

    def _take_tokenizer(self, folder: Path) -> None:
        if not (folder / "tokenizer.json").is_file():
            return
        tokenizer = load_tokenizer(self.folder, folder)
        if self._brought_by is not None and _reads(tokenizer) != _reads(self.tokenizer):
            raise ValueError(f"{folder}: its tokenizer or chat template is not that of {self._brought_by}")
        self.tokenizer, self._brought_by = tokenizer, folder


def split_name(given: str) -> tuple[str, str]:
    """A name and a folder or hub id, of `NAME=FOLDER` or of a folder alone, whose name is the last that tells one."""
    match = None if Path(given).exists() else NAMED.fullmatch(given)
    if match:
        return match[1], match[2]
    parts = [part for part in Path(given).absolute().parts if part not in OF_A_RUN]
    return parts[-1], given


def require_distinct(names: Sequence[str]) -> None:
    """Raises ValueError when two models would go by one name."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two models are called {', '.join(twice)}: name them, as in NAME=FOLDER")


def adapter_folder(path_or_id: str) -> Path:
    """The folder of an adapter, given as it is or by its run.

    Raises:
        FileNotFoundError: when there is none.
    """
    folder = resolve(path_or_id)
    inner = folder / "adapter" if (folder / "adapter").is_dir() else folder
    require_adapter(inner)
    return inner


def _reads(tokenizer: Tokenizer) -> tuple[str, str | None]:
    """What decides which ids a conversation becomes."""
    return tokenizer.backend.to_str(), tokenizer.chat_template


def _same_rows(weight: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether they agree in the rows that both have."""
    rows = min(len(weight), len(other))
    return torch.equal(weight[:rows], other[:rows])
