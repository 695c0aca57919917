"""Log-probs that are known already, as a loss takes them: from the ledger of a run, or from arrays of one's own."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phi2.data.records import PAIR
from phi2.losses.batch import AnswerBatch, Columns, Comparison, PairBatch, comparisons
from phi2.losses.knobs import nearest
from phi2.losses.registry import EXTRAS
from phi2.runs.ledger import COLUMN, LOGPS, MISMATCHED, SIDES, Evaluation

MASKS, LENGTHS = (tuple(f"{side}_{what}" for side in SIDES) for what in ("mask", "length"))
ARRAYS = (*LOGPS, *MASKS, *LENGTHS, "columns")
GOLDS = ("policy_gold_logps", "ref_gold_logps")
CLOSE = 1e-4  # by how much of the largest value the rounding of a sum may move a loss

Logps = Mapping[str, Sequence[Tensor]]  # by the names of a ledger, of each comparison (T,) numbers without padding
Scores = Sequence[Sequence[float]]  # of the answers to each prompt


def answers_of(tokens: Logps, columns: Columns, scores: Scores) -> AnswerBatch:
    """Answers as a loss takes them, padded as a run pads them, so that sums are rounded alike."""
    compared, has_reference = comparisons(scores), "ref_chosen_logps" in tokens
    policy = _each_once(tokens, "policy_{}_logps", compared)
    extras = [name for name in EXTRAS if f"{name}_chosen" in tokens]
    return AnswerBatch(
        pad_sequence(policy, batch_first=True),
        lengths=tuple(map(len, policy)),
        prompts=tuple(prompt for prompt, each in enumerate(scores) for _ in each),
        scores=tuple(score for each in scores for score in each),
        ref_logps=_padded(tokens, "ref_{}_logps", compared) if has_reference else None,
        columns=columns,
        extras={name: _padded(tokens, f"{name}_{{}}", compared) for name in extras},
    )


def _padded(tokens: Logps, name: str, compared: Sequence[Comparison]) -> Tensor:
    return pad_sequence(_each_once(tokens, name, compared), batch_first=True)


def _each_once(tokens: Logps, name: str, compared: Sequence[Comparison]) -> list[Tensor]:
    """Of all answers in their order what stands in any of their comparisons, under a name for each side."""
    found: dict[int | None, Tensor] = {}
    for side, places in zip(SIDES, zip(*compared, strict=True), strict=True):
        found |= dict(zip(places, tokens[name.format(side)], strict=True))
    return [found[place] for place in sorted(place for place in found if place is not None)]


def first_of(answers: AnswerBatch, prompts: int) -> AnswerBatch:
    """The answers to the first few prompts; those behind other prompts are of the update, and stay."""
    count = bisect_left(answers.prompts, prompts)
    return replace(
        answers,
        policy_logps=answers.policy_logps[:count],
        ref_logps=None if answers.ref_logps is None else answers.ref_logps[:count],
        lengths=answers.lengths[:count],
        prompts=answers.prompts[:count],
        scores=answers.scores[:count],
        columns=answers.columns.each(itemgetter(slice(prompts))),
        gold=None if answers.gold is None else first_of(answers.gold, prompts),
        extras={name: values[:count] for name, values in answers.extras.items()},
    )


# ---- of a run ----


def answers_of_evaluation(found: Evaluation) -> AnswerBatch:
    """The answers of an evaluation as its run gave them to its loss."""
    scores = found.about.get("scores") or [PAIR] * len(found)
    firsts = [*accumulate((len(comparisons([each])) for each in scores), initial=0)][:-1]
    columns, gold = columns_of(found).each(itemgetter(firsts)), _gold_in(found, firsts)
    answers = replace(_answers_in(found, "", scores), columns=columns, gold=gold)
    if any(f"{MISMATCHED}policy_{side}_logps" in found for side in SIDES):
        neighbours = [*scores[-1:], *scores[:-1]]  # each prompt has the answers of the one before it
        answers = replace(answers, mismatched=_answers_in(found, MISMATCHED, neighbours))
    return answers


def _answers_in(found: Evaluation, prefix: str, scores: Scores) -> AnswerBatch:
    """Those under the names of columns that begin so."""
    kinds = ("policy_{}_logps", "ref_{}_logps", *(f"{name}_{{}}" for name in EXTRAS))
    there = [kind for kind in kinds if any(prefix + kind.format(side) in found for side in SIDES)]
    names = [kind.format(side) for kind in there for side in SIDES]
    return answers_of({name: _tokens_of(found, prefix + name) for name in names}, Columns(), scores)


def _gold_in(found: Evaluation, firsts: Sequence[int]) -> AnswerBatch | None:
    """The answers to imitate, where there are any.

    Args:
        firsts: a row of each prompt.
    """
    each = [_tokens_of(found, name) for name in GOLDS if name in found]
    if not each:
        return None
    policy, *ref = ([tokens[row] for row in firsts] for tokens in each)
    return AnswerBatch(
        pad_sequence(policy, batch_first=True),
        lengths=tuple(map(len, policy)),
        prompts=tuple(range(len(firsts))),
        scores=(1.0,) * len(firsts),
        ref_logps=pad_sequence(ref[0], batch_first=True) if ref else None,
    )


def _tokens_of(found: Evaluation, name: str) -> list[Tensor]:
    values, lengths = found.tokens(name)
    return list(torch.from_numpy(values.copy()).split(lengths.tolist()))


def columns_of(found: Evaluation) -> Columns:
    """The columns of the data that are a number in every row."""
    numbers, gaps = {}, {}
    for name in found.columns:
        values = found[f"{COLUMN}{name}"]
        bad = [i for i, value in enumerate(values) if not isinstance(value, float) or value != value]
        if bad:
            value = values[bad[0]]
            gaps[name] = f"{found.origins[bad[0]]} has {repr(value) if isinstance(value, str) else 'none'}"
        else:
            numbers[name] = torch.from_numpy(values.astype(np.float32))
    return Columns(numbers, gaps)


# ---- of arrays ----


def answers_of_arrays(given: Any) -> AnswerBatch:
    """Pairs of numpy or torch arrays by the names of a PairBatch.

    Args:
        given: PairBatch, mapping or namespace. Log-probs are (B,) sums, or (B, T) with masks or lengths. A sum stands
            at the first token of its answer, which has one token where no length is given.
    Raises:
        ValueError: for what is no such thing, an unknown or missing name, and shapes that do not go together.
    """
    arrays = _named(given)
    size = len(arrays["policy_chosen_logps"]) if arrays["policy_chosen_logps"].ndim else 0
    masks = {side: _mask(arrays, side, size) for side in SIDES}
    tokens = {name: _answers_of(name, arrays, masks) for name in LOGPS if name in arrays}
    if not isinstance(arrays.setdefault("columns", {}), Mapping):
        raise ValueError(f"columns must be a mapping of (B,) arrays by name, got {type(arrays['columns']).__name__}")
    columns = {f"columns[{name!r}]": name for name in arrays["columns"]}
    found = {name: _array(told, arrays["columns"][name]) for told, name in columns.items()}
    for told, name in columns.items():
        _require_shape(told, found[name], (size,))
    return answers_of(tokens, Columns({name: values.float() for name, values in found.items()}), [PAIR] * size)


def _named(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) and not hasattr(given, LOGPS[0]):
        what = "a PairBatch, a mapping or namespace of arrays, or the path of a run"
        raise ValueError(f"logps must be {what}, got {type(given).__name__}")
    if isinstance(given, PairBatch):
        named = {name: getattr(given, name) for name in ARRAYS if name not in LENGTHS}
    else:
        named = dict(given if isinstance(given, Mapping) else vars(given))
    for name in named:
        if name not in ARRAYS:
            raise ValueError(f"logps may hold {', '.join(ARRAYS)}, got {name!r}{nearest(str(name), ARRAYS)}")
    named = {name: value for name, value in named.items() if value is not None}
    for both in (LOGPS[:2], LOGPS[2:]):
        missing = [name for name in both if name not in named]
        if missing and (both == LOGPS[:2] or len(missing) == 1):
            raise ValueError(f"logps needs {' and '.join(missing)}")
    return {name: value if name == "columns" else _array(name, value) for name, value in named.items()}


def _array(name: str, value: Any) -> Tensor:
    try:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers, got {type(value).__name__}") from error
    if tensor.is_complex() or (name in LOGPS and tensor.dtype == torch.bool):
        raise ValueError(f"{name} must be an array of numbers, got {tensor.dtype}")
    return tensor.float() if name in LOGPS and tensor.dtype != torch.float64 else tensor


def _mask(arrays: Mapping[str, Any], side: str, size: int) -> Tensor:
    """(B, T) which tokens belong to the answer; of sums, T is that of the longest answer, or 1."""
    policy, mask, length = (arrays.get(name) for name in (f"policy_{side}_logps", f"{side}_mask", f"{side}_length"))
    assert policy is not None
    if policy.ndim not in (1, 2) or len(policy) != size or not size:
        shape = f"({size or 'B'},) or ({size or 'B'}, T)"
        raise ValueError(f"policy_{side}_logps must have shape {shape}, got {tuple(policy.shape)}")
    if mask is not None and length is not None:
        raise ValueError(f"give {side}_mask or {side}_length, not both")
    if mask is not None:
        _require_shape(f"{side}_mask", mask, tuple(policy.shape) if policy.ndim == 2 else (size, "T"))
        if ((mask != 0) & (mask != 1)).any():
            raise ValueError(f"{side}_mask must hold 0 and 1, or false and true, alone")
        return mask.bool()
    if length is None and policy.ndim == 2:
        raise ValueError(f"policy_{side}_logps is token by token: give {side}_mask or {side}_length")
    if length is None:
        return torch.ones(size, 1, dtype=torch.bool)
    _require_shape(f"{side}_length", length, (size,))
    longest = policy.shape[1] if policy.ndim == 2 else math.inf
    bad = length[(length < 1) | (length > longest) | (length != length.floor())]
    if len(bad):
        where = f"in [1, {longest}]" if policy.ndim == 2 else "from 1 on"
        raise ValueError(f"{side}_length must be whole numbers {where}, got {bad[0].item():g}")
    longest = policy.shape[1] if policy.ndim == 2 else int(length.max())
    return torch.arange(longest) < length[:, None]


def _answers_of(name: str, arrays: Mapping[str, Any], masks: Mapping[str, Tensor]) -> list[Tensor]:
    """Of each pair the log-probs of one of its answers."""
    side, values = "chosen" if "chosen" in name else "rejected", arrays[name]
    mask = masks[side]
    _require_shape(name, values, tuple(arrays[f"policy_{side}_logps"].shape))
    if values.ndim == 1:
        first = torch.arange(mask.shape[1]) == mask.int().argmax(dim=1, keepdim=True)
        values = values[:, None] * first
    bad = (~values.isfinite() & mask).any(dim=1).nonzero()
    if len(bad):
        raise ValueError(f"{name} must be finite, but row {int(bad[0])} is not (counted from 0)")
    return [row[kept] for row, kept in zip(values, mask, strict=True)]


def _require_shape(name: str, values: Tensor, shape: tuple[int | str, ...]) -> None:
    """`shape` has a letter where any number will do."""
    found = tuple(values.shape)
    if len(found) != len(shape) or any(n not in (m, "T") for n, m in zip(shape, found, strict=True)):
        wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        raise ValueError(f"{name} must have shape {wanted}, got {found}")


def knows_lengths(given: Any) -> bool:
    """Whether arrays tell how many tokens the answers have."""
    arrays = _named(given)
    return all(
        arrays[f"policy_{side}_logps"].ndim == 2 or f"{side}_mask" in arrays or f"{side}_length" in arrays
        for side in SIDES
    )


def require_known(name: str, losses_of: Callable[[AnswerBatch], Tensor], answers: AnswerBatch, given: Any) -> None:
    """Refuses a loss that reads more of the pairs than was given: single tokens, or lengths.

    Args:
        name: of the loss.
        losses_of: its values, and all that is added to it.
        given: what `answers` were made of.
    Raises:
        ValueError: naming what it reads.
    """
    arrays = _named(given)
    for place, side in enumerate(SIDES):
        if arrays[f"policy_{side}_logps"].ndim == 2:
            continue
        known = answers
        if f"{side}_mask" not in arrays and f"{side}_length" not in arrays:
            known = _changed(answers, place, _lengthened)
            _require_alike(name, losses_of, answers, known, f"{side}_length")
        other = _changed(known, place, _spread, models=("policy",))
        _require_alike(name, losses_of, known, other, f"(B, T) log-probs of {side} answers")


def _require_alike(
    name: str, losses_of: Callable[[AnswerBatch], Tensor], one: AnswerBatch, other: AnswerBatch, lacks: str
) -> None:
    values, others = losses_of(one), losses_of(other)
    most = CLOSE * float(values.nan_to_num().abs().max())
    if not torch.allclose(values, others, rtol=CLOSE, atol=most, equal_nan=True):
        raise ValueError(f"loss {name!r} reads more than the sum of an answer: give {lacks}")


def _changed(
    answers: AnswerBatch,
    place: int,
    change: Callable[[Tensor], Tensor],
    models: Sequence[str] = ("policy", "ref"),
) -> AnswerBatch:
    """Every second answer with its tokens changed, as these models have them."""
    of_models = {"policy": answers.policy_logps} | ({} if answers.ref_logps is None else {"ref": answers.ref_logps})
    each = {m: [row[:n] for row, n in zip(logps, answers.lengths, strict=True)] for m, logps in of_models.items()}
    tokens = {
        f"{model}_{side}_logps": [change(row) if i == place and model in models else row for row in rows[i::2]]
        for model, rows in each.items()
        for i, side in enumerate(SIDES)
    }
    return answers_of(tokens, answers.columns, [PAIR] * answers.count)


def _spread(logps: Tensor) -> Tensor:
    """The same sum in equal parts."""
    return logps.mean().expand(len(logps))


def _lengthened(logps: Tensor) -> Tensor:
    """The same sum of twice as many tokens."""
    return torch.cat((logps, torch.zeros_like(logps)))
