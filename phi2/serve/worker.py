"""One thread that runs the engine for many clients: a request joins the running batch, and leaves it when it likes.

The web chat and the endpoint stand on it. Whatever it tells a client, it tells from its own thread, so what receives
must neither block nor raise.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from phi2.inference.engine import Engine, Request, Token
from phi2.inference.replies import Chunk, Reply
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

Receive = Callable[[Chunk | Exception], None]
Result = TypeVar("Result")


class Worker:
    """Answers requests until it is closed.

    Args:
        engine: nobody else asks it anything. Its model is in evaluation mode.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine, self._tokenizer = engine, tokenizer
        self._model = engine.model  # which the engine does not keep alive
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._replies: dict[Request, tuple[Reply, Receive]] = {}
        self._functions: deque[tuple[Future, Callable[[Phi2ForCausalLM], Any]]] = deque()
        self._closed = False
        self._thread = Thread(target=self._run, name="phi2 engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, receive: Receive) -> None:
        """Queues a request; `receive` gets every chunk up to one with a finish_reason, or the error that ended it."""
        self._inbox.put(lambda: self._begin(request, receive))

    def cancel(self, request: Request) -> None:
        """Ends a request whose client has gone; it is told nothing more, but for what is on its way."""
        self._inbox.put(lambda: self._end(request))

    def run(self, function: Callable[[Phi2ForCausalLM], Result]) -> Future[Result]:
        """Calls it with the model when nothing else computes, unless it is cancelled before.

        One is called between two steps, so that many do not hold up the replies that are under way.
        """
        future: Future[Result] = Future()
        self._inbox.put(lambda: self._functions.append((future, function)))
        return future

    def close(self) -> None:
        """Ends all requests with an error, and the thread."""
        self._inbox.put(self._close)
        self._thread.join()

    def _run(self) -> None:
        while not self._closed:
            self._obey()
            self._call()
            try:
                tokens = self._engine.step()
            except (ValueError, RuntimeError) as error:  # not finite, out of memory: no request's own fault
                self._fail(error)
                continue
            for token in tokens:
                self._pass_on(token)
        stopped = ValueError("the engine has stopped")
        self._fail(stopped)
        for future, _ in self._functions:
            future.set_exception(stopped)

    def _obey(self) -> None:
        """Does what has come in; waits for something while there is nothing else to do."""
        try:
            self._inbox.get(block=self._engine.is_idle and not self._functions)()
            while True:
                self._inbox.get_nowait()()
        except Empty:
            pass

    def _call(self) -> None:
        """The function that has waited longest."""
        if not self._functions:
            return
        future, function = self._functions.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(self._model))
        except (ValueError, RuntimeError) as error:
            future.set_exception(error)

    def _begin(self, request: Request, receive: Receive) -> None:
        self._replies[request] = Reply(self._tokenizer, request), receive
        self._engine.add(request)

    def _pass_on(self, token: Token) -> None:
        if token.request not in self._replies:  # it ended in this very step
            return
        reply, receive = self._replies[token.request]
        chunk = reply.add(token)
        if chunk.finish_reason:
            self._end(token.request)
        receive(chunk)

    def _end(self, request: Request) -> None:
        self._replies.pop(request, None)
        self._engine.cancel(request)

    def _fail(self, error: Exception) -> None:
        for request, (_, receive) in list(self._replies.items()):
            self._end(request)
            receive(error)
        self._engine.forget()  # what the slots hold may be part of it

    def _close(self) -> None:
        self._closed = True
