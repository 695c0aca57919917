"""What a preference run minimises, and one update of it: read `Objective.update`.

Each update: the policy's and the reference's log-probabilities of the answers of every row, token by token; a loss per
row, whatever its answers are, a pair, a list or one with a label; the mean over the window. With an exact split: rows
are averaged over the whole window, and the chosen answers' likelihood, where asked for, over all their tokens in the
window. A loss whose value depends on other rows (`scope="window"`) is given the window whole, in two phases
(`two_phases.py`) where it is more than one pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from phi2.data.encoded import EncodedPreference
from phi2.inference.engine import evaluation_mode
from phi2.losses.batch import AnswerBatch
from phi2.losses.bound import BoundLoss
from phi2.losses.properties import outcome, require_numbers
from phi2.losses.registry import State
from phi2.losses.slopes import slopes_of
from phi2.model import Phi2ForCausalLM
from phi2.runs.log import STATE
from phi2.training.config import DPOConfig
from phi2.training.ledger import LedgerWriter
from phi2.training.metrics import Metrics, means, metrics_of
from phi2.training.optim import Optimizer
from phi2.training.passes import Attempt, Cut, once
from phi2.training.precision import autocast, compute_dtype
from phi2.training.reference import starts_at_reference
from phi2.training.reference_cache import CACHED_TOLERANCE, Reference
from phi2.training.scoring import answer_batch, mismatched, score_answers, scored
from phi2.training.two_phases import backward_of_window

# How far apart policy and reference may start, in nats per token: the same weights see the same rows, so hardly at all.
STEP_0_TOLERANCE = 1e-3

Rows = Sequence[EncodedPreference]


@dataclass(frozen=True)
class Objective:
    """A loss, and what its values are made from.

    Attributes:
        model: the policy.
        reference: None for a loss without one.
        state: of the loss, moved on by each update.
        cut: of rows into passes.
    """

    config: DPOConfig
    model: Phi2ForCausalLM
    reference: Reference | None
    loss: BoundLoss
    state: dict[str, float | Tensor]
    cut: Cut

    def update(self, optimizer: Optimizer, window: Rows, in_full: bool = True, attempt: Attempt = once) -> Metrics:
        """One optimizer step over a window of rows; returns the metrics of them all.

        Args:
            in_full: all metrics; else the loss alone, with the norm of the gradient.
            attempt: at the gradient; the step itself is made once.
        """
        gathered, after = attempt(partial(self.backward, optimizer, window, in_full))
        found, learning_rate = means(gathered), optimizer.learning_rate
        norm = optimizer.step()
        self.state.update(after)
        kept = {f"{STATE}{name}": value for name, value in self.state.items()}
        return Metrics({**found, "grad_norm": norm, **kept, "learning_rate": learning_rate})

    def backward(
        self, optimizer: Optimizer, window: Rows, in_full: bool = True
    ) -> tuple[list[dict[str, Tensor]], State]:
        """Adds the gradient of a window; returns the metrics of each pass, and the state of the loss behind it."""
        config, model, loss = self.config, self.model, self.loss
        losses_of = partial(self.losses, window, self.others(window))
        passes, gathered = self.cut([row.tokens for row in window]), []
        if loss.scope == "window" and len(passes) > 1:
            answers, losses, after = backward_of_window(
                config, model, optimizer, window, passes, self.reference, loss.needs, losses_of
            )
            return [metrics_of(answers, losses, loss)] if in_full else [{"loss": losses}], after
        for places in passes:
            part = scored(model, window, places, self.reference, autocast(config), loss.needs)
            answers = answer_batch([window[i] for i in places], part)
            losses, after = losses_of(answers)
            optimizer.backward(losses.sum() / len(window))
            gathered.append(metrics_of(answers, losses, loss) if in_full else {"loss": losses})
        return gathered, after

    def losses(self, window: Rows, others: AnswerBatch | None, answers: AnswerBatch) -> tuple[Tensor, State]:
        """(P,) values whose mean over the window is the loss plus the weighted NLL per chosen token; its state then.

        Args:
            others: of the window, behind other prompts.
            answers: to P of its prompts.
        """
        given = answers if others is None else replace(answers, mismatched=others)  # whose pairs the metrics need again
        losses, after = self.loss.step(given, self.state)
        if not self.config.nll_weight:
            return losses, after
        likely = [row for row in window if row.scores[0] > 0 or len(row.scores) > 1]
        per_row = len(window) / max(1, sum(len(row.chosen) for row in likely))
        return losses - self.config.nll_weight * per_row * answers.chosen, after

    def others(self, window: Rows) -> AnswerBatch | None:
        """The answers of a window behind other prompts, without gradient, where the loss asks for them."""
        if "mismatched" not in self.loss.needs:
            return None
        with torch.no_grad():
            return self._scored(mismatched(window, self.config.max_length), needs=False)

    def _scored(self, rows: Rows, needs: bool = True) -> AnswerBatch:
        precision = partial(autocast, self.config)
        return score_answers(self.model, rows, self.cut, self.reference, precision, self.loss.needs if needs else ())

    @torch.no_grad()
    def evaluate(self, rows: Rows, ledger: LedgerWriter | None = None, step: int = 0) -> dict[str, float]:
        """The metrics of training over a whole data set, names prefixed with eval_.

        A loss of scope "window" is given all rows of it as one window, so that no cut changes its value; one with a
        state has it as training left it, and leaves it so.

        Args:
            ledger: is told what was found of each row behind update `step`.
        """
        with evaluation_mode(self.model):
            answers, others = self._scored(rows), self.others(rows)
        slopes = slopes_of(lambda given: self.losses(rows, others, given)[0], answers)
        if ledger is not None:
            ledger.write(step, replace(answers, mismatched=others), slopes, self.state)
        metrics = Metrics(means([metrics_of(answers, slopes.values, self.loss)]))
        return {f"eval_{name}": value for name, value in metrics.wait().items()}

    @torch.no_grad()
    def check_start(self, window: Rows) -> None:
        """Before the first update loss and gradient are numbers; if the policy is the reference, the loss is known.

        Args:
            window: the first one; where no loss needs all of it, its first pass is looked at.
        Raises:
            ValueError: when they are not, or policy and reference do not agree: training would start from a wrong
                reward.
        """
        first = [window[i] for i in self.cut([row.tokens for row in window])[0]]
        with evaluation_mode(self.model):
            answers = self._scored(window if self.loss.scope == "window" else first)
            answers = replace(answers, mismatched=self.others(window))
        if self.reference is not None and starts_at_reference(self.config):
            self._require_agreement(answers)
        require_numbers(self.loss, answers)

    def _require_agreement(self, answers: AnswerBatch) -> None:
        """Refuses a start at which policy and reference, the same weights, do not give the same log-probabilities."""
        loss, cached = self.loss, self.config.precompute_ref_log_probs
        tolerance = CACHED_TOLERANCE[compute_dtype(self.config)] if cached else STEP_0_TOLERANCE
        agreeing = answers.at_reference()
        apart = (answers.policy_logps - agreeing.policy_logps).abs().max().item()
        at_reference, actual = outcome(loss, agreeing), loss(answers).mean().item()
        expected = at_reference.values.mean().item()
        if not (math.isfinite(expected) and math.isfinite(actual)):
            raise ValueError(f"step 1: loss {loss.name!r} is {actual}, and {expected} where policy and reference agree")
        # By its slope: a loss of ranks jumps where the answers to a prompt are equal, as all are here but for rounding.
        slopes = at_reference.gradient.nan_to_num(0, 0, 0)  # `require_numbers` refuses one that is none
        moves = (slopes * (answers.policy_logps - agreeing.policy_logps)).sum().item() / agreeing.count
        if not apart <= tolerance or not abs(moves) <= tolerance * max(1.0, abs(expected)):
            raise ValueError(
                f"step 1: policy and reference must agree, but differ by up to {apart:.2g} nats per token (allowed"
                f" {tolerance:g}), loss {actual:.4f} in place of {expected:.4f}; is the reference another model?"
            )
