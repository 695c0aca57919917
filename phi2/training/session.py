"""What runs start from, each loaded once: tokenizer, encoded rows, base weights, other checkpoints as reference.

    session = start(config)
    dpo.fit(session, config)
    dpo.fit(session, replace(config, loss="ipo", output="runs/ipo"))

Everything is loaded at its first use. A fit leaves the session as it found it, so the next one gives bit for bit what a
fresh process would. A LoRA base is shared by all fits; full training changes its weights, and loads its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, overload

import torch

from phi2.checkpoints.peft_files import load_adapter
from phi2.checkpoints.weights import load_config, load_model, load_tokenizer, pick_device
from phi2.data.audit import Audit
from phi2.data.config import EncodeConfig
from phi2.data.encode import encode_records
from phi2.data.encoded import Encoded, EncodedPreference, EncodedSequence
from phi2.data.flat import FlatRows, flat_rows, largest
from phi2.data.sources import Loaded, load_records, require_ignored, split_records
from phi2.data.store import Kept, find, keep, name_of
from phi2.files import write_whole
from phi2.fused import fuse
from phi2.hub import resolve
from phi2.inference.generate import check_prompt
from phi2.lora import attach, detach
from phi2.model import Phi2ForCausalLM
from phi2.runs.checkpoint import last_checkpoint
from phi2.tokenizer import Tokenizer
from phi2.training.config import DPOConfig, SFTConfig, TrainingConfig
from phi2.training.precision import compute_dtype
from phi2.training.reference_shards import Shards

SHARED = (  # settings that all fits of a session have in common
    *("model", "adapter", "data", "eval_data", "test_fraction", "split_seed", "chat_template", "dtype", "device"),
    *(field.name for field in fields(EncodeConfig)),
)


TRAIN, EVALUATION = "data_audit.json", "eval_audit.json"  # audits in a run folder
Row = TypeVar("Row", EncodedSequence, EncodedPreference)


class Rows(NamedTuple, Generic[Row]):
    """Encoded rows, and by file name what became of the others."""

    train: FlatRows[Row]
    evaluation: FlatRows[Row]
    audits: dict[str, Audit]


class Part(NamedTuple):
    """Rows to encode: all of some data, or one side of a split, with its share and seed."""

    data: Any
    split: tuple[str, float, int] | None = None


class Session(Generic[Row]):
    """What runs with the same model, data and encoding share.

    Attributes:
        config: the settings it was started with.
        others: checkpoints that are references, by folder and dtype.
        reference_logps: log-probabilities of a reference, by its name and all that decides how they are rounded.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self.config = config
        self.others: dict[tuple[Path, torch.dtype], Phi2ForCausalLM] = {}
        self.reference_logps: dict[tuple[str, int | str, bool | str, bytes], Shards] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """What every fit takes from the session."""
        return {name: getattr(self.config, name) for name in SHARED if hasattr(self.config, name)}

    def require_kind(self, kind: str) -> None:
        """Refuses a run for other rows than the session's."""
        if kind != self.config.kind:
            raise ValueError(f"the session holds {self.config.kind} rows, and this run needs {kind} rows")

    def require_same(self, config: TrainingConfig) -> None:
        """Refuses a run that would start from something else.

        Raises:
            ValueError: naming the settings that differ.
        """
        self.require_kind(config.kind)
        differ = [
            f"{name} {was!r} -> {getattr(config, name)!r}"
            for name, was in self.settings.items()
            if getattr(config, name) != was
        ]
        if differ:
            raise ValueError(f"the session was started with other settings, start another one: {', '.join(differ)}")

    @property
    def dtype(self) -> torch.dtype:
        """That the policy computes in."""
        return compute_dtype(self.config)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the adapter that is trained further, where it brings one, else of the model."""
        config, folder = self.config, resolve(self.config.model)
        load_config(folder)  # before a tokenizer is missed: this knows what else the folder may be
        tokenizer = load_tokenizer(folder, None if config.adapter is None else resolve(config.adapter))
        if isinstance(config, SFTConfig):
            tokenizer = tokenizer.with_chat_template(config.chat_template)
            print(f"chat template: {tokenizer.template_origin}")
        return tokenizer

    @cached_property
    def rows(self) -> Rows[Row]:
        """Training and evaluation rows as token ids; their audits are printed. Rows of files are kept (`store.py`)."""
        names = {file: self._name(part) for file, part in self._parts.items()}
        kept: dict[str, Kept] = {file: entry for file, name in names.items() if (entry := find(name))}
        loaded: dict[str, Loaded] = self._loaded({file: part for file, part in self._parts.items() if file not in kept})
        dropped = [*(entry.audit for entry in kept.values()), *(part.dropped for part in loaded.values())]
        require_ignored(self.config.ignore_columns, *dropped)
        for file, name in names.items():
            if file not in kept:
                kept[file] = self._encoded(file, name, loaded[file])
            print(f"\n{file}\n{kept[file].audit.table()}")
        held_out = kept[EVALUATION].rows if EVALUATION in kept else flat_rows([], self.config.kind)
        return Rows(kept[TRAIN].rows, held_out, {file: kept[file].audit for file in names})

    @property
    def _parts(self) -> dict[str, Part]:
        """The rows that are wanted, by the name of the file of their audit."""
        config = self.config
        if config.eval_data is None and config.test_fraction:
            sides = [(side, config.test_fraction, config.split_seed) for side in ("train", "test")]
            return {TRAIN: Part(config.data, sides[0]), EVALUATION: Part(config.data, sides[1])}
        held_out = {} if config.eval_data is None else {EVALUATION: Part(config.eval_data)}
        return {TRAIN: Part(config.data), **held_out}

    def _name(self, part: Part) -> str:
        return name_of(part.data, self.config.kind, self.tokenizer, self.config, part.split)

    def _loaded(self, parts: dict[str, Part]) -> dict[str, Loaded]:
        config = self.config
        if not any(part.split for part in parts.values()):
            return {name: load_records(part.data, config.kind, config.ignore_columns) for name, part in parts.items()}
        loaded = load_records(config.data, config.kind, config.ignore_columns)
        train, test = split_records(loaded.records, config.test_fraction, config.split_seed)
        return {TRAIN: Loaded(train, loaded.dropped), EVALUATION: Loaded(test, Audit())}

    def _encoded(self, file: str, name: str, loaded: Loaded) -> Kept:
        """Rows that are not kept yet; where a file has changed meanwhile, they are none that a name is known of."""
        rows, audit = encode_records(loaded.records, self.tokenizer, self.config, self.config.kind)
        audit.merge(loaded.dropped)
        return keep(name if name == self._name(self._parts[file]) else "", Kept(rows, audit))

    def keep_audits(self, run: Path) -> None:
        """Writes them into a run folder; a run that goes on has them already."""
        for name, audit in self.rows.audits.items():
            if not (run / name).exists() or last_checkpoint(run) is None:
                write_whole(run / name, json.dumps(audit.to_dict(), indent=1))

    @cached_property
    def base(self) -> Phi2ForCausalLM:
        """The weights under the adapters, in the compute dtype."""
        return load_model(resolve(self.config.model), pick_device(self.config.device), self.dtype)

    def other(self, folder: Path, dtype: torch.dtype) -> Phi2ForCausalLM:
        """Another checkpoint, frozen."""
        if (folder, dtype) not in self.others:
            model = load_model(folder, pick_device(self.config.device), dtype)
            self.others[folder, dtype] = model.requires_grad_(False)
        return self.others[folder, dtype]

    @contextmanager
    def policy(self, config: TrainingConfig, checkpoint: Path | None = None) -> Iterator[Phi2ForCausalLM]:
        """The model to train; behind the block no adapter is on it, and every number of the base as it was before."""
        base: Phi2ForCausalLM | None = self.base if config.lora is not None else None
        try:
            yield self.load_policy(config, checkpoint)
        finally:
            if base is not None and base.adapters:
                for name in tuple(base.adapters):
                    detach(base, name)
                base.eval()

    def load_policy(self, config: TrainingConfig, checkpoint: Path | None = None) -> Phi2ForCausalLM:
        """The model to train, as the configuration starts it or as a checkpoint left it.

        LoRA: the frozen base in the compute dtype under float32 adapters. Full training: float32 weights, random ones
        if the configuration says `from_scratch`.
        """
        torch.manual_seed(config.seed)
        model = self._weights(config, checkpoint) if config.lora is None else self.base
        if config.lora is not None:
            adapter = checkpoint / "adapter" if checkpoint else config.adapter
            if adapter is None:
                attach(model, config.lora, config.seed)
            else:
                load_adapter(model, resolve(adapter), trainable=True)
        model.model.activation_checkpointing = config.gradient_checkpointing
        fuse(model, config.fuse)
        return model

    def _weights(self, config: TrainingConfig, checkpoint: Path | None) -> Phi2ForCausalLM:
        """All of them, to be trained."""
        device = pick_device(config.device)
        if isinstance(config, SFTConfig) and config.from_scratch and not checkpoint:
            model = Phi2ForCausalLM(load_config(resolve(config.model)))
            model.init_weights(config.seed)
            return model.to(device)
        return load_model(checkpoint / "model" if checkpoint else resolve(config.model), device, torch.float32)


@overload
def start(config: SFTConfig) -> Session[EncodedSequence]: ...
@overload
def start(config: DPOConfig) -> Session[EncodedPreference]: ...
def start(config: TrainingConfig) -> Session:
    """Opens a session for runs with the model, data and encoding of `config`; the rest of it is that of each fit."""
    return Session(config)


def require_fit(config: TrainingConfig, model: Phi2ForCausalLM, tokenizer: Tokenizer, rows: Sequence[Encoded]) -> None:
    """Refuses what the model cannot read: ids, rows, or the prompts of samples.

    Raises:
        ValueError: for a tokenizer with ids that the model has no embedding for, a row that reaches beyond its
            positions, and a sample prompt that is empty or longer than the context.
    """
    context, longest = model.config.max_position_embeddings, largest(rows, "length")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} ids, the model {model.config.vocab_size} embedding rows")
    if longest.length > context:
        raise ValueError(
            f"{longest.origin} has {longest.length} tokens, more than the model's context of {context}: give a"
            f" max_length (for packing: wrapped, a packing_length) of {context} at most"
        )
    for prompt in config.sample_prompts:
        check_prompt(tokenizer.encode_prompt(prompt, tokenizer.prompt_style), model.config)
