"""What an answer is worth: a function of the user's own file, or one of those that are named here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from phi2.answers.questions import Question, Shown
from phi2.data.toy import skills
from phi2.losses.source import require_source_file, run_source_file, source_of_loss
from phi2.runs.inputs import digest_of_texts

ScoreFunction = Callable[[Shown, str, Mapping[str, Any]], float]


@cache
def _toy_items() -> dict[str, skills.Item]:
    return {item.messages[-1].content: item for item in skills.questions()}


def toy(prompt: Shown, answer: str, row: Mapping[str, Any]) -> float:
    """1 for a right answer to a question of toy-prompts, 0 for a wrong one."""
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    if question not in _toy_items():
        raise ValueError("the score 'toy' grades the questions of toy-prompts, and this is none")
    return float(skills.grade(_toy_items()[question], answer))


SCORES: dict[str, ScoreFunction] = {"toy": toy}


class Score:
    """A scoring function with its name and a digest of its text, None where Python does not know it.

    Args:
        name: one of `SCORES`, or FILE.py:FUNCTION.
    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for another name, and for a file that cannot be run or has no such function.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        path, colon, function = name.rpartition(":")
        if name not in SCORES and not (colon and path.endswith(".py")):
            raise ValueError(f"score must be FILE.py:FUNCTION or one of {', '.join(SCORES)}, got {name!r}")
        self._function: ScoreFunction = SCORES[name] if name in SCORES else _function_of(path, function)
        source = source_of_loss(self._function, None if name in SCORES else Path(path))
        self.digest = None if source is None else digest_of_texts([function, source])

    def __call__(self, question: Question, answer: str) -> float:
        """The worth of an answer.

        Raises:
            ValueError: naming the row, when the function fails or returns no finite number.
        """
        try:
            value = self._function(question.prompt, answer, dict(question.row))
        except Exception as error:  # whatever the user's code raises
            raise ValueError(f"score {self.name}: {question.origin}: {type(error).__name__}: {error}") from error
        if not isinstance(value, Real) or not isfinite(value):
            raise ValueError(f"score {self.name}: {question.origin}: must return a finite number, got {value!r}")
        return float(value)


def _function_of(path: str, name: str) -> ScoreFunction:
    require_source_file(path, "score")
    names = run_source_file(path, "score")
    if not callable(names.get(name)):
        functions = ", ".join(key for key, value in names.items() if callable(value)) or "none"
        raise ValueError(f"score {path}: has no function {name!r}; there are {functions}")
    return names[name]
