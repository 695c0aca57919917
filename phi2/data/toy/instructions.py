"""The instructions of the toy skill `follow`: how each is asked for, carried out and checked.

An answer starts as a plain sentence about a fact ("The fox eats bread.") and each instruction rewrites it in turn. The
checks look only at the text, so an answer may be worded in another way.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from phi2.data.toy.world import Fact, sentence

WORD = re.compile(r"[A-Za-z]+|[0-9]+")


def words(text: str) -> list[str]:
    """The words and numbers of a text in lower case."""
    return WORD.findall(text.lower())


class Instruction(NamedTuple):
    """One kind of constraint on the form of an answer.

    `wordings` are two, whose "{}" is filled with one of `arguments`; `apply(text, fact, argument)` rewrites an answer
    and `is_followed(text, argument)` checks one. `ignored_share` is the share of SFT demonstrations that ignore it.
    """

    wordings: tuple[str, ...]
    apply: Callable[[str, Fact, str], str]
    is_followed: Callable[[str, str], bool]
    ignored_share: float
    arguments: tuple[str, ...] = ("",)


def _said_twice(text: str) -> bool:
    said = words(text)
    half, odd = divmod(len(said), 2)
    return not odd and said[:half] == said[half:]


def _ends_with(text: str, phrase: str) -> bool:
    wanted = words(phrase)
    return words(text)[-len(wanted) :] == wanted


BY_NAME = {
    "upper": Instruction(
        ("answer in upper case", "use upper case"),
        lambda text, fact, _: text.upper(),
        lambda text, _: text == text.upper(),
        ignored_share=0.55,
    ),
    "lower": Instruction(
        ("answer in lower case", "use lower case"),
        lambda text, fact, _: text.lower(),
        lambda text, _: text == text.lower(),
        ignored_share=0.6,
    ),
    "exclaim": Instruction(
        ("end with an exclamation mark", "use an exclamation mark"),
        lambda text, fact, _: f"{text[:-1]}!",
        lambda text, _: text.endswith("!"),
        ignored_share=0.4,
    ),
    "quotes": Instruction(
        ("put it in quotes", "use quotes"),
        lambda text, fact, _: f'"{text}"',
        lambda text, _: len(text) > 2 and text[0] == text[-1] == '"',
        ignored_share=0.55,
    ),
    "twice": Instruction(
        ("say it twice", "answer twice"),
        lambda text, fact, _: f"{text} {text}",
        lambda text, _: _said_twice(text),
        ignored_share=0.4,
    ),
    "start": Instruction(
        ("start with the word {}", "let the first word be {}"),
        lambda text, fact, word: f"{word}, {text[0].lower()}{text[1:]}",
        lambda text, word: words(text)[:1] == words(word),
        ignored_share=0.3,
        arguments=("Well", "Sure", "Look", "Listen", "Friend", "So"),
    ),
    "end": Instruction(
        ("end with the words {}", "let the last words be {}"),
        lambda text, fact, phrase: f"{text[:-1]}, {phrase}.",
        _ends_with,
        ignored_share=0.4,
        arguments=("that is all", "my friend", "no doubt", "as you know"),
    ),
    "one": Instruction(
        ("answer with one word", "use just one word"),
        lambda text, fact, _: f"{fact.value}.",
        lambda text, _: len(words(text)) == 1,
        ignored_share=0.3,
    ),
    "three": Instruction(
        ("answer with exactly three words", "use three words"),
        lambda text, fact, _: fact.brief,
        lambda text, _: len(words(text)) == 3,
        ignored_share=0.55,
    ),
    "no_the": Instruction(
        ("do not use the word the", "answer without the word the"),
        lambda text, fact, _: sentence(fact.clause("it")),
        lambda text, _: "the" not in words(text),
        ignored_share=0.6,
    ),
}


class Constraint(NamedTuple):
    """An instruction with its argument filled in."""

    name: str
    argument: str = ""

    def describe(self, wording: int) -> str:
        wordings = BY_NAME[self.name].wordings
        return wordings[wording % len(wordings)].format(self.argument)

    def is_followed(self, text: str) -> bool:
        return BY_NAME[self.name].is_followed(text, self.argument)


def apply_constraints(constraints: tuple[Constraint, ...], fact: Fact) -> str:
    """The answer about a fact that meets every constraint; with none it is the plain sentence."""
    text = sentence(fact.clause())
    for constraint in constraints:
        text = BY_NAME[constraint.name].apply(text, fact, constraint.argument)
    return text


def ignored_share(constraints: tuple[Constraint, ...]) -> float:
    """The share of demonstrations that ignore the constraints: that of the one which is ignored most."""
    return max(BY_NAME[constraint.name].ignored_share for constraint in constraints)
