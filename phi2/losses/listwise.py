"""Losses of several answers to one prompt, best first by their scores. Of a chosen and a rejected one: scores 1 and 0.

P prompts, K answers to the one that has most; each prompt gets its value. Answers of equal score are never compared.
Symbols are those of `logistic.py`; z_i = beta l_i of answer i.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2.losses.batch import AnswerBatch
from phi2.losses.registry import preference_loss


class Lists(NamedTuple):
    """Answers prompt by prompt.

    Attributes:
        values: (P, K) what was given of each answer, 0 where there is none.
        scores: (P, K) likewise.
        here: (P, K) bool, whether there is one.
    """

    values: Tensor
    scores: Tensor
    here: Tensor


def lists_of(answers: AnswerBatch, values: Tensor) -> Lists:
    """The lists of (A,) values."""
    return Lists(answers.grid(values), answers.grid(answers.score), answers.grid(torch.ones_like(answers.score)) > 0)


def worse_in(lists: Lists) -> Tensor:
    """(P, K, K) bool, [p, i, j] whether answer j to prompt p is worse than answer i."""
    return _apart(lists.scores.masked_fill(~lists.here, torch.nan)) > 0  # nothing is above or below nan


@preference_loss("plackett_luce", unit="prompt")
def plackett_luce(answers: AnswerBatch, *, beta: float = 0.1) -> Tensor:
    """DPO on a ranking: sum over i of -log(e^z_i / (e^z_i + sum over worse j of e^z_j)).

    The likelihood of the whole order, the best answer drawn first. With two answers it is `sigmoid`.

    Source: arXiv:2305.18290 Eq. 20.
    """
    lists = lists_of(answers, beta * answers.logratio)
    return _against_worse(lists).sum(dim=-1)


@preference_loss("softmax_dpo", unit="prompt")
def softmax_dpo(answers: AnswerBatch, *, beta: float = 0.1) -> Tensor:
    """S-DPO: -log sigma(-log sum over worse j of e^(z_j - z_w)), w the best answer.

    The best answer against all worse ones at once, the first term of `plackett_luce`; of several best ones the first in
    the row. With two answers it is `sigmoid`.

    Source: arXiv:2406.09215 Eq. 10.
    """
    lists = lists_of(answers, beta * answers.logratio)
    return _against_worse(lists)[:, 0]


def _against_worse(lists: Lists) -> Tensor:
    """(P, K) log(1 + sum over worse j of e^(z_j - z_i)) of each answer i; 0 where there are none."""
    return F.softplus((-_apart(lists.values)).masked_fill(~worse_in(lists), -torch.inf).logsumexp(dim=-1))


@preference_loss("lipo", unit="prompt")
def lipo(answers: AnswerBatch, *, beta: float = 0.05) -> Tensor:
    """LiPO-lambda: sum over i, worse j of |G_i - G_j| |1/D_i - 1/D_j| log(1 + e^(z_j - z_i)), G = 2^score - 1, D =
    log(1 + rank by z), sg.

    A pair counts more the further its scores are apart and the more an exchange of both would change the ranking. The
    paper's scores are between 0 and 1: gains grow as 2^score.

    Source: arXiv:2402.01878 Eq. 9.
    """
    lists = lists_of(answers, beta * answers.logratio)
    order = lists.values.masked_fill(~lists.here, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    discount = (2.0 + order.argsort(dim=-1)).log().reciprocal()  # the first is of rank 1
    weight = (_apart(2**lists.scores) * _apart(discount)).abs()  # the -1 of G is in no difference
    return (weight * F.softplus(-_apart(lists.values)) * worse_in(lists)).sum(dim=(1, 2))


def _apart(values: Tensor) -> Tensor:
    """(P, K) values as (P, K, K) differences of i and j."""
    return values[:, :, None] - values[:, None, :]


@preference_loss("infonca", unit="prompt")
def infonca(answers: AnswerBatch, *, beta: float = 0.01, temperature: float = 1.0) -> Tensor:
    """InfoNCA: -sum_i softmax(scores / temperature)_i log softmax(z)_i.

    The policy's shares follow those of the scores. temperature is the paper's alpha; its authors take 1e-4, with which
    all weight is on the best answer: `softmax_dpo`.

    Source: arXiv:2402.05369 Eq. 7; thu-ml/Noise-Contrastive-Alignment reward_trainer.py.
    """
    lists = lists_of(answers, beta * answers.logratio)
    total = lists.values.masked_fill(~lists.here, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return -(_soft_labels(lists, temperature) * (lists.values - total)).sum(dim=-1)


@preference_loss("nca", unit="prompt")
def nca(answers: AnswerBatch, *, beta: float = 0.01, temperature: float = 1.0) -> Tensor:
    """NCA: -sum_i (softmax(scores / temperature)_i log sigma(z_i) + log sigma(-z_i) / K).

    Each answer's likelihood is held by itself: good ones do not fall with the bad ones. With two answers and all weight
    on the best one it is `nca_pair`. temperature is the paper's alpha; its authors take 1e-4.

    Source: arXiv:2402.05369 Eq. 10; thu-ml/Noise-Contrastive-Alignment reward_trainer.py.
    """
    lists = lists_of(answers, beta * answers.logratio)
    terms = _soft_labels(lists, temperature) * F.logsigmoid(lists.values)
    return -(terms + F.logsigmoid(-lists.values) / lists.here.sum(dim=-1, keepdim=True)).mul(lists.here).sum(dim=-1)


def _soft_labels(lists: Lists, temperature: float) -> Tensor:
    """(P, K) shares by score, 0 where there is no answer."""
    return (lists.scores / temperature).masked_fill(~lists.here, -torch.inf).softmax(dim=-1)


@preference_loss("sppo", unit="prompt")
def sppo(answers: AnswerBatch, *, beta: float = 0.001) -> Tensor:
    """SPPO: mean_i (l_i - (P_i - 1/2) / beta)^2, P_i = mean_j sigma(score_i - score_j).

    P is the chance that an answer beats the policy, whose samples the K answers are taken for; a judge's scores make
    it. `sppo_hard` is that with P = 1 and 0.

    Source: arXiv:2405.00675 Eq. 4.7; uclaml/SPPO scripts/compute_prob.py.
    """
    lists = lists_of(answers, answers.logratio)
    beats = torch.sigmoid(_apart(lists.scores)) * lists.here[:, None, :]
    count = lists.here.sum(dim=-1, keepdim=True)
    target = (beats.sum(dim=-1) / count - 0.5) / beta
    return ((lists.values - target) ** 2 * lists.here).sum(dim=-1) / count[:, 0]


@preference_loss("rrhf", unit="prompt", reference_free=True)
def rrhf(answers: AnswerBatch, *, rank_weight: float = 1.0) -> Tensor:
    """RRHF: -s_w + rank_weight sum over i, worse j of max(0, s_j/n_j - s_i/n_i), w the best answer.

    Of several best ones w is the first in the row.

    Source: arXiv:2304.05302 Eq. 2 to 4; its authors' code takes a mean over tokens of the batch for s_w.
    """
    lists = lists_of(answers, answers.policy_per_token)
    ranking = (torch.relu(-_apart(lists.values)) * worse_in(lists)).sum(dim=(1, 2))
    return rank_weight * ranking - answers.chosen
