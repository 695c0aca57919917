"""A random Phi-2 at full size, 2.78 billion parameters: does it load fast and lean, and is it transformers' Phi?

A cold page cache measures the disk: the second run tells.
"""

from __future__ import annotations

import json
import time
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.harness.models import random_model
from benchmarks.harness.processes import forget_peak, memory
from benchmarks.registry import GateError, Measure, Report, case, versions
from phi2.checkpoints.weights import load_model, load_tokenizer, save_pretrained
from phi2.config import Phi2Config
from phi2.hub import resolve
from phi2.lora_config import LoraConfig
from phi2.training import dpo

GIB = 2**30
IDS = torch.arange(1000, 1064)[None]
TARGETS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head")


@case("full_size", 3, "a random 2.78 B Phi-2 in bfloat16: load time and memory, logits, one LoRA DPO step")
def full_size(turns: int) -> Report:
    """Loads in under 10 s within 1.1 x the weights, equals transformers, and takes a DPO step within 16 GiB."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        weights = _in_process(_write, folder)
        theirs = _in_process(_logits_of_transformers, folder)
        loads = [_in_process(_load, folder, torch.bfloat16) for _ in range(turns)]
        error = _relative(_in_process(_load, folder, torch.float32)["logits"], theirs)
        if error > 1e-5:
            raise GateError(f"float32 logits differ from transformers' by {error:.1e} of the largest")
        step = _in_process(_dpo_step, folder)
    return Report(
        peer={"limit": ""} | versions("transformers", "torch"),
        gate=f"float32 logits within {error:.1e} of the largest of transformers'",
        measures=[
            Measure.of("load time against 10 s", "s", [load["seconds"] for load in loads], [10.0], target=1.0),
            Measure.of("load peak against the weights", "GiB", [load["peak"] for load in loads], [weights], target=1.1),
            Measure.of("DPO step peak against 16 GiB", "GiB", [step["peak"]], [16.0], target=1.0),
        ],
        facts={"bfloat16_error": f"{_relative(loads[0]['logits'], theirs):.1e}", "step_seconds": step["seconds"]},
    )


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, in units of the largest of theirs."""
    return ((ours.float() - theirs).abs().max() / theirs.abs().max()).item()


def _in_process(work, *arguments):
    """The result of a function whose memory is its alone."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)


def _peak(work) -> tuple[float, float]:
    """Seconds a function takes, and the most memory above the start that it holds, in GiB."""
    forget_peak()
    start, began = memory("VmRSS"), time.perf_counter()
    work()
    return time.perf_counter() - began, (memory("VmHWM") - start) / GIB


def _write(folder: Path) -> float:
    """The model, with the nano tokenizer, for only the number of tokens matters; returns the GiB of its weights."""
    model = random_model(Phi2Config(), torch.device("cpu"), torch.bfloat16)
    save_pretrained(model, load_tokenizer(resolve("nano")), folder)
    return sum(parameter.nbytes for parameter in model.parameters()) / GIB


@torch.no_grad()
def _logits_of_transformers(folder: Path) -> torch.Tensor:
    import transformers

    return transformers.PhiForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@torch.no_grad()
def _load(folder: Path, dtype: torch.dtype) -> dict:
    loaded = []
    seconds, peak = _peak(lambda: loaded.append(load_model(folder, "cpu", dtype)))
    return {"seconds": seconds, "peak": peak, "logits": loaded[0](IDS)}


def _dpo_step(folder: Path) -> dict:
    """One update of the loop on one pair."""
    row = {"prompt": "fox " * 64, "chosen": "owl " * 400, "rejected": "cat " * 400}
    (folder / "pair.jsonl").write_text(json.dumps(row) + "\n")
    config = dpo.DPOConfig(
        model=str(folder),
        data=str(folder / "pair.jsonl"),
        output=str(folder / "run"),
        lora=LoraConfig(target_modules=TARGETS),
        dtype="bfloat16",
        max_length=256,
        max_steps=1,
        per_device_train_batch_size=1,
    )
    seconds, peak = _peak(lambda: dpo.train(config))
    return {"seconds": round(seconds), "peak": peak}
