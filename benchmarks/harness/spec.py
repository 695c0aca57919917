"""One spec a launch: what its kernel must compute, how it is called, and which other launches may be better.

Specs stand in benchmarks/cases, beside the benchmark case of their op. From them come the launches that `aot.py`
compiles and holds to their budgets, and the candidates that `benchmarks/tune.py` compiles, checks and times.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from math import prod
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.harness import comparison
from benchmarks.harness.comparison import Outputs

SHIPPED = "shipped"  # what Phi-2 launches in half precision
ALSO_SHIPPED, OTHER_WIDTHS = "64 dims, float32", "other widths"  # of heads
AS_SM80 = "sm_80"  # what an A100 launches, whatever the architecture
PADDED, UNALIGNED, UNORDERED = "padded", "unaligned", "unordered"  # must not pass
ARCHITECTURES = (80, 90)
FAKE = torch.device("meta")  # of tensors that are only compiled for
Launch = Any  # a NamedTuple or a dict, as the table has it
Texts = dict[str, Any]  # arguments by name: texts that `make` understands, lists of them, and what is passed as it is


class Shapes(NamedTuple):
    """Of a training step of Phi-2, and of a decode step behind S tokens."""

    B: int = 8
    H: int = 32
    S: int = 2048
    D: int = 80
    N: int = 8 * 2048  # rows
    C: int = 2560
    F: int = 10240
    V: int = 51200
    CHUNK: int = 2048  # rows of logits
    half: torch.dtype = torch.bfloat16


PHI2 = Shapes()


def make(text: str, shapes: Shapes, device: torch.device, normal: Callable[..., Tensor] | None) -> Tensor | int:
    """The tensor or the number that a text describes; on FAKE tensors have no numbers.

    "N 2H C/32"              small normal numbers in half precision
    "N:float32"              in another dtype
    "N:int32%S", "1:int32=S" counted from 0, by a modulus; all the same
    "B S H D -> B H S D"     a view with another order of dims
    "#3C"                    the number itself
    """
    if text.startswith("#"):
        return _size(text[1:], shapes)
    text, _, kind = text.partition(":")
    order, _, view = text.partition("->")
    size = [_size(term, shapes) for term in order.split()]
    name, rule, number = re.fullmatch(r"(\w*)([%=]?)(\w*)", kind).groups()
    dtype = getattr(torch, name) if name else shapes.half
    if device == FAKE:
        x = torch.empty(size, dtype=dtype, device=device)
    elif rule == "=":
        x = torch.full(size, _size(number, shapes), dtype=dtype, device=device)
    elif rule == "%":
        x = (torch.arange(prod(size), device=device) % _size(number, shapes)).view(size).to(dtype)
    else:
        x = normal(*size, dtype=dtype, scale=0.1)
    return x.permute([order.split().index(dim) for dim in view.split()]) if view else x


def _size(term: str, shapes: Shapes) -> int:
    """Of a dim: "C", "2H", "C/32" or a number."""
    factor, name, divisor = re.fullmatch(r"(\d*)([A-Z]*)/?(\d*)", term).groups()
    return int(factor or 1) * (getattr(shapes, name) if name else 1) // int(divisor or 1)


@dataclass(frozen=True)
class Call:
    """A call of a launcher at the shapes of Phi-2.

    Attributes:
        launcher: "file.function" in `phi2_kernels`.
        arguments: by name, what it writes among them. The first is the launcher's first.
        also: what stands in the place of some of them when it is compiled once more.
    """

    launcher: str
    arguments: Texts
    also: Texts = field(default_factory=dict)

    def inputs(self, shapes: Shapes, device: torch.device, seed: int, **changes: Any) -> dict[str, Any]:
        normal = None if device == FAKE else comparison.random(seed, device)
        one = partial(make, shapes=shapes, device=device, normal=normal)
        return tree_map(lambda x: one(x) if isinstance(x, str) else x, self.arguments | changes)

    def run(self, inputs: dict[str, Any]) -> Outputs:
        """All tensors that it was given, which it may have written over, and those that it returned, by name."""
        first, *others = inputs
        module, _, function = self.launcher.partition(".")
        launch = getattr(import_module(f"phi2_kernels.{module}"), function)
        outputs = inputs | {"returned": launch(inputs[first], **{name: inputs[name] for name in others})}
        tensors = {name: [x for x in tree_leaves(given) if isinstance(x, Tensor)] for name, given in outputs.items()}
        return {f"{name}[{i}]" if i else name: x for name, xs in tensors.items() for i, x in enumerate(xs)}

    def compile(self, shapes: Shapes, **changes: Any) -> None:
        """For `aot.compile_only`."""
        self.run(self.inputs(shapes, FAKE, 0, **changes))


@dataclass(frozen=True)
class Entry:
    """An entry of a launch table.

    Attributes:
        file, key: it is LAUNCH[architecture][key] in a file of `phi2_kernels`.
        kernel: what it launches: the kernel's file and name.
        candidates: by architecture, the values of a launch in the order of its fields. The shipped one may be missing.
            They are the few that theory leaves: among hundreds the clock would pick the luckiest.
        calls: launch it; timed as one.
        in_graph: they are so short that they are timed in a CUDA graph.
    """

    file: str
    key: str
    kernel: str
    candidates: dict[int, list[tuple]]
    calls: tuple[Call, ...]
    in_graph: bool = False

    def table(self, arch: int) -> dict[str, Launch]:
        """The entries of an architecture, among them this one. Launchers read them at each launch."""
        return import_module(f"phi2_kernels.{self.file}").LAUNCH[arch]

    def shipped(self, arch: int) -> Launch:
        return self.table(arch)[self.key]

    def launches(self, arch: int) -> list[Launch]:
        """The shipped one, then the others."""
        candidates = [self.launch(arch, values) for values in self.candidates[arch]]
        return [self.shipped(arch), *(each for each in candidates if each != self.shipped(arch))]

    def launch(self, arch: int, values: tuple) -> Launch:
        """Of the fields that the shipped one has."""
        shipped = self.shipped(arch)
        return dict(zip(shipped, values, strict=True)) if isinstance(shipped, dict) else type(shipped)(*values)

    def launched_as(self, arch: int, launch: Launch) -> AbstractContextManager:
        """Within, the table has this launch in the place of the shipped one."""
        return mock.patch.dict(self.table(arch), {self.key: launch})

    def inputs(self, device: torch.device, seed: int) -> tuple[dict[str, Any], ...]:
        return tuple(call.inputs(PHI2, device, seed) for call in self.calls)

    def run(self, *inputs: dict[str, Any]) -> Outputs:
        outputs = [call.run(own) for call, own in zip(self.calls, inputs, strict=True)]
        return {f"{name} of {i}" if i else name: x for i, own in enumerate(outputs) for name, x in own.items()}

    def compile(self, shapes: Shapes = PHI2) -> None:
        """Launches the kernel in all its forms; for `aot.compile_only`."""
        for call in self.calls:
            call.compile(shapes)
            if call.also:
                call.compile(shapes, **call.also)


def compile_shipped() -> None:
    for entry in ENTRIES.values():
        entry.compile()


ENTRIES: dict[str, Entry] = {}  # by the tuner's name
FORMS: dict[str, Callable[[], None]] = {SHIPPED: compile_shipped}  # what launches all that is compiled in a form
# By kernel the multiply-adds on tensor cores that a round of its loop must do, of a launch's constants and the types of
# its pointers; kernels without products are missing.
USEFUL: dict[str, Callable[..., int]] = {}


def label(launch: Launch) -> str:
    fields = launch if isinstance(launch, dict) else launch._asdict()
    return " ".join(f"{name.removeprefix('BLOCK_').lower()}={value}" for name, value in fields.items())


def on_both(*candidates: tuple) -> dict[int, list[tuple]]:
    return dict.fromkeys(ARCHITECTURES, [*candidates])
