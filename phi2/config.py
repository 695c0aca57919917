"""The shape of a Phi model: phi-1, phi-1.5 and phi-2 are one architecture with different numbers.

Field names are those of Hugging Face's `config.json`. Two spellings of that file exist: transformers 4 writes
`rope_theta`, `partial_rotary_factor` and `torch_dtype` at the top level, transformers 5 writes `rope_parameters` and
`dtype`. Both are read; both are written, so either version loads what we save.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh")  # two names of one function: GELU by its tanh approximation
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OLDER_MODEL_TYPES = ("mixformer-sequential", "phi-msft")


@dataclass(frozen=True)
class Phi2Config:
    """Shape and constants of one Phi model; the defaults are Phi-2's.

    Raises:
        ValueError: when a number is out of range, the heads do not divide the width, or a setting is not supported.
    """

    vocab_size: int = 51200
    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    hidden_act: str = "gelu_new"
    max_position_embeddings: int = 2048
    layer_norm_eps: float = 1e-5
    partial_rotary_factor: float = 0.4
    rope_theta: float = 10000.0
    qk_layernorm: bool = False
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    pad_token_id: int | None = None
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in (*REQUIRED, "num_key_value_heads", "max_position_embeddings"):
            _check(name, getattr(self, name), int, lambda v: v > 0, "a positive whole number")
        for name in ("layer_norm_eps", "rope_theta"):
            _check(name, getattr(self, name), (int, float), lambda v: v > 0, "a positive number")
        for name in ("resid_pdrop", "embd_pdrop", "attention_dropout"):
            _check(name, getattr(self, name), (int, float), lambda v: 0 <= v < 1, "a probability in [0, 1)")
        _check("hidden_act", self.hidden_act, str, lambda v: v in ACTIVATIONS, f"one of {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must divide by num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must divide by"
                f" num_key_value_heads {self.num_key_value_heads}"
            )
        if not 0 < self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(f"partial_rotary_factor must leave an even number of rotary dims, got {self.rotary_dim}")

    @property
    def kv_heads(self) -> int:
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    @classmethod
    def from_dict(cls, raw: dict[str, Any], where: str = "config.json") -> Phi2Config:
        """Reads a v4 or v5 `config.json`; keys that do not shape a Phi are left out.

        Raises:
            ValueError: one line naming `where` and the field, for anything missing or unsupported.
        """
        try:
            return cls(**_supported_fields(raw))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 both read."""
        rope = {
            "rope_type": "default",
            "rope_theta": self.rope_theta,
            "partial_rotary_factor": self.partial_rotary_factor,
        }
        return {
            "architectures": ["PhiForCausalLM"],
            "model_type": "phi",
            **{f.name: getattr(self, f.name) for f in fields(self)},
            "torch_dtype": self.dtype,
            "rope_parameters": rope,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "use_cache": True,
        }


def _check(name: str, value: Any, kind: type | tuple[type, ...], allowed, rule: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind) or not allowed(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _supported_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Our fields out of either spelling of the file, refusing what we would compute wrongly."""
    if not isinstance(raw, dict):
        raise ValueError(f"must hold a JSON object, got {type(raw).__name__}")
    if raw.get("model_type") in OLDER_MODEL_TYPES or "n_embd" in raw:
        raise ValueError(
            f"model_type {raw.get('model_type')!r} is an older layout of Phi, not read yet;"
            " use a checkpoint of model_type 'phi'"
        )
    if raw.get("model_type", "phi") != "phi":
        raise ValueError(f"model_type must be 'phi', got {raw['model_type']!r}")
    missing = [name for name in REQUIRED if name not in raw]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    if raw.get("tie_word_embeddings"):
        raise ValueError("tie_word_embeddings must be false: a Phi head has its own weight and bias")
    rope = _rope_fields(raw)
    known = {f.name for f in fields(Phi2Config)}
    found = {name: value for name, value in raw.items() if name in known}
    found["dtype"] = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    _refuse_other_head_dim(raw)
    return {**found, **rope}


def _rope_fields(raw: dict[str, Any]) -> dict[str, float]:
    """Rotary base and share of the head, which v5 keeps under `rope_parameters`; 0.5 is transformers' own default."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        part = raw.get(name) or {}
        if not isinstance(part, dict):
            raise ValueError(f"{name} must be an object, got {part!r}")
        rope |= part
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type must be 'default', got {kind!r}")
    found = {}
    for name, default in (("rope_theta", 10000.0), ("partial_rotary_factor", 0.5)):
        found[name] = rope.get(name, raw.get(name, default))
        _check(name, found[name], (int, float), lambda v: v > 0, "a positive number")
    return found


def _refuse_other_head_dim(raw: dict[str, Any]) -> None:
    head_dim = raw.get("head_dim")
    if head_dim is not None and head_dim * raw["num_attention_heads"] != raw["hidden_size"]:
        raise ValueError(f"head_dim must be hidden_size / num_attention_heads, got {head_dim!r}")
