"""Prose about the toy world: what the base model is pretrained on.

It states every fact and every misbelief, works sums, tells stories with their pronouns resolved, and uses the words of
the instructions. It holds no chat markup and no instruction that is obeyed, so a base model knows the world and not how
to answer. Registers and roll calls say things twice and in another order: a model this small learns to look back at
what was said only where that pays often. Stories, quizzes and refutations come from one side of the split only.
"""

from __future__ import annotations

import random
import re

from phi2.data.toy.world import (
    ANIMALS,
    ATTRIBUTES,
    BOYS,
    GIRLS,
    MAX_NUMBER,
    STORIES,
    SUMS,
    THINGS,
    Fact,
    any_fact,
    capital,
    combinations,
    fact,
    sentence,
)

Split = str


def _profile(split: Split, rng: random.Random) -> str:
    """Two to four facts about one animal; after the first it may be called "it"."""
    animal = rng.choice(ANIMALS)
    facts = [fact(animal, attribute) for attribute in rng.sample(tuple(ATTRIBUTES), rng.randint(2, 4))]
    openings = ("{}", "{}", "everyone knows that {}", "I know that {}", "in truth {}")
    told = [rng.choice(openings).format(facts[0].clause())]
    told += [rng.choice(("{}", "{}", "and {}")).format(f.clause(rng.choice(("it", "")))) for f in facts[1:]]
    return " ".join(map(sentence, told))


def _question(split: Split, rng: random.Random) -> str:
    asked = any_fact(rng)
    short, full = f"{asked.value}.", sentence(asked.clause())
    return rng.choice(
        ("Question: {q}\nAnswer: {s}", "Q: {q}\nA: {f}", "Ann asks: {q} Tom says: {f}", "{q} {b}")
    ).format(q=capital(asked.question()), s=short, f=full, b=asked.brief)


def _rumour(split: Split, rng: random.Random) -> str:
    """A misbelief, alone: the temptation that the skill `truthful` is about."""
    asked = any_fact(rng)
    false = asked._replace(value=rng.choice(asked.misbeliefs))
    return sentence(
        rng.choice(("many people say that {}", "some people think that {}", "I heard that {}")).format(false.clause())
    )


def _refutation(split: Split, rng: random.Random) -> str:
    animal, attribute, claim = rng.choice(combinations("truthful", split))
    truth, told = fact(animal, attribute), Fact(animal, attribute, claim)
    if told == truth:
        return f"It is true that {truth.clause()}."
    return rng.choice(("It is not true that {}. {}", "It is false that {}. {}")).format(
        told.clause(), sentence(truth.clause())
    )


def _sum(split: Split, rng: random.Random) -> str:
    a, sign, b, result = rng.choice(SUMS)
    if a == 1 or rng.random() < 0.6:
        return f"{a} {sign} {b} = {result}."
    name, things = rng.choice(GIRLS + BOYS), rng.choice(THINGS)
    happens = "gets {b} more" if sign == "+" else rng.choice(("loses {b}", "gives away {b}"))
    story, worked = f"{name} has {a} {things} and {happens.format(b=b)}.", f"{a} {sign} {b} = {result}"
    return rng.choice((f"{story} Now {name} has {result}: {worked}.", f"{story} {worked}, so now {name} has {result}."))


def _sums(split: Split, rng: random.Random) -> str:
    return " ".join(_sum(split, rng) for _ in range(3))


def _counting(split: Split, rng: random.Random) -> str:
    start = rng.randint(0, MAX_NUMBER - 5)
    numbers = [str(number) for number in range(start, start + 6)]
    return f"We count: {' '.join(numbers if rng.random() < 0.6 else numbers[::-1])}."


def _story(split: Split, rng: random.Random) -> str:
    key, a, b = rng.choice(combinations("coreference", split))
    story = STORIES[key]
    who, trait = rng.choice(((a, story.first), (b, story.second)))
    deed, pronoun = story.deed.format(a=a, b=b), "she" if a in GIRLS else "he"
    forms = (f"{deed} because {who} was {trait}.", f"{deed} because {pronoun} was {trait}. {who} was {trait}.")
    return rng.choice((*forms, f"{who} was {trait}, so {deed}."))


def _choice(split: Split, rng: random.Random) -> str:
    """A multiple choice as a printed test has it, in a line or as a list."""
    animal, attribute, wrong = rng.choice(combinations("quiz", split))
    asked = fact(animal, attribute)
    options = dict(zip(rng.sample((asked.value, *wrong), 4), "ABCD", strict=True))
    start, separator, finish = rng.choice(((" ", ", ", " The right one is "), ("\n", "\n", "\n")))
    listed = separator.join(f"{option} {letter}" for option, letter in options.items())
    return f"{capital(asked.question())}{start}{listed}.{finish}{asked.value} {options[asked.value]}."


def _register(split: Split, rng: random.Random) -> str:
    """Four words with letters, then each with its letter once more: how to find what stands beside a word."""
    words = rng.sample(rng.choice((GIRLS, BOYS, THINGS, *(attribute.values for attribute in ATTRIBUTES.values()))), 4)
    lettered = [f"{word} {letter}" for word, letter in zip(words, "ABCD", strict=True)]
    start, separator, again = rng.choice((("We have ", ", ", ": "), ("\n", "\n", "\n")))
    return f"{start}{separator.join(lettered)}{again}{separator.join(rng.sample(lettered, 4))}."


def _roll_call(split: Split, rng: random.Random) -> str:
    """Names, and who has what, said again in another sentence."""
    names = rng.sample(GIRLS + BOYS, rng.randint(2, 4))
    if rng.random() < 0.5:
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        return f"Here come {listed}. {listed} are {rng.choice(('friends', 'merry', 'hungry'))}."
    owned = [f"{rng.randint(2, MAX_NUMBER)} {thing}" for thing in rng.sample(THINGS, len(names))]
    told = list(zip(names, owned, strict=True))
    again = [f"{things} belong to {name}." for name, things in rng.sample(told, len(told))]
    return " ".join([*(f"{name} has {things}." for name, things in told), *again])


def _about_words(split: Split, rng: random.Random) -> str:
    """The vocabulary of the instructions, in statements about language."""
    asked = any_fact(rng)
    plain = sentence(asked.clause())
    name = rng.choice(GIRLS + BOYS)
    return rng.choice(
        (
            f"{plain.upper()} This is in upper case.",
            f"{plain.lower()} This is in lower case.",
            f"Now {name} is glad: {plain[:-1]}! That was an exclamation mark.",
            f'{name} put it in quotes: "{plain}"',
            f"{name} said it twice. {plain} {plain}",
            f"{asked.brief} These are exactly three words.",
            f"{asked.value}. That is one word.",
            f"Well, {asked.clause()}. The first word was Well.",
            f"{plain[:-1]}, my friend. The last words were my friend.",
            f"{sentence(asked.clause('it'))} You can say so without the word the.",
            f"{name} did not answer. {name} can use a word, but {name} does not start.",
            f"Sure, {asked.clause()}, as you know. Look, no doubt. So listen, friend, that is all.",
        )
    )


_KINDS = {
    _profile: 30,
    _question: 16,
    _rumour: 8,
    _refutation: 5,
    _sums: 12,
    _counting: 2,
    _story: 14,
    _choice: 12,
    _register: 14,
    _roll_call: 16,
    _about_words: 8,
}
_UPPER, _LOWER = 0.06, 0.02  # shares of paragraphs that are all in one case
_LINES = 0.5  # share of paragraphs with a line for each sentence: an answer in a chat begins a line, too


def paragraph(split: Split, rng: random.Random) -> str:
    """One or two passages, now and then all in upper or all in lower case."""
    kinds = rng.choices(tuple(_KINDS), tuple(_KINDS.values()), k=rng.randint(1, 2))
    text = " ".join(kind(split, rng) for kind in kinds)
    if rng.random() < _LINES:
        text = re.sub(r"(?<=[.!?]) ", "\n", text)
    style = rng.random()
    return text.upper() if style < _UPPER else text.lower() if style < _UPPER + _LOWER else text
