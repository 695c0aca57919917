"""Losses of single answers with a label, good or bad: nothing needs to be compared. Of a pair they see both answers.

A = answers of a batch, of which each gets its value; l = s - r of an answer. Symbols are those of `logistic.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2.losses.batch import AnswerBatch
from phi2.losses.registry import State, preference_loss


@preference_loss("kto", unit="answer", needs=("mismatched",))
def kto(
    answers: AnswerBatch, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """KTO: w (1 - sigma(beta (l - z))) of a good answer, w (1 - sigma(beta (z - l))) of a bad one, w = desirable_weight
    or undesirable_weight, z = max(0, mean of l over answers behind other prompts), sg.

    z estimates KL(policy to reference) over the window: each prompt is given the answers of the row before it. trl
    sets them up when it reads the data, in blocks of a micro-batch.

    Source: arXiv:2402.01306 Eq. 7 and 8, as in trl.
    """
    assert answers.mismatched is not None
    z = answers.mismatched.logratio.mean().clamp(min=0).detach()
    gain = torch.where(answers.is_good, answers.logratio - z, z - answers.logratio)
    return _weight(answers, desirable_weight, undesirable_weight) * (1 - torch.sigmoid(beta * gain))


@preference_loss("apo_zero_unpaired", unit="answer")
def apo_zero_unpaired(
    answers: AnswerBatch, *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> Tensor:
    """APO-zero on single answers: w (1 - sigma(beta l)) of a good answer, w sigma(beta l) of a bad one, w =
    desirable_weight or undesirable_weight.

    KTO with z = 0.

    Source: arXiv:2408.06266 Eq. 7, as in trl.
    """
    gain = torch.where(answers.is_good, answers.logratio, -answers.logratio)
    return _weight(answers, desirable_weight, undesirable_weight) * (1 - torch.sigmoid(beta * gain))


@preference_loss("bco_unpaired", unit="answer", scope="window", state={"mean": 0.0, "answers": 0})
def bco_unpaired(answers: AnswerBatch, state: State, *, beta: float = 0.01) -> tuple[Tensor, State]:
    """BCO on single answers: -log sigma(beta l - d) of a good answer, -log sigma(-(beta l - d)) of a bad one, d = mean
    of beta l over all answers up to this update, sg.

    The shift is that of `bco`, over answers as they come; where there are as many good ones as bad ones it is the
    paper's, halfway between the mean of the good and that of the bad ones.

    Source: arXiv:2404.04656.
    """
    rewards = beta * answers.logratio
    count = state["answers"] + len(rewards)
    shift = state["mean"] + (rewards.detach().mean() - state["mean"]) * len(rewards) / count
    gain = torch.where(answers.is_good, rewards - shift, shift - rewards)
    return -F.logsigmoid(gain), {"mean": shift, "answers": count}


def _weight(answers: AnswerBatch, good: float, bad: float) -> Tensor:
    """(A,) the weight of each answer's kind."""
    return torch.where(answers.is_good, good, bad).to(answers.policy)
