"""What `phi2 verify` holds to be true of a model on its rows: one function a line, each with what it measured.

What is compared bit for bit may move by nothing. Log-probabilities may move by twice what the dtype itself rounds off
(`TOLERANCE` at least), gradients by a share of their norm.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from phi2.checkpoints.peft_files import load_adapter, save_adapter
from phi2.checkpoints.weights import load, load_tokenizer, save_pretrained
from phi2.data.encoded import EncodedPreference
from phi2.hub import resolve
from phi2.inference.config import SamplingParams
from phi2.inference.engine import Request, Token, first_nonfinite_module
from phi2.inference.generate import choices_of
from phi2.inference.kept_engine import kept_engine, release_engine
from phi2.lab.layouts import Logps, alone, batches_of, behind, sequence_logps, shared
from phi2.lab.noise import NoiseFloor, moved
from phi2.lab.verify_config import BATCH
from phi2.lora import activate, detach, lora_modules
from phi2.losses.batch import AnswerBatch
from phi2.losses.bound import bind_loss
from phi2.model import Phi2ForCausalLM
from phi2.training import dpo
from phi2.training.config import DPOConfig
from phi2.training.objective import STEP_0_TOLERANCE, Objective
from phi2.training.optim import Optimizer
from phi2.training.packing import row_of_answers
from phi2.training.passes import Cut, Passes
from phi2.training.precision import autocast
from phi2.training.reference_cache import Reference
from phi2.training.scoring import Scored, answer_batch, score_answers
from phi2.training.session import Session

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}  # nats a token
GRADIENT = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}  # share of the gradient's norm
NATS = "nats a token"
REPLY_TOKENS = 16


class Skipped(Exception):
    """A check that cannot be made here, and why."""


class Measured(NamedTuple):
    """What a check found, what it may find at most, and what it wants to say of it."""

    value: float
    allowed: float
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """A policy as a run on these rows starts it.

    Attributes:
        run: settings of such a run.
        single: what `alone` says of the rows.
        folder: for what is written.
    """

    session: Session[EncodedPreference]
    run: DPOConfig
    model: Phi2ForCausalLM
    rows: list[EncodedPreference]
    single: Logps
    noise: NoiseFloor
    reference: Reference
    folder: Path

    @property
    def nats(self) -> float:
        """How far a token's log-probability may move."""
        own = self.noise.precisions.get(self.model.dtype)
        return max(TOLERANCE[self.model.dtype], 2 * own.token_max if own else 0.0)

    @property
    def window(self) -> list[EncodedPreference]:
        """The rows of an update."""
        return self.rows[: 2 * BATCH]


# ---- log-probabilities ----


@torch.no_grad()
def same_logps(layout: Callable[[Phi2ForCausalLM, Sequence[EncodedPreference]], Logps], subject: Subject) -> Measured:
    """Answers in a layout and alone."""
    found = moved(subject.single, layout(subject.model, subject.rows))
    return Measured(found.token_max, subject.nats, NATS)


@torch.no_grad()
def finite(subject: Subject) -> Measured:
    """Log-probabilities that are no number, and the module where the first of them comes from."""
    model, run = subject.model, partial(shared, subject.model, subject.rows)
    broken = int((~torch.cat(run()).isfinite()).sum())
    return Measured(broken, 0, "log-probs", f"first in {first_nonfinite_module(model, run)}" if broken else "")


@torch.no_grad()
def vocabulary(subject: Subject) -> Measured:
    """The ids of the rows, and those that are said where all are nearly as likely, against the tokenizer's."""
    hot = SamplingParams(max_new_tokens=REPLY_TOKENS, temperature=100.0)
    said = [token.token_id for reply in replies(subject, hot) for token in reply]
    parts = [part for row in subject.rows for part in (row.prompt, *row.answers)]
    highest = max(max(said), *(int(part.max(initial=0)) for part in parts))
    return Measured(highest, len(subject.session.tokenizer) - 1, "the last id of the tokenizer")


@torch.no_grad()
def cached_decoding(subject: Subject) -> Measured:
    """Replies of the engine, and their log-probabilities in a full pass."""
    apart = []
    for row, said in zip(subject.window, replies(subject, SamplingParams(max_new_tokens=REPLY_TOKENS)), strict=True):
        sequence = behind(row.prompt, np.array([token.token_id for token in said]), row.origin)
        full = sequence_logps(subject.model, sequence).cpu()
        apart.append((full - torch.tensor([token.logprob for token in said])).abs().max())
    return Measured(largest(apart), subject.nats, NATS)


def largest(differences: Sequence[Tensor]) -> float:
    """The largest of some numbers; where one of them is none, that."""
    return torch.stack(list(differences)).max().item()


def replies(subject: Subject, params: SamplingParams) -> list[list[Token]]:
    """Those to the first prompts, past any end token."""
    model, prompts = subject.model, [row.prompt.tolist() for row in subject.window]
    length = min(model.config.max_position_embeddings, max(map(len, prompts)) + params.max_new_tokens)
    engine = kept_engine(model, choices_of(model, subject.session.tokenizer), len(prompts), length)
    requests = [Request(ids, params.of_row(i), adapter=model.computed_adapter) for i, ids in enumerate(prompts)]
    said: dict[Request, list[Token]] = {request: [] for request in requests}
    for request in requests:
        engine.add(request)
    while not engine.is_idle:
        for token in engine.step():
            said[token.request].append(token)
    release_engine(model)
    return [*said.values()]


# ---- training ----


@torch.no_grad()
def step_0(subject: Subject) -> AnswerBatch:
    """All answers, scored as a run scores them before its first update."""
    return score_answers(subject.model, subject.rows, in_fours, subject.reference, partial(autocast, subject.run))


def policy_is_reference(subject: Subject) -> Measured:
    """A policy before its first update, and its reference."""
    answers = step_0(subject)
    apart = (answers.policy_logps - answers.at_reference().policy_logps).abs().max().item()
    return Measured(apart, STEP_0_TOLERANCE, NATS)


def loss_at_start(subject: Subject) -> Measured:
    """DPO's loss there, and -log sigma(0)."""
    loss = bind_loss("sigmoid")(step_0(subject)).mean().item()
    return Measured(abs(loss - math.log(2)), STEP_0_TOLERANCE, "nats", f"it is {loss:.4f}, log 2 is 0.6931")


class Gradient(Optimizer):
    """In place of an update, keeps its gradient and leaves the weights as they are."""

    def step(self) -> Tensor:
        self.kept = torch.cat([p.grad.flatten() for p in self.names if p.grad is not None])
        self.adamw.zero_grad(set_to_none=True)
        return self.kept.norm()


@contextmanager
def stirred(model: Phi2ForCausalLM) -> Iterator[None]:
    """Inside it the adapter is no fresh one, which would hide half of its gradient."""
    weights = [layer.lora_B.weight for layer in lora_modules(model).values()]
    before, generator = [weight.detach().clone() for weight in weights], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in weights:
            weight += 0.01 * torch.randn(weight.shape, generator=generator).to(weight.device)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)


def in_fours(tokens: Sequence[int]) -> list[list[int]]:
    """Passes of as many rows, in their order."""
    return [[*places] for places in batches_of(range(len(tokens)))]


def gradient(subject: Subject, cut: Cut = in_fours) -> Tensor:
    """Of an update over the first rows, cut into passes, as `phi2 dpo` makes it; one vector."""
    optimizer = _optimizer(subject)
    _objective(subject, cut).update(optimizer, subject.window)
    return optimizer.kept


def gradient_of_rows(subject: Subject) -> Tensor:
    """The same with each answer behind its prompt in a row of its own."""
    optimizer, objective, window = _optimizer(subject), _objective(subject), subject.window
    for row in window:
        ref = subject.reference([row], row_of_answers([row]).to(subject.model.device))
        answers = answer_batch([row], Scored(torch.cat(alone(subject.model, [row])), ref, {}))
        losses, _ = objective.losses(window, None, answers)
        optimizer.backward(losses.sum() / len(window))
    optimizer.step()
    return optimizer.kept


def _objective(subject: Subject, cut: Cut = in_fours) -> Objective:
    run = _with_nll(subject.run)
    return Objective(run, subject.model, subject.reference, bind_loss(run.loss), {}, cut)


def _optimizer(subject: Subject) -> Gradient:
    return Gradient(subject.model, subject.run, total_steps=1, scale_loss=False)


def _with_nll(run: DPOConfig) -> DPOConfig:
    """A loss that is averaged over rows, and one over tokens."""
    return replace(run, nll_weight=0.1)


def of_another_split(subject: Subject) -> Measured:
    tokens = sum(row.tokens for row in subject.window)
    with stirred(subject.model):
        return _gap(subject, gradient(subject), gradient(subject, Passes(max(1, tokens // 3)).cut))


def of_separate_rows(subject: Subject) -> Measured:
    with stirred(subject.model):
        return _gap(subject, gradient(subject), gradient_of_rows(subject))


def with_checkpointing(subject: Subject) -> Measured:
    core = subject.model.model
    with stirred(subject.model):
        kept = gradient(subject)
        try:
            core.activation_checkpointing = True
            return _gap(subject, kept, gradient(subject))
        finally:
            core.activation_checkpointing = False


def _gap(subject: Subject, gradient: Tensor, other: Tensor) -> Measured:
    share = ((gradient - other).norm() / gradient.norm()).item()
    return Measured(share, GRADIENT[subject.model.dtype], "of the gradient's norm")


# ---- files ----


@torch.no_grad()
def adapter_round_trip(subject: Subject) -> Measured:
    """The policy, and the same base with the adapter that was written."""
    model, name, folder = subject.model, subject.model.active_adapter, subject.folder / "adapter"
    assert name is not None
    with stirred(model):
        save_adapter(model, folder, subject.run.model)
        before = shared(model, subject.rows)
    load_adapter(model, folder, adapter_name="again")
    try:
        return Measured(moved(before, shared(model, subject.rows)).token_max, 0.0, NATS)
    finally:
        detach(model, "again")
        activate(model, name)


def model_round_trip(session: Session, folder: Path) -> Measured:
    """The model, and what is read where it was written; one of them at a time is in memory, and the second stays."""
    base, tokenizer = session.base, load_tokenizer(resolve(session.config.model))
    before, dtype, device = digests(base), base.dtype, base.device
    save_pretrained(base, tokenizer, folder)
    del base, session.base
    session.base, read = load(folder, device, dtype)
    after = digests(session.base)
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    if read.backend.to_str() != tokenizer.backend.to_str() or read.stop_ids != tokenizer.stop_ids:
        changed.append("the tokenizer")
    return Measured(len(changed), 0, "tensors", f"first {changed[0]}" if changed else "")


def digests(model: Phi2ForCausalLM) -> dict[str, bytes]:
    """Of every tensor's bytes."""
    return {
        name: hashlib.blake2b(tensor.detach().cpu().contiguous().view(torch.uint8).numpy()).digest()
        for name, tensor in model.state_dict().items()
    }


# ---- whole runs ----


def same_seed(session: Session[EncodedPreference], run: DPOConfig, folder: Path) -> Measured:
    """The adapters of two runs."""
    first = fit(session, run, folder / "first")
    if not _apart(first, first / "checkpoints" / "step-1").value:
        raise Skipped("the second update did not move the adapter, as where gradients overflow float16")
    return _apart(first, fit(session, run, folder / "second"))


def resumed(session: Session[EncodedPreference], run: DPOConfig, folder: Path) -> Measured:
    """The adapter of a run, and of a copy of it that lost all behind its first checkpoint."""
    whole, broken = folder / "first", folder / "resumed"
    if not (whole / "adapter").is_dir():
        raise ValueError("the run that was to be resumed did not end")
    shutil.copytree(whole, broken)
    for left in (*broken.glob(f"checkpoints/step-{run.max_steps}"), broken / "adapter"):
        shutil.rmtree(left)
    return _apart(whole, fit(session, replace(run, resume=True), broken))


def fit(session: Session[EncodedPreference], run: DPOConfig, output: Path) -> Path:
    """A run that keeps what it says to itself."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        dpo.fit(session, replace(run, output=str(output), save_steps=1))
    return output


def _apart(run: Path, other: Path) -> Measured:
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, other))
    return Measured(largest([(a[name] - b[name]).abs().max() for name in a]), 0.0, "of a weight")
