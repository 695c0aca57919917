"""What a training run will see of its data, printed token by token: what is learnt, where answers begin and end.

Most failed fine-tunes are visible here: a prompt inside the loss, an answer without an end token, two end tokens, a row
cut in the middle. Targets are coloured and stand between ⟦ and ⟧, context is dim, neighbouring tokens differ in shade.
White space that could be missed and special tokens are made visible, and nothing in a row can drive the terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from phi2.data.audit import Audit
from phi2.data.config import EncodeConfig, RowsConfig
from phi2.data.encode import Encoded, EncodedPreference, EncodedSequence, encode_records
from phi2.data.load import load_kind, with_template
from phi2.data.records import PAIR, Record
from phi2.hub import resolve
from phi2.tokenizer import Tokenizer

RESET, BOLD = "\x1b[0m", "\x1b[1m"
SPECIAL = "\x1b[1;35m"
SHADES = {False: ("\x1b[2m", "\x1b[90m"), True: ("\x1b[32m", "\x1b[36m")}  # target or not -> two, taken in turns
VISIBLE = {"\n": "↵", "\t": "→", "\r": "␍"}


@dataclass(frozen=True, kw_only=True)
class InspectConfig(RowsConfig):
    """Which rows to show, and, inherited, how they become tokens."""

    data: str
    """Files, hub data sets or named sources, separated by commas."""
    model: str
    """Folder, hub id, "nano" or "nano-instruct" whose tokenizer is used."""
    rows: int = 3
    """How many rows to show."""
    ids: bool = False
    """Show token ids too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 0:
            raise ValueError(f"rows must not be negative, got {self.rows}")
        if self.ids and not self.rows:
            raise ValueError("ids needs rows to show, got rows 0")


def inspect_data(config: InspectConfig) -> str:
    """What `phi2 inspect` prints.

    Raises:
        FileNotFoundError, ValueError: when the data or the tokenizer cannot be read, or no row is usable.
    """
    (records, dropped), kind = load_kind(config.data, config)
    tokenizer = with_template(Tokenizer.from_folder(resolve(config.model)), config, kind)
    return inspect_rows(records, tokenizer, config, kind, config.rows, config.ids, dropped=dropped)


def inspect_rows(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    options: EncodeConfig,
    kind: str,
    limit: int = 3,
    ids: bool = False,
    color: bool | None = None,
    dropped: Audit | None = None,
) -> str:
    """The first usable rows as a run would train on them, then the audit of all rows.

    Args:
        kind: "supervised" or "preference".
        limit: rows to show; all of them are encoded for the audit.
        ids: whether each token is followed by its id.
        color: whether to use ANSI colours; None looks whether standard output is a terminal and NO_COLOR is unset.
        dropped: the rows that were left out before, to be counted with the others.

    Raises:
        ValueError: for options that do not fit the kind, and when no row is usable.
    """
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    encoded, audit = encode_records(records, tokenizer, options, kind)
    audit.merge(dropped or Audit())
    shown = [_row(row, tokenizer, ids, color) for row in encoded[:limit]]
    return "\n\n".join([*shown, _styled(f"audit of {audit.rows} rows", BOLD, color) + "\n" + audit.table()])


def _row(row: Encoded, tokenizer: Tokenizer, ids: bool, color: bool) -> str:
    flags = ", ".join(sorted(row.flags))
    counts = f"{row.tokens} tokens, {row.target_tokens} of them targets"
    header = _styled(f"{row.origin}: {counts}; {flags}", BOLD, color)
    if isinstance(row, EncodedSequence):
        return "\n".join([header, _tokens(row.ids, row.mask, tokenizer, ids, color)])
    lines = [header]
    for name, part in zip(("prompt", *_names(row)), (row.prompt, *row.answers), strict=True):
        body = _tokens(part, np.full(len(part), name != "prompt"), tokenizer, ids, color)
        lines += [_styled(f"{name} ({len(part)})", BOLD, color), body]
    return "\n".join(lines)


def _names(row: EncodedPreference) -> list[str]:
    """What its answers are called."""
    if row.scores[:2] == PAIR and len(row.answers) == 2 + row.has_gold:
        return ["chosen", "rejected", "gold"][: len(row.answers)]
    return [f"answer of score {score:g}" for score in row.scores]


def _tokens(ids: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer, show_ids: bool, color: bool) -> str:
    """One text for all tokens; a character of several tokens stands at the last of them."""
    parts, stream, inside = [], tokenizer.stream(skip_special_tokens=False), False
    for number, (token_id, target) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        if target != inside:
            parts.append("⟦" if target else "⟧")
            inside = target
        text = stream.step(token_id)
        style = SHADES[target][number % 2] if tokenizer.decode([token_id]) else SPECIAL
        parts.append(_styled(visible(text) + (f"⟨{token_id}⟩" if show_ids else ""), style, color))
        parts.append("\n" if "\n" in text else "")
    return "".join([*parts, visible(stream.flush()), "⟧" if inside else ""])


def visible(text: str) -> str:
    """The text of a token with its outer white space marked and every character that does not print spelled out."""
    return "".join(_printable(text))


def _printable(text: str) -> Iterable[str]:
    for place, character in enumerate(text):
        if character == " " and (text.isspace() or place == len(text) - 1):
            yield "␣"
        elif character in VISIBLE:
            yield VISIBLE[character]
        else:
            yield character if character.isprintable() else character.encode("unicode_escape").decode()


def _styled(text: str, style: str, color: bool) -> str:
    return f"{style}{text}{RESET}" if color and text else text
