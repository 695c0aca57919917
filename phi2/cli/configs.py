"""The flags of the commands that ask a model: which one, and, from where it is defined, how it samples."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from phi2.inference.config import SamplingParams


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is asked."""

    model: str
    """Folder, hub id, "nano" or "nano-instruct"."""
    adapter: str | None = None
    """Folder or hub id of a LoRA adapter."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto."""
    quantize: Literal["int8", "int4"] | None = None
    """Keep the weights in 8 or 4 bits; an adapter is merged first, and auto is bfloat16 on a CPU too."""

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


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The models of the page, and where it is."""

    model: list[str]
    """Folder, hub id, "nano", "nano-instruct" or folder of a run, or NAME= and one of them; give the flag again for
    another. Runs on one base share its weights."""
    adapter: list[str] = field(default_factory=list)
    """Folder or hub id of a LoRA adapter, or of its run, given likewise; it shares the weights of the model that it was
    trained on."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 lets in whoever reaches this machine."""
    port: int = 7860
    """Port to listen on."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelConfig):
    """A model that is graded."""

    questions: int = 100
    """Held-out questions of each skill."""
    seed: int = 0
    """Of the choice of questions."""
