"""The noise floor: how far log-probabilities move by nothing but rounding, and which margins drown in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from phi2.data.encoded import EncodedPreference
from phi2.lab.layouts import Logps, alone, in_dtype, padded, reordered, shared
from phi2.lora import disabled
from phi2.model import Phi2ForCausalLM

HALVES = (torch.bfloat16, torch.float16)


class Moved(NamedTuple):
    """How far log-probabilities moved, in nats: of a token and of a whole answer, at most and on average."""

    token_max: float
    token_mean: float
    answer_max: float
    answer_mean: float


@dataclass(frozen=True)
class NoiseFloor:
    """What rounding does to this model on these rows.

    Attributes:
        dtype: that the model computes in.
        layouts: by what was changed, in that dtype.
        precisions: by dtype, against float32.
        margins: (P,) nats, of the best answer to each prompt and the next: difference of their log-ratios to the model
            without its adapter; of a model without one, of their log-probabilities.
        of_policy: whether they are margins of an adapter.
    """

    dtype: torch.dtype
    layouts: dict[str, Moved]
    precisions: dict[torch.dtype, Moved]
    margins: Tensor
    of_policy: bool

    def floor(self, dtype: torch.dtype) -> float:
        """The most that an answer's log-probability moved in a dtype, nats."""
        own = [self.precisions[dtype].answer_max] if dtype in self.precisions else []
        return float(np.max([*own, *(moved.answer_max for moved in self.layouts.values() if dtype == self.dtype)]))

    def drowned(self, dtype: torch.dtype) -> int:
        """Pairs whose margin is smaller than that."""
        return int((self.margins.abs() < self.floor(dtype)).sum())

    def __str__(self) -> str:
        name = _name(self.dtype)
        told = {f"{what}, {name}": moved for what, moved in self.layouts.items()}
        told |= {f"{_name(dtype)} against float32": moved for dtype, moved in self.precisions.items()}
        width = max(map(len, told))
        head = f"{'noise floor, nats':<{width}}  {'a token: max':>12}  {'mean':>8}  {'an answer: max':>14}  {'mean':>8}"
        rows = [f"{k:<{width}}  {m[0]:>12.1e}  {m[1]:>8.1e}  {m[2]:>14.1e}  {m[3]:>8.1e}" for k, m in told.items()]
        return "\n".join(
            [head, *rows, *map(self._sentence, dict.fromkeys((self.dtype, *self.precisions))), self._spread()]
        )

    def _sentence(self, dtype: torch.dtype) -> str:
        if not math.isfinite(self.floor(dtype)):
            return f"some log-probs are no numbers in {_name(dtype)}: it has no noise floor"
        return (
            f"the noise floor of an answer is {self.floor(dtype):.1e} nats in {_name(dtype)}:"
            f" {self.drowned(dtype)} of {len(self.margins)} pairs have a margin below it"
        )

    def _spread(self) -> str:
        least, middle, most = torch.quantile(self.margins.abs(), self.margins.new_tensor([0.0, 0.5, 1.0])).tolist()
        whose = "policy - reference" if self.of_policy else "of the model itself"
        return f"margins ({whose}): {least:.2g} to {most:.2g} nats, median {middle:.2g}"


@torch.no_grad()
def noise_floor(
    model: Phi2ForCausalLM, rows: Sequence[EncodedPreference], single: Logps, of_policy: bool
) -> NoiseFloor:
    """Measured on these rows.

    Args:
        single: what `alone` says of them.
        of_policy: whether the model has an adapter that was trained, so that margins are those to its base.
    """
    together, exact = shared(model, rows), in_dtype(model, rows, torch.float32)
    layouts = {
        "batch shape": moved(single, padded(model, rows)),
        "shared prompts": moved(single, together),
        "order": moved(together, reordered(model, rows)),
    }
    precisions = {dtype: moved(exact, in_dtype(model, rows, dtype)) for dtype in HALVES}
    totals = _totals(single)
    if of_policy:
        with disabled(model):
            totals = totals - _totals(alone(model, rows))
    best = torch.tensor([0, *np.cumsum([len(row.answers) for row in rows])[:-1]])  # of each row
    return NoiseFloor(model.dtype, layouts, precisions, totals[best] - totals[best + 1], of_policy)


def moved(logps: Logps, others: Logps) -> Moved:
    """From one reading of the answers to another."""
    tokens, answers = (torch.cat(logps) - torch.cat(others)).abs(), (_totals(logps) - _totals(others)).abs()
    return Moved(*(number.item() for values in (tokens, answers) for number in (values.max(), values.mean())))


def _totals(logps: Logps) -> Tensor:
    """(A,) float64 nats of whole answers: float32 would round those of a long one."""
    return torch.stack([answer.double().sum() for answer in logps]).cpu()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
