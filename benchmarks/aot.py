"""Every kernel's shipped launches, compiled for an A100 and an H100 where there is neither, and held to their budgets.

The launchers run as they do in training, on tensors that have a shape and a dtype but no memory and say they are on a
GPU; Triton specialises and compiles what they launch, and the launch itself is left out. So what is read here is the
code that a GPU would run, down to the divisibility of strides. `benchmarks/sass.py` reads it.

    python -m benchmarks.run --case aot_report

Beside the shipped launches there are two that must not pass: attention padded from 80 to 128 dims, and attention on
strides that Triton knows nothing of.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from benchmarks.registry import GateError, Measure, Report, Spread, case
from benchmarks.sass import CHIPS, Code

B, H, S, D, C, F, V = 8, 32, 2048, 80, 2560, 10240, 51200  # a training step of Phi-2
N = B * S
STACK = 16  # bytes of a thread that may not fit its registers
TILED = ("attention forward", "attention dkdv", "attention dq")  # tiles go from DRAM to the matrix instructions
WARPS = 8  # a multiprocessor should hold, two for each of its schedulers


@dataclass(frozen=True)
class Row:
    """One launch, compiled.

    Attributes:
        launch: the tile, and what is switched on.
        form: "shipped", or which control it is.
        programs: how many of them a multiprocessor holds at a time.
        copies: instructions that copy from global to shared memory past the registers.
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
        "no asynchronous copies": row.arch == 80 and row.useful > 0 and row.copies == 0 and row.kernel in TILED,
    }
    return [text for text, is_broken in found.items() if is_broken]


class Work(NamedTuple):
    """What one round of a kernel's main loop needs, or one program where there is no loop."""

    multiply_adds: int = 0  # on tensor cores
    dram_bytes: int = 0


WORK: dict[str, Callable[..., Work]] = {  # of a launch's constants and the types of its pointers
    "attention forward": lambda BLOCK_M, BLOCK_N, **_: Work(2 * BLOCK_M * BLOCK_N * D),
    "attention delta": lambda BLOCK_M, **_: Work(dram_bytes=BLOCK_M * D * 4),
    "attention dkdv": lambda BLOCK_M, BLOCK_N, **_: Work(4 * BLOCK_M * BLOCK_N * D),
    "attention dq": lambda BLOCK_M, BLOCK_N, **_: Work(3 * BLOCK_M * BLOCK_N * D),
    "gelu forward": lambda BLOCK_N, BLOCK_F, **_: Work(dram_bytes=BLOCK_N * BLOCK_F * 4),
    "gelu backward": lambda BLOCK_N, BLOCK_F, **_: Work(dram_bytes=BLOCK_N * BLOCK_F * 6),
    "layer_norm forward": lambda **_: Work(dram_bytes=C * 4),
    "layer_norm backward": lambda **_: Work(dram_bytes=C * 8),
    "rotary turn": lambda BLOCK_H, HALF, **_: Work(dram_bytes=BLOCK_H * HALF * 8),
    "rotary turn_and_store": lambda BLOCK_H, **_: Work(dram_bytes=BLOCK_H * D * 4),
    "linear_logprob stats": lambda BLOCK_V, **_: Work(dram_bytes=BLOCK_V * 4),
    "linear_logprob gradient": lambda BLOCK_V, **_: Work(dram_bytes=BLOCK_V * 6),
    "decode_attention attend": lambda BLOCK_S, **_: Work(dram_bytes=BLOCK_S * D * 4),
    "decode_attention join": lambda BLOCK_SPLITS, **_: Work(dram_bytes=BLOCK_SPLITS * D * 4),
    "gemv each": lambda codes, **constants: product_work(codes, **constants),
    "gemv sum": lambda codes, **constants: product_work(codes, **constants),
}


def product_work(codes: tuple[str, ...], BLOCK_N: int, BLOCK_K: int, GROUP: int, PARTS: int, **_) -> Work:
    """One round of a product's loop: codes and, for int4, scales and zeros; on tensor cores eight rows of x.

    Args:
        codes: the types of their pointers.
    """
    bits = {"*bf16": 16, "*i8": 8, "*u8": 4 + 32 // max(1, GROUP)}[codes[0]]
    matmuls = 0 if PARTS == 0 else 2 if GROUP else 1  # int4: codes by x, and ones by x
    return Work(8 * matmuls * BLOCK_N * BLOCK_K, BLOCK_N * BLOCK_K * bits // 8)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def floats(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.float32)


def whole(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int32)


def attention() -> None:
    """Plain causal, and over packed documents."""
    from phi2_kernels import attention_backward_triton, attention_forward_triton, attention_tiles_triton

    q, o, lse = heads(3 * H * D), heads(H * D), floats(B, H, S)
    until, blocks = whole(B, S), [attention_tiles_triton.launch_of(kernel, q) for kernel in ("forward", "dkdv")]
    ranges, ends = whole(B, S // blocks[0].block_m, 6), whole(B, S // blocks[1].block_n, 2)
    attention_forward_triton.forward(q, q, q, o, lse)
    attention_backward_triton.backward(o, q, q, q, o, lse, q, q, q)
    attention_forward_triton.forward(q, q, q, o, lse, until, ranges)
    attention_backward_triton.backward(o, q, q, q, o, lse, q, q, q, until, ranges, ends)


def heads(row: int) -> Tensor:
    """(B, H, S, D): the heads of q, k or v in a buffer whose rows are so long."""
    return torch.empty_strided((B, H, S, D), (S * row, D, row, 1), dtype=torch.bfloat16, device="cuda")


def gelu() -> None:
    from phi2_kernels import gelu_triton

    x, y, bias = empty(N, F), empty(N, F), empty(F)
    gelu_triton.forward(x, bias, y)
    for sums in (False, True):
        gelu_triton.backward(y, x, bias, x, sums=sums)


def layer_norm() -> None:
    from phi2_kernels import layer_norm_triton

    x, weight, mean = empty(N, C), empty(C), floats(N)
    layer_norm_triton.forward(x, weight, weight, 1e-5, x, mean, mean)
    for sums in (False, True):
        layer_norm_triton.backward(x, x, weight, mean, mean, x, x, sums=sums)


def rotary() -> None:
    from phi2_kernels import rotary_triton

    angles, positions = floats(S, 16), whole(N)
    rotary_triton.turn(empty(N, 3 * H, D)[:, : 2 * H], angles, angles, positions, False)
    q, cache = empty(B, H, D), empty(B, H, S, D)
    rotary_triton.turn_and_store(q, q, q, angles, angles, positions[:B], positions[:B], cache, cache)


def linear_logprob() -> None:
    from phi2_kernels import linear_logprob_triton

    n = 2048
    logits, targets, logp = floats(n, V), empty(n, dtype=torch.int64), floats(n)
    linear_logprob_triton.stats(logits, empty(V), targets, logp, logp, logp, torch.bfloat16)
    linear_logprob_triton.gradient(logits, empty(V), targets, logp, logp, torch.bfloat16)


def decode() -> None:
    from phi2_kernels import decode_attention_triton

    q, cache = empty(1, H, 1, D), empty(1, H, S, D)
    decode_attention_triton.attend(q, cache, cache, whole(1), whole(1, S), q)


def gemv(form: str, M: int) -> None:
    """M rows into a layer and out of it."""
    from phi2_kernels import gemv_triton

    x, m = empty(M, C), empty(M, F)
    gemv_triton.each(x, *weights(form, (C, C), (C, C), (C, C), (F, C)), True, [empty(M, N) for N in (C, C, C, F)])
    gemv_triton.summed(x, [x, m], *weights(form, (C, C), (C, F)), x)


def weights(form: str, *sizes: tuple[int, int]) -> list[list[Tensor]]:
    """Codes, scales, zeros and biases of weights (N, K)."""
    biases = [empty(N) for N, _ in sizes]
    if form == "half":
        return [[empty(*size) for size in sizes], [], [], biases]
    if form == "int8":
        return [[empty(*size, dtype=torch.int8) for size in sizes], [empty(N) for N, _ in sizes], [], biases]
    groups = [empty(N, K // 32) for N, K in sizes]
    return [[empty(N, K // 2, dtype=torch.uint8) for N, K in sizes], groups, groups, biases]


def padded() -> None:
    """Causal attention with 128 dims in the place of 80, not even masked: the least that padding costs."""
    from phi2_kernels import attention_backward_triton, attention_forward_triton, attention_tiles_triton

    q, o, lse = heads(3 * H * D), heads(H * D), floats(B, H, S)
    with mock.patch.object(attention_tiles_triton, "pieces_of", lambda D: (128,)):
        attention_forward_triton.forward(q, q, q, o, lse)
        attention_backward_triton.backward(o, q, q, q, o, lse, q, q, q)


def unaligned() -> None:
    """Causal attention on rows whose length no power of two divides."""
    from phi2_kernels import attention_forward_triton

    q = heads(3 * H * D + 1)
    attention_forward_triton.forward(q, q, q, heads(H * D), floats(B, H, S))


PADDED, UNALIGNED = "padded", "unaligned"
GEMVS = [partial(gemv, form, M) for M in (1, 8) for form in ("half", "int8", "int4")]
FORMS = {
    "shipped": (attention, gelu, layer_norm, rotary, linear_logprob, decode, *GEMVS),
    PADDED: (padded,),
    UNALIGNED: (unaligned,),
}


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


def compiled_rows() -> list[Row]:
    """Compiles every form for both architectures. Triton must have been imported without TRITON_INTERPRET."""
    pending: list[Future[Row]] = []
    with ThreadPoolExecutor(1) as reader:  # the disassembler works while Triton compiles what comes next
        for arch in CHIPS:
            for form, launches in FORMS.items():
                with compile_only(arch) as launched:
                    for launch in launches:
                        launch()
                pending += [reader.submit(row_of, *launch, form, arch) for launch in distinct(launched)]
    return [row.result() for row in pending]


def distinct(launched: list[tuple[Any, Any, dict]]) -> list[tuple[Any, Any, dict]]:
    """Of launches whose code is the same, the last."""
    return list({compiled.hash: (kernel, compiled, constants) for kernel, compiled, constants in launched}.values())


def name_of(kernel) -> str:
    """Its file and what it does, as in the table `WORK`."""
    op = kernel.fn.__module__.split(".")[-1].removesuffix("_triton").removesuffix("_forward").removesuffix("_backward")
    return f"{op} {kernel.fn.__name__.strip('_').removesuffix('_kernel')}"


def row_of(kernel, compiled, constants: dict, form: str, arch: int) -> Row:
    name = name_of(kernel)
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    code = Code.read(compiled.asm["cubin"], arch, warps, shared)
    work = WORK[name](**compiled.src.signature | constants)
    clocks = code.clocks(code.main_loop, work.dram_bytes)
    needed = max(work.multiply_adds / CHIPS[arch].tensor, clocks["dram"])
    bound = max(clocks, key=clocks.get)
    return Row(
        kernel=name,
        launch=_launch(compiled.src.signature, constants),
        form=form,
        arch=arch,
        warps=warps,
        registers=code.registers,
        stack=code.stack,
        shared=shared,
        programs=code.programs,
        copies=code.async_copies,
        multiply_adds=[code.multiply_adds(loop) for loop in code.matrix_loops],
        useful=work.multiply_adds,
        clocks={unit: round(clock, 1) for unit, clock in clocks.items()},
        bound=bound,
        efficiency=round(needed / clocks[bound], 3),
    )


def _launch(signature: dict[str, str], constants: dict[str, Any]) -> str:
    tile = [
        f"{name.removeprefix('BLOCK_').lower()}{value}"
        for name, value in constants.items()
        if name.startswith("BLOCK_") or name == "M"
    ]
    flags = [name.lower() for name, value in constants.items() if value is True and name.isupper()]
    given = [name for name in ("until_ptr", "scales", "zeros") if signature.get(name, "constexpr") != "constexpr"]
    return " ".join([*tile, *flags, *given])


def measure() -> list[Row]:
    """`compiled_rows` of a process of its own."""
    return [Row(**row) for row in json.loads(printed_by("benchmarks.aot"))]


def printed_by(module: str, *arguments: str) -> str:
    """What `python -m module` prints in a process that has no interpreter and an empty cache."""
    with TemporaryDirectory() as cache:
        clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        clean |= {"TRITON_CACHE_DIR": cache, "TRITON_DISABLE_LINE_INFO": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", module, *arguments]
        process = subprocess.run(command, env=clean, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise ChildProcessError(f"{module} ended with exit code {process.returncode}")
    return process.stdout


@case("aot_report", turns=1, summary="what the shipped kernels occupy and issue, compiled for sm_80 and sm_90")
def aot_report(turns: int) -> Report:
    rows = measure()
    shipped = [row for row in rows if row.form == "shipped"]
    broken = [f"{row.kernel} {row.launch} for sm_{row.arch}: {text}" for row in shipped for text in violations(row)]
    if broken:
        raise GateError("; ".join(broken))
    return Report(
        peer={"padded-to-128": metadata.version("triton")},
        gate=f"all {len(shipped)} shipped launches are within their budgets",
        measures=[measure for row in rows if row.form == PADDED and row.useful for measure in _against(shipped, row)],
        facts={"efficiency": "clocks of the useful work by those of the busiest unit, if all units overlap; a model"},
        table=[_cells(row) for row in rows],
    )


def _against(shipped: list[Row], padded: Row) -> list[Measure]:
    """A padded launch beside the shipped one that it is a form of."""
    ours = next(x for x in shipped if (x.kernel, x.launch, x.arch) == (padded.kernel, padded.launch, padded.arch))
    quantities = {
        "multiply-adds a tile": ("Mi", [max(row.multiply_adds) / 2**20 for row in (ours, padded)], False),
        "shared memory": ("KiB", [row.shared / 1024 for row in (ours, padded)], False),
        "static efficiency": ("of 1", [row.efficiency for row in (ours, padded)], True),
    }
    which = f"sm_{ours.arch} {ours.kernel.removeprefix('attention ')}"
    return [
        Measure(f"{which}: {name}", unit, *(Spread.of([x]) for x in values), more_is_better=more)
        for name, (unit, values, more) in quantities.items()
    ]


def _cells(row: Row) -> dict[str, str | int | float]:
    """A line of the table."""
    return {
        "kernel": row.kernel,
        "launch": row.launch,
        "form": row.form,
        "sm": row.arch,
        "warps": row.warps,
        "regs": row.registers,
        "stack B": row.stack,
        "shared KiB": round(row.shared / 1024, 1),
        "CTAs": row.programs,
        "16-B copies": row.copies,
        "MMA of useful": round(max(row.multiply_adds, default=0) / row.useful, 2) if row.useful else "",
        "bound by": row.bound,
        "efficiency": row.efficiency,
        "over budget": ", ".join(violations(row)),
    }


if __name__ == "__main__":
    print(json.dumps([asdict(row) for row in compiled_rows()]))
