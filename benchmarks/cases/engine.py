"""Many prompts of mixed lengths on the embedded nano model: one call of `phi2.generate`, whose rows come and go.

The peers take 16 prompts at a time, each batch as long as its longest prompt and its longest reply: `generate` of
transformers, which pads on the left, and `phi2.generate` called likewise.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from benchmarks.harness.models import silence, twin
from benchmarks.harness.processes import Timer, Worker, compare
from benchmarks.registry import Report, case, versions
from phi2.checkpoints.weights import load
from phi2.inference.generate import generate_batch
from phi2.model import Phi2ForCausalLM
from phi2.tokenizer import Tokenizer

WORDS = "the cat sat on a mat and says that 7 plus 12 is what I know of Paris".split()
PROMPTS, SHORTEST, LONGEST, BATCH, NEW_TOKENS = 256, 10, 350, 16, 32


def compare_engines(turns: int, worker: Worker, peer: dict[str, str]) -> Report:
    result = compare(ours, worker, None, turns, {"token_ids": 0.0})
    return Report(
        peer=peer,
        gate=f"{PROMPTS * NEW_TOKENS} equal tokens",
        measures=[*result.speeds(), *result.memory()],
    )


@case("engine_vs_transformers", turns=5, summary="256 prompts of 10 to 350 tokens, nano; theirs 16 at a time")
def engine_vs_transformers(turns: int) -> Report:
    return compare_engines(turns, transformers_generate, versions("transformers"))


@case("engine_vs_batches", turns=5, summary="256 prompts of 10 to 350 tokens, nano; in one call, and 16 at a time")
def engine_vs_batches(turns: int) -> Report:
    return compare_engines(turns, ours_in_batches, {"phi2.generate": f"{BATCH} prompts a call"})


def nano() -> tuple[Phi2ForCausalLM, Tokenizer]:
    """It never ends a reply, so that all are of one length."""
    model, tokenizer = load("nano", "cpu", "float32")
    silence(model, tokenizer.stop_ids)
    return model, tokenizer


def mixed_prompts(tokenizer: Tokenizer, count: int) -> list[str]:
    rng = random.Random(0)
    ids = tokenizer.encode(" ".join(rng.choices(WORDS, k=20 * LONGEST)))
    cuts = [(rng.randrange(len(ids) - LONGEST), rng.randint(SHORTEST, LONGEST)) for _ in range(count)]
    return [tokenizer.decode(ids[start : start + length]) for start, length in cuts]


def ours(timer: Timer, job: None, at_once: int = PROMPTS) -> None:
    model, tokenizer = nano()

    def replies(prompts: list[str]) -> list[list[int]]:
        return [reply.token_ids for reply in generate_batch(model, tokenizer, prompts, max_new_tokens=NEW_TOKENS)]

    _take_turns(timer, replies, tokenizer, at_once)


def ours_in_batches(timer: Timer, job: None) -> None:
    ours(timer, job, BATCH)


def transformers_generate(timer: Timer, job: None) -> None:
    model, tokenizer = nano()
    theirs = twin(model)

    def replies(prompts: list[str]) -> list[list[int]]:
        rows = [tokenizer.encode(prompt) for prompt in prompts]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        options = dict(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        return theirs.generate(ids, attention_mask=mask, **options)[:, width:].tolist()

    _take_turns(timer, replies, tokenizer, BATCH)


def _take_turns(
    timer: Timer, replies: Callable[[list[str]], list[list[int]]], tokenizer: Tokenizer, at_once: int
) -> None:
    prompts = mixed_prompts(tokenizer, PROMPTS)
    while True:
        timer.start()
        said = [reply for i in range(0, PROMPTS, at_once) for reply in replies(prompts[i : i + at_once])]
        timer.stop()
        timer.report(token_ids=said)
