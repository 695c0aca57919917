"""Any loss on log-probs that are known already, without a model: its values, and how it pulls on each pair.

phi2.replay("runs/sigmoid", "ipo", beta=0.3)            # on what that run kept of its held-out pairs
phi2.replay({"policy_chosen_logps": s_w, ...}, "ipo")   # on arrays of one's own
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from phi2.lab.statistics import spearman
from phi2.lab.trajectory import batches_of, pairs_of_arrays, require_known
from phi2.lab.variants import name_of
from phi2.losses.batch import PairBatch
from phi2.losses.bound import BoundLoss, bind_loss
from phi2.losses.parts import LossSpec
from phi2.losses.slopes import slopes_of
from phi2.runs.ledger import FOLDER, Evaluation, Ledger
from phi2.training.metrics import means, pair_metrics


@dataclass(frozen=True)
class Replay:
    """A loss on known log-probs; arrays have one value a pair, (B,).

    Attributes:
        loss: as it would be written.
        values: of the loss, nats.
        d_w, d_l: its derivatives with respect to the log-probs of the chosen and the rejected answer; below 0 they
            would have the answer become likelier.
        margin: (s_w - r_w) - (s_l - r_l), nats; without a reference s_w - s_l.
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
        return np.abs(self.d_w) + np.abs(self.d_l)

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
            run without a ledger, and an evaluation that is not there.
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
    bound = bind_loss(loss, knobs, loss_file)
    pairs = logps if isinstance(logps, PairBatch) else pairs_of_arrays(logps)
    require_reference(bound, pairs, "give ref_chosen_logps and ref_rejected_logps")
    if not isinstance(logps, PairBatch):
        require_known(bound, pairs, logps)
    return replay_batches(bound, [pairs], _written(loss, knobs), nll_weight)


def replay_own(found: Evaluation) -> Replay:
    """The loss of the run itself, at the state that it had: what the run logged."""
    loss, told = found.about["loss"], found.about["knobs"]
    bound = own_loss(found)
    return replay_evaluation(found, bound, _written(loss, told), found.about["nll_weight"])


def own_loss(found: Evaluation) -> BoundLoss:
    """The loss of the run that wrote an evaluation; one of a file of its own stands in the run folder."""
    file = found.path.parent.parent / "loss.py" if found.path.parent.name == FOLDER else None
    is_there = file is not None and file.is_file()
    return bind_loss(found.about["loss"], found.about["knobs"], file if is_there else None)


def replay_evaluation(found: Evaluation, loss: BoundLoss, written: str, nll_weight: float = 0.0) -> Replay:
    """A loss on what an evaluation kept."""
    batches = batches_of(found, whole=loss.scope == "window")
    require_reference(loss, batches[0], f"{found.path} is of a run without one")
    state = found.about["state"] if loss.state and is_own(loss, found) else loss.state
    return replace(replay_batches(loss, batches, written, nll_weight, state), evaluation=found)


def is_own(loss: BoundLoss, found: Evaluation) -> bool:
    """Whether it is the loss of the run, knobs and all."""
    try:
        own = own_loss(found)
    except ValueError:  # of a file that is not here
        return False
    return (loss.name, loss.knobs, loss.source, _knobs_of_parts(loss)) == (
        *(own.name, own.knobs, own.source),
        _knobs_of_parts(own),
    )


def _knobs_of_parts(loss: BoundLoss) -> list[dict[str, Any]]:
    return [part.knobs for _, part in loss.parts]


def require_reference(loss: BoundLoss, pairs: PairBatch, remedy: str) -> None:
    if pairs.ref_chosen_logps is None and not loss.reference_free:
        raise ValueError(f"loss {loss.name!r} needs log-probs of a reference: {remedy}")


def replay_batches(
    loss: BoundLoss,
    batches: list[PairBatch],
    written: str,
    nll_weight: float = 0.0,
    state: dict[str, float] | None = None,
) -> Replay:
    """A loss on pairs.

    Args:
        batches: the pairs; all in one for a loss of scope "window".
        state: of the loss; None as it begins with.
    """
    per_pair = sum(len(b.chosen_mask) for b in batches) / sum(int(b.chosen_mask.sum()) for b in batches)

    def losses_of(pairs: PairBatch) -> torch.Tensor:
        values, _ = loss.step(pairs, loss.state if state is None else state)
        return values - nll_weight * per_pair * pairs.policy_chosen if nll_weight else values

    seen = [_without_reference(pairs) if loss.reference_free else pairs for pairs in batches]
    slopes = [slopes_of(losses_of, pairs) for pairs in seen]
    found = [pair_metrics(pairs, each.values, loss.reward_scale) for pairs, each in zip(seen, slopes, strict=True)]
    values, d_w, d_l = (torch.cat(parts).numpy(force=True) for parts in zip(*slopes, strict=True))
    margin = torch.cat([_margin(pairs) for pairs in batches]).numpy(force=True)
    return Replay(written, values, d_w, d_l, margin, means(found))


def _without_reference(pairs: PairBatch) -> PairBatch:
    return replace(pairs, ref_chosen_logps=None, ref_rejected_logps=None)


def _margin(pairs: PairBatch) -> torch.Tensor:
    return pairs.policy_chosen - pairs.policy_rejected if pairs.ref_chosen_logps is None else pairs.margin


def _written(loss: LossSpec, knobs: dict[str, Any]) -> str:
    return name_of({"loss": loss, **knobs})


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
