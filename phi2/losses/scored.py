"""Losses that know by how much chosen is better: they read the columns score_chosen and score_rejected of the data set.

Symbols are those of `logistic.py`; z = beta (l_w - l_l), g = eta (score_chosen - score_rejected).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.registry import preference_loss


def score_gap(pairs: PairBatch) -> Tensor:
    """score_chosen - score_rejected, (B,)."""
    return pairs.columns["score_chosen"] - pairs.columns["score_rejected"]


def positive_gap(pairs: PairBatch) -> Tensor:
    """(B,) the same, refused where the chosen answer's score is not the higher one.

    A GPU would have to be waited for: there, no number stands for it. The rows of a run have been seen before.
    """
    gap = score_gap(pairs)
    gap = gap.masked_fill(gap <= 0, math.nan)
    if gap.device.type == "cpu" and gap.isnan().any():
        raise ValueError("loss 'odpo' needs score_chosen above score_rejected in every pair")
    return gap


@preference_loss("odpo")
def odpo(pairs: PairBatch, *, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """DPO with an offset: -log sigma(beta (l_w - l_l) - alpha log(score_chosen - score_rejected)).

    The chosen score must be the higher one: a tie has no logarithm, and is refused.

    Source: arXiv:2402.10571; rycolab/odpo trainers.py.
    """
    return -F.logsigmoid(beta * pairs.margin - alpha * positive_gap(pairs).log())


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of two coins that fall heads with probability sigma(p) and sigma(q), p to q."""
    heads = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
    return heads + (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))


@preference_loss("rpo_bwd_kl")
def rpo_bwd_kl(pairs: PairBatch, *, beta: float = 0.1, eta: float = 1.0) -> Tensor:
    """Reward-aware DPO, backward KL: KL(sigma(g) to sigma(z)), z = beta (l_w - l_l), g = eta times the scores' gap.

    Source: arXiv:2406.11704 (RPO of Nemotron-4); NVIDIA/NeMo-Aligner megatron_gpt_dpo_model.py, where eta is
    gt_reward_scale.
    """
    return _kl(eta * score_gap(pairs), beta * pairs.margin)


@preference_loss("rpo_fwd_kl")
def rpo_fwd_kl(pairs: PairBatch, *, beta: float = 0.1, eta: float = 1.0) -> Tensor:
    """Reward-aware DPO, forward KL: KL(sigma(z) to sigma(g)), z = beta (l_w - l_l), g = eta times the scores' gap.

    Source: NVIDIA/NeMo-Aligner megatron_gpt_dpo_model.py, where eta is gt_reward_scale.
    """
    return _kl(beta * pairs.margin, eta * score_gap(pairs))


@preference_loss("rpo_sq")
def rpo_sq(pairs: PairBatch, *, beta: float = 0.1, eta: float = 1.0) -> Tensor:
    """Reward-aware DPO, squared: (z - g)^2, z = beta (l_w - l_l), g = eta times the scores' gap; REBEL's regression.

    Source: NVIDIA/NeMo-Aligner megatron_gpt_dpo_model.py, where eta is gt_reward_scale.
    """
    return (beta * pairs.margin - eta * score_gap(pairs)) ** 2
