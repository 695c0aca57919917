"""Budgets of the compiled kernels, for GPUs that need not be here: what every shipped launch occupies and issues."""

from __future__ import annotations

import json
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import run
from benchmarks.cases import aot_report
from benchmarks.harness import aot, sass
from benchmarks.harness.aot import Row
from benchmarks.harness.spec import (
    ALSO_SHIPPED,
    ARCHITECTURES,
    AS_SM80,
    PADDED,
    SHIPPED,
    UNALIGNED,
    UNORDERED,
)
from benchmarks.registry import GateError
from phi2_kernels.attention_tiles_triton import LAUNCH
from phi2_kernels.block_adapters import Side

KERNELS = Path(__file__).parents[2] / "kernels" / "phi2_kernels"


# Launches that must not pass, of one architecture: a candidate of the tuner, and strides without divisors.
SPILLING = {(80, "gelu_forward"): {"BLOCK_N": 16, "BLOCK_F": 1024, "num_warps": 1}}
ALONE = (*SPILLING, (80, UNALIGNED))
ON_BOTH = [(arch, form) for form in (SHIPPED, ALSO_SHIPPED, PADDED, UNORDERED) for arch in ARCHITECTURES]
COMPILED: dict[tuple[int, str], list[Row]] = {}  # by architecture and form: each once, and many in one pool


def compiled(*wanted: tuple[int, str]) -> list[Row]:
    missing = [each for each in wanted if each not in COMPILED]
    if missing:
        COMPILED.update(zip(missing, aot.compiled([(*each, SPILLING.get(each)) for each in missing]), strict=True))
    return [row for each in wanted for row in COMPILED[each]]


@pytest.fixture(params=[80, 90])
def phi2_rows(request) -> list[Row]:
    """Phi-2's own launches, in half precision, on one architecture."""
    return compiled((request.param, SHIPPED))


@pytest.fixture
def rows() -> list[Row]:
    """These, those of other heads and of float32, and those that must not pass."""
    return compiled(*ON_BOTH, *ALONE)


def of(rows: list[Row], form: str, arch: int, kernel: str = "attention forward") -> Row:
    return next(row for row in rows if (row.form, row.arch, row.kernel) == (form, arch, kernel))


@pytest.fixture
def forward(rows) -> Row:
    return of(rows, SHIPPED, 80)


def faults(rows: list[Row]) -> list[tuple[int, str, str, str]]:
    shipped = [row for row in rows if row.form in (SHIPPED, ALSO_SHIPPED)]
    return [(row.arch, row.kernel, row.launch, text) for row in shipped for text in row.violations]


def test_every_shipped_launch_is_within_its_budgets(rows):
    assert not faults(rows)


def test_under_every_triton_all_that_phi2_launches_in_half_precision_is_within_its_budgets(phi2_rows):
    """Compilers differ by a few spilled registers in attention of other widths, and in float32."""
    assert phi2_rows and not faults(phi2_rows)


def test_under_every_triton_no_kernel_is_left_out(phi2_rows):
    written = {
        f"{file.name.removesuffix('_triton.py').removesuffix('_forward').removesuffix('_backward')} {name}"
        for file in KERNELS.glob("*_triton.py")
        for name in re.findall(r"^def _(\w+)_kernel\(", file.read_text(), re.M)
    }
    assert {row.kernel for row in phi2_rows} == written


def handed(arch: int) -> list[str]:
    """All that the driver is given for two kernels, launched twice: found by Triton, then known."""
    from triton.compiler import CompiledKernel

    from phi2_kernels import block_adapters_triton, gelu_triton

    launches: list[str] = []
    run = property(lambda form: lambda *given: launches.append(f"{form.hash} {plain(given)}"))
    x, y, u, known = torch.zeros(4, 64), torch.zeros(4, 64), torch.zeros(4, 12), {}
    side = Side((torch.zeros(4, 32), torch.zeros(8, 32)), ((0, 32), (32, 64)), False, (4, 8), name=(2, False))
    with mock.patch.multiple(CompiledKernel, run=run, _init_handles=lambda form: None), aot.pretended_driver(arch):
        for _ in range(2):
            gelu_triton.forward(x, y, known)
            block_adapters_triton.inner(x, u, side, (0.5, 2.0), None, known)
    assert len(known) == 2
    return launches


def plain(given: Any) -> Any:
    if isinstance(given, torch.Tensor):
        return given.data_ptr()
    if isinstance(given, tuple):
        return [plain(each) for each in given]
    return given if isinstance(given, int | float | None) else type(given).__name__  # of hooks the kind


@pytest.mark.parametrize("arch", [80, 90])
def test_under_every_triton_a_known_form_is_handed_what_triton_would_hand_it(arch, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        gelu, inner, *known = process.submit(handed, arch).result()
    assert known == [gelu, inner] and gelu != inner


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["forward", "dkdv", "dq"])
def test_padding_80_dims_to_128_breaks_the_budget_of_multiply_adds(rows, arch, kernel):
    padded, ours = (of(rows, form, arch, f"attention {kernel}") for form in (PADDED, SHIPPED))
    assert any("multiply-adds" in text for text in padded.violations)
    assert {5 * n for n in padded.multiply_adds} == {8 * n for n in ours.multiply_adds}


def test_under_every_triton_an_a100s_attention_is_made_for_sm_90_out_of_its_own_ptx():
    rows = {row.kernel: row for row in compiled((90, AS_SM80))}
    assert rows.keys() == {*aot.TILED, "attention delta"} and {row.target for row in rows.values()} == {"sm_80"}
    for kernel in aot.TILED:
        row, launch = rows[kernel], LAUNCH[80][kernel.removeprefix("attention ")]
        assert row.launch == f"d80 m{launch.block_m} n{launch.block_n}"
        assert row.copies and set(row.multiply_adds) == {row.useful}  # cp.async, and matrix instructions of a warp


def test_strides_that_nothing_is_known_of_lose_the_asynchronous_copies(rows, forward):
    assert "no asynchronous copies" in of(rows, UNALIGNED, 80).violations
    assert forward.copies > 0


def test_under_every_triton_tiles_of_codes_are_copied_16_bytes_at_a_time(phi2_rows):
    """And so is what they are multiplied by: all copies that wide together are no less than both."""
    products = [row for row in phi2_rows if re.fullmatch("quantized_matmul (forward|backward)", row.kernel)]
    for row in products:
        m, n, k = map(int, re.match(r"m(\d+) n(\d+) k(\d+)", row.launch).groups())
        codes = n * k // (2 if "zeros" in row.launch else 1)
        assert 16 * row.copies * 32 * row.warps >= codes + 2 * m * (n if row.kernel.endswith("backward") else k)
    assert len(products) == 4


def test_a_launch_that_spills_breaks_its_budget(rows):
    spilling = of(rows, "gelu_forward", 80, "gelu forward")
    assert spilling.launch == "n16 f1024" and re.fullmatch(r"\d+ bytes of stack", *spilling.violations)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", aot.IN_PLACE)
def test_a_gradient_that_nothing_holds_back_from_unread_logits_is_seen(rows, arch, kernel):
    assert "writes that may overtake reads" in of(rows, UNORDERED, arch, kernel).violations


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"shared": 163 * 1024 + 1}, "166913 bytes of shared memory"),
        ({"stack": 24}, "24 bytes of stack"),
        ({"shared": 163 * 1024}, "4 warps on a multiprocessor, 8 wanted"),
        ({"multiply_adds": []}, r"\[\] multiply-adds a tile, 1310720 useful"),
        ({"copies": 0}, "no asynchronous copies"),
    ],
)
def test_each_budget_can_be_broken(forward, change, complaint):
    text, *_ = replace(forward, **change).violations  # with too much shared memory there are no warps either
    assert re.fullmatch(complaint, text)


def test_the_report_shows_our_split_beside_the_padded_form(rows, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(aot, "compiled", lambda jobs: [rows])
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert run.main(["--case", "aot_report"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert any(re.search(r"sm_80 forward: multiply-adds a tile +Mi +1.250 +2.000 +0.625", line) for line in table)
    assert sum(line.startswith("  attention forward ") for line in table) == sum(
        row.kernel == "attention forward" for row in rows
    )
    assert len(json.loads(last)["table"]) == len(rows)


def test_there_is_no_report_of_a_broken_budget(forward, monkeypatch):
    monkeypatch.setattr(aot, "compiled", lambda jobs: [[replace(forward, stack=64)]])
    with pytest.raises(GateError, match="attention forward d80 m128 n64 for sm_80: 64 bytes of stack"):
        aot_report.aot_report(1)


LISTING = """
	.headerflags	@"EF_CUDA_64BIT_ADDRESS EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0100*/                   LDG.E R1, [R2] ;
        /*0110*/              @!P0 LDSM.16.MT88.4 R4, [R8] ;
        /*0120*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0130*/               @P1 BRA 0x110 ;
        /*0140*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0150*/                   LDGSTS.E [R1], desc[UR4][R2.64] ;
        /*0160*/               @P2 BRA 0x100 ;
        /*0170*/                   BRA 0x170;
"""


def test_innermost_loops_are_found_without_traps():
    instructions = sass.listed(LISTING)
    assert sass.loops_of(instructions, start=0x100) == [instructions[1:4]] and len(instructions) == 8


MATRIX = "HMMA.16816.F32.BF16 R4, R4, R8, R4"
WIDE, NARROW = "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", "LDGSTS.E [R1], desc[UR4][R2.64]"


def test_only_wide_copies_count():
    assert sass.async_copies([MATRIX, WIDE, NARROW]) == 1


@pytest.mark.parametrize(
    ("order", "is_behind"),
    [("LLBSS", True), ("LBS", True), ("LSB", False), ("LBLS", False), ("LS", False), ("LL", True)],
)
def test_writes_come_behind_reads_and_a_barrier(order, is_behind):
    lines = [{"L": "LDG.E.128 R4, [R2]", "B": "BAR.SYNC.DEFER_BLOCKING 0x0", "S": "STG.E [R2], R4"}[c] for c in order]
    assert sass.is_written_behind(lines) == is_behind


def test_matrix_instructions_of_hopper_name_their_size():
    lines = ["HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR8], R24"]
    assert sass.multiply_adds(lines, warps=8) == 64 * 16 * 16 * 2


def test_matrix_instructions_of_ampere_are_of_one_warp_each():
    assert sass.multiply_adds([MATRIX, WIDE, MATRIX], warps=4) == 2 * 16 * 8 * 16 * 4


@pytest.mark.parametrize(
    ("kernel", "programs"),
    [
        ({"registers": 255, "warps": 4}, 2),
        ({"registers": 255, "warps": 8}, 1),
        ({"registers": 40, "shared": 50 * 1024}, 3),
        ({"registers": 16, "warps": 1}, 32),
        ({"registers": 32, "warps": 8}, 8),
    ],
)
def test_a_multiprocessor_holds_what_registers_memory_and_warps_allow(kernel, programs):
    row = Row("gelu forward", "", SHIPPED, 80, "sm_80", **{"warps": 4, "shared": 0, **kernel}, stack=0,
              copies=0, is_written_behind=True, multiply_adds=[], useful=0)  # fmt: skip
    assert row.programs == programs
