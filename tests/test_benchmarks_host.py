"""The case of the host's time: what it counts, and that it measures only what computes the same."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import host
from benchmarks.registry import GateError


def test_all_sides_are_measured_behind_a_gate(monkeypatch):
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)  # here kernels are no `JITFunction`
    report = host.compare_host_time(turns=2, layers=1)
    assert "as theirs in float32" in report.gate and len(report.measures) == 2
    assert all(min(*measure.ours, *measure.theirs) > 0 for measure in report.measures)


def test_a_pass_that_computes_something_else_is_not_measured(monkeypatch):
    peft_model = host.peft_model

    @torch.no_grad()
    def other(ours):
        theirs = peft_model(ours)
        next(p for name, p in theirs.named_parameters() if "lora_B" in name).mul_(2)
        return theirs

    monkeypatch.setattr(host, "peft_model", other)
    with pytest.raises(GateError, match="the gradients of adapters are .* apart"):
        host.gate(layers=1)


def test_a_pass_is_the_reference_and_the_policy(monkeypatch):
    model = host.random_model(host.shape(1), torch.device("cpu"), torch.float32, rank=2)
    seen = []
    model.model.register_forward_hook(lambda *_: seen.append((model.computed_adapter, torch.is_grad_enabled())))
    host.pass_of(model)()
    assert seen == [(None, False), ("default", True)]
