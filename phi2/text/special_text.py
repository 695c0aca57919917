"""Text that spells a special token and is meant as text: nobody may end his own turn by typing `<|im_end|>`.

Such spellings are put between two marks before a conversation is rendered. What the chat template writes stands outside
the marks and becomes tokens; what stands between them is encoded as the characters it is, and the marks go. A text that
spells no special token has no marks, and the ids it always had.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers

START, END = "\ufdd0", "\ufdd1"  # noncharacters, which no text should hold


class MarkedEncoding(NamedTuple):
    """Token ids of a marked text, with names as in `tokenizers.Encoding`.

    Attributes:
        ids: (T,) token ids.
        offsets: (T,) where each token begins and ends, in characters of the marked text. An END mark belongs to the
            token before it; tokens of one spelling share its offsets.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class SpecialText:
    """The special tokens of a vocabulary as they are spelled.

    Args:
        backend: the vocabulary.
        tokens: spelling of every token that a text must not become by itself.
    """

    def __init__(self, backend: tokenizers.Tokenizer, tokens: Collection[str]) -> None:
        spelled = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"  # (?!) matches nothing
        self.backend = backend
        self.pattern = re.compile(spelled)
        self._marked = re.compile(f"{START}({spelled}){END}|[{START}{END}]")

    def find(self, value: Any) -> str | None:
        """The first special token that a text, or any text in a list or mapping, spells."""
        return next((match[0] for text in _texts(value) if (match := self.pattern.search(text))), None)

    def mark(self, value: Any) -> Any:
        """`value` with every such spelling between marks.

        Raises:
            ValueError: for a text that holds a mark.
        """
        if isinstance(value, str):
            if START in value or END in value:
                raise ValueError("text that spells a special token must not hold the noncharacters U+FDD0 and U+FDD1")
            return self.pattern.sub(f"{START}\\g<0>{END}", value)
        if isinstance(value, Mapping):
            return {self.mark(key): self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, (list, tuple)) else value

    def unmark(self, text: str) -> str:
        return text.replace(START, "").replace(END, "")

    def encode(self, text: str) -> MarkedEncoding:
        """The ids of a marked text, in which nothing between marks becomes a special token.

        Raises:
            ValueError: when this vocabulary cannot write a special token's spelling in any other way.
        """
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        place = 0
        for match in self._marked.finditer(text):
            self._encode_unmarked(text, place, match.start(), ids, offsets)
            if match[1]:
                spelled = self._encode_spelled(match[1])
                ids += spelled
                offsets += [match.span()] * len(spelled)
            elif match[0] == END and offsets:  # the template took a marked spelling apart
                offsets[-1] = (offsets[-1][0], match.end())
            place = match.end()
        self._encode_unmarked(text, place, len(text), ids, offsets)
        return MarkedEncoding(ids, offsets)

    def _encode_unmarked(self, text: str, start: int, end: int, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        """Adds what stands between two marks."""
        if end > start:
            encoding = self.backend.encode(text[start:end], add_special_tokens=False)
            ids += encoding.ids
            offsets += [(start + first, start + last) for first, last in encoding.offsets]

    def _encode_spelled(self, token: str) -> list[int]:
        """The ids of a special token's spelling, by the model of the vocabulary alone."""
        backend = self.backend
        text = backend.normalizer.normalize_str(token) if backend.normalizer else token
        words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)] if backend.pre_tokenizer else [text]
        ids = [piece.id for word in words for piece in backend.model.tokenize(word)]
        if backend.token_to_id(token) in ids or backend.decode(ids, skip_special_tokens=False) != token:
            raise ValueError(f"text that spells {token!r} cannot stay text: the vocabulary has no other ids for it")
        return ids


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in [*value.keys(), *value.values()] if isinstance(value, Mapping) else value:
            yield from _texts(item)
