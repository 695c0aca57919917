"""The tasks of phi-2-instruct's model card: where the harness keeps them, how the card ran them, what it published."""

from __future__ import annotations

from typing import NamedTuple


class CardTask(NamedTuple):
    """One row of the card.

    Attributes:
        folder: of its file in lm-evaluation-harness, below `lm_eval/tasks`.
        shots: examples before a question.
        data: for each split, words of which the path of its local file has one of each group.
        published: scores in percent.
    """

    folder: str
    shots: int
    data: dict[str, tuple[str, ...]]
    published: dict[str, float]


def _published(phi2: float, instruct: float) -> dict[str, float]:
    return {"phi-2": phi2, "phi-2-instruct": instruct}


# Where a task has several metrics the card gives their mean: 56.75 and 56.44 are halves of counts among the 1319
# questions of GSM8K, and no share of IFEval's 541 prompts or 834 instructions rounds to 39.59 or 26.53.
CARD = {
    "ifeval": CardTask("ifeval", 0, {"train": ("ifeval",)}, _published(26.53, 39.59)),
    "gsm8k": CardTask("gsm8k", 5, {"test": ("gsm8k", "test"), "train": ("gsm8k", "train")}, _published(56.44, 56.75)),
    "mmlu": CardTask("mmlu/default", 5, {"test": ("mmlu", "test"), "dev": ("mmlu", "dev")}, _published(56.70, 53.5)),
    "truthfulqa_mc2": CardTask("truthfulqa", 0, {"validation": ("truthfulqa", "mc")}, _published(44.48, 49.03)),
    "winogrande": CardTask(
        "winogrande",
        5,
        {"validation": ("winogrande", "dev"), "train": ("winogrande", "train")},
        _published(73.72, 76.01),
    ),
}
