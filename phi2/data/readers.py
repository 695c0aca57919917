"""How the columns of each row layout become a record: conversations, texts, and answers that were judged.

Nothing here knows of columns that a layout does not name: `formats.py` sees to the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from phi2.data.columns import VARIABLES, RowContext, check_unread, is_set, template_variables
from phi2.data.messages import (
    count_unread,
    read_dialogue,
    read_history,
    read_messages,
    read_text,
    require_completion,
    require_last_assistant,
    require_nonempty,
    require_nonempty_message,
)
from phi2.data.records import PAIR, Chat, Message, Messages, Plain, Preference, Row, Text
from phi2.keywords import plain_number

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


# ---- rows with a chosen and a rejected answer ----


def read_prompt_pair(row: Row, ctx: RowContext) -> Preference[str] | Preference[Messages]:
    texts = row["prompt"], row["chosen"], row["rejected"]
    if all(isinstance(text, str) for text in texts):
        return _text_pair(*texts, ctx)
    return _message_pair(row, read_messages(row["prompt"], "prompt", ctx, role="user"), ctx)


def read_gold_pair(row: Row, ctx: RowContext) -> Preference[str] | Preference[Messages]:
    """A pair, and an answer to be imitated in the column `reference`."""
    pair = read_prompt_pair(row, ctx)
    gold: Any
    if isinstance(pair.prompt, str):
        gold = read_text(row["reference"], "reference", ctx)
        require_nonempty(gold, "reference", ctx)
    else:
        gold = read_messages(row["reference"], "reference", ctx, role="assistant")
        if pair.prompt != read_messages(row["prompt"], "prompt", ctx, role="user"):
            raise ctx.error("prompt-mismatch", "reference cannot follow the turns that chosen and rejected share")
        require_completion(gold, "reference", ctx)
    answers: Any = (*pair.answers, gold)  # texts, or messages, as in the pair
    return replace(pair, answers=answers, scores=(*PAIR, 1.0), has_gold=True)


def read_messages_pair(row: Row, ctx: RowContext, column: str) -> Preference[Messages]:
    return _message_pair(row, read_messages(row[column], column, ctx), ctx)


def read_instruction_pair(
    row: Row, ctx: RowContext, prompt: tuple[str, ...], answers: tuple[str, str] = ANSWERS
) -> Preference[Messages]:
    return _message_pair(row, read_prompt(row, ctx, prompt), ctx, answers)


def read_bare_pair(row: Row, ctx: RowContext) -> Preference[Messages]:
    """Two lists of messages, or two whole dialogues in text, that begin alike."""
    if isinstance(row["chosen"], str) and isinstance(row["rejected"], str):
        chosen, rejected = (read_dialogue(row[name], name, ctx) for name in ANSWERS)
        if chosen is not None and rejected is not None:
            return _extract_prompt((), chosen, rejected, ctx)
    if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
        raise ctx.error("no-prompt", "two texts do not tell where the prompt ends: a column 'prompt' is needed")
    return _message_pair(row, (), ctx)


def read_openai_pair(row: Row, ctx: RowContext) -> Preference[Messages]:
    request = row["input"]
    if not isinstance(request, Mapping):
        raise ctx.error("not-a-request", f"input must be an object with messages, got {type(request).__name__}")
    request = ctx.without_ignored(request, "input.")
    prompt = read_messages(request.get("messages"), "input.messages", ctx)
    pair = _message_pair(row, prompt, ctx, ("preferred_output", "non_preferred_output"))
    check_unread(request, request.keys() - {"messages", *VARIABLES}, {}, ctx, "input.")
    return replace(pair, variables=template_variables(request, ctx))


def _text_pair(prompt: str, chosen: str, rejected: str, ctx: RowContext) -> Preference[str]:
    for text in (prompt, chosen, rejected):
        read_text(text, "a text of the pair", ctx)
    if not prompt:
        raise ctx.error("no-prompt", "prompt is empty")
    if _begins_with(chosen, prompt) and _begins_with(rejected, prompt):
        raise ctx.error("prompt-repeated", "chosen and rejected must not begin with the prompt again")
    if chosen == rejected:
        raise ctx.error("same-answers", "chosen and rejected are equal")
    require_nonempty(chosen, "chosen", ctx)
    require_nonempty(rejected, "rejected", ctx)
    return Preference(prompt, (chosen, rejected), PAIR, ctx.origin, {})


def _begins_with(answer: str, prompt: str) -> bool:
    """Whether an answer begins with its prompt; white space before it and at the seam may differ."""
    begins = prompt.strip()
    return answer.startswith(prompt) or (bool(begins) and answer.lstrip().startswith(begins))


def _message_pair(
    row: Row, prompt: Messages, ctx: RowContext, answers: tuple[str, str] = ANSWERS
) -> Preference[Messages]:
    chosen, rejected = (read_messages(row[column], column, ctx, role="assistant") for column in answers)
    return _extract_prompt(prompt, chosen, rejected, ctx, answers)


def _extract_prompt(
    prompt: Messages, chosen: Messages, rejected: Messages, ctx: RowContext, answers: tuple[str, str] = ANSWERS
) -> Preference[Messages]:
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
    return Preference(prompt, (chosen[shared:], rejected[shared:]), PAIR, ctx.origin, {})


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


def read_messages_label(row: Row, ctx: RowContext, column: str, label: str) -> Preference[Messages]:
    messages = read_messages(row[column], column, ctx)
    require_last_assistant(messages, ctx)
    return _labelled(messages[:-1], messages[-1:], row[label], label, ctx)


def read_prompt_completion_label(row: Row, ctx: RowContext) -> Preference[str] | Preference[Messages]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        texts = read_text(prompt, "prompt", ctx), read_text(completion, "completion", ctx)
        return _labelled(*texts, row["label"], "label", ctx)
    answer = read_messages(completion, "completion", ctx, role="assistant")
    return _labelled(read_messages(prompt, "prompt", ctx, role="user"), answer, row["label"], "label", ctx)


def read_instruction_label(
    row: Row, ctx: RowContext, prompt: tuple[str, ...], answer: str, label: str
) -> Preference[Messages]:
    reply = Message("assistant", read_text(row[answer], answer, ctx))
    return _labelled(read_prompt(row, ctx, prompt), (reply,), row[label], label, ctx)


def _labelled(prompt: Text, completion: Text, good: Any, name: str, ctx: RowContext) -> Preference[Text]:
    good = plain_number(good)
    if not isinstance(good, bool):
        raise ctx.error("bad-label", f"{name} must be true or false, got {repr(good)[:40]}")
    if not prompt:
        raise ctx.error("no-prompt", "there is nothing before the answer")
    if isinstance(completion, str):
        require_nonempty(completion, "completion", ctx)
    else:
        require_completion(completion, "completion", ctx)
    return Preference(prompt, (completion,), (float(good),), ctx.origin, {})


# ---- rows with several answers ----


def read_scored_answers(
    row: Row, ctx: RowContext, scores: str, sign: int = 1
) -> Preference[str] | Preference[Messages]:
    """Texts or messages in the column `completions`, and a number for each of them.

    Args:
        scores: their column.
        sign: -1 where the lowest number is the best answer's.
    """
    answers, numbers = row["completions"], row[scores]
    for name, column in (("completions", answers), (scores, numbers)):
        if not isinstance(column, list | tuple):
            raise ctx.error("not-a-list", f"{name} must be a list, got {type(column).__name__}")
    if len(answers) != len(numbers):
        raise ctx.error("bad-scores", f"{len(answers)} completions have {len(numbers)} {scores}")
    values = [sign * _number(number, scores, ctx) for number in numbers]
    if isinstance(row["prompt"], str) and all(isinstance(answer, str) for answer in answers):
        texts = [read_text(answer, "a completion", ctx) for answer in answers]
        return _ranked(read_text(row["prompt"], "prompt", ctx), texts, values, ctx)
    turns = [read_messages(answer, "completions", ctx, role="assistant") for answer in answers]
    return _ranked(read_messages(row["prompt"], "prompt", ctx, role="user"), turns, values, ctx)


def read_rated_answers(row: Row, ctx: RowContext, prompt: tuple[str, ...]) -> Preference[Messages]:
    """Objects in the column `completions`, each with its `response` and its `overall_score`, as in UltraFeedback."""
    answers = row["completions"]
    if not isinstance(answers, list | tuple) or not all(isinstance(answer, Mapping) for answer in answers):
        raise ctx.error("not-a-list", "completions must be a list of objects, each with response and overall_score")
    for answer in answers:
        for key, value in answer.items():
            if key not in ("response", "overall_score") and is_set(value):
                count_unread(key, "completions", ctx)
    texts = [read_text(answer.get("response"), "the response of a completion", ctx) for answer in answers]
    values = [_number(answer.get("overall_score"), "overall_score", ctx) for answer in answers]
    return _ranked(read_prompt(row, ctx, prompt), [(Message("assistant", text),) for text in texts], values, ctx)


def _number(value: Any, name: str, ctx: RowContext) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ctx.error("bad-scores", f"{name} must hold finite numbers, got {str(value)[:40]!r}")
    return float(value)


def _ranked(prompt: Text, answers: Sequence[Text], scores: Sequence[float], ctx: RowContext) -> Preference[Text]:
    """Best first; among equals as in the row."""
    if len(answers) < 2:
        raise ctx.error("one-answer", f"completions must hold at least two answers to compare, got {len(answers)}")
    if len(set(scores)) == 1:
        raise ctx.error("equal-scores", f"all {len(scores)} answers have the score {scores[0]:g}")
    if not prompt:
        raise ctx.error("no-prompt", "there is nothing before the answers")
    order = sorted(range(len(answers)), key=lambda i: -scores[i])
    for answer in answers:
        if isinstance(answer, str):
            require_nonempty(answer, "a completion", ctx)
        else:
            require_completion(answer, "a completion", ctx)
    return Preference(prompt, tuple(answers[i] for i in order), tuple(scores[i] for i in order), ctx.origin, {})
