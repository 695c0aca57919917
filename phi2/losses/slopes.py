"""How a loss pulls on answers: its values, and its derivatives with respect to their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from phi2.losses.batch import AnswerBatch
from phi2.losses.properties import outcome


class Slopes(NamedTuple):
    """(P,) values in nats, and (A,) derivatives of their sum with respect to the log-probability of each answer."""

    values: Tensor
    of_answers: Tensor


def slopes_of(losses_of: Callable[[AnswerBatch], Tensor], answers: AnswerBatch) -> Slopes:
    """Values and derivatives of a loss.

    The log-probability s of an answer rises by a nat when each of its n tokens rises by 1/n: the derivative is the mean
    of those at the tokens. They are all alike in a loss of s, and their mean, bit for bit, is dL/ds.

    Args:
        losses_of: (P,) values of answers, a `BoundLoss` or one at a state of it.
    """
    values, gradient = outcome(losses_of, answers)
    return Slopes(values, (gradient.double().sum(dim=-1) / answers.length).to(gradient.dtype))
