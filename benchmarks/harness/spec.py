"""What `benchmarks/tune.py` tunes: entries of the launch tables, and for each the few launches that may be better.

They are those that theory leaves: enough warps to hide memory, accumulators that fit the registers, and in attention no
tile whose warps would do the same work twice. Among hundreds the clock would pick the luckiest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from benchmarks.harness import calls
from benchmarks.harness import launches as aot_launches
from benchmarks.harness.gpu import Inputs, Outputs

Launch = Any  # a NamedTuple or a dict, as the table has it


@dataclass(frozen=True)
class Op:
    """An entry of a launch table.

    Attributes:
        entry: the file in `phi2_kernels` whose LAUNCH is meant, and the key in LAUNCH[architecture].
        kernel: what it launches, by its name in `aot_launches.WORK`.
        candidates: by architecture, the values of a launch in the order of its fields. The shipped one may be missing.
        compiles: launches the kernel, among others, in all its forms; for `aot.compile_only`.
        inputs: of a device and a seed.
        call: what is timed.
        flag: where two entries have one kernel, what only launches of this one have; with "no " before it, lack.
        in_graph: the call is so short that it is timed in a CUDA graph.
    """

    entry: tuple[str, str]
    kernel: str
    candidates: dict[int, list[tuple]]
    compiles: Callable[[], None]
    inputs: Callable[[torch.device, int], Inputs]
    call: Callable[..., Outputs]
    flag: str = ""
    in_graph: bool = False

    def table(self, arch: int) -> dict[str, Launch]:
        """The entries of an architecture, among them this one. Launchers read them at each launch."""
        return import_module(f"phi2_kernels.{self.entry[0]}").LAUNCH[arch]

    def shipped(self, arch: int) -> Launch:
        return self.table(arch)[self.entry[1]]

    def launches(self, arch: int) -> list[Launch]:
        """The shipped one, then the others."""
        shipped = self.shipped(arch)
        candidates = (self.launch(arch, values) for values in self.candidates[arch])
        return [shipped, *(candidate for candidate in candidates if candidate != shipped)]

    def launch(self, arch: int, values: tuple) -> Launch:
        """Of the fields that the shipped one has."""
        shipped = self.shipped(arch)
        if isinstance(shipped, dict):
            return dict(zip(shipped, values, strict=True))
        return type(shipped)(*values)

    def has_made(self, flags: str) -> bool:
        """Whether a launch of the kernel with such flags (see `aot.Row.launch`) is by this entry."""
        flag = self.flag.removeprefix("no ")
        return not flag or (flag in flags.split()) != self.flag.startswith("no ")


@contextmanager
def launched_as(op: Op, arch: int, launch: Launch) -> Iterator[None]:
    """Within, the table has this launch in the place of the shipped one."""
    with mock.patch.dict(op.table(arch), {op.entry[1]: launch}):
        yield


def label(launch: Launch) -> str:
    fields = launch if isinstance(launch, dict) else launch._asdict()
    return " ".join(f"{name.removeprefix('BLOCK_').lower()}={value}" for name, value in fields.items())


def on_both(*candidates: tuple) -> dict[int, list[tuple]]:
    """The same for every architecture."""
    return {80: [*candidates], 90: [*candidates]}


def gelu(entry: str, call: Callable[..., Outputs]) -> Op:
    candidates = on_both((4, 1024, 4), (1, 1024, 4), (2, 1024, 4), (1, 2048, 4), (4, 1024, 8))
    return Op(("gelu_triton", entry), f"gelu {entry}", candidates, aot_launches.gelu, calls.gelu_inputs, call)


def gemv(form: str, M: int, candidates: dict[int, list[tuple]]) -> Op:
    """Into a layer and out of it, by one entry."""
    entry = form if M == 1 else f"{form} rows"
    inputs = partial(calls.layer_inputs, form, M)
    return Op(
        ("gemv_triton", entry),
        "gemv each",
        candidates,
        partial(aot_launches.gemv, form, M),
        inputs,
        calls.layer,
        in_graph=True,
    )


OPS = {
    # block_m queries, block_n keys, warps, stages. With 16 rows a warp, shared memory binds; with 32, registers do.
    "attention_forward": Op(
        ("attention_tiles_triton", "forward"),
        "attention forward",
        {
            80: [(128, 64, 4, 3), (128, 32, 4, 3), (128, 64, 8, 2), (128, 64, 4, 2), (64, 64, 4, 3)],
            90: [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3)],
        },
        aot_launches.attention,
        calls.attention_inputs,
        calls.attention_forward,
    ),
    "attention_dkdv": Op(
        ("attention_tiles_triton", "dkdv"),
        "attention dkdv",
        {
            80: [(32, 64, 4, 2), (32, 64, 4, 3), (32, 128, 8, 2), (64, 64, 4, 2), (64, 128, 8, 2)],
            90: [(64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2)],
        },
        aot_launches.attention,
        calls.attention_inputs,
        calls.attention_backward,
    ),
    "attention_dq": Op(
        ("attention_tiles_triton", "dq"),
        "attention dq",
        {
            80: [(128, 32, 4, 2), (128, 32, 4, 3), (128, 32, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2)],
            90: [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 2), (64, 64, 4, 2)],
        },
        aot_launches.attention,
        calls.attention_inputs,
        calls.attention_backward,
    ),
    # warps; a row is 2560 columns
    **{
        f"layer_norm_{entry}": Op(
            ("layer_norm_triton", entry),
            f"layer_norm {entry.removesuffix('_sums')}",
            on_both((1,), (2,), (4,), (8,)),
            aot_launches.layer_norm,
            calls.norm_inputs,
            call,
            flag,
        )
        for entry, call, flag in (
            ("forward", calls.norm_forward, ""),
            ("backward", partial(calls.norm_backward, False), "no sums"),
            ("backward_sums", partial(calls.norm_backward, True), "sums"),
        )
    },
    # rows, columns, warps
    "gelu_forward": gelu("forward", calls.gelu_forward),
    "gelu_backward": gelu("backward", calls.gelu_backward),
    # heads, warps
    "apply_rotary": Op(
        ("rotary_triton", "apply_rotary"),
        "rotary apply_rotary",
        on_both((32, 1), (16, 1), (64, 1), (32, 2), (64, 2)),
        aot_launches.rotary,
        calls.rotary_inputs,
        calls.apply_rotary,
    ),
    "apply_rotary_and_store": Op(
        ("rotary_triton", "apply_rotary_and_store"),
        "rotary apply_rotary_and_store",
        on_both((16, 1), (8, 1), (32, 1), (16, 2), (32, 2)),
        aot_launches.rotary,
        calls.token_inputs,
        calls.apply_rotary_and_store,
        in_graph=True,
    ),
    # columns at a time, warps
    "linear_logprob_stats": Op(
        ("linear_logprob_triton", "stats"),
        "linear_logprob stats",
        on_both((8192, 32), (4096, 32), (4096, 16), (8192, 16), (2048, 8)),
        aot_launches.linear_logprob,
        calls.logits_inputs,
        calls.stats,
    ),
    "linear_logprob_gradient": Op(
        ("linear_logprob_triton", "gradient"),
        "linear_logprob gradient",
        on_both((4096, 8), (2048, 4), (2048, 8), (4096, 16), (8192, 16)),
        aot_launches.linear_logprob,
        calls.logits_inputs,
        calls.gradient,
    ),
    # keys at a time, stages, warps
    "decode_attention": Op(
        ("decode_attention_triton", "attend"),
        "decode_attention attend",
        on_both((32, 3, 4), (16, 3, 4), (32, 2, 4), (32, 4, 4), (64, 3, 4), (64, 3, 8)),
        aot_launches.decode,
        calls.query_inputs,
        calls.decode_attention,
        in_graph=True,
    ),
    # columns, rows, warps, stages
    **{
        f"gemv_{form}": gemv(
            form,
            1,
            on_both((512, 8, 4, 1), (512, 4, 4, 1), (1024, 4, 4, 1), (1024, 8, 8, 1), (512, 16, 8, 1), (256, 8, 4, 1)),
        )
        for form in ("half", "int8", "int4")
    },
    **{
        f"gemv_{form}_rows": gemv(
            form,
            8,
            on_both(
                (256, 16, 4, 3), (256, 16, 4, 4), (512, 16, 4, 3), (512, 16, 8, 3), (256, 16, 8, 1), (256, 32, 8, 1)
            ),
        )
        for form in ("half", "int8", "int4")
    },
}
