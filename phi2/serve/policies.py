"""The models that answer side by side: policies by name, of which those on one base share its weights.

A base is held once. An adapter stands on the first base that it was trained on, which its file tells (`same_base.py`);
so a DPO run and the reference it started from are one model in memory and two policies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from phi2.checkpoints.peft_files import is_base_of
from phi2.evaluation.models import find
from phi2.hub import resolve
from phi2.inference.engine import Engine
from phi2.inference.generate import choices_of
from phi2.model import Phi2ForCausalLM
from phi2.serve.bases import Base, adapter_folder, require_distinct, split_name
from phi2.serve.worker import Worker
from phi2.tokenizer import Tokenizer


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
    policies = [policy for base in _bases(models, adapters, device, dtype) for policy in _policies(base)]
    try:
        yield policies
    finally:
        for worker in {policy.worker for policy in policies}:
            worker.close()


def _policies(base: Base) -> list[Policy]:
    """Of a base: itself, and each of its adapters."""
    engine = Engine(base.model, choices_of(base.model, base.tokenizer))
    worker = Worker(engine, base.tokenizer)
    names: list[str | None] = [None, *base.adapters]
    return [Policy(name or base.name, base.model, base.tokenizer, worker, name) for name in names]


def _bases(models: Sequence[str], adapters: Sequence[str], device: str, dtype: str) -> list[Base]:
    given, beside = [split_name(text) for text in models], [split_name(text) for text in adapters]
    require_distinct([name for name, _ in (*given, *beside)])
    how = {"device": device, "dtype": dtype}
    bases: list[Base] = []
    for name, path_or_id in given:
        base_name, adapter = find(path_or_id)
        if adapter is None:
            bases.append(Base(name, resolve(base_name), **how))
            continue
        base = next((base for base in bases if _carries(base, Path(adapter))), None)
        if base is None:
            base = Base(split_name(base_name)[0], resolve(base_name), **how)
            bases.append(base)
        base.add(name, Path(adapter))
    for name, path_or_id in beside:
        folder = adapter_folder(path_or_id)
        next((base for base in bases if _carries(base, folder)), bases[0]).add(name, folder)
    require_distinct([base.name for base in bases] + [name for base in bases for name in base.adapters])
    return bases


def _carries(base: Base, adapter: Path) -> bool:
    """Whether an adapter was trained on a base; by the folder it names where its weights do not tell."""
    told = is_base_of(base.model, adapter)
    return resolve(find(str(adapter))[0]) == base.folder if told is None else told
