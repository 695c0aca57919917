"""What is verified, on which rows: settings, which the command line reads without loading torch."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from phi2.data.config import DataSpec, EncodeConfig
from phi2.runs.config import require_at_least
from phi2.training.config import DPOConfig

BATCH = 4  # rows of a pass
UPDATES = 2  # of the short runs
PASS_TOKENS = 2048  # likewise: what is free of a GPU's memory would not be the same for two of them


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(EncodeConfig):
    """Model and rows, and, inherited, how the rows become tokens."""

    model: str
    """Folder, hub id, "nano" or "nano-instruct"."""
    data: str | list[str | DataSpec] = "toy-dpo"
    """Pairs or scored answers: files, hub data sets or named sources, separated by commas; or a list with options."""
    adapter: str | None = None
    """Folder or hub id of a LoRA adapter: the policy; its reference is the model without it."""
    rows: int = 16
    """Rows to look at, the first ones that can be used."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute precision of the model."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    seed: int = 42
    """Of a fresh adapter, and of the order of the short runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, "rows", 1)

    def run(self, output: str, **settings: Any) -> DPOConfig:
        """The settings of a short run on these rows."""
        shared = ("model", "data", "adapter", "dtype", "device", "seed", *(f.name for f in fields(EncodeConfig)))
        short: dict[str, Any] = {
            "max_steps": UPDATES,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        }
        return DPOConfig(output=output, **{name: getattr(self, name) for name in shared}, **short, **settings)
