"""Rotary position embedding on the first R of D dims, half-split: dims d and d + R/2 are rotated together.

    angle(t, d) = position(t) * theta^(-2d/R)                 d < R/2
    y[d]        = x[d] * cos - x[d + R/2] * sin
    y[d + R/2]  = x[d + R/2] * cos + x[d] * sin

The inverse rotates by -angle, and is the backward pass too: a rotation's transpose.

Dims: B batch, T tokens, N = B*T rows, H heads, D head dim (80 in Phi-2), R rotary dims (32 in Phi-2), L rows of a table
of angles, S tokens a cache has room for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import use_triton


def rotary_angles(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, computed once for all layers.

    Args:
        positions: (B, T) whole numbers.
        rotary_dim: R, even.
        theta: base of the frequencies.
    Returns:
        cos, sin: (B, T, 1, R/2) float32.
    Source: arXiv:2104.09864 Eq. 34; half-split as in GPT-NeoX.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / rotary_dim
    angles = positions[..., None].float() * (1.0 / theta**exponent)  # (B, T, R/2)
    return angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, impl: str = "auto") -> Tensor:
    """Rotates the first R dims of every head by its position's angles, in float32, and passes the others through.

    Args:
        x: (B, T, H, D) queries or keys.
        cos, sin: (B or 1, T, 1, R/2) from `rotary_angles`; they get no gradient.
        impl: see `use_triton`.
    Returns:
        (B, T, H, D) in the dtype of x.
    Raises:
        ValueError: when Triton was named and cannot run.
    """
    if cos.shape[:2] not in ((1, x.shape[1]), x.shape[:2]):
        raise ValueError(f"angles must be of (1 or {x.shape[0]}, {x.shape[1]}) tokens, got {tuple(cos.shape[:2])}")
    if use_triton(impl, x, lambda: _unsupported_reason(x, cos, sin)):
        tables = (table.flatten(0, 2) for table in (cos, sin))
        return _rotary(x.flatten(0, 1), *tables, False).view(x.shape)
    return _Rotary.apply(x, cos, sin) if torch.is_grad_enabled() else _rotated(x, cos, sin)


class _Rotary(torch.autograd.Function):
    """The backward pass rotates the other way, and needs nothing of x."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat((*(part.to(x.dtype) for part in rotated), rest), dim=-1)


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False, impl: str = "auto") -> None:
    """Rotates the first R dims of every head where they lie; the others are not touched. Carries no gradient.

    Args:
        x: (N, H, D) with contiguous heads, such as the q and k part of a wider buffer.
        cos, sin: (L, R/2) float32 tables. Row n is rotated by entry n modulo L, which serves tables of all N rows and
            tables of the T tokens that every batch row shares.
        inverse: rotate back.
        impl: see `use_triton`.
    Raises:
        ValueError: when Triton was named and cannot run.
    """
    if use_triton(impl, x, lambda: _unsupported_reason(x, cos, sin)):
        _rotary_(x, cos, sin, inverse)
        return
    rows = _table_rows(x, cos)
    cos, sin = cos[rows, None], sin[rows, None]  # (N, 1, R/2)
    x.copy_(_rotated(x, cos, -sin if inverse else sin))


def _table_rows(x: Tensor, cos: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % len(cos)


def rotary_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor,
    *, impl: str = "auto",
) -> None:  # fmt: skip
    """What a decode step does between its projections and its attention, for one token a row.

    Rotates q where it lies, and writes the rotated k, and v, to each row's slot of the cache.

    Args:
        q: (B, H, D); it is overwritten.
        k, v: (B, H_kv, D).
        cos, sin: (L, R/2) float32 tables, read as in `rotary_`.
        slots: (B,) int32, where in the cache each row's token goes; below S. It differs from the position of a row
            that begins with pads.
        keys, values: (B, H_kv, S, D), one layer of the cache; they are written to.
        impl: see `use_triton`.
    Raises:
        ValueError: when Triton was named and cannot run.
    """
    reasons = (_unsupported_reason(x, cos, sin, slots) for x in (q, k, v, keys, values))
    if use_triton(impl, q, lambda: next(filter(None, reasons), "")):
        _rotary_and_store(q, k, v, cos, sin, slots, keys, values)
        return
    rotary_(q, cos, sin, impl="torch")
    rows = torch.arange(len(k), device=k.device), slice(None), slots.long()
    entries = _table_rows(k, cos)
    angles = (table[entries, None] for table in (cos, sin))  # (B, 1, R/2)
    keys[rows], values[rows] = _rotated(k, *angles).to(keys.dtype), v.to(values.dtype)


def _unsupported_reason(x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor | None = None) -> str:
    if x.stride(-1) != 1:
        return f"the last dim must be contiguous, got stride {x.stride(-1)}"
    if not (cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape):
        return f"the tables must be contiguous and alike, got strides {cos.stride()} and {sin.stride()}"
    if slots is not None and not (slots.is_contiguous() and slots.dtype == torch.int32):
        return "slots must be int32 and contiguous"
    if 2 * cos.shape[-1] > x.shape[-1]:
        return f"cannot turn {2 * cos.shape[-1]} of {x.shape[-1]} dims"
    return ""


@custom_op("phi2::rotary", mutates_args=())
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """x (N, H, D) -> (N, H, D)."""
    from phi2_kernels import rotary_triton

    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotary_triton.apply_rotary(x, cos, sin, inverse, y)
    return y


@_rotary.register_fake
def _(x, cos, sin, inverse):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()  # sum().backward() sends expanded scalars
    return _rotary(grad, *ctx.saved_tensors, not ctx.inverse), None, None, None


_rotary.register_autograd(_backward, setup_context=_setup_context)


@custom_op("phi2::rotary_", mutates_args=("x",))
def _rotary_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    from phi2_kernels import rotary_triton

    rotary_triton.apply_rotary(x, cos, sin, inverse)


@custom_op("phi2::rotary_and_store", mutates_args=("q", "keys", "values"))
def _rotary_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> None:
    from phi2_kernels import rotary_triton

    rotary_triton.apply_rotary_and_store(q, k, v, cos, sin, slots, keys, values)
