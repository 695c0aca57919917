"""From encoded pairs to the log-probabilities of their tokens, and on to what a loss looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phi2.data.encode import EncodedPair
from phi2.losses.batch import Columns, PairBatch
from phi2.losses.head import target_logps
from phi2.model import Phi2ForCausalLM
from phi2.training.packing import TokenRow, row_of_pairs
from phi2.training.reference_cache import Reference


def score_pairs(
    model: Phi2ForCausalLM,
    batches: Sequence[Sequence[EncodedPair]],
    reference: Reference | None,
    precision: Callable[[], AbstractContextManager],
) -> PairBatch:
    """Both models' log-probabilities of all pairs of some micro-batches, as a loss takes them."""
    scored = [both_logps(model, batch, reference, precision()) for batch in batches]
    ref = [logps for _, logps in scored if logps is not None]
    policy = torch.cat([logps for logps, _ in scored])
    return pair_batch([pair for batch in batches for pair in batch], policy, torch.cat(ref) if ref else None)


def both_logps(
    model: Phi2ForCausalLM, batch: Sequence[EncodedPair], reference: Reference | None, precision: AbstractContextManager
) -> tuple[Tensor, Tensor | None]:
    """(N,) log-probabilities of a micro-batch's tokens by the policy, and by the reference where there is one."""
    row = row_of_pairs(batch).to(model.device)
    with precision:
        ref = None if reference is None else reference(batch, row)
        return row_logps(model, row), ref


def row_logps(model: Phi2ForCausalLM, row: TokenRow) -> Tensor:
    """(N,) log-probabilities of a row's targets."""
    hidden = model.model(row.input_ids, positions=row.positions, visible_until=row.visible_until)
    return target_logps(model, hidden, row.logits_indices, row.targets)[0]


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
