"""Text from a model: one pass over the prompt, then one token a step until something ends the reply.

`stream` gives the reply piece by piece, `generate` gives it whole, for one prompt or a batch; both fold one loop,
`decode`. The rows of a batch are padded on the left, so that all of them grow at the same index of the cache; the pads
are invisible and do not count as positions, and a row says what it would say alone.

A reply ends at a stop id ("stop"), at its last allowed token ("length") or before a stop string ("stop_string").

Dims: B rows, T tokens of this pass, S tokens in the cache, C hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from reprlib import repr as short_repr
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from phi2.cache import KVCache
from phi2.config import Phi2Config
from phi2.inference.sampling import Sampler, SamplingParams
from phi2.inference.step import RecordedStep, can_record
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]  # messages {"role": ..., "content": ...}
Prompt = str | Conversation


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


def generate(
    model: Phi2ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    *,
    prompt_style: str | None = None,
    **sampling,
) -> Generation | list[Generation]:
    """Replies to one prompt, or to a batch of them in one go.

    Args:
        prompts: a text, a conversation (a list of messages), or a list of either.
        prompt_style: how a text is shown to the model: "raw" (default), "instruct", or as a user's turn, "chat"
            ("chatml" where the template is ChatML). A raw text may spell special tokens; in any other they stay text.
        sampling: the fields of `SamplingParams`: max_new_tokens, temperature, top_k, top_p, min_p,
            repetition_penalty, seed (None for a new one, which the result tells), stop.
    Returns:
        One Generation, or a list of them in the order of the prompts.
    Raises:
        ValueError: for a setting out of range, a prompt that is empty or does not fit the context, or logits that are
            not finite.
    """
    params = SamplingParams(**sampling)
    single = _is_one_prompt(prompts)
    ids = encode_prompts(tokenizer, [prompts] if single else prompts, prompt_style, model.config)
    chunks: list[list[Chunk]] = [[] for _ in ids]
    for row, chunk in decode(model, tokenizer, ids, params):
        chunks[row].append(chunk)
    generations = [_join(row) for row in chunks]
    return generations[0] if single else generations


def stream(
    model: Phi2ForCausalLM, tokenizer: Tokenizer, prompt: Prompt, *, prompt_style: str | None = None, **sampling
) -> Iterator[Chunk]:
    """The reply to one prompt as it is made, a chunk for each token. Arguments and errors are those of `generate`."""
    params = SamplingParams(**sampling)
    ids = encode_prompts(tokenizer, [prompt], prompt_style, model.config)
    return (chunk for _, chunk in decode(model, tokenizer, ids, params))


def encode_prompts(
    tokenizer: Tokenizer, prompts: Sequence[Prompt], prompt_style: str | None, config: Phi2Config
) -> list[list[int]]:
    """The token ids of every prompt, checked against what the model can read.

    Raises:
        ValueError: one line that numbers the prompt when there are several.
    """
    batch = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            ids = _encode_prompt(tokenizer, prompt, prompt_style)
            check_prompt(ids, config)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}" if len(prompts) > 1 else str(error)) from error
        batch.append(ids)
    return batch


def _is_one_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence):
        return True  # of whatever kind it is
    return len(prompts) > 0 and isinstance(prompts[0], Mapping)


def _encode_prompt(tokenizer: Tokenizer, prompt: Prompt, prompt_style: str | None) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt, prompt_style or "raw")
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        hint = "; put a single message in a list" if isinstance(prompt, Mapping) else ""
        raise ValueError(f"a prompt must be a str or a list of messages, got {short_repr(prompt)}{hint}")
    if prompt_style is not None:
        raise ValueError(f"prompt_style {prompt_style!r} is for texts; a conversation takes the tokenizer's template")
    return tokenizer.encode_chat(prompt, add_generation_prompt=True)


def check_prompt(ids: list[int], config: Phi2Config) -> None:
    """Raises ValueError unless the model can read `ids` and say at least one token after them."""
    if not ids:
        raise ValueError("the prompt is empty; start from '<|endoftext|>' to let the model write freely")
    if len(ids) >= config.max_position_embeddings:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, at most {config.max_position_embeddings - 1} leave room for a reply "
            f"in a context of {config.max_position_embeddings}"
        )
    if max(ids) >= config.vocab_size:
        raise ValueError(f"the prompt has token id {max(ids)}, the model knows ids below {config.vocab_size}")


@torch.no_grad()
def decode(
    model: Phi2ForCausalLM,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    params: SamplingParams,
    cache: KVCache | None = None,
) -> Iterator[tuple[int, Chunk]]:
    """The loop behind everything that generates: (row, chunk) for every token of every row, step by step.

    Args:
        prompts: token ids that passed `check_prompt`, one list for each row.
        cache: one row's cache that holds the first ids of its prompt already, fewer than all of them.
    """
    limits = [min(params.max_new_tokens, model.config.max_position_embeddings - len(ids)) for ids in prompts]
    if not prompts:
        return
    if cache is None:
        length = max(map(len, prompts)) + max(limits)
        cache = KVCache(model.config, len(prompts), length, model.dtype, model.device)
    stop_ids = tokenizer.stop_ids | _config_stop_ids(model.config) | _special_stop_ids(tokenizer, params.stop)
    choices = min(len(tokenizer), model.config.vocab_size)
    with evaluation_mode(model):
        replies = [
            _Reply(tokenizer, params, row, stop_ids, len(ids), len(ids) - cache.length, limit)
            for row, (ids, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        batch = _Batch(model, prompts, cache, Sampler(params, prompts, choices, model.device))
        while any(not reply.finish_reason for reply in replies):
            for row, (token_id, logprob, finite) in zip(batch.rows, batch.step(), strict=True):
                if replies[row].finish_reason:
                    continue
                if not finite:
                    raise ValueError(f"non-finite logits; first in {batch.first_nonfinite_module()} ({model.dtype})")
                yield row, replies[row].add(int(token_id), logprob)
            batch.shrink([row for row in batch.rows if not replies[row].finish_reason])


class _Batch:
    """The device side of decoding: what one forward pass reads, and what it leaves for the next."""

    def __init__(self, model: Phi2ForCausalLM, prompts: list[list[int]], cache: KVCache, sampler: Sampler) -> None:
        self.model, self.cache, self.sampler = model, cache, sampler
        self.rows = list(range(len(prompts)))  # the row of `prompts` that each row of the tensors belongs to
        device, width = model.device, max(map(len, prompts))
        pads = [width - len(ids) for ids in prompts]
        padded = torch.tensor([[0] * pad + ids for pad, ids in zip(pads, prompts, strict=True)], device=device)
        self.input_ids = padded[:, cache.length :]  # (B, T), then (B, 1)
        self.pads = self.visible_until = self._recorded = None
        if any(pads):
            self.pads = torch.tensor(pads, dtype=torch.int32, device=device)[:, None]  # (B, 1)
            index = torch.arange(cache.max_length, device=device)
            self.visible_until = torch.where(index < self.pads, 0, cache.max_length).int()  # (B, max_length)

    def step(self) -> list[list[float]]:
        """One pass, and one token for each row: its id, its log-probability, and whether its logits were finite."""
        logits = self._logits()
        tokens = self.sampler(logits)
        logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
        finite = logits.isfinite().all(dim=-1)
        self._last_input, self.input_ids = self.input_ids, tokens[:, None]
        return torch.stack((tokens, logprobs, finite), dim=1).tolist()  # float32 holds ids; one wait for the device

    def _logits(self) -> Tensor:
        if self.input_ids.shape[1] > 1 or not can_record(self.model.device):
            return self._forward()
        if self._recorded is None:
            self._recorded = RecordedStep(self.model, self.cache, self.pads, self.visible_until)
        return self._recorded(self.input_ids)

    def _forward(self) -> Tensor:
        """(B, V) float32 logits of the token after the last one of `input_ids`; the head runs nowhere else."""
        start, end = self.cache.length, self.cache.length + self.input_ids.shape[1]
        positions = None if self.pads is None else (self.cache.positions(end - start) - self.pads).clamp(min=0)
        until = None if self.visible_until is None else self.visible_until[:, :end]
        hidden = self.model.model(self.input_ids, positions=positions, visible_until=until, cache=self.cache)
        return self.model.lm_head(hidden[:, -1]).float()

    def shrink(self, rows: list[int]) -> None:
        """Drops finished rows once they are half of the batch, so that copying the cache stays cheap on the whole."""
        if not rows or 2 * len(rows) > len(self.rows):
            return
        kept = [self.rows.index(row) for row in rows]
        self.rows = rows
        self.sampler.keep(kept)
        self.cache.keys, self.cache.values = self.cache.keys[:, kept], self.cache.values[:, kept]
        self.input_ids = self.input_ids[kept]
        if self.pads is not None:
            self.pads, self.visible_until = self.pads[kept], self.visible_until[kept]
        self._recorded = None

    def first_nonfinite_module(self) -> str:
        """Repeats the last pass and names the first module whose output is not finite."""
        self.input_ids = self._last_input
        self.cache.truncate(self.cache.length - self.input_ids.shape[1])
        return first_nonfinite_module(self.model, self._forward)


def first_nonfinite_module(model: torch.nn.Module, run: Callable[[], object]) -> str:
    """Calls `run` and names the first module of `model` that returned something that is not finite."""
    found = []

    def watch(name: str):
        def hook(module, inputs, output):
            if not output.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "no module when the pass was repeated"


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switches dropout off, and afterwards every module back to what it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Reply:
    """The text side of one row: tokens in, chunks out, and the decision that it ends."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        row: int,
        stop_ids: frozenset[int],
        prompt: int,
        new: int,
        limit: int,
    ) -> None:
        self._decoder, self._cutter = tokenizer.stream(), StopCutter(params.stop)
        self._seed = None if params.temperature == 0 else params.seed + row
        self._stop_ids, self._limit = stop_ids, limit
        self._prompt, self._new, self._count = prompt, new, 0  # tokens: prompt, those not cached, generated
        self._started = perf_counter()
        self.finish_reason: str | None = None

    def add(self, token_id: int, logprob: float) -> Chunk:
        self._count += 1
        if self._count == 1:
            self._first = perf_counter()
        text = self._text(token_id)
        elapsed = perf_counter() - self._first
        return Chunk(
            text=text,
            token_id=token_id,
            logprob=logprob,
            prompt_tokens=self._prompt,
            generation_tokens=self._count,
            prompt_tps=self._new / (self._first - self._started),
            generation_tps=(self._count - 1) / elapsed if self._count > 1 else 0.0,
            finish_reason=self.finish_reason,
            seed=self._seed,
        )

    def _text(self, token_id: int) -> str:
        """What may be shown now; sets `finish_reason`, and then lets out all that was held back."""
        if token_id in self._stop_ids:
            self.finish_reason = "stop"
        elif self._count == self._limit:
            self.finish_reason = "length"
        piece = "" if self.finish_reason == "stop" else self._decoder.step(token_id)
        if self.finish_reason:
            piece += self._decoder.flush()
        text = self._cutter.step(piece)
        if self._cutter.found:
            self.finish_reason = "stop_string"
        elif self.finish_reason:
            text += self._cutter.flush()
        return text


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


def _config_stop_ids(config: Phi2Config) -> set[int]:
    eos = config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _special_stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    """Stop strings that are one special token: text never shows those, so their id stops the reply instead."""
    ids = (tokenizer.token_id(text) for text in stop)
    return {token_id for token_id in ids if token_id is not None and tokenizer.decode([token_id]) == ""}


def _join(chunks: list[Chunk]) -> Generation:
    last = chunks[-1]
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
