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
from reprlib import repr as short_repr
from typing import Any, cast

import torch
from torch import Tensor

from phi2.cache import KVCache
from phi2.config import Phi2Config
from phi2.inference.config import SamplingParams
from phi2.inference.replies import Chunk, Generation, Reply, join
from phi2.inference.sampling import Sampler
from phi2.inference.step import RecordedStep, can_record
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

Conversation = Sequence[Mapping[str, Any]]  # messages {"role": ..., "content": ...}
Prompt = str | Conversation


def generate(
    model: Phi2ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Prompt | Sequence[Prompt],
    *,
    prompt_style: str | None = None,
    **sampling: Any,
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
    single = _is_one_prompt(prompts)
    batch = cast(Sequence[Prompt], [prompts] if single else prompts)
    generations = generate_batch(model, tokenizer, batch, prompt_style=prompt_style, **sampling)
    return generations[0] if single else generations


def generate_batch(
    model: Phi2ForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    prompt_style: str | None = None,
    **sampling: Any,
) -> list[Generation]:
    """`generate` for a list of prompts."""
    params = SamplingParams(**sampling)
    ids = encode_prompts(tokenizer, prompts, prompt_style, model.config)
    chunks: list[list[Chunk]] = [[] for _ in ids]
    for row, chunk in decode(model, tokenizer, ids, params):
        chunks[row].append(chunk)
    return [join(row) for row in chunks]


def stream(
    model: Phi2ForCausalLM, tokenizer: Tokenizer, prompt: Prompt, *, prompt_style: str | None = None, **sampling: Any
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
    _require_conversation(prompt, prompt_style)
    return tokenizer.encode_chat(prompt, add_generation_prompt=True)


def _require_conversation(prompt: Any, prompt_style: str | None) -> None:
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        hint = "; put a single message in a list" if isinstance(prompt, Mapping) else ""
        raise ValueError(f"a prompt must be a str or a list of messages, got {short_repr(prompt)}{hint}")
    if prompt_style is not None:
        raise ValueError(f"prompt_style {prompt_style!r} is for texts; a conversation takes the tokenizer's template")


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
    stop_ids = tokenizer.stop_ids | _config_stop_ids(model.config) | _special_stop_ids(tokenizer, params.stop or ())
    choices = min(len(tokenizer), model.config.vocab_size)
    with evaluation_mode(model):
        replies = [
            Reply(tokenizer, params, row, stop_ids, len(ids), len(ids) - cache.length, limit)
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
        self.pads: Tensor | None = None
        self.visible_until: Tensor | None = None
        self._recorded: RecordedStep | None = None
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
        if self.pads is not None and self.visible_until is not None:
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


def _config_stop_ids(config: Phi2Config) -> set[int]:
    eos = config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _special_stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    """Stop strings that are one special token: text never shows those, so their id stops the reply instead."""
    ids = (tokenizer.token_id(text) for text in stop)
    return {token_id for token_id in ids if token_id is not None and tokenizer.decode([token_id]) == ""}
