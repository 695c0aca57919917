"""The rows of a file of prompts as a model is asked them: token ids, and the settings of each answer.

A file is never held, and gone through twice: to tell what is in it before anything is answered, and to answer it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

from tqdm import tqdm

from phi2.answers.config import AskConfig
from phi2.answers.file import json_line
from phi2.config import Phi2Config
from phi2.data.audit import Audit
from phi2.data.columns import RowContext
from phi2.data.pieces import require_template_reads, template_messages
from phi2.data.prompts import prompt_rows, read_prompt_row
from phi2.data.records import Message, Messages, Origin, Prompt, RowError
from phi2.data.sources import require_ignored
from phi2.inference.config import SamplingParams
from phi2.inference.generate import check_prompt
from phi2.tokenizer import Tokenizer

OPTIONS = frozenset((*(field.name for field in fields(SamplingParams)), "n"))  # columns that set them for their row
WITHOUT_DRAWS = ("max_new_tokens", "repetition_penalty", "stop")  # what there is to set at temperature 0
Shown = str | list[dict[str, Any]]
WRITTEN = ("index", "answers", "error")  # columns of a row of the output that are not its prompt's


@dataclass(frozen=True)
class Question:
    """One row.

    Attributes:
        index: its place among the prompts, from 0.
        row: all its columns.
        prompt: text as the model sees it, or messages.
        variables: what the chat template is given beside messages.
        ids: tokens of the prompt.
        params: the settings of each of its answers.
        error: why it is not answered; there are no ids and no params then.
    """

    index: int
    origin: Origin
    row: Mapping[str, Any]
    prompt: Shown = ""
    variables: dict[str, Any] | None = None
    ids: list[int] = field(default_factory=list)
    params: tuple[SamplingParams, ...] = ()
    error: RowError | None = None


class Questions:
    """The prompts of a config, as this model reads them.

    Args:
        seed: what the first answer draws from, unless its row says so; the next one draws from the next. A row that is
            not answered keeps its place in this count.
    """

    def __init__(self, config: AskConfig, tokenizer: Tokenizer, model: Phi2Config, seed: int) -> None:
        self.config, self.seed = config, seed
        self._tokenizer, self._model = tokenizer, model
        own = "raw" if tokenizer.chat_template is None else "chat"
        self._style = own if config.prompt_style == "auto" else config.prompt_style
        self._ignore = frozenset(config.ignore_columns)
        self._settings = {name: value for name, value in config.sampling.items() if name != "seed"}

    def __iter__(self) -> Iterator[Question]:
        return self.read(Audit())

    def read(self, audit: Audit) -> Iterator[Question]:
        """Goes through the file; the audit counts rows that are not answered, and columns that are not read.

        Raises:
            FileNotFoundError, ValueError: when the file cannot be read, or has a column that the output needs.
        """
        seed = self.seed
        for index, (origin, row) in enumerate(islice(prompt_rows(self.config.prompts), self.config.rows)):
            if taken := [name for name in WRITTEN if name in row]:
                raise ValueError(f"{origin}: a column {taken[0]!r} is what the rows of the answers get; rename it")
            ctx = RowContext(origin, self._ignore, {})
            try:
                question = self._question(index, row, seed, ctx)
                audit.count_columns(ctx.column_status)
            except RowError as error:
                question = Question(index, origin, row, error=error)
                audit.drop(error)
            yield question
            seed += len(question.params) or self.config.n

    def _question(self, index: int, row: Mapping[str, Any], seed: int, ctx: RowContext) -> Question:
        params = self._params(row, seed, ctx)
        found = read_prompt_row(row, ctx, self._style in ("chat", "chatml"), OPTIONS)
        try:
            shown, ids = self._encoded(found)
            check_prompt(ids, self._model)
        except RowError:
            raise
        except ValueError as error:
            raise ctx.error("bad-prompt", str(error)) from error
        return Question(index, ctx.origin, row, shown, found.variables, ids, params)

    def _params(self, row: Mapping[str, Any], seed: int, ctx: RowContext) -> tuple[SamplingParams, ...]:
        """What a row asks for; where it asks for no draws, what shapes them is not taken over."""
        own = {name: row[name] for name in OPTIONS - self._ignore if row.get(name) is not None}
        general: dict[str, Any] = {"n": self.config.n, **self._settings}
        if own.get("temperature") == 0:
            general = {name: general[name] for name in WITHOUT_DRAWS} | {"n": 1}
        settings = general | own
        n = settings.pop("n")
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ctx.error("bad-option", f"n must be a whole number of at least 1, got {n!r}")
        if n > 1 and not settings["temperature"]:
            raise ctx.error("bad-option", f"n {n} needs a temperature above 0, got 0 (greedy)")
        if settings["temperature"]:
            settings.setdefault("seed", seed)
        try:
            first = SamplingParams(**settings)
            return tuple(first.of_row(number) for number in range(n))
        except ValueError as error:
            raise ctx.error("bad-option", str(error)) from error

    def _encoded(self, found: Prompt[str] | Prompt[Messages]) -> tuple[Shown, list[int]]:
        """What the model is shown, and its tokens."""
        if isinstance(found.prompt, str):
            text = self._tokenizer.render_prompt(found.prompt, self._style)
            return text, self._tokenizer.encode_prompt(found.prompt, self._style)
        require_template_reads(found, found.prompt, self._tokenizer)
        messages = template_messages(self._with_system(found.prompt))
        ids = self._tokenizer.encode_chat(messages, add_generation_prompt=True, **(found.variables or {}))
        return messages, ids

    def _with_system(self, messages: Messages) -> Messages:
        own = any(message.role == "system" for message in messages)
        return messages if own or self.config.system is None else (Message("system", self.config.system), *messages)


@dataclass(frozen=True)
class Survey:
    """What is in a file of prompts.

    Attributes:
        rows: how many there are, those that are not answered included.
        answers: how many there will be.
        longest: tokens that a prompt and its answer may have together.
        digest: of all rows.
        audit: of the rows that are not answered, and of columns.
    """

    rows: int
    answers: int
    longest: int
    digest: str
    audit: Audit

    @property
    def errors(self) -> int:
        """Rows that are not answered."""
        return sum(dropped.rows for dropped in self.audit.dropped.values())


def survey(questions: Questions) -> Survey:
    """Goes through the prompts once, so that what is wrong with them is known before the first is answered.

    Raises:
        ValueError: when the file cannot be read through, or none of its prompts can be answered.
    """
    audit, digest, rows, answers, longest = Audit(), hashlib.sha256(), 0, 0, 0
    shown = tqdm(questions.read(audit), desc="reading prompts", unit=" rows", delay=2, disable=None, leave=False)
    for question in shown:
        rows += 1
        digest.update(json_line(question.row, question.origin))
        answers += len(question.params)
        if question.params:
            longest = max(longest, len(question.ids) + question.params[0].max_new_tokens)
    require_ignored(questions.config.ignore_columns, audit)
    if not answers:
        reasons = "; ".join(dropped.reason for dropped in audit.dropped.values()) or "it is empty"
        raise ValueError(f"{questions.config.prompts}: no prompt can be answered: {reasons}")
    return Survey(rows, answers, longest, digest.hexdigest(), audit)
