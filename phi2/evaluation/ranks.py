"""Processes side by side, each with a share of the samples: what the harness asks of a model that is not alone."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of `torchrun`, once torch.distributed is initialised; else this one alone."""

    @classmethod
    def start(cls) -> Ranks:
        """Joins the others, if `torchrun` started this process."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        return cls()

    def device(self, asked: str) -> str:
        """The device of this process: with several on one machine each has a GPU of its own."""
        several = self.count > 1 and torch.cuda.is_available() and asked in ("auto", "cuda")
        return f"cuda:{os.environ['LOCAL_RANK']}" if several else asked

    @property
    def count(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks behind one another; a number becomes a tensor of one."""
        own = torch.atleast_1d(tensor)
        if self.count == 1:
            return own
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own)
        return torch.cat(parts)

    def gather_object(self, value: Any, rank: int) -> list[Any] | None:
        """On `rank` the values of all ranks, elsewhere None."""
        if self.count == 1:
            return [value]
        values = [None] * self.count if self.rank == rank else None
        dist.gather_object(value, values, dst=rank)
        return values

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()
