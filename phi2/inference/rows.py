"""What a step reads about the rows it computes: their next tokens, where those go, and how the next ones are chosen.

It lies in device memory, and a recorded step moves it on by itself, so that replays follow each other without the host.
The host writes to it when a row comes, or when other rows are active than in the step before.

Dims: S tokens a slot of the cache has room for, V ids to choose from.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from phi2.inference.config import SamplingParams
from phi2.inference.sampling import Settings, Stages, choose, pack


class Rows:
    """A row for each slot of a cache.

    Args:
        slots: how many.
        max_length: S.
        choices: V; a model may have more logits than its tokenizer has tokens.

    Attributes:
        ids: (slots,) int32, the token that is read next.
        at: (2, slots) int32, where in its slot that goes, and how many keys it sees. A row that is not active has the
            spare place, S, and one key.
    """

    def __init__(self, slots: int, max_length: int, choices: int, device: torch.device) -> None:
        self._spare, self._choices = max_length, choices
        self._next = torch.zeros((3, slots), dtype=torch.int32, device=device)
        self.ids, self.at = self._next[0], self._next[1:]
        self._settings = torch.zeros((slots, len(Settings._fields)), dtype=torch.int64, device=device)
        self._stages = [Stages.of(SamplingParams())] * slots
        self._seen: Tensor | None = None  # (slots, V) bool, what each has said; from the first repetition penalty on

    def occupy(self, slot: int, params: SamplingParams, prompt: Sequence[int]) -> None:
        """A reply begins, for which the repetition penalty counts the prompt as said."""
        self._stages[slot] = Stages.of(params)
        upload(self._settings[slot], pack(params))
        if params.repetition_penalty == 1.0:
            return
        if self._seen is None:
            shape = len(self._settings), self._choices
            self._seen = torch.zeros(shape, dtype=torch.bool, device=self.ids.device)
        said = torch.zeros(self._choices, dtype=torch.bool)
        said[[token for token in prompt if token < self._choices]] = True
        upload(self._seen[slot], said)

    def swap(self, one: int, other: int) -> None:
        """Exchanges how two slots choose."""
        self._stages[one], self._stages[other] = self._stages[other], self._stages[one]
        for table in (self._settings, self._seen):
            if table is not None:
                table[[one, other]] = table[[other, one]]

    def activate(self, places: Mapping[int, int], ids: Mapping[int, int] | None) -> None:
        """Says which slots are active, and where in each the next token goes.

        Args:
            ids: those tokens; None: what the step before has chosen, which the host may not know yet.
        """
        state = np.zeros((3, len(self.ids)), dtype=np.int32)
        state[1], state[2] = self._spare, 1
        active, at = list(places), np.array(list(places.values()))
        state[1, active], state[2, active] = at, at + 1
        if ids is None:
            return upload(self.at, torch.from_numpy(state[1:]))
        state[0, active] = [ids[slot] for slot in active]
        upload(self._next, torch.from_numpy(state))

    def advance(self, rows: int, chosen: Tensor) -> None:
        """The first rows go on to the tokens that were chosen, (rows,); one whose slot is full is no longer active."""
        self.ids[:rows] = chosen
        self.at[:, :rows].add_(self.at[0, :rows] < self._spare)

    def stages(self, slots: Iterable[int]) -> Stages:
        """What some of these need."""
        return Stages.of_all(self._stages[slot] for slot in slots)

    def choose_apart(self, logits: Tensor, slots: list[int], places: Tensor) -> Tensor:
        """`choose`, slots that need the same stages together: none waits for what only another needs."""
        alike: dict[Stages, list[int]] = {}
        for row, slot in enumerate(slots):
            alike.setdefault(self._stages[slot], []).append(row)
        if len(alike) == 1:
            return self.choose(logits, slots, self._stages[slots[0]], places)
        chosen = torch.empty(len(slots), dtype=torch.int64, device=logits.device)
        for stages, rows in alike.items():
            chosen[rows] = self.choose(logits[rows], [slots[row] for row in rows], stages, places[rows])
        return chosen

    def choose(self, logits: Tensor, slots: slice | list[int], stages: Stages, places: Tensor) -> Tensor:
        """The next token of each of some slots, (B,), which the repetition penalty counts as said from now on.

        Args:
            logits: (B, at least V) float32.
            stages: what they need, or more.
            places: (B,) where those tokens stand; behind the end of the slot where the row is not active.
        """
        logits = logits[:, : self._choices]
        if not (stages.draws or stages.penalty):
            return logits.argmax(dim=-1)
        settings = Settings.unpack(self._settings[slots])
        if not stages.penalty:
            return choose(logits, settings, stages, places)
        assert self._seen is not None
        seen = self._seen[slots]
        chosen = choose(logits, settings, stages, places, seen)
        said = seen.gather(1, chosen[:, None]) | (places <= self._spare)[:, None]
        self._seen[slots] = seen.scatter(1, chosen[:, None], said)
        return chosen


def upload(target: Tensor, source: Tensor) -> None:
    """Copies from the host without waiting for the device: the source of such a copy lies in memory that stays put."""
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
