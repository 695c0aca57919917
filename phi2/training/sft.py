"""Supervised fine-tuning, the whole loop: read it from `train` downwards.

The loss of an update is the mean over the target tokens of its whole window, so the gradient does not depend on how the
window is split into micro-batches, nor on packing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from phi2.data.encode import EncodedSequence
from phi2.losses.head import target_logps
from phi2.model import Phi2ForCausalLM
from phi2.runs.checkpoint import restore_checkpoint, save_checkpoint
from phi2.runs.folder import Interrupted, Log, delayed_interrupt, open_run, write_settings
from phi2.runs.inputs import inputs_of, require_same_inputs
from phi2.training.config import SFTConfig
from phi2.training.optim import Optimizer
from phi2.training.packing import TokenRow, best_fit, row_of_sequences, wrapped
from phi2.training.setup import (
    autocast,
    check_sample_prompts,
    compute_dtype,
    finish,
    is_due,
    load_data,
    load_policy,
    policy_tokenizer,
    require_context,
    require_embeddings,
    require_finite,
    saves_at,
    total_steps,
    weights_saver,
    windows_of,
    write_samples,
)

Block = list[EncodedSequence]  # what one sample of a micro-batch holds: one sequence, or those packed together


def train(config: SFTConfig) -> Path:
    """Runs, or resumes, a supervised run and returns its folder.

    Raises:
        ValueError: for settings, data or an output folder that cannot be used, and when the loss is no number any more.
        Interrupted: after Ctrl-C, with a checkpoint to resume from.
    """
    checkpoint, run = open_run(config), Path(config.output)
    tokenizer = policy_tokenizer(config).with_chat_template(config.chat_template)
    print(f"chat template: {tokenizer.template_origin}")
    train_rows, eval_rows = load_data(config, tokenizer, "supervised")
    blocks = pack(train_rows, config, tokenizer.eos_id)
    windows = windows_of(config, len(blocks))
    total = total_steps(config, windows)
    inputs = inputs_of(config, tokenizer, train_rows, eval_rows, config.from_scratch)
    require_same_inputs(run, inputs, resumed=checkpoint is not None)
    write_settings(run, config)
    model = load_policy(config, checkpoint, config.from_scratch)
    require_embeddings(model, tokenizer)
    require_context(model, [*(row for block in blocks for row in block), *eval_rows])
    check_sample_prompts(config, model, tokenizer)
    save_weights = weights_saver(config, model, tokenizer)
    optimizer = Optimizer(model, config, total, scale_loss=compute_dtype(config) == torch.float16)
    done = restore_checkpoint(checkpoint, optimizer) if checkpoint else 0
    model.train()
    with closing(Log(run, done, total, "sft")) as log, delayed_interrupt() as interrupted:
        for step in log.steps():
            batches = [[blocks[i] for i in batch] for batch in windows.at(step - 1)]
            metrics = update(config, model, optimizer, batches)
            require_finite(metrics["loss"], step)
            tokens = sum(len(s.ids) for batch in batches for block in batch for s in block)
            log.train(step, tokens, {**metrics, "epoch": step / windows.per_epoch}, config.logging_steps)
            if is_due(config.eval_steps, step, total):
                if eval_rows:
                    log.write(step, "eval", evaluate(config, model, eval_rows))
                write_samples(config, model, tokenizer, step)
            if interrupted or saves_at(config, step, total):
                save_checkpoint(run, step, optimizer, save_weights, config.save_total_limit)
            if interrupted and step < total:
                raise Interrupted(f"stopped after step {step}; go on with resume: true")
    finish(config, model, tokenizer)
    return run


def pack(rows: list[EncodedSequence], config: SFTConfig, separator: int) -> list[Block]:
    """The samples of the run, by `config.packing`."""
    if config.packing == "none":
        return [[row] for row in rows]
    if config.packing == "wrapped":
        return [[block] for block in wrapped(rows, config.packing_length, separator)]
    longest = max(len(row.ids) for row in rows)
    if longest > config.packing_length:
        raise ValueError(
            f"packing_length is {config.packing_length}, but a row has {longest} tokens; raise it, or lower max_length"
        )
    return [[rows[i] for i in block] for block in best_fit([len(r.ids) for r in rows], config.packing_length)]


def update(
    config: SFTConfig, model: Phi2ForCausalLM, optimizer: Optimizer, batches: list[list[Block]]
) -> dict[str, float]:
    """One optimizer step over a window of micro-batches; returns its metrics."""
    tokens = sum(s.target_tokens for batch in batches for block in batch for s in block)
    noise, loss = config.neftune_noise_alpha, torch.zeros((), device=model.device)
    for batch in batches:
        row = row_of_sequences([s for block in batch for s in block]).to(model.device)
        add_noise = neftune(noise, [sum(len(s.ids) for s in block) for block in batch]) if noise else None
        with autocast(config):
            logps = forward(model, row, add_noise)
        micro_loss = -logps.sum() / tokens
        optimizer.backward(micro_loss)
        loss += micro_loss.detach()
    learning_rate = optimizer.learning_rate
    norm = optimizer.step()
    return {"loss": loss.item(), "grad_norm": norm, "learning_rate": learning_rate, "target_tokens": tokens}


def forward(model: Phi2ForCausalLM, row: TokenRow, add_noise: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """(N,) log-probabilities of a row's targets."""
    embeddings = model.model.embed_tokens(row.input_ids)
    if add_noise is not None:
        embeddings = add_noise(embeddings)
    hidden = model.model(inputs_embeds=embeddings, positions=row.positions, visible_until=row.visible_until)
    return target_logps(model, hidden, row.rows, row.targets)[0]


def neftune(alpha: float, lengths: list[int]) -> Callable[[Tensor], Tensor]:
    """NEFTune: x + uniform(-m, m), m = alpha / sqrt(tokens of the sample * C).

    Args:
        lengths: tokens of each sample in the row.
    Source: arXiv:2310.05914 Algorithm 1.
    """

    def add_noise(x: Tensor) -> Tensor:  # (1, T, C)
        tokens = torch.tensor(lengths, dtype=torch.float32, device=x.device)
        size = alpha / (tokens * x.shape[-1]).sqrt()
        return x + torch.zeros_like(x).uniform_(-1, 1) * size.repeat_interleave(tokens.long())[:, None].to(x.dtype)

    return add_noise


@torch.no_grad()
def evaluate(config: SFTConfig, model: Phi2ForCausalLM, rows: Sequence[EncodedSequence]) -> dict[str, float]:
    """Mean loss per target token over all rows, whatever the batch size."""
    model.eval()
    batch_size, total, tokens = config.per_device_train_batch_size, 0.0, 0
    for start in range(0, len(rows), batch_size):
        row = row_of_sequences(rows[start : start + batch_size]).to(model.device)
        with autocast(config):
            total -= forward(model, row).sum().item()
        tokens += len(row.targets)
    model.train()
    return {"eval_loss": total / tokens, "target_tokens": tokens}
