"""The precision that a run computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from phi2.checkpoints.weights import pick_device, pick_dtype
from phi2.runs.config import RunConfig


def compute_dtype(config: RunConfig) -> torch.dtype:
    return pick_dtype(config.dtype, pick_device(config.device))


def autocast(config: RunConfig) -> AbstractContextManager:
    """Half precision compute over float32 weights, in full training; a LoRA base is in that precision already."""
    dtype = compute_dtype(config)
    if config.lora is not None or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(pick_device(config.device).type, dtype)
