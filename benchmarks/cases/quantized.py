"""Decoding on a CPU at full size: our int8 and int4 weights against transformers in bfloat16.

Both read the same tokens one at a time behind the same prompt; weights are random and the same, ours rounded.
"""

from __future__ import annotations

from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.processes import THREADS, Timer, compare
from benchmarks.registry import Report, case
from phi2.cache import KVCache
from phi2.config import Phi2Config
from phi2.model import Phi2ForCausalLM
from phi2.quantize import quantize_model

PROMPT, NEW = 64, 8  # tokens
ROUNDING = {"int8": 0.04, "int4": 0.25}  # of the largest logit: what rounding random weights does through 32 layers


class Job(NamedTuple):
    """What both read; the format is ours."""

    config: Phi2Config
    ids: Tensor  # (1, PROMPT + NEW)
    format: str


@case("decode_int8_vs_transformers", turns=10, summary="tokens of a 2.78 B Phi-2, our int8 against bfloat16")
def decode_int8_vs_transformers(turns: int) -> Report:
    return _compare(Phi2Config(), "int8", turns)


@case("decode_int4_vs_transformers", turns=10, summary="tokens of a 2.78 B Phi-2, our int4 against bfloat16")
def decode_int4_vs_transformers(turns: int) -> Report:
    return _compare(Phi2Config(), "int4", turns)


def _compare(config: Phi2Config, format: str, turns: int) -> Report:
    ids = torch.randint(config.vocab_size, (1, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
    result = compare(ours, transformers_bfloat16, Job(config, ids, format), turns, {"logits": ROUNDING[format]})
    return Report(
        peer={"transformers": metadata.version("transformers")},
        gate=f"logits of {NEW} tokens apart by at most {result.largest_difference['logits']:.1e} of the largest",
        measures=result.speeds(),
        facts={"weights": f"{format}, theirs bfloat16", "threads": THREADS, "prompt": PROMPT, "tokens": NEW},
    )


def random_model(config: Phi2Config) -> Phi2ForCausalLM:
    """The same weights in bfloat16 in every process."""
    torch.set_default_dtype(torch.bfloat16)
    model = Phi2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.init_weights(seed=0)
    return model.eval()


@torch.no_grad()
def ours(timer: Timer, job: Job) -> None:
    model = random_model(job.config)
    quantize_model(model, job.format)
    cache = KVCache(job.config, 1, PROMPT + NEW, torch.bfloat16)
    model.model(job.ids[:, :PROMPT], cache=cache)
    while True:
        cache.truncate(PROMPT)
        timer.start()
        logits = [model(job.ids[:, i : i + 1], cache=cache)[0, 0] for i in range(PROMPT, PROMPT + NEW)]
        timer.stop()
        timer.report(logits=torch.stack(logits).float().numpy())


@torch.no_grad()
def transformers_bfloat16(timer: Timer, job: Job) -> None:
    import transformers

    config = transformers.PhiConfig(**job.config.to_dict())
    with torch.device("meta"):
        model = transformers.PhiForCausalLM(config).to(torch.bfloat16).eval()
    model.load_state_dict(random_model(job.config).state_dict(), assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is not in a state dict
    past = transformers.DynamicCache()
    model(job.ids[:, :PROMPT], past_key_values=past)
    while True:
        timer.start()
        logits = [model(job.ids[:, i : i + 1], past_key_values=past).logits[0, 0] for i in range(PROMPT, PROMPT + NEW)]
        timer.stop()
        past.crop(-NEW)
        timer.report(logits=torch.stack(logits).float().numpy())
