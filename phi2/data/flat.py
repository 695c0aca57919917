"""Encoded rows in a few flat arrays, in memory or mapped from a file: a sequence that makes a row when it is asked for.

A million rows as objects are millions of small arrays, gigabytes and seconds; as flat arrays they are opened at once,
and what a run asks of all of them (lengths, which columns, digests) is read off without making any.

Legend: R rows, P parts (a prompt, an answer, a whole sequence), N tokens.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar, overload

import numpy as np

from phi2.data.encoded import Encoded, EncodedPreference, EncodedSequence
from phi2.data.records import Origin

Row = TypeVar("Row", EncodedSequence, EncodedPreference)
Layout = tuple[tuple[str, bool], ...]  # of a row's columns: the name of each, and whether it is a text
SMALL_IDS = 1 << 16  # below it, ids are kept in two bytes


class Digests(NamedTuple):
    """SHA-256 of rows: of their tokens and masks, and of what the data say of the answers, scores and columns."""

    tokens: str
    columns: str


@dataclass(frozen=True, eq=False)
class FlatRows(Sequence[Row], Generic[Row]):
    """Rows of one kind.

    Attributes:
        table: (R,) where each row's values begin in the other arrays, with one field for each of them.
        bounds: (P + 1,) int64, where each part begins in `ids`, and the last one ends.
        ids: (N,) uint16 or int32.
        files: names of the files that the rows came from.
        flag_sets: the sets of flags that rows have.
        digests: of all rows, where they are known.
    """

    table: np.ndarray
    bounds: np.ndarray
    ids: np.ndarray
    files: list[str]
    flag_sets: list[frozenset[str]]
    digests: Digests | None

    FIELDS: ClassVar[list[tuple[str, str]]] = [("part", "<i8"), ("file", "<i4"), ("number", "<i8"), ("flags", "<i4")]

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self._row(*values) for values in self.table[place].tolist()]
        return self._row(*self.table[place].item())

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), 1024):
            yield from self[start : start + 1024]

    @abstractmethod
    def _row(self, *values: Any) -> Row: ...

    def _parts(self, first: int, count: int) -> list[np.ndarray]:
        bounds = self.bounds[first : first + count + 1].tolist()
        return [self.ids[start:end].astype(np.int32) for start, end in pairwise(bounds)]

    def take(self, places: Sequence[int]) -> FlatRows[Row]:
        """Some of the rows, in this order; no token is copied."""
        return replace(self, table=self.table[np.asarray(places, dtype=np.int64)], digests=None)

    @property
    def sizes(self) -> np.ndarray:
        """(P,) tokens of each part."""
        return np.diff(self.bounds)

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """(R,) `length` of each row."""

    @property
    @abstractmethod
    def tokens(self) -> np.ndarray:
        """(R,) `tokens` of each row."""


@dataclass(frozen=True, eq=False)
class FlatSequences(FlatRows[EncodedSequence]):
    """Supervised rows.

    Attributes:
        mask: uint8, the bits of each row's mask, which begins at a byte of its own.
    """

    mask: np.ndarray

    FIELDS = [*FlatRows.FIELDS, ("mask", "<i8")]

    def _row(self, part: int, file: int, number: int, flags: int, mask: int) -> EncodedSequence:
        (ids,) = self._parts(part, 1)
        bits = np.unpackbits(self.mask[mask : mask + (len(ids) + 7) // 8], count=len(ids))
        return EncodedSequence(ids, bits.view(bool), Origin(self.files[file], number), self.flag_sets[flags])

    @property
    def lengths(self) -> np.ndarray:
        return self.sizes[self.table["part"]]

    @property
    def tokens(self) -> np.ndarray:
        return self.lengths


@dataclass(frozen=True, eq=False)
class FlatPreferences(FlatRows[EncodedPreference]):
    """Preference rows.

    Attributes:
        scores: (P,) float64; a prompt's means nothing.
        layouts: the columns that rows have.
        values: float64, those of each row's columns; of a text, its place in `texts`.
        texts: the texts in columns.
    """

    scores: np.ndarray
    layouts: list[Layout]
    values: np.ndarray
    texts: Sequence[str]

    FIELDS = [*FlatRows.FIELDS, ("answers", "<i4"), ("gold", "?"), ("layout", "<i4"), ("value", "<i8")]

    def _row(
        self, part: int, file: int, number: int, flags: int, answers: int, gold: bool, layout: int, value: int
    ) -> EncodedPreference:
        parts = self._parts(part, 1 + answers)
        names = self.layouts[layout]
        values = self.values[value : value + len(names)].tolist()
        columns = {name: self.texts[int(x)] if text else x for (name, text), x in zip(names, values, strict=True)}
        scores, origin = self.scores[part + 1 : part + 1 + answers].tolist(), Origin(self.files[file], number)
        return EncodedPreference(
            parts[0], tuple(parts[1:]), tuple(scores), origin, columns, self.flag_sets[flags], gold
        )

    @property
    def lengths(self) -> np.ndarray:
        sizes, first, answers = self.sizes, self.table["part"], self.table["answers"]
        longest = np.zeros(len(self), dtype=np.int64)
        for number in range(1, 1 + answers.max(initial=0)):
            there = answers >= number
            longest[there] = np.maximum(longest[there], sizes[first[there] + number])
        return sizes[first] + longest

    @property
    def tokens(self) -> np.ndarray:
        first = self.table["part"]
        return self.bounds[first + 1 + self.table["answers"]] - self.bounds[first]

    @property
    def scores_of_answers(self) -> np.ndarray:
        """(answers of all rows,) scores, in no order."""
        first, answers = self.table["part"], self.table["answers"]
        numbers = range(1, 1 + answers.max(initial=0))
        return np.concatenate(
            [self.scores[:0], *(self.scores[first[answers >= number] + number] for number in numbers)]
        )

    def without_gold(self) -> FlatPreferences:
        """The rows without answers to imitate."""
        table = self.table.copy()
        table["answers"] -= table["gold"]
        table["gold"] = False
        return replace(self, table=table, digests=None)

    def numbers(self, column: str) -> np.ndarray:
        """(R,) float64 of a column; nan where it is no number or the row has none."""
        found = np.full(len(self), np.nan)
        for number, layout in enumerate(self.layouts):
            if (column, False) in layout:
                there = self.table["layout"] == number
                found[there] = self.values[self.table["value"][there] + layout.index((column, False))]
        return found

    @property
    def first_scores(self) -> np.ndarray:
        """(R,) float64 of each row's first answer."""
        return self.scores[self.table["part"] + 1]

    def of_each_layout(self) -> list[EncodedPreference]:
        """The first row of each set of columns: what can be said of columns in all rows, these say."""
        _, first = np.unique(self.table["layout"], return_index=True)
        return [self[int(place)] for place in np.sort(first)]


# ---- rows in whatever form ----


class Joined(Sequence[Row]):
    """Sequences of rows one behind the other."""

    def __init__(self, *parts: Sequence[Row]) -> None:
        self.parts: tuple[Sequence[Row], ...] = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(self.parts)

    @overload
    def __getitem__(self, place: int) -> Row: ...
    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...
    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        inside = range(len(self))[place]
        for part in self.parts:
            if inside < len(part):
                return part[inside]
            inside -= len(part)
        raise AssertionError("range refuses a place that is not there")


def largest(rows: Sequence[Encoded], by: Literal["length", "tokens"]) -> Encoded:
    """The first of the rows with most tokens, all of them or those of the longest sequence."""
    if isinstance(rows, FlatRows):
        return rows[int((rows.lengths if by == "length" else rows.tokens).argmax())]
    if isinstance(rows, Joined):
        rows = [largest(part, by) for part in rows.parts if part]
    return max(rows, key=attrgetter(by))


def of_each_layout(rows: Sequence[EncodedPreference]) -> Sequence[EncodedPreference]:
    """Rows that have whatever columns any row has, and lack whatever any lacks."""
    return rows.of_each_layout() if isinstance(rows, FlatPreferences) else rows


def lengths(rows: Sequence[Encoded]) -> list[int]:
    """Tokens of each row."""
    return rows.lengths.tolist() if isinstance(rows, FlatRows) else [row.length for row in rows]


def digests(rows: Sequence[Encoded]) -> Digests:
    """Of every row, in order."""
    if isinstance(rows, FlatRows) and rows.digests is not None:
        return rows.digests
    digester = Digester()
    digester.add(rows)
    return digester.digests


class Digester:
    """Makes `Digests` of rows that come in parts."""

    def __init__(self) -> None:
        self._tokens, self._columns, self._between = hashlib.sha256(), hashlib.sha256(), b""

    def add(self, rows: Iterable[Encoded]) -> None:
        for row in rows:
            arrays = (row.ids, row.mask) if isinstance(row, EncodedSequence) else (row.prompt, *row.answers)
            for array in arrays:
                self._tokens.update(len(array).to_bytes(8, "little") + array.tobytes())
            if isinstance(row, EncodedPreference):
                said = json.dumps([row.scores, row.columns], sort_keys=True)
                self._columns.update(self._between + said.encode("utf-8", "surrogatepass"))
                self._between = b"\0"

    @property
    def digests(self) -> Digests:
        return Digests(self._tokens.hexdigest(), self._columns.hexdigest())


# ---- from rows ----


@overload
def flat_rows(rows: Sequence[EncodedPreference], kind: Literal["preference"]) -> FlatPreferences: ...
@overload
def flat_rows(rows: Sequence[Row], kind: str) -> FlatRows[Row]: ...
def flat_rows(rows: Sequence[Row], kind: str) -> FlatRows[Row]:
    """Rows as flat arrays; those that are already stay as they are."""
    if isinstance(rows, FlatRows):
        return rows
    builder = BUILDERS[kind]()
    builder.add(rows)
    return builder.build()


class Builder(ABC, Generic[Row]):
    """Puts rows one behind the other, a batch at a time."""

    FIELDS: ClassVar[list[tuple[str, str]]]

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []  # of each batch; so are the next two
        self.parts: list[np.ndarray] = []
        self.ids: list[np.ndarray] = []
        self.files: dict[str, int] = {}
        self.flag_sets: dict[frozenset[str], int] = {}
        self.digester, self.count = Digester(), 0

    def add(self, rows: Sequence[Row]) -> None:
        parts: list[np.ndarray] = []
        self.rows.append(np.array([self._place(row, parts) for row in rows], dtype=self.FIELDS))
        self.parts.append(np.array([len(part) for part in parts], dtype=np.int64))
        ids = np.concatenate([*parts, np.zeros(0, dtype=np.int32)])
        self.ids.append(ids.astype(np.uint16) if ids.max(initial=0) < SMALL_IDS else ids)
        self.count += len(parts)
        self.digester.add(rows)

    def _place(self, row: Row, parts: list[np.ndarray]) -> tuple[Any, ...]:
        file, flags = _number(self.files, row.origin.file), _number(self.flag_sets, row.flags)
        return self.count + len(parts), file, row.origin.row, flags, *self._add(row, parts)

    @abstractmethod
    def _add(self, row: Row, parts: list[np.ndarray]) -> tuple[Any, ...]:
        """Adds the parts of a row; returns the values of the table that only rows of its kind have."""

    @abstractmethod
    def build(self) -> FlatRows[Row]: ...

    def _common(self) -> dict[str, Any]:
        return {
            "table": _joined(self.rows, np.dtype(self.FIELDS)),
            "bounds": np.cumsum(np.concatenate([[0], *self.parts]), dtype=np.int64),
            "ids": _joined(self.ids, np.dtype(np.uint16)),
            "files": [*self.files],
            "flag_sets": [*self.flag_sets],
            "digests": self.digester.digests,
        }


class SequenceBuilder(Builder[EncodedSequence]):
    FIELDS = FlatSequences.FIELDS

    def __init__(self) -> None:
        super().__init__()
        self.mask = bytearray()

    def _add(self, row: EncodedSequence, parts: list[np.ndarray]) -> tuple[Any, ...]:
        parts.append(row.ids)
        start = len(self.mask)
        self.mask += np.packbits(row.mask).tobytes()
        return (start,)

    def build(self) -> FlatSequences:
        return FlatSequences(**self._common(), mask=np.frombuffer(bytes(self.mask), dtype=np.uint8))


class PreferenceBuilder(Builder[EncodedPreference]):
    FIELDS = FlatPreferences.FIELDS

    def __init__(self) -> None:
        super().__init__()
        self.scores: list[float] = []
        self.values: list[float] = []
        self.layouts: dict[Layout, int] = {}
        self.texts: dict[str, int] = {}

    def _add(self, row: EncodedPreference, parts: list[np.ndarray]) -> tuple[Any, ...]:
        parts += [row.prompt, *row.answers]
        self.scores += [0.0, *row.scores]
        start = len(self.values)
        self.values += [_number(self.texts, x) if isinstance(x, str) else x for x in row.columns.values()]
        layout = _number(self.layouts, tuple((name, isinstance(x, str)) for name, x in row.columns.items()))
        return len(row.answers), row.has_gold, layout, start

    def build(self) -> FlatPreferences:
        scores, values = np.array(self.scores), np.array(self.values, dtype=np.float64)
        return FlatPreferences(
            **self._common(), scores=scores, layouts=[*self.layouts], values=values, texts=[*self.texts]
        )


BUILDERS: dict[str, type[Builder]] = {"supervised": SequenceBuilder, "preference": PreferenceBuilder}


def _number(numbers: dict[Any, int], value: Any) -> int:
    return numbers.setdefault(value, len(numbers))


def _joined(arrays: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0, dtype=dtype)
