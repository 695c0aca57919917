"""Our code for an A100 on whatever NVIDIA GPU is here: the nearest thing to an A100 where there is none.

Triton compiles by the launch table of sm_80 down to PTX for sm_80: with mma.sync and cp.async, and with nothing that
only later cards have, since `ptxas` takes none of it under that name. Then `ptxas` makes of it the code of the card
that is there, as a driver does for any program older than its card, and Triton launches that.

torch's FlashAttention-2 is such code as well, so on a Hopper GPU the two can be compared. What an A100 has otherwise:
its memory, its clocks, and what ptxas makes of registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

ARCH = 80


@contextmanager
def as_sm80() -> Iterator[None]:
    """Within, attention's kernels are those of an A100. An interpreter launches them so wherever it is."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from phi2_kernels import attention_tiles_triton

    run = JITFunction.run

    def run_as_sm80(kernel, *args, **options):
        return run(kernel, *args, arch=f"sm{ARCH}", **options)

    with (
        mock.patch.object(JITFunction, "run", run_as_sm80),
        mock.patch.object(knobs.runtime, "add_stages_inspection_hook", _keep_its_ptx),
        mock.patch.object(attention_tiles_triton, "architecture", lambda device: ARCH),
    ):
        yield


def _keep_its_ptx(backend=None, stages=None, options=None, language=None, capability=None) -> Any:
    """Triton's way into its stages: by itself it would write PTX for the card. Without arguments, a name for caches.

    Args:
        capability: the one that was asked for, 80.
    """
    if backend is None:
        return "PTX of its own", "PTX of its own"
    stages["ptx"] = lambda source, metadata: backend.make_ptx(source, metadata, options, capability)
