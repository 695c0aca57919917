"""The order in which a run sees its data: a function of the seed and the step, so resuming needs no saved state."""

from __future__ import annotations

import functools
import math

import torch

from phi2.training.config import TrainingConfig, UpdateConfig
from phi2.training.optim import warmup_updates


class Windows:
    """One optimizer step consumes one window: `accumulation` micro-batches of `batch_size` samples.

    Every epoch is a permutation of the data of its own; its last window, and the last micro-batch of that window, hold
    what is left.

    Args:
        samples: number of samples.
        batch_size: samples of a micro-batch.
        accumulation: micro-batches of a window.
        seed: of the permutations.
        shuffle: False keeps the order of the data.

    Attributes:
        size: samples of a window.
    """

    def __init__(self, samples: int, batch_size: int, accumulation: int, seed: int, shuffle: bool = True) -> None:
        self.samples, self.batch_size, self.size = samples, batch_size, batch_size * accumulation
        self.seed, self.shuffle = seed, shuffle
        self._order = functools.lru_cache(maxsize=1)(self._permutation)

    @property
    def per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return math.ceil(self.samples / self.size)

    def window(self, step: int) -> list[int]:
        """The sample indices of optimizer step `step`, counted from 0."""
        epoch, window = divmod(step, self.per_epoch)
        return self._order(epoch)[window * self.size : (window + 1) * self.size]

    def at(self, step: int) -> list[list[int]]:
        """The sample indices of each micro-batch of optimizer step `step`, counted from 0."""
        chosen = self.window(step)
        return [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]

    def until(self, steps: int) -> list[int]:
        """The samples that the first `steps` optimizer steps see, each once, in the order of the data."""
        if steps >= self.per_epoch:
            return list(range(self.samples))
        return sorted(index for step in range(steps) for batch in self.at(step) for index in batch)

    def _permutation(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.samples))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.samples, generator=generator).tolist()


def windows_of(config: TrainingConfig, samples: int) -> Windows:
    """Those of a run over so many samples."""
    return Windows(
        samples, config.per_device_train_batch_size, config.gradient_accumulation_steps, config.seed, config.shuffle
    )


def total_steps(config: UpdateConfig, windows: Windows) -> int:
    """Updates of the whole run.

    Raises:
        ValueError: when the warm-up outlasts them.
    """
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * windows.per_epoch)
    warmup_updates(config, total)
    return total
