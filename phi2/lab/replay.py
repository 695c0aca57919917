"""Any loss on log-probs that are known already, without a model: its values, and how it pulls on each pair.

phi2.replay("runs/sigmoid", "ipo", beta=0.3)            # on what that run kept of its held-out pairs
phi2.replay({"policy_chosen_logps": s_w, ...}, "ipo")   # on arrays of one's own
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi2.keywords import plain_number
from phi2.lab.statistics import spearman
from phi2.lab.trajectory import answers_of_arrays, answers_of_evaluation, first_of, knows_lengths, require_known
from phi2.lab.variants import name_of
from phi2.losses.batch import AnswerBatch
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.parts import LossSpec
from phi2.losses.properties import require_pure, require_scope
from phi2.losses.slopes import slopes_of
from phi2.losses.table import OTHER_NEEDS
from phi2.runs.ledger import FOLDER, Evaluation, Ledger
from phi2.training.metrics import Metrics, means, metrics_of

LOOKED_AT = 8  # prompts on which a loss is tried first


@dataclass(frozen=True)
class Replay:
    """A loss on known log-probs; arrays have one value a pair, (B,), or row of a ledger.

    Attributes:
        loss: as it would be written.
        values: of the loss, nats.
        d_w, d_l: its derivatives with respect to the log-probs of the chosen and the rejected answer; below 0 they
            would have the answer become likelier. NaN of an answer that is not there.
        margin: (s_w - r_w) - (s_l - r_l), nats; without a reference s_w - s_l. NaN of an answer alone.
        metrics: means, by the names that a run logs.
        evaluation: of the run whose log-probs they are, else None.
    """

    loss: str
    values: np.ndarray
    d_w: np.ndarray
    d_l: np.ndarray
    margin: np.ndarray
    metrics: dict[str, float]
    evaluation: Evaluation | None = None

    @cached_property
    def weight(self) -> np.ndarray:
        """(B,) |d_w| + |d_l|: how much a pair pulls."""
        return np.abs(np.nan_to_num(self.d_w)) + np.abs(np.nan_to_num(self.d_l))

    @cached_property
    def heaviest(self) -> np.ndarray:
        """(B,) indices of the pairs, the one that pulls most first."""
        return np.argsort(-self.weight, kind="stable")

    def share(self, part: float) -> float:
        """Of the whole weight, what lies on this part of the pairs, the heaviest; one pair at least."""
        count, total = max(1, math.ceil(part * len(self.weight))), float(self.weight.sum())
        return float(self.weight[self.heaviest[:count]].sum()) / total if total else math.nan

    @property
    def effective(self) -> float:
        """Effective number of pairs, (sum of weights)^2 / sum of their squares: all of them where they weigh alike."""
        squares = float((self.weight**2).sum())
        return float(self.weight.sum()) ** 2 / squares if squares else math.nan

    def __str__(self) -> str:
        from phi2.lab.replay_table import table_of

        return table_of([self])

    __repr__ = __str__


def replay(
    logps: Any,
    loss: LossSpec | None = None,
    *,
    loss_file: str | Path | None = None,
    evaluation: int | str = "last",
    nll_weight: float = 0.0,
    **knobs: Any,
) -> Replay:
    """A loss on log-probs that are known already.

    Args:
        logps: path of a run, or of its ledger, which one of its evaluations is read from; a PairBatch; or a mapping or
            namespace of numpy or torch arrays by the names of a PairBatch: policy_chosen_logps,
            policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, sums (B,), or (B, T) with chosen_mask and
            rejected_mask or chosen_length and rejected_length; and columns, a mapping of (B,).
        loss: name, preset or mixture, as a run takes it; None is the run's own.
        loss_file: Python file of yours that registers losses.
        evaluation: of the run: the step of one, or last.
        nll_weight: as that of a run.
        knobs: of the loss and of modifiers.
    Raises:
        ValueError: for an unknown loss or knob, log-probs that do not go together or do not suffice for the loss, a
            run without a ledger, an evaluation that is not there, and a loss that is no number for a pair.
        FileNotFoundError: when there is no such folder or file.
    """
    if isinstance(logps, str | os.PathLike):
        found = Ledger(logps).at(evaluation)
        if loss is not None:
            return replay_evaluation(found, bind_loss(loss, knobs, loss_file), _written(loss, knobs), nll_weight)
        if knobs or nll_weight or loss_file:
            raise ValueError("the run's own loss is replayed as it was: knobs, nll_weight and loss_file need a loss")
        return replay_own(found)
    if evaluation != "last":
        raise ValueError(f"evaluation is one of a run, and logps are arrays: leave it unset, got {evaluation!r}")
    if loss is None:
        raise ValueError("name a loss: only a run has one of its own")
    bound, answers = bind_loss(loss, knobs, loss_file), answers_of_arrays(logps)
    require_usable(bound, answers, "give ref_chosen_logps and ref_rejected_logps", "arrays cannot tell")
    require_known(bound.name, partial(losses_of, bound, nll_weight=nll_weight), answers, logps)
    found = _require_numbers(bound.name, replay_answers(bound, answers, _written(loss, knobs), nll_weight))
    return found if knows_lengths(logps) else replace(found, metrics=_of_sums(found.metrics, bound))


def _of_sums(metrics: Mapping[str, float], loss: BoundLoss) -> dict[str, float]:
    """Without those that are by token: the rewards of a loss without a reference are."""
    by_token = ("kl", "length/", *(["rewards/"] if loss.reference_free else []))
    return {name: value for name, value in metrics.items() if not name.startswith(by_token)}


def replay_own(found: Evaluation) -> Replay:
    """The loss of the run itself, at the state that it had: what the run logged."""
    written = _written(found.about["loss"], found.about["knobs"])
    return replay_evaluation(found, own_loss(found), written, found.about["nll_weight"])


def own_loss(found: Evaluation) -> BoundLoss:
    """The loss of the run that wrote an evaluation; one of a file of its own stands in the run folder."""
    file = found.path.parent.parent / "loss.py"
    is_there = found.path.parent.name == FOLDER and file.is_file()
    return bind_loss(found.about["loss"], found.about["knobs"], file if is_there else None)


def replay_evaluation(found: Evaluation, loss: BoundLoss, written: str, nll_weight: float = 0.0) -> Replay:
    """A loss on what an evaluation kept; one that keeps a state has it as in a run that begins, or if it is the run's
    own, as the run had it."""
    answers = answers_of_evaluation(found)
    require_comparisons(loss, answers, found)
    require_usable(loss, answers, f"{found.path} is of a run without one", "a ledger keeps of a run that needs it")
    state = found.about["state"] if loss.state and _is_own(loss, found) else loss.state
    replayed = replace(replay_answers(loss, answers, written, nll_weight, state), evaluation=found)
    return _require_numbers(loss.name, replayed)


def _is_own(loss: BoundLoss, found: Evaluation) -> bool:
    """Whether it is the loss of the run, knobs and all."""
    known = found.about["loss"]
    parts = known if isinstance(known, list) else [{"loss": known, "weight": 1.0, "args": found.about["knobs"]}]
    own = [(part["loss"], part["weight"], part["args"]) for part in parts]
    return own == [(each.name, weight, each.knobs) for weight, each in loss.parts or [(1.0, loss)]]


def require_comparisons(loss: BoundLoss, answers: AnswerBatch, found: Evaluation) -> None:
    """Refuses a loss that compares answers for a ledger in which one stands alone."""
    alone = next((row for row, both in enumerate(answers.comparisons) if None in both), None)
    other = next((part for part in loss.single if part.unit != "answer"), None)
    if alone is not None and other is not None:
        where = found.origins[alone]
        raise ValueError(f"loss {other.name!r} compares answers to one prompt, and {where} has one answer with a label")


def require_usable(loss: BoundLoss, answers: AnswerBatch, remedy: str, others: str) -> None:
    """Refuses a loss that reads what is not there, a reference or more than the answers, and tries it on a few.

    Args:
        remedy: against a reference that is missing.
        others: where what else losses need may be.
    Raises:
        ValueError: for such a loss, and for one that is not pure, or looks at other pairs and does not say so.
    """
    if missing := [OTHER_NEEDS[need] for need in loss.needs if not answers.has(need)]:
        raise ValueError(f"loss {loss.name!r} needs {' and '.join(missing)}, which {others}: not replayed")
    if answers.ref_logps is None and not loss.reference_free:
        raise ValueError(f"loss {loss.name!r} needs log-probs of a reference: {remedy}")
    few = first_of(answers, LOOKED_AT)
    require_pure(loss, few)
    for part in loss.single:
        require_scope(part, few)


def replay_answers(
    loss: BoundLoss,
    answers: AnswerBatch,
    written: str,
    nll_weight: float = 0.0,
    state: Mapping[str, float] | None = None,
) -> Replay:
    """A loss on answers.

    Args:
        state: of the loss; None as it begins with.
    Raises:
        ValueError: for an nll_weight below 0.
    """
    if not nll_weight >= 0:
        raise ValueError(f"nll_weight must not be negative, got {nll_weight}")
    seen = replace(answers, ref_logps=None) if loss.reference_free else answers
    slopes = slopes_of(partial(losses_of, loss, nll_weight=nll_weight, state=state), seen)
    metrics = Metrics(means([metrics_of(seen, slopes.values, loss)])).wait()
    gain = answers.policy if answers.ref_logps is None else answers.logratio
    margin = torch.sub(*answers.better_and_worse(gain))
    numbers = (answers.of_comparisons(slopes.values), *answers.better_and_worse(slopes.of_answers), margin)
    values, d_w, d_l, margins = (each.numpy() for each in numbers)
    return Replay(written, values, d_w, d_l, margins, metrics)


def losses_of(
    loss: BoundLoss, answers: AnswerBatch, nll_weight: float = 0.0, state: Mapping[str, float] | None = None
) -> Tensor:
    """(P,) values of a loss, with the likelihood of the chosen answers where that is asked for."""
    values, _ = loss.step(answers, loss.state if state is None else state)
    if not nll_weight:
        return values
    per_prompt = answers.count / max(1, int(answers.of_best(answers.length).sum()))
    return values - nll_weight * per_prompt * answers.chosen


def _require_numbers(name: str, replay: Replay) -> Replay:
    bad = np.flatnonzero(~np.isfinite(replay.values))
    if len(bad):
        found, i = replay.evaluation, int(bad[0])
        where = f"row {i} (counted from 0)" if found is None else found.origins[i]
        raise ValueError(f"loss {name!r} is {replay.values[i]} for {where}")
    return replay


def _written(loss: LossSpec, knobs: dict[str, Any]) -> str:
    return name_of({"loss": loss, **{knob: plain_number(value) for knob, value in knobs.items()}})


@dataclass(frozen=True)
class Disagreement:
    """Where two losses want something else of the same pairs.

    Attributes:
        ranks: Spearman's correlation of the weights of pairs; NaN where those of one are all alike.
        opposite: (B,) whether one of the two answers is pulled up by one loss and pushed down by the other.
    """

    ranks: float
    opposite: np.ndarray


def disagreement(one: Replay, other: Replay) -> Disagreement:
    """Of two losses on the same pairs."""
    opposite = (one.d_w * other.d_w < 0) | (one.d_l * other.d_l < 0)
    return Disagreement(spearman(one.weight, other.weight), opposite)
