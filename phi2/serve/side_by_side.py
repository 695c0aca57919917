"""Answers of several policies to one conversation: streamed side by side, then scored by each of the policies.

Nothing here computes: requests go to the workers of the policies, whose threads run the models.

The log-ratio of an answer's token between two policies is log p(token | before) under one minus that under the other,
in nats. Summed over an answer, times DPO's beta, it is the reward that DPO gives it where the second is the reference.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from time import sleep

from phi2.inference import scoring
from phi2.inference.chat import fit_context, told_if_trimmed
from phi2.inference.config import SamplingParams
from phi2.inference.engine import Request
from phi2.inference.generate import stop_ids_of
from phi2.inference.replies import Chunk
from phi2.lora import computing
from phi2.model import Phi2ForCausalLM
from phi2.serve.policies import Policy
from phi2.tokenizer import Tokenizer

LONGEST = 100_000  # characters; no context of a Phi holds as many, and a tokenizer takes seconds for a few millions
INTERVAL = 0.05  # seconds between two looks at what has arrived

Conversation = Sequence[Mapping[str, str]]


@dataclass(eq=False)
class Answer:
    """What a policy has said so far.

    Attributes:
        notice: what to tell about its prompt, or None.
        error: why it ended, where it is not the model that ended it.
    """

    policy: Policy
    request: Request
    notice: str | None
    chunks: list[Chunk] = field(default_factory=list)
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def is_done(self) -> bool:
        return self.error is not None or bool(self.chunks and self.chunks[-1].finish_reason)


@dataclass(frozen=True)
class Span:
    """A piece of an answer: the text that some of its tokens make together, mostly one.

    Attributes:
        start, end: which tokens.
        ends_turn: whether it is the token that ended the answer, which is no text.
    """

    text: str
    start: int
    end: int
    ends_turn: bool = False


def ask(policy: Policy, conversation: Conversation, params: SamplingParams) -> Answer:
    """The answer that `stream` fills.

    Raises:
        ValueError: for a tokenizer without a chat template, or a message that does not fit the context.
    """
    _, model, tokenizer, _, adapter = policy
    if (longest := max(len(message["content"]) for message in conversation)) > LONGEST:
        raise ValueError(f"a message has {longest:,} characters, at most {LONGEST:,} are read")
    if tokenizer.chat_template is None:
        raise ValueError(f"{policy.name} has no chat template, so it cannot chat: fine-tune it first (phi2 sft)")
    ids, dropped = fit_context(tokenizer, model.config, conversation, params.max_new_tokens)
    request = Request(ids, params, stop_ids_of(model, tokenizer, params), adapter=adapter)
    return Answer(policy, request, told_if_trimmed(dropped, model.config))


def stream(answers: Sequence[Answer]) -> Generator[None, None, None]:
    """Fills the answers as their tokens come, and yields whenever some have; whoever leaves early ends them all."""
    arrived: SimpleQueue[tuple[Answer, Chunk | Exception]] = SimpleQueue()
    try:
        for answer in answers:
            answer.policy.worker.submit(answer.request, partial(_put, arrived, answer))
        while not all(answer.is_done for answer in answers):
            for answer, said in _next(arrived):
                if isinstance(said, Exception):
                    answer.error = str(said)
                else:
                    answer.chunks.append(said)
            yield
    finally:
        for answer in answers:
            answer.policy.worker.cancel(answer.request)


def _put(arrived: SimpleQueue, answer: Answer, said: Chunk | Exception) -> None:
    arrived.put((answer, said))


def _next(arrived: SimpleQueue[tuple[Answer, Chunk | Exception]]) -> Iterator[tuple[Answer, Chunk | Exception]]:
    """Waits for a first one, and a moment more for others: a page is not drawn for every token."""
    yield arrived.get()
    sleep(INTERVAL)
    try:
        while True:
            yield arrived.get_nowait()
    except Empty:
        pass


def spans(answer: Answer) -> list[Span]:
    """The pieces of an answer; together they have each of its tokens once, as far as those make whole characters."""
    found, start = [], 0
    for number, chunk in enumerate(answer.chunks):
        ends_turn = chunk.finish_reason == "stop"
        end = number if ends_turn else number + 1
        if chunk.text and start < end:
            found.append(Span(chunk.text, start, end))
            start = end
        if ends_turn:
            name = answer.policy.tokenizer.decode([chunk.token_id], skip_special_tokens=False)
            found.append(Span(name, start, number + 1, ends_turn=True))
    return found


def scored(answers: Sequence[Answer], policies: Sequence[Policy]) -> list[dict[str, list[float]]]:
    """For each answer, by policy, the log-probability in nats of each of its tokens behind its prompt.

    A policy that reads other tokens than the one that answered has none to tell.

    Raises:
        ValueError: when a model gives logits that are not finite.
    """
    told: list[dict[str, list[float]]] = [{} for _ in answers]
    for policy in policies:
        common = [number for number, answer in enumerate(answers) if answer.chunks and _read_alike(answer, policy)]
        requests = [_to_score(answers[number]) for number in common]
        scores = policy.worker.run(partial(_score, policy.adapter, requests)).result()
        for number, logprobs in zip(common, scores, strict=True):
            told[number][policy.name] = logprobs
    return told


def _to_score(answer: Answer) -> scoring.Request:
    return scoring.Request(answer.request.ids, [chunk.token_id for chunk in answer.chunks])


def _read_alike(answer: Answer, policy: Policy) -> bool:
    ids = [*answer.request.ids, *(chunk.token_id for chunk in answer.chunks)]
    return policy.tokenizer is answer.policy.tokenizer or _texts(policy.tokenizer, ids) == _texts(
        answer.policy.tokenizer, ids
    )


def _texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str | None]:
    return [tokenizer.backend.id_to_token(token_id) for token_id in ids]


def _score(adapter: str | None, requests: Sequence[scoring.Request], model: Phi2ForCausalLM) -> list[list[float]]:
    with computing(model, adapter):
        scores = dict(scoring.score(model, requests))
    return [scores[number].logprobs for number in range(len(requests))]
