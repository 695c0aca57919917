"""The ops of a decode step: attention of one query per row to its cache, and matmuls of a few rows.

Both read much and compute little, so that the bytes read are the time taken. Attention of a row that holds n tokens,
whose query is the last of them:

    the query sees key j   iff   j < n  and  n <= until[j]                (`attention.py` says what `until` can express)
    o = sum_j softmax_j(q . k[j] / sqrt(D)) v[j]                          o = 0 where it sees nothing

One head of one row is too little work for a GPU: its keys are cut into splits, each of which finds the logsumexp l[s]
of its own scores and its own output o[s], and a second kernel joins them:

    o = sum_s exp(l[s] - l) o[s]        l = log sum_s exp(l[s])

The matmuls are y = x W^T + bias with W in one of three forms, G neighbouring columns of a row being a group:

    gemv        W[n, k], floating point
    gemv_int8   W[n, k] = scale[n] code[n, k]                             code in -127..127
    gemv_int4   W[n, k] = scale[n, g] (code[n, k] - zero[n, g])           g = k // G, code in 0..15
                packed[n, g G/2 + i] = code[n, g G + i] + 16 code[n, g G + G/2 + i]       i < G/2

A byte of the last holds columns half a group apart, so that both nibbles of neighbouring bytes meet neighbouring x.
Nothing here has gradients.

Dims: B batch, H query heads, H_kv key-value heads, S keys the cache has room for, D head dim, M rows, N outputs,
K inputs, G group.
Source: Flash-Decoding (Dao et al. 2023) for the splits; arXiv:2210.17323 section 4 for grouped 4-bit weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

from phi2_kernels._dispatch import FLOATS, use_triton

MAX_ROWS = 8  # of a gemv; more are a matmul for tensor cores
MAX_HEADS = 8  # query heads of a key-value head


def decode_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, until: Tensor | None = None
) -> Tensor:
    """The formula above, in float32. Arguments and result as in `decode_attention`."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = q.float() @ k.mT / q.shape[-1] ** 0.5  # (B, H, 1, S)
    seen = _seen(k.shape[2], lengths, until, q.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(dim=-1).nan_to_num(0.0) @ v).to(q.dtype)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None = None, until: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Attention of one query per row to the keys and values of its cache.

    Neither the shapes nor the number of programs depend on `lengths`, which stays on its device: a CUDA graph that
    was captured once serves every step.

    Args:
        q: (B, H, 1, D).
        k, v: (B, H_kv, S, D), a layer of the cache with its empty end, or the filled part of it.
        lengths: (B,) int32, how many keys of each row are filled, the query's own among them; default: all.
        until: (B, S) int32, for each key the end of the queries that may see it (0 at a pad); default: all see it.
        impl: see `use_triton`.
    Returns:
        (B, H, 1, D) in the dtype of q.
    Raises:
        ValueError: when shapes do not agree, or when Triton was named and cannot run.
    """
    _check_attention(q, k, v, lengths, until)
    if use_triton(impl, q, _attention_obstacle(q, k, v, lengths, until)):
        return _decode_attention(q, k, v, lengths, until)
    seen = _seen(k.shape[2], lengths, until, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])


def _seen(S: int, lengths: Tensor | None, until: Tensor | None, device: torch.device) -> Tensor | None:
    """(B or 1, 1, 1, S) bool, True where the query sees the key; None when it sees all."""
    if lengths is None and until is None:
        return None
    end = torch.full((1,), S, device=device) if lengths is None else lengths
    seen = torch.arange(S, device=device) < end[:, None]
    if until is not None:
        seen = seen & (end[:, None] <= until)
    return seen[:, None, None]


def _check_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, until: Tensor | None) -> None:
    B, H, T, D = q.shape
    if T != 1:
        raise ValueError(f"q must hold one query per row, (B, H, 1, D), got {tuple(q.shape)}")
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D or H % k.shape[1]:
        raise ValueError(
            f"k and v must both be ({B}, H_kv, S, {D}) with an H_kv that divides {H}, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"lengths must be of shape ({B},), got {tuple(lengths.shape)}")
    if until is not None and until.shape != (B, k.shape[2]):
        raise ValueError(f"until must be of shape ({B}, {k.shape[2]}), got {tuple(until.shape)}")


def _attention_obstacle(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, until: Tensor | None) -> str:
    D = q.shape[3]
    if D % 16 or D > 256 or D.bit_count() > 3:
        return f"the head dim must be a sum of at most three powers of two from 16 to 256, got {D}"
    if q.shape[1] // k.shape[1] > MAX_HEADS:
        return f"at most {MAX_HEADS} query heads can share a key-value head, got {q.shape[1] // k.shape[1]}"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v must be of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}"
    if any(x is not None and x.dtype != torch.int32 for x in (lengths, until)):
        return "lengths and until must be int32"
    column = None if lengths is None else lengths[:, None]  # any stride will do, so that one number can serve all rows
    return _layout_obstacle(q, q=q, k=k, v=v, until=until, lengths=column)


def _layout_obstacle(first: Tensor, **tensors: Tensor | None) -> str:
    """What keeps the kernels from reading tensors: each must be on the first one's device, its last dim contiguous."""
    for name, x in tensors.items():
        if x is not None and x.device != first.device:
            return f"{name} must be on {first.device}, got {x.device}"
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"the last dim of {name} must be contiguous, got stride {x.stride(-1)}"
    return ""


@custom_op("phi2::decode_attention", mutates_args=())
def _decode_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, until: Tensor | None) -> Tensor:
    from phi2_kernels import decode_triton

    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    decode_triton.attend(q, k, v, lengths, until, o)
    return o


@_decode_attention.register_fake
def _(q, k, v, lengths, until):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def gemv_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias in float32. Arguments and result as in `gemv`."""
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x W^T + bias for a few rows, accumulated in float32.

    Args:
        x: (..., K); the kernels take at most `MAX_ROWS` rows.
        weight: (N, K), as `nn.Linear` keeps it.
        bias: (N,) or None.
        impl: see `use_triton`.
    Returns:
        (..., N) in the dtype of x.
    Raises:
        ValueError: when shapes do not agree, or when Triton was named and cannot run.
    """
    N, K = weight.shape
    _check_matmul(x, N, K, bias)
    obstacle = "" if weight.dtype in FLOATS else f"weight must be floating point, got {weight.dtype}"
    if use_triton(impl, x, obstacle or _matmul_obstacle(x, weight=weight, bias=bias)):
        return _gemv(x.reshape(-1, K), weight, None, bias).view(*x.shape[:-1], N)
    return F.linear(x, weight, bias)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a weight (N, K) in 8 bits: codes (N, K) int8, and the scale (N,) float32 that gives the largest 127."""
    w = weight.float()
    largest = w.abs().amax(dim=1)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (w / scale[:, None]).round().to(torch.int8), scale


def dequantize_int8(codes: Tensor, scale: Tensor) -> Tensor:
    """The weight (N, K) in float32 that codes and scale stand for."""
    return codes.float() * scale.float()[:, None]


def gemv_int8(
    x: Tensor, weight_int8: Tensor, scale: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """`gemv` with a weight (N, K) int8 and a scale (N,) for each of its rows, as `quantize_int8` gives them."""
    N, K = weight_int8.shape
    _check_matmul(x, N, K, bias)
    _check_weight(scale=(scale, (N,)))
    if use_triton(impl, x, _matmul_obstacle(x, weight_int8=weight_int8, scale=scale, bias=bias)):
        return _gemv(x.reshape(-1, K), weight_int8, scale, bias).view(*x.shape[:-1], N)
    return F.linear(x, dequantize_int8(weight_int8, scale).to(x.dtype), bias)


@custom_op("phi2::gemv", mutates_args=())
def _gemv(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (M, K) -> (M, N)."""
    from phi2_kernels import decode_triton

    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    decode_triton.gemv(x, weight, scale, bias, y)
    return y


@_gemv.register_fake
def _(x, weight, scale, bias):
    return torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)


def quantize_int4(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """A weight (N, K) in 4 bits, each group of a row over its own range.

    Args:
        weight: (N, K) floating point.
        group: G, even; it must divide K.
    Returns:
        packed (N, K/2) uint8, scales and zeros (N, K/G) in the dtype of the weight.
    Raises:
        ValueError: when the group does not divide K.
    """
    N, K = weight.shape
    _check_group(K, group)
    w = weight.float().view(N, K // group, group)
    low, high = w.amin(dim=-1).clamp(max=0.0), w.amax(dim=-1).clamp(min=0.0)
    scales = ((high - low) / 15).to(weight.dtype)
    scales = torch.where(scales > 0, scales, 1.0)
    zeros = (-low / scales.float()).to(weight.dtype)
    # Codes are found with the scales and zeros as they are kept, so that their rounding is not an error of the weight.
    codes = (w / scales.float()[..., None] + zeros.float()[..., None]).round().clamp(0, 15).to(torch.uint8)
    first, second = codes.chunk(2, dim=-1)
    return (first | second << 4).view(N, K // 2), scales, zeros


def dequantize_int4(packed: Tensor, scales: Tensor, zeros: Tensor, group: int = 32) -> Tensor:
    """The weight (N, K) in float32 that the three stand for."""
    halves = packed.view(packed.shape[0], -1, group // 2)
    codes = torch.cat((halves & 15, halves >> 4), dim=-1).float()  # [N, K/G, G]
    return (scales.float()[..., None] * (codes - zeros.float()[..., None])).flatten(1)


def gemv_int4(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor,
    bias: Tensor | None = None,
    group: int = 32,
    *,
    impl: str = "auto",
) -> Tensor:
    """`gemv` with a weight in the form that `quantize_int4` gives."""
    N, K = packed.shape[0], 2 * packed.shape[1]
    _check_matmul(x, N, K, bias)
    _check_group(K, group)
    _check_weight(scales=(scales, (N, K // group)), zeros=(zeros, (N, K // group)))
    obstacle = "" if group in (16, 32, 64, 128, 256) else f"group must be a power of two from 16 to 256, got {group}"
    if use_triton(impl, x, obstacle or _matmul_obstacle(x, packed=packed, scales=scales, zeros=zeros, bias=bias)):
        return _gemv_int4(x.reshape(-1, K), packed, scales, zeros, bias, group).view(*x.shape[:-1], N)
    return F.linear(x, dequantize_int4(packed, scales, zeros, group).to(x.dtype), bias)


@custom_op("phi2::gemv_int4", mutates_args=())
def _gemv_int4(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """x (M, K) -> (M, N)."""
    from phi2_kernels import decode_triton

    y = torch.empty((x.shape[0], packed.shape[0]), dtype=x.dtype, device=x.device)
    decode_triton.gemv_int4(x, packed, scales, zeros, bias, group, y)
    return y


@_gemv_int4.register_fake
def _(x, packed, scales, zeros, bias, group):
    return torch.empty((x.shape[0], packed.shape[0]), dtype=x.dtype, device=x.device)


def _check_matmul(x: Tensor, N: int, K: int, bias: Tensor | None) -> None:
    if x.shape[-1] != K:
        raise ValueError(f"x must have {K} columns, as the weight has, got {x.shape[-1]}")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be of shape ({N},), got {tuple(bias.shape)}")


def _check_weight(**parts: tuple[Tensor, tuple[int, ...]]) -> None:
    for name, (x, shape) in parts.items():
        if x.shape != shape:
            raise ValueError(f"{name} must be of shape {shape}, got {tuple(x.shape)}")


def _check_group(K: int, group: int) -> None:
    if group < 2 or group % 2 or K % group:
        raise ValueError(f"group must be even and divide the {K} columns of the weight, got {group}")


def _matmul_obstacle(x: Tensor, **tensors: Tensor | None) -> str:
    rows = x.shape[:-1].numel()
    if rows > MAX_ROWS:
        return f"x must have at most {MAX_ROWS} rows, got {rows}"
    return _layout_obstacle(x, x=x, **tensors)
