"""Log-probs that are known already, as a loss takes them: from the ledger of a run, or from arrays of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from phi2.losses.batch import Columns, PairBatch
from phi2.losses.bound import BoundLoss
from phi2.losses.knobs import nearest
from phi2.runs.ledger import COLUMN, SIDES, Evaluation

LENGTHS = tuple(f"{side}_length" for side in SIDES)
ARRAYS = (*(field.name for field in fields(PairBatch) if field.name != "score"), *LENGTHS)
CLOSE = 1e-4  # by how much of the largest value the rounding of a sum may move a loss


# ---- of a run ----


def batches_of(found: Evaluation, whole: bool) -> list[PairBatch]:
    """The pairs of an evaluation as its run saw them: in its micro-batches, or all at once.

    With their padding, so that sums are rounded as they were.
    """
    size = len(found) if whole else found.about["batch_size"]
    starts = range(0, len(found), size)
    tokens = {name: _tokens_of(found, name) for name in _names_of_logps(found)}
    columns = columns_of(found)
    return [_batch({k: v[i : i + size] for k, v in tokens.items()}, columns, slice(i, i + size)) for i in starts]


def _names_of_logps(found: Evaluation) -> list[str]:
    names = [f"{model}_{side}_logps" for model in ("policy", "ref") for side in SIDES]
    return [name for name in names if name in found]


def _tokens_of(found: Evaluation, name: str) -> list[Tensor]:
    values, lengths = found.tokens(name)
    return list(torch.from_numpy(values.copy()).split(lengths.tolist()))


def _batch(tokens: Mapping[str, list[Tensor]], columns: Columns, rows: slice) -> PairBatch:
    parts: dict[str, Any] = {name: pad_sequence(values, batch_first=True) for name, values in tokens.items()}
    for side in SIDES:
        ones = [torch.ones(len(values), dtype=torch.bool) for values in tokens[f"policy_{side}_logps"]]
        parts[f"{side}_mask"] = pad_sequence(ones, batch_first=True)
    return PairBatch(**parts, columns=columns.each(lambda values: values[rows]))


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


def pairs_of_arrays(given: Any) -> PairBatch:
    """A PairBatch of numpy or torch arrays by the names of its fields.

    Args:
        given: mapping or namespace. Log-probs are (B,) sums, or (B, T) with masks or lengths.
    Raises:
        ValueError: for what is no such thing, an unknown or missing name, and shapes that do not go together.
    """
    arrays = _named(given)
    size = len(arrays["policy_chosen_logps"]) if arrays["policy_chosen_logps"].ndim else 0
    parts: dict[str, Any] = {}
    for side in SIDES:
        parts |= _side(arrays, side, size)
    columns = {name: _array(f"columns[{name!r}]", values) for name, values in (arrays.get("columns") or {}).items()}
    for name, values in columns.items():
        _require_shape(f"columns[{name!r}]", values, (size,))
    return PairBatch(**parts, columns=Columns({name: values.float() for name, values in columns.items()}))


def _named(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping) and not hasattr(given, "__dict__"):
        what = "a PairBatch, a mapping or namespace of arrays, or the path of a run"
        raise ValueError(f"logps must be {what}, got {type(given).__name__}")
    named = {name: value for name, value in (given if isinstance(given, Mapping) else vars(given)).items()}
    named = {name: value for name, value in named.items() if value is not None}
    for name in named:
        if name not in ARRAYS:
            raise ValueError(f"logps may hold {', '.join(ARRAYS)}, got {name!r}{nearest(str(name), ARRAYS)}")
    for model in ("policy", "ref"):
        both = [f"{model}_{side}_logps" for side in SIDES]
        missing = [name for name in both if name not in named]
        if missing and (model == "policy" or len(missing) == 1):
            raise ValueError(f"logps needs {' and '.join(missing)}")
    return {name: value if name == "columns" else _array(name, value) for name, value in named.items()}


def _array(name: str, value: Any) -> Tensor:
    try:
        tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of numbers, got {type(value).__name__}") from error
    if name.endswith("_logps"):
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor


def _side(arrays: Mapping[str, Any], side: str, size: int) -> dict[str, Tensor]:
    """The log-probs of one answer of each pair, by both models, and its mask."""
    policy, ref = arrays[f"policy_{side}_logps"], arrays.get(f"ref_{side}_logps")
    if policy.ndim not in (1, 2) or len(policy) != size or not size:
        shape = f"({size or 'B'},) or ({size or 'B'}, T)"
        raise ValueError(f"policy_{side}_logps must have shape {shape}, got {tuple(policy.shape)}")
    if ref is not None:
        _require_shape(f"ref_{side}_logps", ref, tuple(policy.shape))
    mask = _mask(arrays, side, policy)
    logps = {f"policy_{side}_logps": policy} | ({} if ref is None else {f"ref_{side}_logps": ref})
    return {f"{side}_mask": mask} | {name: _padded(name, values, mask) for name, values in logps.items()}


def _mask(arrays: Mapping[str, Any], side: str, policy: Tensor) -> Tensor:
    """(B, T); of sums, T is the length of the longest answer where lengths are given, else 1."""
    mask, length = arrays.get(f"{side}_mask"), arrays.get(f"{side}_length")
    if mask is not None and length is not None:
        raise ValueError(f"give {side}_mask or {side}_length, not both")
    if mask is not None:
        _require_shape(f"{side}_mask", mask, tuple(policy.shape) if policy.ndim == 2 else (len(policy), "T"))
        return mask.bool()
    if length is None:
        if policy.ndim == 2:
            raise ValueError(f"policy_{side}_logps is token by token: give {side}_mask or {side}_length")
        return torch.ones(len(policy), 1, dtype=torch.bool)
    _require_shape(f"{side}_length", length, (len(policy),))
    longest = policy.shape[1] if policy.ndim == 2 else int(length.max())
    if int(length.min()) < 1 or int(length.max()) > longest:
        raise ValueError(f"{side}_length must be in [1, {longest}], got {int(length.min())} to {int(length.max())}")
    return torch.arange(longest) < length[:, None]


def _padded(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """(B, T), 0 where the mask is False; a sum stands at the first token."""
    if values.ndim == 1:
        first = mask & (mask.cumsum(dim=1) == 1)
        values = values[:, None].expand(mask.shape).where(first, 0.0)
    values = values.where(mask, 0.0)
    bad = (~values.isfinite()).any(dim=1).nonzero()
    if len(bad):
        raise ValueError(f"{name} must be finite, but row {int(bad[0])} is not (counted from 0)")
    return values


def _require_shape(name: str, values: Tensor, shape: tuple[int | str, ...]) -> None:
    """`shape` has a letter where any number will do."""
    found = tuple(values.shape)
    if len(found) != len(shape) or any(n not in (m, "T") for n, m in zip(shape, found, strict=True)):
        wanted = f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"
        raise ValueError(f"{name} must have shape {wanted}, got {found}")


def require_known(loss: BoundLoss, pairs: PairBatch, given: Any) -> None:
    """Refuses a loss that reads more of the pairs than was given: single tokens, or lengths.

    Args:
        given: what `pairs` were made of.
    Raises:
        ValueError: naming what it reads.
    """
    arrays = _named(given)
    for side in SIDES:
        if arrays[f"policy_{side}_logps"].ndim == 2:
            continue
        has_length = f"{side}_mask" in arrays or f"{side}_length" in arrays
        if not _is_same(loss, pairs, _spread(pairs, side) if has_length else _longer(pairs, side)):
            lacks = f"(B, T) log-probs of {side} answers" if has_length else f"{side}_length"
            raise ValueError(f"loss {loss.name!r} reads more than the sum of an answer: give {lacks}")


def _is_same(loss: BoundLoss, pairs: PairBatch, other: PairBatch) -> bool:
    values, others = loss(pairs), loss(other)
    return torch.allclose(values, others, rtol=CLOSE, atol=CLOSE * float(values.abs().max()), equal_nan=True)


def _spread(pairs: PairBatch, side: str) -> PairBatch:
    """The sum of an answer in equal parts on its tokens."""
    mask = getattr(pairs, f"{side}_mask")
    share = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
    names = [f"{model}_{side}_logps" for model in ("policy", "ref")]
    values = {name: getattr(pairs, name) for name in names}
    spread: dict[str, Any] = {k: v.sum(dim=1, keepdim=True) * share for k, v in values.items() if v is not None}
    return replace(pairs, **spread)


def _longer(pairs: PairBatch, side: str) -> PairBatch:
    """The same sums of answers of two tokens."""
    names = [f"{model}_{side}_logps" for model in ("policy", "ref")]
    values = {name: getattr(pairs, name) for name in names}
    longer: dict[str, Any] = {k: torch.nn.functional.pad(v, (0, 1)) for k, v in values.items() if v is not None}
    longer[f"{side}_mask"] = torch.ones(len(pairs.chosen_mask), 2, dtype=torch.bool)
    return replace(pairs, **longer)
