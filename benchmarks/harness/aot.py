"""Launches compiled for an A100 and an H100 where there is neither, and held to their budgets.

The launchers run as they do in training, on tensors that have a shape and a dtype but no memory and say they are on a
GPU; Triton specialises and compiles what they launch, and the launch itself is left out. So what is read here is the
code that a GPU would run, down to the divisibility of strides. `sass.py` reads it.

Triton's cache keeps what it compiled: a launch is compiled once, whoever asks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from benchmarks.harness import spec
from benchmarks.harness.sass import CHIPS, Code
from benchmarks.registry import load

STACK = 16  # bytes of a thread that may not fit its registers
TILED = ("attention forward", "attention dkdv", "attention dq")  # tiles go from DRAM to the matrix instructions
IN_PLACE = ("linear_logprob stats", "linear_logprob gradient")  # a half-precision gradient over its own logits
WARPS = 8  # a multiprocessor should hold, two for each of its schedulers


@dataclass(frozen=True)
class Row:
    """One launch, compiled.

    Attributes:
        launch: the tile, and what is switched on.
        form: one of `spec.FORMS`.
        programs: how many of them a multiprocessor holds at a time.
        copies: instructions that copy from global to shared memory past the registers, of the loop with the fewest.
        is_written_behind: every loop that reads and writes does so with a barrier between.
        multiply_adds: of one round of each loop with matrix instructions.
        useful: multiply-adds that the round of such a loop needs; 0 for kernels without.
        clocks: of each unit for one round of the main loop, by the static model.
        bound: the unit with the most.
        efficiency: the clocks that the useful work needs on its own unit, of those of the bound.
    """

    kernel: str
    launch: str
    form: str
    arch: int
    warps: int
    registers: int
    stack: int
    shared: int
    programs: int
    copies: int
    is_written_behind: bool
    multiply_adds: list[int]
    useful: int
    clocks: dict[str, float]
    bound: str
    efficiency: float


def violations(row: Row) -> list[str]:
    """Which budgets a launch breaks, in words; none for what may be shipped."""
    found = {
        f"{row.shared} bytes of shared memory": row.shared > CHIPS[row.arch].shared_of_program,
        f"{row.stack} bytes of stack": row.stack > STACK,
        f"{row.programs * row.warps} warps on a multiprocessor, {WARPS} wanted": row.programs * row.warps < WARPS,
        f"{row.multiply_adds} multiply-adds a tile, {row.useful} useful": set(row.multiply_adds) != {row.useful} - {0},
        "writes that may overtake reads": row.kernel in IN_PLACE and not row.is_written_behind,
        "no asynchronous copies": row.arch == 80 and row.useful > 0 and row.copies == 0 and row.kernel in TILED,
    }
    return [text for text, is_broken in found.items() if is_broken]


class _OnGPU(Tensor):
    """A tensor without memory that says it is on a GPU."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device("cuda", 0))


class _PretendGPU(TorchFunctionMode):
    """What torch makes on a GPU is made nowhere instead."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = {**(kwargs or {}), **({"device": "meta"} if "device" in (kwargs or {}) else {})}
        args, kwargs = tree_map_only(_OnGPU, lambda x: x.as_subclass(Tensor), (args, kwargs))
        return tree_map_only(Tensor, lambda x: x.as_subclass(_OnGPU), function(*args, **kwargs))


class _Driver(NamedTuple):
    """What Triton's compiler asks of a driver."""

    arch: int

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compile_only(arch: int, wanted: str = "") -> Iterator[list[tuple[Any, Any, dict]]]:
    """Kernels launched within are compiled for an architecture instead, and listed: (kernel, compiled, constants).

    Args:
        wanted: the one kernel to compile, by its `name_of`; default: all of them.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, launched = JITFunction.run, []

    def compile_(self, *args, grid, warmup, **constants):
        if wanted in ("", name_of(self)):
            launched.append((self, run(self, *args, grid=grid, warmup=True, **constants), constants))

    driver.set_active(_Driver(arch))
    pretended = {"get_device_capability": lambda device: divmod(arch, 10), "device": lambda device: nullcontext()}
    with mock.patch.object(JITFunction, "run", compile_), mock.patch.multiple(torch.cuda, **pretended), _PretendGPU():
        yield launched


def compiled(arch: int, jobs: list[tuple[str, list | None]]) -> list[list[Row]]:
    """The rows of each job of `rows_of`, in this process; Triton must have been imported without TRITON_INTERPRET."""
    with ThreadPoolExecutor(1) as reader:  # the disassembler works while Triton compiles what comes next
        pending = [[reader.submit(row_of, *launch, job[0], arch) for launch in launched(arch, *job)] for job in jobs]
        return [[row.result() for row in rows] for rows in pending]


def launched(arch: int, name: str, values: list | None) -> list[tuple[Any, Any, dict]]:
    """What a job launches; of launches whose code is the same, the last."""
    entry = spec.entries().get(name)
    with compile_only(arch, entry.kernel if entry else "") as found:
        if entry:
            with entry.launched_as(arch, entry.launch(arch, values)):
                entry.compile()
        else:
            for launch in spec.launchers(name):
                launch()
    return list({code.hash: (kernel, code, constants) for kernel, code, constants in found}.values())


def name_of(kernel) -> str:
    """Its file and what it does, as in `spec.Op.work`."""
    op = kernel.fn.__module__.split(".")[-1].removesuffix("_triton").removesuffix("_forward").removesuffix("_backward")
    return f"{op} {kernel.fn.__name__.strip('_').removesuffix('_kernel')}"


def row_of(kernel, compiled, constants: dict, form: str, arch: int) -> Row:
    name = name_of(kernel)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    code = Code.read(compiled.asm["cubin"], arch, warps, shared)
    unpadded = {"PIECES": (spec.PHI2.D,)} if form == spec.PADDED else {}
    works = {name: work for op in spec.OPS.values() for name, work in op.work.items()}
    types = {argument.removesuffix("_ptr"): _first(type_) for argument, type_ in compiled.src.signature.items()}
    work, chip = works[name](**types | constants | unpadded), CHIPS[arch]
    clocks = code.clocks(code.main_loop, work.dram_bytes)
    needed = max(work.multiply_adds / chip.tensor, work.float32 / chip.fp32, clocks["dram"])
    bound = max(clocks, key=clocks.get)
    return Row(
        kernel=name,
        launch=_launch(types, constants | unpadded),
        form=form,
        arch=arch,
        warps=warps,
        registers=code.registers,
        stack=code.stack,
        shared=shared,
        programs=code.programs,
        copies=code.async_copies,
        is_written_behind=code.is_written_behind,
        multiply_adds=[code.multiply_adds(loop) for loop in code.matrix_loops],
        useful=work.multiply_adds,
        clocks={unit: round(clock, 1) for unit, clock in clocks.items()},
        bound=bound,
        efficiency=round(needed / clocks[bound], 3),
    )


def _first(type_: str | tuple) -> str:
    """Of a tensor its pointer's type, of several tensors the first one's."""
    return _first(type_[0]) if isinstance(type_, tuple) else type_


def _launch(types: dict[str, str], constants: dict[str, Any]) -> str:
    tile = [
        f"{name.removeprefix('BLOCK_').lower()}{value}"
        for name, value in constants.items()
        if name.startswith("BLOCK_") or name == "M"
    ]
    flags = [name.lower() for name, value in constants.items() if value is True and name.isupper()]
    pieces = [f"d{sum(constants['PIECES'])}"] if "PIECES" in constants else []
    exact = ["float32"] if types.get("q") == "*fp32" else []
    given = [name for name in ("until", "scales", "zeros") if types.get(name, "constexpr") != "constexpr"]
    return " ".join([*pieces, *exact, *tile, *flags, *given])


def measure(forms: Iterable[str] = spec.FORMS, architectures: Iterable[int] = CHIPS) -> list[Row]:
    """All that is launched in these forms, for these architectures."""
    jobs = [(form, None) for form in forms]
    with ThreadPoolExecutor(len(CHIPS)) as pool:
        found = pool.map(lambda arch: rows_of(arch, jobs), architectures)
        return [row for jobs in found for rows in jobs for row in rows]


def rows_of(arch: int, jobs: list[tuple[str, Any]]) -> list[list[Row]]:
    """Compiles in a process without interpreter.

    Args:
        jobs: a form and None; or the name of an entry, and the values of the launch with which it is compiled.
    """
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    clean |= {"TRITON_DISABLE_LINE_INFO": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "benchmarks.harness.aot", str(arch), json.dumps(jobs)]
    process = subprocess.run(command, env=clean, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise ChildProcessError(f"benchmarks.harness.aot ended with exit code {process.returncode}")
    return [[Row(**row) for row in rows] for rows in json.loads(process.stdout)]


if __name__ == "__main__":
    load()
    found = compiled(int(sys.argv[1]), json.loads(sys.argv[2]))
    print(json.dumps([[asdict(row) for row in rows] for rows in found]))
