"""Messages out of rows: in OpenAI's names, in ShareGPT's, as pairs of texts, and as one long text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from numbers import Real
from typing import Any

from phi2.data.columns import (
    IGNORED,
    NOT_READ,
    REFUSED_KEYS,
    TEMPLATE_KEYS,
    RowContext,
    bad_value,
    from_json,
    is_set,
    require_objects,
    require_plain,
    require_unicode,
)
from phi2.data.records import Message, Messages

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "developer": "system",
    "function": "tool",
}
END_MARKERS = ("<|im_end|>", "<|endoftext|>")
SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # of a dialogue written as one text, as in hh-rlhf
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def read_text(value: Any, name: str, ctx: RowContext) -> str:
    if not isinstance(value, str):
        raise ctx.error("not-text", f"{name} must be text, got {type(value).__name__}")
    return require_unicode(value, name, ctx)


def read_messages(value: Any, name: str, ctx: RowContext, role: str = "") -> Messages:
    """A list of turns; a lone turn is a list of one, and where `role` is given a text is that role's turn.

    Args:
        name: the column, for errors and counts.
    """
    if role and isinstance(value, str):
        return (Message(role, read_text(value, name, ctx)),)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list | tuple):
        raise ctx.error("not-a-list", f"{name} must be a list of messages, got {type(value).__name__}")
    if not value:
        raise ctx.error("no-messages", f"{name} is an empty list")
    return tuple(_message(message, name, ctx) for message in value)


def _message(value: Any, name: str, ctx: RowContext) -> Message:
    """One turn, in OpenAI's names (role, content) or ShareGPT's (from, value)."""
    if not isinstance(value, Mapping):
        raise ctx.error("not-a-message", f"a turn of {name} must be an object, got {type(value).__name__}")
    names = ("role", "content") if value.get("role") is not None else ("from", "value")
    role, content = value.get(names[0]), value.get(names[1])
    if not isinstance(role, str) or role not in ROLES:
        raise ctx.error("unknown-role", f"role must be one of {', '.join(ROLES)}, got {str(role)[:40]!r}")
    train, extra = True, None
    if len(value) > 2:
        train, extra = _other_keys(value, names, name, ctx)
    if content is None and extra and "tool_calls" in extra:
        return Message(ROLES[role], "", train, {"content": None, **extra})
    return Message(ROLES[role], _content(content, name, ctx), train, extra)


def _content(value: Any, name: str, ctx: RowContext) -> str:
    """The words of a turn; those given in parts are joined."""
    if not isinstance(value, str) and isinstance(value, list | tuple) and value:
        return "".join(_part(part, name, ctx) for part in value)
    return read_text(value, f"the content of a turn of {name}", ctx)


def _part(part: Any, name: str, ctx: RowContext) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        raise ctx.error(
            "not-text", f"the content of a turn of {name} must be text or parts of type text, got {str(kind)[:40]!r}"
        )
    for key, value in part.items():
        if key not in ("type", "text") and is_set(value):
            count_unread(key, f"{name}.content", ctx)
    return read_text(part.get("text"), f"the content of a turn of {name}", ctx)


def _other_keys(
    value: Mapping[str, Any], names: tuple[str, str], name: str, ctx: RowContext
) -> tuple[bool, dict[str, Any] | None]:
    """Whether the turn is learnt, and what the chat template may want to know of it."""
    train, extra = True, {}
    for key, item in value.items():
        if item is None or key in names or not is_set(item):
            continue
        if key in ctx.ignore:
            ctx.column_status[f"{name}.{key}"] = IGNORED
        elif key in ("weight", "train"):
            train &= _train_flag(key, item, ctx)
        elif key in TEMPLATE_KEYS:
            extra[key] = _tool_calls(item, ctx) if key == "tool_calls" else require_plain(item, key, ctx)
        else:
            count_unread(key, name, ctx)
    return train, extra or None


def count_unread(key: str, where: str, ctx: RowContext) -> None:
    """Refuses a key that matters, and counts any other; `where` it stands is told."""
    if key in REFUSED_KEYS and key not in ctx.ignore:
        raise ctx.unread_error(key, REFUSED_KEYS[key], f"in {where}")
    ctx.column_status[f"{where}.{key}"] = IGNORED if key in ctx.ignore else NOT_READ


def _train_flag(key: str, value: Any, ctx: RowContext) -> bool:
    if not (isinstance(value, Real) and value in (0, 1)):
        allowed = "0 or 1" if key == "weight" else "true or false"
        raise ctx.error(f"bad-{key}", f"the {key} of a turn must be {allowed}, got {str(value)[:40]!r}")
    return value != 0


def _tool_calls(value: Any, ctx: RowContext) -> Any:
    calls = from_json(value, "tool_calls", ctx)
    require_objects(calls, "tool_calls", ctx)
    return require_plain(calls, "tool_calls", ctx)


def read_history(value: Any, ctx: RowContext) -> Messages:
    """Earlier questions with their answers, [[question, answer], ...], as turns."""
    pairs = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise bad_value("history", "[question, answer] pairs", value, ctx)
    return tuple(
        Message(role, read_text(text, "history", ctx))
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    )


def read_dialogue(text: str, name: str, ctx: RowContext) -> Messages | None:
    """The turns of a text that runs "Human: ...", empty line, "Assistant: ..."; None for any other text.

    Source: anthropics/hh-rlhf, whose texts begin with two newlines.
    """
    _, *parts = SPEAKER.split(read_text(text, name, ctx))
    if not SPEAKER.match(text) or parts[:1] != ["Human"] or "Assistant" not in parts[::2]:
        return None
    return tuple(Message(SPEAKERS[who], words.strip()) for who, words in zip(parts[::2], parts[1::2], strict=True))


def require_nonempty(text: str, name: str, ctx: RowContext) -> None:
    for marker in END_MARKERS:
        text = text.replace(marker, "")
    if not text.strip():
        raise ctx.error("empty-answer", f"{name} is empty")


def require_nonempty_message(message: Message, name: str, ctx: RowContext) -> None:
    """An answer is words, or calls of tools."""
    if not (message.extra and {"tool_calls", "function_call", "refusal"} & message.extra.keys()):
        require_nonempty(message.content, name, ctx)


def require_last_assistant(messages: Messages, ctx: RowContext) -> None:
    if not any(message.role == "assistant" for message in messages):
        raise ctx.error("no-assistant", "no turn is the assistant's")
    if messages[-1].role != "assistant":
        raise ctx.error("last-role", f"the last turn must be the assistant's, got {messages[-1].role}")


def require_completion(messages: Messages, name: str, ctx: RowContext) -> None:
    """All that is left after the prompt is scored by the loss, so all of it must be the assistant's words."""
    if not messages:
        raise ctx.error("answer-is-prefix", f"{name} is only the beginning of the other answer")
    if any(message.role != "assistant" for message in messages):
        raise ctx.error("mixed-answer", f"after the prompt {name} has turns that are not the assistant's")
    for message in messages:
        require_nonempty_message(message, name, ctx)
        if not message.train:
            raise ctx.error("untrained-answer", f"a turn of {name} has weight 0, and all of an answer is scored")
