"""Grades a model on the five toy skills: greedy answers to held-out questions, judged by code, with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from phi2.data.toy.skills import SKILLS, Item, grade, items
from phi2.inference.generate import generate_batch
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

BATCH_SIZE = 64
MAX_NEW_TOKENS = 32  # the longest right answer has 23
Z_95 = 1.959964  # quantile 0.975 of the normal distribution


@dataclass(frozen=True)
class Transcript:
    """One graded answer; `expected` is one answer that would be right, not the only one."""

    prompt: str
    answer: str
    expected: str
    correct: bool


@dataclass(frozen=True)
class Score:
    """`successes` right answers out of `n`, all of them in `transcripts`."""

    successes: int
    n: int
    transcripts: tuple[Transcript, ...] = ()

    @property
    def rate(self) -> float:
        """Share of right answers, in [0, 1]."""
        return self.successes / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share, see `wilson`."""
        return wilson(self.successes, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.rate:.1%} [{low:.1%}, {high:.1%}]"


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a share p = successes / n.

        (p + z^2/2n  -+  z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n)        z = 1.96

    Unlike p -+ z sqrt(p (1 - p)/n) it stays in [0, 1], and it has a width where every answer was right, or none.

    Source: Wilson 1927, JASA 22, 209-212; in this form Brown, Cai and DasGupta 2001, doi 10.1214/ss/1009213286, Eq. 4.
    """
    share, z2 = successes / n, Z_95**2
    middle = share + z2 / (2 * n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def evaluate(
    model: Phi2ForCausalLM, tokenizer: Tokenizer, questions: int = 100, seed: int = 0, split: str = "test"
) -> dict[str, Score]:
    """Answers this many questions of every skill greedily and grades the answers.

    The same seed gives every model the same questions. The model sees them through its chat template.

    Raises:
        ValueError: for fewer than 1 question, an unknown split, or a tokenizer without a chat template.
    """
    if questions < 1:
        raise ValueError(f"questions must be at least 1, got {questions}")
    by_skill = {skill: items(skill, split, questions, seed) for skill in SKILLS}
    flat = [item for asked in by_skill.values() for item in asked]
    answers = iter(_answers(model, tokenizer, flat))
    return {skill: _score(asked, [next(answers) for _ in asked]) for skill, asked in by_skill.items()}


def _answers(model: Phi2ForCausalLM, tokenizer: Tokenizer, asked: Sequence[Item]) -> list[str]:
    """The model's answer to every question, in batches over all of them."""
    answers = []
    with tqdm(total=len(asked), desc="grading", unit="answer", dynamic_ncols=True) as bar:
        for start in range(0, len(asked), BATCH_SIZE):
            chats = [[message._asdict() for message in item.messages] for item in asked[start : start + BATCH_SIZE]]
            answers += [reply.text for reply in generate_batch(model, tokenizer, chats, max_new_tokens=MAX_NEW_TOKENS)]
            bar.update(len(chats))
    return answers


def _score(asked: Sequence[Item], answers: Sequence[str]) -> Score:
    transcripts = [
        Transcript(item.messages[-1].content, answer.strip(), item.answer, grade(item, answer))
        for item, answer in zip(asked, answers, strict=True)
    ]
    return Score(sum(t.correct for t in transcripts), len(transcripts), tuple(transcripts))
