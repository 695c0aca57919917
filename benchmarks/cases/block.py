"""One layer of Phi-2 with its gradients: two matmuls of ours against the layer of transformers, compiled and not.

Dims: B batch, T tokens, C hidden, F mlp, r LoRA rank.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.cases.attention import attention_work, scores_of
from benchmarks.harness import comparison
from benchmarks.harness.comparison import ROUNDING, Comparison, Implementation, Outputs, Work
from benchmarks.harness.gpu import gpu_case
from benchmarks.harness.models import PHI2, TINY, random_model
from phi2.config import Phi2Config
from phi2.fused import fused_forward
from phi2.lora_config import LoraConfig
from phi2.model import Block
from phi2_kernels import _dispatch
from phi2_kernels.rotary import rotary_angles
from phi2_kernels.visibility import Visibility

TRANSFORMERS = ("transformers", "transformers, torch.compile")
PEFT = ".default.weight"  # ends peft's names of an adapter's weights, where ours end in ".weight"
NEARLY_ZERO = ("q_proj.bias", "k_proj.bias", "v_proj.bias")


@gpu_case(
    "block",
    turns=30,
    summary="one layer of Phi-2 over 4 x 2048 tokens with its gradients, LoRA and in full",
    tiny=dict(dtype=torch.float32, config=TINY, B=2, T=9),
)
def block(
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    config: Phi2Config = PHI2,
    B: int = 4,
    T: int = 2048,
) -> list[Comparison]:
    """At least 1.25 x the layer of transformers, and 1.1 x the same compiled."""
    positions = torch.arange(T, device=device)[None]
    return [compare_block(dtype, config, rank, B, positions) for rank in (16, 0)]


def compare_block(
    dtype: torch.dtype, config: Phi2Config, rank: int, B: int, positions: Tensor, until: Tensor | None = None
) -> Comparison:
    """B rows through a layer: frozen with LoRA on all six linears or, with rank 0, trainable throughout.

    Args:
        positions: (1, T) of each row.
        until: see `phi2_kernels.visibility`; the peers take the causal mask alone.
    """
    device, T, C = positions.device, positions.shape[1], config.hidden_size
    layer = partial(new_layer, device, dtype, config, rank)

    def peer(compile_: bool, autocast: bool = False) -> Implementation:
        theirs = _transformers_layer(layer(), config, rank)
        forward = comparison.compiled(theirs, device) if compile_ else theirs
        forward = torch.autocast(device.type, dtype, enabled=autocast and dtype != torch.float32)(forward)
        angles = rotary_angles(positions, config.rotary_dim, config.rope_theta)
        cos, sin = (torch.cat((table, table), dim=-1).squeeze(2).to(dtype) for table in angles)  # (1, T, R)
        return of_layer(lambda x: forward(x, position_embeddings=(cos, sin)), theirs)

    # As trl trains adapters: its float32 ones are multiplied in half precision.
    as_trl = {f"{name}, autocast": partial(peer, "compile" in name, True) for name in TRANSFORMERS}
    return Comparison(
        name=f"block {f'LoRA r{rank}' if rank else 'in full'}",
        inputs=comparison.drawn(device, dtype, lambda normal: (normal(B, T, C, grad=True), normal(B, T, C))),
        reference=partial(block_reference, layer(), config, positions, until),
        ours=our_layer(layer(), config, positions, until, fused=True),
        plain=our_layer(layer(), config, positions, until, fused=False, impl="torch"),
        peers={
            **{name: partial(peer, "compile" in name) for name in TRANSFORMERS},
            **(as_trl if rank else {}),
            "ours unfused": lambda: our_layer(layer(), config, positions, until, fused=False),
        },
        work=block_work(config, B * T, B * scores_of(T, until), rank),
        rounding=ROUNDING[dtype],
        targets=dict(zip(TRANSFORMERS, (1.25, 1.1), strict=True)),
    )


def block_work(config: Phi2Config, tokens: int, scores: int, rank: int) -> Work:
    """Matmuls of tokens and weights forward and for the gradient of x, those of weights if trainable, and attention.

    Bytes: x, y and their gradients; the weights in both passes, and the gradients of those that are trained.
    """
    C, F = config.hidden_size, config.intermediate_size
    weights, sides = 4 * C * C + 2 * C * F, 4 * 2 * C + 2 * (C + F)  # sides: inputs plus outputs of the six linears
    attention = attention_work(config.num_attention_heads, scores, tokens, config.head_dim, backward=True).flops
    linear = (2 if rank else 3) * 2 * tokens * weights
    adapters = 3 * 2 * tokens * rank * sides
    trained = 4 * rank * sides if rank else 2 * weights
    return Work(linear + adapters + attention, 2 * (4 * tokens * C + 2 * weights) + trained)


def new_layer(device: torch.device, dtype: torch.dtype, config: Phi2Config, rank: int) -> Block:
    """A random layer without dropout; the same one for the same arguments."""
    return random_model(replace(config, vocab_size=1, num_hidden_layers=1), device, dtype, rank).model.layers[0]


def our_layer(
    layer: Block, config: Phi2Config, positions: Tensor, until: Tensor | None, fused: bool, impl: str = "triton"
) -> Implementation:
    """A layer of ours; positions and until as in `compare_block`."""
    T = positions.shape[1]
    angles = rotary_angles(positions, config.rotary_dim, config.rope_theta)
    visibility = Visibility(T, T, until, positions.device)

    def forward(x: Tensor) -> Tensor:
        with implementation(impl):
            return fused_forward(layer, x, angles, visibility) if fused else layer(x, angles, visibility, None)

    return of_layer(forward, layer)


def implementation(impl: str) -> AbstractContextManager:
    """Inside it every op that is not told otherwise runs by `impl`."""
    return mock.patch.object(_dispatch, "default_impl", impl)


def of_layer(forward: Callable[[Tensor], Tensor], layer: nn.Module) -> Implementation:
    """A layer with the gradients of its input and of everything it trains."""
    parameters = {name.replace(PEFT, ".weight"): p for name, p in layer.named_parameters() if p.requires_grad}

    def run(x: Tensor, dy: Tensor) -> Outputs:
        y = forward(x)
        dx, *grads = torch.autograd.grad(y, [x, *parameters.values()], dy)
        return {"output": y.detach(), "grad of x": dx, **dict(zip(parameters, grads, strict=True))}

    return Implementation(run, finish=_biases_joined)


def _biases_joined(outputs: Outputs) -> Outputs:
    """The gradients of the biases of q, k and v as one, of which that of k is nearly nothing: softmax undoes it."""
    named = {name: x for name, x in outputs.items() if name.endswith(NEARLY_ZERO)}
    joined = {"biases of q, k and v": torch.cat(list(named.values()))} if named else {}
    return {**{name: x for name, x in outputs.items() if name not in named}, **joined}


def block_reference(
    layer: Block, config: Phi2Config, positions: Tensor, until: Tensor | None, x: Tensor, dy: Tensor
) -> Outputs:
    """The layer as it is written in `phi2/model.py`, in float32, with none of our kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = our_layer(deepcopy(layer).float(), config, positions, until, fused=False, impl="torch")
    with sdpa_kernel(SDPBackend.MATH):
        return plain.finish(plain.run(*comparison.in_float32(x, dy)))


def _transformers_layer(layer: Block, config: Phi2Config, rank: int) -> nn.Module:
    """The layer of transformers with the weights, and the adapters, of ours."""
    from transformers import PhiConfig
    from transformers.models.phi.modeling_phi import PhiDecoderLayer

    weight, theirs = layer.input_layernorm.weight, PhiConfig(**config.to_dict())
    theirs._attn_implementation = "sdpa"
    theirs = PhiDecoderLayer(theirs, 0).eval().to(weight.device, weight.dtype)
    weights = layer.state_dict()
    adapter = {f"{name.removesuffix('.weight')}{PEFT}": weights.pop(name) for name in [*weights] if ".lora_" in name}
    theirs.load_state_dict(weights)
    if rank:
        import peft

        settings = LoraConfig(r=rank)
        names = dict(r=rank, lora_alpha=settings.lora_alpha, target_modules=list(settings.target_modules))
        peft.inject_adapter_in_model(peft.LoraConfig(**names), theirs)
        for name, weight in adapter.items():
            theirs.get_parameter(name).data = weight.clone()
    return theirs
