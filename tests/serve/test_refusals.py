"""What the endpoint refuses, and how it says so; and what it must not refuse."""

from __future__ import annotations

import json

import openai
import pytest

from phi2.serve import schema
from phi2.serve.models import Served
from phi2.tokenizer import Tokenizer

HI = [{"role": "user", "content": "hi"}]


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


def test_a_tokenizer_without_a_chat_template_answers_completions_only(served, base, serving):
    without = Tokenizer(served.tokenizer.backend, {})
    without.chat_template = None
    with serving(Served(served.model, without, {"m": None})) as running:
        with pytest.raises(openai.BadRequestError, match="no chat template: ask /v1/completions"):
            running.client().chat.completions.create(model="m", messages=HI)
        assert running.client().completions.create(model="m", prompt="hi").choices
