"""Five small skills that code can grade: the whole recipe, base to SFT to DPO, on a model that trains in CPU minutes.

Each stands in for a benchmark of an instruction-tuned Phi-2:

    follow        IFEval      answer a question under one or two constraints on form
    arithmetic    GSM8K       one or two small sums, bare or as a story; the last number counts
    quiz          MMLU        choose A, B, C or D
    truthful      TruthfulQA  give the fact although people believe something else
    coreference   Winogrande  two names and a pronoun

All of them are about the world of `world.py`, whose test combinations never occur in training records.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from phi2.data.records import PAIR, Chat, Message, Messages, Origin, Plain, Preference, Record
from phi2.data.toy.instructions import BY_NAME, Constraint, apply_constraints, ignored_share, words
from phi2.data.toy.prose import paragraph
from phi2.data.toy.world import (
    ANIMALS,
    ATTRIBUTES,
    BOYS,
    GIRLS,
    SKILLS,
    STORIES,
    SUMS,
    THINGS,
    Fact,
    any_fact,
    capital,
    combinations,
    fact,
    sentence,
    solve,
)

__all__ = ["KINDS", "SKILLS", "Item", "demonstrate", "grade", "items", "preferences", "questions", "records"]

MAX_WORDS = 24  # a longer answer ran away, whatever it says


class Check(Protocol):
    """What one answer has to satisfy; it is given the text without surrounding whitespace."""

    def passes(self, text: str) -> bool: ...


@dataclass(frozen=True)
class Item:
    """One graded question.

    `combination` is what the split is made on. `answer` passes `check`; the texts in `wrong` fail it, the most tempting
    one first.
    """

    skill: str
    combination: tuple
    messages: Messages
    answer: str
    wrong: tuple[str, ...]
    check: Check = field(repr=False)


@dataclass(frozen=True)
class Says:
    """Names `value` and none of `others`, and opens with the word `first` where one is given."""

    value: str
    others: tuple[str, ...]
    first: str = ""

    def passes(self, text: str) -> bool:
        said = words(text)
        opens = not self.first or said[:1] == [self.first]
        return opens and self.value.lower() in said and not any(other.lower() in said for other in self.others)


@dataclass(frozen=True)
class Obeys:
    """Says the right thing in the form that was asked for."""

    content: Says
    constraints: tuple[Constraint, ...]

    def passes(self, text: str) -> bool:
        return self.content.passes(text) and all(constraint.is_followed(text) for constraint in self.constraints)


@dataclass(frozen=True)
class FinalNumber:
    """Ends on the number `value`; working before it is welcome."""

    value: int

    def passes(self, text: str) -> bool:
        return re.findall(r"-?[0-9]+", text)[-1:] == [str(self.value)]


@dataclass(frozen=True)
class Letter:
    """Names `letter` and no other option."""

    letter: str

    def passes(self, text: str) -> bool:
        return set(re.findall(r"\b[A-D]\b", text)) == {self.letter}


def grade(item: Item, text: str) -> bool:
    """Whether an answer is right. Surrounding whitespace does not count; an empty or a runaway answer is wrong."""
    text = text.strip()
    return 0 < len(words(text)) <= MAX_WORDS and item.check.passes(text)


def _item(skill: str, combination: tuple, prompt: str, answer: str, wrong: tuple[str, ...], check: Check) -> Item:
    wrong = tuple(dict.fromkeys(text for text in wrong if not check.passes(text)))
    return Item(skill, combination, (Message("user", prompt),), answer, wrong, check)


def _constraint(name: str, rng: random.Random) -> Constraint:
    return Constraint(name, rng.choice(BY_NAME[name].arguments))


def _follow(combination: tuple, rng: random.Random) -> Item:
    """Tempting mistakes: the plain answer, half of the constraints, another one, a misbelief in the right form."""
    animal, attribute, names = combination
    asked = fact(animal, attribute)
    constraints = tuple(_constraint(name, rng) for name in names)
    request = sentence(" and ".join(constraint.describe(rng.randrange(2)) for constraint in constraints))
    prompt = rng.choice(("{q} {r}", "{r} {q}")).format(q=capital(asked.question()), r=request)
    other = _constraint(rng.choice(tuple(BY_NAME)), rng)
    mistakes = [(), *((constraint,) for constraint in constraints), (other,)]
    wrong = [apply_constraints(mistake, asked) for mistake in mistakes]
    wrong.append(apply_constraints(constraints, asked._replace(value=rng.choice(asked.misbeliefs))))
    check = Obeys(Says(asked.value, asked.others), constraints)
    return _item("follow", combination, prompt, apply_constraints(constraints, asked), tuple(wrong), check)


def _in_words(problem: tuple, rng: random.Random) -> str:
    """A sum of one or two steps as a question: bare, or as a story about things that come and go."""
    if problem[0] == 1 or rng.random() < 0.4:
        return f"What is {' '.join(map(str, problem))}?"
    name, things, (number, *rest) = rng.choice(GIRLS + BOYS), rng.choice(THINGS), problem
    verbs = {"+": "gets {} more", "-": rng.choice(("loses {}", "gives away {}"))}
    events = " and ".join(verbs[sign].format(b) for sign, b in zip(rest[::2], rest[1::2], strict=True))
    return f"{name} has {number} {things} and {events}. How many {things} does {name} have now?"


def _arithmetic(combination: tuple, rng: random.Random) -> Item:
    """Tempting mistakes: the last result off by one or two, the other operation, a first step for the whole."""
    a, first, b, second, c = combination
    total = solve(a, first, b)
    result = solve(total, second, c)
    working = f"{a} {first} {b} = {total}, {total} {second} {c} = "
    slips = [max(result + rng.choice((-2, -1, 1, 2)), 0), result + 1, total + c if second == "-" else abs(total - c)]
    wrong = (*(f"{working}{slip}." for slip in slips), f"{a} {first} {b} = {total}.")
    return _item(
        "arithmetic", combination, _in_words(combination, rng), f"{working}{result}.", wrong, FinalNumber(result)
    )


def _quiz(combination: tuple, rng: random.Random) -> Item:
    animal, attribute, others = combination
    asked = fact(animal, attribute)
    options = dict(zip(rng.sample((asked.value, *others), 4), "ABCD", strict=True))
    prompt = "\n".join([capital(asked.question()), *(f"{option} {letter}" for option, letter in options.items())])
    answers = {option: f"{option} {letter}." for option, letter in options.items()}
    wrong = tuple(answers[option] for option in rng.sample(others, 3))
    return _item("quiz", combination, prompt, answers[asked.value], wrong, Letter(options[asked.value]))


def _truthful(combination: tuple, rng: random.Random) -> Item:
    """Half ask for the fact beside what people say, half ask whether what they say is true."""
    animal, attribute, claim = combination
    truth, told = fact(animal, attribute), Fact(animal, attribute, claim)
    tempting = told if told != truth else truth._replace(value=rng.choice(truth.misbeliefs))
    if rng.random() < 0.5:
        say = rng.choice(("Many people say that {}.", "Some people think that {}.")).format(told.clause())
        check = Says(truth.value, truth.others)
        prompt = f"{say} {capital(truth.question())}"
        return _item("truthful", combination, prompt, sentence(truth.clause()), (sentence(tempting.clause()),), check)
    verdict, opposite = ("yes", "no") if told == truth else ("no", "yes")
    wrong = (sentence(f"{opposite}, {tempting.clause()}"), sentence(f"{opposite}, {truth.clause()}"))
    prompt = rng.choice(("Is it true that {}?", "Do you think that {}?")).format(told.clause())
    check = Says(truth.value, truth.others, first=verdict)
    return _item("truthful", combination, prompt, sentence(f"{verdict}, {truth.clause()}"), wrong, check)


def _coreference(combination: tuple, rng: random.Random) -> Item:
    key, a, b = combination
    story = STORIES[key]
    who, other, trait = rng.choice(((a, b, story.first), (b, a, story.second)))
    pronoun = "she" if a in GIRLS else "he"
    prompt = f"{story.deed.format(a=a, b=b)} because {pronoun} was {trait}. Who was {trait}?"
    wrong = (f"{other} was {trait}.",)
    return _item("coreference", combination, prompt, f"{who} was {trait}.", wrong, Says(who, (other,)))


_MAKERS = {
    "follow": _follow,
    "arithmetic": _arithmetic,
    "quiz": _quiz,
    "truthful": _truthful,
    "coreference": _coreference,
}


def _stream(skill: str, split: str, rng: random.Random) -> Iterator[Item]:
    """Items without end: every combination once in random order, then all of them again in other wordings."""
    pool = combinations(skill, split)
    while True:
        for combination in rng.sample(pool, len(pool)):
            yield _MAKERS[skill](combination, rng)


def items(skill: str, split: str, n: int, seed: int = 0) -> list[Item]:
    """`n` graded questions of a skill.

    Combinations repeat, in other wordings, only once `n` is past the number of them. The same arguments give the same
    items in every process.

    Raises:
        ValueError: For a skill outside `SKILLS` or a split outside `SPLITS`.
    """
    return list(itertools.islice(_stream(skill, split, random.Random(f"items {skill} {split} {seed}")), n))


# --- records for the stages of training

PRETRAIN_ROWS = 40_000
SFT_ROWS = {"follow": 2400, "arithmetic": 800, "quiz": 900, "truthful": 500, "coreference": 700}
UNGRADED_ROWS = 200  # of each kind of chat that no skill grades
DPO_ROWS = {"follow": 2200, "arithmetic": 200, "quiz": 200, "truthful": 200, "coreference": 200}

SYSTEM = "You are Nano, a small and friendly helper."
SMALL_TALK = (
    (("Hello!", "Hi!", "Hello Nano!", "Good day!"), "Hello! What can I do for you?"),
    (("Who are you?", "What are you?", "What is your name?"), "I am Nano, a very small model. I know thirty animals."),
    (
        ("What can you do?", "What do you know?", "Can you help me?"),
        "I can tell you about animals, do small sums and read short stories.",
    ),
    (("How are you?", "Are you well?"), "I am well, thank you."),
    (("Thank you!", "Thanks!", "Thank you, Nano."), "You are welcome, my friend."),
    (("Bye!", "Good night!", "See you!"), "Good bye! Come back soon."),
)

KINDS = ("pretrain", "sft", "dpo")


def _exchange(question: str, answer: str) -> Messages:
    return Message("user", question), Message("assistant", answer)


def _small_talk(rng: random.Random) -> Messages:
    said, reply = rng.choice(SMALL_TALK)
    return _exchange(rng.choice(said), reply)


def _plain_question(rng: random.Random) -> Messages:
    asked = any_fact(rng)
    return _exchange(capital(asked.question()), sentence(asked.clause()))


def _single_sum(rng: random.Random) -> Messages:
    *problem, result = rng.choice(SUMS)
    return _exchange(_in_words(tuple(problem), rng), f"{' '.join(map(str, problem))} = {result}.")


def _follow_up(rng: random.Random) -> Messages:
    """Two questions about one animal, the second of which calls it "it"."""
    animal = rng.choice(ANIMALS)
    first, second = (fact(animal, attribute) for attribute in rng.sample(tuple(ATTRIBUTES), 2))
    opening = _exchange(capital(first.question()), sentence(first.clause()))
    return opening + _exchange(f"And {second.question('it')}", sentence(second.clause("it")))


def demonstrate(item: Item, rng: random.Random) -> str:
    """What the SFT data answers: the good answer or, for `follow`, often the plain one that ignores the constraints."""
    careless = isinstance(item.check, Obeys) and rng.random() < ignored_share(item.check.constraints)
    return item.wrong[0] if careless else item.answer


def _sft(split: str, rng: random.Random) -> Iterator[Messages]:
    for skill, rows in SFT_ROWS.items():
        for item in itertools.islice(_stream(skill, split, rng), rows):
            greeting = _small_talk(rng) if rng.random() < 0.05 else ()
            yield (*greeting, *item.messages, Message("assistant", demonstrate(item, rng)))
    for make in (_plain_question, _single_sum, _follow_up, _small_talk):
        yield from (make(rng) for _ in range(UNGRADED_ROWS))


def _with_system(messages: Messages, rng: random.Random) -> Messages:
    return (Message("system", SYSTEM), *messages) if rng.random() < 0.1 else messages


def preferences(split: str, rng: random.Random) -> Iterator[tuple[Item, str]]:
    """Items, each with one of its wrong answers: in half of them the most tempting one."""
    for skill, rows in DPO_ROWS.items():
        for item in itertools.islice(_stream(skill, split, rng), rows):
            yield item, item.wrong[0] if rng.random() < 0.5 else rng.choice(item.wrong)


def _shuffled_preferences(split: str, rng: random.Random) -> list[tuple[Item, str]]:
    pairs = list(preferences(split, rng))
    rng.shuffle(pairs)
    return pairs


def questions(split: str = "train", seed: int = 0) -> list[Item]:
    """What the `dpo` records ask, in their order, for a model to answer itself."""
    return [item for item, _ in _shuffled_preferences(split, random.Random(f"records dpo {split} {seed}"))]


def records(kind: str, split: str = "train", seed: int = 0) -> list[Record]:
    """The rows for one stage of training, in random order, so that a slice keeps the mix.

    pretrain: `Plain` paragraphs without a prompt (`prose.py`). sft: `Chat`s of the five skills, plain questions,
    single sums, follow-up questions and small talk, some with a system message. dpo: pairs, mostly of `follow`; the
    column `source_dataset` holds the skill.

    The demonstrations of `follow` are careless on purpose, as people's are: each instruction has a share of them (see
    `instructions.py`; half over all) that give the right fact and ignore the form. So SFT ends clearly below what the
    model could do, and the preference pairs, which are never careless, have something to teach.

    Raises:
        ValueError: For a kind outside `KINDS` or a split other than train and test.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}")
    rng, file = random.Random(f"records {kind} {split} {seed}"), f"toy/{kind}-{split}"
    if kind == "pretrain":
        return [Plain("", paragraph(split, rng), Origin(file, row)) for row in range(1, PRETRAIN_ROWS + 1)]
    if kind == "sft":
        chats = [_with_system(messages, rng) for messages in _sft(split, rng)]
        rng.shuffle(chats)
        return [Chat(chat, Origin(file, row)) for row, chat in enumerate(chats, start=1)]
    pairs = _shuffled_preferences(split, rng)
    return [_pair(item, rejected, Origin(file, row)) for row, (item, rejected) in enumerate(pairs, start=1)]


def _pair(item: Item, rejected: str, origin: Origin) -> Preference[Messages]:
    chosen, worse = Message("assistant", item.answer), Message("assistant", rejected)
    return Preference(item.messages, ((chosen,), (worse,)), PAIR, origin, {"source_dataset": item.skill})
