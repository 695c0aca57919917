"""Losses that read the policy's log-probabilities alone: no reference model is run.

Symbols are those of `logistic.py`. The contrast of trl's TPO is one of these: its `sigmoid` is `cpo` with cpo_alpha 0,
its `tpo-l` is `simpo`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.logistic import smoothed
from phi2.losses.registry import preference_loss


@preference_loss("sft", reference_free=True)
def sft(pairs: PairBatch) -> Tensor:
    """Likelihood of the chosen answer: -s_w/n_w, a term for mixtures.

    A mean per sequence: each answer counts the same. trl's `sft` is the mean over the tokens of a micro-batch, so that
    it depends on the cut; `sft_tokens` and `--nll_weight` are that mean over the tokens of the whole window.

    Source: arXiv:2404.19733 (its likelihood term).
    """
    return -pairs.policy_chosen_per_token


@preference_loss("simpo", reference_free=True)
def simpo(pairs: PairBatch, *, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO: -log sigma(beta (s_w/n_w - s_l/n_l) - gamma).

    The authors' code has the knob gamma_beta_ratio, which is gamma / beta here. trl's CPO trainer adds cpo_alpha 1
    times the likelihood unless told otherwise.

    Source: arXiv:2405.14734 Eq. 6.
    """
    return -F.logsigmoid(beta * (pairs.policy_chosen_per_token - pairs.policy_rejected_per_token) - gamma)


@preference_loss("alphapo", reference_free=True)
def alphapo(pairs: PairBatch, *, beta: float = 2.5, gamma: float = 0.5, alpha: float = 0.25) -> Tensor:
    """AlphaPO: SimPO on rewards R(s/n), R(x) = (1 - e^(-alpha x)) / alpha; alpha 0 is R(x) = x.

    Source: arXiv:2501.03884, as in trl.
    """

    def reward(per_token: Tensor) -> Tensor:
        return -torch.expm1(-alpha * per_token) / alpha if alpha else per_token

    difference = reward(pairs.policy_chosen_per_token) - reward(pairs.policy_rejected_per_token)
    return -F.logsigmoid(beta * difference - gamma)


@preference_loss("cpo", reference_free=True)
def cpo(pairs: PairBatch, *, beta: float = 0.1, label_smoothing: float = 0.0, cpo_alpha: float = 1.0) -> Tensor:
    """CPO: -(1-e) log sigma(z) - e log sigma(-z) - cpo_alpha s_w/n_w, z = beta (s_w - s_l), e = label_smoothing.

    The likelihood is a mean per sequence; in trl it is one over the tokens of a micro-batch. With cpo_alpha 0 it is DPO
    against a reference of log-probability 0, which eric-mitchell's code calls reference_free.

    Source: arXiv:2401.08417 Eq. 3.
    """
    contrast = smoothed(beta * (pairs.policy_chosen - pairs.policy_rejected), label_smoothing)
    return contrast - cpo_alpha * pairs.policy_chosen_per_token


@preference_loss("slic", reference_free=True)
def slic(pairs: PairBatch, *, delta: float = 1.0, slic_lambda: float = 0.1) -> Tensor:
    """SLiC-HF: max(0, delta - s_w + s_l) - slic_lambda s_w.

    The likelihood is that of the chosen answer, as in HALOs; the paper may take another target.

    Source: arXiv:2305.10425.
    """
    return torch.relu(delta - pairs.policy_chosen + pairs.policy_rejected) - slic_lambda * pairs.policy_chosen


@preference_loss("repo", reference_free=True)
def repo(pairs: PairBatch, *, gamma: float = 0.5) -> Tensor:
    """RePO: max(0, gamma - (s_w/n_w - s_l/n_l)), SimPO with beta at infinity.

    Source: arXiv:2503.07426.
    """
    return torch.relu(gamma - (pairs.policy_chosen_per_token - pairs.policy_rejected_per_token))


@preference_loss("orpo", reference_free=True)
def orpo(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """ORPO: -s_w/n_w - beta log sigma(log odds_w - log odds_l), odds = p/(1-p) with p = exp(s/n).

    Prompt tokens are not scored: the likelihood term is that of the answer, as in the paper, where trl's has the prompt
    too. beta is the paper's lambda, 0.25 for its Phi-2.

    Source: arXiv:2403.07691 Eq. 6 and 7.
    """
    chosen, rejected = pairs.policy_chosen_per_token, pairs.policy_rejected_per_token
    return -chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p; p is kept from rounding to 1, where the odds are infinite."""
    logp = logp.clamp(max=-1e-6)
    return logp - (-torch.expm1(logp)).log()
