"""Prompts out of rows: what a model is to answer. Any row that can be trained on has one, and its answer is left out.

A file is one of `phi2.data.files`, or text with a prompt a line. The first of `TEXTS` and `MESSAGES` that a row has
makes its prompt; earlier turns, a system text and the variables of the chat template are read as in training. What
would change the prompt and is not read refuses the row; other columns are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi2.data.columns import APPROVAL, MASKS, NOT_READ, REASONING, RowContext, check_unread, is_set
from phi2.data.files import READERS, suffix_of
from phi2.data.formats import CHAT_COLUMNS, with_chat_columns
from phi2.data.messages import read_messages
from phi2.data.readers import read_prompt
from phi2.data.records import Messages, Origin, Prompt, Row
from phi2.data.sources import TOYS, raw_rows

TEXT_FILE = ".txt"
TOY = "toy-prompts"  # what the rows of toy-dpo ask
TEXTS = {  # the column that makes it -> what the text is put together from
    "prompt": ("prompt",),
    "instruction": ("context", "instruction", "input"),
    "question": ("context", "question"),
    "input": ("context", "input"),
}
MESSAGES = ("messages", "conversations")
COLUMNS = ("prompt", *MESSAGES, *(name for name in TEXTS if name != "prompt"))  # in the order in which they are tried
ABOUT_ANSWERS = frozenset((*APPROVAL, *MASKS, *REASONING))  # they refuse a row that is learnt, and say nothing here


def prompt_rows(source: str) -> Iterator[tuple[Origin, Row]]:
    """The rows of a file, folder, hub data set or named source, streamed.

    Raises:
        FileNotFoundError: for a source that is none of these.
        ValueError: for a file that cannot be read; while it streams, naming the row behind which it cannot.
    """
    path = Path(source).expanduser()
    if source == TOY:
        return _toy_rows()
    if source in TOYS:
        raise ValueError(f"{source} has rows to train on; the questions of its skills are {TOY}")
    if path.suffix.lower() == TEXT_FILE and not path.is_dir():
        return _text_lines(path, source)
    if path.is_file() and not suffix_of(path.name):
        raise ValueError(
            f"{source}: the suffix of a file of prompts must be one of {', '.join([TEXT_FILE, *READERS])}, got"
            f" {path.suffix or path.name!r}"
        )
    return _objects(raw_rows(source))


def _text_lines(path: Path, label: str) -> Iterator[tuple[Origin, Row]]:
    """A prompt a line; empty lines are none."""
    if not path.is_file():
        raise FileNotFoundError(f"{label}: no such file")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            origin = Origin(label, number)
            try:
                line.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{origin}: invalid UTF-8 ({error.reason})") from error
            if not line.isspace():
                yield origin, {"prompt": line.removesuffix("\n").removesuffix("\r")}


def _toy_rows() -> Iterator[tuple[Origin, Row]]:
    from phi2.data.toy.skills import questions

    for number, item in enumerate(questions(), start=1):
        yield Origin(TOY, number), {"prompt": item.messages[-1].content, "source_dataset": item.skill}


def _objects(rows: Iterator[tuple[Origin, Any]]) -> Iterator[tuple[Origin, Row]]:
    for origin, row in rows:
        if not isinstance(row, Mapping):
            raise ValueError(f"{origin}: a row must be an object, got {type(row).__name__}")
        yield origin, row


def read_prompt_row(
    row: Row, ctx: RowContext, as_turn: bool, others: frozenset[str] = frozenset()
) -> Prompt[str] | Prompt[Messages]:
    """The prompt of a row.

    Args:
        ctx: gets the columns that are not read.
        as_turn: whether a text is a user's turn; else it stays text.
        others: columns that somebody else reads.
    Raises:
        RowError: for a row without a prompt, or with one that cannot be used.
    """
    row = ctx.without_ignored(row)
    column = next((name for name in COLUMNS if is_set(row.get(name))), None)
    if column is None:
        seen = ", ".join(sorted(map(repr, row))[:20]) or "none"
        raise ctx.error("no-prompt", f"columns {seen} hold no prompt: one of {', '.join(COLUMNS)} must be set")
    content = _content(row, column, as_turn, ctx)
    read = {column, *TEXTS.get(column, ()), "history", *others}
    if isinstance(content, str):
        _check_others(row, row.keys() - read, ctx)
        return Prompt(content, ctx.origin)
    _check_others(row, row.keys() - read.union(CHAT_COLUMNS), ctx)
    return with_chat_columns(Prompt(content, ctx.origin), row, ctx)


def _content(row: Row, column: str, as_turn: bool, ctx: RowContext) -> str | Messages:
    if column in MESSAGES or not isinstance(row[column], str):
        return _asked(read_messages(row[column], column, ctx), column, ctx)
    turns = read_prompt(row, ctx, TEXTS[column])
    return turns if as_turn or len(turns) > 1 else turns[0].content


def _asked(messages: Messages, column: str, ctx: RowContext) -> Messages:
    """The turns before the answer that a row to train on ends in."""
    asked = messages
    while asked and asked[-1].role == "assistant":
        asked = asked[:-1]
    if not asked:
        raise ctx.error("no-prompt", f"{column} has no turn that asks for an answer")
    if len(asked) < len(messages):
        ctx.column_status[f"{column} (the last answer)"] = NOT_READ
    return asked


def _check_others(row: Row, unread: set[str], ctx: RowContext) -> None:
    ctx.column_status.update({name: NOT_READ for name in row if name in unread & ABOUT_ANSWERS and is_set(row[name])})
    check_unread(row, unread - ABOUT_ANSWERS, {}, ctx)
