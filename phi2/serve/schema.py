"""What the bodies of OpenAI's API may hold, and what is asked by them.

A field is used, or has a value that changes nothing, or is refused by name; null stands for a field that is not given.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from reprlib import repr as short_repr
from typing import Any, NoReturn

from phi2.files import one_line
from phi2.inference.config import SamplingParams
from phi2.serve.models import Served
from phi2.serve.prompts import each_prompt, encode_messages, encode_texts, is_prompt

MOST_TOP_LOGPROBS = 20
MOST_LOGPROBS = 2**20  # that one answer tells
LARGEST = 1e6  # of what is not counted
MOST_STOPS, LONGEST_STOP = 16, 256  # every token is compared with all of them
COMPLETION_TOKENS = 16  # OpenAI's default
WITHOUT_MEANING = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")  # of any value
NEUTRAL: dict[str, tuple[Any, ...]] = {  # what some clients always send, and what it has to be
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "store": (False,),
}
NEUTRAL_OF_CHAT = NEUTRAL | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
NEUTRAL_OF_COMPLETIONS = NEUTRAL | {"best_of": (1,), "suffix": ("",)}


class Refusal(Exception):
    """An answer with an error status.

    Attributes:
        param: the field that is wrong.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True)
class Ask:
    """What a body asks for.

    Attributes:
        model: name of the served model.
        adapter: that it computes; None: the base alone.
        prompts: token ids of each.
        rows: how to sample each choice of a prompt.
        generates: False when only prompts are to be scored.
        top_logprobs: how many of the likeliest tokens to tell in each place; None: not even the log-probs.
        echo: whether the prompt is told too.
        stream: whether to tell it piece by piece, and, at its end, the usage.
    """

    model: str
    adapter: str | None
    prompts: list[list[int]]
    rows: list[SamplingParams]
    generates: bool
    top_logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool

    @property
    def choices(self) -> int:
        return len(self.prompts) * len(self.rows)


class Fields:
    """The fields of a body, each of which must be taken or be neutral."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in fields.items() if value is not None}

    def take(self, name: str, default: Any, is_right: Callable[[Any], bool], rule: str) -> Any:
        """The value of a field."""
        if name not in self._left:
            return default
        value = self._left.pop(name)
        if not is_right(value):
            raise Refusal(400, f"{name} must be {rule}, got {short_repr(value)}", name)
        return value

    def need(self, name: str, is_right: Callable[[Any], bool], rule: str) -> Any:
        """The value of a field that has no default."""
        if name not in self._left:
            raise Refusal(400, f"{name} is missing: it must be {rule}", name)
        return self.take(name, None, is_right, rule)

    def whole(self, name: str, default: Any, least: int, most: float = float("inf")) -> Any:
        """A whole number."""
        upto = "" if most == float("inf") else f", {most} at most"
        rule = f"a whole number from {least}{upto}"
        return self.take(name, default, lambda v: _is_number(v, int) and least <= v <= most, rule)

    def number(self, name: str, default: float) -> float:
        """A number that a float32 can be divided by."""
        rule = f"a number of at most {LARGEST}"
        return self.take(name, default, lambda v: _is_number(v, int | float) and abs(v) <= LARGEST, rule)

    def flag(self, name: str) -> bool:
        return self.take(name, False, lambda v: isinstance(v, bool), "true or false")

    def refuse_rest(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """What has not been taken must mean nothing."""
        for name, value in self._left.items():
            if name in WITHOUT_MEANING or value in neutral.get(name, ()):
                continue
            if name not in neutral:
                raise Refusal(400, f"{short_repr(name)} is not a field that this server knows", name)
            allowed = " or ".join(map(json.dumps, neutral[name]))
            message = f"{name} is not supported: leave it out or give {allowed}, got {short_repr(value)}"
            raise Refusal(400, message, name)


def parse(body: bytes) -> Fields:
    """The fields of a body.

    Raises:
        Refusal: unless it is a JSON object.
    """
    try:
        fields = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not valid JSON: {one_line(error)}") from error
    if not isinstance(fields, dict):
        raise Refusal(400, f"the body must be a JSON object, got {short_repr(fields)}")
    return Fields(fields)


def read_chat(body: bytes, served: Served, length: int, most_choices: int) -> Ask:
    """What a body of /v1/chat/completions asks for.

    Args:
        length: tokens that prompt and reply may have together.
        most_choices: that one body may ask for.

    Raises:
        Refusal: saying what is wrong.
    """
    fields = parse(body)
    model = _model(fields, served)
    messages = fields.need("messages", lambda v: isinstance(v, list) and len(v) > 0, "a list of messages")
    limit = fields.whole("max_tokens", None, 1)
    tokens = fields.whole("max_completion_tokens", limit, 1)
    if limit not in (None, tokens):
        raise Refusal(400, f"max_tokens {limit} and max_completion_tokens {tokens} differ: give one", "max_tokens")
    top, tells = fields.whole("top_logprobs", None, 0, MOST_TOP_LOGPROBS), fields.flag("logprobs")
    if top is not None and not tells:
        raise Refusal(400, "top_logprobs needs logprobs: true", "top_logprobs")
    rows = _rows(fields, min(tokens or length, length), most_choices)
    stream, include_usage = _stream(fields)
    fields.refuse_rest(NEUTRAL_OF_CHAT)
    with _refused("messages"):
        ids = encode_messages(messages, served)
    return _bounded(
        Ask(
            model=model,
            adapter=served.adapters[model],
            prompts=[ids],
            rows=rows,
            generates=True,
            top_logprobs=(top or 0) if tells else None,
            echo=False,
            stream=stream,
            include_usage=include_usage,
        )
    )


def read_completion(body: bytes, served: Served, length: int, most_choices: int) -> Ask:
    """What a body of /v1/completions asks for; arguments and errors are those of `read_chat`."""
    fields = parse(body)
    model = _model(fields, served)
    given = fields.need("prompt", is_prompt, "a text, a list of texts, token ids, or lists of token ids")
    echo = fields.flag("echo")
    tokens = fields.whole("max_tokens", COMPLETION_TOKENS, 0 if echo else 1)
    top = fields.whole("logprobs", None, 0, MOST_TOP_LOGPROBS)
    prompts = each_prompt(given)
    rows = _rows(fields, min(tokens or 1, length), most_choices, len(prompts))
    stream, include_usage = _stream(fields)
    fields.refuse_rest(NEUTRAL_OF_COMPLETIONS)
    with _refused("prompt"):
        ids = encode_texts(prompts, served)
    return _bounded(
        Ask(
            model=model,
            adapter=served.adapters[model],
            prompts=ids,
            rows=rows,
            generates=tokens > 0,
            top_logprobs=top,
            echo=echo,
            stream=stream,
            include_usage=include_usage,
        )
    )


def _bounded(ask: Ask) -> Ask:
    """Refuses an answer with more log-probs than a server should have in memory at once."""
    if ask.top_logprobs is None:
        return ask
    told = len(ask.rows) * sum(ask.rows[0].max_new_tokens + ask.echo * len(ids) for ids in ask.prompts)
    if (entries := told * (1 + ask.top_logprobs)) > MOST_LOGPROBS:
        raise Refusal(400, f"up to {entries} log-probs are asked for, a request may have {MOST_LOGPROBS}", "logprobs")
    return ask


@contextmanager
def _refused(param: str) -> Iterator[None]:
    """What is wrong with a prompt is an answer with status 400."""
    try:
        yield
    except ValueError as error:
        raise Refusal(400, str(error), param) from error


# ---- fields that both have ----


def _model(fields: Fields, served: Served) -> str:
    model = fields.need("model", lambda v: isinstance(v, str), "the name of a served model")
    if model not in served.adapters:
        raise unknown_model(model, served)
    return model


def unknown_model(model: str, served: Served) -> Refusal:
    names = ", ".join(served.adapters)
    return Refusal(404, f"model {short_repr(model)} is not served; served: {names}", "model", "model_not_found")


def _rows(fields: Fields, max_new_tokens: int, most_choices: int, prompts: int = 1) -> list[SamplingParams]:
    """How each choice of a prompt is sampled: choice i draws from seed + i, as if it had been asked for alone."""
    n = fields.whole("n", 1, 1)
    if n * prompts > most_choices:
        raise Refusal(400, f"{n * prompts} choices are asked for, a request may have {most_choices} at most", "n")
    temperature = fields.number("temperature", 1.0)
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": fields.number("top_p", 1.0),
        "seed": fields.whole("seed", None, 0),
        "stop": fields.take("stop", (), _are_stops, f"1 to {MOST_STOPS} texts of at most {LONGEST_STOP} characters"),
        "top_k": fields.whole("top_k", 0, 0),
        "min_p": fields.number("min_p", 0.0),
        "repetition_penalty": fields.number("repetition_penalty", 1.0),
    }
    if temperature == 0:  # where nothing is drawn, OpenAI's clients still say how
        settings |= {"top_p": 1.0, "seed": 0}
    try:
        params = SamplingParams(**settings)
        return [params.of_row(row) for row in range(n)]
    except ValueError as error:
        raise Refusal(400, str(error), str(error).partition(" ")[0]) from error


def _stream(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether the usage comes last."""
    stream = fields.flag("stream")
    options = fields.take("stream_options", {}, lambda v: isinstance(v, dict), "an object")
    if options and not stream:
        raise Refusal(400, "stream_options needs stream: true", "stream_options")
    inner = Fields(options)
    include_usage = inner.flag("include_usage")
    inner.refuse_rest({"include_obfuscation": (False,)})
    return stream, include_usage


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _are_stops(value: Any) -> bool:
    stops = [value] if isinstance(value, str) else value
    return (
        isinstance(stops, list)
        and len(stops) <= MOST_STOPS
        and all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops)
    )


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
