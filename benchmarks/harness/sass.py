"""Machine code of kernels, read without a GPU: what each occupies, and what its loops do.

The tools are those of Triton's own wheel: cuobjdump says what a cubin occupies, nvdisasm prints instructions. That one
takes 0.2 s to begin, and is given the instructions of many kernels at once, one behind the other.
"""

from __future__ import annotations

import re
import struct
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

INSTRUCTION = 16  # bytes
_EXECUTABLE = 4  # a flag of an ELF section
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


def read(cubins: list[bytes], arch: int) -> list[Code]:
    """The kernels of an architecture, each in an ELF file of its own."""
    codes = [instructions_of(cubin) for cubin in cubins]
    lines = iter(listed(said_of(b"".join(codes), "nvdisasm", "--binary", f"SM{arch}")))
    found, start = [], 0
    for cubin, code in zip(cubins, codes, strict=True):
        usage = said_of(cubin, "cuobjdump", "--dump-resource-usage")
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        instructions = [next(lines) for _ in range(len(code) // INSTRUCTION)]
        found.append(Code(registers, stack, instructions, loops_of(instructions, start)))
        start += len(code)
    return found


def instructions_of(cubin: bytes) -> bytes:
    """What is executable of an ELF file; its header and its table of sections say where that is."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count = struct.unpack_from("<HH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    ((start, length),) = [(start, length) for _, _, flags, _, start, length in sections if flags & _EXECUTABLE]
    return cubin[start : start + length]


def said_of(binary: bytes, tool: str, *options: str) -> str:
    """What a tool prints of a file with these bytes."""
    import triton

    with TemporaryDirectory() as folder:
        file = Path(folder, "kernels")
        file.write_bytes(binary)
        command = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool, *options, file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def listed(listing: str) -> list[str]:
    """The instructions of a listing, without their addresses and predicates."""
    return re.findall(r"(?m)^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(.+?)\s*;", listing)


def loops_of(instructions: list[str], start: int) -> list[list[str]]:
    """The instructions of innermost loops: branches back, but for one to itself, with which a kernel is filled up.

    Args:
        start: address of the first instruction.
    """
    loops: list[range] = []
    for i, text in enumerate(instructions):
        if branch := re.match(r"BRA\b.*\b0x([0-9a-f]+)$", text):
            first = (int(branch[1], 16) - start) // INSTRUCTION
            loops += [range(first, i + 1)] if first < i else []
    inner = [a for a in loops if not any(a != b and b[0] >= a[0] and b[-1] <= a[-1] for b in loops)]
    return [[instructions[i] for i in loop] for loop in inner]


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
