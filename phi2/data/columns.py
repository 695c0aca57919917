"""What becomes of every column of a row and every key of a message: read, refused, or counted.

A format reads its own columns. Of the others, those in `REFUSED_COLUMNS` change what a model should have seen or
learnt, and a row in which one is set is refused; so it is with the keys of a message in `REFUSED_KEYS`. Whatever else a
row holds is counted. Null, empty text and empty lists are not set. A person who knows says so: what `ignore_columns`
names is left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from phi2.data.records import Origin, RowError

MAX_DEPTH = 50  # of what a row gives to the chat template; parameters of a tool are about ten deep
NOT_READ, KEPT, IGNORED = "not read", "kept for the loss and reports", "ignored as asked"
COLUMN_STATUSES = (NOT_READ, KEPT, IGNORED)  # of what a format does not read, in rows that are used

SYSTEM = {name: "the system turn, first of the conversation" for name in ("system", "system_prompt", "system_message")}
VARIABLES = {
    "tools": "the tools that the assistant may call, a variable of the chat template",
    "documents": "documents to answer from, a variable of the chat template",
    "chat_template_kwargs": "further variables of the chat template",
}
MEDIA = {name: "not text" for name in ("image", "images", "video", "videos", "audio", "audios")}
REASONING = {name: "what the assistant thought" for name in ("reasoning_content", "thinking", "reasoning")}
APPROVAL = {  # harmless where they approve: 1, or true
    "label": "whether the answer is a good one",
    "kto_tag": "whether the answer is a good one",
    "train": "whether the row is learnt",
    "weight": "how much of the row is learnt",
}
MASKS = {name: "which tokens are learnt" for name in ("loss_mask", "completion_mask", "assistant_masks", "labels")}
REFUSED_COLUMNS = {
    **SYSTEM,
    "history": "earlier questions and answers, turns of the conversation",
    "context": "a text that the question is about",
    **VARIABLES,
    "functions": "the tools that the assistant may call, as OpenAI wrote them before 2024",
    "function_call": "which tool the assistant must call",
    **MEDIA,
    **REASONING,
    **APPROVAL,
    **MASKS,
}
LOSS_COLUMNS = ("label", "kto_tag", "weight")  # beside answers a number is kept for the loss, which may look at it

CONTENT_KEYS = {"role": "who speaks", "content": "the words", "from": "who speaks", "value": "the words"}
TRAIN_KEYS = {"weight": "0 keeps the turn out of the loss", "train": "false keeps the turn out of the loss"}
NAME_KEYS = {"name": "who speaks, or which tool", "tool_call_id": "which call this answers"}
TEMPLATE_KEYS = {  # read by the chat template; what matters is refused where it does not read it, NAMES are counted
    **NAME_KEYS,
    "tool_calls": "the tools that the assistant calls",
    "function_call": "the tool that the assistant calls, as OpenAI wrote it before 2024",
    "refusal": "what the assistant says in place of an answer",
    **REASONING,
}
REFUSED_KEYS = {
    **MEDIA,
    "loss_mask": "which words are learnt",
    "train_detail": "which words are learnt",
}


@dataclass(slots=True)
class RowContext:
    """One row while it is read.

    Attributes:
        origin: where the row came from.
        ignore: columns and keys of messages to leave out.
        column_status: what the format does not read, by name -> one of `COLUMN_STATUSES`; a key of a message has its
            column before it.
    """

    origin: Origin
    ignore: frozenset[str]
    column_status: dict[str, str]

    def error(self, rule: str, reason: str) -> RowError:
        return RowError(self.origin, rule, reason)

    def unread_error(self, name: str, meaning: str, where: str) -> RowError:
        """The error for a column or key that matters and is not read."""
        reason = f"{name!r} ({meaning}) is not read {where}; a run that may do without it names it in ignore_columns"
        return RowError(self.origin, "not-read", reason)

    def without_ignored(self, row: Mapping[str, Any], prefix: str = "") -> Mapping[str, Any]:
        """The row without the columns to ignore; `prefix` stands before their names in `column_status`."""
        if not self.ignore or self.ignore.isdisjoint(row):
            return row
        left_out = [name for name in row if name in self.ignore and is_set(row[name])]
        self.column_status.update({f"{prefix}{name}": IGNORED for name in left_out})
        return {name: value for name, value in row.items() if name not in self.ignore}


def is_set(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, list, tuple, dict)) and not value)


def check_unread(
    row: Mapping[str, Any], unread: Collection[str], kept: Mapping[str, Any], ctx: RowContext, prefix: str = ""
) -> None:
    """Refuses or counts the columns that are set and not read.

    Args:
        unread: the columns that the format does not read.
        kept: columns that a record of answers keeps for losses and reports.
        prefix: stands before the names, where the row is part of another.

    Raises:
        RowError: for a column in `REFUSED_COLUMNS`.
    """
    for name, value in row.items() if unread else ():
        if name not in unread or not is_set(value):
            continue
        if name in REFUSED_COLUMNS and not _is_harmless(name, value, kept):
            where = "beside texts, only beside messages" if name in SYSTEM or name in VARIABLES else "here"
            raise ctx.unread_error(name, REFUSED_COLUMNS[name], where)
        ctx.column_status[f"{prefix}{name}"] = KEPT if name in kept else NOT_READ


def _is_harmless(name: str, value: Any, kept: Mapping[str, Any]) -> bool:
    approves = name in APPROVAL and isinstance(value, int | float) and value == 1
    return approves or (name in LOSS_COLUMNS and isinstance(kept.get(name), float))


def template_variables(row: Mapping[str, Any], ctx: RowContext) -> dict[str, Any] | None:
    """What a row gives to the chat template besides its messages; lists may be JSON in a text.

    Raises:
        RowError: for values that are not what they should be.
    """
    variables = {name: row[name] for name in VARIABLES if is_set(row.get(name))}
    if not variables:
        return None
    variables = {name: from_json(value, name, ctx) for name, value in variables.items()}
    kwargs = variables.pop("chat_template_kwargs", {})
    if not isinstance(kwargs, Mapping):
        raise bad_value("chat_template_kwargs", "an object", kwargs, ctx)
    for name, value in variables.items():
        require_objects(value, name, ctx)
    given = {**ctx.without_ignored(kwargs, "chat_template_kwargs."), **variables}
    return {name: require_plain(value, name, ctx) for name, value in given.items() if is_set(value)} or None


def from_json(value: Any, name: str, ctx: RowContext) -> Any:
    """A list or an object; data sets with one type a column write them as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise bad_value(name, "JSON", value, ctx) from None


def require_objects(value: Any, name: str, ctx: RowContext) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise bad_value(name, "a list of objects", value, ctx)


def bad_value(name: str, allowed: str, value: Any, ctx: RowContext) -> RowError:
    return ctx.error(f"bad-{name.replace('_', '-')}", f"{name} must be {allowed}, got {str(value)[:40]!r}")


def require_unicode(text: str, name: str, ctx: RowContext) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ctx.error("bad-unicode", f"{name} holds half of a surrogate pair") from None
    return text


def require_plain(value: Any, name: str, ctx: RowContext, depth: int = 0) -> Any:
    """A value for the chat template, unless no tokenizer could read its texts, or no template so deep a nesting."""
    if depth > MAX_DEPTH:
        raise ctx.error("too-deep", f"{name} holds lists and objects more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return require_unicode(value, name, ctx)
    parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    for part in parts if isinstance(parts, list | tuple) else ():
        require_plain(part, name, ctx, depth + 1)
    return value
