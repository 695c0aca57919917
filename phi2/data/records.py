"""The canonical rows: whatever columns a data set uses, a row becomes one of four shapes.

`Chat` is a conversation, `Plain` is text after an optional prompt, `Pair` is a chosen and a rejected answer to one
prompt, `Unpaired` is one answer with a thumb up or down. `FORMATS` is the whole list of row layouts that are
understood: the columns that must be there, and the function that reads them. Detection walks that table from the top,
so the layouts with more columns stand before those with fewer.

A row that cannot be trained on is refused with a `RowError`. Its `rule` is a short slug, so that a loader can drop the
row and count it: one bad row in a million is a line of the audit, not the end of the run. The order of turns is not
policed (two user turns or several tool results in a row are real data). What is policed is that there is an answer to
learn from, and that the assistant gives it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

KINDS = ("supervised", "preference", "unpaired")
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
END_MARKERS = ("<|im_end|>", "<|endoftext|>")
MAX_LABEL_CHARS = 64  # a longer string is a text, not a label; keeping those would double the memory of a data set


class Message(NamedTuple):
    """One turn. `role` is system, user, assistant or tool; with `train` False the turn is never in the loss."""

    role: str
    content: str
    train: bool = True


class Origin(NamedTuple):
    """Where a row came from, for error messages: the file and the 1-based row (the line, in a file of JSON lines)."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file} row {self.row}"


class RowError(ValueError):
    """A row that cannot be used: `origin` says which one, `rule` is the slug of the rule it breaks."""

    def __init__(self, origin: Origin, rule: str, reason: str):
        super().__init__(f"{origin}: {reason} [{rule}]")
        self.origin = origin
        self.rule = rule


Turns = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that ends with the assistant; the assistant turns to train on are not empty."""

    messages: Turns
    origin: Origin


@dataclass(frozen=True, slots=True)
class Plain:
    """Text as it stands, no template: `completion` is learnt after `prompt`, which is "" in rows of running text."""

    prompt: str
    completion: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, all three texts or all three messages. The answers hold only what follows the prompt.

    `columns` has the row's other numbers as floats (scores, ratings, weights, margins) and its short strings (such as
    `source_dataset`), for losses and reports.
    """

    prompt: str | Turns
    chosen: str | Turns
    rejected: str | Turns
    origin: Origin
    columns: dict[str, float | str]


@dataclass(frozen=True, slots=True)
class Unpaired:
    """One answer and whether it is a good one: prompt and completion are both texts or both messages."""

    prompt: str | Turns
    completion: str | Turns
    label: bool
    origin: Origin


Record = Chat | Plain | Pair | Unpaired
Row = Mapping[str, Any]


def detect_format(row: Row, kind: str | None = None) -> str:
    """The name in `FORMATS` of this row's layout; a column whose value is None counts as absent.

    Args:
        row: column name -> value.
        kind: one of `KINDS`, to look only among the layouts of that kind; some rows can be read as two kinds.

    Raises:
        ValueError: if no layout fits; the message lists the columns seen and the layouts known.
    """
    name = _match(row, kind)
    if name is None:
        raise ValueError(_unknown_format(row, kind))
    return name


def parse_row(row: Row, origin: Origin, format: str | None = None, kind: str | None = None) -> Record:
    """Reads one row of a data set.

    Args:
        row: column name -> value, as it comes out of JSON or parquet.
        origin: where the row came from; kept in the record and named in errors.
        format: a name in `FORMATS`; None detects it from the columns.
        kind: one of `KINDS`, what detection may choose from; None means any.

    Raises:
        RowError: if no layout fits or the row breaks a rule.
        ValueError: if `format` is not a name in `FORMATS`.
    """
    name = format or _match(row, kind)
    if name is None:
        raise RowError(origin, "unknown-format", _unknown_format(row, kind))
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    for column in FORMATS[name].required:
        if row.get(column) is None:
            raise RowError(origin, "missing-column", f"format {name} needs the column {column!r}")
    return FORMATS[name].parse(row, origin)


def _match(row: Row, kind: str | None) -> str | None:
    present = {column for column, value in row.items() if value is not None}
    for name, layout in FORMATS.items():
        if kind in (None, layout.kind) and present.issuperset(layout.required):
            return name
    return None


def _unknown_format(row: Row, kind: str | None) -> str:
    seen = ", ".join(sorted(repr(column) for column in row)[:20]) or "none"
    other = _match(row, None)
    hint = f" (they make {FORMATS[other].kind} data, {other})" if other else ""
    known = "; ".join(f"{n}: {'+'.join(f.required)}" for n, f in FORMATS.items() if kind in (None, f.kind))
    return f"columns {seen}{hint} fit no {kind or 'known'} format; known are {known}"


def _text(value: Any, name: str, origin: Origin) -> str:
    if not isinstance(value, str):
        raise RowError(origin, "not-text", f"{name} must be text, got {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(origin, "bad-unicode", f"{name} holds half of a surrogate pair") from None
    return value


def _turn(value: Any, name: str, origin: Origin) -> Message:
    """One turn, in OpenAI's names (role, content) or ShareGPT's (from, value); `weight` 0 keeps it out of the loss."""
    if not isinstance(value, Mapping):
        raise RowError(origin, "not-a-message", f"a turn of {name} must be an object, got {type(value).__name__}")
    keys = ("role", "content") if value.get("role") is not None else ("from", "value")
    role, content, weight = value.get(keys[0]), value.get(keys[1]), value.get("weight")
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(origin, "unknown-role", f"role must be one of {', '.join(ROLES)}, got {str(role)[:40]!r}")
    if weight is not None and not (isinstance(weight, Real) and weight in (0, 1)):
        raise RowError(origin, "bad-weight", f"the weight of a turn must be 0 or 1, got {str(weight)[:40]!r}")
    return Message(ROLES[role], _text(content, f"the content of a turn of {name}", origin), weight != 0)


def _turns(value: Any, name: str, origin: Origin, speaker: str = "") -> Turns:
    """A list of turns; a lone turn is a list of one, and where `speaker` is given a text is that role's turn."""
    if speaker and isinstance(value, str):
        return (Message(speaker, _text(value, name, origin)),)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RowError(origin, "not-a-list", f"{name} must be a list of messages, got {type(value).__name__}")
    if not value:
        raise RowError(origin, "no-messages", f"{name} is an empty list")
    return tuple(_turn(turn, name, origin) for turn in value)


def _opening(row: Row, origin: Origin, asks: tuple[str, ...]) -> Turns:
    """The turns before the answer where they have columns: a system text if there is one, and the user's request."""
    system = _text(row.get("system") or "", "system", origin)
    parts = [_text(row[column], column, origin) for column in asks if row.get(column) is not None]
    user = Message("user", "\n\n".join(part for part in parts if part))
    return (Message("system", system), user) if system.strip() else (user,)


def _require_answer(text: str, name: str, origin: Origin) -> None:
    for marker in END_MARKERS:
        text = text.replace(marker, "")
    if not text.strip():
        raise RowError(origin, "empty-answer", f"{name} is empty")


def _require_last_assistant(messages: Turns, origin: Origin) -> None:
    if not any(turn.role == "assistant" for turn in messages):
        raise RowError(origin, "no-assistant", "no turn is the assistant's")
    if messages[-1].role != "assistant":
        raise RowError(origin, "last-role", f"the last turn must be the assistant's, got {messages[-1].role}")


def _chat(messages: Turns, origin: Origin) -> Chat:
    _require_last_assistant(messages, origin)
    answers = [turn for turn in messages if turn.role == "assistant" and turn.train]
    if not answers:
        raise RowError(origin, "nothing-to-train", "every assistant turn has weight 0")
    for turn in answers:
        _require_answer(turn.content, "an assistant turn", origin)
    return Chat(messages, origin)


def _plain(prompt: str, completion: str, name: str, origin: Origin) -> Plain:
    record = Plain(_text(prompt, "prompt", origin), _text(completion, name, origin), origin)
    _require_answer(completion, name, origin)
    return record


def _read_chat(row: Row, origin: Origin, column: str) -> Chat:
    return _chat(_turns(row[column], column, origin), origin)


def _read_prompt_completion(row: Row, origin: Origin) -> Plain | Chat:
    """Two texts stay texts; messages become a chat in which the prompt's assistant turns are context, not targets."""
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return _plain(row["prompt"], row["completion"], "completion", origin)
    prompt = _turns(row["prompt"], "prompt", origin, speaker="user")
    context = tuple(turn._replace(train=turn.train and turn.role != "assistant") for turn in prompt)
    return _chat(context + _turns(row["completion"], "completion", origin, speaker="assistant"), origin)


def _read_reply(row: Row, origin: Origin, asks: tuple[str, ...], answer: str) -> Chat:
    return _chat((*_opening(row, origin, asks), Message("assistant", _text(row[answer], answer, origin))), origin)


def _read_text(row: Row, origin: Origin) -> Plain:
    return _plain("", row["text"], "text", origin)


def _read_prompt_pair(row: Row, origin: Origin) -> Pair:
    texts = row["prompt"], row["chosen"], row["rejected"]
    if all(isinstance(text, str) for text in texts):
        return _text_pair(row, *texts, origin)
    return _message_pair(row, _turns(row["prompt"], "prompt", origin, speaker="user"), origin)


def _read_sharegpt_pair(row: Row, origin: Origin) -> Pair:
    return _message_pair(row, _turns(row["conversations"], "conversations", origin), origin)


def _read_reply_pair(row: Row, origin: Origin, asks: tuple[str, ...], answers=("chosen", "rejected")) -> Pair:
    return _message_pair(row, _opening(row, origin, asks), origin, answers)


def _read_bare_pair(row: Row, origin: Origin) -> Pair:
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        raise RowError(origin, "no-prompt", "two texts do not tell where the prompt ends: a column 'prompt' is needed")
    return _message_pair(row, (), origin)


def _text_pair(row: Row, prompt: str, chosen: str, rejected: str, origin: Origin) -> Pair:
    texts = (_text(text, "a text of the pair", origin) for text in (prompt, chosen, rejected))
    pair = Pair(*texts, origin, _columns(row))
    if not prompt:
        raise RowError(origin, "no-prompt", "prompt is empty")
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        raise RowError(origin, "prompt-repeated", "chosen and rejected must not begin with the prompt again")
    if chosen == rejected:
        raise RowError(origin, "same-answers", "chosen and rejected are equal")
    _require_answer(chosen, "chosen", origin)
    _require_answer(rejected, "rejected", origin)
    return pair


def _message_pair(row: Row, prompt: Turns, origin: Origin, answers: tuple[str, str] = ("chosen", "rejected")) -> Pair:
    """Divides a pair at the first message that differs: what the two share is prompt, whichever column it was in."""
    chosen, rejected = (_turns(row[column], column, origin, speaker="assistant") for column in answers)
    shared = _shared_prefix(chosen, rejected)
    if chosen == rejected:
        raise RowError(origin, "same-answers", "chosen and rejected are equal")
    if chosen[0].role == "assistant":
        prompt += chosen[:shared]
    elif {_spoken(turn) for turn in prompt} <= {_spoken(turn) for turn in chosen[:shared]}:
        prompt = chosen[:shared]  # the answers carry the prompt in front, and the prompt's own column only repeats it
    else:
        raise RowError(origin, "prompt-mismatch", "chosen and rejected begin with other turns than the prompt")
    if not prompt:
        raise RowError(origin, "no-prompt", "chosen and rejected share no first turn, so there is no prompt")
    for turns, name in zip((chosen, rejected), answers, strict=True):
        _require_answers(turns[shared:], name, origin)
    return Pair(prompt, chosen[shared:], rejected[shared:], origin, _columns(row))


def _shared_prefix(first: Turns, second: Turns) -> int:
    same = [a == b for a, b in zip(first, second, strict=False)]
    return same.index(False) if False in same else len(same)


def _spoken(turn: Message) -> tuple[str, str]:
    return turn.role, turn.content.strip()


def _require_answers(turns: Turns, name: str, origin: Origin) -> None:
    """All that is left after the prompt is scored by the loss, so all of it must be the assistant's words."""
    if not turns:
        raise RowError(origin, "answer-is-prefix", f"{name} is only the beginning of the other answer")
    if any(turn.role != "assistant" for turn in turns):
        raise RowError(origin, "mixed-answer", f"after the prompt {name} has turns that are not the assistant's")
    for turn in turns:
        _require_answer(turn.content, name, origin)


def _columns(row: Row) -> dict[str, float | str]:
    kept: dict[str, float | str] = {}
    for name, value in row.items():
        if name in _PAIR_TEXTS:
            continue
        if isinstance(value, str) and len(value) <= MAX_LABEL_CHARS:
            kept[name] = value
        elif isinstance(value, Real) and abs(value) <= sys.float_info.max:  # neither NaN nor infinite
            kept[name] = float(value)
    return kept


def _read_messages_label(row: Row, origin: Origin) -> Unpaired:
    messages = _turns(row["messages"], "messages", origin)
    _require_last_assistant(messages, origin)
    return _unpaired(row, messages[:-1], messages[-1:], origin)


def _read_prompt_completion_label(row: Row, origin: Origin) -> Unpaired:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _unpaired(row, _text(prompt, "prompt", origin), _text(completion, "completion", origin), origin)
    turns = _turns(completion, "completion", origin, speaker="assistant")
    return _unpaired(row, _turns(prompt, "prompt", origin, speaker="user"), turns, origin)


def _unpaired(row: Row, prompt: str | Turns, completion: str | Turns, origin: Origin) -> Unpaired:
    if not isinstance(row["label"], bool):
        raise RowError(origin, "bad-label", f"label must be true or false, got {str(row['label'])[:40]!r}")
    if not prompt:
        raise RowError(origin, "no-prompt", "there is nothing before the answer")
    if isinstance(completion, str):
        _require_answer(completion, "completion", origin)
    else:
        _require_answers(completion, "completion", origin)
    return Unpaired(prompt, completion, row["label"], origin)


class Format(NamedTuple):
    """One row layout: the kind of training it serves, the columns it must have, and its parser."""

    kind: str
    required: tuple[str, ...]
    parse: Callable[[Row, Origin], Record]


_ALPACA = ("instruction", "input")  # the second is optional in all of its layouts
_math_pair = partial(_read_reply_pair, asks=_ALPACA, answers=("chosen_response", "rejected_response"))
FORMATS = {
    "prompt-pair": Format("preference", ("prompt", "chosen", "rejected"), _read_prompt_pair),
    "sharegpt-pair": Format("preference", ("conversations", "chosen", "rejected"), _read_sharegpt_pair),
    "alpaca-pair": Format("preference", ("instruction", "chosen", "rejected"), partial(_read_reply_pair, asks=_ALPACA)),
    "math-pair": Format("preference", ("instruction", "chosen_response", "rejected_response"), _math_pair),
    "orca-pair": Format("preference", ("input", "chosen", "rejected"), partial(_read_reply_pair, asks=("input",))),
    "qa-pair": Format("preference", ("question", "chosen", "rejected"), partial(_read_reply_pair, asks=("question",))),
    "bare-pair": Format("preference", ("chosen", "rejected"), _read_bare_pair),
    "messages-label": Format("unpaired", ("messages", "label"), _read_messages_label),
    "prompt-completion-label": Format("unpaired", ("prompt", "completion", "label"), _read_prompt_completion_label),
    "messages": Format("supervised", ("messages",), partial(_read_chat, column="messages")),
    "conversations": Format("supervised", ("conversations",), partial(_read_chat, column="conversations")),
    "prompt-completion": Format("supervised", ("prompt", "completion"), _read_prompt_completion),
    "alpaca": Format("supervised", ("instruction", "output"), partial(_read_reply, asks=_ALPACA, answer="output")),
    "gpteacher": Format(
        "supervised", ("instruction", "response"), partial(_read_reply, asks=_ALPACA, answer="response")
    ),
    "qa": Format("supervised", ("question", "answer"), partial(_read_reply, asks=("question",), answer="answer")),
    "text": Format("supervised", ("text",), _read_text),
}
# what the pair itself is made of; every other column of a row is about the pair
_PAIR_TEXTS = {c for layout in FORMATS.values() if layout.kind == "preference" for c in layout.required} | {"system"}
