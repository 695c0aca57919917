"""Every prompt of a file answered: `phi2 generate --prompts`.

The engine answers a block of prompts and is then as new; a run that goes on answers the block again that it was cut off
in, and writes the rows that are missing. So each reply has had the same replies beside it, on which the last bits of
its log-probs depend, and the file of a run that was killed is that of one that was not, byte for byte. What is held is
a block; rows are written as soon as they and those before them are answered.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from tqdm import tqdm

from phi2.answers.config import AskConfig
from phi2.answers.file import AnswersFile
from phi2.answers.questions import Question, Questions, Survey, survey
from phi2.answers.score import Score
from phi2.hub import resolve
from phi2.inference.config import SamplingParams
from phi2.inference.engine import Engine, default_slots
from phi2.inference.generate import choices_of, replies_to
from phi2.inference.replies import Chunk, Generation, join
from phi2.model import Phi2ForCausalLM
from phi2.runs.inputs import Inputs, digest_of_adapter, digest_of_model, digest_of_texts, digest_of_tokenizer
from phi2.tokenizer import Tokenizer

ROUNDS = 8  # answers of a block for each slot of the engine: while the last of them end, slots stand empty
COMPARED = ("system", "prompt_style", "n", "logprobs", "ignore_columns", "quantize")  # beside those of sampling


class Asked(NamedTuple):
    """What `ask` leaves: the file of answers, the questions behind them, and what was found in these."""

    file: AnswersFile
    questions: Questions
    found: Survey

    def __str__(self) -> str:
        found, seed = self.found, f", seed {self.questions.seed}" if self.questions.config.temperature else ""
        answered = f"{found.answers} answers to {found.rows - found.errors} of {found.rows} prompts{seed}"
        return "\n".join([*found.audit.column_lines(), answered, f"wrote {self.file.path}"])


def answer_file(config: AskConfig) -> Asked:
    """Answers the prompts of a file into another."""
    return ask(config, Path(config.output))


def ask(config: AskConfig, output: Path, score: Score | None = None) -> Asked:
    """Answers all prompts, going on with what is in the output if that is asked for.

    Args:
        score: what an answer is worth, written beside it.
    Raises:
        FileNotFoundError, ValueError: for prompts, a model or an output that cannot be used.
        OSError: on a full disk.
    """
    file = AnswersFile(output, config.resume)
    model, tokenizer = config.load()
    questions = Questions(config, tokenizer, model.config, _seed(config, file.before))
    found = survey(questions)
    _tell_errors(found)
    file.begin(_inputs(config, questions, found, model, tokenizer, score))
    try:
        for question, replies in answered(model, tokenizer, questions, found, file.rows):
            if question.index >= file.rows:
                file.add(_row(question, replies, config.logprobs, score))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{file.rows} of {found.rows} rows are in {output}; resume: true goes on") from None
    return Asked(file, questions, found)


def _seed(config: AskConfig, before: Inputs | None) -> int:
    """The seed that was asked for or, where a new one is, drawn: by the run that is gone on with, if there is one."""
    if config.seed is None and before and before.get("seed"):
        return int(before["seed"] or 0)
    seed = SamplingParams(**config.sampling).seed
    return 0 if seed is None else seed


def _tell_errors(found: Survey) -> None:
    if found.errors:
        rules = "; ".join(f"{dropped.rows}x, first {dropped.reason}" for dropped in found.audit.dropped.values())
        told = f"{found.errors} of {found.rows} prompts cannot be answered, their rows get an error: {rules}"
        warnings.warn(told, stacklevel=3)


def _inputs(
    config: AskConfig,
    questions: Questions,
    found: Survey,
    model: Phi2ForCausalLM,
    tokenizer: Tokenizer,
    score: Score | None,
) -> Inputs:
    """Digests of all that the answers depend on."""
    names = [field.name for field in fields(SamplingParams) if field.name != "seed"]
    settings = {name: digest_of_texts([repr(getattr(config, name))]) for name in (*names, *COMPARED)}
    return {
        "prompts": found.digest,
        "model": digest_of_model(resolve(config.model)),
        "adapter": "none" if config.adapter is None else digest_of_adapter(resolve(config.adapter)),
        "tokenizer": digest_of_tokenizer(config, tokenizer),
        "chat template": digest_of_texts([tokenizer.chat_template or ""]),
        "compute dtype": str(model.dtype),
        "score": "none" if score is None else score.digest,
        "seed": str(questions.seed),
        **settings,
    }


def answered(
    model: Phi2ForCausalLM, tokenizer: Tokenizer, questions: Iterable[Question], found: Survey, written: int = 0
) -> Iterator[tuple[Question, list[Generation]]]:
    """The questions in order, each as soon as it and those before it are answered; no replies for those with an error.

    Args:
        written: how many need no answer any more. Whole blocks of them are left out.
    """
    length = min(model.config.max_position_embeddings, found.longest)
    slots = min(default_slots(model, length), found.answers)
    engine = Engine(model, choices_of(model, tokenizer), slots, length)
    with closing(Progress(found.answers)) as progress:
        for block in blocks(questions, ROUNDS * slots):
            if block[-1].index < written:
                progress.skip(sum(len(question.params) for question in block))
                continue
            engine.forget()
            yield from _answered(engine, tokenizer, block, progress)


def blocks(questions: Iterable[Question], answers: int) -> Iterator[list[Question]]:
    """So many answers together, or a little more; a question without any counts as one."""
    block: list[Question] = []
    count = 0
    for question in questions:
        block.append(question)
        count += max(1, len(question.params))
        if count >= answers:
            yield block
            block, count = [], 0
    if block:
        yield block


def _answered(
    engine: Engine, tokenizer: Tokenizer, block: Sequence[Question], progress: Progress
) -> Iterator[tuple[Question, list[Generation]]]:
    requests = [(row, params) for row, question in enumerate(block) for params in question.params]
    chunks: list[list[Chunk]] = [[] for _ in requests]
    replies: list[dict[int, Generation]] = [{} for _ in block]  # by number, so that they can be put in order
    head = 0
    said = replies_to(engine, tokenizer, [block[row].ids for row, _ in requests], [params for _, params in requests])
    for number, chunk in said:
        chunks[number].append(chunk)
        if not chunk.finish_reason:
            continue
        replies[requests[number][0]][number] = join(chunks[number])
        progress.add(len(chunks[number]))
        while head < len(block) and len(replies[head]) == len(block[head].params):
            yield block[head], [reply for _, reply in sorted(replies[head].items())]
            head += 1
    yield from ((question, []) for question in block[head:])


class Progress:
    """A bar of answers, with tokens a second."""

    def __init__(self, answers: int) -> None:
        self._bar = tqdm(total=answers, desc="answers", unit="answer", dynamic_ncols=True)
        self._tokens, self._started = 0, perf_counter()

    def skip(self, answers: int) -> None:
        """Counts answers that were there."""
        self._bar.initial += answers
        self._bar.update(answers)

    def add(self, tokens: int) -> None:
        """Counts one more answer."""
        self._tokens += tokens
        speed = self._tokens / (perf_counter() - self._started)
        self._bar.set_postfix_str(f"{speed:,.0f} tok/s", refresh=False)
        self._bar.update()

    def close(self) -> None:
        self._bar.close()


def _row(question: Question, replies: Sequence[Generation], logprobs: bool, score: Score | None) -> dict[str, Any]:
    row = {"index": question.index, **question.row}
    if question.error is not None:
        return row | {"error": str(question.error)}
    answers = [_answer(reply, logprobs) for reply in replies]
    if score is not None:
        answers = [answer | {"score": score(question, answer["text"])} for answer in answers]
    return row | {"answers": answers}


def _answer(reply: Generation, logprobs: bool) -> dict[str, Any]:
    ids = reply.token_ids
    told = {"text": reply.text, "finish_reason": reply.finish_reason, "seed": reply.seed, "tokens": len(ids)}
    if not logprobs:
        return told
    return told | {"token_ids": ids, "logprobs": [round(value, 6) for value in reply.logprobs]}
