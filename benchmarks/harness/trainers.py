"""Optimizer steps of our training loops beside those of trl's trainers: same model, adapter, rows, order and settings.

Both sides run their real loop. On the clock is ours' `update`, and a step of trl's `Trainer`; collating and logging
between two steps are not, but ours lays out its batch inside `update`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from benchmarks.harness.models import shared_folder
from benchmarks.harness.processes import Timer
from phi2.checkpoints.peft_files import save_adapter
from phi2.checkpoints.weights import save_pretrained
from phi2.data.encode import EncodeConfig, encode_records
from phi2.data.encoded import EncodedSequence
from phi2.data.records import Chat, Record
from phi2.data.sources import load_records
from phi2.lora import attach
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer
from phi2.training import dpo, sft
from phi2.training.config import DPOConfig, SFTConfig
from phi2.training.metrics import Metrics
from phi2.training.objective import Objective
from phi2.training.packing import wrapped

LORA: dict[str, Any] = dict(r=16, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"])
DATA = {"preference": "preference/dpo_en_200.jsonl", "supervised": "sft/alpaca_600.jsonl"}
SEED = 42
EXACT = {"loss": 1e-4, "grad_norm": 1e-3}  # how far two sides may be apart in float32, as shares
# In bfloat16 rounding moves a mean over tokens by some 1e-5 and its gradients by 3e-3. It moves the loss of a pair,
# which stands on a difference of sums over answers, and its gradients by 1e-2 at 275 M, and more in larger models.
ROUNDED = {
    "supervised": {"loss": 5e-3, "grad_norm": 5e-2},
    "preference": {"loss": 1e-1, "grad_norm": 1e-1},
}


class Job(NamedTuple):
    """What both load and how they train.

    Attributes:
        kind: of rows, "preference" or "supervised".
        folder: of base, adapter and rows, see `prepare`.
        packed: tokens of a sample that is joined and cut from rows; None for samples that are rows.
        dtype: of the base, under float32 adapters.
        tokens: of a pass, for `in_passes`.
    """

    kind: str
    folder: Path
    batch_size: int
    accumulation: int = 1
    packed: int | None = None
    gradient_checkpointing: bool = False
    max_length: int = 512
    learning_rate: float = 1e-4
    device: str = "cpu"
    dtype: str = "float32"
    tokens: int = 0

    def settings(self) -> dict[str, Any]:
        """Options that have one name in both libraries."""
        return dict(
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulation,
            gradient_checkpointing=self.gradient_checkpointing,
            max_steps=10_000,  # more than there are turns
            learning_rate=self.learning_rate,
            seed=SEED,
        )


def toy_records(kind: str) -> list[Record]:
    """Some short ones, for nano's tokenizer."""
    return load_records({"preference": "toy-dpo", "supervised": "toy-sft"}[kind], kind).records[:256]


def real_records(kind: str) -> list[Record]:
    return load_records(str(shared_folder() / "data" / DATA[kind]), kind).records


def prepare(job: Job, model: Phi2ForCausalLM, tokenizer: Tokenizer, records: Sequence[Record]) -> None:
    """Writes the model, an adapter that changes nothing, and the rows that no library cuts into the job's folder."""
    save_pretrained(model, tokenizer, job.folder / "base")
    attach(model, LoraConfig(**LORA), SEED)
    save_adapter(model, job.folder / "adapter", "base")
    rows, options = job.folder / "rows.jsonl", EncodeConfig(max_length=job.max_length)
    encode = partial(encode_records, tokenizer=tokenizer, options=options, kind=job.kind)
    kept = {row.origin for row in encode(records)[0]}
    write_rows(rows, [_conversation(record) for record in records if record.origin in kept])
    if job.packed:  # theirs puts no separator between rows: it is given the blocks of ours, so that both learn the same
        blocks = wrapped(encode(load_records(str(rows), job.kind).records)[0], job.packed, tokenizer.eos_id)
        write_rows(job.folder / "blocks.jsonl", [_labelled(block) for block in blocks])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _labelled(block: EncodedSequence) -> dict[str, list[int]]:
    """A sample as trl takes one that is tokenised: -100 is no target, and the first token, behind none, is none."""
    labels = np.where(block.mask, block.ids, -100).tolist()
    return {"input_ids": block.ids.tolist(), "labels": [-100, *labels[1:]]}


def _conversation(record: Record) -> dict[str, list[dict]]:
    """A record as a row that both libraries read the same way."""
    if isinstance(record, Chat):
        parts = {"prompt": record.messages[:-1], "completion": record.messages[-1:]}
    else:
        parts = {"prompt": record.prompt, "chosen": record.answers[0], "rejected": record.answers[1]}
    return {name: [{"role": m.role, "content": m.content} for m in messages] for name, messages in parts.items()}


def in_passes(timer: Timer, job: Job) -> None:
    """Ours, with a limit to the tokens of a pass."""
    ours(timer, job, max_tokens_per_pass=job.tokens)


def ours(timer: Timer, job: Job, **changes: Any) -> None:
    loop, holder, settings = (dpo, Objective, DPOConfig) if job.kind == "preference" else (sft, sft, SFTConfig)
    update = holder.update

    def in_turn(*arguments) -> Metrics:
        timer.start()
        metrics = update(*arguments)
        found = metrics.wait()
        timer.stop()
        timer.report(loss=found["loss"], grad_norm=found["grad_norm"])
        return metrics

    packing = dict(packing="wrapped", packing_length=job.packed) if job.packed else {}
    with TemporaryDirectory() as run, mock.patch.object(holder, "update", in_turn):
        config = settings(
            model=str(job.folder / "base"),
            data=str(job.folder / "rows.jsonl"),
            output=run,
            device=job.device,
            dtype=job.dtype,
            lora=LoraConfig(**LORA),
            max_length=job.max_length,
            **packing,
            **job.settings(),
            **changes,
        )
        loop.train(config)


def with_trl(timer: Timer, job: Job) -> None:
    import datasets
    import peft
    import transformers
    import trl

    class TakeTurns(transformers.TrainerCallback):
        """The loop of `Trainer`, whose steps wait for their turns."""

        def on_step_begin(self, *_, **__) -> None:
            timer.start()

        def on_step_end(self, *_, **__) -> None:
            timer.stop()

        def on_log(self, args, state, control, logs, **_) -> None:
            timer.report(loss=logs["loss"], grad_norm=logs["grad_norm"])

    kind = "DPO" if job.kind == "preference" else "SFT"
    make_trainer, make_config = getattr(trl, f"{kind}Trainer"), getattr(trl, f"{kind}Config")
    where = dict(use_cpu=job.device == "cpu", bf16=job.dtype == "bfloat16")
    plain = dict(report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1)
    length = dict(max_length=job.packed or job.max_length)
    base, dtype = job.folder / "base", getattr(torch, job.dtype)
    file = job.folder / ("blocks.jsonl" if job.packed else "rows.jsonl")
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    trainer = make_trainer(
        transformers.PhiForCausalLM.from_pretrained(base, dtype=dtype, device_map=job.device),
        args=make_config(str(job.folder / "trl"), **where, **plain, **length, **job.settings()),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(base),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[TakeTurns()],
    )
    start = peft.load_peft_weights(job.folder / "adapter", device=job.device)
    peft.set_peft_model_state_dict(trainer.model, start)
    trainer.train()
