"""What runs of both libraries start from: one tiny Phi, one new adapter, settings that are alike in both."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from phi2.checkpoints.peft_files import save_adapter
from phi2.checkpoints.weights import load_model
from phi2.lora import attach
from phi2.lora_config import LoraConfig
from phi2.training import dpo, sft

SEED = 11
TOLERANCE = 1e-4  # nats
LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"])
SAME = dict(max_steps=20, seed=SEED, per_device_train_batch_size=4, learning_rate=5e-3, logging_steps=1)

Curve = list[dict[str, float]]  # the metrics of every step


@pytest.fixture(autouse=True)
def collect_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers collect garbage three times a run, 0.1 s each, to give a GPU its memory back."""
    if "accelerate" in sys.modules:
        monkeypatch.setattr("accelerate.utils.memory.gc", SimpleNamespace(collect=lambda: 0))


@pytest.fixture(scope="session")
def base(tiny_tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Phi of transformers, biases and LayerNorms included."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("base")
    tiny_tokenizer.save(folder)
    shape = dict(vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    eos = tiny_tokenizer.eos_id
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**shape, bos_token_id=eos, eos_token_id=eos))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def fresh_adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What our loop starts a new adapter from, as peft reads it."""
    folder = tmp_path_factory.mktemp("fresh")
    model = load_model(base, torch.device("cpu"), torch.float32)
    attach(model, LoraConfig(**LORA), SEED)
    save_adapter(model, folder, "base")
    return folder


@pytest.fixture
def run_ours(base: Path, write_rows, metrics_of, tmp_path: Path) -> Callable[..., Curve]:
    """Runs our loop and returns its metrics: run_ours(dpo, rows, **what differs from the common settings)."""

    def run(loop, rows: list[dict], **options: Any) -> Curve:
        where = dict(model=str(base), data=write_rows(rows), output=str(tmp_path / "ours"), device="cpu")
        config = dpo.DPOConfig if loop is dpo else sft.SFTConfig
        return metrics_of(loop.train(config(**{**where, "lora": LoraConfig(**LORA), **SAME, **options})))

    return run


@pytest.fixture
def run_theirs(base: Path, fresh_adapter: Path, tmp_path: Path) -> Callable[..., Curve]:
    """Runs a trainer of trl and returns its logs: run_theirs(Config, Trainer, rows, **what differs).

    A new adapter is trl's own, given our starting weights; `adapter` goes on with one, and `lora=None` has none.
    `where` is another model than `base`.
    """
    datasets, peft = pytest.importorskip("datasets"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    def run(
        Config,
        Trainer,
        rows: list[dict],
        adapter: Path | None = None,
        lora: dict | None = LORA,
        where=base,
        callbacks: tuple = (),
        **options: Any,
    ) -> Curve:
        model, extra = transformers.PhiForCausalLM.from_pretrained(where, dtype=torch.float32), {}
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
        elif lora is not None:
            extra["peft_config"] = peft.LoraConfig(task_type="CAUSAL_LM", **lora)
        plain = dict(use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True)
        trainer = Trainer(
            model,
            args=Config(str(tmp_path / "theirs"), **{**plain, **SAME, **options}),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(where),
            callbacks=[*callbacks],
            **extra,
        )
        if extra:
            start = peft.load_peft_weights(fresh_adapter, device="cpu")
            assert not peft.set_peft_model_state_dict(trainer.model, start).unexpected_keys
        trainer.train()
        return [line for line in trainer.state.log_history if "loss" in line]

    return run


@pytest.fixture(scope="session")
def assert_same_losses() -> Callable[[Curve, Curve], None]:
    def check(ours: Curve, theirs: Curve) -> None:
        assert len(ours) == len(theirs) >= 5
        mine, reference = ([step["loss"] for step in curve] for curve in (ours, theirs))
        assert max(reference) - min(reference) > 1000 * TOLERANCE, (
            "the loss hardly moves: this comparison shows nothing"
        )
        torch.testing.assert_close(mine, reference, rtol=0, atol=TOLERANCE)
        for name in ("learning_rate", "grad_norm"):
            assert [step[name] for step in ours] == pytest.approx([step[name] for step in theirs], rel=1e-3)

    return check
