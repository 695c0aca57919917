"""What Triton would compile of a launch, without compiling it: stands in for the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def _binder_of(function: Callable, do_not_specialize: tuple[str, ...]) -> Callable:
    """What Triton makes a variant of, for an A100."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kernel = JITFunction(function, do_not_specialize=list(do_not_specialize))
    return create_function_from_signature(kernel.signature, kernel.params, CUDABackend(GPUTarget("cuda", 80, 32)))


def variant_of(kernel: Any, arguments: tuple, constants: dict[str, Any]) -> str:
    """Types, constants, and of each argument whether it is 1 and whether 16 divides it."""
    bind = _binder_of(kernel.fn, tuple(kernel.kwargs.get("do_not_specialize") or ()))
    _, variant, options = bind(*arguments, **constants)
    return str((variant, sorted(options.items())))


class Form:
    """A compiled form of a kernel, which takes launches of its own variant alone."""

    def __init__(self, kernel: Any, arguments: tuple, constants: dict[str, Any]) -> None:
        self.kernel, self.variant = kernel, variant_of(kernel, arguments, constants)
        self.options = {name: value for name, value in constants.items() if name not in kernel.arg_names}
        self.launches = 0

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        assert len(grid) == 3

        def launch(*arguments) -> None:
            assert len(arguments) == len(self.kernel.arg_names)
            found = variant_of(self.kernel, arguments, self.options)
            assert found == self.variant, f"{self.kernel.fn.__name__}: {found} is not {self.variant}"
            self.launches += 1

        return launch
