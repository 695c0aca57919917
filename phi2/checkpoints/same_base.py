"""Whether a model is the one an adapter was trained on: a few numbers of every frozen weight, kept with the adapter.

An adapter put on another base of the same shape gives wrong answers without an error. A hash would call every copy in
another precision another base, so the numbers themselves are kept, in bfloat16. Fine-tuning shows in them however
little it moved: the smallest weights change by the largest shares.

Only the blocks are looked at. Embedding and head gain and lose rows, and an adapter may bring its own head.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

PER_WEIGHT = 16
RTOL, ATOL = 2**-7, 1e-7  # between precisions: two roundings to bfloat16; the last bits of small float16 numbers


@torch.no_grad()
def sample_of_base(model: nn.Module) -> str:
    """Hexadecimal bytes of evenly spaced numbers of each frozen weight in the blocks."""
    parts = [_spaced(p) for name, p in model.named_parameters() if ".layers." in name and ".lora_" not in name]
    return torch.cat(parts).cpu().view(torch.uint8).numpy().tobytes().hex()


def is_same_base(model: nn.Module, sample: str) -> bool:
    """Whether `sample_of_base` gave `sample` for these weights, in whatever precision each time."""
    now = sample_of_base(model)
    return len(now) == len(sample) and torch.allclose(_numbers(now), _numbers(sample), rtol=RTOL, atol=ATOL)


def _spaced(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: -(-flat.numel() // PER_WEIGHT)].bfloat16()


def _numbers(sample: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(sample), dtype=torch.bfloat16).float()


@torch.no_grad()
def digest_of_weights(model: nn.Module) -> str:
    """Of name, dtype, shape and evenly spaced numbers of everything that a model computes with, adapters included."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        numbers = weight.flatten()[:: -(-weight.numel() // PER_WEIGHT)].contiguous().cpu().view(torch.uint8)
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + numbers.numpy().tobytes())
    return digest.hexdigest()
