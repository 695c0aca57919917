"""How OpenAI writes answers: whole and in chunks, for chats and for completions, with the log-probs of each."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from phi2.serve.token_names import TokenNames

FINISH_REASONS = {"stop_string": "stop"}  # where ours is another word


class SaidToken(NamedTuple):
    """A token of a prompt or a reply.

    Attributes:
        logprob: None of a prompt's first token, which nothing predicts.
        top: the likeliest ids in its place with their log-probs, largest first.
        offset: characters of the choice that were told before it.
    """

    token_id: int
    logprob: float | None
    top: Sequence[tuple[int, float]]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What is told of one choice at a time: the prompt that is echoed, or what a token of the reply makes certain."""

    index: int
    text: str
    tokens: list[SaidToken]
    finish_reason: str | None


class Form(ABC):
    """An answer of one endpoint as JSON objects.

    Args:
        tells_logprobs: whether each token is told with its log-prob.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, names: TokenNames, tells_logprobs: bool) -> None:
        self._names, self._tells = names, tells_logprobs
        self._head = {"id": f"{self.id_prefix}{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, pieces: Iterable[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer that these pieces are."""
        choices: defaultdict[int, list[Piece]] = defaultdict(list)
        for piece in pieces:
            choices[piece.index].append(piece)
        told = [self._choice(choices[index]) for index in sorted(choices)]
        return {**self._head, "object": self.whole_object, "choices": told, "usage": usage}

    def chunk(self, piece: Piece) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_object, "choices": [self._delta(piece)]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """What comes behind the last choice."""
        return {**self._head, "object": self.chunk_object, "choices": [], "usage": usage}

    def is_worth_a_chunk(self, piece: Piece) -> bool:
        """Whether it tells anything: a token may complete no character yet."""
        return bool(piece.text or piece.finish_reason or self._tells)

    @abstractmethod
    def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """One choice, whole."""

    @abstractmethod
    def _delta(self, piece: Piece) -> dict[str, Any]:
        """What a piece adds to its choice."""


class CompletionForm(Form):
    """/v1/completions."""

    id_prefix, whole_object, chunk_object = "cmpl-", "text_completion", "text_completion"

    def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {
            "index": pieces[0].index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs([token for piece in pieces for token in piece.tokens]) if self._tells else None,
            "finish_reason": finish_reason(pieces),
        }

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return self._choice([piece])

    def _logprobs(self, tokens: Sequence[SaidToken]) -> dict[str, list]:
        unique = self._names.unique
        tops = [{unique(token_id): logprob for token_id, logprob in token.top} for token in tokens]
        return {
            "tokens": [unique(token.token_id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [None if t.logprob is None else top for t, top in zip(tokens, tops, strict=True)],
            "text_offset": [token.offset for token in tokens],
        }


class ChatForm(Form):
    """/v1/chat/completions."""

    id_prefix, whole_object, chunk_object = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, names: TokenNames, tells_logprobs: bool) -> None:
        super().__init__(model, names, tells_logprobs)
        self._begun: set[int] = set()  # choices whose role has been told

    def _choice(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": pieces[0].index, "message": message, **self._rest(pieces)}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        role = {} if piece.index in self._begun else {"role": "assistant"}
        self._begun.add(piece.index)
        return {"index": piece.index, "delta": {**role, "content": piece.text}, **self._rest([piece])}

    def _rest(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        content = [self._token(token) for piece in pieces for token in piece.tokens] if self._tells else []
        return {"logprobs": {"content": content} if self._tells else None, "finish_reason": finish_reason(pieces)}

    def _token(self, token: SaidToken) -> dict[str, Any]:
        top = [self._named(token_id, logprob) for token_id, logprob in token.top]
        return {**self._named(token.token_id, token.logprob), "top_logprobs": top}

    def _named(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        content = self._names.bytes(token_id)
        return {
            "token": self._names.text(token_id),
            "logprob": logprob,
            "bytes": None if content is None else list(content),
        }


def finish_reason(pieces: Sequence[Piece]) -> str | None:
    """Why a choice has ended with the last of these, if it has."""
    ours = pieces[-1].finish_reason
    return None if ours is None else FINISH_REASONS.get(ours, ours)
