"""Row layouts: which columns make a row, and which other columns it may have.

`FORMATS` is the whole list of layouts that are understood. Detection walks it from the top, so the layouts with more
columns stand before those with fewer. Rows that are messages take a system text and the variables of the chat template
from columns of their own, whatever their layout. `docs/formats.md` is these tables, written by
`python -m phi2.data.formats`.

The order of turns is not policed (two user turns or several tool results in a row are real data). What is policed is
that there is an answer to learn from, and that the assistant gives it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import NamedTuple, TypeVar

from phi2.data import columns, readers
from phi2.data.columns import REFUSED_COLUMNS, SYSTEM, VARIABLES, RowContext, check_unread, is_set, template_variables
from phi2.data.messages import ROLES, read_text
from phi2.data.records import (
    KINDS,
    Chat,
    Conversational,
    Message,
    Messages,
    Origin,
    Preference,
    Prompt,
    Record,
    Row,
    is_conversational,
)
from phi2.keywords import plain_number

Asking = TypeVar("Asking", bound=Conversational | Prompt[Messages])  # what may have a system text
FLOAT_MAX = sys.float_info.max
MAX_LABEL_CHARS = 64  # a longer string is a text, not a label; keeping those would double the memory of a data set


class Format(NamedTuple):
    """One row layout.

    Attributes:
        kind: the training it serves, one of `KINDS`.
        required: columns it must have.
        parse: reads them.
        optional: columns it also reads.
        talks: whether its rows are conversations, which read the columns of every conversation; None where it depends
            on the row, which is one when its texts are messages.
    """

    kind: str
    required: tuple[str, ...]
    parse: Callable[[Row, RowContext], Record]
    optional: tuple[str, ...] = ()
    conversational: bool | None = True


_supervised, _preference = (partial(Format, kind) for kind in KINDS)
# what was asked, in the order in which it is put together; the first is what the question is about
_PROMPT, _OPTIONAL = ("context", "instruction", "input"), ("context", "history")
_OPTIONAL_INPUT = ("input", *_OPTIONAL)
_instruction, _pair = readers.read_instruction, readers.read_instruction_pair
_alpaca_pair = partial(_pair, prompt=_PROMPT)
_math_pair = partial(_alpaca_pair, answers=("chosen_response", "rejected_response"))
_alpaca_kto = partial(readers.read_instruction_label, prompt=_PROMPT, answer="output", label="kto_tag")
_messages_pair, _messages_label = readers.read_messages_pair, readers.read_messages_label
_scored, _rated = readers.read_scored_answers, readers.read_rated_answers
FORMATS = {
    "gold-pair": _preference(
        ("prompt", "chosen", "rejected", "reference"), readers.read_gold_pair, conversational=None
    ),
    "prompt-pair": _preference(("prompt", "chosen", "rejected"), readers.read_prompt_pair, conversational=None),
    "sharegpt-pair": _preference(
        ("conversations", "chosen", "rejected"), partial(_messages_pair, column="conversations")
    ),
    "alpaca-pair": _preference(("instruction", "chosen", "rejected"), _alpaca_pair, _OPTIONAL_INPUT),
    "math-pair": _preference(("instruction", "chosen_response", "rejected_response"), _math_pair, _OPTIONAL_INPUT),
    "orca-pair": _preference(("input", "chosen", "rejected"), partial(_pair, prompt=("context", "input")), _OPTIONAL),
    "qa-pair": _preference(
        ("question", "chosen", "rejected"), partial(_pair, prompt=("context", "question")), _OPTIONAL
    ),
    "openai-pair": _preference(("input", "preferred_output", "non_preferred_output"), readers.read_openai_pair),
    "messages-pair": _preference(("messages", "chosen", "rejected"), partial(_messages_pair, column="messages")),
    "bare-pair": _preference(("chosen", "rejected"), readers.read_bare_pair),
    "messages-label": _preference(("messages", "label"), partial(_messages_label, column="messages", label="label")),
    "messages-kto": _preference(("messages", "kto_tag"), partial(_messages_label, column="messages", label="kto_tag")),
    "sharegpt-kto": _preference(
        ("conversations", "kto_tag"), partial(_messages_label, column="conversations", label="kto_tag")
    ),
    "alpaca-kto": _preference(("instruction", "output", "kto_tag"), _alpaca_kto, _OPTIONAL_INPUT),
    "prompt-completion-label": _preference(
        ("prompt", "completion", "label"), readers.read_prompt_completion_label, conversational=None
    ),
    "scored-answers": _preference(
        ("prompt", "completions", "scores"), partial(_scored, scores="scores"), conversational=None
    ),
    "ranked-answers": _preference(
        ("prompt", "completions", "ranks"), partial(_scored, scores="ranks", sign=-1), conversational=None
    ),
    "rated-answers": _preference(("instruction", "completions"), partial(_rated, prompt=_PROMPT), _OPTIONAL_INPUT),
    "messages": _supervised(("messages",), partial(readers.read_chat, column="messages")),
    "conversations": _supervised(("conversations",), partial(readers.read_chat, column="conversations")),
    "prompt-completion": _supervised(("prompt", "completion"), readers.read_prompt_completion, conversational=None),
    "alpaca": _supervised(
        ("instruction", "output"), partial(_instruction, prompt=_PROMPT, answer="output"), _OPTIONAL_INPUT
    ),
    "gpteacher": _supervised(
        ("instruction", "response"), partial(_instruction, prompt=_PROMPT, answer="response"), _OPTIONAL_INPUT
    ),
    "qa": _supervised(
        ("question", "answer"), partial(_instruction, prompt=("context", "question"), answer="answer"), _OPTIONAL
    ),
    "text": _supervised(("text",), readers.read_running_text, conversational=False),
}
CHAT_COLUMNS = (*SYSTEM, *VARIABLES)
_CHAT = frozenset(CHAT_COLUMNS)
# what answers are made of in some format; every other column of a row is about them, and so is a judgement
_JUDGEMENTS = {"label", "kto_tag", "scores", "ranks"}
_TEXTS = {name for f in FORMATS.values() if f.kind == "preference" for name in f.required} - _JUDGEMENTS


def columns_read(name: str, conversational: bool) -> frozenset[str]:
    """The columns that a format reads; `conversational` is whether the row is a conversation."""
    layout = FORMATS[name]
    return frozenset((*layout.required, *layout.optional, *(CHAT_COLUMNS if conversational else ())))


_REQUIRED = {
    kind: [(name, frozenset(f.required)) for name, f in FORMATS.items() if kind in (None, f.kind)]
    for kind in (None, *KINDS)
}
_READ = {(name, chat): columns_read(name, chat) for name in FORMATS for chat in (False, True)}


def detect_format(row: Row, kind: str | None = None) -> str:
    """The name in `FORMATS` of this row's layout; a column whose value is None counts as absent.

    Args:
        row: column name -> value.
        kind: one of `KINDS`, to look only among the layouts of that kind; some rows can be read as two kinds.

    Raises:
        ValueError: if no layout fits; the message lists the columns seen and the layouts known.
    """
    name = _match(row, _present(row), kind)
    if name is None:
        raise ValueError(_unknown_format(row, kind))
    return name


def parse_row(
    row: Row,
    origin: Origin,
    format: str | None = None,
    kind: str | None = None,
    ignore: frozenset[str] = frozenset(),
    column_status: dict[str, str] | None = None,
) -> Record:
    """Reads one row of a data set.

    Args:
        row: column name -> value, as it comes out of JSON or parquet.
        origin: where the row came from; kept in the record and named in errors.
        format: a name in `FORMATS`; None detects it from the columns.
        kind: one of `KINDS`, what detection may choose from; None means any.
        ignore: columns, and keys of messages, that are left out.
        column_status: gets the columns and keys that the format does not read, name -> one of `COLUMN_STATUSES`.

    Raises:
        RowError: if no layout fits or the row breaks a rule.
        ValueError: if `format` is not a name in `FORMATS`.
    """
    ctx = RowContext(origin, ignore, {} if column_status is None else column_status)
    row = ctx.without_ignored(row)
    present = _present(row)
    name = format or _match(row, present, kind)
    if name is None:
        raise ctx.error("unknown-format", _unknown_format(row, kind))
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    for column in FORMATS[name].required:
        if row.get(column) is None:
            raise ctx.error("missing-column", f"format {name} needs the column {column!r}")
    record = FORMATS[name].parse(row, ctx)
    if is_conversational(record) and not _CHAT.isdisjoint(present):
        record = with_chat_columns(record, row, ctx)
    read, kept = _READ[name, is_conversational(record)], {}
    if isinstance(record, Preference):
        record.columns.update(_kept_columns(row, _TEXTS.union(CHAT_COLUMNS, read)))
        kept = record.columns
    check_unread(row, present - read, kept, ctx)
    return record


def _present(row: Row) -> set[str]:
    return {column for column, value in row.items() if value is not None}


def _match(row: Row, present: set[str], kind: str | None) -> str | None:
    """The first layout whose columns are there; one that would have to do with an empty list only if no other fits."""
    name = _first_match(present, kind)
    if name is None or all(is_set(row[column]) for column in FORMATS[name].required):
        return name
    filled = {column for column in present if is_set(row[column]) or row[column] == ""}  # an empty text is a bad row
    return _first_match(filled, kind) or name


def _first_match(present: set[str], kind: str | None) -> str | None:
    return next((name for name, required in _REQUIRED.get(kind, ()) if required <= present), None)


def _unknown_format(row: Row, kind: str | None) -> str:
    seen = ", ".join(sorted(repr(column) for column in row)[:20]) or "none"
    other = _match(row, _present(row), None)
    hint = f" (they make {FORMATS[other].kind} data, {other})" if other else ""
    known = "; ".join(f"{n}: {'+'.join(f.required)}" for n, f in FORMATS.items() if kind in (None, f.kind))
    return f"columns {seen}{hint} fit no {kind or 'known'} format; known are {known}"


def _kept_columns(row: Row, texts: Collection[str]) -> dict[str, float | str]:
    """What is kept for losses and reports: numbers and short texts, but of what answers are made."""
    kept: dict[str, float | str] = {}
    for name, value in row.items():
        if name in texts:
            continue
        value = plain_number(value)
        if isinstance(value, str) and len(value) <= MAX_LABEL_CHARS:
            kept[name] = value
        elif isinstance(value, Real) and value <= FLOAT_MAX and not value < -FLOAT_MAX:  # neither NaN nor infinite
            kept[name] = float(value)
    return kept


def with_chat_columns(record: Asking, row: Row, ctx: RowContext) -> Asking:
    """The record with the system text and the template's variables that have columns of their own."""
    system, variables = _system_text(row, ctx), template_variables(row, ctx)
    if system:
        if isinstance(record, Chat):
            record = replace(record, messages=_with_system(record.messages, system, ctx))
        else:
            record = replace(record, prompt=_with_system(record.prompt, system, ctx))
    return replace(record, variables={**(record.variables or {}), **variables}) if variables else record


def _system_text(row: Row, ctx: RowContext) -> str:
    texts = {name: read_text(row[name], name, ctx) for name in SYSTEM if is_set(row.get(name))}
    texts = {name: text for name, text in texts.items() if text.strip()}
    if len({text.strip() for text in texts.values()}) > 1:
        raise ctx.error("two-systems", f"{' and '.join(texts)} differ, and a conversation has one system text")
    return next(iter(texts.values()), "")


def _with_system(messages: Messages, system: str, ctx: RowContext) -> Messages:
    """The turns behind a system turn; a conversation that brings its own keeps it, if the two are the same."""
    own = [message.content.strip() for message in messages if message.role == "system"]
    if own and system.strip() not in own:
        raise ctx.error("two-systems", "the system column differs from the system turn of the conversation")
    return messages if own else (Message("system", system), *messages)


def document() -> str:
    """The tables of formats and columns in Markdown: `docs/formats.md`."""
    return (
        "\n\n".join(
            [
                "# What is read of a row",
                "Written by `python -m phi2.data.formats > docs/formats.md` out of the tables that read the rows.",
                "A row has the first of these formats, of the kind that is needed, whose columns it has. Null counts"
                " as absent. A column or a key of a message that stands in none of the tables is counted in the audit;"
                f" of answers, numbers and texts of up to {MAX_LABEL_CHARS} characters are kept for losses, reports.",
                _table(("format", "kind", "columns it needs", "columns it also reads"), map(_format_line, FORMATS)),
                "A rank is a score as its negative: the answer of rank 1 has the score -1.",
                "## Columns of conversations",
                "Read beside messages, in whichever format. openai-pair reads its messages and these in `input` too.",
                _meanings(SYSTEM | VARIABLES, "column"),
                "## Columns that are refused",
                "A row in which one of these is set is refused where its format does not read it, and where"
                f" {', '.join(columns.APPROVAL)} is not 1 or true. `ignore_columns` leaves them out. A number in"
                f" {', '.join(columns.LOSS_COLUMNS)} of a pair is kept for the loss.",
                _meanings({c: meaning for c, meaning in REFUSED_COLUMNS.items() if c not in CHAT_COLUMNS}, "column"),
                "## Keys of a message",
                f"Roles: {', '.join(f'{name} (as {role})' if name != role else name for name, role in ROLES.items())}."
                " The words are a text, or a list of parts of type text.",
                _meanings(columns.CONTENT_KEYS | columns.TRAIN_KEYS, "read"),
                _meanings(columns.TEMPLATE_KEYS, "for the chat template"),
                "A row is refused when the chat template does not read one of these that is set, except for"
                f" {' and '.join(columns.NAME_KEYS)}, which are counted then.",
                _meanings(columns.REFUSED_KEYS, "refused"),
            ]
        )
        + "\n"
    )


def _format_line(name: str) -> tuple[str, ...]:
    layout = FORMATS[name]
    chat = {True: ["those of conversations"], None: ["those of conversations where its texts are messages"], False: []}
    also = ", ".join([*layout.optional, *chat[layout.conversational]])
    return name, layout.kind, ", ".join(layout.required), also


def _meanings(meanings: Mapping[str, str], title: str) -> str:
    return _table((title, "meaning"), meanings.items())


def _table(titles: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *lines))


if __name__ == "__main__":
    print(document(), end="")
