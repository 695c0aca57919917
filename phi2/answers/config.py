"""The settings of many prompts: what is asked, how often, and where the answers go. Torch is not imported."""

from dataclasses import dataclass, field
from typing import Literal

from phi2.inference.config import ReplyConfig
from phi2.runs.config import require_at_least, require_not_negative

PromptStyle = Literal["auto", "raw", "instruct", "chatml", "chat"]


@dataclass(frozen=True, kw_only=True)
class AskOptions(ReplyConfig):
    """How every prompt of a file is answered; a row may have columns of the same names as the settings of sampling.

    Raises:
        ValueError: for a value that is not allowed, and for one that another setting would leave without effect.
    """

    prompt_style: PromptStyle = "auto"
    """How the model sees a text; auto is its chat template (chat) if it has one, else raw. Messages take the template
    anyway."""
    n: int = 1
    """Answers to each prompt; the next answer of the file draws from the next seed."""
    rows: int | None = None
    """Answer only the first so many prompts."""
    logprobs: bool = False
    """Write the token ids of every answer and their log-probabilities in nats."""
    ignore_columns: list[str] = field(default_factory=list)
    """Column of the rows, or key of their messages, that is left out, so that it does not refuse a row; give the flag
    again for another."""
    resume: bool = False
    """Go on behind the last whole row of the output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, "n", 1)
        if self.rows is not None:
            require_at_least(self, "rows", 1)
        if self.n > 1 and not self.temperature:
            raise ValueError(f"n {self.n} needs a temperature above 0, got 0 (greedy)")
        if self.system is not None and self.prompt_style in ("raw", "instruct"):
            raise ValueError(f"system needs prompt_style chatml (or auto), got {self.prompt_style!r}")


@dataclass(frozen=True, kw_only=True)
class AskConfig(AskOptions):
    """Prompts and the file of their answers."""

    prompts: str
    """File of prompts (.txt, a line each; .jsonl, .json, .gz, .parquet), folder, hub data set or named source."""
    output: str
    """File of the answers (.jsonl), a row for each prompt and in the same order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.output.endswith(".jsonl"):
            raise ValueError(f"output must be the name of a .jsonl file, got {self.output!r}")


@dataclass(frozen=True, kw_only=True)
class SamplePairsConfig(AskConfig):
    """Prompts, what their answers are worth, and the file of pairs."""

    output: str
    """File of the pairs (.jsonl) for `phi2 dpo --data`; all answers with their scores go into NAME.answers.jsonl."""
    score: str
    """FILE.py:FUNCTION of yours, called as function(prompt, answer, row), which returns a number; or a named score."""
    temperature: float = 1.0
    """Never 0: the answers must differ."""
    n: int = 8
    """Answers to each prompt."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """The best answer to a prompt against the worst, or each against every worse one."""
    min_margin: float = 0.0
    """Scores of a pair must differ by more than this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, "n", 2)
        require_not_negative(self, "min_margin")
