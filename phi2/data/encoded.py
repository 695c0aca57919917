"""What a row is as token ids: a sequence with what is learnt of it, or a prompt with its answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from phi2.data.records import Origin


@dataclass(frozen=True, slots=True, eq=False)
class EncodedSequence:
    """One supervised row.

    Attributes:
        ids: (T,) int32 token ids.
        mask: (T,) bool, True where the token is a target. Nothing predicts the first token, whatever its mask says.
        flags: names in `audit.FLAGS`.
    """

    ids: np.ndarray
    mask: np.ndarray
    origin: Origin
    flags: frozenset[str] = frozenset()

    @property
    def length(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def target_tokens(self) -> int:
        return int(self.mask[1:].sum())


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPreference:
    """One preference row: a prompt and k >= 1 answers, every token of which is a target.

    Attributes:
        prompt: (prompt tokens,) int32 ids, at least one, up to and with the tokens that open the assistant's turn.
        answers: of each, best first, (answer tokens,) int32 ids that follow the prompt.
        scores: of each a number: 1 and 0 for chosen and rejected, 1 or 0 for one answer with a label.
        columns: the row's other numbers and labels.
        flags: names in `audit.FLAGS`.
        has_gold: the last answer, behind a chosen and a rejected one, is to be imitated and not compared.
    """

    prompt: np.ndarray
    answers: tuple[np.ndarray, ...]
    scores: tuple[float, ...]
    origin: Origin
    columns: dict[str, float | str]
    flags: frozenset[str] = frozenset()
    has_gold: bool = False

    @property
    def chosen(self) -> np.ndarray:
        """The best answer."""
        return self.answers[0]

    @property
    def rejected(self) -> np.ndarray:
        """The second answer of a pair."""
        return self.answers[1]

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return len(self.prompt) + max(map(len, self.answers))

    @property
    def tokens(self) -> int:
        """Tokens with the prompt counted once."""
        return len(self.prompt) + self.target_tokens

    @property
    def target_tokens(self) -> int:
        return sum(map(len, self.answers))


Encoded = EncodedSequence | EncodedPreference
