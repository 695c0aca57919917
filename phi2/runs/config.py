"""What every run is told: what it starts from, where it leaves its results, and how often it says something.

The command line reads its flags from here, so torch is not imported, and annotations are types, not texts: it
would look those up in the file of the class that takes them over.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from phi2.data.config import DataSpec
from phi2.lora_config import LoraConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Start, folder and log of a run.

    Raises:
        ValueError: for a value that is not allowed, and for one that another setting would leave without effect.
    """

    model: str
    """Folder, hub id, "nano" or "nano-instruct": the checkpoint to start from."""
    data: str | list[str | DataSpec]
    """Files, hub data sets or named sources, separated by commas; or a list with options for each."""
    output: str
    """Folder of this run; it must not hold another run."""
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    """LoRA settings; null trains every weight."""
    adapter: str | None = None
    """Folder of a PEFT adapter to go on training, in place of a new one."""
    eval_data: str | list[str | DataSpec] | None = None
    """Data to evaluate on, given like `data`."""
    test_fraction: float = 0.0
    """Without eval_data: this share of the data is held out for evaluation."""
    split_seed: int = 42
    """Seed of that split."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute precision. LoRA: of the frozen base. Full training keeps float32 weights and runs under autocast."""
    seed: int = 42
    """Seed of the data order, the adapter and dropout."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    logging_steps: int = 1
    """Optimizer steps between lines of metrics.jsonl."""
    eval_steps: int = 0
    """Optimizer steps between evaluations; 0 evaluates once, at the end."""
    save_strategy: Literal["steps", "no"] = "steps"
    """no writes a checkpoint only when the run is interrupted; the result is always written."""
    save_steps: int = 0
    """Optimizer steps between checkpoints; 0 saves only at the end or when interrupted."""
    save_total_limit: int = 2
    """How many checkpoints are kept."""
    resume: bool = False
    """Go on from the last checkpoint in the output folder."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompt answered greedily at every evaluation, into samples.jsonl; give the flag again for another."""

    def __post_init__(self) -> None:
        for name in ("logging_steps", "save_total_limit"):
            require_at_least(self, name, 1)
        for name in ("eval_steps", "save_steps"):
            require_not_negative(self, name)
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction must be in [0, 1), got {self.test_fraction}")
        if self.adapter is not None and self.lora is None:
            raise ValueError("adapter goes on training a LoRA adapter; it cannot be given with lora: null")
        if self.adapter is not None and self.lora != LoraConfig():
            raise ValueError("adapter brings its own LoRA settings; leave lora unset beside it")
        if self.eval_data is not None and self.test_fraction:
            raise ValueError("give eval_data or test_fraction, not both")
        require_effect(self, "save_steps", "save_strategy steps", self.save_strategy, self.save_strategy == "steps")
        require_effect(self, "save_total_limit", "save_steps above 0", self.save_steps, self.save_steps > 0)
        require_effect(self, "split_seed", "test_fraction", self.test_fraction, self.test_fraction > 0)
        evaluates = self.eval_data is not None or self.test_fraction > 0 or bool(self.sample_prompts)
        require_effect(self, "eval_steps", "eval_data, test_fraction or sample_prompts", "none of them", evaluates)


def require_at_least(config: Any, name: str, least: int) -> None:
    if getattr(config, name) < least:
        raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")


def require_not_negative(config: Any, name: str) -> None:
    if getattr(config, name) < 0:
        raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")


def require_effect(config: Any, name: str, what: str, given: object, is_there: bool) -> None:
    """Refuses a setting other than its default that changes nothing, since `what` is not there.

    Raises:
        ValueError: naming both, and what is given in place of the second.
    """
    value = getattr(config, name)
    if not is_there and value != type(config).__dataclass_fields__[name].default:
        raise ValueError(f"{name} {value} needs {what}, got {given}")
