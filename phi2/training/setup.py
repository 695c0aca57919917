"""What both loops do before the first step and behind the last: load the policy and its data, save the result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from phi2.checkpoints.peft_files import load_adapter, save_adapter
from phi2.checkpoints.weights import load_config, load_model, load_tokenizer, pick_device, pick_dtype, save_pretrained
from phi2.data.audit import Audit
from phi2.data.encode import Encoded, encode_records
from phi2.data.sources import Loaded, load_records, require_ignored, split_records
from phi2.files import write_whole
from phi2.fused import fuse
from phi2.hub import resolve
from phi2.inference.generate import check_prompt, generate
from phi2.lora import attach, has_adapter
from phi2.model import Phi2ForCausalLM
from phi2.runs.card import write_card
from phi2.runs.checkpoint import last_checkpoint
from phi2.runs.folder import last_metrics
from phi2.tokenizer import Tokenizer
from phi2.training.config import TrainingConfig
from phi2.training.optim import warmup_updates
from phi2.training.window import Windows


def policy_tokenizer(config: TrainingConfig) -> Tokenizer:
    """The tokenizer of the adapter that is trained further, where it brings one, else of the model."""
    folder = resolve(config.model)
    load_config(folder)  # before a tokenizer is missed: this knows what else the folder may be
    return load_tokenizer(folder, None if config.adapter is None else resolve(config.adapter))


def compute_dtype(config: TrainingConfig) -> torch.dtype:
    return pick_dtype(config.dtype, pick_device(config.device))


def autocast(config: TrainingConfig) -> AbstractContextManager:
    """Half precision compute over float32 weights, in full training; a LoRA base is in that precision already."""
    dtype = compute_dtype(config)
    if config.lora is not None or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(pick_device(config.device).type, dtype)


def load_policy(config: TrainingConfig, checkpoint: Path | None, from_scratch: bool = False) -> Phi2ForCausalLM:
    """The model to train, as the configuration starts it or as a checkpoint left it.

    LoRA: a frozen base in the compute dtype under float32 adapters. Full training: float32 weights, random ones
    `from_scratch`.
    """
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    if from_scratch and not checkpoint:
        model = Phi2ForCausalLM(load_config(resolve(config.model)))
        model.init_weights(config.seed)
        model.to(device)
    elif config.lora is None:
        folder = checkpoint / "model" if checkpoint else resolve(config.model)
        model = load_model(folder, device, torch.float32)
    else:
        model = load_model(resolve(config.model), device, compute_dtype(config))
        adapter = checkpoint / "adapter" if checkpoint else config.adapter
        if adapter is None:
            attach(model, config.lora, config.seed)
        else:
            load_adapter(model, resolve(adapter), trainable=True)
    model.model.activation_checkpointing = config.gradient_checkpointing
    fuse(model, config.fuse)
    return model


def require_embeddings(model: Phi2ForCausalLM, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer with ids that the model has no embedding for.

    Raises:
        ValueError: naming both numbers.
    """
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} ids, the model {model.config.vocab_size} embedding rows")


def require_context(model: Phi2ForCausalLM, rows: Sequence[Encoded]) -> None:
    """Refuses rows that reach beyond the positions the model knows.

    Raises:
        ValueError: naming the longest row and both lengths.
    """
    context, longest = model.config.max_position_embeddings, max(rows, key=lambda row: row.length)
    if longest.length > context:
        raise ValueError(
            f"{longest.origin} has {longest.length} tokens, more than the model's context of {context}: give a"
            f" max_length (for packing: wrapped, a packing_length) of {context} at most"
        )


def load_data(config: TrainingConfig, tokenizer: Tokenizer, kind: str) -> tuple[list[Encoded], list[Encoded]]:
    """Training and evaluation rows as token ids; their audits are printed and kept in the run folder."""
    loaded, held = load_records(config.data, kind, config.ignore_columns), Loaded([], Audit())
    train, test = loaded.records, []
    if config.eval_data is not None:
        held = load_records(config.eval_data, kind, config.ignore_columns)
        test = held.records
    elif config.test_fraction:
        train, test = split_records(train, config.test_fraction, config.split_seed)
    require_ignored(config.ignore_columns, loaded.dropped, held.dropped)
    encoded, audit = encode_records(train, tokenizer, config, kind)
    audit.merge(loaded.dropped)
    keep_audit(config, "data_audit.json", audit)
    if not test:
        return encoded, []
    held_out, audit = encode_records(test, tokenizer, config, kind)
    audit.merge(held.dropped)
    keep_audit(config, "eval_audit.json", audit)
    return encoded, held_out


def keep_audit(config: TrainingConfig, name: str, audit: Audit) -> None:
    """Prints an audit, and keeps it in the run folder, where a run that goes on has it already."""
    print(f"\n{name}\n{audit.table()}")
    path = Path(config.output) / name
    if not path.exists() or last_checkpoint(path.parent) is None:
        write_whole(path, json.dumps(audit.to_dict(), indent=1))


def check_sample_prompts(config: TrainingConfig, model: Phi2ForCausalLM, tokenizer: Tokenizer) -> None:
    """Refuses a sample prompt that the model could not answer, before it costs a run its first evaluation.

    Raises:
        ValueError: for a prompt that is empty or longer than the context.
    """
    for prompt in config.sample_prompts:
        check_prompt(tokenizer.encode_prompt(prompt, tokenizer.prompt_style), model.config)


def windows_of(config: TrainingConfig, samples: int) -> Windows:
    return Windows(
        samples, config.per_device_train_batch_size, config.gradient_accumulation_steps, config.seed, config.shuffle
    )


def total_steps(config: TrainingConfig, windows: Windows) -> int:
    """Updates of the whole run.

    Raises:
        ValueError: when the warm-up outlasts them.
    """
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * windows.per_epoch)
    warmup_updates(config, total)
    return total


def is_due(every: int, step: int, total: int) -> bool:
    """Whether something done every `every` updates, and after the last, is due after update `step`."""
    return step == total or (every > 0 and step % every == 0)


def saves_at(config: TrainingConfig, step: int, total: int) -> bool:
    """Whether a checkpoint is due after update `step`."""
    return config.save_strategy == "steps" and is_due(config.save_steps, step, total)


def weights_saver(
    config: TrainingConfig, model: Phi2ForCausalLM, tokenizer: Tokenizer, dtype: torch.dtype | None = None
) -> Callable[[Path], None]:
    """Writes adapter/ (PEFT) or model/ (Hugging Face, in `dtype`) into a folder, with the tokenizer."""

    def save(folder: Path) -> None:
        if has_adapter(model):
            save_adapter(model, folder / "adapter", config.model)
            tokenizer.save(folder / "adapter")
        else:
            save_pretrained(model, tokenizer, folder / "model", dtype=dtype, overwrite=True)

    return save


def finish(config: TrainingConfig, model: Phi2ForCausalLM, tokenizer: Tokenizer) -> None:
    """Writes the result of the run, in the compute dtype, and its model card."""
    run = Path(config.output)
    weights_saver(config, model, tokenizer, compute_dtype(config))(run)
    write_card(run, config, last_metrics(run), tokenizer.template_origin)


def write_samples(config: TrainingConfig, model: Phi2ForCausalLM, tokenizer: Tokenizer, step: int) -> None:
    """Answers every sample prompt greedily and appends the answers to samples.jsonl."""
    if not config.sample_prompts:
        return
    style = {"prompt_style": tokenizer.prompt_style}
    with (Path(config.output) / "samples.jsonl").open("a", encoding="utf-8") as file:
        for prompt in config.sample_prompts:
            answer = generate(model, tokenizer, prompt, max_new_tokens=128, temperature=0.0, **style)
            line = {"step": step, "prompt": prompt, "answer": answer.text, "finish_reason": answer.finish_reason}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def require_finite(loss: float, step: int) -> None:
    """Stops a run whose loss is no number any more.

    Raises:
        ValueError: naming the step.
    """
    if not math.isfinite(loss):
        raise ValueError(f"step {step}: the loss is {loss}; try a lower learning_rate, or another dtype than float16")
