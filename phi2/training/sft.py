"""Supervised fine-tuning, the whole loop: read it from `train` downwards.

The loss of an update is the mean over the target tokens of its whole window, so the gradient does not depend on how the
window is cut into passes, nor on packing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from phi2.arriving import without_wait
from phi2.data.encoded import EncodedSequence
from phi2.data.flat import Joined, lengths
from phi2.inference.engine import evaluation_mode
from phi2.losses.head import target_logps
from phi2.model import Phi2ForCausalLM
from phi2.runs.folder import open_run, write_settings
from phi2.runs.inputs import inputs_of, require_same_inputs
from phi2.runs.run import Run
from phi2.training.config import SFTConfig
from phi2.training.loop import updates_of
from phi2.training.metrics import Metrics
from phi2.training.optim import Optimizer
from phi2.training.packing import TokenRow, best_fit, row_of_sequences, wrapped
from phi2.training.passes import Attempt, Cut, once, require_memory
from phi2.training.precision import autocast
from phi2.training.session import Session, require_fit, start
from phi2.training.window import total_steps, windows_of

Sample = list[EncodedSequence]  # one sequence, or those packed together


@dataclass(frozen=True)
class Samples:
    """Rows, and the places of those that make each sample."""

    rows: Sequence[EncodedSequence]
    blocks: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, place: int) -> Sample:
        return [self.rows[i] for i in self.blocks[place]]


def train(config: SFTConfig) -> Run:
    """Runs, or resumes, a supervised run; raises what `fit` raises."""
    return fit(start(config), config)


def fit(session: Session[EncodedSequence], config: SFTConfig) -> Run:
    """Runs, or resumes, a supervised run on what the session has loaded.

    Raises:
        ValueError: for settings, data or an output folder that cannot be used, and when the loss is no number any more.
        Interrupted: after Ctrl-C, with a checkpoint to resume from.
    """
    session.require_same(config)
    checkpoint, run = open_run(config), Path(config.output)
    tokenizer, (train_rows, eval_rows, _) = session.tokenizer, session.rows
    session.keep_audits(run)
    samples = pack(train_rows, config, tokenizer.eos_id)
    windows = windows_of(config, len(samples))
    total_steps(config, windows)  # a warm-up that outlasts them is refused before a model is loaded
    inputs = inputs_of(config, tokenizer, train_rows, eval_rows, session.dtype, config.from_scratch)
    require_same_inputs(run, inputs, resumed=checkpoint is not None)
    write_settings(run, config)
    with session.policy(config, checkpoint) as model:
        seen = Joined(samples.rows, eval_rows)
        require_fit(config, model, tokenizer, seen)
        with autocast(config):
            require_memory(config, model, seen)
        with updates_of(config, model, tokenizer, windows, seen, checkpoint, "sft") as updates:
            model.train()
            cut = updates.passes.cut
            evaluation = partial(evaluate, config, model, eval_rows, cut) if eval_rows else None
            for step in updates.steps():
                window = [samples[i] for i in windows.at(step - 1)]
                if step == updates.done + 1:
                    updates.compile(partial(backward, config, model, updates.optimizer, window, cut))
                metrics = update(config, model, updates.optimizer, window, cut, updates.attempt)
                updates.end(step, sum(map(tokens_of, window)), metrics, evaluation)
    return Run(run)


def pack(rows: Sequence[EncodedSequence], config: SFTConfig, separator: int) -> Samples:
    """The samples of the run, by `config.packing`."""
    if config.packing == "best_fit":
        sizes = lengths(rows)
        if max(sizes) > config.packing_length:
            told = f"packing_length is {config.packing_length}, but a row has {max(sizes)} tokens"
            raise ValueError(f"{told}; raise it, or lower max_length")
        return Samples(rows, best_fit(sizes, config.packing_length))
    if config.packing == "wrapped":
        rows = wrapped(rows, config.packing_length, separator)
    return Samples(rows, [(i,) for i in range(len(rows))])


def tokens_of(sample: Sample) -> int:
    return sum(sequence.tokens for sequence in sample)


def update(
    config: SFTConfig,
    model: Phi2ForCausalLM,
    optimizer: Optimizer,
    window: Sequence[Sample],
    cut: Cut,
    attempt: Attempt = once,
) -> Metrics:
    """One optimizer step over a window of samples; returns its metrics.

    Args:
        cut: into passes.
        attempt: at the gradient; the step itself is made once.
    """
    loss = attempt(partial(backward, config, model, optimizer, window, cut))
    learning_rate = optimizer.learning_rate
    counted = {"learning_rate": learning_rate, "target_tokens": _targets_of(window)}
    return Metrics({"loss": loss, "grad_norm": optimizer.step(), **counted})


def _targets_of(window: Sequence[Sample]) -> int:
    return sum(sequence.target_tokens for sample in window for sequence in sample)


def backward(
    config: SFTConfig, model: Phi2ForCausalLM, optimizer: Optimizer, window: Sequence[Sample], cut: Cut
) -> Tensor:
    """Adds the gradient of a window; returns its loss, a number on the device."""
    tokens = _targets_of(window)
    noise, loss = config.neftune_noise_alpha, torch.zeros((), device=model.device)
    for places in cut([tokens_of(sample) for sample in window]):
        samples = [window[i] for i in places]
        row = row_of_sequences([sequence for sample in samples for sequence in sample]).to(model.device)
        add_noise = neftune(noise, [tokens_of(sample) for sample in samples]) if noise else None
        with autocast(config):
            logps = forward(model, row, add_noise)
        micro_loss = -logps.sum() / tokens
        optimizer.backward(micro_loss)
        loss += micro_loss.detach()
    return loss


def forward(model: Phi2ForCausalLM, row: TokenRow, add_noise: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """(N,) log-probabilities of a row's targets."""
    embeddings = model.model.embed_tokens(row.input_ids)
    if add_noise is not None:
        embeddings = add_noise(embeddings)
    hidden = model.model(inputs_embeds=embeddings, positions=row.positions, visible_until=row.visible_until)
    return target_logps(model, hidden, row.logits_indices, row.targets)[0]


def neftune(alpha: float, lengths: list[int]) -> Callable[[Tensor], Tensor]:
    """NEFTune: x + uniform(-m, m), m = alpha / sqrt(tokens of the sample * C).

    Args:
        lengths: tokens of each sample in the row.
    Source: arXiv:2310.05914 Algorithm 1.
    """

    def add_noise(x: Tensor) -> Tensor:  # (1, T, C)
        tokens = torch.tensor(lengths)
        size = alpha / (tokens.float() * x.shape[-1]).sqrt()
        each = without_wait(size.repeat_interleave(tokens), x.device)  # (T,)
        return x + torch.zeros_like(x).uniform_(-1, 1) * each[:, None].to(x.dtype)

    return add_noise


@torch.no_grad()
def evaluate(config: SFTConfig, model: Phi2ForCausalLM, rows: Sequence[EncodedSequence], cut: Cut) -> dict[str, float]:
    """Mean loss per target token over all rows, whatever the passes."""
    total, tokens = 0.0, 0
    with evaluation_mode(model), autocast(config):
        for places in cut([row.tokens for row in rows]):
            row = row_of_sequences([rows[i] for i in places]).to(model.device)
            total -= forward(model, row).sum().item()
            tokens += len(row.targets)
    return {"eval_loss": total / tokens, "target_tokens": tokens}
