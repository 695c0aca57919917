"""Launches compiled for an A100 and an H100 where there is neither, and held to their budgets.

The launchers run as they do in training, on tensors that have a shape and a dtype but no memory and say they are on a
GPU; Triton specialises and compiles what they launch, and the launch itself is left out. So what is read here is the
code that a GPU would run, down to the divisibility of strides. `sass.py` reads it.

Triton's cache keeps what it compiled: a launch is compiled once, whoever asks.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from benchmarks.harness import sass, spec
from benchmarks.harness.sass import Code
from benchmarks.harness.spec import Launch
from benchmarks.registry import Cells, load
from phi2_kernels._dispatch import architecture

STACK = 16  # bytes of a thread that may not fit its registers
TILED = ("attention forward", "attention dkdv", "attention dq")  # tiles go from DRAM to the matrix instructions
IN_PLACE = ("linear_logprob stats",)  # a half-precision gradient over its own logits
WANTED_WARPS = 8  # a multiprocessor should hold, two for each of its schedulers
SHARED = {80: 164 * 1024, 90: 228 * 1024}  # bytes of a multiprocessor; each of its programs costs 1 KiB more
REGISTERS, WARPS, PROGRAMS = 65536, 64, 32  # of a multiprocessor, on both


@dataclass(frozen=True)
class Row:
    """One launch, compiled.

    Attributes:
        launch: the tile, and what is switched on.
        form: one of `spec.FORMS`, or the entry that it is a candidate of.
        target: what its PTX is for.
        registers, stack: of a thread; the stack is in bytes, and so is the shared memory of a program.
        copies: instructions that copy from global to shared memory past the registers, of the loop with the fewest.
        is_written_behind: every loop that reads and writes does so with a barrier between.
        multiply_adds: of one round of each loop with matrix instructions.
        useful: multiply-adds that the round of such a loop needs; 0 for kernels without.
    """

    kernel: str
    launch: str
    form: str
    arch: int
    target: str
    warps: int
    registers: int
    stack: int
    shared: int
    copies: int
    is_written_behind: bool
    multiply_adds: list[int]
    useful: int

    @property
    def programs(self) -> int:
        """How many programs a multiprocessor holds at a time."""
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        by_shared = SHARED[self.arch] // (self.shared + 1024)
        return min(by_registers, by_shared, WARPS // self.warps, PROGRAMS)

    @property
    def violations(self) -> list[str]:
        """Which budgets a launch breaks, in words; none for what may be shipped."""
        warps = self.programs * self.warps
        found = {
            f"{self.shared} bytes of shared memory": self.shared > SHARED[self.arch] - 1024,
            f"{self.stack} bytes of stack": self.stack > STACK,
            f"{warps} warps on a multiprocessor, {WANTED_WARPS} wanted": warps < WANTED_WARPS,
            f"{self.multiply_adds} multiply-adds a tile, {self.useful} useful": (
                set(self.multiply_adds) != {self.useful} - {0}
            ),
            "writes that may overtake reads": self.kernel in IN_PLACE and not self.is_written_behind,
            "no asynchronous copies": self.arch == 80 and self.useful and not self.copies and self.kernel in TILED,
        }
        return [text for text, is_broken in found.items() if is_broken]

    @property
    def cells(self) -> Cells:
        """A line of a table."""
        return asdict(self) | {"programs": self.programs, "violations": ", ".join(self.violations)}


def compiled(jobs: list[tuple[int, str, Launch | None]]) -> list[list[Row]]:
    """What each job compiles to, in processes that are not told to interpret.

    Args:
        jobs: an architecture with a form and None; or with the name of an entry, and a launch to compile it with.
    """
    with mock.patch.dict(os.environ, TRITON_DISABLE_LINE_INFO="1"):
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=load) as pool:
            return list(pool.map(_rows, *zip(*jobs, strict=True)))


def _rows(arch: int, name: str, launch: Launch | None) -> list[Row]:
    """Of launches whose code is the same, the last."""
    if launch is None:
        with compile_only(arch) as found:
            spec.FORMS[name]()
    else:
        entry = spec.ENTRIES[name]
        with compile_only(arch, entry.kernel) as found, entry.launched_as(arch, launch):
            entry.compile()
    different = list({compiled.hash: (kernel, compiled, constants) for kernel, compiled, constants in found}.values())
    codes = sass.read([compiled.asm["cubin"] for _, compiled, _ in different], arch)
    return [_row(*each, code, name, arch) for each, code in zip(different, codes, strict=True)]


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


@contextmanager
def compile_only(arch: int, wanted: str = "") -> Iterator[list[tuple[Any, Any, dict]]]:
    """Kernels launched within are compiled for an architecture instead, and listed: (kernel, compiled, constants).

    Args:
        wanted: the one kernel to compile, by its `name_of`; default: all of them.
    """
    from triton.runtime.jit import JITFunction

    run, launched = JITFunction.run, []

    def compile_(self, *args, grid, warmup, **constants):
        if wanted in ("", name_of(self)):
            launched.append((self, run(self, *args, grid=grid, warmup=True, **constants), constants))

    pretended = {"get_device_capability": lambda device: divmod(arch, 10), "current_device": lambda: 0}
    architecture.cache_clear()
    with mock.patch.object(JITFunction, "run", compile_), mock.patch.multiple(torch.cuda, **pretended):
        with pretended_driver(arch), _PretendGPU():
            yield launched


@contextmanager
def pretended_driver(arch: int) -> Iterator[None]:
    """Within, Triton compiles for an architecture, and asks no GPU's driver."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    asked = SimpleNamespace(
        get_current_device=lambda: arch,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )
    with mock.patch.object(driver, "_active", asked):
        yield


def name_of(kernel) -> str:
    """Its file and what it does: "gelu forward"."""
    op = kernel.fn.__module__.split(".")[-1].removesuffix("_triton").removesuffix("_forward").removesuffix("_backward")
    return f"{op} {kernel.fn.__name__.strip('_').removesuffix('_kernel')}"


def _row(kernel, compiled, constants: dict, code: Code, form: str, arch: int) -> Row:
    name, warps = name_of(kernel), compiled.metadata.num_warps
    types = {argument.removesuffix("_ptr"): _first(type_) for argument, type_ in compiled.src.signature.items()}
    constants = constants | ({"PIECES": (spec.PHI2.D,)} if form == spec.PADDED else {})  # what is useful of the tiles
    useful = spec.USEFUL.get(name, lambda **_: 0)
    products = [loop for loop in code.loops if sass.multiply_adds(loop, warps)]
    return Row(
        kernel=name,
        launch=_launch(types, constants),
        form=form,
        arch=arch,
        target=re.search(r"\.target (\w+)", compiled.asm["ptx"])[1],
        warps=warps,
        registers=code.registers,
        stack=code.stack,
        shared=compiled.metadata.shared,
        copies=min(map(sass.async_copies, products or [code.instructions])),
        is_written_behind=all(map(sass.is_written_behind, code.loops)),
        multiply_adds=[sass.multiply_adds(loop, warps) for loop in products],
        useful=useful(**types | constants),
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
