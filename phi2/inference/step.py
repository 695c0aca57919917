"""The decode step of a GPU: launched once kernel by kernel, then recorded as a CUDA graph and replayed.

A step is some two hundred kernels, six a block, of a few microseconds each, and launching them one by one takes longer
than running them. A replay launches them all at once, with the very arguments of the recording: what changes from step
to step lies in device memory, which the step itself reads.

Dims: B rows, C hidden, H heads, H_kv key-value heads, D head dim, R rotary dims, S tokens there is room for,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phi2.cache import KVCache, StepPass
from phi2.linear import PhiLinear
from phi2.model import Block, Phi2ForCausalLM
from phi2_kernels.gemv import gemv_each, gemv_sum
from phi2_kernels.rotary import rotary_angles
from phi2_kernels.weight_forms import Weight


class RecordedStep:
    """Logits of one more token of each of the first slots, again and again, whoever is in them.

    Args:
        cache: holds the tokens before; it counts along.
        rows: B, the slots that are computed.
    """

    def __init__(self, model: Phi2ForCausalLM, cache: KVCache, rows: int) -> None:
        self.cached, device = StepPass(cache, rows), cache.keys.device
        self._input_ids = torch.zeros((rows, 1), dtype=torch.int64, device=device)
        every = torch.arange(cache.max_length + 1, device=device)[None]
        self._tables = rotary_angles(
            every, model.config.rotary_dim, model.config.rope_theta
        )  # (1, S + 1, 1, R/2) twice
        self._logits: Tensor | None = None
        self._replay: Callable[[], None] | None = None

    def __call__(self, model: Phi2ForCausalLM, input_ids: Tensor, active: Sequence[int]) -> Tensor:
        """(B, V) float32 logits after the tokens; the next call may overwrite them.

        Args:
            model: the same in every call.
            input_ids: (B, 1), or fewer rows where the last ones are not active.
            active: the rows whose tokens count; what the others hold is left alone.
        Raises:
            ValueError: when a slot is full.
        """
        self.cached.start(active)
        self._input_ids[: len(input_ids)].copy_(input_ids)
        if self._logits is None:
            self._logits = self._launch(model)  # compiles kernels and makes workspaces, which a recording may not
        else:
            if self._replay is None:
                self._replay, self._logits = record(lambda: self._launch(model), self._input_ids.device)
            self._replay()
        self.cached.finish()
        return self._logits

    def _launch(self, model: Phi2ForCausalLM) -> Tensor:
        positions = self.cached.positions  # (B, 1)
        cos, sin = (table[0, positions] for table in self._tables)  # (B, 1, 1, R/2) twice
        x = model.model.embed_tokens(self._input_ids)  # (B, 1, C)
        for block in model.model.blocks:
            x = block_step(block, x, (cos, sin), self.cached)
        return model.lm_head(model.model.final_layernorm(x)[:, -1]).float()


def block_step(block: Block, x: Tensor, angles: tuple[Tensor, Tensor], cached: StepPass) -> Tensor:
    """What `Block.forward` computes for one token a row, (B, 1, C) to (B, 1, C), in as few kernels as there can be.

    The six products are two, which take the GELU and both additions with them. A block with adapters, or with
    LayerNorms of its queries and keys, runs as it is written.
    """
    own, into, out = block.self_attn, _weights(block.inputs), _weights(block.outputs)
    if into is None or out is None or own.config.qk_layernorm:
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


def record(launch: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Records what `launch` puts on a GPU without running it: a function that runs it, and its result's memory.

    The GPU need not be torch's current one, and other threads may go on allocating.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
            result = launch()
    return graph.replay, result
