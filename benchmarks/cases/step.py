"""One token of the whole of Phi-2 behind a long context: our recorded step, with weights of three widths.

Ours chooses its next token too, and sends it to the host; what the loop around it costs is in `loop.py`. Caches begin
with random numbers, which cost what real ones cost; every call adds a token to the cache of its own.

Dims: V vocabulary, C hidden, F mlp.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.cases.block import implementation
from benchmarks.harness import comparison
from benchmarks.harness.comparison import ROUNDING, Comparison, Implementation, Outputs, Work
from benchmarks.harness.gpu import gpu_case
from benchmarks.harness.models import PHI2, TINY, random_model, twin
from phi2.cache import KVCache, PackedPass
from phi2.config import Phi2Config
from phi2.inference import step
from phi2.inference.config import SamplingParams
from phi2.inference.rows import Rows
from phi2.inference.sampling import Stages
from phi2.inference.step import RecordedStep
from phi2.model import Phi2ForCausalLM
from phi2.quantize import GROUP, quantize_model
from phi2_kernels.weight_forms import quantize_int4, quantize_int8

BITS = {None: (16, 16), "int8": (8, 8), "int4": (4 + 2 * 16 / GROUP, 8)}  # of a weight in the blocks, and in the head
BEFORE = (1, 2)  # tokens before the one that is compared: our step is launched at the first, recorded at the second
ROOM = 1024  # tokens that calls may add
GREEDY = Stages.of(SamplingParams())


@gpu_case(
    "decode_step",
    turns=100,
    summary="one token of the whole of Phi-2 behind 1024 others",
    tiny=dict(config=TINY, context=5),
)
def decode_step(device: torch.device, config: Phi2Config = PHI2, context: int = 1024) -> list[Comparison]:
    return [compare_step(device, torch.bfloat16, config, context, format) for format in BITS]


def compare_step(
    device: torch.device, dtype: torch.dtype, config: Phi2Config, context: int, format: str | None
) -> Comparison:
    """Weights as they are, or in a format of `phi2.quantize`; everybody else's are then whole, and as rounded as ours.

    Args:
        context: tokens in the cache before those of `BEFORE`.
    """
    cache = partial(random_cache, device, dtype, config, context)

    def model(format: str | None = None) -> Phi2ForCausalLM:
        return rounded(random_model(config, device, dtype), format)

    def reference(ids: Tensor) -> Outputs:
        with implementation("torch"):
            return whole_passes(model(format).float(), cache(torch.float32)).run(ids)

    whole = model(format)
    peers = {
        "ours, kernel by kernel": lambda: whole_passes(whole, cache()),
        "ours, blocks as written": lambda: recorded_as_written(model() if format else whole, cache(), format),
    }
    if format is None:
        peers["transformers"] = lambda: transformers_step(whole, cache())
    return Comparison(
        name=f"step {format or str(dtype).removeprefix('torch.')}",
        inputs=lambda seed: (torch.full((1, 1), seed % config.vocab_size, device=device),),
        reference=reference,
        ours=recorded(model() if format else whole, cache(), format),
        plain=whole_passes(whole, cache()),
        peers=peers,
        work=step_work(config, context, *BITS[format]),
        rounding=2 * ROUNDING[dtype],  # of some two hundred matmuls, one behind the other
    )


def step_work(config: Phi2Config, context: int, bits: float, head_bits: float, rows: int = 1) -> Work:
    """Bytes: every weight of a matmul once, and the keys and values of each row's context in half precision."""
    C, F, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    blocks, head, cached = layers * (4 * C * C + 2 * C * F), config.vocab_size * C, 2 * layers * rows * context * C
    return Work(2 * (rows * (blocks + head) + cached), round((blocks * bits + head * head_bits) / 8) + 2 * cached)


def rounded(model: Phi2ForCausalLM, format: str | None) -> Phi2ForCausalLM:
    """With its linears as a format rounds them."""
    linears = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)} if format else {}
    for name, weight in linears.items():
        is_int8 = format == "int8" or name == "lm_head"
        form = quantize_int8(weight.data) if is_int8 else quantize_int4(weight.data, GROUP)
        weight.data = form.dense().to(weight.dtype)
    return model


def random_cache(
    device: torch.device, dtype: torch.dtype, config: Phi2Config, context: int, other: torch.dtype | None = None
) -> KVCache:
    """Random keys and values, the same ones in every call; held in the `other` dtype if there is one."""
    normal, cache = comparison.random(1, device), KVCache(config, 1, context + ROOM, other or dtype, device)
    for buffer in (cache.keys, cache.values):
        buffer[:, :, :, :context] = normal(*buffer[:, :, :, :context].shape, dtype=dtype)
    cache.lengths[0] = context
    return cache


def going_on(step: Callable[[Tensor], Tensor], device: torch.device) -> Implementation:
    """What goes on with each call from where the last one ended.

    Args:
        step: token ids (1, 1) -> logits (1, V).
    """
    step = torch.no_grad()(step)
    for token in BEFORE:
        step(torch.full((1, 1), token, device=device))
    return Implementation(lambda ids: {"output": step(ids).clone()})


def recorded(model: Phi2ForCausalLM, cache: KVCache, format: str | None) -> Implementation:
    if format:
        quantize_model(model, format)
    rows = Rows(1, cache.max_length, model.config.vocab_size, model.device)
    rows.activate({0: cache.lengths[0]}, {0: 0})
    one = RecordedStep(model, cache, rows, 1, GREEDY)

    def read(ids: Tensor) -> Tensor:
        rows.ids.copy_(ids[0])  # in the place of what the step before has chosen
        one(model)
        return one.logits

    with recordable(model.device):
        return going_on(read, model.device)


def recordable(device: torch.device) -> AbstractContextManager:
    """Within, a step is recorded at its second launch, on a CPU too: there it is launched again and again."""
    on_gpu = step.can_record(device)
    return nullcontext() if on_gpu else mock.patch.object(step, "record", launched_again)


def launched_again(launch: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[Callable[[], None], Any]:
    """In the place of a recording: the same calls, into the same memory. The first replay has been launched already."""
    results, is_due = launch(), [False]

    def replay() -> None:
        if is_due[0]:
            for memory, new in zip(results, launch(), strict=True):
                memory.copy_(new)
        is_due[0] = True

    return replay, results


def recorded_as_written(model: Phi2ForCausalLM, cache: KVCache, format: str | None) -> Implementation:
    """Ours without `block_step`: a recording of six products a block, and of all that lies between them."""
    with mock.patch.object(step, "block_step", lambda block, x, angles, cached: block(x, angles, None, cached)):
        return recorded(model, cache, format)


def whole_passes(model: Phi2ForCausalLM, cache: KVCache) -> Implementation:
    """One whole forward pass after another, as it is written in `phi2/model.py`."""
    return going_on(lambda ids: model(ids, cached=PackedPass(cache, {0: 1}))[:, -1].float(), model.device)


def transformers_step(model: Phi2ForCausalLM, cache: KVCache) -> Implementation:
    """The model of transformers, and its growing cache with the numbers of ours."""
    from transformers import DynamicCache

    theirs, past = twin(model), DynamicCache()
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
        past.update(*(x[:, :, : cache.lengths[0]].clone() for x in (keys, values)), layer)
    return going_on(lambda ids: theirs(ids, past_key_values=past, use_cache=True).logits[:, -1].float(), model.device)
