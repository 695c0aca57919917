"""Where the kernels run, and memory that cannot hide an output nobody wrote."""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Runs a test in the interpreter or on the GPU, whichever this process has."""
    if INTERPRETED != (request.param == "cpu"):
        pytest.skip("the interpreter takes CPU tensors, and compiled kernels a GPU's")
    return request.param


@pytest.fixture
def poison(monkeypatch) -> None:
    """New memory of floats is full of NaN: what a kernel forgets to write is seen."""
    with torch.device("meta"):  # torch lists its factories at the first of these, and keeps the list: not ours, below
        torch.empty(0)
    for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(where, name, _poisoned(getattr(where, name)))


def _poisoned(allocate):
    @torch.no_grad()  # torch 2.11's checkpoint makes leaves that require a gradient here
    def poisoned(*args, **kwargs):
        fresh = allocate(*args, **kwargs)
        return fresh.fill_(float("nan")) if fresh.is_floating_point() else fresh

    return poisoned
