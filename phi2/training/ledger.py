"""What an evaluation of a preference run writes into its ledger (`phi2/runs/ledger.py`): a row for each comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
from torch import Tensor

from phi2.data.encoded import EncodedPreference
from phi2.data.records import PAIR
from phi2.losses.batch import AnswerBatch, Comparison, comparisons
from phi2.losses.bound import BoundLoss
from phi2.losses.registry import State, as_numbers
from phi2.losses.slopes import Slopes
from phi2.runs.ledger import (
    COLUMN,
    FIRST_TOKENS,
    MISMATCHED,
    SIDES,
    drop_behind,
    file_of,
    ledger_files,
    read_table,
    write_evaluation,
)
from phi2.tokenizer import Tokenizer
from phi2.training.config import DPOConfig
from phi2.training.metrics import rewards_of
from phi2.training.reference_cache import KEY, answer_keys

NUMBERS = pyarrow.float32()


class LedgerWriter:
    """Writes the ledger of a run.

    Args:
        config: of the run, with all knobs of its loss.
        rows: that it evaluates.
    """

    def __init__(
        self, config: DPOConfig, loss: BoundLoss, tokenizer: Tokenizer, rows: Sequence[EncodedPreference]
    ) -> None:
        self.run, self.config, self.loss = Path(config.output), config, loss
        self.tokenizer = tokenizer
        scores = [compared_scores(row) for row in rows]
        self.scores = {} if all(each == PAIR for each in scores) else {"scores": scores}
        self.rows = [(row, both) for row in rows for both in comparisons_of(row)]
        files = [*ledger_files(self.run).values()]
        first = pyarrow.nulls(len(self.rows), pyarrow.bool_())
        self.was_correct = read_table(files[-1], ["correct"])["correct"] if files else first

    def write(self, step: int, answers: AnswerBatch, slopes: Slopes, state: State) -> None:
        """Adds an evaluation.

        Args:
            answers: what was found of the rows, in their order.
            slopes: and what the loss makes of it.
            state: of the loss.
        """
        config = self.config
        about: dict[str, Any] = {"step": step, "loss": config.loss, "knobs": config.knobs, "state": as_numbers(state)}
        about |= {"nll_weight": config.nll_weight, **self.scores}
        numbers = numbers_of(answers, slopes, self.loss.reward_scale) | {"was_correct": self.was_correct}
        steps = np.full(len(self.rows), step, dtype=np.int32)
        columns = {"step": steps, **self.names, **numbers, **self.said, **tokens_of(answers)}
        write_evaluation(file_of(self.run, step), about, columns)
        self.was_correct = numbers["correct"]

    @cached_property
    def names(self) -> dict[str, Any]:
        """Which rows they are."""
        return {
            "pair": [name_of(row, both) for row, both in self.rows],
            "file": [row.origin.file for row, _ in self.rows],
            "row": np.array([row.origin.row for row, _ in self.rows], dtype=np.int64),
        }

    @cached_property
    def said(self) -> dict[str, Any]:
        """The columns of the data, and the texts with their special tokens."""
        names = dict.fromkeys(name for row, _ in self.rows for name in row.columns)
        columns = {f"{COLUMN}{name}": plain([row.columns.get(name) for row, _ in self.rows]) for name in names}
        texts: dict[str, list[str | None]] = {"prompt": [self._text(row.prompt) for row, _ in self.rows]}
        for side, places in zip(SIDES, zip(*(both for _, both in self.rows), strict=True), strict=True):
            answers = zip(self.rows, places, strict=True)
            texts[side] = [None if place is None else self._text(row.answers[place]) for (row, _), place in answers]
        return columns | {name: pyarrow.array(each, pyarrow.string()) for name, each in texts.items()}

    def _text(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False)


def ledger_of(
    config: DPOConfig, loss: BoundLoss, tokenizer: Tokenizer, rows: Sequence[EncodedPreference], done: int
) -> LedgerWriter | None:
    """What writes the ledger of a run, None where it keeps none.

    Args:
        done: updates done already; what was written behind them is dropped.
    """
    drop_behind(Path(config.output), done)
    return LedgerWriter(config, loss, tokenizer, rows) if rows and config.ledger else None


def compared_scores(row: EncodedPreference) -> tuple[float, ...]:
    """Of the answers that are compared, or have a label: of all but one to imitate."""
    return row.scores[: len(row.scores) - row.has_gold]


def comparisons_of(row: EncodedPreference) -> list[Comparison]:
    """Those of a row that the ledger has a row for, by the places of its answers."""
    return comparisons([compared_scores(row)])


def name_of(row: EncodedPreference, both: Comparison) -> str:
    """A comparison by the tokens of the prompt and of its answers; zeros stand for an answer that is not there."""
    keys = answer_keys([row])
    compared = [bytes(KEY.itemsize) if place is None else keys[place] for place in both]
    return hashlib.sha256(b"".join(compared)).hexdigest()[:16]


def plain(values: list[float | str | None]) -> pyarrow.Array:
    """Numbers, or where one of them is none, texts."""
    if all(isinstance(value, int | float | None) for value in values):
        return pyarrow.array(values, pyarrow.float64())
    return pyarrow.array([None if value is None else str(value) for value in values])


@torch.no_grad()
def numbers_of(answers: AnswerBatch, slopes: Slopes, reward_scale: float) -> dict[str, pyarrow.Array]:
    """(R,) of everything that is one number a comparison; null of an answer that is not there."""
    sides, has_reference = answers.better_and_worse, answers.ref_logps is not None
    ref = answers.ref if has_reference else torch.full_like(answers.policy, torch.nan)
    numbers = {}
    for name, each in {
        "s": answers.policy,
        "r": ref,
        "n": answers.mask.sum(dim=-1).float(),
        "d": slopes.of_answers,
    }.items():
        numbers[f"{name}_w"], numbers[f"{name}_l"] = sides(each)
    numbers |= {name: torch.sub(*sides(each)) for name, each in gains_of(answers).items()}
    weight = numbers["d_w"].abs().nan_to_num() + numbers["d_l"].abs().nan_to_num()
    numbers |= {"loss": answers.of_comparisons(slopes.values), "weight": weight / (weight.mean().item() or 1)}
    kinds = {"n_w": pyarrow.int32(), "n_l": pyarrow.int32()}
    arrays = {name: _array(values, kinds.get(name, NUMBERS)) for name, values in numbers.items()}
    return arrays | {"correct": correct_of(*sides(rewards_of(answers, reward_scale)), has_reference)}


def gains_of(answers: AnswerBatch) -> dict[str, Tensor]:
    """(A,) by the names of the margins what they are differences of."""
    logps, ref, gain = answers.policy_logps, answers.ref_logps, answers.policy
    if ref is not None:
        logps, gain = logps - ref, answers.logratio
    first, last = logps[:, :FIRST_TOKENS].sum(dim=-1), last_of(logps, answers.length)
    return {"margin": gain, "margin_first": first, "margin_last": last}


def correct_of(chosen: Tensor, rejected: Tensor, has_reference: bool) -> pyarrow.Array:
    """(R,) whether the reward of the better answer is the higher one; beside an answer that is not there the reference
    stands, whose reward is 0, and without a reference it is null.

    Args:
        chosen, rejected: (R,) rewards, NaN of an answer that is not there.
    """
    if has_reference:
        chosen, rejected = chosen.nan_to_num(), rejected.nan_to_num()
    return pyarrow.array((chosen > rejected).cpu().numpy(), mask=(chosen - rejected).isnan().cpu().numpy())


def _array(values: Tensor, kind: pyarrow.DataType) -> pyarrow.Array:
    """NaN is null."""
    return pyarrow.array(values.cpu().numpy(), kind, from_pandas=True)


def last_of(values: Tensor, length: Tensor) -> Tensor:
    """(B,) of each row of (B, T) the last of its first `length` values."""
    return values.gather(1, length[:, None] - 1)[:, 0]


def tokens_of(answers: AnswerBatch) -> dict[str, pyarrow.Array]:
    """Token by token what the loss was given: lists without padding, one a comparison. Answers behind other prompts
    have rows of their own, as many, of the prompt before."""
    kinds = {"policy_{}_logps": answers.policy_logps, "ref_{}_logps": answers.ref_logps}
    kinds |= {f"{name}_{{}}": values for name, values in answers.extras.items()}
    lists = {name: _lists(values, answers.mask) for name, values in kinds.items()}
    sides = {
        side: pyarrow.array(places, pyarrow.int32())
        for side, places in zip(SIDES, zip(*answers.comparisons, strict=True), strict=True)
    }
    found = {name.format(side): each.take(places) for name, each in lists.items() for side, places in sides.items()}
    if answers.gold is not None:
        prompts = torch.arange(answers.count, device=answers.policy_logps.device)
        found |= _of_gold(answers.gold, answers.of_comparisons(prompts).cpu())
    if answers.mismatched is not None:
        others = tokens_of(replace(answers.mismatched, gold=None))  # of these no loss is shown one
        found |= {f"{MISMATCHED}{name}": each for name, each in others.items()}
    return found


def _of_gold(gold: AnswerBatch, prompts: Tensor) -> dict[str, pyarrow.Array]:
    """Those of the answers to imitate.

    Args:
        prompts: (R,) of each comparison, on the CPU.
    """
    models = {"policy": gold.policy_logps, "ref": gold.ref_logps}
    return {f"{model}_gold_logps": _lists(logps, gold.mask).take(prompts.numpy()) for model, logps in models.items()}


def _lists(values: Tensor | None, mask: Tensor) -> pyarrow.Array:
    if values is None:
        return pyarrow.nulls(len(mask), pyarrow.list_(NUMBERS))
    ends = mask.sum(dim=-1).cumsum(dim=0).cpu().numpy()
    offsets = np.concatenate(([0], ends)).astype(np.int32)
    return pyarrow.ListArray.from_arrays(offsets, values[mask].cpu().numpy())
