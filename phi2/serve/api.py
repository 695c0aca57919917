"""OpenAI's endpoints over one worker: models, chat and text completions, as an ASGI application.

A request is answered between its first and last byte within a time, holds as many places as it asks for choices, and
ends in the engine as soon as its client hangs up. Whatever is wrong with it is told in OpenAI's form of an error.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from phi2.inference.engine import Engine
from phi2.serve.answers import Answer
from phi2.serve.config import EndpointConfig
from phi2.serve.forms import ChatForm, CompletionForm, Form
from phi2.serve.models import Served
from phi2.serve.schema import Ask, Refusal, read_chat, read_completion, unknown_model
from phi2.serve.token_names import TokenNames
from phi2.serve.worker import Worker

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
LAST_WORDS = 1.0  # seconds behind the deadline, in which a reader may still take what was said in time
Result = TypeVar("Result")
Read = Callable[[bytes, Served, int, int], Ask]


class Places:
    """How many choices may be under way, answered or waiting; a body is one of them until it is read."""

    def __init__(self, count: int) -> None:
        self.count = self._free = count

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Takes places for as long as the block lasts.

        Raises:
            Refusal: when there are too few.
        """
        if count > self._free:
            raise Refusal(429, "the queue is full: try again", code="rate_limit_exceeded", Retry_After="1")
        self._free -= count
        try:
            yield
        finally:
            self._free += count


class Endpoint:
    """What the requests share.

    Args:
        engine: the worker's, of which only the size is looked at.
        key: what a bearer token must be; None asks for none.
    """

    def __init__(self, served: Served, engine: Engine, worker: Worker, config: EndpointConfig, key: str | None) -> None:
        self.served, self.worker, self.config, self.length = served, worker, config, engine.cache.max_length
        self.places = Places(len(engine.cache.lengths) + config.max_queue)
        self.names = TokenNames(served.tokenizer)
        self._key, self._created = key, int(time.time())

    def authorise(self, request: Request) -> None:
        """Raises a Refusal unless the request carries the key."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if self._key is None:
            return
        if not hmac.compare_digest(token.strip().encode(), self._key.encode()) or scheme.lower() != "bearer":
            raise Refusal(
                401, "the bearer token is missing or wrong", code="invalid_api_key", WWW_Authenticate="Bearer"
            )

    async def models(self, request: Request) -> Response:
        self.authorise(request)
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.served.adapters]})

    async def model(self, request: Request) -> Response:
        self.authorise(request)
        name = request.path_params["name"]
        if name not in self.served.adapters:
            raise unknown_model(name, self.served)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "phi2"}


class Completions:
    """One of the two endpoints that answer, as an ASGI application."""

    def __init__(self, endpoint: Endpoint, read: Read, form: type[Form]) -> None:
        self._endpoint, self._read, self._form = endpoint, read, form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request, endpoint = Request(scope, receive), self._endpoint
        endpoint.authorise(request)
        deadline = asyncio.get_running_loop().time() + endpoint.config.request_timeout
        try:
            with endpoint.places.hold(1):
                ask = await self._ask(request, deadline)
                with endpoint.places.hold(ask.choices - 1):
                    await self._answer(ask, deadline, scope, receive, send)
        except ClientDisconnect:
            pass  # nobody is left to be told

    async def _ask(self, request: Request, deadline: float) -> Ask:
        """What the body asks for; texts become tokens in a thread, beside the event loop."""
        endpoint = self._endpoint
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the body must be JSON, and the header Content-Type application/json")
        try:
            async with asyncio.timeout_at(deadline):
                body = await read_body(request, endpoint.config.max_body_mb)
                limits = endpoint.length, endpoint.places.count
                return await asyncio.to_thread(self._read, body, endpoint.served, *limits)
        except TimeoutError as error:
            raise Refusal(408, "the body did not arrive in time", code="timeout") from error

    async def _answer(self, ask: Ask, deadline: float, scope: Scope, receive: Receive, send: Send) -> None:
        answer = Answer(ask, self._endpoint.served, self._endpoint.worker, deadline)
        form = self._form(ask.model, self._endpoint.names, ask.top_logprobs is not None)
        try:
            if ask.stream:
                events = StreamingResponse(stream(answer, form, ask.include_usage), media_type="text/event-stream")
                async with asyncio.timeout_at(deadline + LAST_WORDS):
                    await events(scope, receive, send)
            else:
                whole = await unless_gone(collect(answer, form), receive)
                await JSONResponse(whole)(scope, receive, send)
        except TimeoutError as error:  # the reader is so slow that it has not taken what there is
            raise ClientDisconnect from error
        finally:
            answer.close()


async def read_body(request: Request, most_mb: float) -> bytes:
    """The body; of one that is too long the rest is read away, so that its client comes to hear of it.

    Raises:
        Refusal: when it is too long.
    """
    parts, size, most = [], 0, int(most_mb * 1e6)
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
    if size > most:
        raise Refusal(413, f"the body has {size} bytes, {most} are the most that this server takes")
    return b"".join(parts)


async def collect(answer: Answer, form: Form) -> dict[str, object]:
    """The answer as one JSON object."""
    pieces = [piece async for piece in answer.pieces()]
    return form.whole(pieces, answer.usage)


async def stream(answer: Answer, form: Form, include_usage: bool) -> AsyncIterator[str]:
    """The answer as server-sent events; an error that comes too late for a status is the last of them."""
    try:
        async for piece in answer.pieces():
            if form.is_worth_a_chunk(piece):
                yield event(form.chunk(piece) | ({"usage": None} if include_usage else {}))
        if include_usage:
            yield event(form.usage_chunk(answer.usage))
        yield "data: [DONE]\n\n"
    except Refusal as refusal:
        yield event(error_body(refusal))


def event(content: dict[str, object]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, separators=(',', ':'))}\n\n"


async def unless_gone(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """The result of a coroutine, which is cancelled when the client hangs up before.

    Raises:
        ClientDisconnect: then.
    """
    working, gone = asyncio.create_task(work), asyncio.create_task(hang_up(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def hang_up(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


# ---- errors, and the whole ----


def error_body(refusal: Refusal) -> dict[str, object]:
    """OpenAI's form of it."""
    kind = ERROR_TYPES.get(refusal.status, "server_error" if refusal.status >= 500 else "invalid_request_error")
    return {"error": {"message": str(refusal), "type": kind, "param": refusal.param, "code": refusal.code}}


async def on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return JSONResponse(error_body(error), error.status, error.headers)


async def on_http_error(request: Request, error: Exception) -> Response:
    """A path or a method that is not there."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(error_body(Refusal(error.status_code, message)), error.status_code, error.headers)


async def on_fault(request: Request, error: Exception) -> Response:
    """A mistake of ours: the server tells its log, and goes on."""
    return JSONResponse(error_body(Refusal(500, "the server made a mistake; its log says which")), 500)


def make_app(endpoint: Endpoint) -> Starlette:
    """The application; at its end it closes the worker."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(endpoint.worker.close)

    chat = Completions(endpoint, read_chat, ChatForm)
    completions = Completions(endpoint, read_completion, CompletionForm)
    origins = list(endpoint.config.allow_origin)
    cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return Starlette(
        routes=[
            Route("/v1/models", endpoint.models),
            Route("/v1/models/{name:path}", endpoint.model),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        middleware=[cors] if origins else [],
        exception_handlers={Refusal: on_refusal, HTTPException: on_http_error, Exception: on_fault},
        lifespan=lifespan,
    )
