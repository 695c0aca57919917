"""Forms of kernels that are known: the ones that Triton would find, whatever the rows of a block are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor

from phi2_kernels import (
    attention_backward_triton,
    attention_forward_triton,
    block_adapters_triton,
    gelu_triton,
    layer_norm_triton,
    rotary_triton,
)
from phi2_kernels import block as block_file
from phi2_kernels.block import Shape, Weights, block
from phi2_kernels.block_adapters import Adapter
from phi2_kernels.block_weights import flatten, tensors_of
from phi2_kernels.launch import Known, launch
from phi2_kernels.rotary import rotary_angles
from phi2_kernels.visibility import Visibility

from .conftest import INTERPRETED
from .forms import Form


class Kernel:
    """Stands for one of Triton's; notes how it and its forms are called."""

    arg_names = ("x", "n", "FLAG", "BLOCK")

    def __init__(self) -> None:
        self.looked: list[tuple] = []
        self.known: list[tuple] = []

    def __getitem__(self, grid) -> Callable[..., Any]:
        return lambda *arguments, **constants: self.looked.append((grid, arguments, constants)) or self.Compiled(self)

    class Compiled:
        def __init__(self, kernel: Kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid) -> Callable[..., None]:
            return lambda *arguments: self.kernel.known.append((grid, arguments))


CONSTANTS = {"BLOCK": 64, "num_warps": 4, "FLAG": True}


def test_a_known_form_gets_arguments_and_constants_in_the_kernels_order():
    kernel, known = Kernel(), {}
    launch(kernel, (1, 2, 1), ("x", 7), lambda: CONSTANTS, known, "here")
    launch(kernel, (3, 2, 1), ("y", 8), lambda: pytest.fail("asked again"), known, "here")
    assert kernel.looked == [((1, 2, 1), ("x", 7), CONSTANTS)]
    assert kernel.known == [((3, 2, 1), ("y", 8, True, 64))]


def test_another_place_and_a_caller_that_knows_nothing_ask_triton():
    kernel, known = Kernel(), {}
    for place, knows in (("here", known), ("there", known), ("here", None), ("here", None)):
        launch(kernel, (1, 1, 1), (place, 7), lambda: CONSTANTS, knows, place)
    assert len(kernel.looked) == 4 and known.keys() == {"here", "there"}


def test_what_was_not_compiled_is_not_known():
    known: Known = {}
    launch({(1, 1, 1): lambda *_, **__: None}, (1, 1, 1), ("x", 7), lambda: CONSTANTS, known, "here")
    assert not known


# The blocks of a model


LAUNCHERS = (
    attention_backward_triton, attention_forward_triton, block_adapters_triton, gelu_triton, layer_norm_triton,
    rotary_triton,
)  # fmt: skip


@pytest.fixture
def forms(monkeypatch) -> list[Form]:
    """Every form that is looked for; nothing is computed."""
    from triton.runtime.interpreter import InterpretedFunction

    found: list[Form] = []

    def look(kernel, *arguments, grid, warmup, **constants) -> Form:
        found.append(Form(kernel, arguments, constants))
        return found[-1]

    def strict(kernel, grid, arguments, constants, known: Known | None = None, place: Any = "") -> None:
        """`launch`, which asks for the constants of a known form all the same."""
        if known is not None and place in known:
            (form, rest), given = known[place], constants()
            assert rest == tuple(given[name] for name in kernel.arg_names[len(arguments) :]), place
            assert form.options == {name: given[name] for name in given if name not in kernel.arg_names}, place
        launch(kernel, grid, arguments, constants, known, place)

    for file in LAUNCHERS:
        monkeypatch.setattr(file, "launch", strict)
    monkeypatch.setattr(InterpretedFunction, "run", look)
    monkeypatch.setattr(block_file, "_KNOWN", {})
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    return found


@dataclass(frozen=True)
class Kind:
    """What a block is, and what it is given. `off`: by how many numbers tensors begin behind where torch puts them."""

    heads: tuple[int, int] = (4, 4)
    D: int = 16
    C: int = 48
    F: int = 64
    stream: torch.dtype = torch.bfloat16
    norm: torch.dtype = torch.bfloat16
    half: torch.dtype = torch.bfloat16
    ranks: tuple[int, ...] = (4, 0, 4, 4, 4, 4)  # of adapters on q, k, v, fc1, dense, fc2; 0: none
    lora_dropout: float = 0.0
    dropout: float = 0.0
    packed: bool = False
    trains: bool = False
    norm_trains: bool = False
    rotary: int = 8
    scaling: float = 0.5
    norm_bias: torch.dtype | None = None
    matrices: torch.dtype = torch.float32
    angles: torch.dtype = torch.float32
    until: torch.dtype = torch.int32
    off: str = ""

    def shifted(self, x: Tensor, name: str) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) if name == self.off else x

    def weights(self) -> Weights:
        attended, kv = self.heads[0] * self.D, self.heads[1] * self.D
        into, out = (attended, kv, kv, self.F), (attended, self.F)

        def zeros(*size: int, dtype: torch.dtype = self.half, trains: bool = self.trains) -> Tensor:
            return torch.zeros(size, dtype=dtype).requires_grad_(trains)

        def adapter(rank: int, start: int, end: int, width: int, reach: int) -> Adapter:
            A, B = (zeros(*size, dtype=self.matrices, trains=True) for size in ((rank, width), (reach, rank)))
            return Adapter(start, end, self.shifted(A, "adapters"), B, self.scaling, self.lora_dropout)

        edges = [sum(into[:i]) for i in range(5)]
        on_h = [adapter(r, a, b, self.C, b - a) for r, a, b in zip(self.ranks, edges, edges[1:], strict=False) if r]
        edges = [0, attended, attended + self.F]
        on_m = [adapter(r, a, b, b - a, self.C) for r, a, b in zip(self.ranks[4:], edges, edges[1:], strict=False) if r]
        trains = self.trains or self.norm_trains
        dtypes = self.norm, self.norm_bias or self.norm
        weight, bias = (zeros(self.C, dtype=dtype, trains=trains) for dtype in dtypes)
        return Weights(
            self.shifted(weight, "norm"), bias, 1e-5,
            tuple(zeros(n, self.C) for n in into), tuple(zeros(n) for n in into),
            tuple(zeros(self.C, n) for n in out), (zeros(self.C), zeros(self.C)),
            tuple(on_h), tuple(on_m), self.dropout,
        )  # fmt: skip

    def run(self, B: int, T: int) -> None:
        """Forward and backward, and forward alone, over B rows of T tokens."""
        x = self.shifted(torch.zeros(B, T, self.C, dtype=self.stream), "stream").requires_grad_()
        until = self.shifted(torch.full((B, T), T, dtype=self.until), "until") if self.packed else None
        tables = rotary_angles(torch.arange(T)[None], self.rotary, 1e4)
        angles = tuple(self.shifted(table.to(self.angles), "angles") for table in tables)
        given = Shape(*self.heads, self.D), angles, Visibility(T, T, until, x.device), self.half
        y = block(x, self.weights(), *given, impl="triton")
        y.backward(self.shifted(torch.ones(y.shape, dtype=y.dtype), "gradient"))
        with torch.no_grad():
            block(x, self.weights(), *given, impl="triton")


NO_ADAPTERS, Q_ALONE = dict(ranks=(0,) * 6), dict(C=64, ranks=(4, 0, 0, 0, 0, 0))
FULL = dict(trains=True, **NO_ADAPTERS)
EXACT = dict(half=torch.float32, norm=torch.float32, stream=torch.float32)
KNOWN = {
    "grouped heads": dict(heads=(4, 2)),
    "other heads of the same widths": dict(heads=(2, 2), D=32),
    "wider": dict(C=64),
    "a wider mlp": dict(F=80),
    "another rotary width": dict(rotary=4),
    "other angles": dict(angles=torch.bfloat16),
    "autocast": dict(stream=torch.float32, norm=torch.float32),
    "a float32 stream": dict(stream=torch.float32),
    "a float32 norm": dict(norm=torch.float32),
    "float16": dict(half=torch.float16),
    "other ranks": dict(ranks=(4, 0, 4, 4, 4, 8)),
    "uneven ranks": dict(ranks=(4, 0, 3, 4, 4, 4)),
    "many ranks": dict(ranks=(70, 0, 4, 4, 4, 130)),
    "other adapters": dict(ranks=(4, 4, 0, 4, 4, 4)),
    "one side": dict(ranks=(4, 0, 4, 4, 0, 0)),
    "no adapters": NO_ADAPTERS,
    "wider without adapters": dict(C=64, **NO_ADAPTERS),
    "an adapter on the other side": dict(C=64, ranks=(0, 0, 0, 0, 4, 0)),
    "the norm alone": dict(norm_trains=True, **NO_ADAPTERS),
    "another scaling": dict(scaling=2.0),
    "all weights": FULL,
    "all weights and adapters": dict(trains=True),
    "dropout of adapters": dict(lora_dropout=0.1),
    "dropout": dict(dropout=0.1),
    "both": dict(lora_dropout=0.1, dropout=0.1, ranks=(4, 0, 4, 4, 3, 3)),
    "packed": dict(packed=True),
    "packed by int64": dict(packed=True, until=torch.int64),
    **{f"{name} between": dict(packed=True, off=name) for name in ("stream", "until", "angles", "gradient")},
}
UNKNOWN = {
    "an uneven mlp": dict(F=72),
    "an uneven stream": dict(C=40),
    "float32": EXACT,
    "a norm of two dtypes": dict(norm_bias=torch.float32),
    "adapters in half precision": dict(matrices=torch.bfloat16),
    "norm between": dict(off="norm"),
    "adapters between": dict(off="adapters"),
}


def launches_of(forms: list[Form], kind: Kind, rows: list[tuple[int, int]]) -> int:
    """How many of its launches were known."""
    before = sum(form.launches for form in forms)
    for B, T in rows:
        kind.run(B, T)
    return sum(form.launches for form in forms) - before


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter shows what is launched")
@pytest.mark.parametrize("changes", [*KNOWN.values(), *UNKNOWN.values()], ids=[*KNOWN, *UNKNOWN])
def test_a_known_form_is_the_one_that_triton_would_find(forms, changes):
    """`Form` takes no launch of another variant, and none with other constants is known."""
    packed = bool(changes.get("off") and changes.get("packed"))
    usual = [Kind(packed=packed, **each) for each in ({}, NO_ADAPTERS, Q_ALONE, FULL)]
    for kind in usual:
        launches_of(forms, kind, [(1, 9), (2, 16)])
    known = launches_of(forms, Kind(**changes), [(1, 17), (3, 9), (1, 1), (2, 16)])
    for kind in usual:
        launches_of(forms, kind, [(2, 1), (3, 33)])
    assert (known > 40) == (changes in KNOWN.values())


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter shows what is launched")
def test_a_stream_of_no_tokens_is_one(forms):
    Kind().run(2, 0)


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter shows what is launched")
def test_float32_products_follow_the_setting(forms):
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            Kind(**EXACT).run(1, 9)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert {form.variant.count("tf32'") > 0 for form in forms if "PRECISION" in form.kernel.arg_names} == {False, True}


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter shows what is launched")
def test_rows_of_all_lengths_are_looked_for_once(forms):
    found = []
    for T in (8, 9, 31):
        Kind().run(1, T)
        found.append(len(forms))
    assert found[0] == found[2] == 20 and all(form.launches >= 2 for form in forms)


def numbers(kind: Kind, B: int, T: int) -> list[Tensor]:
    """The output of a random block and all gradients, on torch's default device."""
    torch.manual_seed(0)
    weights, x = kind.weights(), torch.randn(B, T, kind.C).to(kind.stream).requires_grad_()
    tensors = flatten(tensors_of(weights))
    with torch.no_grad():
        for tensor in tensors:
            tensor.normal_(0, 0.2)
    until = torch.full((B, T), T, dtype=torch.int32) if kind.packed else None
    angles = rotary_angles(torch.arange(T)[None], kind.rotary, 1e4)
    y = block(x, weights, Shape(*kind.heads, kind.D), angles, Visibility(T, T, until, x.device), impl="triton")
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *filter(attrgetter("requires_grad"), tensors)])]


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing that could be known")
@pytest.mark.parametrize("name", ["dropout of adapters", "both", "packed", "all weights", "all weights and adapters"])
def test_a_known_form_computes_what_one_does_that_was_looked_for(monkeypatch, name):
    kind, rows = Kind(**KNOWN[name]), [(1, 9), (2, 33), (1, 16), (3, 100)]
    monkeypatch.setattr(block_file, "_KNOWN", {})
    with torch.device("cuda"):
        looked_for = []
        for B, T in rows:
            block_file._KNOWN.clear()
            looked_for.append(numbers(kind, B, T))
        for (B, T), expected in zip(rows, looked_for, strict=True):
            assert all(map(torch.equal, numbers(kind, B, T), expected))
