"""Forms of kernels that are known: the ones that Triton would find, whatever the rows of a block are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from phi2_kernels import block as block_file
from phi2_kernels.block import Shape, Weights, block
from phi2_kernels.block_adapters import Adapter
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


@pytest.fixture
def forms(monkeypatch) -> list[Form]:
    """Every form that is looked for; nothing is computed."""
    from triton.runtime.interpreter import InterpretedFunction

    found: list[Form] = []

    def look(kernel, *arguments, grid, warmup, **constants) -> Form:
        found.append(Form(kernel, arguments, constants))
        return found[-1]

    monkeypatch.setattr(InterpretedFunction, "run", look)
    monkeypatch.setattr(block_file, "_KNOWN", {})
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    return found


@dataclass(frozen=True)
class Kind:
    """What a block is, and what it is given. `off`: by how many numbers tensors begin behind where torch puts them."""

    heads: tuple[int, int] = (4, 4)
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
    off: str = ""

    def shifted(self, x: Tensor, name: str) -> Tensor:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) if name == self.off else x

    def weights(self) -> Weights:
        attended, kv = self.heads[0] * 16, self.heads[1] * 16
        into, out = (attended, kv, kv, self.F), (attended, self.F)

        def zeros(*size: int, dtype: torch.dtype = self.half, trains: bool = self.trains) -> Tensor:
            return torch.zeros(size, dtype=dtype).requires_grad_(trains)

        def adapter(rank: int, start: int, end: int, width: int, reach: int) -> Adapter:
            A, B = (zeros(*size, dtype=torch.float32, trains=True) for size in ((rank, width), (reach, rank)))
            return Adapter(start, end, self.shifted(A, "adapters"), B, 0.5, self.lora_dropout)

        edges = [sum(into[:i]) for i in range(5)]
        on_h = [adapter(r, a, b, self.C, b - a) for r, a, b in zip(self.ranks, edges, edges[1:], strict=False) if r]
        edges = [0, attended, attended + self.F]
        on_m = [adapter(r, a, b, b - a, self.C) for r, a, b in zip(self.ranks[4:], edges, edges[1:], strict=False) if r]
        norm = self.shifted(zeros(self.C, dtype=self.norm), "norm"), zeros(self.C, dtype=self.norm)
        return Weights(
            *norm, 1e-5,
            tuple(zeros(n, self.C) for n in into), tuple(zeros(n) for n in into),
            tuple(zeros(self.C, n) for n in out), (zeros(self.C), zeros(self.C)),
            tuple(on_h), tuple(on_m), self.dropout,
        )  # fmt: skip

    def run(self, B: int, T: int) -> None:
        """Forward and backward, and forward alone, over B rows of T tokens."""
        x = self.shifted(torch.zeros(B, T, self.C, dtype=self.stream), "stream").requires_grad_()
        until = self.shifted(torch.full((B, T), T, dtype=torch.int32), "until") if self.packed else None
        angles = tuple(self.shifted(table, "angles") for table in rotary_angles(torch.arange(T)[None], 8, 1e4))
        given = Shape(*self.heads, 16), angles, Visibility(T, T, until, x.device), self.half
        y = block(x, self.weights(), *given, impl="triton")
        y.backward(self.shifted(torch.ones(y.shape, dtype=y.dtype), "gradient"))
        with torch.no_grad():
            block(x, self.weights(), *given, impl="triton")


EXACT = dict(half=torch.float32, norm=torch.float32, stream=torch.float32)
KINDS = {
    "grouped heads": dict(heads=(4, 2)),
    "wider": dict(C=64),
    "a wider mlp": dict(F=80),
    "an uneven mlp": dict(F=72),
    "an uneven stream": dict(C=40),
    "autocast": dict(stream=torch.float32, norm=torch.float32),
    "a float32 stream": dict(stream=torch.float32),
    "a float32 norm": dict(norm=torch.float32),
    "float16": dict(half=torch.float16),
    "float32": EXACT,
    "other ranks": dict(ranks=(4, 0, 4, 4, 4, 8)),
    "uneven ranks": dict(ranks=(4, 0, 3, 4, 4, 4)),
    "many ranks": dict(ranks=(70, 0, 4, 4, 4, 130)),
    "other adapters": dict(ranks=(4, 4, 0, 4, 4, 4)),
    "one side": dict(ranks=(4, 0, 4, 4, 0, 0)),
    "no adapters": dict(ranks=(0,) * 6),
    "all weights": dict(ranks=(0,) * 6, trains=True),
    "dropout of adapters": dict(lora_dropout=0.1),
    "dropout": dict(dropout=0.1),
    "both": dict(lora_dropout=0.1, dropout=0.1, ranks=(4, 0, 4, 4, 3, 3)),
    "packed": dict(packed=True),
    **{f"{name} between": dict(packed=True, off=name) for name in ("stream", "until", "angles", "gradient")},
    **{f"{name} between": dict(off=name) for name in ("norm", "adapters")},
}


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter shows what is launched")
@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def test_a_known_form_is_the_one_that_triton_would_find(forms, changes):
    """`Form` takes no launch of another variant."""
    kinds = Kind(packed=changes.get("packed") and "off" in changes), Kind(**changes)
    for kind, B, T in zip(kinds * 4, (1, 1, 2, 3, 2, 1, 3, 2), (9, 17, 16, 9, 1, 1, 33, 16), strict=True):
        kind.run(B, T)
    assert any(form.launches for form in forms)


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
