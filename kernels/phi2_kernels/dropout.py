"""Dropout by masks that come from a seed, so that a backward pass makes them again and nothing is kept.

y = x keep / (1 - p)        keep = 1 with probability 1 - p, else 0
"""

from __future__ import annotations

import torch
from torch import Tensor


def new_seed() -> Tensor:
    """A seed from torch's global generator, as int64 on the CPU: reading it waits for no GPU.

    It follows `torch.manual_seed`, and a checkpointed pass that is run again draws it again.
    """
    return torch.randint(2**62, (), dtype=torch.int64, device="cpu")


def keep_mask(x: Tensor, p: float, seed: Tensor, number: int) -> Tensor:
    """What is kept of x, as booleans: of one dtype, so that a gradient in another gets the same mask.

    Args:
        p: probability of False.
        number: tells the masks of one seed apart.
    """
    generator = torch.Generator(x.device).manual_seed(int(seed) + number)
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
