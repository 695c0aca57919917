"""What an evaluation of a preference run writes into its ledger (`phi2/runs/ledger.py`): a row for each pair."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from torch import Tensor

from phi2.data.encoded import EncodedPreference
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

    def write(self, step: int, pairs: PairBatch, slopes: Slopes, state: Mapping[str, float]) -> None:
        """Adds an evaluation.

        Args:
            pairs: what was found of them, in their order.
            slopes: and what the loss makes of it.
            state: of the loss.
        """
        config = self.config
        about: dict[str, Any] = {"step": step, "loss": config.loss, "knobs": config.knobs, "state": dict(state)}
        about |= {"nll_weight": config.nll_weight}
        numbers = numbers_of(pairs, slopes, self.loss.reward_scale) | {"was_correct": self.was_correct}
        steps = np.full(len(self.pairs), step, dtype=np.int32)
        columns = {"step": steps, **self.names, **numbers, **self.rows, **tokens_of(pairs)}
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


@torch.no_grad()
def numbers_of(pairs: PairBatch, slopes: Slopes, reward_scale: float) -> dict[str, Any]:
    """(B,) of everything that is one number a pair."""
    chosen, rejected, reference = pairs.policy_chosen_logps, pairs.policy_rejected_logps, {}
    margin = pairs.policy_chosen - pairs.policy_rejected
    if pairs.ref_chosen_logps is not None and pairs.ref_rejected_logps is not None:
        chosen, rejected = chosen - pairs.ref_chosen_logps, rejected - pairs.ref_rejected_logps
        margin, reference = pairs.margin, {"r_w": pairs.ref_chosen, "r_l": pairs.ref_rejected}
    weight = slopes.d_w.abs() + slopes.d_l.abs()
    numbers = {
        **{"s_w": pairs.policy_chosen, "s_l": pairs.policy_rejected, **reference},
        **{"n_w": pairs.chosen_mask.sum(dim=-1).int(), "n_l": pairs.rejected_mask.sum(dim=-1).int()},
        "margin": margin,
        "margin_first": chosen[:, :FIRST_TOKENS].sum(dim=-1) - rejected[:, :FIRST_TOKENS].sum(dim=-1),
        "margin_last": last_of(chosen, pairs.chosen_length) - last_of(rejected, pairs.rejected_length),
        **{"loss": slopes.values, "d_w": slopes.d_w, "d_l": slopes.d_l, "weight": weight / (weight.mean().item() or 1)},
        "correct": pair_metrics(pairs, reward_scale)["rewards/accuracies"] > 0,
    }
    missing = {name: pyarrow.nulls(len(margin), NUMBERS) for name in ("r_w", "r_l") if name not in numbers}
    return {name: values.cpu().numpy() for name, values in numbers.items()} | missing


def last_of(values: Tensor, length: Tensor) -> Tensor:
    """(B,) of each row of (B, T) the last of its first `length` values."""
    return values.gather(1, length[:, None] - 1)[:, 0]


def tokens_of(pairs: PairBatch) -> dict[str, pyarrow.Array]:
    """Log-probs token by token: lists without padding, one a pair."""
    masks = 2 * (pairs.chosen_mask, pairs.rejected_mask)
    return {name: _lists(getattr(pairs, name), mask) for name, mask in zip(LOGPS, masks, strict=True)}


def _lists(values: Tensor | None, mask: Tensor) -> pyarrow.Array:
    if values is None:
        return pyarrow.nulls(len(mask), pyarrow.list_(NUMBERS))
    ends = mask.sum(dim=-1).cumsum(dim=0).cpu().numpy()
    offsets = np.concatenate(([0], ends)).astype(np.int32)
    return pyarrow.ListArray.from_arrays(offsets, values[mask].cpu().numpy())
