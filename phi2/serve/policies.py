"""The models that answer side by side: policies by name, of which those on one base share its weights.

A base is held once. An adapter stands on the first base that it was trained on, which its file tells (`same_base.py`);
so a DPO run and the reference it started from are one model in memory and two policies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from phi2.checkpoints.peft_files import is_base_of, load_adapter, require_adapter
from phi2.checkpoints.weights import load, load_tokenizer
from phi2.evaluation.models import find
from phi2.hub import resolve
from phi2.inference.engine import Engine
from phi2.inference.generate import choices_of
from phi2.model import Phi2ForCausalLM
from phi2.serve.worker import Worker
from phi2.tokenizer import Tokenizer

NAMED = re.compile(r"([\w.-]+)=(.+)")  # NAME=FOLDER
OF_A_RUN = ("adapter", "model", "merged")  # folders of a run, which is what it is called by


class Policy(NamedTuple):
    """A model that answers.

    Attributes:
        name: what the user calls it.
        worker: runs the model, for all policies on the same base.
        adapter: name of the model's adapter that answers; None: the base alone.
    """

    name: str
    model: Phi2ForCausalLM
    tokenizer: Tokenizer
    worker: Worker
    adapter: str | None


class _Base:
    """A model in memory, with the adapters that stand on it."""

    def __init__(self, name: str, folder: Path, device: str, dtype: str) -> None:
        self.name, self.folder = name, folder
        self.model, self.tokenizer = load(folder, device, dtype)
        self.adapters: list[str] = []

    def carries(self, adapter: Path) -> bool:
        """Whether an adapter was trained on it; by the folder it names where its weights do not tell."""
        told = is_base_of(self.model, adapter)
        return resolve(find(str(adapter))[0]) == self.folder if told is None else told

    def add(self, name: str, folder: Path) -> None:
        """Puts an adapter beside the others. What it was trained to read is what the base reads from now on."""
        tokenizer = load_tokenizer(self.folder, folder)
        if self.adapters and _reads(tokenizer) != _reads(self.tokenizer):
            raise ValueError(f"{folder}: its tokenizer or chat template is not that of the adapter {self.adapters[0]}")
        head = self.model.lm_head.weight
        load_adapter(self.model, folder, adapter_name=name)
        if not _same_rows(head, self.model.lm_head.weight) or self.model.brought_by_adapter:
            raise ValueError(f"{folder}: brings a head or embedding of its own: merge it, and give that as a model")
        self.tokenizer = tokenizer
        self.adapters.append(name)

    def policies(self) -> list[Policy]:
        engine = Engine(self.model, choices_of(self.model, self.tokenizer))
        worker = Worker(engine, self.tokenizer)
        names: list[str | None] = [None, *self.adapters]
        return [Policy(name or self.name, self.model, self.tokenizer, worker, name) for name in names]


@contextmanager
def loaded_policies(
    models: Sequence[str], adapters: Sequence[str] = (), device: str = "auto", dtype: str = "auto"
) -> Iterator[list[Policy]]:
    """Loads policies, the base of an adapter among them, and ends their workers afterwards.

    Args:
        models: folders, hub ids or run folders, each as it is or as NAME=FOLDER.
        adapters: likewise of LoRA adapters; one that does not tell its base is put on the first model.

    Raises:
        FileNotFoundError: for a folder that is not there.
        ValueError: for anything that cannot be loaded, and for two policies of one name.
    """
    policies = [policy for base in _bases(models, adapters, device, dtype) for policy in base.policies()]
    try:
        yield policies
    finally:
        for worker in {policy.worker for policy in policies}:
            worker.close()


def _bases(models: Sequence[str], adapters: Sequence[str], device: str, dtype: str) -> list[_Base]:
    given, beside = [_named(text) for text in models], [_named(text) for text in adapters]
    _require_distinct([name for name, _ in (*given, *beside)])
    bases: list[_Base] = []
    for name, path_or_id in given:
        base_name, adapter = find(path_or_id)
        if adapter is None:
            bases.append(_Base(name, resolve(base_name), device, dtype))
            continue
        base = next((base for base in bases if base.carries(Path(adapter))), None)
        if base is None:
            base = _Base(_named(base_name)[0], resolve(base_name), device, dtype)
            bases.append(base)
        base.add(name, Path(adapter))
    for name, path_or_id in beside:
        folder = _adapter(path_or_id)
        next((base for base in bases if base.carries(folder)), bases[0]).add(name, folder)
    _require_distinct([base.name for base in bases] + [name for base in bases for name in base.adapters])
    return bases


def _require_distinct(names: list[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two models are called {', '.join(twice)}: name them, as in NAME=FOLDER")


def _named(given: str) -> tuple[str, str]:
    """A name and a folder or hub id, of `NAME=FOLDER` or of a folder alone, whose name is the last that tells one."""
    match = None if Path(given).exists() else NAMED.fullmatch(given)
    if match:
        return match[1], match[2]
    parts = [part for part in Path(given).absolute().parts if part not in OF_A_RUN]
    return parts[-1], given


def _adapter(path_or_id: str) -> Path:
    """The folder of an adapter, given as it is or by its run."""
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
