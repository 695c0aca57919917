"""Which model is asked, how tokens are chosen and when a reply ends: settings, read without loading torch."""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Any, Literal

COLDEST = 1e-4  # below it logits / temperature leaves float32; ask for 0 instead


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How a model is loaded; the arguments of `phi2.load`."""

    adapter: str | None = None
    """Folder or hub id of a LoRA adapter."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or auto."""
    quantize: Literal["int8", "int4"] | None = None
    """Keep the weights in 8 or 4 bits; an adapter is merged first, and auto is bfloat16 on a CPU too."""


@dataclass(frozen=True)
class SamplingParams:
    """Names and meanings are those of transformers' GenerationConfig.

    Raises:
        ValueError: when a value is out of range.
    """

    max_new_tokens: int = 256
    """Tokens to generate at most; the context of the model caps it."""
    temperature: float = 0.0
    """0 is greedy; 1 is the model's own distribution; higher is flatter."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probabilities reach p; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the most likely one; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Makes every token of the prompt and the reply less likely (above 1) or more (below 1)."""
    seed: int | None = 0
    """What draws begin from, on every device alike; row i of a batch has seed + i. null takes a new one each time and
    tells it: in Python it stands in the attribute afterwards."""
    stop: Sequence[str] | str | None = ()
    """String the reply ends before; on the command line give the flag again for another."""

    def __post_init__(self) -> None:
        if not isinstance(self.stop, str | Sequence | None):
            raise ValueError(f"stop must be a string or a list of strings, got {self.stop!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        t = self.temperature
        _check("max_new_tokens", self.max_new_tokens, int, lambda v: v >= 1, "a whole number of at least 1")
        _check("temperature", t, (int, float), lambda v: v == 0 or v >= COLDEST, f"0 (greedy) or at least {COLDEST}")
        _check("top_k", self.top_k, int, lambda v: v >= 0, "0 (off) or a positive whole number")
        _check("top_p", self.top_p, (int, float), lambda v: 0 <= v <= 1, "in [0, 1]")
        _check("min_p", self.min_p, (int, float), lambda v: 0 <= v <= 1, "in [0, 1]")
        _check("repetition_penalty", self.repetition_penalty, (int, float), lambda v: v > 0, "a positive number")
        if self.seed is not None:
            _check("seed", self.seed, int, lambda v: 0 <= v < 2**63, "a whole number in [0, 2**63)")
        for text in stop:
            _check("stop", text, str, len, "strings of at least one character")
        if t == 0:
            self._refuse_without_draws()
        elif self.seed is None:
            object.__setattr__(self, "seed", secrets.randbits(32))

    def of_row(self, row: int) -> "SamplingParams":
        """The settings of this row of a batch."""
        return self if self.temperature == 0 or self.seed is None else replace(self, seed=self.seed + row)

    def _refuse_without_draws(self) -> None:
        """What shapes a distribution means nothing to a choice that draws from none."""
        for name, neutral in (("top_k", 0), ("top_p", 1), ("min_p", 0), ("seed", 0)):
            if getattr(self, name) != neutral:
                raise ValueError(f"{name} {getattr(self, name)} needs a temperature above 0, got 0 (greedy)")


def _check(name: str, value: Any, kind: type | tuple[type, ...], allowed: Callable[[Any], Any], rule: str) -> None:
    known = isinstance(value, kind) and not isinstance(value, bool)
    if not known or (isinstance(value, float) and not isfinite(value)) or not allowed(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(LoadConfig):
    """The model that is asked."""

    model: str
    """Folder, hub id, "nano" or "nano-instruct"."""

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer."""
        from phi2.checkpoints.weights import load

        return load(self.model, self.device, self.dtype, adapter=self.adapter, quantize=self.quantize)


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
