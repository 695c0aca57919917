"""The decode step of a GPU: launched once kernel by kernel, then recorded as a CUDA graph and replayed.

A step is some two hundred kernels, six a block, of a few microseconds each, and launching them one by one takes longer
than running them. A replay launches them all at once, with the very arguments of the recording: what changes from step
to step lies in device memory (`rows.py`), which the step itself reads and moves on. So the next replay can be launched
before anybody has seen what this one has chosen.

Dims: B rows, C hidden, H heads, H_kv key-value heads, D head dim, R rotary dims, S tokens there is room for,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock
from typing import TypeVar

import torch
from torch import Tensor

from phi2.arriving import Arriving
from phi2.cache import KVCache, StepPass
from phi2.inference.rows import Rows
from phi2.inference.sampling import Stages, told
from phi2.linear import PhiLinear
from phi2.model import Block, Phi2ForCausalLM
from phi2_kernels.gemv import MAX_ROWS, gemv_each, gemv_sum
from phi2_kernels.rotary import rotary_angles
from phi2_kernels.weight_forms import Weight

Result = TypeVar("Result")
_ONE_AT_A_TIME = Lock()


class RecordedStep:
    """One more token of each of the first slots, again and again, whoever is in them.

    Args:
        cache: holds the tokens before; what its host counts is left to the caller.
        rows: what the step reads and moves on.
        count: B, the rows that are computed.
        stages: of the choices of all active rows.

    Attributes:
        logits: (B, V) float32, of the last step; the next one overwrites them.
    """

    logits: Tensor
    _told: Tensor

    def __init__(self, model: Phi2ForCausalLM, cache: KVCache, rows: Rows, count: int, stages: Stages) -> None:
        self._cached, self._rows = StepPass(cache, count, at=rows.at[:, :count]), rows
        self._count, self._stages, self._device = count, stages, cache.keys.device
        every = torch.arange(cache.max_length + 1, device=self._device)[None]
        self._tables = rotary_angles(
            every, model.config.rotary_dim, model.config.rope_theta
        )  # (1, S + 1, 1, R/2) twice
        self._launched = False
        self._replay: Callable[[], None] | None = None

    def __call__(self, model: Phi2ForCausalLM) -> Arriving:
        """Starts the step; its numbers, (B, 3) as `told` has them, are on their way.

        Args:
            model: the same in every call.
        """
        if not self._launched:
            self._told, self.logits = self._launch(model)  # compiles and makes workspaces, which a recording may not
            self._launched = True
        else:
            if self._replay is None:
                self._replay, (self._told, self.logits) = record(lambda: self._launch(model), self._device)
            self._replay()
        return Arriving(self._told)

    def _launch(self, model: Phi2ForCausalLM) -> tuple[Tensor, Tensor]:
        positions = self._cached.positions  # (B, 1)
        cos, sin = (table[0, positions] for table in self._tables)  # (B, 1, 1, R/2) twice
        x = model.model.embed_tokens(self._rows.ids[: self._count, None])  # (B, 1, C)
        for block in model.model.blocks:
            x = block_step(block, x, (cos, sin), self._cached)
        logits = model.lm_head(model.model.final_layernorm(x)[:, -1]).float()
        chosen = self._rows.choose(logits, slice(self._count), self._stages, positions[:, 0] + 1)
        self._rows.advance(self._count, chosen)
        return told(logits, chosen), logits


def block_step(block: Block, x: Tensor, angles: tuple[Tensor, Tensor], cached: StepPass) -> Tensor:
    """What `Block.forward` computes for one token a row, (B, 1, C) to (B, 1, C), in as few kernels as there can be.

    The six products are two, which take the GELU and both additions with them. A block with adapters, with LayerNorms
    of its queries and keys, or for more rows than these products take runs as it is written.
    """
    own, into, out = block.self_attn, _weights(block.inputs), _weights(block.outputs)
    if into is None or out is None or own.config.qk_layernorm or len(x) > MAX_ROWS:
        return block(x, angles, None, cached)
    *qkv, f = gemv_each(block.input_layernorm(x), into, gelu_last=True)
    q, k, v = (z.unflatten(-1, (-1, own.config.head_dim)) for z in qkv)  # (B, 1, H, D), (B, 1, H_kv, D) twice
    attended = cached.rotate_and_attend(own.layer, q, k, v, angles).flatten(2)  # (B, 1, H D)
    return gemv_sum([attended, f], out, x)


def _weights(linears: Sequence[PhiLinear]) -> list[Weight] | None:
    """None where one of them is more than a product with its weight."""
    forms = [form for linear in linears if (form := linear.form) is not None]
    return forms if len(forms) == len(linears) else None


def can_record(device: torch.device) -> bool:
    return device.type == "cuda"


def record(launch: Callable[[], Result], device: torch.device) -> tuple[Callable[[], None], Result]:
    """Records what `launch` puts on a GPU without running it: a function that runs it, and its result's memory.

    The GPU need not be torch's current one, and other threads may go on computing: but a recording begins by waiting
    for the GPU, which CUDA forbids while another one is made. So they take turns.
    """
    graph = torch.cuda.CUDAGraph()
    with _ONE_AT_A_TIME, torch.cuda.device(device):
        with torch.cuda.graph(graph, stream=_recording_stream(device), capture_error_mode="thread_local"):
            result = launch()
    return graph.replay, result


@cache  # cuBLAS keeps a workspace for each stream that it has seen
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
