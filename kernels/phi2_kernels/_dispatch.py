"""Which implementation of an op runs, and the only import of Triton.

Triton is imported at the first use of a kernel, so that `import phi2` costs nothing of it: the kernels of `<op>.py`
live in `<op>_triton.py`, which is imported then and takes `triton` and `tl` from here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "triton")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_LAZY = {"triton": "triton", "tl": "triton.language", "tensor_descriptor": "triton.tools.tensor_descriptor"}
_HAS_TRITON = find_spec("triton") is not None  # here: torch.compile of torch 2.11 traces no search


def _known_name(impl: str) -> str:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl (or PHI2_IMPL) must be one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}")
    return impl


default_impl = _known_name(os.environ.get("PHI2_IMPL", "auto"))  # what "auto" stands for


def __getattr__(name: str) -> Any:
    """Imports Triton when somebody asks for it (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(_LAZY[name])


def use_triton(impl: str, x: Tensor, unsupported_reason: Callable[[], str] = str) -> bool:
    """Whether an op runs its Triton kernels.

    `auto` stands for what the environment variable PHI2_IMPL said at the import. Without one it means Triton for
    tensors on a GPU, unless they are unsupported, and torch everywhere else. Only `auto` may choose: a named
    implementation runs or raises.

    Args:
        impl: one of `IMPLEMENTATIONS`.
        x: the op's first tensor; its device and dtype count.
        unsupported_reason: says what the kernels cannot do of this call, as the end of a sentence; empty when there is
            nothing. It is asked only where the answer counts.
    Raises:
        ValueError: for an unknown name, or when `triton` was named and cannot run.
    """
    impl = _known_name(default_impl if impl == "auto" else impl)
    if impl == "torch" or (impl == "auto" and not x.is_cuda):
        return False
    reason = unsupported_reason() or _unsupported_tensor(x)
    if reason and impl == "triton":
        raise ValueError(f"impl='triton' cannot run: {reason}")
    return not reason


def is_auto(impl: str) -> bool:
    """Whether neither the caller nor PHI2_IMPL named an implementation, so that an op may choose among several."""
    return impl == default_impl == "auto"


def _unsupported_tensor(x: Tensor) -> str:
    """What keeps every kernel from running on a tensor."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if x.dtype not in FLOATS:
        return f"dtype must be one of {', '.join(str(dtype) for dtype in FLOATS)}, got {x.dtype}"
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors must be on a GPU, got {x.device} (the interpreter, TRITON_INTERPRET=1, takes CPU tensors)"
    return ""


def unsupported_layout(first: Tensor, **tensors: Tensor | None) -> str:
    """What keeps the kernels from reading tensors: each must be on the first one's device, its last dim contiguous."""
    for name, x in tensors.items():
        if x is not None and x.device != first.device:
            return f"{name} must be on {first.device}, got {x.device}"
        if x is not None and x.shape[-1] > 1 and x.stride(-1) != 1:
            return f"the last dim of {name} must be contiguous, got stride {x.stride(-1)}"
    return ""


def on_its_device(launcher: Callable) -> Callable:
    """A launcher that runs on the GPU of its first tensor: by itself Triton takes torch's current one."""

    @wraps(launcher)
    def run(first: Tensor, *arguments, **options):
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return launcher(first, *arguments, **options)
        with torch.cuda.device(first.device):
            return launcher(first, *arguments, **options)

    return run


def cdiv(n: int, size: int) -> int:
    """How many blocks of a size hold n. Triton's own is made for kernels, and slow on the host; so is the next."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


@cache  # torch asks the driver
def architecture(device: torch.device) -> int:
    """80 for an A100 and what is like it, 90 from an H100 on; the key of every table of launch configurations.

    The interpreter, which runs on a CPU, gets the A100's.
    """
    if device.type != "cuda":
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return 90 if major >= 9 else 80
