"""Products of a few rows with weights, as a decode step has them.

    gemv         y = x W^T + bias
    gemv_each    the same for several weights that read one x; the last y may go through GELU
    gemv_sum     y = skip + sum_i (x_i W_i^T + bias_i)

The weights are in any form of `weight_forms.py`, and the time taken is that of reading them. A block of Phi is a
`gemv_each` of q, k, v and fc1, and a `gemv_sum` of dense and fc2 with the residual stream. There are no gradients.

Dims: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import unsupported_layout, use_triton
from phi2_kernels.quantized_matmul import quantized_matmul
from phi2_kernels.weight_forms import Weight, check_product, unsupported_weight

MAX_ROWS = 8  # more are a matmul


def gemv_ref(x: Tensor, weight: Weight) -> Tensor:
    """x W^T + bias in float32. Shapes and result as in `gemv`."""
    y = x.float() @ weight.dense().float().T
    return (y if weight.bias is None else y + weight.bias.float()).to(x.dtype)


def gemv(x: Tensor, weight: Weight, *, impl: str = "auto") -> Tensor:
    """x W^T + bias for a few rows, accumulated in float32.

    Args:
        x: (..., K); the kernels take at most `MAX_ROWS` rows.
        weight: (N, K) in any form.
        impl: see `use_triton`.
    Returns:
        (..., N) in the dtype of x.
    Raises:
        ValueError: when shapes do not agree, or when Triton was named and cannot run.
    """
    return gemv_each(x, [weight], impl=impl)[0]


def gemv_each(x: Tensor, weights: list[Weight], *, gelu_last: bool = False, impl: str = "auto") -> list[Tensor]:
    """`gemv` with each of several weights of one form in one launch; `gelu_last`: the last goes through GELU (tanh)."""
    for weight in weights:
        check_product(x, weight)
    if use_triton(impl, x, lambda: _unsupported_reason([x] * len(weights), weights)):
        ys = _gemv_each(x.reshape(-1, x.shape[-1]), *_parts(weights), gelu_last)
        return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
    *ys, last = (_product(x, weight, impl) for weight in weights)
    return [*ys, F.gelu(last, approximate="tanh") if gelu_last else last]


def gemv_sum(xs: list[Tensor], weights: list[Weight], skip: Tensor, *, impl: str = "auto") -> Tensor:
    """skip (..., N) plus each x (..., K) times its own weight, of one form, in one launch and rounded once."""
    for x, weight in zip(xs, weights, strict=True):
        check_product(x, weight)
        if skip.shape != (*x.shape[:-1], weight.shape[0]):
            raise ValueError(f"skip must be of shape {(*x.shape[:-1], weight.shape[0])}, got {tuple(skip.shape)}")
    if use_triton(impl, skip, lambda: _unsupported_reason(xs, weights) or unsupported_layout(xs[0], skip=skip)):
        rows = [x.reshape(-1, x.shape[-1]) for x in xs]
        return _gemv_sum(rows, *_parts(weights), skip.reshape(-1, skip.shape[-1])).view(skip.shape)
    return sum((_product(x, weight, impl) for x, weight in zip(xs, weights, strict=True)), skip)


def _product(x: Tensor, weight: Weight, impl: str) -> Tensor:
    """`gemv` where its kernels do not run: in torch, or with more rows than are theirs."""
    if weight.scales is not None:
        return quantized_matmul(x, weight, impl=impl)
    return F.linear(x, weight.codes.to(x.dtype), weight.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`; by the kernel of `gemv` where rows are few and nobody asks for a gradient, as in a decode step."""
    is_step = not torch.is_grad_enabled() and x.numel() <= MAX_ROWS * x.shape[-1]
    if not is_step or torch.is_autocast_enabled(x.device.type) or not use_triton("auto", x):
        return F.linear(x, weight, bias)
    return gemv(x, Weight(weight, bias=bias))


def _parts(weights: list[Weight]) -> list[list[Tensor]]:
    """codes, scales, zeros, biases; a list is empty where the weights have none of it."""
    return [[part for part in parts if part is not None] for parts in zip(*weights, strict=True)]


@custom_op("phi2::gemv_each", mutates_args=())
def _gemv_each(
    x: Tensor, codes: list[Tensor], scales: list[Tensor], zeros: list[Tensor], biases: list[Tensor], gelu_last: bool
) -> list[Tensor]:
    """x (M, K) -> (M, N) of each weight."""
    from phi2_kernels import gemv_triton

    ys = [_new(x, len(code)) for code in codes]
    gemv_triton.each(x, codes, scales, zeros, biases, gelu_last, ys)
    return ys


@_gemv_each.register_fake
def _(x, codes, scales, zeros, biases, gelu_last):
    return [_new(x, len(code)) for code in codes]


@custom_op("phi2::gemv_sum", mutates_args=())
def _gemv_sum(
    xs: list[Tensor], codes: list[Tensor], scales: list[Tensor], zeros: list[Tensor], biases: list[Tensor], skip: Tensor
) -> Tensor:
    """Each x (M, K), skip (M, N) -> (M, N)."""
    from phi2_kernels import gemv_triton

    y = _new(skip, skip.shape[1])
    gemv_triton.summed(skip, xs, codes, scales, zeros, biases, y)
    return y


@_gemv_sum.register_fake
def _(xs, codes, scales, zeros, biases, skip):
    return _new(skip, skip.shape[1])


def _new(x: Tensor, columns: int) -> Tensor:
    return torch.empty((x.shape[0], columns), dtype=x.dtype, device=x.device)


def _unsupported_reason(xs: list[Tensor], weights: list[Weight]) -> str:
    """What keeps the kernels from this call."""
    rows = xs[0].shape[:-1].numel()
    if rows > MAX_ROWS:
        return f"x must have at most {MAX_ROWS} rows, got {rows}"
    forms = {(w.codes.dtype, w.group, w.bias is None) for w in weights}
    if len(forms) > 1 or len({(x.dtype, x.shape[:-1]) for x in xs}) > 1:
        return "all weights of a call must have one form, all or none a bias, and all x one dtype and number of rows"
    reasons = (unsupported_weight(xs[0], x, weight) for x, weight in zip(xs, weights, strict=True))
    return next(filter(None, reasons), "")
