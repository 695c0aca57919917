"""The benchmarks of whole decode steps and of the loop around them: what they count, and that all say the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import loop, step
from benchmarks.cases.loop import Loop
from benchmarks.harness.comparison import OURS, Comparison, Work, gate
from benchmarks.harness.gpu import Rates
from benchmarks.harness.models import random_model
from benchmarks.registry import GateError
from phi2.config import Phi2Config
from phi2.quantize import quantize_model

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
SMALL = Phi2Config(
    vocab_size=96, hidden_size=160, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2,
    max_position_embeddings=64, partial_rotary_factor=0.4, initializer_range=0.1,
)  # fmt: skip


def compare(format: str | None, dtype: torch.dtype = torch.float32) -> Comparison:
    return step.compare_step(DEVICE, dtype, SMALL, 5, format)


def test_a_step_counts_every_weight_and_the_keys_and_values_of_its_context():
    blocks, head = 2 * (4 * 160 * 160 + 2 * 160 * 64), 96 * 160
    assert step.step_work(SMALL, 5, 16, 16) == Work(2 * (blocks + head + 3200), 2 * (blocks + head) + 6400)
    assert step.step_work(SMALL, 5, 5, 8).bytes == blocks * 5 // 8 + head + 6400
    assert step.step_work(SMALL, 5, 16, 16, rows=3) == Work(6 * (blocks + head + 3200), 2 * (blocks + head) + 3 * 6400)


@pytest.mark.parametrize("format", step.BITS)
def test_our_step_and_its_peers_say_the_same(format):
    found = gate(compare(format))
    assert not found.absent and OURS in found.implementations and max(found.errors.values()) < 1e-5


def test_half_precision_passes_the_gate():
    assert gate(compare(None, torch.bfloat16)).errors[OURS] < 2e-2


def test_every_call_adds_a_token():
    ours = compare(None).ours
    first, second = (ours.run(torch.full((1, 1), 7, device=DEVICE))["output"] for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-4)


def test_a_step_that_forgets_its_context_is_seen():
    whole, empty = compare(None), step.compare_step(DEVICE, torch.float32, SMALL, 4, None)
    with pytest.raises(GateError, match="step float32: output is off"):
        gate(replace(whole, ours=empty.ours))


@pytest.mark.parametrize("format", step.BITS)
@pytest.mark.parametrize("rows", loop.ROWS)
def test_the_loop_and_its_steps_alone_say_the_same_and_have_a_speed(format, rows):
    model = random_model(SMALL, DEVICE, torch.float32)
    if format:
        quantize_model(model, format)
    with step.recordable(DEVICE):
        sides = loop.measure(model, Loop(rows, context=9, new=5), turns=2)
    assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in sides)


def test_a_loop_that_says_something_else_has_no_number(monkeypatch):
    monkeypatch.setattr(loop, "steps_of", lambda *_: lambda: [[0] * 5])
    with pytest.raises(GateError, match="does not say what its steps say"):
        loop.measure(random_model(SMALL, DEVICE, torch.float32), Loop(1, 9, 5), turns=1)


def test_the_share_of_a_loop_is_the_time_of_the_roofline_by_its_own():
    rates, work = Rates(tflops=1e9, gbytes=1000), step.step_work(Phi2Config(), 9 + 2, 16, 16, rows=8)
    row = loop.line("name", "side", [400.0, 800.0, 900.0], Loop(8, 9, 5), None, rates)
    assert row["ms a step"] == 10.0 and row["tok/s"] == 800.0
    assert row["share"] == pytest.approx(work.bytes / 1e9 / 10, abs=1e-3)
