"""One update of Phi-2 at full size on a GPU, ours beside trl's: LoRA, bfloat16, with reference and optimizer.

Weights are random. Both are given all that they need to be fast by themselves: ours is what `phi2 dpo` and `phi2 sft`
run, theirs the trainer with SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from benchmarks import stream
from benchmarks.harness.gpu import any_device, device
from benchmarks.harness.models import PHI2, TINY_WITH_TEXT, instruct_tokenizer, random_model
from benchmarks.harness.processes import compare
from benchmarks.harness.trainers import (
    EXACT,
    ROUNDED,
    Job,
    in_passes,
    ours,
    prepare,
    real_records,
    toy_records,
    with_trl,
)
from benchmarks.registry import Measure, Report, case, versions
from phi2.checkpoints.weights import load_tokenizer
from phi2.config import Phi2Config
from phi2.data.records import Record
from phi2.hub import resolve
from phi2.tokenizer import Tokenizer

PEAK = 0.3  # of trl's memory, allowed


class Update(NamedTuple):
    """How many samples are in one, and how much of trl's time ours may take."""

    name: str
    accumulation: int
    time: float


class Setting(NamedTuple):
    """What is trained, where, and how close both must be to each other, as shares of loss and norm."""

    config: Phi2Config
    device: torch.device
    dtype: torch.dtype
    tokenizer: Tokenizer
    records: Sequence[Record]
    packed: int
    tolerance: dict[str, float]


def full(kind: str) -> Setting:
    """Phi-2 in the precision of its recipe, without dropout, which no two libraries draw alike."""
    config, records = replace(PHI2, resid_pdrop=0.0), real_records(kind)
    return Setting(config, device(), torch.bfloat16, instruct_tokenizer(), records, 768, ROUNDED[kind])


def tiny(kind: str) -> Setting:
    """In float32, where both must say the same to many more digits."""
    tokenizer, records = load_tokenizer(resolve("nano")), toy_records(kind)
    return Setting(TINY_WITH_TEXT, any_device(), torch.float32, tokenizer, records, 64, EXACT)


@contextmanager
def prepared(kind: str, setting: Setting) -> Iterator[Job]:
    """What is written once, and loaded by each pair of processes."""
    with TemporaryDirectory() as folder:
        job = Job(
            kind,
            Path(folder),
            batch_size=4,
            packed=setting.packed if kind == "supervised" else None,
            device=setting.device.type,
            dtype=str(setting.dtype).removeprefix("torch."),
        )
        prepare(job, random_model(setting.config, setting.device, setting.dtype), setting.tokenizer, setting.records)
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()  # the model is on the disk now, and both processes want the memory
        yield job


def compare_updates(kind: str, updates: Sequence[Update], setting: Setting, turns: int) -> Report:
    """Time and memory of each update beside trl's."""
    measures: list[Measure] = []
    gates: dict[str, str] = {}
    with prepared(kind, setting) as job:
        for update in updates:
            changed = job._replace(accumulation=update.accumulation)
            result = compare(ours, with_trl, changed, turns, setting.tolerance, job.device)
            measures += result.seconds_and_peak(update.name, time=update.time, peak=PEAK)
            gates[update.name] = result.agreement()
            stream.measured(update.name, measures[-2:])
    gate = "; ".join(f"{name}: {text}" for name, text in gates.items())
    return Report(versions("trl", "transformers", "peft", "torch", "triton"), gate, measures)


def compare_passes(setting: Setting, turns: int, tokens: int) -> Report:
    """An update of 4 x 4 pairs in passes of so many tokens, beside one in as few passes as memory holds."""
    name = f"passes of {tokens} tokens"
    with prepared("preference", setting) as job:
        job = job._replace(accumulation=4, tokens=tokens)
        result = compare(in_passes, ours, job, turns, setting.tolerance, job.device)
    measures = result.seconds_and_peak(name, time=1.05, peak=0.55)
    stream.measured(name, measures)
    return Report({"as few passes as memory holds": ""} | versions("torch", "triton"), result.agreement(), measures)


# Of 132 pairs eight windows of 4 x 4 can be made, two of which warm up.
FOUR, WINDOW = Update("4 pairs", 1, 0.5), Update("4 x 4 pairs", 4, 0.3)
BLOCKS = Update("4 blocks", 1, 0.6)


@case(
    "gpu_dpo_step_vs_trl",
    turns=6,
    summary="LoRA DPO of Phi-2: one update of 4 pairs and one of 4 x 4, reference and optimizer included",
    tiny=lambda: compare_updates("preference", [WINDOW], tiny("preference"), turns=1),
)
def gpu_dpo_step_vs_trl(turns: int) -> Report:
    return compare_updates("preference", [FOUR, WINDOW], full("preference"), turns)


# A pass of so many tokens takes an H200 0.11 s, longer than its host needs for one; four hold 4 x 4 pairs.
PASS = 2700


@case(
    "gpu_dpo_passes",
    turns=6,
    summary=f"LoRA DPO of Phi-2: one update of 4 x 4 pairs in passes of {PASS} tokens, by as few as memory holds",
    tiny=lambda: compare_passes(tiny("preference"), turns=1, tokens=200),
)
def gpu_dpo_passes(turns: int) -> Report:
    return compare_passes(full("preference"), turns, PASS)


@case(
    "gpu_sft_step_vs_trl",
    turns=6,
    summary="LoRA SFT of Phi-2: one update of 4 blocks of 768 tokens, joined and cut from rows",
    tiny=lambda: compare_updates("supervised", [BLOCKS], tiny("supervised"), turns=1),
)
def gpu_sft_step_vs_trl(turns: int) -> Report:
    return compare_updates("supervised", [BLOCKS], full("supervised"), turns)
