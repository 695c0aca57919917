"""Losses that say where each answer's log-ratio should go, not only how far apart both should be.

That holds the chosen answer up: DPO's margin also grows when both answers become less likely, the rejected one faster.
Symbols are those of `logistic.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.registry import preference_loss

EXPONENT_CAP = 20.0  # e^l of a whole answer overflows float32 at l = 89
EDGE = 1e-6  # of ddro's ratio below 2, from where on its tangent goes on


def capped_exp(logratio: Tensor) -> Tensor:
    """e^l up to l = EXPONENT_CAP, from there on the tangent: finite, and still with a slope."""
    at_cap = logratio.clamp(max=EXPONENT_CAP)
    return at_cap.exp() * (1 + logratio - at_cap)


@preference_loss("nca_pair")
def nca_pair(pairs: PairBatch, *, beta: float = 0.01) -> Tensor:
    """NCA on pairs: -log sigma(a) - log sigma(-a)/2 - log sigma(-b)/2, a = beta l_w, b = beta l_l.

    Source: arXiv:2402.05369, as in trl.
    """
    chosen, rejected = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@preference_loss("bco_pair")
def bco_pair(pairs: PairBatch, *, beta: float = 0.01) -> Tensor:
    """BCO without its shift, a classifier of each answer: -log sigma(beta l_w) - log sigma(-beta l_l).

    The paper subtracts a running mean of all rewards from each, as `bco` does; trl leaves it out too. With beta 1 it is
    the binary cross-entropy of density-ratio estimation.

    Source: arXiv:2404.04656, with its delta 0, as in trl.
    """
    return -F.logsigmoid(beta * pairs.chosen_logratio) - F.logsigmoid(-beta * pairs.rejected_logratio)


@preference_loss("sppo_hard")
def sppo_hard(pairs: PairBatch, *, beta: float = 0.001) -> Tensor:
    """SPPO with hard labels: (l_w - 1/(2 beta))^2 + (l_l + 1/(2 beta))^2.

    The paper has a judge's probability of winning in place of 1 and 0.

    Source: arXiv:2405.00675 Eq. 4.7.
    """
    target = 1 / (2 * beta)
    return (pairs.chosen_logratio - target) ** 2 + (pairs.rejected_logratio + target) ** 2


@preference_loss("apo_zero")
def apo_zero(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """APO-zero: 1 - sigma(beta l_w) + sigma(beta l_l), for chosen answers better than the policy's own.

    Source: arXiv:2408.06266 Eq. 2.
    """
    return 1 - torch.sigmoid(beta * pairs.chosen_logratio) + torch.sigmoid(beta * pairs.rejected_logratio)


@preference_loss("apo_down")
def apo_down(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """APO-down: sigma(beta l_w) + 1 - sigma(beta (l_w - l_l)), for chosen answers worse than the policy's own.

    Source: arXiv:2408.06266 Eq. 3.
    """
    return torch.sigmoid(beta * pairs.chosen_logratio) + 1 - torch.sigmoid(beta * pairs.margin)


@preference_loss("caldpo")
def caldpo(pairs: PairBatch, *, beta: float = 0.001) -> Tensor:
    """Cal-DPO: -log sigma(l_w - l_l) + ((l_w - 1/(2 beta))^2 + (l_l + 1/(2 beta))^2) / 2.

    Its logit has no beta, and the half is that of the authors' code, which the paper does not write.

    Source: arXiv:2412.14516; tengxiao1/Cal-DPO scripts/dpo_trainer.py.
    """
    return -F.logsigmoid(pairs.margin) + 0.5 * sppo_hard(pairs, beta=beta)


@preference_loss("lsif")
def lsif(pairs: PairBatch) -> Tensor:
    """Least-squares importance fitting of the ratio e^l: -e^l_w + e^(2 l_l) / 2.

    Above an exponent of 20, e^x goes on as its tangent; the authors let it overflow.

    Source: arXiv:2604.18239; IceyWuu/DisentangledPreferenceOptimization scripts/dpo_trainer.py.
    """
    return -capped_exp(pairs.chosen_logratio) + 0.5 * capped_exp(2 * pairs.rejected_logratio)


@preference_loss("ukl")
def ukl(pairs: PairBatch) -> Tensor:
    """Unnormalised KL: -s_w + e^l_l, the chosen answer's likelihood and a price on the rejected one's ratio.

    Above an exponent of 20, e^x goes on as its tangent; the authors let it overflow.

    Source: arXiv:2604.18239; IceyWuu/DisentangledPreferenceOptimization scripts/dpo_trainer.py.
    """
    return -pairs.policy_chosen + capped_exp(pairs.rejected_logratio)


@preference_loss("ddro")
def ddro(pairs: PairBatch) -> Tensor:
    """Direct density-ratio optimisation: (log 2 - l_w) + (log 2 - log(2 - e^l_l)).

    Where e^l_l comes within 1e-6 of 2, its tangent there goes on, as in the code below.

    Source: IceyWuu/DisentangledPreferenceOptimization scripts/dpo_trainer.py.
    """
    ratio = capped_exp(pairs.rejected_logratio)
    below = ratio.clamp(max=2 - EDGE)
    return 2 * math.log(2) - pairs.chosen_logratio - torch.log(2 - below) + (ratio - below) / EDGE
