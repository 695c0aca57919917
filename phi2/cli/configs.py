"""The flags of the commands that ask a model: which one, and, from where it is defined, how it samples."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from phi2.inference.config import SamplingParams
from phi2.serve.config import EndpointConfig

if TYPE_CHECKING:
    from phi2.serve.models import Served


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
class EvaluateConfig(ModelConfig):
    """A model that is graded."""

    questions: int = 100
    """Held-out questions of each skill."""
    seed: int = 0
    """Of the choice of questions."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig(EndpointConfig, ModelConfig):
    """Models that are served."""

    adapters: Sequence[str] = ()
    """NAME=PATH_OR_ID of a LoRA adapter that is served as model NAME beside its base; give the flag again for
    another."""

    def load_served(self) -> "Served":
        """The base, and every adapter on it."""
        from phi2.serve.models import load_served

        return load_served(
            self.model,
            self.adapters,
            adapter=self.adapter,
            device=self.device,
            dtype=self.dtype,
            quantize=self.quantize,
        )
