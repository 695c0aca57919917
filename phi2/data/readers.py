"""How the columns of each row layout become a record: conversations, texts, pairs and labelled answers.

Nothing here knows of columns that a layout does not name: `formats.py` sees to the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from phi2.data.columns import VARIABLES, RowContext, check_unread, is_set, template_variables
from phi2.data.messages import (
    read_dialogue,
    read_history,
    read_messages,
    read_text,
    require_completion,
    require_last_assistant,
    require_nonempty,
    require_nonempty_message,
)
from phi2.data.records import Chat, Message, Messages, Pair, Plain, Row, Unpaired

ANSWERS = ("chosen", "rejected")


def read_prompt(row: Row, ctx: RowContext, prompt: tuple[str, ...]) -> Messages:
    """The turns before the answer where they have columns: earlier ones if there are any, and the user's request."""
    history = read_history(row["history"], ctx) if is_set(row.get("history")) else ()
    parts = [read_text(row[column], column, ctx) for column in prompt if row.get(column) is not None]
    return (*history, Message("user", "\n\n".join(part for part in parts if part)))


# ---- supervised rows ----


def _chat(messages: Messages, ctx: RowContext) -> Chat:
    require_last_assistant(messages, ctx)
    answers = [message for message in messages if message.role == "assistant" and message.train]
    if not answers:
        raise ctx.error("nothing-to-train", "every assistant turn has weight 0")
    for message in answers:
        require_nonempty_message(message, "an assistant turn", ctx)
    return Chat(messages, ctx.origin)


def _plain(prompt: str, completion: str, name: str, ctx: RowContext) -> Plain:
    record = Plain(read_text(prompt, "prompt", ctx), read_text(completion, name, ctx), ctx.origin)
    require_nonempty(completion, name, ctx)
    return record


def read_chat(row: Row, ctx: RowContext, column: str) -> Chat:
    return _chat(read_messages(row[column], column, ctx), ctx)


def read_prompt_completion(row: Row, ctx: RowContext) -> Plain | Chat:
    """Two texts stay texts; messages become a chat in which the prompt's assistant turns are context, not targets."""
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return _plain(row["prompt"], row["completion"], "completion", ctx)
    prompt = read_messages(row["prompt"], "prompt", ctx, role="user")
    context = tuple(message._replace(train=message.train and message.role != "assistant") for message in prompt)
    return _chat(context + read_messages(row["completion"], "completion", ctx, role="assistant"), ctx)


def read_instruction(row: Row, ctx: RowContext, prompt: tuple[str, ...], answer: str) -> Chat:
    reply = Message("assistant", read_text(row[answer], answer, ctx))
    return _chat((*read_prompt(row, ctx, prompt), reply), ctx)


def read_running_text(row: Row, ctx: RowContext) -> Plain:
    return _plain("", row["text"], "text", ctx)


# ---- preference rows ----


def read_prompt_pair(row: Row, ctx: RowContext) -> Pair:
    texts = row["prompt"], row["chosen"], row["rejected"]
    if all(isinstance(text, str) for text in texts):
        return _text_pair(*texts, ctx)
    return _message_pair(row, read_messages(row["prompt"], "prompt", ctx, role="user"), ctx)


def read_messages_pair(row: Row, ctx: RowContext, column: str) -> Pair:
    return _message_pair(row, read_messages(row[column], column, ctx), ctx)


def read_instruction_pair(
    row: Row, ctx: RowContext, prompt: tuple[str, ...], answers: tuple[str, str] = ANSWERS
) -> Pair:
    return _message_pair(row, read_prompt(row, ctx, prompt), ctx, answers)


def read_bare_pair(row: Row, ctx: RowContext) -> Pair:
    """Two lists of messages, or two whole dialogues in text, that begin alike."""
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        dialogues = [read_dialogue(row[name], name, ctx) for name in ANSWERS]
        if None not in dialogues:
            return _extract_prompt((), *dialogues, ctx)
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        raise ctx.error("no-prompt", "two texts do not tell where the prompt ends: a column 'prompt' is needed")
    return _message_pair(row, (), ctx)


def read_openai_pair(row: Row, ctx: RowContext) -> Pair:
    request = row["input"]
    if not isinstance(request, Mapping):
        raise ctx.error("not-a-request", f"input must be an object with messages, got {type(request).__name__}")
    request = ctx.without_ignored(request, "input.")
    prompt = read_messages(request.get("messages"), "input.messages", ctx)
    pair = _message_pair(row, prompt, ctx, ("preferred_output", "non_preferred_output"))
    check_unread(request, request.keys() - {"messages", *VARIABLES}, {}, ctx, "input.")
    return replace(pair, variables=template_variables(request, ctx))


def _text_pair(prompt: str, chosen: str, rejected: str, ctx: RowContext) -> Pair:
    texts = (read_text(text, "a text of the pair", ctx) for text in (prompt, chosen, rejected))
    pair = Pair(*texts, ctx.origin, {})
    if not prompt:
        raise ctx.error("no-prompt", "prompt is empty")
    if _begins_with(chosen, prompt) and _begins_with(rejected, prompt):
        raise ctx.error("prompt-repeated", "chosen and rejected must not begin with the prompt again")
    if chosen == rejected:
        raise ctx.error("same-answers", "chosen and rejected are equal")
    require_nonempty(chosen, "chosen", ctx)
    require_nonempty(rejected, "rejected", ctx)
    return pair


def _begins_with(answer: str, prompt: str) -> bool:
    """Whether an answer begins with its prompt; white space before it and at the seam may differ."""
    begins = prompt.strip()
    return answer.startswith(prompt) or (bool(begins) and answer.lstrip().startswith(begins))


def _message_pair(row: Row, prompt: Messages, ctx: RowContext, answers: tuple[str, str] = ANSWERS) -> Pair:
    chosen, rejected = (read_messages(row[column], column, ctx, role="assistant") for column in answers)
    return _extract_prompt(prompt, chosen, rejected, ctx, answers)


def _extract_prompt(
    prompt: Messages, chosen: Messages, rejected: Messages, ctx: RowContext, answers: tuple[str, str] = ANSWERS
) -> Pair:
    """Divides a pair at the first message that differs: what the two share is prompt, whichever column it was in."""
    shared = _shared_prefix(chosen, rejected)
    if chosen == rejected:
        raise ctx.error("same-answers", "chosen and rejected are equal")
    if chosen[0].role == "assistant":
        prompt = _without_completion(prompt, (chosen, rejected)) + chosen[:shared]
    elif set(_stripped(prompt)) <= set(_stripped(chosen[:shared])):
        prompt = chosen[:shared]  # the answers carry the prompt in front, and the prompt's own column only repeats it
    elif prompt in (chosen, rejected):  # a column of messages that is one of the two dialogues
        prompt = chosen[:shared]
    else:
        raise ctx.error("prompt-mismatch", "chosen and rejected begin with other turns than the prompt")
    if not prompt:
        raise ctx.error("no-prompt", "chosen and rejected share no first turn, so there is no prompt")
    for messages, name in zip((chosen, rejected), answers, strict=True):
        require_completion(messages[shared:], name, ctx)
    return Pair(prompt, chosen[shared:], rejected[shared:], ctx.origin, {})


def _without_completion(prompt: Messages, answers: tuple[Messages, Messages]) -> Messages:
    """The prompt alone, where its column holds one of the two dialogues whole."""
    for answer in answers:
        if _stripped(prompt[-len(answer) :]) == _stripped(answer):
            return prompt[: -len(answer)]
    return prompt


def _shared_prefix(first: Messages, second: Messages) -> int:
    same = [a == b for a, b in zip(first, second, strict=False)]
    return same.index(False) if False in same else len(same)


def _stripped(messages: Messages) -> list[tuple[str, str]]:
    """Roles and words, without the white space around them."""
    return [(message.role, message.content.strip()) for message in messages]


# ---- rows with a label ----


def read_messages_label(row: Row, ctx: RowContext, column: str, label: str) -> Unpaired:
    messages = read_messages(row[column], column, ctx)
    require_last_assistant(messages, ctx)
    return _unpaired(messages[:-1], messages[-1:], row[label], label, ctx)


def read_prompt_completion_label(row: Row, ctx: RowContext) -> Unpaired:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt, completion = read_text(prompt, "prompt", ctx), read_text(completion, "completion", ctx)
    else:
        completion = read_messages(completion, "completion", ctx, role="assistant")
        prompt = read_messages(prompt, "prompt", ctx, role="user")
    return _unpaired(prompt, completion, row["label"], "label", ctx)


def read_instruction_label(row: Row, ctx: RowContext, prompt: tuple[str, ...], answer: str, label: str) -> Unpaired:
    reply = Message("assistant", read_text(row[answer], answer, ctx))
    return _unpaired(read_prompt(row, ctx, prompt), (reply,), row[label], label, ctx)


def _unpaired(prompt: str | Messages, completion: str | Messages, good: Any, name: str, ctx: RowContext) -> Unpaired:
    if not isinstance(good, bool):
        raise ctx.error("bad-label", f"{name} must be true or false, got {str(good)[:40]!r}")
    if not prompt:
        raise ctx.error("no-prompt", "there is nothing before the answer")
    if isinstance(completion, str):
        require_nonempty(completion, "completion", ctx)
    else:
        require_completion(completion, "completion", ctx)
    return Unpaired(prompt, completion, good, ctx.origin)
