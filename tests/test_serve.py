"""The endpoint as its clients meet it: OpenAI's own client, lm-eval, and sockets that know no manners."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from typing import NamedTuple

import openai
import psutil
import pytest
import torch

from phi2.checkpoints.peft_files import save_adapter
from phi2.checkpoints.weights import load
from phi2.cli.commands import main
from phi2.inference.engine import Engine
from phi2.inference.generate import choices_of, generate
from phi2.lora import adapter_state, attach
from phi2.lora_config import LoraConfig
from phi2.model import Phi2ForCausalLM
from phi2.serve import schema
from phi2.serve.config import EndpointConfig
from phi2.serve.models import Served, load_served
from phi2.serve.server import listen, make_server
from phi2.tokenizer import Tokenizer

ADAPTERS = ("left", "right")
HI = [{"role": "user", "content": "hi"}]


class Running(NamedTuple):
    """A server in a thread."""

    port: int
    engine: Engine

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, key: str = "none", **settings) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=60, **settings)

    def send(self, head: str, body: bytes = b"") -> socket.socket:
        """A request as it is written by hand, whose answer is yet to be read."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        connection.sendall(f"{head}\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        return connection

    def post(self, body: bytes, path: str = "completions", headers: str = "Content-Type: application/json") -> tuple:
        """Status, headers and JSON that a body is answered with."""
        with self.send(f"POST /v1/{path} HTTP/1.1\r\nConnection: close\r\n{headers}", body) as connection:
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        head, _, content = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), head.decode().lower(), json.loads(content)

    def is_idle(self) -> bool:
        """Whether the engine has nothing left to do, now or soon."""
        return eventually(lambda: self.engine.is_idle)


def eventually(is_so: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


@contextmanager
def serving(served: Served, key: str | None = None, slots: int = 8, **settings) -> Iterator[Running]:
    config = EndpointConfig(slots=slots, **settings)
    engine = Engine(served.model, choices_of(served.model, served.tokenizer), slots)
    listener = listen("127.0.0.1", 0)
    server = make_server(served, engine, config, key)
    thread = Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    assert eventually(lambda: server.started)
    try:
        yield Running(listener.getsockname()[1], engine)
    finally:
        server.should_exit = True
        thread.join(timeout=60)
        listener.close()
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def adapter_folders(tiny_phi, tmp_path_factory) -> dict[str, str]:
    """Two adapters of the tiny Phi, far from their start."""
    folders = {}
    for seed, name in enumerate(ADAPTERS):
        model, _ = load(tiny_phi, "cpu")
        attach(model, LoraConfig(r=4, target_modules=("q_proj", "fc2")), seed)
        for tensor in adapter_state(model).values():
            tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
        folders[name] = str(tmp_path_factory.mktemp(name))
        save_adapter(model, folders[name], str(tiny_phi))
    return folders


@pytest.fixture(scope="module")
def served(tiny_phi, adapter_folders) -> Served:
    return load_served(str(tiny_phi), [f"{name}={path}" for name, path in adapter_folders.items()], device="cpu")


@pytest.fixture(scope="module")
def base(tiny_phi) -> str:
    """The name of the model without adapters."""
    return str(tiny_phi)


@pytest.fixture(scope="module")
def running(served) -> Iterator[Running]:
    with serving(served) as running:
        yield running


@pytest.fixture(scope="module")
def client(running) -> openai.OpenAI:
    return running.client()


@pytest.fixture(scope="module")
def alone(tiny_phi, adapter_folders, base) -> Callable[..., str]:
    """The text that a model says when nobody else asks: alone(name, prompt, **sampling)."""
    loaded = {base: load(tiny_phi, "cpu")}
    loaded |= {name: load(tiny_phi, "cpu", adapter=folder) for name, folder in adapter_folders.items()}
    return lambda name, prompt, **sampling: generate(*loaded[name], prompt, **sampling).text


@pytest.fixture(scope="module")
def plain(tiny_phi) -> tuple[Phi2ForCausalLM, Tokenizer]:
    """The base on its own, for passes that the server has no part in."""
    return load(tiny_phi, "cpu")


# ---- what is answered ----


def test_models_are_the_base_and_its_adapters(client, base):
    assert [model.id for model in client.models.list()] == [base, *ADAPTERS]
    assert client.models.retrieve("left").id == "left"


def test_each_name_is_answered_by_its_own_adapter(client, alone, base):
    texts = {
        name: client.completions.create(model=name, prompt="The boat", max_tokens=12, temperature=0).choices[0].text
        for name in (base, *ADAPTERS)
    }
    assert texts == {name: alone(name, "The boat", max_new_tokens=12) for name in texts}
    assert len(set(texts.values())) == 3


def test_a_chat_is_answered_by_the_template(client, alone, base):
    answer = client.chat.completions.create(model=base, messages=HI, max_completion_tokens=9, temperature=0)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", alone(base, HI, max_new_tokens=9))
    assert choice.finish_reason == "length" and answer.usage.completion_tokens == 9


def test_text_parts_and_the_developers_role_are_read_as_text_of_the_system(client, base):
    messages = [{"role": "system", "content": "be kind"}, *HI]
    parts = [{"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]}, *HI]
    asked = dict(model=base, max_tokens=8, temperature=0)
    answers = [client.chat.completions.create(messages=given, **asked) for given in (messages, parts)]
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[0] == texts[1]


def test_a_streamed_chat_is_the_whole_one_in_pieces(client, base):
    asked = dict(model=base, messages=HI, max_tokens=12, seed=3, n=2, logprobs=True, top_logprobs=2)
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        deltas = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(c.delta.content for c in deltas) == choice.message.content
        assert [c.delta.role for c in deltas] == ["assistant", *[None] * (len(deltas) - 1)]
        assert [t.token for c in deltas for t in c.logprobs.content] == [t.token for t in choice.logprobs.content]
        assert deltas[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []


def test_a_streamed_completion_is_the_whole_one_in_pieces(client, base):
    asked = dict(model=base, prompt=["ab", "The end"], max_tokens=10, temperature=0, echo=True, logprobs=1)
    whole = client.completions.create(**asked)
    choices = [choice for chunk in client.completions.create(**asked, stream=True) for choice in chunk.choices]
    for choice in whole.choices:
        own = [c for c in choices if c.index == choice.index]
        assert "".join(c.text for c in own) == choice.text
        assert [token for c in own for token in c.logprobs.tokens] == choice.logprobs.tokens
        assert [offset for c in own for offset in c.logprobs.text_offset] == choice.logprobs.text_offset


def test_choice_i_draws_from_seed_plus_i(client, alone, base):
    answer = client.completions.create(model=base, prompt="The", max_tokens=12, temperature=0.8, seed=5, n=3)
    expected = [alone(base, "The", max_new_tokens=12, temperature=0.8, seed=5 + row) for row in range(3)]
    assert [choice.text for choice in answer.choices] == expected


def test_the_settings_of_this_library_go_in_the_body_too(client, alone, base):
    own = dict(top_k=3, min_p=0.01, repetition_penalty=1.2)
    asked = dict(max_tokens=12, temperature=1.5, seed=2, extra_body=own)
    text = client.completions.create(model=base, prompt="The", **asked).choices[0].text
    assert text == alone(base, "The", max_new_tokens=12, temperature=1.5, seed=2, **own)


def test_a_stop_string_ends_the_text_before_it(client, alone, base):
    text = alone(base, "The", max_new_tokens=40)
    stop = text[10:12]
    choice = client.completions.create(model=base, prompt="The", max_tokens=40, temperature=0, stop=[stop]).choices[0]
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")


def test_a_text_its_ids_and_lists_of_them_are_one_prompt(client, base, plain):
    ids = plain[1].encode("The boat")
    asked = dict(model=base, max_tokens=8, temperature=0)
    texts = [
        choice.text
        for prompt in ("The boat", ids, ["The boat"], [ids])
        for choice in client.completions.create(prompt=prompt, **asked).choices
    ]
    assert len(texts) == 4 and len(set(texts)) == 1


def test_bytes_of_tokens_put_together_are_the_text(client, base):
    asked = dict(model=base, messages=HI, max_tokens=30, temperature=2.0, seed=1, logprobs=True)
    (choice,) = client.chat.completions.create(**asked).choices
    said = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert re.sub(r"<\|\w+\|>", "", said.decode(errors="replace")) == choice.message.content
    assert any(token.token == "\ufffd" for token in choice.logprobs.content)  # a part of a character was among them


# ---- scores ----


def scores_of(plain: tuple[Phi2ForCausalLM, Tokenizer], ids: list[int]) -> torch.Tensor:
    """(len(ids) - 1, V) log-probs of each next token, by one direct pass."""
    with torch.no_grad():
        return plain[0](torch.tensor([ids]))[0, :-1].log_softmax(dim=-1)


def test_echo_without_new_tokens_scores_the_prompt(client, base, plain):
    ids = plain[1].encode("The boat sank, and then the end.")
    asked = dict(model=base, prompt=[ids], max_tokens=0, echo=True, logprobs=2)
    (choice,) = client.completions.create(**asked).choices
    logps = scores_of(plain, ids)
    expected = logps.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert choice.text == "The boat sank, and then the end."
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=2e-5)
    best = [sorted(top.values(), reverse=True) for top in choice.logprobs.top_logprobs[1:]]
    assert torch.tensor(best).numpy() == pytest.approx(logps.topk(2).values.numpy(), abs=2e-5)
    assert "".join(choice.logprobs.tokens) == choice.text


def test_an_adapter_scores_as_itself(client, served, base, plain, adapter_folders, tiny_phi):
    adapted = load(tiny_phi, "cpu", adapter=adapter_folders["right"])
    ids = plain[1].encode("The boat sank.")
    (choice,) = client.completions.create(model="right", prompt=ids, max_tokens=0, echo=True, logprobs=0).choices
    expected = scores_of(adapted, ids).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("concurrent", [1, 4])
def test_lm_eval_scores_over_the_endpoint_as_direct_passes_do(running, base, plain, concurrent, monkeypatch):
    pytest.importorskip("tenacity")
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    lm = completions.LocalCompletionsAPI(
        base_url=f"{running.url}/completions",
        model=base,
        tokenizer=base,
        tokenizer_backend="huggingface",
        num_concurrent=concurrent,
        batch_size=2,
        max_length=256,
    )
    pairs = [("The boat", " sank"), ("Q: why?\nA:", " the wind"), ("one two", " three four"), ("x", " y")]
    found = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    for (context, continuation), (total, is_greedy) in zip(pairs, found, strict=True):
        ids, behind = plain[1].encode(context + continuation), len(plain[1].encode(context))
        logps = scores_of(plain, ids)[behind - 1 :]
        wanted = torch.tensor(ids[behind:])
        assert total == pytest.approx(logps.gather(1, wanted[:, None]).sum().item(), abs=1e-4)
        assert is_greedy == bool((logps.argmax(dim=-1) == wanted).all())


# ---- what is refused ----

REFUSED = {
    "not JSON": (b'{"model": ', 400, "not valid JSON"),
    "not UTF-8": (b'"\xff\xfe"', 400, "not valid JSON"),
    "too deep": (b"[" * 100_000, 400, "not valid JSON"),
    "not a number": (b'{"temperature": NaN}', 400, "NaN is not a number"),
    "no object": (b"[]", 400, "must be a JSON object"),
    "no model": ({"prompt": "x"}, 400, "model is missing"),
    "another model": ({"model": "gpt-4", "prompt": "x"}, 404, "'gpt-4' is not served; served: "),
    "no prompt": ({}, 400, "prompt is missing"),
    "an empty prompt": ({"prompt": ""}, 400, "the prompt is empty"),
    "a mixed prompt": ({"prompt": ["x", 1]}, 400, "prompt must be a text"),
    "an id that is none": ({"prompt": [5000]}, 400, "token id 5000"),
    "half a character": (b'{"model": "left", "prompt": "\\ud800"}', 400, "lone surrogates"),
    "a long prompt": ({"prompt": "a" * 300}, 400, "at most 255 leave room"),
    "an unknown field": ({"prompt": "x", "temprature": 1}, 400, "'temprature' is not a field"),
    "a penalty": ({"prompt": "x", "presence_penalty": 0.5}, 400, "presence_penalty is not supported"),
    "a wrong type": ({"prompt": "x", "temperature": "hot"}, 400, "temperature must be a number of at most"),
    "a number no float holds": ({"prompt": "x", "temperature": 10**400}, 400, "temperature must be a number of"),
    "infinity": (b'{"model": "left", "prompt": "x", "temperature": 1e999}', 400, "temperature must be a number of"),
    "a wrong value": ({"prompt": "x", "top_p": 2}, 400, "top_p must be in [0, 1], got 2"),
    "a setting at odds": ({"prompt": "x", "temperature": 0, "top_k": 4}, 400, "top_k 4 needs a temperature above 0"),
    "no tokens": ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens must be a whole number from 1"),
    "too many choices": ({"prompt": "x", "n": 1000}, 400, "1000 choices are asked for"),
    "usage of no stream": ({"prompt": "x", "stream_options": {"include_usage": True}}, 400, "needs stream: true"),
    "long stops": ({"prompt": "x", "stop": ["a" * 300]}, 400, "stop must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_told_in_the_form_of_an_error(case, running):
    body, status, message = REFUSED[case]
    if isinstance(body, dict):
        body = json.dumps(body if case == "no model" else {"model": "left"} | body).encode()
    found, _, answer = running.post(body)
    assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
    assert message in answer["error"]["message"] and "\n" not in answer["error"]["message"]


REFUSED_CHATS = {
    "no messages": ({"messages": []}, "messages must be a list of messages"),
    "a role that is none": ({"messages": [{"role": "tool", "content": "x"}]}, "message 1: role must be one of system"),
    "a list for a role": ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1: role must be one of system"),
    "a picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content must be a text or"),
    "a key nobody reads": ({"messages": [HI[0] | {"name": "Ann"}]}, "the chat template does not read 'name'"),
    "tools": ({"messages": HI, "tools": [{"type": "function"}]}, "tools is not supported"),
    "ranks without log-probs": ({"messages": HI, "top_logprobs": 2}, "top_logprobs needs logprobs: true"),
    "two limits": ({"messages": HI, "max_tokens": 2, "max_completion_tokens": 3}, "differ: give one"),
}


@pytest.mark.parametrize("case", REFUSED_CHATS)
def test_what_is_wrong_with_a_chat_is_told(case, running):
    body, message = REFUSED_CHATS[case]
    status, _, answer = running.post(json.dumps({"model": "left"} | body).encode(), "chat/completions")
    assert status == 400 and message in answer["error"]["message"]


def test_what_clients_send_by_default_is_no_reason_to_refuse(client, base):
    neutral = dict(presence_penalty=0, frequency_penalty=0, logit_bias={}, user="ann", tools=[], stop=None, seed=7)
    extra = dict(response_format={"type": "text"}, metadata={"a": "b"}, stream=False)
    asked = dict(model=base, messages=HI, max_tokens=1, temperature=0, top_p=0.9)
    assert client.chat.completions.create(**asked, **neutral, **extra).choices


EXTREMES = [
    {"temperature": 1e6, "top_k": 10**9, "min_p": 1, "seed": 2**63 - 1},
    {"temperature": 1e-4, "top_p": 0, "repetition_penalty": 1e6},
    {"temperature": 0, "repetition_penalty": 1e-6, "max_tokens": 10**30, "stop": ["x" * 256] * 16},
]


@pytest.mark.parametrize("settings", EXTREMES)
def test_what_is_allowed_is_answered_however_extreme(settings, running):
    body = {"model": "left", "prompt": "a" * 240, "max_tokens": 9} | settings
    status, _, answer = running.post(json.dumps(body).encode())
    assert status == 200 and answer["usage"]["completion_tokens"] > 0


def test_an_answer_has_a_bounded_number_of_log_probs(running, monkeypatch):
    monkeypatch.setattr(schema, "MOST_LOGPROBS", 100)
    ask = {"model": "left", "prompt": ["x", "y"], "n": 2, "logprobs": 4, "max_tokens": 5}
    assert running.post(json.dumps(ask).encode())[0] == 200
    status, _, answer = running.post(json.dumps(ask | {"echo": True}).encode())
    assert status == 400 and "up to 120 log-probs are asked for" in answer["error"]["message"]


def test_a_path_or_a_method_that_is_not_there_is_an_error_in_the_same_form(running):
    assert running.post(b"{}", "embeddings")[2]["error"]["message"] == "POST /v1/embeddings: Not Found"
    assert running.post(b"{}", "models")[0] == 405


def test_a_form_of_a_web_page_is_refused(running):
    assert running.post(b'{"model": "left"}', headers="Content-Type: text/plain")[0] == 415


def test_a_message_of_10_mb_is_refused_and_its_sender_hears_of_it(client, base):
    with pytest.raises(openai.APIStatusError, match="2000000 are the most that this server takes") as refused:
        client.chat.completions.create(model=base, messages=[{"role": "user", "content": "x" * 10_000_000}])
    assert refused.value.status_code == 413


def test_a_tokenizer_without_a_chat_template_answers_completions_only(served, base):
    without = Tokenizer(served.tokenizer.backend, {})
    without.chat_template = None
    with serving(Served(served.model, without, {"m": None})) as running:
        with pytest.raises(openai.BadRequestError, match="no chat template: ask /v1/completions"):
            running.client().chat.completions.create(model="m", messages=HI)
        assert running.client().completions.create(model="m", prompt="hi").choices


# ---- limits ----


def test_only_who_has_the_key_is_answered(served):
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
def occupying(running: Running, choices: int) -> Iterator[None]:
    """So many replies are under way, and nobody reads them."""
    ask = {"model": "left", "prompt": "x", "max_tokens": 250, "n": choices, "stream": True, "logprobs": 20}
    body = json.dumps(ask).encode()
    with running.send("POST /v1/completions HTTP/1.1\r\nContent-Type: application/json", body) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        yield


def test_beyond_the_queue_is_429_and_a_hang_up_makes_room(served):
    with serving(served, slots=2, max_queue=1) as running:
        ask = dict(model="left", prompt="hi", max_tokens=2)
        with occupying(running, 3):
            with pytest.raises(openai.RateLimitError, match="the queue is full") as refused:
                running.client().completions.create(**ask)
            assert int(refused.value.response.headers["retry-after"]) >= 1
        assert running.is_idle()
        assert running.client().completions.create(**ask).choices


def test_a_request_has_its_time_and_then_leaves_nothing(served, monkeypatch):
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: time.sleep(0.1) or step(engine))
    with serving(served, request_timeout=0.5) as running:
        ask = dict(model="left", prompt="hi", max_tokens=100)
        with pytest.raises(openai.InternalServerError, match="longer than this server allows") as late:
            running.client().completions.create(**ask)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(running.client().completions.create(**ask, stream=True))
        assert running.is_idle()


def test_a_body_that_does_not_come_is_not_waited_for(served):
    with serving(served, request_timeout=0.3, slots=1, max_queue=0) as running:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as connection:
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 408")
        assert running.client().completions.create(model="left", prompt="hi", max_tokens=2).choices


def test_a_reader_that_never_reads_loses_its_places_in_the_end(served):
    with serving(served, request_timeout=1.5, slots=8, max_queue=0) as running:
        with occupying(running, 8):
            assert eventually(lambda: running.post(b"{}")[0] == 400)  # no longer 429
        assert running.is_idle()


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
    names = [base, *ADAPTERS]
    return [Question(names[i % 3], prompts[i % 8], samplings[i // 8 % 3]) for i in range(64)]


async def storm(running: Running, asked: list[Question]) -> list[str | None]:
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


# ---- from the command line ----


def test_a_port_in_use_is_one_line_and_code_1(running, capsys):
    assert main(["serve", "--model", "nano", "--port", str(running.port)]) == 1
    told = f"phi2 serve: cannot listen at 127.0.0.1 port {running.port}: Address already in use\n"
    assert capsys.readouterr().err == told


def test_without_the_extra_it_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", "nano", "--port", "0"]) == 1
    assert "needs the extra serve: pip install -e '.[serve]'" in capsys.readouterr().err


def test_a_host_that_others_reach_needs_a_key(capsys, monkeypatch):
    monkeypatch.delenv("PHI2_API_KEY", raising=False)
    assert main(["serve", "--model", "nano", "--host", "0.0.0.0", "--port", "0"]) == 1
    assert "give an api_key" in capsys.readouterr().err


def test_a_server_answers_and_ends_on_ctrl_c(tiny_phi):
    command = [sys.executable, "-m", "phi2", "serve", "--model", str(tiny_phi), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PHI2_API_KEY": "sesame"})
    line = process.stderr.readline()
    url = re.search(r"at (http\S+);", line)[1]
    client = openai.OpenAI(base_url=url, api_key="sesame", timeout=60)
    assert client.completions.create(model=str(tiny_phi), prompt="hi", max_tokens=2).choices
    process.send_signal(signal.SIGINT)
    assert (process.wait(timeout=60), process.stderr.read()) == (130, "phi2 serve: interrupted\n")


# ---- adapters by name ----

BAD_NAMES = {
    "no name": (["{left}"], "must be NAME=PATH_OR_ID"),
    "twice": (["a={left}", "a={left}"], "two models would be called 'a'"),
    "that of the base": (["{base}={left}"], "two models would be called"),
    "no adapter": (["a={base}"], "adapter_config.json: no such file"),
}


@pytest.mark.parametrize("case", BAD_NAMES)
def test_bad_adapters_are_told_before_anything_is_loaded(case, adapter_folders, base):
    adapters, message = BAD_NAMES[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_served(base, [text.format(base=base, **adapter_folders) for text in adapters], device="cpu")


def test_adapters_bring_the_tokenizer_they_were_trained_with(adapter_folders, tiny_phi, tmp_path, served):
    folder = shutil.copytree(adapter_folders["left"], tmp_path / "left")
    own = Tokenizer(served.tokenizer.backend, {}, "{{ messages[0]['content'] }}")
    own.save(folder)
    assert load_served(str(tiny_phi), [f"a={folder}"], device="cpu").tokenizer.chat_template == own.chat_template
    other = shutil.copytree(adapter_folders["right"], tmp_path / "right")
    Tokenizer(served.tokenizer.backend, {}, "{{ messages[-1]['content'] }}").save(other)
    with pytest.raises(ValueError, match="is not that of"):
        load_served(str(tiny_phi), [f"a={folder}", f"b={other}"], device="cpu")
