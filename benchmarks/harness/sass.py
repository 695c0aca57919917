"""Machine code of a kernel, read without a GPU: what it occupies, what its main loop issues, and which unit that keeps
busy longest.

The tools are those of Triton's own wheel: cuobjdump says what a cubin occupies, nvdisasm prints its instructions. The
model counts the clocks that each unit of one multiprocessor needs for one round of the main loop by one program, as if
the units overlapped perfectly: the longest is the bound. It knows nothing of latency, so it ranks, it does not time.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple


class Chip(NamedTuple):
    """Of one multiprocessor: bytes it has and, in a clock, lanes or multiply-adds or bytes of its units."""

    shared: int  # bytes of all its programs together, of which each also costs 1 KiB
    shared_of_program: int
    tensor: int  # 16-bit multiply-adds
    fp32: int  # lanes
    dram: float  # bytes: the chip's bandwidth by its multiprocessors and clock


CHIPS = {  # A100 80 GB and H100 SXM, at their boost clocks
    80: Chip(164 * 1024, 163 * 1024, 1024, 64, 2039e9 / 108 / 1.410e9),
    90: Chip(228 * 1024, 227 * 1024, 2048, 128, 3350e9 / 132 / 1.755e9),
}
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # of a multiprocessor, on both

_FP32 = ("FFMA", "FADD", "FMUL", "FMNMX", "FSETP", "FSEL")
_SPECIAL = ("MUFU", "I2F", "F2I")  # 16 lanes a clock
_MATRIX = re.compile(r"HG?MMA\.(?:(\d+)x(\d+)x(\d+)|16816|1688)\b")
_NARROW = {"HMMA.16816": 16 * 8 * 16, "HMMA.1688": 16 * 8 * 8}
_ASYNC_COPY = re.compile(r"LDGSTS\..*\b128\b")
_WIDTH = re.compile(r"\.(128|64|U16|S16|U8|S8)\b")
_BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Code:
    """One compiled kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread that did not fit its registers.
        shared: bytes of shared memory of a program.
        warps: of a program.
        instructions: the whole kernel, in order.
        loops: the innermost loops, as ranges of instructions.
    """

    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    instructions: list[str]
    loops: list[range]

    @classmethod
    def read(cls, cubin: bytes, arch: int, warps: int, shared: int) -> Code:
        usage, listing = disassemble(cubin)
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        instructions, loops = parse(listing)
        return cls(arch, warps, registers, stack, shared, instructions, loops)

    @property
    def programs(self) -> int:
        """How many programs a multiprocessor holds at a time."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = CHIPS[self.arch].shared // (self.shared + 1024)
        return min(by_registers, by_shared, WARPS // self.warps, PROGRAMS)

    @property
    def async_copies(self) -> int:
        """Copies of 16 bytes a lane from global to shared memory that pass by the registers (cp.async).

        Of the loop with matrix instructions that has the fewest, or of a kernel without such loops.
        """
        loops = self.matrix_loops or [range(len(self.instructions))]
        return min(sum(bool(_ASYNC_COPY.match(self.instructions[i])) for i in loop) for loop in loops)

    @property
    def is_written_behind(self) -> bool:
        """Whether every loop that reads and writes global memory reads all, then waits for all warps, then writes."""
        orders = ["".join(_traffic(self.instructions[i]) for i in loop) for loop in self.loops]
        return all(re.fullmatch("L+BS+", order) for order in orders if "L" in order and "S" in order)

    @property
    def matrix_loops(self) -> list[range]:
        return [loop for loop in self.loops if self.multiply_adds(loop)]

    @property
    def main_loop(self) -> range:
        """Where the time goes: the shortest loop with matrix instructions (others mask as well), else the longest
        loop, else everything."""
        if self.matrix_loops:
            return min(self.matrix_loops, key=len)
        return max(self.loops, key=len, default=range(len(self.instructions)))

    def multiply_adds(self, loop: range) -> int:
        """Multiply-adds that a program's matrix instructions do in one round of a loop."""
        return sum(_multiply_adds(self.instructions[i], self.warps) for i in loop)

    def clocks(self, loop: range, dram_bytes: float = 0.0) -> dict[str, float]:
        """Clocks of each unit for one round of a loop by one program that reads and writes so many bytes of DRAM."""
        body, chip = [self.instructions[i] for i in loop], CHIPS[self.arch]
        lanes = 32 * self.warps
        return {
            "tensor": sum(_tensor_clocks(line, self.warps, chip) for line in body),
            "issue": len(body) * self.warps / 4,
            "fp32": _count(body, _FP32) * lanes / chip.fp32,
            "special": _count(body, _SPECIAL) * lanes / 16,
            "shared": sum(_shared_bytes(line) for line in body) * lanes / 128,
            "dram": dram_bytes / chip.dram,
        }


def disassemble(cubin: bytes) -> tuple[str, str]:
    """What cuobjdump says of resources, and nvdisasm's listing; kept in Triton's cache, beside the cubin."""
    import triton
    from triton.runtime.cache import get_cache_manager

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cache, found = get_cache_manager(sha256(cubin).hexdigest()), []
    for tool, *options in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c", "-ndf")):
        if cache.get_file(tool) is None:
            cubin_file = cache.put(cubin, "kernel.cubin")
            command = [tools / tool, *options, cubin_file]
            cache.put(subprocess.run(command, capture_output=True, text=True, check=True).stdout, tool, binary=False)
        found.append(Path(cache.get_file(tool)).read_text())
    return found[0], found[1]


def parse(listing: str) -> tuple[list[str], list[range]]:
    """The instructions of a listing, without predicates, and its innermost loops: branches back to a label."""
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
    return instructions, [a for a in loops if not any(a != b and b[0] >= a[0] and b[-1] <= a[-1] for b in loops)]


def _traffic(line: str) -> str:
    """L for a load from global memory, S for a store to it, B for a barrier of a program, else nothing."""
    return {"LDG": "L", "STG": "S", "BAR": "B"}.get(re.split(r"[.\s]", line, maxsplit=1)[0], "")


def _count(lines: list[str], opcodes: tuple[str, ...]) -> int:
    counts = Counter(re.split(r"[.\s]", line, maxsplit=1)[0] for line in lines)
    return sum(counts[opcode] for opcode in opcodes)


def _multiply_adds(line: str, warps: int) -> int:
    """Of all warps of a program. HGMMA is an instruction of four warps together, and names its shape."""
    shape = _MATRIX.match(line)
    if not shape:
        return 0
    if shape[1]:
        return int(shape[1]) * int(shape[2]) * int(shape[3]) * warps // 4
    return _NARROW[shape[0]] * warps


def _tensor_clocks(line: str, warps: int, chip: Chip) -> float:
    return _multiply_adds(line, warps) / chip.tensor * (2 if "TF32" in line else 1)


def _shared_bytes(line: str) -> int:
    """Bytes a lane moves between shared memory and registers."""
    if line.startswith(("LDSM", "STSM")):
        matrices = re.search(r"\.M\w*88\.(\d)", line)
        return 4 * int(matrices[1] if matrices else 1)
    if re.match(r"(LDS|STS)[.\s]", line):
        width = _WIDTH.search(line)
        return _BYTES[width[1]] if width else 4
    return 0
