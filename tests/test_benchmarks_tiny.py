"""Whatever wants a GPU runs on tiny shapes without one: its gate, all peers that a CPU has, and no result."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import run, stream
from benchmarks.cases import bfloat16
from benchmarks.harness import processes
from benchmarks.registry import CASES, Case, GateError, Measure, Report

NOT_ON_A_CPU = ("Liger", "SDPA cuDNN", "SDPA mem-efficient", "FlexAttention", "varlen_attn")
TINY = [name for name, case in CASES.items() if case.tiny]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def quick_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes begin with the libraries of both sides, which are imported once: that takes longest by far."""
    imported = ("trl.trainer.dpo_trainer", "trl.trainer.sft_trainer", "transformers.models.phi.modeling_phi", "peft")
    multiprocessing.set_forkserver_preload([*imported, "benchmarks.harness.trainers"])
    monkeypatch.setattr(processes, "START", "forkserver")


def slow_without_instructions(name: str):
    """The name of a case; left out where the CPU has to do bfloat16 in software, which takes it a minute."""
    missing = name == "dpo_step_bf16_vs_fp32" and not bfloat16.INSTRUCTIONS & bfloat16.cpu_flags()
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason="this CPU has no instructions for bfloat16"))


@pytest.mark.usefixtures("quick_processes")
@pytest.mark.parametrize("name", map(slow_without_instructions, TINY))
def test_a_case_runs_on_tiny_shapes_and_keeps_no_result(name, results, capsys):
    assert run.main(["--case", name, "--tiny"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: {CASES[name].summary}\n  gate green: ")
    assert said.endswith("\n  tiny shapes: their times mean nothing, so none is told or kept\n")
    assert not results.exists()
    if not torch.cuda.is_available():
        missing = re.findall(r"(?m)^  [^:\n]*, without ([^:\n]+): ", said)
        assert [each for each in missing if not each.startswith(NOT_ON_A_CPU)] == []


def test_a_visit_is_told_nothing_of_tiny_shapes(results, monkeypatch, tmp_path):
    def measure() -> Report:
        one = Measure.of("time", "s", [1.0], [2.0])
        stream.measured("toy", [one])
        return Report({"peer": "1.0"}, "all equal", [one])

    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setitem(CASES, "toy", Case(lambda turns: None, 1, "a toy", measure))
    assert run.main(["--case", "toy", "--tiny"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_red_gate_is_told_on_tiny_shapes_too(results, monkeypatch, capsys):
    def red() -> Report:
        raise GateError("output is off")

    monkeypatch.setitem(CASES, "toy", Case(lambda turns: None, 1, "a toy", red))
    assert run.main(["--case", "toy", "--tiny"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err == "toy: no number: output is off\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "dpo_step_vs_trl"], "--tiny: dpo_step_vs_trl has no tiny shapes; those that have: "),
        (["--case", "head", "--turns", "3"], "--tiny measures nothing, so it takes no --turns"),
        ([], "--tiny needs a --case"),
    ],
)
def test_what_tiny_would_ignore_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run.main([*arguments, "--tiny"])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_command_without_a_gpu_interprets_the_kernels():
    own = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.run", "--case", "elementwise", "--tiny"]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "gelu: ours, eager" in done.stdout, done.stderr


@pytest.mark.parametrize("steps", ["all", "limit=225 steps"])
def test_a_visit_to_a_gpu_asks_for_cases_that_can_be_tried_without_one(steps):
    script = Path(run.__file__).with_name("gpu.sh").read_text()
    names = re.search(rf'{steps}="tests ([^"]+)"', script)[1].split()
    assert len(names) > 1 and set(names) <= set(TINY)
