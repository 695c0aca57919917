"""The settings of SFT and of DPO. Option names are those of transformers, trl and peft where those have one.

Each is put together from parts: where a run starts and what it leaves (`phi2.runs.config`), how rows become tokens
(`phi2.data.config`), how its updates are made, and what only it has. What a person has set, that is, other than its
default, and what would change nothing, is an error that says which setting it needs. The command line reads its flags
from here, so torch is not imported, and annotations are types, not texts.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self

from phi2.data.config import EncodeConfig
from phi2.runs.config import RunConfig, require_at_least, require_effect, require_not_negative
from phi2.text.template_choice import require_template_choice

WEIGHTS = "weights_from"  # the column in which a run keeps the weights that this setting brings


@dataclass(frozen=True, kw_only=True)
class UpdateConfig:
    """How long a run trains, on how much at a time, and AdamW.

    Raises:
        ValueError: for a value that is not allowed, and for one that another setting would leave without effect.
    """

    max_steps: int = -1
    """Optimizer steps; -1 runs num_train_epochs."""
    num_train_epochs: float = 1.0
    """Passes over the data."""
    per_device_train_batch_size: int = 4
    """Samples of an optimizer step, times gradient_accumulation_steps."""
    gradient_accumulation_steps: int = 1
    """Samples of an optimizer step, times per_device_train_batch_size. How they are computed is max_tokens_per_pass."""
    max_tokens_per_pass: int | Literal["auto"] = "auto"
    """Tokens that go through the model at a time; auto is what the GPU's memory holds, on a CPU 2048."""
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
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, one more forward pass."""
    fuse: bool | Literal["auto"] = "auto"
    """Two matmuls a block in place of six (phi2/fused.py); auto: on a GPU, where the model can; no gain on a CPU."""
    shuffle: bool = True
    """A new permutation of the data every epoch."""

    def __post_init__(self) -> None:
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            require_at_least(self, name, 1)
        if self.max_tokens_per_pass != "auto":
            require_at_least(self, "max_tokens_per_pass", 1)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"):
            require_not_negative(self, name)
        if self.max_steps == 0 or self.max_steps < -1 or self.num_train_epochs <= 0:
            raise ValueError("max_steps must be -1 or positive, and num_train_epochs positive")
        require_effect(self, "num_train_epochs", "max_steps -1", self.max_steps, self.max_steps == -1)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(UpdateConfig, EncodeConfig, RunConfig):
    """Settings of a supervised run."""

    kind: ClassVar[str] = "supervised"  # of the rows

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
        _check_parts(self)
        require_template_choice(self.chat_template)
        if self.from_scratch and self.lora is not None:
            raise ValueError("from_scratch trains every weight: it needs lora: null")
        require_effect(self, "packing_length", "packing best_fit or wrapped", self.packing, self.packing != "none")
        if self.packing != "none" and self.max_tokens_per_pass != "auto":
            require_at_least(self, "max_tokens_per_pass", self.packing_length)
        if self.packing != "none" and self.packing_length < 2:
            raise ValueError(f"packing_length must be at least 2, got {self.packing_length}")


@dataclass(frozen=True, kw_only=True)
class BemaConfig:
    """A bias-corrected moving average of the policy; names and defaults are those of trl's BEMACallback.

    Source: arXiv:2508.00180 Algorithm 1, with t updates done:
        average <- b policy + (1 - b) average, b = (lag + multiplier t)^-ema_power
        reference = average + (lag + multiplier t)^-bias_power (policy - start)
    """

    ema_power: float = 0.5
    """How fast the average ages (kappa); 0 makes it the policy."""
    bias_power: float = 0.2
    """How fast the correction fades (eta)."""
    lag: float = 10.0
    """Updates that count as done at the start (rho)."""
    multiplier: float = 1.0
    """Of the updates done (gamma)."""

    def __post_init__(self) -> None:
        for name in ("ema_power", "bias_power", "multiplier"):
            require_not_negative(self, name)
        require_at_least(self, "lag", 1)


MOVING = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "bema")  # settings of a moving reference
STARTS = ("auto", "adapters_off", "frozen_copy")  # references that are the policy as it starts


@dataclass(frozen=True, kw_only=True)
class PreferenceConfig(UpdateConfig, EncodeConfig, RunConfig):
    """Settings of a preference run but for its loss: what the runs of a comparison have too."""

    kind: ClassVar[str] = "preference"  # of the rows

    learning_rate: float = 5e-6
    """Peak learning rate."""
    beta: float | None = None
    """The loss's beta; unset, its own default."""
    label_smoothing: float | None = None
    """The loss's label_smoothing; unset, its own default."""
    loss_args: dict[str, float | bool | str | None] = field(default_factory=dict)
    """Other knobs of the loss by name, and those of modifiers, which go with any loss (ld_alpha, reduction, ...)."""
    loss_file: str | None = None
    """Python file of yours that registers losses with @phi2.preference_loss; it is run, and kept as loss.py."""
    nll_weight: float = 0.0
    """Weight of the chosen answers' mean negative log-likelihood per token, added to the loss (trl's rpo_alpha)."""
    weights_from: str | None = None
    """Weights of the training rows: a run or its ledger, or a Parquet file with the columns pair and weight
    (docs/ledger.md); each row's loss is multiplied by its own."""
    reference: str = "auto"
    """adapters_off, frozen_copy, or another checkpoint by folder or hub id; auto is adapters_off for a new adapter,
    else frozen_copy."""
    precompute_ref_log_probs: bool = False
    """Score the pairs that the run will see with the reference once, before training, into reference_cache."""
    reference_cache: str | None = None
    """Folder of precomputed reference log-probabilities, shared between runs; unset, inside the run folder."""
    sync_ref_model: bool = False
    """The reference follows the policy, as in TR-DPO; it starts as the policy does, with LoRA as a second adapter."""
    ref_model_sync_steps: int = 512
    """Optimizer steps between its moves."""
    ref_model_mixup_alpha: float = 0.6
    """It becomes this share of the policy and the rest of itself; 1 makes it the policy."""
    bema: BemaConfig | None = None
    """It moves by BEMA's average of the policy in place of that share; its ema_power, bias_power, lag, multiplier."""
    disable_dropout: bool = True
    """Train without dropout, as the reference is without it."""
    ledger: bool = True
    """Keep what each evaluation finds of each held-out pair, in ledger/ (docs/ledger.md)."""

    def __post_init__(self) -> None:
        _check_parts(self)
        evaluates = self.eval_data is not None or self.test_fraction > 0
        require_effect(self, "ledger", "eval_data or test_fraction", "neither", evaluates)
        if self.nll_weight < 0:
            raise ValueError(f"nll_weight must not be negative, got {self.nll_weight}")
        twice = [
            name for name in ("beta", "label_smoothing") if name in self.loss_args and getattr(self, name) is not None
        ]
        if twice:
            raise ValueError(f"{', '.join(twice)} is given twice, also in loss_args {self.loss_args}")
        if self.weights_from is not None and self.loss_args.get("weight_column", WEIGHTS) != WEIGHTS:
            raise ValueError(f"give weights_from or weight_column {self.loss_args['weight_column']}, not both")
        if self.reference == "adapters_off" and (self.lora is None or self.adapter is not None):
            raise ValueError("reference adapters_off is the start of a new adapter only; use frozen_copy")
        if self.reference_cache is not None and not self.precompute_ref_log_probs:
            raise ValueError("reference_cache needs precompute_ref_log_probs: true")
        self._check_moving_reference()
        if self.disable_dropout and self.lora is not None and self.lora.lora_dropout:
            raise ValueError(f"lora_dropout {self.lora.lora_dropout} needs disable_dropout false, got true")

    def at_start(self) -> Self:
        """The same with a reference that stays where it starts."""
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self) if field.name in MOVING}
        return replace(self, **defaults)

    def _check_moving_reference(self) -> None:
        moves = self.sync_ref_model
        for name in ("ref_model_sync_steps", "ref_model_mixup_alpha", "bema"):
            require_effect(self, name, "sync_ref_model true", moves, moves)
        by = "mixing" if self.bema is None else "bema"
        require_effect(self, "ref_model_mixup_alpha", "a reference that moves by mixing", by, self.bema is None)
        require_at_least(self, "ref_model_sync_steps", 1)
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha must be in (0, 1], got {self.ref_model_mixup_alpha}")
        if moves and self.precompute_ref_log_probs:
            raise ValueError("sync_ref_model moves the reference: it needs precompute_ref_log_probs false, got true")
        if moves and self.reference not in STARTS:
            raise ValueError(f"sync_ref_model moves a reference that starts as the policy, got {self.reference}")

    @property
    def knobs(self) -> dict[str, float | bool | str | None]:
        """What was set of the loss's own arguments."""
        column = None if self.weights_from is None else WEIGHTS
        named = {"beta": self.beta, "label_smoothing": self.label_smoothing, "weight_column": column}
        return {**{name: value for name, value in named.items() if value is not None}, **self.loss_args}


@dataclass(frozen=True, kw_only=True)
class DPOConfig(PreferenceConfig):
    """Settings of a preference run."""

    loss: str | list[str | dict[str, Any]] = "sigmoid"
    """Name of the preference loss, a preset (paper:ipo), or a weighted mixture (sigmoid:0.8,sft:0.2), in a YAML file
    also a list: of each part its loss, weight and args. `phi2 losses` lists all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_file is not None and self.loss == DPOConfig.loss:
            raise ValueError(f"loss_file {self.loss_file} is given, and loss is {self.loss!r}: name the loss in it")


TrainingConfig = SFTConfig | DPOConfig


def _check_parts(config: SFTConfig | PreferenceConfig) -> None:
    """Every part checks its own settings."""
    for part in (EncodeConfig, UpdateConfig, RunConfig):
        part.__post_init__(config)
