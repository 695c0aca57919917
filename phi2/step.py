"""The decode step of a GPU: launched once kernel by kernel, then recorded as a CUDA graph and replayed.

A step is some four hundred kernels of a few microseconds each, and launching them one by one takes longer than running
them. A replay launches them all at once, with the very arguments of the recording: what changes from step to step lies
in device memory that the step itself reads and moves on, the tokens and `StepCache.slots`.

Dims: B rows, S tokens there is room for, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from phi2.cache import KVCache, StepCache
from phi2.model import Phi2ForCausalLM


class RecordedStep:
    """Logits of one more token a row, again and again for the same rows.

    Args:
        cache: holds the tokens before; it counts along.
        pads: (B, 1), how many pads each row begins with, or None.
        visible_until: (B, S) int32 over the whole cache, or None.
    """

    def __init__(
        self, model: Phi2ForCausalLM, cache: KVCache, pads: Tensor | None, visible_until: Tensor | None
    ) -> None:
        self.model, self.cache, self.pads, self.visible_until = model, cache, pads, visible_until
        self._device_cache = StepCache(cache)
        self._input_ids = torch.zeros((cache.keys.shape[1], 1), dtype=torch.int64, device=cache.keys.device)
        self._logits: Tensor | None = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        """(B, V) float32 logits after the tokens (B, 1); the next call may overwrite them.

        Raises:
            ValueError: when the cache is full.
        """
        self.cache.end_of(1)
        self._input_ids.copy_(input_ids)
        if self._logits is None:
            self._logits = self._launch()  # compiles kernels and makes workspaces, which a recording may not
        else:
            if self._replay is None:
                self._replay, self._logits = record(self._launch)
            self._replay()
        self.cache.advance(1)
        return self._logits

    def _launch(self) -> Tensor:
        slots = self._device_cache.positions(1)  # (B, 1)
        positions = slots if self.pads is None else slots - self.pads
        hidden = self.model.model(
            self._input_ids, positions=positions, visible_until=self.visible_until, cache=self._device_cache
        )
        return self.model.lm_head(hidden[:, -1]).float()


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


def record(launch: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Records what `launch` puts on the GPU without running it: a function that runs it, and its result's memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = launch()
    return graph.replay, result
