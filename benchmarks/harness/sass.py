"""Machine code of a kernel, read without a GPU: what it occupies, and what its loops do.

The tools are those of Triton's own wheel: cuobjdump says what a cubin occupies, nvdisasm prints its instructions.
"""

from __future__ import annotations

import re
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

_MATRIX = re.compile(r"HG?MMA\.(?:(\d+)x(\d+)x(\d+)|16816|1688)\b")
_NARROW = {"HMMA.16816": 16 * 8 * 16, "HMMA.1688": 16 * 8 * 8}
_ASYNC_COPY = re.compile(r"LDGSTS\..*\b128\b")
_TRAFFIC = {"LDG": "L", "STG": "S", "BAR": "B"}


class Code(NamedTuple):
    """One compiled kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread that did not fit its registers.
        instructions: the whole kernel, in order.
        loops: the instructions of each innermost loop.
    """

    registers: int
    stack: int
    instructions: list[str]
    loops: list[list[str]]

    @classmethod
    def read(cls, cubin: bytes) -> Code:
        usage, listing = (
            _said_of(cubin, *tool) for tool in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c", "-ndf"))
        )
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        return cls(registers, stack, *parse(listing))


def _said_of(cubin: bytes, tool: str, *options: str) -> str:
    """What a tool prints of a kernel; kept in Triton's cache, beside the kernel."""
    import triton
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(sha256(cubin).hexdigest())
    if cache.get_file(tool) is None:
        command = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool, *options]
        command.append(cache.put(cubin, "kernel.cubin"))
        cache.put(subprocess.run(command, capture_output=True, text=True, check=True).stdout, tool, binary=False)
    return Path(cache.get_file(tool)).read_text()


def parse(listing: str) -> tuple[list[str], list[list[str]]]:
    """The instructions of a listing, without predicates, and those of its innermost loops: branches back to a label."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[range] = []
    for line in listing.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if code := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(.+?)\s*;", line):
            instructions.append(code[1])
            target = re.match(r"BRA.*`\((\.L_x_\d+)\)", code[1])
            if target and labels.get(target[1], len(instructions)) < len(instructions) - 1:
                loops.append(range(labels[target[1]], len(instructions)))
    inner = [a for a in loops if not any(a != b and b[0] >= a[0] and b[-1] <= a[-1] for b in loops)]
    return instructions, [[instructions[i] for i in loop] for loop in inner]


def async_copies(instructions: list[str]) -> int:
    """Copies of 16 bytes a lane from global to shared memory that pass by the registers (cp.async)."""
    return sum(bool(_ASYNC_COPY.match(line)) for line in instructions)


def is_written_behind(loop: list[str]) -> bool:
    """Whether a loop that reads and writes global memory reads all, then waits for all warps, then writes."""
    order = "".join(_TRAFFIC.get(re.split(r"[.\s]", line, maxsplit=1)[0], "") for line in loop)
    return not {"L", "S"} <= set(order) or bool(re.fullmatch("L+BS+", order))


def multiply_adds(loop: list[str], warps: int) -> int:
    """Multiply-adds that a program's matrix instructions do in one round of a loop."""
    return sum(_multiply_adds(line, warps) for line in loop)


def _multiply_adds(line: str, warps: int) -> int:
    """Of all warps. HGMMA is an instruction of four warps together, and names its shape."""
    shape = _MATRIX.match(line)
    if not shape:
        return 0
    if shape[1]:
        return int(shape[1]) * int(shape[2]) * int(shape[3]) * warps // 4
    return _NARROW[shape[0]] * warps
