"""A random Phi-2 at full size, 2.78 billion parameters: does it load fast and lean, and is it transformers' Phi?

The twin is made once, by transformers, in bfloat16. A cold page cache measures the disk: the second run tells.
"""

from __future__ import annotations

import json
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.harness.processes import forget_peak, memory
from benchmarks.registry import GateError, Measure, Report, Spread, case

GIB = 2**30
SHAPE = dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32)
IDS = torch.arange(1000, 1064)[None]


@case(
    "full_size", turns=3, summary="a random 2.78 B Phi-2 in bfloat16: load time and memory, logits, one LoRA DPO step"
)
def full_size(turns: int) -> Report:
    """Loads in under 10 s within 1.1 x the weights, equals transformers, and takes a DPO step within 16 GiB."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = _in_process(_make_twin, folder)
        loads = [_in_process(_load, folder, torch.bfloat16) for _ in range(turns)]
        error = _relative(_in_process(_load, folder, torch.float32)["logits"], theirs["logits"])
        if error > 1e-5:
            raise GateError(f"float32 logits differ from transformers' by {error:.1e} of the largest")
        step = _in_process(_dpo_step, folder)
    weights = Spread.of([theirs["weights"]])
    return Report(
        peer={"limit": "", "transformers": theirs["version"], "torch": torch.__version__},
        gate=f"float32 logits within {error:.1e} of the largest of transformers'",
        measures=[
            Measure("load time against 10 s", "s", Spread.of([x["seconds"] for x in loads]), Spread.of([10.0]), 1.0),
            Measure("load peak against the weights", "GiB", Spread.of([x["peak"] for x in loads]), weights, 1.1),
            Measure("DPO step peak against 16 GiB", "GiB", Spread.of([step["peak"]]), Spread.of([16.0]), 1.0),
        ],
        facts={
            "bfloat16_error": f"{_relative(loads[0]['logits'], theirs['logits']):.1e}",
            "pair": "one of 2 x 256 tokens",
            "lora": "r16 on all seven targets",
            "step_seconds": step["seconds"],
        },
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


@torch.no_grad()
def _make_twin(folder: Path) -> dict:
    import transformers

    config = transformers.PhiConfig(**SHAPE, vocab_size=51200, partial_rotary_factor=0.4, eos_token_id=50256)
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(config).eval()
    model.save_pretrained(folder)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"logits": model.float()(IDS).logits, "weights": size / GIB, "version": transformers.__version__}


@torch.no_grad()
def _load(folder: Path, dtype: torch.dtype) -> dict:
    from phi2.checkpoints.weights import load_model

    loaded = []
    seconds, peak = _peak(lambda: loaded.append(load_model(folder, "cpu", dtype)))
    return {"seconds": seconds, "peak": peak, "logits": loaded[0](IDS)}


def _dpo_step(folder: Path) -> dict:
    """One update of the loop on one pair, tokenised with the nano tokenizer: only the number of tokens matters."""
    from phi2.hub import resolve
    from phi2.lora import LoraConfig
    from phi2.tokenizer import Tokenizer
    from phi2.training.dpo import DPOConfig, train

    Tokenizer.from_folder(resolve("nano")).save(folder)
    row = {"prompt": "fox " * 64, "chosen": "owl " * 400, "rejected": "cat " * 400}
    (folder / "pair.jsonl").write_text(json.dumps(row) + "\n")
    targets = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2", "lm_head")
    config = DPOConfig(
        model=str(folder),
        data=str(folder / "pair.jsonl"),
        output=str(folder / "run"),
        lora=LoraConfig(target_modules=targets),
        dtype="bfloat16",
        max_length=256,
        max_steps=1,
        per_device_train_batch_size=1,
    )
    seconds, peak = _peak(lambda: train(config))
    return {"seconds": round(seconds), "peak": peak}
