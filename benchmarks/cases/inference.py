"""Generating on a CPU, ours against transformers.

At 105 M both are called as their users call them, `phi2.generate` and `model.generate`, on one row: same model, same
prompt, same tokens out. Prefill is a long prompt and one new token, decoding a short prompt and many.

At full size our int8 and int4 weights are compared with bfloat16: both read the same tokens one at a time behind the
same prompt; weights are random and the same, ours rounded.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases.training import base_model, parameters, shared_folder
from benchmarks.harness.models import random_model, twin
from benchmarks.harness.processes import THREADS, Timer, compare
from benchmarks.registry import Report, case
from phi2.cache import KVCache, PackedPass
from phi2.checkpoints.weights import load_model, save_pretrained
from phi2.config import Phi2Config
from phi2.data.sources import load_records
from phi2.inference.generate import generate
from phi2.model import Phi2ForCausalLM
from phi2.quantize import quantize_model
from phi2.tokenizer import Tokenizer

TOLERANCE = {"token_ids": 0.0, "logprobs": 1e-4}


class Job(NamedTuple):
    """What both load, read and write."""

    folder: Path
    prompt: str
    new_tokens: int


@case("prefill_vs_transformers", turns=30, summary="a prompt of 1024 tokens, and the first token after it")
def prefill_vs_transformers(turns: int) -> Report:
    return _compare(1024, 1, turns)


@case("decode_vs_transformers", turns=15, summary="64 tokens, one at a time, after a prompt of 64 tokens")
def decode_vs_transformers(turns: int) -> Report:
    return _compare(64, 64, turns)


def _compare(prompt_tokens: int, new_tokens: int, turns: int) -> Report:
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = Tokenizer.from_folder(shared_folder() / "tokenizer" / "phi-2-instruct")
        model = base_model()
        with torch.no_grad():  # a trained model does not say these either: ends, and ids without a token
            model.lm_head.bias[sorted(tokenizer.stop_ids)] = -1e4
            model.lm_head.bias[len(tokenizer) :] = -1e4
        save_pretrained(model, tokenizer, folder / "base")
        job = Job(folder, _text(tokenizer, prompt_tokens), new_tokens)
        result = compare(ours, transformers_generate, job, turns, TOLERANCE)
    return Report(
        peer={"transformers": metadata.version("transformers")},
        gate=f"{new_tokens} equal tokens, log-probabilities by at most {result.largest_difference['logprobs']:.1e}",
        measures=[*result.speeds(), *result.memory()],
        facts={"parameters": parameters(), "dtype": "float32", "threads": THREADS, "batch": 1},
    )


def _text(tokenizer: Tokenizer, tokens: int) -> str:
    """Real text that is `tokens` long, or as near as whole tokens of its tokenisation come."""
    records = load_records(str(shared_folder() / "data" / "sft" / "alpaca_600.jsonl"), "supervised").records
    ids = tokenizer.encode("\n".join(message.content for record in records[:60] for message in record.messages))
    return tokenizer.decode(ids[:tokens])


def ours(timer: Timer, job: Job) -> None:
    model = load_model(job.folder / "base", torch.device("cpu"), torch.float32)
    tokenizer = Tokenizer.from_folder(job.folder / "base")
    while True:
        timer.start()
        reply = generate(model, tokenizer, job.prompt, max_new_tokens=job.new_tokens, temperature=0.0)
        timer.stop()
        timer.report(token_ids=reply.token_ids, logprobs=reply.logprobs)


def transformers_generate(timer: Timer, job: Job) -> None:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.PhiForCausalLM.from_pretrained(job.folder / "base", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.folder / "base")
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


@case("decode_int8_vs_transformers", turns=10, summary="tokens of a 2.78 B Phi-2, our int8 against bfloat16")
def decode_int8_vs_transformers(turns: int) -> Report:
    return _compare_quantized("int8", turns)


@case("decode_int4_vs_transformers", turns=10, summary="tokens of a 2.78 B Phi-2, our int4 against bfloat16")
def decode_int4_vs_transformers(turns: int) -> Report:
    return _compare_quantized("int4", turns)


def _compare_quantized(format: str, turns: int) -> Report:
    result = compare(ours_quantized, transformers_bfloat16, format, turns, {"logits": ROUNDING[format]})
    return Report(
        peer={"transformers": metadata.version("transformers")},
        gate=f"logits of {NEW} tokens apart by at most {result.largest_difference['logits']:.1e} of the largest",
        measures=result.speeds(),
        facts={"weights": f"{format}, theirs bfloat16", "threads": THREADS, "prompt": PROMPT, "tokens": NEW},
    )


def random_ids() -> Tensor:
    """(1, PROMPT + NEW), the same in every process."""
    return torch.randint(Phi2Config().vocab_size, (1, PROMPT + NEW), generator=torch.Generator().manual_seed(0))


def _full_size() -> Phi2ForCausalLM:
    return random_model(Phi2Config(), torch.device("cpu"), torch.bfloat16).eval()


@torch.no_grad()
def ours_quantized(timer: Timer, format: str) -> None:
    model, ids = _full_size(), random_ids()
    quantize_model(model, format)
    cache = KVCache(model.config, 1, PROMPT + NEW, torch.bfloat16)
    model.model(ids[:, :PROMPT], cached=PackedPass(cache, {0: PROMPT}))
    while True:
        cache.truncate(0, PROMPT)
        timer.start()
        logits = [model(ids[:, i : i + 1], cached=PackedPass(cache, {0: 1}))[0, 0] for i in range(PROMPT, PROMPT + NEW)]
        timer.stop()
        timer.report(logits=torch.stack(logits).float().numpy())


@torch.no_grad()
def transformers_bfloat16(timer: Timer, format: str) -> None:
    import transformers

    model, past, ids = twin(_full_size()), transformers.DynamicCache(), random_ids()
    model(ids[:, :PROMPT], past_key_values=past)
    while True:
        timer.start()
        logits = [model(ids[:, i : i + 1], past_key_values=past).logits[0, 0] for i in range(PROMPT, PROMPT + NEW)]
        timer.stop()
        past.crop(-NEW)
        timer.report(logits=torch.stack(logits).float().numpy())
