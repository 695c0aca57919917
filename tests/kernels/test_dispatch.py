"""Which implementation runs: what is named, what `auto` means, and what the environment says."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from importlib import import_module
from inspect import getmembers, getsource, isfunction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from phi2_kernels import _dispatch
from phi2_kernels._dispatch import architecture, on_its_device, use_triton

CPU = torch.zeros(1)


def test_auto_is_torch_for_tensors_on_a_cpu():
    assert not use_triton("auto", CPU) and not use_triton("torch", CPU)


def test_a_reason_is_not_looked_for_where_torch_runs():
    use_triton("auto", CPU, lambda: pytest.fail("asked"))


def test_a_named_implementation_runs_or_says_why_not():
    with pytest.raises(ValueError, match="impl='triton' cannot run: it is too odd"):
        use_triton("triton", CPU, lambda: "it is too odd")


def test_what_auto_stands_for_can_be_set(monkeypatch):
    monkeypatch.setattr(_dispatch, "default_impl", "triton")
    with pytest.raises(ValueError, match="dtype must be one of torch.float32, torch.float16, torch.bfloat16"):
        use_triton("auto", CPU.double())
    assert not use_triton("torch", CPU.double())


def test_a_name_in_the_environment_that_is_none_is_told_before_any_work(tmp_path):
    command = f"-m phi2 dpo --model nano --data toy-dpo --output {tmp_path / 'run'}".split()
    environment = {**os.environ, "PHI2_IMPL": "cuda"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    told = "phi2 dpo: impl (or PHI2_IMPL) must be one of auto, torch, triton, got 'cuda'\n"
    assert done.stderr == told and done.returncode == 1 and not (tmp_path / "run").exists()


def test_a_launcher_runs_on_the_device_of_its_first_tensor(monkeypatch):
    current = ["cuda:0"]

    @contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    where = on_its_device(lambda x: str(current[-1]))
    assert [where(SimpleNamespace(is_cuda=True, device=torch.device("cuda", i))) for i in range(2)] == [
        "cuda:0",
        "cuda:1",
    ]
    assert where(CPU) == "cuda:0" == current[-1]


@pytest.mark.parametrize(
    "file", sorted(Path(_dispatch.__file__).parent.glob("*_triton.py")), ids=lambda file: file.stem
)
def test_every_launcher_is_one_of_these(file):
    name = f"phi2_kernels.{file.stem}"
    functions = [f for _, f in getmembers(import_module(name), isfunction) if f.__module__ == name]
    launchers = [f for f in functions if is_launcher(f)]
    assert all(hasattr(f, "__wrapped__") for f in launchers)
    assert bool(launchers) == ("_kernel[" in file.read_text())


def is_launcher(function) -> bool:
    return "_kernel[" in getsource(function)


def test_an_interpreted_kernel_is_launched_like_an_a100s():
    assert architecture(torch.device("cpu")) == 80
