"""cuDNN's forward pass of attention, and the one rule that says where `auto` takes it in place of ours.

On Hopper it is 1.4 to 1.6 times as fast as our kernel (an H200, 2026-11-27, 80 dims), on an A100 it is slower. It knows
plain causal rows only, and makes a plan for each new shape, which takes the host 50 to 400 ms: so a shape must be one
that comes again, and save what its plan costs within some hundred passes of a model.

The backward pass stays ours: cuDNN's does not repeat its bits, and torch has no switch for that. All it needs of the
forward pass is the output and its logsumexp, whoever wrote them.

Source: pytorch, aten/src/ATen/native/cudnn/MHA.cpp (plans by shape) and transformers/cuda/sdp_utils.cpp (determinism).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUND = 128  # tokens: lengths that come again are multiples of it
LEAST_SCORES = 2**28  # of all heads: 32 rows of 512 tokens, the least that was measured
ALIGNMENT = 16  # bytes
_cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention


def takes_cudnn(capability: tuple[int, int], dtype: torch.dtype, shape: tuple[int, ...], kv_heads: int) -> bool:
    """The rule, for plain causal rows and heads that our kernels take.

    Args:
        capability: of the device.
        shape: (B, H, T, D) of the queries.
    """
    B, H, T, _ = shape
    return (
        capability[0] == 9
        and dtype in (torch.float16, torch.bfloat16)
        and kv_heads == H
        and T % ROUND == 0
        and B * H * T * T >= LEAST_SCORES
    )


def is_chosen(q: Tensor, k: Tensor, v: Tensor, until: Tensor | None) -> bool:
    """Whether a call that names no implementation is plain causal, the rule says so, and cuDNN can read its tensors.

    Args:
        q: (B, H, T, D).
        k, v: (B, H_kv, S, D).
        until: see `visibility.py`.
    """
    is_causal = until is None and q.shape[2] == k.shape[2]  # first: of packed rows nothing more is asked
    return (
        is_causal
        and _is_usable(q, k, v)
        and takes_cudnn(torch.cuda.get_device_capability(q.device), q.dtype, q.shape, k.shape[1])
    )


def _is_usable(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there is a cuDNN that nobody has switched off, and the tensors are as it wants them."""
    has_cudnn = q.is_cuda and torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()
    return has_cudnn and all(map(_is_aligned, (q, k, v)))


def _is_aligned(x: Tensor) -> bool:
    """Every row of a head begins where an access of 16 bytes may, and is a row of its own."""
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    places = (x.storage_offset(), *strides)
    return all(strides) and all(place * x.element_size() % ALIGNMENT == 0 for place in places)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o (B, H, T, D), with dims in memory in the order of those of q, and lse (B, H, T), float32, natural."""
    o, lse, *_ = _cudnn(q, k, v, None, True, is_causal=True)
    return o, lse.view(q.shape[:3])
