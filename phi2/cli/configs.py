"""The flags of the commands that ask a model: which one, and, from where it is defined, how it samples."""

from dataclasses import dataclass
from typing import Literal

from phi2.inference.config import ModelConfig, ReplyConfig


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ReplyConfig):
    """One prompt."""

    prompt: str
    """The text; "-" reads it from standard input."""
    prompt_style: Literal["auto", "raw", "instruct", "chatml", "chat"] = "auto"
    """How the model sees the prompt; auto is its chat template (chat) if it has one, else raw."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelConfig):
    """A model that is graded."""

    questions: int = 100
    """Held-out questions of each skill."""
    seed: int = 0
    """Of the choice of questions."""
