"""Keys, queues, clocks and load: clients that are many, slow, gone or malformed."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import openai
import psutil
import pytest

from phi2.inference.engine import Engine


def test_only_who_has_the_key_is_answered(served, serving):
    with serving(served, key="sesame") as running:
        assert running.client("sesame").models.list().data
        for call in (
            lambda client: client.models.list(),
            lambda client: client.completions.create(model="left", prompt="hi"),
        ):
            with pytest.raises(openai.AuthenticationError):
                call(running.client("sesam"))
        assert running.post(b"{}")[1].count("www-authenticate: bearer") == 1


@contextmanager
def occupying(running, choices: int) -> Iterator[None]:
    """So many replies are under way, and nobody reads them."""
    ask = {"model": "left", "prompt": "x", "max_tokens": 250, "n": choices, "stream": True, "logprobs": 20}
    ask["temperature"] = 0  # a sampled reply may end at once
    body = json.dumps(ask).encode()
    with running.send("POST /v1/completions HTTP/1.1\r\nContent-Type: application/json", body) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        yield


def test_beyond_the_queue_is_429_and_a_hang_up_makes_room(served, serving):
    with serving(served, slots=2, max_queue=1) as running:
        ask = dict(model="left", prompt="hi", max_tokens=2)
        with occupying(running, 3):
            with pytest.raises(openai.RateLimitError, match="the queue is full") as refused:
                running.client().completions.create(**ask)
            assert int(refused.value.response.headers["retry-after"]) >= 1
        assert running.is_idle()
        assert running.client().completions.create(**ask).choices


def test_a_request_has_its_time_and_then_leaves_nothing(served, monkeypatch, serving):
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: time.sleep(0.1) or step(engine))
    with serving(served, request_timeout=0.5) as running:
        ask = dict(model="left", prompt="hi", max_tokens=100, temperature=0)  # sampled, it may end at once
        with pytest.raises(openai.InternalServerError, match="longer than this server allows") as late:
            running.client().completions.create(**ask)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(running.client().completions.create(**ask, stream=True))
        assert running.is_idle()


def test_a_body_that_does_not_come_is_not_waited_for(served, serving):
    with serving(served, request_timeout=0.3, slots=1, max_queue=0) as running:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        assert running.client().completions.create(model="left", prompt="hi", max_tokens=2).choices


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_that_never_reads_loses_its_places_in_the_end(served, stream, serving, soon):
    ask = {"model": "left", "prompt": [5] * 250, "n": 32, "echo": True, "max_tokens": 0, "logprobs": 20}  # 4 MB
    body = json.dumps(ask | {"stream": stream}).encode()
    with serving(served, request_timeout=4, slots=8, max_queue=24) as running:
        head = "POST /v1/completions HTTP/1.1\r\nContent-Type: application/json"
        with running.send(head, body) as connection:
            assert connection.recv(12) == b"HTTP/1.1 200"
            assert running.post(b"{}")[0] == 429
            assert soon(lambda: running.post(b"{}")[0] == 400)


# ---- under load ----


class Question(NamedTuple):
    name: str
    prompt: str
    sampling: dict

    async def ask(self, client: openai.AsyncOpenAI, number: int) -> str | None:
        """The text as one kind of client or another gets it; None of a client that hangs up."""
        asked = dict(model=self.name, prompt=self.prompt, max_tokens=8, **self.sampling)
        if number % 4 == 0:
            return (await client.completions.create(**asked)).choices[0].text
        text = ""
        async for chunk in await client.completions.create(**asked, stream=True):
            text += chunk.choices[0].text
            if number % 4 == 1:
                await asyncio.sleep(0.02)  # a slow reader
            if number % 8 == 2:
                return None
        return text


def questions(base: str) -> list[Question]:
    """64, which share beginnings, models and settings with some others."""
    prompts = ["The boat", "The boat sank", "Q: why?", "a" * 60, "The", "12 + 30", "def f(x):", "The boat sank in"]
    samplings = [{"temperature": 0}, {"temperature": 0.9, "seed": 4}, {"temperature": 1.3, "seed": 9, "top_p": 0.9}]
    names = [base, "left", "right"]
    return [Question(names[i % 3], prompts[i % 8], samplings[i // 8 % 3]) for i in range(64)]


async def storm(running, asked: list[Question]) -> list[str | None]:
    """All at once, and malformed bodies between them."""
    bad = [(b'{"model": ', 400), (b'{"model": "left", "prompt": ["x", 3]}', 400), (b'{"model": "m"}', 404)] * 4
    async with openai.AsyncOpenAI(base_url=running.url, api_key="none", max_retries=0, timeout=60) as client:
        answers = asyncio.gather(*(question.ask(client, i) for i, question in enumerate(asked)))
        statuses = await asyncio.gather(*(asyncio.to_thread(running.post, body) for body, _ in bad))
        assert [status for status, _, _ in statuses] == [status for _, status in bad]
        return await answers


def test_64_clients_at_once_get_what_each_gets_alone_and_leave_nothing(running, alone, base):
    asked = questions(base)
    expected = [alone(q.name, q.prompt, max_new_tokens=8, **q.sampling) for q in asked]
    answers = asyncio.run(storm(running, asked))
    assert answers.count(None) == 8
    assert [a for a in answers if a is not None] == [e for a, e in zip(answers, expected, strict=True) if a is not None]
    assert running.is_idle()


def test_memory_stays_flat_under_load(running, base):
    process, asked = psutil.Process(), questions(base)[:32]
    asyncio.run(storm(running, asked))
    before = process.memory_info().rss
    for _ in range(2):
        asyncio.run(storm(running, asked))
    assert process.memory_info().rss - before < 8 * 2**20
