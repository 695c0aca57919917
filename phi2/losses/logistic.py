"""DPO and its kin: -log sigma(z), the loss of a logistic regression whose logit z says by how much chosen is preferred.

They differ in z. DPO's is beta times the margin l_w - l_l; others count length, hold the chosen answer up, weigh the
two answers differently, or trust a label less.

Symbols, here and in the other families: s = sum of log pi(y|x) over the answer, r = the same under the reference,
l = s - r, n = tokens of the answer, w = chosen, l as index = rejected, sigma = logistic function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.registry import preference_loss

EXPONENT_CAP = 20.0  # of log-ratios in chipo: e^l of a whole answer overflows float32 at 89


def smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    """-(1-e) log sigma(z) - e log sigma(-z): labels that are wrong with probability e."""
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


@preference_loss("sigmoid")
def sigmoid(pairs: PairBatch, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: -(1-e) log sigma(z) - e log sigma(-z), z = beta (l_w - l_l), e = label_smoothing.

    trl 1.16 reads label_smoothing beside its `sigmoid`, and drops it.

    Source: arXiv:2305.18290 Eq. 7; with e > 0, ericmitchell.ai/cdpo.pdf Eq. 3.
    """
    return smoothed(beta * pairs.margin, label_smoothing)


@preference_loss("cdpo")
def cdpo(pairs: PairBatch, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Conservative DPO: DPO with labels that are wrong with probability label_smoothing.

    Not in trl 1.16, whose `sigmoid` drops label_smoothing.

    Source: ericmitchell.ai/cdpo.pdf Eq. 3.
    """
    return smoothed(beta * pairs.margin, label_smoothing)


@preference_loss("robust")
def robust(pairs: PairBatch, *, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """rDPO: (-(1-e) log sigma(z) + e log sigma(-z)) / (1 - 2e), unbiased under flipped labels; z = beta (l_w - l_l).

    Source: arXiv:2403.00409 Eq. 12.
    """
    epsilon, z = label_smoothing, beta * pairs.margin
    return (-(1 - epsilon) * F.logsigmoid(z) + epsilon * F.logsigmoid(-z)) / (1 - 2 * epsilon)


@preference_loss("sigmoid_norm")
def sigmoid_norm(pairs: PairBatch, *, beta: float = 5.0) -> Tensor:
    """Length-normalised DPO: -log sigma(beta (l_w/n_w - l_l/n_l)).

    Source: arXiv:2411.15124 Eq. 6 (Tulu 3).
    """
    return -F.logsigmoid(beta * pairs.margin_per_token)


@preference_loss("rdpo")
def rdpo(pairs: PairBatch, *, beta: float = 0.1, alpha: float = 0.05) -> Tensor:
    """R-DPO, regularised for length: -log sigma(beta (l_w - l_l) + alpha (n_w - n_l)).

    The sign: with the reward R(y) - alpha n(y), the optimum under the KL penalty has beta l(y) = R(y) - alpha n(y) +
    const, so that R_w - R_l = beta (l_w - l_l) + alpha (n_w - n_l). Code that subtracts it, as oxRL's and alpha-DPO's
    does, rewards length.

    Source: arXiv:2403.19159 Eq. 9; the sign is that of sail-sg/oat.
    """
    return -F.logsigmoid(beta * pairs.margin + alpha * (pairs.chosen_length - pairs.rejected_length))


@preference_loss("dpop")
def dpop(pairs: PairBatch, *, beta: float = 0.3, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-positive: -log sigma(beta (l_w - l_l - lambda max(0, -l_w))), lambda = dpop_lambda.

    It pays for a chosen answer that becomes less likely than under the reference.

    Source: arXiv:2402.13228 Eq. 3.
    """
    return -F.logsigmoid(beta * (pairs.margin - dpop_lambda * torch.relu(-pairs.chosen_logratio)))


@preference_loss("dposhift")
def dposhift(pairs: PairBatch, *, beta: float = 0.1, shift: float = 0.95) -> Tensor:
    """DPO-Shift: -log sigma(beta (l_w - shift l_l)); a shift below 1 pushes the rejected answer less.

    The shift is constant, one of the paper's strategies; those that move it during a run need a loss with a state.

    Source: arXiv:2502.07599.
    """
    return -F.logsigmoid(beta * (pairs.chosen_logratio - shift * pairs.rejected_logratio))


@preference_loss("minor_dpo")
def minor_dpo(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """Minor DPO: -log sigma(beta (l_w - max(0, l_l))); no push on a rejected answer below its reference.

    Source: arXiv:2408.09834, as in warlockee/oxRL.
    """
    return -F.logsigmoid(beta * (pairs.chosen_logratio - torch.relu(pairs.rejected_logratio)))


@preference_loss("hdpo")
def hdpo(pairs: PairBatch, *, beta: float = 0.1, alpha: float = 0.95) -> Tensor:
    """H-DPO: -log sigma(beta (alpha (s_w - s_l) - (r_w - r_l))); an alpha below 1 lowers the policy's entropy.

    Source: arXiv:2411.07595, as in warlockee/oxRL.
    """
    policy, ref = pairs.policy_chosen - pairs.policy_rejected, pairs.ref_chosen - pairs.ref_rejected
    return -F.logsigmoid(beta * (alpha * policy - ref))


@preference_loss("bpo")
def bpo(pairs: PairBatch, *, beta: float = 0.1, alpha: float = 0.3) -> Tensor:
    """Balanced preference optimisation: -log sigma(beta min(l_w, -alpha l_l)), the worse of both answers.

    Source: arXiv:2506.03557, as in warlockee/oxRL.
    """
    return -F.logsigmoid(beta * torch.minimum(pairs.chosen_logratio, -alpha * pairs.rejected_logratio))


@preference_loss("c2dpo")
def c2dpo(pairs: PairBatch, *, beta: float = 0.1, c2_lambda: float = 2e-4) -> Tensor:
    """C2-DPO: -log sigma(beta (l_w - l_l)) + c2_lambda (l_w + l_l)^2, which ties both answers' moves.

    Source: arXiv:2502.17507, as in warlockee/oxRL.
    """
    total = pairs.chosen_logratio + pairs.rejected_logratio
    return -F.logsigmoid(beta * pairs.margin) + c2_lambda * total**2


@preference_loss("chipo")
def chipo(pairs: PairBatch, *, beta: float = 0.1, r_max: float = 5.0) -> Tensor:
    """chi-PO: -log sigma(clip(beta (phi(l_w) - phi(l_l)), -2R, 2R)), phi(l) = l + e^l, R = r_max.

    A pair beyond the clip has no gradient. The paper's R is the largest reward, which the user knows; 5 is ours. e^l is
    constant above l = 20, as in oxRL, which has no clip.

    Source: arXiv:2407.13399.
    """
    ratios = (pairs.chosen_logratio, pairs.rejected_logratio)
    chosen, rejected = (ratio + ratio.clamp(max=EXPONENT_CAP).exp() for ratio in ratios)
    return -F.logsigmoid((beta * (chosen - rejected)).clamp(-2 * r_max, 2 * r_max))


@preference_loss("tdpo1", needs=("kl",))
def tdpo1(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """TDPO1: -log sigma(beta (l_w - l_l - (K_l - K_w))), K = sum over tokens of KL(reference to policy).

    The KL is over all ids at each token, with its gradient: the policy is held to the reference forwards too. It needs
    a reference that is asked during training.

    Source: arXiv:2404.11999 Eq. 17; Vance0124/Token-level-Direct-Preference-Optimization trainers.py.
    """
    chosen, rejected = _kl_of_answers(pairs)
    return -F.logsigmoid(beta * (pairs.margin - (rejected - chosen)))


@preference_loss("tdpo2", needs=("kl",))
def tdpo2(pairs: PairBatch, *, beta: float = 0.1, alpha: float = 0.5) -> Tensor:
    """TDPO2: -log sigma(beta (l_w - l_l - alpha (K_l - sg(K_w)))), K as in `tdpo1`.

    Source: arXiv:2404.11999 Eq. 18; Vance0124/Token-level-Direct-Preference-Optimization trainers.py.
    """
    chosen, rejected = _kl_of_answers(pairs)
    return -F.logsigmoid(beta * (pairs.margin - alpha * (rejected - chosen.detach())))


def _kl_of_answers(pairs: PairBatch) -> tuple[Tensor, Tensor]:
    """K_w and K_l, (B,)."""
    chosen, rejected = pairs.extras["kl"]
    return chosen.sum(dim=-1), rejected.sum(dim=-1)
