"""What became of the rows of a data set: which were kept, which rule dropped the others, what was done to the text.

A training run that silently loses a tenth of its rows, or trains on answers without an end, looks like any other run.
So every step from file to token ids counts here. The result is printed as a table and written to the run folder as
`data_audit.json`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from phi2.data.columns import COLUMN_STATUSES
from phi2.data.records import RowError

FLAGS = {
    "truncated": "cut to max_length",
    "boundary_merged": "a token spans prompt and answer; it counts as answer",
    "eos_added": "an end token was put behind the text",
    "eos_present": "the text came with its end token",
    "eos_missing": "the text has no end token and none was added",
    "eos_lost": "the end token was cut off: nothing here teaches the model to stop",
    "special_text_in_content": "the text spells a special token, which it becomes",
    "special_text_kept": "the text spells a special token, and stays text",
    "content_not_written": "the chat template leaves out the words of a message, or changes them",
    "names_not_written": "a message has a name or a tool_call_id that the chat template does not write",
}
EXAMPLES = 3  # rows named as examples of each rule


@dataclass
class Dropped:
    """The rows that one rule dropped: how many, the reason given for the first, and where the first few are."""

    rows: int = 0
    reason: str = ""
    first: list[str] = field(default_factory=list)


@dataclass
class Audit:
    """Counts over the rows of a data set; audits of parts add up with `merge`.

    Attributes:
        kept: rows that came out as token ids.
        dropped: rule -> what it dropped.
        flags: how many kept rows carry each of `FLAGS`.
        tokens: of the kept rows; the prompt of a pair counts once.
        target_tokens: those that the loss is taken on.
        lengths: tokens of a row -> rows; for a pair, of its prompt with the longer answer.
        columns: one of `COLUMN_STATUSES` -> columns, and keys of messages, that their format does not read -> rows with
            them.
    """

    kept: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    flags: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    target_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    columns: dict[str, Counter[str]] = field(default_factory=lambda: {status: Counter() for status in COLUMN_STATUSES})

    @property
    def rows(self) -> int:
        return self.kept + sum(dropped.rows for dropped in self.dropped.values())

    def keep(self, length: int, tokens: int, target_tokens: int, flags: Iterable[str]) -> None:
        """Counts one usable row."""
        self.kept += 1
        self.tokens += tokens
        self.target_tokens += target_tokens
        self.lengths[length] += 1
        self.flags.update(flags)

    def count_columns(self, column_status: Mapping[str, str]) -> None:
        """Counts what was not read of one row: name -> one of `COLUMN_STATUSES`."""
        for name, status in column_status.items():
            self.columns[status][name] += 1

    def drop(self, error: RowError) -> None:
        """Counts one row that `error` refused."""
        self._add(error.rule, Dropped(1, str(error), [str(error.origin)]))

    def merge(self, other: Audit) -> None:
        """Adds the counts of `other`, which stay as they are."""
        self.kept += other.kept
        self.tokens += other.tokens
        self.target_tokens += other.target_tokens
        self.lengths.update(other.lengths)
        self.flags.update(other.flags)
        for status, names in other.columns.items():
            self.columns[status].update(names)
        for rule, dropped in other.dropped.items():
            self._add(rule, dropped)

    def _add(self, rule: str, more: Dropped) -> None:
        seen = self.dropped.setdefault(rule, Dropped(reason=more.reason))
        seen.rows += more.rows
        seen.first = (seen.first + more.first)[:EXAMPLES]

    def percentiles(self) -> dict[str, int]:
        """Lengths in tokens that 0, 50, 95 and 100 % of the kept rows do not exceed; {} when none was kept."""
        if not self.lengths:
            return {}
        lengths = np.repeat(list(self.lengths), list(self.lengths.values()))
        values = np.percentile(lengths, [0, 50, 95, 100], method="inverted_cdf")
        return dict(zip(("min", "median", "p95", "max"), values.tolist(), strict=True))

    def to_dict(self) -> dict:
        """The audit as JSON values, every flag listed, also where its count is zero."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": {rule: asdict(dropped) for rule, dropped in sorted(self.dropped.items())},
            **{flag: self.flags[flag] for flag in FLAGS},
            "columns": {status: dict(sorted(names.items())) for status, names in self.columns.items()},
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "length": self.percentiles(),
        }

    def table(self) -> str:
        """The audit as aligned lines: name, count, share and what it means; then the columns. Zeros are left out."""
        rows = [("rows", self.rows, ""), ("kept", self.kept, _share(self.kept, self.rows))]
        for rule, dropped in sorted(self.dropped.items(), key=lambda item: -item[1].rows):
            rows.append((f"dropped {rule}", dropped.rows, f"{_share(dropped.rows, self.rows)}  first {dropped.reason}"))
        for flag in FLAGS:
            if self.flags[flag]:
                rows.append((flag, self.flags[flag], f"{_share(self.flags[flag], self.kept)}  {FLAGS[flag]}"))
        rows.append(("tokens", self.tokens, ""))
        rows.append(("target_tokens", self.target_tokens, _share(self.target_tokens, self.tokens)))
        rows += [(f"length {name}", value, "") for name, value in self.percentiles().items()]
        name_width = max(len(name) for name, _, _ in rows)
        count_width = max(len(f"{count:,}") for _, count, _ in rows)
        lines = [f"{name:<{name_width}}  {count:>{count_width},}  {note}".rstrip() for name, count, note in rows]
        return "\n".join([*lines, *self.column_lines()])

    def column_lines(self) -> list[str]:
        """A line for each status of columns: `columns not read: id 200, dataset 200`."""
        return [
            f"columns {status}: {', '.join(f'{name} {rows:,}' for name, rows in names.most_common())}"
            for status, names in self.columns.items()
            if names
        ]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:6.1%}" if whole else ""
