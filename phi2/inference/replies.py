"""From generated tokens to text: whole characters, the end of a reply, and the first stop string it runs into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from phi2.inference.engine import Request, Token
from phi2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chunk:
    """What one generated token adds to a reply.

    Attributes:
        text: whole characters, safe to print; "" while a character or a possible stop string is incomplete.
        token_id: the token.
        logprob: its log-probability in nats under the model's own distribution over all V ids: float32, before
            penalties, temperature and truncation.
        prompt_tokens, generation_tokens: tokens so far.
        prompt_tps: tok/s of the pass over the prompt, without what was cached.
        generation_tps: tok/s since the first token; 0 for the first.
        finish_reason: None until the last chunk, then "stop", "length" or "stop_string".
        seed: what the draws of this reply began from, to make it again; None when none is drawn (temperature 0).
        top: the likeliest ids in its place with their log-probs, largest first, where a request asks for them.
    """

    text: str
    token_id: int
    logprob: float
    prompt_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float
    finish_reason: str | None = None
    seed: int | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Generation:
    """A whole reply; `str()` of it is its text. The fields are those of `Chunk`.

    Attributes:
        text: without stop tokens and without the stop string and what follows it.
        token_ids: every generated token, the one that stopped the reply included.
        logprobs: one for each token.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_tokens: int
    prompt_tps: float
    generation_tps: float
    seed: int | None = None

    def __str__(self) -> str:
        return self.text


class Reply:
    """The text side of one request: tokens in, chunks out, and the decision that it ends before a stop string."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        self._decoder, self._cutter = tokenizer.stream(), StopCutter(request.params.stop or ())
        self._request, self._count = request, 0  # tokens generated
        self._prompt_seconds = 0.0

    def add(self, token: Token) -> Chunk:
        self._count += 1
        request, seconds = self._request, perf_counter() - self._request.started
        if self._count == 1:
            self._prompt_seconds = seconds
        text, finish_reason = self._text(token)
        return Chunk(
            text=text,
            token_id=token.token_id,
            logprob=token.logprob,
            prompt_tokens=len(request.ids),
            generation_tokens=self._count,
            prompt_tps=(len(request.ids) - request.cached_tokens) / self._prompt_seconds,
            generation_tps=(self._count - 1) / (seconds - self._prompt_seconds) if self._count > 1 else 0.0,
            finish_reason=finish_reason,
            seed=None if request.params.temperature == 0 else request.params.seed,
            top=token.top,
        )

    def _text(self, token: Token) -> tuple[str, str | None]:
        """What may be shown now, all that was held back if the reply ends, and why it does."""
        piece = "" if token.finish_reason == "stop" else self._decoder.step(token.token_id)
        if token.finish_reason:
            piece += self._decoder.flush()
        text = self._cutter.step(piece)
        if self._cutter.found:
            return text, "stop_string"
        return text + (self._cutter.flush() if token.finish_reason else ""), token.finish_reason


class StopCutter:
    """Passes text on up to the first stop string, however the text is cut into pieces.

    The first stop string is the one that is complete first; where several are complete at the same character, the
    longest. What may still become a stop string is held back.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def step(self, piece: str) -> str:
        """The text that `piece` makes certain."""
        text, self._held = self._held + piece, ""
        places = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if places:
            self.found = True
            return text[: min(places)[1]]
        cut = next((i for i in range(len(text)) if any(stop.startswith(text[i:]) for stop in self._stop)), len(text))
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        held, self._held = self._held, ""
        return held


def join(chunks: list[Chunk]) -> Generation:
    """The reply whose chunks these are."""
    last = chunks[-1]
    assert last.finish_reason is not None
    return Generation(
        text="".join(chunk.text for chunk in chunks),
        token_ids=[chunk.token_id for chunk in chunks],
        logprobs=[chunk.logprob for chunk in chunks],
        finish_reason=last.finish_reason,
        prompt_tokens=last.prompt_tokens,
        prompt_tps=last.prompt_tps,
        generation_tps=last.generation_tps,
        seed=last.seed,
    )
