"""Token ids of many texts, word by word: what a word becomes is looked up, and only new words are tokenised.

GPT-2's rule, which every Phi has, never lets a token go from something visible on to white space. So the ids of a text
are those of its words, each with the white space before it, one behind the other: the same ids as of the whole text, at
a fraction of its price, since a million rows are mostly the same words. Vocabularies of other rules, and with added
tokens that would reach over such a place, are given whole texts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain, islice

import numpy as np
import tokenizers

SPACE, VISIBLE = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"  # Python's \s has four controls more than Unicode's white space
WORD = re.compile(f"{SPACE}*{VISIBLE}+|{SPACE}+")
LAST_EDGE = re.compile(f"(?s:.*){VISIBLE}(?={SPACE})")  # up to where the last word begins
KNOWN_WORDS, LONGEST_WORD = 1 << 18, 64  # how many are remembered, and up to how many characters: 50 MiB at most


class WordEncoder:
    """Encodes texts by a vocabulary, and remembers words.

    Args:
        backend: the vocabulary, which must not change any more.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self.backend, self.by_words = backend, _is_by_words(backend)
        self.known = _Known()

    def encode(self, groups: Sequence[Sequence[str]]) -> list[list[np.ndarray]]:
        """(T,) int32 ids of every text, special tokens where it spells them.

        Args:
            groups: texts; those that begin with the first one of their group share its work.
        """
        if not self.by_words:
            encodings = iter(self.backend.encode_batch([*chain.from_iterable(groups)], add_special_tokens=False))
            return [[np.array(one.ids, dtype=np.int32) for one in islice(encodings, len(group))] for group in groups]
        words = [[WORD.findall(text) for text in _without_repeats(group)] for group in groups]
        self._learn({*chain.from_iterable(chain.from_iterable(words))}.difference(self.known))
        return [self._joined(group) for group in words]

    def _joined(self, group: list[list[str]]) -> list[np.ndarray]:
        shared, *rest = (b"".join(map(self.known.__getitem__, words)) for words in group)
        return [np.frombuffer(shared + ids, dtype=np.int32) for ids in rest]

    def _learn(self, words: set[str]) -> None:
        encodings = self.backend.encode_batch([*words], add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int32).tobytes() for encoding in encodings]
        self.known.new = dict(zip(words, ids, strict=True))
        if len(self.known) < KNOWN_WORDS:
            self.known.update((word, each) for word, each in self.known.new.items() if len(word) <= LONGEST_WORD)


class _Known(dict[str, bytes]):
    """Word -> its ids; beside those that stay, the `new` ones of a batch."""

    new: dict[str, bytes]

    def __missing__(self, word: str) -> bytes:
        return self.new[word]


def _without_repeats(group: Sequence[str]) -> list[str]:
    """What all texts of a group begin with, up to an edge between words, and the rest of each."""
    first, *others = group
    edge = LAST_EDGE.match(first) if others and all(text.startswith(first) for text in others) else None
    end = edge.end() if edge else 0
    return [first[:end], *(text[end:] for text in group)]


def _is_by_words(backend: tokenizers.Tokenizer) -> bool:
    """Whether a vocabulary gives a text the ids of its words."""
    rules = json.loads(backend.to_str())
    cuts, model = rules["pre_tokenizer"] or {}, rules["model"]
    is_gpt2 = cuts.get("type") == "ByteLevel" and cuts.get("use_regex", True) and not cuts["add_prefix_space"]
    plain = rules["normalizer"] is None and model["type"] == "BPE" and not model["dropout"]
    return is_gpt2 and plain and not any(_reaches_over(token) for token in rules["added_tokens"])


def _reaches_over(token: dict) -> bool:
    """Whether an added token takes more than its own characters, or stands on both sides of an edge."""
    strips = token["single_word"] or token["lstrip"] or token["rstrip"]
    return strips or re.search(VISIBLE + SPACE, token["content"]) is not None
