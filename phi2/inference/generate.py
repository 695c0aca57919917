"""Text from a model: `stream` gives a reply piece by piece, `generate` gives it whole, for one prompt or any number.

Both fold one loop, `replies_to`, which asks the engine for tokens (`engine.py`) and makes text of them (`replies.py`).
A reply ends at a stop id ("stop"), at its last allowed token ("length") or before a stop string ("stop_string").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from reprlib import repr as short_repr
from typing import Any, cast

from phi2.config import Phi2Config
from phi2.inference.config import SamplingParams
from phi2.inference.engine import Engine, Request, evaluation_mode
from phi2.inference.kept_engine import kept_engine
from phi2.inference.replies import Chunk, Generation, Reply, join
from phi2.keywords import made_of
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
        prompts: a text, a conversation (a list of messages), or a list of either, of any length. The same prompt again
            asks for another answer to it.
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
    require_loaded(model, tokenizer)
    params = made_of(SamplingParams, sampling)
    ids = encode_prompts(tokenizer, prompts, prompt_style, model.config)
    chunks: list[list[Chunk]] = [[] for _ in ids]
    for number, chunk in _replies(model, tokenizer, ids, params):
        chunks[number].append(chunk)
    return [join(reply) for reply in chunks]


def stream(
    model: Phi2ForCausalLM, tokenizer: Tokenizer, prompt: Prompt, *, prompt_style: str | None = None, **sampling: Any
) -> Iterator[Chunk]:
    """The reply to one prompt as it is made, a chunk for each token. Arguments and errors are those of `generate`."""
    require_loaded(model, tokenizer)
    params = made_of(SamplingParams, sampling)
    ids = encode_prompts(tokenizer, [prompt], prompt_style, model.config)
    return (chunk for _, chunk in _replies(model, tokenizer, ids, params))


def _replies(
    model: Phi2ForCausalLM, tokenizer: Tokenizer, prompts: list[list[int]], params: SamplingParams
) -> Iterator[tuple[int, Chunk]]:
    """Prompt number i draws from seed + i."""
    if not prompts:
        return
    length = min(model.config.max_position_embeddings, max(map(len, prompts)) + params.max_new_tokens)
    engine = kept_engine(model, choices_of(model, tokenizer), len(prompts), length)
    yield from replies_to(engine, tokenizer, prompts, [params.of_row(row) for row in range(len(prompts))])


def require_loaded(model: Any, tokenizer: Any) -> None:
    """Refuses models and tokenizers of other libraries, and the names of any."""
    for what, given, kind in (("model", model, Phi2ForCausalLM), ("tokenizer", tokenizer, Tokenizer)):
        if not isinstance(given, kind):
            raise ValueError(f"{what} must be one that phi2.load gives, got {type(given).__name__}")


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
    if not prompt:
        raise ValueError("the prompt is empty: a conversation needs a message")
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


def replies_to(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> Iterator[tuple[int, Chunk]]:
    """The loop behind everything that makes text: (number of the prompt, chunk) for every token, as they come.

    Args:
        prompts: token ids that passed `check_prompt`, any number of them.
        params: how each is to be answered.
    """
    model = engine.model
    requests: dict[Request, int] = {}
    for number, (ids, sampling) in enumerate(zip(prompts, params, strict=True)):
        stop_ids = stop_ids_of(model, tokenizer, sampling)
        requests[Request(ids, sampling, stop_ids, adapter=model.computed_adapter)] = number
    replies: dict[Request, Reply] = {}
    for request in requests:
        engine.add(request)
    try:
        with evaluation_mode(model):
            while requests:
                for token in engine.step():
                    request = token.request
                    reply = replies.get(request) or replies.setdefault(request, Reply(tokenizer, request))
                    chunk = reply.add(token)
                    number = requests[request]
                    if chunk.finish_reason:
                        if token.finish_reason is None:  # the text ends before the tokens do
                            engine.cancel(request)
                        del requests[request], replies[request]
                    yield number, chunk
    finally:
        for request in requests:
            engine.cancel(request)


def choices_of(model: Phi2ForCausalLM, tokenizer: Tokenizer) -> int:
    """How many ids may be said."""
    return min(len(tokenizer), model.config.vocab_size)


def stop_ids_of(model: Phi2ForCausalLM, tokenizer: Tokenizer, params: SamplingParams) -> frozenset[int]:
    """The tokens that end a reply: those of the tokenizer, of the model, and stop strings that are a token's name."""
    return tokenizer.stop_ids | _config_stop_ids(model.config) | _special_stop_ids(tokenizer, params.stop or ())


def _config_stop_ids(config: Phi2Config) -> set[int]:
    eos = config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def _special_stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    """Stop strings that are one special token: text never shows those, so their id stops the reply instead."""
    ids = (tokenizer.token_id(text) for text in stop)
    return {token_id for token_id in ids if token_id is not None and tokenizer.decode([token_id]) == ""}
