"""Records written out as the text that a model reads, cut into what is context and what is learnt.

A conversation goes through the chat template. A turn's own part is what it adds to the text that asks for it: in
ChatML, where the prompt ends in `<|im_start|>assistant` and a newline, that is the answer, `<|im_end|>` and the newline
after it. A tokenizer without a template can write one question and one answer, in Phi-2's own form
"Instruct: ...", newline, "Output: ...".

A template with `{% generation %}` says itself what is learnt of each turn, as in transformers' masks. What else a
message or a row gives to the template (tools, tool calls, thoughts) must be read by it, else the row is refused.

Text that does not end in a stop token gets exactly one end token. White space after a stop token stays, and is learnt.
So it is in trl too, except that trl gives a second end token to text that ends in one and white space.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain, groupby, pairwise
from typing import Any, NamedTuple, TypeVar

from phi2.data.columns import NAME_KEYS
from phi2.data.config import SpecialTokens, TrainOn
from phi2.data.records import (
    Chat,
    Conversational,
    Message,
    Messages,
    Origin,
    Plain,
    Preference,
    Prompt,
    Record,
    RowError,
    is_conversational,
)
from phi2.tokenizer import Tokenizer

GENERATION = re.compile(r"\{%[-+]?\s*generation\b")  # the tag by which a template marks the assistant's words
TEXTS = ("messages", "prompt", "completion", "answers", "variables")  # the fields of records that hold text
Written = TypeVar("Written", Chat, Plain, Preference[str], Preference[Messages])  # the records that become token ids


class Piece(NamedTuple):
    """A stretch of a row's text, all of it target or all of it context."""

    text: str
    target: bool


def supervised_pieces(
    record: Record,
    tokenizer: Tokenizer,
    train_on: TrainOn,
    append_eos: bool,
    special_tokens: SpecialTokens = "token",
) -> tuple[list[Piece], set[str]]:
    """The text of a supervised row; no piece is empty and neighbours differ in `target`.

    Args:
        train_on: see `EncodeConfig`.
        append_eos: whether to end the text with an end token where it has none.
        special_tokens: see `EncodeConfig.special_tokens_in_text`.
    Returns:
        The pieces, and names in `audit.FLAGS`. With "special_text_kept" the texts are marked, as by `SpecialText.mark`.
    Raises:
        RowError: when the row cannot be written out.
    """
    if isinstance(record, Chat):
        record, flags = _with_special_text(record, tokenizer, special_tokens)
        flags |= require_template_reads(record, record.messages, tokenizer)
        pieces, last_is_learnt = _chat_pieces(record, tokenizer, train_on), record.messages[-1].train
        flags |= _content_flags(record.messages, _joined_text(pieces))
    elif isinstance(record, Plain):
        record, flags = _with_special_text(record, tokenizer, special_tokens)
        pieces, last_is_learnt = [Piece(record.prompt, train_on == "all"), Piece(record.completion, True)], True
    else:
        reason = f"a supervised row must be Chat or Plain, got {type(record).__name__}"
        raise RowError(record.origin, "wrong-kind", reason)
    end, flag = _end_token(_joined_text(pieces), tokenizer, append_eos)
    return _merged([*pieces, Piece(end, last_is_learnt)]), flags | {flag}


def preference_texts(
    record: Record, tokenizer: Tokenizer, append_eos: bool, special_tokens: SpecialTokens = "token"
) -> tuple[list[str], set[str]]:
    """The prompt and each of its answers as text.

    Args:
        append_eos: whether to end an answer with an end token where it has none.
        special_tokens: see `EncodeConfig.special_tokens_in_text`.
    Returns:
        The texts, and names in `audit.FLAGS`. With "special_text_kept" the texts are marked, as by
        `SpecialText.mark`.
    Raises:
        RowError: when the row cannot be written out.
    """
    if not isinstance(record, Preference):
        reason = f"a preference row must be a Preference, got {type(record).__name__}"
        raise RowError(record.origin, "wrong-kind", reason)
    if is_conversational(record):
        record, flags = _with_special_text(record, tokenizer, special_tokens)
        parts = record.prompt, *record.answers
        flags |= require_template_reads(record, chain(*parts), tokenizer)
        texts = _rendered_answers(record, tokenizer)
        flags = flags.union(*(_content_flags(part, text) for part, text in zip(parts, texts, strict=True)))
    else:
        record, flags = _with_special_text(record, tokenizer, special_tokens)
        texts = [record.prompt, *record.answers]
    ends, names = zip(*(_end_token(text, tokenizer, append_eos) for text in texts[1:]), strict=True)
    return [texts[0], *(text + end for text, end in zip(texts[1:], ends, strict=True))], flags.union(names)


# ---- special tokens that a text spells ----


def _with_special_text(
    record: Written, tokenizer: Tokenizer, special_tokens: SpecialTokens
) -> tuple[Written, set[str]]:
    """The record with its special tokens as they are to be read, and the flag that says so."""
    texts = _texts(record)
    token = tokenizer.special_text.find(texts)
    if token is None:
        return record, set()
    if special_tokens == "refuse":
        reason = f"the text spells the special token {token!r}, and special_tokens_in_text is refuse"
        raise RowError(record.origin, "special-token", reason)
    if special_tokens == "text":
        return _marked(record, token, tokenizer), {"special_text_kept"}
    inside = texts if is_conversational(record) else [_without_end_token(text, tokenizer) for text in texts]
    return record, set() if tokenizer.special_text.find(inside) is None else {"special_text_in_content"}


def _texts(record: Record) -> list[Any]:
    """All text of a record that reaches the model; raw texts as they are read, each answer behind its prompt."""
    if is_conversational(record):
        return [getattr(record, field, None) for field in TEXTS]
    answers = (record.completion,) if isinstance(record, Plain) else record.answers
    return [record.prompt + answer for answer in answers]


def _marked(record: Written, token: str, tokenizer: Tokenizer) -> Written:
    """The record with marks around every special token that it spells."""
    special, find = tokenizer.special_text, tokenizer.special_text.pattern.findall
    if not is_conversational(record) and any(
        find(text) != find(record.prompt) + find(text[len(record.prompt) :]) for text in _texts(record)
    ):
        reason = f"{token!r} is spelled where the prompt ends and its answer begins: it cannot stay text"
        raise RowError(record.origin, "special-token", reason)
    values = {field: getattr(record, field) for field in TEXTS if hasattr(record, field)}
    try:
        marked = replace(record, **{field: _mark(value, tokenizer) for field, value in values.items()})
    except ValueError as error:
        raise RowError(record.origin, "special-token", str(error)) from error
    for text, plain in zip(_rendered(marked, tokenizer), _rendered(record, tokenizer), strict=True):
        if special.unmark(text) != plain:
            reason = f"the text spells {token!r}, and the chat template changes it: it cannot stay text"
            raise RowError(record.origin, "special-token", reason)
    return marked


def _mark(value: Any, tokenizer: Tokenizer) -> Any:
    if isinstance(value, Message):
        return Message(*tokenizer.special_text.mark(value))
    if isinstance(value, tuple):
        return tuple(_mark(part, tokenizer) for part in value)
    return tokenizer.special_text.mark(value)


def _rendered(record: Record, tokenizer: Tokenizer) -> Iterator[str]:
    """Each conversation that a record holds, whole."""
    if isinstance(record, Chat):
        yield _render(record.messages, tokenizer, record)
    elif is_conversational(record):
        for answer in record.answers:
            yield _render(record.prompt + answer, tokenizer, record)


# ---- how a text ends ----


class _EndTokens(NamedTuple):
    """How the tokens that end a text are spelled."""

    eos: str
    stops: tuple[str, ...]


@lru_cache(maxsize=2)
def _end_tokens(tokenizer: Tokenizer, stop_ids: frozenset[int]) -> _EndTokens:
    eos, *stops = (tokenizer.decode([i], skip_special_tokens=False) for i in (tokenizer.eos_id, *stop_ids))
    return _EndTokens(eos, tuple(filter(None, stops)))  # ids beyond the vocabulary have no text


def _end_token(text: str, tokenizer: Tokenizer, append_eos: bool) -> tuple[str, str]:
    """The end token to put behind a text, which may be none, and the flag that says how the text ends."""
    ends = _end_tokens(tokenizer, tokenizer.stop_ids)
    if text.rstrip().endswith(ends.stops):
        return "", "eos_present"
    return (ends.eos, "eos_added") if append_eos else ("", "eos_missing")


def _without_end_token(text: str, tokenizer: Tokenizer) -> str:
    """A text without the end token that it came with, which "eos_present" counts."""
    text = text.rstrip()
    stops = _end_tokens(tokenizer, tokenizer.stop_ids).stops
    return next((text.removesuffix(stop) for stop in stops if text.endswith(stop)), text)


# ---- conversations ----


def require_template_reads(
    record: Conversational | Prompt[Messages], messages: Iterable[Message], tokenizer: Tokenizer
) -> set[str]:
    """Refuses what the chat template does not read and should; names and ids of calls are counted by a flag."""
    keys = {key for message in messages if message.extra for key in message.extra if key != "content"}
    unread = {name for name in keys.union(record.variables or ()) if not tokenizer.template_uses(name)}
    if matters := sorted(unread.difference(NAME_KEYS)):
        reason = f"the chat template does not read {', '.join(map(repr, matters))}; a run that may do without"
        raise RowError(record.origin, "not-read", f"{reason} names it in ignore_columns")
    return {"names_not_written"} if unread else set()


def _content_flags(messages: Messages, text: str) -> set[str]:
    """Counts a conversation whose words the template leaves out, such as a system turn it has no place for."""
    written = all(message.content.strip() in text for message in messages)
    return set() if written else {"content_not_written"}


def _chat_pieces(record: Chat, tokenizer: Tokenizer, train_on: TrainOn) -> list[Piece]:
    """Cuts the rendered conversation around what is learnt; for "all", around the turns that are not."""
    messages, last = record.messages, len(record.messages) - 1
    turns = {
        "completion": [i for i in (last,) if messages[i].train],
        "assistant": [i for i, message in enumerate(messages) if message.role == "assistant" and message.train],
        "all": [i for i, message in enumerate(messages) if not message.train],
    }[train_on]
    if train_on != "all" and GENERATION.search(tokenizer.chat_template or ""):
        whole, spans = _generation_spans(record, turns, tokenizer)
    else:
        whole = _render(messages, tokenizer, record)
        spans = _message_spans(record, turns, whole, tokenizer)
    cuts = [0, *(cut for span in spans for cut in span), len(whole)]
    texts = [whole[start:end] for start, end in pairwise(cuts)]
    return [Piece(text, (number % 2 == 1) == (train_on != "all")) for number, text in enumerate(texts)]


def _message_spans(record: Chat, turns: Iterable[int], whole: str, tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """Where in the rendered conversation each of these turns stands: what it adds to the text that asks for it."""
    messages, ranges = record.messages, []
    for i in turns:
        before = _render(messages[:i], tokenizer, record, messages[i].role == "assistant")
        through = whole if i == len(messages) - 1 else _render(messages[: i + 1], tokenizer, record)
        start, end = (_prefix_length(text, whole, record.origin) for text in (before, through))
        ranges.append((start, end))
    return ranges


def _generation_spans(record: Chat, turns: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and what the template marks of these turns, the assistant's."""
    try:
        whole, spans = tokenizer.render_with_spans(template_messages(record.messages), **(record.variables or {}))
    except ValueError as error:
        raise RowError(record.origin, "template-refused", str(error)) from error
    answers = [i for i, message in enumerate(record.messages) if message.role == "assistant"]
    if list(turns) == answers:
        return whole, spans
    if len(spans) == len(answers):
        return whole, [span for i, span in zip(answers, spans, strict=True) if i in turns]
    ranges = _message_spans(record, turns, whole, tokenizer)
    return whole, [(a, b) for a, b in spans if any(start <= a and b <= end for start, end in ranges)]


def _rendered_answers(record: Preference[Messages], tokenizer: Tokenizer) -> list[str]:
    """The rendered prompt, and what each answer adds to it."""
    prompt = _render(record.prompt, tokenizer, record, add_generation_prompt=True)
    wholes = list(_rendered(record, tokenizer))
    return [prompt, *(whole[_prefix_length(prompt, whole, record.origin) :] for whole in wholes)]


def _prefix_length(text: str, whole: str, origin: Origin) -> int:
    if not whole.startswith(text):
        reason = "the chat template rewrites earlier text when a turn is added, so where the turn begins cannot be told"
        raise RowError(origin, "unstable-template", reason)
    return len(text)


def _render(
    messages: Messages, tokenizer: Tokenizer, record: Conversational, add_generation_prompt: bool = False
) -> str:
    if tokenizer.chat_template is not None:
        try:
            return tokenizer.render(template_messages(messages), add_generation_prompt, **(record.variables or {}))
        except ValueError as error:
            raise RowError(record.origin, "template-refused", str(error)) from error
    roles = [message.role for message in messages]
    if roles not in (["user"], ["user", "assistant"]):
        reason = f"without a chat template one user and one assistant turn can be written, got {', '.join(roles)[:80]}"
        raise RowError(record.origin, "needs-chat-template", reason)
    return tokenizer.render_prompt(messages[0].content, "instruct") + "".join(f" {m.content}" for m in messages[1:])


def template_messages(messages: Iterable[Message]) -> list[dict]:
    """Messages as a chat template reads them."""
    return [{"role": m.role, "content": m.content, **(m.extra or {})} for m in messages]


def _joined_text(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Leaves out empty pieces and joins neighbours of one sort."""
    groups = groupby((piece for piece in pieces if piece.text), key=lambda piece: piece.target)
    return [Piece(_joined_text(group), target) for target, group in groups]
