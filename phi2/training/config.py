"""The settings of SFT and of DPO. Option names are those of transformers, trl and peft where those have one.

What a person has set, that is, other than its default, and what would change nothing, is an error that says which
setting it needs. The command line reads its flags from here, so torch is not imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from phi2.data.config import DataSpec, EncodeConfig
from phi2.lora_config import LoraConfig
from phi2.tokenizer import require_template_choice


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(EncodeConfig):
    """What to train, on what, for how long, and where the results go; and, inherited, how rows become tokens."""

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
        self.needs("save_steps", "save_strategy steps", self.save_strategy, self.save_strategy == "steps")
        self.needs("save_total_limit", "save_steps above 0", self.save_steps, self.save_steps > 0)
        self.needs("split_seed", "test_fraction", self.test_fraction, self.test_fraction > 0)
        self.needs("num_train_epochs", "max_steps -1", self.max_steps, self.max_steps == -1)
        evaluates = self.eval_data is not None or self.test_fraction > 0 or bool(self.sample_prompts)
        self.needs("eval_steps", "eval_data, test_fraction or sample_prompts", "none of them", evaluates)

    def needs(self, name: str, what: str, given: object, is_there: bool) -> None:
        """Refuses a setting other than its default that changes nothing, since `what` is not there.

        Raises:
            ValueError: naming both, and what is given in place of the second.
        """
        value = getattr(self, name)
        if not is_there and value != type(self).__dataclass_fields__[name].default:
            raise ValueError(f"{name} {value} needs {what}, got {given}")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainingConfig):
    """Settings of a supervised run."""

    packing: Literal["none", "best_fit", "wrapped"] = "none"
    """Samples of packing_length tokens: whole rows best-fitted and kept apart, or joined and cut (trl's old form)."""
    packing_length: int = 1024
    """Tokens of a packed sample."""
    neftune_noise_alpha: float = 0.0
    """NEFTune: uniform noise of size alpha / sqrt(tokens * hidden_size) on the embeddings of a sample."""
    chat_template: str = "auto"
    """auto is the model's own template, ChatML for a base without one; chatml or a FILE.jinja replaces it; or none."""
    from_scratch: bool = False
    """Start from random weights of the model folder's config.json; needs lora: null."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_template_choice(self.chat_template)
        if self.from_scratch and self.lora is not None:
            raise ValueError("from_scratch trains every weight: it needs lora: null")
        self.needs("packing_length", "packing best_fit or wrapped", self.packing, self.packing != "none")
        if self.packing != "none" and self.packing_length < 2:
            raise ValueError(f"packing_length must be at least 2, got {self.packing_length}")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainingConfig):
    """Settings of a preference run."""

    learning_rate: float = 5e-6
    """Peak learning rate."""
    loss: str = "sigmoid"
    """Name of the preference loss."""
    beta: float | None = None
    """The loss's beta; unset, its own default."""
    label_smoothing: float | None = None
    """The loss's label_smoothing; unset, its own default."""
    loss_args: dict[str, float | bool | str] = field(default_factory=dict)
    """Other knobs of the loss by name."""
    loss_file: str | None = None
    """Python file of yours that registers losses with @phi2.preference_loss; it is run, and kept as loss.py."""
    nll_weight: float = 0.0
    """Weight of the chosen answers' mean negative log-likelihood per token, added to the loss (trl's rpo_alpha)."""
    reference: str = "auto"
    """adapters_off, frozen_copy, or another checkpoint by folder or hub id; auto is adapters_off for a new adapter,
    else frozen_copy."""
    precompute_ref_log_probs: bool = False
    """Score the pairs that the run will see with the reference once, before training, into reference_cache."""
    reference_cache: str | None = None
    """Folder of precomputed reference log-probabilities, shared between runs; unset, inside the run folder."""
    disable_dropout: bool = True
    """Train without dropout, as the reference is without it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nll_weight < 0:
            raise ValueError(f"nll_weight must not be negative, got {self.nll_weight}")
        twice = [
            name for name in ("beta", "label_smoothing") if name in self.loss_args and getattr(self, name) is not None
        ]
        if twice:
            raise ValueError(f"{', '.join(twice)} is given twice, also in loss_args {self.loss_args}")
        if self.loss_file is not None and self.loss == DPOConfig.loss:
            raise ValueError(f"loss_file {self.loss_file} is given, and loss is {self.loss!r}: name the loss in it")
        if self.reference == "adapters_off" and (self.lora is None or self.adapter is not None):
            raise ValueError("reference adapters_off is the start of a new adapter only; use frozen_copy")
        if self.reference_cache is not None and not self.precompute_ref_log_probs:
            raise ValueError("reference_cache needs precompute_ref_log_probs: true")
        if self.disable_dropout and self.lora is not None and self.lora.lora_dropout:
            raise ValueError(f"lora_dropout {self.lora.lora_dropout} needs disable_dropout false, got true")

    @property
    def knobs(self) -> dict[str, float | bool | str]:
        """What was set of the loss's own arguments."""
        named = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        return {**{name: value for name, value in named.items() if value is not None}, **self.loss_args}
