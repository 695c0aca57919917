"""Replies to many prompts: the one place where evaluation asks for text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from phi2.inference.config import SamplingParams
from phi2.inference.generate import check_prompt, choices_of, replies_to
from phi2.inference.kept_engine import kept_engine
from phi2.inference.replies import Chunk, join
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer


def replies(
    model: Phi2ForCausalLM,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    params: SamplingParams,
    rows: int | str = "auto",
) -> Iterator[tuple[int, str]]:
    """The index of each prompt and the text that follows it, as they are finished; longest prompts first.

    Args:
        rows: prompts that are answered side by side at most; "auto" is what the engine has room for.
    Raises:
        ValueError: for a prompt that is empty or too long.
    """
    for ids in prompts:
        check_prompt(ids, model.config)
    if not prompts:
        return
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    length = min(len(prompts[order[0]]) + params.max_new_tokens, model.config.max_position_embeddings)
    side_by_side = len(prompts) if rows == "auto" else min(int(rows), len(prompts))
    engine = kept_engine(model, choices_of(model, tokenizer), side_by_side, length)
    chunks: defaultdict[int, list[Chunk]] = defaultdict(list)
    settings = [params.of_row(index) for index in order]
    for number, chunk in replies_to(engine, tokenizer, [prompts[index] for index in order], settings):
        chunks[number].append(chunk)
        if chunk.finish_reason is not None:
            yield order[number], join(chunks.pop(number)).text
