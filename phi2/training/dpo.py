"""Direct preference optimisation and its family, the whole loop: read it from `train` downwards.

Each update: the policy's and the reference's log-probabilities of the answers of every row, token by token; a loss per
row, whatever its answers are, a pair, a list or one with a label; the mean over the window. With an exact split: rows
are averaged over the whole window, and the chosen answers' likelihood, where asked for, over all their tokens in the
window. A loss whose value depends on other rows (`scope="window"`) is given the window whole, in two phases
(`two_phases.py`) where it is more than one pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phi2.data.encoded import EncodedPreference
from phi2.data.flat import Joined
from phi2.files import write_whole
from phi2.losses.batch import AnswerBatch
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.knobs import Knob
from phi2.losses.properties import require_numbers
from phi2.losses.slopes import slopes_of
from phi2.model import Phi2ForCausalLM
from phi2.runs.folder import open_run, write_settings
from phi2.runs.inputs import Inputs, digest_of_model, digest_of_texts, inputs_of, require_same_inputs
from phi2.runs.run import Run
from phi2.training.config import DPOConfig
from phi2.training.ledger import LedgerWriter, ledger_of
from phi2.training.look import look_at_loss
from phi2.training.loop import Watch, updates_of
from phi2.training.metrics import means, metrics_of
from phi2.training.moving_reference import MovingReference
from phi2.training.needs import require_both_labels, require_neighbours, rows_for, tell_unused
from phi2.training.optim import Optimizer
from phi2.training.passes import Cut
from phi2.training.precision import autocast, compute_dtype
from phi2.training.reference import Reference, make_reference, other_reference, starts_at_reference
from phi2.training.reference_cache import CACHED_TOLERANCE
from phi2.training.scoring import answer_batch, mismatched, score_answers, scored
from phi2.training.session import Session, require_fit, start
from phi2.training.two_phases import backward_of_window
from phi2.training.weights import with_weights
from phi2.training.window import Windows, total_steps, windows_of

# How far apart policy and reference may start, in nats per token: the same weights see the same rows, so hardly at all.
STEP_0_TOLERANCE = 1e-3


def train(config: DPOConfig) -> Run:
    """Runs, or resumes, a preference run; raises what `fit` raises."""
    return fit(start(config), config)


def fit(session: Session[EncodedPreference], config: DPOConfig, watch: Watch | None = None) -> Run:
    """Runs, or resumes, a preference run on what the session has loaded.

    Args:
        watch: called behind every evaluation; it leaves the model, and torch's random numbers, as they are.
    Raises:
        ValueError: for settings, data, a loss or an output folder that cannot be used; when a resumed run began with
            other inputs; when policy and reference do not agree at the first step; when the loss is no number any more.
        Interrupted: after Ctrl-C, with a checkpoint to resume from.
    """
    session.require_same(config)
    loss = bind_loss(config.loss, config.knobs, config.loss_file)
    config = with_all_knobs(config, loss)
    require_reference(config, loss)
    require_asked(config, loss)
    checkpoint, run = open_run(config), Path(config.output)
    tokenizer = session.tokenizer
    rows, eval_rows = with_weights(config, *(rows_for(loss, each) for each in session.rows[:2]))
    require_both_labels(loss, rows)
    tell_unused(loss, session.rows.train, session.rows.evaluation)
    session.keep_audits(run)
    windows = windows_of(config, len(rows))
    total = total_steps(config, windows)
    require_moves(config, total)
    require_neighbours(loss, windows.size)
    inputs = inputs_of(config, tokenizer, rows, eval_rows, session.dtype) | preference_inputs(config, loss)
    require_same_inputs(run, inputs, resumed=checkpoint is not None)
    write_settings(run, config)
    keep_loss_file(config, run)
    look_at_loss(loss, rows, eval_rows)
    with session.policy(config, checkpoint) as model:
        others = others_to_score(config, loss, windows, total, rows, eval_rows)
        seen = Joined(rows, eval_rows, others)
        require_fit(config, model, tokenizer, seen)
        require_dropout(config, model)
        scored = Joined(rows.take(windows.until(total)), eval_rows, others)
        reference = None if loss.reference_free else make_reference(session, config, model, checkpoint, scored)
        moving = reference if isinstance(reference, MovingReference) else None
        title, save = f"dpo {loss.name}", moving.save if moving else None
        with updates_of(config, model, tokenizer, windows, seen, checkpoint, title, loss.state, watch, save) as updates:
            model.train(not config.disable_dropout)
            state = updates.loss_state
            cut = updates.passes.cut
            ledger = ledger_of(config, loss, tokenizer, eval_rows, updates.done)
            evaluation = partial(evaluate, config, model, eval_rows, cut, reference, loss, state, ledger)
            for step in updates.steps():
                window = [rows[i] for i in windows.at(step - 1)]
                if step == 1:
                    check_start(config, model, reference, window, cut, loss)
                attempt = partial(update, config, model, updates.optimizer, window, cut, reference, loss, state)
                metrics, tokens = updates.attempt(attempt), sum(row.tokens for row in window)
                if moving is not None:
                    moving.follow(step)
                updates.end(step, tokens, metrics, partial(evaluation, step) if eval_rows else None)
    return Run(run)


def others_to_score(
    config: DPOConfig,
    loss: BoundLoss,
    windows: Windows,
    total: int,
    rows: Sequence[EncodedPreference],
    eval_rows: Sequence[EncodedPreference],
) -> list[EncodedPreference]:
    """The answers that a run of so many updates sets behind other prompts."""
    if "mismatched" not in loss.needs:
        return []
    updates = ([rows[i] for i in windows.at(step)] for step in range(total))
    return [row for window in (*updates, eval_rows) for row in mismatched(window, config.max_length)]


def require_reference(config: DPOConfig, loss: BoundLoss) -> None:
    """Refuses settings of a reference for a loss without one."""
    if loss.reference_free and (config.reference != "auto" or config.precompute_ref_log_probs or config.sync_ref_model):
        names = "reference, precompute_ref_log_probs and sync_ref_model"
        raise ValueError(f"loss {loss.name} needs no reference: leave {names} unset")


def require_asked(config: DPOConfig, loss: BoundLoss) -> None:
    """Refuses a reference of known log-probabilities for a loss that needs its whole distributions."""
    if "kl" in loss.needs and config.precompute_ref_log_probs:
        raise ValueError(f"loss {loss.name} needs all of what the reference says: leave precompute_ref_log_probs unset")


def require_moves(config: DPOConfig, total: int) -> None:
    """Refuses a reference that is to move, and never would."""
    if config.sync_ref_model and config.ref_model_sync_steps > total:
        raise ValueError(
            f"sync_ref_model: ref_model_sync_steps {config.ref_model_sync_steps} outlasts the run of {total} updates"
        )


def require_dropout(config: DPOConfig, model: Phi2ForCausalLM) -> None:
    """Refuses to leave dropout on where there is none.

    Raises:
        ValueError: when neither the model nor its adapter drops anything.
    """
    shape, lora = model.config, model.lora_config
    rates = (shape.resid_pdrop, shape.embd_pdrop, shape.attention_dropout, lora.lora_dropout if lora else 0)
    if not config.disable_dropout and not any(rates):
        raise ValueError("disable_dropout false needs a dropout, got 0 in the model's config.json and in lora_dropout")


def with_all_knobs(config: DPOConfig, loss: BoundLoss) -> DPOConfig:
    """The config with the loss's own values where it was silent, so that the run folder tells what was used."""
    if loss.parts:
        parts: list[str | dict[str, Any]] = [
            {"loss": each.name, "weight": weight, "args": each.knobs} for weight, each in loss.parts
        ]
        return replace(config, loss=parts, beta=None, label_smoothing=None, loss_args={})
    beta, smoothing = loss.number("beta"), loss.number("label_smoothing")
    own = {"beta": beta, "label_smoothing": smoothing}
    others: dict[str, Knob | None] = {}
    others |= {name: value for name, value in loss.knobs.items() if own.get(name) is None}
    return replace(config, loss=loss.name, beta=beta, label_smoothing=smoothing, loss_args=others)


def preference_inputs(config: DPOConfig, loss: BoundLoss) -> Inputs:
    """Digests of what only a preference run depends on."""
    folder = other_reference(config, loss)
    reference = {} if folder is None else {"reference": digest_of_model(folder)}
    return {"loss": None if loss.source is None else digest_of_texts([loss.source]), **reference}


def keep_loss_file(config: DPOConfig, run: Path) -> None:
    """Copies the user's file of losses into the run folder, so that it tells what was trained on."""
    if config.loss_file is not None:
        write_whole(run / "loss.py", Path(config.loss_file).read_text(encoding="utf-8"))


@torch.no_grad()
def check_start(
    config: DPOConfig,
    model: Phi2ForCausalLM,
    reference: Reference | None,
    window: Sequence[EncodedPreference],
    cut: Cut,
    loss: BoundLoss,
) -> None:
    """Before the first update loss and gradient are numbers; if the policy is the reference then, the loss is known.

    Args:
        window: the first one; where no loss needs all of it, its first pass is looked at.
    Raises:
        ValueError: when they are not, or policy and reference do not agree: training would start from a wrong reward.
    """
    training = model.training
    model.eval()
    first = [window[i] for i in cut([row.tokens for row in window])[0]]
    seen = window if loss.scope == "window" else first
    answers = score_answers(model, seen, cut, reference, partial(autocast, config), loss.needs)
    answers = replace(answers, mismatched=others_of(config, model, window, cut, reference, loss))
    model.train(training)
    if reference is not None and starts_at_reference(config):
        require_agreement(config, answers, loss)
    require_numbers(loss, answers)


def require_agreement(config: DPOConfig, answers: AnswerBatch, loss: BoundLoss) -> None:
    """Refuses a start at which policy and reference, the same weights, do not give the same log-probabilities."""
    cached = config.precompute_ref_log_probs
    tolerance = CACHED_TOLERANCE[compute_dtype(config)] if cached else STEP_0_TOLERANCE
    agreeing = answers.at_reference()
    apart = (answers.policy_logps - agreeing.policy_logps).abs().max().item()
    expected, actual = loss(agreeing).mean().item(), loss(answers).mean().item()
    if not (math.isfinite(expected) and math.isfinite(actual)):
        raise ValueError(f"step 1: loss {loss.name!r} is {actual}, and {expected} where policy and reference agree")
    if not apart <= tolerance or not abs(actual - expected) <= tolerance * max(1.0, abs(expected)):
        raise ValueError(
            f"step 1: policy and reference must agree, but differ by up to {apart:.2g} nats per token (allowed"
            f" {tolerance:g}), loss {actual:.4f} in place of {expected:.4f}; is the reference another model?"
        )


def update(
    config: DPOConfig,
    model: Phi2ForCausalLM,
    optimizer: Optimizer,
    window: Sequence[EncodedPreference],
    cut: Cut,
    reference: Reference | None,
    loss: BoundLoss,
    state: dict[str, float],
) -> dict[str, float]:
    """One optimizer step over a window of rows; returns the metrics of them all.

    Args:
        cut: into passes.
        state: of the loss, moved on by the update.
    """
    passes, gathered = cut([row.tokens for row in window]), []
    others = others_of(config, model, window, cut, reference, loss)
    losses_of = partial(objective, config, loss, state, window, others)
    if loss.scope == "window" and len(passes) > 1:
        answers, losses, after = backward_of_window(
            config, model, optimizer, window, passes, reference, loss.needs, losses_of
        )
        gathered.append(metrics_of(answers, losses, loss))
    else:
        for places in passes:
            part = scored(model, window, places, reference, autocast(config), loss.needs)
            answers = answer_batch([window[i] for i in places], part)
            losses, after = losses_of(answers)
            optimizer.backward(losses.sum() / len(window))
            gathered.append(metrics_of(answers, losses, loss))
    state.update(after)
    learning_rate = optimizer.learning_rate
    norm = optimizer.step()
    kept = {f"state/{name}": value for name, value in state.items()}
    return {**means(gathered), **kept, "grad_norm": norm, "learning_rate": learning_rate}


def objective(
    config: DPOConfig,
    loss: BoundLoss,
    state: Mapping[str, float],
    window: Sequence[EncodedPreference],
    others: AnswerBatch | None,
    answers: AnswerBatch,
) -> tuple[Tensor, dict[str, float]]:
    """(P,) values whose mean over the window is the loss plus the weighted NLL per chosen token; its state then."""
    given = answers if others is None else replace(answers, mismatched=others)  # whose pairs the metrics need again
    losses, after = loss.step(given, state)
    if not config.nll_weight:
        return losses, after
    per_row = len(window) / max(1, sum(len(row.chosen) for row in window if row.scores[0] > 0 or len(row.scores) > 1))
    return losses - config.nll_weight * per_row * answers.chosen, after


def others_of(
    config: DPOConfig,
    model: Phi2ForCausalLM,
    window: Sequence[EncodedPreference],
    cut: Cut,
    reference: Reference | None,
    loss: BoundLoss,
) -> AnswerBatch | None:
    """The answers of a window behind other prompts, without gradient, where the loss asks for them."""
    if "mismatched" not in loss.needs:
        return None
    with torch.no_grad():
        return score_answers(model, mismatched(window, config.max_length), cut, reference, partial(autocast, config))


@torch.no_grad()
def evaluate(
    config: DPOConfig,
    model: Phi2ForCausalLM,
    rows: Sequence[EncodedPreference],
    cut: Cut,
    reference: Reference | None,
    loss: BoundLoss,
    state: Mapping[str, float],
    ledger: LedgerWriter | None = None,
    step: int = 0,
) -> dict[str, float]:
    """The metrics of training over a whole data set, names prefixed with eval_.

    A loss of scope "window" is given all rows of it as one window, so that no cut changes its value; one with a
    state has it as training left it, and leaves it so.

    Args:
        ledger: is told what was found of each pair behind update `step`.
    """
    training = model.training
    model.eval()
    answers = score_answers(model, rows, cut, reference, partial(autocast, config), loss.needs)
    others = others_of(config, model, rows, cut, reference, loss)
    model.train(training)
    slopes = slopes_of(lambda given: objective(config, loss, state, rows, others, given)[0], answers)
    if ledger is not None:
        ledger.write(step, answers, slopes, state)
    metrics = means([metrics_of(answers, slopes.values, loss)])
    return {f"eval_{name}": value for name, value in metrics.items()}
