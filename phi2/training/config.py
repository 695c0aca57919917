"""The settings that SFT and DPO share. Option names are those of transformers, trl and peft where those have one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from phi2.data.encode import EncodeConfig
from phi2.data.sources import DataSpec
from phi2.lora import LoraConfig


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(EncodeConfig):
    """What to train, on what, for how long, and where the results go; and, inherited, how rows become tokens."""

    model: str
    """Folder, hub id or "nano": the checkpoint to start from."""
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
    max_steps: int = -1
    """Optimizer steps; -1 runs num_train_epochs."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
    per_device_train_batch_size: int = 4
    """Samples of a micro-batch."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after the warm-up."""
    warmup_steps: float = 0
    """Optimizer steps of linear warm-up; below 1, a share of all steps."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on matrices only."""
    adam_beta1: float = 0.9
    """AdamW's beta1."""
    adam_beta2: float = 0.999
    """AdamW's beta2."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute precision. LoRA: of the frozen base. Full training keeps float32 weights and runs under autocast."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, one more forward pass."""
    fuse: bool = False
    """Two matmuls a block in place of six (phi2/fused.py); made for a GPU."""
    seed: int = 42
    """Seed of the data order, the adapter and dropout."""
    shuffle: bool = True
    """A new permutation of the data every epoch."""
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
        super().__post_init__()
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "save_total_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "eval_steps", "save_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.save_strategy == "no" and self.save_steps:
            raise ValueError(f"save_steps {self.save_steps} needs save_strategy steps, got no")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction must be in [0, 1), got {self.test_fraction}")
        if self.max_steps == 0 or self.max_steps < -1 or self.num_train_epochs <= 0:
            raise ValueError("max_steps must be -1 or positive, and num_train_epochs positive")
        if self.adapter is not None and self.lora is None:
            raise ValueError("adapter goes on training a LoRA adapter; it cannot be given with lora: null")
        if self.adapter is not None and self.lora != LoraConfig():
            raise ValueError("adapter brings its own LoRA settings; leave lora unset beside it")
        if self.eval_data is not None and self.test_fraction:
            raise ValueError("give eval_data or test_fraction, not both")
