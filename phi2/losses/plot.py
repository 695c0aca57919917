"""A loss drawn in plain text: its value, and the weight -dL/ds_w of its gradient, against the margin of a pair."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phi2.losses.batch import Columns, PairBatch
from phi2.losses.bound import BoundLoss

WIDTH, HEIGHT = 61, 11  # characters of a plot; odd, so that a margin of 0 has a place
REACH = 4.0  # of the margin to both sides of 0, in units of 1 / reward_scale


def plots(loss: BoundLoss, columns: Columns) -> str:
    """Both curves, one below the other.

    Both answers are one token; of the margin, half is the chosen answer's and half the rejected one's.

    Args:
        columns: what the loss reads besides.
    """
    reach = REACH / loss.reward_scale
    margins = torch.linspace(-reach, reach, WIDTH, dtype=torch.float64)
    values, weights = _curves(loss, margins, columns)
    axis = f"{-reach:<{WIDTH // 2}g}0{reach:>{WIDTH // 2}g}"
    what = "s_w - s_l" if loss.reference_free else "l_w - l_l"
    return "\n".join(
        [
            *_drawn("loss", values),
            *_drawn("weight, -dL/ds_w", weights),
            f"{'':11}{axis}",
            f"{'':11}margin {what}, in nats",
        ]
    )


def _curves(loss: BoundLoss, margins: Tensor, columns: Columns) -> tuple[list[float], list[float]]:
    mask = torch.ones(len(margins), 1, dtype=torch.bool)
    middle = torch.full_like(margins, -margins.abs().max().item() / 2 - 0.1)[:, None]  # no probability is above 1
    chosen = (middle + margins[:, None] / 2).requires_grad_()
    reference = None if loss.reference_free else middle
    values = loss(PairBatch(chosen, middle - margins[:, None] / 2, mask, mask, reference, reference, columns))
    (slope,) = torch.autograd.grad(values.sum(), chosen)
    return values.tolist(), (-slope[:, 0]).tolist()


def _drawn(title: str, values: Sequence[float]) -> list[str]:
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    rows = [[" "] * len(values) for _ in range(HEIGHT)]
    for column, value in enumerate(values):
        rows[round((high - value) / span * (HEIGHT - 1))][column] = "*"
    labels = {0: f"{high:.3g}", HEIGHT - 1: f"{low:.3g}"}
    drawn = [f"{labels.get(index, ''):>9} |{''.join(row).rstrip()}" for index, row in enumerate(rows)]
    return [f"{'':11}{title}", *drawn, f"{'':10}+{'-' * len(values)}"]
