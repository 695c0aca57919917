"""What becomes of every column of a row and every key of a message: read, refused, or counted.

A format reads its own columns. Of the others, those in `COLUMNS` change what a model should have seen or learnt, and a
row in which one is set is refused; so it is with the keys of a message in `KEYS`. Whatever else a row holds is counted.
Null, empty text and empty lists are not set. A person who knows says so: what `ignore_columns` names is left out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from phi2.data.records import Origin, RowError

MAX_DEPTH = 50  # of what a row gives to the chat template; parameters of a tool are about ten deep
NOT_READ, KEPT, IGNORED = "not read", "kept for the loss and reports", "ignored as asked"
FATES = (NOT_READ, KEPT, IGNORED)  # of what a format does not read, in rows that are used

SYSTEM = {name: "the system turn, first of the conversation" for name in ("system", "system_prompt", "system_message")}
VARIABLES = {
    "tools": "the tools that the assistant may call, a variable of the chat template",
    "documents": "documents to answer from, a variable of the chat template",
    "chat_template_kwargs": "further variables of the chat template",
}
MEDIA = {name: "not text" for name in ("image", "images", "video", "videos", "audio", "audios")}
THOUGHTS = {name: "what the assistant thought" for name in ("reasoning_content", "thinking", "reasoning")}
APPROVAL = {  # harmless where they approve: 1, or true
    "label": "whether the answer is a good one",
    "kto_tag": "whether the answer is a good one",
    "train": "whether the row is learnt",
    "weight": "how much of the row is learnt",
}
MASKS = {name: "which tokens are learnt" for name in ("loss_mask", "completion_mask", "assistant_masks", "labels")}
COLUMNS = {
    **SYSTEM,
    "history": "earlier questions and answers, turns of the conversation",
    "context": "a text that the question is about",
    **VARIABLES,
    "functions": "the tools that the assistant may call, as OpenAI wrote them before 2024",
    "function_call": "which tool the assistant must call",
    **MEDIA,
    **THOUGHTS,
    **APPROVAL,
    **MASKS,
}
LOSS_COLUMNS = ("label", "kto_tag", "weight")  # a number in a pair is kept for the loss, which may look at it

SPOKEN = {"role": "who speaks", "content": "the words", "from": "who speaks", "value": "the words"}
LEARNT = {"weight": "0 keeps the turn out of the loss", "train": "false keeps the turn out of the loss"}
NAMES = {"name": "who speaks, or which tool", "tool_call_id": "which call this answers"}
TEMPLATE_KEYS = {  # read by the chat template; what matters is refused where it does not read it, NAMES are counted
    **NAMES,
    "tool_calls": "the tools that the assistant calls",
    "function_call": "the tool that the assistant calls, as OpenAI wrote it before 2024",
    "refusal": "what the assistant says in place of an answer",
    **THOUGHTS,
}
KEYS = {
    **MEDIA,
    "loss_mask": "which words are learnt",
    "train_detail": "which words are learnt",
}


class Reading:
    """One row while it is read.

    Attributes:
        origin: where the row came from.
        ignore: columns and keys of messages to leave out.
        fates: what the format does not read, by name -> one of `FATES`; a key of a message has its column before it.
    """

    __slots__ = ("fates", "ignore", "origin")

    def __init__(self, origin: Origin, ignore: frozenset[str], fates: dict[str, str]):
        self.origin = origin
        self.ignore = ignore
        self.fates = fates

    def refused(self, rule: str, reason: str) -> RowError:
        return RowError(self.origin, rule, reason)

    def unread(self, name: str, meaning: str, where: str) -> RowError:
        """The error for a column or key that matters and is not read."""
        reason = f"{name!r} ({meaning}) is not read {where}; a run that may do without it names it in ignore_columns"
        return RowError(self.origin, "not-read", reason)

    def left(self, row: Mapping[str, Any], prefix: str = "") -> Mapping[str, Any]:
        """The row without the columns to ignore; `prefix` stands before their names in `fates`."""
        if not self.ignore or self.ignore.isdisjoint(row):
            return row
        self.fates.update({f"{prefix}{name}": IGNORED for name in row if name in self.ignore and is_set(row[name])})
        return {name: value for name, value in row.items() if name not in self.ignore}


def is_set(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, list, tuple, dict)) and not value)


def account(
    row: Mapping[str, Any], unread: Collection[str], kept: Mapping[str, Any], reading: Reading, prefix: str = ""
) -> None:
    """Refuses or counts the columns that are set and not read.

    Args:
        unread: the columns that the format does not read.
        kept: columns of a pair that its record keeps for losses and reports.
        prefix: stands before the names, where the row is part of another.

    Raises:
        RowError: for a column in `COLUMNS`.
    """
    for name, value in row.items() if unread else ():
        if name not in unread or not is_set(value):
            continue
        if name in COLUMNS and not _is_harmless(name, value, kept):
            beside_texts = name in SYSTEM or name in VARIABLES
            raise reading.unread(name, COLUMNS[name], "beside texts, only beside messages" if beside_texts else "here")
        reading.fates[f"{prefix}{name}"] = KEPT if name in kept else NOT_READ


def _is_harmless(name: str, value: Any, kept: Mapping[str, Any]) -> bool:
    approves = name in APPROVAL and isinstance(value, int | float) and value == 1
    return approves or (name in LOSS_COLUMNS and isinstance(kept.get(name), float))


def template_variables(row: Mapping[str, Any], reading: Reading) -> dict[str, Any] | None:
    """What a row gives to the chat template besides its messages; lists may be JSON in a text.

    Raises:
        RowError: for values that are not what they should be.
    """
    variables = {name: row[name] for name in VARIABLES if is_set(row.get(name))}
    if not variables:
        return None
    variables = {name: from_json(value, name, reading) for name, value in variables.items()}
    kwargs = variables.pop("chat_template_kwargs", {})
    if not isinstance(kwargs, Mapping):
        raise bad_value("chat_template_kwargs", "an object", kwargs, reading)
    for name, value in variables.items():
        require_objects(value, name, reading)
    given = {**reading.left(kwargs, "chat_template_kwargs."), **variables}
    return {name: require_plain(value, name, reading) for name, value in given.items() if is_set(value)} or None


def from_json(value: Any, name: str, reading: Reading) -> Any:
    """A list or an object; data sets with one type a column write them as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise bad_value(name, "JSON", value, reading) from None


def require_objects(value: Any, name: str, reading: Reading) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(item, Mapping) for item in value):
        raise bad_value(name, "a list of objects", value, reading)


def bad_value(name: str, allowed: str, value: Any, reading: Reading) -> RowError:
    return reading.refused(f"bad-{name.replace('_', '-')}", f"{name} must be {allowed}, got {str(value)[:40]!r}")


def require_unicode(text: str, name: str, reading: Reading) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise reading.refused("bad-unicode", f"{name} holds half of a surrogate pair") from None
    return text


def require_plain(value: Any, name: str, reading: Reading, depth: int = 0) -> Any:
    """A value for the chat template, unless no tokenizer could read its texts, or no template so deep a nesting."""
    if depth > MAX_DEPTH:
        raise reading.refused("too-deep", f"{name} holds lists and objects more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return require_unicode(value, name, reading)
    parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    for part in parts if isinstance(parts, list | tuple) else ():
        require_plain(part, name, reading, depth + 1)
    return value
