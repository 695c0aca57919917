"""What an evaluation of a preference run writes into its ledger (`phi2/runs/ledger.py`): a row for each pair."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import torch
from torch import Tensor

from phi2.data.encode import EncodedPreference
from phi2.losses.batch import PairBatch
from phi2.losses.bound import BoundLoss
from phi2.losses.slopes import Slopes
from phi2.runs.ledger import (
    COLUMN,
    FIRST_TOKENS,
    LOGPS,
    SIDES,
    drop_behind,
    file_of,
    ledger_files,
    read_table,
    write_evaluation,
)
from phi2.tokenizer import Tokenizer
from phi2.training.config import DPOConfig
from phi2.training.metrics import pair_metrics
from phi2.training.reference_cache import answer_keys

NUMBERS = pyarrow.float32()


class Found(NamedTuple):
    """What an evaluation found of B pairs: their log-probs, and values and slopes of the loss."""

    pairs: PairBatch
    slopes: Slopes


class LedgerWriter:
    """Writes the ledger of a run.

    Args:
        config: of the run, with all knobs of its loss.
        pairs: that it evaluates.
    """

    def __init__(
        self, config: DPOConfig, loss: BoundLoss, tokenizer: Tokenizer, pairs: Sequence[EncodedPreference]
    ) -> None:
        self.run, self.config, self.loss = Path(config.output), config, loss
        self.tokenizer, self.pairs = tokenizer, pairs
        files = [*ledger_files(self.run).values()]
        first = pyarrow.nulls(len(pairs), pyarrow.bool_())
        self.was_correct = read_table(files[-1], ["correct"])["correct"] if files else first

    def write(self, step: int, found: Sequence[Found], state: Mapping[str, float]) -> None:
        """Adds an evaluation.

        Args:
            found: of the pairs in their order, micro-batch by micro-batch.
            state: of the loss.
        """
        config = self.config
        about: dict[str, Any] = {"step": step, "loss": config.loss, "knobs": config.knobs, "state": dict(state)}
        about |= {"nll_weight": config.nll_weight, "batch_size": config.per_device_train_batch_size}
        steps = np.full(len(self.pairs), step, dtype=np.int32)
        numbers = {**numbers_of(found, self.loss.reward_scale), "was_correct": self.was_correct}
        columns = {"step": steps, **self.names, **numbers, **self.rows, **tokens_of(found)}
        write_evaluation(file_of(self.run, step), about, columns)
        self.was_correct = numbers["correct"]

    @cached_property
    def names(self) -> dict[str, Any]:
        """Which pairs they are."""
        return {
            "pair": [name_of(pair) for pair in self.pairs],
            "file": [pair.origin.file for pair in self.pairs],
            "row": np.array([pair.origin.row for pair in self.pairs], dtype=np.int64),
        }

    @cached_property
    def rows(self) -> dict[str, Any]:
        """The columns of the data, and the texts with their special tokens."""
        names = dict.fromkeys(name for pair in self.pairs for name in pair.columns)
        columns = {f"{COLUMN}{name}": plain([pair.columns.get(name) for pair in self.pairs]) for name in names}
        texts = {part: [self._text(getattr(pair, part)) for pair in self.pairs] for part in ("prompt", *SIDES)}
        return columns | texts

    def _text(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def ledger_of(
    config: DPOConfig, loss: BoundLoss, tokenizer: Tokenizer, rows: Sequence[EncodedPreference], done: int
) -> LedgerWriter | None:
    """What writes the ledger of a run, None where it keeps none: of other rows than pairs, which is told.

    Args:
        done: updates done already; what was written behind them is dropped.
    """
    drop_behind(Path(config.output), done)
    if not rows or not config.ledger:
        return None
    other = next((row for row in rows if row.scores[: len(row.scores) - row.has_gold] != (1.0, 0.0)), None)
    if other is not None:
        print(f"no ledger is kept: it has a row for each pair, and {other.origin} is none")
        return None
    return LedgerWriter(config, loss, tokenizer, rows)


def name_of(row: EncodedPreference) -> str:
    """A row by the tokens of its prompt and of the answers that are compared."""
    compared = answer_keys([row])[: len(row.answers) - row.has_gold]
    return hashlib.sha256(b"".join(compared)).hexdigest()[:16]


def plain(values: list[float | str | None]) -> pyarrow.Array:
    """Numbers, or where one of them is none, texts."""
    if all(isinstance(value, int | float | None) for value in values):
        return pyarrow.array(values, pyarrow.float64())
    return pyarrow.array([None if value is None else str(value) for value in values])


def numbers_of(found: Sequence[Found], reward_scale: float) -> dict[str, Any]:
    """(pairs,) of everything that is one number a pair."""
    parts = [_numbers(each, reward_scale) for each in found]
    numbers = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    weight = np.abs(numbers["d_w"]) + np.abs(numbers["d_l"])
    missing = {name: pyarrow.nulls(len(weight), NUMBERS) for name in ("r_w", "r_l") if name not in numbers}
    return numbers | {"weight": weight / (weight.mean() or 1)} | missing


@torch.no_grad()
def _numbers(found: Found, reward_scale: float) -> dict[str, Tensor]:
    pairs, slopes = found
    chosen, rejected, reference = pairs.policy_chosen_logps, pairs.policy_rejected_logps, {}
    margin = pairs.policy_chosen - pairs.policy_rejected
    if pairs.ref_chosen_logps is not None and pairs.ref_rejected_logps is not None:
        chosen, rejected = chosen - pairs.ref_chosen_logps, rejected - pairs.ref_rejected_logps
        margin, reference = pairs.margin, {"r_w": pairs.ref_chosen, "r_l": pairs.ref_rejected}
    return {
        **{"s_w": pairs.policy_chosen, "s_l": pairs.policy_rejected, **reference},
        **{"n_w": pairs.chosen_mask.sum(dim=-1).int(), "n_l": pairs.rejected_mask.sum(dim=-1).int()},
        "margin": margin,
        "margin_first": chosen[:, :FIRST_TOKENS].sum(dim=-1) - rejected[:, :FIRST_TOKENS].sum(dim=-1),
        "margin_last": last_of(chosen, pairs.chosen_length) - last_of(rejected, pairs.rejected_length),
        **{"loss": slopes.values, "d_w": slopes.d_w, "d_l": slopes.d_l},
        "correct": pair_metrics(pairs, reward_scale)["rewards/accuracies"] > 0,
    }


def last_of(values: Tensor, length: Tensor) -> Tensor:
    """(B,) of each row of (B, T) the last of its first `length` values."""
    return values.gather(1, length[:, None] - 1)[:, 0]


def tokens_of(found: Sequence[Found]) -> dict[str, pyarrow.Array]:
    """Log-probs token by token: lists without padding, one a pair."""
    masks = {side: [getattr(each.pairs, f"{side}_mask") for each in found] for side in SIDES}
    return {
        name: _lists([getattr(each.pairs, name) for each in found], masks[side])
        for name, side in zip(LOGPS, 2 * SIDES, strict=True)
    }


def _lists(values: list[Tensor | None], masks: list[Tensor]) -> pyarrow.Array:
    known = [value for value in values if value is not None]
    if not known:
        return pyarrow.nulls(sum(map(len, masks)), pyarrow.list_(NUMBERS))
    flat = torch.cat([value[mask] for value, mask in zip(known, masks, strict=True)])  # (N,)
    ends = torch.cat([mask.sum(dim=-1) for mask in masks]).cumsum(dim=0)
    starts_and_end = np.concatenate(([0], ends.cpu().numpy())).astype(np.int32)
    return pyarrow.ListArray.from_arrays(starts_and_end, flat.cpu().numpy())
