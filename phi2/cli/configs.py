"""The flags of the commands that ask a model: which one, and, from where it is defined, how it samples."""

from dataclasses import dataclass, fields

from phi2.answers.config import AskConfig, AskOptions
from phi2.runs.config import require_effect


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AskOptions):
    """One prompt, or a file of them."""

    prompt: str | None = None
    """The text; "-" reads it from standard input."""
    prompts: str | None = None
    """In place of one prompt many: a file (.txt with one a line, .jsonl, .json, .gz, .parquet), a folder, hub data set
    or named source. All are read before the first is answered; one that cannot be, as it is longer than the context,
    gets an error in its row of the output and is counted."""
    output: str | None = None
    """File of the answers to many prompts (.jsonl), a row for each and in their order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is None) == (self.prompts is None):
            given = "none" if self.prompt is None else "both"
            raise ValueError(f"give one of prompt (a text) and prompts (a file), got {given}")
        if self.prompts is not None:
            self.ask_config()
        for name in ("output", "n", "rows", "logprobs", "resume"):
            require_effect(self, name, "prompts", "one prompt", self.prompts is not None)
        if self.ignore_columns and self.prompts is None:
            raise ValueError(f"ignore_columns {self.ignore_columns} needs prompts, got one prompt")

    def ask_config(self) -> AskConfig:
        """The settings of many prompts."""
        if self.prompts is None or self.output is None:
            raise ValueError("prompts needs an output, the file of the answers, got none")
        options = {field.name: getattr(self, field.name) for field in fields(AskOptions)}
        return AskConfig(prompts=self.prompts, output=self.output, **options)
