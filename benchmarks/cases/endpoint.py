"""`phi2 serve` under load against its own engine: what HTTP, JSON and text for 32 clients at once cost.

Both answer the same 32 prompts, 32 tokens each, in 32 slots. The clients, which stream, share process and processors
with the server. A latency is the time from the start of a turn to the end of one reply.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from threading import Thread
from zlib import crc32

import numpy as np

from benchmarks.cases.engine import mixed_prompts, nano
from benchmarks.harness.processes import Result, Timer, compare
from benchmarks.registry import Measure, Report, case, versions
from phi2.inference.config import SamplingParams
from phi2.inference.engine import Engine
from phi2.inference.generate import choices_of, replies_to
from phi2.serve.config import EndpointConfig
from phi2.serve.models import Served
from phi2.serve.server import listen, make_server, url
from phi2.tokenizer import Tokenizer

CLIENTS, NEW_TOKENS = 32, 32
TURNS = 8  # with prompts of their own, which no slot holds any more when they come again


@case("endpoint_vs_engine", turns=5, summary="32 clients that stream 32 tokens each, nano; the engine alone")
def endpoint_vs_engine(turns: int) -> Report:
    result = compare(endpoint, engine_alone, None, turns, {"texts": 0.0})
    return Report(
        peer={"Engine": "alone"} | versions("openai", "uvicorn"),
        gate=f"{CLIENTS} equal replies a turn",
        measures=[*result.speeds(), *(_latency(result, percentile) for percentile in (50, 99)), *result.memory()],
    )


def _latency(result: Result, percentile: int) -> Measure:
    return result.relative(f"latency p{percentile}", lambda turn: np.percentile(turn.outcome["latencies"], percentile))


def endpoint(timer: Timer, job: None) -> None:
    import openai

    model, tokenizer = nano()
    listener = listen("127.0.0.1", 0)
    config = EndpointConfig(slots=CLIENTS)
    engine = Engine(model, choices_of(model, tokenizer), CLIENTS)
    server = make_server(Served(model, tokenizer, {"nano": None}), engine, config)
    Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    client = openai.AsyncOpenAI(base_url=url(*listener.getsockname()), api_key="none")

    async def ask(prompt: str, start: float) -> tuple[str, float]:
        asked = dict(model="nano", prompt=prompt, max_tokens=NEW_TOKENS, temperature=0, stream=True)
        pieces = [chunk.choices[0].text async for chunk in await client.completions.create(**asked)]
        return "".join(pieces), time.perf_counter() - start

    async def ask_all(prompts: list[str]) -> list[tuple[str, float]]:
        start = time.perf_counter()
        return await asyncio.gather(*(ask(prompt, start) for prompt in prompts))

    with asyncio.Runner() as runner:
        _take_turns(timer, tokenizer, lambda prompts: runner.run(ask_all(prompts)))


def engine_alone(timer: Timer, job: None) -> None:
    model, tokenizer = nano()
    engine = Engine(model, choices_of(model, tokenizer), CLIENTS)

    def answer_all(prompts: list[str]) -> list[tuple[str, float]]:
        start, texts, ends = time.perf_counter(), [""] * CLIENTS, [0.0] * CLIENTS
        params = [SamplingParams(max_new_tokens=NEW_TOKENS)] * CLIENTS
        for number, chunk in replies_to(engine, tokenizer, [tokenizer.encode(prompt) for prompt in prompts], params):
            texts[number] += chunk.text
            ends[number] = time.perf_counter() - start
        return list(zip(texts, ends, strict=True))

    with ThreadPoolExecutor(1) as thread:  # as the worker is one: what OpenMP's threads cost depends on who asks them
        _take_turns(timer, tokenizer, lambda prompts: thread.submit(answer_all, prompts).result())


def _take_turns(timer: Timer, tokenizer: Tokenizer, answer_all: Callable[[list[str]], list[tuple[str, float]]]) -> None:
    prompts = mixed_prompts(tokenizer, TURNS * CLIENTS)
    for start in cycle(range(0, len(prompts), CLIENTS)):
        timer.start()
        answers = answer_all(prompts[start : start + CLIENTS])
        timer.stop()
        texts = [crc32(text.encode()) for text, _ in answers]
        timer.report(texts=texts, latencies=[seconds for _, seconds in answers])
