"""One optimizer step of ours against one of trl's: same model of 105 M, float32 adapter, rows, order and settings.

Both sides run their real loop. On the clock is ours' `update`, and a step of trl's `Trainer`; collating and logging
between two steps are not, but ours lays out its batch inside `update`.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest import mock

import torch

from benchmarks.harness.models import MEDIUM, save_random, shared_folder
from benchmarks.harness.processes import Timer, compare
from benchmarks.registry import Report, case, versions
from phi2.checkpoints.peft_files import save_adapter
from phi2.data.encode import EncodeConfig, encode_records
from phi2.data.records import Chat, Preference
from phi2.data.sources import load_records
from phi2.lora import attach
from phi2.lora_config import LoraConfig
from phi2.training import dpo, sft
from phi2.training.config import DPOConfig, SFTConfig
from phi2.training.objective import Objective

LORA = dict(r=16, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"])
DATA = {"preference": "preference/dpo_en_200.jsonl", "supervised": "sft/alpaca_600.jsonl"}
SEED, MAX_LENGTH = 42, 512
TOLERANCE = {"loss": 1e-4, "grad_norm": 1e-3}


class Job(NamedTuple):
    """What both load and how they train.

    Attributes:
        kind: of rows, "preference" or "supervised".
    """

    kind: str
    batch_size: int
    gradient_checkpointing: bool
    folder: Path

    def settings(self) -> dict:
        """Options that have one name in both libraries."""
        return dict(
            per_device_train_batch_size=self.batch_size,
            gradient_checkpointing=self.gradient_checkpointing,
            max_length=MAX_LENGTH,
            max_steps=10_000,  # more than there are turns
            learning_rate=1e-4,
            seed=SEED,
        )


def compare_steps(turns: int, kind: str, batch_size: int, checkpointing: bool, time: float) -> Report:
    """Half the memory, and `time` of the time at most."""
    with TemporaryDirectory() as folder:
        job = Job(kind, batch_size, checkpointing, Path(folder))
        _prepare(job)
        result = compare(ours, with_trl, job, turns, TOLERANCE)
    apart = ", ".join(f"{name} by at most {value:.1e}" for name, value in result.largest_difference.items())
    return Report(
        peer=versions("trl", "transformers", "peft"),
        gate=f"{len(result.ours)} steps, relative differences: {apart}",
        measures=[*result.times(target=time), *result.memory(target=0.5)],
    )


compare_dpo = partial(compare_steps, kind="preference", batch_size=4, time=0.4)
compare_sft = partial(compare_steps, kind="supervised", batch_size=8, time=0.7)
CHECKPOINTED = "the same, both sides with gradient checkpointing"
case("dpo_step_vs_trl", 10, "LoRA DPO: one step over 4 pairs of up to 512 tokens")(
    partial(compare_dpo, checkpointing=False)
)
case("dpo_checkpointed_step_vs_trl", 10, CHECKPOINTED)(partial(compare_dpo, checkpointing=True))
case("sft_step_vs_trl", 10, "LoRA SFT: one step over 8 rows of up to 512 tokens")(
    partial(compare_sft, checkpointing=False)
)
case("sft_checkpointed_step_vs_trl", 10, CHECKPOINTED)(partial(compare_sft, checkpointing=True))


def _prepare(job: Job) -> None:
    """Writes model, adapter and rows into the job's folder."""
    model, tokenizer = save_random(MEDIUM, job.folder / "base")
    attach(model, LoraConfig(**LORA), SEED)
    save_adapter(model, job.folder / "adapter", "base")
    records = load_records(str(shared_folder() / "data" / DATA[job.kind]), job.kind).records
    kept = {row.origin for row in encode_records(records, tokenizer, EncodeConfig(max_length=MAX_LENGTH), job.kind)[0]}
    rows = [_conversation(record) for record in records if record.origin in kept]
    (job.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _conversation(record: Chat | Preference) -> dict[str, list[dict]]:
    """A record as a row that both libraries read the same way."""
    if isinstance(record, Chat):
        parts = {"prompt": record.messages[:-1], "completion": record.messages[-1:]}
    else:
        parts = {"prompt": record.prompt, "chosen": record.answers[0], "rejected": record.answers[1]}
    return {name: [{"role": m.role, "content": m.content} for m in messages] for name, messages in parts.items()}


def ours(timer: Timer, job: Job) -> None:
    loop, holder, settings = (dpo, Objective, DPOConfig) if job.kind == "preference" else (sft, sft, SFTConfig)
    update = holder.update

    def in_turn(*arguments) -> dict[str, float]:
        timer.start()
        metrics = update(*arguments)
        timer.stop()
        timer.report(loss=metrics["loss"], grad_norm=metrics["grad_norm"])
        return metrics

    where = dict(model=str(job.folder / "base"), data=str(job.folder / "rows.jsonl"), output=str(job.folder / "ours"))
    with mock.patch.object(holder, "update", in_turn):
        loop.train(settings(**where, device="cpu", dtype="float32", lora=LoraConfig(**LORA), **job.settings()))


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
    plain = dict(use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, logging_steps=1)
    rows = [json.loads(row) for row in (job.folder / "rows.jsonl").read_text().splitlines()]
    trainer = make_trainer(
        transformers.PhiForCausalLM.from_pretrained(job.folder / "base", dtype=torch.float32),
        args=make_config(str(job.folder / "trl"), **plain, **job.settings()),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(job.folder / "base"),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[TakeTurns()],
    )
    start = peft.load_peft_weights(job.folder / "adapter", device="cpu")
    peft.set_peft_model_state_dict(trainer.model, start)
    trainer.train()
