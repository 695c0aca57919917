"""Twenty steps of our training loops and of trl's, from the same weights over the same rows: the same losses.

Both sides run as their users run them, `train(config)` here and `Trainer.train()` there, with their own default order
of the data, over more than three epochs. The learning rates are large: every loss moves far more than the 1e-4 it may
differ by, so another order, another beta or another schedule cannot pass.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from phi2.data.loader import Windows
from phi2.lora import LoraConfig, attach
from phi2.peft_files import save_adapter
from phi2.tokenizer import Tokenizer
from phi2.training import dpo, sft
from phi2.weights import load_model

pytest.importorskip("trl")
accelerate = pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

ROWS, STEPS, SEED = 24, 20, 11
LORA = dict(r=4, lora_alpha=8, target_modules=("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"))
SAME = dict(max_steps=STEPS, seed=SEED, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1)
WORDS = "a small red boat went out to sea and came home with nine fish for the cat on the old stone wall".split()

Rows = list[dict[str, Any]]
Curve = list[dict[str, float]]  # the metrics of every step


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Conversations with two answers each, of very different lengths."""
    draw = random.Random(0)

    def message(role: str, longest: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, longest)))}

    return [
        {
            "prompt": [message("system", 4), message("user", 12), message("assistant", 6), message("user", 12)],
            "chosen": [message("assistant", 24)],
            "rejected": [message("assistant", 24)],
        }
        for _ in range(ROWS)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Phi of transformers with a small ChatML tokenizer, in a folder that both sides load."""
    folder = tmp_path_factory.mktemp("base")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS)], trainer)
    tokenizer = Tokenizer(backend, {"eos_token": "<|endoftext|>"}).with_chatml()
    tokenizer.save(folder)
    torch.manual_seed(0)
    ids = dict(vocab_size=320, bos_token_id=tokenizer.eos_id, eos_token_id=tokenizer.eos_id)
    shape = dict(hidden_size=64, num_attention_heads=2, intermediate_size=128, num_hidden_layers=2)
    transformers.PhiForCausalLM(transformers.PhiConfig(**shape, **ids)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter that our loop starts from, as a peft folder."""
    model = load_model(base, torch.device("cpu"), torch.float32)
    attach(model, LoraConfig(**LORA), SEED)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder, "base")
    return folder


@pytest.fixture
def ours(base: Path, rows: Rows, tmp_path: Path) -> Callable[..., Curve]:
    """Our loop's metrics at every step, given what differs from the common settings."""

    def run(loop, **options: Any) -> Curve:
        data = tmp_path / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows_for(loop, rows)))
        config = {dpo: dpo.DPOConfig, sft: sft.SFTConfig}[loop]
        common = dict(dtype="float32", device="cpu", lora=LoraConfig(**LORA), **SAME)
        where = dict(model=str(base), data=str(data), output=str(tmp_path / "ours"))
        out = loop.train(config(**{**where, **common, **options}))
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    return run


@pytest.fixture
def theirs(base: Path, adapter: Path, rows: Rows, tmp_path: Path) -> Callable[..., Curve]:
    """trl's logs at every step; a fresh adapter of trl's is given our starting weights."""
    import trl

    def run(loop, lora: bool = True, **options: Any) -> Curve:
        name = {dpo: "DPO", sft: "SFT"}[loop]
        off = dict(use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True)
        args = getattr(trl, f"{name}Config")(str(tmp_path / "theirs"), **{**off, **SAME, **options})
        trainer = getattr(trl, f"{name}Trainer")(
            transformers.PhiForCausalLM.from_pretrained(base, dtype=torch.float32),
            args=args,
            train_dataset=datasets.Dataset.from_list(rows_for(loop, rows)),
            processing_class=transformers.AutoTokenizer.from_pretrained(base),
            peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **LORA) if lora else None,
        )
        if lora:
            loaded = peft.set_peft_model_state_dict(trainer.model, peft.load_peft_weights(adapter, device="cpu"))
            assert not loaded.unexpected_keys
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line]

    return run


def rows_for(loop, rows: Rows) -> Rows:
    return rows if loop is dpo else [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
