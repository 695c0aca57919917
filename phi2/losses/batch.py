"""What a preference loss may look at: log-probabilities token by token, what the data say of them, and their columns.

`AnswerBatch` is the whole of it: prompts, any number of answers to each, a score of each answer. Most losses compare a
chosen with a rejected answer: they are given its `pairs`, a `PairBatch`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, combinations, pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from phi2.arriving import without_wait

Unit = Literal["pair", "answer", "prompt"]  # what a value of a loss belongs to


Comparison = tuple[int | None, int | None]  # places of a better answer and of a worse one


def comparisons(scores: Sequence[Sequence[float]]) -> list[Comparison]:
    """Every two answers to one prompt of which one is better; a prompt's only answer alone, on the side of its label.

    Args:
        scores: of the answers to each prompt, best first. Places are those among all answers.
    """
    found: list[Comparison] = []
    for start, each in zip(accumulate(map(len, scores), initial=0), scores, strict=False):
        if len(each) == 1:
            found.append((start, None) if each[0] > 0 else (None, start))
        found += [(start + i, start + j) for i, j in combinations(range(len(each)), 2) if each[i] > each[j]]
    return found


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
    """Everything that a loss of pairs may look at, token by token.

    Dims: B pairs, T_w, T_l and T_g tokens of the longest chosen, rejected and gold answer.

    Attributes:
        policy_chosen_logps, ref_chosen_logps: (B, T_w) float32 in nats, 0 behind the end of an answer.
        policy_rejected_logps, ref_rejected_logps: (B, T_l) likewise. The ref ones are None in a reference-free run.
        chosen_mask, rejected_mask: bool of the same shapes, True at tokens of the answer.
        columns: (B,) float32 for each numeric column of the data set (score_chosen, weight, ...).
        gold_logps, gold_mask: (B, T_g) likewise, of a third answer that is to be imitated, by the policy; None unless
            the loss needs it.
        extras: by name (B, T_w) and (B, T_l) float32 of what the loss needs besides of each token, 0 behind the end.
        score: what a log-ratio l counts as, element by element; None is l itself (`modifiers.f_divergence`).
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    chosen_mask: Tensor
    rejected_mask: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    columns: Columns = field(default_factory=Columns)
    gold_logps: Tensor | None = None
    gold_mask: Tensor | None = None
    extras: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
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
        return _reference(self.ref_chosen_logps).sum(dim=-1)

    @cached_property
    def ref_rejected(self) -> Tensor:
        """r_l, (B,)."""
        return _reference(self.ref_rejected_logps).sum(dim=-1)

    @cached_property
    def gold(self) -> Tensor:
        """s of the answer that is to be imitated, (B,)."""
        assert self.gold_logps is not None, 'the loss was registered without needs=("gold",)'
        return self.gold_logps.sum(dim=-1)

    @cached_property
    def gold_length(self) -> Tensor:
        """(B,) its tokens, at least 1."""
        assert self.gold_mask is not None, "the loss was registered without needs=('gold',)"
        return self.gold_mask.sum(dim=-1).clamp(min=1)

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

    def has(self, need: str) -> bool:
        """Whether what a loss may ask for is here."""
        return self.gold_logps is not None if need == "gold" else need in self.extras

    def _scored(self, logratio: Tensor) -> Tensor:
        return logratio if self.score is None else self.score(logratio)


@dataclass(frozen=True)
class AnswerBatch:
    """Everything that a preference loss may look at, token by token.

    Dims: P prompts, A answers, T tokens of the longest answer. Answers to one prompt stand side by side, best first.

    Attributes:
        policy_logps, ref_logps: (A, T) float32 in nats, 0 behind the end of an answer; ref is None in a reference-free
            run.
        lengths: tokens of each answer.
        prompts: of each answer which of the P prompts it answers, ascending from 0.
        scores: of each answer 1 or 0 where it is chosen or rejected, or has a label; else what the data set gives.
        columns: (P,) float32 for each numeric column of the data set.
        gold: an answer to each prompt that is to be imitated and compared with nothing; None unless the loss needs it.
        extras: by name (A, T) float32 of what the loss needs besides of each token, 0 behind the end.
        mismatched: answers to other prompts behind each prompt of the update, without gradient; of all its prompts,
            also where these are a part of them. None unless the loss needs them.
    """

    policy_logps: Tensor
    lengths: tuple[int, ...]
    prompts: tuple[int, ...]
    scores: tuple[float, ...]
    ref_logps: Tensor | None = None
    columns: Columns = field(default_factory=Columns)
    gold: AnswerBatch | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    mismatched: AnswerBatch | None = None

    @cached_property
    def mask(self) -> Tensor:
        """(A, T) bool, True at tokens of the answer."""
        places = torch.arange(self.policy_logps.shape[1], device=self.policy_logps.device)
        return places < self._tensor(self.lengths)[:, None]

    @cached_property
    def length(self) -> Tensor:
        """(A,) tokens of each answer, at least 1."""
        return self._tensor(self.lengths).clamp(min=1)

    @cached_property
    def prompt(self) -> Tensor:
        """(A,) which prompt each answers."""
        return self._tensor(self.prompts)

    @cached_property
    def score(self) -> Tensor:
        """(A,) float32."""
        return self._tensor(self.scores, torch.float32)

    @cached_property
    def is_good(self) -> Tensor:
        """(A,) bool: the label of each answer, and of a pair True of the chosen one.

        Raises:
            ValueError: for scores that are neither 1 nor 0.
        """
        return self._tensor(self._labels, torch.bool)

    @cached_property
    def by_label(self) -> tuple[Tensor, Tensor]:
        """(n,) places of the good answers and (m,) of the bad ones; raises what `is_good` raises."""
        good, bad = ([i for i, label in enumerate(self._labels) if label == side] for side in (True, False))
        return self._tensor(good), self._tensor(bad)

    @cached_property
    def _labels(self) -> list[bool]:
        other = next((score for score in self.scores if score not in (0, 1)), None)
        if other is not None:
            raise ValueError(
                f"the loss needs answers with a label, good or bad, or pairs, and one has a score, {other:g}"
            )
        return [score == 1 for score in self.scores]

    @cached_property
    def policy(self) -> Tensor:
        """s, (A,)."""
        return self.policy_logps.sum(dim=-1)

    @cached_property
    def ref(self) -> Tensor:
        """r, (A,)."""
        return _reference(self.ref_logps).sum(dim=-1)

    @cached_property
    def logratio(self) -> Tensor:
        """l = s - r, (A,)."""
        return self.policy - self.ref

    @cached_property
    def policy_per_token(self) -> Tensor:
        """s / n, (A,)."""
        return self.policy / self.length

    @cached_property
    def chosen(self) -> Tensor:
        """(P,) s of the best answer to each prompt; 0 where the only one is labelled a bad one."""
        return self.of_best(self.policy)

    def of_best(self, values: Tensor) -> Tensor:
        """(P,) of (A,) values that of the best answer to each prompt; 0 where the only one is labelled a bad one."""
        firsts = self._starts[:-1]
        alone_and_bad = [end - start == 1 and self.scores[start] <= 0 for start, end in pairwise(self._starts)]
        return values[self._tensor(firsts)].masked_fill(self._tensor(alone_and_bad, torch.bool), 0)

    def has(self, need: str) -> bool:
        """Whether what a loss may ask for is here."""
        others = {"gold": self.gold, "mismatched": self.mismatched}
        return others[need] is not None if need in others else need in self.extras

    @property
    def count(self) -> int:
        """P."""
        return self.prompts[-1] + 1

    def grid(self, values: Tensor) -> Tensor:
        """(A,) values as (P, K) for K answers to the prompt that has most; 0 where another has fewer."""
        return self._grid(values, self.prompts)

    def at_reference(self) -> AnswerBatch:
        """The same answers as if the policy were its reference."""
        others = None if self.mismatched is None else self.mismatched.at_reference()
        return replace(self, policy_logps=_reference(self.ref_logps), mismatched=others)

    @cached_property
    def pairs(self) -> PairBatch:
        """Every two answers to one prompt of which one is better; of a chosen and a rejected answer, these two."""
        owners = self._owners("pair")
        (s_w, s_l), (r_w, r_l), (m_w, m_l) = map(self._sides, (self.policy_logps, self.ref_logps, self.mask))
        columns, gold, extras = self.columns, self.gold, {name: self._sides(x) for name, x in self.extras.items()}
        if owners != [*range(self.count)]:
            prompt = self._tensor(owners)
            columns = columns.each(lambda values: values[prompt])
        s_g, m_g = (None, None) if gold is None else (gold.policy_logps, gold.mask)
        return PairBatch(s_w, s_l, m_w, m_l, r_w, r_l, columns, s_g, m_g, extras)

    def gaps(self, values: Tensor) -> Tensor:
        """(B,) of (A,) values, the better answer's less the worse one's, of each of `pairs`; there may be none."""
        better, worse = zip(*self._better, strict=True) if self._better else ((), ())
        return values[self._tensor(better)] - values[self._tensor(worse)]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Of each of R rows of a ledger which answers it compares, or holds alone."""
        return comparisons([self.scores[start:end] for start, end in pairwise(self._starts)])

    def better_and_worse(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """(R,) of (A,) values those of the answers that `comparisons` names, NaN where it names none."""
        known = torch.cat((values, values.new_full((1,), torch.nan)))
        better, worse = zip(*self.comparisons, strict=True)
        chosen, rejected = ([-1 if place is None else place for place in side] for side in (better, worse))
        return known[self._tensor(chosen)], known[self._tensor(rejected)]

    def of_comparisons(self, values: Tensor) -> Tensor:
        """(R,) of (P,) values each comparison's."""
        either = [worse if better is None else better for better, worse in self.comparisons]
        return values[self.prompt[self._tensor([place for place in either if place is not None])]]

    def of_prompts(self, losses: Tensor, unit: Unit) -> Tensor:
        """(P,) for each prompt the mean over its pairs or answers.

        Args:
            losses: one value a unit.
        """
        owners = self._owners(unit)
        if owners == [*range(self.count)]:
            return losses
        counts = Counter(owners)
        sums = self._grid(losses, owners).sum(dim=1)  # in a fixed order
        return sums / self._tensor([counts[prompt] for prompt in range(self.count)])

    def only(self, prompt: int) -> AnswerBatch:
        """One prompt with its answers, without padding."""
        start, end = self._starts[prompt : prompt + 2]
        width = max(self.lengths[start:end])
        ref = None if self.ref_logps is None else self.ref_logps[start:end, :width]
        return AnswerBatch(
            policy_logps=self.policy_logps[start:end, :width],
            ref_logps=ref,
            lengths=self.lengths[start:end],
            prompts=(0,) * (end - start),
            scores=self.scores[start:end],
            columns=self.columns.each(lambda values: values[prompt : prompt + 1]),
            gold=None if self.gold is None else self.gold.only(prompt),
            extras={name: values[start:end, :width] for name, values in self.extras.items()},
            mismatched=self.mismatched,
        )

    def _grid(self, values: Tensor, owners: Sequence[int]) -> Tensor:
        """(n,) values as (P, K), each in the row of the prompt that owns it; 0 where another owns more."""
        counts: Counter[int] = Counter()
        places = []
        for owner in owners:
            places.append(counts[owner])
            counts[owner] += 1
        table = values.new_zeros((self.count, max(counts.values(), default=0)))
        return table.index_put((self._tensor(owners), self._tensor(places)), values)

    def _owners(self, unit: Unit) -> list[int]:
        """The prompt of each pair or answer."""
        if unit == "prompt":
            return [*range(self.count)]
        return [*self.prompts] if unit == "answer" else [self.prompts[i] for i, _ in self._better]

    @cached_property
    def _starts(self) -> list[int]:
        """Where the answers to each prompt begin, and where the last one's end."""
        firsts = [i for i, prompt in enumerate(self.prompts) if i == 0 or prompt != self.prompts[i - 1]]
        return [*firsts, len(self.prompts)]

    @cached_property
    def _better(self) -> list[tuple[int, int]]:
        """The better and the worse answer of each pair."""
        return [(i, j) for i, j in self.comparisons if i is not None and j is not None]

    def _sides(self, values: Tensor | None) -> tuple[Any, Any]:
        """(A, T) values as those of the better and of the worse answers."""
        if values is None:
            return None, None
        if not self._better:
            raise ValueError("the loss compares answers to one prompt, and there are no two of which one is better")
        sides = zip(*self._better, strict=True)
        chosen, rejected = (values[self._tensor(side), : max(self.lengths[i] for i in side)] for side in sides)
        return chosen, rejected

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype = torch.long) -> Tensor:
        """On the device, without waiting for what it computes."""
        return without_wait(torch.tensor(values, dtype=dtype), self.policy_logps.device)


def _reference(logps: Tensor | None) -> Tensor:
    if logps is None:
        raise ValueError(
            "this run has no reference: register the loss without reference_free=True to use it (in a loop of your own,"
            " give score_rows one)"
        )
    return logps
