"""Generating on a CPU, ours against transformers.

At 105 M, in float32, both are called as their users call them, `phi2.generate` and `model.generate`, on one row: same
model, same prompt, same tokens out. Prefill is a long prompt and one new token, decoding a short prompt and many.

At full size our int8 and int4 weights are compared with bfloat16: both read the same tokens one at a time behind the
same prompt; weights are random and the same, ours rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.models import MEDIUM, initialized, random_model, save, twin
from benchmarks.harness.processes import Timer, compare
from benchmarks.registry import Report, case, versions
from phi2.cache import KVCache, PackedPass
from phi2.checkpoints.weights import load
from phi2.config import Phi2Config
from phi2.inference.generate import generate
from phi2.model import Phi2ForCausalLM
from phi2.quantize import quantize_model

WORDS = " the cat sat on a mat and says that 7 plus 12 is what I know of Paris"


class Job(NamedTuple):
    """What both load, read and write."""

    folder: Path
    prompt: str
    new_tokens: int


def compare_generating(turns: int, prompt_tokens: int, new_tokens: int) -> Report:
    with TemporaryDirectory() as folder:
        tokenizer = save(initialized(MEDIUM), Path(folder), endless=True)
        prompt = tokenizer.decode(tokenizer.encode(WORDS * prompt_tokens)[:prompt_tokens])
        job = Job(Path(folder), prompt, new_tokens)
        result = compare(ours, transformers_generate, job, turns, {"token_ids": 0.0, "logprobs": 1e-4})
    return Report(
        peer=versions("transformers"),
        gate=f"{new_tokens} equal tokens, log-probabilities by at most {result.largest_difference['logprobs']:.1e}",
        measures=[*result.speeds(), *result.memory()],
    )


case("prefill_vs_transformers", 30, "a prompt of 1024 tokens, and the first token after it")(
    partial(compare_generating, prompt_tokens=1024, new_tokens=1)
)
case("decode_vs_transformers", 15, "64 tokens, one at a time, after a prompt of 64 tokens")(
    partial(compare_generating, prompt_tokens=64, new_tokens=64)
)


def ours(timer: Timer, job: Job) -> None:
    model, tokenizer = load(job.folder, "cpu", "float32")
    while True:
        timer.start()
        reply = generate(model, tokenizer, job.prompt, max_new_tokens=job.new_tokens, temperature=0.0)
        timer.stop()
        timer.report(token_ids=reply.token_ids, logprobs=reply.logprobs)


def transformers_generate(timer: Timer, job: Job) -> None:
    import transformers

    model = transformers.PhiForCausalLM.from_pretrained(job.folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.folder)
    options = dict(max_new_tokens=job.new_tokens, do_sample=False, return_dict_in_generate=True, output_logits=True)
    while True:
        timer.start()
        inputs = tokenizer(job.prompt, return_tensors="pt")
        reply = model.generate(**inputs, **options)
        tokens = reply.sequences[0, inputs["input_ids"].shape[1] :]
        tokenizer.decode(tokens)
        timer.stop()
        logprobs = torch.cat(reply.logits).log_softmax(dim=-1).gather(1, tokens[:, None])
        timer.report(token_ids=tokens.tolist(), logprobs=logprobs.flatten().tolist())


# ---- at full size, quantised ----

PROMPT, NEW = 64, 8  # tokens
ROUNDING = {"int8": 0.04, "int4": 0.25}  # of the largest logit: what rounding random weights does through 32 layers


def compare_quantized(turns: int, format: str) -> Report:
    result = compare(ours_quantized, transformers_bfloat16, format, turns, {"logits": ROUNDING[format]})
    return Report(
        peer=versions("transformers"),
        gate=f"logits of {NEW} tokens apart by at most {result.largest_difference['logits']:.1e} of the largest",
        measures=result.speeds(),
    )


for format in ROUNDING:
    case(f"decode_{format}_vs_transformers", 10, f"tokens of a 2.78 B Phi-2, our {format} against bfloat16")(
        partial(compare_quantized, format=format)
    )


def _full_size() -> Phi2ForCausalLM:
    return random_model(Phi2Config(), torch.device("cpu"), torch.bfloat16)


def ours_quantized(timer: Timer, format: str) -> None:
    model = _full_size()
    quantize_model(model, format)
    cache = KVCache(model.config, 1, PROMPT + NEW, torch.bfloat16)

    def read(ids: Tensor) -> Tensor:
        return model(ids, cached=PackedPass(cache, {0: ids.shape[1]}))[0, -1]

    _read_on(timer, read, lambda: cache.truncate(0, PROMPT))


def transformers_bfloat16(timer: Timer, format: str) -> None:
    import transformers

    model, past = twin(_full_size()), transformers.DynamicCache()
    _read_on(timer, lambda ids: model(ids, past_key_values=past).logits[0, -1], lambda: past.crop(-NEW))


@torch.no_grad()
def _read_on(timer: Timer, read: Callable[[Tensor], Tensor], rewind: Callable[[], None]) -> None:
    """Reads the same tokens one at a time, always behind the same prompt.

    Args:
        read: token ids (1, T), behind those before -> logits of the last, (V,).
        rewind: goes back to the end of the prompt.
    """
    ids = torch.randint(Phi2Config().vocab_size, (1, PROMPT + NEW), generator=torch.Generator().manual_seed(0))
    read(ids[:, :PROMPT])
    while True:
        timer.start()
        logits = [read(ids[:, i : i + 1]) for i in range(PROMPT, PROMPT + NEW)]
        timer.stop()
        rewind()
        timer.report(logits=torch.stack(logits).float().numpy())
