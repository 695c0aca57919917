"""Numbers between a host and a GPU, neither of which waits for what the other still has to do."""

from __future__ import annotations

import torch
from torch import Tensor


class Arriving:
    """Numbers on their way to the host. On a GPU they go into pinned memory as soon as they are computed."""

    def __init__(self, numbers: Tensor) -> None:
        on_gpu = numbers.is_cuda
        self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=on_gpu)
        self._numbers.copy_(numbers, non_blocking=True)
        self._arrival = torch.cuda.current_stream(numbers.device).record_event() if on_gpu else None

    def wait(self) -> list:
        """The numbers, in lists as their dims are. What the GPU was given behind them is not waited for."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._numbers.tolist()


def without_wait(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device. Out of other than pinned memory a GPU takes it behind all it has to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
