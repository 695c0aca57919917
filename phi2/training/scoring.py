"""From encoded answers to the log-probabilities of their tokens, and on to what a loss looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phi2.data.encode import EncodedPreference
from phi2.losses.batch import AnswerBatch, Columns
from phi2.losses.head import target_logps
from phi2.model import Phi2ForCausalLM
from phi2.training.packing import TokenRow, row_of_answers
from phi2.training.passes import Cut
from phi2.training.reference_cache import Reference

Rows = Sequence[EncodedPreference]


def score_answers(
    model: Phi2ForCausalLM,
    rows: Rows,
    cut: Cut,
    reference: Reference | None,
    precision: Callable[[], AbstractContextManager],
) -> AnswerBatch:
    """Both models' log-probabilities of all answers of some rows, as a loss takes them."""
    passes = cut([row.tokens for row in rows])
    policies, refs = zip(*(both_logps(model, rows, each, reference, precision()) for each in passes), strict=True)
    ref = None if reference is None else joined(rows, passes, refs)
    return answer_batch(rows, joined(rows, passes, policies), ref)


def joined(rows: Rows, passes: Sequence[Sequence[int]], parts: Sequence[Tensor]) -> Tensor:
    """(N,) values of the rows in their order, out of those of each pass."""
    found: dict[int, Tensor] = {}
    for each, part in zip(passes, parts, strict=True):
        found.update(zip(each, part.split([rows[i].target_tokens for i in each]), strict=True))
    return torch.cat([found[i] for i in range(len(rows))])


def apart(rows: Rows, passes: Sequence[Sequence[int]], values: Tensor) -> list[Tensor]:
    """What `joined` makes (N,) values of."""
    found = values.split([row.target_tokens for row in rows])
    return [torch.cat([found[i] for i in each]) for each in passes]


def both_logps(
    model: Phi2ForCausalLM,
    rows: Rows,
    places: Sequence[int],
    reference: Reference | None,
    precision: AbstractContextManager,
) -> tuple[Tensor, Tensor | None]:
    """(N,) log-probabilities of a pass's tokens by the policy, and by the reference where there is one.

    Args:
        places: of the rows that the pass holds.
    """
    batch = [rows[i] for i in places]
    row = row_of_answers(batch).to(model.device)
    with precision:
        ref = None if reference is None else reference(batch, row)
        return row_logps(model, row), ref


def row_logps(model: Phi2ForCausalLM, row: TokenRow) -> Tensor:
    """(N,) log-probabilities of a row's targets."""
    hidden = model.model(row.input_ids, positions=row.positions, visible_until=row.visible_until)
    return target_logps(model, hidden, row.logits_indices, row.targets)[0]


def mismatched(window: Rows) -> list[EncodedPreference]:
    """Each prompt of a window with the answers of the row before it; the first has those of the last.

    A window of one row, the rest of an epoch, has nothing else than its own answers.

    Source: arXiv:2402.01306 §4.1, where micro-batches take the place of windows.
    """
    neighbours = [window[-1], *window[:-1]]
    return [
        replace(row, answers=other.answers, scores=other.scores, has_gold=other.has_gold)
        for row, other in zip(window, neighbours, strict=True)
    ]


def answer_batch(rows: Rows, policy: Tensor, ref: Tensor | None) -> AnswerBatch:
    """The (N,) log-probabilities of `row_of_answers`, answer by answer, padded with zeros.

    Args:
        rows: P prompts with their answers.
        policy, ref: (N,) float32.
    """
    lengths = [len(answer) for row in rows for answer in row.answers]
    prompts = [prompt for prompt, row in enumerate(rows) for _ in row.answers]
    scores = [score for row in rows for score in row.scores]
    columns = numeric_columns(rows, column_gaps(rows), policy.device)
    golds = {i for i, last in enumerate(_last_of(prompts)) if last and rows[prompts[i]].has_gold}

    def batch(places: Sequence[int], columns: Columns) -> AnswerBatch:
        return AnswerBatch(
            _padded(policy, lengths, places),
            tuple(lengths[i] for i in places),
            tuple(prompts[i] for i in places),
            tuple(scores[i] for i in places),
            None if ref is None else _padded(ref, lengths, places),
            columns,
        )

    answers = batch([i for i in range(len(lengths)) if i not in golds], columns)
    return replace(answers, gold=batch(sorted(golds), Columns())) if golds else answers


def _last_of(prompts: Sequence[int]) -> list[bool]:
    """Whether each answer is the last one to its prompt."""
    return [i + 1 == len(prompts) or prompts[i + 1] != prompt for i, prompt in enumerate(prompts)]


def _padded(logps: Tensor, lengths: Sequence[int], places: Sequence[int]) -> Tensor:
    """(answers at these places, T) of (N,)."""
    each = logps.split(list(lengths))
    return pad_sequence([each[i] for i in places], batch_first=True)


def numeric_columns(rows: Rows, gaps: dict[str, str], device: torch.device) -> Columns:
    """(P,) float32 of every column without a gap."""
    names = [name for name in rows[0].columns if name not in gaps]
    return Columns({k: torch.tensor([float(row.columns[k]) for row in rows], device=device) for k in names}, gaps)


def column_gaps(rows: Rows) -> dict[str, str]:
    """Of each column that is not a number in every row: what the first such row has in its place."""
    gaps = {}
    for name in dict.fromkeys(name for row in rows for name in row.columns):
        other = next((row for row in rows if not isinstance(row.columns.get(name), int | float)), None)
        if other is not None:
            gaps[name] = f"{other.origin} has {repr(other.columns[name]) if name in other.columns else 'none'}"
    return gaps
