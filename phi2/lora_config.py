"""What is adapted, and how strongly: the settings of LoRA, which the command line reads without loading torch."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LoraConfig:
    """Where adapters go and how large they are; names and meanings are peft's.

    Raises:
        ValueError: when a value is out of range, or a pattern is not a regular expression.
    """

    r: int = 16
    """Rank of the learned change of every targeted layer."""
    lora_alpha: float = 16
    """The change is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Probability of dropping each input of an adapter while training."""
    target_modules: tuple[str, ...] | str = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
    """Layers to adapt: endings of names, one regular expression for whole names, or all-linear (all but lm_head)."""
    use_rslora: bool = False
    """Divide lora_alpha by the square root of r in place of r, so that high ranks learn as fast as low ones."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers: regular expression for the end of a name -> r; the first that matches counts."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other lora_alpha for some layers, chosen like rank_pattern."""
    exclude_modules: tuple[str, ...] | str | None = None
    """Of the targeted layers these are left alone: endings of names, or one regular expression for whole names."""
    layers_to_transform: tuple[int, ...] | int | None = None
    """Only blocks of these numbers, counted from 0, are adapted; null for all."""
    layers_pattern: tuple[str, ...] | str | None = None
    """Name of the list of blocks that layers_to_transform counts; null for the first number in a name."""

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        whole, positive = "a positive whole number", "a positive number"
        _check("r", self.r, _is_rank, whole)
        _check("lora_alpha", self.lora_alpha, _is_alpha, positive)
        _check("lora_dropout", self.lora_dropout, lambda p: _is_number(p) and 0 <= p < 1, "a probability in [0, 1)")
        _check("target_modules", self.target_modules, _are_targets, "a list of names or one regular expression")
        _check("use_rslora", self.use_rslora, lambda v: isinstance(v, bool), "true or false")
        names = "a list of names or one regular expression"
        _check("exclude_modules", self.exclude_modules, lambda v: not v or _are_targets(v), names)
        _check("layers_pattern", self.layers_pattern, lambda v: not v or _are_targets(v), names)
        _check("layers_to_transform", self.layers_to_transform, _are_layers, "a number of a block, or a list of them")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern {self.layers_pattern} needs layers_to_transform, got none")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                f"layers_to_transform needs target_modules as a list of names, got {self.target_modules!r}"
            )
        for name, is_value, rule in (("rank_pattern", _is_rank, whole), ("alpha_pattern", _is_alpha, positive)):
            patterns = getattr(self, name)
            _check(name, patterns, lambda v: isinstance(v, Mapping), "a mapping from patterns to numbers")
            for pattern, value in patterns.items():
                _check(f"a key of {name}", pattern, lambda p: _is_regex(_ending(p)), "a regular expression")
                _check(f"{name} {pattern!r}", value, is_value, rule)

    def rank(self, name: str) -> int:
        """r of the layer called `name`."""
        return _first_match(self.rank_pattern, name, self.r)

    def scaling(self, name: str) -> float:
        """What multiplies the change of the layer called `name`.

        Source: lora_alpha / r, arXiv:2106.09685 section 4.1; with use_rslora lora_alpha / sqrt(r), arXiv:2312.03732.
        """
        r = self.rank(name)
        return _first_match(self.alpha_pattern, name, self.lora_alpha) / (math.sqrt(r) if self.use_rslora else r)


def pattern_matches(pattern: str, name: str) -> bool:
    return re.match(_ending(pattern), name) is not None


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, name)), default)


def _check(name: str, value: Any, allowed, rule: str) -> None:
    if not allowed(value):
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and value > 0


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and value > 0


def _are_layers(value: Any) -> bool:
    return all(type(layer) is int and layer >= 0 for layer in as_tuple(value))


def _are_targets(value: Any) -> bool:
    if isinstance(value, str):
        return _is_regex(value)
    return isinstance(value, tuple) and len(value) > 0 and all(isinstance(target, str) for target in value)


def _is_regex(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError, OverflowError, RecursionError):
        return False
    return True


def as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else () if value is None else (value,)
