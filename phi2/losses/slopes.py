"""How a loss pulls on the two answers of each pair: its value, and its derivatives d_w and d_l.

Symbols are those of `logistic.py`: s_w and s_l are the log-probabilities of the chosen and the rejected answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.properties import outcome


class Slopes(NamedTuple):
    """(B,) values in nats, and (B,) derivatives of their sum with respect to s_w and s_l."""

    values: Tensor
    d_w: Tensor
    d_l: Tensor


def slopes_of(losses_of: Callable[[PairBatch], Tensor], pairs: PairBatch) -> Slopes:
    """Values and derivatives of a loss.

    s_w rises by a nat when each of its n_w tokens rises by 1/n_w: d_w is the mean of the derivatives at the tokens.
    Those are all alike in a loss of s_w, and d_w is dL/ds_w.

    Args:
        losses_of: (B,) values of pairs, a `BoundLoss` or one at a state of it.
    """
    values, chosen, rejected = outcome(losses_of, pairs)
    d_w = _mean(chosen, pairs.chosen_mask, pairs.chosen_length)
    return Slopes(values, d_w, _mean(rejected, pairs.rejected_mask, pairs.rejected_length))


def _mean(values: Tensor, mask: Tensor, length: Tensor) -> Tensor:
    """(B,) of the masked values of each row of (B, T); of equal values, that value, bit for bit."""
    return ((values * mask).double().sum(dim=-1) / length).to(values.dtype)
