"""From encoded answers to the log-probabilities of their tokens, and on to what a loss looks at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phi2.data.encoded import EncodedPreference
from phi2.losses.batch import AnswerBatch, Columns
from phi2.losses.head import target_logps
from phi2.losses.registry import Need
from phi2.model import Phi2ForCausalLM
from phi2.training.extras import Asked, AskedReference, kl_to_policy, token_statistics
from phi2.training.packing import TokenRow, row_of_answers
from phi2.training.passes import Cut
from phi2.training.reference_cache import Reference

Rows = Sequence[EncodedPreference]


class Scored(NamedTuple):
    """What one pass gives for its N tokens of answers.

    Attributes:
        policy, ref: (N,) float32 log-probabilities; ref is None without a reference.
        extras: by name (N,) float32 of what the loss needs besides.
    """

    policy: Tensor
    ref: Tensor | None
    extras: dict[str, Tensor]


def score_answers(
    model: Phi2ForCausalLM,
    rows: Rows,
    cut: Cut,
    reference: Reference | None,
    precision: Callable[[], AbstractContextManager],
    needs: Sequence[Need] = (),
) -> AnswerBatch:
    """Both models' log-probabilities of all answers of some rows, as a loss takes them, with what else it needs."""
    passes = cut([row.tokens for row in rows])
    parts = [scored(model, rows, places, reference, precision(), needs) for places in passes]
    return answer_batch(rows, joined(rows, passes, parts))


def joined(rows: Rows, passes: Sequence[Sequence[int]], parts: Sequence[Scored]) -> Scored:
    """What the passes give, (N,) values of all rows in their order."""
    refs = [part.ref for part in parts if part.ref is not None]
    return Scored(
        _in_order(rows, passes, [part.policy for part in parts]),
        _in_order(rows, passes, refs) if refs else None,
        {name: _in_order(rows, passes, [part.extras[name] for part in parts]) for name in parts[0].extras},
    )


def _in_order(rows: Rows, passes: Sequence[Sequence[int]], parts: Sequence[Tensor]) -> Tensor:
    found: dict[int, Tensor] = {}
    for places, part in zip(passes, parts, strict=True):
        found.update(zip(places, part.split([rows[i].target_tokens for i in places]), strict=True))
    return torch.cat([found[i] for i in range(len(rows))])


def apart(rows: Rows, passes: Sequence[Sequence[int]], values: Tensor) -> list[Tensor]:
    """(N,) values of all rows, pass by pass."""
    found = values.split([row.target_tokens for row in rows])
    return [torch.cat([found[i] for i in each]) for each in passes]


def scored(
    model: Phi2ForCausalLM,
    rows: Rows,
    places: Sequence[int],
    reference: Reference | None,
    precision: AbstractContextManager,
    needs: Sequence[Need] = (),
) -> Scored:
    """One pass of the policy, and one of the reference where there is one.

    Args:
        places: of the rows that the pass holds.
    """
    batch = [rows[i] for i in places]
    row = row_of_answers(batch).to(model.device)
    with precision:
        if "kl" in needs:
            assert isinstance(reference, AskedReference)  # a run with another one is refused
            return _with_kl(model, row, reference.asked, needs)
        ref = None if reference is None else reference(batch, row)
        hidden = hidden_states(model, row)
        return Scored(logps_of(model, hidden, row), ref, token_statistics(model, hidden, row, needs))


def _with_kl(model: Phi2ForCausalLM, row: TokenRow, asked: Asked, needs: Sequence[Need]) -> Scored:
    with torch.no_grad(), asked() as reference:
        ref_hidden = hidden_states(reference, row)
        ref = logps_of(reference, ref_hidden, row)
    hidden = hidden_states(model, row)
    extras = token_statistics(model, hidden, row, needs) | {"kl": kl_to_policy(model, hidden, row, asked, ref_hidden)}
    return Scored(logps_of(model, hidden, row), ref, extras)


def row_logps(model: Phi2ForCausalLM, row: TokenRow) -> Tensor:
    """(N,) log-probabilities of a row's targets."""
    return logps_of(model, hidden_states(model, row), row)


def hidden_states(model: Phi2ForCausalLM, row: TokenRow) -> Tensor:
    """(1, T, C)."""
    return model.model(row.input_ids, positions=row.positions, visible_until=row.visible_until)


def logps_of(model: Phi2ForCausalLM, hidden: Tensor, row: TokenRow) -> Tensor:
    return target_logps(model, hidden, row.logits_indices, row.targets)[0]


def mismatched(window: Rows, max_length: int | None) -> list[EncodedPreference]:
    """Each prompt of a window with the answers of the row before it; the first has those of the last.

    A window of one row, the rest of an epoch, has nothing else than its own answers.

    Args:
        max_length: tokens of a prompt with an answer, which is cut to it.
    Source: arXiv:2402.01306 §4.1, where micro-batches take the place of windows.
    """
    neighbours = [*window[-1:], *window[:-1]]
    return [_behind(row, other, max_length) for row, other in zip(window, neighbours, strict=True)]


def _behind(row: EncodedPreference, other: EncodedPreference, max_length: int | None) -> EncodedPreference:
    """A prompt with the answers of another row."""
    room = None if max_length is None else max_length - len(row.prompt)
    answers = tuple(answer[:room] for answer in other.answers)
    return replace(row, answers=answers, scores=other.scores, has_gold=other.has_gold)


def answer_batch(rows: Rows, scores: Scored) -> AnswerBatch:
    """The (N,) values of `row_of_answers`, answer by answer, padded with zeros.

    Args:
        rows: P prompts with their answers.
    """
    lengths = [len(answer) for row in rows for answer in row.answers]
    prompts = [prompt for prompt, row in enumerate(rows) for _ in row.answers]
    judged = [score for row in rows for score in row.scores]
    columns = numeric_columns(rows, column_gaps(rows), scores.policy.device)
    golds = {i for i, last in enumerate(_last_of(prompts)) if last and rows[prompts[i]].has_gold}

    def batch(places: Sequence[int], columns: Columns) -> AnswerBatch:
        return AnswerBatch(
            _padded(scores.policy, lengths, places),
            tuple(lengths[i] for i in places),
            tuple(prompts[i] for i in places),
            tuple(judged[i] for i in places),
            None if scores.ref is None else _padded(scores.ref, lengths, places),
            columns,
            extras={name: _padded(values, lengths, places) for name, values in scores.extras.items()},
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
    values = {name: torch.tensor([float(row.columns[name]) for row in rows]) for name in names}
    return Columns({name: each.to(device, non_blocking=True) for name, each in values.items()}, gaps)


def column_gaps(rows: Rows) -> dict[str, str]:
    """Of each column that is not a number in every row: what the first such row has in its place."""
    gaps = {}
    for name in dict.fromkeys(name for row in rows for name in row.columns):
        other = next((row for row in rows if not isinstance(row.columns.get(name), int | float)), None)
        if other is not None:
            gaps[name] = f"{other.origin} has {repr(other.columns[name]) if name in other.columns else 'none'}"
    return gaps
