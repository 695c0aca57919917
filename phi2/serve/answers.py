"""From what a body asks for to the pieces of its answer, which come over from the worker's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

from phi2.inference.engine import Request
from phi2.inference.generate import stop_ids_of
from phi2.inference.replies import Chunk
from phi2.inference.scoring import Request as Scoring
from phi2.inference.scoring import Score, score
from phi2.lora import computing
from phi2.model import Phi2ForCausalLM
from phi2.serve.forms import Piece, SaidToken
from phi2.serve.models import Served
from phi2.serve.schema import Ask, Refusal
from phi2.serve.worker import Receive, Worker

Result = TypeVar("Result")


class Answer:
    """The choices of one body, under way from `pieces` to `close`.

    Args:
        deadline: by the event loop's clock; what is not answered by then is refused.

    Attributes:
        completion_tokens: of all choices so far.
    """

    def __init__(self, ask: Ask, served: Served, worker: Worker, deadline: float) -> None:
        self._ask, self._served, self._worker, self._deadline = ask, served, worker, deadline
        self._loop = asyncio.get_running_loop()
        self._inbox: asyncio.Queue[tuple[int, Chunk | Exception]] = asyncio.Queue()  # at most the tokens asked for
        self._requests: list[Request] = []
        self._shown = [0] * ask.choices  # characters
        self.completion_tokens = 0

    @property
    def usage(self) -> dict[str, int]:
        prompt = sum(map(len, self._ask.prompts))
        completion = self.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    async def pieces(self) -> AsyncIterator[Piece]:
        """What is told, in the order in which it becomes known.

        Raises:
            Refusal: when the engine fails, or time is up.
        """
        if self._ask.echo:
            for piece in await self._prompts():
                yield piece
        if self._ask.generates:
            self._submit()
        left = len(self._requests)
        while left:
            index, chunk = await self._in_time(self._inbox.get())
            if isinstance(chunk, Exception):
                raise Refusal(500, str(chunk)) from chunk
            left -= chunk.finish_reason is not None
            yield self._piece(index, chunk)

    def close(self) -> None:
        """Ends what is still under way."""
        for request in self._requests:
            self._worker.cancel(request)

    async def _in_time(self, result: Awaitable[Result]) -> Result:
        try:
            async with asyncio.timeout_at(self._deadline):
                return await result
        except TimeoutError as error:
            raise Refusal(504, "the request took longer than this server allows", code="timeout") from error

    # ---- replies ----

    def _submit(self) -> None:
        ask = self._ask
        for ids in ask.prompts:
            for params in ask.rows:
                stops = stop_ids_of(self._served.model, self._served.tokenizer, params)
                request = Request(ids, params, stops, ask.top_logprobs or 0, ask.adapter)
                self._worker.submit(request, self._receiver(len(self._requests)))
                self._requests.append(request)

    def _receiver(self, index: int) -> Receive:
        """Carries what the worker's thread tells of a choice over to the event loop."""

        def receive(chunk: Chunk | Exception) -> None:
            self._loop.call_soon_threadsafe(self._inbox.put_nowait, (index, chunk))

        return receive

    def _piece(self, index: int, chunk: Chunk) -> Piece:
        token = SaidToken(chunk.token_id, chunk.logprob, chunk.top, self._shown[index])
        self._shown[index] += len(chunk.text)
        self.completion_tokens += 1
        return Piece(index, chunk.text, [token], chunk.finish_reason)

    # ---- prompts ----

    async def _prompts(self) -> list[Piece]:
        """The prompt of every choice, as the first of its text."""
        ask = self._ask
        scores: dict[int, Score] = {}
        if ask.top_logprobs is not None:
            future = self._worker.run(_scoring(ask))
            try:
                scores = await self._in_time(asyncio.wrap_future(future))
            except (ValueError, RuntimeError) as error:
                raise Refusal(500, str(error)) from error
        told = [self._prompt(ids, scores.get(number)) for number, ids in enumerate(ask.prompts)]
        self._shown = [len(piece.text) for piece in told for _ in ask.rows]
        pieces = [piece for piece in told for _ in ask.rows]
        return [replace(piece, index=index) for index, piece in enumerate(pieces)]

    def _prompt(self, ids: list[int], scored: Score | None) -> Piece:
        decoder, text, offsets = self._served.tokenizer.stream(skip_special_tokens=False), "", []
        for token_id in ids:
            offsets.append(len(text))
            text += decoder.step(token_id)
        text += decoder.flush()
        logprobs, tops = ([], []) if scored is None else (scored.logprobs, scored.top)
        told = zip(ids, [None, *logprobs], [(), *tops], offsets, strict=False)
        return Piece(0, text, [SaidToken(*token) for token in told], None if self._ask.generates else "length")


def _scoring(ask: Ask) -> Callable[[Phi2ForCausalLM], dict[int, Score]]:
    """What the worker does to know the log-probs of the prompts; a prompt of one token has none."""
    numbers = [number for number, ids in enumerate(ask.prompts) if len(ids) > 1]
    requests = [Scoring(ask.prompts[number][:1], ask.prompts[number][1:]) for number in numbers]

    def run(model: Phi2ForCausalLM) -> dict[int, Score]:
        with computing(model, ask.adapter):
            found = score(model, requests, top_logprobs=ask.top_logprobs or 0)
            return {numbers[index]: scored for index, scored in found}

    return run
