"""One optimizer step of ours against one of trl's: same model, adapter, rows, order and settings.

Ours is the `update` that the real loop calls, trl's a step of the real `Trainer`. What its loop does between two steps,
collating the next batch and logging, is not on its clock; ours lays out its batch inside `update`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from benchmarks.harness.processes import THREADS, Timer, compare
from benchmarks.registry import Report, case
from phi2.checkpoints.peft_files import save_adapter
from phi2.checkpoints.weights import save_pretrained
from phi2.config import Phi2Config
from phi2.data.encode import EncodeConfig, encode_records
from phi2.data.records import Chat, Pair
from phi2.data.sources import load_records
from phi2.lora import attach
from phi2.lora_config import LoraConfig
from phi2.losses.registry import bind_loss
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer
from phi2.training import dpo, sft
from phi2.training.optim import Optimizer
from phi2.training.reference import make_reference
from phi2.training.session import Session, start
from phi2.training.window import windows_of

SHAPE = Phi2Config(  # 105 M parameters, Phi-2's head dim and vocabulary
    hidden_size=640, intermediate_size=2560, num_hidden_layers=8, num_attention_heads=8, resid_pdrop=0.0
)
LORA = dict(r=16, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"])
SEED, MAX_LENGTH, MANY_STEPS = 42, 512, 10_000
TOLERANCE = {"loss": 1e-4, "grad_norm": 1e-3}


class Job(NamedTuple):
    """What both load and how they train.

    Attributes:
        kind: of rows, "preference" or "supervised".
    """

    kind: str
    folder: Path
    batch_size: int
    gradient_checkpointing: bool

    def settings(self) -> dict:
        """Options that have one name in both libraries."""
        return dict(
            per_device_train_batch_size=self.batch_size,
            gradient_checkpointing=self.gradient_checkpointing,
            max_length=MAX_LENGTH,
            max_steps=MANY_STEPS,
            learning_rate=1e-4,
            seed=SEED,
        )


@case("dpo_step_vs_trl", turns=10, summary="LoRA DPO: one step over 4 pairs of up to 512 tokens")
def dpo_step_vs_trl(turns: int) -> Report:
    return _compare("preference", 4, False, turns, time=0.4)


@case("dpo_checkpointed_step_vs_trl", turns=10, summary="the same, both sides with gradient checkpointing")
def dpo_checkpointed_step_vs_trl(turns: int) -> Report:
    return _compare("preference", 4, True, turns, time=0.4)


@case("sft_step_vs_trl", turns=10, summary="LoRA SFT: one step over 8 rows of up to 512 tokens")
def sft_step_vs_trl(turns: int) -> Report:
    return _compare("supervised", 8, False, turns, time=0.7)


@case("sft_checkpointed_step_vs_trl", turns=10, summary="the same, both sides with gradient checkpointing")
def sft_checkpointed_step_vs_trl(turns: int) -> Report:
    return _compare("supervised", 8, True, turns, time=0.7)


def _compare(kind: str, batch_size: int, checkpointing: bool, turns: int, time: float) -> Report:
    with TemporaryDirectory() as folder:
        job = Job(kind, Path(folder), batch_size, checkpointing)
        rows = _prepare(job)
        result = compare(our_dpo if kind == "preference" else our_sft, with_trl, job, turns, TOLERANCE)
    apart = ", ".join(f"{name} by at most {value:.1e}" for name, value in result.largest_difference.items())
    return Report(
        peer={name: metadata.version(name) for name in ("trl", "transformers", "peft")},
        gate=f"{len(result.ours)} steps, relative differences: {apart}",
        measures=[*result.times(target=time), *result.memory(target=0.5)],
        facts={
            "parameters": parameters(),
            "dtype": "float32",
            "threads": THREADS,
            "lora": "r 16 on q, k, v, dense, fc1, fc2",
            "batch": f"{batch_size} {'pairs' if kind == 'preference' else 'rows'}, max_length {MAX_LENGTH}",
            "gradient_checkpointing": "on, both sides" if checkpointing else "off, both sides",
            "rows": rows,
        },
    )


# ---- what both load ----


def shared_folder() -> Path:
    """The folder of real tokenizers and data.

    Raises:
        FileNotFoundError: when it is not there.
    """
    folder = Path(os.environ.get("PHI2_SHARED", "PHI2_SHARED is not set"))
    if not (folder / "tokenizer" / "phi-2-instruct").is_dir():
        raise FileNotFoundError(
            f"{folder}: set PHI2_SHARED to a folder that holds tokenizer/phi-2-instruct,"
            " data/preference/dpo_en_200.jsonl and data/sft/alpaca_600.jsonl"
        )
    return folder


def base_model() -> Phi2ForCausalLM:
    """The random model of `SHAPE`."""
    model = Phi2ForCausalLM(SHAPE)
    model.init_weights(SEED)
    return model


def parameters() -> str:
    """How many parameters a model of `SHAPE` has."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Phi2ForCausalLM(SHAPE).parameters())
    return f"{count / 1e6:.0f} M"


def _prepare(job: Job) -> int:
    """Writes model, adapter and rows into the job's folder; returns the number of rows."""
    tokenizer = Tokenizer.from_folder(shared_folder() / "tokenizer" / "phi-2-instruct")
    model = base_model()
    save_pretrained(model, tokenizer, job.folder / "base")
    attach(model, LoraConfig(**LORA), SEED)
    save_adapter(model, job.folder / "adapter", "base")
    file = "preference/dpo_en_200.jsonl" if job.kind == "preference" else "sft/alpaca_600.jsonl"
    records = load_records(str(shared_folder() / "data" / file), job.kind).records
    kept = {row.origin for row in encode_records(records, tokenizer, EncodeConfig(max_length=MAX_LENGTH), job.kind)[0]}
    rows = [_conversation(record) for record in records if record.origin in kept]
    (job.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def _conversation(record: Chat | Pair) -> dict[str, list[dict]]:
    """A record as a row that both libraries read the same way."""
    if isinstance(record, Chat):
        parts = {"prompt": record.messages[:-1], "completion": record.messages[-1:]}
    else:
        parts = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
    return {name: [{"role": m.role, "content": m.content} for m in messages] for name, messages in parts.items()}


# ---- what runs in the two processes ----


def our_dpo(timer: Timer, job: Job) -> None:
    config = _our_config(dpo.DPOConfig, job)
    session = start(config)
    pairs, model, optimizer = _our_start(session)
    reference, loss = make_reference(session, config, model, None, pairs), bind_loss(config.loss, config.knobs)
    model.train(not config.disable_dropout)
    _take_turns(timer, config, pairs, lambda batches: dpo.update(config, model, optimizer, batches, reference, loss))


def our_sft(timer: Timer, job: Job) -> None:
    config = _our_config(sft.SFTConfig, job)
    rows, model, optimizer = _our_start(start(config))
    model.train()
    blocks = sft.pack(rows, config, separator=0)
    _take_turns(timer, config, blocks, lambda batches: sft.update(config, model, optimizer, batches))


def _our_config(config: type, job: Job):
    where = dict(model=str(job.folder / "base"), data=str(job.folder / "rows.jsonl"), output=str(job.folder))
    return config(**where, device="cpu", dtype="float32", lora=LoraConfig(**LORA), **job.settings())


def _our_start(session: Session):
    config = session.config
    rows, model = session.rows.train, session.load_policy(config)
    return rows, model, Optimizer(model, config, MANY_STEPS, scale_loss=False)


def _take_turns(timer: Timer, config, rows: list, update: Callable[[list[list]], dict[str, float]]) -> None:
    windows = windows_of(config, len(rows))
    for step in range(MANY_STEPS):
        timer.start()
        metrics = update([[rows[i] for i in batch] for batch in windows.at(step)])
        timer.stop()
        timer.report(loss=metrics["loss"], grad_norm=metrics["grad_norm"])


def with_trl(timer: Timer, job: Job) -> None:
    import datasets
    import peft
    import transformers
    import trl

    class TakeTurns(transformers.TrainerCallback):
        """The loop of `Trainer` waits for its turn before every step."""

        def on_step_begin(self, *_, **__) -> None:
            timer.start()

        def on_step_end(self, *_, **__) -> None:
            timer.stop()

        def on_log(self, args, state, control, logs, **_) -> None:
            timer.report(loss=logs["loss"], grad_norm=logs["grad_norm"])

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    make_trainer, make_config = {
        "preference": (trl.DPOTrainer, trl.DPOConfig),
        "supervised": (trl.SFTTrainer, trl.SFTConfig),
    }[job.kind]
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
