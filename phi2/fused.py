"""Fused blocks: the same parameters, laid side by side in memory so that a block takes two matmuls.

`fuse(model)` moves the weights of q, k, v and fc1 of each layer into one buffer, and those of dense and fc2,
transposed, into another; every parameter stays itself, under its own name, as a view. The block then runs
`phi2_kernels.block`.

Nothing remembers the buffers: a block looks whether its weights are neighbours, and moves them together when they are
not (after `.to(...)`, a deep copy, or a merge), so no second copy can go stale.

Blocks run unfused where the fused form does not exist: over a key-value cache, while attention has dropout, and where
a part of the block must be called (`called.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from phi2.called import must_be_called, other_forward
from phi2.config import Phi2Config
from phi2.linear import PhiLinear
from phi2.lora import LoraLinear
from phi2.model import Block, Phi2ForCausalLM
from phi2_kernels.block import Shape, Weights, block
from phi2_kernels.block_adapters import Adapter
from phi2_kernels.block_weights import are_adjacent
from phi2_kernels.visibility import Visibility


def fuse(model: Phi2ForCausalLM, on: bool | Literal["auto"] = True) -> None:
    """Makes the blocks of a model run fused, or unfused again; outputs and gradients are the same.

    Args:
        on: auto fuses what can be on a GPU, where it takes less memory and fewer launches.
    Raises:
        ValueError: for a model that cannot be fused and is asked to be.
    """
    obstacle = _obstacle(model)
    if on is True and obstacle:
        raise ValueError(obstacle)
    is_fused = not obstacle and model.device.type == "cuda" if on == "auto" else on
    for layer in model.model.blocks:
        if is_fused:
            _join_block(layer)
        elif layer.fused_forward is not None:
            _part_block(layer)
        layer.fused_forward = fused_forward if is_fused else None


def _obstacle(model: Phi2ForCausalLM) -> str:
    """Why a model cannot be fused: norms of queries and keys stand between the halves of what is, weights are codes, or
    a module computes what is not known here."""
    if model.config.qk_layernorm:
        return "fused blocks cannot have qk_layernorm; load this model with fuse off"
    linears = (linear for layer in model.model.blocks for linear in (*layer.inputs, *layer.outputs))
    other = next((linear.weight.dtype for linear in linears if not linear.weight.is_floating_point()), None)
    if other is not None:
        return f"fused blocks multiply with float weights, and this model's are {other}"
    own = other_forward(part for layer in model.model.blocks for part in (layer, *_parts_of(layer)))
    return f"fused blocks do without the forward of {own}, which is none of phi2's" if own else ""


def fused_forward(layer: Block, x: Tensor, angles: tuple[Tensor, Tensor], visibility: Visibility) -> Tensor:
    """What `Block.forward` computes, (B, T, C) to (B, T, C)."""
    if must_be_called(_parts_of(layer)):
        return layer.as_written(x, angles, visibility, None)
    device, shape, weights = x.device.type, _shape_of(layer.self_attn.config), _weights_of(layer)
    if not torch.compiler.is_compiling():  # addresses cannot be traced
        is_joined = _are_joined(weights)
        if not is_joined:
            _join_block(layer)
            is_joined = _are_joined(weights)  # but for weights that are computed anew each time they are asked for
        weights = weights._replace(adjacent=is_joined)
    if not torch.is_autocast_enabled(device):
        return block(x, weights, shape, angles, visibility)
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):  # every matmul has been given its dtype
        return block(x, weights, shape, angles, visibility, dtype)


def _shape_of(config: Phi2Config) -> Shape:
    return Shape(config.num_attention_heads, config.kv_heads, config.head_dim)


def _parts_of(layer: Block) -> tuple[nn.Module, ...]:
    """The modules that a block calls when it runs as it is written."""
    modules: dict[str, Any] = layer._modules
    attention, mlp = modules["self_attn"], modules["mlp"]
    own, others = attention._modules, mlp._modules
    linears = own["q_proj"], own["k_proj"], own["v_proj"], own["dense"], others["fc1"], others["fc2"]
    return modules["input_layernorm"], modules["resid_dropout"], attention, mlp, *linears


def _weights_of(layer: Block) -> Weights:
    modules: dict[str, Any] = layer._modules  # of which `layer.self_attn` and its like are a slow way
    norm, attention, mlp = modules["input_layernorm"], modules["self_attn"]._modules, modules["mlp"]._modules
    q, k, v, fc1 = into = attention["q_proj"], attention["k_proj"], attention["v_proj"], mlp["fc1"]
    dense, fc2 = out = attention["dense"], mlp["fc2"]
    return Weights(
        _weight(norm),
        _bias(norm),
        norm.eps,
        (_weight(q), _weight(k), _weight(v), _weight(fc1)),
        (_bias(q), _bias(k), _bias(v), _bias(fc1)),
        (_weight(dense), _weight(fc2)),
        (_bias(dense), _bias(fc2)),
        _adapters(into, [q.out_features, k.out_features, v.out_features, fc1.out_features]),
        _adapters(out, [dense.in_features, fc2.in_features]),
        _rate(modules["resid_dropout"]),
    )


def _weight(module: nn.Module) -> Any:
    """`module.weight` in a tenth of the time, where it is a parameter: torch looks everywhere else first."""
    weight = module._parameters.get("weight")
    return module.weight if weight is None else weight


def _bias(module: nn.Module) -> Any:
    bias = module._parameters.get("bias")
    return module.bias if bias is None else bias


def _adapters(linears: Sequence[PhiLinear], widths: list[int]) -> tuple[Adapter, ...]:
    """The adapters that are on, each with its columns: `widths` says how many every linear has."""
    adapters, start = [], 0
    for linear, width in zip(linears, widths, strict=True):
        lora = linear.adapter if isinstance(linear, LoraLinear) else None
        if lora is not None:
            A, B, dropout = _weight(lora.lora_A), _weight(lora.lora_B), _rate(lora.lora_dropout)
            adapters.append(Adapter(start, start + width, A, B, lora.scaling, dropout))
        start += width
    return tuple(adapters)


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _are_joined(weights: Weights) -> bool:
    parts = weights.w_in, weights.b_in, [weight.T for weight in weights.w_out]
    return all(map(are_adjacent, parts))


def _join_block(layer: Block) -> None:
    """Moves a block's weights together unless they are."""
    _join([linear.weight for linear in layer.inputs])
    _join([linear.bias for linear in layer.inputs])
    _join([linear.weight for linear in layer.outputs], transposed=True)


@torch.no_grad()
def _part_block(layer: Block) -> None:
    """Gives a block's weights memory of their own again, laid out as a checkpoint's."""
    for linear in (*layer.inputs, *layer.outputs):
        for parameter in (linear.weight, linear.bias):
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


@torch.inference_mode(False)  # what is made within would be of no use to training
@torch.no_grad()
def _join(parameters: list[Tensor], transposed: bool = False) -> None:
    """Lays parameters one behind the other; `transposed`: the rows of their transposes."""
    parts = [p.data.T if transposed else p.data for p in parameters]
    if are_adjacent(parts):
        return
    pieces = torch.cat(parts).split([len(part) for part in parts])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.data = piece.T if transposed else piece
