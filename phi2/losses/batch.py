"""What a preference loss may look at: the log-probabilities of a batch of pairs, token by token, and their columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor


class Columns(dict[str, Tensor]):
    """(B,) float32 of each column that is a number in every row.

    Args:
        columns: those.
        gaps: of each other column, what is there in place of a number and in which row first. To ask for such a column
            is an error, also with `in` and `get`: whether it is there would depend on the rows at hand.
    """

    def __init__(self, columns: Mapping[str, Tensor] | None = None, gaps: Mapping[str, str] | None = None) -> None:
        super().__init__(columns or {})
        self.gaps = gaps or {}

    def __missing__(self, name: str) -> Tensor:
        gap = f"; {name!r} is not one: {self.gaps[name]}" if name in self.gaps else ""
        numbers = ", ".join(self) or "none"
        raise ValueError(f"the loss reads the column {name!r}; columns of numbers here are {numbers}{gap}")

    def __contains__(self, name: object) -> bool:
        if isinstance(name, str) and name in self.gaps:
            self.__missing__(name)
        return super().__contains__(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def each(self, function: Callable[[Tensor], Tensor]) -> Columns:
        """The same columns with every tensor replaced by `function` of it."""
        return Columns({name: function(values) for name, values in self.items()}, self.gaps)


@dataclass(frozen=True)
class PairBatch:
    """Everything a preference loss may look at, token by token.

    Dims: B pairs, T_w and T_l tokens of the longest chosen and rejected answer.

    Attributes:
        policy_chosen_logps, ref_chosen_logps: (B, T_w) float32 in nats, 0 behind the end of an answer.
        policy_rejected_logps, ref_rejected_logps: (B, T_l) likewise. The ref ones are None in a reference-free run.
        chosen_mask, rejected_mask: bool of the same shapes, True at tokens of the answer.
        columns: (B,) float32 for each numeric column of the data set (score_chosen, weight, ...).
        score: what a log-ratio l counts as, element by element; None is l itself (`modifiers.f_divergence`).
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    columns: Columns = field(default_factory=Columns)
    score: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def chosen_length(self) -> Tensor:
        """(B,) tokens of each chosen answer, at least 1."""
        return self.chosen_mask.sum(dim=-1).clamp(min=1)

    @cached_property
    def rejected_length(self) -> Tensor:
        """(B,) tokens of each rejected answer, at least 1."""
        return self.rejected_mask.sum(dim=-1).clamp(min=1)

    @cached_property
    def policy_chosen(self) -> Tensor:
        """s_w, (B,)."""
        return self.policy_chosen_logps.sum(dim=-1)

    @cached_property
    def policy_rejected(self) -> Tensor:
        """s_l, (B,)."""
        return self.policy_rejected_logps.sum(dim=-1)

    @cached_property
    def ref_chosen(self) -> Tensor:
        """r_w, (B,)."""
        return self._reference(self.ref_chosen_logps).sum(dim=-1)

    @cached_property
    def ref_rejected(self) -> Tensor:
        """r_l, (B,)."""
        return self._reference(self.ref_rejected_logps).sum(dim=-1)

    @cached_property
    def policy_chosen_per_token(self) -> Tensor:
        """s_w / n_w, (B,)."""
        return self.policy_chosen / self.chosen_length

    @cached_property
    def policy_rejected_per_token(self) -> Tensor:
        """s_l / n_l, (B,)."""
        return self.policy_rejected / self.rejected_length

    @cached_property
    def chosen_logratio(self) -> Tensor:
        """l_w = s_w - r_w, (B,); under an f-divergence, its score."""
        return self._scored(self.policy_chosen - self.ref_chosen)

    @cached_property
    def rejected_logratio(self) -> Tensor:
        """l_l = s_l - r_l, (B,); under an f-divergence, its score."""
        return self._scored(self.policy_rejected - self.ref_rejected)

    @cached_property
    def margin(self) -> Tensor:
        """l_w - l_l, (B,): what DPO calls the difference of log-ratios."""
        return self.chosen_logratio - self.rejected_logratio

    @cached_property
    def margin_per_token(self) -> Tensor:
        """l_w / n_w - l_l / n_l, (B,)."""
        return self.chosen_logratio / self.chosen_length - self.rejected_logratio / self.rejected_length

    def _scored(self, logratio: Tensor) -> Tensor:
        return logratio if self.score is None else self.score(logratio)

    @staticmethod
    def _reference(logps: Tensor | None) -> Tensor:
        if logps is None:
            raise ValueError("this run has no reference: register the loss without reference_free=True to use it")
        return logps
