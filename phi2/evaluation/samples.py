"""One question, what a model said, and what each metric makes of it; and metrics as sums over such samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from os.path import commonprefix
from typing import Any

import numpy as np

from phi2.evaluation.toy import Score as ToyScore

Value = float | list[float]  # of a metric; a list has a number for each part of the sample, such as an instruction
RIGHT = "right"  # the metric of the toy skills
INTERVAL = 1.959964  # standard errors, of 95 %


@dataclass(frozen=True)
class Sample:
    """A graded answer.

    Attributes:
        number: of the sample in its task.
        answer: what was written, or the likeliest option.
        expected: what is right, as far as the task says so.
        options: the log-likelihood of each option in nats, where there are any.
        scores: by metric.
    """

    task: str
    number: int
    prompt: str
    answer: str
    expected: str
    options: dict[str, float] = field(default_factory=dict)
    scores: dict[str, Value] = field(default_factory=dict)


def samples_of(task: str, logged: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """From what the harness logs: one entry for each sample and filter."""
    found: dict[int, Sample] = {}
    for entry in logged:
        number = entry["doc_id"]
        if number not in found:
            found[number] = _sample(task, entry)
        for metric in entry["metrics"]:
            if (value := _value(entry[metric])) is not None:
                found[number].scores[f"{metric},{entry['filter']}"] = value
    return [found[number] for number in sorted(found)]


def _value(value: Any) -> Value | None:
    """A number, or numbers; None for what is neither, such as the parts of a perplexity."""
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, list) and value and all(isinstance(part, Real) for part in value):
        return [float(part) for part in value]
    return None


def _sample(task: str, entry: Mapping[str, Any]) -> Sample:
    arguments, target = entry["arguments"], entry["target"]
    first = entry["resps"][0][0]
    if isinstance(first, str) or not isinstance(first, Sequence):  # a text, or the log-likelihood of one
        answer, expected = (text if isinstance(text, str) else "" for text in (first, target))
        return Sample(task, entry["doc_id"], str(arguments[0][0]), answer, expected)
    shared = commonprefix([context for context, _ in arguments])
    texts = [context[len(shared) :] + continuation for context, continuation in arguments]
    options = {text: float(answers[0][0]) for text, answers in zip(texts, entry["resps"], strict=True)}
    expected = texts[target] if isinstance(target, int) and 0 <= target < len(texts) else str(target)
    return Sample(task, entry["doc_id"], shared, max(options, key=lambda text: options[text]), expected, options)


def samples_of_toy(scores: Mapping[str, ToyScore]) -> list[Sample]:
    return [
        Sample(skill, number, said.prompt, said.answer, said.expected, scores={RIGHT: float(said.correct)})
        for skill, score in scores.items()
        for number, said in enumerate(score.transcripts)
    ]


def shares(samples: Sequence[Sample], metric: str) -> np.ndarray | None:
    """(n,) what each sample contributes to a metric: the mean is the metric, and their spread its standard error.

    Where samples have parts, the metric is the ratio r of all parts that are right. A sample with sum x over m parts
    then contributes r + (x - r m) / mean(m), the ratio to first order. None unless every sample has a value.

    Source: Cochran 1977, Sampling Techniques, Section 2.11.
    """
    values = [sample.scores[metric] for sample in samples if metric in sample.scores]
    if not samples or len(values) < len(samples):
        return None
    parts = [value if isinstance(value, list) else [value] for value in values]
    x, m = np.array([sum(part) for part in parts], float), np.array([len(part) for part in parts], float)
    ratio = x.sum() / m.sum()
    return ratio + (x - ratio * m) / m.mean()


def standard_error(values: np.ndarray) -> float | None:
    """Of their mean; None for a single value."""
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
