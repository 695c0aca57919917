"""The pairwise losses: each is one pure function from the log-probabilities of a batch of pairs to one loss per pair.

A loss receives a `PairBatch` and its own knobs, and returns (B,) losses in nats. Write yours in your own file, under
`@preference_loss("name")`, and `phi2 dpo --loss name --loss_file mine.py` trains on it: the name appears in the
choices of the command line, its keyword arguments are its knobs.

Symbols in the docstrings: s = sum of log pi(y|x) over the answer, r = the same under the reference, l = s - r,
n = tokens of the answer, w = chosen, l as index = rejected, sigma = logistic function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.registry import preference_loss


@preference_loss("sigmoid")
def sigmoid(pairs: PairBatch, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1-e) log sigma(beta (l_w - l_l)) - e log sigma(-beta (l_w - l_l)), e = label_smoothing.

    Source: arXiv:2305.18290 Eq. 7; with e > 0, ericmitchell.ai/cdpo.pdf Eq. 3.
    """
    epsilon, z = label_smoothing, beta * pairs.margin
    return -(1 - epsilon) * F.logsigmoid(z) - epsilon * F.logsigmoid(-z)


@preference_loss("cdpo")
def cdpo(pairs: PairBatch, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Conservative DPO: DPO with labels that are wrong with probability label_smoothing.

    Source: ericmitchell.ai/cdpo.pdf Eq. 3.
    """
    return sigmoid(pairs, beta=beta, label_smoothing=label_smoothing)


@preference_loss("robust")
def robust(pairs: PairBatch, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """rDPO: (-(1-e) log sigma(z) + e log sigma(-z)) / (1 - 2e), unbiased under flipped labels; z = beta (l_w - l_l).

    Source: arXiv:2403.00409 Eq. 12.
    """
    epsilon, z = label_smoothing, beta * pairs.margin
    return (-(1 - epsilon) * F.logsigmoid(z) + epsilon * F.logsigmoid(-z)) / (1 - 2 * epsilon)


@preference_loss("ipo")
def ipo(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """IPO: (l_w/n_w - l_l/n_l - 1/(2 beta))^2, on means per token as trl does; the paper writes sums.

    Source: arXiv:2310.12036 Eq. 17.
    """
    return (pairs.margin_per_token - 1 / (2 * beta)) ** 2


@preference_loss("hinge")
def hinge(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """Hinge on the log-ratios: max(0, 1 - beta (l_w - l_l)).

    Source: arXiv:2309.06657 Eq. 10 (RSO), after SLiC, arXiv:2305.10425.
    """
    return torch.relu(1 - beta * pairs.margin)


@preference_loss("sigmoid_norm")
def sigmoid_norm(pairs: PairBatch, *, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO: -log sigma(beta (l_w/n_w - l_l/n_l)).

    Source: arXiv:2411.15124 Eq. 6 (Tulu 3).
    """
    return -F.logsigmoid(beta * pairs.margin_per_token)


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


@preference_loss("simpo", reference_free=True)
def simpo(pairs: PairBatch, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO: -log sigma(beta (s_w/n_w - s_l/n_l) - gamma), without a reference.

    Source: arXiv:2405.14734 Eq. 6.
    """
    per_token = pairs.policy_chosen / pairs.chosen_length - pairs.policy_rejected / pairs.rejected_length
    return -F.logsigmoid(beta * per_token - gamma)


@preference_loss("orpo", reference_free=True)
def orpo(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """ORPO: -s_w/n_w - beta log sigma(log odds_w - log odds_l), odds = p/(1-p) with p = exp(s/n), no reference.

    Source: arXiv:2403.07691 Eq. 6 and 7; the likelihood term is that of the answer, as in the paper.
    """
    chosen = pairs.policy_chosen / pairs.chosen_length
    rejected = pairs.policy_rejected / pairs.rejected_length
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p; p is kept from rounding to 1, where the odds are infinite."""
    logp = logp.clamp(max=-1e-6)
    return logp - (-torch.expm1(logp)).log()
