"""The Triton kernels of `rotary.py`. A program takes the heads of one token, whose angles it loads once.

Each head is read as its two rotary halves, 32 bytes each in half precision with R = 32: whole sectors of memory, and
nothing of the dims that are not rotated unless they are copied to another place.
"""

from __future__ import annotations

from torch import Tensor

from phi2_kernels._dispatch import architecture, cdiv, on_its_device, power_of_2, tl, triton
from phi2_kernels.launch import Known, launch
from phi2_kernels.strided import strided

_APPLY = {"BLOCK_H": 32, "num_warps": 1}
_STORE = {"BLOCK_H": 16, "num_warps": 1}  # few tokens: the fewest heads that still read 16 bytes at a time
_KERNELS = {"apply_rotary": _APPLY, "apply_rotary_and_store": _STORE}
LAUNCH = {80: _KERNELS, 90: _KERNELS}


@triton.jit
def _load_angles(cos_ptr, sin_ptr, entry, HALF: tl.constexpr, BLOCK_R: tl.constexpr):
    """Cosines and sines of an entry of the tables.  # [1, BLOCK_R]"""
    dims = tl.arange(0, BLOCK_R)[None, :]
    at = entry.to(tl.int64) * HALF + dims
    return tl.load(cos_ptr + at, mask=dims < HALF, other=0.0), tl.load(sin_ptr + at, mask=dims < HALF, other=0.0)


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, x_stride, y_stride, heads, live, cos, sin,
    COPY_REST: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = x rotated, for one token; its other dims are copied where y is not x.  # [BLOCK_H, BLOCK_R]"""
    dims = tl.arange(0, BLOCK_R)[None, :]
    mask = live[:, None] & (dims < HALF)
    x_ptrs, y_ptrs = x_ptr + heads[:, None] * x_stride + dims, y_ptr + heads[:, None] * y_stride + dims
    first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, first * cos - second * sin, mask=mask)
    tl.store(y_ptrs + HALF, second * cos + first * sin, mask=mask)
    if COPY_REST:
        _copy_heads(x_ptr, y_ptr, x_stride, y_stride, heads, live, 2 * HALF, D, BLOCK_D)


@triton.jit
def _copy_heads(
    x_ptr, y_ptr, x_stride, y_stride, heads, live, START: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    """The dims from START on.  # [BLOCK_H, BLOCK]"""
    dims = START + tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (dims < D)
    x = tl.load(x_ptr + heads[:, None] * x_stride + dims, mask=mask, other=0.0)
    tl.store(y_ptr + heads[:, None] * y_stride + dims, x, mask=mask)


@triton.jit(do_not_specialize=["L"])
def _apply_rotary_kernel(
    x, y, cos_ptr, sin_ptr, L, H,
    INVERSE: tl.constexpr, COPY_REST: tl.constexpr, HALF: tl.constexpr, D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    cos, sin = _load_angles(cos_ptr, sin_ptr, row % L, HALF, BLOCK_R)
    x_ptr, y_ptr = x.ptr + row.to(tl.int64) * x.strides[0], y.ptr + row.to(tl.int64) * y.strides[0]
    _rotate_heads(
        x_ptr, y_ptr, x.strides[1], y.strides[1], heads, heads < H,
        cos, -sin if INVERSE else sin, COPY_REST, HALF, D, BLOCK_R, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["L", "S"])
def _apply_rotary_and_store_kernel(
    q, k, v, keys, values, cos_ptr, sin_ptr, slots_ptr, L, S, H, H_KV,
    HALF: tl.constexpr, D: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (b, block, part): part 0 rotates a block of heads of q, part 1 rotates and stores k, part 2 stores v."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    kept = heads < tl.where((slot >= 0) & (slot < S), H_KV, 0)  # never beside the cache
    cos, sin = _load_angles(cos_ptr, sin_ptr, row % L, HALF, BLOCK_R)
    if part == 0:
        q_ptr = q.ptr + row * q.strides[0]
        _rotate_heads(
            q_ptr, q_ptr, q.strides[1], q.strides[1], heads, heads < H,
            cos, sin, False, HALF, D, BLOCK_R, BLOCK_REST,
        )  # fmt: skip
    elif part == 1:
        k_ptr = k.ptr + row * k.strides[0]
        keys_ptr = keys.ptr + row * keys.strides[0] + slot * keys.strides[2]
        _rotate_heads(
            k_ptr, keys_ptr, k.strides[1], keys.strides[1], heads, kept,
            cos, sin, True, HALF, D, BLOCK_R, BLOCK_REST,
        )  # fmt: skip
    else:
        v_ptr = v.ptr + row * v.strides[0]
        values_ptr = values.ptr + row * values.strides[0] + slot * values.strides[2]
        _copy_heads(v_ptr, values_ptr, v.strides[1], values.strides[1], heads, kept, 0, D, BLOCK_D)


def _dims(cos: Tensor, D: int) -> dict[str, int]:
    half = cos.shape[1]
    return {"HALF": half, "D": D, "BLOCK_R": power_of_2(half)}


@on_its_device
def apply_rotary(
    x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, y: Tensor | None = None, known: Known | None = None
) -> None:
    """Rotates x (N, H, D), a view with any strides but the last, where it lies, or into y.

    Args:
        cos, sin: as in `rotary_`.
    """
    N, H, D = x.shape
    if x.numel() == 0:
        return
    own = LAUNCH[architecture(x.device)]["apply_rotary"]
    rest = D - 2 * cos.shape[1]
    flags = {"INVERSE": inverse, "COPY_REST": y is not None and rest > 0}
    target = x if y is None else y
    launch(
        _apply_rotary_kernel, (N, cdiv(H, own["BLOCK_H"]), 1), (strided(x), strided(target), cos, sin, cos.shape[0], H),
        lambda: flags | _dims(cos, D) | {"BLOCK_D": power_of_2(max(1, rest)), "enable_fp_fusion": True} | own,
        known, ("rotary", inverse),
    )  # fmt: skip


@on_its_device
def apply_rotary_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Arguments as in `rotary_and_store`; every one but the tables may be a view with wider rows."""
    (B, H, D), H_kv = q.shape, k.shape[1]
    if q.numel() == 0:
        return
    launch = LAUNCH[architecture(q.device)]["apply_rotary_and_store"]
    rest = power_of_2(max(1, D - 2 * cos.shape[1]))
    blocks = _dims(cos, D) | {"BLOCK_REST": rest, "BLOCK_D": power_of_2(D)} | launch
    tensors = *map(strided, (q, k, v, keys, values)), cos, sin, slots
    grid = B, cdiv(max(H, H_kv), launch["BLOCK_H"]), 3
    _apply_rotary_and_store_kernel[grid](*tensors, len(cos), keys.shape[2], H, H_kv, **blocks, enable_fp_fusion=True)
