"""How likely a model finds given answers to a prompt, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as short_repr

import numpy as np

from phi2.inference.generate import Prompt, encode_prompts, require_loaded
from phi2.inference.scoring import Request, Score, score
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False, repr=False)
class AnswerLogprobs:
    """What a model says of one answer of T tokens; it shows itself as a table of them.

    Attributes:
        text: the answer as it was given.
        token_ids: T of them.
        tokens: the text of each; bytes that are no whole character stand as U+FFFD.
        logprobs: (T,) float64, nats: log p(token | prompt, tokens before it).
    """

    text: str
    token_ids: list[int]
    tokens: list[str]
    logprobs: np.ndarray

    @property
    def total(self) -> float:
        """Nats of all tokens together: log p(answer | prompt)."""
        return float(self.logprobs.sum())

    @property
    def per_token(self) -> float:
        """Nats a token, their mean."""
        return float(self.logprobs.mean())

    def __repr__(self) -> str:
        rows = [f"{nats:9.4f}  {token!r}" for nats, token in zip(self.logprobs, self.tokens, strict=True)]
        return "\n".join([*rows, f"{self.total:9.4f}  nats, {len(rows)} token{'s' * (len(rows) != 1)}"])


def logprobs(
    model: Phi2ForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    answers: str | Sequence[str],
    *,
    prompt_style: str | None = None,
) -> AnswerLogprobs | list[AnswerLogprobs]:
    """Log-probabilities of answers to a prompt, which is read once for all of them.

    Answers are read as generation writes them: their tokens follow those of the prompt, and none spans both. They are
    scored as given: write the token that ends an answer ("Paris<|im_end|>") to have it count, as it does in training.
    The head runs only where an answer is predicted, on some rows at a time. Without gradient; `phi2.score_rows` is
    the pass with one.

    >>> import phi2
    >>> model, tokenizer = phi2.load("nano-instruct", device="cpu")
    >>> four, five = phi2.logprobs(model, tokenizer, [{"role": "user", "content": "What is 2 + 2?"}], ["4", "5"])
    >>> four.total > five.total  # nats
    True
    >>> four.logprobs.shape == (len(four.token_ids),)
    True

    Args:
        prompt: a text, or a conversation (a list of messages).
        answers: a text, or a list of any number of them.
        prompt_style: of a text, as in `phi2.generate`: "raw" (default), "instruct", "chat" or "chatml".
    Returns:
        An `AnswerLogprobs`, or for a list of answers a list of them in its order.
    Raises:
        ValueError: for a prompt or an answer that is empty or does not fit the context, a conversation without a chat
            template, or logits that are not finite.
    """
    require_loaded(model, tokenizer)
    (context,) = encode_prompts(tokenizer, [prompt], prompt_style, model.config)
    if not isinstance(answers, str | Sequence):
        raise ValueError(f"answers must be a text or a list of texts, got {short_repr(answers)}")
    texts = [answers] if isinstance(answers, str) else answers
    requests = [_request(model, tokenizer, context, text, number) for number, text in enumerate(texts, start=1)]
    scores = dict(score(model, requests))
    told = [_told(tokenizer, text, requests[i], scores[i]) for i, text in enumerate(texts)]
    return told[0] if isinstance(answers, str) else told


def _request(model: Phi2ForCausalLM, tokenizer: Tokenizer, context: list[int], text: str, number: int) -> Request:
    if not isinstance(text, str) or not text:
        raise ValueError(f"answer {number} must be a text of at least one token, got {short_repr(text)}")
    ids, limit = tokenizer.encode(text), model.config.max_position_embeddings
    if len(context) + len(ids) > limit:
        raise ValueError(
            f"answer {number} has {len(ids)} tokens behind a prompt of {len(context)}, the context holds {limit}"
        )
    return Request(context, ids)


def _told(tokenizer: Tokenizer, text: str, request: Request, scored: Score) -> AnswerLogprobs:
    ids = list(request.continuation)
    tokens = [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in ids]
    return AnswerLogprobs(text, ids, tokens, np.array(scored.logprobs))
