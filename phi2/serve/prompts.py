"""From the prompts and messages of OpenAI's API to token ids. What is wrong with them is a ValueError."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from reprlib import repr as short_repr
from typing import Any

from phi2.inference.generate import check_prompt
from phi2.serve.models import Served
from phi2.tokenizer import Tokenizer

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def is_prompt(value: Any) -> bool:
    """A text, or a list of which all are of one kind: texts, token ids, or lists of these."""
    if isinstance(value, str):
        return True
    if not isinstance(value, list) or not value:
        return False
    return any(all(is_kind(one) for one in value) for is_kind in (_is_text, _is_id, _are_ids))


def each_prompt(given: Any) -> list[str | list[int]]:
    """The prompts of what `is_prompt`."""
    return [given] if isinstance(given, str) or _is_id(given[0]) else given


def encode_texts(prompts: Sequence[str | list[int]], served: Served) -> list[list[int]]:
    """Their tokens; a text may spell special ones.

    Raises:
        ValueError: numbering the prompt that is empty, too long or not the model's.
    """
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            ids = served.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            check_prompt(ids, served.model.config)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
        encoded.append(ids)
    return encoded


def encode_messages(given: Sequence[Any], served: Served) -> list[int]:
    """Their tokens by the chat template; special ones that a message spells stay text.

    Raises:
        ValueError: without a template, for a message that is none, or one that does not fit the model.
    """
    if served.tokenizer.chat_template is None:
        raise ValueError("the model has no chat template: ask /v1/completions, which takes plain text")
    messages = [_message(message, number, served.tokenizer) for number, message in enumerate(given, start=1)]
    ids = served.tokenizer.encode_chat(messages, add_generation_prompt=True)
    check_prompt(ids, served.model.config)
    return ids


def _message(given: Any, number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """A message as a template reads it: a role that models know, and text without parts."""
    if not isinstance(given, Mapping):
        raise ValueError(f"message {number} must be an object, got {short_repr(given)}")
    message = {key: value for key, value in given.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"message {number}: role must be one of {', '.join(ROLES)}, got {short_repr(role)}")
    unread = [key for key in message if key not in ("role", "content") and not tokenizer.template_uses(key)]
    if unread:
        raise ValueError(f"message {number}: the chat template does not read {', '.join(map(short_repr, unread))}")
    return message | {"role": ROLES[role], "content": _content(message.get("content"), number)}


def _content(content: Any, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(map(_is_text_part, content)):
        return "".join(part["text"] for part in content)
    raise ValueError(f"message {number}: content must be a text or a list of text parts, got {short_repr(content)}")


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text" and _is_text(part["text"])
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_id, value))
