"""Replies to many prompts: the one place where evaluation asks for text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch

from phi2.inference.config import SamplingParams
from phi2.inference.generate import check_prompt, decode
from phi2.inference.replies import Chunk, join
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

MOST_ROWS = 64
CACHE_BYTES = 2 * 2**30  # of keys and values on a CPU; a quarter of what is free on a GPU


def replies(
    model: Phi2ForCausalLM,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    params: SamplingParams,
    rows: int | str = "auto",
) -> Iterator[tuple[int, str]]:
    """The index of each prompt and the text that follows it, as they are finished; longest prompts first.

    Args:
        rows: prompts that are answered together at most; "auto" is what fits in memory.
    Raises:
        ValueError: for a prompt that is empty or too long.
    """
    for ids in prompts:
        check_prompt(ids, model.config)
    left = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    while left:
        length = min(len(prompts[left[0]]) + params.max_new_tokens, model.config.max_position_embeddings)
        count = _rows_of_cache(model, length) if rows == "auto" else int(rows)
        batch, left = left[:count], left[count:]
        chunks: defaultdict[int, list[Chunk]] = defaultdict(list)
        for row, chunk in decode(model, tokenizer, [prompts[index] for index in batch], params):
            chunks[row].append(chunk)
            if chunk.finish_reason is not None:
                yield batch[row], join(chunks[row]).text


def _rows_of_cache(model: Phi2ForCausalLM, length: int) -> int:
    """How many rows of this many tokens there is room for."""
    config = model.config
    of_a_row = 2 * config.num_hidden_layers * config.kv_heads * config.head_dim * model.dtype.itemsize * length
    room = torch.cuda.mem_get_info(model.device)[0] // 4 if model.device.type == "cuda" else CACHE_BYTES
    return max(1, min(MOST_ROWS, room // of_a_row))
