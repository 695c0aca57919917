"""Other functions of DPO's margin l_w - l_l: where the logistic loss never stops pushing, these stop, or pull back.

Symbols are those of `logistic.py`; z = beta (l_w - l_l).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from phi2.losses.batch import PairBatch
from phi2.losses.registry import preference_loss


@preference_loss("ipo")
def ipo(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """IPO: (l_w/n_w - l_l/n_l - 1/(2 beta))^2, on means per token as trl does; the paper writes sums.

    `reduction: sum` makes them sums (`--loss paper:ipo`). beta is the paper's tau.

    Source: arXiv:2310.12036 Eq. 17.
    """
    return (pairs.margin_per_token - 1 / (2 * beta)) ** 2


@preference_loss("hinge")
def hinge(pairs: PairBatch, *, beta: float = 0.1) -> Tensor:
    """Hinge on the log-ratios: max(0, 1 - z), z = beta (l_w - l_l).

    Source: arXiv:2309.06657 Eq. 10 (RSO), after SLiC, arXiv:2305.10425.
    """
    return torch.relu(1 - beta * pairs.margin)


@preference_loss("exo_pair")
def exo_pair(pairs: PairBatch, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO: KL(q to p) of q = (sigma(z), sigma(-z)) and the labels' p = (1 - e, e), z = beta (l_w - l_l).

    e = label_smoothing must be above 0, where the loss is infinite; the paper has 1e-3. trl refuses its own default, 0.

    Source: arXiv:2402.00856 Eq. 16.
    """
    z = beta * pairs.margin
    chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    return chosen + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))


@preference_loss("discopop")
def discopop(pairs: PairBatch, *, beta: float = 0.05, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP: -(1-m) log sigma(z) + m e^-z, m = sigma(z / discopop_tau), z = beta (l_w - l_l).

    Not convex: found by search over programs.

    Source: arXiv:2406.08414 Eq. 5.
    """
    z = beta * pairs.margin
    modulation = torch.sigmoid(z / discopop_tau)
    return -F.logsigmoid(z) * (1 - modulation) + torch.exp(-z) * modulation


@preference_loss("gpo")
def gpo(
    pairs: PairBatch,
    *,
    beta: float = 0.1,
    link: Literal["exponential", "truncated_quadratic", "savage", "squared"] = "exponential",
) -> Tensor:
    """GPO, by link: exponential e^-z, truncated_quadratic max(0, 1-z)^2, savage sigma(-z)^2, squared (z-1)^2.

    z = beta (l_w - l_l). GPO's logistic is `sigmoid`, its hinge is `hinge`.

    Source: arXiv:2402.05749.
    """
    z = beta * pairs.margin
    if link == "exponential":
        return torch.exp(-z)
    if link == "truncated_quadratic":
        return torch.relu(1 - z) ** 2
    return torch.sigmoid(-z) ** 2 if link == "savage" else (z - 1) ** 2
