"""The order in which a run sees its data: a function of the seed and the step, so resuming needs no saved state.

How the samples of an update go through the model is another matter (`passes.py`).
"""

from __future__ import annotations

import functools
import math

import torch

from phi2.training.config import TrainingConfig, UpdateConfig
from phi2.training.optim import warmup_updates


class Windows:
    """One optimizer step consumes one window of samples.

    Every epoch is a permutation of the data of its own; its last window holds what is left.

    Args:
        samples: number of samples.
        size: samples of a window.
        seed: of the permutations.
        shuffle: False keeps the order of the data.
    """

    def __init__(self, samples: int, size: int, seed: int, shuffle: bool = True) -> None:
        self.samples, self.size, self.seed, self.shuffle = samples, size, seed, shuffle
        self._order = functools.lru_cache(maxsize=1)(self._permutation)

    @property
    def per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(self.samples / self.size)

    def at(self, step: int) -> list[int]:
        """The sample indices of optimizer step `step`, counted from 0."""
        epoch, window = divmod(step, self.per_epoch)
        return self._order(epoch)[window * self.size : (window + 1) * self.size]

    def until(self, steps: int) -> list[int]:
        """The samples that the first `steps` optimizer steps see, each once, in the order of the data."""
        if steps >= self.per_epoch:
            return list(range(self.samples))
        return sorted(index for step in range(steps) for index in self.at(step))

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.samples))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.samples, generator=generator).tolist()


def windows_of(config: TrainingConfig, samples: int) -> Windows:
    """Those of a run over so many samples."""
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return Windows(samples, size, config.seed, config.shuffle)


def total_steps(config: UpdateConfig, windows: Windows) -> int:
    """Updates of the whole run.

    Raises:
        ValueError: when the warm-up outlasts them.
    """
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * windows.per_epoch)
    warmup_updates(config, total)
    return total
