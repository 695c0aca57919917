"""One checkpoint in, another out: an adapter merged, another dtype, another vocabulary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from phi2.checkpoints.peft_files import resized
from phi2.checkpoints.weights import load, save_pretrained
from phi2.lora import merge
from phi2.model import Phi2ForCausalLM


def merge_adapter(model: str, adapter: str, output: str, dtype: str | None = None) -> Path:
    """Adds an adapter to the weights it was trained on and writes a checkpoint in Hugging Face's layout.

    The sum is taken in float32 and rounded once.

    Args:
        model: folder or hub id of the base the adapter was trained on.
        adapter: folder or hub id of the adapter, in PEFT's format.
        output: folder to write; it must be empty or new.
        dtype: float32, bfloat16 or float16; unset, each weight keeps that of the base's file.

    Raises:
        FileNotFoundError, ValueError: when something cannot be read, does not fit, or `output` is not empty.
    """
    merged, tokenizer = load(model, "cpu", None if dtype is None else torch.float32, adapter=adapter)
    merge(merged)
    save_pretrained(merged, tokenizer, output, dtype=dtype)
    return Path(output)


def convert(
    model: str, output: str, dtype: str | None = None, vocab_size: int | None = None, add_chatml: bool = False
) -> Path:
    """Writes a checkpoint again, changed.

    Args:
        model: folder or hub id.
        output: folder to write; it must be empty or new.
        dtype: float32, bfloat16 or float16; unset, each weight as it is in the file.
        vocab_size: rows of the embedding and of the head; new ones are the mean of the others. Unset, as it is.
        add_chatml: give the tokenizer <|im_start|>, <|im_end|> and the ChatML template, in rows that are free.

    Raises:
        FileNotFoundError, ValueError: when something cannot be read, the vocabulary would not hold the tokenizer's ids,
            or `output` is not empty.
    """
    converted, tokenizer = load(model, "cpu", dtype)
    if add_chatml:
        tokenizer = tokenizer.with_chatml()
    rows = converted.config.vocab_size if vocab_size is None else vocab_size
    if rows < len(tokenizer):
        raise ValueError(f"vocab_size must be at least the tokenizer's {len(tokenizer)} ids, got {rows}")
    resize_vocabulary(converted, rows)
    save_pretrained(converted, tokenizer, output)
    return Path(output)


@torch.no_grad()
def resize_vocabulary(model: Phi2ForCausalLM, rows: int) -> None:
    """Gives the embedding and the head this many rows, dropping the last ones or adding means of the others."""
    embedding, head = model.model.embed_tokens, model.lm_head
    embedding.weight, head.weight, head.bias = (
        nn.Parameter(resized(tensor, rows)) for tensor in (embedding.weight, head.weight, head.bias)
    )
    embedding.num_embeddings = head.out_features = rows
    model.config = model.model.config = replace(model.config, vocab_size=rows)
