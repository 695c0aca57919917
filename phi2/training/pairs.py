"""From encoded pairs and the log-probabilities of their tokens to what a loss looks at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phi2.data.encode import EncodedPair
from phi2.losses.batch import Columns, PairBatch


def pair_batch(batch: Sequence[EncodedPair], policy: Tensor, ref: Tensor | None) -> PairBatch:
    """Splits the (N,) log-probabilities of `row_of_pairs` into chosen and rejected ones, padded with zeros.

    Args:
        batch: B pairs.
        policy, ref: (N,) float32.
    """
    lengths = [n for pair in batch for n in (len(pair.chosen), len(pair.rejected))]
    chosen, rejected = _both_answers(policy, lengths)
    chosen_mask, rejected_mask = _both_answers(torch.ones_like(policy, dtype=torch.bool), lengths)
    ref_chosen, ref_rejected = (None, None) if ref is None else _both_answers(ref, lengths)
    columns = numeric_columns(batch, column_gaps(batch), policy.device)
    return PairBatch(chosen, rejected, chosen_mask, rejected_mask, ref_chosen, ref_rejected, columns)


def _both_answers(values: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    answers = values.split(lengths)
    return pad_sequence(answers[::2], batch_first=True), pad_sequence(answers[1::2], batch_first=True)


def numeric_columns(batch: Sequence[EncodedPair], gaps: dict[str, str], device: torch.device) -> Columns:
    """(B,) float32 of every column without a gap."""
    names = [name for name in batch[0].columns if name not in gaps]
    return Columns({k: torch.tensor([float(p.columns[k]) for p in batch], device=device) for k in names}, gaps)


def column_gaps(pairs: Sequence[EncodedPair]) -> dict[str, str]:
    """Of each column that is not a number in every row: what the first such row has in its place."""
    gaps = {}
    for name in dict.fromkeys(name for pair in pairs for name in pair.columns):
        other = next((pair for pair in pairs if not isinstance(pair.columns.get(name), int | float)), None)
        if other is not None:
            gaps[name] = f"{other.origin} has {repr(other.columns[name]) if name in other.columns else 'none'}"
    return gaps
