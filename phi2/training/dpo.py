"""Direct preference optimisation and its family: a run from its settings to its last update.

What is minimised, and how one update is made, is `objective.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from phi2.data.encoded import EncodedPreference
from phi2.data.flat import FlatPreferences, Joined
from phi2.files import write_whole
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.knobs import Knob
from phi2.model import Phi2ForCausalLM
from phi2.runs.folder import open_run, write_settings
from phi2.runs.inputs import Inputs, digest_of_model, digest_of_texts, inputs_of, require_same_inputs
from phi2.runs.run import Run
from phi2.training.config import DPOConfig
from phi2.training.ledger import LedgerWriter, ledger_of
from phi2.training.look import look_at_loss
from phi2.training.loop import Updates, Watch, updates_of
from phi2.training.moving_reference import MovingReference
from phi2.training.needs import require_both_labels, require_neighbours, rows_for, tell_unused
from phi2.training.objective import Objective
from phi2.training.optim import Optimizer
from phi2.training.passes import require_memory
from phi2.training.precision import autocast
from phi2.training.reference import make_reference, other_reference
from phi2.training.scoring import mismatched
from phi2.training.session import Session, require_fit, start
from phi2.training.weights import with_weights
from phi2.training.window import Windows, total_steps, windows_of


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
    checkpoint, tokenizer = open_run(config), session.tokenizer
    rows, held_out = rows_of(session, config, loss)
    windows = windows_of(config, len(rows))
    total = total_steps(config, windows)
    require_moves(config, total)
    require_neighbours(loss, windows.size)
    begin(session, config, loss, rows, held_out, resumed=checkpoint is not None)
    with session.policy(config, checkpoint) as model:
        others = others_to_score(config, loss, windows, total, rows, held_out)
        seen = Joined(rows, held_out, others)
        require_fit(config, model, tokenizer, seen)
        with autocast(config):
            require_memory(config, model, seen)
        require_dropout(config, model)
        scored = Joined(rows.take(windows.until(total)), held_out, others)
        reference = None if loss.reference_free else make_reference(session, config, model, checkpoint, scored)
        title, save = f"dpo {loss.name}", reference.save if isinstance(reference, MovingReference) else None
        with updates_of(config, model, tokenizer, windows, seen, checkpoint, title, loss.state, watch, save) as updates:
            objective = Objective(config, model, reference, loss, updates.loss_state, updates.passes.cut)
            ledger = ledger_of(config, loss, tokenizer, held_out, updates.done)
            run_updates(updates, objective, windows, rows, held_out, ledger)
    return Run(config.output)


def rows_of(
    session: Session[EncodedPreference], config: DPOConfig, loss: BoundLoss
) -> tuple[FlatPreferences, FlatPreferences]:
    """Those to train on and those held out, as the loss reads them."""
    rows, held_out = with_weights(config, *(rows_for(loss, each) for each in session.rows[:2]))
    require_both_labels(loss, rows)
    tell_unused(loss, session.rows.train, session.rows.evaluation)
    session.keep_audits(Path(config.output))
    return rows, held_out


def begin(
    session: Session[EncodedPreference],
    config: DPOConfig,
    loss: BoundLoss,
    rows: FlatPreferences,
    held_out: FlatPreferences,
    resumed: bool,
) -> None:
    """Notes in the run folder what the run is of, or compares it with what is noted there, and tries the loss."""
    run = Path(config.output)
    inputs = inputs_of(config, session.tokenizer, rows, held_out, session.dtype) | preference_inputs(config, loss)
    require_same_inputs(run, inputs, resumed)
    write_settings(run, config)
    keep_loss_file(config, run)
    look_at_loss(loss, rows, held_out)


def run_updates(
    updates: Updates,
    objective: Objective,
    windows: Windows,
    rows: Sequence[EncodedPreference],
    held_out: Sequence[EncodedPreference],
    ledger: LedgerWriter | None,
) -> None:
    """All that are left."""
    objective.model.train(not objective.config.disable_dropout)
    for step in updates.steps():
        window = [rows[i] for i in windows.at(step - 1)]
        if step == 1:
            objective.check_start(window)
        if step == updates.done + 1:
            updates.compile(partial(rehearse, objective, updates.optimizer, window))
        metrics = objective.update(updates.optimizer, window, updates.writes(step), updates.attempt)
        if isinstance(objective.reference, MovingReference):
            objective.reference.follow(step)
        evaluation = partial(objective.evaluate, held_out, ledger, step) if held_out else None
        updates.end(step, sum(row.tokens for row in window), metrics, evaluation)


def rehearse(objective: Objective, optimizer: Optimizer, window: Sequence[EncodedPreference]) -> None:
    """The passes of an update, with its reference as it is and as it will be."""
    objective.backward(optimizer, window)
    if isinstance(objective.reference, MovingReference) and objective.reference.grows:
        with objective.reference.grown():
            objective.backward(optimizer, window)


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
    """Refuses settings of a reference that the loss does not need, or of one that cannot tell what it needs."""
    if loss.reference_free and (config.reference != "auto" or config.precompute_ref_log_probs or config.sync_ref_model):
        names = "reference, precompute_ref_log_probs and sync_ref_model"
        raise ValueError(f"loss {loss.name} needs no reference: leave {names} unset")
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
