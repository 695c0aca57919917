"""Which implementation runs: what is named, what `auto` means, and what the environment says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from phi2_kernels import _dispatch
from phi2_kernels._dispatch import architecture, use_triton

CPU = torch.zeros(1)


def test_auto_is_torch_for_tensors_on_a_cpu():
    assert not use_triton("auto", CPU) and not use_triton("torch", CPU)


def test_an_obstacle_is_not_looked_for_where_torch_runs():
    use_triton("auto", CPU, lambda: pytest.fail("asked"))


def test_a_named_implementation_runs_or_says_why_not():
    with pytest.raises(ValueError, match="impl='triton' cannot run: it is too odd"):
        use_triton("triton", CPU, lambda: "it is too odd")


def test_what_auto_stands_for_can_be_set(monkeypatch):
    monkeypatch.setattr(_dispatch, "default_impl", "triton")
    with pytest.raises(ValueError, match="dtype must be one of torch.float32, torch.float16, torch.bfloat16"):
        use_triton("auto", CPU.double())
    assert not use_triton("torch", CPU.double())


def test_the_environment_sets_it():
    program = "import torch; from phi2_kernels.gelu import gelu; gelu(torch.zeros(1))"
    environment = {**os.environ, "PHI2_IMPL": "cuda"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "impl (or PHI2_IMPL) must be one of auto, torch, triton, got 'cuda'" in done.stderr


def test_an_interpreted_kernel_is_launched_like_an_a100s():
    assert architecture(torch.device("cpu")) == 80
