"""The flags of the commands that ask a model: which one, and, from where it is defined, how it samples."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from phi2.inference.config import LoadConfig, SamplingParams


@dataclass(frozen=True, kw_only=True)
class ModelConfig(LoadConfig):
    """The model that is asked."""

    model: str
    """Folder, hub id, "nano" or "nano-instruct"."""

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        import phi2

        return phi2.load(self.model, self.device, self.dtype, adapter=self.adapter, quantize=self.quantize)


@dataclass(frozen=True, kw_only=True)
class ReplyConfig(SamplingParams, ModelConfig):
    """A model that replies."""

    system: str | None = None
    """System message; a prompt is then a user's turn."""

    def __post_init__(self) -> None:
        SamplingParams(**self.sampling)  # checks them; a seed that is drawn is drawn by whoever samples

    @property
    def sampling(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(SamplingParams)}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ReplyConfig):
    """One prompt."""

    prompt: str
    """The text; "-" reads it from standard input."""
    prompt_style: Literal["auto", "raw", "instruct", "chatml", "chat"] = "auto"
    """How the model sees the prompt; auto is its chat template (chat) if it has one, else raw."""
