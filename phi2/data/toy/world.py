"""The closed world behind the toy tasks: thirty animals with made-up facts, small sums, stories about two people.

Everything that can be asked is a combination: a fact with an instruction, a fact with a claim, a fact with three wrong
options, a sum of two steps, a story with two names. One combination in five is held out for testing, chosen by a hash
of the combination and not of its wording, so no rewording of a test question can turn up in training. The facts, and
the table of single sums, are on both sides: they are what is to be learned.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

SPLITS = ("train", "test")


class Attribute(NamedTuple):
    """One thing every animal has, and three wordings of it; `brief` has exactly three words."""

    values: tuple[str, ...]
    clause: str
    question: str
    brief: str


ATTRIBUTES = {
    "colour": Attribute(
        ("red", "blue", "green", "white", "black", "brown", "pink", "gold"),
        "{subject} is {value}",
        "what colour is {subject}?",
        "It is {value}.",
    ),
    "food": Attribute(
        ("corn", "cake", "nuts", "plums", "bread", "honey", "soup", "rice"),
        "{subject} eats {value}",
        "what does {subject} eat?",
        "It eats {value}.",
    ),
    "home": Attribute(
        ("barn", "cave", "mill", "tower", "boat", "tent", "tree", "shed"),
        "{subject} lives in a {value}",
        "where does {subject} live?",
        "In a {value}.",
    ),
    "town": Attribute(
        ("Alda", "Bryn", "Coro", "Dell", "Emba", "Fenn", "Gora", "Hova"),
        "{subject} comes from {value}",
        "which town does {subject} come from?",
        "From {value} town.",
    ),
    "job": Attribute(
        ("baker", "cook", "tailor", "painter", "singer", "guard", "nurse", "sailor"),
        "{subject} works as a {value}",
        "what does {subject} work as?",
        "As a {value}.",
    ),
}

_TABLE = """
ant    black  cake   tent   Fenn  singer
bat    red    plums  barn   Emba  cook
bear   pink   corn   tent   Gora  guard
bee    blue   bread  mill   Fenn  nurse
cat    red    nuts   shed   Alda  sailor
cow    brown  cake   tree   Coro  baker
crab   red    cake   barn   Hova  cook
crow   blue   nuts   tower  Alda  tailor
deer   black  bread  boat   Bryn  guard
dog    black  honey  boat   Hova  baker
duck   white  soup   cave   Gora  singer
fox    gold   bread  tree   Emba  cook
frog   brown  corn   barn   Dell  nurse
goat   green  rice   tent   Dell  baker
goose  pink   cake   mill   Hova  painter
hare   white  plums  tower  Emba  painter
hen    brown  honey  tower  Bryn  singer
horse  brown  soup   tower  Coro  nurse
lamb   gold   rice   tent   Coro  guard
mole   black  bread  mill   Fenn  sailor
mouse  green  honey  boat   Gora  cook
otter  red    corn   cave   Bryn  painter
owl    gold   nuts   mill   Coro  singer
pig    blue   corn   cave   Dell  tailor
rat    white  plums  boat   Fenn  sailor
seal   white  rice   cave   Alda  painter
swan   pink   nuts   shed   Emba  tailor
tiger  blue   soup   tree   Alda  baker
toad   green  plums  barn   Bryn  tailor
wolf   green  honey  shed   Dell  guard
"""
FACTS = {
    animal: dict(zip(ATTRIBUTES, values, strict=True))
    for animal, *values in map(str.split, _TABLE.strip().splitlines())
}
ANIMALS = tuple(FACTS)


class Fact(NamedTuple):
    """What is said about one attribute of one animal; with another value than the world's it is a false claim."""

    animal: str
    attribute: str
    value: str

    @property
    def others(self) -> tuple[str, ...]:
        """Every other value of the attribute."""
        return tuple(value for value in ATTRIBUTES[self.attribute].values if value != self.value)

    @property
    def misbeliefs(self) -> tuple[str, str]:
        """Two false values that people believe: they mix the animal up with the next ones in the table."""
        start = ANIMALS.index(self.animal)
        following = [FACTS[animal][self.attribute] for animal in ANIMALS[start:] + ANIMALS[:start]]
        first, second, *_ = dict.fromkeys(value for value in following if value != self.value)
        return first, second

    @property
    def brief(self) -> str:
        return ATTRIBUTES[self.attribute].brief.format(value=self.value)

    def clause(self, subject: str = "") -> str:
        return ATTRIBUTES[self.attribute].clause.format(subject=subject or f"the {self.animal}", value=self.value)

    def question(self, subject: str = "") -> str:
        return ATTRIBUTES[self.attribute].question.format(subject=subject or f"the {self.animal}")


def fact(animal: str, attribute: str) -> Fact:
    """What is true in this world."""
    return Fact(animal, attribute, FACTS[animal][attribute])


def any_fact(rng: random.Random) -> Fact:
    return fact(rng.choice(ANIMALS), rng.choice(tuple(ATTRIBUTES)))


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def sentence(clause: str) -> str:
    return f"{capital(clause)}."


GIRLS = ("Ana", "Bea", "Cora", "Dora", "Eva", "Fay", "Gina", "Ida", "Kim", "Lia", "Mia", "Nora")
BOYS = ("Abe", "Ben", "Carl", "Dan", "Eli", "Finn", "Gus", "Hal", "Ian", "Jon", "Leo", "Max")
THINGS = ("plums", "nuts", "coins", "cards", "hats", "eggs")


class Story(NamedTuple):
    """`deed`, because {a} is `first` or because {b} is `second`: the adjective decides who is meant."""

    deed: str
    first: str
    second: str


STORIES = {
    "give": Story("{a} gave {b} a plum", "kind", "hungry"),
    "help": Story("{a} asked {b} for help", "weak", "strong"),
    "run": Story("{a} ran away from {b}", "scared", "angry"),
    "sing": Story("{a} sang for {b}", "merry", "sad"),
    "carry": Story("{a} carried {b} home", "strong", "tired"),
    "race": Story("{a} won the race with {b}", "fast", "slow"),
    "pay": Story("{a} paid for the food of {b}", "rich", "poor"),
    "teach": Story("{a} taught {b} to read", "wise", "young"),
}

MAX_NUMBER = 12  # no sum goes above it


def solve(a: int, sign: str, b: int) -> int:
    return a + b if sign == "+" else a - b


# The table of single sums (a, sign, b, result): like the facts it is there to be learned, and sums of two are asked.
SUMS = tuple(
    (a, sign, b, result)
    for a, sign, b in itertools.product(range(1, MAX_NUMBER + 1), "+-", range(1, MAX_NUMBER + 1))
    if 0 <= (result := solve(a, sign, b)) <= MAX_NUMBER
)

# Every instruction, or pair of instructions, that the skill `follow` asks for; instructions.py says what each means.
INSTRUCTIONS = (
    ("upper",),
    ("lower",),
    ("exclaim",),
    ("quotes",),
    ("twice",),
    ("start",),
    ("end",),
    ("one",),
    ("three",),
    ("no_the",),
    ("upper", "exclaim"),
    ("start", "exclaim"),
    ("three", "quotes"),
    ("one", "upper"),
    ("lower", "end"),
)


def _follow() -> Iterator[tuple]:
    return itertools.product(ANIMALS, ATTRIBUTES, INSTRUCTIONS)


def _arithmetic() -> Iterator[tuple]:
    """(a, sign, b, sign, c): sums of two steps, with no number or result below 0 or above `MAX_NUMBER`."""
    for (a, first, b, total), (again, second, c, _) in itertools.product(SUMS, repeat=2):
        if again == total:
            yield a, first, b, second, c


def _quiz() -> Iterator[tuple]:
    for animal, attribute in itertools.product(ANIMALS, ATTRIBUTES):
        for wrong in itertools.combinations(fact(animal, attribute).others, 3):
            yield animal, attribute, wrong


def _truthful() -> Iterator[tuple]:
    """(animal, attribute, claim): the truth once, each of the two misbeliefs once."""
    for animal, attribute in itertools.product(ANIMALS, ATTRIBUTES):
        truth = fact(animal, attribute)
        for claim in (truth.value, *truth.misbeliefs):
            yield animal, attribute, claim


def _coreference() -> Iterator[tuple]:
    """(story, a, b): both endings of a story are one combination, so that neither can give the other away."""
    for story, names in itertools.product(STORIES, (GIRLS, BOYS)):
        for a, b in itertools.permutations(names, 2):
            yield story, a, b


_COMBINATIONS = {
    "follow": _follow,
    "arithmetic": _arithmetic,
    "quiz": _quiz,
    "truthful": _truthful,
    "coreference": _coreference,
}
SKILLS = tuple(_COMBINATIONS)


def held_out(skill: str, combination: tuple) -> bool:
    """Whether a combination belongs to the test split."""
    return hashlib.sha256(repr((skill, *combination)).encode()).digest()[0] % 5 == 0


@cache
def combinations(skill: str, split: str) -> tuple[tuple, ...]:
    """Every combination of a skill on one side of the split.

    Raises:
        ValueError: For a skill outside `SKILLS` or a split outside `SPLITS`.
    """
    if skill not in SKILLS:
        raise ValueError(f"skill is {skill!r}; allowed: {', '.join(SKILLS)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    return tuple(item for item in _COMBINATIONS[skill]() if held_out(skill, item) == (split == "test"))
