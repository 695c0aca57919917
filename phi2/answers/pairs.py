"""An on-policy preference set: a model's own answers, scored, and paired: `phi2 sample_pairs`.

All answers with their scores stand in one file, from which the pairs are made when it is whole. So a run that goes on
may make other pairs of the same answers. A pair that a preference run would refuse is none.

Source: best against worst of several samples, as in Meng et al. 2024, arXiv:2405.14734 (SimPO), section 4; all that
differ, as in Ouyang et al. 2022, arXiv:2203.02155 (InstructGPT), section 3.5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from phi2.answers.answer import Asked, ask
from phi2.answers.config import SamplePairsConfig
from phi2.answers.file import json_line
from phi2.answers.questions import Question
from phi2.answers.score import Score
from phi2.data.formats import parse_row
from phi2.data.records import RowError
from phi2.files import whole_file
from phi2.keywords import config_of, explained

Answer = Mapping[str, Any]
TEMPLATE_COLUMNS = ("tools", "documents")  # variables of the chat template that have columns of their own


@dataclass
class Tally:
    """What became of the prompts and their answers.

    Attributes:
        errors: prompts that could not be answered.
        cut: answers that ended at max_new_tokens.
        score: sum of the scores of all answers.
        best: sum of the best scores of each prompt.
        ties: prompts without two answers whose scores differ enough.
        refused: pairs that a preference run would refuse, by the rule they break.
    """

    prompts: int = 0
    errors: int = 0
    answers: int = 0
    cut: int = 0
    score: float = 0.0
    best: float = 0.0
    ties: int = 0
    pairs: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def add(self, answers: Sequence[Answer]) -> None:
        """Counts the answers to one prompt."""
        scores = [answer["score"] for answer in answers]
        self.answers += len(scores)
        self.score += sum(scores)
        self.best += max(scores)
        self.cut += sum(answer["finish_reason"] == "length" for answer in answers)

    def __str__(self) -> str:
        refused = "".join(f", {count} pairs refused as {rule}" for rule, count in self.refused.items())
        answered = self.prompts - self.errors
        return (
            f"{self.pairs} pairs of {answered} prompts; {self.ties} have none, as no scores differ enough{refused}\n"
            f"mean score {self.score / self.answers:.4g}, of the best answers {self.best / answered:.4g};"
            f" {self.cut} of {self.answers} answers are cut at max_new_tokens"
        )


class SampledPairs(NamedTuple):
    """What `sample_pairs` leaves: the file of pairs, that of all answers with their scores, and what became of them."""

    output: Path
    asked: Asked
    tally: Tally

    def __str__(self) -> str:
        return f"{self.asked}\n{self.tally}\nwrote {self.output}"


@explained(SamplePairsConfig)
def sample_pairs(**settings: Any) -> SampledPairs:
    """Samples answers, scores them and writes preference pairs.

    Args:
        settings: the flags of `phi2 sample_pairs`.
    Raises:
        FileNotFoundError, ValueError: for settings, prompts, a model, a score or an output that cannot be used.
        OSError: on a full disk.
    """
    return sample(config_of(SamplePairsConfig, settings))


def sample(config: SamplePairsConfig) -> SampledPairs:
    """`sample_pairs` for settings that were checked."""
    output = Path(config.output)
    answers = output.with_suffix(".answers.jsonl")
    if output.exists() and not (config.resume and answers.exists()):
        raise ValueError(f"{output} exists already; give another output, or resume: true where its answers are")
    asked, tally = ask(config, answers, Score(config.score)), Tally()
    with whole_file(output) as unfinished, unfinished.open("wb") as file:
        for pair in pairs_of(asked, config, tally):
            file.write(json_line(pair, output))
        if not tally.pairs:
            raise ValueError(f"{answers}: no pair can be made: {tally}")
    return SampledPairs(output, asked, tally)


def pairs_of(asked: Asked, config: SamplePairsConfig, tally: Tally) -> Iterator[dict[str, Any]]:
    """The rows of the set."""
    for question, row in zip(asked.questions, asked.file.read(), strict=True):
        tally.prompts += 1
        if question.error is not None:
            tally.errors += 1
            continue
        tally.add(row["answers"])
        chosen = choose_pairs(row["answers"], config.pairs, config.min_margin)
        tally.ties += not chosen
        for better, worse in chosen:
            pair = _pair(question, better, worse)
            try:
                parse_row(pair, question.origin, kind="preference")
            except RowError as error:
                tally.refused[error.rule] += 1
                continue
            tally.pairs += 1
            yield pair


def choose_pairs(answers: Sequence[Answer], pairs: str, min_margin: float) -> list[tuple[Answer, Answer]]:
    """(better, worse) by score. Of answers in the same words the first counts, and an empty one is no answer.

    Args:
        pairs: "best_worst" or "all".
        min_margin: scores must differ by more.
    """
    distinct: dict[str, Answer] = {}
    for answer in answers:
        if answer["text"].strip():
            distinct.setdefault(answer["text"], answer)
    ranked = sorted(distinct.values(), key=lambda answer: answer["score"], reverse=True)
    candidates = list(combinations(ranked, 2)) if pairs == "all" else [(ranked[0], ranked[-1])] if ranked else []
    return [(better, worse) for better, worse in candidates if better["score"] - worse["score"] > min_margin]


def _pair(question: Question, better: Answer, worse: Answer) -> dict[str, Any]:
    """A row of prompt, chosen and rejected: texts, or messages with what else the chat template was given."""
    texts = {"chosen": better["text"], "rejected": worse["text"]}
    scores = {"score_chosen": better["score"], "score_rejected": worse["score"], "index": question.index}
    if isinstance(question.prompt, str):
        return {"prompt": question.prompt, **texts, **scores}
    messages = {name: [{"role": "assistant", "content": text}] for name, text in texts.items()}
    variables = dict(question.variables or {})
    columns = {name: variables.pop(name) for name in TEMPLATE_COLUMNS if name in variables}
    if variables:
        columns["chat_template_kwargs"] = variables
    return {"prompt": question.prompt, **messages, **columns, **scores}
