"""The benchmark of the whole loop that generates: what its gate sees, and what it weighs against what."""

from __future__ import annotations

import pytest

from benchmarks.cases import gpu_decode
from benchmarks.cases.gpu_decode import BATCH, COMPILED, Said, Setting, Side
from benchmarks.harness.gpu import Rates
from benchmarks.registry import GateError


@pytest.fixture(scope="module")
def setting() -> Setting:
    return gpu_decode.tiny()


@pytest.fixture(scope="module")
def reply(setting) -> Said:
    (said,) = gpu_decode.we_say(setting, setting.model(None), setting.prompts[:1])
    return said


def changed(how: str, said: Said) -> Said:
    if how == "token":
        return Said([said.token_ids[0], (said.token_ids[1] + 1) % 500, *said.token_ids[2:]])
    if how == "logprob":
        return said._replace(logprobs=[*said.logprobs[:-1], said.logprobs[-1] + 0.01])
    return Said(said.token_ids[:-1])


@pytest.mark.parametrize(
    ("how", "message"),
    [("token", "off by .* nats"), ("logprob", "off by 1.0e-02 nats"), ("length", "3 tokens in place of 4")],
)
def test_a_reply_that_float32_would_not_give_is_seen(how, message, setting, reply):
    with pytest.raises(GateError, match=message):
        gpu_decode.judged(setting, {"one": Side(lambda prompts: [changed(how, reply)])})


def test_what_int4_says_is_not_taken_for_what_bfloat16_says(setting):
    side = gpu_decode.our_sides(setting, setting.model(None))["int4"]
    with pytest.raises(GateError, match="int4: off by"):
        gpu_decode.judged(setting, {"int4": side._replace(format=None)})


def test_all_sides_are_weighed_against_the_memory_and_each_other(setting, monkeypatch):
    monkeypatch.setattr(gpu_decode, "measured_rates", lambda: Rates(1, 1000))
    report = gpu_decode.compare_decoding(setting, turns=1)
    assert {measure.name: measure.target for measure in report.measures} == {
        "bf16: the memory's limit": 0.70,
        "int8: the memory's limit": 0.55,
        "int4: the memory's limit": 0.40,
        f"bf16, {BATCH} replies: one": 5.0,
        "bf16: transformers": None,
        f"bf16: {COMPILED}": None,
    }
    assert all(measure.more_is_better and measure.ours.median > 0 for measure in report.measures)
    whole = 2 * (4 * 160 * 160 + 2 * 160 * 64 + 512 * 160)  # bytes of the matrices
    assert report.measures[0].theirs.median == pytest.approx(1e12 / whole)
    ours = ["bf16", "int8", "int4", f"bf16, {BATCH} replies"]
    assert [row["side"] for row in report.table] == [*ours, "transformers", COMPILED] and not report.facts
