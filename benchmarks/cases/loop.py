"""Decoding as the engine does it, beside the recorded steps alone: what the loop around them costs.

The engine answers the same prompts turn after turn, which it has read in the first; so a turn is nothing but steps. The
steps alone are the same replays, one behind the other, and nobody looks at what they say until all are done.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import torch

from benchmarks import stream
from benchmarks.cases.step import BITS, GREEDY, recordable, step_work
from benchmarks.harness.gpu import PACKAGES, Rates, any_device, device, measured_rates
from benchmarks.harness.models import TINY, random_model
from benchmarks.registry import Cells, GateError, Measure, Report, Spread, case, versions
from phi2.config import Phi2Config
from phi2.inference.config import SamplingParams
from phi2.inference.engine import Engine, Request
from phi2.inference.rows import Rows
from phi2.inference.step import RecordedStep
from phi2.model import Phi2ForCausalLM
from phi2.quantize import quantize_model

ROWS = 1, 8
WARM_UP = 2  # turns that are not timed: in the first the engine reads its prompts, in the second both record
TARGET = 0.95  # of the speed of the steps alone
EQUAL = "equal tokens"


class Loop(NamedTuple):
    """What is answered: so many rows, each of a prompt of so many random tokens, by so many new ones."""

    rows: int
    context: int
    new: int

    def prompts(self, V: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(V, (self.rows, self.context), generator=generator).tolist()


def tiny_loop() -> Report:
    """For `benchmarks.run --tiny`: the gate alone, in float32, since the engine does not record on a CPU."""
    for format in BITS:
        model = random_model(TINY, any_device(), torch.float32)
        if format:
            quantize_model(model, format)
        with recordable(model.device):
            measure(model, Loop(rows=3, context=5, new=4), turns=0)
    return Report(versions(*PACKAGES), EQUAL, [])


SUMMARY = "256 tokens after 128 by the engine, Phi-2, beside its recorded steps alone"


@case("decode_loop", 4, SUMMARY, tiny_loop)
def decode_loop(turns: int) -> Report:
    gpu, rates, measures, table = device(), measured_rates(), [], []
    for format in BITS:
        model = random_model(Phi2Config(), gpu, torch.bfloat16)
        if format:
            quantize_model(model, format)
        for rows in ROWS:
            loop = Loop(rows, 128, 256)
            speeds = measure(model, loop, turns)
            name = f"{format or 'bfloat16'}, {rows} at once"
            measures.append(Measure.of(name, "tok/s", *speeds, target=TARGET, more_is_better=True))
            table += [line(name, side, own, loop, format, rates) for side, own in zip(SIDES, speeds, strict=True)]
            stream.measured(name, measures[-1:])
    return Report(versions(*PACKAGES), EQUAL, measures, table=table)


SIDES = "the engine", "its steps alone"


def measure(model: Phi2ForCausalLM, loop: Loop, turns: int) -> tuple[list[float], list[float]]:
    """Tokens a second of the engine, and of its steps alone, in turns.

    Raises:
        GateError: when they do not say the same.
    """
    engine = Engine(model, model.config.vocab_size, loop.rows, loop.context + loop.new)
    sides = engine_of(engine, loop), steps_of(engine, loop)
    speeds: tuple[list[float], list[float]] = [], []
    for turn in range(WARM_UP + turns):
        said = []
        for run, own in zip(sides, speeds, strict=True):
            begin = perf_counter()
            said.append(run())
            if turn >= WARM_UP:
                own.append(loop.rows * loop.new / (perf_counter() - begin))
        if turn and said[0] != said[1]:  # reading a prompt rounds otherwise than a step
            raise GateError("the engine does not say what its steps say alone")
    return speeds


def engine_of(engine: Engine, loop: Loop) -> Callable[[], list[list[int]]]:
    """What answers all prompts, to the token ids of each row."""
    params, prompts = SamplingParams(max_new_tokens=loop.new), loop.prompts(engine.choices)

    def answer() -> list[list[int]]:
        said: dict[Request, list[int]] = {Request(ids, params): [] for ids in prompts}
        for request in said:
            engine.add(request)
        while not engine.is_idle:
            for token in engine.step():
                said[token.request].append(token.token_id)
        return [*said.values()]

    return answer


def steps_of(engine: Engine, loop: Loop) -> Callable[[], list[list[int]]]:
    """Likewise, on the cache that the engine has filled."""
    last = {row: ids[-1] for row, ids in enumerate(loop.prompts(engine.choices))}
    rows = Rows(loop.rows, engine.cache.max_length, engine.choices, engine.model.device)
    step = RecordedStep(engine.model, engine.cache, rows, loop.rows, GREEDY)

    @torch.no_grad()
    def run() -> list[list[int]]:
        rows.activate(dict.fromkeys(last, loop.context - 1), last)
        numbers = [step(engine.model) for _ in range(loop.new)]
        said = [[int(token) for token, _, _ in each.wait()] for each in numbers]
        return [list(row) for row in zip(*said, strict=True)]

    return run


def line(name: str, side: str, speeds: list[float], loop: Loop, format: str | None, rates: Rates) -> Cells:
    """Of the table. The share is the roofline's time of a step, in the middle of a reply, by the time that it takes."""
    speed = Spread.of(speeds).median
    floor = rates.floor(step_work(Phi2Config(), loop.context + loop.new // 2, *BITS[format], rows=loop.rows))
    ms = 1e3 * loop.rows / speed
    return {
        "task": name,
        "side": side,
        "tok/s": round(speed, 1),
        "ms a step": round(ms, 3),
        "roofline ms": round(floor, 3),
        "share": round(floor / ms, 3),
    }
