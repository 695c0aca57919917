"""What goes with any loss: a modifier makes a loss of a loss.

Most change what the loss is given: they scale, drop or clamp the log-probabilities of tokens, of policy and reference
alike, sum them up, or say what a log-ratio counts as. Each has knobs, which stand among those of the loss
(`--loss_args.ld_alpha 0.5`); it is applied when one of them is given. Several apply in the order of this file.

Symbols are those of `logistic.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2.arriving import without_wait
from phi2.losses.batch import PairBatch
from phi2.losses.knobs import Knobs, knobs_of
from phi2.losses.registry import Need

Loss = Callable[[Any], Tensor]  # of the batch that it takes, a loss whose knobs are set
EXPONENT_CAP = 80.0  # of f-divergences, as in trl


class Modifier(NamedTuple):
    """A registered modifier.

    Attributes:
        function: (loss, *, knob=default, ...) -> loss.
        needs_reference: without one it has nothing to act on.
        may_miss: a loss may not read what it changes.
        needs_values_of_pairs: it acts on what the loss returns, one value of each pair.
        any_unit: it goes with losses of single answers and of lists too.
        needs: what a batch must have for it.
    """

    function: Callable[..., Loss]
    knobs: Knobs
    needs_reference: bool
    may_miss: bool
    needs_values_of_pairs: bool
    any_unit: bool
    needs: tuple[Need, ...]


MODIFIERS: dict[str, Modifier] = {}  # in the order in which they are applied


def modifier(
    *,
    needs_reference: bool = False,
    may_miss: bool = False,
    needs_values_of_pairs: bool = False,
    any_unit: bool = False,
    needs: tuple[Need, ...] = (),
) -> Callable[[Callable[..., Loss]], Callable[..., Loss]]:
    """Registers a modifier under the name of its function."""

    def register(function: Callable[..., Loss]) -> Callable[..., Loss]:
        name = function.__name__
        knobs = knobs_of(name, function)
        MODIFIERS[name] = Modifier(function, knobs, needs_reference, may_miss, needs_values_of_pairs, any_unit, needs)
        return function

    return register


def modifier_of(knob: str) -> str | None:
    """The modifier that has a knob of this name."""
    return next((name for name, each in MODIFIERS.items() if knob in each.knobs.defaults), None)


@modifier(needs_values_of_pairs=True, any_unit=True)
def weight(loss: Loss, *, weight_column: str = "weight") -> Loss:
    """Each row's loss times a column of the data set, as it stands: weights are not made to average 1.

    Not with a loss of scope "window", whose values belong to no single row.

    Source: huggingface/trl issue 5613, where it is asked for.
    """

    def weighted(batch: Any) -> Tensor:
        weights, losses = batch.columns[weight_column], loss(batch)
        return (weights[batch.prompt] if len(losses) > len(weights) else weights) * losses  # of answers, or rows

    return weighted


@modifier(needs_values_of_pairs=True, needs=("log_sum_square",))
def wpo(loss: Loss, *, use_weighting: bool = False, weighting_max: float = 0.0) -> Loss:
    """WPO: each pair's loss times w_w w_l, w = e^(mean over tokens of log p - log sum p^2), sg, p the policy's.

    A pair counts the more the likelier the policy is to say it. The authors take at most 1 for the product,
    `weighting_max: 1`; trl takes it as it is, and so does 0.

    Source: arXiv:2406.11827, as in trl; wzhouad/WPO scripts/wpo_trainer.py.
    """

    if weighting_max and not use_weighting:
        raise ValueError(f"weighting_max {weighting_max} needs use_weighting true, got false")

    def weighted(pairs: PairBatch) -> Tensor:
        chosen, rejected = pairs.extras["log_sum_square"]
        logs = (pairs.policy_chosen_logps - chosen).sum(dim=-1) / pairs.chosen_length
        logs = logs + (pairs.policy_rejected_logps - rejected).sum(dim=-1) / pairs.rejected_length
        weights = logs.detach().exp()
        return (weights.clamp(max=weighting_max) if weighting_max else weights) * loss(pairs)

    return weighted if use_weighting else loss


@modifier()
def sampo(loss: Loss, *, sampo_seed: float = 0) -> Loss:
    """SamPO: of the longer answer, as many tokens drawn at random as the shorter one has.

    Drawn by the seed and the lengths alone, so that a loss stays a function of its pairs: a pair keeps its tokens in
    every epoch, where the authors draw anew.

    Source: arXiv:2406.10957; LuJunru/SamPO dpo_trainer.py.
    """
    return lambda pairs: loss(_masked(pairs, *_drawn(pairs, int(sampo_seed))))


@modifier()
def ld(loss: Loss, *, ld_alpha: float = 1.0) -> Loss:
    """LD-DPO: tokens behind the length of the shorter answer count ld_alpha times.

    In s and in r, as in trl; LLaMA-Factory has it in s alone.

    Source: arXiv:2409.06411.
    """

    def shortened(pairs: PairBatch) -> Tensor:
        shorter = torch.minimum(*(mask.sum(dim=-1, keepdim=True) for mask in _masks(pairs)))
        tails = [mask.cumsum(dim=-1) > shorter for mask in _masks(pairs)]
        return loss(_each(pairs, lambda logps, tail: torch.where(tail, ld_alpha * logps, logps), tails))

    return shortened


@modifier(needs_reference=True)
def humanline(loss: Loss, *, humanline_min: float = -1.0, humanline_max: float = 1.5) -> Loss:
    """Humanline: the log-ratio of each token is clamped to [humanline_min, humanline_max]; outside it has no gradient.

    HALOs also moves the reference to the policy before each step, which this does not.

    Source: ContextualAI/HALOs train/trainers.py (log_epsilon_P, log_epsilon_R).
    """
    if humanline_min >= humanline_max:
        raise ValueError(f"humanline_min must be below humanline_max {humanline_max}, got {humanline_min}")

    def clamped(pairs: PairBatch) -> Tensor:
        def towards(policy: Tensor, ref: Tensor | None) -> Tensor:
            assert ref is not None
            return ref + (policy - ref).clamp(humanline_min, humanline_max)

        return loss(
            replace(
                pairs,
                policy_chosen_logps=towards(pairs.policy_chosen_logps, pairs.ref_chosen_logps),
                policy_rejected_logps=towards(pairs.policy_rejected_logps, pairs.ref_rejected_logps),
            )
        )

    return clamped


@modifier(may_miss=True)
def reduction(loss: Loss, *, reduction: Literal["sum", "mean"] = "sum") -> Loss:
    """What an answer's log-probability is, in a loss of sums and in one of means per token alike: sum, or mean.

    The answer becomes one token that holds it, so that a loss that counts tokens (`rdpo`) would count one; a run
    refuses that.

    Source: huggingface/trl issue 1677, where IPO's sums and means are told apart.
    """

    def reduced(pairs: PairBatch) -> Tensor:
        chosen, rejected = pairs.chosen_length, pairs.rejected_length
        lengths = [n if reduction == "mean" else torch.ones_like(n) for n in (chosen, rejected)]
        one = _each(pairs, lambda logps, length: (logps.sum(dim=-1) / length)[:, None], lengths)
        mask = chosen.new_ones(len(chosen), 1, dtype=torch.bool)
        return loss(replace(one, chosen_mask=mask, rejected_mask=mask))

    return reduced


@modifier(needs_reference=True, may_miss=True)
def f_divergence(
    loss: Loss,
    *,
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> Loss:
    """f-DPO: a log-ratio l counts as f'(e^l): reverse_kl l; forward_kl 1 - e^-l; js_divergence log 2 + log sigma(l);
    alpha_divergence (e^((a-1) l) - 1) / (a-1), a = f_alpha_divergence_coef, which at 1 is reverse_kl.

    Losses see it where they read a log-ratio, not where they read s or r alone. trl has it for its losses of the margin
    alone; there l/n is f'(e^l)/n too.

    Source: arXiv:2309.16240; names as in trl.
    """
    if f_alpha_divergence_coef != 0.5 and f_divergence_type != "alpha_divergence":
        raise ValueError(
            f"f_alpha_divergence_coef {f_alpha_divergence_coef} needs f_divergence_type alpha_divergence, got"
            f" {f_divergence_type}"
        )
    power = f_alpha_divergence_coef - 1

    def score(l: Tensor) -> Tensor:  # noqa: E741
        if f_divergence_type == "forward_kl":
            return -torch.expm1(-l)
        if f_divergence_type == "js_divergence":
            return math.log(2) + F.logsigmoid(l)
        if f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
            return torch.expm1((power * l).clamp(max=EXPONENT_CAP)) / power
        return l

    return lambda pairs: loss(replace(pairs, score=score))


def _masks(pairs: PairBatch) -> tuple[Tensor, Tensor]:
    return pairs.chosen_mask, pairs.rejected_mask


def _each(pairs: PairBatch, change: Callable[[Tensor, Tensor], Tensor], by: list[Tensor]) -> PairBatch:
    """`change(logps, by)` in place of all log-probabilities; `by` has a tensor for chosen and one for rejected."""
    refs = [pairs.ref_chosen_logps, pairs.ref_rejected_logps]
    ref_chosen, ref_rejected = (None if ref is None else change(ref, each) for ref, each in zip(refs, by, strict=True))
    return replace(
        pairs,
        policy_chosen_logps=change(pairs.policy_chosen_logps, by[0]),
        policy_rejected_logps=change(pairs.policy_rejected_logps, by[1]),
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
    )


def _masked(pairs: PairBatch, chosen_mask: Tensor, rejected_mask: Tensor) -> PairBatch:
    """The pairs with these tokens alone."""
    kept = _each(pairs, lambda logps, mask: logps * mask, [chosen_mask, rejected_mask])
    return replace(kept, chosen_mask=chosen_mask, rejected_mask=rejected_mask)


def _drawn(pairs: PairBatch, seed: int) -> list[Tensor]:
    """Of each mask the tokens that are kept: as many as the shorter answer has, those with the lowest lots."""
    masks = _masks(pairs)
    counts = torch.minimum(*(mask.sum(dim=-1, keepdim=True) for mask in masks))  # (B, 1)
    return [_lots(mask, seed).argsort(dim=-1).argsort(dim=-1) < counts for mask in masks]


def _lots(mask: Tensor, seed: int) -> Tensor:
    """(B, T) below 1 of each token, of the first ones the same for any T; infinite of what is masked out."""
    lots = torch.rand(mask.shape[1], generator=torch.Generator().manual_seed(seed))
    return without_wait(lots, mask.device).masked_fill(~mask, math.inf)
