"""Weight-only quantisation: a model for generating, with 8 or 4 bits a weight.

A decode step reads every weight for every token and computes little with it: fewer bytes are more tokens per second.

    int8    each row of a weight has a scale
    int4    32 neighbours of a row share a scale and a zero point; the head, whose errors nothing averages, stays int8

Embeddings, LayerNorms, biases and activations keep their dtype. The forms of a weight are `phi2_kernels.weight_forms`,
the products on a GPU `phi2_kernels.gemv` and, of more rows, `phi2_kernels.quantized_matmul`. On a CPU torch's packed
kernels multiply, which take bfloat16 only; with another dtype a CPU makes the whole weight again in every pass.

Dims: N outputs, K inputs, G neighbours that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from phi2.linear import PhiLinear
from phi2_kernels.gemv import MAX_ROWS, gemv
from phi2_kernels.quantized_matmul import quantized_matmul, quantized_matmul_backward
from phi2_kernels.weight_forms import Weight, quantize_int4, quantize_int8, unpack_int4

GROUP = 32


class FrozenProduct(torch.autograd.Function):
    """y = x W^T + bias with a weight that does not train: only x has a gradient, dy W."""

    @staticmethod
    def forward(ctx, x: Tensor, linear: QuantizedLinear | Int4LinearOnCPU) -> Tensor:
        ctx.linear = linear
        return linear.product(x).clone()  # itself it may be a view, which LoRA could not add to in place

    @staticmethod
    def backward(ctx, dy: Tensor):
        return ctx.linear.backward_product(dy), None


class QuantizedLinear(PhiLinear):
    """A linear whose weight is int8 or int4."""

    scales: Tensor
    zeros: Tensor | None

    def __init__(self, weight: Weight, bias: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.bias = bias

    @property
    def form(self) -> Weight | None:
        return self._weight

    @property
    def _weight(self) -> Weight:
        return Weight(self.weight, self.scales, self.zeros, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self.product(x)

    def product(self, x: Tensor) -> Tensor:
        is_step = x.numel() <= MAX_ROWS * self.in_features
        return gemv(x, self._weight) if is_step else quantized_matmul(x, self._weight)

    def backward_product(self, dy: Tensor) -> Tensor:
        """dy W."""
        return quantized_matmul_backward(dy, self._weight)

    def dense(self) -> Tensor:
        """W (N, K) float32."""
        return self._weight.dense()


class Int4LinearOnCPU(PhiLinear):
    """An int4 linear with its codes in the order in which torch's kernel, and no other, reads them; bfloat16."""

    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.out_features, linear.in_features
        packed, scales, zeros, _ = quantize_int4(linear.weight.detach(), GROUP)
        assert scales is not None and zeros is not None
        codes = unpack_int4(packed, GROUP).flatten(1).int()  # (N, K)
        offsets = (8 - zeros.float()) * scales.float()  # torch counts from the middle of the codes
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        both = torch.stack((scales, offsets.to(scales.dtype)), dim=-1)  # (N, K/G, 2)
        self.register_buffer("scales", both.transpose(0, 1).contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, self) if x.requires_grad and torch.is_grad_enabled() else self.product(x)

    def product(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.flatten(0, -2), self.weight, GROUP, self.scales)
        return (y + self.bias).view(*x.shape[:-1], -1)

    def backward_product(self, dy: Tensor) -> Tensor:
        """dy W, for which W is made again."""
        return dy @ self.dense()

    def dense(self) -> Tensor:
        """W (N, K) bfloat16: what the kernel makes of the rows of an identity."""
        rows = torch.eye(self.in_features, dtype=self.scales.dtype)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, GROUP, self.scales).T


def _int8(linear: nn.Linear) -> nn.Module:
    return QuantizedLinear(quantize_int8(linear.weight.detach()), linear.bias)


def _int4(linear: nn.Linear) -> nn.Module:
    weight = linear.weight
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and len(weight) % 16 == 0:
        return Int4LinearOnCPU(linear)
    return QuantizedLinear(quantize_int4(weight.detach(), GROUP), linear.bias)


# name -> how a linear of the blocks, and how the head is kept
FORMATS: dict[str, tuple[Callable[[nn.Linear], nn.Module], Callable[[nn.Linear], nn.Module]]] = {
    "int8": (_int8, _int8),
    "int4": (_int4, _int8),
}


def quantize_model(model: nn.Module, format: str, device: torch.device | None = None) -> None:
    """Replaces every linear of a model by a quantised one, in place; what is left can generate, and carry adapters.

    Args:
        model: a `Phi2ForCausalLM` without an adapter.
        format: "int8" or "int4".
        device: where it will run, and each weight is quantised: one at a time is there whole. Default: where it is.
    Raises:
        ValueError: for another format, a model that has an adapter or is quantised already, or weights whose rows do
            not divide into groups.
    """
    if format not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {format!r}")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if getattr(model, "adapters", None):
        raise ValueError("the model has an adapter: merge it before quantising")
    if not linears:
        raise ValueError("the model is quantised already")
    if format == "int4":
        _check_groups(linears)
    in_block, head = FORMATS[format]
    for name in list(linears):
        # Nothing here refers to the linear: the memory of its weight is free before the next one is there.
        model.set_submodule(name, (head if name == "lm_head" else in_block)(linears.pop(name).to(device)))
    model.to(device)


def _check_groups(linears: dict[str, nn.Linear]) -> None:
    for name, linear in linears.items():
        if linear.in_features % GROUP:
            raise ValueError(
                f"int4 needs rows that divide into groups of {GROUP}, {name} has {linear.in_features} columns"
            )
