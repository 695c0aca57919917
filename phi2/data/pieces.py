"""Records written out as the text that a model reads, cut into what is context and what is learnt.

A conversation goes through the chat template. A turn's own part is what it adds to the text that asks for it: in
ChatML, where the prompt ends in `<|im_start|>assistant` and a newline, that is the answer, `<|im_end|>` and the newline
after it. A tokenizer without a template can write one question and one answer, in Phi-2's own form
"Instruct: ...", newline, "Output: ...".

Text that does not end in a stop token gets exactly one end token. White space after a stop token stays, and is learnt.
So it is in trl too, except that trl gives a second end token to text that ends in one and white space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

from phi2.data.records import Chat, Message, Origin, Pair, Plain, RowError
from phi2.tokenizer import Tokenizer

TrainOn = Literal["completion", "assistant", "all"]


class Piece(NamedTuple):
    """A stretch of a row's text, all of it target or all of it context."""

    text: str
    target: bool


def supervised_pieces(
    record: Chat | Plain, tokenizer: Tokenizer, train_on: TrainOn, append_eos: bool
) -> tuple[list[Piece], set[str]]:
    """The text of a supervised row; no piece is empty and neighbours differ in `target`.

    Args:
        train_on: see `EncodeConfig`.
        append_eos: whether to end the text with an end token where it has none.
    Returns:
        The pieces, and names in `audit.FLAGS`.
    Raises:
        RowError: when the row cannot be written out.
    """
    if isinstance(record, Chat):
        flags = _content_flags(record.messages, tokenizer)
        pieces = _chat_pieces(record, tokenizer, train_on)
    elif isinstance(record, Plain):
        flags = set()
        pieces = [Piece(record.prompt, train_on == "all"), Piece(record.completion, True)]
    else:
        raise RowError(
            record.origin, "wrong-kind", f"a supervised row must be Chat or Plain, got {type(record).__name__}"
        )
    *before, last = _joined(pieces)
    text, flag = _with_end(last.text, tokenizer, append_eos)
    return [*before, Piece(text, last.target)], flags | {flag}


def pair_texts(record: Pair, tokenizer: Tokenizer, append_eos: bool) -> tuple[list[str], set[str]]:
    """The prompt, the chosen and the rejected answer as text.

    Args:
        append_eos: whether to end an answer with an end token where it has none.
    Returns:
        The three texts, and names in `audit.FLAGS`.
    Raises:
        RowError: when the row cannot be written out.
    """
    if not isinstance(record, Pair):
        raise RowError(record.origin, "wrong-kind", f"a preference row must be a Pair, got {type(record).__name__}")
    texts, flags = [record.prompt, record.chosen, record.rejected], set()
    if not isinstance(record.prompt, str):
        flags = _content_flags((*record.prompt, *record.chosen, *record.rejected), tokenizer)
        texts = _dialogue(record, tokenizer)
    answers, ends = zip(*(_with_end(text, tokenizer, append_eos) for text in texts[1:]), strict=True)
    return [texts[0], *answers], flags.union(ends)


class _Markers(NamedTuple):
    """How the special tokens are spelled."""

    eos: str
    stops: tuple[str, ...]
    special: re.Pattern


@lru_cache(maxsize=2)
def _markers(tokenizer: Tokenizer) -> _Markers:
    eos, *stops = (tokenizer.decode([i], skip_special_tokens=False) for i in (tokenizer.eos_id, *tokenizer.stop_ids))
    added = tokenizer.backend.get_added_tokens_decoder().values()
    special = re.compile("|".join(map(re.escape, {eos, *stops, *(token.content for token in added if token.special)})))
    return _Markers(eos, tuple(stops), special)


def _with_end(text: str, tokenizer: Tokenizer, append_eos: bool) -> tuple[str, str]:
    """The text with its end token, and the flag that says how it came by it."""
    markers = _markers(tokenizer)
    if text.rstrip().endswith(markers.stops):
        return text, "eos_present"
    return (text + markers.eos, "eos_added") if append_eos else (text, "eos_missing")


def _content_flags(messages: Sequence[Message], tokenizer: Tokenizer) -> set[str]:
    special = _markers(tokenizer).special
    return {"special_text_in_content"} if any(special.search(message.content) for message in messages) else set()


def _chat_pieces(record: Chat, tokenizer: Tokenizer, train_on: TrainOn) -> list[Piece]:
    """Cuts the rendered conversation around the turns that are learnt; for "all", around those that are not."""
    messages, last = record.messages, len(record.messages) - 1
    turns = {
        "completion": [i for i in (last,) if messages[i].train],
        "assistant": [i for i, message in enumerate(messages) if message.role == "assistant" and message.train],
        "all": [i for i, message in enumerate(messages) if not message.train],
    }[train_on]
    whole = _render(messages, tokenizer, record.origin)
    cuts = [0]
    for i in turns:
        before = _render(messages[:i], tokenizer, record.origin, messages[i].role == "assistant")
        through = whole if i == last else _render(messages[: i + 1], tokenizer, record.origin)
        cuts += [_prefix_length(before, whole, record.origin), _prefix_length(through, whole, record.origin)]
    texts = [whole[start:end] for start, end in pairwise([*cuts, len(whole)])]
    return [Piece(text, (number % 2 == 1) == (train_on != "all")) for number, text in enumerate(texts)]


def _dialogue(record: Pair, tokenizer: Tokenizer) -> list[str]:
    """The rendered prompt, and what each of the two answers adds to it."""
    opening = _render(record.prompt, tokenizer, record.origin, add_generation_prompt=True)
    wholes = [_render(record.prompt + answer, tokenizer, record.origin) for answer in (record.chosen, record.rejected)]
    return [opening, *(whole[_prefix_length(opening, whole, record.origin) :] for whole in wholes)]


def _prefix_length(text: str, whole: str, origin: Origin) -> int:
    if not whole.startswith(text):
        reason = "the chat template rewrites earlier text when a turn is added, so where the turn begins cannot be told"
        raise RowError(origin, "unstable-template", reason)
    return len(text)


def _render(
    messages: Sequence[Message], tokenizer: Tokenizer, origin: Origin, add_generation_prompt: bool = False
) -> str:
    if tokenizer.chat_template is not None:
        try:
            return tokenizer.render([{"role": m.role, "content": m.content} for m in messages], add_generation_prompt)
        except ValueError as error:
            raise RowError(origin, "template-refused", str(error)) from error
    roles = [message.role for message in messages]
    if roles not in (["user"], ["user", "assistant"]):
        reason = f"without a chat template one user and one assistant turn can be written, got {', '.join(roles)[:80]}"
        raise RowError(origin, "needs-chat-template", reason)
    return tokenizer.render_prompt(messages[0].content, "instruct") + "".join(f" {m.content}" for m in messages[1:])


def _joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Leaves out empty pieces and joins neighbours of one sort."""
    groups = groupby((piece for piece in pieces if piece.text), key=lambda piece: piece.target)
    return [Piece("".join(piece.text for piece in group), target) for target, group in groups]
